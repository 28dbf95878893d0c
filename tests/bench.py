#!/usr/bin/env python3
"""What Bento costs, against what a user would otherwise run, side by side in one run.

    python3 tests/bench.py [--quick | --full] [--only SECTION] [--svg FILE]

Every row is a ratio of medians on this machine, now: there is no absolute promise in it, and nothing is asserted. Needs
Git, rsync, sftp and sftp-server; the sections `line` and `load` need root and sshd, for chroots, and for accounts in an /etc
that only the bench can see; `pam` needs what the lab in tests/lab does, and boots a machine there. All network traffic
stays on 127.0.0.1 and in that lab. Takes about six minutes on two cores; --quick less than two, with everything scaled
down; --full goes to 10,000 hosts, and takes twenty minutes and 5 GB of disk. What else the machine does shows in the
figures, and on ext4 what it has removed in the last five minutes, too.

Sections of this file: the table, processes, fleets, machines, a slow line, a server, what is measured, a server with PAM
and logind, the plot, command line.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"bench: error: Python 3.11 or later is needed; this is {sys.version.split()[0]}")

import argparse
import json
import math
import os
import py_compile
import queue
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import accounts
from lab import image, lab
from sshd import command, descendants, end_sshd, free_port, match_block, max_startups, no_penalties
from toynixos import PYTHON_FLAGS, TOY

import bento_client as client

REPO = Path(__file__).resolve().parent.parent
SERVER, CLIENT = REPO / "bento.py", REPO / "bento_client.py"
COMPILED = "bento_client.pyc"
MB = 1_000_000
INTERVAL_S = 15 * 60
FLEET = 10_000
# The client's patience with a server that does not answer: pauses of 1, 2, 4, 8 s, as long as they end within 20 s.
PATIENCE_S = 20

Argv = Sequence[str | Path]
T = TypeVar("T")


class BenchError(Exception):
    """What is measured did not work, or a program is missing."""


# --- the table ---


@dataclass(frozen=True)
class Scale:
    """How much is measured. Sizes in bytes, times in seconds."""

    hosts: int
    rounds: int
    sizes: tuple[int, ...]
    delay_s: float = 0.1
    files: int = 100
    file_sizes: tuple[int, ...] = (10, 100, 1000)
    large_file: int = 50 * MB
    heavy: int = 300 * MB
    shared: int = 200 * MB
    flake_files: int = 50_000
    flake_hosts: int = 100
    load_s: float = 20
    burst: int = 300
    stock_steady: bool = False  # the steady load with sshd's own MaxStartups, too
    small: bool = False


@dataclass(frozen=True)
class Row:
    what: str
    ours: str
    against: str = ""
    theirs: str = ""
    ratio: str = ""
    target: str = ""
    good: bool | None = None


def format_row(row: Row) -> str:
    missed = "missed" if row.good is False else ""
    cells = f"{row.what:<54} | {row.ours:>7} | {row.against:<37} | {row.theirs:>7} | {row.ratio:>7} | {row.target:<12} | {missed:<6}"
    return f"| {cells} |"


HEAD = format_row(Row("what", "Bento", "against", "", "ratio", "target"))
HEAD += "\n" + re.sub(r"[^|]", "-", HEAD).replace("-|", " |").replace("|-", "| ")


def format_s(seconds: float) -> str:
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def percentile(values: Iterable[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


@dataclass
class Bench:
    """A run: its scale, its temporary directory, and what it has found so far."""

    scale: Scale
    top: Path
    stack: ExitStack
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sites: dict[int, "Site"] = field(default_factory=dict)
    series: list["Series"] = field(default_factory=list)
    running_server: "Server | None" = None

    def show(self, row: Row) -> None:
        self.rows.append(row)
        print(format_row(row), flush=True)

    def compare(
        self,
        what: str,
        ours: Sequence[float],
        against: str,
        theirs: Sequence[float],
        at_most: float | None,
        *,
        target: str = "",
        judged: bool = True,
    ) -> None:
        """A row of seconds. `at_most` is the target of the ratio, `target` how to say it."""
        mine, other = statistics.median(ours), statistics.median(theirs)
        ratio, good = mine / other, None
        if at_most is not None:
            target = target or f"≤ {at_most:g}"
            good = ratio <= at_most if judged else None
        self.show(Row(what, format_s(mine), against, format_s(other), f"{ratio:.3g}", target, good))

    def limit(self, what: str, value: float, form: str, at_most: float | None, against: str = "") -> None:
        """A row of one number, formatted with `form`."""
        target = "" if at_most is None else "≤ " + form.format(at_most)
        self.show(Row(what, form.format(value), against, target=target, good=None if at_most is None else value <= at_most))

    def note(self, title: str, *lines: str) -> None:
        self.notes.append("\n".join([f"\n{title}\n", *(f"  {line}" for line in lines)]))

    def site(self, hosts: int) -> "Site":
        """The fleet of so many hosts, made when it is first asked for."""
        if hosts not in self.sites:
            say(f"making a fleet of {hosts}")
            self.sites[hosts] = Site.create(self.top / f"site-{hosts}", [f"h{number:05}" for number in range(hosts)])
        return self.sites[hosts]

    def server(self) -> "Server":
        if self.running_server is None:
            say("making accounts and chroots for a real sshd")
            self.running_server = Server.create(self.top, self.stack)
        return self.running_server


def say(text: str) -> None:
    """Progress, for who watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}…", end="\r", file=sys.stderr, flush=True)


# --- processes ---

live: set[subprocess.Popen[bytes]] = set()
stopping = threading.Event()


@dataclass(frozen=True)
class Cost:
    """What a process took, with the children that it waited for. `peak` is its own memory alone, in bytes."""

    elapsed_s: float
    cpu_s: float
    code: int
    said: str
    peak: int = 0


def measure(
    argv: Argv,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    codes: Sequence[int] = (0,),
    gate: int | None = None,
) -> Cost:
    """Runs a program to its end. BenchError when it fails, lest a failure be taken for speed.

    `gate`: a pipe; the program starts when its other end is closed.
    """
    if stopping.is_set():
        raise BenchError("stopped")
    if gate is not None:
        argv = ["sh", "-c", 'read -r _; exec "$@"', "sh", *argv]
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL if gate is None else gate, stdout=subprocess.DEVNULL,
            stderr=errors, process_group=0,
        )  # fmt: skip
        live.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        elapsed_s = time.perf_counter() - started
        live.discard(process)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if process.returncode not in codes:
        raise BenchError(f"{Path(argv[0]).name} {argv[-1]}: exit {process.returncode}: {said.strip()[-600:]}")
    return Cost(elapsed_s, usage.ru_utime + usage.ru_stime, process.returncode, said)


def end_live() -> None:
    """Ends what still runs, and keeps threads from starting more."""
    stopping.set()
    for process in list(live):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# Runs one of the two scripts as `python3 SCRIPT` does, compiling it, and tells its own peak of memory: ru_maxrss would
# be the bench's, if that is larger. Publishes as anybody may: root would be asked for the hosts' accounts.
SPY = """\
import os, runpy, sys
mode, told, script = sys.argv[1:4]
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))
if mode == "anybody":
    os.geteuid = lambda: 1
try:
    runpy.run_path(script, run_name="__main__")
finally:
    with open("/proc/self/status") as status, open(told, "w") as file:
        file.write([line.split()[1] for line in status if line.startswith("VmHWM:")][0])
"""


def spy(script: Path, *words: str | Path, mode: str = "anybody", env: Mapping[str, str] | None = None) -> Cost:
    with tempfile.NamedTemporaryFile() as told:
        argv = [sys.executable, "-I", "-c", SPY, mode, told.name, script, *words]
        if mode == "anybody":
            argv.remove("-I")  # it would hide PYTHONPYCACHEPREFIX
        cost = measure(argv, env=env)
        peak = int(Path(told.name).read_text()) * 1024
    return Cost(cost.elapsed_s, cost.cpu_s, cost.code, cost.said, peak)


def cpu_of(argv: Argv) -> Callable[[], float]:
    return lambda: measure(argv).cpu_s


def alternate(rounds: int, *actions: Callable[[], float]) -> list[list[float]]:
    """Runs the actions in turn, so that what else the machine does falls on all of them."""
    results: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for found, action in zip(results, actions, strict=True):
            found.append(action())
    return results


# --- fleets ---


def make_fleet(top: Path, names: Iterable[str]) -> None:
    """31 files a host, 20 of them shared through utils/."""
    dice = random.Random(1)
    (top / "utils").mkdir(parents=True)
    for number in range(20):
        (top / f"utils/module-{number}.nix").write_text(dice.randbytes(1500).hex())
    for name in names:
        host = top / "hosts" / name
        host.mkdir(parents=True)
        (host / "utils").symlink_to("../../utils")
        (host / "configuration.nix").write_text(f"# {name}\n")
        for part in range(10):
            (host / f"part-{part}.nix").write_text(dice.randbytes(600).hex())


def commit_all(fleet: Path) -> None:
    """Commits what lies there, packed at first as a clone, or a repository of some age, is."""
    new = not (fleet / ".git").exists()
    git: Argv = ["git", "-C", fleet, "-c", "user.name=bench", "-c", "user.email=bench@example.org", "-c", "gc.auto=0"]
    for words in (["init", "-q"] if new else [], ["add", "-A"], ["commit", "-q", "-m", "a change"], ["repack", "-adq"] if new else []):
        if words:
            call(*git, *words)


def write_random(path: Path, size: int) -> None:
    """A file that no compression makes smaller."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for start in range(0, size, 10 * MB):
            file.write(os.urandom(min(10 * MB, size - start)))


@dataclass
class Site:
    """A fleet's directory and its chroots, published as anybody may."""

    fleet: Path
    chroot: Path
    hosts: int
    new: list[Cost] = field(default_factory=list)
    same: list[Cost] = field(default_factory=list)
    status: list[float] = field(default_factory=list)

    @classmethod
    def create(cls, top: Path, names: Sequence[str]) -> "Site":
        make_fleet(top / "fleet", names)
        commit_all(top / "fleet")
        return cls(top / "fleet", top / "chroot", len(names))

    def populate(self) -> Cost:
        return spy(SERVER, "--fleet", self.fleet, "--chroot-dir", self.chroot, "populate")

    def populate_new(self) -> float:
        """Into a new directory. The one before stays until the end of the bench: for five minutes after a mass of files
        is removed, ext4 passes over their inodes, one by one, for each new file, and 100 hosts take 4 s, not 1 s."""
        if self.chroot.exists():
            self.chroot.rename(self.chroot.with_name(f"chroot-{len(self.new)}"))
        os.sync()
        self.new.append(self.populate())
        return self.new[-1].elapsed_s

    def populate_same(self) -> float:
        if not self.chroot.exists():
            self.populate_new()
        self.same.append(self.populate())
        return self.same[-1].elapsed_s

    def write_reports(self) -> None:
        """What hosts that are up to date have reported."""
        if not self.chroot.exists():
            self.populate_new()
        for path in (self.fleet / "hosts").iterdir():
            current = client.parse_current((self.chroot / path.name / "current.json").read_bytes(), path.name)
            last = client.Last(current.release, "ok", "", "/nix/store/x", current.published, current.published, 1,
                               client.log_name(time.time(), current.release, "ok"))  # fmt: skip
            report = client.Report(path.name, client.VERSION, current.published, "idle", current.release, "/nix/store/x", False, last)
            (self.chroot / path.name / "logs/status.json").write_bytes(client.encode(report))

    def show_status(self) -> float:
        words: Argv = [sys.executable, SERVER, "--fleet", self.fleet, "--chroot-dir", self.chroot, "status", "--json"]
        self.status.append(measure(words).elapsed_s)
        return self.status[-1]

    def cat_reports(self) -> float:
        return measure(["sh", "-c", 'cat "$1"/*/logs/status.json', "sh", self.chroot]).elapsed_s


# --- machines ---

# What stands in for NixOS: a build, an activation and a commit that take a millisecond each.
PROGRAMS = {
    "nixos-rebuild": '#!/bin/sh\nexec ln -sfn "$BENCH_SYSTEM" result\n',
    "nix-env": '#!/bin/sh\nexec ln -sfn "$4" "$2"\n',
}
SWITCH = '#!/bin/sh\n[ "$1" != test ] || exec ln -sfn "${0%/bin/*}" "$BENCH_ROOT/run/current-system"\n'


@dataclass
class Machine:
    """A host in a directory. `chroot`: polls that one without ssh; else a real sshd on 127.0.0.1."""

    top: Path
    host: str
    settings: dict[str, object]
    chroot: Path | None = None
    systems: int = 0

    @classmethod
    def create(cls, top: Path, host: str, *, chroot: Path | None = None, server: "Server | None" = None) -> "Machine":
        """A machine that polls a server, or with `chroot` that directory, through sftp without ssh."""
        settings: dict[str, object] = {"host": host, "root": str(top / "root"), "state_dir": str(top / "state")}
        if server is None:
            settings["server"] = "server"
        else:
            known, identity = str(server.top / "known_hosts"), str(server.top / "keys" / host)
            settings |= {"server": "127.0.0.1", "port": server.port, "identity": identity, "known_hosts": known}
        machine = cls(top, host, settings, chroot)
        for name in ("programs", "root/run", "root/nix/var/nix/profiles"):
            (top / name).mkdir(parents=True)
        for name, text in PROGRAMS.items():
            write_program(top / "programs" / name, text)
        py_compile.compile(str(CLIENT), str(top / COMPILED), doraise=True)
        if chroot is not None:
            (top / "programs/sftp").symlink_to(TOY / "sftp")
        machine.configure()
        system = machine.new_system()
        for link in ("run/current-system", "run/booted-system", "nix/var/nix/profiles/system"):
            (top / "root" / link).symlink_to(system)
        machine.client("key")
        return machine

    def configure(self, **settings: object) -> None:
        """Changes settings, of the next system as well."""
        self.settings |= settings
        (self.top / "client.json").write_text(json.dumps(self.settings))

    def new_system(self) -> Path:
        """What the next build gives: a system that runs this client with these settings."""
        self.systems += 1
        system = self.top / f"system-{self.systems}"
        write_program(system / "bin/switch-to-configuration", SWITCH)
        words = f'exec "{sys.executable}" {" ".join(PYTHON_FLAGS)} "{self.top / COMPILED}" --config "{system}/etc/bento/client.json" "$@"'
        write_program(system / "sw/bin/bento-client", f"#!/bin/sh\n{words}\n")
        (system / "etc/bento").mkdir(parents=True)
        (system / "etc/bento/client.json").write_text(json.dumps(self.settings))
        return system

    def env(self) -> dict[str, str]:
        mine = {"PATH": f"{self.top / 'programs'}:{os.environ['PATH']}", "BENCH_ROOT": str(self.top / "root")}
        mine["BENCH_SYSTEM"] = str(self.top / f"system-{self.systems}")
        if self.chroot is not None:
            mine |= {"TOY_CHROOT": str(self.chroot), "TOY_ROOT": str(self.top / "root")}
        return dict(os.environ) | mine

    def client(self, command: str, gate: int | None = None) -> Cost:
        """Runs the client as utils/bento.nix does."""
        argv: Argv = [sys.executable, *PYTHON_FLAGS, self.top / COMPILED, "--config", self.top / "client.json", command]
        return measure(argv, env=self.env(), gate=gate)

    def poll(self, gate: int | None = None) -> Cost:
        """A poll that finds nothing new."""
        return self.client("run", gate)

    def update(self, *, spied: bool = False) -> Cost:
        """A run that finds a release, and ends with a new system."""
        system = self.new_system()
        if spied:
            cost = spy(CLIENT, "--config", self.top / "client.json", "run", mode="as it is", env=self.env())
        else:
            cost = self.client("run")
        if (self.top / "root/run/current-system").resolve() != system.resolve():
            raise BenchError(f"{self.host}: not updated: {cost.said[-600:]}")
        return cost


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# --- a slow line ---


class Line:
    """Carries TCP connections to a port of this machine over a line: `delay_s` each way, `rate` bytes a second.

    In order, and as a stream: what waits on the line does not wait for what is behind it. A connection takes the round
    trip of TCP's own handshake before its first bytes leave. All connections share the line.
    """

    def __init__(self, to_port: int, delay_s: float, rate: float | None = None) -> None:
        self.to_port, self.delay_s, self.rate = to_port, delay_s, rate
        self.connections = 0
        self.carried = [0, 0]  # up, down
        self.busy_until = [0.0, 0.0]
        self.guard = threading.Lock()
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def close(self) -> None:
        for each in (self.listener, *self.sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                self.connections += 1
                self.sockets.append(near)
                threading.Thread(target=self.serve, args=(near,), daemon=True).start()

    def serve(self, near: socket.socket) -> None:
        time.sleep(2 * self.delay_s)
        try:
            first = near.recv(1 << 16)
            time.sleep(self.delay_s)
            far = socket.create_connection(("127.0.0.1", self.to_port))
            self.sockets.append(far)
            far.sendall(first)
        except OSError:
            near.close()
            return
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for way, (source, sink) in enumerate(((near, far), (far, near))):
            pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            threading.Thread(target=self.take, args=(source, way, pieces), daemon=True).start()
            threading.Thread(target=self.give, args=(sink, pieces), daemon=True).start()

    def take(self, source: socket.socket, way: int, pieces: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(1 << 16 if self.rate is None else 1 << 14)
            except OSError:
                data = b""
            now = time.monotonic()
            with self.guard:
                self.carried[way] += len(data)
                if self.rate is not None:
                    self.busy_until[way] = max(now, self.busy_until[way]) + len(data) / self.rate
                    now = self.busy_until[way]
            pieces.put((now + self.delay_s, data))
            # No more than 50 ms of it in the line's own memory: the sender is to feel that the line is full.
            time.sleep(max(0.0, now - time.monotonic() - 0.05))

    def give(self, sink: socket.socket, pieces: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due, data = pieces.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def line(to_port: int, delay_s: float, rate: float | None = None) -> Iterator[Line]:
    found = Line(to_port, delay_s, rate)
    try:
        yield found
    finally:
        found.close()


def check_line(delay_s: float, rate: float) -> tuple[float, float]:
    """A line's own figures, as an echo finds them: round trip in seconds, bytes a second."""
    size = int(rate / 2)
    with socket.create_server(("127.0.0.1", 0)) as echo, line(echo.getsockname()[1], delay_s, rate) as slow:

        def answer() -> None:
            with suppress(OSError):
                there, _ = echo.accept()
                with there:
                    while data := there.recv(1 << 16):
                        if data.endswith(b"?"):
                            there.sendall(b"!")

        threading.Thread(target=answer, daemon=True).start()
        with socket.create_connection(("127.0.0.1", slow.port)) as here:
            here.sendall(b"?")
            here.recv(1)
            started = time.perf_counter()
            here.sendall(b"?")
            here.recv(1)
            trip_s = time.perf_counter() - started
            started = time.perf_counter()
            here.sendall(bytes(size) + b"?")
            here.recv(1)
            return trip_s, size / (time.perf_counter() - started - trip_s)


# --- a server ---

ACCOUNTS = 24


def call(*argv: str | Path, check: bool = True) -> str:
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        process_group=0,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise BenchError(f"{' '.join(map(str, argv))}: exit {done.returncode}: {done.stdout.strip()[-600:]}")
    return done.stdout


def why_no_server() -> str | None:
    """Why a real sshd cannot be had here."""
    missing = [name for name in ("sshd", "ssh-keygen", "unshare", "setpriv") if shutil.which(name) is None]
    return f"needs {', '.join(missing)}" if missing else accounts.why_not()


@dataclass
class Server:
    """A real sshd with fleet.nix's settings, and a few hosts' accounts and chroots, all below `top`."""

    top: Path
    port: int
    hosts: list[str]
    process: subprocess.Popen[bytes] | None = None
    began_with: str = ""
    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()  # what runs a program where that address can be reached

    @classmethod
    def create(cls, directory: Path, stack: ExitStack) -> "Server":
        (directory / "server").mkdir(mode=0o755)
        top = accounts.root_owned(directory / "server")
        server = cls(top, free_port(), [f"bench{os.getpid()}-{number}" for number in range(ACCOUNTS)])
        for name in ("authorized", "keys", "machines"):
            (top / name).mkdir()
        make_fleet(top / "fleet", server.hosts)
        for host in server.hosts:
            server.make_account(host)
        server.bento("fleet")
        server.bento("populate")
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", top / "host_key")
        key = " ".join((top / "host_key.pub").read_text().split()[:2])
        (top / "known_hosts").write_text(f"* {key}\n")
        stack.callback(server.stop)
        return server

    def make_account(self, host: str) -> None:
        user, key = f"bento-{host}", self.top / "keys" / host
        accounts.add_user(user, "bento", self.chroot(host))
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", user, "-f", key)
        public = key.with_name(f"{host}.pub").read_text()
        (self.top / "fleet/hosts" / f"{host}.pub").write_text(public)
        (self.top / "authorized" / user).write_text(f"restrict {public}")

    def bento(self, *words: str) -> None:
        call(sys.executable, SERVER, "--fleet", self.top / "fleet", "--chroot-dir", self.top / "chroots", *words)

    def start(self, count: int | None) -> str:
        """Starts sshd as fleet.nix sets it for a fleet of `count` hosts, or with its own MaxStartups; which it says."""
        fleet_nix = (self.top / "fleet/fleet.nix").read_text()
        startups = "10:30:100" if count is None else max_startups(fleet_nix, count)
        if self.process is not None:
            if self.began_with == startups:
                return startups
            self.stop()
        sshd = str(shutil.which("sshd"))  # it wants to be called by its absolute path
        config = f"""\
            ListenAddress 127.0.0.1
            Port {self.port}
            HostKey {self.top}/host_key
            PidFile none
            UsePAM no
            AuthorizedKeysFile {self.top}/authorized/%u
            MaxStartups {startups}
            {no_penalties(sshd)}
            Subsystem sftp internal-sftp
            """
        (self.top / "sshd_config").write_text(textwrap.dedent(config) + match_block(fleet_nix))
        argv: Argv = command(sshd, "-D", "-f", self.top / "sshd_config", "-E", self.top / "sshd.log")
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, process_group=0)
        self.began_with = startups
        give_up = time.monotonic() + 10
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port), 5):
                return startups
            if time.monotonic() > give_up or self.process.poll() is not None:
                raise BenchError(f"sshd does not start: {(self.top / 'sshd.log').read_text()[-600:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            end_sshd(self.process)
            self.process = None

    def cpu_s(self) -> float:
        """Of sshd and all of its connections that have ended."""
        assert self.process is not None
        give_up = time.monotonic() + 20
        while descendants(self.process.pid) and time.monotonic() < give_up:
            time.sleep(0.1)
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")

    def chroot(self, host: str) -> Path:
        return self.top / "chroots" / host

    def machine(self, host: str) -> Machine:
        return Machine.create(self.top / "machines" / host, host, server=self)

    def sftp(
        self,
        host: str,
        batch: str,
        *options: str,
        port: int | None = None,
        codes: Sequence[int] = (0,),
        gate: int | None = None,
    ) -> Cost:
        """A bare `sftp -b`, with the options that a person would give it for a machine."""
        with tempfile.NamedTemporaryFile("w", dir=self.top) as file:
            file.write(batch)
            file.flush()
            argv = [*self.enter, "sftp", "-b", file.name, "-C", "-P", str(port or self.port), "-i", str(self.top / "keys" / host)]
            always = (f"UserKnownHostsFile={self.top / 'known_hosts'}", "IdentitiesOnly=yes", "ControlPath=none")
            for option in (*always, f"ConnectTimeout={PATIENCE_S}", *options):
                argv += ["-o", option]
            return measure([*argv, "-F", os.devnull, f"bento-{host}@{self.address}"], cwd=self.top, codes=codes, gate=gate)


# --- what is measured ---


def bench_start(bench: Bench) -> None:
    """How long Python takes to start, and to load the two scripts."""
    rounds = 5 if bench.scale.small else 20
    load = f"import sys; sys.path.insert(0, {str(REPO)!r}); import "
    imported = [sys.executable, "-I", "-S", "-X", f"pycache_prefix={bench.top / 'pycache'}", "-c"]
    py_compile.compile(str(CLIENT), str(bench.top / COMPILED), doraise=True)
    actions: dict[str, Argv] = {
        "bare": [sys.executable, "-I", "-S", "-c", "pass"],
        "with site": [sys.executable, "-I", "-c", "pass"],
        "client": [sys.executable, *PYTHON_FLAGS, CLIENT, "--version"],
        "compiled client": [sys.executable, *PYTHON_FLAGS, bench.top / COMPILED, "--version"],
        "server": [sys.executable, SERVER, "--version"],
    }
    for argv in actions.values():
        measure(argv)  # what is cached is cached from here on
    found = alternate(rounds, *(cpu_of(argv) for argv in actions.values()))
    took = dict(zip(actions, found, strict=True))
    for name, what in (("compiled client", COMPILED), ("client", CLIENT.name), ("server", SERVER.name)):
        bench.compare(f"{what} --version, CPU", took[name], "python3 -I -S -c pass, CPU", took["bare"], None)
    medians = {name: statistics.median(times) for name, times in took.items()}
    lines = [
        f"python3 -I -S -c pass {format_s(medians['bare'])}; this machine's site packages would add"
        f" {format_s(max(0.0, medians['with site'] - medians['bare']))}, and do for bento.py: only the client does without",
        f"utils/bento.nix compiles the client once; bento_client.py itself is compiled at each start, which takes"
        f" {format_s(max(0.0, medians['client'] - medians['compiled client']))}",
    ]
    for name in ("bento_client", "bento"):
        lines.append(f"{name} loads {describe_imports(imported, load + name)}")
    bench.note("Start-up, in CPU time", *lines)


def describe_imports(python: Argv, code: str) -> str:
    """The sum and the largest of what `-X importtime` finds, by their own time, without their children's."""
    argv = [*python[:-1], "-X", "importtime", "-c", code]
    runs = [re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", measure(argv).said) for _ in range(5)]
    bare = {name for _, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", measure([*argv[:-1], "pass"]).said)}
    times = {name: min(int(us) for run in runs for us, each in run if each == name) for _, name in runs[0] if name not in bare}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:8]
    words = ", ".join(f"{name} {times[name] / 1000:.1f}" for name in largest)
    return f"{len(times)} modules in {sum(times.values()) / 1000:.0f} ms of its own; the largest, ms: {words}"


def bench_poll(bench: Bench) -> None:
    """A poll with nothing new, in CPU seconds. Both through the toy's sftp, that is, without ssh."""
    site = bench.site(min(bench.scale.sizes))
    if not site.chroot.exists():
        site.populate_new()
    chroot = site.chroot / "h00000"
    machine = Machine.create(bench.top / "poller", "h00000", chroot=chroot)
    machine.update()
    report = bench.top / "report.json"
    shutil.copy(chroot / "logs/status.json", report)
    batch = f"get current.json {bench.top}/got\nput {report} logs/.status.json\nrename logs/.status.json logs/status.json\n"
    (bench.top / "batch").write_text(batch)
    sftp = ["sftp", "-b", str(bench.top / "batch"), "-C", "server"]
    ours, theirs = alternate(
        5 * bench.scale.rounds,
        lambda: machine.poll().cpu_s,
        lambda: measure(sftp, env=machine.env()).cpu_s,
    )
    mine, other = statistics.median(ours), statistics.median(theirs)
    more = f"+{1000 * (mine - other):.0f} ms"
    what, against = "a poll with nothing new, loopback, CPU", "bare sftp -b, same batch, CPU"
    bench.show(Row(what, format_s(mine), against, format_s(other), more, "≤ +60 ms", mine - other <= 0.06))


def bench_populate(bench: Bench) -> None:
    site, rounds = bench.site(bench.scale.hosts), bench.scale.rounds
    staging, hosts = bench.top / "staging", site.fleet / "hosts"

    def copy() -> float:
        os.sync()
        copied = bench.top / f"copy-{len(site.new)}"
        return measure(["sh", "-c", 'cp -rL "$1" "$2" && sync', "sh", hosts, copied]).elapsed_s

    say("populate, everything new")
    new, copies = alternate(rounds, site.populate_new, copy)
    bench.compare(f"populate, everything new, durable, {site.hosts} hosts", new, "cp -rL of the same trees, and sync", copies, 2)
    say("populate, nothing changed")
    find: Argv = ["sh", "-c", 'find -L "$1" -type f -print0 | xargs -0 sha256sum', "sh", hosts]
    same, hashed = alternate(max(3, rounds), site.populate_same, lambda: measure(find).elapsed_s)
    bench.compare(f"populate, nothing changed, {site.hosts} hosts", same, "find | xargs sha256sum", hashed, 2)
    measure(["cp", "-aL", hosts, staging])
    # tar's exit code 1 is a difference: of the times, at least.
    script = r"""cd "$1"; for h in *; do
        rsync -rltgoDL "$h/" "$2/$h/"
        release=$(sed -n 's/.*"release": "\(.*\)",/\1/p' "$3/$h/current.json")
        tar -df "$3/$h/releases/$release.tar" -C "$2/$h" || [ $? = 1 ] || exit
    done"""
    say("rsync and diff")
    shell = measure(["sh", "-c", script, "sh", hosts, staging, site.chroot]).elapsed_s
    what = f"populate, nothing changed, {site.hosts} hosts"
    bench.compare(what, same, "rsync and diff, a host at a time", [shell], 1 / 40, target="≤ 1/40")


def make_commit(top: Path, hosts: int, files: int) -> Site:
    """A fleet that is committed, as a person's is: of each host so many files."""
    for number in range(hosts):
        write_small_files(top / f"fleet/hosts/h{number:04}/modules", files - 1)
        (top / f"fleet/hosts/h{number:04}/configuration.nix").write_text(f"# {number}\n")
    commit_all(top / "fleet")
    return Site(top / "fleet", top / "chroot", hosts)


def bench_commit(bench: Bench) -> None:
    """What is published of a commit, in processor time but for what has to be on disk: nobody waits for a timer."""
    small = bench.scale.small
    compare_commit(bench, min(60, bench.scale.hosts), 40 if small else 400, 0.6, 0.7)
    compare_commit(bench, 1, 1000 if small else 50_000, None, 1.2)
    if not small and bench.scale.hosts >= 1000:
        compare_commit(bench, 1000, 400, 0.15, None)


def compare_commit(bench: Bench, hosts: int, files: int, same_limit: float | None, changed_limit: float | None) -> None:
    what, hashing = f"{hosts} × {files} files", "find | xargs sha256sum, CPU"
    say(f"making a commit of {hosts} hosts with {files} files each")
    site = make_commit(bench.top / f"commit-{hosts}-{files}", hosts, files)
    trees, copied = site.fleet / "hosts", site.fleet.parent / "copy"
    copy: Argv = ["sh", "-c", 'cp -rL "$1" "$2" && sync', "sh", trees, copied]
    find: Argv = ["sh", "-c", 'find -L "$1" -type f -print0 | xargs -0 sha256sum', "sh", trees]

    def change() -> float:
        with open(trees / "h0000/modules/part-0001.nix", "a") as file:
            file.write("# a line\n")
        commit_all(site.fleet)
        return site.populate().cpu_s

    new, copies = alternate(1, site.populate_new, lambda: measure(copy).elapsed_s)
    bench.compare(f"a commit, everything new, {what}", new, "cp -rL of the same trees, and sync", copies, 1.5)
    same, hashed = alternate(3, lambda: site.populate().cpu_s, cpu_of(find))
    bench.compare(f"the same commit, {what}, CPU", same, hashing, hashed, same_limit)
    changed, hashed = alternate(3, change, cpu_of(find))
    bench.compare(f"a commit, one file changed, {what}, CPU", changed, hashing, hashed, changed_limit)


def change_shared(site: Site) -> float:
    """Commits one line more in the tree that all hosts share, and publishes that: in how many seconds."""
    with open(site.fleet / "all/flake.nix", "a") as file:
        file.write("# a line\n")
    commit_all(site.fleet)
    os.sync()
    return site.populate().elapsed_s


def make_shared(top: Path, hosts: int, size: int) -> Site:
    """Hosts that are links to one tree: 500 small files, and twenty large ones."""
    fleet = top / "fleet"
    (fleet / "hosts").mkdir(parents=True)
    write_small_files(fleet / "all/modules", 500)
    (fleet / "all/flake.nix").write_text("{ }\n")
    for number in range(20):
        write_random(fleet / f"all/firmware/{number}", size // 20)
    for number in range(hosts):
        (fleet / f"hosts/h{number:02}").symlink_to("../all")
    commit_all(fleet)
    return Site(fleet, top / "chroot", hosts)


def bench_shared(bench: Bench) -> None:
    """What hosts cost that share their tree with another."""
    say("making a tree that 30 hosts share")
    one, many = (make_shared(bench.top / f"shared-{hosts}", hosts, bench.scale.shared) for hosts in (1, 30))

    what = f"populate of 30 hosts, one tree of {bench.scale.shared / MB:.0f} MB"
    rounds = max(2, bench.scale.rounds)
    for how, action in (("new", Site.populate_new), ("unchanged", Site.populate_same), ("a line changed", change_shared)):
        say(f"{what}, {how}")
        ours, theirs = alternate(rounds, partial(action, many), partial(action, one))
        bench.compare(f"{what}, {how}", ours, "one such host", theirs, 1.5)
    room, other = (int(call("du", "-sk", site.chroot).split()[0]) / 1000 for site in (many, one))
    good = room / other <= 1.1
    bench.show(Row(f"{what}, room", f"{room:.0f} MB", "one such host", f"{other:.0f} MB", f"{room / other:.3g}", "≤ 1.1", good))


def make_flake(top: Path, hosts: int, files: int) -> Site:
    """Hosts that are links to one flake of many small files, in Git."""
    fleet = top / "fleet"
    (fleet / "hosts").mkdir(parents=True)
    for number in range(100):
        write_small_files(fleet / f"all/modules/{number}", files // 100)
    (fleet / "all/flake.nix").write_text("{ }\n")
    for number in range(hosts):
        (fleet / f"hosts/h{number:03}").symlink_to("../all")
    commit_all(fleet)
    return Site(fleet, top / "chroot", hosts)


def bench_git(bench: Bench) -> None:
    """What hosts cost that share a flake with many files: its bytes are few, and names and files are what is to be seen."""
    files, hosts, rounds = bench.scale.flake_files, bench.scale.flake_hosts, max(2, bench.scale.rounds)
    say(f"making a flake of {files} files for {hosts} hosts, in Git")
    one, many = (make_flake(bench.top / f"flake-{count}", count, files) for count in (1, hosts))

    what = f"populate of {hosts} hosts, a flake of {files:,} files, Git"
    hows = (("new", Site.populate_new, None), ("one line", change_shared, 1.2), ("unchanged", Site.populate_same, None))
    for how, action, at_most in hows:
        say(f"{what}, {how}")
        ours, theirs = alternate(rounds, partial(action, many), partial(action, one))
        bench.compare(f"{what}, {how}", ours, "one such host", theirs, at_most, judged=not bench.scale.small)
    names = sum(len(directories) + len(found) for top, directories, found in os.walk(many.chroot) if "/.store" not in top)
    bench.limit("the same, names on disk a host", names / hosts, "{:.1f}", 10)


def bench_growth(bench: Bench) -> None:
    """How cost grows with hosts and files."""
    sites = [bench.site(hosts) for hosts in bench.scale.sizes]
    for site in sites:
        say(f"a fleet of {site.hosts}")
        if not site.new:
            site.populate_new()
        while len(site.same) < 2:
            site.populate_same()
        if not site.status:
            site.write_reports()
            for _ in range(2):
                site.show_status()
    peaks = [max(cost.peak for cost in site.new + site.same) / MB for site in sites]
    found = [(site.hosts, peak) for site, peak in zip(sites, peaks, strict=True) if site.hosts >= 100 or len(sites) < 3]
    for hosts, peak in found:
        bench.limit(f"populate, peak memory, {hosts} hosts", peak, "{:.0f} MB", 60)
    (first, least), (last, most) = found[0], found[-1]
    what, ratio = f"populate, peak memory, {last} hosts", most / least
    against = f"the same at {first} hosts"
    bench.show(Row(what, f"{most:.0f} MB", against, f"{least:.0f} MB", f"{ratio:.3g}", "≤ 1.25, flat", ratio <= 1.25))

    def median(costs: Sequence[Cost]) -> float:
        return statistics.median(cost.elapsed_s for cost in costs)

    bench.series = [
        Series("populate, everything new", "hosts", [(site.hosts, median(site.new)) for site in sites]),
        Series("populate, nothing changed", "hosts", [(site.hosts, median(site.same)) for site in sites]),
        Series("status --json", "hosts", [(site.hosts, statistics.median(site.status)) for site in sites]),
        Series("an update on the host", "files", [(n, time_update(bench, n)) for n in bench.scale.file_sizes]),
    ]
    bench.note("How cost grows, both axes logarithmic (an update: all but ssh, build and activation)", *plot_text(bench.series))


def time_update(bench: Bench, files: int) -> float:
    """Seconds of a host's update to a release of so many small files, without ssh."""
    say(f"an update of {files} files")
    top = bench.top / f"files-{files}"
    site = Site(top / "fleet", top / "chroot", 1)
    write_small_files(site.fleet / "hosts/host", files)
    machine = Machine.create(top / "machine", "host", chroot=site.chroot / "host")
    times = []
    for number in range(bench.scale.rounds):
        (site.fleet / "hosts/host/configuration.nix").write_text(f"# {number}\n")
        site.populate()
        os.sync()
        times.append(machine.update().elapsed_s)
    return statistics.median(times)


def write_small_files(directory: Path, files: int) -> None:
    """A configuration of so many files, 1.2 kB each."""
    dice = random.Random(f"{directory.name} {files}")
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files - 1):
        (directory / f"part-{number:04}.nix").write_text(dice.randbytes(600).hex())
    (directory / "configuration.nix").write_text("# 0\n")


def bench_status(bench: Bench) -> None:
    site = bench.site(max(bench.scale.sizes))
    site.write_reports()
    say("status")
    ours, theirs = alternate(max(3, bench.scale.rounds), site.show_status, site.cat_reports)
    # Below that number of hosts it is the start of Python that is measured.
    judged = site.hosts >= FLEET
    against, target = "cat of the same reports", f"≤ 10{'' if judged else ' (10000)'}"
    bench.compare(f"status --json, {site.hosts} hosts", ours, against, theirs, 10, target=target, judged=judged)


VERIFY = """\
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bento, bento_client as client
top = Path(sys.argv[2])
found, keys = bento.find_signature(bento.Fleet(top, top / "chroot"), "h1"), client.read_signers(top / "key.pub")
current = client.Current("h1", found.leaf.release, found.leaf.size, "2026-12-01T00:00:00Z", vow=found.vow)
for _ in range(20):
    assert client.verify(current, keys, client.State(), top, "bench").signer
"""


def bench_sign(bench: Bench) -> None:
    """One signature for a fleet of hosts that share a directory, and what one of them does with it."""
    top, hosts = bench.top / "sign", max(bench.scale.sizes)
    write_small_files(top / "hosts/h0", 5)
    for number in range(1, hosts):
        (top / f"hosts/h{number}").symlink_to("h0")
    measure(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(top / "key")])
    say(f"sign, {hosts} hosts")
    cost = measure([sys.executable, str(SERVER), "--fleet", str(top), "sign", "--key", str(top / "key")])
    bench.limit(f"sign, {hosts} hosts", cost.elapsed_s, "{:.2f} s", 10)
    cost = measure([sys.executable, "-c", VERIFY, str(SERVER.parent), str(top)])
    bench.limit(f"verify, one host of {hosts}", cost.elapsed_s / 20 * 1000, "{:.0f} ms", 50)
    shutil.rmtree(top)


def bench_memory(bench: Bench) -> None:
    """The client's own peak of memory, without its children's."""
    size = bench.scale.heavy
    top = bench.top / "heavy"
    site, host = Site(top / "fleet", top / "chroot", 1), top / "fleet/hosts/host"
    write_small_files(host, bench.scale.files)
    say(f"a configuration of {size // MB} MB")
    for number in range(6):
        write_random(host / f"blob-{number}", size // 6)
    server = site.populate()
    machine = Machine.create(top / "machine", "host", chroot=site.chroot / "host")
    costs = [machine.update(spied=True)]
    write_random(host / "blob-0", size // 6)
    site.populate()
    costs.append(machine.update(spied=True))
    for cost, which in zip(costs, ("all of it new", "a sixth of it new"), strict=True):
        bench.limit(f"the client's peak memory, {size // MB} MB, {which}", cost.peak / MB, "{:.0f} MB", 40)
    bench.limit(f"populate, peak memory, a host of {size // MB} MB", server.peak / MB, "{:.0f} MB", None)
    shutil.rmtree(top)


def bench_line(bench: Bench) -> None:
    """A slow line between a real client and a real sshd."""
    scale, server = bench.scale, bench.server()
    server.start(FLEET)
    trip_ms, rate = 2000 * scale.delay_s, 1.0 * MB
    measured_trip_s, measured_rate = check_line(scale.delay_s, rate)
    small, tree, large = server.hosts[:3]
    for host in (small, tree, large):
        shutil.rmtree(server.top / "fleet/hosts" / host)
    for host, files in ((small, scale.files), (tree, scale.files), (large, 10)):
        write_small_files(server.top / "fleet/hosts" / host, files)
    write_random(server.top / "fleet/hosts" / large / "firmware", scale.large_file)
    server.bento("populate", small, tree, large)
    for host in (tree, large):  # what sftp would get without Bento
        server.bento("show", host, str(server.chroot(host) / "plain"))
    machines = {host: server.machine(host) for host in (small, large)}
    for machine in machines.values():
        machine.update()
    report = server.top / "report.json"
    shutil.copy(server.chroot(small) / "logs/status.json", report)
    polls: list[list[float]] = []
    connections: list[int] = []

    def change(host: str, number: int) -> None:
        """One line of a host's configuration, published."""
        (server.top / "fleet/hosts" / host / "configuration.nix").write_text(f"# {number}\n")
        server.bento("populate", host)
        os.sync()

    def poll_and_update() -> list[float]:
        batch = f"get current.json {server.top}/got\nput {report} logs/.report\nrename logs/.report logs/report\n"
        machine, updates = machines[small], []
        with line(server.port, scale.delay_s) as slow:
            machine.configure(port=slow.port)
            polls.extend(
                alternate(
                    max(2, scale.rounds),
                    lambda: machine.poll().elapsed_s,
                    lambda: server.sftp(small, batch, port=slow.port).elapsed_s,
                )
            )
            for number in range(scale.rounds):
                change(small, number + 1)
                before = slow.connections
                updates.append(machine.update().elapsed_s)
                connections.append(slow.connections - before)
        return updates

    def get_tree() -> list[float]:
        (server.top / "got-tree").mkdir()
        with line(server.port, scale.delay_s) as slow:
            took = server.sftp(tree, f"get -R plain/. {server.top}/got-tree\n", port=slow.port).elapsed_s
        if len(list((server.top / "got-tree").iterdir())) != scale.files:
            raise BenchError("sftp get -R did not get all files")
        return [took]

    def get_file() -> list[float]:
        with line(server.port, 0, rate) as thin:
            return [server.sftp(large, f"get plain/firmware {server.top}/got-file\n", port=thin.port).elapsed_s]

    # They wait for their lines nearly all of the time, and have one each.
    say("polls, updates, get -R and a large file, over slow lines")
    updates, recursive, again = together(poll_and_update, get_tree, get_file)
    bench.compare(f"a poll with nothing new, {trip_ms:.0f} ms round trip", polls[0], "bare sftp -b, same batch", polls[1], 1.1)
    what = f"an update of {scale.files} small files, {trip_ms:.0f} ms round trip"
    bench.compare(what, updates, "sftp get -R of the same tree", recursive, 1 / 5, target="≤ 1/5")
    bench.limit("connections of such an update", max(connections), "{:.0f}", 3)

    machine, thrifty, carried = machines[large], [], 0
    for number in range(scale.rounds):
        say("an update of one line")
        change(large, number + 1)
        with line(server.port, 0, rate) as thin:
            machine.configure(port=thin.port)
            thrifty.append(machine.update().elapsed_s)
            carried = thin.carried[1]
    what = f"an update of one line beside {scale.large_file // MB} MB, 1 MB/s"
    bench.compare(what, thrifty, f"sftp get of the {scale.large_file // MB} MB", again, 1 / 20, target="≤ 1/20")
    trips = [statistics.median(times) * 1000 / trip_ms for times in (*polls, updates, recursive)]
    bench.note(
        "The lines",
        f"round trip {1000 * measured_trip_s:.1f} ms (meant: {trip_ms:.0f}), {measured_rate / MB:.3f} MB/s (meant: 1),"
        " as an echo finds them; the line of 1 MB/s has no delay of its own",
        "the build, the activation and nix-env are one `ln` each: what is left of an update is Bento's own part, ssh"
        " and the disk included",
        f"a poll takes {trips[0]:.1f} round trips, a bare sftp -b {trips[1]:.1f}, an update {trips[2]:.1f}, get -R {trips[3]:.0f}",
        f"the update of one line got {carried / 1000:.0f} kB from the server",
    )


def together(*actions: Callable[[], T]) -> list[T]:
    """Runs the actions at the same time."""
    found: dict[int, T] = {}
    failed: list[Exception] = []

    def work(index: int) -> None:
        try:
            found[index] = actions[index]()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failed:
        raise error
    return [found[index] for index in range(len(actions))]


@dataclass(frozen=True)
class Poll:
    """One host's poll: how long until it was served, if it was; how often it had to knock, and why the last time."""

    served: bool
    elapsed_s: float
    knocks: int
    why: str = ""
    real: bool = False


# ssh's own choice of 2023, sntrup761, takes 100 ms of CPU to begin a connection: too much for clients on sshd's cores.
CHEAP = "KexAlgorithms=curve25519-sha256"


@dataclass
class Load:
    """Polls of many hosts: most are a bare `sftp -b` that knocks again as the client would, some are real clients."""

    server: Server
    machines: queue.SimpleQueue[Machine]
    polls: list[Poll] = field(default_factory=list)
    sshd_s: float = 0.0
    clients_s: float = 0.0
    busy_s: float = 0.0  # CPU time, of everything on this machine
    whole_s: float = 0.0
    began_s: float = 0.0

    def bare(self, number: int, gate: int | None) -> None:
        server = self.server
        host = server.hosts[ACCOUNTS // 2 + number % (ACCOUNTS // 2)]
        name = f"n{number}"  # several at a time have one account
        batch = f"get current.json got-{name}\nput report.json logs/.{name}\nrename logs/.{name} logs/{name}\n"
        started, pause_s, knocks, served, why = time.monotonic(), 1.0, 0, False, ""
        while not stopping.is_set():
            knocks += 1
            cost = server.sftp(host, batch, CHEAP, codes=range(-255, 256), gate=gate)
            served = cost.code == 0
            if gate is not None:
                started, gate = self.began_s, None
            if not served:
                why = " ".join(cost.said.split())[:70]
            if served or time.monotonic() + pause_s > started + PATIENCE_S:
                break
            time.sleep(pause_s)
            pause_s *= 2
        self.polls.append(Poll(served, time.monotonic() - started, knocks, why))
        for left in (server.top / f"got-{name}", server.chroot(host) / "logs" / name):
            left.unlink(missing_ok=True)

    def real(self, machine: Machine, gate: int | None) -> None:
        started = time.monotonic()
        served, why = True, ""
        try:
            machine.poll(gate)
        except BenchError as error:
            served, why = False, " ".join(str(error).split())[:70]
        if gate is not None:
            started = self.began_s
        self.polls.append(Poll(served, time.monotonic() - started, 1, why, real=True))
        self.machines.put(machine)

    def run(self, count: int, every: int, per_second: float | None) -> "Load":
        """So many polls at that rate, or all at once; every so many-th of them a real client, if one is at rest."""
        before, busy = resource.getrusage(resource.RUSAGE_CHILDREN), busy_s()
        sshd_before = self.server.cpu_s()
        waiting, release = os.pipe() if per_second is None else (None, None)
        self.began_s = time.monotonic()
        threads = []
        try:
            for number in range(count):
                if per_second is not None:
                    time.sleep(max(0.0, self.began_s + number / per_second - time.monotonic()))
                thread = threading.Thread(target=self.bare, args=(number, waiting), daemon=True)
                if number % every == 0:
                    with suppress(queue.Empty):
                        thread = threading.Thread(target=self.real, args=(self.machines.get_nowait(), waiting), daemon=True)
                thread.start()
                threads.append(thread)
            while release is not None and len(live) < count:
                time.sleep(0.05)
        finally:
            self.began_s = time.monotonic() if release is not None else self.began_s
            for end in (waiting, release):
                if end is not None:
                    os.close(end)
        for thread in threads:
            thread.join()
        self.whole_s = time.monotonic() - self.began_s
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.busy_s = busy_s() - busy
        self.clients_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.sshd_s = self.server.cpu_s() - sshd_before
        return self

    def lost(self) -> int:
        return sum(not poll.served for poll in self.polls)

    def describe(self) -> list[str]:
        served = [poll for poll in self.polls if poll.served]
        real = [poll for poll in self.polls if poll.real]
        again = sum(poll.knocks > 1 for poll in self.polls)
        lines = [
            f"{len(self.polls)} sent, {len(served)} served, {self.lost()} lost, in {self.whole_s:.1f} s; {again} had to knock again;"
            f" {len(real)} of them real clients, {sum(not poll.served for poll in real)} of which lost"
        ]
        for name, polls in (("bare sftp -b", [p for p in served if not p.real]), ("real clients", [p for p in served if p.real])):
            if polls:
                times = [poll.elapsed_s for poll in polls]
                lines.append(
                    f"time until served, {name}: median {format_s(statistics.median(times))}, 95 %"
                    f" {format_s(percentile(times, 0.95))}, longest {format_s(max(times))}"
                )
        reasons = Counter(re.sub(r"[0-9]+", "N", poll.why) for poll in self.polls if poll.why).most_common(2)
        lines += [f"why, {count} times: {why}" for why, count in reasons]
        others_s = max(0.0, self.busy_s - self.sshd_s - self.clients_s)
        share = 100 / self.whole_s / (os.cpu_count() or 1)
        lines.append(
            f"CPU: sshd {self.sshd_s * share:.0f} % of this machine ({1000 * self.sshd_s / len(self.polls):.0f} ms a poll), the"
            f" clients {self.clients_s * share:.0f} % ({1000 * self.clients_s / len(self.polls):.0f} ms), all else"
            f" {others_s * share:.0f} %"
        )
        return lines


def busy_s() -> float:
    """CPU time that this machine has spent at work since it was started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def bench_load(bench: Bench) -> None:
    """As many connections a second as 10,000 hosts make, and as many at once as a fleet whose timers are aligned."""
    scale, server = bench.scale, bench.server()
    (server.top / "report.json").write_text("{}" * 200)
    server.start(FLEET)
    machines: queue.SimpleQueue[Machine] = queue.SimpleQueue()
    for host in server.hosts[3 : 5 if scale.small else ACCOUNTS // 2]:
        machine = server.machine(host)
        machine.update()
        machines.put(machine)
    per_second = math.ceil(FLEET / INTERVAL_S - 0.5)
    count = max(1, int(scale.load_s * per_second))

    def run(count: int, every: int, per_second: float | None, settings: int | None) -> tuple[Load, str]:
        startups = server.start(settings)
        return Load(server, machines).run(count, every, per_second), startups

    def row(what: str, load: Load, startups: str, generated: bool) -> None:
        """sshd's own settings are what a user has without fleet.nix."""
        lost = f"{load.lost()} lost"
        if generated:
            bench.show(Row(what, lost, f"MaxStartups {startups}, fleet.nix", target="0 lost", good=load.lost() == 0))
        else:
            bench.show(Row(what, "", f"MaxStartups {startups}, sshd's own", lost))

    cores, usual = os.cpu_count() or 1, 5 if scale.small else 20
    before = server.cpu_s()
    for _ in range(usual):
        server.sftp(server.hosts[-1], "get current.json got\nput report.json logs/.report\nrename logs/.report logs/report\n")
    each = (server.cpu_s() - before) / usual
    for settings in (FLEET, None) if scale.stock_steady else (FLEET,):
        say(f"{per_second} polls a second")
        steady, startups = run(count, per_second, per_second, settings)
        row(f"polls of {FLEET} hosts, {per_second} a second for {scale.load_s:g} s", steady, startups, settings is not None)
        bench.note(
            f"{per_second} polls a second, as of {FLEET} hosts at an interval of {INTERVAL_S // 60} min, MaxStartups {startups}",
            *steady.describe(),
            f"the clients run on the same {cores} cores as sshd, hence the bare ones with {CHEAP}; with ssh's own choice"
            f" sshd takes {1000 * each:.0f} ms a poll: two cores of its own would serve {2 / each:.0f} a second,"
            f" {2 / each * INTERVAL_S:,.0f} hosts",
        )
    bursts = []
    for settings in (scale.burst, None):
        say(f"{scale.burst} polls at once")
        load, startups = run(scale.burst, max(1, scale.burst // 20), None, settings)
        row(f"polls of {scale.burst} hosts, all timers aligned", load, startups, settings is not None)
        bursts += [f"MaxStartups {startups}:", *(f"  {text}" for text in load.describe())]
        if settings is not None and load.lost() == 0:
            rate = len(load.polls) / load.whole_s
            bursts.append(f"  that is {rate:.0f} a second; a client gives up after {PATIENCE_S} s, {rate * PATIENCE_S:.0f} at that rate")
    bench.note(f"{scale.burst} polls at once; who is turned away knocks again after 1, 2, 4, 8 s, as the client does", *bursts)


# --- a server with PAM and logind ---

RULE = "fleet.nix's PAM rule"
POLLS = {"pam_systemd": 22, RULE: 23, "no PAM": 24}  # a port for each
STOCK_PORT = 25
CLIENTS, FLOOD = f"{lab.NETWORK}.253", f"{lab.NETWORK}.254"
FLOODER = """\
import contextlib, socket, sys, threading, time

def hold():
    while True:
        with contextlib.suppress(OSError), socket.create_connection((sys.argv[2], sys.argv[3]), None, (sys.argv[1], 0)) as one:
            while one.recv(4096):
                pass
        time.sleep(1)

for _ in range(250):
    threading.Thread(target=hold, daemon=True).start()
sys.stdin.read()
"""


@dataclass
class Booted:
    """A booted Debian whose fleet.nix has accounts for hosts, and what polls it, from the lab's switch."""

    machine: lab.Server
    server: Server

    @classmethod
    def create(cls, machine: lab.Server, top: Path) -> "Booted":
        machine.path("/etc/systemd/system/systemd-logind.service").unlink()  # which the lab does without
        machine.boot()
        enter = ("nsenter", f"--net={lab.NETNS}/{machine.lab.netns}")
        server = Server(top, 22, [f"h{number}" for number in range(ACCOUNTS)], address=machine.address, enter=enter)
        (top / "keys").mkdir(parents=True)
        make_fleet(machine.path(machine.fleet), server.hosts)
        for host in server.hosts:
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", top / "keys" / host)
            shutil.copy(top / "keys" / f"{host}.pub", machine.path(f"{machine.fleet}/hosts"))
        (top / "known_hosts").write_text(f"* {machine.host_key}\n")
        (top / "report.json").write_text("{}" * 200)
        for address in (CLIENTS, FLOOD):
            call("ip", "-n", machine.lab.netns, "address", "add", f"{address}/24", "dev", "switch")
        machine.apply_fleet()
        machine.bento("populate")
        return cls(machine, server)

    def start_sshds(self) -> None:
        """Beside the one with Debian's PAM: with fleet.nix's rule, without PAM, and with sshd's own limits."""
        machine, fleet_nix = self.machine, str(self.machine.path(f"{self.machine.fleet}/fleet.nix"))
        made = lab.evaluate(f"modules.server [ (/. + {lab.nix_string(fleet_nix)}) ]")
        session = pam_session(machine.read("/etc/pam.d/common-session"), made["pam"]["sshd"]["rules"]["session"])
        pam = machine.read("/etc/pam.d/sshd")
        machine.write("/etc/pam.d/sshd-bento", pam.replace("@include common-session\n", session))
        machine.write("/etc/ssh/stock_config", lab.SSHD_CONFIG + made["extraConfig"])
        for port, config, option in (
            (POLLS[RULE], "sshd_config", "PAMServiceName=sshd-bento"),
            (POLLS["no PAM"], "sshd_config", "UsePAM=no"),
            (STOCK_PORT, "stock_config", "PAMServiceName=sshd-bento"),
        ):
            sshd = ("/usr/sbin/sshd", "-D", "-e", "-f", f"/etc/ssh/{config}", "-p", str(port), "-o", option)
            machine.run("systemd-run", "--quiet", "--service-type=notify", *sshd)

    def poll(self, port: int, hosts: Iterator[str], *options: str) -> float:
        """Each has an account of its own, as if it came alone: for ten seconds logind keeps what one has started."""
        batch = "get current.json got\nput report.json logs/.report\nrename logs/.report logs/report\n"
        return self.server.sftp(next(hosts), batch, *options, port=port).elapsed_s

    def cpu_s(self) -> float:
        """Of all in the machine, with the end of what polls have started."""
        sessions = self.machine.cgroup / "payload/user.slice"
        self.machine.wait_for(lambda: not list(sessions.glob("user-*")), 60, "the end of all sessions")
        usage = (self.machine.cgroup / "cpu.stat").read_text().split()
        return int(usage[usage.index("usage_usec") + 1]) / 1e6

    def cost(self, port: int, count: int) -> tuple[float, int]:
        """The server's CPU seconds of a poll, with ssh's own choices, and how many processes one has left there."""
        before, hosts = self.cpu_s(), iter(self.server.hosts)
        self.poll(port, hosts)
        left = self.machine.cgroup.glob("payload/user.slice/user-*/user@*/**/cgroup.procs")
        found = sum(len(group.read_text().split()) for group in left)
        for _ in range(1, count):
            self.poll(port, hosts)
        return (self.cpu_s() - before) / count, found

    def lost(self, port: int, polls: int) -> int:
        """How many polls are, while another address holds all the connections that it can get, and says nothing."""
        argv = [*self.server.enter, sys.executable, "-c", FLOODER, FLOOD, self.server.address, str(port)]
        load = Load(replace(self.server, port=port), queue.SimpleQueue())
        self.poll(port, iter(self.server.hosts))  # which works, while all is quiet
        with subprocess.Popen(argv, stdin=subprocess.PIPE, process_group=0):  # it ends with its input
            time.sleep(3)
            together(*(partial(load.bare, number, None) for number in range(polls)))
        return load.lost()


def pam_session(common: str, rules: Mapping[str, Mapping[str, Any]]) -> str:
    """Debian's session modules, with fleet.nix's before or after its pam_systemd, as their order says."""
    own = next(text for text in common.splitlines() if "pam_systemd.so" in text)
    lines = []
    for name, rule in sorted(rules.items(), key=lambda item: int(item[1]["order"])):
        lines.append(own if name == "systemd" else " ".join(["session", rule["control"], rule["modulePath"], *rule["args"]]))
    return common.replace(own, "\n".join(lines))


def bench_pam(bench: Bench) -> None:
    """What PAM and logind add to a poll, on a booted Debian, and what keeps strangers from filling its sshd."""
    with lab.Lab() as made:
        say("booting a server")
        booted = Booted.create(made.machine("server", lab.Server), bench.top / "booted")
        booted.start_sshds()
        say("polls of a server with PAM")
        kinds, hosts = len(POLLS), booted.server.hosts
        count = min(ACCOUNTS // kinds, 5 * bench.scale.rounds)
        actions = [partial(booted.poll, port, iter(hosts[n::kinds]), CHEAP) for n, port in enumerate(POLLS.values())]
        took = dict(zip(POLLS, alternate(count, *actions), strict=True))
        cost = {name: booted.cost(port, count) for name, port in POLLS.items()}
        for other, most in (("pam_systemd", 1 / 2), ("no PAM", 2)):
            bench.compare(f"a poll with nothing new, {RULE}", took[RULE], other, took[other], most)
            bench.compare("CPU of the server for it", [cost[RULE][0]], other, [cost[other][0]], most)
        mine, theirs = cost[RULE][1], cost["pam_systemd"][1]
        if theirs == 0:
            raise BenchError("logind started nothing for a poll: there is nothing to compare with")
        bench.show(Row("processes that it leaves for ten seconds", str(mine), "pam_systemd", str(theirs), target="0", good=mine == 0))
        say("polls beside a flood")
        mine, theirs = (booted.lost(port, 8) for port in (POLLS[RULE], STOCK_PORT))
        what = "8 polls beside 250 idle connections of an address"
        bench.show(Row(what, f"{mine} lost", "sshd's own limits", f"{theirs} lost", target="0 lost", good=mine == 0))
    served = ", ".join(f"{2 / cpu_s:.0f} ({name})" for name, (cpu_s, _) in cost.items())
    bench.note("A server with PAM and logind", f"two cores of its own would serve, of polls a second: {served}")


# --- the plot ---


@dataclass(frozen=True)
class Series:
    name: str
    unit: str
    points: list[tuple[int, float]]

    def exponent(self) -> float:
        """How cost grows from the last point but one to the last: 1 is in proportion."""
        (n1, s1), (n2, s2) = self.points[-2:]
        return math.log(s2 / s1) / math.log(n2 / n1)


def decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten around the values."""
    found = [math.log10(value) for value in values]
    low, high = math.floor(min(found)), math.ceil(max(found))
    return low, max(high, low + 1)


def plot_text(series: Sequence[Series], width: int = 60, rows_a_decade: int = 4) -> list[str]:
    left, right = decades(n for each in series for n, _ in each.points)
    low, high = decades(s for each in series for _, s in each.points)
    height = (high - low) * rows_a_decade
    grid = [[" "] * (width + 1) for _ in range(height + 1)]

    def cell(n: float, seconds: float) -> tuple[int, int]:
        across = (math.log10(n) - left) / (right - left) * width
        up = (math.log10(seconds) - low) * rows_a_decade
        return height - round(up), round(across)

    for each in series:
        for (n1, s1), (n2, s2) in pairwise(each.points):
            for step in range(width):
                part = step / width
                row, column = cell(n1 ** (1 - part) * n2**part, s1 ** (1 - part) * s2**part)
                if grid[row][column] == " ":
                    grid[row][column] = "·"
    for letter, each in zip("abcdefgh", series, strict=False):
        for n, seconds in each.points:
            row, column = cell(n, seconds)
            grid[row][column] = letter if grid[row][column] in " ·" else "*"
    lines = []
    for row, cells in enumerate(grid):
        label = format_decade(high - row // rows_a_decade) + " s" if row % rows_a_decade == 0 else ""
        lines.append(f"{label:>8} |{''.join(cells).rstrip()}")
    lines.append(" " * 9 + "+" + "-" * width)
    ticks = [" "] * (width + 20)
    for power in range(left, right + 1):
        text = format_decade(power)
        at = round((power - left) / (right - left) * width) + 10 - len(text) // 2
        ticks[at : at + len(text)] = text
    lines.append("".join(ticks).rstrip() + "   hosts or files")
    for letter, each in zip("abcdefgh", series, strict=False):
        points = ", ".join(f"{n}: {format_s(seconds)}" for n, seconds in each.points)
        lines.append(f"{letter}  {each.name} ({each.unit}: {points}); at the end it grows as n^{each.exponent():.2f}")
    lines.append("*  two or more of them")
    return lines


def format_decade(power: int) -> str:
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:.{-power}f}"


STYLE = """\
svg { font: 14px system-ui, sans-serif; color: #222 } .page { fill: #fff }
text, circle { fill: currentColor } polyline { fill: none; stroke: currentColor; stroke-width: 2.5 }
.grid { stroke: #ddd } .even { stroke: #888; stroke-dasharray: 5 5 }
.s0 { color: #0063a6 } .s1 { color: #b84a00 } .s2 { color: #00795a } .s3 { color: #a3397c }
@media (prefers-color-scheme: dark) {
  svg { color: #ddd } .page { fill: #16181c } .grid { stroke: #363a42 } .even { stroke: #777 }
  .s0 { color: #5cb3f0 } .s1 { color: #f09a55 } .s2 { color: #4cc9a0 } .s3 { color: #e58cc4 }
}"""


def plot_svg(series: Sequence[Series]) -> str:
    """The plot for a page: 800 wide, light and dark, nothing to load."""
    left, right = decades(n for each in series for n, _ in each.points)
    low, high = decades(s for each in series for _, s in each.points)
    x0, x1, y0, y1 = 70, 535, 40, 410

    def x(n: float) -> float:
        return x0 + (math.log10(n) - left) / (right - left) * (x1 - x0)

    def y(seconds: float) -> float:
        return y1 - (math.log10(seconds) - low) / (high - low) * (y1 - y0)

    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 470" width="800" height="470" role="img">']
    out += [f"<title>How Bento's cost grows with hosts and files</title><style>{STYLE}</style>"]
    out.append('<rect class="page" width="800" height="470"/>')
    out.append(f'<text x="{x0}" y="22">Seconds, by the number of hosts or files; both axes logarithmic</text>')
    for power in range(left, right + 1):
        out.append(f'<line class="grid" x1="{x(10**power):.1f}" y1="{y0}" x2="{x(10**power):.1f}" y2="{y1}"/>')
        out.append(f'<text x="{x(10**power):.1f}" y="{y1 + 22}" text-anchor="middle">{format_decade(power)}</text>')
    for power in range(low, high + 1):
        out.append(f'<line class="grid" x1="{x0}" y1="{y(10**power):.1f}" x2="{x1}" y2="{y(10**power):.1f}"/>')
        out.append(f'<text x="{x0 - 8}" y="{y(10**power) + 5:.1f}" text-anchor="end">{format_decade(power)} s</text>')
    out.append(f'<text x="{(x0 + x1) / 2}" y="{y1 + 46}" text-anchor="middle">hosts (an update: files)</text>')
    span = min(right - left, high - low)
    even = f'x1="{x(10**right):.1f}" y1="{y(10**high):.1f}" x2="{x(10.0 ** (right - span)):.1f}" y2="{y(10.0 ** (high - span)):.1f}"'
    out.append(f'<line class="even" {even}/><text x="{x1 + 12}" y="{y0 + 5}">dashed: in proportion</text>')
    ends = place_labels([y(each.points[-1][1]) for each in series])
    for index, (each, at) in enumerate(zip(series, ends, strict=True)):
        points = " ".join(f"{x(n):.1f},{y(seconds):.1f}" for n, seconds in each.points)
        out.append(f'<g class="s{index % 4}"><polyline points="{points}"/>')
        out += [f'<circle cx="{x(n):.1f}" cy="{y(seconds):.1f}" r="4"/>' for n, seconds in each.points]
        last = format_s(each.points[-1][1])
        out.append(f'<text x="{x1 + 12}" y="{at + 5:.1f}">{each.name}, {last}</text></g>')
    return "\n".join([*out, "</svg>", ""])


def place_labels(wanted: Sequence[float], apart: float = 20) -> list[float]:
    """Heights for labels as near as can be to where they are wanted, from the top, that do not touch."""
    found = list(wanted)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    for before, after in pairwise(order):
        found[after] = max(found[after], found[before] + apart)
    return found


# --- command line ---

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "start": bench_start,
    "poll": bench_poll,
    "populate": bench_populate,
    "commit": bench_commit,
    "shared": bench_shared,
    "git": bench_git,
    "status": bench_status,
    "sign": bench_sign,
    "growth": bench_growth,
    "memory": bench_memory,
    "line": bench_line,
    "load": bench_load,
    "pam": bench_pam,
}

NEEDS: dict[str, Callable[[], str | None]] = {"line": why_no_server, "load": why_no_server, "pam": lab.why_not}


def make_scale(options: argparse.Namespace) -> Scale:
    hosts: int = options.hosts or (100 if options.quick else 1000)
    sizes = {size for size in (10, 100, 1000) if size < hosts} | {hosts} | ({FLEET} if options.full else set())
    if len(sizes) == 1:
        sizes.add(2 * hosts)
    rounds: int = options.rounds or (1 if options.quick else 2)
    load_s: float = options.load_seconds or (2 if options.quick else 20)
    burst: int = options.burst or (20 if options.quick else 300)
    found = Scale(hosts, rounds, tuple(sorted(sizes)), load_s=load_s, burst=burst)
    if options.full:
        return replace(found, file_sizes=(10, 100, 1000, 10_000), stock_steady=True)
    if options.quick:
        return replace(
            found, delay_s=0.02, files=20, file_sizes=(10, 100), large_file=2 * MB, heavy=60 * MB, shared=20 * MB,
            flake_files=2000, flake_hosts=20, small=True,
        )  # fmt: skip
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="everything scaled down: does it run?")
    size.add_argument("--full", action="store_true", help=f"up to {FLEET} hosts: twenty minutes, 5 GB of disk")
    parser.add_argument("--hosts", type=int, metavar="N", help="hosts of the fleet (default 1000)")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of what is slow (default 2)")
    parser.add_argument("--load-seconds", type=float, metavar="S", help="how long the steady load lasts (default 20)")
    parser.add_argument("--burst", type=int, metavar="N", help="polls at once (default 300)")
    parser.add_argument("--only", action="append", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plot there, too")
    return parser


def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run_sections(bench: Bench, names: Sequence[str]) -> None:
    print(f"Medians of {bench.scale.rounds} or more rounds, on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before.\n")
    print(HEAD)
    took = []
    for name in names:
        reason = NEEDS.get(name, lambda: None)()
        if reason is not None:
            bench.show(Row(f"{name}: skipped: {reason}", ""))
            continue
        started = time.monotonic()
        SECTIONS[name](bench)
        took.append(f"{name} {time.monotonic() - started:.0f}")
    print("\n".join(bench.notes))
    print(f"\nSeconds: {', '.join(took)}.")
    missed = [row.what + (f" (against {row.against})" if row.against else "") for row in bench.rows if row.good is False]
    told = sum(row.good is not None for row in bench.rows)
    print("\nMisses its target: " + "; ".join(missed) + "." if missed else f"\nAll {told} targets are met.")
    if bench.scale.small:
        print("Everything was scaled down (--quick): the targets are for the real sizes.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    names = [name for name in SECTIONS if options.only is None or name in options.only]
    if options.svg is not None and "growth" not in names:
        parser.error("--svg needs the section 'growth'")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    for program in ("git", "rsync", "sftp", "ssh-keygen"):
        if shutil.which(program) is None:
            print(f"bench: error: {program} is missing: install it", file=sys.stderr)
            return 1
    signal.signal(signal.SIGTERM, stop)
    accounts.isolate()
    try:
        with ExitStack() as stack:
            top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bento-bench-", ignore_cleanup_errors=True)))
            # As for anybody who runs the scripts, modules are compiled once; but into no directory of the repository.
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            os.environ["PYTHONPYCACHEPREFIX"] = str(top / "pycache")
            bench = Bench(make_scale(options), top, stack)
            stack.callback(say, "removing what was made")
            try:
                run_sections(bench, names)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                end_live()
            if options.svg is not None:
                options.svg.write_text(plot_svg(bench.series))
                print(f"The plot is in {options.svg}.")
    except (BenchError, lab.LabError, image.ImageError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench: interrupted; everything that was made is removed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
