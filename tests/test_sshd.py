"""A real sshd with the Match block that `bento.py fleet` makes: the client over good and bad lines, and a hostile host.

sshd is as permissive as can be for everybody else, and an ordinary account is let to do all that a host is denied:
so it is the block that denies it, and it denies nobody else. sshd runs without PAM, hence without the module's
loginLimits, and for its sake /run/sshd, the accounts and a directory in /var/lib are made, and removed again.
"""

import grp
import json
import os
import pwd
import re
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sshd import end_sshd, match_block, max_startups, run_directory
from toynixos import CLIENT, TOY, ToyMachine, _missing, need, write_config

SERVER = CLIENT.parent / "bento.py"
PID = os.getpid()
GOOD, FRESH, EVIL, OTHER = (f"{name}-{PID}" for name in ("good", "fresh", "evil", "other"))
HOSTS = (GOOD, FRESH, EVIL, OTHER)
PERSON = f"bentoperson{PID}"
UNRESTRICTED = "unrestricted"
LOGIN_GRACE_S = 4
# Incompressible, and much larger than the handshake: a line can be cut in the middle of it.
BULK = 1_500_000

Done = subprocess.CompletedProcess[str]


# --- the server ---


def call(*argv: str | Path, **options: Any) -> Done:
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=60, check=True, **options,
    )  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


@dataclass
class Server:
    """`top` is root's: it holds the fleet, the chroots and sshd's files. `keys` holds the hosts' private keys."""

    top: Path
    keys: Path
    port: int
    config: str = field(default="", repr=False)
    process: subprocess.Popen[bytes] | None = None

    def bento(self, *args: str, errors: int = subprocess.STDOUT) -> Done:
        argv: list[str | Path] = [sys.executable, SERVER, "--fleet", self.top / "fleet"]
        argv += ["--chroot-dir", self.top / "chroots", *args]
        return subprocess.run(argv, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=60, check=False)

    def publish(self, host: str, *, bulk: int = 0, **behaviour: Any) -> str:
        """Publishes a configuration; its release."""
        directory = write_config(self.top / "fleet/hosts" / host, flake=True, host=host, **behaviour)
        (directory / "bulk").write_bytes(os.urandom(bulk))
        done = self.bento("populate", host)
        assert done.returncode == 0, done.stdout
        release: str = json.loads((self.chroot(host) / "current.json").read_text())["release"]
        return release

    def chroot(self, host: str) -> Path:
        return self.top / "chroots" / host

    def logs(self, host: str) -> list[str]:
        """The logs that a host has uploaded, in the order in which they came."""
        paths = (self.chroot(host) / "logs").glob("*.log")
        return [name for _, name in sorted((path.stat().st_mtime_ns, path.name) for path in paths)]

    def status(self, host: str) -> dict[str, Any]:
        done = self.bento("status", "--json", host, errors=subprocess.DEVNULL)
        row: dict[str, Any] = json.loads(done.stdout)["hosts"][0]
        return row

    def host_key(self) -> str:
        return (self.top / "sshd/host_key.pub").read_text().strip()

    def known_hosts(self, path: Path, key: str | None = None, *ports: int) -> Path:
        key = " ".join((key or self.host_key()).split()[:2])
        path.write_text("".join(f"[127.0.0.1]:{port} {key}\n" for port in (self.port, *ports)))
        return path

    def make_account(self, stack: ExitStack, user: str, home: Path, group: str) -> None:
        # With a shell: that there is none is to be sshd's doing.
        call("useradd", "-r", "-M", "-N", "-g", group, "-d", home, "-s", "/bin/sh", user)
        stack.callback(call, "userdel", user)
        call("usermod", "-p", "*", user)

    def make_key(self, user: str, options: str) -> str:
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", user, "-f", self.keys / user)
        public = (self.keys / f"{user}.pub").read_text()
        (self.top / "authorized" / user).write_text(options + public)
        return public

    def write_config(self, fleet_nix: str) -> None:
        directory = self.top / "sshd"
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "host_key")
        self.config = textwrap.dedent(f"""\
            ListenAddress 127.0.0.1
            Port {self.port}
            HostKey {directory}/host_key
            PidFile none
            UsePAM no
            AuthorizedKeysFile {self.top}/authorized/%u
            LoginGraceTime {LOGIN_GRACE_S}
            MaxStartups {max_startups(fleet_nix, len(HOSTS))}
            AllowUsers {PERSON}
            AllowTcpForwarding yes
            AllowStreamLocalForwarding yes
            AllowAgentForwarding yes
            PermitTunnel yes
            X11Forwarding yes
            XAuthLocation /bin/true
            PermitTTY yes
            PermitUserEnvironment yes
            AcceptEnv *
            PasswordAuthentication yes
            Subsystem sftp /usr/lib/openssh/sftp-server
            Subsystem leak /bin/cat /etc/passwd
            """) + match_block(fleet_nix)
        (directory / "config").write_text(self.config)

    def start(self) -> None:
        """Stands in for loginLimits' nofile, which PAM sets for a host alone, with a limit that the listener bears."""
        sshd: list[str | Path] = ["/usr/sbin/sshd", "-D", "-f", self.top / "sshd/config", "-E", self.top / "sshd/log"]
        self.process = subprocess.Popen(["prlimit", "--nofile=512:512", *sshd], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port), 5):
                return
            assert time.monotonic() < deadline and self.process.poll() is None, (self.top / "sshd/log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        assert self.process is not None
        end_sshd(self.process)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if os.geteuid() != 0:
        _missing("needs root for sshd, its accounts and its chroots")
    with ExitStack() as stack:
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("PATH", path)
        for program in ("sshd", "ssh", "sftp", "ssh-keygen", "ssh-agent", "useradd", "userdel", "usermod", "prlimit"):
            need(program)
        stack.enter_context(run_directory())
        # Not below /tmp: every directory above a chroot has to be root's, and writable by nobody else.
        top = Path(tempfile.mkdtemp(prefix="bento-sshd-", dir="/var/lib"))
        stack.callback(shutil.rmtree, top)
        top.chmod(0o755)
        found = Server(top, tmp_path_factory.mktemp("keys"), free_port())
        for name in ("fleet/hosts", "authorized", "sshd", "chroots"):
            (top / name).mkdir(parents=True)
        try:
            grp.getgrnam("bento")
        except KeyError:
            call("groupadd", "-r", "bento")
            stack.callback(call, "groupdel", "bento")
        for host in HOSTS:
            found.make_account(stack, f"bento-{host}", found.chroot(host), "bento")
            (top / f"fleet/hosts/{host}").mkdir()
            (top / f"fleet/hosts/{host}.pub").write_text(found.make_key(f"bento-{host}", "restrict "))
        found.make_key(UNRESTRICTED, "")
        with open(top / f"authorized/bento-{EVIL}", "a") as file:
            file.write((top / "authorized" / UNRESTRICTED).read_text())
        (top / "person").mkdir()
        found.make_account(stack, PERSON, top / "person", grp.getgrgid(65534).gr_name)
        found.make_key(PERSON, "")
        call(sys.executable, SERVER, "--fleet", top / "fleet", "--chroot-dir", top / "chroots", "fleet")
        fleet_nix = (top / "fleet/fleet.nix").read_text()
        assert all('"restrict ${key}"' in fleet_nix and f'"{host}" = [' in fleet_nix for host in HOSTS)
        found.write_config(fleet_nix)
        for host in HOSTS:
            found.publish(host, label="v1")
        found.start()
        stack.callback(found.stop)
        yield found


# --- lines ---


@dataclass
class Line:
    """Forwards TCP connections on 127.0.0.1, as badly as it is told. Bytes are counted towards the client.

    cut_after: closes a connection after so many bytes; stall_after: goes silent; rate: bytes a second at most;
    delay_s: for each piece; connections: refuses more than so many.
    """

    to_port: int
    cut_after: int | None = None
    stall_after: int | None = None
    rate: int | None = None
    delay_s: float = 0.0
    connections: int | None = None
    accepted: int = 0
    carried: int = 0
    sockets: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> "Line":
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.listener, *self.sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def accept(self) -> None:
        while self.accepted != self.connections:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            far = socket.create_connection(("127.0.0.1", self.to_port))
            self.sockets += [near, far]
            threading.Thread(target=self.pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self.pump, args=(far, near, True), daemon=True).start()
        self.listener.close()

    def pump(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        carried = 0
        with suppress(OSError):
            while data := source.recv(1 << 14):
                if down:
                    limit = self.cut_after if self.stall_after is None else self.stall_after
                    if limit is not None and carried + len(data) > limit:
                        data = data[: limit - carried]
                        sink.sendall(data)
                        if self.stall_after is None:
                            break
                        return
                    carried += len(data)
                    self.carried += len(data)
                    if self.rate is not None:
                        time.sleep(len(data) / self.rate)
                    time.sleep(self.delay_s)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


# --- the machines ---


@dataclass(frozen=True)
class Host:
    """A toy machine that polls the real sshd with the real sftp."""

    server: Server
    machine: ToyMachine
    settings: dict[str, Any]

    @classmethod
    def create(cls, server: Server, top: Path, name: str) -> "Host":
        machine = ToyMachine.create(top / "root", name)
        settings = {
            "server": "127.0.0.1", "port": server.port, "host": name, "root": str(machine.root),
            "state_dir": str(top / "state"), "identity": str(server.keys / f"bento-{name}"),
            "connect_timeout": 10, "confirm_timeout": 10,
        }  # fmt: skip
        (top / "programs").mkdir()
        for program in ("boot", "nix-env", "nixos-rebuild"):
            (top / "programs" / program).symlink_to(TOY / program)
        (top / "client.json").write_text(json.dumps(settings))
        return cls(server, machine, settings)

    @property
    def top(self) -> Path:
        return self.machine.root.parent

    @property
    def state(self) -> Path:
        return self.top / "state"

    def publish(self, label: str, **behaviour: Any) -> str:
        return self.server.publish(self.settings["host"], label=label, client_json=self.settings, **behaviour)

    def client(self, command: str, *flags: str, stall_s: float | None = None) -> Done:
        """Runs the client. `stall_s`: with that instead of the minute that a transfer may stand still."""
        path = f"{self.top / 'programs'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        argv: list[str | Path] = [sys.executable, CLIENT]
        if stall_s is not None:
            code = f"import sys; sys.path.insert(0, {str(CLIENT.parent)!r}); import bento_client as c; "
            argv = [sys.executable, "-c", f"{code}c.STALL_S = {stall_s}; c.LEAST_RATE = 1 << 30; sys.exit(c.main())"]
        return self.machine.run(*argv, "--config", self.top / "client.json", command, *flags, env={"PATH": path})

    def run(self, *flags: str, stall_s: float | None = None) -> Done:
        return self.client("run", *flags, stall_s=stall_s)


def snapshot(top: Path, *left_out: str) -> dict[str, tuple[object, ...]]:
    """Everything below a directory but what is below `left_out`: type, mode, owner, time and content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted([top, *top.rglob("*")]):
        name = str(path.relative_to(top))
        if name.split("/")[0] in left_out:
            continue
        state = path.lstat()
        content: object = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        when = 0 if path.is_dir() else state.st_mtime_ns
        found[name] = (state.st_mode, state.st_uid, state.st_gid, when, content)
    return found


@pytest.fixture
def fresh(server: Server, tmp_path: Path) -> Iterator[Host]:
    """A machine that has never polled, with a chroot that holds no logs."""
    for left in (server.chroot(FRESH) / "logs").iterdir():
        left.unlink()
    yield Host.create(server, tmp_path, FRESH)


@pytest.fixture(scope="module")
def settled(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A machine that runs v1, has two reports to deliver, and for which a large v2 is published."""
    host = Host.create(server, tmp_path_factory.mktemp("settled"), GOOD)
    host.publish("v1")
    done = host.run()
    assert done.returncode == 0, done.stdout
    for name in WAITING:
        (host.state / "outbox" / name).write_text(f"log {name}\n")
    host.publish("v2", bulk=BULK)
    return host


@pytest.fixture
def settled_and_done(settled: Host) -> Host:
    """The same, after it has run v2."""
    if settled.machine.current_label() != "v2":
        done = settled.run()
        assert done.returncode == 0, done.stdout
    return settled


# The older one has the later name, in the alphabet of results.
WAITING = ["20200101T000000Z_aaaaaaaaaaaa_postponed.log", "20200102T000000Z_aaaaaaaaaaaa_build-failed.log"]


# --- a peer that does not keep to the client ---


@dataclass
class Peer:
    """An account, with OpenSSH's programs and with SFTP by the packet."""

    server: Server
    user: str
    key: str = ""
    session: subprocess.Popen[bytes] | None = None
    extensions: dict[bytes, bytes] = field(default_factory=dict)
    asked: int = 0

    @property
    def host(self) -> str:
        return self.user.removeprefix("bento-")

    def argv(self, *args: str | Path, program: str = "ssh") -> list[str]:
        options = [
            "IdentitiesOnly=yes", "StrictHostKeyChecking=no", f"UserKnownHostsFile={os.devnull}", "ControlPath=none",
            "ControlMaster=no", "ExitOnForwardFailure=yes", "ConnectTimeout=20",
        ]  # fmt: skip
        # ssh takes the first value of an option that it sees.
        given = [str(arg) for arg in args]
        argv = [
            program,
            "-F",
            os.devnull,
            *given,
            f"-oPort={self.server.port}",
            "-i",
            str(self.server.keys / (self.key or self.user)),
        ]
        return [*argv, *(f"-o{option}" for option in options), "-oBatchMode=yes"]

    def ssh(self, *args: str | Path, command: str = "", send: bytes = b"", user: str = "", **env: str) -> str:
        """What ssh says, and what comes through it."""
        argv = [*self.argv(*args), f"{user or self.user}@127.0.0.1", *([command] if command else [])]
        done = subprocess.run(
            argv,
            input=send,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=30,
            env=os.environ | env,
            check=False,
        )
        return done.stdout.decode(errors="replace")

    def says(self, pattern: str, *args: str | Path, **env: str) -> bool:
        """Whether `ssh -v` says that, before it ends; it is ended then."""
        argv = [*self.argv("-v", *args), f"{self.user}@127.0.0.1"]
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | env
        ) as ssh:
            assert ssh.stderr is not None
            timer = threading.Timer(20, ssh.kill)
            timer.start()
            try:
                return any(re.search(pattern, line.decode(errors="replace")) for line in ssh.stderr)
            finally:
                timer.cancel()
                ssh.kill()

    def connect(self, *args: str | Path, command: str = "sftp", **env: str) -> subprocess.Popen[bytes]:
        subsystem = ["-s"] if command == "sftp" else []
        argv = [*self.argv("-q", *args, *subsystem), f"{self.user}@127.0.0.1", command]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | env, bufsize=0)

    def open_session(self, *args: str | Path) -> None:
        self.close_session()
        self.session = self.connect(*args)
        kind, body = self.exchange(struct.pack(">BI", 1, 3))
        assert (kind, body[:4]) == (2, b"\0\0\0\3")
        words = strings(body[4:])
        self.extensions = dict(zip(words[::2], words[1::2], strict=True))

    def close_session(self) -> None:
        if self.session is not None:
            end(self.session)
            self.session = None

    def exchange(self, packet: bytes) -> tuple[int, bytes]:
        """Sends one packet, and takes one: its type and the rest. EOFError when the server has hung up."""
        assert self.session is not None and self.session.stdin is not None and self.session.stdout is not None
        try:
            self.session.stdin.write(struct.pack(">I", len(packet)) + packet)
        except BrokenPipeError:
            raise EOFError from None
        raw = read_exactly(self.session.stdout.fileno(), 4)
        body = read_exactly(self.session.stdout.fileno(), struct.unpack(">I", raw)[0])
        return body[0], body[1:]

    def request(self, kind: int, *parts: bytes) -> tuple[str, bytes]:
        """One SFTP request: what became of it, and what came with it."""
        if self.session is None or self.session.poll() is not None:
            self.open_session()
        self.asked += 1
        number = struct.pack(">I", self.asked)
        try:
            answer, body = self.exchange(bytes([kind]) + number + b"".join(parts))
        except EOFError:
            self.close_session()
            return "hung up", b""
        assert body[:4] == number
        if answer == 101:
            return STATUS[struct.unpack(">I", body[4:8])[0]], b""
        return {102: "handle", 103: "data", 104: "names", 105: "attributes", 201: "reply"}[answer], body[4:]

    def ask(self, kind: int, *parts: bytes) -> str:
        return self.request(kind, *parts)[0]

    def extended(self, name: str, *parts: bytes) -> str:
        return self.ask(EXTENDED, text(name), *parts)

    def open(self, path: str | bytes, flags: int, attributes: bytes = bytes(4)) -> str:
        what, handle = self.request(OPEN, text(path), u32(flags), attributes)
        if what == "handle":
            assert self.ask(CLOSE, handle) == "ok"
        return what

    def write(self, path: str | bytes, data: bytes, offset: int = 0) -> str:
        what, handle = self.request(OPEN, text(path), u32(WRITE | CREATE | TRUNCATE), bytes(4))
        if what != "handle":
            return what
        what = self.ask(WRITE_DATA, handle, u64(offset), text(data))
        assert self.ask(CLOSE, handle) == "ok"
        return what

    def read(self, path: str) -> str:
        what, handle = self.request(OPEN, text(path), u32(READ), bytes(4))
        if what != "handle":
            return what
        what, data = self.request(READ_DATA, handle, u64(0), u32(1 << 15))
        assert self.ask(CLOSE, handle) == "ok"
        return strings(data)[0].decode() if what == "data" else what

    def list(self, path: str) -> str:
        """The names in a directory, in order."""
        what, handle = self.request(OPENDIR, text(path))
        if what != "handle":
            return what
        found: list[str] = []
        while (answer := self.request(READDIR, handle))[0] == "names":
            found += names(answer[1])
        assert answer[0] == "end" and self.ask(CLOSE, handle) == "ok"
        return " ".join(sorted(set(found) - {".", ".."}))


OPEN, CLOSE, READ_DATA, WRITE_DATA, LSTAT, FSTAT, SETSTAT, FSETSTAT, OPENDIR, READDIR = range(3, 13)
REMOVE, MKDIR, RMDIR, REALPATH, STAT, RENAME, READLINK, SYMLINK = range(13, 21)
EXTENDED = 200
HELLO = struct.pack(">IBI", 5, 1, 3)
READ, WRITE, APPEND, CREATE, TRUNCATE = 1, 2, 4, 8, 16
STATUS = {0: "ok", 1: "end", 2: "no such file", 3: "denied", 4: "failure", 5: "bad message", 8: "unsupported"}


def u32(number: int) -> bytes:
    return struct.pack(">I", number)


def u64(number: int) -> bytes:
    return struct.pack(">Q", number)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u32(len(raw)) + raw


def mode(bits: int) -> bytes:
    """SFTP's file attributes, with permissions only."""
    return u32(4) + u32(bits)


def strings(raw: bytes) -> list[bytes]:
    found = []
    while raw:
        size = struct.unpack(">I", raw[:4])[0]
        found.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return found


def names(raw: bytes) -> list[str]:
    """The file names in a NAME answer; sftp-server's attributes are of one form."""
    count, raw = struct.unpack(">I", raw[:4])[0], raw[4:]
    found = []
    for _ in range(count):
        for index in range(2):
            size = struct.unpack(">I", raw[:4])[0]
            if index == 0:
                found.append(raw[4 : 4 + size].decode(errors="replace"))
            raw = raw[4 + size :]
        flags = struct.unpack(">I", raw[:4])[0]
        raw = raw[4 + 8 * bool(flags & 1) + 8 * bool(flags & 2) + 4 * bool(flags & 4) + 8 * bool(flags & 8) :]
    return found


def read_exactly(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        ready, _, _ = select.select([descriptor], [], [], 20)
        assert ready, "no answer"
        chunk = os.read(descriptor, size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


@contextmanager
def master(peer: Peer, path: Path) -> Iterator[None]:
    """A connection of that account, open to be shared at `path`."""
    argv = [*peer.argv("-q", "-N", "-M", "-S", path), f"{peer.user}@127.0.0.1"]
    ssh = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert ssh.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield
    finally:
        end(ssh)
        path.unlink(missing_ok=True)


# --- the loop ---


def test_the_block_is_good_sshd_config_and_is_for_hosts_only(server: Server) -> None:
    def effective(user: str) -> dict[str, str]:
        asked = f"user={user},host=localhost,addr=127.0.0.1"
        shown = call("/usr/sbin/sshd", "-T", "-f", server.top / "sshd/config", "-C", asked).stdout
        return dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)

    assert call("/usr/sbin/sshd", "-t", "-f", server.top / "sshd/config").stdout == ""
    host, person = effective(f"bento-{EVIL}"), effective(PERSON)
    denied = {
        "passwordauthentication", "kbdinteractiveauthentication", "allowtcpforwarding", "allowstreamlocalforwarding",
        "allowagentforwarding", "x11forwarding", "permittunnel", "permittty", "permituserrc",
    }  # fmt: skip
    assert {name: host[name] for name in denied} == dict.fromkeys(denied, "no")
    assert host["disableforwarding"] == "yes" and host["authenticationmethods"] == "publickey"
    assert host["maxsessions"] == "1" and host["chrootdirectory"] == "%h"
    assert not {name for name in denied if person[name] == "no"}
    assert person["disableforwarding"] == "no" and person["chrootdirectory"] == "none"


def test_a_host_pulls_and_reports(server: Server, fresh: Host) -> None:
    release = fresh.publish("v2")
    before = snapshot(server.chroot(FRESH), "logs")
    assert server.status(FRESH)["state"] == "new"

    done = fresh.run()

    assert done.returncode == 0, done.stdout
    assert fresh.machine.labels() == ("v2", "v2", "v2")
    assert snapshot(server.chroot(FRESH), "logs") == before
    logs = server.chroot(FRESH) / "logs"
    (log,) = server.logs(FRESH)
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z_{release[:12]}_ok\.log", log)
    assert sorted(path.name for path in logs.iterdir()) == sorted([log, "status.json"])
    for path in logs.iterdir():
        assert (path.owner(), path.group(), stat.S_IMODE(path.stat().st_mode)) == (f"bento-{FRESH}", "bento", 0o640)
    row = server.status(FRESH)
    assert (row["state"], row["release"], row["drift"], row["problem"]) == ("up-to-date", release, False, None)
    assert "ok" in server.bento("log", FRESH).stdout

    again = fresh.run()
    assert (again.returncode, again.stdout) == (0, f"up to date with release {release[:12]}\n")


def test_the_first_key_seen_is_kept_with_a_warning(server: Server, fresh: Host) -> None:
    fresh.publish("v1")
    probe, run = fresh.client("probe"), fresh.run()
    assert (probe.returncode, run.returncode) == (0, 0), run.stdout
    known = fresh.state / "known_hosts"
    warning = f"bento: warning: first contact with 127.0.0.1: its host key is kept in {known}"
    assert probe.stdout.count(warning) == 1 and "warning" not in run.stdout
    assert server.host_key().split()[1] in known.read_text()


def test_a_key_that_is_not_known_is_refused_when_keys_are_given(server: Server, fresh: Host) -> None:
    known = server.known_hosts(fresh.top / "known")
    good = fresh.client("probe", "--known-hosts", str(known))
    assert good.returncode == 0, good.stdout
    known.write_text("")
    done = fresh.client("probe", "--known-hosts", str(known))
    assert done.returncode == 75 and "its host key is not the known one" in done.stdout
    assert known.read_text() == "" and not (fresh.state / "known_hosts").exists()


def test_a_connection_is_never_shared(server: Server, fresh: Host) -> None:
    """What has to be proven is that a new connection can be made: whatever ssh_options say."""
    path = fresh.top / "c"
    sharing = [
        f"--ssh-options={option}" for option in ("ControlMaster=auto", f"ControlPath={path}", "ControlPersist=60")
    ]
    with Line(server.port) as line:
        for expected in (1, 2):
            done = fresh.client("probe", *sharing, "--port", str(line.port))
            assert (done.returncode, line.accepted) == (0, expected), done.stdout
            assert not path.exists()
    # Somebody else's, alive, at that place: over it even a server that is not there would answer.
    with master(Peer(server, f"bento-{FRESH}"), path):
        done = fresh.client("probe", *sharing, "--port", str(free_port()))
    assert done.returncode == 75 and "connection refused" in done.stdout


# --- bad lines ---


def test_a_download_is_resumed_after_a_dropped_line(server: Server, fresh: Host) -> None:
    release = fresh.publish("v2", bulk=BULK)
    with Line(server.port, cut_after=BULK // 2) as line:
        done = fresh.run("--port", str(line.port))
    assert done.returncode == 75, done.stdout
    partial = fresh.state / f"partial/{release}.tar"
    assert BULK // 4 < partial.stat().st_size < BULK
    assert fresh.machine.labels() == ("v0", "v0", "v0") and not (fresh.state / "config").exists()
    with Line(server.port) as line:
        done = fresh.run("--port", str(line.port))
        assert done.returncode == 0, done.stdout
        assert line.carried < BULK * 3 // 4
    assert fresh.machine.labels() == ("v2", "v2", "v2") and not partial.exists()


def test_slow_is_fine_and_dead_is_not(server: Server, fresh: Host) -> None:
    release = fresh.publish("v2", bulk=BULK)
    started = time.monotonic()
    with Line(server.port, stall_after=BULK // 4) as line:
        done = fresh.run("--port", str(line.port), stall_s=2)
    assert done.returncode == 75 and f"no answer to 'get releases/{release}.tar" in done.stdout, done.stdout
    assert time.monotonic() - started < 20
    shutil.rmtree(fresh.state / "partial")
    with Line(server.port, rate=BULK // 4) as line:
        started = time.monotonic()
        done = fresh.run("--port", str(line.port), stall_s=2)
        assert done.returncode == 0 and time.monotonic() - started > 4, done.stdout


def test_a_server_that_goes_away_during_the_build(server: Server, fresh: Host) -> None:
    release = fresh.publish("v2")
    with Line(server.port, connections=1) as line:
        done = fresh.run("--port", str(line.port))
    assert done.returncode == 75 and "the server went away" in done.stdout, done.stdout
    assert fresh.machine.labels() == ("v0", "v0", "v0")
    (waiting,) = (fresh.state / "outbox").iterdir()
    assert waiting.name.endswith(f"_{release[:12]}_postponed.log") and server.logs(FRESH) == []
    time.sleep(1)  # names of logs count seconds
    done = fresh.run()
    assert done.returncode == 0, done.stdout
    assert [log.split("_")[2] for log in server.logs(FRESH)] == ["postponed.log", "ok.log"]
    assert fresh.machine.labels() == ("v2", "v2", "v2") and list((fresh.state / "outbox").iterdir()) == []


def wrong_key(host: Host, line: Line) -> list[str]:
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host.top / "wrong")
    wrong = (host.top / "wrong.pub").read_text()
    return ["--known-hosts", str(host.server.known_hosts(host.top / "wrong_hosts", wrong))]


def unknown_key(host: Host, line: Line) -> list[str]:
    (host.top / "no_hosts").write_text("")
    return ["--known-hosts", str(host.top / "no_hosts")]


def refused_key(host: Host, line: Line) -> list[str]:
    return ["--identity", str(host.server.keys / f"bento-{OTHER}")]


def port_of(line: Line) -> list[str]:
    return ["--port", str(line.port), "--connect-timeout", "3"]


# A way to be out of reach: what the line does, the flags, what the message says.
UNREACHABLE: dict[str, tuple[dict[str, Any], Callable[[Host, Line], list[str]], str]] = {
    "wrong host key": ({}, wrong_key, "its host key is not the known one: if the server was renewed, correct"),
    "unknown host key": ({}, unknown_key, "its host key is not the known one: if the server was renewed, correct"),
    "refused key": ({}, refused_key, "it refuses this machine's key: give the output of 'bento-client key'"),
    "another user": ({}, lambda *_: ["--user", f"bento-{OTHER}"], "it refuses this machine's key"),
    "no such name": ({}, lambda *_: ["--server", "nowhere.invalid", "--connect-timeout", "2"], "its name cannot be resolved"),
    "refused port": (
        {}, lambda *_: ["--port", str(free_port()), "--connect-timeout", "2"],
        "connection refused: is sshd running there, on this port?",
    ),
    "says nothing": ({"stall_after": 0}, lambda _, line: port_of(line), "no answer in time"),
    "silent in the handshake": ({"stall_after": 900}, lambda _, line: port_of(line), "no answer"),
    "dropped in the handshake": ({"cut_after": 900}, lambda _, line: port_of(line), "the connection was lost"),
    "dropped in the middle": ({"cut_after": BULK // 2}, lambda _, line: port_of(line), "the connection was lost"),
    "silent in the middle": (
        {"stall_after": BULK // 2},
        lambda _, line: [*port_of(line), "--ssh-options=ServerAliveInterval=1", "--ssh-options=ServerAliveCountMax=2"],
        "no answer in time (Timeout, server 127.0.0.1 not responding.)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", UNREACHABLE)
def test_out_of_reach(settled: Host, way: str) -> None:
    """Exit 75 in time, one line that says why, and nothing has changed: neither here, nor at the server."""
    behaviour, flags, says = UNREACHABLE[way]
    transient = ["lock", "partial", "deploy.log"]
    transient += ["known_hosts"] if behaviour else []  # to ssh, the line's port is a name of its own
    before, labels, delivered = snapshot(settled.state, *transient), settled.machine.labels(), settled.server.logs(GOOD)
    with ExitStack() as stack:
        if "in the middle" in way:
            # Else the reports are delivered before the line fails.
            aside = settled.top / "aside"
            (settled.state / "outbox").rename(aside)
            stack.callback(aside.rename, settled.state / "outbox")
            stack.callback((settled.state / "outbox").rmdir)
            (settled.state / "outbox").mkdir(mode=0o700)
        line = stack.enter_context(Line(settled.server.port, **behaviour))
        started = time.monotonic()
        done = settled.run(*flags(settled, line))
        took_s = time.monotonic() - started
    errors = [text for text in done.stdout.splitlines() if "error" in text]
    assert done.returncode == 75 and len(errors) == 1, done.stdout
    assert says in errors[0] and "Traceback" not in done.stdout
    assert took_s < 30
    assert snapshot(settled.state, *transient) == before
    assert settled.machine.labels() == labels and settled.server.logs(GOOD) == delivered


def test_after_all_that_the_reports_arrive_in_order(settled: Host) -> None:
    shutil.rmtree(settled.state / "partial", ignore_errors=True)
    before = settled.server.logs(GOOD)
    assert sorted(path.name for path in (settled.state / "outbox").iterdir()) == sorted(WAITING)
    # With a delay, so that no two of them come in the same tick of the server's clock.
    with Line(settled.server.port, delay_s=0.01) as line:
        done = settled.run("--port", str(line.port))
    assert done.returncode == 0, done.stdout
    assert settled.machine.labels() == ("v2", "v2", "v2")
    *first, last = settled.server.logs(GOOD)[len(before) :]
    assert first == WAITING and last.endswith("_ok.log")
    assert (settled.server.chroot(GOOD) / "logs" / WAITING[0]).read_text() == f"log {WAITING[0]}\n"
    assert list((settled.state / "outbox").iterdir()) == []


# --- a hostile host ---


@pytest.fixture(scope="module")
def trees(server: Server) -> dict[str, dict[str, tuple[object, ...]]]:
    """What a hostile host must leave alone: its own chroot but the logs, and everything of another host."""
    return {"evil": snapshot(server.chroot(EVIL), "logs"), "other": snapshot(server.chroot(OTHER))}


@pytest.fixture(scope="module")
def evil_peer(server: Server) -> Iterator[Peer]:
    peer = Peer(server, f"bento-{EVIL}")
    assert peer.write("logs/old.log", b"what I did\n") == "ok"
    yield peer
    peer.close_session()


@pytest.fixture
def evil(evil_peer: Peer, trees: dict[str, dict[str, tuple[object, ...]]]) -> Iterator[Peer]:
    """After each thing that it tries, all is as it was."""
    yield evil_peer
    assert snapshot(evil_peer.server.chroot(EVIL), "logs") == trees["evil"]
    assert snapshot(evil_peer.server.chroot(OTHER)) == trees["other"]


@pytest.fixture(scope="module")
def person(server: Server) -> Iterator[Peer]:
    peer = Peer(server, PERSON)
    yield peer
    peer.close_session()


@pytest.fixture(params=["restrict", "no restrict"])
def evil_with_key(request: pytest.FixtureRequest, evil: Peer) -> Peer:
    """With the key that the module makes, and with one without its prefix: the block does not rely on it."""
    return evil if request.param == "restrict" else Peer(evil.server, evil.user, UNRESTRICTED)


def release_of(peer: Peer) -> str:
    current = json.loads((peer.server.chroot(peer.host) / "current.json").read_text())
    return f"releases/{current['release']}"


# What sftp-server is asked, and what it says: "denied" and "no such file" where the answer is no.
REQUESTS: dict[str, tuple[Callable[[Peer], str], str]] = {
    # What a host may do.
    "list its own logs": (lambda p: p.list("logs"), "old.log"),
    "read its own old log": (lambda p: p.read("logs/old.log"), "what I did\n"),
    "write a log": (lambda p: with_log(p, lambda: p.write("logs/new.log", b"y")), "ok"),
    "rename a log": (lambda p: with_log(p, lambda: p.ask(RENAME, text("logs/new.log"), text("logs/newer.log"))), "ok"),
    "replace a log": (
        lambda p: with_log(
            p, lambda: p.extended("posix-rename@openssh.com", text("logs/new.log"), text("logs/newest.log"))
        ), "ok",
    ),
    "remove a log": (lambda p: with_log(p, lambda: p.ask(REMOVE, text("logs/new.log"))), "ok"),
    "list its own chroot": (lambda p: p.list("/"), "config current.json history logs releases"),
    # Writing elsewhere.
    "overwrite current.json": (lambda p: p.open("current.json", WRITE | TRUNCATE), "denied"),
    "append to current.json": (lambda p: p.open("current.json", WRITE | APPEND), "denied"),
    "remove current.json": (lambda p: p.ask(REMOVE, text("current.json")), "denied"),
    "rename a log over current.json": (lambda p: p.ask(RENAME, text("logs/old.log"), text("current.json")), "failure"),
    "rename a log over current.json, the POSIX way": (
        lambda p: p.extended("posix-rename@openssh.com", text("logs/old.log"), text("current.json")), "denied",
    ),
    "write beside current.json": (lambda p: p.open("x", WRITE | CREATE), "denied"),
    "overwrite the release": (lambda p: p.open(f"{release_of(p)}.tar", WRITE), "denied"),
    "remove the release": (lambda p: p.ask(REMOVE, text(f"{release_of(p)}.tar")), "denied"),
    "add a release": (lambda p: p.open("releases/x.tar", WRITE | CREATE), "denied"),
    "write in the release's tree": (lambda p: p.open("config/flake.nix", WRITE), "denied"),
    "move the link to the release": (
        lambda p: p.extended("posix-rename@openssh.com", text("logs/old.log"), text("config")), "denied",
    ),
    "plant a key for itself": (lambda p: p.open(".ssh/authorized_keys", WRITE | CREATE), "no such file"),
    "write through ..": (lambda p: p.open("logs/../current.json", WRITE), "denied"),
    # logs/ itself.
    "rename logs": (lambda p: p.ask(RENAME, text("logs"), text("logs2")), "denied"),
    "rename logs, the POSIX way": (lambda p: p.extended("posix-rename@openssh.com", text("logs"), text("x")), "denied"),
    "remove logs as a file": (lambda p: p.ask(REMOVE, text("logs")), "denied"),
    "remove logs as a directory": (lambda p: p.ask(RMDIR, text("logs")), "denied"),
    "make a directory in logs": (lambda p: p.ask(MKDIR, text("logs/d"), bytes(4)), "denied"),
    "make a directory elsewhere": (lambda p: p.ask(MKDIR, text("d"), bytes(4)), "denied"),
    # Links.
    "make a symlink": (lambda p: p.ask(SYMLINK, text("../current.json"), text("logs/l")), "denied"),
    "make a symlink out": (lambda p: p.ask(SYMLINK, text("/etc/passwd"), text("logs/status.json")), "denied"),
    "make a hard link": (
        lambda p: p.extended("hardlink@openssh.com", text("current.json"), text("logs/l")), "denied",
    ),
    "read a link": (lambda p: p.ask(READLINK, text("config")), "denied"),
    # Modes, owners, times.
    "change the mode of logs": (lambda p: p.ask(SETSTAT, text("logs"), mode(0o777)), "denied"),
    "change the mode of a log": (lambda p: p.ask(SETSTAT, text("logs/old.log"), mode(0o4777)), "denied"),
    "give a log away": (lambda p: p.ask(SETSTAT, text("logs/old.log"), u32(2), u32(0), u32(0)), "denied"),
    "set a log's time": (lambda p: p.ask(SETSTAT, text("logs/old.log"), u32(8), u32(2**31), u32(2**31)), "denied"),
    "change the mode without following": (
        lambda p: p.extended("lsetstat@openssh.com", text("logs/old.log"), mode(0o4777)), "denied",
    ),
    "change the mode of an open file": (lambda p: with_handle(p, lambda h: p.ask(FSETSTAT, h, mode(0o4777))), "denied"),
    # Reading elsewhere.
    "read /etc/passwd": (lambda p: p.open("/etc/passwd", READ), "no such file"),
    "read /etc/shadow through ..": (lambda p: p.open("../../../../../../etc/shadow", READ), "no such file"),
    "read /dev/zero": (lambda p: p.open("/dev/zero", READ), "no such file"),
    "read /proc/self/environ": (lambda p: p.open("/proc/self/environ", READ), "no such file"),
    "read another host's current.json": (lambda p: p.open(f"../{OTHER}/current.json", READ), "no such file"),
    "read it by its real path": (lambda p: p.open(str(p.server.chroot(OTHER) / "current.json"), READ), "no such file"),
    "write another host's log": (lambda p: p.open(f"../{OTHER}/logs/x", WRITE | CREATE), "no such file"),
    "list what is above": (lambda p: p.list("../.."), "config current.json logs releases"),
    "list what is above through logs": (lambda p: p.list("logs/../../../.."), "config current.json logs releases"),
    # Extensions, and what is none.
    "copy data in the server": (
        lambda p: with_handle(p, lambda h: p.extended("copy-data", h, u64(0), u64(0), h, u64(0))), "denied",
    ),
    "sync to disk": (lambda p: with_handle(p, lambda h: p.extended("fsync@openssh.com", h)), "denied"),
    "ask for limits": (lambda p: p.extended("limits@openssh.com"), "denied"),
    "ask for the disk": (lambda p: p.extended("statvfs@openssh.com", text("/")), "denied"),
    "ask for home directories": (lambda p: p.extended("expand-path@openssh.com", text("~root")), "denied"),
    "an unknown extension": (lambda p: p.ask(EXTENDED, text("shell@example.org"), text("id")), "unsupported"),
    # Names.
    "a name of 5000 bytes": (lambda p: p.open(b"logs/" + b"x" * 5000, WRITE | CREATE), "bad message"),
    "a path of 100000 bytes": (lambda p: p.open(b"logs/../" * 12500 + b"current.json", READ), "bad message"),
    "a deep path": (lambda p: p.open("logs/" + "d/" * 500 + "x", WRITE | CREATE), "no such file"),
    "an empty name": (lambda p: p.open("", WRITE | CREATE), "no such file"),
    "a name with a NUL": (lambda p: p.open(b"current.json\0logs", WRITE), "hung up"),
    "a huge packet": (lambda p: p.open(b"x" * 300_000, READ), "hung up"),
    "a handle that is not its own": (lambda p: p.ask(READ_DATA, text(u32(4711)), u64(0), u32(1)), "failure"),
}  # fmt: skip


def with_log(peer: Peer, action: Callable[[], str]) -> str:
    for name in ("logs/new.log", "logs/newest.log"):
        assert peer.write(name, b"x") == "ok"
    try:
        return action()
    finally:
        clear(peer)


def with_handle(peer: Peer, action: Callable[[bytes], str]) -> str:
    what, handle = peer.request(OPEN, text("logs/old.log"), u32(READ | WRITE), bytes(4))
    assert what == "handle"
    what = action(handle)
    assert peer.ask(CLOSE, handle) == "ok"
    return what


def test_a_host_is_offered_no_more_than_it_needs(evil: Peer, person: Peer) -> None:
    for peer in (evil, person):
        peer.open_session()
    assert evil.extensions.keys() == {b"posix-rename@openssh.com"}
    tried = {name for name in re.findall(rb'p\.extended\("([a-z@.-]+)"', Path(__file__).read_bytes()) if b"@" in name}
    assert len(tried) > 5 and tried <= person.extensions.keys()  # else that sshd refuses them would say nothing


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_hostile_host_asks(evil: Peer, request_: str) -> None:
    action, expected = REQUESTS[request_]
    assert action(evil) == expected


# Whether it was let to. Everybody else is: it is the block that makes the difference.


def run_command(peer: Peer) -> bool:
    return "ran 42" in peer.ssh(command="echo ran $((40 + 2))")


def get_shell(peer: Peer) -> bool:
    return "ran 42" in peer.ssh("-T", send=b"echo ran $((40 + 2))\n")


def get_terminal(peer: Peer) -> bool:
    return "PTY allocation request failed" not in peer.ssh("-tt", command="true", send=b"\4")


def use_other_subsystem(peer: Peer) -> bool:
    return "root:" in peer.ssh("-s", command="leak")


def set_environment(peer: Peer) -> bool:
    return "BENTO_X=1" in peer.ssh("-oSetEnv=BENTO_X=1", command="env")


@contextmanager
def secret(path: Path | None = None) -> Iterator[int]:
    """Something that listens where only the server should reach it; its port."""
    family = socket.AF_INET if path is None else socket.AF_UNIX
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1", 0) if path is None else str(path))
        listener.listen()
        if path is not None:
            path.chmod(0o777)

        def answer() -> None:
            with suppress(OSError):
                while True:
                    accepted, _ = listener.accept()
                    accepted.sendall(b"secret")
                    accepted.close()

        threading.Thread(target=answer, daemon=True).start()
        yield 0 if path is not None else listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def reach(peer: Peer, flags: list[str], port: int, greeting: bytes = b"") -> bool:
    """Whether the secret can be read through a port that ssh forwards."""
    ssh = subprocess.Popen([*peer.argv("-q", "-N", *flags), f"{peer.user}@127.0.0.1"], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            with suppress(ConnectionRefusedError):
                line = socket.create_connection(("127.0.0.1", port), 20)
                break
            assert ssh.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        with line, suppress(ConnectionError):
            line.sendall(greeting)
            while data := line.recv(100):
                if b"secret" in data:
                    return True
        return False
    finally:
        end(ssh)


def forward_local(peer: Peer) -> bool:
    with secret() as hidden:
        port = free_port()
        return reach(peer, [f"-L{port}:127.0.0.1:{hidden}"], port)


def forward_stdio(peer: Peer) -> bool:
    with secret() as hidden:
        return "secret" in peer.ssh("-W", f"127.0.0.1:{hidden}")


def socket_of(peer: Peer) -> tuple[Path, str]:
    """Where that account could make a socket, and what it is called there: sshd forwards from inside of the chroot."""
    if peer.user == PERSON:
        path = Path("/tmp", f"{peer.user}.sock")
        return path, str(path)
    return peer.server.chroot(peer.host) / "logs/s", "/logs/s"


def forward_local_socket(peer: Peer) -> bool:
    path, seen = socket_of(peer)
    try:
        with secret(path):
            port = free_port()
            return reach(peer, [f"-L{port}:{seen}"], port)
    finally:
        path.unlink()


def forward_dynamic(peer: Peer) -> bool:
    with secret() as hidden:
        port = free_port()
        socks4 = b"\4\1" + struct.pack(">H", hidden) + socket.inet_aton("127.0.0.1") + b"\0"
        return reach(peer, [f"-D{port}"], port, socks4)


def forward_remote(peer: Peer) -> bool:
    return peer.says("remote forward success", "-N", "-R0:127.0.0.1:9")


def forward_remote_socket(peer: Peer) -> bool:
    path, seen = socket_of(peer)
    try:
        return peer.says("remote forward success", "-N", f"-R{seen}:127.0.0.1:9")
    finally:
        path.unlink(missing_ok=True)


def forward_agent(peer: Peer) -> bool:
    """sshd offers an agent as a socket in /tmp, of that user. A chroot without /tmp is in the way of that, too."""
    with tempfile.TemporaryDirectory() as directory:
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", f"{directory}/a"], stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 20
            while not Path(directory, "a").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            session = peer.connect("-A", command="cat", SSH_AUTH_SOCK=f"{directory}/a")
            assert session.stdin is not None and session.stdout is not None
            # cat sends this back, and a host is told that it may not. The request for the agent came before.
            session.stdin.write(HELLO)
            read_exactly(session.stdout.fileno(), 9)
            uid = pwd.getpwnam(peer.user).pw_uid
            offered = any(path.stat().st_uid == uid for path in Path("/tmp").glob("ssh-*/agent.*"))
            end(session)
            return offered
        finally:
            agent.kill()
            agent.wait()


def forward_x11(peer: Peer) -> bool:
    said = peer.ssh("-Y", command="true", DISPLAY="127.0.0.1:0")
    return "X11 forwarding request failed" not in said


def several_sessions(peer: Peer) -> bool:
    """The second session of a connection. The port is a closed one, lest ssh make a connection of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "c")
        with master(peer, path):
            shared = ["-S", str(path), f"-oControlPath={path}", f"-oPort={free_port()}"]
            first = peer.connect(*shared)
            assert first.stdin is not None and first.stdout is not None
            first.stdin.write(HELLO)
            read_exactly(first.stdout.fileno(), 9)
            second = peer.connect(*shared)
            assert second.stdin is not None and second.stdout is not None
            try:
                second.stdin.write(HELLO)
                read_exactly(second.stdout.fileno(), 9)
                return True
            except (EOFError, BrokenPipeError):
                return False
            finally:
                end(first)
                end(second)


PRIVILEGES = [
    run_command, get_shell, get_terminal, use_other_subsystem, set_environment, forward_local, forward_stdio,
    forward_local_socket, forward_dynamic, forward_remote, forward_remote_socket, forward_agent, forward_x11,
    several_sessions,
]  # fmt: skip


@pytest.mark.parametrize("privilege", PRIVILEGES)
def test_a_hostile_host_is_not_let(evil_with_key: Peer, privilege: Callable[[Peer], bool]) -> None:
    assert privilege(evil_with_key) is False


@pytest.mark.parametrize("privilege", PRIVILEGES)
def test_a_person_is_let(person: Peer, privilege: Callable[[Peer], bool]) -> None:
    """The block is for hosts only; and the test above can fail."""
    assert privilege(person) is True


def test_a_hostile_host_uses_no_password(evil: Peer, person: Peer) -> None:
    ways = ["-oPubkeyAuthentication=no", "-oPreferredAuthentications=password,keyboard-interactive"]
    assert "Permission denied (publickey)." in evil.ssh(*ways, command="sftp")
    assert "password" in person.ssh(*ways, command="sftp")


@pytest.mark.parametrize("user", [f"bento-{OTHER}", "root", PERSON, "nobody", f"bento-{EVIL}x"])
def test_a_hostile_host_is_nobody_else(evil: Peer, user: str) -> None:
    assert evil.ssh("-s", user=user, command="sftp", send=HELLO).endswith("Permission denied (publickey).\r\n") or (
        "Permission denied (publickey," in evil.ssh("-s", user=user, command="sftp", send=HELLO)
    )


def test_a_hostile_host_makes_no_tunnel(evil_with_key: Peer) -> None:
    """Where this machine has tunnel devices; else ssh does not get to ask, and PermitTunnel above has to do."""
    assert evil_with_key.says("Tunnel forwarding failed|Tunnel device open failed", "-N", "-wany:any")


def test_a_hostile_host_is_not_moved_by_its_environment(evil: Peer) -> None:
    evil.open_session("-oSetEnv=HOME=/etc LD_PRELOAD=/logs/old.log TZ=:/logs/old.log USER=root")
    assert evil.list(".") == "config current.json logs releases"
    what, raw = evil.request(REALPATH, text("."))
    assert (what, names(raw)) == ("names", ["/"])
    evil.close_session()


def test_a_hostile_host_makes_plain_files_only(evil: Peer) -> None:
    """Whatever type and mode it asks for: no FIFO, no device, nothing that runs."""
    for bits in (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFLNK, stat.S_IFREG):
        assert evil.open("logs/x", WRITE | CREATE, mode(bits | 0o6777)) == "handle"
        made = (evil.server.chroot(EVIL) / "logs/x").lstat()
        assert stat.S_ISREG(made.st_mode) and made.st_mode & 0o137 == 0
        assert evil.ask(REMOVE, text("logs/x")) == "ok"


def test_a_hostile_host_s_words_are_made_harmless(evil: Peer) -> None:
    """Names and contents with escapes, newlines and lies: sshd takes them, and `bento.py` shows none of it."""
    hostile: list[str | bytes] = [
        "20991231T235959Z_aaaaaaaaaaaa_ok.log\n\x1b[2Jlie",
        "\x1b]0;lie\x07",
        "-rf",
        "$(id)",
        "\xff".encode("latin-1"),
    ]
    real = "20991231T235959Z_aaaaaaaaaaaa_ok.log"
    report = {"format": 1, "host": "\x1b[2Jlie", "client": "\n", "polled": "", "phase": "\x1b[2Jlie", "last": None}
    try:
        for name in hostile:
            raw = name.encode() if isinstance(name, str) else name
            assert evil.write(b"logs/" + raw, b"x") == "ok"
        assert evil.write(f"logs/{real}", b"\x1b[2Jlie\r\n\x9b1m\0") == "ok"
        assert evil.write("logs/status.json", json.dumps(report).encode()) == "ok"
        shown = [evil.server.bento(*args).stdout for args in (["status"], ["log", EVIL], ["log", EVIL, "--list"])]
        for text_ in shown:
            assert "Traceback" not in text_ and all(c.isprintable() or c == "\n" for c in text_), text_
        assert "?[2Jlie" in shown[1] and shown[2].count("\n") == 1
        assert "malformed" in evil.server.status(EVIL)["problem"]
        done = evil.server.bento("populate", EVIL)
        assert done.returncode == 0, done.stdout
    finally:
        clear(evil)


def clear(peer: Peer) -> None:
    for path in (peer.server.chroot(peer.host) / "logs").iterdir():
        if path.name != "old.log":
            path.unlink()


def test_a_hostile_host_writes_a_terabyte(evil: Peer) -> None:
    """A sparse file, here without the limits that PAM sets: what reads it stops early."""
    try:
        what, handle = evil.request(OPEN, text("logs/status.json"), u32(WRITE | CREATE), bytes(4))
        assert what == "handle" and evil.ask(WRITE_DATA, handle, u64(1 << 40), text("x")) == "ok"
        assert evil.ask(CLOSE, handle) == "ok"
        assert evil.ask(RENAME, text("logs/status.json"), text("logs/20990101T000000Z_aaaaaaaaaaaa_ok.log")) == "ok"
        assert evil.write("logs/status.json", b"{" * 100_000) == "ok"
        started = time.monotonic()
        assert "larger than" in evil.server.status(EVIL)["problem"]
        assert evil.server.bento("log", EVIL).returncode == 0
        assert time.monotonic() - started < 20
    finally:
        clear(evil)


def test_a_hostile_host_fills_its_logs(evil: Peer) -> None:
    """`populate` keeps 200 of what looks like a log."""
    try:
        for index in range(300):
            assert evil.open(f"logs/20200101T{index:06d}Z_aaaaaaaaaaaa_ok.log", WRITE | CREATE) == "handle"
        done = evil.server.bento("populate", EVIL)
        assert done.returncode == 0, done.stdout
        assert len([log for log in evil.server.logs(EVIL) if log.startswith("2020")]) == 200
    finally:
        clear(evil)


# What one host holds, the others do not lack.


def poll_of_another(settled: Host) -> None:
    """Another host's poll, as the timer starts it."""
    done = settled.run("--connect-timeout", "20")
    assert done.returncode == 0 and "up to date" in done.stdout, done.stdout


def test_a_hostile_host_holds_thousands_of_handles(evil: Peer, settled_and_done: Host) -> None:
    evil.open_session()
    handles = []
    for _ in range(3000):
        what, handle = evil.request(OPEN, text("logs/old.log"), u32(READ), bytes(4))
        if what != "handle":
            break
        handles.append(handle)
    assert 0 < len(handles) < 512 and what == "failure"
    poll_of_another(settled_and_done)
    assert evil.ask(CLOSE, handles[0]) == "ok" and evil.read("logs/old.log") == "what I did\n"
    evil.close_session()


def test_a_hostile_host_holds_many_connections(evil: Peer, settled_and_done: Host) -> None:
    with ExitStack() as stack:
        for _ in range(12):
            session = evil.connect()
            stack.callback(end, session)
            assert session.stdin is not None and session.stdout is not None
            session.stdin.write(HELLO)
            read_exactly(session.stdout.fileno(), 9)
        poll_of_another(settled_and_done)


def test_connections_held_open_without_a_key(evil: Peer, settled_and_done: Host) -> None:
    """More than MaxStartups: sshd drops them after LoginGraceTime, and the client tries again until then."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", evil.server.port), 20)) for _ in range(150)]
        time.sleep(0.5)
        turned_away = 0
        for each in held:
            each.setblocking(False)
            with suppress(BlockingIOError, ConnectionError):
                turned_away += not each.recv(100).startswith(b"SSH-")
        assert 10 < turned_away < 140
        poll_of_another(settled_and_done)


def test_after_all_that_the_others_are_served(
    settled_and_done: Host, server: Server, trees: dict[str, dict[str, tuple[object, ...]]]
) -> None:
    poll_of_another(settled_and_done)
    assert server.status(GOOD)["state"] == "up-to-date" and server.status(OTHER)["state"] == "new"
    assert snapshot(server.chroot(EVIL), "logs") == trees["evil"]
    assert snapshot(server.chroot(OTHER)) == trees["other"]
    assert Peer(server, f"bento-{EVIL}").read("logs/old.log") == "what I did\n"
