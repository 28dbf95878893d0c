"""`build` of twenty hosts with real Nix, side by side: one fails, one hangs, one says a hundred megabytes."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from toynixos import TOY, need_nix, write_config

REPO = Path(__file__).resolve().parent.parent
GOOD = [f"h{number:02}" for number in range(17)]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    need_nix()
    mark = os.urandom(4).hex()  # a system that is in the store already would not be built again
    for name in GOOD:
        write_config(tmp_path / "hosts" / name, flake=True, host=name, label=f"{name}-{mark}")
    write_config(tmp_path / "hosts/fails", flake=True, host="fails", label=mark, build="fail")
    write_config(tmp_path / "hosts/hangs", flake=False, host="hangs", label=mark, build="hang")
    write_config(tmp_path / "hosts/talks", flake=True, host="talks", label=mark)
    # Nix keeps a good build's output to itself; NixOS' nixos-rebuild may be told otherwise.
    (tmp_path / "bin").mkdir()
    loud = tmp_path / "bin/nixos-rebuild"
    loud.write_text(
        '#!/bin/sh\ncase "$*" in *"#talks"*) yes "building a great deal" | head -c 100000000 ;; esac\n'
        f'exec "{TOY}/nixos-rebuild" "$@"\n'
    )
    loud.chmod(0o755)
    return tmp_path


def command(fleet: Path, *arguments: str) -> list[str | Path]:
    return [sys.executable, REPO / "bento.py", "--fleet", fleet, "--chroot-dir", fleet / "chroot", *arguments]


def environment(fleet: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{fleet}/bin:{TOY}:{os.environ['PATH']}", "TOY_MODE": "nix", "TOY_ROOT": str(fleet / "root")}


def alive(fleet: Path) -> list[str]:
    """The command lines of what `bento.py` has started there, which have its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"TOY_ROOT={fleet}".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_twenty_hosts(fleet: Path) -> None:
    done = subprocess.run(
        command(fleet, "build", "-j", "4", "--timeout", "20"),
        env=environment(fleet), text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    built = dict(re.findall(r"^(\w+): [0-9a-f]{12} (/nix/store/\S+) \(", done.stdout, re.MULTILINE))
    assert sorted(built) == [*GOOD, "talks"]
    for name, system in built.items():
        assert f"-nixos-system-{name}-" in system
        root = Path("/nix/var/nix/gcroots/bento", name)
        assert os.readlink(root) == system
        root.unlink()
    errors = [line for line in done.stderr.splitlines() if line.startswith("bento: error: ")]
    assert len(errors) == 2
    assert any(line.startswith("bento: error: fails: nixos-rebuild build: exit ") for line in errors)
    assert any(line.startswith("bento: error: hangs: nixos-rebuild build: did not end within 20 s") for line in errors)
    assert len(done.stderr) < 20_000  # the end of a log, not all of it
    log = Path(re.findall(r"all of it is in (\S+fails\.log)", done.stderr)[0])
    assert "error" in log.read_text()
    assert (log.parent / "talks.log").stat().st_size > 90_000_000
    for name in (*GOOD, "fails", "hangs", "talks"):
        (log.parent / f"{name}.log").unlink()
    assert not alive(fleet)


def test_ctrl_c_ends_the_children(fleet: Path) -> None:
    process = subprocess.Popen(
        command(fleet, "build", "hangs"),
        env=environment(fleet), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    for _ in range(200):
        if any("nixos-rebuild build" in line for line in alive(fleet)):
            break
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said, said
    time.sleep(0.5)
    assert not alive(fleet)


LOCKLESS = """\
{
  inputs.thing.url = "path:@THING@";
  outputs = { thing, ... }: { nixosConfigurations = import ./toy.nix; description = builtins.toJSON thing; };
}
"""


@pytest.mark.parametrize("locked", [False, True], ids=["no lock", "lock"])
def test_one_flake_for_two_hosts_is_published_as_it_is(tmp_path: Path, locked: bool) -> None:
    """Nix writes a flake.lock where one is missing; that must not get into the published tree."""
    need_nix()
    mark = os.urandom(4).hex()
    write_config(tmp_path / "all", flake=True, host={"a": {}, "b": {"label": f"b-{mark}"}}, label=f"a-{mark}")
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing/flake.nix").write_text("{ outputs = _: { }; }\n")
    (tmp_path / "all/flake.nix").write_text(LOCKLESS.replace("@THING@", str(tmp_path / "thing")))
    (tmp_path / "hosts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "hosts" / name).symlink_to("../all")
    if locked:
        done = subprocess.run(command(tmp_path, "update"), env=environment(tmp_path), capture_output=True, check=False)
        assert done.returncode == 0 and (tmp_path / "all/flake.lock").exists(), done.stderr
    before = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir() if path.is_file()}
    start = "import os, sys; os.geteuid = lambda: 1; import bento; sys.exit(bento.main(sys.argv[1:]))"
    argv: list[str | Path] = [sys.executable, "-c", start, *command(tmp_path, "populate", "--build")[2:]]
    done = subprocess.run(
        argv, env=environment(tmp_path) | {"PYTHONPATH": str(REPO), "HOME": str(tmp_path)}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("a", "b"):
        tree = tmp_path / name
        assert subprocess.run(command(tmp_path, "show", name, str(tree)), env=environment(tmp_path)).returncode == 0
        assert {path.name: path.read_bytes() for path in tree.iterdir() if path.is_file()} == before
        assert f"-nixos-system-{name}-{name}-{mark}" in (tmp_path / "chroot" / name / "current.json").read_text()
        assert tree.stat().st_mtime == 1
