"""`build = "server"`: a machine that builds nothing takes what its server has built, with real Nix, from a real cache."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_modules import HOST_MODULE, MINIMAL, evaluate_host
from toylab import HOST, Lab
from toynixos import TOY, need_nix, write_config

import bento
from bento_client import Result

GCROOT = Path("/nix/var/nix/gcroots/bento", HOST)


@dataclass
class Site:
    """A server that builds with Nix, a cache, and a host on the same store, where what was copied is deleted again."""

    lab: Lab

    @property
    def keys(self) -> str:
        return Path(self.lab.file("public")).read_text()

    def nix(self, *argv: str) -> str:
        done = subprocess.run(argv, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def write(self, label: str, **behaviour: Any) -> None:
        mark = os.urandom(4).hex()  # what is in the store already would not be fetched
        behaviour = {"client_json": self.lab.settings, "kernel_params": [mark]} | behaviour
        write_config(self.lab.config, flake=True, host=HOST, label=label, **behaviour)

    def bento(self, *argv: str, code: int = 0) -> None:
        assert bento.main(["--fleet", self.lab.file("fleet"), "--chroot-dir", self.lab.file("chroot"), *argv]) == code

    @property
    def current(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.lab.chroot / "current.json").read_text())
        return found

    def copy(self) -> str:
        """For --after-build."""
        return f"nix copy --to file://{self.lab.file('cache')}?secret-key={self.lab.file('secret')}"

    def delete(self) -> str:
        """What was built is not on this machine any more. Its path."""
        system: str = self.current["system"]
        GCROOT.unlink(missing_ok=True)
        self.nix("nix-store", "--delete", system)
        return system

    def run(self, code: int = 0, **settings: str) -> str:
        values = {"substitute": "true", "substituters": f"file://{self.lab.file('cache')}", "trusted-public-keys": self.keys}
        lines = "".join(f"{name.replace('_', '-')} = {value}\n" for name, value in (values | settings).items())
        return self.lab.client("run", code=code, NIX_CONFIG=f"build-users-group =\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    need_nix()
    lab = Lab.create(tmp_path, mode="nix")
    lab.settings["build"] = "server"
    monkeypatch.setenv("PATH", f"{TOY}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TOY_MODE", "nix")
    monkeypatch.setenv("NIX_CONFIG", "experimental-features = nix-command flakes\nbuild-users-group =\n")
    made = Site(lab)
    made.nix("nix-store", "--generate-binary-cache-key", "test", lab.file("secret"), lab.file("public"))
    yield made
    GCROOT.unlink(missing_ok=True)
    (bento.log_directory() / f"{HOST}.log").unlink(missing_ok=True)


def test_what_the_server_built_is_fetched_and_nothing_is_built(site: Site) -> None:
    lab = site.lab
    site.write("v1")
    site.bento("populate", "--build", "--after-build", site.copy())
    system = site.delete()

    site.run(code=1, trusted_public_keys="")  # a bad moment: the key is known in time for the next poll
    assert lab.last().result == Result.FETCH_FAILED
    assert "not signed by any of the keys in 'trusted-public-keys'" in lab.last().reason
    site.run(code=1, substituters="")
    assert lab.last().reason.endswith("no substituter has it, or what it needs")
    site.run(code=1, substituters="http://127.0.0.1:9")
    assert "unable to download 'http://127.0.0.1:9/nix-cache-info'" in lab.last().reason
    lab.age_attempts(3600)
    site.run()
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().system, lab.report().release) == ("ok", system, site.current["release"])
    assert "nixos-rebuild" not in lab.log()
    assert not (lab.state / "config").exists(), "the files of a release are for those who build it"
    assert str(lab.state / "result") in site.nix("nix-store", "--query", "--roots", system)

    assert "up to date with release" in site.run()
    site.write("v2", cut_network=True)
    site.bento("populate", "--build", "--after-build", site.copy())
    site.delete()
    site.run(code=1)
    assert lab.labels() == ("v1", "v1", "v1") and lab.last().result == Result.ROLLED_BACK


def test_without_a_system_there_is_one_at_the_next_poll(site: Site) -> None:
    lab = site.lab
    site.write("v1")
    site.bento("populate")
    for _ in range(4):
        site.run(code=1)
    assert lab.last().result == Result.FETCH_FAILED
    assert lab.last().reason.endswith("the server has not built it: 'bento.py populate --build'")
    assert "next attempt in" in site.run()
    site.bento("build")
    site.run()  # what failed was something else: no pause
    assert lab.labels() == ("v1", "v1", "v1") and lab.last().attempt == 1


def test_another_system_of_the_same_release(site: Site) -> None:
    """As from a server whose channels have moved."""
    lab = site.lab
    site.write("v1")
    site.bento("populate", "--build")
    site.run()
    old = dict(site.current)
    site.write("v2")
    site.bento("populate", "--build")
    (lab.chroot / "current.json").write_text(json.dumps(old | {"system": site.current["system"]}))
    site.run()
    assert lab.labels() == ("v2", "v2", "v2")
    assert (lab.last().result, lab.last().release, lab.report().system) == ("ok", old["release"], site.current["system"])


def test_what_leads_elsewhere_is_refused(site: Site) -> None:
    site.write("v1")
    site.bento("populate", "--build")
    link = site.lab.file("link")
    os.symlink(site.current["system"], link)
    (site.lab.chroot / "current.json").write_text(json.dumps(site.current | {"system": link}))
    site.run(code=1)
    assert site.lab.last().result == Result.FETCH_FAILED and "is not a store path" in site.lab.last().reason


# --- the server ---


@pytest.mark.parametrize("command", ["build", "populate"])
def test_after_build(site: Site, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The path is a word of its own, and no shell reads the command. Where it fails, nothing is published."""
    flags = ["--build"] if command == "populate" else []
    site.write("v1")
    if command == "build":
        site.bento("populate")
    ran = Path(site.lab.file("ran"))
    script = f"""{sys.executable} -c "import sys; print(sys.argv[1:], file=open('{ran}', 'a'))" ';' '$(id)'"""
    site.bento(command, *flags, "--after-build", script)
    assert ran.read_text() == f"{[';', '$(id)', site.current['system']]}\n"

    before = site.current
    site.write("v2")
    site.bento(command, *flags, "--after-build", "ls /nonexistent", code=1)
    assert site.current == before
    said = capfd.readouterr().err
    assert f"bento: error: {HOST}: ls /nonexistent: exit 2; all of it is in " in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("populate", "--after-build", "true"), "--after-build goes with --build"),
        (("build", "--after-build", "'"), "No closing quotation"),
        (("build", "--after-build", " "), "it is empty"),
    ],
)
def test_after_build_usage(argv: tuple[str, ...], said: str, tmp_path: Path) -> None:
    words = [sys.executable, bento.__file__, "--fleet", str(tmp_path), *argv]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr


# --- the module ---


def test_a_machine_that_builds_nothing_has_nothing_to_build_with() -> None:
    host = evaluate_host(HOST_MODULE, MINIMAL, '{ services.bento.build = "server"; }')
    assert host["settings"]["build"] == "server"
    [command] = host["commands"]
    assert "-nix/bin" in command
    assert not [name for name in ("nixos-rebuild", "gitMinimal", "gnutar") if name in command]
    definitions = '{ services.bento = { build = "server"; upgradeChannels = true; }; }'
    [failed] = evaluate_host(HOST_MODULE, MINIMAL, definitions)["failed"]
    assert "upgradeChannels is for machines that build" in failed
