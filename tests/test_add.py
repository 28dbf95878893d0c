"""`bento.py add`."""

import io
import os
import shutil
import subprocess
import sys

import pytest
from fleet import Site, key, snapshot, write_key

import bento_client as client


def test_add(site: Site) -> None:
    (site.fleet / "utils").mkdir()
    (site.fleet / "utils/bento.nix").write_text("{ }\n")
    ran = site.run("add", "laptop")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (
        "hosts/laptop/: made; put the machine's own configuration there and set the server's name\n"
        "next: 'python3 bento_client.py --host laptop key' on the machine, 'bento.py add laptop --key FILE' here\n"
    )
    directory = site.fleet / "hosts/laptop"
    assert set(os.listdir(directory)) == {"configuration.nix", "utils"}
    assert os.readlink(directory / "utils") == "../../utils"
    text = (directory / "configuration.nix").read_text()
    assert 'networking.hostName = "laptop";' in text
    assert "./utils/bento.nix" in text
    assert set(os.listdir(site.fleet / "hosts")) == {"laptop"}
    site.publish()

    ran = site.run("add", "laptop")
    assert (ran.code, ran.err) == (1, "bento: error: hosts/laptop is there already\n")
    assert (directory / "configuration.nix").read_text() == text


def test_add_a_flake_with_a_key(site: Site) -> None:
    file = site.top / "key.pub"
    file.write_text(key("nas", "root@nas") + "\n")
    ran = site.run("add", "nas", "--flake", "--key", str(file))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[1:] == [
        "hosts/nas.pub: 1 key",
        "next: 'bento.py fleet', switch this server to it, 'bento.py populate'",
    ]
    assert (site.fleet / "hosts/nas.pub").read_text() == key("nas", "root@nas") + "\n"
    assert 'nixosConfigurations."nas"' in (site.fleet / "hosts/nas/flake.nix").read_text()
    if nix := shutil.which("nix-instantiate"):
        for name in ("flake.nix", "configuration.nix"):
            subprocess.run([nix, "--parse", site.fleet / "hosts/nas" / name], check=True, capture_output=True)


def test_add_a_key_from_standard_input_to_a_host_that_is_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("a")
    before = snapshot(site.fleet / "hosts/a")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{key('a')}\n{key('b')}\n"))
    ran = site.run("add", "a", "--key", "-")
    assert (ran.code, ran.out.splitlines()[0]) == (0, "hosts/a.pub: 2 keys")
    assert (site.fleet / "hosts/a.pub").read_text() == f"{key('a')}\n{key('b')}\n"
    assert snapshot(site.fleet / "hosts/a") == before


@pytest.mark.parametrize("name", ["", "with space", "../x", "-x", "a" * 26, "x/y", "é", "a\n"])
def test_add_a_bad_name(name: str, site: Site) -> None:
    ran = site.run("add", "--", name)
    assert ran.code == 2
    assert ran.err == (
        f"bento: error: {client.one_line(name)}: no host name:"
        " letters, digits, _ and -, at most 25, a letter or digit first: give it such a one here and as services.bento.host,"
        ' and its own as "attribute" in bento.json\n'
    )
    assert list((site.fleet / "hosts").iterdir()) == []


BAD_KEY_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "No such file or directory"),
    "private": (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "this is a private key"),
    "no text": (b"\xff\xfe\x00", "not"),
    "empty": (b"\n", "no key in it"),
    "nonsense": (b"hello\n", "no SSH public key"),
}


@pytest.mark.parametrize("case", BAD_KEY_FILES)
def test_add_with_a_bad_key_makes_nothing(case: str, site: Site) -> None:
    content, message = BAD_KEY_FILES[case]
    file = site.top / "key.pub"
    if content is not None:
        file.write_bytes(content)
    ran = site.run("add", "a", "--key", str(file))
    assert ran.code == 1
    assert len(ran.errors) == 1 and ran.errors[0].startswith(f"bento: error: {file}")
    assert message in ran.errors[0]
    assert list((site.fleet / "hosts").iterdir()) == []


def test_add_takes_what_a_key_file_may_have(site: Site) -> None:
    file = site.top / "key.pub"
    file.write_text(f"# of the laptop\n\n{key('a')}\n")
    assert site.run("add", "a", "--key", str(file)).code == 0
    assert (site.fleet / "hosts/a.pub").read_text() == f"{key('a')}\n"


def test_add_over_a_dangling_link(site: Site) -> None:
    (site.fleet / "hosts/a").symlink_to("gone")
    assert site.run("add", "a").err == "bento: error: hosts/a is there already\n"
    # What was asked for besides the key would not have been done.
    for words in (["--flake"], ["--link", str(site.top)]):
        ran = site.run("add", "a", "--key", str(write_key(site)), *words)
        assert (ran.code, ran.err) == (1, "bento: error: hosts/a is there already: give --key alone\n")
    assert os.listdir(site.fleet / "hosts") == ["a"]
