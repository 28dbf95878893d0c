"""Hosts that are refused, what is left out of a release, and limits."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import CONFIGURATION, Site, bind_socket, check_chroot, snapshot

import bento_client as client


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


def deep(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "file").touch()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "link to itself": (lambda d: (d / "x").symlink_to("x"), "hosts/bad/x: link loop"),
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
        "hosts/bad/ [31m: link loop",
    ),
    "too deep": (lambda d: deep(d / "/".join("x" * 101)), f"hosts/bad{'/x' * 100}: a tree deeper than 100 directories"),
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
            (directory / "file").touch()
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
        link_to_fifo, "1 dangling link left out: hosts/a/x -> ../../f",
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
    extra = [f"bento: warning: {LEFT_OUT['FIFO'][1].replace('hosts/a/x', 'f')}"] if case == "link to a FIFO" else []
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [f"bento: warning: {text}" for text in [message] if text] + extra)
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
        " letters, digits, _ and -, at most 25, a letter or digit first: give it such a one here and as services.bento.host,"
        ' and its own as "attribute" in bento.json'
    ]
    check_chroot(site.chroots / "good")
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "good"}


def test_other_files_in_hosts_are_no_hosts(site: Site) -> None:
    site.host("good")
    (site.fleet / "hosts/README").write_text("x")
    assert site.publish().out.endswith("1 host: 1 published, 0 unchanged, 0 failed\n")


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
