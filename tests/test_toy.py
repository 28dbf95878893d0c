"""The toy NixOS does what the tests that use it rely on."""

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
from toynixos import CHANNELS, ToyDown, ToyMachine, need, need_nix, need_root, write_config

# Says what it was started with; the real one has tests of its own.
FAKE_CLIENT = "import sys\nprint('client', *sys.argv[1:])\n"


@pytest.fixture
def client(tmp_path: Path) -> Path:
    path = tmp_path / "client.py"
    path.write_text(FAKE_CLIENT, encoding="utf-8")
    return path


@pytest.fixture(params=["simulated", "nix"])
def machine(request: pytest.FixtureRequest, tmp_path: Path, client: Path) -> ToyMachine:
    if request.param == "nix":
        need_nix()
    return ToyMachine.create(tmp_path / "root", "toy", mode=request.param, client=client)


@pytest.fixture
def simulated(tmp_path: Path, client: Path) -> ToyMachine:
    return ToyMachine.create(tmp_path / "root", "toy", client=client)


def config(machine: ToyMachine, *, flake: bool = True, **behaviour: Any) -> Path:
    client = machine.root.parent / "client.py"
    return write_config(machine.root.parent / "config", flake=flake, host="toy", client=client, **behaviour)


def build(machine: ToyMachine, **behaviour: Any) -> Path:
    done = machine.rebuild("build", config(machine, **behaviour))
    assert done.returncode == 0, done.stdout
    return (machine.root / "result").resolve()


def switch(machine: ToyMachine, system: Path, action: str, **env: str) -> tuple[int, str]:
    done = machine.run(system / "bin/switch-to-configuration", action, env=env)
    return done.returncode, done.stdout


def set_profile(machine: ToyMachine, system: Path, **env: str) -> int:
    return machine.run("nix-env", "-p", machine.profile, "--set", system, env=env).returncode


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


# --- building ---


def test_a_new_machine_has_one_generation(machine: ToyMachine) -> None:
    assert machine.labels() == ("v0", "v0", "v0")
    assert machine.booted_label() == "v0"
    assert os.readlink(machine.profile) == "system-1-link"
    assert machine.network() == "up"


@pytest.mark.parametrize("flake", [True, False])
def test_a_toplevel(machine: ToyMachine, flake: bool) -> None:
    units = {"bento.timer": "[Timer]\n", "bento.service": "[Service]\n"}
    settings = {"server": "a b", "port": 22}
    top = build(machine, flake=flake, client_json=settings, units=units, inhibitors="dbus 1", kernel="6.6")
    assert re.fullmatch("[0-9a-z]{32}-nixos-system-toy-v1", top.name)
    assert (top / "nixos-version").read_text() == "v1\n"
    assert json.loads((top / "switch-inhibitors").read_text()) == {"dbus": "1"}
    assert (top / "etc/systemd/system/bento.timer").read_text() == "[Timer]\n"
    assert json.loads((top / "etc/bento/client.json").read_text()) == settings | {
        "boot_loader": ["systemd-boot", "/boot"]
    }
    assert json.loads((top / "toy.json").read_text())["kernel"] == "6.6"
    assert (top / "init-interface-version").exists()
    for name, end in (("kernel", "-linux-6.6/bzImage"), ("initrd", "-initrd-linux-6.6/initrd"), ("kernel-modules", "-linux-6.6-modules")):
        assert os.readlink(top / name).startswith(str(top.parent))
        assert os.readlink(top / name).endswith(end)
        assert (top / name).exists()
    assert (top / "kernel-params").read_text() == "loglevel=4 panic=30 boot.panic_on_fail"
    done = machine.run(top / "sw/bin/bento-client", "probe", "a b")
    assert done.stdout == f"client --config {top}/etc/bento/client.json probe a b\n"


def test_the_same_configuration_is_the_same_system(machine: ToyMachine) -> None:
    first = build(machine)
    again = build(machine)
    assert first == again
    directory = config(machine)
    seen = {first}
    (directory / "more").write_text("1")
    seen.add(build(machine))
    (directory / "more").chmod(0o755)
    seen.add(build(machine))
    (directory / "more").rename(directory / "other")
    seen.add(build(machine))
    seen.add(build(machine, label="v2"))
    assert len(seen) == 5
    (directory / "other").unlink()
    assert build(machine) == first


def test_the_same_configuration_elsewhere_is_the_same_system(machine: ToyMachine) -> None:
    for flake in (True, False):
        first = build(machine, flake=flake)
        moved = machine.root.parent / f"moved-{flake}"
        shutil.copytree(config(machine, flake=flake), moved)
        assert machine.rebuild("build", moved).returncode == 0
        assert (machine.root / "result").resolve() == first


def test_pure_needs_only_the_behaviour(machine: ToyMachine) -> None:
    first = build(machine, pure=True)
    (config(machine) / "more").write_text("1")
    assert build(machine, pure=True) == first
    assert build(machine, pure=True, label="v2") != first


def test_only_the_kernel_changes_the_kernel(machine: ToyMachine) -> None:
    first, second, third = build(machine), build(machine, label="v2"), build(machine, kernel="6.13")
    assert os.readlink(first / "kernel") == os.readlink(second / "kernel")
    assert os.readlink(first / "kernel") != os.readlink(third / "kernel")


def test_several_hosts_of_a_flake(machine: ToyMachine) -> None:
    hosts = {"toy": {}, "other": {"label": "o1"}, "bad": {"build": "eval-error"}}
    directory = write_config(machine.root.parent / "many", flake=True, host=hosts)
    assert machine.rebuild("build", directory).returncode == 0
    assert (machine.root / "result").resolve().name.endswith("-nixos-system-toy-v1")
    assert machine.run("nixos-rebuild", "build", "--flake", f"path:{directory}#other").returncode == 0
    assert (machine.root / "result").resolve().name.endswith("-nixos-system-other-o1")
    done = machine.run("nixos-rebuild", "build", "--flake", f"path:{directory}#nobody")
    assert done.returncode == 1
    assert "does not provide attribute" in done.stdout


def test_a_build_that_fails(machine: ToyMachine) -> None:
    directory = config(machine, build="fail", build_output_bytes=5000)
    assert machine.rebuild("dry-build", directory).returncode == 0
    done = machine.rebuild("build", directory, "-L")
    assert done.returncode == 1
    assert "expected ';'" in done.stdout
    assert len(done.stdout) > 4500
    assert not (machine.root / "result").is_symlink()


def test_an_evaluation_that_fails(machine: ToyMachine) -> None:
    for flake in (True, False):
        directory = config(machine, flake=flake, build="eval-error")
        for action in ("dry-build", "build"):
            done = machine.rebuild(action, directory)
            assert done.returncode == 1
            assert "does not exist" in done.stdout


def test_dry_build_builds_nothing(machine: ToyMachine) -> None:
    done = machine.rebuild("dry-build", config(machine, label=f"dry{time.time_ns()}"))
    assert done.returncode == 0
    assert "will be built" in done.stdout
    assert not (machine.root / "result").is_symlink()


def test_a_build_waits_to_be_watched(machine: ToyMachine, tmp_path: Path) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go-on"
    # A label of its own: what an earlier run left in /nix/store would not be built again.
    label = f"watched{time.time_ns()}"
    directory = config(machine, label=label, build_touch=str(begun), build_wait=str(go_on))
    argv = ["nixos-rebuild", "build", "--flake", f"path:{directory}#toy"]
    with subprocess.Popen(argv, cwd=machine.root, env=machine.env(), stderr=subprocess.DEVNULL) as process:
        wait_for(begun)
        assert process.poll() is None
        assert not (machine.root / "result").is_symlink()
        go_on.touch()
        assert process.wait(timeout=20) == 0
    assert (machine.root / "result").exists()


def test_a_build_that_hangs(simulated: ToyMachine, tmp_path: Path) -> None:
    directory = config(simulated, build="hang", build_touch=str(tmp_path / "begun"))
    argv = ["nixos-rebuild", "build", "--flake", f"path:{directory}#toy"]
    with subprocess.Popen(
        argv, cwd=simulated.root, env=simulated.env(), stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        wait_for(tmp_path / "begun")
        time.sleep(0.2)
        assert process.poll() is None
        os.killpg(process.pid, 9)


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["build", "--flake", "path:{}#toy", "--no-such-flag"], 2, "unrecognized arguments: --no-such-flag"),
        (["explode"], 2, "invalid choice"),
        (["build", "--flake", "{}#toy"], 1, "only --flake path:DIR#HOST"),
        (["build", "--flake", "path:/nowhere#toy"], 1, "does not exist"),
        (["build", "--no-flake"], 1, "-I nixos-config=FILE"),
        (["build", "--no-flake", "-I", "nixos-config=/nowhere/configuration.nix"], 1, "was not found"),
        (
            ["build", "--flake", "path:{}#toy", "--option", "a", "b", "--show-trace", "-L", "-j", "2"],
            0,
            "building",
        ),
    ],
)
def test_command_lines(simulated: ToyMachine, argv: list[str], code: int, says: str) -> None:
    directory = config(simulated)
    done = simulated.run("nixos-rebuild", *(word.format(directory) for word in argv))
    assert (done.returncode, says in done.stdout) == (code, True), done.stdout


def test_upgrade_of_channels(machine: ToyMachine) -> None:
    done = machine.rebuild("build", config(machine, flake=False), "--upgrade")
    assert done.returncode == 0
    assert "unpacking 1 channels..." in done.stdout


def test_switch_does_everything(machine: ToyMachine) -> None:
    assert machine.rebuild("switch", config(machine)).returncode == 0
    assert machine.labels() == ("v1", "v1", "v1")
    assert machine.rebuild("test", config(machine, label="v2")).returncode == 0
    assert machine.labels() == ("v2", "v1", "v1")
    assert machine.rebuild("boot", config(machine, label="v3")).returncode == 0
    assert machine.labels() == ("v2", "v3", "v3")


def test_two_machines_may_share_a_store(tmp_path: Path, client: Path) -> None:
    store = tmp_path / "store"
    a, b = (ToyMachine.create(tmp_path / name / "root", store=store, client=client) for name in "ab")
    directory = write_config(tmp_path / "config", flake=False, host="toy", client=client)
    for one in (a, b):
        one.rebuild("build", directory).check_returncode()
    assert (a.root / "result").resolve() == (b.root / "result").resolve()
    assert (a.root / "result").resolve().parent == store


def test_the_fleets_utils_link_is_kept_and_its_client_used(simulated: ToyMachine, tmp_path: Path) -> None:
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils/bento_client.py").write_text("print('of the fleet')\n")
    directory = tmp_path / "hosts/toy"
    directory.mkdir(parents=True)
    (directory / "utils").symlink_to("../../utils")
    write_config(directory, flake=True, host="toy")
    assert simulated.rebuild("build", directory).returncode == 0
    assert simulated.run(simulated.root / "result/sw/bin/bento-client").stdout == "of the fleet\n"


def test_a_behaviour_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no behaviour lable"):
        write_config(tmp_path, flake=True, host="a", lable="v1")


def test_flake_and_channels_replace_each_other(tmp_path: Path) -> None:
    write_config(tmp_path, flake=True, host="a")
    write_config(tmp_path, flake=False, host="a")
    assert not (tmp_path / "flake.nix").exists()
    assert (tmp_path / "configuration.nix").read_text() == CHANNELS


# --- the profile ---


def test_generations(machine: ToyMachine) -> None:
    first, second = build(machine), build(machine, label="v2")
    for system in (first, first, second):
        assert set_profile(machine, system) == 0
    assert os.readlink(machine.profile) == "system-3-link"
    assert machine.profile.resolve() == second
    assert set_profile(machine, Path("/nowhere")) == 1
    assert machine.profile_label() == "v2"


def test_a_profile_that_cannot_be_set(simulated: ToyMachine, tmp_path: Path) -> None:
    switch_file = tmp_path / "full"
    switch_file.touch()
    assert set_profile(simulated, build(simulated), TOY_NIX_ENV_FAIL=str(switch_file)) == 1
    assert simulated.profile_label() == "v0"
    switch_file.write_text("hang")
    with pytest.raises(subprocess.TimeoutExpired):
        argv: list[str | Path] = ["nix-env", "-p", simulated.profile, "--set", build(simulated)]
        subprocess.run(argv, env=simulated.env(TOY_NIX_ENV_FAIL=str(switch_file)), timeout=0.5)


# --- activating ---


def test_test_activates_and_nothing_else(machine: ToyMachine) -> None:
    code, said = switch(machine, build(machine, client_json={"port": 2}), "test")
    assert (code, "activating the configuration..." in said) == (0, True)
    assert machine.labels() == ("v1", "v0", "v0")
    assert json.loads((machine.root / "etc/bento/client.json").read_text())["port"] == 2
    assert (machine.root / "etc/toy").read_text() == "v1\n"
    machine.power_cycle()
    assert machine.labels() == ("v0", "v0", "v0")


def test_boot_needs_the_profile(machine: ToyMachine) -> None:
    top = build(machine)
    assert switch(machine, top, "boot") == (0, "")
    assert machine.boot_label() == "v0", "a system of no generation is nobody's default, and nobody says so"
    assert set_profile(machine, top) == 0
    assert switch(machine, top, "boot")[0] == 0
    assert machine.labels() == ("v0", "v1", "v1")
    before = (machine.root / "proc/sys/kernel/random/boot_id").read_text()
    machine.power_cycle()
    assert machine.labels() == ("v1", "v1", "v1")
    assert machine.booted_label() == "v1"
    assert (machine.root / "proc/sys/kernel/random/boot_id").read_text() != before


@pytest.mark.parametrize(
    ("asked", "label"),
    [(0, "v1"), (1, "v0"), (2, "v1"), (3, "v0"), (4, "v1"), (11, "v0"), (100, "v0"), (101, "v0")],
)
def test_exit_codes(simulated: ToyMachine, asked: int, label: str) -> None:
    code, said = switch(simulated, build(simulated, switch_exit=asked, failed_units=["a.service"]), "test")
    assert (code, simulated.current_label()) == (asked, label)
    assert ("warning: the following units failed: a.service" in said) == (asked == 4)


def test_other_actions(simulated: ToyMachine) -> None:
    top = build(simulated)
    assert switch(simulated, top, "dry-activate") == (0, "would activate the configuration...\n")
    assert switch(simulated, top, "dance")[0] == 1
    assert simulated.labels() == ("v0", "v0", "v0")


def test_a_switch_waits_holds_the_lock_and_may_hang(simulated: ToyMachine, tmp_path: Path) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go-on"
    top = build(simulated, switch_touch=str(begun), switch_wait=str(go_on), switch_hang="after")
    program = top / "bin/switch-to-configuration"
    with subprocess.Popen([program, "test"], env=simulated.env(), stderr=subprocess.DEVNULL) as process:
        wait_for(begun)
        assert switch(simulated, build(simulated, label="v2"), "test") == (11, "Could not acquire lock\n")
        assert simulated.current_label() == "v0"
        go_on.touch()
        deadline = time.monotonic() + 20
        while simulated.current_label() != "v1" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None
        process.kill()
    assert simulated.current_label() == "v1"
    assert switch(simulated, build(simulated, label="v2"), "test")[0] == 0


def test_hanging_before_the_activation(simulated: ToyMachine, tmp_path: Path) -> None:
    top = build(simulated, switch_hang="before", switch_touch=str(tmp_path / "begun"))
    program = top / "bin/switch-to-configuration"
    with subprocess.Popen([program, "test"], env=simulated.env()) as process:
        wait_for(tmp_path / "begun")
        time.sleep(0.2)
        assert (process.poll(), simulated.current_label()) == (None, "v0")
        process.kill()


def test_a_way_back_that_is_closed(simulated: ToyMachine, tmp_path: Path, client: Path) -> None:
    root = tmp_path / "other/root"
    machine = ToyMachine.create(root, client=client, fails_from="v1", fails_from_times=2)
    old = (root / "run/current-system").resolve()
    assert switch(machine, build(machine), "test")[0] == 0
    assert [switch(machine, old, "test")[0] for _ in range(3)] == [1, 1, 0]
    assert machine.current_label() == "v0"


def test_a_boot_loader_that_cannot_be_written(simulated: ToyMachine) -> None:
    top = build(simulated, boot_exit=1)
    assert set_profile(simulated, top) == 0
    assert switch(simulated, top, "boot")[0] == 1
    assert simulated.labels() == ("v0", "v1", "v0")
    simulated.power_cycle()
    assert simulated.current_label() == "v0"


@pytest.mark.parametrize("real", [False, True], ids=["counted", "tmpfs"])
def test_a_full_boot(simulated: ToyMachine, real: bool) -> None:
    """The toy's own limit ends a copy as a disk does."""
    top = build(simulated, kernel="7.0", builder="old")
    assert set_profile(simulated, top) == 0
    program = top / "bin/switch-to-configuration"
    show = 'code=$?; ls "$1/boot/EFI/nixos" | grep -qF -- -7.0 && echo left; grep default "$1/boot/loader/loader.conf"; exit $code'
    if real:
        need("unshare")
        need_root()
        script = """
            mkdir "$1/kept" && cp -a "$1/boot/." "$1/kept/" && mount -t tmpfs -o size=64k,nr_inodes=99 toy "$1/boot" || exit 32
            cp -a "$1/kept/." "$1/boot/"
            cat /dev/zero >"$1/boot/big" 2>/dev/null; truncate -s -4096 "$1/boot/big"; "$2" boot;
        """
        done = simulated.run("unshare", "-m", "sh", "-c", script + show, "sh", simulated.root, program)
    else:
        simulated.limit_boot(4096)
        done = simulated.run("sh", "-c", '"$2" boot;' + show, "sh", simulated.root, program)
    assert done.returncode == 1, done.stdout
    assert "No space left on device" in done.stdout
    assert done.stdout.endswith("left\ndefault nixos-generation-1.conf\n"), done.stdout


# --- network, kernel, Bento ---


def test_a_system_without_network(machine: ToyMachine) -> None:
    seen = machine.root.parent / "seen"
    command = f'echo "$TOY_NETWORK" >>{seen}'
    cut = build(machine, cut_network=True, activation_command=command)
    good = build(machine, label="v2", activation_command=command)
    assert switch(machine, cut, "test")[0] == 0
    assert machine.network() == "down"
    assert switch(machine, good, "test")[0] == 0
    assert machine.network() == "up"
    assert seen.read_text() == "down\nup\n"
    assert switch(machine, build(machine, activation_command="false"), "test")[0] == 2


def test_a_broken_kernel_is_good_until_it_boots(machine: ToyMachine) -> None:
    old = (machine.root / "run/current-system").resolve()
    assert machine.rebuild("switch", config(machine, kernel="broken")).returncode == 0
    assert machine.network() == "up"
    machine.power_cycle()
    assert machine.network() == "down"
    assert switch(machine, old, "test")[0] == 0
    assert machine.network() == "down"  # the kernel still runs
    assert set_profile(machine, old) == 0
    assert switch(machine, old, "boot")[0] == 0
    machine.power_cycle()
    assert (machine.network(), machine.labels()) == ("up", ("v0", "v0", "v0"))


def test_systems_without_bento(machine: ToyMachine) -> None:
    top = build(machine, no_bento=True)
    assert not (top / "sw/bin/bento-client").exists()
    assert not (top / "etc/bento").exists()
    assert switch(machine, top, "test")[0] == 0
    assert not (machine.root / "etc/bento/client.json").is_symlink()
    assert machine.run(build(machine, broken_client=True) / "sw/bin/bento-client", "probe").returncode == 1


# --- systemd ---


def test_units(simulated: ToyMachine, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    fake = tmp_path / "bin/systemctl"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >>{calls}\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{simulated.env()['PATH']}"
    (simulated.root / "run/systemd/system").mkdir(parents=True)
    foreign = simulated.root / "etc/systemd/system/ssh.service"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("[Service]\n")

    def calls_of(**behaviour: Any) -> list[str]:
        calls.write_text("")
        assert switch(simulated, build(simulated, **behaviour), "test", PATH=path)[0] == 0
        return [call for call in calls.read_text().splitlines() if not call.startswith("show ")]

    keep = "[Service]\n# X-RestartIfChanged=false\n"
    units = {"bento.timer": "1", "bento-boot.timer": "1", "bento.service": keep + "1"}
    assert calls_of(units=units) == ["daemon-reload", "start bento-boot.timer bento.timer"]
    installed = simulated.root / "etc/systemd/system/bento.timer"
    assert installed.read_text() == "1"
    assert os.readlink(installed) == str(simulated.root / "etc/static/systemd/system/bento.timer")
    changed = units | {"bento.timer": "2", "bento.service": keep + "2"}
    assert calls_of(units=changed)[1] == "try-restart bento.timer"
    assert installed.read_text() == "2"
    assert calls_of(units=units, no_timer=True) == ["stop bento-boot.timer bento.timer", "daemon-reload"]
    assert not installed.is_symlink()
    assert calls_of()[0] == "stop bento.service"
    assert foreign.exists()


# --- the facts: what the real NixOS does, row by row ---

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


# --- sftp ---


@pytest.fixture
def served(simulated: ToyMachine, tmp_path: Path) -> ToyMachine:
    need("sftp")
    chroot = tmp_path / "chroot"
    chroot.mkdir()
    (chroot / "current.json").write_text("{}")
    return ToyMachine(simulated.root, "toy", chroot=chroot)


def sftp(machine: ToyMachine, **env: str) -> tuple[int, str]:
    batch = machine.root.parent / "batch"
    batch.write_text("get current.json\nlpwd\n")
    target = machine.root.parent / "got"
    target.mkdir(exist_ok=True)
    argv = ("sftp", "-b", batch, "-C", "-P", "2222", "-F", "/dev/null", "bento-toy@server")
    done = machine.run(*argv, cwd=target, env=env)
    return done.returncode, done.stdout


def test_sftp_serves_a_directory(served: ToyMachine) -> None:
    code, said = sftp(served)
    assert code == 0, said
    assert (served.root.parent / "got/current.json").read_text() == "{}"


def test_sftp_fails_as_ssh_does(served: ToyMachine, tmp_path: Path) -> None:
    down = tmp_path / "down"
    assert sftp(served, TOY_SERVER_DOWN=str(down), TOY_SERVER="server")[0] == 0
    code, said = sftp(served, TOY_SERVER="another")
    assert (code, "Could not resolve hostname server: Name or service not known" in said) == (255, True)
    down.touch()
    code, said = sftp(served, TOY_SERVER_DOWN=str(down))
    assert (code, "connect to host server port 2222: Connection refused" in said) == (255, True)
    assert switch(served, build(served, cut_network=True), "test")[0] == 0
    code, said = sftp(served)
    assert (code, "Network is unreachable" in said) == (255, True)
    assert said.endswith("Connection closed\n")


# --- the tools for tests ---


def test_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert need("sh").endswith("/sh")
    monkeypatch.delenv("BENTO_TESTS", raising=False)
    with pytest.raises(pytest.skip.Exception):
        need("no-such-program")
    monkeypatch.setenv("BENTO_TESTS", "all")
    with pytest.raises(pytest.fail.Exception):
        need("no-such-program")
