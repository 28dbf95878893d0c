#!/usr/bin/env python3
"""Bento's client: keeps this NixOS machine at the release that its server publishes for it.

A systemd timer starts `run`. It polls the server over SFTP, fetches a new release, checks it, builds it,
activates it, proves that the new system still reaches its server, and only then makes it the boot default. When the
proof fails it goes back to the old system. This file works alone, with the standard library only, and must import
nothing that NixOS' python3Minimal lacks (zlib, bz2, lzma, ssl, ctypes, ...). It is also the home of the formats
that both sides share: `current.json`, the report, names and times. `bento.py` imports them from here.

Files, all below the state directory (/var/lib/bento, mode 0700):
  config/         the files of the release last fetched      result         what was last built from them
  state.json      what this machine runs and last tried      pending.json   journal of an activation under way
  waiting.json    journal of a system that waits for a boot  deploy.log     log of the deployment under way
  outbox/         logs not yet delivered
  partial/        a download under way, to be resumed        lock           held while a run is at work
  id_ed25519      the machine's SSH identity                 known_hosts    the server's keys

Exit codes: 0 done or nothing to do, 1 the deployment failed, 2 usage, 75 the server could not be reached.

Sections: constants, errors, types, names and times, formats, settings, decisions, files, processes, log, sftp,
this machine's systems, reports, fetch and build, activation, recovery, commands, command line.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

T = TypeVar("T")

VERSION = "1.1"
FORMAT = 1

HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,24}")
RELEASE_ID = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
LOG_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z_[0-9a-f]{12}_[a-z-]{1,20}\.log")
STORE_PATH = re.compile(r"/[ -~]{1,400}")
TEXT = re.compile(r"[^\n]{0,2000}", re.DOTALL)
# Of bento.json: what neither Nix' URLs nor nixos-rebuild read as something else; no directory that leads out.
ATTRIBUTE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,199}")
DIRECTORY = re.compile(r"\.?|(?!\.\.?(/|$))[A-Za-z0-9_.+-]+(/(?!\.\.?(/|$))[A-Za-z0-9_.+-]+)*/?")

MAX_RELEASE_BYTES = 4 << 30
MAX_JSON_BYTES = 64 << 10
LOG_HEAD_BYTES, LOG_TAIL_BYTES = 64 << 10, 960 << 10
KEEP_LOGS = 20
MIN_FREE_BYTES = 8 << 20
# A release that may take its time on a slow line.
LARGE_BYTES = 1 << 20
# How long a transfer may stand still. Slow is fine, dead is not; so slow (bytes a second) is fine.
STALL_S, LEAST_RATE = 60.0, 1000
# In one request of sftp's: as much as OpenSSH's servers take (SFTP_MAX_MSG_LENGTH, less room for a header).
REQUEST_BYTES = 261120
FIRST_PAUSE_S, LONGEST_PAUSE_S = 15 * 60, 24 * 3600
WATCHDOG_MARGIN_S = 30
# A poll that takes longer hangs: no watchdog guards it, and no other run could start. Twenty large logs on a slow line
# may take hours.
POLL_LIMIT_S = 12 * 3600


# --- errors ---


class BentoError(Exception):
    """Something that can be expected to go wrong. Says what, which host or path, and what to do next."""

    exit_code = 1


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


class Phase(StrEnum):
    """What a host says it is doing, in its report."""

    IDLE = "idle"
    BUILDING = "building"
    ACTIVATING = "activating"


class Step(StrEnum):
    """How far a deployment has come, in the journal."""

    BUILDING = "building"
    ACTIVATING = "activating"
    PROVING = "proving"
    COMMITTING = "committing"
    STEPPING_BACK = "stepping-back"
    ROLLING_BACK = "rolling-back"
    REBOOTING = "rebooting"
    REVERTING = "reverting"


class Action(StrEnum):
    NOTHING = "nothing"
    FETCH = "fetch"
    RETRY = "retry"


class Part(NamedTuple):
    """A stretch of a release's archive: a large file, or what lies between two. `size` in bytes."""

    sha256: str
    size: int


class Current(NamedTuple):
    """`current.json`: the release that a host is to run. `size` in bytes, `revision`: a line for a person.

    `parts`, one after the other, are the archive; there are none when it has no large file. A host that has one
    of them already needs only the others.
    """

    host: str
    release: str
    size: int
    published: str
    system: str | None = None
    parts: tuple[Part, ...] = ()
    revision: str | None = None


class Recipe(NamedTuple):
    """`bento.json`: how a release is built for a host. Both sides read it, so that they build the same.

    `attribute` of the flake; `directory` below the tree, with the entry file; `options` for nixos-rebuild.
    """

    attribute: str
    directory: str = ""
    options: tuple[str, ...] = ()


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
    """`logs/status.json`: what a host says of itself. `revision` is that of `release`."""

    host: str
    client: str
    polled: str
    phase: str
    release: str | None
    system: str
    needs_reboot: bool
    last: Last | None
    revision: str | None = None


class State(NamedTuple):
    """`state.json`. `release` and `system` were proven together; `previous` are the two before them.

    `revision` is that of `release`. `unpacked` is the release in config/, `tried` the last attempt at a release (`last` may be a later failure to
    read `current.json`), `interruptions` how often that release was cut short, `published` its publication,
    `rebooted` the system that a reboot was last asked for.
    """

    release: str | None = None
    system: str | None = None
    previous: str | None = None
    previous_release: str | None = None
    published: str | None = None
    unpacked: str | None = None
    rebooted: str | None = None
    interruptions: int = 0
    tried: Last | None = None
    last: Last | None = None
    revision: str | None = None
    previous_revision: str | None = None


class Pending(NamedTuple):
    """`pending.json`, the journal. `deadline_s` is on CLOCK_BOOTTIME.

    Where to go back to: `old` is what ran, `profile` what would have been booted. They differ while a system waits
    for its first boot, and that one has a journal of its own in `waiting.json`.
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
    watchdog: str | None = None
    verdict: str = ""
    reason: str = ""
    revision: str | None = None


class Settings(NamedTuple):
    """The client's settings: flags over the JSON file over these defaults. Times in seconds."""

    server: tuple[str, ...] = ()
    port: int = 22
    host: str = ""
    user: str = ""
    identity: str = ""
    known_hosts: str = ""
    state_dir: str = "/var/lib/bento"
    root: str = "/"
    ssh_options: tuple[str, ...] = ()
    connect_timeout: int = 20
    build_timeout: int = 12 * 3600
    activation_timeout: int = 600
    confirm_timeout: int = 120
    health_checks: tuple[str, ...] = ()
    upgrade_channels: bool = False
    reboot: str = "never"

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
    return f"{stamp}_{(release or '0' * 64)[:12]}_{result}.log"


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


def take_line(data: Mapping[str, Any], name: str, what: str) -> str | None:
    """An optional text for a person, as one line: whatever it was, it is harmless in a table and an environment."""
    return one_line(take(data, name, str, what, null=True) or "", 200) or None


def parse_current(raw: bytes, what: str, host: str | None = None) -> Current:
    data = parse_object(raw, what)
    current = Current(
        host=take(data, "host", HOST_NAME, what),
        release=take(data, "release", RELEASE_ID, what),
        size=take(data, "size", int, what),
        published=take(data, "published", TIME, what),
        system=take(data, "system", STORE_PATH, what, null=True),
        parts=tuple(parse_part(part, what) for part in take(data, "parts", list, what, null=True) or ()),
        revision=take_line(data, "revision", what),
    )
    if current.parts and sum(part.size for part in current.parts) != current.size:
        raise BentoError(f"{what}: its parts do not add up to its size")
    if host is not None and current.host != host:
        raise BentoError(f"{what}: it is for host {current.host!r}, not for {host!r}")
    return current


def parse_part(data: object, what: str) -> Part:
    if not isinstance(data, dict):
        raise BentoError(f"{what}: field 'parts' is malformed")
    return Part(take(data, "sha256", RELEASE_ID, what), take(data, "size", int, what))


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
    return Recipe(attribute, "" if directory == "." else directory, tuple(options))


def parse_last(data: Mapping[str, Any], what: str) -> Last:
    return Last(
        release=take(data, "release", RELEASE_ID, what, null=True),
        result=take(data, "result", re.compile(r"[a-z-]{1,40}"), what),
        reason=take(data, "reason", TEXT, what),
        system=take(data, "system", STORE_PATH, what, null=True),
        started=take(data, "started", TIME, what),
        finished=take(data, "finished", TIME, what),
        attempt=take(data, "attempt", int, what),
        log=take(data, "log", LOG_NAME, what),
        revision=take_line(data, "revision", what),
    )


def parse_report(raw: bytes, what: str) -> Report:
    data = parse_object(raw, what)
    last = take(data, "last", dict, what, null=True)
    return Report(
        host=take(data, "host", HOST_NAME, what),
        client=take(data, "client", re.compile(r"[!-~]{1,40}"), what),
        polled=take(data, "polled", TIME, what),
        phase=take(data, "phase", re.compile(r"[a-z-]{1,40}"), what),
        release=take(data, "release", RELEASE_ID, what, null=True),
        system=take(data, "system", re.compile(r"[ -~]{0,400}"), what),
        needs_reboot=take(data, "needs_reboot", bool, what),
        last=None if last is None else parse_last(last, what),
        revision=take_line(data, "revision", what),
    )


def parse_state(raw: bytes, what: str) -> State:
    data = parse_object(raw, what)
    tried, last = (take(data, name, dict, what, null=True) for name in ("tried", "last"))
    return State(
        release=take(data, "release", RELEASE_ID, what, null=True),
        system=take(data, "system", STORE_PATH, what, null=True),
        previous=take(data, "previous", STORE_PATH, what, null=True),
        previous_release=take(data, "previous_release", RELEASE_ID, what, null=True),
        published=take(data, "published", TIME, what, null=True),
        unpacked=take(data, "unpacked", RELEASE_ID, what, null=True),
        rebooted=take(data, "rebooted", STORE_PATH, what, null=True),
        interruptions=take(data, "interruptions", int, what),
        tried=None if tried is None else parse_last(tried, what),
        last=None if last is None else parse_last(last, what),
        revision=take_line(data, "revision", what),
        previous_revision=take_line(data, "previous_revision", what),
    )


def parse_pending(raw: bytes, what: str) -> Pending:
    data = parse_object(raw, what)
    kinds: dict[str, type | re.Pattern[str]] = {
        "release": RELEASE_ID, "published": TIME, "old": STORE_PATH, "new": STORE_PATH, "profile": STORE_PATH,
        "step": re.compile("|".join(Step)), "boot_id": str, "token": str, "started": TIME, "attempt": int,
        "deadline_s": float, "verdict": re.compile("|".join(("", *Result))), "reason": str,
    }  # fmt: skip
    values = {name: take(data, name, kind, what) for name, kind in kinds.items()}
    revision = take_line(data, "revision", what)
    return Pending(**values, watchdog=take(data, "watchdog", str, what, null=True), revision=revision)


def plain(value: Any) -> Any:
    """A record, and those in it, as JSON has them."""
    if hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


def encode(record: Current | Report | State | Pending) -> bytes:
    data = {"format": FORMAT} | plain(record)
    if not data.get("parts", True):
        del data["parts"]
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


# --- settings ---

DEFAULT_CONFIG = "/etc/bento/client.json"
REBOOT_WINDOW = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")
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
    if settings.reboot not in ("never", "when-needed") and not REBOOT_WINDOW.fullmatch(settings.reboot):
        raise UsageError(
            f"{what}: setting 'reboot' is 'never', 'when-needed' or 'HH:MM-HH:MM', not {settings.reboot!r}"
        )
    if not settings.user:
        settings = settings._replace(user=f"bento-{settings.host}")
    elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", settings.user):
        raise UsageError(f"{what}: setting 'user' cannot be {settings.user!r}")
    # One absolute spelling: sftp, Nix and the watchdog run in other directories than we do.
    paths = {
        n: os.path.abspath(v) for n in ("identity", "known_hosts", "state_dir", "root") if (v := getattr(settings, n))
    }
    return settings._replace(**paths)


def settings_argv(settings: Settings) -> list[str]:
    """The flags that give these settings again: the watchdog must not read a file that an activation changes."""
    argv = ["--config", os.devnull]
    for name, value in settings._asdict().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv += [flag] if value else []
        elif isinstance(value, tuple):
            argv += [f"{flag}={item}" for item in value]
        elif value != "":
            argv += [f"{flag}={value}"]
    return argv


# --- decisions ---


def retry_pause_s(result: str, attempt: int) -> float:
    """How long to wait after attempt number `attempt` before the next.

    A failed build is the release's, so the pauses grow from the first one on. The other failures are a bad moment
    more often than not: the first three are tried again at the next poll.
    """
    free_attempts = 0 if result == Result.BUILD_FAILED else 3
    doublings = attempt - free_attempts - 1
    return 0.0 if doublings < 0 else float(min(FIRST_PAUSE_S * 2 ** min(doublings, 20), LONGEST_PAUSE_S))


def decide(
    current: Current, state: State, now_s: float, *, force: bool = False, replica: bool = False
) -> tuple[Action, str]:
    """What to do about `current`, and why, in words for a person.

    `replica`: one of several servers answered, and it may lag behind the others.
    """
    fetched = Action.RETRY if state.unpacked == current.release else Action.FETCH
    tried = state.tried
    if replica and state.published is not None and current.published < state.published:
        return Action.NOTHING, f"the server is behind: it publishes a release of {current.published}"
    if tried is None or tried.release != current.release:
        return fetched, f"new release {current.release[:12]}"
    if force:
        return fetched, f"release {current.release[:12]}, by force"
    if tried.result == Result.OK:
        return Action.NOTHING, f"up to date with release {current.release[:12]}"
    if tried.result in (Result.ROLLED_BACK, Result.ROLLBACK_FAILED):
        return (
            Action.NOTHING,
            f"release {current.release[:12]} was rolled back ({tried.reason}): waiting for a new release",
        )
    if tried.result == Result.INTERRUPTED and state.interruptions > 1:
        return Action.NOTHING, f"release {current.release[:12]} was interrupted twice: waiting for a new release"
    wait_s = parse_time(tried.finished) + retry_pause_s(tried.result, tried.attempt) - now_s
    # A wait longer than the longest pause means that the clock was set back: then it says nothing.
    if 0 < wait_s <= LONGEST_PAUSE_S:
        return Action.NOTHING, f"release {current.release[:12]}: {tried.result}, next attempt in {duration(wait_s)}"
    return fetched, f"release {current.release[:12]}: {tried.result} before, attempt {tried.attempt + 1}"


def may_reboot(setting: str, hour: int, minute: int) -> bool:
    """Whether the setting `reboot` allows one at this local time. A window may cross midnight."""
    window = REBOOT_WINDOW.fullmatch(setting)
    if window is None:
        return setting == "when-needed"
    first_h, first_m, last_h, last_m = (int(part) for part in window.groups())
    first, last, now = first_h * 60 + first_m, last_h * 60 + last_m, hour * 60 + minute
    return first <= now < last if first <= last else now >= first or now < last


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
    (r"[Cc]onnection (closed|reset)|Broken pipe|not responding|banner exchange", True, "the connection was lost"),
]  # fmt: skip


def explain_ssh(output: str) -> tuple[str, bool]:
    """What ssh's words mean, and whether the failure may pass by itself."""
    said = [one_line(line) for line in output.splitlines() if line.strip() and not line.startswith("sftp> ")]
    for pattern, passing, meaning in SSH_FAILURES:
        for line in said:
            if re.search(pattern, line):
                return f"{meaning} ({line.removeprefix('ssh: ')})", passing
    return (said[-1] if said else "sftp ended without a word"), True


def failed_units(output: str) -> list[str]:
    """The units that switch-to-configuration names as failed, from its output."""
    found = re.findall(r"the following (?:units|user units) failed: (.*)", output)
    return sorted({unit.strip() for line in found for unit in line.split(",") if unit.strip()})


# --- files ---


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces `path` so that a reader, or a power cut, sees the old content or the new, whole."""
    aside = path.with_name(f".{path.name}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError:
        aside.unlink(missing_ok=True)  # on a full disk, the first thing that is needed is room
        raise
    os.rename(aside, path)
    sync_directory(path.parent)


def replace_link(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target`, whatever it was before but a directory; never is there none."""
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
        import shutil  # loads bz2 and lzma where Python has them, and a poll is mostly start-up

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        with suppress(FileNotFoundError):  # not `remove`: it would load shutil in each poll
            for left in (settings.state / name).iterdir():
                left.unlink()
            (settings.state / name).rmdir()


def name_holder(settings: Settings, text: str) -> None:
    """Writes into the lock file who holds it: over what is there, for which there is room on a full disk, too."""
    with suppress(OSError), open(settings.state / "lock", "r+") as file:
        file.write(f"{text}\n")
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


# --- processes ---

verbose = False
# What `run` has started and not ended: to be ended with us, also when it was started in a thread.
children: set[subprocess.Popen[bytes]] = set()


class Done(NamedTuple):
    """How a process ended: `code` is None when it was ended at its time limit."""

    code: int | None
    output: str


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    timeout: float | None = None,
    output: IO[bytes] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Runs a program to its end, with its output kept, or in the file `output`; never through a shell.

    It gets a process group of its own, which ends with it at the time limit (seconds) or when we are interrupted.
    """
    if verbose:
        print(f"+ {shlex.join(argv)}", file=sys.stderr)
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output or subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        if check:
            raise BentoError(f"cannot run {argv[0]}: {error.strerror}; is it on PATH?") from None
        return Done(127, f"{argv[0]}: {error.strerror}")
    children.add(process)
    code: int | None
    try:
        raw, _ = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        end_group(process)
        raw, code = b"", None
    except BaseException:
        end_group(process)
        raise
    finally:
        children.discard(process)
    text = (raw or b"").decode(errors="replace")
    if check and code != 0:
        how = f"did not end within {timeout:.0f} s" if code is None else f"exit {code}"
        said = one_line(" ".join(text.splitlines()[-3:]))
        raise BentoError(f"{shlex.join(argv)}: {how}" + (f": {said}" if said else ""))
    return Done(code, text)


def end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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


# --- sftp ---

MARK, MARKED = b"lpwd\n", b"Local working directory:"


class Refused(BentoError):
    """The server was reached, and one sftp command failed there."""


def sftp_argv(settings: Settings, server: str) -> list[str]:
    """The command line of one connection. ssh takes the first value it sees of an option, so the user's come first,
    but for the sharing of connections: what has to be proven is that a new one can be made."""

    def quoted(path: Path) -> str:
        return '"' + str(path).replace("%", "%%") + '"'

    given = Path(settings.known_hosts) if settings.known_hosts else None
    strict = given is not None and given.exists()
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
        f"UserKnownHostsFile={quoted(given or settings.state / 'known_hosts')}",
        *(["GlobalKnownHostsFile=none"] if strict else []),
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


class Sftp:
    """One `sftp` process in batch mode, which is one SSH connection.

    sftp reads its batch line by line, so commands go in as they are decided on, each with a harmless local command
    behind it whose answer marks the end of the one before. Local names are relative to the state directory. `heard`
    is what sftp answered to commands that nobody waited for. `forestalled`: see forestall().
    """

    def __init__(self, settings: Settings, server: str) -> None:
        self.server = server
        self.directory = settings.state
        self.answer = b""
        self.unanswered = 0
        self.heard = ""
        self.forestalled = False
        argv = sftp_argv(settings, server)
        if verbose:
            print(f"+ {shlex.join(argv)}", file=sys.stderr)
        try:
            self.process = subprocess.Popen(
                argv,
                cwd=self.directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"LC_ALL": "C"},
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise Unreachable(f"cannot run sftp: {error.strerror}; is OpenSSH on PATH?", passing=False) from None
        # ssh has its own limit for connecting, with a better message; it does not cover what comes after.
        self.greeting = self.do(None, settings.connect_timeout + 2)

    def do(self, command: str | None, limit_s: float = STALL_S, grows: Path | None = None, ceiling: int = 0) -> str:
        """Runs one command to its end and returns what sftp said. `limit_s` counts from the last sign of life, which
        for a download is the growth of the file `grows`; one that outgrows `ceiling` bytes is broken off."""
        assert self.process.stdout is not None
        self.send(command)
        give_up, size = time.monotonic() + limit_s, -1
        while True:
            ready, _, _ = select.select([self.process.stdout], [], [], 0.2)
            if ready:
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self.failure()
                self.answer = (self.answer + chunk)[-(1 << 18) :]
                at = self.find_mark()
                while at >= 0 and (end := self.answer.find(b"\n", at)) >= 0:
                    said, self.answer = self.answer[:at].decode(errors="replace"), self.answer[end + 1 :]
                    self.unanswered -= 1
                    if not self.unanswered:
                        return said
                    self.heard += said
                    at = self.find_mark()
            if grows is not None and (now := grows.stat().st_size if grows.exists() else 0) != size:
                size, give_up = now, time.monotonic() + limit_s
                if size > ceiling:
                    end_group(self.process)
                    raise BentoError(f"{self.server}: {command} gave more than the announced {ceiling} bytes")
            if time.monotonic() > give_up:
                end_group(self.process)
                raise Unreachable(f"{self.server}: no answer to '{command or 'connect'}' for {limit_s:.0f} s")

    def send(self, command: str | None) -> None:
        """Gives sftp a command, and waits for nothing: the next one that is waited for tells whether it went well."""
        assert self.process.stdin is not None
        line = f"{command}\n".encode() if command else b""
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + MARK)
        self.unanswered += 1

    def find_mark(self) -> int:
        return 0 if self.answer.startswith(MARKED) else self.answer.find(b"\n" + MARKED) + 1 or -1

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

    def get(self, remote: str, local: str, ceiling: int, *, resume: bool = False) -> Path:
        path = self.directory / local
        # It grows by a whole request at a time.
        limit_s = STALL_S + min(ceiling, REQUEST_BYTES) / LEAST_RATE
        self.do(f"{'reget' if resume else 'get'} {remote} {local}", limit_s, grows=path, ceiling=ceiling)
        if path.stat().st_size > ceiling:
            raise BentoError(f"{self.server}: {remote} is larger than the announced {ceiling} bytes")
        return path

    def put(self, local: str, name: str) -> None:
        """Uploads into logs/: under a name that no reader takes, then renamed."""
        # It gives no sign of life before its end.
        limit_s = STALL_S + (self.directory / local).stat().st_size / LEAST_RATE
        self.do(f"put {local} logs/.{name}", limit_s)
        self.do(f"rename logs/.{name} logs/{name}")

    def hang_up(self) -> None:
        """Lets sftp end by itself, as soon as it has done what it was given."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """Ends the connection: at once, or after the commands that nobody waited for."""
        assert self.process.stdout is not None
        self.hang_up()
        if not self.unanswered and self.process.poll() is None:  # a farewell would take a round trip
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            end_group(self.process)
        self.process.stdout.close()


def connect(settings: Settings, server: str, log: Log) -> Sftp:
    session = Sftp(settings, server)
    if "Permanently added" in session.greeting:
        log.say(f"warning: first contact with {server}: its host key is kept in {settings.state / 'known_hosts'}")
    return session


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
        path = session.get("current.json", f"{directory}/current.json", MAX_JSON_BYTES)
    except Refused as error:
        raise BentoError(
            f"{error}: nothing is published for {settings.host} there: run 'bento.py populate {settings.host}' on the server"
        ) from None
    return parse_current(path.read_bytes(), f"{session.server}: current.json", settings.host)


def poll(
    settings: Settings, directory: str, log: Log, *, seen: str | None = None, patience_s: float = 0.0
) -> tuple[Sftp, Current]:
    """A connection to the first server that has a usable `current.json`, and what it says.

    Tries again for `patience_s` seconds: at boot and after a resume, names and routes come late. With several
    servers, one whose publication is older than `seen` is taken only when no other answers.
    """
    if not settings.identity_file.exists():
        raise Unreachable(f"no SSH key at {settings.identity_file}: make one with 'bento-client key'", passing=False)
    give_up, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        failures: list[BentoError] = []
        behind: tuple[Sftp, Current] | None = None
        for server in settings.server:
            session: Sftp | None = None
            try:
                session = connect(settings, server, log)
                current = read_current(session, settings, directory)
            except BentoError as error:
                failures.append(error)
                if session is not None:
                    session.close()
                continue
            if len(settings.server) > 1 and seen is not None and current.published < seen:
                log.say(f"{server} is behind: it publishes a release of {current.published}")
                if behind is None:
                    behind = session, current
                else:
                    session.close()
                continue
            if behind is not None:
                behind[0].close()
            return session, current
        if behind is not None:
            return behind
        for failure in failures:
            if not isinstance(failure, Unreachable):
                raise failure
        passing = any(isinstance(failure, Unreachable) and failure.passing for failure in failures)
        if not passing or time.monotonic() + pause_s > give_up:
            raise Unreachable("; ".join(str(failure) for failure in failures), passing=passing)
        time.sleep(pause_s)
        pause_s *= 2


# --- this machine's systems ---


def running_system(settings: Settings) -> str:
    return os.path.realpath(settings.system_path("/run/current-system"))


def profile_path(settings: Settings) -> Path:
    return settings.system_path("/nix/var/nix/profiles/system")


def profile_system(settings: Settings) -> str:
    return os.path.realpath(profile_path(settings))


def boot_id(settings: Settings) -> str:
    """The kernel's name for this boot."""
    path = settings.system_path("/proc/sys/kernel/random/boot_id")
    return (path if path.exists() else Path("/proc/sys/kernel/random/boot_id")).read_text().strip()


def has_systemd(settings: Settings) -> bool:
    return settings.system_path("/run/systemd/system").is_dir()


def boot_parts(system: str) -> list[str | None]:
    """What of a system only a boot can change: where its kernel, initrd and kernel modules lie."""
    links = (Path(system) / name for name in ("kernel", "initrd", "kernel-modules"))
    return [os.path.realpath(link) if link.is_symlink() or link.exists() else None for link in links]


def booted_system(settings: Settings) -> str:
    return os.path.realpath(settings.system_path("/run/booted-system"))


def has_kernel_of(settings: Settings, system: str) -> bool:
    """Whether this machine was booted with the system's kernel, initrd and modules, as far as it says."""
    booted = booted_system(settings)
    return not os.path.exists(booted) or boot_parts(booted) == boot_parts(system)


def has_new_kernel(settings: Settings) -> bool:
    """Whether a boot would give another kernel, initrd or modules than now."""
    return profile_path(settings).exists() and not has_kernel_of(settings, profile_system(settings))


def needs_reboot(settings: Settings) -> bool:
    """Whether a boot would give another kernel, or a system that could not go live."""
    return has_new_kernel(settings) or waiting_for_boot(settings) is not None


def waiting_for_boot(settings: Settings) -> Pending | None:
    """The journal of a boot default that this boot has not proven."""
    for name in ("pending.json", "waiting.json"):
        with suppress(FileNotFoundError, BentoError):
            found = parse_pending((settings.state / name).read_bytes(), name)
            if (found.step, found.boot_id, found.new) == (Step.REBOOTING, boot_id(settings), profile_system(settings)):
                return found
    return None


def boots_as_now(settings: Settings, system: str) -> str:
    """The system, if it has the kernel that is proven because it runs; else the one that was booted."""
    return system if has_kernel_of(settings, system) else booted_system(settings)


def can_go_live(settings: Settings, new: str) -> bool:
    """False when the systems' switch inhibitors differ: NixOS (25.11 and later) then refuses to switch."""
    try:
        booted = (settings.system_path("/run/booted-system") / "switch-inhibitors").read_bytes()
        return booted == Path(new, "switch-inhibitors").read_bytes()
    except FileNotFoundError:
        return True


def set_profile(settings: Settings, log: Log, system: str) -> None:
    with log.output() as out:
        run(
            ["nix-env", "-p", str(profile_path(settings)), "--set", system],
            output=out,
            timeout=settings.activation_timeout,
        )


def wait_for_units(pattern: str, give_up: float) -> None:
    """Until none of these units is active, or the monotonic clock says `give_up`."""
    while run(["systemctl", "is-active", "--quiet", pattern], check=False, timeout=30).code == 0:
        if time.monotonic() > give_up:
            return
        time.sleep(0.5)


def switch(settings: Settings, log: Log, system: str, action: str, token: str) -> int | None:
    """Runs the system's switch-to-configuration; its exit code, or None when it did not end in time.

    Under systemd in a transient unit: the switch may stop, restart or kill whatever it likes, us included.
    """
    log.say(f"switch-to-configuration {action}: {system}")
    argv = [f"{system}/bin/switch-to-configuration", action]
    limit_s = settings.activation_timeout
    with log.output() as out:
        if not has_systemd(settings):
            return run(argv, check=False, output=out, timeout=limit_s).code
        sink = "null" if out.name == os.devnull else f"append:{out.name}"
        unit = f"bento-switch-{token}-{os.urandom(3).hex()}"
        wrapped = [
            "systemd-run", "--quiet", "--collect", "--wait", "--service-type=exec", f"--unit={unit}",
            f"--property=StandardOutput={sink}", f"--property=StandardError={sink}",
            f"--property=RuntimeMaxSec={limit_s}", "--property=TimeoutStopSec=10",
            *transient_environment("LOCALE_ARCHIVE"), "--", *argv,
        ]  # fmt: skip
        started = time.monotonic()
        code = run(wrapped, check=False, output=out, timeout=limit_s + WATCHDOG_MARGIN_S).code
        # systemd-run may lose its bus in the middle of a switch. The unit is what counts.
        wait_for_units(unit, started + limit_s + WATCHDOG_MARGIN_S)
        return None if time.monotonic() - started >= limit_s else code


def transient_environment(*names: str) -> list[str]:
    return [f"--setenv={name}={os.environ[name]}" for name in names if name in os.environ]


def stop_switch(settings: Settings, token: str) -> None:
    """Ends what an earlier client started and left, so that it neither holds the lock nor goes on behind our back."""
    if has_systemd(settings):
        run(["systemctl", "stop", f"bento-switch-{token}-*.service"], check=False, timeout=60)


# --- reports ---


def make_report(settings: Settings, state: State, phase: Phase) -> Report:
    running = running_system(settings)
    return Report(
        host=settings.host,
        client=VERSION,
        polled=format_time(time.time()),
        phase=phase,
        release=state.release if running == state.system else None,
        system=running,
        needs_reboot=needs_reboot(settings),
        last=state.last,
        revision=state.revision if running == state.system else None,
    )


LIST_LOGS = "ls -1 logs"
ANNOUNCEMENT = "logs/.announcement"


def write_report(settings: Settings, state: State, directory: str, phase: Phase) -> str:
    """A fresh status.json: its name for sftp."""
    name = f"{directory}/{phase}.json"
    path = settings.state / name
    path.write_bytes(encode(make_report(settings, state, phase)))
    path.chmod(0o640)
    return name


def forestall(session: Sftp) -> None:
    """An earlier connection's announcement that is still on its way must not come after what this connection says."""
    session.send(f"-rm {ANNOUNCEMENT}")
    session.forestalled = True


def announce(session: Sftp, settings: Settings, state: State, directory: str, phase: Phase) -> None:
    """Tells the server what comes next, without waiting for its answers: on a long line they take their time."""
    with suppress(OSError):
        name = write_report(settings, state, directory, phase)
        # With a minus, a refusal does not end the session.
        session.send(f"-put {name} {ANNOUNCEMENT}")
        session.send(f"-rename {ANNOUNCEMENT} logs/status.json")


def deliver(session: Sftp, settings: Settings, state: State, directory: str, phase: Phase = Phase.IDLE) -> None:
    """Uploads the logs in the outbox, oldest first, then a fresh status.json; keeps the newest logs on the server."""
    outbox = settings.state / "outbox"
    waiting = sorted(path.name for path in outbox.glob("*.log") if LOG_NAME.fullmatch(path.name))
    for name in waiting:
        session.put(f"outbox/{name}", name)
        (outbox / name).unlink()
    if waiting and not session.forestalled:
        forestall(session)
    session.put(write_report(settings, state, directory, phase), "status.json")
    if waiting:
        listing = session.heard if LIST_LOGS in session.heard else session.do(LIST_LOGS)
        old = sorted(set(re.findall(rf"(?m)^(?:logs/)?({LOG_NAME.pattern})\s*$", listing)) - set(waiting))
        surplus = len(old) - max(0, KEEP_LOGS - len(waiting))
        for name in old[: min(max(0, surplus), KEEP_LOGS)]:  # no more: nobody reads what sftp says to it
            session.send(f"-rm logs/{name}")


def report(
    settings: Settings, log: Log, state: State, directory: str, session: Sftp | None = None, phase: Phase = Phase.IDLE
) -> None:
    """Delivers over the open connection if that still works, else over a new one; else it waits in the outbox."""
    with suppress(BentoError, OSError):
        if session is not None:
            deliver(session, settings, state, directory, phase)
            return
    failures: list[str] = []
    for server in settings.server:
        try:
            session = Sftp(settings, server)
            try:
                deliver(session, settings, state, directory, phase)
                return
            finally:
                session.close()
        except (BentoError, OSError) as error:
            failures.append(str(error))
    log.say(f"report kept for the next run: {'; '.join(failures)}")


class Outcome(NamedTuple):
    """How an attempt ended. `unreachable`: because of the line or the server, not of the release."""

    result: Result
    reason: str = ""
    system: str | None = None
    unreachable: bool = False

    @property
    def exit_code(self) -> int:
        return 0 if self.result == Result.OK else Unreachable.exit_code if self.unreachable else 1


def save_state(settings: Settings, state: State) -> None:
    write_atomic(settings.state / "state.json", encode(state))


def record(
    settings: Settings,
    log: Log,
    state: State,
    outcome: Outcome,
    release: str | None,
    published: str,
    started: str,
    attempt: int,
    *,
    aside: bool = False,
    revision: str | None = None,
) -> State:
    """How an attempt ended: its log goes into the outbox, the rest is for state.json.

    `aside`: it was about an older release, that waited for a boot; the newest one's result still counts.
    """
    log.say(
        ("" if outcome.result == Result.OK else "error: ") + ": ".join(filter(None, (outcome.result, outcome.reason)))
    )
    now_s = time.time()
    name = log_name(now_s, release, outcome.result)
    last = Last(
        release=release,
        result=outcome.result,
        reason=one_line(outcome.reason),
        system=outcome.system,
        started=started,
        finished=format_time(now_s),
        attempt=attempt,
        log=name,
        revision=revision,
    )
    state = state._replace(last=state.tried if aside and outcome.result == Result.OK else last)
    if release is not None and not aside:
        before = state.interruptions if state.tried is not None and state.tried.release == release else 0
        interruptions = before + (outcome.result == Result.INTERRUPTED)
        state = state._replace(tried=last, interruptions=interruptions, published=published)
    if outcome.result in (Result.POSTPONED, Result.INTERRUPTED):
        state = state._replace(rebooted=None)
    running = running_system(settings)
    if outcome.result == Result.OK and outcome.system == running:
        if state.system != running:
            state = state._replace(
                previous=state.system, previous_release=state.release, previous_revision=state.revision
            )
        state = state._replace(release=release, system=running, revision=revision)
    elif state.previous == running != state.system:  # back again
        state = state._replace(release=state.previous_release, system=running, revision=state.previous_revision)
        state = state._replace(previous=None, previous_release=None, previous_revision=None)
    outbox = settings.state / "outbox"
    try:
        outbox.mkdir(mode=0o700, exist_ok=True)
        log.hand_over(outbox / name)
    except OSError as error:
        log.say(f"the log could not be kept: {error.strerror}")
    for old in sorted(outbox.glob("*.log"))[:-KEEP_LOGS]:
        old.unlink()
    return state


# --- fetch and build ---


def fetch(session: Sftp, settings: Settings, current: Current, *, thrifty: bool) -> None:
    """Downloads, checks and unpacks a release into config.new. Whatever goes wrong, config/ stays what it is.

    `thrifty`: what lies in config/ already is not downloaded again.
    """
    if current.size > MAX_RELEASE_BYTES:
        raise BentoError(
            f"release {current.release[:12]} has {current.size} bytes, more than the limit of {MAX_RELEASE_BYTES}"
        )
    remove(settings.state / "config.new")
    partial = settings.state / "partial"
    partial.mkdir(mode=0o700, exist_ok=True)
    name = f"{current.release}.tar"
    wanted = {name: current.size} | {part.sha256: part.size for part in current.parts}
    for left in partial.iterdir():
        if left.stat().st_size > wanted.get(left.name, -1):
            left.unlink()
    here = sum(left.stat().st_size for left in partial.iterdir())
    free, needed = free_bytes(settings.state), 2 * current.size + MIN_FREE_BYTES - here
    if free < needed:
        raise BentoError(f"{settings.state}: {free} bytes free, {needed} needed: free some space")
    tar = partial / name
    try:
        if thrifty:
            join_parts(session, settings, current, tar)
        if not tar.exists() or tar.stat().st_size < current.size:
            session.get(f"releases/{name}", f"partial/{name}", current.size, resume=tar.exists())
        size, digest = tar.stat().st_size, hash_file(tar)
        if size != current.size:
            raise BentoError(
                f"releases/{name}: {size} bytes came, {current.size} were announced: remove it on the server, 'bento.py populate' makes it anew"
            )
        if digest != current.release:
            raise BentoError(
                f"releases/{name}: its SHA-256 is {digest[:12]}…: damaged; remove it on the server, 'bento.py populate' makes it anew"
            )
        unpack(tar, settings.state / "config.new")
    except Unreachable:
        raise  # the next run goes on where the line broke
    except (BentoError, OSError):
        remove(settings.state / "config.new")
        remove(partial)
        raise
    remove(partial)


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
    import hashlib  # only a new release needs it; a poll is mostly start-up

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(tar_path: Path, target: Path) -> None:
    """Unpacks a release into a new directory `target`. BentoError for anything that `populate` would not have made.

    A release has only directories and regular files, so this is stricter than tarfile's `data` filter, which
    Python 3.11.2 does not have.
    """
    import shutil
    import tarfile

    remove(target)
    target.mkdir(mode=0o755)
    try:
        with tarfile.open(tar_path, "r:", encoding="utf-8") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header in memory
                where = one_line(repr(member.name), 120)
                if any(part in ("", ".", "..") for part in member.name.split("/")):
                    raise BentoError(f"the release has a member with the unsafe name {where}")
                path = target / member.name
                if member.type == tarfile.DIRTYPE:
                    path.mkdir(mode=0o755)
                elif member.type == tarfile.REGTYPE and member.sparse is None:
                    source = tar.extractfile(member)
                    assert source is not None
                    mode = 0o755 if member.mode & 0o100 else 0o644
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
                    with open(descriptor, "wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                        os.fchmod(descriptor, mode)
                    os.utime(path, (1, 1))
                else:
                    raise BentoError(f"the release has {where}, which is neither a file nor a directory")
        for directory, _, _ in os.walk(target, topdown=False):
            os.utime(directory, (1, 1))
            os.chmod(directory, 0o755)
    except (tarfile.TarError, UnicodeError, ValueError, EOFError) as error:
        raise BentoError(f"the release is no valid archive: {one_line(str(error))}") from None
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise BentoError(
            f"the release is no valid archive: {error.strerror}: {one_line(repr(error.filename), 120)}"
        ) from None


def is_untouched(tree: Path) -> bool:
    """Whether an unpacked tree is as it was unpacked: a build that was killed may have left a flake.lock in it."""
    return tree.is_dir() and all(
        int(os.lstat(os.path.join(top, name)).st_mtime) == 1
        for top, directories, files in os.walk(tree)
        for name in (*directories, *files)
    )


def adopt(settings: Settings, state: State, release: str) -> State:
    """Makes config.new the new config/. In between there is none that counts: state.json names what config/ holds."""
    os.sync()
    state = state._replace(unpacked=None)
    save_state(settings, state)
    remove(settings.state / "config")
    os.rename(settings.state / "config.new", settings.state / "config")
    state = state._replace(unpacked=release)
    save_state(settings, state)
    return state


def read_recipe(tree: Path, host: str) -> Recipe:
    """How a tree is built for a host."""
    try:
        raw = (tree / "bento.json").read_bytes()
    except FileNotFoundError:
        return Recipe(host)
    return parse_recipe(raw, "bento.json", host)


def is_flake(tree: Path, recipe: Recipe) -> bool:
    return (tree / recipe.directory / "flake.nix").exists()


def flake_url(tree: Path, directory: str) -> str:
    """A flake's address for Nix. With `?dir=` it may read what lies beside its directory, as it may in its owner's
    repository; Nix before 2.24, and Lix, have no such thing for a path."""
    if not directory:
        return f"path:{tree}"
    said = run(["nix", "--version"], check=False, timeout=60).output
    found = re.search(r"\(Nix\) (\d+)\.(\d+)", said)
    whole = found is not None and (int(found[1]), int(found[2])) >= (2, 24)
    return f"path:{tree}?dir={directory}" if whole else f"path:{tree}/{directory}"


def rebuild_argv(action: str, tree: Path, recipe: Recipe) -> list[str]:
    """nixos-rebuild's command line, on both sides."""
    if is_flake(tree, recipe):
        return [
            "nixos-rebuild", action, "--flake", f"{flake_url(tree, recipe.directory)}#{recipe.attribute}",
            *recipe.options,
        ]  # fmt: skip
    entry = tree / recipe.directory / "configuration.nix"
    return ["nixos-rebuild", action, "--no-flake", "-I", f"nixos-config={entry}", *recipe.options]


def build_argv(settings: Settings, config: Path) -> list[str]:
    recipe = read_recipe(config, settings.host)
    upgrade = settings.upgrade_channels and not is_flake(config, recipe)
    return [*rebuild_argv("build", config, recipe), *(["--upgrade"] if upgrade else [])]


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


def build(settings: Settings, log: Log) -> str:
    """Builds config/ and returns the new system's store path. The running system is not touched."""
    link = settings.state / "result"
    remove(link)
    argv = build_argv(settings, settings.state / "config")
    log.say(shlex.join(argv))
    directory = settings.state / "config" / read_recipe(settings.state / "config", settings.host).directory
    with log.output() as out, unchanged_lock(directory):
        code = run(argv, check=False, output=out, cwd=settings.state, timeout=settings.build_timeout).code
    if code is None:
        raise BentoError(f"nixos-rebuild build did not end within {settings.build_timeout} s")
    if code != 0:
        raise BentoError(f"nixos-rebuild build: exit {code}: {last_words(log)}")
    new = os.path.realpath(link)
    if not Path(new, "bin/switch-to-configuration").exists():
        raise BentoError(f"nixos-rebuild build left no system in {link}")
    return new


# --- activation ---


@contextmanager
def best_effort(log: Log) -> Iterator[None]:
    """For what must not keep a machine from going back to its old system: a full disk, a watchdog that cannot start."""
    try:
        yield
    except (OSError, BentoError) as error:
        log.say(f"going on without: {error}")


def keep_from_collection(settings: Settings, log: Log, system: str) -> None:
    """A garbage collection root for the system that a boot may have to lead back to."""
    link = settings.system_path("/nix/var/nix/gcroots/bento-way-back")
    with best_effort(log):
        link.parent.mkdir(parents=True, exist_ok=True)
        replace_link(link, system)


def save_pending(settings: Settings, pending: Pending) -> None:
    write_atomic(settings.state / "pending.json", encode(pending))


def load_pending(settings: Settings, log: Log) -> Pending | None:
    return read_journal(settings.state / "pending.json", parse_pending, log)


def clear_pending(settings: Settings) -> None:
    """The end of an activation, whichever way it went: a watchdog that comes late finds no journal."""
    remove(settings.state / "pending.json")
    sync_directory(settings.state)


def forget(settings: Settings, log: Log, pending: Pending) -> None:
    """Ends the journal of a deployment that came to nothing, if it is ours."""
    left = load_pending(settings, log)
    if left is not None and left.token == pending.token:
        clear_pending(settings)
        disarm(settings, left)


def arm(settings: Settings, pending: Pending, limit_s: float) -> Pending:
    """Arms a new watchdog, outside our unit, that runs `rollback` in `limit_s` seconds; then ends the one before.

    OnActiveSec counts on CLOCK_MONOTONIC, which nobody can set. It gets these settings as flags and this very file
    of the old system, because an activation changes what lies in /etc.
    """
    deadline_s = time.clock_gettime(time.CLOCK_BOOTTIME) + limit_s
    if not has_systemd(settings):
        return pending._replace(deadline_s=deadline_s)
    unit = f"bento-watchdog-{pending.token}-{os.urandom(3).hex()}"
    armed = pending._replace(deadline_s=deadline_s, watchdog=unit)
    client = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(__file__), "rollback", "--token", pending.token]
    run(
        ["systemd-run", "--quiet", "--collect", f"--unit={unit}", f"--on-active={int(limit_s)}",
         "--timer-property=AccuracySec=1s", *transient_environment("PATH", "HOME", "LOCALE_ARCHIVE", "NIX_REMOTE"),
         "--", *client, *settings_argv(settings)],
        timeout=60,
    )  # fmt: skip
    disarm(settings, pending)
    return armed


def disarm(settings: Settings, pending: Pending) -> None:
    if pending.watchdog is not None and has_systemd(settings):
        run(["systemctl", "stop", f"{pending.watchdog}.timer"], check=False, timeout=60)


def advance(settings: Settings, pending: Pending, step: Step, limit_s: float) -> Pending:
    """The next step of an activation, with a deadline of its own, on disk before anything of it is done."""
    save_pending(settings, pending._replace(step=step))
    armed = arm(settings, pending._replace(step=step), limit_s + WATCHDOG_MARGIN_S)
    save_pending(settings, armed)
    return armed


def probe(settings: Settings, log: Log) -> None:
    """Unreachable when this client, with these settings, cannot read its `current.json` over a new connection."""
    with scratch(settings) as directory:
        try:
            session, _ = poll(settings, directory, log)
        except Unreachable:
            raise
        except BentoError as error:
            raise Unreachable(str(error)) from None
        session.close()


def probe_failure(settings: Settings, log: Log) -> str | None:
    try:
        probe(settings, log)
    except Unreachable as error:
        return str(error)
    return None


def probe_system(settings: Settings, log: Log, system: str, limit_s: float) -> str | None:
    """None when the system's own client, with the system's own settings, reaches the server; else why not.

    A system without one (activated by force, or older than Bento) is judged by this client.
    """
    client = Path(system, "sw/bin/bento-client")
    if not client.exists():
        return probe_failure(settings, log)
    done = run([str(client), "probe"], check=False, timeout=limit_s)
    with log.output() as out, suppress(OSError):
        out.write(done.output.encode())
    if done.code == 0:
        return None
    said = [line for line in done.output.splitlines() if line.strip()]
    return one_line(said[-1].removeprefix("bento: error: ")) if said else "bento-client probe said nothing"


def can_reach(settings: Settings, log: Log, system: str) -> str | None:
    """None when the system that is running again, or this client, reaches the server; else why not.

    Either will do: the question is whether the line and the server work, and we may be the client of a release with
    wrong settings, or be run with other settings than the system's.
    """
    failure = probe_system(settings, log, system, settings.confirm_timeout)
    return None if failure is None else probe_failure(settings, log)


def until_confirm_timeout(settings: Settings, check: Callable[[], str | None]) -> str | None:
    """Repeats a check that says why it fails until it does not, or time is up."""
    give_up = time.monotonic() + settings.confirm_timeout
    while True:
        failure = check()
        if failure is None or time.monotonic() + 1 > give_up:
            return failure
        time.sleep(1)


def settings_of(system: str) -> dict[str, Any]:
    """What a system has in its /etc/bento/client.json; nothing, where that cannot be read."""
    try:
        found = json.loads(Path(system, "etc/bento/client.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def health_checks(settings: Settings, system: str) -> tuple[str, ...]:
    """The checks that the new system asks for; where it does not say, those of the settings we run with."""
    asked = settings_of(system).get("health_checks")
    return tuple(map(str, asked)) if isinstance(asked, list) else settings.health_checks


def unfit_for_boot(settings: Settings, old: str, new: str) -> str | None:
    """Why a system that only a boot can prove must not have one: its client would not find the journal, or not run, and
    nothing would lead back."""
    before, after = (settings_of(system).get("state_dir") for system in (old, new))
    if before is not None and after is not None and before != after:
        return f"it needs a reboot, and moves Bento's files to {after}: move them in a release of its own"
    client = Path(new, "sw/bin/bento-client")
    if client.exists():
        config = Path(new, "etc/bento/client.json")
        done = run([str(client), "--config", str(config), "status"], check=False, timeout=settings.confirm_timeout)
        said = done.output.rpartition("bento: error: ")[2]
        if done.code == UsageError.exit_code and said != done.output:
            return f"it needs a reboot, and its client refuses its settings: {one_line(said)}"
    return None


def how_ended(code: int | None) -> str:
    return "no end in time" if code is None else f"exit {code}"


NO_TIME = "no time was left for the health checks"


def check_health(settings: Settings, log: Log, system: str, give_up: float) -> str | None:
    """`give_up`: when time is up for all checks together, on the monotonic clock."""
    if (
        has_systemd(settings)
        and run(["systemctl", "is-active", "--quiet", "bento.timer"], check=False, timeout=30).code != 0
    ):
        return "bento.timer is not active in the new system"
    for command in health_checks(settings, system):
        left_s = give_up - time.monotonic()
        if left_s <= 0:
            return NO_TIME
        with log.output() as out:
            code = run(["sh", "-c", command], check=False, output=out, timeout=left_s).code
        if code != 0:
            return f"health check failed ({how_ended(code)}): {one_line(command, 100)}"
    return None


def prove(settings: Settings, log: Log, system: str) -> str | None:
    """None when the system that now runs does its job, else why not."""
    give_up = time.monotonic() + settings.confirm_timeout
    log.say(f"proof: {system}/sw/bin/bento-client probe, for at most {settings.confirm_timeout} s")

    told: str | None = None

    def check() -> str | None:
        nonlocal told
        failure = probe_system(settings, log, system, max(give_up - time.monotonic(), 1.0))
        failure = f"new system: {failure}" if failure is not None else check_health(settings, log, system, give_up)
        told = told if told is not None and failure == NO_TIME else failure  # what failed before says more
        return told

    return until_confirm_timeout(settings, check)


def commit(settings: Settings, log: Log, pending: Pending) -> str | None:
    """Makes the new system the boot default. None when that is done, else why it could not be."""
    try:
        set_profile(settings, log, pending.new)
    except BentoError as error:
        return f"the system profile could not be set: {error}"
    code = switch(settings, log, pending.new, "boot", pending.token)
    return None if code == 0 else f"the boot loader could not be written ({how_ended(code)}): {last_words(log)}"


def last_words(log: Log) -> str:
    """The last line that a program, not Bento, wrote to the log; its last error message if there is one."""
    said = [line for line in log.tail(8192).splitlines() if line.strip() and " bento: " not in line]
    errors = [line for line in said if line.lstrip().startswith("error:") and len(line.strip()) > len("error:")]
    return one_line((errors or said or ["no output"])[-1])


def restore_profile(settings: Settings, log: Log, pending: Pending) -> bool:
    """Takes back a commit, whole or cut short, so that the machine boots what it booted before; whether it will."""
    try:
        if profile_system(settings) != pending.profile:
            set_profile(settings, log, pending.profile)
        code = switch(settings, log, pending.profile, "boot", pending.token)
    except BentoError as error:
        log.say(f"the system profile still names the new system: {error}")
        return False
    if code != 0:
        log.say(f"the boot loader could not be written for the old system ({how_ended(code)})")
    # A boot loader that could not be written in a commit can hardly be written now, and need not be.
    return code == 0 or pending.step == Step.COMMITTING


def not_restored(pending: Pending, reason: str) -> Outcome:
    reason = f"{reason}; and the boot default could not be set back to {pending.profile}"
    return Outcome(Result.ROLLBACK_FAILED, f"{reason}: tried again at the next run")


def roll_back(settings: Settings, log: Log, pending: Pending, outcome: Outcome) -> Outcome:
    """Goes back to the old system, by store path, and finds out whose fault it was.

    `outcome` is what to report if all goes well. When the old system cannot reach the server either, a release
    that seemed bad is not to blame. The journal stays if going back fails, so that the next run tries again.
    """
    log.say(f"going back to {pending.old}: {outcome.reason}")
    stop_switch(settings, pending.token)
    restored = True
    if pending.step not in (Step.ACTIVATING, Step.PROVING, Step.ROLLING_BACK) or (
        profile_system(settings) != pending.profile
    ):
        restored = restore_profile(settings, log, pending)
    by_hand, rebooted = pending.step == Step.STEPPING_BACK, pending.boot_id != boot_id(settings)
    pending = pending._replace(verdict=outcome.result, reason=one_line(outcome.reason))
    with best_effort(log):
        limit_s = settings.activation_timeout + settings.confirm_timeout
        pending = advance(settings, pending, Step.ROLLING_BACK if restored else Step(pending.step), limit_s)
    # After a boot its kernel goes on until the next, so nothing that is tried now tells whose fault it was.
    stays = (rebooted or by_hand) and running_system(settings) == pending.new and not can_go_live(settings, pending.old)
    if not stays and (not rebooted or running_system(settings) == pending.new):
        code = switch(settings, log, pending.old, "test", pending.token)
        if code not in (0, 4) and running_system(settings) != pending.old:
            reason = f"{outcome.reason}; and going back to {pending.old} failed ({how_ended(code)}: {last_words(log)})"
            return Outcome(Result.ROLLBACK_FAILED, f"{reason}: tried again at the next run")
    if not restored:
        return not_restored(pending, outcome.reason)
    if stays:
        result = outcome.result if by_hand else Result.INTERRUPTED
        return Outcome(result, f"{outcome.reason}; the old system takes effect at the next reboot")
    if outcome.result == Result.ROLLED_BACK:
        failure = until_confirm_timeout(settings, lambda: can_reach(settings, log, pending.old))
        if failure is not None and booted_system(settings) == pending.new:
            return Outcome(Result.INTERRUPTED, f"{outcome.reason}; nor can the old one on its kernel")
        if failure is not None:
            reason = f"{outcome.reason}; nor can the old one: not the release's fault, tried again later"
            return Outcome(Result.POSTPONED, reason, unreachable=True)
    return outcome


def take_over(settings: Settings, log: Log, pending: Pending) -> Outcome:
    """Activates, proves and commits the new system; rolls back what does not prove itself."""
    live, note = can_go_live(settings, pending.new), ""
    if live and not pending.new == pending.old == running_system(settings):
        code = switch(settings, log, pending.new, "test", pending.token)
        if code == 100:
            live = False
        elif code == 4:
            units = failed_units(log.tail(1 << 16))
            note = f"activated, but these units failed: {', '.join(units) or 'see the log'}"
        elif code != 0:
            reason = f"switch-to-configuration test: {how_ended(code)}: {last_words(log)}"
            return roll_back(settings, log, pending, Outcome(Result.ROLLED_BACK, reason))
    if live:
        pending = advance(settings, pending, Step.PROVING, settings.confirm_timeout)
        failure = prove(settings, log, pending.new)
        if failure is not None:
            return roll_back(settings, log, pending, Outcome(Result.ROLLED_BACK, failure))
    elif (unfit := unfit_for_boot(settings, pending.old, pending.new)) is not None:
        outcome = Outcome(Result.BUILD_FAILED, unfit)
        # After a way back that failed, what runs is not what the machine is to go back to.
        return outcome if running_system(settings) == pending.old else roll_back(settings, log, pending, outcome)
    pending = advance(settings, pending, Step.COMMITTING, 2 * settings.activation_timeout)
    trouble = commit(settings, log, pending)
    if trouble is not None:
        return roll_back(settings, log, pending, Outcome(Result.POSTPONED, trouble))
    if not live:
        back = boots_as_now(settings, pending.old)
        save_pending(settings, pending._replace(step=Step.REBOOTING, old=back, profile=back))
        remove(settings.state / "waiting.json")
        keep_from_collection(settings, log, back)
        note = "it cannot go live: it takes effect at the next reboot, and is proven then"
    return Outcome(Result.OK, note, pending.new)


def activate(settings: Settings, log: Log, pending: Pending) -> Outcome:
    """take_over, with the journal and the watchdog around it, and a way back from our own failures too."""
    if not has_systemd(settings):
        log.say("systemd does not run here: no watchdog guards this activation")
    try:
        pending = advance(settings, pending, Step.ACTIVATING, settings.activation_timeout)
    except (OSError, BentoError) as error:
        return Outcome(Result.POSTPONED, f"not activated, the watchdog could not be armed: {error}")
    try:
        return take_over(settings, log, pending)
    except (OSError, BentoError) as error:
        return roll_back(settings, log, pending, Outcome(Result.POSTPONED, str(error)))
    except Exception as error:  # a bug of ours must not leave a machine on a system that proved nothing
        log.say(traceback_text())
        reason = f"a bug in Bento: {type(error).__name__}: {error}; the traceback is in the log"
        return roll_back(settings, log, pending, Outcome(Result.INTERRUPTED, reason))


def traceback_text() -> str:
    import traceback  # only a bug needs it

    return traceback.format_exc()


def expect_boot(settings: Settings, log: Log, state: State) -> None:
    """A boot default that was proven on another kernel gets a journal, which outlives any reboot, whoever asks for it:
    the first run after it proves the system again, or leads back to the one that is booted now.
    """
    path, new = settings.state / "waiting.json", profile_system(settings)
    waiting = read_journal(path, parse_pending, log)
    if waiting is not None and waiting.new != new:
        remove(path)
        waiting = None
    if waiting is None and state.system == new and state.release is not None and has_new_kernel(settings):
        booted = booted_system(settings)
        waiting = Pending(
            release=state.release, published=state.published or format_time(0), old=booted, new=new, profile=booted,
            step=Step.REBOOTING, boot_id=boot_id(settings), token=os.urandom(4).hex(),
            started=format_time(time.time()), attempt=1, revision=state.revision,
        )  # fmt: skip
        write_atomic(path, encode(waiting))
        keep_from_collection(settings, log, booted)


def finish(
    settings: Settings,
    log: Log,
    state: State,
    directory: str,
    pending: Pending,
    outcome: Outcome,
    session: Sftp | None = None,
) -> State:
    """Writes the end of a deployment down, and only then forgets that it was under way; reports it, and only then lets
    its watchdog go: a client may hang in its report too.
    """
    booted = pending.step in (Step.REBOOTING, Step.REVERTING)
    aside = booted and state.tried is not None and state.tried.release != pending.release
    state = record(
        settings, log, state, outcome, pending.release, pending.published, pending.started, pending.attempt,
        aside=aside, revision=pending.revision,
    )  # fmt: skip
    try:
        save_state(settings, state)
        expect_boot(settings, log, state)
    except OSError:  # a full disk: the journal stays, and the server hears of it at least
        report(settings, log, state, directory, session)
        raise
    left = load_pending(settings, log)
    ours = left is not None and left.token == pending.token and outcome.result != Result.ROLLBACK_FAILED
    if ours and left is not None and (left.step != Step.REBOOTING or left.boot_id != boot_id(settings)):
        clear_pending(settings)
    report(settings, log, state, directory, session)
    if session is not None:
        session.close()
    if ours and left is not None:
        disarm(settings, left)
    return state


# --- recovery ---


def load_journal(settings: Settings, log: Log) -> Pending | None:
    """What an earlier run left to be settled: its activation, else a system that waited for the boot that came."""
    pending = load_pending(settings, log)
    if pending is not None:
        return pending
    path = settings.state / "waiting.json"
    waiting = read_journal(path, parse_pending, log)
    if waiting is None or waiting.boot_id == boot_id(settings):
        return None
    os.replace(path, settings.state / "pending.json")
    sync_directory(settings.state)
    return waiting


def recover(settings: Settings, log: Log, pending: Pending) -> Outcome | None:
    """Settles an activation that an earlier run could not. None: there is nothing to report, or nothing yet."""
    running = running_system(settings)
    if pending.step == Step.BUILDING:
        log.say("an update was cut short before it changed anything: starting over")
        forget(settings, log, pending)
        return None
    if pending.boot_id == boot_id(settings):
        if pending.step == Step.REBOOTING:
            return None
        if pending.step == Step.REVERTING:
            run(["systemctl", "reboot"], timeout=60)
            return None
        log.kept = True
        log.say(f"an activation was cut short while {pending.step}")
        if has_systemd(settings):  # a boot loader is not to be left half written
            wait_for_units(f"bento-switch-{pending.token}-*", time.monotonic() + settings.activation_timeout)
        if pending.step == Step.COMMITTING and running == pending.new and not pending.verdict:
            return complete(settings, log, pending)
        return roll_back(settings, log, pending, verdict(pending, f"the client was ended while {pending.step}"))
    log.kept = True
    log.say(f"the machine was restarted while {pending.step}")
    if running not in (pending.old, pending.new, pending.profile):
        log.say(f"it runs {running}, which is none of ours: left as it is")
        forget(settings, log, pending)
        return None
    if pending.step in (Step.ROLLING_BACK, Step.STEPPING_BACK) or running != pending.new:
        outcome = verdict(pending, f"the machine was restarted while {pending.step}")
        if pending.step == Step.REBOOTING and not pending.verdict:
            outcome = Outcome(Result.ROLLED_BACK, "the machine did not start into it")
        return roll_back(settings, log, pending, outcome)
    with best_effort(log):
        pending = arm(settings, pending, settings.confirm_timeout + settings.activation_timeout + WATCHDOG_MARGIN_S)
        save_pending(settings, pending)
    failure = prove(settings, log, pending.new)
    if failure is None:
        return complete(settings, log, pending)
    return revert(settings, log, pending, f"after the reboot, {failure}")


def verdict(pending: Pending, reason: str) -> Outcome:
    """The outcome that a roll back under way was to have; an activation cut short before is merely interrupted."""
    if pending.verdict:
        return Outcome(Result(pending.verdict), pending.reason)
    return Outcome(Result.INTERRUPTED, reason)


def complete(settings: Settings, log: Log, pending: Pending) -> Outcome:
    """The new system proved itself: makes sure that it is the boot default."""
    if pending.step == Step.REBOOTING and profile_system(settings) == pending.new:
        return Outcome(Result.OK, "", pending.new)
    trouble = commit(settings, log, pending)
    if trouble is not None:
        return roll_back(settings, log, pending, Outcome(Result.POSTPONED, trouble))
    return Outcome(Result.OK, "", pending.new)


def revert(settings: Settings, log: Log, pending: Pending, reason: str) -> Outcome | None:
    """Back to the old system through a reboot, for a new kernel cannot be taken back live."""
    tried = pending.step == Step.REVERTING  # and it has started into the new system again
    if settings.reboot == "never" or not has_systemd(settings) or tried:
        return roll_back(settings, log, pending, Outcome(Result.ROLLED_BACK, reason))
    log.say(f"going back to {pending.old} through a reboot: {reason}")
    if not restore_profile(settings, log, pending):
        return not_restored(pending, reason)
    reverting = pending._replace(step=Step.REVERTING, boot_id=boot_id(settings), verdict=Result.ROLLED_BACK)
    with best_effort(log):
        save_pending(settings, reverting._replace(reason=one_line(reason)))
    run(["systemctl", "reboot"], timeout=60)
    return None


def reboot_if_due(settings: Settings, log: Log, state: State, directory: str) -> None:
    """Reboots into the profile's kernel, when that is wanted, allowed now, and was not tried for it before."""
    expect_boot(settings, log, state)
    new, now = profile_system(settings), time.localtime()
    due = needs_reboot(settings)
    if not due and state.rebooted is not None:
        state = state._replace(rebooted=None)
        save_state(settings, state)
    if not due or state.rebooted == new or not may_reboot(settings.reboot, now.tm_hour, now.tm_min):
        return
    if not has_systemd(settings):
        log.say("a reboot is due, but systemd does not run here")
        return
    waiting = waiting_for_boot(settings)
    if waiting is None:
        log.say("a reboot is due, but not into a system that Bento proved: left to a person")
        return
    save_pending(settings, waiting)
    log.say(f"rebooting into {new}")
    report(settings, log, state, directory, phase=Phase.ACTIVATING)
    save_state(settings, state._replace(rebooted=new))
    try:
        run(["systemctl", "reboot"], timeout=60)
    except BentoError:
        save_state(settings, state)  # it is to be asked for again
        raise


# --- commands ---


def update(settings: Settings, log: Log, state: State, directory: str, *, force: bool) -> int:
    """Polls, decides, and does what is to be done. Raises Unreachable when the poll fails: nothing has changed then."""
    try:
        session, current = poll(settings, directory, log, seen=state.published, patience_s=settings.connect_timeout)
    except Unreachable:
        raise
    except BentoError as error:
        refused = Outcome(Result.FETCH_FAILED, str(error))
        if state.last is None or state.last.reason != one_line(refused.reason):
            log.kept = True
            now = format_time(time.time())
            state = record(settings, log, state, refused, None, now, now, 1)
            with best_effort(log):
                save_state(settings, state)
        report(settings, log, state, directory)
        raise
    try:
        action, why = decide(current, state, time.time(), force=force, replica=len(settings.server) > 1)
        if action == Action.NOTHING:
            print(why)
            if state.last is not None and state.last.release is None:  # the server's files are in order again
                state = state._replace(last=state.tried)
                save_state(settings, state)
            deliver(session, settings, state, directory)
            return 0
        log.kept = True
        log.say(why)
        pending = start_journal(settings, log, state, current)
        try:
            wanted = action == Action.FETCH or not is_untouched(settings.state / "config")
            slow = wanted and current.size > LARGE_BYTES  # then the server is told before
            if slow:
                announce(session, settings, state, directory, Phase.BUILDING)
            if wanted:
                # What failed once is fetched whole: the fault may lie in the parts.
                fetch(session, settings, current, thrifty=pending.attempt == 1)
                state = adopt(settings, state, current.release)
            if not slow:
                announce(session, settings, state, directory, Phase.BUILDING)
            session.hang_up()
        except Unreachable:
            report(settings, log, state, directory)
            forget(settings, log, pending)
            raise
        except (BentoError, OSError) as error:
            outcome = Outcome(Result.FETCH_FAILED, str(error))
            finish(settings, log, state, directory, pending, outcome, session)
            return outcome.exit_code
        return deploy(settings, log, state, directory, pending, session, force=force).exit_code
    finally:
        session.close()


def start_journal(settings: Settings, log: Log, state: State, current: Current) -> Pending:
    """The journal of a deployment, and a watchdog for the part that only fetches and builds: a client that hangs in
    it would be the only one that ever runs. An older journal, of an activation that is not settled, stays in its place.
    """
    tried = state.tried
    running = running_system(settings)
    left = load_pending(settings, log)
    if left is not None and left.step == Step.REBOOTING:
        os.replace(settings.state / "pending.json", settings.state / "waiting.json")
        left = None
    # After a roll back that failed the machine runs something in between: the way back leads further back.
    old = left.old if left is not None and left.step == Step.ROLLING_BACK else running
    pending = Pending(
        release=current.release,
        published=current.published,
        old=old,
        new=running,
        profile=profile_system(settings) if profile_path(settings).exists() else old,
        step=Step.BUILDING,
        boot_id=boot_id(settings),
        token=os.urandom(4).hex(),
        started=format_time(time.time()),
        attempt=tried.attempt + 1 if tried is not None and tried.release == current.release else 1,
        revision=current.revision,
    )
    # The lock says whose work it guards, for a watchdog that finds the journal gone and its client still there.
    name_holder(settings, f"{os.getpid()} {pending.token}")
    with best_effort(log):
        if left is None:
            pending = advance(settings, pending, Step.BUILDING, settings.build_timeout)
        else:  # its watchdog would come in the middle of the release that may mend things
            save_pending(settings, arm(settings, left, settings.build_timeout + WATCHDOG_MARGIN_S))
        signal.alarm(0)
    return pending


def deploy(
    settings: Settings,
    log: Log,
    state: State,
    directory: str,
    pending: Pending,
    first: Sftp,
    *,
    force: bool,
) -> Outcome:
    """Builds config/ and puts the result to work. `first`: the connection that the release came over."""
    session: Sftp | None = None
    left = load_pending(settings, log)
    if left is not None and left.token == pending.token:
        with best_effort(log):  # the download may have taken its time
            advance(settings, left, Step.BUILDING, settings.build_timeout)
    try:
        new = build(settings, log)
        outcome = refuse_to_activate(settings, new, pending.old, force=force)
    except (BentoError, OSError) as error:
        outcome = Outcome(Result.BUILD_FAILED, str(error))
    if outcome is None:
        try:
            session = knock(settings, log, first.server)
        except Unreachable as error:
            reason = f"built, but not activated, because the server went away: {error}"
            outcome = Outcome(Result.POSTPONED, reason, new, unreachable=True)
    first.close()  # what it still had to say comes before what a later connection says
    if session is not None:
        forestall(session)
        announce(session, settings, state, directory, Phase.ACTIVATING)
        session.send(f"-{LIST_LOGS}")  # for deliver, which need not wait for it then
        left = load_pending(settings, log)
        ours = left if left is not None and left.token == pending.token else pending
        outcome = activate(settings, log, ours._replace(new=new))._replace(system=new)
    assert outcome is not None
    finish(settings, log, state, directory, pending, outcome, session)
    return outcome


def refuse_to_activate(settings: Settings, new: str, old: str, *, force: bool) -> Outcome | None:
    """The outcome where the built system needs no activation, or must not have one."""
    profile = profile_path(settings)
    if new == old == running_system(settings) and (not profile.exists() or profile_system(settings) == new):
        return Outcome(Result.OK, "nothing to activate: this system runs already", new)
    for part in ("sw/bin/bento-client", "etc/bento/client.json"):
        if not force and not Path(new, part).exists():
            reason = f"the new system has no {part}: it would be this machine's last update: import ./utils/bento.nix"
            return Outcome(Result.BUILD_FAILED, reason, new)
    if free_bytes(settings.state) < MIN_FREE_BYTES:
        return Outcome(Result.POSTPONED, f"built, but not activated: the disk of {settings.state} is full", new)
    return None


def begin(settings: Settings) -> tuple[Log, State]:
    """What every command that holds the lock starts with; clears away what killed processes left."""
    log = Log(settings.state / "deploy.log")
    for left in settings.state.glob(".tmp-*"):
        if not Path("/proc", left.name.split("-")[1]).exists():
            remove(left)
    return log, read_journal(settings.state / "state.json", parse_state, log) or State()


def command_run(settings: Settings, *, force: bool) -> int:
    with lock(settings) as held:
        if not held:
            print("another run is at work on this machine: nothing to do here")
            return 0
        log, state = begin(settings)
        with scratch(settings) as directory:
            settled = ""
            # An activation, and then a system that waited for the boot that ended it.
            while (pending := load_journal(settings, log)) is not None and pending.token != settled:
                settled = pending.token
                if (outcome := recover(settings, log, pending)) is not None:
                    state = finish(settings, log, state, directory, pending, outcome)
                if (left := load_pending(settings, log)) is not None and left.step == Step.REVERTING:
                    return 1
            signal.alarm(POLL_LIMIT_S)  # which ends us, until a deployment has its watchdog
            code = update(settings, log, state, directory, force=force)
            if code == 0:
                state = read_journal(settings.state / "state.json", parse_state, log) or state
                reboot_if_due(settings, log, state, directory)
            return code


def end_lock_holder(settings: Settings, log: Log) -> None:
    """Ends the run that holds the lock, and what it started: it hangs, or a person wants it gone."""
    with suppress(OSError, ValueError, IndexError):
        holder = int((settings.state / "lock").read_text().split()[0])
        children: list[str] = []
        with suppress(OSError):  # a kernel may lack this file
            children = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
        log.say(f"ending the client that holds the lock (process {holder})")
        os.kill(holder, signal.SIGKILL)
        for child in children:  # each leads a group, see `run`
            with suppress(OSError):
                os.killpg(int(child), signal.SIGKILL)


def command_rollback(settings: Settings, *, token: str | None) -> int:
    """The watchdog's (with the token of its activation), or a person's: then also back from what was committed."""
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = Log(settings.state / "deploy.log")
    path = settings.state / "pending.json"
    pending = read_journal(path, parse_pending, log)
    if token is not None and (pending is None or pending.token != token):
        with lock(settings) as free:
            if not free and (settings.state / "lock").read_text().split()[1:] == [token]:
                end_lock_holder(settings, log)
                print("this deployment has ended; its client, which hung, is ended too")
                return 0
        print("this deployment has ended already: nothing to do")
        return 0
    give_up = time.monotonic() + 30
    while True:
        with lock(settings) as held:
            if held:
                log, state = begin(settings)
                log.kept = True
                pending = read_journal(path, parse_pending, log)
                if token is not None and (pending is None or pending.token != token):
                    print("this deployment ended just now: nothing to do")
                    return 0
                with scratch(settings) as directory:
                    return go_back(settings, log, state, pending, directory, by_hand=token is None)
        if pending is None:
            raise BentoError(
                "another client is at work on this machine, and activates nothing: wait for its end, or stop it"
            )
        end_lock_holder(settings, log)
        if time.monotonic() > give_up:
            raise BentoError(f"{settings.state / 'lock'} is still held: look for the process that holds it")
        time.sleep(0.2)


def go_back(
    settings: Settings, log: Log, state: State, pending: Pending | None, directory: str, *, by_hand: bool
) -> int:
    if by_hand and (pending is None or pending.step == Step.BUILDING):
        if pending is not None:
            disarm(settings, pending)
        pending = step_back(settings, state)
        save_pending(settings, pending)
    assert pending is not None  # the watchdog has the token of one
    if by_hand:
        outcome: Outcome | None = roll_back(settings, log, pending, Outcome(Result.ROLLED_BACK, "by hand"))
    else:
        if pending.step != Step.COMMITTING and not pending.reason:
            pending = pending._replace(verdict=Result.INTERRUPTED, reason=f"the client hung while {pending.step}")
        outcome = recover(settings, log, pending)
    if outcome is None:
        return 0
    finish(settings, log, state, directory, pending, outcome)
    good = outcome.result != Result.ROLLBACK_FAILED
    print(f"{outcome.result}: {outcome.reason}; this machine runs {running_system(settings)}")
    return 0 if good else 1


def step_back(settings: Settings, state: State) -> Pending:
    """The journal of a way back from the last committed release, for a person who does not like it."""
    if state.previous is None or state.release is None:
        raise BentoError("nothing to roll back: no earlier system of Bento's is known on this machine")
    if not Path(state.previous, "bin/switch-to-configuration").exists():
        raise BentoError(
            f"the earlier system {state.previous} is gone (garbage collected): publish an older release instead"
        )
    return Pending(
        release=state.release, published=state.published or format_time(0), old=state.previous,
        new=running_system(settings), profile=state.previous, step=Step.STEPPING_BACK, boot_id=boot_id(settings),
        token=os.urandom(4).hex(), started=format_time(time.time()), attempt=1,
        verdict=Result.ROLLED_BACK, reason="by hand", revision=state.revision,
    )  # fmt: skip


def command_probe(settings: Settings) -> int:
    probe(settings, Log(settings.state / "no-log"))
    print("the server is reached, and publishes a release for this machine")
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


def command_status(settings: Settings) -> int:
    log = Log(settings.state / "no-log")
    if not os.access(settings.state, os.R_OK | os.X_OK) and settings.state.exists():
        raise BentoError(f"{settings.state} cannot be read: run this as root")
    state = read_journal(settings.state / "state.json", parse_state, log) or State()
    pending = load_pending(settings, log)
    waiting = len(list((settings.state / "outbox").glob("*.log")))
    print(format_status(make_report(settings, state, Phase.IDLE), pending, waiting))
    return 0


def format_status(report: Report, pending: Pending | None, waiting: int) -> str:
    last = report.last
    rows = [
        ("host", report.host),
        ("release", report.release or "none of Bento's"),
        ("system", report.system),
    ]
    if last is not None:
        rows.append(
            ("last", f"{last.result}, release {(last.release or '?')[:12]}, attempt {last.attempt}, {last.finished}")
        )
        rows += [("reason", last.reason)] if last.reason else []
    if pending is not None:
        rows.append(("under way", f"release {pending.release[:12]}, {pending.step}"))
    if report.needs_reboot:
        rows.append(("reboot", "needed"))
    if waiting:
        rows.append(("outbox", f"{waiting} not delivered yet"))
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


# --- command line ---

COMMANDS = {
    "run": "poll, and update if there is something new (what the timer starts)",
    "key": "print this machine's public SSH key; make it if there is none",
    "probe": "can this machine reach its server? exit 0, or 75 if not",
    "status": "what this machine runs and last did",
    "rollback": "back from an activation under way, else from the last update",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, of the same name."""
    parser.add_argument("--config", help=f"settings as JSON (default {DEFAULT_CONFIG})")
    group = parser.add_argument_group("settings, over those of the file")
    defaults = Settings()
    for name, value in defaults._asdict().items():
        kind = type(value)
        flags = list(dict.fromkeys(f"--{name.replace('_', sign)}" for sign in "-_"))
        options: dict[str, Any] = {"dest": f"setting_{name}", "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
            flags = flags[:1]
        elif kind is tuple:
            options |= {"action": "append", "metavar": "TEXT"}
        else:
            options |= {"type": kind, "metavar": "N" if kind is int else "TEXT"}
        group.add_argument(*flags, **options)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bento_client.py",
        usage="%(prog)s [options] COMMAND",
        description="Keep this NixOS machine at its published release.",
        epilog="commands:\n" + "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items()),
        # With a width, argparse does not load shutil to ask the terminal for one.
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=80),
    )
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the programs that are run")
    parser.add_argument("--force", action="store_true", help="run: try again what was given up or refused")
    parser.add_argument("--token", help=argparse.SUPPRESS)
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
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
            raise UsageError(f"{path}: cannot be read: {one_line(str(error), 100)}") from None
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
    for flag, goes_with in (("force", "run"), ("token", "rollback")):
        if options[flag] and command != goes_with:
            parser.error(f"--{flag} goes with {goes_with}, not with {command}")
    try:
        settings = read_settings(options)
        if command in ("run", "probe") and not settings.server:
            raise UsageError("no server is set: give --server, or 'server' in the configuration file")
        if command == "run":
            return command_run(settings, force=options["force"])
        if command == "rollback":
            return command_rollback(settings, token=options["token"])
        return {"key": command_key, "probe": command_probe, "status": command_status}[command](settings)
    except BentoError as error:
        print(f"bento: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"bento: error: {error.filename or 'system'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bento: error: interrupted; the next run goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
