"""The client against the toy NixOS: what it refuses, what it survives, and how it comes back. No sshd, no Nix."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from toynixos import ToyMachine, write_config

import bento_client as client
from bento_client import Action, Current, Last, Result, State

REPO = Path(__file__).resolve().parent.parent
AS_ANYBODY = "import os, sys; os.geteuid = lambda: 1; import bento; sys.exit(bento.main())"
LACKING = [  # what NixOS' python3Minimal does not have
    "zlib", "gzip", "bz2", "_bz2", "lzma", "_lzma", "ctypes", "_ctypes", "ssl", "_ssl", "sqlite3", "_sqlite3", "pyexpat",
    "readline", "curses", "_curses",
]  # fmt: skip


@dataclass
class Loop:
    """One host and its server's files, in a directory whose name has a space."""

    top: Path
    machine: ToyMachine
    settings: dict[str, Any]

    @property
    def state(self) -> Path:
        return Path(self.settings["state_dir"])

    @property
    def chroot(self) -> Path:
        return self.top / "chroot/toy"

    @property
    def config(self) -> Path:
        return self.top / "fleet/hosts/toy"

    def bento(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv: list[str | Path] = [sys.executable, "-c", AS_ANYBODY, "--fleet", self.top / "fleet"]
        return subprocess.run(
            [*argv, "--chroot-dir", self.top / "chroot", *arguments],
            env=os.environ | {"PYTHONPATH": str(REPO)}, text=True, capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    def publish(self, label: str, *, flake: bool = True, **behaviour: Any) -> None:
        behaviour.setdefault("client_json", self.settings)
        write_config(self.config, flake=flake, host="toy", label=label, **behaviour)
        done = self.bento("populate")
        assert done.returncode == 0, done.stderr

    def argv(self, *arguments: str) -> list[str]:
        path = self.top / "client.json"
        path.write_text(json.dumps(self.settings))
        return [sys.executable, "-I", str(REPO / "bento_client.py"), "--config", str(path), *arguments]

    def run(self, *arguments: str, code: int, **env: str) -> str:
        done = self.machine.run(*self.argv(*(arguments or ("run",))), env=env)
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv("run"), env=self.machine.env(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def status(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.chroot / "logs/status.json").read_text())
        return loaded

    def last(self) -> tuple[str, str]:
        last = self.status()["last"]
        return last["result"], last["reason"]


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    top = tmp_path / "a b"
    machine = ToyMachine.create(top / "machine", "toy", chroot=top / "chroot/toy")
    settings = {
        "server": "server.example", "host": "toy", "root": str(top / "machine"), "connect_timeout": 1,
        "state_dir": str(top / "machine/var/lib/bento"), "confirm_timeout": 2, "activation_timeout": 5,
    }  # fmt: skip
    made = Loop(top, machine, settings)
    made.publish("v1")
    made.run("key", code=0)
    made.run(code=0)
    assert machine.labels() == ("v1",) * 3
    return made


# --- decisions ---

A, B = "a" * 64, "b" * 64
NOON_S = client.parse_time("2026-11-23T12:00:00Z")


def tried(result: str, attempt: int = 1, release: str = A) -> State:
    last = Last(release, result, "why", None, "2026-11-23T11:59:00Z", "2026-11-23T12:00:00Z", attempt, "x")
    return State(tried=last, unpacked=A, published="2026-11-23T11:00:00Z")


@pytest.mark.parametrize(
    ("state", "after_s", "force", "wanted"),
    [
        (State(), 0, False, Action.FETCH),
        (State(unpacked=A), 0, False, Action.RETRY),
        (tried("ok"), 0, False, Action.NOTHING),
        (tried("ok"), 0, True, Action.RETRY),
        (tried("ok", release=B), 0, False, Action.RETRY),
        (tried("rolled-back"), 10**8, False, Action.NOTHING),
        (tried("rolled-back"), 0, True, Action.RETRY),
        (tried("rollback-failed"), 10**8, False, Action.NOTHING),
        (tried("build-failed"), 60, False, Action.NOTHING),
        (tried("build-failed"), 15 * 60, False, Action.RETRY),
        (tried("build-failed", 2), 29 * 60, False, Action.NOTHING),
        (tried("build-failed", 2), 30 * 60, False, Action.RETRY),
        (tried("build-failed", 50), 24 * 3600, False, Action.RETRY),
        (tried("build-failed", 50), 23 * 3600, False, Action.NOTHING),
        (tried("build-failed", 50), -10 * 24 * 3600, False, Action.RETRY),  # the clock was set back
        (tried("postponed"), 0, False, Action.RETRY),
        (tried("postponed", 3), 0, False, Action.RETRY),
        (tried("postponed", 4), 60, False, Action.NOTHING),
        (tried("interrupted"), 0, False, Action.RETRY),
        (replace(tried("interrupted", 2), interruptions=2), 10**8, False, Action.NOTHING),
    ],
)
def test_decide(state: State, after_s: float, force: bool, wanted: Action) -> None:
    current = Current("toy", A, 1, "2026-11-23T11:00:00Z")
    assert client.decide(current, state, NOON_S + after_s, force=force)[0] == wanted


def test_decide_never_goes_back_to_what_a_replica_still_has() -> None:
    current = Current("toy", B, 1, "2026-11-23T10:59:59Z")
    assert client.decide(current, tried("ok"), NOON_S, replica=True)[0] == Action.NOTHING
    assert client.decide(current, tried("ok"), NOON_S)[0] == Action.FETCH


@pytest.mark.parametrize(
    ("setting", "at", "wanted"),
    [
        ("never", (3, 0), False), ("when-needed", (3, 0), True), ("03:00-05:00", (2, 59), False),
        ("03:00-05:00", (3, 0), True), ("03:00-05:00", (5, 0), False), ("22:00-04:00", (23, 0), True),
        ("22:00-04:00", (3, 59), True), ("22:00-04:00", (12, 0), False),
    ],
)  # fmt: skip
def test_may_reboot(setting: str, at: tuple[int, int], wanted: bool) -> None:
    assert client.may_reboot(setting, *at) is wanted


def test_settings_come_back_from_their_flags() -> None:
    given = {
        "server": ["a", "b.example"], "host": "toy", "port": 2222, "ssh_options": ["ProxyCommand=nc %h", "-x y"],
        "health_checks": ["true && 'x y'"], "upgrade_channels": True, "reboot": "03:00-05:00", "state_dir": "/s p",
    }  # fmt: skip
    settings = client.make_settings(given, "test")
    options = vars(client.make_parser().parse_args([*client.settings_argv(settings), "run"]))
    assert client.read_settings(options) == settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": ""}, {"host": "-x"}, {"host": "a.b"}, {"host": "x" * 27}, {"port": "22"}, {"port": True}, {"port": 0},
        {"server": "-oProxyCommand=x"}, {"server": "a:22"}, {"server": 5}, {"server": ["a", 5]}, {"server": "a b"},
        {"reboot": "maybe"}, {"health_checks": "true"}, {"user": "x y"}, {"connect_timeout": -1},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"host": "toy", "server": "s"} | wrong))
    assert client.main(["--config", str(tmp_path / "c.json"), "status"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bento: error: {tmp_path}/c.json: setting {next(iter(wrong))!r}") and error.count("\n") == 1


# --- the machine ---


def test_unchanged_system_is_ok_without_activation(loop: Loop) -> None:
    loop.publish("v1", pure=True)
    loop.run(code=0)
    (loop.config / "README").write_text("new words")
    loop.publish("v1", pure=True)
    said = loop.run(code=0)
    assert "nothing to activate" in said and "bento: test" not in said
    assert loop.last()[0] == "ok" and loop.status()["release"] is not None


def test_channels(loop: Loop) -> None:
    loop.publish("v2", flake=False)
    assert "-I" in loop.run(code=0)
    assert loop.machine.labels() == ("v2",) * 3


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"build": "fail"}, "nixos-rebuild build: exit 1: error: "),
        ({"build": "eval-error"}, "nixos-rebuild build: exit 1: error: "),
        ({"no_bento": True}, "the new system has no sw/bin/bento-client"),
    ],
)
def test_what_does_not_build_is_not_activated(loop: Loop, behaviour: dict[str, Any], words: str) -> None:
    loop.publish("v2", **behaviour)
    assert words in loop.run(code=1)
    assert loop.machine.labels() == ("v1",) * 3
    result, reason = loop.last()
    assert result == "build-failed" and words in reason
    assert "next attempt in 14min" in loop.run(code=0)
    loop.publish("v3")
    loop.run(code=0)
    assert loop.machine.labels() == ("v3",) * 3


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"cut_network": True}, "Network is unreachable"),
        ({"switch_exit": 2}, "switch-to-configuration test: exit 2"),
        ({"switch_exit": 1}, "switch-to-configuration test: exit 1"),
        ({"switch_hang": "after"}, "switch-to-configuration test: no end in time"),
        ({"broken_client": True}, "new system: "),
        ({"client_json": {"health_checks": ["false"]}}, "health check failed (exit 1): false"),
        ({"client_json": {"server": "typo.example"}}, "typo.example: its name cannot be resolved"),
        ({"client_json": {"identity": "/nowhere"}}, "no SSH key at /nowhere"),
    ],
)
def test_bad_release_is_rolled_back_and_not_retried(loop: Loop, behaviour: dict[str, Any], words: str) -> None:
    if "client_json" in behaviour:
        behaviour = {"client_json": loop.settings | behaviour["client_json"]}
    loop.publish("v2", **behaviour)
    loop.run(code=1, TOY_SERVER="server.example")
    assert loop.machine.labels() == ("v1",) * 3
    result, reason = loop.last()
    assert result == "rolled-back" and words in reason
    assert "waiting for a new release" in loop.run(code=0)
    assert not (loop.state / "pending.json").exists()
    loop.publish("v3")
    loop.run(code=0)
    assert loop.machine.labels() == ("v3",) * 3


def test_failed_units_are_named_and_no_reason_to_go_back(loop: Loop) -> None:
    loop.publish("v2", switch_exit=4, failed_units=["cups.service"])
    loop.run(code=0)
    assert loop.machine.labels() == ("v2",) * 3
    assert loop.last() == ("ok", "activated, but these units failed: cups.service")


def test_boot_loader_that_cannot_be_written(loop: Loop) -> None:
    loop.publish("v2", boot_exit=1)
    loop.run(code=1)
    assert loop.machine.labels() == ("v1",) * 3
    assert loop.last()[0] == "postponed" and "boot loader" in loop.last()[1]


def test_server_that_goes_away_during_the_build(loop: Loop) -> None:
    down = loop.top / "down"
    loop.publish("v2", build_touch=str(down))
    assert "the server went away" in loop.run(code=75, TOY_SERVER_DOWN=str(down))
    assert loop.machine.labels() == ("v1",) * 3
    down.unlink()
    (loop.config / "toy.json").touch()
    said = loop.run(code=0)
    assert "attempt 2" in said and loop.machine.labels() == ("v2",) * 3
    names = sorted(path.name.split("_")[2] for path in (loop.chroot / "logs").glob("*.log"))
    assert names == ["ok.log", "ok.log", "postponed.log"]


def test_server_that_goes_away_for_the_proof(loop: Loop) -> None:
    down = loop.top / "down"
    loop.publish("v2", switch_touch=str(down))
    said = loop.run(code=75, TOY_SERVER_DOWN=str(down))
    assert "not the release's fault" in said
    assert loop.machine.labels() == ("v1",) * 3
    down.unlink()
    write_config(loop.config, flake=True, host="toy", label="v2", client_json=loop.settings)
    loop.run(code=0)
    assert loop.machine.labels() == ("v2",) * 3 and loop.last()[0] == "ok"


def test_roll_back_that_fails_is_said_and_tried_again(loop: Loop) -> None:
    loop.publish("v2", fails_from="v3", fails_from_times=1)
    loop.run(code=0)
    loop.publish("v3", cut_network=True)
    assert "error: rollback-failed" in loop.run(code=1)
    loop.run(code=0)
    assert loop.machine.labels() == ("v2",) * 3
    assert loop.last()[0] == "rolled-back"
    loop.publish("v4")
    loop.run(code=0)
    assert loop.machine.labels() == ("v4",) * 3


def kill_at(loop: Loop, touched: Path) -> None:
    """Starts a run and kills it as soon as the file is there."""
    process = loop.start()
    for _ in range(400):
        if touched.exists():
            break
        time.sleep(0.02)
    assert touched.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    touched.unlink()


@pytest.mark.parametrize("restart", [False, True], ids=["killed", "power-cut"])
@pytest.mark.parametrize("phase", ["build", "switch", "boot"])
def test_run_that_is_cut_short(loop: Loop, phase: str, restart: bool) -> None:
    """The machine never stays in between; an activation that was cut short is tried once more, then given up."""
    touched, go = loop.top / "touched", loop.top / "go"
    behaviour: dict[str, Any] = {f"{phase}_touch": str(touched), f"{phase}_wait": str(go)}
    loop.publish("v2", **behaviour)
    for _ in range(2):
        kill_at(loop, touched)
        go.touch()  # what was left waiting goes on, as an orphan does
        time.sleep(0.3)
        if restart:
            loop.machine.power_cycle()
        go.unlink()
        if phase != "switch":
            break
    go.touch()
    loop.machine.run(*loop.argv("run"))
    if phase == "switch":
        assert loop.machine.labels() == ("v1",) * 3 and loop.last()[0] == "interrupted"
        assert "interrupted twice" in loop.run(code=0)
    else:
        assert loop.machine.labels() == ("v2",) * 3 and loop.last()[0] == "ok"
    assert not (loop.state / "pending.json").exists()
    loop.publish("v3")
    loop.run(code=0)
    assert loop.machine.labels() == ("v3",) * 3


def test_new_kernel_is_proven_after_the_reboot(loop: Loop) -> None:
    loop.publish("v2", inhibitors="dbus-broker")
    loop.run(code=0)
    loop.machine.power_cycle()
    loop.publish("v3", inhibitors="dbus")
    said = loop.run(code=0)
    assert "takes effect at the next reboot" in said
    assert loop.machine.current_label() == "v2" and loop.machine.boot_label() == "v3"
    assert loop.status()["needs_reboot"] is True
    loop.machine.power_cycle()
    loop.run(code=0)
    assert loop.machine.labels() == ("v3",) * 3
    assert loop.last()[0] == "ok" and loop.status()["needs_reboot"] is False


def test_kernel_without_network_is_taken_back(loop: Loop) -> None:
    loop.publish("v2", inhibitors="a")
    loop.run(code=0)
    loop.machine.power_cycle()
    loop.publish("v3", inhibitors="b", kernel="broken")
    loop.run(code=0)
    loop.machine.power_cycle()
    assert loop.machine.network() == "down"
    loop.machine.run(*loop.argv("run"))
    assert loop.machine.labels() == ("v3", "v2", "v2")  # the systems' inhibitors forbid going back live
    loop.machine.power_cycle()
    loop.publish("v4", inhibitors="a")
    loop.run(code=0)
    assert loop.machine.labels() == ("v4",) * 3


def test_rollback_by_hand(loop: Loop) -> None:
    loop.publish("v2")
    loop.run(code=0)
    assert "rolled-back: by hand" in loop.run("rollback", code=0)
    assert loop.machine.labels() == ("v1",) * 3
    assert "was rolled back (by hand)" in loop.run(code=0)
    loop.run("run", "--force", code=0)
    assert loop.machine.labels() == ("v2",) * 3


def test_late_watchdog_does_nothing(loop: Loop) -> None:
    assert "nothing to do" in loop.run("rollback", "--token", "12345678", code=0)
    assert loop.machine.labels() == ("v1",) * 3


def test_watchdog_ends_a_client_that_hangs(loop: Loop) -> None:
    touched = loop.top / "touched"
    loop.publish("v2", switch_touch=str(touched), switch_hang="after")
    loop.settings["activation_timeout"] = 60
    process = loop.start()
    for _ in range(400):
        if touched.exists():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    token = json.loads((loop.state / "pending.json").read_text())["token"]
    time.sleep(0.5)
    said = loop.run("rollback", "--token", token, code=0)
    process.wait(10)
    assert "ending the client" in said and "the client hung while activating" in said
    assert loop.machine.labels() == ("v1",) * 3 and loop.last()[0] == "interrupted"


def test_two_runs_at_once(loop: Loop) -> None:
    touched = loop.top / "touched"
    loop.publish("v2", build_touch=str(touched), build_wait=str(loop.top / "go"))
    process = loop.start()
    while not touched.exists():
        time.sleep(0.02)
    assert "another run is at work" in loop.run(code=0)
    (loop.top / "go").touch()
    process.communicate()
    assert process.returncode == 0 and loop.machine.labels() == ("v2",) * 3


def test_damaged_journals_are_set_aside(loop: Loop) -> None:
    for name in ("state.json", "pending.json"):
        (loop.state / name).write_text("{")
    loop.publish("v2")
    said = loop.run(code=0)
    assert said.count("set aside as") == 2 and loop.machine.labels() == ("v2",) * 3


# --- what is refused ---


def forge(loop: Loop, make: Callable[[tarfile.TarFile], None]) -> None:
    """Publishes a tar of our own under its right name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        make(tar)
    release = hashlib.sha256(buffer.getvalue()).hexdigest()
    (loop.chroot / f"releases/{release}.tar").write_bytes(buffer.getvalue())
    announce(loop, release=release, size=len(buffer.getvalue()))


def announce(loop: Loop, **changes: Any) -> None:
    path = loop.chroot / "current.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[tarfile.TarFile], None]:
    def make(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        tar.addfile(info)

    return make


def twice(tar: tarfile.TarFile) -> None:
    member("x")(tar)
    member("x")(tar)


@pytest.mark.parametrize(
    "make",
    [
        member("/etc/x"), member("../x"), member("a/../../x"), member("x", tarfile.SYMTYPE, "/etc/passwd"),
        member("x", tarfile.LNKTYPE, "/etc/passwd"), member("x", tarfile.CHRTYPE), member("x", tarfile.FIFOTYPE),
        member("x", tarfile.BLKTYPE), member("x", tarfile.GNUTYPE_SPARSE), twice, member("missing/x"), member("./x"),
    ],
)  # fmt: skip
def test_hostile_archive(loop: Loop, make: Callable[[tarfile.TarFile], None]) -> None:
    refused(loop, lambda: forge(loop, make))


def damage_tar(loop: Loop) -> None:
    write_config(loop.config, flake=True, host="toy", label="damaged", client_json=loop.settings)
    loop.bento("populate")
    tar = next(loop.chroot.glob(f"releases/{json.loads((loop.chroot / 'current.json').read_text())['release']}.tar"))
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)


def truncate_tar(loop: Loop) -> None:
    damage_tar(loop)
    tar = loop.chroot / f"releases/{json.loads((loop.chroot / 'current.json').read_text())['release']}.tar"
    os.truncate(tar, 4096)


def larger_tar(loop: Loop) -> None:
    damage_tar(loop)
    tar = loop.chroot / f"releases/{json.loads((loop.chroot / 'current.json').read_text())['release']}.tar"
    os.truncate(tar, 50 << 20)


def rewrite(text: str | bytes) -> Callable[[Loop], None]:
    def spoil(loop: Loop) -> None:
        (loop.chroot / "current.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damage_tar, "SHA-256"), (truncate_tar, "announced"), (larger_tar, "announced"),
        (rewrite(""), "not JSON"), (rewrite('{"format": 1, "host'), "not JSON"), (rewrite(b"\xff\xfe"), "not JSON"),
        (rewrite("[1]"), "not a JSON object"), (rewrite("[" * 5000), "not JSON"), (rewrite('{"format": NaN}'), "not JSON"),
        (rewrite(" " * 100_000), "bytes"), (rewrite('{"format": 1}'), "missing or malformed"),
        (lambda loop: announce(loop, format=2), "update Bento"), (lambda loop: announce(loop, host="other"), "'other'"),
        (lambda loop: announce(loop, release="../../x"), "'release'"), (lambda loop: announce(loop, size=-1), "'size'"),
        (lambda loop: announce(loop, release=B, size=1 << 50), "more than the limit"),
        (lambda loop: announce(loop, release=B), "not found"),
    ],
)  # fmt: skip
def test_spoilt_publication(loop: Loop, spoil: Callable[[Loop], None], words: str) -> None:
    refused(loop, lambda: spoil(loop), words)


def refused(loop: Loop, spoil: Callable[[], None], words: str = "the release") -> None:
    """The client keeps what it had, says why, reports it, and takes the next good release."""
    before = {path: path.read_bytes() for path in (loop.state / "config").rglob("*") if path.is_file()}
    spoil()
    said = loop.run(code=1)
    assert words in said, said
    assert {path: path.read_bytes() for path in (loop.state / "config").rglob("*") if path.is_file()} == before
    assert loop.machine.labels() == ("v1",) * 3
    assert loop.last()[0] == "fetch-failed" and words in loop.last()[1]
    loop.publish("good")
    loop.run(code=0)
    assert loop.machine.labels() == ("good",) * 3


def test_glitch_does_not_make_it_try_a_bad_release_again(loop: Loop) -> None:
    loop.publish("v2", cut_network=True)
    loop.run(code=1)
    good = (loop.chroot / "current.json").read_bytes()
    (loop.chroot / "current.json").write_text("")
    loop.run(code=1)
    (loop.chroot / "current.json").write_bytes(good)
    assert "was rolled back" in loop.run(code=0)


def test_nothing_published(loop: Loop) -> None:
    (loop.chroot / "current.json").unlink()
    assert "nothing is published for toy there" in loop.run(code=1)
    assert "nothing is published" in loop.run("probe", code=75)


# --- what arrives ---


def test_every_name_arrives_as_it_was(loop: Loop) -> None:
    names = [
        "with space", "quote'", 'double"', "new\nline", "-dash", "--help", "*", "[a]?", "~", "$HOME", "a\\b", "x" * 200,
        "größe-日本", "\t", "#c", "%s", ";ls", "..x", "a/deep/er/" + "y" * 200,
    ]  # fmt: skip
    for number, name in enumerate(names):
        path = loop.config / "names" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}")
    (loop.config / "empty").touch()
    (loop.config / "directory").mkdir()
    (loop.config / "program").write_text("#!/bin/sh\n")
    (loop.config / "program").chmod(0o700)
    loop.publish("v2")
    loop.run(code=0)
    got = loop.state / "config"
    for number, name in enumerate(names):
        assert (got / "names" / name).read_text() == f"{number}"
    assert (got / "empty").read_bytes() == b"" and (got / "directory").is_dir()
    assert (got / "program").stat().st_mode & 0o777 == 0o755
    assert (got / "empty").stat().st_mode & 0o777 == 0o644


def test_large_file_needs_little_memory(loop: Loop) -> None:
    with open(loop.config / "large", "wb") as file:
        for _ in range(300):
            file.write(os.urandom(1 << 10) * 1024)
    loop.publish("v2")
    argv = loop.argv("run")
    # The client alone, not the toy's own programs: what it waits for counts among its children, not to itself.
    peak = "import resource, runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    peak += "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = loop.machine.run(argv[0], "-I", "-c", peak, *argv[2:], timeout_s=120)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.rsplit("peak ", 1)[1]) < 64 * 1024
    assert (loop.state / "config/large").stat().st_size == 300 << 20


def test_client_alone_and_with_a_minimal_python(loop: Loop, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "bento_client.py").write_bytes((REPO / "bento_client.py").read_bytes())
    loop.publish("v2")
    argv = loop.argv("run")
    start = f"import runpy, sys; sys.modules.update(dict.fromkeys({LACKING!r})); sys.argv = sys.argv[1:]; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = loop.machine.run(argv[0], "-I", "-c", start, str(alone / "bento_client.py"), *argv[3:])
    assert done.returncode == 0, done.stdout
    assert loop.machine.labels() == ("v2",) * 3
    assert [path.name for path in alone.iterdir()] == ["bento_client.py"]


def test_second_server_answers_when_the_first_is_down(loop: Loop) -> None:
    loop.settings["server"] = ["down.example", "server.example"]
    loop.publish("v2")
    loop.run(code=0, TOY_SERVER="server.example")
    assert loop.machine.labels() == ("v2",) * 3
    said = loop.run(code=75, TOY_SERVER="neither.example")
    assert "down.example" in said and "server.example" in said


def test_replica_that_lags_behind_changes_nothing(loop: Loop) -> None:
    loop.settings["server"] = ["one.example", "two.example"]
    loop.publish("v2")
    loop.run(code=0)
    announce(loop, published="2020-01-01T00:00:00Z", release=B)
    assert "behind" in loop.run(code=0)
    assert loop.machine.labels() == ("v2",) * 3


def test_key_and_status(loop: Loop) -> None:
    key = loop.run("key", code=0)
    assert key.startswith("ssh-ed25519 ") and key.count("\n") == 1 and loop.run("key", code=0) == key
    assert (loop.state / "id_ed25519").stat().st_mode & 0o777 == 0o600
    assert loop.state.stat().st_mode & 0o777 == 0o700
    assert "last       ok, release" in loop.run("status", code=0)


def test_results_are_the_designs() -> None:
    names = {"ok", "fetch-failed", "build-failed", "rolled-back", "rollback-failed", "postponed", "interrupted"}
    assert {str(result) for result in Result} == names
