"""What a scenario of the boot lab plays in: one machine, its server (a real sshd of this machine's, on 127.0.0.1), and
what can be seen of them."""

import base64
import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from lab.lab import host_module, host_units
from sshd import command, end_sshd
from toynixos import write_config

import bento
from boot.image import Kind, make_disk
from boot.machine import Gone, Machine, MachineError, wait_for

HOST = "toy"
GATEWAY = "10.0.2.2"  # this machine's 127.0.0.1, for the one in QEMU
REPO = Path(__file__).resolve().parents[2]
# A panic is over in two seconds; the processor has no flaws to be worked around, and its timer may be late on a busy machine.
PARAMS = ("console=ttyS0", "loglevel=4", "no_timer_check", "panic=2", "boot.panic_on_fail", "mitigations=off")
RUN_TIMEOUT_S = 300.0

LOOK = r"""
cd /bento && exec python3 -I -c '
import json, os, pathlib, sys
sys.path.insert(0, "/bento")
import bento_client as b
settings = b.read_settings({"config": "/etc/bento/client.json"})
loader = b.find_loader(settings)
label = lambda p: (pathlib.Path(os.path.realpath(p)) / "nixos-version").read_text().strip()
state = json.loads((settings.state / "state.json").read_text()) if (settings.state / "state.json").exists() else {}
armed = loader.armed()
systems = {}
for entry in (e for place in loader.places for e in loader.entries(place)):
    if entry.system and not entry.top and os.path.exists(entry.system):
        systems[entry.name] = label(entry.system)
print(json.dumps({
    "running": label("/run/current-system"), "booted": label("/run/booted-system"),
    "profile": label("/nix/var/nix/profiles/system"),
    "default": systems.get(armed.default, armed.default), "once": systems.get(armed.once, armed.once),
    "entries": sorted(set(systems.values())), "way": loader.trial_way(), "state": state,
    "journal": (settings.state / "pending.json").exists(),
}))
'
"""


@dataclass
class Seen:
    """Systems by their labels. `default`, `once`: what the boot loader was told."""

    running: str
    booted: str
    profile: str
    default: str
    once: str
    entries: list[str]
    way: str
    state: dict[str, Any]
    journal: bool

    @property
    def settled(self) -> dict[str, Any]:
        """What has to hold at rest: one system everywhere, nothing armed, no journal."""
        return {
            "running": self.running, "booted": self.booted, "profile": self.profile, "default": self.default,
            "once": self.once, "journal": self.journal,
        }  # fmt: skip


def at_rest(label: str) -> dict[str, Any]:
    return {"running": label, "booted": label, "profile": label, "default": "", "once": "", "journal": False}


class Server:
    """sshd as root, with one key, which gets SFTP in the chroot and nothing else. No account is made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # sshd wants a chroot that only root can have touched, all the way up.
        self.chroots = Path(tempfile.mkdtemp(prefix="bento-boot-", dir="/var/lib"))
        self.chroots.chmod(0o755)
        self.chroot = self.chroots / HOST
        self.fleet = directory / "fleet"
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        for name in ("host", "client"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(directory / name)]
            subprocess.run(argv, check=True, timeout=60)
        (directory / "authorized").write_text(f"restrict {(directory / 'client.pub').read_text()}")
        (directory / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {directory}/authorized\nStrictModes no\nPermitRootLogin yes\nUseDNS no\n"
            f"Subsystem sftp internal-sftp\nForceCommand internal-sftp -d /\nChrootDirectory {self.chroot}\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )

    def empty(self) -> None:
        for path in (self.chroot, self.chroots / ".store", self.fleet):
            shutil.rmtree(path, ignore_errors=True)
        (self.fleet / "hosts").mkdir(parents=True)

    def start(self) -> None:
        if self.process is None:
            program = shutil.which("sshd", path="/usr/sbin:/sbin")
            assert program is not None
            with open(self.directory / "sshd.log", "ab") as log:
                self.process = subprocess.Popen(command(program, "-D", "-e", "-f", self.directory / "sshd_config"), stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            end_sshd(self.process)
            self.process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.chroots, ignore_errors=True)

    def populate(self) -> None:
        """As who is not root: an account is not asked for."""
        argv = ["--fleet", str(self.fleet), "--chroot-dir", str(self.chroots), "populate"]
        with mock.patch("os.geteuid", return_value=1000):
            assert bento.main(argv) == 0
        for directory in (self.chroots, self.chroot):
            directory.chmod(0o755)

    def report(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.chroot / "logs/status.json").read_text())
        except FileNotFoundError:
            return {}
        return found


@dataclass
class Bed:
    kind: Kind
    machine: Machine
    server: Server
    settings: dict[str, Any] = field(default_factory=dict)
    params: tuple[str, ...] = PARAMS

    def behaviour(self, label: str, **more: Any) -> dict[str, Any]:
        settings = self.settings | more.pop("settings", {})
        params = [*more.pop("params", self.params), *more.pop("more_params", ())]
        params += ["${bento_trial}"] if self.kind.loader == "grub" else []
        units = host_units(host_module(settings, HOST), slot_s=15, boot_s=1)
        loader = {"loader": "grub"} if self.kind.loader == "grub" else {}
        made = {"label": label, "client_json": settings, "units": units, "starts": ["bento-trial.service"], "kernel_params": params, "compiled": True}
        return made | loader | more

    def publish(self, label: str, **more: Any) -> None:
        write_config(self.server.fleet / "hosts" / HOST, flake=True, host=HOST, **self.behaviour(label, **more))
        self.server.populate()

    # -- what is to be seen --

    def look(self) -> Seen:
        return Seen(**json.loads(self.machine.run(LOOK).strip().splitlines()[-1]))

    def booted(self) -> str:
        """The label of what the boot loader started, as soon as there is an answer."""
        script = "read -r line </proc/cmdline; system=${line##*init=}; cat ${system%%/init*}/nixos-version"
        return self.machine.run(script).strip()

    def result(self) -> tuple[str, str]:
        """Of the last attempt, as reported: its result and reason."""
        last = self.server.report().get("last") or {}
        return last.get("result", ""), last.get("reason", "")

    def attempts(self) -> list[str]:
        """The results of all attempts whose logs have arrived, the oldest first."""
        logs = sorted((self.server.chroot / "logs").glob("*.log"))
        return [path.stem.split("_", 2)[2] for path in logs]

    def failures(self) -> list[str]:
        """Those of them that did not end well. A commit before the trial ends well, and so does the trial's proof."""
        return [result for result in self.attempts() if result != "ok"]

    # -- what happens --

    def boot(self) -> None:
        self.server.start()
        self.machine.boot()

    def update(self, *, waits: bool = True) -> None:
        """One run of the client now, as the timer would start it; whatever becomes of it. It may reboot."""
        ends = "while systemctl is-active --quiet bento.service; do sleep 0.3; done"  # its start is no more than that
        number = self.machine.order(f"{ends}; systemctl start bento.service; {ends}")
        if waits:
            try:
                self.machine.result(number, RUN_TIMEOUT_S)
            except Gone:
                return

    def wait(self, condition: Callable[[Seen], bool], what: str, timeout_s: float = 900.0) -> Seen:
        """Until the machine looks as it is wanted, however often it boots meanwhile, with its timers at work. It is
        looked at when it has reported something new: looking takes time from it."""
        deadline = time.monotonic() + timeout_s
        seen: Seen | None = None
        told: object = ()
        again = 0.0
        while time.monotonic() < deadline:
            self.machine.drain()
            now = self.server.report(), self.attempts(), len(self.machine.boots)
            if now == told and time.monotonic() < again:
                time.sleep(0.5)
                continue
            told, again = now, time.monotonic() + 20
            time.sleep(2)
            try:
                seen = self.look()
                if condition(seen):
                    return seen
            except (MachineError, ValueError, IndexError, KeyError):
                told = ()
        raise MachineError(f"not in {timeout_s:g} s: {what}; seen: {seen}; reported: {self.server.report()}\n{self.tail()}")

    def wait_report(self, condition: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 900.0) -> None:
        def reported() -> bool:
            self.machine.drain()
            return condition(self.server.report())

        try:
            wait_for(reported, timeout_s, what, every_s=0.5)
        except MachineError as error:
            raise MachineError(f"{error}; reported: {self.server.report()}\n{self.tail()}") from None

    def wait_console(self, text: str, times: int = 1, timeout_s: float = 900.0) -> None:
        """Until this has been on its console so often."""

        def there() -> bool:
            self.machine.tend()
            return self.machine.console_text().count(text) >= times

        try:
            wait_for(there, timeout_s, f"{text!r} on the console, {times} times", every_s=0.05)
        except MachineError as error:
            raise MachineError(f"{error}; reported: {self.server.report()}\n{self.tail()}") from None

    def power_cycle(self) -> None:
        self.machine.power_cut()
        self.machine.boot()

    def write_config(self, label: str, **more: Any) -> str:
        """A configuration on the machine itself, as a person has one. Its directory there."""
        with tempfile.TemporaryDirectory() as scratch:
            write_config(Path(scratch, "c"), flake=True, host=HOST, **self.behaviour(label, **more))
            argv = ["tar", "-C", scratch, "-cz", "c"]
            packed = base64.b64encode(subprocess.run(argv, check=True, capture_output=True).stdout).decode()
        place = f"/root/{label}"
        self.machine.run(f"mkdir -p {place}")
        for at in range(0, len(packed), 2000):  # a serial line
            self.machine.run(f"printf %s {packed[at : at + 2000]} >>{place}/tar")
        self.machine.run(f"base64 -d {place}/tar | tar -xz -C {place} && mv {place}/c/* {place}/")
        return place

    def tail(self) -> str:
        text = re.sub(r"\x1b\[[0-9;?=]*[A-Za-z]", "", self.machine.console_text())
        return "\n".join([line for line in text.splitlines() if line.strip()][-80:])


def make_bed(kind: Kind, directory: Path, server: Server, **settings: Any) -> Bed:
    """A machine of a kind that has booted v0 and knows its server; shut down, with no wait in its menu."""
    made: dict[str, Any] = {
        "server": [GATEWAY], "port": server.port, "user": "root", "host": HOST, "state_dir": "/var/lib/bento",
        "connect_timeout": 10, "confirm_timeout": 30, "activation_timeout": 120, "reboot": "when-needed",
        "boot_loader": kind.boot_loader,
    } | settings  # fmt: skip
    bed = Bed(kind, Machine(directory / kind.name, Path()), server, made)
    write_config(directory / f"{kind.name}-v0", flake=True, host=HOST, **bed.behaviour("v0"))
    files = {
        "/var/lib/bento/id_ed25519": (server.directory / "client").read_text(),
        "/etc/ssh/ssh_config.d/lab.conf": "",
        "/etc/lab/kind": f"{kind.name}\n",
    }
    bed.machine.base = make_disk(kind, directory, directory / f"{kind.name}-v0", files)
    return bed


def first_boot(bed: Bed) -> tuple[Path, Path]:
    """Boots it for the first time, with nothing published yet. Copies of its disk and variables, for each scenario."""
    bed.machine.reset()
    bed.machine.boot()
    if bed.kind.loader == "systemd-boot":
        bed.machine.run("bootctl set-timeout 0")
    bed.machine.run("sync")
    bed.machine.shut_down()
    kept = bed.machine.directory / "kept.qcow2", bed.machine.directory / "kept.fd"
    shutil.copyfile(bed.machine.disk, kept[0])
    shutil.copyfile(bed.machine.nvram, kept[1])
    return kept


