"""The client is killed, the machine is unplugged, or reboots."""

import subprocess
import sys
from pathlib import Path

import pytest
from toylab import Lab, Systemd, be_patient, fake_sftp, inhibited, kill_tree, tree, wait_until

from bento_client import Result, parse_pending

# --- killed, unplugged ---


def test_killed_in_the_build(lab: Lab) -> None:
    lab.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("building")).exists)
    kill_tree(process)
    assert lab.labels() == ("v0", "v0", "v0")
    assert list(lab.state.glob(".tmp-*")) != []
    (lab.state / "outbox").mkdir()
    (lab.state / f"outbox/.tmp-{process.pid}-log").touch()
    Path(lab.file("go")).touch()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().attempt) == (Result.OK, 1)
    assert lab.log().count("nixos-rebuild build") == 2
    assert [*lab.state.glob(".tmp-*"), *lab.state.glob("outbox/.tmp-*")] == []


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power-cut"])
@pytest.mark.parametrize("where", ["switch", "proof"])
def test_killed_three_times(lab: Lab, where: str, power_cut: bool) -> None:
    """Before the commit: back to the old system, tried twice more, then given up."""
    reached = Path(lab.file("reached"))
    if where == "switch":
        release = lab.publish("v1", switch_touch=str(reached), switch_wait=lab.file("never"))
    else:
        check = f"touch {reached}; while ! [ -e {lab.file('never')} ]; do sleep 0.05; done"
        release = lab.publish("v1", settings={"health_checks": [check]})

    for attempt in (1, 2, 3):
        process = lab.start("run")
        wait_until(reached.exists)
        kill_tree(process)
        reached.unlink()
        pending = parse_pending((lab.state / "pending.json").read_bytes(), "pending.json")
        assert (pending.step, pending.release, pending.attempt) == ("activating", release, attempt)
        assert lab.labels() == ("v1" if where == "proof" else "v0", "v0", "v0")
        if power_cut:
            lab.machine.power_cycle()

    assert "interrupted: waiting for a new release" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0")
    assert not (lab.state / "pending.json").exists()
    assert (lab.last().result, lab.last().attempt) == (Result.INTERRUPTED, 3)
    how = "the machine was restarted" if power_cut else "the client was ended"
    assert lab.last().reason == f"{how} while activating"
    assert [name.split("_")[2] for name in lab.logs()] == ["interrupted.log"] * len(lab.logs())

    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power-cut"])
def test_killed_in_the_commit(lab: Lab, power_cut: bool) -> None:
    """The profile is new, the boot loader is not: finished if the new system runs, else undone."""
    lab.publish("v1", boot_touch=lab.file("committing"), boot_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("committing")).exists)
    kill_tree(process)
    assert lab.labels() == ("v1", "v1", "v0")
    if power_cut:
        lab.machine.power_cycle()
        lab.down.touch()  # so that the run ends after the recovery
        lab.client("run", code=75)
        assert lab.labels() == ("v0", "v0", "v0")
        assert not (lab.state / "pending.json").exists()
        lab.down.unlink()
    Path(lab.file("go")).touch()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().attempt) == (Result.OK, 2 if power_cut else 1)
    assert not (lab.state / "pending.json").exists()


# --- reboots ---


def test_system_that_needs_a_reboot(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, inhibitors="dbus 1")
    release = lab.publish("v1", inhibitors="dbus 2", kernel="6.13")
    lab.client("run")
    assert lab.labels() == ("v0", "v1", "v1")
    assert (lab.last().result, lab.last().release) == (Result.OK, release)
    assert lab.last().reason == "it cannot go live: it takes effect at the next reboot, and is proven then"
    assert lab.report().needs_reboot
    assert f"release {release[:12]} waits for the next boot" in lab.client("run")
    assert lab.report().needs_reboot and lab.report().waiting_for_boot == release
    assert not (lab.state / "pending.json").exists(), "no attempt is under way"

    lab.machine.power_cycle()
    assert lab.labels() == ("v1", "v1", "v1")
    assert "up to date" in lab.client("run")
    assert "bento: to be settled: prove" in lab.log() and "bento: proof: " in lab.log()
    assert not lab.report().needs_reboot and lab.report().waiting_for_boot is None
    assert lab.report().release == release
    assert not (lab.state / "pending.json").exists()


def test_kernel_that_breaks_the_network(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, inhibitors="dbus 1")
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    lab.client("run")
    lab.machine.power_cycle()
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.machine.network() == "down"
    for _ in range(3):
        assert "tried again at the next run" in lab.client("run", code=75)
        assert lab.labels() == ("v1", "v1", "v1"), "it may be the server's fault"
    be_patient(lab)
    assert "the old system takes effect at the next reboot" in lab.client("run", code=75)
    assert lab.labels()[1:] == ("v0", "v0")
    lab.machine.power_cycle()
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.machine.network() == "up"
    lab.publish("v2", inhibitors="dbus 1")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")


def test_what_a_killed_build_left_is_not_built(lab: Lab) -> None:
    lab.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("building")).exists)
    (lab.state / "config/flake.lock").write_text("written by Nix while it builds")
    kill_tree(process)
    Path(lab.file("go")).touch()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert tree(lab.state / "config") == tree(lab.config)


SECOND_REPORT_HANGS = """\
import subprocess, sys, time
process, reports = subprocess.Popen(["sftp", *sys.argv[2:]], stdin=subprocess.PIPE), 0
for line in iter(sys.stdin.buffer.readline, b""):
    reports += b"put " in line and b"status.json" in line
    if reports == 2:
        open(sys.argv[1], "w").close()
        time.sleep(60)
    process.stdin.write(line)
    process.stdin.flush()
process.stdin.close()
sys.exit(process.wait())
"""


def test_a_client_that_is_killed_before_its_reboot_asks_again(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.publish("v1", inhibitors="dbus 2")
    systemd.run("run")
    lab.settings["reboot"] = "when-needed"
    hangs = lab.file("hangs")
    path = fake_sftp(lab, f'exec {sys.executable} -c "$(cat {lab.file("pump")})" {hangs} "$@"\n')
    Path(lab.file("pump")).write_text(SECOND_REPORT_HANGS)
    env = lab.machine.env(**lab.env(PATH=f"{path.partition(':')[0]}:{systemd.path}"))
    process = subprocess.Popen(lab.argv("run"), env=env, stdin=subprocess.DEVNULL)
    wait_until(Path(hangs).exists)  # in the report that comes before the reboot
    kill_tree(process)
    assert systemd.reboots() == 0
    systemd.run("run")
    assert systemd.reboots() == 1
