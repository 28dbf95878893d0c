"""Publication that is killed, or whose disk is full."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fleet import CONFIGURATION, Site, check_chroot, check_tidy
from toynixos import _missing

import bento
import bento_client as client
from bento_client import Current


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
    """Two hosts, which share a directory, with two releases each, and a third of each that a child is to publish."""

    NAMES = ("a", "b")

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
        with closing(fleet.source):
            new = {name: bento.write_release(fleet.source, bento.list_members(fleet, name)[0])[0] for name in self.NAMES}
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
    while killed < 32:
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
    """Before each single thing that populate does to the disk: what it reads in between changes nothing."""
    reads = ("os.listdir", "os.scandir", "os.kill")
    killing = Killing(site)
    step, number = 0, 3
    while True:
        killing.write(number)

        def populate(step: int = step) -> None:
            left = step

            def watch(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal left
                writes = event == "open" and arguments[2] & (os.O_ACCMODE | os.O_CREAT)
                if writes or (event.startswith(("os.", "fcntl.")) and event not in reads):
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


@pytest.mark.parametrize("moment", ["before", "after", "after, and mended"])
def test_a_kill_then_a_change_of_mind(moment: str, site: Site) -> None:
    """Killed just before and just after the moment of publication, and then the old content is back."""
    site.host("a")
    site.publish()
    old = site.current().release
    site.host("a", {"configuration.nix": f"{{ }} # {moment}\n"})

    def populate() -> None:
        real = bento.reveal

        def reveal(chroot: Path, current: Current) -> None:
            if moment != "before":
                os.rename(chroot / ".current.json.new", chroot / "current.json")
            os.kill(os.getpid(), signal.SIGKILL)
            real(chroot, current)

        bento.reveal = reveal
        bento.main(site.argv("populate"))

    assert os.WIFSIGNALED(os.waitpid(forked(populate), 0)[1])
    new = check_chroot(site.chroots / "a")
    assert (new == old) == (moment == "before")
    if moment == "after, and mended":
        site.publish()  # unchanged: but the link was still to be set
        check_tidy(site.chroots / "a", {old, new})
    site.host("a")
    site.publish()
    assert check_chroot(site.chroots / "a") == old
    check_tidy(site.chroots / "a", {old, new})
    history = [published.release for published in bento.read_history(site.chroots / "a")]
    assert history == ([old] if new == old else [old, new, old]), "what was published for a moment, too"


def test_half_a_release_is_not_kept(site: Site) -> None:
    """What version 1.1 left: a tree without its tar; and of ours, parts without theirs."""
    releases = []
    for number in range(3):
        site.host("a", {"configuration.nix": f"{{ }} # {number}\n"})
        site.publish()
        releases.append(site.current().release)
    (site.chroots / "a/releases" / releases[0]).mkdir()
    (site.chroots / "a/config").symlink_to(f"releases/{releases[0]}")
    (site.chroots / "a/releases" / f"{releases[1]}.tar").unlink()
    (site.chroots / "a/releases" / f"{releases[1]}.parts").mkdir()
    site.publish()
    check_tidy(site.chroots / "a", {releases[0], releases[2]})


def test_all_is_on_disk_before_it_is_announced(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        site.host(name)
    order: list[str] = []
    rename = os.rename

    def watch(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(client, "sync_disk", lambda *paths: order.append("sync"))
    monkeypatch.setattr(os, "rename", watch)
    site.publish()
    release = site.current().release
    stored, settled = [f"{release}.tar"], [f"{release}.tar", f"{release}.json"]
    placed, announced = [f"{release}.tar"], ["current.json", "history"]
    assert order == [*stored, *placed, *placed, "sync", *settled, *announced, *announced, "sync", ".known"]


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
    failing = {"stage": (bento, "write_release"), "place": (Path, "write_bytes"), "reveal": (bento, "reveal")}[step]

    def full(chroot: Path, *_: object) -> None:
        if step == "reveal":
            os.rename(chroot / ".current.json.new", chroot / "current.json")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*failing, full)
        ran = site.run("populate")
    assert ran.code == 1
    assert ran.errors == ["bento: error: a: No space left on device"]
    if step == "reveal":
        assert check_chroot(site.chroots / "a") != old
    else:
        assert check_chroot(site.chroots / "a") == old
    site.publish()
    assert check_chroot(site.chroots / "a") != old
    check_tidy(site.chroots / "a", {old, site.current().release})
