"""What the client refuses: archives, announcements, journals."""

import hashlib
import os
import re
import tarfile
from pathlib import Path

import pytest
from toylab import HOST, A, Lab, archive, member, tree

import bento_client
from bento_client import Current, Result

FLAKE_NIX = member("flake.nix")
GOOD_TAR = archive(FLAKE_NIX)


def check_refused(lab: Lab, words: str, release: str | None) -> None:
    before = tree(lab.state / "config")
    said = lab.client("run", code=1)
    assert re.search(words, said), said
    assert re.search(r"(?m)^bento: error: ", said)
    assert tree(lab.state / "config") == before
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().release) == (Result.FETCH_FAILED, release)
    assert re.search(words, lab.last().reason)
    assert lab.last().log in lab.logs()
    left = {path.name for path in lab.state.iterdir()}
    assert left <= {"config", "id_ed25519", "lock", "outbox", "result", "state.json"}


@pytest.mark.parametrize(
    ("tar", "words"),
    [
        (archive(FLAKE_NIX, member("/tmp/bento-absolute")), "unsafe name '/tmp/bento-absolute'"),
        (archive(FLAKE_NIX, member("../bento-dots")), r"unsafe name '\.\./bento-dots'"),
        (archive(FLAKE_NIX, member("a/../../bento-dots")), "unsafe name"),
        (archive(FLAKE_NIX, member("./a")), "unsafe name"),
        (archive(FLAKE_NIX, member("link", tarfile.SYMTYPE, "/etc")), "'link', which is neither a file nor a directory"),
        (archive(FLAKE_NIX, member("link", tarfile.SYMTYPE, "."), member("link/x")), "'link', which is neither"),
        (archive(FLAKE_NIX, member("hard", tarfile.LNKTYPE, "flake.nix")), "'hard', which is neither"),
        (archive(FLAKE_NIX, member("null", tarfile.CHRTYPE)), "'null', which is neither"),
        (archive(FLAKE_NIX, member("disk", tarfile.BLKTYPE)), "'disk', which is neither"),
        (archive(FLAKE_NIX, member("fifo", tarfile.FIFOTYPE)), "'fifo', which is neither"),
        (archive(FLAKE_NIX, member("sparse", GNU_sparse_size="1000000000", GNU_sparse_map="0,8")), "'sparse', which is"),
        (archive(FLAKE_NIX, FLAKE_NIX), "no valid archive: File exists"),
        (archive(FLAKE_NIX, member("flake.nix/x")), "no valid archive: Not a directory"),
        (archive(FLAKE_NIX, member("no/parent")), "no valid archive: No such file or directory"),
        (archive(FLAKE_NIX, member("x" * 300)), "File name too long"),
        (archive(FLAKE_NIX, member("\x1b[2Jbell\x07\n", tarfile.FIFOTYPE)), r"has '\\x1b\[2Jbell\\x07\\n', which is neither"),
        (b"this is no tar at all\n" * 100, "no valid archive"),
        (GOOD_TAR[:700], "no valid archive"),
        (b"", "no valid archive"),
    ],
    ids=["absolute", "dots", "inner-dots", "dot", "symlink", "through-symlink", "hardlink", "char", "block", "fifo", "sparse",
         "duplicate", "file-as-directory", "no-parent", "long-name", "escape", "no-tar", "short-tar", "empty"],
)  # fmt: skip
def test_hostile_archive(settled: Lab, tar: bytes, words: str) -> None:
    check_refused(settled, words, settled.publish_raw(tar))
    assert not Path("/tmp/bento-absolute").exists()
    assert not (settled.state / "bento-dots").exists() and not (settled.state.parent / "bento-dots").exists()


def test_wrong_checksum(settled: Lab) -> None:
    digest = hashlib.sha256(GOOD_TAR).hexdigest()[:12]
    check_refused(settled, f"its SHA-256 is {digest}…: damaged", settled.publish_raw(GOOD_TAR, release="c" * 64))


def test_truncated_archive(settled: Lab) -> None:
    release = hashlib.sha256(GOOD_TAR).hexdigest()
    settled.publish_raw(GOOD_TAR[:5000], release=release, size=len(GOOD_TAR))
    check_refused(settled, f"5000 bytes came, {len(GOOD_TAR)} were announced", release)


def test_archive_larger_than_announced(settled: Lab) -> None:
    tar = archive(FLAKE_NIX, content=os.urandom(100_000))
    check_refused(settled, "the announced 5000 bytes", settled.publish_raw(tar, size=5000))


def test_archive_beyond_all_limits(settled: Lab) -> None:
    release = settled.publish_raw(GOOD_TAR, release="d" * 64, size=5 << 30)
    check_refused(settled, "more than the limit of 4294967296", release)


def test_archive_that_is_not_there(settled: Lab) -> None:
    release = settled.publish_raw(GOOD_TAR, release="e" * 64)
    (settled.chroot / "releases" / f"{release}.tar").unlink()
    check_refused(settled, "not found", release)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, f"nothing is published for {HOST} there: run 'bento.py populate {HOST}'"),
        (b"", "not JSON"),
        (b'{"format": 1, "host": "t', "not JSON"),
        (b"<html>", "not JSON"),
        (b'{"format": 1, "size": NaN}', "NaN is not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b'{"format": 9, "host": "toy"}', "format 9, this version of Bento knows format 1: update Bento"),
        (bento_client.encode(Current("another", A, 1, "2026-11-23T10:00:00Z")), f"it is for host 'another', not for '{HOST}'"),
        (bento_client.encode(Current("../x", A, 1, "2026-11-23T10:00:00Z")), "field 'host' is missing or malformed"),
        (b" " * 100_000, "65536 bytes"),
    ],
    ids=["none", "empty", "cut", "html", "nan", "deep", "newer", "other-host", "bad-host", "huge"],
)  # fmt: skip
def test_unusable_current(settled: Lab, raw: bytes | None, words: str) -> None:
    if raw is None:
        (settled.chroot / "current.json").unlink()
    else:
        (settled.chroot / "current.json").write_bytes(raw)
    check_refused(settled, re.escape(words), None)
    count = len(settled.logs())
    settled.client("run", code=1)
    assert len(settled.logs()) == count, "said once, not at each poll"


def test_good_release_after_bad_ones(settled: Lab) -> None:
    settled.publish_raw(b"bad")
    settled.client("run", code=1)
    settled.populate()
    settled.client("run")
    assert (settled.last().result, settled.last().reason) == (Result.OK, "nothing to activate: this system runs already")
    assert settled.labels() == ("v1", "v1", "v1")


def test_glitch_makes_no_rolled_back_release_good(lab: Lab) -> None:
    lab.publish("v1", cut_network=True)
    lab.client("run", code=1)
    current = lab.chroot / "current.json"
    good = current.read_bytes()
    current.write_bytes(good[:40])
    lab.client("run", code=1)
    assert lab.last().result == Result.FETCH_FAILED
    current.write_bytes(good)
    assert "was rolled back" in lab.client("run")
    assert lab.labels() == ("v0", "v0", "v0")
    lab.publish("v2")
    lab.client("run")
    assert lab.labels() == ("v2", "v2", "v2")


@pytest.mark.parametrize("name", ["state.json", "pending.json"])
@pytest.mark.parametrize("content", [b"", b'{"format": 1, "release": 7}'])
def test_damaged_journal_is_set_aside(settled: Lab, name: str, content: bytes) -> None:
    settled.populate()
    (settled.state / name).write_bytes(content)
    said = settled.client("run")
    assert f"set aside as {name}.damaged" in said
    assert (settled.state / f"{name}.damaged").read_bytes() == content
    (settled.state / f"{name}.damaged").unlink()
    assert settled.labels() == ("v1", "v1", "v1")
    assert settled.last().result == Result.OK
    assert "damaged" not in settled.client("run")
