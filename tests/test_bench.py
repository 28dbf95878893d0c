"""The benchmark runs, prints every row, and leaves nothing behind. What it measures is nobody's to assert."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toynixos import TESTS, _missing, need

HEADINGS = ["Start-up", "How cost grows", "Seconds:", "--quick"]
ROWS = [
    "bento_client.py --version, CPU",
    "bento.py --version, CPU",
    "a poll with nothing new, loopback, CPU",
    "populate, everything new, durable, 3 hosts",
    "populate, nothing changed, 3 hosts",
    "populate, nothing changed, 3 hosts",
    "status --json, 6 hosts",
    "populate, peak memory, 3 hosts",
    "populate, peak memory, 6 hosts",
    "populate, peak memory, 6 hosts",
    "the client's peak memory, 60 MB, all of it new",
    "the client's peak memory, 60 MB, a sixth of it new",
    "populate, peak memory, a host of 60 MB",
]
SERVED_HEADINGS = ["The lines", "11 polls a second", "20 polls at once"]
SERVED_ROWS = [
    "a poll with nothing new, 40 ms round trip",
    "an update of 20 small files, 40 ms round trip",
    "connections of such an update",
    "an update of one line beside 2 MB, 1 MB/s",
    "polls of 10000 hosts, 11 a second for 2 s",
    "polls of 20 hosts, all timers aligned",
    "polls of 20 hosts, all timers aligned",
]


def start(tmp_path: Path, *words: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, str(TESTS / "bench.py"), "--quick", "--hosts", "3", "--rounds", "1", *words]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(autouse=True)
def programs() -> Iterator[None]:
    before = set(Path("/var/lib").glob("bento-bench-*"))
    for program in ("rsync", "sftp", "ssh-keygen"):
        need(program)
    yield
    assert set(Path("/var/lib").glob("bento-bench-*")) <= before


def test_every_row_is_printed(tmp_path: Path) -> None:
    scratch, svg = tmp_path / "scratch", tmp_path / "plot.svg"
    scratch.mkdir()
    process = start(scratch, "--svg", str(svg))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    rows = [line.split("|")[1].strip() for line in output.splitlines() if line.startswith("| ")][2:]
    if os.geteuid() == 0:
        need("sshd")
        assert rows == ROWS + SERVED_ROWS
    else:
        assert rows[:-2] == ROWS and all("skipped: needs root" in row for row in rows[-2:])
    for heading in HEADINGS + (SERVED_HEADINGS if os.geteuid() == 0 else []):
        assert re.search(rf"^{heading}|\({heading}\)", output, re.MULTILINE), heading
    assert svg.read_text().startswith("<svg") and svg.read_text().endswith("</svg>\n")
    assert list(scratch.iterdir()) == []
    assert not Path("/etc/passwd").read_text().count(f"bento-bench{process.pid}-")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_an_interruption(tmp_path: Path, how: signal.Signals) -> None:
    if os.geteuid() != 0:
        _missing("needs root for sshd, its accounts and its chroots")
    need("sshd")
    process = start(tmp_path, "--only", "load", "--load-seconds", "60")
    accounts, deadline = f"bento-bench{process.pid}-23:", time.monotonic() + 60
    while accounts not in Path("/etc/passwd").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(4)  # it polls by now
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in output, output
    assert accounts.partition("-23")[0] not in Path("/etc/passwd").read_text()
    assert list(tmp_path.iterdir()) == []


def test_one_section(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "start")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "bento_client loads" in output and "populate" not in output
