"""Publication: what is touched, in which order, whose it is afterwards."""

import grp
import hashlib
import io
import itertools
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fleet import (
    CONFIGURATION,
    NOT_ROOT,
    NOW_S,
    REPO,
    Site,
    check_archive,
    check_chroot,
    check_tidy,
    key,
    sha256sum,
    snapshot,
)
from toynixos import TOY, _missing, need_sftp, write_config

import bento
import bento_client as client

# --- publication ---


def test_an_unchanged_host_is_not_touched(site: Site) -> None:
    site.host("a")
    site.host("b")
    site.publish()
    site.write_report("a")
    (site.fleet / "hosts/b/configuration.nix").write_text("{ } # changed\n")
    before = snapshot(site.chroots / "a")
    time.sleep(0.02)
    assert site.publish().out.splitlines()[-1] == "2 hosts: 1 published, 1 unchanged, 0 failed"
    assert snapshot(site.chroots / "a") == before
    before |= snapshot(site.chroots / "b")
    time.sleep(0.02)
    assert site.publish().out == "2 hosts: 0 published, 2 unchanged, 0 failed\n"
    assert snapshot(site.chroots / "a") | snapshot(site.chroots / "b") == before
    ran = site.run("-v", "populate", "a")
    assert ran.out == f"a: unchanged, {site.current().release[:12]}\n1 host: 0 published, 1 unchanged, 0 failed\n"


def test_single_hosts_are_published_alone(site: Site) -> None:
    for name in ("a", "b", "c"):
        site.host(name)
    site.publish("a", "c")
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a", "c"}
    ran = site.run("populate", "a", "nobody")
    assert ran.code == 2
    assert ran.err == (
        f"bento: error: nobody: no such host: there is no {site.fleet}/hosts/nobody; 'bento.py add' makes one\n"
    )


class Reader(threading.Thread):
    """A host that polls: current.json, then the release it names, through the real sftp."""

    def __init__(self, chroot: Path, work: Path) -> None:
        super().__init__(daemon=True)
        work.mkdir()
        self.work, self.enough = work, threading.Event()
        self.seen: list[str] = []
        self.gone = 0
        self.problems: list[str] = []
        self.process = subprocess.Popen(
            [TOY / "sftp", "-q", "-b", "-", "host@server"], cwd=work, env=os.environ | {"TOY_CHROOT": str(chroot)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def get(self, remote: str, local: str) -> bytes | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        (self.work / local).unlink(missing_ok=True)
        self.process.stdin.write(f"-get {remote} {local}\nlpwd\n".encode())
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(b"Local working directory:"):
                break
        return (self.work / local).read_bytes() if (self.work / local).exists() else None

    def run(self) -> None:
        while not self.enough.is_set():
            raw = self.get("current.json", "current.json")
            if raw is None:
                self.problems.append("no current.json")
                continue
            current = client.parse_current(raw, "current.json", "a")
            tar = self.get(f"releases/{current.release}.tar", "tar")
            if tar is None:
                # Only if the reader was so slow that it is not among the last three any more.
                later = client.parse_current(self.get("current.json", "current.json") or b"", "current.json", "a")
                if client.parse_time(later.published) < client.parse_time(current.published) + bento.KEEP_RELEASES:
                    self.problems.append(f"{current.release} is announced, and gone")
                self.gone += 1
            elif hashlib.sha256(tar).hexdigest() != current.release or len(tar) != current.size:
                self.problems.append(f"{current.release} is not what it should be")
            else:
                self.seen.append(current.release)

    def stop(self) -> None:
        self.enough.set()
        self.join(10)
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0
        assert not self.is_alive()


def test_a_reader_never_gets_a_mixture(site: Site) -> None:
    need_sftp()
    directory = site.host("a", CONFIGURATION | {"a": "", "z": b"z" * 200_000})
    site.publish()
    published = [site.current().release]
    reader = Reader(site.chroots / "a", site.top / "reader")
    reader.start()
    for number in range(200):
        (directory / "a").write_text(f"generation {number} {'x' * number}")
        site.publish()
        published.append(site.current().release)
        time.sleep(0.005 * (number % 3))
    deadline = time.monotonic() + 10
    while published[-1] not in reader.seen and time.monotonic() < deadline:
        time.sleep(0.02)
    reader.stop()
    assert reader.problems == []
    assert len(set(published)) == 201
    # It saw many of them, in the order in which they were published, and the last.
    order = [published.index(release) for release in reader.seen]
    assert order == sorted(order)
    assert len(set(order)) >= 20
    assert order[-1] == 200


def test_the_current_release_and_two_before_are_kept(site: Site) -> None:
    releases = []
    for number in range(6):
        site.host("a", {"configuration.nix": f"{{ }} # {number}\n"})
        site.publish()
        releases.append(site.current().release)
        check_tidy(site.chroots / "a", set(releases[-3:]))
    for release in releases[-3:]:
        tar = site.chroots / "a/releases" / f"{release}.tar"
        assert sha256sum(tar) == release
        check_archive(tar)


def test_older_content_again(site: Site) -> None:
    releases: list[str] = []
    for content in ("1", "2", "3", "1", "3", "4"):
        site.host("a", {"configuration.nix": f"{{ }} # {content}\n"})
        before = site.current().published if releases else ""
        site.publish()
        assert check_chroot(site.chroots / "a")
        assert site.current().published > before
        releases.append(site.current().release)
    assert releases[3] == releases[0] and releases[4] == releases[2]
    # The ones before the current one are 3 and 1, not 2.
    check_tidy(site.chroots / "a", {releases[5], releases[4], releases[3]})


def test_a_clock_that_goes_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [NOW_S, NOW_S + 3600, NOW_S - 86400, NOW_S - 86400, NOW_S + 10, NOW_S + 3600]
    releases: list[str] = []
    published: list[float] = []
    for number, now_s in enumerate(clock):
        monkeypatch.setattr(time, "time", lambda now_s=now_s: now_s)
        site.host("a", {"configuration.nix": f"{{ }} # {number}\n"})
        site.publish()
        releases.append(site.current().release)
        published.append(client.parse_time(site.current().published))
        check_tidy(site.chroots / "a", set(releases[-3:]))
    assert published == [NOW_S, NOW_S + 3600, NOW_S + 3601, NOW_S + 3602, NOW_S + 3603, NOW_S + 3604]


@pytest.mark.parametrize("damage", ["tar gone", "tar short", "json cut", "json of another", "json newer"])
def test_damage_is_mended(damage: str, site: Site) -> None:
    site.host("a")
    site.publish()
    current, tar = site.current(), site.tar()
    path = site.chroots / "a/current.json"
    match damage:
        case "tar gone":
            tar.unlink()
        case "tar short":
            os.truncate(tar, 100)
        case "json cut":
            os.truncate(path, 10)
        case "json of another":
            path.write_text(path.read_text().replace('"a"', '"b"'))
        case "json newer":
            path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    ran = site.run("populate")
    assert ran.code == 0
    assert len(ran.errors) == ("json" in damage)
    assert all(line.startswith(f"a: {path}: ") and line.endswith(": published anew") for line in ran.errors)
    assert check_chroot(site.chroots / "a") == current.release
    check_tidy(site.chroots / "a", {current.release})


def test_one_populate_at_a_time(site: Site) -> None:
    site.host("a")
    with bento.populate_lock(bento.Fleet(site.fleet, site.chroots)):
        ran = site.run("populate")
        assert ran.code == 1
        assert ran.errors == [
            f"bento: error: another populate is at work in {site.chroots}: wait for its end, or give --wait"
        ]
        assert set(os.listdir(site.chroots)) == {".lock"}
    site.publish()


def test_a_dry_run_changes_nothing(site: Site) -> None:
    site.host("a")
    site.host("gone")
    assert site.publish("--dry-run").out.splitlines()[-1] == "2 hosts: 2 would be published, 0 unchanged, 0 failed"
    assert not site.chroots.exists()
    site.publish()
    shutil.rmtree(site.fleet / "hosts/gone")
    directory = site.host("a", {"configuration.nix": "{ } # new\n"})
    (site.chroots / "a/releases/.new").mkdir()
    before = snapshot(site.chroots)
    fleet = bento.Fleet(site.fleet, site.chroots)
    with closing(fleet.source):
        release, size = bento.write_release(fleet.source, bento.list_members(fleet, "a")[0])
    assert site.publish("--dry-run", "--prune").out == (
        f"gone: would remove {site.chroots}/gone\n"
        f"a: would publish {release[:12]} ({size} bytes)\n"
        "1 host: 1 would be published, 0 unchanged, 0 failed\n"
    )
    (directory / "x").symlink_to("x")
    ran = site.run("populate", "--dry-run")
    assert (ran.code, ran.errors) == (1, ["bento: error: a: hosts/a/x: link loop"])
    assert snapshot(site.chroots) == before


# --- owners and modes ---


def test_owners_and_modes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if os.geteuid() != 0:
        _missing("needs root to give files away")

    @dataclass
    class Account:
        pw_uid: int = 41234
        gr_gid: int = 51234

    asked: list[str] = []

    def look_up(name: str) -> Account:
        asked.append(name)
        return Account()

    monkeypatch.setattr(pwd, "getpwnam", look_up)
    monkeypatch.setattr(grp, "getgrnam", look_up)
    directory = site.host("t470", {"configuration.nix": "{ }\n", "d/script": "#!/bin/sh\n"})
    (directory / "d/script").chmod(0o700)
    os.umask(0o077)
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [])
    assert asked == ["bento-t470", "bento"]
    release = site.current("t470").release
    expected = {
        ".": (0, 0, 0o755), "t470": (0, 51234, 0o750), "t470/current.json": (0, 0, 0o644),
        "t470/history": (0, 0, 0o644),
        "t470/releases": (0, 0, 0o755), f"t470/releases/{release}.tar": (0, 0, 0o644),
        "t470/logs": (41234, 51234, 0o750),
    }  # fmt: skip

    def found() -> dict[str, tuple[int, int, int]]:
        stats = {name: (site.chroots / name).lstat() for name in expected}
        return {name: (s.st_uid, s.st_gid, s.st_mode & 0o7777) for name, s in stats.items()}

    assert found() == expected
    # What somebody changed by hand is put right, also where nothing is published.
    os.chown(site.chroots / "t470/logs", 0, 0)
    (site.chroots / "t470").chmod(0o777)
    assert site.run("populate").out == "1 host: 0 published, 1 unchanged, 0 failed\n"
    assert found() == expected


def test_a_missing_account(real_root: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    site.host("no-such-account")
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (
        1,
        [
            "bento: error: no-such-account: it has no account here, for it has no key: there is no"
            " hosts/no-such-account.pub: 'bento.py add no-such-account --key FILE' makes one"
        ],
    )
    (site.fleet / "hosts/no-such-account.pub").write_text(key("a"))
    ran = site.run("populate")
    assert ran.code == 1
    assert ran.errors == [
        "bento: error: no-such-account: the account or group 'bento-no-such-account' does not exist here: run 'bento.py fleet',"
        " include fleet.nix in this server's configuration and switch to it"
    ]
    assert set(os.listdir(site.chroots)) == {".lock", ".rollout.json"}


def test_as_another_user(tmp_path: Path) -> None:
    """The whole of it without root's rights: in a process that gave them up."""
    if os.geteuid() != 0:
        _missing("needs root to become another user")
    code = (
        "import os, sys, bento, tarfile, tempfile, encodings.idna; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "top = sys.argv[1]; os.makedirs(top + '/hosts/a'); open(top + '/hosts/a/flake.nix', 'w').close()\n"
        "arguments = ['--fleet', top, '--chroot-dir', top + '.chroot']\n"
        "sys.exit(bento.main([*arguments, 'populate']) or bento.main([*arguments, 'status']))"
    )
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o777)
        done = subprocess.run(
            [sys.executable, "-c", code, f"{top}/fleet"], cwd="/", env=os.environ | {"PYTHONPATH": str(REPO)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        said = f"{NOT_ROOT}\n{top}/fleet: no Git here: what lies there is published, 1 file\n"
        assert (done.returncode, done.stderr) == (0, said)
        release = check_chroot(Path(top, "fleet.chroot/a"))
        assert done.stdout.splitlines()[0].startswith(f"a: published {release[:12]} (")
        assert (Path(top) / "fleet.chroot/a/logs").stat().st_uid == 65534


@pytest.mark.parametrize("step", ["examine", "place", "reveal"])
def test_an_error_of_bentos_own_stops_one_host(step: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        site.host(name)
    real = getattr(bento, step)

    def broken(*arguments: Any) -> Any:
        if any(getattr(each, "name", each) == "b" for each in arguments):
            raise ZeroDivisionError("by chance")
        return real(*arguments)

    monkeypatch.setattr(bento, step, broken)
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (
        1, ["bento: error: b: ZeroDivisionError: by chance (this is an error in Bento: -v shows where)"],
    )  # fmt: skip
    assert ran.out.splitlines()[-1] == "3 hosts: 2 published, 0 unchanged, 1 failed"
    ran = site.run("-v", "populate")
    assert "Traceback (most recent call last)" in ran.err and "in broken" in ran.err
    monkeypatch.undo()


def test_a_clock_at_the_end_of_time(site: Site) -> None:
    host = site.host("a")
    site.publish()
    data = json.loads((site.chroots / "a/current.json").read_text())
    (site.chroots / "a/current.json").write_text(json.dumps(data | {"published": "9999-12-31T23:59:59Z"}))
    (host / "configuration.nix").write_text("{ } # new\n")
    site.publish()
    assert site.current().published == "9999-12-31T23:59:59Z" and site.current().release != data["release"]
    assert site.run("status").code == 0


@pytest.mark.parametrize("words", [(), ("--check",), ("--check", "-j", "2")])
def test_how_many_are_done_is_told_on_a_terminal(
    words: tuple[str, ...], site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else: cron mails what is on stderr."""
    for number in range(6):
        write_config(site.fleet / f"hosts/h{number}", flake=True, host=f"h{number}", client=None)
    clock = itertools.count(100.0, 0.6)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        patched.setattr(time, "monotonic", lambda: next(clock))
        assert site.run("populate", *words).code == 0
    told = re.findall(r"(\d) of 6 hosts\nh\d: (?:publishing|checking|reading)", terminal.getvalue())
    assert len(told) >= 3 and sorted(told) == told and told[-1] in "45", terminal.getvalue()
    assert "of 6 hosts" not in site.publish("--again").err
