"""A machine that runs Bento 1.1, its client and its units, is updated to what is here, and hit in the middle of it.

With the real systemd, and the release of 1.1 as it landed (tests/landed.py). What settles it is whichever client the
machine then runs: the one of 1.1 until the new system is live or booted, today's from then on.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from landed import unpack_1_1

from lab.lab import Host, Lab, Layer, Server
from lab.test_matrix import (
    SLOT_S,
    at_rest,
    behaviour,
    held_in,
    install,
    labels,
    last,
    publish,
    reports,
    server,
    settled,
    strike,
    wait,
    wait_for_phase,
)

__all__ = ["server"]  # a fixture


@pytest.fixture(scope="module")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_1_1(tmp_path_factory.mktemp("landed"))


def of_1_1(host: Host, landed: Path, **settings: Any) -> dict[str, Any]:
    """As `behaviour`, of a system that 1.1 made."""
    made = behaviour(host, source=landed / "utils/bento.nix", **settings)
    return made | {"client": landed / "bento_client.py"}


@pytest.fixture(scope="module")
def installed_1_1(lab: Lab, server: Server, landed: Path) -> Layer:
    return install(lab, server, **of_1_1(lab.machine("h1", Host), landed))


@pytest.fixture
def host(lab: Lab, server: Server, installed_1_1: Layer, landed: Path) -> Iterator[Host]:
    machine = lab.machine("h1", Host, installed_1_1)
    publish(server, machine, "v1", **of_1_1(machine, landed))
    server.bento("populate")
    machine.boot()
    settled(machine, server, "v1")
    assert version(machine) == "1.1"
    yield machine


def version(host: Host) -> str:
    return host.client("--version").stdout.strip()


def told(host: Host, server: Server, release: str) -> tuple[Any, ...]:
    """What a failed test shows."""
    return reports(server, release), last(server), labels(host) if host.is_on else "off", host.console_tail(80)


def journals(host: Host) -> list[str]:
    names = ("pending.json", "pending.json.damaged")
    return [name for name in names if host.exists(f"{host.state}/{name}")]


def is_new_and_well(host: Host, server: Server, label: str, release: str, **more: Any) -> None:
    """Today's client runs it, nothing is left of 1.1's journals, and the next release and the next boot are like any.
    `more`: of that release."""
    assert wait(lambda: at_rest(host) and labels(host)[0] == label and last(server).get("result") == "ok", 70), (
        told(host, server, release)
    )
    assert version(host) == "1.2" and journals(host) == [], told(host, server, release)
    assert host.client("probe").stdout.startswith("the server is reached")
    next_one = publish(server, host, "next", **more)
    settled(host, server, "next")
    host.power_cut()
    host.boot()
    settled(host, server, "next")
    assert labels(host) == ("next",) * 3 and set(reports(server, next_one)) == {"ok"}, told(host, server, next_one)


@pytest.mark.parametrize("event", ["kill", "power"])
@pytest.mark.parametrize("phase", ["build", "activate", "prove", "commit"])
def test_cut_short_on_the_way_to_this_client(host: Host, server: Server, phase: str, event: str) -> None:
    release = publish(server, host, "v2", **held_in(phase))
    strike(event, host, server, wait_for_phase(host, phase))
    time.sleep(2)
    host.write("/root/go", "")
    is_new_and_well(host, server, "v2", release)


@pytest.mark.parametrize("event", ["kill", "nothing"])
def test_rolled_back_by_1_1(host: Host, server: Server, landed: Path, event: str) -> None:
    """It has begun the way back when it is killed: today's client, of the release that was bad, ends it."""
    host.write("/root/go", "")
    publish(server, host, "old", switch_touch="/root/at-switch", switch_wait="/root/go", **of_1_1(host, landed))
    settled(host, server, "old")
    host.path("/root/at-switch").unlink()
    host.path("/root/go").unlink()
    release = publish(server, host, "v2", settings={"health_checks": ["false"]})
    client = wait_for_phase(host, "activate")  # of the old system, again
    if event == "kill":
        strike("kill", host, server, client)
        time.sleep(2 * SLOT_S)
    host.write("/root/go", "")
    assert wait(lambda: at_rest(host) and last(server).get("result") == "rolled-back", 70), told(host, server, release)
    assert labels(host) == ("old",) * 3 and version(host) == "1.1" and journals(host) == [], told(host, server, release)
    is_new_and_well(host, server, "v3", publish(server, host, "v3"))


LIVE: dict[str, Any] = {"kernel": "6.18"}  # goes live on the old kernel, and waits for its first boot
BOOT: dict[str, Any] = {"init": "systemd 3"}  # cannot go live


@pytest.mark.parametrize("reboot", ["never", "when-needed"])
@pytest.mark.parametrize("release", [LIVE, BOOT], ids=["live", "boot"])
def test_waiting_for_a_boot(host: Host, server: Server, landed: Path, release: dict[str, Any], reboot: str) -> None:
    publish(server, host, "old", **of_1_1(host, landed, reboot=reboot))
    settled(host, server, "old")
    boots = host.boots
    name = publish(server, host, "v2", settings={"reboot": reboot}, **release)
    assert wait(lambda: reports(server, name) != [], 60), told(host, server, name)
    if reboot == "never":
        assert wait(lambda: host.label(host.default_system()) == "v2", 30)
        time.sleep(2 * SLOT_S)  # today's client has a look, where it is live
        host.power_cut()
        host.boot()
    assert wait(lambda: host.boots > boots, 60), told(host, server, name)
    is_new_and_well(host, server, "v2", name, **release)


def test_a_kernel_without_network_after_1_1(host: Host, server: Server) -> None:
    """1.1 proved it on the old kernel; the client that finds no server after the boot is today's, and leads back."""
    name = publish(server, host, "v2", kernel="broken", settings={"offline_after": 60})  # else it has 45 minutes
    assert wait(lambda: reports(server, name) != [], 60), told(host, server, name)
    host.power_cut()
    host.boot()
    assert wait(lambda: "rolled-back" in reports(server, name), 150), told(host, server, name)
    assert host.label(host.booted_system()) == "v1"
    is_new_and_well(host, server, "v3", publish(server, host, "v3"))


def test_back_to_1_1_by_hand_and_on_again(host: Host, server: Server) -> None:
    """The client of 1.1 then reads what today's has written."""
    name = publish(server, host, "v2")
    settled(host, server, "v2")
    assert version(host) == "1.2"
    host.client("rollback")
    assert wait(lambda: labels(host) == ("v1",) * 3 and at_rest(host), 30), told(host, server, name)
    time.sleep(2 * SLOT_S)
    assert version(host) == "1.1" and labels(host) == ("v1",) * 3 and journals(host) == [], told(host, server, name)
    is_new_and_well(host, server, "v3", publish(server, host, "v3"))
