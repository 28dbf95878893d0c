"""Two versions of Bento in one fleet: every file that one of them ever wrote is read by today's, 1.1 reads what today's
writes, each client works with the other's server, and settles what the other has left.

tests/golden/VERSION has files as that version wrote them, in the toy; of each a journal in each step. They are never
changed: a format that changes gets a file of its own. 1.1 itself is the one that landed (tests/landed.py).
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from landed import unpack_1_1
from toylab import HOST, Lab, kill_tree, wait_until
from toynixos import PYTHON_FLAGS

import bento
import bento_client
from bento_client import Current, Part, Result, Step, Vow

GOLDEN = Path(__file__).resolve().parent / "golden"
FILES = sorted(path.relative_to(GOLDEN).as_posix() for version in ("1.1", "1.2") for path in (GOLDEN / version).iterdir())
PARSERS: dict[str, Callable[[bytes, str], Any]] = {
    "current": bento_client.parse_current, "status": bento_client.parse_report, "state": bento_client.parse_state,
    "pending": bento_client.parse_pending,
    "client": lambda raw, what: bento_client.make_settings(json.loads(raw), what),
}  # fmt: skip


def kind(name: str) -> str:
    return Path(name).stem.partition("-")[0]


@pytest.fixture(scope="module")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_1_1(tmp_path_factory.mktemp("landed"))


@pytest.fixture(scope="module")
def old(landed: Path) -> ModuleType:
    """The client of 1.1 as a module: its server reads what a host wrote with it, too."""
    spec = importlib.util.spec_from_file_location("bento_client_1_1", landed / "bento_client.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.VERSION == "1.1"
    return module


def as_json(record: Any) -> Any:
    """Of settings, too: lists for tuples."""
    return json.loads(json.dumps(bento_client.plain(record)))


# --- files ---


@pytest.mark.parametrize("name", FILES)
def test_every_file_ever_written_is_read(name: str) -> None:
    """Whole: each field that is in it has its value still, but for what nothing reads any more."""
    raw = (GOLDEN / name).read_bytes()
    found, written = as_json(PARSERS[kind(name)](raw, name)), json.loads(raw)
    for field in ("format", "signer", "signed", "signature", "interruptions", "costly"):  # what nothing reads any more
        written.pop(field, None)
    assert holds(found, written)


def holds(found: Any, written: Any) -> bool:
    if isinstance(written, dict):
        return all(field in found and holds(found[field], value) for field, value in written.items())
    return bool(found == written)


def test_there_is_a_file_of_every_step(old: ModuleType) -> None:
    for version, steps in (("1.1", old.Step), ("1.2", Step)):
        journals = [json.loads(path.read_bytes()) for path in (GOLDEN / version).glob("pending-*.json")]
        assert {journal["step"] for journal in journals} == {*steps}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("1.2/")])
def test_1_1_reads_what_1_2_wrote(old: ModuleType, name: str) -> None:
    """Its server the report; its client the state and the journal, after a boot that fell back to it."""
    raw = (GOLDEN / name).read_bytes()
    parse = {"current": old.parse_current, "status": old.parse_report, "state": old.parse_state, "pending": old.parse_pending}[kind(name)]
    found, written = as_json(parse(raw, name)), json.loads(raw)
    assert all(holds(written[field], value) for field, value in found.items() if field in written)
    assert len(found.keys() & written.keys()) > 4


# What the client of 1.1 wants in current.json: names, and types as JSON has them. It ignores all else.
WANTED = {"format": int, "host": str, "release": str, "size": int, "published": str}


def test_what_1_1_wants_in_current_json() -> None:
    """By a list, besides its own code: what a later version may never leave out."""
    plain = Current("toy", "a" * 64, 30, "2026-11-25T12:00:00Z")
    full = plain._replace(
        system="/nix/store/x", parts=(Part("b" * 64, 10), Part("c" * 64, 20)), revision="1a2b3c4 x", vow=Vow("x", "y", "z")
    )
    for current in (plain, full):
        written = json.loads(bento_client.encode(current))
        assert {field: type(written[field]) for field in WANTED} == WANTED and written["format"] == 1
        assert type(written["system"]) in (str, type(None))
        assert all(set(part) >= {"sha256", "size"} for part in written.get("parts", []))


# --- the client of one with the server of the other ---


def argv_1_1(lab: Lab, landed: Path, *words: str, code: int = 0) -> list[str]:
    return [sys.executable, *PYTHON_FLAGS, str(landed / "bento_client.py"), *lab.argv(*words, code=code)[len(PYTHON_FLAGS) + 2 :]]


def run_1_1(lab: Lab, landed: Path, *words: str, code: int = 0) -> str:
    done = lab.machine.run(*argv_1_1(lab, landed, *words, code=code), env=lab.env())
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def server_1_1(lab: Lab, landed: Path, *words: str, code: int = 0) -> str:
    places = ["--fleet", lab.file("fleet"), "--chroot-dir", lab.file("chroot")]
    argv = [sys.executable, str(landed / "bento.py"), *places, *words]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == code, done.stdout
    return done.stdout


def server_now(lab: Lab, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What today's server says of the host."""
    capsys.readouterr()
    bento.main(["--fleet", lab.file("fleet"), "--chroot-dir", lab.file("chroot"), "status", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["hosts"]
    return dict(row)


def test_a_host_of_1_1_with_this_server(tmp_path: Path, landed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It updates, goes back from what is bad, and is shown as what it is; large files come as parts."""
    lab = Lab.create(tmp_path, client=landed / "bento_client.py")
    lab.config.mkdir(parents=True)
    (lab.config / "large").write_bytes(bytes(range(256)) * 20_000)
    client: dict[str, Any] = {"client": landed / "bento_client.py"}
    release = lab.publish("v1", **client)
    assert "parts" in json.loads((lab.chroot / "current.json").read_bytes())
    run_1_1(lab, landed, "run")
    assert lab.labels() == ("v1",) * 3
    row = server_now(lab, capsys)
    assert (row["state"], row["release"], row["client"], row["other_client"]) == ("up-to-date", release, "1.1", True)
    bad = lab.publish("v2", settings={"health_checks": ["false"]}, **client)
    assert server_now(lab, capsys)["state"] == "pending"
    run_1_1(lab, landed, "run", code=1)
    assert lab.labels() == ("v1",) * 3
    row = server_now(lab, capsys)
    assert (row["state"], row["last"]["release"], row["last"]["result"]) == ("rolled-back", bad, "rolled-back")
    release = lab.publish("v3", kernel="6.13", init="systemd 3", **client)
    run_1_1(lab, landed, "run")
    assert server_now(lab, capsys)["state"] != "up-to-date", "it does not run what is published"
    lab.machine.power_cycle()
    run_1_1(lab, landed, "run")
    row = server_now(lab, capsys)
    assert (row["state"], row["release"]) == ("up-to-date", release)


def test_this_host_with_a_server_of_1_1(tmp_path: Path, landed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab.create(tmp_path)

    monkeypatch.setattr(Lab, "populate", lambda lab: server_1_1(lab, landed, "populate"))

    def state(code: int = 0) -> str:
        return server_1_1(lab, landed, "status", code=code).splitlines()[1].split()[1]

    lab.config.mkdir(parents=True)
    (lab.config / "large").write_bytes(bytes(range(256)) * 20_000)
    lab.publish("v1")
    lab.client("run")
    assert lab.labels() == ("v1",) * 3 and lab.last().result == Result.OK
    assert state() == "up-to-date"
    lab.publish("v2", settings={"health_checks": ["false"]})
    lab.client("run", code=1)
    assert lab.labels() == ("v1",) * 3 and lab.last().result == Result.ROLLED_BACK
    assert state(1) == "rolled-back"
    lab.publish("v3")
    lab.client("run")
    assert lab.labels() == ("v3",) * 3 and state() == "up-to-date"
    listed = server_1_1(lab, landed, "log", HOST, "--list")
    ended = [line.split()[2] for line in listed.splitlines()]
    assert [word for word in ended if word != "published"] == ["ok", "rolled-back", "ok"]


# --- one settles what the other has left ---


def run_once(lab: Lab, landed: Path, version: str) -> None:
    argv = lab.argv("run") if version == "1.2" else argv_1_1(lab, landed, "run")
    lab.machine.run(*argv, env=lab.env())


def cut_off(lab: Lab, landed: Path, version: str, where: str) -> None:
    """The client of this version is killed in the middle of its first run."""
    reached, never = Path(lab.file("reached")), lab.file("never")
    check = f"touch {reached}; while ! [ -e {never} ]; do sleep 0.05; done"
    held: dict[str, dict[str, Any]] = {
        "switch": {"switch_touch": str(reached), "switch_wait": never},
        "proof": {"settings": {"health_checks": [check]}},
        "commit": {"boot_touch": str(reached), "boot_wait": never},
        "way back": {"activation_command": "false"},
    }
    lab.publish("v1", kernel="6.13", **held[where])
    argv = lab.argv("run") if version == "1.2" else argv_1_1(lab, landed, "run")
    process = subprocess.Popen(argv, env=lab.machine.env(**lab.env()), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(reached.exists)
    kill_tree(process)
    Path(never).touch()
    Path(lab.file("go")).touch()


@pytest.mark.parametrize("where", ["switch", "proof", "commit", "way back"])
@pytest.mark.parametrize(("first", "second"), [("1.2", "1.1"), ("1.1", "1.2")])
def test_one_settles_what_the_other_has_left(tmp_path: Path, landed: Path, first: str, second: str, where: str) -> None:
    """Wherever it is cut off, then in the middle of a boot that falls back: nothing is pinned, and no good release is lost."""
    slow = {"switch_touch": str(tmp_path / "reached"), "switch_wait": str(tmp_path / "go")} if where == "way back" else {}
    lab = Lab.create(tmp_path, **slow)
    lab.settings["boot_loader"] = ["systemd-boot", "/boot"]
    cut_off(lab, landed, first, where)
    for _ in range(2):
        run_once(lab, landed, second)
    good = "v0" if where == "way back" else "v1"
    assert lab.labels() == (good,) * 3 and not (lab.state / "pending.json").exists()
    lab.publish("v2", kernel="panic-6.14")
    run_once(lab, landed, first)
    assert lab.machine.power_cycle()[-1] == "boots v0", "v1 has not been booted yet, either"
    for _ in range(2):
        run_once(lab, landed, second)
        lab.publish("v3")
    assert lab.labels() == ("v3",) * 3
    lab.machine.power_cycle()
    run_once(lab, landed, second)
    assert lab.labels() == ("v3",) * 3
    assert [lab.machine.efi_variable(f"LoaderEntry{name}") for name in ("Default", "OneShot")] == [None, None]


def test_one_verdict_of_ours_is_one_of_theirs(tmp_path: Path, landed: Path, old: ModuleType) -> None:
    """A release that today's client goes back from once is tried again by 1.1, a day later."""
    lab = Lab.create(tmp_path)
    lab.publish("v1", settings={"health_checks": [f"[ -e {lab.file('well')} ]"]})
    lab.client("run", code=1)
    Path(lab.file("well")).touch()
    assert "was rolled back" in run_1_1(lab, landed, "run")
    lab.age_attempts(86400)
    run_1_1(lab, landed, "run")
    assert lab.labels() == ("v1",) * 3
