#!/usr/bin/env python3
"""Bento's server: publishes the configuration of each NixOS host of a fleet, and shows what became of it.

Files. In the fleet directory: hosts/NAME/ (one host's configuration, or a symlink to it), hosts/NAME.pub (its SSH
public keys), hosts/NAME.sig (what the administrator signed for it), hosts/NAME.absent (why it is away), hosts/waves (the
order of a roll-out), fleet.nix (written from fleet.nix.in). In the chroot directory, for each host: current.json (the
release to run; replacing it is the moment of publication), releases/ID/, ID.tar and ID.parts/, config -> releases/ID,
history, and logs/, which belongs to the host: nothing there is trusted. Beside the chroots: .store/, which has each
release once, for the chroots to link to; .rollout.json; and .lock, which also says what could not be published.

Exit codes: 0 done, 1 something failed (each failure on stderr) or a host needs a person, 2 usage.

Sections: constants, types, hosts and keys, work trees, releases, states of hosts, waves, publication, signatures,
builds, commands, command line.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import errno
import fcntl
import fnmatch
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
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import traceback
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import bento_client as client
from bento_client import (
    BentoError,
    Current,
    Last,
    Part,
    Phase,
    Recipe,
    Report,
    Result,
    UsageError,
    format_time,
    one_line,
)

CHROOT_DIR = "/home/chroot"
GCROOTS = Path("/nix/var/nix/gcroots/bento")
KEEP_RELEASES = 3
KEEP_LOGS, MAX_PRUNED = 200, 20_000
OFFLINE_AFTER_S = 2 * 3600
# So many polls may be missed, and a host may ask for so much patience.
MISSED_POLLS, LONGEST_SILENCE_S = 3, 31 * 86400
# A build that takes longer does not end.
STUCK_AFTER_S = 12 * 3600
SHOWN_ATTEMPTS = 20
# Of a page: so many hosts are named at its top; with more than that in all, marks that are alike are one.
SHOWN_PERSONS, MANY_HOSTS = 30, 1000
# So many logs are opened for a page, to say why an attempt failed.
MAX_REASONS = 2000
FULL_DISK_BYTES = 1 << 20
# The same key as long as it lasts; its words tell since when.
SILENCE = "all hosts are silent"
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
# So much memory for small files that hosts share. A member takes about the second of them besides its content.
MEMORY_BYTES, MEMBER_BYTES = 8 << 20, 512
# So many different directories that hosts share are remembered; usually there is one.
MAX_SHARED = 16
MAX_WAVES_BYTES = 1 << 20
# Of names that belong together, so many are shown.
SHOWN = 5
# So much of a revision is shown in the table.
REVISION_WIDTH = 30
KEEP_HISTORY, MAX_HISTORY_BYTES, LAST_HISTORY_BYTES = 1000, 1 << 20, 4 << 10
CHROOT_NAMES = {"current.json", "config", "releases", "history", "logs"}
RELEASE_NAME = re.compile(r"[0-9a-f]{64}(\.tar|\.parts)?")
# The first version of the client that heeds a bento.json.
RECIPE_SINCE = (1, 1)
# Where NixOS keeps the keys of its accounts.
AUTHORIZED_KEYS = Path("/etc/ssh/authorized_keys.d")
# Files of this size are parts of a release of their own, the largest ones if there are many.
LARGE_FILE, MAX_LARGE_FILES = 1 << 20, 100

KEY_BLOB = re.compile("AAAA[A-Za-z0-9+/]+")
KEY_TYPES = {
    "ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
}  # fmt: skip


# --- types ---


class Member(NamedTuple):
    """One file or directory of a release: `name` as in the archive, `path` where it is read from.

    `block` is its stretch of the archive, if that is in memory already.
    """

    name: str
    path: str
    is_directory: bool
    executable: bool = False
    size: int = 0
    block: bytes | None = None


class Release(NamedTuple):
    """What is to be published, and its name: the SHA-256 of its archive of `size` bytes."""

    id: str
    size: int
    members: Sequence[Member]


class Entry(NamedTuple):
    """What a directory has that belongs to a release. `place` is where it lies, `path` where it leads.

    `kept`: also when nothing below it belongs to a release.
    """

    name: str
    place: str
    path: str
    is_directory: bool
    executable: bool
    size: int
    linked: bool
    kept: bool


class WorkTree(NamedTuple):
    """What Git knows of a work tree. `files` are tracked, submodules among them, and lie in `directories`.

    `others` are neither tracked nor ignored; a directory with nothing else in it stands for all of it, with a slash.
    """

    root: str
    files: frozenset[str]
    directories: frozenset[str]
    others: frozenset[str]

    def name(self, path: str) -> str:
        """What Git calls a path."""
        return path[len(self.root.rstrip("/")) + 1 :]


class Fleet:
    """Where the fleet's files lie. `chroot_dir` holds a chroot a host; `named`: by the command line, not by default."""

    def __init__(self, directory: Path, chroot_dir: Path, *, named: bool = False) -> None:
        self.directory, self.chroot_dir, self.named = directory, chroot_dir, named
        self.real, self.real_hosts = os.path.realpath(directory), os.path.realpath(directory / "hosts")
        self.source = Source(self.real, self.real_hosts)

    def host(self, name: str) -> Path:
        return self.directory / "hosts" / name

    def chroot(self, name: str) -> Path:
        return self.chroot_dir / name


class Refusal(NamedTuple):
    """Why a host's configuration is not published: since when, how often it was tried, and the last error."""

    since: str
    times: int
    error: str


class Beside(NamedTuple):
    """What the server itself knows of hosts, besides their chroots: which are acknowledged as `absent`, which
    configurations are not published, and which wait for other hosts. Each with words for a person."""

    absent: dict[str, str]
    refused: dict[str, Refusal]
    held: dict[tuple[str, str], str]  # by the release that is published, too: it may have got another since


NOTHING_BESIDE = Beside({}, {}, {})


class Attempt(NamedTuple):
    """A log's name, taken apart: how one attempt ended, and when by the host's clock. `release`: twelve letters of it."""

    name: str
    finished: str
    release: str
    result: str


class Found(NamedTuple):
    """All that there is to read of a host: what is published for it, its report, when that came, and what is wrong.

    `logs`: the newest ones' names, oldest first. `unreadable`: what is wrong keeps us from knowing how it is.
    """

    current: Current | None
    report: Report | None
    seen_s: float | None
    problem: str
    logs: tuple[str, ...] = ()
    unreadable: bool = False


# What a person is needed for, most important first.
REASONS = (
    "offline", "problem", "failed", "stuck", "failed_units", "two_machines", "drift", "not_published", "expired",
)  # fmt: skip


class Row(NamedTuple):
    """What is known of a host. `seen_s`: seconds since 1970 on the server's clock. `expired`: what is published for it is
    signed, for a time that is over. `stuck`: it has been building for longer than any build takes. `held`: since when, and
    whom it waits for."""

    host: str
    state: str
    offline: bool
    needs_reboot: bool
    drift: bool
    current: Current | None
    report: Report | None
    seen_s: float | None
    problem: str
    expired: bool = False
    paused: bool = False
    stuck: bool = False
    absence: str = ""
    refusal: Refusal | None = None
    held: str = ""
    logs: tuple[str, ...] = ()

    @property
    def reasons(self) -> list[str]:
        """Which of REASONS hold. A host that is known to be away needs nobody."""
        return [] if self.offline and self.absent else [flag for flag in REASONS if getattr(self, flag)]

    @property
    def needs_a_person(self) -> bool:
        return bool(self.reasons)

    @property
    def failed(self) -> bool:
        return self.state in ("failing", "rolled-back")

    @property
    def failed_units(self) -> bool:
        return self.report is not None and bool(self.report.failed_units)

    @property
    def absent(self) -> bool:
        return bool(self.absence)

    @property
    def not_published(self) -> bool:
        return self.refusal is not None

    @property
    def other_client(self) -> bool:
        return self.report is not None and self.report.client != client.VERSION

    @property
    def two_machines(self) -> bool:
        """Whether the machine that reported last has seen another one report under this name."""
        return self.report is not None and self.report.twin is not None

    @property
    def revision(self) -> str | None:
        """Of the release that the host runs: as it was published, else as the host says."""
        if self.report is None or self.report.release is None:
            return None
        same = self.current is not None and self.current.release == self.report.release
        return self.current.revision if same and self.current is not None else self.report.revision

    @property
    def published_s(self) -> float | None:
        return client.parse_time(self.current.published) if self.current is not None else None

    @property
    def ahead_s(self) -> int | None:
        """How far the host's clock was ahead of ours when it reported. A slow line makes it look a little behind."""
        if self.report is None or self.seen_s is None:
            return None
        return round(client.parse_time(self.report.polled) - self.seen_s)

    def ours_s(self, when: str) -> float | None:
        """A time of the host's, on our clock: as long before its report came as on its own clock."""
        if self.report is None or self.seen_s is None:
            return None
        age_s = client.parse_time(self.report.polled) - client.parse_time(when)
        # The host's clock was set back in between: nobody knows.
        return None if age_s < -CLOCK_TOLERANCE_S else max(0.0, self.seen_s - max(0.0, age_s))

    @property
    def attempts(self) -> list[Attempt]:
        """The newest ones that the host has uploaded, oldest first."""
        return [found for name in self.logs if (found := parse_log_name(name)) is not None]

    @property
    def tries(self) -> int:
        """How often the release was tried that the host fails to run."""
        last = self.report.last if self.report else None
        return last.attempt if last is not None and self.failed else 0

    @property
    def since_s(self) -> float | None:
        """Since when the host is in its state, on our clock, as far as anybody knows."""
        report, last = self.report, self.report.last if self.report else None
        if self.state in ("new", "pending", "held"):
            return self.published_s
        if report is None or last is None or self.state in ("building", "left", "unknown"):
            return self.ours_s(report.since) if report is not None and report.since is not None else None
        return self.ours_s(first_failure(last, self.attempts) if self.failed else last.finished)


class Failure(NamedTuple):
    """What went wrong for one host."""

    host: str
    text: str


class Plan(NamedTuple):
    """What is to be done with each host. `action`: nixos-rebuild's, that it has to pass; `limit_s`: in so long. `after`: a
    command that gets each system that was built."""

    action: str | None
    publish: bool = True
    dry_run: bool = False
    jobs: int = 1
    limit_s: float = BUILD_LIMIT_S
    wait: bool = False
    as_json: bool = False
    revision: str | None = None
    after: tuple[str, ...] = ()
    now: bool = False


class Job(NamedTuple):
    """What there is to do for one host. `before` is what is published, and `unchanged` when that is its release."""

    name: str
    release: Release
    owner: tuple[int, int] | None
    before: Current | None
    unchanged: bool
    revision: str | None
    signature: Signature | None = None


# --- hosts and keys ---

NO_HOST_NAME = "no host name: letters, digits, _ and -, at most 25, a letter or digit first"


def read_limited(path: Path, limit: int) -> bytes:
    """A file's content. BentoError when it is larger than can be."""
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BentoError(f"{path}: larger than {limit} bytes")
    return data


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
        if entry.name.endswith((".pub", ".sig", ".absent")) or entry.is_file(follow_symlinks=False):
            continue
        if entry.name == "waves" and not entry.is_dir():  # a link
            continue
        if client.HOST_NAME.fullmatch(entry.name):
            hosts.append(entry.name)
        else:
            errors.append(f"hosts/{one_line(entry.name)}: {NO_HOST_NAME}")
    known = set(hosts)
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"{one_line(name)}: no such host: there is no {fleet.host(name)}; 'bento.py add' makes one"
            )
    return ([name for name in hosts if name in wanted] if wanted else hosts), ([] if wanted else errors)


def counted(number: int, what: str = "host") -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
    where = f"hosts/{name}.pub"
    try:
        lines = (fleet.directory / where).read_text("utf-8").splitlines()
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
    """The keys of the hosts in hosts/, and why a host's cannot be used.

    A key that stands for two hosts stands for neither: whoever holds it could read the other's files. But a host that
    got a new name may be known by old ones, links that lead to the new, for a while.
    """
    keys: dict[str, list[tuple[str, str, str]]] = {}
    errors: dict[str, str] = {}
    holders: dict[str, list[str]] = {}
    names = {entry.name for entry in scan_hosts(fleet)}
    for name in sorted(names):
        if f"{name}.pub" in names and client.HOST_NAME.fullmatch(name):
            try:
                keys[name] = read_keys(fleet, name)
            except BentoError as error:
                errors[name] = str(error)
    for name, own in keys.items():
        for blob in dict.fromkeys(blob for _, blob, _ in own):
            holders.setdefault(blob, []).append(name)
    for first, *others in holders.values():
        if others and not set.intersection(*(names_of(fleet, name) for name in (first, *others))) & {first, *others}:
            for other in others:
                text = f"hosts/{first}.pub and hosts/{other}.pub have the same key: each host needs its own"
                errors |= {first: text, other: text}
    return keys, errors


def names_of(fleet: Fleet, name: str) -> set[str]:
    """A host's name, and those that it leads to as a link, one after the other."""
    names = set[str]()
    with suppress(OSError):
        while name not in names and "/" not in name:
            names.add(name)
            name = os.path.normpath(os.readlink(fleet.host(name)))
    return names


def left_out_keys(fleet: Fleet) -> list[str]:
    """Keys without a host: `rm -r hosts/NAME` is meant to end what its key can do."""
    names = {entry.name for entry in scan_hosts(fleet)}
    lone = [name for name in sorted(names) if name.endswith(".pub") and name.removesuffix(".pub") not in names]
    return [
        f"hosts/{one_line(name)}: left out, there is no hosts/{one_line(name.removesuffix('.pub'))}" for name in lone
    ]


def unknown_keys(fleet: Fleet, hosts: Sequence[str]) -> list[str]:
    """Which hosts cannot log in yet: their keys are not in fleet.nix, or this server was not switched to it."""
    made, steps = fleet.directory / "fleet.nix", dict[str, list[str]]()
    for name in hosts:
        places = [("run 'bento.py fleet', and switch this server to it", made)] if made.exists() else []
        if AUTHORIZED_KEYS.is_dir():
            places.append(("switch this server to fleet.nix", AUTHORIZED_KEYS / f"bento-{name}"))
        with suppress(BentoError):  # no key, or a bad one, which is told elsewhere
            blobs = [blob for _, blob, _ in read_keys(fleet, name)] if places else []
            for step, place in places:
                known = place.read_text("utf-8", "replace") if place.exists() else ""
                if not all(blob in known for blob in blobs):
                    steps.setdefault(step, []).append(name)
                    break
    return [
        f"this server does not know the keys of {counted(len(names))} yet ({show_names(names)}): {step}"
        for step, names in steps.items()
    ]


def show_names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


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


# --- work trees ---


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


# What lies in a directory that is no work tree of Git's, and is nobody's configuration.
DROPPINGS = re.compile(r"\.git|\.jj|\.hg|\.svn|\.direnv|\.#.*|.*\.swp|.*~", re.DOTALL)


def is_work_tree(directory: str) -> bool:
    """Whether Git would take it for the top of a work tree: of a repository, a submodule, or a second work tree."""
    git_dir = f"{directory}/.git"
    with suppress(OSError):
        text = read_file(git_dir, 4096)  # of a directory it cannot be read
        if not text.startswith(b"gitdir: "):
            return False
        git_dir = os.path.join(directory, os.fsdecode(text[8:].strip()))
    parts = ("HEAD",) if os.path.exists(f"{git_dir}/commondir") else ("HEAD", "objects", "refs")
    return all(os.path.lexists(f"{git_dir}/{part}") for part in parts)


def git(root: str, *words: str, given: bytes | None = None, writing: bool = False) -> bytes:
    """What git says of a work tree, which may be anybody's, and we root: nothing that its settings name is run.

    There is no monitor, no hook and no protocol to fetch by; what reads the content of files would run its filters, and
    is only used in `writing`, without them, and as whom the repository belongs to, so that all of it stays theirs. Git
    asks whose a work tree is only when it has to find it. What a hook has set in the environment is not meant for us.
    """
    argv = ["git", f"--git-dir={root}/.git", f"--work-tree={root}", *words]
    settings = {"core.fsmonitor": "false", "core.hooksPath": "/dev/null"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_ALLOW_PROTOCOL": "none", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    if writing:
        named = git(root, "config", "--null", "--name-only", "--list").split(b"\0")
        filters = [os.fsdecode(name) for name in named if name.startswith(b"filter.")]
        settings |= {name: "false" if name.endswith(".required") else "" for name in filters}
        owner = os.stat(f"{root}/.git")
        if os.geteuid() == 0 != owner.st_uid:
            argv = ["setpriv", f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups", *argv]
            environment |= {"HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}
    environment["GIT_CONFIG_COUNT"] = str(len(settings))
    for number, (name, value) in enumerate(settings.items()):
        environment |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    if client.verbose:
        print(f"+ {shlex.join(argv)}", file=sys.stderr)
    try:
        done = subprocess.run(argv, cwd=root, env=environment, input=given, capture_output=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BentoError(f"{root}: git: {error}") from None
    if done.returncode != 0:
        said = one_line(done.stderr.decode(errors="replace")) or f"exit {done.returncode}"
        raise BentoError(f"{root}: git {words[0]}: {said}")
    return done.stdout


def read_work_tree(root: str) -> WorkTree:
    files, directories, others = set[str](), {""}, set[str]()
    words = ("-z", "-t", "--cached", "--others", "--exclude-standard", "--directory", "--no-empty-directory")
    for item in git(root, "ls-files", *words).split(b"\0")[:-1]:
        path = os.fsdecode(item[2:])
        (others if item[:1] == b"?" else files).add(path)
        while item[:1] != b"?" and (path := path.rpartition("/")[0]) not in directories:
            directories.add(path)
    return WorkTree(root, frozenset(files), frozenset(directories), frozenset(others))


def read_revision(root: str) -> str | None:
    """The commit that a work tree is at, for a person; `+`: and something else. None when there is no commit yet."""
    try:
        line = git(root, "rev-list", "--max-count=1", "--format=%h %s", "HEAD", "--").decode(errors="replace")
    except BentoError:
        return None
    commit, _, subject = line.rstrip("\n").rpartition("\n")[2].partition(" ")
    try:
        staged = git(root, "diff-index", "--cached", "--name-only", "HEAD", "--")
        listed = git(root, "ls-files", "-z", "--stage", "--debug")
        dirty = bool(staged) or any(differs(root, *found.groups()) for found in INDEXED.finditer(listed))
    except BentoError:  # what cannot be compared is something else, and keeps no host from its release
        dirty = True
    return one_line(f"{commit}{'+' if dirty else ''} {subject}", 200)


# Of a file in the index: its mode, its object, its name, when it was changed, and its size.
INDEXED = re.compile(
    rb"(\d{6}) ([0-9a-f]+) \d\t([^\0]*)\0  ctime: .*\n  mtime: (\d+:\d+)\n  dev: .*\n  uid: .*\n  size: (\d+)\t.*\n"
)


def differs(root: str, mode: bytes, blob: bytes, name: bytes, changed: bytes, size: bytes) -> bool:
    """Whether a file is another than the one in the index. A file that was touched is compared as it lies there: what
    Git's own comparison would do, run the tree's filters, is not for us."""
    path = f"{root}/{os.fsdecode(name)}"
    try:
        found = os.lstat(path)
    except OSError:
        return True
    if mode == b"160000":
        return is_work_tree(path) and git(path, "rev-parse", "HEAD").strip() != blob
    if f"{found.st_mtime_ns // 10**9}:{found.st_mtime_ns % 10**9} {found.st_size}".encode() == changed + b" " + size:
        return mode[:3] == b"100" and bool(found.st_mode & 0o100) != (mode == b"100755")
    if mode == b"120000":
        content = os.fsencode(os.readlink(path)) if stat.S_ISLNK(found.st_mode) else b""
        return git(root, "hash-object", "--stdin", given=content).strip() != blob
    if not stat.S_ISREG(found.st_mode) or bool(found.st_mode & 0o100) != (mode == b"100755"):
        return True
    return git(root, "hash-object", "--no-filters", "--", os.fsdecode(name)).strip() != blob


# --- releases ---


@functools.lru_cache(maxsize=4096)
def header(name: str, size: int, is_directory: bool, executable: bool) -> bytes:
    """The tar header of a member. Hosts share most of their files through utils/, hence the cache."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uid, info.gid, info.uname, info.gname = size, 1, 0, 0, "", ""
    info.type = tarfile.DIRTYPE if is_directory else tarfile.REGTYPE
    info.mode = 0o755 if is_directory or executable else 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


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


def too_large(members: Sequence[Member]) -> str:
    largest = heapq.nlargest(SHOWN, members, key=lambda member: member.size)
    shown = ", ".join(f"{one_line(member.name)} ({member.size} bytes)" for member in largest)
    return f"the release would exceed {client.MAX_RELEASE_BYTES} bytes: leave large files out: {shown}"


def write_release(
    members: Sequence[Member], tar: BinaryIO | None = None, tree: Path | None = None, pool: Path | None = None
) -> tuple[str, int]:
    """Reads the members once: the release's id and its size in bytes. Always the same for the same content.

    The archive's bytes go to `tar`, and the same content, as a client will unpack it, into the new directory `tree`.
    `pool`: see write_member.
    """
    digest, size = hashlib.sha256(), 0

    def put(chunk: bytes) -> None:
        nonlocal size
        size += len(chunk)
        if size > client.MAX_RELEASE_BYTES:
            raise BentoError(too_large(members))
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
            deque(content, maxlen=0)
        elif member.is_directory:
            os.mkdir(f"{tree}/{member.name}", 0o755)
        else:
            write_member(f"{tree}/{member.name}", member, content, pool)
    put(bytes(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))
    for each in [*[m.name for m in reversed(members) if m.is_directory], ""] if tree is not None else ():
        os.utime(f"{tree}/{each}", (1, 1))
    return digest.hexdigest(), size


def write_member(path: str, member: Member, content: Iterable[bytes], pool: Path | None) -> None:
    """A small file that another release of this run has, is a link to it: hosts share most of theirs, and a new file costs
    ten times as much. `pool`: a directory of them all, by the hash of what the archive has of them."""
    same = f"{pool}/{hashlib.sha256(member.block).hexdigest()}" if pool is not None and member.block else None
    with suppress(FileNotFoundError):
        if same is not None:
            link(same, path)
            return
    write_file(path, member.executable, content)
    if same is not None:
        link(path, same)


def write_file(path: str, executable: bool, content: Iterable[bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755 if executable else 0o644)
    try:
        for chunk in content:
            while chunk:
                chunk = chunk[os.write(descriptor, chunk) :]
        os.utime(descriptor, (1, 1))
    finally:
        os.close(descriptor)


class Source:
    """What this run has read: each work tree and each directory once, and small files, so that what hosts share is at
    one moment for all of them. `real` and `real_hosts`: the fleet's directories. `tops`: of a host's real directory,
    the first hosts/NAME that leads there. `left_out`: what a person should hear of, by kind.
    """

    def __init__(self, real: str, real_hosts: str) -> None:
        self.real, self.real_hosts = real, real_hosts
        self.has_git = shutil.which("git") is not None
        self.root = functools.cache(self.find_root)
        self.read_tree, self.read_revision = functools.cache(read_work_tree), functools.cache(read_revision)
        self.tops: dict[str, str] = {}
        self.left_out: dict[tuple[str, str], dict[str, None]] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets what may have changed."""
        self.listings: dict[str, list[Entry]] = {}
        self.releases: dict[str, Release] = {}
        self.blocks: dict[Member, bytes] = {}
        self.blocks_bytes = 0

    def find_root(self, directory: str) -> str | None:
        """The top of the work tree that a directory lies in; None outside of Git, and without the program."""
        if not self.has_git:
            return None
        if is_work_tree(directory):
            return directory
        return None if directory == "/" else self.root(os.path.dirname(directory))

    def work_tree(self, directory: str) -> WorkTree | None:
        root = self.root(directory)
        return None if root is None else self.read_tree(root)

    def revision(self, directory: str) -> str | None:
        root = self.root(directory)
        return None if root is None else self.read_revision(root)

    def make_known(self, *paths: Path) -> None:
        """Tells Git of new files, so that they are published. Their content is for their owner to commit."""
        for root, group in itertools.groupby(sorted(paths), lambda path: self.root(os.path.realpath(path.parent))):
            if root is not None:
                # The parent's real name: what is a link itself is known as one.
                names = [os.path.relpath(f"{os.path.realpath(path.parent)}/{path.name}", root) for path in group]
                git(root, "add", "--intent-to-add", "--force", "--", *names, writing=True)

    def called(self, path: str) -> str:
        """A path as its owner calls it."""
        for top, called in ((self.real_hosts, "hosts"), (self.real, ""), *self.tops.items()):
            if path.startswith(f"{top}/"):
                return f"{called}/{path[len(top) + 1 :]}".lstrip("/")
        return path

    def show(self, path: str) -> str:
        return one_line(self.called(path))

    def leave_out(self, kind: str, where: str, path: str) -> None:
        self.left_out.setdefault((kind, where), {})[path] = None

    def listing(self, directory: str) -> list[Entry]:
        """What of a directory belongs to a release."""
        if directory not in self.listings:
            tree, found = self.work_tree(directory), []
            for item in os.scandir(directory):
                # A fleet in the tree that its hosts link to: what it says of hosts is not part of what they are.
                ours = directory == self.real_hosts and not item.is_dir(follow_symlinks=False)
                if self.belongs(tree, item) and not ours and (entry := self.look(tree, item)) is not None:
                    found.append(entry)
            self.listings[directory] = found
        return self.listings[directory]

    def belongs(self, tree: WorkTree | None, item: os.DirEntry[str]) -> bool:
        if item.name == ".git":
            return False
        if tree is None:
            return not DROPPINGS.fullmatch(item.name)
        name = tree.name(item.path)
        if name in tree.files or (name in tree.directories and item.is_dir(follow_symlinks=False)):
            return True
        if name in tree.others or f"{name}/" in tree.others:
            self.leave_out("untracked", tree.root, name)
        return False

    def tracked(self, path: str, is_directory: bool) -> bool:
        """Whether what a link leads to is in a release."""
        if is_directory and self.root(path) == path:
            return True
        tree = self.work_tree(os.path.dirname(path))
        if tree is None:
            return True
        name = tree.name(path)
        return name in tree.files or (is_directory and name in tree.directories)

    def check_name(self, item: os.DirEntry[str]) -> None:
        try:
            known_as = os.fsencode(item.name).decode()
        except UnicodeDecodeError:
            raise BentoError(f"{one_line(repr(self.called(item.path)))}: the name is not UTF-8: rename it") from None
        if known_as != item.name:
            raise BentoError(f"{self.show(item.path)}: this locale is not UTF-8: run this with PYTHONUTF8=1")

    def look(self, tree: WorkTree | None, item: os.DirEntry[str]) -> Entry | None:
        """What a name in a directory stands for. None: nothing that could be in a release."""
        self.check_name(item)
        linked = item.is_symlink()
        path = os.path.realpath(item.path) if linked else item.path
        try:
            found = item.stat()
        except FileNotFoundError:
            if not path.startswith("/nix/store/"):
                self.leave_out_dangling(item.path, path)
            return None
        except OSError as error:
            raise BentoError(f"{self.show(item.path)}: link loop ({error.strerror})") from None
        is_directory = stat.S_ISDIR(found.st_mode)
        if not is_directory and not stat.S_ISREG(found.st_mode):
            self.leave_out("special", "", self.show(item.path))
            return None
        if linked and not self.tracked(path, is_directory):
            self.leave_out_dangling(item.path, path)
            return None
        # Outside of Git a directory may be empty. In it a submodule may be, when nobody has fetched it.
        kept = tree is None or tree.name(item.path) in tree.files
        executable = not is_directory and bool(found.st_mode & 0o100)
        size = 0 if is_directory else found.st_size
        return Entry(item.name, item.path, path, is_directory, executable, size, linked, kept and not linked)

    def leave_out_dangling(self, place: str, path: str) -> None:
        """A link that leads nowhere, or to what Git does not know: in its owner's own build it would, too."""
        above = os.path.dirname(path)
        while not os.path.isdir(above):
            above = os.path.dirname(above)
        tree = self.work_tree(above)
        if tree is not None and tree.name(above) in tree.files:
            self.leave_out("submodule", tree.root, self.show(place))
        else:
            self.leave_out("dangling", "", f"{self.show(place)} -> {one_line(os.readlink(place))}")

    def collect(self, directory: str, prefix: str, above: tuple[str, ...], members: list[Member]) -> None:
        """All that a release has of a directory. `above` are the real ones that it is in, and itself; the first is the
        host's own, where links may lead to, as anywhere in the fleet's."""
        if len(above) > client.MAX_DEPTH:
            raise BentoError(f"{self.show(directory)}: a tree deeper than {client.MAX_DEPTH} directories")
        for entry in self.listing(directory):
            if entry.linked and not f"{entry.path}/".startswith((f"{self.real}/", f"{above[0]}/")):
                if entry.path.startswith("/nix/store/"):
                    continue
                where = self.show(entry.place)
                raise BentoError(f"{where}: link out of the fleet directory, to {one_line(entry.path)}")
            name = f"{prefix}{entry.name}"
            members.append(Member(name, entry.path, entry.is_directory, entry.executable, entry.size))
            if not entry.is_directory:
                continue
            if entry.path in above:
                raise BentoError(f"{self.show(entry.place)}: link loop: it leads to a directory that it is in")
            count = len(members)
            self.collect(entry.path, f"{name}/", (*above, entry.path), members)
            if len(members) == count and not entry.kept and self.root(entry.path) is not None:
                members.pop()

    def pack_small(self, members: Sequence[Member]) -> list[Member]:
        """The members, small files with what the archive has of them. Hosts share most of theirs, through utils/."""
        packed = []
        for member in members:
            block = None if member.size > SMALL_FILE else self.blocks.get(member)
            if block is None and member.size <= SMALL_FILE:
                block = pack(member)
                self.blocks_bytes += MEMBER_BYTES + len(block)
                if self.blocks_bytes > MEMORY_BYTES:
                    self.blocks, self.blocks_bytes = {}, 0
                self.blocks[member] = block
            packed.append(member if block is None else member._replace(block=block))
        return packed

    def warnings(self) -> list[str]:
        """What was left out, a line a kind, and a work tree."""
        texts = {
            "untracked": "{where}: {n} untracked, left out: 'git add' what belongs to a host",
            "submodule": "{where}: {links} into submodules that are not there, left out: run 'git submodule update --init'"
            " there",
            "dangling": "{links} left out",
            "special": "{n} left out: neither files nor directories (sockets, FIFOs, devices)",
            "local": "only this server can build a flake with an input in its own files",
        }
        lines = []
        for (kind, where), paths in sorted(self.left_out.items()):
            number = len(paths)
            numbers = {"n": counted(number, "name"), "links": counted(number, "dangling link")}
            words = texts[kind].format(where=one_line(where), **numbers)
            lines.append(f"{words}: {show_names([one_line(path) for path in sorted(paths)])}")
        return lines


def list_members(fleet: Fleet, name: str) -> list[Member]:
    """Everything below hosts/NAME, symlinks followed, sorted bytewise. BentoError names what cannot be in a release."""
    top, source = f"{fleet.real_hosts}/{name}", fleet.source
    if not os.path.isdir(top):
        raise BentoError(f"hosts/{name}: {'dangling link' if os.path.islink(top) else 'not a directory'}")
    real = os.path.realpath(top)
    source.tops.setdefault(real, f"hosts/{name}")
    members: list[Member] = []
    source.collect(real, "", (real,), members)
    members.sort()  # by name, and strings compare as their UTF-8 does
    return members


def read_release(fleet: Fleet, name: str) -> tuple[Release, Recipe]:
    """A host's release, which is read once for all that share its directory, and how it is built."""
    real, source = os.path.realpath(f"{fleet.real_hosts}/{name}"), fleet.source
    release = source.releases.get(real)
    if release is not None:
        return release, find_recipe(fleet, release.members, name)
    members: Sequence[Member] = list_members(fleet, name)
    recipe = find_recipe(fleet, members, name)
    size = sum(MEMBER_BYTES + member.size for member in members)
    if size > client.MAX_RELEASE_BYTES:
        raise BentoError(too_large(members))
    if size <= MEMORY_BYTES:
        members = source.pack_small(members)
    release = Release(*write_release(members), members)
    if os.path.islink(f"{fleet.real_hosts}/{name}"):
        if len(source.releases) >= MAX_SHARED:
            source.releases.clear()
        source.releases[real] = release
    return release, recipe


def find_recipe(fleet: Fleet, members: Sequence[Member], name: str) -> Recipe:
    """How a release is built for a host. BentoError when there is nothing to build."""
    raw = next((read_file(m.path, client.MAX_JSON_BYTES + 1) for m in members if m.name == "bento.json"), None)
    recipe = Recipe(name) if raw is None else client.parse_recipe(raw, f"hosts/{name}/bento.json", name)
    entries = [f"{recipe.directory}/{file}".lstrip("/") for file in ("flake.nix", "configuration.nix")]
    if any(member.name in entries and not member.is_directory for member in members):
        return recipe
    real = os.path.realpath(f"{fleet.real_hosts}/{name}")
    for entry in entries:
        path = os.path.realpath(f"{real}/{entry}")
        if os.path.isfile(path) and not fleet.source.tracked(path, False):
            raise BentoError(f"hosts/{name}/{entry}: Git does not know it: 'git add' it, and what belongs to it")
    where = f"hosts/{name}/{recipe.directory}".rstrip("/")
    raise BentoError(f"{where}: neither flake.nix nor configuration.nix in it")


def local_inputs(members: Sequence[Member], recipe: Recipe) -> list[str]:
    """The inputs of a locked flake that are files of this machine. What cannot be read, Nix will complain of."""
    name = f"{recipe.directory}/flake.lock".lstrip("/")
    found = []
    for member in members:
        if member.name == name:
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                for node, value in json.loads(Path(member.path).read_bytes())["nodes"].items():
                    locked = value.get("locked", {})
                    place = str(locked.get("path") if locked.get("type") == "path" else locked.get("url"))
                    if place.startswith(("/", "file:")):
                        found.append(f"{node} ({place})")
    return found


# --- states of hosts ---


def judge(
    current: Current | None, report: Report | None, seen_s: float | None, now_s: float, offline_after_s: float
) -> tuple[str, bool, bool, bool]:
    """A host's state, and the flags offline, needs_reboot and drift. Every combination has exactly one state.

    `up-to-date` is only said of one that runs the published release now.
    """
    offline = seen_s is not None and now_s - seen_s > offline_after_s
    if report is None or current is None:
        return "new" if report is None else "pending", offline, report is not None and report.needs_reboot, False
    last = report.last
    drift = False
    if report.phase == Phase.LEFT:
        state = "left"
    elif report.phase in (Phase.BUILDING, Phase.ACTIVATING):
        state = "building"
    elif last is None or last.release not in (current.release, None):
        state = "pending"
    elif last.release is None:
        state = "failing"
    elif last.result == Result.OK:
        waits = report.needs_reboot or report.waiting_for_boot == current.release
        state = "up-to-date" if report.release == current.release else "waiting" if waits else "pending"
        expected = current.system or last.system
        drift = expected is not None and report.system != expected and not report.needs_reboot
    else:
        state = "rolled-back" if last.result == Result.ROLLED_BACK else "failing"
    return state, offline, report.needs_reboot, drift


@contextmanager
def open_logs(chroot: Path | str) -> Iterator[int]:
    """A descriptor of logs/, which is no link."""
    logs = os.open(f"{chroot}/logs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield logs
    finally:
        os.close(logs)


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


def why_not(error: OSError) -> str:
    """Why a host's file cannot be read. Root may read all of them."""
    if isinstance(error, PermissionError):
        return f"{error.strerror}: run this as root"
    return f"not a regular file ({error.strerror})"


def read_report(chroot: Path | str, name: str) -> Found:
    """The host's report, when it came, its logs' names, and what is wrong with any of these."""
    seen_s, problem, names = None, "", tuple[str, ...]()
    try:
        with open_logs(chroot) as logs:
            problem, names = weigh_logs(logs)
            raw, found = read_untrusted(logs, "status.json", client.MAX_JSON_BYTES)
        seen_s = arrival_s(found)
        report = client.parse_report(raw, "logs/status.json")
        if report.host != name:
            raise BentoError(f"logs/status.json: it speaks for host {report.host!r}")
        return Found(None, report, seen_s, problem, names)
    except FileNotFoundError:
        return Found(None, None, None, problem, names)
    except OSError as error:
        return Found(None, None, seen_s, f"logs/status.json: {why_not(error)}", unreadable=True)
    except BentoError as error:
        return Found(None, None, seen_s, one_line(str(error)), names, unreadable=True)


def weigh_logs(logs: int) -> tuple[str, tuple[str, ...]]:
    """What to say of a host that fills its logs/, and the newest logs in it. Looks at no more files than it takes."""
    size, names, problem = 0, [], ""
    with os.scandir(logs) as entries:
        for count, entry in enumerate(entries, 1):
            if count > MAX_LOG_FILES:
                problem = f"logs/ has more than {MAX_LOG_FILES} files: the host fills it"
                break
            if entry.name.endswith(".log"):
                names.append(entry.name)
            try:
                size += entry.stat(follow_symlinks=False).st_size  # a sparse file counts whole: so it does in a backup
            except FileNotFoundError:
                continue
            if size > MAX_LOGS_BYTES:
                problem = f"logs/ holds more than {MAX_LOGS_BYTES >> 20} MB: the host fills it"
                break
    return problem, tuple(sorted(names)[-SHOWN_ATTEMPTS:])


def parse_log_name(name: str) -> Attempt | None:
    if not client.LOG_NAME.fullmatch(name):
        return None
    when, release, result = name.removesuffix(".log").split("_")
    with suppress(ValueError):
        return Attempt(name, format_time(datetime.fromisoformat(when).timestamp()), release, result)
    return None


def first_failure(last: Last, attempts: Sequence[Attempt]) -> str:
    """When the failures began, the last of which is `last`: those of the same release, without a success in between."""
    first = last.finished
    for attempt in reversed(attempts):
        if attempt.release != (last.release or client.NO_RELEASE)[:12] or attempt.result == Result.OK:
            break
        first = min(first, attempt.finished)
    return first


def read_published(chroot: Path | str, name: str) -> Current | None:
    try:
        raw = read_file(f"{chroot}/current.json", client.MAX_JSON_BYTES + 1)
        return client.parse_current(raw, f"{chroot}/current.json", name)
    except FileNotFoundError:
        return None


def read_host(chroot: str, name: str) -> Found:
    current, problem = None, ""
    try:
        current = read_published(chroot, name)
        if current is None and os.path.exists(f"{chroot}/history"):
            problem = f"current.json is missing: 'bento.py populate {name}' publishes it again"
    except BentoError as error:
        problem = one_line(str(error))
    except OSError as error:
        problem = f"{chroot}/current.json: {why_not(error)}"
    found = read_report(chroot, name)
    if problem:
        return found._replace(problem=problem, unreadable=True)
    return found._replace(current=current)


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


def make_row(name: str, found: Found, now_s: float, offline_after_s: float, beside: Beside = NOTHING_BESIDE) -> Row:
    current, report, seen_s = found.current, found.report, found.seen_s
    state, offline, reboot, drift = judge(current, report, seen_s, now_s, patience_s(report, offline_after_s))
    held = "" if current is None else beside.held.get((name, current.release), "")
    if found.unreadable:
        state = "unknown"
    elif held and state in ("new", "up-to-date", "waiting", "pending"):
        state = "held"
    row = Row(name, state, offline, reboot, drift, current, report, seen_s, found.problem, is_expired(current, now_s))
    left_s, began_s = pause_left_s(report), row.since_s
    return row._replace(
        paused=seen_s is not None and left_s > now_s - seen_s,
        stuck=state == "building" and began_s is not None and now_s - began_s >= STUCK_AFTER_S,
        absence=beside.absent.get(name, ""),
        refusal=beside.refused.get(name),
        held=held,
        logs=found.logs,
    )


def patience_s(report: Report | None, offline_after_s: float) -> float:
    """How long a host may be silent: what its owner says; else what we were told, or three of its polls if it polls rarely."""
    if report is not None and report.offline_after:
        return min(report.offline_after, LONGEST_SILENCE_S)
    missed_s = MISSED_POLLS * (report.interval or 0) if report is not None else 0
    return max(offline_after_s, min(missed_s, LONGEST_SILENCE_S)) if missed_s > OFFLINE_AFTER_S else offline_after_s


def pause_left_s(report: Report | None) -> float:
    """For how long a host was to deploy nothing, by its own clock, when it reported."""
    if report is None or report.paused_until is None:
        return 0.0
    return client.parse_time(report.paused_until) - client.parse_time(report.polled)


def is_expired(current: Current | None, now_s: float) -> bool:
    """Whether nobody vouches any more for what is published."""
    with suppress(BentoError):
        if current is not None and current.signed is not None:
            return client.parse_time(client.parse_signed(current.signed, "").expires) <= now_s
    return False


# The states, what is urgent first, each with its symbol and its colour on a terminal.
STATES = {
    "failing": ("✗", "31"), "rolled-back": ("↶", "31"), "unknown": ("?", "31"), "pending": ("…", "33"), "held": ("‖", "33"),
    "building": ("⚙", "36"), "waiting": ("↻", "33"), "new": ("·", "2"), "left": ("-", "2"), "up-to-date": ("✓", "32"),
}  # fmt: skip
URGENCY = tuple(STATES)


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """What needs a person first, and of that who is silent: it may be all that there is to know of a host."""
    return sorted(
        rows,
        key=lambda row: (not row.needs_a_person, row.reasons[:1] != ["offline"], URGENCY.index(row.state), row.host),
    )


# What may be the matter with a host besides its state, and what a metric says of that.
MARKS = {
    "offline": "Whether a host has not been seen for too long.",
    "drift": "Whether a host runs another system than its release's.",
    "needs_reboot": "Whether a host needs a reboot.",
    "other_client": "Whether a host runs another version of the client than the server has.",
    "failed_units": "Whether units failed when a host's release was activated, and still do.",
    "paused": "Whether a host deploys nothing for now.",
    "expired": "Whether nobody vouches any more for what is published for a host.",
    "absent": "Whether a host is known to be away.",
    "not_published": "Whether a host's configuration failed to be published.",
    "stuck": "Whether a host has been building for longer than any build takes.",
    "two_machines": "Whether another machine has reported as a host, too.",
}
RESULT_MARKS: dict[str, str] = {
    Result.OK: "✓", Result.BUILD_FAILED: "✗", Result.FETCH_FAILED: "↓", Result.ROLLED_BACK: "↶", Result.ROLLBACK_FAILED: "‼",
    Result.POSTPONED: "…", Result.INTERRUPTED: "~",
}  # fmt: skip
# Of the parts of a bar, the last for all that are older than the others, and for what nobody knows.
SHADES, NOT_KNOWN, UNKNOWN_RELEASE = "█▓▒░", "·", "not known"
# What a revision begins with, by default.
COMMIT = re.compile(r"[0-9a-f]{7,40}\b\+?")
# Where the encoding of stdout has none of our symbols.
PLAIN = str.maketrans("✗↶…⚙↻·✓‖↓‼█▓▒░", "x<~*@.+|v%#=:-")


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
    if wide := width >= name_width + 120 and any(row.revision for row in rows):
        columns[2] = ("RUNS", 8 + REVISION_WIDTH)
    bar = format_bar(rows, width)
    summary = [*([bar] if bar else []), *textwrap.wrap(format_summary(rows), width)]
    shown = rows
    if height is not None and len(rows) > height - 1 - len(summary):
        shown = rows[: max(0, height - 2 - len(summary))]
        summary.insert(0, f"({len(rows) - len(shown)} more)")
    gutter = "  " if decorated else ""
    lines = [clip((gutter + " ".join(f"{title:<{size}}" for title, size in columns) + "  NOTES").rstrip(), width)]
    for row in shown:
        cells = row_cells(row, now_s)
        if wide and row.revision is not None:
            cells["RUNS"] += f" {clip(row.revision, REVISION_WIDTH)}"
        text = " ".join(f"{cells[title]:<{size}}" for title, size in columns)
        line = clip(f"{text}  {'; '.join(notes(row, now_s))}".rstrip(), width - len(gutter))
        if decorated:
            colour = "31" if row.needs_a_person else STATES[row.state][1]
            line = f"\x1b[{colour}m{symbol_of(row)}\x1b[0m {line}"
        lines.append(line)
    return "\n".join([*lines, *summary])


def symbol_of(row: Row) -> str:
    """What a state looks like, unless something else is the matter with a host."""
    alarm = row.offline or (row.needs_a_person and row.reasons[0] not in ("failed", "stuck", "problem"))
    return "!" if alarm else STATES[row.state][0]


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
    """The short texts of a row. SINCE is how long it has been in its state."""
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
    return f"{counted(len(rows))}: {', '.join(words)}" if rows else "no hosts"


def format_host(row: Row, now_s: float) -> str:
    """All that is known of one host, with nothing cut."""
    report, current = row.report, row.current
    since_s = row.since_s
    lines: list[tuple[str, str | None]] = [
        ("state", row.state + (f" since {moment(since_s, now_s)}" if since_s is not None else "")),
        *(("needs you", words) for reason in row.reasons if (words := note(row, reason, now_s))),
        ("seen", "never" if row.seen_s is None else moment(row.seen_s, now_s)),
        ("published", f"{current.release} {current.published}" if current else None),
        ("", current.revision if current else None),
        ("held", row.held or None),
        ("absent", row.absence or None),
    ]
    if report is not None:
        lines += report_lines(row, report, now_s)
    if attempts := row.attempts:
        marks = "".join(RESULT_MARKS.get(attempt.result, "?") for attempt in attempts)
        lines.append(("attempts", f"{marks}  (the newest is the last; 'bento.py log {row.host} --list')"))
    return "\n".join(f"{name:<10} {one_line(text, 4000)}" for name, text in lines if text is not None)


def clock_error(row: Row) -> str:
    """How wrong the host's clock is; nothing for what may be a slow line."""
    ahead_s = row.ahead_s or 0
    return f"{age(abs(ahead_s))} {'ahead' if ahead_s > 0 else 'behind'}" if abs(ahead_s) > CLOCK_TOLERANCE_S else ""


def moment(when_s: float, now_s: float) -> str:
    return f"{format_time(when_s)} ({age(now_s - when_s)} ago)"


def report_lines(row: Row, report: Report, now_s: float) -> list[tuple[str, str | None]]:
    """What a host says of itself."""
    last = report.last
    finished_s = row.ours_s(last.finished) if last else None
    ended = "at a time that its clock does not tell" if finished_s is None else moment(finished_s, now_s)
    tried = f"tried {counted(last.attempt, 'time')}" if last else ""
    wrong = clock_error(row)
    return [
        ("runs", report.release or "none of Bento's releases"),
        ("", row.revision),
        ("system", report.system),
        ("last", f"{last.result}, {last.release or 'no release'}, {tried}, {ended}" if last else None),
        ("reason", last.reason or None if last else None),
        ("waiting", f"{report.waiting_for_boot} runs from the next boot on" if report.waiting_for_boot else None),
        ("reboot", "needed" if report.needs_reboot else None),
        ("failed", ", ".join(report.failed_units) or None),
        ("paused", f"until {report.paused_until}" if row.paused else None),
        ("phase", report.phase),
        ("client", report.client + (f", its clock is {wrong}" if wrong else "")),
        ("offline", f"after {age(patience_s(report, OFFLINE_AFTER_S))} of silence"),
        ("boot trial", report.boot_trial),
        ("boots", report.known_to_boot),
        ("signed", f"by {report.signer}, until {report.expires}" if report.signer else None),
        ("trust", f"it took a server's key on trust at {report.first_contact}" if report.first_contact else None),
    ]


def count_words(rows: Sequence[Row]) -> dict[str, int]:
    """How many hosts are in each state, and have each mark."""
    counts = dict.fromkeys((*URGENCY, *MARKS), 0)
    for row in rows:
        for word in (row.state, *(mark for mark in MARKS if getattr(row, mark))):
            counts[word] = counts.get(word, 0) + 1
    return counts


def notes(row: Row, now_s: float) -> list[str]:
    """What a person should know of a host, most important first."""
    found = [words for flag in (*row.reasons, *MARKS) if (words := note(row, flag, now_s))]
    last = row.report.last if row.report else None
    if row.held:
        found.append(row.held)
    if row.state in ("pending", "building", "new") and row.current is not None and row.published_s is not None:
        found.append(f"{row.current.release[:7]} published {age(now_s - row.published_s)} ago")
    elif row.current is None and not row.problem:
        found.append("nothing published")
    elif row.state == "up-to-date" and last is not None and last.reason:
        found.append(one_line(last.reason))
    if row.report is not None and row.other_client:
        found.append(f"client {row.report.client}")
    if wrong := clock_error(row):
        found.append(f"clock {wrong}")
    return list(dict.fromkeys(found))


def note(row: Row, flag: str, now_s: float) -> str:
    """One thing that is the matter with a host, in words. Nothing for what is not, or is told elsewhere."""
    report, refusal = row.report, row.refusal
    if not getattr(row, flag):
        return ""
    if flag == "problem":
        return row.problem
    if flag == "failed":
        return failure_words(row)
    if flag == "offline" and row.seen_s is not None:
        return f"offline for {age(now_s - row.seen_s)}"
    if flag == "failed_units" and report is not None:
        return f"failed units: {one_line(', '.join(report.failed_units), 1000)}"
    if flag == "not_published" and refusal is not None:
        since_s = client.parse_time(refusal.since)
        return f"not published for {age(now_s - since_s)}, tried {counted(refusal.times, 'time')}: {refusal.error}"
    if flag == "paused" and report is not None and report.paused_until is not None:
        return f"paused until {report.paused_until}"
    if flag == "absent":
        return f"absent: {row.absence}" if row.offline else f"back again: remove hosts/{row.host}.absent"
    known = {
        "expired": f"signature expired: 'bento.py sign {row.host}'",
        "stuck": "no end of its build",
        "two_machines": f"two machines report as {row.host}",
        "other_client": "",
    }
    return known.get(flag, flag.replace("_", " "))


def failure_words(row: Row) -> str:
    """Which release fails, how often, and why."""
    last = row.report.last if row.report else None
    if last is None:
        return ""
    what = (last.release or "")[:7] or "what is published"
    tried = f", tried {counted(last.attempt, 'time')}" if last.attempt > 1 else ""
    reason = last.reason if last.result == row.state else f"{last.result}: {last.reason}"
    return one_line(f"{what}{tried}: {reason}", 1000)


def since(when_s: float, now_s: float) -> str:
    return f"since {format_time(when_s)} ({age(now_s - when_s)})"


def complaint(row: Row, now_s: float) -> Failure:
    """What a person is told of a host that needs one, who does not see the table. What is wrong comes first."""
    since_s, found = row.since_s, [words for words in notes(row, now_s) if words != note(row, "offline", now_s)]
    state = row.state + (f" {since(since_s, now_s)}" if since_s is not None else "")
    if row.offline and row.seen_s is not None:
        words = [f"offline {since(row.seen_s, now_s)}, it was {row.state}", *found]
    elif row.reasons[:1] in (["failed"], ["stuck"], ["problem"]):
        words = [f"{state}: {'; '.join(found)}"]
    else:
        words = [*found, state]
    return Failure(row.host, "; ".join(words))


class Shade(NamedTuple):
    """How many hosts run one revision, and when it was published; 0 if nobody knows that any more."""

    label: str
    hosts: int
    published_s: float = 0.0


def count_shades(rows: Sequence[Row]) -> list[Shade]:
    """How many hosts run which revision, the newest first, at last what nobody knows. Older ones are taken together."""
    counts: Counter[str] = Counter()
    newest, published = dict[str, float](), dict[str, float]()
    for row in rows:
        report, current = row.report, row.current
        if report is None or report.release is None:
            counts[""] += 1
            continue
        same = current is not None and current.release == report.release
        label = one_line(row.revision or "") or ("current" if same else "earlier")
        counts[label] += 1
        when_s = row.published_s or 0.0
        if same:
            published[label] = max(published.get(label, 0.0), when_s)
        else:  # then before that, whenever a host came to it
            last = report.last if report.last is not None and report.last.release == report.release else None
            when_s = min(when_s - 1, (row.ours_s(last.finished) if last else None) or 0.0)
        newest[label] = max(newest.get(label, 0.0), when_s)
    order = sorted(newest, key=lambda label: (-newest[label], label))
    shades = [Shade(label, counts[label], published.get(label, 0.0)) for label in order]
    if len(order) > len(SHADES):
        older = shades[len(SHADES) - 1 :]
        shades[len(SHADES) - 1 :] = [Shade(f"{len(older)} older ones", sum(shade.hosts for shade in older))]
    return [*shades, *([Shade(UNKNOWN_RELEASE, counts[""])] if counts[""] else [])]


def format_bar(rows: Sequence[Row], width: int) -> str:
    """The roll-out in one line, if it is under way."""
    shades = count_shades(rows)
    marks = [NOT_KNOWN if shade.label == UNKNOWN_RELEASE else SHADES[number] for number, shade in enumerate(shades)]
    if sum(mark != NOT_KNOWN for mark in marks) < 2:
        return ""
    room = max(10, min(40, width // 3))
    bar = "".join(
        mark * max(1, round(room * shade.hosts / len(rows))) for mark, shade in zip(marks, shades, strict=True)
    )
    each = max(7, (width - room) // len(shades) - 6)
    labels = [clip(found[0] if (found := COMMIT.match(shade.label)) else shade.label, each) for shade in shades]
    words = [f"{mark} {label} {shade.hosts}" for mark, label, shade in zip(marks, labels, shades, strict=True)]
    return clip(f"{bar}  {'  '.join(words)}", width)


# Of what is known of a host: the metric that has it, and what that says.
GAUGES = {mark: (mark, text) for mark, text in MARKS.items()} | {
    "needs_a_person": ("needs_attention", "Whether a host needs a person."),
    "seen_s": ("last_seen_timestamp_seconds", "When a host reported last, on the server's clock."),
    "since_s": ("state_since_timestamp_seconds", "When a host came into its state."),
    "tries": ("tries", "How often a host tried the release that it fails to run."),
    "published_s": ("published_timestamp_seconds", "When a host's current release was published."),
    "ahead_s": ("clock_ahead_seconds", "How far a host's clock was ahead of the server's at its last report."),
}


def format_prometheus(rows: Sequence[Row]) -> str:
    """For node_exporter's textfile collector. A host's name is the only text in it, and has no character to escape."""
    counts, lines = count_words(rows), list[str]()

    def gauge(name: str, text: str, samples: Iterable[tuple[str, float | None]]) -> None:
        lines.extend([f"# HELP {name} {text}", f"# TYPE {name} gauge"])
        for labels, value in samples:
            if value is not None:
                lines.append(f"{name}{{{labels}}} {value if isinstance(value, float) else int(value)}")

    gauge("bento_hosts", "Hosts in each state.", [(f'state="{state}"', counts[state]) for state in URGENCY])
    states = [(f'host="{row.host}",state="{state}"', row.state == state) for row in rows for state in URGENCY]
    gauge("bento_host_state", "1 for the state that a host is in.", states)
    releases = [(f'host="{row.host}",{release_labels(row)}', 1) for row in rows]
    gauge("bento_host_release_info", "The releases that a host runs, is to run, and tried last.", releases)
    for known, (name, text) in GAUGES.items():
        gauge(f"bento_host_{name}", text, [(f'host="{row.host}"', getattr(row, known)) for row in rows])
    return "\n".join(lines) + "\n"


def release_labels(row: Row) -> str:
    """Of a metric: releases are nothing but hexadecimal."""
    last = row.report.last if row.report else None
    releases = {
        "running": row.report.release if row.report else None,
        "published": row.current.release if row.current else None,
        "tried": last.release if last else None,
    }
    return ",".join(f'{name}="{(release or "none")[:12]}"' for name, release in releases.items())


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
h1 {{ font-size: 1.3rem; margin-bottom: 0; }} h2 {{ font-size: 1rem; margin: 1.4rem 0 .3rem; }}
ul {{ list-style: none; margin: 0; padding: 0; }} li {{ overflow-wrap: anywhere; margin: .25rem 0; }}
.alarm {{ border-left: .3rem solid var(--bad); padding-left: .6rem; font-weight: 600; }}
.bar {{ display: flex; height: 1.5rem; border-radius: .3rem; overflow: hidden; }} .bar u {{ min-width: .3rem; }}
u {{ text-decoration: none; background: var(--shade); }} li u {{ display: inline-block; width: 1rem; height: .8rem; }}
.shade0 {{ --shade: #396; }}
.shade1 {{ --shade: repeating-linear-gradient(45deg, #58c 0 5px, #7ae 5px 10px); }}
.shade2 {{ --shade: repeating-linear-gradient(90deg, #b83 0 3px, #da5 3px 8px); }}
.shade3 {{ --shade: repeating-linear-gradient(135deg, #855 0 3px, #a77 3px 6px); }}
.shade4 {{ --shade: repeating-linear-gradient(0deg, #888 0 2px, #aaa 2px 6px); }}
s {{ text-decoration: none; display: inline-block; min-width: .6rem; text-align: center; font-size: .95em; cursor: default; }}
s.ok {{ color: var(--good); }} s.bad {{ color: var(--bad); font-weight: 700; }} s.odd {{ color: var(--wait); }}
nav a {{ display: inline-block; margin: .15rem .3rem .15rem 0; padding: .1rem .6rem; border: 1px solid var(--line);
  border-radius: 1rem; color: inherit; text-decoration: none; }}
nav a:first-child {{ background: #8883; font-weight: 600; }}
i:target ~ nav a:first-child {{ background: none; font-weight: inherit; }}
table {{ border-spacing: 0; width: 100%; margin-top: .8rem; }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-top: 1px solid var(--line); }}
td {{ white-space: nowrap; }} td:first-child {{ font-weight: 600; }} td.notes {{ white-space: normal; overflow-wrap: anywhere; }}
code {{ font-size: .9em; }}
.failing b, .rolled-back b, .mark {{ color: var(--bad); }}
.pending b, .held b, .building b, .waiting b, .left b, .new b {{ color: var(--wait); }}
.up-to-date b {{ color: var(--good); }} .unknown b, .offline b, .person b {{ color: var(--bad); }}
@media (max-width: 40rem) {{
  thead {{ display: none; }} tr {{ display: block; border-top: 1px solid var(--line); padding: .4rem 0; }}
  td {{ display: inline-block; border: 0; padding: 0 .6rem 0 0; }} td.notes {{ display: block; }}
  td.since::before {{ content: "since "; }} td.seen::before {{ content: "seen "; }}
}}
.old {{ visibility: hidden; color: var(--bad); animation: old 0s {old_s}s forwards; }}
@keyframes old {{ to {{ visibility: visible; }} }}
{filters}
</style>
{targets}
<h1>{title}</h1>
<p>As of {time} on the server. <span class="old">That was a while ago: reload this page.</span></p>
{persons}{rollout}
<h2>Hosts</h2>
<nav>{links}</nav>
<table>
<thead><tr><th>Host<th>State<th>Since<th>Runs<th>Seen<th>Notes<th>Last attempts</thead>
<tbody>
{rows}
</tbody>
</table>
</html>
"""


# The reason of an attempt, from its log: a host's name, and the log's.
Why = Callable[[str, str], str]


def format_html(
    rows: Sequence[Row], now_s: float, logs_url: str, troubles: Sequence[str] = (), why: Why = lambda *_: ""
) -> str:
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
        title=f"{counted(len(rows))}, {kinds[1][2]} for a person to look at",
        time=format_time(now_s),
        filters="\n".join(filters),
        targets="".join(f'<i id="{word}"></i>' for word, _, _ in kinds[1:]),
        persons=html_persons(rows, now_s, troubles),
        rollout=html_roll_out(rows, now_s),
        links="\n".join(f'<a href="?{word}#{word}">{text} {count}</a>' for word, text, count in kinds),
        rows="\n".join(html_row(row, now_s, logs_url, why, len(rows) > MANY_HOSTS) for row in rows),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


def html_persons(rows: Sequence[Row], now_s: float, troubles: Sequence[str]) -> str:
    """Who needs a person, and why: the first of them, and how many more there are."""
    lines = [f'<p class="alarm">{html.escape(text)}</p>' for text in troubles]
    wanting = [row for row in rows if row.needs_a_person]
    if not wanting:
        return "".join(lines)
    lines.append("<h2>Needs a person</h2>\n<ul>")
    for row in wanting[:SHOWN_PERSONS]:
        failure = complaint(row, now_s)
        lines.append(f"<li><span class=mark>{symbol_of(row)}</span> <b>{row.host}</b> {html.escape(failure.text)}")
    if len(wanting) > SHOWN_PERSONS:
        lines.append(f"<li>... and {len(wanting) - SHOWN_PERSONS} more, at the top of the table")
    return "\n".join([*lines, "</ul>"])


def html_roll_out(rows: Sequence[Row], now_s: float) -> str:
    """How many hosts run which revision, and which are held, and by whom."""
    parts, lines = [], []
    for number, shade in enumerate(count_shades(rows)):
        kind = "shade4" if shade.label == UNKNOWN_RELEASE else f"shade{min(number, 3)}"
        label = html.escape(shade.label)
        when = f", published {age(now_s - shade.published_s)} ago" if shade.published_s else ""
        parts.append(f'<u class={kind} style="flex:{shade.hosts}" title="{label}: {shade.hosts}"></u>')
        lines.append(f"<li><u class={kind}></u> {counted(shade.hosts)}: {label}{when}")
    for words, count in Counter(row.held for row in rows if row.held).most_common(SHOWN):
        lines.append(f"<li>{STATES['held'][0]} {counted(count)} held: {html.escape(words)}")
    bar = f'<div class="bar">{"".join(parts)}</div>'
    return "\n".join(["\n<h2>Roll-out</h2>", bar, "<ul>", *lines, "</ul>"]) if rows else ""


def html_row(row: Row, now_s: float, logs_url: str, why: Why, brief: bool) -> str:
    cells = {title: html.escape(text) for title, text in row_cells(row, now_s).items()}
    classes = [row.state, *(mark for mark in MARKS if getattr(row, mark)), *(["person"] if row.needs_a_person else [])]
    url = html.escape(f"{logs_url}/{row.host}/logs/")
    state = f"<b>{symbol_of(row)} {'offline' if row.offline else cells['STATE']}</b>"
    state += f", was {cells['STATE']}" if row.offline else ""
    revision = html.escape(clip(one_line(row.revision or ""), REVISION_WIDTH - 4))
    since = f"<td class=since>{cells['SINCE']}" if cells["SINCE"] != "-" else "<td>"
    return (
        f'<tr class="{" ".join(classes)}"><td>{row.host}<td>{state}{since}'
        f"<td><code>{cells['RUNS']}</code> {revision}<td class=seen>{cells['SEEN']}"
        f'<td class="notes">{html.escape("; ".join(notes(row, now_s)))}'
        f'<td>{html_attempts(row, why, brief)} <a href="{url}">logs</a></tr>'
    )


def html_attempts(row: Row, why: Why, brief: bool) -> str:
    """The last attempts as marks, each with when and why; `brief`: those that ended alike, one after the other, as one."""
    found = []
    keys = itertools.count()
    for _, group in itertools.groupby(row.attempts, key=lambda attempt: attempt.result if brief else next(keys)):
        attempts = list(group)
        last, result = attempts[-1], attempts[-1].result
        kind = "ok" if result == Result.OK else "odd" if result in (Result.POSTPONED, Result.INTERRUPTED) else "bad"
        since = f"{attempts[0].finished} to " if len(attempts) > 1 else ""
        title = f"{since}{last.finished} {last.release[:7]} {result}"
        if result != Result.OK:
            report = row.report.last if row.report else None
            words = report.reason if report and report.log == last.name else why(row.host, last.name)
            title += f": {one_line(words, 200)}" if words else ""
        found.append(
            f'<s class={kind} title="{html.escape(title)}">{RESULT_MARKS.get(result, "?") * len(attempts)}</s>'
        )
    return "".join(found)


def format_json(rows: Sequence[Row], now_s: float, troubles: Sequence[str] = ()) -> str:
    """A line a host. Without `indent`, which would make json.dumps ten times as slow."""
    lines = ",\n".join(json.dumps(row_json(row)) for row in rows)
    head = f'"format": 1, "time": "{format_time(now_s)}", "problems": {json.dumps(list(troubles))}'
    return f'{{{head}, "hosts": [\n{lines}\n]}}\n'


def row_json(row: Row) -> dict[str, object]:
    """A host in `status --json`. Every string that a host wrote is one line of printable characters."""
    last, since_s = row.report.last if row.report else None, row.since_s
    published = row.current._asdict() if row.current else {}
    for name in ("parts", "signed", "signature", "signer"):  # of no interest to whom this is for
        published.pop(name, None)
    fields = ("release", "system", "client", "phase", "signer", "waiting_for_boot", "paused_until")
    return {
        "host": row.host,
        "state": row.state,
        **{mark: getattr(row, mark) for mark in MARKS},
        "failed_units": [one_line(unit) for unit in row.report.failed_units] if row.report else [],
        "absent": row.absence or None,
        "held": row.held or None,
        "not_published": row.refusal._asdict() if row.refusal else None,
        "needs_a_person": row.needs_a_person,
        "reasons": row.reasons,
        "tries": row.tries,
        "published": published or None,
        **{field: getattr(row.report, field, None) for field in fields},
        "revision": row.revision,
        "last": None if last is None else last._asdict() | {"reason": one_line(last.reason)},
        "since": None if since_s is None else format_time(since_s),
        "seen": None if row.seen_s is None else format_time(row.seen_s),
        "clock_ahead_s": row.ahead_s,
        "problem": row.problem or None,
    }


# --- waves ---

UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
# A host that is not there is not waited for. One that failed stops the roll-out.
ABSENT = {"new", "left", "offline"}
FAILED = {"failing", "rolled-back", "failed units", "not published"}


class Wave(NamedTuple):
    """A line of hosts/waves: its hosts, and for how long each must have run its release before later ones get theirs."""

    hosts: tuple[str, ...]
    soak_s: float


class Standing(NamedTuple):
    """Where a host stands. `wanted`: the release that hosts/ holds for it, or "" if that cannot be published; `since_s`:
    since when it runs the one that it reports."""

    wanted: str
    found: Found
    since_s: float = 0.0

    @property
    def published(self) -> str:
        return self.found.current.release if self.found.current is not None else ""

    @property
    def changed(self) -> bool:
        return "" != self.published != self.wanted != ""


class Blocker(NamedTuple):
    """A host that others wait for."""

    host: str
    why: str


class Held(NamedTuple):
    """A host that waits with the release `published`, while hosts/ has `wanted` for it."""

    host: str
    since_s: float
    published: str
    wanted: str


class Proven(NamedTuple):
    """Since when the server knows that a host runs a release."""

    host: str
    since_s: float
    release: str


class Rollout(NamedTuple):
    """.rollout.json: what the last `populate` of the whole fleet waits for. `blockers` hold all hosts in `held`."""

    blockers: tuple[Blocker, ...] = ()
    held: tuple[Held, ...] = ()
    proven: tuple[Proven, ...] = ()

    @property
    def reason(self) -> str:
        return f"wait for {show_names([f'{host} ({why})' for host, why in self.blockers])}"

    def words(self, now_s: float) -> dict[tuple[str, str], str]:
        """What to say of each host that is held, by its name and its release: it may have got another since."""
        reason = self.reason
        return {(each.host, each.published): f"held {age(now_s - each.since_s)}: {reason}" for each in self.held}


def parse_waves(text: str, hosts: Sequence[str]) -> list[Wave]:
    """A wave a line. BentoError for a word that stands for no host: whom it was meant for would come in the last."""
    waves, left, known = list[Wave](), list(hosts), set(hosts)
    for number, line in enumerate(text.splitlines(), 1):
        soak_s, meant, where = None, set[str](), f"hosts/waves:{number}"
        for word in line.partition("#")[0].split():
            if word.startswith("@"):
                found = re.fullmatch(rf"@([0-9]{{1,5}})({'|'.join(UNITS_S)})", word)
                if found is None or soak_s is not None:
                    raise BentoError(f"{where}: {one_line(word, 40)}: a wave has one soak time, as @90min, @2h or @1d")
                soak_s = float(found[1]) * UNITS_S[found[2]]
            elif matching := [word] if word in known else fnmatch.filter(hosts, word):
                meant.update(matching)
            else:
                raise BentoError(f"{where}: {one_line(word, 40)}: no such host")
        if meant:
            waves.append(Wave(tuple(name for name in left if name in meant), soak_s or 0.0))
            left = [name for name in left if name not in meant]
        elif soak_s is not None:
            raise BentoError(f"{where}: a soak time goes with the hosts of its wave, and there are none in this line")
    return [*waves[:-1], waves[-1]._replace(hosts=(*waves[-1].hosts, *left))] if waves else []


def read_waves(fleet: Fleet, hosts: Sequence[str]) -> list[Wave]:
    """The waves in hosts/waves; none without it. A host may have that name, from before there were waves."""
    path = fleet.host("waves")
    if not os.path.lexists(path) or path.is_dir():
        return []
    try:
        return parse_waves(read_limited(path, MAX_WAVES_BYTES).decode("utf-8"), hosts)
    except (OSError, UnicodeDecodeError) as error:
        raise BentoError(f"hosts/waves: cannot be read: {one_line(str(error))}") from None


def reason_to_wait(standing: Standing, soak_s: float, now_s: float) -> str:
    """Why others wait for this host; nothing when it runs what hosts/ holds for it, proven, for long enough.

    By when its report came: of a host that has been silent since, nobody knows what it runs.
    """
    found, report, seen_s = standing.found, standing.found.report, standing.found.seen_s
    if report is None or seen_s is None:
        return "unreadable" if found.problem else "new"
    state, offline, _, _ = judge(found.current, report, seen_s, now_s, patience_s(report, OFFLINE_AFTER_S))
    if state == "left" or (state in FAILED and not standing.changed):
        return state
    if offline:
        return "offline"
    if not standing.wanted:
        return "not published"
    if standing.changed:
        return "pending"
    if state != "up-to-date":
        return state
    if report.failed_units:
        return "failed units"
    ran_s = max(0.0, seen_s - standing.since_s)
    return f"runs it {age(ran_s)} of {age(soak_s)}" if ran_s < soak_s else ""


def find_blockers(wave: Wave, standings: Mapping[str, Standing], now_s: float) -> tuple[Blocker, ...]:
    """Whom a wave waits for, those that failed first: hosts that are there and not done, or all when nobody is there."""
    reasons = [Blocker(name, reason_to_wait(standings[name], wave.soak_s, now_s)) for name in wave.hosts]
    waiting = [blocker for blocker in reasons if blocker.why and blocker.why not in ABSENT]
    if not waiting and all(blocker.why for blocker in reasons):
        waiting = reasons
    return tuple(sorted(waiting, key=lambda blocker: blocker.why not in FAILED))


def decide(
    waves: Sequence[Wave], standings: Mapping[str, Standing], now_s: float
) -> tuple[tuple[Blocker, ...], list[str]]:
    """Whom the first wave that is not done waits for, and who has to wait. A host that has nothing yet never has."""
    for number, wave in enumerate(waves):
        if blockers := find_blockers(wave, standings, now_s):
            later = [name for each in waves[number + 1 :] for name in each.hosts]
            return blockers, [name for name in later if standings[name].changed]
    return (), []


def read_rollout(chroot_dir: Path) -> Rollout:
    """How far the last `populate` could go; an empty one without waves. What is damaged is written anew by the next."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        data = json.loads((chroot_dir / ".rollout.json").read_bytes())
        return Rollout(
            tuple(Blocker(**each) for each in data["blockers"]),
            tuple(Held(**each) for each in data["held"]),
            tuple(Proven(**each) for each in data["proven"]),
        )
    return Rollout()


def write_rollout(chroot_dir: Path, rollout: Rollout) -> None:
    if rollout != Rollout():
        text = json.dumps({"format": client.FORMAT} | client.plain(rollout), indent=1) + "\n"
        client.write_atomic(chroot_dir / ".rollout.json", text.encode(), 0o644)
    else:
        client.remove(chroot_dir / ".rollout.json")


def runs_since_s(chroot: Path, found: Found, known: Proven | None) -> float:
    """Since when a host runs what it reports, on this server's clock: when its log came, or the first report that we saw;
    not from before that release was published. Its own clock has no say."""
    current, report, seen_s = found.current, found.report, found.seen_s
    if current is None or report is None or report.last is None or seen_s is None:
        return 0.0
    times = [seen_s, *([known.since_s] if known is not None and known.release == report.release else [])]
    with suppress(OSError), open_logs(chroot) as logs:
        times.append(arrival_s(os.stat(report.last.log, dir_fd=logs, follow_symlinks=False)))
    return max(min(times), client.parse_time(current.published))


# --- publication ---


@contextmanager
def populate_lock(fleet: Fleet, *, wait: bool = False) -> Iterator[None]:
    fleet.chroot_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Whoever can open it could keep us waiting for ever.
    descriptor = os.open(fleet.chroot_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BentoError(
                f"another populate is at work in {fleet.chroot_dir}: wait for its end, or give --wait"
            ) from None
        yield
    finally:
        os.close(descriptor)


def find_owner(fleet: Fleet, name: str) -> tuple[int, int] | None:
    """The uid and gid of a host's account; None when we are not root. BentoError when there is none."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(f"bento-{name}").pw_uid, grp.getgrnam("bento").gr_gid
    except KeyError as error:
        if not fleet.host(f"{name}.pub").exists():
            raise BentoError(
                f"it has no account here, for it has no key: there is no hosts/{name}.pub:"
                f" 'bento.py add {name} --key FILE' makes one"
            ) from None
        raise BentoError(
            f"the account or group {error.args[0].split(':')[-1].strip()} does not exist here: run 'bento.py fleet',"
            " include fleet.nix in this server's configuration and switch to it"
        ) from None


def prepare_chroot(chroot: Path, owner: tuple[int, int] | None) -> None:
    """The directories of a host, with the owners and modes that sshd and the host need; and what a kill left is removed."""
    uid, gid = owner or (0, 0)
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


class Store:
    """Each release once, as ID/ (its tree), ID.tar and ID.parts/, for the chroots of its hosts to link to.

    What a run adds lies in .new until it is on disk for sure; ID.json is the last that such a release gets. Without
    `archives`, there are only trees. Unused is a release whose archive nobody else links to.
    """

    def __init__(self, directory: Path, *, archives: bool = True) -> None:
        self.directory, self.archives = directory, archives
        self.new, self.pool = directory / ".new", directory / ".pool"
        self.parts: dict[str, tuple[Part, ...]] = {}

    def find(self, release: str) -> Path:
        """Where a release lies, if it is here: the path that its names begin with."""
        return (self.new if (self.new / f"{release}.json").exists() else self.directory) / release

    def add(self, release: Release) -> Release:
        """Makes sure that a release is here. The one that it is, if files have changed since they were read."""
        found = self.find(release.id)
        if Path(f"{found}.json").exists() and (release.id in self.parts or self.verify(found, release)):
            return release
        self.directory.mkdir(mode=0o700, exist_ok=True)
        if not self.parts:  # the first of this run
            client.remove(self.new)
        self.new.mkdir(mode=0o700, exist_ok=True)
        aside = self.new / "aside"
        client.remove(aside)
        try:
            aside.mkdir(mode=0o755)
            self.pool.mkdir(exist_ok=True)
            return self.write(release, aside)
        finally:  # on a full disk, the first thing that is needed is room
            client.remove(aside)

    def verify(self, found: Path, release: Release) -> bool:
        """Whether what an earlier run has left is what it was: a chroot may have been damaged, whose files it shares."""
        try:
            data = client.parse_object(Path(f"{found}.json").read_bytes(), f"{found}.json")
            parts = tuple(
                client.read_record(Part, client.as_object(part, "parts", ""), f"{found}.json") for part in data["parts"]
            )
            sizes = [os.stat(f"{found}.parts/{part.sha256}").st_size == part.size for part in parts]
            good = all(sizes) and found.is_dir() and client.hash_file(Path(f"{found}.tar")) == release.id
        except (BentoError, OSError, KeyError, TypeError):
            good = False
        if good:
            self.parts[release.id] = parts
        else:
            self.discard(release.id)
        return good

    def write(self, release: Release, aside: Path) -> Release:
        parts: tuple[Part, ...] = ()
        with open(aside / "tar" if self.archives else os.devnull, "wb", 1 << 20) as file:
            if self.archives:
                os.fchmod(file.fileno(), 0o644)
            written = Release(*write_release(release.members, file, aside / "tree", self.pool), release.members)
        place = self.new / written.id
        if self.archives:
            parts = cut_release(aside, written.members)
            os.rename(aside / "tar", f"{place}.tar")
            if parts:
                os.rename(aside / "parts", f"{place}.parts")
        client.remove(place)
        os.rename(aside / "tree", place)
        text = json.dumps({"format": client.FORMAT, "parts": client.plain(parts)})
        Path(f"{place}.json").write_text(text, "utf-8")
        self.parts[written.id] = parts
        return written

    def settle(self) -> None:
        """All that was added is on disk by now."""
        with suppress(FileNotFoundError):
            # Its .json last: without it a release is none.
            for name in sorted(os.listdir(self.new), key=lambda name: name.endswith(".json")):
                client.remove(self.directory / name)
                os.rename(self.new / name, self.directory / name)

    def discard(self, release: str) -> None:
        client.remove(self.pool)  # on a full disk, its room is needed
        for directory, ending in itertools.product((self.new, self.directory), (".json", ".tar", ".parts", "")):
            client.remove(directory / f"{release}{ending}")
        self.parts.pop(release, None)

    def prune(self) -> None:
        with suppress(FileNotFoundError):
            names = os.listdir(self.directory)
            for name in names:
                if name.startswith("."):
                    client.remove(self.directory / name)
            for release in {name.partition(".")[0] for name in names if not name.startswith(".")}:
                self.drop(self.directory, release)

    def drop(self, directory: Path, release: str) -> None:
        """Gives the room of a release back, if nobody has it: on a full disk, it is the next host's."""
        try:
            unused = os.stat(directory / f"{release}.tar").st_nlink == 1
        except FileNotFoundError:
            unused = True
        if unused or not (directory / f"{release}.json").exists():
            self.discard(release)


def link_tree(source: Path, target: Path, members: Sequence[Member], private: str = "") -> None:
    """The same tree again, of links to the same files, but for those of the name `private`: a copy that may change."""
    os.mkdir(target, 0o755)
    for member in members:
        if member.is_directory:
            os.mkdir(f"{target}/{member.name}", 0o755)
        else:
            link(f"{source}/{member.name}", f"{target}/{member.name}", member.name.rpartition("/")[2] != private)
    for member in reversed(members):
        if member.is_directory:
            os.utime(f"{target}/{member.name}", (1, 1))
    os.utime(target, (1, 1))


def link(source: str, target: str, sharing: bool = True) -> None:
    """A link, or a copy: a file has as many links as it can have, and a chroot may be a file system of its own."""
    if sharing:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EXDEV, errno.EPERM):
                raise
    shutil.copyfile(source, target)
    shutil.copymode(source, target)
    os.utime(target, (1, 1))


def cut_release(staged: Path, members: Sequence[Member]) -> tuple[Part, ...]:
    """Cuts the archive before and after each large file, for hosts that have that file already.

    Each part lies in parts/, beside tar and tree, under its SHA-256; a large one is a hard link to the file in the
    tree, and costs no room. A release without large files has no parts.
    """
    tree, directory = staged / "tree", staged / "parts"
    large = sorted((m for m in members if m.size >= LARGE_FILE), key=lambda m: m.size)[-MAX_LARGE_FILES:]
    parts: list[Part] = []
    if not large:
        return ()
    directory.mkdir(mode=0o755)
    names = {member.name for member in large}
    with open(staged / "tar", "rb") as file:
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


class Published(NamedTuple):
    """A line of a host's `history`."""

    time: str
    release: str
    revision: str | None
    system: str | None


def read_history(chroot: Path | str, limit: int = MAX_HISTORY_BYTES) -> list[Published]:
    """What was published for a host, oldest first; at least the last line if `limit` bytes hold it."""
    lines: list[Published] = []
    try:
        with open(f"{chroot}/history", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
            raw = file.read()
    except FileNotFoundError:
        return []
    for line in raw.splitlines():
        with suppress(ValueError, RecursionError, BentoError, AttributeError):  # cut, or of a later version
            data = json.loads(line)
            take = functools.partial(client.take, data, what="history")
            found = (
                take("time", client.TIME),
                take("release", client.RELEASE_ID),
                one_line(str(data.get("revision") or ""), 200) or None,
            )
            lines.append(Published(*found, take("system", client.STORE_PATH, null=True)))
    return lines


def write_history(chroot: Path, current: Current) -> Path:
    """The history with one more publication, aside."""
    lines = read_history(chroot)[1 - KEEP_HISTORY :]
    lines.append(Published(current.published, current.release, current.revision, current.system))
    aside = chroot / ".history.new"
    aside.write_text("".join(json.dumps(line._asdict()) + "\n" for line in lines), "utf-8")
    aside.chmod(0o644)
    return aside


def place(chroot: Path, store: Store, job: Job, system: str | None, now_s: float) -> Current:
    """Gives the host its links to a release in the store, and writes current.json aside. No host is told yet."""
    release, before, aside = job.release, job.before, chroot / "releases/.new"
    if before is not None:
        tidy(chroot, before)
    found = store.find(release.id)
    client.remove(aside)
    aside.mkdir(mode=0o755)
    try:
        link_tree(found, aside / "tree", release.members)
        link(f"{found}.tar", f"{aside}/tar")
        if parts := store.parts[release.id]:
            (aside / "parts").mkdir(mode=0o755)
            for part in {part.sha256 for part in parts}:
                link(f"{found}.parts/{part}", f"{aside}/parts/{part}")
        # Never earlier than the one before, even if the clock was set back: hosts with several servers compare them.
        published = format_time(now_s)
        if before is not None and before.published >= published:
            published = next_time(before.published)
        for name, ending in (("tree", ""), ("tar", ".tar"), ("parts", ".parts")):
            target = chroot / f"releases/{release.id}{ending}"
            client.remove(target)
            if name != "parts" or parts:
                os.rename(aside / name, target)
    finally:
        client.remove(aside)
    current = Current(job.name, release.id, release.size, published, system, parts, job.revision)
    current = with_signature(current, job.signature)
    new = chroot / ".current.json.new"
    new.write_bytes(client.encode(current))
    new.chmod(0o644)
    write_history(chroot, current)
    return current


def next_time(text: str) -> str:
    try:
        return format_time(client.parse_time(text) + 1)
    except (ValueError, OverflowError):
        return text  # there is none after the year 9999


def reveal(chroot: Path, current: Current) -> None:
    """The moment of publication. Everything that current.json names is on disk by now."""
    os.rename(chroot / ".current.json.new", chroot / "current.json")
    os.rename(chroot / ".history.new", chroot / "history")
    tidy(chroot, current)


def tidy(chroot: Path, current: Current) -> None:
    """What follows a publication. Done again for an unchanged host: a kill may have come between the two."""
    path, target = f"{chroot}/config", f"releases/{current.release}"
    try:
        done = os.readlink(path) == target
    except OSError:
        done = False
        if os.path.isdir(path):
            client.remove(Path(path))
    if not done:
        client.replace_link(Path(path), target)
    history = read_history(chroot, LAST_HISTORY_BYTES)
    if not history or (history[-1].time, history[-1].release) != (current.published, current.release):
        os.rename(write_history(chroot, current), chroot / "history")
    prune_releases(chroot, current.release, history)


def prune_releases(chroot: Path, current: str, history: Sequence[Published]) -> None:
    """Keeps the current release and the ones published just before it: a host may be fetching one of them.

    By the history. Before there was one, an archive had the time of its publication, and one that is later than the
    current one's was placed, but never published.
    """
    releases = f"{chroot}/releases"
    names = os.listdir(releases)
    whole = {name.removesuffix(".tar") for name in names if name.endswith(".tar")} & set(names)
    order = {published.release: number for number, published in enumerate(history)}
    times = {release: os.stat(f"{releases}/{release}.tar").st_mtime for release in whole}
    latest = times.get(current, float("inf"))
    earlier = [r for r in whole - {current} if r in order or times[r] < latest]
    earlier.sort(key=lambda release: (order.get(release, -1), times[release]), reverse=True)
    keep = {current, *earlier[: KEEP_RELEASES - 1]}
    for name in names:
        if name.removesuffix(".tar").removesuffix(".parts") not in keep:
            client.remove(Path(releases, name))


def prune_logs(chroot: Path) -> None:
    """Removes the oldest of what a host left beyond a generous number of logs, in several runs if it left very many. Where
    there is more than one run looks at, what is neither a log nor a report goes too, or it would hide the logs for ever."""
    with suppress(OSError), os.scandir(f"{chroot}/logs") as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, MAX_PRUNED))
        logs = [name for name in names if client.LOG_NAME.fullmatch(name)]
        # A dot in front: under way, or cut short.
        uploads = [name for name in names if client.LOG_NAME.fullmatch(name.removeprefix(".")) and name not in logs]
        kept = {"status.json", ".status.json", ".announcement", *logs[-KEEP_LOGS:], *uploads[-KEEP_LOGS:]}
        for name in names if len(names) == MAX_PRUNED else logs:
            if name not in kept:
                with suppress(OSError):  # a directory, say
                    os.unlink(f"{chroot}/logs/{name}")


def is_chroot(path: Path) -> bool:
    """Whether all that lies in a directory is what Bento makes there: only that may be removed."""
    if not client.HOST_NAME.fullmatch(path.name) or path.is_symlink():
        return False
    try:
        releases = os.listdir(path / "releases")
        names = set(os.listdir(path))
    except OSError:
        return False
    ours = [bool(RELEASE_NAME.fullmatch(name)) for name in releases if not name.startswith(".")]
    return any(ours) and all(ours) and all(name in CHROOT_NAMES or name.startswith(".") for name in names)


def end_sessions(name: str) -> None:
    """Ends what a host's account has open: a session outlives its account, and goes on writing."""
    try:
        uid = pwd.getpwnam(f"bento-{name}").pw_uid
    except KeyError:
        return
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            # Its owner says nothing: of a process that has changed its user, that is root.
            users = re.search(r"^Uid:\s+(.*)$", path.read_text(errors="replace"), re.MULTILINE)
            if uid != 0 and users is not None and set(users[1].split()) == {str(uid)}:
                os.kill(int(path.parent.name), signal.SIGKILL)


def find_gone(fleet: Fleet, hosts: Sequence[str]) -> list[Path]:
    """The chroots of hosts that are in hosts/ no more. BentoError when that cannot be what is meant."""
    if not hosts:
        raise BentoError(
            f"{fleet.directory / 'hosts'}: no hosts in it: pruning would remove every chroot, so nothing was done"
        )
    if not fleet.chroot_dir.is_dir():
        return []
    chroots = sorted(path for path in fleet.chroot_dir.iterdir() if is_chroot(path))
    gone = [path for path in chroots if path.name not in hosts]
    if 2 * len(gone) > len(chroots) and not fleet.named:
        raise BentoError(
            f"--prune would remove {len(gone)} of {len(chroots)} chroots in {fleet.chroot_dir}, so nothing was done:"
            f" if {fleet.directory} is their fleet, say so with --fleet"
        )
    return gone


def prune_chroots(gone: Sequence[Path], plan: Plan, failures: list[Failure]) -> None:
    for path in gone:
        try:
            if not plan.dry_run:
                # Unpublish first, so that a kill in the middle never leaves a release announced and gone; releases/
                # last, by which the next run knows it for a chroot.
                client.remove(path / "current.json")
                if os.geteuid() == 0:
                    client.remove(GCROOTS / path.name)
                    end_sessions(path.name)
                for left in ("logs", "config", ""):
                    client.remove(path / left)
        except OSError as error:  # the host is writing there, say
            failures.append(Failure(path.name, str(error)))
            continue
        done = "would remove" if plan.dry_run else "removed"
        told = {"host": path.name, "result": done.replace(" ", "-")}
        print(json.dumps(told) if plan.as_json else f"{path.name}: {done} {path}")


# --- signatures ---

ARMOR = "-----BEGIN SSH SIGNATURE-----\n"
VALID_DAYS, MAX_DAYS = 30, 36_500


class Signature(NamedTuple):
    """`hosts/NAME.sig`: the signed text, what it says, and the signature as ssh-keygen writes it."""

    text: str
    signed: client.Signed
    armored: str


def read_signature(fleet: Fleet, name: str) -> Signature | None:
    """What the administrator signed for a host; None where nothing is."""
    where = f"hosts/{name}.sig"
    try:
        content = read_limited(fleet.directory / where, client.MAX_JSON_BYTES).decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BentoError(f"{where}: cannot be read: {one_line(str(error))}") from None
    text, armor, rest = content.partition(ARMOR)
    if not armor:
        raise BentoError(f"{where}: no signature in it: 'bento.py sign {name} --key FILE' makes it anew")
    return Signature(text, client.parse_signed(text, where), armor + rest)


def check_signature(fleet: Fleet, name: str, release: Release) -> Signature | None:
    """The host's signature, if it is of this very release. BentoError when it is of another one: that is not for the
    host, which would refuse it."""
    found, wanted = read_signature(fleet, name), (name, release.id, release.size)
    if found is None or (found.signed.host, found.signed.release, found.signed.size) == wanted:
        return found
    about = f"hosts/{name}.sig is for release {found.signed.release[:12]}, and this is {release.id[:12]}"
    if found.signed.host != name:
        about = f"hosts/{name}.sig is for host {found.signed.host!r}"
    names = differing(fleet.chroot(name) / "releases" / found.signed.release, release.members)
    shown = ", ".join(one_line(name, 80) for name in names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
    differs = f" (they differ in {shown})" if names else ""
    raise BentoError(f"not signed: {about}{differs}: 'bento.py sign {name} --key FILE', where the key is")


def with_signature(current: Current, found: Signature | None) -> Current:
    """What is published of a release beside the signature that it has, or has not, in hosts/."""
    system = check_system(found, current.system)
    text, armored = (found.text, found.armored) if found is not None else (None, None)
    return current._replace(system=system, signed=text, signature=armored)


def check_system(found: Signature | None, system: str | None) -> str | None:
    """The system to publish beside the release: what was built here has to be what was signed."""
    if found is None or found.signed.system is None:
        return system
    if system is not None and system != found.signed.system:
        raise BentoError(f"not signed: this was built to {system}, and {found.signed.system} is signed")
    return found.signed.system


def differing(tree: Path, members: Sequence[Member]) -> list[str]:
    """In which members a release that lies here differs from those of this checkout; none if it does not lie here."""
    try:
        there = {str(path.relative_to(tree)): fingerprint(path) for path in tree.rglob("*")}
        here = {member.name: fingerprint(Path(member.path)) for member in members} if there else {}
    except OSError:
        return []
    return sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))


def fingerprint(path: Path) -> str:
    return "directory" if path.is_dir() else f"{path.stat().st_mode & 0o100} {client.hash_file(path)}"


# --- builds ---


def log_directory() -> Path:
    """Where the full log of each host's last check or build is kept."""
    if os.geteuid() == 0:
        return Path("/var/log/bento")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "bento"


def rebuild(action: str, tree: Path, name: str, limit_s: float) -> str | None:
    """Builds (or evaluates) a release as the host will, in a tree that nobody else needs. The system after a build."""
    # What a build says may be nobody else's business.
    log_directory().mkdir(mode=0o750, parents=True, exist_ok=True)
    os.chmod(log_directory(), 0o750)
    client.remove(log_directory() / f"{name}.log")
    argv = client.rebuild_argv(action, tree, client.read_recipe(tree, name))
    run_logged(f"nixos-rebuild {action}", argv, name, limit_s, tree.parent)
    return os.path.realpath(tree.parent / "result") if action == "build" else None


def run_logged(what: str, argv: Sequence[str], name: str, limit_s: float, directory: Path | None = None) -> None:
    """Runs a program, with what it says in the host's log. BentoError with the end of that when it fails or takes longer
    than `limit_s` seconds."""
    log = client.Log(log_directory() / f"{name}.log")
    with log.output() as out:
        done = client.run(argv, check=False, output=out, cwd=directory, timeout=limit_s)
    if done.code != 0:
        said = [one_line(line, 400) for line in log.tail(16 << 10).splitlines()[-15:]] or [done.output]
        how = f"did not end within {limit_s:.0f} s" if done.code is None else f"exit {done.code}"
        raise BentoError("\n  ".join([f"{what}: {how}; all of it is in {log.path}, which ends:", *said]))


def keep_from_collection(name: str, system: str) -> None:
    """A garbage collection root, so that this server can serve the build. Only root can make one there."""
    if os.geteuid() == 0:
        GCROOTS.mkdir(parents=True, exist_ok=True)
        client.replace_link(GCROOTS / name, system)


class Progress:
    """Says on stderr what the hosts are at: on a terminal in lines that are drawn over, elsewhere one a change, unless
    it is `quiet` there: cron mails what is on stderr."""

    def __init__(self, quiet: bool) -> None:
        self.live, self.quiet = sys.stderr.isatty(), quiet
        self.running: dict[str, tuple[str, float]] = {}
        self.drawn = 0
        self.due_s = time.monotonic() + 1

    def set(self, name: str, phase: str) -> None:
        self.running[name] = (phase, time.monotonic())
        if not self.live and not self.quiet:
            print(f"{name}: {phase}", file=sys.stderr)

    def tell(self, name: str, phase: str) -> None:
        """On a terminal only: the one host that is at work, if the whole takes more than a moment."""
        now_s = time.monotonic()
        if self.live and now_s > self.due_s:
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


class Work:
    """A check, a build, or a publication under way: what it is to do, and what has become of it.

    `lock`: for what is read, and for the store, when several builds go on. `users`: how many hosts still need a
    directory, where each release is only needed for their builds. `decided`: each host's release, when the waves were
    asked.
    """

    def __init__(self, fleet: Fleet, plan: Plan, store: Store) -> None:
        self.fleet, self.plan, self.store = fleet, plan, store
        self.failures: list[Failure] = []
        self.counts = {"published": 0, "unchanged": 0, "held": 0}
        self.progress = Progress(quiet=plan.publish)
        self.lock = threading.RLock()
        self.users: Counter[str] = Counter()
        self.decided: dict[str, str] = {}

    def add(self, job: Job) -> Job:
        """The job with its release in the store: for all that share it the one that is there now."""
        release, known = self.store.add(job.release), self.fleet.source.releases
        if self.decided.get(job.name, release.id) != release.id:  # a newer one has to begin with the first wave
            raise BentoError(f"hosts/{job.name}: changed while this was at work: run this again")
        if release.id != job.release.id:
            known.update({top: release for top, shared in known.items() if shared is job.release})
        return job._replace(release=release)

    def fail(self, name: str, error: Exception) -> None:
        """One host's failure, whatever it is: it stops no other."""
        text = str(error)
        if not isinstance(error, BentoError | OSError):
            text = f"{type(error).__name__}: {text} (this is an error in Bento: -v shows where)"
            if client.verbose:
                traceback.print_exception(error)
        self.failures.append(Failure(name, text))
        self.fleet.source.clear()  # if a file has changed, the next host gets it as it is now
        if self.plan.as_json:
            self.progress.clear()
            print(json.dumps({"host": name, "result": "failed", "error": text}), flush=True)

    def tell(self, job: Job, result: str, words: str, system: str | None = None) -> None:
        if self.plan.jobs > 1:  # the others go on
            self.progress.draw()
        else:
            self.progress.clear()
        if self.plan.as_json:
            told = {"host": job.name, "result": result, "release": job.release.id, "size": job.release.size}
            print(json.dumps(told | {"revision": job.revision, "system": system}), flush=True)
        elif words:
            print(f"{job.name}: {words}", flush=True)


def examine(work: Work, name: str) -> Job:
    """What there is to publish for a host, and whether it is published already."""
    fleet, plan = work.fleet, work.plan
    owner = find_owner(fleet, name) if plan.publish and not plan.dry_run else None
    release, recipe = read_release(fleet, name)
    signature = check_signature(fleet, name, release) if plan.publish else None
    chroot, before = fleet.chroot(name), None
    try:
        before = read_published(chroot, name) if plan.publish else None
    except BentoError as error:
        if name not in work.decided:  # else it was told before the waves were asked
            work.progress.clear()
            print(f"{name}: {error}: published anew", file=sys.stderr)
    except PermissionError:
        if not plan.dry_run:  # which is for anybody
            raise
    if before is not None and before.release == release.id and is_whole(chroot, before):
        return Job(name, release, owner, before, True, before.revision, signature)
    for found in local_inputs(release.members, recipe):
        fleet.source.leave_out("local", "", f"hosts/{name}: {found}")
    if plan.publish and recipe != Recipe(name):
        check_client(chroot, name)
    top = os.path.realpath(f"{fleet.real_hosts}/{name}")
    return Job(name, release, owner, before, False, plan.revision or fleet.source.revision(top), signature)


def check_client(chroot: Path, name: str) -> None:
    """BentoError for a host that would not heed a bento.json. One that has never reported gets its client with its first
    release."""
    report = read_report(chroot, name).report
    found = re.match(r"(\d+)\.(\d+)", report.client) if report else None
    if report is not None and (found is None or (int(found[1]), int(found[2])) < RECIPE_SINCE):
        raise BentoError(
            f"its client, version {report.client}, does not know bento.json and would build something else:"
            " publish a release without one first, that brings it this version's utils/"
        )


# A host that has passed, its system after a build, and how long it took.
Built = tuple[Job, str | None, float]


def build_one(work: Work, name: str) -> Built | Exception:
    """One host's check or build, from the very bytes that are published, in a tree of its own."""
    directory, job, began_s = work.store.directory / f".build-{name}", None, time.monotonic()
    try:
        with work.lock:
            work.progress.set(name, "reading")
            job = examine(work, name)
            if job.unchanged and (work.plan.action != "build" or (job.before is not None and job.before.system)):
                return job, None, 0.0
            job = work.add(job)
            assert work.plan.action is not None
            client.remove(directory)
            directory.mkdir(mode=0o755)
            if work.plan.publish:
                prepare_chroot(work.fleet.chroot(name), job.owner)
            # The tree's name matters: a channel configuration that says ./. gets it into a store path. And Nix may
            # write to a flake.lock.
            found = work.store.find(job.release.id)
            link_tree(found, directory / "config", job.release.members, private="flake.lock")
        work.progress.set(name, "building" if work.plan.action == "build" else "checking")
        if work.plan.jobs == 1:
            work.progress.draw()
        system = rebuild(work.plan.action, directory / "config", name, work.plan.limit_s)
        if system is not None:
            keep_from_collection(name, system)
            if work.plan.after:  # its last word is the system: no shell reads either
                run_logged(shlex.join(work.plan.after), [*work.plan.after, system], name, work.plan.limit_s)
        return job, system, time.monotonic() - began_s
    except Exception as error:
        return error
    finally:
        work.progress.end(name)
        with suppress(OSError), work.lock:
            client.remove(directory)
            top = os.path.realpath(work.fleet.host(name))
            work.users[top] -= 1
            if job is not None and work.users[top] == 0:
                work.store.discard(job.release.id)


def build_all(work: Work, names: Sequence[str]) -> Generator[Built, None, None]:
    """Checks or builds hosts, several at once; each that has passed."""
    one_by_one = ((name, build_one(work, name)) for name in names)
    for name, result in at_once(work, names) if work.plan.jobs > 1 else one_by_one:
        if isinstance(result, Exception):
            work.fail(name, result)
        else:
            yield result


def at_once(work: Work, names: Sequence[str]) -> Iterator[tuple[str, Built | Exception]]:
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    with ThreadPoolExecutor(max_workers=work.plan.jobs) as pool:
        jobs = {pool.submit(build_one, work, name): name for name in names}
        waiting = set(jobs)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1 if work.progress.live else None, return_when=FIRST_COMPLETED)
                work.progress.draw()
                yield from ((jobs[job], job.result()) for job in done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(client.children):
                client.end_group(process)
            raise


# --- commands ---


def complain(errors: Iterable[str]) -> int:
    """Prints each failure once; the exit code that they make."""
    code = 0
    for error in errors:
        print(f"bento: error: {error}", file=sys.stderr)
        code = 1
    return code


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"bento: warning: {warning}", file=sys.stderr)


def group_failures(failures: Iterable[Failure]) -> list[str]:
    """A line for each failure, and one for all hosts that have the same, but for what is named after each host."""
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        # A path in hosts/ is another place to look at, for each host.
        own = rf"(?<!hosts/)(?<=[^\s\w]){re.escape(failure.host)}(?![\w/])"
        groups.setdefault(re.sub(own, "NAME", failure.text), []).append(failure)
    lines = []
    for group in groups.values():
        names = show_names([failure.host for failure in group])
        who = group[0].host if len(group) == 1 else f"{counted(len(group))} ({names})"
        lines.append(f"{who}: {group[0].text}")
    return lines


def command_add(fleet: Fleet, name: str, key: str | None, *, flake: bool, link_to: str | None) -> int:
    if not client.HOST_NAME.fullmatch(name):
        raise UsageError(f"{one_line(name)}: {NO_HOST_NAME}")
    if name == "waves":
        raise UsageError("waves: no host name: hosts/waves is the order of a roll-out")
    lines = read_key_file(key) if key is not None else []
    host, public = fleet.host(name), fleet.host(f"{name}.pub")
    made: list[Path] = []
    if not os.path.lexists(host):
        host.parent.mkdir(parents=True, exist_ok=True)
        made = link_host(fleet, host, link_to) if link_to is not None else scaffold(fleet, host, flake)
    elif not lines or flake or link_to is not None:
        raise BentoError(f"hosts/{name} is there already{': give --key alone' if lines else ''}")
    if lines:
        client.write_atomic(public, ("\n".join(lines) + "\n").encode(), 0o644)
        fleet.source.make_known(*made, public)
        print(f"hosts/{name}.pub: {counted(len(lines), 'key')}")
        print("next: 'bento.py fleet', switch this server to it, 'bento.py populate'")
    else:
        fleet.source.make_known(*made)
        print(
            f"next: 'python3 bento_client.py --host {name} key' on the machine, 'bento.py add {name} --key FILE' here"
        )
    return 0


def read_key_file(key: str) -> list[str]:
    """The public keys in a file, or on standard input."""
    try:
        text = sys.stdin.read() if key == "-" else Path(key).read_text()
    except UnicodeDecodeError:
        raise BentoError(f"{key}: not a public key: it is no text") from None
    given = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    lines = [" ".join(parse_key(line, key)).strip() for line in given]
    if not lines:
        raise BentoError(f"{key}: no key in it: put the output of 'bento-client key' there")
    return lines


def link_host(fleet: Fleet, host: Path, link_to: str) -> list[Path]:
    """Makes a host a link to a tree that hosts share: a relative one where both move together."""
    real = os.path.realpath(link_to)
    if not os.path.isdir(real):
        raise BentoError(f"--link {link_to}: not a directory")
    together = f"{real}/".startswith(f"{fleet.real}/") or f"{fleet.real}/".startswith(f"{real}/")
    target = os.path.relpath(real, os.path.realpath(host.parent)) if together else real
    host.symlink_to(target)
    print(f"hosts/{host.name}: made, a link to {target}")
    return [host]


def scaffold(fleet: Fleet, host: Path, flake: bool) -> list[Path]:
    """Makes a host's directory, with a link to Bento's module. What is new for Git to know."""
    utils, made = find_utils(fleet)
    aside = host.with_name(f".{host.name}.new")
    client.remove(aside)
    aside.mkdir()
    (aside / "utils").symlink_to(os.path.relpath(utils, f"{os.path.realpath(host.parent)}/{host.name}"))
    (aside / "configuration.nix").write_text(CONFIGURATION.replace("@HOST@", host.name))
    if flake:
        (aside / "flake.nix").write_text(FLAKE.replace("@HOST@", host.name))
    os.rename(aside, host)
    copied = ", and utils/, a copy of Bento's" if made else ""
    print(f"hosts/{host.name}/: made{copied}; put the machine's own configuration there and set the server's name")
    return [host, *made]


def find_utils(fleet: Fleet) -> tuple[str, list[Path]]:
    """Where the hosts of this fleet find Bento's module, in the fleet's directory; and what had to be made for that."""
    utils, bento = fleet.directory / "utils", Path(__file__).resolve().parent / "utils"
    if not os.path.lexists(utils) and f"{bento}/".startswith(f"{fleet.real}/"):
        return str(bento), []
    if os.path.lexists(utils):
        return f"{fleet.real}/utils", []
    utils.mkdir()
    for name in ("bento.nix", "bento_client.py"):
        (utils / name).write_bytes((bento / name).read_bytes())
    return f"{fleet.real}/utils", [utils]


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


def lost_keys(before: str, after: str) -> list[str]:
    """What to do about hosts that had a key in the fleet.nix before, and have it no more: sshd does not end a session."""
    kept = set(KEY_BLOB.findall(after))
    hosts = re.findall(r'"([A-Za-z0-9_-]+)" = \[(.*?)\];', before, re.DOTALL)
    names = [name for name, keys in hosts if not kept.issuperset(KEY_BLOB.findall(keys))]
    return [
        f"{name}: a key is gone, and a session that is open with it goes on: after the switch, end it with"
        f" 'pkill -KILL -u bento-{name}'"
        for name in names
    ]


def command_fleet(fleet: Fleet) -> int:
    """Writes fleet.nix. With one bad key it writes nothing: a host that were left out would be locked out."""
    keys, errors = check_keys(fleet)
    warn(left_out_keys(fleet))
    if errors:
        return complain([*dict.fromkeys(errors.values()), "fleet.nix is left as it was"])
    template = fleet.directory / "fleet.nix.in"
    if not template.exists():
        template = Path(__file__).resolve().parent / "fleet.nix.in"
    text = format_fleet(template.read_text("utf-8"), keys, str(fleet.chroot_dir)).encode()
    target = fleet.directory / "fleet.nix"
    if target.exists() and target.read_bytes() == text:
        print(f"fleet.nix: unchanged, {counted(len(keys))}")
    else:
        before = target.read_text("utf-8", errors="replace") if target.exists() else ""
        client.write_atomic(target, text, 0o644)
        fleet.source.make_known(target)
        warn(lost_keys(before, text.decode()))
        print(f"fleet.nix: written, {counted(len(keys))}; include it in this server's configuration and switch")
    return 0


def command_rebuild(fleet: Fleet, wanted: Sequence[str], plan: Plan) -> int:
    """`check` and `build`: what the hosts will do with their releases, done here."""
    import tempfile

    hosts, errors = find_hosts(fleet, wanted)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bento-"))
        work = Work(fleet, plan, Store(Path(directory, "store"), archives=False))
        work.users.update(os.path.realpath(fleet.host(name)) for name in hosts)
        built = stack.enter_context(closing(build_all(work, hosts)))
        for job, system, took_s in built:
            if system is not None:
                note_system(fleet, job.name, job.release.id, system)
            result = "evaluates" if system is None else "built"
            words = f"{job.release.id[:12]} {system or result} ({client.duration(took_s)})"
            work.tell(job, result, words, system)
    work.progress.clear()
    warn(fleet.source.warnings())
    return complain([*errors, *group_failures(work.failures)])


class Vow(NamedTuple):
    """What `sign` was asked to vouch for. `key`: a private key's file, or a public one's whose private half an agent or a
    security key has. `revoked`: fingerprints."""

    key: str
    days: int = VALID_DAYS
    build: bool = False
    unsign: bool = False
    revoked: tuple[str, ...] = ()


def command_sign(fleet: Fleet, wanted: Sequence[str], vow: Vow) -> int:
    """Signs what `hosts/` holds now, wherever the same commit is checked out: a release has the same name everywhere."""
    import tempfile  # most commands need none, and status is mostly start-up

    if abs(vow.days) > MAX_DAYS:
        raise UsageError(f"--days {vow.days}: at most {MAX_DAYS}, a hundred years")
    hosts, errors = find_hosts(fleet, wanted)
    failures: list[Failure] = []
    with tempfile.TemporaryDirectory(prefix="bento-") as made:
        work, texts = Path(made), {}
        for name in hosts:
            try:
                texts[name] = vow_text(fleet, name, vow, work)
                (work / name).write_text(texts[name], "utf-8")
            except (BentoError, OSError) as error:
                failures.append(Failure(name, str(error)))
        if texts:
            make_signatures(vow.key, work, list(texts))
        for name, text in texts.items():
            armored = (work / f"{name}.sig").read_bytes()
            client.write_atomic(fleet.host(f"{name}.sig"), text.encode() + armored, 0o644)
            signed = client.parse_signed(text, name)
            print(f"{name}: signed {signed.release[:12]}, until {signed.expires}")
    return complain([*errors, *group_failures(failures)])


def vow_text(fleet: Fleet, name: str, vow: Vow, work: Path) -> str:
    """The text to sign for a host."""
    release, _ = read_release(fleet, name)
    before, now_s = None, time.time()
    with suppress(BentoError):  # a damaged one is made anew
        before = read_signature(fleet, name)
    system = before.signed.system if before is not None and before.signed.release == release.id else None
    if vow.build:
        tree = work / f"{name}.build" / "config"
        tree.parent.mkdir()
        write_release(release.members, None, tree)
        system = rebuild("build", tree, name, BUILD_LIMIT_S)
    # To the full day, so that whoever signs the same on this day writes the same.
    day_s = 24 * 3600
    expires = format_time((now_s // day_s + vow.days + 1) * day_s)
    serial = max(int(now_s), before.signed.serial + 1 if before is not None else 0)
    return client.format_signed(
        client.Signed(name, release.id, release.size, system, serial, expires, vow.unsign, vow.revoked)
    )


def make_signatures(key: str, work: Path, names: Sequence[str]) -> None:
    """Has ssh-keygen sign these files, with its questions for a passphrase or a touch going to the person."""
    if not Path(key).is_file():
        raise UsageError(f"--key {key}: no such file: it is an SSH key, which 'ssh-keygen -t ed25519' makes")
    argv = ["ssh-keygen", "-q", "-Y", "sign", "-f", os.path.abspath(key), "-n", client.NAMESPACE, *names]
    try:
        done = subprocess.run(argv, cwd=work, check=False)
    except OSError as error:
        raise BentoError(f"cannot run ssh-keygen: {error.strerror}; is OpenSSH on PATH?") from None
    missing = [name for name in names if not (work / f"{name}.sig").exists()]
    if done.returncode != 0 or missing:
        raise BentoError(f"ssh-keygen could not sign with {key}: exit {done.returncode}: nothing is signed")


def say_of_each(hosts: Sequence[str], errors: list[str], say: Callable[[str], str], prefix: str = "") -> int:
    """Prints what there is to say of each host. One host's error stops no other."""
    for name in hosts:
        try:
            words = say(name)
        except (BentoError, OSError) as error:
            errors.append(f"{prefix}{name}: {error}")
            continue
        if words:
            print(f"{prefix}{name}: {words}", flush=True)
    return complain(errors)


def command_diff(fleet: Fleet, wanted: Sequence[str]) -> int:
    """What would change on each host between the system it reports and the one built here from its release."""
    return say_of_each(*find_hosts(fleet, wanted), functools.partial(diff_host, fleet))


def is_here(system: str) -> bool:
    """Whether this server's store has what a host reports: nothing but a store path reaches a command line."""
    return bool(re.fullmatch(r"/nix/store/[a-z0-9]{32}-[A-Za-z0-9+._?=-]+", system)) and os.path.exists(system)


def command_closure(fleet: Fleet, package: str) -> int:
    """Which versions of a package are in the system that each host reports, as far as this server's store has it."""
    versions = functools.cache(functools.partial(find_versions, package))

    def say(name: str) -> str:
        found = read_report(fleet.chroot(name), name)
        if found.report is None or not found.report.system:
            return f"unknown: {found.problem or 'it has not reported'}"
        system = found.report.system
        return versions(system) if is_here(system) else f"unknown: {one_line(system)} is not in this server's store"

    return say_of_each(*find_hosts(fleet, []), say)


OUTPUTS = "bin|dev|lib|out|man|doc|info|static|debug|devdoc|data|dist"


def find_versions(package: str, system: str) -> str:
    """A store path is named after a package and its version, which begins with the first digit behind a dash."""
    paths = client.run(["nix-store", "--query", "--requisites", system], timeout=600).output
    pattern = rf"/nix/store/[a-z0-9]{{32}}-{re.escape(package)}(?:-([0-9].*?))?(?:-(?:{OUTPUTS}))?"
    found = {match[1] or "without a version" for path in paths.split() if (match := re.fullmatch(pattern, path))}
    return ", ".join(sorted(found)) or "none"


def diff_host(fleet: Fleet, name: str) -> str:
    current = read_published(fleet.chroot(name), name)
    found = read_report(fleet.chroot(name), name)
    report = found.report
    if current is None or current.system is None:
        raise BentoError("its release was not built here: run 'bento.py build', or 'populate --build'")
    if report is None:
        raise BentoError(found.problem or "it has not reported a system yet")
    if report.system == current.system:
        return f"no difference, it runs {current.system}"
    for system in (report.system, current.system):
        if not is_here(system):
            raise BentoError(f"{one_line(system)} is not in this server's store: nothing to compare with")
    tool = ["nvd", "diff"] if shutil.which("nvd") else [*NIX, "store", "diff-closures"]
    changes = client.run([*tool, report.system, current.system], timeout=600).output
    return f"{report.system} -> {current.system}\n{changes.rstrip()}"


NIX = ["nix", "--extra-experimental-features", "nix-command flakes"]


def command_update(fleet: Fleet, name: str | None) -> int:
    """Updates the lock files of the hosts' flakes, each flake once, and says what moved. `name`: of one input."""
    import tempfile

    done: set[str] = set()

    def say(host: str) -> str:
        with tempfile.TemporaryDirectory(prefix="bento-") as work:
            return update_host(fleet, host, name, Path(work), done)

    return say_of_each(*find_hosts(fleet, []), say, "hosts/")


def update_host(fleet: Fleet, host: str, name: str | None, work: Path, done: set[str]) -> str:
    """Updates the lock of a host's flake, in a copy of its release: Nix would read all that lies about in the tree, and
    keep it where everybody can read it. What moved; nothing if it is no flake, or one that is `done`."""
    top = fleet.host(host)
    if not top.is_dir():
        return ""
    directory = os.path.realpath(top / client.read_recipe(top, host).directory)
    if directory in done or not os.path.exists(f"{directory}/flake.nix"):
        return ""
    done.add(directory)
    before = read_lock(directory)
    if name is not None and name not in before and before:
        return f"has no input {name}"
    members = list_members(fleet, host)
    recipe = find_recipe(fleet, members, host)
    write_release(members, None, work / "config")
    update_lock(work / "config", recipe.directory, name)
    made, lock = work / "config" / recipe.directory / "flake.lock", Path(directory, "flake.lock")
    if made.exists() and not (lock.exists() and lock.read_bytes() == made.read_bytes()):
        owner = os.stat(directory)
        client.write_atomic(lock, made.read_bytes(), 0o644)
        with suppress(PermissionError):  # the directory is not ours alone; only root can give a file away
            os.chown(lock, owner.st_uid, owner.st_gid, follow_symlinks=False)
        fleet.source.make_known(lock)
    after = read_lock(directory)
    moved = [f"{i} {before.get(i, 'new')} -> {after[i]}" for i in sorted(after) if before.get(i) != after[i]]
    return "; ".join(moved) or "nothing moved"


def update_lock(tree: Path, directory: str, name: str | None) -> None:
    """Nix 2.19 changed how the flake and the input to update are given."""
    found = re.search(r"(\d+)\.(\d+)", client.run(["nix", "--version"], timeout=60).output)
    url = client.flake_url(tree, directory)
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
            if current is None or current.release != release:
                return
            # What is signed is what the host takes: another one beside it would keep populate from passing.
            signed = client.parse_signed(current.signed, "").system if current.signed is not None else None
            if current.system != system and signed in (None, system):
                text = client.encode(current._replace(system=system))
                client.write_atomic(fleet.chroot(name) / "current.json", text, 0o644)


def populate_hosts(work: Work, names: Sequence[str]) -> None:
    """Publishes what is new, many hosts at a time, or each host when it has passed its build."""
    if work.plan.action is not None and not work.plan.dry_run:
        with closing(build_all(work, names)) as built:
            for job, system, _ in built:
                with work.lock:
                    placed = attempt(work, job.name, job, system)
                    announce(work, [placed] if placed else [])
        return
    for first in range(0, len(names), BATCH):
        jobs = []
        for name in names[first : first + BATCH]:
            work.progress.tell(name, "publishing")
            jobs.append(attempt(work, name))
        announce(work, [job for job in jobs if job])


def attempt(work: Work, name: str, job: Job | None = None, system: str | None = None) -> tuple[Job, Current] | None:
    """Puts a host's release in place, if it is a new one. One host's failure stops no other, whatever it is."""
    try:
        job = job or examine(work, name)
        chroot, release = work.fleet.chroot(name), job.release
        if job.unchanged and job.before is not None:
            if not work.plan.dry_run:
                prepare_chroot(chroot, job.owner)
                current = with_signature(job.before._replace(system=system or job.before.system), job.signature)
                if current != job.before:
                    client.write_atomic(chroot / "current.json", client.encode(current), 0o644)
                tidy(chroot, job.before)
                prune_logs(chroot)
            work.counts["unchanged"] += 1
            work.tell(job, "unchanged", f"unchanged, {release.id[:12]}" if client.verbose else "", system)
        elif work.plan.dry_run:
            work.counts["published"] += 1
            work.tell(job, "would-publish", f"would publish {release.id[:12]} ({release.size} bytes)")
        else:
            prepare_chroot(chroot, job.owner)
            job = work.add(job)
            check_system(check_signature(work.fleet, name, job.release), system)  # files may have changed meanwhile
            current = place(chroot, work.store, job, system, time.time())
            return job._replace(release=job.release._replace(members=())), current
    except BrokenPipeError:  # whoever reads what we say has gone: no host's failure
        raise
    except Exception as error:
        work.fail(name, error)
        if job is not None and not work.plan.dry_run:
            work.store.drop(work.store.new, job.release.id)
    return None


def announce(work: Work, placed: Sequence[tuple[Job, Current]]) -> None:
    """Tells hosts of what is in place, with two syncs of the disk for them all."""
    if not placed:
        return
    os.sync()
    work.store.settle()
    work.progress.clear()
    revealed = []
    for job, current in placed:
        try:
            reveal(work.fleet.chroot(job.name), current)
            revealed.append((job, current))
        except Exception as error:
            work.fail(job.name, error)
    os.sync()
    work.counts["published"] += len(revealed)
    for job, current in revealed:  # not before: a reader that goes away stops us here
        words = f"published {current.release[:12]} ({current.size} bytes)"
        work.tell(job, "published", words, current.system)


def survey(work: Work, waves: Sequence[Wave], good: set[str], known: Sequence[Proven]) -> dict[str, Standing]:
    """Where each host stands. What cannot be published is a failure, told once."""
    standings, proven = dict[str, Standing](), {each.host: each for each in known}
    for name in (name for wave in waves for name in wave.hosts):
        chroot = work.fleet.chroot(name)
        work.progress.tell(name, "comparing")
        standings[name] = Standing("", Found(None, None, None, "unreadable"))
        try:
            found = read_host(str(chroot), name)
            standings[name] = Standing("", found, runs_since_s(chroot, found, proven.get(name)))
            if name in good:
                standings[name] = standings[name]._replace(wanted=examine(work, name).release.id)
        except Exception as error:
            work.fail(name, error)
    return standings


def plan_rollout(work: Work, hosts: Sequence[str], good: Sequence[str]) -> Rollout:
    """How far hosts/waves lets this run go."""
    waves, now_s = [] if work.plan.now else read_waves(work.fleet, hosts), time.time()
    before = read_rollout(work.fleet.chroot_dir)
    standings = survey(work, waves, set(good), before.proven)
    work.decided = {name: standing.wanted for name, standing in standings.items()}
    blockers, names = decide(waves, standings, now_s)
    since_s = {each.host: each.since_s for each in before.held}
    held = [Held(name, since_s.get(name, now_s), standings[name].published, standings[name].wanted) for name in names]
    proven = [
        Proven(name, since_s, report.release)
        for name, (_, found, since_s) in standings.items()
        if (report := found.report) is not None and report.release is not None
    ]
    return Rollout(blockers, tuple(held), tuple(proven))


def roll_out(work: Work, hosts: Sequence[str], good: Sequence[str]) -> list[Failure]:
    """Publishes as far as hosts/waves lets us, and tells whom it holds. `good`: the hosts whose keys are in order. Returns
    the hosts that failed with others behind them."""
    chroots, dry_run = work.fleet.chroot_dir, work.plan.dry_run
    rollout = plan_rollout(work, hosts, good)
    if not dry_run:  # now, for what follows may take hours
        write_rollout(chroots, rollout)
    out = {each.host for each in rollout.held} | {failure.host for failure in work.failures}
    populate_hosts(work, [name for name in good if name not in out])
    failed = {failure.host for failure in work.failures}
    blockers = [each._replace(why="not published") if each.host in failed else each for each in rollout.blockers]
    after = rollout._replace(blockers=tuple(blockers))
    if after != rollout and not dry_run:
        write_rollout(chroots, after)
    tell_rollout(work, after)
    # What could not be published is told already.
    stops = [each for each in after.blockers if after.held and each.why in FAILED and each.why != "not published"]
    words = "this stops the roll-out, until a release mends it: see 'bento.py log'"
    return [Failure(each.host, f"{each.why}: {words}") for each in stops]


def tell_rollout(work: Work, rollout: Rollout) -> None:
    """Whom it holds, once."""
    work.progress.clear()
    work.counts["held"] = len(rollout.held)
    if not rollout.held:
        return
    waits_for = [blocker._asdict() for blocker in rollout.blockers]
    if not work.plan.as_json:
        print(f"{counted(len(rollout.held))}: held: {rollout.reason}")
    for each in rollout.held if work.plan.as_json else ():
        told = {"host": each.host, "result": "held", "release": each.wanted, "since": format_time(each.since_s)}
        print(json.dumps(told | {"waits_for": waits_for}))


def read_refusals(fleet: Fleet) -> dict[str, Refusal]:
    """The hosts whose configuration failed to be published when it was tried last: the lock's holder writes them there."""
    found: dict[str, Refusal] = {}
    for name, data in read_json(fleet.chroot_dir / ".lock").items():
        with suppress(BentoError, AttributeError, TypeError):
            take = functools.partial(client.take, data, what=".lock")
            found[name] = Refusal(take("since", client.TIME), take("times", int), one_line(take("error", str), 1000))
    return found


def remember_failures(work: Work, hosts: Sequence[str], failures: Iterable[Failure]) -> None:
    """Keeps what failed until it passes, for `status`: what is published meanwhile looks as good as ever."""
    before, now = read_refusals(work.fleet), format_time(time.time())
    kept = {name: refusal for name, refusal in before.items() if name not in hosts}
    for failure in failures:
        since, times, _ = before.get(failure.host, Refusal(now, 0, ""))
        kept[failure.host] = Refusal(since, times + 1, one_line(failure.text, 1000))
    text = json.dumps({name: refusal._asdict() for name, refusal in kept.items()}) if kept else ""
    with suppress(OSError):  # a full disk
        (work.fleet.chroot_dir / ".lock").write_text(text)


def publish(work: Work, hosts: Sequence[str], bad_keys: Mapping[str, str], *, everyone: bool) -> None:
    """Publishes hosts, as far as hosts/waves lets us where it is all of them; keeps for `status` what failed."""
    chroots, plan = work.fleet.chroot_dir, work.plan
    if not plan.dry_run:
        for left in (chroots / ".copies", *chroots.glob(".tmp-*")):  # of version 1.0; of a kill
            client.remove(left)
        work.store.prune()
    unfit = [Failure(name, bad_keys[name]) for name in hosts if name in bad_keys]
    for name, error in sorted(unfit) if plan.as_json else ():
        print(json.dumps({"host": name, "result": "failed", "error": error}))
    good = [name for name in hosts if name not in bad_keys]
    stops = []
    if everyone:
        stops = roll_out(work, hosts, good)
    else:
        populate_hosts(work, good)
    if not plan.dry_run:
        work.store.prune()
        remember_failures(work, hosts, [*work.failures, *unfit])
    work.failures += stops


def command_populate(fleet: Fleet, wanted: Sequence[str], plan: Plan, prune: bool) -> int:
    if prune and wanted:
        raise UsageError("--prune goes with the whole fleet, not with single hosts")
    find_hosts(fleet, wanted)
    if os.geteuid() != 0:
        print("not root: files keep their owner; sshd serves them only when root publishes", file=sys.stderr)
    os.umask(0o022)
    with ExitStack() as stack:
        if not plan.dry_run:
            stack.enter_context(populate_lock(fleet, wait=plan.wait))
        hosts, errors = find_hosts(fleet, wanted)  # as they are now, not when the wait began
        _, bad_keys = check_keys(fleet)
        errors += dict.fromkeys(text for name, text in bad_keys.items() if name in hosts or not wanted)
        work = Work(fleet, plan, Store(fleet.chroot_dir / ".store"))
        if prune:
            prune_chroots(find_gone(fleet, hosts), plan, work.failures)
        publish(work, hosts, bad_keys, everyone=not wanted)
    work.progress.clear()
    if not plan.as_json:
        would, held = "would be " if plan.dry_run else "", work.counts["held"]
        print(
            f"{counted(len(hosts))}: {work.counts['published']} {would}published, {work.counts['unchanged']}"
            f" unchanged, {f'{held} held, ' if held else ''}{len(hosts) - sum(work.counts.values())} failed"
        )
    warn([*fleet.source.warnings(), *unknown_keys(fleet, hosts)])
    return complain([*errors, *group_failures(work.failures)])


def gather(
    fleet: Fleet, wanted: Sequence[str], offline_after_s: float, now_s: float, memory: Memory | None = None
) -> tuple[list[Row], list[str], dict[str, str]]:
    """The rows that every form of `status` shows, what is wrong with hosts/, and what is the matter with the server: what it
    is about, which stays, and the words.

    `memory`: of the time before; only what changed is read.
    """
    hosts, errors = find_hosts(fleet, wanted)
    beside, rows = read_beside(fleet, now_s), []
    for name in hosts:
        chroot = f"{fleet.chroot_dir}/{name}"  # a Path takes its time, ten thousand times
        found = read_host(chroot, name) if memory is None else recall_host(chroot, name, memory)
        rows.append(make_row(name, found, now_s, offline_after_s, beside))
    troubles = look_at_disk(fleet.chroot_dir) | ({} if wanted else look_at_silence(rows, now_s))
    return sort_rows(rows), errors, troubles


def read_beside(fleet: Fleet, now_s: float) -> Beside:
    """What lies beside the chroots and the hosts. What cannot be read there keeps nobody from the table."""
    absent = {}
    for path in (fleet.directory / "hosts").glob("*.absent"):
        with suppress(OSError):
            absent[path.stem] = one_line(path.read_text("utf-8", "replace")) or "nobody said why"
    return Beside(absent, read_refusals(fleet), read_rollout(fleet.chroot_dir).words(now_s))


def read_json(path: Path) -> dict[str, Any]:
    """A file of the server's own, beside the chroots: nothing is lost with it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def look_at_disk(directory: Path) -> dict[str, str]:
    """What to say of a disk that has no room for what hosts report."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return {}
    if disk.f_bavail * disk.f_frsize >= FULL_DISK_BYTES and (disk.f_favail or not disk.f_files):
        return {}
    what = "has no room" if disk.f_bavail * disk.f_frsize < FULL_DISK_BYTES else "has no inodes"
    words = f"this server's own disk {what} at {directory}: no host can report, and nothing can be published"
    return {"this server's own disk": words}


def look_at_silence(rows: Sequence[Row], now_s: float) -> dict[str, str]:
    """What to say when all hosts fell silent: that is hardly the fault of each."""
    seen = [row.seen_s for row in rows if row.seen_s is not None and not row.absent]
    if len(seen) < 2 or not all(row.offline for row in rows if row.seen_s is not None and not row.absent):
        return {}
    words = f"all {len(seen)} hosts are silent {since(max(seen), now_s)}: was this server down, or its disk full?"
    return {SILENCE: words}


def for_stdout(text: str) -> str:
    """The same text with plainer symbols, if the encoding of stdout has not got them all."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(PLAIN)
    return text


class View(NamedTuple):
    """How `status` shows the fleet: `form`, into the file `output`, and what has changed since the file `changes`."""

    form: str
    offline_after_s: float = OFFLINE_AFTER_S
    output: str | None = None
    logs_url: str | None = None
    changes: str | None = None


def command_status(fleet: Fleet, wanted: Sequence[str], view: View) -> int:
    now_s = time.time()
    rows, errors, troubles = gather(fleet, wanted, view.offline_after_s, now_s)
    terminal = sys.stdout.isatty() and view.output is None
    if view.form == "json":
        text = format_json(rows, now_s, list(troubles.values()))
    elif view.form == "prometheus":
        text = format_prometheus(rows)
    elif view.form == "html":
        url = view.logs_url or fleet.chroot_dir.as_uri()
        why = functools.partial(find_reason, fleet, itertools.count())
        text = format_html(rows, now_s, url, list(troubles.values()), why)
    else:
        width = shutil.get_terminal_size(fallback=(200, 24)).columns
        text = format_table(rows, now_s, width, decorated=terminal and "NO_COLOR" not in os.environ) + "\n"
        if len(wanted) == 1:
            top, _, summary = text[:-1].rpartition("\n")
            text = f"{top}\n\n{format_host(rows[0], now_s)}\n\n{summary}\n"
    if view.output is None:
        sys.stdout.write(for_stdout(text))
        sys.stdout.flush()
    else:
        client.write_atomic(Path(view.output), text.encode(), 0o644)
    if view.changes is not None:
        tell_changes(Path(view.changes), rows, troubles, now_s)
    elif view.output is None:  # cron mails what is on stderr
        silent = SILENCE in troubles
        wanting = [row for row in rows if row.needs_a_person and not terminal and not (silent and row.offline)]
        errors = [*troubles.values(), *errors, *group_failures(complaint(row, now_s) for row in wanting)]
    warn(unknown_keys(fleet, [row.host for row in rows]))
    return max(complain(errors), int(bool(troubles) or any(row.needs_a_person for row in rows)))


def find_reason(fleet: Fleet, asked: Iterator[int], host: str, log: str) -> str:
    """Why an attempt ended as it did, from the end of its log: of so many logs, no more."""
    if next(asked) < MAX_REASONS:
        with suppress(BentoError, OSError), open_logs(fleet.chroot(host)) as logs:
            return last_words(logs, log)
    return ""


def tell_changes(path: Path, rows: Sequence[Row], troubles: Mapping[str, str], now_s: float) -> None:
    """A line on stderr for each problem that has begun since the last call, and one for each that is over. What was
    told lies in a file."""
    before = read_json(path).get("problems", {})
    before = before if isinstance(before, dict) else {}
    words = dict(troubles)
    for row in rows:
        for reason in row.reasons:
            which = ""
            if reason == "failed" and row.report and row.report.last:
                which = (row.report.last.release or "")[:7]
            elif reason == "failed_units" and row.report:
                which = ", ".join(row.report.failed_units)
            what = one_line(f"{row.host}: {reason.replace('_', ' ')} {which}", 1000)
            words[what] = f"{row.host}: {complaint(row, now_s).text}"
    for what in [what for what in words if what not in before]:
        print(f"bento: begins: {words[what]}", file=sys.stderr)
    for what in [what for what in before if what not in words]:
        print(f"bento: over: {one_line(what)} (since {one_line(str(before[what]))})", file=sys.stderr)
    now = {what: str(before.get(what, format_time(now_s))) for what in words}
    client.write_atomic(path, json.dumps({"problems": now}).encode(), 0o644)


def command_watch(fleet: Fleet, wanted: Sequence[str], offline_after_s: float) -> int:
    """Shows the table and draws it again, over itself, when something has changed. Ends at Ctrl-C."""
    shown, drawn_for, memory = "", (0, 0), Memory()
    # Kept back, a change of the terminal's size is a signal that can be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    try:
        while True:
            now_s = time.time()
            rows, _, troubles = gather(fleet, wanted, offline_after_s, now_s, memory)
            width, height = size = shutil.get_terminal_size()
            top = [clip(f"! {trouble}", width) for trouble in troubles.values()]
            # The hosts that need a person are on top, the summary stays in sight.
            decorated = "NO_COLOR" not in os.environ
            table = "\n".join(
                [*top, format_table(rows, now_s, width, height=height - 1 - len(top), decorated=decorated)]
            )
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
        found = heapq.nlargest(KEEP_LOGS, matches(itertools.islice(entries, MAX_LOG_ENTRIES)))
        return found, next(entries, None) is not None


def last_words(logs: int, name: str) -> str:
    """How an attempt ended, as its log says at the end."""
    end, _ = read_untrusted(logs, name, LOG_END_BYTES, end=True)
    last = end.decode(errors="replace").rstrip().rpartition("\n")[2]
    words = re.search(r"bento: (?:error: )?[a-z-]+: (.*)", last)
    return one_line(words[1]) if words else ""


def list_log(logs: int, name: str, came_s: float) -> str:
    """A log's line in the list: when by the host's clock, release, result and reason."""
    line = name.removesuffix(".log").replace("_", "  ")
    try:
        words = last_words(logs, name)
        line += f"  {words}" if words else ""
    except (BentoError, OSError) as error:
        line += f"  {one_line(str(error))}"
    parsed = parse_log_name(name)
    if parsed is not None and abs(client.parse_time(parsed.finished) - came_s) > CLOCK_TOLERANCE_S:
        line += f"  (came {format_time(came_s)})"
    return line


def list_publication(published: Published) -> str:
    when = published.time.replace("-", "").replace(":", "")
    return f"{when}  {published.release[:12]}  published" + (f"  {published.revision}" if published.revision else "")


def command_log(fleet: Fleet, name: str, show_list: bool, release: str | None) -> int:
    """What the host uploaded, made harmless for a terminal. The newest log unless asked for another; or a list of all,
    with what was published for it, and when."""
    find_hosts(fleet, [name])
    where = fleet.chroot(name) / "logs"
    lines = [
        (client.parse_time(published.time), list_publication(published))
        for published in (read_history(fleet.chroot(name)) if show_list else ())
        if published.release.startswith(release or "")
    ]
    text, more = None, False
    try:
        with suppress(FileNotFoundError), open_logs(fleet.chroot(name)) as logs:
            found, more = find_logs(logs, release)
            if show_list:
                lines += [(came_s, list_log(logs, log, came_s)) for came_s, log in found]
            elif found:
                text = read_untrusted(logs, found[0][1], MAX_LOG_BYTES)[0][:MAX_LOG_BYTES].decode(errors="replace")
    except NotADirectoryError:
        raise BentoError(f"{name}: {where} is no directory: 'bento.py populate {name}' makes one") from None
    if more:
        print(f"{name}: more than {MAX_LOG_ENTRIES} files in {where}: not all were looked at", file=sys.stderr)
    if text is None and not lines:
        of_that = " of that release" if release else ""
        raise BentoError(f"{name}: no log{of_that} in {where}: it has not reported one yet")
    for _, line in sorted(lines, key=lambda line: line[0], reverse=True):
        print(line)
    for line in text.splitlines() if text is not None else ():
        print("".join(c if c.isprintable() or c == "\t" else "?" for c in line))
    return 0


# --- command line ---


def add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hosts", nargs="*", metavar="NAME", help="hosts (default: all)")


def add_builds(parser: argparse.ArgumentParser, jobs: int) -> None:
    parser.add_argument("-j", "--jobs", type=int, default=jobs, metavar="N", help=f"so many at once (default {jobs})")
    parser.add_argument("--json", action="store_true", help="a line of JSON a host, for programs")


def add_after_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--after-build",
        type=split_command,
        default=(),
        metavar="COMMAND",
        help="run for each system, its store path added",
    )


def split_command(text: str) -> tuple[str, ...]:
    """A command's words, as a shell has them, without one."""
    try:
        return tuple(shlex.split(not_empty(text.strip())))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def not_empty(text: str) -> str:
    """What an unset variable of a shell gives must not become the default."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


# Makes the parser of one command, from its name and what it is for.
Command = Callable[[str, str], argparse.ArgumentParser]


def add_configuring(command: Command) -> None:
    add = command("add", "make the directory of a new host")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--key", metavar="FILE", help="the host's public key ('-': standard input)")
    kinds = add.add_mutually_exclusive_group()
    kinds.add_argument("--flake", action="store_true", help="a flake instead of a channel configuration")
    kinds.add_argument("--link", type=not_empty, metavar="DIR", help="a link to a tree that hosts share")
    command("fleet", "write fleet.nix, the server's users and chroots, from hosts/*.pub")
    for name, text in (("check", "evaluate each host's configuration"), ("build", "build each host's configuration")):
        parser_ = command(name, text)
        add_builds(parser_, 2)
        if name == "build":
            add_after_build(parser_)
        parser_.add_argument("--timeout", type=float, default=BUILD_LIMIT_S, metavar="SECONDS", help="for each host")
        add_hosts(parser_)


def add_populate(command: Command) -> None:
    populate = command("populate", "publish what has changed")
    group = populate.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="only hosts whose configuration evaluates")
    group.add_argument("--build", action="store_true", help="only hosts whose configuration builds")
    add_builds(populate, 1)
    add_after_build(populate)
    populate.add_argument("--dry-run", action="store_true", help="only say what would be done")
    populate.add_argument("--wait", action="store_true", help="for another populate, instead of giving up")
    populate.add_argument("--now", action="store_true", help="whatever hosts/waves says")
    populate.add_argument(
        "--revision", type=not_empty, metavar="TEXT", help="what this is, for a person (default: the commit)"
    )
    populate.add_argument(
        "--prune", action="store_true", help="also remove the chroots of hosts that are gone from hosts/"
    )
    add_hosts(populate)


def add_status(command: Command) -> None:
    status = command("status", "the state of the fleet; exit code 1 when a host needs a person")
    forms = status.add_mutually_exclusive_group()
    forms.add_argument("--json", dest="form", action="store_const", const="json", help="for programs")
    forms.add_argument("--prometheus", dest="form", action="store_const", const="prometheus", help="for node_exporter")
    forms.add_argument("--html", dest="form", action="store_const", const="html", help="one page, without scripts")
    forms.add_argument("--watch", dest="form", action="store_const", const="watch", help="stay, and show what changes")
    status.add_argument("--output", type=not_empty, metavar="FILE", help="replace FILE instead of printing")
    status.add_argument(
        "--changes",
        type=not_empty,
        metavar="FILE",
        help="on stderr only what has begun or is over since the last call, which FILE remembers",
    )
    status.add_argument("--logs-url", metavar="URL", help="where the page's links find the chroots (default: as files)")
    status.add_argument(
        "--offline-after", type=float, default=OFFLINE_AFTER_S / 3600, metavar="HOURS", help="default: 2"
    )
    add_hosts(status)


def add_others(command: Command) -> None:
    closure = command("closure", "which versions of a package each host's system has")
    closure.add_argument("package", type=not_empty, metavar="PACKAGE", help="openssl, for example")
    add_hosts(command("diff", "what would change between the running and the built system"))
    sign = command("sign", "sign the releases of this checkout, for hosts that take signed ones only")
    sign.add_argument("--key", required=True, metavar="FILE", help="an SSH key, or the public half of an agent's")
    sign.add_argument("--days", type=int, default=VALID_DAYS, metavar="N", help="vouched for so long (default 30)")
    sign.add_argument("--build", action="store_true", help="build each, and sign the system's store path, too")
    sign.add_argument("--unsign", action="store_true", help="the new system may do without signatures from then on")
    sign.add_argument("--revoke", metavar="FILE", help="public keys whose signatures count no more")
    add_hosts(sign)
    update = command("update", "update the flakes' lock files, and say what moved")
    update.add_argument("input", nargs="?", metavar="INPUT", help="only this input")
    log = command("log", "what a host uploaded last")
    log.add_argument("name", metavar="NAME")
    log.add_argument("--list", action="store_true", help="list its logs: when, release, result")
    log.add_argument("--release", metavar="ID", help="the newest log of that release")


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

    for each in (add_configuring, add_populate, add_status, add_others):
        each(command)
    return parser


def plan_of(options: argparse.Namespace) -> Plan:
    """What `populate` was asked for."""
    if options.after_build and not options.build:
        raise UsageError("--after-build goes with --build: nothing else builds")
    return Plan(
        action="dry-build" if options.check else "build" if options.build else None,
        dry_run=options.dry_run,
        jobs=max(1, options.jobs),
        wait=options.wait,
        as_json=options.json,
        revision=one_line(options.revision, 200) if options.revision else None,
        after=options.after_build,
        now=options.now,
    )


def dispatch(options: argparse.Namespace, fleet: Fleet) -> int:
    command: str = options.command
    if command == "add":
        return command_add(fleet, options.name, options.key, flake=options.flake, link_to=options.link)
    if command == "fleet":
        return command_fleet(fleet)
    if command in ("check", "build"):
        action = "dry-build" if command == "check" else "build"
        plan = Plan(action, publish=False, jobs=max(1, options.jobs), limit_s=options.timeout, as_json=options.json)
        return command_rebuild(fleet, options.hosts, plan._replace(after=getattr(options, "after_build", ())))
    if command == "closure":
        return command_closure(fleet, options.package)
    if command == "diff":
        return command_diff(fleet, options.hosts)
    if command == "sign":
        revoked = tuple(sorted(client.read_signers(Path(options.revoke)))) if options.revoke else ()
        vow = Vow(options.key, options.days, options.build, options.unsign, revoked)
        return command_sign(fleet, options.hosts, vow)
    if command == "update":
        return command_update(fleet, options.input)
    if command == "populate":
        return command_populate(fleet, options.hosts, plan_of(options), options.prune)
    if command == "status":
        after_s = options.offline_after * 3600
        for option, file in (("--output", options.output), ("--changes", options.changes)):
            if file is not None and options.form == "watch":
                raise UsageError(f"{option} goes with a status that ends, not with --watch")
            if file is not None and Path(file).is_dir():
                raise UsageError(f"{option} {file}: this is a directory: name a file")
        if options.form == "watch":
            return command_watch(fleet, options.hosts, after_s)
        view = View(options.form or "table", after_s, options.output, options.logs_url, options.changes)
        return command_status(fleet, options.hosts, view)
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
        named = options.fleet is not None
        code = dispatch(options, Fleet(Path(directory).absolute(), Path(chroot_dir).absolute(), named=named))
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
