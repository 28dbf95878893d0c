"""The lab itself: its machines boot, talk, lose their network and their power, fill up, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toynixos import write_config

from lab.conftest import need
from lab.image import apt_sources
from lab.lab import NETNS, RUNS, TESTS, Host, Lab, LabError, Layer, MachineOff, Server, mounts, render_unit


@pytest.fixture
def host(lab: Lab) -> Host:
    machine = lab.machine("h1", Host)
    machine.boot()
    return machine


@pytest.fixture(scope="module")
def server(lab: Lab) -> Server:
    machine = lab.machine("server", Server)
    machine.boot()
    return machine


# --- power ---


def test_a_boot_in_which_nothing_fails(lab: Lab) -> None:
    host = lab.machine("h1", Host)
    assert not host.is_on
    host.boot()
    assert host.run("systemctl", "is-system-running").stdout == "running\n"
    assert host.run("hostname", check=False).stdout == "h1\n"
    assert host.run("cat", "/proc/1/comm").stdout == "systemd\n"


def test_power_cut_keeps_files_but_neither_run_nor_processes_nor_boot_id(host: Host) -> None:
    before = host.boot_id()
    host.run("sh", "-c", "echo kept >/var/kept; echo lost >/run/lost; sleep 4711 &")
    host.run("systemd-run", "--quiet", "--unit=sleeper", "sleep", "4711")
    host.power_cut()
    assert not host.is_on
    assert host.read("/var/kept") == "kept\n"
    assert "4711" not in commands_of(host)
    with pytest.raises(MachineOff, match="h1 is off"):
        host.run("true")

    host.boot()
    assert host.read("/var/kept") == "kept\n"
    assert not host.exists("/run/lost")
    assert host.run("systemctl", "is-active", "sleeper", check=False).stdout == "inactive\n"
    assert host.boot_id() != before
    assert host.boots == 2


def test_reboot_from_inside_comes_back(host: Host) -> None:
    before = host.boot_id()
    host.run("touch", "/var/kept")
    host.run("systemctl", "reboot", check=False)
    host.wait_boot(2)
    assert host.boot_id() != before
    assert host.exists("/var/kept")
    host.reboot()
    assert host.boots == 3


def test_clocks_start_anew_at_boot(host: Host) -> None:
    first = uptime_s(host)
    assert first < 10
    time.sleep(1)
    host.power_cut()
    host.boot()
    assert uptime_s(host) < first + 1


def uptime_s(host: Host) -> float:
    return float(host.run("python3", "-c", "import time; print(time.clock_gettime(time.CLOCK_BOOTTIME))").stdout)


def commands_of(host: Host) -> str:
    """The command lines of all processes of a machine, as seen from outside."""
    pids = [pid for procs in host.cgroup.rglob("cgroup.procs") for pid in procs.read_text(encoding="utf-8").split()]
    return "\n".join(Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids)


# --- inside ---


def test_run_leaves_no_process(host: Host) -> None:
    host.run("sh", "-c", "sleep 4712 >/dev/null 2>&1 &")
    with pytest.raises(LabError, match=r"not in 0\.3 s"):
        host.run("sleep", "4712", timeout_s=0.3)
    assert "4712" not in commands_of(host)


# --- disks ---


def test_fill_and_unfill(lab: Lab) -> None:
    host = lab.machine("h1", Host)
    host.write("/var/lib/before", "there\n")
    host.set_small_fs("/var", "64m")
    host.set_small_fs("/boot", "1m")
    host.boot()
    with pytest.raises(LabError, match="too late"):
        host.set_small_fs("/srv", "1m")
    assert host.read("/var/lib/before") == "there\n"
    write_100k = ("dd", "if=/dev/zero", "of=/var/lib/new", "bs=100k", "count=1", "status=none")

    assert host.fill("/var/lib/bento") > 10 << 20
    done = host.run(*write_100k, check=False)
    assert done.returncode == 1 and "No space left on device" in done.stderr
    host.run("sh", "-c", "echo fits >/boot/small")
    host.power_cut()
    host.boot()
    assert host.run(*write_100k, check=False).returncode == 1
    assert host.read("/boot/small") == "fits\n"

    host.unfill("/var")
    host.run(*write_100k)
    host.fill("/var", leave_bytes=200 << 10)
    host.run(*write_100k)
    with pytest.raises(LabError, match="no small file system"):
        host.fill("/nix")


def test_frozen_disk_is_where_others_start(lab: Lab) -> None:
    first = lab.machine("h1", Host)
    first.write("/etc/mark", "frozen\n")
    first.set_small_fs("/boot", "4m")
    first.boot()
    first.run("sh", "-c", "mkdir -p /var/lib/x; echo 1 >/var/lib/x/f; echo kernel >/boot/kernel")
    layer = first.freeze()

    second = lab.machine("h2", Host, layer)
    for machine in (first, second):
        machine.boot()
        assert machine.read("/etc/mark") == "frozen\n"
        assert machine.read("/boot/kernel") == "kernel\n"
        assert machine.run("hostname").stdout == f"{machine.name}\n"
    # A directory of the layer below can be renamed, as on any disk.
    second.run("python3", "-c", "import os; os.rename('/var/lib/x', '/var/lib/y')")
    assert second.read("/var/lib/y/f") == "1\n"
    assert first.exists("/var/lib/x/f") and not first.exists("/var/lib/y")
    first.reset(layer)
    assert first.exists("/etc/mark")
    second.remove()
    del lab.machines["h2"]


# --- the network ---


def test_two_machines_reach_each_other_until_the_link_is_down(host: Host, server: Server) -> None:
    ping = ("ping", "-c1", "-W1", "-q")
    host.run(*ping, "server")
    server.run(*ping, "h1")
    host.link_down()
    assert host.run(*ping, "server", check=False).returncode != 0
    assert "NO-CARRIER" in host.run("ip", "link", "show", "eth0").stdout
    assert host.read("/sys/class/net/eth0/carrier") == "0\n"
    host.link_up()
    host.wait_for(lambda: host.run(*ping, "server", check=False).returncode == 0, 5, "the link")

    host.run("ip", "link", "set", "eth0", "down")
    assert host.run(*ping, "server", check=False).returncode != 0
    host.power_cut()
    host.boot()
    host.run(*ping, "server")


# --- the clock ---


def test_clock_jumps_in_the_middle_of_a_run(lab: Lab) -> None:
    host = lab.machine("h1", Host)
    script = "import time\nwhile True: print(int(time.time()), int(time.monotonic()), flush=True); time.sleep(0.1)"
    host.write("/root/clock.py", script)
    unit = render_unit(
        {"Service": {"ExecStart": "/usr/bin/python3 /root/clock.py", "StandardOutput": "file:/root/out"}}
    )
    host.write("/etc/systemd/system/bento.service", unit)
    host.prepare_clock()
    host.boot()
    host.run("systemctl", "start", "bento.service")
    host.wait_for(lambda: len(ticks(host)) > 3)
    host.clock_jump(366 * 86400)
    host.wait_for(lambda: ticks(host)[-1][0] > time.time() + 365 * 86400, 5, "the jump")
    (_, first), (_, last) = ticks(host)[0], ticks(host)[-1]
    assert last - first < 10
    date = ("systemd-run", "--quiet", "--pipe", "--wait", "--unit=bento-switch-abc", "date", "+%s")
    assert int(host.run(*date).stdout) > time.time() + 365 * 86400


def ticks(host: Host) -> list[tuple[int, int]]:
    lines = host.read("/root/out").splitlines()[:-1] if host.exists("/root/out") else []
    return [(int(wall), int(monotonic)) for wall, monotonic in (line.split() for line in lines)]


# --- a toy NixOS on it ---


@pytest.fixture(scope="module")
def installed(lab: Lab, server: Server) -> Layer:
    """A host that has its first generation, made with Nix."""
    host = lab.machine("h1", Host)
    host.boot()
    behaviour = host.behaviour()
    write_config(host.path("/etc/nixos"), flake=True, host="h1", **{"label": "v1"} | behaviour)
    host.install("/etc/nixos")
    return host.freeze()


@pytest.fixture
def nixos(lab: Lab, installed: Layer) -> Host:
    host = lab.machine("h1", Host, installed)
    host.boot()
    return host


def test_the_boot_default_is_booted(nixos: Host) -> None:
    system = nixos.default_system()
    assert system.startswith("/nix/store/") and nixos.label(system) == "v1"
    assert nixos.current_system() == nixos.booted_system() == nixos.profile_system() == system
    for timer in ("bento.timer", "bento-boot.timer"):
        assert nixos.run("systemctl", "is-active", timer).stdout == "active\n"
    nixos.run("systemd-analyze", "verify", "bento.service", "bento.timer", "bento-boot.timer")
    nixos.run("ping", "-c1", "-W1", "server")


def build(nixos: Host, **behaviour: Any) -> str:
    write_config(nixos.path("/etc/nixos"), flake=True, host="h1", **nixos.behaviour() | behaviour)
    nixos.run("nixos-rebuild", "build", "--flake", "path:/etc/nixos#h1")
    return os.readlink(nixos.path("/root/result"))


def test_a_kernel_that_panics_boots_again_by_itself(nixos: Host) -> None:
    """Fact: default and one boot together; with EFI variables that outlive a power cut."""
    old, new = nixos.default_system(), build(nixos, label="v2", kernel="panic")
    nixos.run("bootctl", "set-default", "nixos-generation-1.conf")
    nixos.run("nix-env", "-p", "/nix/var/nix/profiles/system", "--set", new)
    nixos.run(f"{new}/bin/switch-to-configuration", "boot")
    nixos.run("bootctl", "set-oneshot", "nixos-generation-2.conf")
    assert (nixos.default_system(), nixos.fallback_system()) == (new, old)
    boots = nixos.boots
    nixos.power_cut()
    nixos.boot()
    assert nixos.boots == boots + 2
    assert nixos.current_system() == nixos.booted_system() == nixos.default_system() == old
    nixos.run("bootctl", "set-default", "")
    assert nixos.default_system() == new
    nixos.power_cut()
    nixos.pick("nixos-generation-1.conf")
    nixos.boot()
    assert nixos.current_system() == old and nixos.default_system() == new


MOUNT = "[Mount]\nWhat=nothing\nWhere=/mnt\nType=nosuchfs\n"


@pytest.mark.parametrize("masked", [False, True])
def test_emergency_mode(nixos: Host, masked: bool) -> None:
    """Fact: emergency mode. Masked is what systemd.enableEmergencyMode = false makes of it."""
    if masked:
        for unit in ("emergency.target", "emergency.service"):
            nixos.run("ln", "-s", "/dev/null", f"/etc/systemd/system/{unit}")
        nixos.run("systemctl", "daemon-reload")
    new = build(nixos, label="v2", units=nixos.behaviour()["units"] | {"mnt.mount": MOUNT})
    accuracy = "--timer-property=AccuracySec=100ms"
    free = ("--timer-property=DefaultDependencies=no", "--property=DefaultDependencies=no")
    nixos.run("systemd-run", "--quiet", "--unit=plain", "--on-active=6", accuracy, "touch", "/root/plain")
    nixos.run("systemd-run", "--quiet", "--unit=free", "--on-active=6", accuracy, *free, "touch", "/root/free")
    start = ("systemd-run", "--quiet", "--no-block", "--unit=switch", "--property=RemainAfterExit=yes")
    nixos.run(*start, f"{new}/bin/switch-to-configuration", "test")
    nixos.wait_for(lambda: nixos.exists("/root/free"), 30, "the timer without default dependencies")
    time.sleep(1)
    active = {
        name: nixos.run("systemctl", "is-active", name, check=False).stdout.strip() == "active"
        for name in ("sysinit.target", "bento.timer", "plain.timer")
    }
    assert nixos.exists("/root/plain") == masked
    assert active["sysinit.target"] == active["bento.timer"] == masked
    if masked:
        nixos.wait_for(lambda: "=4" in nixos.run("systemctl", "show", "-p", "ExecMainStatus", "switch").stdout)
    nixos.power_cut()
    nixos.boot()
    assert nixos.label(nixos.current_system()) == "v1"
    assert nixos.run("systemctl", "is-active", "bento.timer").stdout == "active\n"


def test_queued_jobs_outlive_their_switch(nixos: Host) -> None:
    """Fact: jobs. What waits for its turn is not active, so the next switch neither sees nor stops it."""
    hang = "[Service]\nType=oneshot\nExecStart=sleep 600\n"
    bad = "[Unit]\nAfter=hang.service\n[Service]\nExecStart=sh -c 'touch /root/ran; sleep 600'\n"
    units = nixos.behaviour()["units"] | {"hang.service": hang, "bad.service": bad}
    new = build(nixos, label="v2", units=units, starts=["hang.service", "bad.service"])
    old = nixos.current_system()
    nixos.run("systemd-run", "--quiet", "--no-block", "--unit=switch", f"{new}/bin/switch-to-configuration", "test")
    nixos.wait_for(lambda: "bad.service" in nixos.run("systemctl", "list-jobs").stdout, 20, "the job")
    nixos.run("systemctl", "kill", "--signal=KILL", "switch.service")
    nixos.wait_for(lambda: nixos.run("systemctl", "is-active", "switch", check=False).stdout != "active\n")
    assert "bad.service" in nixos.run("systemctl", "list-jobs").stdout
    nixos.run(f"{old}/bin/switch-to-configuration", "test")
    nixos.wait_for(lambda: nixos.exists("/root/ran"), 10, "the unit of the system that was left")


# --- leaving ---


@pytest.fixture
def killed_run() -> Iterator[str]:
    """The name of a run whose process was killed with a machine on."""
    need()
    script = """if True:
        import sys, time
        sys.path.insert(0, sys.argv[1])
        from lab.lab import Lab, Host
        lab = Lab().__enter__()
        host = lab.machine("h1", Host)
        host.set_small_fs("/boot", "1m")
        host.boot()
        print(lab.run, flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", script, str(TESTS)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    yield run


def left_of(run: str) -> list[str]:
    """Every trace of a run: its directory, mounts, namespaces, control groups and processes."""
    found = [str(place) for place, _ in mounts() if run in str(place)]
    found += [str(path) for path in [*RUNS.glob("*"), *NETNS.glob("*")] if run in path.name]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/*{run}*")]
    found += [str(path) for path in Path("/run/systemd/nspawn").glob(f"**/*{run}*")]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if run in command:
            found.append(command)
    return found


def test_clean_removes_what_a_killed_run_left(killed_run: str, lab: Lab) -> None:
    assert len(left_of(killed_run)) > 5
    done = subprocess.run([sys.executable, TESTS / "lab/lab.py", "clean"], capture_output=True, text=True, check=True)
    assert done.stdout == f"removed {killed_run}\n"
    assert left_of(killed_run) == []
    assert lab.directory.exists()  # ours goes on


# --- the root filesystem's source ---


def test_apt_sources(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://no/ x main\n"
        "deb [signed-by=/k arch=amd64] http://one/debian trixie main contrib # why\n"
        "deb-src http://no/ trixie main\n",
        encoding="utf-8",
    )
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Types: deb deb-src\n# a comment\nURIs: http://two/debian\nSuites: trixie trixie-updates\nComponents: main\n\n"
        "Enabled: no\nTypes: deb\nURIs: http://no/\nSuites: trixie\nComponents: main\n",
        encoding="utf-8",
    )
    assert list(apt_sources(tmp_path)) == [
        ("http://one/debian", ["trixie"], ["main", "contrib"]),
        ("http://two/debian", ["trixie", "trixie-updates"], ["main"]),
    ]
