"""A toy machine with the real client, a server's directory, an administrator: what the tests of the client have in common."""

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from accounts import add_user, need_accounts
from toynixos import CLIENT, PYTHON_FLAGS, ToyMachine, compiled_client, need_sftp, write_config

import bento
import bento_client
from bento_client import Current, Last, Report, log_name, parse_current, parse_report, parse_state

A, B = "a" * 64, "b" * 64
NOON = 1_795_435_200.0  # 2026-11-23T12:00:00Z


def attempt(result: str, number: int = 1, *, release: str = A, finished_s: float = NOON) -> Last:
    finished = bento_client.format_time(finished_s)
    log = log_name(finished_s, release, result)
    return Last(release, result, "a reason", None, finished, finished, number, log)


QUARTER = 15 * 60
HOST = f"toy{os.getpid()}"
SERVER = "server.example"
# A proof that is to succeed takes what it takes on a busy machine; one that is to fail is tried again for so long.
PATIENCE_S, HASTE_S = 30, 2


@cache
def make_account() -> None:
    """As root, `populate` wants the account of the host, as on a real server. Once for all tests, one of which may just play
    somebody else: hence not geteuid."""
    if os.getuid() == 0:
        need_accounts()
        add_user(f"bento-{HOST}", "bento")


@dataclass
class Lab:
    """One server and one host. `down`: a file; while it exists, the server is down."""

    directory: Path
    machine: ToyMachine
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, directory: Path, *, state: str = "var/lib/bento", **behaviour: Any) -> "Lab":
        need_sftp()
        make_account()
        root = directory / "machine"
        settings = {
            "server": SERVER, "host": HOST, "root": str(root), "state_dir": str(root / state),
            "connect_timeout": 1, "confirm_timeout": PATIENCE_S, "activation_timeout": 20, "reboot_without_trial": True,
        }  # fmt: skip
        chroot = directory / "chroot" / HOST
        machine = ToyMachine.create(root, HOST, chroot=chroot, **{"client_json": settings} | behaviour)
        lab = cls(directory, machine, settings)
        lab.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (lab.state / "id_ed25519").write_text("the toy's ssh asks for none\n")
        return lab

    @property
    def state(self) -> Path:
        return Path(self.settings["state_dir"])

    @property
    def chroot(self) -> Path:
        return self.directory / "chroot" / HOST

    @property
    def config(self) -> Path:
        return self.directory / "fleet/hosts" / HOST

    @property
    def down(self) -> Path:
        return self.directory / "down"

    def file(self, name: str) -> str:
        return str(self.directory / name)

    def use_two_servers(self) -> None:
        """With known host keys, without which a list of servers is refused."""
        Path(self.file("known")).touch()
        self.settings |= {"server": ["first", "second"], "known_hosts": self.file("known")}

    def publish(self, label: str, *, flake: bool = True, settings: dict[str, Any] | None = None, **behaviour: Any) -> str:
        """Writes and publishes a configuration; the release's name. `settings` differ in the new system only."""
        client_json = self.settings | (settings or {})
        write_config(self.config, flake=flake, host=HOST, label=label, client_json=client_json, **behaviour)
        return self.populate()

    def populate(self) -> str:
        argv = ["--fleet", str(self.directory / "fleet"), "--chroot-dir", str(self.directory / "chroot"), "populate"]
        assert bento.main(argv) == 0
        return parse_current((self.chroot / "current.json").read_bytes(), "current.json", HOST).release

    def publish_raw(self, tar: bytes, *, release: str | None = None, size: int | None = None) -> str:
        """What `populate` would never publish."""
        release = release or hashlib.sha256(tar).hexdigest()
        (self.chroot / "releases" / f"{release}.tar").write_bytes(tar)
        current = Current(HOST, release, len(tar) if size is None else size, bento_client.format_time(time.time()))
        (self.chroot / "current.json").write_bytes(bento_client.encode(current))
        return release

    def argv(self, *words: str, code: int | None = 0) -> list[str]:
        """The client, with settings from a file. Where exit code 0 is not expected, a proof that fails is given up soon."""
        config, limit_s = self.directory / "client.json", self.settings["confirm_timeout"]
        haste = {"confirm_timeout": HASTE_S} if code != 0 and limit_s == PATIENCE_S else {}
        config.write_text(json.dumps(self.settings | haste))
        return [sys.executable, *PYTHON_FLAGS, compiled_client(), "--config", str(config), *words]

    def env(self, **more: str) -> dict[str, str]:
        return {"TOY_SERVER": SERVER, "TOY_SERVER_DOWN": str(self.down)} | more

    def client(self, *words: str, code: int = 0, **env: str) -> str:
        """Runs the client to its end, and returns what it said."""
        done = self.machine.run(*self.argv(*words, code=code), env=self.env(**env))
        assert done.returncode == code, f"exit {done.returncode}, not {code}"
        assert "Traceback" not in done.stdout
        return done.stdout

    def run_patched(self, patch: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Like `run`, with constants of the client's module, here `c`, changed."""
        code = f"import sys; sys.path.insert(0, {str(CLIENT.parent)!r}); import bento_client as c; {patch}; sys.exit(c.main())"
        return self.machine.run(sys.executable, "-c", code, *self.argv("run")[len(PYTHON_FLAGS) + 2 :], env=self.env(**env))

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with open(self.directory / "output", "ab") as out:
            return subprocess.Popen(
                self.argv(*words), env=self.machine.env(**self.env()), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(60)
        finally:
            kill_tree(process)

    def labels(self) -> tuple[str, str, str]:
        return self.machine.labels()

    def report(self) -> Report:
        """The report that the server has."""
        return parse_report((self.chroot / "logs/status.json").read_bytes(), "status.json")

    def phase(self) -> str:
        return self.report().phase if (self.chroot / "logs/status.json").exists() else ""

    def last(self) -> Last:
        last = self.report().last
        assert last is not None
        return last

    def logs(self) -> list[str]:
        """Names of the logs that the server has, as they came: two attempts may end in one second, which is in their names."""
        found = ((path.stat().st_mtime_ns, path.name) for path in (self.chroot / "logs").glob("*.log"))
        return [name for _, name in sorted(found)]

    def log(self) -> str:
        return (self.chroot / "logs" / self.last().log).read_text()

    def age_attempts(self, seconds: float) -> None:
        """As if the last attempt had been so long ago."""
        path = self.state / "state.json"
        state = parse_state(path.read_bytes(), "state.json")
        assert state.tried is not None

        def earlier(time: str) -> str:
            return bento_client.format_time(bento_client.parse_time(time) - seconds)

        tried = state.tried._replace(finished=earlier(state.tried.finished))
        not_before = state.not_before and earlier(state.not_before)
        path.write_bytes(bento_client.encode(state._replace(tried=tried, not_before=not_before)))


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(words[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills a client with everything it has started, as systemd does with a unit's processes."""
    for pid in descendants(process.pid) if process.poll() is None else ():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def tree(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Names, kinds and contents of everything below a directory."""
    found: dict[str, tuple[str, bytes]] = {}
    for path in directory.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            kind, content = "directory", b""
        else:
            kind = "program" if mode & 0o100 else "file"
            content = path.read_bytes()
        found[str(path.relative_to(directory))] = kind, content
    return found


def fake_sftp(lab: Lab, script: str) -> str:
    return fake_program(lab, "sftp", script)


def fake_program(lab: Lab, name: str, script: str) -> str:
    """A PATH on which a program is this shell script. In it, the program is the toy's."""
    toy, fake = lab.machine.env()["PATH"], lab.directory / "path" / name
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f"#!/bin/sh\nPATH={toy}\n{script}")
    fake.chmod(0o755)
    return f"{fake.parent}:{toy}"


def archive(*members: tarfile.TarInfo, content: bytes = b"content\n") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.pax_headers = {name.replace("_", "."): value for name, value in pax.items()}
    return info


SYSTEMD_RUN = """\
#!{python}
import json, os, subprocess, sys
at = sys.argv.index("--")
options, command = dict(word.partition("=")[::2] for word in sys.argv[1:at]), sys.argv[at + 1:]
unit = options["--unit"]
if "--on-active" in options:
    with open("{top}/timers/" + unit, "w") as file:
        json.dump(command, file)
    sys.exit(0)
sinks = [word.split("append:", 1)[1] for word in sys.argv[1:at] if "StandardOutput=append:" in word]
limit_s = [word.split("=")[2] for word in sys.argv[1:at] if "RuntimeMaxSec=" in word]
keep = 'timeout --foreground -s KILL "$1" "${{@:3}}"; echo $? >"$2.aside"; mv "$2.aside" "$2"'
with open(sinks[0] if sinks else os.devnull, "ab") as out:
    argv = ["bash", "-c", keep, "sh", limit_s[0], "{top}/codes/" + unit, *command]
    process = subprocess.Popen(argv, stdout=out, stderr=out, start_new_session=True)
open("{top}/units/" + unit, "w").write(str(process.pid))
"""
SYSTEMCTL = """\
#!{python}
import fnmatch, os, signal, sys, time
verb, *units = [word for word in sys.argv[1:] if not word.startswith("-")]
open("{top}/said", "a").write(" ".join((verb, *units)) + "\\n")
table = os.environ["TOY_ROOT"] + "/run/toy-units"
os.makedirs(table, exist_ok=True)

def alive(name):
    try:
        state = open("/proc/" + open("{top}/units/" + name).read() + "/stat").read()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"

def show(unit):
    name, known = unit.removesuffix(".service"), os.listdir("{top}/units")
    if name not in known:
        state = "active" if os.path.exists(table + "/" + unit) else "inactive"
        return "LoadState=loaded\\nActiveState=" + state + "\\nBusName=\\nWantedBy=\\nRequiredBy=\\n"
    if alive(name):
        return "LoadState=loaded\\nActiveState=active\\nResult=success\\nExecMainStatus=0\\n"
    try:
        code = int(open("{top}/codes/" + name).read())
    except OSError:
        return "LoadState=loaded\\nActiveState=failed\\nResult=signal\\nExecMainStatus=9\\n"
    how = {{0: "success", 137: "timeout"}}.get(code, "exit-code")
    load, state = ("loaded", "failed") if code else ("not-found", "inactive")
    return f"LoadState={{load}}\\nActiveState={{state}}\\nResult={{how}}\\nExecMainStatus={{code}}\\n"

if verb == "stop":
    for unit in units:
        timer = "{top}/timers/" + unit.removesuffix(".timer")
        if os.path.exists(table + "/" + unit):
            os.unlink(table + "/" + unit)
        elif os.path.exists(timer):
            os.unlink(timer)
        elif unit.endswith(".timer"):
            sys.exit(5)  # not loaded: gone with the boot, or with its client
        for name in filter(alive, fnmatch.filter(os.listdir("{top}/units"), unit.removesuffix(".service"))):
            os.killpg(int(open("{top}/units/" + name).read()), signal.SIGKILL)
elif units == ["reboot.target"]:
    open("{top}/reboots", "a").write("x")
elif verb in ("start", "restart"):
    for unit in units:
        open(table + "/" + unit, "w").close()
elif verb == "show":
    print(*(show(unit) if "--value" not in sys.argv else show(unit).split("ActiveState=")[1].split()[0] for unit in units), sep="\\n")
elif verb == "list-units":
    print(*(unit + " loaded active running" for unit in sorted(os.listdir(table))), sep="\\n")
elif verb == "is-active":
    found = fnmatch.filter(os.listdir("{top}/units"), units[0].removesuffix(".service"))
    timer = os.path.exists("{top}/timers/" + units[0].removesuffix(".timer"))
    sys.exit(0 if units[0] == "bento.timer" or timer or any(map(alive, found)) else 3)
elif verb == "is-system-running":
    print("starting" if os.path.exists("{top}/starting") else "running")
elif verb == "reboot":
    if os.path.exists("{top}/no-reboot") and "--force" not in sys.argv:
        print("Operation inhibited")
        sys.exit(1)
    gone = [name for name in ("toy-logind", "toy-no-bus") if os.path.exists(os.environ["TOY_ROOT"] + "/run/" + name)]
    if gone and "--force" not in sys.argv:
        time.sleep(50)  # it asks logind first, for 25 s a question
    open("{top}/reboots", "a").write("x")
"""
BUSCTL = '#!/bin/sh\n[ ! -e "$TOY_ROOT/run/toy-no-bus" ]\n'


class Systemd:
    """systemd-run and systemctl of a toy machine, where no systemd runs: the lab has the real ones. They keep the timers
    that are armed and the reboots that are asked for; nothing fires by itself. What systemd-run starts outlives the client.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab, self.top, self.seen = lab, lab.directory / "systemd", 0
        for name in ("timers", "units", "codes"):
            (self.top / name).mkdir(parents=True)
        for name, text in (("systemd-run", SYSTEMD_RUN), ("systemctl", SYSTEMCTL), ("busctl", BUSCTL)):
            text = text if name == "busctl" else text.format(python=sys.executable, top=self.top)
            (self.top / name).write_text(text, encoding="utf-8")
            (self.top / name).chmod(0o755)
        self.path = f"{self.top}:{lab.machine.env()['PATH']}"
        self.come_up()

    def come_up(self) -> None:
        (self.lab.machine.root / "run/systemd/system").mkdir(parents=True, exist_ok=True)

    def boot(self, pick: str | None = None) -> list[str]:
        """A power cut and a boot; or the reboot that was asked for."""
        for timer in (self.top / "timers").iterdir():
            timer.unlink()
        self.seen = self.reboots()
        starts = self.lab.machine.power_cycle(pick=pick)
        self.come_up()
        return starts

    def run(self, *words: str, code: int = 0, **env: str) -> str:
        return self.lab.client(*words, code=code, PATH=self.path, **env)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with open(self.lab.directory / "output", "ab") as out:
            env = self.lab.machine.env(**self.lab.env(PATH=self.path))
            return subprocess.Popen(self.lab.argv(*words), env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def fire(self, *, code: int = 0) -> str:
        """Lets the one watchdog that is armed do its work."""
        [timer] = (self.top / "timers").iterdir()
        argv = json.loads(timer.read_text())
        timer.unlink()
        done = self.lab.machine.run(*argv, env=self.lab.env(PATH=self.path))
        assert done.returncode == code, done.stdout
        return done.stdout

    def active(self) -> set[str]:
        """The units that are up."""
        return set(os.listdir(self.lab.machine.root / "run/toy-units"))

    def timers(self) -> list[list[str]]:
        return [json.loads(timer.read_text()) for timer in (self.top / "timers").iterdir()]

    def said(self) -> list[str]:
        """What systemctl was asked for, without its flags."""
        return (self.top / "said").read_text().splitlines()

    def reboots(self) -> int:
        path = self.top / "reboots"
        return len(path.read_text()) if path.exists() else 0

    def is_to_boot(self) -> bool:
        """Whether a reboot was asked for since the last one."""
        return self.reboots() > self.seen


def at_any_price(lab: Lab, *words: str, **env: str) -> str:
    """Runs the client whatever its exit code."""
    said = lab.machine.run(*lab.argv(*words, code=None), env=lab.env(**env)).stdout
    assert "Traceback" not in said
    return said


def inhibited(directory: Path) -> Lab:
    return Lab.create(directory, inhibitors="dbus 1")


def result(lab: Lab) -> tuple[str, str | None]:
    last = bento_client.parse_state((lab.state / "state.json").read_bytes(), "state.json").last
    assert last is not None
    return last.result, last.release


def be_patient(lab: Lab) -> None:
    """As if it had been tried long enough to prove this boot."""
    (lab.machine.root / "run/bento-proofs").write_text(f"{time.monotonic() - 2 * bento_client.FIRST_TRIAL_S}\n")
