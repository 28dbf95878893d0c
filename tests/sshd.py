"""What the tests and the benchmark have in common to run a real sshd with the settings that fleet.nix makes."""

import os
import re
import signal
import socket
import subprocess
import textwrap
import time
from contextlib import suppress
from pathlib import Path


def match_block(fleet_nix: str) -> str:
    """What the module appends to sshd_config, from the generated file: what is tested is what ships."""
    found = re.search(r"extraConfig = [^\n]*''\n( *Match Group bento .*?)\n *'';", fleet_nix, re.DOTALL)
    if found is None or "${" in found[1]:
        raise ValueError("no extraConfig in fleet.nix that sshd could read")
    return textwrap.dedent(found[1])


def max_startups(fleet_nix: str, count: int) -> str:
    """What fleet.nix gives sshd for a fleet of so many hosts."""
    value = r'MaxStartups = [^"]*"\$\{toString \((\d+) \+ count\)}:(\d+):\$\{toString \((\d+) \+ count\)}"'
    found = re.search(value, fleet_nix)
    if found is None:
        raise ValueError("no MaxStartups in fleet.nix")
    return f"{int(found[1]) + count}:{found[2]}:{int(found[3]) + count}"


def command(*argv: str | Path) -> list[str | Path]:
    """How to run an sshd: with a /run of its own, for the directory that it wants there for each connection; and it ends
    with the thread that has started it, however that ends."""
    script = 'mount -t tmpfs -o mode=755 tmpfs /run && mkdir -m 755 /run/sshd && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", "setpriv", "--pdeathsig=KILL", *argv]


_held: list[socket.socket] = []


def free_port() -> int:
    """A port where nothing listens, and that no program is given, until sshd or another asks for it by its number."""
    _held.append(socket.socket())
    _held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _held[-1].bind(("", 0))
    port: int = _held[-1].getsockname()[1]
    return port


def start_sshd(directory: Path, address: str, port: int, *around: str) -> subprocess.Popen[bytes]:
    """An sshd with the `config` in that directory, started by the program `around`, as soon as it takes connections."""
    argv = command(*around, "/usr/sbin/sshd", "-D", "-f", directory / "config", "-E", directory / "log")
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection((address, port), 5):
            return process
        assert time.monotonic() < give_up and process.poll() is None, (directory / "log").read_text()
        time.sleep(0.05)


def no_penalties(sshd: str) -> str:
    """A line of sshd_config: newer ones turn an address away for what it did before, and here all have the same one."""
    line = "PerSourcePenalties no"
    tried = subprocess.run(command(sshd, "-t", "-f", os.devnull, "-o", line), capture_output=True, text=True, timeout=60)
    return "" if "Bad configuration option" in tried.stderr else line


def descendants(top: int) -> list[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [top]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def end_sshd(process: subprocess.Popen[bytes]) -> None:
    """Ends sshd, and then the connections that it leaves behind."""
    children = descendants(process.pid)
    process.terminate()
    process.wait(10)
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    give_up = time.monotonic() + 10
    while any(Path("/proc", str(pid)).exists() for pid in children) and time.monotonic() < give_up:
        time.sleep(0.05)
