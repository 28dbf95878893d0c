"""A machine with too little memory to evaluate its configuration follows its server, with real Nix on both ends: from a
cache of files, and from the server's own store over ssh."""

import json
from typing import Any

import pytest
from toynixos import write_config

from lab.lab import TESTS, Host, Lab, Server, cgroup_root, copy_into, mounts
from lab.test_matrix import last, reports, settled

MEMORY = 192 << 20  # a machine's files are on a tmpfs here, and count, too
# As NixOS, the toy takes a gigabyte to evaluate.
HUNGRY = "builtins.seq (builtins.length (builtins.genList (n: n) 40000000)) "
SSH = "ssh://bento-cache@server?ssh-key=/var/lib/bento/id_ed25519"
SSHD = """\
Match User bento-cache
  ForceCommand nix-store --serve
  DisableForwarding yes
  PermitTTY no
"""


@pytest.fixture
def server(lab: Lab) -> Server:
    machine = lab.machine("server", Server)
    machine.boot()
    machine.path("/srv/fleet/hosts").mkdir(parents=True, exist_ok=True)
    machine.write("/srv/fleet/fleet.nix.in", (TESTS.parent / "fleet.nix.in").read_text(encoding="utf-8"))
    machine.run("nix-store", "--generate-binary-cache-key", "server", "/root/secret", "/root/public")
    return machine


def limit_memory(host: Host) -> None:
    """All there is on the machine, and all that will be, together."""
    for place, kind in mounts():
        if kind == "cgroup" and (place / "memory.limit_in_bytes").exists():
            group, limit, tasks = place / host.lab.netns / host.name, "memory.limit_in_bytes", True
            break
    else:
        group, limit, tasks = host.cgroup, "memory.max", False
        for above in (cgroup_root(), host.lab.cgroup):
            (above / "cgroup.subtree_control").write_text("+memory", encoding="utf-8")
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text(str(MEMORY), encoding="utf-8")
    pids = [pid for found in host.cgroup.rglob("cgroup.procs") for pid in found.read_text(encoding="utf-8").split()]
    for pid in pids if tasks else ():
        (group / "cgroup.procs").write_text(pid, encoding="utf-8")


def write(server: Server, host: Host, label: str, **more: Any) -> None:
    config = server.path("/srv/fleet/hosts/h1")
    write_config(config, flake=True, host="h1", **{"label": label} | host.behaviour(build="server", confirm_timeout=30) | more)
    toy = (config / "toy.nix").read_text(encoding="utf-8")
    (config / "toy.nix").write_text(toy.replace("\nin\nbuiltins.mapAttrs", f"\nin\n{HUNGRY}builtins.mapAttrs"), "utf-8")


def inside(host: Host, *argv: str) -> tuple[int, str]:
    """Runs a program under the machine's limit: what the lab itself starts has none."""
    done = host.run("systemd-run", "--quiet", "--wait", "--pipe", "--collect", *argv, check=False, timeout_s=240)
    return done.returncode, done.stdout + done.stderr


def use_substituter(server: Server, host: Host, store: str) -> None:
    text = "".join(line for line in host.read("/etc/nix/nix.conf").splitlines(True) if "substitute" not in line)
    keys = server.read("/root/public").strip()
    host.write("/etc/nix/nix.conf", f"{text}substitute = true\nsubstituters = {store}\ntrusted-public-keys = {keys}\n")


def test_a_machine_that_cannot_evaluate(lab: Lab, server: Server) -> None:
    host = lab.machine("h1", Host)
    host.boot()
    write_config(host.path("/etc/nixos"), flake=True, host="h1", **{"label": "v0"} | host.behaviour() | {"no_bento": True})
    host.install("/etc/nixos")
    host.power_cut()
    host.boot()
    limit_memory(host)
    client = ["python3", "/bento/bento_client.py", "--server", "server", "--host", "h1", "--confirm-timeout", "30"]
    server.write("/srv/fleet/hosts/h1.pub", host.run(*client, "key").stdout)
    write(server, host, "v1")
    server.apply_fleet()
    server.configure_sshd(server.read("/etc/ssh/sshd_config").partition("sftp internal-sftp\n")[2] + SSHD)

    # Where somebody else built it, and brought it along: a first release, on a machine that has no Bento yet.
    copy = "nix copy --to file:///srv/cache?secret-key=/root/secret"
    server.bento("populate", "--build", "--after-build", copy, timeout_s=240)
    host.path("/srv/cache").mkdir(parents=True)
    copy_into(server.path("/srv/cache"), host.path("/srv/cache"))
    use_substituter(server, host, "file:///srv/cache")
    code, said = inside(host, *client, "run")
    assert code == 1 and last(server)["result"] == "build-failed", said  # it was ended in the evaluation
    code, said = inside(host, *client, "--build", "server", "run", "--force")
    assert code == 0, said
    settled(host, server, "v1")
    published = json.loads(server.read("/home/chroot/h1/current.json"))
    assert host.current_system() == published["system"] == last(server)["system"]

    # From the server's own store, by its own timer.
    server.add_user("bento-cache", "/var/empty", [server.read("/srv/fleet/hosts/h1.pub").strip()])
    users = server.read("/etc/passwd").splitlines()
    shell = [line.replace("nologin", "../bin/sh") if line.startswith("bento-cache:") else line for line in users]
    server.write("/etc/passwd", "\n".join(shell) + "\n")
    server.run("systemd-run", "--quiet", "--unit=nix-daemon", "nix-daemon")
    host.write("/etc/ssh/ssh_known_hosts", f"server {server.host_key}\n")
    use_substituter(server, host, SSH)
    write(server, host, "v2")
    sign = "nix store sign --recursive --key-file /root/secret"
    server.bento("populate", "--build", "--after-build", sign, timeout_s=240)
    release = json.loads(server.read("/home/chroot/h1/current.json"))["release"]
    settled(host, server, "v2")
    assert reports(server, release) == ["ok"]
    log = server.read(f"/home/chroot/h1/logs/{last(server)['log']}")
    assert "copying path '" in log and "nixos-rebuild" not in log
