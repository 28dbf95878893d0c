"""Signed releases: what a server that is taken over, a replica or a man in the middle can do to a host is keep silent.

The host polls a real sshd; what that serves is in the test's hand."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sshdlab import FRESH, SERVER, Done, Host, Line, Server, call
from toynixos import write_config

import bento
import bento_client as client
from bento_client import (
    BentoError,
    Leaf,
    Pinned,
    Signed,
    State,
    Vow,
    format_leaf,
    format_signed,
    format_time,
    parse_leaf,
    parse_signed,
)

A = "a" * 64
BULK = 1_000_000
YEAR_2050 = 2_524_608_000
FLEET = "f" * 32
ALICE = Signed(FLEET, 1_795_435_200, "2026-12-24T00:00:00Z", A)
LEAF = Leaf("toy", A, 10240, None, None)
LINE = f"host toy release {A} size 10240 system - commit - again 0"


# --- the text, and what it is about ---


@pytest.mark.parametrize("signed", [ALICE, ALICE._replace(revoked=(f"SHA256:{'x' * 43}", f"SHA256:{'y' * 43}"))])
def test_the_text_says_it_all(signed: Signed) -> None:
    assert parse_signed(format_signed(signed), "test") == signed


@pytest.mark.parametrize(
    "leaf", [LEAF, LEAF._replace(unsign=True), LEAF._replace(system="/nix/store/abc-nixos", commit="c" * 40, again=7)]
)
def test_a_leaf_says_it_all(leaf: Leaf) -> None:
    assert parse_leaf(format_leaf(leaf), "test") == leaf


def test_both_are_for_a_person() -> None:
    text = f"bento-releases 2\nfleet {FLEET}\nserial 1795435200\nexpires 2026-12-24T00:00:00Z\nroot {A}\n"
    assert format_signed(ALICE) == text
    assert format_leaf(LEAF) == LINE and format_leaf(LEAF._replace(unsign=True)) == f"{LINE} unsign yes"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bento-releases 2", "bento-release 1", "it begins with 'bento-release 1', not with 'bento-releases 2': update"),
        (f"fleet {FLEET}\n", "", "field 'fleet' is missing"),
        (f"fleet {FLEET}", "fleet ours", "field 'fleet' is missing or malformed"),
        ("serial 1795435200\n", "serial 1\nserial 1795435200\n", "it says something twice"),
        ("serial 1795435200", "serial 1e9", "field 'serial' is missing or malformed"),
        ("serial 1795435200", "serial 9999999999999999", "field 'serial' is missing or malformed"),
        ("expires 2026", "expires 20xx", "field 'expires' is missing or malformed"),
        ("root a", "root b/", "field 'root' is missing or malformed"),
        ("root a", "revoked bob\nroot a", "field 'revoked' is malformed"),
        ("root a", f"{'revoked SHA256:' + 'x' * 43}\n" * 201 + "root a", "field 'revoked' is malformed"),
    ],
)
def test_a_text_that_cannot_be_read(old: str, new: str, words: str) -> None:
    text = format_signed(ALICE).replace(old, new)
    assert text != format_signed(ALICE)
    with pytest.raises(BentoError, match=words):
        parse_signed(text, "test")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("host toy ", "", "field 'host' is missing"),
        ("host toy", "host ../toy", "field 'host' is missing or malformed"),
        ("host toy", "host toy host toy", "it says something twice"),
        ("host toy", "host toy and", "no pairs"),
        ("size 10240", "size -1", "field 'size' is missing or malformed"),
        ("size 10240", "size 99999999999999999999", "field 'size' is missing or malformed"),
        (" system -", "", "field 'system' is missing"),
        ("system -", "system ../x", "field 'system' is missing or malformed"),
        (" commit -", "", "field 'commit' is missing"),
        ("commit -", "commit main", "field 'commit' is missing or malformed"),
        ("release a", "release b/", "field 'release' is missing or malformed"),
        ("again 0", "again x", "field 'again' is missing or malformed"),
    ],
)
def test_a_leaf_that_cannot_be_read(old: str, new: str, words: str) -> None:
    assert old in LINE
    with pytest.raises(BentoError, match=words):
        parse_leaf(LINE.replace(old, new), "test")


def test_what_a_newer_one_says_besides_is_ignored() -> None:
    assert parse_signed(format_signed(ALICE) + "colour blue\n", "test") == ALICE
    assert parse_leaf(f"{LINE} colour blue", "test") == LEAF


def rfc6962(leaves: list[bytes]) -> bytes:
    """MTH, as section 2.1 has it."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + rfc6962(leaves[:half]) + rfc6962(leaves[half:])).digest()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 21, 64, 100])
def test_a_path_leads_from_each_leaf_to_the_root(count: int) -> None:
    leaves = [f"leaf {number}" for number in range(count)]
    tree = bento.Tree(leaves)
    assert tree.root == rfc6962([leaf.encode() for leaf in leaves]).hex()
    for number, leaf in enumerate(leaves):
        path = tree.path(number)
        assert client.find_root(leaf, path) == tree.root
        assert client.find_root(f"{leaf} unsign yes", path) != tree.root
        assert path == () or client.find_root(leaf, path[1:]) != tree.root
    # What is hashed into a node is no leaf.
    with pytest.raises(BentoError, match="its path to what was signed is malformed"):
        client.find_root("leaf", (f"above {A}",))


# --- a fleet whose administrators sign ---


def make_keys(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    for name in ("alice", "bob", "carol", "mallory"):
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
        done = self.server.bento("sign", "--key", str(self.keys / key), *flags)
        assert done.returncode == 0, done.stdout
        return self.signature.signed

    @property
    def signature(self) -> bento.Signature:
        fleet = bento.Fleet(self.server.top / "fleet", self.server.top / "chroots")
        found = bento.find_signature(fleet, FRESH)
        assert found is not None
        return found

    @property
    def signed(self) -> Path:
        return self.server.top / "fleet/hosts/signed"

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

    def forge_vow(self, **changes: Any) -> None:
        self.forge(vow=json.loads(self.current.read_text())["vow"] | changes)

    def make_signature(self, key: str, text: str) -> str:
        return make_signature(self.keys / key, text)

    def forge_text(self, key: str, **changes: Any) -> None:
        text = format_signed(self.signature.signed._replace(**changes))
        self.forge_vow(text=text, signature=self.make_signature(key, text))

    def resign(self, key: str, leaf: Leaf, **changes: Any) -> None:
        """What a signer's own program may have written: hosts/signed with that leaf alone."""
        line = format_leaf(leaf)
        text = format_signed(self.signature.signed._replace(root=bento.Tree([line]).root, **changes))
        self.signed.write_text(text + self.make_signature(key, text) + line + "\n")

    def run(self, *flags: str, code: int = 0) -> str:
        """As bento.service does it: with the settings of the system that runs."""
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
    found.signed.unlink(missing_ok=True)
    found.current.unlink(missing_ok=True)
    found.publish("v1")
    done = fresh.run("--signers", found.signers("alice", "bob"))
    assert done.returncode == 0, done.stdout
    assert fresh.machine.labels() == ("v1", "v1", "v1")
    return found


@pytest.fixture(autouse=True)
def no_signature_is_left(server: Server) -> Any:
    yield
    (server.top / "fleet/hosts/signed").unlink(missing_ok=True)


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
    assert site.state.pinned is not None and site.state.pinned.fleet == signed.fleet
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
    assert done.returncode == 1 and "its signature is of nobody whom this machine trusts" in done.stdout, done.stdout
    assert again.machine.current_label() == "v0"


def test_a_tar_that_is_not_the_signed_one(site: Site) -> None:
    site.publish("v2")
    path = site.server.chroot(FRESH) / f"releases/{site.signature.leaf.release}.tar"
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
    check_refused(site, "its signature is of nobody whom this machine trusts")


def test_an_older_release_is_played_back(site: Site) -> None:
    old = site.current.read_text()
    tar = site.server.chroot(FRESH) / f"releases/{json.loads(old)['release']}.tar"
    site.publish("v2")
    site.run()
    assert site.host.machine.current_label() == "v2" and tar.exists()
    site.current.write_text(old)
    check_refused(site, "was seen: sign it with --serial", label="v2")


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
    check_refused(site, "was seen: sign it with --serial", label="v2")


def test_a_stolen_key_runs_ahead_and_is_revoked(site: Site) -> None:
    """Whoever has bob's key counts so far that no serial of alice's is higher: her revocation is heard all the same."""
    site.publish("v2", key="bob")
    site.forge_text("bob", serial=(1 << 53) - 1)
    site.run()
    assert site.host.machine.current_label() == "v2"
    site.current.unlink()  # populate would publish nothing lower
    site.publish("v3", signers=("alice",))
    check_refused(site, "and 9007199254740991 was seen: sign it with --serial", label="v2")
    revoking = site.publish("v3", "--revoke", str(site.keys / "bob.pub"), signers=("alice",))
    assert len(revoking.revoked) == 1
    site.run()
    assert site.host.machine.labels() == ("v3", "v3", "v3")
    # From then on bob's serials, and what he signs, count no more.
    site.publish("v4", signers=("alice",))
    site.run()
    assert site.host.machine.labels() == ("v4", "v4", "v4")
    site.forge_text("bob")
    check_refused(site, "its signature is of nobody whom this machine trusts", label="v4")


def test_rotation(site: Site) -> None:
    """By way of both keys: a release whose signers lack the key that signed it could be nobody's next."""
    site.publish("v2", signers=("mallory",))
    assert "the new system's signers lack the key that signed it" in site.run(code=1)
    site.publish("v3", signers=("alice", "mallory"))
    site.run()
    assert site.host.machine.labels() == ("v3", "v3", "v3")
    site.publish("v3", key="mallory", signers=("mallory",))
    site.run()
    assert site.host.machine.labels() == ("v3", "v3", "v3")
    site.publish("v4", signers=("mallory",))
    check_refused(site, "its signature is of nobody whom this machine trusts", label="v3")


def test_frozen(site: Site) -> None:
    """A server that shows the same for ever: the machine goes on, and says that nobody vouches for it. It does not move."""
    site.publish("v2")
    site.run()
    expired = site.publish("v3", "--days", "-2")
    assert expired.expires < format_time(time.time())
    said = site.run(code=1)
    assert f"but not moved to: its signature expired at {expired.expires}" in said
    assert f"error: expired: nobody vouches for this machine's state since {expired.expires}" in said
    assert site.host.machine.labels() == ("v2", "v2", "v2")
    assert "expired" in site.status()
    row = site.server.status(FRESH)
    assert row["expired"] and "vow" not in row["published"]
    site.run("--force", code=1)
    assert site.host.machine.labels() == ("v3", "v3", "v3")
    soon = site.sign("alice", "--days", "3")
    assert "unchanged" in site.populate()
    assert f"at {soon.expires}, nobody vouches for this machine's state any more" in site.run()
    assert "expires    in" in site.status()
    site.sign("alice")
    site.populate()
    assert "nobody vouches" not in site.run() and "expire" not in site.status() and not site.server.status(FRESH)["expired"]


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
    site.signed.unlink()
    site.write("v3")
    site.populate()
    site.run()
    assert site.host.machine.labels() == ("v3", "v3", "v3")


# --- the server ---


def test_what_is_not_signed_is_not_published(site: Site) -> None:
    before = site.current.read_bytes()
    site.write("v2", "alice", "bob")
    said = site.populate(code=1)
    assert f"{FRESH}: not signed: hosts/signed has release" in said
    assert site.current.read_bytes() == before
    assert not list((site.server.chroot(FRESH) / "releases").glob(".new*"))
    kept = site.signed.read_text()
    site.signed.unlink()
    assert f"{FRESH}: not signed: hosts/signed has no {FRESH}, and what is published is signed" in site.populate(code=1)
    site.signed.write_text(kept)
    site.sign("alice")
    assert f"{FRESH}: published" in site.populate()


def test_a_later_signature_of_what_is_published_takes_its_place(site: Site) -> None:
    """Also where the next release lies in hosts/, and waits to be signed: it must not expire meanwhile."""
    first, leaf = site.signature.signed, site.signature.leaf
    site.write("v2", "alice", "bob")
    site.resign("alice", leaf, serial=first.serial + 5)
    assert "not signed" in site.populate(code=1)
    assert parse_signed(json.loads(site.current.read_text())["vow"]["text"], "").serial == first.serial + 5
    site.resign("alice", leaf, serial=first.serial)
    said = site.populate(code=1)
    assert f"hosts/signed has serial {first.serial}, and {first.serial + 5} is published: the hosts would refuse it" in said


def test_what_1_1_signs_is_left_alone_until_there_is_a_client_for_it(site: Site) -> None:
    """That client would refuse what this bento.py signs, and what is published is its safety net."""
    vow = json.loads(site.current.read_text())["vow"]
    site.forge(vow=None, signed="bento-release 1\nhost fresh\n", signature="x")
    report = site.server.chroot(FRESH) / "logs/status.json"
    said = json.loads(report.read_text())
    before = site.current.read_bytes()
    for version, code in (("1.1", 1), (client.VERSION, 0)):
        report.write_text(json.dumps(said | {"client": version}))
        words = site.populate(code)
        assert (f"{FRESH}: what is published is signed for a client before 1.2" in words) == bool(code)
        assert (site.current.read_bytes() == before) == bool(code)
    assert json.loads(site.current.read_text())["vow"] == vow and "signature" not in json.loads(site.current.read_text())


LOCK = {"nodes": {"root": {"inputs": {"nixpkgs": "n"}}, "n": {}}, "root": "root", "version": 7}


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ("{ outputs = { self }: { }; }", []),
        ("{ outputs = inputs: { x = { inputs = 1; }; }; }", []),
        ("{ outputs = { self, nixpkgs, ... }: { inputs.b = 1; }; }", ["nixpkgs"]),
        ("{ outputs = { self, nixpkgs }@inputs: { }; }", ["nixpkgs"]),
        ("{ outputs = inputs@{ self, nixpkgs, ... }: let y = { inputs = { no = 1; }; }; in { }; }", ["nixpkgs"]),
        ('{ inputs.nixpkgs.url = "inputs.x"; # inputs.z\n inputs."q-r".url = ""; outputs = _: { }; }', ["nixpkgs", "q-r"]),
        ('{ inputs = { nixpkgs.url = "x"; home = { url = ""; inputs.a.follows = "nixpkgs"; }; }; outputs = _: { }; }', ["nixpkgs", "home"]),
    ],
)  # fmt: skip
def test_the_inputs_of_a_flake(text: str, inputs: list[str]) -> None:
    assert bento.flake_inputs(text) == inputs


def test_a_flake_with_an_input_that_nobody_locked_is_not_signed(site: Site) -> None:
    directory, before = site.server.top / "fleet/hosts" / FRESH, site.signed.read_bytes()
    flake = (directory / "flake.nix").read_text()
    try:
        (directory / "flake.nix").write_text('{ inputs.nixpkgs.url = "github:NixOS/nixpkgs"; outputs = { self, nixpkgs }: { }; }\n')
        argv = ("sign", FRESH, "--key", str(site.keys / "alice"))
        for lock, code in ((None, 1), (LOCK | {"nodes": {"root": {}}}, 1), ("{", 1), (LOCK, 0)):
            if lock is not None:
                (directory / "flake.lock").write_text(lock if isinstance(lock, str) else json.dumps(lock))
            done = site.server.bento(*argv)
            assert done.returncode == code, done.stdout
            assert (f"{FRESH}: flake.lock lacks nixpkgs: nobody would know what was signed" in done.stdout) == bool(code)
        assert site.signed.read_bytes() != before
    finally:
        (directory / "flake.nix").write_text(flake)
        (directory / "flake.lock").unlink()


def test_hosts_that_were_not_signed_together(site: Site) -> None:
    """A merge of what two have signed, or a hand."""
    text = site.signed.read_text()
    site.signed.write_text(text.replace("again 0", "again 1"))
    assert "its hosts are not those that were signed (a merge?)" in site.populate(code=1)
    done = site.server.bento("sign", "--key", str(site.keys / "alice"))
    assert done.returncode == 1 and "'git checkout hosts/signed', or all hosts with --serial and --fleet-id" in done.stdout


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
    found = bento.Signature(Vow("", "", ""), ALICE, LEAF._replace(system=signed))
    if published is BentoError:
        with pytest.raises(BentoError, match="not signed: this was built to /built, and /signed is signed"):
            bento.check_system(found, built)
    else:
        assert bento.check_system(found, built) == published


def test_the_signed_system_is_published(site: Site) -> None:
    site.write("v2", "alice")
    site.sign("alice")
    site.resign("alice", site.signature.leaf._replace(system="/nix/store/signed"))
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
    leaf = site.signature.leaf
    site.populate()
    site.run()
    assert leaf.system == os.path.realpath(site.host.machine.root / "run/current-system")
    site.sign("alice")
    assert site.signature.leaf == leaf
    site.write("v3", "alice", "bob")
    site.sign("alice")
    assert site.signature.leaf.system is None


def test_a_serial_is_never_lower_than_the_last(site: Site) -> None:
    first, second = site.sign("alice"), site.sign("alice")
    assert second.serial > first.serial
    site.resign("alice", site.signature.leaf, serial=YEAR_2050)
    done = site.server.bento("sign", "--key", str(site.keys / "alice"), FRESH)
    assert f"hosts/signed has serial {YEAR_2050}, of 2050-01-01T00:00:00Z: signing goes on from there" in done.stdout
    assert site.signature.signed.serial == YEAR_2050 + 1
    # It was lost: what hosts have seen is told by hand.
    site.signed.unlink()
    assert site.sign("alice").fleet != first.fleet
    found = site.sign("alice", "--serial", str(YEAR_2050 + 9), "--fleet-id", first.fleet)
    assert (found.serial, found.fleet) == (YEAR_2050 + 9, first.fleet)
    assert site.server.bento("sign", "--key", str(site.keys / "alice"), "--serial", "5").returncode == 2


def test_nothing_is_taken_over_from_somebody_else(site: Site) -> None:
    """Who can push can write hosts/signed: a system, an unsign, or a release of another host in it would be signed by alice."""
    leaf = site.signature.leaf
    evil = leaf._replace(system="/nix/store/evil", unsign=True)
    site.resign("mallory", evil, serial=(1 << 53) - 2, revoked=(client.fingerprint(public(site, "bob")),))
    done = site.server.bento("sign", FRESH, "--key", str(site.keys / "alice"))
    assert done.returncode == 1 and "is not of this key, which takes no host over from it: sign all" in done.stdout
    assert site.server.bento("sign", "--key", str(site.keys / "alice")).returncode == 0
    found = site.signature
    assert (found.leaf, found.signed.revoked) == (leaf, ()) and found.signed.serial < YEAR_2050


def public(site: Site, name: str) -> str:
    return (site.keys / f"{name}.pub").read_text().split()[1]


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
        (clone / "hosts/signed").unlink()
        code = CLOCK.format(path=str(SERVER.parent), ahead=midday + 3600 * number - time.time())
        argv: list[str | Path] = [sys.executable, "-c", code, "--fleet", clone, "sign", FRESH, "--fleet-id", FLEET]
        argv += ["--key", site.keys / "alice"]
        done: Done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, umask=umask, check=False)
        assert done.returncode == 0, done.stdout
        found = bento.find_signature(bento.Fleet(clone, tmp_path), FRESH)
        assert found is not None
        texts.append(found)
    first, second = (each.signed for each in texts)
    assert second.serial > first.serial
    assert texts[0].vow.leaf == texts[1].vow.leaf
    assert texts[0].vow.text.replace(str(first.serial), "") == texts[1].vow.text.replace(str(second.serial), "")


# --- what the host makes of it ---

NOBODY, ABOUT = "its signature is of nobody whom this machine trusts", "what was signed is about another one"
LATER = ALICE._replace(serial=ALICE.serial + 1)
OTHERS = [LINE.replace("toy", name) for name in ("a", "z", "zz")]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


def vow_of(keys: Path, key: str, signed: Signed, leaf: Leaf = LEAF, namespace: str = client.NAMESPACE) -> Vow:
    leaves = [OTHERS[0], format_leaf(leaf), *OTHERS[1:]]
    tree = bento.Tree(leaves)
    text = format_signed(signed._replace(root=tree.root))
    return Vow(text, make_signature(keys / key, text, namespace), leaves[1], tree.path(1))


@pytest.mark.parametrize(
    ("key", "signed", "leaf", "changes", "words"),
    [
        ("alice", LATER, LEAF, {}, None),
        ("bob", LATER, LEAF._replace(system="/nix/store/signed", commit="c" * 40, again=3), {}, None),
        ("alice", ALICE, LEAF, {}, None),  # as it was seen
        ("alice", ALICE, LEAF._replace(again=1), {}, "another text with its serial, 1795435200, was seen"),
        ("bob", ALICE._replace(expires="2027-01-01T00:00:00Z"), LEAF, {}, "another text with its serial"),
        ("alice", ALICE._replace(serial=ALICE.serial - 1), LEAF, {}, "was seen: sign it with --serial 1795435201"),
        ("alice", LATER._replace(fleet="e" * 32), LEAF, {}, f"signed for fleet {'e' * 32}, and this machine is one of {'fleet ' + FLEET}"),
        ("mallory", LATER, LEAF, {}, NOBODY),
        ("carol", LATER, LEAF, {}, NOBODY),  # who was revoked, and whom the system that runs would trust
        ("alice/git", LATER, LEAF, {}, NOBODY),  # the administrator's key signs commits, too
        ("alice", LATER, LEAF, {"text": format_signed(LATER)}, NOBODY),
        ("alice", LATER, LEAF, {"leaf": f"{LINE} unsign yes"}, "is not in what was signed"),
        ("alice", LATER, LEAF, {"leaf": OTHERS[1]}, "is not in what was signed"),
        ("alice", LATER, LEAF, {"path": ()}, "is not in what was signed"),
        ("alice", LATER, LEAF, {"path": ("up",)}, "its path to what was signed is malformed"),
        ("alice", LATER, LEAF._replace(host="another"), {}, ABOUT),
        ("alice", LATER, LEAF._replace(release="b" * 64), {}, ABOUT),
        ("alice", LATER, LEAF._replace(size=10240 + 512), {}, ABOUT),
        *(
            ("alice", LATER, LEAF, {"signature": signature}, NOBODY)
            for signature in ("", "x", client.ARMOR, "\0" * 1000, client.ARMOR + "A" * 40_000)
        ),
        ("alice", LATER, LEAF, {"signature": "\ud800"}, "surrogates not allowed"),  # which JSON can spell
        ("alice", LATER, LEAF, {"leaf": "\ud800"}, "no pairs"),
    ],
)
def test_who_vouches_for_what(
    key: str, signed: Signed, leaf: Leaf, changes: dict[str, Any], words: str | None, keys: Path, tmp_path: Path
) -> None:
    """Alice and bob may, and have. What else there is to sign with, or in the place of what they signed, is nothing."""
    key, _, namespace = key.partition("/")
    by = {name: (keys / f"{name}.pub").read_text().strip() for name in ("alice", "bob", "carol")}
    signer = {name: client.fingerprint(line.split()[1]) for name, line in by.items()}
    seen = vow_of(keys, "alice", ALICE)
    pinned = Pinned(tuple(by.values()), (signer["carol"],), fleet=FLEET, signer=signer["alice"], text=seen.text, leaf=seen.leaf)
    state = State(serials=(f"{signer['alice']} {ALICE.serial}",), pinned=pinned)
    state = client.parse_state(client.encode(state), "state.json")
    settings = client.make_settings({"host": "toy", "signers": str(keys / "carol.pub")}, "test")
    trusted = client.trusted_keys(settings, state)
    assert trusted is not None and trusted.keys() == {signer["alice"], signer["bob"]}
    vow = vow_of(keys, key, signed, leaf, namespace or client.NAMESPACE)._replace(**changes)
    current = client.Current("toy", A, 10240, ALICE.expires, "/nix/store/evil", vow=vow)
    if words is None:
        found = client.verify(current, trusted, state, tmp_path, "test")
        said = current._replace(signer=signer[key], system=leaf.system, commit=leaf.commit, again=leaf.again)
        assert found == said, "what was not signed says nothing"
        return
    with pytest.raises(BentoError, match=words):
        client.verify(current, trusted, state, tmp_path, "test")


def test_what_nobody_signed(tmp_path: Path) -> None:
    current = client.Current("toy", A, 10240, ALICE.expires)
    with pytest.raises(BentoError, match="is not signed, as this machine wants it"):
        client.verify(current, {}, State(pinned=Pinned(())), tmp_path, "test")
    settings = client.make_settings({"host": "toy"}, "test")
    assert client.trusted_keys(settings, State()) is None
    assert client.trusted_keys(settings, State(pinned=Pinned(()))) == {}, "nobody is not everybody"


def make_security_key(directory: Path) -> str:
    """A key as a security key has it, with its private half in a file. The public line."""
    call("openssl", "genpkey", "-algorithm", "ed25519", "-out", directory / "sk.pem")
    argv: list[str | Path] = ["openssl", "pkey", "-in", directory / "sk.pem", "-pubout", "-outform", "DER"]
    raw = subprocess.run(argv, capture_output=True, check=True).stdout[-32:]
    blob = b"".join(map(ssh_text, (b"sk-ssh-ed25519@openssh.com", raw, b"ssh:")))
    return f"sk-ssh-ed25519@openssh.com {base64.b64encode(blob).decode()} key\n"


def ssh_text(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def sign_by_security_key(directory: Path, public: str, text: str, flags: int) -> str:
    """As OpenSSH's PROTOCOL.sshsig and PROTOCOL.u2f have it."""
    names = ssh_text(client.NAMESPACE.encode()) + ssh_text(b"") + ssh_text(b"sha512")
    message = b"SSHSIG" + names + ssh_text(hashlib.sha512(text.encode()).digest())
    tail = bytes([flags]) + (7).to_bytes(4, "big")
    (directory / "data").write_bytes(hashlib.sha256(b"ssh:").digest() + tail + hashlib.sha256(message).digest())
    argv: list[str | Path] = ["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", directory / "sk.pem", "-in", directory / "data"]
    made = subprocess.run(argv, capture_output=True, check=True).stdout
    signature = ssh_text(b"sk-ssh-ed25519@openssh.com") + ssh_text(made) + tail
    data = b"SSHSIG" + (1).to_bytes(4, "big") + ssh_text(base64.b64decode(public.split()[1])) + names + ssh_text(signature)
    return f"{client.ARMOR}{textwrap.fill(base64.b64encode(data).decode(), 70)}\n-----END SSH SIGNATURE-----\n"


@pytest.mark.parametrize(("flags", "good"), [(0, False), (4, False), (1, True), (5, True)])
def test_a_security_key_has_to_be_touched(flags: int, good: bool, tmp_path: Path) -> None:
    public = make_security_key(tmp_path)
    (tmp_path / "signers").write_text(public)
    signature = sign_by_security_key(tmp_path, public, "text\n", flags)
    with nullcontext() if good else pytest.raises(BentoError, match="signed it without a touch"):
        signer = client.find_signer("text\n", signature, client.read_signers(tmp_path / "signers"), tmp_path)
        assert signer == client.fingerprint(public.split()[1])


@pytest.mark.parametrize(
    "line",
    [
        '* namespaces="git" ssh-ed25519 AAAAaaaa',
        'valid-before="20200101" ssh-ed25519 AAAAaaaa',
        "@revoked ssh-ed25519 AAAAaaaa",
        "cert-authority ssh-ed25519 AAAAaaaa",
        "alice@example.org ssh-ed25519 AAAAaaaa",
        "ssh-ed25519-cert-v01@openssh.com AAAAaaaa",
        "ssh-ed25519 AAAAa",
    ],
)
def test_words_of_a_signers_file_that_are_not_followed_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "signers").write_text(f"# who may sign\nssh-ed25519 AAAAbbbb bob, until valid-before=\n{line}\n")
    with pytest.raises(client.UsageError, match="signers:3: not a public key, as in"):
        client.read_signers(tmp_path / "signers")


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
        ((f"{S1} 5", f"{S2} 7"), (S1, S2), 0),
        ((f"{S1} 5", S2, f"{S2} -7", f"{S2} 7 7", ""), (), 5),  # a damaged file
    ],
)
def test_the_highest_serial_that_counts(serials: tuple[str, ...], revoked: tuple[str, ...], seen: int) -> None:
    assert client.highest_serial(serials, revoked) == seen


def test_what_is_kept_of_an_accepted_release() -> None:
    text = format_signed(ALICE._replace(serial=5, revoked=(DROPPED,)))
    current = client.Current("toy", A, 10240, ALICE.expires, vow=Vow(text, "", LINE), signer=S2)
    keys = {S1: "one", S2: "two"}
    first = State()._replace(**client.accepted(State(), current, keys))
    assert first == State(serials=(f"{S2} 5",), pinned=Pinned(("one", "two"), (DROPPED,), "", FLEET, S2, text, LINE))
    before = State(serials=(f"{S1} 7", f"{S2} 9"), pinned=Pinned(("three",), (S1,), "key"))
    again = before._replace(**client.accepted(before, current, keys))
    assert again.serials == before.serials  # not lower, whoever is trusted now
    assert again.pinned == Pinned(("three",), tuple(sorted((S1, DROPPED))), "key", FLEET, S2, text, LINE)
    # Where nobody's signature is asked for, it is not even read.
    assert client.accepted(before, current._replace(signer=None), keys) == {}


def test_the_second_in_which_nobody_vouches_any_more() -> None:
    state, end_s = State(pinned=Pinned((), text=format_signed(ALICE))), client.parse_time(ALICE.expires)
    current = client.Current("toy", A, 10240, ALICE.expires, vow=Vow(format_signed(ALICE), "", ""), signer=S1)
    week_s = 7 * 86400
    assert client.nobody_vouches(State(), end_s) is None and client.nobody_vouches(state, end_s - week_s - 1) is None
    assert str(client.nobody_vouches(state, end_s - week_s)).startswith("warning: in 7d")
    assert str(client.nobody_vouches(state, end_s - 1)).startswith("warning: in 1s")
    assert bento.find_expiry(current, end_s - week_s - 1) == {} and client.has_expired(current, end_s - 1) is None
    assert list(bento.find_expiry(current, end_s - 1)) == list(bento.find_expiry(current, end_s - week_s)) == ["expires_soon"]
    for now_s in (end_s, end_s + 1):
        assert str(client.nobody_vouches(state, now_s)).startswith("error: expired")
        assert list(bento.find_expiry(current, now_s)) == ["expired"] and client.has_expired(current, now_s) is not None


@pytest.mark.parametrize(
    ("asked", "unsign", "words"),
    [
        ("/etc/signers", False, None),  # the new system's own file
        ("/etc/other", True, None),
        ("/etc/other", False, f"lack the key that signed it, {S1}"),
        ("/etc/empty", False, "no signer's key in it"),
        ("/etc/nothing", False, "cannot be read"),
        ("{top}/var/signers", False, None),  # a file of this machine's
        (None, False, "it has no services.bento.signers"),
        ("", False, "it has no services.bento.signers"),
        (None, True, None),
    ],
)
def test_who_a_new_system_would_trust(asked: str | None, unsign: bool, words: str | None, tmp_path: Path) -> None:
    for name, signers in (("etc/signers", [S1]), ("var/signers", [S1, S2]), ("etc/empty", []), ("etc/other", [S2])):
        write_signers(tmp_path / name, *signers)
    (tmp_path / "etc/bento").mkdir()
    (tmp_path / "etc/bento/client.json").write_text(json.dumps({"host": "toy", "signers": asked and asked.format(top=tmp_path)}))
    pinned = Pinned(("ssh-ed25519 x",), signer=S1, leaf=format_leaf(LEAF._replace(unsign=unsign)))
    refusal = client.drops_signers(pinned, A, str(tmp_path))
    assert refusal is None if words is None else words in str(refusal)
    if unsign:
        assert client.drops_signers(pinned, "b" * 64, str(tmp_path)) is not None, "of that release alone"
    if words is None:
        after = client.pin(State(pinned=pinned), A, str(tmp_path))
        assert (after is None) == (asked is None) and (after is None or after.signers != pinned.signers)
        assert unsign or client.pin(State(pinned=pinned), "b" * 64, str(tmp_path)) == pinned, "a person's, or an older one's"
    (tmp_path / "etc/bento/client.json").unlink()
    assert client.drops_signers(pinned, A, str(tmp_path)) is None, "one that has no Bento takes nothing"


def test_old_states_are_read() -> None:
    state = client.encode(State())
    assert b"serial" not in state and b"pinned" not in state and client.parse_state(state, "state.json") == State()
    of_11 = json.loads(state) | {"serials": [f"{S1} 5"], "signer": S1, "signed": "bento-release 1\n"}
    assert client.parse_state(json.dumps(of_11).encode(), "state.json") == State(serials=(f"{S1} 5",))
    long = Pinned((f"ssh-rsa {'A' * 1000}",) * 20, (S1,) * 150, text="x\ny\n")
    kept = State(serials=(f"{S1} 5", f"{S2} 7"), pinned=long)
    assert client.parse_state(client.encode(kept), "state.json") == kept, "nobody is dropped"
