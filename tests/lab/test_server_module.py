"""fleet.nix's own units on a booted server: timers publish, look at the fleet and tell a person; a binary cache."""

import json
import re
from typing import Any

import pytest
from test_modules import render_units
from toynixos import write_config

from lab.lab import TESTS, Lab, LabError, Server, evaluate, nix_string

SCRIPT = "/nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-script"
OPTIONS = """{ services.bento-server = {
  bento = BENTO;
  fleet = "/srv/fleet";
  populate = { enable = true; interval = "*:*:0/3"; arguments = [ "--build" ]; };
  status = { enable = true; interval = "*:*:0/3"; page = "/var/www/bento/index.html"; prometheus = "/var/lib/node/b.prom"; };
  notify = "cat >> /root/told";
  cache.enable = true;
}; }"""


@pytest.fixture(scope="module")
def server(lab: Lab) -> Server:
    """With one host, whose key root has."""
    machine = lab.machine("server", Server)
    machine.boot()
    machine.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/id")
    machine.write("/srv/fleet/fleet.nix.in", (TESTS.parent / "fleet.nix.in").read_text(encoding="utf-8"))
    machine.write("/srv/fleet/hosts/h1.pub", machine.read("/root/id.pub"))
    configure(machine, "v1")
    machine.apply_fleet()
    switch(machine)
    machine.run("systemd-run", "--quiet", "--unit=daemon", "nix-daemon")
    machine.wait_for(lambda: machine.exists("/nix/var/nix/daemon-socket/socket"), 20, "the daemon")
    return machine


def configure(machine: Server, label: str) -> None:
    write_config(machine.path("/srv/fleet/hosts/h1"), flake=True, host="h1", label=label, python="/usr/bin/python3")


def here(text: str) -> str:
    """With the programs of the lab in place of those in a store."""
    text = re.sub(r"/nix/store/e+-bento/bin", "/usr/local/bin", text)
    text = re.sub(r"/nix/store/e+-bento/", "/bento/", text)
    return re.sub(r"/nix/store/e+-(python3|nix|systemd)/bin", "/usr/bin", text)


def switch(machine: Server) -> None:
    """What a switch would do for the options, but for the accounts, tmpfiles and sshd of a server without them."""
    options = OPTIONS.replace("BENTO", f"/. + {nix_string(str(TESTS.parent))}")
    modules = f"[ (/. + {nix_string(str(machine.path('/srv/fleet/fleet.nix')))}) {options} ]"
    made: Any = evaluate(f"modules.serverUnits {modules}")
    machine.write("/usr/local/bin/bento", f"#!/bin/bash\n{here(made['commands'][0])}", 0o755)
    for name, text in render_units(made).items():
        text = here(text)
        if name.endswith(".service"):
            name_of_script = f"/opt/scripts/{name}"
            machine.write(name_of_script, f"#!/bin/bash -e\n{here(made['services'][name.removesuffix('.service')]['script'])}", 0o755)
            text = text.replace(SCRIPT, name_of_script)
        if name.endswith(".timer"):
            text = text.replace("[Timer]\n", "[Timer]\nAccuracySec=100ms\n")
        machine.write(f"/etc/systemd/system/{name}", text)
    server: Any = evaluate(f"modules.server {modules}")
    machine.run("useradd", "--system", "--user-group", "--home-dir", "/var/empty", "--shell", "/bin/sh", "--password", "*", "bento-cache")
    keys = server["users"]["bento-cache"]["openssh"]["authorizedKeys"]["keys"]
    machine.write("/etc/ssh/authorized_keys.d/bento-cache", "".join(f"{key}\n" for key in keys), 0o644)
    machine.configure_sshd(here(server["extraConfig"]))
    for rule in server["tmpfiles"]:
        machine.run("systemd-tmpfiles", "--create", "-", stdin=f"{rule}\n")
    machine.run("systemctl", "daemon-reload")


def told(server: Server) -> str:
    return server.read("/root/told") if server.exists("/root/told") else ""


def test_timers_publish_look_and_tell(server: Server) -> None:
    server.run("systemctl", "start", "bento-populate.timer", "bento-status.timer")
    for path in ("/home/chroot/h1/current.json", "/var/www/bento/index.html", "/var/lib/node/b.prom"):
        server.wait_for(lambda path=path: server.exists(path), 30, path)  # type: ignore[misc]
    server.wait_for(lambda: ">h1<" in server.read("/var/www/bento/index.html"), 30, "the host on the page")
    assert 'bento_host_needs_attention{host="h1"' in server.read("/var/lib/node/b.prom")
    assert told(server) == ""
    first = server.read("/home/chroot/h1/current.json")

    assert json.loads(first)["system"].startswith("/nix/store/")

    configure(server, "v2")
    server.wait_for(lambda: server.read("/home/chroot/h1/current.json") != first, 30, "the second release")
    server.path("/srv/fleet/hosts/h1/flake.nix").unlink()
    server.wait_for(lambda: told(server).count("\n") == 1, 30, "somebody is told")
    runs = f"{server.name}: failed populates"
    count = ("journalctl", "--output=cat", "--unit=bento-populate.service", "--grep=Failed with result")
    server.wait_for(lambda: len(server.run(*count).stdout.splitlines()) > 2, 30, runs)
    said = told(server)
    assert said.startswith("bento: begins: h1: not published for ") and said.count("\n") == 1
    configure(server, "v3")
    server.wait_for(lambda: told(server).count("\n") == 2, 30, "it is over")
    assert told(server).startswith(f"{said}bento: over: h1: not published (since ")
    server.run("systemctl", "stop", "bento-populate.timer", "bento-status.timer")


def test_the_store_for_those_who_know_a_name(server: Server) -> None:
    server.run("systemctl", "start", "bento-cache-key.service")
    assert server.run("stat", "--format=%a", "/var/lib/bento-cache/key").stdout == "600\n"
    public = server.read("/var/lib/bento-cache/key.pub")
    assert public.startswith("nixos-bento:")
    server.run("systemctl", "start", "bento-cache-key.service")
    assert server.read("/var/lib/bento-cache/key.pub") == public
    path = server.run("nix-store", "--add", "/etc/hostname").stdout.strip()
    server.run("nix", "store", "sign", "--key-file", "/var/lib/bento-cache/key", path)
    server.write("/root/.ssh/config", "Host *\n  StrictHostKeyChecking no\n  IdentityFile /root/id\n", 0o600)
    store = "ssh://bento-cache@server?ssh-key=/root/id"

    trusted = ("--option", "trusted-public-keys", public.strip())
    server.run("nix", "copy", "--from", store, "--to", "/root/copy", *trusted, path)
    assert server.read(f"/root/copy{path}") == "server\n"
    with pytest.raises(LabError, match="not supported"):
        server.run("nix", "path-info", "--all", "--store", store)
    with pytest.raises(LabError, match="protocol mismatch"):
        server.run("nix", "path-info", path, "--store", store.replace("ssh://", "ssh-ng://"))
    # What the server does not have, nobody puts there.
    server.run("nix-store", "--delete", path)
    with pytest.raises(LabError, match="not allowed"):
        server.run("nix", "copy", "--no-check-sigs", "--from", "/root/copy", "--to", store, path)
    assert not server.exists(path)
    done = server.run("ssh", "-T", "bento-cache@server", "id", check=False, stdin="garbage " * 8)
    assert done.returncode != 0 and done.stdout == "" and "error: " in done.stderr
