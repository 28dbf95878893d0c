"""The facts: what the real NixOS does, row by row, as the toy does it."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toybuild import build, config, set_profile, switch
from toynixos import ToyDown, ToyMachine, need, need_root

Check = Callable[[ToyMachine], None]
FACTS: dict[str, Check] = {}


def fact(row: str) -> Callable[[Check], Check]:
    """The test of a row of the facts: they were read from nixpkgs, or seen with the real programs."""

    def add(check: Check) -> Check:
        assert row not in FACTS
        FACTS[row] = check
        return check

    return add


def running(machine: ToyMachine) -> Path:
    return (machine.root / "run/current-system").resolve()


def commit(machine: ToyMachine, system: Path, code: int = 0) -> str:
    """As a nixos-rebuild does: the profile, then the boot loader."""
    assert set_profile(machine, system) == 0
    done = switch(machine, system, "boot")
    assert done[0] == code, done[1]
    return done[1]


@fact("lock: at once exit 11, whatever is asked for")
def _(machine: ToyMachine) -> None:
    top = build(machine)
    with machine.hold_lock():
        for action in ("check", "test", "boot", "switch", "dry-activate"):
            assert switch(machine, top, action) == (11, "Could not acquire lock\n")
    assert machine.labels() == ("v0", "v0", "v0")


@fact("lock: that of 2024 waits for it")
def _(machine: ToyMachine) -> None:
    program = build(machine, stc="2024") / "bin/switch-to-configuration"
    with machine.hold_lock():
        process = subprocess.Popen([program, "test"], env=machine.env(), stderr=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert machine.current_label() == "v0"
    assert process.wait(20) == 0
    assert machine.current_label() == "v1"


@fact("inhibitors: a key in both systems with another value blocks; of the running system, not of the booted one")
def _(machine: ToyMachine) -> None:
    first, second = build(machine, inhibitors="dbus 1"), build(machine, label="v2", inhibitors="dbus 2")
    assert switch(machine, first, "test")[0] == 0, "a missing file is {}"
    code, said = switch(machine, second, "test")
    assert code == 1 and machine.current_label() == "v1"
    assert "Pre-switch check 'switchInhibitors' failed\nPre-switch checks failed\n" in said


@fact("inhibitors: keys that only one system has, and the spelling of the file, do not count")
def _(machine: ToyMachine) -> None:
    first = build(machine, inhibitors={"dbus": "1", "old": "1"})
    second = build(machine, label="v2", inhibitors={"new": "1", "dbus": "1"})
    third = build(machine, label="v3")
    for system in (first, second, third, first):
        assert switch(machine, system, "test")[0] == 0
        assert running(machine) == system


@fact("inhibitors: an earlier nixpkgs compared the bytes of the booted system's file")
def _(machine: ToyMachine) -> None:
    first = build(machine, inhibitors="dbus 1")
    commit(machine, first)
    machine.power_cycle()
    assert switch(machine, build(machine, label="v2", inhibitors={"other": "1"}, stc="bytes"), "test")[0] == 1
    assert switch(machine, build(machine, label="v3", stc="bytes"), "test")[0] == 0


@fact("inhibitors: boot and dry-activate do not check")
def _(machine: ToyMachine) -> None:
    assert switch(machine, build(machine, inhibitors="dbus 1"), "test")[0] == 0
    second = build(machine, label="v2", inhibitors="dbus 2")
    assert switch(machine, second, "dry-activate")[0] == 0
    commit(machine, second)
    machine.power_cycle()
    assert machine.labels() == ("v2", "v2", "v2")


@fact("inhibitors: NIXOS_NO_CHECK=1 goes over them")
def _(machine: ToyMachine) -> None:
    assert switch(machine, build(machine, inhibitors="dbus 1"), "test")[0] == 0
    assert switch(machine, build(machine, label="v2", inhibitors="dbus 2"), "test", NIXOS_NO_CHECK="1")[0] == 0


@fact("pre-switch checks: a user's own may refuse for a while, in its words; they come with boot, too")
def _(machine: ToyMachine) -> None:
    busy = machine.root / "busy"
    top = build(machine, pre_switch={"database": f"if [ -e {busy} ]; then echo a migration is under way for $2; exit 1; fi"})
    busy.touch()
    for action in ("check", "test", "boot", "dry-activate"):
        code, said = switch(machine, top, action)
        assert (code, machine.labels()) == (1, ("v0", "v0", "v0"))
        assert f"a migration is under way for {action}\nPre-switch check 'database' failed\n" in said
    busy.unlink()
    assert switch(machine, top, "test")[0] == 0


@fact("check: runs the checks and changes nothing")
def _(machine: ToyMachine) -> None:
    assert switch(machine, build(machine), "check") == (0, "")
    assert switch(machine, build(machine, pre_switch={"never": "false"}), "check")[0] == 1
    assert machine.labels() == ("v0", "v0", "v0")


@fact("check: older ones answer with usage, exit 1, and check nothing")
def _(machine: ToyMachine) -> None:
    top = build(machine, stc="2024", pre_switch={"never": "false"})
    assert switch(machine, top, "check") == (1, "Usage: switch-to-configuration [switch|boot|test|dry-activate]\n")
    assert switch(machine, top, "test")[0] == 0


@fact("exit codes: 2 the activation script, 4 units, and 4 overrides 2")
def _(machine: ToyMachine) -> None:
    assert switch(machine, build(machine, activation_command="false"), "test")[0] == 2
    code, said = switch(machine, build(machine, label="v2", activation_command="false", switch_exit=4), "test")
    assert (code, machine.current_label()) == (4, "v2")
    assert "warning: the following units failed: toy.service" in said


def units_of(machine: ToyMachine) -> set[str]:
    return set(os.listdir(machine.root / "run/toy-units"))


WEB: dict[str, Any] = {"units": {"web.service": "1"}, "starts": ["web.service"]}
NEWER: dict[str, Any] = WEB | {"label": "v2", "units": {"web.service": "2"}}


@fact("exit codes: 4 for a reload, or a user's activation, without a list of failed units")
def _(machine: ToyMachine) -> None:
    code, said = switch(machine, build(machine, reload_fails=["web.service"], user_activation_fails=["eve"]), "test")
    assert (code, machine.current_label()) == (4, "v1") and "units failed" not in said
    assert "Failed to reload web.service\n" in said and "warning: user activation for eve failed\n" in said


@fact("exit codes: the words of an activation script that failed are the same with 2 and with 4")
def _(machine: ToyMachine) -> None:
    for label, more in (("v1", {}), ("v2", {"reload_fails": ["a.service"]})):
        code, said = switch(machine, build(machine, label=label, activation_command="false", **more), "test")
        assert (code, "Failed to run activate script\n" in said) == (4 if more else 2, True)


@fact("a finished switch: start-list is gone; what changed was stopped and is started again")
def _(machine: ToyMachine) -> None:
    assert switch(machine, build(machine, **WEB), "test")[0] == 0
    assert units_of(machine) == {"web.service"}
    code, said = switch(machine, build(machine, **NEWER), "test")
    assert code == 0 and "stopping the following units: web.service\n" in said
    assert units_of(machine) == {"web.service"} and not (machine.root / "run/nixos/start-list").exists()


@fact("stc's own units: X-RestartIfChanged stands in [Service], and says nothing elsewhere")
def _(machine: ToyMachine) -> None:
    texts = {"a.service": "[Unit]\nX-RestartIfChanged=false\n[Service]\nN={}\n", "b.service": "[Service]\nX-RestartIfChanged=false\nN={}\n"}
    for number in (1, 2):
        units = {name: text.format(number) for name, text in texts.items()}
        code, said = switch(machine, build(machine, label=f"v{number}", units=units, starts=[*texts]), "test")
        assert code == 0
    assert "stopping the following units: a.service\n" in said


@fact("what a broken switch leaves: logind or a session goes away, exit 11 or 1 with NEW, and nothing is started")
def _(machine: ToyMachine) -> None:
    old, new = build(machine, **WEB), build(machine, **NEWER)
    logind, left = machine.root / "run/toy-logind", machine.root / "run/nixos/start-list"
    assert switch(machine, old, "test")[0] == 0
    for words, asked, said in (("silent", 11, "Unable to list users"), ("session git", 1, "Failed to get GID for git")):
        logind.write_text(words)
        code, output = switch(machine, new, "test")
        assert (code, said in output, machine.current_label(), units_of(machine)) == (asked, True, "v2", set())
        assert "web.service" in left.read_text()
    assert switch(machine, old, "test")[0] == 0, "the next one starts what stands in the list"
    assert units_of(machine) == {"web.service"} and not left.exists()


@fact("what a broken switch leaves: a bus that is stopped is gone until the next boot, and no switch gets any further")
def _(machine: ToyMachine) -> None:
    bus = {"dbus-daemon.service": ""}
    first = build(machine, units=WEB["units"] | bus, starts=[*WEB["starts"], *bus])
    assert switch(machine, first, "test")[0] == 0
    second = build(machine, **NEWER)
    for begun in (True, False):
        code, said = switch(machine, second, "test")
        assert (code, machine.current_label(), units_of(machine)) == (1, "v1", set())
        assert ("stopping the following units" in said) == begun
    assert "web.service" in (machine.root / "run/nixos/start-list").read_text()


@fact("what a broken switch leaves: that of 2024 that stops the bus never ends, and logind does not answer afterwards")
def _(machine: ToyMachine) -> None:
    bus = {"dbus.service": ""}
    assert switch(machine, build(machine, units=WEB["units"] | bus, starts=[*WEB["starts"], *bus]), "test")[0] == 0
    program = build(machine, stc="2024", **NEWER) / "bin/switch-to-configuration"
    process = subprocess.Popen([program, "test"], env=machine.env(), stderr=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.kill()
    process.wait()
    assert machine.current_label() == "v1" and not units_of(machine)
    assert "Unable to list users" in switch(machine, build(machine, label="v3"), "test")[1]


@fact("whose pre-switch checks: those of the system that is activated, on the way back, too")
def _(machine: ToyMachine) -> None:
    old, new = build(machine, pre_switch={"backupRuns": "[ $2 = dry-activate ]"}), build(machine, label="v2")
    assert switch(machine, new, "test")[0] == 0
    for action in ("test", "boot"):
        code, said = switch(machine, old, action)
        assert code == 1 and "Pre-switch check 'backupRuns' failed\n" in said and machine.current_label() == "v2"
    assert switch(machine, old, "test", NIXOS_NO_CHECK="1")[0] == switch(machine, old, "boot", NIXOS_NO_CHECK="1")[0] == 0


@fact("exit codes: 100 the init interface differs from the running system's")
def _(machine: ToyMachine) -> None:
    top = build(machine, init="systemd 3")
    assert switch(machine, top, "test")[0] == switch(machine, top, "dry-activate")[0] == 100
    assert machine.current_label() == "v0"
    commit(machine, top)
    machine.power_cycle()
    assert machine.labels() == ("v1", "v1", "v1")
    assert switch(machine, top, "test")[0] == 0


@fact("exit codes: the boot loader failed, 1; that of 2024 another errno")
def _(machine: ToyMachine) -> None:
    machine.limit_boot(100)
    assert "No space left" in commit(machine, build(machine, kernel="7"), code=1)
    commit(machine, build(machine, label="v2", kernel="7", stc="2024"), code=17)


@fact("after test: an activation that gives up never sets /run/current-system, and 4 hides it")
def _(machine: ToyMachine) -> None:
    assert switch(machine, build(machine, gives_up=True), "test")[0] == 2
    assert switch(machine, build(machine, gives_up=True, switch_exit=4), "test")[0] == 4
    assert machine.current_label() == "v0"
    assert (machine.root / "etc/toy").read_text() == "v1\n", "half of it is the new system's"


@fact("boot still under way: that of 2024 waits for its end, today's does not")
def _(machine: ToyMachine) -> None:
    program = build(machine, stc="2024") / "bin/switch-to-configuration"
    booting = machine.root / "run/toy-booting"
    booting.touch()
    process = subprocess.Popen([program, "test"], env=machine.env(), stderr=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    booting.unlink()
    assert process.wait(20) == 0
    booting.touch()
    assert switch(machine, build(machine, label="v2"), "test")[0] == 0


@fact("specialisations: a system of its own, below the other's; it runs, and is booted, by itself")
def _(machine: ToyMachine) -> None:
    top = build(machine, specialisations={"desk": {"label": "v1-desk"}})
    desk = (top / "specialisation/desk").resolve()
    assert desk.parent == top.parent and desk != top
    assert switch(machine, top / "specialisation/desk", "test")[0] == 0
    assert running(machine) == desk
    commit(machine, top)
    assert machine.entries() == {
        "nixos-generation-2.conf": "v1",
        "nixos-generation-2-specialisation-desk.conf": "v1-desk",
        "nixos-generation-1.conf": "v0",
    }
    assert machine.power_cycle(pick="nixos-generation-2-specialisation-desk.conf") == ["boots v1-desk"]
    assert machine.labels() == ("v1-desk", "v1", "v1") and machine.booted_label() == "v1-desk"


@fact("entries: by generation, with init=TOPLEVEL/init in the options, and files of the whole kernel and initrd")
def _(machine: ToyMachine) -> None:
    top = build(machine, kernel="7")
    commit(machine, top)
    text = (machine.root / "boot/loader/entries/nixos-generation-2.conf").read_text()
    assert f"options init={top}/init loglevel=4 panic=30" in text
    for part in ("kernel", "initrd"):
        image = (top / part).resolve()
        assert f"/EFI/nixos/{image.parent.name}-{image.name}.efi" in text
        copy = machine.root / "boot/EFI/nixos" / f"{image.parent.name}-{image.name}.efi"
        assert copy.read_bytes() == image.read_bytes()
    assert "default nixos-generation-2.conf" in (machine.root / "boot/loader/loader.conf").read_text()


@fact("entries: after nixpkgs PR 447173 they are named by what is in them")
def _(machine: ToyMachine) -> None:
    for label in ("v1", "v2"):
        commit(machine, build(machine, label=label, entry_names="sha256"))
    assert list(machine.entries().values()) == ["v2", "v1", "v0"]
    assert all(re.fullmatch("nixos-[0-9a-f]{64}.conf", name) for name in machine.entries())
    assert machine.power_cycle() == ["boots v2"]


@fact("which generations: all links, at most configurationLimit of them, newest first; their kernels go with them")
def _(machine: ToyMachine) -> None:
    for number in range(1, 5):
        commit(machine, build(machine, label=f"v{number}", kernel=str(number), configuration_limit=3))
    assert list(machine.entries().values()) == ["v4", "v3", "v2"]
    assert len(list((machine.root / "boot/EFI/nixos").iterdir())) == 2 * 3
    assert machine.generations() == ["v0", "v1", "v2", "v3", "v4"]


@fact("which generations: nix-collect-garbage -d leaves the current one; the booted system then has no entry")
def _(machine: ToyMachine) -> None:
    old, top = running(machine), build(machine)
    commit(machine, top)
    later = build(machine, label="v2")
    (machine.root / "result").unlink()
    machine.collect_garbage()
    assert machine.generations() == ["v1"] and len(machine.entries()) == 2, "the boot loader is not written by it"
    assert old.exists() and top.exists() and not later.exists(), "what runs is kept"
    assert switch(machine, top, "boot")[0] == 0
    assert list(machine.entries().values()) == ["v1"]


@fact("systemd-boot's builder: entries for each system profile, with a limit each; loader.conf names the last of the default")
def _(machine: ToyMachine) -> None:
    profile = machine.profile.parent / "system-profiles/mine"
    profile.parent.mkdir()
    for number in range(1, 4):
        top = build(machine, label=f"v{number}", configuration_limit=2)
        machine.run("nix-env", "-p", profile, "--set", top).check_returncode()
        commit(machine, top)
    names = ["nixos-generation-3", "nixos-generation-4", "nixos-mine-generation-2", "nixos-mine-generation-3"]
    assert sorted(machine.entries()) == [f"{name}.conf" for name in names]
    assert "default nixos-mine-generation-3.conf" in (machine.root / "boot/loader/loader.conf").read_text()
    machine.collect_garbage()
    assert switch(machine, top, "boot")[0] == 0
    assert sorted(machine.entries().values()) == ["v3", "v3"]


@fact("which generations: --delete-generations removes the links, never the current one")
def _(machine: ToyMachine) -> None:
    commit(machine, build(machine))
    argv = ("nix-env", "-p", machine.profile, "--delete-generations")
    assert "cannot delete current version" in machine.run(*argv, "2").stdout
    assert machine.run(*argv, "1").stdout == "removing profile version 1\n"
    assert machine.generations() == ["v1"]
    listed = machine.run("nix-env", "-p", machine.profile, "--list-generations").stdout
    assert re.fullmatch(r" +2   \S+ \S+   \(current\)\n", listed)


@fact("ENOSPC: the old builder leaves a truncated kernel, and says 0 the next time")
def _(machine: ToyMachine) -> None:
    top = build(machine, kernel="7", builder="old")
    machine.limit_boot(1000)
    commit(machine, top, code=1)
    machine.limit_boot(None)
    commit(machine, top)
    assert machine.boot_label() == "v1"
    with pytest.raises(ToyDown, match="cannot be started v1"):
        machine.power_cycle()
    assert machine.power_cycle(pick="1") == ["boots v0"]


@fact("ENOSPC: with extraInstallCommands a failed copy could exit 0")
def _(machine: ToyMachine) -> None:
    machine.limit_boot(1000)
    commit(machine, build(machine, kernel="7", builder="lies"))
    assert machine.labels() == ("v0", "v1", "v0")


@fact("ENOSPC: today's fails, and mends it when there is room")
def _(machine: ToyMachine) -> None:
    top = build(machine, kernel="7")
    machine.limit_boot(1000)
    commit(machine, top, code=1)
    assert machine.power_cycle() == ["boots v0"]
    machine.limit_boot(None)
    commit(machine, top)
    assert machine.power_cycle() == ["boots v1"]


@fact("ENOSPC: EINVAL is swallowed")
def _(machine: ToyMachine) -> None:
    said = commit(machine, build(machine, boot_einval=True))
    assert "ignoring default profile" in said and list(machine.entries().values()) == ["v0"]
    assert machine.power_cycle() == ["boots v0"]


def bootctl(machine: ToyMachine, *words: str) -> None:
    machine.run("bootctl", *words).check_returncode()


@fact("one boot: set-oneshot is used up when the loader starts, before the kernel, whatever is then chosen")
def _(machine: ToyMachine) -> None:
    commit(machine, build(machine))
    bootctl(machine, "set-oneshot", "nixos-generation-1.conf")
    assert machine.boot_label() == "v0" and machine.fallback_label() == "v1"
    assert machine.power_cycle(pick="2") == ["boots v1"]
    assert machine.efi_variable("LoaderEntryOneShot") is None
    bootctl(machine, "set-oneshot", "nixos-generation-1.conf")
    assert machine.power_cycle() == ["boots v0"]
    assert machine.power_cycle() == ["boots v1"]


@fact("one boot: without EFI variables nothing can be set; boot counting is by the entry's name")
def _(machine: ToyMachine) -> None:
    shutil.rmtree(machine.root / "sys")
    done = machine.run("bootctl", "set-oneshot", "nixos-generation-1.conf")
    assert (done.returncode, done.stdout) == (1, "Not booted with UEFI.\n")
    commit(machine, build(machine, kernel_params=["toy.panic", "panic=30"]))
    entries = machine.root / "boot/loader/entries"
    (entries / "nixos-generation-2.conf").rename(entries / "nixos-generation-2+1.conf")
    assert machine.power_cycle() == ["panics v1", "boots v0"]
    assert sorted(os.listdir(entries)) == ["nixos-generation-1.conf", "nixos-generation-2+0-1.conf"]


@fact("one boot: extlinux can do nothing")
def _(machine: ToyMachine) -> None:
    shutil.rmtree(machine.root / "boot")
    (machine.root / "boot").mkdir()
    commit(machine, build(machine, loader="extlinux", kernel="panic"))
    assert machine.run("bootctl", "list").returncode == 1
    with pytest.raises(ToyDown):
        machine.power_cycle()


@fact("default and one boot together: a panic leads back by itself; with the default cleared, NEW is it again")
def _(machine: ToyMachine) -> None:
    bootctl(machine, "set-default", "nixos-generation-1.conf")
    commit(machine, build(machine, kernel="panic"))
    bootctl(machine, "set-oneshot", "nixos-generation-2.conf")
    assert machine.power_cycle() == ["panics v1", "boots v0"]
    commit(machine, build(machine, label="v2"))
    bootctl(machine, "set-oneshot", "nixos-generation-3.conf")
    assert machine.power_cycle() == ["boots v2"]
    assert machine.fallback_label() == "v0"
    bootctl(machine, "set-default", "")
    assert machine.power_cycle() == ["boots v2"]


@fact("what stays: set-default beats what a person makes the default; a default without an entry is none")
def _(machine: ToyMachine) -> None:
    bootctl(machine, "set-default", "nixos-generation-1.conf")
    assert machine.rebuild("switch", config(machine)).returncode == 0
    assert machine.power_cycle() == ["boots v0"]
    (machine.root / "boot/loader/entries/nixos-generation-1.conf").unlink()
    assert machine.power_cycle() == ["boots v1"]
    commit(machine, build(machine, label="v2"))
    (machine.root / "boot/loader/loader.conf").write_text("default nixos-generation-9.conf\n")
    (machine.root / "boot/loader/entries/nixos-generation-1.conf").unlink()
    assert machine.power_cycle() == ["boots v2"], "the newest is the first of the menu"


@fact("what stays: a resume goes through the loader, uses up the one shot, and needs the kernel that went to sleep")
def _(machine: ToyMachine) -> None:
    before = (machine.root / "proc/sys/kernel/random/boot_id").read_text()
    commit(machine, build(machine))
    bootctl(machine, "set-oneshot", "nixos-generation-2.conf")
    assert machine.hibernate() == []
    assert machine.current_label() == "v0" and machine.efi_variable("LoaderEntryOneShot") is None
    assert (machine.root / "proc/sys/kernel/random/boot_id").read_text() == before
    commit(machine, build(machine, label="v2", kernel="7"))
    assert machine.hibernate() == ["boots v2"]
    assert (machine.root / "proc/sys/kernel/random/boot_id").read_text() != before


@fact("a panic: the machine boots again by itself only with panic=N; one that hangs needs somebody")
def _(machine: ToyMachine) -> None:
    for behaviour in ({"kernel": "panic", "kernel_params": ["loglevel=4"]}, {"kernel": "hang"}):
        commit(machine, build(machine, label=str(behaviour["kernel"]), **behaviour))
        bootctl(machine, "set-default", "nixos-generation-1.conf")
        bootctl(machine, "set-oneshot", f"nixos-generation-{len(machine.generations())}.conf")
        with pytest.raises(ToyDown):
            machine.power_cycle()
        assert machine.power_cycle() == ["boots v0"]


@fact("not only kernels: kernel-params take effect at a boot only")
def _(machine: ToyMachine) -> None:
    top = build(machine, kernel_params=["toy.no-network", "panic=30"])
    assert os.readlink(top / "kernel") == os.readlink(running(machine) / "kernel")
    assert switch(machine, top, "test")[0] == 0
    commit(machine, top)
    assert machine.network() == "up"
    machine.power_cycle()
    assert machine.network() == "down"
    assert f"init={top}/init toy.no-network panic=30" in (machine.root / "proc/cmdline").read_text()


@fact("a system that leaves Bento says so, and has no client")
def _(machine: ToyMachine) -> None:
    assert switch(machine, build(machine), "test")[0] == 0
    top = build(machine, leaves=True)
    assert not (top / "sw/bin/bento-client").exists() and not (top / "etc/bento/client.json").exists()
    assert switch(machine, top, "test")[0] == 0
    assert os.listdir(machine.root / "etc/bento") == ["left"]


@fact("a private Git input: what went wrong stands above")
def _(machine: ToyMachine) -> None:
    done = machine.rebuild("build", config(machine, build="git"))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "git@git.example: Permission denied (publickey)." in lines
    assert lines[-1].strip() == "error: program 'git' failed with exit code 128"


@fact("a failed dependency, in newer words")
def _(machine: ToyMachine) -> None:
    done = machine.rebuild("build", config(machine, build="dependency-2.31", dependency="linux-6.12.7"))
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert re.fullmatch(r"error: Cannot build '\S+-linux-6.12.7.drv'.", errors[0])
    assert re.fullmatch(r"error: Cannot build '\S+-nixos-system-toy-v1.drv'.", errors[-1])
    assert "       Last 3 log lines:\n       > " in done.stdout


@pytest.mark.parametrize("row", FACTS)
def test_facts(row: str, simulated: ToyMachine) -> None:
    FACTS[row](simulated)


def test_a_failed_assertion(machine: ToyMachine) -> None:
    """A bare error: line, then `Failed assertions:`, then `- …` lines over several lines."""
    said = ["the first\nhas a second line", "another one"]
    done = machine.rebuild("build", config(machine, build="assertions", assertions=said))
    assert done.returncode == 1
    lines = [line.strip() for line in done.stdout.splitlines()]
    at = lines.index("Failed assertions:")
    assert lines[at - 1] == "error:"
    assert lines[at + 1 : at + 4] == ["- the first", "has a second line", "- another one"]


def test_a_failed_dependency(machine: ToyMachine) -> None:
    """The first error names the package, and the last one only says that there was one."""
    dependency = f"firefox-{time.time_ns()}"
    done = machine.rebuild("build", config(machine, label=f"dep{time.time_ns()}", build="dependency", dependency=dependency))
    assert done.returncode == 1
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(rf"error: builder for '\S+-{dependency}.drv' failed with exit code 2;?", errors[0])
    assert any("1 dependencies of derivation" in line for line in errors[1:])
    assert re.search(r"last \d+ log lines:\n +> checking ", done.stdout)


def test_specialisations_with_nix(machine: ToyMachine) -> None:
    top = build(machine, specialisations={"desk": {"label": "v1-desk", "kernel": "7"}})
    desk = (top / "specialisation/desk").resolve()
    assert desk.name.endswith("-nixos-system-toy-v1-desk")
    assert (desk / "nixos-version").read_text() == "v1-desk\n" and not (desk / "specialisation").exists()
    assert os.readlink(desk / "kernel") != os.readlink(top / "kernel")


def test_last_lines_of_ng(machine: ToyMachine) -> None:
    done = machine.rebuild("build", config(machine, rebuild="ng"))
    assert done.stdout.splitlines()[-1] == f"Done. The new configuration is {(machine.root / 'result').resolve()}"
    done = machine.rebuild("build", config(machine, rebuild="ng", build="eval-error"))
    assert re.fullmatch(r"Command '\[.*\]' returned non-zero exit status 1\.", done.stdout.splitlines()[-1])


def test_bootctl_lists_as_the_real_one_does(simulated: ToyMachine) -> None:
    """The same ESP, on a file system of its own, seen by the program of this machine's systemd."""
    need_root()
    real = need("bootctl")
    for number in range(2, 12):
        commit(simulated, build(simulated, label=f"v{number}", specialisations={"desk": {}} if number == 3 else {}))
    script = """
        cp -a "$1/boot" "$1/kept-$3" && mount -t tmpfs toy "$1/boot" && cp -a "$1/kept-$3/." "$1/boot/" || exit 1
        exec "$2" list --esp-path="$1/boot" --json=short
    """
    env = {"SYSTEMD_RELAX_ESP_CHECKS": "1", "TOY_BOOTCTL": "252"}
    ours, theirs = (
        simulated.run("unshare", "-m", "sh", "-c", script, "sh", simulated.root, program, name, env=env).stdout
        for name, program in (("toy", "bootctl"), ("real", real))
    )
    decoder, seen = json.JSONDecoder(), []
    for text in (ours, theirs):
        found, rest = [], text.strip()
        while rest:
            one, end = decoder.raw_decode(rest)
            found += one if isinstance(one, list) else [one]
            rest = rest[end:].strip()
        seen.append([{name: entry.get(name) for name in json.loads(ours.splitlines()[0])} for entry in found])
    assert len(seen[0]) == 12 and seen[0] == seen[1]
