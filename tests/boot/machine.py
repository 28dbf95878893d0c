"""A machine of the boot lab: QEMU without KVM, with real firmware, boot loader, kernel and systemd.

Its disk is an overlay, and its EFI variables are a file: both outlive what happens to it. Power cut: QEMU is killed.
What the machine had not synced is lost then, as on a real one. A reset ends QEMU, and it is started anew by whoever waits
for the machine: without KVM, firmware that is reset in a running QEMU has hung.
"""

import base64
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
TOOLS = ("qemu-system-x86_64", "qemu-img", "mkfs.vfat", "mcopy", "sgdisk", "mke2fs", "mkfs.btrfs")
BOOT_TIMEOUT_S = 600.0
COMMAND_TIMEOUT_S = 120.0

T = TypeVar("T")


class MachineError(Exception):
    """The machine did not do as it was told, in time. A test that gets one has failed."""


class Gone(MachineError):
    """It went down before it answered."""


@dataclass
class Done:
    code: int
    output: str


@dataclass
class Machine:
    directory: Path
    base: Path  # the disk that it starts from, never written to
    memory_mib: int = 512
    extra: tuple[str, ...] = ()
    watchdog: bool = True
    boots: list[str] = field(default_factory=list)  # boot ids, as the agent has told them
    _process: "subprocess.Popen[bytes] | None" = None
    _agent: socket.socket | None = None
    _received: bytes = b""
    _wanted: bool = False  # on; after an end that is no power cut it is started again
    _is_up: bool = False  # its agent has greeted since it was switched on
    _orders: int = 0

    # -- what it consists of --

    @property
    def disk(self) -> Path:
        return self.directory / "disk.qcow2"

    @property
    def nvram(self) -> Path:
        return self.directory / "nvram.fd"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    def console_text(self) -> str:
        return self.console.read_text(encoding="utf-8", errors="replace") if self.console.exists() else ""

    def reset(self, disk: Path | None = None, nvram: Path | None = None) -> None:
        """As new; or as another's disk and variables are."""
        self.power_cut()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.console.unlink(missing_ok=True)
        self.boots.clear()
        self.watchdog, self.extra = True, ()
        if disk is not None and nvram is not None:
            shutil.copyfile(disk, self.disk)
            shutil.copyfile(nvram, self.nvram)
            return
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(self.base), str(self.disk)]
        subprocess.run(argv, check=True, timeout=60)
        self.forget_variables()

    def forget_variables(self) -> None:
        """Fresh NVRAM, as after a dead battery."""
        shutil.copyfile(VARIABLES, self.nvram)

    # -- power --

    def argv(self) -> list[str]:
        """A processor without wide registers: to do without KVM what uses them takes longer than to do without them."""
        return [
            "setpriv", "--pdeathsig=KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "q35,accel=tcg,smm=off",
            "-cpu", "qemu64", "-smp", "1", "-m", str(self.memory_mib), "-display", "none", "-vga", "none",
            "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE}",
            "-drive", f"if=pflash,format=raw,unit=1,file={self.nvram}",
            "-drive", f"if=none,id=disk,format=qcow2,cache=writeback,file={self.disk}",
            "-device", "virtio-blk-pci,drive=disk,bootindex=1",
            "-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-chardev", f"socket,id=console,path={self.directory}/console,server=on,wait=off,logfile={self.console},logappend=on",
            "-serial", "chardev:console",
            "-chardev", f"socket,id=agent,path={self.directory}/agent,server=on,wait=off", "-serial", "chardev:agent",
            *(("-device", "i6300esb", "-watchdog-action", "reset") if self.watchdog else ()),
            "-monitor", "none", "-action", "reboot=shutdown", *self.extra,
        ]  # fmt: skip

    @property
    def is_on(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def tend(self) -> bool:
        """Starts it again after a reset. Whether there was one."""
        if not self._wanted or self.is_on:
            return False
        self.power_on()
        return True

    def power_on(self) -> None:
        assert not self.is_on
        self._wanted = True
        if self._agent is not None:
            self._agent.close()
        for name in ("agent", "console"):
            (self.directory / name).unlink(missing_ok=True)
        with open(self.directory / "qemu.log", "ab") as log:
            self._process = subprocess.Popen(self.argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._received = b""
        self._is_up = False

        def connected() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise MachineError((self.directory / "qemu.log").read_text(errors="replace")[-2000:])
            self._agent = socket.socket(socket.AF_UNIX)
            try:
                self._agent.connect(str(self.directory / "agent"))
            except OSError:
                self._agent.close()
                return False
            return True

        wait_for(connected, 30, "QEMU's socket")

    def power_cut(self) -> None:
        self._wanted = False
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def shut_down(self) -> None:
        self._wanted = False
        self.order("systemctl poweroff --no-block")
        assert self._process is not None
        self._process.wait(90)
        self.power_cut()

    def boot(self, timeout_s: float = BOOT_TIMEOUT_S) -> str:
        """Switches it on, and waits until it has booted. Its boot id."""
        self.power_on()
        return self.wait_boot(timeout_s=timeout_s)

    def wait_boot(self, count: int = 1, timeout_s: float = BOOT_TIMEOUT_S) -> str:
        """Waits for this many boots from now on, the last of which gets up to its agent."""
        wanted = len(self.boots) + count
        deadline = time.monotonic() + timeout_s
        while len(self.boots) < wanted:
            self._receive(deadline, f"boot {wanted}")
        return self.boots[-1]

    def freeze(self) -> None:
        """The kernel turns interrupts off, and around in a circle: through QEMU's gdb stub (`-gdb` in `extra`)."""
        with socket.socket(socket.AF_UNIX) as stub:
            stub.connect(str(self.directory / "gdb"))
            stub.settimeout(10)

            received = b""

            def receive() -> bytes:
                nonlocal received
                while not (found := re.search(rb"\$([^#]*)#..", received)):
                    received += stub.recv(4096)
                received = received[found.end() :]
                stub.sendall(b"+")
                return found[1]

            def ask(command: bytes, *, waits: bool = True) -> bytes:
                stub.sendall(b"$%s#%02x" % (command, sum(command) % 256))
                answer = receive() if waits else b""
                while command == b"g" and answer[:1] in b"TS":  # that it has stopped, once more
                    answer = receive()
                return answer

            ask(b"?")
            for _ in range(200):
                registers = bytearray(bytes.fromhex(ask(b"g").decode()))
                at, flags = (int.from_bytes(registers[place : place + size], "little") for place, size in ((128, 8), (136, 4)))
                if at > 0xFFFF800000000000:
                    break
                ask(b"c", waits=False)
                time.sleep(0.2)
                stub.sendall(b"\x03")
                receive()
            registers[136:140] = (flags & ~0x200).to_bytes(4, "little")
            for command in (b"M%x,2:ebfe" % at, b"G" + registers.hex().encode(), b"D"):
                ask(command)

    # -- the agent --

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        """The next message of the agent's. A boot is also noted."""
        assert self._agent is not None
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                message = parse(line)
                if message is None:
                    continue
                if "boot" in message:
                    self._is_up = True
                    self.boots.append(message["boot"])
                return message
            left = deadline - time.monotonic()
            if left <= 0:
                raise MachineError(f"not in time: {what}\n{self.console_text()[-3000:]}")
            self._agent.settimeout(min(left, 1.0))
            try:
                chunk = self._agent.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                chunk = b""
            if not chunk:
                if not self._wanted:
                    raise Gone(f"off before: {what}")
                assert self._process is not None
                self._process.wait(30)
                self.tend()
            self._received += chunk

    def drain(self) -> None:
        """Notes the boots that there were."""
        if self._agent is None:
            return
        with contextlib.suppress(MachineError):
            while True:
                self._receive(time.monotonic() + 0.05, "nothing")

    def order(self, script: str) -> int:
        """Gives the machine a shell script to run, as soon as it is up, and does not wait. A number, for `result`.

        Before that, firmware and boot loader would take what comes on this serial port for keys: systemd-boot's `q` quits.
        """
        self.tend()
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not self._is_up:
            self._receive(deadline, "its agent")
        assert self._agent is not None
        self._orders += 1
        message = base64.b64encode(json.dumps({"id": self._orders, "script": script}).encode()) + b"\n"
        self._agent.settimeout(10)
        try:
            self._agent.sendall(message)
        except OSError as error:
            raise Gone(f"it went down: {error}") from None
        return self._orders

    def result(self, number: int, timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        deadline = time.monotonic() + timeout_s
        while True:
            message = self._receive(deadline, f"the end of order {number}")
            if message.get("id") == number:
                return Done(message["code"], message["output"])
            if "boot" in message:
                raise Gone("it booted meanwhile")

    def run(self, script: str, *, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        done = self.result(self.order(script), timeout_s)
        if check and done.code != 0:
            raise MachineError(f"{script}: exit {done.code}: {done.output}")
        return done.output

    def send_keys(self, keys: str) -> None:
        """At its console: in the boot loader's menu, say."""
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(str(self.directory / "console"))
            console.sendall(keys.encode())
            time.sleep(0.5)


def parse(line: bytes) -> dict[str, Any] | None:
    """None for what is no message: firmware and boot loaders may write to any serial port."""
    try:
        message = json.loads(base64.b64decode(line.strip().rpartition(b"\0")[2], validate=True))
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def wait_for(condition: Callable[[], T], timeout_s: float, what: str, every_s: float = 0.1) -> T:
    deadline = time.monotonic() + timeout_s
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise MachineError(f"not in {timeout_s:g} s: {what}")
        time.sleep(every_s)
