"""What `populate --prune` removes: chroots, and old logs."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from fleet import NOT_ROOT, Site, check_chroot, snapshot

import bento
import bento_client as client


def test_prune(site: Site) -> None:
    for name in ("a", "gone", "gone-2"):
        site.host(name)
    site.publish()
    (site.chroots / "gone/logs/log").write_text("x")
    (site.chroots / "gone/logs/link").symlink_to(site.fleet)
    (site.chroots / "not ours").mkdir()
    (site.chroots / "no-releases").mkdir()
    (site.chroots / "link").symlink_to(site.chroots / "a")
    for name in ("gone", "gone-2"):
        shutil.rmtree(site.fleet / "hosts" / name)
    site.publish()
    assert (site.chroots / "gone/current.json").exists()
    ran = site.publish("--prune")
    assert ran.out == (
        f"gone: removed {site.chroots}/gone\ngone-2: removed {site.chroots}/gone-2\n"
        "1 host: 0 published, 1 unchanged, 0 failed\n"
    )
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a", "link", "no-releases", "not ours"}
    assert (site.fleet / "hosts/a").is_dir()

    # A host that is refused, or whose link dangles, is not gone.
    site.host("b")
    site.publish()
    shutil.rmtree(site.fleet / "hosts/b")
    (site.fleet / "hosts/b").symlink_to("elsewhere")
    assert site.run("populate", "--prune").code == 1
    check_chroot(site.chroots / "b")


def test_prune_refuses_what_nobody_means(site: Site) -> None:
    site.host("a")
    site.publish()
    ran = site.run("populate", "--prune", "a")
    assert (ran.code, ran.errors) == (
        2, ["bento: error: --prune goes with the whole fleet, not with single hosts"],
    )  # fmt: skip
    shutil.rmtree(site.fleet / "hosts/a")
    ran = site.run("populate", "--prune")
    assert (ran.code, ran.errors) == (
        1, [f"bento: error: {site.fleet}/hosts: no hosts in it: pruning would remove every chroot, so nothing was done"],
    )  # fmt: skip
    check_chroot(site.chroots / "a")


def test_a_chroot_that_is_something_else(site: Site) -> None:
    site.host("a")
    site.host("b")
    site.chroots.mkdir()
    (site.chroots / "a").symlink_to("/nonexistent")
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (1, [f"bento: error: a: {site.chroots}/a: not a directory: remove it"])
    check_chroot(site.chroots / "b")


def test_old_logs_are_pruned(site: Site) -> None:
    site.host("a")
    site.publish()
    logs = site.chroots / "a/logs"
    names = [f"20261123T{n // 60:02}{n % 60:02}00Z_9f3a61c07be4_ok.log" for n in range(bento.KEEP_LOGS + 30)]
    for name in [*names, "status.json", "something else"]:
        (logs / name).write_text("x")
    (logs / "20261122T000000Z_9f3a61c07be4_ok.log").mkdir()  # in the way of what follows
    site.publish()
    left = {*names[30:], "status.json", "something else", "20261122T000000Z_9f3a61c07be4_ok.log"}
    assert set(os.listdir(logs)) == left


def test_very_many_logs_are_pruned_in_several_runs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bento, "MAX_PRUNED", 300)
    site.host("a")
    site.publish()
    for number in range(1000):
        (site.chroots / f"a/logs/20261123T{number // 60:02}{number % 60:02}00Z_9f3a61c07be4_ok.log").touch()
    for _ in range(9):
        site.publish()
    assert bento.KEEP_LOGS <= len(os.listdir(site.chroots / "a/logs")) <= 300


def without_fleet(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("BENTO_DIR", str(site.fleet))
    return ["--chroot-dir", str(site.chroots), "populate", "--prune"]


def test_prune_of_another_fleet(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a copy that lies about: the owner's chroots stay, and nothing of it is published."""
    for name in ("one", "two", "three", "four"):
        site.host(name)
    site.publish()
    shutil.rmtree(site.fleet / "hosts")
    site.host("example")
    site.host("one")
    before = snapshot(site.chroots)
    words = (
        f"bento: error: --prune would remove 3 of 4 chroots in {site.chroots}, so nothing was done:"
        f" if {site.fleet} is their fleet, say so with --fleet\n"
    )
    for more in ([], ["--dry-run"]):
        assert bento.main([*without_fleet(site, monkeypatch), *more]) == 1
        assert site.capsys.readouterr().err.removeprefix(f"{NOT_ROOT}\n").endswith(words)
        after = snapshot(site.chroots)
        assert {path: after[path] for path in after if ".lock" not in path} == {
            path: before[path] for path in before if ".lock" not in path
        }
    site.host("two")
    assert bento.main(without_fleet(site, monkeypatch)) == 0  # half of them may be gone
    assert not (site.chroots / "three").exists() and not (site.chroots / "four").exists()
    shutil.rmtree(site.fleet / "hosts/two")
    shutil.rmtree(site.fleet / "hosts/one")
    assert site.publish("--prune").out.count("removed") == 2  # as it was said which fleet


def test_prune_removes_only_what_is_ours(site: Site) -> None:
    site.host("a")
    site.publish()
    release = site.current().release
    foreign = {
        "app": ("releases/20261125/index.html",), "mixed": (f"releases/{release}.tar", "releases/notes"), "empty": (),
        "more": (f"releases/{release}.tar", "photos/x.jpg"), "bare": (f"{release}.tar",),
    }  # fmt: skip
    for name, files in foreign.items():
        (site.chroots / name / "releases").mkdir(parents=True)
        for file in files:
            (site.chroots / name / file).parent.mkdir(parents=True, exist_ok=True)
            (site.chroots / name / file).write_text("x")
    shutil.copytree(site.chroots / "a", site.chroots / "gone", symlinks=True)
    assert site.publish("--prune").out.startswith(f"gone: removed {site.chroots}/gone\n1 host: ")
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a", *foreign}


@pytest.mark.parametrize("by", ["fleet", "populate --prune"])
def test_what_is_open_is_ended(by: str, real_root: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "gone"):
        site.host(name)
    site.publish()
    shutil.rmtree(site.fleet / "hosts/gone")
    uid, others = (number + os.getpid() for number in (10_000_000, 20_000_000))  # no other run's
    os.chown(site.chroots / "gone/logs", uid, -1)  # an account that the last switch has removed
    monkeypatch.setattr(bento, "GCROOTS", site.top / "roots")
    monkeypatch.setattr(bento, "find_owner", lambda *_: None)
    sleep = "import os, sys, time; os.setuid(int(sys.argv[1])); print(flush=True); time.sleep(600)"
    session, other = (
        subprocess.Popen([sys.executable, "-c", sleep, str(number)], stdout=subprocess.PIPE) for number in (uid, others)
    )
    try:
        for process in (session, other):
            assert process.stdout is not None
            process.stdout.readline()
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        site.publish("--prune", "--dry-run")
        assert session.poll() is None
        with monkeypatch.context() as patched:
            patched.setattr(pwd, "getpwuid", lambda number: types.SimpleNamespace(pw_name="somebody"))
            site.run("fleet")
        assert session.poll() is None, "the number is another account's by now"
        site.run("fleet") if by == "fleet" else site.publish("--prune")
        assert session.wait(timeout=30) == -signal.SIGKILL and other.poll() is None
    finally:
        for process in (session, other):
            process.kill()
            process.wait()


def test_a_full_disk_does_not_bar_the_pruning(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no room for even a directory, and pruning is what makes some."""
    for name in ("a", "b"):
        site.host(name)
    site.publish()
    shutil.rmtree(site.fleet / "hosts/b")
    mkdir = Path.mkdir

    def full(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if path.name == ".copies":
            raise OSError(28, "No space left on device", str(path))
        mkdir(path, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", full)
    site.publish("--prune")
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a"}
    site.host("a", {"configuration.nix": "{ } # new\n"})
    site.publish()
    check_chroot(site.chroots / "a")


def test_a_chroot_that_cannot_be_removed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host goes on writing, say. It stops neither the others nor the publication, and is removed the next time."""
    for name in ("a", "gone", "lost"):
        site.host(name)
    site.publish()
    for name in ("gone", "lost"):
        shutil.rmtree(site.fleet / "hosts" / name)
    site.host("a", {"configuration.nix": "{ } # new\n"})
    remove = client.remove

    def busy(path: Path) -> None:
        if path.parent.name == "gone" and path.name == "logs":
            raise OSError(39, "Directory not empty", "logs")
        remove(path)

    with monkeypatch.context() as patched:
        patched.setattr(client, "remove", busy)
        ran = site.run("populate", "--prune")
    assert (ran.code, ran.errors) == (1, ["bento: error: gone: logs: Directory not empty"])
    assert f"lost: removed {site.chroots / 'lost'}\n" in ran.out and "gone: removed" not in ran.out
    assert "1 host: 1 published, 0 unchanged, 0 failed" in ran.out
    assert not (site.chroots / "gone/current.json").exists()
    assert f"gone: removed {site.chroots / 'gone'}\n" in site.publish("--prune").out
    assert set(os.listdir(site.chroots)) == {".lock", ".store", "a"}


def test_a_garbage_collection_root_goes_with_its_host(real_root: None, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "gone"):
        site.host(name)
    site.publish()
    shutil.rmtree(site.fleet / "hosts/gone")
    roots = tmp_path / "gcroots"
    roots.mkdir()
    for name in ("a", "gone"):
        (roots / name).symlink_to("/nix/store/x")
    monkeypatch.setattr(bento, "GCROOTS", roots)
    monkeypatch.setattr(bento, "find_owner", lambda *_: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    site.publish("--prune")
    assert os.listdir(roots) == ["a"] and not (site.chroots / "gone").exists()
