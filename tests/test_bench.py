"""The benchmark runs: each section prints its rows. What they say is not asserted: machines are noisy."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from accounts import need_accounts
from toynixos import need, need_sftp

BENCH = Path(__file__).resolve().parent / "bench.py"
ROWS = {
    "start": ["bento_client.py --version, CPU", "bento.py --version, CPU"],
    "poll": ["a poll with nothing new, loopback, CPU"],
    "populate": ["populate, everything new, durable", "populate, nothing changed"],
    "git": ["hosts, a flake of 2,000 files, Git, one line", "names on disk a host"],
    "commit": ["a commit, everything new, 5", "the same commit, 5", "one file changed, 1 ×"],
    "status": ["status --json"],
    "sign": ["sign, ", "verify, one host of"],
    "growth": ["populate, peak memory, 5 hosts", "the same at 5 hosts"],
    "memory": ["populate, peak memory", "the client's peak memory"],
    "line": ["a poll with nothing new", "an update of", "connections of such an update", "an update of one line beside"],
    "load": ["polls of", "all timers aligned"],
}


def start(argv: Sequence[str | Path], scratch: Path) -> "subprocess.Popen[str]":
    env = os.environ | {"TMPDIR": str(scratch)}
    return subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


@pytest.mark.parametrize("section", ROWS)
def test_bench(section: str, tmp_path: Path) -> None:
    need("rsync")
    need_sftp()
    if section in ("line", "load"):
        need_accounts()
        need("sshd")
    check_rows(section, ROWS[section], tmp_path)


def check_rows(section: str, rows: Sequence[str], tmp_path: Path) -> None:
    picture = tmp_path / "growth.svg"
    small = ["--quick", "--hosts", "5", "--rounds", "1", "--load-seconds", "1", "--burst", "5"]
    argv: list[str | Path] = [sys.executable, BENCH, *small, "--only", section]
    argv += ["--svg", picture] if section == "growth" else []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = start(argv, scratch)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "skipped" not in output
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    for words in rows:
        assert any(words in line for line in lines), output
    if section == "growth":
        assert picture.read_text(encoding="utf-8").startswith("<svg")
    assert os.listdir(scratch) == []


def commands() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_bytes()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_an_interruption(how: signal.Signals, tmp_path: Path) -> None:
    need_accounts()
    need("sshd")
    need("rsync")
    argv = [sys.executable, str(BENCH), "--quick", "--hosts", "5", "--only", "load", "--load-seconds", "60"]
    process = start(argv, tmp_path)
    polling, deadline = f"bento-bench{process.pid}-13@".encode(), time.monotonic() + 60
    while not any(polling in command for command in commands()):  # the load is on
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in output, output
    assert os.listdir(tmp_path) == []
