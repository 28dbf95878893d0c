"""The client: its decisions in tables, then the real program against a toy machine, a real sftp and real releases."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from accounts import add_user, need_accounts
from toynixos import CLIENT, PYTHON_FLAGS, ToyMachine, need, write_config

import bento
import bento_client
from bento_client import (
    Action,
    BentoError,
    Current,
    Last,
    Pending,
    Report,
    Result,
    Settings,
    State,
    UsageError,
    decide,
    explain_ssh,
    failed_units,
    log_name,
    make_parser,
    make_settings,
    may_reboot,
    one_line,
    parse_current,
    parse_pending,
    parse_report,
    parse_state,
    read_settings,
    retry_pause_s,
    settings_argv,
)

A, B = "a" * 64, "b" * 64
NOON = 1_795_435_200.0  # 2026-11-23T12:00:00Z


# --- settings ---


def test_settings_defaults() -> None:
    settings = make_settings({"host": "t470"}, "test")
    assert settings == Settings(host="t470", user="bento-t470")
    assert settings.state == Path("/var/lib/bento")
    assert settings.identity_file == Path("/var/lib/bento/id_ed25519")


@pytest.mark.parametrize(
    ("values", "name", "wanted"),
    [
        ({"server": "one"}, "server", ("one",)),
        ({"server": ["one", "2001:db8::1", "[2001:db8::1]", "1.2.3.4"]}, "server", ("one", "2001:db8::1", "[2001:db8::1]", "1.2.3.4")),
        ({"server": []}, "server", ()),
        ({"server": None}, "server", ()),
        ({"port": 2222}, "port", 2222),
        ({"port": None}, "port", 22),
        ({"user": "someone"}, "user", "someone"),
        ({"upgrade_channels": True}, "upgrade_channels", True),
        ({"health_checks": ["true", "a b"]}, "health_checks", ("true", "a b")),
        ({"reboot": "when-needed"}, "reboot", "when-needed"),
        ({"reboot": "23:30-04:00"}, "reboot", "23:30-04:00"),
        ({"state_dir": "some/dir"}, "state_dir", os.path.abspath("some/dir")),
        ({"identity": "key"}, "identity", os.path.abspath("key")),
        ({"a_setting_of_next_year": 7}, "port", 22),
    ],
)  # fmt: skip
def test_settings_good(values: dict[str, Any], name: str, wanted: object) -> None:
    assert getattr(make_settings({"host": "toy"} | values, "test"), name) == wanted


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"host": ""}, "setting 'host' must be this machine's name"),
        ({"host": "../x"}, "setting 'host' must be"),
        ({"host": "x" * 27}, "setting 'host' must be"),
        ({"host": 5}, "setting 'host' cannot be 5"),
        ({"port": "22"}, "setting 'port' cannot be '22'"),
        ({"port": 0}, "setting 'port' cannot be 0"),
        ({"port": True}, "setting 'port' cannot be True"),
        ({"port": 22.5}, "setting 'port' cannot be 22.5"),
        ({"connect_timeout": -1}, "setting 'connect_timeout' cannot be -1"),
        ({"server": 7}, "setting 'server' cannot be 7"),
        ({"server": ["ok", 7]}, "setting 'server' cannot be"),
        ({"server": "-oProxyCommand=x"}, "setting 'server' cannot be '-oProxyCommand=x'"),
        ({"server": "host:22"}, "the port in 'port'"),
        ({"server": ""}, "setting 'server' cannot be ''"),
        ({"server": "a b"}, "setting 'server' cannot be 'a b'"),
        ({"server": "user@host"}, "setting 'server' cannot be"),
        ({"user": "-l"}, "setting 'user' cannot be '-l'"),
        ({"user": "a b"}, "setting 'user' cannot be"),
        ({"ssh_options": "Port=1"}, "setting 'ssh_options' cannot be"),
        ({"ssh_options": ["a\0b"]}, "setting 'ssh_options' cannot be"),
        ({"health_checks": {"a": 1}}, "setting 'health_checks' cannot be"),
        ({"upgrade_channels": 1}, "setting 'upgrade_channels' cannot be 1"),
        ({"reboot": "always"}, "setting 'reboot' is 'never', 'when-needed' or 'HH:MM-HH:MM', not 'always'"),
        ({"reboot": "24:00-25:00"}, "setting 'reboot' is"),
        ({"reboot": "4:00-5:00"}, "setting 'reboot' is"),
    ],
)
def test_settings_bad(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_settings({"host": "toy"} | values, "client.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("client.json: ")


@pytest.mark.parametrize(
    "settings",
    [
        make_settings({"host": "toy"}, "test"),
        make_settings({"host": "toy", "server": ["a", "::1"], "port": 2222, "user": "u", "identity": "/k y", "root": "/r",
                       "known_hosts": "/h", "state_dir": "/s p", "ssh_options": ["-x y", "A=b"], "connect_timeout": 1,
                       "build_timeout": 2, "activation_timeout": 3, "confirm_timeout": 4, "health_checks": ["--a 'b'"],
                       "upgrade_channels": True, "reboot": "22:00-04:00"}, "test"),
    ],
)  # fmt: skip
def test_settings_survive_the_command_line(settings: Settings) -> None:
    """The watchdog gets its settings like this."""
    before = vars(make_parser().parse_args([*settings_argv(settings), "rollback", "--token", "x"]))
    behind = vars(make_parser().parse_args(["rollback", "--token", "x", *settings_argv(settings)]))
    assert read_settings(before) == settings
    assert read_settings(behind) == settings


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "client.json"
    config.write_text('{"host": "toy", "server": "one", "port": 5, "health_checks": ["a"]}')
    argv = ["--config", str(config), "--port", "6", "status", "--server", "two", "--server=three", "--health_checks", "b"]
    settings = read_settings(vars(make_parser().parse_args(argv)))
    assert (settings.port, settings.server, settings.health_checks) == (6, ("two", "three"), ("b",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"host": "toy", "port": "x"}', "setting 'port' cannot be 'x'"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_bad_configuration_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes | None, words: str
) -> None:
    config = tmp_path / "client.json"
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert bento_client.main(["--config", str(config), "status"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"bento: error: {config}: ") and words in said
    assert said.count("\n") == 1


def test_run_without_a_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bento_client.main(["--config", os.devnull, "--host", "toy", "--state-dir", str(tmp_path / "s"), "run"]) == 2
    assert "no server is set" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


# --- decisions ---


def attempt(result: str, number: int = 1, *, release: str = A, finished_s: float = NOON) -> Last:
    finished = bento_client.format_time(finished_s)
    log = log_name(finished_s, release, result)
    return Last(release, result, "a reason", None, finished, finished, number, log)


def state_after(result: str, number: int = 1, **more: Any) -> State:
    tried = attempt(result, number)
    return State(unpacked=A, tried=tried, last=tried, published="2026-11-23T10:00:00Z")._replace(**more)


CURRENT = Current(host="toy", release=A, size=10, published="2026-11-23T10:00:00Z")
QUARTER = 15 * 60


@pytest.mark.parametrize(
    ("state", "later_s", "action", "words"),
    [
        (State(), 0, Action.FETCH, "new release aaaaaaaaaaaa"),
        (State(unpacked=A), 0, Action.RETRY, "new release"),
        (state_after("ok", tried=attempt("ok", release=B), unpacked=B), 0, Action.FETCH, "new release"),
        (state_after("rolled-back", tried=attempt("rolled-back", release=B), unpacked=B), 0, Action.FETCH, "new release"),
        (state_after("ok"), 10**6, Action.NOTHING, "up to date"),
        (state_after("rolled-back"), 10**6, Action.NOTHING, "was rolled back (a reason): waiting for a new release"),
        (state_after("rollback-failed"), 10**6, Action.NOTHING, "was rolled back"),
        # nobody can tell whose fault it was that the server was out of reach: once more, a day later
        (state_after("rolled-back", doubts=1), 86399, Action.NOTHING, "was rolled back (a reason): waiting for a new release"),
        (state_after("rolled-back", doubts=1), 86400, Action.RETRY, "rolled-back before, attempt 2"),
        (state_after("rolled-back", 2, doubts=2), 10**6, Action.NOTHING, "was rolled back (a reason): waiting for a new release"),
        (state_after("rolled-back", doubts=1), -86401, Action.NOTHING, "was rolled back"),
        (state_after("rollback-failed", 2, doubts=1), 10**6, Action.NOTHING, "was rolled back"),
        (state_after("interrupted", interruptions=1), 0, Action.RETRY, "attempt 2"),
        (state_after("interrupted", 2, interruptions=2), 10**6, Action.NOTHING, "interrupted twice"),
        # a failed build: 15, 30, 60 minutes, ... 24 hours
        (state_after("build-failed", 1), QUARTER - 1, Action.NOTHING, "build-failed, next attempt in"),
        (state_after("build-failed", 1), QUARTER, Action.RETRY, "build-failed before, attempt 2"),
        (state_after("build-failed", 2), QUARTER, Action.NOTHING, "next attempt in 15min"),
        (state_after("build-failed", 2), 2 * QUARTER, Action.RETRY, "attempt 3"),
        (state_after("build-failed", 50), 86399, Action.NOTHING, "next attempt in 1s"),
        (state_after("build-failed", 50), 86400, Action.RETRY, "attempt 51"),
        # a bad moment: the first three at once
        (state_after("fetch-failed", 3, unpacked=B), 0, Action.FETCH, "attempt 4"),
        (state_after("postponed", 3), 0, Action.RETRY, "attempt 4"),
        (state_after("postponed", 4), 0, Action.NOTHING, "postponed, next attempt in 15min"),
        (state_after("postponed", 4), QUARTER, Action.RETRY, "attempt 5"),
        # what costs an activation each time is no bad moment
        (state_after("postponed", 1, costly=True), QUARTER - 1, Action.NOTHING, "postponed, next attempt in"),
        (state_after("postponed", 1, costly=True), QUARTER, Action.RETRY, "attempt 2"),
        (state_after("postponed", 3, costly=True), 4 * QUARTER - 1, Action.NOTHING, "next attempt in"),
        # an unknown result of another version of Bento is a failure like others
        (state_after("exploded", 1), 0, Action.RETRY, "exploded before"),
        # the clock was set back: a day and more of waiting says nothing
        (state_after("build-failed", 1), -86400, Action.RETRY, "attempt 2"),
        (state_after("build-failed", 1), -60, Action.NOTHING, "next attempt in 16min"),
    ],
)  # fmt: skip
def test_decide(state: State, later_s: float, action: Action, words: str) -> None:
    decided, why = decide(CURRENT, state, NOON + later_s)
    assert decided == action
    assert words in why


@pytest.mark.parametrize("result", list(Result))
def test_decide_by_force(result: Result) -> None:
    state = state_after(result, 9, interruptions=2)
    assert decide(CURRENT, state, NOON, force=True) == (Action.RETRY, "release aaaaaaaaaaaa, by force")
    assert decide(CURRENT, state._replace(unpacked=None), NOON, force=True)[0] == Action.FETCH


@pytest.mark.parametrize(
    ("published", "replica", "action"),
    [
        ("2026-11-23T09:59:59Z", True, Action.NOTHING),
        ("2026-11-23T10:00:00Z", True, Action.FETCH),
        ("2026-11-23T10:00:01Z", True, Action.FETCH),
        ("2026-11-23T09:59:59Z", False, Action.FETCH),  # the only server is right by definition
    ],
)
def test_decide_behind(published: str, replica: bool, action: Action) -> None:
    current = CURRENT._replace(release=B, published=published)
    assert decide(current, state_after("ok"), NOON, replica=replica)[0] == action
    assert decide(current, state_after("ok")._replace(published=None), NOON, replica=replica)[0] == Action.FETCH


@pytest.mark.parametrize(
    ("result", "minutes"),
    [
        ("build-failed", [15, 30, 60, 120, 240, 480, 960, 1440, 1440]),
        ("fetch-failed", [0, 0, 0, 15, 30, 60]),
        ("postponed", [0, 0, 0, 15, 30, 60]),
        ("interrupted", [0, 0, 0, 15]),
    ],
)
def test_retry_pauses(result: str, minutes: list[int]) -> None:
    assert [retry_pause_s(result, n) / 60 for n in range(1, len(minutes) + 1)] == minutes
    assert retry_pause_s(result, 10**6) == 86400


@pytest.mark.parametrize(
    ("setting", "yes", "no"),
    [
        ("never", [], [(0, 0), (12, 0)]),
        ("when-needed", [(0, 0), (12, 0), (23, 59)], []),
        ("02:00-04:30", [(2, 0), (3, 59), (4, 29)], [(1, 59), (4, 30), (14, 0)]),
        ("23:30-01:15", [(23, 30), (23, 59), (0, 0), (1, 14)], [(23, 29), (1, 15), (12, 0)]),
        ("22:00-00:00", [(22, 0), (23, 59)], [(0, 0), (21, 59)]),
        ("00:00-00:00", [], [(0, 0), (12, 0)]),
    ],
)
def test_may_reboot(setting: str, yes: list[tuple[int, int]], no: list[tuple[int, int]]) -> None:
    assert [time for time in yes + no if may_reboot(setting, *time)] == yes


# --- formats ---

GOLDEN_CURRENT = """{"format": 1, "host": "toy", "release": "RELEASE", "size": 10240,
 "published": "2026-11-23T10:15:02Z", "system": "/nix/store/x-nixos", "from_next_year": [1]}""".replace("RELEASE", A)

GOLDEN_LAST = """{"release": "RELEASE", "result": "rolled-back", "reason": "no way", "system": null, "log":
 "20261123T101502Z_aaaaaaaaaaaa_rolled-back.log", "started": "2026-11-23T10:15:00Z", "more": {},
 "finished": "2026-11-23T10:15:02Z", "attempt": 2}""".replace("RELEASE", A)

GOLDEN_REPORT = """{"format": 1, "host": "toy", "client": "1.0", "polled": "2026-11-23T10:15:02Z", "phase": "idle",
 "release": null, "system": "/nix/store/x-nixos", "needs_reboot": true, "last": LAST, "more": 1}""".replace("LAST", GOLDEN_LAST)

GOLDEN_STATE = """{"format": 1, "release": null, "system": "/nix/store/x", "previous": null, "published": null,
 "unpacked": "RELEASE", "rebooted": null, "interruptions": 1, "tried": LAST, "last": null,
 "more": 1}""".replace("LAST", GOLDEN_LAST).replace("RELEASE", A)

GOLDEN_PENDING = """{"format": 1, "release": "RELEASE", "published": "2026-11-23T10:15:02Z", "old": "/nix/store/o",
 "new": "/nix/store/n", "profile": "/nix/store/o", "step": "proving", "boot_id": "b", "token": "t",
 "started": "2026-11-23T10:15:02Z", "attempt": 1, "deadline_s": 12.5, "watchdog": null, "verdict": "", "reason": "",
 "more": 1}""".replace("RELEASE", A)

LAST = Last(A, "rolled-back", "no way", None, "2026-11-23T10:15:00Z", "2026-11-23T10:15:02Z", 2,
            "20261123T101502Z_aaaaaaaaaaaa_rolled-back.log")  # fmt: skip

PARSERS: dict[str, tuple[Callable[[bytes, str], Any], str, Any]] = {
    "current.json": (parse_current, GOLDEN_CURRENT, Current("toy", A, 10240, "2026-11-23T10:15:02Z", "/nix/store/x-nixos")),
    "status.json": (parse_report, GOLDEN_REPORT,
                    Report("toy", "1.0", "2026-11-23T10:15:02Z", "idle", None, "/nix/store/x-nixos", True, LAST)),
    "state.json": (parse_state, GOLDEN_STATE, State(system="/nix/store/x", unpacked=A, interruptions=1, tried=LAST)),
    "pending.json": (parse_pending, GOLDEN_PENDING,
                     Pending(A, "2026-11-23T10:15:02Z", "/nix/store/o", "/nix/store/n", "/nix/store/o", "activating", "b",
                             "t", "2026-11-23T10:15:02Z", 1, 12.5, switched=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
def test_golden(name: str) -> None:
    """What version 1 wrote, with fields of a later one, is read; and what we write is read again."""
    parse, text, wanted = PARSERS[name]
    assert parse(text.encode(), name) == wanted
    assert parse(bento_client.encode(wanted), name) == wanted
    assert json.loads(bento_client.encode(wanted))["format"] == 1


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b'{"format": 1, "host"', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"format": 1, "size": NaN}', "not JSON (NaN is not JSON)"),
        (b'{"format": 1, "size": -Infinity}', "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b"{}", "format None, this version of Bento knows format 1: update Bento"),
        (b'{"format": 2}', "format 2, this version of Bento knows format 1: update Bento on this machine"),
        (b'{"format": true}', "format True"),
        (b'{"format": "1"}', "format '1'"),
        (b'{"format": 1}', "is missing or malformed"),
        (b" " * 65537, "larger than 65536 bytes"),
    ],
)
def test_refused_formats(name: str, raw: bytes, words: str) -> None:
    if name == "state.json" and raw == b'{"format": 1}':  # a machine that remembers nothing
        assert parse_state(raw, name) == State()
        return
    with pytest.raises(BentoError) as caught:
        PARSERS[name][0](raw, name)
    assert str(caught.value).startswith(f"{name}: ") and words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("current.json", "host", "../etc"),
        ("current.json", "host", None),
        ("current.json", "release", "A" * 64),
        ("current.json", "release", "a" * 63),
        ("current.json", "release", A + "\n"),
        ("current.json", "size", -1),
        ("current.json", "size", 1.5),
        ("current.json", "size", True),
        ("current.json", "size", 1 << 60),
        ("current.json", "published", "2026-13-23T10:15:02Z"),
        ("current.json", "published", "yesterday"),
        ("current.json", "system", "/with a\nnewline"),
        ("current.json", "system", "relative"),
        ("status.json", "client", "1.0\x1b[2J"),
        ("status.json", "phase", "IDLE"),
        ("status.json", "needs_reboot", 0),
        ("status.json", "last", []),
        ("status.json", "system", "/a\n"),
        ("state.json", "interruptions", "1"),
        ("state.json", "tried", {"release": A}),
        ("state.json", "system", 5),
        ("pending.json", "old", ""),
        ("pending.json", "deadline_s", "soon"),
        ("pending.json", "watchdog", 1),
        ("pending.json", "attempt", None),
        ("pending.json", "step", "nonsense"),
        ("pending.json", "step", ["proving"]),
        ("pending.json", "verdict", "nonsense"),
        ("pending.json", "verdict", 1),
    ],
)
def test_malformed_fields(name: str, field: str, value: object) -> None:
    parse, text, _ = PARSERS[name]
    with pytest.raises(BentoError, match=re.escape(f"{name}: field {field!r}") if value != {"release": A} else "malformed"):
        parse(json.dumps(json.loads(text) | {field: value}).encode(), name)


def test_current_of_another_host() -> None:
    with pytest.raises(BentoError, match="it is for host 'toy', not for 'nas'"):
        parse_current(GOLDEN_CURRENT.encode(), "current.json", "nas")


# --- words ---


@pytest.mark.parametrize(
    ("text", "wanted", "passing"),
    [
        ("Host key verification failed.\r\nConnection closed", "its host key is not the known one", False),
        ("bento-t@s: Permission denied (publickey).\r\nConnection closed", "it refuses this machine's key", False),
        ("ssh: Could not resolve hostname s: Name or service not known\r\nConnection closed", "its name cannot be resolved", True),
        ("ssh: connect to host s port 22: Connection refused", "connection refused: is sshd running there", True),
        ("ssh: connect to host s port 22: Connection timed out", "no answer in time", True),
        ("ssh: connect to host s port 22: No route to host", "no route to it", True),
        ("ssh: connect to host s port 22: Network is unreachable", "no route to it: is the network up?", True),
        ("Connection timed out during banner exchange", "no answer in time", True),
        ("command-line line 0: Bad configuration option: foo", "ssh refuses an option", False),
        ("client_loop: send disconnect: Broken pipe", "the connection was lost", True),
        ("Timeout, server s not responding.", "no answer in time", True),
        ("Connection reset by 1.2.3.4 port 22", "the connection was lost", True),
        ("sftp> get a b\nsomething odd", "something odd", True),
        ("sftp> get a b\n", "sftp ended without a word", True),
    ],
)  # fmt: skip
def test_explain_ssh(text: str, wanted: str, passing: bool) -> None:
    meaning, may_pass = explain_ssh(text)
    assert meaning.startswith(wanted)
    assert may_pass is passing
    assert meaning.isprintable()


@pytest.mark.parametrize(
    ("output", "units"),
    [
        ("", []),
        ("warning: the following units failed: b.service, a.service\n", ["a.service", "b.service"]),
        ("warning: the following units failed: a.service\nx\nwarning: the following user units failed: u.service",
         ["a.service", "u.service"]),
        ("the following new units were started: c.service", []),
    ],
)  # fmt: skip
def test_failed_units(output: str, units: list[str]) -> None:
    assert failed_units(output) == units


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain", "plain"),
        ("  two\n\tlines  ", "two lines"),
        ("\x1b[31mred\x07\x7f", "[31mred"),
        ("a\u202eb\u2028c\x9bd", "a b c d"),
        ("Grüße 日本", "Grüße 日本"),
        ("x" * 400, "x" * 299 + "…"),
        ("\ud800", ""),
    ],
)
def test_one_line(text: str, wanted: str) -> None:
    assert one_line(text) == wanted


def test_log_name() -> None:
    assert log_name(NOON + 1, A, Result.ROLLED_BACK) == "20261123T120001Z_aaaaaaaaaaaa_rolled-back.log"
    assert log_name(NOON, None, Result.FETCH_FAILED) == "20261123T120000Z_000000000000_fetch-failed.log"
    for result in Result:
        assert bento_client.LOG_NAME.fullmatch(log_name(NOON, A, result))


# --- the real program: a machine, a server's directory, an administrator ---

HOST = f"toy{os.getpid()}"
SERVER = "server.example"


@cache
def make_account() -> None:
    """As root, `populate` wants the account of the host, as on a real server."""
    if os.geteuid() == 0:
        need_accounts()
        add_user(f"bento-{HOST}", "bento")


@dataclass
class Lab:
    """One server and one host. `down`: a file; while it exists, the server is down."""

    directory: Path
    machine: ToyMachine
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, directory: Path, *, state: str = "var/lib/bento", **behaviour: Any) -> "Lab":
        need("sftp")
        make_account()
        root = directory / "machine"
        settings = {
            "server": SERVER, "host": HOST, "root": str(root), "state_dir": str(root / state),
            "connect_timeout": 1, "confirm_timeout": 2, "activation_timeout": 20,
        }  # fmt: skip
        chroot = directory / "chroot" / HOST
        machine = ToyMachine.create(root, HOST, chroot=chroot, **{"client_json": settings} | behaviour)
        lab = cls(directory, machine, settings)
        lab.state.mkdir(mode=0o700, parents=True)
        (lab.state / "id_ed25519").write_text("the toy's ssh asks for none\n")
        return lab

    @property
    def state(self) -> Path:
        return Path(self.settings["state_dir"])

    @property
    def chroot(self) -> Path:
        return self.directory / "chroot" / HOST

    @property
    def config(self) -> Path:
        return self.directory / "fleet/hosts" / HOST

    @property
    def down(self) -> Path:
        return self.directory / "down"

    def file(self, name: str) -> str:
        return str(self.directory / name)

    def use_two_servers(self) -> None:
        """With known host keys, without which a list of servers is refused."""
        Path(self.file("known")).touch()
        self.settings |= {"server": ["first", "second"], "known_hosts": self.file("known")}

    def publish(self, label: str, *, flake: bool = True, settings: dict[str, Any] | None = None, **behaviour: Any) -> str:
        """Writes and publishes a configuration; the release's name. `settings` differ in the new system only."""
        client_json = self.settings | (settings or {})
        write_config(self.config, flake=flake, host=HOST, label=label, client_json=client_json, **behaviour)
        return self.populate()

    def populate(self) -> str:
        argv = ["--fleet", str(self.directory / "fleet"), "--chroot-dir", str(self.directory / "chroot"), "populate"]
        assert bento.main(argv) == 0
        return parse_current((self.chroot / "current.json").read_bytes(), "current.json", HOST).release

    def publish_raw(self, tar: bytes, *, release: str | None = None, size: int | None = None) -> str:
        """What `populate` would never publish."""
        release = release or hashlib.sha256(tar).hexdigest()
        (self.chroot / "releases" / f"{release}.tar").write_bytes(tar)
        current = Current(HOST, release, len(tar) if size is None else size, "2026-11-23T10:00:00Z")
        (self.chroot / "current.json").write_bytes(bento_client.encode(current))
        return release

    def argv(self, *words: str) -> list[str]:
        """The client, with settings from a file."""
        config = self.directory / "client.json"
        config.write_text(json.dumps(self.settings))
        return [sys.executable, *PYTHON_FLAGS, str(CLIENT), "--config", str(config), *words]

    def env(self, **more: str) -> dict[str, str]:
        return {"TOY_SERVER": SERVER, "TOY_SERVER_DOWN": str(self.down)} | more

    def client(self, *words: str, code: int = 0, **env: str) -> str:
        """Runs the client to its end, and returns what it said."""
        done = self.machine.run(*self.argv(*words), env=self.env(**env))
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def run_patched(self, patch: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Like `run`, with constants of the client's module, here `c`, changed."""
        code = f"import sys; sys.path.insert(0, {str(CLIENT.parent)!r}); import bento_client as c; {patch}; sys.exit(c.main())"
        return self.machine.run(sys.executable, "-c", code, *self.argv("run")[len(PYTHON_FLAGS) + 2 :], env=self.env(**env))

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with open(self.directory / "output", "ab") as out:
            return subprocess.Popen(
                self.argv(*words), env=self.machine.env(**self.env()), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(60)
        finally:
            kill_tree(process)

    def labels(self) -> tuple[str, str, str]:
        return self.machine.labels()

    def report(self) -> Report:
        """The report that the server has."""
        return parse_report((self.chroot / "logs/status.json").read_bytes(), "status.json")

    def phase(self) -> str:
        return self.report().phase if (self.chroot / "logs/status.json").exists() else ""

    def last(self) -> Last:
        last = self.report().last
        assert last is not None
        return last

    def logs(self) -> list[str]:
        """Names of the logs that the server has."""
        return sorted(path.name for path in (self.chroot / "logs").glob("*.log"))

    def log(self) -> str:
        return (self.chroot / "logs" / self.last().log).read_text()

    def age_attempts(self, seconds: float) -> None:
        """As if the last attempt had been so long ago."""
        path = self.state / "state.json"
        state = parse_state(path.read_bytes(), "state.json")
        assert state.tried is not None
        finished = bento_client.format_time(bento_client.parse_time(state.tried.finished) - seconds)
        path.write_bytes(bento_client.encode(state._replace(tried=state.tried._replace(finished=finished))))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab.create(tmp_path)


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(words[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills a client with everything it has started, as systemd does with a unit's processes."""
    for pid in descendants(process.pid) if process.poll() is None else ():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def tree(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Names, kinds and contents of everything below a directory."""
    found: dict[str, tuple[str, bytes]] = {}
    for path in directory.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            kind, content = "directory", b""
        else:
            kind = "program" if mode & 0o100 else "file"
            content = path.read_bytes()
        found[str(path.relative_to(directory))] = kind, content
    return found


# --- good days ---


@pytest.mark.parametrize("flake", [True, False])
def test_first_release(lab: Lab, flake: bool) -> None:
    release = lab.publish("v1", flake=flake)
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    report = lab.report()
    assert (report.release, report.phase, report.needs_reboot) == (release, "idle", False)
    assert report.system == os.path.realpath(lab.machine.profile)
    assert lab.last().result == Result.OK
    assert (lab.last().attempt, lab.last().release) == (1, release)
    assert lab.logs() == [lab.last().log]
    command = f"--flake 'path:{lab.state}/config#{HOST}'" if flake else "--no-flake -I nixos-config="
    assert command in lab.log()
    assert "--upgrade" not in lab.log()
    assert tree(lab.state / "config") == tree(lab.config)
    assert not (lab.state / "pending.json").exists()
    assert not (lab.state / "partial").exists()
    assert not list(lab.state.glob(".tmp-*"))
    assert stat.S_IMODE((lab.state / "state.json").stat().st_mode) == 0o600

    assert "up to date with release" in lab.client("run")
    assert len(lab.logs()) == 1


def test_upgraded_channels(lab: Lab) -> None:
    lab.publish("v1", flake=False)
    lab.settings["upgrade_channels"] = True
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert "unpacking 1 channels" in lab.log()


def test_unchanged_system_is_not_activated(lab: Lab) -> None:
    lab.publish("v1", pure=True)
    lab.client("run")
    assert " bento: switch-to-configuration test: /" in lab.log()
    (lab.config / "README").write_text("only for people\n")
    release = lab.populate()
    lab.client("run")
    last = lab.last()
    assert (last.release, last.result, last.reason) == (release, "ok", "nothing to activate: this system runs already")
    assert " bento: switch-to-configuration" not in lab.log()
    assert lab.report().release == release
    assert (lab.state / "config/README").exists()
    assert lab.labels() == ("v1", "v1", "v1")


def test_units_that_failed_are_named(lab: Lab) -> None:
    lab.publish("v1", switch_exit=4, failed_units=["nginx.service", "a.timer"])
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK
    assert lab.last().reason == "activated, but these units failed: a.timer, nginx.service"


def test_state_directory_with_a_space(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, state="var/lib/the state")
    lab.publish("v1")
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK


def test_two_runs_at_once(lab: Lab) -> None:
    lab.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    first = lab.start("run")
    wait_until(Path(lab.file("building")).exists)
    wait_until(lambda: lab.phase() == "building")  # it is told without waiting for the answer
    assert "another run is at work" in lab.client("run")
    Path(lab.file("go")).touch()
    assert lab.finish(first) == 0
    assert lab.labels() == ("v1", "v1", "v1")
    assert len(lab.logs()) == 1


# --- bad releases ---


def test_failed_build_leaves_the_machine_alone(lab: Lab) -> None:
    lab.publish("v1", build="fail")
    said = lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    last = lab.last()
    assert (last.result, last.attempt) == (Result.BUILD_FAILED, 1)
    assert re.match(r"nixos-rebuild build: exit 1: error: builder for .*v1.drv' failed with exit code 1", last.reason)
    assert f"bento: error: build-failed: {last.reason}" in said
    assert "make: *** [Makefile:3: toy.o] Error 1" in lab.log()
    assert lab.report().release is None

    assert re.search("build-failed, next attempt in 1[45]min", lab.client("run"))
    assert len(lab.logs()) == 1
    lab.age_attempts(15 * 60)
    lab.client("run", code=1)
    assert lab.last().attempt == 2
    assert re.search("next attempt in (30|29)min", lab.client("run"))
    lab.client("run", "--force", code=1)
    assert lab.last().attempt == 3

    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")
    assert lab.last().attempt == 1


def test_evaluation_error(lab: Lab) -> None:
    lab.publish("v1", flake=False, build="eval-error")
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().reason.endswith("error: The option `services.toy' does not exist.")


def test_endless_build(lab: Lab) -> None:
    lab.publish("v1", build="hang")
    lab.client("run", "--build-timeout", "1", code=1)
    assert lab.last().result == Result.BUILD_FAILED
    assert lab.last().reason == "nixos-rebuild build did not end within 1 s"


def test_cut_line_is_rolled_back(lab: Lab) -> None:
    release = lab.publish("v1", cut_network=True)
    said = lab.client("run", code=1)
    assert "rolled-back: new system: cannot reach server.example" in said
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.machine.network() == "up"
    assert (lab.last().result, lab.last().release) == (Result.ROLLED_BACK, release)
    assert "no route to it" in lab.last().reason

    assert "waiting for a new release" in lab.client("run")
    assert len(lab.logs()) == 1
    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")
    assert len(lab.logs()) == 2


@pytest.mark.parametrize(
    ("settings", "behaviour", "words"),
    [
        ({"server": "typo.example"}, {}, "its name cannot be resolved"),
        ({"health_checks": ["true", "exit 3"]}, {}, "health check failed (exit 3): exit 3"),
        ({}, {"switch_exit": 2}, "switch-to-configuration test: exit 2: "),
        ({}, {"switch_exit": 7}, "switch-to-configuration test: exit 7: error: activation refused with exit code 7"),
        ({}, {"broken_client": True}, "broken on purpose"),
    ],
    ids=["server", "health", "exit-2", "exit-7", "client"],
)
def test_rolled_back(lab: Lab, settings: dict[str, Any], behaviour: dict[str, Any], words: str) -> None:
    lab.publish("v1", settings=settings, **behaviour)
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.ROLLED_BACK
    assert words in lab.last().reason
    assert not (lab.state / "pending.json").exists()
    assert "waiting for a new release" in lab.client("run")


@pytest.mark.parametrize("when", ["before", "after"])
def test_endless_activation_is_rolled_back(lab: Lab, when: str) -> None:
    lab.publish("v1", switch_hang=when)
    lab.client("run", "--activation-timeout", "2", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.ROLLED_BACK
    assert lab.last().reason.startswith("switch-to-configuration test: no end in time")


def test_system_without_bento(lab: Lab) -> None:
    lab.publish("v1", no_bento=True)
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.BUILD_FAILED
    assert "would be this machine's last update: import ./utils/bento.nix" in lab.last().reason
    lab.client("run", "--force")
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK


def test_boot_loader_that_cannot_be_written(lab: Lab) -> None:
    lab.publish("v1", boot_exit=1)
    lab.client("run", code=1)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.POSTPONED
    assert "the boot loader could not be written (exit 1): Failed to install bootloader" in lab.last().reason
    assert re.search("postponed, next attempt in 1[45]min", lab.client("run"))
    lab.machine.power_cycle()
    assert lab.labels() == ("v0", "v0", "v0")


def test_profile_that_cannot_be_set(lab: Lab) -> None:
    lab.publish("v1")
    Path(lab.file("full")).touch()
    lab.client("run", code=1, TOY_NIX_ENV_FAIL=lab.file("full"))
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.POSTPONED
    assert "the system profile could not be set" in lab.last().reason
    assert re.search("postponed, next attempt in 1[45]min", lab.client("run")), "an activation each poll is no way to wait"
    lab.age_attempts(QUARTER)
    lab.client("run", TOY_NIX_ENV_FAIL=lab.file("not full"))
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().attempt == 2


def test_roll_back_that_fails_is_settled_later(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, fails_from="bad", fails_from_times=1)
    release = lab.publish("bad", cut_network=True)
    said = lab.client("run", code=1)
    assert "rollback-failed: new system: cannot reach server.example" in said
    assert lab.labels() == ("bad", "v0", "v0")
    assert (lab.state / "pending.json").exists()
    assert lab.last().result == Result.ROLLBACK_FAILED, "over the connection made before"

    assert "waiting for a new release" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.machine.network() == "up"
    assert (lab.last().result, lab.last().release) == (Result.ROLLED_BACK, release)
    assert [name.split("_")[2] for name in lab.logs()] == ["rollback-failed.log", "rolled-back.log"]
    assert not (lab.state / "pending.json").exists()


# --- by hand ---


def test_rollback_by_hand(lab: Lab) -> None:
    assert "nothing to roll back" in lab.client("rollback", code=1)
    lab.publish("v1")
    lab.client("run")
    release = lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")
    assert "rolled-back: by hand" in lab.client("rollback")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().release, lab.last().reason) == (Result.ROLLED_BACK, release, "by hand")
    assert "was rolled back (by hand)" in lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    lab.client("run", "--force")
    assert lab.labels() == ("v2", "v2", "v2")


def test_status(lab: Lab) -> None:
    assert "none of Bento's" in lab.client("status")
    release = lab.publish("v1", cut_network=True)
    lab.client("run", code=1)
    said = lab.client("status")
    assert re.search(rf"(?m)^host +{HOST}$", said)
    assert re.search(r"(?m)^release +none of Bento's$", said)
    assert re.search(rf"(?m)^last +rolled-back, release {release[:12]}, attempt 1, 20", said)
    assert re.search(r"(?m)^reason +new system: cannot reach server", said)
    release = lab.publish("v2")
    lab.client("run")
    said = lab.client("status")
    assert re.search(rf"(?m)^release +{release}$", said)
    assert re.search(rf"(?m)^system +{lab.machine.root}/nix/store/.*-v2$", said)


def test_probe(lab: Lab) -> None:
    assert "bento.py populate" in lab.client("probe", code=75)
    lab.publish("v1")
    assert "the server is reached" in lab.client("probe")
    lab.down.touch()
    assert "connection refused" in lab.client("probe", code=75)
    assert lab.labels() == ("v0", "v0", "v0")


def test_key(tmp_path: Path) -> None:
    need("ssh-keygen")
    state = tmp_path / "new" / "state"
    argv = [sys.executable, "-I", str(CLIENT), "--config", os.devnull, "--host", "toy", "--state-dir", str(state), "key"]
    first, second = (subprocess.run(argv, capture_output=True, text=True, timeout=30) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert re.fullmatch(r"ssh-ed25519 [A-Za-z0-9+/]+ bento-toy\n", first.stdout)
    assert second.stdout == first.stdout
    assert stat.S_IMODE((state / "id_ed25519").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert sorted(path.name for path in state.iterdir()) == ["id_ed25519", "id_ed25519.pub"]
    (state / "id_ed25519.pub").unlink()
    third = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert third.stdout.split()[:2] == first.stdout.split()[:2]


def test_run_without_a_key(lab: Lab) -> None:
    lab.publish("v1")
    (lab.state / "id_ed25519").unlink()
    assert "make one with 'bento-client key'" in lab.client("run", code=75)
    assert lab.labels() == ("v0", "v0", "v0")


# --- the server or the line goes away ---


def test_server_down(lab: Lab) -> None:
    lab.publish("v1")
    lab.down.touch()
    before = tree(lab.state)
    assert "cannot reach server.example: connection refused" in lab.client("run", code=75)
    assert tree(lab.state).keys() - {"lock"} == before.keys()
    assert lab.labels() == ("v0", "v0", "v0")
    lab.down.unlink()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")


def test_server_comes_back_while_the_client_waits(lab: Lab) -> None:
    lab.publish("v1")
    lab.down.touch()
    lab.settings["connect_timeout"] = 20
    process = lab.start("run")
    time.sleep(0.5)
    assert process.poll() is None
    lab.down.unlink()
    assert lab.finish(process) == 0
    assert lab.labels() == ("v1", "v1", "v1")


def test_server_down_during_the_build(lab: Lab) -> None:
    """Built, not activated; reported when the server is back, in order."""
    lab.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("building")).exists)
    lab.down.touch()
    Path(lab.file("go")).touch()
    assert lab.finish(process) == 75
    ended_s = time.time()
    assert lab.labels() == ("v0", "v0", "v0")
    assert "last       postponed" in lab.client("status")
    assert "built, but not activated, because the server went away" in lab.client("status")
    assert "outbox     1 not delivered yet" in lab.client("status")
    assert lab.logs() == []
    lab.client("run", code=75)
    assert lab.logs() == []

    lab.down.unlink()
    wait_until(lambda: int(time.time()) > int(ended_s))  # a log is named by the second
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().attempt) == (Result.OK, 2)
    assert [name.split("_")[2] for name in lab.logs()] == ["postponed.log", "ok.log"]
    assert "outbox" not in lab.client("status")


def test_server_down_during_the_proof(lab: Lab) -> None:
    """The old system cannot reach it either: the release is not to blame, and is tried again."""
    lab.publish("v1", switch_touch=lab.file("switching"), switch_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("switching")).exists)
    wait_until(lambda: lab.phase() == "activating")
    lab.down.touch()
    Path(lab.file("go")).touch()
    assert lab.finish(process) == 75
    assert lab.labels() == ("v0", "v0", "v0")
    assert "last       postponed" in lab.client("status")
    lab.down.unlink()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().attempt) == (Result.OK, 2)


def test_outbox_is_delivered_in_order(lab: Lab) -> None:
    """And the server keeps the newest twenty logs."""
    lab.publish("v1")
    outbox = lab.state / "outbox"
    outbox.mkdir()
    names = [log_name(NOON - 10**8 + number, B, "postponed") for number in range(30)]
    for name in names[10:]:
        (outbox / name).write_text(f"this is {name}\n")
    for name in names[:10]:
        (lab.chroot / "logs" / name).write_text("delivered before\n")
    (lab.chroot / "logs/notes.txt").write_text("not one of ours\n")
    lab.client("run")
    assert list(outbox.iterdir()) == []
    logs = sorted((lab.chroot / "logs").glob("*.log"))
    assert len(logs) == 20
    arrived = [path.stat().st_mtime_ns for path in logs]
    assert arrived == sorted(arrived) and arrived[0] < arrived[-1]
    assert logs[-1].name == lab.last().log
    assert logs[-2].read_text() == f"this is {names[-1]}\n"
    assert (lab.chroot / "logs/notes.txt").exists()


def test_refused_reports_are_not_the_releases_fault(lab: Lab) -> None:
    lab.publish("v1", switch_touch=lab.file("switched"))
    (lab.config / "large").write_bytes(os.urandom(2 << 20))  # this one is announced before it is fetched, too
    lab.populate()
    (lab.chroot / "logs").rename(lab.chroot / "away")
    (lab.chroot / "logs").write_text("not a directory\n")
    assert "report kept for the next run" in lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    (lab.chroot / "logs").unlink()
    (lab.chroot / "away").rename(lab.chroot / "logs")
    lab.client("run")
    assert (lab.last().result, lab.last().attempt, len(lab.logs())) == (Result.OK, 1, 1)


def fake_sftp(lab: Lab, script: str) -> str:
    """A PATH on which `sftp` is this shell script. In it, `sftp` is the toy's."""
    toy, fake = lab.machine.env()["PATH"], lab.directory / "path/sftp"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f"#!/bin/sh\nPATH={toy}\n{script}")
    fake.chmod(0o755)
    return f"{fake.parent}:{toy}"


def test_an_sftp_that_does_not_end_by_itself_is_ended(lab: Lab) -> None:
    """The first connection is left to itself while the release is built; what it still does must not come later."""
    lab.publish("v1")
    pids = lab.directory / "pids"
    lab.client("run", PATH=fake_sftp(lab, f'echo $$ >>{pids}\nsftp "$@"\ncode=$?\nsleep 300\nexit $code\n'))
    assert lab.labels() == ("v1", "v1", "v1") and (lab.last().result, lab.report().phase) == (Result.OK, "idle")
    started = pids.read_text().split()
    assert len(started) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in started)


def sftp_by_server(lab: Lab, **chroots: Path | None) -> str:
    """A PATH on which `sftp` knows several servers; the directory that each serves, or None for one that is down."""
    cases = "".join(
        f"*@{name}) {'export TOY_CHROOT=' + str(chroot) if chroot else 'export TOY_SERVER_DOWN=/'} ;;\n"
        for name, chroot in chroots.items()
    )
    return fake_sftp(lab, f'for word; do :; done\ncase $word in\n{cases}esac\nexec sftp "$@"\n')


def test_a_thousand_old_logs_do_not_hang_it(lab: Lab) -> None:
    """Nobody reads what sftp says to their removal: of too many at once, both pipes are full."""
    lab.publish("v1")
    lab.client("run")
    for number in range(2500):
        (lab.chroot / "logs" / f"20200101T{number:06d}Z_{'a' * 12}_ok.log").write_text("old\n")
    (lab.chroot / "logs" / f"20200101T000000Z_{'b' * 12}_ok.log").mkdir()
    (lab.state / "outbox" / f"20200101T000000Z_{'c' * 12}_postponed.log").write_text("waits\n")
    before = len(lab.logs())
    assert lab.finish(lab.start("run")) == 0
    assert before - 25 < len(lab.logs()) < before - 15 and list((lab.state / "outbox").iterdir()) == []


def test_a_poll_that_hangs_is_ended(lab: Lab) -> None:
    """No watchdog guards it, and as long as it holds the lock no other run can start."""
    lab.publish("v1")
    lab.client("run")
    pid = lab.directory / "pid"
    path = fake_sftp(lab, f'echo $$ >{pid}\nsed -u "/^put/q" | sftp "$@"\nexec sleep 300\n')
    done = lab.run_patched("c.POLL_LIMIT_S = 2", PATH=path)
    os.killpg(int(pid.read_text()), signal.SIGKILL)
    assert done.returncode == -signal.SIGALRM, done.stdout
    assert "up to date" in lab.client("run")
    assert not list(lab.state.glob(".tmp-*"))


def test_archive_that_outgrows_its_size_is_reported(lab: Lab) -> None:
    release = lab.publish("v1")
    os.truncate(lab.chroot / "releases" / f"{release}.tar", 6 << 30)  # sparse
    lab.client("run", code=1)
    assert (lab.last().result, len(lab.logs())) == (Result.FETCH_FAILED, 1)
    assert "more than the announced" in lab.last().reason


def test_release_that_never_arrives_does_not_hide_the_host(lab: Lab) -> None:
    """The line brings current.json, and dies of what is larger. The host polls, and its server sees that."""
    lab.publish("v1")
    lab.client("run")
    (lab.state / "outbox" / f"20200101T000000Z_{'c' * 12}_postponed.log").write_text("waits\n")
    before = (lab.chroot / "logs/status.json").stat().st_mtime_ns
    lab.publish("v2")
    cut = 'sed -u "/get releases/q" | sed -u "/get releases/d"'
    path = fake_sftp(lab, f'{cut} | sftp "$@"\necho Connection reset by peer\nexit 255\n')
    assert "the connection was lost" in lab.client("run", code=75, PATH=path)
    assert (lab.chroot / "logs/status.json").stat().st_mtime_ns > before and len(lab.logs()) == 2


def test_a_report_goes_where_its_release_came_from(lab: Lab) -> None:
    """Though another server, which has no release, answers first."""
    lab.use_two_servers()
    lab.publish("v1")
    empty = lab.directory / "empty"
    (empty / "logs").mkdir(parents=True)
    path = sftp_by_server(lab, first=empty, second=lab.chroot)
    lab.client("run", PATH=path, TOY_SERVER="")
    assert (lab.last().result, lab.report().phase, len(lab.logs())) == (Result.OK, "idle", 1)
    assert list((empty / "logs").iterdir()) == []


def test_second_server_when_the_first_is_down(lab: Lab) -> None:
    lab.use_two_servers()
    path = sftp_by_server(lab, first=None, second=lab.chroot)
    lab.publish("v1")
    lab.client("run", PATH=path, TOY_SERVER="")
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK
    said = lab.client("run", code=75, PATH=sftp_by_server(lab, first=None, second=None), TOY_SERVER="")
    assert "cannot reach first: connection refused" in said and "cannot reach second: connection refused" in said


def test_server_that_lags_behind(lab: Lab) -> None:
    """A replica with an older release never takes a host back; its newer one is taken."""
    lab.use_two_servers()
    lab.publish("v1")
    stale = lab.directory / "stale"
    shutil.copytree(lab.chroot, stale, symlinks=True)
    path = sftp_by_server(lab, first=stale, second=lab.chroot)
    lab.publish("v2")
    current = json.loads((lab.chroot / "current.json").read_text())
    (stale / "current.json").write_text(
        json.dumps(json.loads((stale / "current.json").read_text()) | {"published": "2020-01-01T00:00:00Z"})
    )
    lab.client("run", PATH=sftp_by_server(lab, first=lab.chroot, second=stale), TOY_SERVER="")
    assert lab.labels() == ("v2", "v2", "v2")
    said = lab.client("run", PATH=sftp_by_server(lab, first=stale, second=lab.chroot), TOY_SERVER="")
    assert "first is behind" in said and f"up to date with release {current['release'][:12]}" in said
    said = lab.client("run", PATH=sftp_by_server(lab, first=stale, second=None), TOY_SERVER="")
    assert "the server is behind: it publishes a release of 2020-01-01T00:00:00Z" in said
    lab.client("run", "--force", PATH=path, TOY_SERVER="")
    assert lab.labels() == ("v2", "v2", "v2")


# --- killed, unplugged ---


def test_killed_in_the_build(lab: Lab) -> None:
    lab.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("building")).exists)
    kill_tree(process)
    assert lab.labels() == ("v0", "v0", "v0")
    assert list(lab.state.glob(".tmp-*")) != []
    Path(lab.file("go")).touch()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().attempt) == (Result.OK, 1)
    assert lab.log().count("nixos-rebuild build") == 2
    assert list(lab.state.glob(".tmp-*")) == []


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power-cut"])
@pytest.mark.parametrize("where", ["switch", "proof"])
def test_killed_twice(lab: Lab, where: str, power_cut: bool) -> None:
    """Before the commit: back to the old system, tried once more, then given up."""
    reached = Path(lab.file("reached"))
    if where == "switch":
        release = lab.publish("v1", switch_touch=str(reached), switch_wait=lab.file("never"))
    else:
        check = f"touch {reached}; while ! [ -e {lab.file('never')} ]; do sleep 0.05; done"
        release = lab.publish("v1", settings={"health_checks": [check]})

    for interruptions in (1, 2):
        process = lab.start("run", "--confirm-timeout", "20")
        wait_until(reached.exists)
        kill_tree(process)
        reached.unlink()
        pending = parse_pending((lab.state / "pending.json").read_bytes(), "pending.json")
        assert (pending.step, pending.release, pending.attempt) == ("activating", release, interruptions)
        assert lab.labels() == ("v1" if where == "proof" else "v0", "v0", "v0")
        if power_cut:
            lab.machine.power_cycle()

    assert "interrupted twice: waiting for a new release" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0")
    assert not (lab.state / "pending.json").exists()
    assert (lab.last().result, lab.last().attempt) == (Result.INTERRUPTED, 2)
    how = "the machine was restarted" if power_cut else "the client was ended"
    assert lab.last().reason == f"{how} while activating"
    assert [name.split("_")[2] for name in lab.logs()] == ["interrupted.log"] * len(lab.logs())

    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power-cut"])
def test_killed_in_the_commit(lab: Lab, power_cut: bool) -> None:
    """The profile is new, the boot loader is not: finished if the new system runs, else undone."""
    lab.publish("v1", boot_touch=lab.file("committing"), boot_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("committing")).exists)
    kill_tree(process)
    assert lab.labels() == ("v1", "v1", "v0")
    if power_cut:
        lab.machine.power_cycle()
        lab.down.touch()  # so that the run ends after the recovery
        lab.client("run", code=75)
        assert lab.labels() == ("v0", "v0", "v0")
        assert not (lab.state / "pending.json").exists()
        lab.down.unlink()
    Path(lab.file("go")).touch()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().attempt) == (Result.OK, 2 if power_cut else 1)
    assert not (lab.state / "pending.json").exists()


# --- reboots ---


def test_system_that_needs_a_reboot(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, inhibitors="dbus 1")
    release = lab.publish("v1", inhibitors="dbus 2", kernel="6.13")
    lab.client("run")
    assert lab.labels() == ("v0", "v1", "v1")
    assert (lab.last().result, lab.last().release) == (Result.OK, release)
    assert lab.last().reason == "it cannot go live: it takes effect at the next reboot, and is proven then"
    assert lab.report().needs_reboot
    assert f"release {release[:12]} waits for the next boot" in lab.client("run")
    assert lab.report().needs_reboot and lab.report().waiting_for_boot == release
    assert not (lab.state / "pending.json").exists(), "no attempt is under way"

    lab.machine.power_cycle()
    assert lab.labels() == ("v1", "v1", "v1")
    assert "up to date" in lab.client("run")
    assert not lab.report().needs_reboot and lab.report().waiting_for_boot is None
    assert lab.report().release == release
    assert not (lab.state / "pending.json").exists()


def test_kernel_that_breaks_the_network(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path, inhibitors="dbus 1")
    lab.publish("v1", inhibitors="dbus 2", kernel="broken")
    lab.client("run")
    lab.machine.power_cycle()
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.machine.network() == "down"
    for _ in range(bento_client.PATIENT_PROOFS - 1):
        assert "tried again at the next run" in lab.client("run", code=75)
        assert lab.labels() == ("v1", "v1", "v1"), "it may be the server's fault"
    assert "the old system takes effect at the next reboot" in lab.client("run", code=75)
    assert lab.labels()[1:] == ("v0", "v0")
    lab.machine.power_cycle()
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.machine.network() == "up"
    lab.publish("v2", inhibitors="dbus 1")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")


# --- what is refused ---


def archive(*members: tarfile.TarInfo, content: bytes = b"content\n") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.pax_headers = {name.replace("_", "."): value for name, value in pax.items()}
    return info


FLAKE_NIX = member("flake.nix")
GOOD_TAR = archive(FLAKE_NIX)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A machine that has deployed v1. For tests after which it still runs just that."""
    lab = Lab.create(tmp_path_factory.mktemp("settled"))
    lab.publish("v1")
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    return lab


def check_refused(lab: Lab, words: str, release: str | None) -> None:
    before = tree(lab.state / "config")
    said = lab.client("run", code=1)
    assert re.search(words, said), said
    assert re.search(r"(?m)^bento: error: ", said)
    assert tree(lab.state / "config") == before
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().release) == (Result.FETCH_FAILED, release)
    assert re.search(words, lab.last().reason)
    assert lab.last().log in lab.logs()
    left = {path.name for path in lab.state.iterdir()}
    assert left <= {"config", "id_ed25519", "lock", "outbox", "result", "state.json"}


@pytest.mark.parametrize(
    ("tar", "words"),
    [
        (archive(FLAKE_NIX, member("/tmp/bento-absolute")), "unsafe name '/tmp/bento-absolute'"),
        (archive(FLAKE_NIX, member("../bento-dots")), r"unsafe name '\.\./bento-dots'"),
        (archive(FLAKE_NIX, member("a/../../bento-dots")), "unsafe name"),
        (archive(FLAKE_NIX, member("./a")), "unsafe name"),
        (archive(FLAKE_NIX, member("link", tarfile.SYMTYPE, "/etc")), "'link', which is neither a file nor a directory"),
        (archive(FLAKE_NIX, member("link", tarfile.SYMTYPE, "."), member("link/x")), "'link', which is neither"),
        (archive(FLAKE_NIX, member("hard", tarfile.LNKTYPE, "flake.nix")), "'hard', which is neither"),
        (archive(FLAKE_NIX, member("null", tarfile.CHRTYPE)), "'null', which is neither"),
        (archive(FLAKE_NIX, member("disk", tarfile.BLKTYPE)), "'disk', which is neither"),
        (archive(FLAKE_NIX, member("fifo", tarfile.FIFOTYPE)), "'fifo', which is neither"),
        (archive(FLAKE_NIX, member("sparse", GNU_sparse_size="1000000000", GNU_sparse_map="0,8")), "'sparse', which is"),
        (archive(FLAKE_NIX, FLAKE_NIX), "no valid archive: File exists"),
        (archive(FLAKE_NIX, member("flake.nix/x")), "no valid archive: Not a directory"),
        (archive(FLAKE_NIX, member("no/parent")), "no valid archive: No such file or directory"),
        (archive(FLAKE_NIX, member("x" * 300)), "File name too long"),
        (archive(FLAKE_NIX, member("\x1b[2Jbell\x07\n", tarfile.FIFOTYPE)), r"has '\\x1b\[2Jbell\\x07\\n', which is neither"),
        (b"this is no tar at all\n" * 100, "no valid archive"),
        (GOOD_TAR[:700], "no valid archive"),
        (b"", "no valid archive"),
    ],
    ids=["absolute", "dots", "inner-dots", "dot", "symlink", "through-symlink", "hardlink", "char", "block", "fifo", "sparse",
         "duplicate", "file-as-directory", "no-parent", "long-name", "escape", "no-tar", "short-tar", "empty"],
)  # fmt: skip
def test_hostile_archive(settled: Lab, tar: bytes, words: str) -> None:
    check_refused(settled, words, settled.publish_raw(tar))
    assert not Path("/tmp/bento-absolute").exists()
    assert not (settled.state / "bento-dots").exists() and not (settled.state.parent / "bento-dots").exists()


def test_wrong_checksum(settled: Lab) -> None:
    digest = hashlib.sha256(GOOD_TAR).hexdigest()[:12]
    check_refused(settled, f"its SHA-256 is {digest}…: damaged", settled.publish_raw(GOOD_TAR, release="c" * 64))


def test_truncated_archive(settled: Lab) -> None:
    release = hashlib.sha256(GOOD_TAR).hexdigest()
    settled.publish_raw(GOOD_TAR[:5000], release=release, size=len(GOOD_TAR))
    check_refused(settled, f"5000 bytes came, {len(GOOD_TAR)} were announced", release)


def test_archive_larger_than_announced(settled: Lab) -> None:
    tar = archive(FLAKE_NIX, content=os.urandom(100_000))
    check_refused(settled, "the announced 5000 bytes", settled.publish_raw(tar, size=5000))


def test_archive_beyond_all_limits(settled: Lab) -> None:
    release = settled.publish_raw(GOOD_TAR, release="d" * 64, size=5 << 30)
    check_refused(settled, "more than the limit of 4294967296", release)


def test_archive_that_is_not_there(settled: Lab) -> None:
    release = settled.publish_raw(GOOD_TAR, release="e" * 64)
    (settled.chroot / "releases" / f"{release}.tar").unlink()
    check_refused(settled, "not found", release)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, f"nothing is published for {HOST} there: run 'bento.py populate {HOST}'"),
        (b"", "not JSON"),
        (b'{"format": 1, "host": "t', "not JSON"),
        (b"<html>", "not JSON"),
        (b'{"format": 1, "size": NaN}', "NaN is not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b'{"format": 9, "host": "toy"}', "format 9, this version of Bento knows format 1: update Bento"),
        (bento_client.encode(Current("another", A, 1, "2026-11-23T10:00:00Z")), f"it is for host 'another', not for '{HOST}'"),
        (bento_client.encode(Current("../x", A, 1, "2026-11-23T10:00:00Z")), "field 'host' is missing or malformed"),
        (b" " * 100_000, "65536 bytes"),
    ],
    ids=["none", "empty", "cut", "html", "nan", "deep", "newer", "other-host", "bad-host", "huge"],
)  # fmt: skip
def test_unusable_current(settled: Lab, raw: bytes | None, words: str) -> None:
    if raw is None:
        (settled.chroot / "current.json").unlink()
    else:
        (settled.chroot / "current.json").write_bytes(raw)
    check_refused(settled, re.escape(words), None)
    count = len(settled.logs())
    settled.client("run", code=1)
    assert len(settled.logs()) == count, "said once, not at each poll"


def test_good_release_after_bad_ones(settled: Lab) -> None:
    settled.publish_raw(b"bad")
    settled.client("run", code=1)
    settled.populate()
    settled.client("run")
    assert (settled.last().result, settled.last().reason) == (Result.OK, "nothing to activate: this system runs already")
    assert settled.labels() == ("v1", "v1", "v1")


def test_glitch_makes_no_rolled_back_release_good(lab: Lab) -> None:
    lab.publish("v1", cut_network=True)
    lab.client("run", code=1)
    current = lab.chroot / "current.json"
    good = current.read_bytes()
    current.write_bytes(good[:40])
    lab.client("run", code=1)
    assert lab.last().result == Result.FETCH_FAILED
    current.write_bytes(good)
    assert "was rolled back" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0")
    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")


@pytest.mark.parametrize("name", ["state.json", "pending.json"])
@pytest.mark.parametrize("content", [b"", b'{"format": 1, "release": 7}'])
def test_damaged_journal_is_set_aside(settled: Lab, name: str, content: bytes) -> None:
    settled.populate()
    (settled.state / name).write_bytes(content)
    said = settled.client("run")
    assert f"set aside as {name}.damaged" in said
    assert (settled.state / f"{name}.damaged").read_bytes() == content
    (settled.state / f"{name}.damaged").unlink()
    assert settled.labels() == ("v1", "v1", "v1")
    assert settled.last().result == Result.OK
    assert "damaged" not in settled.client("run")


# --- what arrives ---


def test_download_goes_on_where_it_stopped(lab: Lab) -> None:
    release = lab.publish("v1")
    tar = (lab.chroot / "releases" / f"{release}.tar").read_bytes()
    (lab.state / "partial").mkdir()
    (lab.state / "partial" / f"{release}.tar").write_bytes(tar[: len(tar) // 2])
    (lab.state / "partial" / f"{B}.tar").write_bytes(b"of an older release")
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert tree(lab.state / "config") == tree(lab.config)


BIG = 1 << 20


@pytest.fixture
def heavy(lab: Lab) -> Lab:
    """A machine that runs a release with large files."""
    lab.publish("v1")
    for number in range(3):
        (lab.config / f"big{number}").write_bytes(os.urandom(BIG + 1000 * number))
    lab.populate()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    return lab


def parts(lab: Lab) -> list[tuple[str, int]]:
    return [(p.sha256, p.size) for p in parse_current((lab.chroot / "current.json").read_bytes(), "current.json").parts]


def test_large_files_that_are_here_are_not_fetched_again(heavy: Lab) -> None:
    kept = (heavy.config / "big0").read_bytes()
    (heavy.config / "big1").write_bytes(os.urandom(BIG))
    (heavy.config / "big2").rename(heavy.config / "elsewhere")
    (heavy.config / "also").write_bytes(kept)
    release = heavy.publish("v2")
    there = heavy.chroot / "releases" / f"{release}.parts"
    for path in (heavy.config / "big0", heavy.config / "elsewhere"):
        (there / hashlib.sha256(path.read_bytes()).hexdigest()).unlink()
    (heavy.chroot / "releases" / f"{release}.tar").unlink()
    heavy.client("run")
    assert heavy.labels() == ("v2", "v2", "v2")
    assert tree(heavy.state / "config") == tree(heavy.config)
    assert not (heavy.state / "partial").exists()


def test_a_large_file_that_changed_here_is_fetched(heavy: Lab) -> None:
    ours = heavy.state / "config/big0"
    ours.write_bytes(bytes(ours.stat().st_size))
    heavy.publish("v2")
    heavy.client("run")
    assert heavy.labels() == ("v2", "v2", "v2")
    assert tree(heavy.state / "config") == tree(heavy.config)


def test_a_damaged_part_is_met_with_the_whole_archive(heavy: Lab) -> None:
    release = heavy.publish("v2")
    changed = heavy.chroot / "releases" / f"{release}.parts" / parts(heavy)[-1][0]
    changed.write_bytes(bytes(changed.stat().st_size))
    assert "damaged" in heavy.client("run", code=1)
    assert heavy.labels() == ("v1", "v1", "v1")
    assert heavy.last().result == Result.FETCH_FAILED
    heavy.client("run")
    assert heavy.labels() == ("v2", "v2", "v2")
    assert heavy.last().attempt == 2


@pytest.mark.parametrize("keep", [0, 1, 2000, BIG, BIG + 40_000, 3 * BIG])
def test_parts_go_on_where_it_stopped(heavy: Lab, keep: int) -> None:
    """Cut short anywhere: in a part from here, in one that came, while one is coming."""
    (heavy.config / "big1").write_bytes(os.urandom(BIG))
    release = heavy.publish("v2")
    archive = (heavy.chroot / "releases" / f"{release}.tar").read_bytes()
    changed = hashlib.sha256((heavy.config / "big1").read_bytes()).hexdigest()
    (heavy.state / "partial").mkdir()
    (heavy.state / "partial" / f"{release}.tar").write_bytes(archive[:keep])
    (heavy.state / "partial" / changed).write_bytes((heavy.config / "big1").read_bytes()[: keep // 2])
    heavy.client("run")
    assert heavy.labels() == ("v2", "v2", "v2")
    assert heavy.last().attempt == 1
    assert tree(heavy.state / "config") == tree(heavy.config)


@pytest.mark.parametrize(
    "part", [7, None, {}, {"sha256": "../../etc/passwd", "size": 1}, {"sha256": A, "size": -1}, {"sha256": A, "size": 1.5}]
)
def test_malformed_parts(heavy: Lab, part: object) -> None:
    path = heavy.chroot / "current.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"parts": [part]}))
    assert "current.json: field" in heavy.client("run", code=1)
    assert heavy.labels() == ("v1", "v1", "v1")


def test_parts_of_another_size(heavy: Lab) -> None:
    path = heavy.chroot / "current.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"parts": [{"sha256": A, "size": 1}]}))
    assert "do not add up" in heavy.client("run", code=1)


def test_odd_file_names(lab: Lab) -> None:
    lab.publish("v1")
    names = [
        "with space", "it's", 'a "quote"', "new\nline", "tab\t", "-rf", "--help", "*", "[a-z]?", "{a,b}", "$HOME", "`id`", "a;b",
        "back\\slash", "#hash", "~x", "x" * 200, "Grüße", "日本語", "e\u0301", " ", "...", "a|b", "%s", ".hidden",
    ]  # fmt: skip
    for name in names:
        (lab.config / name).write_text(f"content of {name}")
        (lab.config / f"{name[:90]}.d" / name / "deep").mkdir(parents=True)
        (lab.config / f"{name[:90]}.d" / name / "deep" / name).write_text(name)
    (lab.config / "empty file").touch()
    (lab.config / "empty directory").mkdir()
    (lab.config / "program").write_text("#!/bin/sh\n")
    (lab.config / "program").chmod(0o700)
    (lab.config / "secret").write_text("mode 0600")
    (lab.config / "secret").chmod(0o600)
    (lab.config / "bytes").write_bytes(bytes(range(256)))
    lab.populate()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    arrived = tree(lab.state / "config")
    assert arrived == tree(lab.config)
    assert arrived["program"][0] == "program" and arrived["secret"][0] == "file"
    assert arrived["empty directory"][0] == "directory" and arrived["empty file"] == ("file", b"")
    assert ("x" * 200) in arrived


PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, "KiB")
sys.exit(code)
"""


def test_huge_file_in_little_memory(lab: Lab) -> None:
    """300 MB. The build fails early, for the toy's own reads it whole."""
    lab.publish("v1", build="eval-error")
    with open(lab.config / "huge", "wb") as file:
        file.write(b"begin")
        file.truncate(300_000_000)
    lab.populate()
    done = lab.machine.run(sys.executable, "-I", "-c", PEAK, *lab.argv("run"), env=lab.env())
    assert done.returncode == 1, done.stdout
    assert lab.last().result == Result.BUILD_FAILED
    huge = lab.state / "config/huge"
    assert huge.stat().st_size == 300_000_000
    assert bento_client.hash_file(huge) == bento_client.hash_file(lab.config / "huge")
    found = re.search(r"peak (\d+) KiB", done.stdout)
    assert found is not None
    assert 5_000 < int(found[1]) < 64_000
    shutil.rmtree(lab.directory)  # pytest keeps the directories of three runs


# --- alone ---

# What NixOS' python3Minimal has not.
MISSING = ["zlib", "gzip", "bz2", "lzma", "ctypes", "ssl", "sqlite3", "pyexpat", "readline", "curses"]
MINIMAL = f"""
import sys
missing = {MISSING!r}
sys.modules.update(dict.fromkeys(missing + ["_" + name for name in missing] + ["_hashlib", "_tkinter", "_dbm", "_gdbm"]))
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_alone_with_a_minimal_python(lab: Lab) -> None:
    """One file in an empty directory."""
    lab.publish("v1")
    alone = lab.directory / "alone"
    alone.mkdir()
    shutil.copyfile(CLIENT, alone / "bento_client.py")
    _, *words = lab.argv("run")[len(PYTHON_FLAGS) + 1 :]
    argv = [sys.executable, *PYTHON_FLAGS, "-c", MINIMAL, str(alone / "bento_client.py"), *words]
    done = lab.machine.run(*argv, cwd=alone, env=lab.env())
    assert done.returncode == 0, done.stdout
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK
    assert [path.name for path in alone.iterdir()] == ["bento_client.py"]


@pytest.mark.parametrize("name", MISSING)
def test_minimal_python_is_minimal(name: str) -> None:
    """That the test above would notice."""
    argv = [sys.executable, "-I", "-c", MINIMAL, os.devnull]
    argv[3] = MINIMAL.replace("import runpy", f"import {name}")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr
