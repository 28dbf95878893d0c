"""What a person does by hand: rollback, status, probe, key."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from toylab import HOST, Lab, Systemd, at_any_price, be_patient, inhibited, kill_tree, wait_until
from toynixos import CLIENT, _missing, need

from bento_client import Result


def test_rollback_by_hand(lab: Lab) -> None:
    assert "nothing to roll back" in lab.client("rollback", code=1)
    lab.publish("v1")
    lab.client("run")
    release = lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")
    assert "rolled-back: by hand" in lab.client("rollback")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().release, lab.last().reason) == (Result.ROLLED_BACK, release, "by hand")
    assert "was rolled back (by hand)" in lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    lab.client("run", "--force")
    assert lab.labels() == ("v2", "v2", "v2")


def test_status(lab: Lab) -> None:
    assert "none of Bento's" in lab.client("status")
    release = lab.publish("v1", cut_network=True)
    lab.client("run", code=1)
    said = lab.client("status")
    assert re.search(rf"(?m)^host +{HOST}$", said)
    assert re.search(r"(?m)^release +none of Bento's$", said)
    assert re.search(rf"(?m)^last +rolled-back, release {release[:12]}, attempt 1, 20", said)
    assert re.search(r"(?m)^reason +new system: cannot reach server", said)
    release = lab.publish("v2")
    lab.client("run")
    said = lab.client("status")
    assert re.search(rf"(?m)^release +{release}$", said)
    assert re.search(rf"(?m)^system +{lab.machine.root}/nix/store/.*-v2$", said)


def test_probe(lab: Lab) -> None:
    assert "bento.py populate" in lab.client("probe", code=75)
    lab.publish("v1")
    assert "the server is reached" in lab.client("probe")
    lab.down.touch()
    assert "connection refused" in lab.client("probe", code=75)
    assert lab.labels() == ("v0", "v0", "v0")


def test_key(tmp_path: Path) -> None:
    need("ssh-keygen")
    state = tmp_path / "new" / "state"
    argv = [sys.executable, "-I", str(CLIENT), "--config", os.devnull, "--host", "toy", "--state-dir", str(state), "key"]
    first, second = (subprocess.run(argv, capture_output=True, text=True, timeout=30) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert re.fullmatch(r"ssh-ed25519 [A-Za-z0-9+/]+ bento-toy\n", first.stdout)
    assert second.stdout == first.stdout
    assert stat.S_IMODE((state / "id_ed25519").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert sorted(path.name for path in state.iterdir()) == ["id_ed25519", "id_ed25519.pub"]
    (state / "id_ed25519.pub").unlink()
    third = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert third.stdout.split()[:2] == first.stdout.split()[:2]


def test_run_without_a_key(lab: Lab) -> None:
    lab.publish("v1")
    (lab.state / "id_ed25519").unlink()
    assert "make one with 'bento-client key'" in lab.client("run", code=75)
    assert lab.labels() == ("v0", "v0", "v0")


def test_rollback_by_hand_never_goes_to_what_was_rolled_back(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    lab.client("run")
    lab.machine.power_cycle()
    be_patient(lab)
    at_any_price(lab, "run")
    lab.machine.power_cycle()
    lab.down.touch()  # so that it is not tried once more in the same run
    at_any_price(lab, "run")
    assert lab.labels() == ("v0", "v0", "v0")
    assert "nothing to roll back" in lab.client("rollback", code=1)
    lab.down.unlink()
    lab.publish("v2", inhibitors="dbus 1")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")
    lab.client("rollback")
    assert lab.labels() == ("v0", "v0", "v0"), "which ran before v2, whoever made it"


def test_rollback_by_hand_twice(lab: Lab) -> None:
    releases = []
    for label in ("v1", "v2"):
        releases.append(lab.publish(label))
        lab.client("run")
    lab.down.touch()
    assert "rolled-back: by hand" in lab.client("rollback"), "whether the server is there, or not"
    lab.down.unlink()
    assert lab.labels() == ("v1", "v1", "v1")
    assert "was rolled back" in lab.client("run")
    assert lab.report().release == releases[0]
    lab.publish("v3")
    lab.client("run")
    lab.client("rollback")
    assert lab.labels() == ("v1", "v1", "v1")


@pytest.mark.parametrize("cut", [False, True])
def test_rollback_by_hand_is_about_the_release_that_runs(lab: Lab, cut: bool) -> None:
    lab.publish("v1", boot_touch=lab.file("reached"), boot_wait=lab.file("go"))
    Path(lab.file("go")).touch()
    lab.client("run")
    second = lab.publish("v2")
    lab.client("run")
    third = lab.publish("v3", build="fail")
    for _ in range(2):
        lab.client("run", code=1)
    if cut:
        Path(lab.file("go")).unlink()
        Path(lab.file("reached")).unlink()
        process = lab.start("rollback")
        wait_until(Path(lab.file("reached")).exists)
        kill_tree(process)
        Path(lab.file("go")).touch()
        said = at_any_price(lab, "run")
    else:
        lab.client("rollback")
        said = at_any_price(lab, "run")
    assert lab.labels() == ("v1", "v1", "v1")
    logs = [name.split("_")[1:] for name in lab.logs()]
    assert [second[:12], "rolled-back.log"] in logs
    assert [third[:12], "ok.log"] not in logs
    assert f"release {third[:12]}: build-failed, next attempt in" in said


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    if os.geteuid() != 0 or subprocess.run(["chattr", "+i", path], check=False).returncode != 0:
        _missing("needs root, and a file system with immutable files")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@pytest.mark.parametrize("rebooted", [False, True])
def test_rollback_by_hand_says_when_the_boot_loader_stays(lab: Lab, rebooted: bool) -> None:
    for label in ("v1", "v2"):
        lab.publish(label)
        lab.client("run")
    default = lab.machine.root / "boot/loader/loader.conf"
    pinned = default.read_text()
    with immutable(default):
        said = lab.client("rollback", code=1)
    assert "rollback-failed" in said and "could not be set back" in said
    assert default.read_text() == pinned
    if rebooted:
        lab.machine.power_cycle()
        assert lab.machine.network() == "up"  # of either, whose entry is still there
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().reason) == (Result.ROLLED_BACK, "by hand")


def test_rollback_by_hand_to_what_cannot_go_live(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.publish("v1", inhibitors="dbus 1")
    systemd.run("run")
    lab.publish("v2", inhibitors="dbus 2")
    systemd.run("run")
    systemd.boot()
    systemd.run("run")
    assert lab.labels() == ("v2", "v2", "v2")
    said = systemd.run("rollback")
    assert "rolled-back: by hand; the old system takes effect at the next reboot" in said and systemd.reboots() == 0
    assert lab.labels() == ("v2", "v1", "v1")
    systemd.run("run")
    assert lab.labels() == ("v2", "v1", "v1")
    systemd.boot()
    systemd.run("run")
    assert lab.labels() == ("v1", "v1", "v1")
