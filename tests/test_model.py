"""No machine is lost: the client's real `run` and `rollback` over the machine of tests/model.py.

Every single fault and every pair of faults of an update, and random histories with a person's hand: other ones for each
commit. One that ends badly is told whole; `tests/run tests/test_model.py --seed N --walks 1` has it again.
"""

import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from model import Lost, System, World, model

Enter = Callable[[World], World]


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    """In memory, where there is some: these are hundreds of thousands of small files."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="bento-model-") as directory:
        yield Path(directory)


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Enter]:
    with model(monkeypatch) as entering:
        yield entering


def settle(world: World) -> None:
    """Peace: no more faults, and reboots now and then. The machine must come to rest on what works, and stay there; and
    take the next good release. What that is does not depend on what the client believes."""
    world.server_down = world.lies = world.lock_held = world.refusal = world.person = False
    world.breaks = ""
    world.nvram_full = ""
    world.boot_full = 0
    world.truncated.clear()
    world.say("-- peace")
    rest(world, "it came to no rest")
    inhibitor, init = world.systems[world.running].inhibitor, world.systems[world.running].init
    world.publish(f"v{900 + len(world.systems)}", System(kernel=7, inhibitor=inhibitor, init=init))
    rest(world, "it does not take a good release", world.published)


def rest(world: World, trouble: str, wanted: str = "") -> None:
    calm = 0
    for number in range(72):  # three verdicts, each after a boot and some proofs
        world.now_s += 24 * 3600  # whatever pauses there are
        world.run()
        well = world.is_well() and wanted in ("", world.running)
        calm = calm + 1 if well else 0
        if calm == 3:
            return
        if well or number % 4 == 3:
            world.start()
    raise Lost(trouble)


def tell(world: World, error: Lost) -> None:
    where = f"runs {world.running}, booted {world.booted}, profile {world.default}, starts {world.standing}"
    pytest.fail("\n".join([*world.trace, f"{error}: {where}, {world.preferred=} {world.once=} {world.journal=}"]), pytrace=False)


NEW = [
    System(kernel, boots, live, inhibitor, init)
    for kernel, boots, live, inhibitor, init in itertools.product(
        (0, 1), ("well", "without network", "panics"), (True, False), (0, 1), (0, 1)
    )
    if (kernel or boots == "well") and not (inhibitor and init)
]


# Without a trial, a kernel that panics takes a person at the boot menu: `status` says so of such machines.
CASES = [(new, trials) for trials in (True, False) for new in NEW if trials or new.boots != "panics"]


@pytest.mark.parametrize(("new", "trials"), CASES, ids=str)
def test_every_pair_of_faults_of_an_update(enter: Enter, top: Path, new: System, trials: bool) -> None:
    """A fault before each effect, then one before each effect of what comes after it: a run, or the watchdog."""
    for first, second in itertools.product(("kill", "power"), ("kill", "power", "watchdog kill", "watchdog power")):
        explore(enter, World(top, trials, "when-needed"), new, 0, first, second)


def test_every_single_fault_of_an_update(enter: Enter, top: Path) -> None:
    ways = itertools.product(("never", "when-needed"), ("live", "boot"))
    for (new, trials), (reboot, activation), full in itertools.product(CASES, ways, (0, 1, 2)):
        for first in ("kill", "power"):
            explore(enter, World(top, trials, reboot, activation), new, full, first, "")


@pytest.mark.parametrize("breaks", ["session", "logind", "bus", "refusal", "lock", "person"])
def test_every_single_fault_of_a_switch_that_breaks(enter: Enter, top: Path, breaks: str) -> None:
    """What is wrong stays so until there is peace; services that were up are up in the end."""

    def weather(world: World) -> None:
        world.breaks = breaks if breaks in ("session", "logind", "bus") else ""
        world.refusal, world.lock_held, world.person = breaks == "refusal", breaks == "lock", breaks == "person"

    some = [new for new in NEW if not (new.inhibitor or new.init or new.boots == "panics")]
    for new, first, second in itertools.product(some, ("kill", "power"), ("", "watchdog power")):
        explore(enter, World(top, True, "when-needed"), new, 0, first, second, weather)


def boot_by_hand(world: World) -> None:
    """A person's default that has not been booted."""
    world.nixos_rebuild("v800", "boot")


def lose_the_way_back(world: World) -> None:
    """... nor can what runs be booted any more: its entry is gone, and the boot loader would write half a kernel."""
    world.nixos_rebuild("v800", "boot")
    world.collect_garbage()
    world.nixos_rebuild("v801", "boot")
    world.collect_garbage()
    world.write_loader("v801")
    world.lies = True


@pytest.mark.parametrize("before", [boot_by_hand, lose_the_way_back])
def test_every_single_fault_after_a_person(enter: Enter, top: Path, before: Callable[[World], None]) -> None:
    for (new, trials), activation, first in itertools.product(CASES, ("live", "boot"), ("kill", "power")):
        if trials:
            explore(enter, World(top, trials, "never", activation), new, 0, first, "", before)


def explore(
    enter: Enter, template: World, new: System, full: int, first: str, second: str, before: Callable[[World], None] = lambda w: None
) -> None:
    """Where two faults leave the same machine, what comes after them is the same: it is gone through once."""
    for number in itertools.count():
        world = enter(World(template.top, template.trials, template.reboot, template.activation))
        before(world)
        world.publish("v1", new)
        world.boot_full = full
        try:
            began = world.run(left=number, fault=first)
            stay(world)
            if not is_known(world, second):
                explore_from(enter, world, second)
        except Lost as error:
            tell(world, error)
        if began != "Killed":
            return


def explore_from(enter: Enter, before: World, fault: str) -> None:
    how = "watchdog" if fault.startswith("watchdog") else "run"
    for number in itertools.count():
        world = enter(before.copy())
        try:
            went_on = world.run(how, left=number, fault=fault.split()[-1]) if fault else "once"
            stay(world)
            if not is_known(world):
                settle(world)
        except Lost as error:
            tell(world, error)
        if went_on != "Killed":
            return


def stay(world: World) -> None:
    if world.activation == "boot" and not world.boot and any("switch test" in line for line in world.trace):
        raise Lost("a desktop was switched under its person")


KNOWN: set[str] = set()


def is_known(world: World, what_next: str = "peace") -> bool:
    found = f"{what_next} {world.fingerprint()}"
    if found in KNOWN:
        return True
    KNOWN.add(found)
    return False


EVENTS = (
    *["run"] * 6, "kill", "kill", "power", "power", "watchdog", "publish", "publish", "publish", "down", "up", "up",
    "full", "full to the last block", "room", "lie", "truth", "reboot", "reboot", "lock", "unlock", "refuse", "allow",
    "rollback", "nixos-rebuild", "menu", "garbage", "channels", "pause", "nvram", "nvram", "nvram has room",
    "state lost", "hibernate",
    "session", "logind", "bus", "well", "person", "sit", "stand",
)  # fmt: skip


class Walk:
    """One random history."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world, self.chance, self.count = world, chance, 0

    def go(self) -> None:
        self.change()
        for _ in range(self.chance.randint(3, 16)):
            event = self.chance.choice(EVENTS)
            self.happen(event)
        settle(self.world)

    def change(self, what: str = "publish") -> None:
        self.count += 1
        chance, kernel = self.chance, self.chance.choice((0, 0, 0, 1, 2, 3))
        boots = {1: "well", 2: "without network", 3: "panics" if self.world.trials else "well"}.get(kernel, "well")
        live, inhibitor = chance.random() < 0.7, int(chance.random() < 0.2)
        new = System(kernel, boots, live, inhibitor, int(chance.random() < 0.1), chance.random() < 0.9)
        self.world.say(f"-- {what} v{self.count}: {new}")
        (self.world.publish if what == "publish" else self.world.upgrade_channels)(f"v{self.count}", new)

    def happen(self, event: str) -> None:
        world, chance = self.world, self.chance
        match event:
            case "run" | "watchdog" | "rollback" | "pause":
                cut = chance.random() < 0.25
                left = chance.randint(0, 14) if cut and event != "run" else None
                world.run(event, left=left, fault=chance.choice(("kill", "power")))
            case "kill" | "power":
                world.run(left=chance.randint(0, 30), fault=event)
            case "publish" | "channels":
                self.change(event)
            case "reboot":
                world.start()
            case "session" | "logind" | "bus" | "well":
                world.say(f"-- {event}")
                world.breaks = event if event != "well" else ""
            case "person":
                world.person = True
            case "menu":
                world.start(pick=chance.choice(sorted(e for e in world.entries if world.systems[world.entries[e]].boots == "well") or [""]))
            case "state lost":
                if world.trials:  # else nothing has what it knew, and a person has to come
                    world.say("-- state.json is lost")
                    world.files.pop("state.json", None)
            case "hibernate":
                world.hibernate(resumes=chance.random() < 0.5)
            case "garbage":
                world.say("-- nix-collect-garbage -d")
                world.lies = False  # or there may be no system left that can be fallen back to
                world.collect_garbage()
            case "nixos-rebuild":
                self.count += 1
                action = chance.choice(("switch", "boot", "test"))
                world.say(f"-- nixos-rebuild {action} v{self.count}")
                world.nixos_rebuild(f"v{self.count}", action)
            case _:
                self.weather(event)

    def weather(self, event: str) -> None:
        world = self.world
        world.say(f"-- {event}")
        world.boot_full = 2 if event == "full to the last block" else world.boot_full
        if event.startswith("nvram"):
            world.nvram_full = self.chance.choice(("mark", "default", "once", "both")) if event == "nvram" else ""
        names = {"down": "server_down", "full": "boot_full", "lie": "lies", "lock": "lock_held", "refuse": "refusal", "sit": "seated"}
        ends = {"up": "down", "room": "full", "truth": "lie", "unlock": "lock", "allow": "refuse", "stand": "sit"}
        # Without a way back, a power cut between a lie and its discovery takes a person at the boot menu.
        can_lie = world.trials and len(world.generations) > 1
        if name := names.get(ends.get(event, event)):
            setattr(world, name, event in names and (event != "lie" or can_lie))


@pytest.mark.parametrize("part", range(20))
def test_random_histories(enter: Enter, top: Path, part: int, request: pytest.FixtureRequest) -> None:
    first, walks = request.config.option.seed, request.config.option.walks
    for seed in range(first + part, first + walks, 20):
        chance = random.Random(seed)
        reboot, trials = chance.choice(("never", "when-needed")), chance.random() < 0.8
        activation, rebuild_s = chance.choice(("live", "boot")), chance.choice((0, 0, 3600))
        limit = chance.choice((100, 100, 3, 2, 1))
        world = enter(World(top, trials, reboot, activation, rebuild_s, limit))
        world.systems["v0"] = System(bento=chance.random() < 0.7)
        world.reboot_without_trial = chance.random() < 0.5
        world.say(f"seed {seed}, {reboot=}, {trials=}, {activation=}, {rebuild_s=}, {limit=}, v0: {world.systems['v0']}")
        try:
            Walk(world, chance).go()
        except Lost as error:
            tell(world, error)
