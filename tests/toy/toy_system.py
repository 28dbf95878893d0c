"""A toy NixOS system: builds a toplevel and, copied into it as bin/switch-to-configuration, activates it.

As a builder it is run as Nix runs one: `out`, `toy` (the behaviour, JSON), `kernel`, `initrd`, `modules` (paths),
`specialisations` (JSON: name -> path), `client` (path or empty) and `python` (path or empty) are in the environment.
Nix runs it, or the toy nixos-rebuild.

As switch-to-configuration it finds its machine below TOY_ROOT (default /):

    run/current-system  run/booted-system  run/toy-network ("up", "down")  run/systemd/system (systemctl is used)
    run/toy-booting (while it is there, the boot has not ended)  run/nixos/{switch-to-configuration.lock,start-list}
    run/toy-units/UNIT (it is active, where no systemd runs)
    run/toy-no-bus (there is no D-Bus until the next boot; a whole machine is asked for its own)
    run/toy-logind ("silent": it does not answer; "session NAME": this user's session goes away, once)
    etc/toy  etc/static -> TOPLEVEL/etc  etc/bento/{client.json,left}  etc/systemd/system/UNIT
    boot/ (the ESP: written by `boot` and `switch`, as nixpkgs' builder for systemd-boot does)
    nix/var/nix/profiles/system-N-link (only read)  var/toy-boot-size (bytes that fit into boot/; default: no limit)
    var/toy-activations (the label of each system that was activated, by a switch or at a boot)

What it does is what NixOS does: "Fact:" names the row of the facts that were read from nixpkgs or seen with the real
programs. Names in toy.json: see tests/toynixos.py.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Fact: exit codes. 2: the activation script failed; 4: units failed. Any other: nothing was activated.
ACTIVATED = (0, 2, 4)
LOCKED, OTHER_INIT = errno.EAGAIN, 100
FOREVER_S = 3600  # long enough for any test, and nothing is left behind for good
WAIT_S = 60
PROFILES = "nix/var/nix/profiles"
UNIT_KINDS = (".service", ".timer", ".target", ".mount", ".path")
# What pulls a unit of this kind in. Such links lie in /run: what is left of a system that only a power cut ended is
# not this machine's any more.
WANTED_BY = {
    ".timer": "timers.target.wants",
    ".mount": "local-fs.target.requires",
    "bento-emergency.service": "emergency.target.wants",
}

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
    return Builder(Path(given("out")), toy).make()


class Builder:
    """Makes a toplevel."""

    def __init__(self, out: Path, toy: Toy) -> None:
        self.out, self.toy = out, toy
        # Simulated, it is made aside, but must know its name in the store. (In Nix both are the same.)
        self.final = given("final") or str(out)
        self.python = given("python") or sys.executable

    def write(self, name: str, text: str, *, executable: bool = False) -> None:
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755 if executable else 0o644)

    def make(self) -> int:
        toy, own = self.toy, Path(__file__).read_text(encoding="utf-8")
        self.write("nixos-version", f"{toy.get('label', 'v1')}\n")
        self.write("init-interface-version", f"{toy.get('init', 'systemd 2')}\n")
        self.write("toy.json", json.dumps(toy, indent=2, sort_keys=True) + "\n")
        self.write("bin/switch-to-configuration", f"#!{self.python} -I\n{own}", executable=True)
        self.write("init", f"#!/bin/sh\nexec {self.final}/bin/switch-to-configuration stage-2\n", executable=True)
        # Fact: not only kernels. They take effect at a boot only, too.
        params = toy.get("kernel_params", ["loglevel=4", "panic=30", "boot.panic_on_fail"])
        self.write("kernel-params", " ".join(params))
        for name, variable in (("kernel", "kernel"), ("initrd", "initrd"), ("kernel-modules", "modules")):
            (self.out / name).symlink_to(given(variable))
        # Fact: specialisations. Each is a system of its own, that the parent links to.
        for name, path in json.loads(given("specialisations") or "{}").items():
            (self.out / "specialisation").mkdir(exist_ok=True)
            (self.out / "specialisation" / name).symlink_to(path)
        if "inhibitors" in toy:
            self.write("switch-inhibitors", json.dumps(toy["inhibitors"]) + "\n")
        for name, text in toy.get("units", {}).items():
            if not (toy.get("no_timer") and name.endswith(".timer")):
                self.write(f"etc/systemd/system/{name}", text)
        return self.make_bento()

    def make_bento(self) -> int:
        toy = self.toy
        if toy.get("leaves"):  # services.bento.enable = false, in a system that had it
            self.write("etc/bento/left", "")
        if toy.get("no_bento") or toy.get("leaves"):
            return 0
        settings = {"boot_loader": boot_loader(toy)} | toy.get("client_json", {})
        self.write("etc/bento/client.json", json.dumps(settings, indent=2) + "\n")
        command = "sw/bin/bento-client"
        if toy.get("broken_client"):
            self.write(command, "#!/bin/sh\necho 'bento: error: broken on purpose' >&2\nexit 1\n", executable=True)
            return 0
        client = given("client")
        if not client:
            say('error: no Bento client: neither utils/bento_client.py nor "client" in toy.json')
            return 1
        script = "sw/lib/bento_client.py"
        self.write(script, Path(client).read_text(encoding="utf-8"))
        if toy.get("compiled"):
            code = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[1] + 'c', doraise=True)"
            subprocess.run([self.python, "-I", "-S", "-c", code, self.out / script], check=True)
            script += "c"
        words = [self.python, "-I", "-S", "-X", "utf8", f"{self.final}/{script}"]
        words += ["--config", f"{self.final}/etc/bento/client.json"]
        self.write(command, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', executable=True)
        return 0


def boot_loader(toy: Toy) -> list[str]:
    """Which boot loader the system has, and where it lies: as the module tells the client."""
    return [toy.get("loader", "systemd-boot"), "/boot"]


# --- files of the machine ---


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
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def flush(root: Path, path: str) -> None:
    """Fact: flush. switch-to-configuration flushes the store's file system, systemd-boot's builder that of /boot, and
    GRUB's nothing. Not for a toy in a directory: that has no file system of its own."""
    if root == Path("/"):
        subprocess.run(["sync", "--file-system", path], check=True)


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


# --- before a switch ---


class Refused(Exception):
    """The switch ends here: exit code, words."""


def is_old(toy: Toy) -> bool:
    """Whether its switch-to-configuration is the Rust one of September 2024."""
    return str(toy.get("stc")) == "2024"


def take_lock(root: Path, toy: Toy) -> None:
    """Fact: lock. Whoever switches holds it, a person's nixos-rebuild too; first of all, for every action.

    It is kept until this process ends.
    """
    path = root / "run/nixos/switch-to-configuration.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if is_old(toy) else fcntl.LOCK_NB))
    except BlockingIOError:
        raise Refused(LOCKED, "Could not acquire lock") from None


def read_inhibitors(system: Path) -> dict[str, str]:
    path = system / "switch-inhibitors"
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def check(root: Path, top: Path, toy: Toy, action: str) -> None:
    """Fact: pre-switch checks. A user's own come with each action; the inhibitors' let boot and dry-activate pass."""
    if os.environ.get("NIXOS_NO_CHECK") == "1" or is_old(toy):
        return
    failed = []
    # Fact: switch inhibitors. Of the *running* system, a missing file is {}, and only common keys count.
    old, new = read_inhibitors(root / "run/current-system"), read_inhibitors(top)
    changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    if toy.get("stc") == "bytes":  # an earlier nixpkgs: the booted system's file as it is, where both have one
        files = [system / "switch-inhibitors" for system in (root / "run/booted-system", top)]
        contents = {file.read_bytes() for file in files if file.exists()}
        changed = ["anything"] if len(contents) > 1 else []
    if changed and action not in ("boot", "dry-activate"):
        say("There are changes to critical components of the system:")
        say("\n".join(f"  {name}: {old.get(name)} -> {new.get(name)}" for name in changed))
        failed.append("switchInhibitors")
    for name, command in toy.get("pre_switch", {}).items():
        if subprocess.run(["sh", "-c", command, "sh", str(top), action], stdout=sys.stderr).returncode != 0:
            failed.append(name)
    for name in failed:
        say(f"Pre-switch check '{name}' failed")
    if failed:
        raise Refused(1, "Pre-switch checks failed")


def check_init(root: Path, top: Path) -> None:
    """Fact: exit codes, 100. Compared with the running system."""
    name = "init-interface-version"
    old = root / "run/current-system" / name
    if (old.read_text(encoding="utf-8") if old.exists() else "") != (top / name).read_text(encoding="utf-8"):
        raise Refused(OTHER_INIT, "Warning: this system has another 'init': it will not take effect until you reboot.")


def check_asked(root: Path, toy: Toy) -> None:
    """A switch that ends, before it activates anything, with what a test asks for."""
    if refuses(root, toy):
        raise Refused(1, f"error: cannot be reached from a system of label {toy['fails_from']}")
    if toy.get("switch_hang") == "before":
        time.sleep(FOREVER_S)
    asked = int(toy.get("switch_exit", 0))
    if asked not in ACTIVATED:
        raise Refused(asked, f"error: activation refused with exit code {asked}")


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


# --- the boot loader's files ---


def generations(root: Path, profile: str = "system") -> list[int]:
    """Of a profile, the oldest first."""
    place = root / PROFILES / profile
    found = (re.fullmatch(place.name + r"-(\d+)-link", path.name) for path in place.parent.iterdir())
    return sorted(int(match[1]) for match in found if match)


def profiles(root: Path) -> list[str]:
    """Fact: which generations. Those of each profile in system-profiles/ have entries, too."""
    place = root / PROFILES / "system-profiles"
    names = sorted(path.name for path in place.iterdir() if not path.name.endswith(("-link", ".lock"))) if place.is_dir() else []
    return ["system", *(f"system-profiles/{name}" for name in names)]


class Esp:
    """What nixpkgs' builder for systemd-boot writes, and how it fails: each kind of it that was found."""

    def __init__(self, root: Path, toy: Toy) -> None:
        self.root, self.toy = root, toy
        self.boot = root / "boot"
        self.entries, self.kernels = self.boot / "loader/entries", self.boot / "EFI/nixos"
        limit = root / "var/toy-boot-size"
        self.size = int(limit.read_text(encoding="utf-8")) if limit.exists() else None

    def put(self, path: Path, content: bytes) -> None:
        """Writes what there is room for, and fails then: as on any disk."""
        here = (p for p in self.boot.rglob("*") if p.is_file() and p != path)
        room = len(content) if self.size is None else max(0, self.size - sum(p.stat().st_size for p in here))
        with open(path, "wb", buffering=0) as file:
            file.write(content[:room])
            if room < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())

    def replace(self, path: Path, text: str) -> None:
        aside = path.with_suffix(".tmp")
        self.put(aside, text.encode())
        aside.rename(path)
        sync_directory(path.parent)

    def name(self, image: Path) -> str:
        """HASH-NAME-FILE.efi: by the path in the store."""
        image = image.resolve()
        return f"{image.parent.name}-{image.name}.efi"

    def copy(self, image: Path) -> str:
        """Fact: ENOSPC. The builders before September 2025 write to the final name, and never again."""
        target = self.kernels / self.name(image)
        if not target.exists():
            whole = target if self.toy.get("builder") in ("old", "lies") else target.with_suffix(".efi.tmp.")
            self.put(whole, image.read_bytes())
            whole.rename(target)
        return f"/EFI/nixos/{target.name}"

    def write_entry(self, number: int, system: Path, special: str | None, profile: str = "") -> str:
        """Fact: entries. One is found by init=TOPLEVEL/init in its options. Its name."""
        system = system.resolve()
        linux, initrd = self.copy(system / "kernel"), self.copy(system / "initrd")
        label = (system / "nixos-version").read_text(encoding="utf-8").strip()
        params = (system / "kernel-params").read_text(encoding="utf-8")
        built = time.strftime("%Y-%m-%d", time.gmtime(system.stat().st_ctime))
        text = f"title NixOS{f' [{profile}]' if profile else ''}{f' ({special})' if special else ''}\nsort-key nixos\n"
        text += f"version Generation {number} NixOS {label}, built on {built}\nlinux {linux}\ninitrd {initrd}\n"
        text += f"options init={system}/init {params}\n"
        machine = self.root / "etc/machine-id"
        if machine.exists() and (found := machine.read_text(encoding="utf-8").strip()):
            text += f"machine-id {found}\n"
        name = entry_name(number, special, profile)
        if self.toy.get("entry_names") == "sha256":
            name = f"nixos-{hashlib.sha256(text.encode()).hexdigest()}.conf"
        self.replace(self.entries / name, text)
        return name

    def remove_old(self, kept: list[tuple[str, int]]) -> None:
        """What is of no generation any more; also what a copy that failed has left under a name of its own."""
        known = set()
        for profile, number in kept:
            system = self.root / PROFILES / f"{profile}-{number}-link"
            known |= {self.name(path / part) for path in specials(system).values() for part in ("kernel", "initrd")}
        for entry in self.entries.glob("nixos*-generation-*.conf"):
            found = re.match(r"nixos-(?:(.*)-)?generation-(\d+)", entry.name)
            profile = f"system-profiles/{found[1]}" if found and found[1] else "system"
            if found and (profile, int(found[2])) not in kept:
                entry.unlink()
        for image in self.kernels.iterdir():
            if image.name not in known:
                image.unlink()

    def install(self, top: Path) -> None:
        """Fact: which generations. All links of the profile, at most configurationLimit of them, the newest."""
        for directory in (self.entries, self.kernels):
            directory.mkdir(parents=True, exist_ok=True)
        limit = int(self.toy.get("configuration_limit", 0))
        # Fact: lanzaboote. It lists system-*-link only.
        listed = ["system"] if self.toy.get("loader") == "lanzaboote" else profiles(self.root)
        kept = [(each, number) for each in listed for number in generations(self.root, each)[-limit:]]
        self.remove_old(kept)
        written: set[str] = set()
        for profile, number in kept:
            system = self.root / PROFILES / f"{profile}-{number}-link"
            try:
                if behaviour(system).get("boot_einval"):
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                of = profile.partition("/")[2]
                names = [self.write_entry(number, path, name or None, of) for name, path in specials(system).items()]
                written.update(names)
                # A system that no generation has becomes nobody's default, and nothing is said of it.
                if system.resolve() == top:
                    text = f"timeout 5\ndefault {names[0]}\nconsole-mode keep\n"
                    self.replace(self.boot / "loader/loader.conf", text)
            except OSError as error:
                if error.errno != errno.EINVAL:  # Fact: EINVAL is swallowed still
                    raise
                say(f"ignoring default profile in the list of boot entries because of the following error:\n{error}")
        if self.toy.get("entry_names") == "sha256":  # after nixpkgs PR 447173
            for entry in self.entries.glob("nixos-*.conf"):
                if entry.name not in written:
                    entry.unlink()


def specials(system: Path) -> dict[str, Path]:
    """The system, as "", and its specialisations."""
    names = sorted(path.name for path in system.glob("specialisation/*"))
    return {"": system} | {name: system / "specialisation" / name for name in names}


def entry_name(number: int, special: str | None, profile: str = "") -> str:
    return f"nixos-{f'{profile}-' if profile else ''}generation-{number}{f'-specialisation-{special}' if special else ''}.conf"


def install_extlinux(root: Path, toy: Toy, top: Path) -> None:
    """The boot loader that can do nothing but boot its default."""
    esp = Esp(root, toy)
    esp.kernels.mkdir(parents=True, exist_ok=True)
    linux, initrd = esp.copy(top / "kernel"), esp.copy(top / "initrd")
    params = (top / "kernel-params").read_text(encoding="utf-8")
    text = f"DEFAULT nixos-default\nLABEL nixos-default\n  LINUX {linux}\n  INITRD {initrd}\n  APPEND init={top}/init {params}\n"
    (root / "boot/extlinux").mkdir(exist_ok=True)
    esp.replace(root / "boot/extlinux/extlinux.conf", text)


def install_boot_loader(root: Path, top: Path, toy: Toy) -> None:
    pause(toy, "boot")
    code = int(toy.get("boot_exit", 0))
    try:
        if code == 0 and toy.get("loader", "systemd-boot") in ("systemd-boot", "lanzaboote"):
            try:
                Esp(root, toy).install(top)
            finally:
                flush(root, "/boot")
        elif code == 0:
            install_extlinux(root, toy, top)
    except OSError as error:
        say(f"Traceback (most recent call last):\nOSError: {error}")
        if toy.get("builder") == "lies":  # Fact: ENOSPC. With extraInstallCommands, what they return was what counted
            return
        code = 17 if is_old(toy) else 1  # Fact: exit codes. That of 2024 gave the errno of something else
    if code:
        raise Refused(code, "Failed to install bootloader")
    pause(toy, "written")


# --- systemd ---


def systemctl(*words: str) -> bool:
    return subprocess.run(["systemctl", *words], check=False).returncode == 0


class Units:
    """What is active: systemd's, or a directory of names where none runs."""

    def __init__(self, root: Path) -> None:
        self.live, self.table = (root / "run/systemd/system").is_dir(), root / "run/toy-units"

    def is_active(self, unit: str) -> bool:
        """Fact: jobs. What only waits for its turn is inactive, so a switch neither sees nor stops it."""
        if not self.live:
            return (self.table / unit).exists()
        argv = ["systemctl", "show", "--property=ActiveState", "--value", unit]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip() != "inactive"

    def do(self, verb: str, *units: str) -> bool:
        if self.live:
            return not units or systemctl(verb, *units)
        self.table.mkdir(parents=True, exist_ok=True)
        for unit in units:
            (self.table / unit).unlink(missing_ok=True) if verb == "stop" else (self.table / unit).touch()
        return True


def unit_texts(directory: Path, owned_by: Path | None = None) -> dict[str, str]:
    """The units in a directory; with owned_by only those that are links into it."""
    if not directory.is_dir():
        return {}
    paths = [p for p in directory.iterdir() if p.suffix in UNIT_KINDS]
    if owned_by is not None:
        paths = [p for p in paths if p.is_symlink() and owned_by in Path(os.readlink(p)).parents]
    return {p.name: p.read_text(encoding="utf-8") if p.exists() else "" for p in paths}


def link_units(root: Path, names: Iterable[str], gone: Iterable[str]) -> None:
    directory = root / "etc/systemd/system"
    for name in gone:
        (directory / name).unlink()
        for wants in WANTED_BY.values():
            (root / "run/systemd/system" / wants / name).unlink(missing_ok=True)
    for name in names:
        replace_link(directory / name, root / "etc/static/systemd/system" / name)
        wanted_by = WANTED_BY.get(name, WANTED_BY.get(Path(name).suffix))
        if wanted_by is not None and (root / "run/systemd/system").is_dir():
            replace_link(root / "run/systemd/system" / wanted_by / name, directory / name)


def is_booting(root: Path) -> bool:
    """Fact: boot still under way."""
    if not (root / "run/systemd/system").is_dir():
        return (root / "run/toy-booting").exists()
    argv = ["systemctl", "is-system-running"]
    state = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
    return state not in ("running", "degraded", "maintenance", "")


# --- the activation ---


def set_network(root: Path) -> None:
    """A system may cut the line; so may the kernel that was booted, or its parameters, whatever then runs."""
    booted, running = root / "run/booted-system", behaviour(root / "run/current-system")
    params = (booted / "kernel-params").read_text(encoding="utf-8").split() if booted.exists() else []
    broken = behaviour(booted).get("kernel") == "broken" or "toy.no-network" in params
    state = "down" if running.get("cut_network") or broken else "up"
    write_file(root / "run/toy-network", f"{state}\n".encode())


def run_activation_script(root: Path, top: Path, toy: Toy) -> bool:
    """Fact: after `test`. /run/current-system is set near its end, and a script that gives up before never does."""
    say("activating the configuration...")
    with open(root / "var/toy-activations", "a", encoding="utf-8") as log:
        log.write((top / "nixos-version").read_text(encoding="utf-8"))
    old = unit_texts(root / "etc/systemd/system", root / "etc/static")
    new = unit_texts(top / "etc/systemd/system")
    replace_link(root / "etc/static", top / "etc")
    write_file(root / "etc/toy", (top / "nixos-version").read_bytes())
    link_units(root, sorted(new), sorted(old.keys() - new.keys()))
    for name in ("client.json", "left"):
        path = root / "etc/bento" / name
        if (top / "etc/bento" / name).exists():
            replace_link(path, root / "etc/static/bento" / name)
        else:
            path.unlink(missing_ok=True)
    if toy.get("gives_up"):
        say("activate: giving up")
        return False
    replace_link(root / "run/current-system", top)
    set_network(root)
    command = toy.get("activation_command")
    state = (root / "run/toy-network").read_text(encoding="utf-8").strip()
    return not command or subprocess.run(command, shell=True, env=os.environ | {"TOY_NETWORK": state}).returncode == 0


def denies(text: str, section: str, key: str) -> bool:
    """Fact: stc's own units. What a unit says of a switch counts in its own section only."""
    here = re.search(rf"(?ms)^\[{section}\]$(.*?)(?=^\[|\Z)", text)
    return here is not None and f"{key}=false" in here[1]


class Plan:
    """What a switch does to units. A changed one is stopped and started, unless it is to be restarted, or left."""

    def __init__(self, root: Path, top: Path, toy: Toy) -> None:
        old, new = unit_texts(root / "etc/systemd/system", root / "etc/static"), unit_texts(top / "etc/systemd/system")
        self.units, self.list = Units(root), root / "run/nixos/start-list"
        gone = [name for name in sorted(old.keys() - new.keys()) if not denies(old[name], "Unit", "X-StopOnRemoval")]
        changed = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name] and self.units.is_active(name)]
        changed = [name for name in changed if not denies(new[name], "Service", "X-RestartIfChanged")]
        # Fact: stc's own units. Only a service has something to do when it stops.
        self.restart = [name for name in changed if denies(new[name], "Service", "X-StopIfChanged") or Path(name).suffix != ".service"]
        again = [name for name in changed if name not in self.restart]
        self.stop = [name for name in gone if self.units.is_active(name)] + again
        timers = [name for name in sorted(new) if name.endswith(".timer")]
        # A new file system is mounted by starting local-fs.target once more. Fact: emergency mode.
        mounts = ["local-fs.target"] if any(name.endswith(".mount") for name in new) else []
        left = self.list.read_text(encoding="utf-8").split() if self.list.exists() else []
        wanted = [*mounts, *timers, *left, *again, *toy.get("starts", [])]
        self.start = [name for name in dict.fromkeys(wanted) if name in new or name in mounts]

    def record(self) -> None:
        """Fact: a finished switch. Each active target is in it, whatever changes, and what is stopped to be started."""
        self.list.parent.mkdir(parents=True, exist_ok=True)
        with open(self.list, "a", encoding="utf-8") as file:
            file.write("\n".join(["multi-user.target", *(name for name in self.stop if name in self.start)]) + "\n")


def activate(root: Path, top: Path, toy: Toy) -> int:
    """What is running becomes this system: stop, activate, ask logind, start. Fact: exit codes; 4 overrides 2."""
    if not answers(root, "org.freedesktop.DBus", "GetId"):
        raise Refused(1, "Error: Failed to open dbus connection")
    plan = Plan(root, top, toy)
    plan.record()
    if plan.stop:
        say(f"stopping the following units: {', '.join(plan.stop)}")
        plan.units.do("stop", *plan.stop)
    if any(name.startswith("dbus") for name in plan.stop):  # Fact: what a broken switch leaves
        lose_bus(root, toy)
    code = 0
    if not run_activation_script(root, top, toy):
        say("Failed to run activate script")
        code = 2
    if not answers(root, "org.freedesktop.DBus", "GetId"):
        raise Refused(1, "Error: Failed to reset failed units")
    if plan.units.live:
        if toy.get("reexec"):  # Fact: needs. Whoever waits for a job at that moment loses its bus
            systemctl("daemon-reexec")
        say("reloading systemd...")
        systemctl("daemon-reload")
    while is_old(toy) and is_booting(root):
        time.sleep(0.1)
    code = 4 if ask_logind(root, toy) else code
    say("restarting sysinit-reactivation.target")
    failed = list(toy.get("failed_units", ["toy.service"])) if toy.get("switch_exit") == 4 else []
    for name in toy.get("reload_fails", []):  # Fact: exit 4 for other things
        say(f"Failed to reload {name}")
        code = 4
    failed += start_units(plan)
    plan.list.unlink()
    if toy.get("switch_hang") == "after":
        time.sleep(FOREVER_S)
    if failed:
        say(f"warning: the following units failed: {', '.join(failed)}")
        return 4
    return code


def answers(root: Path, name: str, method: str) -> bool:
    """Whether the bus, or who has a name there, does so in time."""
    if root != Path("/"):
        return not (root / "run/toy-no-bus").exists()
    place = f"/{name.replace('.', '/')}"
    interface = name if name == "org.freedesktop.DBus" else f"{name}.Manager"
    argv = ["busctl", "--system", "--timeout=5", "call", name, place, interface, method]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def lose_bus(root: Path, toy: Toy) -> None:
    """Fact: what a broken switch leaves. That of 2024 waits for ever; who wants the bus gets it back, but for logind."""
    if is_old(toy):
        (root / "run/toy-logind").write_text("silent", encoding="utf-8")
        time.sleep(FOREVER_S)
    (root / "run/toy-no-bus").touch()
    raise Refused(1, "Error: Failed to process dbus messages")


def ask_logind(root: Path, toy: Toy) -> bool:
    """Whether a user's activation failed. Fact: exit 1 and 11 after the activation."""
    path = root / "run/toy-logind"
    word, _, name = (path.read_text(encoding="utf-8").strip() if path.exists() else "").partition(" ")
    if word == "silent" or not answers(root, "org.freedesktop.login1", "ListUsers"):
        raise Refused(errno.EAGAIN, "Unable to list users with logind: Did not receive a reply")
    if word == "session":
        path.unlink()
        cause = "Unknown object '/org/freedesktop/login1/user/_953'."
        raise Refused(1, f"Error: Failed to get GID for {name}\n\nCaused by:\n    {cause}")
    for user in toy.get("user_activation_fails", []):
        say(f"warning: user activation for {user} failed")
    return bool(toy.get("user_activation_fails"))


def start_units(plan: Plan) -> list[str]:
    """Restarts what has changed and starts what is to run; those that failed."""
    failed = [] if plan.units.do("restart", *plan.restart) else list(plan.restart)
    for kind in (".target", ".timer", ".service"):
        names = [name for name in plan.start if name.endswith(kind)]
        if names and not plan.units.do("start", *names):
            say("\n".join(f"Failed to start {name}" for name in names))
            failed += names
    return failed


def stage_2(root: Path, top: Path, toy: Toy) -> int:
    """What NixOS' init does at a boot."""
    replace_link(root / "run/booted-system", top)
    done, units = run_activation_script(root, top, toy), Units(root)
    new = unit_texts(top / "etc/systemd/system")
    if units.live:
        systemctl("daemon-reload")
    timers = [name for name in sorted(new) if name.endswith(".timer")]
    mounts = ["local-fs.target"] if any(name.endswith(".mount") for name in new) else []
    for names in (mounts, timers, [name for name in toy.get("starts", []) if name in new]):
        if names:
            units.do("start", *(["--no-block"] if units.live else []), *names)
    return 0 if done else 2


# --- switch-to-configuration ---


def usage(toy: Toy) -> Iterator[str]:
    """The actions. Fact: check. Older ones do not know it."""
    if not is_old(toy):
        yield "check"
    yield from ("switch", "boot", "test", "dry-activate")


def switch(root: Path, top: Path, toy: Toy, action: str) -> int:
    take_lock(root, toy)
    check(root, top, toy, action)
    if action == "check":
        return 0
    if action in ("boot", "switch"):
        install_boot_loader(root, top, toy)
    flush(root, "/nix/store")
    if action == "boot":
        return 0
    if action == "dry-activate":
        check_init(root, top)
        say("would activate the configuration...")
        return 0
    pause(toy, "switch")
    check_asked(root, toy)
    check_init(root, top)
    code = activate(root, top, toy)
    return 2 if toy.get("switch_exit") == 2 else code


def switch_to_configuration(action: str) -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    top = Path(__file__).resolve().parents[1]
    toy = behaviour(top)
    root = Path(os.environ.get("TOY_ROOT") or "/").resolve()
    if action == "stage-2":
        return stage_2(root, top, toy)
    if action not in usage(toy):
        say(f"Usage: switch-to-configuration [{'|'.join(usage(toy))}]")
        return 1
    try:
        return switch(root, top, toy, action)
    except Refused as refused:
        code, words = refused.args
        say(words)
        return int(code)


if __name__ == "__main__":
    if Path(sys.argv[0]).name == "switch-to-configuration":
        sys.exit(switch_to_configuration(sys.argv[1] if len(sys.argv) == 2 else ""))
    sys.exit(build())
