"""What GRUB itself makes of grub.cfg and grubenv: of the module's lines, and of names as the client writes them.

The entries say which one was started, instead of a kernel. A machine takes seconds.
"""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import bento_client
from boot.conftest import need
from boot.grub import HEADER, trial_lines
from boot.image import GRUB_FILE, MIB, base_tree, run
from boot.machine import Machine, wait_for

REPO = Path(__file__).resolve().parents[2]
PART_MIB = 112
MODULE = REPO / "utils/bento.nix"

ENTRY = 'menuentry "{title}" --class nixos --unrestricted {{\n  # linux /k/bzImage init={system}/init\n  echo "lab: starts {system}"\n  halt\n}}\n'
OLD, NEW, SPECIAL = "/s/old", "/s/new", "/s/special"
TOP = "NixOS - All configurations"
NAMES = {
    OLD: f"{TOP}>NixOS - Configuration 1 (2026-11-24 - 25.11)",
    NEW: f"{TOP}>NixOS - Configuration 2 (2026-11-25 - 25.11)",
    # A generation with specialisations has a submenu of its own; and a title may have what GRUB's names are split at.
    SPECIAL: f"{TOP}>NixOS - Configuration 0 (x >> y)>NixOS - Configuration 0 - Default (x >> y)",
}


def grub_cfg(*, lines: bool = True) -> str:
    text = HEADER.format(search=f"search --no-floppy --set=drive1 --file /{GRUB_FILE}") + (trial_lines(MODULE) if lines else "")
    text += ENTRY.format(title="NixOS - Default", system=NEW) + f'submenu "{TOP}" --class submenu {{\n'
    text += ENTRY.format(title="NixOS - Configuration 2 (2026-11-25 - 25.11)", system=NEW)
    text += ENTRY.format(title="NixOS - Configuration 1 (2026-11-24 - 25.11)", system=OLD)
    text += 'submenu "NixOS - Configuration 0 (x > y)" --class submenu {\n'
    text += ENTRY.format(title="NixOS - Configuration 0 - Default (x > y)", system=SPECIAL)
    return text + "}\n}\n"


@dataclass
class Small:
    """A disk with GRUB and its files on a file system of one kind, and a machine that starts it and halts."""

    kind: str
    directory: Path
    machine: Machine

    def make(self, variables: Mapping[str, str], cfg: str = "") -> None:
        tree = self.directory / "tree"
        (tree / "grub").mkdir(parents=True)
        (tree / GRUB_FILE).write_text("")
        (tree / "grub/grub.cfg").write_text(cfg or grub_cfg())
        bento_client.write_grubenv(tree / "grub/grubenv", dict(variables))
        esp, part = self.directory / "esp.img", self.directory / "part.img"
        for image in (esp, part):
            run("truncate", "-s", f"{PART_MIB}M", image)
        run("mkfs.vfat", "-F", "32", "-s", "1", esp)
        run("mmd", "-i", esp, "::/EFI", "::/EFI/BOOT")
        run("mcopy", "-i", esp, base_tree() / "parts/grub-separate.efi", "::/EFI/BOOT/BOOTX64.EFI")
        if self.kind == "vfat":
            run("mkfs.vfat", "-F", "32", "-s", "1", part)
            run("mcopy", "-s", "-i", part, *sorted(tree.iterdir()), "::/")
        elif self.kind == "btrfs":
            run("mkfs.btrfs", "-q", "--mixed", "--rootdir", tree, part)
        else:
            run("mke2fs", "-q", "-t", self.kind, "-d", tree, part)
        disk = self.machine.base
        with open(disk, "wb") as file:
            file.truncate((2 * PART_MIB + 4) * MIB)
        run("sgdisk", "--clear", f"--new=1:2048:+{PART_MIB}M", "--typecode=1:ef00", f"--new=2:0:+{PART_MIB}M", disk)
        for image, start in ((esp, MIB), (part, (PART_MIB + 1) * MIB)):
            run("dd", f"if={image}", f"of={disk}", "bs=1M", f"seek={start // MIB}", "conv=notrunc,sparse", "status=none")
        self.machine.reset()

    def start(self) -> str:
        """Which system GRUB starts."""
        before = self.machine.console_text().count("lab: starts")
        self.machine.power_on()
        assert self.machine._process is not None
        try:
            self.machine._process.wait(120)
        except subprocess.TimeoutExpired:
            pytest.fail(self.machine.console_text()[-1500:])
        finally:
            self.machine.power_cut()
        found = self.machine.console_text().split("lab: starts ")
        assert len(found) == before + 2, self.machine.console_text()[-1500:]
        return found[-1].split()[0]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], Small]]:
    need()
    made: list[Small] = []

    def make(kind: str) -> Small:
        made.append(Small(kind, tmp_path, Machine(tmp_path / "m", tmp_path / "disk.img", memory_mib=192)))
        return made[-1]

    yield make
    for each in made:
        each.machine.power_cut()


def test_names_are_as_the_client_reads_them() -> None:
    text = grub_cfg().replace("# linux", "linux")
    found = {entry.system: entry.name for entry in bento_client.parse_grub(text) if entry.system and not entry.top}
    assert found == NAMES


@pytest.mark.parametrize("kind", ["ext4", "vfat", "ext2"])
def test_once_and_then_the_good_one(small: Callable[[str], Small], kind: str) -> None:
    machine = small(kind)
    machine.make({"bento_good": NAMES[OLD], "bento_try": NAMES[NEW]})
    assert [machine.start() for _ in range(3)] == [NEW, OLD, OLD]


def test_where_grub_cannot_write_nothing_is_tried(small: Callable[[str], Small]) -> None:
    """Else each boot would be the one trial."""
    machine = small("btrfs")
    machine.make({"bento_good": NAMES[OLD], "bento_try": NAMES[NEW]})
    assert [machine.start() for _ in range(2)] == [OLD, OLD]


@pytest.mark.parametrize(
    ("variables", "starts"),
    [
        ({}, [NEW]),
        ({"bento_good": NAMES[SPECIAL]}, [SPECIAL]),
        # A person's `grub-reboot` goes first, and the trial is still to come.
        ({"next_entry": NAMES[SPECIAL], "bento_good": NAMES[OLD], "bento_try": NAMES[NEW]}, [SPECIAL, NEW, OLD]),
        # No trial without a system to fall back to.
        ({"bento_try": NAMES[OLD]}, [NEW]),
    ],
    ids=["nothing told", "good", "a person's", "no way back"],
)
def test_variables(small: Callable[[str], Small], variables: dict[str, str], starts: list[str]) -> None:
    machine = small("ext4")
    machine.make(variables)
    assert [machine.start() for _ in starts] == starts


@pytest.mark.parametrize("lines", [True, False])
def test_users(small: Callable[[str], Small], lines: bool) -> None:
    """Only "NixOS - Default" is unrestricted. Any other entry asks for a password, for ever: so the module has no lines then."""
    text, head = grub_cfg(lines=lines), 'set superusers="root"\npassword root secret\n'
    first, _, others = text.partition('submenu "')
    text = head + first + 'submenu "' + others.replace(" --unrestricted", "")
    machine = small("ext4")
    machine.make({"bento_good": NAMES[OLD]}, text)
    if lines:
        machine.machine.power_on()
        wait_for(lambda: "Enter username" in machine.machine.console_text(), 120, "a password is asked for")
    else:
        assert machine.start() == NEW
