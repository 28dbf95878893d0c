"""A hostile server, network or neighbour: whatever it says, a host loses nothing but time, and asks the next server.

A real sshd, which every test tells what to serve, with OpenSSH's own SFTP server or one that means harm.
"""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from rogue_sftp import HARMS, MARKS
from sshd import end_sshd, free_port, no_penalties, start_sshd
from sshdlab import call
from toylab import Lab, archive, member
from toynixos import CLIENT, TOY, need, need_root

import bento
import bento_client as client
from bento_client import BentoError, unpack

FLEET_NIX = CLIENT.parent / "fleet.nix.in"
ROGUE = Path(__file__).with_name("rogue_sftp.py")
HARMFUL = [how for how in HARMS if how != "honest"]
# In place of a minute that a transfer may stand still.
IMPATIENT = "c.STALL_S = 2.0; c.LEAST_RATE = 1 << 30; c.Sftp.do.__defaults__ = (2.0, None, 0)"
YEAR_2040 = "2040-01-01T00:00:00Z"


# --- servers ---


def login_limits(hosts: int) -> str:
    """What fleet.nix sets for all of sshd, of those that this one knows."""
    text = FLEET_NIX.read_text()
    start = re.search(r"toString \((\d+) \+ count\)}:(\d+):\$\{toString \((\d+) \+ count\)}", text)
    source = re.search(r"PerSourceMaxStartups = lib.mkDefault \((\d+) \+ count / 2\);", text)
    grace = re.search(r"LoginGraceTime = lib.mkDefault (\d+);", text)
    assert start and source and grace and 'PerSourcePenalties = lib.mkIf hasPenalties (lib.mkDefault "no");' in text
    lines = [f"MaxStartups {int(start[1]) + hosts}:{start[2]}:{int(start[3]) + hosts}", f"LoginGraceTime {grace[1]}"]
    lines += [f"PerSourceMaxStartups {int(source[1]) + hosts // 2}", no_penalties("/usr/sbin/sshd")]
    return "\n".join(lines) + "\n"


@dataclass
class Server:
    """An sshd on 127.0.0.2 or so, which serves a directory in its own way."""

    top: Path
    address: str
    port: int

    def start(self, stack: ExitStack, key: Path, directory: Path) -> None:
        self.top.mkdir()
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.top / "host_key")
        (self.top / "banner").touch()
        self.does("honest")
        shutil.copy(f"{key}.pub", self.top / "keys")
        serve = self.top / "serve"
        serve.write_text(f"#!/bin/sh\nexec {sys.executable} {ROGUE} {directory} {self.top / 'how'}\n")
        serve.chmod(0o755)
        (self.top / "config").write_text(
            f"ListenAddress {self.address}\nPort {self.port}\nHostKey {self.top}/host_key\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nAuthorizedKeysFile {self.top}/keys\nPermitRootLogin yes\nBanner {self.top}/banner\n"
            f"Subsystem sftp {serve}\n" + login_limits(hosts=4)
        )
        stack.callback(end_sshd, start_sshd(self.top, self.address, self.port))

    def does(self, how: str) -> None:
        (self.top / "how").write_text(how)

    @property
    def known(self) -> str:
        key = " ".join((self.top / "host_key.pub").read_text().split()[:2])
        return f"[{self.address}]:{self.port} {key}\n"


@dataclass
class Site:
    """A machine with two servers, of which the first is in the enemy's hand."""

    lab: Lab
    rogue: Server
    good: Server

    def env(self) -> dict[str, str]:
        programs = self.lab.directory / "programs"
        if not programs.exists():
            programs.mkdir()
            for program in ("boot", "nix-env", "nixos-rebuild"):
                (programs / program).symlink_to(TOY / program)
        return {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(self, code: int = 0, patch: str = IMPATIENT) -> str:
        done = self.lab.run_patched(patch, **self.env())
        assert done.returncode == code and "Traceback" not in done.stdout, done.stdout[-4000:]
        return done.stdout

    def client(self, *words: str, code: int = 0) -> str:
        return self.lab.client(*words, code=code, **self.env())


@pytest.fixture
def site(lab: Lab, tmp_path: Path) -> Iterator[Site]:
    """Both serve the same, at first."""
    need_root()
    with ExitStack() as stack:
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("PATH", path)
        for program in ("sshd", "ssh", "sftp", "ssh-keygen"):
            need(program)
        key, port = tmp_path / "identity", free_port()
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        rogue, good = Server(tmp_path / "rogue", "127.0.0.2", port), Server(tmp_path / "good", "127.0.0.3", port)
        for each in (rogue, good):
            each.start(stack, key, lab.chroot)
        (tmp_path / "known").write_text(rogue.known + good.known)
        lab.settings |= {
            "server": [rogue.address, good.address], "port": port, "user": "root", "identity": str(key),
            "known_hosts": str(tmp_path / "known"), "connect_timeout": 5, "confirm_timeout": 30,
        }  # fmt: skip
        yield Site(lab, rogue, good)


# --- what it says ---


@pytest.mark.parametrize("how", HARMFUL)
def test_the_next_server_is_asked(site: Site, how: str) -> None:
    """Whatever the first one does, the release comes, and the report goes, by way of the second."""
    release = site.lab.publish("v1")
    site.rogue.does(how)
    site.run()
    assert site.lab.labels() == ("v1", "v1", "v1")
    assert site.lab.report().release == release and len(site.lab.logs()) == 1


@pytest.mark.parametrize("how", HARMFUL)
def test_a_server_that_turns_bad_in_the_middle(site: Site, how: str) -> None:
    """After it has said what there is to fetch."""
    site.lab.publish("v1")
    turn = f"p = c.make_room; c.make_room = lambda *a: (open({str(site.rogue.top / 'how')!r}, 'w').write({how!r}), p(*a))[1]"
    # A new process reads how it is to serve: the download needs a connection of its own then.
    turn += "; q = c.fetch; c.fetch = lambda s, *a, **k: (c.end_group(s.process), q(s, *a, **k))[1]"
    site.run(patch=f"{IMPATIENT}; {turn}")
    assert site.lab.labels() == ("v1", "v1", "v1")


@pytest.mark.parametrize("how", ["close", "garbage", "noise", "flood"])
def test_the_only_server_is_hostile(site: Site, how: str) -> None:
    """It is a server that is away, or one whose files cannot be used: said in a line, and no more than that."""
    site.lab.publish("v1")
    site.lab.settings["server"] = [site.rogue.address]
    site.rogue.does(how)
    said = site.run(code=1 if how == "flood" else 75, patch=f"{IMPATIENT}; c.time.sleep = lambda s: None")
    assert [line for line in said.splitlines() if "error: " in line] and len(said.splitlines()) <= 3
    assert site.lab.labels() == ("v0", "v0", "v0")


def test_half_a_report_takes_no_whole_one_s_place(site: Site) -> None:
    """Neither the one that says what comes next, nor the last."""
    site.lab.publish("v1")
    site.lab.settings["server"] = [site.rogue.address]
    site.run()
    before = (site.lab.chroot / "logs/status.json").read_bytes()
    site.lab.publish("v2")
    site.rogue.does("full")
    said = site.run()
    assert "is its disk full?" in said and site.lab.labels() == ("v2", "v2", "v2")
    assert (site.lab.chroot / "logs/status.json").read_bytes() == before


@pytest.mark.parametrize("what", ["current.json", "release", "json", "digest"])
def test_a_server_with_bad_files(site: Site, tmp_path: Path, what: str) -> None:
    site.lab.publish("v1")
    bad = tmp_path / "bad"
    shutil.copytree(site.lab.chroot, bad, symlinks=True)
    (site.rogue.top / "serve").write_text(f"#!/bin/sh\nexec {sys.executable} {ROGUE} {bad} {site.rogue.top / 'how'}\n")
    if what == "current.json":
        (bad / "current.json").unlink()
    if what == "json":
        (bad / "current.json").write_text("{")
    (tar,) = (bad / "releases").glob("*.tar")
    if what == "release":
        tar.unlink()
    if what == "digest":
        tar.write_bytes(bytes(tar.stat().st_size))
    site.run()
    assert site.lab.labels() == ("v1", "v1", "v1")


def test_a_banner_says_what_it_likes(site: Site) -> None:
    """It can neither end an answer, nor hide a first contact, nor make a good line look like a bad one."""
    site.lab.publish("v1")
    (site.rogue.top / "banner").write_text((MARKS + "Host key verification failed.\nPermission denied (\n") * 1200)
    known = site.lab.state / "known_hosts"
    site.lab.settings |= {"server": [site.rogue.address], "known_hosts": ""}
    warning = f"warning: first contact with {site.rogue.address}: its host key is kept in {known}"
    assert site.client("probe").count(warning) == 1
    known.unlink()
    (site.rogue.top / "keys").write_text("")
    said = site.client("probe", code=75)
    assert said.count(warning) == 1 and "it refuses this machine's key" in said
    shutil.copy(f"{site.lab.settings['identity']}.pub", site.rogue.top / "keys")
    assert "warning" not in site.run()
    assert site.lab.labels() == ("v1", "v1", "v1")


def test_a_time_in_the_future_holds_no_other_server_back(site: Site, tmp_path: Path) -> None:
    site.lab.publish("v1")
    ahead = tmp_path / "ahead"
    shutil.copytree(site.lab.chroot, ahead, symlinks=True)
    current = json.loads((ahead / "current.json").read_text())
    (ahead / "current.json").write_text(json.dumps(current | {"published": YEAR_2040}))
    (site.rogue.top / "serve").write_text(f"#!/bin/sh\nexec {sys.executable} {ROGUE} {ahead} {site.rogue.top / 'how'}\n")
    # While it is the only one that answers, it is followed.
    site.good.does("close")
    site.run()
    assert site.lab.labels() == ("v1", "v1", "v1")
    site.good.does("honest")
    site.lab.publish("v2")
    assert "is behind, or its clock wrong: it publishes a release of 2040" in site.run()
    assert site.lab.labels() == ("v2", "v2", "v2")


def test_a_server_that_froze_hides_no_newer_one(site: Site, tmp_path: Path) -> None:
    """For ever: what it shows is what was seen, and no older."""
    site.lab.publish("v1")
    shutil.copytree(site.lab.chroot, tmp_path / "frozen", symlinks=True)
    serve = f"#!/bin/sh\nexec {sys.executable} {ROGUE} {tmp_path / 'frozen'} {site.rogue.top / 'how'}\n"
    (site.rogue.top / "serve").write_text(serve)
    site.run()
    site.lab.publish("v2")
    assert f"{site.rogue.address} is behind, or its clock wrong" in site.run()
    assert site.lab.labels() == ("v2", "v2", "v2")


# --- first contact ---


@pytest.mark.parametrize("command", ["run", "probe"])
def test_a_list_of_servers_is_not_trusted_at_first_sight(lab: Lab, command: str) -> None:
    lab.settings["server"] = ["first", "second"]
    said = lab.client(command, code=2)
    assert "several servers need 'known_hosts' (services.bento.serverKeys) or 'signers'" in said
    lab.settings["known_hosts"] = lab.file("nothing-there")
    for servers in (["first", "second"], ["first"]):
        lab.settings["server"] = servers
        said = lab.client(command, code=2)
        assert f"{lab.file('nothing-there')}: no such file: it is to have the server's host keys" in said


def test_an_impostor_of_the_second_server(site: Site) -> None:
    """The first one is blocked, months later; whoever answers to the second's name shows another key."""
    site.lab.publish("v1")
    known = Path(site.lab.settings["known_hosts"])
    known.write_text(site.rogue.known + site.rogue.known.replace(site.rogue.address, site.good.address))
    site.rogue.does("close")
    said = site.run(code=75)
    assert "its host key is not the known one" in said
    assert site.lab.labels() == ("v0", "v0", "v0")


def test_the_first_key_counts_under_every_name(site: Site) -> None:
    """By another address, port or name, also where a client before 1.2 has written the key down by name."""
    site.lab.publish("v1")
    site.lab.settings |= {"server": [site.rogue.address], "known_hosts": ""}
    known = site.lab.state / "known_hosts"
    assert "warning: first contact" in site.client("probe")
    assert "warning" not in site.client("probe")
    first = known.read_text().splitlines()[0]
    for text in (known.read_text(), f"{first}\n"):
        known.write_text(text)
        site.lab.settings["server"] = [site.good.address]  # another server, and so another key
        assert "its host key is not the known one" in site.client("probe", code=75)
        known.write_text(text.replace(f"[{site.rogue.address}]:{site.rogue.port}", "another.example.org"))
        site.lab.settings["server"] = [site.rogue.address]
        assert "warning" not in site.client("probe")
    site.run()
    assert site.lab.report().first_contact == client.format_time(known.stat().st_mtime)
    assert "the server's key was taken at first contact" in site.client("status")
    site.lab.settings["known_hosts"] = site.lab.file("given")
    Path(site.lab.file("given")).write_text(site.rogue.known)
    site.run()
    assert site.lab.report().first_contact is None


# --- neighbours ---


def test_idle_connections_of_one_address_stop_nobody_else(site: Site) -> None:
    """250 of them, without a key, held for as long as sshd lets them."""
    site.lab.publish("v1")
    site.lab.settings["server"] = [site.good.address]
    with ExitStack() as stack:
        for _ in range(250):
            idle = socket.create_connection((site.good.address, site.good.port), 5, ("127.0.0.9", 0))
            stack.callback(idle.close)
        for _ in range(5):
            assert "publishes a release for this machine" in site.client("probe")


def test_wrong_keys_behind_a_nat_shut_no_neighbour_out(site: Site, tmp_path: Path) -> None:
    """All are at the same address here."""
    site.lab.publish("v1")
    site.lab.settings["server"] = [site.good.address]
    good = site.lab.settings["identity"]
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "wrong")
    site.lab.settings["identity"] = str(tmp_path / "wrong")
    for _ in range(8):
        assert "it refuses this machine's key" in site.client("probe", code=75)
    site.lab.settings["identity"] = good
    site.client("probe")


def test_fleet_says_what_to_do_about_a_stolen_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its key is gone from the next switch on; the session that its thief has open is not."""
    for name in ("kept", "stolen"):
        (tmp_path / "hosts" / name).mkdir(parents=True)
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", tmp_path / name)
        shutil.copy(tmp_path / f"{name}.pub", tmp_path / "hosts")
    argv = ["--fleet", str(tmp_path), "--chroot-dir", str(tmp_path / "chroot"), "fleet"]
    assert bento.main(argv) == 0 and capsys.readouterr().err == ""
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "new", "-f", tmp_path / "new")
    shutil.copy(tmp_path / "new.pub", tmp_path / "hosts/stolen.pub")
    assert bento.main(argv) == 0
    assert capsys.readouterr().err == (
        "bento: warning: stolen: a key is gone, and a session that is open with it goes on: after the switch, end it with"
        " 'pkill -KILL -u bento-stolen'\n"
    )


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    """Where others may write, too: a page for a web server, say."""
    (tmp_path / "fleet/hosts").mkdir(parents=True)
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "pages").mkdir()
    for name in (".page.new", ".page.html.new", ".tmp-page"):
        (tmp_path / "pages" / name).symlink_to(tmp_path / "victim")
    argv = ["--fleet", str(tmp_path / "fleet"), "--chroot-dir", str(tmp_path / "chroots"), "status", "--html"]
    assert bento.main([*argv, "--output", str(tmp_path / "pages/page.html")]) == 0
    assert (tmp_path / "victim").read_text() == "kept" and "<html" in (tmp_path / "pages/page.html").read_text()


def test_logs_of_builds_are_for_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bento, "log_directory", lambda: tmp_path / "log/bento")
    (tmp_path / "log/bento").mkdir(parents=True, mode=0o755)  # as it was
    (tmp_path / "config").mkdir()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        with pytest.raises(BentoError, match="nixos-rebuild"):
            bento.rebuild("build", tmp_path / "config", "toy", 5)
    assert stat.S_IMODE((tmp_path / "log/bento").stat().st_mode) == 0o750


def test_junk_does_not_hide_the_logs_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more names than one run looks at: each run removes some, until logs are pruned again."""
    monkeypatch.setattr(bento, "MAX_PRUNED", 1000)
    (tmp_path / "logs").mkdir()
    for number in range(5000):
        (tmp_path / f"logs/{number:05}-junk").touch()
    names = [client.log_name(1_795_435_200 + number, None, "ok") for number in range(bento.KEEP_LOGS + 50)]
    under_way = f".{names[-1]}"
    for name in [*names, "status.json", under_way]:
        (tmp_path / "logs" / name).touch()
    for _ in range(10):
        bento.prune_logs(tmp_path)
    left = set(os.listdir(tmp_path / "logs"))
    assert {*names[50:], "status.json", under_way} <= left and len(left) < 1000 and not left & set(names[:50])


# --- hostile archives ---


def header(name: str | bytes, kind: bytes, size: int | bytes = 0) -> bytes:
    """A tar header with any size, and a good checksum."""
    info = tarfile.TarInfo("x")
    info.type = kind
    raw = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    raw[:100] = (name.encode() if isinstance(name, str) else name).ljust(100, b"\0")
    raw[124:136] = size if isinstance(size, bytes) else f"{size:011o}\0".encode()
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw):06o}\0 ".encode()
    return bytes(raw)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(content: bytes) -> bytes:
    return header("x", b"x", len(content)) + padded(content)


def nested(depth: int) -> bytes:
    return archive(*(member("/".join("d" * number), tarfile.DIRTYPE) for number in range(1, depth + 1)))


END = bytes(1024)
HOSTILE: dict[str, bytes] = {
    "nested": nested(1100),
    "long name": archive(member("/".join(["n" * 200] * 30))),
    "chained long names": b"".join(header("x", b"L", 10) + padded(b"name\0") for _ in range(2000)) + END,
    "chained pax": pax(b"11 path=ab\n") * 2000 + header("a", b"0", 0) + END,
    "cut sparse": header("a", b"S", 0)[:482] + b"\1" + bytes(29),
    "old sparse": header("a", b"S", 512) + bytes(512) + END,
    "huge pax size": pax(b"39 size=19807040628566084398385987584000\n") + header("a", b"0", 0) + END,
    "huge base-256 size": header("a", b"0", b"\x80" + b"\xff" * 11) + END,
    "negative base-256 size": header("a", b"0", b"\xff" * 12) + END,
    "size without content": header("a", b"0", 1 << 30) + END,
    "huge octal": header("a", b"0", b"777777777777") + END,
    "directory with content": header("a/", b"5", 512) + bytes(512) + END,
    "cut pax": pax(b"999 path=a\n") + header("a", b"0", 0) + END,
    "pax without length": pax(b"path=a\n") + header("a", b"0", 0) + END,
    "pax of zero": pax(b"0 path=a\n") + header("a", b"0", 0) + END,
    "pax that is not UTF-8": pax(b"11 path=\xff\xfe\n") + header("a", b"0", 0) + END,
    "name that is not UTF-8": header(b"\xff\xfe", b"0") + END,
    "pax at the end": pax(b"11 path=ab\n"),
    "global pax": header("g", b"g", 11) + padded(b"11 path=ab\n") + header("a", b"0", 0) + END,
    "NUL in a name": pax(b"11 path=a\0\n") + header("a", b"0", 0) + END,
    "no end": header("a", b"0", 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_one_kind_of_error(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tar").write_bytes(HOSTILE[kind])
    with pytest.raises(BentoError, match=r"^the release (is no valid archive|has )"):
        unpack(tmp_path / "tar", tmp_path / "config.new")
    client.remove(tmp_path / "config.new")
    assert not (tmp_path / "config.new").exists()


@pytest.mark.parametrize("kind", ["nested", "chained pax", "cut sparse", "huge pax size"])
def test_a_hostile_archive_is_a_failed_fetch_and_a_good_release_follows(lab: Lab, kind: str) -> None:
    lab.publish("v1")
    lab.publish_raw(HOSTILE[kind])
    for attempt in (1, 2):
        lab.client("run", code=1)
        assert (lab.last().result, lab.last().attempt) == ("fetch-failed", attempt)
    lab.populate()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")


def test_as_deep_as_populate_makes_it(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(nested(client.MAX_DEPTH + 1))
    unpack(tmp_path / "tar", tmp_path / "config")
    assert len(list((tmp_path / "config").rglob("*"))) == client.MAX_DEPTH + 1


def test_a_directory_without_a_size(tmp_path: Path) -> None:
    """As some programs write it: blank is nothing."""
    (tmp_path / "tar").write_bytes(header("d", tarfile.DIRTYPE, b" " * 11 + b"\0") + END)
    unpack(tmp_path / "tar", tmp_path / "config")
    assert (tmp_path / "config/d").is_dir()


def test_what_an_older_client_unpacked_is_removed_however_deep(lab: Lab) -> None:
    """More than Python's recursion bears, and than a path can be long."""
    lab.publish("v1")
    directory = os.open(lab.state, os.O_RDONLY)
    for name in ["config.new", *(["d" * 200] * 1100)]:
        os.mkdir(name, dir_fd=directory)
        inner = os.open(name, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(directory)
    try:
        lab.client("run")
    finally:
        call("rm", "-rf", lab.state / "config.new")  # pytest could not, if we did not
    assert lab.labels() == ("v1", "v1", "v1")


def test_remove_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept/inner").mkdir(parents=True)
    (tmp_path / "kept/inner/file").write_text("kept")
    (tmp_path / "tree/a/b").mkdir(parents=True)
    for where in ("link", "a/link", "a/b/link"):
        (tmp_path / "tree" / where).symlink_to(tmp_path / "kept")
    client.remove(tmp_path / "tree")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "inner", "kept"]


def test_a_huge_header_takes_no_memory(tmp_path: Path) -> None:
    """600 MB of it, which are a hole in the file here."""
    with open(tmp_path / "tar", "wb") as file:
        file.write(header("x", b"x", 600 << 20))
        file.truncate((600 << 20) + 2048)
    code = (
        f"import sys; sys.path.insert(0, {str(CLIENT.parent)!r}); import bento_client as c, pathlib\n"
        "try: c.unpack(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "except c.BentoError as error: print(error)\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    argv: list[str | Path] = [sys.executable, "-c", code, tmp_path / "tar", tmp_path / "config"]
    said, used_kib = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    assert "a header of 629145600 bytes" in said and int(used_kib) < 64 << 10


def test_a_directory_without_end_takes_no_memory_without_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """sftp keeps a directory in memory until it has seen its end."""
    site.rogue.does("endless-names")
    monkeypatch.setattr(client, "MAX_SFTP_BYTES", 32 << 20)
    (site.lab.chroot / "logs").mkdir(parents=True)
    settings = client.make_settings(site.lab.settings | {"server": site.rogue.address}, "test")
    session = client.connect(settings, site.rogue.address, client.Log(settings.state / "no-log"))
    with pytest.raises(client.Unreachable, match="out of memory"):
        session.do("-ls -1 logs")
    session.close()
