"""The boot loader's side of a toy machine: entries as systemd-boot reads them, and EFI variables as files.

Below ROOT: boot/ is the ESP. sys/firmware/efi/efivars/ has the variables, in the kernel's format; a machine without
that directory has no EFI variables. (A machine of the lab that is off has them in LAB_VARIABLES.)
"""

import fnmatch
import re
from pathlib import Path
from typing import NamedTuple

VENDOR = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"  # systemd-boot's
LAB_VARIABLES = "var/lib/lab-efivars"
ATTRIBUTES = b"\x07\x00\x00\x00"
COUNTED = re.compile(r"(.*)\+(\d+)(?:-(\d+))?\.conf")


class Entry(NamedTuple):
    path: Path
    title: str
    sort_key: str
    version: str
    machine_id: str
    linux: str
    initrd: str
    options: str

    @property
    def id(self) -> str:
        """The file's name, its count of boots included, as with systemd-boot 252."""
        return self.path.name

    @property
    def tries_left(self) -> int | None:
        found = COUNTED.fullmatch(self.id)
        return int(found[2]) if found else None


def read_entry(path: Path) -> Entry:
    fields = dict(line.partition(" ")[::2] for line in path.read_text(encoding="utf-8").splitlines() if line)
    names = ("title", "sort-key", "version", "machine-id", "linux", "initrd", "options")
    return Entry(path, *(fields.get(name, "").strip() for name in names))


def natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def read_entries(boot: Path) -> list[Entry]:
    """In the order of the menu: the newest first, those that have failed too often last."""
    found = [read_entry(path) for path in (boot / "loader/entries").glob("*.conf")]
    found.sort(key=lambda entry: (natural(entry.version), natural(entry.id)), reverse=True)
    return sorted(found, key=lambda entry: (entry.tries_left == 0, entry.sort_key, entry.machine_id))


def find(entries: list[Entry], pattern: str | None) -> Entry | None:
    matching = (entry for entry in entries if pattern and fnmatch.fnmatch(entry.id.lower(), pattern.lower()))
    return next(matching, None)


def loader_default(boot: Path) -> str | None:
    path = boot / "loader/loader.conf"
    found = re.search(r"(?m)^default (\S+)", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else None


def choose_default(root: Path, entries: list[Entry]) -> Entry | None:
    """Fact: what stays. The variable beats loader.conf; where neither names an entry, the first of the menu is it."""
    for pattern in (read_variable(root, "LoaderEntryDefault"), loader_default(root / "boot")):
        if (entry := find(entries, pattern)) is not None:
            return entry
    return entries[0] if entries else None


def next_boot(root: Path) -> Entry | None:
    """What the loader will start, if nobody picks anything in its menu."""
    entries = read_entries(root / "boot")
    return find(entries, read_variable(root, "LoaderEntryOneShot")) or choose_default(root, entries)


def system_of(options: str) -> str:
    """The system that a kernel's command line starts, or nothing."""
    found = re.search(r"(?:^| )init=(\S+)/init(?: |$)", options)
    return found[1] if found else ""


# --- EFI variables ---


def variables(root: Path) -> Path:
    kept = root / LAB_VARIABLES
    there = root / "sys/firmware/efi/efivars"
    return kept if kept.is_dir() and not there.is_dir() else there


def read_variable(root: Path, name: str) -> str | None:
    path = variables(root) / f"{name}-{VENDOR}"
    return path.read_bytes()[4:].decode("utf-16-le").rstrip("\0") if path.exists() else None


def write_features(root: Path) -> None:
    """LoaderFeatures: what today's systemd-boot can do, one boot and boot counting among it."""
    if variables(root).is_dir():
        (variables(root) / f"LoaderFeatures-{VENDOR}").write_bytes(ATTRIBUTES + (0x3FFF).to_bytes(8, "little"))


def write_variable(root: Path, name: str, value: str | None) -> None:
    """None or "" removes it. Nothing happens where there are no variables."""
    path = variables(root) / f"{name}-{VENDOR}"
    if not value:
        path.unlink(missing_ok=True)
    elif path.parent.is_dir():
        path.write_bytes(ATTRIBUTES + f"{value}\0".encode("utf-16-le"))
