"""Where the tests run: they can import bento.py, bento_client.py and each other, wherever pytest is started; /etc, the
home directory and the one for temporary files are their own, and gone after them. Those of failed tests are kept."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import accounts
from lab.image import cache_dir


def make_room() -> Path:
    """What the run and all that it starts may leave behind is in here. pytest-xdist's workers share their parent's."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return Path(os.environ["TMPDIR"])
    os.environ["BENTO_CACHE"] = str(cache_dir())
    room = Path(tempfile.mkdtemp(prefix="bento-tests-"))
    room.chmod(0o711)
    (room / "home").mkdir()
    os.environ |= {"TMPDIR": str(room), "HOME": str(room / "home")}
    if os.geteuid() != 0 and not Path("/nix/var/nix/daemon-socket/socket").exists():
        os.environ["NIX_REMOTE"] = str(room / "nix")  # else Nix wants to write to root's store, even to evaluate
    return room


ROOM = make_room()
tempfile.tempdir = str(ROOM)
accounts.isolate(home=ROOM / "home")
# Tables and usage messages are as wide as they are; a test for a narrow terminal sets these itself.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
# A shell starts its background jobs with Ctrl-C ignored, and that is inherited: by programs whose end by it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection() -> None:
    """What the tests run needs no pytest; and a script's first line takes no path with spaces, as a checkout may have."""
    sys.executable = os.path.realpath(sys.executable)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"The failed tests' files are in {ROOM}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    subprocess.run(["chmod", "-R", "u+w", ROOM / "nix"], stderr=subprocess.DEVNULL)  # Nix makes all read-only
    for path in ROOM.iterdir():
        if not (session.testsfailed and path.name.startswith("pytest-of-")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    if not session.testsfailed:
        shutil.rmtree(ROOM, ignore_errors=True)
