"""Toy NixOS: configurations and machines for tests, the demo and the lab. The programs are in tests/toy/.

A configuration is a directory with flake.nix or configuration.nix, toy.nix, toy_system.py, toy.json (the behaviour)
and utils/bento_client.py. `TOY_MODE=simulated` builds it without Nix, `TOY_MODE=nix` with Nix.

Environment of the programs:

TOY_MODE          simulated (default) or nix
TOY_ROOT          prefix of the machine's system paths (default /)
TOY_STORE         the store, simulated (default TOY_ROOT/nix/store)
TOY_CLIENT        the client of a system whose configuration has none, simulated (default: the repository's)
TOY_PYTHON        the interpreter written into a system, simulated (default: the one that runs nixos-rebuild)
TOY_NIX_ENV_FAIL  while this file exists, `nix-env` cannot set or switch a generation; if it holds "hang", it hangs
TOY_CHANNEL       a file: behaviour that the next update of the channels brings, as toy.json has it
TOY_CHROOT        what `sftp` serves
TOY_SERVER        the only name that `sftp` resolves (default: any)
TOY_SERVER_DOWN   while this file exists, `sftp` is refused
TOY_SFTP_SERVER   path of sftp-server (default: the usual places)
TOY_BOOTCTL       252: bootctl answers as systemd 252's
TOY_PICK          the entry that a person picks in the boot menu
TOY_ASLEEP        the kernel, as the ESP has it, that went to sleep: to be woken if it is started, else to boot

Other programs of the machine: nix-env, nix-collect-garbage, bootctl, and `boot`: firmware, loader and kernel.
"""

import contextlib
import fcntl
import functools
import json
import os
import platform
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy import esp

TESTS = Path(__file__).resolve().parent
TOY = TESTS / "toy"
CLIENT = TESTS.parent / "bento_client.py"
# How utils/bento.nix starts it.
PYTHON_FLAGS = ("-I", "-S", "-X", "utf8")

# What a test has run, what it was given and what it said: a failed one shows the last.
told: list[str] = []

# What toy.json may hold, all optional. `hosts` (made by write_config) maps each host to what is special about it.
BEHAVIOURS = {
    "label": 'nixos-version of the system (default "v1")',
    "pure": "the system depends on toy.json and the client only: another file's change makes no new system",
    "platform": 'Nix\' system (default "x86_64-linux")',
    "python": "interpreter written into the system",
    "client": "path of the client, where the configuration has no utils/bento_client.py",
    "client_json": 'the object in etc/bento/client.json; "boot_loader" is put into it, unless it is there',
    "compiled": "the client is compiled, as by utils/bento.nix",
    "units": "systemd units of the system: name -> text; timers are started, mounts belong to local-fs.target",
    "starts": "list of units that are started by a switch, which waits for them, and at a boot",
    "kernel": 'version of kernel, initrd and modules (default "6.12"). "broken": no network when booted from it;'
    ' "panic…": it panics; "hang…": it hangs',
    "kernel_params": "list (default: what utils/bento.nix sets); toy.no-network, toy.panic and toy.hang are as above",
    "init": 'init-interface-version (default "systemd 2"); differs from the running system\'s: exit 100, not activated',
    "inhibitors": 'switch-inhibitors: {"name": "value"}, or for short "name value"',
    "pre_switch": "user's pre-switch checks: name -> shell command; it gets TOPLEVEL and action, and refuses by failing",
    "specialisations": "name -> what is special about it",
    # building
    "build": '"ok", "fail", "hang", "eval-error", "assertions", "dependency", "dependency-2.31" (in the words of a'
    ' newer Nix; simulated only), "git"',
    "assertions": "list of messages, each of one or more lines",
    "dependency": "name of the package that does not build",
    "rebuild": '"bash" (default) or "ng": the kind of nixos-rebuild, for its last line',
    "build_output_bytes": "noise on stderr",
    "build_touch": "file made when the build begins (a system that is in the store already is not built)",
    "build_wait": "file that the build then waits for, at most 60 s",
    # activating: test, switch
    "stc": '"2024": a switch-to-configuration that waits for the lock and for the end of the boot, and checks nothing;'
    ' "bytes": one that compares the files of inhibitors, that of the booted system',
    "switch_exit": "2, 4: activates, then exits so; any other but 0: does not activate, and exits so",
    "failed_units": "list, named in the warning of switch_exit 4",
    "gives_up": "the activation script ends before it has set /run/current-system: exit 2, which a switch_exit 4 hides",
    "switch_hang": '"before" or "after" the activation',
    "switch_touch": "as build_touch, before the activation",
    "switch_wait": "as build_wait",
    "fails_from": "label of a system from which this one cannot be activated: exit 1",
    "fails_from_times": "... the first N times since boot (default: always)",
    "cut_network": "no network while this system is active",
    "activation_command": "shell command of the activation, with TOY_NETWORK=up or down; if it fails, exit 2",
    "reexec": "systemd executes itself anew in the switch",
    "reload_fails": "list of units that cannot be reloaded: exit 4, without a list of failed units",
    "user_activation_fails": "list of users whose activation fails: exit 4, without such a list",
    # the boot loader: boot, switch
    "loader": '"systemd-boot" (default), "lanzaboote" or "extlinux"',
    "entry_names": '"sha256": entries are named by their content',
    "configuration_limit": "how many generations get an entry (default 0: all)",
    "builder": '"old": writes kernels to their final name, never again; "lies": and exits 0 if that fails; default: today\'s',
    "boot_einval": "writing an entry of this system fails with EINVAL, and nobody is told",
    "boot_exit": "exit code, the boot default stays",
    "boot_touch": "as build_touch, before the boot default is written",
    "boot_wait": "as build_wait",
    "written_touch": "as build_touch, when the boot default is written",
    "written_wait": "as build_wait",
    # Bento
    "no_bento": "neither sw/bin/bento-client nor etc/bento",
    "leaves": "no_bento, and etc/bento/left: its configuration says services.bento.enable = false",
    "broken_client": "sw/bin/bento-client exits 1",
    "no_timer": "without the timers among the units",
}

SFTP_SERVERS = ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/libexec")

FLAKE = """\
{
  description = "a toy configuration";
  outputs = _: { nixosConfigurations = import ./toy.nix; };
}
"""
CHANNELS = "builtins.head (builtins.attrValues (import ./toy.nix))\n"


@functools.cache
def compiled_client() -> str:
    """As utils/bento.nix installs it: compiling takes longer than most of what it does."""
    path = os.path.join(tempfile.mkdtemp(prefix="client-"), "bento_client.pyc")
    py_compile.compile(str(CLIENT), path, doraise=True)
    return path


def need(program: str) -> str:
    """The path of a program, or the test is skipped; under BENTO_TESTS=all it fails instead."""
    path = shutil.which(program)
    return path if path is not None else _missing(f"needs {program}")


def find_sftp_server() -> str | None:
    """Where distributions have it; in Nixpkgs' OpenSSH it lies beside sftp's own directory."""
    beside_sftp = Path(shutil.which("sftp") or "sftp").resolve().parent.parent / "libexec"
    places = [os.environ.get("TOY_SFTP_SERVER", ""), *(f"{place}/sftp-server" for place in (*SFTP_SERVERS, beside_sftp))]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def need_sftp() -> None:
    need("sftp")
    if find_sftp_server() is None:
        _missing("needs sftp-server (Debian: openssh-sftp-server)")


def need_root() -> None:
    if os.geteuid() != 0:
        _missing("needs root")
    if os.environ.get("BENTO_TESTS") == "quick":
        _missing("needs root, which only tests/run --all uses")


def need_nix() -> None:
    """Nix that can build: as root, without a daemon."""
    need_root()
    need("nix")


def _missing(what: str) -> Any:
    import pytest  # here: the demo runs without it

    if os.environ.get("BENTO_TESTS") == "all":
        pytest.fail(what)
    pytest.skip(what)


def latin_1(directory: Path) -> dict[str, str]:
    """The environment for a locale that is not UTF-8, made below `directory`."""
    made = directory / "locales/en_US.ISO-8859-1"
    made.parent.mkdir()
    argv = [need("localedef"), "-i", "en_US", "-f", "ISO-8859-1", str(made)]
    if subprocess.run(argv, capture_output=True).returncode != 0:
        _missing("needs the sources of locales")
    return {"LOCPATH": str(made.parent), "LC_ALL": made.name}


def write_config(
    directory: Path,
    *,
    flake: bool,
    host: str | Mapping[str, Mapping[str, Any]],
    client: Path | None = CLIENT,
    **behaviour: Any,
) -> Path:
    """Writes a configuration, over an older one if there is one; other files and a `utils` link are left alone.

    host: one name, or several with what differs from the behaviour of all: {"a": {}, "b": {"label": "b2"}}.
    client: copied to utils/bento_client.py, if it exists and `utils` is no link.
    """
    hosts = {host: {}} if isinstance(host, str) else {name: dict(special) for name, special in host.items()}
    unknown = {name for some in (behaviour, *hosts.values()) for name in some} - BEHAVIOURS.keys()
    if unknown:
        raise ValueError(f"the toy has no behaviour {', '.join(sorted(unknown))}")
    if not flake and len(hosts) != 1:
        raise ValueError("several hosts need a flake")
    if platform.machine() != "x86_64":
        behaviour.setdefault("platform", f"{platform.machine()}-linux")

    for some in (behaviour, *hosts.values(), *behaviour.get("specialisations", {}).values()):
        if isinstance(inhibitors := some.get("inhibitors"), str):
            name, _, value = inhibitors.partition(" ")
            some["inhibitors"] = {name: value}

    directory.mkdir(parents=True, exist_ok=True)
    wanted, other = ("flake.nix", "configuration.nix") if flake else ("configuration.nix", "flake.nix")
    (directory / other).unlink(missing_ok=True)
    (directory / wanted).write_text(FLAKE if flake else CHANNELS, encoding="utf-8")
    for name in ("toy.nix", "toy_system.py"):
        shutil.copyfile(TOY / name, directory / name)
    text = json.dumps({"hosts": hosts} | behaviour, indent=2, sort_keys=True) + "\n"
    (directory / "toy.json").write_text(text, encoding="utf-8")
    utils = directory / "utils"
    if client is not None and client.is_file() and not utils.is_symlink():
        utils.mkdir(exist_ok=True)
        shutil.copyfile(client, utils / "bento_client.py")
    return directory


@dataclass(frozen=True)
class Templates:
    """Where machines are kept that others are copies of: what it is made of -> the copy, and the directory that it was in."""

    directory: Path
    made: dict[str, tuple[Path, str]] = field(default_factory=dict)


templates: Templates | None = None  # conftest.py's: who needs one machine needs no copy


def copy_tree(source: Path, target: Path, changes: Mapping[bytes, bytes]) -> None:
    """With times and modes; in all files and links these words become others."""

    def change(text: bytes) -> bytes:
        for old, new in changes.items():
            text = text.replace(old, new)
        return text

    def copy(from_path: str, to_path: str) -> None:
        with open(from_path, "rb") as file, open(to_path, "wb") as copied:
            copied.write(change(file.read()))
        shutil.copystat(from_path, to_path)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)
    for place, directories, files in os.walk(target):
        for path in (os.path.join(place, name) for name in (*directories, *files)):
            if os.path.islink(path) and (leads := os.fsencode(os.readlink(path))) != change(leads):
                os.unlink(path)
                os.symlink(change(leads), path)
    for place, _, _ in os.walk(source):  # the times of directories, which have just changed
        shutil.copystat(place, f"{target}{place.removeprefix(str(source))}")


class ToyDown(Exception):
    """The machine hangs, or has nothing to boot: somebody has to come."""


@dataclass(frozen=True)
class ToyMachine:
    """A machine below a directory. Made by ToyMachine.create()."""

    root: Path
    host: str
    mode: str = "simulated"  # or "nix"
    store: Path | None = None  # TOY_STORE; shared with the server where both build the same system
    chroot: Path | None = None  # TOY_CHROOT

    @classmethod
    def create(
        cls,
        root: Path,
        host: str = "toy",
        *,
        mode: str = "simulated",
        store: Path | None = None,
        chroot: Path | None = None,
        client: Path | None = CLIENT,
        efi: bool = True,
        **behaviour: Any,
    ) -> "ToyMachine":
        """A machine that has booted its first generation: label "v0", unless the behaviour says otherwise. It is a copy of
        an earlier one, where that differs by its directory only.

        efi: whether it has EFI variables.
        """
        machine = cls(root.resolve(), host, mode, store, chroot)
        top = str(machine.root.parent)
        program = client.read_bytes() if client is not None and client.is_file() else b""
        what = repr((host, store, chroot, client, hash(program), efi, sorted(behaviour.items()))).replace(top, "@TOP@")
        if templates is None or mode != "simulated" or machine.root.exists():
            return machine._install(client, efi, behaviour)
        if what in templates.made:
            kept, old = templates.made[what]
            machine._copy(kept, {old: top, (kept / "etc/machine-id").read_text("utf-8").strip(): uuid.uuid4().hex})
        else:
            machine._install(client, efi, behaviour)
            kept = templates.directory / f"{len(templates.made)}"
            shutil.copytree(machine.root, kept, symlinks=True)
            templates.made[what] = kept, top
        return machine

    def _copy(self, kept: Path, changes: Mapping[str, str]) -> None:
        copy_tree(kept, self.root, {old.encode(): new.encode() for old, new in changes.items()})
        (self.root / "proc/sys/kernel/random/boot_id").write_text(f"{uuid.uuid4()}\n", encoding="utf-8")

    def _install(self, client: Path | None, efi: bool, behaviour: Mapping[str, Any]) -> "ToyMachine":
        for name in ("boot", "etc", "run", "nix/var/nix/profiles", "var/lib", "proc/sys/kernel/random"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n", encoding="utf-8")
        self.set_mounts({})
        if efi:
            esp.variables(self.root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            config = write_config(
                Path(scratch, "v0"), flake=True, host=self.host, client=client, **{"label": "v0"} | dict(behaviour)
            )
            self.rebuild("boot", config).check_returncode()
        self.power_cycle()
        return self

    def env(self, **more: str) -> dict[str, str]:
        """The environment of everything that runs on this machine: the toy's programs first on PATH."""
        path = f"{TOY}:{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        mine = {"PATH": path, "TOY_ROOT": str(self.root), "TOY_MODE": self.mode}
        if self.store is not None:
            mine["TOY_STORE"] = str(self.store)
        if self.chroot is not None:
            mine["TOY_CHROOT"] = str(self.chroot)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TOY_", "NIX_"))}
        return inherited | mine | more

    def run(
        self,
        *argv: str | Path,
        cwd: Path | None = None,
        timeout_s: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program of this machine; stdout and stderr together in `.stdout`."""
        done = subprocess.run(
            argv, cwd=cwd or self.root, env=self.env(**(env or {})), timeout=timeout_s,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        told.append(f"$ {shlex.join(map(str, argv))}\n{done.stdout}exit {done.returncode}")
        return done

    def rebuild(
        self, action: str, config: Path, *flags: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """nixos-rebuild ACTION of a configuration, flake or channels; ./result in the machine's root."""
        if (config / "flake.nix").exists():
            source = ["--flake", f"path:{config}#{self.host}"]
        else:
            source = ["--no-flake", "-I", f"nixos-config={config}/configuration.nix"]
        return self.run("nixos-rebuild", action, *source, *flags, env=env)

    # -- power --

    def power_cycle(self, *, pick: str | None = None) -> list[str]:
        """What a power cut and a boot do: /run is empty, and what the boot loader chooses is booted. Ends no process.

        pick: the entry that a person picks in the menu; or "N" for generation N. Returns what became of each start, as
        in ["panics v1", "boots v0"]. ToyDown if the machine does not come up by itself.
        """
        if self.root == Path("/"):
            raise ValueError("this is no toy")
        shutil.rmtree(self.root / "run")
        (self.root / "run").mkdir()
        return self._start(pick)

    def reboot(self, *, pick: str | None = None) -> list[str]:
        """`systemctl reboot`; as for what follows, there is no difference."""
        return self.power_cycle(pick=pick)

    def hibernate(self, *, pick: str | None = None) -> list[str]:
        """Sleeps, and is woken through the boot loader: by the kernel that went to sleep, or it is a boot like any."""
        return self._start(pick, asleep=(self.root / "run/booted-system/kernel").resolve())

    def _start(self, pick: str | None, asleep: Path | None = None) -> list[str]:
        entry = f"nixos-generation-{pick}.conf" if pick and pick.isdigit() else pick
        more = {"TOY_PICK": entry} if entry else {}
        if asleep is not None:
            more["TOY_ASLEEP"] = f"{asleep.parent.name}-{asleep.name}.efi"
        done = self.run("boot", env=more)
        found = re.findall(r"(?m)^boot: \S+ ([a-z ]+) (\S+)/init$", done.stdout)
        starts = [f"{what} {_label(Path(system))}" for what, system in found]
        if done.returncode != 0:
            raise ToyDown(f"{', '.join(starts)}: {done.stdout}")
        return starts

    # -- what a person does --

    @contextlib.contextmanager
    def hold_lock(self) -> Iterator[None]:
        """As a nixos-rebuild does that somebody else has started."""
        path = self.root / "run/nixos/switch-to-configuration.lock"
        path.parent.mkdir(exist_ok=True)
        with open(path, "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def collect_garbage(self) -> None:
        self.run("nix-collect-garbage", "-d").check_returncode()

    def set_mounts(self, kinds: Mapping[str, str]) -> None:
        """What /proc/self/mountinfo says from now on: of directories with a file system of this kind, say a tmpfs."""
        mounts = {"/": "ext4", "/boot": "vfat"} | dict(kinds)
        path = self.root / "proc/self/mountinfo"
        path.parent.mkdir(exist_ok=True)
        lines = [
            f"{40 + number} 1 8:{number} / {place} rw,relatime shared:{number} - {kind} /dev/sda{number} rw\n"
            for number, (place, kind) in enumerate(mounts.items(), 1)
        ]
        path.write_text("".join(lines), encoding="utf-8")

    def limit_boot(self, spare_bytes: int | None) -> None:
        """From now on so many bytes more fit into /boot, or as many as you like."""
        path = self.root / "var/toy-boot-size"
        path.unlink(missing_ok=True)
        if spare_bytes is not None:
            used = sum(file.stat().st_size for file in (self.root / "boot").rglob("*") if file.is_file())
            path.write_text(str(used + spare_bytes), encoding="utf-8")

    # -- which system --

    @property
    def profile(self) -> Path:
        return self.root / "nix/var/nix/profiles/system"

    def current_label(self) -> str:
        return _label(self.root / "run/current-system")

    def booted_label(self) -> str:
        return _label(self.root / "run/booted-system")

    def profile_label(self) -> str:
        return _label(self.profile)

    def boot_label(self) -> str:
        """Of the system that the boot loader would start next."""
        return self._label_of(esp.next_boot(self.root))

    def fallback_label(self) -> str:
        """Of the system that it would start after that."""
        return self._label_of(esp.choose_default(self.root, esp.read_entries(self.root / "boot")))

    def _label_of(self, entry: esp.Entry | None) -> str:
        conf = self.root / "boot/extlinux/extlinux.conf"
        options = entry.options if entry else conf.read_text(encoding="utf-8").replace("\n", " ")
        system = esp.system_of(options)
        return _label(Path(system)) if system else "-"

    def entries(self) -> dict[str, str]:
        """The boot menu: entry -> label of its system."""
        return {entry.id: self._label_of(entry) for entry in esp.read_entries(self.root / "boot")}

    def generations(self) -> list[str]:
        """The labels of the profile's generations, the oldest first."""
        links = sorted(self.profile.parent.glob("system-*-link"), key=lambda link: int(link.name.split("-")[1]))
        return [_label(link) for link in links]

    def activations(self) -> list[str]:
        """The labels of the systems that were activated, by a switch or at a boot, in their order."""
        return (self.root / "var/toy-activations").read_text(encoding="utf-8").split()

    def efi_variable(self, name: str) -> str | None:
        return esp.read_variable(self.root, name)

    def labels(self) -> tuple[str, str, str]:
        """Of the current system, the profile and the boot default: they should agree."""
        return self.current_label(), self.profile_label(), self.boot_label()

    def network(self) -> str:
        """ "up" or "down"."""
        return (self.root / "run/toy-network").read_text(encoding="utf-8").strip()


def _label(system: Path) -> str:
    return (system / "nixos-version").read_text(encoding="utf-8").strip()
