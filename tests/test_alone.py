"""The client by itself, with a Python that has the least."""

import os
import shutil
import subprocess
import sys

import pytest
from toylab import Lab
from toynixos import CLIENT, PYTHON_FLAGS

from bento_client import Result

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
