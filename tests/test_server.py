"""The server: releases, what is refused, publication, checks and builds, fleet.nix, status, and hostile logs."""

import base64
import errno
import grp
import hashlib
import html
import io
import itertools
import json
import os
import pty
import pwd
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toynixos import TOY, _missing, latin_1, need, need_nix, need_root, write_config

import bento
import bento_client as client
from bento_client import BentoError, Current, Last, Phase, Report, Result

REPO = Path(bento.__file__).resolve().parent
# Example keys: 32 bytes of text where a key would be. Nobody has the other half.
KEY_HEAD = b"\0\0\0\x0bssh-ed25519\0\0\0\x20"
# What the tests do as root is done as anybody else would: root would be asked for the hosts' accounts.
AS_ANYBODY = "import os, sys; os.geteuid = lambda: 1000; import bento; sys.exit(bento.main())"
NOT_ROOT = "not root: files keep their owner; sshd serves them only when root publishes"
NOW_S = 1_800_000_000.0
CONFIGURATION: dict[str, str | bytes] = {"configuration.nix": "{ }\n"}


def key(name: str, comment: str = "") -> str:
    blob = base64.b64encode(KEY_HEAD + f"EXAMPLE OF {name}".ljust(32, ".")[:32].encode()).decode()
    return f"ssh-ed25519 {blob} {comment}".strip()


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr, without the one that is there whenever we are not root."""
        return [line for line in self.err.splitlines() if line != NOT_ROOT]


class Site:
    """A fleet directory and a chroot directory, and bento.py at work on them in this process."""

    def __init__(self, top: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.top, self.fleet, self.chroots = top, top / "fleet", top / "chroot"
        self.capsys = capsys
        (self.fleet / "hosts").mkdir(parents=True)

    def host(self, name: str, files: Mapping[str, str | bytes] = CONFIGURATION) -> Path:
        directory = self.fleet / "hosts" / name
        for file, content in files.items():
            path = directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return directory

    def argv(self, *arguments: str) -> list[str]:
        return ["--fleet", str(self.fleet), "--chroot-dir", str(self.chroots), *arguments]

    def run(self, *arguments: str) -> Ran:
        self.capsys.readouterr()
        try:
            code = bento.main(self.argv(*arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capsys.readouterr()
        return Ran(code, out, err)

    def publish(self, *arguments: str) -> Ran:
        ran = self.run("populate", *arguments)
        assert (ran.code, ran.errors) == (0, []), ran.err
        return ran

    def current(self, name: str = "a") -> Current:
        return client.parse_current((self.chroots / name / "current.json").read_bytes(), "current.json", name)

    def tar(self, name: str = "a") -> Path:
        return self.chroots / name / "releases" / f"{self.current(name).release}.tar"

    def write_report(self, name: str = "a", **changes: Any) -> Path:
        logs = self.chroots / name / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        path = logs / "status.json"
        polled = client.format_time(time.time())
        path.write_text(json.dumps(report_data(host=name, polled=polled) | changes))
        return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "sync", lambda: None)  # of all the disks of this machine, hundreds of times
    umask = os.umask(0o022)
    yield Site(tmp_path, capsys)
    os.umask(umask)


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy nixos-rebuild on PATH, without Nix; returns its store."""
    monkeypatch.setenv("PATH", f"{TOY}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TOY_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TOY_MODE", "simulated")
    return tmp_path / "store"


def attempts(ran: Ran) -> list[str]:
    """Of `log --list`, without what was published."""
    return [line for line in ran.out.splitlines() if not re.search(r"^\S+  \S+  published", line)]


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def report_data(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1, "host": "a", "client": client.VERSION, "polled": "2026-11-23T10:15:02Z", "phase": "idle",
        "release": None, "system": "/nix/store/x", "needs_reboot": False, "last": None,
    } | changes  # fmt: skip


def last_data(release: str | None, result: str = "ok", reason: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "release": release, "result": result, "reason": reason, "system": "/nix/store/x", "attempt": 1,
        "started": "2026-11-23T10:14:02Z", "finished": "2026-11-23T10:15:02Z",
        "log": "20261123T101502Z_9f3a61c07be4_ok.log",
    } | changes  # fmt: skip


def snapshot(directory: Path) -> dict[str, tuple[int, ...]]:
    """Everything below a directory that changes when something is touched, replaced or given to somebody."""
    found: dict[str, tuple[int, ...]] = {}
    for parent, names, files in os.walk(directory):
        for name in ["", *names, *files]:
            path = os.path.join(parent, name)
            s = os.lstat(path)
            found[path] = (s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_mode, s.st_uid, s.st_gid)
    return found


def sha256sum(path: Path) -> str:
    return subprocess.run([need("sha256sum"), path], check=True, capture_output=True, text=True).stdout.split()[0]


def check_chroot(chroot: Path, known: set[str] | None = None) -> str:
    """Asserts that what is published there is whole; its release."""
    current = client.parse_current((chroot / "current.json").read_bytes(), "current.json", chroot.name)
    tar = chroot / "releases" / f"{current.release}.tar"
    assert hashlib.sha256(tar.read_bytes()).hexdigest() == current.release
    assert tar.stat().st_size == current.size
    check_tree(tar, chroot / "releases" / current.release)
    assert known is None or current.release in known
    return current.release


def check_tree(tar: Path, tree: Path) -> None:
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
        for member in members:
            assert (tree / member.name).is_dir() if member.isdir() else (tree / member.name).is_file()
            if member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                assert content.read() == (tree / member.name).read_bytes()
    assert sorted(m.name for m in members) == sorted(str(p.relative_to(tree)) for p in tree.rglob("*"))


def check_tidy(chroot: Path, releases: set[str]) -> None:
    """Asserts that there is nothing in a chroot but what has to be."""
    assert set(os.listdir(chroot)) == {"current.json", "config", "releases", "history", "logs"}
    assert set(os.listdir(chroot / "releases")) == releases | {f"{release}.tar" for release in releases}
    current = json.loads((chroot / "current.json").read_bytes())["release"]
    assert os.readlink(chroot / "config") == f"releases/{current}"


# --- releases ---


def test_a_release_is_named_by_its_sha256(site: Site) -> None:
    site.host("a", {"configuration.nix": "{ }\n", "files/x": b"\0" * 70_000})
    ran = site.publish()
    current = site.current()
    assert sha256sum(site.tar()) == current.release
    assert site.tar().stat().st_size == current.size
    assert ran.out == (
        f"a: published {current.release[:12]} ({current.size} bytes)\n1 host: 1 published, 0 unchanged, 0 failed\n"
    )
    assert ran.err == f"{NOT_ROOT}\n"
    assert os.readlink(site.chroots / "a/config") == f"releases/{current.release}"
    assert (site.chroots / "a/config/files/x").read_bytes() == b"\0" * 70_000


def test_the_format_of_a_release_does_not_drift(site: Site) -> None:
    """Every host would take another id for a new release. If this is wanted, it is a new format."""
    directory = site.host("a", {"flake.nix": "{ }\n", "d/é": "x", "n" * 200: "long\n", "empty": ""})
    (directory / "d/run").write_text("#!/bin/sh\n")
    (directory / "d/run").chmod(0o700)
    (directory / "nothing").mkdir()
    site.publish()
    assert site.current().release == "04eddbf42ff5e49d59d06bd08ee1ac7322aeaaa7907c187a965b915ce2f15648"


def rebuild_elsewhere(top: Path, environment: dict[str, str], umask: int, python: str = sys.executable) -> str:
    """A checkout of the same fleet at `top`, published by a process of its own; the id of its release."""
    before = os.umask(umask)
    try:
        hosts = top / "fleet/hosts"
        (hosts / "a/sub").mkdir(parents=True)
        (hosts / "a/configuration.nix").write_text("{ }\n")
        (hosts / "a/sub/script").write_text("#!/bin/sh\n")
        (hosts / "a/sub/script").chmod(0o777 & ~umask)
        (top / "fleet/utils").mkdir()
        (top / "fleet/utils/bento.nix").write_text("{ }\n")
        (hosts / "a/utils").symlink_to("../../utils")
        argv = [python, "-c", AS_ANYBODY, "--fleet", f"{top}/fleet", "--chroot-dir", f"{top}/chroot", "populate"]
        subprocess.run(
            argv, check=True, env=os.environ | {"PYTHONPATH": str(REPO)} | environment, capture_output=True, cwd=top
        )
    finally:
        os.umask(before)
    release: str = json.loads((top / "chroot/a/current.json").read_bytes())["release"]
    return release


def test_the_same_content_is_the_same_release_everywhere(tmp_path: Path) -> None:
    places: list[tuple[str, dict[str, str], int]] = [
        ("one", {}, 0o022),
        ("another/place with spaces", {}, 0o022),
        ("three", {"TZ": "Asia/Tokyo", "LC_ALL": "C"}, 0o077),
        ("four", {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"}, 0o000),
    ]
    ids = set()
    for place, environment, umask in places:
        top = tmp_path / place
        top.mkdir(parents=True)
        ids.add(rebuild_elsewhere(top, environment, umask))
    if os.access("/usr/bin/python3", os.X_OK):
        (tmp_path / "five").mkdir()
        ids.add(rebuild_elsewhere(tmp_path / "five", {}, 0o022, "/usr/bin/python3"))
    assert len(ids) == 1


def test_another_clock_makes_no_other_release(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = site.host("a")
    site.publish()
    first = site.current()
    shutil.rmtree(site.chroots)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    os.utime(directory / "configuration.nix", (1e9, 1e9))
    site.publish()
    assert site.current().release == first.release
    assert site.current().published == "2001-09-09T01:46:40Z"


def test_only_content_names_and_executable_bits_count(site: Site) -> None:
    directory = site.host("a", {"configuration.nix": "{ }\n", "script": "#!/bin/sh\n"})
    site.publish()
    seen = [site.current().release]

    def publish() -> bool:
        site.publish()
        release = site.current().release
        new = release not in seen
        seen.append(release)
        return new

    os.utime(directory / "script")
    assert not publish()
    (directory / "script").chmod(0o600)
    assert not publish()
    (directory / "script").chmod(0o700)
    assert publish()
    (directory / "script").chmod(0o755)
    assert not publish()
    (directory / "script").write_text("#!/bin/sH\n")
    assert publish()
    (directory / "script").rename(directory / "script2")
    assert publish()
    (directory / "empty").mkdir()
    assert publish()
    (directory / "empty").rmdir()
    assert not publish()


STRANGE = [
    "with space", "-rf", "*", "[a]?", "it's \"quoted\"", "new\nline", "back\\slash", "ä ö ü ß 日本 🍱", "#comment", "$HOME",
    "n" * 101, "n" * 255, "/".join(["deep" * 20] * 5) + "/file", "é" * 127,
]  # fmt: skip


def test_gnu_tar_and_tarfile_read_every_name(site: Site, tmp_path: Path) -> None:
    contents = {name: f"content of {name}\n" for name in STRANGE}
    directory = site.host("a", {**CONFIGURATION, **contents, "empty file": ""})
    (directory / "empty directory").mkdir()
    site.publish()
    with tarfile.open(site.tar()) as archive:
        names = archive.getnames()
        assert names == sorted(names, key=os.fsencode)
        for member in archive:
            assert member.mtime == 1
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            assert member.mode == (0o755 if member.isdir() else 0o644)
    target = tmp_path / "unpacked"
    target.mkdir()
    subprocess.run([need("tar"), "-xf", site.tar(), "-C", target], check=True)
    published = site.chroots / "a/config"
    for place in (target, published):
        for name, content in contents.items():
            assert (place / name).read_text() == content
        assert (place / "empty file").read_bytes() == b""
        assert list((place / "empty directory").iterdir()) == []
        assert {p.relative_to(place) for p in place.rglob("*")} == {p.relative_to(directory) for p in directory.rglob("*")}


RECIPES: dict[str, tuple[str, client.Recipe]] = {
    "nothing said": ("{}", client.Recipe("a")),
    "for all": ('{"attribute": "x.y", "directory": "nix/x/", "options": ["--impure"]}', client.Recipe("x.y", "nix/x", ("--impure",))),
    "for one": ('{"attribute": "all", "options": ["-L"], "hosts": {"a": {"attribute": "web1.example.org"}, "b": {"directory": "d"}}}',
                client.Recipe("web1.example.org", "", ("-L",))),
    "for another": ('{"hosts": {"b": {"attribute": 5}}}', client.Recipe("a")),
    "of next year": ('{"directory": ".", "more": {}}', client.Recipe("a")),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_bento_json(case: str) -> None:
    text, wanted = RECIPES[case]
    assert client.parse_recipe(json.dumps(json.loads(text) | {"format": 1}).encode(), "bento.json", "a") == wanted


@pytest.mark.parametrize(
    "text",
    [
        '{"attribute": "a#b"}', '{"attribute": ""}', '{"attribute": "a\\"b"}', '{"attribute": ["a"]}', '{"directory": ".."}',
        '{"directory": "a/../../b"}', '{"directory": "/etc"}', '{"directory": "a b"}', '{"directory": "a//b"}',
        '{"directory": "a/."}', '{"directory": "a?dir=b"}', '{"options": "--impure"}', '{"options": [1]}',
        '{"options": ["a\\u0000"]}', '{"options": [""]}', '{"hosts": []}', '{"hosts": {"a": "x"}}', '{"format": 2}', '{"format": null}',
    ],
)  # fmt: skip
def test_a_malformed_bento_json(text: str) -> None:
    with pytest.raises(BentoError, match=r"^bento.json: "):
        client.parse_recipe(json.dumps({"format": 1} | json.loads(text)).encode(), "bento.json", "a")


def test_links_become_what_they_lead_to(site: Site) -> None:
    directory = site.host("a", CONFIGURATION | {"real/file": "x\n"})
    (site.fleet / "utils").mkdir()
    (site.fleet / "utils/bento.nix").write_text("{ }\n")
    (site.fleet / "bento_client.py").write_text("client\n")
    (site.fleet / "utils/bento_client.py").symlink_to("../bento_client.py")
    (directory / "utils").symlink_to("../../utils")
    (directory / "again").symlink_to("real")
    (directory / "absolute").symlink_to(directory / "real/file")
    site.publish()
    with tarfile.open(site.tar()) as archive:
        assert {m.name: m.isdir() for m in archive} == {
            "absolute": False, "again": True, "again/file": False, "configuration.nix": False, "real": True,
            "real/file": False, "utils": True, "utils/bento.nix": False, "utils/bento_client.py": False,
        }  # fmt: skip
        assert archive.extractfile("utils/bento_client.py").read() == b"client\n"  # type: ignore[union-attr]


def test_git_and_store_links_are_left_out(site: Site) -> None:
    directory = site.host("a", CONFIGURATION | {".git/HEAD": "ref\n", "sub/.git": "gitdir: x\n", ".gitignore": "x\n"})
    (directory / "result").symlink_to("/nix/store/00000000000000000000000000000000-gone")
    (directory / "result-2").symlink_to("result")
    if Path("/nix/store").is_dir():
        (directory / "result-3").symlink_to(next(Path("/nix/store").iterdir(), Path("/nix/store/x")))
    site.publish()
    with tarfile.open(site.tar()) as archive:
        assert archive.getnames() == [".gitignore", "configuration.nix", "sub"]


def test_a_configuration_that_would_be_left_out_is_none(site: Site, tmp_path: Path) -> None:
    directory = site.host("a", {"other.nix": "{ }\n"})
    (directory / "flake.nix").mkdir()
    (tmp_path / "file").touch()
    added = subprocess.run([need("nix-store"), "--add", tmp_path / "file"], capture_output=True, text=True)
    in_store = added.stdout.strip() or _missing("needs a Nix store that it can write to")
    (directory / "configuration.nix").symlink_to(in_store)
    ran = site.run("populate")
    assert ran.errors == ["bento: error: a: hosts/a: neither flake.nix nor configuration.nix in it"]


def test_the_hosts_own_link_may_leave_the_fleet(site: Site, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere/nixos"
    outside.mkdir(parents=True)
    (outside / "configuration.nix").write_text("{ }\n")
    (outside / "inner").symlink_to("configuration.nix")
    (site.fleet / "utils").mkdir()
    (site.fleet / "utils/bento.nix").write_text("{ }\n")
    (outside / "utils").symlink_to(site.fleet / "utils")
    (site.fleet / "hosts/a").symlink_to(outside)
    (site.fleet / "hosts/b").symlink_to("a")
    site.publish()
    with tarfile.open(site.tar()) as archive:
        assert archive.getnames() == ["configuration.nix", "inner", "utils", "utils/bento.nix"]
    assert site.current("b").release == site.current("a").release
    (outside / "passwd").symlink_to("/etc/passwd")
    ran = site.run("populate", "a")
    assert ran.errors == ["bento: error: a: hosts/a/passwd: link out of the fleet directory, to /etc/passwd"]


def share(site: Site, *names: str) -> Path:
    """Hosts that link to the same utils/, and one more that is a link to the first."""
    utils = site.fleet / "utils"
    (utils / "sub").mkdir(parents=True)
    (utils / "bento.nix").write_text("{ }\n")
    (utils / "sub/script").write_text("#!/bin/sh\n")
    (utils / "sub/script").chmod(0o755)
    for name in names:
        (site.host(name, {"configuration.nix": f"{{ }} # {name}\n"}) / "utils").symlink_to("../../utils")
    for name in ("like-1", "like-2"):
        (site.fleet / "hosts" / name).symlink_to(names[0])
    return utils


def test_what_hosts_share_is_read_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    share(site, "a", "b", "c")
    site.publish()
    read: list[str] = []
    pack = bento.pack

    def watch(member: bento.Member) -> bytes:
        read.append(f"{Path(member.path).relative_to(site.fleet)} as {member.name}")
        return pack(member)

    monkeypatch.setattr(bento, "pack", watch)
    assert site.publish().out == "5 hosts: 0 published, 5 unchanged, 0 failed\n"
    assert sorted(path for path in read if "configuration.nix" in path) == [
        f"hosts/{name}/configuration.nix as configuration.nix" for name in "abc"
    ]
    assert [path for path in read if "bento.nix" in path] == ["utils/bento.nix as utils/bento.nix"]


@pytest.mark.parametrize("room", [0, 1600, 8 << 20])
def test_what_hosts_share_makes_no_other_release(room: int, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bento, "MEMORY_BYTES", room)
    utils = share(site, "a", "b", "c")
    (site.fleet / "hosts/b/again").symlink_to("../../utils/sub")
    (utils / "more").symlink_to("../more")
    (site.fleet / "more").mkdir()
    (site.fleet / "more/large").write_bytes(os.urandom(bento.SMALL_FILE + 1))
    site.publish()
    for name in ("a", "b", "c", "like-1", "like-2"):
        alone = bento.list_members(bento.Fleet(site.fleet, site.chroots), name)
        assert check_chroot(site.chroots / name) == bento.write_release(alone, None)[0]
        tree = site.chroots / name / "config"
        assert (tree / "utils/more/large").read_bytes() == (site.fleet / "more/large").read_bytes()
        assert os.access(tree / "utils/sub/script", os.X_OK)
    assert site.current("like-2").release == site.current("a").release


def inodes(site: Site, name: str, *hosts: str) -> set[int]:
    """What a file of the current releases is on disk."""
    return {(site.chroots / host / "releases" / name.replace("ID", site.current(host).release)).stat().st_ino for host in hosts}


def test_a_release_is_on_disk_once(site: Site) -> None:
    """For whoever has it, in one run or in several."""
    share(site, "a", "b", "c")
    (site.fleet / "hosts/a/big").write_bytes(os.urandom(LARGE))
    site.publish("a")
    site.publish("like-1")
    site.publish()
    part = site.current("like-2").parts[1].sha256
    for name in ("ID.tar", "ID/configuration.nix", "ID/utils/sub/script", "ID/big", f"ID.parts/{part}", "ID/big"):
        assert len(inodes(site, name, "a", "like-1", "like-2")) == 1
    assert inodes(site, "ID/big", "a") == inodes(site, f"ID.parts/{part}", "a")
    assert len(inodes(site, "ID.tar", "a", "b", "c")) == 3
    store = site.chroots / ".store"
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    current = [site.current(name).release for name in "abc"]
    assert {name.partition(".")[0] for name in os.listdir(store)} == set(current)
    assert (store / f"{current[0]}.tar").stat().st_nlink == 4
    for name in ("a", "b", "c", "like-1", "like-2"):
        check_chroot(site.chroots / name)


def test_the_store_keeps_what_is_used(site: Site) -> None:
    """And nothing else: not what the last host that had it has lost, nor what a kill has left."""
    directory = site.host("a")
    (site.fleet / "hosts/b").symlink_to("a")
    releases = []
    for number in range(5):
        (directory / "configuration.nix").write_text(f"{{ }} # {number}\n")
        site.publish(*(["a"] if number < 4 else []))
        releases.append(site.current().release)
    store = site.chroots / ".store"
    for left in (f"{'0' * 64}.tar", f"{'1' * 64}.json", ".new/aside/tree/x", ".build-a/config/x"):
        (store / left).parent.mkdir(parents=True, exist_ok=True)
        (store / left).write_text("left\n")
    (store / ("2" * 64)).mkdir()
    site.publish()
    kept = releases[2:]
    assert set(os.listdir(store)) == {f"{r}{ending}" for r in kept for ending in ("", ".tar", ".json")}
    shutil.rmtree(site.fleet / "hosts/a")
    (site.fleet / "hosts/b").unlink()
    site.host("c")
    site.publish("--prune")
    assert {name.partition(".")[0] for name in os.listdir(store)} == {site.current("c").release}


def test_what_is_damaged_in_the_store_is_not_shared(site: Site) -> None:
    site.host("a")
    site.publish()
    with open(site.tar(), "r+b") as file:
        file.write(b"x")
    (site.fleet / "hosts/b").symlink_to("a")
    site.publish()
    check_chroot(site.chroots / "b")


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EXDEV])
def test_where_links_cannot_be_made_each_host_has_its_own(
    number: int, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has as many links as it can have, or a chroot is a file system of its own."""
    share(site, "a", "b", "c")
    link, made = os.link, 0

    def few(source: str, target: str) -> None:
        nonlocal made
        made += 1
        if made > 5:
            raise OSError(number, os.strerror(number), source)
        link(source, target)

    monkeypatch.setattr(os, "link", few)
    site.publish()
    assert len(inodes(site, "ID/utils/bento.nix", "a", "like-1", "like-2")) > 1
    for name in ("a", "b", "c", "like-1", "like-2"):
        check_chroot(site.chroots / name)
        assert (site.chroots / name / "config/utils/bento.nix").stat().st_mtime == 1
        assert os.access(site.chroots / name / "config/utils/sub/script", os.X_OK)
    assert site.publish().out == "5 hosts: 0 published, 5 unchanged, 0 failed\n"


def test_half_a_file_is_no_copy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of a file that hosts share; then there is room again."""
    share(site, "a", "b", "c")
    write, full = os.write, True

    def half(descriptor: int, data: bytes) -> int:
        nonlocal full
        if full and data == b"#!/bin/sh\n":
            full = False
            write(descriptor, data[:3])
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", half)
    assert site.run("populate").errors == ["bento: error: a: [Errno 28] No space left on device"]
    for name in ("b", "c", "like-1", "like-2"):
        check_chroot(site.chroots / name)


@pytest.mark.parametrize("how", ["check", "build", "populate --check", "populate --build"])
def test_what_is_built_may_change_its_lock(
    how: str, site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Nix does, in place, and where there is none: it gets into nobody's release, in one build after the other."""
    write_config(site.fleet / "all", flake=True, host={"a": {}, "b": {}, "c": {}})
    (site.fleet / "all/flake.lock").write_text("{}\n")
    (site.fleet / "all/sub").mkdir()
    for name in "abc":
        (site.fleet / "hosts" / name).symlink_to("../all")
    site.publish("a")
    (site.fleet / "all/new").write_text("new\n")
    write_program(
        site.top / "bin/nixos-rebuild",
        'tree=${3%#*}; tree=${tree#path:}\n[ "$(cat "$tree/flake.lock")" = "{}" ] && [ ! -e "$tree/sub/flake.lock" ] || exit 9\n'
        'echo >"$tree/flake.lock"; echo >"$tree/sub/flake.lock"\n'
        f'exec {TOY}/nixos-rebuild "$@"\n',
    )
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    assert site.run(*how.split(), "-j", "3").code == 0
    for name in "abc" if "populate" in how else "a":
        check_chroot(site.chroots / name)
        assert (site.chroots / name / "config/flake.lock").read_text() == "{}\n"
    if "populate" in how:
        assert len(inodes(site, "ID/flake.lock", "a", "b", "c")) == 1
        assert {name for name in os.listdir(site.chroots / ".store") if name.startswith(".")} <= {".new"}


def test_a_loop_through_what_hosts_share(site: Site) -> None:
    share(site, "a", "b")
    (site.fleet / "utils/deep").symlink_to("../hosts/b")
    site.host("c")
    (site.fleet / "hosts/c/b").symlink_to("../b")
    loop = "link loop: it leads to a directory that it is in"
    ran = site.run("populate")
    assert ran.errors == [
        f"bento: error: 3 hosts (a, like-1, like-2): hosts/b/utils: {loop}",
        f"bento: error: 2 hosts (b, c): utils/deep: {loop}",
    ]


def test_a_link_that_only_one_host_may_have_is_not_shared(site: Site, tmp_path: Path) -> None:
    """The host that is a link out of the fleet comes first, and a shared link leads to its directory."""
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "configuration.nix").write_text("{ }\n")
    (outside / "utils").symlink_to(site.fleet / "utils")
    (site.fleet / "hosts/0").symlink_to(outside)
    utils = share(site, "a")
    (utils / "sub/own").symlink_to(outside / "configuration.nix")
    ran = site.run("populate")
    words = f"utils/sub/own: link out of the fleet directory, to {outside}/configuration.nix"
    assert ran.errors == [f"bento: error: 3 hosts (a, like-1, like-2): {words}"]
    check_chroot(site.chroots / "0")


def test_a_directory_that_only_one_host_may_link_to_is_not_shared(site: Site, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    (outside / "own").mkdir(parents=True)
    (outside / "own/secret").write_text("not for others\n")
    (outside / "configuration.nix").write_text("{ }\n")
    (outside / "linked").symlink_to(outside / "own")
    (site.fleet / "hosts/0").symlink_to(outside)
    (site.host("a", {"configuration.nix": "{ }\n"}) / "linked").symlink_to(outside / "own")
    ran = site.run("populate")
    assert ran.errors == [f"bento: error: a: hosts/a/linked: link out of the fleet directory, to {outside}/own"]
    check_chroot(site.chroots / "0")


@pytest.mark.parametrize("size", [3, 5, bento.SMALL_FILE + 2])
def test_a_shared_file_that_changes_in_the_middle_of_a_run(
    size: int, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each release is whole and named by what is in it. The next run publishes what came too late."""
    utils = share(site, "a", "b", "c")
    before, after = b"x" * max(3, size - 1), b"y" * size
    (utils / "file").write_bytes(before)
    place = bento.place

    def change(*arguments: Any) -> Current:
        found = place(*arguments)
        (utils / "file").write_bytes(after)
        return found

    monkeypatch.setattr(bento, "place", change)
    ran = site.run("populate")
    late = [name for name in ("a", "b", "c", "like-1", "like-2") if not (site.chroots / name / "current.json").exists()]
    # What was too large to be kept was read again. One host met the change, the ones behind it have the new file.
    assert late == (["b"] if size > bento.SMALL_FILE else [])
    assert ran.errors == [f"bento: error: b: {utils}/file: changed while it was read: run this again" for _ in late]
    for name in {"a", "b", "c", "like-1", "like-2"} - set(late):
        check_chroot(site.chroots / name)
        assert (site.chroots / name / "config/utils/file").read_bytes() in (before, after)
    assert site.publish().out.splitlines()[-1].endswith(", 0 failed")
    for name in ("a", "b", "c", "like-1", "like-2"):
        assert (site.chroots / name / "config/utils/file").read_bytes() == after
    assert site.publish().out == "5 hosts: 0 published, 5 unchanged, 0 failed\n"


def test_a_large_file_that_changes_before_it_is_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same size: the release is what was written, for all that share it, and is written once."""
    monkeypatch.setattr(bento, "MEMORY_BYTES", 0)
    big = site.host("a", CONFIGURATION | {"big": b"x" * LARGE}) / "big"
    for name in "bcd":
        (site.fleet / "hosts" / name).symlink_to("a")
    written = []
    write = bento.Store.write

    def change(*arguments: Any) -> bento.Release:
        big.write_bytes(b"y" * LARGE)
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(bento.Store, "write", change)
    site.publish("b", "c", "d")
    assert [release.id for release in written] == [site.current(name).release for name in "b"]
    for name in "bcd":
        assert check_chroot(site.chroots / name) == site.current("b").release
        assert (site.chroots / name / "config/big").read_bytes() == b"y" * LARGE


# --- what is refused ---


def bind_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def out_of_fleet(directory: Path) -> None:
    (directory.parents[2] / "secret").write_text("x")
    (directory / "sub").mkdir()
    (directory / "sub/secret").symlink_to("../../../../secret")


def link_many(directory: Path) -> None:
    for number in range(7):
        (directory / f"x{number}").symlink_to("g\x1b")


def link_to_fifo(directory: Path) -> None:
    os.mkfifo(directory.parents[1] / "f")
    (directory / "x").symlink_to("../../f")


def replace_by_link(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.symlink_to("gone")


def climb(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "sub/up").symlink_to("..")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "link to itself": (lambda d: (d / "x").symlink_to("x"), "hosts/bad/x: link loop (Too many levels of symbolic links)"),
    "link upwards": (climb, "hosts/bad/sub/up: link loop: it leads to a directory that it is in"),
    "link out": (out_of_fleet, "hosts/bad/sub/secret: link out of the fleet directory, to @TOP@/secret"),
    "name that is not UTF-8": (
        lambda d: Path(os.fsdecode(os.fsencode(d) + b"/\xff\n")).write_text("x"),
        "'hosts/bad/\\udcff\\n': the name is not UTF-8: rename it",
    ),
    "no configuration": (
        lambda d: (d / "configuration.nix").rename(d / "x.nix"),
        "hosts/bad: neither flake.nix nor configuration.nix in it",
    ),
    "dangling host": (replace_by_link, "hosts/bad: dangling link"),
    "control characters": (
        lambda d: (d / "\x1b[31m\n").symlink_to("\x1b[31m\n"),
        "hosts/bad/ [31m: link loop (Too many levels of symbolic links)",
    ),
    "too deep": (lambda d: (d / "/".join("x" * 101)).mkdir(parents=True), f"hosts/bad{'/x' * 100}: a tree deeper than 100 directories"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_host_gets_one_line_and_the_others_are_published(case: str, site: Site) -> None:
    make, message = REFUSED[case]
    site.host("after")
    site.host("z")
    make(site.host("bad"))
    ran = site.run("populate")
    assert ran.code == 1
    assert ran.errors == [f"bento: error: bad: {message.replace('@TOP@', str(site.top))}"]
    assert ran.out.splitlines()[-1] == "3 hosts: 2 published, 0 unchanged, 1 failed"
    check_chroot(site.chroots / "after")
    check_chroot(site.chroots / "z")
    assert not (site.chroots / "bad").exists()


def test_a_refused_host_keeps_its_release(site: Site) -> None:
    directory = site.host("a")
    site.publish()
    before = snapshot(site.chroots / "a")
    (directory / "x").symlink_to("x")
    assert site.run("populate").code == 1
    assert snapshot(site.chroots / "a") == before


def test_a_tree_that_is_much_too_deep(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = site.host("bad")
    site.host("good")
    try:
        with monkeypatch.context() as patched:
            for _ in range(1500):
                (directory / "x").mkdir()
                patched.chdir(directory / "x")
                directory = Path()
        ran = site.run("populate")
        assert ran.errors == [f"bento: error: bad: hosts/bad{'/x' * 100}: a tree deeper than 100 directories"]
        check_chroot(site.chroots / "good")
    finally:  # nor could pytest remove it
        subprocess.run(["rm", "-rf", site.fleet / "hosts/bad"], check=True)


LEFT_OUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "dangling link": (lambda d: os.symlink("gone", d / "x"), "1 dangling link left out: hosts/a/x -> gone"),
    "many": (
        link_many,
        "7 dangling links left out: hosts/a/x0 -> g, hosts/a/x1 -> g, hosts/a/x2 -> g, hosts/a/x3 -> g, hosts/a/x4 -> g, …",
    ),
    "FIFO": (
        lambda d: os.mkfifo(d / "x"), "1 name left out: neither files nor directories (sockets, FIFOs, devices): hosts/a/x",
    ),
    "link to a FIFO": (
        link_to_fifo, "1 name left out: neither files nor directories (sockets, FIFOs, devices): hosts/a/x",
    ),
    "socket": (
        lambda d: bind_socket(d / "x"),
        "1 name left out: neither files nor directories (sockets, FIFOs, devices): hosts/a/x",
    ),
    "an editor's": (lambda d: os.symlink("me@here.1", d / ".#x.nix"), ""),
    "droppings": (lambda d: [(d / n).write_text("x") for n in (".x.nix.swp", "x~", ".jj", ".hg", ".svn", ".direnv")], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out(case: str, site: Site) -> None:
    """Whoever else links to it, and is published."""
    make, message = LEFT_OUT[case]
    make(site.host("a"))
    (site.fleet / "hosts/b").symlink_to("a")
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [f"bento: warning: {message}"] if message else [])
    with tarfile.open(site.tar("b")) as archive:
        assert archive.getnames() == ["configuration.nix"]


@pytest.mark.parametrize("name", ["with space", "-x", "a" * 26, "ünï", "a.b", "a\nb", "\udcff"])
def test_a_bad_host_name(name: str, site: Site) -> None:
    site.host("good")
    site.host(name)
    ran = site.run("populate")
    assert ran.code == 1
    assert ran.errors == [
        f"bento: error: hosts/{client.one_line(name)}: no host name:"
        " letters, digits, _ and -, at most 25, a letter or digit first"
    ]
    check_chroot(site.chroots / "good")
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "good"}


def test_other_files_in_hosts_are_no_hosts(site: Site) -> None:
    site.host("good")
    (site.fleet / "hosts/README").write_text("x")
    (site.fleet / "hosts/.git").mkdir()
    assert site.publish().out.endswith("1 host: 1 published, 0 unchanged, 0 failed\n")


NO_KEY = "no SSH public key ('ssh-ed25519 AAAA… comment', without options): "
BAD_KEYS = {
    "private": (
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbg\n",
        "1: this is a private key: delete it, make a new one, and give only the .pub here",
    ),
    "options": (f"restrict {key('bad')}\n", f"1: {NO_KEY}{client.one_line('restrict ' + key('bad'), 40)}"),
    "one word": ("hello\n", f"1: {NO_KEY}hello"),
    "no base64": ("ssh-ed25519 AAAA!\n", "1: malformed SSH public key: its second word is no base64"),
    "cut short": (f"# fine\n{key('bad')[:-8]}\n", "2: malformed SSH public key: it is cut short"),
    # Whose last character has bits that base64 does not use.
    "stray bits": ("ssh-rsa AAAAB3NzaC1yc2EAAAABAx==\n", "1: malformed SSH public key: its second word is no base64"),
    "another type": (key("bad").replace("ssh-ed25519", "ssh-rsa"), "1: malformed SSH public key: it is no ssh-rsa key"),
    "empty": ("\n# only a comment\n", " no key in it: put the output of 'bento-client key' there"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_KEYS)
def test_a_bad_key(case: str, site: Site) -> None:
    content, message = BAD_KEYS[case]
    site.host("bad")
    site.host("good")
    (site.fleet / "hosts/bad.pub").write_text(content)
    (site.fleet / "hosts/good.pub").write_text(key("good") + "\n")
    expected = f"bento: error: hosts/bad.pub:{message}"
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (1, [expected])
    assert ran.out.splitlines()[-1] == "2 hosts: 1 published, 0 unchanged, 1 failed"
    assert not (site.chroots / "bad").exists()
    check_chroot(site.chroots / "good")

    (site.fleet / "fleet.nix").write_text("as it was")
    ran = site.run("fleet")
    assert (ran.code, ran.errors) == (1, [expected, "bento: error: fleet.nix is left as it was"])
    assert (site.fleet / "fleet.nix").read_text() == "as it was"


def test_a_key_file_that_cannot_be_read(site: Site) -> None:
    for name in "ab":
        site.host(name)
    (site.fleet / "hosts/a.pub").symlink_to("gone")
    (site.fleet / "hosts/b.pub").write_bytes(b"\xff\xfe")
    ran = site.run("fleet")
    assert ran.code == 1
    assert [line.split(": ")[2:4] for line in ran.errors] == [
        ["hosts/a.pub", "cannot be read"], ["hosts/b.pub", "cannot be read"], ["fleet.nix is left as it was"],
    ]  # fmt: skip
    assert not (site.fleet / "fleet.nix").exists()


def test_a_key_goes_with_its_host(site: Site) -> None:
    """`rm -r hosts/NAME` ends what its key can do, whatever is in hosts/NAME.pub."""
    site.host("a")
    (site.fleet / "hosts/a.pub").write_text(key("a"))
    (site.fleet / "hosts/gone.pub").write_text(key("a"))
    (site.fleet / "hosts/no host.pub").write_text("no key")
    ran = site.run("fleet")
    assert (ran.code, ran.errors) == (0, [
        "bento: warning: hosts/gone.pub: left out, there is no hosts/gone",
        "bento: warning: hosts/no host.pub: left out, there is no hosts/no host",
    ])  # fmt: skip
    assert "fleet.nix: written, 1 host;" in ran.out and "gone = " not in (site.fleet / "fleet.nix").read_text()
    site.publish()


def test_a_renamed_host_may_keep_its_key(site: Site) -> None:
    site.host("new")
    (site.fleet / "hosts/old").symlink_to("new")
    for name in ("new", "old"):
        (site.fleet / f"hosts/{name}.pub").write_text(key("a"))
    assert "written, 2 hosts" in site.run("fleet").out
    site.publish()
    # Two hosts that share a tree are two hosts.
    (site.fleet / "hosts/old").unlink()
    (site.fleet / "hosts/old").symlink_to(site.fleet / "hosts/new")
    assert "the same key" in site.run("fleet").err


def test_two_hosts_with_one_key(site: Site) -> None:
    for name in ("a", "b", "c"):
        site.host(name)
        (site.fleet / f"hosts/{name}.pub").write_text(f"{key(name)}\n")
    (site.fleet / "hosts/b.pub").write_text(f"{key('b')}\n{key('a', 'another comment')}\n")
    message = "bento: error: hosts/a.pub and hosts/b.pub have the same key: each host needs its own"
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (1, [message])
    assert ran.out.splitlines()[-1] == "3 hosts: 1 published, 0 unchanged, 2 failed"
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "c"}
    ran = site.run("fleet")
    assert (ran.code, ran.errors) == (1, [message, "bento: error: fleet.nix is left as it was"])


def test_a_release_has_a_limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("big", CONFIGURATION | {"x": b"x" * 60_000})
    site.host("small")
    monkeypatch.setattr(client, "MAX_RELEASE_BYTES", 50_000)
    ran = site.run("populate")
    assert ran.code == 1
    assert ran.errors == ["bento: error: big: the release would exceed 50000 bytes: leave large files out: x (60000 bytes),"
        " configuration.nix (4 bytes)"
    ]
    check_chroot(site.chroots / "small")


def test_a_file_that_grows_while_it_is_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = site.host("a", CONFIGURATION | {"growing": "x"})
    listed = bento.list_members(bento.Fleet(site.fleet, site.chroots), "a")
    (directory / "growing").write_text("more")
    with pytest.raises(BentoError, match=r"/growing: changed while it was read: run this again$"):
        bento.write_release(listed, None)


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
    need("sftp")
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


def forked(action: Callable[[], object]) -> int:
    """A child of this process that does something quietly, and exits 0."""
    child = os.fork()
    if child:
        return child
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silence, descriptor)
        action()
    except BaseException:
        os._exit(70)
    os._exit(0)


class Killing:
    """Three hosts, which share a directory, with a release each, and a second one of each that is about to be published
    by a child."""

    NAMES = ("a", "b", "c")

    def __init__(self, site: Site) -> None:
        self.site = site
        self.known: dict[str, set[str]] = {name: set() for name in self.NAMES}
        (site.fleet / "utils").mkdir()
        for name in self.NAMES:
            (site.host(name) / "utils").symlink_to("../../utils")
        for number in (1, 2):
            self.write(number)
            site.publish()
            for name in self.NAMES:
                self.known[name].add(site.current(name).release)
        self.number = 2

    def write(self, number: int) -> None:
        (self.site.fleet / "utils/module.nix").write_text(f"{'z' * number}\n")
        for name in self.NAMES:
            self.site.host(name, CONFIGURATION | {"number": f"{name} {'x' * number}\n", "d/file": "y"})

    def populate(self) -> None:
        bento.main(self.site.argv("populate"))

    def check(self, status: int) -> bool:
        """What is there after a kill: the old or the new, whole. Then the next populate, and all is tidy."""
        fleet = bento.Fleet(self.site.fleet, self.site.chroots)
        new = {name: bento.write_release(bento.list_members(fleet, name), None)[0] for name in self.NAMES}
        for name in self.NAMES:
            check_chroot(self.site.chroots / name, self.known[name] | {new[name]})
        self.site.publish()
        for name in self.NAMES:
            self.known[name].add(new[name])
            assert check_chroot(self.site.chroots / name) == new[name]
            tars = {p.stem for p in (self.site.chroots / name / "releases").glob("*.tar")}
            check_tidy(self.site.chroots / name, tars)
            assert len(tars) <= bento.KEEP_RELEASES
        assert set(os.listdir(self.site.chroots)) == {".lock", ".store", *self.NAMES}
        return os.WIFSIGNALED(status)


def test_killed_at_a_random_moment(site: Site) -> None:
    killing = Killing(site)
    chance, killed, number, whole_s = random.Random(20261123), 0, 3, 60.0
    while killed < 64:
        assert number < 400
        killing.write(number)
        started = time.monotonic()
        child = forked(killing.populate)
        if number < 8:  # to see how long it takes
            _, status = os.waitpid(child, 0)
            whole_s = min(whole_s, time.monotonic() - started)
        else:
            time.sleep(chance.uniform(0, whole_s))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        killed += killing.check(status)
        number += 1


def test_killed_at_each_step(site: Site) -> None:
    """Before each single thing that populate does to the disk."""
    events = ("open", "os.", "shutil.", "fcntl.")
    killing = Killing(site)
    step, number = 0, 3
    while True:
        killing.write(number)

        def populate(step: int = step) -> None:
            left = step

            def watch(event: str, arguments: object) -> None:
                nonlocal left
                if event.startswith(events) and event not in ("os.listdir", "os.scandir", "os.kill"):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            killing.populate()

        _, status = os.waitpid(forked(populate), 0)
        if not killing.check(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        step, number = step + 1, number % 40 + 1
    assert step >= 60


def test_a_kill_then_a_change_of_mind(site: Site) -> None:
    """Killed just before and just after the moment of publication, and then the old content is back."""
    site.host("a")
    site.publish()
    old = site.current().release
    for moment in ("before", "after"):
        site.host("a", {"configuration.nix": f"{{ }} # {moment}\n"})

        def populate(moment: str = moment) -> None:
            real = bento.reveal

            def reveal(chroot: Path, current: Current) -> None:
                if moment == "after":
                    os.rename(chroot / ".current.json.new", chroot / "current.json")
                os.kill(os.getpid(), signal.SIGKILL)
                real(chroot, current)

            bento.reveal = reveal
            bento.main(site.argv("populate"))

        assert os.WIFSIGNALED(os.waitpid(forked(populate), 0)[1])
        new = check_chroot(site.chroots / "a")
        assert (new == old) == (moment == "before")
        if moment == "after":
            site.publish()  # unchanged: but the link was still to be set
            check_tidy(site.chroots / "a", {old, new})
        site.host("a")
        site.publish()
        assert check_chroot(site.chroots / "a") == old
        check_tidy(site.chroots / "a", {old} if moment == "before" else {old, new})


def test_half_a_release_is_not_kept(site: Site) -> None:
    """A kill while older content was published again leaves its tar without its tree, or its tree without its tar."""
    releases = []
    for number in range(3):
        site.host("a", {"configuration.nix": f"{{ }} # {number}\n"})
        site.publish()
        releases.append(site.current().release)
    shutil.rmtree(site.chroots / "a/releases" / releases[0])
    (site.chroots / "a/releases" / f"{releases[1]}.tar").unlink()
    site.publish()
    check_tidy(site.chroots / "a", {releases[2]})


def test_all_is_on_disk_before_it_is_announced(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        site.host(name)
    order: list[str] = []
    rename = os.rename

    def watch(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "sync", lambda: order.append("sync"))
    monkeypatch.setattr(os, "rename", watch)
    site.publish()
    release = site.current().release
    stored = [f"{release}.tar", release]
    placed, announced = [release, f"{release}.tar"], ["current.json", "history", "config"]
    settled = [*sorted(stored), f"{release}.json"]
    assert order == [*stored, *placed, *placed, "sync", *settled, *announced, *announced, "sync"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], stderr=subprocess.DEVNULL
    ).returncode == 0  # fmt: skip
    if not mounted:
        _missing("needs root to mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_old_release(small_disk: Path, site: Site) -> None:
    site.chroots = small_disk / "chroot"
    directory = site.host("a", CONFIGURATION | {"x": b"1" * 300_000})
    site.publish()
    old = site.current().release
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    for left in range(0, 900_000, 60_000):
        (small_disk / "filler").write_bytes(b"\0" * max(0, room - left))
        (directory / "x").write_bytes(b"2" * 300_000)
        ran = site.run("populate")
        (small_disk / "filler").unlink()
        if ran.code == 0:
            break
        assert len(ran.errors) == 1 and ran.errors[0].startswith("bento: error: a: ")
        assert "No space left on device" in ran.errors[0]
        assert check_chroot(site.chroots / "a") == old
    assert 300_000 < left < 840_000
    assert check_chroot(site.chroots / "a") != old
    check_tidy(site.chroots / "a", {old, site.current().release})


@pytest.mark.parametrize("step", ["stage", "place", "reveal"])
def test_a_full_disk_at_each_step(step: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("a")
    site.publish()
    old = site.current().release
    site.host("a", {"configuration.nix": "{ } # new\n"})
    failing = {"stage": (bento, "write_release"), "place": (Path, "write_bytes"), "reveal": (Path, "symlink_to")}[step]

    def full(*arguments: object, **options: object) -> object:
        if step == "stage" and len(arguments) + len(options) > 1 and arguments[1:] != (None,):
            raise OSError(28, "No space left on device")
        if step == "stage":
            return real(*arguments, **options)
        raise OSError(28, "No space left on device")

    real: Callable[..., object] = getattr(*failing)
    with monkeypatch.context() as patched:
        patched.setattr(*failing, full)
        ran = site.run("populate")
    assert ran.code == 1
    assert ran.errors == ["bento: error: a: [Errno 28] No space left on device"]
    if step == "reveal":
        assert check_chroot(site.chroots / "a") != old
    else:
        assert check_chroot(site.chroots / "a") == old
    site.publish()
    assert check_chroot(site.chroots / "a") != old
    check_tidy(site.chroots / "a", {old, site.current().release})


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
        check_tree(tar, tar.with_suffix(""))


LARGE = bento.LARGE_FILE


def check_parts(site: Site) -> list[int]:
    """Asserts that the parts of the published release are its archive; their sizes."""
    current = site.current()
    directory = site.tar().with_suffix(".parts")
    contents = [(directory / part.sha256).read_bytes() for part in current.parts]
    assert b"".join(contents) == site.tar().read_bytes()
    assert [(hashlib.sha256(c).hexdigest(), len(c)) for c in contents] == [(p.sha256, p.size) for p in current.parts]
    assert set(os.listdir(directory)) == {part.sha256 for part in current.parts}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in directory.iterdir())
    return [part.size for part in current.parts]


def test_a_large_file_is_a_part_of_its_own(site: Site) -> None:
    name = "x" * 180 + "/big"  # its header takes several blocks
    site.host("a", CONFIGURATION | {name: os.urandom(LARGE), "a": os.urandom(LARGE + 1), "small": b"1" * (LARGE - 1)})
    site.publish()
    sizes = check_parts(site)
    assert (sizes[1], sizes[3], len(sizes)) == (LARGE + 1, LARGE, 5)
    tree = site.tar().with_suffix("")
    large = hashlib.sha256((tree / name).read_bytes()).hexdigest()
    assert (site.tar().with_suffix(".parts") / large).samefile(tree / name)  # it costs no room
    before = snapshot(site.chroots / "a/releases")
    site.publish()
    assert snapshot(site.chroots / "a/releases") == before


def test_the_same_large_file_twice(site: Site) -> None:
    content = os.urandom(LARGE)
    site.host("a", CONFIGURATION | {"one": content, "two": content})
    site.publish()
    assert check_parts(site).count(LARGE) == 2


def test_no_large_file_no_parts(site: Site) -> None:
    site.host("a", CONFIGURATION | {f"x{number}": b"1" * (LARGE // 2) for number in range(5)})
    site.publish()
    assert "parts" not in json.loads((site.chroots / "a/current.json").read_bytes())
    check_tidy(site.chroots / "a", {site.current().release})


def test_many_large_files(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest are parts, and current.json stays within its limit."""
    monkeypatch.setattr(bento, "LARGE_FILE", 1000)
    site.host("a", CONFIGURATION | {f"x{number:03}": os.urandom(1000 + number) for number in range(150)})
    site.publish()
    sizes = check_parts(site)
    assert len(sizes) == 2 * bento.MAX_LARGE_FILES + 1
    assert {1050, 1149} <= set(sizes) and 1049 not in sizes
    assert (site.chroots / "a/current.json").stat().st_size < client.MAX_JSON_BYTES / 2


def test_damaged_parts_are_mended(site: Site) -> None:
    site.host("a", CONFIGURATION | {"big": os.urandom(LARGE)})
    site.publish()
    release, directory = site.current().release, site.tar().with_suffix(".parts")
    for damage in ("gone", "short"):
        path = directory / site.current().parts[0].sha256
        path.unlink()
        if damage == "short":
            path.touch()
        site.publish()
        assert site.current().release == release
        check_parts(site)


def test_parts_go_with_their_release(site: Site) -> None:
    for number in range(5):
        site.host("a", CONFIGURATION | {"big": os.urandom(LARGE), "part": str(number)})
        site.publish()
        check_parts(site)
    assert len(list((site.chroots / "a/releases").glob("*.parts"))) == 3
    (site.fleet / "hosts/a/big").unlink()
    for number in range(3):
        site.host("a", {"part": f"more {number}"})
        site.publish()
    check_tidy(site.chroots / "a", {path.stem for path in (site.chroots / "a/releases").glob("*.tar")})


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


@pytest.mark.parametrize("damage", ["tar gone", "tar short", "tree gone", "json cut", "json of another", "json newer"])
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
        case "tree gone":
            shutil.rmtree(tar.with_suffix(""))
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
    release, size = bento.write_release(bento.list_members(fleet, "a"), None)
    assert site.publish("--dry-run", "--prune").out == (
        f"gone: would remove {site.chroots}/gone\n"
        f"a: would publish {release[:12]} ({size} bytes)\n"
        "1 host: 1 would be published, 0 unchanged, 0 failed\n"
    )
    (directory / "x").symlink_to("x")
    ran = site.run("populate", "--dry-run")
    assert (ran.code, ran.errors) == (1, ["bento: error: a: hosts/a/x: link loop (Too many levels of symbolic links)"])
    assert snapshot(site.chroots) == before


def test_prune(site: Site) -> None:
    for name in ("a", "gone", "gone-2"):
        site.host(name)
    site.publish()
    (site.chroots / "gone/logs/log").write_text("x")
    (site.chroots / "gone/logs/link").symlink_to(site.fleet)
    (site.chroots / "not ours").mkdir()
    (site.chroots / "no-releases").mkdir()
    (site.chroots / "link").symlink_to(site.chroots / "a")
    for name in ("gone", "gone-2"):
        shutil.rmtree(site.fleet / "hosts" / name)
    site.publish()
    assert (site.chroots / "gone/current.json").exists()
    ran = site.publish("--prune")
    assert ran.out == (
        f"gone: removed {site.chroots}/gone\ngone-2: removed {site.chroots}/gone-2\n"
        "1 host: 0 published, 1 unchanged, 0 failed\n"
    )
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a", "link", "no-releases", "not ours"}
    assert (site.fleet / "hosts/a").is_dir()

    # A host that is refused, or whose link dangles, is not gone.
    site.host("b")
    site.publish()
    shutil.rmtree(site.fleet / "hosts/b")
    (site.fleet / "hosts/b").symlink_to("elsewhere")
    assert site.run("populate", "--prune").code == 1
    check_chroot(site.chroots / "b")


def test_prune_refuses_what_nobody_means(site: Site) -> None:
    site.host("a")
    site.publish()
    ran = site.run("populate", "--prune", "a")
    assert (ran.code, ran.errors) == (
        2, ["bento: error: --prune goes with the whole fleet, not with single hosts"],
    )  # fmt: skip
    shutil.rmtree(site.fleet / "hosts/a")
    ran = site.run("populate", "--prune")
    assert (ran.code, ran.errors) == (
        1, [f"bento: error: {site.fleet}/hosts: no hosts in it: pruning would remove every chroot, so nothing was done"],
    )  # fmt: skip
    check_chroot(site.chroots / "a")


def test_a_chroot_that_is_something_else(site: Site) -> None:
    site.host("a")
    site.host("b")
    site.chroots.mkdir()
    (site.chroots / "a").symlink_to("/nonexistent")
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (1, [f"bento: error: a: {site.chroots}/a: not a directory: remove it"])
    check_chroot(site.chroots / "b")


def test_old_logs_are_pruned(site: Site) -> None:
    site.host("a")
    site.publish()
    logs = site.chroots / "a/logs"
    names = [f"20261123T{n // 60:02}{n % 60:02}00Z_9f3a61c07be4_ok.log" for n in range(bento.KEEP_LOGS + 30)]
    for name in [*names, "status.json", "something else"]:
        (logs / name).write_text("x")
    (logs / "20261122T000000Z_9f3a61c07be4_ok.log").mkdir()  # in the way of what follows
    site.publish()
    left = {*names[30:], "status.json", "something else", "20261122T000000Z_9f3a61c07be4_ok.log"}
    assert set(os.listdir(logs)) == left


def test_very_many_logs_are_pruned_in_several_runs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bento, "MAX_PRUNED", 300)
    site.host("a")
    site.publish()
    for number in range(1000):
        (site.chroots / f"a/logs/20261123T{number // 60:02}{number % 60:02}00Z_9f3a61c07be4_ok.log").touch()
    for _ in range(9):
        site.publish()
    assert bento.KEEP_LOGS <= len(os.listdir(site.chroots / "a/logs")) <= 300


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
    assert (ran.code, ran.err) == (0, "")
    assert asked == ["bento-t470", "bento"]
    release = site.current("t470").release
    expected = {
        ".": (0, 0, 0o755), "t470": (0, 51234, 0o750), "t470/current.json": (0, 0, 0o644),
        "t470/releases": (0, 0, 0o755), f"t470/releases/{release}": (0, 0, 0o755),
        f"t470/releases/{release}.tar": (0, 0, 0o644), f"t470/releases/{release}/d": (0, 0, 0o755),
        f"t470/releases/{release}/d/script": (0, 0, 0o755), f"t470/releases/{release}/configuration.nix": (0, 0, 0o644),
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


def test_a_missing_account(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert set(os.listdir(site.chroots)) == {".lock"}


def test_as_another_user(tmp_path: Path) -> None:
    """The whole of it without root's rights: in a process that gave them up."""
    if os.geteuid() != 0:
        _missing("needs root to become another user")
    code = (
        "import os, sys, bento, tarfile, encodings.idna; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "top = sys.argv[1]; os.makedirs(top + '/hosts/a'); open(top + '/hosts/a/flake.nix', 'w').close()\n"
        "arguments = ['--fleet', top, '--chroot-dir', top + '/chroot']\n"
        "sys.exit(bento.main([*arguments, 'populate']) or bento.main([*arguments, 'status']))"
    )
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o777)
        done = subprocess.run(
            [sys.executable, "-c", code, f"{top}/fleet"], cwd="/", env=os.environ | {"PYTHONPATH": str(REPO)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, f"{NOT_ROOT}\n")
        release = check_chroot(Path(top, "fleet/chroot/a"))
        assert done.stdout.splitlines()[0].startswith(f"a: published {release[:12]} (")
        assert (Path(top) / "fleet/chroot/a/logs").stat().st_uid == 65534


# --- checks and builds ---


def toy_host(site: Site, name: str, *, flake: bool = True, **behaviour: Any) -> Path:
    return write_config(site.fleet / "hosts" / name, flake=flake, host=name, client=None, **behaviour)


def build_as_the_host(site: Site, name: str, work: Path) -> str:
    """The system that a host builds from what is published for it."""
    work.mkdir()
    client.unpack(site.tar(name), work / "config")
    settings = client.Settings(server=("s",), host=name, state_dir=str(work))
    done = subprocess.run(client.build_argv(settings, work / "config"), cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return os.path.realpath(work / "result")


@pytest.mark.parametrize("action", ["--check", "--build"])
def test_only_hosts_that_pass_are_published(action: str, site: Site, toys: Path) -> None:
    for name in ("good", "channels"):
        toy_host(site, name, flake=name == "good")
    toy_host(site, "evaluation", build="eval-error")
    toy_host(site, "compiler", build="fail")
    ran = site.run("populate", action)
    log = f"all of it is in {site.top}/state/bento/"
    evaluation = [
        f"bento: error: evaluation: nixos-rebuild {'build' if action == '--build' else 'dry-build'}: exit 1;"
        f" {log}evaluation.log, which ends:",
        "  building the system configuration...",
        "  error: The option `services.toy' does not exist.",
    ]
    assert ran.code == 1
    if action == "--check":
        assert ran.errors == evaluation
        assert site.current("good").system is None
        check_chroot(site.chroots / "compiler")
        return
    assert ran.errors[-3:] == evaluation
    assert ran.errors[0] == (
        f"bento: error: compiler: nixos-rebuild build: exit 1; {log}compiler.log, which ends:"
    )
    assert "  toy.c:7:1: error: expected ';' before '}' token" in ran.errors
    assert "make: *** [Makefile:3: toy.o] Error 1" in (site.top / "state/bento/compiler.log").read_text()
    for name in ("good", "channels"):
        check_chroot(site.chroots / name)
        check_tidy(site.chroots / name, {site.current(name).release})
        assert site.current(name).system == build_as_the_host(site, name, site.top / f"work-{name}")
    for name in ("evaluation", "compiler"):
        assert not (site.chroots / name / "current.json").exists()
        assert list((site.chroots / name / "releases").iterdir()) == []


def test_a_host_that_fails_its_check_keeps_its_release(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    site.publish("--build")
    before = snapshot(site.chroots / "a/releases" / site.current().release), site.current()
    toy_host(site, "a", build="fail")
    assert site.run("populate", "--build").code == 1
    assert (snapshot(site.chroots / "a/releases" / site.current().release), site.current()) == before
    check_tidy(site.chroots / "a", {site.current().release})


def test_what_is_published_already_is_built_once(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    site.publish()
    before = site.current()
    assert before.system is None
    site.publish("--build")
    assert site.current() == before._replace(system=site.current().system)
    assert str(site.current().system).startswith(f"{toys}/")
    check_tidy(site.chroots / "a", {before.release})
    snap = snapshot(site.chroots / "a")
    site.publish("--build")
    assert snapshot(site.chroots / "a") == snap


def test_what_is_only_built_is_not_cut_into_parts(site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nixos-rebuild gets the release in a place that has nothing else."""
    (toy_host(site, "a") / "big").write_bytes(os.urandom(LARGE))
    built: list[list[str]] = []
    rebuild = bento.rebuild

    def watch(action: str, tree: Path, *arguments: Any) -> str | None:
        built.append(os.listdir(tree.parent))
        return rebuild(action, tree, *arguments)

    monkeypatch.setattr(bento, "rebuild", watch)
    site.publish("--build")
    assert check_parts(site)[1] == LARGE
    (site.fleet / "hosts/a/big").write_bytes(os.urandom(LARGE))
    before = site.current()
    with monkeypatch.context() as patched:
        patched.setattr(bento, "copy_part", lambda *_: os.listdir("/gone"))
        assert site.run("check").code == site.run("build").code == 0
        assert site.run("populate", "--check").errors == ["bento: error: a: [Errno 2] No such file or directory: '/gone'"]
    assert site.current() == before
    assert not (site.chroots / "a/releases/.new").exists()
    site.publish("--check")
    assert site.current() != before and check_parts(site)[1] == LARGE
    assert built == [["config"]] * 4


@pytest.fixture
def real_nix() -> None:
    need_nix()  # here: before `site` hides that we are root


@pytest.mark.parametrize("flake", [True, False])
def test_with_nix_the_server_builds_what_the_host_builds(
    flake: bool, real_nix: None, site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_MODE", "nix")
    directory = write_config(site.fleet / "hosts/a", flake=flake, host="a")
    if not flake:
        # The directory's own name gets into the system.
        (directory / "configuration.nix").write_text(
            """{ config.system.build.toplevel = derivation { name = "toy"; system = builtins.currentSystem;
            builder = "/bin/sh"; args = [ "-c" "echo ${./.} > $out" ]; }; }\n"""
        )
    site.publish("--build")
    system = site.current().system
    assert system is not None and system.startswith("/nix/store/") and os.path.exists(system)
    if not flake:
        assert Path(system).read_text().strip().endswith("-config")
    assert build_as_the_host(site, "a", site.top / "work") == system
    ran = site.run("build")
    assert re.fullmatch(rf"a: {site.current().release[:12]} {re.escape(system)} \([0-9]+s\)\n", ran.out)


def test_check_and_build(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    toy_host(site, "bad", build="eval-error")
    (site.host("refused") / "x").symlink_to("x")
    ran = site.run("check", "-j", "3")
    assert ran.code == 1
    fleet = bento.Fleet(site.fleet, site.chroots)
    release, _ = bento.write_release(bento.list_members(fleet, "a"), None)
    assert re.fullmatch(rf"a: {release[:12]} evaluates \([0-9]+s\)\n", ran.out)
    assert "bento: error: refused: hosts/refused/x: link loop (Too many levels of symbolic links)" in ran.errors
    assert any(line.startswith("bento: error: bad: nixos-rebuild dry-build: exit 1; ") for line in ran.errors)
    assert not site.chroots.exists()
    assert not toys.exists() or not list(toys.glob("*-nixos-system-*"))

    ran = site.run("build", "a")
    assert ran.code == 0
    assert re.fullmatch(rf"a: {release[:12]} {toys}/[0-9a-z]{{32}}-nixos-system-a-v1 \([0-9]+s\)\n", ran.out)
    assert not site.chroots.exists()


def test_build_notes_the_system_of_what_is_published(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    site.publish()
    assert site.run("build").code == 0
    system = site.current().system
    assert system is not None and system.startswith(f"{toys}/")
    toy_host(site, "a", label="v2")
    assert site.run("build").code == 0
    assert site.current().system == system  # of the release that is published, not of this one
    check_tidy(site.chroots / "a", {site.current().release})


def test_build_leaves_current_json_alone_while_populate_is_at_work(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    site.publish()
    with bento.populate_lock(bento.Fleet(site.fleet, site.chroots)):
        (site.chroots / "a/.current.json.new").write_text("populate's")
        done = subprocess.Popen([sys.executable, "-c", AS_ANYBODY, *site.argv("build")], env=os.environ | {"PYTHONPATH": str(REPO)})
        time.sleep(1.5)
        assert site.current().system is None
        assert (site.chroots / "a/.current.json.new").read_text() == "populate's"
    assert done.wait(20) == 0
    assert site.current().system is not None


def test_without_nixos_rebuild(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("a")
    monkeypatch.setenv("PATH", "/nonexistent")
    ran = site.run("populate", "--check")
    assert ran.code == 1
    assert "nixos-rebuild: No such file or directory" in ran.err
    ran = site.run("check", "a")
    assert ran.code == 1
    assert "nixos-rebuild: No such file or directory" in ran.err


def test_a_check_that_takes_too_long(site: Site, toys: Path) -> None:
    toy_host(site, "a", build="hang")
    ran = site.run("build", "--timeout", "1")
    assert ran.code == 1
    assert (
        f"bento: error: a: nixos-rebuild build: did not end within 1 s; all of it is in {site.top}/state/bento/a.log,"
        " which ends:"
    ) in ran.errors


# --- fleet.nix ---

TEMPLATE = """\
# @GENERATED@
{
  chrootDir = "@CHROOT_DIR@";
  hosts = {
    @HOSTS@
  };
}
"""


def test_fleet_nix(site: Site) -> None:
    (site.fleet / "fleet.nix.in").write_text(TEMPLATE)
    (site.fleet / "hosts/t470.pub").write_text(f"# the laptop\n\n{key('t470', 'root@t470')}\n{key('spare')}\n")
    (site.fleet / "hosts/nas.pub").write_text(f"  {key('nas', 'a  b')}  \n")
    for name in ("no-key-yet", "t470", "nas"):
        site.host(name)
    ran = site.run("fleet")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "fleet.nix: written, 2 hosts; include it in this server's configuration and switch\n"
    text = (site.fleet / "fleet.nix").read_text()
    assert text == f"""\
# Written by 'bento.py fleet' from fleet.nix.in and hosts/*.pub: edit those, not this file.
{{
  chrootDir = "{site.chroots}";
  hosts = {{
    "nas" = [
      "{key("nas", "a  b")}"
    ];
    "t470" = [
      "{key("t470", "root@t470")}"
      "{key("spare")}"
    ];
  }};
}}
"""
    before = snapshot(site.fleet)
    assert site.run("fleet").out == "fleet.nix: unchanged, 2 hosts\n"
    assert snapshot(site.fleet) == before


def test_a_name_that_is_too_long_for_nixos(site: Site) -> None:
    """Its account names end at 31 characters."""
    for name in ("h" * 25, "i" * 26):
        site.host(name)
        (site.fleet / f"hosts/{name}.pub").write_text(f"{key(name)}\n")
    assert "fleet.nix: written, 1 host;" in site.run("fleet").out
    assert [line.split(": ")[2] for line in site.run("populate").errors] == [f"hosts/{'i' * 26}"]


METACHARACTERS = [
    "''", "${builtins.abort \"x\"}", "$${x}", "\\${x}", '"', '" ]; evil = "', "\\", "\\\\", "\\n", "a\\", "$", "${", "é 日本",
    "'' ${ \" \\ ''${ ''\\", "</script>", "@HOSTS@", "@CHROOT_DIR@", "# comment", "*/", "a=b; c",
]  # fmt: skip


def test_nothing_in_a_comment_is_nix(site: Site) -> None:
    nix = need("nix-instantiate")
    (site.fleet / "fleet.nix.in").write_text(TEMPLATE)
    for number, comment in enumerate(METACHARACTERS):
        site.host(f"h{number}")
        (site.fleet / f"hosts/h{number}.pub").write_text(key(f"h{number}", comment) + "\n")
    site.chroots = site.top / "with '' ${x} \" \\ in it"
    assert site.run("fleet").code == 0
    argv: list[str | Path] = [nix, "--eval", "--strict", "--json", site.fleet / "fleet.nix"]
    environment = os.environ | {"NIX_CONFIG": "substitute = false"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hosts"] == {f"h{n}": [key(f"h{n}", comment)] for n, comment in enumerate(METACHARACTERS)}
    assert found["chrootDir"] == str(site.chroots)


def test_control_characters_in_a_comment_are_dropped(site: Site) -> None:
    (site.fleet / "fleet.nix.in").write_text(TEMPLATE)
    site.host("a")
    (site.fleet / "hosts/a.pub").write_text(key("a", "x\x1b[31m\x00\u202ey\tz") + "\n")
    assert site.run("fleet").code == 0
    assert f'"{key("a", "x[31myz")}"' in (site.fleet / "fleet.nix").read_text()


def test_the_real_template_is_nix(site: Site) -> None:
    nix = need("nix-instantiate")
    (site.fleet / "hosts/a.pub").write_text(key("a", "''${x}") + "\n")
    assert site.run("fleet").code == 0
    environment = os.environ | {"NIX_CONFIG": "substitute = false"}
    done = subprocess.run([nix, "--parse", site.fleet / "fleet.nix"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "@" not in re.sub(r"sk-ssh\S*", "", (site.fleet / "fleet.nix").read_text().split("hosts = ")[0])


# --- add ---


def test_add(site: Site) -> None:
    (site.fleet / "utils").mkdir()
    (site.fleet / "utils/bento.nix").write_text("{ }\n")
    ran = site.run("add", "laptop")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (
        "hosts/laptop/: made; put the machine's own configuration there and set the server's name\n"
        "next: 'python3 bento_client.py --host laptop key' on the machine, 'bento.py add laptop --key FILE' here\n"
    )
    directory = site.fleet / "hosts/laptop"
    assert set(os.listdir(directory)) == {"configuration.nix", "utils"}
    assert os.readlink(directory / "utils") == "../../utils"
    text = (directory / "configuration.nix").read_text()
    assert 'networking.hostName = "laptop";' in text
    assert "./utils/bento.nix" in text
    assert set(os.listdir(site.fleet / "hosts")) == {"laptop"}
    site.publish()

    ran = site.run("add", "laptop")
    assert (ran.code, ran.err) == (1, "bento: error: hosts/laptop is there already\n")
    assert (directory / "configuration.nix").read_text() == text


def test_add_a_flake_with_a_key(site: Site) -> None:
    file = site.top / "key.pub"
    file.write_text(key("nas", "root@nas") + "\n")
    ran = site.run("add", "nas", "--flake", "--key", str(file))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[1:] == [
        "hosts/nas.pub: 1 key",
        "next: 'bento.py fleet', switch this server to it, 'bento.py populate'",
    ]
    assert (site.fleet / "hosts/nas.pub").read_text() == key("nas", "root@nas") + "\n"
    assert 'nixosConfigurations."nas"' in (site.fleet / "hosts/nas/flake.nix").read_text()
    if nix := shutil.which("nix-instantiate"):
        for name in ("flake.nix", "configuration.nix"):
            subprocess.run([nix, "--parse", site.fleet / "hosts/nas" / name], check=True, capture_output=True)


def test_add_a_key_from_standard_input_to_a_host_that_is_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("a")
    before = snapshot(site.fleet / "hosts/a")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{key('a')}\n{key('b')}\n"))
    ran = site.run("add", "a", "--key", "-")
    assert (ran.code, ran.out.splitlines()[0]) == (0, "hosts/a.pub: 2 keys")
    assert (site.fleet / "hosts/a.pub").read_text() == f"{key('a')}\n{key('b')}\n"
    assert snapshot(site.fleet / "hosts/a") == before


@pytest.mark.parametrize("name", ["", "with space", "../x", "-x", "a" * 26, "x/y", "é", "a\n"])
def test_add_a_bad_name(name: str, site: Site) -> None:
    ran = site.run("add", "--", name)
    assert ran.code == 2
    assert ran.err == (
        f"bento: error: {client.one_line(name)}: no host name:"
        " letters, digits, _ and -, at most 25, a letter or digit first\n"
    )
    assert list((site.fleet / "hosts").iterdir()) == []


BAD_KEY_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "No such file or directory"),
    "private": (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "this is a private key"),
    "no text": (b"\xff\xfe\x00", "not"),
    "empty": (b"\n", "no key in it"),
    "nonsense": (b"hello\n", "no SSH public key"),
}


@pytest.mark.parametrize("case", BAD_KEY_FILES)
def test_add_with_a_bad_key_makes_nothing(case: str, site: Site) -> None:
    content, message = BAD_KEY_FILES[case]
    file = site.top / "key.pub"
    if content is not None:
        file.write_bytes(content)
    ran = site.run("add", "a", "--key", str(file))
    assert ran.code == 1
    assert len(ran.errors) == 1 and ran.errors[0].startswith(f"bento: error: {file}")
    assert message in ran.errors[0]
    assert list((site.fleet / "hosts").iterdir()) == []


# --- states ---

RELEASE, OTHER = "a" * 64, "b" * 64
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
    assert set(expected) == set(bento.URGENCY) - {"held", "unknown"}  # which do not follow from a report


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
    rows = [bento.Row("new", "new", False, False, False, None, None, None, "")]
    for name, changes, age_s in ROWS:
        polled = client.format_time(now_s - age_s)
        raw = json.dumps(report_data(host=name, polled=polled) | changes).encode()
        report = client.parse_report(raw, "status.json")
        judged = bento.judge(CURRENT, report, now_s - age_s, now_s, AFTER_S)
        rows.append(bento.Row(name, *judged, CURRENT, report, now_s - age_s, ""))
    rows = [row._replace(host=f"{prefix}{row.host}") for row in rows]
    return bento.sort_rows(rows)


def test_the_table() -> None:
    now_s = client.parse_time("2026-11-23T10:25:02Z")
    assert bento.format_table(make_rows(), now_s, 79).splitlines() == [
        "HOST        STATE       RUNS    SINCE SEEN   NOTES",
        "offline     up-to-date  aaaaaaa 4h    3h     offline for 3h; client 0.9",
        "failing     failing     -       10min 60s    aaaaaaa: build-failed: error: no …",
        "rolled-back rolled-back bbbbbbb 10min 60s    aaaaaaa: the server was out of re…",
        "drifting    up-to-date  aaaaaaa 10min 10min  drift",
        "pending     pending     bbbbbbb 10min 5min   aaaaaaa published 10min ago",
        "building    building    -       -     5s     aaaaaaa published 10min ago",
        "new         new         -       -     never  nothing published",
        "up-to-date  up-to-date  aaaaaaa 10min 10min  needs reboot",
        "██████████▓▓▓▓▓▓··········  █ current 3  ▓ earlier 2  · not known 3",
        "8 hosts: 1 building, 1 drift, 1 failing, 1 needs reboot, 1 new, 1 offline, 1",
        "other client, 1 pending, 1 rolled-back, 3 up-to-date",
    ]
    assert bento.format_table([], now_s, 80).splitlines()[-1] == "no hosts"


@pytest.mark.parametrize("width", [70, 79, 80, 81, 105, 106, 107, 200])
@pytest.mark.parametrize("decorated", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, decorated: bool) -> None:
    long = make_rows()[0]._replace(host="x" * 26, problem="what is wrong " * 40)
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
    assert on_screen(shown) == [NOT_ROOT, *lines, "3 hosts: 3 published, 0 unchanged, 0 failed"]
    site.host("b", {"new": "1"})
    code, shown = in_terminal([*argv, "--dry-run"], 80)
    assert [line.split()[:3] for line in on_screen(shown)[1:-1]] == [["b:", "would", "publish"]]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    quick = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert quick.stderr.splitlines() == [NOT_ROOT]


def test_populate_shows_which_host_it_builds(site: Site, toys: Path) -> None:
    for name in "ab":
        write_config(site.fleet / "hosts" / name, flake=True, host=name)
    code, shown = in_terminal([sys.executable, "-c", AS_ANYBODY, *site.argv("populate", "--build")], 80)
    assert code == 0, shown
    assert "a: building, 0s\n" in shown and "b: building, 0s\n" in shown
    assert [line.split(":")[0] for line in on_screen(shown)] == ["not root", "a", "b", "2 hosts"]


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
    assert (ran.code, ran.out.splitlines()[-1]) == (1, "1 host: 1 offline, 1 up-to-date")
    assert ran.err.startswith("bento: error: a: offline since 20") and ran.err.endswith("Z, it was up-to-date\n")
    assert site.run("status", "--offline-after", "4").code == 0
    assert site.run("status", "--offline-after", "2.9").code == 1


LONG = ("parts", "signed", "signature", "signer")
NOTHING_THE_MATTER = {
    "failed_units": [], "paused": False, "stuck": False, "absent": None, "held": None, "not_published": None, "tries": 0,
    "needs_a_person": False, "reasons": [], "waiting_for_boot": None, "paused_until": None,
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
        **NOTHING_THE_MATTER,
    }  # fmt: skip
    assert abs(client.parse_time(up.pop("since")) - client.parse_time(finished)) <= 1
    assert up.pop("clock_ahead_s") in (-1, 0)
    assert up == {
        "host": "a", "state": "up-to-date", "offline": False, "needs_reboot": True, "drift": False,
        "published": {k: v for k, v in current._asdict().items() if k not in LONG}, "release": current.release, "system": "/nix/store/x",
        "client": client.VERSION, "phase": "idle", "last": last | {"reason": "two parts", "revision": None},
        "revision": None,
        "seen": client.format_time(report.stat().st_mtime), "problem": None, "other_client": False, "expired": False,
        "signer": None, **NOTHING_THE_MATTER,
    }  # fmt: skip


# --- hostile logs ---

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


@pytest.fixture
def hostile(site: Site) -> Site:
    """Two published hosts; b is well, and a is to be made hostile."""
    site.host("a")
    site.host("b")
    site.publish()
    release = site.current("b").release
    site.write_report("b", release=release, last=last_data(release))
    return site


@pytest.mark.parametrize("case", CONTENT)
def test_a_report_of_hostile_content(case: str, hostile: Site) -> None:
    make, problem = CONTENT[case]
    (hostile.chroots / "a/logs/status.json").write_bytes(make(hostile))
    check_problem(hostile, problem)


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
    started = time.monotonic()
    descriptors = len(os.listdir("/proc/self/fd"))
    check_problem(hostile, KINDS[case][1])
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert time.monotonic() - started < 5


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
        f"{when}  {published.release[:12]}  published\n"
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


# --- work trees ---


def git(where: Path, *words: str, **environment: str) -> str:
    argv = [need("git"), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always", "-C", str(where)]
    env = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull} | environment
    return subprocess.run([*argv, *words], env=env, check=True, capture_output=True, text=True).stdout


def commit(where: Path, message: str = "first") -> None:
    if not (where / ".git").exists():
        git(where, "init", "-q", "-b", "main")
    git(where, "add", "-A")
    git(where, "commit", "-q", "-m", message)


def names(site: Site, name: str = "a") -> list[str]:
    with tarfile.open(site.tar(name)) as archive:
        return archive.getnames()


def test_a_release_is_what_git_tracks(site: Site) -> None:
    directory = site.host("a", CONFIGURATION | {"changed": "old\n", "gone": "x", "sub/in": "x", "lost/x": "x", "kept~": "x"})
    (site.fleet / ".gitignore").write_text("*.key\nignored/\n")
    commit(site.fleet)
    (directory / "changed").write_text("new\n")
    (directory / "gone").unlink()
    shutil.rmtree(directory / "lost")
    (directory / "lost").mkdir()
    (directory / "empty").mkdir()
    for name in (".env", "id_rsa", "x.key", "ignored/x", ".direnv/x", "sub/out", "other/1", "other/2", "added"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"{name}\n")
    os.mkfifo(directory / "fifo")
    (directory / ".#x").symlink_to("me@here.1")
    git(site.fleet, "add", "-N", "hosts/a/added")
    (site.fleet / "hosts/b").symlink_to("a")
    ran = site.run("populate")
    assert ran.code == 0
    # A FIFO is nothing to Git.
    assert ran.errors == [
        f"bento: warning: {site.fleet}: 6 names untracked, left out: 'git add' what belongs to a host:"
        " hosts/a/.#x, hosts/a/.direnv, hosts/a/.env, hosts/a/id_rsa, hosts/a/other, …"
    ]
    assert names(site) == ["added", "changed", "configuration.nix", "kept~", "sub", "sub/in"]
    assert (site.chroots / "a/config/changed").read_text() == "new\n"


def test_a_flake_sees_the_same(real_nix: None, site: Site) -> None:
    """In the owner's own nixos-rebuild, of the work tree as it is."""
    directory = site.host("a", {"flake.nix": "{ outputs = _: { }; }\n", "changed": "old\n", "sub/in": "x", "gone": "x"})
    (directory / "link").symlink_to("sub/in")
    commit(site.fleet / "hosts/a")
    (directory / "changed").write_text("new\n")
    (directory / "gone").unlink()
    for name in ("out", "sub/out", "added"):
        (directory / name).write_text("x\n")
    git(directory, "add", "-N", "added")
    assert site.run("populate").code == 0
    argv = ["nix", "--extra-experimental-features", "nix-command flakes", "flake", "metadata", "--json", f"git+file://{directory}"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"HOME": str(site.top)}, check=True)
    seen, tree = Path(json.loads(done.stdout)["path"]), site.chroots / "a/config"
    assert sorted(str(path.relative_to(seen)) for path in seen.rglob("*")) == sorted(
        str(path.relative_to(tree)) for path in tree.rglob("*")
    )
    assert (seen / "changed").read_bytes() == (tree / "changed").read_bytes()


@pytest.mark.parametrize("entry", ["flake.nix", "configuration.nix", "nix/flake.nix"])
def test_an_entry_file_that_git_does_not_know(entry: str, site: Site) -> None:
    directory = site.host("a", {"bento.json": '{"format": 1, "directory": "nix"}' if "/" in entry else '{"format": 1}', "x": "x"})
    commit(site.fleet)
    (directory / "nix").mkdir()
    (directory / entry).write_text("{ }\n")
    site.host("new")
    ran = site.run("populate")
    assert [line for line in ran.errors if "error" in line] == [
        f"bento: error: a: hosts/a/{entry}: Git does not know it: 'git add' it, and what belongs to it",
        "bento: error: new: hosts/new/configuration.nix: Git does not know it: 'git add' it, and what belongs to it",
    ]


def test_submodules_are_part_of_it(site: Site) -> None:
    inner, outer = site.top / "inner", site.top / "outer"
    for where, files in ((inner, ("deep", "x~")), (outer, ("file",))):
        where.mkdir()
        for name in files:
            (where / name).write_text(f"{name}\n")
        commit(where)
    git(outer, "submodule", "--quiet", "add", str(inner), "inner")
    commit(outer)
    directory = site.host("a")
    commit(site.fleet)
    for name in ("here", "empty"):
        git(site.fleet, "submodule", "--quiet", "add", str(outer), f"hosts/a/{name}")
    git(site.fleet, "submodule", "--quiet", "update", "--init", "--recursive")
    commit(site.fleet)
    git(site.fleet, "submodule", "--quiet", "deinit", "hosts/a/empty")
    (directory / "here/inner/out").write_text("untracked\n")
    clone = directory / "clone"  # a repository that lies about is no submodule
    git(site.top, "clone", "-q", str(inner), str(clone))
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [
        f"bento: warning: {site.fleet}: 1 name untracked, left out: 'git add' what belongs to a host: hosts/a/clone",
        f"bento: warning: {directory}/here/inner: 1 name untracked, left out: 'git add' what belongs to a host: out",
    ])  # fmt: skip
    assert names(site) == [
        "configuration.nix", "empty", "here", "here/.gitmodules", "here/file", "here/inner", "here/inner/deep", "here/inner/x~",
    ]  # fmt: skip
    for number in range(27):
        (directory / f"link{number}").symlink_to(f"empty/modules/{number}")
    git(site.fleet, "add", "hosts/a/link*")
    ran = site.run("populate")
    assert ran.code == 0
    assert [line for line in ran.errors if "dangling" in line] == [
        f"bento: warning: {site.fleet}: 27 dangling links into submodules that are not there, left out: run"
        " 'git submodule update --init' there: hosts/a/link0, hosts/a/link1, hosts/a/link10, hosts/a/link11, hosts/a/link12, …"
    ]


def test_each_file_by_the_work_tree_it_lies_in(site: Site) -> None:
    """A host that is a link to a tree elsewhere, with links back; and links to what Git does not know."""
    other = site.top / "other"
    for name in ("configuration.nix", "sub/in", "sub/out", "lone/x"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("x\n")
    (site.fleet / "common").mkdir()
    for name in ("common/in", "common/out"):
        (site.fleet / name).write_text("x\n")
    links = {"common": site.fleet / "common", "file": other / "sub/in", "bad": other / "sub/out", "worse": other / "lone"}
    for name, target in links.items():
        (other / name).symlink_to(target)
    (site.fleet / "hosts/a").symlink_to(other)
    git(other, "init", "-q")
    git(other, "add", "configuration.nix", "sub/in", *links)
    git(site.fleet, "init", "-q")
    git(site.fleet, "add", "common/in", "hosts/a")
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [
        f"bento: warning: 2 dangling links left out: hosts/a/bad -> {other}/sub/out, hosts/a/worse -> {other}/lone",
        f"bento: warning: {site.fleet}: 1 name untracked, left out: 'git add' what belongs to a host: common/out",
        f"bento: warning: {other}: 2 names untracked, left out: 'git add' what belongs to a host: lone, sub/out",
    ])  # fmt: skip
    assert names(site) == ["common", "common/in", "configuration.nix", "file", "sub", "sub/in"]


def test_one_call_of_git_a_work_tree(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    share(site, *(f"h{number:03}" for number in range(100)))
    commit(site.fleet)
    calls = site.top / "calls"
    write_program(site.top / "bin/git", f'echo "$@" >>{calls}\nexec {need("git")} "$@"\n')
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    site.publish()
    assert calls.read_text().count("ls-files") == 2 and calls.read_text().count("\n") == 4
    calls.unlink()
    assert "102 unchanged" in site.publish().out
    assert calls.read_text().count("\n") == 1


def test_without_git(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = site.host("a", CONFIGURATION | {".env": "x", ".jj/x": "x", "x~": "x"})
    commit(site.fleet)
    for name in (".svn", ".hg", ".x.swp"):
        (directory / name).write_text("x")
    monkeypatch.setenv("PATH", str(site.top))
    site.publish()
    assert names(site) == [".env", "configuration.nix"]


def test_a_work_tree_that_git_cannot_read(site: Site) -> None:
    """Nothing of it is published, rather than all."""
    site.host("a", CONFIGURATION | {".env": "x"})
    site.host("b")
    commit(site.fleet)
    (site.fleet / ".git/index").write_bytes(b"garbage")
    ran = site.run("populate")
    assert ran.code == 1 and len(ran.errors) == 1
    assert ran.errors[0].startswith(f"bento: error: 2 hosts (a, b): {site.fleet}: git ls-files: ")


@pytest.mark.parametrize("who", ["root", "somebody"])
def test_nothing_that_a_work_tree_names_is_run(who: str, real_root: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by root, from a hook of another repository."""
    marker = site.top / "was run"
    program = f"sh -c 'touch \"{marker}\"; cat'"
    directory = site.host("a", CONFIGURATION | {"secret": "x\n", ".gitattributes": "* filter=evil diff=evil\n"})
    (directory / "module").mkdir()
    (directory / "module/x").write_text("x\n")
    commit(directory / "module")
    git(site.fleet, "init", "-q")
    git(site.fleet, "submodule", "--quiet", "add", "./hosts/a/module", "hosts/a/module")
    commit(site.fleet)
    for where in (site.fleet, directory / "module"):
        for name, value in {
            "core.fsmonitor": program, "core.hooksPath": str(site.top / "hooks"), "filter.evil.clean": program,
            "filter.evil.smudge": program, "filter.evil.process": program, "filter.evil.required": "true",
            "diff.evil.command": program, "diff.evil.textconv": program, "diff.external": program, "core.pager": program,
            "log.showSignature": "true", "gpg.program": program, "core.sshCommand": program, "core.editor": program,
            "alias.ls-files": f"!{program}", "core.alternateRefsCommand": program, "core.worktree": "/",
        }.items():  # fmt: skip
            if name != "core.worktree" or where == site.fleet:
                git(where, "config", name, value)
    for hook in ("post-index-change", "pre-auto-gc", "reference-transaction", "fsmonitor-watchman"):
        write_program(site.top / "hooks" / hook, f'touch "{marker}"\n')
    os.utime(directory / "secret", (5, 5))
    (directory / "module/x").write_text("changed\n")
    if who == "somebody":
        subprocess.run(["chown", "-R", "12345:12345", site.fleet], check=True)
    monkeypatch.setenv("GIT_DIR", str(site.top / "nowhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(site.top / "no index"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.fsmonitor")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", program)
    ran = site.publish()
    assert names(site) == [".gitattributes", "configuration.nix", "module", "module/x", "secret"]
    assert (site.current().revision or "").endswith(" first") and "+" not in (site.current().revision or "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    parents = [path for path in site.top.parents if path.stat().st_mode & 0o55 != 0o55]
    for path in (parents := [site.top, *parents]):  # pytest lets nobody else in
        path.chmod(0o711)
    try:
        ran = site.run("add", "b", "--key", str(write_key(site)))
    finally:
        for path in parents:
            path.chmod(0o700)
    assert ran.code == 0, ran.err
    assert not marker.exists()
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_CONFIG_COUNT"):
        monkeypatch.delenv(name)
    assert {path.stat().st_uid for path in (site.fleet / ".git").rglob("*")} == {12345 if who == "somebody" else 0}
    options = (f"--git-dir={site.fleet}/.git", f"--work-tree={site.fleet}", "-c", "core.fsmonitor=")
    listed = git(site.fleet, *options, "ls-files", "hosts/b*", "utils")
    assert listed.split() == ["hosts/b.pub", *sorted(["hosts/b/configuration.nix", "hosts/b/utils"]), "utils/bento.nix", "utils/bento_client.py"]


def write_key(site: Site, name: str = "b") -> Path:
    (site.top / "key").write_text(f"{key(name)}\n")
    return site.top / "key"


@pytest.fixture
def real_root() -> None:
    need_root()  # here: before `site` hides it


# --- revisions ---


def test_the_revision(site: Site) -> None:
    directory = site.host("a", CONFIGURATION | {"x": "x\n"})
    (directory / "link").symlink_to("x")
    site.host("b")
    commit(site.fleet, "make\tit \x1b[31mred\n\nand more")
    short = git(site.fleet, "rev-parse", "--short", "HEAD").strip()
    site.publish()
    assert site.current().revision == f"{short} make it [31mred"
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
    assert site.current().revision == f"{short}+ y"
    git(site.fleet, "add", "-A")
    (directory / "z").symlink_to("x")
    git(site.fleet, "add", "-N", "hosts/a/z")
    site.publish("--revision", "for\nthe weekend")
    assert site.current().revision == "for the weekend"
    lines = [json.loads(line) for line in (site.chroots / "a/history").read_text().splitlines()]
    assert [list(line) for line in lines] == [["time", "release", "revision", "system"]] * 4
    assert (lines[-1]["time"], lines[-1]["release"]) == (site.current().published, site.current().release)
    assert [line["revision"] for line in lines][1:] == [f"{short} y", f"{short}+ y", "for the weekend"]
    listed = site.run("log", "a", "--list").out.splitlines()
    assert len(listed) == 4 and listed[0].endswith("  published  for the weekend")


def test_a_revision_without_a_commit(site: Site) -> None:
    site.host("a")
    git(site.fleet, "init", "-q")
    git(site.fleet, "add", "-A")
    site.publish()
    assert site.current().revision is None
    assert json.loads((site.chroots / "a/current.json").read_text())["revision"] is None


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
    assert [line.split("  ")[-1] for line in site.run("log", "a", "--list").out.splitlines()] == ["number 1", "number 0"]
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


def test_status_shows_what_runs() -> None:
    now_s = client.parse_time("2026-11-23T10:25:02Z")
    up = CURRENT._replace(revision="1a2b3c4 mail: a new certificate, and more")
    report = REPORT._replace(last=LAST, revision="what the host says")
    rows = [
        bento.make_row(name, (current, report, now_s, ""), now_s, 7200)
        for name, current in (("same", up), ("other", up._replace(release="b" * 64)))
    ]
    wide = bento.format_table(rows, now_s, 140).splitlines()
    assert "aaaaaaa 1a2b3c4 mail: a new certifica… " in wide[1]
    assert "aaaaaaa what the host says " in wide[2]
    assert "mail" not in bento.format_table(rows, now_s, 100)
    assert [bento.row_json(row)["revision"] for row in rows] == [up.revision, report.revision]


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
    assert len(inodes(site, "ID.tar", "a", "b")) == 1


# --- the owner's own repository ---


def own_bento(site: Site, where: str) -> list[str]:
    """A copy of Bento in the owner's repository, and how it is started."""
    for name in ("bento.py", "bento_client.py", "fleet.nix.in", "utils/bento.nix"):
        target = site.fleet / where / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, target)
    (site.fleet / where / "utils/bento_client.py").symlink_to("../bento_client.py")
    start = "import os, sys; os.geteuid = lambda: 1000; import bento; sys.exit(bento.main(sys.argv[1:]))"
    return [sys.executable, "-c", start, "--fleet", ".", "--chroot-dir", str(site.chroots)]


def test_bento_in_the_owners_repository(site: Site) -> None:
    """As a submodule: the hosts link to it, Git knows what is made, and it is published."""
    argv = own_bento(site, "lib/bento")
    commit(site.fleet / "lib/bento")
    git(site.fleet, "init", "-q")
    git(site.fleet, "submodule", "--quiet", "add", "./lib/bento", "lib/bento")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(site.fleet / "lib/bento")}
        done = subprocess.run([*argv, *words], cwd=site.fleet, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    shutil.rmtree(site.fleet / "hosts")
    run("add", "a")
    run("add", "b", "--flake", "--key", str(write_key(site)))
    run("fleet")
    assert os.readlink(site.fleet / "hosts/a/utils") == "../../lib/bento/utils"
    assert git(site.fleet, "ls-files", "hosts", "fleet.nix").split() == [
        "fleet.nix", "hosts/a/configuration.nix", "hosts/a/utils", "hosts/b.pub", "hosts/b/configuration.nix",
        "hosts/b/flake.nix", "hosts/b/utils",
    ]  # fmt: skip
    assert run("populate").stderr.splitlines() == [NOT_ROOT]
    assert names(site) == ["configuration.nix", "utils", "utils/bento.nix", "utils/bento_client.py"]


def test_bento_beside_the_owners_repository(site: Site) -> None:
    """A flake input in the Nix store, say: the hosts get a copy in the fleet's directory."""
    git(site.fleet, "init", "-q")
    for name in "ab":
        assert site.run("add", name).code == 0
    assert os.readlink(site.fleet / "hosts/b/utils") == "../../utils"
    assert (site.fleet / "utils/bento_client.py").read_bytes() == (REPO / "bento_client.py").read_bytes()
    site.publish()
    assert names(site) == ["configuration.nix", "utils", "utils/bento.nix", "utils/bento_client.py"]


def test_a_merge_brings_back_no_examples(site: Site) -> None:
    """What changes in Bento's examples is no conflict for a copy that has hosts of its own."""
    assert (REPO / "hosts").is_symlink() and os.readlink(REPO / "hosts") == ".examples"
    theirs, ours = site.top / "theirs", site.top / "ours"
    shutil.copytree(REPO / ".examples", theirs / ".examples", symlinks=True)
    (theirs / "hosts").symlink_to(".examples")
    commit(theirs)
    git(site.top, "clone", "-q", str(theirs), str(ours))
    git(ours, "rm", "-q", "hosts")
    (ours / "hosts/mine").mkdir(parents=True)
    (ours / "hosts/mine/configuration.nix").write_text("{ }\n")
    commit(ours, "our own")
    (theirs / ".examples/nas/flake.nix").write_text("{ }\n")
    shutil.rmtree(theirs / ".examples/router")
    (theirs / ".examples/new").mkdir()
    (theirs / ".examples/new/flake.nix").write_text("{ }\n")
    commit(theirs, "other examples")
    git(ours, "pull", "-q", "--no-rebase", "--no-edit")
    assert os.listdir(ours / "hosts") == ["mine"] and git(ours, "status", "--short") == ""
    assert (ours / ".examples/new/flake.nix").exists()


def test_add_a_link(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("x", {"flake.nix": "{ }\n"})
    (site.fleet / "hosts/x").rename(site.fleet / "all")
    (site.top / "other").mkdir()
    (site.top / "other/flake.nix").write_text("{ }\n")
    monkeypatch.chdir(site.fleet)
    ran = site.run("add", "a", "--link", "all", "--key", str(write_key(site, "a")))
    assert (ran.code, ran.out.splitlines()[:2]) == (0, ["hosts/a: made, a link to ../all", "hosts/a.pub: 1 key"])
    assert site.run("add", "b", "--link", "../other").out.splitlines()[0] == f"hosts/b: made, a link to {site.top}/other"
    assert site.run("add", "c", "--link", "..").out.splitlines()[0] == "hosts/c: made, a link to ../.."
    assert (site.run("add", "d", "--link", "gone").code, os.path.lexists(site.fleet / "hosts/d")) == (1, False)
    assert site.run("add", "d", "--link", "all", "--flake").code == 2
    site.publish("a", "b")


def test_a_fleet_in_the_flakes_own_repository(site: Site) -> None:
    """What it says of hosts is not part of what they are."""
    (site.fleet / "fleet/hosts/own").mkdir(parents=True)
    (site.fleet / "fleet/utils").mkdir()
    for name in ("flake.nix", "fleet/utils/bento.nix", "fleet/hosts/own/configuration.nix", "fleet/hosts/waves", "fleet/hosts/a.pub"):
        (site.fleet / name).write_text(f"{key('a')}\n" if name.endswith("pub") else "{ }\n")
    shutil.rmtree(site.fleet / "hosts")
    for name, target in (("a", "../.."), ("b", "a"), ("c", "../..")):
        (site.fleet / "fleet/hosts" / name).symlink_to(target)
    commit(site.fleet)
    site.fleet /= "fleet"
    assert site.publish().out.splitlines()[-1] == "4 hosts: 4 published, 0 unchanged, 0 failed"
    assert names(site) == [
        "flake.nix", "fleet", "fleet/hosts", "fleet/hosts/own", "fleet/hosts/own/configuration.nix", "fleet/utils",
        "fleet/utils/bento.nix",
    ]  # fmt: skip
    (site.fleet / "hosts/elsewhere.sig").write_text("signed\n")
    (site.fleet / "hosts/a.pub").write_text(f"{key('b')}\n")
    git(site.fleet, "add", "-A")
    assert "4 unchanged" in site.publish().out


def test_the_keys_that_the_server_does_not_know(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        site.host(name)
    assert site.run("add", "a", "--key", str(write_key(site, "a"))).code == 0
    assert site.run("fleet").code == 0
    site.publish()
    for name in "bc":
        assert site.run("add", name, "--key", str(write_key(site, name))).code == 0
    word = "bento: warning: this server does not know the keys of 2 hosts yet (b, c): run 'bento.py fleet', and switch this server to it"
    for command in ("populate", "status"):
        ran = site.run(command)
        assert (ran.code, ran.errors) == (0, [word])
    assert site.run("fleet").code == 0
    assert site.publish().errors == []
    (site.top / "keys").mkdir()
    monkeypatch.setattr(bento, "AUTHORIZED_KEYS", site.top / "keys")
    for name in "ab":
        (site.top / "keys" / f"bento-{name}").write_text(f"restrict {key(name)}\n")
    assert site.run("populate").errors == [
        "bento: warning: this server does not know the keys of 1 host yet (c): switch this server to fleet.nix"
    ]


LOCK = {
    "nodes": {
        "root": {"inputs": {"a": "a", "b": "b", "c": "c", "d": "d"}},
        "a": {"locked": {"type": "github", "owner": "x", "repo": "y", "rev": "1"}},
        "b": {"locked": {"type": "path", "path": "/srv/secrets"}},
        "c": {"locked": {"type": "git", "url": "file:///srv/repo"}},
        "d": {"locked": {"type": "path", "path": "./sub"}},
    }
}


def test_an_input_that_only_this_server_has(site: Site) -> None:
    site.host("a", {"flake.nix": "{ }\n", "flake.lock": json.dumps(LOCK)})
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [
        "bento: warning: only this server can build a flake with an input in its own files:"
        " hosts/a: b (/srv/secrets), hosts/a: c (file:///srv/repo)"
    ])  # fmt: skip
    assert site.publish().errors == []  # said when it is published


def test_update_leaves_the_work_tree_alone(site: Site) -> None:
    """Nix gets what is tracked, not the repository's own files and what lies about, and the lock finds its way back."""
    directory = site.host("a", {"flake.nix": "{ }\n", "sub/flake.nix": "{ }\n"})
    site.host("b", {"bento.json": '{"format": 1, "directory": "sub"}', "sub/flake.nix": "{ }\n"})
    commit(site.fleet)
    (directory / ".env").write_text("secret\n")
    write_program(
        site.top / "bin/nix",
        'for word; do case $word in path:*) url=${word#path:};; esac; done\ncase $1 in --version) echo "nix (Nix) 2.24.1"; exit;; esac\n'
        f'tree=${{url%%\\?*}}; echo "$url" | sed "s,.*/,," >>{site.top}/urls; ls -A "$tree" >>{site.top}/seen\n'
        'dir=${url#"$tree"}; echo "{\\"nodes\\": {\\"root\\": {}}}" >"$tree/${dir#?dir=}/flake.lock"\n',
    )
    done = run_outside(site, "update", PATH=f"{site.top}/bin:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (0, "hosts/a: nothing moved\nhosts/b: nothing moved\n"), done.stderr
    assert (site.top / "urls").read_text() == "config\nconfig?dir=sub\n"
    assert (site.top / "seen").read_text().split() == ["flake.nix", "sub", "bento.json", "sub"]
    assert json.loads((directory / "flake.lock").read_text()) == {"nodes": {"root": {}}}
    assert git(site.fleet, "ls-files", "hosts/a/flake.lock", "hosts/b/sub/flake.lock").split() == [
        "hosts/a/flake.lock", "hosts/b/sub/flake.lock",
    ]  # fmt: skip


# --- how a release is built ---


@pytest.mark.parametrize(
    ("entry", "version", "where"),
    [
        ("flake.nix", "nix (Nix) 2.24.0", "path:DIR/config?dir=nix#{}"), ("flake.nix", "nix (Nix) 3.1", "path:DIR/config?dir=nix#{}"),
        ("flake.nix", "nix (Nix) 2.18.5", "path:DIR/config/nix#{}"), ("flake.nix", "nix (Lix, like Nix) 2.91.0", "path:DIR/config/nix#{}"),
        ("flake.nix", "", "path:DIR/config/nix#{}"), ("configuration.nix", "", "nixos-config=DIR/config/nix/configuration.nix"),
    ],
)  # fmt: skip
def test_bento_json_is_for_both_sides(
    entry: str, version: str, where: str, site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server runs, the host runs: attribute, directory, options, for a tree that hosts share."""
    recipe = {"format": 1, "directory": "nix", "options": ["--impure"], "hosts": {
        "a": {"attribute": "web1.example.org", "options": ["--accept-flake-config", "--option", "cores", "1"]},
    }}  # fmt: skip
    site.host("x", {"bento.json": json.dumps(recipe), f"nix/{entry}": "{ }\n"})
    (site.fleet / "hosts/x").rename(site.fleet / "all")
    for name in "ab":
        (site.fleet / "hosts" / name).symlink_to("../all")
    write_program(site.top / "bin/nixos-rebuild", f'for word; do echo "$word"; done >>{site.top}/words\n')
    write_program(site.top / "bin/nix", f'echo "{version}"\n')
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    site.publish("--check")
    words = (site.top / "words").read_text()
    wanted = f"dry-build {'--flake' if 'flake' in entry else '--no-flake -I'} {where}"
    options = {"a": "--accept-flake-config --option cores 1", "b": "--impure"}
    attributes = {"a": "web1.example.org", "b": "b"}
    found = re.sub(r"(path:|nixos-config=)/\S+?/config(?=[/?])", r"\1DIR/config", " ".join(words.split()))
    assert found == " ".join(f"{wanted.format(attributes[name])} {options[name]}" for name in "ab")
    for name in "ab":
        (site.top / name).mkdir()
        client.unpack(site.tar(name), site.top / name / "config")
        settings = client.Settings(server=("s",), host=name, state_dir=str(site.top / name), upgrade_channels=True)
        argv = " ".join(client.build_argv(settings, site.top / name / "config")).replace(f"{site.top}/{name}/", "DIR/")
        upgrade = "" if "flake" in entry else " --upgrade"
        assert argv == f"nixos-rebuild {wanted.replace('dry-', '').format(attributes[name])} {options[name]}{upgrade}"


def test_a_flake_in_a_directory_with_nix(real_nix: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a dotted name, as nixos-rebuild quotes it."""
    made = 'derivation { name = "nixos-system-x"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo made > $out" ]; }'
    site.host("a", {
        "bento.json": '{"format": 1, "directory": "nix", "attribute": "web1.example.org"}',
        "nix/flake.nix": '{ outputs = _: { nixosConfigurations."web1.example.org".config.system.build.toplevel = import ./x.nix; }; }\n',
        "nix/x.nix": made,
    })  # fmt: skip
    write_program(
        site.top / "bin/nixos-rebuild",
        'name=${3#*#}\nexec nix --extra-experimental-features "nix-command flakes" build --option sandbox false'
        ' --option build-users-group "" --option substitute false --out-link result'
        ' "${3%%#*}#nixosConfigurations.\\"$name\\".config.system.build.toplevel"\n',
    )
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(site.top))
    site.publish("--build")
    system = site.current().system
    assert system is not None and Path(system).read_text() == "made\n"
    assert build_as_the_host(site, "a", site.top / "work") == system
    check_chroot(site.chroots / "a")  # without the lock that Nix made


def test_a_host_whose_client_does_not_know_bento_json(site: Site) -> None:
    site.host("a")
    site.publish()
    before = site.current()
    site.host("a", {"bento.json": '{"format": 1, "hosts": {"b": {"attribute": "x"}}}'})
    site.write_report(client="1.0")
    site.publish()  # nothing in it is for this host
    for version, good in (("1.0", False), ("0.9", False), ("?", False), ("1.1", True), ("1.10", True), ("2.0", True)):
        site.host("a", {"bento.json": '{"format": 1, "options": ["--impure"]}', "version": version})
        site.write_report(client=version)
        ran = site.run("populate")
        assert ran.code == (0 if good else 1)
        assert ran.errors == [] if good else ran.errors[0].startswith(
            f"bento: error: a: its client, version {version}, does not know bento.json and would build something else"
        )  # fmt: skip
    assert site.current() != before
    site.host("new", {"bento.json": '{"format": 1, "options": ["--impure"]}'} | CONFIGURATION)
    site.publish("new")
    site.host("bad", {"bento.json": '{"format": 2}'} | CONFIGURATION)
    assert site.run("populate", "bad").errors == [
        "bento: error: bad: hosts/bad/bento.json: format 2, this version of Bento knows format 1: update Bento on this machine"
    ]


# --- in CI, and in hooks ---


def test_wait_for_another_populate(site: Site) -> None:
    """A second push, while the first is published, is published after it."""
    site.host("a")
    with bento.populate_lock(bento.Fleet(site.fleet, site.chroots)):
        argv = [sys.executable, "-c", AS_ANYBODY, *site.argv("populate", "--wait")]
        process = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while "flock" not in Path(f"/proc/{process.pid}/wchan").read_text() and not waits_for_lock(process.pid):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        site.host("late")
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "2 hosts: 2 published, 0 unchanged, 0 failed"
    assert stat.S_IMODE((site.chroots / ".lock").stat().st_mode) == 0o600


def waits_for_lock(pid: int) -> bool:
    return any(f" {pid} " in line and "->" in line for line in Path("/proc/locks").read_text().splitlines())


def test_json(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    toy_host(site, "bad", build="eval-error")
    site.host("worse", {"x": "x"})

    def told(*words: str) -> list[dict[str, Any]]:
        return sorted((json.loads(line) for line in site.run(*words).out.splitlines()), key=lambda told: str(told["host"]))

    good, bad, worse = told("check", "--json")
    assert good == {
        "host": "a", "result": "evaluates", "release": good["release"], "size": good["size"], "revision": None, "system": None,
    }  # fmt: skip
    assert (bad["result"], bad["error"].splitlines()[-1]) == ("failed", "  error: The option `services.toy' does not exist.")
    assert worse == {"host": "worse", "result": "failed", "error": "hosts/worse: neither flake.nix nor configuration.nix in it"}
    assert [line["result"] for line in told("build", "a", "--json")] == ["built"]
    results = {
        ("--dry-run",): "would-publish", ("--build", "--revision", "r"): "published", (): "unchanged", ("--dry-run", "--check"): "unchanged",
    }  # fmt: skip
    for words, result in results.items():
        (line,) = told("populate", "a", "--json", *words)
        assert line["result"] == result
    assert (line["release"], line["revision"]) == (site.current().release, "r")


def test_one_line_for_the_same_error(site: Site, toys: Path) -> None:
    write_config(site.fleet / "all", flake=True, host={f"h{n}": {} for n in range(7)}, build="eval-error")
    for number in range(7):
        (site.fleet / "hosts" / f"h{number}").symlink_to("../all")
    toy_host(site, "own", build="eval-error")
    ran = site.run("populate", "--check")
    assert ran.out == "8 hosts: 0 published, 0 unchanged, 8 failed\n"
    (error,) = [line for line in ran.errors if line.startswith("bento: error: ")]
    assert error.startswith("bento: error: 8 hosts (h0, h1, h2, h3, h4, …): nixos-rebuild dry-build: exit 1;")
    for name in ("x", "y"):  # other places to look at
        site.host(name).joinpath("configuration.nix").unlink()
    assert site.run("populate", "x", "y").errors == [
        f"bento: error: {name}: hosts/{name}: neither flake.nix nor configuration.nix in it" for name in "xy"
    ]


def test_a_dry_run_needs_no_accounts(site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_host(site, "no-such-account")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(bento, "log_directory", lambda: site.top / "log")
    assert site.run("populate", "--dry-run").out.splitlines()[-1] == "1 host: 1 would be published, 0 unchanged, 0 failed"
    assert site.run("check").code == 0
    assert not site.chroots.exists()


def test_a_dry_run_of_what_it_may_not_read(real_root: None, site: Site) -> None:
    """A person's, on the server."""
    site.host("a")
    site.publish()
    for path in [site.top, *site.top.parents]:
        if path.stat().st_mode & 0o5 != 0o5:
            path.chmod(path.stat().st_mode | 0o5)
    argv = [need("setpriv"), "--reuid=12345", "--regid=12345", "--clear-groups", sys.executable, str(REPO / "bento.py")]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*argv, *site.argv("populate", "--dry-run")], env=environment, capture_output=True, text=True, cwd="/")
    assert done.stdout.splitlines()[-1:] == ["1 host: 1 would be published, 0 unchanged, 0 failed"], done.stderr


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


# --- pruning ---


def without_fleet(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("BENTO_DIR", str(site.fleet))
    return ["--chroot-dir", str(site.chroots), "populate", "--prune"]


def test_prune_of_another_fleet(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a copy that lies about: the owner's chroots stay, and nothing of it is published."""
    for name in ("one", "two", "three"):
        site.host(name)
    site.publish()
    shutil.rmtree(site.fleet / "hosts")
    site.host("example")
    site.host("one")
    before = snapshot(site.chroots)
    words = (
        f"bento: error: --prune would remove 2 of 3 chroots in {site.chroots}, so nothing was done:"
        f" if {site.fleet} is their fleet, say so with --fleet\n"
    )
    for more in ([], ["--dry-run"]):
        assert bento.main([*without_fleet(site, monkeypatch), *more]) == 1
        assert site.capsys.readouterr().err.removeprefix(f"{NOT_ROOT}\n").endswith(words)
        after = snapshot(site.chroots)
        assert {path: after[path] for path in after if ".lock" not in path} == {
            path: before[path] for path in before if ".lock" not in path
        }
    site.host("two")
    assert bento.main(without_fleet(site, monkeypatch)) == 0  # one of three may be gone
    assert not (site.chroots / "three").exists()
    shutil.rmtree(site.fleet / "hosts/two")
    shutil.rmtree(site.fleet / "hosts/one")
    assert site.publish("--prune").out.count("removed") == 2  # as it was said which fleet


def test_prune_removes_only_what_is_ours(site: Site) -> None:
    site.host("a")
    site.publish()
    release = site.current().release
    foreign = {
        "app": ("releases/20261125/index.html",), "mixed": (f"releases/{release}.tar", "releases/notes"), "empty": (),
        "more": (f"releases/{release}.tar", "photos/x.jpg"), "bare": (f"{release}.tar",),
    }  # fmt: skip
    for name, files in foreign.items():
        (site.chroots / name / "releases").mkdir(parents=True)
        for file in files:
            (site.chroots / name / file).parent.mkdir(parents=True, exist_ok=True)
            (site.chroots / name / file).write_text("x")
    shutil.copytree(site.chroots / "a", site.chroots / "gone", symlinks=True)
    assert site.publish("--prune").out.startswith(f"gone: removed {site.chroots}/gone\n1 host: ")
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a", *foreign}


def test_prune_ends_what_is_open(real_root: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "gone"):
        site.host(name)
    site.publish()
    shutil.rmtree(site.fleet / "hosts/gone")
    user = types.SimpleNamespace(pw_uid=64321)
    monkeypatch.setattr(pwd, "getpwnam", lambda name: user if name == "bento-gone" else pwd.getpwuid(0))
    monkeypatch.setattr(bento, "GCROOTS", site.top / "roots")
    monkeypatch.setattr(bento, "find_owner", lambda name: None)
    sleep = f"import os, time; os.setuid({user.pw_uid}); print(flush=True); time.sleep(600)"
    session = subprocess.Popen([sys.executable, "-c", sleep], stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", sleep.replace("64321", "64322")], stdout=subprocess.PIPE)
    try:
        for process in (session, other):
            assert process.stdout is not None
            process.stdout.readline()
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        site.publish("--prune", "--dry-run")
        assert session.poll() is None
        site.publish("--prune")
        assert session.wait(timeout=30) == -signal.SIGKILL and other.poll() is None
    finally:
        for process in (session, other):
            process.kill()
            process.wait()


# --- command line ---


@pytest.mark.parametrize(
    "arguments", [[], ["what"], ["add"], ["log"], ["populate", "--check", "--build"], ["status", "--offline-after", "x"]]
)
def test_usage(arguments: list[str], site: Site) -> None:
    ran = site.run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: bento.py")
    assert not site.chroots.exists()


def test_watching_goes_to_no_file(site: Site) -> None:
    message = "bento: error: --output goes with a status that ends, not with --watch\n"
    assert site.run("status", "--watch", "--output", str(site.top / "x")) == Ran(2, "", message)


def test_a_fleet_that_is_not_there(site: Site) -> None:
    shutil.rmtree(site.fleet)
    for command in (["populate"], ["status"], ["check"], ["log", "a"]):
        ran = site.run(*command)
        assert ran.code == 1
        assert ran.err == (
            f"bento: error: {site.fleet}/hosts: No such file or directory: --fleet names the directory that has hosts/ in it\n"
        )


def test_the_environment_names_the_directories(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("a")
    monkeypatch.setenv("BENTO_DIR", str(site.fleet))
    monkeypatch.setenv("BENTO_CHROOT_DIR", str(site.chroots))
    assert bento.main(["populate"]) == 0
    check_chroot(site.chroots / "a")


def test_no_traceback_when_the_reader_goes(site: Site) -> None:
    for number in range(2000):
        (site.fleet / f"hosts/host-{number}").mkdir()
    argv = [sys.executable, "-c", AS_ANYBODY, *site.argv("status")]
    process = subprocess.Popen(
        argv, env=os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(20)) == (b"", 1)


# --- what a review found ---


def test_a_full_disk_does_not_bar_the_pruning(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no room for even a directory, and pruning is what makes some."""
    for name in ("a", "b"):
        site.host(name)
    site.publish()
    shutil.rmtree(site.fleet / "hosts/b")
    mkdir = Path.mkdir

    def full(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if path.name == ".copies":
            raise OSError(28, "No space left on device", str(path))
        mkdir(path, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", full)
    site.publish("--prune")
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a"}
    site.host("a", {"configuration.nix": "{ } # new\n"})
    site.publish()
    check_chroot(site.chroots / "a")


def test_a_host_that_fails_keeps_no_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shared with others is not on disk any more when the next host begins."""
    share(site, "a", "b", "c")
    place, examine, left = bento.place, bento.examine, []

    def full(chroot: Path, *rest: Any) -> Current:
        if chroot.name == "a":
            raise OSError(28, "No space left on device")
        return place(chroot, *rest)

    def watch(work: bento.Work, name: str) -> Any:
        new = site.chroots / ".store/.new"
        left.append((name, sum(entry.endswith(".tar") for entry in os.listdir(new)) if new.exists() else 0))
        return examine(work, name)

    monkeypatch.setattr(bento, "place", full)
    monkeypatch.setattr(bento, "examine", watch)
    assert site.run("populate").errors == ["bento: error: a: [Errno 28] No space left on device"]
    assert left[:3] == [("a", 0), ("b", 0), ("c", 1)]


@pytest.mark.parametrize("how", ["--check", "--build"])
def test_what_has_passed_does_not_wait_for_the_others(
    how: str, site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "c"]
    for name in names:
        write_config(site.fleet / "hosts" / name, flake=True, host=name)
    rebuild, published = bento.rebuild, []

    def watch(*arguments: Any) -> str | None:
        published.append([name for name in names if (site.chroots / name / "current.json").exists()])
        return rebuild(*arguments)

    monkeypatch.setattr(bento, "rebuild", watch)
    site.publish(how)
    assert published == [[], ["a"], ["a", "b"]]


def test_a_chroot_that_cannot_be_removed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host goes on writing, say. It stops neither the others nor the publication, and is removed the next time."""
    for name in ("a", "gone", "lost"):
        site.host(name)
    site.publish()
    for name in ("gone", "lost"):
        shutil.rmtree(site.fleet / "hosts" / name)
    site.host("a", {"configuration.nix": "{ } # new\n"})
    remove = client.remove

    def busy(path: Path) -> None:
        if path.parent.name == "gone" and path.name == "logs":
            raise OSError(39, "Directory not empty", "logs")
        remove(path)

    with monkeypatch.context() as patched:
        patched.setattr(client, "remove", busy)
        ran = site.run("populate", "--prune")
    assert (ran.code, ran.errors) == (1, ["bento: error: gone: [Errno 39] Directory not empty: 'logs'"])
    assert f"lost: removed {site.chroots / 'lost'}\n" in ran.out and "gone: removed" not in ran.out
    assert "1 host: 1 published, 0 unchanged, 0 failed" in ran.out
    assert not (site.chroots / "gone/current.json").exists()
    assert f"gone: removed {site.chroots / 'gone'}\n" in site.publish("--prune").out
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a"}


def run_outside(site: Site, *words: str, shell: str = 'exec "$@"', **env: str) -> subprocess.CompletedProcess[str]:
    """bento.py as a process of its own, started by a shell."""
    argv = ["bash", "-c", shell, "bash", sys.executable, "-c", AS_ANYBODY, *site.argv(*words)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""} | env
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)


def test_a_reader_that_goes_stops_no_publication(site: Site) -> None:
    for number in range(6):
        site.host(f"h{number}")
    done = run_outside(site, "populate", shell='"$@" | true; exit "${PIPESTATUS[0]}"')
    assert (done.returncode, done.stderr) == (1, f"{NOT_ROOT}\n")
    for number in range(6):
        check_chroot(site.chroots / f"h{number}")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_output(closed: str, site: Site) -> None:
    site.host("a")
    for words in (["populate"], ["status"]):
        done = run_outside(site, *words, shell=f'exec "$@" {">&-" if closed == "stdout" else "2>&-"}')
        assert done.returncode == 0 and "Traceback" not in done.stderr
    check_chroot(site.chroots / "a")


def test_no_hosts_are_not_all_hosts(site: Site) -> None:
    """A directory that is not mounted must not lock the whole fleet out."""
    shutil.rmtree(site.fleet / "hosts")
    ran = site.run("fleet")
    assert (ran.code, len(ran.errors)) == (1, 1) and "hosts: No such file or directory" in ran.errors[0]
    assert not (site.fleet / "fleet.nix").exists()


def test_an_editors_leftovers_are_no_keys(site: Site) -> None:
    site.host("a")
    (site.fleet / "hosts/a.pub").write_text(f"{key('a')}\n")
    (site.fleet / "hosts/.#a.pub").symlink_to("somebody@somewhere.1234")
    (site.fleet / "hosts/._b.pub").write_bytes(b"\0\5\x16\7")
    site.publish()
    assert site.run("fleet").out.startswith("fleet.nix: written, 1 host;")


def test_a_locale_changes_no_release(site: Site, tmp_path: Path) -> None:
    env = latin_1(tmp_path)
    site.host("a", CONFIGURATION | {"ü.nix": "x"})
    done = run_outside(site, "populate", **env)
    assert done.returncode == 1 and "this locale is not UTF-8: run this with PYTHONUTF8=1" in done.stderr
    assert run_outside(site, "populate", PYTHONUTF8="1", **env).returncode == 0
    check_chroot(site.chroots / "a")
    (site.fleet / "hosts/a.pub").write_text(f"{key('a')}\n")
    assert run_outside(site, "fleet", **env).returncode == 0
    assert "AAAA…" in (site.fleet / "fleet.nix").read_text("utf-8")


@pytest.mark.parametrize("lock", ["<<<<<<< ours\n", '{"nodes": {"root": {"inputs": {"x": "x"}}, "x": {"locked": []}}}'])
def test_a_malformed_lock_file_stops_no_other_flake(lock: str, site: Site, tmp_path: Path) -> None:
    nix = tmp_path / "path/nix"
    nix.parent.mkdir()
    nix.write_text("#!/bin/sh\necho nix 2.26\n")
    nix.chmod(0o755)
    for name in ("a", "b"):
        site.host(name, {"flake.nix": "{ }\n"})
    (site.fleet / "hosts/a/flake.lock").write_text(lock)
    done = run_outside(site, "update", PATH=f"{nix.parent}:{os.environ['PATH']}")
    assert done.returncode == 1 and done.stdout == "hosts/b: nothing moved\n"
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("bento: error: hosts/a: ")


@pytest.mark.parametrize("option", ["--fleet", "--chroot-dir"])
def test_what_an_unset_variable_gives_is_no_default(option: str, site: Site) -> None:
    ran = site.run(option, "", "populate", "--prune")
    assert ran.code == 2 and "it is empty" in ran.err


def test_output_into_a_directory(site: Site) -> None:
    ran = site.run("status", "--output", str(site.top))
    assert (ran.code, ran.err) == (2, f"bento: error: --output {site.top}: this is a directory: name a file\n")


def test_add_takes_what_a_key_file_may_have(site: Site) -> None:
    file = site.top / "key.pub"
    file.write_text(f"# of the laptop\n\n{key('a')}\n")
    assert site.run("add", "a", "--key", str(file)).code == 0
    assert (site.fleet / "hosts/a.pub").read_text() == f"{key('a')}\n"


def test_add_over_a_dangling_link(site: Site) -> None:
    (site.fleet / "hosts/a").symlink_to("gone")
    assert site.run("add", "a").err == "bento: error: hosts/a is there already\n"
    assert os.listdir(site.fleet / "hosts") == ["a"]


def test_an_end_by_signal_ends_the_build_too(site: Site, toys: Path) -> None:
    """It has a session of its own, and would go on without the lock."""
    write_config(site.fleet / "hosts/a", flake=True, host="a", build="hang", build_touch=str(site.top / "begun"))
    argv = [sys.executable, "-c", AS_ANYBODY, *site.argv("populate", "--build")]
    process = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(REPO)}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (site.top / "begun").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted; nothing partial is published" in said
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_a_hostile_log_does_not_keep_the_list_busy(site: Site) -> None:
    """A pattern that tries every way to end such a line takes seconds for each of these: more than this test waits."""
    site.host("a")
    site.publish()
    logs = site.chroots / "a/logs"
    for number in range(60):
        text = "bento: a: " * 136 + " " * 2730 + "\nx"
        (logs / f"20261123T1015{number:02}Z_{'a' * 12}_ok.log").write_text(text)
    assert run_outside(site, "log", "a", "--list").stdout.count("  ok") == 60


def test_a_fleet_in_the_nix_store_keeps_its_own_links(site: Site) -> None:
    """What leads elsewhere in the store is left out, like a forgotten `result`."""
    need("nix")
    try:
        os.makedirs("/nix/store", exist_ok=True)
        top = Path(tempfile.mkdtemp(prefix="bento-test-", dir="/nix/store"))
    except OSError:
        _missing("needs a Nix store that it can write to")
    try:
        shutil.copytree(site.fleet, top / "fleet")
        site.fleet = top / "fleet"
        site.host("a")
        share(site, "b")
        (site.fleet / "hosts/b/result").symlink_to("/nix/store")
        (site.fleet / "hosts/b/other").symlink_to("/nix/store/.links")
        assert "link out of the fleet directory" in site.run("populate").errors[0]  # the store itself is no path in it
        (site.fleet / "hosts/b/result").unlink()
        site.publish()
        assert set(os.listdir(site.chroots / "b/config")) == {"configuration.nix", "utils"}
    finally:
        shutil.rmtree(top)


def test_a_garbage_collection_root_goes_with_its_host(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "gone"):
        site.host(name)
    site.publish()
    shutil.rmtree(site.fleet / "hosts/gone")
    roots = tmp_path / "gcroots"
    roots.mkdir()
    for name in ("a", "gone"):
        (roots / name).symlink_to("/nix/store/x")
    monkeypatch.setattr(bento, "GCROOTS", roots)
    monkeypatch.setattr(bento, "find_owner", lambda name: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    site.publish("--prune")
    assert os.listdir(roots) == ["a"] and not (site.chroots / "gone").exists()
