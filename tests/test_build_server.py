"""`build = "server"`: a machine that builds nothing takes what its server has built, with real Nix, from a real cache."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sshd import end_sshd, free_port, start_sshd
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
    for _ in range(5):  # at each poll: nothing was fetched, so it cost no more than that
        site.run(code=1)
    assert (lab.last().result, lab.last().attempt) == (Result.FETCH_FAILED, 5)
    assert lab.last().reason.endswith("the server has not built it: 'bento.py populate --build'")
    site.bento("build")
    site.run()  # what failed was something else
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


# --- with signers: the server's cache says nothing of who signed ---


NIX = """\
#!/bin/sh
# The real one, to which the server's store is the cache.
for word; do
    shift
    case $word in ssh-ng://*) word="file://{cache}" ;; esac
    set -- "$@" "$word"
done
exec {nix} "$@"
"""


@pytest.fixture
def signed(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Alice signs, with an SSH key and with one of Nix'; what she has built is in the cache, and not here."""
    lab, key = site.lab, site.lab.file("alice")
    site.nix("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    site.nix("nix-store", "--generate-binary-cache-key", "alice", f"{key}.nix", f"{key}.nix.pub")
    lab.settings |= {"signers": f"{key}.pub", "cache_key": Path(f"{key}.nix.pub").read_text()}
    bin = Path(lab.file("bin"))
    bin.mkdir()
    (bin / "nix").write_text(NIX.format(cache=lab.file("cache"), nix=shutil.which("nix")))
    (bin / "nix").chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{bin}:{os.environ['PATH']}")
        site.write("v1")
        site.bento("sign", "--key", key, "--build")
    site.bento("populate")
    site.delete()
    return site


def test_what_the_signer_built_is_fetched(signed: Site) -> None:
    signed.run()
    assert signed.lab.labels() == ("v1", "v1", "v1")


def test_another_content_of_the_signed_path(signed: Site) -> None:
    """The server was taken over. It has the key of its own cache, which the host's settings trust."""
    lab, system = signed.lab, Path(signed.current["system"])
    shutil.rmtree(lab.file("cache"))
    (system / "bin").mkdir(parents=True)
    (system / "bin/switch-to-configuration").write_text("#!/bin/sh\necho EVIL\n")
    (system / "bin/switch-to-configuration").chmod(0o755)
    digest, size = signed.nix("nix-hash", "--type", "sha256", str(system)), len(dump(system))
    said = f"{system}\n{digest.strip()}\n{size}\n\n0\n"
    subprocess.run(["nix-store", "--register-validity", "--reregister", "--hash-given"], input=said, text=True, check=True)
    signed.nix("nix", "store", "sign", "--key-file", lab.file("secret"), str(system))
    signed.nix("nix", "copy", "--to", f"file://{lab.file('cache')}", str(system))
    signed.nix("nix-store", "--delete", str(system))
    signed.run(code=1)
    assert "not signed by any of the keys in 'trusted-public-keys'" in lab.last().reason
    assert lab.labels() == ("v0", "v0", "v0") and not system.exists()
    # What is asked is Nix' question: that key is all that keeps it out.
    lab.settings["cache_key"] = signed.keys
    lab.age_attempts(3600)
    signed.run(code=1)
    assert system.exists() and "EVIL" in (system / "bin/switch-to-configuration").read_text()
    signed.nix("nix-store", "--delete", "--ignore-liveness", str(system))


def dump(path: Path) -> bytes:
    return subprocess.run(["nix-store", "--dump", path], capture_output=True, check=True).stdout


def test_without_a_key_of_the_signers_nothing_is_fetched(signed: Site) -> None:
    del signed.lab.settings["cache_key"]
    signed.run(code=1)
    assert "needs services.bento.cacheKey" in signed.lab.last().reason and signed.lab.labels() == ("v0", "v0", "v0")


def test_the_host_has_to_trust_the_signers_key(signed: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Made where there is none: it is printed, for the configuration."""
    secret = Path(f"{signed.lab.file('alice')}.nix")
    secret.unlink()
    signed.write("v2")
    signed.bento("sign", "--key", signed.lab.file("alice"), "--build", code=1)
    assert 'would not trust this key: services.bento.cacheKey = "bento-' in capsys.readouterr().err
    assert secret.stat().st_mode & 0o777 == 0o600 and secret.read_text().startswith("bento-")


SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {top}/host
AuthorizedKeysFile {top}/id.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
ForceCommand env NIX_REMOTE=local?root={top}/store NIX_CONF_DIR={top}/conf {daemon} --stdio
"""


@pytest.fixture
def server_store(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real sshd on this machine, with another Nix store behind it; how one names that here."""
    top, port = Path(site.lab.file("server-store")), free_port()
    (top / "conf").mkdir(parents=True)
    (top / "conf/nix.conf").write_text("build-users-group =\nsubstitute = false\n")
    for name in ("host", "id"):
        site.nix("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(top / name))
    (top / "config").write_text(SSHD.format(port=port, top=top, daemon=shutil.which("nix-daemon")))
    ways = f"-p {port} -i {top}/id -o StrictHostKeyChecking=no -o UserKnownHostsFile={top}/known"
    monkeypatch.setenv("NIX_SSHOPTS", ways)
    process = start_sshd(top, "127.0.0.1", port)
    yield f"local?root={top}/store"
    end_sshd(process)
    subprocess.run(["chmod", "-R", "u+w", top], check=True)


def test_what_is_signed_is_brought_to_a_real_server(site: Site, server_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Over ssh-ng, by two signers, one after the other: what the server has already gets the second one's signature, too."""
    lab, names = site.lab, ("alice", "bob")
    for name in names:
        site.nix("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", lab.file(name))
        site.nix("nix-store", "--generate-binary-cache-key", name, f"{lab.file(name)}.nix", f"{lab.file(name)}.nix.pub")
    lab.settings["cache_key"] = " ".join(Path(f"{lab.file(name)}.nix.pub").read_text() for name in names)
    lab.settings["server"] = ["127.0.0.1"]
    site.write("v1")
    for number, name in enumerate(names, 1):
        (Path(lab.file("fleet")) / "hosts/signed").unlink(missing_ok=True)
        site.bento("sign", "--key", lab.file(name), "--build")
        site.bento("populate")
        system = site.current["system"]
        (told,) = json.loads(site.nix("nix", "path-info", "--json", "--store", server_store, system))
        assert [signature.partition(":")[0] for signature in sorted(told["signatures"])] == list(names[:number])
    site.delete()


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
