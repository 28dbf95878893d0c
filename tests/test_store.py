"""What releases share in the store: a small file that several of them have is one file, and never that of a run that was cut."""

import hashlib
import os
from pathlib import Path

import pytest
from fleet import Site

import bento


def two_hosts(site: Site) -> None:
    for name in "ab":
        host = site.host(name)
        (host / "configuration.nix").write_text(f"{{ }} # {name}\n")
        (host / "utils").mkdir(exist_ok=True)
        (host / "utils/shared.nix").write_text("{ }\n" * 100)


def published(site: Site, host: str, name: str) -> Path:
    return site.chroots / host / "config" / name


def test_a_file_of_two_releases_is_one(site: Site) -> None:
    two_hosts(site)
    site.publish()
    assert site.current("a").release != site.current("b").release
    a, b = (os.stat(published(site, host, "utils/shared.nix")) for host in "ab")
    assert a.st_ino == b.st_ino
    assert published(site, "a", "configuration.nix").read_text() != published(site, "b", "configuration.nix").read_text()
    assert [path.name for path in (site.chroots / ".store").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["configuration.nix", "utils/shared.nix"])
def test_what_a_run_left_that_was_cut_is_not_trusted(site: Site, name: str) -> None:
    """After a power cut its files may be empty."""
    two_hosts(site)
    content = (site.fleet / "hosts/a" / name).read_bytes()
    head = bento.header(name, len(content), False, False)
    block = head + content + bytes(-len(content) % 512)
    pool = site.chroots / ".store/.pool"
    pool.mkdir(parents=True)
    (pool / hashlib.sha256(block).hexdigest()).write_bytes(b"")
    site.publish()
    assert published(site, "a", name).read_bytes() == content
