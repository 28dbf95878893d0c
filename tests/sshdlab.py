"""A real sshd with the Match block that `bento.py fleet` makes, lines to it, and toy machines that poll it."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sshd import end_sshd, match_block, max_startups, no_penalties, start_sshd
from toynixos import CLIENT, TOY, ToyMachine, compiled_client, write_config

SERVER = CLIENT.parent / "bento.py"
HOSTS = GOOD, FRESH, EVIL, OTHER = "good", "fresh", "evil", "other"
PERSON = "bentoperson"
UNRESTRICTED = "unrestricted"
LOGIN_GRACE_S = 4
# Incompressible, and much larger than the handshake: a line can be cut in the middle of it.
BULK = 1_500_000
Done = subprocess.CompletedProcess[str]


def call(*argv: str | Path, **options: Any) -> Done:
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=60, check=True, **options,
    )  # fmt: skip


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
            {no_penalties("/usr/sbin/sshd")}
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
        self.process = start_sshd(self.top / "sshd", "127.0.0.1", self.port, "prlimit", "--nofile=512:512")

    def stop(self) -> None:
        assert self.process is not None
        end_sshd(self.process)


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
        for program in ("boot", "bootctl", "nix-env", "nixos-rebuild"):
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
        argv: list[str | Path] = [sys.executable, compiled_client()]
        if stall_s is not None:
            code = f"import sys; sys.path.insert(0, {str(CLIENT.parent)!r}); import bento_client as c; "
            argv = [sys.executable, "-c", f"{code}c.STALL_S = {stall_s}; c.LEAST_RATE = 1 << 17; sys.exit(c.main())"]
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


# The older one has the later name, in the alphabet of results.
WAITING = ["20200101T000000Z_aaaaaaaaaaaa_postponed.log", "20200102T000000Z_aaaaaaaaaaaa_build-failed.log"]
