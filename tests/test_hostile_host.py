"""A hostile host, which has a key, against a real sshd with the Match block that `bento.py fleet` makes."""

import json
import pwd
import re
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from peer import (
    APPEND,
    CLOSE,
    CREATE,
    EXTENDED,
    FSETSTAT,
    HELLO,
    MKDIR,
    OPEN,
    READ,
    READ_DATA,
    REALPATH,
    REMOVE,
    RENAME,
    RMDIR,
    SETSTAT,
    SYMLINK,
    TRUNCATE,
    WRITE,
    WRITE_DATA,
    Peer,
    end,
    master,
    mode,
    names,
    read_exactly,
    text,
    u32,
    u64,
)
from sshd import free_port
from sshdlab import EVIL, GOOD, OTHER, PERSON, UNRESTRICTED, Host, Server, snapshot


@pytest.fixture
def settled_and_done(settled_host: Host) -> Host:
    """The same, after it has run v2."""
    if settled_host.machine.current_label() != "v2":
        done = settled_host.run()
        assert done.returncode == 0, done.stdout
    return settled_host


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
    "list its own chroot": (lambda p: p.list("/"), "current.json history logs releases"),
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
    "list what is above": (lambda p: p.list("../.."), "current.json history logs releases"),
    "list what is above through logs": (lambda p: p.list("logs/../../../.."), "current.json history logs releases"),
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
        path = peer.server.top / "person/s"
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
    assert evil.list(".") == "current.json history logs releases"
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
        listed = [line for line in shown[2].splitlines() if "  published" not in line]
        assert "?[2Jlie" in shown[1] and len(listed) == 1
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
        assert "larger than" in evil.server.status(EVIL)["problem"]
        assert evil.server.bento("log", EVIL).returncode == 0
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
def poll_of_another(settled_host: Host) -> None:
    """Another host's poll, as the timer starts it."""
    done = settled_host.run("--connect-timeout", "20")
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
