"""What populate flushes, and how often; and a file that has as many links as it can have."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from fleet import Site, check_chroot, inodes, share, write_program
from test_signed import make_keys
from toynixos import _missing, need

import bento
import bento_client as client


def test_only_the_disk_of_the_chroots_is_flushed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """sync(2) waits for every file system of the machine: a USB disk, a network that hangs, with the lock held."""
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    calls = site.top / "calls"
    write_program(site.top / "bin/sync", f'echo "$@" >>{calls}\nexec {need("sync")} "$@"\n')
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(os, "sync", lambda: pytest.fail("of all file systems"))
    for name in "abc":
        site.host(name)
    site.publish()
    on_disk = f"--file-system {site.chroots}"
    assert calls.read_text().splitlines() == [on_disk, on_disk]


def test_a_machine_without_that_program_flushes_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "sync", lambda: called.append("all"))
    client.sync_disk(tmp_path)
    assert called == ["all"]


@pytest.mark.parametrize("how", ["the same", "another commit", "again"])
def test_a_new_signature_for_all_costs_two_flushes(how: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the same is signed later, or what is published has a later signature and hosts/ has another release."""
    key = str(make_keys(site.top / "keys") / "alice")
    names = [f"h{number}" for number in range(6)]
    for name in names:
        site.host(name)
    assert site.run("sign", "--key", key).code == 0
    site.publish()
    serials = {client.parse_signed(site.current(name).vow.text, "").serial for name in names}  # type: ignore[union-attr]
    time.sleep(1.1)
    assert site.run("sign", "--key", key).code == 0
    if how == "another commit":
        for name in names:
            site.host(name, {"configuration.nix": f"{{ }} # {name}\n"})
    fsyncs, flushes, fsync = list[int](), list[tuple[Path, ...]](), os.fsync

    def count(number: int) -> None:
        fsyncs.append(number)
        fsync(number)

    monkeypatch.setattr(os, "fsync", count)
    monkeypatch.setattr(client, "sync_disk", lambda *paths: flushes.append(paths))
    words = {"again": ["--again"]}.get(how, [])
    ran = site.run("populate", *words)
    assert ran.code == int(how == "another commit"), ran.err
    after = {client.parse_signed(site.current(name).vow.text, "").serial for name in names}  # type: ignore[union-attr]
    assert min(after) > max(serials)
    assert len(flushes) == 2 and len(fsyncs) <= 6, (flushes, fsyncs)  # .rollout.json and .known have their own
    for name in names:
        check_chroot(site.chroots / name)
        assert not (site.chroots / name / ".current.json.new").exists()


def test_past_the_links_that_a_file_can_have(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy takes the place of the store's, and as many more hosts link to it: not a copy for each of them."""
    share(site, "a", "b")
    for number in range(3, 12):
        (site.fleet / f"hosts/like-{number}").symlink_to("a")
    real = os.link

    def few(source: str, target: str) -> None:
        if os.stat(source).st_nlink >= 5:
            raise OSError(31, "Too many links", source)
        real(source, target)

    monkeypatch.setattr(os, "link", few)
    site.publish()
    names = ["a", *(f"like-{number}" for number in range(1, 12))]
    assert len(inodes(site, ".tar", *names)) == 3
    for name in names:
        check_chroot(site.chroots / name)
    store = site.chroots / ".store"
    assert not [name for name in os.listdir(store) if name.startswith(".") and name != ".known"]
    assert client.hash_file(store / f"{site.current().release}.tar") == site.current().release


def test_past_the_links_of_a_real_file_system(tmp_path: Path) -> None:
    """ext4 has 65,000."""
    if os.geteuid() != 0:
        _missing("needs root to mount a small disk")
    image, disk = tmp_path / "image", tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(40 << 20)
    disk.mkdir()
    subprocess.run([need("mkfs.ext4"), "-q", "-F", "-O", "^dir_nlink", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, disk], check=False, capture_output=True).returncode != 0:
        _missing("cannot mount ext4")
    try:
        source = disk / "source"
        source.write_bytes(b"content")
        source.chmod(0o644)
        for number in range(64_998):
            os.link(source, disk / f"{number}")
        for number in range(64_998, 65_010):
            bento.link(str(source), str(disk / f"{number}"))
        assert len({(disk / f"{number}").stat().st_ino for number in range(65_010)}) == 2
        assert source.read_bytes() == b"content" and source.stat().st_nlink == 12
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
