#!/usr/bin/env python3
"""Bento's whole loop in a temporary directory: publish, pull, rebuild, a bad release rolled back, the status table.

Real: bento.py, bento_client.py, sftp and sftp-server. Simulated: the machine, a toy NixOS (tests/toy/) in a directory,
and ssh, which is left out between sftp and sftp-server. Needs neither root, nor NixOS, nor sshd, and leaves nothing
behind.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from toynixos import ToyMachine, write_config

REPO = Path(__file__).resolve().parent.parent
HOST = "t470"
SFTP_SERVERS = ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/libexec")
# Root would be asked for the hosts' accounts. The demo publishes as anybody else may.
AS_ANYBODY = "import os, sys; os.geteuid = lambda: 1; import bento; sys.exit(bento.main())"


def find_sftp_server(scratch: Path) -> str | None:
    """Where sftp-server is. On a Debian without it, its package is unpacked into the temporary directory."""
    beside_sftp = Path(shutil.which("sftp") or "sftp").resolve().parent.parent / "libexec"  # in Nixpkgs' OpenSSH
    for directory in (*SFTP_SERVERS, beside_sftp):
        if os.access(f"{directory}/sftp-server", os.X_OK):
            return f"{directory}/sftp-server"
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return None
    for directory in ("lists/partial", "cache/archives/partial"):
        (scratch / directory).mkdir(parents=True)
    options = ["-qq", "-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
    options += ["-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"]
    for command in (["update"], ["download", "openssh-sftp-server"]):
        subprocess.run(["apt-get", *options, *command], cwd=scratch, check=False, stdin=subprocess.DEVNULL)
    for package in scratch.glob("openssh-sftp-server*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, scratch / "openssh"], check=True)
    found = scratch / "openssh/usr/lib/openssh/sftp-server"
    return str(found) if found.exists() else None


class Demo:
    """The fleet's directory, the chroots and the one machine, all below `top`."""

    def __init__(self, top: Path, sftp_server: str) -> None:
        self.top = top
        self.fleet, self.chroots = top / "fleet", top / "chroot"
        self.environment = {"TOY_SFTP_SERVER": sftp_server}
        self.settings = {
            "server": "bento.example.org",
            "host": HOST,
            "root": str(top / "machine"),
            "state_dir": str(top / "machine/var/lib/bento"),
            "connect_timeout": 3,
            "confirm_timeout": 3,
        }
        self.machine = ToyMachine.create(top / "machine", HOST, chroot=self.chroots / HOST, client_json=self.settings)

    def say(self, text: str) -> None:
        print("\n" + textwrap.fill(text, 78), flush=True)

    def show(self, command: str, output: str, code: int) -> None:
        """Prints a command as a person would type it, and what it said, with the demo's own paths made short."""
        print(f"\n  $ {command}")
        for line in output.replace(str(self.top / "machine"), "").replace(str(self.top), "").splitlines():
            print(textwrap.fill(line, 78, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False))
        if code:
            print(f"  (exit code {code})", flush=True)

    def server(self, *arguments: str) -> None:
        command: list[str | Path] = [sys.executable, "-c", AS_ANYBODY, "--fleet", self.fleet, "--chroot-dir", self.chroots, *arguments]
        environment = os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "76"}
        done = subprocess.run(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        lines = [line for line in done.stdout.splitlines() if not line.startswith("not root:")]
        self.show(f"python3 bento.py {' '.join(arguments)}", "\n".join(lines), done.returncode)

    def client(self, command: str) -> int:
        config = self.top / "client.json"
        config.write_text(json.dumps(self.settings))
        argv = [sys.executable, REPO / "bento_client.py", "--config", config, command]
        done = self.machine.run(*map(str, argv), env=self.environment)
        self.show(f"bento-client {command}", done.stdout, done.returncode)
        return done.returncode

    def edit(self, label: str, **behaviour: Any) -> None:
        write_config(
            self.fleet / "hosts" / HOST, flake=True, host=HOST, label=label, client_json=self.settings, **behaviour
        )

    def expect(self, label: str) -> None:
        labels = self.machine.labels()
        print(f"\n  running system, profile and boot default: {', '.join(labels)}")
        if set(labels) != {label}:
            raise SystemExit(f"demo: error: the machine should be at {label} now")


def play(demo: Demo) -> None:
    demo.say("NixOS and ssh are simulated here, in a temporary directory. Bento, sftp and sftp-server are real.")
    demo.say(f"1. The server publishes the configuration of its one host, {HOST}. (Here hosts/{HOST}/ is a toy flake.)")
    demo.edit("v1")
    demo.server("populate")
    demo.say("2. On the host, a key is made once; it goes to the server. Then its timer polls: it fetches, checks, builds, activates, proves "
             "that the new system still reaches the server, and only then makes it the boot default.")  # fmt: skip
    demo.client("key")
    demo.client("run")
    demo.expect("v1")
    demo.server("status")
    demo.say("3. The next poll finds nothing new.")
    demo.client("run")
    demo.say("4. A bad release: it takes the machine's network down.")
    demo.edit("v2-cuts-the-line", cut_network=True)
    demo.server("populate")
    demo.client("run")
    demo.say("The machine is back where it was, and told its server why. It does not try that release again.")
    demo.expect("v1")
    demo.server("status")
    demo.say("5. The administrator mends it.")
    demo.edit("v3")
    demo.server("populate")
    demo.client("run")
    demo.expect("v3")
    demo.server("status")
    demo.server("log", HOST, "--list")


def main() -> int:
    if shutil.which("sftp") is None or shutil.which("ssh-keygen") is None:
        print("demo: error: sftp or ssh-keygen is missing: install the OpenSSH client", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="bento-demo-") as name:
        top = Path(name).resolve()
        sftp_server = find_sftp_server(top)
        if sftp_server is None:
            print("demo: error: sftp-server is missing: install OpenSSH's server or its sftp-server package", file=sys.stderr)
            return 1
        (top / "fleet/hosts").mkdir(parents=True)
        play(Demo(top, sftp_server))
    print("\nThat was it; the temporary directory is gone.")
    print("README.md goes on with a real server and a first host.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
