"""Releases from git's work trees: what is tracked, and nothing that they name is run."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import CONFIGURATION, Site, commit, git, names, run_outside, write_key, write_program

import bento


def test_a_release_is_what_is_committed(site: Site) -> None:
    """Whatever lies in the work tree, and is in the index."""
    directory = site.host("a", CONFIGURATION | {"changed": "old\n", "gone": "x", "sub/in": "x", "kept~": "x", "run": "x"})
    (directory / "run").chmod(0o755)
    (site.fleet / ".gitignore").write_text("*.key\nignored/\n")
    commit(site.fleet)
    site.publish()
    before = site.current().release
    (directory / "changed").write_text("<<<<<<< ours\n")
    (directory / "gone").unlink()
    (directory / "run").chmod(0o644)
    for name in (".env", "id_rsa", "x.key", "ignored/x", "sub/out", "added"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"{name}\n")
    os.mkfifo(directory / "fifo")
    git(site.fleet, "add", "hosts/a/added", "hosts/a/changed")
    (site.fleet / "hosts/b").symlink_to("a")  # which hosts there are is as it lies there
    site.publish()
    assert site.current().release == site.current("b").release == before
    assert names(site) == ["changed", "configuration.nix", "gone", "kept~", "run", "sub", "sub/in"]
    assert (site.tree() / "changed").read_text() == "old\n" and os.access(site.tree() / "run", os.X_OK)
    (site.fleet / ".git/index").write_bytes(b"garbage")  # it is not asked
    assert "2 unchanged" in site.publish().out


def lose_head(fleet: Path) -> None:
    (fleet / ".git/HEAD").write_bytes(b"")


def lose_repository(fleet: Path) -> None:
    """Of a second work tree, as after an unmount; or of a `.git` that was moved with it."""
    shutil.move(fleet / ".git", fleet.parent / "elsewhere")
    (fleet / ".git").write_text(f"gitdir: {fleet.parent}/gone\n")


def lose_git(fleet: Path) -> None:
    """What a bare repository's hook has checked out."""
    shutil.rmtree(fleet / ".git")


def no_commit(fleet: Path) -> None:
    lose_git(fleet)
    git(fleet, "init", "-q")


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "HEAD lost": (lose_head, "git rev-list: fatal: not a git repository (or any of the parent directories): .git: {why}"),
    "repository gone": (lose_repository, "git rev-list: fatal: not a git repository: {top}/gone: {why}"),
    "no commit": (no_commit, "git rev-list: fatal: bad revision 'HEAD': {why}"),
    "no Git, and a .gitignore": (
        lose_git, "a .gitignore ({top}/fleet/.gitignore), and no Git that knows what it leaves out: 'git init' there and"
        " commit, or 'populate --no-git'",
    ),
    "no program": (lambda _: None, "the program git is needed: nothing is published without it"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_git_answers_or_nothing_goes_out(case: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ignored secrets, nor anything else."""
    site.host("a")
    site.host("b")
    (site.fleet / ".gitignore").write_text(".env\nid_rsa\n")
    commit(site.fleet)
    (site.fleet / "hosts/a/.env").write_text("secret\n")
    make, words = UNREADABLE[case]
    make(site.fleet)
    if case == "no program":
        monkeypatch.setenv("PATH", str(site.top))
    ran = site.run("populate")
    why = "Git cannot say what is committed there, so nothing of it is published"
    assert (ran.code, ran.errors) == (1, [f"bento: error: 2 hosts (a, b): {site.fleet}: {words.format(why=why, top=site.top)}"])
    assert ran.out == "2 hosts: 0 published, 0 unchanged, 2 failed\n"
    if "ignore" in case:
        ran = site.run("populate", "--no-git")
        assert ran.code == 0 and f"{site.fleet}: no Git here: what lies there is published, 4 files" in ran.err
        assert names(site) == [".env", "configuration.nix"]


def test_a_flake_sees_the_same(real_nix: None, site: Site) -> None:
    """In the owner's own nixos-rebuild, of a work tree as it is committed."""
    directory = site.host("a", {"flake.nix": "{ outputs = _: { }; }\n", "changed": "old\n", "sub/in": "x"})
    (directory / "link").symlink_to("sub/in")
    commit(site.fleet / "hosts/a")
    for name in ("out", "sub/out"):
        (directory / name).write_text("x\n")
    assert site.run("populate").code == 0
    argv = ["nix", "--extra-experimental-features", "nix-command flakes", "flake", "metadata", "--json", f"git+file://{directory}"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"HOME": str(site.top)}, check=True)
    seen, tree = Path(json.loads(done.stdout)["path"]), site.tree()
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
    assert ran.errors == [
        f"bento: error: a: hosts/a/{entry}: not in the commit: 'git add' and 'git commit' it",
        "bento: error: new: hosts/new: not in the commit: 'git add' and 'git commit' it",
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
    (outer / "file").write_text("newer\n")
    commit(outer, "newer")
    git(directory / "here", "pull", "-q")  # what it has moved on to, nobody has committed here
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [
        f"bento: warning: {site.fleet}: 1 submodule never initialised, and empty here: 'git submodule update --init' what"
        " belongs to a host: hosts/a/empty",
    ])  # fmt: skip
    assert names(site) == [
        "configuration.nix", "empty", "here", "here/.gitmodules", "here/file", "here/inner", "here/inner/deep", "here/inner/x~",
    ]  # fmt: skip
    assert (site.tree() / "here/file").read_text() == "file\n"
    (directory / "link").symlink_to("empty/modules")
    commit(site.fleet, "a link into it; and the newer one")
    ran = site.run("populate")
    assert ran.errors[-1] == (
        "bento: error: a: hosts/a/link: a link into the submodule hosts/a/empty, which is not here:"
        " 'git submodule update --init' there"
    )
    git(site.fleet, "rm", "-q", "hosts/a/link")
    commit(site.fleet, "without it")
    git(directory / "here", "checkout", "-q", "HEAD~")
    newer = git(site.fleet, "rev-parse", "HEAD:hosts/a/here").strip()
    git_dir = Path(git(directory / "here", "rev-parse", "--absolute-git-dir").strip())
    (git_dir / "objects" / newer[:2] / newer[2:]).unlink()  # as after a pull without it
    assert site.run("populate").errors[-1] == (
        f"bento: error: a: submodule hosts/a/here: its commit {newer[:12]} is not here:"
        f" 'git -C {site.fleet} submodule update --init'"
    )


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
    for root, known in ((other, ("configuration.nix", "sub/in", *links)), (site.fleet, ("common/in",))):
        git(root, "init", "-q")
        git(root, "add", *known)
        git(root, "commit", "-q", "-m", "first")
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [
        f"bento: warning: 2 dangling links left out: hosts/a/bad -> {other}/sub/out, hosts/a/worse -> {other}/lone",
    ])  # fmt: skip
    assert names(site) == ["common", "common/in", "configuration.nix", "file", "sub", "sub/in"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of LFS, without its file: 'git lfs pull' here"),
        ("\0GITCRYPT\0secret", "it is locked: 'git-crypt unlock' here"),
    ],
)
def test_content_that_is_not_here_is_not_published(content: str, words: str, site: Site) -> None:
    site.host("a", CONFIGURATION | {"big.bin": content})
    site.host("b")
    (site.fleet / ".gitattributes").write_text("*.bin filter=away\n")
    commit(site.fleet)
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (1, [f"bento: error: a: hosts/a/big.bin: {words}"])
    assert "b: published" in ran.out
    git(site.fleet, "config", "filter.away.smudge", "echo its content; cat >/dev/null")  # now it can be had
    site.publish()
    assert (site.tree() / "big.bin").read_text() == "its content\n"


def test_a_fleet_in_a_subdirectory_links_into_its_repository(site: Site) -> None:
    """So that a host can get less than all."""
    (site.top / "fleet/nix/modules").mkdir(parents=True)
    (site.top / "fleet/nix/modules/x.nix").write_text("{ }\n")
    (site.top / "fleet/bento/hosts/a").mkdir(parents=True)
    (site.top / "fleet/bento/hosts/a/configuration.nix").write_text("{ }\n")
    (site.top / "fleet/bento/hosts/a/modules").symlink_to("../../../nix/modules")
    (site.top / "fleet/bento/hosts/lib.nix").write_text("{ }\n")
    (site.top / "fleet/bento/hosts/all").symlink_to("../..")
    (site.top / "fleet/configuration.nix").write_text("{ }\n")
    commit(site.top / "fleet")
    site.fleet = site.top / "fleet/bento"
    site.publish()
    assert names(site) == ["configuration.nix", "modules", "modules/x.nix"]
    assert "bento/hosts/lib.nix" in names(site, "all") and "bento/hosts/all" not in names(site, "all")


def test_a_link_that_was_pushed_shows_no_directory_of_the_servers(site: Site) -> None:
    (site.top / "secret").mkdir()
    (site.top / "secret/configuration.nix").write_text("{ password = 1; }\n")
    (site.fleet / "hosts/a").symlink_to(site.top / "secret")
    commit(site.fleet)
    assert site.run("populate").errors == [
        f"bento: error: a: hosts/a: link out of the fleet directory, to {site.top}/secret, where no Git is"
    ]
    git(site.fleet, "rm", "-q", "--cached", "hosts/a")
    commit_nothing = git(site.fleet, "commit", "-q", "--allow-empty", "-m", "not from there")
    assert commit_nothing == ""
    site.publish()  # the same link, made at the server


@pytest.fixture
def as_root(real_root: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """bento.py as root, in directories that anybody may pass through, and without the hosts' accounts."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getresuid()[1])
    monkeypatch.setattr(bento, "find_owner", lambda *_: None)
    parents = [path for path in (site.top, *site.top.parents) if path.stat().st_mode & 0o55 != 0o55]
    for path in parents:  # pytest lets nobody else in; they stay open, for who else runs in them
        path.chmod(0o711)
    return site


def give(path: Path, uid: int = 12345) -> None:
    subprocess.run(["chown", "-Rh", f"{uid}:{uid}", path], check=True)


OWN_FILES = {
    "a.absent": ("status", "absent"), "a.pub": ("fleet", ""), "waves": ("populate", ""), "signed": ("populate", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_link_that_was_pushed_shows_no_file_of_the_servers(name: str, site: Site) -> None:
    """Nor does it keep anybody waiting: what hosts/ says of hosts lies in the fleet's own work tree."""
    secret = site.top / "secret"
    secret.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    site.host("a")
    commit(site.fleet)
    site.publish()
    os.mkfifo(site.fleet / "fifo")
    (site.fleet / "own").write_text("within it\n")
    for target, words in (
        (secret, f"hosts/{name}: a link out of the fleet's directory, to {secret}"), (Path("/dev/zero"), f"hosts/{name}: a link out of"),
        (Path("../fifo"), f"hosts/{name}: no regular file"), (Path("../own"), ""),
    ):  # fmt: skip
        (site.fleet / "hosts" / name).unlink(missing_ok=True)
        (site.fleet / "hosts" / name).symlink_to(target)
        done = run_outside(site, OWN_FILES[name][0], *(["--json"] if "absent" in name else []))
        said = done.stdout + done.stderr
        assert "PRIVATE KEY" not in said and words in said, said
    assert not any(line.startswith("Traceback") for line in said.splitlines())


def test_root_reads_what_the_trees_ruler_may_read(as_root: Site) -> None:
    """A file that is swapped for a link is theirs to read, or nobody's."""
    site = as_root
    secret = site.fleet / "secret"
    for name in ("a", "b"):
        site.host(name)
    (site.fleet / "hosts/a.pub").symlink_to("../secret")
    (site.fleet / "hosts/b.absent").symlink_to("../secret")
    (site.fleet / "hosts/waves").symlink_to("../secret")
    commit(site.fleet)
    give(site.fleet)
    secret.write_text("a b # root's own\n")
    secret.chmod(0o600)
    ran = site.run("populate")
    assert f"hosts/waves: cannot be read: {secret}: Permission denied" in ran.errors[-1]
    assert f"hosts/a.pub: cannot be read: {secret}: Permission denied" in site.run("fleet").err
    assert "root's own" not in site.run("status", "--json").out
    assert os.geteuid() == 0


def test_root_looks_at_edits_as_the_trees_ruler(as_root: Site) -> None:
    """What is edited is said, and tried, without root's reading what they could not, or leaving a file in their tree."""
    site = as_root
    secret = site.top / "secret"
    secret.write_text("root's own\n")
    secret.chmod(0o600)
    site.host("a", CONFIGURATION | {"x": "old\n", "y": "y\n"})
    commit(site.fleet)
    give(site.fleet)
    site.host("a", {"x": "new\n"})
    assert "1 file differs from the commit (hosts/a/x)" in site.run("populate", "a").out
    assert site.run("populate", "--dirty", "a").errors == []
    assert (site.tree() / "x").read_text() == "new\n" and "+ first" in (site.current().revision or "")
    (site.fleet / "hosts/a/y").unlink()
    os.link(secret, site.fleet / "hosts/a/y")
    ran = site.run("populate", "--dirty", "a")
    assert ran.code == 1 and "Permission denied" in ran.err
    assert not [path for path in site.fleet.rglob("*") if path.stat().st_uid == 0 and path.name not in "yx"]


def test_a_tree_that_others_may_write_is_nobodys(as_root: Site) -> None:
    site = as_root
    site.host("a")
    commit(site.fleet)
    for mode, group, words in ((0o777, 0, "everybody may write there: 'chmod o-w' it"), (0o775, 12345, "root's, and a group may write there")):
        os.chown(site.fleet, 0, group)
        site.fleet.chmod(mode)
        ran = site.run("populate")
        assert ran.code == 1 and f"{site.fleet}: {words}" in ran.err
    site.fleet.chmod(0o755)
    other = site.top / "other"
    other.mkdir()
    (other / "configuration.nix").write_text("{ }\n")
    give(site.fleet)
    (site.fleet / "hosts/b").symlink_to(other)
    assert f"hosts/b: a link of somebody's to a tree of somebody else's, {other}" in site.run("populate").err


@pytest.mark.parametrize("who", [0, 12345])
def test_what_a_work_tree_names_is_not_run(who: int, as_root: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """By root, from a hook of another repository; but for a filter of its ruler's, as its ruler."""
    site = as_root
    marker, ran_as = site.top / "was run", site.top / "ran as"
    program = f"sh -c 'touch \"{marker}\"; cat'"
    directory = site.host("a", CONFIGURATION | {"secret": "x\n", ".gitattributes": "secret filter=own\n* diff=evil\n"})
    (directory / "module").mkdir()
    (directory / "module/x").write_text("x\n")
    commit(directory / "module")
    git(site.fleet, "init", "-q")
    git(site.fleet, "submodule", "--quiet", "add", "./hosts/a/module", "hosts/a/module")
    commit(site.fleet)
    for where in (site.fleet, directory / "module"):
        for name, value in {
            "core.fsmonitor": program, "core.hooksPath": str(site.top / "hooks"), "diff.evil.command": program,
            "diff.evil.textconv": program, "diff.external": program, "core.pager": program, "log.showSignature": "true",
            "gpg.program": program, "core.sshCommand": program, "core.editor": program, "alias.ls-tree": f"!{program}",
            "core.alternateRefsCommand": program, "core.worktree": "/", "core.autocrlf": "true", "core.eol": "crlf",
            "filter.own.smudge": f"id -u >>'{ran_as}'; tr x y",
        }.items():  # fmt: skip
            if name != "core.worktree" or where == site.fleet:
                git(where, "config", name, value)
    ran_as.touch()
    ran_as.chmod(0o666)
    for hook in ("post-index-change", "post-checkout", "pre-auto-gc", "reference-transaction", "fsmonitor-watchman"):
        write_program(site.top / "hooks" / hook, f'touch "{marker}"\n')
    give(site.fleet, who)
    for name, value in {
        "GIT_DIR": str(site.top / "nowhere"), "GIT_INDEX_FILE": str(site.top / "no index"), "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.fsmonitor", "GIT_CONFIG_VALUE_0": program,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    ran = site.run("populate")
    assert (ran.code, ran.err) == (0, "")
    assert names(site) == [".gitattributes", "configuration.nix", "module", "module/x", "secret"]
    assert (site.tree() / "secret").read_text() == "y\n"
    assert ran_as.read_text() == f"{who}\n"
    assert (site.current().revision or "").endswith(" first")
    ran = site.run("add", "b", "--key", str(write_key(site)))
    assert ran.code == 0, ran.err
    assert not marker.exists()
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_CONFIG_COUNT"):
        monkeypatch.delenv(name)
    assert {path.lstat().st_uid for path in site.fleet.rglob("*")} == {who}
    options = (f"--git-dir={site.fleet}/.git", f"--work-tree={site.fleet}", "-c", "core.fsmonitor=")
    listed = git(site.fleet, *options, "ls-files", "hosts/b*", "utils")
    assert listed.split() == ["hosts/b.pub", *sorted(["hosts/b/configuration.nix", "hosts/b/utils"]), "utils/bento.nix", "utils/bento_client.py"]
