"""Back means as before: switches that break, checks that refuse, and units that were up. As the facts have them."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from toylab import HOST, QUARTER, Lab, Systemd, at_any_price, result
from toynixos import write_config

import bento
import bento_client
from bento_client import Result

DAY, WEB = 86400, "web.service"


def units(number: int, *more: str) -> dict[str, Any]:
    """A unit that each release changes: a switch stops it, and starts it at its end."""
    return {"units": {WEB: str(number)} | dict.fromkeys(more, ""), "starts": [WEB, *more]}


@pytest.fixture
def site(tmp_path: Path) -> tuple[Lab, Systemd]:
    return create(tmp_path)


def create(directory: Path, **behaviour: Any) -> tuple[Lab, Systemd]:
    lab = Lab.create(directory, **units(0) | behaviour)
    systemd = Systemd(lab)
    systemd.boot()
    assert WEB in systemd.active()
    return lab, systemd


def logind(lab: Lab) -> Path:
    return lab.machine.root / "run/toy-logind"


def journal(lab: Lab) -> bool:
    return (lab.state / "pending.json").exists()


def is_back(lab: Lab, systemd: Systemd) -> bool:
    """All of it: the system, its boot default, and what was up is up."""
    list_left = (lab.machine.root / "run/nixos/start-list").exists()
    return lab.labels() == ("v0", "v0", "v0") and systemd.active() == {WEB} and not journal(lab) and not list_left


def settled(lab: Lab, systemd: Systemd) -> None:
    """A run that ends after the recovery: what was interrupted would be tried again."""
    lab.down.touch()
    systemd.run("run", code=75)
    lab.down.unlink()


# --- switches that break ---


def test_a_session_that_goes_away_is_nobodys_fault(site: tuple[Lab, Systemd]) -> None:
    lab, systemd = site
    release = lab.publish("v1", **units(1))
    logind(lab).write_text("session git")
    systemd.run("run", code=1)
    assert result(lab) == (Result.INTERRUPTED, release) and is_back(lab, systemd)
    assert "broke in the middle: switch-to-configuration test: exit 1: Failed to get GID for git" in lab.last().reason
    systemd.run("run")
    assert lab.labels() == ("v1", "v1", "v1") and systemd.active() == {WEB}


def test_a_way_back_that_breaks_is_not_done(site: tuple[Lab, Systemd]) -> None:
    """Both switches end after the activation. /run/current-system is right then, and nothing is started."""
    lab, systemd = site
    lab.publish("v1", **units(1), activation_command=f"echo silent >{logind(lab)}")
    systemd.run("run", code=1)
    assert result(lab)[0] == Result.ROLLBACK_FAILED and journal(lab)
    assert "exit 11: Unable to list users with logind" in lab.last().reason
    at_any_price(lab, "run", PATH=systemd.path)
    assert systemd.active() == set() and journal(lab)
    logind(lab).unlink()
    settled(lab, systemd)
    assert is_back(lab, systemd) and result(lab)[0] == Result.INTERRUPTED


def test_the_deadline_of_a_way_back_is_set_once(site: tuple[Lab, Systemd]) -> None:
    lab, systemd = site
    lab.publish("v1", **units(1), activation_command=f"echo silent >{logind(lab)}")
    systemd.run("run", code=1)
    [timer], deadline = os.listdir(systemd.top / "timers"), (lab.state / "pending.json").read_text()
    for _ in range(3):
        at_any_price(lab, "run", PATH=systemd.path)
        assert os.listdir(systemd.top / "timers") == [timer]
        words = re.findall('"deadline.*', (lab.state / "pending.json").read_text())
        assert words == re.findall('"deadline.*', deadline) and len(words) == 2
    assert systemd.reboots() == 0
    pending = bento_client.parse_pending((lab.state / "pending.json").read_bytes(), "journal")
    (lab.state / "pending.json").write_bytes(bento_client.encode(pending._replace(deadline_s=1.0)))
    systemd.fire()
    assert systemd.reboots() == 1, "its time is over: no other way is left"
    systemd.boot()
    settled(lab, systemd)
    assert is_back(lab, systemd)


def test_a_way_back_that_loses_the_bus_is_a_reboot_at_once(site: tuple[Lab, Systemd]) -> None:
    """dbus-daemon.service is the new system's: the old one's switch stops it."""
    lab, systemd = site
    lab.publish("v1", **units(1, "dbus-daemon.service"), cut_network=True)
    began = time.monotonic()
    systemd.run("run", code=1)
    assert systemd.reboots() == 1 and journal(lab)
    assert time.monotonic() - began < 50, "who is asked first, is not there"
    systemd.boot()
    systemd.run("run")
    assert is_back(lab, systemd) and result(lab)[0] == Result.ROLLED_BACK


def test_a_forward_switch_that_loses_the_bus_is_not_ok(tmp_path: Path) -> None:
    lab, systemd = create(tmp_path, **units(0, "dbus-daemon.service"))
    lab.publish("v1", **units(1))
    systemd.run("run", code=1)
    assert systemd.reboots() == 1 and lab.labels() == ("v0", "v0", "v0")
    systemd.boot()
    settled(lab, systemd)
    assert result(lab)[0] == Result.INTERRUPTED


def test_a_switch_that_waits_for_a_bus_it_stopped_says_what_it_did(tmp_path: Path) -> None:
    """That of 2024. Its last words are all there is: no job is in systemd's queue."""
    lab, systemd = create(tmp_path, **units(0, "dbus.service"))
    lab.publish("v1", **units(1), stc="2024")
    systemd.run("run", "--activation-timeout", "2", code=1)
    assert "no end in time: stopping the following units: dbus.service, web.service" in lab.last().reason


def test_what_is_down_after_the_way_back_is_named(site: tuple[Lab, Systemd]) -> None:
    lab, systemd = site
    by_hand = lab.machine.root / "run/toy-units/mine.service"
    by_hand.touch()
    lab.publish("v1", **units(1), activation_command=f"rm {by_hand}; false")
    systemd.run("run", code=1)
    assert lab.last().reason.endswith("; not active any more: mine.service")
    assert lab.report().failed_units == ("mine.service",)
    by_hand.touch()
    systemd.run("run")
    assert lab.report().failed_units == ()


# --- checks and locks ---


def test_no_check_forbids_the_way_back(tmp_path: Path) -> None:
    """Of the old system's own, which refuses while the machine is unwell; nor does it keep the boot default from it."""
    lab, systemd = create(tmp_path, pre_switch={"reachable": "! grep -q down $TOY_ROOT/run/toy-network"})
    lab.publish("v1", **units(1), cut_network=True)
    systemd.run("run", code=1)
    assert is_back(lab, systemd) and result(lab)[0] == Result.ROLLED_BACK


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"pre_switch": {"backupRuns": "false"}}, "exit 1: pre-switch check refuses: 'backupRuns'"),
        ({"pre_switch": {"hangs": "sleep 60"}}, "no end in time"),
        ({"switch_exit": 7}, "exit 7: error: activation refused"),
    ],
    ids=["refuses", "hangs", "no reason"],
)
def test_what_never_began_is_postponed_and_tried_at_each_poll(
    site: tuple[Lab, Systemd], behaviour: dict[str, Any], words: str
) -> None:
    lab, systemd = site
    lab.publish("v1", **units(1), **behaviour)
    for attempt in range(1, 5):
        systemd.run("run", "--activation-timeout", "1", code=1)
        assert (lab.last().result, lab.last().attempt) == (Result.POSTPONED, attempt)
    assert words in lab.last().reason and is_back(lab, systemd) and lab.machine.activations() == ["v0", "v0"]


def test_a_persons_broken_switch_is_not_ours(site: tuple[Lab, Systemd]) -> None:
    lab, systemd = site
    (lab.machine.root / "run/nixos").mkdir(exist_ok=True)
    (lab.machine.root / "run/nixos/start-list").write_text(f"{WEB}\n")
    lab.publish("v1", **units(1), pre_switch={"never": "false"})
    systemd.run("run", code=1)
    assert result(lab)[0] == Result.POSTPONED and lab.machine.activations() == ["v0", "v0"]


def test_who_holds_the_lock(site: tuple[Lab, Systemd]) -> None:
    lab, systemd = site
    lab.publish("v1", **units(1))
    with lab.machine.hold_lock():
        for _ in range(4):
            systemd.run("run", code=1)
    assert re.search(r"not activated: process \d+ \(.+\) holds the lock", lab.last().reason)
    systemd.run("run")
    assert lab.labels() == ("v1", "v1", "v1")


# --- words ---


@pytest.mark.parametrize(
    ("behaviour", "results", "words"),
    [
        ({"activation_command": "echo cannot; false"}, Result.ROLLED_BACK, "exit 2: cannot"),
        (
            {"activation_command": "echo cannot; false", "reload_fails": ["a.service"]},
            Result.ROLLED_BACK,
            "exit 4: cannot",
        ),
        ({"reload_fails": ["a.service"]}, Result.OK, "activated, but these units failed: a.service"),
        ({"user_activation_fails": ["eve"]}, Result.OK, "activated, but these units failed: user activation for eve"),
    ],
    ids=["script", "script and a unit", "reload", "user"],
)
def test_what_failed_is_told_by_name(
    site: tuple[Lab, Systemd], behaviour: dict[str, Any], results: str, words: str
) -> None:
    lab, systemd = site
    lab.publish("v1", **units(1), **behaviour)
    systemd.run("run", code=0 if results == Result.OK else 1)
    assert lab.last().result == results and words in lab.last().reason


def test_a_check_that_refuses_the_boot_default_is_told_as_one(site: tuple[Lab, Systemd]) -> None:
    lab, systemd = site
    lab.publish("v1", **units(1), pre_switch={"noBoot": "[ $2 != boot ]"})
    systemd.run("run", code=1)
    assert is_back(lab, systemd) and "pre-switch check refuses: 'noBoot'" in lab.last().reason
    assert "next attempt in 1" in systemd.run("run"), "that has cost an activation"


# --- a person, and time ---


@pytest.mark.parametrize("action", ["switch", "test", "boot"])
def test_who_switches_during_the_proof_has_the_last_word(site: tuple[Lab, Systemd], action: str) -> None:
    lab, systemd = site
    own = write_config(lab.directory / "own", flake=True, host=HOST, label="own", client_json=lab.settings, **units(7))
    argv = f"PATH={systemd.path} nixos-rebuild {action} --flake path:{own}#{HOST} >&2"
    lab.publish("v1", **units(1), settings={"health_checks": [argv]})
    systemd.run("run")
    theirs = {"switch": ("own",) * 3, "test": ("own", "v0", "v0"), "boot": ("v1", "own", "own")}[action]
    for _ in range(2):
        assert lab.labels() == theirs and lab.last().result == Result.OK and not journal(lab)
        systemd.run("run")
    lab.publish("v2", **units(2))
    systemd.run("run")
    assert lab.labels() == ("v2", "v2", "v2")


def test_three_verdicts_and_again(site: tuple[Lab, Systemd]) -> None:
    """A release is given up after the third, a day apart each; `populate --again` lifts that."""
    lab, systemd = site
    lab.publish("v1", **units(1), cut_network=True)
    for attempt in (1, 2, 3):
        systemd.run("run", code=1)
        assert (lab.last().result, lab.last().attempt) == (Result.ROLLED_BACK, attempt)
        assert "next attempt in 2" in systemd.run("run") or attempt == 3
        lab.age_attempts(DAY)
    assert ": waiting for a new release, or 'bento.py populate --again'" in systemd.run("run")
    assert "again      not before another release" in lab.client("status")
    argv = ["--fleet", lab.file("fleet"), "--chroot-dir", lab.file("chroot"), "populate"]
    assert bento.main(argv) == 0 and "waiting" in systemd.run("run"), "unchanged says nothing"
    assert bento.main([*argv, "--again"]) == 0 and len(lab_history(lab)) == 2
    assert "published again" in systemd.run("run", code=1)
    lab.age_attempts(DAY)
    assert "attempt 5" in systemd.run("run", code=1)


def lab_history(lab: Lab) -> list[str]:
    return (lab.chroot / "history").read_text().splitlines()


def publish_again(lab: Lab, seconds: float) -> None:
    """The same release, so much later (or earlier)."""
    path = lab.chroot / "current.json"
    current = bento_client.parse_current(path.read_bytes(), "current.json")
    published = bento_client.format_time(bento_client.parse_time(current.published) + seconds)
    path.write_bytes(bento_client.encode(current._replace(published=published)))


def test_a_server_that_was_restored_is_not_followed(site: tuple[Lab, Systemd]) -> None:
    lab, systemd = site
    lab.publish("v1", **units(1))
    earlier = (lab.chroot / "current.json").read_bytes()
    systemd.run("run")
    lab.publish("v2", **units(2))
    publish_again(lab, QUARTER)
    systemd.run("run")
    (lab.chroot / "current.json").write_bytes(earlier)
    for _ in range(2):
        assert "'bento.py populate --again' if the older state is meant" in systemd.run("run", code=1)
    assert lab.labels() == ("v2", "v2", "v2") and "the server publishes what is of" in lab.last().reason
    publish_again(lab, 2 * QUARTER)
    systemd.run("run")
    assert lab.labels() == ("v1", "v1", "v1")
