"""Lines that only a rare machine needs. Each was taken out once, and no test failed: so each is looked at here, from outside."""

import hashlib
import json
import os
import time
from typing import Any

import pytest
from fleet import Site, last_data
from test_download import BIG, heavy, parts
from toylab import HOST, NOON, A, B, Lab

import bento
from bento_client import Current, Result, State, decide, format_time

__all__ = ["heavy"]  # fixture
HOUR_S = 3600


def report(site: Site, *, ago_s: float = 0, **changes: Any) -> None:
    """Of host a, which came so long ago, and was written then by its own clock."""
    path = site.write_report("a", polled=format_time(time.time() - ago_s), **changes)
    os.utime(path, (time.time() - ago_s,) * 2)


def row(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(site.run("status", "a", "--json").out)["hosts"][0]
    return found


@pytest.mark.parametrize(("files", "free", "said"), [(0, 0, False), (1000, 0, True), (1000, 10, False)])
def test_a_disk_that_counts_no_inodes_is_not_full(hostile: Site, monkeypatch: pytest.MonkeyPatch, files: int, free: int, said: bool) -> None:
    """btrfs says 0 of 0."""
    real = os.statvfs(hostile.top)
    values = list(real)
    values[5:8] = files, free, free
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    ran = hostile.run("status")
    assert ("has no inodes" in ran.out + ran.err) == said


def test_another_release_that_fails_is_news(hostile: Site) -> None:
    told = str(hostile.top / "told")
    for label in ("one", "two"):
        hostile.host("a", {"configuration.nix": f"{{ }} # {label}\n"})
        hostile.publish()
        report(hostile, last=last_data(hostile.current("a").release, "build-failed", label))
        assert "begins: a: failing" in (said := hostile.run("status", "--changes", told).err) and label in said, said
        assert "begins" not in hostile.run("status", "--changes", told).err


@pytest.mark.parametrize(("pause_h", "paused"), [(1.0, False), (3.0, True)])
def test_a_pause_ends_while_the_host_is_silent(hostile: Site, pause_h: float, paused: bool) -> None:
    """It reported two hours ago, and said until when."""
    release = hostile.current("a").release
    until = format_time(time.time() + (pause_h - 2) * HOUR_S)
    report(hostile, ago_s=2 * HOUR_S, release=release, last=last_data(release), paused_until=until)
    assert row(hostile)["paused"] is paused


def test_a_clock_that_was_set_back_is_not_guessed_at(hostile: Site) -> None:
    """It finished tomorrow, by its own clock: nobody knows when that was."""
    release = hostile.current("a").release
    report(hostile, release=release, last=last_data(release, finished=format_time(time.time() + 24 * HOUR_S)))
    assert (row(hostile)["state"], row(hostile)["since"]) == ("up-to-date", None)


def test_what_a_link_in_logs_leads_to_is_not_the_hosts_to_answer_for(hostile: Site) -> None:
    large = hostile.top / "large"
    large.touch()
    os.truncate(large, 2 * bento.MAX_LOGS_BYTES)
    (hostile.chroots / "a/logs/20261123T101502Z_9f3a61c07be4_ok.log").symlink_to(large)
    assert "the host fills it" not in hostile.run("status").out
    with open(hostile.chroots / "a/logs/20261123T101503Z_9f3a61c07be4_ok.log", "wb") as own:
        own.truncate(2 * bento.MAX_LOGS_BYTES)
    assert "the host fills it" in hostile.run("status").out


def test_what_is_left_of_other_downloads_goes_before_the_next_one(lab: Lab) -> None:
    lab.publish("v1")
    release = lab.publish("v2")
    (lab.state / "partial").mkdir()
    stale, ours = lab.state / f"partial/{B}.tar", lab.state / f"partial/{release}.tar"
    stale.write_bytes(b"of an older release")
    ours.write_bytes((lab.chroot / f"releases/{release}.tar").read_bytes()[:1000])
    lab.run_patched("c.free_bytes = lambda path: 1")
    assert lab.last().result == Result.FETCH_FAILED and "free some space" in lab.last().reason
    assert not stale.exists() and ours.exists()


@pytest.mark.parametrize("what", ["archive", "part"])
def test_parts_are_not_fetched_twice(heavy: Lab, what: str) -> None:
    """A byte that is wrong in what came shows that it was not fetched again: only the whole archive would help, which is gone."""
    (heavy.config / "big1").write_bytes(os.urandom(BIG))
    release = heavy.publish("v2")
    (heavy.state / "partial").mkdir()
    content = (heavy.chroot / f"releases/{release}.tar").read_bytes()[: parts(heavy)[0][1] + parts(heavy)[1][1]]
    name = f"{release}.tar"
    if what == "part":
        content = (heavy.config / "big1").read_bytes()[: BIG // 2]
        name = hashlib.sha256((heavy.config / "big1").read_bytes()).hexdigest()
    (heavy.state / "partial" / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    (heavy.chroot / f"releases/{release}.tar").unlink()
    assert f"{release}.tar" in heavy.client("run", code=1)
    assert heavy.last().result == Result.FETCH_FAILED and heavy.labels() == ("v1", "v1", "v1")


@pytest.mark.parametrize(("signer", "followed"), [(None, False), ("SHA256:" + "x" * 43, True)])
def test_a_signed_release_goes_by_its_serial_not_by_a_time(signer: str | None, followed: bool) -> None:
    """Nobody signs when it was published; the serial was looked at before."""
    current = Current(HOST, A, 1, format_time(NOON - HOUR_S), signer=signer)
    assert decide(current, State(published=format_time(NOON)), NOON)[0] is followed
