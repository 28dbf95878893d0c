"""Trust is the machine's, whatever system runs: what a server can do to a host once it has run a release with `signers`.

The server is taken over, or only silent at the right moment; each test is an attack that once made it root."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from sshdlab import call
from toylab import HASTE_S, HOST, PATIENCE_S, Lab, Systemd, be_patient
from toynixos import PYTHON_FLAGS, compiled_client, write_config

import bento
import bento_client as client
from bento_client import State


class Site:
    """v1 has no signers, and is proven by a boot; v2 trusts alice, who has signed it, and runs live."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.systemd, self.keys = lab, Systemd(lab), lab.directory / "keys"
        self.keys.mkdir()
        self.patience_s = PATIENCE_S
        for name in ("alice", "bob"):
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.keys / name)
        lab.publish("v1")
        self.systemd.run("run")
        self.systemd.boot()
        self.run()

    def fleet(self, *words: str) -> None:
        directories = ["--fleet", str(self.lab.directory / "fleet"), "--chroot-dir", str(self.lab.directory / "chroot")]
        assert bento.main([*directories, *words]) == 0

    def write(self, label: str, *signers: str, **behaviour: Any) -> None:
        path = self.keys / "-".join(["signers", *signers])
        path.write_text("".join((self.keys / f"{name}.pub").read_text() for name in signers))
        settings = self.lab.settings | ({"signers": str(path)} if signers else {})
        write_config(self.lab.config, flake=True, host=HOST, label=label, client_json=settings, **behaviour)

    def publish(self, label: str, *signers: str, key: str = "alice", flags: tuple[str, ...] = ()) -> None:
        self.write(label, *signers)
        self.fleet("sign", "--key", str(self.keys / key), *flags)
        self.lab.populate()

    def publish_evil(self) -> None:
        """As who has the server can: nobody has signed it."""
        (self.lab.chroot / "current.json").unlink()
        (self.lab.directory / "fleet/hosts/signed").unlink()
        self.write("evil")
        self.lab.populate()

    def run(self, *words: str, code: int = 0) -> str:
        """As bento.service does: with the settings of the system that runs."""
        config = self.lab.machine.root / "run/current-system/etc/bento/client.json"
        argv = [sys.executable, *PYTHON_FLAGS, compiled_client(), "--config", str(config), *(words or ("run",))]
        argv += ["--confirm-timeout", str(self.patience_s)] if not words or words[0] == "run" else []
        done = self.lab.machine.run(*argv, env=self.lab.env(PATH=self.systemd.path))
        assert done.returncode == code and "Traceback" not in done.stdout, done.stdout
        return done.stdout

    @property
    def label(self) -> str:
        return self.lab.machine.current_label()

    @property
    def state(self) -> State:
        return client.parse_state((self.lab.state / "state.json").read_bytes(), "state.json")

    def check_refused(self, label: str, words: str = "is not signed, as this machine wants it") -> None:
        assert self.label == label
        for force in ((), ("--force",)):
            assert words in self.run("run", *force, code=1)
            assert self.label == label


@pytest.fixture
def site(lab: Lab) -> Site:
    found = Site(lab)
    found.publish("v2", "alice")
    found.run()
    assert found.label == "v2" and found.state.pinned is not None, "at once"
    found.run()  # which finds out whose it is, and which fleet's
    return found


def test_while_it_runs(site: Site) -> None:
    site.publish_evil()
    site.check_refused("v2")


def test_silence_at_the_first_boot(site: Site) -> None:
    """The trial fails, and the machine is back at the system without signers."""
    site.systemd.boot()
    site.lab.down.touch()
    site.patience_s = HASTE_S
    for _ in range(3):
        site.run(code=75) if site.label == "v2" else None
        if site.systemd.is_to_boot():
            site.systemd.boot()
        be_patient(site.lab)
    site.lab.down.unlink()
    if site.label == "v2":  # it waits as long as it has patience: a person picks the entry
        site.systemd.boot(pick=next(name for name, label in site.lab.machine.entries().items() if label == "v1"))
    site.publish_evil()
    site.check_refused("v1")


def test_rollback_by_hand(site: Site) -> None:
    site.systemd.boot()
    site.run()
    site.run("rollback")
    site.publish_evil()
    site.check_refused("v1")


def test_an_older_entry_of_the_menu(site: Site) -> None:
    site.systemd.boot()
    site.run()
    site.systemd.boot(pick=next(name for name, label in site.lab.machine.entries().items() if label == "v1"))
    site.publish_evil()
    site.check_refused("v1")


def test_a_key_that_was_taken_out(site: Site) -> None:
    """Bob's was stolen; v3 knows him no more, and revokes him. The system before it trusts him still."""
    site.publish("v3", "alice", "bob")
    site.run()
    site.publish("v4", "alice", flags=("--revoke", str(site.keys / "bob.pub")))
    site.run()
    site.run("rollback")
    assert site.label == "v3"
    site.publish("evil", "alice", "bob", key="bob")
    site.check_refused("v3", "its signature is of nobody whom this machine trusts")


def test_what_ends_it(site: Site) -> None:
    """`unsign yes` in the leaf of what is deployed, or a person at the machine; nothing else."""
    site.publish("v3", flags=("--unsign",))
    site.run()
    assert site.label == "v3" and site.state.pinned is None
    site.publish_evil()
    site.run()
    assert site.label == "evil"


def test_unpin(site: Site) -> None:
    site.run("rollback")
    site.publish_evil()
    site.check_refused("v1")
    assert "no signer is pinned any more" in site.run("unpin")
    site.run()
    assert site.label == "evil"


def test_another_fleet_of_the_same_signer(site: Site) -> None:
    first = site.state.pinned
    (site.lab.directory / "fleet/hosts/signed").unlink()
    site.publish("v3", "alice")
    assert first is not None
    site.check_refused("v2", f"and this machine is one of fleet {first.fleet}")
    site.publish("v3", "alice", flags=("--fleet-id", first.fleet))
    site.run()
    assert site.label == "v3"


def test_only_the_signer_says_that_what_was_given_up_is_meant(site: Site) -> None:
    """A signature that is renewed each week does not, nor a server that publishes it anew."""
    site.write("v3", "alice", cut_network=True)
    site.patience_s = HASTE_S
    for flags, tried in (((), True), ((), False), (("--again",), True)):
        site.fleet("sign", "--key", str(site.keys / "alice"), *flags)
        site.lab.populate()
        said = site.run(code=int(tried))
        assert ("new release" in said, "rolled" in said, site.label) == (tried, True, "v2")


def test_a_flip_between_two_texts_of_one_serial(site: Site) -> None:
    serial = str(client.parse_signed(site.state.pinned.text if site.state.pinned else "", "").serial + 5)
    kept = (site.lab.directory / "fleet/hosts/signed").read_text()
    texts = []
    for label in ("v3", "v4"):
        (site.lab.directory / "fleet/hosts/signed").write_text(kept)
        site.publish(label, "alice", flags=("--serial", serial))
        texts.append((site.lab.chroot / "current.json").read_text())
    for text, label in zip(texts, ("v3", "v3"), strict=True):
        (site.lab.chroot / "current.json").write_text(text)
        if text == texts[0]:
            site.run()
        else:
            assert "another text with its serial" in site.run(code=1)
        assert site.label == label


def test_the_first_signers_wait_for_a_way_back_that_knows_them(lab: Lab) -> None:
    """A client before 1.2 would write state.json anew without what is pinned."""
    site = Site(lab)
    program = Path(lab.machine.root / "run/current-system").resolve() / "sw/bin/bento-client"
    text = program.read_text()
    program.unlink()
    program.write_text("#!/bin/sh\necho 1.1\n")
    program.chmod(0o755)
    site.publish("v2", "alice")
    site.run(code=1)
    last = site.state.last
    assert last is not None and (last.result, site.label) == ("postponed", "v1") and "would forget that" in last.reason
    program.write_text(text)
    site.run()
    assert site.label == "v2" and site.state.pinned is not None


def write_old_state(site: Site, **changes: Any) -> None:
    path = site.lab.state / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_a_client_of_1_1_trusts_is_pinned_by_the_first_poll(site: Site) -> None:
    """It knew its signers by the system that runs, and no fleet."""
    pinned = site.state.pinned
    assert pinned is not None
    write_old_state(site, pinned=None)
    site.run()
    assert site.state.pinned is not None and site.state.pinned._replace(cache_key="") == pinned
