"""What the tests and the benchmark have in common to run a real sshd with the settings that fleet.nix makes."""

import os
import re
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RUN_DIRECTORY = Path("/run/sshd")


def match_block(fleet_nix: str) -> str:
    """What the module appends to sshd_config, from the generated file: what is tested is what ships."""
    found = re.search(r"extraConfig = [^\n]*''\n(.*?)\n *'';", fleet_nix, re.DOTALL)
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


@contextmanager
def run_directory() -> Iterator[None]:
    """sshd wants its directory for each connection: it is made if need be, and stays while anybody else's sshd runs."""
    made = False
    with suppress(FileExistsError):
        RUN_DIRECTORY.mkdir(mode=0o755)
        made = True
    try:
        yield
    finally:
        if made and not is_running():
            with suppress(OSError):
                RUN_DIRECTORY.rmdir()


def is_running() -> bool:
    """Whether there is an sshd that sees the same files as this process: none of a container."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (path / "comm").read_text() == "sshd\n" and (path / "ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink():
                return True
    return False


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
    """Ends sshd, and then the connections that it leaves behind: userdel wants the users gone."""
    children = descendants(process.pid)
    process.terminate()
    process.wait(10)
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    give_up = time.monotonic() + 10
    while any(Path("/proc", str(pid)).exists() for pid in children) and time.monotonic() < give_up:
        time.sleep(0.05)
