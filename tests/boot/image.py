"""The disks of the boot lab, made from files; no loop devices, and nothing of this machine's own kernel or boot loader.

The tree (Debian trixie as in the container lab, and what boots it) is made once and kept where the container lab keeps
its own, under a name that changes with the recipe. A disk is made from it for each kind of machine and each run:
it has the repository's client and toy in it.
"""

import lzma
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lab.image import PATH, ImageError, base_root, cache_dir, image_path, locked, write

from boot.initrd import BTRFS, LIBRARIES, MODULES, in_order, make_initrd

TESTS = Path(__file__).resolve().parents[1]
REPO = TESTS.parent
TIMEOUT_S = 900
MIB = 1 << 20
ESP_MIB, ROOT_MIB, BTRFS_MIB = 160, 900, 160
# For GRUB to find a file system by: which one has this file.
GRUB_FILE = "bento-boot-lab"

PACKAGES = "busybox-static systemd-boot-efi systemd-boot-tools kmod grub-efi-amd64-bin grub-common libdevmapper1.02.1"
GRUB_MODULES = """
    part_gpt fat ext2 btrfs normal linux search search_fs_file configfile loadenv echo test serial terminal sleep reboot
    minicmd halt
"""
# Arguments: target. In namespaces of its own. The kernel's package is unpacked, not installed: nothing runs for it.
RECIPE = r"""
set -eu
target=$1 packages=$2
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
apt-config dump Acquire >"$target/etc/apt/apt.conf.d/00lab"
cp /etc/resolv.conf "$target/etc/resolv.conf"
mount -t proc proc "$target/proc"
chroot "$target" apt-get -qq update
kernel=$(chroot "$target" apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)/\1/p' | head -n 1)
mkdir "$target/debs" "$target/unpacked"
chroot "$target" sh -ec 'cd /debs; apt-get -qq download "$@"' sh "$kernel" $packages
for deb in "$target"/debs/*.deb; do dpkg-deb --extract "$deb" "$target/unpacked"; done
# What the machine itself runs.
cp "$target/unpacked/usr/bin/bootctl" "$target/usr/bin/"
for library in "$target"/unpacked/usr/lib/x86_64-linux-gnu/*.so*; do
    [ ! -e "$library" ] || cp -P "$library" "$target/usr/lib/x86_64-linux-gnu/"
done
modules=$(echo "$target"/unpacked/usr/lib/modules/*)
cp "$target/unpacked/usr/bin/kmod" "$target/debs/depmod"
chroot "$target" /debs/depmod -b /unpacked/usr "${modules##*/}"
# GRUB for each place that it may have its files in. It finds the file system by a file of ours.
for below in /boot/grub /grub; do
    printf 'search --no-floppy --set=root --file /%s\nset prefix=($root)%s\nnormal\n' "$4" $below >"$target/debs/early.cfg"
    chroot "$target" env LD_LIBRARY_PATH=/unpacked/usr/lib/x86_64-linux-gnu /unpacked/usr/bin/grub-mkimage \
        -d /unpacked/usr/lib/grub/x86_64-efi -O x86_64-efi -o "/unpacked/grub-$(basename "${below%/grub}").efi" \
        -c /debs/early.cfg -p $below $3
done
rm -rf "$target/var/lib/apt/lists" "$target/var/cache/apt" "$target/debs" "$target/etc/apt/apt.conf.d/00lab"
: >"$target/etc/resolv.conf"
umount "$target/proc"
"""

MACHINE_FILES = {
    # Before everything that a system defines, as NixOS' stage 2 is before systemd.
    "/etc/systemd/system/lab-stage2.service": """\
[Unit]
Description=Stage 2 of the toy NixOS
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup.service lab-network.service
Before=sysinit.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'read -r line </proc/cmdline; for word in $line; do case $word in init=*) exec "$${word#init=}" ;; esac; done'
[Install]
WantedBy=sysinit.target
""",
    # No network, if the kernel or its parameters say so.
    "/etc/systemd/system/lab-network.service": """\
[Unit]
Description=The network of this machine
DefaultDependencies=no
After=local-fs.target
Before=network.target network-online.target lab-stage2.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/opt/boot-lab/network
[Install]
WantedBy=sysinit.target
""",
    "/opt/boot-lab/network": """\
#!/bin/sh
ip link set lo up
read -r line </proc/cmdline
case " $line " in *" toy.no-network "*) exit ;; esac
for word in $line; do
    system=${word#init=}
    case $word in init=*) ! grep -q '"kernel": "broken' "${system%/init}/toy.json" || exit 0 ;; esac
done
for device in /sys/class/net/e*; do
    ip address replace 10.0.2.15/24 dev "${device##*/}"
    ip link set "${device##*/}" up
done
ip route replace default via 10.0.2.2
""",
    # The real one, which a test can hold at one of its steps, once: by its words, in /etc/lab/hold.
    "/opt/lab/bin/bootctl": """\
#!/bin/sh
if [ "$(cat /etc/lab/hold 2>/dev/null)" = "$1 ${2:+entry}" ]; then
    rm /etc/lab/hold
    sync
    echo "lab: held at $1" >/dev/console
    sleep 1000
fi
exec /usr/bin/bootctl "$@"
""",
    "/etc/systemd/system/lab-agent.service": """\
[Unit]
Description=Takes commands from the lab
DefaultDependencies=no
After=local-fs.target
Before=sysinit.target
[Service]
ExecStart=/usr/bin/python3 -I /bento/tests/boot/agent.py
Restart=always
RestartSec=1
OOMScoreAdjust=-1000
[Install]
WantedBy=sysinit.target
""",
    "/etc/systemd/system.conf.d/lab.conf": f"""\
[Manager]
DefaultEnvironment=PATH={PATH} TOY_MODE=simulated TOY_ROOT=/ PYTHONDONTWRITEBYTECODE=1
DefaultTimeoutStopSec=10s
StatusUnitFormat=name
LogColor=no
""",
    "/etc/machine-id": "b0070000000000000000000000001ab1\n",
    "/etc/hostname": "toy\n",
}


@dataclass(frozen=True)
class Kind:
    """A kind of machine: its boot loader, and what /boot is."""

    name: str
    loader: str  # systemd-boot or grub
    boot: str  # "esp", "root", "btrfs"

    @property
    def boot_loader(self) -> list[str]:
        return ["grub", "/boot/grub"] if self.loader == "grub" else [self.loader, "/boot"]


SYSTEMD_BOOT = Kind("systemd-boot", "systemd-boot", "esp")
GRUB_EXT4 = Kind("grub-ext4", "grub", "root")
GRUB_VFAT = Kind("grub-vfat", "grub", "esp")
GRUB_BTRFS = Kind("grub-btrfs", "grub", "btrfs")
ALL_KINDS = (SYSTEMD_BOOT, GRUB_EXT4, GRUB_VFAT, GRUB_BTRFS)


# --- the tree ---


def tree_path() -> Path:
    parts = (image_path().name, PACKAGES, GRUB_MODULES, RECIPE, MODULES)
    return cache_dir() / f"boot-{sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def base_tree() -> Path:
    """Debian with bootctl, and beside it (`parts`) kernel, initrd's contents and boot loaders. Half a minute, once."""
    path = tree_path()
    if path.is_dir():
        return path
    base = base_root()
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / "boot.lock"):
        if not path.is_dir():
            for left in path.parent.glob(".boot-*"):  # of builds that were killed: we hold the lock
                shutil.rmtree(left)
            aside = Path(tempfile.mkdtemp(prefix=".boot-", dir=path.parent))
            try:
                run("cp", "-a", f"{base}/.", aside / "root")
                run("unshare", "--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", RECIPE, "boot-image",
                    aside / "root", PACKAGES, GRUB_MODULES, GRUB_FILE)  # fmt: skip
                take_parts(aside)
                shutil.rmtree(aside / "root/unpacked")
                aside.chmod(0o755)
                aside.rename(path)
            finally:
                if aside.exists():
                    shutil.rmtree(aside)
    return path


def take_parts(aside: Path) -> None:
    unpacked, parts = aside / "root/unpacked", aside / "parts"
    parts.mkdir()
    [kernel] = unpacked.glob("boot/vmlinuz-*")
    shutil.copyfile(kernel, parts / "bzImage")
    [tree] = unpacked.glob("usr/lib/modules/*")
    modules = [(path.name.partition(".ko")[0], lzma.decompress(path.read_bytes())) for path in in_order(tree)]
    busybox = next(path for path in (unpacked / "bin/busybox", unpacked / "usr/bin/busybox") if path.exists())
    (parts / "modules").mkdir()
    shutil.copyfile(busybox, parts / "busybox")
    for number, (name, content) in enumerate(modules):
        (parts / "modules" / f"{number:02}-{name}").write_bytes(content)
    shutil.copyfile(unpacked / "usr/lib/systemd/boot/efi/systemd-bootx64.efi", parts / "systemd-boot.efi")
    shutil.copyfile(unpacked / "grub-boot.efi", parts / "grub-root.efi")
    shutil.copyfile(unpacked / "grub-.efi", parts / "grub-separate.efi")


def run(*argv: str | Path, cwd: Path | None = None) -> str:
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=cwd,
            env=os.environ | {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK": "1"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageError(f"{words[0]}: {error}") from None
    if done.returncode != 0:
        raise ImageError(f"{words[0]}: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


# --- a disk ---

# In a namespace of its own: the tree with an overlay, in which the first generation is installed as nixos-install would.
INSTALL = r"""
set -eu
tree=$1 work=$2 config=$3
mount -t tmpfs -o size=1500m tmpfs "$work/overlay"
mkdir "$work/overlay/upper" "$work/overlay/work" "$work/overlay/merged"
mount -t overlay -o "lowerdir=$tree,upperdir=$work/overlay/upper,workdir=$work/overlay/work" overlay "$work/overlay/merged"
merged=$work/overlay/merged
rm -rf "$merged/opt/lab/bin"
cp -a "$work/extra/." "$merged/"
mount -t proc proc "$merged/proc"
mount --bind /dev "$merged/dev"
mount -t tmpfs tmpfs "$merged/run"
chroot "$merged" /usr/bin/env PATH=/opt/lab/bin:/usr/bin:/bin TOY_ROOT=/ TOY_MODE=simulated PYTHONDONTWRITEBYTECODE=1 \
    nixos-rebuild boot --flake "path:/root/v0#toy"
chroot "$merged" python3 -m compileall -q /bento/bento_client.py
umount "$merged/run" "$merged/dev" "$merged/proc"
rm -rf "$merged/root/v0"
[ -z "$4" ] || { mkdir -p "$work/boot"; cp -a "$merged/boot/." "$work/boot/"; rm -rf "$merged"/boot/*; }
mke2fs -q -t ext4 -O ^metadata_csum_seed -L root -d "$merged" "$work/root.img" "$5"
"""


def copy_repository(extra: Path) -> None:
    bento = extra / "bento"
    for name in ("tests/toy", "tests/boot", "utils"):
        shutil.copytree(REPO / name, bento / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bento.py", "bento_client.py", "tests/toynixos.py"):
        shutil.copyfile(REPO / name, bento / name)
    # The toy writes for systemd-boot and for extlinux. What asks for GRUB gets ours.
    system = bento / "tests/toy/toy_system.py"
    text, call = system.read_text(encoding="utf-8"), "            install_extlinux(root, toy, top)\n"
    assert text.count(call) == 1
    ours = '__import__("runpy").run_path("/bento/tests/boot/grub.py")["install"](root, toy, top)'
    system.write_text(text.replace(call, f"            {ours}\n"), encoding="utf-8")
    programs = extra / "opt/lab/bin"
    programs.mkdir(parents=True)
    (programs / "nixos-rebuild").symlink_to("/bento/tests/boot/rebuild.py")
    for name in ("nix-env", "nix-collect-garbage"):
        (programs / name).symlink_to(f"/bento/tests/toy/{name}")


def take_bash(root: Path) -> list[tuple[str, bytes]]:
    """With its libraries, where its loader looks for them."""
    found = [("bin/bash", root / "usr/bin/bash"), ("lib64/ld-linux-x86-64.so.2", root / "usr/lib64/ld-linux-x86-64.so.2")]
    found += [(f"{LIBRARIES}/{name}", root / "usr/lib/x86_64-linux-gnu" / name) for name in ("libtinfo.so.6", "libc.so.6")]
    return [(name, (path.parent / os.readlink(path) if path.is_symlink() else path).read_bytes()) for name, path in found]


def write_extra(extra: Path, tree: Path, kind: Kind, files: dict[str, str]) -> None:
    copy_repository(extra)
    parts = extra / "opt/boot-lab"
    parts.mkdir()
    shutil.copyfile(tree / "parts/bzImage", parts / "bzImage")
    modules = sorted((tree / "parts/modules").iterdir())
    named = [(path.name.partition("-")[2], path.read_bytes()) for path in modules]
    named = [(name, content) for name, content in named if kind.boot == "btrfs" or name not in BTRFS]
    (parts / "initrd").write_bytes(make_initrd((tree / "parts/busybox").read_bytes(), named, take_bash(tree / "root")))
    for name, text in (MACHINE_FILES | files).items():
        write(extra, name, text)
        if text.startswith("#!"):
            (extra / name.lstrip("/")).chmod(0o755)
        if "PRIVATE KEY" in text:
            (extra / name.lstrip("/")).chmod(0o600)
        if "\n[Install]\nWantedBy=" in text:
            wants = extra / f"etc/systemd/system/{text.rpartition('WantedBy=')[2].strip()}.wants"
            wants.mkdir(parents=True, exist_ok=True)
            (wants / Path(name).name).symlink_to(f"../{Path(name).name}")
    mounts = {"esp": "/dev/vda1 /boot vfat\n", "btrfs": "/dev/vda3 /boot btrfs\n", "root": ""}
    write(extra, "/etc/lab/mounts", mounts[kind.boot])
    boot = extra / "boot"
    boot.mkdir(exist_ok=True)
    (boot / "grub").mkdir()
    write(extra, f"/{GRUB_FILE}" if kind.boot == "root" else f"/boot/{GRUB_FILE}", "")


def make_disk(kind: Kind, directory: Path, config: Path, files: dict[str, str]) -> Path:
    """A raw disk with the first generation of a configuration (a directory) installed. `files`: more of the machine's."""
    tree = base_tree()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        work = Path(scratch)
        for name in ("overlay", "extra"):
            (work / name).mkdir()
        write_extra(work / "extra", tree, kind, files)
        shutil.copytree(config, work / "extra/root/v0", symlinks=True)
        separate = "" if kind.boot == "root" else "yes"
        run("unshare", "--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", INSTALL, "boot-install",
            tree / "root", work, config, separate, f"{ROOT_MIB}m")  # fmt: skip
        return assemble(kind, directory / f"{kind.name}.img", work, tree / "parts")


def assemble(kind: Kind, disk: Path, work: Path, parts: Path) -> Path:
    sizes = [ESP_MIB, ROOT_MIB, BTRFS_MIB]
    with open(disk, "wb") as file:
        file.truncate((sum(sizes) + 4) * MIB)
    words = ["sgdisk", "--clear"]
    for number, (size, code) in enumerate(zip(sizes, ("ef00", "8300", "8300"), strict=True), 1):
        words += [f"--new={number}:0:+{size}M", f"--typecode={number}:{code}"]
    run(*words, disk)
    starts = [int(start) for start in re.findall(r"(?m)^ +\d+ +(\d+) ", run("sgdisk", "--print", disk))]
    esp = make_esp(kind, work, parts)
    images = [esp, work / "root.img"]
    if kind.boot == "btrfs":
        run("truncate", "-s", f"{BTRFS_MIB}M", work / "btrfs.img")
        run("mkfs.btrfs", "-q", "--mixed", "--rootdir", work / "boot", work / "btrfs.img")
        images.append(work / "btrfs.img")
    for image, start in zip(images, starts, strict=False):
        run("dd", f"if={image}", f"of={disk}", "bs=512", f"seek={start}", "conv=notrunc,sparse", "status=none")
    return disk


def make_esp(kind: Kind, work: Path, parts: Path) -> Path:
    esp = work / "esp.img"
    run("truncate", "-s", f"{ESP_MIB}M", esp)
    run("mkfs.vfat", "-F", "32", "-s", "1", "-n", "ESP", esp)
    grub = "grub-root.efi" if kind.boot == "root" else "grub-separate.efi"
    image = parts / ("systemd-boot.efi" if kind.loader == "systemd-boot" else grub)
    tree = work / "boot" if kind.boot == "esp" else work / "esp"
    (tree / "EFI/BOOT").mkdir(parents=True)
    shutil.copyfile(image, tree / "EFI/BOOT/BOOTX64.EFI")
    run("mcopy", "-s", "-i", esp, *sorted(tree.iterdir()), "::/")
    return esp
