"""Any SFTP server does: the client against those that Debian and PyPI have, and against gateways of rclone."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sshd import free_port
from sshdlab import BULK, FRESH, GOOD, Host, Line, Server, call, snapshot
from toynixos import CLIENT, _missing, need

UTILS = CLIENT.parent / "utils"
SFTPD = Path(__file__).with_name("sftpd")
Argv = list[str | Path]


@dataclass
class Place:
    """What one of these servers is told: whom it serves, which directory, and where its own files may lie."""

    server: Server
    top: Path
    port: int

    @property
    def key(self) -> Path:
        return self.server.top / "sshd/host_key"

    @property
    def keys(self) -> Path:
        return self.server.keys / f"bento-{FRESH}.pub"

    @property
    def chroot(self) -> Path:
        return self.server.chroot(FRESH)


def rclone(place: Place, *words: str | Path, cache: str = "1s") -> Argv:
    argv: Argv = [need("rclone"), "serve", "sftp", "--addr", f"127.0.0.1:{place.port}", "--key", place.key]
    return [*argv, "--config", os.devnull, "--dir-cache-time", cache, *words]


def rclone_of_one(place: Place) -> Argv:
    return rclone(place, "--authorized-keys", place.keys, place.chroot)


def dropbear(place: Place) -> Argv:
    """It looks for the keys in the account's home, and has no chroot."""
    call(need("dropbearconvert"), "openssh", "dropbear", place.key, place.top / "key")
    (place.chroot / ".ssh").mkdir(mode=0o755, exist_ok=True)
    shutil.copy(place.keys, place.chroot / ".ssh/authorized_keys")
    return [need("dropbear"), "-F", "-E", "-s", "-r", place.top / "key", "-p", f"127.0.0.1:{place.port}", "-P", place.top / "pid"]


PROFTPD = """\
ModulePath /usr/lib/proftpd
LoadModule mod_sftp.c
ServerType standalone
ServerName bento
DefaultAddress 127.0.0.1
Port {port}
User nobody
Group nogroup
ScoreboardFile none
PidFile {top}/pid
AuthOrder mod_auth_unix.c
RequireValidShell off
UseReverseDNS off
DefaultRoot ~
AllowOverwrite on
AllowRetrieveRestart on
SFTPEngine on
SFTPHostKey {key}
SFTPAuthMethods publickey
SFTPAuthorizedUserKeys file:{top}/keys
SFTPLog {top}/log
"""


def proftpd(place: Place) -> Argv:
    program = need("proftpd")
    (place.top / "keys").write_text(call("ssh-keygen", "-e", "-f", place.keys).stdout)
    (place.top / "keys").chmod(0o644)
    (place.top / "config").write_text(PROFTPD.format(port=place.port, top=place.top, key=place.key))
    return [program, "-n", "-q", "-c", place.top / "config"]


def python(module: str) -> Callable[[Place], Argv]:
    def argv(place: Place) -> Argv:
        if importlib.util.find_spec(module) is None:
            _missing(f"needs {module}")
        return [f"{sys.prefix}/bin/python", SFTPD / f"{module}-sftpd", str(place.port), place.key, place.keys, place.chroot]

    return argv


SERVERS: dict[str, Callable[[Place], Argv]] = {
    "OpenSSH": lambda _: [], "dropbear": dropbear, "ProFTPD": proftpd, "rclone": rclone_of_one,
    "asyncssh": python("asyncssh"), "paramiko": python("paramiko"),
}  # fmt: skip


@contextmanager
def running(argv: Argv, port: int, log: Path, address: str = "127.0.0.1") -> Iterator[None]:
    with open(log, "ab") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    give_up = time.monotonic() + 60
    try:
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection((address, port), 5):
                break
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def serving(make: Callable[[Place], Argv], server: Server, name: str) -> Iterator[Host]:
    """A machine that has never polled, of that kind of server."""
    top = server.top / f"other-{name}"  # root's: sshd is not alone in that wish
    top.mkdir()
    for left in (server.chroot(FRESH) / "logs").iterdir():
        left.unlink()
    place = Place(server, top, server.port if name == "OpenSSH" else free_port())
    argv = make(place)
    host = Host.create(replace(server, port=place.port), top, FRESH)
    host.publish("v1")
    with ExitStack() as stack:
        if argv:
            stack.enter_context(running(argv, place.port, top / "output"))
        yield host


@pytest.mark.parametrize("name", SERVERS)
def test_a_server(name: str, server: Server) -> None:
    """An update, a poll, a download that is resumed, a report in place of the one before."""
    with serving(SERVERS[name], server, name) as host:
        assert host.client("probe").returncode == 0
        done = host.run()
        assert (done.returncode, "kept for the next run" in done.stdout) == (0, False), done.stdout
        done = host.run()
        assert done.returncode == 0 and done.stdout.startswith("up to date with release"), done.stdout
        release = host.publish("v2", bulk=BULK)
        with Line(host.server.port, cut_after=BULK // 2) as line:
            assert host.run("--port", str(line.port)).returncode == 75
        assert 0 < (host.state / f"partial/{release}.tar").stat().st_size < BULK
        done = host.run()
        assert done.returncode == 0, done.stdout
        assert host.machine.labels() == ("v2", "v2", "v2")
        row = server.status(FRESH)
        assert (row["state"], row["release"], row["problem"]) == ("up-to-date", release, None)
        assert [log.split("_")[2] for log in server.logs(FRESH)][-2:] == ["ok.log", "ok.log"]


def test_a_file_that_cannot_be_read_is_no_verdict(server: Server) -> None:
    """rclone goes by a size that it saw some minutes ago. What is not there is another matter."""
    stale = lambda place: rclone(place, "--authorized-keys", place.keys, place.chroot, cache="1h")  # noqa: E731
    with serving(stale, server, "stale") as host:
        assert host.client("probe").returncode == 0
        with open(server.chroot(FRESH) / "current.json", "ab") as file:
            file.write(b" " * 100)
        done = host.client("probe")
        assert 'read remote "/current.json" : Failure: tried again' in done.stdout, done.stdout
        (server.chroot(FRESH) / "current.json").unlink()
    with serving(SERVERS["rclone"], server, "none") as host:
        (server.chroot(FRESH) / "current.json").unlink()
        done = host.client("probe")
        assert "nothing is published for fresh" in done.stdout and "tried again" not in done.stdout, done.stdout


# --- gateways ---


def manual(title: str, language: str = "sh") -> str:
    """The block below a heading of the manual."""
    text = (UTILS / "manual.md").read_text(encoding="utf-8").partition(f"# {title}\n")[2]
    return text.partition(f"```{language}\n")[2].partition("```\n")[0]


@dataclass
class Gateways:
    """rclone's, on addresses of their own behind one name, over one storage; nothing of Bento's but what utils/ has."""

    server: Server
    top: Path
    port: int
    running: dict[str, ExitStack]

    def start(self, address: str) -> None:
        argv: Argv = [need("rclone"), "serve", "sftp", "--addr", f"{address}:{self.port}", "--key", self.server.top / "sshd/host_key"]
        argv += ["--auth-proxy", f"{UTILS}/rclone-auth-proxy {self.server.top}/fleet/hosts storage:fleet", "--dir-cache-time", "1s"]
        self.running[address] = ExitStack()
        self.running[address].enter_context(running(argv, self.port, self.top / address, address))

    def sync(self) -> None:
        """What the manual says that the server does."""
        text = manual("Gateways").replace("/home/chroot", str(self.server.top / "chroots"))
        call("bash", "-euo", "pipefail", "-c", text)

    def machine(self, name: str) -> Host:
        for left in (self.server.chroot(name) / "logs").iterdir():
            left.unlink()
        (self.top / name).mkdir()
        host = Host.create(replace(self.server, port=self.port), self.top / name, name)
        host.settings["server"] = "gateways.example"
        (host.top / "client.json").write_text(json.dumps(host.settings))
        return host


@pytest.fixture
def gateways(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateways]:
    monkeypatch.setenv("RCLONE_CONFIG", os.devnull)
    monkeypatch.setenv("RCLONE_CONFIG_STORAGE_TYPE", "alias")
    monkeypatch.setenv("RCLONE_CONFIG_STORAGE_REMOTE", str(tmp_path / "storage"))
    hosts = Path("/etc/hosts")
    before = hosts.read_text()
    hosts.write_text("127.0.0.2 gateways.example\n127.0.0.3 gateways.example\n" + before)
    found = Gateways(server, tmp_path, free_port(), {})
    with ExitStack() as stack:
        stack.callback(hosts.write_text, before)
        for address in ("127.0.0.2", "127.0.0.3"):
            found.start(address)
            stack.callback(found.running[address].close)
        yield found


def test_gateways(gateways: Gateways, server: Server) -> None:
    machines = [gateways.machine(name) for name in (FRESH, GOOD)]
    for round_, label in enumerate(("v1", "v2")):
        releases = [machine.publish(label, bulk=BULK) for machine in machines]
        gateways.sync()
        for machine, release in zip(machines, releases, strict=True):
            done = machine.run()
            assert done.returncode == 0 and machine.machine.labels() == (label,) * 3, done.stdout
            gateways.sync()
            row = server.status(machine.settings["host"])
            assert (row["state"], row["release"], row["problem"]) == ("up-to-date", release, None)
        if round_ == 0:
            gateways.running["127.0.0.2"].close()  # the other one is asked then
    wrong = machines[0].client("probe", "--identity", str(server.keys / f"bento-{GOOD}"))
    assert wrong.returncode == 75 and "it refuses this machine's key" in wrong.stdout


def test_a_host_writes_its_logs_and_nothing_else(gateways: Gateways, server: Server) -> None:
    machine = gateways.machine(FRESH)
    machine.publish("v1")
    gateways.sync()
    storage = gateways.top / "storage"
    before = snapshot(storage)
    batch = """
        -put client.json current.json
        -put client.json releases/x
        -put client.json x
        -put client.json ../good/logs/x
        -rm current.json
        -rename current.json logs/x
        -rename releases logs/releases
        -mkdir x
        -rmdir releases
        -ln -s ../good logs/good
        put client.json logs/x
        """
    argv = ["sftp", "-b", "-", "-F", os.devnull, "-P", str(gateways.port), "-i", str(server.keys / f"bento-{FRESH}")]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", f"bento-{FRESH}@127.0.0.2"]
    done = subprocess.run(argv, input=batch, cwd=machine.top, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    after = snapshot(storage)
    assert {name: what for name, what in after.items() if name in before and not name.endswith(FRESH)}.items() <= before.items()
    assert set(after) - set(before) == {f"fleet/{FRESH}/logs", f"fleet/{FRESH}/logs/x"}


LOGIN = {"user": f"bento-{FRESH}", "public_key": "AAAA"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (LOGIN, None),
        (LOGIN | {"public_key": "BBBB"}, "not the key of a host"),
        (LOGIN | {"public_key": "ssh-ed25519"}, "not the key of a host"),
        (LOGIN | {"public_key": None, "pass": "AAAA"}, "not the key of a host"),
        (LOGIN | {"user": "fresh"}, "no host's account"),
        (LOGIN | {"user": "bento-../fresh"}, "no host's account"),
        (LOGIN | {"user": f"bento-{FRESH}\n"}, "no host's account"),
        (LOGIN | {"user": "bento-gone"}, "not the key of a host"),
        (LOGIN | {"user": "bento-keyless"}, "No such file"),
        ({}, "no host's account"),
    ],
)
def test_who_is_let_in(asked: dict[str, str], says: str | None, tmp_path: Path) -> None:
    for name in (FRESH, "keyless"):
        (tmp_path / name).mkdir()
    for name in (FRESH, "gone"):
        (tmp_path / f"{name}.pub").write_text("# ssh-ed25519 BBBB\nssh-ed25519 AAAA a comment\n")
    done = subprocess.run(
        [UTILS / "rclone-auth-proxy", tmp_path, "storage:a b's"], input=json.dumps(asked), text=True, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    if says is None:
        answer = json.loads(done.stdout)
        assert (answer["type"], answer["_root"]) == ("union", "")
        assert answer["upstreams"] == f"""":combine,upstreams='""logs=storage:a b''s/{FRESH}/logs""':" "storage:a b's/{FRESH}:ro\""""
    else:
        assert (done.returncode, done.stdout) == (1, "") and says in done.stderr
