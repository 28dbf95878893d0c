"""What hosts share is read once, and is on disk once."""

import errno
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fleet import CONFIGURATION, LARGE, Site, check_chroot, inodes, share, write_program
from toynixos import TOY, need, write_config

import bento
from bento_client import Current


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


@pytest.mark.parametrize("damaged", [".tar", ".json"])
def test_what_is_damaged_in_the_store_is_not_shared(damaged: str, site: Site) -> None:
    site.host("a")
    site.publish()
    with open(site.chroots / f".store/{site.current().release}{damaged}", "r+b") as file:
        file.write(b"x")
    (site.fleet / "hosts/b").symlink_to("a")
    site.publish()
    check_chroot(site.chroots / "b")
    shared = (site.chroots / f"b/releases/{site.current().release}.tar").stat()
    assert shared.st_ino != site.tar().stat().st_ino


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


def test_a_large_file_that_changes_before_it_is_written(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    # What is signed is what was read.
    key = tmp_path / "admin"
    subprocess.run([need("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    big.write_bytes(b"x" * LARGE)
    assert site.run("sign", "b", "--key", str(key)).code == 0
    [error] = site.run("populate", "b").errors
    assert "b: not signed: hosts/b.sig is for release" in error and site.current("b").release == written[0].id


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
