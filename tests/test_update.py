"""The real client: good days, and releases that are bad."""

import os
import re
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from toylab import HOST, QUARTER, Lab, tree, wait_until

from bento_client import Result

# --- good days ---


@pytest.mark.parametrize("flake", [True, False])
def test_first_release(lab: Lab, flake: bool) -> None:
    release = lab.publish("v1", flake=flake)
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    report = lab.report()
    assert (report.release, report.phase, report.needs_reboot) == (release, "idle", False)
    assert report.system == os.path.realpath(lab.machine.profile)
    assert lab.last().result == Result.OK
    assert (lab.last().attempt, lab.last().release) == (1, release)
    assert lab.logs() == [lab.last().log]
    command = f"--flake 'path:{lab.state}/config#{HOST}'" if flake else "--no-flake -I nixos-config="
    assert command in lab.log()
    assert "--upgrade" not in lab.log()
    assert tree(lab.state / "config") == tree(lab.config)
    assert not (lab.state / "pending.json").exists()
    assert not (lab.state / "partial").exists()
    assert not list(lab.state.glob(".tmp-*"))
    assert stat.S_IMODE((lab.state / "state.json").stat().st_mode) == 0o600

    assert "up to date with release" in lab.client("run")
    assert len(lab.logs()) == 1


def test_upgraded_channels(lab: Lab) -> None:
    lab.publish("v1", flake=False)
    lab.settings["upgrade_channels"] = True
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert "unpacking 1 channels" in lab.log()


def test_unchanged_system_is_not_activated(lab: Lab) -> None:
    lab.publish("v1", pure=True)
    lab.client("run")
    assert " bento: switch-to-configuration test: /" in lab.log()
    (lab.config / "README").write_text("only for people\n")
    release = lab.populate()
    lab.client("run")
    last = lab.last()
    assert (last.release, last.result, last.reason) == (release, "ok", "nothing to activate: this system runs already")
    assert " bento: switch-to-configuration" not in lab.log()
    assert lab.report().release == release
    assert (lab.state / "config/README").exists()
    assert lab.labels() == ("v1", "v1", "v1")


def test_units_that_failed_are_named(lab: Lab) -> None:
    lab.publish("v1", switch_exit=4, failed_units=["nginx.service", "a.timer"])
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK
    assert lab.last().reason == "activated, but these units failed: a.timer, nginx.service"


def test_state_directory_with_a_space(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, state="var/lib/the state")
    lab.publish("v1")
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK


def test_two_runs_at_once(lab: Lab) -> None:
    lab.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    first = lab.start("run")
    wait_until(Path(lab.file("building")).exists)
    wait_until(lambda: lab.phase() == "building")  # it is told without waiting for the answer
    assert "another run is at work" in lab.client("run")
    Path(lab.file("go")).touch()
    assert lab.finish(first) == 0
    assert lab.labels() == ("v1", "v1", "v1")
    assert len(lab.logs()) == 1


# --- bad releases ---


def test_failed_build_leaves_the_machine_alone(lab: Lab) -> None:
    lab.publish("v1", build="fail")
    said = lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    last = lab.last()
    assert (last.result, last.attempt) == (Result.BUILD_FAILED, 1)
    assert re.match(r"nixos-rebuild build: exit 1: error: builder for .*v1.drv' failed with exit code 1", last.reason)
    assert f"bento: error: build-failed: {last.reason}" in said
    assert "make: *** [Makefile:3: toy.o] Error 1" in lab.log()
    assert lab.report().release is None

    time.sleep(1)  # a log is named by its second
    assert "attempt 2" in lab.client("run", code=1), "once at the next poll: it may have been a bad moment"
    assert re.search("build-failed, next attempt in 1[45]min", lab.client("run"))
    assert lab.last().attempt == 2 and len(lab.logs()) == 2
    lab.age_attempts(15 * 60)
    lab.client("run", code=1)
    assert lab.last().attempt == 3
    assert re.search("next attempt in (30|29)min", lab.client("run"))
    lab.client("run", "--force", code=1)
    assert lab.last().attempt == 4

    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")
    assert lab.last().attempt == 1


def test_evaluation_error(lab: Lab) -> None:
    lab.publish("v1", flake=False, build="eval-error")
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().reason.endswith("error: The option `services.toy' does not exist.")


def test_endless_build(lab: Lab) -> None:
    lab.publish("v1", build="hang")
    lab.client("run", "--build-timeout", "1", code=1)
    assert lab.last().result == Result.BUILD_FAILED
    assert lab.last().reason == "nixos-rebuild build did not end within 1 s"


def test_cut_line_is_rolled_back(lab: Lab) -> None:
    release = lab.publish("v1", cut_network=True)
    said = lab.client("run", code=1)
    assert "rolled-back: new system: cannot reach server.example" in said
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.machine.network() == "up"
    assert (lab.last().result, lab.last().release) == (Result.ROLLED_BACK, release)
    assert "no route to it" in lab.last().reason

    assert "was rolled back" in lab.client("run")
    assert len(lab.logs()) == 1
    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")
    assert len(lab.logs()) == 2


@pytest.mark.parametrize(
    ("settings", "behaviour", "words"),
    [
        ({"server": "typo.example"}, {}, "its name cannot be resolved"),
        ({"health_checks": ["true", "exit 3"]}, {}, "health check failed (exit 3): exit 3"),
        ({}, {"switch_exit": 2}, "switch-to-configuration test: exit 2: "),
        ({}, {"broken_client": True}, "broken on purpose"),
    ],
    ids=["server", "health", "exit-2", "client"],
)
def test_rolled_back(lab: Lab, settings: dict[str, Any], behaviour: dict[str, Any], words: str) -> None:
    lab.publish("v1", settings=settings, **behaviour)
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.ROLLED_BACK
    assert words in lab.last().reason
    assert not (lab.state / "pending.json").exists()
    assert "was rolled back" in lab.client("run")


def test_endless_activation_is_rolled_back(lab: Lab) -> None:
    lab.publish("v1", switch_hang="after")
    lab.client("run", "--activation-timeout", "2", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.ROLLED_BACK
    assert lab.last().reason.startswith("switch-to-configuration test: no end in time")


def test_system_without_bento(lab: Lab) -> None:
    lab.publish("v1", no_bento=True)
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.BUILD_FAILED
    assert "would be this machine's last update: import ./utils/bento.nix" in lab.last().reason
    lab.client("run", "--force")
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK


def test_boot_loader_that_cannot_be_written(lab: Lab) -> None:
    lab.publish("v1", boot_exit=1)
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.POSTPONED
    assert "the boot loader could not be written (exit 1): Failed to install bootloader" in lab.last().reason
    assert re.search("postponed, next attempt in 1[45]min", lab.client("run"))
    lab.machine.power_cycle()
    assert lab.labels() == ("v0", "v0", "v0")


def test_profile_that_cannot_be_set(lab: Lab) -> None:
    lab.publish("v1")
    Path(lab.file("full")).touch()
    lab.client("run", code=1, TOY_NIX_ENV_FAIL=lab.file("full"))
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.POSTPONED
    assert "the boot default could not be set" in lab.last().reason
    assert re.search("postponed, next attempt in 1[45]min", lab.client("run")), "an activation each poll is no way to wait"
    lab.age_attempts(QUARTER)
    lab.client("run", TOY_NIX_ENV_FAIL=lab.file("not full"))
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().attempt == 2


def test_roll_back_that_fails_is_settled_later(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, fails_from="bad", fails_from_times=1)
    release = lab.publish("bad", cut_network=True)
    said = lab.client("run", code=1)
    assert "rollback-failed: new system: cannot reach server.example" in said
    assert lab.labels() == ("bad", "v0", "v0")
    assert (lab.state / "pending.json").exists()
    assert lab.last().result == Result.ROLLBACK_FAILED, "over the connection made before"

    assert "was rolled back" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.machine.network() == "up"
    assert (lab.last().result, lab.last().release) == (Result.ROLLED_BACK, release)
    assert [name.split("_")[2] for name in lab.logs()] == ["rollback-failed.log", "rolled-back.log"]
    assert not (lab.state / "pending.json").exists()
