"""Where the tests run: they can import bento.py, bento_client.py and each other, wherever pytest is started; /etc, the
home directory and the one for temporary files are their own, and gone after them. Those of failed tests are kept."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import accounts
from lab.image import cache_dir


def make_room() -> Path:
    """What the run and all that it starts may leave behind is in here. pytest-xdist's workers share their parent's."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return Path(os.environ["TMPDIR"])
    os.environ["BENTO_CACHE"] = str(cache_dir())
    room = Path(tempfile.mkdtemp(prefix="bento-tests-"))
    room.chmod(0o711)
    (room / "home").mkdir()
    make_python(room)
    os.environ |= {"TMPDIR": str(room), "HOME": str(room / "home"), "PYTHONPYCACHEPREFIX": str(room / "pycache")}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if os.geteuid() != 0 and not Path("/nix/var/nix/daemon-socket/socket").exists():
        os.environ["NIX_REMOTE"] = str(room / "nix")  # else Nix wants to write to root's store, even to evaluate
    return room


def make_python(room: Path) -> None:
    """An empty virtual environment: this Python, and nothing that anybody has installed into it. What starts a hundred
    times in a test pays for each of those, and a script's first line takes no path with spaces, as a checkout may have."""
    program = Path(os.path.realpath(sys.executable))
    (room / "bin").mkdir()
    (room / "bin/python3").symlink_to(program)
    (room / "pyvenv.cfg").write_text(f"home = {program.parent}\ninclude-system-site-packages = false\n", encoding="utf-8")


ROOM = make_room()
tempfile.tempdir = str(ROOM)
accounts.isolate(home=ROOM / "home")

# Not before: what a module finds when it is imported is to be found there.
import toynixos
from accounts import add_user, need_accounts, root_owned
from fleet import Site, last_data
from sshd import free_port
from sshdlab import BULK, EVIL, FRESH, GOOD, HOSTS, PERSON, SERVER, UNRESTRICTED, WAITING, Host, Server, call
from toybuild import FAKE_CLIENT
from toylab import Lab
from toynixos import TOY, Templates, ToyMachine, need, need_nix, need_root, told

import bento_client

pytest_plugins = ("tiers",)

# Tables and usage messages are as wide as they are; a test for a narrow terminal sets these itself.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
toynixos.templates = Templates(Path(tempfile.mkdtemp(prefix="templates-")))
# A shell starts its background jobs with Ctrl-C ignored, and that is inherited: by programs whose end by it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection() -> None:
    """From now on: pytest-xdist's workers need its own, and these are there by now."""
    sys.executable = str(ROOM / "bin/python3")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"The failed tests' files are in {ROOM}")


def pytest_runtest_setup() -> None:
    told.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what was run last, and what came of it."""
    report = yield
    if report.failed and told:
        report.sections.append(("what was run last", told[-1]))
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    subprocess.run(["chmod", "-R", "u+w", ROOM / "nix"], stderr=subprocess.DEVNULL)  # Nix makes all read-only
    for path in ROOM.iterdir():
        if not (session.testsfailed and path.name.startswith("pytest-of-")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    if not session.testsfailed:
        shutil.rmtree(ROOM, ignore_errors=True)


# --- fixtures that several files use ---


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(bento_client, "sync_disk", lambda *paths: None)  # hundreds of times
    umask = os.umask(0o022)
    yield Site(tmp_path, capsys)
    os.umask(umask)


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy nixos-rebuild on PATH, without Nix; returns its store."""
    monkeypatch.setenv("PATH", f"{TOY}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TOY_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TOY_MODE", "simulated")
    return tmp_path / "store"


@pytest.fixture
def real_nix() -> None:
    need_nix()  # here: before `site` hides that we are root


@pytest.fixture
def hostile(site: Site) -> Site:
    """Two published hosts; b is well, and a is to be made hostile."""
    site.host("a")
    site.host("b")
    site.publish()
    release = site.current("b").release
    site.write_report("b", release=release, last=last_data(release))
    return site


@pytest.fixture
def real_root() -> None:
    need_root()  # here: before `site` hides it


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab.create(tmp_path)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A machine that has deployed v1. For tests after which it still runs just that."""
    lab = Lab.create(tmp_path_factory.mktemp("settled"))
    lab.publish("v1")
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    return lab


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need_accounts()
    with ExitStack() as stack:
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("PATH", path)
        for program in ("sshd", "ssh", "sftp", "ssh-keygen", "ssh-agent", "unshare", "setpriv", "prlimit"):
            need(program)
        top = root_owned(tmp_path_factory.mktemp("server"))
        top.chmod(0o755)
        found = Server(top, tmp_path_factory.mktemp("keys"), free_port())
        for name in ("fleet/hosts", "authorized", "sshd", "chroots"):
            (top / name).mkdir(parents=True)
        for host in HOSTS:
            # With a shell: that there is none is to be sshd's doing.
            add_user(f"bento-{host}", "bento", found.chroot(host))
            (top / "fleet/hosts" / host).mkdir()  # `fleet` is of these only
            (top / f"fleet/hosts/{host}.pub").write_text(found.make_key(f"bento-{host}", "restrict "))
        found.make_key(UNRESTRICTED, "")
        with open(top / f"authorized/bento-{EVIL}", "a") as file:
            file.write((top / "authorized" / UNRESTRICTED).read_text())
        (top / "person").mkdir()
        os.chown(top / "person", add_user(PERSON, "nogroup", top / "person"), -1)
        found.make_key(PERSON, "")
        call(sys.executable, SERVER, "--fleet", top / "fleet", "--chroot-dir", top / "chroots", "fleet")
        fleet_nix = (top / "fleet/fleet.nix").read_text()
        assert all('"restrict ${key}"' in fleet_nix and f'"{host}" = [' in fleet_nix for host in HOSTS)
        found.write_config(fleet_nix)
        for host in HOSTS:
            found.publish(host, label="v1")
        found.start()
        stack.callback(found.stop)
        yield found


@pytest.fixture
def fresh(server: Server, tmp_path: Path) -> Iterator[Host]:
    """A machine that has never polled, with a chroot that holds no logs."""
    for left in (server.chroot(FRESH) / "logs").iterdir():
        left.unlink()
    yield Host.create(server, tmp_path, FRESH)


@pytest.fixture(scope="module")
def settled_host(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A machine that runs v1, has two reports to deliver, and for which a large v2 is published."""
    host = Host.create(server, tmp_path_factory.mktemp("settled"), GOOD)
    host.publish("v1")
    done = host.run()
    assert done.returncode == 0, done.stdout
    for name in WAITING:
        (host.state / "outbox" / name).write_text(f"log {name}\n")
    host.publish("v2", bulk=BULK)
    return host


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
