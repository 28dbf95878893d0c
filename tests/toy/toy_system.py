"""A toy NixOS system: builds a toplevel and, copied into it as bin/switch-to-configuration, activates it.

As a builder it is run as Nix runs one: `out`, `toy` (the behaviour, JSON), `kernel`, `initrd`, `modules` (paths),
`client` (path or empty) and `python` (path or empty) are in the environment. Nix runs it, or the toy nixos-rebuild.

As switch-to-configuration it finds its machine below TOY_ROOT (default /):

    run/current-system  run/booted-system  run/toy-network ("up", "down")  run/systemd/system (systemctl is used)
    etc/toy  etc/static -> TOPLEVEL/etc  etc/bento/client.json  etc/systemd/system/UNIT
    boot/default (the toplevel's path)  boot/KERNEL  nix/var/nix/profiles/system (only read)

`test` and `switch` exit 0, or 2, 3, 4 (activated, something failed), or 1, 100 (not activated). Names in toy.json: see
tests/toynixos.py.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ACTIVATED = (
    0,
    2,
    3,
    4,
)  # as in NixOS: activation script, daemon-reload or units failed; any other: not activated
FOREVER_S = 3600  # long enough for any test, and nothing is left behind for good
WAIT_S = 60

Toy = dict[str, Any]


# --- both roles ---


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pause(toy: Toy, step: str) -> None:
    """STEP_touch tells a test that a step has begun; STEP_wait holds it until the test has made that file."""
    if touch := toy.get(f"{step}_touch"):
        Path(touch).touch()
    if wait := toy.get(f"{step}_wait"):
        deadline = time.monotonic() + WAIT_S
        while not Path(wait).exists() and time.monotonic() < deadline:
            time.sleep(0.02)


# --- the builder ---


def given(name: str) -> str:
    """An attribute of the derivation, which Nix puts into the environment."""
    return os.environ.get(name, "")


def build() -> int:
    toy: Toy = json.loads(given("toy"))
    pause(toy, "build")
    line = "building something that takes its time, and talks about it all the way to the end\n"
    for _ in range(int(toy.get("build_output_bytes", 0)) // len(line)):
        sys.stderr.write(line)
    match toy.get("build", "ok"):
        case "fail":
            say("toy.c: In function 'main':\ntoy.c:7:1: error: expected ';' before '}' token")
            say("make: *** [Makefile:3: toy.o] Error 1")
            return 1
        case "hang":
            subprocess.run(["sleep", str(FOREVER_S)], check=False)
            return 1
    return make_toplevel(Path(given("out")), toy)


def make_toplevel(out: Path, toy: Toy) -> int:
    # Simulated, it is made aside, but must know its name in the store. (In Nix both are the same.)
    final = given("final") or str(out)
    python = given("python") or sys.executable

    def write(name: str, text: str, *, executable: bool = False) -> None:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755 if executable else 0o644)

    own = Path(__file__).read_text(encoding="utf-8")
    write("nixos-version", f"{toy.get('label', 'v1')}\n")
    write("init-interface-version", "systemd 2\n")
    write("toy.json", json.dumps(toy, indent=2, sort_keys=True) + "\n")
    write("bin/switch-to-configuration", f"#!{python} -I\n{own}", executable=True)
    for name, variable in (("kernel", "kernel"), ("initrd", "initrd"), ("kernel-modules", "modules")):
        (out / name).symlink_to(given(variable))
    if "inhibitors" in toy:
        write("switch-inhibitors", toy["inhibitors"])
    for name, text in toy.get("units", {}).items():
        if not (toy.get("no_timer") and name.endswith(".timer")):
            write(f"etc/systemd/system/{name}", text)
    if toy.get("no_bento"):
        return 0
    write("etc/bento/client.json", json.dumps(toy.get("client_json", {}), indent=2) + "\n")
    if toy.get("broken_client"):
        write(
            "sw/bin/bento-client",
            "#!/bin/sh\necho 'bento: error: broken on purpose' >&2\nexit 1\n",
            executable=True,
        )
        return 0
    client = given("client")
    if not client:
        say('error: no Bento client: neither utils/bento_client.py nor "client" in toy.json')
        return 1
    script = "sw/lib/bento_client.py"
    write(script, Path(client).read_text(encoding="utf-8"))
    if toy.get("compiled"):
        code = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[1] + 'c', doraise=True)"
        subprocess.run([python, "-I", "-S", "-c", code, out / script], check=True)
        script += "c"
    words = [python, "-I", "-S", "-X", "utf8", f"{final}/{script}", "--config", f"{final}/etc/bento/client.json"]
    write("sw/bin/bento-client", f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', executable=True)
    return 0


# --- switch-to-configuration ---


def write_file(path: Path, content: bytes) -> None:
    """Whole and on disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def replace_link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.rename(path)


def behaviour(system: Path) -> Toy:
    try:
        toy: Toy = json.loads((system / "toy.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return toy


def must_not_switch(root: Path, top: Path) -> str | None:
    """Why the system cannot be activated live, as NixOS' pre-switch check decides it: both sides must name inhibitors."""
    booted, new = root / "run/booted-system/switch-inhibitors", top / "switch-inhibitors"
    if os.environ.get("NIXOS_NO_CHECK") == "1" or not booted.is_file() or not new.is_file():
        return None
    if booted.read_bytes() == new.read_bytes():
        return None
    return "Pre-switch check 'switchInhibitors' failed: the new configuration changes switch inhibitors"


def refuses(root: Path, toy: Toy) -> bool:
    """`fails_from` a label, the first `fails_from_times` times, counted in /run."""
    current = behaviour(root / "run/current-system").get("label", "v1")
    if toy.get("fails_from") != current:
        return False
    counter = root / f"run/toy-fails-{toy.get('label', 'v1')}"
    count = int(counter.read_text(encoding="utf-8")) if counter.exists() else 0
    if count >= toy.get("fails_from_times", sys.maxsize):
        return False
    write_file(counter, str(count + 1).encode())
    return True


def install_boot_loader(root: Path, top: Path, toy: Toy) -> int:
    pause(toy, "boot")
    if code := int(toy.get("boot_exit", 0)):
        say("Failed to install bootloader")
        return code
    if (root / "nix/var/nix/profiles/system").resolve() != top:
        say(f"the profile does not point to {top}: a boot loader lists the generations of the profile")
        return 1
    try:
        kernel = (top / "kernel").resolve()
        if not (root / "boot" / kernel.name).exists():
            write_file(root / "boot" / kernel.name, kernel.read_bytes())
        write_file(root / "boot/default", f"{top}\n".encode())
    except OSError as error:
        say(f"Failed to install bootloader: {error}")
        return 1
    return 0


def systemctl(*words: str) -> bool:
    return subprocess.run(["systemctl", *words], check=False).returncode == 0


def unit_texts(directory: Path, owned_by: Path | None = None) -> dict[str, str]:
    """The units in a directory; with owned_by only those that are links into it."""
    if not directory.is_dir():
        return {}
    paths = [p for p in directory.iterdir() if p.suffix in (".service", ".timer")]
    if owned_by is not None:
        paths = [p for p in paths if p.is_symlink() and owned_by in Path(os.readlink(p)).parents]
    return {p.name: p.read_text(encoding="utf-8") if p.exists() else "" for p in paths}


def link_units(root: Path, names: Iterable[str], gone: Iterable[str]) -> None:
    directory = root / "etc/systemd/system"
    for name in gone:
        (directory / name).unlink()
    for name in names:
        replace_link(directory / name, root / "etc/static/systemd/system" / name)


def set_network(root: Path, toy: Toy) -> bool:
    broken_kernel = behaviour(root / "run/booted-system").get("kernel") == "broken"
    state = "down" if toy.get("cut_network") or broken_kernel else "up"
    write_file(root / "run/toy-network", f"{state}\n".encode())
    command = toy.get("activation_command")
    return not command or subprocess.run(command, shell=True, env=os.environ | {"TOY_NETWORK": state}).returncode == 0


def activate(root: Path, top: Path, toy: Toy, *, booting: bool = False) -> int:
    """What is running becomes this system. Returns NixOS' codes: 2 activation script, 3 reload, 4 units failed."""
    live = (root / "run/systemd/system").is_dir()
    old = unit_texts(root / "etc/systemd/system", root / "etc/static")
    new = unit_texts(top / "etc/systemd/system")
    gone = sorted(old.keys() - new.keys())
    stopped = [name for name in gone if "X-StopOnRemoval=false" not in old[name]]
    if live and stopped and not booting:
        say(f"stopping the following units: {', '.join(stopped)}")
        systemctl("stop", *stopped)

    say("activating the configuration...")
    replace_link(root / "run/current-system", top)
    replace_link(root / "etc/static", top / "etc")
    write_file(root / "etc/toy", (top / "nixos-version").read_bytes())
    link_units(root, sorted(new), gone)
    client_json = root / "etc/bento/client.json"
    if (top / "etc/bento/client.json").exists():
        replace_link(client_json, root / "etc/static/bento/client.json")
    else:
        client_json.unlink(missing_ok=True)
    code = 0 if set_network(root, toy) else 2

    if live:
        say("reloading systemd...")
        code = code if systemctl("daemon-reload") else 3
        changed = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
        restart = [name for name in changed if not booting and "X-RestartIfChanged=false" not in new[name]]
        timers = [name for name in sorted(new) if name.endswith(".timer")]
        if restart and not systemctl("try-restart", *restart):
            code = 4
        if timers and not systemctl("start", *(["--no-block"] if booting else []), *timers):
            code = 4
    return code


def switch_live(root: Path, top: Path, toy: Toy) -> int:
    pause(toy, "switch")
    if refuses(root, toy):
        say(f"error: cannot be reached from a system of label {toy['fails_from']}")
        return 1
    if toy.get("switch_hang") == "before":
        time.sleep(FOREVER_S)
    asked = int(toy.get("switch_exit", 0))
    if asked not in ACTIVATED:
        if asked == 100:
            say("The new NixOS configuration has an incompatible 'init'. It takes effect when you reboot.")
        else:
            say(f"error: activation refused with exit code {asked}")
        return asked
    code = activate(root, top, toy)
    if toy.get("switch_hang") == "after":
        time.sleep(FOREVER_S)
    if asked == 4:
        say(f"warning: the following units failed: {', '.join(toy.get('failed_units', ['toy.service']))}")
    return asked or code


def switch_to_configuration(action: str) -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    top = Path(__file__).resolve().parents[1]
    toy = behaviour(top)
    root = Path(os.environ.get("TOY_ROOT") or "/").resolve()
    if action == "stage-2":
        replace_link(root / "run/booted-system", top)
        return activate(root, top, toy, booting=True)
    if action not in ("test", "switch", "boot", "dry-activate"):
        say("Usage: switch-to-configuration [switch|boot|test|dry-activate]")
        return 1

    if action != "boot" and (problem := must_not_switch(root, top)):
        say(problem)
        return 1
    if action == "dry-activate":
        say("would activate the configuration...")
        return 0
    lock_path = root / "run/nixos/switch-to-configuration.lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_path, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Could not acquire lock")
            return 1
        code = 0
        if action in ("boot", "switch"):
            code = install_boot_loader(root, top, toy)
        if code == 0 and action in ("test", "switch"):
            code = switch_live(root, top, toy)
        return code


if __name__ == "__main__":
    if Path(sys.argv[0]).name == "switch-to-configuration":
        sys.exit(switch_to_configuration(sys.argv[1] if len(sys.argv) == 2 else ""))
    sys.exit(build())
