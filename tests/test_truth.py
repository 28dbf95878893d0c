"""What would mislead an administrator: each row of what `status` has to say, and of what it must not."""

import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fleet import CONFIGURATION, OTHER, RELEASE, Site, last_data, toy_host, write_program
from toynixos import _missing, need

import bento
import bento_client as client
from bento import NOTHING_BESIDE, Found, Row
from bento_client import Current, Last, Report

NOW_S = client.parse_time("2026-11-25T12:00:00Z")
H = 3600.0


def at(hours: float) -> str:
    """So many hours ago."""
    return client.format_time(NOW_S - hours * H)


CURRENT = Current("a", RELEASE, 10240, at(5), None, (), "1111111 new")
LAST = Last(RELEASE, "ok", "", "/nix/store/x", at(4.1), at(4), 1, "20261125T080000Z_aaaaaaaaaaaa_ok.log")
REPORT = Report("a", client.VERSION, at(0.1), "idle", RELEASE, "/nix/store/x", False, LAST)


def row_of(
    seen_h: float = 0.1, beside: bento.Beside = NOTHING_BESIDE, logs: tuple[str, ...] = (), **changes: Any
) -> Row:
    """The row of a host whose report, changed so, came that long ago; its clock is an hour ahead."""
    shifted = REPORT._replace(polled=at(seen_h), last=LAST._replace(finished=at(seen_h + 3), started=at(seen_h + 3)))
    return bento.make_row("a", Found(CURRENT, shifted._replace(**changes), NOW_S - seen_h * H, "", logs), NOW_S, 2 * H, beside)


FAILED = LAST._replace(result="build-failed", reason="no", attempt=3, finished=at(1))


@pytest.mark.parametrize(
    ("row", "state", "reasons", "words"),
    [
        (row_of(), "up-to-date", [], ""),
        (row_of(3), "offline", ["offline"], "offline since 2026-11-25T09:00:00Z (3h), it was up-to-date"),
        (row_of(3, interval=3600), "up-to-date", [], ""),
        (row_of(3.1, interval=3600), "offline", ["offline"], "offline since"),
        (row_of(100, offline_after=7 * 86400), "up-to-date", [], ""),
        (row_of(32 * 24, offline_after=1 << 50), "offline", ["offline"], "offline since"),  # nobody has that patience
        (row_of(3, bento.Beside({"a": "at sea"}, {}, {})), "offline", [], "offline for 3h; absent: at sea; was up-to-date"),
        (row_of(0.1, bento.Beside({"a": "at sea"}, {}, {})), "up-to-date", [], "back again: remove hosts/a.absent"),
        (row_of(failed_units=("nginx.service",)), "up-to-date", ["failed_units"],
         "failed units: nginx.service; up-to-date since 2026-11-25T08:54:00Z (3h)"),
        (row_of(phase="building", since=at(11.9)), "building", [], ""),
        (row_of(paused_until=at(-3)), "up-to-date", [], "paused until 2026-11-25T15:00:00Z"),
        (row_of(1, paused_until=at(0.5)), "up-to-date", [], ""),  # which is over
        (row_of(-1), "up-to-date", [], ""),  # no pause, whatever a clock says
        (row_of(release=OTHER, waiting_for_boot=RELEASE), "waiting", [], ""),
        (row_of(0.1, bento.Beside({}, {"a": bento.Refusal(at(26), 7, "it does not evaluate")}, {})), "up-to-date",
         ["not_published"], "not published for 26h, tried 7 times: it does not evaluate; up-to-date since"),
        (row_of(last=FAILED, release=OTHER), "failing", ["failed"],
         "failing since 2026-11-25T11:00:00Z (60min): 1111111, tried 3 times: build-failed: no"),
        (row_of(last=FAILED, release=OTHER, logs=(
            "20261125T020000Z_bbbbbbbbbbbb_build-failed.log", "20261125T070000Z_aaaaaaaaaaaa_ok.log",
            "20261125T080000Z_aaaaaaaaaaaa_postponed.log", "20261125T100000Z_aaaaaaaaaaaa_build-failed.log",
        )), "failing", ["failed"], "failing since 2026-11-25T08:00:00Z (4h): "),
        (bento.make_row("a", Found(None, None, NOW_S, "logs/status.json: not JSON", (), True), NOW_S, 2 * H), "unknown",
         ["problem"], "unknown: logs/status.json: not JSON"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_host(row: Row, state: str, reasons: list[str], words: str) -> None:
    assert (row.state, row.reasons) == (state, reasons)
    assert row.needs_a_person == bool(reasons)
    said = bento.complaint(row, NOW_S).text if reasons else "; ".join(bento.notes(row, NOW_S))
    assert said.startswith(words), said
    told = bento.row_json(row, NOW_S)
    assert told["reasons"] == reasons and json.dumps(told)
    metrics = bento.format_prometheus([row])
    for flag in ("paused", "expired", "absent", "late", "failed_units", "not_published"):
        assert f'bento_host_{flag}{{host="a"}} {int(flag in row.flags)}' in metrics
    assert f"bento_host_tries{{host=\"a\"}} {row.tries}" in metrics
    shown = bento.format_host(row, NOW_S)
    assert all(row.flags[reason].words in shown for reason in reasons)


DAY = 24.0
WAITS: dict[str, Any] = {"release": OTHER, "waiting_for_boot": RELEASE, "needs_reboot": True}
RUNS: dict[str, Any] = {"release": RELEASE, "needs_reboot": True}
HELD = bento.Beside({}, {}, {("a", RELEASE): "held 3d: wait for nas (pending)"})


@pytest.mark.parametrize(
    ("published_h", "changes", "beside", "words"),
    [
        (23, {"release": OTHER}, NOTHING_BESIDE, None),
        (25, {"release": OTHER}, NOTHING_BESIDE, "late: 1111111 was published 25h ago"),
        (25, {"release": OTHER, "last": None, "phase": "building"}, NOTHING_BESIDE, "late: 1111111 was published 25h ago"),
        (25, {"release": OTHER, "offline_after": 48 * 3600}, NOTHING_BESIDE, None),
        (50, {"release": OTHER, "paused_until": at(23)}, NOTHING_BESIDE, None),
        (50, {"release": OTHER, "paused_until": at(25)}, NOTHING_BESIDE, "late: 1111111 was published 2d ago"),
        (50, {"release": OTHER}, bento.Beside({"a": "at sea"}, {}, {}), None),
        (50, {}, HELD, None),
        (9 * DAY, RUNS | {"reboot": "when-needed", "last": LAST._replace(finished=at(6.9 * DAY))}, NOTHING_BESIDE, None),
        (9 * DAY, RUNS | {"reboot": "03:00-05:00", "last": LAST._replace(finished=at(7.1 * DAY))}, NOTHING_BESIDE,
         "1111111 waits for a reboot for 7d"),
        (99 * DAY, RUNS | {"last": LAST._replace(finished=at(29 * DAY))}, NOTHING_BESIDE, None),
        (99 * DAY, WAITS | {"last": LAST._replace(finished=at(31 * DAY))}, NOTHING_BESIDE, "1111111 waits for a reboot for 31d"),
        (99 * DAY, WAITS | {"last": LAST._replace(finished=at(5 * DAY))}, bento.Beside({}, {}, {}, 4 * DAY * H),
         "1111111 waits for a reboot for 5d"),
    ],
)  # fmt: skip
def test_who_is_late(published_h: float, changes: dict[str, Any], beside: bento.Beside, words: str | None) -> None:
    current = CURRENT._replace(published=at(published_h))
    row = bento.make_row("a", Found(current, REPORT._replace(**changes), NOW_S - 360, ""), NOW_S, 2 * H, beside)
    assert (row.flags["late"].words if "late" in row.flags else None) == words, row
    assert row.reasons == (["late"] if words else [])


def test_lateness_is_measured_from_what_was_missed_first() -> None:
    """A commit an hour starts nothing anew; a host that never came is late, and so is one that came from another server."""
    history = tuple(bento.Published(at(hours), f"{hours:064}", None, None) for hours in range(90, 0, -1))

    def late(runs: str | None) -> bento.Flag | None:
        report = REPORT._replace(release=runs) if runs else None
        found = Found(CURRENT._replace(published=at(1), release=f"{1:064}"), report, NOW_S - 360 if report else None, "", (), False, history)
        return bento.make_row("a", found, NOW_S, 2 * H).flags.get("late")

    assert late(f"{20:064}") is None
    for runs, began_h, words in (
        (f"{30:064}", 29, "late: 1111111 was published 29h ago"),
        (None, 90, "has never reported, 1111111 was published 3d ago"),
        (RELEASE, 90, "runs aaaaaaa, which this server never published: 'bento.py populate --again', if it was restored"),
    ):
        flag = late(runs)
        assert flag is not None and flag.since_s == NOW_S - began_h * H and flag.words.startswith(words)


def test_within_a_month_something_is_tried_again_or_a_person_is_needed() -> None:
    """Silence is never green: from each state that a host can report, without any change."""
    results, phases, releases = ("ok", "build-failed", "postponed", "rolled-back", "some-day"), ("idle", "building", "left"), (RELEASE, OTHER, None)
    count = 0
    for result, phase, runs, tried, reboot, waits in itertools.product(results, phases, releases, releases, (True, False), (True, False)):
        last = LAST._replace(release=tried, result=result, finished=at(32 * DAY))
        report = REPORT._replace(
            release=runs, phase=phase, needs_reboot=reboot, last=last, waiting_for_boot=RELEASE if waits else None
        )
        row = bento.make_row("a", Found(CURRENT._replace(published=at(33 * DAY)), report, NOW_S - 360, ""), NOW_S, 2 * H)
        fine = row.state == "up-to-date" and not reboot
        assert row.needs_a_person or fine or row.state == "left", (row.state, report)
        count += 1
    assert count == 540


def test_a_machine_that_fell_out_of_hosts_is_missed(site: Site) -> None:
    for name in "ab":
        site.host(name)
        site.publish(name)
        report(site, name)
    assert site.run("status").code == 0
    (site.fleet / "hosts/b").rename(site.fleet / "b")
    ran = site.run("status")
    assert ran.code == 1 and re.match(r"bento: error: b: it is not in hosts/, and reported \w+ ago: put it back", ran.err), ran.err
    assert site.run("status", "a").code == 0
    report(site, "b", phase="left")
    assert site.run("status").code == 0


def test_what_broke_last_and_worst_comes_first_and_no_silent_one_is_green() -> None:
    newer = row_of(last=FAILED._replace(finished=at(0.5)))._replace(host="n")
    units = row_of(failed_units=("nginx.service",))._replace(host="u")
    rows = [row_of(), *(row_of(9)._replace(host=f"c{n}") for n in range(40)), units, row_of(last=FAILED)._replace(host="b"), newer]
    rows = bento.sort_rows(rows)
    assert [row.host for row in rows][:4] == ["n", "b", "u", "c0"] and rows[-1].host == "a"
    lines = bento.format_table(rows, NOW_S, 100, decorated=True).splitlines()
    assert lines[4].startswith("\x1b[31m!\x1b[0m c0   offline ") and lines[-1] == "44 hosts: 1 failed units, 2 failing, 40 offline, 2 up-to-date"
    groups = [(len(group), words) for group, words in bento.complaints(rows, NOW_S)]
    assert groups[0] == (2, "failing: 1111111: build-failed: no, for 30min to 60min")
    assert groups[2] == (40, "offline, for 9h") and len(groups) == 3
    assert "<b>40 hosts (c0, c1, c10, c11, c12, &#8230;)</b> offline, for 9h" in bento.format_html(rows, NOW_S, "")
    assert 'bento_hosts{state="offline"} 40' in bento.format_prometheus(rows)
    assert "<b>! offline</b>, was up-to-date" in bento.format_html(rows, NOW_S, "")


def test_the_roll_out_is_a_bar() -> None:
    old = REPORT._replace(release=OTHER, revision="2222222 old", last=LAST._replace(release=OTHER, finished=at(0.1)))
    rows = [row_of()] * 6 + [bento.make_row("a", Found(CURRENT, old, NOW_S, ""), NOW_S, 2 * H)] * 3
    rows += [bento.make_row("a", Found(None, None, None, ""), NOW_S, 2 * H)]
    assert bento.format_bar(rows, 90) == "█" * 18 + "▓" * 9 + "···" + "  █ 1111111 6  ▓ 2222222 3  · not known 1"
    assert bento.format_bar(rows[:6], 90) == ""  # everybody has the same
    shades = bento.count_shades(rows)
    assert [(shade.label, shade.hosts) for shade in shades] == [("1111111 new", 6), ("2222222 old", 3), ("not known", 1)]
    page = bento.format_html(rows, NOW_S, "")
    assert '<u class=shade0 style="flex:6" title="1111111 new: 6">' in page
    many = [bento.make_row("a", Found(CURRENT, old._replace(revision=f"{n}"), NOW_S, ""), NOW_S, H) for n in range(9)]
    assert [shade.label for shade in bento.count_shades(many)][3] == "6 older ones"


def test_attempts_are_marks_with_when_and_why() -> None:
    names = tuple(f"2026112{day}T080000Z_aaaaaaaaaaaa_{result}.log" for day, result in enumerate(
        ("ok", "ok", "build-failed", "rolled-back", "some-day")
    ))  # fmt: skip
    row = row_of(logs=names)
    page = bento.html_attempts(row, lambda host, log: f"<{host}>" if "build" in log else "", False)
    assert page.count("<s ") == 5
    assert '<s class=ok title="2026-11-20T08:00:00Z aaaaaaa ok">✓</s>' in page
    assert '<s class=bad title="2026-11-22T08:00:00Z aaaaaaa build-failed: &lt;a&gt;">✗</s>' in page
    brief = bento.html_attempts(row, lambda *_: "", True)
    assert '<s class=ok title="2026-11-20T08:00:00Z to 2026-11-21T08:00:00Z aaaaaaa ok">✓✓</s>' in brief


def report(site: Site, name: str, seen_s: float = 0.0, **changes: Any) -> None:
    release = site.current(name).release
    path = site.write_report(name, **{"release": release, "last": last_data(release)} | changes)
    when_s = time.time() - seen_s
    os.utime(path, (when_s, when_s))


def test_what_is_missing_or_shut_is_not_new(site: Site) -> None:
    for name in "ab":
        site.host(name)
    site.publish()
    report(site, "a")
    (site.chroots / "a/current.json").unlink()
    (site.chroots / "b/logs").rmdir()
    (site.chroots / "b/logs").write_text("")
    ran = site.run("status")
    assert ran.code == 1
    assert "bento: error: a: unknown: current.json is missing: 'bento.py populate a' publishes it again" in ran.errors
    assert "logs/status.json: not a regular file (Not a directory)" in ran.err
    assert "is no directory" in site.run("log", "b").err
    assert bento.why_not(PermissionError(13, "Permission denied")) == "Permission denied: run this as root"


def test_all_hosts_are_silent(site: Site) -> None:
    for name in "abc":
        site.host(name)
    site.publish()
    for name in "ab":
        report(site, name, 3 * H)
    ran = site.run("status")
    (line,) = ran.errors
    assert ran.code == 1 and line.startswith("bento: error: all 2 hosts are silent since 20")
    assert line.endswith("(3h): was this server down, or its disk full?")
    assert "all 2 hosts are silent" in site.run("status", "--html").out
    assert json.loads(site.run("status", "--json").out)["problems"][0].startswith("all 2 hosts")
    (site.fleet / "hosts/a.absent").write_text("in the workshop\n")
    report(site, "b")
    assert site.run("status").code == 0
    assert "absent: in the workshop" in site.run("status").out
    (site.fleet / "hosts/c.absent").symlink_to("a.absent")
    assert site.run("status").code == 0 and "absent" in site.run("status", "c").out


def test_a_full_disk_of_the_server(site: Site, tmp_path: Path) -> None:
    if os.getuid() != 0:
        _missing("needs root, to mount")
    site.host("a")
    site.chroots.mkdir()
    subprocess.run([need("mount"), "-t", "tmpfs", "-o", "size=4m", "tmpfs", site.chroots], check=True)
    try:
        site.publish()
        assert site.run("status").code == 0
        (site.chroots / ".filler").write_bytes(bytes(3 << 20))
        ran = site.run("status")
        assert ran.code == 1 and f"this server's own disk has no room at {site.chroots}" in ran.err
    finally:
        subprocess.run(["umount", "-l", site.chroots], check=True)


@pytest.fixture
def small_disk(site: Site) -> Iterator[Site]:
    """The chroots have 24 MB of their own."""
    if os.getuid() != 0:
        _missing("needs root, to mount")
    site.chroots.mkdir()
    subprocess.run([need("mount"), "-t", "tmpfs", "-o", "size=24m,nr_inodes=2000", "tmpfs", site.chroots], check=True)
    try:
        yield site
    finally:
        subprocess.run(["umount", "-l", site.chroots], check=True)


def stuff(site: Site, name: str, what: str) -> int:
    """One host's junk, until nothing fits beside it."""
    logs, number = site.chroots / name / "logs", 0
    with suppress(OSError):
        for number in range(3000):
            file = {"junk": f"x{number}", "uploads": f".{LOG.format(number)}", "names": f"x{number}"}.get(what, LOG.format(number))
            (logs / file).write_bytes(bytes(0 if what == "names" else 1 << 18))
    return number


LOG = "20261123T10{:04}Z_9f3a61c07be4_ok.log"


@pytest.mark.parametrize("what", ["logs", "junk", "uploads", "names"])
def test_one_hosts_junk_keeps_nobody_from_being_published(small_disk: Site, what: str) -> None:
    site = small_disk
    for name in "abc":
        site.host(name)
    site.publish()
    for name in "abc":
        report(site, name)
        (site.chroots / name / "logs" / LOG.format(9999)).write_text("bento: ok: fine\n")
    (site.chroots / "b/logs/own").write_text("small\n")
    stuff(site, "b", what)
    ran = site.run("status")
    lacks = "no inodes" if what == "names" else "no room"
    assert ran.code == 1 and f"own disk has {lacks} at {site.chroots}" in ran.err and ": the most is of b (" in ran.err
    site.host("a", CONFIGURATION | {"big": os.urandom(2 << 20)})
    site.host("b", CONFIGURATION | {"new": "1"})
    ran = site.run("populate")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "3 hosts: 2 published, 1 unchanged, 0 failed"), ran.err
    assert f"bento: warning: {site.chroots} is full: removed " in ran.err and "of b (" in ran.err
    kept = os.listdir(site.chroots / "b/logs")
    assert "status.json" in kept and len(kept) <= 21
    for name in "ac":  # of others, nothing went
        assert set(os.listdir(site.chroots / name / "logs")) == {"status.json", LOG.format(9999)}
    assert site.run("status").code == 0


def test_a_disk_that_stays_full_stops_only_what_needs_room(small_disk: Site) -> None:
    """Nobody's logs/ fills it."""
    site = small_disk
    for name in "abc":
        site.host(name)
    (site.fleet / "hosts/waves").write_text("a\n")
    site.publish()
    site.host("b", {"configuration.nix": "{ } # new\n"})
    with suppress(OSError), open(site.chroots / ".filler", "wb", buffering=0) as filler:
        while filler.write(bytes(1 << 12)):
            pass
    (site.chroots / "c/logs/x").symlink_to("y")
    ran = site.run("populate")
    assert ran.code == 1 and "1 failed" in ran.out and "Traceback" not in ran.err, ran.err
    assert "b: No space left on device" in ran.err or "No space left on device" in ran.err
    assert "Errno" not in ran.err
    shutil.rmtree(site.fleet / "hosts/c")
    assert "c: removed " in site.run("populate", "--prune").out
    (site.fleet / "hosts/waves").write_text("nobody\n")
    assert "nobody: no such host" in site.run("populate").err
    (site.fleet / "hosts/waves").unlink()
    (site.chroots / ".filler").unlink()
    assert site.publish().out.endswith("1 published, 1 unchanged, 0 failed\n")


def test_what_fails_to_be_published_is_told_until_it_passes(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    toy_host(site, "b")
    site.publish("--check")
    for name in "ab":
        report(site, name)
    assert site.run("status").code == 0
    toy_host(site, "a", build="eval-error")
    assert site.run("populate", "--check").code == 1
    notes = json.loads((site.chroots / ".rollout.json").read_text())
    notes["refused"]["a"]["since"] = client.format_time(time.time() - 3 * 86400)
    (site.chroots / ".rollout.json").write_text(json.dumps(notes))
    assert (site.chroots / ".lock").read_bytes() == b""
    assert site.run("populate", "--check").code == 1
    assert site.run("populate", "b", "--check").code == 0  # of others, it says nothing
    ran = site.run("status")
    assert ran.code == 1
    assert re.match(r"bento: error: a: not published for 3d, tried 2 times: nixos-rebuild dry-build: exit 1", ran.err)
    assert site.run("populate", "--check", "--dry-run").code in (0, 1)
    (row,) = [row for row in json.loads(site.run("status", "--json").out)["hosts"] if row["host"] == "a"]
    assert row["state"] == "up-to-date" and row["not_published"]["times"] == 2
    toy_host(site, "a")
    site.publish("a", "--check")
    assert site.run("status").code == 0


def test_changes_are_told_once(site: Site) -> None:
    site.host("a")
    site.publish()
    page, memory = site.top / "page", site.top / "memory"

    def told() -> list[str]:
        return site.run("status", "--html", "--output", str(page), "--changes", str(memory)).errors

    report(site, "a")
    assert told() == []
    report(site, "a", failed_units=["nginx.service"])
    (line,) = told()
    assert line.startswith("bento: begins: a: failed units: nginx.service")
    assert told() == []
    report(site, "a", failed_units=["nginx.service", "sshd.service"])
    begins, over = told()
    assert begins.startswith("bento: begins: a: failed units: nginx.service, sshd.service")
    assert over.startswith("bento: over: a: failed units nginx.service (since 20")
    report(site, "a")
    (line,) = told()
    assert line.startswith("bento: over: a: failed units nginx.service, sshd.service (since 20")
    assert told() == []
    memory.write_text("{")
    report(site, "a", failed_units=["nginx.service"])
    assert len(told()) == 1


def test_each_trouble_of_the_server_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the first lasts, which ends before it."""
    for name in "ab":
        site.host(name)
    site.publish()
    page, memory, silence = site.top / "page", site.top / "memory", "all 2 hosts are silent since"

    def told(*, disk: bool, silent: bool) -> list[str]:
        for name in "ab":
            report(site, name, 3 * H if silent else 0)
        monkeypatch.setattr(bento, "FULL_DISK_BYTES", 1 << 60 if disk else 0)
        lines = site.run("status", "--html", "--output", str(page), "--changes", str(memory)).errors
        return [line for line in lines if ": a: " not in line and ": b: " not in line]

    assert told(disk=False, silent=False) == []
    (line,) = told(disk=True, silent=False)
    assert line.startswith("bento: begins: this server's own disk has no room at ")
    (line,) = told(disk=True, silent=True)
    assert line.startswith(f"bento: begins: {silence}")
    assert told(disk=True, silent=True) == []
    (line,) = told(disk=False, silent=True)
    assert line.startswith("bento: over: this server's own disk (since 20")
    (line,) = told(disk=False, silent=False)
    assert line.startswith("bento: over: all hosts are silent (since 20")
    assert told(disk=False, silent=False) == []


def test_status_of_one_host_cuts_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    site.host("a")
    site.publish("--revision", "a certificate for everybody")
    reason = "error: " + " ".join(f"word-{number}" for number in range(60))
    report(site, "a", last=last_data(site.current().release, "build-failed", reason, attempt=7), client="0.9")
    lines = site.run("status", "a").out.splitlines()
    assert lines[0].startswith("HOST") and len(lines[1]) == 80 and lines[-1] == "1 host: 1 failing, 1 other client"
    said = "\n".join(lines[2:])
    for words in (reason, "tried 7 times", site.current().release, "a certificate for everybody", "0.9"):
        assert words in said


NIX = {"NIX_CONFIG": "substitute = false\nsandbox = false\nbuild-users-group ="}
SYSTEM = """{ needs }:
let make = name: text: derivation { inherit name; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo ${text} > $out" ]; };
in make "nixos-system-x" (make needs "") """


def test_a_closure_that_cannot_be_read_stops_no_other(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(site.top / "bin/nix-store", 'case "$3" in *-good) echo $3-openssl-3.0.14 ;; *) echo error: not valid >&2; exit 1 ;; esac\n')
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(bento, "is_here", lambda _: True)
    for name, system in (("a", "bad"), ("b", "good"), ("c", "bad")):
        site.host(name)
        site.publish(name)
        report(site, name, system=f"/nix/store/{'0' * 32}-{system}")
    ran = site.run("closure", "openssl")
    assert (ran.code, ran.out) == (1, "b: none\n")
    assert len(ran.errors) == 1 and "2 hosts (a, c): nix-store" in ran.err and "not valid" in ran.err


def test_closure(site: Site) -> None:
    need("nix-store")
    if os.getuid() != 0:
        _missing("needs root, for the store")
    paths = []
    for needs in ("openssl-3.0.14", "openssl-3.0.15-bin", "openssl-doc"):
        argv = ["nix-build", "--no-out-link", "--expr", SYSTEM, "--argstr", "needs", needs]
        done = subprocess.run(argv, text=True, capture_output=True, check=True, env=os.environ | NIX)
        paths.append(done.stdout.strip())
    for name, where in zip("abcde", [*paths, "/nix/store/" + "0" * 32 + "-elsewhere", None], strict=True):
        site.host(name)
        site.publish(name)
        if where is not None:
            report(site, name, system=where)
    ran = site.run("closure", "openssl")
    assert ran.out.splitlines() == [
        "a: 3.0.14",
        "b: 3.0.15",
        "c: without a version",
    ]
    how = "a host builds its own: 'bento.py build' here, or services.bento.build = \"server\" there, brings them"
    assert ran.code == 1 and ran.errors == [
        f"bento: error: d: unknown: its system is not in this server's store: {how}",
        "bento: error: e: unknown: it has not reported",
    ]
    assert site.run("closure", "ssl").out.splitlines()[:3] == ["a: none", "b: none", "c: none"]
