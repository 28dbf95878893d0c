"""The client by itself, with a Python that has the least; and what an older Python is told."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toylab import Lab
from toynixos import CLIENT, PYTHON_FLAGS, TESTS

from bento_client import VERSION, Result

# What NixOS' python3Minimal has not.
MISSING = ["zlib", "gzip", "bz2", "lzma", "ctypes", "ssl", "sqlite3", "pyexpat", "readline", "curses"]
MINIMAL = f"""
import sys
missing = {MISSING!r}
sys.modules.update(dict.fromkeys(missing + ["_" + name for name in missing] + ["_hashlib", "_tkinter", "_dbm", "_gdbm"]))
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_alone_with_a_minimal_python(lab: Lab) -> None:
    """One file in an empty directory."""
    lab.publish("v1")
    alone = lab.directory / "alone"
    alone.mkdir()
    shutil.copyfile(CLIENT, alone / "bento_client.py")
    _, *words = lab.argv("run")[len(PYTHON_FLAGS) + 1 :]
    argv = [sys.executable, *PYTHON_FLAGS, "-c", MINIMAL, str(alone / "bento_client.py"), *words]
    done = lab.machine.run(*argv, cwd=alone, env=lab.env())
    assert done.returncode == 0, done.stdout
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK
    assert [path.name for path in alone.iterdir()] == ["bento_client.py"]


@pytest.mark.parametrize("name", MISSING)
def test_minimal_python_is_minimal(name: str) -> None:
    """That the test above would notice."""
    argv = [sys.executable, "-I", "-c", MINIMAL, os.devnull]
    argv[3] = MINIMAL.replace("import runpy", f"import {name}")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr


@pytest.mark.parametrize("path", [CLIENT, CLIENT.with_name("bento.py"), TESTS / "demo.py", TESTS / "bench.py"], ids=lambda path: path.name)
def test_an_older_python_is_told_so_in_one_line(path: Path) -> None:
    """It has to be able to read the file as far as that."""
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    older = "import sys; sys.version_info = (3, 10, 2); sys.version = '3.10.2 (main)'; sys.path.insert(0, sys.argv[1]); import runpy; "
    argv = [sys.executable, "-c", f"{older}runpy.run_path(sys.argv[2], run_name='__main__')", str(path.parent), str(path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    said = re.fullmatch(r"(bento|demo|bench): error: Python 3.11 or later is needed; this is 3.10.2\n", done.stderr)
    assert (done.returncode, done.stdout) == (1, "") and said, done.stderr


@pytest.mark.parametrize("script", ["bento.py", "bento_client.py"])
@pytest.mark.parametrize("flags", [["-S"], [], ["-I"]])
def test_nothing_beside_a_script_runs(script: str, flags: list[str], tmp_path: Path) -> None:
    """Where others can write: a repository that is pushed to, /tmp."""
    for name in ("bento.py", "bento_client.py"):
        shutil.copy(CLIENT.with_name(name), tmp_path)
    imported = set(re.findall(r"(?m)^(?:from|import) ([a-z]+)", CLIENT.with_name("bento.py").read_text()))
    for name in (imported | {"shlex", "tempfile", "msvcrt", "_winapi"}) - {"sys", "bento"}:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    argv: list[str | Path] = [sys.executable, "-B", *flags, tmp_path / script, "--version"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{VERSION}\n"), done.stderr
    assert not (tmp_path / "ran").exists()
