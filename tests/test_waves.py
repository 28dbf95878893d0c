"""Waves: whom a roll-out holds, and why, over days of a simulated clock, with reports as the client writes them.

The clock is in the past: no file can have come later than the real one says."""

import itertools
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fleet import Ran, Site
from toynixos import need

import bento
import bento_client as client
from bento import Found
from bento_client import BentoError, Current, Last, Phase, Report, Result, format_time

HOUR_S, DAY_S = 3600, 86400
NOW_S = 1_790_000_000.0
OLD, NEW, OTHER = "0" * 64, "1" * 64, "2" * 64
WAVES = """\
# Who goes first.
nas @2h
office-* @1d

kiosk-*   # on a Tuesday
desk-* printer till
"""
NAMES = (
    "nas",
    *(f"office-{n}" for n in range(5)),
    *(f"kiosk-{n:02}" for n in range(14)),
    *(f"desk-{n:02}" for n in range(18)),
    "printer", "till",
)  # fmt: skip
SIZES = (1, 5, 14, 20)


# --- the file ---

HOSTS = ("a1", "a2", "b1", "b2", "c")


@pytest.mark.parametrize(
    ("text", "waves"),
    [
        ("", []),
        ("# nobody yet\n\n", []),
        ("c\n", [("c", 0), ("a1 a2 b1 b2", 0)]),
        ("c\na*\n", [("c", 0), ("a1 a2", 0), ("b1 b2", 0)]),
        ("c @2h\na? @90min\n*", [("c", 7200), ("a1 a2", 5400), ("b1 b2", 0)]),
        ("@1d b1 c # two\n[ab]1 @0s\n", [("b1 c", DAY_S), ("a1", 0), ("a2 b2", 0)]),
        ("*1\na1 @30m\n*", [("a1 b1", 0), ("", 1800), ("a2 b2 c", 0)]),
        ("[!a]*\r\na1\r\n", [("b1 b2 c", 0), ("a1", 0), ("a2", 0)]),
    ],
)
def test_who_is_in_which_wave(text: str, waves: list[tuple[str, float]]) -> None:
    assert bento.parse_waves(text, HOSTS)[0] == [bento.Wave(tuple(names.split()), soak_s) for names, soak_s in waves]


def test_some_may_fail_and_some_are_gone() -> None:
    waves, warnings, fits = bento.parse_waves("c !2 @1h\nnas a1 old-*\nnas !1\n", HOSTS, {"nas", "old-*"})
    assert [(wave.hosts, wave.soak_s, wave.may_fail) for wave in waves] == [
        (("c",), 3600, 2), (("a1",), 0, 0), ((), 0, 1), (("a2", "b1", "b2"), 0, 0)
    ]  # fmt: skip
    assert fits == {"c", "a1", "nas", "old-*"}
    assert warnings == [f"hosts/waves:{line}: {word}: no such host any more: take it out" for line, word in ((2, "nas"), (2, "old-*"), (3, "nas"))]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("c\n\na1 nos\n", "hosts/waves:3: nos: no such host"),
        ("kiosk-*\n", "hosts/waves:1: kiosk-*: no such host"),
        ("[a1\n", "hosts/waves:1: [a1: no such host"),
        ("hosts/c\n", "hosts/waves:1: hosts/c: no such host"),
        ("C\n", "hosts/waves:1: C: no such host"),
        ("c, a1\n", "hosts/waves:1: c,: no such host"),
        ("\x1b[2J\n", "hosts/waves:1: [2J: no such host"),
        ("c @2\n", "hosts/waves:1: @2: a wave has one soak time, as @90min, @2h or @1d"),
        ("c @2w\n", "hosts/waves:1: @2w: a wave has one soak time, as @90min, @2h or @1d"),
        ("c @-1h\n", "hosts/waves:1: @-1h: a wave has one soak time, as @90min, @2h or @1d"),
        ("c @\n", "hosts/waves:1: @: a wave has one soak time, as @90min, @2h or @1d"),
        ("c @999999d\n", "hosts/waves:1: @999999d: a wave has one soak time, as @90min, @2h or @1d"),
        ("a1 !\n", "hosts/waves:1: !: a wave has one number of hosts that may fail, as !2"),
        ("a1 !1 !2\n", "hosts/waves:1: !2: a wave has one number of hosts that may fail, as !2"),
        ("a1\nc @1h @2h\n", "hosts/waves:2: @2h: a wave has one soak time, as @90min, @2h or @1d"),
        ("c\n@2h # for whom?\n", "hosts/waves:2: a soak time goes with the hosts of its wave, and there are none in this line"),
    ],
)
def test_a_wave_file_with_a_mistake(text: str, error: str) -> None:
    with pytest.raises(BentoError) as raised:
        bento.parse_waves(text, HOSTS)
    assert str(raised.value) == error


def test_a_pattern_of_thousands_of_brackets_is_none() -> None:
    began_s = time.process_time()
    with pytest.raises(BentoError, match="no such host"):
        bento.parse_waves("[" * 30_000, HOSTS)
    assert time.process_time() - began_s < 1


# --- who is held ---


class Case(NamedTuple):
    """A host of a wave, and what the newest commit gives for it."""

    standing: bento.Standing
    wanted: str


def wants(release: str) -> Current | None:
    return Current("x", release, 1, format_time(NOW_S)) if release else None


def standing(
    state: str, *, wanted: str = NEW, age_s: float = 300, ran_s: float = 7200, absent: bool = False, ok: tuple[str, ...] = (),
    **changes: Any,
) -> Case:  # fmt: skip
    """A host in a state, at NOW_S. What is published for it is NEW, unless its state begins with `old-` or is `none`. `ok`:
    units that failed before, too."""
    release = OLD if state.startswith("old-") else NEW
    current = None if state == "none" else Current("x", release, 1, format_time(NOW_S - 5 * DAY_S))
    if state in ("new", "old-new", "none"):
        return Case(bento.Standing(Found(current, None, None, "")), wanted)
    plain = state.removeprefix("old-")
    result = {"rolled-back": "rolled-back", "failing": "build-failed"}.get(plain, plain if plain in bento.PASSING else "ok")
    when = format_time(NOW_S - age_s)
    last = Last(OTHER if state == "pending" else release, result, "", "/s", when, when, 1, f"20260921T132640Z_{'1' * 12}_ok.log")
    running = release if result == "ok" and state not in ("pending", "waiting") else OTHER
    phase = {"building": Phase.BUILDING, "left": Phase.LEFT}.get(state, Phase.IDLE)
    report = Report("x", "1.1", when, phase, running, "/s", state == "waiting", last)._replace(**changes)
    runs = (bento.Run(running, "/s", NOW_S - age_s - ran_s, ok),)
    return Case(bento.Standing(Found(current, report, NOW_S - age_s, ""), runs, absent), wanted)


GONE = 3 * HOUR_S
DONE = standing("runs")
DECISIONS: list[tuple[str, Sequence[Case], Sequence[str]]] = [
    # the hosts of the first wave, and whom the second waits for
    ("done", [DONE], []),
    ("all done", [DONE, DONE], []),
    ("it has to get it", [standing("old-runs")], ["pending"]),
    ("it has got it", [standing("pending")], ["pending"]),
    ("it builds", [standing("building")], ["building"]),
    ("it waits for its reboot", [standing("waiting")], ["waiting"]),
    ("it failed", [standing("failing")], ["failing"]),
    ("it is tried again", [standing("postponed"), DONE], ["postponed"]),
    ("it could not be fetched", [standing("fetch-failed")], ["fetch-failed"]),
    ("it rolled back", [standing("rolled-back")], ["rolled-back"]),
    ("it failed an older one, and gets this one", [standing("old-rolled-back")], ["pending"]),
    ("units failed", [standing("runs", failed_units=("nginx.service",))], ["failed units"]),
    ("units that failed before, too", [standing("runs", failed_units=("nginx.service",), ok=("nginx.service",))], []),
    ("not for long enough", [standing("runs", ran_s=2400)], ["runs it 40min of 2h"]),
    ("the time does not go on while it is silent", [standing("runs", ran_s=7100, age_s=HOUR_S)], ["runs it 2.0h of 2h"]),
    ("nothing is published for it yet", [standing("none"), DONE], []),
    ("what hosts/ has cannot be published", [standing("runs", wanted="")], ["not published"]),
    ("off, and nobody else there", [standing("old-runs", age_s=GONE)], ["offline"]),
    ("it ran it, and fell silent", [standing("runs", age_s=GONE)], ["offline"]),
    ("off, and somebody else is there", [standing("old-runs", age_s=GONE), DONE], []),
    ("off, and somebody else is not done", [standing("old-runs", age_s=GONE), standing("pending")], ["", "pending"]),
    ("off, but it rolled back before", [standing("rolled-back", age_s=GONE), DONE], ["rolled-back"]),
    ("it began it, and fell silent", [standing("building", age_s=GONE), DONE], ["silent since it began"]),
    ("off, and cannot be published", [standing("runs", wanted="", age_s=GONE), DONE], []),
    ("away, with an excuse", [standing("old-runs", absent=True), DONE], []),
    ("paused", [standing("old-runs", paused_until=format_time(NOW_S + DAY_S)), DONE], []),
    ("paused, and nobody else", [standing("pending", paused_until=format_time(NOW_S + DAY_S))], ["paused"]),
    ("paused, and runs it", [standing("runs", paused_until=format_time(NOW_S + DAY_S))], []),
    ("never there", [standing("new"), DONE], []),
    ("never there, with an older one", [standing("old-new"), DONE], []),
    ("nobody was ever there", [standing("new"), standing("old-new")], ["new", "new"]),
    ("it left", [standing("left"), DONE], []),
    ("left, and nobody else", [standing("left")], ["left"]),
    ("nobody knows", [Case(bento.Standing(Found(wants(NEW), None, None, "logs/status.json: not JSON")), NEW), DONE], ["unreadable"]),
    ("one of many", [DONE, standing("building"), standing("rolled-back"), DONE], ["", "building", "rolled-back"]),
]  # fmt: skip


def decide(waves: Sequence[bento.Wave], cases: Mapping[str, Case]) -> list[bento.Hold]:
    """Who is held, of a commit that is the first."""
    standings = {name: case.standing for name, case in cases.items()}
    candidates = bento.add_candidate([], {name: wants(case.wanted) for name, case in cases.items()}, standings, NOW_S)

    def blockers(wave: int, index: int) -> tuple[tuple[str, str], ...]:
        return bento.find_blockers(waves[wave], index, candidates, standings, NOW_S)

    advanced = bento.advance(candidates, waves, blockers, NOW_S)
    chosen = {name: bento.choose(name, n, advanced, standings[name]) for n, wave in enumerate(waves) for name in wave.hosts}
    return bento.find_holds(advanced, waves, chosen, standings, blockers)


@pytest.mark.parametrize(("first", "whys"), [case[1:] for case in DECISIONS], ids=[case[0] for case in DECISIONS])
def test_whom_a_wave_waits_for(first: Sequence[Case], whys: Sequence[str]) -> None:
    hosts = {f"a{number}": each for number, each in enumerate(first)}
    behind = {"same": DONE, "fresh": standing("none"), "later": standing("old-runs"), "broken": standing("old-runs", wanted="")}
    holds = decide([bento.Wave(tuple(hosts), 7200), bento.Wave(tuple(behind), 0)], hosts | behind)
    expected = {f"a{number}": why for number, why in enumerate(whys) if why}
    assert {host: why for hold in holds for host, why in hold.blockers} == expected
    for hold in holds:
        assert [why in bento.FAILED for _, why in hold.blockers] == sorted((w in bento.FAILED for _, w in hold.blockers), reverse=True)
    # Who has nothing yet, or the same, or what cannot be published, is not held.
    assert [host for hold in holds for host in hold.hosts] == (["later"] if expected else [])


@pytest.mark.parametrize(("may_fail", "failed", "holds"), [(0, 1, True), (1, 1, False), (1, 2, True), (2, 2, False), (9, 4, True)])
def test_some_of_a_wave_may_fail_and_never_all(may_fail: int, failed: int, holds: bool) -> None:
    first = {f"a{n}": standing("rolled-back") if n < failed else DONE for n in range(4)}
    waves = [bento.Wave(tuple(first), 7200, may_fail), bento.Wave(("later",), 0)]
    assert bool(decide(waves, first | {"later": standing("old-runs")})) == holds


def test_every_earlier_wave_has_to_be_done() -> None:
    """All combinations of three waves: held is who has another release and a wave before that is not done."""
    kinds = {"done": DONE, "changed": standing("old-runs"), "failed": standing("rolled-back"), "off": standing("old-runs", age_s=GONE)}
    waves = [bento.Wave((f"a{n}", f"b{n}"), 0) for n in range(3)]
    for found in itertools.product(kinds, repeat=6):
        hosts = dict(zip((name for wave in waves for name in wave.hosts), found, strict=True))
        holds = decide(waves, {name: kinds[kind] for name, kind in hosts.items()})
        good = [
            {hosts[name] for name in wave.hosts} <= {"done", "off"} and any(hosts[name] == "done" for name in wave.hosts)
            for wave in waves
        ]
        changed = {name for name, kind in hosts.items() if kind in ("changed", "off")}
        held = {name for hold in holds for name in hold.hosts}
        assert held == {name for n, wave in enumerate(waves) for name in wave.hosts if name in changed and not all(good[:n])}
        first = next((wave.hosts for wave, is_good in zip(waves, good, strict=True) if not is_good), ())
        assert {host for hold in holds for host, _ in hold.blockers} <= set(first)


# --- forty hosts ---


class Clock:
    def __init__(self) -> None:
        self.now_s = time.time() // DAY_S * DAY_S - 30 * DAY_S

    def __call__(self) -> float:
        return self.now_s


class Days:
    """A fleet that polls, with a timer that runs `populate`. `off`: hosts that do not poll; `bad`: what becomes of the
    release that is published now, where it is not taken."""

    def __init__(self, site: Site, clock: Clock) -> None:
        self.site, self.clock = site, clock
        self.off: set[str] = set()
        self.bad: dict[str, Result] = {}
        self.last: dict[str, Last] = {}
        self.running: dict[str, str] = {}
        self.ran: Ran = Ran(0, "", "")

    def write(self, content: str, names: Sequence[str] = NAMES) -> None:
        for name in names:
            self.site.host(name, {"configuration.nix": f"{{ }} # {name}: {content}\n"})

    def begin(self, waves: str = WAVES) -> None:
        """All hosts run their first release, and the waves come after that."""
        self.write("first")
        self.populate()
        self.tick()
        (self.site.fleet / "hosts/waves").write_text(waves)

    def poll(self, name: str) -> None:
        """What the client leaves after a run: the log of an attempt, and its report."""
        logs = self.site.chroots / name / "logs"
        current, last = self.site.current(name), self.last.get(name)
        if last is None or last.release != current.release:
            result, when = self.bad.get(name, Result.OK), format_time(self.clock.now_s)
            log = client.log_name(self.clock.now_s, current.release, result)
            last = Last(current.release, result, "it said so", f"/nix/store/{current.release}", when, when, 1, log)
            self.last[name] = last
            if result == Result.OK:
                self.running[name] = current.release
            (logs / log).write_text("bento: done\n")
            self.date(logs / log)
        system = f"/nix/store/{self.running.get(name, 'installed')}"
        report = Report(
            name, client.VERSION, format_time(self.clock.now_s), Phase.IDLE, self.running.get(name), system, False, last
        )
        (logs / "status.json").write_bytes(client.encode(report))
        self.date(logs / "status.json")

    def date(self, path: Path) -> None:
        os.utime(path, (self.clock.now_s, self.clock.now_s))

    def populate(self, *arguments: str) -> Ran:
        self.ran = self.site.run("populate", *arguments)
        return self.ran

    def tick(self, hours: float = 1, names: Sequence[str] = ()) -> Ran:
        """Some time passes, then all hosts poll, and the timer runs."""
        self.clock.now_s += hours * HOUR_S
        for name in names or NAMES:
            if name not in self.off:
                self.poll(name)
        return self.populate()

    @property
    def published(self) -> dict[str, str]:
        return {name: self.site.current(name).release for name in NAMES}

    def changed(self, before: Mapping[str, str]) -> tuple[int, ...]:
        """How many hosts of each wave have another release than before."""
        got = {name for name, release in self.published.items() if release != before[name]}
        ends = list(itertools.accumulate(SIZES))
        return tuple(len(got & set(NAMES[end - size : end])) for size, end in zip(SIZES, ends, strict=True))

    def status(self) -> dict[str, dict[str, Any]]:
        return {row["host"]: row for row in json.loads(self.site.run("status", "--json").out)["hosts"]}

    @property
    def rollout(self) -> bento.Rollout:
        return bento.read_rollout(self.site.chroots, self.clock.now_s)


@pytest.fixture
def days(site: Site, monkeypatch: pytest.MonkeyPatch) -> Days:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return Days(site, clock)


# The hours at which the timer runs: those at which something may happen, and some at which nothing may.
HOURS = (1, 2, 3, 4, 16, 27, 28, 29, 30)


def follow(days: Days, before: Mapping[str, str]) -> list[tuple[int, tuple[int, ...]]]:
    """When, in hours, how many hosts of each wave had got something new."""
    found = [(0, days.changed(before))]
    for earlier, hour in itertools.pairwise((0, *HOURS)):
        assert days.tick(hour - earlier).code == 0, days.ran.err
        if (now := days.changed(before)) != found[-1][1]:
            found.append((hour, now))
    return found


# The canary reports after an hour and runs it for two; the offices are told then, report an hour later, and run it for a
# day; then a wave an hour.
GOOD = [(0, (1, 0, 0, 0)), (3, (1, 5, 0, 0)), (28, (1, 5, 14, 0)), (29, (1, 5, 14, 20))]


def test_a_good_release_goes_through_in_days(days: Days) -> None:
    days.begin()
    assert days.populate().out == "40 hosts: 0 published, 40 unchanged, 0 failed\n"
    before = days.published
    days.write("second")
    ran = days.populate()
    assert (ran.code, ran.errors) == (0, [])
    assert ran.out.splitlines()[1:] == [
        "39 hosts: held: wait for nas (pending)",
        "40 hosts: 1 published, 0 unchanged, 39 held, 0 failed",
    ]
    assert days.tick().out.splitlines()[0] == "39 hosts: held: wait for nas (runs it 0s of 2h)"
    days.clock.now_s -= HOUR_S  # as if nobody had asked
    assert follow(days, before) == GOOD
    assert days.ran.out == "40 hosts: 0 published, 40 unchanged, 0 failed\n"
    assert (days.rollout.holds, days.rollout.line) == ((), "")
    assert {row["state"] for row in days.status().values()} == {"up-to-date"}


def test_whatever_becomes_of_our_notes_it_goes_on(days: Days) -> None:
    """A kill, a full disk, a restored backup: the hosts' logs say when they came."""
    days.begin()
    before, dice = days.published, random.Random(15)
    days.write("second")
    days.populate()
    found, notes = [(0, days.changed(before))], days.site.chroots / ".rollout.json"
    for earlier, hour in itertools.pairwise((0, *HOURS)):
        harm = dice.choice(["", "{", '{"format": 1}', "[]", "gone", '{"waves": 3}'])
        (days.site.chroots / ".tmp-1-a").write_text("cut short")
        notes.unlink() if harm == "gone" else notes.write_text(harm)
        assert days.site.run("status").code == 0
        days.tick(hour - earlier)
        if (now := days.changed(before)) != found[-1][1]:
            found.append((hour, now))
    assert found == GOOD
    assert not list(days.site.chroots.glob(".tmp-*"))


def test_without_logs_the_first_report_that_was_seen_counts(days: Days) -> None:
    days.begin()
    before = days.published
    days.write("second")
    days.populate()
    for hours, got in ((1, 0), (1, 0), (1, 5)):
        days.clock.now_s += hours * HOUR_S
        days.poll("nas")
        for log in (days.site.chroots / "nas/logs").glob("*.log"):
            log.unlink()
        days.populate()
        assert days.changed(before) == (1, got, 0, 0)


def test_no_clock_of_a_hosts_shortens_the_time(days: Days) -> None:
    """A host says that it has run the release for a year, and dates its files back."""
    days.begin()
    before = days.published
    days.write("second")
    days.populate()
    days.clock.now_s += HOUR_S
    days.poll("nas")
    report = json.loads((days.site.chroots / "nas/logs/status.json").read_bytes())
    report["last"]["finished"] = report["last"]["started"] = "2020-01-01T00:00:00Z"
    (days.site.chroots / "nas/logs/status.json").write_text(json.dumps(report))
    days.date(days.site.chroots / "nas/logs/status.json")
    os.utime(days.site.chroots / "nas/logs" / report["last"]["log"], (1, 1))
    days.populate()
    # Not from before the release was there.
    assert days.ran.out.splitlines()[0] == "39 hosts: held: wait for nas (runs it 60min of 2h)"
    assert days.changed(before) == (1, 0, 0, 0)


def test_a_canary_that_rolls_back_stops_it(days: Days) -> None:
    days.begin()
    before = days.published
    days.write("bad")
    days.bad["nas"] = Result.ROLLED_BACK
    began_s = days.clock.now_s
    assert days.populate().code == 0
    for _ in range(5):
        ran = days.tick(6)
        assert (ran.code, days.changed(before)) == (1, (1, 0, 0, 0))
    assert ran.out.splitlines() == [
        "39 hosts: held: wait for nas (rolled-back)",
        "40 hosts: 0 published, 1 unchanged, 39 held, 0 failed",
    ]
    assert ran.errors == [
        "bento: error: nas: rolled-back: this stops the roll-out, until a release mends it: see 'bento.py log'"
    ]
    rows = days.status()
    assert rows.pop("nas")["state"] == "rolled-back"
    assert {row["state"] for row in rows.values()} == {"held"}
    assert {row["held"] for row in rows.values()} == {"held 30h: wait for nas (rolled-back)"}
    assert {each.since_s for each in days.rollout.holds} == {began_s}
    table = days.site.run("status").out.splitlines()
    assert table[0].endswith(": wave 1 of 4, 0 of 40 hosts, stopped by nas (rolled-back)")
    assert "held" in table[3] and table[3].endswith("  held 30h: wait for nas (rolled-back)")
    assert table[-1] == "40 hosts: 39 held, 1 rolled-back"
    assert 'bento_hosts{state="held"} 39' in days.site.run("status", "--prometheus").out
    assert '<tr class="held"><td>desk-00<td><b>‖ held</b>' in days.site.run("status", "--html").out.replace("&#8214;", "‖")

    del days.bad["nas"]
    days.write("mended")
    assert days.populate().code == 0
    assert follow(days, before)[1:] == GOOD[1:]
    days.bad["till"] = Result.ROLLED_BACK
    days.write("worse", ["till"])
    days.populate()
    assert (days.tick().code, days.status()["till"]["state"]) == (0, "rolled-back"), "behind the last wave, nobody waits"


def test_one_host_or_all_whatever_the_waves_say(days: Days) -> None:
    days.begin()
    before = days.published
    days.write("second")
    days.populate()
    assert days.status()["till"]["state"] == "held"
    ran = days.populate("till")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "1 host: 1 published, 0 unchanged, 0 failed")
    assert days.changed(before) == (1, 0, 0, 1)
    assert [days.status()[name]["state"] for name in ("till", "printer")] == ["pending", "held"]
    ran = days.populate("--now")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "40 hosts: 38 published, 2 unchanged, 0 failed")
    assert {row["state"] for row in days.status().values()} == {"pending"}
    assert not days.rollout.candidates


def test_a_canary_that_is_off(days: Days) -> None:
    """The only host of its wave has to be there; of two, one is enough, and the other gets it when it comes back."""
    days.begin()
    before = days.published
    days.off.add("nas")
    days.write("second")
    days.populate()
    for hours in range(6, 36, 6):
        ran = days.tick(6)
        assert (ran.code, days.changed(before)) == (int(hours > 26), (1, 0, 0, 0))
    assert ran.out.splitlines()[0] == "39 hosts: held: wait for nas (offline)"
    assert ran.errors[0].endswith(": the roll-out stands still for 28h, 39 hosts wait for nas (offline)")
    ran = days.site.run("status")
    assert ran.code == 1 and "the roll-out stands still for 28h, 39 hosts wait for nas (offline)" in ran.err
    (days.site.fleet / "hosts/waves").write_text(WAVES.replace("nas", "nas till"))
    assert days.tick().out.splitlines()[-2] == "38 hosts: held: wait for till (pending)"
    for _ in range(3):
        days.tick()
    assert days.changed(before) == (1, 5, 0, 1)
    days.off.remove("nas")
    days.bad["nas"] = Result.ROLLED_BACK
    assert days.tick().code == 1
    assert days.ran.out.splitlines()[0] == "33 hosts: held: wait for nas (rolled-back)"


def test_a_second_release_while_the_first_is_on_its_way(days: Days) -> None:
    """It begins with the first wave again. Who is held goes from the old one to the newest."""
    days.begin()
    before = days.published
    days.write("second")
    days.populate()
    for _ in range(4):
        days.tick()
    second = days.published
    assert days.changed(before) == (1, 5, 0, 0)
    days.write("third")
    days.populate()
    assert days.changed(second) == (1, 0, 0, 0)
    found = follow(days, second)
    assert [got for _, got in found] == [got for _, got in GOOD]
    # Whoever waits for the second gets it meanwhile: the third takes no time from it.
    assert [hour for hour, _ in found] == [0, 3, 27, 28]
    # Held is since when the first one came.
    assert days.status()["till"]["state"] == "up-to-date"


def test_only_what_changes_waits(days: Days) -> None:
    """The waves before run what hosts/ has for them: nobody waits for them."""
    days.begin()
    days.tick(25)
    days.write("second", ["till", "kiosk-03"])
    ran = days.populate()
    assert (ran.code, ran.out.splitlines()[1:]) == (0, [
        "1 host: held: wait for kiosk-03 (pending)",
        "40 hosts: 1 published, 38 unchanged, 1 held, 0 failed",
    ])  # fmt: skip
    assert "1 host: held" not in days.tick().out


@pytest.mark.parametrize("waves", ["nas\nofice-*\n", "nas @2x\n", "nas\nnas2\n"])
def test_a_mistake_in_the_wave_file_publishes_nothing(days: Days, waves: str) -> None:
    days.begin(waves)
    days.write("second")
    before = days.published
    ran = days.populate()
    assert (ran.code, ran.out, days.published) == (1, "", before)
    (error,) = ran.errors
    assert error.startswith(f"bento: error: hosts/waves:{1 + waves[:-1].count(chr(10))}: ")
    assert days.populate("--dry-run").code == 1
    # What does not ask does not mind.
    assert days.populate("till").code == 0 and days.populate("--now").code == 0


def test_a_host_that_moves(days: Days) -> None:
    """By where it is now: what is published is not taken back, and who goes first is waited for."""
    days.begin()
    before = days.published
    days.write("second")
    days.populate()
    (days.site.fleet / "hosts/waves").write_text(WAVES.replace("nas @2h", "till @2h").replace("desk-*", "nas"))
    ran = days.tick()
    assert ran.out.splitlines()[-2] == "38 hosts: held: wait for till (pending)"
    assert days.changed(before) == (1, 0, 0, 1)
    for _ in range(3):
        days.tick()
    assert days.changed(before) == (1, 5, 0, 1)
    # The one that is held becomes the first: it does not wait for itself.
    (days.site.fleet / "hosts/waves").write_text("printer\n*\n")
    days.tick()
    assert days.changed(before) == (1, 5, 0, 2)
    days.tick()
    assert days.changed(before) == SIZES


def test_a_new_host_never_waits(days: Days) -> None:
    days.begin()
    days.write("second")
    days.off.add("nas")
    days.populate()
    days.site.host("novel")
    ran = days.populate()
    assert ran.out.splitlines()[0].startswith("novel: published ")
    # Nor is one waited for that has never been there.
    (days.site.fleet / "hosts/waves").write_text("novel nas\n*\n")
    assert days.populate().out.splitlines()[0] == "39 hosts: held: wait for nas (pending)"


def test_hosts_that_share_a_tree(days: Days) -> None:
    shared = days.site.fleet / "shared"
    shared.mkdir()
    (days.site.fleet / "hosts").rmdir()
    (days.site.fleet / "hosts").mkdir()
    for name in NAMES:
        (days.site.fleet / "hosts" / name).symlink_to("../shared")
    (shared / "configuration.nix").write_text("{ }\n")
    days.populate()
    days.tick()
    (days.site.fleet / "hosts/waves").write_text(WAVES)
    before = days.published
    assert len(set(before.values())) == 1
    (shared / "configuration.nix").write_text("{ } # second\n")
    days.populate()
    assert follow(days, before) == GOOD
    assert len(set(days.published.values())) == 1


def test_a_fleet_whose_releases_are_signed(days: Days, tmp_path: Path) -> None:
    """What is not signed is told at once, wherever it is; what is signed anew without a change waits for nobody."""
    key = tmp_path / "admin"
    subprocess.run([need("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)

    def sign() -> None:
        ran = days.site.run("sign", "--key", str(key))
        assert ran.code == 0, ran.err

    days.write("first")
    sign()
    days.populate()
    days.tick()
    (days.site.fleet / "hosts/waves").write_text(WAVES)
    before = days.published
    days.write("second", ["nas", "till"])
    ran = days.populate()
    assert (ran.code, len(ran.errors), days.published) == (1, 2, before)
    assert all("not signed: hosts/" in error for error in ran.errors)
    assert ran.out == "40 hosts: 0 published, 38 unchanged, 2 failed\n"
    days.write("second")
    days.clock.now_s += 1
    sign()
    assert days.populate().code == 0
    assert days.changed(before) == (1, 0, 0, 0)
    vow = days.site.current("till").vow
    assert vow is not None
    serial = client.parse_signed(vow.text, "").serial
    assert days.site.current("till").release == client.parse_leaf(vow.leaf, "").release != days.rollout.candidates[-1].release("till")
    assert follow(days, before) == GOOD
    vow = days.site.current("till").vow
    assert vow is not None and client.parse_signed(vow.text, "").serial > serial


def test_a_dry_run_says_whom_it_would_hold(days: Days) -> None:
    days.begin()
    days.write("second")
    before = days.published
    notes = days.rollout
    ran = days.populate("--dry-run")
    assert ran.out.splitlines()[1:] == [
        "39 hosts: held: wait for nas (pending)",
        "40 hosts: 1 would be published, 0 unchanged, 39 held, 0 failed",
    ]
    assert ran.out.startswith("nas: would publish ")
    assert (days.published, days.rollout) == (before, notes)


def test_a_line_of_json_a_host(days: Days) -> None:
    days.begin()
    days.write("second")
    lines = [json.loads(line) for line in days.populate("--json").out.splitlines()]
    held = {line["host"]: line for line in lines if line["result"] == "held"}
    assert len(lines) == 40 and len(held) == 39
    assert held["till"] == {
        "host": "till", "result": "held", "release": days.rollout.candidates[-1].release("till"),
        "since": format_time(days.clock.now_s), "waits_for": [{"host": "nas", "why": "pending"}],
    }  # fmt: skip


def test_what_fails_here_holds_the_others(days: Days) -> None:
    """The canary's configuration cannot be published: it is told once, and nobody goes before it."""
    days.begin()
    days.write("second")
    key = days.site.fleet / "hosts/nas.pub"
    key.write_text("no key\n")
    ran = days.populate()
    assert (ran.code, ran.out.splitlines()[0]) == (1, "39 hosts: held: wait for nas (not published)")
    key.unlink()
    (days.site.fleet / "hosts/nas/configuration.nix").unlink()
    ran = days.populate()
    assert ran.errors == ["bento: error: nas: hosts/nas: neither flake.nix nor configuration.nix in it"]
    assert (ran.code, ran.out.splitlines()) == (1, [
        "39 hosts: held: wait for nas (not published)",
        "40 hosts: 0 published, 0 unchanged, 39 held, 1 failed",
    ])  # fmt: skip
    # The same of what goes wrong later on the way.
    days.write("third")
    (days.site.chroots / "nas/releases").rename(days.site.chroots / "nas/kept")
    (days.site.chroots / "nas/releases").touch()
    ran = days.populate()
    assert (ran.code, len(ran.errors)) == (1, 1)
    assert ran.out.splitlines()[0] == "39 hosts: held: wait for nas (not published)"
    assert days.rollout.holds[0].reason == "wait for nas (not published)"


def test_what_comes_while_it_is_at_work_waits(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build takes hours, and a push comes meanwhile: what is read is what was there when it began."""
    days.begin("nas\n*\n")
    days.tick()
    before = days.published
    days.write("second", ["office-0"])
    advance = bento.advance

    def push(*given: Any) -> Any:
        days.write("third, for all", ["nas", "office-0", "till"])
        return advance(*given)

    monkeypatch.setattr(bento, "advance", push)
    days.populate()
    assert {name for name, release in days.published.items() if release != before[name]} == {"office-0"}
    monkeypatch.setattr(bento, "advance", advance)
    days.populate()
    assert days.rollout.candidates[-1].release("office-0") != days.published["office-0"]


def test_the_file_is_no_host(days: Days) -> None:
    hosts = days.site.fleet / "hosts"
    days.begin("nas\n*\n")
    assert "waves" not in days.status()
    (hosts / "waves").rename(hosts.parent / "order")
    (hosts / "waves").symlink_to("../order")
    days.write("second")
    ran = days.populate()
    assert (ran.code, ran.out.splitlines()[-2]) == (0, "39 hosts: held: wait for nas (pending)"), ran.err
    # A link that leads nowhere is not nobody's wish.
    (hosts.parent / "order").unlink()
    before = days.published
    ran = days.populate()
    assert (ran.code, days.published) == (1, before)
    assert ran.errors[0].startswith("bento: error: hosts/waves: cannot be read: ")
    (hosts / "waves").unlink()
    assert days.site.run("add", "waves").code == 2
    # Without it nobody waits; and who is called so already stays a host.
    days.site.host("waves")
    assert days.populate().out.splitlines()[-1] == "41 hosts: 40 published, 1 unchanged, 0 failed"


# --- a roll-out with a memory ---


def test_a_commit_a_day_starves_nobody(days: Days) -> None:
    """Canaries for a day, and something new each day: everybody else follows at the distance of the soak."""
    days.begin("nas @1d\n")
    seen: list[str] = []
    for day in range(5):
        days.write(f"day {day}")
        days.populate()
        for _ in range(2):
            assert days.tick(12).code == 0, days.ran.err
        seen.append(days.published["till"])
    assert len(set(seen)) >= 4, "a release a day"
    kept = {path.stem for path in (days.site.chroots / ".store").glob("*.tar")}
    assert days.rollout.releases <= kept and len(days.rollout.candidates) <= 3
    till = client.parse_current((days.site.chroots / "till/current.json").read_bytes(), "", "till")
    assert (days.site.chroots / f"till/releases/{till.release}.tar").stat().st_size == till.size


def test_no_more_candidates_than_there_may_be() -> None:
    """The oldest that somebody waits for stays, and those that a newer one has passed go."""
    many = [bento.Candidate(float(n), str(n), {}, 1) for n in range(90)]
    kept = bento.thin_out(many, 2)
    assert len(kept) == bento.MAX_CANDIDATES and (kept[0].name, kept[-1].name) == ("0", "89")
    assert [each.name for each in bento.thin_out([*many[:7], many[7]._replace(reached=2), *many[8:10]], 2)] == ["7", "8", "9"]


def test_a_verdict_stops_what_came_before_and_a_newer_commit_is_the_next(days: Days) -> None:
    days.begin("nas @1d\n")
    before = days.published
    days.write("good so far")
    days.populate()
    days.tick(20)
    days.bad["nas"] = Result.ROLLED_BACK
    days.write("bad")
    days.populate()
    for _ in range(4):
        days.tick(6)
    assert days.published["till"] == before["till"] and days.ran.code == 1
    assert days.site.run("status").out.splitlines()[0].endswith("wave 1 of 2, 1 of 40 hosts, stopped by nas (rolled-back)")
    del days.bad["nas"]
    days.write("mended")
    days.populate()
    days.tick(1)
    mended = days.rollout.candidates[-1].release("till")
    days.tick(25)
    assert days.published["till"] == mended


def test_a_clock_that_was_a_year_ahead_once(days: Days) -> None:
    days.begin("nas @2h\n")
    days.write("second")
    days.clock.now_s += 365 * DAY_S
    days.populate()
    days.clock.now_s -= 365 * DAY_S
    for _ in range(3):
        days.tick()
    assert days.published["till"] == days.rollout.candidates[-1].release("till")


def test_a_host_that_runs_what_this_server_does_not_know(days: Days) -> None:
    """It was restored from a backup: what is older than the newest commit is not for a host that has passed it."""
    days.begin("nas @1d\n")
    days.write("second")
    days.populate()
    days.tick(1)
    days.write("third")
    days.populate()
    second = days.rollout.candidates[0].release("printer")
    before = days.published["till"]
    days.running["till"] = OTHER
    days.last["till"] = days.last["till"]._replace(release=OTHER)
    days.clock.now_s += 25 * HOUR_S
    for name in ("nas", "printer"):
        days.poll(name)
    report = json.loads((days.site.chroots / "till/logs/status.json").read_text())
    (days.site.chroots / "till/logs/status.json").write_text(json.dumps(report | {"release": OTHER}))
    days.date(days.site.chroots / "till/logs/status.json")
    days.populate()
    assert days.published["printer"] == second and days.published["till"] == before


def test_a_removed_host_of_the_waves_is_a_warning(days: Days) -> None:
    days.begin("nas till @1h\n")
    days.populate()
    (days.site.fleet / "hosts/till").rename(days.site.fleet / "till")
    ran = days.populate()
    assert ran.code == 0 and "hosts/waves:1: till: no such host any more: take it out" in ran.err
    (days.site.fleet / "hosts/waves").write_text("nas tull @1h\n")
    assert days.populate().code == 1
    ran = days.site.run("status")
    assert ran.code == 1 and "nothing is published: 'bento.py populate': hosts/waves:1: tull: no such host" in ran.err
    (days.site.fleet / "hosts/waves").write_text("nas @1h\n")
    days.populate()
    assert "nothing is published" not in days.site.run("status").err
    days.clock.now_s += 25 * HOUR_S
    assert "nothing is published: the last" in days.site.run("status", "--published-within", "24").err
    assert "nothing is published" not in days.site.run("status").err


# --- a month ---

MONTH = """\
ship lab-0 lab-1 lab-2 @1d !1
desk-*
"""
FLEET = ("ship", "lab-0", "lab-1", "lab-2", *(f"desk-{n}" for n in range(14)), "kiosk", "till")


def test_a_month(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty hosts, what happens to fleets, and by day: what is told, and with which exit code."""
    monkeypatch.setitem(globals(), "NAMES", FLEET)
    days.write("day 0", FLEET)
    days.populate()
    days.tick()
    (days.site.fleet / "hosts/waves").write_text(MONTH)
    told: dict[int, list[str]] = {}
    codes: dict[int, int] = {}

    def look(day: int) -> None:
        ran = days.site.run("status", "--changes", str(days.site.top / "told"))
        codes[day] = max(codes.get(day, 0), ran.code)
        told.setdefault(day, []).extend(
            re.sub(r"\(since .*|[0-9]+(min|[shd])\b|20\S+Z \(|[0-9a-f]{7}\b|, tried.*", "", line.removeprefix("bento: ")).strip()
            for line in ran.errors
            if line.startswith(("bento: begins", "bento: over"))
        )

    def act(day: int) -> None:
        if day in (3, 4, 5, 6, 7, 9, 10, 12, 17, 20):
            days.write(f"day {day}", FLEET)
        if day == 5:
            days.off.add("ship")  # for ten days
        if day == 15:
            days.off.discard("ship")
        if day == 9:
            days.bad["lab-0"] = Result.ROLLED_BACK  # one may fail
        if day == 10:
            days.bad.pop("lab-0")
        if day == 12:
            days.bad |= {"lab-0": Result.BUILD_FAILED, "lab-1": Result.BUILD_FAILED}
        if day == 17:
            days.bad.clear()
        if day == 22:
            (days.site.fleet / "hosts/kiosk.absent").write_text("in the workshop\n")
            days.off.add("kiosk")
        if day == 24:
            (days.site.fleet / "hosts/till").rename(days.site.fleet / "till")

    for day in range(1, 29):
        act(day)
        days.tick(24, [name for name in FLEET if (days.site.fleet / f"hosts/{name}").exists()])
        look(day)
    news = {day: lines for day, lines in told.items() if lines}
    assert {day for day, code in codes.items() if code} == {*range(5, 17), *range(24, 29)}, news
    assert news == {
        5: ["begins: ship: offline since ), it was pending"],
        13: ["begins: lab-0: failing since ): : build-failed: it said so", "begins: lab-1: failing since ): : build-failed: it said so"],
        15: ["over: ship: offline"],
        17: ["over: lab-0: failed", "over: lab-1: failed"],
        24: ["begins: till: it is not in hosts/, and reported  ago: put it back, or 'bento.py populate --prune' removes its chroot"],
    }
    assert len(set(days.published.values())) > 15 and days.published["desk-3"] == days.rollout.candidates[-1].release("desk-3")
