"""The server: releases, what is refused, publication, checks and builds, fleet.nix, status, and hostile logs."""

import base64
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
from toynixos import TOY, _missing, latin_1, need, need_nix, write_config

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
    assert set(os.listdir(chroot)) == {"current.json", "config", "releases", "logs"}
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
        # The second time for the two that are links to it.
        *["hosts/a/configuration.nix as configuration.nix"] * 2,
        "hosts/b/configuration.nix as configuration.nix", "hosts/c/configuration.nix as configuration.nix",
    ]  # fmt: skip
    assert [path for path in read if "bento.nix" in path] == ["utils/bento.nix as utils/bento.nix"]


@pytest.mark.parametrize("room", [0, 1600, 8 << 20])
def test_what_hosts_share_makes_no_other_release(room: int, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bento, "COMMON_BYTES", room)
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
    return {(site.chroots / host / "config" / name).stat().st_ino for host in hosts}


def test_what_hosts_share_is_on_disk_once(site: Site) -> None:
    share(site, "a", "b", "c")
    site.publish()
    for name in ("utils/bento.nix", "utils/sub/script"):
        assert len(inodes(site, name, "a", "b", "c")) == 1
    assert len(inodes(site, "configuration.nix", "a", "b", "c")) == 3
    assert len(inodes(site, "configuration.nix", "like-1", "like-2")) == 1
    assert set(os.listdir(site.chroots)) == {".lock", "a", "b", "c", "like-1", "like-2"}
    # A release of later has its own copies: what is published is never linked to again.
    site.host("d", {"configuration.nix": "{ }\n"})
    (site.fleet / "hosts/d/utils").symlink_to("../../utils")
    site.publish()
    assert len(inodes(site, "utils/bento.nix", "a", "d")) == 2
    for name in ("a", "b", "c", "d", "like-1", "like-2"):
        check_chroot(site.chroots / name)


def test_where_links_cannot_be_made_each_host_has_its_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file has as many links as it can have, or a chroot is a file system of its own."""
    share(site, "a", "b", "c")
    link, made = os.link, 0

    def few(source: str, target: str) -> None:
        nonlocal made
        made += 1
        if made > 5:
            raise OSError(31, "Too many links", source)
        link(source, target)

    monkeypatch.setattr(os, "link", few)
    site.publish()
    assert len(inodes(site, "utils/bento.nix", "a", "b", "c")) > 1
    for name in ("a", "b", "c", "like-1", "like-2"):
        check_chroot(site.chroots / name)


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


@pytest.mark.parametrize("how", ["--check", "--build"])
def test_a_tree_that_is_built_shares_nothing(how: str, site: Site, toys: Path) -> None:
    """Nix may write to its flake.lock."""
    share(site, "a", "b")
    for name in ("a", "b"):
        write_config(site.fleet / "hosts" / name, flake=False, host=name, client=None)
    site.publish(how)
    assert len(inodes(site, "utils/bento.nix", "a", "b")) == 2


def test_an_error_in_what_hosts_share_names_each_host(site: Site) -> None:
    utils = share(site, "a", "b")
    site.host("c")
    (utils / "sub/x").symlink_to("gone")
    ran = site.run("populate")
    hosts = ("a", "b", "like-1", "like-2")
    assert ran.errors == [f"bento: error: {name}: hosts/{name}/utils/sub/x: dangling link to gone" for name in hosts]
    check_chroot(site.chroots / "c")


def test_a_loop_through_what_hosts_share(site: Site) -> None:
    share(site, "a", "b")
    (site.fleet / "utils/deep").symlink_to("../hosts/b")
    site.host("c")
    (site.fleet / "hosts/c/b").symlink_to("../b")
    loop = "link loop: it leads to a directory that it is in"
    ran = site.run("populate")
    assert ran.errors == [
        f"bento: error: a: hosts/a/utils/deep/utils: {loop}", f"bento: error: b: hosts/b/utils/deep: {loop}",
        f"bento: error: c: hosts/c/b/utils/deep: {loop}", f"bento: error: like-1: hosts/like-1/utils/deep/utils: {loop}",
        f"bento: error: like-2: hosts/like-2/utils/deep/utils: {loop}",
    ]  # fmt: skip


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
    assert ran.errors == [f"bento: error: {name}: hosts/{name}/{words}" for name in ("a", "like-1", "like-2")]
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
    stage = bento.stage

    def change(chroot: Path, *arguments: Any) -> bento.Staged:
        found = stage(chroot, *arguments)
        (utils / "file").write_bytes(after)
        return found

    monkeypatch.setattr(bento, "stage", change)
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
    "dangling link": (lambda d: (d / "x").symlink_to("gone"), "hosts/bad/x: dangling link to gone"),
    "link to itself": (lambda d: (d / "x").symlink_to("x"), "hosts/bad/x: link loop (Too many levels of symbolic links)"),
    "link upwards": (climb, "hosts/bad/sub/up: link loop: it leads to a directory that it is in"),
    "link out": (out_of_fleet, "hosts/bad/sub/secret: link out of the fleet directory, to @TOP@/secret"),
    "FIFO": (
        lambda d: os.mkfifo(d / "x"),
        "hosts/bad/x: neither a file nor a directory (a socket, FIFO or device)",
    ),
    "link to a FIFO": (
        link_to_fifo,
        "hosts/bad/x: neither a file nor a directory (a socket, FIFO or device)",
    ),
    "socket": (
        lambda d: bind_socket(d / "x"),
        "hosts/bad/x: neither a file nor a directory (a socket, FIFO or device)",
    ),
    "name that is not UTF-8": (
        lambda d: Path(os.fsdecode(os.fsencode(d) + b"/\xff\n")).write_text("x"),
        "'hosts/bad/\\udcff\\n': the name is not UTF-8: rename it",
    ),
    "no configuration": (
        lambda d: (d / "configuration.nix").rename(d / "x.nix"),
        "hosts/bad: neither flake.nix nor configuration.nix in it",
    ),
    "dangling host": (replace_by_link, "hosts/bad: dangling link"),
    "control characters": (lambda d: (d / "\x1b[31m\n").symlink_to("gone"), "hosts/bad/ [31m: dangling link to gone"),
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
    (directory / "x").symlink_to("gone")
    assert site.run("populate").code == 1
    assert snapshot(site.chroots / "a") == before


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
    assert set(os.listdir(site.chroots)) == {".lock", "good"}


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
    site.host("a")
    (site.fleet / "hosts/a.pub").symlink_to("gone")
    (site.fleet / "hosts/b.pub").write_bytes(b"\xff\xfe")
    (site.fleet / "hosts/no host.pub").write_text(key("x"))
    ran = site.run("fleet")
    assert ran.code == 1
    assert [line.split(": ")[2:4] for line in ran.errors] == [
        ["hosts/a.pub", "cannot be read"], ["hosts/b.pub", "cannot be read"],
        ["hosts/no host.pub", "'no host' is no host name"], ["fleet.nix is left as it was"],
    ]  # fmt: skip
    assert not (site.fleet / "fleet.nix").exists()


def test_two_hosts_with_one_key(site: Site) -> None:
    for name in ("a", "b", "c"):
        site.host(name)
        (site.fleet / f"hosts/{name}.pub").write_text(f"{key(name)}\n")
    (site.fleet / "hosts/b.pub").write_text(f"{key('b')}\n{key('a', 'another comment')}\n")
    message = "bento: error: hosts/a.pub and hosts/b.pub have the same key: each host needs its own"
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (1, [message])
    assert ran.out.splitlines()[-1] == "3 hosts: 1 published, 0 unchanged, 2 failed"
    assert set(os.listdir(site.chroots)) == {".lock", "c"}
    ran = site.run("fleet")
    assert (ran.code, ran.errors) == (1, [message, "bento: error: fleet.nix is left as it was"])


def test_a_release_has_a_limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("big", CONFIGURATION | {"x": b"x" * 60_000})
    site.host("small")
    monkeypatch.setattr(client, "MAX_RELEASE_BYTES", 50_000)
    ran = site.run("populate")
    assert ran.code == 1
    assert ran.errors == ["bento: error: big: the release would exceed 50000 bytes: leave large files out"]
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
    assert set(os.listdir(site.chroots)) == {".lock", "a", "c"}
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
        assert set(os.listdir(self.site.chroots)) == {".lock", *self.NAMES}
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

            def reveal(chroot: Path, release: str) -> None:
                if moment == "after":
                    os.rename(chroot / ".current.json.new", chroot / "current.json")
                os.kill(os.getpid(), signal.SIGKILL)
                real(chroot, release)

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
    placed, announced = [release, f"{release}.tar"], ["current.json", "config"]
    assert order == [*placed, *placed, "sync", *announced, *announced, "sync"]


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
            f"bento: error: another populate is at work in {site.chroots}: wait for its end"
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
    (directory / "x").symlink_to("gone")
    ran = site.run("populate", "--dry-run")
    assert (ran.code, ran.errors) == (1, ["bento: error: a: hosts/a/x: dangling link to gone"])
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
    assert set(os.listdir(site.chroots)) == {".lock", "a", "link", "no-releases", "not ours"}
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


def test_only_what_passes_is_cut_into_parts(site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nixos-rebuild gets are files of their own, and `check` and `build` throw no parts away."""
    (toy_host(site, "a") / "big").write_bytes(os.urandom(LARGE))
    built: list[int] = []
    rebuild = bento.rebuild

    def watch(action: str, tree: Path, *arguments: Any) -> str | None:
        built.append((tree / "big").stat().st_nlink)
        assert not (tree.parent / "parts").exists()
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
    assert built == [1] * 5


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
    (site.host("refused") / "x").symlink_to("gone")
    ran = site.run("check", "-j", "3")
    assert ran.code == 1
    fleet = bento.Fleet(site.fleet, site.chroots)
    release, _ = bento.write_release(bento.list_members(fleet, "a"), None)
    assert re.fullmatch(rf"a: {release[:12]} evaluates \([0-9]+s\)\n", ran.out)
    assert "bento: error: refused: hosts/refused/x: dangling link to gone" in ran.errors
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
    site.host("no-key-yet")
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
        (site.fleet / f"hosts/{name}.pub").write_text(f"{key(name)}\n")
    ran = site.run("fleet")
    assert (ran.code, ran.errors) == (
        1,
        [f"bento: error: hosts/{'i' * 26}.pub: '{'i' * 26}' is no host name", "bento: error: fleet.nix is left as it was"],
    )


METACHARACTERS = [
    "''", "${builtins.abort \"x\"}", "$${x}", "\\${x}", '"', '" ]; evil = "', "\\", "\\\\", "\\n", "a\\", "$", "${", "é 日本",
    "'' ${ \" \\ ''${ ''\\", "</script>", "@HOSTS@", "@CHROOT_DIR@", "# comment", "*/", "a=b; c",
]  # fmt: skip


def test_nothing_in_a_comment_is_nix(site: Site) -> None:
    nix = need("nix-instantiate")
    (site.fleet / "fleet.nix.in").write_text(TEMPLATE)
    for number, comment in enumerate(METACHARACTERS):
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
        busy = report is not None and report.phase in ("building", "activating")
        mine = both and current is not None and last is not None and last.release in (current.release, None)
        ended = mine and not busy
        well = ended and last is not None and last.release is not None and last.result == "ok"
        expected = {
            "new": report is None,
            "pending": report is not None and (current is None or (not busy and not mine)),
            "building": both and busy,
            "up-to-date": well,
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
    assert count == 4 * (1 + 4 * 3 * 3 * 2 * len(lasts)) * 6
    assert set(expected) == set(bento.URGENCY)


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
        "failing     failing     -       -     60s    build-failed: error: no builder",
        "rolled-back rolled-back bbbbbbb -     60s    the server was out of reach",
        "drifting    up-to-date  aaaaaaa 10min 10min  drift",
        "offline     up-to-date  aaaaaaa 4h    3h     offline; client 0.9",
        "pending     pending     bbbbbbb 10min 5min   aaaaaaa published 10min ago",
        "building    building    -       -     5s     aaaaaaa published 10min ago",
        "new         new         -       -     never  nothing published",
        "up-to-date  up-to-date  aaaaaaa 10min 10min  needs reboot",
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
    name = "n" * 26
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
    assert ran.err == "bento: error: b: rolled-back: the server was out of reach\n"
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
    assert ran.err == "bento: error: a: up-to-date: offline\n"
    assert site.run("status", "--offline-after", "4").code == 0
    assert site.run("status", "--offline-after", "2.9").code == 1


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
        "other_client": False, "since": None, "clock_ahead_s": None,
    }  # fmt: skip
    assert abs(client.parse_time(up.pop("since")) - client.parse_time(finished)) <= 1
    assert up.pop("clock_ahead_s") in (-1, 0)
    assert up == {
        "host": "a", "state": "up-to-date", "offline": False, "needs_reboot": True, "drift": False,
        "published": {k: v for k, v in current._asdict().items() if k != "parts"}, "release": current.release, "system": "/nix/store/x",
        "client": client.VERSION, "phase": "idle", "last": last | {"reason": "two parts"},
        "seen": client.format_time(report.stat().st_mtime), "problem": None, "other_client": False,
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
    assert ran.errors[0].startswith("bento: error: a: new: logs/status.json: ")
    assert re.search("^b +up-to-date ", ran.out, re.MULTILINE)
    ran = site.run("status", "--json")
    rows = {row["host"]: row for row in json.loads(ran.out)["hosts"]}
    assert problem in rows["a"]["problem"]
    assert (rows["a"]["state"], rows["a"]["release"], rows["b"]["state"]) == ("new", None, "up-to-date")
    assert SECRET not in ran.out
    ran = site.run("status", "--prometheus")
    assert ran.code == 1 and SECRET not in ran.out
    check_metrics(ran.out)
    for sample in ('state{host="a",state="new"}', 'needs_attention{host="a"}', 'state{host="b",state="up-to-date"}'):
        assert f"bento_host_{sample} 1\n" in ran.out
    ran = site.run("status", "--html")
    assert ran.code == 1 and SECRET not in ran.out
    assert '<tr class="new person"><td>a<' in ran.out and '<tr class="up-to-date"><td>b<' in ran.out
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
    assert listed.code == 0 and listed.out.startswith("20261123T101502Z  9f3a61c07be4  ok") and listed.out.count("\n") == 1
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
        report, _, problem = bento.read_report(hostile.chroots / "a", "a")
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
    assert (listed.code, listed.err, listed.out.count("\n")) == (0, word, bento.KEEP_LOGS)
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
    assert hostile.run("log", "a", "--list") == Ran(
        0, "20201124T101502Z  bbbbbbbbbbbb  ok\n20201123T101502Z  aaaaaaaaaaaa  build-failed\n", ""
    )
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
    assert ran.out.splitlines() == [
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
    assert hostile.run("log", "a", "--list").out.splitlines() == [
        "20201123T101502Z  bbbbbbbbbbbb  ok",
        "20211123T101502Z  aaaaaaaaaaaa  ok  (came 2020-11-23T10:14:02Z)",
        "99999999T999999Z  cccccccccccc  ok",
    ]


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
    assert set(os.listdir(site.chroots)) == {".lock", "a"}
    site.host("a", {"configuration.nix": "{ } # new\n"})
    site.publish()
    check_chroot(site.chroots / "a")


def test_a_host_that_fails_keeps_no_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shared with others is not on disk any more when the next host begins."""
    share(site, "a", "b", "c")
    place, prepare, left = bento.place, bento.prepare, []

    def full(chroot: Path, *rest: Any) -> Current:
        if chroot.name == "a":
            raise OSError(28, "No space left on device")
        return place(chroot, *rest)

    def watch(fleet: bento.Fleet, name: str, *rest: Any) -> Any:
        left.append((name, len(os.listdir(site.chroots / ".copies"))))
        return prepare(fleet, name, *rest)

    monkeypatch.setattr(bento, "place", full)
    monkeypatch.setattr(bento, "prepare", watch)
    assert site.run("populate").errors == ["bento: error: a: [Errno 28] No space left on device"]
    assert left[:3] == [("a", 0), ("b", 0), ("c", 2)]


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
    assert set(os.listdir(site.chroots)) == {".lock", "a"}


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


def test_another_directory_is_not_the_one_before(tmp_path: Path) -> None:
    """Though it may get the number of an inode that was removed."""
    common = bento.Common()
    common.keep(tmp_path.stat(), "utils", [])
    assert common.find(tmp_path.stat(), "utils") == []
    (tmp_path / "new").touch()
    assert common.find(tmp_path.stat(), "utils") is None


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
    assert len(run_outside(site, "log", "a", "--list").stdout.splitlines()) == 60


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
