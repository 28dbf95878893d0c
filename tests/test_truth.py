"""What would mislead an administrator: each row of what `status` has to say, and of what it must not."""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from fleet import OTHER, RELEASE, Site, last_data, toy_host, write_program
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
        (row_of(3), "up-to-date", ["offline"], "offline since 2026-11-25T09:00:00Z (3h), it was up-to-date"),
        (row_of(3, interval=3600), "up-to-date", [], ""),
        (row_of(3.1, interval=3600), "up-to-date", ["offline"], "offline since"),
        (row_of(100, offline_after=7 * 86400), "up-to-date", [], ""),
        (row_of(32 * 24, offline_after=1 << 50), "up-to-date", ["offline"], "offline since"),  # nobody has that patience
        (row_of(3, bento.Beside({"a": "at sea"}, {}, {})), "up-to-date", [], "offline for 3h; absent: at sea"),
        (row_of(0.1, bento.Beside({"a": "at sea"}, {}, {})), "up-to-date", [], "back again: remove hosts/a.absent"),
        (row_of(failed_units=("nginx.service",)), "up-to-date", ["failed_units"],
         "failed units: nginx.service; up-to-date since 2026-11-25T08:54:00Z (3h)"),
        (row_of(phase="building", since=at(11.9)), "building", [], ""),
        (row_of(phase="building", since=at(12.1)), "building", ["stuck"],
         "building since 2026-11-24T23:54:00Z (12h): no end of its build"),
        (row_of(paused_until=at(-3)), "up-to-date", [], "paused until 2026-11-25T15:00:00Z"),
        (row_of(1, paused_until=at(0.5)), "up-to-date", [], ""),  # which is over
        (row_of(release=OTHER, waiting_for_boot=RELEASE), "waiting", [], ""),
        (row_of(0.1, bento.Beside({}, {"a": bento.Refusal(at(26), 7, "it does not evaluate")}, {})), "up-to-date",
         ["not_published"], "not published for 26h, tried 7 times: it does not evaluate; up-to-date since"),
        (row_of(last=FAILED, release=OTHER), "failing", ["failed"],
         "failing since 2026-11-25T11:00:00Z (60min): aaaaaaa, tried 3 times: build-failed: no"),
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
    told = bento.row_json(row)
    assert told["reasons"] == reasons and json.dumps(told)
    metrics = bento.format_prometheus([row])
    for flag in ("paused", "expired", "absent", "stuck", "failed_units", "not_published"):
        assert f'bento_host_{flag}{{host="a"}} {int(getattr(row, flag))}' in metrics
    assert f"bento_host_tries{{host=\"a\"}} {row.tries}" in metrics
    shown = bento.format_host(row, NOW_S)
    assert all(bento.note(row, reason, NOW_S) in shown for reason in reasons)


def test_offline_hosts_come_first_and_none_is_green() -> None:
    rows = bento.sort_rows([row_of(last=FAILED)._replace(host="b"), row_of(9)._replace(host="c"), row_of()])
    assert [row.host for row in rows] == ["c", "b", "a"]
    top = bento.format_table(rows, NOW_S, 100, decorated=True).splitlines()[1]
    assert top.startswith("\x1b[31m!\x1b[0m c ")
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


def test_what_fails_to_be_published_is_told_until_it_passes(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    toy_host(site, "b")
    site.publish("--check")
    for name in "ab":
        report(site, name)
    assert site.run("status").code == 0
    toy_host(site, "a", build="eval-error")
    assert site.run("populate", "--check").code == 1
    lock = json.loads((site.chroots / ".lock").read_text())
    lock["a"]["since"] = client.format_time(time.time() - 3 * 86400)
    (site.chroots / ".lock").write_text(json.dumps(lock))
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
    assert len(ran.errors) == 2 and all("nix-store" in line and "not valid" in line for line in ran.errors)


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
        "d: unknown: /nix/store/" + "0" * 32 + "-elsewhere is not in this server's store",
        "e: unknown: it has not reported",
    ]
    assert ran.code == 0 and site.run("closure", "ssl").out.splitlines()[:3] == ["a: none", "b: none", "c: none"]
