"""Checks and builds on the server."""

import os
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fleet import (
    AS_ANYBODY,
    CONFIGURATION,
    LARGE,
    REPO,
    Site,
    build_as_the_host,
    check_chroot,
    check_parts,
    check_tidy,
    last_data,
    snapshot,
    toy_host,
    write_program,
)
from toynixos import need, write_config

import bento
import bento_client as client


@pytest.mark.parametrize("action", ["--check", "--build"])
def test_only_hosts_that_pass_are_published(action: str, site: Site, toys: Path) -> None:
    for name in ("good", "channels"):
        toy_host(site, name, flake=name == "good")
    toy_host(site, "evaluation", build="eval-error")
    toy_host(site, "compiler", build="fail")
    ran = site.run("populate", action)
    log = f"all of it is in {site.top}/state/bento/"
    evaluation = [
        f"bento: error: evaluation: nixos-rebuild {'build' if action == '--build' else 'dry-build'}: exit 1;"
        f" {log}evaluation.log, which ends:",
        "  building the system configuration...",
        "  error: The option `services.toy' does not exist.",
    ]
    assert ran.code == 1
    if action == "--check":
        assert ran.errors == evaluation
        assert site.current("good").system is None
        check_chroot(site.chroots / "compiler")
        return
    assert ran.errors[-3:] == evaluation
    assert ran.errors[0] == (
        f"bento: error: compiler: nixos-rebuild build: exit 1; {log}compiler.log, which ends:"
    )
    assert "  toy.c:7:1: error: expected ';' before '}' token" in ran.errors
    assert "make: *** [Makefile:3: toy.o] Error 1" in (site.top / "state/bento/compiler.log").read_text()
    for name in ("good", "channels"):
        check_chroot(site.chroots / name)
        check_tidy(site.chroots / name, {site.current(name).release})
        assert site.current(name).system == build_as_the_host(site, name, site.top / f"work-{name}")
    for name in ("evaluation", "compiler"):
        assert not (site.chroots / name / "current.json").exists()
        assert list((site.chroots / name / "releases").iterdir()) == []


def test_a_host_that_fails_its_check_keeps_its_release(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    site.publish("--build")
    before = snapshot(site.chroots / "a/releases" / site.current().release), site.current()
    toy_host(site, "a", build="fail")
    assert site.run("populate", "--build").code == 1
    assert (snapshot(site.chroots / "a/releases" / site.current().release), site.current()) == before
    check_tidy(site.chroots / "a", {site.current().release})


def test_what_is_published_already_is_built_once(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    site.publish()
    before = site.current()
    assert before.system is None
    site.publish("--build")
    assert site.current() == before._replace(system=site.current().system)
    assert str(site.current().system).startswith(f"{toys}/")
    check_tidy(site.chroots / "a", {before.release})
    snap = snapshot(site.chroots / "a")
    site.publish("--build")
    assert snapshot(site.chroots / "a") == snap


@pytest.fixture
def labelled(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Where a system depends on a file, `label`, alone."""
    write_program(site.top / "bin/nixos-rebuild", f'ln -sfn "{site.top}/system-$(cat config/label)" result\n')
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(bento, "log_directory", lambda: site.top / "log")
    return site


def test_a_release_that_builds_the_same_system_is_no_new_one(labelled: Site) -> None:
    """With --build; and then it is known, until something else is built or published."""
    site = labelled
    site.host("a", CONFIGURATION | {"label": "1", "README": "a typo\n"})
    site.publish("--build")
    before, log = site.current(), site.top / "log/a.log"
    site.host("a", {"README": "no typo\n"})
    ran = site.run("-v", "populate", "--build")
    assert f"a: unchanged, {before.release[:12]}\n" in ran.out and "1 unchanged" in ran.out
    assert site.current() == before
    check_tidy(site.chroots / "a", {before.release})
    log.unlink()
    for words in (["--build"], [], ["a"]):
        assert "1 unchanged" in site.publish(*words).out and site.current() == before and not log.exists()
    site.host("a", {"label": "2"})
    site.publish("--build")
    assert site.current().system == f"{site.top}/system-2" and site.current().release != before.release
    site.host("a", {"README": "more\n"})
    site.publish()
    assert site.current().release != before.release and site.current().system is None


def test_a_host_of_a_wave_that_builds_the_same_system(labelled: Site) -> None:
    """It has run it, so others do not wait for it."""
    site = labelled
    (site.fleet / "hosts/waves").write_text("a\nb\n")
    for name in "ab":
        site.host(name, CONFIGURATION | {"label": "1", "README": "a typo\n"})
    site.publish("--build")
    before = {name: site.current(name) for name in "ab"}
    for name, current in before.items():
        site.write_report(name, release=current.release, system=current.system, last=last_data(current.release, system=current.system))
    site.publish("--build")
    site.host("a", {"README": "no typo\n"})
    site.host("b", {"label": "2"})
    assert "1 host: held: wait for a (pending)" in site.publish("--build").out  # it was not built before that
    assert "held" not in site.publish("--build").out
    assert (site.current("a"), site.current("b").system) == (before["a"], f"{site.top}/system-2")


def test_what_is_only_built_is_not_cut_into_parts(site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nixos-rebuild gets the release in a place that has nothing else."""
    (toy_host(site, "a") / "big").write_bytes(os.urandom(LARGE))
    built: list[list[str]] = []
    rebuild = bento.rebuild

    def watch(action: str, tree: Path, *arguments: Any) -> str | None:
        built.append(os.listdir(tree.parent))
        return rebuild(action, tree, *arguments)

    monkeypatch.setattr(bento, "rebuild", watch)
    site.publish("--build")
    assert check_parts(site)[1] == LARGE
    (site.fleet / "hosts/a/big").write_bytes(os.urandom(LARGE))
    before = site.current()
    assert site.run("check").code == site.run("build").code == 0
    site.publish("--check")
    assert site.current() != before and check_parts(site)[1] == LARGE
    assert built == [["config"]] * 4


@pytest.mark.parametrize("flake", [True, False])
def test_with_nix_the_server_builds_what_the_host_builds(
    flake: bool, real_nix: None, site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_MODE", "nix")
    directory = write_config(site.fleet / "hosts/a", flake=flake, host="a")
    if not flake:
        # The directory's own name gets into the system.
        (directory / "configuration.nix").write_text(
            """{ config.system.build.toplevel = derivation { name = "toy"; system = builtins.currentSystem;
            builder = "/bin/sh"; args = [ "-c" "echo ${./.} > $out" ]; }; }\n"""
        )
    site.publish("--build")
    system = site.current().system
    assert system is not None and system.startswith("/nix/store/") and os.path.exists(system)
    if not flake:
        assert Path(system).read_text().strip().endswith("-config")
    assert build_as_the_host(site, "a", site.top / "work") == system
    ran = site.run("build")
    assert re.fullmatch(rf"a: {site.current().release[:12]} {re.escape(system)} \([0-9]+s\)\n", ran.out)


def test_check_and_build(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    toy_host(site, "bad", build="eval-error")
    (site.host("refused") / "x").symlink_to("x")
    ran = site.run("check", "-j", "3")
    assert ran.code == 1
    fleet = bento.Fleet(site.fleet, site.chroots)
    with closing(fleet.source):
        release, _ = bento.write_release(fleet.source, bento.list_members(fleet, "a")[0])
    assert re.fullmatch(rf"a: {release[:12]} evaluates \([0-9]+s\)\n", ran.out)
    assert "bento: error: refused: hosts/refused/x: link loop" in ran.errors
    assert any(line.startswith("bento: error: bad: nixos-rebuild dry-build: exit 1; ") for line in ran.errors)
    assert not site.chroots.exists()
    assert not toys.exists() or not list(toys.glob("*-nixos-system-*"))

    ran = site.run("build", "a")
    assert ran.code == 0
    assert re.fullmatch(rf"a: {release[:12]} {toys}/[0-9a-z]{{32}}-nixos-system-a-v1 \([0-9]+s\)\n", ran.out)
    assert not site.chroots.exists()


def test_build_notes_the_system_of_what_is_published(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    site.publish()
    assert site.run("build").code == 0
    system = site.current().system
    assert system is not None and system.startswith(f"{toys}/")
    toy_host(site, "a", label="v2")
    assert site.run("build").code == 0
    assert site.current().system == system  # of the release that is published, not of this one
    check_tidy(site.chroots / "a", {site.current().release})


def test_build_notes_no_other_system_than_the_signed_one(site: Site, toys: Path) -> None:
    """It would stand in current.json beside a signature of another, and no populate would pass any more."""
    toy_host(site, "a")
    release, _ = bento.read_release(bento.Fleet(site.fleet, site.chroots), "a")
    leaf = client.format_leaf(client.Leaf("a", release.id, release.size, "/nix/store/signed", None))
    text = client.format_signed(client.Signed("f" * 32, 1, "2040-01-01T00:00:00Z", bento.Tree([leaf]).root))
    (site.fleet / "hosts/signed").write_text(f"{text}{client.ARMOR}{bento.ARMOR_END}{leaf}\n")
    site.publish()
    before = site.current()
    assert before.system == "/nix/store/signed"
    site.run("build")
    assert site.current() == before
    site.publish()


def test_build_leaves_current_json_alone_while_populate_is_at_work(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    site.publish()
    with bento.populate_lock(bento.Fleet(site.fleet, site.chroots)):
        (site.chroots / "a/.current.json.new").write_text("populate's")
        done = subprocess.Popen([sys.executable, "-c", AS_ANYBODY, *site.argv("build")], env=os.environ | {"PYTHONPATH": str(REPO)})
        time.sleep(1.5)
        assert site.current().system is None
        assert (site.chroots / "a/.current.json.new").read_text() == "populate's"
    assert done.wait(20) == 0
    assert site.current().system is not None


def test_without_nixos_rebuild(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("a")
    (site.top / "bin").mkdir()
    for name in ("git", "find"):
        (site.top / "bin" / name).symlink_to(need(name))
    monkeypatch.setenv("PATH", str(site.top / "bin"))
    ran = site.run("populate", "--check")
    assert ran.code == 1
    assert "nixos-rebuild: No such file or directory" in ran.err
    ran = site.run("check", "a")
    assert ran.code == 1
    assert "nixos-rebuild: No such file or directory" in ran.err


def test_a_check_that_takes_too_long(site: Site, toys: Path) -> None:
    toy_host(site, "a", build="hang")
    ran = site.run("build", "--timeout", "1")
    assert ran.code == 1
    assert (
        f"bento: error: a: nixos-rebuild build: did not end within 1 s; all of it is in {site.top}/state/bento/a.log,"
        " which ends:"
    ) in ran.errors


def test_one_line_for_the_same_error(site: Site, toys: Path) -> None:
    write_config(site.fleet / "all", flake=True, host={f"h{n}": {} for n in range(7)}, build="eval-error")
    for number in range(7):
        (site.fleet / "hosts" / f"h{number}").symlink_to("../all")
    toy_host(site, "own", build="eval-error")
    ran = site.run("populate", "--check")
    assert ran.out == "8 hosts: 0 published, 0 unchanged, 8 failed\n"
    (error,) = [line for line in ran.errors if line.startswith("bento: error: ")]
    assert error.startswith("bento: error: 8 hosts (h0, h1, h2, h3, h4, …): nixos-rebuild dry-build: exit 1;")
    for name in ("x", "y"):  # other places to look at
        site.host(name, {"x.nix": ""})
    assert site.run("populate", "x", "y").errors == [
        f"bento: error: {name}: hosts/{name}: neither flake.nix nor configuration.nix in it" for name in "xy"
    ]


@pytest.mark.parametrize("how", ["--check", "--build"])
def test_what_has_passed_does_not_wait_for_the_others(
    how: str, site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "c"]
    for name in names:
        write_config(site.fleet / "hosts" / name, flake=True, host=name)
    rebuild, published = bento.rebuild, []

    def watch(*arguments: Any) -> str | None:
        published.append([name for name in names if (site.chroots / name / "current.json").exists()])
        return rebuild(*arguments)

    monkeypatch.setattr(bento, "rebuild", watch)
    site.publish(how)
    assert published == [[], ["a"], ["a", "b"]]


def test_an_end_by_signal_ends_the_build_too(site: Site, toys: Path) -> None:
    """It has a session of its own, and would go on without the lock."""
    write_config(site.fleet / "hosts/a", flake=True, host="a", build="hang", build_touch=str(site.top / "begun"))
    argv = [sys.executable, "-c", AS_ANYBODY, *site.argv("populate", "--build")]
    process = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(REPO)}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (site.top / "begun").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted; nothing partial is published" in said
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in children)
