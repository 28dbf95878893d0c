"""A full disk bars no way back."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from toylab import Lab, Systemd, at_any_price, be_patient, fake_program, kill_tree, wait_until
from toynixos import _missing

from bento_client import Result


@contextmanager
def disk(path: Path, kind: str, size_mb: int) -> Iterator[None]:
    """A small file system of its own."""
    path.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        _missing("needs root to mount a small disk")
    inodes = ",nr_inodes=400" if kind == "inodes" else ""
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m{inodes}", "tmpfs", str(path)]
    if kind == "ext4":
        image = path.parent / "image"
        with open(image, "wb") as file:
            file.truncate(size_mb << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-F", image], check=True)
        argv = ["mount", "-o", "loop", str(image), str(path)]
    if subprocess.run(argv, check=False, capture_output=True).returncode != 0:
        _missing(f"cannot mount {kind}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(directory: Path) -> None:
    with suppress(OSError), open(directory / "filler", "ab", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "inodes"])
def test_a_full_disk_does_not_bar_the_way_back(tmp_path: Path, kind: str) -> None:
    with disk(tmp_path / "machine/var/lib/bento", kind, 20):
        lab = Lab.create(tmp_path, inhibitors="dbus 1")
        lab.publish("v1", inhibitors="dbus 2", kernel="broken")
        lab.client("run")
        lab.machine.power_cycle()
        with suppress(OSError):
            for number in range(400 if kind == "inodes" else 0):
                (lab.state / f"filler-{number}").touch()
        fill(lab.state)
        at_any_price(lab, "run")
        be_patient(lab)
        at_any_price(lab, "run")
        assert lab.labels()[1:] == ("v0", "v0")
        lab.machine.power_cycle()
        assert lab.labels() == ("v0", "v0", "v0") and lab.machine.network() == "up"
        for path in lab.state.glob("filler*"):
            path.unlink()
        lab.publish("v2", inhibitors="dbus 1")
        at_any_price(lab, "run")
        assert lab.labels() == ("v2", "v2", "v2")


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.parametrize("command", ["run", "rollback"])
def test_a_disk_that_is_always_full_does_not_bar_the_way_back(tmp_path: Path, kind: str, command: str) -> None:
    with disk(tmp_path / "machine/var/lib/bento", kind, 20):
        lab = Lab.create(tmp_path)
        lab.settings["confirm_timeout"] = 30
        reached = Path(lab.file("reached"))
        check = f"touch {reached}; while ! [ -e {lab.file('never')} ]; do sleep 0.05; done"
        lab.publish("v1", settings={"health_checks": [check]})
        process = lab.start("run")
        wait_until(reached.exists)
        kill_tree(process)
        token = json.loads((lab.state / "pending.json").read_text())["token"]
        stop = threading.Event()

        def keep_filling() -> None:
            while not stop.is_set():
                fill(lab.state)
                time.sleep(0.001)

        filler = threading.Thread(target=keep_filling)
        filler.start()
        try:
            at_any_price(lab, *(["run"] if command == "run" else ["rollback", "--token", token]))
            assert lab.labels() == ("v0", "v0", "v0")
        finally:
            stop.set()
            filler.join()
        (lab.state / "filler").unlink()
        lab.publish("v2")
        at_any_price(lab, "run")
        assert lab.labels() == ("v2", "v2", "v2")


@pytest.mark.parametrize("left", ["partial", "config.new"])
def test_our_own_leftovers_do_not_fill_the_disk(tmp_path: Path, left: str) -> None:
    with disk(tmp_path / "machine/var/lib/bento", "tmpfs", 22):
        lab = Lab.create(tmp_path)
        lab.publish("v1")
        lab.client("run")
        (lab.config / "big").write_bytes(os.urandom(6 << 20))
        release = lab.publish("v2")
        if left == "partial":
            (lab.state / "partial").mkdir()
            tar = (lab.chroot / "releases" / f"{release}.tar").read_bytes()
            (lab.state / "partial" / f"{release}.tar").write_bytes(tar[: 5 << 20])
        else:
            (lab.state / "config.new").mkdir()
            (lab.state / "config.new/big").write_bytes(bytes(5 << 20))
        lab.client("run")
        assert lab.labels() == ("v2", "v2", "v2")


def test_a_full_disk_does_not_bar_the_reboot_that_leads_back(tmp_path: Path) -> None:
    with disk(tmp_path / "machine/var/lib/bento", "ext4", 20):
        lab = Lab.create(tmp_path, inhibitors="dbus 1")
        systemd = Systemd(lab)
        lab.settings["reboot"] = "when-needed"
        lab.publish("v1", inhibitors="dbus 2", kernel="broken")
        systemd.run("run")
        assert systemd.reboots() == 1
        systemd.boot()
        fill(lab.state)
        be_patient(lab)
        at_any_price(lab, "run", PATH=systemd.path)
        assert systemd.reboots() >= 2  # what is full cannot say that it was asked for
        systemd.boot()
        assert lab.labels() == ("v0", "v0", "v0")


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    with disk(tmp_path / "machine/var/lib/bento", "ext4", 20):
        lab = Lab.create(tmp_path)
        lab.publish("v1")
        lab.client("run")
        release = lab.publish("v2")
        fill(lab.state)
        at_any_price(lab, "run")
        assert (lab.last().release, lab.last().result) == (release, Result.FETCH_FAILED)
        assert "No space left on device" in lab.last().reason


@pytest.mark.parametrize("code", [0, 1])
def test_boot_is_on_its_disk_before_a_variable_names_an_entry(tmp_path: Path, code: int) -> None:
    """GRUB's installer flushes nothing. Without the flush there is more to lose in a power cut, and no more than that."""
    boot, seen = tmp_path / "machine/boot", tmp_path / "seen"
    with disk(boot, "tmpfs", 64):
        lab = Lab.create(tmp_path, inhibitors="dbus 1")
        lab.settings["boot_loader"] = ["systemd-boot", "/boot"]
        look = f"ls {boot}/loader/entries {tmp_path}/machine/sys/firmware/efi/efivars"
        path = fake_program(lab, "sync", f'[ "$*" = "--file-system {boot}" ] && {look} >{seen}\nexit {code}\n')
        lab.publish("v1", inhibitors="dbus 2", kernel="6.13")
        lab.client("run", PATH=path)
        assert "nixos-generation-2.conf" in seen.read_text() and "LoaderEntryOneShot" not in seen.read_text()
        assert lab.report().boot_trial == "systemd-boot"
        lab.machine.power_cycle()
        lab.client("run")
        assert lab.labels() == ("v1", "v1", "v1")
