"""The fleet as monitoring, a page and a screen that stays; what would change, and what has moved."""

import html.parser
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from toynixos import need, need_nix

import bento
import bento_client as client
from bento import Row

REPO = Path(__file__).resolve().parent.parent
NOW_S = client.parse_time("2026-11-23T12:00:00Z")
A = "a" * 64
CURRENT = client.Current("t470", A, 10240, "2026-11-23T10:00:00Z", "/nix/store/x-nixos")
LAST = client.Last(
    A, "ok", "", "/nix/store/x-nixos", "2026-11-23T10:59:00Z", "2026-11-23T11:00:00Z", 1,
    "20261123T110000Z_aaaaaaaaaaaa_ok.log",
)  # fmt: skip
REPORT = client.Report("t470", client.VERSION, "2026-11-23T11:55:00Z", "idle", A, "/nix/store/x-nixos", False, LAST)
GOOD = Row("t470", "up-to-date", False, False, False, CURRENT, REPORT, NOW_S - 300, "")
NASTY = 'a"b\\c\n<script>alert(1)</script>&{x="1"} 9\x1b[31m\u202e'
BAD = replace(
    GOOD, host="nas", state="rolled-back", offline=True,
    report=replace(REPORT, host="nas", system=NASTY, last=replace(LAST, result="rolled-back", reason=NASTY)),
)  # fmt: skip
NEW = Row("router", "new", False, False, False, None, None, None, "")
ROWS = [BAD, GOOD, NEW]


def test_prometheus_text() -> None:
    text = bento.format_prometheus(ROWS)
    sample = re.compile(r'[a-z_]+\{([a-z]+="[A-Za-z0-9_-]+",?)+\} -?[0-9]+(\.[0-9]+)?')
    assert text.endswith("\n")
    named = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            named.add(line.split()[2])
        elif not line.startswith("# HELP "):
            assert sample.fullmatch(line), line
            assert line.split("{")[0] in named
    assert 'bento_host_state{host="nas",state="rolled-back"} 1' in text
    assert 'bento_host_state{host="nas",state="up-to-date"} 0' in text
    assert 'bento_host_offline{host="nas"} 1' in text and 'bento_host_offline{host="t470"} 0' in text
    assert f'bento_host_last_seen_timestamp_seconds{{host="t470"}} {NOW_S - 300}' in text
    assert 'last_seen_timestamp_seconds{host="router"}' not in text
    assert 'bento_hosts{state="rolled-back"} 1' in text


class Page(html.parser.HTMLParser):
    """What of a page a person sees, and what it would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained_and_escapes_what_hosts_say() -> None:
    page = Page(bento.format_html(ROWS, NOW_S, "file:///home/chroot"))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("tr") == 1 + len(ROWS)
    assert "<script>alert(1)</script>" in page.text  # as words
    assert "\x1b" not in page.text and "\u202e" not in page.text
    assert page.links == [f"file:///home/chroot/{row.host}/logs/" for row in ROWS]
    for text in ("rolled-back", "up-to-date", "needs a person 1", "3 hosts"):
        assert text in page.text


def test_output_is_replaced_whole_and_exit_code_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = tmp_path / "hosts/t470"
    host.mkdir(parents=True)
    (host / "configuration.nix").write_text("{ }\n")
    logs = tmp_path / "chroot/t470/logs"
    logs.mkdir(parents=True)
    good = replace(REPORT, polled=client.format_time(time.time()))
    bad = replace(good, last=replace(LAST, result="build-failed", reason="no"))
    (tmp_path / "chroot/t470/current.json").write_bytes(client.encode(CURRENT))
    target = tmp_path / "bento.prom"
    arguments = ["--fleet", str(tmp_path), "--chroot-dir", str(tmp_path / "chroot"), "status", "--prometheus"]
    for report, code, words in ((good, 0, ""), (bad, 1, "bento: error: t470: failing: build-failed: no\n")):
        (logs / "status.json").write_bytes(client.encode(report))
        assert bento.main([*arguments, "--output", str(target)]) == code
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", words)
        assert target.read_text().startswith("# HELP") and target.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_watch_draws_again_when_something_changes_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    host = tmp_path / "hosts/t470"
    host.mkdir(parents=True)
    (host / "configuration.nix").write_text("{ }\n")
    (tmp_path / "chroot").mkdir()
    master, slave = pty.openpty()
    argv: list[str | Path] = [sys.executable, REPO / "bento.py", "--fleet", tmp_path, "--chroot-dir", tmp_path / "chroot"]
    process = subprocess.Popen([*argv, "status", "--watch"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.set_blocking(master, False)
    seen = b""

    def wait_for(words: bytes) -> bool:
        nonlocal seen
        for _ in range(200):
            with suppress(OSError):
                seen += os.read(master, 1 << 16)
            if words in seen:
                return True
            time.sleep(0.05)
        return False

    assert wait_for(b"1 new"), seen
    time.sleep(3)
    drawn = seen.count(b"\x1b[H")
    assert drawn == 1, "nothing changed, so nothing is drawn"
    logs = tmp_path / "chroot/t470/logs"
    logs.mkdir(parents=True)
    (tmp_path / "chroot/t470/current.json").write_bytes(client.encode(CURRENT))
    (logs / "status.json").write_bytes(client.encode(REPORT))
    assert wait_for(b"1 up-to-date"), seen
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert b"Traceback" not in seen
    os.close(master)


def run_bento(fleet: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv: list[str | Path] = [sys.executable, REPO / "bento.py", "--fleet", fleet, "--chroot-dir", fleet / "chroot"]
    return subprocess.run(
        [*argv, *arguments], text=True, capture_output=True, timeout=120, check=False,
        env=os.environ | {"NIX_CONFIG": "substitute = false\nsandbox = false"},
    )  # fmt: skip


def test_update_takes_each_flake_once_and_says_what_moved(tmp_path: Path) -> None:
    need_nix()
    (tmp_path / "input").mkdir()
    (tmp_path / "input/flake.nix").write_text("{ outputs = _: { }; }\n")
    (tmp_path / "all").mkdir()
    (tmp_path / "all/flake.nix").write_text(
        f'{{ inputs.thing.url = "path:{tmp_path}/input"; outputs = _: {{ nixosConfigurations = {{ }}; }}; }}\n'
    )
    (tmp_path / "hosts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "hosts" / name).symlink_to("../all")
    first = run_bento(tmp_path, "update")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("hosts/a: thing new -> ") and first.stdout.count("\n") == 1
    assert run_bento(tmp_path, "update").stdout == "hosts/a: nothing moved\n"
    (tmp_path / "input/more").write_text("x")
    moved = run_bento(tmp_path, "update", "thing").stdout
    assert re.fullmatch(r"hosts/a: thing \S+ \S+ -> \S+ \S+\n", moved), moved
    assert run_bento(tmp_path, "update", "other").stdout == "hosts/a: has no input other\n"


def test_diff_compares_what_runs_with_what_was_built(tmp_path: Path) -> None:
    need_nix()
    need("nix-store")
    paths = []
    for number in (1, 2):
        source = tmp_path / f"system-{number}"
        source.mkdir()
        (source / "file").write_text("x" * number)
        added = subprocess.run(["nix-store", "--add", source], text=True, capture_output=True, check=True)
        paths.append(added.stdout.strip())
    host = tmp_path / "hosts/t470"
    host.mkdir(parents=True)
    (host / "configuration.nix").write_text("{ }\n")
    logs = tmp_path / "chroot/t470/logs"
    logs.mkdir(parents=True)

    def diff(running: str, built: str | None) -> subprocess.CompletedProcess[str]:
        (tmp_path / "chroot/t470/current.json").write_bytes(client.encode(replace(CURRENT, system=built)))
        (logs / "status.json").write_bytes(client.encode(replace(REPORT, system=running)))
        return run_bento(tmp_path, "diff")

    assert diff(paths[0], paths[0]).stdout == f"t470: no difference, it runs {paths[0]}\n"
    changed = diff(paths[0], paths[1])
    assert changed.returncode == 0 and f"{paths[0]} -> {paths[1]}" in changed.stdout, changed.stderr
    for running, built, words in (
        (paths[0], None, "was not built here"),
        ("--option", paths[0], "not in this server's store"),
        ("/nix/store/../../etc", paths[0], "not in this server's store"),
    ):
        refused = diff(running, built)
        assert refused.returncode == 1 and words in refused.stderr, refused.stderr
    assert json.loads((logs / "status.json").read_text())["host"] == "t470"
