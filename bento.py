#!/usr/bin/env python3
"""Bento's server: publishes the configuration of each NixOS host of a fleet, and shows what became of it.

Files. In the fleet directory: hosts/NAME/ (one host's configuration, or a symlink to it), hosts/NAME.pub (its SSH
public keys), hosts/signed (what the administrator signed for all), hosts/NAME.absent (why it is away), hosts/waves (the
order of a roll-out), fleet.nix (written from fleet.nix.in). In the chroot directory, for each host: current.json (the
release to run; replacing it is the moment of publication), releases/ID.tar and ID.parts/, history, and logs/, which
belongs to the host: nothing there is trusted. Beside the chroots: .store/, which has each release once, for the chroots
to link to, in .known what each was read from, and in .built what was built last; .rollout.json, what `populate`
remembers; .machines, what `status` does: which machines reported as a host; and .lock, in which nothing is: its time is
that of the last `populate` of the whole fleet.

Exit codes: 0 done, 1 something failed (each failure on stderr) or a host needs a person, 2 usage.

Sections: constants, types, hosts and keys, commits, releases, states of hosts, waves, publication, signatures,
builds, commands, command line.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # our own directory: others may write there, and a heapq.py beside us would run with what we have

import argparse
import base64
import binascii
import bisect
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
import tarfile
import textwrap
import threading
import time
import traceback
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.realpath(__file__)))  # last, and for what is ours only
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
    words_of,
)

if __name__ == "__main__":
    del sys.path[-1]

CHROOT_DIR = "/home/chroot"
GCROOTS = Path("/nix/var/nix/gcroots/bento")
KEEP_RELEASES = 3
KEEP_LOGS, MAX_PRUNED = 200, 20_000
OFFLINE_AFTER_S = 2 * 3600
# So many polls may be missed, and a host may ask for so much patience.
MISSED_POLLS, LONGEST_SILENCE_S = 3, 31 * 86400
# A host that is so far behind needs a person: in all, where a reboot is missing that Bento may do, and one that it may not.
LATE_S, LATE_REBOOT_S, LATE_PERSON_S = 86400.0, 7 * 86400.0, 30 * 86400.0
# Before a signature expires, and the last publication is too old.
NOTICE_S = 7 * 86400.0
SHOWN_ATTEMPTS = 20
# So many machines are remembered that reported as one host; two that take turns are told for so long after the last turn.
KEEP_MACHINES, TWIN_S = 5, 86400.0
# Of a page: so many hosts are named at its top; with more than that in all, marks that are alike are one.
SHOWN_PERSONS, MANY_HOSTS = 30, 1000
# So many logs are opened for a page, to say why an attempt failed.
MAX_REASONS = 2000
# A disk with less than this is full; with less than that, room is made on it. So many are named who have most there.
FULL_DISK_BYTES, ROOM_BYTES, SHOWN_LOADS = 1 << 20, 16 << 20, 3
# The same key as long as it lasts; its words tell since when. While one of these lasts, nothing else is over.
SILENCE, LOOK = "all hosts are silent", "the fleet cannot be looked at"
BUILD_LIMIT_S = 12 * 3600.0
# A host that keeps more than this in logs/ is named in `status`. A client keeps 20 logs there, each at most 1 MB.
MAX_LOG_FILES = 1000
MAX_LOGS_BYTES = 100 << 20
# A directory of ext4 keeps the size that it had with all the names that were once in it, and is read whole.
MAX_DIRECTORY_BYTES = 1 << 20
# `log` looks at so many files of a host, and shows so much of one.
MAX_LOG_ENTRIES = 100_000
MAX_LOG_BYTES = 4 << 20
LOG_END_BYTES = 4 << 10
# A host's clock that is less than this off may be a slow line.
CLOCK_TOLERANCE_S = 300.0
# So many hosts are published with the same two syncs of the disk: syncs for each would cost more than the copying.
BATCH = 256
# A member takes about so much of an archive besides its content.
MEMBER_BYTES, MAX_MEMBERS = 512, 1_000_000
# So many blobs are asked for at once; so many links are followed on one way; Git has so long for an answer.
WINDOW, MAX_HOPS, GIT_LIMIT_S = 256, 40, 120.0
# The attributes that change a file's bytes when it is checked out. LOCKED: how a file begins that could not be changed
# back, because the key or the server is missing here.
CHANGED_BY = ("filter", "ident", "working-tree-encoding", "eol")
LOCKED = {
    b"\0GITCRYPT\0": "it is locked: 'git-crypt unlock' here",
    b"version https://git-lfs.github.com/spec/v1\n": "a pointer of LFS, without its file: 'git lfs pull' here",
}
# What Git leaves in its directory while it waits for somebody.
UNDER_WAY = ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-merge", "rebase-apply")
# Where there is no Git: what is in a directory and is nobody's configuration.
DROPPINGS = (".jj", ".hg", ".svn", ".direnv", ".#*", "*.swp", "*~")
# What a fleet says of its hosts, in hosts/.
OURS = re.compile(r".*\.(pub|sig|absent)|waves|signed", re.DOTALL)
# Of so many files and directories that a release is from, Git is asked which commit changed them.
MAX_PLACES = 200
# So many different directories that hosts share are remembered; usually there is one.
MAX_SHARED = 16
MAX_WAVES_BYTES, MAX_ABSENT_BYTES, MAX_FLEET_BYTES = 1 << 20, 4 << 10, 64 << 20
MAX_PATTERN = 200
# Of names that belong together, so many are shown.
SHOWN = 5
# So much of a revision is shown in the table.
REVISION_WIDTH = 30
KEEP_HISTORY, MAX_HISTORY_BYTES, LAST_HISTORY_BYTES = 1000, 1 << 20, 4 << 10
CHROOT_NAMES = {"current.json", "config", "releases", "history", "logs"}  # `config`: of version 1.1
# What a publication that was killed leaves there. Other names with a dot are the server's: a `.ssh`.
LEFT_NAMES = {".current.json.new", ".config.new", ".history.new"}
RELEASE_NAME = re.compile(r"[0-9a-f]{64}(\.tar|\.parts)?")
# The first version of the client that heeds a bento.json, and a `file` in it.
RECIPE_SINCE, FILE_SINCE = (1, 1), (1, 2)
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


class Node(NamedTuple):
    """What a commit has under a name: `mode` and `oid` as Git says them, and the size of a file; below 0 where it is lost."""

    mode: str
    oid: str
    size: int


DIRECTORY, LINK, SUBMODULE = "040000", "120000", "160000"


class Commit(NamedTuple):
    """A commit and its tree, when it was made, and a line for people, the same in each clone."""

    id: str
    tree: str
    time_s: float
    revision: str


class Member(NamedTuple):
    """One file or directory of a release: `name` as in the archive, `path` where it lies, for a person.

    Of a file `node` is what the commit has there, in `repository`.
    """

    name: str
    path: str
    is_directory: bool
    executable: bool = False
    size: int = 0
    node: Node | None = None
    repository: Repository | None = None

    @property
    def place(self) -> str:
        assert self.repository
        return self.path[len(self.repository.root.rstrip("/")) + 1 :]

    def read(self) -> Iterator[bytes]:
        """What was asked for before, chunk by chunk."""
        assert self.node and self.repository
        spooled = self.repository.spooled.get(self.place)
        if spooled is None:
            assert self.repository.blobs
            yield from self.repository.blobs.take(self.node.oid, self.size)
        else:
            with open(spooled, "rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk

    def bytes(self) -> bytes:
        assert self.node and self.repository
        return b"".join(self.read()) if self.place in self.repository.spooled else self.repository.read(self.node)


class Release(NamedTuple):
    """What is to be published, and its name: the SHA-256 of its archive of `size` bytes. `key`: the same for the same
    content, and known before it is read."""

    id: str
    size: int
    key: str


class Fleet:
    """Where the fleet's files lie. `chroot_dir` holds a chroot a host; `named`: by the command line, not by default."""

    def __init__(self, directory: Path, chroot_dir: Path, *, named: bool = False) -> None:
        self.directory, self.chroot_dir, self.named = directory, chroot_dir, named
        self.real, self.real_hosts = os.path.realpath(directory), os.path.realpath(directory / "hosts")
        self.source = Source(os.path.abspath(directory), chroot_dir / ".store/.known")

    @functools.cached_property
    def ruler(self) -> Ruler:
        """Whose the fleet's directory is. BentoError where it is another's than who can have put it there."""
        ruler = find_tree_ruler(self.real)
        if find_ruler(str(self.directory)) != ruler:
            raise BentoError(
                f"{self.directory}: a link of somebody's to a tree of somebody else's, {self.real}: name that"
            )
        return ruler

    def host(self, name: str) -> Path:
        return self.directory / "hosts" / name

    def chroot(self, name: str) -> Path:
        return self.chroot_dir / name


class Refusal(NamedTuple):
    """Why a host's configuration is not published: since when, how often it was tried, and the last error."""

    since: str
    times: int
    error: str


class Wave(NamedTuple):
    """A line of hosts/waves: its hosts, for how long each must have run a release before later ones get it, and how many of
    them may have failed it."""

    hosts: tuple[str, ...]
    soak_s: float
    may_fail: int = 0


class Candidate(NamedTuple):
    """What one `populate` of the whole fleet found: what each host would get, None where that cannot be published. `name`:
    its commits, for people. So many waves as it has `reached` may have it, since `moved_s`."""

    made_s: float
    name: str
    wanted: Mapping[str, Current | None]
    reached: int = 0
    moved_s: float = 0.0

    def release(self, host: str) -> str:
        current = self.wanted.get(host)
        return current.release if current is not None else ""


class Run(NamedTuple):
    """That a host runs a release, proven, since then on this server's clock, without a verdict. `units`: those that failed
    before it, too."""

    release: str
    system: str
    since_s: float
    units: tuple[str, ...] = ()


class Standing(NamedTuple):
    """Where a host stands: what it reports, what it has run, and what the server knows of it besides."""

    found: Found
    runs: tuple[Run, ...] = ()
    absent: bool = False
    refused: bool = False

    @property
    def published(self) -> str:
        return self.found.current.release if self.found.current is not None else ""


class Hold(NamedTuple):
    """Hosts that wait for the same: whom they wait for and why, since when, and when somebody has to look at it. `hosts`:
    what is published for each meanwhile."""

    candidate: str
    blockers: tuple[tuple[str, str], ...]
    since_s: float
    still_s: float
    hosts: Mapping[str, str]

    @property
    def reason(self) -> str:
        return f"wait for {show_names([f'{host} ({why})' for host, why in self.blockers])}"

    @property
    def stopped(self) -> list[tuple[str, str]]:
        return [(host, why) for host, why in self.blockers if why in FAILED]


class Rollout(NamedTuple):
    """.rollout.json: what `populate` remembers. `fits`: the words of hosts/waves that stood for a host once; `line`: the
    roll-out as a sentence; `error`: why the last `populate` of the whole fleet did not come to its end."""

    candidates: tuple[Candidate, ...] = ()
    runs: Mapping[str, tuple[Run, ...]] = {}
    holds: tuple[Hold, ...] = ()
    refused: Mapping[str, Refusal] = {}
    fits: tuple[str, ...] = ()
    line: str = ""
    error: str = ""

    @property
    def releases(self) -> set[str]:
        """What .store has to keep."""
        return {current.release for each in self.candidates for current in each.wanted.values() if current is not None}

    def words(self, now_s: float) -> dict[tuple[str, str], str]:
        """What to say of each host that is held, by its name and its release: it may have got another since."""
        return {
            (host, release): f"held {age(now_s - hold.since_s)}: {hold.reason}"
            for hold in self.holds
            for host, release in hold.hosts.items()
        }

    def still(self, now_s: float) -> dict[str, str]:
        """Roll-outs that have not moved for their soak and a day."""
        return {
            f"{hold.candidate}: the roll-out stands still": f"{hold.candidate}: the roll-out stands still for"
            f" {age(now_s - hold.still_s + LATE_S)}, {counted(len(hold.hosts))} {hold.reason}"
            for hold in self.holds
            if now_s > hold.still_s
        }


NO_ROLLOUT = Rollout()


# The machines that reported as a host, by their marks, and since when; a change each, the newest last.
Machines = tuple[tuple[str, float], ...]


class Beside(NamedTuple):
    """What the server itself knows of hosts, besides their chroots: which are acknowledged as `absent`, which
    configurations are not published, which wait for other hosts, each with words for a person, and their `machines`."""

    absent: dict[str, str]
    refused: dict[str, Refusal]
    held: dict[tuple[str, str], str]  # by the release that is published, too: it may have got another since
    late_reboot_s: float = LATE_PERSON_S
    logs: tuple[str, ...] = ()  # directories like the chroots', where reports lie, too
    rollout: Rollout = NO_ROLLOUT
    machines: Mapping[str, Machines] = {}


NOTHING_BESIDE = Beside({}, {}, {})


class Attempt(NamedTuple):
    """A log's name, taken apart: how one attempt ended, and when by the host's clock. `release`: twelve letters of it."""

    name: str
    finished: str
    release: str
    result: str


class Found(NamedTuple):
    """All that there is to read of a host: what is published for it, its report, when that came, and what is wrong.

    `logs`: the newest ones' names, oldest first. `unreadable`: what is wrong keeps us from knowing how it is. `history`:
    what was published for it, if it runs something else than it is to run.
    """

    current: Current | None
    report: Report | None
    seen_s: float | None
    problem: str
    logs: tuple[str, ...] = ()
    unreadable: bool = False
    history: tuple[Published, ...] = ()


class Published(NamedTuple):
    """A line of a host's `history`."""

    time: str
    release: str
    revision: str | None
    system: str | None
    by: str = ""


# What may be the matter with a host besides its state, what is worst first: whether that needs a person, and what a metric
# says of it. What has no metric is told by the state.
FLAGS = {
    "problem": (True, ""),
    "failed": (True, ""),
    "failed_units": (True, "Whether units failed when a host's release was activated, and still do."),
    "not_published": (True, "Whether a host's configuration failed to be published."),
    "drift": (True, "Whether a host runs another system than its release's."),
    "two_machines": (True, "Whether another machine has reported as a host, too."),
    "expired": (True, "Whether nobody vouches any more for what is published for a host."),
    "expires_soon": (True, "Whether that will be so within a week."),
    "late": (True, "Whether a host has not come to what is published for it, for too long."),
    "offline": (True, "Whether a host has not been seen for too long."),
    "needs_reboot": (False, "Whether a host needs a reboot."),
    "other_client": (False, "Whether a host runs another version of the client than the server has."),
    "paused": (False, "Whether a host deploys nothing for now."),
    "absent": (False, "Whether a host is known to be away."),
}
MARKS = {flag: text for flag, (_, text) in FLAGS.items() if text}


class Flag(NamedTuple):
    """One of FLAGS that holds: in words, since when as far as we know, and `about`, the same words for all hosts that have
    it for the same reason, whenever it began."""

    words: str
    since_s: float | None = None
    about: str = ""


class Row(NamedTuple):
    """What is known of a host. `flags`: which of FLAGS hold. `seen_s`: seconds since 1970 on the server's clock. `held`:
    since when, and whom it waits for. `was`: the state of one that has fallen silent since. `machines`: that reported."""

    host: str
    state: str
    flags: Mapping[str, Flag]
    current: Current | None
    report: Report | None
    seen_s: float | None
    absence: str = ""
    refusal: Refusal | None = None
    held: str = ""
    logs: tuple[str, ...] = ()
    was: str = ""
    machines: Machines = ()

    @property
    def reasons(self) -> list[str]:
        """Why it needs a person. A host that is known to be away needs nobody."""
        away = {"offline", "absent"} <= self.flags.keys()
        return [] if away else [flag for flag in self.flags if FLAGS[flag][0]]

    @property
    def broke_s(self) -> float:
        """Since when it needs one, for what is worst."""
        return (self.flags[self.reasons[0]].since_s or 0.0) if self.reasons else 0.0

    @property
    def silent(self) -> bool:
        return "offline" in self.flags

    @property
    def needs_a_person(self) -> bool:
        return bool(self.reasons)

    @property
    def failed(self) -> bool:
        return self.state in ("failing", "rolled-back")

    @property
    def revision(self) -> str | None:
        """Of the release that the host runs: as it was published, else as the host says."""
        if self.report is None or self.report.release is None:
            return None
        same = self.current is not None and self.current.release == self.report.release
        return self.current.revision if same and self.current is not None else self.report.revision

    @property
    def runs(self) -> str:
        """What people call that: its commit, if that is known."""
        found = COMMIT.match(self.revision or "")
        return found[0][:7] if found is not None else ((self.report.release if self.report else None) or "")[:7]

    @property
    def subject(self) -> str:
        """What is said of it, besides the commit."""
        return COMMIT.sub("", one_line(self.revision or ""), count=1).strip()

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
    command that gets each system that was built. `asked`: a person did."""

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
    again: bool = False
    asked: bool = False


class Job(NamedTuple):
    """What there is to do for one host. `before` is what is published, and `unchanged` when that is its release. `kept`: what was
    to be published when an earlier `populate` read it."""

    name: str
    release: Release
    owner: tuple[int, int] | None
    before: Current | None
    unchanged: bool
    revision: str | None
    signature: Signature | None = None
    kept: Current | None = None
    commit: str | None = None


# --- hosts and keys ---

NO_HOST_NAME = (
    "no host name: letters, digits, _ and -, at most 25, a letter or digit first: give it such a one here and as"
    ' services.bento.host, and its own as "attribute" in bento.json'
)


def read_own(fleet: Fleet, name: str, limit: int = client.MAX_JSON_BYTES) -> bytes:
    """A small file of the fleet's, hosts/NAME.pub for one: what its ruler may read, within the work tree or the fleet's
    directory, whatever it is a link to. BentoError for anything else; never blocks."""
    path = f"{fleet.directory}/{name}"
    real, tree = os.path.realpath(path), find_root(fleet.real) or fleet.real
    if not real.startswith(tuple(f"{top.rstrip('/')}/" for top in (tree, fleet.real, fleet.real_hosts))):
        raise BentoError(f"{name}: a link out of the fleet's directory, to {one_line(real)}")
    with acting_as(fleet.ruler):
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BentoError(f"{name}: no regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BentoError(f"{name}: larger than {limit} bytes")
    return data


def scan_hosts(fleet: Fleet) -> list[os.DirEntry[str]]:
    """What lies in hosts/, by name, but for what is hidden. BentoError when that cannot be told: it is not nothing."""
    directory = fleet.directory / "hosts"
    try:
        with acting_as(fleet.ruler):
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise BentoError(f"{directory}: {error.strerror}: --fleet names the directory that has hosts/ in it") from None
    return [entry for entry in entries if not entry.name.startswith(".")]


def find_hosts(fleet: Fleet, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The hosts to work on, and an error for each name in hosts/ that no host can have. What is `wanted` may be a shell
    pattern."""
    hosts, errors = [], []
    for entry in scan_hosts(fleet):
        if entry.name.endswith((".pub", ".absent")) or entry.is_file(follow_symlinks=False):
            continue
        if entry.name in ("waves", "signed") and not entry.is_dir():  # a link
            continue
        if client.HOST_NAME.fullmatch(entry.name):
            hosts.append(entry.name)
        else:
            errors.append(f"hosts/{one_line(entry.name)}: {NO_HOST_NAME}")
    meant = set[str]()
    for name in wanted:
        fitting = find_fitting(hosts, name)
        if not fitting:
            raise UsageError(
                f"{one_line(name)}: no such host: there is no {fleet.host(name)}"
                f"{did_you_mean(name, hosts)}; 'bento.py add' makes one"
            )
        meant.update(fitting)
    return ([name for name in hosts if name in meant] if wanted else hosts), ([] if wanted else errors)


def find_fitting(hosts: Sequence[str], pattern: str) -> list[str]:
    """The hosts that a name or a shell pattern means. A long one means none: fnmatch takes its time with thousands of [."""
    if pattern in hosts:
        return [pattern]
    return fnmatch.filter(hosts, pattern) if len(pattern) <= MAX_PATTERN else []


def did_you_mean(name: str, hosts: Sequence[str]) -> str:
    import difflib  # for a mistake only

    close = difflib.get_close_matches(name, hosts, 1)
    return f" (did you mean {close[0]}?)" if close else ""


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
        lines = read_own(fleet, where).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BentoError(f"{where}: cannot be read: {one_line(words_of(error))}") from None
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
                known = ""
                if place.exists():
                    raw = read_own(fleet, "fleet.nix", MAX_FLEET_BYTES) if place == made else place.read_bytes()
                    known = raw.decode("utf-8", "replace")
                if not all(blob in known for blob in blobs):
                    steps.setdefault(step, []).append(name)
                    break
    return [
        f"this server does not know the keys of {counted(len(names))} yet ({show_names(names)}): {step}"
        for step, names in steps.items()
    ]


def show_names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def who_of(names: Sequence[str]) -> str:
    """The hosts that something is about: their names, as many as anybody reads."""
    return names[0] if len(names) == 1 else f"{counted(len(names))} ({show_names(names)})"


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


# --- commits ---


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


Ruler = tuple[int, int] | None


def find_ruler(path: str) -> Ruler:
    """Whose a path is, for root: uid and gid of the first name on the way there, links and all, that is not root's; whoever
    has that can have put anything at all behind it. None: ours. BentoError where everybody could have."""
    at, todo = "/", deque(path.split("/"))
    while os.geteuid() == 0 and todo:
        at = os.path.normpath(f"{at}/{todo.popleft()}")
        try:
            found = os.lstat(at)
        except FileNotFoundError:  # who will make it is who rules what is there
            return None
        if found.st_uid != 0:
            return found.st_uid, found.st_gid
        if stat.S_ISLNK(found.st_mode):
            target = os.readlink(at)
            at = "/" if target.startswith("/") else os.path.dirname(at)
            todo.extendleft(reversed(target.split("/")))
        elif found.st_mode & stat.S_IWOTH and not (found.st_mode & stat.S_ISVTX and todo):
            raise BentoError(f"{at}: everybody may write there: 'chmod o-w' it")
        elif found.st_mode & stat.S_IWGRP and found.st_gid != 0 and not found.st_mode & stat.S_ISVTX:
            raise BentoError(f"{at}: root's, and a group may write there: 'chmod g-w' it, or give it to who may")
    return None


def find_tree_ruler(root: str) -> Ruler:
    """Whose a tree is. BentoError where everybody may write in it."""
    ruler = find_ruler(root)
    if ruler is not None and os.stat(root).st_mode & stat.S_IWOTH:
        raise BentoError(f"{root}: everybody may write there: 'chmod o-w' it")
    return ruler


@contextmanager
def acting_as(ruler: Ruler) -> Iterator[None]:
    """Root opens what lies in somebody's tree with their rights. No other thread may run meanwhile."""
    if ruler is None or os.geteuid() != 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    try:
        os.setgroups(groups_of(ruler))
        os.setegid(ruler[1])
        os.seteuid(ruler[0])
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def groups_of(ruler: tuple[int, int]) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(ruler[0]).pw_name, ruler[1])
    except KeyError:
        return []


class Git:
    """The one door to a repository: git, run as whom the tree belongs to. A hook's environment is not meant for us; nothing
    is fetched, and no monitor asked. What else its settings name (filters) runs as its ruler, who may run that anyway.
    `owners`: a commit has what its owner's settings make of a work tree, but does not depend on them itself."""

    def __init__(self, root: str, **more: str) -> None:
        self.root, self.owners = root, False
        ruler = find_tree_ruler(root)
        if ruler is None and os.path.lexists(f"{root}/.git"):
            ruler = find_ruler(f"{root}/.git")
        self.ruler = ruler
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") and name != "HOME"}
        self.environment = kept | {
            "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_REPLACE_OBJECTS": "1", "GIT_ALLOW_PROTOCOL": "none",
            "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_CEILING_DIRECTORIES": os.path.dirname(root), **more,
        }  # fmt: skip
        self.identity: dict[str, Any] = {}
        if ruler is not None:
            self.identity = {"user": ruler[0], "group": ruler[1], "extra_groups": groups_of(ruler)}
        with suppress(KeyError):
            self.environment["HOME"] = pwd.getpwuid(ruler[0] if ruler else os.geteuid()).pw_dir

    def start(self, *words: str, program: str = "git") -> subprocess.Popen[bytes]:
        settings = ["core.fsmonitor=false", "core.hooksPath=/dev/null"]
        if not self.owners:
            settings += ["core.autocrlf=false", "core.eol=lf", "core.attributesFile=/dev/null"]
        if self.ruler is None and os.geteuid() == 0:
            settings.append("safe.directory=")  # with root's own `*`, root would obey anybody's settings
        options = [word for item in settings for word in ("-c", item)]
        argv = [program, *(["-C", self.root, *options] if program == "git" else []), *words]
        if client.verbose:
            print(f"+ {shlex.join(argv)}", file=sys.stderr)
        how: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | self.identity
        try:
            process: subprocess.Popen[bytes] = subprocess.Popen(argv, cwd="/", env=self.environment, umask=0o077, **how)
            return process
        except OSError as error:
            why = f"the program {program} is needed" if isinstance(error, FileNotFoundError) else str(error.strerror)
            raise BentoError(f"{self.root}: {why}: nothing is published without it") from None

    def run(self, *words: str, given: bytes = b"", program: str = "git") -> bytes:
        process = self.start(*words, program=program)
        try:
            out, err = process.communicate(given, timeout=GIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise BentoError(f"{self.root}: {program} {words[0]} did not end in {GIT_LIMIT_S:.0f} seconds") from None
        if process.returncode != 0:
            said = one_line(err.decode(errors="replace")) or f"exit {process.returncode}"
            raise BentoError(f"{self.root}: {program} {words[0]}: {said}")
        return out


class Blobs:
    """`git cat-file --batch`: the content of blobs, in the order that they were asked for. Each is what its name says, or
    an error: whoever owns the repository owns this process, too."""

    def __init__(self, git: Git) -> None:
        self.root, self.process = git.root, git.start("cat-file", "--batch")
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.ending = threading.Timer(GIT_LIMIT_S, self.process.kill)

    def ask(self, oids: Iterable[str]) -> None:
        """At most WINDOW: that many fit into the pipe, whether or not somebody reads the other one."""
        oids = list(oids)
        self.waiting, self.ending = len(oids), threading.Timer(GIT_LIMIT_S, self.process.kill)
        self.ending.daemon = True
        self.ending.start()  # its ruler could stop it for ever
        try:
            self.requests.write(b"".join(b"%s\n" % oid.encode() for oid in oids))
            self.requests.flush()
        except OSError:
            raise BentoError(f"{self.root}: git cat-file has ended") from None

    def take(self, oid: str, size: int) -> Iterator[bytes]:
        said = self.answers.readline()
        if said != b"%s blob %d\n" % (oid.encode(), size):
            why = "it is not here: 'git fetch' it" if b"missing" in said else "git has no answer"
            raise BentoError(f"{self.root}: object {oid[:12]}: {why}")
        digest = (hashlib.sha1 if len(oid) == 40 else hashlib.sha256)(b"blob %d\0" % size)
        left = size
        while left and (chunk := self.answers.read(min(left, 1 << 20))):
            left -= len(chunk)
            digest.update(chunk)
            yield chunk
        self.waiting -= 1
        if not self.waiting:
            self.ending.cancel()
        if left or self.answers.read(1) != b"\n" or digest.hexdigest() != oid:
            raise BentoError(f"{self.root}: object {oid[:12]}: it is damaged: 'git fsck'")

    def close(self) -> None:
        self.ending.cancel()
        self.process.kill()
        for pipe in (self.requests, self.answers, self.process.stderr):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self.process.wait()


class Repository:
    """What a commit has, and nothing of what lies in its work tree: `nodes` by path, and the `names` in each directory.

    `inner`: a submodule, at the commit that the outer one records. `plain`: no repository; what lies there is the commit
    of one that is ours for a moment. `dirty`: tracked files as they are now. `bad`: names that no file can have, and
    content that is locked, each with why.
    """

    def __init__(self, root: str, aside: Path, commit: str = "", *, plain: bool = False, dirty: bool = False) -> None:
        self.root, self.aside, self.inner, self.plain, self.git = root, aside, bool(commit), plain, Git(root)
        self.bad: dict[str, str] = {}
        self.specials: list[str] = []
        self.blobs: Blobs | None = None
        self.spooled: dict[str, Path] = {}
        self.store: dict[str, str] = {}
        if plain:
            self.tree = self.adopt()
            return
        try:
            head = self.newest(commit or "HEAD")
        except BentoError as error:
            if shutil.which("git") is None:
                raise
            raise BentoError(
                f"{error}: Git cannot say what is committed there, so nothing of it is published"
            ) from None
        assert head is not None
        self.head, self.tree = head, self.take_edits() if dirty else head.tree

    def take_edits(self) -> str:
        """The tree that a commit of all that is tracked would have now. It lies in a store of ours, beside the repository's."""
        where, objects, index = (
            os.path.join(self.root, os.fsdecode(line))
            for line in self.git.run(
                "rev-parse", "--absolute-git-dir", "--git-path", "objects", "--git-path", "index"
            ).splitlines()
        )
        busy = any(os.path.lexists(f"{where}/{name}") for name in UNDER_WAY)
        if busy or self.git.run("ls-files", "--unmerged"):
            raise BentoError(f"{self.root}: a merge or a rebase is under way there: end it, or 'git merge --abort' it")
        own = self.make_aside()
        objects = f'"{objects}"' if ":" in objects else objects
        self.store = {"GIT_OBJECT_DIRECTORY": f"{own}", "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects}
        self.git.run("-p", index, f"{own}/index", program="cp")  # its time tells which entries may have changed since
        git = Git(self.root, GIT_INDEX_FILE=f"{own}/index", **self.store)
        git.owners = True
        git.run("add", "--update", "--", ".")
        self.git = Git(self.root, **self.store)
        return git.run("write-tree").decode().strip()

    def newest(self, commit: str, *paths: str) -> Commit | None:
        """The newest commit, up to this one, that has changed one of the paths."""
        words = ("rev-list", "--max-count=1", "--format=%H%x00%T%x00%ct%x00%s", commit)
        said = self.git.run(*words, "--", *paths).decode(errors="replace")
        if not said:
            return None
        name, tree, when, subject = said.partition("\n")[2].rstrip("\n").split("\0", 3)
        return Commit(name, tree, int(when), one_line(f"{name[:7]} {subject}", 200))

    def is_behind(self, commit: str, published_s: float) -> bool:
        """Whether a commit that was published then has all of ours, and more. One that is not here came from another clone:
        it is newer than what was made before it was published."""
        try:
            ours = self.git.run("rev-list", "--max-count=1", f"{commit}..{self.head.id}", "--")
        except BentoError:
            return self.head.time_s < published_s
        return not ours and commit != self.head.id

    def adopt(self) -> str:
        """Makes what lies there a tree of Git's, in a repository of ours that is its ruler's."""
        template, own = self.aside / "template/info", self.make_aside()
        template.mkdir(parents=True, exist_ok=True)
        (template / "attributes").write_text("* -text -filter -ident -eol -working-tree-encoding\n")
        self.git = Git(self.root, GIT_DIR=f"{own}/git", GIT_WORK_TREE=self.root)
        self.git.run("init", "--quiet", f"--template={template.parent}")
        exclude = [f":(exclude,glob)**/{name}" for name in DROPPINGS]
        fast = ("-c", "core.looseCompression=0", "-c", "core.fsync=none", "-c", "advice.addEmbeddedRepo=false")
        self.git.run(*fast, "add", "--all", "--force", "--", ".", *exclude)
        tree = self.git.run(*fast, "write-tree").decode().strip()
        odd = (
            "(",
            "-name",
            ".git",
            "-prune",
            "-o",
            "!",
            "-type",
            "f",
            "!",
            "-type",
            "d",
            "!",
            "-type",
            "l",
            ")",
            "-print0",
        )
        links = {path for path, node in self.list_tree(tree) if node.mode == SUBMODULE}
        for raw in self.git.run(f"{self.root}/", *odd, program="find").split(b"\0")[:-1]:
            path = os.fsdecode(raw)[len(self.root.rstrip("/")) + 1 :]
            if path.rpartition("/")[2] != ".git":
                self.specials.append(path)
            elif os.path.dirname(path) not in links:
                raise BentoError(f"{self.root}/{one_line(path)}: Git cannot use it, so nothing around it is published")
        return tree

    def edits(self) -> dict[str, str]:
        """What differs from the commit in the work tree: paths, and how. What is ignored is nobody's business."""
        if self.plain:
            return {}
        git = Git(self.root)
        git.owners = True
        said = git.run(
            "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all", "--ignore-submodules=none"
        )
        return {os.fsdecode(item[3:]): item[:2].decode() for item in said.split(b"\0")[:-1]}

    def make_aside(self) -> Path:
        path = self.aside / os.urandom(8).hex()
        path.mkdir(mode=0o700)
        if self.git.ruler is not None:
            os.chown(path, *self.git.ruler)
        return path

    def list_tree(self, tree: str) -> Iterator[tuple[str, Node]]:
        said = self.git.run("ls-tree", "-r", "-t", "-z", "-l", "--full-tree", tree).decode("utf-8", "surrogateescape")
        for item in said.split("\0")[:-1]:
            head, _, path = item.partition("\t")
            mode, _, oid, size = head.split()
            yield path, Node(mode, oid, int(size) if size.isdigit() else -1 if size == "BAD" else 0)

    @functools.cached_property
    def nodes(self) -> dict[str, Node]:
        found: dict[str, Node] = {"": Node(DIRECTORY, self.tree, 0)}
        self.names: dict[str, list[str]] = {"": []}
        for path, node in self.list_tree(self.tree):
            above, _, name = path.rpartition("/")
            # Git itself looks at names when it checks out, not when it lists.
            while above not in self.names:
                above, _, inner = above.rpartition("/")
                name = f"{inner}/{name}"
            if path in found or "/" in name or name in ("", ".", "..") or name.lower() == ".git":
                self.bad[path] = "a name that no file can have"
            if node.size < 0:
                self.bad[path] = f"object {node.oid[:12]} is not here: 'git fetch' it, or 'git fsck' the repository"
            found[path] = node
            self.names[above].append(name)
            if node.mode == DIRECTORY:
                self.names[path] = []
        if not self.plain:
            self.check_out(found)
        return found

    def check_out(self, nodes: dict[str, Node]) -> None:
        """The files that the commit's attributes change on their way out (git-crypt, LFS), as Git checks them out: as their
        ruler, with an index of our own, into a directory of theirs; we get them through a pipe."""
        if not any(path.rpartition("/")[2] == ".gitattributes" for path in nodes):
            return
        files = [path for path, node in nodes.items() if node.mode.startswith("100") and path not in self.bad]
        aside = self.make_aside()
        git = Git(self.root, GIT_INDEX_FILE=f"{aside}/index", GIT_WORK_TREE=f"{aside}", **self.store)
        git.environment["GIT_DIR"] = os.fsdecode(self.git.run("rev-parse", "--absolute-git-dir")[:-1])
        git.run("read-tree", self.tree)
        given = b"".join(path.encode("utf-8", "surrogateescape") + b"\0" for path in files)
        said = iter(git.run("check-attr", "--cached", "-z", "--stdin", *CHANGED_BY, given=given).split(b"\0")[:-1])
        plain = (b"unspecified", b"unset", b"lf")
        changed = {path for path, _, value in zip(said, said, said, strict=True) if value not in plain}
        if not changed:
            return
        git.run("checkout-index", "-z", "--stdin", given=b"".join(path + b"\0" for path in sorted(changed)))
        process = git.start("-C", str(aside), "--exclude=./index", "-cf", "-", ".", program="tar")
        with tarfile.open(fileobj=process.stdout, mode="r|", bufsize=1 << 20, encoding="utf-8") as tar:
            for number, info in enumerate(tar):
                path = info.name.removeprefix("./")
                if info.isfile() and path.encode("utf-8", "surrogateescape") in changed:
                    nodes[path] = self.spool(tar, info, nodes[path], self.aside / f"{aside.name}.{number}", path)
        if process.wait() != 0 or len(self.spooled) != len(changed):
            raise BentoError(f"{self.root}: not all files could be checked out")

    def spool(self, tar: tarfile.TarFile, info: tarfile.TarInfo, node: Node, target: Path, path: str) -> Node:
        """Keeps what a filter made of a file; it is another with another content."""
        content, digest = tar.extractfile(info), hashlib.sha256()
        assert content is not None
        start = content.read(200)
        for mark, why in LOCKED.items():
            if start.startswith(mark):
                self.bad[path] = why
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for chunk in itertools.chain([start], iter(lambda: content.read(1 << 20), b"")):
                digest.update(chunk)
                file.write(chunk)
        self.spooled[path] = target
        return node._replace(size=info.size, oid=f"filtered {digest.hexdigest()}")

    @functools.cached_property
    def submodules(self) -> dict[str, str]:
        """The paths that the commit's .gitmodules names, and each one's name."""
        if ".gitmodules" not in self.nodes:
            return {}
        where, pattern = f"--blob={self.tree}:.gitmodules", r"^submodule\..*\.path$"
        try:
            listed = self.git.run("config", where, "--null", "--get-regexp", pattern).split(b"\0")[:-1]
        except BentoError:  # there are none
            return {}
        pairs = [os.fsdecode(item).partition("\n") for item in listed]
        return {path: key.removeprefix("submodule.").removesuffix(".path") for key, _, path in pairs}

    def is_wanted(self, path: str) -> bool:
        """Whether somebody has initialised the submodule there."""
        if os.path.lexists(f"{self.root}/{path}/.git"):
            return True
        name = self.submodules.get(path)
        with suppress(BentoError):  # there is no such setting
            return name is not None and bool(self.git.run("config", "--get", f"submodule.{name}.url"))
        return False

    def contents(self, nodes: Sequence[Node]) -> Iterator[Iterator[bytes]]:
        self.blobs = self.blobs or Blobs(self.git)
        for first in range(0, len(nodes), WINDOW):
            some = nodes[first : first + WINDOW]
            self.blobs.ask(node.oid for node in some)
            yield from (self.blobs.take(node.oid, node.size) for node in some)

    def read(self, node: Node) -> bytes:
        try:
            return b"".join(b"".join(content) for content in self.contents([node]))
        except BentoError:
            self.close()
            raise

    def close(self) -> None:
        if self.blobs is not None:
            self.blobs.close()
        self.blobs = None


# --- releases ---


@functools.lru_cache(maxsize=4096)
def header(name: str, size: int, is_directory: bool, executable: bool) -> bytes:
    """The tar header of a member. Hosts share most of their files through utils/, hence the cache."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uid, info.gid, info.uname, info.gname = size, 1, 0, 0, "", ""
    info.type = tarfile.DIRTYPE if is_directory else tarfile.REGTYPE
    info.mode = 0o755 if is_directory or executable else 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def too_large(members: Sequence[Member]) -> str:
    largest = heapq.nlargest(SHOWN, members, key=lambda member: member.size)
    shown = ", ".join(f"{one_line(member.name)} ({member.size} bytes)" for member in largest)
    return f"the release would exceed {client.MAX_RELEASE_BYTES} bytes: leave large files out: {shown}"


# What gets the content of some files as well, on its way into the archive.
Taker = Callable[[str, Iterable[bytes]], None]


def write_release(
    source: Source,
    members: Sequence[Member],
    tar: BinaryIO | None = None,
    large: Iterable[str] = (),
    take: Taker | None = None,
) -> tuple[str, int]:
    """Reads the members once: the release's id and its size in bytes. Always the same for the same content.

    The archive's bytes go to `tar`. `take` gets the content of the `large` ones, too.
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

    def passed(content: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in content:
            put(chunk)
            yield chunk

    with closing(source.contents(members)) as found:
        for member, content in found:
            put(header(member.name, member.size, member.is_directory, member.executable))
            if take is not None and member.name in large:
                take(member.name, passed(content))
            else:
                for chunk in content:
                    put(chunk)
            put(bytes(-member.size % tarfile.BLOCKSIZE))
    put(bytes(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))
    return digest.hexdigest(), size


def unpack_release(source: Source, members: Sequence[Member], tree: Path) -> None:
    """Makes a tree of a release, by the client's own way."""
    archive = tree.with_name(f"{tree.name}.tar")
    with open(archive, "wb", 1 << 20) as file:
        write_release(source, members, file)
    client.unpack(archive, tree)
    archive.unlink()


class Source:
    """What commits have of hosts' directories, each repository at one commit for the whole run. `left_out`: what a person
    should hear of, by kind. `tops`: where each host's configuration lies. `no_git`: a .gitignore without Git is no reason
    to stop. `plain`: what has no Git, and how many files that is. `used`: the repositories that the release being read is
    made of, and `places`, by where its configuration lies: the files and directories."""

    def __init__(self, directory: str, memory: Path) -> None:
        self.directory, self.memory_file, self.no_git, self.dirty = directory, memory, False, False
        self.real, self.real_hosts = os.path.realpath(directory), os.path.realpath(f"{directory}/hosts")
        self.repositories: dict[str, Repository] = {}
        self.broken: dict[str, BentoError] = {}
        self.releases: dict[str, Release] = {}
        self.listed: dict[str, tuple[list[Member], dict[str, str]]] = {}
        self.places: dict[str, set[str]] = {}
        self.commits: dict[str, Commit] = {}
        self.edited: dict[str, dict[str, str]] = {}
        self.left_out: dict[tuple[str, str], dict[str, None]] = {}
        self.plain: dict[str, int] = {}
        self.used: set[str] = set()
        self.seen: set[str] = set()
        self.fixed = True
        self.tops: dict[str, str] = {}
        self.aside: Any = None
        self.find_root = functools.cache(find_root)

    @functools.cached_property
    def memory(self) -> dict[str, Any]:
        """By host: what its release was read from, the key of its members, and the release."""
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self.memory_file.read_bytes())
            if isinstance(found, dict):
                return found
        return {}

    def close(self) -> None:
        for repository in self.repositories.values():
            repository.close()
        if self.aside is not None:
            self.aside.cleanup()

    def show(self, path: str) -> str:
        return one_line(self.called(path))

    def called(self, path: str) -> str:
        """A path as its owner calls it."""
        tops = ((top, f"hosts/{name}") for name, top in self.tops.items())
        for top, called in ((self.real_hosts, "hosts"), (self.real, ""), *tops):
            if path.startswith(f"{top}/"):
                return f"{called}/{path[len(top) + 1 :]}".lstrip("/")
        return path

    def leave_out(self, kind: str, where: str, path: str) -> None:
        self.left_out.setdefault((kind, where), {})[path] = None

    def open(self, root: str, commit: str = "", *, plain: bool = False) -> Repository:
        """The repository there. One that cannot be read is tried once: its ruler could make each time last."""
        import tempfile

        if root in self.broken:
            raise self.broken[root]
        if root not in self.repositories:
            if self.aside is None:
                self.aside = tempfile.TemporaryDirectory(prefix="bento-")
                os.chmod(self.aside.name, 0o711)
            try:
                self.repositories[root] = Repository(
                    root, Path(self.aside.name), commit, plain=plain, dirty=self.dirty and not plain
                )
            except BentoError as error:
                self.broken[root] = error
                raise
        return self.repositories[root]

    def enter(self, directory: str) -> Repository:
        """The repository that a directory lies in. What has none, and no .gitignore, goes as it lies there."""
        if (found := self.repository(directory)) is not None:
            return found[0]
        root = self.find_root(directory)
        if root is None:
            if not self.no_git and (ignore := find_ignore(directory)) is not None:
                raise BentoError(
                    f"{self.show(directory)}: a .gitignore ({ignore}), and no Git that knows what it leaves out:"
                    " 'git init' there and commit, or 'populate --no-git'"
                )
            repository = self.open(directory, plain=True)
            for special in repository.specials:
                self.leave_out("special", "", self.show(f"{directory}/{special}"))
            return repository
        outer = self.find_root(os.path.dirname(root)) if root != "/" else None
        if outer is not None and (os.path.isfile(f"{root}/.git") or os.path.lexists(f"{outer}/.gitmodules")):
            above = self.enter(outer)
            if root[len(outer.rstrip("/")) + 1 :] in above.submodules and self.look(root) is not None:
                return self.repositories[root]
        return self.open(root)

    def repository(self, path: str) -> tuple[Repository, str] | None:
        above = path
        while above not in self.repositories:
            if above == "/":
                return None
            above = os.path.dirname(above)
        return self.repositories[above], path[len(above.rstrip("/")) + 1 :]

    def look(self, path: str) -> Node | None:
        """What the commit has at a path, which has no link in it before its last name. None: nothing."""
        found = self.repository(path)
        if found is None and f"{path}/".startswith(f"{self.real}/"):  # links may lead anywhere in the fleet
            self.enter(self.real)
            found = self.repository(path)
        if found is None:
            around = f"{path}/".replace("//", "/")
            roots = (self.real, *self.repositories)
            return Node(DIRECTORY, "", 0) if any(f"{root}/".startswith(around) for root in roots) else None
        repository, name = found
        self.used.add(repository.root)
        node = repository.nodes.get(name)
        if node is None or node.mode != SUBMODULE:
            return node
        if not repository.is_wanted(name):
            self.fixed = False  # it may be, the next time
            self.leave_out("submodule", repository.root, name)
            return node
        try:
            return self.open(path, node.oid).nodes[""]
        except (BentoError, OSError):
            where = f"submodule {self.show(path)}: its commit {node.oid[:12]} is not here"
            raise BentoError(f"{where}: 'git -C {repository.root} submodule update --init'") from None

    def find(self, path: str) -> tuple[str, Node | None]:
        """Where a path of the commit leads, and what is there. Out of all commits: the path so far, and the rest of it."""
        at, todo, hops = "/", deque(path.split("/")), 0
        while todo:
            name = todo.popleft()
            if name in ("", "."):
                continue
            here = os.path.dirname(at) if name == ".." else os.path.join(at, name)
            node, outside = self.look(here), self.repository(here) is None
            if node is not None and node.mode == LINK:
                repository, _ = self.repository(here) or (None, "")
                assert repository is not None
                target = os.fsdecode(repository.read(node))
                self.seen.add(here)
            elif outside and name != ".." and os.path.islink(here):
                target = os.readlink(here)
            elif node is None:
                return "/".join([here, *todo]), None
            elif node.mode == SUBMODULE and (todo or hops):
                where = f"{self.show(path)}: a link into the submodule {self.show(here)}, which is not here"
                raise BentoError(f"{where}: 'git submodule update --init' there")
            else:
                at = here
                continue
            hops += 1
            if hops > MAX_HOPS:
                raise BentoError(f"{self.show(path)}: link loop")
            at = "/" if target.startswith("/") else at
            todo.extendleft(reversed(target.split("/")))
        return at, self.look(at)

    def top(self, name: str) -> str:
        """Where hosts/NAME leads, as it lies there; what is in it is the commit's."""
        if name in self.tops:
            return self.tops[name]
        place = f"{self.directory}/hosts/{name}"
        real = os.path.realpath(place)
        if self.find_root(real) is None and not os.path.isdir(real):
            raise BentoError(f"hosts/{name}: {'dangling link' if os.path.islink(place) else 'not a directory'}")
        if find_ruler(os.path.abspath(place)) != find_ruler(real):
            raise BentoError(f"hosts/{name}: a link of somebody's to a tree of somebody else's, {real}: name that")
        self.tops[name] = real
        return real

    def check_top(self, name: str) -> str:
        """The same, for a host whose commit has something there."""
        top = self.top(name)
        if self.repository(top) is None and self.find_root(top) is None and not f"{top}/".startswith(f"{self.real}/"):
            self.check_way_out(name, top)
        self.enter(self.real if f"{top}/".startswith(f"{self.real}/") and self.find_root(top) is None else top)
        node = self.look(top)
        if node is None or node.mode == SUBMODULE:
            if not os.path.isdir(top):
                raise BentoError(f"hosts/{name}: dangling link")
            if self.enter(top).plain:
                raise BentoError(f"hosts/{name}: neither flake.nix nor configuration.nix in it")
            raise BentoError(f"hosts/{name}: not in the commit: 'git add' and 'git commit' it")
        if node.mode != DIRECTORY:
            raise BentoError(f"hosts/{name}: not a directory")
        return top

    def check_way_out(self, name: str, top: str) -> None:
        """Who can push a link says what is in the commit, not which of this machine's directories is to be published."""
        root = self.find_root(self.real_hosts)
        if root is not None:
            node = self.enter(root).nodes.get(f"{self.real_hosts}/{name}"[len(root.rstrip("/")) + 1 :])
            if node is not None and node.mode == LINK:
                raise BentoError(f"hosts/{name}: link out of the fleet directory, to {one_line(top)}, where no Git is")

    def collect(self, directory: str, prefix: str, above: tuple[str, ...], members: list[Member]) -> None:
        """All that a release has of a directory. `above` are the real ones that it is in, and itself; the first is the
        host's own."""
        if len(above) > client.MAX_DEPTH:
            raise BentoError(f"{self.show(directory)}: a tree deeper than {client.MAX_DEPTH} directories")
        repository, where = self.repository(directory) or (None, "")
        assert repository is not None and repository.nodes
        self.used.add(repository.root)
        for name in repository.names.get(where, ()):
            place = path = f"{directory}/{name}"
            inner, there = f"{where}/{name}" if where else name, repository
            if inner in repository.bad:
                raise BentoError(f"{self.show(place)}: {repository.bad[inner]}")
            node: Node | None = repository.nodes[inner]
            if node is not None and node.mode == SUBMODULE:
                node = self.look(path)
            assert node is not None
            if node.mode == LINK:
                path, node = self.follow(place, repository.read(node), above[0])
                if node is None or (directory == self.real_hosts and node.mode == DIRECTORY):
                    continue
                self.seen.add(path)
                there, rel = self.repository(path) or (repository, "")
                if rel in there.bad:
                    raise BentoError(f"{self.show(place)}: {there.bad[rel]}")
            if directory == self.real_hosts and OURS.fullmatch(name) and node.mode != DIRECTORY:
                continue  # NAME.pub, waves and their like are for the server, and no part of a host's configuration
            if not name.isascii():
                self.check_name(name, place)
            if len(members) >= MAX_MEMBERS:
                raise BentoError(f"{self.show(place)}: with it, the release has more than {MAX_MEMBERS} files")
            if node.mode not in (DIRECTORY, SUBMODULE):
                members.append(Member(f"{prefix}{name}", path, False, node.mode == "100755", node.size, node, there))
                continue
            members.append(Member(f"{prefix}{name}", path, True))
            if path in above:
                raise BentoError(f"{self.show(place)}: link loop: it leads to a directory that it is in")
            self.collect(path, f"{prefix}{name}/", (*above, path), members)

    def follow(self, place: str, target: bytes, top: str) -> tuple[str, Node | None]:
        """Where a link in a host's tree leads, which has to be in it, or in the fleet's."""
        path, found = self.find(place)
        if found is None and path.startswith("/nix/store/"):
            return path, None
        if not f"{path}/".startswith((f"{self.real}/".replace("//", "/"), f"{self.top_root(top)}/".replace("//", "/"))):
            raise BentoError(f"{self.show(place)}: link out of the fleet directory, to {one_line(path)}")
        if found is None:
            self.leave_out("dangling", "", f"{self.show(place)} -> {one_line(os.fsdecode(target))}")
        return path, found

    def check_name(self, name: str, place: str) -> None:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise BentoError(f"{one_line(repr(self.called(place)))}: the name is not UTF-8: rename it") from None

    def top_root(self, directory: str) -> str:
        """The outermost repository around a directory: links may lead anywhere in it."""
        around = [root for root in self.repositories if f"{directory}/".startswith(f"{root.rstrip('/')}/")]
        return min(around, key=len, default=directory)

    def contents(self, members: Sequence[Member]) -> Generator[tuple[Member, Iterable[bytes]], None, None]:
        """The members with what is in them, which has to be read in this order."""
        asked, done = list[Repository](), False
        try:
            for first in range(0, len(members), WINDOW):
                some, wanted = members[first : first + WINDOW], dict[Repository, list[str]]()
                for member in some:
                    if member.node and member.repository and member.place not in member.repository.spooled:
                        wanted.setdefault(member.repository, []).append(member.node.oid)
                for repository, oids in wanted.items():
                    asked.append(repository)
                    repository.blobs = repository.blobs or Blobs(repository.git)
                    repository.blobs.ask(oids)
                for member in some:
                    yield member, member.read() if member.node else ()
            done = True
        finally:
            for repository in [] if done else asked:  # it has answers that nobody will take
                repository.close()

    def trees(self) -> dict[str, str]:
        """The trees that were just read, by repository: as long as they are the same, so is the release. Empty where that
        cannot be told."""
        found = [self.repositories[root] for root in sorted(self.used)]
        if not self.fixed or any(each.plain or each.spooled for each in found):
            return {}
        return {each.root: each.tree for each in found if not each.inner}

    def recall(self, name: str) -> Release | None:
        """The release that a host's commit made the last time, if all of its commits are the same: nothing is read."""
        known = self.memory.get(name)
        try:
            top = self.top(name)
            same = known is not None and known["trees"] and (known["top"], known["root"]) == (top, self.find_root(top))
            if (
                known is not None
                and same
                and all(self.open(root).tree == tree for root, tree in known["trees"].items())
            ):
                return Release(known["release"], known["size"], known["key"])
        except (BentoError, KeyError, TypeError, AttributeError):
            pass
        return None

    def remember(self, name: str, release: Release, trees: Mapping[str, str]) -> None:
        top = self.top(name)
        known = {"top": top, "root": self.find_root(top), "trees": trees, "key": release.key}
        self.memory[name] = known | {"release": release.id, "size": release.size}

    def save(self) -> None:
        with suppress(OSError):  # nothing is published, or the disk is full: then it is read the next time
            client.write_atomic(self.memory_file, json.dumps(self.memory).encode(), 0o600)

    def commit(self, name: str) -> Commit | None:
        """The newest commit that has changed what a host's release is made of, in the repository that its configuration
        lies in: the same for everybody who has it. None where no Git is; without an ID where it is none yet."""
        top = self.top(name)
        repository = self.enter(top)
        if repository.plain:
            return None
        if repository.tree != repository.head.tree:
            name, _, subject = repository.head.revision.partition(" ")
            return repository.head._replace(id="", revision=f"{name}+ {subject}")
        if top not in self.commits:
            places = self.places_in(repository, self.places[top])
            whole = len(places) > MAX_PLACES or repository.root in places
            paths = (
                ["."] if whole else [f":(literal){os.path.relpath(path, repository.root)}" for path in sorted(places)]
            )
            own = os.path.relpath(self.real_hosts, repository.root)
            if not own.startswith(".."):  # what is said of hosts is not part of what they are
                inner = "" if own == "." else re.sub(r"([\\*?[])", r"\\\1", own) + "/"
                paths += [f":(exclude,glob){inner}{name}" for name in ("*.pub", "*.sig", "*.absent", "waves", "signed")]
            self.commits[top] = repository.newest(repository.head.id, *paths) or repository.head
        return self.commits[top]

    def edits(self, name: str) -> dict[str, str]:
        """What differs from the commit where a host's configuration lies."""
        repository = self.enter(self.top(name))
        if repository.root not in self.edited:
            self.edited[repository.root] = repository.edits()
        return self.edited[repository.root]

    def tell_edits(self, name: str) -> str:
        """What a person should hear of a host: that files of it are not as they are committed, so are not published."""
        top = self.top(name)
        root = self.enter(top).root.rstrip("/")
        own = f"{os.path.relpath(self.real_hosts, root)}/".removeprefix("./")
        found = dict[str, str]()
        for path, how in self.edits(name).items():
            at, about = f"{root}/{path}/", path.startswith(own) and OURS.fullmatch(path[len(own) :])
            places = (f"{place.rstrip('/')}/" for place in self.places[top])
            if not about and any(at.startswith(place) or place.startswith(at) for place in places):
                found[one_line(path)] = how
        if not found:
            return ""
        files = f"{counted(len(found), 'file')} differ{'s' if len(found) == 1 else ''} from the commit"
        how_to = "git add -A && git commit -m '…'" if "??" in found.values() else "git commit -am '…'"
        return f"not published: {files} ({show_names(sorted(found))}): {how_to}"

    def places_in(self, repository: Repository, places: Iterable[str]) -> set[str]:
        """As this repository's commits know them: without those in others, and of a submodule its own place."""
        inner = [root for root in self.repositories if root.startswith(f"{repository.root.rstrip('/')}/")]
        found = set[str]()
        for place in places:
            around = [root for root in inner if f"{place}/".startswith(f"{root}/")]
            found.add(min(around, key=len, default=place))
        return {
            path
            for path in found
            if f"{path}/".startswith(f"{repository.root.rstrip('/')}/")
            and not any(str(above) in found for above in Path(path).parents)
        }

    def make_known(self, *paths: Path) -> None:
        """Tells Git of new files. Their content is for their owner to commit."""
        for path in paths:
            directory = os.path.realpath(path.parent)
            root = self.find_root(directory)
            if root is not None:
                name = os.path.relpath(f"{directory}/{path.name}", root)
                git = Git(root, GIT_DIR=f"{root}/.git", GIT_WORK_TREE=root)
                git.run("add", "--intent-to-add", "--force", "--", name)

    def warnings(self) -> list[str]:
        """What was left out, a line a kind, and a work tree."""
        texts = {
            "submodule": "{where}: {n} never initialised, and empty here: 'git submodule update --init' what belongs to a host",
            "dangling": "{links} left out",
            "special": "{n} left out: neither files nor directories (sockets, FIFOs, devices)",
            "local": "only this server can build a flake with an input in its own files",
        }
        lines = []
        for (kind, where), paths in sorted(self.left_out.items()):
            number = len(paths)
            what = "submodule" if kind == "submodule" else "name"
            numbers = {"n": counted(number, what), "links": counted(number, "dangling link")}
            words = texts[kind].format(where=one_line(where), **numbers)
            lines.append(f"{words}: {show_names([one_line(path) for path in sorted(paths)])}")
        return lines


def find_root(directory: str) -> str | None:
    """The nearest directory above, or this one, that has a .git; None outside of Git."""
    while not os.path.lexists(f"{directory}/.git"):
        if directory == "/":
            return None
        directory = os.path.dirname(directory)
    return directory


def find_ignore(directory: str) -> str | None:
    """A .gitignore at a tree's top, or above it; but a tree in the Nix store is what it is."""
    while directory != "/" and not directory.startswith("/nix/store/"):
        if os.path.lexists(f"{directory}/.gitignore"):
            return f"{directory}/.gitignore"
        directory = os.path.dirname(directory)
    return None


def key_of(members: Sequence[Member]) -> str:
    """The same for the same content, and known without reading it: from names, modes and object ids."""
    digest = hashlib.sha256(b"1\n")
    for member in members:
        oid = member.node.oid if member.node is not None else ""
        digest.update(f"{member.name}\0{member.executable:d}{oid}\n".encode())
    return digest.hexdigest()


def list_members(fleet: Fleet, name: str) -> tuple[list[Member], dict[str, str]]:
    """Everything that the commit has below hosts/NAME, links followed, sorted bytewise; and the trees that this is from."""
    source = fleet.source
    top = source.check_top(name)
    if top not in source.listed:
        members: list[Member] = []
        source.used, source.seen, source.fixed = {source.enter(top).root}, {top}, True
        source.collect(top, "", (top,), members)
        members.sort(key=lambda member: member.name)  # strings compare as their UTF-8 does
        if sum(MEMBER_BYTES + member.size for member in members) > client.MAX_RELEASE_BYTES:
            raise BentoError(too_large(members))
        if len(source.listed) >= MAX_SHARED:
            source.listed.clear()
        source.listed[top], source.places[top] = (members, source.trees()), source.seen
    return source.listed[top]


def read_release(
    fleet: Fleet, name: str, keep: Callable[[Sequence[Member]], tuple[str, int]] | None = None
) -> tuple[Release, Recipe]:
    """A host's release, which is read once for all that share its directory, and how it is built. `keep`: what reads it,
    and has it then."""
    source, top = fleet.source, fleet.source.check_top(name)
    members, trees = list_members(fleet, name)
    recipe = find_recipe(fleet, members, name)
    release = source.releases.get(top)
    if release is None:
        key, known = key_of(members), source.memory.get(name)
        if isinstance(known, dict) and known.get("key") == key:
            release = Release(known["release"], known["size"], key)
        else:
            release = Release(*(keep(members) if keep is not None else write_release(source, members)), key)
            for repository in {member.repository for member in members if member.repository}:
                if repository.plain:
                    source.plain[repository.root] = sum(node.mode != DIRECTORY for node in repository.nodes.values())
        source.releases[top] = release
    source.remember(name, release, trees)
    return release, recipe


def find_member(members: Sequence[Member], name: str) -> Member | None:
    """A file of a release. They are sorted: of fifty thousand that a hundred hosts share, nobody looks at all."""
    at = bisect.bisect_left(members, name, key=lambda member: member.name)
    found = members[at] if at < len(members) else None
    return found if found is not None and found.name == name and not found.is_directory else None


def find_recipe(fleet: Fleet, members: Sequence[Member], name: str) -> Recipe:
    """How a release is built for a host. BentoError when there is nothing to build."""
    own = find_member(members, "bento.json")
    recipe = Recipe(name) if own is None else client.parse_recipe(own.bytes(), f"hosts/{name}/bento.json", name)
    allowed = shlex.split(os.environ.get("BENTO_ALLOW_OPTIONS", ""))
    client.check_options(recipe, allowed, "services.bento-server.allowOptions (BENTO_ALLOW_OPTIONS)")
    files = (recipe.file,) if recipe.file else ("flake.nix", "configuration.nix")
    entries = [f"{recipe.directory}/{file}".lstrip("/") for file in files]
    if any(find_member(members, entry) for entry in entries):
        return recipe
    for entry in entries:
        if os.path.isfile(f"{fleet.source.top(name)}/{entry}") and not fleet.source.enter(fleet.source.top(name)).plain:
            raise BentoError(f"hosts/{name}/{entry}: not in the commit: 'git add' and 'git commit' it")
    where = f"hosts/{name}/{recipe.directory}".rstrip("/")
    missing = f"no {recipe.file}" if recipe.file else "neither flake.nix nor configuration.nix"
    raise BentoError(f"{where}: {missing} in it")


def local_inputs(members: Sequence[Member], recipe: Recipe) -> list[str]:
    """The inputs of a locked flake that are files of this machine. What cannot be read, Nix will complain of."""
    lock, found = find_member(members, f"{recipe.directory}/flake.lock".lstrip("/")), []
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        for node, value in (json.loads(lock.bytes())["nodes"] if lock is not None else {}).items():
            locked = value.get("locked", {})
            place = str(locked.get("path") if locked.get("type") == "path" else locked.get("url"))
            if place.startswith(("/", "file:")) and not place.startswith("file:/dev/"):
                found.append(f"{node} ({place})")
    return found


NIX_TOKEN = re.compile(r"""#[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|''.*?''|[A-Za-z_][\w'-]*|\S""", re.DOTALL)


def unlocked_inputs(members: Sequence[Member], recipe: Recipe) -> list[str]:
    """The inputs of a flake that its flake.lock lacks: which they are would be found out anew by each host."""
    files = {}
    for name in ("flake.nix", "flake.lock"):
        if (member := find_member(members, f"{recipe.directory}/{name}".lstrip("/"))) is not None:
            files[name] = member.bytes()
    if recipe.file or "flake.nix" not in files:
        return []
    locked: Any = {}
    if "flake.lock" in files:
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            nodes = json.loads(files["flake.lock"])
            locked = nodes["nodes"][nodes["root"]].get("inputs", {}).keys()
    return [name for name in flake_inputs(files["flake.nix"].decode(errors="replace")) if name not in locked]


def flake_inputs(text: str) -> list[str]:
    """The inputs that a flake.nix names: `inputs.NAME…`, `inputs = { NAME…`, and what its outputs take."""
    tokens = [token for token in NIX_TOKEN.findall(text) if token[0] != "#" and token[:2] != "/*"]
    found: dict[str, None] = {}
    depth, inside, start = 0, "", True
    for number, token in enumerate(tokens):
        before, after = tokens[number - 2 : number], tokens[number + 1 : number + 2]
        if token in ("{", "}"):
            depth += 1 if token == "{" else -1
            start = True
            if depth == 2 and token == "{" and before and before[-1] == "=":
                inside = before[0]
            if depth == 2 and token == "{" and before and before[-1] == "@":
                inside = "outputs"
            if depth < 2:
                inside = ""
            continue
        name = token.strip('"')
        if depth == 1 and before == ["inputs", "."]:
            found[name] = None
        if depth == 2 and inside == "inputs" and start and after and after[0] in ("=", "."):
            found[name] = None
        if depth == 2 and inside == "outputs" and start and name not in ("self", ".", "@") and token not in (",",):
            found[name] = None
        start = token in (";", ",") if depth == 2 else True
    return list(found)


# --- states of hosts ---


def knows(report: Report | None, since: tuple[int, int]) -> bool:
    """Whether a host's client is at least of that version."""
    found = re.match(r"(\d+)\.(\d+)", report.client) if report else None
    return found is not None and (int(found[1]), int(found[2])) >= since


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
        # A client before 1.2 builds a flake that does not see its commit.
        same = current.commit is None or knows(report, client.PIN_SINCE)
        expected = (current.system if same else None) or last.system
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
    if (of_names := os.fstat(logs).st_size) > MAX_DIRECTORY_BYTES:
        problem = f"logs/ is slow to read, with {of_names >> 20} MB of names that are gone: remove it: 'bento.py populate' makes it anew"
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


def is_full(directory: Path, room_bytes: int) -> str:
    """What a disk lacks; nothing where there is room."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return ""
    if disk.f_bavail * disk.f_frsize < room_bytes:
        return "has no room"
    return "" if disk.f_favail or not disk.f_files else "has no inodes"


class Load(NamedTuple):
    """How much a host has in its logs/. A sparse file takes no more than it takes."""

    taken: int
    files: int
    host: str

    def __str__(self) -> str:
        return f"{self.host} ({self.taken >> 20} MB in {counted(self.files, 'file')})"


def weigh_all(chroot_dir: Path) -> list[Load]:
    """What each host has in its logs/, the most first; of hosts that are gone, too."""
    found, lacks_names = [], is_full(chroot_dir, 0)
    for name in filter(client.HOST_NAME.fullmatch, os.listdir(chroot_dir)):
        taken = files = 0
        with suppress(OSError), open_logs(chroot_dir / name) as logs, os.scandir(logs) as entries:
            for entry in itertools.islice(entries, MAX_LOG_ENTRIES):
                files += 1
                with suppress(FileNotFoundError):
                    taken += entry.stat(follow_symlinks=False).st_blocks * 512
        found.append(Load(taken, files, name))
    return sorted(found, key=lambda load: (load.files, load.taken) if lacks_names else load, reverse=True)


def parse_log_name(name: str) -> Attempt | None:
    if not client.LOG_NAME.fullmatch(name):
        return None
    when, release, result = name.removesuffix(".log").split("_")
    with suppress(ValueError):
        finished = format_time(datetime.fromisoformat(when).timestamp())
        client.parse_time(finished)  # of the first thousand years, there is none
        return Attempt(name, finished, release, result)
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


def read_host(chroot: str, name: str, logs: Sequence[str] = ()) -> Found:
    """What is published for a host, and its newest report: in its chroot, or in `logs`, which are laid out like that."""
    current, problem = None, ""
    try:
        current = read_published(chroot, name)
        if current is None and os.path.exists(f"{chroot}/history"):
            problem = f"current.json is missing: 'bento.py populate {name}' publishes it again"
    except BentoError as error:
        problem = one_line(str(error))
    except OSError as error:
        problem = f"{chroot}/current.json: {why_not(error)}"
    reports = [read_report(place, name) for place in (chroot, *(f"{top}/{name}" for top in logs))]
    found = max(reports, key=lambda each: each.seen_s or 0.0)
    if problem:
        return found._replace(problem=problem, unreadable=True)
    if current is not None and (found.report is None or found.report.release != current.release):
        found = found._replace(history=tuple(read_history(chroot)))
    return found._replace(current=current)


def look_at(name: str, chroot: str, now_s: float, offline_after_s: float, beside: Beside) -> Row:
    """The row of a host. All that is shown of it is worked out here: whatever is wrong with what a host wrote is that
    row's problem, and no other's."""
    try:
        row = make_row(name, read_host(chroot, name, beside.logs), now_s, offline_after_s, beside)
        row_json(row, now_s)
        format_host(row, now_s)
    except Exception as error:
        problem = f"logs/ has something that nobody understands: {type(error).__name__}: {error}"
        row = make_row(name, Found(None, None, None, one_line(problem, 300), (), True), now_s, offline_after_s, beside)
    return row


def make_row(name: str, found: Found, now_s: float, offline_after_s: float, beside: Beside = NOTHING_BESIDE) -> Row:
    current, report, seen_s = found.current, found.report, found.seen_s
    state, offline, _, drift = judge(current, report, seen_s, now_s, patience_s(report, offline_after_s))
    held = "" if current is None else beside.held.get((name, current.release), "")
    was = state if offline and state == "up-to-date" else ""
    if found.unreadable:
        state = "unknown"
    elif was:
        state = "offline"
    elif held and state in ("up-to-date", "waiting"):
        state = "held"
    absence, refusal = beside.absent.get(name, ""), beside.refused.get(name)
    machines = note_machine(beside.machines.get(name, ()), report, now_s)
    row = Row(name, state, {}, current, report, seen_s, absence, refusal, held, found.logs, was, machines)
    return row._replace(flags=find_flags(row, found, now_s, beside, offline=offline, drift=drift))


def find_flags(row: Row, found: Found, now_s: float, beside: Beside, *, offline: bool, drift: bool) -> dict[str, Flag]:
    """Which of FLAGS hold, each with words for a person."""
    report, refusal, seen_s, since_s = row.report, row.refusal, row.seen_s or 0.0, row.since_s
    flags: dict[str, Flag | None] = {
        "problem": Flag(found.problem, seen_s) if found.problem else None,
        "failed": Flag(failure_words(row), since_s, failure_words(row, alone=False)) if row.failed else None,
        "drift": Flag("drift", since_s) if drift else None,
        "late": None if offline else find_lateness(row, found.history, now_s, beside.late_reboot_s),
        "offline": Flag(f"offline for {age(now_s - seen_s)}", seen_s, "offline") if offline else None,
        **find_expiry(row.current, now_s),
    }
    if row.absence:
        flags["absent"] = Flag(f"absent: {row.absence}" if offline else f"back again: remove hosts/{row.host}.absent")
    if report is not None:
        units = f"failed units: {one_line(', '.join(report.failed_units), 1000)}"
        flags |= {
            "failed_units": Flag(units, since_s) if report.failed_units else None,
            "two_machines": Flag(f"two machines report as {row.host}") if has_twin(row.machines, now_s) else None,
            "needs_reboot": Flag("needs reboot") if report.needs_reboot else None,
            "other_client": Flag(f"client {report.client}") if report.client != client.VERSION else None,
            "paused": Flag(f"paused until {report.paused_until}") if is_paused(report, seen_s, now_s) else None,
        }
    if refusal is not None:
        began_s = client.parse_time(refusal.since)
        words = f"not published for {age(now_s - began_s)}, tried {counted(refusal.times, 'time')}: {refusal.error}"
        flags["not_published"] = Flag(words, began_s, f"not published: {refusal.error}")
    return {name: flag for name in FLAGS if (flag := flags.get(name)) is not None}


def note_machine(known: Machines, report: Report | None, now_s: float) -> Machines:
    """The machines that reported as a host, with this report."""
    if report is None or report.machine is None or (known and known[-1][0] == report.machine):
        return known
    return (*known[1 - KEEP_MACHINES :], (report.machine, now_s))


def has_twin(machines: Machines, now_s: float) -> bool:
    """Whether one has come back after another, lately: a machine that takes another's place does not."""
    mark, since_s = machines[-1] if machines else ("", 0.0)
    return mark in {each for each, _ in machines[:-1]} and now_s - since_s < TWIN_S


def find_lateness(row: Row, history: Sequence[Published], now_s: float, late_reboot_s: float) -> Flag | None:
    """What a host should have come to long ago, whosever fault it is that it has not. Whoever waits for an earlier wave,
    is away with an excuse, or has left, is not late; and what failed is told already."""
    current, report = row.current, row.report
    if current is None or row.absence or row.failed or row.state in ("held", "left", "unknown"):
        return None
    runs, what = report.release if report is not None else None, name_of(current)
    if report is not None and row.state in ("up-to-date", "waiting"):
        since_s = row.ours_s(report.last.finished) if report.last is not None else None
        if since_s is None or (row.state == "up-to-date" and not report.needs_reboot):
            return None
        limit_s = late_reboot_s if report.reboot in (None, "never") else LATE_REBOOT_S
        words, about = f"{what} waits for a reboot for {age(now_s - since_s)}", "waits for a reboot"
    else:
        missed = list(itertools.takewhile(lambda each: each.release != runs, reversed(history)))
        since_s, limit_s = client.parse_time(missed[-1].time if missed else current.published), LATE_S
        if report is not None and report.last is not None and report.last.result != Result.OK:
            since_s = client.parse_time(
                current.published
            )  # it failed an earlier one, which was told, and is to try this
        if report is None:
            words, about = f"has never reported, {what} was published {age(now_s - since_s)} ago", "has never reported"
        elif runs is not None and history and len(missed) == len(history) < KEEP_HISTORY:
            about = (
                f"runs {runs[:7]}, which this server never published: 'bento.py populate --again', if it was restored"
            )
            words = f"{about}; late for {age(now_s - since_s)}"
        else:
            words, about = f"late: {what} was published {age(now_s - since_s)} ago", f"late: does not run {what}"
    if report is not None and row.seen_s is not None:
        since_s = max(since_s, row.seen_s + pause_left_s(report) if report.paused_until else 0.0)
    return Flag(words, since_s, about) if now_s - since_s > max(limit_s, patience_s(report, 0)) else None


def name_of(current: Current) -> str:
    """What people call a release: the commit that it was made of, if that is known."""
    found = COMMIT.match(current.revision or "")
    return found[0][:7] if found is not None else current.release[:7]


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


def is_paused(report: Report, seen_s: float, now_s: float) -> bool:
    return report.paused_until is not None and pause_left_s(report) > now_s - seen_s


def find_expiry(current: Current | None, now_s: float) -> dict[str, Flag | None]:
    """Whether nobody vouches any more for what is published, or soon will not."""
    expires_s = None
    with suppress(BentoError):
        if current is not None and current.vow is not None:
            expires_s = client.parse_time(client.parse_signed(current.vow.text, "").expires)
    if expires_s is None or now_s < expires_s - NOTICE_S:
        return {}
    if now_s < expires_s:
        words = f"signature expires in {age(expires_s - now_s)}: 'bento.py sign --key FILE'"
        return {"expires_soon": Flag(words, expires_s - NOTICE_S, "signature expires soon: 'bento.py sign --key FILE'")}
    return {"expired": Flag("signature expired: 'bento.py sign --key FILE'", expires_s)}


# The states, what is urgent first, each with its symbol and its colour on a terminal.
STATES = {
    "failing": ("✗", "31"), "rolled-back": ("↶", "31"), "unknown": ("?", "31"), "pending": ("…", "33"), "held": ("‖", "33"),
    "building": ("⚙", "36"), "waiting": ("↻", "33"), "offline": ("!", "31"), "new": ("·", "2"), "left": ("-", "2"), "up-to-date": ("✓", "32"),
}  # fmt: skip
URGENCY = tuple(STATES)


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """What needs a person first: of that the worst, and of that what broke last."""
    order = list(FLAGS)

    def rank(row: Row) -> tuple[object, ...]:
        worst = order.index(row.reasons[0]) if row.reasons else len(order)
        return worst, -row.broke_s, URGENCY.index(row.state), row.host

    return sorted(rows, key=rank)


RESULT_MARKS: dict[str, str] = {
    Result.OK: "✓", Result.BUILD_FAILED: "✗", Result.FETCH_FAILED: "↓", Result.ROLLED_BACK: "↶", Result.ROLLBACK_FAILED: "‼",
    Result.POSTPONED: "…", Result.INTERRUPTED: "~",
}  # fmt: skip
# Of the parts of a bar, the last for all that are older than the others, and for what nobody knows.
SHADES, NOT_KNOWN, UNKNOWN_RELEASE = "█▓▒░", "·", "not known"
# What a revision begins with, by default.
COMMIT = re.compile(r"[0-9a-f]{7,40}(?![\w])\+?")
# Where the encoding of stdout has none of our symbols.
PLAIN = str.maketrans("✗↶…⚙↻·✓‖↓‼█▓▒░", "x<~*@.+|v%#=:-")


def format_table(rows: Sequence[Row], now_s: float, width: int, *, decorated: bool = False) -> str:
    """The status table for `width` columns, and a summary. `decorated`: symbols and colours, for a terminal."""
    name_width = max([4, *(len(row.host) for row in rows)])
    columns = [("HOST", name_width), ("STATE", 11), ("RUNS", 7), ("SINCE", 5), ("SEEN", 5)]
    if width >= name_width + 80:
        columns.insert(3, ("SYSTEM", 8))
    if wide := width >= name_width + 120 and any(row.subject for row in rows):
        columns[2] = ("RUNS", 8 + REVISION_WIDTH)
    bar = format_bar(rows, width)
    summary = [*([bar] if bar else []), *textwrap.wrap(format_summary(rows), width)]
    gutter = "  " if decorated else ""
    lines = [clip((gutter + " ".join(f"{title:<{size}}" for title, size in columns) + "  NOTES").rstrip(), width)]
    for row in rows:
        cells = row_cells(row, now_s)
        if wide:
            cells["RUNS"] += f" {clip(row.subject, REVISION_WIDTH)}"
        text = " ".join(f"{cells[title]:<{size}}" for title, size in columns)
        line = clip(f"{text}  {'; '.join(notes(row, now_s))}".rstrip(), width - len(gutter))
        if decorated:
            colour = "31" if row.needs_a_person else STATES[row.state][1]
            line = f"\x1b[{colour}m{symbol_of(row)}\x1b[0m {line}"
        lines.append(line)
    return "\n".join([*lines, *summary])


def symbol_of(row: Row) -> str:
    """What a state looks like, unless something else is the matter with a host."""
    alarm = row.silent or (row.needs_a_person and row.reasons[0] not in ("failed", "problem"))
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
        "RUNS": row.runs or "-",
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
        *(("needs you", row.flags[reason].words) for reason in row.reasons),
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
        ("paused", f"until {report.paused_until}" if "paused" in row.flags else None),
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
        for word in {row.state, *(mark for mark in MARKS if mark in row.flags)}:
            counts[word] = counts.get(word, 0) + 1
    return counts


def notes(row: Row, now_s: float) -> list[str]:
    """What a person should know of a host, most important first."""
    last = row.report.last if row.report else None
    # Silence is told first: whatever else is known of the host was so before.
    found = [row.flags[name].words for name in sorted(row.flags, key=lambda name: name != "offline")]
    if row.held:
        found.append(row.held)
    if row.was:
        found.append(f"was {row.was}")
    if row.state in ("pending", "building", "new") and row.published_s is not None and "late" not in row.flags:
        found.append(f"{what_is_published(row)} published {age(now_s - row.published_s)} ago")
    elif row.current is None and "problem" not in row.flags:
        found.append("nothing published")
    elif row.state == "up-to-date" and last is not None and last.reason:
        found.append(one_line(last.reason))
    if wrong := clock_error(row):
        found.append(f"clock {wrong}")
    return list(dict.fromkeys(found))


def what_is_published(row: Row) -> str:
    return name_of(row.current) if row.current is not None else "-"


def failure_words(row: Row, *, alone: bool = True) -> str:
    """Which release fails, how often, and why; or only why, as it may be the same for many."""
    last = row.report.last if row.report else None
    if last is None:
        return ""
    mine = row.current is not None and row.current.release == last.release
    what = what_is_published(row) if mine else (last.release or "")[:7] or "what is published"
    tried = f", tried {counted(last.attempt, 'time')}" if last.attempt > 1 and alone else ""
    reason = last.reason if last.result == row.state else f"{last.result}: {last.reason}"
    return one_line(f"{what}{tried}: {reason}", 1000)


def since(when_s: float, now_s: float) -> str:
    return f"since {format_time(when_s)} ({age(now_s - when_s)})"


def complaint(row: Row, now_s: float) -> Failure:
    """What a person is told of a host that needs one, who does not see the table. What is wrong comes first."""
    since_s, silent = row.since_s, row.flags.get("offline")
    found = [words for words in notes(row, now_s) if silent is None or words not in (silent.words, f"was {row.was}")]
    state = row.state + (f" {since(since_s, now_s)}" if since_s is not None else "")
    if silent is not None and row.seen_s is not None:
        words = [f"offline {since(row.seen_s, now_s)}, it was {row.was or row.state}", *found]
    elif row.reasons[:1] in (["failed"], ["problem"]):
        words = [f"{state}: {'; '.join(found)}"]
    else:
        words = [*found, state]
    return Failure(row.host, "; ".join(words))


def complaints(rows: Iterable[Row], now_s: float) -> list[tuple[list[Row], str]]:
    """What those need who need a person, in the order of the rows: of one host all that there is to say; of many that have
    the same for a first reason, that, and for how long."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.needs_a_person:
            flag = row.flags[row.reasons[0]]
            groups.setdefault((row.reasons[0], flag.about or flag.words), []).append(row)
    found = []
    for (reason, about), group in groups.items():
        words = complaint(group[0], now_s).text
        if len(group) > 1:
            began = [row.flags[reason].since_s for row in group]
            ages = sorted(now_s - began_s for began_s in began if began_s is not None)
            spans = list(dict.fromkeys([age(ages[0]), age(ages[-1])])) if ages else []
            state = f"{group[0].state}: " if reason == "failed" else ""
            words = f"{state}{about}" + (f", for {' to '.join(spans)}" if spans else "")
        found.append((group, words))
    return found


def who(group: Sequence[Row]) -> str:
    return who_of([row.host for row in group])


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


# Of what else is known of a host: the metric that has it, and what that says.
GAUGES = {
    "needs_a_person": ("needs_attention", "Whether a host needs a person."),
    "seen_s": ("last_seen_timestamp_seconds", "When a host reported last, on the server's clock."),
    "since_s": ("state_since_timestamp_seconds", "When a host came into its state."),
    "tries": ("tries", "How often a host tried the release that it fails to run."),
    "published_s": ("published_timestamp_seconds", "When a host's current release was published."),
    "ahead_s": ("clock_ahead_seconds", "How far a host's clock was ahead of the server's at its last report."),
}


def format_prometheus(rows: Sequence[Row]) -> str:
    """For node_exporter's textfile collector. A host's name is the only text in it, and has no character to escape."""
    lines = list[str]()

    def gauge(name: str, text: str, samples: Iterable[tuple[str, float | None]]) -> None:
        lines.extend([f"# HELP {name} {text}", f"# TYPE {name} gauge"])
        for labels, value in samples:
            if value is not None:
                lines.append(f"{name}{{{labels}}} {value if isinstance(value, float) else int(value)}")

    counts = Counter(row.state for row in rows)
    gauge("bento_hosts", "Hosts in each state.", [(f'state="{state}"', counts[state]) for state in URGENCY])
    states = [(f'host="{row.host}",state="{state}"', row.state == state) for row in rows for state in URGENCY]
    gauge("bento_host_state", "1 for the state that a host is in.", states)
    releases = [(f'host="{row.host}",{release_labels(row)}', 1) for row in rows]
    gauge("bento_host_release_info", "The releases that a host runs, is to run, and tried last.", releases)
    for mark, text in MARKS.items():
        gauge(f"bento_host_{mark}", text, [(f'host="{row.host}"', mark in row.flags) for row in rows])
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
    rows: Sequence[Row],
    now_s: float,
    logs_url: str,
    troubles: Sequence[str] = (),
    why: Why = lambda *_: "",
    line: str = "",
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
        rollout=html_roll_out(rows, now_s, line),
        links="\n".join(f'<a href="?{word}#{word}">{text} {count}</a>' for word, text, count in kinds),
        rows="\n".join(html_row(row, now_s, logs_url, why, len(rows) > MANY_HOSTS) for row in rows),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


def html_persons(rows: Sequence[Row], now_s: float, troubles: Sequence[str]) -> str:
    """Who needs a person, and why: the first of them, and how many more there are."""
    lines = [f'<p class="alarm">{html.escape(text)}</p>' for text in troubles]
    wanting = complaints(rows, now_s)
    if not wanting:
        return "".join(lines)
    lines.append("<h2>Needs a person</h2>\n<ul>")
    for group, words in wanting[:SHOWN_PERSONS]:
        lines.append(f"<li><span class=mark>{symbol_of(group[0])}</span> <b>{who(group)}</b> {html.escape(words)}")
    if more := sum(len(group) for group, _ in wanting[SHOWN_PERSONS:]):
        lines.append(f"<li>... and {more} more, at the top of the table")
    return "\n".join([*lines, "</ul>"])


def html_roll_out(rows: Sequence[Row], now_s: float, line: str) -> str:
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
    sentence = f"<p>{html.escape(line)}</p>" if line else ""
    return "\n".join(["\n<h2>Roll-out</h2>", sentence, bar, "<ul>", *lines, "</ul>"]) if rows else ""


def html_row(row: Row, now_s: float, logs_url: str, why: Why, brief: bool) -> str:
    cells = {title: html.escape(text) for title, text in row_cells(row, now_s).items()}
    classes = [row.state, *(mark for mark in MARKS if mark in row.flags), *(["person"] if row.needs_a_person else [])]
    url = html.escape(f"{logs_url}/{row.host}/logs/")
    state = f"<b>{symbol_of(row)} {'offline' if row.silent else cells['STATE']}</b>"
    state += f", was {row.was or row.state}" if row.silent else ""
    subject = html.escape(clip(row.subject, REVISION_WIDTH - 4))
    since = f"<td class=since>{cells['SINCE']}" if cells["SINCE"] != "-" else "<td>"
    return (
        f'<tr class="{" ".join(classes)}"><td>{row.host}<td>{state}{since}'
        f"<td><code>{cells['RUNS']}</code> {subject}<td class=seen>{cells['SEEN']}"
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


def format_json(rows: Sequence[Row], now_s: float, troubles: Sequence[str] = (), line: str = "") -> str:
    """A line a host. Without `indent`, which would make json.dumps ten times as slow."""
    lines = ",\n".join(json.dumps(row_json(row, now_s)) for row in rows)
    head = f'"format": 1, "time": "{format_time(now_s)}", "problems": {json.dumps(list(troubles))}, "rollout": {json.dumps(line or None)}'
    return f'{{{head}, "hosts": [\n{lines}\n]}}\n'


def row_json(row: Row, now_s: float) -> dict[str, object]:
    """A host in `status --json`. Every string that a host wrote is one line of printable characters."""
    last, since_s = row.report.last if row.report else None, row.since_s
    published = row.current._asdict() if row.current else {}
    for name in ("parts", "signed", "vow", "signer", "again"):  # of no interest to whom this is for
        published.pop(name, None)
    fields = ("release", "system", "client", "phase", "signer", "waiting_for_boot", "paused_until")
    return {
        "host": row.host,
        "state": row.state,
        **{mark: mark in row.flags for mark in MARKS},
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
        "was": row.was or None,
        "problem": row.flags["problem"].words if "problem" in row.flags else None,
        "flags": {name: flag_json(name, flag) for name, flag in row.flags.items()},
        "attempts": [attempt._asdict() for attempt in row.attempts],
        "notes": notes(row, now_s),
    }


def flag_json(name: str, flag: Flag) -> dict[str, object]:
    since = None if flag.since_s is None else format_time(flag.since_s)
    return {"words": flag.words, "since": since, "needs_a_person": FLAGS[name][0]}


# --- waves ---

UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
# A host that is not there is not waited for. One that failed stops the roll-out.
ABSENT = {"new", "left", "offline", "absent", "paused"}
FAILED = {"failing", "rolled-back", "failed units", "not published"}
# What is tried again by itself is no verdict.
PASSING = {Result.POSTPONED, Result.FETCH_FAILED, Result.INTERRUPTED}
MAX_CANDIDATES = 50
RUNS, NEVER_S = "runs it", 1e12


def parse_waves(text: str, hosts: Sequence[str], known: Collection[str] = ()) -> tuple[list[Wave], list[str], set[str]]:
    """A wave a line, and one more of all that are in none; what to warn of; and the words that stand for somebody.

    BentoError for a word that stands for no host: whom it was meant for would come last. One that was `known` to stand for
    somebody is only worth a word: a host was removed.
    """
    waves, left, names, warnings, fits = list[Wave](), list(hosts), set(hosts), list[str](), set[str]()
    for number, line in enumerate(text.splitlines(), 1):
        limits, meant, empty, where = dict[str, float](), set[str](), False, f"hosts/waves:{number}"
        for word in line.partition("#")[0].split():
            if word[0] in "@!":
                read_limit(word, limits, where)
            elif matching := [word] if word in names else find_fitting(hosts, word):
                meant.update(matching)
                fits.add(word)
            elif word in known:
                empty = True
                warnings.append(f"{where}: {one_line(word, 40)}: no such host any more: take it out")
                fits.add(word)
            else:
                raise BentoError(f"{where}: {one_line(word, 40)}: no such host")
        if meant or (empty and limits):
            mine = tuple(name for name in left if name in meant)
            waves.append(Wave(mine, limits.get("@", 0.0), int(limits.get("!", 0))))
            left = [name for name in left if name not in meant]
        elif limits:
            word = "a soak time goes" if "@" in limits else "a number that may fail goes"
            raise BentoError(f"{where}: {word} with the hosts of its wave, and there are none in this line")
    return [*waves, *([Wave(tuple(left), 0.0)] if waves and left else [])], warnings, fits


def read_limit(word: str, limits: dict[str, float], where: str) -> None:
    """A wave's soak time, or how many of it may fail."""
    if word[0] == "@":
        found = re.fullmatch(rf"@([0-9]{{1,5}})({'|'.join(UNITS_S)})", word)
        value = float(found[1]) * UNITS_S[found[2]] if found is not None else None
    else:
        found = re.fullmatch(r"!([0-9]{1,5})", word)
        value = float(found[1]) if found is not None else None
    if value is None or word[0] in limits:
        what = "one soak time, as @90min, @2h or @1d" if word[0] == "@" else "one number of hosts that may fail, as !2"
        raise BentoError(f"{where}: {one_line(word, 40)}: a wave has {what}")
    limits[word[0]] = value


def read_waves(fleet: Fleet, hosts: Sequence[str], known: Collection[str]) -> tuple[list[Wave], list[str], set[str]]:
    """The waves in hosts/waves; none without it. A host may have that name, from before there were waves."""
    path = fleet.host("waves")
    if not os.path.lexists(path) or path.is_dir():
        return [], [], set()
    try:
        return parse_waves(read_own(fleet, "hosts/waves", MAX_WAVES_BYTES).decode("utf-8"), hosts, known)
    except (OSError, UnicodeDecodeError) as error:
        raise BentoError(f"hosts/waves: cannot be read: {one_line(words_of(error))}") from None


def note_run(runs: tuple[Run, ...], found: Found, log_s: float | None) -> tuple[Run, ...]:
    """What a host has run without a verdict, with what it reports now. `log_s`: when the log came that tells of it.

    The same system under another name goes on. No time is later than the report: a clock that was ahead holds nobody for
    longer than it was ahead.
    """
    report, current, seen_s = found.report, found.current, found.seen_s
    if report is None or seen_s is None or report.release is None:
        return runs
    if current is not None and verdict(current, report):
        return ()
    runs = tuple(run._replace(since_s=min(run.since_s, seen_s)) for run in runs)
    last = runs[-1] if runs else None
    failing = tuple(report.failed_units)
    if last is not None and last.release == report.release:
        worse = set(failing) - set(last.units)
        return (
            (*runs[:-1], last._replace(since_s=seen_s, units=tuple(u for u in failing if u in last.units)))
            if worse
            else runs
        )
    mine = report.last is not None and report.last.release == report.release and report.last.result == Result.OK
    since_s = log_s if mine and log_s is not None else seen_s
    if current is not None and current.release == report.release:  # a host can date its files back
        since_s = max(since_s, client.parse_time(current.published))
    since_s = min(since_s, seen_s)
    if last is not None and last.system == report.system:
        since_s = last.since_s
    units = failing if last is None else tuple(unit for unit in failing if unit in last.units)
    others = tuple(run for run in runs if run.release != report.release)
    return (*others[1 - MAX_CANDIDATES :], Run(report.release, report.system, since_s, units))


def verdict(current: Current, report: Report) -> str:
    """The state of a host that has failed what is published for it, for good or until somebody mends it."""
    last = report.last
    if last is None or last.release != current.release or last.result == Result.OK or last.result in PASSING:
        return ""
    return "rolled-back" if last.result == Result.ROLLED_BACK else "failing"


def why_waited_for(standing: Standing, wanted: set[str], soak_s: float, now_s: float) -> str:
    """Why others wait for this host; nothing when it has run one of the releases `wanted`, proven, for long enough.

    By when its report came: of a host that has been silent since, nobody knows what it runs.
    """
    found, report, current, seen_s = (
        standing.found,
        standing.found.report,
        standing.found.current,
        standing.found.seen_s,
    )
    if report is None or seen_s is None:
        return "unreadable" if found.problem else "new"
    state, offline, _, _ = judge(current, report, seen_s, now_s, patience_s(report, OFFLINE_AFTER_S))
    if state == "left":
        return state
    if standing.absent and offline:
        return "absent"
    if standing.published in wanted and current is not None and (failed := verdict(current, report)):
        return failed
    if offline:  # one that began it, and fell silent, may hang
        return "silent since it began" if state == "building" and standing.published in wanted else "offline"
    if standing.absent:
        return "absent"
    if not wanted - {""} or (standing.refused and standing.published not in wanted):
        return "not published"
    run = standing.runs[-1] if standing.runs else Run("", "", seen_s)
    if report.release in wanted and run.release == report.release and state not in ("building", "waiting"):
        if set(report.failed_units) - set(run.units):
            return "failed units"
        began_s = min((each.since_s for each in standing.runs if each.release in wanted), default=run.since_s)
        ran_s = max(0.0, seen_s - began_s)
        return f"{RUNS} {age(ran_s)} of {age(soak_s)}" if ran_s < soak_s else ""
    if is_paused(report, seen_s, now_s):
        return "paused"
    if standing.published in wanted and state == "failing" and report.last is not None:
        return report.last.result
    return state if state in ("building", "waiting") else "pending"


def find_blockers(
    wave: Wave, index: int, candidates: Sequence[Candidate], standings: Mapping[str, Standing], now_s: float
) -> tuple[tuple[str, str], ...]:
    """Whom a wave waits for before others get a candidate, those that failed first; all when nobody of it is there."""
    reasons = []
    for name in wave.hosts:
        wanted = {candidate.release(name) for candidate in candidates[index:] if name in candidate.wanted}
        reasons.append((name, why_waited_for(standings[name], wanted, wave.soak_s, now_s) if wanted else "new"))
    failed = [each for each in reasons if each[1] in FAILED]
    waiting = [each for each in reasons if each[1] and each[1] not in ABSENT | FAILED]
    if len(failed) > wave.may_fail:
        return (*failed, *waiting)
    if not waiting and reasons and all(why for _, why in reasons):
        return tuple(sorted(reasons, key=lambda each: each[1] not in FAILED))
    return tuple(waiting)


Blockers = Callable[[int, int], tuple[tuple[str, str], ...]]


def advance(
    candidates: Sequence[Candidate], waves: Sequence[Wave], blockers: Blockers, now_s: float
) -> list[Candidate]:
    """How many waves may have each candidate now."""
    found = []
    for index, candidate in enumerate(candidates):
        reached = next((n for n in range(1, len(waves)) if blockers(n - 1, index)), len(waves))
        if reached > candidate.reached:
            candidate = candidate._replace(moved_s=now_s)
        found.append(candidate._replace(reached=reached))
    return found


def choose(name: str, wave: int, candidates: Sequence[Candidate], standing: Standing) -> int | None:
    """The candidate that a host gets: the newest that its wave may have, and never one older than what it has. None: it
    keeps what it has. A host that has nothing yet never waits."""
    current, report, newest = standing.found.current, standing.found.report, len(candidates) - 1
    if current is None:
        return newest
    releases = [candidate.release(name) for candidate in candidates]
    has = max((index for index, release in enumerate(releases) if release == current.release), default=None)
    known = {*releases, current.release, *(each.release for each in standing.found.history), None}
    # Published by hand since, or before a restored backup was made: only what is newer for sure.
    after_s = client.parse_time(current.published) if has is None else 0.0
    strange = report is not None and report.release not in known
    for index in range(newest, -1 if has is None else has, -1):
        sure = index == newest or (candidates[index].made_s >= after_s and not strange)
        if releases[index] and wave < candidates[index].reached and sure:
            return index
    return has


def is_stopped(blockers: Iterable[tuple[str, str]]) -> bool:
    return any(why in FAILED for _, why in blockers)


def find_holds(
    candidates: Sequence[Candidate],
    waves: Sequence[Wave],
    chosen: Mapping[str, int | None],
    standings: Mapping[str, Standing],
    blockers: Blockers,
) -> list[Hold]:
    """Who has to wait, and for whom: for the oldest candidate that is anything new for them, and is not stopped."""
    groups: dict[tuple[int, int], dict[str, str]] = {}
    for number, wave in enumerate(waves):
        for name in wave.hosts:
            has, published = chosen[name], standings[name].published
            gets = candidates[has].release(name) if has is not None else published
            first = 0 if has is None else has + 1
            news = [n for n in range(first, len(candidates)) if candidates[n].release(name) not in ("", gets)]
            if news and candidates[-1].release(name) not in ("", gets):
                waits = [n for n in news if candidates[n].reached <= number] or news
                alive = [n for n in waits if not is_stopped(blockers(min(candidates[n].reached, number) - 1, n))]
                groups.setdefault((number, (alive or waits)[0]), {})[name] = gets
    holds: dict[tuple[int, tuple[tuple[str, str], ...]], Hold] = {}
    for (number, index), hosts in groups.items():
        candidate = candidates[index]
        before_it = min(candidate.reached, number) - 1
        found, since_s = blockers(before_it, index), max(candidate.made_s, candidate.moved_s)
        # While somebody's time runs, or somebody failed, which is told of that host, it does not stand still.
        still = not is_stopped(found) and not all(why.startswith(RUNS) for _, why in found)
        still_s = since_s + waves[before_it].soak_s + LATE_S if still else NEVER_S
        hold = Hold(candidate.name, found, candidate.made_s, still_s, hosts)
        before = holds.get((index, found))
        holds[index, found] = hold if before is None else before._replace(hosts={**before.hosts, **hosts})
    return list(holds.values())


def thin_out(candidates: Sequence[Candidate], waves: int) -> list[Candidate]:
    """Without those that a newer one has passed, and no more than there may be: one in the middle goes, never the oldest."""
    passed = max((index for index, candidate in enumerate(candidates) if candidate.reached >= waves), default=0)
    kept = list(candidates[passed:])
    while len(kept) > MAX_CANDIDATES:
        del kept[len(kept) // 2]
    return kept


def describe(
    candidates: Sequence[Candidate], waves: Sequence[Wave], holds: Sequence[Hold], standings: Mapping[str, Standing]
) -> str:
    """The roll-out as a sentence: of the one that is furthest, if several are under way, and is not stopped for good."""
    if not candidates or not waves:
        return ""
    names = [hold.candidate for hold in sorted(holds, key=lambda hold: (bool(hold.stopped), -len(hold.hosts)))]
    index = next((n for n, each in enumerate(candidates) if names and each.name == names[0]), len(candidates) - 1)
    candidate, ran = candidates[index], 0
    for name, standing in standings.items():
        report, wanted = standing.found.report, {each.release(name) for each in candidates[index:]} - {""}
        ran += report is not None and report.release in wanted
    if ran == len(standings):
        return ""
    words = f"{candidate.name}: wave {candidate.reached} of {len(waves)}, {ran} of {counted(len(standings))}"
    hold = next((hold for hold in holds if hold.candidate == candidate.name), None)
    if hold is None:
        return words
    named = hold.stopped or list(hold.blockers)
    return (
        f"{words}, {'stopped by' if hold.stopped else 'waits for'} {show_names([f'{n} ({why})' for n, why in named])}"
    )


def name_candidate(wanted: Mapping[str, Current | None], before: Candidate | None) -> str:
    """By the commits of what is new in it, for people."""
    new = Counter(
        one_line(current.revision or current.release[:7], 100)
        for host, current in wanted.items()
        if current is not None and (before is None or before.release(host) != current.release)
    )
    names = [name for name, _ in new.most_common()]
    return names[0] + (f", and {len(names) - 1} more" if len(names) > 1 else "") if names else "the newest commit"


def read_rollout(chroot_dir: Path, now_s: float) -> Rollout:
    """What the last `populate` left; what is damaged is written anew. A time in the future counts as now: the clock was
    wrong."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, BentoError):
        data = json.loads((chroot_dir / ".rollout.json").read_bytes())
        candidates, wanted = [], dict[str, Current | None]()
        for each in data["candidates"]:
            wanted = wanted | {host: current and read_wanted(host, current) for host, current in each["wanted"].items()}
            wanted = {host: current for host, current in wanted.items() if host not in each["gone"]}
            times = (min(each["made_s"], now_s), min(each["moved_s"], now_s))
            candidates.append(Candidate(times[0], each["name"], wanted, each["reached"], times[1]))
        runs = {
            host: tuple(Run(r, s, min(t, now_s), tuple(u)) for r, s, t, u in runs)
            for host, runs in data["runs"].items()
        }
        holds = [Hold(**each | {"blockers": tuple(map(tuple, each["blockers"]))}) for each in data["holds"]]
        refused = {host: Refusal(**each) for host, each in data["refused"].items()}
        for each in refused.values():
            client.parse_time(each.since)
        return Rollout(
            tuple(candidates),
            runs,
            tuple(holds),
            refused,
            tuple(data["fits"]),
            data["line"],
            data["error"],
        )
    return Rollout()


def read_wanted(host: str, data: dict[str, Any]) -> Current:
    return client.parse_current(json.dumps(data).encode(), ".rollout.json", host)


def write_rollout(chroot_dir: Path, rollout: Rollout) -> None:
    """Writes of each candidate only what differs from the one before. Where there is nothing to remember, there is no file."""
    if rollout == NO_ROLLOUT:
        client.remove(chroot_dir / ".rollout.json")
        return
    candidates, before = [], dict[str, Current | None]()
    for each in rollout.candidates:
        new = {host: current for host, current in each.wanted.items() if host not in before or before[host] != current}
        wanted = {host: current and json.loads(client.encode(current)) for host, current in new.items()}
        gone = [host for host in before if host not in each.wanted]
        candidates.append(each._asdict() | {"wanted": wanted, "gone": gone})
        before = dict(each.wanted)
    data = rollout._asdict() | {
        "candidates": candidates,
        "runs": {host: [list(run) for run in runs] for host, runs in rollout.runs.items()},
        "holds": [hold._asdict() for hold in rollout.holds],
        "refused": {host: refusal._asdict() for host, refusal in rollout.refused.items()},
    }
    text = json.dumps({"format": client.FORMAT} | data) + "\n"
    client.write_atomic(chroot_dir / ".rollout.json", text.encode(), 0o644)


def log_came_s(chroot: Path, found: Found) -> float | None:
    """When the log of the last attempt came, on this server's clock: the host's own has no say."""
    last = found.report.last if found.report is not None else None
    log = parse_log_name(last.log) if last is not None else None
    if last is None or log is None or (log.release, log.result) != ((last.release or "")[:12], last.result):
        return None  # an older one would end a soak that has just begun
    with suppress(OSError), open_logs(chroot) as logs:
        return arrival_s(os.stat(log.name, dir_fd=logs, follow_symlinks=False))
    return None


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
    for left in LEFT_NAMES.intersection(os.listdir(chroot)):
        client.remove(chroot / left)


def is_whole(chroot: Path, current: Current) -> bool:
    """Whether all files of what is published are there, by their sizes."""
    release = f"{chroot}/releases/{current.release}"
    files = [(f"{release}.tar", current.size), *((f"{release}.parts/{p.sha256}", p.size) for p in current.parts)]
    try:
        whole = all(stat.S_ISREG((found := os.lstat(path)).st_mode) and found.st_size == size for path, size in files)
    except OSError:
        return False
    return whole


class Store:
    """Each release once, as ID.tar and ID.parts/, for the chroots of its hosts to link to.

    What a run adds lies in .new until it is on disk for sure; ID.json is the last that such a release gets. Unused is a
    release whose archive nobody else links to.
    """

    def __init__(self, source: Source, directory: Path) -> None:
        self.source, self.directory, self.new = source, directory, directory / ".new"
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.kept: set[str] = set()  # a roll-out has them to come

    def find(self, release: str) -> Path:
        """Where a release lies, if it is here: the path that its names begin with."""
        return (self.new if (self.new / f"{release}.json").exists() else self.directory) / release

    def has(self, release: str) -> bool:
        found = self.find(release)
        return Path(f"{found}.json").exists() and (release in self.parts or self.verify(found, release))

    def keep(self, members: Sequence[Member]) -> tuple[str, int]:
        """Reads a release into the store; its id and size."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        if not self.parts:  # the first of this run
            client.remove(self.new)
        self.new.mkdir(mode=0o700, exist_ok=True)
        aside = self.new / "aside"
        client.remove(aside)
        try:
            aside.mkdir(mode=0o755)
            return self.write(members, aside)
        finally:  # on a full disk, the first thing that is needed is room
            client.remove(aside)

    def verify(self, found: Path, release: str) -> bool:
        """Whether what an earlier run has left is what it was: a chroot may have been damaged, whose files it shares."""
        try:
            data = client.parse_object(Path(f"{found}.json").read_bytes(), f"{found}.json")
            parts = tuple(
                client.read_record(Part, client.as_object(part, "parts", ""), f"{found}.json") for part in data["parts"]
            )
            sizes = [os.stat(f"{found}.parts/{part.sha256}").st_size == part.size for part in parts]
            good = all(sizes) and client.hash_file(Path(f"{found}.tar")) == release
        except (BentoError, OSError, KeyError, TypeError):
            good = False
        if good:
            self.parts[release] = parts
        else:
            self.discard(release)
        return good

    def write(self, members: Sequence[Member], aside: Path) -> tuple[str, int]:
        large = sorted((m for m in members if m.size >= LARGE_FILE), key=lambda m: m.size)[-MAX_LARGE_FILES:]
        known: dict[str, Part] = dict.fromkeys((member.name for member in large), Part("", 0))
        (aside / "parts").mkdir(mode=0o755)

        def take(name: str, content: Iterable[bytes]) -> None:
            known[name] = write_part(content, aside / "parts")

        with open(aside / "tar", "wb", 1 << 20) as file:
            os.fchmod(file.fileno(), 0o644)
            release, size = write_release(self.source, members, file, known, take)
        if self.has(release):
            return release, size
        place, parts = f"{self.new}/{release}", cut_release(aside, members, known) if known else ()
        os.rename(aside / "tar", f"{place}.tar")
        if parts:
            client.remove(Path(f"{place}.parts"))
            os.rename(aside / "parts", f"{place}.parts")
        text = json.dumps({"format": client.FORMAT, "parts": client.plain(parts)})
        Path(f"{place}.json").write_text(text, "utf-8")
        self.parts[release] = parts
        return release, size

    def settle(self) -> None:
        """Moves what was added to its place: all of it is on disk by now."""
        with suppress(FileNotFoundError):
            # Its .json last: without it a release is none.
            for name in sorted(os.listdir(self.new), key=lambda name: name.endswith(".json")):
                client.remove(self.directory / name)
                os.rename(self.new / name, self.directory / name)

    def discard(self, release: str) -> None:
        for directory, ending in itertools.product((self.new, self.directory), (".json", ".tar", ".parts")):
            client.remove(directory / f"{release}{ending}")
        self.parts.pop(release, None)

    def prune(self) -> None:
        with suppress(FileNotFoundError):
            names = [name for name in os.listdir(self.directory) if name not in (".known", ".built")]
            for name in names:
                if "." not in name or name.startswith("."):  # a tree, of version 1.1
                    client.remove(self.directory / name)
            for release in {name.partition(".")[0] for name in names if not name.startswith(".")}:
                self.drop(self.directory, release)

    def drop(self, directory: Path, release: str) -> None:
        """Removes a release that nobody has any more: on a full disk the next host needs its room."""
        try:
            unused = os.stat(directory / f"{release}.tar").st_nlink == 1 and release not in self.kept
        except FileNotFoundError:
            unused = True
        if unused or not (directory / f"{release}.json").exists():
            self.discard(release)


def link(source: str, target: str) -> None:
    """A link, or a copy: a file has as many links as it can have, and a chroot may be a file system of its own. A copy in
    the place of one that can have no more takes as many again."""
    try:
        os.link(source, target)
        return
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EXDEV, errno.EPERM):
            raise
        full = error.errno == errno.EMLINK
    shutil.copyfile(source, target)
    shutil.copymode(source, target)
    os.utime(target, (1, 1))
    if full:
        aside = f"{os.path.dirname(source)}/.{os.urandom(6).hex()}"
        with suppress(OSError):
            os.link(target, aside)
            os.rename(aside, source)


def cut_release(staged: Path, members: Sequence[Member], large: Mapping[str, Part]) -> tuple[Part, ...]:
    """Cuts the archive before and after each large file, which is a part already, for hosts that have that file. Each part
    lies in parts/, beside tar, under its SHA-256."""
    parts: list[Part] = []
    with open(staged / "tar", "rb") as file:
        position = cut = 0

        def stretch(end: int) -> Iterator[bytes]:
            file.seek(cut)
            while chunk := file.read(min(1 << 20, end - file.tell())):
                yield chunk

        for member in members:
            position += len(header(member.name, member.size, member.is_directory, member.executable))
            if member.name in large:
                parts += [write_part(stretch(position), staged / "parts"), large[member.name]]
                cut = position + member.size
            position += member.size + -member.size % tarfile.BLOCKSIZE
        parts.append(write_part(stretch(os.fstat(file.fileno()).st_size), staged / "parts"))
    return tuple(parts)


def write_part(content: Iterable[bytes], directory: Path) -> Part:
    """Writes a stretch of an archive into a file that is named by its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with open(directory / "part", "wb") as file:
        for chunk in content:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        os.fchmod(file.fileno(), 0o644)
    os.rename(directory / "part", directory / digest.hexdigest())
    return Part(digest.hexdigest(), size)


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
            by = one_line(str(data.get("by") or ""), 40)
            lines.append(Published(*found, take("system", client.STORE_PATH, null=True), by))
    return lines


def publisher() -> str:
    """Who publishes: with sudo, the person who called it."""
    with suppress(KeyError):
        return one_line(os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name, 40)
    return str(os.getuid())


def write_history(chroot: Path, current: Current) -> Path:
    """The history with one more publication, aside."""
    lines = read_history(chroot)[1 - KEEP_HISTORY :]
    lines.append(Published(current.published, current.release, current.revision, current.system, publisher()))
    aside = chroot / ".history.new"
    aside.write_text("".join(json.dumps(line._asdict()) + "\n" for line in lines), "utf-8")
    aside.chmod(0o644)
    return aside


def place(chroot: Path, store: Store, job: Job, system: str | None, now_s: float) -> Current:
    """Gives the host its links to a release in the store, and writes current.json aside. No host is told yet."""
    release, before = job.release, job.before
    if before is not None:
        tidy(chroot, before)
    found, target = str(store.find(release.id)), f"{chroot}/releases/{release.id}"
    parts, links = store.parts[release.id], {".tar"}
    client.remove(Path(f"{target}.parts"))
    if parts:
        os.mkdir(f"{target}.parts", 0o755)
        links |= {f".parts/{part.sha256}" for part in parts}
    for name in links:  # aside first: the host may be fetching that very release
        with suppress(FileNotFoundError):
            os.unlink(f"{chroot}/releases/.new")
        link(f"{found}{name}", f"{chroot}/releases/.new")
        os.rename(f"{chroot}/releases/.new", f"{target}{name}")
    published = format_time(now_s) if before is None else later_than(before.published, now_s)
    current = Current(job.name, release.id, release.size, published, system, parts, job.revision, None, job.commit)
    if job.kept is None:
        current = with_signature(current, job.signature)
    else:
        current = job.kept._replace(published=published, system=system or job.kept.system, parts=parts)
    write_aside(chroot, current)
    write_history(chroot, current)
    return current


def write_aside(chroot: Path, current: Current) -> None:
    new = chroot / ".current.json.new"
    new.write_bytes(client.encode(current))
    new.chmod(0o644)


def later_than(published: str, now_s: float) -> str:
    """The time of a publication after this one, even if the clock was set back: hosts compare them."""
    return max(format_time(now_s), next_time(published))


def next_time(text: str) -> str:
    try:
        return format_time(client.parse_time(text) + 1)
    except (ValueError, OverflowError):
        return text  # there is none after the year 9999


def reveal(chroot: Path, current: Current) -> None:
    """The moment of publication. Everything that current.json names is on disk by now."""
    os.rename(chroot / ".current.json.new", chroot / "current.json")
    with suppress(FileNotFoundError):  # of what was published before
        os.rename(chroot / ".history.new", chroot / "history")
    tidy(chroot, current)


def tidy(chroot: Path, current: Current) -> None:
    """What follows a publication. Done again for an unchanged host: a kill may have come between the two."""
    with suppress(FileNotFoundError):  # of version 1.1
        client.remove(chroot / "config")
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
    whole = {name.removesuffix(".tar") for name in names if name.endswith(".tar")}
    order = {published.release: number for number, published in enumerate(history)}
    times = {release: os.stat(f"{releases}/{release}.tar").st_mtime for release in whole}
    latest = times.get(current, float("inf"))
    earlier = [r for r in whole - {current} if r in order or times[r] < latest]
    earlier.sort(key=lambda release: (order.get(release, -1), times[release]), reverse=True)
    keep = {current, *earlier[: KEEP_RELEASES - 1]}
    for name in names:
        if "." not in name or name.partition(".")[0] not in keep:  # a tree: of version 1.1
            client.remove(Path(releases, name))


def prune_logs(chroot: Path, keep: int = KEEP_LOGS) -> int:
    """Removes the oldest of what a host left beyond a generous number of logs, in several runs if it left very many: how
    many files. Where there are more than one run looks at, or fewer are to stay than a host keeps there anyway, what is
    neither a log nor a report goes too: it would hide the logs for ever, or fill the disk."""
    removed, scarce = 0, keep < KEEP_LOGS
    with suppress(OSError), open_logs(chroot) as directory, os.scandir(directory) as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, MAX_PRUNED))
        logs = [name for name in names if client.LOG_NAME.fullmatch(name)]
        # A dot in front: under way, or cut short.
        uploads = [name for name in names if client.LOG_NAME.fullmatch(name.removeprefix(".")) and name not in logs]
        kept = {"status.json", ".status.json", *logs[-keep:], *uploads[-1 if scarce else -keep :]}
        for name in names if len(names) == MAX_PRUNED or scarce else logs:
            if name not in kept:
                with suppress(OSError):  # a directory, say
                    os.unlink(name, dir_fd=directory)
                    removed += 1
    return removed


def make_room(chroot_dir: Path) -> list[str]:
    """On a disk that is nearly full: one host's junk keeps nobody else from being published. Who has most is left its
    newest logs and its report, then the next, until there is room. What was done."""
    done = []
    for load in weigh_all(chroot_dir) if is_full(chroot_dir, ROOM_BYTES) else ():
        rounds = (prune_logs(chroot_dir / load.host, client.KEEP_LOGS) for _ in range(MAX_LOG_ENTRIES // MAX_PRUNED))
        if removed := sum(itertools.takewhile(bool, rounds)):
            done.append(f"{chroot_dir} is full: removed {counted(removed, 'file')} of {load}")
        if not is_full(chroot_dir, ROOM_BYTES):
            break
    return done


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


def account_of(chroot: Path) -> int | None:
    """The number of a host's account: whose logs/ is, which the host cannot replace. After the switch that removed the
    account nobody knows its name any more. None where that number is root's, or another account's by now."""
    try:
        uid = os.lstat(chroot / "logs").st_uid
        return uid if uid and pwd.getpwuid(uid).pw_name == f"bento-{chroot.name}" else None
    except KeyError:
        return uid
    except FileNotFoundError:
        return None


def end_sessions(chroot: Path) -> None:
    """Ends what a host's account has open: a session outlives its account, and goes on writing."""
    if (uid := account_of(chroot)) is None:
        return
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            # Its owner says nothing: of a process that has changed its user, that is root.
            users = re.search(r"^Uid:\s+(.*)$", path.read_text(errors="replace"), re.MULTILINE)
            if users is not None and set(users[1].split()) == {str(uid)}:
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
                    end_sessions(path)
                for left in ("logs", "config", ""):
                    client.remove(path / left)
        except OSError as error:  # the host is writing there, say
            failures.append(Failure(path.name, words_of(error)))
            continue
        done = "would remove" if plan.dry_run else "removed"
        told = {"host": path.name, "result": done.replace(" ", "-")}
        print(json.dumps(told) if plan.as_json else f"{path.name}: {done} {path}")


# --- signatures ---

VALID_DAYS, MAX_DAYS = 30, 36_500
# hosts/signed has a line a host.
MAX_SIGNED_BYTES = 64 << 20
LAST_S = 253402300799  # of what a clock can show
ARMOR_END = "-----END SSH SIGNATURE-----\n"


class Tree:
    """The Merkle tree over leaves (RFC 6962, 2.1): `levels` of hashes, from the leaves' to the root's."""

    def __init__(self, leaves: Sequence[str]) -> None:
        self.levels = [[client.hash_leaf(leaf) for leaf in leaves]]
        while len(below := self.levels[-1]) > 1:
            pairs = itertools.zip_longest(below[::2], below[1::2])
            self.levels.append([left if right is None else client.hash_node(left, right) for left, right in pairs])

    @property
    def root(self) -> str:
        return self.levels[-1][0].hex()

    def path(self, number: int) -> tuple[str, ...]:
        """What leads from a leaf to the root, as client.find_root() follows it."""
        steps = []
        for level in self.levels[:-1]:
            if (beside := number ^ 1) < len(level):
                steps.append(f"{'left' if number % 2 else 'right'} {level[beside].hex()}")
            number //= 2
        return tuple(steps)


class Signatures(NamedTuple):
    """`hosts/signed`: the text for the fleet, what it says, the signature as ssh-keygen writes it, and each host's leaf."""

    text: str
    signed: client.Signed
    armored: str
    leaves: dict[str, str]
    numbers: dict[str, int]
    tree: Tree

    def vow(self, name: str) -> client.Vow:
        return client.Vow(self.text, self.armored, self.leaves[name], self.tree.path(self.numbers[name]))


class Signature(NamedTuple):
    """What is signed of one host."""

    vow: client.Vow
    signed: client.Signed
    leaf: client.Leaf


def parse_signatures(content: str, where: str) -> Signatures:
    text, armor, rest = content.partition(client.ARMOR)
    rest, end, lines = rest.partition(ARMOR_END)
    if not armor or not end:
        raise BentoError(f"{where}: no signature in it: 'bento.py sign --key FILE' makes it anew")
    signed, leaves = client.parse_signed(text, where), {}
    for line in lines.splitlines():
        leaves[client.parse_leaf(line, f"{where}: {one_line(line, 40)}").host] = line
    tree = Tree(list(leaves.values()))
    if not leaves or tree.root != signed.root:
        raise BentoError(
            f"{where}: its hosts are not those that were signed (a merge?): 'bento.py sign --key FILE' anew"
        )
    return Signatures(
        text, signed, armor + rest + end, leaves, {name: number for number, name in enumerate(leaves)}, tree
    )


@functools.lru_cache(2)
def load_signatures(fleet: Fleet, stamp: tuple[int, ...]) -> Signatures:
    return parse_signatures(read_own(fleet, "hosts/signed", MAX_SIGNED_BYTES).decode("utf-8"), "hosts/signed")


def read_signatures(fleet: Fleet) -> Signatures | None:
    """What was signed of this fleet; None where nothing is."""
    path = fleet.directory / "hosts/signed"
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):  # a host of that name, from before there were signatures
            return None
        return load_signatures(fleet, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BentoError(f"hosts/signed: cannot be read: {one_line(words_of(error))}") from None


def check_signature(fleet: Fleet, name: str, release: Release, before: Current | None = None) -> Signature | None:
    """What is signed of a host, if it is of this very release. BentoError when it is of another one: that is not for the
    host, which would refuse it. `before`: what is published for it."""
    found = find_signature(fleet, name)
    if found is None:
        if before is not None and (
            before.signed or (before.vow and not client.parse_leaf(before.vow.leaf, name).unsign)
        ):
            raise BentoError(
                f"not signed: hosts/signed has no {name}, and what is published is signed: 'bento.py sign'"
            )
        return None
    if before is not None and before.vow is not None:
        seen = client.parse_signed(before.vow.text, name).serial
        if found.signed.serial < seen and client.take_apart(before.vow.signature)[0] not in found.signed.revoked:
            raise BentoError(
                f"not signed: hosts/signed has serial {found.signed.serial}, and {seen} is published: the hosts would refuse"
                f" it: 'git pull', or 'bento.py sign --serial {seen + 1}'"
            )
    if (found.leaf.release, found.leaf.size) == (release.id, release.size):
        return found
    raise BentoError(
        f"not signed: hosts/signed has release {found.leaf.release[:12]}, and this is {release.id[:12]}:"
        f" 'bento.py sign --key FILE', where the key is"
    )


def find_signature(fleet: Fleet, name: str) -> Signature | None:
    found = read_signatures(fleet)
    if found is None or name not in found.leaves:
        return None
    vow = found.vow(name)
    return Signature(vow, found.signed, client.parse_leaf(vow.leaf, "hosts/signed"))


def with_signature(current: Current, found: Signature | None) -> Current:
    """What is published of a release beside the signature that it has, or has not, in hosts/."""
    if found is None:
        return current
    return current._replace(system=check_system(found, current.system), commit=found.leaf.commit, vow=found.vow)


def check_system(found: Signature | None, system: str | None) -> str | None:
    """The system to publish beside the release: what was built here has to be what was signed."""
    if found is None or found.leaf.system is None:
        return system
    if system is not None and system != found.leaf.system:
        raise BentoError(f"not signed: this was built to {system}, and {found.leaf.system} is signed")
    return found.leaf.system


def later_vow(fleet: Fleet, name: str, before: Current | None) -> Current | None:
    """What is published with a later signature of just that, whatever lies in hosts/ by now: so that it does not expire."""
    found = find_signature(fleet, name)
    if before is None or before.vow is None or found is None or found.vow.leaf != before.vow.leaf:
        return None
    later = found.signed.serial > client.parse_signed(before.vow.text, name).serial
    return before._replace(vow=found.vow) if later else None


# --- builds ---


def log_directory() -> Path:
    """Where the full log of each host's last check or build is kept."""
    if os.geteuid() == 0:
        return Path("/var/log/bento")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "bento"


def rebuild(action: str, tree: Path, name: str, limit_s: float, commit: str | None = None) -> str | None:
    """Builds (or evaluates) a release as the host will, in a tree that nobody else needs. The system after a build."""
    # What a build says may be nobody else's business.
    log_directory().mkdir(mode=0o750, parents=True, exist_ok=True)
    os.chmod(log_directory(), 0o750)
    client.remove(log_directory() / f"{name}.log")
    argv = client.rebuild_argv(action, tree, client.read_recipe(tree, name), commit)
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


class BuiltSystem(NamedTuple):
    """What was built here of a host last, published or not."""

    release: str
    system: str
    time: str


def read_built(chroot_dir: Path) -> dict[str, BuiltSystem]:
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        found = json.loads((chroot_dir / ".store/.built").read_bytes())
        return {name: BuiltSystem(*map(str, each)) for name, each in found.items()}
    return {}


def note_built(chroot_dir: Path, name: str, release: str, system: str) -> None:
    """For whoever has the lock."""
    with suppress(OSError):  # nobody's, or the disk is full: then it is built the next time
        built = read_built(chroot_dir) | {name: BuiltSystem(release, system, format_time(time.time()))}
        client.write_atomic(chroot_dir / ".store/.built", json.dumps(built).encode(), 0o600)


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
        self.drawn = self.ended = self.total = 0
        self.due_s = time.monotonic() + 1

    def set(self, name: str, phase: str) -> None:
        self.running[name] = (phase, time.monotonic())
        if not self.live and not self.quiet:
            print(f"{name}: {phase}", file=sys.stderr)

    def each(self, names: Sequence[str], phase: str) -> Iterator[str]:
        """The names, one after the other. On a terminal it is told who is at work, if the whole takes more than a moment."""
        self.ended, self.total = 0, len(names)
        for name in names:
            self.tell(name, phase)
            yield name
            self.ended += 1

    def tell(self, name: str, phase: str) -> None:
        now_s = time.monotonic()
        if self.live and now_s > self.due_s:
            self.due_s = now_s + 0.1
            self.running = {name: (phase, now_s)}
            self.draw()

    def end(self, name: str) -> None:
        self.running.pop(name, None)
        self.ended += 1

    def draw(self) -> None:
        """Also clears what was drawn before, so that a result can be printed in between."""
        if not self.live:
            return
        width = shutil.get_terminal_size().columns
        lines = [
            f"{n}: {phase}, {client.duration(time.monotonic() - t)}" for n, (phase, t) in list(self.running.items())
        ]
        if lines and self.total > 1:
            lines.insert(0, f"{self.ended} of {counted(self.total)}")
        sys.stderr.write("\x1b[F" * self.drawn + "\x1b[J" + "".join(f"{line[: width - 1]}\n" for line in lines))
        sys.stderr.flush()
        self.drawn = len(lines)

    def clear(self) -> None:
        self.running.clear()
        self.draw()


class Work:
    """A check, a build, or a publication under way: what it is to do, and what has become of it.

    `lock`: for what is read, and for the store, when several builds go on. `users`: how many hosts still need a
    directory, where each release is only needed for their builds. `decided`: what each host's commit gave, when the waves
    were asked. `instead`: what a host gets of an older candidate. `latest`: what was published for it last, or is held. `backwards`:
    hosts that a person takes back, by from where to where. `renewed`: what is published, with a later signature or time.
    """

    def __init__(self, fleet: Fleet, plan: Plan, store: Store) -> None:
        self.fleet, self.plan, self.store = fleet, plan, store
        self.failures: list[Failure] = []
        self.counts = {"published": 0, "unchanged": 0, "held": 0}
        self.progress = Progress(quiet=plan.publish)
        self.lock = threading.RLock()
        self.users: Counter[str] = Counter()
        self.decided: dict[str, Current | None] = {}
        self.instead: dict[str, Current] = {}
        self.latest: Mapping[str, Current | None] = {}
        self.backwards: dict[str, dict[str, None]] = {}
        self.renewed: dict[str, Current] = {}
        self.built = read_built(fleet.chroot_dir)
        self.warnings: list[str] = []

    def add(self, job: Job) -> Job:
        """The job with its release in the store: for all that share it the one that is there now."""
        if self.store.has(job.release.id):
            return job
        if job.kept is not None:
            raise BentoError(f"release {job.release.id[:12]} is gone from {self.store.directory}: the next one follows")
        members, _ = list_members(self.fleet, job.name)
        release = Release(*self.store.keep(members), key_of(members))
        if release != job.release:  # a filter that gives another content each time
            raise BentoError(f"hosts/{job.name}: changed while this was at work: run this again")
        return job

    def fail(self, name: str, error: Exception) -> None:
        """One host's failure, whatever it is: it stops no other."""
        text = words_of(error)
        if not isinstance(error, BentoError | OSError):
            text = f"{type(error).__name__}: {text} (this is an error in Bento: -v shows where)"
            if client.verbose:
                traceback.print_exception(error)
        self.failures.append(Failure(name, text))
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
    if (kept := work.instead.get(name)) is not None:
        before = read_published(fleet.chroot(name), name)
        same = before is not None and before.release == kept.release and is_whole(fleet.chroot(name), before)
        return Job(
            name, Release(kept.release, kept.size, ""), owner, before, same, kept.revision, None, kept, kept.commit
        )
    chroot, known = fleet.chroot(name), fleet.source.recall(name)
    if known is not None and plan.publish:
        with suppress(BentoError, OSError):
            published = read_published(chroot, name)
            if published is not None and is_published(work, known, published):
                signature = examine_signature(work, name, known, published)
                return unchanged_job(owner, published, signature)
    release, recipe = read_release(fleet, name, None if plan.dry_run else work.store.keep)
    before = None
    try:
        before = read_published(chroot, name) if plan.publish else None
    except BentoError as error:
        if name not in work.decided:  # else it was told before the waves were asked
            work.progress.clear()
            print(f"{name}: {error}: published anew", file=sys.stderr)
    except PermissionError:
        if not plan.dry_run:  # which is for anybody
            raise
    signature = examine_signature(work, name, release, before) if plan.publish else None
    if before is not None and is_published(work, release, before):
        return unchanged_job(owner, before, signature)
    for found in local_inputs(list_members(fleet, name)[0], recipe):
        fleet.source.leave_out("local", "", f"hosts/{name}: {found}")
    if plan.publish and recipe != Recipe(name):
        check_client(chroot, name, recipe)
    made = fleet.source.commit(name)
    if plan.publish:
        check_direction(work, name, release, before)
    revision, commit = (made.revision, made.id or None) if made is not None else (None, None)
    return Job(name, release, owner, before, False, plan.revision or revision, signature, commit=commit)


def is_published(work: Work, release: Release, before: Current) -> bool:
    """Whether that is published, and whole: the release, or, unless what is signed says which, one that was built to the
    very system that is published."""
    built = work.built.get(before.host)
    same = built is not None and (built.release, built.system) == (release.id, before.system) and before.vow is None
    return (before.release == release.id or same) and is_whole(work.fleet.chroot(before.host), before)


def unchanged_job(owner: tuple[int, int] | None, before: Current, signature: Signature | None) -> Job:
    release = Release(before.release, before.size, "")
    return Job(before.host, release, owner, before, True, before.revision, signature, commit=before.commit)


def check_direction(work: Work, name: str, release: Release, before: Current | None) -> None:
    """Nobody goes back in time by a timer: from a clone that nobody has pulled, or that was restored. What a person does is
    said."""
    repository, last = work.fleet.source.enter(work.fleet.source.top(name)), work.latest.get(name) or before
    if repository.plain or last is None or last.commit is None or last.release == release.id:
        return
    if repository.is_behind(last.commit, client.parse_time(last.published)):
        way = f"from {one_line(last.revision or last.commit[:7], 100)} to {one_line(repository.head.revision, 100)}"
        if not work.plan.asked and not work.plan.again:
            raise BentoError(
                f"it would go back {way}: 'git pull' in {repository.root}, or 'populate --again' if it is meant"
            )
        work.backwards.setdefault(way, {})[name] = None


def examine_signature(work: Work, name: str, release: Release, before: Current | None) -> Signature | None:
    """What is signed of what there is to publish. What is published may have got a later signature, even where that is
    another release by now."""
    chroot = work.fleet.chroot(name)
    if (
        before is not None
        and before.signed
        and before.vow is None
        and not knows(read_report(chroot, name).report, client.PIN_SINCE)
    ):
        raise BentoError(
            "what is published is signed for a client before 1.2, which would refuse what this bento.py signs: left alone"
            " until it reports 1.2: give it that client with bento.py 1.1"
        )
    try:
        return check_signature(work.fleet, name, release, before)
    except BentoError:
        if not work.plan.dry_run and (later := later_vow(work.fleet, name, before)) is not None:
            work.renewed[name] = later
        raise


def check_client(chroot: Path, name: str, recipe: Recipe) -> None:
    """BentoError for a host that would not heed a bento.json. One that has never reported gets its client with its first
    release."""
    report = read_report(chroot, name).report
    if report is not None and not knows(report, FILE_SINCE if recipe.file else RECIPE_SINCE):
        what = "bento.json's file" if knows(report, RECIPE_SINCE) else "bento.json"
        raise BentoError(
            f"its client, version {report.client}, does not know {what} and would build something else:"
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
            # The tree's name matters: a channel configuration that says ./. gets it into a store path.
            client.unpack(Path(f"{work.store.find(job.release.id)}.tar"), directory / "config")
        work.progress.set(name, "building" if work.plan.action == "build" else "checking")
        if work.plan.jobs == 1:
            work.progress.draw()
        commit = job.signature.leaf.commit if job.signature is not None else job.commit
        system = rebuild(work.plan.action, directory / "config", name, work.plan.limit_s, commit)
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
    work.progress.ended, work.progress.total = 0, len(names)
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
        lines.append(f"{who_of([failure.host for failure in group])}: {group[0].text}")
    return lines


def command_add(fleet: Fleet, name: str, key: str | None, *, flake: bool, link_to: str | None) -> int:
    if not client.HOST_NAME.fullmatch(name):
        raise UsageError(f"{one_line(name)}: {NO_HOST_NAME}")
    if (taken := {"waves": "the order of a roll-out", "signed": "what is signed"}.get(name)) is not None:
        raise UsageError(f"{name}: no host name: hosts/{name} is {taken}")
    lines = read_key_file(key) if key is not None else []
    host, public = fleet.host(name), fleet.host(f"{name}.pub")
    made: list[Path] = []
    with acting_as(fleet.ruler):
        if not os.path.lexists(host):
            host.parent.mkdir(parents=True, exist_ok=True)
            made = link_host(fleet, host, link_to) if link_to is not None else scaffold(fleet, host, flake)
        elif not lines or flake or link_to is not None:
            raise BentoError(f"hosts/{name} is there already{': give --key alone' if lines else ''}")
        if lines:
            client.write_atomic(public, ("\n".join(lines) + "\n").encode(), 0o644)
    if lines:
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


def lost_keys(fleet: Fleet, before: str, after: str) -> list[str]:
    """What to do about hosts that had a key in the fleet.nix before, and have it no more: sshd does not end a session."""
    kept = set(KEY_BLOB.findall(after))
    hosts = re.findall(r'"([A-Za-z0-9_-]+)" = \[(.*?)\];', before, re.DOTALL)
    names = [name for name, keys in hosts if not kept.issuperset(KEY_BLOB.findall(keys))]
    return [
        f"{name}: a key is gone, and a session that is open with it goes on: after the switch, end it with"
        f" 'pkill -KILL -u {account_of(fleet.chroot(name)) or f'bento-{name}'}'"
        for name in names
    ]


def command_fleet(fleet: Fleet) -> int:
    """Writes fleet.nix. With one bad key it writes nothing: a host that were left out would be locked out."""
    keys, errors = check_keys(fleet)
    warn(left_out_keys(fleet))
    if errors:
        return complain([*dict.fromkeys(errors.values()), "fleet.nix is left as it was"])
    if (fleet.directory / "fleet.nix.in").exists():
        template = read_own(fleet, "fleet.nix.in", MAX_FLEET_BYTES)
    else:
        template = (Path(__file__).resolve().parent / "fleet.nix.in").read_bytes()
    text = format_fleet(template.decode("utf-8"), keys, str(fleet.chroot_dir)).encode()
    target = fleet.directory / "fleet.nix"
    there = read_own(fleet, "fleet.nix", MAX_FLEET_BYTES) if target.exists() else b""
    if there == text:
        print(f"fleet.nix: unchanged, {counted(len(keys))}")
    else:
        with acting_as(fleet.ruler):
            client.write_atomic(target, text, 0o644)
        fleet.source.make_known(target)
        warn(lost_keys(fleet, there.decode("utf-8", "replace"), text.decode()))
        print(f"fleet.nix: written, {counted(len(keys))}; include it in this server's configuration and switch")
    if os.geteuid() == 0 and fleet.chroot_dir.is_dir():
        for path in fleet.chroot_dir.iterdir():
            if path.name not in keys and is_chroot(path):
                end_sessions(path)
    return 0


def command_rebuild(fleet: Fleet, wanted: Sequence[str], plan: Plan) -> int:
    """`check` and `build`: what the hosts will do with their releases, done here."""
    import tempfile

    hosts, errors = find_hosts(fleet, wanted)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bento-"))
        work = Work(fleet, plan, Store(fleet.source, Path(directory, "store")))
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


class Oath(NamedTuple):
    """What `sign` was asked to vouch for. `key`: a private key's file, or a public one's whose private half an agent or a
    security key has; `own`: its public half. `named`: hosts were. `again`: that this state is meant, whatever became of
    it. `revoked`: fingerprints."""

    key: str
    own: Mapping[str, str]
    named: bool = False
    days: int = VALID_DAYS
    build: bool = False
    again: bool = False
    unsign: bool = False
    revoked: tuple[str, ...] = ()
    serial: int | None = None
    fleet_id: str | None = None


def make_oath(options: argparse.Namespace) -> Oath:
    if abs(options.days) > MAX_DAYS:
        raise UsageError(f"--days {options.days}: at most {MAX_DAYS}, a hundred years")
    own = own_keys(options.key)
    revoked = tuple(sorted(client.read_signers(Path(options.revoke)))) if options.revoke else ()
    if own.keys() & set(revoked):
        raise UsageError(f"--revoke {options.revoke}: {options.key} itself is in it: sign with another key")
    if options.fleet_id is not None and not client.FLEET_ID.fullmatch(options.fleet_id):
        raise UsageError(f"--fleet-id {one_line(options.fleet_id, 40)}: it is 32 of 0-9 and a-f, as in hosts/signed")
    return Oath(
        options.key, own, bool(options.hosts), options.days, options.build, options.again, options.unsign, revoked,
        options.serial, options.fleet_id,
    )  # fmt: skip


def command_sign(fleet: Fleet, wanted: Sequence[str], oath: Oath) -> int:
    """Signs what `hosts/` holds now, wherever the same commit is checked out: a release has the same name everywhere. One
    signature is for all hosts; those that are not wanted have what was signed of them before."""
    hosts, errors = find_hosts(fleet, [])
    anew = find_hosts(fleet, wanted)[0] if wanted else hosts
    before, ours = find_before(fleet, oath)
    if not ours and len(anew) < len(hosts):
        raise BentoError("hosts/signed is not of this key, which takes no host over from it: sign all, without NAME")
    failures: list[Failure] = []
    leaves: dict[str, str] = {}
    behind: list[str] = []
    for name in hosts:
        old = before.leaves.get(name) if before is not None else None
        try:
            if name in anew:
                last = client.parse_leaf(old, "hosts/signed") if old is not None else None
                old = make_leaf(
                    fleet, name, last if ours or last is None else last._replace(system=None, unsign=False), oath
                )
            elif old is not None and read_release(fleet, name)[0].id != client.parse_leaf(old, "hosts/signed").release:
                behind.append(name)
        except (BentoError, OSError) as error:
            if name in anew:
                failures.append(Failure(name, words_of(error)))
            old = old if ours else None
        if old is not None:
            leaves[name] = old
    if leaves:
        text = oath_text(before, ours, Tree(list(leaves.values())).root, oath)
        content = text + make_signature(text, oath) + "".join(f"{leaf}\n" for leaf in leaves.values())
        with acting_as(fleet.ruler):
            client.write_atomic(fleet.directory / "hosts/signed", content.encode(), 0o644)
        fleet.source.make_known(fleet.directory / "hosts/signed")
        changed = [name for name, leaf in leaves.items() if before is None or before.leaves.get(name) != leaf]
        print(format_signed(client.parse_signed(text, ""), leaves, changed))
    if behind:
        what = "signed as before, which is another release than HEAD gives: 'bento.py sign' for these, too"
        warn([f"{who_of(behind)}: {what}"])
    return complain([*errors, *group_failures(failures)])


def find_before(fleet: Fleet, oath: Oath) -> tuple[Signatures | None, bool]:
    """What was signed before, and whether by this key. If not, who can push may have written it."""
    import tempfile

    try:
        found = read_signatures(fleet)
    except BentoError as error:
        if oath.serial is not None and oath.fleet_id is not None and not oath.named:
            return None, True
        raise BentoError(f"{error}: 'git checkout hosts/signed', or all hosts with --serial and --fleet-id") from None
    if found is None:
        return None, True
    with tempfile.TemporaryDirectory(prefix="bento-") as made:
        try:
            client.find_signer(found.text, found.armored, oath.own, Path(made))
            return found, True
        except BentoError:
            print("hosts/signed is not of this key: only fleet and serial are taken over from it", file=sys.stderr)
            return found, False


def make_leaf(fleet: Fleet, name: str, last: client.Leaf | None, oath: Oath) -> str:
    """What is signed of a host. `last`: what was before, which holds as long as the release is the same."""
    import tempfile

    (release, recipe), members = read_release(fleet, name), list_members(fleet, name)[0]
    if missing := unlocked_inputs(members, recipe):
        raise BentoError(
            f"flake.lock lacks {', '.join(missing)}: nobody would know what was signed: 'nix flake lock', and commit it"
        )
    again = (last.again if last is not None else 0) + oath.again
    if last is None or (last.release, last.size) != (release.id, release.size):
        commit = fleet.source.commit(name)
        last = client.Leaf(name, release.id, release.size, None, commit.id if commit is not None else None)
    system, unsign = last.system, oath.unsign or (last.unsign and not oath.named)
    if oath.build:
        with tempfile.TemporaryDirectory(prefix="bento-") as made:
            tree = Path(made, "config")
            unpack_release(fleet.source, members, tree)
            system = rebuild("build", tree, name, BUILD_LIMIT_S, last.commit)
        vouch_for_closure(str(system), oath)
    return client.format_leaf(last._replace(system=system, again=again, unsign=unsign))


def oath_text(before: Signatures | None, ours: bool, root: str, oath: Oath) -> str:
    """The text to sign. Its serial is higher than the last one's, which a signer's clock may once have put into the future;
    but not than one that somebody else wrote there, for there may be none."""
    now_s, day_s = time.time(), 24 * 3600
    last = before.signed.serial if before is not None else 0
    ahead = last > now_s + day_s
    if ahead and oath.serial is None:
        kept = "signing goes on from there" if ours else f"where hosts refuse a lower one: --serial {last + 1}"
        print(f"hosts/signed has serial {last}, of {format_time(min(last, LAST_S))}: {kept}", file=sys.stderr)
    serial = oath.serial if oath.serial is not None else max(int(now_s), last + 1 if ours or not ahead else 0)
    if not (last if ours else -1) < serial < 1 << 53:
        raise UsageError(f"serial {serial}: it has to be higher than {last}, and lower than {1 << 53}")
    revoked = {*oath.revoked, *(before.signed.revoked if before is not None and ours else ())}
    fleet = oath.fleet_id or (before.signed.fleet if before is not None else os.urandom(16).hex())
    # To the full day, so that whoever signs the same on this day writes the same.
    expires = format_time((now_s // day_s + oath.days + 1) * day_s)
    return client.format_signed(client.Signed(fleet, serial, expires, root, tuple(sorted(revoked))))


def format_signed(signed: client.Signed, leaves: Mapping[str, str], changed: Sequence[str]) -> str:
    lines = [f"{name}: {client.parse_leaf(leaves[name], name).release[:12]}" for name in changed]
    count = f"{counted(len(changed))} anew, {len(leaves) - len(changed)} as before"
    return "\n".join([*lines, f"signed: {count}, fleet {signed.fleet}, serial {signed.serial}, until {signed.expires}"])


def own_keys(key: str) -> dict[str, str]:
    """The public half of a key, which lies beside the private one, or is all that there is of it."""
    if not Path(key).is_file():
        raise UsageError(f"--key {key}: no such file: it is an SSH key, which 'ssh-keygen -t ed25519' makes")
    for path in (f"{key}.pub", key):
        with suppress(UsageError):
            return client.read_signers(Path(path))
    raise UsageError(f"--key {key}: there is no {key}.pub: 'ssh-keygen -y -f {key} >{key}.pub' makes it")


def make_signature(text: str, oath: Oath) -> str:
    """Has ssh-keygen sign, with its questions for a passphrase or a touch going to the person. What hosts would refuse is no
    signature."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="bento-") as made:
        Path(made, "hosts").write_text(text, "utf-8")
        argv = ["ssh-keygen", "-q", "-Y", "sign", "-f", os.path.abspath(oath.key), "-n", client.NAMESPACE, "hosts"]
        try:
            done = subprocess.run(argv, cwd=made, check=False)
        except OSError as error:
            raise BentoError(f"cannot run ssh-keygen: {error.strerror}; is OpenSSH on PATH?") from None
        if done.returncode != 0 or not Path(made, "hosts.sig").exists():
            raise BentoError(f"ssh-keygen could not sign with {oath.key}: exit {done.returncode}: nothing is signed")
        armored = Path(made, "hosts.sig").read_text("utf-8")
        client.find_signer(text, armored, oath.own, Path(made))
    return armored


def nix_key(oath: Oath) -> tuple[Path, str]:
    """The signer's key for Nix, beside that for SSH, made where there is none; and its public half."""
    secret = Path(f"{oath.key}.nix")

    def ask(*words: str, given: bytes = b"") -> bytes:
        argv = ["nix", "--extra-experimental-features", "nix-command", "key", *words]
        try:
            return subprocess.run(argv, input=given, stdout=subprocess.PIPE, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            raise BentoError(f"no key for Nix: {one_line(words_of(error), 200)}") from None

    if not secret.exists():
        name = "bento-" + re.sub("[^A-Za-z0-9]", "", next(iter(oath.own)))[6:14]
        client.write_atomic(secret, ask("generate-secret", "--key-name", name) + b"\n", 0o600)
    return secret, ask("convert-secret-to-public", given=secret.read_bytes()).decode()


def vouch_for_closure(system: str, oath: Oath) -> None:
    """For a host that builds nothing: signs for Nix what it is to fetch, with a key of the signer's, and brings it to the
    server. A store path is a name: what lies there is whose signature Nix asks for (services.bento.cacheKey)."""
    settings = client.settings_of(system)
    if settings.get("build") != "server":
        return
    secret, public = nix_key(oath)
    if public not in str(settings.get("cache_key") or "").split():
        raise BentoError(f'it builds nothing, and would not trust this key: services.bento.cacheKey = "{public}";')
    servers = settings.get("server")
    server = f"ssh-ng://{servers if isinstance(servers, str) else next(iter(servers or []), '')}"
    limit_s = BUILD_LIMIT_S
    nix = ["nix", "--extra-experimental-features", "nix-command"]
    client.run([*nix, "store", "sign", "--recursive", "--key-file", str(secret), system], timeout=limit_s)
    # Whom the server trusts is no matter: it is a shelf. The hosts look at the signatures.
    client.run([*nix, "copy", "--no-check-sigs", "--to", server, system], timeout=limit_s)
    # What the server had already has no signature of ours yet.
    client.run(
        [*nix, "store", "copy-sigs", "--recursive", "--store", server, "--substituter", "auto", system], timeout=limit_s
    )


def say_of_each(hosts: Sequence[str], errors: list[str], say: Callable[[str], str], prefix: str = "") -> int:
    """Prints what there is to say of each host. One host's error stops no other; hosts that have the same have one line."""
    failures = list[Failure]()
    for name in hosts:
        try:
            words = say(name)
        except (BentoError, OSError) as error:
            failures.append(Failure(f"{prefix}{name}", words_of(error)))
            continue
        if words:
            print(f"{prefix}{name}: {words}", flush=True)
    return complain([*errors, *group_failures(failures)])


def command_show(fleet: Fleet, name: str, directory: str | None) -> int:
    """Lists what is published for a host, or unpacks it into a new directory."""
    find_hosts(fleet, [name])
    current = read_published(fleet.chroot(name), name)
    if current is None:
        raise BentoError(f"{name}: nothing is published for it: 'bento.py populate {name}'")
    archive = fleet.chroot(name) / f"releases/{current.release}.tar"
    if directory is None:
        with open(archive, "rb") as tar:
            while (entry := client.read_entry(tar)) is not None:
                print(one_line(entry.name) + ("/" if entry.size is None else ""))
                tar.seek((entry.size or 0) + -(entry.size or 0) % tarfile.BLOCKSIZE, os.SEEK_CUR)
        return 0
    if os.path.lexists(directory):
        raise BentoError(f"{directory}: it is there already: name a new directory")
    client.unpack(archive, Path(directory))
    print(f"{name}: {current.release[:12]} is in {directory}")
    return 0


def command_diff(fleet: Fleet, wanted: Sequence[str]) -> int:
    """What would change on each host: from the system that it reports to the one that was built last, published or not."""
    return say_of_each(*find_hosts(fleet, wanted), functools.partial(diff_host, fleet))


def is_here(system: str) -> bool:
    """Whether this server's store has what a host reports: nothing but a store path reaches a command line."""
    return bool(re.fullmatch(r"/nix/store/[a-z0-9]{32}-[A-Za-z0-9+._?=-]+", system)) and os.path.exists(system)


def command_closure(fleet: Fleet, package: str) -> int:
    """Which versions of a package are in the system that each host reports, as far as this server's store has it. That it
    has not is an error: who asks must not take nothing for an answer."""
    versions = functools.cache(functools.partial(find_versions, package))

    def say(name: str) -> str:
        found = read_report(fleet.chroot(name), name)
        if found.report is None or not found.report.system:
            raise BentoError(f"unknown: {found.problem or 'it has not reported'}")
        if not is_here(system := found.report.system):
            how = (
                "a host builds its own: 'bento.py build' here, or services.bento.build = \"server\" there, brings them"
            )
            raise BentoError(f"unknown: its system is not in this server's store: {how}")
        return versions(system)

    return say_of_each(*find_hosts(fleet, []), say)


OUTPUTS = "bin|dev|lib|out|man|doc|info|static|debug|devdoc|data|dist"


def find_versions(package: str, system: str) -> str:
    """A store path is named after a package and its version, which begins with the first digit behind a dash."""
    paths = client.run(["nix-store", "--query", "--requisites", system], timeout=600).output
    pattern = rf"/nix/store/[a-z0-9]{{32}}-{re.escape(package)}(?:-([0-9].*?))?(?:-(?:{OUTPUTS}))?"
    found = {match[1] or "without a version" for path in paths.split() if (match := re.fullmatch(pattern, path))}
    return ", ".join(sorted(found)) or "none"


def diff_host(fleet: Fleet, name: str) -> str:
    current, built = read_published(fleet.chroot(name), name), read_built(fleet.chroot_dir).get(name)
    found = read_report(fleet.chroot(name), name)
    report, published = found.report, current.system if current is not None else None
    # What is published may have been built elsewhere since, by who signs.
    here = built is not None and (published is None or current is None or built.time >= current.published)
    new = built.system if built is not None and here else published
    if new is None:
        raise BentoError("its release was not built here: run 'bento.py build', or 'populate --build'")
    if report is None:
        raise BentoError(found.problem or "it has not reported a system yet")
    if report.system == new:
        return f"no difference, it runs {new}"
    for system in (report.system, new):
        if not is_here(system):
            raise BentoError(f"{one_line(system)} is not in this server's store: nothing to compare with")
    tool = ["nvd", "diff"] if shutil.which("nvd") else [*NIX, "store", "diff-closures"]
    changes = client.run([*tool, report.system, new], timeout=600).output
    return f"{report.system} -> {new}{'' if new == published else ', which is not published'}\n{changes.rstrip()}"


NIX = ["nix", "--extra-experimental-features", "nix-command flakes"]


def command_update(fleet: Fleet, name: str | None) -> int:
    """Updates the lock files of the hosts' flakes, each flake once, and says what moved. `name`: of one input."""
    import tempfile

    done: dict[str, bool] = {}

    def say(host: str) -> str:
        with tempfile.TemporaryDirectory(prefix="bento-") as work:
            return update_host(fleet, host, name, Path(work), done)

    code = say_of_each(*find_hosts(fleet, []), say, "hosts/")
    if name is not None and not any(done.values()) and code == 0:
        raise UsageError(f"{one_line(name)}: no flake of this fleet has such an input")
    return code


def update_host(fleet: Fleet, host: str, name: str | None, work: Path, done: dict[str, bool]) -> str:
    """Updates the lock of a host's flake, in a copy of what is committed: Nix would read all that lies about in the tree,
    and keep it where everybody can read it. What moved; nothing if it is no flake, or one that is `done`, which says
    whether it has that input."""
    members, _ = list_members(fleet, host)
    recipe = find_recipe(fleet, members, host)
    directory = os.path.join(fleet.source.top(host), recipe.directory).rstrip("/")
    entry = f"{recipe.directory}/flake.nix".lstrip("/")
    if directory in done or find_member(members, entry) is None:
        return ""
    tree = work / "config" / recipe.directory
    unpack_release(fleet.source, members, work / "config")
    before = read_lock(tree, directory)
    done[directory] = name is None or name in before or not before
    if not done[directory]:
        return f"has no input {name}"
    committed = (tree / "flake.lock").read_bytes() if (tree / "flake.lock").exists() else None
    update_lock(work / "config", recipe.directory, name)
    made = (tree / "flake.lock").read_bytes() if (tree / "flake.lock").exists() else None
    if made is not None and made != committed:
        lock = Path(directory, "flake.lock")
        with acting_as(find_tree_ruler(directory)):
            client.write_atomic(lock, made, 0o644)
        fleet.source.make_known(lock)
    after = read_lock(tree, directory)
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


def read_lock(tree: Path, directory: str) -> dict[str, str]:
    """What a flake's direct inputs are locked to, in a few letters a person can compare. `directory`: where it is from."""
    try:
        nodes = json.loads((tree / "flake.lock").read_bytes())["nodes"]
        inputs = nodes["root"].get("inputs", {})
        locked = {i: nodes[node]["locked"] for i, node in inputs.items() if isinstance(node, str)}
        return {
            i: f"{format_time(lock.get('lastModified', 0))[:10]} {(lock.get('rev') or lock.get('narHash') or '?')[:14]}"
            for i, lock in locked.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BentoError(f"{directory}/flake.lock: cannot be read: {one_line(words_of(error))}") from None


def note_system(fleet: Fleet, name: str, release: str, system: str) -> None:
    """Remembers what was built; adds it to `current.json`, if it was built from the release that is published."""
    with suppress(OSError, BentoError):
        if not (fleet.chroot_dir / ".store").exists():
            return
        with populate_lock(fleet, wait=True):  # or it would undo what populate is about to publish
            note_built(fleet.chroot_dir, name, release, system)
            current = read_published(fleet.chroot(name), name)
            if current is None or current.release != release:
                return
            # What is signed is what the host takes: another one beside it would keep populate from passing.
            signed = client.parse_leaf(current.vow.leaf, "").system if current.vow is not None else None
            if current.system != system and signed in (None, system):
                text = client.encode(current._replace(system=system))
                client.write_atomic(fleet.chroot(name) / "current.json", text, 0o644)


def populate_hosts(work: Work, names: Sequence[str]) -> None:
    """Publishes what is new, many hosts at a time, or each host when it has passed its build."""
    if work.plan.action is not None and not work.plan.dry_run:
        with closing(build_all(work, names)) as built:
            for job, system, _ in built:
                with work.lock:
                    if system is not None:
                        job = take_build(work, job, system)
                    if placed := attempt(work, job.name, job, system):
                        announce(work, [placed])
        return
    jobs = []
    for name in work.progress.each(names, "publishing"):
        if placed := attempt(work, name):
            jobs.append(placed)
        if len(jobs) == BATCH:
            announce(work, jobs)
            jobs = []
    announce(work, jobs)


def take_build(work: Work, job: Job, system: str) -> Job:
    """What was built is remembered; and if that is the system that is published already, there is nothing to publish."""
    note_built(work.fleet.chroot_dir, job.name, job.release.id, system)
    work.built = read_built(work.fleet.chroot_dir)
    new = not job.unchanged and job.kept is None and job.signature is None
    if new and job.before is not None and is_published(work, job.release, job.before):
        return unchanged_job(job.owner, job.before, None)
    return job


def attempt(work: Work, name: str, job: Job | None = None, system: str | None = None) -> tuple[Job, Current] | None:
    """Puts a host's release in place, if it is a new one. One host's failure stops no other, whatever it is."""
    try:
        job = job or examine(work, name)
        chroot, release = work.fleet.chroot(name), job.release
        if job.unchanged and job.before is not None:
            if not work.plan.dry_run:
                prepare_chroot(chroot, job.owner)
                current = job.before._replace(system=system or job.before.system)
                if job.kept is None:
                    current = with_signature(current, job.signature)
                if work.plan.again:
                    current = current._replace(published=later_than(current.published, time.time()))
                if current != job.before:
                    work.renewed[name] = current
                else:
                    tidy(chroot, current)
                prune_logs(chroot)
            work.counts["published" if work.plan.again else "unchanged"] += 1
            words = f"unchanged, {release.id[:12]}{', published again' if work.plan.again else ''}"
            work.tell(job, "unchanged", words if client.verbose or work.plan.again else "", system)
        elif work.plan.dry_run:
            work.counts["published"] += 1
            work.tell(job, "would-publish", f"would publish {release.id[:12]} ({release.size} bytes)")
        else:
            prepare_chroot(chroot, job.owner)
            job = work.add(job)
            if job.kept is None:  # files may have changed meanwhile
                check_system(check_signature(work.fleet, name, job.release, job.before), system)
            current = place(chroot, work.store, job, system, time.time())
            return job, current
    except BrokenPipeError:  # whoever reads what we say has gone: no host's failure
        raise
    except Exception as error:
        work.fail(name, error)
        if job is not None and not work.plan.dry_run:
            work.store.drop(work.store.new, job.release.id)
    return None


def announce(work: Work, placed: Sequence[tuple[Job, Current]]) -> None:
    """Tells hosts of what is in place, and of what is published anew, with two syncs of their disk for them all."""
    renewed, work.renewed = work.renewed, {}
    if not placed and not renewed:
        return
    chroots = {name: work.fleet.chroot(name) for name in (*renewed, *(job.name for job, _ in placed))}
    for name, current in list(renewed.items()):
        try:
            write_aside(chroots[name], current)
        except OSError as error:
            work.fail(name, error)
            del renewed[name]
    disks = {os.stat(path).st_dev: path for path in (*chroots.values(), work.fleet.chroot_dir)}
    client.sync_disk(*disks.values())
    work.store.settle()
    work.progress.clear()
    revealed = []
    for job, current in (*((None, current) for current in renewed.values()), *placed):
        try:
            reveal(chroots[current.host], current)
            revealed += [(job, current)] if job is not None else []
        except Exception as error:
            work.fail(current.host, error)
    client.sync_disk(*disks.values())
    work.counts["published"] += len(revealed)
    for job, current in revealed:  # not before: a reader that goes away stops us here
        words = f"published {current.release[:12]} ({current.size} bytes)"
        work.tell(job, "published", words, current.system)


def survey(work: Work, waves: Sequence[Wave], good: set[str], memory: Rollout, now_s: float) -> dict[str, Standing]:
    """Where each host stands; `work` gets what its commit gives. What cannot be published is a failure, told once."""
    standings = dict[str, Standing]()
    for name in work.progress.each([name for wave in waves for name in wave.hosts], "comparing"):
        chroot, absent = work.fleet.chroot(name), work.fleet.host(f"{name}.absent").exists()
        standings[name] = Standing(Found(None, None, None, "unreadable"), (), absent)
        work.decided[name] = None
        try:
            found = read_host(str(chroot), name)
            runs = note_run(memory.runs.get(name, ()), found, log_came_s(chroot, found))
            standings[name] = Standing(found, runs, absent, name in memory.refused)
            if name in good:
                job = examine(work, name)
                job = job if job.unchanged or work.plan.dry_run else work.add(job)
                release, made = job.release, format_time(now_s)
                current = Current(name, release.id, release.size, made, None, (), job.revision, None, job.commit)
                work.decided[name] = with_signature(current, job.signature)
        except Exception as error:
            work.fail(name, error)
    return standings


def add_candidate(
    candidates: Sequence[Candidate],
    found: Mapping[str, Current | None],
    standings: Mapping[str, Standing],
    now_s: float,
) -> list[Candidate]:
    """With one more, if what the commits give is new for any host. A later signature of the same takes its place."""
    known = []
    for candidate in candidates:
        later = {host: found.get(host) or current for host, current in candidate.wanted.items()}
        same = {
            host: current for host, current in later.items() if current and current.release == candidate.release(host)
        }
        known.append(candidate._replace(wanted={**candidate.wanted, **same}))
    before = known[-1] if known else None
    new = [
        host
        for host, current in found.items()
        if (current.release if current is not None else "")
        != (before.release(host) if before is not None else standings[host].published if current is not None else "")
    ]
    return [*known, Candidate(now_s, name_candidate(found, before), dict(found), 0, now_s)] if new else known


def plan_rollout(work: Work, hosts: Sequence[str], good: Sequence[str], memory: Rollout, now_s: float) -> Rollout:
    """How far hosts/waves lets this run go, and what each host gets of it."""
    if work.plan.now:
        return memory._replace(candidates=(), holds=(), line="")
    waves, warnings, fits = read_waves(work.fleet, hosts, memory.fits)
    work.warnings += warnings
    memory = memory._replace(fits=tuple(sorted(fits)))
    if not waves:
        return memory._replace(candidates=(), runs={}, holds=(), line="")
    standings = survey(work, waves, set(good), memory, now_s)
    memory = memory._replace(runs={name: standing.runs for name, standing in standings.items() if standing.runs})
    candidates = add_candidate(memory.candidates, work.decided, standings, now_s)
    if not candidates:
        return memory._replace(holds=(), line="")

    @functools.cache
    def blockers(wave: int, index: int) -> tuple[tuple[str, str], ...]:
        return find_blockers(waves[wave], index, candidates, standings, now_s)

    candidates = advance(candidates, waves, blockers, now_s)
    chosen = {
        name: choose(name, number, candidates, standings[name])
        for number, wave in enumerate(waves)
        for name in wave.hosts
    }
    for name, index in chosen.items():
        older = candidates[index].wanted.get(name) if index is not None and index < len(candidates) - 1 else None
        if older is not None:
            work.instead[name] = older
    holds = find_holds(candidates, waves, chosen, standings, blockers)
    line = describe(candidates, waves, holds, standings)
    return memory._replace(candidates=tuple(thin_out(candidates, len(waves))), holds=tuple(holds), line=line)


def roll_out(work: Work, hosts: Sequence[str], good: Sequence[str], memory: Rollout) -> tuple[Rollout, list[Failure]]:
    """Publishes as far as hosts/waves lets us, and tells whom it holds. `good`: the hosts whose keys are in order. Returns
    the hosts that failed with others behind them, and roll-outs that stand still."""
    now_s = time.time()
    rollout = plan_rollout(work, hosts, good, memory, now_s)
    if not work.plan.dry_run:  # now, for what follows may take hours
        work.store.kept = rollout.releases
        if work.store.kept - memory.releases:  # what is remembered is on disk
            client.sync_disk(work.fleet.chroot_dir)
            work.store.settle()
        try:
            write_rollout(work.fleet.chroot_dir, rollout)
        except OSError as error:  # a full disk: what needs no room goes on
            work.warnings.append(f"{words_of(error)}: the waves are not remembered")
    held = {host: release for hold in rollout.holds for host, release in hold.hosts.items()}
    out = {host for host, release in held.items() if not gets_another(work, host, release)}
    out |= {failure.host for failure in work.failures}
    populate_hosts(work, [name for name in good if name not in out])
    tell_rollout(work, rollout, set(held) & out)
    # What could not be published is told already.
    stops = dict(each for hold in rollout.holds for each in hold.stopped if each[1] != "not published")
    words = "this stops the roll-out, until a release mends it: see 'bento.py log'"
    still = [Failure(*text.split(": ", 1)) for text in rollout.still(now_s).values()]
    return rollout, [*(Failure(host, f"{why}: {words}") for host, why in stops.items()), *still]


def gets_another(work: Work, host: str, release: str) -> bool:
    """Whether a host that is held gets an older candidate meanwhile, or one that is damaged is mended."""
    return host in work.instead and work.instead[host].release == release and not examine(work, host).unchanged


def tell_rollout(work: Work, rollout: Rollout, out: set[str]) -> None:
    """Whom it holds, once."""
    work.progress.clear()
    work.counts["held"] = len(out)
    for hold in rollout.holds:
        waits_for = [{"host": host, "why": why} for host, why in hold.blockers]
        if not work.plan.as_json:
            print(f"{counted(len(hold.hosts))}: held: {hold.reason}")
        for host in hold.hosts if work.plan.as_json else ():
            wanted = work.decided.get(host)
            told = {"host": host, "result": "held", "release": wanted.release if wanted is not None else None}
            print(json.dumps(told | {"since": format_time(hold.since_s), "waits_for": waits_for}))


def remember_failures(
    before: Mapping[str, Refusal], hosts: Sequence[str], failures: Iterable[Failure]
) -> dict[str, Refusal]:
    """Keeps what failed until it passes, for `status`: what is published meanwhile looks as good as ever."""
    now = format_time(time.time())
    kept = {name: refusal for name, refusal in before.items() if name not in hosts}
    for failure in failures:
        since, times, _ = before.get(failure.host, Refusal(now, 0, ""))
        kept[failure.host] = Refusal(since, times + 1, one_line(failure.text, 1000))
    return kept


def publish(work: Work, hosts: Sequence[str], bad_keys: Mapping[str, str], *, everyone: bool) -> None:
    """Publishes hosts, as far as hosts/waves lets us where it is all of them; keeps for `status` what failed."""
    chroots, plan = work.fleet.chroot_dir, work.plan
    if not plan.dry_run:
        for left in (chroots / ".copies", *chroots.glob(".tmp-*")):  # of version 1.0; of a kill
            client.remove(left)
        work.store.kept = read_rollout(chroots, time.time()).releases
        work.store.prune()
        work.warnings += make_room(chroots)
    unfit = [Failure(name, bad_keys[name]) for name in hosts if name in bad_keys]
    for name, error in sorted(unfit) if plan.as_json else ():
        print(json.dumps({"host": name, "result": "failed", "error": error}))
    good = [name for name in hosts if name not in bad_keys]
    stops = list[Failure]()
    memory = read_rollout(chroots, time.time())
    rollout, work.latest = memory, memory.candidates[-1].wanted if memory.candidates else {}
    if everyone:
        rollout, stops = roll_out(work, hosts, good, memory)
    else:
        populate_hosts(work, good)
    if not plan.dry_run:
        announce(work, [])
        work.store.prune()
        refused = remember_failures(memory.refused, hosts, [*work.failures, *unfit])
        refused = {name: each for name, each in refused.items() if os.path.lexists(work.fleet.host(name))}
        with suppress(OSError):  # a full disk
            write_rollout(chroots, rollout._replace(refused=refused, error="" if everyone else rollout.error))
            if everyone:
                os.utime(chroots / ".lock", (time.time(),) * 2)
        work.fleet.source.save()
    work.failures += stops


def command_populate(fleet: Fleet, wanted: Sequence[str], plan: Plan, prune: bool) -> int:
    """Publishes what the hosts' commits have."""
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
        work = Work(fleet, plan, Store(fleet.source, fleet.chroot_dir / ".store"))
        if prune:
            prune_chroots(find_gone(fleet, hosts), plan, work.failures)
        try:
            publish(work, hosts, bad_keys, everyone=not wanted)
        except BentoError as error:
            if not plan.dry_run and not wanted:  # nobody may be looking: for `status`
                memory = read_rollout(fleet.chroot_dir, time.time())
                with suppress(OSError):  # a full disk
                    write_rollout(fleet.chroot_dir, memory._replace(error=one_line(str(error), 1000)))
            raise
    work.progress.clear()
    if not plan.as_json:
        would, held = "would be " if plan.dry_run else "", work.counts["held"]
        print(
            f"{counted(len(hosts))}: {work.counts['published']} {would}published, {work.counts['unchanged']}"
            f" unchanged, {f'{held} held, ' if held else ''}{len(hosts) - sum(work.counts.values())} failed"
        )
        for way, names in work.backwards.items():
            print(f"{counted(len(names))} ({show_names(list(names))}): goes back {way}")
    for root, files in fleet.source.plain.items():
        print(f"{root}: no Git here: what lies there is published, {counted(files, 'file')}", file=sys.stderr)
    warn([*work.warnings, *fleet.source.warnings(), *unknown_keys(fleet, hosts)])
    code = complain([*errors, *group_failures(work.failures)])
    if plan.asked and not plan.as_json and not fleet.source.dirty:
        for line in group_failures(tell_edits(work, hosts)):
            print(line)
    return code


def tell_edits(work: Work, hosts: Sequence[str]) -> Iterator[Failure]:
    """Of each host's files those that a person has edited and did not commit."""
    source = work.fleet.source
    for name in hosts:
        with suppress(BentoError, OSError):  # what was published, was, and what is wrong was said
            if source.edits(name):
                list_members(work.fleet, name)
                if words := source.tell_edits(name):
                    yield Failure(name, words)


def gather(
    fleet: Fleet, wanted: Sequence[str], view: View, now_s: float
) -> tuple[list[Row], list[str], dict[str, str], str]:
    """The rows that every form of `status` shows, what is wrong with hosts/, and what is the matter with the server: what it
    is about, which stays, and the words; at last the roll-out as a sentence."""
    hosts, errors = find_hosts(fleet, wanted)
    beside = read_beside(fleet, now_s, view.late_reboot_s)._replace(logs=view.logs)
    rows = list[Row]()
    for name in hosts:
        chroot = f"{fleet.chroot_dir}/{name}"  # a Path takes its time, ten thousand times
        rows.append(look_at(name, chroot, now_s, view.offline_after_s, beside))
    remember_machines(fleet.chroot_dir, beside.machines, rows, everyone=not wanted)
    troubles = look_at_disk(fleet.chroot_dir)
    if not wanted:
        troubles |= look_at_silence(rows, now_s) | look_at_strangers(fleet, now_s)
        troubles |= look_at_rollout(fleet.chroot_dir, beside.rollout, now_s, view.published_within_s)
    return sort_rows(rows), errors, troubles, beside.rollout.line


def read_beside(fleet: Fleet, now_s: float, late_reboot_s: float = LATE_PERSON_S) -> Beside:
    """What lies beside the chroots and the hosts. What cannot be read there keeps nobody from the table."""
    absent = {}
    for path in (fleet.directory / "hosts").glob("*.absent"):
        try:
            words = read_own(fleet, f"hosts/{path.name}", MAX_ABSENT_BYTES).decode("utf-8", "replace")
        except (BentoError, OSError) as error:
            words = str(error) if isinstance(error, BentoError) else ""
        absent[path.stem] = one_line(words) or "nobody said why"
    rollout = read_rollout(fleet.chroot_dir, now_s)
    machines = read_machines(fleet.chroot_dir, now_s)
    return Beside(
        absent, dict(rollout.refused), rollout.words(now_s), late_reboot_s, rollout=rollout, machines=machines
    )


def read_json(path: Path) -> dict[str, Any]:
    """A file of the server's own, beside the chroots: nothing is lost with it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_machines(chroot_dir: Path, now_s: float) -> dict[str, Machines]:
    known = {}
    for host, machines in read_json(chroot_dir / ".machines").items():
        with suppress(ValueError, TypeError):
            known[host] = tuple((str(mark), min(float(since_s), now_s)) for mark, since_s in machines)
    return known


def remember_machines(chroot_dir: Path, before: Mapping[str, Machines], rows: Sequence[Row], *, everyone: bool) -> None:
    """Who may not write there, or finds no room, only looks."""
    now = ({} if everyone else dict(before)) | {row.host: row.machines for row in rows if row.machines}
    if now != before:
        with suppress(OSError):
            client.write_atomic(chroot_dir / ".machines", json.dumps(now).encode(), 0o644)


def look_at_disk(directory: Path) -> dict[str, str]:
    """What to say of a disk that has no room for what hosts report, and whose most of it is."""
    if not (what := is_full(directory, FULL_DISK_BYTES)):
        return {}
    most = ", ".join(str(load) for load in weigh_all(directory)[:SHOWN_LOADS])
    words = f"this server's own disk {what} at {directory}: no host can report, and nothing can be published"
    return {"this server's own disk": words + (f": the most is of {most}" if most else "")}


def look_at_silence(rows: Sequence[Row], now_s: float) -> dict[str, str]:
    """What to say when all hosts fell silent: that is hardly the fault of each."""
    there = [row for row in rows if row.seen_s is not None and not row.absence]
    seen = [row.seen_s for row in there if row.seen_s is not None]
    if len(seen) < 2 or not all("offline" in row.flags for row in there):
        return {}
    words = f"all {len(seen)} hosts are silent {since(max(seen), now_s)}: was this server down, or its disk full?"
    return {SILENCE: words}


def look_at_strangers(fleet: Fleet, now_s: float) -> dict[str, str]:
    """What to say of machines that are in hosts/ no more, and did not leave: nobody would miss them."""
    troubles, hosts = dict[str, str](), {entry.name for entry in scan_hosts(fleet)}
    with suppress(OSError):
        for name in sorted(set(os.listdir(fleet.chroot_dir)) - hosts):
            found = read_report(f"{fleet.chroot_dir}/{name}", name) if client.HOST_NAME.fullmatch(name) else None
            if found is not None and found.report is not None and found.report.phase != Phase.LEFT:
                seen = age(now_s - (found.seen_s or 0.0))
                words = f"{name}: it is not in hosts/, and reported {seen} ago: put it back"
                troubles[f"{name}: not in hosts/"] = f"{words}, or 'bento.py populate --prune' removes its chroot"
    return troubles


def look_at_rollout(chroots: Path, rollout: Rollout, now_s: float, within_s: float | None) -> dict[str, str]:
    """What to say when nothing is published any more, or a roll-out stands still."""
    troubles = rollout.still(now_s)
    if rollout.error:
        troubles["nothing is published"] = f"nothing is published: 'bento.py populate': {rollout.error}"
    elif within_s is not None and (chroots / ".lock").exists():
        done_s = (chroots / ".lock").stat().st_mtime
        if now_s - done_s > within_s:
            words = (
                f"the last 'bento.py populate' of the whole fleet that came to its end was {age(now_s - done_s)} ago"
            )
            troubles["nothing is published"] = f"nothing is published: {words}: see 'journalctl -u bento-populate'"
    return troubles


def for_stdout(text: str) -> str:
    """The same text with plainer symbols, if the encoding of stdout has not got them all."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(PLAIN)
    return text


class View(NamedTuple):
    """How `status` shows the fleet: as `form`, or in `files`, a form and a path each; and what has changed since the file
    `changes`. `quiet`: nobody is told on stderr who needs a person."""

    form: str
    offline_after_s: float = OFFLINE_AFTER_S
    files: tuple[tuple[str, str], ...] = ()
    quiet: bool = False
    logs_url: str | None = None
    changes: str | None = None
    late_reboot_s: float = LATE_PERSON_S
    logs: tuple[str, ...] = ()
    published_within_s: float | None = None


def command_status(fleet: Fleet, wanted: Sequence[str], view: View) -> int:
    now_s = time.time()
    try:
        rows, errors, troubles, line = gather(fleet, wanted, view, now_s)
    except BentoError as error:
        if view.changes is not None:
            tell_changes(Path(view.changes), [], {LOOK: f"{LOOK}: {error}"}, now_s, "")
        raise
    problems, terminal = list(troubles.values()), sys.stdout.isatty() and not view.files

    def show(form: str) -> str:
        if form == "json":
            return format_json(rows, now_s, problems, line)
        if form == "prometheus":
            return format_prometheus(rows)
        if form == "html":
            why = functools.partial(find_reason, (str(fleet.chroot_dir), *view.logs), itertools.count())
            return format_html(rows, now_s, view.logs_url or fleet.chroot_dir.as_uri(), problems, why, line)
        return show_table(rows, now_s, line, alone=bool(wanted), decorated=terminal and "NO_COLOR" not in os.environ)

    for form, path in view.files:
        try:
            client.write_atomic(Path(path), show(form).encode(), 0o644)
        except OSError as error:  # a disk that is full, and the others may lie on another
            errors.append(words_of(error))
    if not view.files:
        sys.stdout.write(for_stdout(show(view.form)))
        sys.stdout.flush()
    if view.changes is not None:
        tell_changes(Path(view.changes), rows, troubles, now_s, line)
    elif not view.quiet:  # cron mails what is on stderr
        wanting = [row for row in rows if not terminal and not (SILENCE in troubles and row.silent)]
        errors = [*problems, *errors, *(f"{who(g)}: {words}" for g, words in complaints(wanting, now_s))]
    warn(unknown_keys(fleet, [row.host for row in rows]))
    return max(complain(errors), int(bool(troubles) or any(row.needs_a_person for row in rows)))


def show_table(rows: Sequence[Row], now_s: float, line: str, *, alone: bool, decorated: bool) -> str:
    """The table for this terminal; of one host that was asked for, all that is known. `alone`: hosts were asked for."""
    width = shutil.get_terminal_size(fallback=(200, 24)).columns
    text = format_table(rows, now_s, width, decorated=decorated) + "\n"
    if not alone:
        return "".join(f"{each}\n" for each in textwrap.wrap(line, width)) + text
    if len(rows) != 1:
        return text
    top, _, summary = text[:-1].rpartition("\n")
    return f"{top}\n\n{format_host(rows[0], now_s)}\n\n{summary}\n"


def find_reason(tops: Sequence[str], asked: Iterator[int], host: str, log: str) -> str:
    """Why an attempt ended as it did, from the end of its log: of so many logs, no more."""
    for top in tops if next(asked) < MAX_REASONS else ():
        with suppress(BentoError, OSError), open_logs(f"{top}/{host}") as logs:
            return last_words(logs, log)
    return ""


def find_concerns(rows: Sequence[Row], *, silence: bool) -> dict[str, tuple[Row, str]]:
    """What of each host needs a person, by what it is about: host, flag, release, units. While all are silent, that is no
    host's news."""
    found = {}
    for row in rows:
        for reason in row.reasons:
            which = ""
            if reason == "failed" and row.report and row.report.last:
                which = (row.report.last.release or "")[:7]
            elif reason == "failed_units" and row.report:
                which = ", ".join(row.report.failed_units)
            if not (silence and reason == "offline"):
                found[one_line(f"{row.host}: {reason.replace('_', ' ')} {which}", 1000)] = row, reason
    return found


def tell_news(row: Row, reason: str, now_s: float) -> str:
    """What has begun, and nothing else that may be the matter with the host."""
    flag, since_s = row.flags[reason], row.since_s
    if reason == "failed":
        return f"{row.state}{f' {since(since_s, now_s)}' if since_s is not None else ''}: {flag.words}"
    if reason == "offline" and row.seen_s is not None:
        return f"offline {since(row.seen_s, now_s)}, it was {row.was or row.state}"
    return flag.words


def tell_changes(path: Path, rows: Sequence[Row], troubles: Mapping[str, str], now_s: float, rollout: str) -> None:
    """A line on stderr for each problem that has begun since the last call, and one for each that is over; for hosts that
    have the same, one for all. What was told lies in a file."""
    before = read_json(path).get("problems", {})
    before = before if isinstance(before, dict) else {}
    concerns, silence = find_concerns(rows, silence=SILENCE in troubles), SILENCE in troubles
    waits = {what for what in before if LOOK in troubles or (silence and what.endswith(": offline"))}
    begins = [f"bento: begins: {words}" for what, words in troubles.items() if what not in before]
    groups: dict[tuple[str, str], list[Row]] = {}
    for what, (row, reason) in concerns.items():
        if what not in before:
            groups.setdefault((reason, row.flags[reason].about or row.flags[reason].words), []).append(row)
    for (reason, about), group in groups.items():
        alike = f"{group[0].state}: {about}" if reason == "failed" else about
        words = tell_news(group[0], reason, now_s) if len(group) == 1 else alike
        begins.append(f"bento: begins: {who(group)}: {words}")
    over: dict[str, list[str]] = {}
    for what in before:
        if what not in troubles and what not in concerns and what not in waits:
            host, _, about = one_line(what).partition(": ")
            over.setdefault(about if about else host, []).append(what)
    for about, whats in over.items():
        names = [one_line(what).partition(": ")[0] for what in whats]
        words = one_line(whats[0]) if len(whats) == 1 else f"{counted(len(whats))} ({show_names(names)}): {about}"
        begins.append(f"bento: over: {words} (since {one_line(min(str(before[what]) for what in whats))})")
    if begins and rollout:
        begins.insert(0, f"bento: roll-out: {rollout}")
    for line in begins:
        print(line, file=sys.stderr)
    now = {what: str(before.get(what, format_time(now_s))) for what in (*troubles, *concerns, *waits)}
    client.write_atomic(path, json.dumps({"problems": now}).encode(), 0o644)


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


class Line(NamedTuple):
    """One of `log --list`: when it came to pass, on our clock, of which host, the same by whoever wrote it, and what."""

    when_s: float
    host: str
    when: str
    release: str
    what: str


def list_log(logs: int, host: str, name: str, came_s: float) -> Line:
    """A log: when by the host's clock, release, result and reason."""
    when, release, result = name.removesuffix(".log").split("_")
    try:
        words = last_words(logs, name)
    except (BentoError, OSError) as error:
        words = one_line(words_of(error))
    parsed = parse_log_name(name)
    late = parsed is not None and abs(client.parse_time(parsed.finished) - came_s) > CLOCK_TOLERANCE_S
    what = f"{result}{f'  {words}' if words else ''}{f'  (came {format_time(came_s)})' if late else ''}"
    return Line(came_s, host, when, release, what)


def list_publication(host: str, published: Published) -> Line:
    when, by = published.time.replace("-", "").replace(":", ""), f"  by {published.by}" if published.by else ""
    what = "published" + (f"  {published.revision}" if published.revision else "") + by
    return Line(client.parse_time(published.time), host, when, published.release[:12], what)


def list_host(fleet: Fleet, name: str, release: str | None) -> tuple[list[Line], dict[str, str]]:
    """What was published for a host, and what became of it; and which commit each release was made of."""
    history = read_history(fleet.chroot(name))
    commits = {each.release[:12]: found[0][:7] for each in history if (found := COMMIT.match(each.revision or ""))}
    lines = [list_publication(name, each) for each in history if each.release.startswith(release or "")]
    more = False
    with suppress(FileNotFoundError), open_logs(fleet.chroot(name)) as logs:
        newest, more = find_logs(logs, release)
        lines += [list_log(logs, name, log, came_s) for came_s, log in newest]
    if more:
        print(
            f"{name}: more than {MAX_LOG_ENTRIES} files in {fleet.chroot(name)}/logs: not all were looked at",
            file=sys.stderr,
        )
    return lines, commits


def command_log_list(fleet: Fleet, wanted: Sequence[str], release: str | None) -> int:
    """What was published, and what became of it, the newest first: of one host, or of many, each line with its name."""
    hosts, errors = find_hosts(fleet, wanted)
    lines, commits, failures = list[Line](), dict[str, str](), list[Failure]()
    for name in hosts:
        try:
            found, known = list_host(fleet, name, release)
        except NotADirectoryError:
            failures.append(Failure(name, no_logs(fleet, name)))
            continue
        lines, commits = lines + found, commits | known
    if not lines and len(hosts) == 1 and not failures:
        failures.append(Failure(hosts[0], no_log(fleet, hosts[0], release)))
    width = max(map(len, hosts)) if len(hosts) > 1 else 0
    for _, host, when, of, what in sorted(lines, key=lambda line: line.when_s, reverse=True):
        who = f"{host:<{width}}  " if width else ""
        print(f"{when}  {who}{of}{f' {commits[of]}' if of in commits else ''}  {what}")
    return complain([*errors, *group_failures(failures)])


def no_logs(fleet: Fleet, name: str) -> str:
    return f"{fleet.chroot(name)}/logs is no directory: 'bento.py populate {name}' makes one"


def no_log(fleet: Fleet, name: str, release: str | None) -> str:
    return f"no log{' of that release' if release else ''} in {fleet.chroot(name)}/logs: it has not reported one yet"


def command_log(fleet: Fleet, wanted: Sequence[str], release: str | None) -> int:
    """What a host uploaded last, made harmless for a terminal."""
    hosts, _ = find_hosts(fleet, wanted)
    if len(hosts) != 1:
        raise UsageError(f"log: {counted(len(hosts))}: give one NAME, or --list")
    (name,), text, more = hosts, None, False
    try:
        with suppress(FileNotFoundError), open_logs(fleet.chroot(name)) as logs:
            newest, more = find_logs(logs, release)
            if newest:
                text = read_untrusted(logs, newest[0][1], MAX_LOG_BYTES)[0][:MAX_LOG_BYTES].decode(errors="replace")
    except NotADirectoryError:
        raise BentoError(f"{name}: {no_logs(fleet, name)}") from None
    if more:
        print(
            f"{name}: more than {MAX_LOG_ENTRIES} files in {fleet.chroot(name)}/logs: not all were looked at",
            file=sys.stderr,
        )
    if text is None:
        raise BentoError(f"{name}: {no_log(fleet, name, release)}")
    for line in text.splitlines():
        print("".join(c if c.isprintable() or c == "\t" else "?" for c in line))
    return 0


# --- command line ---


def add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hosts", nargs="*", metavar="NAME", help="hosts, or patterns (default: all)")


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
    populate.add_argument("--dirty", action="store_true", help="tracked files as they are, for trying: with NAME")
    populate.add_argument("--no-git", action="store_true", help="all that lies there, also where a .gitignore does")
    populate.add_argument(
        "--again", action="store_true", help="also what is unchanged: this state is meant; hosts try it again"
    )
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
    status.add_argument("--output", type=not_empty, metavar="FILE", help="replace FILE instead of printing")
    status.add_argument("--page", type=not_empty, metavar="FILE", help="the same page into FILE, instead of printing")
    status.add_argument("--metrics", type=not_empty, metavar="FILE", help="for node_exporter, into FILE likewise")
    status.add_argument(
        "--changes",
        type=not_empty,
        metavar="FILE",
        help="on stderr only what has begun or is over since the last call, which FILE remembers",
    )
    status.add_argument(
        "--logs",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="other servers' chroots: a host's newest report counts",
    )
    status.add_argument("--logs-url", metavar="URL", help="where the page's links find the chroots (default: as files)")
    status.add_argument(
        "--late-reboot", type=float, default=LATE_PERSON_S / 86400, metavar="DAYS", help="a person's reboot: default 30"
    )
    status.add_argument(
        "--published-within",
        type=float,
        metavar="HOURS",
        help="a person is needed when no populate came to its end for so long",
    )
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
    sign.add_argument(
        "--again", action="store_true", help="this state is meant: have it tried again where it was given up"
    )
    sign.add_argument("--unsign", action="store_true", help="the new system may trust others, or nobody, from then on")
    sign.add_argument(
        "--serial", type=int, metavar="N", help="this one, where hosts have seen a higher one than is known"
    )
    sign.add_argument("--fleet-id", metavar="ID", help="the fleet's, where hosts/signed was lost: current.json has it")
    sign.add_argument("--revoke", metavar="FILE", help="public keys whose signatures count no more")
    add_hosts(sign)
    update = command("update", "update the flakes' lock files, and say what moved")
    update.add_argument("input", nargs="?", metavar="INPUT", help="only this input")
    show = command("show", "list what is published for a host, or unpack it")
    show.add_argument("name", metavar="NAME")
    show.add_argument("directory", nargs="?", type=not_empty, metavar="DIR", help="a new directory for it")
    log = command("log", "what a host uploaded last")
    log.add_argument("hosts", nargs="*", metavar="NAME", help="a host; with --list also a pattern, several, or all")
    log.add_argument("--list", action="store_true", help="what was published and what became of it, a line each")
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
        again=options.again,
        asked=bool(options.hosts) or sys.stdout.isatty() or sys.stderr.isatty(),
    )


def view_of(options: argparse.Namespace) -> View:
    """What `status` was asked for."""
    form = options.form or "table"
    named = {
        "--output": (form, options.output),
        "--page": ("html", options.page),
        "--metrics": ("prometheus", options.metrics),
    }
    for option, file in (*((option, file) for option, (_, file) in named.items()), ("--changes", options.changes)):
        if file is not None and Path(file).is_dir():
            raise UsageError(f"{option} {file}: this is a directory: name a file")
    for top in options.logs:
        if not Path(top).is_dir():
            raise UsageError(f"--logs {top}: no such directory")
    return View(
        form,
        options.offline_after * 3600,
        tuple((form, file) for form, file in named.values() if file is not None),
        options.output is not None,
        options.logs_url,
        options.changes,
        options.late_reboot * 86400,
        tuple(options.logs),
        None if options.published_within is None else options.published_within * 3600,
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
    if command == "show":
        return command_show(fleet, options.name, options.directory)
    if command == "diff":
        return command_diff(fleet, options.hosts)
    if command == "sign":
        return command_sign(fleet, options.hosts, make_oath(options))
    if command == "update":
        return command_update(fleet, options.input)
    if command == "populate":
        fleet.source.no_git, fleet.source.dirty = options.no_git, options.dirty
        if options.dirty and not options.hosts:
            raise UsageError("--dirty is for trying: name the hosts that are to get what nobody has committed")
        return command_populate(fleet, options.hosts, plan_of(options), options.prune)
    if command == "status":
        return command_status(fleet, options.hosts, view_of(options))
    if options.list:
        return command_log_list(fleet, options.hosts, options.release)
    if not options.hosts:
        make_parser().error("log: give a NAME, or --list")
    return command_log(fleet, options.hosts, options.release)


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
        fleet = Fleet(Path(directory).absolute(), Path(chroot_dir).absolute(), named=options.fleet is not None)
        with closing(fleet.source):
            code = dispatch(options, fleet)
        sys.stdout.flush()
        return code
    except BentoError as error:
        print(f"bento: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        print(f"bento: error: {words_of(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bento: error: interrupted; nothing partial is published", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
