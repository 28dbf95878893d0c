"""States of hosts, and how `status` shows them."""

import itertools
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fleet import AS_ANYBODY, NOT_ROOT, NOW_S, OTHER, RELEASE, REPO, Ran, Site, last_data, report_data
from toynixos import write_config

import bento
import bento_client as client
from bento_client import Current, Last, Phase, Report, Result

CURRENT = Current("a", RELEASE, 10240, "2026-11-23T10:15:02Z", None)
REPORT = Report("a", client.VERSION, "2026-11-23T10:15:02Z", "idle", RELEASE, "/nix/store/x", False, None)
LAST = Last(RELEASE, "ok", "", "/nix/store/x", "2026-11-23T10:14:02Z", "2026-11-23T10:15:02Z", 1, "x_y_ok.log")
AFTER_S = 7200.0


def test_every_combination_has_exactly_one_state() -> None:
    """All that can be published, reported and seen, against a sentence for each state and flag."""
    systems = ("/nix/store/x", "/nix/store/y", "")
    published = (None, CURRENT, *(CURRENT._replace(system=system) for system in systems[:2]))
    results = (*Result, "some-day")
    lasts = (None, *(
        LAST._replace(release=release, result=result, system=system)
        for release, result, system in itertools.product((RELEASE, OTHER, None), results, (None, *systems[:2]))
    ))  # fmt: skip
    reports = (None, *(
        REPORT._replace(phase=phase, release=release, system=system, needs_reboot=reboot, last=last)
        for phase, release, system, reboot, last in itertools.product(
            (*Phase, "some-day"), (RELEASE, OTHER, None), systems, (False, True), lasts
        )
    ))  # fmt: skip
    seen = {None: False, NOW_S: False, NOW_S - AFTER_S: False, NOW_S - AFTER_S - 1: True, 0.0: True, NOW_S + 1e8: False}
    count = 0
    for current, report in itertools.product(published, reports):
        last = report.last if report else None
        both = report is not None and current is not None
        left = both and report is not None and report.phase == "left"
        busy = left or (report is not None and report.phase in ("building", "activating"))
        mine = both and current is not None and last is not None and last.release in (current.release, None)
        ended = mine and not busy
        well = ended and last is not None and last.release is not None and last.result == "ok"
        elsewhere = well and current is not None and report is not None and report.release != current.release
        expected = {
            "new": report is None,
            "pending": (report is not None and (current is None or (not busy and not mine)))
            or (elsewhere and report is not None and not report.needs_reboot),
            "waiting": elsewhere and report is not None and report.needs_reboot,
            "building": both and busy and not left,
            "left": left,
            "up-to-date": well and current is not None and report is not None and report.release == current.release,
            "rolled-back": ended and last is not None and last.release is not None and last.result == "rolled-back",
            "failing": ended and last is not None and (
                last.release is None or last.result not in ("ok", "rolled-back")
            ),
        }  # fmt: skip
        assert sum(expected.values()) == 1
        for seen_s, offline in seen.items():
            state, is_offline, reboot, drift = bento.judge(current, report, seen_s, NOW_S, AFTER_S)
            assert expected[state], (current, report)
            assert is_offline == offline
            assert reboot == (report is not None and report.needs_reboot)
            built = (current.system if current else None) or (last.system if last else None)
            assert drift == (
                well and report is not None and not reboot and built is not None and report.system != built
            )
            count += 1
    assert count == 4 * (1 + 5 * 3 * 3 * 2 * len(lasts)) * 6
    assert set(expected) == set(bento.URGENCY) - {"held", "unknown", "offline"}  # which do not follow from a report


ROWS: list[tuple[str, dict[str, Any], int]] = [
    ("failing", {"last": last_data(RELEASE, "build-failed", "error: no builder")}, 60),
    ("rolled-back", {"last": last_data(RELEASE, "rolled-back", "the server was out of reach"), "release": OTHER}, 60),
    ("pending", {"release": OTHER, "last": last_data(OTHER)}, 300),
    ("building", {"phase": "activating"}, 5),
    ("up-to-date", {"release": RELEASE, "last": last_data(RELEASE), "needs_reboot": True}, 600),
    ("drifting", {"release": RELEASE, "system": "/nix/store/other", "last": last_data(RELEASE)}, 600),
    ("offline", {"release": RELEASE, "last": last_data(RELEASE, finished="2026-11-23T06:15:02Z"), "client": "0.9"}, 3 * 3600),
]


def make_rows(prefix: str = "") -> list[bento.Row]:
    now_s = client.parse_time("2026-11-23T10:25:02Z")
    rows = [bento.Row("new", "new", {}, None, None, None)]
    for name, changes, age_s in ROWS:
        polled = client.format_time(now_s - age_s)
        raw = json.dumps(report_data(host=name, polled=polled) | changes).encode()
        report = client.parse_report(raw, "status.json")
        rows.append(bento.make_row(name, bento.Found(CURRENT, report, now_s - age_s, ""), now_s, AFTER_S))
    rows = [row._replace(host=f"{prefix}{row.host}") for row in rows]
    return bento.sort_rows(rows)


def test_the_table() -> None:
    now_s = client.parse_time("2026-11-23T10:25:02Z")
    assert bento.format_table(make_rows(), now_s, 79).splitlines() == [
        "HOST        STATE       RUNS    SINCE SEEN   NOTES",
        "failing     failing     -       10min 60s    aaaaaaa: build-failed: error: no …",
        "rolled-back rolled-back bbbbbbb 10min 60s    aaaaaaa: the server was out of re…",
        "drifting    up-to-date  aaaaaaa 10min 10min  drift",
        "offline     offline     aaaaaaa 4h    3h     offline for 3h; client 0.9; was u…",
        "pending     pending     bbbbbbb 10min 5min   aaaaaaa published 10min ago",
        "building    building    -       -     5s     aaaaaaa published 10min ago",
        "new         new         -       -     never  nothing published",
        "up-to-date  up-to-date  aaaaaaa 10min 10min  needs reboot",
        "██████████▓▓▓▓▓▓··········  █ current 3  ▓ earlier 2  · not known 3",
        "8 hosts: 1 building, 1 drift, 1 failing, 1 needs reboot, 1 new, 1 offline, 1",
        "other client, 1 pending, 1 rolled-back, 2 up-to-date",
    ]
    assert bento.format_table([], now_s, 80).splitlines()[-1] == "no hosts"


@pytest.mark.parametrize("width", [70, 79, 80, 81, 105, 106, 107, 200])
@pytest.mark.parametrize("decorated", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, decorated: bool) -> None:
    long = make_rows()[0]._replace(host="x" * 26, flags={"problem": bento.Flag("what is wrong " * 40)})
    rows = [long, *make_rows("n" * 15)] * 100
    text = bento.format_table(rows, client.parse_time("2026-11-23T10:25:02Z"), width, decorated=decorated)
    lines = re.sub("\x1b\\[[0-9;]*m", "", text).splitlines()
    assert len(lines) > 901
    assert max(map(len, lines)) <= width
    assert "x" * 26 in lines[1]


def in_terminal(argv: list[str], columns: int, **environment: str) -> tuple[int, str]:
    """What a program prints on a terminal, and its exit code."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(environment | {"COLUMNS": str(columns), "PYTHONPATH": str(REPO)})
        os.execv(argv[0], argv)
    shown = b""
    while True:
        assert select.select([terminal], [], [], 20)[0], "it hangs"
        try:
            chunk = os.read(terminal, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode().replace("\r\n", "\n")


def on_screen(shown: str) -> list[str]:
    """The lines that stay, of a program that only goes up and clears from there on."""
    lines = [""]
    for part in re.split("(\x1b\\[F|\x1b\\[J|\n)", shown):
        if part == "\x1b[F":
            lines.pop()
            lines[-1] = ""
        elif part == "\n":
            lines.append("")
        elif part != "\x1b[J":
            lines[-1] += part
    return [line for line in lines if line]


HURRIED = "import time; real = time.monotonic; time.monotonic = lambda: 1000 * real(); "


def test_populate_shows_progress_on_a_terminal_when_it_takes_long(site: Site) -> None:
    for name in "abc":
        site.host(name)
    argv = [sys.executable, "-c", HURRIED + AS_ANYBODY, *site.argv("populate")]
    code, shown = in_terminal(argv, 80)
    assert code == 0 and "b: publishing, 0s\n" in shown
    lines = [f"{name}: published {site.current(name).release[:12]} ({site.current(name).size} bytes)" for name in "abc"]
    assert on_screen(shown)[:5] == [NOT_ROOT, *lines, "3 hosts: 3 published, 0 unchanged, 0 failed"]
    site.host("b", {"new": "1"})
    code, shown = in_terminal([*argv, "--dry-run"], 80)
    assert [line.split()[:3] for line in on_screen(shown)[1:] if line.startswith("b:")] == [["b:", "would", "publish"]]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    quick = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert Ran(0, "", quick.stderr).errors == []


def test_populate_shows_which_host_it_builds(site: Site, toys: Path) -> None:
    for name in "ab":
        write_config(site.fleet / "hosts" / name, flake=True, host=name)
    code, shown = in_terminal([sys.executable, "-c", AS_ANYBODY, *site.argv("populate", "--build")], 80)
    assert code == 0, shown
    assert "a: building, 0s\n" in shown and "b: building, 0s\n" in shown
    assert [line.split(":")[0] for line in on_screen(shown)][:4] == ["not root", "a", "b", "2 hosts"]


def test_status_in_a_terminal(site: Site) -> None:
    name = "n" * 25
    site.host(name)
    site.publish()
    site.write_report(name, last=last_data(site.current(name).release, "build-failed", "no such option " * 20))
    argv = [sys.executable, "-c", AS_ANYBODY, *site.argv("status")]
    code, shown = in_terminal(argv, 80)
    assert code == 1
    assert "\x1b[31m✗\x1b[0m nnnn" in shown
    plain = re.sub("\x1b\\[[0-9;]*m", "", shown)
    assert max(map(len, plain.splitlines())) == 80
    assert "bento: error" not in plain  # it is in the table already
    assert plain.splitlines()[-1] == "1 host: 1 failing"
    code, shown = in_terminal(argv, 80, NO_COLOR="1")
    assert "\x1b" not in shown and "failing" in shown


def test_status(site: Site) -> None:
    for name in ("a", "b"):
        site.host(name)
    ran = site.run("status")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (
        "HOST STATE       RUNS    SYSTEM   SINCE SEEN   NOTES\n"
        "a    new         -       -        -     never  nothing published\n"
        "b    new         -       -        -     never  nothing published\n"
        "2 hosts: 2 new\n"
    )
    site.publish()
    release = site.current("b").release
    site.write_report("b", release=release, last=last_data(release))
    ran = site.run("status", "b")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "1 host: 1 up-to-date")
    site.write_report("b", last=last_data(release, "rolled-back", "the server was out of reach"))
    ran = site.run("status")
    assert ran.code == 1
    assert re.fullmatch(r"bento: error: b: rolled-back since \S+Z \([0-9]+\w+\): \w{7}: the server was out of reach\n", ran.err)
    assert ran.out.splitlines()[1].startswith("b    rolled-back ")
    assert site.run("status", "a").code == 0
    ran = site.run("status", "nobody")
    assert (ran.code, ran.out) == (2, "")


def test_offline_after(site: Site) -> None:
    site.host("a")
    site.publish()
    polled_s = time.time() - 3 * 3600
    times: dict[str, Any] = {"polled": client.format_time(polled_s), "last": last_data(site.current().release)}
    report = site.write_report(release=site.current().release, **times)
    os.utime(report, (polled_s, polled_s))
    ran = site.run("status")
    assert (ran.code, ran.out.splitlines()[-1]) == (1, "1 host: 1 offline")
    assert ran.err.startswith("bento: error: a: offline since 20") and ran.err.endswith("Z (3h), it was up-to-date\n")
    assert site.run("status", "--offline-after", "4").code == 0
    assert site.run("status", "--offline-after", "2.9").code == 1


LONG = ("parts", "signed", "vow", "signer", "again")
NOTHING_THE_MATTER = {
    "failed_units": [], "paused": False, "absent": None, "held": None, "not_published": None, "tries": 0,
    "two_machines": False, "needs_a_person": False, "reasons": [], "waiting_for_boot": None, "paused_until": None,
    "expires_soon": False, "late": False, "was": None, "attempts": [],
}  # fmt: skip


def test_status_json(site: Site) -> None:
    site.host("a")
    site.host("b")
    site.publish("a")
    current = site.current()
    finished = client.format_time(time.time() - 600)
    last = last_data(current.release, reason="two\tparts", finished=finished)
    report = site.write_report(release=current.release, last=last, needs_reboot=True)
    ran = site.run("status", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["format"] == 1
    assert abs(client.parse_time(found["time"]) - time.time()) < 5
    new, up = found["hosts"]
    assert new == {
        "host": "b", "state": "new", "offline": False, "needs_reboot": False, "drift": False, "published": None,
        "release": None, "system": None, "client": None, "phase": None, "last": None, "seen": None, "problem": None,
        "other_client": False, "since": None, "clock_ahead_s": None, "revision": None, "expired": False, "signer": None,
        "flags": {}, "notes": ["nothing published"], **NOTHING_THE_MATTER,
    }  # fmt: skip
    polled_s, seen_s = client.parse_time(json.loads(report.read_text())["polled"]), report.stat().st_mtime
    assert up.pop("since") == client.format_time(seen_s - (polled_s - client.parse_time(finished)))
    assert up.pop("clock_ahead_s") == round(polled_s - seen_s)
    assert up == {
        "host": "a", "state": "up-to-date", "offline": False, "needs_reboot": True, "drift": False,
        "published": {k: v for k, v in current._asdict().items() if k not in LONG}, "release": current.release, "system": "/nix/store/x",
        "client": client.VERSION, "phase": "idle", "last": last | {"reason": "two parts", "revision": None},
        "revision": None,
        "seen": client.format_time(report.stat().st_mtime), "problem": None, "other_client": False, "expired": False,
        "signer": None, "flags": {"needs_reboot": {"words": "needs reboot", "since": None, "needs_a_person": False}},
        "notes": ["needs reboot", "two parts"], **NOTHING_THE_MATTER,
    }  # fmt: skip


def test_status_shows_what_runs() -> None:
    now_s = client.parse_time("2026-11-23T10:25:02Z")
    up = CURRENT._replace(revision="1a2b3c4 mail: a new certificate, and more")
    report = REPORT._replace(last=LAST, revision="what the host says")
    rows = [
        bento.make_row(name, bento.Found(current, report, now_s, ""), now_s, 7200)
        for name, current in (("same", up), ("other", up._replace(release="b" * 64)))
    ]
    wide = bento.format_table(rows, now_s, 140).splitlines()
    assert "1a2b3c4 mail: a new certificate, and … " in wide[1]
    assert "aaaaaaa what the host says " in wide[2]
    assert "mail" not in bento.format_table(rows, now_s, 100)
    assert [bento.row_json(row, now_s)["revision"] for row in rows] == [up.revision, report.revision]


def test_the_newest_report_of_several_trees_counts(site: Site, tmp_path: Path) -> None:
    """A host reports to the server that it has reached."""
    site.host("a")
    site.publish()
    old = site.write_report(release=site.current().release, last=last_data(site.current().release))
    os.utime(old, (1e9, 1e9))
    other = tmp_path / "b/a/logs"
    other.mkdir(parents=True)
    report = json.loads(old.read_text()) | {"phase": "building"}
    (other / "status.json").write_text(json.dumps(report))

    def shown(*trees: Path) -> tuple[str, str]:
        flags = ["--offline-after", "1e9", *(["--logs", *map(str, trees)] if trees else [])]
        row = json.loads(site.run("status", "--json", *flags).out)["hosts"][0]
        return row["phase"], row["state"]

    assert shown()[0] == "idle"
    for trees in ([tmp_path / "b"], [site.chroots, tmp_path / "b"]):
        assert shown(*trees) == ("building", "building")
    os.utime(other / "status.json", (0, 0))
    assert shown(tmp_path / "b")[0] == "idle"
    wrong = site.run("status", "--logs", "a")
    assert (wrong.code, wrong.errors) == (2, ["bento: error: --logs a: no such directory"])


def names_in(line: str) -> list[str]:
    """Those in brackets. What was published a second later comes first."""
    return sorted(line.partition("(")[2].partition(")")[0].split(", "))


def test_one_look_writes_all(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page, metrics and news, from one reading of each report; one that cannot be written keeps no other."""
    for name in "abc":
        site.host(name)
    site.publish()
    for name in "abc":
        site.write_report(name, failed_units=["x.service"])
    page, metrics, told = (site.top / name for name in ("page", "metrics", "told"))
    reads, read = Counter[str](), bento.read_report
    monkeypatch.setattr(bento, "read_report", lambda chroot, name: (reads.update([name]), read(chroot, name))[1])
    ran = site.run("status", "--page", str(page), "--metrics", str(metrics), "--changes", str(told))
    assert (ran.code, ran.out) == (1, "") and reads == {"a": 1, "b": 1, "c": 1}
    [news] = ran.errors
    assert names_in(news) == ["a", "b", "c"] and news.startswith("bento: begins: 3 hosts (") and news.endswith("): failed units: x.service")
    assert page.read_text().startswith("<!doctype html>")
    assert metrics.read_text() == site.run("status", "--prometheus").out
    assert page.read_text().partition("As of")[0] == site.run("status", "--html").out.partition("As of")[0]
    metrics.unlink()
    ran = site.run("status", "--page", "/nope/page", "--metrics", str(metrics))
    missing, failed = ran.errors
    assert missing == "bento: error: /nope/page: No such file or directory"
    assert names_in(failed) == ["a", "b", "c"] and failed.startswith("bento: error: 3 hosts (")
    assert metrics.exists() and (ran.code, ran.out) == (1, "")


@pytest.mark.parametrize("option", ["--page", "--metrics"])
def test_a_page_that_is_a_directory(option: str, site: Site) -> None:
    ran = site.run("status", option, "/")
    assert (ran.code, ran.err) == (2, f"bento: error: {option} /: this is a directory: name a file\n")
