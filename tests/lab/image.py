"""The root filesystem that every machine of the lab starts from: Debian trixie with systemd, sshd and Nix.

Made once by debootstrap and kept below $BENTO_CACHE, else $XDG_CACHE_HOME/bento or ~/.cache/bento, under a name that
changes with the recipe. Machines only read it: each has an overlay of its own.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUITE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BUILD_TIMEOUT_S = 1200

PACKAGES = (
    "systemd systemd-sysv libpam-systemd dbus openssh-server openssh-client nix-bin git python3 iproute2 iputils-ping procps libfaketime"
)

# What a machine of the lab does not need, and what would only make its boot slower or touch the kernel it shares.
MASKED = """
    console-getty.service dev-hugepages.mount getty-static.service getty.target kmod-static-nodes.service
    ldconfig.service proc-sys-fs-binfmt_misc.automount sys-fs-fuse-connections.mount sys-kernel-config.mount
    sys-kernel-debug.mount sys-kernel-tracing.mount systemd-ask-password-console.path
    systemd-ask-password-wall.path systemd-binfmt.service systemd-creds.socket systemd-firstboot.service
    systemd-hibernate-clear.service systemd-hostnamed.socket systemd-initctl.socket
    systemd-journal-catalog-update.service systemd-journal-flush.service
    systemd-machine-id-commit.service systemd-modules-load.service systemd-pcrextend.socket systemd-pcrlock.socket
    systemd-pcrmachine.service systemd-random-seed.service systemd-sysctl.service systemd-sysext.socket
    systemd-sysusers.service systemd-tmpfiles-clean.timer systemd-tmpfiles-setup-dev-early.service
    systemd-tmpfiles-setup-dev.service systemd-tpm2-setup-early.service systemd-tpm2-setup.service
    systemd-update-done.service systemd-update-utmp.service
"""

PATH = "/run/current-system/sw/bin:/opt/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

FILES = {
    # On the console, which the lab writes to a file, the journal outlives a power cut, and takes no room in /var.
    "/etc/systemd/journald.conf.d/lab.conf": """\
[Journal]
Storage=volatile
ForwardToConsole=yes
TTYPath=/dev/console
MaxLevelConsole=info
RateLimitBurst=0
""",
    "/etc/systemd/system.conf.d/lab.conf": f"""\
[Manager]
DefaultEnvironment=PATH={PATH} TOY_MODE=nix
DefaultTimeoutStopSec=10s
StatusUnitFormat=name
LogColor=no
""",
    "/etc/systemd/system/lab-network.service": """\
[Unit]
Description=The network of this machine, as its lab has it
DefaultDependencies=no
After=local-fs.target
Before=network.target network-online.target lab-stage2.service
ConditionPathExists=/etc/lab/address
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -ec 'ip link set lo up; ip addr replace "$(cat /etc/lab/address)" dev eth0; ip link set eth0 up'
[Install]
WantedBy=sysinit.target
""",
    # Where the boot loader and the initrd of a NixOS would have been: before everything that a system defines.
    "/etc/systemd/system/lab-stage2.service": """\
[Unit]
Description=Boot loader and stage 2 of the toy NixOS
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup.service lab-network.service
Before=sysinit.target
ConditionPathExists=|/boot/loader/loader.conf
ConditionPathExists=|/boot/extlinux/extlinux.conf
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bento/tests/toy/boot
[Install]
WantedBy=sysinit.target
""",
    "/etc/systemd/system/lab-ready.service": """\
[Unit]
Description=Tells the lab that this machine has booted
After=multi-user.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/touch /run/lab-ready
[Install]
WantedBy=multi-user.target
""",
    # NixOS' name. Unlike Debian's and NixOS' own unit, stopping it ends the sessions too: a server that is gone.
    "/etc/systemd/system/sshd.service": """\
[Unit]
Description=SSH daemon
After=lab-network.service
ConditionPathExists=/etc/ssh/ssh_host_ed25519_key
[Service]
Type=notify
RuntimeDirectory=sshd
ExecStart=/usr/sbin/sshd -D -e
KillMode=control-group
[Install]
WantedBy=multi-user.target
""",
    "/etc/nix/nix.conf": """\
experimental-features = nix-command flakes
build-users-group =
substitute = false
substituters =
sandbox = false
flake-registry =
""",
    "/etc/hostname": "machine\n",
    "/etc/machine-id": "",
    "/etc/resolv.conf": "",
    "/etc/profile.d/lab.sh": f"export PATH={PATH} TOY_MODE=nix\n",
}

# Arguments: target, suite, mirror, packages. In a mount and PID namespace of its own: whatever ends it, nothing stays.
RECIPE = r"""
set -eu
target=$1 suite=$2 mirror=$3 packages=$4
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
debootstrap --variant=minbase --keyring="$5" "$suite" "$target" "$mirror"

printf '#!/bin/sh\nexit 101\n' >"$target/usr/sbin/policy-rc.d"
chmod +x "$target/usr/sbin/policy-rc.d"
printf 'path-exclude=/usr/share/%s/*\n' doc man locale info >"$target/etc/dpkg/dpkg.cfg.d/lab"
echo force-unsafe-io >>"$target/etc/dpkg/dpkg.cfg.d/lab"
# How this machine fetches: proxies, checks, timeouts.
apt-config dump Acquire >"$target/etc/apt/apt.conf.d/00lab"
mount -t proc proc "$target/proc"
chroot "$target" apt-get -qq update
chroot "$target" apt-get -qq install -y --no-install-recommends $packages

chroot "$target" apt-get clean
rm -rf "$target"/var/lib/apt/lists/* "$target"/var/cache/apt/* "$target"/var/log/* "$target"/usr/share/locale
rm -rf "$target"/usr/share/doc "$target"/usr/share/man "$target/etc/apt/apt.conf.d/00lab" "$target"/etc/ssh/ssh_host_*
rm -rf "$target"/etc/systemd/system/*.wants "$target"/etc/systemd/system/sshd.service
mkdir -p "$target/bento" "$target/opt/lab/bin" "$target/etc/lab" "$target/boot"
mkdir -p "$target/nix/var/nix/profiles" "$target/nix/store"
ln -s /bento/tests/toy/nixos-rebuild "$target/opt/lab/bin/nixos-rebuild"
ln -s /bento/tests/toy/bootctl "$target/opt/lab/bin/bootctl"
umount "$target/proc"
"""


class ImageError(Exception):
    """Why there is no root filesystem."""


def recipe_hash() -> str:
    parts = (SUITE, PACKAGES, MASKED, RECIPE, repr(sorted(FILES.items())))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def cache_dir() -> Path:
    if cache := os.environ.get("BENTO_CACHE"):
        return Path(cache).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "bento"


def image_path() -> Path:
    return cache_dir() / f"lab-{SUITE}-{recipe_hash()}"


def base_root() -> Path:
    """The root filesystem, made now if need be: half a minute to two, once."""
    path = image_path()
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / f"lab-{SUITE}.lock"):
        if not path.is_dir():
            for left in path.parent.glob(f".lab-{SUITE}-*"):  # of builds that were killed: we hold the lock
                shutil.rmtree(left)
            aside = Path(tempfile.mkdtemp(prefix=f".lab-{SUITE}-", dir=path.parent))
            try:
                aside.chmod(0o755)
                build(aside)
                os.sync()
                aside.rename(path)
            finally:
                if aside.exists():
                    shutil.rmtree(aside)
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(target: Path) -> None:
    log_path = target.with_name(f"lab-{SUITE}.log")
    words = ["sh", "-c", RECIPE, "lab-image", str(target), SUITE, find_mirror(), PACKAGES, str(KEYRING)]
    with open(log_path, "w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=BUILD_TIMEOUT_S, check=False,
            ).returncode  # fmt: skip
        except FileNotFoundError as error:
            raise ImageError(f"the root filesystem needs {error.filename}") from None
        except subprocess.TimeoutExpired:
            raise ImageError(f"the root filesystem was not made in {BUILD_TIMEOUT_S} s: see {log_path}") from None
    if code != 0:
        end = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise ImageError(f"the root filesystem could not be made, see {log_path}: {' | '.join(end)}")
    for name, text in FILES.items():
        write(target, name, text)
        if "\n[Install]\nWantedBy=" in text:
            wanted_by = text.rpartition("WantedBy=")[2].strip()
            link(target, f"/etc/systemd/system/{wanted_by}.wants/{Path(name).name}", f"../{Path(name).name}")
    for unit in MASKED.split():
        link(target, f"/etc/systemd/system/{unit}", "/dev/null")
    for generator in (target / "usr/lib/systemd/system-generators").iterdir():
        link(target, f"/etc/systemd/system-generators/{generator.name}", "/dev/null")
    link(target, "/etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target")


def write(root: Path, name: str, text: str) -> None:
    path = root / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def link(root: Path, name: str, target: str) -> None:
    path = root / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# --- where this machine's own apt gets Debian from ---


def find_mirror() -> str:
    """BENTO_DEBIAN_MIRROR, else what apt is set to for the release of Debian that runs here."""
    if mirror := os.environ.get("BENTO_DEBIAN_MIRROR"):
        return mirror
    release = os_release()
    if release.get("ID") == "debian":
        for uri, suites, components in apt_sources(Path("/etc/apt")):
            fetchable = uri.startswith(("http://", "https://", "file:"))
            if fetchable and release.get("VERSION_CODENAME") in suites and "main" in components:
                return uri
    raise ImageError("no Debian mirror in /etc/apt: set BENTO_DEBIAN_MIRROR to the URL of one")


def os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    return {name: value.strip("\"'") for name, _, value in (line.partition("=") for line in lines)}


def apt_sources(etc: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(URI, suites, components), from one-line and deb822 files."""
    for path in (etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            words = line.partition("#")[0].split()
            if not words or words[0] != "deb":
                continue
            while len(words) > 1 and (words[1].startswith("[") or "=" in words[1].rstrip("]")):
                del words[1]
            if len(words) > 3:
                yield words[1], [words[2]], words[3:]
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        for stanza in path.read_text(encoding="utf-8").split("\n\n"):
            lines = [line for line in stanza.splitlines() if not line.startswith("#")]
            fields = {name.lower(): value.split() for name, _, value in (line.partition(":") for line in lines)}
            if "deb" in fields.get("types", []) and fields.get("enabled") != ["no"]:
                for uri in fields.get("uris", []):
                    yield uri, fields.get("suites", []), fields.get("components", [])
