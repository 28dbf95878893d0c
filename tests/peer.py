"""A host that does not keep to the client: SFTP's messages one by one, and what else ssh may ask for."""

import os
import re
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sshdlab import Server


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
