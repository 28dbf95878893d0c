"""What the client asks of this machine's Nix and systemd, and what it makes of the answer."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from toynixos import need

from bento_client import Machine, make_settings

SESSIONS = {
    "c1": "Id=c1\nName=gdm\nSeat=seat0\nClass=greeter\nState=online\n",
    "2": "Id=2\nName=alice\nSeat=seat0\nClass=user\nState=active\n",
    "3": "Id=3\nName=bob\nSeat=\nClass=user\nState=active\n",
    "4": "Id=4\nName=carol\nSeat=seat0\nClass=user\nState=closing\n",
}
LISTED = """\
 338 hang.service   start running
 489 bad.service    start waiting
1314 worse.service  start waiting
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "state").mkdir()
    return Machine(make_settings({"host": "a", "root": str(tmp_path), "state_dir": str(tmp_path / "state")}, "test"))


def test_the_profile_to_fall_back_to(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real Nix keeps what it names, and what it named before goes."""
    need("nix-env")
    nix = tmp_path / "nix"
    for name, directory in (("STORE", nix / "store"), ("STATE", nix / "var/nix"), ("LOG", tmp_path / "log"), ("CONF", tmp_path / "etc")):
        monkeypatch.setenv(f"NIX_{name}_DIR", str(directory))
    monkeypatch.setenv("NIX_CONFIG", "substitute = false\nsandbox = false\nbuild-users-group =")
    systems = []
    for name in "ab":
        make = f'derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo >$out" ]; }}'
        argv = ["nix-build", "--no-out-link", "--expr", make]
        systems.append(subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout.strip())
    old = nix / "var/nix/gcroots/bento-way-back"
    old.symlink_to(systems[1])
    for system in (systems[0], *systems[:0:-1], systems[1]):
        machine.keep(system)
        assert os.path.realpath(machine.way_back) == system and old.is_symlink() == (system == systems[0])
    assert len(list(machine.way_back.parent.glob("bento-*-link"))) == 1
    subprocess.run(["nix-collect-garbage", "-d"], check=True)
    assert [Path(system).exists() for system in systems] == [False, True]


def test_jobs(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiting ones first: cancelled in this order, none of them starts because the one before it is gone."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\ncat <<'EOF'\n{LISTED}EOF\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.jobs() == [489, 1314, 338]
    assert machine.waits_for() == "systemd waits for hang.service (start)"


def program(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{text}")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(("sessions", "who"), [("", ""), ("c1", ""), ("3", ""), ("4", ""), ("c1 2 3", "alice")])
def test_who_is_at_a_seat(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sessions: str, who: str) -> None:
    """Nobody who has come over the network, nor the login screen."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    said = "\n".join(SESSIONS[name] for name in sessions.split())
    listed = "".join(f"{name:>6} 1000 somebody seat0\n" for name in sessions.split())
    (tmp_path / "said").write_text(said)
    (tmp_path / "listed").write_text(listed)
    program(tmp_path, "loginctl", f'if [ "$1" = list-sessions ]; then cat {tmp_path}/listed; else cat {tmp_path}/said; fi\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.sitting() == who


def test_a_reboot_is_one(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kernel somebody has loaded for kexec, or tree laid out for a soft reboot: systemctl would take it."""
    program(tmp_path, "systemctl", f'echo "$*" $SYSTEMCTL_SKIP_AUTO_KEXEC $SYSTEMCTL_SKIP_AUTO_SOFT_REBOOT >>{tmp_path}/said\n'
            'case $* in reboot*) ;; *) exit 1 ;; esac\n')  # fmt: skip
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine.reboot()
    machine.reboot(force=True)
    said = (tmp_path / "said").read_text().splitlines()
    assert [words for words in said if words.startswith("reboot")] == ["reboot 1 1", "reboot --force 1 1"]
    assert [words.split()[-1] for words in said if not words.startswith("reboot")] == ["reboot.target"]


@pytest.mark.parametrize(
    ("initrd", "asked", "mark"),
    [("123", True, "/new 900 asks"), ("123", False, "/new 900"), ("0", False, "/new 900 asks"), ("0", True, "/new 900 asks")],
)
def test_whether_the_last_boot_has_asked(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, initrd: str, asked: bool, mark: str
) -> None:
    """A chip may have had the passphrase, whatever the configuration says. Of an initrd without systemd that cannot be seen."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    questions = tmp_path / "run/systemd/ask-password"
    questions.mkdir()
    if asked:
        time.sleep(0.02)
        (questions / "ask.x").touch()
        (questions / "ask.x").unlink()
    settings = tmp_path / "good/etc/bento/client.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"asks": true}')
    machine.state = machine.state._replace(good=str(tmp_path / "good"))
    program(tmp_path, "systemctl", f'case $* in *InitRD*) echo {initrd} ;; *) echo 1000000 ;; esac\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.trial_mark("/new") == mark
