"""What leads a machine back: systems that no boot has proven yet, ways back that fail, full disks, a person's hand.

Without systemd, but where a test has `Systemd`: programs that stand in for systemd-run and systemctl, which the lab
has for real. They keep the timers that are armed and the reboots that are asked for.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from test_client import HOST, SERVER, Lab, fake_sftp, kill_tree, lab, settled, tree, wait_until
from toynixos import PYTHON_FLAGS, TOY, ToyMachine, _missing, latin_1, write_config

import bento_client
from bento_client import Result

__all__ = ["lab", "settled"]  # fixtures

SYSTEMD_RUN = """\
#!{python}
import json, subprocess, sys
at = sys.argv.index("--")
options, command = dict(o.partition("=")[::2] for o in sys.argv[1:at]), sys.argv[at + 1:]
if "--on-active" in options:
    with open("{top}/timers/" + options["--unit"], "w") as file:
        json.dump(command, file)
    sys.exit(0)
sink = [o.split("append:", 1)[1] for o in sys.argv[1:at] if "StandardOutput=append:" in o]
with open(sink[0] if sink else "/dev/null", "ab") as out:
    process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    open("{top}/units/" + options["--unit"], "w").write(str(process.pid))
    sys.exit(process.wait())
"""
SYSTEMCTL = """\
#!{python}
import fnmatch, os, sys
verb, *units = [word for word in sys.argv[1:] if not word.startswith("-")]
if verb == "stop":
    for unit in units:
        timer = "{top}/timers/" + unit.removesuffix(".timer")
        if os.path.exists(timer):
            os.unlink(timer)
if verb == "is-active":
    for name in fnmatch.filter(os.listdir("{top}/units"), units[0]):
        pid = open("{top}/units/" + name).read()
        if os.path.exists("/proc/" + pid) and " Z " not in open("/proc/" + pid + "/stat").read():
            sys.exit(0)
    sys.exit(0 if units[0] == "bento.timer" else 3)
if verb == "reboot":
    if os.path.exists("{top}/no-reboot"):
        print("Operation inhibited")
        sys.exit(1)
    open("{top}/reboots", "a").write("x")
"""


class Systemd:
    def __init__(self, lab: Lab) -> None:
        self.lab, self.top = lab, lab.directory / "systemd"
        for name in ("timers", "units"):
            (self.top / name).mkdir(parents=True)
        for name, text in (("systemd-run", SYSTEMD_RUN), ("systemctl", SYSTEMCTL)):
            (self.top / name).write_text(text.format(python=sys.executable, top=self.top))
            (self.top / name).chmod(0o755)
        self.path = f"{self.top}:{lab.machine.env()['PATH']}"
        self.come_up()

    def come_up(self) -> None:
        (self.lab.machine.root / "run/systemd/system").mkdir(parents=True, exist_ok=True)

    def boot(self) -> None:
        for timer in (self.top / "timers").iterdir():
            timer.unlink()
        self.lab.machine.power_cycle()
        self.come_up()

    def run(self, *words: str, code: int = 0, **env: str) -> str:
        return self.lab.client(*words, code=code, PATH=self.path, **env)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with open(self.lab.directory / "output", "ab") as out:
            env = self.lab.machine.env(**self.lab.env(PATH=self.path))
            return subprocess.Popen(self.lab.argv(*words), env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def timers(self) -> list[list[str]]:
        return [json.loads(timer.read_text()) for timer in (self.top / "timers").iterdir()]

    def reboots(self) -> int:
        path = self.top / "reboots"
        return len(path.read_text()) if path.exists() else 0


def at_any_price(lab: Lab, *words: str, **env: str) -> str:
    """Runs the client whatever its exit code."""
    said = lab.machine.run(*lab.argv(*words), env=lab.env(**env)).stdout
    assert "Traceback" not in said
    return said


def inhibited(directory: Path) -> Lab:
    return Lab.create(directory, inhibitors="dbus 1")


def result(lab: Lab) -> tuple[str, str | None]:
    last = bento_client.parse_state((lab.state / "state.json").read_bytes(), "state.json").last
    assert last is not None
    return last.result, last.release


def be_patient(lab: Lab, **env: str) -> None:
    """After a boot the server is not there: but for one more proof, that is nobody's fault."""
    before = lab.labels()
    for _ in range(bento_client.PATIENT_PROOFS - 1):
        assert "tried again at the next run" in lab.client("run", code=75, **env)
        assert lab.labels() == before


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
    roots = lab.machine.root / "nix/var/nix/gcroots/bento-way-back"
    assert (roots / "nixos-version").read_text().strip() == "v0"
    lab.machine.power_cycle()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1") and result(lab) == (Result.OK, release)
    assert not lab.report().needs_reboot
    assert not any((lab.state / name).exists() for name in ("pending.json", "waiting.json"))


def test_a_person_who_boots_the_old_generation_is_followed(tmp_path: Path) -> None:
    """The new kernel does not start at all: somebody picks the old one in the boot menu. Once it may be for another reason."""
    lab = Lab.create(tmp_path)
    release = lab.publish("v1", kernel="6.13")
    lab.client("run")
    lab.machine.power_cycle(pick="1")
    assert lab.labels() == ("v0", "v1", "v1")
    lab.down.touch()  # so that the run ends after the recovery
    assert "did not come up" in lab.client("run", code=75)
    assert lab.labels() == ("v0", "v0", "v0") and result(lab) == (Result.INTERRUPTED, release)
    lab.down.unlink()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1"), "tried once more"
    lab.machine.power_cycle(pick="1")
    assert "did not come up" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0") and result(lab) == (Result.ROLLED_BACK, release)
    assert "was rolled back" in lab.client("run")


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
    assert not (lab.state / "waiting.json").exists()
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
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    lab.client("run")
    config = write_config(tmp_path / "byhand", flake=True, host=HOST, label="byhand", client_json=lab.settings, inhibitors="dbus 1")
    assert lab.machine.rebuild("switch", config).returncode == 0
    lab.machine.power_cycle()
    assert "bento:" not in lab.client("run"), "there is nothing to be said, or to be done"
    assert lab.labels() == ("byhand", "byhand", "byhand")
    lab.machine.power_cycle()
    assert lab.labels() == ("byhand", "byhand", "byhand")
    assert not any((lab.state / name).exists() for name in ("pending.json", "waiting.json"))


def test_the_watchdog_guards_a_build_while_another_system_waits(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.publish("v1", inhibitors="dbus 2")
    systemd.run("run")
    assert systemd.timers() == []
    lab.publish("v2", inhibitors="dbus 2", build_touch=lab.file("building"), build_wait=lab.file("never"))
    process = systemd.start("run")
    wait_until(Path(lab.file("building")).exists)
    [timer] = systemd.timers()
    process.send_signal(signal.SIGSTOP)
    lab.machine.run(*timer, env=lab.env(PATH=systemd.path))
    assert process.wait(10) == -signal.SIGKILL
    systemd.run("run", "--build-timeout", "1", code=1)
    assert lab.labels() == ("v0", "v1", "v1")
    systemd.boot()
    systemd.run("run", "--build-timeout", "1", code=0)
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
    be_patient(lab, PATH=systemd.path)
    for _ in range(2):
        assert "could not be set back" in at_any_price(lab, "run", PATH=systemd.path, TOY_NIX_ENV_FAIL=str(failing))
    assert systemd.reboots() == 1
    failing.unlink()
    systemd.run("run", code=1)
    assert systemd.reboots() == 2
    systemd.boot()
    lab.down.touch()  # so that it is not tried once more in the same run
    systemd.run("run", code=75)
    assert lab.labels() == ("v0", "v0", "v0") and result(lab)[0] == Result.INTERRUPTED


def test_a_reboot_that_is_refused_is_asked_for_again(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.settings["reboot"] = "when-needed"
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    (systemd.top / "no-reboot").touch()
    systemd.run("run", code=1)
    (systemd.top / "no-reboot").unlink()
    systemd.run("run")
    assert systemd.reboots() == 1
    systemd.run("run")
    assert systemd.reboots() == 1, "once is enough"
    systemd.boot()
    be_patient(lab, PATH=systemd.path)
    (systemd.top / "no-reboot").touch()
    systemd.run("run", code=1)
    (systemd.top / "no-reboot").unlink()
    systemd.run("run", code=1)
    assert systemd.reboots() == 2
    systemd.boot()
    lab.down.touch()  # so that it is not tried once more in the same run
    systemd.run("run", code=75)
    assert lab.labels() == ("v0", "v0", "v0")


def test_a_server_that_comes_up_after_the_machine_is_waited_for(tmp_path: Path) -> None:
    """The site has had a power cut."""
    lab = inhibited(tmp_path)
    release = lab.publish("v1", inhibitors="dbus 2")
    lab.client("run")
    lab.machine.power_cycle()
    lab.down.touch()
    be_patient(lab)
    lab.down.unlink()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1") and result(lab) == (Result.OK, release)
    lab.machine.power_cycle()
    assert lab.labels() == ("v1", "v1", "v1"), "it has proven itself"


def test_a_reboot_is_asked_for_again_when_the_server_was_down(tmp_path: Path) -> None:
    """For longer than anybody waits: nobody is to blame for that either."""
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.settings["reboot"] = "when-needed"
    lab.publish("v1", inhibitors="dbus 2")
    systemd.run("run")
    systemd.boot()
    lab.down.touch()
    be_patient(lab, PATH=systemd.path)
    systemd.run("run", code=1)
    systemd.boot()
    systemd.run("run", code=75)
    assert result(lab)[0] == Result.INTERRUPTED
    assert lab.labels() == ("v0", "v0", "v0")
    lab.down.unlink()
    systemd.run("run")
    assert systemd.reboots() == 3
    systemd.boot()
    systemd.run("run")
    assert lab.labels() == ("v1", "v1", "v1") and result(lab)[0] == Result.OK


def test_a_release_that_mends_a_failed_way_back_may_build_long(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, fails_from="bad")
    systemd = Systemd(lab)
    lab.settings |= {"activation_timeout": 3, "confirm_timeout": 1}
    lab.publish("bad", activation_command="false", broken_client=True)
    systemd.run("run", code=1)
    assert result(lab)[0] == Result.ROLLBACK_FAILED and len(systemd.timers()) == 1
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


def test_all_health_checks_share_the_time(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path)
    lab.settings["confirm_timeout"] = 3
    lab.publish("v1", settings={"health_checks": ["sleep 2"] * 4})
    began = time.monotonic()
    assert "health check failed (no end in time): sleep 2" in lab.client("run", code=1)
    assert time.monotonic() - began < 3 + 20 and lab.labels() == ("v0", "v0", "v0")


# --- a person's hand ---


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
    lab.client("rollback")
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


# --- full disks ---


@contextmanager
def disk(path: Path, kind: str, size_mb: int) -> Iterator[None]:
    """A small file system of its own."""
    path.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        _missing("needs root to mount a small disk")
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(path)]
    if kind == "ext4":
        image = path.parent / "image"
        with open(image, "wb") as file:
            file.truncate(size_mb << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-F", image], check=True)
        argv = ["mount", "-o", "loop", str(image), str(path)]
    if subprocess.run(argv, check=False, capture_output=True).returncode != 0:
        _missing(f"cannot mount {kind}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(directory: Path) -> None:
    with open(directory / "filler", "ab", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2


def on_disk(directory: Path, **behaviour: Any) -> Lab:
    root = directory / "machine"
    settings = {
        "server": SERVER, "host": HOST, "root": str(root), "state_dir": str(root / "var/lib/bento"),
        "connect_timeout": 1, "confirm_timeout": 2, "activation_timeout": 20,
    }  # fmt: skip
    machine = ToyMachine.create(root, HOST, chroot=directory / "chroot" / HOST, **{"client_json": settings} | behaviour)
    lab = Lab(directory, machine, settings)
    (lab.state / "id_ed25519").write_text("the toy's ssh asks for none\n")
    return lab


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_full_disk_does_not_bar_the_way_back(tmp_path: Path, kind: str) -> None:
    with disk(tmp_path / "machine/var/lib/bento", kind, 20):
        lab = on_disk(tmp_path, inhibitors="dbus 1")
        lab.publish("v1", inhibitors="dbus 2", kernel="broken")
        lab.client("run")
        lab.machine.power_cycle()
        fill(lab.state)
        for _ in range(bento_client.PATIENT_PROOFS):
            at_any_price(lab, "run")
        assert lab.labels()[1:] == ("v0", "v0")
        lab.machine.power_cycle()
        assert lab.labels() == ("v0", "v0", "v0") and lab.machine.network() == "up"
        (lab.state / "filler").unlink()
        lab.publish("v2", inhibitors="dbus 1")
        at_any_price(lab, "run")
        assert lab.labels() == ("v2", "v2", "v2")


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.parametrize("command", ["run", "rollback"])
def test_a_disk_that_is_always_full_does_not_bar_the_way_back(tmp_path: Path, kind: str, command: str) -> None:
    with disk(tmp_path / "machine/var/lib/bento", kind, 20):
        lab = on_disk(tmp_path)
        lab.settings["confirm_timeout"] = 30
        reached = Path(lab.file("reached"))
        check = f"touch {reached}; while ! [ -e {lab.file('never')} ]; do sleep 0.05; done"
        lab.publish("v1", settings={"health_checks": [check]})
        process = lab.start("run")
        wait_until(reached.exists)
        kill_tree(process)
        token = json.loads((lab.state / "pending.json").read_text())["token"]
        stop = threading.Event()

        def keep_filling() -> None:
            while not stop.is_set():
                fill(lab.state)
                time.sleep(0.001)

        filler = threading.Thread(target=keep_filling)
        filler.start()
        try:
            at_any_price(lab, *(["run"] if command == "run" else ["rollback", "--token", token]))
            assert lab.labels() == ("v0", "v0", "v0")
        finally:
            stop.set()
            filler.join()
        (lab.state / "filler").unlink()
        lab.publish("v2")
        at_any_price(lab, "run")
        assert lab.labels() == ("v2", "v2", "v2")


@pytest.mark.parametrize("left", ["partial", "config.new"])
def test_our_own_leftovers_do_not_fill_the_disk(tmp_path: Path, left: str) -> None:
    with disk(tmp_path / "machine/var/lib/bento", "tmpfs", 22):
        lab = on_disk(tmp_path)
        lab.publish("v1")
        lab.client("run")
        (lab.config / "big").write_bytes(os.urandom(6 << 20))
        release = lab.publish("v2")
        if left == "partial":
            (lab.state / "partial").mkdir()
            tar = (lab.chroot / "releases" / f"{release}.tar").read_bytes()
            (lab.state / "partial" / f"{release}.tar").write_bytes(tar[: 5 << 20])
        else:
            (lab.state / "config.new").mkdir()
            (lab.state / "config.new/big").write_bytes(bytes(5 << 20))
        lab.client("run")
        assert lab.labels() == ("v2", "v2", "v2")


# --- the rest ---


def test_a_bad_moment_of_the_server_is_forgotten(settled: Lab) -> None:
    path = settled.chroot / "current.json"
    good, before = path.read_bytes(), settled.last()
    path.write_bytes(b"{")
    settled.client("run", code=1)
    assert settled.last().result == Result.FETCH_FAILED
    path.write_bytes(good)
    settled.client("run")
    assert settled.last() == before


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


SLOW = """\
#!{python}
import os, subprocess, sys, time
process = subprocess.Popen(["{ssh}", *sys.argv[1:]], stdin=subprocess.PIPE)
while data := os.read(0, 4096):
    process.stdin.write(data)
    process.stdin.flush()
    time.sleep(len(data) / 8000)
process.stdin.close()
process.wait()
"""


# The same for what the server sends.
SLOW_DOWN = """\
#!{python}
import os, subprocess, sys, time
process = subprocess.Popen(["{ssh}", *sys.argv[1:]], stdout=subprocess.PIPE)
while data := os.read(process.stdout.fileno(), 800):
    os.write(1, data)
    time.sleep(len(data) / 8000)
process.wait()
"""


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_slow_line_is_fine(way: str, settled: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8 kB/s, 40 kB take longer than a line may be silent here. An upload gives no sign of life before its end, and a
    download only with each request of sftp's.
    """
    programs = settled.directory / f"slow-{way}"
    programs.mkdir()
    script = SLOW if way == "up" else SLOW_DOWN
    (programs / "slow-ssh").write_text(script.format(python=sys.executable, ssh=TOY / "toy-ssh"))
    (programs / "sftp").write_text(f'#!/bin/sh\nexec {shutil.which("sftp")} -S {programs}/slow-ssh "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    path = f"{programs}:{settled.machine.env()['PATH']}"
    for name, value in settled.machine.env(**settled.env(PATH=path)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bento_client, "STALL_S", 2.0)
    for directory in (settled.state / "outbox", settled.chroot):
        (directory / "log").write_bytes(os.urandom(40_000))
    session = bento_client.Sftp(bento_client.make_settings(settled.settings, "test"), SERVER)
    began = time.monotonic()
    if way == "up":
        session.put("outbox/log", "log")
    else:
        session.get("log", "got", 40_000)
    session.close()
    assert time.monotonic() - began > 2, "the line is slow"
    assert (settled.chroot / "logs/log" if way == "up" else settled.state / "got").stat().st_size == 40_000


# --- what a review found ---


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


def test_a_refused_release_does_not_end_a_way_back_that_is_owed(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, fails_from="bad", fails_from_times=2, inhibitors="dbus 1")
    lab.publish("bad", activation_command="false", broken_client=True, inhibitors="dbus 1")
    lab.client("run", code=1)
    assert lab.labels() == ("bad", "v0", "v0")
    lab.publish("v2", inhibitors="dbus 2", settings={"user": "fleet host"})
    for _ in range(3):
        at_any_price(lab, "run")
    assert lab.labels() == ("v0", "v0", "v0")


def test_a_full_disk_does_not_bar_the_reboot_that_leads_back(tmp_path: Path) -> None:
    with disk(tmp_path / "machine/var/lib/bento", "ext4", 20):
        lab = on_disk(tmp_path, inhibitors="dbus 1")
        systemd = Systemd(lab)
        lab.settings["reboot"] = "when-needed"
        lab.publish("v1", inhibitors="dbus 2", kernel="broken")
        systemd.run("run")
        assert systemd.reboots() == 1
        systemd.boot()
        fill(lab.state)
        for _ in range(bento_client.PATIENT_PROOFS):
            at_any_price(lab, "run", PATH=systemd.path)
        assert systemd.reboots() >= 2  # what is full cannot say that it was asked for
        systemd.boot()
        assert lab.labels() == ("v0", "v0", "v0")


def test_a_disk_without_inodes_does_not_bar_the_way_back(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        _missing("needs root, to mount")
    top = tmp_path / "machine/var/lib/bento"
    top.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,nr_inodes=400", "tmpfs", top], check=True)
    try:
        lab = on_disk(tmp_path, inhibitors="dbus 1")
        lab.publish("v1", inhibitors="dbus 2", kernel="broken")
        lab.client("run")
        lab.machine.power_cycle()
        assert lab.labels() == ("v1", "v1", "v1")
        with suppress(OSError):
            for number in range(400):
                (lab.state / f"filler-{number}").touch()
        for _ in range(bento_client.PATIENT_PROOFS):
            at_any_price(lab, "run")
        assert lab.labels()[1:] == ("v0", "v0")
    finally:
        subprocess.run(["umount", "-l", top], check=True)


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
    lab.publish("v1", inhibitors="dbus 1")
    lab.client("run")
    lab.publish("v2", inhibitors="dbus 2")
    lab.client("run")
    lab.machine.power_cycle()
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")
    said = lab.client("rollback")
    assert "rolled-back: by hand; the old system takes effect at the next reboot" in said
    assert lab.labels() == ("v2", "v1", "v1")
    lab.client("run")
    assert lab.labels() == ("v2", "v1", "v1")
    lab.machine.power_cycle()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")


def test_a_way_back_that_does_not_take_is_no_endless_loop(tmp_path: Path) -> None:
    """Somebody has pinned the boot default by hand."""
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.settings["reboot"] = "when-needed"
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    systemd.run("run")
    lab.machine.run("bootctl", "set-default", "nixos-generation-2.conf").check_returncode()
    for number in range(7):
        if number == 5:
            before = systemd.reboots()
        systemd.boot()
        for _ in range(bento_client.PATIENT_PROOFS + 1):
            at_any_price(lab, "run", PATH=systemd.path)
    assert systemd.reboots() == before <= 6  # tried twice: each time into it, and back


def test_what_waited_for_a_boot_is_not_booted_once_a_person_chose_otherwise(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.publish("v1", inhibitors="dbus 2")
    systemd.run("run")
    by_hand = write_config(
        tmp_path / "by-hand", flake=True, host=HOST, label="by-hand", client_json=lab.settings, inhibitors="dbus 1"
    )
    assert lab.machine.rebuild("switch", by_hand, env={"PATH": systemd.path}).returncode == 0
    systemd.run("run", "--reboot", "when-needed")
    assert systemd.reboots() == 0 and lab.report().needs_reboot is False


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


def test_the_log_of_a_recovery_says_what_was_done(tmp_path: Path) -> None:
    lab = inhibited(tmp_path)
    lab.publish("v1", inhibitors="dbus 2")
    lab.client("run")
    lab.machine.power_cycle()
    lab.client("run")
    assert "bento: to be settled: prove" in lab.log() and "bento: proof: " in lab.log()


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    with disk(tmp_path / "machine/var/lib/bento", "ext4", 20):
        lab = on_disk(tmp_path)
        lab.publish("v1")
        lab.client("run")
        release = lab.publish("v2")
        fill(lab.state)
        at_any_price(lab, "run")
        assert (lab.last().release, lab.last().result) == (release, Result.FETCH_FAILED)
        assert "No space left on device" in lab.last().reason


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
    for expected in (1, 0):  # the second time it waits, and says why
        done = lab.machine.run(*argv, env=lab.env(**env))
        assert done.returncode == expected, done.stdout
    assert lab.last().result == Result.BUILD_FAILED and "attribute ‘foo’ missing" in lab.last().reason
    assert len(lab.logs()) == 1
