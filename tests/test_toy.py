"""The toy NixOS does what the tests that use it rely on."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from toybuild import build, config, set_profile, switch
from toynixos import ToyMachine, need, need_root, need_sftp


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


# --- building ---


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


def test_only_the_kernel_changes_the_kernel(machine: ToyMachine) -> None:
    first, second, third = build(machine), build(machine, label="v2"), build(machine, kernel="6.13")
    assert os.readlink(first / "kernel") == os.readlink(second / "kernel")
    assert os.readlink(first / "kernel") != os.readlink(third / "kernel")


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

    keep = "[Service]\nX-RestartIfChanged=false\n"
    units = {"bento.timer": "1", "bento-boot.timer": "1", "bento.service": keep + "1"}
    assert calls_of(units=units) == ["daemon-reload", "start bento-boot.timer bento.timer"]
    installed = simulated.root / "etc/systemd/system/bento.timer"
    assert installed.read_text() == "1"
    assert os.readlink(installed) == str(simulated.root / "etc/static/systemd/system/bento.timer")
    changed = units | {"bento.timer": "2", "bento.service": keep + "2"}
    again = ["daemon-reload", "restart bento.timer", "start bento-boot.timer bento.timer"]
    assert calls_of(units=changed) == again
    assert installed.read_text() == "2"
    assert calls_of(units=units, no_timer=True) == ["stop bento-boot.timer bento.timer", "daemon-reload"]
    assert not installed.is_symlink()
    assert calls_of()[0] == "stop bento.service"
    assert foreign.exists()


# --- sftp ---


@pytest.fixture
def served(simulated: ToyMachine, tmp_path: Path) -> ToyMachine:
    need_sftp()
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
