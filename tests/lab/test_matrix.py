"""No machine is lost: updates of a booted machine, cut short by every event in every phase.

    tests/run --all tests/lab/test_matrix.py            this commit's share, as in CI
    tests/run --whole tests/lab/test_matrix.py          all of it, and its table in tests/lab/matrix.md
    tests/run --cuts 200 tests/lab/test_matrix.py -k power_cuts

After each cell, within three timer slots, the machine reaches its server; profile, boot default and running system
agree; the report says what happened; and the next good release is deployed.
"""

import json
import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tiers import stamp
from toynixos import write_config

from lab.lab import TESTS, Host, Lab, LabError, Layer, Server

SLOT_S = 3
# What each release changes: a switch stops it first and starts it last.
WEB = "web.service"
WEB_TEXT = "[Service]\nEnvironment=RELEASE={}\nExecStart=sleep infinity\n"
EVENTS = ("kill", "hang", "power", "server", "link", "var-full", "boot-full", "clock")
PHASES = ("fetch", "build", "before", "activate", "prove", "commit", "report")
CELLS = [(event, phase) for event in EVENTS for phase in PHASES]
# What has to be among the reports on the way. Elsewhere the event may be over before it does any harm.
TOLD = {
    ("kill", "activate"): "interrupted", ("kill", "prove"): "interrupted", ("power", "activate"): "interrupted",
    ("power", "prove"): "interrupted", ("hang", "activate"): "interrupted", ("hang", "prove"): "interrupted",
    ("server", "build"): "postponed", ("link", "build"): "postponed", ("var-full", "fetch"): "fetch-failed",
    **{("boot-full", phase): "postponed" for phase in PHASES if phase != "report"},
}  # fmt: skip

table: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module", autouse=True)
def summary() -> Iterator[None]:
    yield
    lines = ["| event | " + " | ".join(PHASES) + " |", "|" + " --- |" * (len(PHASES) + 1)]
    for event in EVENTS:
        lines.append(f"| {event} | " + " | ".join(table.get((event, phase), "") for phase in PHASES) + " |")
    text = "\n".join(lines) + "\n"
    if table:
        print(f"\n\n{text}")
    if len(table) == len(EVENTS) * len(PHASES):
        (TESTS / "lab/matrix.md").write_text(TABLE.replace("STAMP", stamp()) + text, encoding="utf-8")


TABLE = """\
# Event × phase → what the host reported, and how long it took

Written by `tests/run --whole tests/lab/test_matrix.py`, of STAMP. Each cell is an update of a booted machine that was
hit in that phase: the reports of the release, in order, and the seconds from its publication until the machine was at
rest. In every cell the release that was hit runs in the end (profile, boot default and running system agree, the
server is reached), and so does the next one. Server, line and disk come back, or are emptied, six seconds after the
event; a timer slot is three seconds, the limits are 3 to 20 s. A hung client is ended at its phase's limit and 30 s.

kill: SIGKILL of the client. hang: SIGSTOP of it. power: the machine is off at once, and boots. server: its sshd is down.
link: the cable is out. var-full, boot-full: the disk with /var/lib/bento, with /boot is full; a person who has emptied
/boot says `run --force`, for Bento would pause for 15 minutes. clock: a year ahead.

"""


@pytest.fixture(scope="module")
def server(lab: Lab) -> Server:
    machine = lab.machine("server", Server)
    machine.boot()
    machine.path("/srv/fleet/hosts").mkdir(parents=True, exist_ok=True)
    machine.write("/srv/fleet/fleet.nix.in", (TESTS.parent / "fleet.nix.in").read_text(encoding="utf-8"))
    return machine


@pytest.fixture(scope="module")
def installed(lab: Lab, server: Server) -> Layer:
    return install(lab, server)


def install(lab: Lab, server: Server, **more: Any) -> Layer:
    """A host at its first release, known to the server, with small file systems that can be filled. `more`: of what it is
    installed with, and first published."""
    host = lab.machine("h1", Host)
    host.set_small_fs("/var/lib/bento", "64m")
    host.set_small_fs("/boot", "4m")
    host.prepare_clock()
    host.boot()
    write_config(host.path("/etc/nixos"), flake=True, host="h1", **{"label": "v0"} | behaviour(host) | more)
    host.install("/etc/nixos")
    host.power_cut()
    host.boot()
    server.write("/srv/fleet/hosts/h1.pub", host.client("key").stdout)
    publish(server, host, "v1", **more)
    server.apply_fleet()
    server.bento("populate")
    settled(host, server, "v1")
    return host.freeze()


@pytest.fixture
def host(lab: Lab, server: Server, installed: Layer) -> Host:
    machine = lab.machine("h1", Host, installed)
    publish(server, machine, "v1")
    server.bento("populate")
    machine.boot()
    settled(machine, server, "v1")
    return machine


def behaviour(host: Host, **settings: Any) -> dict[str, Any]:
    quick = {"confirm_timeout": 6, "activation_timeout": 15, "build_timeout": 20, "connect_timeout": 3}
    return host.behaviour(slot_s=SLOT_S, boot_s=1, **quick | settings)


def publish(server: Server, host: Host, label: str, extra: bytes = b"", **more: Any) -> str:
    """The release's name, or nothing while the server does not know the host."""
    settings = more.pop("settings", {})
    config = server.path("/srv/fleet/hosts/h1")
    made = {"label": label} | behaviour(host, **settings) | more
    if made["units"]:
        made["units"] = {WEB: WEB_TEXT.format(label)} | made["units"]
        made["starts"] = [*made["starts"], WEB]
    write_config(config, flake=True, host="h1", **made)
    (config / "extra").write_bytes(extra)
    if not server.exists("/home/chroot/h1"):
        return ""
    server.bento("populate")
    return str(json.loads(server.read("/home/chroot/h1/current.json"))["release"])


def reports(server: Server, release: str) -> list[str]:
    """How each attempt at a release ended, by the logs that the server has."""
    names = sorted(os.listdir(server.path("/home/chroot/h1/logs")))
    return [name.split("_")[2].removesuffix(".log") for name in names if f"_{release[:12]}_" in name]


def last(server: Server) -> dict[str, Any]:
    path = "/home/chroot/h1/logs/status.json"
    found: dict[str, Any] = json.loads(server.read(path))["last"] if server.exists(path) else {}
    return found or {}


def labels(host: Host) -> tuple[str, ...]:
    systems = (host.current_system(), host.profile_system(), host.default_system())
    return tuple(host.label(system) for system in systems)


def wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        try:
            if condition():
                return True
        except (OSError, ValueError, KeyError, LabError):
            pass  # the machine is in the middle of something
        time.sleep(0.1)
    return False


def at_rest(host: Host) -> bool:
    """No journal, no run at work, and running system, profile and boot default agree."""
    if host.exists(f"{host.state}/pending.json") or len(set(labels(host))) != 1:
        return False
    # In a machine that goes down just now it may never end.
    done = host.run("systemctl", "is-active", "bento.service", check=False, timeout_s=5)
    return done.stdout.strip() in ("inactive", "failed")


def is_active(host: Host, unit: str) -> bool:
    return host.run("systemctl", "is-active", unit, check=False).stdout.strip() == "active"


def is_well(host: Host) -> bool:
    """At rest, and what its system is to run is up: each release stops it, and starts it."""
    return at_rest(host) and (not host.exists(f"/etc/systemd/system/{WEB}") or is_active(host, WEB))


def settled(host: Host, server: Server, label: str, timeout_s: float = 60) -> None:
    good = wait(lambda: is_well(host) and labels(host)[0] == label and last(server).get("result") == "ok", timeout_s)
    assert good, (labels(host), last(server), host.console_tail(40))


def by_force(host: Host) -> None:
    """A person does not wait for the pause to end; the timer may just be at work."""
    for _ in range(5):
        if "another run is at work" not in host.client("run", "--force", check=False).stdout:
            return
        time.sleep(1)


def find_client(host: Host) -> int:
    """The pid, out here, of the client that is at work in bento.service; 0 if there is none."""
    for service in host.cgroup.rglob("bento.service"):
        for pid in (service / "cgroup.procs").read_text(encoding="utf-8").split():
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"run" in argv and any(word.endswith(b"/bento_client.pyc") for word in argv):
                return int(pid)
    return 0


@contextmanager
def first_in_line() -> Iterator[None]:
    """A report is on its way for some 20 ms, and the machines of other workers may have the processors for longer."""
    with suppress(OSError):  # where a container has no such priority to give
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def wait_for_phase(host: Host, phase: str) -> int:
    """Until the update is in the middle of this phase, to a few milliseconds; the pid of the client.

    The toy's hooks hold it there, where there is something to hold.
    """
    state = host.path(host.state)
    marks: dict[str, Callable[[], bool]] = {
        "fetch": lambda: any((state / "partial").iterdir()),
        "build": host.path("/root/at-build").exists,
        "before": lambda: (state / "result").is_symlink() and (state / "result").lstat().st_mtime > started,
        "activate": host.path("/root/at-switch").exists,
        "prove": host.path("/root/at-prove").exists,
        "commit": host.path("/root/at-boot").exists,
        "report": lambda: any((state / "outbox").glob("*.log")),
    }
    started = time.time() - 1
    give_up = time.monotonic() + 40
    with first_in_line():
        while time.monotonic() < give_up:
            with suppress(OSError):
                if marks[phase]() and (client := find_client(host)):
                    return client
            time.sleep(0.001)
    raise AssertionError(f"never came to the phase {phase}: {host.console_tail(40)}")


def nothing() -> None:
    """There is nothing to end: what happened is over."""


def strike(event: str, host: Host, server: Server, client: int) -> Callable[[], None]:
    """Lets the event happen; what it gives back ends it."""
    if event == "kill":
        with open(os.pidfd_open(client), "rb") as handle:
            signal.pidfd_send_signal(handle.fileno(), signal.SIGKILL)
            select.select([handle], [], [])  # a client that is still dying would be taken for the next one
    elif event == "hang":
        os.kill(client, signal.SIGSTOP)
    elif event == "power":
        host.power_cut()
        host.boot()
    elif event == "server":
        server.stop_sshd()
        return server.start_sshd
    elif event == "link":
        host.link_down()
        return host.link_up
    elif event == "var-full":
        host.fill("/var/lib/bento")
        return lambda: host.unfill("/var/lib/bento")
    elif event == "boot-full":
        host.fill("/boot")
        return lambda: host.unfill("/boot")
    elif event == "clock":
        host.clock_jump(366 * 86400)
    return nothing


def held_in(phase: str) -> dict[str, Any]:
    """What makes a release wait in a phase, until there is /root/go."""
    if phase == "prove":
        check = "touch /root/at-prove; for i in $(seq 40); do [ -e /root/go ] && exit 0; sleep 0.1; done"
        return {"settings": {"health_checks": [check]}}
    hold = {"build": "build", "activate": "switch", "commit": "boot"}.get(phase)
    return {f"{hold}_touch": f"/root/at-{hold}", f"{hold}_wait": "/root/go"} if hold else {}


def has_told(host: Host, server: Server, release: str, result: str) -> bool:
    """The server, or itself, while it cannot reach that one."""
    return result in reports(server, release) or any(result in log for log in os.listdir(host.path(f"{host.state}/outbox")))


@pytest.mark.parametrize(("event", "phase"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_matrix(host: Host, server: Server, event: str, phase: str) -> None:
    began = time.monotonic()
    release = publish(server, host, "v2", os.urandom(12_000_000 if phase == "fetch" else 16), **held_in(phase))
    client = wait_for_phase(host, phase)
    calm = strike(event, host, server, client)
    time.sleep(2)
    host.write("/root/go", "")
    if calm is not nothing:
        if event in ("server", "link", "boot-full") and (event, phase) in TOLD:  # on a busy machine it may take its time to do harm
            wait(lambda: has_told(host, server, release, TOLD[event, phase]), 30)
        else:
            time.sleep(4)
        calm()
    if event == "boot-full":  # by itself it would wait for a quarter of an hour
        by_force(host)
    # A hung client holds its lock until the watchdog ends it, at the phase's own limit.
    limit_s = 3 * SLOT_S + 30 + (60 if event == "hang" else 0)
    assert wait(lambda: is_well(host) and last(server).get("release") == release and reports(server, release)[-1] == "ok", limit_s), (
        labels(host), reports(server, release), last(server), host.console_tail(60),
    )  # fmt: skip
    took_s = time.monotonic() - began
    assert host.client("probe").stdout.startswith("the server is reached")
    assert labels(host) == ("v2",) * 3
    told = reports(server, release)
    assert TOLD.get((event, phase), "ok") in told and set(told) <= {*TOLD.values(), "ok"}
    publish(server, host, "v3")
    settled(host, server, "v3")
    table[event, phase] = f"{', '.join(told)}; {took_s:.0f} s"


def test_power_cuts(host: Host, server: Server, request: pytest.FixtureRequest) -> None:
    """Power cuts at random moments of updates, seeded; none of them loses the machine."""
    seed, cuts = request.config.option.seed, request.config.option.cuts
    dice = random.Random(seed)
    for number in range(cuts):
        label = f"cut-{seed}-{number}"
        publish(server, host, label, dice.randbytes(1_000_000))
        host.run("systemctl", "start", "--no-block", "bento.service")
        time.sleep(dice.uniform(0.0, 2.5))
        host.power_cut()
        host.boot()
        assert wait(lambda: at_rest(host), 30), (number, labels(host), host.console_tail(60))
        assert host.client("probe").stdout.startswith("the server is reached"), number
        assert set(labels(host)) <= {label, *(f"cut-{seed}-{n}" for n in range(number)), "v1"}
    publish(server, host, "after")
    settled(host, server, "after")


def single(host: Host, server: Server, expected: str, words: str, **release: Any) -> None:
    """A release that must not stay, and the next one that must."""
    publish(server, host, "v2", **release)
    assert wait(lambda: is_well(host) and last(server).get("result") == expected, 70), (
        labels(host), last(server), host.console_tail(60),
    )  # fmt: skip
    assert words in last(server)["reason"], last(server)
    assert labels(host) == ("v1",) * 3
    publish(server, host, "v3")
    settled(host, server, "v3")


@pytest.mark.parametrize(
    ("expected", "words", "release"),
    [
        ("rolled-back", "new system: ", {"cut_network": True}),
        ("rolled-back", "its name cannot be resolved", {"settings": {"server": "typo.invalid"}}),
        ("rolled-back", "no SSH key at /nowhere", {"settings": {"identity": "/nowhere"}}),
        ("rolled-back", "new system: ", {"broken_client": True}),
        ("build-failed", "import ./utils/bento.nix", {"no_bento": True}),
        ("rolled-back", "no end in time", {"switch_hang": "after"}),
        ("rolled-back", "health check failed", {"settings": {"health_checks": ["false"]}}),
        ("rolled-back", "bento.timer is not active", {"no_timer": True}),
    ],
    ids=["network", "server-name", "identity", "client", "no-bento", "hang", "health", "timer"],
)
def test_bad_release(host: Host, server: Server, expected: str, words: str, release: dict[str, Any]) -> None:
    single(host, server, expected, words, **release)


def test_unit_that_fails_for_another_reason(host: Host, server: Server) -> None:
    publish(server, host, "v2", switch_exit=4, failed_units=["cups.service"])
    settled(host, server, "v2")
    assert "cups.service" in last(server)["reason"]


def test_new_kernel_is_booted_and_proven(host: Host, server: Server) -> None:
    publish(server, host, "v2", kernel="6.18", settings={"reboot": "when-needed"})
    boots = host.boots
    assert wait(lambda: host.boots > boots and at_rest(host) and labels(host)[0] == "v2", 60), host.console_tail(60)
    assert host.booted_system() == host.current_system()


def test_kernel_without_network_is_left_again(host: Host, server: Server) -> None:
    publish(server, host, "v2", kernel="broken", settings={"reboot": "when-needed", "offline_after": 60})  # else it has 45 minutes
    boots = host.boots
    assert wait(lambda: host.boots >= boots + 2 and at_rest(host) and last(server)["result"] == "rolled-back", 90), (
        host.boots - boots, labels(host), last(server), host.console_tail(80),
    )  # fmt: skip
    assert labels(host) == ("v1",) * 3
    publish(server, host, "v3")
    settled(host, server, "v3")


def test_kernel_without_network_is_left_again_after_a_power_cut(host: Host, server: Server) -> None:
    """It went live on the old kernel and proved itself there; reboot = "never". Then the power goes."""
    publish(server, host, "v2", kernel="broken", settings={"offline_after": 60})
    settled(host, server, "v2")
    host.power_cut()
    host.boot()
    assert wait(lambda: host.label(host.default_system()) == "v1" and not host.exists(f"{host.state}/pending.json"), 60), (
        labels(host), host.console_tail(80),
    )  # fmt: skip
    host.power_cut()
    publish(server, host, "v3")
    host.boot()
    settled(host, server, "v3")
    assert "rolled-back" in " ".join(os.listdir(server.path("/home/chroot/h1/logs")))


def test_release_that_changes_the_bento_unit(host: Host, server: Server) -> None:
    """The switch reloads the unit that it runs in, and restarts its timer."""
    changed = behaviour(host)["units"]
    changed["bento.service"] += "Environment=CHANGED=1\n"
    changed["bento.timer"] = changed["bento.timer"].replace("AccuracySec=100ms", "AccuracySec=200ms")
    publish(server, host, "v2", units=changed)
    settled(host, server, "v2")
    assert "CHANGED=1" in host.run("systemctl", "show", "--property=Environment", "bento.service").stdout
    assert "200ms" in host.run("systemctl", "show", "--property=AccuracyUSec", "bento.timer").stdout
    publish(server, host, "v3")
    settled(host, server, "v3")
    assert "CHANGED=1" not in host.run("systemctl", "show", "--property=Environment", "bento.service").stdout


def test_way_back_that_fails_is_said_and_tried_again(host: Host, server: Server) -> None:
    publish(server, host, "old", fails_from="v2", fails_from_times=2)
    settled(host, server, "old")
    publish(server, host, "v2", settings={"health_checks": ["false"]})
    assert wait(lambda: last(server).get("result") == "rollback-failed", 60), (last(server), host.console_tail(60))
    assert "going back to" in last(server)["reason"] and "tried again at the next run" in last(server)["reason"]
    assert wait(lambda: at_rest(host) and last(server).get("result") == "rolled-back", 60), (
        labels(host), last(server), host.console_tail(60),
    )  # fmt: skip
    assert labels(host) == ("old",) * 3
    publish(server, host, "v3")
    settled(host, server, "v3")


def test_two_runs_at_once(host: Host, server: Server) -> None:
    publish(server, host, "v2", build_touch="/root/at-build", build_wait="/root/go")
    wait_for_phase(host, "build")
    assert "another run is at work" in host.client("run").stdout
    host.write("/root/go", "")
    settled(host, server, "v2")


@pytest.mark.parametrize("event", ["kill", "power"])
def test_interrupted_again_is_given_up(host: Host, server: Server, event: str) -> None:
    publish(server, host, "v2", switch_touch="/root/at-switch", switch_wait="/root/go")
    for _ in range(3):
        client = wait_for_phase(host, "activate")
        strike(event, host, server, client)
        host.path("/root/at-switch").unlink()
    assert wait(lambda: at_rest(host) and (last(server)["result"], last(server)["attempt"]) == ("interrupted", 3), 60), (
        labels(host), last(server), host.console_tail(60),
    )  # fmt: skip
    time.sleep(2 * SLOT_S)
    assert not host.path("/root/at-switch").exists()  # not tried a fourth time
    assert (labels(host), last(server)["attempt"]) == (("v1",) * 3, 3)
    assert wait(lambda: "interrupted: waiting" in host.client("run").stdout, 20)  # unless the timer is just at work
    publish(server, host, "v3")
    settled(host, server, "v3")


def test_slept_through_four_releases(host: Host, server: Server) -> None:
    host.link_down()
    for number in range(2, 6):
        publish(server, host, f"v{number}")
    host.link_up()
    settled(host, server, "v5")

