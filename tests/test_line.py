"""The client over a real sshd with the Match block that `bento.py fleet` writes, and a line that fails in many ways."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from toynixos import TOY, ToyMachine, _missing, need, write_config

REPO = Path(__file__).resolve().parent.parent
HOSTS = ("line-a", "line-b")


@dataclass
class Server:
    """A fleet, its chroots and an sshd on 127.0.0.1, all below `top`."""

    top: Path
    port: int = 0
    keys: dict[str, Path] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def bento(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv: list[str | Path] = [sys.executable, REPO / "bento.py", "--fleet", self.top / "fleet", "--chroot-dir", self.top / "chroot"]
        return subprocess.run([*argv, *arguments], text=True, capture_output=True, timeout=120, check=False)

    def publish(self, host: str, label: str, **behaviour: Any) -> None:
        write_config(self.top / "fleet/hosts" / host, flake=True, host=host, label=label, **behaviour)
        done = self.bento("populate", host)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        with open(self.top / "sshd.log", "ab") as log:
            self.process = subprocess.Popen(
                [need("sshd"), "-D", "-e", "-f", self.top / "sshd_config"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.top / "sshd.log").read_text())

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(10)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def match_block(fleet_nix: str) -> str:
    """The sshd lines of a generated fleet.nix: what is tested is what ships."""
    found = re.search(r"extraConfig = [^']*''\n(.*?)\n\s*'';", fleet_nix, re.DOTALL)
    assert found is not None
    return textwrap.dedent(found[1])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if os.geteuid() != 0:
        _missing("needs root for an sshd with chroots")
    need("sshd")
    new_group = subprocess.run(["groupadd", "bento"], stderr=subprocess.DEVNULL, check=False).returncode == 0
    # sshd wants every directory above a chroot to be root's alone: /tmp is not.
    top = Path(tempfile.mkdtemp(prefix="bento-line-", dir="/var/lib"))
    top.chmod(0o755)
    here = Server(top, free_port())
    try:
        (top / "fleet/hosts").mkdir(parents=True)
        (top / "keys").mkdir()
        for host in HOSTS:
            home = top / "chroot" / host
            subprocess.run(
                ["useradd", "-r", "-g", "bento", "-d", home, "-s", "/usr/sbin/nologin", f"bento-{host}"], check=True
            )
            subprocess.run(["usermod", "-p", "*", f"bento-{host}"], check=True)
            key = top / f"id-{host}"
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host, "-f", key], check=True)
            shutil.copy(f"{key}.pub", top / "fleet/hosts" / f"{host}.pub")
            (top / "keys" / f"bento-{host}").write_text("restrict " + Path(f"{key}.pub").read_text())
            here.keys[host] = key
            write_config(top / "fleet/hosts" / host, flake=True, host=host, label="first")
        done = here.bento("fleet")
        assert done.returncode == 0, done.stderr
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", top / "host-key"], check=True)
        (top / "sshd_config").write_text(
            f"Port {here.port}\nListenAddress 127.0.0.1\nHostKey {top}/host-key\nUsePAM no\nPidFile none\n"
            f"AuthorizedKeysFile {top}/keys/%u\nSubsystem sftp internal-sftp\nLogLevel VERBOSE\n"
            + match_block((top / "fleet/fleet.nix").read_text())
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        subprocess.run([need("sshd"), "-t", "-f", top / "sshd_config"], check=True)
        done = here.bento("populate")
        assert done.returncode == 0, done.stderr
        here.start()
        yield here
        here.stop()
    finally:
        for host in HOSTS:
            subprocess.run(["userdel", f"bento-{host}"], stderr=subprocess.DEVNULL, check=False)
        if new_group:
            subprocess.run(["groupdel", "bento"], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(top)


@dataclass
class Host:
    """A toy machine whose client reaches the real sshd."""

    machine: ToyMachine
    config: Path
    settings: dict[str, Any]
    path: str

    @property
    def state(self) -> Path:
        return Path(self.settings["state_dir"])

    def set(self, **settings: Any) -> None:
        self.settings |= settings
        self.config.write_text(json.dumps(self.settings))

    def client(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-I", str(REPO / "bento_client.py"), "--config", str(self.config), *arguments]
        return self.machine.run(*argv, timeout_s=timeout_s, env={"PATH": self.path})


@pytest.fixture
def host(server: Server, tmp_path: Path) -> Host:
    # The toy's programs but for its sftp: here the line is real.
    tools = tmp_path / "bin"
    tools.mkdir()
    for program in TOY.iterdir():
        if program.name != "sftp":
            (tools / program.name).symlink_to(program)
    name = HOSTS[0]
    state = tmp_path / "state dir"
    settings = {
        "server": "127.0.0.1", "port": server.port, "host": name, "identity": str(server.keys[name]),
        "state_dir": str(state), "root": str(tmp_path / "machine"), "connect_timeout": 2, "confirm_timeout": 3,
        "activation_timeout": 20,
    }  # fmt: skip
    machine = ToyMachine.create(tmp_path / "machine", name)
    made = Host(machine, tmp_path / "client.json", settings, f"{tools}:{os.environ['PATH']}:/usr/sbin")
    made.set()
    for log in (server.top / "chroot" / name / "logs").iterdir():
        log.unlink()
    return made


class Proxy(threading.Thread):
    """Forwards one port of 127.0.0.1 to another until `limit` bytes came back; then it is silent, or hangs up."""

    def __init__(self, target: int, limit: int, *, hang_up: bool, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.target, self.limit, self.hang_up, self.pause_s = target, limit, hang_up, pause_s
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self.copy, args=(near, far, 1 << 60), daemon=True).start()
            threading.Thread(target=self.copy, args=(far, near, self.limit), daemon=True).start()

    def copy(self, source: socket.socket, sink: socket.socket, limit: int) -> None:
        done = 0
        try:
            while chunk := source.recv(min(16384, max(1, limit - done))):
                sink.sendall(chunk)
                done += len(chunk)
                if self.pause_s:
                    time.sleep(self.pause_s)
                if done >= limit:
                    if not self.hang_up:
                        time.sleep(60)
                    break
        except OSError:
            pass
        for end in (source, sink):
            end.close()


def test_whole_loop(server: Server, host: Host) -> None:
    server.publish(HOSTS[0], "loop-1", client_json=host.settings)
    done = host.client("run")
    assert (done.returncode, host.machine.labels()) == (0, ("loop-1",) * 3), done.stdout
    assert "warning: first contact with 127.0.0.1" in done.stdout
    report = json.loads((server.top / "chroot" / HOSTS[0] / "logs/status.json").read_text())
    assert report["last"]["result"] == "ok" and report["phase"] == "idle"
    logs = sorted(log.name for log in (server.top / "chroot" / HOSTS[0] / "logs").glob("*.log"))
    assert logs == [report["last"]["log"]]
    status = server.bento("status", "--json", HOSTS[0])
    assert status.returncode == 0 and json.loads(status.stdout)["hosts"][0]["state"] == "up-to-date"
    again = host.client("run")
    assert again.returncode == 0 and "up to date" in again.stdout


def sftp(server: Server, user: str, key: str, *commands: str) -> subprocess.CompletedProcess[str]:
    argv = ["sftp", "-b", "-", "-P", str(server.port), "-i", str(server.keys[key]), "-F", os.devnull]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={os.devnull}", "-o", "IdentitiesOnly=yes"]
    batch = "".join(f"{command}\n" for command in commands)
    return subprocess.run(
        [*argv, f"bento-{user}@127.0.0.1"], input=batch, text=True, capture_output=True, timeout=30, check=False
    )


@pytest.mark.parametrize(
    "command",
    [
        "put {file} current.json", "put {file} x", "put {file} releases/x", "put {file} ../{other}/logs/x",
        "rm current.json", "rename logs old", "rename current.json logs/x", "mkdir x", "mkdir logs/x", "rmdir logs",
        "ln -s / logs/x", "ln current.json logs/x", "chmod 777 logs", "chmod 666 current.json", "chown 0 logs",
        "get /etc/passwd {file}.got", "get ../{other}/current.json {file}.got", "ls ../{other}", "ls /home",
        "get /proc/self/environ {file}.got", "ls /dev/pts",
    ],
)  # fmt: skip
def test_host_is_confined(server: Server, tmp_path: Path, command: str) -> None:
    chroot = server.top / "chroot" / HOSTS[0]
    before = {path: path.lstat().st_mtime_ns for path in chroot.rglob("*") if "logs" not in path.parts}
    file = tmp_path / "file"
    file.write_text("{}")
    done = sftp(server, HOSTS[0], HOSTS[0], command.format(file=file, other=HOSTS[1]))
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert not Path(f"{file}.got").exists()
    assert {path: path.lstat().st_mtime_ns for path in chroot.rglob("*") if "logs" not in path.parts} == before
    assert not (chroot / "logs/x").exists()


def test_host_reads_and_writes_its_own(server: Server, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a log")
    done = sftp(server, HOSTS[0], HOSTS[0], f"get current.json {tmp_path}/got", f"put {tmp_path}/log logs/.x",
                "rename logs/.x logs/x", "ls -1 logs", "rm logs/x")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "got").read_text())["host"] == HOSTS[0]


def test_other_hosts_key_is_refused(server: Server) -> None:
    done = sftp(server, HOSTS[1], HOSTS[0], "ls")
    assert done.returncode == 255 and "Permission denied" in done.stderr


def test_no_shell_no_command_no_forwarding(server: Server, tmp_path: Path) -> None:
    base = ["ssh", "-p", str(server.port), "-i", str(server.keys[HOSTS[0]]), "-F", os.devnull]
    base += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={os.devnull}", "-o", "BatchMode=yes"]
    user = f"bento-{HOSTS[0]}@127.0.0.1"
    for extra in ([], ["id"], ["-tt"]):
        done = subprocess.run(
            [*base, *extra[:0], user, *extra] if extra != ["-tt"] else [*base, "-tt", user],
            text=True, capture_output=True, timeout=20, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "uid=" not in done.stdout and "$" not in done.stdout
    port = free_port()
    for forward in (["-L", f"127.0.0.1:{port}:127.0.0.1:{server.port}"], ["-R", f"{port}:127.0.0.1:{server.port}"]):
        process = subprocess.Popen(
            [*base, "-N", "-o", "ExitOnForwardFailure=yes", *forward, user],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            time.sleep(1)
            with socket.socket() as line:
                line.settimeout(3)
                if line.connect_ex(("127.0.0.1", port)) == 0:
                    with suppress(ConnectionResetError):
                        assert line.recv(16) == b""  # no banner of an sshd comes through
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def unreachable(host: Host, words: str, timeout_s: float = 40) -> None:
    """A run that cannot reach the server: exit 75, these words, and nothing has changed."""
    before = {path: path.read_bytes() for path in host.state.rglob("*") if path.is_file() and path.name != "known_hosts"}
    labels = host.machine.labels()
    done = host.client("run", timeout_s=timeout_s)
    assert done.returncode == 75, done.stdout
    assert words in done.stdout, done.stdout
    assert len(done.stdout.strip().splitlines()) == 1, done.stdout
    after = {path: path.read_bytes() for path in host.state.rglob("*") if path.is_file() and path.name != "known_hosts"}
    after = {path: data for path, data in after.items() if path.name != "lock" and "partial" not in path.parts}
    assert after == {path: data for path, data in before.items() if path.name != "lock"}
    assert host.machine.labels() == labels


def test_name_not_found(host: Host) -> None:
    host.set(server="no-such-server.invalid")
    unreachable(host, "its name cannot be resolved")


def test_connection_refused(host: Host) -> None:
    host.set(port=free_port())
    unreachable(host, "connection refused")


def test_refused_key(server: Server, host: Host) -> None:
    host.set(identity=str(server.keys[HOSTS[1]]))
    unreachable(host, "it refuses this machine's key")


def test_wrong_host_key(server: Server, host: Host, tmp_path: Path) -> None:
    other = Path(f"{server.keys[HOSTS[1]]}.pub").read_text().split()
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{server.port} {other[0]} {other[1]}\n")
    host.set(known_hosts=str(known))
    unreachable(host, "its host key is not the known one")


def test_silent_server(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host.set(port=listener.getsockname()[1])
        unreachable(host, "no answer", timeout_s=20)


def test_line_dies_after_login(server: Server, host: Host) -> None:
    proxy = Proxy(server.port, 3500, hang_up=False)
    host.set(port=proxy.port)
    unreachable(host, "no answer", timeout_s=90)


def test_dropped_download_is_resumed(server: Server, host: Host) -> None:
    big = server.top / "fleet/hosts" / HOSTS[0] / "big"
    big.write_bytes(os.urandom(3_000_000))
    try:
        server.publish(HOSTS[0], "big", client_json=host.settings)
        proxy = Proxy(server.port, 1_500_000, hang_up=True)
        host.set(port=proxy.port)
        done = host.client("run")
        assert done.returncode == 75 and "connection was lost" in done.stdout, done.stdout
        partial = next((host.state / "partial").iterdir()).stat().st_size
        assert partial > 500_000
        # What is left fits through a line that would not carry all of it.
        host.set(port=Proxy(server.port, 3_300_000 - partial, hang_up=True).port)
        done = host.client("run")
        assert (host.state / "config/big").read_bytes() == big.read_bytes(), done.stdout
    finally:
        big.unlink()


def test_report_waits_and_is_delivered_in_order(server: Server, host: Host) -> None:
    logs = server.top / "chroot" / HOSTS[0] / "logs"
    assert host.client("run").returncode == 0
    touched, go_on = host.state / "building", host.state / "go-on"
    for number in (1, 2):
        server.publish(HOSTS[0], f"wait-{number}", build_touch=str(touched), build_wait=str(go_on), client_json=host.settings)
        with subprocess.Popen(
            [sys.executable, REPO / "bento_client.py", "--config", host.config, "run"],
            env=host.machine.env() | {"PATH": host.path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            for _ in range(200):
                if touched.exists():
                    break
                time.sleep(0.05)
            server.stop()
            go_on.touch()
            _, said = process.communicate(timeout=60)
        assert process.returncode == 75 and "postponed" in said, said
        server.start()
        touched.unlink()
        go_on.unlink()
        waiting = sorted(log.name for log in (host.state / "outbox").iterdir())
        assert len(waiting) == 1 and waiting[0].endswith("_postponed.log")
        time.sleep(1)
    assert host.client("run", "--force").returncode in (0, 1)
    delivered = sorted(log.name for log in logs.glob("*.log"))
    assert [name.split("_")[2] for name in delivered if "postponed" in name] == ["postponed.log"] * 2
    assert not list((host.state / "outbox").iterdir())


def test_killed_in_the_middle_of_an_upload(server: Server, host: Host) -> None:
    """A half-uploaded file has a name that no reader takes."""
    server.publish(HOSTS[0], "upload", client_json=host.settings)
    assert host.client("run").returncode == 0
    logs = server.top / "chroot" / HOSTS[0] / "logs"
    proxy = Proxy(server.port, 5200, hang_up=True)
    host.set(port=proxy.port)
    host.client("run")
    for path in logs.iterdir():
        if path.name == "status.json":
            json.loads(path.read_text())
