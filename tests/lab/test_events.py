"""What happens to real machines besides kills and power cuts: a person's switch, a check that refuses, emergency mode, a
site without power, the boot menu, a boot loader that lies, jobs that outlive their switch, a switch that waits for the
boot. On booted machines, with the real systemd: what it does there is nobody's model.

    tests/run --whole tests/lab/test_events.py      writes tests/lab/events.md, too
"""

import os
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
from tiers import stamp
from toynixos import write_config

from lab.conftest import name_event
from lab.lab import TESTS, TRIAL, Host, Lab, Layer, Server
from lab.test_matrix import (
    SLOT_S,
    WEB,
    at_rest,
    behaviour,
    by_force,
    installed,
    is_active,
    is_well,
    labels,
    last,
    publish,
    reports,
    server,
    settled,
    wait,
)

__all__ = ["installed", "server"]  # fixtures

TABLE = """\
# What else happens to machines → what the host reported

Written by `tests/run --whole tests/lab/test_events.py`, of STAMP, when all of it has passed. Each row is a booted machine
with the real systemd. Reports: of all attempts from its first release to its last one, in order; a slash between two
releases. Boots: from its first one on. See [the tests](test_events.py) for what each one looks at in the end.

| event | reports | boots | minutes |
| --- | --- | --- | --- |
"""
rows: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.config.option.whole and not request.session.testsfailed:
        (TESTS / "lab/events.md").write_text(TABLE.replace("STAMP", stamp()) + "".join(rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def row(request: pytest.FixtureRequest, host: Host, server: Server) -> Iterator[None]:
    logs = server.path("/home/chroot/h1/logs")
    began, before = time.monotonic(), set(os.listdir(logs))
    yield
    attempts = [name.removesuffix(".log").split("_")[1:] for name in sorted(os.listdir(logs)) if name not in before]
    by_release = (", ".join(result for _, result in group) for _, group in groupby(attempts, lambda each: each[0]))
    rows.append(f"| {name_event(request.node.name)} | {' / '.join(by_release)} | {host.boots} | {(time.monotonic() - began) / 60:.1f} |\n")


@pytest.fixture
def host(lab: Lab, server: Server, installed: Layer) -> Iterator[Host]:
    machine = lab.machine("h1", Host, installed)
    publish(server, machine, "v1")
    server.bento("populate")
    machine.boot()
    settled(machine, server, "v1")
    yield machine
    server.start_sshd()


def which(host: Host) -> tuple[str, str]:
    """Of the running system, and of the profile."""
    return host.label(host.current_system()), host.label(host.profile_system())


def told(host: Host, server: Server, release: str) -> tuple[Any, ...]:
    """What a failed test shows."""
    return reports(server, release), last(server), which(host) if host.is_on else "off", host.console_tail(60)


def activations(host: Host) -> list[str]:
    """The labels of the systems that were activated, by a switch or at a boot."""
    return host.read("/var/toy-activations").split()


# --- nothing was done ---


@pytest.mark.parametrize("kind", ["lock", "check"])
def test_a_switch_that_is_refused_for_a_while(host: Host, server: Server, kind: str) -> None:
    """Another switch holds the lock, or a user's own check does not want it now."""
    before = activations(host)
    behaviour: dict[str, Any] = {}
    if kind == "lock":
        script = "mkdir -p /run/nixos && exec flock /run/nixos/switch-to-configuration.lock sleep 600"
        host.run("systemd-run", "--quiet", "--unit=person", "sh", "-c", script)
        host.wait_for(lambda: is_active(host, "person"))
        words = "lock"
    else:
        host.write("/root/busy", "")
        behaviour["pre_switch"] = {"database": "! [ -e /root/busy ] || { echo a migration is under way; exit 1; }"}
        words = "a migration is under way"
    release = publish(server, host, "v2", **behaviour)
    assert wait(lambda: last(server).get("release") == release, 60), told(host, server, release)
    assert last(server)["result"] == "postponed" and words in last(server)["reason"], told(host, server, release)
    assert which(host) == ("v1", "v1") and activations(host) == before
    if kind == "lock":
        host.run("systemctl", "stop", "person")
    else:
        host.path("/root/busy").unlink()
    by_force(host)
    settled(host, server, "v2")
    assert set(reports(server, release)) == {"postponed", "ok"}


# --- switches that break ---


BUS = "/usr/lib/systemd/system/dbus.service"
# A way back stops what only the new system has, and this takes the bus along.
HOLDS_BUS = "[Service]\nExecStart=sleep infinity\nExecStopPost=systemctl --no-block stop dbus.socket dbus.service\n"
NO_BUS = "systemctl mask --runtime dbus.socket dbus.service; systemctl stop dbus.socket dbus.service"
DEAF = "kill -STOP $(systemctl show --property=MainPID --value systemd-logind)"


def back_to(host: Host, server: Server, release: str, label: str, result: str, timeout_s: float) -> None:
    """All as before: system, profile, boot default, what was up, and the right verdict."""
    done = lambda: is_well(host) and labels(host) == (label,) * 3 and result in reports(server, release)  # noqa: E731
    assert wait(done, timeout_s), told(host, server, release)
    assert not host.exists("/run/nixos/start-list") and is_active(host, WEB) and is_active(host, "systemd-logind")
    assert host.client("probe").stdout.startswith("the server is reached")


@pytest.mark.parametrize("kind", ["changed", "gone"])
def test_a_switch_that_loses_the_bus(host: Host, server: Server, kind: str) -> None:
    """It has stopped units by then, and starts none: nor may that be taken for a machine that is well."""
    units = behaviour(host)["units"]
    bus = host.read(BUS)
    publish(server, host, "old", units=units | {"dbus.service": bus})
    settled(host, server, "old")
    changed = bus.replace("[Service]", "[Service]\nEnvironment=N=2") if kind == "changed" else bus
    more: dict[str, Any] = {}
    if kind == "gone":
        more = {"activation_command": f"[ -e /root/lost ] || {{ touch /root/lost; {NO_BUS}; }}"}
    release = publish(server, host, "v2", units=units | {"dbus.service": changed}, **more)
    assert wait(lambda: "interrupted" in reports(server, release), 150), told(host, server, release)
    assert set(reports(server, release)) <= {"interrupted", "rollback-failed"}, told(host, server, release)
    if kind == "changed":  # it would lose it at each of its three tries
        publish(server, host, "v3", units=units | {"dbus.service": bus})
    settled(host, server, "v3" if kind == "changed" else "v2", 200)
    assert is_active(host, "systemd-logind") and not host.exists("/run/nixos/start-list")


def test_a_way_back_that_loses_the_bus(host: Host, server: Server) -> None:
    """A reboot at once: no switch comes to its end without one."""
    boots = host.boots
    units = behaviour(host)["units"] | {"dbus-daemon.service": HOLDS_BUS}
    starts = [TRIAL, "dbus-daemon.service"]
    release = publish(server, host, "v2", units=units, starts=starts, settings={"health_checks": ["false"]})
    back_to(host, server, release, "v1", "rolled-back", 90)
    assert host.boots == boots + 1, told(host, server, release)


@pytest.mark.parametrize("kind", ["for a while", "for good", "a session"])
def test_logind_does_not_answer(host: Host, server: Server, kind: str) -> None:
    """For good: the way back has one deadline, however many runs there are meanwhile, and then the machine reboots."""
    boots, words = host.boots, {"a session": "echo session git >/run/toy-logind"}.get(kind, DEAF)
    release = publish(server, host, "v2", activation_command=f"[ -e /root/once ] || {{ touch /root/once; {words}; }}")
    if kind == "for a while":
        assert wait(lambda: "rollback-failed" in reports(server, release), 60), told(host, server, release)
        assert not is_active(host, WEB), "nothing was started"
        host.run("sh", "-c", DEAF.replace("STOP", "CONT"))
    assert wait(lambda: "interrupted" in reports(server, release), 240), told(host, server, release)
    settled(host, server, "v2", 90)
    assert host.boots - boots == (kind == "for good"), told(host, server, release)
    assert set(reports(server, release)) <= {"rollback-failed", "interrupted", "ok"}


def test_a_check_of_the_old_system_that_refuses_the_way_back(host: Host, server: Server) -> None:
    publish(server, host, "old", pre_switch={"reachable": "grep -q up /run/toy-network"})
    settled(host, server, "old")
    release = publish(server, host, "v2", cut_network=True)
    back_to(host, server, release, "old", "rolled-back", 90)


def test_a_check_that_hangs(host: Host, server: Server) -> None:
    release = publish(server, host, "v2", pre_switch={"hangs": "[ -e /root/go ] || sleep 600"})
    assert wait(lambda: last(server).get("release") == release, 90), told(host, server, release)
    assert last(server)["result"] == "postponed" and "no end in time" in last(server)["reason"], told(host, server, release)
    assert which(host) == ("v1", "v1") and is_active(host, WEB)
    host.write("/root/go", "")
    settled(host, server, "v2", 90)


def test_a_person_who_switches_during_the_proof(host: Host, server: Server) -> None:
    check = "touch /root/at-prove; for i in $(seq 50); do [ -e /root/go ] && exit 0; sleep 0.1; done"
    settings = {"health_checks": [check], "confirm_timeout": 30}
    release = publish(server, host, "v2", settings=settings)
    assert wait(lambda: host.exists("/root/at-prove"), 60), told(host, server, release)
    write_config(host.path("/etc/nixos"), flake=True, host="h1", **{"label": "mine"} | behaviour(host))
    host.run("nixos-rebuild", "switch", "--flake", "path:/etc/nixos#h1")
    host.write("/root/go", "")
    assert wait(lambda: reports(server, release) == ["ok"] and at_rest(host), 60), told(host, server, release)
    assert "somebody has switched this machine meanwhile" in last(server)["reason"]
    time.sleep(3 * SLOT_S)
    assert labels(host) == ("mine",) * 3, told(host, server, release)
    publish(server, host, "v3")
    settled(host, server, "v3")


# --- emergency mode ---


MOUNT = "[Mount]\nWhat=nothing\nWhere=/mnt\nType=nosuchfs\n"


def test_emergency_mode_on_a_live_machine(host: Host, server: Server) -> None:
    """A file system that does not mount ends us, our timer, and what else needs sysinit.target."""
    units = behaviour(host)["units"] | {"mnt.mount": MOUNT}
    boots = host.boots
    release = publish(server, host, "v2", units=units)
    assert wait(lambda: last(server).get("release") == release and which(host) == ("v1", "v1"), 150), (
        boots, host.boots, told(host, server, release),
    )  # fmt: skip
    assert host.boots <= boots + 1
    assert wait(lambda: is_active(host, "sysinit.target"), 30), told(host, server, release)
    assert host.client("probe").stdout.startswith("the server is reached")
    publish(server, host, "v3")
    settled(host, server, "v3")


# --- a site without power ---


@pytest.mark.parametrize("reboot", ["when-needed", "never"])
def test_hosts_that_boot_faster_than_their_server(host: Host, server: Server, reboot: str) -> None:
    boots = host.boots
    release = publish(server, host, "v2", kernel="6.18", settings={"reboot": reboot})
    if reboot == "when-needed":
        server_goes = lambda: host.boots > boots  # noqa: E731
    else:
        server_goes = lambda: last(server).get("release") == release and last(server)["result"] == "ok"  # noqa: E731
    assert wait(server_goes, 60), told(host, server, release)
    server.stop_sshd()
    host.power_cut()
    boots = host.boots
    host.boot()
    # It comes in the worst moment, if there is one: when the host has just given up on its new system.
    wait(lambda: host.boots > boots + 1 or which(host)[0] == "v1", 25)
    server.start_sshd()
    assert wait(lambda: which(host) == ("v2", "v2") and host.label(host.fallback_system()) == "v2", 150), (
        told(host, server, release)
    )
    settled(host, server, "v2")
    assert "rolled-back" not in reports(server, release)
    assert host.booted_system() == host.current_system()


# --- the boot menu ---


def test_an_older_generation_that_a_person_picks(host: Host, server: Server) -> None:
    publish(server, host, "v2", kernel="6.18", settings={"reboot": "when-needed"})
    boots = host.boots
    assert wait(lambda: host.boots > boots and which(host) == ("v2", "v2"), 60), told(host, server, "")
    settled(host, server, "v2")
    assert wait(lambda: host.label(host.fallback_system()) == "v2", 30), told(host, server, "")
    entry = next(
        path.name
        for path in host.path("/boot/loader/entries").iterdir()
        if f"init={host.profile_system()}/init" not in path.read_text()
    )
    host.power_cut()
    host.pick(entry)
    host.boot()
    old = host.label(host.current_system())
    assert old != "v2"
    boots = host.boots
    time.sleep(20)
    assert (which(host), host.boots) == ((old, "v2"), boots), told(host, server, "")
    assert "up to date" not in host.client("status").stdout
    publish(server, host, "v3", kernel="6.18")
    settled(host, server, "v3")


def test_a_specialisation_that_a_person_picks(host: Host, server: Server) -> None:
    release = publish(server, host, "v2", specialisations={"desk": {"label": "v2-desk"}})
    settled(host, server, "v2")
    entry = next(host.path("/boot/loader/entries").glob("*-specialisation-desk.conf")).name
    host.power_cut()
    host.boot()
    settled(host, server, "v2")
    host.power_cut()
    host.pick(entry)
    host.boot()
    assert which(host) == ("v2-desk", "v2")
    time.sleep(15)
    assert which(host) == ("v2-desk", "v2"), told(host, server, release)
    publish(server, host, "v3", specialisations={"desk": {"label": "v3-desk"}})
    assert wait(lambda: which(host) == ("v3-desk", "v3"), 60), told(host, server, release)


# --- the boot loader ---


def test_a_boot_loader_that_lies(host: Host, server: Server) -> None:
    """/boot is full, the builder says 0, and what it wrote cannot be started."""
    generations = len(list(host.path("/nix/var/nix/profiles").glob("system-*-link")))
    host.fill("/boot", leave_bytes=1024)
    release = publish(server, host, "v2", kernel="6.18", builder="lies")
    assert wait(lambda: last(server).get("release") == release, 60), told(host, server, release)
    assert last(server)["result"] == "postponed", told(host, server, release)
    before = activations(host)
    time.sleep(15)
    assert activations(host) == before, "no flapping"
    assert which(host) == ("v1", "v1")
    assert len(list(host.path("/nix/var/nix/profiles").glob("system-*-link"))) == generations
    host.power_cut()
    host.boot()
    assert which(host) == ("v1", "v1")
    host.unfill("/boot")
    by_force(host)
    settled(host, server, "v2")


@pytest.mark.parametrize("kernel", ["panic", "broken"])
def test_the_boot_loader_leads_back(host: Host, server: Server, kernel: str) -> None:
    """The first boot is a trial: whoever causes it, and whether or not a client comes up."""
    release = publish(server, host, "v2", kernel=kernel)
    settled(host, server, "v2")
    boots = host.boots
    host.power_cut()
    host.boot(timeout_s=60)
    if kernel == "panic":
        assert host.boots == boots + 2 and which(host)[0] == "v1"
    else:
        host.power_cut()
        host.boot()
        assert which(host)[0] == "v1"
    assert wait(lambda: "rolled-back" in reports(server, release), 60), told(host, server, release)


# --- jobs and boots ---


BACKUP = "[Service]\nType=oneshot\nTimeoutStartSec=infinity\nExecStart=sh -c 'until [ -e /root/backed-up ]; do sleep 0.2; done'\n"
HANG = "[Service]\nType=oneshot\nExecStart=sleep 600\n"
BAD = "[Unit]\nAfter=hang.service\n[Service]\nType=oneshot\nExecStart=sh -c 'echo ran >>/root/ran-{}'\nRemainAfterExit=yes\n"


def test_jobs_of_a_switch_that_was_ended(host: Host, server: Server) -> None:
    """One unit of the bad release hangs; another waits for its turn, and must not get it after the way back. What a person
    had queued before does get it."""
    good = behaviour(host)["units"] | {"bad.service": BAD.format("good")}
    publish(server, host, "old", units=good)
    settled(host, server, "old")
    mine = {"mine.service": "[Unit]\nAfter=backup.service\n[Service]\nExecStart=touch /root/mine\n", "backup.service": BACKUP}
    for name, text in mine.items():
        host.write(f"/etc/systemd/system.control/{name}", text)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "--no-block", "backup.service", "mine.service")
    bad = good | {"hang.service": HANG, "bad.service": BAD.format("bad")}
    release = publish(server, host, "v2", units=bad, starts=[TRIAL, "hang.service", "bad.service"])
    assert wait(lambda: reports(server, release) != [], 90), told(host, server, release)
    assert which(host) == ("old", "old") and reports(server, release) == ["rolled-back"], told(host, server, release)
    assert wait(lambda: last(server).get("release") == release, 20), told(host, server, release)  # it follows the log
    assert "hang.service (start)" in last(server)["reason"], told(host, server, release)
    time.sleep(3)
    listed = host.run("systemctl", "list-jobs", "--no-legend").stdout
    assert "bad.service" not in listed and "hang.service" not in listed
    assert not host.exists("/root/ran-bad"), told(host, server, release)
    assert "mine.service" in listed, told(host, server, release)
    host.write("/root/backed-up", "")
    assert wait(lambda: host.exists("/root/mine"), 20), told(host, server, release)


SLOW = "[Service]\nType=oneshot\nExecStart=sleep 6\n"


def test_a_switch_of_2024_in_a_run_that_is_part_of_the_boot(host: Host, server: Server) -> None:
    """It waits for the end of the boot, and the boot for the run."""
    units = behaviour(host)["units"] | {"slow.service": SLOW}
    publish(server, host, "old", units=units, starts=[TRIAL, "slow.service"])
    settled(host, server, "old")
    host.power_cut()
    release = publish(server, host, "v2", units=units, starts=[TRIAL], stc="2024")
    host.boot(wait=False)
    assert wait(lambda: reports(server, release) != [], 90), told(host, server, release)
    assert reports(server, release) == ["ok"], told(host, server, release)
    settled(host, server, "v2")


def test_a_run_does_not_keep_the_boot_from_ending(host: Host, server: Server) -> None:
    """is-system-running is asked by others, too: what they wait for must not be a build that takes hours."""
    host.power_cut()
    publish(server, host, "v2", build_touch="/root/at-build", build_wait="/root/go")
    host.boot(wait=False)
    assert wait(host.path("/root/at-build").exists, 60)
    assert wait(lambda: host.run("systemctl", "is-system-running", check=False).stdout.strip() == "running", 10), (
        told(host, server, "")
    )
    host.write("/root/go", "")
    settled(host, server, "v2")


# --- leaving ---


def test_a_machine_that_leaves(host: Host, server: Server) -> None:
    release = publish(server, host, "v2", units={}, leaves=True)
    assert wait(lambda: last(server).get("release") == release, 60), told(host, server, release)
    assert last(server)["result"] == "ok", told(host, server, release)
    assert wait(lambda: which(host) == ("v2", "v2"), 20), told(host, server, release)
    assert not is_active(host, "bento.timer")
    host.power_cut()
    host.boot()
    assert which(host) == ("v2", "v2")


def test_what_a_person_switches_to_stays(host: Host, server: Server) -> None:
    """By hand, between two runs."""
    config = host.path("/etc/nixos")
    write_config(config, flake=True, host="h1", **{"label": "mine"} | behaviour(host))
    host.run("nixos-rebuild", "switch", "--flake", "path:/etc/nixos#h1")
    time.sleep(12)
    assert which(host) == ("mine", "mine")
    publish(server, host, "v2")
    settled(host, server, "v2")
