"""The NixOS modules: what they evaluate to, and what the real programs make of that.

tests/evalmodules.nix stands in for Nixpkgs' lib. With BENTO_NIXPKGS_LIB (the path of a Nixpkgs' `lib/`) everything is
evaluated with the real one too, and must come out the same. BENTO_GOLDEN=write rewrites the golden files.
"""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from accounts import need_accounts
from boot.initrd import trial_ends
from toynixos import PYTHON_FLAGS, need

import bento_client
from bento_client import Settings, find_loader

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
GOLDEN = TESTS / "golden"
HOST_MODULE = REPO / "utils" / "bento.nix"
HOSTS = ("nas", "router", "t470")

# Substituters would be asked for each store path, and there is no network.
NIX = {"NIX_CONFIG": "substitute = false\nexperimental-features = nix-command flakes\n"}

FULL = """{
  networking.hostName = "t470";
  networking.proxy.envVars.https_proxy = "http://proxy.example.org:3128";
  nix.envVars.SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
  services.bento = {
    server = [ "bento.example.org" "2001:db8::1" ];
    port = 2222;
    host = "laptop_1";
    user = "someone";
    identity = "/etc/ssh/ssh_host_ed25519_key";
    serverKeys = [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEJFTlRPIEVYQU1QTEUgS0VZIERPIE5PVCBVU0UhISEh a comment" ];
    signers = [ "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAA alice" "ssh-ed25519 AAAA1234" ];
    cacheKey = "bento-1:AAAA";
    sshOptions = [ "ProxyCommand=nc -X 5 -x 127.0.0.1:9050 %h %p" ];
    interval = "hourly";
    randomizedDelay = "1h";
    connectTimeout = 60;
    buildTimeout = 3600;
    activationTimeout = 300;
    confirmTimeout = 30;
    healthChecks = [ "systemctl is-active nginx.service" "echo \\"it's $HOME\\"" ];
    upgradeChannels = true;
    rebuildEvery = 604800;
    activation = "boot";
    afterDeployment = [ "wall \\"$BENTO_RESULT\\"" ];
    reboot = "23:00-05:30";
    offlineAfter = 168;
    stateDir = "/var/lib/fleet/bento";
    trigger = { enable = true; port = 4444; };
  };
}"""
MINIMAL = '{ services.bento.server = "bento.example.org"; }'


# --- Nix ---


def nix_path(path: Path) -> str:
    """A path in Nix' language, which takes no others than plain letters as they are."""
    return f"(/. + {json.dumps(str(path), ensure_ascii=False)})"


def nix_list(modules: Iterable[str | Path]) -> str:
    return " ".join(nix_path(module) if isinstance(module, Path) else f"({module})" for module in modules)


def evaluate(expression: str) -> Any:
    """The value of a Nix function of tests/modules.nix."""
    need("nix-instantiate")
    libraries = [""]
    if real := os.environ.get("BENTO_NIXPKGS_LIB"):
        libraries.append(f"lib = import {real};")
    values = []
    for library in libraries:
        argv = ["nix-instantiate", "--eval", "--strict", "--json", "--expr"]
        text = f"({expression}) (arguments: import {nix_path(TESTS / 'modules.nix')} ({{ {library} }} // arguments))"
        done = subprocess.run([*argv, text], env=os.environ | NIX, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        values.append(json.loads(done.stdout))
    assert all(value == values[0] for value in values), "our own lib and Nixpkgs' disagree"
    return values[0]


def evaluate_host(*modules: str | Path, inline: bool = False, native: bool = True) -> Any:
    arguments = f"inline = {json.dumps(inline)}; native = {json.dumps(native)};"
    return evaluate(f"m: (m {{ {arguments} }}).host [ {nix_list(modules)} ]")


def need_root(what: str) -> None:
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("BENTO_TESTS") == "all" else pytest.skip)(f"needs root {what}")


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("BENTO_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; BENTO_GOLDEN=write rewrites it"


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


# --- units ---


def render_section(name: str, settings: Mapping[str, Any]) -> list[str]:
    lines = [f"[{name}]"]
    for key, value in settings.items():
        for item in value if isinstance(value, list) else [value]:
            lines.append(f"{key}={str(item).lower() if isinstance(item, bool) else item}")
    return [*lines, ""]


def render_unit(kind: str, unit: Mapping[str, Any]) -> str:
    """A unit's file, much as NixOS writes it."""
    known = {
        "description", "after", "before", "wants", "wantedBy", "onFailure", "onSuccess", "unitConfig", "environment",
        "restartIfChanged", "path", "script", "serviceConfig", "timerConfig", "socketConfig",
    }  # fmt: skip
    assert set(unit) <= known, f"render_unit does not know {set(unit) - known}"
    head = {"Description": unit["description"]}
    for key in ("after", "before", "wants", "onFailure", "onSuccess"):
        if key in unit:
            head[key[0].upper() + key[1:]] = unit[key]
    body = dict(unit.get(f"{kind}Config", {}))
    if "script" in unit:
        body = {"ExecStart": "/nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-script", **body}
    if unit.get("restartIfChanged") is False:
        body = {"X-RestartIfChanged": False, **body}
    if "environment" in unit:
        body = {"Environment": [f'"{key}={value}"' for key, value in unit["environment"].items()], **body}
    lines = render_section("Unit", head | unit.get("unitConfig", {})) + render_section(kind.title(), body)
    if "wantedBy" in unit:
        lines += render_section("Install", {"WantedBy": unit["wantedBy"]})
    return "\n".join(lines)


def render_units(host: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{name}.{kind}": render_unit(kind, unit)
        for kind in ("service", "socket", "timer")
        for name, unit in sorted(host.get(f"{kind}s", {}).items())
    }


def write_units(directory: Path, host: Mapping[str, Any]) -> list[Path]:
    """The units for systemd-analyze: with programs that exist, and an instance of each template."""
    paths = []
    for name, text in render_units(host).items():
        path = directory / name.replace("@", "@1")
        path.write_text(re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", text), encoding="utf-8")
        paths.append(path)
        if "@" in name:
            (directory / name).write_text(path.read_text())
    return paths


def analyze(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    if not Path("/run/systemd").exists():
        need_root("which newer ones want, to make /run/systemd")
    return subprocess.run(
        [need("systemd-analyze"), *map(str, argv)],
        env=os.environ | {"SYSTEMD_COLORS": "0", "SYSTEMD_LOG_COLOR": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- every file ---


def nix_files() -> list[Path]:
    return sorted(p for d in ("utils", "hosts", "tests") for p in (REPO / d).rglob("*.nix") if not p.is_symlink())


@pytest.mark.parametrize("path", nix_files(), ids=lambda p: str(p.relative_to(REPO)))
def test_nix_file_parses(path: Path) -> None:
    done = subprocess.run([need("nix-instantiate"), "--parse", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- the host's module ---


def test_options() -> None:
    golden("host-options.json", pretty(evaluate(f"m: (m {{ }}).options {nix_path(HOST_MODULE)}")))


@pytest.mark.parametrize(("name", "module"), [("minimal", MINIMAL), ("full", FULL)])
def test_host(name: str, module: str) -> None:
    host = evaluate_host(HOST_MODULE, module)
    golden(f"host-{name}-settings.json", pretty(host["settings"]))
    golden(f"host-{name}-command.sh", "".join(host["commands"]))
    units = render_units(host)
    for unit in host["services"].values():
        if "script" in unit:
            units["bento-trigger"] = unit["script"]
    golden(f"host-{name}-units.txt", "\n".join(f"### {name}\n{text}" for name, text in units.items()))


def test_disabled() -> None:
    module = "{ services.bento.enable = false; }"
    config = f"m: let c = ((m {{ }}).eval [ {nix_path(HOST_MODULE)} {module} ]).config; in"
    systemd = evaluate(f"{config} builtins.removeAttrs c.systemd [ ''package'' ]")
    untouched = {"enableEmergencyMode": True, "settings": {"Manager": {}}, "tmpfiles": {"rules": []}}
    assert systemd == {"services": {}, "sockets": {}, "timers": {}} | untouched
    assert evaluate(f"{config} [ c.boot.kernelParams c.boot.loader.grub.extraConfig ]") == [[], ""]


def test_the_client_takes_every_setting() -> None:
    settings = evaluate_host(HOST_MODULE, FULL)["settings"]
    # `root` is for tests; a running NixOS has its root in one place.
    assert set(settings) == set(bento_client.Settings._fields) - {"root"}
    made = bento_client.make_settings(settings, "client.json")
    assert made.host == "laptop_1" and made.reboot == "23:00-05:30"
    assert made.server == ("bento.example.org", "2001:db8::1")


def test_the_defaults_are_the_clients() -> None:
    settings = evaluate_host(HOST_MODULE, MINIMAL)["settings"]
    ours = bento_client.make_settings(settings, "client.json")
    theirs = bento_client.make_settings({"server": "bento.example.org", "host": "nixos"}, "defaults")
    assert ours.identity_file == theirs.identity_file
    names = set(bento_client.Settings._fields) - {"identity"}
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


@pytest.mark.parametrize(
    ("definitions", "python"),
    [
        ('system.nixos.release = "24.05";', "python3Minimal"),
        ('system.nixos.release = "24.05"; boot.loader.systemd-boot.enable = true;', "python3"),
        ('system.nixos.release = "25.05";', "python3Minimal"),
        ('system.nixos.release = "25.05"; system.rebuild.enableNg = true;', "python3"),
        ('system.nixos.release = "25.11";', "python3"),
        # A removed option: reading it is an error.
        ('system.nixos.release = "26.05"; system.rebuild.enableNg = throw "removed";', "python3"),
    ],
)
def test_python(definitions: str, python: str) -> None:
    [command] = evaluate_host(HOST_MODULE, MINIMAL, f"{{ {definitions} }}")["commands"]
    assert f"-{python}/bin/python3 -I -S -X utf8 " in command


@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        ("server = [ ];", "services.bento.server cannot be []"),
        ('server = "";', 'services.bento.server cannot be ""'),
        ('server = "bento.example.org:22";', "The port goes to services.bento.port"),
        ('server = "root@bento.example.org";', "the user to services.bento.user"),
        ('server = [ "a.example" "-oProxyCommand=x" ];', "services.bento.server cannot be"),
        ('host = "";', 'services.bento.host cannot be ""'),
        ('host = "a.b";', 'services.bento.host cannot be "a.b"'),
        ('host = "abcdefghijklmnopqrstuvwxyz";', "1 to 25 of"),
        ('identity = "/nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-id";', "everybody can read the Nix store"),
        ('identity = "id";', "the absolute path"),
        ('serverKeys = [ "bento.example.org ssh-ed25519 AAAA1234" ];', "Remove the host name"),
        ('serverKeys = [ "SHA256:abc" ];', "a key is"),
        ('signers = [ "SHA256:abc" ];', "services.bento.signers: a key is"),
        ('build = "server"; signers = [ "ssh-ed25519 AAAA1234" ];', "services.bento.cacheKey: with"),
        ('server = [ "a.example" "b.example" ];', "services.bento.server is a list: set services.bento.serverKeys, or"),
        ('serverKeys = [ "ssh-ed25519 AAAA1234" ]; knownHosts = "/x";', "exclude each other"),
        ('stateDir = "/srv/bento";', "in /var/lib\nonly"),
        ('stateDir = "/var/lib/";', 'services.bento.stateDir cannot be "/var/lib/"'),
        ("}; nix.enable = false; x = {", "remove `nix.enable = false`"),
        ("}; system.switch.enable = false; x = {", "remove `system.switch.enable = false`"),
        ("}; system.autoUpgrade.enable = true; x = {", "remove `system.autoUpgrade.enable = true`"),
        ("upgradeChannels = true; }; nix.channel.enable = false; x = {", "upgradeChannels and rebuildEvery need channels"),
        ("rebuildEvery = 604800; }; nix.channel.enable = false; x = {", "upgradeChannels and rebuildEvery need channels"),
    ],
)
def test_assertion(definitions: str, message: str) -> None:
    server = "" if re.search(r"\bserver =", definitions) else 'server = "bento.example.org";'
    host = evaluate_host(HOST_MODULE, f"{{ services.bento = {{ {server} {definitions} }}; }}")
    assert len(host["failed"]) == 1, host["failed"]
    assert message in host["failed"][0]


@pytest.mark.parametrize(
    "definitions",
    [
        "port = 70000;",
        "port = 22.5;",
        "server = 1;",
        'reboot = "always";',
        'reboot = "25:00-03:00";',
        "connectTimeout = 0;",
        "identity = ./key;",
        'serverKeys = [ "ssh-ed25519 AAAA1234\\nssh-ed25519 AAAA5678" ];',
        'healthChecks = "true";',
    ],
)
def test_type(definitions: str) -> None:
    server = "" if "server =" in definitions else 'server = "bento.example.org";'
    with pytest.raises(AssertionError, match="is not of type"):
        evaluate_host(HOST_MODULE, f"{{ services.bento = {{ {server} {definitions} }}; }}")


def test_without_a_server_the_option_is_named() -> None:
    with pytest.raises(AssertionError, match=r"services\.bento\.server"):
        evaluate_host(HOST_MODULE)


@pytest.mark.parametrize("name", ["bento.example.org", "[bento.example.org]:2222", "[2001:db8::1]:2222", "alias"])
def test_known_hosts(name: str, tmp_path: Path) -> None:
    """Whatever the server is called, ssh finds its keys in the file, and no others."""
    text = evaluate_host(HOST_MODULE, FULL, inline=True)["settings"]["known_hosts"]
    path = tmp_path / "known_hosts"
    path.write_text(text)
    done = subprocess.run([need("ssh-keygen"), "-F", name, "-f", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == text.splitlines()


def test_command(tmp_path: Path) -> None:
    """The command hands its arguments on as they are, and runs the client that lies beside the module."""
    [text] = evaluate_host(HOST_MODULE, MINIMAL)["commands"]
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PATH" "$@"\n')
    python.chmod(0o755)
    text = re.sub(r"exec \S+/bin/python3", f"exec {python}", text)
    arguments = ["run", "", "a b", "*", "$HOME", "--force"]
    done = subprocess.run(
        [need("bash"), "-euc", text, "bento-client", *arguments],
        env={"PATH": "/mine"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    path, *flags = done.stdout.splitlines()
    flags, client, rest = flags[: len(PYTHON_FLAGS)], flags[len(PYTHON_FLAGS)], flags[len(PYTHON_FLAGS) + 1 :]
    assert path.startswith("/nix/store/") and path.endswith("/bin:/mine")
    assert tuple(flags) == PYTHON_FLAGS and client.endswith("-bento_client.pyc")
    assert rest == ["--config", "/etc/bento/client.json", *arguments]
    assert (HOST_MODULE.parent / "bento_client.py").samefile(REPO / "bento_client.py")


def test_the_client_is_compiled(tmp_path: Path) -> None:
    """By the Python that runs it, into a file that runs as the client does."""
    [text] = evaluate_host(HOST_MODULE, MINIMAL, inline=True)["commands"]
    script = text.partition(f"python3 {' '.join(PYTHON_FLAGS)} ")[2].rpartition(" --config ")[0]
    script, count = re.subn(r"\S+/bin/python3", sys.executable, script)
    script = re.sub(r"/nix/store/\S+-bento_client\.py", shlex.quote(str(REPO / "bento_client.py")), script)
    assert count == 1 and "/nix/store/" not in script
    out = tmp_path / "out"
    subprocess.run([need("bash"), "-euc", script], cwd=tmp_path, env={"PATH": os.environ["PATH"], "out": str(out)}, check=True)
    assert list(tmp_path.iterdir()) == [out]
    out = out.rename(tmp_path / "bento_client.pyc")
    done = subprocess.run([sys.executable, *PYTHON_FLAGS, out, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{bento_client.VERSION}\n", "")


def test_a_client_for_another_kind_of_machine_is_left_as_it_is() -> None:
    [command] = evaluate_host(HOST_MODULE, MINIMAL, native=False)["commands"]
    assert "-bento_client.py --config" in command


# --- its boot ---

SYSTEMD_BOOT = "boot.loader.systemd-boot.enable = true;"
GRUB = 'boot.loader.grub = { enable = true; mirroredBoots = [ { path = "/boot"; } { path = "/boot-b"; } ]; };'


def evaluate_boot(definitions: str, old: bool = False) -> Any:
    arguments = f"old = {json.dumps(old)};"
    return evaluate(f"m: (m {{ {arguments} }}).boot [ {nix_path(HOST_MODULE)} {MINIMAL} {{ {definitions} }} ]")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("definitions", "loader"),
    [
        ("", []),
        (SYSTEMD_BOOT, ["systemd-boot", "/boot"]),
        (SYSTEMD_BOOT + 'boot.loader.efi.efiSysMountPoint = "/efi";', ["systemd-boot", "/efi"]),
        (GRUB, ["grub", "/boot/grub", "/boot-b/grub"]),
    ],
)
def test_boot_loader(definitions: str, loader: list[str], old: bool) -> None:
    assert evaluate_boot(definitions, old)["loader"] == loader


LOADERS = {
    "systemd-boot": (SYSTEMD_BOOT, "systemd-boot"),
    "lanzaboote": ("boot.lanzaboote.enable = true;", "systemd-boot"),
    "grub": (GRUB, "grub"),
} | {
    name: (f"boot.loader.{name}.enable = true;", "none")
    for name in ("limine", "refind", "generic-extlinux-compatible", "generationsDir", "initScript", "external")
}  # fmt: skip


def test_the_manual_names_all_boot_loaders() -> None:
    text = (REPO / "utils/manual.md").read_text(encoding="utf-8").partition("### Which boot loaders")[2].partition("\n##")[0]
    assert re.findall(r"(?m)^\| `boot\.(?:loader\.)?([^`]+)` \|", text) == list(LOADERS)


@pytest.mark.parametrize("name", LOADERS)
def test_what_each_boot_loader_is_to_the_client(name: str, tmp_path: Path) -> None:
    """As the manual's table has it: what can be told, and else the boot loader's name."""
    definitions, way = LOADERS[name]
    boot = evaluate_boot(definitions)
    assert boot["loader"][0] == name and (boot["ends"] is not None) == (way != "none")
    said = find_loader(Settings(root=str(tmp_path), boot_loader=tuple(boot["loader"]))).trial_way()
    if way == "none":
        assert boot["loader"] == [name] and said == f"none: {name} cannot be told to start a system just once"
    else:
        assert len(boot["loader"]) > 1 and "cannot be told" not in said
    text = (REPO / "utils/manual.md").read_text(encoding="utf-8")
    [row] = re.findall(rf"(?m)^\| `boot\.(?:loader\.)?{name}` \| ([^|]+) \|", text)
    assert row.startswith("no") == (way == "none")


def test_boot_loader_with_its_own_partition() -> None:
    definitions = SYSTEMD_BOOT + 'boot.loader.systemd-boot.xbootldrMountPoint = "/xboot";'
    assert evaluate_boot(definitions)["loader"] == ["systemd-boot", "/xboot"]


def test_grub_follows_the_client() -> None:
    """The lines are there with GRUB only, and the client knows them."""
    text = evaluate_boot(GRUB + 'boot.loader.grub.extraConfig = "set color_normal=white/black";')["grub"]
    assert bento_client.GRUB_MARK in text.splitlines() and "set color_normal=white/black" in text
    assert {bento_client.GRUB_GOOD, bento_client.GRUB_TRY} <= set(re.findall(r"bento_\w+", text))
    assert evaluate_boot(SYSTEMD_BOOT)["grub"] == ""
    assert evaluate_boot(GRUB + "boot.loader.grub.users.root.password = null;")["grub"] == ""


@pytest.mark.parametrize("old", [False, True])
def test_unattended(old: bool) -> None:
    boot = evaluate_boot('boot.kernelParams = [ "quiet" ];', old)
    assert boot["params"] == ["panic=30", "boot.panic_on_fail", "quiet"]
    assert not boot["emergency"] and boot["watchdog"] == "30s"


@pytest.mark.parametrize("old", [False, True])
def test_attended(old: bool) -> None:
    """One option for all, or each by itself."""
    off = evaluate_boot("services.bento.unattended = false;", old)
    assert (off["params"], off["emergency"], off["watchdog"]) == ([], True, None)
    watchdog = "watchdog.runtimeTime" if old else "settings.Manager.RuntimeWatchdogSec"
    own = f'boot.kernelParams = [ "panic=0" ]; systemd.enableEmergencyMode = true; systemd.{watchdog} = "1min";'
    boot = evaluate_boot(own, old)
    # The kernel takes the last one.
    assert (boot["params"][-1], boot["emergency"], boot["watchdog"]) == ("panic=0", True, "1min")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("definitions", "asks"), [("", False), ("keyFile = \"/k\";", False), ("device = \"/dev/x\";", True)])
def test_what_ends_a_trial(old: bool, definitions: str, asks: bool) -> None:
    """In the initrd, whichever kind it is; the same unit in both stages, for systemd stops what only the first has."""
    luks = f"boot.initrd.luks.devices.root = {{ {definitions} }};" if definitions else ""
    boot = evaluate_boot(SYSTEMD_BOOT + luks, old)
    assert boot["asks"] == asks
    if old:
        assert "exec -a @bento-trial bash" in boot["initrd"]["preDeviceCommands"]
    else:
        units = boot["initrd"]["systemd"]["services"]["bento-trial-ends"], boot["ends"]
        assert all(unit["unitConfig"]["FailureAction"] == "reboot-force" for unit in units)
        assert all("@bento-trial" in unit["serviceConfig"]["ExecStart"] for unit in units)
    off = evaluate_boot(SYSTEMD_BOOT + "services.bento.unattended = false;", old)
    assert off["ends"] is None and off["initrd"]["availableKernelModules"] == []


# --- its units, for real programs ---


@pytest.mark.parametrize("module", [MINIMAL, FULL], ids=["minimal", "full"])
def test_units_verify(module: str, tmp_path: Path) -> None:
    paths = write_units(tmp_path, evaluate_host(HOST_MODULE, module))
    (tmp_path / "network-online.target").write_text("[Unit]\nDescription=Network\n")
    done = analyze("verify", "--man=no", *paths)
    # X-… is for NixOS' switch, which systemd knows to leave alone.
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if str(tmp_path) in line or "bento" in line], done.stderr


@pytest.mark.parametrize(("unit", "exposure"), [("bento.service", 5.8), ("bento-trigger@1.service", 2.0)])
def test_units_security(unit: str, exposure: float, tmp_path: Path) -> None:
    paths = write_units(tmp_path, evaluate_host(HOST_MODULE, FULL))
    [path] = [p for p in paths if p.name == unit]
    done = analyze("security", "--offline=true", "--no-pager", path)
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= exposure, done.stdout


@pytest.mark.parametrize("module", [MINIMAL, FULL], ids=["minimal", "full"])
def test_units_times(module: str) -> None:
    timers = evaluate_host(HOST_MODULE, module)["timers"]
    assert analyze("calendar", timers["bento"]["timerConfig"]["OnCalendar"]).returncode == 0
    for span in (
        timers["bento"]["timerConfig"]["RandomizedDelaySec"],
        timers["bento-boot"]["timerConfig"]["OnBootSec"],
    ):
        assert analyze("timespan", span).returncode == 0


def test_the_lists_of_the_sandbox_deny() -> None:
    """One line each: of several, the second would allow what it names."""
    config = evaluate_host(HOST_MODULE, MINIMAL)["services"]["bento"]["serviceConfig"]
    for key in ("CapabilityBoundingSet", "SystemCallFilter"):
        assert isinstance(config[key], str) and config[key].startswith("~") and "~" not in config[key][1:]
    # systemd asks for these of whoever starts units, and reboots.
    assert not {"CAP_SYS_ADMIN", "CAP_SYS_BOOT"} & set(config["CapabilityBoundingSet"][1:].split())


# What makes systemd give a unit a mount namespace of its own (exec_needs_mount_namespace in systemd's sources).
MOUNTING = {
    "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "InaccessiblePaths", "LogNamespace", "MountFlags",
    "NoExecPaths", "PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateTmp", "ProcSubset", "ProtectControlGroups",
    "ProtectHome", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc",
    "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths", "RootDirectory", "RootImage", "TemporaryFileSystem",
}  # fmt: skip


def test_the_client_sees_the_machine_as_it_is() -> None:
    config = evaluate_host(HOST_MODULE, FULL)["services"]["bento"]["serviceConfig"]
    assert not MOUNTING & set(config)


@pytest.mark.parametrize(
    ("code", "last"), [(0, "bento: done"), (1, "bento: failed; bento-client status tells root why")]
)
def test_trigger(code: int, last: str, tmp_path: Path) -> None:
    """The requester sees the log as it goes, then the outcome; and the journal's reader ends."""
    script = evaluate_host(HOST_MODULE, FULL)["services"]["bento-trigger@"]["script"]
    programs = {
        "journalctl": 'echo "$@"\nuntil [ -e started ]; do sleep 0.1; done\necho building\ntouch told\nexec sleep 60',
        "systemctl": '[ "$*" = "start --wait bento.service" ] || exit 9\ntouch started\n'
        f"until [ -e told ]; do sleep 0.1; done\nexit {code}",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert re.fullmatch(r"--follow --output=cat --since=@\d+ --unit=bento\.service", said[0])
    assert said[1:] == ["building", last]


# --- the examples ---


def blob(key: str) -> bytes:
    return base64.b64decode(key.split()[1])[-32:]


@pytest.mark.parametrize("host", HOSTS)
def test_example_key(host: str) -> None:
    """A key that parses, says what it is, and whose private half was never made."""
    path = REPO / "hosts" / f"{host}.pub"
    done = subprocess.run([need("ssh-keygen"), "-l", "-f", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("256 ") and done.stdout.endswith("(ED25519)\n")
    assert "EXAMPLE" in path.read_text().split()[2]
    assert blob(path.read_text()).decode().startswith(f"BENTO EXAMPLE KEY OF HOST {host}")


def test_example_host_keys() -> None:
    for path in (HOST_MODULE, REPO / "hosts" / "t470" / "configuration.nix"):
        [key] = re.findall(r'"(ssh-ed25519 AAAAC3[^"]+)"', path.read_text())
        assert blob(key).startswith(b"BENTO EXAMPLE KEY")


def test_examples_link_the_module() -> None:
    for host in HOSTS:
        link = REPO / "hosts" / host / "utils"
        assert link.is_symlink() and os.readlink(link) == "../../utils"


def test_example_with_channels() -> None:
    host = evaluate_host(REPO / "hosts" / "router" / "configuration.nix")
    assert host["settings"]["host"] == "router" and host["settings"]["upgrade_channels"] is True


@pytest.mark.parametrize("host", ["nas", "t470"])
def test_example_flake(host: str, tmp_path: Path) -> None:
    """The flake as a release holds it (links followed), with a Nixpkgs that has our lib only."""
    release, nixpkgs = tmp_path / host, tmp_path / "nixpkgs"
    shutil.copytree(REPO / "hosts" / host, release)
    nixpkgs.mkdir()
    for name in ("modules.nix", "evalmodules.nix"):
        shutil.copy(TESTS / name, nixpkgs)
    (nixpkgs / "flake.nix").write_text(
        "{ outputs = _: { lib.nixosSystem = { modules }: (import ./modules.nix { }).host modules; }; }"
    )
    done = subprocess.run(
        [need("nix"), "eval", "--json", "--no-write-lock-file", "--override-input", "nixpkgs", f"path:{nixpkgs}",
         f"path:{release}#nixosConfigurations.{host}"],
        env=os.environ | NIX | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["host"] == host


# --- the server's module ---

# What a comment may hold; each has a way out of a Nix string, an authorized_keys line or a shell word to try.
COMMENTS = [
    "plain@host",
    "''${x}'' ${builtins.abort \"x\"}",
    '"; in abort "x"',
    '\\" \\',
    "$(id) `id` $$${y}",
    "ü @HOSTS@",
]


def write_fleet(directory: Path, keys: Mapping[str, Sequence[str]], chroot_dir: str = "/home/chroot") -> Path:
    hosts = directory / "hosts"
    hosts.mkdir(parents=True)
    shutil.copy(REPO / "fleet.nix.in", directory)
    for name, lines in keys.items():
        (hosts / name).mkdir()
        (hosts / f"{name}.pub").write_text("".join(f"{line}\n" for line in lines))
    argv: list[str | Path] = [
        sys.executable,
        REPO / "bento.py",
        "--fleet",
        directory,
        "--chroot-dir",
        chroot_dir,
        "fleet",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return directory / "fleet.nix"


def example_keys() -> dict[str, list[str]]:
    return {host: [(REPO / "hosts" / f"{host}.pub").read_text().strip()] for host in HOSTS}


def make_key(seed: str) -> str:
    parts = [b"ssh-ed25519", seed.ljust(32, ".").encode()]
    return "ssh-ed25519 " + base64.b64encode(b"".join(len(p).to_bytes(4, "big") + p for p in parts)).decode()


def evaluate_server(*modules: str | Path) -> Any:
    return evaluate(f"m: (m {{ }}).server [ {nix_list(modules)} ]")


def sshd_block(text: str) -> str:
    found = re.search(r"(?ms)^Match Group bento.*?^Match All$\n", text)
    assert found is not None, text
    return found[0]


def test_fleet(tmp_path: Path) -> None:
    path = write_fleet(tmp_path / "fleet", example_keys())
    server = evaluate_server(path)
    golden("fleet-sshd_config", server["extraConfig"])
    golden("fleet.json", pretty({key: value for key, value in server.items() if key != "extraConfig"}))


def test_fleet_without_hosts(tmp_path: Path) -> None:
    server = evaluate_server(write_fleet(tmp_path / "fleet", {}))
    assert server["users"] == {} and server["groups"] == {"bento": {}}
    assert server["settings"]["MaxStartups"] == "10:30:100"


def test_fleet_keys_stay_strings(tmp_path: Path) -> None:
    keys = {f"h{n}": [f"{make_key(f'h{n}')} {comment}"] for n, comment in enumerate(COMMENTS)}
    users = evaluate_server(write_fleet(tmp_path / "fleet", keys))["users"]
    assert {name: user["openssh"]["authorizedKeys"]["keys"] for name, user in users.items()} == {
        f"bento-{name}": [f"restrict {key}" for key in lines] for name, lines in keys.items()
    }


def test_fleet_room_for_every_host(tmp_path: Path) -> None:
    keys = {f"h{n}": [make_key(f"h{n}")] for n in range(200)}
    path = write_fleet(tmp_path / "fleet", keys)
    assert evaluate_server(path)["settings"]["MaxStartups"] == "210:30:300"
    mine = evaluate_server(path, '{ services.openssh.settings.MaxStartups = "5:30:50"; }')
    assert mine["settings"]["MaxStartups"] == "5:30:50"


@pytest.mark.parametrize("chroot", ["srv/chroot", 'srv/a "b" %n \\ $x ${y} c'], ids=["plain", "strange"])
def test_fleet_tmpfiles(chroot: str, tmp_path: Path) -> None:
    """systemd makes the directories that sshd demands, whatever they are called."""
    tmpfiles = need("systemd-tmpfiles")
    need_root("to give files away")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nbento-t470:x:6001:6000::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nbento:x:6000:\n")
    keys = {"t470": example_keys()["t470"]}
    rules = evaluate_server(write_fleet(tmp_path / "fleet", keys, f"/{chroot}"))["tmpfiles"]
    (root / "bento.conf").write_text("".join(f"{rule}\n" for rule in rules))
    argv: list[str | Path] = [tmpfiles, "--create", f"--root={root}", root / "bento.conf"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    seen = {}
    for path in (root / "srv").rglob("*"):
        status = path.lstat()
        seen[str(path.relative_to(root / chroot))] = (oct(status.st_mode & 0o7777), status.st_uid, status.st_gid)
    assert seen == {".": ("0o755", 0, 0), "t470": ("0o750", 0, 6000), "t470/logs": ("0o750", 6001, 6000)}


def test_fleet_sshd_lines_of_others(tmp_path: Path) -> None:
    """No line of another module ends up in the block, and the block swallows none."""
    others = """{ lib, ... }: {
      services.openssh.extraConfig = lib.mkMerge [
        "AcceptEnv PLAIN"
        (lib.mkOrder 0 "AcceptEnv FIRST")
        (lib.mkAfter "Match User alice\\n  AcceptEnv ALICE")
        (lib.mkOrder 9999 "AcceptEnv LAST")
      ];
    }"""
    text = evaluate_server(write_fleet(tmp_path / "fleet", example_keys()), others)["extraConfig"]
    before, after = text.split(sshd_block(text))
    assert re.findall(r"AcceptEnv (\w+)", before) == ["FIRST", "PLAIN", "ALICE"]
    assert re.findall(r"AcceptEnv (\w+)", after) == ["LAST"]
    # NixOS' sshd module has a shell write this text, in a here-document.
    assert not set("$`\\") & set(sshd_block(text))


# --- the server's module, with a real sshd ---


class Server:
    """A real sshd with accounts of its own: it runs in a mount namespace with another passwd, group and /run, and
    talks to ssh over a pipe. Nothing of this machine is changed, and no port is opened."""

    def __init__(self, directory: Path, extra_config: str) -> None:
        self.directory = directory
        self.sshd = need("sshd")
        for program in ("unshare", "mount", "sftp", "ssh", "ssh-keygen"):
            need(program)
        need_accounts()
        for name in ("host_key", "id"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True, timeout=60
            )
        for name in ("passwd", "group"):
            lines = [line for line in Path("/etc", name).read_text().splitlines() if not line.startswith("bento")]
            lines += {
                "passwd": [
                    "bento-t470:x:6001:6000::/run/chroot/t470:/usr/sbin/nologin",
                    "alice:x:6002:6002::/:/bin/sh",
                ],
                "group": ["bento:x:6000:", "alice:x:6002:"],
            }[name]
            (directory / name).write_text("\n".join(lines) + "\n")
        (directory / "shadow").write_text("root:*:1::::::\nbento-t470:*:1::::::\nalice:*:1::::::\n")
        settings = [
            f"HostKey {directory}/host_key", "AuthorizedKeysFile /run/keys", "PidFile none", "UsePAM no",
            "Subsystem sftp /usr/lib/openssh/sftp-server", "AllowUsers alice", "PasswordAuthentication yes",
        ]  # fmt: skip
        (directory / "sshd_config").write_text("\n".join(settings) + "\n" + extra_config)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """A shell script in the namespace, in the directory; $OPTIONS lead ssh and sftp to the sshd."""
        setup = f"""
            set -e
            mount --make-rprivate /
            for name in passwd group shadow; do mount --bind $name /etc/$name; done
            mount -t tmpfs -o mode=755 tmpfs /run
            mkdir -p /run/sshd /run/chroot/t470/logs /run/chroot/t470/config
            echo 'restrict '"$(cat id.pub)" > /run/keys
            echo '{{}}' > /run/chroot/t470/current.json
            echo text > /run/chroot/t470/config/file
            chown root:6000 /run/chroot/t470; chmod 750 /run/chroot/t470
            chown 6001:6000 /run/chroot/t470/logs; chmod 750 /run/chroot/t470/logs
            OPTIONS="-F /dev/null -i id -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no"
            export SSHD="{self.sshd} -i -e -f {self.directory}/sshd_config"
            t() {{ program=$1; shift; timeout 20 $program $OPTIONS -o ProxyCommand="$SSHD" "$@"; }}
            set +e
        """
        return subprocess.run(
            ["unshare", "--mount", "bash", "-c", setup + script],
            cwd=self.directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip


AFTER = '{ lib, ... }: { services.openssh.extraConfig = lib.mkOrder 3000 "MaxSessions 7"; }'
QUIET = "{ services.bento-server.quiet = true; }"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    path = write_fleet(tmp_path / "fleet", {"t470": example_keys()["t470"]})
    return Server(tmp_path, evaluate_server(path, AFTER)["extraConfig"])


def test_sshd_takes_the_block(server: Server) -> None:
    """As NixOS checks it too: `-T -C` with a port only."""
    done = server.run(
        f"{server.sshd} -t -f sshd_config && {server.sshd} -T -C lport=22 -f sshd_config && echo ====== && "
        f"{server.sshd} -T -C user=bento-t470,host=h,addr=192.0.2.1 -f sshd_config && echo ====== && "
        f"{server.sshd} -T -C user=alice,host=h,addr=192.0.2.1 -f sshd_config"
    )
    assert done.returncode == 0, done.stderr
    everybody, host, alice = (set(part.splitlines()) for part in done.stdout.split("======\n"))
    assert everybody == alice and {"maxsessions 7", "forcecommand none", "allowusers alice"} <= alice
    assert {
        "chrootdirectory %h", "disableforwarding yes", "allowtcpforwarding no", "allowstreamlocalforwarding no",
        "allowagentforwarding no", "x11forwarding no", "permittunnel no", "permittty no", "permituserrc no",
        "passwordauthentication no", "kbdinteractiveauthentication no", "authenticationmethods publickey",
        "maxsessions 1", "allowusers bento-*", "allowgroups bento", "unusedconnectiontimeout 60",
    } <= host  # fmt: skip
    assert [line for line in host if line.startswith("forcecommand internal-sftp -d / -u 0137 -p ")]


def test_sshd_allows_what_the_client_does(server: Server) -> None:
    (server.directory / "log").write_text("log\n")
    (server.directory / "log").chmod(0o777)
    batch = """
        get current.json got
        reget current.json got
        put log logs/.a
        rename logs/.a logs/a
        put log logs/.a
        rename logs/.a logs/a
        ls -1 logs
        put log logs/b
        rm logs/b
        get -r config tree
    """
    (server.directory / "batch").write_text("\n".join(line.strip() for line in batch.splitlines() if line.strip()))
    done = server.run('t sftp -b batch bento-t470@any && stat -c "%A %u %n" /run/chroot/t470/logs/*')
    assert done.returncode == 0, done.stdout + done.stderr
    # Not the mode of the file that was sent: no log is executable, or for everybody.
    assert done.stdout.splitlines()[-1] == "-rw-r----- 6001 /run/chroot/t470/logs/a"
    assert (server.directory / "tree" / "file").read_text() == "text\n"


@pytest.mark.parametrize(
    "command",
    [
        "put log x", "put log current.json", "put log config/file", "put log ../x", "put log logs/../x", "rm current.json",
        "rename logs lags", "rename current.json logs/x", "mkdir logs/d", "rmdir logs", "symlink / logs/l", "ln log logs/h",
        "ln -s /etc/passwd logs/l", "chmod 777 logs", "chmod 4755 logs/.", "chown 0 logs", "chgrp 0 logs", "df",
        "get /etc/passwd x", "get ../../../etc/passwd x", "get /run/keys x", "copy current.json logs/x",
    ],
)  # fmt: skip
def test_sshd_denies(command: str, server: Server) -> None:
    (server.directory / "log").write_text("log\n")
    (server.directory / "batch").write_text(f"{command}\n")
    done = server.run(
        'find /run/chroot -printf "%p %u %g %m %s\\n" | sort > before; t sftp -b batch bento-t470@any; code=$?; '
        'find /run/chroot -printf "%p %u %g %m %s\\n" | sort | diff before - || exit 9; exit $code'
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"sftp> {command}" in done.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ssh bento-t470@any id", "This service allows sftp connections only."),
        ("ssh bento-t470@any /bin/sh -c id", "This service allows sftp connections only."),
        ("ssh -tt bento-t470@any", "PTY allocation request failed"),
        ("ssh -W 127.0.0.1:22 bento-t470@any", "administratively prohibited"),
        ("ssh -N -o ExitOnForwardFailure=yes -R 0:127.0.0.1:22 bento-t470@any", "forwarding failed"),
        ("ssh -o PreferredAuthentications=password -o BatchMode=yes bento-t470@any", "Permission denied (publickey)."),
        # Only hosts have been let in again.
        ("ssh root@any", "Permission denied"),
    ],
)
def test_sshd_refuses(command: str, said: str, server: Server) -> None:
    done = server.run(f"t {command}")
    assert done.returncode not in (0, 124), done.stdout
    assert said in done.stdout + done.stderr
    assert "uid=" not in done.stdout


def test_a_quiet_log_leaves_out_the_hosts(tmp_path: Path) -> None:
    path = write_fleet(tmp_path / "fleet", {"t470": example_keys()["t470"]})
    logs: list[str] = []
    for module in ("{ }", QUIET):
        directory = tmp_path / f"sshd-{len(logs)}"
        directory.mkdir()
        server = Server(directory, evaluate_server(path, AFTER, module)["extraConfig"])
        done = server.run("echo 'get current.json got' | t sftp -b - bento-t470@any && { t ssh alice@any; true; }")
        assert done.returncode == 0 and "sftp> get current.json got" in done.stdout, done.stdout + done.stderr
        logs.append(done.stderr)
    assert ["Accepted publickey for bento-t470" in log for log in logs] == [True, False]
    assert not re.search("bento-t470 (from|by)|for bento-t470", logs[1]) and "alice" in logs[1]
    pam = evaluate_server(path, QUIET)["pam"]["sshd"]["rules"]["session"]
    assert pam["quiet-for-bento"]["order"] == 10190 < pam["systemd-not-for-bento"]["order"]


def start_trial(tmp_path: Path, cmdline: str, variable: str) -> "subprocess.Popen[bytes]":
    """The module's own text, in a machine that is a directory, where ten seconds are a tenth of one."""
    text = trial_ends()
    for place in ("/sys/firmware/efi/efivars", "/run", "/dev", "/proc"):
        (tmp_path / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    (tmp_path / "proc/cmdline").write_text(f"{cmdline}\n")
    if variable:
        path = tmp_path / bento_client.TRIAL_VARIABLE.lstrip("/")
        path.write_bytes(bento_client.EFI_ATTRIBUTES + variable.encode())
    text = re.sub(r"(?<![\w.])/(proc|sys|run|dev)\b", rf"{tmp_path}/\1", text)
    text = text.replace("-t 10", "-t 0.1").replace("-t 5", "-t 0.5").replace("echo -1000 >", "echo 1000 >")
    (tmp_path / "proc/self").symlink_to("/proc/self")
    return subprocess.Popen(["bash", "-c", text], cwd=tmp_path)


@pytest.mark.parametrize(
    ("cmdline", "variable", "word", "ends"),
    [
        ("init=/s/new/init quiet", "", "", "no trial"),
        ("init=/s/old/init quiet", "/s/new 30", "", "no trial"),
        ("init=/s/new/init quiet", "/s/new 30", "", "reboots"),
        ("quiet init=/s/new/init bento.trial=30", "", "", "reboots"),
        ("init=/s/new/init", "/s/new 30 asks", "", "reboots"),
        ("init=/s/new/init", "/s/new 600", "proven", "proven"),
        ("init=/s/new/init", "/s/new 30", "600", "goes on"),
        ("init=/s/new/init", "/s/new 600", "2", "reboots"),
        ("init=/s/new/init", "/s/new 30 asks", "asked", "goes on"),
        ("init=/s/new/init", "/s/new 30", "asked", "reboots"),
        ("init=/s/new/init bento.trial=30,asks", "", "asked", "goes on"),
        ("init=/s/new/init bento.trial=30", "", "asked", "reboots"),
        ("init=/s/new/init", "/s/new 30 asks", "asked in a script", "goes on"),
    ],
)
def test_a_trial_ends(tmp_path: Path, cmdline: str, variable: str, word: str, ends: str) -> None:
    """And where there are EFI variables, it says that it has."""
    if word.startswith("asked"):
        question = tmp_path / ("crypt-ramfs/device" if "script" in word else "run/systemd/ask-password/ask.x")
        question.parent.mkdir(parents=True)
        question.touch()
    process = start_trial(tmp_path, cmdline, variable)
    try:
        if word and not word.startswith("asked"):
            while not bento_client.tell_trial(bento_client.Settings(root=str(tmp_path)), word):
                time.sleep(0.02)
        if ends == "goes on":
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
            return
        process.wait(60)
        trigger = tmp_path / "proc/sysrq-trigger"
        assert (trigger.exists() and trigger.read_text() == "b\n") == (ends == "reboots")
        assert find_loader(Settings(root=str(tmp_path))).ran_out() == (ends == "reboots")
    finally:
        process.kill()
        process.wait()
