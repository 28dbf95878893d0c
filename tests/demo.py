#!/usr/bin/env python3
"""Bento's whole loop in a temporary directory: publish, pull, rebuild, a bad release rolled back, a kernel that does not
boot, the status table.

Real: bento.py, bento_client.py, sftp and sftp-server. Simulated: the machine, a toy NixOS (tests/toy/) in a directory,
and ssh, which is left out between sftp and sftp-server. Needs neither root, nor NixOS, nor sshd, and leaves nothing
behind.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"demo: error: Python 3.11 or later is needed; this is {sys.version.split()[0]}")

import json
import os
import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from toynixos import ToyMachine, find_sftp_server, write_config

REPO = Path(__file__).resolve().parent.parent
HOST = "t470"
IN_COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"
BOLD, GREEN, RED = "1", "32", "31"
# Root would be asked for the hosts' accounts. The demo publishes as anybody else may.
AS_ANYBODY = "import os, sys; os.geteuid = lambda: 1; import bento; sys.exit(bento.main())"


def paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if IN_COLOUR else text


def get_sftp_server(scratch: Path) -> str | None:
    """Where sftp-server is. On a Debian without it, its package is unpacked into the temporary directory."""
    if found := find_sftp_server():
        return found
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return None
    print("sftp-server is not installed: fetching Debian's package of it into the temporary directory", flush=True)
    for directory in ("lists/partial", "cache/archives/partial"):
        (scratch / directory).mkdir(parents=True)
    options = ["-qq", "-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
    options += ["-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"]
    for command in (["update"], ["download", "openssh-sftp-server"]):
        subprocess.run(["apt-get", *options, *command], cwd=scratch, check=False, stdin=subprocess.DEVNULL)
    for package in scratch.glob("openssh-sftp-server*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, scratch / "openssh"], check=True)
    unpacked = scratch / "openssh/usr/lib/openssh/sftp-server"
    return str(unpacked) if unpacked.exists() else None


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
            "confirm_timeout": 8,
            "boot_loader": ["systemd-boot", "/boot"],
        }
        self.machine = ToyMachine.create(top / "machine", HOST, chroot=self.chroots / HOST, client_json=self.settings)

    def say(self, text: str) -> None:
        print("\n" + paint(textwrap.fill(text, 78), BOLD), flush=True)

    def show(self, command: str, output: str, code: int) -> None:
        """Prints a command as a person would type it, and what it said, with the demo's own paths made short."""
        print("\n" + paint(f"  $ {command}", GREEN))
        for line in output.replace(str(self.top / "machine"), "").replace(str(self.top), "").splitlines():
            if "systemd does not run here" in line:  # of every activation, and there is none on a toy
                continue
            text = textwrap.fill(line, 78, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
            print(paint(text, RED) if "error:" in line else text)
        if code:
            print(paint(f"  (exit code {code})", RED), flush=True)

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

    def reboot(self) -> None:
        print("\n" + paint("  (the machine reboots)", GREEN))
        print(f"  the boot loader starts what {', then what '.join(self.machine.reboot())}", flush=True)


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
    demo.say(
        "The machine is back where it was, and told its server why. It waits for a day before it tries that release again, and "
        "gives it up after the third time."
    )
    demo.expect("v1")
    demo.server("status")
    demo.say("5. The administrator mends it, and somebody reboots the machine.")
    demo.edit("v3")
    demo.server("populate")
    demo.client("run")
    demo.expect("v3")
    demo.reboot()
    demo.client("run")
    demo.say(
        "6. A release with a new kernel. It proves itself on the old one, which says nothing of its boot: its first boot is a trial. "
        "The boot loader is told to start it once, and after that the last system that is known to boot. This kernel panics."
    )
    demo.edit("v4-panics", kernel="panic-6.18")
    demo.server("populate")
    demo.client("run")
    demo.reboot()
    demo.say("Nobody had to choose in a boot menu. The machine tells its server, and waits for a day before it tries that release again.")
    demo.client("run")
    demo.server("status")
    demo.server("log", HOST, "--list")


def main() -> int:
    missing = [program for program in ("git", "sftp", "ssh-keygen") if shutil.which(program) is None]
    if missing:
        print(f"demo: error: {', '.join(missing)} is missing: install Git, and OpenSSH's client and sftp-server", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="bento-demo-") as name:
        top = Path(name).resolve()
        sftp_server = get_sftp_server(top)
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
