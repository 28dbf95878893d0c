"""Bento in the owner's own repository, and flakes with locks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fleet import NOT_ROOT, REPO, Site, commit, git, key, names, run_outside, write_key, write_program

import bento


def own_bento(site: Site, where: str) -> list[str]:
    """A copy of Bento in the owner's repository, and how it is started."""
    for name in ("bento.py", "bento_client.py", "fleet.nix.in", "utils/bento.nix"):
        target = site.fleet / where / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, target)
    (site.fleet / where / "utils/bento_client.py").symlink_to("../bento_client.py")
    start = "import os, sys; os.geteuid = lambda: 1000; import bento; sys.exit(bento.main(sys.argv[1:]))"
    return [sys.executable, "-c", start, "--fleet", ".", "--chroot-dir", str(site.chroots)]


def test_bento_in_the_owners_repository(site: Site) -> None:
    """As a submodule: the hosts link to it, Git knows what is made, and it is published."""
    argv = own_bento(site, "lib/bento")
    commit(site.fleet / "lib/bento")
    git(site.fleet, "init", "-q")
    git(site.fleet, "submodule", "--quiet", "add", "./lib/bento", "lib/bento")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(site.fleet / "lib/bento")}
        done = subprocess.run([*argv, *words], cwd=site.fleet, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    shutil.rmtree(site.fleet / "hosts")
    run("add", "a")
    run("add", "b", "--flake", "--key", str(write_key(site)))
    run("fleet")
    commit(site.fleet, "the hosts")
    assert os.readlink(site.fleet / "hosts/a/utils") == "../../lib/bento/utils"
    assert git(site.fleet, "ls-files", "hosts", "fleet.nix").split() == [
        "fleet.nix", "hosts/a/configuration.nix", "hosts/a/utils", "hosts/b.pub", "hosts/b/configuration.nix",
        "hosts/b/flake.nix", "hosts/b/utils",
    ]  # fmt: skip
    assert run("populate").stderr.splitlines() == [NOT_ROOT]
    assert names(site) == ["configuration.nix", "utils", "utils/bento.nix", "utils/bento_client.py"]


def test_bento_beside_the_owners_repository(site: Site) -> None:
    """A flake input in the Nix store, say: the hosts get a copy in the fleet's directory."""
    git(site.fleet, "init", "-q")
    for name in "ab":
        assert site.run("add", name).code == 0
    assert os.readlink(site.fleet / "hosts/b/utils") == "../../utils"
    assert (site.fleet / "utils/bento_client.py").read_bytes() == (REPO / "bento_client.py").read_bytes()
    commit(site.fleet, "the hosts")
    site.publish()
    assert names(site) == ["configuration.nix", "utils", "utils/bento.nix", "utils/bento_client.py"]


def test_a_merge_brings_back_no_examples(site: Site) -> None:
    """What changes in Bento's examples is no conflict for a copy that has hosts of its own."""
    assert (REPO / "hosts").is_symlink() and os.readlink(REPO / "hosts") == ".examples"
    theirs, ours = site.top / "theirs", site.top / "ours"
    shutil.copytree(REPO / ".examples", theirs / ".examples", symlinks=True)
    (theirs / "hosts").symlink_to(".examples")
    commit(theirs)
    git(site.top, "clone", "-q", str(theirs), str(ours))
    git(ours, "rm", "-q", "hosts")
    (ours / "hosts/mine").mkdir(parents=True)
    (ours / "hosts/mine/configuration.nix").write_text("{ }\n")
    commit(ours, "our own")
    (theirs / ".examples/nas/flake.nix").write_text("{ }\n")
    shutil.rmtree(theirs / ".examples/router")
    (theirs / ".examples/new").mkdir()
    (theirs / ".examples/new/flake.nix").write_text("{ }\n")
    commit(theirs, "other examples")
    git(ours, "pull", "-q", "--no-rebase", "--no-edit")
    assert os.listdir(ours / "hosts") == ["mine"] and git(ours, "status", "--short") == ""
    assert (ours / ".examples/new/flake.nix").exists()


def test_add_a_link(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("x", {"flake.nix": "{ }\n"})
    (site.fleet / "hosts/x").rename(site.fleet / "all")
    (site.top / "other").mkdir()
    (site.top / "other/flake.nix").write_text("{ }\n")
    monkeypatch.chdir(site.fleet)
    ran = site.run("add", "a", "--link", "all", "--key", str(write_key(site, "a")))
    assert (ran.code, ran.out.splitlines()[:2]) == (0, ["hosts/a: made, a link to ../all", "hosts/a.pub: 1 key"])
    assert site.run("add", "b", "--link", "../other").out.splitlines()[0] == f"hosts/b: made, a link to {site.top}/other"
    assert site.run("add", "c", "--link", "..").out.splitlines()[0] == "hosts/c: made, a link to ../.."
    assert (site.run("add", "d", "--link", "gone").code, os.path.lexists(site.fleet / "hosts/d")) == (1, False)
    assert site.run("add", "d", "--link", "all", "--flake").code == 2
    site.publish("a", "b")


def test_a_fleet_in_the_flakes_own_repository(site: Site) -> None:
    """What it says of hosts is not part of what they are."""
    (site.fleet / "fleet/hosts/own").mkdir(parents=True)
    (site.fleet / "fleet/utils").mkdir()
    for name in ("flake.nix", "fleet/utils/bento.nix", "fleet/hosts/own/configuration.nix", "fleet/hosts/waves", "fleet/hosts/a.pub"):
        text = {".pub": f"{key('a')}\n", "": "*\n"}.get(Path(name).suffix, "{ }\n")
        (site.fleet / name).write_text(text)
    shutil.rmtree(site.fleet / "hosts")
    for name, target in (("a", "../.."), ("b", "a"), ("c", "../..")):
        (site.fleet / "fleet/hosts" / name).symlink_to(target)
    commit(site.fleet)
    site.fleet /= "fleet"
    assert site.publish().out.splitlines()[-1] == "4 hosts: 4 published, 0 unchanged, 0 failed"
    assert names(site) == [
        "flake.nix", "fleet", "fleet/hosts", "fleet/hosts/own", "fleet/hosts/own/configuration.nix", "fleet/utils",
        "fleet/utils/bento.nix",
    ]  # fmt: skip
    (site.fleet / "hosts/elsewhere.absent").write_text("at sea\n")
    (site.fleet / "hosts/a.pub").write_text(f"{key('b')}\n")
    git(site.fleet, "add", "-A")
    assert "4 unchanged" in site.publish().out


def test_the_keys_that_the_server_does_not_know(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        site.host(name)
    assert site.run("add", "a", "--key", str(write_key(site, "a"))).code == 0
    assert site.run("fleet").code == 0
    site.publish()
    for name in "bc":
        assert site.run("add", name, "--key", str(write_key(site, name))).code == 0
    word = "bento: warning: this server does not know the keys of 2 hosts yet (b, c): run 'bento.py fleet', and switch this server to it"
    for command in ("populate", "status"):
        ran = site.run(command)
        assert (ran.code, ran.errors) == (0, [word])
    assert site.run("fleet").code == 0
    assert site.publish().errors == []
    (site.top / "keys").mkdir()
    monkeypatch.setattr(bento, "AUTHORIZED_KEYS", site.top / "keys")
    for name in "ab":
        (site.top / "keys" / f"bento-{name}").write_text(f"restrict {key(name)}\n")
    assert site.run("populate").errors == [
        "bento: warning: this server does not know the keys of 1 host yet (c): switch this server to fleet.nix"
    ]


LOCK = {
    "nodes": {
        "root": {"inputs": {"a": "a", "b": "b", "c": "c", "d": "d"}},
        "a": {"locked": {"type": "github", "owner": "x", "repo": "y", "rev": "1"}},
        "b": {"locked": {"type": "path", "path": "/srv/secrets"}},
        "c": {"locked": {"type": "git", "url": "file:///srv/repo"}},
        "d": {"locked": {"type": "path", "path": "./sub"}},
    }
}


def test_an_input_that_only_this_server_has(site: Site) -> None:
    site.host("a", {"flake.nix": "{ }\n", "flake.lock": json.dumps(LOCK)})
    ran = site.run("populate")
    assert (ran.code, ran.errors) == (0, [
        "bento: warning: only this server can build a flake with an input in its own files:"
        " hosts/a: b (/srv/secrets), hosts/a: c (file:///srv/repo)"
    ])  # fmt: skip
    assert site.publish().errors == []  # said when it is published


def test_update_leaves_the_work_tree_alone(site: Site) -> None:
    """Nix gets what is tracked, not the repository's own files and what lies about, and the lock finds its way back."""
    directory = site.host("a", {"flake.nix": "{ }\n", "sub/flake.nix": "{ }\n"})
    site.host("b", {"bento.json": '{"format": 1, "directory": "sub"}', "sub/flake.nix": "{ }\n"})
    commit(site.fleet)
    (directory / ".env").write_text("secret\n")
    write_program(
        site.top / "bin/nix",
        'for word; do case $word in path:*) url=${word#path:};; esac; done\ncase $1 in --version) echo "nix (Nix) 2.24.1"; exit;; esac\n'
        f'tree=${{url%%\\?*}}; echo "$url" | sed "s,.*/,," >>{site.top}/urls; ls -A "$tree" >>{site.top}/seen\n'
        'dir=${url#"$tree"}; echo "{\\"nodes\\": {\\"root\\": {}}}" >"$tree/${dir#?dir=}/flake.lock"\n',
    )
    done = run_outside(site, "update", PATH=f"{site.top}/bin:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (0, "hosts/a: nothing moved\nhosts/b: nothing moved\n"), done.stderr
    assert (site.top / "urls").read_text() == "config\nconfig?dir=sub\n"
    assert (site.top / "seen").read_text().split() == ["flake.nix", "sub", "bento.json", "sub"]
    assert json.loads((directory / "flake.lock").read_text()) == {"nodes": {"root": {}}}
    assert git(site.fleet, "ls-files", "hosts/a/flake.lock", "hosts/b/sub/flake.lock").split() == [
        "hosts/a/flake.lock", "hosts/b/sub/flake.lock",
    ]  # fmt: skip


@pytest.mark.parametrize("lock", ["<<<<<<< ours\n", '{"nodes": {"root": {"inputs": {"x": "x"}}, "x": {"locked": []}}}'])
def test_a_malformed_lock_file_stops_no_other_flake(lock: str, site: Site, tmp_path: Path) -> None:
    nix = tmp_path / "path/nix"
    nix.parent.mkdir()
    nix.write_text("#!/bin/sh\necho nix 2.26\n")
    nix.chmod(0o755)
    for name in ("a", "b"):
        site.host(name, {"flake.nix": "{ }\n"})
    (site.fleet / "hosts/a/flake.lock").write_text(lock)
    done = run_outside(site, "update", PATH=f"{nix.parent}:{os.environ['PATH']}")
    assert done.returncode == 1 and done.stdout == "hosts/b: nothing moved\n"
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("bento: error: hosts/a: ")
