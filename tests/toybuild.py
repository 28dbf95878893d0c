"""Toy machines whose client is a fake, and their configurations: what the tests of the toy have in common."""

from pathlib import Path
from typing import Any

from toynixos import ToyMachine, write_config

# Says what it was started with; the real one has tests of its own.
FAKE_CLIENT = "import sys\nprint('client', *sys.argv[1:])\n"


def config(machine: ToyMachine, *, flake: bool = True, **behaviour: Any) -> Path:
    client = machine.root.parent / "client.py"
    return write_config(machine.root.parent / "config", flake=flake, host="toy", client=client, **behaviour)


def build(machine: ToyMachine, **behaviour: Any) -> Path:
    done = machine.rebuild("build", config(machine, **behaviour))
    assert done.returncode == 0, done.stdout
    return (machine.root / "result").resolve()


def switch(machine: ToyMachine, system: Path, action: str, **env: str) -> tuple[int, str]:
    done = machine.run(system / "bin/switch-to-configuration", action, env=env)
    return done.returncode, done.stdout


def set_profile(machine: ToyMachine, system: Path, **env: str) -> int:
    return machine.run("nix-env", "-p", machine.profile, "--set", system, env=env).returncode
