"""The client's decisions, in tables."""

from typing import Any

import pytest
from toylab import NOON, QUARTER, A, B, attempt

from bento_client import (
    Cost,
    Current,
    Pinned,
    Result,
    Signed,
    State,
    Vow,
    age,
    decide,
    format_signed,
    format_time,
    may_reboot,
    pause_s,
)

DAY = 86400


def state_after(result: str, number: int = 1, wait_s: float | None = None, **more: Any) -> State:
    tried, not_before = attempt(result, number), None if wait_s is None else format_time(NOON + wait_s)
    state = State(unpacked=A, tried=tried, last=tried, published="2026-11-23T10:00:00Z", not_before=not_before)
    return state._replace(**more)


CURRENT = Current(host="toy", release=A, size=10, published="2026-11-23T10:00:00Z")


@pytest.mark.parametrize(
    ("state", "later_s", "wanted", "words"),
    [
        (State(), 0, True, "new release aaaaaaaaaaaa"),
        (state_after("ok", tried=attempt("ok", release=B), unpacked=B), 0, True, "new release"),
        (state_after("rolled-back", tried=attempt("rolled-back", release=B), unpacked=B), 0, True, "new release"),
        (state_after("ok"), 10**6, False, "up to date"),
        # whatever came of it: not before a time, which is written when it ends; nothing to wait for is the next poll
        (state_after("postponed"), 0, True, "postponed before, attempt 2"),
        (state_after("interrupted", 2, doubts=2), 0, True, "attempt 3"),
        (state_after("rolled-back", wait_s=DAY, doubts=1), DAY - 1, False, "was rolled back (a reason), next attempt in 1s"),
        (state_after("rolled-back", wait_s=DAY, doubts=2), DAY, True, "rolled-back before, attempt 2"),
        (state_after("build-failed", wait_s=QUARTER), 0, False, "build-failed, next attempt in 15min"),
        # after the third verdict, for good
        (state_after("rolled-back", 3, wait_s=DAY, doubts=3), 10**6, False, "was rolled back (a reason): waiting for a new release"),
        (state_after("interrupted", 3, doubts=3), 0, False, "or 'bento.py populate --again'"),
        # ... or until somebody publishes it again
        (state_after("rolled-back", 3, doubts=3, published="2026-11-23T09:00:00Z"), 0, True, "published again"),
        (state_after("build-failed", wait_s=DAY, published="2026-11-23T09:00:00Z"), 0, True, "published again"),
        (state_after("rolled-back", 3, doubts=3, published="2026-11-23T09:00:00Z", pinned=Pinned(())), 0, False, "waiting"),
        # an unknown result of another version of Bento is a failure like others; so is what 1.1 wrote
        (state_after("exploded", 1), 0, True, "exploded before"),
        # a clock that was a year ahead when it was written down: a day and more of waiting says nothing
        (state_after("rolled-back", wait_s=366 * DAY, doubts=1), 0, True, "attempt 2"),
    ],
)  # fmt: skip
def test_decide(state: State, later_s: float, wanted: bool, words: str) -> None:
    decided, why = decide(CURRENT, state, NOON + later_s)
    assert decided is wanted
    assert words in why


@pytest.mark.parametrize("result", list(Result))
def test_decide_by_force(result: Result) -> None:
    state = state_after(result, 9, wait_s=DAY, doubts=9, published="2026-11-23T12:00:00Z")
    assert decide(CURRENT, state, NOON, force=True) == (True, "release aaaaaaaaaaaa, by force")


@pytest.mark.parametrize(("published", "wanted"), [("2026-11-23T09:59:59Z", False), ("2026-11-23T10:00:00Z", True)])
def test_decide_behind(published: str, wanted: bool) -> None:
    """Of one server, too: it may have been restored from a backup."""
    assert decide(CURRENT._replace(release=B, published=published), state_after("ok"), NOON)[0] == wanted


BEFORE, SEEN = "2026-11-23T09:59:59Z", "2026-11-23T10:00:00Z"
IN_A_DAY, LATER = "2026-11-24T12:00:00Z", "2026-11-24T12:00:01Z"  # clocks do not differ by more than a day


@pytest.mark.parametrize(
    ("published", "newest"),
    [
        ([SEEN, BEFORE], SEEN),
        ([BEFORE, SEEN, IN_A_DAY], IN_A_DAY),
        ([LATER, SEEN], SEEN),  # its clock is wrong
        ([LATER], LATER),
    ],
)
def test_the_newest_of_what_several_servers_publish(published: list[str], newest: str) -> None:
    assert max((CURRENT._replace(published=each) for each in published), key=lambda each: age(each, NOON)).published == newest


def test_of_what_is_signed_the_serial_says_which_is_the_newest() -> None:
    old, new = (
        CURRENT._replace(published=published, signer="SHA256:x", vow=Vow(format_signed(Signed("f" * 32, serial, LATER, "a" * 64)), "", ""))
        for published, serial in ((IN_A_DAY, 5), (BEFORE, 6))
    )
    assert age(old, NOON) < age(new, NOON)


@pytest.mark.parametrize(
    ("result", "cost", "minutes"),
    [
        ("build-failed", Cost.WORK, [0, 15, 30, 60, 120, 240, 480, 960, 1440, 1440]),
        ("postponed", Cost.WORK, [15, 30, 60, 120, 240, 480, 960, 1440, 1440]),
        ("postponed", Cost.POLL, [0] * 9),
        ("fetch-failed", Cost.POLL, [0] * 9),
        ("rolled-back", Cost.VERDICT, [1440, 1440, 1440]),
        ("interrupted", Cost.VERDICT, [0, 0, 0]),
    ],
)
def test_pauses(result: str, cost: Cost, minutes: list[int]) -> None:
    state, found, now_s = State(), list[float](), NOON
    for _ in minutes:
        wait_s = pause_s(result, cost, state)
        state = state_after(result, tried=attempt(result, finished_s=now_s))
        state = state._replace(not_before=format_time(now_s + wait_s) if wait_s else None)
        found, now_s = [*found, wait_s / 60], now_s + wait_s
    assert found == minutes


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
