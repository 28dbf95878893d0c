#!/usr/bin/env python3
"""The lab: Debian containers that boot systemd, on a network of their own, to be cut off, filled up and powered down.

    python3 tests/lab/lab.py image    makes the root filesystem, once; prints where it is
    python3 tests/lab/lab.py clean    removes what killed runs left; runs that go on are left alone

A run owns, and is found by, what has its name in it, so that nothing needs to be recorded as it goes:

    /run/bento-lab/RUN/                    owner (pid and its start time), MACHINE/root (mounted), MACHINE/console.log
    /run/bento-lab/RUN/disk/               a tmpfs, with every machine's own files
    bento-lab-RUN, bento-lab-RUN-MACHINE   network namespaces: the wire, and each machine's
    CGROUP/bento-lab-RUN/MACHINE           control groups: every process of the run is in one of them

A machine is systemd-nspawn over an overlay. A reboot inside ends nspawn with 133, and it is started again. A power cut
is SIGKILL to the container's init, which takes every process along. What that shows, and what not:

- The kernel goes on, and with it the page cache: what was written is there after a power cut, synced or not. A missing
  fsync does not show. What was not written at all, or to a temporary name only, does.
- /run, /tmp and /dev are new at each boot; all else stays. boot_id is new.
- CLOCK_BOOTTIME and CLOCK_MONOTONIC start near 0 at each boot, in a time namespace. CLOCK_REALTIME is this machine's:
  no namespace has its own. For clock_jump, see there.
- The network namespace is the lab's, not the container's; the lab takes its address and puts the link down before each
  boot, so that a machine that does not set up its network has none.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

TESTS = Path(__file__).resolve().parents[1]
REPO = TESTS.parent
MODULE = REPO / "utils/bento.nix"
sys.path.insert(0, str(TESTS))

from toy import esp

from lab.image import PATH, ImageError, base_root, image_path, locked

RUNS = Path("/run/bento-lab")
NETNS = Path("/run/netns")
NSPAWN = Path("/run/systemd/nspawn")
NETWORK = "10.213.0"
DISK_SIZE = "6g"
REBOOT = 133  # exit code of nspawn
BOOT_TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0
ENVIRONMENT = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "TOY_MODE": "nix"}
TOOLS = ("systemd-nspawn", "ip", "nsenter", "unshare", "mount", "umount", "mkfs.ext4", "ssh-keygen", "nix-instantiate")

FILLER = ".lab-fill"
CLOCK = "/var/lib/lab-clock"
TRIAL = "bento-trial.service"
EMERGENCY = "bento-emergency.service"
# Names of only some units would do, but a transient one's is known by its prefix only: "bento-" is for all of those.
CLOCK_DROP_INS = ("bento.service.d", "bento-.service.d")

T = TypeVar("T")
Done = subprocess.CompletedProcess[str]


class LabError(Exception):
    """The lab could not do as it was told. A test that gets one has failed."""


class MachineOff(LabError):
    """There is no machine to run it on, or it went down meanwhile."""


# --- processes and polling ---


def sh(*argv: str | Path, check: bool = True, stdin: str | None = None, timeout_s: float = RUN_TIMEOUT_S) -> Done:
    """Runs a program on this machine, outside of the lab's."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL, capture_output=True,
            text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{shlex.join(words)}: {error}") from None
    if check and done.returncode != 0:
        raise LabError(f"{shlex.join(words)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done


def poll(condition: Callable[[], T], timeout_s: float, what: str, every_s: float = 0.02) -> T:
    """Waits until the condition is true, and returns what it returned."""
    deadline = time.monotonic() + timeout_s
    while True:
        if result := condition():
            return result
        if time.monotonic() > deadline:
            raise LabError(f"not in {timeout_s:g} s: {what}")
        time.sleep(every_s)


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks: with the pid, what makes it unlike any other."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


# --- mounts and control groups ---


def mounts() -> list[tuple[Path, str]]:
    """(mount point, type) of everything mounted, in the order it was."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        words = line.split()
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4])
        found.append((Path(place), words[words.index("-") + 1]))
    return found


def unmount_below(top: Path) -> None:
    """Unmounts all there is at and below a directory. A process on its way out may hold one for a moment.

    So may a mount namespace that somebody made meanwhile: it has a copy of our mounts, and keeps a loop device, and
    that the file below it, for as long as it lives. Then we let go of it, and it ends with that.
    """
    patience = time.monotonic() + END_TIMEOUT_S / 4

    def gone() -> bool:
        lazy = ["--lazy"] if time.monotonic() > patience else []
        for place, _ in reversed(mounts()):
            if place == top or top in place.parents:
                sh("umount", *lazy, place, check=False)
        return not any(place == top or top in place.parents for place, _ in mounts())

    poll(gone, END_TIMEOUT_S, f"unmount everything in {top}", every_s=0.05)


def cgroup_root() -> Path:
    """Where control groups are version 2, alone or beside version 1."""
    for place, kind in mounts():
        if kind == "cgroup2":
            return place
    raise LabError("no cgroup2 file system is mounted")


def end_cgroup(top: Path) -> None:
    """Kills all in a control group and removes it."""

    def gone() -> bool:
        # Again and again: one may just have joined. Version 1 has no such file, and no process that version 2 has not.
        # The machine's own thread may be removing it, too: then the kernel has no such device.
        try:
            if (kill := top / "cgroup.kill").exists():
                kill.write_text("1", encoding="utf-8")
            for directory, _, _ in os.walk(top, topdown=False):
                os.rmdir(directory)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT, errno.ENODEV, errno.ENOTEMPTY):
                raise
        return not top.exists()

    poll(gone, END_TIMEOUT_S, f"end all in {top}")


# --- why there may be no lab ---


def why_not() -> str | None:
    """What is missing to run the lab here, or None. The root filesystem is made, if need be."""
    if os.geteuid() != 0:
        return "the lab needs root"
    if "/usr/sbin" not in os.environ.get("PATH", "").split(":"):
        os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if not image_path().is_dir() and shutil.which("debootstrap") is None:
        missing.append("debootstrap")
    if missing:
        return f"the lab needs {', '.join(missing)}"
    trial = """
        mount -t tmpfs lab /mnt && mkdir /mnt/l /mnt/u /mnt/w /mnt/m
        truncate --size=1M /mnt/i && mkfs.ext4 -q -F /mnt/i && mkdir /mnt/s && mount -o loop /mnt/i /mnt/s
        mount -t overlay -o lowerdir=/mnt/l,upperdir=/mnt/u,workdir=/mnt/w,redirect_dir=on lab /mnt/m
        ip link add br0 type bridge && ip link add p0 type veth peer name p1 && ip link set p0 master br0
    """
    tried = sh("unshare", "--mount", "--net", "--pid", "--fork", "--", "sh", "-ec", trial, check=False)
    if tried.returncode != 0:
        return f"the lab needs overlays, loop devices, namespaces, bridges and veth: {tried.stderr.strip()}"
    try:
        probe = cgroup_root() / f"bento-lab-{secrets.token_hex(4)}"
        probe.mkdir()
        probe.rmdir()
        base_root()
    except (LabError, ImageError, OSError) as error:
        return f"the lab: {error}"
    return None


# --- a machine ---


@dataclass(frozen=True)
class Layer:
    """What a machine had on its disks when it was frozen: others can start from it."""

    paths: tuple[Path, ...]
    small: tuple[tuple[str, str], ...]


@dataclass
class Machine:
    """One machine. Made by Lab.machine(), powered off, with nothing on its disk but the root filesystem's files."""

    lab: "Lab"
    name: str
    number: int
    layer: Layer | None = None
    boots: int = 0
    small: dict[str, str] = field(default_factory=dict)
    _leader: int | None = None  # pid of the container's init, here
    _handle: int | None = None  # pidfd of it
    _wanted: bool = False  # on; after an end that is no reboot it is off
    _nspawn: "subprocess.Popen[bytes] | None" = None
    _thread: threading.Thread | None = None
    _error: str | None = None
    _commands: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    # -- what it consists of, outside --

    @property
    def directory(self) -> Path:
        return self.lab.directory / self.name

    @property
    def root(self) -> Path:
        """Its disk, seen from outside. For single files, `path` is better: it follows links as the machine does."""
        return self.directory / "root"

    @property
    def disk(self) -> Path:
        return self.lab.directory / "disk" / self.name

    @property
    def cgroup(self) -> Path:
        return self.lab.cgroup / self.name

    @property
    def netns(self) -> str:
        return f"{self.lab.netns}-{self.name}"

    @property
    def port(self) -> str:
        """Its port at the lab's switch."""
        return f"port{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def container(self) -> str:
        return f"{self.lab.netns}-{self.name}".replace("_", "-")

    @property
    def console(self) -> Path:
        """Everything that was on its console, the journal included, of every boot."""
        return self.directory / "console.log"

    def console_tail(self, lines: int = 60) -> str:
        if not self.console.exists():
            return ""
        return "\n".join(self.console.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    # -- its disk --

    def _insert_disk(self) -> None:
        lower = [*(self.layer.paths if self.layer else ()), base_root()]
        for part in ("upper", "work", "small"):
            (self.disk / part).mkdir(parents=True)
        self.root.mkdir(parents=True, exist_ok=True)
        options = f"lowerdir={':'.join(map(str, lower))},upperdir={self.disk}/upper,workdir={self.disk}/work"
        # Without redirect_dir, a directory of a lower layer could not be renamed, as it can be on any disk.
        sh("mount", "-t", "overlay", "-o", f"{options},redirect_dir=on", self.container, self.root)
        self.write("/etc/hostname", f"{self.name}\n")
        self.write("/etc/lab/address", f"{self.address}/24\n")
        for path, size in self.layer.small if self.layer else ():
            self.set_small_fs(path, size)

    def _remove_disk(self) -> None:
        unmount_below(self.root)
        unmount_below(self.disk)
        shutil.rmtree(self.disk)
        self.small.clear()

    def reset(self, layer: Layer | None = None) -> None:
        """As new, or as it was when the layer was made; powered off."""
        self.power_cut()
        self._remove_disk()
        self.layer = layer
        self.boots = 0
        self.console.unlink(missing_ok=True)
        self._insert_disk()
        self.link_up()
        self.lab._introduce()

    def freeze(self) -> Layer:
        """Shuts down, and makes a layer of its disk for reset() and Lab.machine(). It goes on from there itself."""
        if self.is_on:
            self.shut_down()
        small = tuple(self.small.items())
        for path, _ in small:
            place, kept = self.path(path, follow=True), self._small_place(path)
            sh("umount", place)
            empty(place)
            copy_into(kept, place)
            sh("umount", kept)
        unmount_below(self.root)
        frozen = self.lab.directory / "disk/layers" / f"{self.name}-{secrets.token_hex(3)}"
        frozen.parent.mkdir(exist_ok=True)
        (self.disk / "upper").rename(frozen)
        layer = Layer((frozen, *(self.layer.paths if self.layer else ())), small)
        self._remove_disk()
        self.layer = layer
        self._insert_disk()
        self.lab._introduce()
        return layer

    def path(self, path: str | Path, *, follow: bool = False) -> Path:
        """Where a file of this machine is, here. Links on the way are followed as the machine does.

        A link at the end is not, unless `follow`. What is new at each boot (/run, /tmp, /proc, /sys, /dev) is there
        only while the machine is on, and the answer holds for this boot only.
        """
        done: list[str] = []
        left = list(reversed(Path(path).parts[1:]))
        if not Path(path).is_absolute():
            raise ValueError(f"{path} is not absolute")
        links = 0
        while left:
            part = left.pop()
            if part == "..":
                del done[-1:]
                continue
            done.append(part)
            here = self._outside(done)
            if (left or follow) and here.is_symlink():
                links += 1
                if links > 40:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                target = Path(os.readlink(here))
                done.pop()
                if target.is_absolute():
                    done.clear()
                left.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        return self._outside(done)

    def _outside(self, parts: Sequence[str]) -> Path:
        if parts and parts[0] in ("run", "tmp", "proc", "sys", "dev"):
            return Path(f"/proc/{self.leader}/root", *parts)
        return Path(self.root, *parts)

    def read(self, path: str | Path) -> str:
        return self.path(path, follow=True).read_text(encoding="utf-8")

    def write(self, path: str | Path, text: str, mode: int | None = None) -> None:
        place = self.path(path, follow=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
        if mode is not None:
            place.chmod(mode)

    def exists(self, path: str | Path) -> bool:
        return self.path(path, follow=True).exists()

    # -- small file systems --

    def set_small_fs(self, path: str, size: str) -> None:
        """A file system of its own for a directory, with what is in it: it outlives power cuts, and can be filled.

        It is ext4, as on many disks: a tmpfs there would be one that a real machine forgets. size: as for `truncate`.
        Only while the machine is off.
        """
        if self.is_on:
            raise LabError(f"{self.name} is on: too late for a file system")
        place, kept = self.path(path, follow=True), self._small_place(path)
        place.mkdir(parents=True, exist_ok=True)
        kept.mkdir(parents=True)
        image = kept.with_suffix(".img")
        sh("truncate", f"--size={size.upper()}", image)
        sh("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "1024", "-O", "^has_journal", image)
        sh("mount", "-o", "loop", image, kept)
        (kept / "lost+found").rmdir()
        copy_into(place, kept)
        shutil.copystat(place, kept)
        sh("mount", "--bind", kept, place)
        self.small[path] = size

    def _small_place(self, path: str) -> Path:
        return self.disk / "small" / path.strip("/").replace("/", "-")

    def fill(self, path: str, *, leave_bytes: int = 0) -> int:
        """Fills the small file system that has this directory, from outside. Returns how many bytes that took."""
        filler = self._filler(path)
        took = 0
        chunk = 1 << 24
        with open(filler, "ab") as file:
            took = file.tell()
            while chunk >= 1024:  # a block: a boot entry takes no more
                try:
                    os.posix_fallocate(file.fileno(), took, chunk)
                    took += chunk
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    chunk //= 2
            took = max(0, took - leave_bytes)
            file.truncate(took)
        return took

    def unfill(self, path: str) -> None:
        self._filler(path).unlink(missing_ok=True)

    def _filler(self, path: str) -> Path:
        for small in sorted(self.small, key=len, reverse=True):
            if Path(path) == Path(small) or Path(small) in Path(path).parents:
                return self._small_place(small) / FILLER
        raise LabError(f"{self.name}: {path} is on no small file system: set_small_fs first")

    # -- the clock --

    def prepare_clock(self) -> None:
        """Lets clock_jump work on Bento's units, from their next start on.

        By libfaketime, in every process of bento.service and of transient units named bento-...: they see another
        CLOCK_REALTIME, and the times of files shifted as much. Not seen by it: systemd itself (OnCalendar timers keep
        to the real time), the journal, the kernel's own idea of file times, systemd-run and systemctl, static
        programs, and what is run by run().
        CLOCK_MONOTONIC and CLOCK_BOOTTIME do not jump, as they do not on a real machine.
        """
        library = next(self.root.glob("usr/lib/*/faketime/libfaketime.so.1"), None)
        if library is None:
            raise LabError("no libfaketime in the root filesystem")
        self.write(CLOCK, "+0\n")
        environment = {
            "LD_PRELOAD": f"/{library.relative_to(self.root)}",
            "FAKETIME_TIMESTAMP_FILE": CLOCK,
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "1",
            # Their event loops fail over it ("Invalid argument"), as they would not on a real machine.
            "FAKETIME_SKIP_CMDS": "systemd-run,systemctl",
        }
        words = " ".join(f"{name}={value}" for name, value in environment.items())
        for directory in CLOCK_DROP_INS:
            self.write(f"/etc/systemd/system/{directory}/lab-clock.conf", f"[Service]\nEnvironment={words}\n")
        if self.is_on:
            self.run("systemctl", "daemon-reload")

    def clock_jump(self, seconds: int) -> None:
        """Bento's clock is now this far from the real one, also in the middle of a run. Needs prepare_clock()."""
        aside = self.path(f"{CLOCK}.new")
        aside.write_text(f"{seconds:+d}\n", encoding="utf-8")
        aside.rename(self.path(CLOCK))

    # -- power --

    @property
    def is_on(self) -> bool:
        return self._wanted

    @property
    def leader(self) -> int:
        """The pid of its init, here."""
        with self._changed:
            if self._leader is None:
                raise MachineOff(f"{self.name} is off")
            return self._leader

    @property
    def is_ready(self) -> bool:
        """Whether it has reached multi-user.target since it was last booted."""
        try:
            return Path(f"/proc/{self.leader}/root/run/lab-ready").exists()
        except (MachineOff, PermissionError):
            return False

    def boot(self, *, wait: bool = True, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        if self._thread is not None and not self._wanted:
            self._thread.join(END_TIMEOUT_S)
        if self._wanted:
            raise LabError(f"{self.name} is on already")
        self._wanted, self._error = True, None
        self._thread = threading.Thread(target=self._supervise, name=f"lab-{self.name}", daemon=True)
        self._thread.start()
        if wait:
            self.wait_boot(timeout_s=timeout_s)

    def wait_boot(self, boots: int = 1, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Waits until it has been booted this often, and is up."""

        def up() -> bool:
            if self._error is not None:
                raise LabError(f"{self.name}: {self._error}\n{self.console_tail()}")
            return self.boots >= boots and self.is_ready

        self.wait_for(up, timeout_s, f"boot {boots}")

    def power_cut(self) -> None:
        """Every process of it is gone at once, unasked. Returns when it is off; no harm if it is off already."""
        with self._changed:
            self._wanted = False
            handle = self._handle
            if handle is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        thread = self._thread
        if thread is None:
            return
        # It may have been on its way up, with no init to be killed yet.
        if handle is None:
            end_cgroup(self.cgroup)
        thread.join(END_TIMEOUT_S)
        if thread.is_alive():
            raise LabError(f"{self.name} does not end\n{self.console_tail()}")
        self._thread = None

    def shut_down(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """In good order."""
        self.run("systemctl", "poweroff", check=False)
        self.wait_for(lambda: not self.is_on, timeout_s, "shut down")
        self.power_cut()

    def reboot(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """In good order, from inside."""
        before = self.boots
        self.run("systemctl", "reboot", check=False)
        self.wait_boot(before + 1, timeout_s=timeout_s)

    def boot_id(self) -> str:
        return self.run("cat", "/proc/sys/kernel/random/boot_id").stdout.strip()

    def _supervise(self) -> None:
        """The thread of a machine that is on: starts nspawn, and again for as long as it ends with a reboot."""
        try:
            while self._wanted and self._run_once() == REBOOT:
                pass
        except (LabError, OSError) as error:
            self._error = str(error)
        finally:
            with self._changed:
                self._wanted = False

    def _run_once(self) -> int:
        end_cgroup(self.cgroup)
        self.cgroup.mkdir(parents=True)
        self._unconfigure_network()
        socket_path = self.directory / "notify"
        socket_path.unlink(missing_ok=True)
        variables = self.root / esp.LAB_VARIABLES
        variables.mkdir(parents=True, exist_ok=True)
        uptime_s = int(time.clock_gettime(time.CLOCK_BOOTTIME))
        monotonic_s = int(time.monotonic())
        # nspawn mounts /sys before it joins the network namespace: it has to be there already, or it shows ours.
        argv = [
            "sh", "-c", 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"', "lab", str(self.cgroup),
            "nsenter", f"--net={NETNS}/{self.netns}", "--", "unshare", "--time", f"--boottime=-{uptime_s}", f"--monotonic=-{monotonic_s}", "--",
            "systemd-nspawn", "--quiet", f"--directory={self.root}", f"--machine={self.container}",
            f"--hostname={self.name}", "--register=no", "--keep-unit", f"--network-namespace-path={NETNS}/{self.netns}",
            "--capability=CAP_NET_ADMIN", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
            "--console=read-only", f"--bind-ro={str(REPO).replace(':', chr(92) + ':')}:/bento",
            "--tmpfs=/sys/firmware:mode=0755", f"--bind={str(variables).replace(':', chr(92) + ':')}:/sys/firmware/efi/efivars", "--boot",
        ]  # fmt: skip
        environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(socket_path), "TERM": "dumb"}
        environment |= {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "LC_ALL": "C"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open(self.console, "ab") as console:
            notify.bind(str(socket_path))
            with self._changed:
                if not self._wanted:
                    return 0
                self.boots += 1
                console.write(f"\n=== lab: boot {self.boots} of {self.name} ===\n".encode())
                console.flush()
                nspawn = subprocess.Popen(
                    argv, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=console
                )
            try:
                self._listen(nspawn, notify)
                code = nspawn.wait()
            finally:
                with self._changed:
                    self._leader = None
                    if self._handle is not None:
                        os.close(self._handle)
                    self._handle = None
            console.write(f"=== lab: {self.name} ended with {code} ===\n".encode())
        if code not in (0, REBOOT) and self._wanted:
            self._error = f"systemd-nspawn ended with {code}"
        # nspawn removes its directory itself only if /run is a tmpfs.
        for left in NSPAWN.glob(f"*/{self.container}"):
            shutil.rmtree(left, ignore_errors=True)
        return code

    def _listen(self, nspawn: "subprocess.Popen[bytes]", notify: socket.socket) -> None:
        """Learns the pid of the init. Then on, until nspawn's end: it stops, and its machine, when nobody listens."""
        ended = os.pidfd_open(nspawn.pid)
        try:
            watched: list[Any] = [notify, ended]
            while ended not in (ready := select.select(watched, [], [])[0]):
                message = notify.recv(4096).decode(errors="replace") if ready else ""
                if found := re.search(r"^X_NSPAWN_LEADER_PID=([0-9]+)$", message, re.MULTILINE):
                    self._found_leader(int(found[1]))
        finally:
            os.close(ended)

    def _found_leader(self, pid: int) -> None:
        with self._changed, contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(pid)
            self._leader = pid
            if not self._wanted:  # the power was cut meanwhile
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    # -- inside --

    def run(
        self,
        *argv: str | Path,
        check: bool = True,
        timeout_s: float = RUN_TIMEOUT_S,
        stdin: str = "",
        env: dict[str, str] | None = None,
        cwd: str = "/root",
    ) -> Done:
        """Runs a command in the machine, as root, outside of any unit. Whatever it started ends with it."""
        words = [str(word) for word in argv]
        with self._changed:
            self._commands += 1
            group = self.cgroup / "payload" / f"lab-{self._commands}"
        leader = self.leader
        environment = [f"{name}={value}" for name, value in (ENVIRONMENT | (env or {})).items()]
        command = [
            "sh", "-c", 'mkdir "$1" && echo $$ >"$1/cgroup.procs" && shift && exec "$@"', "lab", str(group),
            "nsenter", f"--target={leader}", "--all", "--root", "--", "/usr/bin/env", "-i", f"--chdir={cwd}", *environment, *words,
        ]  # fmt: skip
        # Files, not pipes: a process that is left behind would keep those open.
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(3)]
            files[0].write(stdin)
            files[0].seek(0)
            process = subprocess.Popen(command, stdin=files[0], stdout=files[1], stderr=files[2])
            late, give_up = False, time.monotonic() + timeout_s
            try:
                while process.poll() is None and not late:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(1)
                    late = time.monotonic() > give_up
                    if self.leader != leader:  # it may have been entered while it went down: then nothing ends this
                        raise MachineOff(f"{self.name} was restarted during: {shlex.join(words)}")
            finally:
                end_cgroup(group)
                process.wait()
            for file in files[1:]:
                file.seek(0)
            out, err = files[1].read(), files[2].read()
        if late:
            raise LabError(f"{self.name}: {shlex.join(words)}: not in {timeout_s:g} s\n{out}{err}")
        if check and process.returncode != 0:
            raise LabError(f"{self.name}: {shlex.join(words)}: exit {process.returncode}\n{out}{err}".rstrip())
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def wait_for(self, condition: Callable[[], T], timeout_s: float = 30.0, what: str = "condition") -> T:
        """Waits until the condition is true; says what was on the console if it never is."""
        try:
            return poll(condition, timeout_s, f"{self.name}: {what}")
        except LabError as error:
            raise LabError(f"{error}\n{self.console_tail()}") from None

    # -- the network --

    def link_down(self) -> None:
        """Pulls the cable, at the switch: the machine sees no carrier."""
        sh("ip", "-n", self.lab.netns, "link", "set", self.port, "down")

    def link_up(self) -> None:
        sh("ip", "-n", self.lab.netns, "link", "set", self.port, "up")

    def _plug_in(self) -> None:
        sh("ip", "netns", "add", self.netns)
        sh(
            "ip",
            "-n",
            self.lab.netns,
            "link",
            "add",
            self.port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.netns,
        )
        sh("ip", "-n", self.lab.netns, "link", "set", self.port, "master", "switch", "up")

    def _unconfigure_network(self) -> None:
        commands = "link set lo down\nlink set eth0 down\naddress flush dev eth0\n"
        sh("ip", "-n", self.netns, "-force", "-batch", "-", stdin=commands)

    # -- the end --

    def remove(self) -> None:
        self.power_cut()
        end_cgroup(self.cgroup)
        sh("ip", "netns", "delete", self.netns)
        self._remove_disk()
        shutil.rmtree(self.directory)


def copy_into(source: Path, target: Path) -> None:
    sh("cp", "--archive", "--", f"{source}/.", f"{target}/")


def empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# --- what the fleet's modules say ---


def evaluate(expression: str) -> Any:
    """A Nix expression's value, with `modules` for tests/modules.nix: what a NixOS would make of Bento's modules."""
    text = f"let modules = import (/. + {nix_string(f'{TESTS}/modules.nix')}) {{ }}; in {expression}"
    done = sh("nix-instantiate", "--eval", "--strict", "--json", "--expr", text)
    return json.loads(done.stdout)


def nix_string(text: str) -> str:
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${").replace("\n", "\\n")
    return f'"{quoted}"'


def host_module(settings: dict[str, Any], name: str, source: Path = MODULE) -> Any:
    """utils/bento.nix, for a host with these options of services.bento: its client.json, units and timers."""
    options = f"builtins.fromJSON {nix_string(json.dumps(settings))}"
    loader = "boot.loader.systemd-boot.enable = true;"
    module = f"{{ services.bento = {options}; networking.hostName = {nix_string(name)}; {loader} }}"
    result = evaluate(f"modules.host [ (/. + {nix_string(str(source))}) {module} ]")
    if "failed" in result:
        raise LabError(f"{source}: {result['failed']}")
    return result


def render_unit(sections: dict[str, dict[str, Any]]) -> str:
    """A unit file from systemd's sections, as NixOS writes its settings: lists are repeated, booleans are words."""

    def lines(values: dict[str, Any]) -> Iterator[str]:
        for name, value in values.items():
            for one in value if isinstance(value, list) else [value]:
                yield f"{name}={str(one).lower() if isinstance(one, bool) else one}"

    return "\n".join("\n".join([f"[{section}]", *lines(values), ""]) for section, values in sections.items())


def host_units(module: Any, *, slot_s: int, boot_s: int) -> dict[str, str]:
    """The units of a host as utils/bento.nix defines them. That of 1.0 has no trial.

    Three things differ. The timers are quicker: a slot every `slot_s` (which divides 60), the one after the boot in
    `boot_s`. Nix has no daemon here. And the command is found through /run/current-system: a toy system's units cannot
    know its store path.
    """
    service, timer, boot = module["services"]["bento"], module["timers"]["bento"], module["timers"]["bento-boot"]
    environment = {k: v for k, v in service["environment"].items() if k not in ("NIX_REMOTE", "NIX_PATH")}
    command = service["serviceConfig"]["ExecStart"].split("/bin/", 1)[1]
    unit = {
        "Description": service["description"],
        "After": " ".join(service["after"]),
        "Wants": " ".join(service["wants"]),
    } | service["unitConfig"]
    service_section = service["serviceConfig"] | {
        "X-RestartIfChanged": service["restartIfChanged"],
        "ExecStart": f"/run/current-system/sw/bin/{command}",
        "Environment": [f'"{key}={value}"' for key, value in environment.items()],
    }
    poll_section = timer["timerConfig"] | {"OnCalendar": f"*:*:0/{slot_s}", "AccuracySec": "100ms"}
    poll_section["RandomizedDelaySec"] = 0
    boot_section = boot["timerConfig"] | {"OnBootSec": f"{boot_s}s", "AccuracySec": "100ms"}
    made = ((TRIAL, trial_unit), (EMERGENCY, emergency_unit))
    return {
        "bento.service": render_unit({"Unit": unit, "Service": service_section}),
        "bento.timer": render_unit({"Unit": {"Description": timer["description"]}, "Timer": poll_section}),
        "bento-boot.timer": render_unit({"Unit": {"Description": boot["description"]}, "Timer": boot_section}),
    } | {name: make(service) for name, make in made if (service := module["services"].get(name.removesuffix(".service")))}


def trial_unit(service: dict[str, Any]) -> str:
    """What lets go of the boot loader when it is stopped. It belongs to multi-user.target: each switch starts it."""
    command = service["serviceConfig"]["ExecStop"].split("/bin/", 1)[1]
    section = service["serviceConfig"] | {
        "ExecStart": "/bin/true",
        "ExecStop": f"/run/current-system/sw/bin/{command}",
        "X-RestartIfChanged": service["restartIfChanged"],
    }
    return render_unit({"Unit": {"Description": service["description"]}, "Service": section})


def emergency_unit(service: dict[str, Any]) -> str:
    command = service["serviceConfig"]["ExecStart"].split("/bin/", 1)[1]
    section = service["serviceConfig"] | {"ExecStart": f"/run/current-system/sw/bin/{command}"}
    unit = {"Description": service["description"]} | service["unitConfig"]
    return render_unit({"Unit": unit, "Service": section})


# --- the server ---


SSHD_CONFIG = """\
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u
UsePAM yes
UseDNS no
PermitRootLogin no
PasswordAuthentication no
KbdInteractiveAuthentication no
LogLevel VERBOSE
Subsystem sftp internal-sftp
"""

# Enough to be tested without a fleet. A fleet's own comes from its fleet.nix.
MATCH = """\
Match Group bento User bento-*
  ChrootDirectory %h
  ForceCommand internal-sftp -d /
  DisableForwarding yes
"""


class Server(Machine):
    """The server: a real sshd, and the fleet in /srv/fleet, whose command is /bento/bento.py."""

    fleet = "/srv/fleet"
    chroots = "/home/chroot"

    def _insert_disk(self) -> None:
        super()._insert_disk()
        key = self.path("/etc/ssh/ssh_host_ed25519_key")
        if not key.exists():
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "server", "-f", key)
            self.path(f"{self.fleet}/hosts").mkdir(parents=True)
            self.add_group("bento")
            self.configure_sshd(MATCH)
            # Whoever logs in has no session manager here: what that costs is the benchmark's.
            self.path("/etc/systemd/system/systemd-logind.service").symlink_to("/dev/null")
            self.path("/usr/share/dbus-1/system-services/org.freedesktop.login1.service").unlink()

    @property
    def host_key(self) -> str:
        return " ".join(self.read("/etc/ssh/ssh_host_ed25519_key.pub").split()[:2])

    def configure_sshd(self, match: str) -> None:
        self.write("/etc/ssh/sshd_config", SSHD_CONFIG + match)
        if self.is_on:
            self.run("systemctl", "restart", "sshd.service")

    def add_group(self, name: str) -> None:
        groups = self.read("/etc/group")
        if f"\n{name}:" not in groups:
            self.write("/etc/group", f"{groups}{name}:x:{1000 + groups.count(chr(10))}:\n")

    def add_user(self, name: str, home: str, keys: Sequence[str]) -> None:
        """As NixOS makes them: no password, no shell, keys where only root writes."""
        users = self.read("/etc/passwd")
        group = next(line.split(":")[2] for line in self.read("/etc/group").splitlines() if line.startswith("bento:"))
        if f"\n{name}:" not in users:
            self.write(
                "/etc/passwd", f"{users}{name}:x:{2000 + users.count(chr(10))}:{group}::{home}:/usr/sbin/nologin\n"
            )
            self.write("/etc/shadow", f"{self.read('/etc/shadow')}{name}:*:20000::::::\n")
        self.write(f"/etc/ssh/authorized_keys.d/{name}", "".join(f"{key}\n" for key in keys), 0o644)

    def add_host(self, name: str, key: str) -> None:
        """A host's account and chroot, without the fleet's files: for what does not test those."""
        self.add_user(f"bento-{name}", f"{self.chroots}/{name}", [f"restrict {key}"])
        self._tmpfiles(
            f"d {self.chroots} 0755 root root -",
            f"d {self.chroots}/{name} 0750 root bento -",
            f"d {self.chroots}/{name}/logs 0750 bento-{name} bento -",
        )

    def _tmpfiles(self, *rules: str) -> None:
        self.write("/etc/tmpfiles.d/bento.conf", "".join(f"{rule}\n" for rule in rules))
        if self.is_on:
            self.run("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/bento.conf")

    def bento(self, *argv: str, check: bool = True, timeout_s: float = RUN_TIMEOUT_S) -> Done:
        """The server's command, on the server."""
        places = ("--fleet", self.fleet, "--chroot-dir", self.chroots)
        return self.run("python3", "/bento/bento.py", *places, *argv, check=check, timeout_s=timeout_s)

    def apply_fleet(self) -> None:
        """`bento.py fleet`, and what a switch of a server that includes its fleet.nix would do: exactly what it says."""
        self.bento("fleet")
        server = evaluate(f"modules.server [ (/. + {nix_string(str(self.path(f'{self.fleet}/fleet.nix')))}) ]")
        for name in server["groups"]:
            self.add_group(name)
        for name, user in server["users"].items():
            account = user.get("name", name)
            self.add_user(account, user["home"], user["openssh"]["authorizedKeys"]["keys"])
        self._tmpfiles(*server["tmpfiles"])
        limits = "".join(f"{name} {value}\n" for name, value in server["settings"].items())
        self.configure_sshd(limits + server["extraConfig"])

    def stop_sshd(self) -> None:
        """No new connection, and an end to those there are."""
        self.run("systemctl", "stop", "sshd.service")

    def start_sshd(self) -> None:
        self.run("systemctl", "start", "sshd.service")


# --- a host ---


class Host(Machine):
    """A host: a toy NixOS that is built with real Nix, its boot loader and its stage 2."""

    state = "/var/lib/bento"

    def behaviour(self, *, slot_s: int = 10, boot_s: int = 2, source: Path = MODULE, **settings: Any) -> dict[str, Any]:
        """toy.json of a host that follows the lab's server; `settings` are those of client.json, `source` is the module.

        To be changed at will, and given to toynixos.write_config(..., **behaviour).
        """
        module = host_module({"server": "server"}, self.name, source)
        units = host_units(module, slot_s=slot_s, boot_s=boot_s)
        quick = {"connect_timeout": 3, "confirm_timeout": 8, "activation_timeout": 20, "build_timeout": 60}
        return {
            "python": "/usr/bin/python3",
            "compiled": True,
            "client_json": module["settings"] | quick | settings,
            "units": units,
            "starts": [unit for unit in units if unit == TRIAL],
            "activation_command": 'ip link set eth0 "$TOY_NETWORK"',
        }

    def install(self, config: str) -> str:
        """The first generation, from a configuration on this machine: built, and made the boot default. Its path.

        The machine has to be on; it runs it from the next boot.
        """
        if self.exists(f"{config}/flake.nix"):
            source = ["--flake", f"path:{config}#{self.name}"]
        else:
            source = ["--no-flake", "-I", f"nixos-config={config}/configuration.nix"]
        self.run("nixos-rebuild", "boot", *source)
        return self.default_system()

    def client(self, *argv: str, check: bool = True, timeout_s: float = RUN_TIMEOUT_S) -> Done:
        """The running system's command, as a person at the root shell starts it."""
        return self.run("/run/current-system/sw/bin/bento-client", *argv, check=check, timeout_s=timeout_s)

    # -- which system --

    def current_system(self) -> str:
        return os.readlink(self.path("/run/current-system"))

    def booted_system(self) -> str:
        return os.readlink(self.path("/run/booted-system"))

    def profile_system(self) -> str:
        profiles = "/nix/var/nix/profiles"
        return os.readlink(self.path(f"{profiles}/{os.readlink(self.path(f'{profiles}/system'))}"))

    def default_system(self) -> str:
        """What the boot loader would boot next."""
        entry = esp.next_boot(self.root)
        return esp.system_of(entry.options) if entry is not None else ""

    def fallback_system(self) -> str:
        """What it would boot after that."""
        entry = esp.choose_default(self.root, esp.read_entries(self.root / "boot"))
        return esp.system_of(entry.options) if entry is not None else ""

    def pick(self, entry: str) -> None:
        """A person picks this entry in the boot menu when the machine starts next. Only while it is off."""
        self.write("/etc/lab/pick", f"{entry}\n")

    def label(self, system: str) -> str:
        return self.read(f"{system}/nixos-version").strip()


# --- the lab ---


M = TypeVar("M", bound=Machine)


class Lab:
    """The machines and the network between them. Use it in a `with`: everything is gone after it."""

    def __init__(self) -> None:
        self.run = f"{os.getpid():x}{secrets.token_hex(2)}"
        self.directory = RUNS / self.run
        self.netns = f"bento-lab-{self.run}"
        self.cgroup = cgroup_root() / self.netns
        self.machines: dict[str, Machine] = {}

    def __enter__(self) -> Self:
        clean()
        base_root()
        RUNS.mkdir(exist_ok=True)
        with locked(RUNS / ".lock"):
            self.directory.mkdir()
            owner = f"{os.getpid()} {start_time(os.getpid())}\n"
            (self.directory / "owner").write_text(owner, encoding="utf-8")
        try:
            (self.directory / "disk").mkdir()
            sh("mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE},mode=0755", self.netns, self.directory / "disk")
            self.cgroup.mkdir()
            sh("ip", "netns", "add", self.netns)
            sh("ip", "-n", self.netns, "link", "add", "switch", "type", "bridge")
            sh("ip", "-n", self.netns, "link", "set", "switch", "up")
        except BaseException:
            remove_run(self.run)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            for machine in self.machines.values():
                machine.power_cut()
        finally:
            self.machines.clear()
            remove_run(self.run)

    def machine(self, name: str, kind: type[M], layer: Layer | None = None) -> M:
        """A machine of this name as new, or as frozen in the layer: powered off. One that there was is reset."""
        there = self.machines.get(name)
        if type(there) is kind:
            there.reset(layer)
            return there
        if there is not None:
            there.remove()
            del self.machines[name]
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", name):
            raise ValueError(f"{name!r} is no name for a machine of the lab")
        used = {machine.number for machine in self.machines.values()}
        machine = kind(self, name, next(n for n in range(1, 255) if n not in used), layer)
        machine.directory.mkdir()
        machine._plug_in()
        self.machines[name] = machine
        machine._insert_disk()
        self._introduce()
        return machine

    def _introduce(self) -> None:
        """Tells every machine the names of all."""
        lines = [f"{machine.address} {machine.name}\n" for machine in self.machines.values()]
        for machine in self.machines.values():
            machine.write("/etc/hosts", "".join(["127.0.0.1 localhost\n", *lines]))


# --- cleaning up ---


def remove_run(run: str) -> None:
    """Everything of a run, from whatever state it is in: processes, namespaces, mounts, files."""
    name = f"bento-lab-{run}"
    end_cgroup(cgroup_root() / name)
    for place, kind in mounts():
        if kind == "cgroup":  # nspawn makes groups in version 1's hierarchy too, if there is one
            end_cgroup(place / name)
    for netns in sorted(NETNS.glob(f"{name}*")):
        sh("ip", "netns", "delete", netns.name)
    for left in NSPAWN.glob(f"*/{name}-*"):  # propagate; and unix-export, since systemd 256
        unmount_below(left)
        shutil.rmtree(left, ignore_errors=True)
    unmount_below(RUNS / run)
    shutil.rmtree(RUNS / run, ignore_errors=True)


def is_owned(run: Path) -> bool:
    try:
        pid, started = (run / "owner").read_text(encoding="utf-8").split()
    except (FileNotFoundError, ValueError):
        return False
    return start_time(int(pid)) == started


def clean() -> list[str]:
    """Removes the runs whose process is gone. Returns their names."""
    if not RUNS.is_dir():
        return []
    removed = []
    with locked(RUNS / ".lock"):
        for run in sorted(RUNS.iterdir()):
            if run.is_dir() and not is_owned(run):
                remove_run(run.name)
                removed.append(run.name)
    return removed


def main(argv: Sequence[str]) -> int:
    try:
        match argv:
            case ["image"]:
                print(base_root())
            case ["clean"]:
                for run in clean():
                    print(f"removed {run}")
            case _:
                print(f"usage: {Path(__file__).name} image | clean", file=sys.stderr)
                return 2
    except (LabError, ImageError) as error:
        print(f"lab: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
