"""The fleet as monitoring and a page; what would change, and what has moved."""

import html.parser
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from toynixos import need, need_nix

import bento
import bento_client as client
from bento import Flag, Row

REPO = Path(__file__).resolve().parent.parent
# Root would be asked for the hosts' accounts.
AS_ANYBODY = "import os, sys; os.geteuid = lambda: 1000; import bento; sys.exit(bento.main())"
NOW_S = client.parse_time("2026-11-23T12:00:00Z")
A = "a" * 64
CURRENT = client.Current("t470", A, 10240, "2026-11-23T10:00:00Z", "/nix/store/x-nixos")
LAST = client.Last(
    A, "ok", "", "/nix/store/x-nixos", "2026-11-23T10:59:00Z", "2026-11-23T11:00:00Z", 1,
    "20261123T110000Z_aaaaaaaaaaaa_ok.log",
)  # fmt: skip
REPORT = client.Report("t470", client.VERSION, "2026-11-23T11:55:00Z", "idle", A, "/nix/store/x-nixos", False, LAST)
GOOD = Row("t470", "up-to-date", {}, CURRENT, REPORT, NOW_S - 300)
NASTY = 'a"b\\c\n<script>alert(1)</script>&{x="1"} 9\x1b[31m\u202e'
BAD = GOOD._replace(
    host="nas", state="rolled-back", flags={"failed": Flag(client.one_line(f"aaaaaaa: {NASTY}")), "offline": Flag("offline for 5min")},
    report=REPORT._replace(host="nas", system=NASTY, last=LAST._replace(result="rolled-back", reason=NASTY)),
)  # fmt: skip
NEW = Row("router", "new", {}, None, None, None)
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
        self.targets: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for name, value in attrs if name == "id"]
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
    filters = ["all", "person", "rolled-back", "offline", "new", "up-to-date"]
    logs = [f"file:///home/chroot/{row.host}/logs/" for row in ROWS]
    assert page.links == [*(f"?{word}#{word}" for word in filters), *logs]
    assert page.targets == filters[1:]
    for text in ("rolled-back", "up-to-date", "needs a person 1", "3 hosts"):
        assert text in page.text
    assert "1 host, 0 for a person to look at" in Page(bento.format_html([GOOD], NOW_S, "")).text


def test_output_is_replaced_whole_and_exit_code_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = tmp_path / "hosts/t470"
    host.mkdir(parents=True)
    (host / "configuration.nix").write_text("{ }\n")
    logs = tmp_path / "chroot/t470/logs"
    logs.mkdir(parents=True)
    good = REPORT._replace(polled=client.format_time(time.time()))
    bad = good._replace(last=LAST._replace(result="build-failed", reason="no"))
    (tmp_path / "chroot/t470/current.json").write_bytes(client.encode(CURRENT))
    target = tmp_path / "bento.prom"
    arguments = ["--fleet", str(tmp_path), "--chroot-dir", str(tmp_path / "chroot"), "status", "--prometheus"]
    for report, code in ((good, 0), (bad, 1)):
        (logs / "status.json").write_bytes(client.encode(report))
        assert bento.main([*arguments, "--output", str(target)]) == code
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", "")  # or cron would mail it, at each call
        assert target.read_text().startswith("# HELP") and target.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """Thirty hosts with names in order, none published."""
    for number in range(30):
        host = tmp_path / f"hosts/host-{number:02}"
        host.mkdir(parents=True)
        (host / "configuration.nix").write_text("{ }\n")
    (tmp_path / "chroot").mkdir()
    return tmp_path


def report_of(fleet: Path, name: str, **changes: Any) -> None:
    """As a host that has just reported."""
    logs = fleet / "chroot" / name / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs.parent / "current.json").write_bytes(client.encode(CURRENT._replace(host=name)))
    report = REPORT._replace(host=name, polled=client.format_time(time.time()), last=LAST._replace(**changes))
    (logs / "new").write_bytes(client.encode(report))
    os.rename(logs / "new", logs / "status.json")


@pytest.mark.parametrize(
    ("line", "width", "wanted"),
    [
        ("plain", 5, "plain"),
        ("plain", 4, "pla…"),
        ("日本語", 6, "日本語"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("x日本語", 5, "x日…"),
        ("日本語", 2, "…"),
        ("日本語", 1, "…"),
        ("ｆｕｌｌ", 7, "ｆｕｌ…"),
        ("e\u0301" * 3, 6, "e\u0301" * 3),
        ("e\u0301" * 3, 5, "e\u0301e\u0301…"),
        ("🙂🙂", 3, "🙂…"),
        ("é…", 2, "é…"),
        ("", 0, ""),
    ],
)
def test_clip(line: str, width: int, wanted: str) -> None:
    assert bento.clip(line, width) == wanted


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (-1e18, "0s"), (-1, "0s"), (0, "0s"), (119.9, "119s"), (120, "2min"), (5999, "99min"), (6000, "1.7h"), (7199, "2.0h"),
        (7200, "2h"), (172800, "2d"), (2 * 365 * 86400, "730d"), (2 * 366 * 86400, "2y"), (2.5e11, "7922y"),
    ],
)  # fmt: skip
def test_age(seconds: float, wanted: str) -> None:
    assert bento.age(seconds) == wanted


ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii:strict"},
]


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_no_terminal_is_too_plain(environment: dict[str, str], fleet: Path) -> None:
    name = "20261123T110000Z_aaaaaaaaaaaa_rolled-back.log"
    report_of(fleet, "host-07", result="rolled-back", reason="日本 é… \ud800".encode(errors="replace").decode() * 30)
    (fleet / "chroot/host-07/logs" / name).write_text("zwölf ✗\nx bento: error: rolled-back: 日本 é… \n")
    utf8 = {"PYTHONUTF8": "1"}
    for arguments, code in (
        (["status"], 1), (["status", "--json"], 1), (["status", "--prometheus"], 1), (["status", "--html"], 1),
        (["log", "host-07"], 0), (["log", "host-07", "--list"], 0), (["populate", "--dry-run"], 0), (["--help"], 0),
    ):  # fmt: skip
        done = run_bento(fleet, *arguments, **environment)
        assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr
        assert done.stdout
        if arguments[-1].startswith("--") and arguments[0] == "status":  # for programs: the same bytes in any locale
            times = re.compile(rb"[0-9]+s\b|T[0-9:]+Z|_seconds.* -?[0-9.]+")
            assert times.sub(b"", done.stdout) == times.sub(b"", run_bento(fleet, *arguments, **utf8).stdout)


def run_bento(fleet: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    argv: list[str | Path] = [sys.executable, "-c", AS_ANYBODY, "--fleet", fleet, "--chroot-dir", fleet / "chroot"]
    return subprocess.run(
        [*argv, *arguments], capture_output=True, timeout=120, check=False,
        env=os.environ | {"NIX_CONFIG": "substitute = false\nsandbox = false", "PYTHONPATH": str(REPO)} | environment,
    )  # fmt: skip


def say_bento(fleet: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = run_bento(fleet, *arguments)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


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
    first = say_bento(tmp_path, "update")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("hosts/a: thing new -> ") and first.stdout.count("\n") == 1
    assert say_bento(tmp_path, "update").stdout == "hosts/a: nothing moved\n"
    (tmp_path / "input/more").write_text("x")
    moved = say_bento(tmp_path, "update", "thing").stdout
    assert re.fullmatch(r"hosts/a: thing \S+ \S+ -> \S+ \S+\n", moved), moved
    assert say_bento(tmp_path, "update", "other").stdout == "hosts/a: has no input other\n"


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
        (tmp_path / "chroot/t470/current.json").write_bytes(client.encode(CURRENT._replace(system=built)))
        (logs / "status.json").write_bytes(client.encode(REPORT._replace(system=running)))
        return say_bento(tmp_path, "diff")

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
    (tmp_path / "chroot/.store").mkdir(exist_ok=True)
    for published, changes in ((paths[0], True), (None, True), (paths[1], False)):
        bento.note_built(tmp_path / "chroot", "t470", "b" * 64, paths[1])
        changed = diff(paths[0], published)
        assert (f"{paths[0]} -> {paths[1]}, which is not published\n" in changed.stdout) == changes
    late = CURRENT._replace(published="2099-01-01T00:00:00Z", system=paths[0])
    (tmp_path / "chroot/t470/current.json").write_bytes(client.encode(late))
    assert say_bento(tmp_path, "diff").stdout.startswith("t470: no difference")  # it was signed elsewhere since
