"""What hosts share is read once, and is on disk once."""

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fleet import LARGE, Site, check_chroot, commit, inodes, share, write_program
from toynixos import TOY, need, write_config

import bento


def test_what_hosts_share_is_read_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a commit that is the same not at all."""
    share(site, "a", "b", "c")
    commit(site.fleet)
    calls, read = site.top / "calls", list[str]()
    write_program(site.top / "bin/git", f'echo "$@" >>{calls}\nexec {need("git")} "$@"\n')
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    write = bento.write_release

    def watch(source: bento.Source, members: Sequence[bento.Member], *rest: Any) -> tuple[str, int]:
        read.append(members[0].path)
        return write(source, members, *rest)

    monkeypatch.setattr(bento, "write_release", watch)
    (site.fleet / "hosts/waves").write_text("a\nb\n")  # asks for all that hosts/ has, before anything is published
    site.publish()
    site.publish()
    hosts = [f"{site.fleet}/hosts/{name}/configuration.nix" for name in "abc"]
    assert read == hosts
    words = calls.read_text().splitlines()
    assert sum(" cat-file " in line for line in words) == sum(" ls-tree " in line for line in words) == 1
    calls.unlink()
    assert site.publish().out == "5 hosts: 0 published, 5 unchanged, 0 failed\n"
    (line,) = calls.read_text().splitlines()
    assert " rev-list " in line
    (site.fleet / "hosts/b/configuration.nix").write_text("{ } # another\n")
    commit(site.fleet, "another")
    assert site.publish("--now").out.splitlines()[0].startswith("b: published ")
    assert read == [*hosts, hosts[1]]


def test_a_release_is_on_disk_once(site: Site) -> None:
    """For whoever has it, in one run or in several; and a host costs a few names."""
    share(site, "a", "b", "c")
    (site.fleet / "hosts/a/big").write_bytes(os.urandom(LARGE))
    site.publish("a")
    site.publish("like-1")
    site.publish()
    part = site.current("like-2").parts[1].sha256
    for name in (".tar", f".parts/{part}"):
        assert len(inodes(site, name, "a", "like-1", "like-2")) == 1
    assert len(inodes(site, ".tar", "a", "b", "c")) == 3
    store = site.chroots / ".store"
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    current = [site.current(name).release for name in "abc"]
    assert {name.partition(".")[0] for name in os.listdir(store)} == {*current, ""}
    assert (store / f"{current[0]}.tar").stat().st_nlink == 4
    for name in ("a", "b", "c", "like-1", "like-2"):
        check_chroot(site.chroots / name)
    assert len(list((site.chroots / "b").rglob("*"))) == 5


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
    for left in (f"{'0' * 64}.tar", f"{'1' * 64}.json", ".new/aside/x", ".build-a/config/x"):
        (store / left).parent.mkdir(parents=True, exist_ok=True)
        (store / left).write_text("left\n")
    (store / ("2" * 64)).mkdir()
    site.publish()
    kept = releases[2:]
    assert set(os.listdir(store)) == {".known", *(f"{r}{ending}" for r in kept for ending in (".tar", ".json"))}
    shutil.rmtree(site.fleet / "hosts/a")
    (site.fleet / "hosts/b").unlink()
    site.host("c")
    site.publish("--prune")
    assert {name.partition(".")[0] for name in os.listdir(store)} == {site.current("c").release, ""}


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
        if made > 2:
            raise OSError(number, os.strerror(number), source)
        link(source, target)

    monkeypatch.setattr(os, "link", few)
    site.publish()
    assert len(inodes(site, ".tar", "a", "like-1", "like-2")) > 1
    for name in ("a", "b", "c", "like-1", "like-2"):
        check_chroot(site.chroots / name)
        assert site.tar(name).stat().st_mode & 0o777 == 0o644
    assert site.publish().out == "5 hosts: 0 published, 5 unchanged, 0 failed\n"


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
        assert (site.tree(name) / "flake.lock").read_text() == "{}\n"
    if "populate" in how:
        assert len(inodes(site, ".tar", "a", "b", "c")) == 1
        assert {name for name in os.listdir(site.chroots / ".store") if name.startswith(".")} <= {".new", ".known", ".built"}


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
