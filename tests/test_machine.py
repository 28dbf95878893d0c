"""What the client asks of this machine's Nix and systemd, and what it makes of the answer."""

import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from toynixos import need

from bento_client import Grub, Machine, make_settings

LISTED = """\
 338 hang.service   start running
 489 bad.service    start waiting
1314 worse.service  start waiting
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "state").mkdir()
    return Machine(make_settings({"host": "a", "root": str(tmp_path), "state_dir": str(tmp_path / "state")}, "test"))


def test_a_generation_that_was_brought_back(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real nix-env takes it for one of its own: it is deleted by its age, and gone back to."""
    need("nix-env")
    nix = tmp_path / "nix"
    for name, directory in (("STORE", nix / "store"), ("STATE", nix / "var/nix"), ("LOG", tmp_path / "log"), ("CONF", tmp_path / "etc")):
        monkeypatch.setenv(f"NIX_{name}_DIR", str(directory))
    monkeypatch.setenv("NIX_CONFIG", "substitute = false\nsandbox = false\nbuild-users-group =")
    machine.profile.parent.mkdir(parents=True)

    def ask(*words: str) -> str:
        return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()

    systems = []
    for name in "abc":
        make = f'derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo >$out" ]; }}'
        systems.append(ask("nix-build", "--no-out-link", "--expr", make))
        ask("nix-env", "-p", str(machine.profile), "--set", systems[-1])
    ask("nix-env", "-p", str(machine.profile), "--delete-generations", "2")
    for link in machine.profile.parent.glob("system-*-link"):
        os.utime(link, (1, 1), follow_symlinks=False)  # a long time ago
    machine.keep_generation(systems[1])
    assert machine.generations() == dict(enumerate(systems, 1)) and machine.default == systems[2]
    machine.keep_generation(systems[1])
    ask("nix-env", "-p", str(machine.profile), "--rollback")
    assert machine.default == systems[1]
    ask("nix-env", "-p", str(machine.profile), "--delete-generations", "30d")
    assert systems[1] in machine.generations().values()
    monkeypatch.setattr(machine.loader, "shows_others", lambda system: True)
    monkeypatch.setattr(machine, "write_menu", lambda system: None)
    machine.raise_generation(systems[0])
    assert list(machine.generations().values())[-2:] == [systems[0], machine.default]
    assert list(machine.generations().values()).count(machine.default) == 1


@pytest.mark.parametrize(
    ("days", "wanted"),
    [({1: "03", 3: "05"}, "04"), ({1: "04", 3: "04"}, "04"), ({1: "01"}, "04")],
    ids=["between", "all on one day", "nothing above"],
)
def test_a_generation_is_brought_back_as_its_entry_has_it(machine: Machine, days: dict[int, str], wanted: str) -> None:
    """GRUB's names have its number and its day. It is not younger than the one above it, nor older than the one below."""
    machine.profile.parent.mkdir(parents=True)
    (machine.profile.parent / "grub").mkdir()
    machine.loader = Grub(machine.settings, [machine.profile.parent / "grub"])
    entry = 'menuentry "NixOS - Configuration 2 (2026-11-04 - 25.11)" {\n linux /k init=/nix/store/good/init\n initrd /i\n}\n'
    (machine.profile.parent / "grub/grub.cfg").write_text(f'submenu "NixOS - All configurations" {{\n{entry}}}\n')
    links = {number: machine.profile.with_name(f"system-{number}-link") for number in (1, 2, 3)}
    for number, day in days.items():
        links[number].symlink_to(f"/nix/store/{number}")
        made_s = datetime.fromisoformat(f"2026-11-{day}T12:00:00").timestamp()
        os.utime(links[number], (made_s, made_s), follow_symlinks=False)
    machine.profile.symlink_to(links[max(days)].name)
    machine.keep_generation("/nix/store/good")
    assert os.readlink(links[2]) == "/nix/store/good"
    times = [links[number].lstat().st_mtime for number in sorted({2, *days})]
    assert times == sorted(times)
    assert datetime.fromtimestamp(links[2].lstat().st_mtime).strftime("%d") == wanted


def test_jobs(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiting ones first: cancelled in this order, none of them starts because the one before it is gone."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\ncat <<'EOF'\n{LISTED}EOF\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.jobs() == [489, 1314, 338]
    assert machine.waits_for() == "systemd waits for hang.service (start)"
