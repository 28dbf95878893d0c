"""Signed releases: what a server that is taken over, a replica or a man in the middle can do to a host is keep silent.

The host polls a real sshd; what that serves is in the test's hand."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sshdlab import FRESH, SERVER, Done, Host, Line, Server, call
from toynixos import write_config

import bento
import bento_client as client
from bento_client import BentoError, Signed, State, format_signed, format_time, parse_signed

A = "a" * 64
BULK = 1_000_000
YEAR_2050 = 2_524_608_000
ALICE = Signed("toy", A, 10240, None, 1_795_435_200, "2026-12-24T00:00:00Z")


# --- the text ---


@pytest.mark.parametrize(
    "signed",
    [
        ALICE,
        ALICE._replace(system="/nix/store/abc-nixos"),
        ALICE._replace(unsign=True),
        ALICE._replace(revoked=(f"SHA256:{'x' * 43}", f"SHA256:{'y' * 43}")),
    ],
)
def test_the_text_says_it_all(signed: Signed) -> None:
    assert parse_signed(format_signed(signed), "test") == signed


def test_the_text_is_lines_for_a_person() -> None:
    assert format_signed(ALICE) == (
        f"bento-release 1\nhost toy\nrelease {A}\nsize 10240\nsystem -\nserial 1795435200\nexpires 2026-12-24T00:00:00Z\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bento-release 1", "bento-release 2", "it begins with 'bento-release 2', not with 'bento-release 1': update"),
        ("host toy\n", "", "field 'host' is missing"),
        ("host toy\n", "host toy\nhost toy\n", "it says something twice"),
        ("size 10240", "size -1", "field 'size' is missing or malformed"),
        ("size 10240", "size 99999999999999999999", "field 'size' is missing or malformed"),
        ("system -\n", "", "field 'system' is missing"),
        ("system -", "system ../x", "field 'system' is missing or malformed"),
        ("serial 1795435200", "serial 1e9", "field 'serial' is missing or malformed"),
        ("expires 2026", "expires 20xx", "field 'expires' is missing or malformed"),
        ("release a", "release b/", "field 'release' is missing or malformed"),
    ],
)
def test_a_text_that_cannot_be_read(old: str, new: str, words: str) -> None:
    text = format_signed(ALICE).replace(old, new)
    assert text != format_signed(ALICE)
    with pytest.raises(BentoError, match=words):
        parse_signed(text, "test")


def test_what_a_newer_text_says_besides_is_ignored() -> None:
    assert parse_signed(format_signed(ALICE) + "colour blue\n", "test") == ALICE


# --- a fleet whose administrators sign ---


def make_keys(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    for name in ("alice", "bob", "mallory"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{name}@example.org", "-f", directory / name)
    return directory


def make_signature(key: Path, text: str, namespace: str = client.NAMESPACE) -> str:
    path = key.with_name("text")
    path.write_text(text)
    path.with_name("text.sig").unlink(missing_ok=True)
    call("ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", namespace, path)
    return path.with_name("text.sig").read_text()


@dataclass(frozen=True)
class Site:
    """One host, and the keys of alice and bob, who may sign for it, and of mallory, who may not."""

    host: Host
    keys: Path

    @property
    def server(self) -> Server:
        return self.host.server

    @property
    def current(self) -> Path:
        return self.server.chroot(FRESH) / "current.json"

    def signers(self, *names: str) -> str:
        path = self.keys / "-".join(["signers", *names])
        path.write_text("# who may sign\n" + "".join((self.keys / f"{name}.pub").read_text() for name in names))
        return str(path)

    def write(self, label: str, *signers: str, **behaviour: Any) -> None:
        settings = self.host.settings | ({"signers": self.signers(*signers)} if signers else {})
        directory = self.server.top / "fleet/hosts" / FRESH
        write_config(directory, flake=True, host=FRESH, label=label, client_json=settings, **behaviour)

    def sign(self, key: str, *flags: str) -> Signed:
        done = self.server.bento("sign", FRESH, "--key", str(self.keys / key), *flags)
        assert done.returncode == 0, done.stdout
        return self.signature.signed

    @property
    def signature(self) -> bento.Signature:
        fleet = bento.Fleet(self.server.top / "fleet", self.server.top / "chroots")
        found = bento.read_signature(fleet, FRESH)
        assert found is not None
        return found

    def populate(self, code: int = 0) -> str:
        done = self.server.bento("populate", FRESH)
        assert done.returncode == code, done.stdout
        return done.stdout

    def publish(self, label: str, *flags: str, key: str = "alice", signers: tuple[str, ...] = ("alice", "bob")) -> Signed:
        self.write(label, *signers)
        signed = self.sign(key, *flags)
        self.populate()
        return signed

    def forge(self, **changes: Any) -> None:
        """Changes what the server says, as who has taken it over can."""
        self.current.write_text(json.dumps(json.loads(self.current.read_text()) | changes))

    def make_signature(self, key: str, text: str) -> str:
        return make_signature(self.keys / key, text)

    def forge_text(self, key: str, **changes: Any) -> None:
        text = format_signed(self.signature.signed._replace(**changes))
        self.forge(signed=text, signature=self.make_signature(key, text))

    def run(self, *flags: str, code: int = 0) -> str:
        """With the settings of the system that runs, which is who decides whom to trust."""
        config = self.host.machine.root / "run/current-system/etc/bento/client.json"
        done = self.host.run(*([] if not config.exists() else ["--config", str(config)]), *flags)
        assert done.returncode == code and "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def status(self) -> str:
        return self.host.client("status").stdout

    @property
    def state(self) -> State:
        return client.parse_state((self.host.state / "state.json").read_bytes(), "state.json")


@pytest.fixture
def site(fresh: Host, tmp_path: Path) -> Site:
    """A host that runs v1, which alice has signed, and trusts alice and bob."""
    found = Site(fresh, make_keys(tmp_path / "keys"))
    (found.server.top / f"fleet/hosts/{FRESH}.sig").unlink(missing_ok=True)
    found.publish("v1")
    done = fresh.run("--signers", found.signers("alice", "bob"))
    assert done.returncode == 0, done.stdout
    assert fresh.machine.labels() == ("v1", "v1", "v1")
    return found


@pytest.fixture(autouse=True)
def no_signature_is_left(server: Server) -> Any:
    yield
    (server.top / f"fleet/hosts/{FRESH}.sig").unlink(missing_ok=True)


def check_refused(site: Site, words: str, *, label: str = "v1") -> None:
    """Nothing but current.json is fetched, nothing is unpacked, the system stays; and --force is no way around."""
    before = client.size_of(site.host.state / "config/bulk"), (site.host.state / "config/toy.json").read_bytes()
    for force in ((), ("--force",)):
        with Line(site.server.port) as line:
            said = site.run("--port", str(line.port), *force, code=1)
        assert words in said, said
        assert line.carried < BULK // 4
        assert not (site.host.state / "partial").exists() and not (site.host.state / "config.new").exists()
    assert before == (client.size_of(site.host.state / "config/bulk"), (site.host.state / "config/toy.json").read_bytes())
    assert site.host.machine.labels() == (label, label, label)
    last = site.state.last
    assert last is not None and last.result == "fetch-failed" and words in last.reason
    row = site.server.status(FRESH)
    assert row["last"]["result"] == "fetch-failed" and words in row["last"]["reason"]


def test_a_signed_release_is_followed(site: Site) -> None:
    first = site.state
    signed = site.publish("v2", key="bob")
    site.run()
    assert site.host.machine.labels() == ("v2", "v2", "v2")
    assert signed.serial > max(serial for _, serial in map(client.parse_serial, first.serials))
    bob = client.fingerprint((site.keys / "bob.pub").read_text().split()[1])
    assert dict(map(client.parse_serial, site.state.serials))[bob] == signed.serial
    assert f"by {bob}, until {signed.expires}" in site.status()
    assert "up to date" in site.run()
    report = client.parse_report((site.server.chroot(FRESH) / "logs/status.json").read_bytes(), "status.json")
    assert (report.signer, report.expires) == (bob, signed.expires)
    assert site.server.status(FRESH)["signer"] == bob


def test_the_first_release_of_a_machine_is_checked_too(fresh: Host, site: Site, tmp_path: Path) -> None:
    """Bootstrap: with the signers from the command line, before any of Bento's systems runs."""
    again = Host.create(site.server, tmp_path / "again", FRESH)
    site.forge_text("mallory")
    done = again.run("--signers", site.signers("alice"))
    assert done.returncode == 1 and "its signature is of nobody in" in done.stdout, done.stdout
    assert again.machine.current_label() == "v0"


def test_a_tar_that_is_not_the_signed_one(site: Site) -> None:
    signed = site.publish("v2")
    path = site.server.chroot(FRESH) / f"releases/{signed.release}.tar"
    tar = path.read_bytes()
    path.unlink()
    path.write_bytes(tar[:-1024] + b"x" + tar[-1023:])
    said = site.run(code=1)
    assert "fetch-failed" in said and not (site.host.state / "config.new").exists()
    assert site.host.machine.labels() == ("v1", "v1", "v1")


def test_forged(site: Site) -> None:
    """By a key of another fleet, or nobody's: a replay from there is the same."""
    site.publish("v2")
    site.forge_text("mallory")
    check_refused(site, "its signature is of nobody in")


def test_an_older_release_is_played_back(site: Site) -> None:
    old = site.current.read_text()
    tar = site.server.chroot(FRESH) / f"releases/{json.loads(old)['release']}.tar"
    site.publish("v2")
    site.run()
    assert site.host.machine.current_label() == "v2" and tar.exists()
    site.current.write_text(old)
    check_refused(site, "was seen: sign it anew", label="v2")


def test_going_back_is_signing_the_old_content_anew(site: Site) -> None:
    site.publish("v2")
    site.run()
    site.publish("v1")
    site.run()
    assert site.host.machine.labels() == ("v1", "v1", "v1")


def test_an_older_one_at_the_proof(site: Site) -> None:
    """The server is there, which is all that the proof asks: it is settled as it should be, and refused afterwards."""
    old = site.keys / "old.json"
    shutil.copy(site.current, old)
    site.write("v2", "alice", "bob", activation_command=f"cp {old} {site.current}")
    site.sign("alice")
    site.populate()
    site.run()
    assert site.host.machine.labels() == ("v2", "v2", "v2")
    check_refused(site, "was seen: sign it anew", label="v2")


def test_a_stolen_key_runs_ahead_and_is_revoked(site: Site) -> None:
    """Whoever has bob's key counts so far that no serial of alice's is higher: her revocation is heard all the same."""
    site.publish("v2", key="bob")
    site.forge_text("bob", serial=(1 << 53) - 1)
    site.run()
    assert site.host.machine.current_label() == "v2"
    site.publish("v3", signers=("alice",))
    check_refused(site, "and 9007199254740991 was seen: sign it anew", label="v2")
    revoking = site.publish("v3", "--revoke", str(site.keys / "bob.pub"), signers=("alice",))
    assert len(revoking.revoked) == 1
    site.run()
    assert site.host.machine.labels() == ("v3", "v3", "v3")
    # From then on bob's serials, and what he signs, count no more.
    site.publish("v4", signers=("alice",))
    site.run()
    assert site.host.machine.labels() == ("v4", "v4", "v4")
    site.forge_text("bob")
    check_refused(site, "its signature is of nobody in", label="v4")


def test_rotation(site: Site) -> None:
    site.publish("v2", signers=("mallory",))
    site.run()
    assert site.host.machine.labels() == ("v2", "v2", "v2")
    site.publish("v3", key="mallory", signers=("mallory",))
    site.run()
    assert site.host.machine.labels() == ("v3", "v3", "v3")
    site.publish("v4", signers=("mallory",))
    check_refused(site, "its signature is of nobody in", label="v3")


def test_frozen(site: Site) -> None:
    """A server that shows the same for ever: the machine goes on, and says that nobody vouches for it."""
    signed = site.publish("v2", "--days", "-2")
    assert signed.expires < format_time(time.time())
    said = site.run(code=1)
    assert f"expired: nobody vouches for this machine's state since {signed.expires}" in said
    assert site.host.machine.labels() == ("v2", "v2", "v2")
    assert "up to date" in site.run(code=1)
    assert "expired" in site.status()
    row = site.server.status(FRESH)
    assert row["expired"] and "signature" not in row["published"]
    site.sign("alice")
    assert "unchanged" in site.populate()
    site.run()
    assert "expired" not in site.status() and not site.server.status(FRESH)["expired"]


def test_a_release_that_asks_for_no_signatures_is_refused(site: Site) -> None:
    site.publish("v2", signers=())
    said = site.run(code=1)
    assert "the new system would take releases that nobody signed: it has no services.bento.signers" in said
    assert site.host.machine.labels() == ("v1", "v1", "v1")
    site.run("--force", code=1)
    assert site.host.machine.labels() == ("v1", "v1", "v1")
    site.publish("v2", "--unsign", signers=())
    site.run("--force")  # it failed a moment ago
    assert site.host.machine.labels() == ("v2", "v2", "v2")
    (site.server.top / f"fleet/hosts/{FRESH}.sig").unlink()
    site.write("v3")
    site.populate()
    site.run()
    assert site.host.machine.labels() == ("v3", "v3", "v3")


# --- the server ---


def test_what_is_not_signed_is_not_published(site: Site) -> None:
    before = site.current.read_bytes()
    site.write("v2", "alice", "bob")
    directory = site.server.top / "fleet/hosts" / FRESH
    (directory / "new.nix").write_text("{ }\n")
    said = site.populate(code=1)
    assert f"{FRESH}: not signed: hosts/{FRESH}.sig is for release" in said
    assert "(they differ in new.nix, toy.json)" in said
    assert site.current.read_bytes() == before
    assert not list((site.server.chroot(FRESH) / "releases").glob(".new*"))
    site.sign("alice")
    (directory / "new.nix").unlink()
    assert f"{FRESH}: not signed: hosts/{FRESH}.sig is for release" in site.populate(code=1)
    site.sign("alice")
    assert f"{FRESH}: published" in site.populate()


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"host": "another"}, "host 'another'"),
        ({"release": "b" * 64}, "release bbbbbbbbbbbb"),
        ({"size": 1}, "release aaaaaaaaaaaa"),  # the host compares it, too
    ],
)
def test_the_signature_of_something_else_is_refused(changes: dict[str, Any], about: str, tmp_path: Path) -> None:
    fleet, release = bento.Fleet(tmp_path, tmp_path / "chroots"), bento.Release(A, ALICE.size, ())
    path = tmp_path / "hosts/toy.sig"
    path.parent.mkdir()
    path.write_text(format_signed(ALICE) + bento.ARMOR)
    assert bento.check_signature(fleet, "toy", release) == bento.Signature(format_signed(ALICE), ALICE, bento.ARMOR)
    path.write_text(format_signed(ALICE._replace(**changes)) + bento.ARMOR)
    with pytest.raises(BentoError, match=f"not signed: hosts/toy.sig is for {about}"):
        bento.check_signature(fleet, "toy", release)


@pytest.mark.parametrize(
    ("signed", "built", "published"),
    [
        (None, None, None),
        (None, "/built", "/built"),
        ("/signed", None, "/signed"),
        ("/signed", "/signed", "/signed"),
        ("/signed", "/built", BentoError),
    ],
)
def test_what_is_built_here_has_to_be_what_was_signed(signed: str | None, built: str | None, published: Any) -> None:
    assert bento.check_system(None, built) == built
    found = bento.Signature("", ALICE._replace(system=signed), "")
    if published is BentoError:
        with pytest.raises(BentoError, match="not signed: this was built to /built, and /signed is signed"):
            bento.check_system(found, built)
    else:
        assert bento.check_system(found, built) == published


def test_the_signed_system_is_published(site: Site) -> None:
    site.write("v2", "alice")
    site.sign("alice")
    text = format_signed(site.signature.signed._replace(system="/nix/store/signed"))
    path = site.server.top / f"fleet/hosts/{FRESH}.sig"
    path.write_text(text + site.make_signature("alice", text))
    site.populate()
    assert json.loads(site.current.read_text())["system"] == "/nix/store/signed"


def test_what_a_release_builds_to_is_signed_too(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sign --build: the same system that the host then builds by itself; and a signature that is renewed keeps it."""
    site.write("v2", "alice", "bob")
    with monkeypatch.context() as patched:
        patched.setattr(bento, "log_directory", lambda: tmp_path / "log")
        for name, value in site.host.machine.env().items():
            patched.setenv(name, value)
        argv = ["--fleet", str(site.server.top / "fleet"), "sign", FRESH, "--key", str(site.keys / "alice"), "--build"]
        assert bento.main(argv) == 0, capsys.readouterr().err
    signed = site.signature.signed
    site.populate()
    site.run()
    assert signed.system == os.path.realpath(site.host.machine.root / "run/current-system")
    assert site.sign("alice").system == signed.system
    site.write("v3", "alice", "bob")
    assert site.sign("alice").system is None


def test_a_serial_is_never_lower_than_the_last(site: Site) -> None:
    first, second = site.sign("alice"), site.sign("alice")
    assert second.serial > first.serial
    text = format_signed(second._replace(serial=YEAR_2050))
    path = site.server.top / f"fleet/hosts/{FRESH}.sig"
    path.write_text(text + site.make_signature("alice", text))
    assert site.sign("alice").serial == YEAR_2050 + 1


def test_a_key_that_is_not_there(site: Site) -> None:
    before = site.signature
    done = site.server.bento("sign", FRESH, "--key", str(site.keys / "nobody"))
    assert (done.returncode, site.signature) == (2, before) and "no such file" in done.stdout


CLOCK = """
import sys, time
sys.path.insert(0, {path!r})
real = time.time
time.time = lambda: real() + {ahead}
import bento
sys.exit(bento.main(sys.argv[1:]))
"""


def test_two_clones_sign_the_same_text(site: Site, tmp_path: Path) -> None:
    """With another umask, other times of the files, and another clock: all but the serial is the same."""
    texts, midday = [], time.time() // 86400 * 86400 + 43200
    for number, umask in enumerate((0o022, 0o077)):
        clone = tmp_path / f"clone{number}"
        shutil.copytree(site.server.top / "fleet", clone, copy_function=shutil.copyfile, symlinks=True)
        for path in clone.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
            os.utime(path, (number + 5, number + 5))
        (clone / f"hosts/{FRESH}.sig").unlink()
        code = CLOCK.format(path=str(SERVER.parent), ahead=midday + 3600 * number - time.time())
        argv: list[str | Path] = [sys.executable, "-c", code, "--fleet", clone, "sign", FRESH, "--key", site.keys / "alice"]
        done: Done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, umask=umask, check=False)
        assert done.returncode == 0, done.stdout
        found = bento.read_signature(bento.Fleet(clone, tmp_path), FRESH)
        assert found is not None
        texts.append(found)
    first, second = (each.signed for each in texts)
    assert second.serial > first.serial
    assert texts[0].text.replace(str(first.serial), "") == texts[1].text.replace(str(second.serial), "")


# --- what the host makes of it ---

NOBODY, ABOUT = "its signature is of nobody in", "its signed text is about another one"
LATER = ALICE._replace(serial=ALICE.serial + 1)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize(
    ("key", "namespace", "signed", "changes", "words"),
    [
        ("alice", "bento-release", LATER, {}, None),
        ("bob", "bento-release", ALICE, {}, None),  # as it was seen
        ("alice", "bento-release", ALICE._replace(serial=ALICE.serial - 1), {}, "was seen: sign it anew"),
        ("mallory", "bento-release", LATER, {}, NOBODY),
        ("alice", "git", LATER, {}, NOBODY),  # the administrator's key signs commits, too
        ("alice", "bento-release", ALICE, {"signed": format_signed(LATER)}, NOBODY),
        ("alice", "bento-release", LATER._replace(host="another"), {}, ABOUT),
        ("alice", "bento-release", LATER, {"release": "b" * 64}, ABOUT),
        ("alice", "bento-release", LATER, {"size": 10240 + 512}, ABOUT),
        ("alice", "bento-release", LATER, {"signed": None}, "is not signed, as this machine wants it"),
        ("alice", "bento-release", LATER, {"signature": ""}, "is not signed, as this machine wants it"),
        *(
            ("alice", "bento-release", LATER, {"signature": signature}, NOBODY)
            for signature in ("x", bento.ARMOR, "\0" * 1000, bento.ARMOR + "A" * 40_000)
        ),
        ("alice", "bento-release", LATER, {"signature": "\ud800"}, "surrogates not allowed"),  # which JSON can spell
    ],
)
def test_who_vouches_for_what(
    key: str, namespace: str, signed: Signed, changes: dict[str, Any], words: str | None, keys: Path, tmp_path: Path
) -> None:
    """Alice and bob may, and have. What else there is to sign with, or in the place of what they signed, is nothing."""
    signers = tmp_path / "signers"
    signers.write_text((keys / "alice.pub").read_text() + (keys / "bob.pub").read_text())
    serials = [f"{signer} {ALICE.serial}" for signer in client.read_signers(signers)]
    text = format_signed(signed)
    current = client.Current("toy", A, 10240, ALICE.expires, "/nix/store/evil", signed=text)
    current = current._replace(**{"signature": make_signature(keys / key, text, namespace)} | changes)
    if words is None:
        found = client.verify(current, signers, serials, tmp_path, "test")
        signer = client.fingerprint((keys / f"{key}.pub").read_text().split()[1])
        assert found == current._replace(signer=signer, system=None), "what was not signed says nothing"
        return
    with pytest.raises(BentoError, match=words):
        client.verify(current, signers, serials, tmp_path, "test")


BLOBS = ("AAAAaaaa", "AAAAbbbb", "AAAAcccc")
S1, S2, DROPPED = sorted(client.fingerprint(blob) for blob in BLOBS)


def write_signers(path: Path, *signers: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"ssh-ed25519 {blob}\n" for blob in BLOBS if client.fingerprint(blob) in signers))
    return path


@pytest.mark.parametrize(
    ("serials", "revoked", "seen"),
    [
        ((), (), 0),
        ((f"{S1} 5", f"{S2} 7"), (), 7),
        ((f"{S1} 7", f"{S2} 5"), (), 7),
        ((f"{S1} 5", f"{S2} 7"), (S2,), 5),
        ((f"{S1} 5", f"{DROPPED} 7"), (), 5),
        ((f"{S1} 5", f"{S2} 7"), (S1, S2), 0),
        ((f"{S1} 5", S2, f"{S2} -7", f"{S2} 7 7", ""), (), 5),  # a damaged file
    ],
)
def test_the_highest_serial_that_counts(serials: tuple[str, ...], revoked: tuple[str, ...], seen: int, tmp_path: Path) -> None:
    assert client.highest_serial(write_signers(tmp_path / "signers", S1, S2), serials, revoked) == seen


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ((), (f"{S2} 5",)),
        ((f"{S1} 7", f"{S2} 3"), (f"{S1} 7", f"{S2} 5")),
        ((f"{S2} 7", f"{DROPPED} 9"), (f"{S2} 7", f"{DROPPED} 9")),  # not lower, whoever is trusted now
    ],
)
def test_what_is_kept_of_an_accepted_release(before: tuple[str, ...], kept: tuple[str, ...]) -> None:
    text = format_signed(ALICE._replace(serial=5))
    current = client.Current("toy", A, 10240, ALICE.expires, signed=text, signer=S2)
    state = State(serials=before)
    assert state._replace(**client.accepted(state, current)) == State(serials=kept, signer=S2, signed=text)
    # Where nobody's signature is asked for, a text is not even read; the serials stay for the day when it is again.
    unasked = client.accepted(state._replace(signer=S1, signed=text), current._replace(signed="anything", signer=None))
    assert state._replace(**unasked) == state


def test_the_second_in_which_nobody_vouches_any_more() -> None:
    state, end_s = State(signed=format_signed(ALICE)), client.parse_time(ALICE.expires)
    assert client.nobody_vouches(State(), end_s) is None and client.nobody_vouches(state, end_s - 1) is None
    current = client.Current("toy", A, 10240, ALICE.expires, signed=state.signed)
    assert not bento.is_expired(current, end_s - 1), "the server says the same"
    for now_s in (end_s, end_s + 1):
        assert f"since {ALICE.expires}" in str(client.nobody_vouches(state, now_s))
        assert bento.is_expired(current, now_s)


@pytest.mark.parametrize(
    ("signers", "asked", "unsign", "words"),
    [
        ("etc/signers", "/etc/signers", None, None),  # the new system's own file
        ("etc/signers", "/etc/signers", True, None),
        ("etc/empty", "/etc/empty", False, "no signer's key in it"),
        ("etc/signers", "/etc/another", False, "cannot be read"),
        ("var/signers", "{top}/var/signers", False, None),  # a file of this machine's
        ("etc/signers", None, None, "it has no services.bento.signers"),
        ("etc/signers", "", False, "it has no services.bento.signers"),
        ("etc/signers", None, True, None),
    ],
)
def test_who_a_new_system_would_trust(
    signers: str, asked: str | None, unsign: bool | None, words: str | None, tmp_path: Path
) -> None:
    """`unsign`: what the signed text says of it, if there is one."""
    write_signers(tmp_path / signers, *[S1] * (signers != "etc/empty"))
    text = None if unsign is None else format_signed(ALICE._replace(unsign=unsign))
    new = {"host": "toy", "signers": asked and asked.format(top=tmp_path)}
    values = {"host": "toy", "server": ["there"], "signers": str(tmp_path / signers)}
    settings = client.make_settings(values, "test")
    refusal = client.drops_signers(settings, new, str(tmp_path), text)
    assert refusal is None if words is None else words in str(refusal)
    assert client.drops_signers(settings, {}, str(tmp_path), text) is None, "one that has no Bento takes nothing"
    assert client.drops_signers(settings._replace(signers=""), new, str(tmp_path), text) is None, "nor does this one ask"


def test_old_states_and_reports_are_read() -> None:
    state = client.encode(State())
    assert b"serial" not in state and client.parse_state(state, "state.json") == State()
    kept = State(serials=(f"{S1} 5", f"{S2} 7"), signer=S1, signed=format_signed(ALICE))
    assert client.parse_state(client.encode(kept), "state.json") == kept
