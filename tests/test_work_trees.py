"""Releases from git's work trees: what is tracked, and nothing that they name is run."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from fleet import CONFIGURATION, Site, commit, git, names, share, write_key, write_program
from toynixos import need


def test_a_release_is_what_git_tracks(site: Site) -> None:
    directory = site.host("a", CONFIGURATION | {"changed": "old\n", "gone": "x", "sub/in": "x", "lost/x": "x", "kept~": "x"})
    (site.fleet / ".gitignore").write_text("*.key\nignored/\n")
    commit(site.fleet)
    (directory / "changed").write_text("new\n")
    (directory / "gone").unlink()
    shutil.rmtree(directory / "lost")
    (directory / "lost").mkdir()
    (directory / "empty").mkdir()
    for name in (".env", "id_rsa", "x.key", "ignored/x", ".direnv/x", "sub/out", "other/1", "other/2", "added"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"{name}\n")
    os.mkfifo(directory / "fifo")
    (directory / ".#x").symlink_to("me@here.1")
    git(site.fleet, "add", "-N", "hosts/a/added")
    (site.fleet / "hosts/b").symlink_to("a")
    ran = site.run("populate")
    assert ran.code == 0
    # A FIFO is nothing to Git.
    assert ran.errors == [
        f"bento: warning: {site.fleet}: 6 names untracked, left out: 'git add' what belongs to a host:"
        " hosts/a/.#x, hosts/a/.direnv, hosts/a/.env, hosts/a/id_rsa, hosts/a/other, …"
    ]
    assert names(site) == ["added", "changed", "configuration.nix", "kept~", "sub", "sub/in"]
    assert (site.chroots / "a/config/changed").read_text() == "new\n"


def test_a_flake_sees_the_same(real_nix: None, site: Site) -> None:
    """In the owner's own nixos-rebuild, of the work tree as it is."""
    directory = site.host("a", {"flake.nix": "{ outputs = _: { }; }\n", "changed": "old\n", "sub/in": "x", "gone": "x"})
    (directory / "link").symlink_to("sub/in")
    commit(site.fleet / "hosts/a")
    (directory / "changed").write_text("new\n")
    (directory / "gone").unlink()
    for name in ("out", "sub/out", "added"):
        (directory / name).write_text("x\n")
    git(directory, "add", "-N", "added")
    assert site.run("populate").code == 0
    argv = ["nix", "--extra-experimental-features", "nix-command flakes", "flake", "metadata", "--json", f"git+file://{directory}"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"HOME": str(site.top)}, check=True)
    seen, tree = Path(json.loads(done.stdout)["path"]), site.chroots / "a/config"
    assert sorted(str(path.relative_to(seen)) for path in seen.rglob("*")) == sorted(
        str(path.relative_to(tree)) for path in tree.rglob("*")
    )
    assert (seen / "changed").read_bytes() == (tree / "changed").read_bytes()


@pytest.mark.parametrize("entry", ["flake.nix", "configuration.nix", "nix/flake.nix"])
def test_an_entry_file_that_git_does_not_know(entry: str, site: Site) -> None:
    directory = site.host("a", {"bento.json": '{"format": 1, "directory": "nix"}' if "/" in entry else '{"format": 1}', "x": "x"})
    commit(site.fleet)
    (directory / "nix").mkdir()
    (directory / entry).write_text("{ }\n")
    site.host("new")
    ran = site.run("populate")
    assert [line for line in ran.errors if "error" in line] == [
        f"bento: error: a: hosts/a/{entry}: Git does not know it: 'git add' it, and what belongs to it",
        "bento: error: new: hosts/new/configuration.nix: Git does not know it: 'git add' it, and what belongs to it",
    ]


def test_submodules_are_part_of_it(site: Site) -> None:
    inner, outer = site.top / "inner", site.top / "outer"
    for where, files in ((inner, ("deep", "x~")), (outer, ("file",))):
        where.mkdir()
        for name in files:
            (where / name).write_text(f"{name}\n")
        commit(where)
    git(outer, "submodule", "--quiet", "add", str(inner), "inner")
    commit(outer)
    directory = site.host("a")
    commit(site.fleet)
    for name in ("here", "empty"):
        git(site.fleet, "submodule", "--quiet", "add", str(outer), f"hosts/a/{name}")
    git(site.fleet, "submodule", "--quiet", "update", "--init", "--recursive")
    commit(site.fleet)
    git(site.fleet, "submodule", "--quiet", "deinit", "hosts/a/empty")
    (directory / "here/inner/out").write_text("untracked\n")
    clone = directory / "clone"  # a repository that lies about is no submodule
    git(site.top, "clone", "-q", str(inner), str(clone))
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [
        f"bento: warning: {site.fleet}: 1 name untracked, left out: 'git add' what belongs to a host: hosts/a/clone",
        f"bento: warning: {directory}/here/inner: 1 name untracked, left out: 'git add' what belongs to a host: out",
    ])  # fmt: skip
    assert names(site) == [
        "configuration.nix", "empty", "here", "here/.gitmodules", "here/file", "here/inner", "here/inner/deep", "here/inner/x~",
    ]  # fmt: skip
    for number in range(27):
        (directory / f"link{number}").symlink_to(f"empty/modules/{number}")
    git(site.fleet, "add", "hosts/a/link*")
    ran = site.run("populate")
    assert ran.code == 0
    assert [line for line in ran.errors if "dangling" in line] == [
        f"bento: warning: {site.fleet}: 27 dangling links into submodules that are not there, left out: run"
        " 'git submodule update --init' there: hosts/a/link0, hosts/a/link1, hosts/a/link10, hosts/a/link11, hosts/a/link12, …"
    ]


def test_each_file_by_the_work_tree_it_lies_in(site: Site) -> None:
    """A host that is a link to a tree elsewhere, with links back; and links to what Git does not know."""
    other = site.top / "other"
    for name in ("configuration.nix", "sub/in", "sub/out", "lone/x"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("x\n")
    (site.fleet / "common").mkdir()
    for name in ("common/in", "common/out"):
        (site.fleet / name).write_text("x\n")
    links = {"common": site.fleet / "common", "file": other / "sub/in", "bad": other / "sub/out", "worse": other / "lone"}
    for name, target in links.items():
        (other / name).symlink_to(target)
    (site.fleet / "hosts/a").symlink_to(other)
    git(other, "init", "-q")
    git(other, "add", "configuration.nix", "sub/in", *links)
    git(site.fleet, "init", "-q")
    git(site.fleet, "add", "common/in", "hosts/a")
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [
        f"bento: warning: 2 dangling links left out: hosts/a/bad -> {other}/sub/out, hosts/a/worse -> {other}/lone",
        f"bento: warning: {site.fleet}: 1 name untracked, left out: 'git add' what belongs to a host: common/out",
        f"bento: warning: {other}: 2 names untracked, left out: 'git add' what belongs to a host: lone, sub/out",
    ])  # fmt: skip
    assert names(site) == ["common", "common/in", "configuration.nix", "file", "sub", "sub/in"]


def test_one_call_of_git_a_work_tree(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    share(site, *(f"h{number:03}" for number in range(100)))
    commit(site.fleet)
    calls = site.top / "calls"
    write_program(site.top / "bin/git", f'echo "$@" >>{calls}\nexec {need("git")} "$@"\n')
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    site.publish()
    assert calls.read_text().count("ls-files") == 2 and calls.read_text().count("\n") == 4
    calls.unlink()
    assert "102 unchanged" in site.publish().out
    assert calls.read_text().count("\n") == 1


def test_without_git(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = site.host("a", CONFIGURATION | {".env": "x", ".jj/x": "x", "x~": "x"})
    commit(site.fleet)
    for name in (".svn", ".hg", ".x.swp"):
        (directory / name).write_text("x")
    monkeypatch.setenv("PATH", str(site.top))
    site.publish()
    assert names(site) == [".env", "configuration.nix"]


def test_a_work_tree_that_git_cannot_read(site: Site) -> None:
    """Nothing of it is published, rather than all."""
    site.host("a", CONFIGURATION | {".env": "x"})
    site.host("b")
    commit(site.fleet)
    (site.fleet / ".git/index").write_bytes(b"garbage")
    ran = site.run("populate")
    assert ran.code == 1 and len(ran.errors) == 1
    assert ran.errors[0].startswith(f"bento: error: 2 hosts (a, b): {site.fleet}: git ls-files: ")


@pytest.mark.parametrize("who", ["root", "somebody"])
def test_nothing_that_a_work_tree_names_is_run(who: str, real_root: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by root, from a hook of another repository."""
    marker = site.top / "was run"
    program = f"sh -c 'touch \"{marker}\"; cat'"
    directory = site.host("a", CONFIGURATION | {"secret": "x\n", ".gitattributes": "* filter=evil diff=evil\n"})
    (directory / "module").mkdir()
    (directory / "module/x").write_text("x\n")
    commit(directory / "module")
    git(site.fleet, "init", "-q")
    git(site.fleet, "submodule", "--quiet", "add", "./hosts/a/module", "hosts/a/module")
    commit(site.fleet)
    for where in (site.fleet, directory / "module"):
        for name, value in {
            "core.fsmonitor": program, "core.hooksPath": str(site.top / "hooks"), "filter.evil.clean": program,
            "filter.evil.smudge": program, "filter.evil.process": program, "filter.evil.required": "true",
            "diff.evil.command": program, "diff.evil.textconv": program, "diff.external": program, "core.pager": program,
            "log.showSignature": "true", "gpg.program": program, "core.sshCommand": program, "core.editor": program,
            "alias.ls-files": f"!{program}", "core.alternateRefsCommand": program, "core.worktree": "/",
        }.items():  # fmt: skip
            if name != "core.worktree" or where == site.fleet:
                git(where, "config", name, value)
    for hook in ("post-index-change", "pre-auto-gc", "reference-transaction", "fsmonitor-watchman"):
        write_program(site.top / "hooks" / hook, f'touch "{marker}"\n')
    os.utime(directory / "secret", (5, 5))
    (directory / "module/x").write_text("changed\n")
    if who == "somebody":
        subprocess.run(["chown", "-R", "12345:12345", site.fleet], check=True)
    monkeypatch.setenv("GIT_DIR", str(site.top / "nowhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(site.top / "no index"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.fsmonitor")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", program)
    ran = site.publish()
    assert names(site) == [".gitattributes", "configuration.nix", "module", "module/x", "secret"]
    assert (site.current().revision or "").endswith(" first") and "+" not in (site.current().revision or "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    parents = [path for path in site.top.parents if path.stat().st_mode & 0o55 != 0o55]
    for path in (parents := [site.top, *parents]):  # pytest lets nobody else in
        path.chmod(0o711)
    try:
        ran = site.run("add", "b", "--key", str(write_key(site)))
    finally:
        for path in parents:
            path.chmod(0o700)
    assert ran.code == 0, ran.err
    assert not marker.exists()
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_CONFIG_COUNT"):
        monkeypatch.delenv(name)
    assert {path.stat().st_uid for path in (site.fleet / ".git").rglob("*")} == {12345 if who == "somebody" else 0}
    options = (f"--git-dir={site.fleet}/.git", f"--work-tree={site.fleet}", "-c", "core.fsmonitor=")
    listed = git(site.fleet, *options, "ls-files", "hosts/b*", "utils")
    assert listed.split() == ["hosts/b.pub", *sorted(["hosts/b/configuration.nix", "hosts/b/utils"]), "utils/bento.nix", "utils/bento_client.py"]
