"""The three pure decisions that can lose a machine, over every combination of what they look at.

What is asserted is what must never happen, and what must always; not how the client comes to it.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from bento_client import (
    Done,
    Facts,
    Move,
    Pending,
    State,
    Step,
    Switch,
    Switched,
    find_way_back,
    judge_switch,
    settle,
    switch_words,
)

OLD, NEW, OTHER, BEFORE = "/nix/store/old", "/nix/store/new", "/nix/store/other", "/nix/store/before"
SYSTEMS = (OLD, NEW, OTHER)
NOW, EARLIER = "this boot", "an earlier boot"
TIME = "2026-11-25T20:00:00Z"


def journal(step: str = Step.ACTIVATING, boot_id: str = NOW, **more: Any) -> Pending:
    """Of an attempt to put NEW in OLD's place."""
    return Pending("a" * 64, TIME, OLD, NEW, OLD, step, boot_id, "token", TIME, 1)._replace(**more)


def facts() -> Iterator[Facts]:
    for running, booted, default in itertools.product(SYSTEMS, repeat=3):
        yield Facts(running, booted, default, NOW)


# --- settle ---

STATES = [
    State(system=system, good=good, boot=boot)
    for system, good, boot in itertools.product((None, OLD, NEW), (None, OLD, NEW), (NOW, EARLIER))
]


@pytest.mark.parametrize("boot_id", [NOW, EARLIER])
@pytest.mark.parametrize("step", list(Step))
def test_an_attempt_that_is_not_settled(step: Step, boot_id: str) -> None:
    moves = set()
    for state, found in itertools.product(STATES, facts()):
        move = settle(journal(step, boot_id), state, found)
        moves.add(move)
        case = f"{state} {found}"
        assert move in (Move.COMMIT, Move.PROVE, Move.GO_BACK), f"an attempt is brought to an end: {case}"
        proven = step == Step.COMMITTING and boot_id == NOW and found.running == NEW
        assert (move == Move.COMMIT) == proven, f"only what proved itself in this boot, and runs, is the default: {case}"
        if move == Move.PROVE:
            assert boot_id == EARLIER, f"in its own boot it has had its proof: {case}"
            assert found.running == found.booted == NEW, f"only the new system proves the new system: {case}"
            assert step == Step.COMMITTING, f"what proved nothing live gets no second try by a boot: {case}"
        if found.running != NEW:
            assert move == Move.GO_BACK, f"what does not run proves nothing: {case}"
    if step != Step.COMMITTING:
        assert moves == {Move.GO_BACK}, "presumed aborted"
    else:
        assert moves == {Move.COMMIT if boot_id == NOW else Move.PROVE, Move.GO_BACK}


@pytest.mark.parametrize("verdict", ["", "rolled-back", "postponed", "interrupted"])
def test_a_way_back_that_was_begun_is_gone(verdict: str) -> None:
    for state, found, boot_id in itertools.product(STATES, facts(), (NOW, EARLIER)):
        assert settle(journal(Step.ROLLING_BACK, boot_id, verdict=verdict), state, found) == Move.GO_BACK


def test_no_attempt_is_under_way() -> None:
    moves = set()
    for state, found in itertools.product(STATES, facts()):
        move = settle(None, state, found)
        moves.add(move)
        case = f"{state} {found}"
        assert move not in (Move.COMMIT, Move.GO_BACK), f"nothing was begun: {case}"
        if found.default != state.system:
            assert move == Move.REST, f"the default is a person's: {case}"
        if state.good is None:
            assert move == Move.REST, f"Bento has deployed nothing that a boot would have to prove: {case}"
        if state.good == state.system:
            assert move == Move.REST, f"it is proven; what a person boots later is theirs: {case}"
        if move == Move.REST:
            continue
        assert found.default == state.system != state.good, f"only what no boot has proven is looked at: {case}"
        assert (move == Move.WAIT) == (state.boot == NOW), f"its first boot is to come, or it came: {case}"
        assert (move == Move.PROVE) == (state.boot != NOW and found.booted == state.system), f"it came up: {case}"
        assert (move == Move.FELL_BACK) == (state.boot != NOW and found.booted != state.system), f"it did not: {case}"
    assert moves == {Move.REST, Move.WAIT, Move.PROVE, Move.FELL_BACK}


def test_what_runs_for_the_moment_proves_nothing_of_a_boot() -> None:
    """Somebody's `nixos-rebuild test` after the boot makes no difference to whose proof it is."""
    for state, found in itertools.product(STATES, facts()):
        moves = {settle(None, state, found._replace(running=running)) for running in SYSTEMS}
        assert len(moves) == 1, f"{state} {found}"


# --- the way back ---


def ways_back() -> Iterator[tuple[Pending, Facts, str, str, tuple[str | None, str | None]]]:
    """`profile`: what would have been booted; not what ran, where a release had waited for a boot (BEFORE)."""
    flags = itertools.product((False, True), (False, True), (NOW, EARLIER), (OLD, BEFORE))
    for (switched, committed, boot_id, profile), good in itertools.product(flags, (OLD, BEFORE, NEW)):
        pending = journal(boot_id=boot_id, switched=switched, committed=committed, profile=profile)
        for running, booted, default in itertools.product((*SYSTEMS, BEFORE), SYSTEMS, (*SYSTEMS, BEFORE)):
            found = Facts(running, booted, default, NOW)
            case = f"{pending} {found} {good=}"
            yield pending, found, good, case, find_way_back(pending, found, OLD, good)


def test_the_boot_default_on_the_way_back() -> None:
    for pending, found, good, case, (default, _) in ways_back():
        assert default in (None, pending.profile), f"it is what it was before, or it is let be: {case}"
        after = default or found.default
        if found.default not in (NEW, pending.profile, good):
            assert default is None, f"a person's choice: {case}"
        else:
            assert after == pending.profile, f"no attempt's system stays the default: {case}"
            if pending.committed:
                assert default is not None, f"the boot loader may be half written: {case}"
        if found.default == pending.profile and not pending.committed:
            assert default is None, f"the boot loader was not touched, and is not to be: {case}"


def test_what_is_activated_on_the_way_back() -> None:
    for pending, found, _, case, (_, system) in ways_back():
        if pending.boot_id == NOW:
            assert system in (None, pending.old), f"back to what ran: {case}"
            if found.running == NEW:
                assert system == pending.old, f"what proved nothing does not go on: {case}"
            elif found.running == pending.old:
                # Units may be stopped that are to run; but what was never begun is not to be undone.
                assert (system is not None) == pending.switched, case
            else:
                assert system is None, f"a person's: {case}"
        elif found.running == NEW:
            assert system == pending.profile, f"after a boot, to what would have been booted: {case}"
        else:
            assert system is None, f"a boot has undone it: {case}"


def test_the_way_back_to_what_is_tried_again() -> None:
    """NEW is the boot default already, and only its switch is new: there is nothing else to boot."""
    for running, boot_id, committed in itertools.product(SYSTEMS, (NOW, EARLIER), (False, True)):
        pending = journal(boot_id=boot_id, profile=NEW, committed=committed, switched=True)
        default, system = find_way_back(pending, Facts(running, OLD, NEW, NOW), OLD, OLD)
        assert default == (NEW if committed else None)
        assert system == (OLD if boot_id == NOW and running != OTHER else None)


def test_a_specialisation_is_gone_back_to_as_it_was() -> None:
    """What ran was a specialisation of `owner`, by which `facts` knows it."""
    special = f"{OLD}/specialisation/quiet"
    for running, wanted in ((OLD, special), (NEW, special), (OTHER, None)):
        pending = journal(old=special, switched=True)
        assert find_way_back(pending, Facts(running, OLD, OLD, NOW), OLD, OLD) == (None, wanted)


# --- what came of a switch ---

CHECK = "Pre-switch check '{}' failed\nPre-switch checks failed"
INHIBITED, SCRIPT, UNIT = CHECK.format("switchInhibitors"), "Failed to run activate script\n", "Failed to start web.service\n"
OUTPUTS = ("", INHIBITED, CHECK.format("backup"), "Could not acquire lock", SCRIPT, UNIT)
CODES = (None, 0, 1, 2, 3, 4, 11, 17, 100, 101, -9, 137)


def test_what_came_of_a_switch() -> None:
    seen = set()
    for code, output, began, finished in itertools.product(CODES, OUTPUTS, (False, True), (False, True)):
        if (finished and not (began and code in (0, 4))) or (code in (0, 2, 4) and not began):
            continue
        came = judge_switch(Switch(Done(code, output), began, finished))
        seen.add(came)
        case = f"exit {code}, {output!r}, {began=}, {finished=}"
        assert (came == Switched.LIVE) == (finished and output != SCRIPT), f"whatever it says: {case}"
        assert (came == Switched.NEEDS_BOOT) == (not began and (code == 100 or output == INHIBITED)), f"only untouched: {case}"
        if not began:
            assert came in (Switched.NEEDS_BOOT, Switched.REFUSED), f"nothing was done, whatever the code: {case}"
        elif not finished:
            nobodys = code not in (None, 0, 2, 4) and output != UNIT
            assert came == (Switched.BROKEN if nobodys else Switched.FAILED), f"who is to blame: {case}"
    assert seen == set(Switched)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("stopping the following units: a\nactivating the configuration...\nError: Failed to get GID for git\n\nCaused by:\n"
         "    Unknown object '/x'.\n", "Failed to get GID for git: Unknown object '/x'."),
        ("reloading systemd...\nUnable to list users with logind: Timeout", "Unable to list users with logind: Timeout"),
        ("restarting sysinit-reactivation.target\nFailed to reload a.service\n", "failed: a.service"),
        ("Failed to start a.service\nwarning: the following units failed: b.service", "failed: a.service, b.service"),
        (CHECK.format("backupRuns"), "pre-switch check refuses: 'backupRuns'"),
        ("activating the configuration...\nmkdir: no\nActivation script snippet 'x' failed (1)\n" + SCRIPT,
         "activation script x: mkdir: no"),
        ("activating the configuration...\n" + SCRIPT, "Failed to run activate script"),
        ("", "no output"),
    ],
)  # fmt: skip
def test_words_of_a_switch(output: str, words: str) -> None:
    assert switch_words(output) == words
