"""The options of fleet.nix: what they evaluate to, what the real programs make of that, and pushes from a laptop."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accounts import add_user, need_accounts
from fleet import report_data
from sshd import command
from test_modules import (
    REPO,
    analyze,
    evaluate,
    example_keys,
    golden,
    nix_list,
    nix_path,
    pretty,
    render_units,
    write_fleet,
    write_units,
)
from toynixos import need

PAGES = 'page = "/var/www/bento/index.html"; prometheus = "/var/lib/node exporter/bento.prom";'
FULL = f"""{{
  services.bento-server = {{
    bento = {nix_path(REPO)};
    fleet = "/srv/the fleet's";
    chrootDir = "/srv/chroot";
    populate = {{ enable = true; interval = "hourly"; arguments = [ "--build" "-j" "4" ]; }};
    status = {{ enable = true; arguments = [ "--offline-after" "72" ]; {PAGES} }};
    notify = "mail -s Bento admin@example.org";
    cache.enable = true;
  }};
}}"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    return write_fleet(tmp_path / "fleet", example_keys())


def server_units(*modules: str | Path, inline: bool = False) -> Any:
    return evaluate(f"m: (m {{ inline = {json.dumps(inline)}; }}).serverUnits [ {nix_list(modules)} ]")


def settings(text: str) -> str:
    return f"{{ services.bento-server = {{ {text} }}; }}"


# --- what it says ---


def test_options(fleet: Path) -> None:
    golden("fleet-options.json", pretty(evaluate(f"m: (m {{ }}).serverOptions {nix_path(fleet)}")))


def test_full(fleet: Path) -> None:
    server = server_units(fleet, FULL)
    units = {f"{name}\n{text}" for name, text in render_units(server).items()}
    units |= {f"{name}.sh\n{unit['script']}" for name, unit in server["services"].items()}
    units |= {f"bento\n{server['commands'][0]}", f"nix.settings\n{pretty(server['settings'])}"}
    golden("fleet-full.txt", "\n".join(f"### {text}" for text in sorted(units)))


def test_it_is_off(fleet: Path) -> None:
    """But for the command, which is there where bento.py is."""
    server = server_units(fleet)
    assert server == {"commands": [], "failed": [], "services": {}, "timers": {}, "settings": {}}
    for place in (fleet.parent, fleet.parent / "bento"):
        place.mkdir(exist_ok=True)
        (place / "bento.py").touch()
        [command] = server_units(fleet)["commands"]
        assert f"export BENTO_DIR={fleet.parent}\n" in command
        assert "export BENTO_CHROOT_DIR=/home/chroot\n" in command
        (place / "bento.py").unlink()


def test_a_timer_without_a_command(fleet: Path) -> None:
    [failed] = server_units(fleet, settings("populate.enable = true;"))["failed"]
    assert "services.bento-server.bento: say where bento.py lies" in failed


def test_other_chroots(fleet: Path) -> None:
    server = evaluate(f"m: (m {{ }}).server [ {nix_list([fleet, FULL])} ]")
    assert server["users"]["bento-t470"]["home"] == "/srv/chroot/t470"
    assert {'d "/srv/chroot/t470" 0750 root bento -', 'd "/var/lib/node exporter" - - - -'} <= set(server["tmpfiles"])
    assert len(server["users"]["bento-cache"]["openssh"]["authorizedKeys"]["keys"]) == 3
    limits = {(limit["domain"], limit["item"]): limit["value"] for limit in server["limits"]}
    assert (limits["bento-t470", "nproc"], limits["bento-cache", "nproc"], limits["bento-cache", "nofile"]) == (16, 28, 64)


def test_the_rule_of_pam_skips_pam_systemd_or_nothing(fleet: Path) -> None:
    """It skips the rule after it. On a server that starts no sessions that would be the hosts' limits."""
    off = "{ security.pam.services.sshd.rules.session.systemd.enable = false; }"
    enabled = [
        evaluate(f"m: (m {{ }}).server [ {nix_list([fleet, module])} ]")["pam"]["sshd"]["rules"]["session"]["systemd-not-for-bento"]["enable"]
        for module in ("{ }", off)
    ]
    assert enabled == [True, False]


# --- for real programs ---


def test_units_verify(fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "network-online.target").write_text("[Unit]\nDescription=Network\n")
    (tmp_path / "nix-daemon.service").write_text("[Service]\nExecStart=/bin/true\n")
    done = analyze("verify", "--man=no", *write_units(tmp_path, server_units(fleet, FULL)))
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if str(tmp_path) in line or "bento" in line], done.stderr
    assert analyze("calendar", "*:0/5").returncode == 0


@pytest.mark.parametrize(("unit", "exposure"), [("bento-populate", 3.9), ("bento-status", 2.3), ("bento-cache-key", 1.5)])
def test_units_security(unit: str, exposure: float, fleet: Path, tmp_path: Path) -> None:
    paths = write_units(tmp_path, server_units(fleet, FULL))
    [path] = [p for p in paths if p.name == f"{unit}.service"]
    done = analyze("security", "--offline=true", "--no-pager", path)
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= exposure, done.stdout


def make_command(fleet: Path, chroots: Path, directory: Path) -> Path:
    """The command `bento` as the module makes it, with this machine's programs."""
    module = settings(f"bento = {nix_path(REPO)}; fleet = {json.dumps(str(fleet.parent))}; chrootDir = {json.dumps(str(chroots))};")
    [text] = server_units(fleet, module, inline=True)["commands"]
    begin, end = text.index(" -X utf8 ") + len(" -X utf8 "), text.rindex('/bento.py "$@"')
    build = text[begin:end]
    for name in ("bento.py", "bento_client.py", "fleet.nix.in", "utils/bento.nix"):
        build = re.sub(rf"/nix/store/\S+-{Path(name).name}", shlex.quote(str(REPO / name)), build)
    out, command = directory / "bento-made", directory / "bin" / "bento"
    subprocess.run([need("bash"), "-euc", build], env=os.environ | {"out": str(out)}, check=True)
    text = re.sub(r"\S+/bin/python3", sys.executable, text[:begin] + str(out) + text[end:])
    command.parent.mkdir()
    command.write_text(f"#!{need('bash')}\n{text}")
    command.chmod(0o755)
    return command


def test_command(fleet: Path, tmp_path: Path) -> None:
    """It works on the fleet that it was told, or on another; what it needs of Bento is all there."""
    command = make_command(fleet, tmp_path / "chroots", tmp_path)

    def run(*words: str, **env: str) -> str:
        done = subprocess.run([command, *words], cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("fleet") == "fleet.nix: written, 3 hosts; include it in this server's configuration and switch\n"
    assert f'chrootDir = "{tmp_path}/chroots";' in fleet.read_text()
    assert "hosts/new/: made, and utils/, a copy of Bento's;" in run("add", "new")
    (tmp_path / "other/hosts/only").mkdir(parents=True)
    assert "\nonly " in run("status", BENTO_DIR=f"{tmp_path}/other") and "1 host" in run("status", BENTO_DIR=f"{tmp_path}/other")


def test_a_person_is_told_once(fleet: Path, tmp_path: Path) -> None:
    """When it begins, and when it is over; again if that could not be done."""
    module = settings(f"notify = ''cat >> {tmp_path}/told; test ! -e {tmp_path}/broken'';")
    services = server_units(fleet, module)["services"]
    assert services["bento-status"]["onFailure"] == services["bento-status"]["onSuccess"] == ["bento-notify.service"]
    command = make_command(fleet, tmp_path / "chroots", tmp_path)
    looks, tells = (re.sub(r"/nix/store/\S+/bin/bento\b", str(command), services[f"bento-{name}"]["script"]) for name in ("status", "notify"))
    assert services["bento-status"]["after"] == ["bento-notify.service"]
    hosts = fleet.parent / "hosts"

    def look(code: int = 0) -> str:
        (tmp_path / "told").write_text("")
        env = {"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(tmp_path / "state")}
        (tmp_path / "state").mkdir(exist_ok=True)
        looked = subprocess.run(["bash", "-ec", looks], env=env, capture_output=True, text=True, timeout=60)
        assert looked.returncode == int("is not in hosts/" in looked.stderr or "looked at: " in looked.stderr or report.exists()), looked.stderr
        done = subprocess.run(["bash", "-ec", tells], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        return (tmp_path / "told").read_text()

    report = tmp_path / "chroots/ghost/logs/status.json"
    assert look() == ""
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps(report_data(host="ghost")))
    (tmp_path / "broken").touch()
    begins = look(code=1)
    assert begins.startswith("bento: begins: ghost: it is not in hosts/") and begins.count("\n") == 1
    (tmp_path / "broken").unlink()
    assert look().split(",")[0] == begins.split(",")[0]
    assert look() == ""
    hosts.rename(tmp_path / "away")
    assert look().startswith(f"bento: begins: the fleet cannot be looked at: {hosts}: ")
    (tmp_path / "away").rename(hosts)
    assert look().startswith("bento: over: the fleet cannot be looked at (since ")
    report.unlink()
    assert look().startswith("bento: over: ghost: not in hosts/ (since ")
    assert look() == ""


def test_sshd_takes_the_cache(fleet: Path, tmp_path: Path) -> None:
    """The account has the one command, and nobody else has."""
    text = evaluate(f"m: (m {{ }}).server [ {nix_list([fleet, FULL])} ]")["extraConfig"]
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True, timeout=60)
    (tmp_path / "sshd_config").write_text(f"HostKey {tmp_path}/key\nPasswordAuthentication yes\nAllowUsers alice\n{text}")

    def seen(user: str) -> list[str]:
        who = f"user={user},host=h,addr=192.0.2.1"
        argv = command(need("sshd"), "-T", "-f", tmp_path / "sshd_config", "-C", who)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    serve = "forcecommand /nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-nix/bin/nix-store --serve"
    closed = {"permittty no", "disableforwarding yes", "passwordauthentication no", "allowusers bento-cache", "allowgroups bento-cache"}
    assert {serve} | closed <= set(seen("bento-cache"))
    assert serve not in seen("alice") and "passwordauthentication yes" in seen("alice")


# --- pushes ---

# As README has them, but for the names of places and people.
ON_THE_SERVER = r"""
cd /etc/bento-fleet
git config receive.denyCurrentBranch updateInstead
printf '#!/bin/sh\nexec bento populate --wait\n' > .git/hooks/post-receive
chmod +x .git/hooks/post-receive
"""
ON_THE_LAPTOP = r"""
git clone root@bento.example.org:/etc/bento-fleet
cd bento-fleet
echo '{ networking.hostName = "t470"; }' > hosts/t470/configuration.nix
git commit -am "t470: a name"
git push
"""


def test_push_from_a_laptop(tmp_path: Path) -> None:
    """The push publishes, and says so; the next one that the server refuses to take changes nothing."""
    need_accounts()
    fleet = write_fleet(tmp_path / "server/bento-fleet", example_keys()).parent
    for host in example_keys():
        (fleet / "hosts" / host / "configuration.nix").write_text("{ }\n")
        add_user(f"bento-{host}", "bento")
    program = make_command(fleet / "fleet.nix", tmp_path / "chroots", tmp_path)
    env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig")}

    def shell(text: str, where: Path) -> subprocess.CompletedProcess[str]:
        text = text.replace("root@bento.example.org:/etc/bento-fleet", str(fleet)).replace("/etc/bento-fleet", str(fleet))
        where.mkdir(exist_ok=True)
        return subprocess.run(["bash", "-ec", text], cwd=where, env=env, capture_output=True, text=True, timeout=120)

    begin = "git config --global user.email a@b; git config --global user.name A; git init -qb main; git add .; git commit -qm 1"
    for text, where in ((begin, fleet), (ON_THE_SERVER, tmp_path)):
        done = shell(text, where)
        assert done.returncode == 0, done.stderr
    done = shell(ON_THE_LAPTOP, tmp_path / "laptop")
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^remote: t470: published [0-9a-f]{12} ", done.stderr), done.stderr
    current = tmp_path / "chroots/t470/current.json"
    assert json.loads(current.read_text())["revision"].endswith(" t470: a name")
    before = current.read_bytes()
    (fleet / "hosts/t470/configuration.nix").write_text("{ edited = here; }\n")
    done = shell("echo '{ }' > hosts/t470/configuration.nix; git commit -qam 3; git push", tmp_path / "laptop/bento-fleet")
    assert done.returncode == 1 and "Working directory has unstaged changes" in done.stderr
    assert current.read_bytes() == before
