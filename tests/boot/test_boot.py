"""The first boot is a trial: real boot loaders, kernels and systemd, and the real client's `run`.

    tests/run tests/boot                this commit's share of it, as in CI
    tests/run --whole tests/boot        all of it, and its table in tests/boot/table.md

v0 is what the machine runs, v1 the release that is tried, v2 a good one after it. A kernel's version is its fate: see
initrd.py. `at_rest`: running, booted, the profile, nothing armed, no journal.
"""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from boot.bed import Bed, Seen, at_rest
from boot.image import GRUB_BTRFS, GRUB_EXT4, GRUB_VFAT, SYSTEMD_BOOT, Kind
from boot.machine import wait_for

Beds = Callable[[Kind], Bed]


@pytest.fixture
def bed(beds: Beds, request: pytest.FixtureRequest) -> Bed:
    kind: Kind = getattr(request, "param", SYSTEMD_BOOT)
    return beds(kind)


def on(*kinds: Kind) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bed", kinds, indirect=True, ids=lambda kind: kind.name)


def rests(bed: Bed, label: str, result: str) -> Callable[[Seen], bool]:
    return lambda seen: seen.settled == at_rest(label) and bed.result()[0] == result


def arms(label: str) -> Callable[[Seen], bool]:
    return lambda seen: seen.once == label


def is_given_up(bed: Bed) -> None:
    """Back by itself, and not tried again for a day."""
    bed.wait(rests(bed, "v0", "rolled-back"), "v1 given up", timeout_s=900)
    assert bed.failures() == ["rolled-back"]


# --- what comes of a new kernel ---


@on(SYSTEMD_BOOT, GRUB_EXT4, GRUB_VFAT)
def test_good(bed: Bed) -> None:
    """Proven, the default, and nothing is left armed."""
    bed.publish("v1", kernel="6.13")
    bed.boot()
    seen = bed.wait(rests(bed, "v1", "ok"), "v1 at rest")
    assert seen.way == bed.kind.loader
    assert len(bed.machine.boots) == 2  # v0, and v1
    assert bed.failures() == []


@pytest.mark.parametrize(
    "bed",
    [SYSTEMD_BOOT, GRUB_EXT4, GRUB_VFAT],
    indirect=True,
    ids=lambda kind: kind.name,
)
def test_panic(bed: Bed) -> None:
    bed.publish("v1", kernel="panic-6.13")
    bed.boot()
    is_given_up(bed)
    assert bed.machine.console_text().count("stage 1: kernel panic-6.13") == len(bed.failures())


def test_the_next_release_after_a_panic(bed: Bed) -> None:
    bed.publish("v1", kernel="panic-6.13")
    bed.boot()
    bed.wait(rests(bed, "v0", "rolled-back"), "v1 given up")
    bed.publish("v2", kernel="6.14")
    bed.wait(rests(bed, "v2", "ok"), "v2 at rest")


@pytest.mark.parametrize("params", [["toy.fail"], ["toy.rootless"]], ids=["initrd fails", "no root"])
def test_stage_1_fails(bed: Bed, params: list[str]) -> None:
    bed.publish("v1", more_params=params)
    bed.boot()
    is_given_up(bed)


@on(SYSTEMD_BOOT, GRUB_EXT4)
def test_emergency_mode(bed: Bed) -> None:
    """Where somebody has switched it on. It is live at first: only the boot meets the file system that does not mount."""
    mount = "[Unit]\nConditionKernelCommandLine=toy.emergency\n[Mount]\nWhat=nothing\nWhere=/mnt\nType=nosuchfs\n"
    units = bed.behaviour("v1")["units"] | {"mnt.mount": mount}
    bed.publish("v1", units=units, more_params=["toy.emergency"])
    bed.boot()
    is_given_up(bed)
    assert bed.machine.console_text().count("emergency.target") >= 2


WAITS = """[Unit]
Description=waits before sysinit.target, as a disk, a pool or a passphrase does
DefaultDependencies=no
ConditionKernelCommandLine=toy.waits
Before=sysinit.target
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh -c 'echo "lab: waits" >/dev/console; {}'
"""
# In place of the deadline of at least 15 minutes; and the words of what ends the trial are to be seen when it begins, too.
SOON_S = 60
SOON = f"""
cd /bento && python3 -I -c '
import sys
sys.path.insert(0, "/bento")
import bento_client as b
loader = b.find_loader(b.read_settings({{"config": "/etc/bento/client.json"}}))
system, *_ = loader.armed().mark.split()
loader.write_mark(f"{{system}} {SOON_S}")
' && sync && systemctl reboot
"""
TOLD = re.compile(r"\[ *([0-9.]+)\] bento: (a trial, for|the trial is over)")


def deadline_s(bed: Bed) -> float:
    """From the beginning of what ends the trial to the reset, by the kernel's clock."""
    began, over = (float(found[1]) for found in TOLD.finditer(bed.machine.console_text()))
    return over - began


HANGS: dict[str, dict[str, Any]] = {
    "the initrd waits": {"kernel": "hang-6.13"},
    "a unit before sysinit waits": {"more_params": ["toy.waits"], "wait": "exec sleep infinity"},
    "systemd has crashed, and there is no watchdog": {"more_params": ["toy.waits"], "wait": "kill -SEGV 1; exec sleep infinity"},
}


@pytest.mark.parametrize("what", HANGS)
def test_hang(bed: Bed, what: str) -> None:
    """Nothing of the new system has to work for it to end: in the lab after 60 s."""
    behaviour = dict(HANGS[what])
    if wait := behaviour.pop("wait", ""):
        behaviour |= {"units": bed.behaviour("v1")["units"] | {"c-wait.service": WAITS.format(wait)}}
        behaviour |= {"starts": ["bento-trial.service", "c-wait.service"], "kernel": "6.13"}
    bed.machine.watchdog = "no watchdog" not in what
    more = [*behaviour.pop("more_params", []), "loglevel=6"]
    bed.publish("v1", settings={"reboot": "never"}, more_params=more, **behaviour)
    bed.boot()
    bed.wait(arms("v1"), "armed")
    bed.machine.order(SOON)
    bed.wait_console("bento: the trial is over")
    is_given_up(bed)
    assert SOON_S <= deadline_s(bed) < SOON_S + 15
    assert "its deadline ended the trial" in bed.result()[1]


def test_interrupts_off_in_the_initrd(bed: Bed) -> None:
    """A kernel that does nothing any more feeds no watchdog."""
    bed.machine.extra = ("-gdb", f"unix:{bed.machine.directory}/gdb,server=on,wait=off")
    bed.publish("v1", kernel="hang-6.13")
    bed.boot()
    bed.wait_console("stage 1: hangs")
    bed.machine.freeze()
    frozen = time.monotonic()
    bed.machine.extra = ()
    wait_for(bed.machine.tend, 60, "a reset")
    assert time.monotonic() - frozen < 45  # the dog's 30 s, on a busy machine
    is_given_up(bed)
    assert "bento: the trial is over" not in bed.machine.console_text()


def test_a_proven_system_takes_its_time(bed: Bed) -> None:
    """Three minutes before sysinit.target, for its disks: it has no deadline any more."""
    slow = WAITS.format("sleep 180")
    units = bed.behaviour("v1")["units"] | {"c-wait.service": slow}
    bed.publish("v1", kernel="6.13", units=units, more_params=["toy.waits"], starts=["bento-trial.service", "c-wait.service"])
    bed.boot()
    bed.wait(rests(bed, "v1", "ok"), "v1 at rest")
    boots = len(bed.machine.boots)
    bed.machine.order("systemctl reboot")
    bed.wait_console("lab: waits", 2)
    time.sleep(200)
    bed.wait(lambda seen: seen.settled == at_rest("v1"), "v1 at rest")
    assert len(bed.machine.boots) == boots + 1 and "the trial is over" not in bed.machine.console_text()


def test_dead_network(bed: Bed) -> None:
    """The new kernel has none: back by itself, and the old one is compared with it."""
    bed.publish("v1", kernel="broken-6.13", settings={"confirm_timeout": 12, "connect_timeout": 5})
    bed.boot()
    is_given_up(bed)
    assert bed.result()[1].startswith("after the boot, ")


# --- power cuts ---

CUTS = {
    "before the arming": "set-default entry",
    "between the two variables": "set-oneshot entry",
    "while the default is being cleared": "set-default ",
}


@pytest.mark.parametrize("when", CUTS)
def test_power_cut_at_a_variable(bed: Bed, when: str) -> None:
    """Never is the boot default a system that has not booted; and the release is tried once more."""
    bed.boot()
    bed.machine.run(f"printf %s '{CUTS[when]}' >/etc/lab/hold; sync")
    bed.publish("v1", kernel="6.13")
    bed.wait_console("lab: held at")
    bed.power_cycle()
    assert bed.booted() == "v0"
    bed.wait(lambda seen: seen.settled == at_rest("v1"), "v1 at rest", timeout_s=1500)


@pytest.mark.parametrize("when", ["in the firmware", "in the trial"])
def test_power_cut_in_the_trial(bed: Bed, when: str) -> None:
    """It is one of the tries."""
    bed.publish("v1", kernel="6.13")
    bed.boot()
    bed.wait_console("reboot: Restarting system" if "firmware" in when else "stage 1: kernel 6.13")
    bed.power_cycle()
    bed.wait(lambda seen: seen.settled == at_rest("v1"), "v1 at rest", timeout_s=1500)


def test_power_cut_during_the_proof(bed: Bed) -> None:
    checks = ['[ "$(cat /run/booted-system/nixos-version)" = v0 ] || [ -e /var/tried ] || { touch /var/tried; sync; '
              'echo "lab: proving" >/dev/console; sleep 25; }']  # fmt: skip
    bed.publish("v1", kernel="6.13", settings={"health_checks": checks, "confirm_timeout": 60})
    bed.boot()
    bed.wait_console("lab: proving")
    bed.power_cycle()
    bed.wait(lambda seen: seen.settled == at_rest("v1"), "v1 at rest", timeout_s=1500)


def test_server_away_in_the_trial(bed: Bed) -> None:
    """A site's power cut is not the release's fault."""
    bed.publish("v1", kernel="6.13")
    bed.boot()
    bed.wait_console("stage 1: kernel 6.13")
    bed.server.stop()
    bed.machine.wait_boot(timeout_s=300)
    bed.wait_console("cannot reach")
    bed.server.start()
    bed.wait(rests(bed, "v1", "ok"), "v1 at rest", timeout_s=900)
    assert bed.failures() == []


# --- the boot loader's files ---


@pytest.mark.parametrize("builder", ["today", "old", "lies"])
def test_full_esp(bed: Bed, builder: str) -> None:
    """Also with the builders that leave half a kernel, one of which says that all is well."""
    bed.boot()
    bed.machine.run("free=$(df --output=avail -k /boot | tail -n 1); head -c $((free - 4096))k /dev/zero >/boot/filler; sync")
    bed.publish("v1", kernel="6.13", **({} if builder == "today" else {"builder": builder}))
    bed.wait(rests(bed, "v0", "postponed"), "v0 at rest")
    bed.machine.run("rm /boot/filler")
    bed.power_cycle()
    assert bed.booted() == "v0"


@on(SYSTEMD_BOOT, GRUB_EXT4, GRUB_VFAT)
def test_limit_of_two_entries(bed: Bed) -> None:
    """The second release that waits for a boot would take the entry of the system that is known to boot."""
    bed.boot()
    for label in ("v1", "v2"):
        bed.publish(label, kernel="panic-6.13", settings={"reboot": "never"}, configuration_limit=2)
        seen = bed.wait(arms(label), f"{label} armed")
    assert (seen.default, seen.entries) == ("v0", ["v0", "v1", "v2"])
    bed.power_cycle()
    assert bed.booted() == "v0"


def test_entry_collected(bed: Bed) -> None:
    """The system that is known to boot keeps its entry, also from nix-collect-garbage -d in the meantime."""
    bed.publish("v1", kernel="panic-6.13", settings={"reboot": "never"})
    bed.boot()
    armed = bed.wait(arms("v1"), "armed")
    assert (armed.running, armed.booted, armed.default) == ("v1", "v0", "v0")
    bed.machine.run("nix-collect-garbage -d; /run/current-system/bin/switch-to-configuration boot")
    bed.machine.order("systemctl reboot")
    bed.machine.wait_boot(timeout_s=300)
    assert bed.booted() == "v0"


@on(SYSTEMD_BOOT, GRUB_EXT4)
def test_generation_collected(bed: Bed) -> None:
    """It comes back under the number, and with GRUB of the day, that its entry is named by: the next `boot` keeps the entry."""
    bed.publish("v1", kernel="panic-6.13", settings={"reboot": "never"})
    bed.boot()
    bed.wait(arms("v1"), "armed")
    bed.publish("v2", kernel="panic-6.14", settings={"reboot": "never"})
    bed.wait(arms("v2"), "armed again")
    bed.machine.run("touch -hd '2020-02-02 12:00' /nix/var/nix/profiles/system-1-link; /run/current-system/bin/switch-to-configuration boot")
    bed.update()
    bed.machine.run("nix-collect-garbage -d")
    bed.update()
    bed.machine.run("/run/current-system/bin/switch-to-configuration boot")
    bed.power_cycle()
    assert bed.booted() == "v0"


# --- a person's hand ---


def test_reboot_never(bed: Bed) -> None:
    """It waits for a person's reboot, which is the trial."""
    bed.publish("v1", kernel="6.13", settings={"reboot": "never"})
    bed.boot()
    seen = bed.wait(arms("v1"), "armed")
    assert (seen.running, seen.booted, seen.profile, seen.default) == ("v1", "v0", "v1", "v0")
    bed.machine.order("systemctl reboot")
    bed.machine.wait_boot(timeout_s=300)
    bed.wait(lambda seen: seen.settled == at_rest("v1"), "v1 at rest")


def test_the_old_entry_is_picked(bed: Bed) -> None:
    """By a one shot of a person's: it is left alone, at each poll and at the shutdown. Then comes the trial; and later, too."""
    bed.publish("v1", kernel="6.13", settings={"reboot": "never"})
    bed.boot()
    bed.wait(arms("v1"), "armed")
    pick = "bootctl set-oneshot nixos-generation-1.conf; systemctl start bento.service; sleep 5; systemctl reboot"
    bed.machine.order(pick)
    bed.machine.wait_boot(timeout_s=300)
    bed.wait(arms("v1"), "armed again", timeout_s=900)
    assert bed.booted() == "v0" and bed.failures() == []
    bed.machine.order("systemctl reboot")
    bed.machine.wait_boot(timeout_s=300)
    bed.wait(lambda seen: seen.settled == at_rest("v1"), "v1 at rest")
    bed.machine.order(pick)
    bed.machine.wait_boot(timeout_s=300)
    bed.update()
    seen = bed.look()
    assert (seen.running, seen.profile, seen.default, seen.once) == ("v0", "v1", "", "")


def test_nixos_rebuild_by_hand_while_armed(bed: Bed) -> None:
    """Theirs is the default at the next run at the latest; nothing of ours stays."""
    bed.publish("v1", kernel="6.13", settings={"reboot": "never"})
    bed.boot()
    bed.wait(arms("v1"), "armed")
    place = bed.write_config("own", kernel="6.15", settings={"reboot": "never"})
    bed.machine.run(f"PATH=/opt/lab/bin:$PATH TOY_ROOT=/ nixos-rebuild switch --flake path:{place}#toy", timeout_s=300)
    bed.update()
    seen = bed.look()
    assert (seen.profile, seen.default, seen.once) == ("own", "", "")
    bed.machine.order("systemctl reboot")
    bed.machine.wait_boot(timeout_s=300)
    assert bed.booted() == "own"


def test_another_system_from_the_menu(bed: Bed) -> None:
    """The loader has used up the one shot: one of the tries, not a verdict."""
    bed.publish("v1", kernel="6.13", settings={"reboot": "never"})
    bed.boot()
    bed.wait(arms("v1"), "armed")
    bed.machine.run("bootctl set-oneshot auto-reboot-to-firmware-setup; sync")
    bed.machine.power_cut()
    bed.machine.power_on()
    for _ in range(40):  # the loader resets the machine, into the firmware's menu; which waits for a key
        time.sleep(1)
        bed.machine.tend()
    bed.power_cycle()
    bed.wait(lambda seen: bed.result()[0] in ("rolled-back", "ok"), "no verdict for good")


def test_variables_that_forget(bed: Bed) -> None:
    """Fresh NVRAM in a trial: the boot is proven all the same, and it is said."""
    bed.publish("v1", kernel="6.13", settings={"reboot": "never"})
    bed.boot()
    bed.wait(arms("v1"), "armed")
    bed.machine.run("sync")
    bed.machine.power_cut()
    bed.machine.forget_variables()
    bed.machine.boot()
    bed.wait(lambda seen: seen.settled == at_rest("v1"), "v1 at rest")
    bed.wait_report(lambda report: "forgot" in (report.get("boot_trial") or ""), "said")


# --- where there is no trial ---


@on(GRUB_BTRFS)
def test_grub_cannot_write(bed: Bed) -> None:
    """It would start the one trial again and again: there is none, and it is said."""
    bed.publish("v1", kernel="6.13", settings={"reboot_without_trial": True})
    bed.boot()
    seen = bed.wait(rests(bed, "v1", "ok"), "v1 at rest")
    assert seen.way == "none: GRUB cannot write to /boot/grub (btrfs)"
    assert not bed.machine.run("ls /boot/grub").split().count("grubenv")


def test_no_efi_variables(bed: Bed) -> None:
    bed.publish("v1", kernel="6.13", more_params=["efi=noruntime"])
    bed.boot()
    seen = bed.wait(rests(bed, "v1", "ok"), "v1 at rest")
    assert seen.way == "none: this machine was booted without EFI variables"
    bed.publish("v2", kernel="6.14", more_params=["efi=noruntime"], settings={"reboot_without_trial": True})
    bed.wait(rests(bed, "v2", "ok"), "v2 at rest")
