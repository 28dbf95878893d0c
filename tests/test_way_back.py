"""What leads a machine back: systems that no boot has proven yet, ways back that fail, full disks, a person's hand.

Without systemd, but where a test has `Systemd`: programs that stand in for systemd-run and systemctl, which the lab
has for real. They keep the timers that are armed and the reboots that are asked for.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toylab import HOST, A, B, Lab, Systemd, at_any_price, be_patient, inhibited, kill_tree, result, wait_until
from toynixos import PYTHON_FLAGS, latin_1, write_config

import bento_client
from bento_client import BentoError, Pending, Result


def check_way_back(lab: Lab, *, patient: bool = True) -> None:
    """The machine was booted into a kernel without network: within a few runs and a boot it is on the old one, and polls."""
    if patient:
        be_patient(lab)
    at_any_price(lab, "run")
    assert lab.labels()[1:] == ("v0", "v0"), "what is booted next is what worked"
    lab.machine.power_cycle()
    assert lab.labels() == ("v0", "v0", "v0") and lab.machine.network() == "up"
    lab.publish("good", inhibitors="dbus 1")
    lab.client("run")
    assert lab.labels() == ("good", "good", "good")
    lab.machine.power_cycle()
    lab.client("run")
    assert lab.labels() == ("good", "good", "good")


def way_back(boot_id: str, **more: Any) -> Pending:
    now, step = "2026-11-25T20:00:00Z", bento_client.Step.ROLLING_BACK
    return Pending(A, now, "/old", "/new", "/old", step, boot_id, "token", now, 1)._replace(**more)


# --- systems that no boot has proven ---


def test_a_kernel_that_went_live_is_proven_by_whoever_reboots(tmp_path: Path) -> None:
    """reboot = "never": weeks later comes a power cut."""
    lab = inhibited(tmp_path)
    lab.publish("v1", kernel="broken", inhibitors="dbus 1")
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1") and lab.report().needs_reboot
    assert not (lab.state / "pending.json").exists()
    for _ in range(2):
        lab.client("run")
    lab.machine.power_cycle()
    assert lab.machine.network() == "down"
    check_way_back(lab)


def test_a_good_kernel_that_went_live(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path)
    release = lab.publish("v1", kernel="6.13")
    lab.client("run")
    assert (lab.machine.profile.parent / "system-profiles/bento/nixos-version").read_text().strip() == "v0"
    lab.machine.power_cycle()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1") and result(lab) == (Result.OK, release)
    assert not lab.report().needs_reboot
    assert not (lab.state / "pending.json").exists()


def test_a_person_who_boots_the_old_generation_is_followed(tmp_path: Path) -> None:
    """The new kernel does not start at all: somebody picks the old one in the boot menu. Once it may be for another reason."""
    lab = Lab.create(tmp_path)
    release = lab.publish("v1", kernel="6.13")
    lab.client("run")
    lab.machine.power_cycle(pick="1")
    assert lab.labels() == ("v0", "v1", "v1")
    lab.down.touch()  # so that the run ends after the recovery
    assert "did not come up" in lab.client("run", code=75)
    assert lab.labels() == ("v0", "v0", "v0") and result(lab) == (Result.POSTPONED, release)
    lab.down.unlink()
    lab.age_attempts(86400)
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1"), "tried once more"
    lab.machine.power_cycle(pick="1")
    assert "did not come up" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0") and result(lab) == (Result.ROLLED_BACK, release)
    assert "was rolled back" in lab.client("run")


def test_a_health_check_after_the_boot_is_no_power_cuts_fault(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path)
    release = lab.publish("v1", kernel="6.13", settings={"health_checks": [f"! [ -e {lab.file('ill')} ]"]})
    lab.client("run")
    lab.machine.power_cycle()
    Path(lab.file("ill")).touch()
    lab.settings["confirm_timeout"] = 2
    assert "was rolled back (after the boot, health check failed" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0") and result(lab) == (Result.ROLLED_BACK, release)


@pytest.mark.parametrize("end", ["rolled back", "power cut"])
def test_a_newer_release_does_not_hide_the_one_that_waits(tmp_path: Path, end: str) -> None:
    lab = inhibited(tmp_path)
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    lab.client("run")
    assert lab.labels() == ("v0", "v1", "v1")
    if end == "rolled back":
        lab.publish("v2", inhibitors="dbus 1", cut_network=True)
        lab.client("run", code=1)
    else:
        lab.publish("v2", inhibitors="dbus 1", switch_touch=lab.file("reached"), switch_wait=lab.file("never"))
        process = lab.start("run")
        wait_until(Path(lab.file("reached")).exists)
        kill_tree(process)
    assert lab.labels() == ("v0", "v1", "v1")
    lab.machine.power_cycle()
    assert lab.machine.network() == "down"
    if end == "power cut":
        lab.client("run", code=75)  # which ends what was under way
    check_way_back(lab)


def test_a_newer_release_takes_the_place_of_the_one_that_waits(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    lab.client("run")
    release = lab.publish("v2", inhibitors="dbus 1")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2") and not lab.report().needs_reboot
    lab.machine.power_cycle()
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2") and result(lab) == (Result.OK, release)


def test_a_chain_of_systems_that_wait_goes_back_to_what_was_booted(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    for label in ("v1", "v2", "v3"):
        lab.publish(label, kernel="broken", inhibitors="dbus 1")
        lab.client("run")
    assert lab.labels() == ("v3", "v3", "v3")
    lab.machine.power_cycle()
    check_way_back(lab)


def test_the_result_of_the_newest_release_is_kept(tmp_path: Path) -> None:
    """v1 waits, v2 is rolled back; a boot that proves v1 makes no success of v2, nor tries it again."""
    lab = Lab.create(tmp_path)
    systemd = Systemd(lab)
    first = lab.publish("v1", kernel="6.13")
    systemd.run("run")
    second = lab.publish("v2", cut_network=True, kernel="6.13")
    systemd.run("run", code=1)
    systemd.run("run", "--reboot", "when-needed")
    assert systemd.reboots() == 1
    systemd.boot()
    assert "was rolled back" in systemd.run("run")
    assert lab.labels() == ("v1", "v1", "v1") and lab.report().release == first
    assert result(lab) == (Result.ROLLED_BACK, second)


def test_what_a_person_booted_is_left_alone(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    systemd.run("run")
    config = write_config(tmp_path / "byhand", flake=True, host=HOST, label="byhand", client_json=lab.settings, inhibitors="dbus 1")
    assert lab.machine.rebuild("switch", config, env={"PATH": systemd.path}).returncode == 0
    systemd.run("run", "--reboot", "when-needed")
    assert systemd.reboots() == 0 and lab.report().needs_reboot is False
    lab.machine.power_cycle()
    assert "bento:" not in lab.client("run"), "there is nothing to be said, or to be done"
    assert lab.labels() == ("byhand", "byhand", "byhand")
    lab.machine.power_cycle()
    assert lab.labels() == ("byhand", "byhand", "byhand")
    assert not (lab.state / "pending.json").exists()


@contextmanager
def hung(systemd: Systemd, mark: str) -> Iterator[None]:
    """A run that hangs as soon as there is this file, until its watchdog has ended it."""
    process = systemd.start("run")
    wait_until(Path(mark).exists)
    [timer] = systemd.timers()
    process.send_signal(signal.SIGSTOP)
    yield
    systemd.lab.machine.run(*timer, env=systemd.lab.env(PATH=systemd.path))
    assert process.wait(10) == -signal.SIGKILL


def test_the_watchdog_says_that_the_client_hung(lab: Lab) -> None:
    systemd = Systemd(lab)
    release = lab.publish("v1", switch_touch=lab.file("at-switch"), switch_wait=lab.file("never"))
    with hung(systemd, lab.file("at-switch")):
        pass
    assert result(lab) == (Result.INTERRUPTED, release) and lab.last().reason == "the client hung while activating"
    assert lab.labels() == ("v0", "v0", "v0")


def test_the_watchdog_leaves_a_persons_system_alone(lab: Lab) -> None:
    systemd = Systemd(lab)
    lab.publish("v1", settings={"health_checks": [f"touch {lab.file('proving')}; sleep 60"]})
    with hung(systemd, lab.file("proving")):
        config = write_config(lab.directory / "own", flake=True, host=HOST, label="own", client_json=lab.settings)
        assert lab.machine.rebuild("switch", config, env={"PATH": systemd.path}).returncode == 0
    assert lab.labels() == ("own", "own", "own") and systemd.reboots() == 0


def test_the_watchdog_guards_a_build_while_another_system_waits(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.publish("v1", inhibitors="dbus 2")
    systemd.run("run")
    assert systemd.timers() == []
    lab.publish("v2", inhibitors="dbus 2", build_touch=lab.file("building"), build_wait=lab.file("never"))
    with hung(systemd, lab.file("building")):
        pass
    systemd.run("run", "--build-timeout", "1", code=1)
    assert lab.labels() == ("v0", "v1", "v1")
    systemd.boot()
    systemd.run("run", "--build-timeout", "1", code=1)
    assert lab.labels() == ("v1", "v1", "v1")


# --- ways back that fail ---


def test_a_boot_default_that_cannot_be_set_back(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    lab.client("run")
    lab.machine.power_cycle()
    be_patient(lab)
    failing = Path(lab.file("failing"))
    failing.touch()
    assert "the boot default could not be set back" in at_any_price(lab, "run", TOY_NIX_ENV_FAIL=str(failing))
    assert (lab.state / "pending.json").exists() and result(lab)[0] == Result.ROLLBACK_FAILED
    failing.unlink()
    check_way_back(lab, patient=False)


def test_no_reboot_into_what_could_not_be_set_back(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.settings["reboot"] = "when-needed"
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    systemd.run("run")
    assert systemd.reboots() == 1
    failing = Path(lab.file("failing"))
    failing.touch()
    systemd.boot()
    be_patient(lab)
    for _ in range(2):
        assert "could not be set back" in at_any_price(lab, "run", PATH=systemd.path, TOY_NIX_ENV_FAIL=str(failing))
    assert systemd.reboots() == 1
    failing.unlink()
    systemd.run("run", code=1)
    assert systemd.reboots() == 2
    systemd.boot()
    systemd.run("run")
    assert lab.labels() == ("v0", "v0", "v0") and result(lab)[0] == Result.ROLLED_BACK


@pytest.mark.parametrize("inhibitors", ["dbus 1", "dbus 2"], ids=["live", "not live"])
def test_a_reboot_that_is_refused_is_asked_for_again(inhibitors: str, tmp_path: Path) -> None:
    """Back, too: the old system runs by then, or cannot, and it is the kernel that has no network."""
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.settings["reboot"] = "when-needed"
    lab.publish("v1", inhibitors=inhibitors, kernel="broken")
    (systemd.top / "no-reboot").touch()
    systemd.run("run", code=1)
    (systemd.top / "no-reboot").unlink()
    systemd.run("run")
    assert systemd.reboots() == 1
    systemd.run("run")
    assert systemd.reboots() == 1, "once is enough"
    systemd.boot()
    be_patient(lab)
    (systemd.top / "no-reboot").touch()
    systemd.run("run", code=1)
    (systemd.top / "no-reboot").unlink()
    systemd.run("run", code=1)
    assert systemd.reboots() == 2
    systemd.boot()
    lab.down.touch()  # so that it is not tried once more in the same run
    systemd.run("run", code=75)
    assert lab.labels() == ("v0", "v0", "v0")


def test_a_release_that_mends_a_failed_way_back_may_build_long(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, fails_from="bad")
    systemd = Systemd(lab)
    lab.settings |= {"activation_timeout": 300, "confirm_timeout": 1}
    lab.publish("bad", activation_command="false", broken_client=True)
    systemd.run("run", code=1)
    assert result(lab)[0] == Result.ROLLBACK_FAILED and len(systemd.timers()) == 1
    lab.settings |= {"activation_timeout": 20, "confirm_timeout": 30}
    lab.publish("v2", build_touch=lab.file("building"), build_wait=lab.file("go"))
    process = systemd.start("run")
    wait_until(Path(lab.file("building")).exists)
    names = os.listdir(systemd.top / "timers")
    assert len(names) == 1  # the one of 34 s is gone
    Path(lab.file("go")).touch()
    assert process.wait(60) == 0
    assert lab.labels() == ("v2", "v2", "v2")


def test_a_commit_whose_client_was_killed_comes_to_its_end(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path)
    systemd = Systemd(lab)
    release = lab.publish("v1", boot_touch=lab.file("reached"), boot_wait=lab.file("go"))
    process = systemd.start("run")
    wait_until(Path(lab.file("reached")).exists)
    process.kill()
    process.wait()
    threading.Timer(2, Path(lab.file("go")).touch).start()
    systemd.run("run")
    assert lab.labels() == ("v1", "v1", "v1") and result(lab) == (Result.OK, release)
    assert systemd.timers() == [], "the watchdog of the client that was killed is gone, too"


def test_a_step_is_written_down_before_its_watchdog_is_armed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be that none can be armed: a way back goes on without, and is still known for what it is when it is cut."""
    machine = bento_client.Machine(bento_client.make_settings(lab.settings, "test"))
    pending = way_back("boot", verdict="rolled-back")

    def arm(*words: object) -> None:
        raise BentoError("no systemd-run")

    monkeypatch.setattr(bento_client, "arm", arm)
    with pytest.raises(BentoError):
        bento_client.advance(machine, pending, "rolling-back", 1)
    found = bento_client.load_pending(machine)
    assert found is not None and (found.step, found.watchdog) == (pending.step, "bento-watchdog-token-rolling-back")


def test_all_health_checks_share_the_time(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path)
    lab.settings["confirm_timeout"] = 3
    lab.publish("v1", settings={"health_checks": ["sleep 2"] * 4})
    began = time.monotonic()
    assert "health check failed (no end in time): sleep 2" in lab.client("run", code=1)
    assert time.monotonic() - began < 3 + 20 and lab.labels() == ("v0", "v0", "v0")


def test_a_system_that_moves_our_files_is_not_left_to_a_boot(tmp_path: Path) -> None:
    """Its client would look for the journal elsewhere."""
    lab = inhibited(tmp_path)
    lab.publish("v1", inhibitors="dbus 2", settings={"state_dir": str(lab.machine.root / "var/lib/elsewhere")})
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.BUILD_FAILED
    assert "moves Bento's files to /" in lab.last().reason and not (lab.state / "pending.json").exists()


def test_a_system_whose_client_refuses_its_settings_is_not_left_to_a_boot(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    lab.publish("v1", inhibitors="dbus 2", settings={"user": "fleet host"})
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.BUILD_FAILED
    assert "refuses its settings: " in lab.last().reason and "'fleet host'" in lab.last().reason


def test_an_attempt_after_a_failed_way_back_leads_further_back(lab: Lab) -> None:
    """What runs, and maybe the boot default, is of the one before."""
    machine = bento_client.Machine(bento_client.make_settings(lab.settings, "test"))
    current = bento_client.Current(HOST, B, 10, "2026-11-25T21:00:00Z")
    first = bento_client.begin(machine, current)
    assert (first.old, first.profile, first.between, first.committed) == (machine.running, machine.default, "", False)
    for between in ("/new", "/bad"):
        bento_client.save_pending(machine, way_back("boot", between="" if between == "/new" else between))
        pending = bento_client.begin(machine, current)
        assert (pending.old, pending.profile, pending.between, pending.committed) == ("/old", "/old", between, True)


@pytest.mark.parametrize("refused", [{"inhibitors": "dbus 2", "settings": {"user": "fleet host"}}, {"build": "fail"}], ids=str)
def test_a_refused_release_does_not_end_a_way_back_that_is_owed(tmp_path: Path, refused: dict[str, Any]) -> None:
    lab = Lab.create(tmp_path, fails_from="bad", fails_from_times=2, inhibitors="dbus 1")
    lab.publish("bad", activation_command="false", broken_client=True, inhibitors="dbus 1")
    lab.client("run", code=1)
    assert lab.labels() == ("bad", "v0", "v0")
    lab.publish("v2", **refused)
    for _ in range(3):
        at_any_price(lab, "run")
    assert lab.labels() == ("v0", "v0", "v0")


def test_the_old_configuration_again_leads_out_of_a_failed_way_back(tmp_path: Path) -> None:
    """The machine runs what is bad, though the journal says that it comes from what is published again."""
    difficult: dict[str, Any] = {"fails_from": "bad", "fails_from_times": 3}
    lab = Lab.create(tmp_path, **difficult)

    def publish_v0() -> str:
        settings = lab.settings
        write_config(lab.config, flake=True, host=HOST, label="v0", client_json=settings, **difficult)
        return lab.populate()

    first = publish_v0()
    lab.client("run")
    lab.publish("bad", activation_command="false", broken_client=True)
    lab.client("run", code=1)
    assert lab.labels()[0] == "bad"
    assert publish_v0() == first
    for _ in range(3):
        at_any_price(lab, "run")
        assert (lab.labels()[0], lab.last().result) != ("bad", Result.OK)
    assert lab.labels() == ("v0", "v0", "v0")


def test_a_way_back_that_fails_is_tried_once_a_run(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, fails_from="bad")
    lab.publish("bad", activation_command="false", broken_client=True)
    lab.client("run", code=1)
    said = at_any_price(lab, "run")
    assert said.count("bento: going back to") == 1


def test_a_way_back_that_does_not_take_is_no_endless_loop(tmp_path: Path) -> None:
    """The firmware starts another /boot than the one that is mounted, and written."""
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.settings["reboot"] = "when-needed"
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    systemd.run("run")
    boot, other = lab.machine.root / "boot", tmp_path / "boot"
    shutil.copytree(boot, other)
    for _ in range(5):
        if systemd.is_to_boot():
            shutil.copytree(other, boot, dirs_exist_ok=True)
            assert systemd.boot() == ["boots v1"]
            be_patient(lab)
        at_any_price(lab, "run", PATH=systemd.path)
    assert systemd.reboots() == 2, "into it, and back: once"


def test_the_watchdog_reboots_where_no_switch_leads_back(tmp_path: Path) -> None:
    """Even where somebody inhibits it. A person decides for themselves."""
    lab = Lab.create(tmp_path, fails_from="bad")
    systemd = Systemd(lab)
    lab.publish("bad", activation_command="false", broken_client=True)
    systemd.run("run", code=1)
    [timer] = systemd.timers()
    (systemd.top / "no-reboot").touch()
    systemd.run("rollback", code=1)
    assert lab.labels() == ("bad", "v0", "v0") and systemd.reboots() == 0
    lab.machine.run(*timer, env=lab.env(PATH=systemd.path))
    assert lab.labels() == ("bad", "v0", "v0") and systemd.reboots() == 1


def test_a_reboot_is_asked_for_again_after_one_for_another_release(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path)
    systemd = Systemd(lab)
    allowed = ("--reboot", "when-needed")
    lab.publish("v1", kernel="6.13")
    systemd.run("run", *allowed)
    systemd.boot()
    systemd.run("run", *allowed)
    lab.publish("v2", kernel="6.14")
    systemd.run("run")
    systemd.boot()  # a person does it
    systemd.run("run")
    assert lab.labels() == ("v2", "v2", "v2")
    lab.publish("v1", kernel="6.13")
    systemd.run("run", *allowed)
    assert systemd.reboots() == 2


@pytest.mark.parametrize("field", ["step", "verdict"])
def test_a_journal_of_words_nobody_knows_is_set_aside(lab: Lab, field: str) -> None:
    lab.publish("v1", switch_touch=lab.file("reached"), switch_wait=lab.file("never"))
    process = lab.start("run")
    wait_until(Path(lab.file("reached")).exists)
    kill_tree(process)
    journal = json.loads((lab.state / "pending.json").read_text())
    (lab.state / "pending.json").write_text(json.dumps(journal | {field: "nonsense"}))
    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2") and (lab.state / "pending.json.damaged").exists()


@pytest.mark.parametrize("flags", [PYTHON_FLAGS, ("-I",)], ids=["as the module starts it", "by hand"])
def test_a_locale_bars_no_report(lab: Lab, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Nix quotes names with characters that are in no ISO 8859."""
    lab.publish("v1")
    programs = lab.directory / "programs"
    programs.mkdir()
    (programs / "nixos-rebuild").write_text("#!/bin/sh\nprintf 'error: attribute \\342\\200\\230foo\\342\\200\\231 missing\\n'\nexit 1\n")
    (programs / "nixos-rebuild").chmod(0o755)
    env = latin_1(tmp_path) | {"PATH": f"{programs}:{lab.machine.env()['PATH']}"}
    argv = [sys.executable, *flags, *lab.argv("run")[len(PYTHON_FLAGS) + 1 :]]
    for expected in (1, 1, 0):  # the third time it waits, and says why
        done = lab.machine.run(*argv, env=lab.env(**env))
        assert done.returncode == expected, done.stdout
        time.sleep(1)  # a log is named by its second
    assert lab.last().result == Result.BUILD_FAILED and "attribute ‘foo’ missing" in lab.last().reason
    assert lab.last().attempt == 2 and len(lab.logs()) == 2
