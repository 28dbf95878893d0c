"""Initrds of the boot lab: a small one in busybox' shell, and what makes one kernel's different from another's.

Used where the disk is made, and on the machine itself, by its nixos-rebuild.
"""

import re
import stat
from collections.abc import Iterable
from pathlib import Path

MODULE = Path(__file__).resolve().parents[2] / "utils/bento.nix"
# What a disk of this lab needs before its root is mounted. All the others, too: the machine has no modules of its own.
MODULES = """
    virtio_pci virtio_blk virtio_net crc32c_generic ext4 vfat nls_cp437 nls_ascii nls_iso8859-1 efivarfs i6300esb
    btrfs
"""
# Where the loader of Debian's programs looks.
LIBRARIES = "lib/x86_64-linux-gnu"
# What takes a second, and is needed only where there is btrfs.
BTRFS = ("xor", "raid6_pq", "libcrc32c", "btrfs")

# What NixOS' stage 1 does, as far as it matters here. A fate comes from the kernel's version (/fate, which is the
# initrd's last file) or from the kernel's command line. With boot.panic_on_fail a failure here is a panic.
INIT = r"""#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
exec </dev/console >/dev/console 2>&1
read -r cmdline </proc/cmdline
fate=$(cat /fate)
is() {
    case $fate in "$1"*) return 0 ;; esac
    case " $cmdline " in *" toy.$1 "*) return 0 ;; esac
    return 1
}
value() {
    for word in $cmdline; do case $word in "$1"=*) echo "${word#*=}"; return ;; esac; done
    echo "$2"
}
fail() {
    echo "stage 1: $1"
    case " $cmdline " in *" boot.panic_on_fail "*) echo c >/proc/sysrq-trigger ;; esac
    while :; do sleep 3600; done
}
echo "stage 1: kernel $fate"
if is panic; then echo c >/proc/sysrq-trigger; fi
while read -r module; do insmod "/modules/$module" || echo "stage 1: no $module"; done </modules/list
[ ! -d /sys/firmware/efi/efivars ] || mount -t efivarfs efivarfs /sys/firmware/efi/efivars
bash -c 'exec -a @bento-trial bash /bento-trial' &
trial=$!
while [ ! -p /run/bento-trial ] && kill -0 $trial 2>/dev/null; do sleep 0.1; done
if is hang; then echo "stage 1: hangs"; while :; do sleep 3600; done; fi
if is fail; then fail "broken on purpose"; fi
root=$(value root /dev/vda2)
if is rootless; then root=/dev/vda9; fi
mkdir -p /mnt
tries=0
until mount -t ext4 "$root" /mnt; do
    tries=$((tries + 1))
    [ $tries -lt 5 ] || fail "$root does not appear"
    sleep 1
done
while read -r device place type; do mkdir -p "/mnt$place"; mount -t "$type" "$device" "/mnt$place" || fail "$place"; done </mnt/etc/lab/mounts
for each in proc sys dev run; do mount --move /$each /mnt/$each; done
exec switch_root /mnt /usr/lib/systemd/systemd
"""


def cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """An archive as the kernel unpacks it (newc): name, mode, content."""
    made = bytearray()

    def add(name: str, mode: int, content: bytes, rdev: tuple[int, int] = (0, 0)) -> None:
        fields = (0, mode, 0, 0, 1, 1, len(content), 0, 0, *rdev, len(name) + 1, 0)
        made.extend(b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0")
        made.extend(b"\0" * (-len(made) % 4))
        made.extend(content)
        made.extend(b"\0" * (-len(made) % 4))

    for name, mode, content in files:
        add(name, mode, content, (5, 1) if stat.S_ISCHR(mode) else (0, 0))
    add("TRAILER!!!", 0, b"")
    made.extend(b"\0" * (-len(made) % 512))
    return bytes(made)


def with_fate(initrd: bytes, version: str) -> bytes:
    """The initrd of a kernel of this version: what follows an archive is unpacked over it."""
    return initrd + cpio([("fate", stat.S_IFREG | 0o644, f"{version}\n".encode())])


def trial_ends(module: Path = MODULE) -> str:
    """What utils/bento.nix starts in an initrd."""
    found = re.search(r"trialEnds = ''\n(.*?)  '';", module.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1].replace("''${", "${")


def make_initrd(busybox: bytes, modules: Iterable[tuple[str, bytes]], bash: Iterable[tuple[str, bytes]]) -> bytes:
    """`bash`: with its libraries, by their paths."""
    directory = stat.S_IFDIR | 0o755
    files = [(name, directory, b"") for name in ("bin", "dev", "proc", "sys", "run", "modules", "mnt", "lib64", "lib", LIBRARIES)]
    files += [(path, stat.S_IFREG | 0o755, content) for path, content in bash]
    files.append(("bento-trial", stat.S_IFREG | 0o644, trial_ends().encode()))
    files.append(("dev/console", stat.S_IFCHR | 0o600, b""))
    files.append(("bin/busybox", stat.S_IFREG | 0o755, busybox))
    for name in ["sh", "mount", "mkdir", "mkfifo", "cat", "echo", "sleep", "insmod", "switch_root"]:
        files.append((f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox"))
    found = list(modules)
    files += [(f"modules/{name}", stat.S_IFREG | 0o644, content) for name, content in found]
    files.append(("modules/list", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name, _ in found).encode()))
    files.append(("init", stat.S_IFREG | 0o755, INIT.encode()))
    return cpio(files)


def in_order(tree: Path) -> list[Path]:
    """The files of MODULES, each after what it depends on, by depmod's list."""
    depends: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (tree / "modules.dep").read_text(encoding="utf-8").splitlines():
        path, _, others = line.partition(":")
        depends[path] = others.split()
        by_name[Path(path).name.partition(".")[0].replace("-", "_")] = path
    wanted: list[str] = []

    def add(path: str) -> None:
        for other in depends[path]:
            add(other)
        if path not in wanted:
            wanted.append(path)

    for name in MODULES.split():
        if name.replace("-", "_") in by_name:  # else it is in the kernel itself
            add(by_name[name.replace("-", "_")])
    return [tree / path for path in wanted]
