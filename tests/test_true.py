"""The client on a machine that behaves as NixOS does: what was seen to go wrong when it was held against the real one.

The toy has each of these facts from nixpkgs or from the real programs, never from the client (tests/test_toy.py). What
is asserted can be seen from outside: exit code and words, the report that the server has, what runs, the profile, the
boot menu, and which systems were activated.
"""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import esp
from toylab import HOST, Lab, Systemd, be_patient, fake_program, kill_tree, wait_until
from toynixos import ToyMachine, write_config

import bento_client
from bento_client import TRIAL_S, Result

DAY_S = 86400


def create(directory: Path, **behaviour: Any) -> Lab:
    """A machine whose client was told of its boot loader, as utils/bento.nix does, also when a test starts it."""
    made = Lab.create(directory, **behaviour)
    made.settings["boot_loader"] = ["systemd-boot", "/boot"]
    return made


def run(lab: Lab, *words: str, doomed: bool = False, **env: str) -> tuple[int, str]:
    """`run`, whatever its exit code; a bug never shows. `doomed`: what is to be proven cannot be."""
    done = lab.machine.run(*lab.argv("run", *words, code=None if doomed else 0), env=lab.env(**env))
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


def everything(lab: Lab) -> tuple[str, str]:
    """Which system runs, and which is the profile."""
    return lab.machine.current_label(), lab.machine.profile_label()


def results(lab: Lab, release: str) -> list[str]:
    """How each attempt at a release ended, by the logs that the server has."""
    found = (name.removesuffix(".log").split("_") for name in lab.logs())
    return [result for _, which, result in found if which == release[:12]]


def by_hand(lab: Lab, label: str, action: str = "switch", **behaviour: Any) -> None:
    """A person's nixos-rebuild."""
    config = write_config(
        Path(lab.file(label)), flake=True, host=HOST, label=label, client_json=lab.settings, **behaviour
    )
    done = lab.machine.rebuild(action, config)
    assert done.returncode == 0, done.stdout


def nothing_was_touched(lab: Lab) -> None:
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.machine.activations() == ["v0"], "only the boot activated anything"
    assert lab.machine.generations() == ["v0"]
    assert list(lab.machine.entries().values()) == ["v0"]


# --- 1: switch inhibitors ---


def test_inhibitors_that_only_one_system_has_need_no_reboot(tmp_path: Path) -> None:
    lab = create(tmp_path, inhibitors={"dbus": "1", "old": "1"})
    release = lab.publish("v1", inhibitors={"dbus": "1", "new": "1"})
    assert run(lab)[0] == 0
    assert lab.labels() == ("v1", "v1", "v1") and lab.last().release == release
    assert not lab.report().needs_reboot


def test_inhibitors_are_those_of_the_running_system(tmp_path: Path) -> None:
    """The booted system had none. A good release that is refused live takes the way of the next boot."""
    lab = create(tmp_path)
    lab.publish("v1", inhibitors="dbus 1")
    assert run(lab)[0] == 0
    release = lab.publish("v2", inhibitors="dbus 2")
    run(lab)
    assert lab.labels() == ("v1", "v2", "v2") and lab.report().needs_reboot
    assert Result.ROLLED_BACK not in results(lab, release)
    assert lab.machine.power_cycle() == ["boots v2"]
    assert run(lab)[0] == 0
    assert lab.labels() == ("v2", "v2", "v2") and not lab.report().needs_reboot
    assert lab.report().release == release


def test_inhibitors_of_the_booted_system_do_not_count(tmp_path: Path) -> None:
    lab = create(tmp_path, inhibitors="dbus 1")
    by_hand(lab, "mine", "switch")
    release = lab.publish("v1", inhibitors="dbus 2")
    assert run(lab)[0] == 0
    assert lab.labels() == ("v1", "v1", "v1") and results(lab, release) == [Result.OK]


def test_the_way_back_is_open_as_long_as_the_old_system_says_so(tmp_path: Path) -> None:
    """Inhibitors that only the booted system had say nothing of the way from the new one to the old one."""
    lab = create(tmp_path, inhibitors={"dbus": "1", "old": "1"})
    lab.publish("v1", inhibitors={"dbus": "1"}, cut_network=True)
    run(lab, doomed=True)
    assert lab.labels() == ("v0", "v0", "v0") and lab.machine.network() == "up"
    assert lab.machine.activations() == ["v0", "v1", "v0"]


def test_an_earlier_nixpkgs_compared_bytes_with_the_booted_system(tmp_path: Path) -> None:
    """Whether it can go live, `check` knows; its words say that a boot is the way."""
    lab = create(tmp_path, inhibitors="dbus 1")
    release = lab.publish("v1", inhibitors={"other": "1"}, stc="bytes")
    assert run(lab)[0] == 0
    assert lab.labels() == ("v0", "v1", "v1") and lab.report().needs_reboot
    assert lab.machine.power_cycle() == ["boots v1"]
    assert run(lab)[0] == 0
    assert lab.report().release == release


# --- 2 and 3: nothing was done ---


def test_a_persons_rebuild_holds_the_lock(lab: Lab) -> None:
    """In nixpkgs 398370 it stayed held until a reboot: that is no reason to give up."""
    release = lab.publish("v1")
    with lab.machine.hold_lock():
        for words in ([], ["--force"], ["--force"], ["--force"]):
            assert run(lab, *words)[0] == 1
            assert "lock" in lab.last().reason
        nothing_was_touched(lab)
    assert set(results(lab, release)) == {Result.POSTPONED}
    lab.age_attempts(DAY_S)
    assert run(lab)[0] == 0 and lab.labels() == ("v1", "v1", "v1")


def test_what_a_person_switches_to_meanwhile_stays(lab: Lab) -> None:
    """The profile is theirs then: there is nothing to go back to but what they have just made."""
    config = write_config(Path(lab.file("mine")), flake=True, host=HOST, label="mine", client_json=lab.settings)
    command = f"nixos-rebuild switch --flake path:{config}#{HOST} >/dev/null 2>&1; false"
    lab.publish("v1", settings={"health_checks": [command]})
    run(lab, "--confirm-timeout", "10")  # in which there is a whole rebuild
    assert lab.labels() == ("mine", "mine", "mine")


def test_a_users_own_check_refuses_for_a_while(tmp_path: Path) -> None:
    lab = create(tmp_path)
    busy = Path(lab.file("busy"))
    busy.touch()
    check = f"if [ -e {busy} ]; then echo the database is being migrated; exit 1; fi"
    release = lab.publish("v1", pre_switch={"database": check})
    assert run(lab)[0] == 1
    assert (lab.last().result, lab.last().release) == (Result.POSTPONED, release)
    assert "the database is being migrated" in lab.last().reason
    nothing_was_touched(lab)
    busy.unlink()
    lab.age_attempts(DAY_S)
    assert run(lab)[0] == 0
    assert lab.labels() == ("v1", "v1", "v1") and results(lab, release) == [Result.POSTPONED, Result.OK]


# --- 5 and 6: after a reboot ---


@pytest.fixture
def booting(tmp_path: Path) -> tuple[Lab, Systemd]:
    made = create(tmp_path)
    made.settings["reboot"] = "when-needed"
    return made, Systemd(made)


def settle(lab: Lab, systemd: Systemd, *, boots: int = 4) -> None:
    """Runs, and boots whenever that is asked for, until neither changes anything."""
    for _ in range(boots):
        run(lab, PATH=systemd.path)
        if not systemd.is_to_boot():
            return
        systemd.boot()


def test_a_kernel_that_was_proven_is_not_proven_again(booting: tuple[Lab, Systemd]) -> None:
    lab, systemd = booting
    release = lab.publish("v1", kernel="6.13")
    run(lab, PATH=systemd.path)
    assert systemd.is_to_boot()
    systemd.boot()
    assert run(lab, PATH=systemd.path)[0] == 0
    lab.down.touch()
    systemd.boot()
    for _ in range(3):
        assert run(lab, doomed=True, PATH=systemd.path)[0] == 75
        assert not systemd.is_to_boot() and lab.labels() == ("v1", "v1", "v1")
    lab.down.unlink()
    assert run(lab, PATH=systemd.path)[0] == 0
    assert lab.report().release == release and set(results(lab, release)) == {Result.OK}


@pytest.mark.parametrize("reboot", ["when-needed", "never"])
def test_a_server_that_boots_slower_than_its_hosts(booting: tuple[Lab, Systemd], reboot: str) -> None:
    """The power of a site: hosts are there before the server."""
    lab, systemd = booting
    lab.settings["reboot"] = reboot
    release = lab.publish("v1", kernel="6.13")
    run(lab, PATH=systemd.path)
    lab.down.touch()
    systemd.boot()
    assert run(lab, doomed=True, PATH=systemd.path)[0] == 75
    assert not systemd.is_to_boot() and everything(lab) == ("v1", "v1"), "patience first"
    lab.down.unlink()
    settle(lab, systemd)
    assert lab.labels() == ("v1", "v1", "v1") and lab.report().release == release
    assert Result.ROLLED_BACK not in results(lab, release)


def test_a_kernel_without_network_is_left_for_good(booting: tuple[Lab, Systemd]) -> None:
    """Patience ends, and comparison tells: the old system reaches the server."""
    lab, systemd = booting
    release = lab.publish("v1", kernel="broken")
    run(lab, PATH=systemd.path)
    for _ in range(6):
        systemd.boot()
        run(lab, doomed=True, PATH=systemd.path)
    assert lab.labels() == ("v0", "v0", "v0") and lab.machine.network() == "up"
    assert results(lab, release)[-1] == Result.ROLLED_BACK


# --- 7 and 8: the boot loader ---


@pytest.mark.parametrize(
    ("spare_bytes", "behaviour"),
    [
        (1000, {"builder": "lies", "kernel": "7"}),
        (None, {"boot_einval": True}),
        (10_000, {"builder": "lies", "kernel": "7"}),
    ],
    ids=["truncated kernel", "no entry", "truncated initrd"],
)
def test_a_boot_loader_that_says_0(tmp_path: Path, spare_bytes: int | None, behaviour: dict[str, Any]) -> None:
    lab = create(tmp_path)
    lab.machine.limit_boot(spare_bytes)
    release = lab.publish("v1", **behaviour)
    assert run(lab)[0] == 1
    assert (lab.last().result, lab.last().release) == (Result.POSTPONED, release)
    assert lab.labels() == ("v0", "v0", "v0")
    assert lab.machine.generations() == ["v0"], "the failed generation is removed"
    for name in ("LoaderEntryDefault", "LoaderEntryOneShot"):
        assert lab.machine.efi_variable(name) is None, "what is known to boot is on no trial"
    assert lab.machine.power_cycle() == ["boots v0"]


def test_a_kernel_that_an_earlier_switch_left_half_written(tmp_path: Path) -> None:
    """The old builder never writes it again, and says 0; it does remove what no generation names."""
    lab = create(tmp_path)
    lab.machine.limit_boot(1000)
    release = lab.publish("v1", builder="old", kernel="7")
    for _ in range(2):
        run(lab, "--force")
        assert lab.labels() == ("v0", "v0", "v0")
    assert set(results(lab, release)) == {Result.POSTPONED}
    lab.machine.limit_boot(None)
    assert run(lab, "--force")[0] == 0, "the way back has removed the half"
    assert lab.machine.power_cycle() == ["boots v1"]


def test_a_kernel_with_other_bytes_is_written_once_more(tmp_path: Path) -> None:
    """Of the right size: no builder looks, and a boot loader stands still with it."""
    lab = create(tmp_path)
    lab.publish("v1", kernel="7", boot_touch=lab.file("reached"), boot_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("reached")).exists)
    kernel = Path(os.path.realpath(lab.state / "result/kernel"))
    copy = lab.machine.root / f"boot/EFI/nixos/{kernel.parent.name}-{kernel.name}.efi"
    copy.write_bytes(b"x" * kernel.stat().st_size)
    Path(lab.file("go")).touch()
    assert lab.finish(process) == 0 and lab.labels() == ("v1", "v1", "v1")
    assert copy.read_bytes() == kernel.read_bytes() and "has other bytes" in lab.log()
    assert lab.machine.power_cycle() == ["boots v1"]


def test_a_full_boot_is_paced_from_the_first_failure_on(tmp_path: Path) -> None:
    lab = create(tmp_path)
    lab.machine.limit_boot(1000)
    lab.publish("v1", kernel="7")
    assert run(lab)[0] == 1
    before = lab.machine.activations()
    said = [run(lab)[1] for _ in range(3)]
    assert lab.machine.activations() == before, "no flapping"
    assert all("next attempt in" in text for text in said)
    assert lab.machine.generations() == ["v0"] and lab.last().result == Result.POSTPONED
    lab.machine.limit_boot(None)
    lab.age_attempts(DAY_S)
    assert run(lab)[0] == 0 and lab.labels() == ("v1", "v1", "v1")


def test_a_boot_partition_that_is_not_mounted_is_waited_for(tmp_path: Path) -> None:
    """What is written then lies in the directory below, where no boot loader looks. Nothing was written, so nothing is to be
    written back."""
    lab = create(tmp_path)
    root = lab.machine.root
    (root / "etc/fstab").write_text("/dev/vda1 /boot vfat defaults\n")
    mounts = root / "proc/self/mountinfo"
    mounts.write_text("".join(line for line in mounts.read_text().splitlines(True) if " /boot " not in line))
    (root / "boot").rename(root / "partition")
    (root / "boot").mkdir()
    lab.publish("v1")
    assert run(lab)[0] == 1
    assert lab.last().result == Result.POSTPONED and "/boot is not mounted" in lab.last().reason
    assert list((root / "boot").iterdir()) == []
    (root / "boot").rmdir()
    (root / "partition").rename(root / "boot")
    lab.machine.set_mounts({})
    assert lab.labels() == ("v0", "v0", "v0")
    lab.age_attempts(DAY_S)
    assert run(lab)[0] == 0 and lab.labels() == ("v1", "v1", "v1")


def test_never_up_to_date_while_another_system_runs(tmp_path: Path) -> None:
    lab = create(tmp_path)
    release = lab.publish("v1", kernel="6.13")
    run(lab)
    lab.machine.power_cycle()
    run(lab)
    assert lab.report().release == release
    lab.machine.power_cycle(pick="1")
    for label in ("v0", "mine"):
        if label == "mine":
            by_hand(lab, label)
        other = f"release {release[:12]} is deployed, but another system runs: .*-{label}\n"
        assert re.fullmatch(other, run(lab)[1])
        assert lab.report().release is None and lab.report().system.endswith(f"-{label}")
        assert "up to date" not in lab.client("status")
    lab.publish("v2", build="eval-error")
    assert run(lab)[0] == run(lab)[0] == 1
    assert "build-failed, next attempt in" in run(lab)[1], "that is another release's"


# --- 9: not only kernels ---


def test_a_change_of_kernel_parameters_is_proven_by_its_boot(tmp_path: Path) -> None:
    lab = create(tmp_path)
    release = lab.publish("v1", kernel_params=["panic=30", "toy.no-network"])
    assert run(lab)[0] == 0
    assert lab.labels() == ("v1", "v1", "v1") and lab.report().needs_reboot
    lab.machine.power_cycle()
    assert lab.machine.network() == "down"
    for _ in range(3):
        run(lab, doomed=True)
        lab.machine.power_cycle()
    run(lab)
    assert lab.labels() == ("v0", "v0", "v0") and lab.machine.network() == "up"
    assert Result.ROLLED_BACK in results(lab, release) or Result.INTERRUPTED in results(lab, release)


# --- 10: a person's hand in the boot menu ---


def test_an_older_generation_is_a_persons_choice(booting: tuple[Lab, Systemd]) -> None:
    lab, systemd = booting
    lab.publish("v1", kernel="6.13")
    run(lab, PATH=systemd.path)
    systemd.boot()
    run(lab, PATH=systemd.path)
    assert lab.labels() == ("v1", "v1", "v1")
    systemd.boot(pick="1")
    for _ in range(3):
        run(lab, PATH=systemd.path)
        assert everything(lab) == ("v0", "v1") and not systemd.is_to_boot()
    second = lab.publish("v2", kernel="6.13")
    run(lab, PATH=systemd.path)
    assert everything(lab) == ("v2", "v2") and lab.last().release == second


def test_a_specialisation_of_the_release_is_the_release(tmp_path: Path) -> None:
    lab = create(tmp_path)
    release = lab.publish("v1", specialisations={"desk": {"label": "v1-desk"}})
    run(lab)
    lab.machine.power_cycle()
    run(lab)
    assert lab.machine.power_cycle(pick="nixos-generation-2-specialisation-desk.conf") == ["boots v1-desk"]
    code, said = run(lab)
    assert code == 0 and "up to date" in said
    assert everything(lab) == ("v1-desk", "v1") and lab.report().release == release


def test_the_next_release_goes_live_in_the_same_specialisation(tmp_path: Path) -> None:
    lab = create(tmp_path)
    lab.publish("v1", specialisations={"desk": {"label": "v1-desk"}})
    run(lab)
    lab.machine.power_cycle()
    run(lab)
    lab.machine.power_cycle(pick="nixos-generation-2-specialisation-desk.conf")
    run(lab)
    release = lab.publish("v2", specialisations={"desk": {"label": "v2-desk"}})
    assert run(lab)[0] == 0
    assert everything(lab) == ("v2-desk", "v2")
    assert lab.report().release == release and lab.machine.activations()[-1] == "v2-desk"
    lab.publish("v3")
    assert run(lab)[0] == 0
    assert everything(lab) == ("v3", "v3"), "where the new release has no such specialisation"


def test_back_is_back_to_the_specialisation(tmp_path: Path) -> None:
    lab = create(tmp_path)
    lab.publish("v1", specialisations={"desk": {"label": "v1-desk"}})
    run(lab)
    lab.machine.power_cycle()
    run(lab)
    lab.machine.power_cycle(pick="nixos-generation-2-specialisation-desk.conf")
    run(lab)
    lab.publish("v2", specialisations={"desk": {"label": "v2-desk", "cut_network": True}})
    run(lab, doomed=True)
    assert everything(lab) == ("v1-desk", "v1") and lab.machine.network() == "up"
    assert lab.machine.boot_label() == "v1"


# --- 11: the exit code is not the machine ---


@pytest.mark.parametrize("asked", [0, 4])
def test_an_activation_that_gave_up(tmp_path: Path, asked: int) -> None:
    lab = create(tmp_path)
    release = lab.publish("v1", gives_up=True, switch_exit=asked)
    assert run(lab)[0] == 1
    assert lab.labels() == ("v0", "v0", "v0")
    assert (lab.machine.root / "etc/toy").read_text() == "v0\n", "half of /etc was the new system's"
    assert results(lab, release) == [Result.ROLLED_BACK]


def test_another_init_takes_the_way_of_the_next_boot(tmp_path: Path) -> None:
    lab = create(tmp_path)
    release = lab.publish("v1", init="systemd 3")
    assert run(lab)[0] == 0
    assert lab.labels() == ("v0", "v1", "v1") and lab.machine.activations() == ["v0"]
    lab.machine.power_cycle()
    assert run(lab)[0] == 0
    assert lab.labels() == ("v1", "v1", "v1") and lab.report().release == release


# --- 14: an outage of the wrong length ---


def test_an_outage_that_ends_with_the_way_back(tmp_path: Path) -> None:
    """The server is away just while the new system is proven: one later retry settles whose fault it was."""
    lab = create(tmp_path, activation_command=f"rm -f {tmp_path}/down")
    once = lab.file("once")
    release = lab.publish("v1", activation_command=f"[ -e {once} ] || touch {once} {lab.down}")
    run(lab, doomed=True)
    assert lab.labels() == ("v0", "v0", "v0")
    lab.age_attempts(DAY_S)
    run(lab)
    assert lab.labels() == ("v1", "v1", "v1") and lab.report().release == release


def test_a_release_that_fails_the_retry_too_is_rolled_back_for_good(tmp_path: Path) -> None:
    lab = create(tmp_path)
    release = lab.publish("v1", cut_network=True)
    for _ in range(3):
        run(lab, doomed=True)
        lab.age_attempts(DAY_S)
    assert lab.last().result == Result.ROLLED_BACK
    tried = len(results(lab, release))
    for _ in range(2):
        lab.age_attempts(DAY_S)
        run(lab, doomed=True)
    assert len(results(lab, release)) == tried == 3 and lab.labels() == ("v0", "v0", "v0")


# --- 15: rollback by hand ---


def test_rollback_goes_to_what_ran_before_whoever_made_it(lab: Lab) -> None:
    lab.publish("v1")
    run(lab)
    by_hand(lab, "mine")
    lab.publish("v2")
    run(lab)
    assert lab.labels() == ("v2", "v2", "v2")
    lab.client("rollback")
    assert lab.labels() == ("mine", "mine", "mine")


# --- 16: leaving, and force ---


@pytest.mark.parametrize("live", [False, True], ids=["no systemd", "systemd"])
def test_a_system_that_leaves_bento(tmp_path: Path, live: bool) -> None:
    lab = create(tmp_path)
    path = Systemd(lab).path if live else lab.machine.env()["PATH"]
    release = lab.publish("v1", leaves=True)
    assert run(lab, PATH=path)[0] == 0
    assert lab.labels() == ("v1", "v1", "v1")
    assert os.listdir(lab.machine.root / "etc/bento") == ["left"]
    assert (lab.last().result, lab.last().release) == (Result.OK, release), "after one last report"
    assert lab.report().phase == "left" or "left" in (lab.chroot / "logs/status.json").read_text()
    nothing_of_ours(lab, "v1")


def nothing_of_ours(lab: Lab, label: str) -> None:
    """Neither in the boot menu nor in Nix' profiles; and loader.conf names an entry that is there."""
    profiles = lab.machine.profile.parent / "system-profiles"
    assert not (profiles / "bento").is_symlink() and not list(profiles.glob("*-link"))
    assert not [name for name in lab.machine.entries() if "bento" in name]
    assert lab.machine.power_cycle() == [f"boots {label}"]


@pytest.mark.parametrize("action", ["switch", "boot"])
def test_a_person_leaves_bento(tmp_path: Path, action: str) -> None:
    """By hand, without our leave. Within their switch the menu cannot be written: it is afterwards."""
    lab = create(tmp_path)
    systemd = Systemd(lab)
    lab.publish("v1", kernel="6.13")
    run(lab, PATH=systemd.path)
    by_hand(lab, "mine", action, no_bento=True)
    if action == "switch":
        with lab.machine.hold_lock():
            lab.client("align", PATH=systemd.path)
        [later] = systemd.timers()
        assert lab.machine.run(*later, env=lab.env(PATH=systemd.path)).returncode == 0
    else:
        lab.client("align", PATH=systemd.path)
    nothing_of_ours(lab, "mine")


# --- 17: a bug of ours ---


def test_a_bug_before_the_activation_is_recorded_reported_and_paced(lab: Lab) -> None:
    """Something of Python's fails as nobody thought of."""
    release = lab.publish("v1")

    def broken() -> "subprocess.CompletedProcess[str]":
        patch = "c.unpack = lambda *_, **__: [].pop()"
        return lab.run_patched(patch)

    done = broken()
    assert done.returncode == 1
    assert (lab.last().release, lab.last().result) == (release, Result.FETCH_FAILED)
    assert "IndexError" in lab.last().reason and "Traceback" in lab.log()
    for _ in range(6):
        done = broken()
    assert "next attempt in" in done.stdout, "it does not try at each poll"
    assert lab.last().attempt < 6
    lab.age_attempts(DAY_S)
    assert run(lab)[0] == 0 and lab.labels() == ("v1", "v1", "v1")


# --- 18: a switch that never began ---


def test_a_switch_that_never_began_leaves_nothing_to_undo(lab: Lab) -> None:
    lab.publish("v1", switch_touch=lab.file("reached"), switch_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("reached")).exists)
    kill_tree(process)
    Path(lab.file("go")).touch()
    run(lab)
    assert lab.machine.activations().count("v0") == 1, "what a person had stopped is not started again"
    assert lab.labels() == ("v1", "v1", "v1")


# --- 19: a state directory that forgets ---


@pytest.mark.parametrize("place", ["/", "/var/lib", "/var/lib/bento"])
def test_a_volatile_state_directory_is_refused(lab: Lab, place: str) -> None:
    """What the machine's own mount table says of it. A root that forgets is how such machines are mostly made."""
    lab.publish("v1")
    lab.machine.set_mounts({place: "tmpfs"})
    code, said = run(lab)
    assert code in (1, 2) and lab.labels() == ("v0", "v0", "v0")
    assert str(lab.state) in said and "persist" in said
    lab.machine.set_mounts({"/": "tmpfs", "/var/lib": "btrfs"})
    assert run(lab)[0] == 0 and lab.labels() == ("v1", "v1", "v1")


# --- the first boot is a trial ---


@pytest.mark.parametrize("kernel", ["panic", "broken"])
def test_the_boot_loader_itself_leads_back(tmp_path: Path, kernel: str) -> None:
    """Without a hand, and without a client: until it is proven, the new system is started just once."""
    lab = create(tmp_path)
    release = lab.publish("v1", kernel=kernel)
    assert run(lab)[0] == 0
    assert lab.labels() == ("v1", "v1", "v1") and lab.machine.fallback_label() == "v0"
    starts = lab.machine.power_cycle()
    if kernel == "panic":
        assert starts == ["panics v1", "boots v0"]
    else:
        assert starts == ["boots v1"] and lab.machine.power_cycle() == ["boots v0"]
    for _ in range(9):
        run(lab, doomed=True)
        lab.age_attempts(DAY_S)
        lab.machine.power_cycle()
    run(lab)
    assert lab.labels() == ("v0", "v0", "v0")
    assert set(results(lab, release)) == {Result.OK, Result.ROLLED_BACK}


@pytest.mark.parametrize("before", [None, "nixos-generation-*"])
def test_a_boot_that_proves_it_makes_it_the_default_for_good(before: str | None, tmp_path: Path) -> None:
    lab = create(tmp_path)
    esp.write_variable(lab.machine.root, "LoaderEntryDefault", before)
    lab.publish("v1", kernel="6.13")
    for _ in range(2):
        run(lab)
    assert lab.machine.power_cycle() == ["boots v1"]
    assert run(lab)[0] == 0
    assert lab.machine.fallback_label() == "v1"
    assert lab.machine.efi_variable("LoaderEntryDefault") == before, "what a person makes the default boots"
    by_hand(lab, "mine")
    assert lab.machine.power_cycle() == ["boots mine"]


@pytest.mark.parametrize("step", ["switch", "boot", "written"])
def test_no_cut_leaves_an_unproven_default(tmp_path: Path, step: str) -> None:
    lab = create(tmp_path)
    touched: dict[str, Any] = {f"{step}_touch": lab.file("reached"), f"{step}_wait": lab.file("go")}
    lab.publish("v1", kernel="panic", **touched)
    process = lab.start("run")
    wait_until(Path(lab.file("reached")).exists)
    kill_tree(process)
    assert lab.machine.power_cycle()[-1] == "boots v0"


@pytest.mark.parametrize("names", ["generation", "sha256"])
@pytest.mark.parametrize("who", ["run", "shutdown", "release"])
def test_the_system_that_is_known_to_boot_keeps_its_entry(tmp_path: Path, who: str, names: str) -> None:
    """nix-collect-garbage -d, and the next `boot`, between the commit and the first boot."""
    lab = create(tmp_path, entry_names=names)
    for label in ("v1", "v2"):
        lab.publish(label, kernel="panic", entry_names=names)
        run(lab)
    lab.machine.collect_garbage()
    if who == "release":
        lab.publish("v3", kernel="panic", entry_names=names)
    if who != "shutdown":
        run(lab)
    again = lab.machine.run(f"{os.path.realpath(lab.machine.profile)}/bin/switch-to-configuration", "boot")
    assert again.returncode == 0, again.stdout
    if who == "shutdown":
        lab.client("align")
    assert "v0" in lab.machine.entries().values()
    assert lab.machine.power_cycle()[-1] == "boots v0"


def test_an_entry_that_goes_with_its_generation(tmp_path: Path) -> None:
    """The system that is known to boot has two; a person removes the newer one, which is that of its entry, during a trial."""
    lab = create(tmp_path)
    first = os.path.realpath(lab.machine.profile)
    by_hand(lab, "mine", "boot")
    nix_env = ("nix-env", "-p", str(lab.machine.profile))
    for words in ((*nix_env, "--set", first), (f"{first}/bin/switch-to-configuration", "boot")):
        assert lab.machine.run(*words).returncode == 0
    lab.publish("v1", kernel="panic")
    run(lab)
    assert lab.machine.run(*nix_env, "--delete-generations", "3").returncode == 0
    lab.publish("v2", kernel="panic")
    run(lab)
    assert lab.machine.power_cycle()[-1] == "boots v0"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_of_entries_does_not_take_the_way_back(tmp_path: Path, limit: int) -> None:
    """Release after release without a boot: the system that is known to boot stays in the menu; a power cut finds it there."""
    lab = create(tmp_path, configuration_limit=limit)
    for number in range(1, 6):
        lab.publish(f"v{number}", kernel="panic", configuration_limit=limit)
        assert run(lab)[0] == 0
        assert (lab.labels()[:2], lab.report().boot_trial) == ((f"v{number}",) * 2, "systemd-boot")
        assert (lab.machine.fallback_label(), len(lab.machine.entries())) == ("v0", min(number + 1, limit) + 1)
    touched: dict[str, Any] = {"written_touch": lab.file("reached"), "written_wait": lab.file("go")}
    lab.publish("v9", kernel="panic", configuration_limit=limit, **touched)
    process = lab.start("run")
    wait_until(Path(lab.file("reached")).exists)
    kill_tree(process)
    assert lab.machine.power_cycle()[-1] == "boots v0"


def test_a_firmware_that_forgets_is_said_and_not_blamed(tmp_path: Path) -> None:
    lab = create(tmp_path)
    release = lab.publish("v1", kernel="6.13")
    run(lab)
    for name in ("LoaderEntryDefault", "LoaderEntryOneShot"):
        esp.write_variable(lab.machine.root, name, None)
    assert lab.machine.power_cycle() == ["boots v1"]
    run(lab)
    assert results(lab, release)[-1] == Result.OK and "forgot" in str(lab.report().boot_trial)
    lab.publish("v2", kernel="6.14")
    run(lab)
    lab.machine.power_cycle()
    run(lab)
    assert lab.report().boot_trial == "systemd-boot"


NVRAM_FULL = """case "$1 $2" in "$(cat {verb}) "?*) echo 'Failed to update EFI variable: No space left on device' >&2; exit 1 ;; esac
exec bootctl "$@"
"""


@pytest.mark.parametrize("verb", ["set-default", "set-oneshot"])
def test_a_boot_loader_that_cannot_be_told(booting: tuple[Lab, Systemd], verb: str) -> None:
    """No trial, no boot by ourselves, and no release without: as for a full /boot."""
    lab, systemd = booting
    full = Path(lab.file("verb"))
    full.write_text(verb)
    path = fake_program(lab, "bootctl", NVRAM_FULL.format(verb=full)).replace(":", f":{systemd.path}:", 1)
    release = lab.publish("v1", kernel="panic")
    run(lab, PATH=path)
    assert (lab.last().result, lab.labels()) == (Result.POSTPONED, ("v0", "v0", "v0")) and "No space left" in lab.last().reason
    assert [lab.machine.efi_variable(f"LoaderEntry{name}") for name in ("Default", "OneShot")] == [None, None]
    assert not systemd.is_to_boot() and "next attempt in" in run(lab, PATH=path)[1]
    full.write_text("nothing")
    lab.age_attempts(DAY_S)
    run(lab, PATH=path)
    assert systemd.is_to_boot() and systemd.boot() == ["panics v1", "boots v0"]
    assert results(lab, release) == [Result.POSTPONED, Result.OK]


def test_what_was_not_started_is_not_blamed(booting: tuple[Lab, Systemd]) -> None:
    """Somebody wants another system once, and gets it, as often as they like. Then comes the trial."""
    lab, systemd = booting
    lab.settings["reboot"] = "never"
    release = lab.publish("v1", kernel="6.13")
    run(lab, PATH=systemd.path)
    for _ in range(3):
        esp.write_variable(lab.machine.root, "LoaderEntryOneShot", "nixos-generation-1.conf")
        run(lab, PATH=systemd.path)
        lab.client("align", PATH=systemd.path)
        assert systemd.boot() == ["boots v0"]
        for _ in range(2):
            run(lab, PATH=systemd.path)
        assert results(lab, release) == [Result.OK] and lab.labels() == ("v0", "v1", "v1")
    assert systemd.boot() == ["boots v1"]
    run(lab, PATH=systemd.path)
    assert lab.labels() == ("v1", "v1", "v1") and lab.machine.fallback_label() == "v1"


@pytest.mark.parametrize("limit", [1, 8])
def test_lanzaboote(booting: tuple[Lab, Systemd], limit: int) -> None:
    """It gives a profile no entry: a trial as long as the system to fall back to has one of its own; else none, and nothing is
    postponed for that. The default is never what has no entry."""
    lab, systemd = booting
    lab.settings |= {"boot_loader": ["lanzaboote", "/boot"], "reboot": "never"}
    with_lanzaboote: dict[str, Any] = {"loader": "lanzaboote", "configuration_limit": limit}
    lab.publish("v1", **with_lanzaboote)  # which has not booted either, and leads nowhere back
    run(lab, PATH=systemd.path)
    assert lab.last().result == Result.OK
    release = lab.publish("v2", kernel="panic" if limit == 8 else "6.13", **with_lanzaboote)
    run(lab, PATH=systemd.path)
    assert results(lab, release) == [Result.OK] and lab.labels() == ("v2", "v2", "v2")
    told = [lab.machine.efi_variable(f"LoaderEntry{name}") for name in ("Default", "OneShot")]
    words = "none: systemd-boot has no entry to fall back to, or could not be told"
    assert (words in lab.client("status", PATH=systemd.path)) == (limit == 1)
    assert all(told) == (limit == 8) and any(told) == (limit == 8) and (mark(lab) is None) == (limit == 1)
    if limit == 8:
        assert systemd.boot() == ["panics v2", "boots v0"]
        run(lab, PATH=systemd.path)
        assert lab.labels() == ("v0", "v0", "v0") and lab.last().result == Result.ROLLED_BACK
    else:
        assert systemd.boot() == ["boots v2"]
        run(lab, PATH=systemd.path)
        assert lab.labels() == ("v2", "v2", "v2") and lab.machine.fallback_label() == "v2"


@pytest.mark.parametrize("allowed", [True, False])
def test_no_reboot_without_a_trial(booting: tuple[Lab, Systemd], allowed: bool) -> None:
    """Where the boot loader cannot be told at all, its owner says whether Bento may reboot into what has never booted."""
    lab, systemd = booting
    lab.settings |= {"boot_loader": ["extlinux", "/boot"], "reboot_without_trial": allowed}
    lab.publish("v1", kernel="6.13")
    said = run(lab, PATH=systemd.path)[1]
    words = "waits for a reboot: no trial here, see rebootWithoutTrial"
    assert systemd.is_to_boot() == allowed and (words in said) != allowed
    assert (words in lab.client("status", PATH=systemd.path)) != allowed
    assert lab.labels() == ("v1", "v1", "v1") and lab.last().result == Result.OK


def mark(lab: Lab) -> str | None:
    """What tells a boot that it is a trial."""
    path = lab.machine.root / bento_client.TRIAL_VARIABLE.lstrip("/")
    return path.read_bytes()[4:].decode() if path.exists() else None


@pytest.mark.parametrize("kernel", ["6.13", "panic"])
def test_a_state_that_is_lost_in_a_trial_pins_nothing(booting: tuple[Lab, Systemd], kernel: str) -> None:
    """What the boot loader was told is marked where it was told, and says what is to be settled. We ask for no boot then."""
    lab, systemd = booting
    lab.settings["reboot"] = "never"
    lab.publish("v1", kernel=kernel)
    run(lab, PATH=systemd.path)
    assert mark(lab) == f"{os.path.realpath(lab.machine.profile)} 900"
    (lab.state / "state.json").write_text("")
    booted = "v1" if kernel == "6.13" else "v0"
    assert systemd.boot()[-1] == f"boots {booted}"
    lab.settings |= {"reboot": "when-needed", "activation": "boot"}
    if kernel == "panic":
        lab.client("pause")
    for _ in range(2):
        code, said = run(lab, PATH=systemd.path)
        assert code == 1 and "see that this directory outlives a boot" in said and not systemd.is_to_boot()
    assert lab.labels() == (booted,) * 3 and lab.machine.fallback_label() == booted and mark(lab) is None


@pytest.mark.parametrize("when", ["waits", "is on trial"])
@pytest.mark.parametrize("resumes", [True, False])
def test_a_hibernation_wakes_the_kernel_that_sleeps(booting: tuple[Lab, Systemd], when: str, resumes: bool) -> None:
    """Whichever the boot loader would start; and a resume that failed is no verdict."""
    lab, systemd = booting
    lab.settings["reboot"] = "never"
    release = lab.publish("v1", kernel="6.13")
    run(lab, PATH=systemd.path)
    lab.down.touch()
    booted = "v0"
    if when == "is on trial":
        assert systemd.boot() == ["boots v1"]
        run(lab, doomed=True, PATH=systemd.path)
        booted = "v1"
    lab.client("hibernate", PATH=systemd.path)
    if resumes:
        assert lab.machine.hibernate() == []
        lab.client("align", PATH=systemd.path)
    else:
        assert systemd.boot() == [f"boots {booted}"]
    lab.down.unlink()
    run(lab, PATH=systemd.path)
    assert results(lab, release) == ([Result.OK] if booted == "v0" else [Result.OK, Result.OK])
    if booted == "v0":
        assert lab.machine.efi_variable("LoaderEntryOneShot") and systemd.boot() == ["boots v1"]
        run(lab, PATH=systemd.path)
    assert lab.labels() == ("v1", "v1", "v1") and lab.machine.fallback_label() == "v1" and mark(lab) is None


def test_a_trial_is_told_of_what_its_client_does(booting: tuple[Lab, Systemd]) -> None:
    """What ends it hears how much longer, once, and then that it is proven; and the client tries again by a timer of its own."""
    lab, systemd = booting
    lab.publish("v1", kernel="6.13")
    run(lab, PATH=systemd.path)
    systemd.boot()
    os.mkfifo(lab.machine.root / "run/bento-trial")
    heard = os.open(lab.machine.root / "run/bento-trial", os.O_RDONLY | os.O_NONBLOCK)
    lab.down.touch()
    for _ in range(2):
        run(lab, doomed=True, PATH=systemd.path)
    assert os.read(heard, 100) == b"270\n"
    lab.down.unlink()
    run(lab, PATH=systemd.path)
    assert set(os.read(heard, 100).split()) == {b"proven"}  # as often as it is there to hear it
    os.close(heard)
    words = [words for words in systemd.said() if "bento-proof.timer" in words]
    assert words[:2] == ["start bento-proof.timer", "stop bento-proof.timer"]


def test_a_boot_that_goes_on_has_time(booting: tuple[Lab, Systemd]) -> None:
    """A database that recovers, a pool: what is ill while systemd is still starting may be well soon."""
    lab, systemd = booting
    release = lab.publish("v1", kernel="6.13", settings={"health_checks": [f"! [ -e {lab.file('ill')} ]"]})
    run(lab, PATH=systemd.path)
    systemd.boot()
    Path(lab.file("ill")).touch()
    (systemd.top / "starting").touch()
    for _ in range(2):
        code, said = run(lab, doomed=True, PATH=systemd.path)
        assert code == 1 and "tried again at the next run" in said
    Path(lab.file("ill")).unlink()
    run(lab, PATH=systemd.path)
    assert lab.labels() == ("v1", "v1", "v1") and set(results(lab, release)) == {Result.OK}


def test_a_way_back_waits_for_who_is_at_the_machine(booting: tuple[Lab, Systemd]) -> None:
    """Until the trial's deadline, and with its reboot only: what is to be started next is the old system already."""
    lab, systemd = booting
    lab.publish("old", kernel="6.12.1", inhibitors="dbus 1")
    settle(lab, systemd)
    release = lab.publish("v1", kernel="6.13", inhibitors="dbus 2", settings={"health_checks": [f"! [ -e {lab.file('ill')} ]"]})
    run(lab, PATH=systemd.path)
    assert systemd.boot() == ["boots v1"]
    Path(lab.file("ill")).touch()
    sits = 'case $1 in list-sessions) echo "2 1000 alice seat0";; *) printf "Name=alice\\nSeat=seat0\\nClass=user\\nState=active\\n";; esac\n'
    path = fake_program(lab, "loginctl", "#!/bin/sh\n" + sits).replace(":", f":{systemd.path}:", 1)
    for _ in range(2):
        code, said = run(lab, doomed=True, PATH=path)
        assert code == 1 and "waits for its reboot: alice is at this machine" in said
        assert not systemd.is_to_boot() and everything(lab) == ("v1", "old")
    be_patient(lab)
    run(lab, doomed=True, PATH=path)
    assert systemd.is_to_boot() and systemd.boot() == ["boots old"]
    run(lab, PATH=systemd.path)
    assert everything(lab) == ("old", "old") and results(lab, release)[-1] == Result.ROLLED_BACK


@pytest.mark.parametrize("ran_out", [True, False])
def test_a_fall_back_that_the_deadline_made_says_so(booting: tuple[Lab, Systemd], ran_out: bool) -> None:
    """Once: the next trial's end is its own."""
    lab, systemd = booting
    lab.publish("v1", kernel="panic")
    run(lab, PATH=systemd.path)
    over = lab.machine.root / bento_client.OVER_VARIABLE.lstrip("/")
    assert systemd.boot()[-1] == "boots v0"
    if ran_out:
        over.write_bytes(bento_client.EFI_ATTRIBUTES + b"over")
    run(lab, PATH=systemd.path)
    assert lab.last().result == Result.ROLLED_BACK and ("its deadline" in lab.last().reason) == ran_out
    assert not over.exists()


def test_a_release_may_forbid_its_own_reboot(booting: tuple[Lab, Systemd]) -> None:
    """Its settings count from its activation on, not from the next run on."""
    lab, systemd = booting
    lab.settings["reboot"] = "never"
    lab.publish("v1", kernel="6.13")
    lab.settings["reboot"] = "when-needed"
    assert run(lab, PATH=systemd.path)[0] == 0
    assert lab.labels() == ("v1", "v1", "v1") and not systemd.is_to_boot()


def test_emergency_mode_ends_a_trial_and_nothing_else(booting: tuple[Lab, Systemd]) -> None:
    """No run has a chance there. A machine that would come up in it again is left alone."""
    lab, systemd = booting

    def emergency() -> None:
        lab.client("emergency", PATH=systemd.path)

    lab.publish("v1", kernel="6.13")
    run(lab, PATH=systemd.path)
    emergency()
    assert systemd.is_to_boot(), "the one that was due"
    assert systemd.boot() == ["boots v1"]
    emergency()
    assert systemd.is_to_boot() and systemd.boot() == ["boots v0"]
    emergency()
    assert not systemd.is_to_boot()
    run(lab, PATH=systemd.path)
    lab.age_attempts(DAY_S)
    settle(lab, systemd)
    assert lab.labels() == ("v1", "v1", "v1") and lab.machine.booted_label() == "v1"
    emergency()
    assert not systemd.is_to_boot()
    lab.publish("v2", kernel="6.14")
    run(lab, PATH=systemd.path)
    systemd.boot()
    esp.write_variable(lab.machine.root, "LoaderEntryDefault", None)
    emergency()
    assert not systemd.is_to_boot(), "it would be the same one again"


# --- what the words of a failed build say ---


@pytest.mark.parametrize("rebuild", ["bash", "ng"])
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"build": "assertions", "assertions": ["The root file system\nis not defined.", "x"]}, "The root file system"),
        ({"build": "dependency", "dependency": "firefox-132.0"}, "firefox-132.0"),
        ({"build": "dependency-2.31", "dependency": "firefox-132.0"}, "firefox-132.0"),
        ({"build": "git"}, "Permission denied (publickey)"),
        ({"build": "eval-error"}, "The option `services.toy' does not exist"),
    ],
    ids=["assertion", "dependency", "dependency-2.31", "private input", "evaluation"],
)
def test_the_reason_names_the_cause(lab: Lab, behaviour: dict[str, Any], words: str, rebuild: str) -> None:
    lab.publish("v1", rebuild=rebuild, **behaviour)
    assert run(lab)[0] == 1
    assert lab.last().result == Result.BUILD_FAILED
    assert words in lab.last().reason
    assert "non-zero exit status" not in lab.last().reason


# --- a machine at peace ---


def test_the_new_words_of_a_good_build_do_no_harm(lab: Lab) -> None:
    lab.publish("v1", rebuild="ng")
    assert run(lab)[0] == 0 and lab.labels() == ("v1", "v1", "v1")


@pytest.mark.parametrize("names", ["generation", "sha256"])
def test_entries_are_found_by_what_is_in_them(tmp_path: Path, names: str) -> None:
    lab = create(tmp_path, entry_names=names)
    for label in ("v1", "v2"):
        lab.publish(label, entry_names=names, kernel=label)
        assert run(lab)[0] == 0
        assert lab.machine.power_cycle() == [f"boots {label}"]
        assert run(lab)[0] == 0
        assert lab.machine.fallback_label() == label


UPDATES: list[Callable[[ToyMachine], None]] = [
    lambda machine: None,
    lambda machine: machine.collect_garbage(),
    lambda machine: machine.limit_boot(100_000),
]


@pytest.mark.parametrize("disturb", UPDATES, ids=["nothing", "garbage collection", "a small /boot"])
def test_a_year_of_good_releases(tmp_path: Path, disturb: Callable[[ToyMachine], None]) -> None:
    """With a limit of generations, a few kernels, and boots in between, nothing piles up and each is proven."""
    lab = create(tmp_path, configuration_limit=3)
    for number in range(1, 7):
        release = lab.publish(f"v{number}", kernel=f"6.{number // 2}", configuration_limit=3)
        assert run(lab)[0] == 0
        assert lab.labels() == (f"v{number}",) * 3
        disturb(lab.machine)
        if number % 2:
            assert lab.machine.power_cycle() == [f"boots v{number}"]
        assert run(lab)[0] == 0
        assert lab.report().release == release
    assert len(lab.machine.entries()) <= 4


def test_a_release_that_brings_another_boot_loader(tmp_path: Path) -> None:
    """Its entry is looked for where it is."""
    lab = create(tmp_path)
    own = lab.settings["boot_loader"]
    lab.settings["boot_loader"] = ["grub", "/gone/grub"]
    lab.publish("v1", settings={"boot_loader": own})
    assert run(lab)[0] == 0 and lab.labels() == ("v1", "v1", "v1"), lab.last()


@pytest.mark.parametrize("comes", [True, False])
def test_a_first_release_whose_server_is_away(tmp_path: Path, comes: bool) -> None:
    """Behind it is a system without Bento, from which nothing leads forward: that is worth a day of proofs."""
    lab = create(tmp_path, no_bento=True)
    lab.publish("v1", kernel="6.13")
    run(lab)
    assert lab.machine.power_cycle()[-1] == "boots v1"
    lab.down.touch()
    began = lab.machine.root / "run/bento-proofs"
    for _ in range(2):
        assert run(lab, doomed=True)[0] == 75
        began.write_text(f"{float(began.read_text()) - TRIAL_S}\n")
    assert lab.labels()[:2] == ("v1", "v1")
    if comes:
        lab.down.unlink()
        assert run(lab)[0] == 0 and lab.labels() == ("v1", "v1", "v1")
        assert lab.machine.power_cycle() == ["boots v1"]
    else:
        be_patient(lab)
        run(lab, doomed=True)
        assert lab.labels()[1:] == ("v0", "v0")
