"""The tests' accounts are nobody else's."""

import os
import subprocess
import sys
from pathlib import Path

from accounts import need_accounts

TESTS = Path(__file__).resolve().parent
NAME = f"bento-test{os.getpid()}"
SCRIPT = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import os, pwd, signal, accounts
accounts.isolate()
print(accounts.why_not())
uid = accounts.add_user({NAME!r}, "bento")
assert pwd.getpwnam({NAME!r}).pw_uid == uid and pwd.getpwnam("sshd")
seen = accounts.root_owned(sys.argv[1])
assert os.listdir(seen) == ["file"]
print("seen", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def etc() -> dict[str, tuple[int, int]]:
    return {path.name: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in Path("/etc").iterdir()}


def test_a_killed_run_leaves_the_machine_as_it_was(tmp_path: Path) -> None:
    need_accounts()
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/file").touch()
    before = etc()
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path / "shown")]
    done = subprocess.run(argv, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("None\nseen\n", -9), done.stderr
    assert etc() == before and NAME not in Path("/etc/passwd").read_text()
    assert os.listdir(tmp_path) == ["shown"]


def test_these_tests_have_an_etc_of_their_own() -> None:
    need_accounts()
    assert os.path.ismount("/etc")
