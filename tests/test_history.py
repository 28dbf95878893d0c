"""Logs, revisions, and the history of what was published."""

import json
import os
import re
import shutil
import stat
import subprocess
import time

import pytest
from fleet import CONFIGURATION, Ran, Site, attempts, check_tidy, commit, git, inodes, snapshot

import bento
import bento_client as client

# --- log ---


def test_log(hostile: Site) -> None:
    logs = hostile.chroots / "a/logs"
    ran = hostile.run("log", "a")
    assert (ran.code, ran.err) == (1, f"bento: error: a: no log in {logs}: it has not reported one yet\n")
    first, second = "20201123T101502Z_aaaaaaaaaaaa_build-failed.log", "20201124T101502Z_bbbbbbbbbbbb_ok.log"
    (logs / first).write_bytes(b"one\n\ttwo \x1b[2J\x1b]0;t\x07 three\r\n\xff\xe2\x80\xae end")
    (logs / second).write_text("second\n")
    for log, when in ((first, "2020-11-23T10:15:09Z"), (second, "2020-11-24T10:15:09Z")):
        os.utime(logs / log, (client.parse_time(when),) * 2)
    (logs / "20991124T101502Z_bbbbbbbbbbbb_\x1b[2J.log").write_text("bad name\n")
    (logs / "zzz.log").write_text("bad name\n")
    assert hostile.run("log", "a") == Ran(0, "second\n", "")
    published = hostile.current()
    when = published.published.replace("-", "").replace(":", "")
    assert hostile.run("log", "a", "--list") == Ran(
        0,
        f"{when}  {published.release[:12]}  published  by {bento.publisher()}\n"
        "20201124T101502Z  bbbbbbbbbbbb  ok\n20201123T101502Z  aaaaaaaaaaaa  build-failed\n",
        "",
    )
    assert hostile.run("log", "a", "--list", "--release", "b" * 64).out == "20201124T101502Z  bbbbbbbbbbbb  ok\n"
    assert hostile.run("log", "a", "--list", "--release", published.release[:12]).out.count("published") == 1
    expected = "one\n\ttwo ?[2J?]0;t? three\n\N{REPLACEMENT CHARACTER}? end\n"
    for release in ("a", "a" * 12, "a" * 64):
        assert hostile.run("log", "a", "--release", release) == Ran(0, expected, "")
    ran = hostile.run("log", "a", "--release", "c" * 64)
    assert (ran.code, ran.err) == (
        1, f"bento: error: a: no log of that release in {logs}: it has not reported one yet\n",
    )  # fmt: skip
    ran = hostile.run("log", "nobody")
    assert (ran.code, ran.out) == (2, "")


def test_the_list_of_logs_has_reasons(hostile: Site) -> None:
    """As the client ends its logs; what a host writes instead is one harmless line."""
    logs = hostile.chroots / "a/logs"
    ends = [
        (b"noise\n" * 5000 + b"2020-11-23T10:15:02Z bento: error: build-failed: nixos-rebuild: exit 1\n", "nixos-rebuild: exit 1"),
        (b"2020-11-23T10:15:02Z bento: ok\n", ""),
        (b"2020-11-23T10:15:02Z bento: ok: failed units: a.service\n", "failed units: a.service"),
        ("2020-11-23T10:15:02Z bento: error: rolled-back: \x1b[2J\u202e\0…\x85 é\xff\n".encode() + b"\xff", ""),
        ("2020-11-23T10:15:02Z bento: error: rolled-back: \x1b[2J\u202e\0… é\n".encode(), "[2J … é"),
        (b"no newline, nor a word of Bento", ""),
        (b"", ""),
        (bytes(5000), ""),
    ]  # fmt: skip
    for number, (content, _) in enumerate(ends):
        path = logs / f"20201123T10150{number}Z_aaaaaaaaaaaa_ok.log"
        path.write_bytes(content)
        os.utime(path, (client.parse_time("2020-11-23T10:15:02Z") + number,) * 2)
    ran = hostile.run("log", "a", "--list")
    assert (ran.code, ran.err) == (0, "")
    assert attempts(ran) == [
        f"20201123T10150{number}Z  aaaaaaaaaaaa  ok{'  ' if reason else ''}{reason}"
        for number, (_, reason) in reversed(list(enumerate(ends)))
    ]


def test_the_newest_log_is_the_one_that_came_last(hostile: Site) -> None:
    """A host whose clock was a year ahead named its logs so."""
    logs = hostile.chroots / "a/logs"
    came_s = client.parse_time("2020-11-23T10:15:02Z")
    for name, age_s in (("20211123T101502Z_aaaaaaaaaaaa_ok.log", 60.0), ("20201123T101502Z_bbbbbbbbbbbb_ok.log", 0.0)):
        (logs / name).write_text(f"{name}\n")
        os.utime(logs / name, (came_s - age_s,) * 2)
    (logs / "99999999T999999Z_cccccccccccc_ok.log").write_text("no such time\n")
    os.utime(logs / "99999999T999999Z_cccccccccccc_ok.log", (-1, -1))
    assert hostile.run("log", "a").out == "20201123T101502Z_bbbbbbbbbbbb_ok.log\n"
    assert attempts(hostile.run("log", "a", "--list")) == [
        "20201123T101502Z  bbbbbbbbbbbb  ok",
        "20211123T101502Z  aaaaaaaaaaaa  ok  (came 2020-11-23T10:14:02Z)",
        "99999999T999999Z  cccccccccccc  ok",
    ]


# --- revisions ---


def test_the_revision(site: Site) -> None:
    directory = site.host("a", CONFIGURATION | {"x": "x\n"})
    (directory / "link").symlink_to("x")
    site.host("b")
    commit(site.fleet, "make\tit \x1b[31mred\u2028again\n\nand more")
    short = git(site.fleet, "rev-parse", "--short", "HEAD").strip()
    site.publish()
    assert site.current().revision == f"{short} make it [31mred again"
    for path in (directory / "x", directory / "link"):  # only touched
        os.utime(path, (5, 5), follow_symlinks=False)
    site.host("b", CONFIGURATION | {"untracked": "x"})
    (directory / "y").write_text("y\n")
    git(site.fleet, "add", "hosts/a/y")
    git(site.fleet, "commit", "-q", "-m", "y")
    assert site.run("populate").code == 0
    short = git(site.fleet, "rev-parse", "--short", "HEAD").strip()
    assert site.current().revision == f"{short} y"
    (directory / "x").write_text("z\n")
    assert site.run("populate").code == 0
    assert site.current().revision == f"{short} y"
    commit(site.fleet, "z")
    site.publish("--revision", "for\nthe weekend")
    assert site.current().revision == "for the weekend"
    lines = [json.loads(line) for line in (site.chroots / "a/history").read_text().splitlines()]
    assert [list(line) for line in lines] == [["time", "release", "revision", "system", "by"]] * 3
    assert (lines[-1]["time"], lines[-1]["release"]) == (site.current().published, site.current().release)
    assert [line["revision"] for line in lines][1:] == [f"{short} y", "for the weekend"]
    listed = site.run("log", "a", "--list").out.splitlines()
    assert len(listed) == 3 and listed[0].endswith(f"  published  for the weekend  by {bento.publisher()}")


def test_what_was_published_and_what_came_of_it(site: Site) -> None:
    """`log --list` answers what changed on a host last Tuesday."""
    host = site.host("a")
    for number in range(2):
        (host / "configuration.nix").write_text(f"{{ }} # {number}\n")
        site.publish("--revision", f"number {number}")
        log = f"20201123T10150{number}Z_{site.current().release[:12]}_ok.log"
        (site.chroots / "a/logs" / log).write_text("ok\n")
        os.utime(site.chroots / "a/logs" / log, (time.time() + number - 0.5,) * 2)
    listed = [line.split("  ")[2] for line in site.run("log", "a", "--list").out.splitlines()]
    assert sorted(listed) == ["ok", "ok", "published", "published"]
    assert site.run("log", "a", "--list", "--release", site.current().release).out.count("number 1") == 1
    # A host that has never reported.
    shutil.rmtree(site.chroots / "a/logs")
    assert [line.split("  ")[3] for line in site.run("log", "a", "--list").out.splitlines()] == ["number 1", "number 0"]
    assert site.run("log", "a").code == 1


def test_the_history_has_an_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bento, "KEEP_HISTORY", 3)
    host = site.host("a")
    for number in range(5):
        (host / "configuration.nix").write_text(f"{{ }} # {number}\n")
        site.publish("--revision", str(number))
    lines = (site.chroots / "a/history").read_text().splitlines()
    assert [json.loads(line)["revision"] for line in lines] == ["2", "3", "4"]
    # What is not ours, or cut, is passed over.
    with open(site.chroots / "a/history", "a") as file:
        file.write('{"time": "2026"\n[]\n{"from": "next year"}\n')
    (host / "configuration.nix").write_text("{ } # more\n")
    site.publish("--revision", "more")
    lines = (site.chroots / "a/history").read_text().splitlines()
    assert [json.loads(line)["revision"] for line in lines] == ["3", "4", "more"]


def test_a_kill_before_the_history(site: Site) -> None:
    """The next run writes what is missing, once."""
    site.host("a")
    site.publish("--revision", "one")
    (site.chroots / "a/history").unlink()
    for _ in range(2):
        site.publish()
        (line,) = (site.chroots / "a/history").read_text().splitlines()
        assert json.loads(line)["revision"] == "one"


def test_a_chroot_of_version_1_0(site: Site) -> None:
    """Without store and history: nothing is published anew, and the next release finds its way."""
    host = site.host("a")
    (site.fleet / "hosts/b").symlink_to("a")
    for number in range(3):
        (host / "configuration.nix").write_text(f"{{ }} # {number}\n")
        site.publish()
    for name in "ab":
        chroot = site.chroots / name
        subprocess.run(["cp", "-a", chroot / "releases", chroot / "copies"], check=True)
        shutil.rmtree(chroot / "releases")
        (chroot / "copies").rename(chroot / "releases")
        (chroot / "history").unlink()
        releases = sorted(path for path in (chroot / "releases").glob("*.tar") if path.stem != site.current().release)
        for when, path in enumerate([*releases, site.tar(name)]):
            os.utime(path, (1e9 + when, 1e9 + when))
        data = json.loads((chroot / "current.json").read_text())
        (chroot / "current.json").write_text(json.dumps({k: v for k, v in data.items() if k != "revision"}))
    shutil.rmtree(site.chroots / ".store")
    (site.chroots / ".copies").mkdir()
    (site.chroots / ".lock").chmod(0o644)
    before = site.current()
    assert site.publish().out == "2 hosts: 0 published, 2 unchanged, 0 failed\n"
    assert site.current() == before
    assert not (site.chroots / ".copies").exists() and stat.S_IMODE((site.chroots / ".lock").stat().st_mode) == 0o600
    after = snapshot(site.chroots / "a")
    site.publish()
    assert snapshot(site.chroots / "a") == after
    (host / "configuration.nix").write_text("{ } # new\n")
    site.publish()
    for name in "ab":
        check_tidy(site.chroots / name, {site.current(name).release, before.release, releases[-1].stem})
    assert len(inodes(site, ".tar", "a", "b")) == 1


def test_which_hosts_ran_a_commit_on_a_day(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the fleet, with the commit, and by whom; NAME may be a pattern."""
    monkeypatch.setenv("SUDO_USER", "alice")
    for name in ("desk-1", "desk-2", "nas"):
        site.host(name, {"configuration.nix": f"{{ }} # {name}\n"})
    site.publish("--revision", "1a2b3c4 a certificate")
    for name in ("desk-1", "nas"):
        log = f"20201123T101501Z_{site.current(name).release[:12]}_ok.log"
        (site.chroots / name / "logs" / log).write_text("ok\n")
    lines = site.run("log", "--list").out.splitlines()
    assert len(lines) == 5 and sum(line.endswith("published  1a2b3c4 a certificate  by alice") for line in lines) == 3
    ok = [cells for line in lines if (cells := re.split("  +", line))[3] == "ok"]
    assert sorted((cells[1], cells[2]) for cells in ok) == [
        (name, f"{site.current(name).release[:12]} 1a2b3c4") for name in ("desk-1", "nas")
    ]
    assert site.run("log", "desk-*", "--list").out.count("desk-") == 3
    assert site.run("log", "desk-*").code == 2
    one, two = (re.sub(r"\d+s", "Ns", site.run("status", *names).out) for names in (["desk-[12]"], ["desk-1", "desk-2"]))
    assert one == two
    ran = site.run("populate", "dessk-1")
    assert ran.code == 2 and "dessk-1: no such host: there is no " in ran.err and "(did you mean desk-1?)" in ran.err
