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
Elsewhere: /run/bento-proofs, how many proofs have failed since the boot; /nix/var/nix/gcroots/bento-way-back, which keeps
the system to fall back to; and what the boot loader is told of a trial.

Exit codes: 0 done or nothing to do, 1 the deployment failed, 2 usage, 75 the server could not be reached.

Sections: constants, errors, types, names and times, formats, settings, decisions, files, processes, log, signatures, sftp,
boot loaders, this machine, reports, fetch and build, activation, commands, command line.
"""

from __future__ import annotations

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
FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
STORE_PATH = re.compile(r"/[ -~]{1,400}")
TEXT = re.compile(r"[^\n]{0,2000}", re.DOTALL)
# Of bento.json: what neither Nix' URLs nor nixos-rebuild read as something else; no directory that leads out.
ATTRIBUTE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,199}")
DIRECTORY = re.compile(r"\.?|(?!\.\.?(/|$))[A-Za-z0-9_.+-]+(/(?!\.\.?(/|$))[A-Za-z0-9_.+-]+)*/?")

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
FIRST_PAUSE_S, LONGEST_PAUSE_S = 15 * 60, 24 * 3600
WATCHDOG_MARGIN_S = 30
# A poll that takes longer hangs: no watchdog guards it, and no other run could start. Twenty large logs on a slow line
# may take hours.
POLL_LIMIT_S = 12 * 3600
# After a boot, this many proofs may fail for want of a server before the release is suspected: a site's power cut ends for
# hosts before it ends for a server.
PATIENT_PROOFS = 3
# The same, where the old system is one without Bento: once it runs, nothing leads forward again. A day, at 15 minutes.
FIRST_PROOFS = 96
# A pause without a number of hours, and the longest one: a machine that is to be left alone for good has no timer.
PAUSE_H, LONGEST_PAUSE_H = 8.0, 24.0 * 31
# Each command of `after_deployment`.
HOOK_LIMIT_S = 60
# A long build says so often that it is under way.
HEARTBEAT_S = 30 * 60
NO_RELEASE = "0" * 64
# How long it is told that another machine reported under this name, and how often it is looked for: that is a fifth of
# a poll on a slow line.
TWIN_S, TWIN_LOOK_S = 24 * 3600, 6 * 3600


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
    of them already needs only the others. `signed` and `signature`: what an administrator vouches for. `signer`, the
    fingerprint of the key, is not in the file: verify() finds it out.
    """

    host: str
    release: str
    size: int
    published: str
    system: str | None = None
    parts: tuple[Part, ...] = ()
    revision: str | None = None
    signed: str | None = None
    signature: str | None = None
    signer: str | None = None


class Signed(NamedTuple):
    """The text that an administrator signs. `system`: what the release builds to, if that was known.

    `serial`: seconds since 1970, and always higher than the one before. `unsign`: the new system need not ask for
    signatures any more. `revoked`: fingerprints of signers whose serials count no more.
    """

    host: str
    release: str
    size: int
    system: str | None
    serial: int
    expires: str
    unsign: bool = False
    revoked: tuple[str, ...] = ()


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
    """`logs/status.json`: what a host says of itself. `revision` is that of `release`.

    `waiting_for_boot`: the release that the next boot is to start. `boot_trial`: how this machine's boot loader tries a
    system that has never booted. `known_to_boot`: the system that it falls back to. `first_contact`: when a server's key
    was last taken on trust. `machine` tells this machine from others; `twin`: when another one last reported as this host.
    `since`: when the phase began. `interval`, of polls, and `offline_after`, both in seconds: when to worry about this
    machine's silence.
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
    twin: str | None = None
    since: str | None = None
    interval: int | None = None
    offline_after: int | None = None


class State(NamedTuple):
    """`state.json`. `system`: the boot default that Bento made, `release` and `revision` are its; `previous`: what ran
    before. `good`: the last system that a boot has proven.

    While `system` is not `good`, it waits for its first boot, since the boot with the id `boot`. `armed`: the boot loader
    has variables of ours; `set_before` is what a person had in them; `forgets`: they were gone after the last boot that
    they were there for.
    `unpacked` is the release in config/, `tried` the last attempt at a release (`last` may be a later failure to
    read `current.json`), `interruptions` how often that release was cut short, `doubts` how often it was blamed for a
    server that was out of reach, `costly`: its failure costs more than a poll; `published` its publication, `rebooted` the
    system that a reboot was last asked for. `serials`: the highest ones that were seen, each behind the fingerprint of its
    signer; `signed` is the text that was last accepted, and `signer` whose it was. `machine`: which one wrote this file;
    `twin`: see Report; `looked`: when it was looked for.
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
    published: str | None = None
    unpacked: str | None = None
    rebooted: str | None = None
    interruptions: int = 0
    doubts: int = 0
    costly: bool = False
    failed_units: tuple[str, ...] = ()
    tried: Last | None = None
    last: Last | None = None
    serials: tuple[str, ...] = ()
    signer: str | None = None
    signed: str | None = None
    machine: str | None = None
    twin: str | None = None
    looked: str | None = None


class Pending(NamedTuple):
    """`pending.json`, the journal. Where to go back to: `old` is what ran, `profile` what would have been booted.

    `switched`: the running system may be the new one, or something in between. `committed`: so may be the boot default.
    `between`: what an earlier way back that failed has left running. `verdict`, `reason` and `doubt`: how it ends, once
    it goes back; `rebooting`: the boot in which a reboot back was asked for. `trial`: it is about what was deployed
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
    deadline_s: float = 0.0  # a client before 1.1 wants one
    watchdog: str | None = None
    verdict: str = ""
    reason: str = ""
    revision: str | None = None
    switched: bool = False
    committed: bool = False
    by_hand: bool = False
    trial: bool = False
    doubt: bool = False
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
    state_dir: str = "/var/lib/bento"
    root: str = "/"
    ssh_options: tuple[str, ...] = ()
    connect_timeout: int = 20
    build_timeout: int = 12 * 3600
    activation_timeout: int = 600
    confirm_timeout: int = 120
    health_checks: tuple[str, ...] = ()
    upgrade_channels: bool = False
    activation: str = "live"
    rebuild_every: int = 0
    after_deployment: tuple[str, ...] = ()
    reboot: str = "never"
    build: str = "host"
    interval: int = 900
    offline_after: int = 0
    boot_loader: tuple[str, ...] = ()

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
    "since": TIME, "until": TIME, "machine": re.compile(r"[0-9a-f]{16}"), "twin": TIME, "looked": TIME,
}  # fmt: skip
SIMPLE: dict[str, type] = {"str": str, "int": int, "bool": bool, "float": float}
Record = TypeVar("Record", "Current", "Signed", "Part", "Last", "Report", "State", "Pending", "Pause")


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
            values[name] = tuple(one_line(str(each), 200) for each in take(data, name, list, what)[:100])
        else:
            wanted = FIELDS.get(f"{kind.__name__}.{name}") or FIELDS.get(name) or SIMPLE[text.split(" ")[0]]
            value = take(data, name, wanted, what, null="None" in text)
            values[name] = read_record(Last, value, what) if isinstance(value, dict) else value
    return kind(**values)


def as_object(value: object, name: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BentoError(f"{what}: field {name!r} is malformed")
    return value


def parse_current(raw: bytes, what: str, host: str | None = None) -> Current:
    current = read_record(Current, parse_object(raw, what) | {"signer": None}, what)
    if current.parts and sum(part.size for part in current.parts) != current.size:
        raise BentoError(f"{what}: its parts do not add up to its size")
    if host is not None and current.host != host:
        raise BentoError(f"{what}: it is for host {current.host!r}, not for {host!r}")
    return current


def parse_report(raw: bytes, what: str) -> Report:
    return read_record(Report, parse_object(raw, what), what)


def parse_state(raw: bytes, what: str) -> State:
    return read_record(State, parse_object(raw, what), what)


# The steps of a client before 1.1, and what is left to do after each.
OLD_STEPS = {
    "building": Step.ACTIVATING, "activating": Step.ACTIVATING, "proving": Step.ACTIVATING,
    "committing": Step.COMMITTING, "rebooting": Step.COMMITTING,
    "rolling-back": Step.ROLLING_BACK, "stepping-back": Step.ROLLING_BACK, "reverting": Step.ROLLING_BACK,
}  # fmt: skip


def in_new_words(data: dict[str, Any]) -> dict[str, Any]:
    """The journal of a client before 1.1 in today's words. It kept its step on a way back whose boot default stayed."""
    step, verdict = str(data.get("step")), data.get("verdict")
    back = OLD_STEPS.get(step) == Step.ROLLING_BACK
    return data | {
        "step": Step.ROLLING_BACK if verdict and step in OLD_STEPS else OLD_STEPS.get(step, step),
        "switched": True, "committed": step not in ("activating", "proving"), "by_hand": step == "stepping-back",
        "verdict": verdict or (Result.INTERRUPTED if back else ""),
        "rebooting": data.get("boot_id") if step == "reverting" else "",
    }  # fmt: skip


def parse_pending(raw: bytes, what: str) -> Pending:
    data = parse_object(raw, what)
    return read_record(Pending, data if "switched" in data else in_new_words(data), what)


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
    return Recipe(attribute, "" if directory == "." else directory, tuple(options))


def plain(value: Any) -> Any:
    """A record, and those in it, as JSON has them."""
    if hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


# Not written while there is nothing in them: a file stays as it was before there were such fields.
OPTIONAL = (
    "parts", "signed", "signature", "signer", "expires", "serials", "first_contact", "machine", "twin", "looked", "since", "interval",
    "offline_after",
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


def retry_pause_s(result: str, attempt: int, *, costly: bool = False) -> float:
    """How long to wait after attempt number `attempt` before the next.

    A failed build is the release's, and a boot loader that cannot be written costs an activation (`costly`): the pauses
    grow from the first one on. The others are a bad moment more often than not: they are tried again at the next three
    polls.
    """
    free_attempts = 0 if result == Result.BUILD_FAILED or costly else 3
    doublings = attempt - free_attempts - 1
    return 0.0 if doublings < 0 else float(min(FIRST_PAUSE_S * 2 ** min(doublings, 20), LONGEST_PAUSE_S))


def is_due_again(state: State, now_s: float, rebuild_s: int) -> bool:
    """Whether what was last tried is deployed, and to be built anew, with what the channels have by now: `rebuild_s` seconds
    after the last time, or never. That such a build failed, or what it gave, is no reason to give the release up."""
    tried = state.tried
    if not rebuild_s or tried is None or tried.release != state.release:
        return False
    pause_s = 0.0 if tried.result == Result.OK else retry_pause_s(tried.result, tried.attempt, costly=True)
    # Far in the future: the clock was set back.
    return not -LONGEST_PAUSE_S < now_s - parse_time(tried.finished) < max(rebuild_s, pause_s)


def decide(
    current: Current, state: State, now_s: float, *, force: bool = False, replica: bool = False, rebuild_s: int = 0
) -> tuple[bool, str]:
    """Whether `current` is to be deployed now, and why, or why not, in words for a person.

    `replica`: one of several servers answered, and it may lag behind the others.
    """
    tried, release = state.tried, f"release {current.release[:12]}"
    if replica and is_behind(current, state.published, now_s):
        return False, f"the server is behind: it publishes a release of {current.published}"
    if tried is None or tried.release != current.release:
        return True, f"new {release}"
    if force:
        return True, f"{release}, by force"
    if is_due_again(state, now_s, rebuild_s):
        return True, f"{release}: built again, every {duration(rebuild_s)}"
    if tried.result == Result.OK:
        return False, f"up to date with {release}"
    # Nobody can tell an outage that ended in time for the old system from a release that cut the line.
    doubtful = tried.result == Result.ROLLED_BACK and state.doubts == 1
    pause_s = LONGEST_PAUSE_S if doubtful else retry_pause_s(tried.result, tried.attempt, costly=state.costly)
    wait_s = parse_time(tried.finished) + pause_s - now_s
    if tried.result in (Result.ROLLED_BACK, Result.ROLLBACK_FAILED) and not (doubtful and wait_s <= 0):
        return False, f"{release} was rolled back ({tried.reason}): waiting for a new release"
    if tried.result == Result.INTERRUPTED and state.interruptions > 1:
        return False, f"{release} was interrupted twice: waiting for a new release"
    # A wait longer than the longest pause means that the clock was set back: then it says nothing.
    if 0 < wait_s <= LONGEST_PAUSE_S:
        return False, f"{release}: {tried.result}, next attempt in {duration(wait_s)}"
    return True, f"{release}: {tried.result} before, attempt {tried.attempt + 1}"


def is_ahead(published: str, now_s: float) -> bool:
    """Whether a publication lies further ahead than clocks differ: it would hold all other servers' back."""
    return parse_time(published) > now_s + CLOCKS_DIFFER_S


def is_odd(current: Current, seen: str | None, now_s: float) -> bool:
    """Whether another server is to be asked first."""
    return is_behind(current, seen, now_s) or is_ahead(current.published, now_s)


def is_behind(current: Current, seen: str | None, now_s: float) -> bool:
    """Whether a server publishes less than was seen. Signed releases have their serials for that."""
    return current.signer is None and seen is not None and not is_ahead(seen, now_s) and current.published < seen


def may_reboot(setting: str, hour: int, minute: int) -> bool:
    """Whether the setting `reboot` allows one at this local time. A window may cross midnight."""
    if not REBOOT_WINDOW.fullmatch(setting):
        return setting == "when-needed"
    (first, last), now = setting.split("-"), f"{hour:02}:{minute:02}"
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


# Of ssh's: what stands above them may be the server's banner, which says what it likes.
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
# What a later poll may find better. A file that is not there (4xx) it will not.
BAD_MOMENT = (
    r"(?i:unable to download (?!.*HTTP error 4)|could(n't| not) (connect|resolve)|connection (refused|reset|timed out)"
    r"|name resolution|network is unreachable|no route to host)"
)


def find_cause(output: str) -> str:
    """Why a program failed, as a person would name it: the first error that does not follow from another."""
    lines = [line.strip() for line in re.sub("\x1b\\[[0-9;]*m", "", output).splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if line.startswith("error:") and line != "error:"]
    errors = [n for n in errors if not re.match(CONSEQUENCES, lines[n])]
    builders = [n for n in errors if re.match(BUILDER, lines[n])]
    if builders:  # what their own logs call errors is not Nix's
        errors = [n for n in errors if n < builders[0] and re.match(OF_NIX, lines[n])] + builders
    for number, line in enumerate(lines):
        more = lines[number + 1 :]
        if line.endswith("Failed assertions:"):
            return one_line(" ".join(each for each in more if not re.match(CONSEQUENCES, each)))
        if snippet := re.match("Activation script snippet '(.*)' failed", line):
            return one_line(f"activation script {snippet[1]}: {lines[number - 1] if number else line}")
        if re.match(PRIVATE, line) and not builders:
            return one_line(line)
        if number in errors[:1]:
            return one_line(re.sub(STORE_NAME, r"\1", " ".join((line, *details(more), builder_words(lines, number)))))
    plain = [line for line in lines if not re.match(CONSEQUENCES, line)]
    return one_line((plain or lines or ["no output"])[-1])


NOT_FETCHED = (
    r"(?:warning: |error: )*(.*(?:not signed by any|lacks a .*signature|unable to download|ssh: |Permission denied"
    r"|Host key verification).*)"
)


def why_not_fetched(output: str) -> str:
    """Why Nix could not fetch a path: what it says of a substituter last. Its errors do not tell, its warnings do."""
    said = [match[1] for line in output.splitlines() if (match := re.match(NOT_FETCHED, line.strip()))]
    missing = "no substituter has it, or what it needs" if "don't know how to build" in output else find_cause(output)
    return one_line(said[-1]) if said else missing


def details(more: Sequence[str]) -> list[str]:
    """What belongs to an error, and stands in the lines below it."""
    return [line for line in more[:2] if re.match(r"Reason: |specified: |got: |at /\S+:\d+:\d+|- In `", line)]


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


def failed_units(output: str) -> list[str]:
    """The units that switch-to-configuration names as failed, from its output."""
    found = re.findall(r"the following (?:units|user units) failed: (.*)", output)
    return sorted({unit.strip() for line in found for unit in line.split(",") if unit.strip()})


# --- files ---


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces `path` so that a reader, or a power cut, sees the old content or the new, whole."""
    # A name that nobody can have made a link of, and that is cleared away if we are killed.
    aside = path.with_name(f".tmp-{os.getpid()}-{os.urandom(6).hex()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
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
SIGNED_1 = "bento-release 1"
PUBLIC_KEY = r"(?:^|\s)((?:ssh|ecdsa|sk)-[!-~]+) +(AAAA[A-Za-z0-9+/]+=*)(?:\s|$)"


def format_signed(signed: Signed) -> str:
    lines = [SIGNED_1, f"host {signed.host}", f"release {signed.release}", f"size {signed.size}"]
    lines += [f"system {signed.system or '-'}", f"serial {signed.serial}", f"expires {signed.expires}"]
    lines += ["unsign yes"] if signed.unsign else []
    lines += [f"revoked {signer}" for signer in signed.revoked]
    return "\n".join(lines) + "\n"


def parse_signed(text: str, what: str) -> Signed:
    first, *lines = text.removesuffix("\n").split("\n")
    if first != SIGNED_1:
        raise BentoError(
            f"{what}: it begins with {one_line(repr(first), 40)}, not with '{SIGNED_1}': update Bento here"
        )
    pairs = [(name, value) for name, _, value in (line.partition(" ") for line in lines)]
    revoked = tuple(value for name, value in pairs if name == "revoked" and FINGERPRINT.fullmatch(value))
    fields: dict[str, Any] = {name: value for name, value in pairs if name != "revoked"}
    if len(fields) + sum(name == "revoked" for name, _ in pairs) != len(pairs):
        raise BentoError(f"{what}: it says something twice")
    for name in ("size", "serial"):
        if re.fullmatch("[0-9]{1,16}", fields.get(name, "")):
            fields[name] = int(fields[name])
    system = fields.get("system", "")  # which is no path: the line has to be there
    fields |= {"system": None if system == "-" else system, "unsign": fields.get("unsign") == "yes"}
    return read_record(Signed, fields, what)._replace(revoked=revoked)


def fingerprint(blob: str) -> str:
    """A public key's name, as ssh-keygen shows it. ValueError for what is no key."""
    import base64
    import hashlib

    digest = hashlib.sha256(base64.b64decode(blob, validate=True)).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def read_signers(path: Path) -> dict[str, str]:
    """The public keys in a file, one a line, by fingerprint."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the signers' keys cannot be read: {one_line(str(error), 100)}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        kind, blob = match.groups() if (match := re.search(PUBLIC_KEY, line)) else ("", "?")
        try:
            found[fingerprint(blob)] = f"{kind} {blob}"
        except ValueError:
            raise UsageError(f"{path}:{number}: not a public key") from None
    if not found:
        raise UsageError(f"{path}: no signer's key in it")
    return found


def find_signer(text: str, signature: str, signers: Path, directory: Path) -> str:
    """The fingerprint of the signer whose signature this is. BentoError when it is nobody's that is trusted."""
    keys = read_signers(signers)
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
        raise BentoError(f"its signature is of nobody in {signers} ({one_line(said.splitlines()[-1] if said else '')})")
    return found[1]


def verify(current: Current, signers: Path, serials: Sequence[str], directory: Path, what: str) -> Current:
    """The same release with what was signed of it, and by whom. BentoError when nobody who is trusted vouches for it, or
    when this is an older one than was seen: a server can keep silent, and do nothing else."""
    where = f"{what}: release {current.release[:12]}"
    if not current.signed or not current.signature:
        raise BentoError(f"{where} is not signed, as this machine wants it: 'bento.py sign', then publish it again")
    try:
        signer = find_signer(current.signed, current.signature, signers, directory)
        signed = parse_signed(current.signed, "its signed text")
    except UsageError:
        raise
    except (BentoError, UnicodeEncodeError) as error:
        raise BentoError(f"{where}: {error}") from None
    if (signed.host, signed.release, signed.size) != (current.host, current.release, current.size):
        about = f"release {signed.release[:12]} ({signed.size} bytes) for host {signed.host!r}"
        raise BentoError(f"{where}: its signed text is about another one: {about}")
    seen = highest_serial(signers, serials, signed.revoked)
    if signed.serial < seen:
        raise BentoError(f"{where}: it was signed with serial {signed.serial}, and {seen} was seen: sign it anew")
    return current._replace(signer=signer, system=signed.system)


def highest_serial(signers: Path, serials: Sequence[str], revoked: Sequence[str]) -> int:
    """Of the signers that are trusted now: a stolen key's serials go with it."""
    counting = read_signers(signers).keys() - set(revoked)
    return max((serial for signer, serial in map(parse_serial, serials) if signer in counting), default=0)


def accepted(state: State, current: Current) -> dict[str, Any]:
    """What state.json has to remember of what a poll has accepted: no lower serial is taken after it."""
    if current.signer is None or current.signed is None:
        return {"signer": None, "signed": None}
    serials = {current.signer: parse_signed(current.signed, "signed text").serial}
    for signer, serial in map(parse_serial, state.serials):
        serials[signer] = max(serial, serials.get(signer, 0))
    kept = tuple(f"{signer} {serial}" for signer, serial in sorted(serials.items()))
    return {"serials": kept, "signer": current.signer, "signed": current.signed}


def parse_serial(text: str) -> tuple[str, int]:
    signer, _, serial = text.partition(" ")
    return signer, int(serial) if serial.isdecimal() else 0


def vouched_until(state: State) -> str | None:
    """The end of the time for which somebody has signed what this machine follows."""
    return parse_signed(state.signed, "signed text").expires if state.signed else None


def nobody_vouches(state: State, now_s: float) -> str | None:
    """What a person is told when that time is over."""
    until = vouched_until(state)
    if until is None or parse_time(until) > now_s:
        return None
    return f"expired: nobody vouches for this machine's state since {until}: sign its release anew"


def check_trust(settings: Settings) -> None:
    """UsageError when these settings would let a stranger in, or nobody."""
    if settings.signers:
        read_signers(Path(settings.signers))
    elif len(settings.server) > 1 and not (settings.known_hosts and Path(settings.known_hosts).exists()):
        raise UsageError(
            "several servers need 'known_hosts' (services.bento.serverKeys) or 'signers': each of them would be trusted"
            " at its first contact, whoever answers then"
        )


def drops_signers(settings: Settings, asked: Mapping[str, Any], system: str, signed: str | None) -> str | None:
    """Why a new system must not follow this one: it would take what nobody signed. `asked`: its client.json."""
    if not settings.signers or not asked or (signed and parse_signed(signed, "signed text").unsign):
        return None
    path = str(asked.get("signers") or "")
    inside = Path(system, path.lstrip("/"))
    try:
        read_signers(inside if path.startswith("/etc/") else Path(path))
    except BentoError as error:
        why = str(error) if path else "it has no services.bento.signers"
        return f"the new system would take releases that nobody signed: {why}; or sign it with --unsign"
    return None


# --- sftp ---


class Refused(BentoError):
    """The server was reached, and one sftp command failed there."""


def known_hosts_file(settings: Settings) -> Path:
    return Path(settings.known_hosts) if settings.known_hosts else settings.state / "known_hosts"


def sftp_argv(settings: Settings, server: str) -> list[str]:
    """The command line of one connection. ssh takes the first value it sees of an option, so the user's come first,
    but for the sharing of connections: what has to be proven is that a new one can be made."""

    def quoted(path: Path) -> str:
        return '"' + str(path).replace("%", "%%") + '"'

    known = known_hosts_file(settings)
    strict = bool(settings.known_hosts) and known.exists()
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
                raise BentoError(f"{self.server}: {command} gave more than the announced {ceiling} bytes")
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

    def get(self, remote: str, local: str, ceiling: int, *, resume: bool = False) -> Path:
        path = self.directory / local
        if not resume:
            path.unlink(missing_ok=True)  # another server's
        # It grows by a whole request at a time.
        limit_s = STALL_S + min(ceiling, REQUEST_BYTES) / LEAST_RATE
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
            self.do(f"{sign}put {local} logs/.{name}", limit_s)
            self.do(f"{sign}rename logs/.{name} logs/{name}")
        except Refused as error:
            raise Unreachable(f"{error}: it cannot take the report: is its disk full?", passing=False) from None

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
    before = size_of(known)
    try:
        return Sftp(settings, server)
    finally:
        if size_of(known) > before:
            log.say(f"warning: first contact with {server}: its host key is kept in {known}")


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
        path = session.get("current.json", f"{directory}/current.json", MAX_JSON_BYTES)
    except Refused as error:
        raise BentoError(
            f"{error}: nothing is published for {settings.host} there: run 'bento.py populate {settings.host}' on the server"
        ) from None
    return parse_current(path.read_bytes(), f"{session.server}: current.json", settings.host)


def ask(settings: Settings, server: str, directory: str, log: Log, state: State | None) -> tuple[Sftp, Current]:
    """A connection to one server, and what it publishes."""
    session = connect(settings, server, log)
    try:
        current = read_current(session, settings, directory)
        if state is not None and settings.signers:
            aside, what = settings.state / directory, f"{server}: current.json"
            current = verify(current, Path(settings.signers), state.serials, aside, what)
    except BaseException:
        session.close()
        raise
    return session, current


def ask_all(
    settings: Settings, directory: str, log: Log, state: State | None
) -> tuple[tuple[Sftp, Current] | None, list[BentoError]]:
    """The first server with something usable, and what was wrong with those before it. With several, one that seems to
    be behind is taken only when there is no other."""
    failures: list[BentoError] = []
    behind: tuple[Sftp, Current] | None = None
    for server in settings.server:
        try:
            session, current = ask(settings, server, directory, log, state)
        except BentoError as error:
            failures.append(error)
            continue
        if len(settings.server) == 1 or not is_odd(current, state and state.published, time.time()):
            if behind is not None:
                behind[0].close()
            return (session, current), failures
        log.say(f"{server} is behind, or its clock wrong: it publishes a release of {current.published}")
        if behind is None:
            behind = session, current
        else:
            session.close()
    return behind, failures


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
# What a boot loader can be told: these systems by name, one of them for the next boot only. In what it reads itself:
# entries and variables, never in what a program says of them.

LOADER_VARIABLES = "/sys/firmware/efi/efivars/{}-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
# Of LoaderFeatures: it follows LoaderEntryDefault, and LoaderEntryOneShot.
LOADER_NEEDS = 1 << 2 | 1 << 3
# utils/bento.nix writes it into grub.cfg, above the lines that follow what we write into grubenv.
GRUB_MARK = "# bento: the first boot is a trial (1)"
GRUB_GOOD, GRUB_TRY = "bento_good", "bento_try"
GRUB_WRITES = ("ext2", "ext3", "ext4", "vfat")
GRUBENV_HEAD, GRUBENV_BYTES = b"# GRUB Environment Block\n", 1024
GRUB_BLOCK = r"""\s*(menuentry|submenu)\s+(["'])(.*?)\2"""
LOADER_LIMIT_S = 60
# What an entry says of the generation that it was made of; to GRUB's name also belongs the day on which that was made.
GENERATION = re.compile(r"(?:Generation|Configuration) ([0-9]+)(?:.*?\(([0-9]{4}-[0-9]{2}-[0-9]{2}) - )?")


class Armed(NamedTuple):
    """What a boot loader was told: the entry that it starts, and the one that it starts next, once. By their names."""

    default: str = ""
    once: str = ""


class BootEntry(NamedTuple):
    """An entry of a boot loader's menu. `system` is empty for what is not NixOS; kernel and initrd as written there, and
    so the version, which tells the generation."""

    name: str
    system: str = ""
    kernel: str = ""
    initrd: str = ""
    version: str = ""
    top: bool = False


class Loader:
    """A boot loader that nothing can be told, or that we know nothing of."""

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

    def entry_of(self, system: str) -> BootEntry:
        """The system's entry, which stays its own whatever is made the default."""
        try:
            entries = self.entries(self.places[0]) if self.places else []
        except OSError as error:
            raise BentoError(f"{error.filename or self.places[0]}: {error.strerror}") from None
        for entry in entries:
            if entry.system == system and not entry.top:
                return entry
        raise BentoError(f"the boot loader has no entry for {system}: run 'nixos-rebuild boot'")

    def generation_of(self, system: str) -> tuple[int, int]:
        """What makes the name of the system's entry: the number of its generation (0: none that can be seen), and the end of
        the day on which that was made, in nanoseconds since 1970 (0: any will do)."""
        with suppress(BentoError, ValueError):
            entry = self.entry_of(system)
            if found := GENERATION.search(entry.version or entry.name):
                day = datetime.fromisoformat(f"{found[2]}T23:59:59").timestamp() if found[2] else 0
                return int(found[1]), int(day) * 10**9
        return 0, 0

    def default_of(self, place: Path) -> str:
        """The system that the menu starts by itself, where that can be seen."""
        return ""

    def starts(self, system: str) -> bool:
        """Whether the menu, such as it is, starts the system by itself."""
        with suppress(OSError):
            return bool(self.places) and all(self.default_of(place) == system for place in self.places)
        return False

    def shows(self, system: str) -> bool:
        """Whether the menu has the system, be the entry good or not. True where that cannot be seen."""
        try:
            return not self.places or any(entry.system == system for entry in self.entries(self.places[0]))
        except OSError:
            return True

    def shows_others(self, system: str) -> bool:
        with suppress(OSError):
            return any(entry.system not in ("", system) for place in self.places[:1] for entry in self.entries(place))
        return False

    def flush(self) -> None:
        """To disk, what a `boot` has written: before a variable names it, and a power cut finds half of it, on FAT less. For
        install-grub.pl flushes nothing, and switch-to-configuration the store's file system only."""
        flushed = os.stat(self.settings.system_path("/nix/store")).st_dev
        for place in self.places:
            if os.stat(place).st_dev != flushed:
                run(["sync", "--file-system", str(place)], timeout=LOADER_LIMIT_S)

    def armed(self) -> Armed:
        return Armed()

    def prefer(self, system: str) -> None:
        """Makes the system the one that is started, until `clear`; whatever is made the default meanwhile. What `armed`
        said before is to be written down, and given to `clear` in the end."""
        raise BentoError(self.trial_way())

    def try_once(self, system: str) -> None:
        """The next boot starts this system, and those after it the preferred one."""
        raise BentoError(self.trial_way())

    def clear(self, before: str) -> None:
        """Takes back what `prefer` and `try_once` did. Again and again is fine."""


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
        found = sorted((place / "loader/entries").glob("*.conf"), key=lambda path: (len(path.name), path.name))
        return [parse_loader_entry(path.name, path.read_text("utf-8", "replace")) for path in reversed(found)]

    def default_of(self, place: Path) -> str:
        text = (place / "loader/loader.conf").read_text("utf-8", "replace")
        names = re.findall(r"(?m)^(?:default|preferred)\s+(\S+)", text)
        return next((entry.system for entry in self.entries(place) if names and entry.name == names[-1]), "")

    def locate(self, place: Path, written: str, original: Path) -> Path:
        return place / written.lstrip("/")

    def armed(self) -> Armed:
        names = (
            self.read(name).decode("utf-16-le", "replace") for name in ("LoaderEntryDefault", "LoaderEntryOneShot")
        )
        return Armed(*(name.partition("\0")[0] for name in names))

    def prefer(self, system: str) -> None:
        self.tell("set-default", self.entry_of(system).name)

    def try_once(self, system: str) -> None:
        self.tell("set-oneshot", self.entry_of(system).name)

    def clear(self, before: str) -> None:
        # An entry of another name is another's wish: to start Windows once, say.
        armed = self.armed()
        if armed.once.startswith("nixos"):
            self.tell("set-oneshot", "")
        if armed.default.startswith("nixos"):
            self.tell("set-default", before)

    def tell(self, verb: str, name: str) -> None:
        """Sets a variable, or removes it, and looks: not every firmware keeps what it is given."""
        which = ("set-default", "set-oneshot").index(verb)
        if self.armed()[which] == name:
            return
        run(["bootctl", verb, name], timeout=LOADER_LIMIT_S)
        if self.armed()[which] != name:
            raise BentoError(f"bootctl {verb} had no effect: the firmware does not keep EFI variables")


def parse_loader_entry(file: str, text: str) -> BootEntry:
    """An entry of systemd-boot's. Its name is the file's, without the count of boots that the loader keeps in it."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if key == "options":
            value = f"{fields.get(key, '')} {value}"
        elif key in fields:  # of several lines `initrd` the first is the system's
            continue
        fields[key] = value.strip()
    name = re.sub(r"\+[0-9]+(-[0-9]+)?\.conf$", ".conf", file)
    paths = fields.get("linux", ""), fields.get("initrd", "")
    return BootEntry(name, system_of(fields.get("options", "")), *paths, fields.get("version", ""))


def system_of(options: str) -> str:
    """The system that a kernel's command line starts; empty when it starts none."""
    found = [word for word in options.split() if word.startswith("init=") and word.endswith("/init")]
    return found[-1].removeprefix("init=").removesuffix("/init") if found else ""


class Grub(Loader):
    """GRUB: two variables in grubenv, which the lines that bento.nix adds to grub.cfg follow and clear."""

    def trial_way(self) -> str:
        reasons = (self.trouble(place) for place in self.places)
        return next((f"none: {reason}" for reason in reasons if reason), "grub")

    def trouble(self, place: Path) -> str | None:
        """Why GRUB there would not follow us. Where it cannot write, each boot would be the one trial."""
        try:
            text, env = (place / "grub.cfg").read_text("utf-8", "replace"), (place / "grubenv")
            # An empty one is fine, too.
            if env.is_symlink() or (env.exists() and not (env.read_bytes() or GRUBENV_HEAD).startswith(GRUBENV_HEAD)):
                return f"{env} is not what GRUB makes it"
            if os.statvfs(place).f_flag & os.ST_RDONLY:
                return f"{place} cannot be written"
        except OSError as error:
            return f"{error.filename or place}: {error.strerror}"
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
        """With mirrors: what is preferred in one is; the one shot is left only if it is in all."""
        told = [read_grubenv(place / "grubenv") for place in self.places]
        once = [each.get(GRUB_TRY, "") for each in told]
        return Armed(max((each.get(GRUB_GOOD, "") for each in told), default=""), min(once, default=""))

    def prefer(self, system: str) -> None:
        self.tell({GRUB_GOOD: self.entry_of(system).name})

    def try_once(self, system: str) -> None:
        self.tell({GRUB_TRY: self.entry_of(system).name})

    def clear(self, before: str) -> None:
        """There is no before: nobody else writes these."""
        self.tell({GRUB_GOOD: "", GRUB_TRY: ""})

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
        sync_directory(path.parent)
        os.sync()  # not into the journal only


def find_loader(settings: Settings) -> Loader:
    kind, *places = settings.boot_loader or ("",)
    kinds = {"systemd-boot": SystemdBoot, "grub": Grub}
    if kind not in kinds or not places:
        return Loader(settings)
    return kinds[kind](settings, [settings.system_path(place) for place in places])


# --- this machine ---


class Facts(NamedTuple):
    """Where this machine stands. Each is a system; a specialisation counts as the system that it belongs to.

    `default` is what the profile names, and so the next boot.
    """

    running: str
    booted: str
    default: str
    boot_id: str


class Machine:
    """What a command works on, and the only door to it: this machine's systems, boot loader, files and server.

    `directory`: of this process, in the state directory, as sftp sees it. `session`: an open connection to the server.
    `watchdog`: the timer that guards what this process does.
    """

    def __init__(self, settings: Settings, directory: str = "", *, log: str = "deploy.log") -> None:
        self.settings, self.directory = settings, directory
        self.log = Log(settings.state / log)
        self.state = self.written = read_journal(settings.state / "state.json", parse_state, self.log) or State()
        self.loader = find_loader(settings)
        self.profile = settings.system_path("/nix/var/nix/profiles/system")
        self.session: Sftp | None = None
        self.watchdog: str | None = None
        self.twin = self.state.twin
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
        """The last system that a boot has proven. Before Bento has seen one: what this machine was booted with."""
        good = self.state.good
        return good if good is not None and os.path.exists(good) else self.facts().booted

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
        """Looks whether what a trial rests on is still there after a boot. The boot loader takes only the one shot."""
        if self.on_trial is not None and self.state.armed and self.state.boot != self.boot_id:
            with best_effort(self.log):
                self.remember(forgets=not self.loader.armed().default)

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

    @property
    def needs_reboot(self) -> bool:
        """Whether a boot would give another kernel (or initrd, modules, parameters), or a system that could not go live."""
        waits = self.on_trial is not None and self.facts().running != self.on_trial
        return waits or not self.has_kernel_of(self.default)

    def still_failed(self) -> tuple[str, ...]:
        """The units that failed at the last activation, but for those that systemd knows to be well by now."""
        units = self.state.failed_units
        if not units or not self.has_systemd:
            return units
        argv = ["systemctl", "show", "--property=LoadState,ActiveState", "--", *units]
        said = run(argv, check=False, timeout=60).output.strip().split("\n\n")
        well = {
            unit
            for unit, words in zip(units, said, strict=False)
            if len(said) == len(units) and "=loaded" in words and not re.search("=failed|=activating", words)
        }
        return tuple(unit for unit in units if unit not in well)

    def is_switching(self) -> bool:
        """Whether somebody's switch is at work. That of 2024 would wait for it, today's would refuse."""
        try:
            with open(self.settings.system_path("/run/nixos/switch-to-configuration.lock")) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def switch(self, system: str, action: str, token: str) -> Done:
        """Runs the system's switch-to-configuration. Its exit code is None when it did not end in time.

        Under systemd in a transient unit: the switch may stop, restart or kill whatever it likes, us included.
        """
        self.log.say(f"switch-to-configuration {action}: {system}")
        before = size_of(self.log.path)
        argv = [f"{system}/bin/switch-to-configuration", action]
        limit_s = self.settings.activation_timeout
        with self.log.output() as out:
            if not self.has_systemd:
                code = run(argv, check=False, output=out, timeout=limit_s).code
            else:
                code = run_in_unit(argv, f"bento-switch-{token}-{os.urandom(3).hex()}", out, limit_s)
        return Done(code, self.log.tail(max(0, min(size_of(self.log.path) - before, 1 << 18))))

    def has_begun(self) -> bool:
        """Whether the last switch got as far as to change anything, by its own words. True where there are none left."""
        said = self.log.tail().rpartition("bento: switch-to-configuration test: ")[2]
        return not said or "the following units:" in said or "activating the configuration" in said

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

    def nix_env(self, *words: str) -> None:
        argv = ["nix-env", "-p", str(self.profile), *words]
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

    def keep_generation(self, system: str) -> None:
        """Brings back the generation of a system to fall back to, which a garbage collection has taken. By hand: nix-env
        would make it the default meanwhile. As its entry has it: the next `boot` writes one of that name again, and no moment
        is without. Else below the default's, for `nixos-rebuild --rollback` goes down."""
        generations = self.generations()
        number, latest_ns = self.loader.generation_of(system)
        if number in (0, *generations):
            if system in generations.values():
                return
            ours = newest(generations).get(self.default, 1)
            free = [number for number in range(1, ours) if number not in generations]
            number, latest_ns = free[-1] if free else max(generations, default=0) + 1, 0
        self.link_generation(number, system, latest_ns)

    def link_generation(self, number: int, system: str, latest_ns: int) -> None:
        """Not younger than the one above it: Nix aborts, for whatever is to be deleted by age, where a lower one is."""
        link, *above = (self.link_of(each) for each in (number, *self.generations()) if each >= number)
        times_ns = [latest_ns] if latest_ns else []
        times_ns += [other.lstat().st_mtime_ns for other in above[:1]]
        link.symlink_to(system)
        if times_ns:
            os.utime(link, ns=(min(times_ns), min(times_ns)), follow_symlinks=False)

    def link_of(self, number: int) -> Path:
        return self.profile.with_name(f"{self.profile.name}-{number}-link")

    def raise_generation(self, good: str) -> None:
        """A limit of entries has taken the one of the system to fall back to, after releases that have not been booted: its
        generation becomes the newest but one. With a limit of one there is no place for it."""
        default, generations = self.default, self.generations()
        if self.loader.shows_others(default):
            self.link_generation(max(generations) + 1, good, 0)
            self.nix_env("--set", default)
            self.nix_env("--delete-generations", str(newest(generations)[default]))
            self.write_menu(default)

    def can_fall_back(self, good: str) -> bool:
        """Whether there is a boot entry to fall back to, and will be. A garbage collection, and the next `boot`, take it."""
        with best_effort(self.log):
            self.keep_generation(good)
            if self.loader.entry_fault(good) is None:
                return True
            self.end_trial()  # first: what is written now may be broken, and must not be what is preferred
            self.write_menu(self.default)
            if not self.loader.shows(good):
                self.raise_generation(good)
        return self.loader.entry_fault(good) is None

    def end_trial(self) -> None:
        """Takes back what is ours in the boot loader's variables; tried again at each run until it is done."""
        if self.state.armed:
            with best_effort(self.log):
                self.loader.clear(self.state.set_before)
                self.remember(armed=False, set_before="")

    def write_menu(self, system: str) -> None:
        """The boot menu once more. Without a unit, for it may be the shutdown: `boot` touches no other."""
        run([f"{system}/bin/switch-to-configuration", "boot"], timeout=self.settings.activation_timeout)
        self.flush_menu(system)

    def flush_menu(self, system: str) -> None:
        """After each `boot` of a system. Without it there is more to lose in a power cut, and no more than that."""
        with best_effort(self.log):
            self.loader_of(system).flush()

    def count_proof(self) -> int:
        """How often a proof has failed since the boot, this one included. In /run: it is of one boot, and a full disk must
        not keep a machine from counting."""
        with open(self.settings.system_path("/run/bento-proofs"), "ab") as file:
            file.write(b".")
            return file.tell()

    def keep(self, system: str) -> None:
        """A garbage collection root for the system that a boot may have to lead back to."""
        link = self.settings.system_path("/nix/var/nix/gcroots/bento-way-back")
        with best_effort(self.log):
            if not os.path.islink(link) or os.readlink(link) != system:
                link.parent.mkdir(parents=True, exist_ok=True)
                replace_link(link, system)

    def reboot(self) -> None:
        run(["systemctl", "reboot"], timeout=60)

    def hang_up(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None


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
    sink = "null" if out.name == os.devnull else f"append:{out.name}"
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


def wait_for_units(pattern: str, give_up: float) -> None:
    """Until none of these units is active, or the monotonic clock says `give_up`."""
    while run(["systemctl", "is-active", "--quiet", pattern], check=False, timeout=30).code == 0:
        if time.monotonic() > give_up:
            return
        time.sleep(0.5)


def transient_environment(*names: str) -> list[str]:
    return [f"--setenv={name}={os.environ[name]}" for name in names if name in os.environ]


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
        log.say(f"going on without: {error}")


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
        failed_units=machine.still_failed(),
        waiting_for_boot=state.release if trial is not None and trial != running else None,
        paused_until=paused_until(machine),
        boot_trial=machine.trial_way,
        known_to_boot=machine.good,
        signer=state.signer,
        expires=vouched_until(state),
        first_contact=first_contact(machine.settings),
        machine=machine.mark,
        twin=machine.twin,
        since=machine.phase_since if phase == Phase.BUILDING else None,
        interval=machine.settings.interval,
        offline_after=machine.settings.offline_after or None,
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


def look_for_twin(machine: Machine) -> None:
    """Looks whether the last report there is another machine's: a clone's. That is told, and nobody fights it.

    It is remembered if it came after one of this machine's own: else the other may have made way for this one.
    """
    session, state, own = machine.session, machine.state, machine.mark
    assert session is not None
    name, now_s = f"{machine.directory}/reported.json", time.time()
    looked_s = 0.0 if state.looked is None else parse_time(state.looked)
    if state.machine == own and state.twin is None and abs(now_s - looked_s) < TWIN_LOOK_S:
        return
    path, seen = machine.settings.state / name, None
    session.do(f"-get logs/status.json {name}", grows=path, ceiling=MIN_FREE_BYTES)
    with suppress(OSError, BentoError):
        seen = parse_report(path.read_bytes(), "the last report").machine
    if None not in (seen, own) and seen != own:
        machine.twin = format_time(now_s)
        machine.log.say(f"warning: another machine reports as {machine.settings.host}: each needs a name of its own")
    elif state.twin is not None and abs(now_s - parse_time(state.twin)) > TWIN_S:
        machine.twin = None
    with suppress(OSError):
        twin = machine.twin if state.machine == own else None
        machine.remember(machine=own, twin=twin, looked=format_time(now_s))


def deliver(machine: Machine, phase: Phase = Phase.IDLE) -> None:
    """Uploads the logs in the outbox, oldest first, then a fresh status.json; keeps the newest logs on the server."""
    session, outbox = machine.session, machine.settings.state / "outbox"
    assert session is not None
    waiting = sorted(path.name for path in outbox.glob("*.log") if LOG_NAME.fullmatch(path.name))
    for name in waiting:
        session.put(f"outbox/{name}", name)
        (outbox / name).unlink()
    look_for_twin(machine)
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
            failures.append(str(error))
    machine.log.say(f"report kept for the next run: {'; '.join(failures)}")


class Outcome(NamedTuple):
    """How an attempt ended. `unreachable`: because of the line or the server, not of the release. `doubt`: it may have
    been, and nobody can tell. `costly`: not to be tried again at each poll."""

    result: Result
    reason: str = ""
    system: str | None = None
    unreachable: bool = False
    doubt: bool = False
    costly: bool = False
    failed_units: tuple[str, ...] = ()

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
    again = state.tried is not None and state.tried.release == release
    older = pending.trial and state.tried is not None and not again
    changes: dict[str, Any] = {"last": state.tried if older and outcome.result == Result.OK else last}
    if release is not None and not older:
        interruptions, doubts = (state.interruptions, state.doubts) if again else (0, 0)
        interruptions += outcome.result == Result.INTERRUPTED
        doubts += 1 if outcome.doubt else 2 * (outcome.result == Result.ROLLED_BACK)  # what is sure is not tried again
        changes |= {
            "tried": last, "published": pending.published, "costly": outcome.costly,
            "interruptions": interruptions, "doubts": doubts,
        }  # fmt: skip
    if outcome.result in (Result.POSTPONED, Result.INTERRUPTED):
        changes["rebooted"] = None
    if outcome.result == Result.OK:
        changes["failed_units"] = outcome.failed_units
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
    if thrifty:
        join_parts(session, settings, current, tar)
    if not tar.exists() or tar.stat().st_size < current.size:
        session.get(f"releases/{tar.name}", f"partial/{tar.name}", current.size, resume=tar.exists())
    size, digest = tar.stat().st_size, hash_file(tar)
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
    os.sync()
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
        where = flake_url(tree, recipe.directory)
        return ["nixos-rebuild", action, "--flake", f"{where}#{recipe.attribute}", *recipe.options]
    entry = tree / recipe.directory / "configuration.nix"
    return ["nixos-rebuild", action, "--no-flake", "-I", f"nixos-config={entry}", *recipe.options]


def build_argv(settings: Settings, config: Path) -> list[str]:
    recipe = read_recipe(config, settings.host)
    upgrade = (settings.upgrade_channels or settings.rebuild_every) and not is_flake(config, recipe)
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


def build(settings: Settings, log: Log) -> str:
    """Builds config/ and returns the new system's store path. The running system is not touched."""
    config = settings.state / "config"
    argv = build_argv(settings, config)
    with unchanged_lock(config / read_recipe(config, settings.host).directory):
        return make_result(settings, log, argv)


def realise(settings: Settings, log: Log, current: Current) -> str:
    """Fetches the system that the server built from this machine's substituters, and returns its store path. Nothing is
    evaluated or built here, and Nix checks what comes, by the keys that it trusts."""
    if current.system is None:
        missing = "its signed text names no system: 'bento.py sign --build'"
        missing = missing if current.signer else "the server has not built it: 'bento.py populate --build'"
        raise BentoError(f"release {current.release[:12]} is not to be built here, and {missing}")
    # That a cache did not have it a while ago says nothing.
    argv = ["nix-store", "--realise", current.system, "--add-root", str(settings.state / "result")]
    new = make_result(settings, log, [*argv, "--option", "narinfo-cache-negative-ttl", "0"], why_not_fetched)
    if new != current.system:
        raise BentoError(f"{current.system} is not a store path: it leads to {new}")
    return new


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
    FELL_BACK = "fell back"  # there was a boot, and it is not what came up
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
    return Move.PROVE if facts.booted == state.system else Move.FELL_BACK


class Switched(StrEnum):
    """What came of `switch-to-configuration test`."""

    LIVE = "live"
    REFUSED = "refused"  # nothing was done, and it may be otherwise another time
    NEEDS_BOOT = "needs a boot"
    FAILED = "failed"


def judge_switch(code: int | None, output: str, *, is_new: bool, is_old: bool) -> Switched:
    """`is_new`, `is_old`: what runs now. An exit code of 0 or 4 may hide an activation that gave up before."""
    if is_new and code in (0, 4):
        return Switched.LIVE
    if is_old and (code == 100 or (code == 1 and "switchInhibitors" in output)):
        return Switched.NEEDS_BOOT
    return Switched.REFUSED if is_old and code in (1, 11) else Switched.FAILED


# --- journal and watchdog ---


def load_pending(machine: Machine) -> Pending | None:
    return read_journal(machine.settings.state / "pending.json", parse_pending, machine.log)


def save_pending(machine: Machine, pending: Pending) -> None:
    write_atomic(machine.settings.state / "pending.json", encode(pending))


def clear_pending(machine: Machine) -> None:
    """The end of an attempt, whichever way it went: a watchdog that comes late finds no journal."""
    remove(machine.settings.state / "pending.json")
    sync_directory(machine.settings.state)


def arm(machine: Machine, token: str, limit_s: float) -> None:
    """Arms a new watchdog, outside our unit, that runs `rollback` in `limit_s` seconds; then ends the one before.

    It gets these settings as flags and this very file of the old system, because an activation changes what lies in
    /etc. Without default dependencies: emergency mode stops whatever needs sysinit.target. OnActiveSec counts on
    CLOCK_MONOTONIC, which nobody can set.
    """
    if not machine.has_systemd:
        return
    unit = f"bento-watchdog-{token}-{os.urandom(3).hex()}"
    client = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(__file__), "rollback", "--token", token]
    run(
        ["systemd-run", "--quiet", "--collect", f"--unit={unit}", f"--on-active={int(limit_s)}",
         "--timer-property=AccuracySec=1s", "--timer-property=DefaultDependencies=no",
         "--property=DefaultDependencies=no", *transient_environment("PATH", "HOME", "LOCALE_ARCHIVE", "NIX_REMOTE"),
         "--", *client, *settings_argv(machine.settings)],
        timeout=60,
    )  # fmt: skip
    disarm(machine)
    machine.watchdog = unit


def disarm(machine: Machine) -> None:
    if machine.watchdog is not None and machine.has_systemd:
        run(["systemctl", "stop", f"{machine.watchdog}.timer"], check=False, timeout=60)
    machine.watchdog = None


def advance(machine: Machine, pending: Pending, limit_s: float) -> Pending:
    """The next step of an attempt, with a deadline of its own, on disk before anything of it is done."""
    save_pending(machine, pending)
    arm(machine, pending.token, limit_s + WATCHDOG_MARGIN_S)
    pending = pending._replace(watchdog=machine.watchdog)
    save_pending(machine, pending)
    return pending


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


# --- commit ---


def make_default(machine: Machine, system: str, pending: Pending) -> str | None:
    """Makes a system the boot default, forward or back; None, or why it is not. Unless a boot has proven it, its next boot
    is a trial: the boot loader is told to start it once, and after that the last system that is known to boot. In this
    order, a cut leaves no default that has never booted.
    """
    good = machine.good
    try:
        if machine.default != system != pending.new:
            machine.undo_default(system, pending.new)
        trial = can_try(machine, system, must=system == pending.new) and lead_back_to(machine, good)
        if system == pending.new:
            machine.nix_env("--set", system)
    except BentoError as error:
        return f"the system profile could not be set: {error}"
    done = machine.switch(system, "boot", pending.token)
    machine.flush_menu(system)
    fault = machine.loader_of(system).entry_fault(system)
    # On a full /boot nothing can be written. On the way back that does no harm, where the menu is as it was, whichever
    # boot loader the new system has.
    as_it_was = system != pending.new and fault is None and machine.loader_of(pending.new).starts(system)
    if done.code != 0 and not as_it_was:
        return f"the boot loader could not be written ({how_ended(done.code)}): {machine.log.cause()}"
    if fault is None and trial:
        try_once(machine, system, good)
    elif fault is None:
        machine.end_trial()
    return fault


def commit(machine: Machine, pending: Pending, note: str = "") -> Outcome | None:
    pending = pending._replace(step=Step.COMMITTING, committed=True)
    pending = advance(machine, pending, 2 * machine.settings.activation_timeout)
    machine.keep(machine.good)
    trouble = make_default(machine, pending.new, pending)
    if trouble is not None:
        return go_back(machine, pending, Outcome(Result.POSTPONED, trouble, costly=True))
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


def activate_again(machine: Machine, pending: Pending, system: str) -> Switched:
    """The old system, live. After a boot into the new one, its kernel goes on: then only where that helps."""
    done = machine.switch(system, "test", pending.token)
    if machine.running == system:
        stuck = machine.facts(pending.new).booted == pending.new and not machine.has_kernel_of(system)
        stuck = stuck and reach(machine, system) is not None
        return Switched.NEEDS_BOOT if stuck else Switched.LIVE
    is_new = machine.facts(pending.new).running == pending.new
    return judge_switch(done.code, done.output, is_new=False, is_old=is_new)


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
    pending = pending._replace(
        step=Step.ROLLING_BACK, verdict=outcome.result, reason=one_line(outcome.reason), doubt=outcome.doubt
    )
    with best_effort(machine.log):
        pending = advance(machine, pending, machine.settings.activation_timeout + machine.settings.confirm_timeout)
    machine.end_switches(pending)
    facts, owner = machine.facts(pending.new, pending.profile), owner_of(pending.old, [pending.profile])[0]
    pending = pending._replace(switched=pending.switched and (facts.running == pending.new or machine.has_begun()))
    default, system = find_way_back(pending, facts, owner, machine.good)
    trouble = None if default is None else make_default(machine, default, pending)
    came = Switched.LIVE if system is None else activate_again(machine, pending, system)
    if trouble is not None:
        with best_effort(machine.log):  # what is live again is not activated at each run
            save_pending(machine, pending._replace(switched=pending.switched and came != Switched.LIVE))
        words = f"the boot default could not be set back to {pending.profile}: {trouble}: tried again at the next run"
        return Outcome(Result.ROLLBACK_FAILED, f"{outcome.reason}; and {words}")
    if came == Switched.LIVE:
        return blame(machine, pending, outcome)
    if facts.booted == pending.new or came == Switched.NEEDS_BOOT:
        return go_back_by_boot(machine, pending, outcome)
    words = f"going back to {system} failed ({came}: {machine.log.cause()}): tried again at the next run"
    return Outcome(Result.ROLLBACK_FAILED, f"{outcome.reason}; and {words}")


def go_back_by_boot(machine: Machine, pending: Pending, outcome: Outcome) -> Outcome | None:
    """Once, and whatever the setting `reboot` says: no other way is left. A person decides for themselves."""
    if pending.by_hand or pending.rebooting not in ("", machine.boot_id) or not machine.has_systemd:
        result = outcome.result if pending.by_hand else Result.INTERRUPTED
        return Outcome(result, f"{outcome.reason}; the old system takes effect at the next reboot")
    machine.log.say("a reboot is to lead back")
    with best_effort(machine.log):
        save_pending(machine, pending._replace(rebooting=machine.boot_id))
    machine.reboot()
    return None


def blame(machine: Machine, pending: Pending, outcome: Outcome) -> Outcome:
    """A release that seemed bad is not to blame for a server or a line that is down."""
    if outcome.result != Result.ROLLED_BACK or pending.by_hand or reach(machine, machine.running) is None:
        return outcome
    reason = f"{outcome.reason}; nor can the old one: not the release's fault, tried again later"
    return Outcome(Result.POSTPONED, reason, unreachable=True)


# --- the attempt ---


def take_over(machine: Machine, pending: Pending) -> Outcome | None:
    """Activates, proves and commits the new system; goes back from what does not prove itself."""
    before, new = machine.running, machine.variant(pending.new)
    note, units = "", tuple[str, ...]()
    if before != new:
        if machine.settings.activation == "boot" and not pending.between:
            return wait_for_boot(machine, pending, "")
        done = machine.switch(new, "test", pending.token)
        switched = judge_switch(done.code, done.output, is_new=machine.running == new, is_old=machine.running == before)
        waits = machine.waits_for() if done.code is None else ""
        words = f"switch-to-configuration test: {how_ended(done.code)}: {waits or find_cause(done.output)}"
        if switched == Switched.REFUSED:
            return give_up(machine, pending, Outcome(Result.POSTPONED, f"not activated: {words}", costly=True))
        if switched == Switched.FAILED:
            return go_back(machine, pending, Outcome(Result.ROLLED_BACK, words))
        if switched == Switched.NEEDS_BOOT:
            return wait_for_boot(machine, pending, "it cannot go live: ")
        if done.code == 4:
            units = tuple(failed_units(done.output))
            note = f"activated, but these units failed: {', '.join(units) or 'see the log'}"
    pending = advance(machine, pending, machine.settings.confirm_timeout)
    if (failure := prove(machine)) is not None:
        result = Result.POSTPONED if failure.slept else Result.ROLLED_BACK
        return go_back(machine, pending, Outcome(result, failure.reason, doubt=failure.unreachable))
    outcome = commit(machine, pending, note)
    return outcome and outcome._replace(failed_units=units)


def give_up(machine: Machine, pending: Pending, outcome: Outcome) -> Outcome | None:
    """Before anything was done. After an earlier way back that failed, that is what there is to do."""
    return go_back(machine, pending, outcome) if pending.committed else outcome


def wait_for_boot(machine: Machine, pending: Pending, why: str) -> Outcome | None:
    """Makes a system that cannot, or shall not, go live the next boot's, which is to prove it."""
    if (unfit := unfit_for_boot(machine, pending)) is not None:
        return give_up(machine, pending, Outcome(Result.BUILD_FAILED, unfit))
    words = "it takes effect at the next reboot, and is proven then"
    return commit(machine, pending._replace(switched=False), why + words)


def activate(machine: Machine, pending: Pending) -> Outcome | None:
    """take_over, with the journal and the watchdog around it, and a way back from our own failures too."""
    if machine.is_switching():
        return Outcome(Result.POSTPONED, "not activated: somebody else holds the lock of switch-to-configuration")
    if not machine.has_systemd:
        machine.log.say("systemd does not run here: no watchdog guards this activation")
    try:
        pending = pending._replace(job=max(machine.jobs(), default=0))
        pending = advance(machine, pending, machine.settings.activation_timeout)
    except (OSError, BentoError) as error:
        return Outcome(Result.POSTPONED, f"not activated, the watchdog could not be armed: {error}")
    try:
        return take_over(machine, pending)
    except (OSError, BentoError) as error:
        return go_back(machine, load_pending(machine) or pending, Outcome(Result.POSTPONED, str(error)))
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


def align_trial(machine: Machine) -> None:
    """Makes the boot loader's variables say what the next boot is to be: a trial of the boot default, or nothing of ours.

    A person's new default ends a trial, and so does its proof.
    """
    new, good = machine.on_trial, machine.good
    if new is None:
        machine.end_trial()
    elif machine.state.armed and machine.can_fall_back(good) and lead_back_to(machine, good):
        try_once(machine, new, good)


def can_try(machine: Machine, system: str, *, must: bool) -> bool:
    """Whether the next boot of a system can be a trial. Where it `must` be, and what is the default boots: BentoError,
    for a broken entry to fall back to. None at all may be older than what the menu shows."""
    good, loader = machine.good, machine.loader
    if system == good or not runs_bento(system) or loader.trial_way().startswith("none"):
        return False
    possible = machine.can_fall_back(good)
    if must and not possible and loader.shows(good) and loader.entry_fault(machine.default) is None:
        raise BentoError(f"its first boot could not lead back: {loader.entry_fault(good)}")
    return possible


def lead_back_to(machine: Machine, good: str) -> bool:
    """Makes the system that is known to boot the standing default, before another becomes it. False: no trial here."""
    try:
        before, ours = machine.loader.armed().default, machine.loader.entry_of(good).name
        # Before it is changed: what a person had set is put back. Ours, of a lost state, not.
        if not machine.state.armed:
            machine.remember(armed=True, set_before=before if before != ours else "")
        machine.loader.prefer(good)
        return True
    except (OSError, BentoError) as error:
        machine.log.say(f"the next boot cannot be a trial: {error}")
        return False


def try_once(machine: Machine, new: str, good: str) -> None:
    """The other half. Where the way back is no entry any more, the new system is a plain default; where only this half
    fails, the next boot is that of the old one."""
    if not machine.can_fall_back(good):
        machine.log.say("the next boot cannot be a trial: the boot loader has no entry of the last system any more")
        machine.end_trial()
    elif lead_back_to(machine, good):  # again: the limit of entries may have taken the one of its older generation
        with best_effort(machine.log):
            machine.loader.try_once(new)


def judge_boot(machine: Machine, pending: Pending) -> Outcome | None:
    """After the first boot of a system. Raises Unreachable while the server may merely be slower to boot: a site's power
    cut is not the release's fault."""
    failure = prove(machine)
    if failure is None and pending.step == Step.COMMITTING:
        return commit(machine, pending)
    if failure is None:
        machine.end_trial()  # before it is written down: a cut in between leads back, and is one of the tries
        return Outcome(Result.OK, "", pending.new)
    patience = PATIENT_PROOFS if runs_bento(machine.good) else FIRST_PROOFS
    if failure.unreachable and machine.count_proof() < patience:
        raise Unreachable(f"after the boot, {failure.reason}: tried again at the next run")
    result = verdict_of_boot(machine, pending) if failure.unreachable else Result.ROLLED_BACK
    outcome = Outcome(result, f"after the boot, {failure.reason}")
    return go_back(machine, pending, outcome)


def verdict_of_boot(machine: Machine, pending: Pending) -> Result:
    """A boot that came to nothing may be a power cut's fault, or a site's: tried once more, then given up."""
    tried = machine.state.tried
    again = machine.state.interruptions > 0 and tried is not None and tried.release == pending.release
    return Result.ROLLED_BACK if again else Result.INTERRUPTED


def settle_earlier(machine: Machine) -> bool:
    """Brings to its end what an earlier process, or a boot, left. False when a reboot is on its way."""
    pending = load_pending(machine)
    more = (pending.new, pending.profile) if pending is not None else ()
    if pending is not None and machine.has_systemd:  # a switch that goes on is not to be judged, nor left half done
        machine.watchdog = pending.watchdog
        wait_for_units(f"bento-switch-{pending.token}-*", time.monotonic() + machine.settings.activation_timeout)
    move = settle(pending, machine.state, machine.facts(*more))
    if move in (Move.REST, Move.WAIT):
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
            outcome = Outcome(Result(pending.verdict), pending.reason, doubt=pending.doubt)
        return go_back(machine, pending, outcome)
    words = "it did not come up, the boot loader went back"
    return go_back(machine, pending, Outcome(verdict_of_boot(machine, pending), words))


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
        arm(machine, pending.token, machine.settings.build_timeout + WATCHDOG_MARGIN_S)
        signal.alarm(0)
    return pending


def refuse_to_activate(machine: Machine, pending: Pending, *, force: bool) -> Outcome | None:
    """The outcome where the built system needs no activation, or must not have one."""
    new, facts = pending.new, machine.facts(pending.new)
    if new == facts.running == facts.default and not pending.committed:
        return Outcome(Result.OK, "nothing to activate: this system runs already", new)
    for part in ("sw/bin/bento-client", "etc/bento/client.json"):
        if not force and not has_left(new) and not Path(new, part).exists():
            reason = f"the new system has no {part}: it would be this machine's last update: import ./utils/bento.nix"
            return Outcome(Result.BUILD_FAILED, reason, new)
    unsigned = drops_signers(machine.settings, settings_of(new), new, machine.state.signed)
    if unsigned is not None:
        return Outcome(Result.BUILD_FAILED, unsigned, new)
    match machine.state.tried:  # what was built anew may be what was given up
        case Last(pending.release, Result.ROLLED_BACK, reason, pending.new) if machine.state.doubts != 1 and not force:
            return Outcome(Result.ROLLED_BACK, reason, new)
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
            return pending._replace(new=realise(settings, machine.log, current))
        if machine.state.unpacked != current.release or not is_untouched(settings.state / "config"):
            # What failed once is fetched whole: the fault may lie in the parts.
            fetch(session, settings, current, thrifty=pending.attempt == 1)
            adopt(machine, current.release)
        machine.hang_up()
        result = Result.BUILD_FAILED
        with best_effort(machine.log):  # the download may have taken its time
            arm(machine, pending.token, settings.build_timeout + WATCHDOG_MARGIN_S)
        return pending._replace(new=build(settings, machine.log))
    except Unreachable:
        raise
    except (BentoError, OSError) as error:
        known, words = current.system if settings.build == "server" else None, str(error)
        if result == Result.BUILD_FAILED and free_bytes(settings.state) < MIN_FREE_BYTES:
            return Outcome(Result.POSTPONED, f"the disk of {settings.state} is full: {words}", known)
        passing = result == Result.BUILD_FAILED and re.search(BAD_MOMENT, words)
        return Outcome(Result.POSTPONED if passing else result, words, known)
    except Exception as error:  # a bug of ours must not be met anew at each poll, and nobody told
        return Outcome(result, tell_bug(machine.log, error))


def deploy(machine: Machine, pending: Pending, *, server: str, force: bool) -> Outcome | None:
    """Puts what was built to work, if its server is still there. None: a reboot leads back."""
    refusal = refuse_to_activate(machine, pending, force=force)
    if refusal is not None:
        return refusal
    try:
        machine.session = knock(machine.settings, machine.log, server)
        announce(machine, Phase.ACTIVATING)
    except BentoError as error:
        reason = f"built, but not activated, because the server went away: {error}"
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


def poll_once(machine: Machine) -> Current:
    """What the server publishes for this machine. Raises what is wrong with it, after it was recorded and reported."""
    state, settings = machine.state, machine.settings
    try:
        patience_s = settings.connect_timeout
        machine.session, current = poll(settings, machine.directory, machine.log, state, patience_s)
        machine.remember(**accepted(state, current))
        return current
    except Unreachable:
        raise
    except Exception as error:
        words = str(error) if isinstance(error, (BentoError, OSError)) else tell_bug(machine.log, error)
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
    state, running = machine.state, machine.facts().running
    if state.release != current.release or running == state.system:
        return None
    if machine.on_trial is not None:
        return f"release {current.release[:12]} waits for the next boot"
    return f"release {current.release[:12]} is deployed, but another system runs: {running}"


def choose(machine: Machine, current: Current, *, force: bool) -> tuple[bool, str]:
    """Whether `current` is to be deployed on this machine now, and why, or why not."""
    wanted, why = decide(
        current, machine.state, time.time(), force=force, replica=len(machine.settings.server) > 1,
        rebuild_s=machine.settings.rebuild_every,
    )  # fmt: skip
    if not wanted:
        why = what_stands(machine, current) or why
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
    current = poll_once(machine)
    forget_other_system(machine, current)
    wanted, why = choose(machine, current, force=force)
    state, facts = machine.state, machine.facts()
    theirs = facts.running == facts.booted == facts.default  # a person's, and known to boot
    # What a first trial is to lead back to.
    first = state.system is None and (state.good is None or facts.running == facts.booted)
    if (theirs or first) and facts.booted not in (state.system, state.good):
        machine.remember(good=facts.booted, good_release=None, good_revision=None)
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
            upgrade(machine)
            machine.notice_forgotten()
            if not settle_earlier(machine):
                return 1
            code = update(machine, force=force)
            if code == 0 and (force or paused_until(machine) is None):
                reboot_if_due(machine)
            if (expired := nobody_vouches(machine.state, time.time())) is not None:
                machine.log.say(f"error: {expired}")
            return code if expired is None else code or 1


def refuse_volatile(settings: Settings) -> None:
    """The state must outlive a boot: the key, and the journal that leads back from a system that does not do its job."""
    with suppress(OSError):
        mount, root = (mount_of(settings, path) for path in (settings.state, Path(settings.root)))
        own = settings.system_path("/proc/self/mountinfo").exists() or mount != root  # else a test's, anywhere
        if mount is not None and mount.kind in ("tmpfs", "ramfs") and own:
            raise BentoError(f"{settings.state} is on a {mount.kind}, gone at the next boot: persist this directory")


def upgrade(machine: Machine) -> None:
    """What clients before 1.1 left: journals of a build, which had changed nothing yet, and of a system that waits for
    its first boot, which state.json knows now.
    """
    for name in ("pending.json", "waiting.json"):
        path = machine.settings.state / name
        pending = read_journal(path, parse_pending, machine.log)
        if pending is None:
            continue
        step = json.loads(path.read_bytes())["step"]
        if step == "rebooting":
            waits = {"system": pending.new, "release": pending.release, "boot": pending.boot_id}
            machine.remember(good=pending.old, **waits if machine.default == pending.new else {})
        if step in ("rebooting", "building"):
            remove(path)


def end_lock_holder(machine: Machine) -> None:
    """Ends the run that holds the lock, and what it started: it hangs, or a person wants it gone."""
    with suppress(OSError, ValueError, IndexError):
        holder = lock_holder(machine.settings)
        children: list[str] = []
        with suppress(OSError):  # a kernel may lack this file
            children = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
        machine.log.say(f"ending the client that holds the lock (process {holder})")
        os.kill(holder, signal.SIGKILL)
        for child in children:  # each leads a group, see `run`
            with suppress(OSError):
                os.killpg(int(child), signal.SIGKILL)


def lock_holder(settings: Settings) -> int:
    """The process that holds the lock, as the kernel says it: what is written in the file may be an older one's."""
    found = os.stat(settings.state / "lock")
    where = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5] == where:
            return int(words[4])
    # A file system whose device the kernel names otherwise.
    return int((settings.state / "lock").read_text().split()[0])


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
                    upgrade(machine)
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
        outcome = go_back(machine, pending._replace(by_hand=True), Outcome(Result.ROLLED_BACK, "by hand"))
    else:
        move = settle(pending, machine.state, machine.facts(pending.new, pending.profile))
        if move == Move.GO_BACK and not pending.verdict:
            pending = pending._replace(verdict=Result.INTERRUPTED, reason=f"the client hung while {pending.step}")
        outcome = carry_out(machine, pending, move)
    if outcome is None:
        return 0
    conclude(machine, pending, outcome)
    print(f"{outcome.result}: {outcome.reason}; this machine runs {machine.running}")
    if outcome.result == Result.ROLLBACK_FAILED and not by_hand:
        reboot_for_want(machine, pending)
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


def reboot_for_want(machine: Machine, pending: Pending) -> None:
    """Where the old system cannot be activated any more (in emergency mode there is no bus), a boot is the way back."""
    if machine.running != pending.old and machine.default != pending.new:
        machine.log.say("the watchdog reboots: no other way is left")
        try:
            machine.reboot()
        except BentoError:
            run(["systemctl", "reboot", "--force"], check=False, timeout=60)


def step_back(machine: Machine) -> Pending:
    """The journal of a way back by hand: to what ran before the last deployment, or before a person's own system."""
    state, facts = machine.state, machine.facts()
    back = state.previous if facts.running in (state.system, state.previous) else state.system
    if back is None:
        raise BentoError("nothing to roll back: no earlier system is known on this machine")
    if not Path(back, "bin/switch-to-configuration").exists():
        raise BentoError(f"the earlier system {back} is gone (garbage collected): publish an older release instead")
    can_try(machine, back, must=True)
    return trial_of(machine)._replace(
        old=back, new=facts.default if facts.default != back else facts.running, profile=back, step=Step.ROLLING_BACK,
        verdict=Result.ROLLED_BACK, reason="by hand", by_hand=True, switched=facts.running != back, attempt=1,
    )  # fmt: skip


def probe_failure(settings: Settings) -> str | None:
    """Why this client, with these settings, cannot read its `current.json` over a new connection; None when it can."""
    with scratch(settings) as directory:
        try:
            session, _ = poll(settings, directory, Log(settings.state / "no-log"))
        except BentoError as error:
            return str(error)
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


def command_status(settings: Settings) -> int:
    if not os.access(settings.state, os.R_OK | os.X_OK) and settings.state.exists():
        raise BentoError(f"{settings.state} cannot be read: run this as root")
    machine = Machine(settings, log="no-log")
    waiting = len(list((settings.state / "outbox").glob("*.log")))
    contact = last_contact(settings, time.time())
    print(format_status(make_report(machine), load_pending(machine), waiting, contact))
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


def format_status(report: Report, pending: Pending | None, waiting: int, contact: str) -> str:
    last, over = report.last, report.expires is not None and parse_time(report.expires) <= parse_time(report.polled)
    rows = [
        ("host", report.host),
        ("client", report.client),
        ("release", report.release or "none of Bento's"),
        ("system", report.system),
        ("last", last and f"{last.result}, release {(last.release or '?')[:12]}, attempt {last.attempt}, {last.finished}"),
        ("reason", last and last.reason),
        ("paused", report.paused_until and f"until {report.paused_until}"),
        ("under way", pending and f"release {pending.release[:12]}, {pending.step}"),
        ("failed", ", ".join(report.failed_units)),
        ("waiting", report.waiting_for_boot and f"release {report.waiting_for_boot[:12]} runs from the next boot on"),
        ("reboot", report.needs_reboot and "needed"),
        ("boot trial", report.boot_trial or "none"),
        ("boots", report.known_to_boot or "not known yet"),
        ("signed", report.signer and f"by {report.signer}, until {report.expires}"),
        ("expired", over and "nobody vouches for this machine's state: sign its release anew"),
        ("twin", report.twin and f"another machine reported as {report.host}, last seen {report.twin}: give it a name and"
         " a key of its own"),
        ("trust", report.first_contact and f"the server's key was taken at first contact, {report.first_contact}"),
        ("outbox", waiting and f"{waiting} not delivered yet"),
        ("contact", contact),
    ]  # fmt: skip
    return "\n".join(f"{name:<10} {value}" for name, value in rows if value)


# --- command line ---

COMMANDS = {
    "run": "poll, and update if there is something new (what the timer starts)",
    "key": "print this machine's public SSH key; make it if there is none",
    "probe": "can this machine reach its server? exit 0, or 75 if not",
    "status": "what this machine runs and last did",
    "rollback": "back from an activation under way, else from the last update",
    "pause": f"[HOURS] deploy nothing for so long ({PAUSE_H:.0f} by default), but poll",
    "resume": "end a pause",
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
    parser.add_argument(
        "command", metavar="COMMAND", choices=[*COMMANDS, "align", "emergency"], help="one of those below"
    )
    parser.add_argument("hours", nargs="?", type=float, help=argparse.SUPPRESS)
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
    for flag, goes_with in (("force", "run"), ("token", "rollback"), ("hours", "pause")):
        if options[flag] not in (None, False) and command != goes_with:
            parser.error(f"{flag if flag == 'hours' else '--' + flag} goes with {goes_with}, not with {command}")
    try:
        settings = read_settings(options)
        if command in ("run", "probe") and not settings.server:
            raise UsageError("no server is set: give --server, or 'server' in the configuration file")
        if command in ("run", "probe"):
            check_trust(settings)
        if command == "run":
            return command_run(settings, force=options["force"])
        if command == "rollback":
            return command_rollback(settings, token=options["token"])
        if command == "pause":
            return command_pause(settings, PAUSE_H if options["hours"] is None else options["hours"])
        simple = {
            "align": command_align, "emergency": command_emergency, "key": command_key, "probe": command_probe,
            "resume": command_resume, "status": command_status,
        }  # fmt: skip
        return simple[command](settings)
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
