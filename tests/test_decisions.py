"""The client's decisions, in tables."""

from typing import Any

import pytest
from toylab import NOON, QUARTER, A, B, attempt

from bento_client import Current, Result, State, decide, is_odd, may_reboot, retry_pause_s


def state_after(result: str, number: int = 1, **more: Any) -> State:
    tried = attempt(result, number)
    return State(unpacked=A, tried=tried, last=tried, published="2026-11-23T10:00:00Z")._replace(**more)


CURRENT = Current(host="toy", release=A, size=10, published="2026-11-23T10:00:00Z")


@pytest.mark.parametrize(
    ("state", "later_s", "wanted", "words"),
    [
        (State(), 0, True, "new release aaaaaaaaaaaa"),
        (state_after("ok", tried=attempt("ok", release=B), unpacked=B), 0, True, "new release"),
        (state_after("rolled-back", tried=attempt("rolled-back", release=B), unpacked=B), 0, True, "new release"),
        (state_after("ok"), 10**6, False, "up to date"),
        (state_after("rolled-back"), 10**6, False, "was rolled back (a reason): waiting for a new release"),
        (state_after("rollback-failed"), 10**6, False, "was rolled back"),
        # nobody can tell whose fault it was that the server was out of reach: once more, a day later
        (state_after("rolled-back", doubts=1), 86399, False, "was rolled back (a reason): waiting for a new release"),
        (state_after("rolled-back", doubts=1), 86400, True, "rolled-back before, attempt 2"),
        (state_after("rolled-back", 2, doubts=2), 10**6, False, "was rolled back (a reason): waiting for a new release"),
        (state_after("rolled-back", doubts=1), -86401, False, "was rolled back"),
        (state_after("rollback-failed", 2, doubts=1), 10**6, False, "was rolled back"),
        (state_after("interrupted", interruptions=1), 0, True, "attempt 2"),
        (state_after("interrupted", 2, interruptions=2), 10**6, False, "interrupted twice"),
        # a failed build: 15, 30, 60 minutes, ... 24 hours
        (state_after("build-failed", 1), QUARTER - 1, False, "build-failed, next attempt in"),
        (state_after("build-failed", 1), QUARTER, True, "build-failed before, attempt 2"),
        (state_after("build-failed", 2), QUARTER, False, "next attempt in 15min"),
        (state_after("build-failed", 2), 2 * QUARTER, True, "attempt 3"),
        (state_after("build-failed", 50), 86399, False, "next attempt in 1s"),
        (state_after("build-failed", 50), 86400, True, "attempt 51"),
        # a bad moment: the first three at once
        (state_after("fetch-failed", 3, unpacked=B), 0, True, "attempt 4"),
        (state_after("postponed", 3), 0, True, "attempt 4"),
        (state_after("postponed", 4), 0, False, "postponed, next attempt in 15min"),
        (state_after("postponed", 4), QUARTER, True, "attempt 5"),
        # what costs an activation each time is no bad moment
        (state_after("postponed", 1, costly=True), QUARTER - 1, False, "postponed, next attempt in"),
        (state_after("postponed", 1, costly=True), QUARTER, True, "attempt 2"),
        (state_after("postponed", 3, costly=True), 4 * QUARTER - 1, False, "next attempt in"),
        # an unknown result of another version of Bento is a failure like others
        (state_after("exploded", 1), 0, True, "exploded before"),
        # the clock was set back: a day and more of waiting says nothing
        (state_after("build-failed", 1), -86400, True, "attempt 2"),
        (state_after("build-failed", 1), -60, False, "next attempt in 16min"),
    ],
)  # fmt: skip
def test_decide(state: State, later_s: float, wanted: bool, words: str) -> None:
    decided, why = decide(CURRENT, state, NOON + later_s)
    assert decided is wanted
    assert words in why


@pytest.mark.parametrize("result", list(Result))
def test_decide_by_force(result: Result) -> None:
    state = state_after(result, 9, interruptions=2)
    assert decide(CURRENT, state, NOON, force=True) == (True, "release aaaaaaaaaaaa, by force")


@pytest.mark.parametrize(
    ("published", "replica", "wanted"),
    [
        ("2026-11-23T09:59:59Z", True, False),
        ("2026-11-23T10:00:00Z", True, True),
        ("2026-11-23T09:59:59Z", False, True),  # the only server is right by definition
    ],
)
def test_decide_behind(published: str, replica: bool, wanted: bool) -> None:
    current = CURRENT._replace(release=B, published=published)
    assert decide(current, state_after("ok"), NOON, replica=replica)[0] == wanted


BEFORE, SEEN = "2026-11-23T09:59:59Z", "2026-11-23T10:00:00Z"
IN_A_DAY, LATER = "2026-11-24T12:00:00Z", "2026-11-24T12:00:01Z"  # clocks do not differ by more than a day


@pytest.mark.parametrize(
    ("published", "seen", "signer", "odd"),
    [
        (SEEN, None, None, False),
        (SEEN, SEEN, None, False),
        (BEFORE, SEEN, None, True),
        (BEFORE, SEEN, "SHA256:x", False),  # its serial says it
        (BEFORE, "2040-01-01T00:00:00Z", None, False),  # that other server's clock was wrong
        (BEFORE, IN_A_DAY, None, True),
        (IN_A_DAY, SEEN, None, False),
        (LATER, SEEN, None, True),
        (LATER, None, "SHA256:x", True),
    ],
)
def test_another_server_is_asked_first(published: str, seen: str | None, signer: str | None, odd: bool) -> None:
    assert is_odd(CURRENT._replace(published=published, signer=signer), seen, NOON) == odd


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
