"""Large files are parts of their own."""

import hashlib
import json
import os

import pytest
from fleet import CONFIGURATION, LARGE, Site, check_parts, check_tidy, snapshot

import bento
import bento_client as client


def test_a_large_file_is_a_part_of_its_own(site: Site) -> None:
    name = "x" * 180 + "/big"  # its header takes several blocks
    site.host("a", CONFIGURATION | {name: os.urandom(LARGE), "a": os.urandom(LARGE + 1), "small": b"1" * (LARGE - 1)})
    site.publish()
    sizes = check_parts(site)
    assert (sizes[1], sizes[3], len(sizes)) == (LARGE + 1, LARGE, 5)
    assert hashlib.sha256((site.tree() / name).read_bytes()).hexdigest() == site.current().parts[3].sha256
    before = snapshot(site.chroots / "a/releases")
    site.publish()
    assert snapshot(site.chroots / "a/releases") == before


def test_the_same_large_file_twice(site: Site) -> None:
    content = os.urandom(LARGE)
    site.host("a", CONFIGURATION | {"one": content, "two": content})
    site.publish()
    assert check_parts(site).count(LARGE) == 2


def test_no_large_file_no_parts(site: Site) -> None:
    site.host("a", CONFIGURATION | {f"x{number}": b"1" * (LARGE // 2) for number in range(5)})
    site.publish()
    assert "parts" not in json.loads((site.chroots / "a/current.json").read_bytes())
    check_tidy(site.chroots / "a", {site.current().release})


def test_many_large_files(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest are parts, and current.json stays within its limit."""
    monkeypatch.setattr(bento, "LARGE_FILE", 1000)
    site.host("a", CONFIGURATION | {f"x{number:03}": os.urandom(1000 + number) for number in range(150)})
    site.publish()
    sizes = check_parts(site)
    assert len(sizes) == 2 * bento.MAX_LARGE_FILES + 1
    assert {1050, 1149} <= set(sizes) and 1049 not in sizes
    assert (site.chroots / "a/current.json").stat().st_size < client.MAX_JSON_BYTES / 2


def test_damaged_parts_are_mended(site: Site) -> None:
    site.host("a", CONFIGURATION | {"big": os.urandom(LARGE)})
    site.publish()
    release, directory = site.current().release, site.tar().with_suffix(".parts")
    for damage in ("gone", "short"):
        path = directory / site.current().parts[0].sha256
        path.unlink()
        if damage == "short":
            path.touch()
        site.publish()
        assert site.current().release == release
        check_parts(site)


def test_parts_go_with_their_release(site: Site) -> None:
    for number in range(5):
        site.host("a", CONFIGURATION | {"big": os.urandom(LARGE), "part": str(number)})
        site.publish()
        check_parts(site)
    assert len(list((site.chroots / "a/releases").glob("*.parts"))) == 3
    (site.fleet / "hosts/a/big").unlink()
    for number in range(3):
        site.host("a", {"part": f"more {number}"})
        site.publish()
    check_tidy(site.chroots / "a", {path.stem for path in (site.chroots / "a/releases").glob("*.tar")})
