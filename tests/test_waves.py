"""Waves: whom a roll-out holds, and why, over days of a simulated clock, with reports as the client writes them.

The clock is in the past: no file can have come later than the real one says."""

import itertools
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
desk-*
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
        ("c\n", [("c a1 a2 b1 b2", 0)]),
        ("c\na*\n", [("c", 0), ("a1 a2 b1 b2", 0)]),
        ("c @2h\na? @90min\n*", [("c", 7200), ("a1 a2", 5400), ("b1 b2", 0)]),
        ("@1d b1 c # two\n[ab]1 @0s\n", [("b1 c", DAY_S), ("a1 a2 b2", 0)]),
        ("*1\na1 @30m\n*", [("a1 b1", 0), ("", 1800), ("a2 b2 c", 0)]),
        ("[!a]*\r\na1\r\n", [("b1 b2 c", 0), ("a1 a2", 0)]),
    ],
)
def test_who_is_in_which_wave(text: str, waves: list[tuple[str, float]]) -> None:
    assert bento.parse_waves(text, HOSTS) == [bento.Wave(tuple(names.split()), soak_s) for names, soak_s in waves]


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
        ("a1\nc @1h @2h\n", "hosts/waves:2: @2h: a wave has one soak time, as @90min, @2h or @1d"),
        ("c\n@2h # for whom?\n", "hosts/waves:2: a soak time goes with the hosts of its wave, and there are none in this line"),
    ],
)
def test_a_wave_file_with_a_mistake(text: str, error: str) -> None:
    with pytest.raises(BentoError) as raised:
        bento.parse_waves(text, HOSTS)
    assert str(raised.value) == error


# --- who is held ---


def standing(state: str, *, wanted: str = NEW, age_s: float = 300, ran_s: float = 7200, **changes: Any) -> bento.Standing:
    """A host in a state, at NOW_S. What is published for it is NEW, unless its state begins with `old-` or is `none`."""
    release = OLD if state.startswith("old-") else NEW
    current = None if state == "none" else Current("x", release, 1, format_time(NOW_S - 5 * DAY_S))
    if state in ("new", "old-new", "none"):
        return bento.Standing(wanted, Found(current, None, None, ""))
    result = {"rolled-back": "rolled-back", "failing": "build-failed"}.get(state.removeprefix("old-"), "ok")
    when = format_time(NOW_S - age_s)
    last = Last(OTHER if state == "pending" else release, result, "", "/s", when, when, 1, f"20260921T132640Z_{'1' * 12}_ok.log")
    running = release if result == "ok" and state not in ("pending", "waiting") else OTHER
    phase = {"building": Phase.BUILDING, "left": Phase.LEFT}.get(state, Phase.IDLE)
    report = Report("x", "1.1", when, phase, running, "/s", state == "waiting", last)._replace(**changes)
    return bento.Standing(wanted, Found(current, report, NOW_S - age_s, ""), NOW_S - age_s - ran_s)


GONE = 3 * HOUR_S
DONE = standing("runs")
DECISIONS: list[tuple[str, Sequence[bento.Standing], Sequence[str]]] = [
    # the hosts of the first wave, and whom the second waits for
    ("done", [DONE], []),
    ("all done", [DONE, DONE], []),
    ("it has to get it", [standing("old-runs")], ["pending"]),
    ("it has got it", [standing("pending")], ["pending"]),
    ("it builds", [standing("building")], ["building"]),
    ("it waits for its reboot", [standing("waiting")], ["waiting"]),
    ("it failed", [standing("failing")], ["failing"]),
    ("it rolled back", [standing("rolled-back")], ["rolled-back"]),
    ("it failed an older one, and gets this one", [standing("old-rolled-back")], ["pending"]),
    ("units failed", [standing("runs", failed_units=("nginx.service",))], ["failed units"]),
    ("not for long enough", [standing("runs", ran_s=2400)], ["runs it 40min of 2h"]),
    ("the time does not go on while it is silent", [standing("runs", ran_s=7100, age_s=HOUR_S)], ["runs it 2.0h of 2h"]),
    ("nothing is published for it yet", [standing("none"), DONE], []),
    ("what hosts/ has cannot be published", [standing("runs", wanted="")], ["not published"]),
    ("off, and nobody else there", [standing("old-runs", age_s=GONE)], ["offline"]),
    ("it ran it, and fell silent", [standing("runs", age_s=GONE)], ["offline"]),
    ("off, and somebody else is there", [standing("old-runs", age_s=GONE), DONE], []),
    ("off, and somebody else is not done", [standing("old-runs", age_s=GONE), standing("pending")], ["", "pending"]),
    ("off, but it rolled back before", [standing("rolled-back", age_s=GONE), DONE], ["rolled-back"]),
    ("off, and cannot be published", [standing("runs", wanted="", age_s=GONE), DONE], []),
    ("never there", [standing("new"), DONE], []),
    ("never there, with an older one", [standing("old-new"), DONE], []),
    ("nobody was ever there", [standing("new"), standing("old-new")], ["new", "new"]),
    ("it left", [standing("left"), DONE], []),
    ("left, and nobody else", [standing("left")], ["left"]),
    ("nobody knows", [bento.Standing(NEW, Found(DONE.found.current, None, None, "logs/status.json: not JSON")), DONE], ["unreadable"]),
    ("one of many", [DONE, standing("building"), standing("rolled-back"), DONE], ["", "building", "rolled-back"]),
]  # fmt: skip


@pytest.mark.parametrize(("first", "whys"), [case[1:] for case in DECISIONS], ids=[case[0] for case in DECISIONS])
def test_whom_a_wave_waits_for(first: Sequence[bento.Standing], whys: Sequence[str]) -> None:
    hosts = {f"a{number}": each for number, each in enumerate(first)}
    behind = {"same": DONE, "fresh": standing("none"), "later": standing("old-runs"), "broken": standing("old-runs", wanted="")}
    waves = [bento.Wave(tuple(hosts), 7200), bento.Wave(tuple(behind), 0)]
    blockers, held = bento.decide(waves, hosts | behind, NOW_S)
    expected = {f"a{number}": why for number, why in enumerate(whys) if why}
    assert {host: why for host, why in blockers if expected or host in hosts} == expected
    assert [b.why in bento.FAILED for b in blockers] == sorted((b.why in bento.FAILED for b in blockers), reverse=True)
    # Who has nothing yet, or the same, or what cannot be published, is not held.
    assert held == (["later"] if expected else [])


def test_every_earlier_wave_has_to_be_done() -> None:
    """All combinations of three waves: held is who has another release and a wave before that is not done."""
    again = standing("runs", ran_s=-60)  # what it ran before was published again since its report
    kinds = {"done": again, "changed": standing("old-runs"), "failed": standing("rolled-back"), "off": standing("old-runs", age_s=GONE)}
    waves = [bento.Wave((f"a{n}", f"b{n}"), 0) for n in range(3)]
    for found in itertools.product(kinds, repeat=6):
        hosts = dict(zip((name for wave in waves for name in wave.hosts), found, strict=True))
        blockers, held = bento.decide(waves, {name: kinds[kind] for name, kind in hosts.items()}, NOW_S)
        good = [
            {hosts[name] for name in wave.hosts} <= {"done", "off"} and any(hosts[name] == "done" for name in wave.hosts)
            for wave in waves
        ]
        changed = {name for name, kind in hosts.items() if kind in ("changed", "off")}
        assert set(held) == {name for n, wave in enumerate(waves) for name in wave.hosts if name in changed and not all(good[:n])}
        first = next((wave.hosts for wave, is_good in zip(waves, good, strict=True) if not is_good), ())
        assert bool(blockers) == bool(first) and {each.host for each in blockers} <= set(first)


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

    def tick(self, hours: float = 1) -> Ran:
        """Some time passes, then all hosts poll, and the timer runs."""
        self.clock.now_s += hours * HOUR_S
        for name in NAMES:
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
        return bento.read_rollout(self.site.chroots)


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
    assert (days.rollout.held, days.rollout.blockers) == ((), ())
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


def test_notes_are_those_of_an_older_version_too(days: Days) -> None:
    """It wrote the waves, and how many of them were done, and nobody ever read that."""
    days.begin("nas\n*\n")
    days.write("second")
    days.populate()
    notes, found = days.site.chroots / ".rollout.json", days.rollout
    data = json.loads(notes.read_text())
    assert found.held and found.blockers and found.proven and data.keys() == {"format", "blockers", "held", "proven"}
    notes.write_text(json.dumps(data | {"waves": [{"hosts": ["nas"], "soak_s": 0.0}], "done": 0}))
    assert days.rollout == found


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
    assert {each.since_s for each in days.rollout.held} == {began_s}
    table = days.site.run("status").out.splitlines()
    assert "held" in table[2] and table[2].endswith("  held 30h: wait for nas (rolled-back)")
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
    assert not (days.site.chroots / ".rollout.json").exists()


def test_a_canary_that_is_off(days: Days) -> None:
    """The only host of its wave has to be there; of two, one is enough, and the other gets it when it comes back."""
    days.begin()
    before = days.published
    days.off.add("nas")
    days.write("second")
    days.populate()
    for _ in range(5):
        ran = days.tick(6)
        assert (ran.code, days.changed(before)) == (0, (1, 0, 0, 0))
    assert ran.out.splitlines()[0] == "39 hosts: held: wait for nas (offline)"
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
    assert days.rollout.held[0].published != days.rollout.held[-1].published
    found = follow(days, second)
    assert [got for _, got in found] == [got for _, got in GOOD]
    assert [hour for hour, _ in found] == [hour for hour, _ in GOOD]
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
    signed = days.site.current("till").signed
    assert signed is not None
    serial = client.parse_signed(signed, "").serial
    assert days.site.current("till").release == client.parse_signed(signed, "").release != days.rollout.held[-1].wanted
    assert follow(days, before) == GOOD
    signed = days.site.current("till").signed
    assert signed is not None and client.parse_signed(signed, "").serial > serial


def test_a_dry_run_says_whom_it_would_hold(days: Days) -> None:
    days.begin()
    days.write("second")
    before = days.published
    notes = days.site.chroots / ".rollout.json"
    ran = days.populate("--dry-run")
    assert ran.out.splitlines()[1:] == [
        "39 hosts: held: wait for nas (pending)",
        "40 hosts: 1 would be published, 0 unchanged, 39 held, 0 failed",
    ]
    assert ran.out.startswith("nas: would publish ")
    assert (days.published, notes.exists()) == (before, False)


def test_a_line_of_json_a_host(days: Days) -> None:
    days.begin()
    days.write("second")
    lines = [json.loads(line) for line in days.populate("--json").out.splitlines()]
    held = {line["host"]: line for line in lines if line["result"] == "held"}
    assert len(lines) == 40 and len(held) == 39
    assert held["till"] == {
        "host": "till", "result": "held", "release": days.rollout.held[-1].wanted,
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
    assert days.rollout.reason == "wait for nas (not published)"


def test_what_comes_while_it_is_at_work_waits(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build takes hours, and a push comes meanwhile: nobody gets what the canary has not run."""
    days.begin("nas\n*\n")
    days.tick()
    before = days.published
    days.write("second", ["office-0"])
    decide = bento.decide

    def push(*given: Any) -> Any:
        days.write("third, for all", ["nas", "office-0", "till"])
        return decide(*given)

    monkeypatch.setattr(bento, "decide", push)
    # What was read is remembered, until a host fails.
    shutil.rmtree(days.site.chroots / "desk-00/logs")
    (days.site.chroots / "desk-00/logs").touch()
    ran = days.populate()
    assert (ran.code, days.published) == (1, before)
    assert "hosts/office-0: changed while this was at work: run this again" in ran.err


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
