#!/usr/bin/env python3
"""Bento's client: keeps this NixOS machine at the release that its server publishes for it.

A systemd timer starts `run`. It polls the server over SFTP, fetches a new release, checks it, builds it,
activates it, proves that the new system still reaches its server, and only then makes it the boot default. When the
proof fails it goes back to the old system. This file works alone, with the standard library only, and must import
nothing that NixOS' python3Minimal lacks (zlib, bz2, lzma, ssl, ctypes, ...). It is also the home of the formats
that both sides share: `current.json`, the report, names and times. `bento.py` imports them from here.

Files in the state directory (/var/lib/bento, mode 0700):
  config/         the files of the release last fetched      result         what was last built from them
  state.json      what this machine runs and last tried      pending.json   journal of an activation under way
  deploy.log      log of the deployment under way            outbox/        logs not yet delivered
  partial/        a download under way, to be resumed        lock           held while a run is at work
  id_ed25519      the machine's SSH identity                 known_hosts    the server's keys
  pause.json      until when a person wants nothing deployed
Elsewhere: /run/bento-proofs, since when a boot is to be proven; the profile system-profiles/bento beside NixOS'
own, which names the system to fall back to; and what the boot loader is told of a trial.

Exit codes: 0 done or nothing to do, 1 the deployment failed, 2 usage, 75 the server could not be reached.

Sections: constants, errors, types, names and times, formats, settings, decisions, files, processes, log, signatures, sftp,
boot loaders, this machine, reports, fetch and build, proof, activation, commands, command line.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"bento: error: Python 3.11 or later is needed; this is {sys.version.split()[0]}")

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # our own directory: others may write there, and a shlex.py beside us would run as whoever runs us

import argparse
import fcntl
import io
import json
import os
import re
import resource
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

T = TypeVar("T")

VERSION = "1.2"
FORMAT = 1

HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,24}")
RELEASE_ID = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
LOG_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z_[0-9a-f]{12}_[a-z-]{1,20}\.log")
COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
FLEET_ID = re.compile(r"[0-9a-f]{32}")
FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
STORE_PATH = re.compile(r"/[ -~]{1,400}")
TEXT = re.compile(r"[^\n]{0,2000}", re.DOTALL)
# Of bento.json: what neither Nix' URLs nor nixos-rebuild read as something else; no directory that leads out.
ATTRIBUTE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,199}")
FILE = re.compile(r"(?!\.\.?(/|$))[A-Za-z0-9_.+-]+(/(?!\.\.?(/|$))[A-Za-z0-9_.+-]+)*")
DIRECTORY = re.compile(rf"\.?|{FILE.pattern}/?")

MAX_RELEASE_BYTES = 4 << 30
MAX_JSON_BYTES = 64 << 10
# Of a release: how deep it may be, and how long one of its names. populate refuses what is deeper.
MAX_DEPTH, MAX_NAME_BYTES = 100, 4096
LOG_HEAD_BYTES, LOG_TAIL_BYTES = 64 << 10, 960 << 10
KEEP_LOGS = 20
MIN_FREE_BYTES = 8 << 20
# How long a transfer may stand still, besides what one request takes at the least rate (bytes a second). Slow is fine,
# dead is not: below that rate it is given up after that time, too.
STALL_S, LEAST_RATE = 60.0, 1000
# In one request of sftp's: as much as OpenSSH's servers take (SFTP_MAX_MSG_LENGTH, less room for a header).
REQUEST_BYTES = 261120
# What sftp may say to one command, and have in memory (a ProxyCommand, too): a server can list names without end.
MAX_ANSWER_BYTES, MAX_SFTP_BYTES = 16 << 20, 256 << 20
CLOCKS_DIFFER_S = 24 * 3600
EXPIRES_SOON_S, NEVER = 7 * 24 * 3600, "9999-12-31T23:59:59Z"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 15 * 60, 24 * 3600
# So many verdicts give a release up. The third has its own chance: a machine whose power goes each evening has it at noon.
MOST_VERDICTS = 3
WATCHDOG_MARGIN_S = 30
# A poll that takes longer hangs: no watchdog guards it, and no other run could start. Twenty large logs on a slow line
# may take hours.
POLL_LIMIT_S = 12 * 3600
# For how long after a boot the proof may fail for want of a server before the release is suspected: a site's power cut ends
# for hosts before it ends for a server. A day, where the old system is one without Bento: from it nothing leads forward.
TRIAL_S, FIRST_TRIAL_S = 45 * 60, 24 * 3600
# A first boot that has no client by then has come to nothing.
TRIAL_BOOT_S = 15 * 60
# A pause without a number of hours, and the longest one: a machine that is to be left alone for good has no timer.
PAUSE_H, LONGEST_PAUSE_H = 8.0, 24.0 * 31
# Each command of `after_deployment`.
HOOK_LIMIT_S = 60
# A long build says so often that it is under way.
HEARTBEAT_S = 30 * 60
NO_RELEASE = "0" * 64
BY_HAND = "by hand"


# --- errors ---


class BentoError(Exception):
    """Something that can be expected to go wrong. Says what, which host or path, and what to do next."""

    exit_code = 1


def words_of(error: Exception) -> str:
    """What went wrong: of the system's errors without the number that Python puts in front."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if not isinstance(error.filename, str | os.PathLike):
        return error.strerror
    # A name that is too long leaves room for these words.
    return f"{one_line(str(error.filename), 200)}: {error.strerror}"


class UsageError(BentoError):
    """A wrong command line, or a setting that cannot work."""

    exit_code = 2


class Unreachable(BentoError):
    """The server could not be reached. `passing`: worth another try in a moment (a refused key is not)."""

    exit_code = 75

    def __init__(self, text: str, *, passing: bool = True) -> None:
        super().__init__(text)
        self.passing = passing


# --- types ---


class Result(StrEnum):
    OK = "ok"
    FETCH_FAILED = "fetch-failed"
    BUILD_FAILED = "build-failed"
    ROLLED_BACK = "rolled-back"
    ROLLBACK_FAILED = "rollback-failed"
    POSTPONED = "postponed"
    INTERRUPTED = "interrupted"


class Cost(StrEnum):
    """What an attempt that failed has cost, which decides when the next one comes."""

    POLL = "poll"
    WORK = "work"  # a build, or a change of the machine
    VERDICT = "verdict"
    GIVEN_UP = "given up"  # by a person


class Phase(StrEnum):
    """What a host says it is doing, in its report."""

    IDLE = "idle"
    BUILDING = "building"
    ACTIVATING = "activating"
    LEFT = "left"  # its owner no longer wants Bento on it


class Step(StrEnum):
    """How far an attempt has come, in the journal."""

    ACTIVATING = "activating"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling-back"


class Part(NamedTuple):
    """A stretch of a release's archive: a large file, or what lies between two. `size` in bytes."""

    sha256: str
    size: int


class Current(NamedTuple):
    """`current.json`: the release that a host is to run. `size` in bytes, `revision`: a line for a person.

    `parts`, one after the other, are the archive; there are none when it has no large file. A host that has one
    of them already needs only the others. `commit` is the one that made it. `vow`: what an administrator vouches for;
    `signed` is what one vouched for before 1.2.
    `signer`, the fingerprint of the key, and `again` are not in the file: verify() finds them out.
    """

    host: str
    release: str
    size: int
    published: str
    system: str | None = None
    parts: tuple[Part, ...] = ()
    revision: str | None = None
    signed: str | None = None
    commit: str | None = None
    vow: Vow | None = None
    signer: str | None = None
    again: int = 0


class Vow(NamedTuple):
    """What is signed of a host's release: a `text` for the whole fleet, its `signature`, the host's `leaf`, and the `path`
    from there to the text's root: on which side its neighbour stands, and the neighbour's hash."""

    text: str
    signature: str
    leaf: str
    path: tuple[str, ...] = ()


class Signed(NamedTuple):
    """The text that an administrator signs. `fleet`: which one, at random. `root`: of the Merkle tree over all hosts' leaves.

    `serial`: seconds since 1970, and always higher than the one before. `revoked`: fingerprints of signers who count no more.
    """

    fleet: str
    serial: int
    expires: str
    root: str
    revoked: tuple[str, ...] = ()


class Leaf(NamedTuple):
    """What is signed of one host. `system`: what the release builds to, if that was known. `again` counts how often this
    state was said to be meant. `unsign`: the new system may trust whom it likes, or nobody."""

    host: str
    release: str
    size: int
    system: str | None
    commit: str | None
    again: int = 0
    unsign: bool = False


class Recipe(NamedTuple):
    """`bento.json`: how a release is built for a host. Both sides read it, so that they build the same.

    `attribute` of the flake, or of `file`; `directory` below the tree, with the entry file; `options` for nixos-rebuild.
    """

    attribute: str
    directory: str = ""
    options: tuple[str, ...] = ()
    file: str = ""


class Last(NamedTuple):
    """How one attempt at a release ended. `release` is None when `current.json` itself could not be used."""

    release: str | None
    result: str
    reason: str
    system: str | None
    started: str
    finished: str
    attempt: int
    log: str
    revision: str | None = None


class Report(NamedTuple):
    """`logs/status.json`: what a host says of itself. `revision` is that of `release`.

    `waiting_for_boot`: the release that the next boot is to start. `boot_trial`: how this machine's boot loader tries a
    system that has never booted. `known_to_boot`: the system that it falls back to. `first_contact`: when a server's key
    was last taken on trust. `machine` tells this machine from others.
    `since`: when the phase began. `interval`, of polls, and `offline_after`, both in seconds: when to worry about this
    machine's silence. `reboot`: the setting of that name, unless it is `never`.
    """

    host: str
    client: str
    polled: str
    phase: str
    release: str | None
    system: str
    needs_reboot: bool
    last: Last | None
    revision: str | None = None
    failed_units: tuple[str, ...] = ()
    waiting_for_boot: str | None = None
    paused_until: str | None = None
    boot_trial: str | None = None
    known_to_boot: str | None = None
    signer: str | None = None
    expires: str | None = None
    first_contact: str | None = None
    machine: str | None = None
    since: str | None = None
    interval: int | None = None
    offline_after: int | None = None
    reboot: str | None = None


class Pinned(NamedTuple):
    """Whom this machine trusts, whatever system runs: the `signers`, public keys, of the release with the highest serial
    that it has committed, but for those that were `revoked`. `fleet`, and the `text` and `leaf` that were last accepted,
    and whose they were. `cache_key`: of whom Nix takes what was built elsewhere."""

    signers: tuple[str, ...]
    revoked: tuple[str, ...] = ()
    cache_key: str = ""
    fleet: str = ""
    signer: str | None = None
    text: str = ""
    leaf: str = ""


class State(NamedTuple):
    """`state.json`. `system`: the boot default that Bento made, `release` and `revision` are its; `previous`: what ran
    before. `good`: the last system that a boot has proven.

    While `system` is not `good`, it waits for its first boot, since the boot with the id `boot`. `armed`: the boot loader
    has variables of ours; `set_before` is what a person had in them; `forgets`: they were gone after the last boot that
    they were there for; `once`: the entry that it was told to start once, as long as it may have done so; `slept`: that of
    what a hibernation is to wake. `lost`: the boot in which this file was gone, and a trial was not.
    `unpacked` is the release in config/, `tried` the last attempt at a release (`last` may be a later failure to
    read `current.json`), `not_before` when the next one may begin, `doubts` how many verdicts there are against that release;
    `published` its publication, `rebooted` the system that a reboot was last asked for. `down_units`: what was active before
    an attempt, and was not after the way back. `serials`: the highest ones that were seen, each behind the fingerprint of its
    signer, which a client before 1.2 heeds, too.
    """

    release: str | None = None
    system: str | None = None
    revision: str | None = None
    previous: str | None = None
    previous_release: str | None = None
    previous_revision: str | None = None
    good: str | None = None
    good_release: str | None = None
    good_revision: str | None = None
    boot: str | None = None
    armed: bool = False
    set_before: str = ""
    forgets: bool = False
    once: str = ""
    slept: str = ""
    lost: str = ""
    published: str | None = None
    unpacked: str | None = None
    rebooted: str | None = None
    not_before: str | None = None
    doubts: int = 0
    failed_units: tuple[str, ...] = ()
    down_units: tuple[str, ...] = ()
    tried: Last | None = None
    last: Last | None = None
    serials: tuple[str, ...] = ()
    pinned: Pinned | None = None


class Pending(NamedTuple):
    """`pending.json`, the journal. Where to go back to: `old` is what ran, `profile` what would have been booted.

    `switched`: the running system may be the new one, or something in between. `committed`: so may be the boot default.
    `between`: what an earlier way back that failed has left running. `verdict` and `reason`: how it ends, once it goes
    back. `deadline_s`: until when, on the monotonic clock of the boot `deadline_boot`;
    `rebooting`: the boot in which a reboot back was asked for. `trial`: it is about what was deployed
    before, not about the release that is published now. `job`: the newest one in systemd's queue before the switch.
    """

    release: str
    published: str
    old: str
    new: str
    profile: str
    step: str
    boot_id: str
    token: str
    started: str
    attempt: int
    deadline_s: float = 0.0
    deadline_boot: str = ""
    watchdog: str | None = None
    verdict: str = ""
    reason: str = ""
    revision: str | None = None
    switched: bool = False
    committed: bool = False
    by_hand: bool = False
    trial: bool = False
    doubt: bool = True  # for 1.1, which would give the release up on one verdict
    rebooting: str = ""
    between: str = ""
    job: int | None = None


class Pause(NamedTuple):
    """`pause.json`. In the boot with the id `boot`, it ends when CLOCK_BOOTTIME says `end_s`."""

    since: str
    until: str
    boot: str
    end_s: float


class Settings(NamedTuple):
    """The client's settings: flags over the JSON file over these defaults. Times in seconds."""

    server: tuple[str, ...] = ()
    port: int = 22
    host: str = ""
    user: str = ""
    identity: str = ""
    known_hosts: str = ""
    signers: str = ""
    cache_key: str = ""
    state_dir: str = "/var/lib/bento"
    root: str = "/"
    ssh_options: tuple[str, ...] = ()
    connect_timeout: int = 20
    build_timeout: int = 12 * 3600
    activation_timeout: int = 600
    confirm_timeout: int = 120
    health_checks: tuple[str, ...] = ()
    upgrade_channels: bool = False
    allow_options: tuple[str, ...] = ()
    activation: str = "live"
    rebuild_every: int = 0
    after_deployment: tuple[str, ...] = ()
    reboot: str = "never"
    reboot_without_trial: bool = False
    build: str = "host"
    interval: int = 900
    offline_after: int = 0
    boot_loader: tuple[str, ...] = ()
    asks: bool = False
    esp: str = ""

    @property
    def state(self) -> Path:
        return Path(self.state_dir)

    @property
    def identity_file(self) -> Path:
        return Path(self.identity) if self.identity else self.state / "id_ed25519"

    def system_path(self, path: str) -> Path:
        return Path(self.root) / path.lstrip("/")


# --- names and times ---


def format_time(when_s: float) -> str:
    return datetime.fromtimestamp(when_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> float:
    """Seconds since 1970. ValueError for what is no time."""
    if not TIME.fullmatch(text):
        raise ValueError(f"not a time: {text!r}")
    return datetime.fromisoformat(text).timestamp()


def log_name(finished_s: float, release: str | None, result: str) -> str:
    stamp = datetime.fromtimestamp(finished_s, UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"{stamp}_{(release or NO_RELEASE)[:12]}_{result}.log"


def one_line(text: str, limit: int = 300) -> str:
    """`text` as one line without control characters: fit for a report, a terminal, a page."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def duration(seconds: float) -> str:
    """Two digits and a unit, as short as a table wants it: 45s, 12min, 3h, 9d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


# --- formats ---

LINE = re.compile(r"[^\x00-\x1f\x7f]{0,400}")
# What a field holds, by its name, and by its record's too where that differs. One that may be null says so in its type.
FIELDS: dict[str, type | re.Pattern[str]] = {
    "host": HOST_NAME, "release": RELEASE_ID, "previous_release": RELEASE_ID, "good_release": RELEASE_ID,
    "waiting_for_boot": RELEASE_ID, "unpacked": RELEASE_ID, "sha256": RELEASE_ID, "system": STORE_PATH,
    "previous": STORE_PATH, "good": STORE_PATH, "rebooted": STORE_PATH, "old": STORE_PATH, "new": STORE_PATH,
    "profile": STORE_PATH, "published": TIME, "polled": TIME, "started": TIME, "finished": TIME, "paused_until": TIME,
    "log": LOG_NAME, "result": re.compile(r"[a-z-]{1,40}"), "phase": re.compile(r"[a-z-]{1,40}"),
    "client": re.compile(r"[!-~]{1,40}"), "step": re.compile("|".join(Step)), "last": dict, "tried": dict,
    "verdict": re.compile("|".join(("", *Result))), "Last.reason": TEXT, "Report.system": re.compile(r"[ -~]{0,400}"),
    "boot_trial": LINE, "known_to_boot": LINE, "signer": FINGERPRINT, "expires": TIME, "first_contact": TIME,
    "vow": dict, "pinned": dict, "commit": COMMIT, "root": RELEASE_ID, "fleet": FLEET_ID, "Pinned.fleet": LINE,
    "since": TIME, "until": TIME, "not_before": TIME, "machine": re.compile(r"[0-9a-f]{16}"),
    "Report.reboot": re.compile(r"[a-z0-9:-]{1,20}"),
}  # fmt: skip
SIMPLE: dict[str, type] = {"str": str, "int": int, "bool": bool, "float": float}
Record = TypeVar(
    "Record", "Current", "Vow", "Signed", "Leaf", "Part", "Last", "Report", "State", "Pinned", "Pending", "Pause"
)


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object of one of Bento's files. BentoError for anything else, and for a newer format."""
    if len(raw) > MAX_JSON_BYTES:
        raise BentoError(f"{what}: larger than {MAX_JSON_BYTES} bytes")
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BentoError(f"{what}: not JSON ({one_line(str(error), 80)})") from None
    if not isinstance(data, dict):
        raise BentoError(f"{what}: not a JSON object")
    if data.get("format") != FORMAT or isinstance(data["format"], bool):
        raise BentoError(
            f"{what}: format {one_line(repr(data.get('format')), 20)}, this version of Bento knows format {FORMAT}:"
            " update Bento on this machine"
        )
    return data


def take(data: Mapping[str, Any], name: str, kind: type | re.Pattern[str], what: str, *, null: bool = False) -> Any:
    """A field of a parsed object, of the type or pattern wanted."""
    value = data.get(name)
    if value is None and null:
        return None
    if isinstance(kind, re.Pattern):
        good = isinstance(value, str) and kind.fullmatch(value) is not None
    elif kind is int:
        good = type(value) is int and 0 <= value < 1 << 53
    else:
        good = isinstance(value, kind)
    if good and kind is TIME:
        try:
            parse_time(str(value))
        except ValueError:
            good = False
    if not good:
        raise BentoError(f"{what}: field {name!r} is missing or malformed")
    return value


def read_record(kind: type[Record], data: Mapping[str, Any], what: str) -> Record:
    """A record from a JSON object. What is unknown is ignored; BentoError names the first field that is wrong."""
    values: dict[str, Any] = {}
    defaults = kind._field_defaults
    for name, annotation in kind.__annotations__.items():
        text: str = annotation.__forward_arg__
        if name in defaults and data.get(name) is None:
            continue
        if name.endswith("revision"):
            # Whatever it was, it is harmless in a table and an environment.
            values[name] = one_line(take(data, name, str, what), 200) or None
        elif text.startswith("tuple[Part"):
            values[name] = tuple(
                read_record(Part, as_object(part, name, what), what) for part in take(data, name, list, what)
            )
        elif text.startswith("tuple"):
            most, limit = (1000, 2000) if kind is Pinned else (100, 200)
            values[name] = tuple(one_line(str(each), limit) for each in take(data, name, list, what)[:most])
        else:
            wanted = FIELDS.get(f"{kind.__name__}.{name}") or FIELDS.get(name) or SIMPLE[text.split(" ")[0]]
            value = take(data, name, wanted, what, null="None" in text)
            values[name] = read_inner(name, value, what) if isinstance(value, dict) else value
    return kind(**values)


def read_inner(name: str, value: dict[str, Any], what: str) -> Vow | Pinned | Last:
    if name == "vow":
        return read_record(Vow, value, what)
    return read_record(Pinned, value, what) if name == "pinned" else read_record(Last, value, what)


def as_object(value: object, name: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BentoError(f"{what}: field {name!r} is malformed")
    return value


def parse_current(raw: bytes, what: str, host: str | None = None) -> Current:
    current = read_record(Current, parse_object(raw, what) | {"signer": None, "again": None}, what)
    if current.parts and sum(part.size for part in current.parts) != current.size:
        raise BentoError(f"{what}: its parts do not add up to its size")
    if host is not None and current.host != host:
        raise BentoError(f"{what}: it is for host {current.host!r}, not for {host!r}")
    return current


def parse_report(raw: bytes, what: str) -> Report:
    return read_record(Report, parse_object(raw, what), what)


def parse_state(raw: bytes, what: str) -> State:
    return read_record(State, parse_object(raw, what), what)


def parse_pending(raw: bytes, what: str) -> Pending:
    return read_record(Pending, parse_object(raw, what), what)


def parse_pause(raw: bytes, what: str) -> Pause:
    return read_record(Pause, parse_object(raw, what), what)


def parse_recipe(raw: bytes, what: str, host: str) -> Recipe:
    """What `bento.json` says for one host: its own part in `hosts` comes before what is for all."""
    data = parse_object(raw, what)
    own = (take(data, "hosts", dict, what, null=True) or {}).get(host, {})
    if not isinstance(own, dict):
        raise BentoError(f"{what}: field 'hosts' is malformed")
    data |= own
    options = take(data, "options", list, what, null=True) or []
    if not all(isinstance(option, str) and option and option.isprintable() for option in options):
        raise BentoError(f"{what}: field 'options' is malformed: it is a list of words for nixos-rebuild")
    directory = (take(data, "directory", DIRECTORY, what, null=True) or "").rstrip("/")
    attribute = take(data, "attribute", ATTRIBUTE, what, null=True) or host
    file = take(data, "file", FILE, what, null=True) or ""
    return Recipe(attribute, "" if directory == "." else directory, tuple(options), file)


# Of nixos-rebuild's options those that run nothing and read nothing, each with what may follow it.
HARMLESS = dict.fromkeys(
    ("-L", "--print-build-logs", "--show-trace", "-v", "--verbose", "--quiet", "-Q", "--no-build-output", "-k", "--keep-going",
     "--fallback", "--refresh"), ""
) | dict.fromkeys(("-j", "--max-jobs", "--cores"), "[0-9]{1,4}|auto") | {"--log-format": "[a-z-]{1,30}"}  # fmt: skip


def check_options(recipe: Recipe, allowed: Collection[str], setting: str) -> None:
    """BentoError for an option that could run a program as root, unless this machine's `setting` allows it."""
    words = list(recipe.options)
    while words:
        word = words.pop(0)
        if value := HARMLESS.get(word):
            word = f"{word} {words.pop(0) if words else ''}".strip()
            if re.fullmatch(rf"\S+ ({value})", word):
                continue
        elif word in HARMLESS or word in allowed:
            continue
        raise BentoError(
            f"bento.json: the option {one_line(word, 80)} is not one of the harmless ones: it may run a program as root,"
            f" and {setting} has to allow each word of it first"
        )


def plain(value: Any) -> Any:
    """A record, and those in it, as JSON has them."""
    if hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


# Not written while there is nothing in them: a file stays as it was before there were such fields.
OPTIONAL = (
    "parts", "signed", "commit", "vow", "signer", "again", "expires", "serials", "pinned", "first_contact", "machine",
    "since", "interval", "offline_after", "reboot",
)  # fmt: skip


def encode(record: Current | Report | State | Pending | Pause) -> bytes:
    data = {"format": FORMAT} | plain(record)
    for name in OPTIONAL:
        if not data.get(name, True):
            del data[name]
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


# --- settings ---

DEFAULT_CONFIG = "/etc/bento/client.json"
REBOOT_WINDOW = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]")
# The settings that are one of a few words.
FORMS = {
    "reboot": (re.compile(f"never|when-needed|{REBOOT_WINDOW.pattern}"), "'never', 'when-needed' or 'HH:MM-HH:MM'"),
    "activation": (re.compile("live|boot"), "'live' or 'boot'"),
    "build": (re.compile("host|server"), "'host' or 'server'"),
}
SERVER_NAME = re.compile(r"[A-Za-z0-9:\[][A-Za-z0-9._:%\[\]-]*")


def make_settings(values: Mapping[str, Any], what: str) -> Settings:
    """Settings from the JSON file and the flags together. UsageError names the first one that cannot work."""
    defaults = Settings()
    known = defaults._asdict()
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known or value is None:
            continue  # a newer bento.nix may know more settings than this client
        kind = type(known[name])
        if name == "server" and isinstance(value, str):
            value = [value]
        if kind is tuple:
            good = isinstance(value, list) and all(isinstance(v, str) and "\0" not in v for v in value)
            value = tuple(value) if good else value
        elif kind is int:
            good = type(value) is int and value > 0
        else:
            good = isinstance(value, kind)
        if not good:
            raise UsageError(f"{what}: setting {name!r} cannot be {one_line(repr(value), 60)}")
        chosen[name] = value
    settings = defaults._replace(**chosen)
    if not HOST_NAME.fullmatch(settings.host):
        raise UsageError(f"{what}: setting 'host' must be this machine's name in the fleet, not {settings.host!r}")
    for server in settings.server:
        if not SERVER_NAME.fullmatch(server) or server.count(":") == 1:
            raise UsageError(f"{what}: setting 'server' cannot be {server!r}: a name or an address, the port in 'port'")
    for name, (form, words) in FORMS.items():
        if not form.fullmatch(getattr(settings, name)):
            raise UsageError(f"{what}: setting {name!r} is {words}, not {getattr(settings, name)!r}")
    if not settings.user:
        settings = settings._replace(user=f"bento-{settings.host}")
    elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", settings.user):
        raise UsageError(f"{what}: setting 'user' cannot be {settings.user!r}")
    # One absolute spelling: sftp, Nix and the watchdog run in other directories than we do.
    given = {name: getattr(settings, name) for name in ("identity", "known_hosts", "signers", "state_dir", "root")}
    return settings._replace(**{name: os.path.abspath(path) for name, path in given.items() if path})


def settings_argv(settings: Settings) -> list[str]:
    """The flags that give these settings again: the watchdog must not read a file that an activation changes."""
    argv = ["--config", os.devnull]
    for name, value in settings._asdict().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv += [flag] if value else []
        elif isinstance(value, tuple):
            argv += [f"{flag}={item}" for item in value]
        elif value:
            argv += [f"{flag}={value}"]
    return argv


# --- decisions ---


def pause_s(result: str, cost: Cost, state: State) -> float:
    """How long to wait after an attempt that ended so. `state`: what is remembered of the attempts before at this release.

    A failed build is tried once more at the next poll: rate limits, a daemon that was restarted. Pauses grow after that.
    """
    tried, before_s = state.tried, 0.0
    same = tried is not None and tried.result == result
    if tried is not None and same and state.not_before is not None:
        before_s = parse_time(state.not_before) - parse_time(tried.finished)
    if cost in (Cost.VERDICT, Cost.GIVEN_UP):
        return 0.0 if result == Result.INTERRUPTED else LONGEST_PAUSE_S
    if cost == Cost.POLL or (result == Result.BUILD_FAILED and not same):
        return 0.0
    return min(max(FIRST_PAUSE_S, 2 * before_s), LONGEST_PAUSE_S)


def left_s(state: State, now_s: float) -> float:
    """How long an attempt has to wait still. A wait that is longer than the longest pause does not count: the clock was set
    back."""
    wait_s = parse_time(state.not_before) - now_s if state.not_before else 0.0
    return wait_s if 0 < wait_s <= LONGEST_PAUSE_S else 0.0


def is_given_up(state: State, published: str) -> bool:
    """Whether what was tried last is not to be tried again."""
    return state.doubts >= MOST_VERDICTS and not is_meant_again(state, published)


def is_meant_again(state: State, published: str) -> bool:
    """Whether somebody has published anew what was tried: `populate --again`. Of a signed release `published` says nothing."""
    return state.pinned is None and state.published is not None and published > state.published


def is_due_again(state: State, now_s: float, rebuild_s: int) -> bool:
    """Whether what was last tried is deployed, and to be built anew, with what the channels have by now: `rebuild_s` seconds
    after the last time, or never. That such a build failed, or what it gave, is no reason to give the release up."""
    tried = state.tried
    if not rebuild_s or tried is None or tried.release != state.release or left_s(state, now_s):
        return False
    # Far in the future: the clock was set back.
    return not -LONGEST_PAUSE_S < now_s - parse_time(tried.finished) < rebuild_s


def decide(
    current: Current, state: State, now_s: float, *, force: bool = False, rebuild_s: int = 0
) -> tuple[bool, str]:
    """Whether `current` is to be deployed now, and why, or why not, in words for a person."""
    tried, release = state.tried, f"release {current.release[:12]}"
    if is_behind(current, state.published, now_s) and not force:
        return False, f"the server is behind: it publishes a release of {current.published}"
    if tried is None or tried.release != current.release:
        return True, f"new {release}"
    if force:
        return True, f"{release}, by force"
    if is_due_again(state, now_s, rebuild_s):
        return True, f"{release}: built again, every {duration(rebuild_s)}"
    if tried.result == Result.OK:
        return False, f"up to date with {release}"
    if is_meant_again(state, current.published):
        return True, f"{release}: {tried.result} before, published again"
    back = tried.result in (Result.ROLLED_BACK, Result.ROLLBACK_FAILED)
    ended = f"{release} was rolled back ({tried.reason})" if back else f"{release}: {tried.result}"
    if state.doubts >= MOST_VERDICTS:
        return False, f"{ended}: waiting for a new release, or 'bento.py populate --again'"
    if wait_s := left_s(state, now_s):
        return False, f"{ended}, next attempt in {duration(wait_s)}"
    return True, f"{release}: {tried.result} before, attempt {tried.attempt + 1}"


def is_ahead(published: str, now_s: float) -> bool:
    """Whether a publication lies further ahead than clocks differ: it would hold all other servers' back."""
    return parse_time(published) > now_s + CLOCKS_DIFFER_S


def age(current: Current, now_s: float) -> tuple[int, str]:
    """To compare releases, the newer is the higher: by its serial where it is signed, else by its publication, unless that
    is in the future."""
    if current.signer is not None and current.vow is not None:
        return parse_signed(current.vow.text, "signed text").serial, ""
    return int(not is_ahead(current.published, now_s)), current.published


def is_behind(current: Current, seen: str | None, now_s: float) -> bool:
    """Whether a server publishes less than was seen. Signed releases have their serials for that."""
    return current.signer is None and seen is not None and not is_ahead(seen, now_s) and current.published < seen


def may_reboot(setting: str, hour: int, minute: int) -> bool:
    """Whether the setting `reboot` allows one at this local time. A window may cross midnight."""
    if not REBOOT_WINDOW.fullmatch(setting):
        return setting == "when-needed"
    (first, last), now = setting.split("-"), f"{hour:02}:{minute:02}"
    return first <= now < last if first <= last else now >= first or now < last


class Switched(StrEnum):
    """What came of `switch-to-configuration test`."""

    LIVE = "live"
    REFUSED = "refused"  # nothing was done, and it may be otherwise another time
    NEEDS_BOOT = "needs a boot"
    BROKEN = "broke in the middle"  # of the bus, logind, somebody's session
    FAILED = "failed"


def judge_switch(switch: Switch) -> Switched:
    """By what it did: its exit code may be 4 for an activation that gave up, or 1 for what is nobody's fault."""
    code, output = switch.done
    if not switch.began:
        blocked = code == 100 or "Pre-switch check 'switchInhibitors' failed" in output
        return Switched.NEEDS_BOOT if blocked else Switched.REFUSED
    if switch.finished and SCRIPT_FAILED not in output:
        return Switched.LIVE
    return Switched.FAILED if code in (None, 0, 2, 4) or failed_units(output) else Switched.BROKEN


SSH_FAILURES = [
    (r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED", False,
     "its host key is not the known one: if the server was renewed, correct the known hosts, else somebody is in between"),
    (r"Permission denied \(|Too many authentication failures", False,
     "it refuses this machine's key: give the output of 'bento-client key' to the fleet's administrator"),
    (r"Could not resolve hostname", True, "its name cannot be resolved"),
    (r"[Cc]onnection refused", True, "connection refused: is sshd running there, on this port?"),
    (r"timed out|Timeout", True, "no answer in time"),
    (r"No route to host|Network is unreachable", True, "no route to it: is the network up?"),
    (r"Bad configuration option|command-line line|unsupported option", False, "ssh refuses an option: look at the setting 'ssh_options'"),
    (r"Unable to negotiate with|no matching (key exchange|host key|cipher|MAC)", False,
     "it and this machine have no algorithm in common: look at the setting 'ssh_options', and at its sshd_config"),
    (r"[Cc]onnection (closed|reset)|Broken pipe|not responding|banner exchange", True, "the connection was lost"),
]  # fmt: skip


# So many of ssh's last lines count: what stands above them may be the server's banner, which can say anything.
LAST_LINES = 6


def explain_ssh(output: str) -> tuple[str, bool]:
    """What ssh's words mean, and whether the failure may pass by itself. Its last ones say most, but for sftp's own."""
    said = [one_line(line) for line in output.splitlines() if line.strip() and not line.startswith("sftp> ")]
    last = sorted(said[: -LAST_LINES - 1 : -1], key=lambda line: line.rstrip(".") == "Connection closed")
    if any(line.endswith("closed by UNKNOWN port 65535") for line in last):
        return explain_proxy([line for line in reversed(last) if not re.search(BY_PROXY, line)])
    for line in last:
        for pattern, passing, meaning in SSH_FAILURES:
            if re.search(pattern, line):
                where = re.search(r"Offending \S+ key in (\S+)", " ".join(said))
                words = f"{meaning}: look at {where[1]}" if where and not passing else meaning
                return f"{words} ({line.removeprefix('ssh: ')})", passing
    return (said[-1] if said else "sftp ended without a word"), True


# What ssh itself says when a ProxyCommand or a ProxyJump ends.
BY_PROXY = r"^(Connection closed\.?|kex_exchange_identification: .*|.* closed by UNKNOWN port 65535)$"


def explain_proxy(said: Sequence[str]) -> tuple[str, bool]:
    """What the way to the server says, when that fails: nothing is known of the server then."""
    for line in said:
        if unknown := re.search(r"No \S+ host key is known for (\S+)", line):
            return f"the jump host {unknown[1]} is not known here: add its key to the known hosts", False
    return f"the proxy or jump host failed: {' | '.join(said[-2:]) or 'without a word'}", True


# Not compiled: only a failure needs these.
BY_BENTO = r"[0-9TZ:-]{20} bento: "
# What only says that something above it failed.
CONSEQUENCES = (
    r"(?i:error: (\d+ dependenc|some (substitutes|outputs)|build of|cannot build .*nixos-system-|Command '\[)"
    r"|.*returned non-zero exit status|.*Pre-switch checks? .*failed|warning: |.*dependency failed|.*For full logs)"
)
# Of Git and ssh, for an input that is not everybody's. They say it first; what Nix says then is what it made of it.
PRIVATE = r"ssh: |fatal: (?!not a git repo|.*from remote repo|Refusing)|.*Permission denied \(|.*Host key verification"
BUILDER = r"(?i:error: (builder for|cannot build) ')"
OF_NIX = r"error: (unable to download|hash mismatch)"
# Nix at work, among the lines of builders.
PROGRESS = r"building '|copying |downloading |these \d|this derivation|\s*/nix/store/|error:|warning:|[…|]|\d+ *\|"
STORE_NAME = r"(?<![^'\s])/nix/store/[a-z0-9]{32}-([^'\s]+?)(?:\.drv)?(?=['\s]|$)"
# What a later poll may find better, of what Nix, Git and ssh say. A file that is not there (404) it will not.
AWAY = re.compile(
    r"(?i:unable to download (?!.*HTTP error 4)|HTTP error (403|429)|returned error: (429|5..)|API rate limit"
    r"|(could(n't| not)|failed to) (connect|resolve|start SSH)|connection (refused|reset|timed out|closed)|No route to host"
    r"|name resolution|network is unreachable|cannot connect to socket|find a machine for remote build"
    r"|Unrecognized archive|NAR info file .* is corrupt|hash mismatch importing)"
)
# ... and for which a build was spent, by a daemon that was restarted, or for want of memory or room.
SPENT = re.compile(
    r"(?i:unexpected end-of-file|disconnected unexpectedly|interrupted by the user|database is busy|No space left"
    r"|failed with exit code 137|due to signal 9)"
)
OF_A_FETCHER = re.compile(
    r"> (curl: \((6|7|28|35|52|56)\)|curl: .* returned error: (429|5..)|.*No space left on device)"
)


def bad_moment(output: str) -> str:
    """What a build that failed for a passing reason has cost; "" for what is the release's fault."""
    said = [line.strip() for line in output.splitlines() if not re.match(r"\s*warning:", line)]
    builders = [line for line in said if line.startswith(">")]
    others = [line for line in said if re.match("error:|fatal:|ssh:|kex_|cannot build on|Failed to find", line)]
    if any(map(AWAY.search, others)) or any(OF_A_FETCHER.match(line) and "No space" not in line for line in builders):
        return Cost.POLL
    return Cost.WORK if any(map(SPENT.search, others)) or any(map(OF_A_FETCHER.match, builders)) else ""


def find_cause(output: str) -> str:
    """Why a program failed, as a person would name it: the first error that does not follow from another."""
    lines = [line.strip()[:MAX_LINE] for line in re.sub("\x1b\\[[0-9;]*m", "", output).splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if line.startswith("error:") and line != "error:"]
    errors = [n for n in errors if not re.match(CONSEQUENCES, lines[n])]
    builders = [n for n in errors if re.match(BUILDER, lines[n])]
    if builders:  # what their own logs call errors is not Nix's
        errors = [n for n in errors if n < builders[0] and re.match(OF_NIX, lines[n])] + builders
    for number, line in enumerate(lines):
        if line.endswith("Failed assertions:"):
            return one_line(" ".join(each for each in lines[number + 1 :] if not re.match(CONSEQUENCES, each)))
        if snippet := re.match("Activation script snippet '(.*)' failed", line):
            return one_line(f"activation script {snippet[1]}: {lines[number - 1] if number else line}")
        if re.match(PRIVATE, line) and not builders:
            return one_line(line)
        if number in errors[:1]:
            return one_line(
                re.sub(
                    STORE_NAME,
                    r"\1",
                    " ".join((line, *details(lines[number + 1 : number + 3]), builder_words(lines, number))),
                )
            )
    plain = [line for line in lines if not re.match(CONSEQUENCES, line)]
    return one_line((plain or lines or ["no output"])[-1])


# So much of a line of what programs say is looked at: whoever writes it may have made it to be slow to read.
MAX_LINE = 2000
NOT_FETCHED = (
    r"(?:warning: |error: )*(.*(?:not signed by any|lacks a .*signature|unable to download|ssh: |Permission denied"
    r"|Host key verification).*)"
)


def why_not_fetched(output: str) -> str:
    """Why Nix could not fetch a path: what it says of a substituter last. Its errors do not tell, its warnings do."""
    said = [match[1] for line in output.splitlines() if (match := re.match(NOT_FETCHED, line.strip()[:MAX_LINE]))]
    missing = "no substituter has it, or what it needs" if "don't know how to build" in output else find_cause(output)
    return one_line(said[-1]) if said else missing


def details(more: Sequence[str]) -> list[str]:
    """What belongs to an error, and stands in the lines below it."""
    return [line for line in more if re.match(r"Reason: |specified: |got: |at /\S+:\d+:\d+|- In `", line)]


def builder_words(lines: Sequence[str], number: int) -> str:
    """The last line of a builder's own log. Nix shows it with > in front below the error that names the package, else
    above that as it came."""
    if not re.match(BUILDER, lines[number]):
        return ""
    said = []
    for line in lines[number + 1 :]:
        if line.startswith("error:"):
            break
        if line.startswith("> "):
            said.append(line[2:].strip())
    said = said or [line for line in lines[:number] if not re.match(PROGRESS, line)]
    return f"({said[-1]})" if said else ""


# What switch-to-configuration says on its way, whatever comes of it.
OF_A_SWITCH = (
    r"(stopping|starting|restarting|reloading|activating|setting up|NOT restarting|the following new units|WARN)\b.*"
)
SCRIPT_FAILED = "Failed to run activate script"


def failed_units(output: str) -> list[str]:
    """The units that switch-to-configuration names as failed, from its output."""
    found = re.findall(r"the following (?:units|user units) failed: (.*)", output)
    jobs = re.findall(r"(?m)^Failed to (?:start|stop|restart|reload) (?:user unit )?([^\s:]+\.[a-z]+)(?:$|:)", output)
    return sorted({unit.strip() for line in found for unit in line.split(",") if unit.strip()} | {*jobs})


def switch_words(output: str) -> str:
    """What stopped a switch, by name: a check, an activation script, units, else its last error; else how far it came."""
    if checks := re.findall(r"Pre-switch check '(.+?)' failed", output):
        own = output.partition("Pre-switch check '")[0].strip().split("\n")[-1].strip()
        return one_line(f"pre-switch check refuses: {', '.join(map(repr, checks))}" + (f" ({own})" if own else ""))
    said = [line.strip() for line in output.splitlines() if line.strip()]
    lines = [line for line in said if not re.fullmatch(OF_A_SWITCH, line)] or said[-1:]
    if SCRIPT_FAILED in lines:
        return find_cause("\n".join(lines[: lines.index(SCRIPT_FAILED)] or [SCRIPT_FAILED]))
    for number, line in enumerate(lines):
        if line.startswith(("Error: ", "Unable to ")):
            causes = [each for each in lines[number + 1 :] if each != "Caused by:"]
            return one_line(": ".join((line.removeprefix("Error: "), *causes)))
    units = failed_units(output)
    return f"failed: {', '.join(units)}" if units else find_cause("\n".join(lines))


# --- files ---


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces `path` so that a reader, or a power cut, sees the old content or the new, whole."""
    # A name that nobody can have made a link of, and that is cleared away if we are killed.
    aside = path.with_name(f".tmp-{os.getpid()}-{os.urandom(6).hex()}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.rename(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()  # on a full disk, the first thing that is needed is room
        error.filename, error.filename2 = str(path), None  # a person knows nothing of our other name for it
        raise
    sync_directory(path.parent)


def replace_link(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target`, in place of whatever was there but a directory. At no moment is there no
    link."""
    aside = link.with_name(f".{link.name}.new")
    remove(aside)
    aside.symlink_to(target)
    os.rename(aside, link)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or a tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Removes a directory, however deep it is and whoever changes it meanwhile: what lies two levels down is moved up
    before its directory goes, by descriptors, and no link is followed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    top = os.open(path, flags)
    try:
        while names := os.listdir(top):
            for name in names:
                if unlink(name, top):
                    continue
                inner = os.open(name, flags, dir_fd=top)
                try:
                    for deeper in os.listdir(inner):
                        if not unlink(deeper, inner):
                            os.rename(deeper, f".removed-{os.urandom(8).hex()}", src_dir_fd=inner, dst_dir_fd=top)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path)


def unlink(name: str, directory: int) -> bool:
    """Removes what is no directory; False when it is one."""
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        return False
    return True


def size_of(path: Path | None) -> int:
    """In bytes; 0 where there is nothing."""
    try:
        return path.stat().st_size if path is not None else 0
    except FileNotFoundError:
        return 0


def free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def read_journal(path: Path, parse: Callable[[bytes, str], T], log: Log) -> T | None:
    """One of our own files, or None. A damaged one is set aside, said, and never stops a machine from updating."""
    try:
        return parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except BentoError as error:
        log.say(f"{error}; set aside as {path.name}.damaged")
        os.replace(path, path.with_name(path.name + ".damaged"))
        return None


@contextmanager
def scratch(settings: Settings) -> Iterator[str]:
    """A directory of this process in the state directory, as sftp sees it: relative, nothing to quote.

    On a full disk it is in /run: a machine must find its way back then, too.
    """
    name = f".tmp-{os.getpid()}-{os.urandom(3).hex()}"  # a probe in the middle of a run has one of its own
    try:
        settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (settings.state / name).mkdir(mode=0o700)
    except OSError:
        name = str(settings.system_path(f"/run/bento{name}"))
        os.mkdir(name, 0o700)
    try:
        yield name
    finally:
        remove(settings.state / name)


def name_holder(settings: Settings, text: str, contact: str = "") -> None:
    """Writes into the lock file who holds it, and below that the last contact with a server: over what is there, for which
    there is room on a full disk, too."""
    with suppress(OSError), open(settings.state / "lock", "r+") as file:
        contact = contact or file.read().partition("\n")[2].strip()
        file.seek(0)
        file.write(f"{text}\n{contact}\n" if contact else f"{text}\n")
        file.truncate()


@contextmanager
def lock(settings: Settings) -> Iterator[bool]:
    """Whether we hold the machine's lock. It holds our process id, so that `rollback` can end a run that hangs."""
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(settings.state / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        name_holder(settings, str(os.getpid()))
        yield True


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock on a file, as the kernel says it: what is written in the file may be an older one's."""
    found = os.stat(path)
    where = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5] == where:
            return int(words[4])
    return None


# --- processes ---

verbose = False
# What `run` has started and not ended: to be ended with us, also when it was started in a thread.
children: set[subprocess.Popen[bytes]] = set()


class Done(NamedTuple):
    """How a process ended: `code` is None when it was ended at its time limit."""

    code: int | None
    output: str


def start(argv: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
    """Starts a program, never through a shell, in a process group of its own, to be ended with all that it has started."""
    if verbose:
        print(f"+ {shlex.join(argv)}", file=sys.stderr)
    return subprocess.Popen(argv, stderr=subprocess.STDOUT, start_new_session=True, **how)


def end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[bytes], limit_s: float | None) -> tuple[int | None, str]:
    """Its exit code, and what it said. No code: it did not end in time, and was ended."""
    children.add(process)
    try:
        raw, _ = process.communicate(timeout=limit_s)
        return process.returncode, (raw or b"").decode(errors="replace")
    except subprocess.TimeoutExpired:
        end_group(process)
        return None, ""
    except BaseException:
        end_group(process)
        raise
    finally:
        children.discard(process)


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    timeout: float | None = None,
    given: IO[bytes] | None = None,
    output: IO[bytes] | None = None,
    cwd: Path | None = None,
) -> Done:
    """Runs a program to its end, with its input from the file `given`, and its output kept, or in the file `output`.

    Its process group ends at the time limit (seconds), or when we are interrupted.
    """
    try:
        process = start(argv, stdin=given or subprocess.DEVNULL, stdout=output or subprocess.PIPE, cwd=cwd)
    except OSError as error:
        if check:
            raise BentoError(f"cannot run {argv[0]}: {error.strerror}; is it on PATH?") from None
        return Done(127, f"{argv[0]}: {error.strerror}")
    code, text = finish(process, timeout)
    if check and code != 0:
        how = f"did not end within {timeout:.0f} s" if code is None else f"exit {code}"
        said = one_line(" ".join(text.splitlines()[-3:]))
        raise BentoError(f"{shlex.join(argv)}: {how}" + (f": {said}" if said else ""))
    return Done(code, text)


def sync_disk(*paths: Path) -> None:
    """Flushes these file systems to disk, and if possible no others: one that hangs (a network's, a USB disk's) would keep
    us for ever."""
    if run(["sync", "--file-system", *map(str, paths)], check=False).code != 0:
        os.sync()


def until(limit_s: float, check: Callable[[], T | None]) -> T | None:
    """Repeats a check that says why it fails until it does not, or time is up."""
    give_up = time.monotonic() + limit_s
    while True:
        failure = check()
        if failure is None or time.monotonic() + 1 > give_up:
            return failure
        time.sleep(1)


def how_ended(code: int | None) -> str:
    return "no end in time" if code is None else f"exit {code}"


# --- log ---


class Log:
    """Says what happens on stderr (the journal) and, during a deployment, in the file that the server will get."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = path.exists()  # a deployment that was cut short left its log: go on in it

    def say(self, text: str) -> None:
        with suppress(OSError):
            print(f"bento: {text}", file=sys.stderr, flush=True)
        if self.kept:
            with suppress(OSError), open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{format_time(time.time())} bento: {text}\n")

    @contextmanager
    def output(self) -> Iterator[IO[bytes]]:
        """Where a program's output goes: a file, which no closed pipe can turn against it.

        On a full disk, nowhere: a switch that dies of an unwritable log would be worse than one without a log.
        """
        try:
            full = free_bytes(self.path.parent) < 1 << 20
            file = open(os.devnull if full else self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError:  # full in another way: without inodes, over a quota, or read-only
            file = open(os.devnull, "ab", buffering=0)  # noqa: SIM115
        with file:
            yield file

    def tail(self, limit: int = LOG_TAIL_BYTES) -> str:
        try:
            with open(self.path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def cause(self, find: Callable[[str], str] = find_cause) -> str:
        """Why what was last run failed, from what programs, not Bento, wrote here."""
        said = self.tail(1 << 18).splitlines()
        start = max((number for number, line in enumerate(said) if re.match(BY_BENTO, line)), default=-1)
        return find("\n".join(said[start + 1 :]))

    def hand_over(self, path: Path) -> None:
        """Moves the log to `path`, with the middle of a huge one left out, so that it is always worth uploading."""
        with open(self.path, "ab+") as file:
            left_out = file.tell() - LOG_HEAD_BYTES - LOG_TAIL_BYTES
            if left_out > 0:
                file.seek(0)
                data = file.read(LOG_HEAD_BYTES) + f"\n[{left_out} bytes left out]\n".encode()
                file.seek(-LOG_TAIL_BYTES, os.SEEK_END)
                write_atomic(path, data + file.read(), 0o640)
                self.path.unlink()
            else:  # which takes no room on a full disk
                os.fchmod(file.fileno(), 0o640)
                os.fsync(file.fileno())
                os.rename(self.path, path)
                sync_directory(path.parent)
        self.kept = False


# --- signatures ---

NAMESPACE, PRINCIPAL = "bento-release", "bento"
SIGNED_2 = "bento-releases 2"
STEP = re.compile(r"(left|right) ([0-9a-f]{64})")
MAX_REVOKED = 200
# Of clients: the first one that goes on trusting whom the machine trusts, whatever system runs.
PIN_SINCE = (1, 2)
ARMOR = "-----BEGIN SSH SIGNATURE-----\n"
PUBLIC_KEY = (
    r"(ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp(?:256|384|521)|sk-(?:ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)"
    r"\s+(AAAA[A-Za-z0-9+/]+=*)(?:\s|$)"
)


def format_signed(signed: Signed) -> str:
    lines = [
        SIGNED_2,
        f"fleet {signed.fleet}",
        f"serial {signed.serial}",
        f"expires {signed.expires}",
        f"root {signed.root}",
    ]
    return "\n".join([*lines, *(f"revoked {signer}" for signer in signed.revoked)]) + "\n"


def parse_signed(text: str, what: str) -> Signed:
    first, *lines = text.removesuffix("\n").split("\n")
    if first != SIGNED_2:
        raise BentoError(
            f"{what}: it begins with {one_line(repr(first), 40)}, not with '{SIGNED_2}': update Bento here"
        )
    pairs = [(name, value) for name, _, value in (line.partition(" ") for line in lines)]
    revoked = tuple(value for name, value in pairs if name == "revoked")
    if len(revoked) > MAX_REVOKED or not all(map(FINGERPRINT.fullmatch, revoked)):
        raise BentoError(f"{what}: field 'revoked' is malformed")
    fields = read_pairs([pair for pair in pairs if pair[0] != "revoked"], ("serial",), what)
    return read_record(Signed, fields, what)._replace(revoked=revoked)


def format_leaf(leaf: Leaf) -> str:
    words = f"host {leaf.host} release {leaf.release} size {leaf.size} system {leaf.system or '-'} commit {leaf.commit or '-'}"
    return f"{words} again {leaf.again}" + " unsign yes" * leaf.unsign


def parse_leaf(text: str, what: str) -> Leaf:
    words = text.split(" ")
    if len(words) % 2:
        raise BentoError(f"{what}: it is no pairs of names and values")
    fields = read_pairs(list(zip(words[::2], words[1::2], strict=True)), ("size", "again"), what)
    for name in ("system", "commit"):  # what is missing keeps its line
        fields[name] = None if fields.get(name) == "-" else fields.get(name, "")
    return read_record(Leaf, fields | {"unsign": fields.get("unsign") == "yes"}, what)


def read_pairs(pairs: Sequence[tuple[str, str]], numbers: Sequence[str], what: str) -> dict[str, Any]:
    fields: dict[str, Any] = dict(pairs)
    if len(fields) != len(pairs):
        raise BentoError(f"{what}: it says something twice")
    for name in numbers:
        if re.fullmatch("[0-9]{1,16}", fields.get(name, "")):
            fields[name] = int(fields[name])
    return fields


def hash_leaf(leaf: str) -> bytes:
    """As RFC 6962 has it (2.1), so that nothing is a leaf and a node."""
    import hashlib

    return hashlib.sha256(b"\0" + leaf.encode()).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(b"\1" + left + right).digest()


def find_root(leaf: str, path: Sequence[str]) -> str:
    """Where a path from a leaf leads to. BentoError for what is no path."""
    node = hash_leaf(leaf)
    for step in path:
        if (found := STEP.fullmatch(step)) is None:
            raise BentoError(f"its path to what was signed is malformed: {one_line(step, 40)}")
        other = bytes.fromhex(found[2])
        node = hash_node(other, node) if found[1] == "left" else hash_node(node, other)
    return node.hex()


def fingerprint(blob: str) -> str:
    """A public key's name, as ssh-keygen shows it. ValueError for what is no key."""
    import base64
    import hashlib

    digest = hashlib.sha256(base64.b64decode(blob, validate=True)).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def read_signers(path: Path) -> dict[str, str]:
    """The public keys in a file, one a line as in a .pub file, by fingerprint. What else a line says in front of its key
    (`valid-before=`, `@revoked`) is not followed, so it is refused."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the signers' keys cannot be read: {one_line(words_of(error), 100)}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        kind, blob = match.groups() if (match := re.match(PUBLIC_KEY, line.strip())) else ("", "?")
        try:
            found[fingerprint(blob)] = f"{kind} {blob}"
        except ValueError:
            raise UsageError(f"{path}:{number}: not a public key, as in a .pub file: {one_line(line, 60)}") from None
    if not found:
        raise UsageError(f"{path}: no signer's key in it")
    return found


def take_apart(signature: str) -> tuple[str, int]:
    """The fingerprint of the key that a signature has in it, and the flags that a security key puts behind the signature
    proper (OpenSSH's PROTOCOL.sshsig, PROTOCOL.u2f); 0 where there are none. ValueError for what is no signature."""
    import base64

    armored = signature.removeprefix(ARMOR).partition("\n-----END")[0]
    rest, words = base64.b64decode("".join(armored.split()), validate=True)[len("SSHSIG") + 4 :], []
    for number in range(7):  # key, namespace, reserved, hash; then what holds kind and signature
        size = int.from_bytes(rest[:4], "big")
        words.append(rest[4 : 4 + size])
        rest = rest[4 + (0 if number == 4 else size) :]
    return fingerprint(base64.b64encode(words[0]).decode()), rest[0] if rest else 0


def trusted_keys(settings: Settings, state: State) -> dict[str, str] | None:
    """Those whose signatures this machine asks for, by fingerprint; None where it asks for none. What it has committed once
    counts, and not what the system that happens to run says."""
    if state.pinned is not None:
        keys = {fingerprint(key.split()[1]): key for key in state.pinned.signers}
        return {signer: key for signer, key in keys.items() if signer not in state.pinned.revoked}
    return read_signers(Path(settings.signers)) if settings.signers else None


def find_signer(text: str, signature: str, keys: Mapping[str, str], directory: Path) -> str:
    """The fingerprint of the signer whose signature this is. BentoError when it is nobody's that is trusted."""
    allowed = "".join(f'{PRINCIPAL} namespaces="{NAMESPACE}" {key}\n' for key in keys.values())
    for name, content in (("allowed", allowed), ("signature", signature), ("text", text)):
        (directory / name).write_text(content, "utf-8")
    argv = ["ssh-keygen", "-Y", "verify", "-f", "allowed", "-I", PRINCIPAL, "-n", NAMESPACE, "-s", "signature"]
    with open(directory / "text", "rb") as file:
        done = run(argv, check=False, timeout=60, given=file, cwd=directory)
    said = done.output.strip()
    if done.code in (None, 127):
        raise BentoError(f"the signature cannot be checked: {one_line(said) or how_ended(done.code)}")
    found = re.search(rf"^Good .* key ({FINGERPRINT.pattern})$", said, re.MULTILINE)
    if done.code != 0 or found is None or found[1] not in keys:
        why = one_line(said.splitlines()[-1] if said else "")
        raise BentoError(f"its signature is of nobody whom this machine trusts ({why})")
    # Somebody has touched it, says its first bit, which ssh-keygen does not ask for.
    if keys[found[1]].startswith("sk-") and not take_apart(signature)[1] & 1:
        raise BentoError(f"the security key {found[1]} signed it without a touch: whoever has its machine can do that")
    return found[1]


def verify(current: Current, keys: Mapping[str, str], state: State, directory: Path, what: str) -> Current:
    """The same release with what was signed of it, and by whom. BentoError when nobody who is trusted vouches for it, or
    when this is an older one than was seen: a server can keep silent, and do nothing else."""
    where, vow = f"{what}: release {current.release[:12]}", current.vow
    if vow is None:
        raise BentoError(f"{where} is not signed, as this machine wants it: 'bento.py sign', then publish it again")
    try:
        signer = find_signer(vow.text, vow.signature, keys, directory)
        signed, leaf = parse_signed(vow.text, "its signed text"), parse_leaf(vow.leaf, "its leaf")
        if signer in signed.revoked:
            raise BentoError(f"it revokes the key that signed it, {signer}")
        if find_root(vow.leaf, vow.path) != signed.root:
            raise BentoError("what it says of this host is not in what was signed")
        if (leaf.host, leaf.release, leaf.size) != (current.host, current.release, current.size):
            about = f"release {leaf.release[:12]} ({leaf.size} bytes) for host {leaf.host!r}"
            raise BentoError(f"what was signed is about another one: {about}")
        refuse_older(signed, vow.text, state)
    except (BentoError, UnicodeEncodeError) as error:
        raise BentoError(f"{where}: {error}") from None
    return current._replace(signer=signer, system=leaf.system, commit=leaf.commit, again=leaf.again)


def refuse_older(signed: Signed, text: str, state: State) -> None:
    """BentoError for what was signed for another fleet, before what this machine has accepted, or beside it."""
    pinned = state.pinned or Pinned(())
    if pinned.fleet not in ("", signed.fleet):
        raise BentoError(f"it was signed for fleet {signed.fleet}, and this machine is one of fleet {pinned.fleet}")
    revoked = {*pinned.revoked, *signed.revoked}
    seen = highest_serial(state.serials, revoked)
    if signed.serial < seen:
        raise BentoError(
            f"it was signed with serial {signed.serial}, and {seen} was seen: sign it with --serial {seen + 1}"
        )
    beside = pinned.signer not in revoked and pinned.text not in ("", text)
    if beside and parse_signed(pinned.text, "state.json").serial == signed.serial:
        raise BentoError(f"another text with its serial, {signed.serial}, was seen: sign it anew")


def highest_serial(serials: Sequence[str], revoked: Iterable[str]) -> int:
    """Of all whom this machine has ever followed, but for stolen keys, whose serials go with them."""
    counting = [serial for signer, serial in map(parse_serial, serials) if signer not in revoked]
    return max(counting, default=0)


def accepted(state: State, current: Current, keys: Mapping[str, str]) -> dict[str, Any]:
    """What state.json has to remember of what a poll has accepted: no lower serial is taken after it."""
    if current.signer is None or current.vow is None:
        return {}
    signed, before = parse_signed(current.vow.text, "signed text"), state.pinned or Pinned(tuple(keys.values()))
    serials = {current.signer: signed.serial}
    for signer, serial in map(parse_serial, state.serials):
        serials[signer] = max(serial, serials.get(signer, 0))
    pinned = before._replace(
        fleet=signed.fleet, revoked=tuple(sorted({*before.revoked, *signed.revoked})),
        signer=current.signer, text=current.vow.text, leaf=current.vow.leaf,
    )  # fmt: skip
    kept = {"serials": tuple(f"{signer} {serial}" for signer, serial in sorted(serials.items())), "pinned": pinned}
    return kept | ({"tried": None} if is_signed_again(state, current) else {})


def is_signed_again(state: State, current: Current) -> bool:
    """Whether the signer means what was given up here: `sign --again`. A new serial alone says nothing of that."""
    tried, leaf = state.tried, state.pinned.leaf if state.pinned else ""
    if tried is None or tried.release != current.release or tried.result == Result.OK or not leaf:
        return False
    before = parse_leaf(leaf, "state.json")
    return before.release == current.release and before.again < current.again


def parse_serial(text: str) -> tuple[str, int]:
    signer, _, serial = text.partition(" ")
    return signer, int(serial) if serial.isdecimal() else 0


def vouched_until(state: State) -> str | None:
    """The end of the time for which somebody has signed what this machine follows."""
    return parse_signed(state.pinned.text, "signed text").expires if state.pinned and state.pinned.text else None


def nobody_vouches(state: State, now_s: float) -> str | None:
    """What a person is told when that time is over, or will be within a week."""
    until = vouched_until(state)
    if until is None or (left_s := parse_time(until) - now_s) > EXPIRES_SOON_S:
        return None
    if left_s > 0:
        return (
            f"warning: in {duration(left_s)}, at {until}, nobody vouches for this machine's state any more: sign anew"
        )
    return f"error: expired: nobody vouches for this machine's state since {until}: sign anew"


def has_expired(current: Current, now_s: float) -> str | None:
    """Why a signed release is not moved to."""
    if current.signer is None or current.vow is None:
        return None
    expires = parse_signed(current.vow.text, "signed text").expires
    return f"its signature expired at {expires}: sign anew" if parse_time(expires) <= now_s else None


def check_trust(settings: Settings, state: State) -> None:
    """UsageError when these settings would let a stranger in, or nobody."""
    if settings.known_hosts and not Path(settings.known_hosts).exists():
        raise UsageError(
            f"{settings.known_hosts}: no such file: it is to have the server's host keys (setting 'known_hosts'), and"
            " without it nobody tells a stranger from the server"
        )
    if trusted_keys(settings, state) is None and len(settings.server) > 1 and not settings.known_hosts:
        raise UsageError(
            "several servers need 'known_hosts' (services.bento.serverKeys) or 'signers': each of them would be trusted"
            " at its first contact, whoever answers then"
        )


def signers_of(system: str) -> dict[str, str]:
    """Those whom a system asks for. UsageError when it asks for signatures, and nobody's can be had."""
    path = str(settings_of(system).get("signers") or "")
    if not path:
        return {}
    return read_signers(Path(system, path.lstrip("/")) if path.startswith("/etc/") else Path(path))


def is_unsigned(pinned: Pinned, release: str) -> bool:
    """Whether this release may change whom the machine trusts as it likes."""
    leaf = parse_leaf(pinned.leaf, "state.json") if pinned.leaf else None
    return leaf is not None and leaf.release == release and leaf.unsign


def drops_signers(pinned: Pinned, release: str, system: str) -> str | None:
    """Why a new system must not follow this one: whom it trusts, and who signed it, do not fit."""
    if not settings_of(system) or is_unsigned(pinned, release):
        return None
    try:
        asked = signers_of(system)
    except UsageError as error:
        return f"the new system would take releases that nobody signed: {error}"
    if not asked:
        return (
            "the new system would take releases that nobody signed: it has no services.bento.signers; or sign --unsign"
        )
    if pinned.signer not in asked:
        return (
            f"the new system's signers lack the key that signed it, {pinned.signer}: have both until all hosts run it"
        )
    return None


def brings_signers(system: str, fallback: str) -> str | None:
    """Why the first system that asks for signatures has to wait: what may have to be gone back to would forget them."""
    program = Path(fallback, "sw/bin/bento-client")
    if not settings_of(system).get("signers") or not program.exists():
        return None
    found = re.match(r"([0-9]+)\.([0-9]+)", run([str(program), "--version"], check=False, timeout=60).output)
    if found is not None and (int(found[1]), int(found[2])) >= PIN_SINCE:
        return None
    return f"the new system asks for signatures, and the client of {fallback} would forget that: boot one of 1.2 first"


def pin(state: State, release: str, system: str) -> Pinned | None:
    """Whom this machine trusts from now on: a system of a release was committed."""
    pinned, asked = state.pinned, tuple(signers_of(system).values())
    cache_key = str(settings_of(system).get("cache_key") or "")
    if pinned is None or is_unsigned(pinned, release):
        return Pinned(asked, pinned.revoked if pinned else (), cache_key) if asked else None
    about = parse_leaf(pinned.leaf, "state.json").release if pinned.leaf else None
    return pinned._replace(signers=asked, cache_key=cache_key) if asked and about == release else pinned


# --- sftp ---


class Refused(BentoError):
    """The server was reached, and one sftp command failed there."""


def known_hosts_file(settings: Settings) -> Path:
    return Path(settings.known_hosts) if settings.known_hosts else settings.state / "known_hosts"


# The name in `known_hosts` that the fleet's server has, by whatever name, address or port it is reached.
ALIAS = "bento-server"


def is_bound(settings: Settings) -> bool:
    """Whether the key that was taken at the first contact is the fleet's. Several servers have a key each."""
    known = known_hosts_file(settings)
    if settings.known_hosts or len(settings.server) > 1 or not known.exists():
        return False
    return any(line.startswith(f"{ALIAS} ") for line in known.read_text(errors="replace").splitlines())


def bind_server(settings: Settings) -> None:
    """Has the keys that ssh has written down, or had for an earlier client, count under every name of the server."""
    known = known_hosts_file(settings)
    if settings.known_hosts or len(settings.server) > 1 or is_bound(settings) or size_of(known) == 0:
        return
    text, times = known.read_text(errors="replace"), known.stat()
    keys = [line.split()[1:3] for line in text.splitlines() if line.strip() and line[0] not in "#@"]
    lines = dict.fromkeys(f"{ALIAS} {' '.join(key)}\n" for key in keys)
    write_atomic(known, (text.rstrip("\n") + "\n" + "".join(lines)).encode(errors="replace"), 0o600)
    os.utime(known, ns=(times.st_atime_ns, times.st_mtime_ns))  # which is when it was taken on trust


def sftp_argv(settings: Settings, server: str) -> list[str]:
    """The command line of one connection. ssh takes the first value it sees of an option, so the user's come first,
    but for the sharing of connections: what has to be proven is that a new one can be made."""

    def quoted(path: Path) -> str:
        return '"' + str(path).replace("%", "%%") + '"'

    known = known_hosts_file(settings)
    bound = is_bound(settings)
    strict = bound or bool(settings.known_hosts)
    options = [
        "ControlMaster=no",
        "ControlPath=none",
        *settings.ssh_options,
        "BatchMode=yes",
        "IdentitiesOnly=yes",
        "PreferredAuthentications=publickey",
        f"ConnectTimeout={settings.connect_timeout}",
        "ServerAliveInterval=10",
        "ServerAliveCountMax=3",
        f"StrictHostKeyChecking={'yes' if strict else 'accept-new'}",
        f"UserKnownHostsFile={quoted(known)}",
        *(["GlobalKnownHostsFile=none"] if strict else []),
        *([f"HostKeyAlias={ALIAS}"] if bound else []),
        "UpdateHostKeys=no",
        "ForwardAgent=no",
        "ForwardX11=no",
        "ClearAllForwardings=yes",
        "PermitLocalCommand=no",
    ]
    argv = ["sftp", "-b", "-", "-C", "-P", str(settings.port), "-i", str(settings.identity_file).replace("%", "%%")]
    argv += ["-B", str(REQUEST_BYTES), "-F", os.devnull]
    for option in options:
        argv += ["-o", option]
    address = f"[{server}]" if ":" in server and not server.startswith("[") else server
    return [*argv, f"{settings.user}@{address}"]


# Why a server takes no report, by sftp's words. Of a full disk it says nothing else than "Failure".
NO_REPORT = {
    "No such file": "there is no logs/: 'bento.py populate' on the server makes it",
    "Permission denied": "logs/ is not this host's: 'bento.py populate' on the server, as root, gives it back",
}


class Sftp:
    """One `sftp` process in batch mode, which is one SSH connection: one command, one answer.

    sftp takes its batch line by line, and repeats each line before it acts on it. So behind each command goes a comment
    that no server can guess: where it comes back, the answer ends. A command that fails ends the session, unless it has
    sftp's minus in front. Local names are relative to the state directory.
    """

    def __init__(self, settings: Settings, server: str) -> None:
        self.server = server
        self.directory = settings.state
        self.mark = f"# {os.urandom(16).hex()}".encode()
        self.answer = bytearray()
        pipe = subprocess.PIPE
        env = os.environ | {"LC_ALL": "C"}
        try:
            self.process = start(
                sftp_argv(settings, server), cwd=self.directory, stdin=pipe, stdout=pipe, env=env, bufsize=0
            )
        except OSError as error:
            raise Unreachable(f"cannot run sftp: {error.strerror}; is OpenSSH on PATH?", passing=False) from None
        resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (MAX_SFTP_BYTES, MAX_SFTP_BYTES))
        # ssh has its own limit for connecting, with a better message; it does not cover what comes after.
        self.do("", settings.connect_timeout + 2)

    def do(self, command: str, limit_s: float = STALL_S, grows: Path | None = None, ceiling: int = 0) -> str:
        """Runs one command to its end and returns what sftp said to it. It has `limit_s` seconds; what a download into
        the file `grows` uses up of them it wins back by growing, at the least rate or faster. One that outgrows
        `ceiling` bytes is broken off."""
        assert self.process.stdin is not None and self.process.stdout is not None
        give_up = time.monotonic() + limit_s
        size = size_of(grows)
        with suppress(BrokenPipeError):  # its last words say more
            self.process.stdin.write(f"{command}\n".encode() + self.mark + b"\n")
        looked_at = 0
        while (end := self.answer.find(self.mark, looked_at)) < 0:
            looked_at = max(0, len(self.answer) - len(self.mark))
            ready, _, _ = select.select([self.process.stdout], [], [], 0.2)
            if ready:
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self.failure()
                self.answer += chunk
                if len(self.answer) > MAX_ANSWER_BYTES:
                    raise self.broken(f"more than {MAX_ANSWER_BYTES} bytes in answer to '{command or 'connect'}'")
            now_s, before, size = time.monotonic(), size, size_of(grows)
            give_up = min(now_s + limit_s, give_up + max(0, size - before) / LEAST_RATE)
            if size > ceiling and grows is not None:
                end_group(self.process)
                asked = " ".join(command.split()[:2])  # without our own name for it, which is another one each time
                raise BentoError(f"{self.server}: {asked} gave more than the announced {ceiling} bytes")
            if now_s > give_up:
                raise self.broken(f"no answer to '{command or 'connect'}' for {limit_s:.0f} s")
        said, self.answer = self.answer[:end].decode(errors="replace"), bytearray()
        return said

    def broken(self, why: str) -> Unreachable:
        end_group(self.process)
        return Unreachable(f"{self.server}: {why}")

    def failure(self) -> BentoError:
        """Why sftp ended: 255 is ssh's own failure, and so is a line that died in the middle of a command."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            end_group(self.process)
            code = 255
        output = self.answer.decode(errors="replace")
        meaning, passing = explain_ssh(output)
        if code == 1 and "the connection was lost" not in meaning:
            said = [one_line(line) for line in output.splitlines() if line and not line.startswith("sftp> ")]
            return Refused(f"{self.server}: {said[-1] if said else 'sftp failed without a word'}")
        return Unreachable(f"cannot reach {self.server}: {meaning}", passing=passing)

    def get(self, remote: str, local: str, ceiling: int, *, resume: bool = False, limit_s: float = 0) -> Path:
        path = self.directory / local
        if not resume:
            path.unlink(missing_ok=True)  # another server's
        # It grows by a whole request at a time.
        limit_s = limit_s or STALL_S + min(ceiling, REQUEST_BYTES) / LEAST_RATE
        self.do(f"{'reget' if resume else 'get'} {remote} {local}", limit_s, grows=path, ceiling=ceiling)
        if not path.exists():
            raise BentoError(f"{self.server}: {remote} did not come")
        if size_of(path) > ceiling:
            raise BentoError(f"{self.server}: {remote} is larger than the announced {ceiling} bytes")
        return path

    def put(self, local: str, name: str, *, optional: bool = False) -> None:
        """Uploads into logs/: under a name that no reader takes, then renamed. `optional`: a server that cannot take it
        is no failure."""
        # It gives no sign of life before its end.
        limit_s = STALL_S + (self.directory / local).stat().st_size / LEAST_RATE
        sign = "-" if optional else ""
        try:
            said = self.do(f"{sign}put {local} logs/.{name}", limit_s).splitlines()
            if optional and any(line.strip() and not line.startswith(("sftp> ", "Uploading ")) for line in said):
                return  # half a file may lie there, to be written over
            # Without posix-rename@openssh.com, a name that is there stays as it is.
            if "remote rename" in self.do(f"-rename logs/.{name} logs/{name}"):
                self.do(f"-rm logs/{name}")
                self.do(f"{sign}rename logs/.{name} logs/{name}")
        except Refused as error:
            why = next((why for words, why in NO_REPORT.items() if words in str(error)), "is its disk full?")
            raise Unreachable(f"{error}: it cannot take the report: {why}", passing=False) from None

    def close(self) -> None:
        """Ends the connection, at once: nothing is left unanswered, and a farewell would take a round trip."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            end_group(self.process)
        self.process.stdin.close()
        self.process.stdout.close()


def connect(settings: Settings, server: str, log: Log) -> Sftp:
    """A new connection. A key that was taken on trust is told, whatever comes after it."""
    known = known_hosts_file(settings)
    bind_server(settings)
    before = size_of(known)
    try:
        return Sftp(settings, server)
    finally:
        if size_of(known) > before:
            log.say(f"warning: first contact with {server}: its host key is kept in {known}")
            bind_server(settings)


def first_contact(settings: Settings) -> str | None:
    """When a server's key was last taken on trust: ssh adds it to the file then, and writes there for nothing else."""
    known = known_hosts_file(settings)
    if settings.known_hosts or not known.exists():
        return None
    return format_time(known.stat().st_mtime)


def knock(settings: Settings, log: Log, favourite: str) -> Sftp:
    """A new connection to the favourite, or else to the first server that answers. Unreachable when none does."""
    failures: list[str] = []
    for server in sorted(settings.server, key=lambda server: server != favourite):
        try:
            return connect(settings, server, log)
        except BentoError as error:
            failures.append(str(error))
    raise Unreachable("; ".join(failures))


def read_current(session: Sftp, settings: Settings, directory: str) -> Current:
    try:
        # One of several that hangs keeps the others waiting.
        limit_s = settings.connect_timeout if len(settings.server) > 1 else 0
        path = session.get("current.json", f"{directory}/current.json", MAX_JSON_BYTES, limit_s=limit_s)
    except Refused as error:
        if not re.search(r"not found|No such file", str(error)):  # a storage that is away, a cache that is old
            raise Unreachable(f"{error}: tried again; if that lasts, look at the server's log") from None
        raise BentoError(
            f"{error}: nothing is published for {settings.host} there: run 'bento.py populate {settings.host}' on the server"
        ) from None
    return parse_current(path.read_bytes(), f"{session.server}: current.json", settings.host)


def ask(settings: Settings, server: str, directory: str, log: Log, state: State | None) -> tuple[Sftp, Current]:
    """A connection to one server, and what it publishes."""
    session = connect(settings, server, log)
    try:
        current = read_current(session, settings, directory)
        if state is not None and (keys := trusted_keys(settings, state)) is not None:
            aside, what = settings.state / directory, f"{server}: current.json"
            current = verify(current, keys, state, aside, what)
    except BaseException:
        session.close()
        raise
    return session, current


def ask_all(
    settings: Settings, directory: str, log: Log, state: State | None
) -> tuple[tuple[Sftp, Current] | None, list[BentoError]]:
    """The server with the newest that is usable, and what was wrong with the others: one that lies, lags or froze hides
    none of them. Without a `state`, one that answers is enough."""
    failures: list[BentoError] = []
    found: list[tuple[Sftp, Current]] = []
    for server in settings.server:
        try:
            found.append(ask(settings, server, directory, log, state))
        except BentoError as error:
            failures.append(error)
            continue
        if state is None:
            break
    if not found:
        return None, failures
    ages = [age(current, time.time()) for _, current in found]
    newest = found[ages.index(max(ages))]
    for (session, current), its in zip(found, ages, strict=True):
        if its < max(ages):
            log.say(f"{session.server} is behind, or its clock wrong: it publishes a release of {current.published}")
        if session is not newest[0]:
            session.close()
    return newest, failures


def poll(
    settings: Settings, directory: str, log: Log, state: State | None = None, patience_s: float = 0.0
) -> tuple[Sftp, Current]:
    """A connection to the first server that has a usable `current.json`, and what it says.

    Tries again for `patience_s` seconds: at boot and after a resume, names and routes come late. With a
    `state`, what is to be deployed is asked for: signed by who is trusted, and not older than what was seen.
    """
    if not settings.identity_file.exists():
        raise Unreachable(f"no SSH key at {settings.identity_file}: make one with 'bento-client key'", passing=False)
    give_up, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        found, failures = ask_all(settings, directory, log, state)
        if found is not None:
            return found
        for failure in failures:
            if not isinstance(failure, Unreachable):
                raise failure
        passing = any(isinstance(failure, Unreachable) and failure.passing for failure in failures)
        if not passing or time.monotonic() + pause_s > give_up:
            raise Unreachable("; ".join(str(failure) for failure in failures), passing=passing)
        time.sleep(pause_s)
        pause_s *= 2


# --- boot loaders ---
#
# Tells a boot loader which system to start, and which one at the next boot only. What we know of it comes from what it
# reads itself, its entries and variables, never from what a program says of them.

LOADER_VARIABLES = "/sys/firmware/efi/efivars/{}-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
# Bits of LoaderFeatures: this boot loader follows LoaderEntryDefault and LoaderEntryOneShot.
LOADER_NEEDS = 1 << 2 | 1 << 3
# It also follows LoaderEntryPreferred and loader.conf's line `preferred`, before any default (systemd 260).
LOADER_PREFERS = 1 << 19
LOADER_VERBS = {
    "set-default": "LoaderEntryDefault", "set-oneshot": "LoaderEntryOneShot", "set-preferred": "LoaderEntryPreferred",
}  # fmt: skip
# What tells a boot that it is a trial: the system, for how many seconds, and whether a passphrase may be asked for.
TRIAL_VARIABLE = "/sys/firmware/efi/efivars/BentoTrial-6e3a4a5c-0d0b-4f4e-9d5e-6b656e746f21"
# What the end of a trial leaves behind, where the deadline was it.
OVER_VARIABLE = "/sys/firmware/efi/efivars/BentoTrialOver-6e3a4a5c-0d0b-4f4e-9d5e-6b656e746f21"
EFI_ATTRIBUTES = b"\x07\0\0\0"  # kept, and there for the firmware and for us
FS_IOC_SETFLAGS = 0x40086602
# utils/bento.nix writes it into grub.cfg, above the lines that follow what we write into grubenv.
GRUB_MARK = "# bento: the first boot is a trial (2)"
GRUB_GOOD, GRUB_TRY, GRUB_DEADLINE = "bento_good", "bento_try", "bento_deadline"
GRUB_WRITES = ("ext2", "ext3", "ext4", "vfat")
GRUBENV_HEAD, GRUBENV_BYTES = b"# GRUB Environment Block\n", 1024
GRUB_BLOCK = r"""\s*(menuentry|submenu)\s+(["'])(.*?)\2"""
LOADER_LIMIT_S = 60
# A profile of the system to fall back to: NixOS gives each profile its own entries in the boot menu, whatever the limit of
# entries, and no garbage collection takes what a profile names. Such an entry is known by its title, or in GRUB by its
# name.
WAY_BACK = "/nix/var/nix/profiles/system-profiles/bento"
OF_WAY_BACK = re.compile(r"\[bento\]|Profile 'bento'")


class Armed(NamedTuple):
    """What a boot loader was told, by the names of entries: which one it starts, and which one it starts at the next boot
    only. `mark`: which system is on trial, and for how long, for the boot itself to read."""

    default: str = ""
    once: str = ""
    mark: str = ""


class BootEntry(NamedTuple):
    """An entry of a boot loader's menu. `system` is empty for what is not NixOS; kernel, initrd and title as written. `uki`: the
    file that is both, and has the command line, too."""

    name: str
    system: str = ""
    kernel: str = ""
    initrd: str = ""
    title: str = ""
    top: bool = False
    uki: str = ""


class Loader:
    """A boot loader that nothing can be told, or that we know nothing of."""

    lists_profiles = True  # each of NixOS' system profiles has entries

    def __init__(self, settings: Settings, places: Sequence[Path] = ()) -> None:
        self.settings = settings
        self.places = places

    def trial_way(self) -> str:
        """How a system is started for one boot only: the boot loader's name, or `none: ` and why not."""
        name = next(iter(self.settings.boot_loader), "this boot loader")
        return f"none: {name} cannot be told to start a system just once"

    def entries(self, place: Path) -> list[BootEntry]:
        return []

    def locate(self, place: Path, written: str, original: Path) -> Path:
        """Where the boot loader finds a file that an entry names. `original` is the system's own."""
        return original

    def entry_fault(self, system: str) -> str | None:
        """What keeps the boot loader from starting the system, as far as can be seen."""
        for place in self.places:
            try:
                entries = [entry for entry in self.entries(place) if entry.system == system]
                faults = [self.file_fault(place, entry) for entry in entries] or [f"{place}: no entry for {system}"]
            except OSError as error:
                faults = [f"{error.filename or place}: {error.strerror}"]
            for fault in faults:
                if fault is not None:
                    return f"the boot loader cannot start the system: {fault}"
        return None

    def file_fault(self, place: Path, entry: BootEntry) -> str | None:
        """What is wrong with the kernel or the initrd of an entry. To either something may be appended: a signature, secrets."""
        for name, written in (("kernel", entry.kernel), ("initrd", entry.initrd)):
            original = Path(os.path.realpath(Path(entry.system, name)))
            if not original.exists() and name == "initrd":
                continue
            if not written:
                return f"{place}: entry {entry.name} has no {name}"
            file = self.locate(place, written, original)
            found, wanted = (path.stat().st_size if path.exists() else None for path in (file, original))
            if found is None:
                return f"{file} is missing"
            if wanted is None or found < wanted:
                return f"{file} has {found} bytes, the system's {name} has {wanted}"
        return None

    def list_entries(self) -> list[BootEntry]:
        try:
            return self.entries(self.places[0]) if self.places else []
        except OSError as error:
            raise BentoError(f"{error.filename or self.places[0]}: {error.strerror}") from None

    def entry_of(self, system: str) -> BootEntry:
        """The system's entry, which stays its own whatever is made the default."""
        found = [entry for entry in self.list_entries() if entry.system == system and not entry.top]
        for entry in sorted(found, key=lambda entry: not OF_WAY_BACK.search(entry.title or entry.name)):
            return entry
        raise BentoError(f"the boot loader has no entry for {system}: run 'nixos-rebuild boot'")

    def unmounted(self) -> str | None:
        """A file system that our boot loader reads, by /etc/fstab, and that is not there: what is written would lie below it."""
        fstab = self.settings.system_path("/etc/fstab")
        lines = fstab.read_text("utf-8", "replace").splitlines() if fstab.exists() else []
        points = [words[1] for line in lines if len(words := line.split()) > 2 and words[1].startswith("/")]
        for place in self.places:
            with suppress(OSError):
                os.listdir(place)  # some are mounted when they are looked at
            inside = "/" + os.path.relpath(place, self.settings.root)
            mount = mount_of(self.settings, place)
            wanted = max(
                (each for each in points if f"{inside}/".startswith(each.rstrip("/") + "/")), key=len, default=""
            )
            if mount is not None and len(mount.point) < len(wanted):
                return wanted
        return None

    def altered(self, system: str, good: str) -> list[Path]:
        """Copies of a system's kernel and initrd with other bytes: half written, or by their owner (a signature). An initrd may
        have more at its end. Not what the system that is known to boot has, too."""
        found = []
        for place in self.places:
            entries = self.entries(place)
            shared = {path for entry in entries if entry.system == good for path in (entry.kernel, entry.initrd)}
            for entry in (entry for entry in entries if entry.system == system):
                for name, written in (("kernel", entry.kernel), ("initrd", entry.initrd)):
                    original = Path(os.path.realpath(Path(system, name)))
                    copy = self.locate(place, written, original)
                    if written not in ("", *shared) and copy != original and not same_beginning(original, copy):
                        found.append(copy)
        return found

    def default_of(self, place: Path) -> str:
        """The system that the menu starts by itself, where that can be seen."""
        return ""

    def starts(self, system: str) -> bool:
        """Whether the menu, such as it is, starts the system by itself."""
        with suppress(OSError):
            return bool(self.places) and all(self.default_of(place) == system for place in self.places)
        return False

    def lasts(self, system: str) -> bool:
        """Whether the system's entry is that of the profile to fall back to; any, where that has none."""
        with suppress(BentoError):
            entry = self.entry_of(system)
            return not self.lists_profiles or bool(OF_WAY_BACK.search(entry.title or entry.name))
        return False

    def flush(self) -> None:
        """Flushes what a `boot` has written, before a variable names an entry in it: a power cut would leave half of it, or
        on FAT nothing. install-grub.pl flushes nothing, and switch-to-configuration only the store's file system."""
        flushed = os.stat(self.settings.system_path("/nix/store")).st_dev
        for place in self.places:
            if os.stat(place).st_dev != flushed:
                run(["sync", "--file-system", str(place)], timeout=LOADER_LIMIT_S)

    def ran_out(self) -> bool:
        """Whether it was its deadline that ended the last trial, as far as there are EFI variables to say so."""
        return self.settings.system_path(OVER_VARIABLE).exists()

    def forget_end(self) -> None:
        write_variable(self.settings.system_path(OVER_VARIABLE), b"")

    def armed(self) -> Armed:
        return Armed()

    def prefer(self, system: str, mark: str) -> None:
        """Makes the boot loader start this system until `clear`, whatever becomes the default meanwhile. The mark comes
        first: it says that this is ours. The caller writes down what `armed` said before, and gives it to `clear`."""
        raise BentoError(self.trial_way())

    def try_once(self, system: str) -> None:
        """The next boot starts this system, the boots after it the preferred one. Without a system, the next one does, too."""
        raise BentoError(self.trial_way())

    def clear(self, before: str, once: str) -> None:
        """Takes back what `prefer` and `try_once` did. `once`: the one shot that is ours. May be called any number of
        times."""


def same_beginning(original: Path, copy: Path) -> bool:
    with open(original, "rb") as first, open(copy, "rb") as second:
        while block := first.read(1 << 20):
            if second.read(len(block)) != block:
                return False
    return True


def write_variable(path: Path, value: bytes) -> None:
    """An EFI variable of ours; without a value it goes."""
    try:
        if path.exists():  # the kernel makes variables that it does not know immutable
            with suppress(OSError), open(path, "rb") as file:
                fcntl.ioctl(file, FS_IOC_SETFLAGS, (0).to_bytes(8, "little"))
        if value:
            with open(path, "wb", buffering=0) as file:
                file.write(EFI_ATTRIBUTES + value)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise BentoError(f"EFI variable {path.name.partition('-')[0]}: {error.strerror}") from None


class SystemdBoot(Loader):
    """systemd-boot: two EFI variables over what loader.conf says."""

    def trial_way(self) -> str:
        directory = self.variable("LoaderInfo").parent
        info = self.read("LoaderInfo").decode("utf-16-le", "replace")
        features = int.from_bytes(self.read("LoaderFeatures"), "little")
        if not directory.is_dir() or not any(directory.iterdir()):
            return "none: this machine was booted without EFI variables"
        if not info.startswith("systemd-boot"):
            return "none: this machine was not started by systemd-boot"
        if features & LOADER_NEEDS != LOADER_NEEDS:
            return "none: this systemd-boot is too old"
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            return "none: the EFI variables cannot be written"
        return "systemd-boot"

    def variable(self, name: str) -> Path:
        return self.settings.system_path(LOADER_VARIABLES.format(name))

    def read(self, name: str) -> bytes:
        """The value of one of the loader's variables, without the four bytes of attributes that stand before it."""
        try:
            return self.variable(name).read_bytes()[4:]
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise BentoError(f"EFI variable {name}: {error.strerror}") from None

    def entries(self, place: Path) -> list[BootEntry]:
        # The newest first: of several of a system, a limit of entries removes the older ones.
        def newest(directory: Path, pattern: str) -> list[Path]:
            return sorted(directory.glob(pattern), key=lambda path: (len(path.name), path.name), reverse=True)

        found = [
            parse_loader_entry(path.name, path.read_text("utf-8", "replace"))
            for path in newest(place / "loader/entries", "*.conf")
        ]
        found += [
            BootEntry(uncounted(path.name), uki=f"/EFI/Linux/{path.name}")
            for path in newest(place / "EFI/Linux", "*.efi")
        ]
        return [
            entry._replace(system=system_of(read_uki(self.locate(place, entry.uki, place))[0])) if entry.uki else entry
            for entry in found
        ]

    def file_fault(self, place: Path, entry: BootEntry) -> str | None:
        if not entry.uki:
            return super().file_fault(place, entry)
        file = self.locate(place, entry.uki, place)
        wanted, found = read_uki(file)[1], file.stat().st_size
        return f"{file} has {found} bytes, by its own head {wanted}" if found < wanted else None

    def default_of(self, place: Path) -> str:
        patterns = self.conf(place, "preferred") or self.conf(place, "default")
        form = re.escape(patterns[-1]).replace(r"\*", ".*").replace(r"\?", ".") if patterns else ""
        return next((entry.system for entry in self.entries(place) if re.fullmatch(form, entry.name)), "")

    def conf(self, place: Path, key: str) -> list[str]:
        """What loader.conf says: on the ESP, wherever the entries are. `preferred` (systemd 260) goes before `default`."""
        esp = self.settings.system_path(self.settings.esp) if self.settings.esp else place
        conf = esp / "loader/loader.conf"
        return re.findall(rf"(?m)^{key}\s+(\S+)", conf.read_text("utf-8", "replace")) if conf.exists() else []

    def locate(self, place: Path, written: str, original: Path) -> Path:
        return place / written.lstrip("/")

    def armed(self) -> Armed:
        default, once, preferred = (self.told(name) for name in LOADER_VERBS.values())
        return Armed(preferred or default, once, self.read_mark())

    def told(self, variable: str) -> str:
        return self.read(variable).decode("utf-16-le", "replace").partition("\0")[0]

    def read_mark(self) -> str:
        try:
            return self.settings.system_path(TRIAL_VARIABLE).read_bytes()[4:].decode(errors="replace").strip()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise BentoError(f"EFI variable BentoTrial: {error.strerror}") from None

    def write_mark(self, mark: str) -> None:
        if self.read_mark() != mark:
            write_variable(self.settings.system_path(TRIAL_VARIABLE), mark.encode())

    def prefer(self, system: str, mark: str) -> None:
        name = self.entry_of(system).name
        self.write_mark(mark)
        self.tell("set-default", name)
        features = int.from_bytes(self.read("LoaderFeatures"), "little")
        if features & LOADER_PREFERS and any(self.conf(place, "preferred") for place in self.places):
            self.tell("set-preferred", name)  # the line beats a default

    def try_once(self, system: str) -> None:
        self.tell("set-oneshot", system and self.entry_of(system).name)

    def clear(self, before: str, once: str) -> None:
        # An entry of another name is another's wish: to start Windows, or an older system once.
        armed = self.armed()
        if armed.once == once:
            self.tell("set-oneshot", "")
        if armed.default.startswith("nixos"):
            self.tell("set-preferred", "")
            self.tell("set-default", before)
        self.write_mark("")

    def tell(self, verb: str, name: str) -> None:
        """Sets a variable, or removes it, and looks: not every firmware keeps what it is given."""
        if self.told(LOADER_VERBS[verb]) == name:
            return
        run(["bootctl", verb, name], timeout=LOADER_LIMIT_S)
        if self.told(LOADER_VERBS[verb]) != name:
            raise BentoError(f"bootctl {verb} had no effect: the firmware does not keep EFI variables")


def parse_loader_entry(file: str, text: str) -> BootEntry:
    """An entry of systemd-boot's, from its file of text."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if key == "options":
            value = f"{fields.get(key, '')} {value}"
        elif key in fields:  # of several lines `initrd` the first is the system's
            continue
        fields[key] = value.strip()
    paths = fields.get("linux", ""), fields.get("initrd", "")
    system, title = system_of(fields.get("options", "")), fields.get("title", "")
    return BootEntry(uncounted(file), system, *paths, title, uki=fields.get("uki", ""))


def uncounted(file: str) -> str:
    """An entry's name: its file's, without the count of boots that the loader keeps in it."""
    return re.sub(r"\+[0-9]+(-[0-9]+)?(\.conf|\.efi)$", r"\2", file)


def read_uki(path: Path) -> tuple[str, int]:
    """The command line in a unified kernel image, and how long the file has to be, by the table of its sections (PE/COFF)."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
            start = int.from_bytes(head[0x3C:0x40], "little")
            if head[:2] != b"MZ" or head[start : start + 4] != b"PE\0\0":
                return "", 0
            number, optional = (int.from_bytes(head[start + at : start + at + 2], "little") for at in (6, 20))
            cmdline, end = "", 0
            for at in range(start + 24 + optional, start + 24 + optional + 40 * number, 40):
                size, _, stored, place = (int.from_bytes(head[at + 8 + 4 * each :][:4], "little") for each in range(4))
                end = max(end, place + stored)
                if head[at : at + 8].rstrip(b"\0") == b".cmdline" and not cmdline:
                    file.seek(place)
                    cmdline = file.read(min(size, stored, 1 << 16)).decode(errors="replace").rstrip("\0")
    except OSError:
        return "", 0
    return cmdline, end


def system_of(options: str) -> str:
    """The system that a kernel's command line starts; empty when it starts none."""
    found = [word for word in options.split() if word.startswith("init=") and word.endswith("/init")]
    return found[-1].removeprefix("init=").removesuffix("/init") if found else ""


class Lanzaboote(SystemdBoot):
    """systemd-boot with files that are signed, by a builder that lists the system's own generations, and no other profile's."""

    lists_profiles = False


class Grub(Loader):
    """GRUB: two variables in grubenv, which the lines that bento.nix adds to grub.cfg follow and clear."""

    def trial_way(self) -> str:
        reasons = (self.trouble(place) for place in self.places)
        return next((f"none: {reason}" for reason in reasons if reason), "grub")

    def trouble(self, place: Path) -> str | None:
        """Why GRUB there would not do what we tell it. It has to write to its directory: else every boot would be the
        trial."""
        try:
            text, env = (place / "grub.cfg").read_text("utf-8", "replace"), (place / "grubenv")
            # An empty one is fine, too.
            if env.is_symlink() or (env.exists() and not (env.read_bytes() or GRUBENV_HEAD).startswith(GRUBENV_HEAD)):
                return f"{env} is not what GRUB makes it"
            if os.statvfs(place).f_flag & os.ST_RDONLY:
                return f"{place} cannot be written"
        except OSError as error:
            return f"{error.filename or place}: {error.strerror}"
        if re.search(r"(?m)^\s*set superusers=.*\w", text):
            return "GRUB asks for a password"
        if GRUB_MARK not in text:
            return f"{place / 'grub.cfg'} was written for another version of Bento"
        if not grub_default(text):
            return "GRUB's default is not the newest NixOS"
        mount = mount_of(self.settings, place)
        if mount is None or mount.kind not in GRUB_WRITES or not mount.plain:
            what = mount.kind if mount is not None and mount.kind not in GRUB_WRITES else "no plain partition"
            return f"GRUB cannot write to {place} ({what})"
        return None

    def default_of(self, place: Path) -> str:
        return grub_default((place / "grub.cfg").read_text("utf-8", "replace"))

    def entries(self, place: Path) -> list[BootEntry]:
        return parse_grub((place / "grub.cfg").read_text("utf-8", "replace"))

    def locate(self, place: Path, written: str, original: Path) -> Path:
        """A copy in /boot/kernels, or the file itself in the store, whatever GRUB calls its file system."""
        direct = written.endswith("/" + "/".join(original.parts[-2:]))
        return original if direct else place.parent / "kernels" / os.path.basename(written)

    def armed(self) -> Armed:
        """With mirrors, what any of them prefers is preferred, and the one shot is still to come only if all of them have
        it. Nobody else writes these variables, so they mark the trial as ours; the deadline is what GRUB gives to the
        kernel."""
        told = [read_grubenv(place / "grubenv") for place in self.places]
        once = [each.get(GRUB_TRY, "") for each in told]
        mark = max((each.get(GRUB_DEADLINE, "") for each in told), default="")
        return Armed(max((each.get(GRUB_GOOD, "") for each in told), default=""), min(once, default=""), mark)

    def prefer(self, system: str, mark: str) -> None:
        self.tell({GRUB_GOOD: self.entry_of(system).name, GRUB_DEADLINE: ",".join(mark.split()[1:])})

    def try_once(self, system: str) -> None:
        self.tell({GRUB_TRY: system and self.entry_of(system).name})

    def clear(self, before: str, once: str) -> None:
        """There is no before: nobody else writes these."""
        self.tell({GRUB_GOOD: "", GRUB_TRY: "", GRUB_DEADLINE: ""})

    def tell(self, values: Mapping[str, str]) -> None:
        for place in self.places:
            try:
                write_grubenv(place / "grubenv", values)
            except OSError as error:
                raise BentoError(f"{place / 'grubenv'}: {error.strerror}") from None


def parse_grub(text: str) -> list[BootEntry]:
    """The entries of a grub.cfg in their order, submenus among them. A name leads through the submenus, as GRUB's
    `default` has it; GRUB cannot be led to a title that begins or ends with >."""
    entries: list[BootEntry] = []
    path: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if found := re.match(GRUB_BLOCK, line):
            path.append(found[3].replace(">", ">>"))
            entries.append(BootEntry(">".join(path), top=len(path) == 1))
        if not path or not words:
            continue
        if words[0] in ("linux", "module") and system_of(line):
            entries[-1] = entries[-1]._replace(system=system_of(line), kernel=words[1])
        elif words[0] in ("initrd", "module") and len(words) > 1:
            entries[-1] = entries[-1]._replace(initrd=words[1])
        if words[-1] == "}":
            path.pop()
    return entries


def grub_default(text: str) -> str:
    """The system that GRUB starts by itself; empty, where that is not what `switch-to-configuration boot` sets."""
    default = re.findall(r'^\s*set default="?([0-9]+)"?\s*$', text, re.MULTILINE)
    tops = [entry for entry in parse_grub(text) if entry.top]
    return tops[int(default[0])].system if len(default) == 1 and int(default[0]) < len(tops) else ""


class Mount(NamedTuple):
    point: str
    kind: str
    plain: bool


def mount_of(settings: Settings, path: Path) -> Mount | None:
    """The file system that a path lies on: where it is mounted, its type, and whether it is on a partition as such (no
    LVM, RAID, loop)."""
    root = Path(settings.root) if settings.system_path("/proc/self/mountinfo").exists() else Path("/")
    inside = "/" + os.path.relpath(os.path.realpath(path), os.path.realpath(root)).removeprefix(".")
    best: tuple[str, str, str] | None = None
    for line in (root / "proc/self/mountinfo").read_text("utf-8", "replace").splitlines():
        fields = line.split()
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        kind = fields[fields.index("-") + 1]
        within = inside == point or inside.startswith(point.rstrip("/") + "/")
        if within and kind != "autofs" and (best is None or len(point) >= len(best[0])):
            best = point, kind, fields[2]
    if best is None:
        return None
    device = os.path.realpath(root / f"sys/dev/block/{best[2]}")
    plain = os.path.exists(f"{device}/partition") and "/devices/virtual/block/" not in device
    return Mount(best[0], best[1], plain)


def read_grubenv(path: Path) -> dict[str, str]:
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BentoError(f"{path}: {error.strerror}") from None
    lines = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in lines}


def write_grubenv(path: Path, values: Mapping[str, str]) -> None:
    """Sets variables in GRUB's file, those without a value not at all. In place: GRUB itself overwrites its blocks, so
    they must stay, and it does not read a journal that would tell of a new file."""
    data = path.read_bytes() if path.exists() else b""
    size = len(data) or GRUBENV_BYTES
    lines = [line for line in (data or GRUBENV_HEAD).splitlines(keepends=True) if line.endswith(b"\n")]
    lines = [line for line in lines if line.partition(b"=")[0].decode(errors="replace") not in values]
    lines += [f"{name}={value}\n".encode() for name, value in values.items() if value]
    new = b"".join(lines).ljust(size, b"#")
    if new == data or (not data and not any(values.values())):
        return
    if len(new) > size:
        raise BentoError(f"{path} is full: remove what is not needed with grub-editenv")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, new, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not data:
        sync_disk(path.parent)  # not into the journal only


def find_loader(settings: Settings) -> Loader:
    kind, *places = settings.boot_loader or ("",)
    kinds = {"systemd-boot": SystemdBoot, "lanzaboote": Lanzaboote, "grub": Grub}
    if kind not in kinds or not places:
        return Loader(settings)
    return kinds[kind](settings, [settings.system_path(place) for place in places])


# --- this machine ---


class Switch(NamedTuple):
    """`began`: something was changed, whatever the exit code. `finished`: all of it was, and the right system runs."""

    done: Done
    began: bool
    finished: bool


class Facts(NamedTuple):
    """Where this machine stands. Each is a system; a specialisation counts as the system that it belongs to.

    `default` is what the profile names, and so the next boot.
    """

    running: str
    booted: str
    default: str
    boot_id: str


def load_state(settings: Settings, log: Log) -> State:
    return read_journal(settings.state / "state.json", parse_state, log) or State()


class Machine:
    """What a command works on, and the only door to it: this machine's systems, boot loader, files and server.

    `directory`: of this process, in the state directory, as sftp sees it. `session`: an open connection to the server.
    `watchdog`: the timer that guards what this process does.
    """

    def __init__(self, settings: Settings, directory: str = "", *, log: str = "deploy.log") -> None:
        self.settings, self.directory = settings, directory
        self.log = Log(settings.state / log)
        self.state = self.written = load_state(settings, self.log)
        self.loader = find_loader(settings)
        self.profile = settings.system_path("/nix/var/nix/profiles/system")
        self.way_back = settings.system_path(WAY_BACK)
        self.session: Sftp | None = None
        self.watchdog: str | None = None
        self.phase_since: str | None = None

    def remember(self, **changes: Any) -> None:
        """Changes state.json, where it says something else."""
        self.state = self.state._replace(**changes)  # what cannot be written down is told to the server at least
        if self.state != self.written:
            write_atomic(self.settings.state / "state.json", encode(self.state))
            self.written = self.state

    @property
    def running(self) -> str:
        return os.path.realpath(self.settings.system_path("/run/current-system"))

    @property
    def booted(self) -> str:
        """What was booted; what runs, where that is not known."""
        booted = os.path.realpath(self.settings.system_path("/run/booted-system"))
        return booted if os.path.exists(booted) else self.running

    @property
    def default(self) -> str:
        return os.path.realpath(self.profile) if self.profile.exists() else self.running

    @property
    def boot_id(self) -> str:
        """The kernel's name for this boot."""
        path = self.settings.system_path("/proc/sys/kernel/random/boot_id")
        return (path if path.exists() else Path("/proc/sys/kernel/random/boot_id")).read_text().strip()

    @property
    def mark(self) -> str | None:
        """A hash of what no other machine has: of the system's id, and of the board's, for a disk may be a copy."""
        import hashlib

        places = ("/etc/machine-id", "/sys/class/dmi/id/product_uuid", "/proc/device-tree/serial-number")
        ids = []
        for place in places:
            with suppress(OSError):
                ids.append(self.settings.system_path(place).read_bytes().strip())
        return hashlib.sha256(b"\n".join((b"bento", *ids))).hexdigest()[:16] if any(ids) else None

    @property
    def has_systemd(self) -> bool:
        return self.settings.system_path("/run/systemd/system").is_dir()

    def facts(self, *more: str) -> Facts:
        """`more`: systems besides those of state.json that a specialisation may belong to."""
        state, default = self.state, self.default
        owners = [system for system in (*more, default, state.system, state.good, state.previous) if system]
        running, booted = (owner_of(system, owners)[0] for system in (self.running, self.booted))
        return Facts(running, booted, default, self.boot_id)

    def variant(self, system: str) -> str:
        """What to activate of a system: the specialisation that this machine runs, where the system has it, too."""
        _, name = owner_of(self.running, [self.default, self.state.system or "", self.state.good or ""])
        chosen = os.path.realpath(Path(system, "specialisation", name)) if name else system
        return chosen if os.path.exists(chosen) else system

    @property
    def good(self) -> str:
        """The last system that a boot has proven. Where the state does not know it: the one to fall back to; before Bento has
        seen one, what this machine was booted with."""
        good = self.state.good or self.kept
        return good if good and os.path.exists(good) else self.facts().booted

    @property
    def kept(self) -> str:
        """The system to fall back to, by its profile."""
        return os.path.realpath(self.way_back) if self.way_back.exists() else ""

    @property
    def on_trial(self) -> str | None:
        """The boot default of Bento's that no boot has proven yet."""
        state = self.state
        return state.system if state.good not in (None, state.system) and state.system == self.default else None

    @property
    def trial_way(self) -> str:
        """How a system that has never booted gets its first boot: as Loader.trial_way, and from what came of it here."""
        way, new = self.loader.trial_way(), self.on_trial
        if way.startswith("none"):
            return way
        if self.state.forgets:
            return f"none: the firmware forgot what it was told for {way}"
        if new is not None and not self.state.armed:
            return f"none: {way} has no entry to fall back to, or could not be told"
        return way

    def loader_of(self, system: str) -> Loader:
        """The boot loader that a system writes: a release may bring another one."""
        ours, asked = self.settings.boot_loader, tuple(self.asked("boot_loader", system))
        return find_loader(self.settings._replace(boot_loader=asked)) if ours and asked != ours else self.loader

    def notice_forgotten(self) -> None:
        """After a boot: what is left of what the boot loader was told. It removes the one shot before it starts the system,
        and nothing else. So where the one shot is still there, the system was not started, and not tried."""
        state = self.state
        if self.on_trial is not None and state.armed and state.boot != self.boot_id:
            with best_effort(self.log):
                told = self.loader.armed()
                taken = told.default and told.once != state.once
                self.remember(forgets=not told.default, once=state.once if taken else "")

    def has_kernel_of(self, system: str) -> bool:
        """Whether this boot has the system's kernel, initrd, modules and parameters, as far as it says."""
        return boot_parts(self.booted) == boot_parts(self.variant(system))

    def releases(self) -> dict[str | None, tuple[str | None, str | None]]:
        """The systems that are remembered: the release and revision of each, where it was one of Bento's."""
        s = self.state
        return {
            s.previous: (s.previous_release, s.previous_revision),
            s.good: (s.good_release, s.good_revision),
            s.system: (s.release, s.revision),
        }

    def asked(self, setting: str, system: str) -> Any:
        """What a system has in a setting; where it does not say, what we run with."""
        ours, asked = getattr(self.settings, setting), settings_of(system).get(setting)
        if isinstance(ours, tuple) and isinstance(asked, list):
            return [str(each) for each in asked]
        return asked if isinstance(asked, type(ours)) else ours

    def is_ours(self, told: Armed) -> bool:
        """Whether the one shot is ours, or none: by what we wrote down, or what it is for. GRUB's is ours always."""
        ours = {self.state.system or "", (told.mark.split() or [""])[0]} - {""}
        names = {entry.name for entry in self.loader.list_entries() if entry.system in ours}
        return isinstance(self.loader, Grub) or told.once in ("", self.state.once, self.state.slept, *names)

    def why_no_reboot(self, new: str) -> str | None:
        """Why we are not to reboot into a system that has never booted: it would be no trial."""
        if self.trial_way.startswith("none"):
            allowed = self.settings.reboot_without_trial and self.asked("reboot_without_trial", self.running)
            return None if allowed else "no trial here, see rebootWithoutTrial"
        with suppress(BentoError):
            if self.loader.armed()[:2] == (self.loader.entry_of(self.good).name, self.loader.entry_of(new).name):
                return None
        return "the boot loader is told to start another system"

    @property
    def needs_reboot(self) -> bool:
        """Whether a boot would give another kernel (or initrd, modules, parameters), or a system that could not go live."""
        waits = self.on_trial is not None and self.facts().running != self.on_trial
        return waits or not self.has_kernel_of(self.default)

    def show_units(self, properties: str, units: Sequence[str]) -> dict[str, str]:
        """What systemd says of units; nothing, where it does not say it of all."""
        if not units or not self.has_systemd:
            return {}
        argv = ["systemctl", "show", f"--property={properties}", "--", *units]
        said = run(argv, check=False, timeout=60).output.strip().split("\n\n")
        return dict(zip(units, said, strict=True)) if len(said) == len(units) else {}

    def still_failed(self) -> tuple[str, ...]:
        """The units that failed at the last activation, but for those that systemd knows to be well by now."""
        said = self.show_units("LoadState,ActiveState", self.state.failed_units)
        well = [
            unit for unit, words in said.items() if "=loaded" in words and not re.search("=failed|=activating", words)
        ]
        return tuple(unit for unit in self.state.failed_units if unit not in well)

    def note_active(self) -> None:
        """Before an attempt: what is active. In /run, for it is of one boot."""
        if self.has_systemd:
            kinds = "--type=service,socket,timer,path,mount"
            argv = ["systemctl", "list-units", "--state=active", kinds, "--plain", "--no-legend", "--no-pager"]
            said = run(argv, check=False, timeout=60).output.splitlines()
            units = [line.split()[0] for line in said if line.strip()]
            passing = r"(bento|run|user|session|systemd-(?!networkd|resolved|timesyncd))[-@.].*"
            units = [unit for unit in units if not re.fullmatch(passing, unit)]
            self.settings.system_path("/run/bento-active").write_text("\n".join(units))

    def were_active(self) -> list[str]:
        """What was active before the attempt."""
        with suppress(OSError):
            return self.settings.system_path("/run/bento-active").read_text().split()
        return []

    def down_units(self, units: Sequence[str]) -> tuple[str, ...]:
        """Those that are not active. D-Bus starts some when they are wanted."""
        said = self.show_units("ActiveState,BusName,WantedBy,RequiredBy", units)
        down = {unit: words for unit, words in said.items() if re.search("(?m)^ActiveState=(inactive|failed)", words)}
        called = r"(?ms)^BusName=\S(?!.*^(WantedBy|RequiredBy)=\S)"
        return tuple(unit for unit, words in down.items() if not re.search(called, words))

    def switch_holder(self) -> str:
        """Whose switch is at work, if one is. That of 2024 would wait for it, today's would refuse."""
        path = self.settings.system_path("/run/nixos/switch-to-configuration.lock")
        try:
            with open(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return ""
        except BlockingIOError:
            with suppress(OSError, ValueError, IndexError):
                if pid := lock_holder(path):
                    return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
            return "somebody"
        return ""

    def is_booting(self) -> bool:
        said = run(["systemctl", "is-system-running"], check=False, timeout=30).output if self.has_systemd else ""
        return said.strip() in ("initializing", "starting")

    def start_list(self) -> bytes | None:
        """What a switch has still to start. It is there from before the first unit is stopped until the last is started."""
        try:
            return self.settings.system_path("/run/nixos/start-list").read_bytes()
        except OSError:
            return None

    def has_bus(self) -> bool:
        """Whether D-Bus answers: without it no switch comes to its end."""
        words = ["org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetId"]
        argv = ["busctl", "--system", "--timeout=10", "call", *words]
        return not self.has_systemd or run(argv, check=False, timeout=30).code in (0, 127)

    def activate(self, system: str, token: str, *, back: bool = False) -> Switch:
        """`switch-to-configuration test`, and what it really did."""
        before, list_before = self.running, self.start_list()
        done = self.switch(system, "test", token, back=back)
        running, left = self.running, self.start_list()
        began = done.code in (0, 2, 4) or running != before or left not in (None, list_before)
        return Switch(done, began, done.code in (0, 4) and left is None and running == os.path.realpath(system))

    def switch(self, system: str, action: str, token: str, *, back: bool = False) -> Done:
        """Runs the system's switch-to-configuration. Its exit code is None when it did not end in time. `back`: without its
        checks, which may never forbid a way back.

        Under systemd in a transient unit: the switch may stop, restart or kill whatever it likes, us included.
        """
        self.log.say(f"switch-to-configuration {action}: {system}")
        before = size_of(self.log.path)
        argv = [*(("env", "NIXOS_NO_CHECK=1") if back else ()), f"{system}/bin/switch-to-configuration", action]
        limit_s = self.settings.activation_timeout
        with self.log.output() as out:
            if not self.has_systemd:
                code = run(argv, check=False, output=out, timeout=limit_s).code
            else:
                code = run_in_unit(argv, f"bento-switch-{token}-{os.urandom(3).hex()}", out, limit_s)
        return Done(code, self.log.tail(max(0, min(size_of(self.log.path) - before, 1 << 18))))

    def queue(self) -> list[list[str]]:
        """systemd's jobs: number, unit, kind and state of each."""
        if not self.has_systemd:
            return []
        said = run(["systemctl", "list-jobs", "--no-legend", "--no-pager"], check=False, timeout=30).output
        return [words for line in said.splitlines() if len(words := line.split()) == 4]

    def waits_for(self) -> str:
        """What systemd is waiting for: of a switch that hangs, the cause."""
        jobs = [f"{unit} ({kind})" for _, unit, kind, state in self.queue() if state == "running"]
        return f"systemd waits for {', '.join(jobs)}" if jobs else ""

    def jobs(self) -> list[int]:
        """The numbers of the jobs in systemd's queue, those first that wait for others. They grow; a boot's first is 1."""
        return [int(words[0]) for words in sorted(self.queue(), key=lambda words: words[3] == "running")]

    def end_switches(self, pending: Pending) -> None:
        """Ends what an attempt started and left, with the jobs that were queued since: a unit that waits for one that hangs
        would start after the way back. Not during a boot or a shutdown, when the jobs are others'.
        """
        if not self.has_systemd:
            return
        run(["systemctl", "stop", f"bento-switch-{pending.token}-*.service"], check=False, timeout=60)
        state = run(["systemctl", "is-system-running"], check=False, timeout=30).output.strip()
        if pending.job is None or pending.boot_id != self.boot_id or state not in ("running", "degraded"):
            return
        if queued := [str(job) for job in self.jobs() if job > pending.job]:
            run(["systemctl", "cancel", *queued], check=False, timeout=60)

    def nix_env(self, *words: str, profile: Path | None = None) -> None:
        argv = ["nix-env", "-p", str(profile or self.profile), *words]
        with self.log.output() as out:
            run(argv, output=out, timeout=self.settings.activation_timeout)

    def generations(self) -> dict[int, str]:
        """The profile's generations: their numbers, and their systems."""
        pattern = re.compile(re.escape(self.profile.name) + r"-([0-9]+)-link")
        links = self.profile.parent.iterdir() if self.profile.parent.is_dir() else ()
        found = {int(match[1]): link for link in links if (match := pattern.fullmatch(link.name))}
        return {number: os.path.realpath(link) for number, link in sorted(found.items())}

    def undo_default(self, system: str, failed: str) -> None:
        """Back to an earlier generation; the failed one goes, for it would push a good one out of the boot menu."""
        numbers = newest(self.generations())
        try:
            self.nix_env("--switch-generation", str(numbers[system]))
        except (KeyError, BentoError):
            self.nix_env("--set", system)
        if failed in numbers and failed not in (system, self.state.previous, self.good):
            with best_effort(self.log):
                self.nix_env("--delete-generations", str(numbers[failed]))

    def keep(self, system: str) -> None:
        """Makes a system the one to fall back to: whoever collects garbage, and each `boot`, leaves it and its entry."""
        with best_effort(self.log):
            if os.path.realpath(self.way_back) != system and not has_left(self.default):
                self.way_back.parent.mkdir(parents=True, exist_ok=True)
                self.nix_env("--set", system, profile=self.way_back)
                self.nix_env("--delete-generations", "old", profile=self.way_back)
            root = self.settings.system_path("/nix/var/nix/gcroots/bento-way-back")  # which 1.1 kept
            if os.path.realpath(root) == system:
                remove(root)

    def leave(self, system: str) -> None:
        """Nothing of ours stays in the boot menu of a system without Bento. The menu is written once more, for loader.conf
        may name our entry."""
        links = [*self.way_back.parent.glob(f"{self.way_back.name}-*-link"), self.way_back]
        if any(link.is_symlink() for link in links):
            with best_effort(self.log):
                for link in links:
                    remove(link)
                self.write_menu(system)

    def can_fall_back(self, good: str, new: str) -> bool:
        """Whether there is a boot entry to fall back to, that the next `boot` does not take. It is not written anew once `new`,
        which is to be tried, is the default."""
        self.keep(good)
        with best_effort(self.log):
            fault = self.loader.entry_fault(good)
            if fault is None and (self.loader.lasts(good) or self.default == new):
                return True
            if fault is not None:
                self.end_trial()  # first: what is written now may be broken, and must not be what is preferred
            self.write_menu(self.default)
        return self.loader.entry_fault(good) is None and (self.loader.lasts(good) or self.default == new)

    def end_trial(self) -> None:
        """Takes back what is ours in the boot loader's variables; tried again at each run until it is done."""
        if self.state.armed:
            with best_effort(self.log):
                told = self.loader.armed()
                self.loader.clear(self.state.set_before, told.once if self.is_ours(told) else "")
                self.loader.forget_end()
                self.remember(armed=False, set_before="", once="")
        if tell_trial(self.settings, "proven") and self.has_systemd:
            run(["systemctl", "stop", "bento-proof.timer"], check=False, timeout=60)

    def write_menu(self, system: str) -> None:
        """The boot menu once more. Without a unit, for it may be the shutdown: `boot` touches no other."""
        run([f"{system}/bin/switch-to-configuration", "boot"], timeout=self.settings.activation_timeout)
        self.flush_menu(system)

    def flush_menu(self, system: str) -> None:
        """After each `boot` of a system. Without it there is more to lose in a power cut, and no more than that."""
        with best_effort(self.log):
            self.loader_of(system).flush()

    @property
    def trial_s(self) -> int:
        """For how many seconds a boot may go without a proof, until the process that ends a trial reboots."""
        return (self.settings.offline_after or TRIAL_S) if runs_bento(self.good) else FIRST_TRIAL_S

    @property
    def patience_s(self) -> float:
        """For how many seconds a decision may wait that need not be made at once. Less than the trial: our own way back is
        the gentler one."""
        return max(self.trial_s / 2, self.trial_s - 600 - self.settings.confirm_timeout)

    def trial_age_s(self) -> float:
        """For how many seconds the client has tried to prove this boot, without those that the machine slept. The first try
        tells the process that ends a trial how much longer to wait. In /run: it is of one boot, and a full disk must not
        keep a machine from counting."""
        path, now_s = self.settings.system_path("/run/bento-proofs"), time.monotonic()
        try:
            return now_s - float(path.read_text())
        except (OSError, ValueError):
            with best_effort(self.log):
                path.write_text(f"{now_s}\n")
                tell_trial(self.settings, str(self.trial_s // 10))
                if self.has_systemd:
                    run(["systemctl", "start", "bento-proof.timer"], check=False, timeout=60)
        return 0.0

    def trial_mark(self, new: str) -> str:
        """What the first boot of a system is to know of itself: its name, its deadline in seconds, and whether it may ask for
        a passphrase, as the last boot of the system that is known to boot did."""
        basic = ["systemctl", "show", "--property=ActiveEnterTimestampMonotonic", "--value", "basic.target"]
        took_us = run(basic, check=False, timeout=30).output.strip() if self.has_systemd else ""
        seconds = max(TRIAL_BOOT_S, 3 * int(took_us) // 10**6 if took_us.isdigit() else 0)
        asks = settings_of(self.good).get("asks") and not self.asked_nobody()
        return f"{new} {seconds}" + (" asks" if asks else "")

    def asked_nobody(self) -> bool:
        """Whether this boot is known to have asked for no passphrase, as where a chip has it: where systemd's initrd keeps its
        questions, nothing ever was. Another initrd leaves no trace."""
        questions = self.settings.system_path("/run/systemd/ask-password")
        initrd = ["systemctl", "show", "--property=InitRDTimestampMonotonic", "--value"]
        if not self.has_systemd or run(initrd, check=False, timeout=30).output.strip() in ("", "0"):
            return False
        said = run(["stat", "--format=%.9W %.9Y", str(questions)], check=False, timeout=30).output.split()
        return len(said) == 2 and float(said[0]) > 0 and said[0] == said[1]

    def sitting(self) -> str:
        """Who is logged in at a seat of this machine: not over the network, and not the login screen."""
        if not self.has_systemd:
            return ""
        listed = run(["loginctl", "list-sessions", "--no-legend", "--no-pager"], check=False, timeout=30).output
        if not (sessions := [words[0] for line in listed.splitlines() if (words := line.split())]):
            return ""
        argv = ["loginctl", "show-session", "--property=Name,Seat,Class,State", *sessions]
        said = run(argv, check=False, timeout=30).output
        each = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in said.split("\n\n")]
        there = [found for found in each if found.get("Seat") and found.get("Class") == "user"]
        return ", ".join(sorted({found.get("Name", "") for found in there if found.get("State") != "closing"}))

    def reboot(self, *, force: bool = False) -> None:
        """A boot, whatever kernel somebody has loaded for kexec, or tree laid out for a soft reboot. `force`: whatever inhibits
        it, and where there is no bus: logind, which a `systemctl reboot` asks first, for 25 s a question, may not be there.
        """
        boot = ["env", "SYSTEMCTL_SKIP_AUTO_KEXEC=1", "SYSTEMCTL_SKIP_AUTO_SOFT_REBOOT=1", "systemctl", "reboot"]
        start = ["systemctl", "start", "--no-block", "--job-mode=replace-irreversibly", "reboot.target"]
        if not force:
            run(boot, timeout=60)
        elif run(start, check=False, timeout=60).code != 0:
            run([*boot, "--force"], timeout=60)

    def hang_up(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None


def tell_trial(settings: Settings, word: str) -> bool:
    """Tells what ends a trial that does not come up (utils/bento.nix): `proven`, `sleep`, or how many times ten seconds are
    left. Whether somebody listened: outside of a trial nobody does."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        pipe = os.open(settings.system_path("/run/bento-trial"), flags)
        with open(pipe, "wb", buffering=0) as file:
            file.write(f"{word}\n".encode())
    except OSError:  # there is none, or nobody reads it (ENXIO)
        return False
    return True


def newest(generations: Mapping[int, str]) -> dict[str, int]:
    """The number of each system's newest generation."""
    return {system: number for number, system in sorted(generations.items())}


def owner_of(system: str, owners: Sequence[str]) -> tuple[str, str]:
    """The system that `system` is a specialisation of, and the name of that; itself, and no name, where it is none.

    NixOS links SYSTEM/specialisation/NAME to a system that does not know what it belongs to.
    """
    above, found, name = system.partition("/specialisation/")
    if found:
        return above, name.split("/")[0]
    for owner in owners if system not in owners else ():
        for link in sorted(Path(owner, "specialisation").glob("*")):
            if os.path.realpath(link) == system:
                return owner, link.name
    return system, ""


def boot_parts(system: str) -> list[str | None]:
    """What of a system only a boot can change: where its kernel, initrd and kernel modules lie, and its parameters."""
    links = (Path(system) / name for name in ("kernel", "initrd", "kernel-modules"))
    parts = [os.path.realpath(link) if link.is_symlink() or link.exists() else None for link in links]
    try:
        return [*parts, Path(system, "kernel-params").read_text(errors="replace").strip()]
    except OSError:
        return [*parts, None]


def run_in_unit(argv: Sequence[str], unit: str, out: IO[bytes], limit_s: float) -> int | None:
    """The exit code of a program that runs in a unit of its own. It is the unit that is asked: systemd-run --wait says 0
    when the bus goes away, and who only starts something as root needs no bus."""
    sink = "null" if out.name == os.devnull else f"append:{out.name}"
    wrapped = [
        "systemd-run", "--quiet", "--service-type=exec", f"--unit={unit}",
        f"--property=StandardOutput={sink}", f"--property=StandardError={sink}",
        f"--property=RuntimeMaxSec={limit_s}", "--property=TimeoutStopSec=10",
        *transient_environment("LOCALE_ARCHIVE"), "--", *argv,
    ]  # fmt: skip
    give_up = time.monotonic() + limit_s + WATCHDOG_MARGIN_S
    started = run(wrapped, check=False, output=out, timeout=60).code
    wait_for_units(unit, give_up)
    properties = "--property=LoadState,ActiveState,Result,ExecMainStatus"
    said = run(["systemctl", "show", properties, f"{unit}.service"], check=False, timeout=30).output
    run(["systemctl", "reset-failed", f"{unit}.service"], check=False, timeout=30)
    found = dict(line.partition("=")[::2] for line in said.splitlines())
    result, status = found.get("Result"), found.get("ExecMainStatus", "")
    if found.get("ActiveState") not in ("inactive", "failed") or result == "timeout":
        return None
    if result == "success":  # what has ended well is not loaded any more; nor is what was never started
        return 0 if started == 0 or found.get("LoadState") == "loaded" else 1
    return int(status) * (-1 if result in ("signal", "core-dump") else 1) if status.isdecimal() else 1


def wait_for_units(pattern: str, give_up: float) -> None:
    """Until none of these units is active, or the monotonic clock says `give_up`."""
    while run(["systemctl", "is-active", "--quiet", pattern], check=False, timeout=30).code == 0:
        if time.monotonic() > give_up:
            return
        time.sleep(0.5)


def transient_environment(*names: str) -> list[str]:
    return [f"--setenv={name}={os.environ[name]}" for name in names if name in os.environ]


def call_later(settings: Settings, unit: str, delay_s: float, *words: str) -> None:
    client = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(__file__), *words]
    run(
        ["systemd-run", "--quiet", "--collect", f"--unit={unit}", f"--on-active={int(delay_s)}",
         "--timer-property=AccuracySec=1s", "--timer-property=DefaultDependencies=no",
         "--property=DefaultDependencies=no", *transient_environment("PATH", "HOME", "LOCALE_ARCHIVE", "NIX_REMOTE"),
         "--", *client, *settings_argv(settings)],
        timeout=60,
    )  # fmt: skip


def inhibited(before: str, system: str) -> bool:
    """Whether a live switch between these systems would break what runs (NixOS' switch inhibitors). The way back asks this,
    too, though it leaves out the pre-switch checks: those may refuse for a while, this holds."""
    said = []
    for each in (before, system):
        with suppress(OSError, ValueError):
            said.append(json.loads(Path(each, "switch-inhibitors").read_bytes()))
    return len(said) == 2 and any(said[1].get(name, value) != value for name, value in said[0].items())


def runs_bento(system: str) -> bool:
    return Path(system, "sw/bin/bento-client").exists()


def has_left(system: str) -> bool:
    """Whether a system says that its owner no longer wants Bento on it."""
    return Path(system, "etc/bento/left").exists()


def settings_of(system: str) -> dict[str, Any]:
    """What a system has in its /etc/bento/client.json; nothing, where that cannot be read."""
    try:
        found = json.loads(Path(system, "etc/bento/client.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def best_effort(log: Log) -> Iterator[None]:
    """For what must not keep a machine from going back to its old system: a full disk, a watchdog that cannot start."""
    try:
        yield
    except (OSError, BentoError) as error:
        log.say(f"going on without: {words_of(error)}")


# --- reports ---


def paused_until(machine: Machine) -> str | None:
    """Until when a person wants nothing deployed. In the same boot nobody's clock makes it longer; after that, one which
    was set back to before the pause ends it."""
    pause = read_journal(machine.settings.state / "pause.json", parse_pause, machine.log)
    if pause is None:
        return None
    if pause.boot == machine.boot_id:
        holds = time.clock_gettime(time.CLOCK_BOOTTIME) < pause.end_s
    else:
        holds = parse_time(pause.since) <= time.time() < parse_time(pause.until)
    return pause.until if holds else None


def make_report(machine: Machine, phase: Phase = Phase.IDLE) -> Report:
    state, running, trial = machine.state, machine.facts().running, machine.on_trial
    release, revision = machine.releases().get(running, (None, None))
    if phase == Phase.IDLE and has_left(machine.default):
        phase = Phase.LEFT
    return Report(
        host=machine.settings.host,
        client=VERSION,
        polled=format_time(time.time()),
        phase=phase,
        release=release,
        system=machine.running,
        needs_reboot=machine.needs_reboot,
        last=state.last,
        revision=revision,
        failed_units=machine.still_failed() + machine.down_units(state.down_units),
        waiting_for_boot=state.release if trial is not None and trial != running else None,
        paused_until=paused_until(machine),
        boot_trial=machine.trial_way,
        known_to_boot=machine.good,
        signer=state.pinned and state.pinned.signer,
        expires=vouched_until(state),
        first_contact=first_contact(machine.settings),
        machine=machine.mark,
        since=machine.phase_since if phase == Phase.BUILDING else None,
        interval=machine.settings.interval,
        offline_after=machine.settings.offline_after or None,
        reboot=None if machine.settings.reboot == "never" else machine.settings.reboot,
    )


def write_report(machine: Machine, phase: Phase) -> str:
    """A fresh status.json: its name for sftp."""
    name = f"{machine.directory}/status.json"
    path = machine.settings.state / name
    path.write_bytes(encode(make_report(machine, phase)))
    path.chmod(0o640)
    return name


def announce(machine: Machine, phase: Phase, session: Sftp | None = None) -> None:
    """Tells the server what comes next. That it has no room for it is no reason to stop."""
    session = session or machine.session
    assert session is not None
    machine.phase_since = machine.phase_since or format_time(time.time())
    with suppress(OSError):  # on a full disk there is no report to send
        session.put(write_report(machine, phase), "status.json", optional=True)


@contextmanager
def heartbeat(machine: Machine) -> Iterator[None]:
    """Says that we are still building, over connections of its own: a long silence would look like a dead machine."""
    import threading  # not for a poll

    ended, server = threading.Event(), machine.session.server if machine.session else ""

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            with suppress(BentoError, OSError):
                session = knock(machine.settings, machine.log, server)
                try:
                    announce(machine, Phase.BUILDING, session)
                finally:
                    session.close()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def deliver(machine: Machine, phase: Phase = Phase.IDLE) -> None:
    """Uploads the logs in the outbox, oldest first, then a fresh status.json; keeps the newest logs on the server."""
    session, outbox = machine.session, machine.settings.state / "outbox"
    assert session is not None
    waiting = sorted(path.name for path in outbox.glob("*.log") if LOG_NAME.fullmatch(path.name))
    for name in waiting:
        session.put(f"outbox/{name}", name)
        (outbox / name).unlink()
    session.put(write_report(machine, phase), "status.json")
    name_holder(machine.settings, str(os.getpid()), f"{format_time(time.time())} {session.server}")
    if waiting:
        there = re.findall(rf"(?m)^(?:logs/)?({LOG_NAME.pattern})\s*$", session.do("-ls -1 logs"))
        old = sorted(set(there) - set(waiting))
        surplus = len(old) - max(0, KEEP_LOGS - len(waiting))
        for name in old[: min(max(0, surplus), KEEP_LOGS)]:
            session.do(f"-rm logs/{name}")


def report(machine: Machine, phase: Phase = Phase.IDLE) -> None:
    """Delivers over the open connection if that still works, else over a new one; else it waits in the outbox."""
    failures: list[str] = []
    for server in (None, *machine.settings.server):
        try:
            if server is not None:
                machine.hang_up()
                machine.session = connect(machine.settings, server, machine.log)
            if machine.session is not None:
                deliver(machine, phase)
                return
        except (BentoError, OSError) as error:
            failures.append(words_of(error))
    machine.log.say(f"report kept for the next run: {'; '.join(failures)}")


class Outcome(NamedTuple):
    """How an attempt ended. `unreachable`: because of the line or the server, not of the release. `cost`: where the result
    does not say it. `failed_units`: at an activation that went well; `down_units`: see State."""

    result: Result
    reason: str = ""
    system: str | None = None
    unreachable: bool = False
    cost: Cost | None = None
    failed_units: tuple[str, ...] = ()
    down_units: tuple[str, ...] = ()

    @property
    def costs(self) -> Cost:
        if self.result in (Result.ROLLED_BACK, Result.ROLLBACK_FAILED, Result.INTERRUPTED):
            return self.cost or Cost.VERDICT
        return self.cost or (Cost.WORK if self.result == Result.BUILD_FAILED else Cost.POLL)

    @property
    def exit_code(self) -> int:
        return 0 if self.result == Result.OK else Unreachable.exit_code if self.unreachable else 1


def tell_bug(log: Log, error: Exception) -> str:
    import traceback  # only a bug needs it

    log.say(traceback.format_exc())
    return f"a bug in Bento: {type(error).__name__}: {error}; the traceback is in the log"


def run_hooks(machine: Machine, pending: Pending, outcome: Outcome) -> None:
    """Tells the commands of `after_deployment` how it ended. It is written down and reported by then: nothing that they do
    counts, and they have a limit."""
    told = {"RESULT": outcome.result, "REASON": one_line(outcome.reason), "REVISION": pending.revision or ""}
    told["RELEASE"] = pending.release if pending.release != NO_RELEASE else ""
    env = os.environ | {f"BENTO_{name}": str(value) for name, value in told.items()}
    for command in machine.asked("after_deployment", machine.running):
        with open(2, "wb", buffering=0, closefd=False) as journal, best_effort(machine.log):
            started = start(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=journal, env=env)
            code, _ = finish(started, HOOK_LIMIT_S)
            end_group(started)  # with what it has left
            if code != 0:
                machine.log.say(f"after_deployment failed ({how_ended(code)}): {one_line(command, 100)}")


def keep_log(machine: Machine, name: str) -> None:
    """Moves the log of an attempt into the outbox, which keeps the newest ones."""
    outbox = machine.settings.state / "outbox"
    try:
        outbox.mkdir(mode=0o700, exist_ok=True)
        machine.log.hand_over(outbox / name)
    except OSError as error:
        machine.log.say(f"the log could not be kept: {error.strerror}")
    for old in sorted(outbox.glob("*.log"))[:-KEEP_LOGS]:
        old.unlink()


def record(machine: Machine, pending: Pending, outcome: Outcome) -> None:
    """How an attempt ended: its log goes into the outbox, the rest into state.json.

    What was about an older release, that waited for a boot, leaves the newest one's result in its place.
    """
    state, now_s = machine.state, time.time()
    words = ": ".join(filter(None, (outcome.result, outcome.reason)))
    machine.log.say(words if outcome.result == Result.OK else f"error: {words}")
    release = pending.release if pending.release != NO_RELEASE else None
    last = Last(
        release=release,
        result=outcome.result,
        reason=one_line(outcome.reason),
        system=outcome.system,
        started=pending.started,
        finished=format_time(now_s),
        attempt=pending.attempt,
        log=log_name(now_s, release, outcome.result),
        revision=pending.revision,
    )
    keep_log(machine, last.log)
    same = state.tried is not None and state.tried.release == release
    older = pending.trial and state.tried is not None and not same
    changes: dict[str, Any] = {"last": state.tried if older and outcome.result == Result.OK else last}
    if release is not None and not older:
        before = state if same and not is_meant_again(state, pending.published) else State()
        wait_s = pause_s(outcome.result, outcome.costs, before)
        # A way back that fails once more is no further verdict: its first failure was one.
        owed = before.tried is not None and before.tried.result == Result.ROLLBACK_FAILED
        given_up = MOST_VERDICTS * (outcome.costs == Cost.GIVEN_UP)
        doubts = given_up or before.doubts + (outcome.costs == Cost.VERDICT and not owed)
        changes |= {"tried": last, "published": pending.published, "doubts": doubts}
        changes["not_before"] = format_time(now_s + wait_s) if wait_s else None
    if outcome.result in (Result.POSTPONED, Result.INTERRUPTED):
        changes["rebooted"] = None
    if outcome.result == Result.OK:
        changes["failed_units"] = outcome.failed_units
        with best_effort(machine.log):
            changes["pinned"] = pin(state, pending.release, pending.new)
    if outcome.result == Result.OK or outcome.down_units:
        changes["down_units"] = outcome.down_units
    machine.remember(**changes | what_is_where(machine, pending, outcome))


def what_is_where(machine: Machine, pending: Pending, outcome: Outcome) -> dict[str, Any]:
    """What an outcome changes of the systems that are remembered, each with its release."""
    state, new, facts = machine.state, pending.new, machine.facts(pending.new)
    releases, good = machine.releases(), machine.good
    changes: dict[str, Any] = {}
    if outcome.result == Result.OK and outcome.system == new == facts.default:
        old = owner_of(pending.old, [facts.default, state.system or "", good])[0]
        if state.system != new:
            changes = {"boot": facts.boot_id}
            if old != new:
                release, revision = releases.get(old, (None, None))
                changes |= {"previous": old, "previous_release": release, "previous_revision": revision}
        releases[new] = (pending.release, pending.revision)
        good = new if facts.booted == facts.running == new else good
    elif (state.system == new or pending.by_hand) and new != facts.default == pending.profile:
        changes = {"boot": facts.boot_id}
        if state.previous == facts.default:
            changes |= {"previous": None, "previous_release": None, "previous_revision": None}
    else:
        return {}
    machine.keep(good)
    changes["system"], (changes["release"], changes["revision"]) = (
        facts.default,
        releases.get(facts.default, (None, None)),
    )
    changes["good"], (changes["good_release"], changes["good_revision"]) = good, releases.get(good, (None, None))
    return changes


# --- fetch and build ---


def fetch(session: Sftp, settings: Settings, current: Current, *, thrifty: bool) -> None:
    """Downloads, checks and unpacks a release into config.new. Whatever goes wrong, config/ stays what it is.

    What one server does not bring, in time and whole, the next one may: a release is known by its SHA-256, whoever has
    it. `thrifty`: what lies in config/ already is not downloaded again.
    """
    tar = make_room(settings, current)
    failures: list[BentoError] = []
    for server in sorted(settings.server, key=lambda server: server != session.server):
        source = session
        try:
            if server != session.server:
                source = connect(settings, server, Log(settings.state / "deploy.log"))
            fetch_from(source, settings, current, tar, thrifty=thrifty and not failures)
            unpack(tar, settings.state / "config.new")
            break
        except Unreachable as error:
            failures.append(error)  # the next server, or the next run, goes on where the line broke
        except BentoError as error:
            failures.insert(0, error)
            clear_download(settings)
        except OSError:
            clear_download(settings)
            raise
        finally:
            if source is not session:
                source.close()
    else:
        whole = "; ".join(str(failure) for failure in failures)
        raise Unreachable(whole) if isinstance(failures[0], Unreachable) else failures[0]
    remove(tar.parent)


def make_room(settings: Settings, current: Current) -> Path:
    """Where the release's archive is to go. What is left of other downloads goes."""
    if current.size > MAX_RELEASE_BYTES:
        raise BentoError(
            f"release {current.release[:12]} has {current.size} bytes, more than the limit of {MAX_RELEASE_BYTES}"
        )
    remove(settings.state / "config.new")
    partial = settings.state / "partial"
    partial.mkdir(mode=0o700, exist_ok=True)
    tar = partial / f"{current.release}.tar"
    wanted = {tar.name: current.size} | {part.sha256: part.size for part in current.parts}
    for left in partial.iterdir():
        if left.stat().st_size > wanted.get(left.name, -1):
            left.unlink()
    here = sum(left.stat().st_size for left in partial.iterdir())
    free, needed = free_bytes(settings.state), 2 * current.size + MIN_FREE_BYTES - here
    if free < needed:
        raise BentoError(f"{settings.state}: {free} bytes free, {needed} needed: free some space")
    return tar


def clear_download(settings: Settings) -> None:
    remove(settings.state / "config.new")
    remove(settings.state / "partial")


def fetch_from(session: Sftp, settings: Settings, current: Current, tar: Path, *, thrifty: bool) -> None:
    """Downloads the archive from one server, and checks it."""
    tar.parent.mkdir(mode=0o700, exist_ok=True)
    begun, remote = any(tar.parent.iterdir()), f"releases/{tar.name}"
    if thrifty:
        join_parts(session, settings, current, tar)
    if not tar.exists() or tar.stat().st_size < current.size:
        session.get(remote, f"partial/{tar.name}", current.size, resume=tar.exists())
    digest = hash_file(tar)
    if begun and digest != current.release:  # a server that answers out of order leaves holes where the line breaks
        session.get(remote, f"partial/{tar.name}", current.size)
        digest = hash_file(tar)
    size = tar.stat().st_size
    remedy = "remove it on the server, 'bento.py populate' makes it anew"
    if size != current.size:
        raise BentoError(f"releases/{tar.name}: {size} bytes came, {current.size} were announced: {remedy}")
    if digest != current.release:
        raise BentoError(f"releases/{tar.name}: its SHA-256 is {digest[:12]}…: damaged; {remedy}")


def join_parts(session: Sftp, settings: Settings, current: Current, tar: Path) -> None:
    """Puts the archive together from what config/ has of it and from downloads of its other parts.

    Nothing here has to be right: the archive is checked as a whole. It is left alone when there is nothing to save.
    """
    here = find_parts(settings.state / "config", current.parts)
    if not here:
        return
    import shutil

    with open(tar, "ab") as file:
        end = 0
        for part in current.parts:
            start, end = end, end + part.size
            if file.tell() >= end:
                continue  # an earlier run came so far
            file.seek(start)
            file.truncate()
            name = part.sha256
            fetched = tar.with_name(name)
            if name not in here:
                session.get(
                    f"releases/{current.release}.parts/{name}", f"partial/{name}", part.size, resume=fetched.exists()
                )
            with open(here.get(name, fetched), "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            fetched.unlink(missing_ok=True)


def find_parts(tree: Path, parts: Sequence[Part]) -> dict[str, Path]:
    """Which files of the tree are parts of a release, by SHA-256. Only files of the right size are read."""
    sizes = {part.size for part in parts}
    paths = [Path(top, name) for top, _, names in os.walk(tree) for name in names] if parts else []
    found = {hash_file(path): path for path in paths if path.is_file() and path.stat().st_size in sizes}
    return {part.sha256: found[part.sha256] for part in parts if part.sha256 in found}


def hash_file(path: Path) -> str:
    import hashlib  # 4 ms of a start, which a probe has no use for

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


BLOCK = 512
INVALID = "the release is no valid archive"


class Entry(NamedTuple):
    """One member of an archive. `size` in bytes, for a file; a directory has none."""

    name: str
    size: int | None
    executable: bool


def unpack(tar_path: Path, target: Path) -> None:
    """Unpacks a release into a new directory `target`. BentoError for anything that `populate` would not have made."""
    remove(target)
    target.mkdir(mode=0o755)
    directories = [target]
    try:
        with open(tar_path, "rb") as tar:
            while (entry := read_entry(tar)) is not None:
                path = target / entry.name
                if entry.size is None:
                    path.mkdir(mode=0o755)
                    directories.append(path)
                else:
                    unpack_file(tar, entry.size, path, 0o755 if entry.executable else 0o644)
        for directory in reversed(directories):
            os.utime(directory, (1, 1))
            os.chmod(directory, 0o755)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise BentoError(f"{INVALID}: {error.strerror}: {one_line(repr(error.filename), 120)}") from None


def unpack_file(tar: IO[bytes], size: int, path: Path, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        left = size
        while left:
            chunk = read_exactly(tar, min(left, 1 << 20))
            file.write(chunk)
            left -= len(chunk)
        os.fchmod(descriptor, mode)
    os.utime(path, (1, 1))
    read_exactly(tar, -size % BLOCK)


def read_exactly(tar: IO[bytes], size: int) -> bytes:
    data = tar.read(size)
    if len(data) != size:
        raise BentoError(f"{INVALID}: it ends in the middle of a member")
    return data


def read_entry(tar: IO[bytes]) -> Entry | None:
    """The next member of an archive as `populate` writes them, None at its end.

    That is much less than tar knows: a directory or a regular file, behind at most one pax header, which gives its name.
    So nothing here can be chained, nested or huge.
    """
    block = read_exactly(tar, BLOCK)
    if not any(block):
        return None
    name, kind, size = read_header(block)
    if kind == b"x":
        if size > 2 * MAX_NAME_BYTES:
            raise BentoError(f"{INVALID}: a header of {size} bytes")
        records = read_pax(read_exactly(tar, size + -size % BLOCK)[:size])
        block = read_exactly(tar, BLOCK)
        name, kind, size = read_header(block)
        name = records.pop("path", name)
        if records:
            kind = b"?"  # it says more of the member than is known here
    if kind == b"5":
        name = name.removesuffix("/")
    where = one_line(repr(name), 120)
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise BentoError(f"the release has a member with the unsafe name {where}")
    if len(parts) > MAX_DEPTH + 1 or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise BentoError(f"the release has a member {len(parts) - 1} directories deep: {where}")
    if kind not in (b"0", b"5") or (kind == b"5" and size):
        raise BentoError(f"the release has {where}, which is neither a file nor a directory")
    return Entry(name, size if kind == b"0" else None, bool(read_octal(block[100:108]) & 0o100))


def read_header(block: bytes) -> tuple[str, bytes, int]:
    """Name, kind and size of the member that follows."""
    total = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    if total != read_octal(block[148:156]):
        raise BentoError(f"{INVALID}: a header's checksum is wrong")
    name = block[:100].partition(b"\0")[0]
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise BentoError(f"{INVALID}: a name that is not UTF-8: {one_line(repr(name), 120)}") from None
    return text, block[156:157], read_octal(block[124:136])


def read_octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{0,12}", digits):
        raise BentoError(f"{INVALID}: {one_line(repr(field), 40)} is no number")
    return int(digits or b"0", 8)


def read_pax(raw: bytes) -> dict[str, str]:
    """The records of a pax header: each has its length, a name and a value."""
    records: dict[str, str] = {}
    while raw:
        found = re.match(rb"([0-9]{1,5}) ([^=\n]{1,100})=", raw)
        end = int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(raw) or raw[end - 1 : end] != b"\n":
            raise BentoError(f"{INVALID}: a malformed pax header")
        try:
            records[found[2].decode()] = raw[found.end() : end - 1].decode()
        except UnicodeDecodeError:
            raise BentoError(f"{INVALID}: a name that is not UTF-8") from None
        raw = raw[end:]
    return records


def is_untouched(tree: Path) -> bool:
    """Whether an unpacked tree is as it was unpacked: a build that was killed may have left a flake.lock in it."""
    return tree.is_dir() and all(
        int(os.lstat(os.path.join(top, name)).st_mtime) == 1
        for top, directories, files in os.walk(tree)
        for name in (*directories, *files)
    )


def adopt(machine: Machine, release: str) -> None:
    """Makes config.new the new config/. In between there is none that counts: state.json names what config/ holds."""
    sync_disk(machine.settings.state)
    machine.remember(unpacked=None)
    remove(machine.settings.state / "config")
    os.rename(machine.settings.state / "config.new", machine.settings.state / "config")
    machine.remember(unpacked=release)


def read_recipe(tree: Path, host: str) -> Recipe:
    """How a tree is built for a host."""
    try:
        raw = (tree / "bento.json").read_bytes()
    except FileNotFoundError:
        return Recipe(host)
    return parse_recipe(raw, "bento.json", host)


def is_flake(tree: Path, recipe: Recipe) -> bool:
    return not recipe.file and (tree / recipe.directory / "flake.nix").exists()


def flake_url(tree: Path, directory: str, commit: str | None = None) -> str:
    """A flake's address for Nix. With `?dir=` it may read what lies beside its directory, as it may in its owner's
    repository; Nix before 2.24, and Lix, have no such thing for a path. With `?rev=` it sees its commit; lastModified is that
    of the files, which is the same everywhere, and which some versions of Nix insist on. A path has no SHA-256 commits."""
    words = [f"rev={commit}"] if commit is not None and len(commit) == 40 else []
    if directory:
        said = run(["nix", "--version"], check=False, timeout=60).output
        found = re.search(r"\(Nix\) (\d+)\.(\d+)", said)
        whole = found is not None and (int(found[1]), int(found[2])) >= (2, 24)
        words = [f"dir={directory}", *words] if whole else words
        tree = tree if whole else tree / directory
    return f"path:{tree}?{'&'.join(words)}".rstrip("?")


def rebuild_argv(action: str, tree: Path, recipe: Recipe, commit: str | None = None) -> list[str]:
    """nixos-rebuild's command line, on both sides."""
    if is_flake(tree, recipe):
        where = flake_url(tree, recipe.directory, commit)
        # Nix's cache of what it has evaluated takes the same files of another commit for the same.
        fresh = ["--option", "eval-cache", "false"] if "rev=" in where else []
        return ["nixos-rebuild", action, "--flake", f"{where}#{recipe.attribute}", *fresh, *recipe.options]
    if recipe.file:
        file = tree / recipe.directory / recipe.file
        return [
            "nixos-rebuild", action, "--no-flake", "--file", f"{file}", "--attr", recipe.attribute, *recipe.options,
        ]  # fmt: skip
    entry = tree / recipe.directory / "configuration.nix"
    return ["nixos-rebuild", action, "--no-flake", "-I", f"nixos-config={entry}", *recipe.options]


def build_argv(settings: Settings, config: Path, commit: str | None = None) -> list[str]:
    recipe = read_recipe(config, settings.host)
    channels = not recipe.file and not is_flake(config, recipe)
    upgrade = channels and (settings.upgrade_channels or settings.rebuild_every)
    return [*rebuild_argv("build", config, recipe, commit), *(["--upgrade"] if upgrade else [])]


@contextmanager
def unchanged_lock(tree: Path) -> Iterator[None]:
    """Takes back what Nix writes into flake.lock while it builds: the tree stays the release, byte for byte."""
    path = tree / "flake.lock"
    before = path.read_bytes() if path.exists() else None
    try:
        yield
    finally:
        if (path.read_bytes() if path.exists() else None) != before:
            if before is None:
                path.unlink()
            else:
                write_atomic(path, before, 0o644)
                os.utime(path, (1, 1))
            os.utime(tree, (1, 1))


def out_of_memory(since_s: float) -> str:
    """What the kernel or systemd-oomd has said since then, if memory ran out."""
    words = "out of memory: Killed process|Killed .* due to memory"
    argv = ["journalctl", "--quiet", "--boot", "--output=cat", f"--since=@{since_s:.0f}", f"--grep={words}"]
    done = run(argv, check=False, timeout=60)
    said = [line for line in done.output.splitlines() if re.search(words, line, re.IGNORECASE)]
    return f"killed, out of memory: {one_line(said[-1], 120)}" if done.code == 0 and said else ""


def make_result(settings: Settings, log: Log, argv: Sequence[str], find: Callable[[str], str] = find_cause) -> str:
    """Runs what is to leave a system in `result`, where nothing collects it, and returns its store path."""
    link, what = settings.state / "result", shlex.join(argv[:2])
    remove(link)
    log.say(shlex.join(argv))
    started_s = time.time()
    with log.output() as out:
        code = run(argv, check=False, output=out, cwd=settings.state, timeout=settings.build_timeout).code
    if code is None:
        raise BentoError(f"{what} did not end within {settings.build_timeout} s")
    if code != 0:
        cause = log.cause(find)
        killed = out_of_memory(started_s) if code in (-9, 137) or "signal 9" in cause else ""
        raise BentoError(f"{what}: exit {code}: {' '.join(filter(None, (killed, cause)))}")
    new = os.path.realpath(link)
    if not Path(new, "bin/switch-to-configuration").exists():
        raise BentoError(f"{what} left no system in {link}")
    return new


def build(settings: Settings, log: Log, commit: str | None, *, signed: bool = False) -> str:
    """Builds config/, which that commit made, and returns the new system's store path. The running system is not touched."""
    config = settings.state / "config"
    check_options(
        read_recipe(config, settings.host),
        settings.allow_options,
        "services.bento.allowOptions, in a release without it,",
    )
    argv = build_argv(settings, config, commit)
    if signed and "--flake" in argv:
        argv.append("--no-update-lock-file")  # an input that nobody locked is one that nobody signed
    with unchanged_lock(config / read_recipe(config, settings.host).directory):
        return make_result(settings, log, argv)


def realise(settings: Settings, log: Log, current: Current, cache_key: str = "") -> str:
    """Fetches the system that was built elsewhere from this machine's substituters, and returns its store path. Nothing is
    evaluated or built here, and Nix checks what comes: by the keys that it trusts, or, of a signed release, by the signer's
    alone. A signed text names only a path; what may lie there is decided by the keys that Nix trusts."""
    if current.system is None:
        missing = "what is signed of it names no system: 'bento.py sign --build'"
        missing = missing if current.signer else "the server has not built it: 'bento.py populate --build'"
        raise BentoError(f"release {current.release[:12]} is not to be built here, and {missing}")
    # That a cache did not have it a while ago says nothing.
    argv = ["nix-store", "--realise", current.system, "--add-root", str(settings.state / "result")]
    argv += ["--option", "narinfo-cache-negative-ttl", "0"]
    if current.signer:
        if not cache_key:
            raise BentoError(
                "what is signed and built elsewhere needs services.bento.cacheKey, the key of 'bento.py sign --build':"
                " the key of the server's cache says nothing of who signed"
            )
        argv += ["--option", "trusted-public-keys", cache_key, "--option", "require-sigs", "true"]
    new = make_result(settings, log, argv, why_not_fetched)
    if new != current.system:
        raise BentoError(f"{current.system} is not a store path: it leads to {new}")
    return new


# --- proof ---


class Failure(NamedTuple):
    """Why a system proved nothing. `unreachable`: it may be the line's or the server's fault. `slept`: or of a closed lid."""

    reason: str
    unreachable: bool = False
    slept: bool = False


def probe_system(machine: Machine, system: str, limit_s: float) -> str | None:
    """None when the system's own client, with the system's own settings, reaches the server; else why not.

    A system without one (activated by force, leaving Bento, or older than it) is judged by this client.
    """
    client = Path(system, "sw/bin/bento-client")
    if not client.exists():
        return probe_failure(machine.settings)
    done = run([str(client), "probe"], check=False, timeout=limit_s)
    with machine.log.output() as out, suppress(OSError):
        out.write(done.output.encode())
    if done.code == 0:
        return None
    said = [line for line in done.output.splitlines() if line.strip()]
    return one_line(said[-1].removeprefix("bento: error: ")) if said else "bento-client probe said nothing"


NO_TIME = Failure("no time was left for the health checks")


def check_health(machine: Machine, system: str, give_up: float) -> Failure | None:
    """`give_up`: when time is up for all checks together, on the monotonic clock."""
    timer = ["systemctl", "is-active", "--quiet", "bento.timer"]
    if machine.has_systemd and runs_bento(system) and run(timer, check=False, timeout=10).code != 0:
        return Failure("bento.timer is not active in the new system")
    for command in machine.asked("health_checks", system):
        left_s = give_up - time.monotonic()
        if left_s <= 0:
            return NO_TIME
        with machine.log.output() as out:
            code = run(["sh", "-c", command], check=False, output=out, timeout=left_s).code
        if code != 0:
            return Failure(f"health check failed ({how_ended(code)}): {one_line(command, 100)}")
    return None


def prove(machine: Machine) -> Failure | None:
    """None when the system that runs does its job: its client reaches the server anew, its timer and checks are well."""
    system, limit_s = machine.running, machine.settings.confirm_timeout
    give_up, began_s = time.monotonic() + limit_s, time.clock_gettime(time.CLOCK_BOOTTIME)  # it counts sleep, too
    machine.log.say(f"proof: {system}/sw/bin/bento-client probe, for at most {limit_s} s")
    told: Failure | None = None

    def check() -> Failure | None:
        nonlocal told
        words = probe_system(machine, system, max(give_up - time.monotonic(), 1.0))
        failure = check_health(machine, system, give_up) if words is None else Failure(f"new system: {words}", True)
        told = told if told is not None and failure == NO_TIME else failure  # what failed before says more
        return told

    failure = until(limit_s, check)
    return failure and failure._replace(slept=time.clock_gettime(time.CLOCK_BOOTTIME) - began_s > limit_s + 10)


# --- activation: what can lose a machine ---
#
# The profile is the last system that proved itself. Whatever else runs is an attempt, and an attempt that is not
# settled is undone. The journal, pending.json, is there as long as one is under way; state.json's `good` is the last
# system that a boot has proven. `settle` looks at both, and at the machine, and decides.


class Move(StrEnum):
    """What is to be done about what an earlier process, or a boot, left."""

    REST = "rest"
    WAIT = "wait"  # for the boot default's first boot
    COMMIT = "commit"  # it proved itself, and the boot default may be half changed
    PROVE = "prove"  # it has booted, for the first time
    FELL_BACK = "fell back"  # it was started, and is not what came up
    GO_BACK = "go back"


def settle(pending: Pending | None, state: State, facts: Facts) -> Move:
    if pending is not None:
        committing = pending.step == Step.COMMITTING and facts.running == pending.new
        if committing and pending.boot_id == facts.boot_id:
            return Move.COMMIT
        return Move.PROVE if committing and facts.booted == pending.new else Move.GO_BACK
    if state.good in (None, state.system) or state.system != facts.default:
        return Move.REST  # proven, or a person's
    if state.boot == facts.boot_id:
        return Move.WAIT
    if facts.booted == state.system:
        return Move.PROVE
    return Move.WAIT if state.armed and not state.once else Move.FELL_BACK  # a boot that was none of its


# --- journal and watchdog ---


def load_pending(machine: Machine) -> Pending | None:
    return read_journal(machine.settings.state / "pending.json", parse_pending, machine.log)


def save_pending(machine: Machine, pending: Pending) -> None:
    write_atomic(machine.settings.state / "pending.json", encode(pending))


def clear_pending(machine: Machine) -> None:
    """The end of an attempt, whichever way it went: a watchdog that comes late finds no journal."""
    remove(machine.settings.state / "pending.json")
    sync_directory(machine.settings.state)


def arm(machine: Machine, token: str, step: str, limit_s: float) -> None:
    """Arms a watchdog, outside our unit, that runs `rollback` in `limit_s` seconds; then ends the one before. One that is
    armed already for this step stays as it is.

    It gets these settings as flags and this very file of the old system, because an activation changes what lies in
    /etc. Without default dependencies: emergency mode stops whatever needs sysinit.target. OnActiveSec counts on
    CLOCK_MONOTONIC, which nobody can set.
    """
    unit = f"bento-watchdog-{token}-{step}"
    is_armed = ["systemctl", "is-active", "--quiet", f"{unit}.timer"]
    if not machine.has_systemd or (unit == machine.watchdog and run(is_armed, check=False, timeout=30).code == 0):
        return
    call_later(machine.settings, unit, limit_s, "rollback", "--token", token)
    disarm(machine)
    machine.watchdog = unit


def disarm(machine: Machine) -> None:
    if machine.watchdog is not None and machine.has_systemd:
        run(["systemctl", "stop", f"{machine.watchdog}.timer"], check=False, timeout=60)
    machine.watchdog = None


def advance(machine: Machine, pending: Pending, step: str, limit_s: float, *, deadline: bool = True) -> Pending:
    """The next step of an attempt, on disk before anything of it is done, with its watchdog's name and a deadline, unless it
    keeps the one that it has."""
    pending = pending._replace(watchdog=f"bento-watchdog-{pending.token}-{step}")
    if deadline:
        pending = pending._replace(deadline_s=time.monotonic() + limit_s, deadline_boot=machine.boot_id)
    save_pending(machine, pending)
    arm(machine, pending.token, step, limit_s + WATCHDOG_MARGIN_S)
    return pending


# --- commit ---


def make_default(machine: Machine, system: str, pending: Pending) -> str | None:
    """Makes a system the boot default, forward or back; None, or why it is not. Unless a boot has proven it, its next boot
    is a trial: the boot loader is told to start it once, and after that the last system that is known to boot. In this
    order, a cut leaves no default that has never booted.
    """
    good, forward = machine.good, system == pending.new
    try:
        if machine.default != system and not forward:
            machine.undo_default(system, pending.new)
        trial = prepare_trial(machine, system, good, must=forward)
        if forward:
            machine.nix_env("--set", system)
    except BentoError as error:
        return f"the boot default could not be set: {words_of(error)}"
    done = machine.switch(system, "boot", pending.token, back=not forward)
    machine.flush_menu(system)
    fault = machine.loader_of(system).entry_fault(system)
    if forward and fault is None and done.code == 0:
        fault = write_again(machine, system, good)
    # On a full /boot nothing can be written. On the way back that does no harm, where the menu is as it was, whichever
    # boot loader the new system has.
    as_it_was = not forward and fault is None and machine.loader_of(pending.new).starts(system)
    if done.code != 0 and not as_it_was:
        return f"the boot loader could not be written ({how_ended(done.code)}): {switch_words(done.output)}"
    wanted = wants_trial(machine, system, good)  # as it is written now
    if fault is None and trial and wanted:
        fault = begin_trial(machine, system, good, must=forward)
    elif fault is None and not wanted:  # else what the boot loader has been told leads back still
        machine.end_trial()
    return fault


def write_again(machine: Machine, system: str, good: str) -> str | None:
    """NixOS' builders leave a copy that is there as it is, so one with other bytes is removed, and the menu written once
    more. If its bytes differ again, the owner wants it so (a signature), and that is accepted."""
    loader = machine.loader_of(system)
    try:
        copies = loader.altered(system, good)
        for copy in copies:
            machine.log.say(f"{copy} has other bytes than the system's: written once more")
            remove(copy)
        if copies:
            machine.write_menu(system)
    except (OSError, BentoError) as error:
        return f"the boot loader could not be written: {words_of(error)}"
    return loader.entry_fault(system)


def begin_trial(machine: Machine, system: str, good: str, *, must: bool) -> str | None:
    """The second half of what the boot loader is told, once the menu is written; None, or why not where it `must` be."""
    try:
        try_once(machine, system, good)
    except BentoError as error:
        machine.log.say(f"the next boot is no trial: {words_of(error)}")
        return f"its first boot would be no trial: {words_of(error)}" if must else None
    return None


def commit(machine: Machine, pending: Pending, note: str = "") -> Outcome | None:
    if (point := machine.loader.unmounted()) is not None:
        words = f"{point} is not mounted: the boot loader would not see what is written"
        return go_back(machine, pending, Outcome(Result.POSTPONED, words))
    pending = pending._replace(step=Step.COMMITTING, committed=True)
    pending = advance(machine, pending, pending.step, 2 * machine.settings.activation_timeout)
    machine.keep(machine.good)
    trouble = make_default(machine, pending.new, pending)
    if trouble is not None:
        return go_back(machine, pending, Outcome(Result.POSTPONED, trouble))
    if has_left(pending.new):
        machine.leave(pending.new)
    return Outcome(Result.OK, note, pending.new)


# --- the way back ---


def find_way_back(pending: Pending, facts: Facts, owner: str, good: str) -> tuple[str | None, str | None]:
    """What to make the boot default again, and what to activate again; None where that is well, or a person's choice.

    `owner`: the system that `pending.old` belongs to. After a boot, what ran before is not what to go back to.
    """
    mine = facts.default in (pending.new, pending.profile, good)
    default = pending.profile if mine and (pending.committed or facts.default != pending.profile) else None
    if pending.boot_id != facts.boot_id:
        away = facts.running == pending.new and facts.running != pending.profile
        return default, pending.profile if away else None
    began = pending.switched and facts.running == owner  # units may be stopped that are to run
    return default, pending.old if began or facts.running in (pending.new, pending.between) else None


def activate_again(machine: Machine, pending: Pending, system: str) -> tuple[Switched, str]:
    """The old system, live; and why it is not. After a boot into the new one, its kernel goes on: then only where that helps."""
    if inhibited(machine.running, system):
        return Switched.NEEDS_BOOT, "it cannot go live"
    switch = machine.activate(system, pending.token, back=True)
    if switch.finished:
        stuck = machine.facts(pending.new).booted == pending.new and not machine.has_kernel_of(system)
        return Switched.NEEDS_BOOT if stuck and reach(machine, system) is not None else Switched.LIVE, ""
    code, output = switch.done
    needs_boot = not switch.began and code == 100
    return Switched.NEEDS_BOOT if needs_boot else Switched.FAILED, f"{how_ended(code)}: {switch_words(output)}"


def reach(machine: Machine, system: str) -> str | None:
    """None when the server is reached from the old system. Either client will do: we may be that of a release with wrong
    settings, or run with others than the system's."""
    limit_s = machine.settings.confirm_timeout
    return until(limit_s, lambda: probe_system(machine, system, limit_s) and probe_failure(machine.settings))


def go_back(machine: Machine, pending: Pending, outcome: Outcome) -> Outcome | None:
    """Back to the old system, the one way there is; then finds out whose fault it was. None: a reboot leads there.

    `outcome` is what to report if all goes well. The journal stays where it does not, and the next run tries again.
    """
    machine.log.say(f"going back to {pending.old}: {outcome.reason}")
    if outcome.result == Result.POSTPONED:
        outcome = outcome._replace(cost=Cost.WORK)
    pending, late = begin_way_back(machine, pending, outcome)
    machine.end_switches(pending)
    facts, owner = machine.facts(pending.new, pending.profile), owner_of(pending.old, [pending.profile])[0]
    default, system = find_way_back(pending, facts, owner, machine.good)
    trouble = None if default is None else make_default(machine, default, pending)
    came, why = (Switched.LIVE, "") if system is None else activate_again(machine, pending, system)
    if trouble is not None:
        with best_effort(machine.log):  # what is live again is not activated at each run
            save_pending(machine, pending._replace(switched=pending.switched and came != Switched.LIVE))
        words = f"the boot default could not be set back to {pending.profile}: {trouble}: tried again at the next run"
        return Outcome(Result.ROLLBACK_FAILED, f"{outcome.reason}; and {words}")
    if came == Switched.LIVE:
        return blame(machine, pending, name_down(machine, outcome))
    stuck = facts.booted == pending.new or came == Switched.NEEDS_BOOT
    lost = machine.has_systemd and not pending.by_hand and (late or not machine.has_bus())
    if stuck or (lost and pending.rebooting in ("", machine.boot_id)):
        return go_back_by_boot(machine, pending, outcome, force=not stuck)
    words = f"going back to {system} failed: {why}: tried again at the next run"
    return Outcome(Result.ROLLBACK_FAILED, f"{outcome.reason}; and {words}")


def begin_way_back(machine: Machine, pending: Pending, outcome: Outcome) -> tuple[Pending, bool]:
    """Its journal and its watchdog, and whether its time is over. That is set once: no later run gives it more."""
    limit_s = float(machine.settings.activation_timeout + machine.settings.confirm_timeout)
    known = pending.step == Step.ROLLING_BACK and pending.deadline_boot == machine.boot_id
    left_s = pending.deadline_s - time.monotonic() if known else limit_s
    pending = pending._replace(step=Step.ROLLING_BACK, verdict=outcome.result, reason=one_line(outcome.reason))
    step, wait_s = ("late", limit_s) if left_s <= 0 else (pending.step, left_s)  # what is done late is guarded, too
    with best_effort(machine.log):
        pending = advance(machine, pending, step, wait_s, deadline=not known)
    return pending, left_s <= 0


def name_down(machine: Machine, outcome: Outcome) -> Outcome:
    down = machine.down_units(machine.were_active())
    reason = f"{outcome.reason}; not active any more: {', '.join(down)}" if down else outcome.reason
    return outcome._replace(reason=reason, down_units=down)


def go_back_by_boot(machine: Machine, pending: Pending, outcome: Outcome, *, force: bool) -> Outcome | None:
    """Once, and whatever the setting `reboot` says: no other way is left. A person decides for themselves."""
    if pending.by_hand or pending.rebooting not in ("", machine.boot_id) or not machine.has_systemd:
        return outcome._replace(reason=f"{outcome.reason}; the old system takes effect at the next reboot")
    if pending.trial and machine.trial_age_s() < machine.patience_s and (who := machine.sitting()):
        raise BentoError(f"the way back waits for its reboot: {who} is at this machine: {outcome.reason}")
    machine.log.say("a reboot is to lead back")
    with best_effort(machine.log):
        save_pending(machine, pending._replace(rebooting=machine.boot_id))
    machine.reboot(force=force)
    return None


def blame(machine: Machine, pending: Pending, outcome: Outcome) -> Outcome:
    """A release that seemed bad is not to blame for a server or a line that is down."""
    if outcome.result != Result.ROLLED_BACK or pending.by_hand or reach(machine, machine.running) is None:
        return outcome
    reason = f"{outcome.reason}; nor can the old one: not the release's fault, tried again later"
    return outcome._replace(result=Result.POSTPONED, reason=reason, unreachable=True, cost=Cost.WORK)


# --- the attempt ---


def take_over(machine: Machine, pending: Pending) -> Outcome | None:
    """Activates, proves and commits the new system; goes back from what does not prove itself."""
    new, note, units = machine.variant(pending.new), "", tuple[str, ...]()
    if machine.running != new:
        if machine.settings.activation == "boot" and not pending.between:
            return wait_for_boot(machine, pending, "")
        switch = machine.activate(new, pending.token)
        code, output = switch.done
        switched = judge_switch(switch)
        if switched != Switched.LIVE:
            return not_live(machine, pending, switched, switch.done)
        if code == 4:
            units = tuple(failed_units(output))
            users = re.findall("warning: (user activation for .*) failed", output)
            note = f"activated, but these units failed: {', '.join((*units, *users)) or 'see the log'}"
    pending = advance(machine, pending, "proving", machine.settings.confirm_timeout)
    failure, facts = prove(machine), machine.facts(pending.new)
    if facts.running != pending.new or facts.default not in (pending.profile, pending.new):
        words = "somebody has switched this machine meanwhile: theirs stays until the next publication"
        return Outcome(Result.OK, words, pending.new)
    if failure is not None:
        return go_back(
            machine, pending, Outcome(Result.POSTPONED if failure.slept else Result.ROLLED_BACK, failure.reason)
        )
    outcome = commit(machine, pending, note)
    return outcome and outcome._replace(failed_units=units)


def not_live(machine: Machine, pending: Pending, switched: Switched, done: Done) -> Outcome | None:
    waits = machine.waits_for() if done.code is None else ""
    words = f"switch-to-configuration test: {how_ended(done.code)}: {waits or switch_words(done.output)}"
    if switched == Switched.NEEDS_BOOT:
        return wait_for_boot(machine, pending, "it cannot go live: ")
    if switched == Switched.REFUSED:
        holder = machine.switch_holder()
        words = f"{holder} holds its lock" if holder and "Could not acquire lock" in done.output else words
        return give_up(machine, pending, Outcome(Result.POSTPONED, f"not activated: {words}"))
    if switched == Switched.BROKEN:
        return go_back(machine, pending, Outcome(Result.INTERRUPTED, f"broke in the middle: {words}"))
    return go_back(machine, pending, Outcome(Result.ROLLED_BACK, words))


def give_up(machine: Machine, pending: Pending, outcome: Outcome) -> Outcome | None:
    """Before anything was done. After an earlier way back that failed, that is what there is to do."""
    return go_back(machine, pending._replace(switched=False), outcome) if pending.committed else outcome


def wait_for_boot(machine: Machine, pending: Pending, why: str) -> Outcome | None:
    """Makes a system that cannot, or shall not, go live the next boot's, which is to prove it."""
    if (unfit := unfit_for_boot(machine, pending)) is not None:
        return give_up(machine, pending, Outcome(Result.BUILD_FAILED, unfit))
    words = "it takes effect at the next reboot, and is proven then"
    return commit(machine, pending._replace(switched=False), why + words)


def activate(machine: Machine, pending: Pending) -> Outcome | None:
    """take_over, with the journal and the watchdog around it, and a way back from our own failures too."""
    if holder := machine.switch_holder():
        return Outcome(Result.POSTPONED, f"not activated: {holder} holds the lock of switch-to-configuration")
    if not machine.has_systemd:
        machine.log.say("systemd does not run here: no watchdog guards this activation")
    try:
        machine.note_active()
        pending = pending._replace(job=max(machine.jobs(), default=0))
        pending = advance(machine, pending, pending.step, machine.settings.activation_timeout)
    except (OSError, BentoError) as error:
        return Outcome(Result.POSTPONED, f"not activated, the watchdog could not be armed: {words_of(error)}")
    try:
        return take_over(machine, pending)
    except (OSError, BentoError) as error:
        return go_back(machine, load_pending(machine) or pending, Outcome(Result.POSTPONED, words_of(error)))
    except Exception as error:  # a bug of ours must not leave a machine on a system that proved nothing
        outcome = Outcome(Result.INTERRUPTED, tell_bug(machine.log, error))
        return go_back(machine, load_pending(machine) or pending, outcome)


def conclude(machine: Machine, pending: Pending, outcome: Outcome) -> None:
    """Writes the end of an attempt down, and only then forgets that it was under way; reports it, and only then lets
    its watchdog go: a client may hang in its report too.
    """
    ended = outcome.result != Result.ROLLBACK_FAILED
    try:
        record(machine, pending, outcome)
        left = load_pending(machine)
        if ended and left is not None and left.token == pending.token:  # else it is of a way back that is owed
            clear_pending(machine)
    finally:  # on a full disk the journal stays, and the server hears of it at least
        report(machine)
        machine.hang_up()
    if ended:
        disarm(machine)
    run_hooks(machine, pending, outcome)


# --- boots ---


def find_lost_trial(machine: Machine) -> None:
    """Where state.json is gone, or older, and what the boot loader was told is not: that names the system on trial, and the one
    that is known to boot. From here on it is settled as ever; but the trial is over with the boot of the latter."""
    told, entries = Armed(), list[BootEntry]()
    with best_effort(machine.log):
        told, entries = machine.loader.armed(), machine.loader.list_entries()
    if machine.state.armed or not told.mark:
        return
    new = told.mark.split()[0]
    new = new if new.startswith("/") else machine.default
    good = next(
        (entry.system for entry in entries if entry.name == told.default and entry.system), machine.facts().booted
    )
    once = next((entry.name for entry in entries if entry.system == new and not entry.top), "") or "gone"
    machine.log.say(f"error: {lost_words(machine)}")
    machine.remember(system=new, good=good, armed=True, once=once, boot=None, lost=machine.boot_id)


def lost_words(machine: Machine) -> str:
    return f"{machine.settings.state}/state.json was lost during a trial: see that this directory outlives a boot"


def align_trial(machine: Machine) -> None:
    """Makes the boot loader's variables say what the next boot is to be: a trial of the boot default, or nothing of ours.

    A person's new default ends a trial, and so does its proof.
    """
    new, good = machine.on_trial, machine.good
    if new is None:
        machine.end_trial()
    elif machine.state.armed:
        with best_effort(machine.log):
            try_once(machine, new, good)


def prepare_trial(machine: Machine, system: str, good: str, *, must: bool) -> bool:
    """Makes the system that is known to boot the standing default, before another becomes it. False: no trial here. Where the
    boot loader can be told, and the next boot `must` be a trial, BentoError; unless what is the default does not boot."""
    loader = machine.loader
    if not wants_trial(machine, system, good):
        return False
    try:
        lead_back_to(machine, good, system)
    except BentoError as error:
        if must and loader.entry_fault(machine.default) is None:
            raise
        machine.log.say(f"the next boot cannot be a trial: {words_of(error)}")
        return False
    return True


def wants_trial(machine: Machine, system: str, good: str) -> bool:
    """Where only the limit of entries decides what there is to fall back to, and that is not there, it goes without."""
    loader = machine.loader
    if system == good or not runs_bento(system) or loader.trial_way().startswith("none"):
        return False
    return loader.lists_profiles or loader.entry_fault(good) is None


def lead_back_to(machine: Machine, good: str, new: str) -> None:
    loader = machine.loader
    if not machine.can_fall_back(good, new):
        why = loader.entry_fault(good) or "no entry that lasts could be written"
        raise BentoError(f"its first boot could not lead back: {why}")
    told, ours = loader.armed(), loader.entry_of(good).name
    # Before it is changed: what a person had set is put back. What is marked as ours, of a lost state, is not.
    if not machine.state.armed:
        before = "" if told.mark or told.default == ours else told.default
        loader.forget_end()
        machine.remember(armed=True, set_before=before)
    loader.prefer(good, told.mark if told.mark.split()[:1] == [new] else machine.trial_mark(new))


def try_once(machine: Machine, new: str, good: str) -> None:
    """The other half, and a look at what the boot loader knows now. What else a person wants of the next boot stays."""
    lead_back_to(machine, good, new)  # again: the limit of entries may have taken the one of its older generation
    loader = machine.loader
    told, wanted = loader.armed(), Armed(loader.entry_of(good).name, loader.entry_of(new).name)
    if not machine.is_ours(told):
        machine.log.say(f"the next boot is to be {told.once}, as somebody wants it, and the trial comes after it")
        machine.remember(once="")
        return
    loader.try_once(new)
    if (told := loader.armed())[:2] != wanted[:2]:
        raise BentoError(f"the boot loader was told {', '.join(wanted[:2])}, and has {', '.join(told)}")
    machine.remember(once=wanted.once, slept="")


def judge_boot(machine: Machine, pending: Pending) -> Outcome | None:
    """After the first boot of a system. Raises Unreachable while the server may merely be slower to boot: a site's power
    cut is not the release's fault. BentoError while the boot goes on: a database may still recover."""
    age_s = machine.trial_age_s()
    failure = prove(machine)
    if failure is None and pending.step == Step.COMMITTING:
        return commit(machine, pending)
    if failure is None:
        machine.end_trial()  # before it is written down: a cut in between leads back, and is one of the tries
        return Outcome(Result.OK, "", pending.new)
    if age_s < machine.patience_s and (failure.unreachable or machine.is_booting()):
        words = f"after the boot, {failure.reason}: tried again at the next run"
        raise Unreachable(words) if failure.unreachable else BentoError(words)
    return go_back(machine, pending, Outcome(Result.ROLLED_BACK, f"after the boot, {failure.reason}"))


def settle_earlier(machine: Machine) -> bool:
    """Brings to its end what an earlier process, or a boot, left. False when a reboot is on its way."""
    pending = load_pending(machine)
    more = (pending.new, pending.profile) if pending is not None else ()
    if pending is not None and machine.has_systemd:  # a switch that goes on is not to be judged, nor left half done
        machine.watchdog = pending.watchdog
        wait_for_units(f"bento-switch-{pending.token}-*", time.monotonic() + machine.settings.activation_timeout)
    move = settle(pending, machine.state, machine.facts(*more))
    if move in (Move.REST, Move.WAIT):
        if move == Move.WAIT:
            machine.remember(boot=machine.boot_id)
        align_trial(machine)
        return True
    machine.log.kept = True
    machine.log.say(f"to be settled: {move}" + (f", {pending.step}" if pending else ""))
    pending = pending or trial_of(machine)
    outcome = carry_out(machine, pending, move)
    if outcome is None:
        return False
    conclude(machine, pending, outcome._replace(system=outcome.system or pending.new))
    if outcome.result != Result.ROLLBACK_FAILED:
        align_trial(machine)
    return True


def carry_out(machine: Machine, pending: Pending, move: Move) -> Outcome | None:
    if move == Move.COMMIT:
        return commit(machine, pending)
    if move == Move.PROVE:
        return judge_boot(machine, pending)
    if move == Move.GO_BACK:
        cut = "the machine was restarted" if pending.boot_id != machine.boot_id else "the client was ended"
        outcome = Outcome(Result.INTERRUPTED, f"{cut} while {pending.step}")
        if pending.verdict:
            outcome = Outcome(
                Result(pending.verdict), pending.reason, cost=Cost.GIVEN_UP if pending.reason == BY_HAND else None
            )
        elif pending.step == Step.ACTIVATING:
            machine.end_switches(pending)  # lest one that has not begun begins now
            pending = pending._replace(switched=pending.switched and machine.start_list() is not None)
        return go_back(machine, pending, outcome)
    why = "its deadline ended the trial" if machine.loader.ran_out() else "the boot loader went back"
    return go_back(machine, pending, Outcome(Result.ROLLED_BACK, f"it did not come up, {why}"))


# --- commands ---


def begin(machine: Machine, current: Current) -> Pending:
    """An attempt at a release, with a watchdog for the part that only fetches and builds: a client that hangs in it would
    be the only one that ever runs. An older journal, of a way back that failed, stays in its place until then.
    """
    tried, left = machine.state.tried, load_pending(machine)
    again = tried is not None and tried.release == current.release and tried.result != Result.OK
    pending = Pending(
        release=current.release, published=current.published, revision=current.revision,
        # After a way back that failed the machine runs something in between: this one leads further back.
        old=machine.running if left is None else left.old, new=machine.running,
        profile=machine.default if left is None else left.profile, committed=left is not None,
        between="" if left is None else left.between or left.new,
        step=Step.ACTIVATING, boot_id=machine.boot_id, token=os.urandom(4).hex(), switched=True,
        started=format_time(time.time()), attempt=tried.attempt + 1 if again and tried is not None else 1,
    )  # fmt: skip
    # The lock says whose work it guards, for a watchdog that finds no journal, and its client still there.
    name_holder(machine.settings, f"{os.getpid()} {pending.token}")
    machine.watchdog = None if left is None else left.watchdog  # it would come in the middle of what may mend things
    with best_effort(machine.log):
        arm(machine, pending.token, "fetch", machine.settings.build_timeout + WATCHDOG_MARGIN_S)
        signal.alarm(0)
    return pending


def distrust(machine: Machine, pending: Pending) -> Outcome | None:
    """The outcome where the built system may not say whom this machine trusts from then on."""
    pinned, new = machine.state.pinned, pending.new
    if pinned is not None:
        refusal = drops_signers(pinned, pending.release, new)
        return None if refusal is None else Outcome(Result.BUILD_FAILED, refusal, new)
    for fallback in dict.fromkeys((machine.good, pending.old)):
        if (refusal := brings_signers(new, fallback)) is not None:
            return Outcome(Result.POSTPONED, refusal, new)
    return None


def refuse_to_activate(machine: Machine, pending: Pending, *, force: bool) -> Outcome | None:
    """The outcome where the built system needs no activation, or must not have one."""
    new, facts = pending.new, machine.facts(pending.new)
    if new == facts.running == facts.default and not pending.committed:
        return Outcome(Result.OK, "nothing to activate: this system runs already", new)
    for part in ("sw/bin/bento-client", "etc/bento/client.json"):
        if not force and not has_left(new) and not Path(new, part).exists():
            reason = f"the new system has no {part}: it would be this machine's last update: import ./utils/bento.nix"
            return Outcome(Result.BUILD_FAILED, reason, new)
    if (distrusted := distrust(machine, pending)) is not None:
        return distrusted
    tried, failed = machine.state.tried, (pending.release, Result.ROLLED_BACK, new)  # what was built anew may be that
    waits = left_s(machine.state, time.time()) or is_given_up(machine.state, pending.published)
    if tried and (tried.release, tried.result, tried.system) == failed and waits and not force:
        return Outcome(Result.ROLLED_BACK, tried.reason, new, cost=Cost.WORK)
    if not force and (until := paused_until(machine)) is not None:
        return Outcome(Result.POSTPONED, f"built, but not activated: paused until {until}", new)
    if free_bytes(machine.settings.state) < MIN_FREE_BYTES:
        return Outcome(Result.POSTPONED, f"built, but not activated: the disk of {machine.settings.state} is full", new)
    return None


def unfit_for_boot(machine: Machine, pending: Pending) -> str | None:
    """Why a system that only a boot can prove must not have one: its client would not find what it is to settle, or not
    run, and nothing would lead back."""
    before, after = (settings_of(system).get("state_dir") for system in (pending.old, pending.new))
    if before is not None and after is not None and before != after:
        return f"it needs a reboot, and moves Bento's files to {after}: move them in a release of its own"
    if runs_bento(pending.new):
        argv = [f"{pending.new}/sw/bin/bento-client", "--config", f"{pending.new}/etc/bento/client.json", "status"]
        done = run(argv, check=False, timeout=machine.settings.confirm_timeout)
        said = done.output.rpartition("bento: error: ")[2]
        if done.code == UsageError.exit_code and said != done.output:
            return f"it needs a reboot, and its client refuses its settings: {one_line(said)}"
    return None


def obtain(machine: Machine, pending: Pending, current: Current) -> Outcome | Pending:
    """Fetches a release and builds it, or fetches what was built of it. Raises Unreachable where the line broke in the middle."""
    settings, session = machine.settings, machine.session
    assert session is not None
    result = Result.FETCH_FAILED
    try:
        announce(machine, Phase.BUILDING)
        if settings.build == "server":
            machine.hang_up()
            kept = machine.state.pinned.cache_key if machine.state.pinned else ""
            return pending._replace(new=realise(settings, machine.log, current, kept or settings.cache_key))
        if machine.state.unpacked != current.release or not is_untouched(settings.state / "config"):
            # What failed once is fetched whole: the fault may lie in the parts.
            fetch(session, settings, current, thrifty=pending.attempt == 1)
            adopt(machine, current.release)
        machine.hang_up()
        result = Result.BUILD_FAILED
        with best_effort(machine.log):  # the download may have taken its time
            arm(machine, pending.token, "build", settings.build_timeout + WATCHDOG_MARGIN_S)
        return pending._replace(new=build(settings, machine.log, current.commit, signed=current.signer is not None))
    except Unreachable:
        raise
    except (BentoError, OSError) as error:
        known, words = current.system if settings.build == "server" else None, words_of(error)
        if result == Result.BUILD_FAILED and free_bytes(settings.state) < MIN_FREE_BYTES:
            return Outcome(Result.POSTPONED, f"the disk of {settings.state} is full: {words}", known)
        if result == Result.BUILD_FAILED and (cost := machine.log.cause(bad_moment)):
            return Outcome(Result.POSTPONED, words, known, cost=Cost(cost))
        return Outcome(result, words, known)
    except Exception as error:  # a bug of ours must not be met anew at each poll, and nobody told
        return Outcome(result, tell_bug(machine.log, error), cost=Cost.WORK)


def deploy(machine: Machine, pending: Pending, *, server: str, force: bool) -> Outcome | None:
    """Puts what was built to work, if its server is still there. None: a reboot leads back."""
    refusal = refuse_to_activate(machine, pending, force=force)
    if refusal is not None:
        return refusal
    try:
        machine.session = knock(machine.settings, machine.log, server)
        announce(machine, Phase.ACTIVATING)
    except BentoError as error:
        reason = f"built, but not activated, because the server went away: {words_of(error)}"
        return Outcome(Result.POSTPONED, reason, pending.new, unreachable=True)
    outcome = activate(machine, pending)
    return outcome and outcome._replace(system=pending.new)


def reboot_if_due(machine: Machine) -> None:
    """Reboots into the boot default, when that is needed, allowed now, and was not tried for it before: to prove it, or
    to be rid of the kernel of what was rolled back. What else was booted is a person's choice."""
    new, before, now, tried = machine.default, machine.state.rebooted, time.localtime(), machine.state.tried
    if before is not None and not machine.needs_reboot:
        machine.remember(rebooted=None)
    due = machine.on_trial is not None or (tried is not None and tried.system == machine.facts().booted != new)
    # What was just deployed may ask for less than we were started with.
    asked = (machine.settings.reboot, machine.asked("reboot", machine.running))
    allowed = all(may_reboot(each, now.tm_hour, now.tm_min) for each in asked)
    if before == new or not (allowed and due and machine.needs_reboot):
        return
    if machine.state.lost == machine.boot_id:
        print("waits for a reboot: none is asked for where state.json does not outlive one")
        return
    if machine.on_trial is not None and (why := machine.why_no_reboot(new)) is not None:
        print(f"waits for a reboot: {why}")
        return
    if not machine.has_systemd:
        machine.log.say("a reboot is due, but systemd does not run here")
        return
    machine.log.say(f"rebooting into {new}")
    report(machine, Phase.ACTIVATING)
    machine.remember(rebooted=new)
    try:
        machine.reboot()
    except BentoError:
        machine.remember(rebooted=before)  # it is to be asked for again
        raise


def poll_once(machine: Machine, *, force: bool) -> Current:
    """What the server publishes for this machine. Raises what is wrong with it, after it was recorded and reported."""
    state, settings = machine.state, machine.settings
    try:
        patience_s = settings.connect_timeout
        machine.session, current = poll(settings, machine.directory, machine.log, state, patience_s)
        machine.remember(**accepted(state, current, trusted_keys(settings, state) or {}))
        if is_behind(current, state.published, time.time()) and len(settings.server) == 1 and not force:
            raise BentoError(
                f"the server publishes what is of {current.published}, and this machine has seen what is of {state.published}:"
                " publish the newest commit, or 'bento.py populate --again' if the older state is meant"
            )
        return current
    except Unreachable:
        raise
    except Exception as error:
        words = words_of(error) if isinstance(error, (BentoError, OSError)) else tell_bug(machine.log, error)
        if state.last is None or state.last.reason != one_line(words):
            machine.log.kept = True
            now = format_time(time.time())
            nothing = Pending(NO_RELEASE, now, "/-", "/-", "/-", Step.ACTIVATING, "", "", now, 1)
            with best_effort(machine.log):
                record(machine, nothing, Outcome(Result.FETCH_FAILED, words))
        report(machine)
        raise BentoError(words) from None


def what_stands(machine: Machine, current: Current) -> str | None:
    """What there is to say of a release that was deployed, and does not run."""
    tried, running = machine.state.tried, machine.facts().running
    if tried is None or (tried.release, tried.result) != (current.release, Result.OK) or running == tried.system:
        return None
    if machine.on_trial is not None:
        return f"release {current.release[:12]} waits for the next boot"
    return f"release {current.release[:12]} is deployed, but another system runs: {running}"


def choose(machine: Machine, current: Current, *, force: bool) -> tuple[bool, str]:
    """Whether `current` is to be deployed on this machine now, and why, or why not."""
    wanted, why = decide(
        current, machine.state, time.time(), force=force, rebuild_s=machine.settings.rebuild_every,
    )  # fmt: skip
    if not wanted:
        why = what_stands(machine, current) or why
    elif not force and current.release != machine.state.release and (expired := has_expired(current, time.time())):
        return False, f"{why}, but not moved to: {expired}"
    if not force and (until := paused_until(machine)) is not None:
        return False, f"paused until {until}: {why}"
    return wanted, why


def forget_other_system(machine: Machine, current: Current) -> None:
    """To a machine whose server builds, another system is another release: what became of the one before says nothing."""
    tried = machine.state.tried
    if machine.settings.build == "server" and tried is not None and tried.release == current.release:
        known = tried.system is not None or tried.result == Result.FETCH_FAILED
        if known and current.system not in (None, tried.system):
            machine.remember(tried=None)


def update(machine: Machine, *, force: bool) -> int:
    """Polls, decides, and does what is to be done. Raises Unreachable when the poll fails: nothing has changed then."""
    current = poll_once(machine, force=force)
    forget_other_system(machine, current)
    wanted, why = choose(machine, current, force=force)
    state, facts = machine.state, machine.facts()
    theirs = facts.running == facts.booted == facts.default  # a person's, and known to boot
    # What a first trial is to lead back to.
    first = state.system is None and (state.good is None or facts.running == facts.booted)
    if (theirs or first) and facts.booted not in (state.system, state.good):
        machine.remember(good=facts.booted if theirs else machine.good, good_release=None, good_revision=None)
    assert machine.session is not None
    if not wanted:
        print(why)
        if state.last is not None and state.last.release is None:  # the server's files are in order again
            machine.remember(last=state.tried)
        deliver(machine)
        return 0
    machine.log.kept = True
    machine.log.say(why)
    pending, server = begin(machine, current), machine.session.server
    try:
        with heartbeat(machine):
            obtained = obtain(machine, pending, current)
    except Unreachable:
        report(machine)
        disarm(machine)
        raise
    if isinstance(obtained, Pending):
        pending = obtained
        outcome = deploy(machine, pending, server=server, force=force)
    else:
        outcome = obtained
    if outcome is None:
        return 1
    conclude(machine, pending, outcome)
    return outcome.exit_code


@contextmanager
def at_work(settings: Settings) -> Iterator[Machine]:
    """What every command that holds the lock starts and ends with; clears away what killed processes left."""
    for left in (*settings.state.glob(".tmp-*"), *settings.state.glob("outbox/.tmp-*")):
        if not Path("/proc", left.name.split("-")[1]).exists():
            remove(left)
    with scratch(settings) as directory:
        machine = Machine(settings, directory)
        try:
            yield machine
        finally:
            machine.hang_up()


def command_run(settings: Settings, *, force: bool) -> int:
    refuse_volatile(settings)
    with lock(settings) as held:
        if not held:
            print("another run is at work on this machine: nothing to do here")
            return 0
        with at_work(settings) as machine:
            signal.alarm(POLL_LIMIT_S)  # which ends us, until a deployment has its watchdog
            machine.notice_forgotten()
            find_lost_trial(machine)
            if not settle_earlier(machine):
                return 1
            code = update(machine, force=force)
            if code == 0 and (force or paused_until(machine) is None):
                reboot_if_due(machine)
            words = nobody_vouches(machine.state, time.time())
            if machine.state.lost == machine.boot_id:
                words = f"error: {lost_words(machine)}"
            if words is not None:
                machine.log.say(words)
            return code or int(words is not None and words.startswith("error"))


def refuse_volatile(settings: Settings) -> None:
    """The state must outlive a boot: the key, and the journal that leads back from a system that does not do its job."""
    with suppress(OSError):
        mount, root = (mount_of(settings, path) for path in (settings.state, Path(settings.root)))
        own = settings.system_path("/proc/self/mountinfo").exists() or mount != root  # else a test's, anywhere
        if mount is not None and mount.kind in ("tmpfs", "ramfs") and own:
            raise BentoError(f"{settings.state} is on a {mount.kind}, gone at the next boot: persist this directory")


def end_lock_holder(machine: Machine) -> None:
    """Ends the run that holds the lock, and what it started: it hangs, or a person wants it gone."""
    with suppress(OSError, ValueError, IndexError):
        path = machine.settings.state / "lock"
        holder = lock_holder(path) or int(path.read_text().split()[0])  # the kernel names some devices otherwise
        children: list[str] = []
        with suppress(OSError):  # a kernel may lack this file
            children = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
        machine.log.say(f"ending the client that holds the lock (process {holder})")
        os.kill(holder, signal.SIGKILL)
        for child in children:  # each leads a group, see `run`
            with suppress(OSError):
                os.killpg(int(child), signal.SIGKILL)


def command_rollback(settings: Settings, *, token: str | None) -> int:
    """The watchdog's (with the token of its deployment), or a person's: then also back from what was committed."""
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    machine, give_up = Machine(settings), time.monotonic() + 30
    while True:
        pending = load_pending(machine)
        ended = token is not None and (pending is None or pending.token != token)
        with lock(settings) as held:
            if ended and (held or (settings.state / "lock").read_text().partition("\n")[0].split()[1:] != [token]):
                print("this deployment has ended already: nothing to do")
                return 0
            if held:
                with at_work(settings) as machine:
                    machine.log.kept = True
                    return go_back_now(machine, load_pending(machine), by_hand=token is None)
        if pending is None and token is None:
            raise BentoError(
                "another client is at work on this machine, and activates nothing: wait for its end, or stop it"
            )
        end_lock_holder(machine)
        if time.monotonic() > give_up:
            raise BentoError(f"{settings.state / 'lock'} is still held: look for the process that holds it")
        time.sleep(0.2)


def go_back_now(machine: Machine, pending: Pending | None, *, by_hand: bool) -> int:
    if pending is None:
        pending = step_back(machine)
        save_pending(machine, pending)
    machine.watchdog = pending.watchdog
    if by_hand:
        outcome = go_back(
            machine, pending._replace(by_hand=True), Outcome(Result.ROLLED_BACK, BY_HAND, cost=Cost.GIVEN_UP)
        )
    else:
        if pending.step == Step.ROLLING_BACK:
            pending = pending._replace(deadline_s=0.0, by_hand=False)  # that is what the watchdog says
        move = settle(pending, machine.state, machine.facts(pending.new, pending.profile))
        if move == Move.GO_BACK and not pending.verdict:
            pending = pending._replace(verdict=Result.INTERRUPTED, reason=f"the client hung while {pending.step}")
        outcome = carry_out(machine, pending, move)
    if outcome is None:
        return 0
    conclude(machine, pending, outcome)
    print(f"{outcome.result}: {outcome.reason}; this machine runs {machine.running}")
    return 1 if outcome.result == Result.ROLLBACK_FAILED else 0


def trial_of(machine: Machine) -> Pending:
    """The journal of a way back from the boot default, should it be needed: whose first boot came, or did not."""
    state, good = machine.state, machine.good
    return Pending(
        release=state.release or NO_RELEASE, published=state.published or format_time(0), revision=state.revision, old=good,
        new=state.system or good, profile=good, step=Step.ACTIVATING, boot_id=machine.boot_id,
        token=os.urandom(4).hex(), started=format_time(time.time()), attempt=state.tried.attempt if state.tried else 1,
        switched=machine.facts().running != good, committed=True, trial=True,
    )  # fmt: skip


def step_back(machine: Machine) -> Pending:
    """The journal of a way back by hand: to what ran before the last deployment, or before a person's own system."""
    state, facts = machine.state, machine.facts()
    back = state.previous if facts.running in (state.system, state.previous) else state.system
    if back is None:
        raise BentoError("nothing to roll back: no earlier system is known on this machine")
    if not Path(back, "bin/switch-to-configuration").exists():
        raise BentoError(f"the earlier system {back} is gone (garbage collected): publish an older release instead")
    prepare_trial(machine, back, machine.good, must=True)
    return trial_of(machine)._replace(
        old=back, new=facts.default if facts.default != back else facts.running, profile=back, step=Step.ROLLING_BACK,
        verdict=Result.ROLLED_BACK, reason=BY_HAND, by_hand=True, switched=facts.running != back, attempt=1,
    )  # fmt: skip


def probe_failure(settings: Settings) -> str | None:
    """Why this client, with these settings, cannot read its `current.json` over a new connection; None when it can."""
    with scratch(settings) as directory:
        try:
            session, _ = poll(settings, directory, Log(settings.state / "no-log"))
        except BentoError as error:
            return words_of(error)
        session.close()
    return None


def command_probe(settings: Settings) -> int:
    if (failure := probe_failure(settings)) is not None:
        raise Unreachable(failure)
    print("the server is reached, and publishes a release for this machine")
    return 0


def command_align(settings: Settings) -> int:
    """For the end of a boot, and for a switch to a system without Bento: nothing of ours stays in the boot loader's
    variables once the default is another's. An attempt under way settles that itself."""
    with lock(settings) as held:
        machine = Machine(settings, log="no-log")
        if held and load_pending(machine) is None:
            align_trial(machine)
            if not runs_bento(machine.default):
                leave(machine)
    return 0


def leave(machine: Machine) -> None:
    """Somebody's system without Bento is the default. In the middle of their switch the menu cannot be written."""
    if not machine.switch_holder():
        machine.leave(machine.default)
    elif machine.has_systemd:
        call_later(machine.settings, f"bento-leave-{os.urandom(3).hex()}", 60, "align")


def command_hibernate(settings: Settings) -> int:
    """Before a hibernation: it is to be woken by the kernel that goes to sleep; else the machine stays awake. A one shot that
    is a person's stays."""
    machine = Machine(settings, log="no-log")
    tell_trial(settings, "sleep")
    find_lost_trial(machine)
    if not machine.state.armed:
        return 0
    loader, booted = machine.loader, machine.facts().booted
    told, name = loader.armed(), loader.entry_of(booted).name
    if machine.is_ours(told):
        machine.remember(once="", slept=name)
        loader.try_once("")  # which makes room for the other one
        if not any(entry.name == told.default and entry.system == booted for entry in loader.list_entries()):
            loader.try_once(booted)
    return 0


def command_emergency(settings: Settings) -> int:
    """For emergency mode, where nothing else of ours runs: a first boot that ends there has come to nothing, and the next
    one leads back. Where it would not, the machine is left to whoever sits at it."""
    machine = Machine(settings, log="no-log")
    if machine.on_trial == machine.facts().booted and machine.state.boot != machine.boot_id:
        told = machine.loader.armed()
        if machine.state.armed and told.default and not told.once:
            machine.reboot()
    return 0


def command_key(settings: Settings) -> int:
    """Prints the public key; makes the identity first where there is none. The private half never leaves."""
    private = settings.identity_file
    public = private.with_name(private.name + ".pub")
    if not private.exists():
        private.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = private.with_name(f".{private.name}.new")
        for left in (aside, aside.with_name(aside.name + ".pub")):
            remove(left)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", settings.user, "-f", str(aside)], timeout=60)
        os.rename(aside.with_name(aside.name + ".pub"), public)
        os.rename(aside, private)
        sync_directory(private.parent)
    elif not public.exists():
        shown = run(["ssh-keygen", "-y", "-P", "", "-f", str(private)], timeout=60).output.strip()
        write_atomic(public, f"{shown}\n".encode(), 0o644)
    print(public.read_text().strip())
    return 0


def command_pause(settings: Settings, hours: float) -> int:
    """Holds nothing: a run that is at work must not keep a person waiting. It looks before it activates."""
    if not 0 < hours <= LONGEST_PAUSE_H:
        raise UsageError(f"a pause has more than 0 and at most {LONGEST_PAUSE_H:.0f} hours")
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    now_s, length_s = time.time(), 3600 * hours
    end_s = time.clock_gettime(time.CLOCK_BOOTTIME) + length_s
    boot_id = Machine(settings, log="no-log").boot_id
    pause = Pause(format_time(now_s), format_time(now_s + length_s), boot_id, end_s)
    write_atomic(settings.state / "pause.json", encode(pause))
    print(f"paused until {pause.until}: this machine polls, and deploys nothing; what it is activating now goes on")
    return 0


def command_resume(settings: Settings) -> int:
    remove(settings.state / "pause.json")
    print("no pause: the next run deploys again")
    return 0


def command_unpin(settings: Settings) -> int:
    """For whom only a visit is left: the one key was stolen, or the fleet is another. Nothing that a server says does it."""
    with lock(settings) as held:
        if not held:
            raise BentoError("another run is at work on this machine: try again when it has ended")
        Machine(settings, log="no-log").remember(pinned=None, serials=())
    print("no signer is pinned any more: the next run goes by its settings, or by 'bento-client run --signers FILE'")
    return 0


def command_status(settings: Settings) -> int:
    if not os.access(settings.state, os.R_OK | os.X_OK) and settings.state.exists():
        raise BentoError(f"{settings.state} cannot be read: run this as root")
    machine = Machine(settings, log="no-log")
    waiting = len(list((settings.state / "outbox").glob("*.log")))
    contact = last_contact(settings, time.time())
    wait, no_reboot = next_attempt(machine.state, time.time()), why_no_reboot(machine)
    print(format_status(make_report(machine), load_pending(machine), waiting, contact, no_reboot, wait))
    return 0


def last_contact(settings: Settings, now_s: float) -> str:
    """When a server last took a report, for a person who wonders why nothing happens."""
    why = "'bento-client probe' says why, 'journalctl -u bento' what was tried"
    try:
        when, server = (settings.state / "lock").read_text().partition("\n")[2].split()
        ago_s = now_s - parse_time(when)
    except (OSError, ValueError):
        return f"none yet: {why}"
    lost = ago_s > max(2 * 3600, 3 * settings.interval)
    return f"{when}, {duration(ago_s)} ago, {server}" + (f": lost since then: {why}" if lost else "")


def why_no_reboot(machine: Machine) -> str | None:
    """Why the reboot that is needed, and allowed, is not ours."""
    new = machine.on_trial
    why = machine.why_no_reboot(new) if new and machine.needs_reboot and machine.settings.reboot != "never" else None
    return why and f"waits for a reboot: {why}"


def next_attempt(state: State, now_s: float) -> str:
    """When what failed is tried again; nothing to say where that is at the next poll."""
    if state.tried is None or state.tried.result == Result.OK:
        return ""
    if state.doubts >= MOST_VERDICTS:
        return "not before another release, or 'bento.py populate --again'"
    return f"not before {state.not_before}" if left_s(state, now_s) else ""


def format_status(
    report: Report, pending: Pending | None, waiting: int, contact: str, no_reboot: str | None, wait: str
) -> str:
    last, left_s = report.last, parse_time(report.expires or NEVER) - parse_time(report.polled)
    over = left_s <= 0
    rows = [
        ("host", report.host),
        ("client", report.client),
        ("release", report.release or "none of Bento's"),
        ("system", report.system),
        ("last", last and f"{last.result}, release {(last.release or '?')[:12]}, attempt {last.attempt}, {last.finished}"),
        ("reason", last and last.reason),
        ("again", wait),
        ("paused", report.paused_until and f"until {report.paused_until}"),
        ("under way", pending and f"release {pending.release[:12]}, {pending.step}"),
        ("failed", ", ".join(report.failed_units)),
        ("waiting", report.waiting_for_boot and f"release {report.waiting_for_boot[:12]} runs from the next boot on"),
        ("reboot", no_reboot or (report.needs_reboot and "needed")),
        ("boot trial", report.boot_trial or "none"),
        ("boots", report.known_to_boot or "not known yet"),
        ("signed", report.signer and f"by {report.signer}, until {report.expires}"),
        ("expired", over and "nobody vouches for this machine's state: sign anew"),
        ("expires", 0 < left_s <= EXPIRES_SOON_S and f"in {duration(left_s)}: sign anew"),
        ("trust", report.first_contact and f"the server's key was taken at first contact, {report.first_contact}"),
        ("outbox", waiting and f"{waiting} not delivered yet"),
        ("contact", contact),
    ]  # fmt: skip
    return "\n".join(f"{name:<10} {value}" for name, value in rows if value)


# --- command line ---

# What follows the command, what it is for, and what else there is to say of it.
COMMANDS = {
    "run": (
        "[--force]",
        "poll, and update if there is something new (as the timer does)",
        "--force: try again what was given up, and do what was refused, an older release for one",
    ),
    "key": ("", "print this machine's public SSH key; make it if there is none", "the private half never leaves"),
    "probe": ("", "can this machine reach its server? exit 0, or 75 if not", "it says why, and changes nothing"),
    "status": ("", "what this machine runs and last did", "what the server is told, and when it was reached last"),
    "rollback": (
        "",
        "back from an activation under way, else from the last update",
        "the machine stays there until there is another release, or 'run --force'",
    ),
    "pause": ("[HOURS]", f"deploy nothing for so long ({PAUSE_H:.0f} by default), but poll", "it ends by itself"),
    "resume": ("", "end a pause", "the next run deploys again"),
    "unpin": (
        "",
        "trust the signers that the running system names, and no others",
        "for a key that was lost, or another fleet: nothing that a server says does it",
    ),
}


def format_help(command: str | None) -> str:
    """What there is to say of a command, or of all."""
    options = [
        ("--config FILE", f"settings as JSON (default {DEFAULT_CONFIG})"),
        ("--NAME VALUE", "a setting of that file is a flag, too: --connect-timeout 5"),
        ("-v, --verbose", "show the programs that are run"),
        ("--version", "print the version"),
    ]
    shown = [(f"{name} {words}".strip(), text) for name, (words, text, _) in COMMANDS.items()]
    if command in COMMANDS:
        words, text, more = COMMANDS[command]
        return f"usage: bento-client [options] {f'{command} {words}'.strip()}\n\n{text};\n{more}\n"
    lines = [f"  {name:<14} {text}" for name, text in (*shown, ("", ""), *options)]
    return (
        "usage: bento-client [options] COMMAND\n\nKeep this NixOS machine at its published release.\n\n"
        + "\n".join(line.rstrip() for line in lines)
        + "\n\n'bento-client COMMAND --help' says more of one.\n"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, of the same name."""
    for name, value in Settings()._asdict().items():
        kind = type(value)
        flags = list(dict.fromkeys(f"--{name.replace('_', sign)}" for sign in "-_"))
        options: dict[str, Any] = {"dest": f"setting_{name}", "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
            flags = flags[:1]
        elif kind is tuple:
            options["action"] = "append"
        else:
            options["type"] = kind
        parser.add_argument(*flags, **options)


def make_parser() -> argparse.ArgumentParser:
    # With a width, argparse does not load shutil to ask the terminal for one.
    parser = argparse.ArgumentParser(
        prog="bento-client",
        usage="%(prog)s [options] COMMAND",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80),
    )
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--config")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--token")  # the watchdog's
    commands = [*COMMANDS, "align", "emergency", "hibernate"]
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=commands)
    parser.add_argument("hours", nargs="?", type=float)
    add_settings(parser)
    return parser


def read_settings(options: Mapping[str, Any]) -> Settings:
    """The settings that the command line and its configuration file give together."""
    given = {name.removeprefix("setting_"): value for name, value in options.items() if name.startswith("setting_")}
    config = options["config"]
    path = Path(config) if config else Path(given.get("root", "/")) / DEFAULT_CONFIG.lstrip("/")
    values: dict[str, Any] = {}
    if path != Path(os.devnull):
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            if config:
                raise UsageError(f"{path}: no such file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: cannot be read: {one_line(words_of(error), 100)}") from None
        if not isinstance(values, dict):
            raise UsageError(f"{path}: not a JSON object")
    sources = ([str(path)] if values else []) + (["the command line"] if given else [])
    return make_settings(values | given, " and ".join(sources) or str(path))


def main(argv: Sequence[str] | None = None) -> int:
    global verbose
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    verbose = options["verbose"]
    os.umask(0o022)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the locale, a message is no reason to fail
    command: str = options["command"]
    if options["help"]:
        print(format_help(command), end="")
        return 0
    if command is None:
        parser.error("a COMMAND is missing: --help lists them")
    for flag, goes_with in (("force", "run"), ("token", "rollback"), ("hours", "pause")):
        if options[flag] not in (None, False) and command != goes_with:
            parser.error(f"{flag if flag == 'hours' else '--' + flag} goes with {goes_with}, not with {command}")
    try:
        settings = read_settings(options)
        if command in ("run", "probe") and not settings.server:
            raise UsageError("no server is set: give --server, or 'server' in the configuration file")
        if command in ("run", "probe"):
            check_trust(settings, load_state(settings, Log(settings.state / "no-log")))
        if command == "run":
            return command_run(settings, force=options["force"])
        if command == "rollback":
            return command_rollback(settings, token=options["token"])
        if command == "pause":
            return command_pause(settings, PAUSE_H if options["hours"] is None else options["hours"])
        simple = {
            "align": command_align, "emergency": command_emergency, "hibernate": command_hibernate, "key": command_key,
            "probe": command_probe, "resume": command_resume, "status": command_status, "unpin": command_unpin,
        }  # fmt: skip
        return simple[command](settings)
    except BentoError as error:
        print(f"bento: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        root = ": run this as root" if isinstance(error, PermissionError) and os.geteuid() != 0 else ""
        print(f"bento: error: {words_of(error)}{root}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bento: error: interrupted; the next run goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
