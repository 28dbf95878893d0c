"""A fleet directory, and bento.py at work on it in the tests' own process: what the tests of the server have in common."""

import base64
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toynixos import need, told, write_config

import bento
import bento_client as client
from bento_client import Current

REPO = Path(bento.__file__).resolve().parent
# Example keys: 32 bytes of text where a key would be. Nobody has the other half.
KEY_HEAD = b"\0\0\0\x0bssh-ed25519\0\0\0\x20"
# What the tests do as root is done as anybody else would: root would be asked for the hosts' accounts.
AS_ANYBODY = "import os, sys; os.geteuid = lambda: 1000; import bento; sys.exit(bento.main())"
NOT_ROOT = "not root: files keep their owner; sshd serves them only when root publishes"
NOW_S = 1_800_000_000.0
CONFIGURATION: dict[str, str | bytes] = {"configuration.nix": "{ }\n"}


def key(name: str, comment: str = "") -> str:
    blob = base64.b64encode(KEY_HEAD + f"EXAMPLE OF {name}".ljust(32, ".")[:32].encode()).decode()
    return f"ssh-ed25519 {blob} {comment}".strip()


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr, without those that are there whenever we are not root, or there is no Git."""
        return [line for line in self.err.splitlines() if line != NOT_ROOT and ": no Git here: " not in line]


class Site:
    """A fleet directory and a chroot directory, and bento.py at work on them in this process."""

    def __init__(self, top: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.top, self.fleet, self.chroots = top, top / "fleet", top / "chroot"
        self.capsys = capsys
        (self.fleet / "hosts").mkdir(parents=True)

    def host(self, name: str, files: Mapping[str, str | bytes] = CONFIGURATION) -> Path:
        directory = self.fleet / "hosts" / name
        for file, content in files.items():
            path = directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return directory

    def argv(self, *arguments: str) -> list[str]:
        return ["--fleet", str(self.fleet), "--chroot-dir", str(self.chroots), *arguments]

    def run(self, *arguments: str) -> Ran:
        self.capsys.readouterr()
        try:
            code = bento.main(self.argv(*arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capsys.readouterr()
        told.append(f"$ bento.py {shlex.join(arguments)}\n{out}{err}exit {code}")
        return Ran(code, out, err)

    def publish(self, *arguments: str) -> Ran:
        ran = self.run("populate", *arguments)
        assert (ran.code, ran.errors) == (0, []), ran.err
        return ran

    def current(self, name: str = "a") -> Current:
        return client.parse_current((self.chroots / name / "current.json").read_bytes(), "current.json", name)

    def tar(self, name: str = "a") -> Path:
        return self.chroots / name / "releases" / f"{self.current(name).release}.tar"

    def tree(self, name: str = "a") -> Path:
        """What is published for a host, unpacked."""
        target = self.top / "trees" / self.current(name).release
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            client.unpack(self.tar(name), target)
        return target

    def write_report(self, name: str = "a", **changes: Any) -> Path:
        logs = self.chroots / name / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        path = logs / "status.json"
        polled = client.format_time(time.time())
        path.write_text(json.dumps(report_data(host=name, polled=polled) | changes))
        return path


def attempts(ran: Ran) -> list[str]:
    """Of `log --list`, without what was published."""
    return [line for line in ran.out.splitlines() if not re.search(r"^\S+  \S+  published", line)]


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def report_data(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1, "host": "a", "client": client.VERSION, "polled": "2026-11-23T10:15:02Z", "phase": "idle",
        "release": None, "system": "/nix/store/x", "needs_reboot": False, "last": None,
    } | changes  # fmt: skip


def last_data(release: str | None, result: str = "ok", reason: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "release": release, "result": result, "reason": reason, "system": "/nix/store/x", "attempt": 1,
        "started": "2026-11-23T10:14:02Z", "finished": "2026-11-23T10:15:02Z",
        "log": "20261123T101502Z_9f3a61c07be4_ok.log",
    } | changes  # fmt: skip


def snapshot(directory: Path) -> dict[str, tuple[int, ...]]:
    """Everything below a directory that changes when something is touched, replaced or given to somebody."""
    found: dict[str, tuple[int, ...]] = {}
    for parent, names, files in os.walk(directory):
        for name in ["", *names, *files]:
            path = os.path.join(parent, name)
            s = os.lstat(path)
            found[path] = (s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_mode, s.st_uid, s.st_gid)
    return found


def sha256sum(path: Path) -> str:
    return subprocess.run([need("sha256sum"), path], check=True, capture_output=True, text=True).stdout.split()[0]


def check_chroot(chroot: Path, known: set[str] | None = None) -> str:
    """Asserts that what is published there is whole; its release."""
    current = client.parse_current((chroot / "current.json").read_bytes(), "current.json", chroot.name)
    tar = chroot / "releases" / f"{current.release}.tar"
    assert hashlib.sha256(tar.read_bytes()).hexdigest() == current.release
    assert tar.stat().st_size == current.size
    check_archive(tar)
    assert known is None or current.release in known
    return current.release


def check_archive(tar: Path) -> None:
    """Asserts that an archive is read to its end by somebody who knows nothing of Bento."""
    with tarfile.open(tar) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            assert member.isdir() or (content is not None and len(content.read()) == member.size)


def check_tidy(chroot: Path, releases: set[str]) -> None:
    """Asserts that there is nothing in a chroot but what has to be."""
    assert set(os.listdir(chroot)) == {"current.json", "releases", "history", "logs"}
    assert set(os.listdir(chroot / "releases")) == {f"{release}.tar" for release in releases}


def share(site: Site, *names: str) -> Path:
    """Hosts that link to the same utils/, and one more that is a link to the first."""
    utils = site.fleet / "utils"
    (utils / "sub").mkdir(parents=True)
    (utils / "bento.nix").write_text("{ }\n")
    (utils / "sub/script").write_text("#!/bin/sh\n")
    (utils / "sub/script").chmod(0o755)
    for name in names:
        (site.host(name, {"configuration.nix": f"{{ }} # {name}\n"}) / "utils").symlink_to("../../utils")
    for name in ("like-1", "like-2"):
        (site.fleet / "hosts" / name).symlink_to(names[0])
    return utils


def inodes(site: Site, name: str, *hosts: str) -> set[int]:
    """What a file of the current releases is on disk."""
    return {(site.chroots / host / f"releases/{site.current(host).release}{name}").stat().st_ino for host in hosts}


def bind_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


LARGE = bento.LARGE_FILE


def check_parts(site: Site) -> list[int]:
    """Asserts that the parts of the published release are its archive; their sizes."""
    current = site.current()
    directory = site.tar().with_suffix(".parts")
    contents = [(directory / part.sha256).read_bytes() for part in current.parts]
    assert b"".join(contents) == site.tar().read_bytes()
    assert [(hashlib.sha256(c).hexdigest(), len(c)) for c in contents] == [(p.sha256, p.size) for p in current.parts]
    assert set(os.listdir(directory)) == {part.sha256 for part in current.parts}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in directory.iterdir())
    return [part.size for part in current.parts]


def toy_host(site: Site, name: str, *, flake: bool = True, **behaviour: Any) -> Path:
    return write_config(site.fleet / "hosts" / name, flake=flake, host=name, client=None, **behaviour)


def build_as_the_host(site: Site, name: str, work: Path) -> str:
    """The system that a host builds from what is published for it."""
    work.mkdir()
    client.unpack(site.tar(name), work / "config")
    settings = client.Settings(server=("s",), host=name, state_dir=str(work))
    done = subprocess.run(client.build_argv(settings, work / "config", site.current(name).commit), cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return os.path.realpath(work / "result")


RELEASE, OTHER = "a" * 64, "b" * 64


def git(where: Path, *words: str, **environment: str) -> str:
    argv = [need("git"), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always", "-C", str(where)]
    env = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull} | environment
    return subprocess.run([*argv, *words], env=env, check=True, capture_output=True, text=True).stdout


def commit(where: Path, message: str = "first") -> None:
    if not (where / ".git").exists():
        git(where, "init", "-q", "-b", "main")
    git(where, "add", "-A")
    git(where, "commit", "-q", "-m", message)


def names(site: Site, name: str = "a") -> list[str]:
    with tarfile.open(site.tar(name)) as archive:
        return archive.getnames()


def write_key(site: Site, name: str = "b") -> Path:
    (site.top / "key").write_text(f"{key(name)}\n")
    return site.top / "key"


def run_outside(site: Site, *words: str, shell: str = 'exec "$@"', **env: str) -> subprocess.CompletedProcess[str]:
    """bento.py as a process of its own, started by a shell."""
    argv = ["bash", "-c", shell, "bash", sys.executable, "-c", AS_ANYBODY, *site.argv(*words)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""} | env
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
