"""README's table of who can do what: each row is shown by a test, here or where the attack is made with what it takes."""

import re
import shutil
from pathlib import Path

import pytest
from fleet import REPO
from test_outages import sftp_by_server
from test_pinned import Site
from test_signed import make_keys
from toylab import HOST, Lab
from toynixos import TESTS, write_config

import bento

# What a row begins with, and the tests that show it.
ROWS = {
    "has taken over the server": (
        "test_attacks::test_a_server_that_is_taken_over",
        "test_signed::test_forged",
        "test_build_server::test_another_content_of_the_signed_path",
    ),
    "has taken over one of several servers": (
        "test_attacks::test_a_replica_that_is_taken_over",
        "test_hostile_server::test_a_server_that_froze_hides_no_newer_one",
    ),
    "is on the line between": (
        "test_hostile_server::test_an_impostor_of_the_second_server",
        "test_hostile_server::test_the_first_key_counts_under_every_name",
    ),
    "answers in the server's place at a host's first contact": (
        "test_sshd::test_the_first_key_seen_is_kept_with_a_warning",
        "test_sshd::test_a_key_that_is_not_known_is_refused_when_keys_are_given",
        "test_signed::test_the_first_release_of_a_machine_is_checked_too",
    ),
    "has a host's key": (
        "test_hostile_host::test_a_hostile_host_is_nobody_else",
        "test_hostile_host::test_a_hostile_host_fills_its_logs",
        "test_truth::test_one_hosts_junk_keeps_nobody_from_being_published",
    ),
    "has stolen an administrator's signing key": (
        "test_signed::test_a_stolen_key_runs_ahead_and_is_revoked",
        "test_pinned::test_a_key_that_was_taken_out",
    ),
    "can write to the repository, and not sign": (
        "test_attacks::test_who_can_write_to_the_repository",
        "test_signed::test_what_is_not_signed_is_not_published",
    ),
}


def test_each_row_of_the_table_has_its_tests() -> None:
    table = (REPO / "README.md").read_text("utf-8").partition("## Security")[2]
    rows = re.findall(r"(?m)^\| (?!who|---)(.*?) \| ", table)
    assert len(rows) == len(ROWS)
    for row, (begin, tests) in zip(rows, ROWS.items(), strict=True):
        assert row.startswith(begin)
        for name in tests:
            file, _, test = name.partition("::")
            assert re.search(rf"(?m)^def {test}\(", (TESTS / f"{file}.py").read_text("utf-8")), name


@pytest.mark.parametrize("signers", [False, True])
def test_a_server_that_is_taken_over(lab: Lab, signers: bool) -> None:
    """It becomes root on every host, or can only keep silent."""
    site = Site(lab)
    if signers:
        site.publish("v2", "alice")
        site.run()
        site.publish_evil()
        site.check_refused("v2")
    else:
        site.write("evil")
        lab.populate()
        site.run()
        assert site.label == "evil"


@pytest.mark.parametrize("signers", [False, True])
def test_a_replica_that_is_taken_over(lab: Lab, signers: bool) -> None:
    """Hosts take what any of the servers says, or what was signed, the newest of all."""
    replica, signed = lab.directory / "replica", lab.directory / "fleet/hosts/signed"
    key = make_keys(lab.directory / "keys") / "alice"
    Path(lab.file("known")).write_text("whom the toy sftp never asks for\n")
    lab.settings |= {"server": ["first", "second"], "known_hosts": lab.file("known")}
    path = sftp_by_server(lab, first=replica, second=lab.chroot)

    def publish(label: str, *, good: bool = True) -> None:
        settings = lab.settings | ({"signers": f"{key}.pub"} if signers and good else {})
        write_config(lab.config, flake=True, host=HOST, label=label, client_json=settings)
        if signers and good:
            directories = ["--fleet", lab.file("fleet"), "--chroot-dir", lab.file("chroot")]
            assert bento.main([*directories, "sign", "--key", str(key)]) == 0
        lab.populate()

    publish("v2")
    shutil.copytree(lab.chroot, replica)
    if signers:
        lab.settings["signers"] = f"{key}.pub"
    lab.client("run", PATH=path, TOY_SERVER="")
    assert lab.labels()[0] == "v2"
    kept = {file: file.read_text() for file in (lab.chroot / "current.json", *([signed] if signers else []))}
    if signers:
        signed.unlink()
        (lab.chroot / "current.json").unlink()
    publish("evil", good=False)
    shutil.rmtree(replica)
    shutil.copytree(lab.chroot, replica)
    for file, text in kept.items():
        file.write_text(text)
    lab.client("run", PATH=path, TOY_SERVER="")
    assert lab.labels()[0] == ("v2" if signers else "evil")
    publish("v3")
    lab.client("run", PATH=path, TOY_SERVER="")
    assert lab.labels()[0] == "v3", "the newest of all that count"


def test_who_can_write_to_the_repository(lab: Lab) -> None:
    """What nobody signs is not published; without signers it is, and runs."""
    site = Site(lab)
    site.publish("v2", "alice")
    site.run()
    site.write("evil", "alice")
    with pytest.raises(AssertionError):
        lab.populate()
    assert "up to date" in site.run() and site.label == "v2"
    site.publish("v3", "alice", flags=("--unsign",))
    site.write("v3")
    site.fleet("sign", "--key", str(site.keys / "alice"), "--unsign")
    lab.populate()
    site.run()
    (lab.directory / "fleet/hosts/signed").unlink()
    site.write("evil")
    lab.populate()
    site.run()
    assert site.label == "evil"
