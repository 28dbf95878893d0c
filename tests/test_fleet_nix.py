"""The hosts' keys, and the fleet.nix that is made of them."""

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fleet import Site, check_chroot, key, snapshot
from toynixos import need

import bento_client as client

# --- keys ---

NO_KEY = "no SSH public key ('ssh-ed25519 AAAA… comment', without options): "
BAD_KEYS = {
    "private": (
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbg\n",
        "1: this is a private key: delete it, make a new one, and give only the .pub here",
    ),
    "options": (f"restrict {key('bad')}\n", f"1: {NO_KEY}{client.one_line('restrict ' + key('bad'), 40)}"),
    "one word": ("hello\n", f"1: {NO_KEY}hello"),
    "no base64": ("ssh-ed25519 AAAA!\n", "1: malformed SSH public key: its second word is no base64"),
    "cut short": (f"# fine\n{key('bad')[:-8]}\n", "2: malformed SSH public key: it is cut short"),
    # Whose last character has bits that base64 does not use.
    "stray bits": ("ssh-rsa AAAAB3NzaC1yc2EAAAABAx==\n", "1: malformed SSH public key: its second word is no base64"),
    "another type": (key("bad").replace("ssh-ed25519", "ssh-rsa"), "1: malformed SSH public key: it is no ssh-rsa key"),
    "empty": ("\n# only a comment\n", " no key in it: put the output of 'bento-client key' there"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_KEYS)
def test_a_bad_key(case: str, site: Site) -> None:
    content, message = BAD_KEYS[case]
    site.host("bad")
    site.host("good")
    (site.fleet / "hosts/bad.pub").write_text(content)
    (site.fleet / "hosts/good.pub").write_text(key("good") + "\n")
    expected = f"bento: error: hosts/bad.pub:{message}"
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (1, [expected])
    assert ran.out.splitlines()[-1] == "2 hosts: 1 published, 0 unchanged, 1 failed"
    assert not (site.chroots / "bad").exists()
    check_chroot(site.chroots / "good")

    (site.fleet / "fleet.nix").write_text("as it was")
    ran = site.run("fleet")
    assert (ran.code, ran.errors) == (1, [expected, "bento: error: fleet.nix is left as it was"])
    assert (site.fleet / "fleet.nix").read_text() == "as it was"


def test_a_key_file_that_cannot_be_read(site: Site) -> None:
    for name in "ab":
        site.host(name)
    (site.fleet / "hosts/a.pub").symlink_to("gone")
    (site.fleet / "hosts/b.pub").write_bytes(b"\xff\xfe")
    ran = site.run("fleet")
    assert ran.code == 1
    assert [line.split(": ")[2:4] for line in ran.errors] == [
        ["hosts/a.pub", "cannot be read"], ["hosts/b.pub", "cannot be read"], ["fleet.nix is left as it was"],
    ]  # fmt: skip
    assert not (site.fleet / "fleet.nix").exists()


def test_a_key_goes_with_its_host(site: Site) -> None:
    """`rm -r hosts/NAME` ends what its key can do, whatever is in hosts/NAME.pub."""
    site.host("a")
    (site.fleet / "hosts/a.pub").write_text(key("a"))
    (site.fleet / "hosts/gone.pub").write_text(key("a"))
    (site.fleet / "hosts/no host.pub").write_text("no key")
    ran = site.run("fleet")
    assert (ran.code, ran.errors) == (0, [
        "bento: warning: hosts/gone.pub: left out, there is no hosts/gone",
        "bento: warning: hosts/no host.pub: left out, there is no hosts/no host",
    ])  # fmt: skip
    assert "fleet.nix: written, 1 host;" in ran.out and "gone = " not in (site.fleet / "fleet.nix").read_text()
    site.publish()


def test_a_renamed_host_may_keep_its_key(site: Site) -> None:
    site.host("new")
    (site.fleet / "hosts/old").symlink_to("new")
    for name in ("new", "old"):
        (site.fleet / f"hosts/{name}.pub").write_text(key("a"))
    assert "written, 2 hosts" in site.run("fleet").out
    site.publish()
    # Two hosts that share a tree are two hosts.
    (site.fleet / "hosts/old").unlink()
    (site.fleet / "hosts/old").symlink_to(site.fleet / "hosts/new")
    assert "the same key" in site.run("fleet").err


def rename(site: Site, old: str, new: str) -> None:
    """As README does it. A link that leads to the old name stays."""
    hosts = site.fleet / "hosts"
    if (hosts / new).is_symlink():  # back to a name that was kept
        (hosts / new).unlink()
    (hosts / old).rename(hosts / new)
    (hosts / old).symlink_to(new)
    (hosts / f"{new}.pub").write_text((hosts / f"{old}.pub").read_text())


@pytest.mark.parametrize("names", ["a b c", "c b a", "b a c", "a b a", "a b c d"])
def test_a_host_is_renamed_again(site: Site, names: str) -> None:
    """Before the first of its old names is removed."""
    first, *others = names.split()
    site.host(first)
    (site.fleet / f"hosts/{first}.pub").write_text(key("x"))
    site.publish()
    for old, new in itertools.pairwise((first, *others)):
        rename(site, old, new)
        assert (site.run("fleet").code, site.run("fleet").errors) == (0, [])
        site.publish()
    assert len({site.current(name).release for name in names.split()}) == 1


def test_two_old_names_lead_to_the_new_one(site: Site) -> None:
    site.host("c")
    for name in ("a", "b"):
        (site.fleet / "hosts" / name).symlink_to("c")
        (site.fleet / f"hosts/{name}.pub").write_text(key("x"))
    # Without its key at the new name they are two machines, one a copy of the other.
    assert "hosts/a.pub and hosts/b.pub have the same key" in site.run("fleet").err
    (site.fleet / "hosts/c.pub").write_text(key("x"))
    assert (site.run("fleet").code, site.run("fleet").errors) == (0, [])
    site.publish()


def test_names_that_lead_in_a_circle_are_no_host(site: Site) -> None:
    for name, target in (("a", "b"), ("b", "a"), ("c", "../hosts/a")):
        (site.fleet / "hosts" / name).symlink_to(target)
        (site.fleet / f"hosts/{name}.pub").write_text(key("x"))
    assert "hosts/a.pub and hosts/c.pub have the same key" in site.run("fleet").err


def test_two_hosts_with_one_key(site: Site) -> None:
    for name in ("a", "b", "c"):
        site.host(name)
        (site.fleet / f"hosts/{name}.pub").write_text(f"{key(name)}\n")
    (site.fleet / "hosts/b.pub").write_text(f"{key('b')}\n{key('a', 'another comment')}\n")
    message = "bento: error: hosts/a.pub and hosts/b.pub have the same key: each host needs its own"
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (1, [message])
    assert ran.out.splitlines()[-1] == "3 hosts: 1 published, 0 unchanged, 2 failed"
    assert set(os.listdir(site.chroots)) == {".lock", ".rollout.json", ".store", "c"}
    ran = site.run("fleet")
    assert (ran.code, ran.errors) == (1, [message, "bento: error: fleet.nix is left as it was"])


# --- fleet.nix ---

TEMPLATE = """\
# @GENERATED@
{
  chrootDir = "@CHROOT_DIR@";
  hosts = {
    @HOSTS@
  };
}
"""


def test_fleet_nix(site: Site) -> None:
    (site.fleet / "fleet.nix.in").write_text(TEMPLATE)
    (site.fleet / "hosts/t470.pub").write_text(f"# the laptop\n\n{key('t470', 'root@t470')}\n{key('spare')}\n")
    (site.fleet / "hosts/nas.pub").write_text(f"  {key('nas', 'a  b')}  \n")
    for name in ("no-key-yet", "t470", "nas"):
        site.host(name)
    ran = site.run("fleet")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "fleet.nix: written, 2 hosts; include it in this server's configuration and switch\n"
    text = (site.fleet / "fleet.nix").read_text()
    assert text == f"""\
# Written by 'bento.py fleet' from fleet.nix.in and hosts/*.pub: edit those, not this file.
{{
  chrootDir = "{site.chroots}";
  hosts = {{
    "nas" = [
      "{key("nas", "a  b")}"
    ];
    "t470" = [
      "{key("t470", "root@t470")}"
      "{key("spare")}"
    ];
  }};
}}
"""
    before = snapshot(site.fleet)
    assert site.run("fleet").out == "fleet.nix: unchanged, 2 hosts\n"
    assert snapshot(site.fleet) == before


def test_a_name_that_is_too_long_for_nixos(site: Site) -> None:
    """Its account names end at 31 characters."""
    for name in ("h" * 25, "i" * 26):
        site.host(name)
        (site.fleet / f"hosts/{name}.pub").write_text(f"{key(name)}\n")
    assert "fleet.nix: written, 1 host;" in site.run("fleet").out
    assert [line.split(": ")[2] for line in site.run("populate").errors] == [f"hosts/{'i' * 26}"]


METACHARACTERS = [
    "''", "${builtins.abort \"x\"}", "$${x}", "\\${x}", '"', '" ]; evil = "', "\\", "\\\\", "\\n", "a\\", "$", "${", "é 日本",
    "'' ${ \" \\ ''${ ''\\", "</script>", "@HOSTS@", "@CHROOT_DIR@", "# comment", "*/", "a=b; c",
]  # fmt: skip


def test_nothing_in_a_comment_is_nix(site: Site) -> None:
    nix = need("nix-instantiate")
    (site.fleet / "fleet.nix.in").write_text(TEMPLATE)
    for number, comment in enumerate(METACHARACTERS):
        site.host(f"h{number}")
        (site.fleet / f"hosts/h{number}.pub").write_text(key(f"h{number}", comment) + "\n")
    site.chroots = site.top / "with '' ${x} \" \\ in it"
    assert site.run("fleet").code == 0
    argv: list[str | Path] = [nix, "--eval", "--strict", "--json", site.fleet / "fleet.nix"]
    environment = os.environ | {"NIX_CONFIG": "substitute = false"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hosts"] == {f"h{n}": [key(f"h{n}", comment)] for n, comment in enumerate(METACHARACTERS)}
    assert found["chrootDir"] == str(site.chroots)


def test_control_characters_in_a_comment_are_dropped(site: Site) -> None:
    (site.fleet / "fleet.nix.in").write_text(TEMPLATE)
    site.host("a")
    (site.fleet / "hosts/a.pub").write_text(key("a", "x\x1b[31m\x00\u202ey\tz") + "\n")
    assert site.run("fleet").code == 0
    assert f'"{key("a", "x[31myz")}"' in (site.fleet / "fleet.nix").read_text()


def test_the_real_template_is_nix(site: Site) -> None:
    nix = need("nix-instantiate")
    (site.fleet / "hosts/a.pub").write_text(key("a", "''${x}") + "\n")
    assert site.run("fleet").code == 0
    environment = os.environ | {"NIX_CONFIG": "substitute = false"}
    done = subprocess.run([nix, "--parse", site.fleet / "fleet.nix"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "@" not in re.sub(r"sk-ssh\S*", "", (site.fleet / "fleet.nix").read_text().split("hosts = ")[0])


def test_no_hosts_are_not_all_hosts(site: Site) -> None:
    """A directory that is not mounted must not lock the whole fleet out."""
    shutil.rmtree(site.fleet / "hosts")
    ran = site.run("fleet")
    assert (ran.code, len(ran.errors)) == (1, 1) and "hosts: No such file or directory" in ran.errors[0]
    assert not (site.fleet / "fleet.nix").exists()


def test_an_editors_leftovers_are_no_keys(site: Site) -> None:
    site.host("a")
    (site.fleet / "hosts/a.pub").write_text(f"{key('a')}\n")
    (site.fleet / "hosts/.#a.pub").symlink_to("somebody@somewhere.1234")
    (site.fleet / "hosts/._b.pub").write_bytes(b"\0\5\x16\7")
    site.publish()
    assert site.run("fleet").out.startswith("fleet.nix: written, 1 host;")
