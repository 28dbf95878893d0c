#!/usr/bin/env python3
"""Bento's server: publishes the configuration of each NixOS host of a fleet, and shows what became of it.

Files. In the fleet directory: hosts/NAME/ (one host's configuration, or a symlink to it), hosts/NAME.pub (its SSH
public keys), fleet.nix (written from fleet.nix.in). In the chroot directory, for each host: current.json (the
release to run; replacing it is the moment of publication), releases/ID/ and releases/ID.tar, config -> releases/ID,
and logs/, which belongs to the host: nothing there is trusted.

Exit codes: 0 done, 1 something failed (each failure on stderr) or a host needs a person, 2 usage.

Sections: constants, types, hosts and keys, releases, states of hosts, publication, builds, commands, command line.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import fcntl
import functools
import grp
import hashlib
import heapq
import html
import io
import itertools
import json
import os
import pwd
import re
import shutil
import signal
import stat
import sys
import tarfile
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import bento_client as client
from bento_client import BentoError, Current, Part, Phase, Report, Result, UsageError, format_time, one_line

CHROOT_DIR = "/home/chroot"
GCROOTS = Path("/nix/var/nix/gcroots/bento")
KEEP_RELEASES = 3
KEEP_LOGS, MAX_PRUNED = 200, 20_000
OFFLINE_AFTER_S = 2 * 3600
WATCH_PAUSE_S = 2.0
BUILD_LIMIT_S = 12 * 3600.0
# A host that keeps more than this in logs/ is named in `status`. A client keeps 20 logs there, each at most 1 MB.
MAX_LOG_FILES = 1000
MAX_LOGS_BYTES = 100 << 20
# `log` looks at so many files of a host, and shows so much of one.
MAX_LOG_ENTRIES = 100_000
MAX_LOG_BYTES = 4 << 20
LOG_END_BYTES = 4 << 10
# A host's clock that is less than this off may be a slow line.
CLOCK_TOLERANCE_S = 300.0
# So many hosts are published with the same two syncs of the disk: syncs for each would cost more than the copying.
BATCH = 256
SMALL_FILE = 128 << 10
# So much memory for what several hosts have in common. A member takes about the second of them besides its content.
COMMON_BYTES, MEMBER_BYTES = 8 << 20, 512
# Files of this size are parts of a release of their own, the largest ones if there are many.
LARGE_FILE, MAX_LARGE_FILES = 1 << 20, 100

KEY_TYPES = {
    "ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
}  # fmt: skip


# --- types ---


class Member(NamedTuple):
    """One file or directory of a release: `name` as in the archive, `path` where it is read from.

    `block` is its stretch of the archive, if that is in memory already. `copy`: where a file that hosts share is kept
    for their trees to link to, in this run.
    """

    name: str
    path: str
    is_directory: bool
    executable: bool = False
    size: int = 0
    block: bytes | None = None
    copy: str | None = None


class Common:
    """The directories that hosts link to, utils/ above all: each is walked, and its small files are read, once in a run.

    So all hosts get them as they were at one moment; what changes meanwhile is for the next run. After a build, which
    may take hours, they are read again. `branches`: what lies below such a directory, by its inode (and its ctime, for
    another directory may get the number of one that is removed) and its name in the archive. `size` in bytes. `copies`:
    a directory for links to the first host's files, if the others' may link to them.
    """

    def __init__(self) -> None:
        self.branches: dict[tuple[int, int, int, str], list[Member]] = {}
        self.size = 0
        self.copies: Path | None = None
        self.numbers = itertools.count()

    def find(self, directory: os.stat_result, name: str) -> list[Member] | None:
        return self.branches.get((directory.st_dev, directory.st_ino, directory.st_ctime_ns, name))

    def keep(self, directory: os.stat_result, name: str, members: list[Member]) -> list[Member]:
        """The same members, the small ones with their blocks, if there is room for them."""
        size = sum(MEMBER_BYTES + (m.size if m.size <= SMALL_FILE else 0) for m in members)
        if self.size + size > COMMON_BYTES:
            self.clear()
        if size > COMMON_BYTES:
            return members
        self.size += size
        members = pack_small(members)
        if self.copies is not None:
            members = [
                m._replace(copy=f"{self.copies}/{next(self.numbers)}")
                if m.block and not m.is_directory and not m.copy
                else m
                for m in members
            ]
        self.branches[directory.st_dev, directory.st_ino, directory.st_ctime_ns, name] = members
        return members

    def clear(self) -> None:
        self.branches.clear()
        self.size = 0
        with suppress(OSError):
            for copy in self.copies.iterdir() if self.copies is not None else ():
                copy.unlink()  # on a full disk it would keep the room that a failed host has given back


class Fleet:
    """Where the fleet's files lie. `chroot_dir` holds a chroot a host; `common` is of this run."""

    def __init__(self, directory: Path, chroot_dir: Path) -> None:
        self.directory, self.chroot_dir = directory, chroot_dir
        self.real, self.real_hosts = os.path.realpath(directory), os.path.realpath(directory / "hosts")
        self.common = Common()

    def host(self, name: str) -> Path:
        return self.directory / "hosts" / name

    def chroot(self, name: str) -> Path:
        return self.chroot_dir / name


class Row(NamedTuple):
    """What is known of a host. `seen_s`: seconds since 1970 on the server's clock."""

    host: str
    state: str
    offline: bool
    needs_reboot: bool
    drift: bool
    current: Current | None
    report: Report | None
    seen_s: float | None
    problem: str

    @property
    def needs_a_person(self) -> bool:
        return self.state in ("failing", "rolled-back") or self.offline or self.drift or bool(self.problem)

    @property
    def other_client(self) -> bool:
        return self.report is not None and self.report.client != client.VERSION

    @property
    def ahead_s(self) -> float | None:
        """How far the host's clock was ahead of ours when it reported. A slow line makes it look a little behind."""
        if self.report is None or self.seen_s is None:
            return None
        return client.parse_time(self.report.polled) - self.seen_s

    @property
    def since_s(self) -> float | None:
        """When the running release was done, on our clock: as long before the report came as on the host's clock."""
        last = self.report.last if self.report else None
        if self.report is None or self.seen_s is None or last is None:
            return None
        if last.result != Result.OK or last.release != self.report.release:
            return None
        age_s = client.parse_time(self.report.polled) - client.parse_time(last.finished)
        # The host's clock was set back in between: nobody knows.
        return None if age_s < -CLOCK_TOLERANCE_S else max(0.0, self.seen_s - max(0.0, age_s))


class Owner(NamedTuple):
    """The ids that a host's chroot is given to. None of it when we are not root."""

    uid: int
    gid: int


# --- hosts and keys ---


def scan_hosts(fleet: Fleet) -> list[os.DirEntry[str]]:
    """What lies in hosts/, by name, but for what is hidden. BentoError when that cannot be told: it is not nothing."""
    directory = fleet.directory / "hosts"
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise BentoError(f"{directory}: {error.strerror}: --fleet names the directory that has hosts/ in it") from None
    return [entry for entry in entries if not entry.name.startswith(".")]


def find_hosts(fleet: Fleet, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The hosts to work on, and an error for each name in hosts/ that no host can have."""
    hosts, errors = [], []
    for entry in scan_hosts(fleet):
        if entry.name.endswith(".pub") or entry.is_file(follow_symlinks=False):
            continue
        if client.HOST_NAME.fullmatch(entry.name):
            hosts.append(entry.name)
        else:
            errors.append(
                f"hosts/{one_line(entry.name)}: no host name: letters, digits, _ and -, at most 25, a letter or digit first"
            )
    known = set(hosts)
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"{one_line(name)}: no such host: there is no {fleet.host(name)}; 'bento.py add' makes one"
            )
    return ([name for name in hosts if name in wanted] if wanted else hosts), ([] if wanted else errors)


def count_hosts(number: int) -> str:
    return f"{number} host{'' if number == 1 else 's'}"


def parse_key(line: str, where: str) -> tuple[str, str, str]:
    """Type, base64 and comment of a public key line. BentoError for what sshd would not take as just a key."""
    parts = line.split(None, 2)
    if "PRIVATE KEY" in line:
        raise BentoError(f"{where}: this is a private key: delete it, make a new one, and give only the .pub here")
    if len(parts) < 2 or parts[0] not in KEY_TYPES:
        raise BentoError(
            f"{where}: no SSH public key ('ssh-ed25519 AAAA… comment', without options): {one_line(line, 40)}"
        )
    try:
        blob = base64.b64decode(parts[1], validate=True)
        if base64.b64encode(blob).decode() != parts[1]:
            raise ValueError
    except (binascii.Error, ValueError):
        raise BentoError(f"{where}: malformed SSH public key: its second word is no base64") from None
    fields = []
    while blob:
        size = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + size:
            raise BentoError(f"{where}: malformed SSH public key: it is cut short")
        fields.append(blob[4 : 4 + size])
        blob = blob[4 + size :]
    if (
        len(fields) < 2
        or fields[0] != parts[0].encode()
        or (parts[0] == "ssh-ed25519" and list(map(len, fields)) != [11, 32])
    ):
        raise BentoError(f"{where}: malformed SSH public key: it is no {parts[0]} key")
    return parts[0], parts[1], parts[2] if len(parts) > 2 else ""


def read_keys(fleet: Fleet, name: str) -> list[tuple[str, str, str]]:
    path = fleet.directory / "hosts" / f"{name}.pub"
    where = f"hosts/{name}.pub"
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BentoError(f"{where}: cannot be read: {one_line(str(error))}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            keys.append(parse_key(line.strip(), f"{where}:{number}"))
    if not keys:
        raise BentoError(f"{where}: no key in it: put the output of 'bento-client key' there")
    return keys


def check_keys(fleet: Fleet) -> tuple[dict[str, list[tuple[str, str, str]]], dict[str, str]]:
    """The keys of every hosts/NAME.pub, and why a host's cannot be used.

    A key that stands for two hosts stands for neither: whoever holds it could read the other's files.
    """
    keys: dict[str, list[tuple[str, str, str]]] = {}
    errors: dict[str, str] = {}
    owners: dict[str, str] = {}
    for file in (entry.name for entry in scan_hosts(fleet) if entry.name.endswith(".pub")):
        name = file.removesuffix(".pub")
        try:
            if not client.HOST_NAME.fullmatch(name):
                raise BentoError(f"hosts/{one_line(file)}: {one_line(name)!r} is no host name")
            keys[name] = read_keys(fleet, name)
        except BentoError as error:
            errors[name] = str(error)
    for name, own in keys.items():
        for _, blob, _ in own:
            other = owners.setdefault(blob, name)
            if other != name:
                text = f"hosts/{other}.pub and hosts/{name}.pub have the same key: each host needs its own"
                errors |= {other: text, name: text}
    return keys, errors


def nix_string(text: str) -> str:
    """A Nix string literal; control characters are dropped."""
    text = "".join(c for c in text if c.isprintable())
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${") + '"'


def format_fleet(template: str, keys: dict[str, list[tuple[str, str, str]]], chroot_dir: str) -> str:
    """fleet.nix: the template with the hosts' keys in it. The same input gives the same bytes."""
    lines = []
    for line in template.splitlines():
        if line.strip() == "@HOSTS@":
            indent = line[: len(line) - len(line.lstrip())]
            for name, own in sorted(keys.items()):
                lines += [f"{indent}{nix_string(name)} = ["]
                lines += [f"{indent}  {nix_string(' '.join(part for part in key if part))}" for key in own]
                lines += [f"{indent}];"]
        elif line.strip() in ("@GENERATED@", "# @GENERATED@"):
            lines.append("# Written by 'bento.py fleet' from fleet.nix.in and hosts/*.pub: edit those, not this file.")
        else:
            # Within quotes already, hence without those of the literal.
            lines.append(line.replace("@CHROOT_DIR@", nix_string(chroot_dir)[1:-1]))
    return "\n".join(lines) + "\n"


# --- releases ---


def list_members(fleet: Fleet, name: str) -> list[Member]:
    """Everything below hosts/NAME, symlinks followed, sorted bytewise. BentoError names what cannot be in a release."""
    top = f"{fleet.real_hosts}/{name}"
    linked = os.path.islink(top)
    if not os.path.isdir(top):
        raise BentoError(f"hosts/{name}: {'dangling link' if linked else 'not a directory'}")
    found, real = (os.stat(top), os.path.realpath(top)) if linked else (None, top)
    members = fleet.common.find(found, "") if found else None
    if members is None:
        walk = Walk(f"hosts/{name}", (f"{fleet.real}/", f"{real}/"), fleet.common)
        members = []
        everywhere = walk.enter(real, "", (real,), members)
        members.sort()  # by name, and strings compare as their UTF-8 does
        if found and everywhere:
            members = fleet.common.keep(found, "", members)
    if not any(m.name in ("flake.nix", "configuration.nix") and not m.is_directory for m in members):
        raise BentoError(f"hosts/{name}: neither flake.nix nor configuration.nix in it")
    return members


class Walk(NamedTuple):
    """Through one host's directories. `shown`: its name for a person; `bounds`: where links may lead, the fleet first."""

    shown: str
    bounds: tuple[str, str]
    common: Common

    def enter(self, directory: str, prefix: str, above: tuple[str, ...], members: list[Member]) -> bool:
        """Collects what lies in a directory; `above` are the real ones that it is in, and itself.

        Whether every host would find the same there: no link led out of the fleet's directory. There was no loop, and
        so there is none for another host: a directory that it comes from leads here, and would have been one already.
        """
        everywhere = True
        for entry in os.scandir(directory):
            if entry.name == ".git":
                continue
            name, real, linked, inside = f"{prefix}{entry.name}", entry.path, entry.is_symlink(), True
            where = f"{self.shown}/{name}"
            try:
                known_as = os.fsencode(name).decode()
            except UnicodeDecodeError:
                raise BentoError(f"{one_line(repr(where))}: the name is not UTF-8: rename it") from None
            if known_as != name:
                raise BentoError(f"{one_line(where)}: this locale is not UTF-8: run this with PYTHONUTF8=1")
            if linked:
                with suppress(OSError):  # which follow() will tell
                    if known := self.common.find(entry.stat(), name):
                        members += known
                        continue
                real = os.path.realpath(entry.path)
                if real.startswith("/nix/store/") and not f"{real}/".startswith(self.bounds):
                    continue
                inside = f"{real}/".startswith(self.bounds[0])
            found = self.follow(where, entry, real) if linked else entry.stat(follow_symlinks=False)
            if stat.S_ISREG(found.st_mode):
                members.append(Member(name, real, False, bool(found.st_mode & 0o100), found.st_size))
            elif stat.S_ISDIR(found.st_mode):
                if real in above:
                    raise BentoError(f"{one_line(where)}: link loop: it leads to a directory that it is in")
                below = [Member(name, real, True)]
                inside = self.enter(real, f"{name}/", (*above, real), below) and inside
                members += self.common.keep(found, name, below) if linked and inside else below
            else:
                raise BentoError(f"{one_line(where)}: neither a file nor a directory (a socket, FIFO or device)")
            everywhere = everywhere and inside
        return everywhere

    def follow(self, where: str, link: os.DirEntry[str], real: str) -> os.stat_result:
        try:
            found = link.stat()
        except FileNotFoundError:
            raise BentoError(f"{one_line(where)}: dangling link to {one_line(os.readlink(link))}") from None
        except OSError as error:
            raise BentoError(f"{one_line(where)}: link loop ({error.strerror})") from None
        if not f"{real}/".startswith(self.bounds):
            raise BentoError(f"{one_line(where)}: link out of the fleet directory, to {one_line(real)}")
        return found


@functools.lru_cache(maxsize=4096)
def header(name: str, size: int, is_directory: bool, executable: bool) -> bytes:
    """The tar header of a member. Hosts share most of their files through utils/, hence the cache."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uid, info.gid, info.uname, info.gname = size, 1, 0, 0, "", ""
    info.type = tarfile.DIRTYPE if is_directory else tarfile.REGTYPE
    info.mode = 0o755 if is_directory or executable else 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def read_file(path: str, limit: int) -> bytes:
    """At most `limit` bytes of a file, in half the time that open() takes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, limit)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def pack(member: Member) -> bytes:
    """What the archive has of a directory or a small file: its header, and its content, padded."""
    head = header(member.name, member.size, member.is_directory, member.executable)
    if member.is_directory:
        return head
    try:
        content = read_file(member.path, member.size + 1)
    except OSError as error:
        raise BentoError(f"{one_line(member.path)}: cannot be read: {error.strerror}") from None
    check_size(member, len(content))
    return head + content + bytes(-member.size % tarfile.BLOCKSIZE)


def pack_small(members: Sequence[Member]) -> list[Member]:
    return [m if m.block or m.size > SMALL_FILE else m._replace(block=pack(m)) for m in members]


def content_of(block: bytes, size: int) -> bytes:
    end = len(block) - -size % tarfile.BLOCKSIZE
    return block[end - size : end]


def check_size(member: Member, read: int) -> None:
    if read != member.size:
        raise BentoError(f"{one_line(member.path)}: changed while it was read: run this again")


def read_large(member: Member) -> Iterator[bytes]:
    read = 0
    try:
        with open(member.path, "rb") as file:
            while chunk := file.read(1 << 20):
                read += len(chunk)
                yield chunk
    except OSError as error:
        raise BentoError(f"{one_line(member.path)}: cannot be read: {error.strerror}") from None
    check_size(member, read)


def pass_large(member: Member, put: Callable[[bytes], None]) -> Iterator[bytes]:
    """The content of a large file, chunk by chunk; what the archive has of it is given to `put` on the way."""
    put(header(member.name, member.size, member.is_directory, member.executable))
    for chunk in read_large(member):
        put(chunk)
        yield chunk
    put(bytes(-member.size % tarfile.BLOCKSIZE))


def write_release(members: Sequence[Member], tar: BinaryIO | None = None, tree: Path | None = None) -> tuple[str, int]:
    """Reads the members once: the release's id and its size in bytes. Always the same for the same content.

    The archive's bytes go to `tar`, and the same content, as a client will unpack it, into the new directory `tree`.
    """
    digest, size = hashlib.sha256(), 0

    def put(chunk: bytes) -> None:
        nonlocal size
        size += len(chunk)
        if size > client.MAX_RELEASE_BYTES:
            raise BentoError(f"the release would exceed {client.MAX_RELEASE_BYTES} bytes: leave large files out")
        digest.update(chunk)
        if tar is not None:
            tar.write(chunk)

    if tree is not None:
        tree.mkdir(mode=0o755)
    for member in members:
        content: Iterable[bytes] = ()
        if member.size > SMALL_FILE:
            content = pass_large(member, put)
        else:
            block = member.block or pack(member)
            put(block)
            if tree is not None:
                content = (content_of(block, member.size),)
        if tree is None:
            for _ in content:
                pass
        elif member.is_directory:
            os.mkdir(f"{tree}/{member.name}", 0o755)
        else:
            write_file(f"{tree}/{member.name}", member.executable, content, member.copy)
    put(bytes(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))
    if tree is not None:
        for directory in [*[f"{tree}/{m.name}" for m in reversed(members) if m.is_directory], str(tree)]:
            os.utime(directory, (1, 1))
    return digest.hexdigest(), size


def write_file(path: str, executable: bool, content: Iterable[bytes], copy: str | None = None) -> None:
    """Writes a file of a tree, or links to its `copy`; makes that when there is none."""
    if copy is not None:
        with suppress(OSError):  # it is the first, or has as many links as it can have
            os.link(copy, path)
            return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755 if executable else 0o644)
    try:
        for chunk in content:
            while chunk:
                chunk = chunk[os.write(descriptor, chunk) :]
        os.utime(descriptor, (1, 1))
    finally:
        os.close(descriptor)
    if copy is not None:
        with suppress(OSError):
            os.link(path, copy)


# --- states of hosts ---


def judge(
    current: Current | None, report: Report | None, seen_s: float | None, now_s: float, offline_after_s: float
) -> tuple[str, bool, bool, bool]:
    """A host's state, and the flags offline, needs_reboot and drift. Every combination has exactly one state."""
    offline = seen_s is not None and now_s - seen_s > offline_after_s
    if report is None or current is None:
        return "new" if report is None else "pending", offline, report is not None and report.needs_reboot, False
    last = report.last
    drift = False
    if report.phase in (Phase.BUILDING, Phase.ACTIVATING):
        state = "building"
    elif last is None or last.release not in (current.release, None):
        state = "pending"
    elif last.release is None:
        state = "failing"
    elif last.result == Result.OK:
        state = "up-to-date"
        expected = current.system or last.system
        drift = expected is not None and report.system != expected and not report.needs_reboot
    else:
        state = "rolled-back" if last.result == Result.ROLLED_BACK else "failing"
    return state, offline, report.needs_reboot, drift


def open_logs(chroot: Path | str) -> int:
    """A descriptor of logs/, which is no link."""
    return os.open(f"{chroot}/logs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def read_untrusted(logs: int, name: str, limit: int, *, end: bool = False) -> tuple[bytes, os.stat_result]:
    """A regular file that a host wrote, at most `limit` bytes and one more of it, from its end if so wanted.

    BentoError for anything else; never blocks. `logs`: a descriptor of the directory.
    """
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=logs)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BentoError(f"logs/{name}: not a regular file ({error.strerror})") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BentoError(f"logs/{name}: not a regular file")
        return os.pread(descriptor, limit + 1, max(0, found.st_size - limit) if end else 0), found
    finally:
        os.close(descriptor)


def arrival_s(found: os.stat_result) -> float:
    """When a host's file came. A host could set the first of its times into the future, never the second. Before 1970
    is no time at all."""
    return max(0.0, min(found.st_mtime, found.st_ctime))


def read_report(chroot: Path | str, name: str) -> tuple[Report | None, float | None, str]:
    """The host's report, when it came, and what is wrong with it or with logs/."""
    try:
        logs = open_logs(chroot)
    except FileNotFoundError:
        return None, None, ""
    except OSError as error:
        return None, None, f"logs/status.json: not a regular file ({error.strerror})"
    seen_s = None
    try:
        raw, found = read_untrusted(logs, "status.json", client.MAX_JSON_BYTES)
        seen_s = arrival_s(found)
        report = client.parse_report(raw, "logs/status.json")
        if report.host != name:
            raise BentoError(f"logs/status.json: it speaks for host {report.host!r}")
        return report, seen_s, weigh_logs(logs)
    except FileNotFoundError:
        return None, None, weigh_logs(logs)
    except BentoError as error:
        return None, seen_s, one_line(str(error))
    finally:
        os.close(logs)


def weigh_logs(logs: int) -> str:
    """What to say of a host that fills its logs/. Looks at no more files than it takes to know."""
    size = 0
    with os.scandir(logs) as entries:
        for count, entry in enumerate(entries, 1):
            if count > MAX_LOG_FILES:
                return f"logs/ has more than {MAX_LOG_FILES} files: the host fills it"
            try:
                size += entry.stat(follow_symlinks=False).st_size  # a sparse file counts whole: so it does in a backup
            except FileNotFoundError:
                continue
            if size > MAX_LOGS_BYTES:
                return f"logs/ holds more than {MAX_LOGS_BYTES >> 20} MB: the host fills it"
    return ""


def read_published(chroot: Path | str, name: str) -> Current | None:
    try:
        raw = read_file(f"{chroot}/current.json", client.MAX_JSON_BYTES + 1)
        return client.parse_current(raw, f"{chroot}/current.json", name)
    except FileNotFoundError:
        return None


# What is published for a host, its report, when that came, and what is wrong: all that there is to read of a host.
Found = tuple[Current | None, Report | None, float | None, str]


def read_host(chroot: str, name: str) -> Found:
    current, problem = None, ""
    try:
        current = read_published(chroot, name)
    except (BentoError, OSError) as error:
        problem = one_line(str(error))
    report, seen_s, trouble = read_report(chroot, name)
    return current, report, seen_s, problem or trouble


Memory = dict[str, tuple[list[tuple[int, int, int, int]], Found]]


def recall_host(chroot: str, name: str, memory: Memory) -> Found:
    """read_host, if something has changed since: no host can set a ctime. A log that grew is weighed at the next report."""
    stamps = []
    for path in (f"{chroot}/current.json", f"{chroot}/logs", f"{chroot}/logs/status.json"):
        with suppress(OSError):
            found = os.lstat(path)
            stamps.append((found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size))
    if name not in memory or memory[name][0] != stamps:
        memory[name] = (stamps, read_host(chroot, name))
    return memory[name][1]


def make_row(name: str, found: Found, now_s: float, offline_after_s: float) -> Row:
    current, report, seen_s, _ = found
    return Row(name, *judge(current, report, seen_s, now_s, offline_after_s), *found)


URGENCY = {"failing": 0, "rolled-back": 1, "pending": 3, "building": 4, "new": 5, "up-to-date": 6}


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """What needs a person first."""
    return sorted(rows, key=lambda row: (not row.needs_a_person, URGENCY.get(row.state, 2), row.host))


MARKS = ("offline", "drift", "needs_reboot", "other_client")
SYMBOLS = {"failing": "✗", "rolled-back": "↶", "pending": "…", "building": "⚙", "new": "·", "up-to-date": "✓"}
COLOURS = {"failing": "31", "rolled-back": "31", "pending": "33", "building": "36", "new": "2", "up-to-date": "32"}


# Where the encoding of stdout has none of our symbols.
PLAIN = str.maketrans("✗↶…⚙·✓", "x<~*.+")


def format_table(
    rows: Sequence[Row], now_s: float, width: int, *, height: int | None = None, decorated: bool = False
) -> str:
    """The status table for `width` columns, and a summary. `decorated`: symbols and colours, for a terminal.

    Of a table that has more than `height` lines, the top and the summary.
    """
    name_width = max([4, *(len(row.host) for row in rows)])
    columns = [("HOST", name_width), ("STATE", 11), ("RUNS", 7), ("SINCE", 5), ("SEEN", 5)]
    if width >= name_width + 80:
        columns.insert(3, ("SYSTEM", 8))
    summary = textwrap.wrap(format_summary(rows), width)
    shown = rows
    if height is not None and len(rows) > height - 1 - len(summary):
        shown = rows[: max(0, height - 2 - len(summary))]
        summary.insert(0, f"({len(rows) - len(shown)} more)")
    gutter = "  " if decorated else ""
    lines = [clip((gutter + " ".join(f"{title:<{size}}" for title, size in columns) + "  NOTES").rstrip(), width)]
    for row in shown:
        cells = row_cells(row, now_s)
        text = " ".join(f"{cells[title]:<{size}}" for title, size in columns)
        line = clip(f"{text}  {'; '.join(notes(row, now_s))}".rstrip(), width - len(gutter))
        if decorated:
            colour = "31" if row.needs_a_person else COLOURS.get(row.state, "0")
            line = f"\x1b[{colour}m{SYMBOLS.get(row.state, '?')}\x1b[0m {line}"
        lines.append(line)
    return "\n".join([*lines, *summary])


def clip(line: str, width: int) -> str:
    """As much of a line as `width` cells of a terminal hold. A combining character counts as if it took one."""
    if len(line) <= width and line.isascii():
        return line
    used = kept = 0
    for index, c in enumerate(line, 1):
        used += 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if used > width:
            return line[:kept] + "…"
        if used < width:
            kept = index
    return line


def age(seconds: float) -> str:
    """How long, in at most five characters, whatever a clock says."""
    if seconds >= 2 * 365.25 * 86400:
        return f"{int(seconds / (365.25 * 86400))}y"
    return f"{seconds / 3600:.1f}h" if 6000 <= seconds < 7200 else client.duration(seconds)


def row_cells(row: Row, now_s: float) -> dict[str, str]:
    """The short texts of a row. SINCE is how long the running release has been there."""
    report = row.report
    return {
        "HOST": row.host,
        "STATE": row.state,
        "RUNS": (report.release or "-")[:7] if report else "-",
        "SYSTEM": one_line(report.system.removeprefix("/nix/store/")[:8]) if report else "-",
        "SINCE": "-" if (since_s := row.since_s) is None else age(now_s - since_s),
        "SEEN": "never" if row.seen_s is None else age(now_s - row.seen_s),
    }


def format_summary(rows: Sequence[Row]) -> str:
    counts = count_words(rows)
    words = [f"{count} {word.replace('_', ' ')}" for word, count in sorted(counts.items()) if count]
    return f"{count_hosts(len(rows))}: {', '.join(words)}" if rows else "no hosts"


def count_words(rows: Sequence[Row]) -> dict[str, int]:
    """How many hosts are in each state, and have each mark."""
    counts = dict.fromkeys((*URGENCY, *MARKS), 0)
    for row in rows:
        for word in (row.state, *(mark for mark in MARKS if getattr(row, mark))):
            counts[word] = counts.get(word, 0) + 1
    return counts


def notes(row: Row, now_s: float) -> list[str]:
    """What a person should know of a host, most important first."""
    found = [row.problem] if row.problem else []
    # Of another client, the version is told, further down.
    found += [mark.replace("_", " ") for mark in MARKS if mark != "other_client" and getattr(row, mark)]
    last = row.report.last if row.report else None
    if row.state in ("failing", "rolled-back") and last is not None:
        found.append(one_line(last.reason if last.result == row.state else f"{last.result}: {last.reason}"))
    if row.state in ("pending", "building", "new") and row.current is not None:
        found.append(f"{row.current.release[:7]} published {age(now_s - client.parse_time(row.current.published))} ago")
    elif row.current is None and not row.problem:
        found.append("nothing published")
    elif row.state == "up-to-date" and last is not None and last.reason:
        found.append(one_line(last.reason))
    if row.report is not None and row.other_client:
        found.append(f"client {row.report.client}")
    ahead_s = row.ahead_s
    if ahead_s is not None and abs(ahead_s) > CLOCK_TOLERANCE_S:
        found.append(f"clock {age(abs(ahead_s))} {'ahead' if ahead_s > 0 else 'behind'}")
    return found


def format_prometheus(rows: Sequence[Row]) -> str:
    """For node_exporter's textfile collector. A host's name is the only text in it, and has no character to escape."""
    gauges: list[tuple[str, str, list[tuple[str, float]]]] = [
        ("bento_hosts", "Hosts in each state.", []),
        ("bento_host_state", "1 for the state that a host is in.", []),
        ("bento_host_offline", "Whether a host has not been seen for too long.", []),
        ("bento_host_drift", "Whether a host runs another system than its release's.", []),
        ("bento_host_needs_reboot", "Whether a host needs a reboot.", []),
        ("bento_host_other_client", "Whether a host runs another version of the client than the server has.", []),
        ("bento_host_needs_attention", "Whether a host needs a person.", []),
        ("bento_host_last_seen_timestamp_seconds", "When a host reported last, on the server's clock.", []),
        ("bento_host_published_timestamp_seconds", "When a host's current release was published.", []),
        ("bento_host_clock_ahead_seconds", "How far a host's clock was ahead of the server's at its last report.", []),
    ]
    samples = {name: found for name, _, found in gauges}
    counts = count_words(rows)
    samples["bento_hosts"] += [(f'state="{state}"', counts[state]) for state in URGENCY]
    for row in rows:
        host = f'host="{row.host}"'
        samples["bento_host_state"] += [(f'{host},state="{state}"', row.state == state) for state in URGENCY]
        for mark in MARKS:
            samples[f"bento_host_{mark}"].append((host, getattr(row, mark)))
        samples["bento_host_needs_attention"].append((host, row.needs_a_person))
        if row.seen_s is not None:
            samples["bento_host_last_seen_timestamp_seconds"].append((host, row.seen_s))
        if row.current is not None:
            published_s = client.parse_time(row.current.published)
            samples["bento_host_published_timestamp_seconds"].append((host, published_s))
        if row.ahead_s is not None:
            samples["bento_host_clock_ahead_seconds"].append((host, round(row.ahead_s)))
    lines = []
    for name, text, found in gauges:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        lines += [f"{name}{{{labels}}} {value if isinstance(value, float) else int(value)}" for labels, value in found]
    return "\n".join(lines) + "\n"


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="{refresh_s}">
<title>Bento: {title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --bad: #c22; --wait: #a60; --good: #282; }}
@media (prefers-color-scheme: dark) {{ :root {{ --bad: #f77; --wait: #fb5; --good: #7d7; }} }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 75rem; padding: 0 .8rem; }}
h1 {{ font-size: 1.2rem; }}
nav a {{ display: inline-block; margin: .15rem .3rem .15rem 0; padding: .1rem .6rem; border: 1px solid var(--line);
  border-radius: 1rem; color: inherit; text-decoration: none; }}
nav a:first-child {{ background: #8883; font-weight: 600; }}
i:target ~ nav a:first-child {{ background: none; font-weight: inherit; }}
table {{ border-spacing: 0; width: 100%; margin-top: .8rem; }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-top: 1px solid var(--line); }}
td {{ white-space: nowrap; }} td.notes {{ white-space: normal; overflow-wrap: anywhere; }}
code {{ font-size: .9em; }}
.failing b, .rolled-back b, .mark {{ color: var(--bad); }}
.pending b, .building b, .new b {{ color: var(--wait); }}
.up-to-date b {{ color: var(--good); }}
@media (max-width: 40rem) {{
  thead {{ display: none; }} tr {{ display: block; border-top: 1px solid var(--line); padding: .4rem 0; }}
  td {{ display: inline-block; border: 0; padding: 0 .6rem 0 0; }} td.notes {{ display: block; }}
  td.since {{ display: none; }} td.seen::before {{ content: "seen "; }}
}}
.old {{ visibility: hidden; color: var(--bad); animation: old 0s {old_s}s forwards; }}
@keyframes old {{ to {{ visibility: visible; }} }}
{filters}
</style>
{targets}
<h1>{title}</h1>
<p>As of {time} on the server. <span class="old">That was a while ago: reload this page.</span></p>
<nav>{links}</nav>
<table>
<thead><tr><th>Host<th>State<th>Runs<th>Since<th>Seen<th>Notes<th>Logs</thead>
<tbody>
{rows}
</tbody>
</table>
</html>
"""


def format_html(rows: Sequence[Row], now_s: float, logs_url: str) -> str:
    """One page without scripts. The filter is the end of its address: links open the page again, with a query, so that
    a browser that loads it anew does so with the filter. Chromium then does not, hence the word about an old page.

    Every text in it is escaped. All of it is ASCII: the same page whatever the encoding of stdout.
    """
    counts = count_words(rows)
    kinds = [("all", "all", len(rows)), ("person", "needs a person", sum(row.needs_a_person for row in rows))]
    kinds += [(word, word.replace("_", " "), count) for word, count in counts.items() if count]
    filters = []
    for word, _, _ in kinds[1:]:
        filters.append(f'#{word}:target ~ nav a[href$="#{word}"] {{ background: #8883; font-weight: 600; }}')
        filters.append(f"#{word}:target ~ table tbody tr:not(.{word}) {{ display: none; }}")
    refresh_s = max(60, len(rows) // 25)  # a browser is at work for seconds on ten thousand
    page = PAGE.format(
        refresh_s=refresh_s,
        old_s=2 * refresh_s,
        title=f"{count_hosts(len(rows))}, {kinds[1][2]} for a person to look at",
        time=format_time(now_s),
        filters="\n".join(filters),
        targets="".join(f'<i id="{word}"></i>' for word, _, _ in kinds[1:]),
        links="\n".join(f'<a href="?{word}#{word}">{text} {count}</a>' for word, text, count in kinds),
        rows="\n".join(html_row(row, now_s, logs_url) for row in rows),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


def html_row(row: Row, now_s: float, logs_url: str) -> str:
    cells = {title: html.escape(text) for title, text in row_cells(row, now_s).items()}
    classes = [row.state, *(mark for mark in MARKS if getattr(row, mark)), *(["person"] if row.needs_a_person else [])]
    url = html.escape(f"{logs_url}/{row.host}/logs/")
    return (
        f'<tr class="{" ".join(classes)}"><td>{cells["HOST"]}<td><b>{SYMBOLS.get(row.state, "?")} {cells["STATE"]}</b>'
        f"<td><code>{cells['RUNS']}</code><td class=since>{cells['SINCE']}<td class=seen>{cells['SEEN']}"
        f'<td class="notes">{html.escape("; ".join(notes(row, now_s)))}<td><a href="{url}">logs</a></tr>'
    )


def format_json(rows: Sequence[Row], now_s: float) -> str:
    """A line a host. Without `indent`, which would make json.dumps ten times as slow."""
    lines = ",\n".join(json.dumps(row_json(row)) for row in rows)
    return f'{{"format": 1, "time": "{format_time(now_s)}", "hosts": [\n{lines}\n]}}\n'


def row_json(row: Row) -> dict[str, object]:
    """A host in `status --json`. Every string that a host wrote is one line of printable characters."""
    last, since_s, ahead_s = row.report.last if row.report else None, row.since_s, row.ahead_s
    published = row.current._asdict() if row.current else {}
    published.pop("parts", None)  # of no interest to whom this is for
    return {
        "host": row.host,
        "state": row.state,
        "offline": row.offline,
        "needs_reboot": row.needs_reboot,
        "drift": row.drift,
        "other_client": row.other_client,
        "published": published or None,
        "release": row.report.release if row.report else None,
        "system": row.report.system if row.report else None,
        "client": row.report.client if row.report else None,
        "phase": row.report.phase if row.report else None,
        "last": None if last is None else last._asdict() | {"reason": one_line(last.reason)},
        "since": None if since_s is None else format_time(since_s),
        "seen": None if row.seen_s is None else format_time(row.seen_s),
        "clock_ahead_s": None if ahead_s is None else round(ahead_s),
        "problem": row.problem or None,
    }


# --- publication ---


@contextmanager
def populate_lock(fleet: Fleet, *, wait: bool = False) -> Iterator[None]:
    fleet.chroot_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(fleet.chroot_dir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BentoError(f"another populate is at work in {fleet.chroot_dir}: wait for its end") from None
        yield


def find_owner(name: str) -> Owner | None:
    """Whom the host's chroot belongs to; None when we are not root. BentoError when the account is missing."""
    if os.geteuid() != 0:
        return None
    try:
        return Owner(pwd.getpwnam(f"bento-{name}").pw_uid, grp.getgrnam("bento").gr_gid)
    except KeyError as error:
        raise BentoError(
            f"the account or group {error.args[0].split(':')[-1].strip()} does not exist here: run 'bento.py fleet',"
            " include fleet.nix in this server's configuration and switch to it"
        ) from None


def prepare_chroot(chroot: Path, owner: Owner | None) -> None:
    """The directories of a host, with the owners and modes that sshd and the host need; and what a kill left is removed."""
    uid, gid = (owner.uid, owner.gid) if owner else (0, 0)
    wanted = (("", 0o750, (0, gid)), ("/releases", 0o755, (0, 0)), ("/logs", 0o750, (uid, gid)))
    for name, mode, ids in wanted:
        path = f"{chroot}{name}"
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            os.mkdir(path, mode)
            found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            raise BentoError(f"{path}: not a directory: remove it")
        if owner and (found.st_uid, found.st_gid) != ids:
            os.chown(path, *ids)
        if stat.S_IMODE(found.st_mode) != mode:
            os.chmod(path, mode)
    for left in os.listdir(chroot):
        if left.startswith("."):
            client.remove(chroot / left)


def is_whole(chroot: Path, current: Current) -> bool:
    """Whether all files of what is published are there, by their sizes."""
    release = f"{chroot}/releases/{current.release}"
    files = [(f"{release}.tar", current.size), *((f"{release}.parts/{p.sha256}", p.size) for p in current.parts)]
    try:
        whole = all(stat.S_ISREG((found := os.lstat(path)).st_mode) and found.st_size == size for path, size in files)
    except OSError:
        return False
    return whole and os.path.isdir(release)


class Staged(NamedTuple):
    """A release that lies beside the published ones, whole but not synced, not yet named: `tree` is what is built."""

    name: str
    release: str
    size: int
    tar: Path
    tree: Path
    parts: tuple[Part, ...] = ()


def stage(chroot: Path, name: str, members: Sequence[Member]) -> Staged:
    """Writes the release's tar and its tree, under names that no host asks for."""
    directory = chroot / "releases" / ".new"
    client.remove(directory)
    directory.mkdir(mode=0o755)
    try:
        with open(directory / "release.tar", "wb", 1 << 20) as file:
            os.fchmod(file.fileno(), 0o644)
            # The tree's name matters: a channel configuration that says ./. gets it into a store path.
            release, size = write_release(members, file, directory / "config")
    except BaseException:
        client.remove(directory)  # on a full disk, the first thing that is needed is room
        raise
    return Staged(name, release, size, directory / "release.tar", directory / "config")


def cut_release(staged: Staged, members: Sequence[Member]) -> tuple[Part, ...]:
    """Cuts the archive before and after each large file, for hosts that have that file already.

    Each part lies in parts/, beside the tree, under its SHA-256; a large one is a hard link to the file in the tree,
    and costs no room. A release without large files has no parts.
    """
    tree, directory = staged.tree, staged.tree.parent / "parts"
    large = sorted((m for m in members if m.size >= LARGE_FILE), key=lambda m: m.size)[-MAX_LARGE_FILES:]
    parts: list[Part] = []
    if not large:
        return ()
    directory.mkdir(mode=0o755)
    names = {member.name for member in large}
    with open(staged.tar, "rb") as file:
        position = cut = 0
        for member in members:
            position += len(header(member.name, member.size, member.is_directory, member.executable))
            if member.name in names:
                parts.append(copy_part(file, cut, position, directory))
                parts.append(Part(client.hash_file(tree / member.name), member.size))
                with suppress(FileExistsError):  # the same content twice
                    os.link(tree / member.name, directory / parts[-1].sha256)
                cut = position + member.size
            position += member.size + -member.size % tarfile.BLOCKSIZE
        parts.append(copy_part(file, cut, os.fstat(file.fileno()).st_size, directory))
    return tuple(parts)


def copy_part(archive: BinaryIO, start: int, end: int, directory: Path) -> Part:
    """Copies the bytes from `start` to `end` of an archive into a file that is named by their SHA-256."""
    digest = hashlib.sha256()
    archive.seek(start)
    with open(directory / "part", "wb") as file:
        while chunk := archive.read(min(1 << 20, end - archive.tell())):
            digest.update(chunk)
            file.write(chunk)
        os.fchmod(file.fileno(), 0o644)
    os.rename(directory / "part", directory / digest.hexdigest())
    return Part(digest.hexdigest(), end - start)


def place(chroot: Path, staged: Staged, system: str | None, before: Current | None, now_s: float) -> Current:
    """Gives the staged release its names, and writes current.json aside. No host is told yet."""
    releases = chroot / "releases"
    tar, tree = releases / f"{staged.release}.tar", releases / staged.release
    parts = releases / f"{staged.release}.parts"
    # Never earlier than the one before, even if the clock was set back: hosts with several servers compare them.
    published = format_time(now_s)
    if before is not None and before.published >= published:
        published = format_time(client.parse_time(before.published) + 1)
    os.utime(staged.tar, (client.parse_time(published),) * 2)  # for prune_releases
    client.remove(tree)
    client.remove(parts)
    os.rename(staged.tree, tree)
    os.rename(staged.tar, tar)
    if staged.parts:
        os.rename(releases / ".new/parts", parts)
    client.remove(releases / ".new")
    current = Current(staged.name, staged.release, staged.size, published, system, staged.parts)
    aside = chroot / ".current.json.new"
    aside.write_bytes(client.encode(current))
    aside.chmod(0o644)
    return current


def reveal(chroot: Path, release: str) -> None:
    """The moment of publication. Everything that current.json names is on disk by now."""
    os.rename(chroot / ".current.json.new", chroot / "current.json")
    tidy(chroot, release)


def tidy(chroot: Path, release: str) -> None:
    """What follows a publication. Done again for an unchanged host: a kill may have come between the two."""
    link, target = f"{chroot}/config", f"releases/{release}"
    try:
        done = os.readlink(link) == target
    except OSError:
        done = False
        if os.path.isdir(link):
            client.remove(Path(link))
    if not done:
        client.replace_link(Path(link), target)
    prune_releases(f"{chroot}/releases", release)


def prune_releases(releases: str, current: str) -> None:
    """Keeps the current release and the ones published just before it: a host may be fetching one of them.

    A tar has the time of its publication. One that is later than the current one's was placed, but never published.
    """
    names = os.listdir(releases)
    times = {
        name.removesuffix(".tar"): os.stat(f"{releases}/{name}").st_mtime for name in names if name.endswith(".tar")
    }
    latest = times.get(current, float("inf"))
    earlier = [release for release, when in times.items() if when < latest and os.path.isdir(f"{releases}/{release}")]
    keep = {current, *sorted(earlier, key=times.__getitem__, reverse=True)[: KEEP_RELEASES - 1]}
    for name in names:
        if name.removesuffix(".tar").removesuffix(".parts") not in keep:
            client.remove(Path(releases, name))


def prune_logs(chroot: Path) -> None:
    """Removes the oldest of what a host left beyond a generous number of logs, in several runs if it left very many."""
    with suppress(OSError), os.scandir(f"{chroot}/logs") as entries:
        names = sorted(e.name for e in itertools.islice(entries, MAX_PRUNED) if client.LOG_NAME.fullmatch(e.name))
        for name in names[:-KEEP_LOGS]:
            with suppress(OSError):  # a directory of such a name, say
                os.unlink(f"{chroot}/logs/{name}")


def prune_chroots(fleet: Fleet, hosts: Sequence[str], dry_run: bool, failures: list[str]) -> None:
    """Removes the chroots of hosts that are in hosts/ no more."""
    if not hosts:
        raise BentoError(
            f"{fleet.directory / 'hosts'}: no hosts in it: pruning would remove every chroot, so nothing was done"
        )
    for path in sorted(fleet.chroot_dir.iterdir()):
        ours = client.HOST_NAME.fullmatch(path.name) and not path.is_symlink() and (path / "releases").is_dir()
        if ours and path.name not in hosts:
            try:
                if not dry_run:
                    # Unpublish first, so that a kill in the middle never leaves a release announced and gone; releases/
                    # last, by which the next run knows it for a chroot.
                    if os.geteuid() == 0:
                        client.remove(GCROOTS / path.name)
                    for left in ("current.json", "logs", "config", ""):
                        client.remove(path / left)
            except OSError as error:  # the host is writing there, say
                failures.append(f"{path.name}: {error}")
                continue
            print(f"{path.name}: {'would remove' if dry_run else 'removed'} {path}")


# --- builds ---


def log_directory() -> Path:
    """Where the full log of each host's last check or build is kept."""
    if os.geteuid() == 0:
        return Path("/var/log/bento")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "bento"


def rebuild(action: str, tree: Path, name: str, limit_s: float) -> str | None:
    """Builds (or evaluates) a release as the host will. The system's store path after a build.

    BentoError with the end of the log when that fails or takes longer than `limit_s` seconds.
    """
    log_directory().mkdir(parents=True, exist_ok=True)
    log = client.Log(log_directory() / f"{name}.log")
    client.remove(log.path)
    link = tree.parent / "result"
    recipe = client.read_recipe(tree, name)
    argv = client.rebuild_argv(action, tree, recipe)
    with log.output() as out, client.unchanged_lock(tree / recipe.directory):
        done = client.run(argv, check=False, output=out, cwd=tree.parent, timeout=limit_s)
    if done.code != 0:
        said = [one_line(line, 400) for line in log.tail(16 << 10).splitlines()[-15:]] or [done.output]
        how = f"did not end within {limit_s:.0f} s" if done.code is None else f"exit {done.code}"
        raise BentoError(
            "\n  ".join([f"nixos-rebuild {action}: {how}; all of it is in {log.path}, which ends:", *said])
        )
    return os.path.realpath(link) if action == "build" else None


def keep_from_collection(name: str, system: str) -> None:
    """A garbage collection root, so that this server can serve the build. Only root can make one there."""
    if os.geteuid() == 0:
        GCROOTS.mkdir(parents=True, exist_ok=True)
        client.replace_link(GCROOTS / name, system)


# --- commands ---


def complain(errors: Iterable[str]) -> int:
    """Prints each failure once; the exit code that they make."""
    code = 0
    for error in errors:
        print(f"bento: error: {error}", file=sys.stderr)
        code = 1
    return code


def command_add(fleet: Fleet, name: str, key: str | None, flake: bool) -> int:
    if not client.HOST_NAME.fullmatch(name):
        raise UsageError(
            f"{one_line(name)}: no host name: letters, digits, _ and -, at most 25, a letter or digit first"
        )
    lines: list[str] = []
    if key is not None:
        try:
            text = sys.stdin.read() if key == "-" else Path(key).read_text()
        except UnicodeDecodeError:
            raise BentoError(f"{key}: not a public key: it is no text") from None
        given = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        lines = [" ".join(parse_key(line, key)).strip() for line in given]
        if not lines:
            raise BentoError(f"{key}: no key in it: put the output of 'bento-client key' there")
    host, public = fleet.host(name), fleet.directory / "hosts" / f"{name}.pub"
    if not os.path.lexists(host):
        aside = host.with_name(f".{name}.new")
        client.remove(aside)
        aside.mkdir(parents=True)
        (aside / "utils").symlink_to("../../utils")
        (aside / "configuration.nix").write_text(CONFIGURATION.replace("@HOST@", name))
        if flake:
            (aside / "flake.nix").write_text(FLAKE.replace("@HOST@", name))
        os.rename(aside, host)
        print(f"hosts/{name}/: made; put the machine's own configuration there and set the server's name")
    elif not lines:
        raise BentoError(f"hosts/{name} is there already")
    if lines:
        client.write_atomic(public, ("\n".join(lines) + "\n").encode(), 0o644)
        print(f"hosts/{name}.pub: {len(lines)} key{'s' if len(lines) > 1 else ''}")
        print("next: 'bento.py fleet', switch this server to it, 'bento.py populate'")
    else:
        print(
            f"next: 'python3 bento_client.py --host {name} key' on the machine, 'bento.py add {name} --key FILE' here"
        )
    return 0


CONFIGURATION = """\
{ ... }:
{
  imports = [
    ./utils/bento.nix
    # ./hardware-configuration.nix
  ];

  networking.hostName = "@HOST@";
  # system.stateVersion = "25.11"; # the NixOS that was installed first, which then stays

  services.bento.server = "bento.example.org";
}
"""

FLAKE = """\
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    {
      nixosConfigurations."@HOST@" = nixpkgs.lib.nixosSystem {
        system = "x86_64-linux";
        modules = [ ./configuration.nix ];
      };
    };
}
"""


def command_fleet(fleet: Fleet) -> int:
    """Writes fleet.nix. With one bad key it writes nothing: a host that were left out would be locked out."""
    keys, errors = check_keys(fleet)
    if errors:
        return complain([*dict.fromkeys(errors.values()), "fleet.nix is left as it was"])
    template = fleet.directory / "fleet.nix.in"
    if not template.exists():
        template = Path(__file__).resolve().parent / "fleet.nix.in"
    text = format_fleet(template.read_text("utf-8"), keys, str(fleet.chroot_dir)).encode()
    target = fleet.directory / "fleet.nix"
    if target.exists() and target.read_bytes() == text:
        print(f"fleet.nix: unchanged, {count_hosts(len(keys))}")
    else:
        client.write_atomic(target, text, 0o644)
        print(f"fleet.nix: written, {count_hosts(len(keys))}; include it in this server's configuration and switch")
    return 0


class Progress:
    """Says on stderr what the hosts are at: on a terminal in lines that are drawn over, elsewhere one a change."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.running: dict[str, tuple[str, float]] = {}
        self.drawn = 0
        self.due_s = time.monotonic() + 1

    def set(self, name: str, phase: str) -> None:
        self.running[name] = (phase, time.monotonic())
        if not self.live:
            print(f"{name}: {phase}", file=sys.stderr)

    def tell(self, name: str, phase: str, *, at_once: bool) -> None:
        """On a terminal only: the one host that is at work, if the whole takes more than a moment."""
        now_s = time.monotonic()
        if self.live and (at_once or now_s > self.due_s):
            self.due_s = now_s + 0.1
            self.running = {name: (phase, now_s)}
            self.draw()

    def end(self, name: str) -> None:
        self.running.pop(name, None)

    def draw(self) -> None:
        """Also clears what was drawn before, so that a result can be printed in between."""
        if not self.live:
            return
        width = shutil.get_terminal_size().columns
        lines = [
            f"{n}: {phase}, {client.duration(time.monotonic() - t)}" for n, (phase, t) in list(self.running.items())
        ]
        sys.stderr.write("\x1b[F" * self.drawn + "\x1b[J" + "".join(f"{line[: width - 1]}\n" for line in lines))
        sys.stderr.flush()
        self.drawn = len(lines)

    def clear(self) -> None:
        self.running.clear()
        self.draw()


class Attempt(NamedTuple):
    """How a build on the server goes: nixos-rebuild's action, how many at once, and for how long (seconds)."""

    action: str
    jobs: int
    limit_s: float


def command_rebuild(fleet: Fleet, wanted: Sequence[str], attempt: Attempt) -> int:
    """`check` and `build`: what the hosts will do with their releases, done here."""
    import tempfile
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    hosts, failures = find_hosts(fleet, wanted)
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="bento-") as work, ThreadPoolExecutor(max_workers=attempt.jobs) as pool:
        jobs = {pool.submit(rebuild_one, fleet, name, attempt, Path(work, name), progress): name for name in hosts}
        waiting = set(jobs)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1 if progress.live else None, return_when=FIRST_COMPLETED)
                for job in done:
                    progress.end(jobs[job])
                progress.draw()
                for result in (job.result() for job in done):
                    if isinstance(result, BentoError):
                        failures.append(str(result))
                    else:
                        print(result, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(client.children):
                client.end_group(process)
            raise
        finally:
            progress.clear()
    return complain(failures)


def rebuild_one(fleet: Fleet, name: str, attempt: Attempt, work: Path, progress: Progress) -> str | BentoError:
    """One host's check or build, from the very bytes that `populate` publishes."""
    started = time.monotonic()
    try:
        progress.set(name, "reading")
        (work / "releases").mkdir(parents=True)
        fleet.common.clear()
        staged = stage(work, name, list_members(fleet, name))
        progress.set(name, "building" if attempt.action == "build" else "checking")
        system = rebuild(attempt.action, staged.tree, name, attempt.limit_s)
        if system is not None:
            keep_from_collection(name, system)
            note_system(fleet, name, staged.release, system)
    except (BentoError, OSError) as error:
        return BentoError(f"{name}: {error}")
    took = client.duration(time.monotonic() - started)
    return f"{name}: {staged.release[:12]} {'evaluates' if system is None else system} ({took})"


def command_diff(fleet: Fleet, wanted: Sequence[str]) -> int:
    """What would change on each host between the system it reports and the one built here from its release."""
    hosts, failures = find_hosts(fleet, wanted)
    for name in hosts:
        try:
            print(f"{name}: {diff_host(fleet, name)}", flush=True)
        except (BentoError, OSError) as error:
            failures.append(f"{name}: {error}")
    return complain(failures)


def diff_host(fleet: Fleet, name: str) -> str:
    current = read_published(fleet.chroot(name), name)
    report, _, problem = read_report(fleet.chroot(name), name)
    if current is None or current.system is None:
        raise BentoError("its release was not built here: run 'bento.py build', or 'populate --build'")
    if report is None:
        raise BentoError(problem or "it has not reported a system yet")
    if report.system == current.system:
        return f"no difference, it runs {current.system}"
    for system in (report.system, current.system):
        # The first comes from the host: nothing but a store path reaches a command line.
        if not re.fullmatch(r"/nix/store/[a-z0-9]{32}-[A-Za-z0-9+._?=-]+", system) or not os.path.exists(system):
            raise BentoError(f"{one_line(system)} is not in this server's store: nothing to compare with")
    tool = ["nvd", "diff"] if shutil.which("nvd") else [*NIX, "store", "diff-closures"]
    changes = client.run([*tool, report.system, current.system], timeout=600).output
    return f"{report.system} -> {current.system}\n{changes.rstrip()}"


NIX = ["nix", "--extra-experimental-features", "nix-command flakes"]


def command_update(fleet: Fleet, name: str | None) -> int:
    """Updates the lock files of the hosts' flakes, each flake once, and says what moved. `name`: of one input."""
    hosts, failures = find_hosts(fleet, [])
    flakes: dict[str, str] = {}
    for host in hosts:
        if (fleet.host(host) / "flake.nix").exists():
            flakes.setdefault(os.path.realpath(fleet.host(host)), f"hosts/{host}")
    for directory, shown in flakes.items():
        try:
            before = read_lock(directory)
            if name is not None and name not in before and before:
                print(f"{shown}: has no input {name}")
                continue
            update_lock(directory, name)
            after = read_lock(directory)
        except BentoError as error:
            failures.append(f"{shown}: {error}")
            continue
        moved = [f"{i} {before.get(i, 'new')} -> {after[i]}" for i in sorted(after) if before.get(i) != after[i]]
        print(f"{shown}: {'; '.join(moved) or 'nothing moved'}")
    return complain(failures)


def update_lock(directory: str, name: str | None) -> None:
    """Nix 2.19 changed how the flake and the input to update are given."""
    found = re.search(r"(\d+)\.(\d+)", client.run(["nix", "--version"], timeout=60).output)
    url = f"path:{directory}"
    if found is not None and (int(found[1]), int(found[2])) >= (2, 19):
        argv = ["flake", "update", *([name] if name else []), "--flake", url]
    else:
        argv = ["flake", "lock", url, "--update-input", name] if name else ["flake", "update", url]
    client.run([*NIX, *argv], timeout=1800)


def read_lock(directory: str) -> dict[str, str]:
    """What a flake's direct inputs are locked to, in a few letters a person can compare."""
    try:
        nodes = json.loads(Path(directory, "flake.lock").read_bytes())["nodes"]
        inputs = nodes["root"].get("inputs", {})
        locked = {i: nodes[node]["locked"] for i, node in inputs.items() if isinstance(node, str)}
        return {
            i: f"{format_time(lock.get('lastModified', 0))[:10]} {(lock.get('rev') or lock.get('narHash') or '?')[:14]}"
            for i, lock in locked.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BentoError(f"{directory}/flake.lock: cannot be read: {one_line(str(error))}") from None


def note_system(fleet: Fleet, name: str, release: str, system: str) -> None:
    """Adds what was built to `current.json`, if it was built from the release that is published."""
    with suppress(OSError, BentoError):
        if read_published(fleet.chroot(name), name) is None:
            return
        with populate_lock(fleet, wait=True):  # or it would undo what populate is about to publish
            current = read_published(fleet.chroot(name), name)
            if current is not None and current.release == release and current.system != system:
                text = client.encode(current._replace(system=system))
                client.write_atomic(fleet.chroot(name) / "current.json", text, 0o644)


class Plan(NamedTuple):
    """What `populate` was asked to do with each host."""

    action: str | None  # nixos-rebuild's, that a host has to pass
    dry_run: bool
    verbose: bool


@contextmanager
def shared_copies(fleet: Fleet) -> Iterator[None]:
    """Lets the hosts' trees have in common, on disk too, the files that they share."""
    copies = fleet.chroot_dir / ".copies"
    client.remove(copies)
    with suppress(OSError):  # on a full disk, each host has its own
        copies.mkdir(mode=0o700)
        fleet.common.copies = copies
    try:
        yield
    finally:
        client.remove(copies)


def command_populate(fleet: Fleet, wanted: Sequence[str], plan: Plan, prune: bool) -> int:
    if prune and wanted:
        raise UsageError("--prune goes with the whole fleet, not with single hosts")
    hosts, failures = find_hosts(fleet, wanted)
    _, bad_keys = check_keys(fleet)
    failures += dict.fromkeys(text for name, text in bad_keys.items() if name in hosts or not wanted)
    counts = {"published": 0, "unchanged": 0}
    if os.geteuid() != 0:
        print("not root: files keep their owner; sshd serves them only when root publishes", file=sys.stderr)
    os.umask(0o022)
    with ExitStack() as stack:
        if not plan.dry_run:
            stack.enter_context(populate_lock(fleet))
            if plan.action is None:  # Nix may write to a flake.lock: a tree that is built shares nothing
                stack.enter_context(shared_copies(fleet))
        if prune and fleet.chroot_dir.is_dir():
            prune_chroots(fleet, hosts, plan.dry_run, failures)
        good = [name for name in hosts if name not in bad_keys]
        progress = Progress()
        batch = BATCH if plan.action is None else 1  # what has passed its build does not wait for the others'
        for first in range(0, len(good), batch):
            publish(fleet, good[first : first + batch], plan, counts, failures, progress)
    would = "would be " if plan.dry_run else ""
    print(
        f"{count_hosts(len(hosts))}: {counts['published']} {would}published, {counts['unchanged']} unchanged,"
        f" {len(hosts) - sum(counts.values())} failed"
    )
    return complain(failures)


def publish(
    fleet: Fleet, names: Sequence[str], plan: Plan, counts: dict[str, int], failures: list[str], progress: Progress
) -> None:
    """Publishes what is new of some hosts, with two syncs for them all. One host's failure stops no other."""
    placed: list[Current] = []
    working = {"build": "building", "dry-build": "checking"}.get(plan.action or "", "publishing")
    for name in names:
        progress.tell(name, working, at_once=plan.action is not None)
        try:
            found = prepare(fleet, name, plan, progress)
            if found is None:
                counts["unchanged"] += 1
            elif plan.dry_run:
                counts["published"] += 1
            else:
                placed.append(place(fleet.chroot(name), *found, time.time()))
        except (BentoError, OSError) as error:
            failures.append(f"{name}: {error}")
            fleet.common.clear()  # if a file has changed, the next host gets it as it is now
    if placed:
        os.sync()
    progress.clear()
    revealed: list[Current] = []
    for current in placed:
        try:
            reveal(fleet.chroot(current.host), current.release)
        except OSError as error:
            failures.append(f"{current.host}: {error}")
        else:
            revealed.append(current)
    if placed:
        os.sync()
    counts["published"] += len(revealed)
    for current in revealed:  # not before: a reader that goes away stops us here
        print(f"{current.host}: published {current.release[:12]} ({current.size} bytes)", flush=True)


def prepare(
    fleet: Fleet, name: str, plan: Plan, progress: Progress
) -> tuple[Staged, str | None, Current | None] | None:
    """Stages what is new of a host, after it passed its check. None: nothing is."""
    owner = find_owner(name)
    chroot = fleet.chroot(name)
    members = list_members(fleet, name)
    if sum(MEMBER_BYTES + m.size for m in members) <= COMMON_BYTES:
        members = pack_small(members)
    release, size = write_release(members)
    try:
        before = read_published(chroot, name)
    except BentoError as error:
        progress.clear()
        print(f"{name}: {error}: published anew", file=sys.stderr)
        before = None
    unchanged = before is not None and before.release == release and is_whole(chroot, before)
    if unchanged and (plan.action != "build" or (before is not None and before.system is not None)):
        if not plan.dry_run:
            prepare_chroot(chroot, owner)
            tidy(chroot, release)
            prune_logs(chroot)
        if plan.verbose:
            progress.clear()
            print(f"{name}: unchanged, {release[:12]}")
        return None
    if plan.dry_run:
        progress.clear()
        print(f"{name}: would publish {release[:12]} ({size} bytes)")
        return Staged(name, release, size, chroot, chroot), None, before
    prepare_chroot(chroot, owner)
    if before is not None:
        tidy(chroot, before.release)
    staged, system = stage(chroot, name, members), None
    try:
        if plan.action is not None:
            fleet.common.clear()
            system = rebuild(plan.action, staged.tree, name, BUILD_LIMIT_S)
            if system is not None:
                keep_from_collection(name, system)
            client.remove(staged.tree.parent / "result")
        if unchanged and before is not None and staged.release == before.release:
            client.write_atomic(chroot / "current.json", client.encode(before._replace(system=system)), 0o644)
            client.remove(staged.tree.parent)
            return None
        return staged._replace(parts=cut_release(staged, members)), system, before
    except BaseException:
        client.remove(staged.tree.parent)
        raise


def gather(
    fleet: Fleet, wanted: Sequence[str], offline_after_s: float, now_s: float, memory: Memory | None = None
) -> tuple[list[Row], list[str]]:
    """The table of rows that every form of `status` shows. `memory`: of the time before; only what changed is read."""
    hosts, errors = find_hosts(fleet, wanted)
    rows = []
    for name in hosts:
        chroot = f"{fleet.chroot_dir}/{name}"  # a Path takes its time, ten thousand times
        found = read_host(chroot, name) if memory is None else recall_host(chroot, name, memory)
        rows.append(make_row(name, found, now_s, offline_after_s))
    return sort_rows(rows), errors


def for_stdout(text: str) -> str:
    """The same text with plainer symbols, if the encoding of stdout has not got them all."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(PLAIN)
    return text


def command_status(
    fleet: Fleet, wanted: Sequence[str], offline_after_s: float, form: str, output: str | None, logs_url: str | None
) -> int:
    now_s = time.time()
    rows, errors = gather(fleet, wanted, offline_after_s, now_s)
    width = shutil.get_terminal_size(fallback=(200, 24)).columns
    terminal = sys.stdout.isatty() and output is None
    if form == "json":
        text = format_json(rows, now_s)
    elif form == "prometheus":
        text = format_prometheus(rows)
    elif form == "html":
        text = format_html(rows, now_s, logs_url or fleet.chroot_dir.as_uri())
    else:
        text = format_table(rows, now_s, width, decorated=terminal and "NO_COLOR" not in os.environ) + "\n"
    if output is None:
        sys.stdout.write(for_stdout(text))
        sys.stdout.flush()
    else:
        client.write_atomic(Path(output), text.encode(), 0o644)
    if not terminal:  # cron mails what is on stderr
        errors += [f"{row.host}: {row.state}: {'; '.join(notes(row, now_s))}" for row in rows if row.needs_a_person]
    return max(complain(errors), int(any(row.needs_a_person for row in rows)))


def command_watch(fleet: Fleet, wanted: Sequence[str], offline_after_s: float) -> int:
    """Shows the table and draws it again, over itself, when something has changed. Ends at Ctrl-C."""
    shown, drawn_for, memory = "", (0, 0), Memory()
    # Kept back, a change of the terminal's size is a signal that can be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    try:
        while True:
            now_s = time.time()
            rows, _ = gather(fleet, wanted, offline_after_s, now_s, memory)
            width, height = size = shutil.get_terminal_size()
            # The hosts that need a person are on top, the summary stays in sight.
            decorated = "NO_COLOR" not in os.environ
            table = format_table(rows, now_s, width, height=height - 1, decorated=decorated)
            if (table, size) != (shown, drawn_for):
                lines = for_stdout(table).splitlines()[-max(1, height - 1) :]
                sys.stdout.write("\x1b[H" if size == drawn_for else "\x1b[2J\x1b[H")
                sys.stdout.write("".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
                sys.stdout.flush()
                shown, drawn_for = table, size
            signal.sigtimedwait({signal.SIGWINCH}, WATCH_PAUSE_S)
    except KeyboardInterrupt:
        print("\r\x1b[J", end="", flush=True)  # the ^C
        return 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGWINCH})


def find_logs(logs: int, release: str | None) -> tuple[list[tuple[float, str]], bool]:
    """The newest logs, newest first, each with when it came; and whether there are files that were not looked at.

    By when they came, not by their names: those are by the host's clock, which may have been years ahead once.
    """

    def matches(entries: Iterable[os.DirEntry[str]]) -> Iterator[tuple[float, str]]:
        for entry in entries:
            if client.LOG_NAME.fullmatch(entry.name) and entry.name.split("_")[1].startswith((release or "")[:12]):
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    yield arrival_s(found), entry.name

    with os.scandir(logs) as entries:
        return heapq.nlargest(KEEP_LOGS, matches(itertools.islice(entries, MAX_LOG_ENTRIES))), next(
            entries, None
        ) is not None


def list_log(logs: int, name: str, came_s: float) -> str:
    """A log's line in the list: when by the host's clock, release, result and reason."""
    when, short, result = name.removesuffix(".log").split("_")
    line = f"{when}  {short}  {result}"
    try:
        end, _ = read_untrusted(logs, name, LOG_END_BYTES, end=True)
        last = end.decode(errors="replace").rstrip().rpartition("\n")[2]
        words = re.search(r"bento: (?:error: )?[a-z-]+: (.*)", last)
        line += f"  {one_line(words[1])}" if words else ""
    except (BentoError, OSError) as error:
        line += f"  {one_line(str(error))}"
    came = format_time(came_s)
    with suppress(ValueError):
        finished_s = client.parse_time(f"{when[:4]}-{when[4:6]}-{when[6:11]}:{when[11:13]}:{when[13:]}")
        if abs(finished_s - came_s) > CLOCK_TOLERANCE_S:
            line += f"  (came {came})"
    return line


def command_log(fleet: Fleet, name: str, show_list: bool, release: str | None) -> int:
    """What the host uploaded, made harmless for a terminal. The newest log unless asked for another."""
    find_hosts(fleet, [name])
    where = fleet.chroot(name) / "logs"
    none = f"{name}: no log{' of that release' if release else ''} in {where}: it has not reported one yet"
    try:
        logs = open_logs(fleet.chroot(name))
    except OSError:
        raise BentoError(none) from None
    try:
        found, more = find_logs(logs, release)
        if more:
            print(f"{name}: more than {MAX_LOG_ENTRIES} files in {where}: not all were looked at", file=sys.stderr)
        if not found:
            raise BentoError(none)
        if show_list:
            for came_s, log in found:
                print(list_log(logs, log, came_s))
            return 0
        raw, _ = read_untrusted(logs, found[0][1], MAX_LOG_BYTES)
    finally:
        os.close(logs)
    for line in raw[:MAX_LOG_BYTES].decode(errors="replace").splitlines():
        print("".join(c if c.isprintable() or c == "\t" else "?" for c in line))
    return 0


# --- command line ---


def add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hosts", nargs="*", metavar="NAME", help="hosts (default: all)")


def not_empty(text: str) -> str:
    """What an unset variable of a shell gives must not become the default."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bento.py", description="Publish the configurations of a fleet of NixOS machines."
    )
    parser.add_argument(
        "--fleet",
        type=not_empty,
        metavar="DIR",
        help="the directory with hosts/ (default: $BENTO_DIR, else that of bento.py)",
    )
    parser.add_argument(
        "--chroot-dir",
        type=not_empty,
        metavar="DIR",
        help=f"where to publish (default: $BENTO_CHROOT_DIR, else {CHROOT_DIR})",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the programs that are run, and unchanged hosts"
    )
    parser.add_argument("--version", action="version", version=client.VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    add = command("add", "make the directory of a new host")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--key", metavar="FILE", help="the host's public key ('-': standard input)")
    add.add_argument("--flake", action="store_true", help="a flake instead of a channel configuration")
    command("fleet", "write fleet.nix, the server's users and chroots, from hosts/*.pub")
    for name, text in (("check", "evaluate each host's configuration"), ("build", "build each host's configuration")):
        parser_ = command(name, text)
        parser_.add_argument("-j", "--jobs", type=int, default=2, metavar="N", help="so many at once (default 2)")
        parser_.add_argument("--timeout", type=float, default=BUILD_LIMIT_S, metavar="SECONDS", help="for each host")
        add_hosts(parser_)
    populate = command("populate", "publish what has changed")
    group = populate.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="only hosts whose configuration evaluates")
    group.add_argument("--build", action="store_true", help="only hosts whose configuration builds")
    populate.add_argument("--dry-run", action="store_true", help="only say what would be done")
    populate.add_argument(
        "--prune", action="store_true", help="also remove the chroots of hosts that are gone from hosts/"
    )
    add_hosts(populate)
    status = command("status", "the state of the fleet; exit code 1 when a host needs a person")
    forms = status.add_mutually_exclusive_group()
    forms.add_argument("--json", dest="form", action="store_const", const="json", help="for programs")
    forms.add_argument("--prometheus", dest="form", action="store_const", const="prometheus", help="for node_exporter")
    forms.add_argument("--html", dest="form", action="store_const", const="html", help="one page, without scripts")
    forms.add_argument("--watch", dest="form", action="store_const", const="watch", help="stay, and show what changes")
    status.add_argument("--output", type=not_empty, metavar="FILE", help="replace FILE instead of printing")
    status.add_argument("--logs-url", metavar="URL", help="where the page's links find the chroots (default: as files)")
    status.add_argument(
        "--offline-after", type=float, default=OFFLINE_AFTER_S / 3600, metavar="HOURS", help="default: 2"
    )
    add_hosts(status)
    add_hosts(command("diff", "what would change between the running and the built system"))
    update = command("update", "update the flakes' lock files, and say what moved")
    update.add_argument("input", nargs="?", metavar="INPUT", help="only this input")
    log = command("log", "what a host uploaded last")
    log.add_argument("name", metavar="NAME")
    log.add_argument("--list", action="store_true", help="list its logs: when, release, result")
    log.add_argument("--release", metavar="ID", help="the newest log of that release")
    return parser


def dispatch(options: argparse.Namespace, fleet: Fleet) -> int:
    command: str = options.command
    if command == "add":
        return command_add(fleet, options.name, options.key, options.flake)
    if command == "fleet":
        return command_fleet(fleet)
    if command in ("check", "build"):
        action = "dry-build" if command == "check" else "build"
        return command_rebuild(fleet, options.hosts, Attempt(action, max(1, options.jobs), options.timeout))
    if command == "diff":
        return command_diff(fleet, options.hosts)
    if command == "update":
        return command_update(fleet, options.input)
    if command == "populate":
        action_wanted = "dry-build" if options.check else "build" if options.build else None
        return command_populate(
            fleet, options.hosts, Plan(action_wanted, options.dry_run, options.verbose), options.prune
        )
    if command == "status":
        after_s = options.offline_after * 3600
        if options.output is not None and Path(options.output).is_dir():
            raise UsageError(f"--output {options.output}: this is a directory: name a file")
        if options.form == "watch":
            if options.output is not None:
                raise UsageError("--output goes with a status that ends, not with --watch")
            return command_watch(fleet, options.hosts, after_s)
        return command_status(fleet, options.hosts, after_s, options.form or "table", options.output, options.logs_url)
    return command_log(fleet, options.name, options.list, options.release)


def main(argv: Sequence[str] | None = None) -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # as Ctrl-C does, it is to end what we have started, too
            signal.signal(number, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of what a host wrote, the terminal shows what it can
    options = make_parser().parse_args(argv)
    client.verbose = options.verbose
    directory = options.fleet or os.environ.get("BENTO_DIR") or Path(__file__).resolve().parent
    chroot_dir = options.chroot_dir or os.environ.get("BENTO_CHROOT_DIR") or CHROOT_DIR
    try:
        code = dispatch(options, Fleet(Path(directory).absolute(), Path(chroot_dir).absolute()))
        sys.stdout.flush()
        return code
    except BentoError as error:
        print(f"bento: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        print(f"bento: error: {error.filename or 'system'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bento: error: interrupted; nothing partial is published", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
