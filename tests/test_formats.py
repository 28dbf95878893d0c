"""The formats of the files that both sides read, and the words for what went wrong."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from toylab import NOON, A

import bento_client
from bento_client import (
    BentoError,
    Current,
    Last,
    Pending,
    Report,
    Result,
    State,
    explain_ssh,
    failed_units,
    log_name,
    one_line,
    parse_current,
    parse_pending,
    parse_report,
    parse_state,
)

# --- formats ---

GOLDEN_CURRENT = """{"format": 1, "host": "toy", "release": "RELEASE", "size": 10240,
 "published": "2026-11-23T10:15:02Z", "system": "/nix/store/x-nixos", "from_next_year": [1]}""".replace("RELEASE", A)
GOLDEN_LAST = """{"release": "RELEASE", "result": "rolled-back", "reason": "no way", "system": null, "log":
 "20261123T101502Z_aaaaaaaaaaaa_rolled-back.log", "started": "2026-11-23T10:15:00Z", "more": {},
 "finished": "2026-11-23T10:15:02Z", "attempt": 2}""".replace("RELEASE", A)
GOLDEN_REPORT = """{"format": 1, "host": "toy", "client": "1.0", "polled": "2026-11-23T10:15:02Z", "phase": "idle",
 "release": null, "system": "/nix/store/x-nixos", "needs_reboot": true, "last": LAST, "more": 1}""".replace("LAST", GOLDEN_LAST)
GOLDEN_STATE = """{"format": 1, "release": null, "system": "/nix/store/x", "previous": null, "published": null,
 "unpacked": "RELEASE", "rebooted": null, "doubts": 1, "tried": LAST, "last": null,
 "more": 1}""".replace("LAST", GOLDEN_LAST).replace("RELEASE", A)
GOLDEN_PENDING = """{"format": 1, "release": "RELEASE", "published": "2026-11-23T10:15:02Z", "old": "/nix/store/o",
 "new": "/nix/store/n", "profile": "/nix/store/o", "step": "activating", "boot_id": "b", "token": "t",
 "started": "2026-11-23T10:15:02Z", "attempt": 1, "deadline_s": 12.5, "watchdog": null, "verdict": "", "reason": "", "switched": true,
 "more": 1}""".replace("RELEASE", A)
LAST = Last(A, "rolled-back", "no way", None, "2026-11-23T10:15:00Z", "2026-11-23T10:15:02Z", 2,
            "20261123T101502Z_aaaaaaaaaaaa_rolled-back.log")  # fmt: skip
PARSERS: dict[str, tuple[Callable[[bytes, str], Any], str, Any]] = {
    "current.json": (parse_current, GOLDEN_CURRENT, Current("toy", A, 10240, "2026-11-23T10:15:02Z", "/nix/store/x-nixos")),
    "status.json": (parse_report, GOLDEN_REPORT,
                    Report("toy", "1.0", "2026-11-23T10:15:02Z", "idle", None, "/nix/store/x-nixos", True, LAST)),
    "state.json": (parse_state, GOLDEN_STATE, State(system="/nix/store/x", unpacked=A, doubts=1, tried=LAST)),
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
        ("state.json", "doubts", "1"),
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
