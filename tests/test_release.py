"""What a release is made of: its name, its format, its files, the links in a host's directory."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from fleet import (
    AS_ANYBODY,
    CONFIGURATION,
    NOT_ROOT,
    REPO,
    Site,
    check_chroot,
    commit,
    key,
    run_outside,
    sha256sum,
    share,
)
from toynixos import _missing, latin_1, need


def test_a_release_is_named_by_its_sha256(site: Site) -> None:
    site.host("a", {"configuration.nix": "{ }\n", "files/x": b"\0" * 70_000})
    ran = site.publish()
    current = site.current()
    assert sha256sum(site.tar()) == current.release
    assert site.tar().stat().st_size == current.size
    assert ran.out == (
        f"a: published {current.release[:12]} ({current.size} bytes)\n1 host: 1 published, 0 unchanged, 0 failed\n"
    )
    assert ran.err == f"{NOT_ROOT}\n{site.fleet}: no Git here: what lies there is published, 2 files\n"
    assert (site.tree() / "files/x").read_bytes() == b"\0" * 70_000
    shown = site.run("show", "a")
    assert (shown.code, shown.out, shown.err) == (0, "configuration.nix\nfiles/\nfiles/x\n", "")
    target = site.top / "shown"
    assert site.run("show", "a", str(target)).out == f"a: {current.release[:12]} is in {target}\n"
    assert (target / "files/x").read_bytes() == b"\0" * 70_000
    refused = site.run("show", "a", str(target))
    assert (refused.code, refused.err) == (1, f"bento: error: {target}: it is there already: name a new directory\n")


def test_the_format_of_a_release_does_not_drift(site: Site) -> None:
    """Every host would take another id for a new release. If this is wanted, it is a new format."""
    directory = site.host("a", {"flake.nix": "{ }\n", "d/é": "x", "n" * 200: "long\n", "empty": ""})
    (directory / "d/run").write_text("#!/bin/sh\n")
    (directory / "d/run").chmod(0o700)
    site.publish()
    assert site.current().release == "852d82dc6e29395ed4c8e7e115d855e4f36cef83f304053d50ab19865ac85827"


def rebuild_elsewhere(top: Path, environment: dict[str, str], umask: int, python: str = sys.executable) -> str:
    """A checkout of the same fleet at `top`, published by a process of its own; the id of its release."""
    before = os.umask(umask)
    try:
        hosts = top / "fleet/hosts"
        (hosts / "a/sub").mkdir(parents=True)
        (hosts / "a/configuration.nix").write_text("{ }\n")
        (hosts / "a/sub/script").write_text("#!/bin/sh\n")
        (hosts / "a/sub/script").chmod(0o777 & ~umask)
        (top / "fleet/utils").mkdir()
        (top / "fleet/utils/bento.nix").write_text("{ }\n")
        (hosts / "a/utils").symlink_to("../../utils")
        argv = [python, "-c", AS_ANYBODY, "--fleet", f"{top}/fleet", "--chroot-dir", f"{top}/chroot", "populate"]
        subprocess.run(
            argv, check=True, env=os.environ | {"PYTHONPATH": str(REPO)} | environment, capture_output=True, cwd=top
        )
    finally:
        os.umask(before)
    release: str = json.loads((top / "chroot/a/current.json").read_bytes())["release"]
    return release


def test_the_same_content_is_the_same_release_everywhere(tmp_path: Path) -> None:
    places: list[tuple[str, dict[str, str], int]] = [
        ("one", {}, 0o022),
        ("another/place with spaces", {}, 0o022),
        ("three", {"TZ": "Asia/Tokyo", "LC_ALL": "C"}, 0o077),
        ("four", {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"}, 0o000),
    ]
    ids = set()
    for place, environment, umask in places:
        top = tmp_path / place
        top.mkdir(parents=True)
        ids.add(rebuild_elsewhere(top, environment, umask))
    if os.access("/usr/bin/python3", os.X_OK):
        (tmp_path / "five").mkdir()
        ids.add(rebuild_elsewhere(tmp_path / "five", {}, 0o022, "/usr/bin/python3"))
    assert len(ids) == 1


def test_another_clock_makes_no_other_release(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = site.host("a")
    site.publish()
    first = site.current()
    shutil.rmtree(site.chroots)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    os.utime(directory / "configuration.nix", (1e9, 1e9))
    site.publish()
    assert site.current().release == first.release
    assert site.current().published == "2001-09-09T01:46:40Z"


def test_only_content_names_and_executable_bits_count(site: Site) -> None:
    directory = site.host("a", {"configuration.nix": "{ }\n", "script": "#!/bin/sh\n"})
    site.publish()
    seen = [site.current().release]

    def publish() -> bool:
        site.publish()
        release = site.current().release
        new = release not in seen
        seen.append(release)
        return new

    os.utime(directory / "script")
    assert not publish()
    (directory / "script").chmod(0o600)
    assert not publish()
    (directory / "script").chmod(0o700)
    assert publish()
    (directory / "script").chmod(0o755)
    assert not publish()
    (directory / "script").write_text("#!/bin/sH\n")
    assert publish()
    (directory / "script").rename(directory / "script2")
    assert publish()
    (directory / "empty").mkdir()
    assert not publish()


STRANGE = [
    "with space", "-rf", "*", "[a]?", "it's \"quoted\"", "new\nline", "back\\slash", "ä ö ü ß 日本 🍱", "#comment", "$HOME",
    "n" * 101, "n" * 255, "/".join(["deep" * 20] * 5) + "/file", "é" * 127,
]  # fmt: skip


def test_gnu_tar_and_tarfile_read_every_name(site: Site, tmp_path: Path) -> None:
    contents = {name: f"content of {name}\n" for name in STRANGE}
    directory = site.host("a", {**CONFIGURATION, **contents, "empty file": ""})
    site.publish()
    with tarfile.open(site.tar()) as archive:
        names = archive.getnames()
        assert names == sorted(names, key=os.fsencode)
        for member in archive:
            assert member.mtime == 1
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            assert member.mode == (0o755 if member.isdir() else 0o644)
    target = tmp_path / "unpacked"
    target.mkdir()
    subprocess.run([need("tar"), "-xf", site.tar(), "-C", target], check=True)
    for place in (target, site.tree()):
        for name, content in contents.items():
            assert (place / name).read_text() == content
        assert (place / "empty file").read_bytes() == b""
        assert {p.relative_to(place) for p in place.rglob("*")} == {p.relative_to(directory) for p in directory.rglob("*")}


def test_links_become_what_they_lead_to(site: Site) -> None:
    directory = site.host("a", CONFIGURATION | {"real/file": "x\n"})
    (site.fleet / "utils").mkdir()
    (site.fleet / "utils/bento.nix").write_text("{ }\n")
    (site.fleet / "bento_client.py").write_text("client\n")
    (site.fleet / "utils/bento_client.py").symlink_to("../bento_client.py")
    (directory / "utils").symlink_to("../../utils")
    (directory / "again").symlink_to("real")
    (directory / "absolute").symlink_to(directory / "real/file")
    site.publish()
    with tarfile.open(site.tar()) as archive:
        assert {m.name: m.isdir() for m in archive} == {
            "absolute": False, "again": True, "again/file": False, "configuration.nix": False, "real": True,
            "real/file": False, "utils": True, "utils/bento.nix": False, "utils/bento_client.py": False,
        }  # fmt: skip
        assert archive.extractfile("utils/bento_client.py").read() == b"client\n"  # type: ignore[union-attr]


def test_git_and_store_links_are_left_out(site: Site) -> None:
    directory = site.host("a", CONFIGURATION | {"sub/.gitignore": "x\n"})
    (site.host("b") / "clone").mkdir()
    commit(directory / "sub")
    (directory / "result").symlink_to("/nix/store/00000000000000000000000000000000-gone")
    (directory / "result-2").symlink_to("result")
    if Path("/nix/store").is_dir():
        (directory / "result-3").symlink_to(next(Path("/nix/store").iterdir(), Path("/nix/store/x")))
    site.publish()
    with tarfile.open(site.tar()) as archive:
        assert archive.getnames() == ["configuration.nix", "sub", "sub/.gitignore"]
    (site.fleet / "hosts/b/clone/.git").write_text("gitdir: x\n")
    assert site.run("populate").errors == [
        f"bento: error: 2 hosts (a, b): {site.fleet}/hosts/b/clone/.git: Git cannot use it, so nothing around it is published"
    ]


def test_a_configuration_that_would_be_left_out_is_none(site: Site, tmp_path: Path) -> None:
    directory = site.host("a", {"other.nix": "{ }\n"})
    (directory / "flake.nix").mkdir()
    (tmp_path / "file").touch()
    added = subprocess.run([need("nix-store"), "--add", tmp_path / "file"], capture_output=True, text=True)
    in_store = added.stdout.strip() or _missing("needs a Nix store that it can write to")
    (directory / "configuration.nix").symlink_to(in_store)
    ran = site.run("populate")
    assert ran.errors == ["bento: error: a: hosts/a: neither flake.nix nor configuration.nix in it"]


def test_the_hosts_own_link_may_leave_the_fleet(site: Site, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere/nixos"
    outside.mkdir(parents=True)
    (outside / "configuration.nix").write_text("{ }\n")
    (outside / "inner").symlink_to("configuration.nix")
    (site.fleet / "utils").mkdir()
    (site.fleet / "utils/bento.nix").write_text("{ }\n")
    (outside / "utils").symlink_to(site.fleet / "utils")
    (site.fleet / "hosts/a").symlink_to(outside)
    (site.fleet / "hosts/b").symlink_to("a")
    site.publish()
    with tarfile.open(site.tar()) as archive:
        assert archive.getnames() == ["configuration.nix", "inner", "utils", "utils/bento.nix"]
    assert site.current("b").release == site.current("a").release
    (outside / "passwd").symlink_to("/etc/passwd")
    ran = site.run("populate", "a")
    assert ran.errors == ["bento: error: a: hosts/a/passwd: link out of the fleet directory, to /etc/passwd"]


def test_a_locale_changes_no_release(site: Site, tmp_path: Path) -> None:
    env = latin_1(tmp_path)
    site.host("a", CONFIGURATION | {"ü.nix": "x"})
    site.publish()
    release = site.current().release
    shutil.rmtree(site.chroots)
    assert run_outside(site, "populate", **env).returncode == 0
    assert check_chroot(site.chroots / "a") == release
    (site.fleet / "hosts/a.pub").write_text(f"{key('a')}\n")
    assert run_outside(site, "fleet", **env).returncode == 0
    written = (site.fleet / "fleet.nix").read_bytes()
    assert site.run("fleet").code == 0 and (site.fleet / "fleet.nix").read_bytes() == written


def test_a_fleet_in_the_nix_store_keeps_its_own_links(site: Site) -> None:
    """What leads elsewhere in the store is left out, like a forgotten `result`."""
    need("nix")
    try:
        os.makedirs("/nix/store", exist_ok=True)
        top = Path(tempfile.mkdtemp(prefix="bento-test-", dir="/nix/store"))
    except OSError:
        _missing("needs a Nix store that it can write to")
    try:
        shutil.copytree(site.fleet, top / "fleet")
        site.fleet = top / "fleet"
        site.host("a")
        share(site, "b")
        (site.fleet / "hosts/b/result").symlink_to("/nix/store")
        (site.fleet / "hosts/b/other").symlink_to("/nix/store/.links")
        assert "link out of the fleet directory" in site.run("populate").errors[0]  # the store itself is no path in it
        (site.fleet / "hosts/b/result").unlink()
        site.publish()
        assert set(os.listdir(site.tree("b"))) == {"configuration.nix", "utils"}
    finally:
        shutil.rmtree(top)
