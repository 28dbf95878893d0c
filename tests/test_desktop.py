"""What people at a machine, and small ones, want of updates: not now, at the next boot, told how it ended; and security
updates between two releases. Machines that sleep in the middle of it."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from test_decisions import CURRENT, state_after
from test_modules import HOST_MODULE, MINIMAL, analyze, evaluate_host, write_units
from toylab import NOON, QUARTER, A, B, Lab, Systemd, attempt, be_patient, wait_until

import bento_client
from bento_client import Machine, Result, Settings, decide

LOADER = {"boot_loader": ["systemd-boot", "/boot"]}
AT_BOOT = LOADER | {"activation": "boot"}


def next_boot(lab: Lab) -> None:
    lab.machine.power_cycle()
    lab.client("run")


# --- at the next boot ---


def test_a_release_is_for_the_next_boot(lab: Lab) -> None:
    lab.settings |= AT_BOOT
    before = lab.machine.activations()
    release = lab.publish("v1")
    assert "ok: it takes effect at the next reboot" in lab.client("run")
    assert lab.labels() == ("v0", "v1", "v1") and lab.machine.fallback_label() == "v0"
    assert lab.machine.activations() == before, "nothing was touched under the person at the machine"
    report = lab.report()
    assert (report.waiting_for_boot, report.needs_reboot, lab.last().result) == (release, True, Result.OK)
    assert f"waiting    release {release[:12]} runs from the next boot on" in lab.client("status")
    assert f"release {release[:12]} waits for the next boot" in lab.client("run")
    next_boot(lab)
    assert lab.labels() == ("v1", "v1", "v1") and lab.machine.fallback_label() == "v1"
    report = lab.report()
    assert (report.release, report.waiting_for_boot, report.needs_reboot) == (release, None, False)


@pytest.mark.parametrize("second", ["v2", "v1-again"])
def test_another_release_before_the_boot(lab: Lab, second: str) -> None:
    lab.settings |= AT_BOOT
    lab.publish("v1")
    lab.client("run")
    release = lab.publish(second)
    lab.client("run")
    assert lab.labels() == ("v0", second, second) and lab.report().waiting_for_boot == release
    next_boot(lab)
    assert lab.labels() == (second,) * 3 and lab.report().release == release


@pytest.mark.parametrize("loader", [True, False])
def test_a_boot_that_proves_nothing(lab: Lab, loader: bool) -> None:
    """It comes up without network: the next boots are the last good system's, and the release is no default."""
    lab.settings |= AT_BOOT if loader else {"activation": "boot"}
    lab.publish("v1", kernel="broken")
    lab.client("run")
    booted = []
    for _ in range(4):
        lab.machine.power_cycle()
        booted.append(lab.machine.current_label())
        lab.machine.run(*lab.argv("run", code=None), env=lab.env())
        be_patient(lab)
        lab.machine.run(*lab.argv("run", code=None), env=lab.env())
    assert booted[0] == "v1" and booted[-1] == "v0" and lab.machine.network() == "up"
    assert lab.labels() == ("v0", "v0", "v0") and lab.machine.fallback_label() == "v0"
    assert "was rolled back" in lab.client("run")


@pytest.mark.parametrize(("reboot", "reboots"), [("never", 0), ("when-needed", 1)])
def test_reboots_go_with_it(lab: Lab, reboot: str, reboots: int) -> None:
    systemd = Systemd(lab)
    lab.settings |= {"activation": "boot", "reboot": reboot}
    lab.publish("v1")
    systemd.run("run")
    assert lab.labels() == ("v0", "v1", "v1") and systemd.reboots() == reboots
    assert systemd.timers() == []


def test_no_reboot_where_it_is_the_server_that_is_away(lab: Lab) -> None:
    """It is given up after the boot. The old system has the same kernel, and goes live."""
    systemd = Systemd(lab)
    lab.settings["activation"] = "boot"
    lab.publish("v1")
    systemd.run("run")
    systemd.boot()
    lab.down.touch()
    be_patient(lab)
    systemd.run("run", code=75)
    assert lab.labels() == ("v0", "v0", "v0") and systemd.reboots() == 0


def test_no_reboot_where_the_server_went_away_during_the_proof(lab: Lab) -> None:
    """What ran before has a kernel that waits for its boot: that is not why nothing is reached."""
    systemd = Systemd(lab)
    lab.publish("v1", kernel="6.13")
    systemd.run("run")
    lab.publish("v2", kernel="6.13", activation_command=f"touch {lab.down}")
    systemd.run("run", code=75)
    assert lab.labels()[:2] == ("v1", "v1") and systemd.reboots() == 0


def test_a_system_that_leaves_at_the_next_boot(lab: Lab) -> None:
    """The last report is from before."""
    lab.settings |= AT_BOOT
    lab.publish("v1", leaves=True)
    lab.client("run")
    assert lab.labels() == ("v0", "v1", "v1") and lab.report().phase == "left"


# --- not now ---


def test_pause_and_resume(lab: Lab) -> None:
    began = time.time()
    said = lab.client("pause")
    until = said.split()[2].rstrip(":")
    assert abs(bento_client.parse_time(until) - began - 8 * 3600) < 60
    lab.publish("v1")
    assert f"paused until {until}: new release" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0") and lab.report().paused_until == until
    assert f"paused     until {until}" in lab.client("status")
    lab.machine.power_cycle()
    assert f"paused until {until}" in lab.client("run")
    lab.client("resume")
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1") and lab.report().paused_until is None
    assert "paused" not in lab.client("status")


def test_a_pause_is_overridden_by_force(lab: Lab) -> None:
    lab.client("pause", "1.5")
    lab.publish("v1")
    lab.client("run", "--force")
    assert lab.labels() == ("v1", "v1", "v1") and lab.report().paused_until is not None


@pytest.mark.parametrize("words", [("pause", "0"), ("pause", "-1"), ("pause", "nan"), ("pause", "9999"), ("pause", "x"), ("run", "5")])
def test_a_pause_that_cannot_be(lab: Lab, words: tuple[str, ...]) -> None:
    lab.client(*words, code=2)
    assert not (lab.state / "pause.json").exists()


def test_a_pause_in_the_middle_of_a_build(lab: Lab) -> None:
    """What was built is not activated; the next run after it needs no new build."""
    lab.publish("v1", build_touch=lab.file("at"), build_wait=lab.file("go"))
    run = lab.start("run")
    while not Path(lab.file("at")).exists():
        assert run.poll() is None
        time.sleep(0.02)
    lab.client("pause")
    Path(lab.file("go")).touch()
    assert lab.finish(run) == 1
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.last().result == Result.POSTPONED and "paused until" in lab.last().reason
    lab.client("resume")
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")


def test_what_is_under_way_is_settled_in_a_pause(lab: Lab) -> None:
    """Its first boot proves a release, or does not; but no boot is asked for."""
    systemd = Systemd(lab)
    lab.settings |= LOADER
    lab.publish("v1", kernel="6.13")
    systemd.run("run")
    assert lab.machine.fallback_label() == "v0"
    lab.settings["reboot"] = "when-needed"
    lab.client("pause")
    systemd.run("run")
    assert systemd.reboots() == 0
    systemd.boot()
    systemd.run("run")
    assert lab.machine.fallback_label() == "v1" and lab.report().known_to_boot == lab.report().system


@pytest.mark.parametrize(
    ("boot", "wall_s", "since_boot_s", "holds"),
    [
        ("same", 60, 60, True),
        ("same", 3601, 3601, False),
        ("same", -86400, 3601, False),  # the clock was set back: no reason to be paused for another day
        ("same", 366 * 86400, 60, True),  # set right: nor to deploy now
        ("another", 60, 5, True),
        ("another", 3600, 5, False),
        ("another", -60, 5, False),
        ("another", -366 * 86400, 5, False),
    ],
)
def test_a_pause_never_outlives_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot: str, wall_s: float, since_boot_s: float, holds: bool
) -> None:
    def at(wall: float, since_boot: float) -> None:
        monkeypatch.setattr(time, "time", lambda: NOON + wall)
        monkeypatch.setattr(time, "clock_gettime", lambda clock: float(since_boot))

    settings = Settings(host="toy", state_dir=str(tmp_path), root=str(tmp_path))
    at(0, 1000.0)
    assert bento_client.command_pause(settings, 1) == 0
    machine = Machine(settings)
    if boot == "another":
        boot_id = tmp_path / "proc/sys/kernel/random/boot_id"
        boot_id.parent.mkdir(parents=True)
        boot_id.write_text("another\n")
    at(wall_s, 1000 + since_boot_s if boot == "same" else since_boot_s)
    assert (bento_client.paused_until(machine) is not None) == holds


def test_a_pause_of_this_version_is_read_by_the_next_ones() -> None:
    text = """{"format": 1, "since": "2026-11-25T22:00:00Z", "until": "2026-11-26T06:00:00Z", "boot": "an-id", "end_s": 5.5}"""
    read = bento_client.parse_pause(text.encode(), "pause.json")
    assert read == bento_client.Pause("2026-11-25T22:00:00Z", "2026-11-26T06:00:00Z", "an-id", 5.5)
    assert json.loads(bento_client.encode(read)) == json.loads(text)


def test_a_damaged_pause_is_none(lab: Lab) -> None:
    (lab.state / "pause.json").write_text("{")
    lab.publish("v1")
    assert "set aside" in lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")


# --- told how it ended ---

TELL = 'echo "$BENTO_RESULT|$BENTO_REASON|$BENTO_RELEASE|$BENTO_REVISION" >> '


def test_hooks_are_told(lab: Lab) -> None:
    lab.settings["after_deployment"] = [TELL + lab.file("told")]
    good = lab.publish("v1")
    lab.client("run")
    bad = lab.publish("v2", cut_network=True)
    lab.client("run", code=1)
    lab.client("run")
    lab.client("rollback")
    first, second, third = (line.split("|") for line in Path(lab.file("told")).read_text().splitlines())
    assert first == ["ok", "", good, first[3]]
    assert second[0] == "rolled-back" and "cannot reach" in second[1] and second[2] == bad
    assert third[:2] == ["rolled-back", "by hand"]


def test_hooks_come_when_all_is_reported(lab: Lab) -> None:
    """The server has the report; no journal, no watchdog; and the lock holds off another run."""
    systemd = Systemd(lab)
    told = lab.chroot / "logs/status.json"
    look = f"cp {told} {lab.file('seen')}; ls {lab.state}/pending.json {systemd.top}/timers > {lab.file('left')} 2>&1; exit 3"
    lab.settings["after_deployment"] = [look]
    release = lab.publish("v1")
    said = systemd.run("run")
    assert "after_deployment failed (exit 3): cp " in said
    assert json.loads(Path(lab.file("seen")).read_text())["release"] == release
    left = Path(lab.file("left")).read_text()
    assert "pending.json': No such file" in left and "bento-watchdog" not in left
    assert lab.last().result == Result.OK and "up to date" in systemd.run("run")


@pytest.mark.parametrize("ending", ["exit 0", "wait"])
def test_hooks_that_hang_or_leave_something(lab: Lab, ending: str) -> None:
    hang = f"sleep 1000 & echo $! > {lab.file('pid')}; {ending}"
    lab.settings["after_deployment"] = [hang, f"touch {lab.file('next')}"]
    lab.publish("v1")
    done = lab.run_patched("c.HOOK_LIMIT_S = 1")
    assert done.returncode == 0, done.stdout
    assert ("after_deployment failed (no end in time)" in done.stdout) == (ending == "wait")
    left = Path("/proc", Path(lab.file("pid")).read_text().strip(), "stat")
    wait_until(lambda: not left.exists() or " Z " in left.read_text())
    assert Path(lab.file("next")).exists()
    assert lab.last().result == Result.OK and not (lab.state / "deploy.log").exists()


def test_the_hooks_are_those_of_the_system_that_runs(lab: Lab) -> None:
    hook = {"after_deployment": [TELL + lab.file("told")]}
    lab.publish("v1", settings=hook, cut_network=True)
    lab.client("run", code=1)
    assert not Path(lab.file("told")).exists()
    lab.publish("v2", settings=hook)
    lab.client("run")
    assert Path(lab.file("told")).read_text().startswith("ok|")


# --- built again ---


def channel(lab: Lab, **behaviour: Any) -> None:
    Path(lab.file("channel")).write_text(json.dumps(behaviour))


def run_after(lab: Lab, seconds: float, code: int = 0) -> str:
    lab.age_attempts(seconds)
    return lab.client("run", code=code, TOY_CHANNEL=lab.file("channel"))


WEEK = 7 * 86400


def deployed(lab: Lab) -> str:
    lab.settings["rebuild_every"] = WEEK
    channel(lab, label="january")
    release = lab.publish("v1", flake=False)
    lab.client("run", TOY_CHANNEL=lab.file("channel"))
    return release


def test_a_release_is_built_again(lab: Lab) -> None:
    release = deployed(lab)
    assert lab.labels() == ("january",) * 3
    channel(lab, label="february")
    assert "up to date" in run_after(lab, WEEK - 60)
    assert "built again" in run_after(lab, 60)
    assert lab.labels() == ("february",) * 3
    assert (lab.report().release, lab.last().result, lab.last().attempt) == (release, Result.OK, 1)
    assert "nothing to activate" in run_after(lab, WEEK)
    assert "up to date" in run_after(lab, 0)


def test_a_channel_that_gives_no_system(lab: Lab) -> None:
    """It is told, tried again with pauses, and over when the channel is mended."""
    release = deployed(lab)
    channel(lab, build="eval-error")
    run_after(lab, WEEK, code=1)
    assert (lab.report().release, lab.last().result, lab.last().attempt) == (release, Result.BUILD_FAILED, 1)
    run_after(lab, 0, code=1)
    assert "next attempt in" in run_after(lab, 0)
    channel(lab, label="february")
    run_after(lab, 15 * 60)
    assert lab.labels() == ("february",) * 3 and lab.last().result == Result.OK


def test_a_channel_that_gives_a_bad_system(lab: Lab) -> None:
    """Back to the last proven system; what was given up is not activated again, and what comes next is."""
    release = deployed(lab)
    channel(lab, label="february", cut_network=True)
    run_after(lab, WEEK, code=1)
    assert lab.labels() == ("january",) * 3 and lab.last().result == Result.ROLLED_BACK
    assert (lab.report().release, lab.last().release) == (release, release)
    lab.age_attempts(2 * WEEK)
    for _ in range(2):
        assert "rolled-back" in lab.client("run", code=1, TOY_CHANNEL=lab.file("channel")), "in doubt: once more"
        lab.age_attempts(2 * WEEK)
    before = lab.machine.activations()
    run_after(lab, WEEK, code=1)
    assert lab.machine.activations() == before and lab.last().result == Result.ROLLED_BACK
    channel(lab, label="march")
    run_after(lab, WEEK)
    assert lab.labels() == ("march",) * 3 and lab.last().result == Result.OK


@pytest.mark.parametrize(
    ("outcome", "number", "deployed", "later_s", "again"),
    [
        ("ok", 1, A, WEEK - 1, False),
        ("ok", 1, A, WEEK, True),
        ("ok", 1, A, -3600, False),
        ("ok", 1, A, -86400, True),  # the clock was set back: better once too often than never
        ("ok", 1, B, WEEK, False),  # a person's way back: what runs is not this release
        ("rolled-back", 1, A, WEEK - 1, False),
        ("rolled-back", 1, A, WEEK, True),
        ("rolled-back", 1, B, WEEK, False),  # a release that never was any good is given up
        ("interrupted", 2, A, WEEK, True),
        ("interrupted", 2, B, WEEK, False),
    ],
)
def test_when_it_is_built_again(outcome: str, number: int, deployed: str, later_s: float, again: bool) -> None:
    state = state_after(outcome, number, doubts=3, release=deployed)
    wanted, _ = decide(CURRENT, state, NOON + later_s, rebuild_s=WEEK)
    assert wanted == again
    assert decide(CURRENT, state, NOON + 10 * WEEK)[0] is False, "where it is not wanted"


def test_a_short_time_is_no_reason_to_flap() -> None:
    tried = attempt("rolled-back", 5)
    state = state_after("rolled-back", 5, wait_s=4 * 3600, doubts=2, release=A, tried=tried)
    assert decide(CURRENT, state, NOON + 3 * 3600, rebuild_s=60)[0] is False
    assert decide(CURRENT, state, NOON + 4 * 3600, rebuild_s=60)[0] is True


# --- a machine that slept in the middle of it ---


def test_a_proof_that_was_slept_through_is_nobodys_fault(lab: Lab) -> None:
    """The lid was closed: the connection is gone, and the line takes a minute to come up."""
    lab.publish("v1")
    failure = "c.Failure('cannot reach the server', True, slept=True)"
    done = lab.run_patched(f"c.prove = lambda machine: {failure}")
    assert done.returncode == 1 and lab.labels() == ("v0",) * 3, done.stdout
    assert lab.last().result == Result.POSTPONED
    lab.age_attempts(QUARTER)
    lab.client("run")
    assert lab.labels() == ("v1",) * 3 and lab.last().result == Result.OK


@pytest.mark.parametrize("asleep_s", [0.0, 90.0])
def test_whether_a_proof_was_slept_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asleep_s: float) -> None:
    """The clock of limits, ours and systemd's, stands still in sleep; the other one shows it."""
    asleep = 0.0
    real = time.clock_gettime

    def probe(*words: object) -> str:
        nonlocal asleep
        asleep = asleep_s
        return "cannot reach the server"

    monkeypatch.setattr(bento_client, "probe_system", probe)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: real(clock) + asleep)
    machine = Machine(Settings(host="toy", state_dir=str(tmp_path), root=str(tmp_path), confirm_timeout=1))
    failure = bento_client.prove(machine)
    assert failure is not None and failure.unreachable and failure.slept == (asleep_s > 0)


# --- on battery ---


def test_on_battery_nothing_runs(tmp_path: Path) -> None:
    """README's line. A condition that systemd does not know, or cannot read, would be ignored."""
    line = "{ systemd.services.bento.unitConfig.ConditionACPower = true; }"
    host = evaluate_host(HOST_MODULE, MINIMAL, line)
    [path] = [path for path in write_units(tmp_path, host) if path.name == "bento.service"]
    unit = path.read_text().partition("[Service]")[0]
    assert "\nConditionACPower=true\n" in unit and "\nX-StopOnRemoval=false\n" in unit
    done = analyze("condition", "ConditionACPower=true")
    assert re.search(r"ConditionACPower=true (succeeded|failed)", done.stderr), done.stderr
    done = analyze("verify", "--man=no", path)
    assert done.returncode == 0 and "bento" not in done.stderr, done.stderr
