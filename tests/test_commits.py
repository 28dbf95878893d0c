"""Which commit made a release, and that nobody goes back to an older one by himself."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from fleet import (
    CONFIGURATION,
    NOW_S,
    Site,
    build_as_the_host,
    commit,
    git,
    last_data,
    names,
    report_data,
    share,
    write_program,
)
from test_signed import make_keys

import bento
import bento_client as client


def head(where: Path, name: str = "HEAD") -> str:
    return git(where, "rev-parse", name).strip()


def test_the_commit_that_changed_a_host(site: Site) -> None:
    """Links and what they lead to are a host's files, too; what is said of hosts is not."""
    utils = share(site, "a", "b")
    commit(site.fleet, "first")
    first = head(site.fleet)
    site.publish()
    (utils / "sub/script").write_text("#!/bin/sh\nexit\n")
    commit(site.fleet, "utils")
    second = head(site.fleet)
    site.host("b", {"x": "x"})
    (site.fleet / "README.md").write_text("a typo\n")
    (site.fleet / "hosts/waves").write_text("a\n")
    commit(site.fleet, "b, and a typo")
    third = head(site.fleet)
    site.publish("a", "b")
    found = {name: (site.current(name).commit, site.current(name).revision) for name in ("a", "b", "like-1")}
    assert found == {"a": (second, f"{second[:7]} utils"), "b": (third, f"{third[:7]} b, and a typo"), "like-1": (first, f"{first[:7]} first")}
    before = (site.chroots / "a/current.json").read_bytes()
    (site.fleet / "README.md").write_text("no typo\n")
    commit(site.fleet, "no typo")
    assert site.publish("a").out.startswith("1 host: 0 published, 1 unchanged")
    assert (site.chroots / "a/current.json").read_bytes() == before
    site.publish("--now")  # the same for whoever comes later
    assert site.current("like-1").commit == second
    site.host("c")
    (site.fleet / "hosts/c/link").symlink_to("../../utils/sub")
    (utils / "sub").rename(utils / "moved")
    (utils / "sub").symlink_to("moved")
    commit(site.fleet, "moved")
    (utils / "sub").unlink()
    (utils / "other").mkdir()
    (utils / "other/x").write_text("x")
    (utils / "sub").symlink_to("other")
    commit(site.fleet, "the link between")
    site.publish()
    assert site.current("c").commit == head(site.fleet)


def test_the_whole_repository_is_a_host(site: Site) -> None:
    """But for what lies in its hosts/, and is about hosts."""
    (site.fleet / "flake.nix").write_text("{ }\n")
    (site.fleet / "hosts/a").symlink_to("..")
    commit(site.fleet)
    first = head(site.fleet)
    (site.fleet / "hosts/a.absent").write_text("lent\n")
    (site.fleet / "hosts/waves").write_text("a\n")
    commit(site.fleet, "about hosts")
    site.publish("a")
    assert site.current().commit == first


def test_a_submodule_is_changed_by_the_commit_that_moves_it(site: Site, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "sub").mkdir()
    (inner / "sub/x").write_text("x\n")
    commit(inner)
    site.host("a")
    commit(site.fleet)
    git(site.fleet, "submodule", "--quiet", "add", str(inner), "inner")
    (site.fleet / "hosts/a/link").symlink_to("../../inner/sub")
    commit(site.fleet, "inner")
    wanted = head(site.fleet)
    (site.fleet / "x").write_text("x")
    commit(site.fleet, "x")
    site.publish()
    assert site.current().commit == wanted


def test_many_places(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bento, "MAX_PLACES", 3)
    for number in range(5):
        (site.fleet / f"x{number}").write_text("x")
        site.host("a")
        (site.fleet / f"hosts/a/x{number}").symlink_to(f"../../x{number}")
    commit(site.fleet)
    site.publish()
    assert site.current().commit == head(site.fleet)


def three(site: Site) -> list[str]:
    """A fleet, published at its third commit; and the three."""
    made = []
    for number in range(3):
        site.host("a", CONFIGURATION | {"x": f"{number}\n"})
        site.host("b", CONFIGURATION | {"x": f"{number}\n"})
        commit(site.fleet, f"number {number}")
        made.append(head(site.fleet))
    site.publish()
    return made


@pytest.mark.parametrize("lost", [False, True])
def test_a_timer_never_goes_back(site: Site, lost: bool) -> None:
    """Neither in a checkout, nor in a restored clone that does not know the newer commit."""
    made = three(site)
    git(site.fleet, "reset", "-q", "--hard", made[1])
    if lost:
        git(site.fleet, "reflog", "expire", "--expire=now", "--all")
        git(site.fleet, "gc", "-q", "--prune=now")
        path = site.chroots / "a/current.json"  # the commit was made a while before that
        for name in ("a", "b"):
            path = site.chroots / name / "current.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"published": "2099-01-01T00:00:00Z"}))
    before = site.current()
    ran = site.run("populate")
    way = f"from {made[2][:7]} number 2 to {made[1][:7]} number 1"
    words = f"it would go back {way}: 'git pull' in {site.fleet}, or 'populate --again' if it is meant"
    assert (ran.code, ran.errors) == (1, [f"bento: error: 2 hosts (a, b): {words}"])
    assert site.current() == before
    assert "not published" in site.run("status", "--json").out
    ran = site.publish("a")
    assert ran.out.endswith(f"1 host: 1 published, 0 unchanged, 0 failed\n1 host (a): goes back {way}\n")
    assert site.current().commit == made[1]
    ran = site.run("populate")
    assert ran.errors == [f"bento: error: b: {words}"] and "1 unchanged" in ran.out
    assert f"1 host (b): goes back {way}" in site.publish("--again").out
    site.publish()
    assert site.current("b").commit == made[1]


def test_a_person_at_a_terminal_goes_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made = three(site)
    git(site.fleet, "checkout", "-q", made[0])
    with monkeypatch.context() as patched:
        patched.setattr("sys.stderr.isatty", lambda: True)
        assert "goes back from" in site.run("populate").out
    assert "2 unchanged" in site.publish().out
    git(site.fleet, "revert", "--no-edit", made[0])
    git(site.fleet, "reset", "-q", "--hard", made[2])
    assert "goes back" not in site.publish().out


def test_a_rewritten_history_is_no_way_back(site: Site) -> None:
    three(site)
    site.host("a", {"x": "amended\n"})
    git(site.fleet, "commit", "-q", "--amend", "-a", "-m", "amended")
    assert "goes back" not in site.publish().out
    assert site.current().commit == head(site.fleet)


def test_a_stale_clone_makes_no_candidate(site: Site) -> None:
    """Where the newest commit is held, a commit between that and what is published is older than it."""
    (site.fleet / "hosts/waves").write_text("a @1d\nb\n")
    site.host("a", CONFIGURATION | {"x": "0\n"})
    site.host("b", CONFIGURATION | {"x": "0\n"})
    commit(site.fleet, "number 0")
    site.publish()
    site.write_report()
    made = []
    for number in (1, 2):
        site.host("b", {"x": f"{number}\n"})
        site.host("a", {"x": f"{number}\n"})
        commit(site.fleet, f"number {number}")
        made.append(head(site.fleet))
    site.publish()
    git(site.fleet, "reset", "-q", "--hard", made[0])
    ran = site.run("populate")
    assert ran.code == 1 and f"2 hosts (a, b): it would go back from {made[1][:7]} number 2" in ran.err
    git(site.fleet, "reset", "-q", "--hard", made[1])
    assert site.run("populate").code == 0


def test_who_is_signed_as_before_and_has_another_release_now_is_named(site: Site) -> None:
    """`sign NAME` takes the others over, and they keep what they have: nobody would wonder why."""
    key = str(make_keys(site.top / "keys") / "alice")
    for name in "abc":
        site.host(name)
    commit(site.fleet)
    assert site.run("sign", "--key", key).errors == []
    for name in "ab":
        site.host(name, {"configuration.nix": f"{{ }} # {name}\n"})
    commit(site.fleet, "second")
    ran = site.run("sign", "--key", key, "a")
    words = "signed as before, which is another release than HEAD gives: 'bento.py sign' for these, too"
    assert (ran.code, ran.errors) == (0, [f"bento: warning: b: {words}"])
    assert site.run("sign", "--key", key, "b").errors == []
    ran = site.run("populate")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "3 hosts: 3 published, 0 unchanged, 0 failed")


def test_what_is_not_committed_is_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """To who asked; not of what is ignored, is another host's, or says something of hosts."""
    utils = share(site, "a", "b")
    for name in ("a", "b"):
        site.host(name, {f"m{number}.nix": "{ }\n" for number in range(7)} | {"crlf": "x\n"})
    (site.fleet / ".gitignore").write_text("*.key\n")
    commit(site.fleet)
    git(site.fleet, "config", "core.autocrlf", "true")
    (site.fleet / "hosts/a/crlf").unlink()
    git(site.fleet, "checkout", "hosts/a/crlf")
    assert (site.fleet / "hosts/a/crlf").read_bytes() == b"x\r\n"
    os.utime(site.fleet / "hosts/a/crlf", (5, 5))
    last = site.publish().out.splitlines()[-1]
    assert "4 published" in last
    assert site.publish("a").out.splitlines()[-1] == "1 host: 0 published, 1 unchanged, 0 failed"
    for name, content in (("hosts/a/m1.nix", "x"), ("hosts/a/x.key", "secret"), ("hosts/waves", "a\n"), ("README.md", "x")):
        (site.fleet / name).write_text(content)
    words = "not published: 1 file differs from the commit (hosts/a/m1.nix): git commit -am '…'"
    assert site.publish("a").out.splitlines()[-1] == f"a: {words}"
    assert "not published" not in site.publish("b").out + site.publish("b", "--json").out
    (site.fleet / "hosts/waves").unlink()
    assert "differ" not in site.publish().out
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout.isatty", lambda: True)
        out = site.run("populate").out
        assert out.splitlines()[-1] == f"3 hosts (a, like-1, like-2): {words}"
    for number in range(7):
        (site.fleet / f"hosts/a/m{number}.nix").unlink()
    (utils / "new.nix").write_text("{ }\n")
    shown = ", ".join(f"hosts/a/m{number}.nix" for number in range(5))
    assert site.publish("a").out.splitlines()[-1] == (
        f"a: not published: 8 files differ from the commit ({shown}, …): git add -A && git commit -m '…'"
    )
    assert site.publish("b").out.splitlines()[-1] == (
        "b: not published: 1 file differs from the commit (utils/new.nix): git add -A && git commit -m '…'"
    )


def test_what_is_not_committed_can_be_tried(site: Site) -> None:
    """Tracked files as they are, submodules' too; what they are in the work tree stays as it is."""
    inner = site.top / "inner"
    inner.mkdir()
    (inner / "x").write_text("x\n")
    commit(inner)
    site.host("a", CONFIGURATION | {"gone": "x", "changed": "old\n", "plain": "x"})
    site.host("b")
    commit(site.fleet)
    git(site.fleet, "submodule", "--quiet", "add", str(inner), "hosts/a/inner")
    commit(site.fleet, "inner")
    site.publish()
    before = (site.current(), (site.fleet / ".git/index").read_bytes())
    (site.fleet / "hosts/a/gone").unlink()
    site.host("a", {"changed": "new\n", "inner/x": "y\n", ".env": "secret\n"})
    git(site.fleet, "add", "--intent-to-add", "hosts/a/.env")
    git(site.fleet, "reset", "-q", "--", "hosts/a/.env")
    assert site.run("populate", "--dirty").code == 2
    site.publish("--dirty", "b")
    assert site.current("b").commit == git(site.fleet, "rev-list", "--max-parents=0", "HEAD").strip()
    objects = len(list((site.fleet / ".git/objects").rglob("*")))
    ran = site.publish("--dirty", "a")
    assert "differ" not in ran.out and len(list((site.fleet / ".git/objects").rglob("*"))) == objects
    assert names(site) == ["changed", "configuration.nix", "inner", "inner/x", "plain"]
    assert ((site.tree() / "changed").read_text(), (site.tree() / "inner/x").read_text()) == ("new\n", "y\n")
    current = site.current()
    assert (current.commit, current.revision) == (None, f"{head(site.fleet)[:7]}+ inner")
    site.publish()  # the timer's
    assert site.current().release == before[0].release and site.current().commit == head(site.fleet)
    assert git(site.fleet, "status", "--porcelain").splitlines() == [
        " M hosts/a/changed", " D hosts/a/gone", " M hosts/a/inner", "?? hosts/a/.env"
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["merge", "rebase", "stash"])
def test_a_merge_is_not_tried(site: Site, how: str) -> None:
    site.host("a", CONFIGURATION | {"x": "0\n"})
    commit(site.fleet)
    git(site.fleet, "checkout", "-q", "-b", "other")
    site.host("a", {"x": "1\n"})
    commit(site.fleet, "other")
    git(site.fleet, "checkout", "-q", "main")
    site.host("a", {"x": "2\n"})
    if how == "stash":
        git(site.fleet, "stash")
        git(site.fleet, "merge", "-q", "other")
    else:
        commit(site.fleet, "ours")
    with pytest.raises(subprocess.CalledProcessError):
        git(site.fleet, *{"stash": ("stash", "pop")}.get(how, (how, "other")))
    ran = site.run("populate", "--dirty", "a")
    words = f"a: {site.fleet}: a merge or a rebase is under way there: end it, or 'git merge --abort' it"
    assert ran.errors == [f"bento: error: {words}"] and not (site.chroots / "a/current.json").exists()
    site.publish("a")
    assert (site.tree() / "x").read_text() in ("1\n", "2\n")


REV = 'derivation { name = "nixos-system-x"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo ${self.rev or "none"} > $out" ]; }'


@pytest.mark.parametrize("directory", ["", "nix/"])
def test_a_flake_sees_its_commit(directory: str, real_nix: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on the server and on the host, locked or not; so a commit that changes nothing else is another system there."""
    site.host("a", {
        "bento.json": json.dumps({"format": 1, "directory": directory}), "README": "x",
        f"{directory}flake.nix": f"{{ outputs = {{ self }}: {{ nixosConfigurations.a.config.system.build.toplevel = {REV}; }}; }}\n",
    })  # fmt: skip
    write_program(
        site.top / "bin/nixos-rebuild",
        'exec nix --extra-experimental-features "nix-command flakes" build --option sandbox false --option build-users-group ""'
        ' --option substitute false --out-link result "${3%%#*}#nixosConfigurations.a.config.system.build.toplevel" $4 $5 $6\n',
    )
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(site.top))
    commit(site.fleet)
    site.publish("--build")
    before = site.current()
    assert Path(before.system or "").read_text() == f"{head(site.fleet)}\n"
    assert build_as_the_host(site, "a", site.top / "work") == before.system
    site.host("a", {"README": "a typo\n"})
    commit(site.fleet, "typo")
    site.publish("--build")
    assert Path(site.current().system or "").read_text() == f"{head(site.fleet)}\n"
    site.host("a", {"README": "none\n"})
    commit(site.fleet, "none")
    site.publish()
    assert site.run("build").code == 0
    assert Path(site.current().system or "").read_text() == f"{head(site.fleet)}\n"


def test_an_older_client_is_no_drift_for_a_commit(site: Site) -> None:
    """It builds the same flake without it."""
    current = client.Current("a", "a" * 64, 1, "2026-01-01T00:00:00Z", "/nix/store/x", commit="c" * 40)
    last = last_data("a" * 64, system="/nix/store/y")
    for version, made, drifts in (("1.1", "c" * 40, False), ("1.2", "c" * 40, True), ("1.1", None, True)):
        data = report_data(client=version, release="a" * 64, system="/nix/store/y", last=last)
        report = client.parse_report(json.dumps(data).encode(), "")
        assert bento.judge(current._replace(commit=made), report, NOW_S, NOW_S, 60)[3] == drifts


def test_an_object_that_is_lost(site: Site) -> None:
    """Of a damaged repository, or a partial clone."""
    site.host("a", CONFIGURATION | {"x": "lost\n"})
    site.host("b")
    commit(site.fleet)
    lost = git(site.fleet, "rev-parse", "HEAD:hosts/a/x").strip()
    (site.fleet / ".git/objects" / lost[:2] / lost[2:]).unlink()
    ran = site.run("populate")
    words = f"object {lost[:12]} is not here: 'git fetch' it, or 'git fsck' the repository"
    assert (ran.code, ran.errors) == (1, [f"bento: error: a: hosts/a/x: {words}"])
    assert (site.chroots / "b/current.json").exists()


def test_what_is_signed_goes_with_the_next_commit(site: Site) -> None:
    """As `add`'s files do, whatever .gitignore says."""
    site.host("a")
    (site.fleet / ".gitignore").write_text("signed\n")
    commit(site.fleet)
    assert site.run("sign", "--key", str(make_keys(site.top / "keys") / "alice")).code == 0
    git(site.fleet, "commit", "-q", "-a", "-m", "signed")
    assert git(site.fleet, "show", "HEAD:hosts/signed") == (site.fleet / "hosts/signed").read_text()
