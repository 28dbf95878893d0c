"""A model of a NixOS machine, for the client's real `run` and `rollback`: a fault can come before any of their effects.

The machine is a few facts: which system runs, was booted, is the profile; the generations; what /boot holds; the two EFI
variables; the boot id. What the real programs do with them is told by nixos-facts: see tests/toy and tests/lab, which have
the programs. Nothing is believed here because the client believes it.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import gmtime
from typing import Any

import pytest

import bento_client as client
from bento_client import BentoError, BootEntry, Current, Done, Loader, Machine, Pending, Unreachable

SERVER = "server.example"
NOON_S = 1_700_000_000.0


def name_of(system: str) -> str:
    return system.rpartition("/")[2]


class Killed(BaseException):
    """The client is no more. Neither is anything else it could catch."""


class Rebooted(Killed):
    pass


@dataclass(frozen=True)
class System:
    """`kernel`: its number; `boots`: "well", "panics", or "without network"; `live`: whether it has network when it is
    activated; `inhibitor`: a switch from or to a system with another one is refused; `init`: exit 100 for others;
    `bento`: it has a client of its own, as all have but the one that a machine may have been installed with."""

    kernel: int = 0
    boots: str = "well"
    live: bool = True
    inhibitor: int = 0
    init: int = 0
    healthy: bool = True
    bento: bool = True


STORES: set[str] = set()  # that lie on the disk


class Lost(BaseException):
    """A machine that no software brings back."""


@dataclass
class World:
    """One machine and its site. `trials`: the boot loader can be told to start a system once. `rebuild_s`: a release that
    is fine is built again after that, and may have become another system. The boot loader's entries are named by their
    generations: where names are made of the content, the number is in there."""

    top: Path
    trials: bool = True
    reboot: str = "never"
    activation: str = "live"
    rebuild_s: int = 0
    limit: int = 100  # configurationLimit
    reboot_without_trial: bool = True
    systems: dict[str, System] = field(default_factory=lambda: {"v0": System()})
    running: str = "v0"
    booted: str = "v0"
    specialisation: str = ""
    generations: dict[int, str] = field(default_factory=lambda: {1: "v0"})
    profile: int = 1
    entries: dict[str, str] = field(default_factory=dict)  # name -> system
    truncated: set[str] = field(default_factory=set)
    loader_conf: str = ""
    preferred: str = ""  # LoaderEntryDefault
    once: str = ""  # LoaderEntryOneShot
    mark: str = ""  # BentoTrial
    boot: int = 0
    proofs: float = 0  # since when this boot is to be proven
    now_s: float = NOON_S
    server_down: bool = False
    boot_full: int = 0  # 1: no room for another kernel; 2: to the last block, nothing can be written
    lies: bool = False  # the boot loader's builder says 0, and half of the kernel is there
    nvram_full: str = ""  # what the boot loader cannot be told: "mark", "default", "once", or "both"
    lock_held: bool = False
    seated: bool = False  # somebody is at the machine
    refusal: bool = False  # a user's own pre-switch check, of each system
    breaks: str = ""  # a switch: "session", once; "logind", each; "bus", which is gone then
    bus: bool = True
    up: bool = True  # a unit that each system has, and each switch stops and starts
    start_list: bool = False
    person: bool = False  # switches while the next proof is under way
    theirs: str = ""
    published: str = "v0"
    release: str = "0" * 63 + "1"
    proven: set[str] = field(default_factory=lambda: {"v0"})  # has booted, and has network then; or is a person's
    kept: str = ""  # what the profile of the system to fall back to names
    kept_number: int = 0
    left: int | None = None  # effects until the fault
    fault: str = ""
    trace: list[str] = field(default_factory=list)
    effects: int = 0
    files: dict[str, Any] = field(default_factory=dict)  # the client's records, by name

    def __post_init__(self) -> None:
        self.loader_conf = "1"
        self.entries = {self.loader_conf: "v0"}

    # -- the machine --

    def say(self, text: str) -> None:
        self.trace.append(text)

    @property
    def default(self) -> str:
        return self.generations[self.profile]

    @property
    def standing(self) -> str:
        """The system that the loader starts, when nothing is to be started once."""
        return self.entries[self.preferred if self.preferred in self.entries else self.loader_conf]

    @property
    def network(self) -> bool:
        booted = self.systems[self.booted].boots != "without network"
        return not self.server_down and booted and self.systems[self.running].live

    def effect(self, what: str) -> None:
        """Something outside of the client is about to change; or a fault comes first."""
        self.effects += 1
        self.say(f"  {what}")
        if self.left == 0:
            self.left = None
            self.say(f"  <-- {self.fault}")
            if self.fault == "power":
                self.start()
            raise Killed
        self.left = None if self.left is None else self.left - 1

    def check(self) -> None:
        """At any moment: what boots when all else fails is known to boot, where the loader can do trials."""
        if self.trials and self.standing not in self.proven:
            raise Lost(f"{self.standing} would be booted for good, and has never booted")

    def start(self, pick: str = "") -> None:
        """A boot, and those that follow when kernels panic."""
        self.boot += 1
        self.proofs = 0
        for _ in range(3):
            chosen, self.once = self.entries.get(pick or self.once, self.standing), ""
            pick = ""
            self.say(f"boot {self.boot}: {chosen}" + (" (truncated)" if chosen in self.truncated else ""))
            if self.systems[chosen].boots != "panics" and chosen not in self.truncated:
                break
        else:
            raise Lost(f"{chosen} panics for ever")
        self.running = self.booted = chosen
        self.specialisation, self.bus, self.up, self.start_list = "", True, True, False
        if self.systems[chosen].boots == "well":
            self.proven.add(chosen)

    def hibernate(self, *, resumes: bool) -> None:
        """The loader has to wake the kernel that went to sleep, be it one on trial; a resume that fails is a boot."""
        self.say("-- hibernate")
        try:
            client.command_hibernate(self.settings)
        except BentoError as error:
            self.say(f"   it stays awake: {error}")
            return
        chosen, trial = self.entries.get(self.once, self.standing), bool(self.mark)
        if trial and chosen != self.booted:
            raise Lost(f"{chosen} is to wake {self.booted}: what was asleep is lost")
        if resumes and chosen == self.booted:
            self.once = ""
        else:
            self.start()

    # -- its programs --

    def switch(self, name: str, action: str, checked: bool = True) -> tuple[int, str]:
        self.effect(f"switch {action} {name}")
        system = self.systems[name]
        if self.lock_held:
            return 11, "Could not acquire lock"
        if checked and self.refusal:
            return 1, "Pre-switch check 'mine' failed"
        if action == "boot":
            return self.write_loader(name)
        if checked and system.inhibitor != self.systems[self.running].inhibitor:
            return 1, "Pre-switch check 'switchInhibitors' failed"
        if system.init != self.systems[self.running].init:
            return 100, ""
        if not self.bus:
            return 1, "Error: Failed to open dbus connection"
        return self.activate(name)

    def activate(self, name: str) -> tuple[int, str]:
        """Stops, activates, asks logind, starts."""
        self.up, self.start_list = False, True
        self.effect(f"(stopped units for {name})")
        if self.breaks == "bus":
            self.breaks, self.bus = "", False
            return 1, "Error: Failed to process dbus messages"
        self.running = name
        self.effect(f"(activated {name})")
        if self.breaks:
            code = 11 if self.breaks == "logind" else 1
            self.breaks = "" if self.breaks == "session" else self.breaks
            return code, "Error: of logind"
        self.up, self.start_list = True, False
        self.effect(f"(after switch test {name})")
        return 0, ""

    def write_loader(self, name: str) -> tuple[int, str]:
        if self.lock_held:
            return 11, "Could not acquire lock"
        numbers = [self.profile, *sorted(self.generations.keys() - {self.profile}, reverse=True)][: self.limit]
        entries = {str(number): self.generations[number] for number in numbers}
        if self.kept:
            entries[f"bento-{self.kept_number}"] = self.kept
        new, wanted = {*entries.values()} - {*self.entries.values()}, {*entries.values()}
        if self.boot_full == 2 or (self.boot_full and new):
            return 1, "No space left on device"
        if self.lies:
            self.truncated |= new
        self.truncated &= wanted
        self.entries, self.loader_conf = entries, str(self.profile)
        self.check()
        self.effect(f"(after switch boot {name})")
        return 0, ""

    def nix_env(self, verb: str, value: str) -> None:
        self.effect(f"nix-env {verb} {name_of(value)}")
        if verb == "--set":
            newest = max(self.generations)
            self.profile = newest if self.generations[newest] == name_of(value) else newest + 1
            self.generations[self.profile] = name_of(value)
        elif verb == "--switch-generation":
            self.profile = int(value)
        elif verb == "--delete-generations":
            assert int(value) != self.profile
            del self.generations[int(value)]

    # -- a person's hand --

    def nixos_rebuild(self, name: str, action: str) -> None:
        """By hand: what a person makes the default is theirs, whether it boots or not."""
        if self.boot_full or self.lock_held or self.lies or not self.bus or self.breaks:
            return
        self.systems[name] = System()
        self.make_store(name)
        if action != "test":
            self.nix_env("--set", name)
            self.proven.add(name)  # their own affair
            self.write_loader(name)
        if action != "boot" and self.systems[self.running].inhibitor == 0 and self.systems[self.running].init == 0:
            self.running, self.up, self.start_list = name, True, False

    def collect_garbage(self) -> None:
        self.generations = {self.profile: self.default}

    def make_store(self, name: str) -> None:
        if name in STORES:
            return
        STORES.add(name)
        for part in ("bin/switch-to-configuration", "sw/bin/bento-client", "etc/bento/client.json"):
            path = self.top / "store" / name / part
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def path(self, name: str) -> str:
        return f"{self.top}/store/{name}"

    def publish(self, name: str, system: System) -> None:
        self.upgrade_channels(name, system)
        self.theirs = ""
        self.release = format(int(name[1:]) + 1, "064x")

    def upgrade_channels(self, name: str, system: System) -> None:
        """What is published is built to another system from now on."""
        self.systems[name] = system
        self.make_store(name)
        self.published = name

    # -- the client --

    @functools.cached_property
    def settings(self) -> client.Settings:
        values = {
            "host": "toy", "server": [SERVER], "state_dir": str(self.top / "state"), "root": str(self.top / "root"),
            "confirm_timeout": 1, "connect_timeout": 1, "reboot": self.reboot, "activation": self.activation,
            "rebuild_every": self.rebuild_s or None, "reboot_without_trial": self.reboot_without_trial,
        }  # fmt: skip
        return client.make_settings(values, "model")

    def run(self, how: str = "run", *, left: int | None = None, fault: str = "") -> str | int:
        """A run of the timer's, the watchdog's or a person's, with a fault before effect number `left`."""
        self.left, self.fault, self.effects = left, fault, 0
        self.now_s += 900
        self.theirs = ""
        self.say(f"-- {how}" + (f", {fault} at {left}" if left is not None else ""))
        try:
            if how == "watchdog":
                token = self.files["pending.json"].token if self.journal else "none"
                return client.command_rollback(self.settings, token=token)
            if how == "rollback":
                return client.command_rollback(self.settings, token=None)
            if how == "pause":
                return client.command_pause(self.settings, 1.0)
            ended = client.command_run(self.settings, force=False)
            if self.theirs not in ("", self.default):
                raise Lost(f"it took {self.theirs} from a person")
            self.check()
            return ended
        except Killed as error:
            return type(error).__name__
        except BentoError as error:
            self.say(f"   {type(error).__name__}: {error}")
            return error.exit_code
        finally:
            self.left = None

    def copy(self) -> "World":
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (dict, set, list)):
                setattr(other, name, value.copy())
        return other

    def fingerprint(self) -> str:
        """All that what comes next can depend on. Not a deployment's token, which is random: it means no more than that a
        watchdog is of the deployment that the journal is about."""
        past = ("top", "left", "fault", "trace", "effects")
        now = {name: sorted(each) if isinstance(each, set) else each for name, each in vars(self).items() if name not in past}
        return re.sub("token='[0-9a-f]*'", "", repr(sorted(now.items())))

    @property
    def journal(self) -> bool:
        return "pending.json" in self.files

    def is_well(self) -> bool:
        agree = self.running == self.default == self.standing == self.entries[self.loader_conf]
        told = self.preferred or self.once or self.mark
        return self.network and agree and not self.journal and not told and self.up and not self.start_list


class ModelLoader(Loader):
    def __init__(self, world: World) -> None:
        self.world = world

    def trial_way(self) -> str:
        return "systemd-boot" if self.world.trials else "none: a model without"

    def entry_fault(self, system: str) -> str | None:
        name = name_of(system)
        if name in self.world.truncated:
            return f"the kernel of {name} is truncated"
        return None if name in self.world.entries.values() else f"no entry for {name}"

    def entry_of(self, system: str) -> BootEntry:
        for entry, name in sorted(self.world.entries.items(), key=lambda item: not item[0].startswith("bento")):
            if name == name_of(system):
                return BootEntry(entry)
        raise BentoError(f"no entry for {name_of(system)}")

    def starts(self, system: str) -> bool:
        return name_of(system) == self.world.entries[self.world.loader_conf]

    def lasts(self, system: str) -> bool:
        return any(name == name_of(system) and entry.startswith("bento") for entry, name in self.world.entries.items())

    def flush(self) -> None:
        self.world.effect("flush /boot")

    def unmounted(self) -> str | None:
        return None

    def ran_out(self) -> bool:
        return False

    def forget_end(self) -> None:
        pass

    def altered(self, system: str, good: str) -> list[Path]:
        return []

    def list_entries(self) -> list[BootEntry]:
        return [BootEntry(entry, self.world.path(name)) for entry, name in self.world.entries.items()]

    def armed(self) -> client.Armed:
        return client.Armed(self.world.preferred, self.world.once, self.world.mark)

    def prefer(self, system: str, mark: str) -> None:
        if self.world.mark != mark:
            self.world.effect("set BentoTrial")
            self.tell("mark", self.world.mark, mark)
            self.world.mark = mark
        self.world.effect(f"set-default {name_of(system)}")
        self.tell("default", self.world.preferred, self.entry_of(system).name)
        self.world.preferred = self.entry_of(system).name
        self.world.check()

    def try_once(self, system: str) -> None:
        name = system and self.entry_of(system).name
        self.world.effect(f"set-oneshot {name}")
        self.tell("once", self.world.once, name)
        self.world.once = name

    def tell(self, what: str, before: str, name: str) -> None:
        if name and before != name and self.world.nvram_full in (what, "both"):
            raise BentoError("No space left on device")

    def clear(self, before: str, once: str) -> None:
        self.world.effect("clear the loader's variables")
        self.world.once = "" if self.world.once == once else self.world.once
        self.world.effect("clear the default")
        self.world.preferred = before
        self.world.check()
        self.world.effect("clear the mark")
        self.world.mark = ""


class ModelLog:
    def __init__(self, world: World) -> None:
        self.world, self.kept = world, False

    def say(self, text: str) -> None:
        self.world.say("   " + text.replace(str(self.world.top) + "/store/", "")[:160])

    def cause(self) -> str:
        return "-"


class ModelMachine(Machine):
    """The door: the same class, but what it sees and does is the world's."""

    world: World

    def __init__(self, settings: client.Settings, directory: str = "", *, log: str = "") -> None:
        self.settings, self.directory = settings, directory
        self.log = ModelLog(self.world)  # type: ignore[assignment]
        self.loader = ModelLoader(self.world)
        self.session, self.watchdog = None, None
        self.state = self.written = self.world.files.get("state.json", client.State())

    @property
    def running(self) -> str:
        return self.world.path(self.world.running)

    @property
    def booted(self) -> str:
        return self.world.path(self.world.booted)

    @property
    def default(self) -> str:
        return self.world.path(self.world.default)

    @property
    def kept(self) -> str:
        return self.world.path(self.world.kept) if self.world.kept else ""

    @property
    def boot_id(self) -> str:
        return f"boot {self.world.boot}"

    @property
    def has_systemd(self) -> bool:
        return True

    def has_kernel_of(self, system: str) -> bool:
        systems = self.world.systems
        return systems[self.world.booted].kernel == systems[name_of(system)].kernel

    def switch_holder(self) -> str:
        return "somebody" if self.world.lock_held else ""

    def switch(self, system: str, action: str, token: str, *, back: bool = False) -> Done:
        return Done(*self.world.switch(name_of(system), action, not back))

    def start_list(self) -> bytes | None:
        return b"web.service" if self.world.start_list else None

    def has_bus(self) -> bool:
        return self.world.bus

    def sitting(self) -> str:
        return "alice" if self.world.seated else ""

    def note_active(self) -> None:
        pass

    def jobs(self) -> list[int]:
        return []

    def end_switches(self, pending: Pending) -> None:
        pass

    def nix_env(self, *words: str, profile: Path | None = None) -> None:
        self.world.nix_env(*words)

    def generations(self) -> dict[int, str]:
        return {number: self.world.path(name) for number, name in sorted(self.world.generations.items())}

    def write_menu(self, system: str) -> None:
        code, words = self.world.switch(name_of(system), "boot", False)
        if code:
            raise BentoError(words)

    def keep(self, system: str) -> None:
        if self.world.kept != name_of(system):
            self.world.effect(f"nix-env bento --set {name_of(system)}")
            self.world.kept, self.world.kept_number = name_of(system), self.world.kept_number + 1

    def trial_age_s(self) -> float:
        self.world.proofs = self.world.proofs or self.world.now_s
        return self.world.now_s - self.world.proofs

    def trial_mark(self, new: str) -> str:
        return f"{new} 900"

    def reboot(self, *, force: bool = False) -> None:
        self.world.effect("systemctl reboot")
        self.world.start()
        raise Rebooted


class ModelSession:
    server = SERVER

    def close(self) -> None:
        pass


class ModelClock:
    """Time passes between runs, and where somebody waits."""

    def __init__(self) -> None:
        self.world = World(Path())

    def time(self) -> float:
        return self.world.now_s

    monotonic = time
    CLOCK_BOOTTIME = 7

    def clock_gettime(self, clock: int) -> float:
        return self.world.now_s

    def sleep(self, seconds: float) -> None:
        self.world.now_s += seconds

    def localtime(self) -> Any:
        return gmtime(self.world.now_s)


@contextmanager
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[World], World]]:
    """Puts the model in the place of the machine; yields what makes a world the one that counts."""
    clock, current = ModelClock(), [World(Path())]

    def enter(world: World) -> World:
        clock.world = ModelMachine.world = current[0] = world
        for name in world.systems:
            world.make_store(name)
        (world.top / "state").mkdir(exist_ok=True)
        return world

    for name, door in make_doors(lambda: current[0]).items():
        monkeypatch.setattr(client, name, door, raising=name != "print")
    monkeypatch.setattr(client, "Machine", ModelMachine)
    monkeypatch.setattr(client, "time", clock)
    yield enter


def make_doors(world: Callable[[], World]) -> dict[str, Any]:
    """What else of the client reaches outside, by name."""

    def write_atomic(path: Path, record: Any, mode: int = 0o600) -> None:
        world().effect(f"write {path.name} {getattr(record, 'step', '')}")
        world().files[path.name] = record

    def clear_pending(machine: Machine) -> None:
        world().effect("clear the journal")
        world().files.pop("pending.json", None)

    def poll(*words: Any, **more: Any) -> tuple[ModelSession, Current]:
        if not world().network:
            raise Unreachable("cannot reach the server")
        size, published = 10, client.format_time(NOON_S)
        return ModelSession(), Current("toy", world().release, size, published)

    def knock(*words: Any) -> ModelSession:
        poll()
        return ModelSession()

    def probe_system(machine: Machine, system: str, limit_s: float) -> str | None:
        if world().person and machine is not None:
            world().person = False
            world().say("-- a person's nixos-rebuild switch, during the proof")
            before = world().default
            world().nixos_rebuild("v850", "switch")
            live = world().journal and world().files["pending.json"].step == client.Step.ACTIVATING
            world().theirs = world().default if live and world().default != before else ""
        return None if world().network else "cannot reach the server"

    def check_health(machine: Machine, system: str, give_up: float) -> client.Failure | None:
        return None if world().systems[world().running].healthy else client.Failure("a health check failed")

    @contextmanager
    def scratch(settings: client.Settings) -> Iterator[str]:
        yield "tmp"

    @contextmanager
    def lock(settings: client.Settings) -> Iterator[bool]:
        yield True

    @contextmanager
    def heartbeat(machine: Machine) -> Iterator[None]:
        yield

    def nothing(*words: Any, **more: Any) -> None:
        return None

    def bug(log: Any, error: Exception) -> str:
        raise Lost(f"a bug: {error!r}") from error

    def arm(machine: Machine, token: str, step: str, limit_s: float) -> None:
        machine.watchdog = step

    def say_report(machine: Machine, *words: Any) -> None:
        world().effect("report")

    return {
        "encode": lambda record: record, "read_journal": lambda path, parse, log: world().files.get(path.name),
        "write_atomic": write_atomic, "clear_pending": clear_pending, "poll": poll, "knock": knock,
        "runs_bento": lambda system: world().systems[name_of(system)].bento, "settings_of": lambda system: {},
        "FIRST_TRIAL_S": client.TRIAL_S, "tell_trial": lambda settings, word: False,
        "probe_system": probe_system, "probe_failure": lambda settings: probe_system(None, "", 0),  # type: ignore[arg-type]
        "check_health": check_health, "scratch": scratch, "lock": lock, "heartbeat": heartbeat, "arm": arm, "disarm": nothing,
        "report": say_report, "tell_bug": bug, "deliver": say_report, "announce": nothing, "keep_log": nothing,
        "refuse_volatile": nothing, "name_holder": nothing, "wait_for_units": nothing, "fetch": nothing,
        "is_untouched": lambda tree: True, "adopt": nothing, "build": lambda settings, log, commit, signed: world().path(world().published),
        "unfit_for_boot": nothing, "free_bytes": lambda path: 1 << 40, "sync_directory": nothing, "print": nothing,
        "Path": functools.lru_cache(None)(Path), "run_hooks": nothing,  # both for speed: nothing here has a hook
        "run": lambda argv, **more: Done(0, ""), "signal": type("Signal", (), {"alarm": staticmethod(lambda s: None)}),
    }  # fmt: skip
