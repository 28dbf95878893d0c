"""What a host says and uploads, at its worst."""

import html
import itertools
import json
import os
import random
import re
import subprocess
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet import NOW_S, RELEASE, Ran, Site, attempts, bind_socket, last_data, report_data, run_outside
from toynixos import _missing, need

import bento
import bento_client as client

SECRET = "root:$6$the-secret-of-the-server"


def deep_json(_: Site) -> bytes:
    return b"[" * 30_000 + b"]" * 30_000


def as_text(**changes: Any) -> Callable[[Site], bytes]:
    return lambda _: json.dumps(report_data() | changes).encode()


# What the host writes as logs/status.json, and what is said of it.
CONTENT: dict[str, tuple[Callable[[Site], bytes], str]] = {
    "empty": (lambda _: b"", "not JSON (Expecting value: line 1 column 1 (char 0))"),
    "cut short": (lambda _: json.dumps(report_data()).encode()[:-9], "not JSON"),
    "invalid UTF-8": (lambda _: b'{"format": 1, "host": "\xff"}', "not JSON ('utf-8' codec"),
    "a list": (lambda _: b"[]", "not a JSON object"),
    "deep": (deep_json, "not JSON"),
    "huge integer": (lambda _: b'{"format": 1, "x": ' + b"9" * 20_000 + b"}", "not JSON"),
    "huge float": (lambda _: json.dumps(report_data(last=last_data(RELEASE, attempt=0))).replace(
        '"attempt": 0', '"attempt": 1e999').encode(), "field 'attempt' is missing or malformed"),
    "large integer": (as_text(last=last_data(RELEASE, attempt=1 << 60)), "field 'attempt' is missing or malformed"),
    "NaN": (lambda _: b'{"format": 1, "x": NaN}', "not JSON (NaN is not JSON)"),
    "infinity": (lambda _: b'{"format": 1, "x": -Infinity}', "not JSON (-Infinity is not JSON)"),
    "too large": (as_text(padding="x" * 70_000), f"larger than {client.MAX_JSON_BYTES} bytes"),
    "newer format": (as_text(format=2), "format 2, this version of Bento knows format 1"),
    "format true": (as_text(format=True), "format True, this version of Bento knows format 1"),
    "another host": (as_text(host="b"), "it speaks for host 'b'"),
    "no host": (as_text(host="\x1b[2J"), "field 'host' is missing or malformed"),
    "wrong type": (as_text(needs_reboot="yes"), "field 'needs_reboot' is missing or malformed"),
    "last is a list": (as_text(last=[]), "field 'last' is missing or malformed"),
    "phase": (as_text(phase="\x1b[2J"), "field 'phase' is missing or malformed"),
    "release": (as_text(release="../../../etc"), "field 'release' is missing or malformed"),
    "release with newline": (as_text(release=RELEASE + "\n"), "field 'release' is missing or malformed"),
    "system": (as_text(system="/nix/store/\u202ex"), "field 'system' is missing or malformed"),
    "client": (as_text(client="<b> "), "field 'client' is missing or malformed"),
    "log": (as_text(last=last_data(RELEASE, log="../../x")), "field 'log' is missing or malformed"),
    "year 0": (as_text(polled="0000-01-01T00:00:00Z"), "field 'polled' is missing or malformed"),
    "month 13": (as_text(polled="2026-13-01T00:00:00Z"), "field 'polled' is missing or malformed"),
    "time with other digits": (as_text(polled="２026-11-23T10:15:02Z"), "field 'polled' is missing or malformed"),
    "leap second": (as_text(last=last_data(RELEASE, finished="2026-12-31T23:59:60Z")), "field 'finished' is missing"),
}  # fmt: skip


def check_harmless(ran: Ran, problem: str) -> None:
    assert ran.code == 1
    assert problem in ran.out
    assert SECRET not in ran.out + ran.err
    assert all(c.isprintable() or c == "\n" for c in ran.out + ran.err)


def check_problem(site: Site, problem: str) -> None:
    """Said in the table, on stderr once, in JSON and in the other formats; the other host is shown as ever."""
    ran = site.run("status")
    check_harmless(ran, problem)
    assert len(ran.errors) == 1
    assert ran.errors[0].startswith("bento: error: a: unknown: logs/status.json: ")
    assert re.search("^b +up-to-date ", ran.out, re.MULTILINE)
    ran = site.run("status", "--json")
    rows = {row["host"]: row for row in json.loads(ran.out)["hosts"]}
    assert problem in rows["a"]["problem"]
    assert (rows["a"]["state"], rows["a"]["release"], rows["b"]["state"]) == ("unknown", None, "up-to-date")
    assert SECRET not in ran.out
    ran = site.run("status", "--prometheus")
    assert ran.code == 1 and SECRET not in ran.out
    check_metrics(ran.out)
    for sample in ('state{host="a",state="unknown"}', 'needs_attention{host="a"}', 'state{host="b",state="up-to-date"}'):
        assert f"bento_host_{sample} 1\n" in ran.out
    ran = site.run("status", "--html")
    assert ran.code == 1 and SECRET not in ran.out
    assert '<tr class="unknown person"><td>a<' in ran.out and '<tr class="up-to-date"><td>b<' in ran.out
    assert problem in html.unescape(ran.out)


SAMPLE = re.compile(r'bento_[a-z_]+\{([a-z]+="[A-Za-z0-9_-]+",?)+\} -?[0-9]+(\.[0-9]+)?')


def check_metrics(text: str) -> None:
    for line in text.splitlines():
        assert line.startswith(("# HELP bento_", "# TYPE bento_")) or SAMPLE.fullmatch(line), line


@pytest.mark.parametrize("case", CONTENT)
def test_a_report_of_hostile_content(case: str, hostile: Site) -> None:
    make, problem = CONTENT[case]
    (hostile.chroots / "a/logs/status.json").write_bytes(make(hostile))
    check_problem(hostile, problem)


# A name of a log, whatever that stands for, and a report that speaks of it.
NAMES = (
    "00010101T000000Z_{0}_rolled-back.log", "00000101T000000Z_{0}_ok.log", "20261399T996699Z_{0}_build-failed.log",
    "99991231T235959Z_{0}_some-day.log", "20261123T101502Z_{0}_ok.log/", "x\udcff.log", "20261123T101502Z_none_ok.log",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_whatever_one_host_leaves_the_others_rows_stay(seed: int, hostile: Site) -> None:
    dice, logs = random.Random(seed), hostile.chroots / "a/logs"
    release = hostile.current().release
    for name in dice.sample(NAMES, 3):
        path = f"{logs}/{name.format(release[:12])}"
        Path(path).mkdir() if path.endswith("/") else Path(path).write_bytes(dice.randbytes(99))
    times = ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-11-23T10:15:02Z", "1969-12-31T23:59:59Z")
    last = last_data(release, dice.choice(["ok", "rolled-back", "build-failed", "x"]), "\u202e\x1b[2J" * 9, finished=dice.choice(times))
    log = dice.choice(NAMES[:4]).format(release[:12])
    report = report_data(polled=dice.choice(times), last=last | {"log": log, "attempt": dice.choice([0, 1, 10**9])})
    report |= {"since": dice.choice(times), "phase": dice.choice(["idle", "building", "x"]), "paused_until": dice.choice(times)}
    report |= {"machine": dice.choice(["0" * 16, "f" * 16]), "interval": dice.choice([0, 1, 1 << 50]), "offline_after": dice.choice([0, 1 << 50])}
    raw = json.dumps(report).encode()
    if dice.random() < 0.5:
        raw = raw.replace(dice.choice([b"0", b"-", b"a"]), dice.choice([b"", b"\xff", b"9" * 30, b"{"]), dice.randrange(9))
    (logs / "status.json").write_bytes(raw)
    forms: list[tuple[str, ...]] = [(), ("--json",), ("--html",), ("--prometheus",), ("--changes", str(hostile.top / "told"))]
    for form in forms:
        ran = hostile.run("status", *form)
        assert ran.code in (0, 1) and "Traceback" not in ran.err
        assert re.search(r'^b +up-to-date|"host": "b", "state": "up-to-date"|<td>b<|host="b",state="up-to-date"} 1', ran.out, re.MULTILINE)
    assert hostile.run("status", "a").code in (0, 1) and hostile.run("log", "a", "--list").code in (0, 1)


def link_to_secret(path: Path) -> None:
    secret = path.parents[3] / "secret"
    secret.write_text(json.dumps(report_data(client=SECRET)))
    path.symlink_to(secret)


def make_link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("f"))
    path.symlink_to("f")


def make_device(path: Path) -> None:
    os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10 << 30)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "/etc/shadow": (lambda p: p.symlink_to("/etc/shadow"), "not a regular file (Too many levels of symbolic links)"),
    "link": (link_to_secret, "not a regular file (Too many levels of symbolic links)"),
    "dangling link": (lambda p: p.symlink_to("gone"), "not a regular file (Too many levels of symbolic links)"),
    "link to a FIFO": (
        make_link_to_fifo,
        "not a regular file (Too many levels of symbolic links)",
    ),
    "FIFO": (os.mkfifo, "not a regular file"),
    "directory": (os.mkdir, "not a regular file"),
    "socket": (bind_socket, "not a regular file (No such device or address)"),
    "device": (make_device, "not a regular file"),
    "10 GB": (make_sparse, f"larger than {client.MAX_JSON_BYTES} bytes"),
}


def make_hostile_file(case: str, path: Path) -> None:
    if case == "device" and os.getuid() != 0:
        _missing("needs root to make a device")
    KINDS[case][0](path)


@pytest.mark.parametrize("case", KINDS)
def test_a_report_that_is_no_file(case: str, hostile: Site) -> None:
    make_hostile_file(case, hostile.chroots / "a/logs/status.json")
    descriptors = len(os.listdir("/proc/self/fd"))
    check_problem(hostile, KINDS[case][1])
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("case", KINDS)
def test_a_log_that_is_no_file(case: str, hostile: Site) -> None:
    name = "20261123T101502Z_9f3a61c07be4_ok.log"
    make_hostile_file(case, hostile.chroots / "a/logs" / name)
    listed = hostile.run("log", "a", "--list")
    assert listed.code == 0 and listed.out.startswith("20261123T101502Z  9f3a61c07be4  ok") and len(attempts(listed)) == 1
    assert case == "10 GB" or f"logs/{name}: {KINDS[case][1]}" in listed.out
    ran = hostile.run("log", "a")
    if case == "10 GB":
        assert (ran.code, ran.err) == (0, "")
        assert ran.out == "?" * bento.MAX_LOG_BYTES + "\n"
    else:
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == f"bento: error: logs/{name}: {KINDS[case][1]}\n"


def test_logs_itself_is_a_link(hostile: Site) -> None:
    logs = hostile.chroots / "a/logs"
    logs.rmdir()
    logs.symlink_to(hostile.chroots / "b/logs")
    check_problem(hostile, "not a regular file (Not a directory)")
    (hostile.chroots / "b/logs/20261123T101502Z_9f3a61c07be4_ok.log").write_text(SECRET)
    for arguments in ([], ["--list"]):
        ran = hostile.run("log", "a", *arguments)
        assert (ran.code, ran.out) == (1, "")


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;x\x07", "\u202egnp.exe\u2066", "a\r\x08\x7f\x9b31m", "\ud800\u2028\u200b", "</td>"])
def test_what_a_host_says_is_one_harmless_line(text: str, hostile: Site) -> None:
    release = hostile.current().release
    reason = f"before {text}<script>alert(1)</script> after"
    hostile.write_report(release=release, last=last_data(release, "build-failed", reason))
    ran = hostile.run("status")
    check_harmless(ran, "after")
    assert len(ran.out.splitlines()) == 4
    assert len(ran.errors) == 1
    said = json.loads(hostile.run("status", "--json").out)["hosts"][0]["last"]["reason"]
    assert said.isprintable() and said.startswith("before ")
    page = hostile.run("status", "--html").out
    assert "<script" not in page and "&lt;script&gt;" in page
    assert text == "</td>" or text not in page
    assert reason not in hostile.run("status", "--prometheus").out


NASTY = (
    "\x1b[2J\x1b]0;x\x07\x9b31m", "\u202egnp\u2066\u200f", "a\nb 1\n\r\x00\x85\u2028", '"} 1\nbento_hosts{state="failing"} 9', "\\",
    "<script>alert(1)</script>&lt;<!--", "' onload=x \"", "日本語" * 50, "e" + "\u0301" * 300, "\ud800\U000e0001", "{0.__class__}%s%n$(id)`id`",
)  # fmt: skip
STRINGS = [
    *(("", name) for name in ("host", "client", "polled", "phase", "release", "system")),
    *(("last", name) for name in ("release", "result", "reason", "system", "started", "finished", "log")),
    ("", "a field of its own"),
]


@pytest.mark.parametrize("where", STRINGS, ids="-".join)
def test_no_string_of_a_host_is_more_than_words(where: tuple[str, str], hostile: Site) -> None:
    """Everything hostile in every string, in all that is printed: nothing escapes, and host b is not spoken for."""
    release = hostile.current().release

    def others() -> list[object]:
        """What is said of host b."""
        table = re.findall(r"(?m)^b .*$", hostile.run("status").out)
        rows = json.loads(hostile.run("status", "--json").out)["hosts"]
        metrics = [line for line in hostile.run("status", "--prometheus").out.splitlines() if '"b"' in line]
        page = re.findall(r'<tr [^>]*><td>b<.*', hostile.run("status", "--html").out)
        return [table, [row | {"seen": 0, "since": 0} for row in rows if row["host"] == "b"], metrics, page]

    def ageless(said: list[object]) -> str:
        return re.sub(r"\b[0-9.]+(s|min|h|d)\b", "0s", str(said))

    hostile.write_report(release=release, last=last_data(release, "build-failed", "why"))
    before = ageless(others())
    tags = hostile.run("status", "--html").out.partition("<tbody>")[2].count("<")
    for text in NASTY:
        report: dict[str, Any] = {"release": release, "last": last_data(release, "build-failed", "why")}
        (report["last"] if where[0] else report)[where[1]] = text
        hostile.write_report(**report)
        for form in ([], ["--json"], ["--prometheus"], ["--html"]):
            ran = hostile.run("status", *form)
            assert all(c.isprintable() or c == "\n" for c in ran.out + ran.err)
            assert ran.out.isascii() or not form
            if form == ["--prometheus"]:
                check_metrics(ran.out)
            if form == ["--html"]:
                assert ran.out.partition("<tbody>")[2].count("<") == tags
            if form == []:
                assert len(ran.out.splitlines()) == 4
        assert ageless(others()) == before


@pytest.mark.parametrize("when", ["9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "1969-12-31T23:59:59Z"])
def test_a_host_whose_clock_is_wrong(when: str, hostile: Site) -> None:
    release = hostile.current().release
    times = {"started": when, "finished": when}
    report = hostile.write_report(polled=when, release=release, last=last_data(release, **times))
    for form in ("--json", "--prometheus", "--html"):
        assert hostile.run("status", form).code == 0
    ran = hostile.run("status")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "2 hosts: 2 up-to-date")
    # Nor does the time of the file help a host that wants to look alive for ever.
    os.utime(report, (253402300799, 253402300799))
    row = json.loads(hostile.run("status", "--json", "a").out)["hosts"][0]
    assert abs(client.parse_time(row["seen"]) - time.time()) < 60
    os.utime(report, (-1, -1))
    ran = hostile.run("status", "--json", "a")
    row = json.loads(ran.out)["hosts"][0]
    assert (ran.code, row["seen"], row["offline"]) == (1, "1970-01-01T00:00:00Z", True)
    for form in ("--prometheus", "--html"):
        assert hostile.run("status", form).code == 1


@pytest.mark.parametrize("polled", ["9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z"])
@pytest.mark.parametrize("finished", ["9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "2026-11-23T10:15:02Z"])
@pytest.mark.parametrize("seen_s", [-1e11, -1.0, 0.0, 1e9, 2e11, 3e14])
def test_times_without_sense(polled: str, finished: str, seen_s: float, hostile: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file system lets a host say, no form of `status` stumbles, and the columns hold."""
    release = hostile.current().release
    report = hostile.write_report(polled=polled, release=release, last=last_data(release, finished=finished))
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        if found.st_ino != report.stat().st_ino:
            return found
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return types.SimpleNamespace(**fields | {"st_mtime": seen_s})  # type: ignore[return-value]

    monkeypatch.setattr(os, "fstat", fstat)
    for form in ("--prometheus", "--html"):
        assert hostile.run("status", form).code == int(seen_s < 1e10)
    row = json.loads(hostile.run("status", "--json", "a").out)["hosts"][0]
    assert 0 <= client.parse_time(row["seen"]) <= time.time()
    assert row["since"] is None or 0 <= client.parse_time(row["since"]) <= time.time()
    assert (row["since"] is None) == (finished > polled)
    header, line, *_ = hostile.run("status", "a").out.splitlines()
    assert line[header.index("SEEN") - 1] == " " != line[header.index("SEEN")]
    assert line[header.index("NOTES") - 2 : header.index("NOTES")] == "  "
    assert re.search(r"clock [0-9]+y (ahead|behind)$", line)


def test_a_file_that_is_replaced_while_it_is_read(hostile: Site) -> None:
    logs = hostile.chroots / "a/logs"
    secret = hostile.top / "secret"
    secret.write_text(json.dumps(report_data(client=SECRET)))
    (logs / "good").write_text(json.dumps(report_data(client="good")))
    os.mkfifo(logs / "fifo")
    (logs / "link").symlink_to(secret)
    (logs / "short").write_text("{")
    stop = threading.Event()

    def replace() -> None:
        for name in itertools.cycle(["good", "fifo", "short", "link"]):
            (logs / "new").unlink(missing_ok=True)
            os.link(logs / name, logs / "new", follow_symlinks=False)
            os.rename(logs / "new", logs / "status.json")
            if name == "good":
                os.unlink(logs / "status.json")
            if stop.is_set():
                return

    thread = threading.Thread(target=replace, daemon=True)
    thread.start()
    seen: dict[str, int] = {}
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and (len(seen) < 4 or sum(seen.values()) < 300):
        _, report, _, problem, *_ = bento.read_report(hostile.chroots / "a", "a")
        word = report.client if report is not None else problem.partition(" (")[0]
        seen[word] = seen.get(word, 0) + 1
    stop.set()
    thread.join(5)
    assert set(seen) <= {"good", "", "logs/status.json: not a regular file", "logs/status.json: not JSON"}
    assert len(seen) >= 3
    for form in ([], ["--json"], ["--prometheus"], ["--html"]):
        assert hostile.run("status", *form).code in (0, 1)


def test_a_host_that_fills_its_logs(hostile: Site) -> None:
    hostile.write_report()
    logs = hostile.chroots / "a/logs"
    for number in range(bento.MAX_LOG_FILES):
        (logs / f"{number:050}").touch()
    ran = hostile.run("status")
    check_harmless(ran, f"logs/ has more than {bento.MAX_LOG_FILES} files: the host fills it")
    (logs / f"{0:050}").unlink()
    assert hostile.run("status").code == 0


@pytest.mark.parametrize("files", [1, 5])
def test_a_host_that_fills_its_logs_by_size(files: int, hostile: Site) -> None:
    """With one file or several; a sparse one counts whole, as it will in a backup."""
    hostile.write_report()
    logs = hostile.chroots / "a/logs"
    for number in range(files):
        (logs / f"{number}").touch()
        os.truncate(logs / f"{number}", bento.MAX_LOGS_BYTES // files + 1)
    for form in ([], ["--json"], ["--html"]):
        check_harmless(hostile.run("status", *form), "logs/ holds more than 100 MB: the host fills it")
    assert 'bento_host_needs_attention{host="a"} 1' in hostile.run("status", "--prometheus").out
    os.truncate(logs / "0", 0)
    assert hostile.run("status").code == 0


def test_a_million_logs(hostile: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a part is looked at. BENTO_TEST_FILES=1000000 makes as many as that."""
    count = int(os.environ.get("BENTO_TEST_FILES", "3000"))
    if count < bento.MAX_LOG_ENTRIES:
        monkeypatch.setattr(bento, "MAX_LOG_ENTRIES", 2000)
    logs = hostile.chroots / "a/logs"
    for number in range(count):
        os.close(os.open(logs / f"2020{number // 100000 + 1:02}01T{number:06}Z_aaaaaaaaaaaa_ok.log", os.O_CREAT | os.O_WRONLY))
    release = hostile.current().release
    hostile.write_report(release=release, last=last_data(release))
    for form in ([], ["--json"], ["--html"]):
        check_harmless(hostile.run("status", *form), "logs/ has more than 1000 files: the host fills it")
    assert 'bento_host_needs_attention{host="a"} 1' in hostile.run("status", "--prometheus").out
    word = f"a: more than {bento.MAX_LOG_ENTRIES} files in {logs}: not all were looked at\n"
    assert hostile.run("log", "a") == Ran(0, "", word)
    listed = hostile.run("log", "a", "--list")
    assert (listed.code, listed.err, len(attempts(listed))) == (0, word, bento.KEEP_LOGS)
    assert hostile.run("log", "a", "--release", "b").err.startswith(f"{word}bento: error: a: no log of that release")
    hostile.publish()
    assert len(os.listdir(logs)) <= max(bento.KEEP_LOGS, count - 1000)


def test_a_hostile_log_does_not_keep_the_list_busy(site: Site) -> None:
    """A pattern that tries every way to end such a line takes seconds for each of these: more than this test waits."""
    site.host("a")
    site.publish()
    logs = site.chroots / "a/logs"
    for number in range(60):
        text = "bento: a: " * 136 + " " * 2730 + "\nx"
        (logs / f"20261123T1015{number:02}Z_{'a' * 12}_ok.log").write_text(text)
    assert run_outside(site, "log", "a", "--list").stdout.count("  ok") == 60


def test_a_log_that_is_not_of_this_release_ends_no_soak(hostile: Site) -> None:
    """A host names in its report what log it likes."""
    release, logs = hostile.current("a").release, hostile.chroots / "a/logs"
    own = f"20261123T101502Z_{release[:12]}_ok.log"
    names = {own: True, own.replace("_ok", "_rolled-back"): False, f"20261123T101502Z_{'0' * 12}_ok.log": False, "status.json": False}
    for name, counts in names.items():
        (logs / name).touch()
        os.utime(logs / name, (NOW_S - 1e6,) * 2)
        hostile.write_report("a", release=release, last=last_data(release, log=name))
        found = bento.read_host(str(hostile.chroots / "a"), "a")
        came_s = bento.log_came_s(hostile.chroots / "a", found)
        assert (came_s is not None) == counts, name


def test_logs_that_are_slow_to_read_are_told(hostile: Site, tmp_path: Path) -> None:
    """A directory of ext4 keeps the size that it once had."""
    if os.getuid() != 0:
        _missing("needs root, to mount")
    logs, image = hostile.chroots / "a/logs", tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run([need("mkfs.ext4"), "-q", "-F", "-N", "40000", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, logs], check=False, capture_output=True).returncode != 0:
        _missing("cannot mount ext4")
    try:
        (logs / "lost+found").rmdir()
        hostile.write_report("a")
        assert "slow to read" not in hostile.run("status").out
        names = [logs / f"20261123T101502Z_{number:012}_rolled-back.log" for number in range(30_000)]
        for path in names:
            path.touch()
        for path in names:
            path.unlink()
        ran = hostile.run("status")
        assert ran.code == 1 and re.search(r"a: .*logs/ is slow to read, with \d MB of names that are gone: remove it: 'bento.py", ran.err)
        assert re.search(r"^b +up-to-date", ran.out, re.MULTILINE)
    finally:
        subprocess.run(["umount", "-l", logs], check=True)
