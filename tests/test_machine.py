"""What the client asks of this machine's Nix and systemd, and what it makes of the answer."""

import os
import subprocess
from pathlib import Path

import pytest
from toynixos import need

from bento_client import Machine, make_settings

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
