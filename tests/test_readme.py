"""README and the manual say nothing that is not so: its commands are run, its options, states, fields and messages exist, its links lead
somewhere.

A block ```sh is run as it stands, in the fleet that "First host in five minutes" makes: its paths are moved below a
temporary directory; `bento`, the host and `nixos-rebuild switch` are stood in for by the toy. The other blocks are parsed.
"""

import argparse
import ast
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from toynixos import TOY, ToyMachine, need, write_config

import bento
import bento_client as client

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (REPO / "README.md", REPO / "utils/manual.md")}
README = "\n".join(PAGES.values())
LINES = README.splitlines()
FIRST = "First host in five minutes"
MACHINE = "t470"


@dataclass(frozen=True)
class Block:
    """A fenced block: the nearest heading above it, the paragraph before it, and the line that it begins in."""

    section: str
    before: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it says that this is to be done."""
        found: list[str] = re.findall(r"[Oo]n the (server|host|laptop)\b", self.before)
        return found[-1] if found else "server"


def read_blocks() -> list[Block]:
    blocks, section, paragraph, number = [], "", "", 0
    while number < len(LINES):
        line = LINES[number]
        if line.startswith("```"):
            end = LINES.index("```", number + 1)
            text = "\n".join(LINES[number + 1 : end])
            blocks.append(Block(section, paragraph, number + 1, line[3:], text))
            paragraph, number = "", end
        elif line.startswith("#"):
            section, paragraph = line.lstrip("# "), ""
        else:
            paragraph = f"{paragraph} {line}" if line else ""
        number += 1
    return blocks


BLOCKS = read_blocks()
# What stands between backquotes in a text or a table.
SPANS = [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", README))]


def section(title: str) -> str:
    """The text below a heading, to the next one of its rank."""
    rank, _, rest = next(
        (match[1], match[2], README[match.end() :])
        for match in re.finditer(r"(?m)^(#+) (.*)$", README)
        if match[2] == title
    )
    return re.split(rf"(?m)^#{{1,{len(rank)}}} ", rest)[0]


def first_column(title: str) -> list[str]:
    rows = re.findall(r"(?m)^\| (.*?) \| ", section(title).replace("\\|", "\0"))
    return [row.replace("\0", "|") for row in rows if not re.fullmatch(r"[- ]*", row)]


# --- a fleet ---

ENTER = """\
#!/bin/sh
# The machine: its programs, its root, and its way to the server.
cd "{root}"
exec env {environment} "{python}" "{repo}/bento_client.py" --config "{config}" "$@"
"""
BENTO = """\
#!/bin/sh
BENTO_DIR=${{BENTO_DIR:-{top}/etc/bento-fleet}} exec "{python}" "{top}/etc/bento-fleet/bento.py" "$@"
"""
PYTHON = """\
#!/bin/sh
[ "$2" != bento_client.py ] || {{ shift 2; exec "{top}/bin/bento-client" "$@"; }}
exec "{python}" "$@"
"""
REBUILD = """\
#!/bin/sh
[ "$*" = switch ] || exec "{toy}/nixos-rebuild" "$@"
[ "$(id -u)" != 0 ] || exec "{python}" - <<'END'
import re, sys
sys.path.insert(0, "{tests}")
import accounts
names = re.findall(r'"([A-Za-z0-9_-]+)" = \\[', open("{top}/etc/bento-fleet/fleet.nix").read())
for name in re.findall(r"(?m)^bento-([^:]+)", open("/etc/passwd").read()):
    if name not in names and not name.startswith("toy"):  # that one is of other tests
        accounts.remove_user("bento-" + name)
for name in names:
    accounts.add_user("bento-" + name, "bento")
END
"""


# Of another machine: no more than `ssh root@HOST bento-client key`.
SSH = """\
#!/bin/sh -e
[ "$2 $3" = "bento-client key" ]
ssh-keygen -q -t ed25519 -N "" -f "{top}/$1"
cat "{top}/$1.pub"
"""


class Site:
    """Everything that README speaks of, below one directory: the server's files, the machine, the administrator's."""

    def __init__(self, top: Path) -> None:
        self.top, self.bin = top, top / "bin"
        self.base = dict[str, str]()
        self.fleet, self.chroots = top / "etc/bento-fleet", top / "home/chroot"
        for name in ("bin", "etc/ssh", "home/.ssh", "home/laptop", "b/home", "var/www", "var/lib/node_exporter", "own", "srv/b/chroot"):
            (top / name).mkdir(parents=True)
        (top / "etc/ssh/ssh_host_ed25519_key").write_text("secret\n")
        self.settings = {
            "server": "bento.example.org", "host": MACHINE, "root": str(top / "machine"),
            "state_dir": str(top / "machine/var/lib/bento"), "connect_timeout": 60, "confirm_timeout": 60,
        }  # fmt: skip
        self.machine = ToyMachine.create(
            top / "machine", MACHINE, store=top / "store", chroot=self.chroots / MACHINE, client_json=self.settings
        )
        self.make_programs()
        self.make_repository()

    def make_programs(self) -> None:
        config = self.top / "client.json"
        config.write_text(json.dumps(self.settings))
        mine = {name: value for name, value in self.machine.env().items() if name.startswith("TOY_") or name == "PATH"}
        words = {
            "top": self.top, "root": self.machine.root, "python": sys.executable, "repo": REPO, "toy": TOY, "tests": TESTS,
            "config": config, "environment": " ".join(f'"{name}={value}"' for name, value in mine.items()),
        }  # fmt: skip
        programs = {"bento-client": ENTER, "bento": BENTO, "python3": PYTHON, "nixos-rebuild": REBUILD, "ssh": SSH, "pkill": "#!/bin/sh\n"}
        for name, text in programs.items():
            path = self.bin / name
            path.write_text(text.format(**words))
            path.chmod(0o755)

    def make_repository(self) -> None:
        """What is at YOU/bento: Bento, as it is here."""
        seed = self.top / "seed"
        seed.mkdir()
        (self.top / "home/bento").symlink_to(REPO)
        for name in ("bento.py", "bento_client.py", "fleet.nix.in", "utils", "hosts", ".examples", ".gitignore"):
            if (REPO / name).is_dir() and not (REPO / name).is_symlink():
                shutil.copytree(REPO / name, seed / name, symlinks=True)
            else:
                shutil.copy2(REPO / name, seed / name, follow_symlinks=False)
        self.sh("git init -qb main && git add . && git commit -qm Bento && git clone -q --bare . ../origin.git", seed)

    def env(self) -> dict[str, str]:
        git = {
            f"url.{self.top}/origin.git.insteadOf": "https://github.com/YOU/bento",
            "protocol.file.allow": "always",
            "user.name": "You",
            "user.email": "you@example.org",
        }
        config = {f"GIT_CONFIG_KEY_{number}": key for number, key in enumerate(git)}
        config |= {f"GIT_CONFIG_VALUE_{number}": value for number, value in enumerate(git.values())}
        own = {"RCLONE_CONFIG_STORAGE_TYPE": "alias", "RCLONE_CONFIG_STORAGE_REMOTE": f"{self.top}/storage", "RCLONE_CONFIG": os.devnull}
        own |= {"GIT_CONFIG_COUNT": str(len(git)), "GIT_CONFIG_GLOBAL": os.devnull, "HOME": f"{self.top}/home"}
        own |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "BENTO_CHROOT_DIR": str(self.chroots)}
        own |= {"TOY_ROOT": f"{self.top}/server", "TOY_STORE": f"{self.top}/store", "XDG_STATE_HOME": f"{self.top}/state"}
        return {name: value for name, value in os.environ.items() if not name.startswith(("BENTO_", "GIT_"))} | own | config

    def sh(self, text: str, cwd: Path | None = None) -> str:
        """What it says. Each of its commands has to succeed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=cwd or self.fleet, env=self.env(), text=True, timeout=600,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\nexit {done.returncode}:\n{done.stdout}"
        return done.stdout

    def play(self, block: Block) -> str:
        """A block, where it says, and with the paths that stand for its own."""
        text = re.sub(r"\b\S*@?bento\.example\.org:(?=/)", "", block.text)
        text = re.sub(r"\bb\.example\.org:(?=/)", f"{self.top}/b", text)
        text = re.sub(r"(?<![\w.}])/(etc|home/chroot|var|srv)\b", rf"{self.top}/\1", text)
        places = {"laptop": self.top / "home/laptop", "host": self.top, "server": self.fleet}
        cwd = self.top / "own" if block.section == "Your own repository" else places[block.place]
        said = self.sh(text, cwd if cwd.exists() else self.top)
        self.furnish()
        return said

    def furnish(self, label: str = "v1") -> None:
        """Gives hosts that were added meanwhile a configuration that the toy can build, as their owners would."""
        for directory in self.fleet.glob("hosts/*/"):
            if directory.is_dir() and not directory.is_symlink() and not (directory / "toy.nix").exists():
                self.write(directory.name, label)

    def write(self, name: str, label: str, *, commit: bool = True) -> None:
        where = self.fleet / "hosts" / name
        write_config(where, flake=True, host=name, label=label, client_json=self.settings | {"host": name})
        if commit:
            self.sh("git add hosts && git commit -qm 'What its owner wrote'")

    def published(self) -> dict[str, str]:
        found = {path.parent.name: json.loads(path.read_bytes())["release"] for path in self.chroots.glob("*/current.json")}
        return dict(sorted(found.items()))

    def reset(self) -> None:
        """To what all sections begin with."""
        self.sh("git reset -q --hard base && git clean -fdqx hosts")
        if self.published() != self.base:
            self.sh("bento fleet && nixos-rebuild switch && bento populate --again --prune")


def play_first_host(site: Site) -> None:
    for block in BLOCKS:
        if block.section == FIRST and block.language == "sh":
            said = site.play(block)
            if "bento_client.py --host t470 key" in block.text:
                (site.top / "home/t470.key").write_text(said)
    assert said.rstrip().endswith("bento: ok"), said


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A fleet of three hosts, one of which there is: it has had two releases."""
    for program in ("git", "sftp", "ssh-keygen"):
        need(program)
    site = Site(tmp_path_factory.mktemp("site").resolve())
    site.top.chmod(0o755)
    play_first_host(site)
    for name in ("nas", "router"):
        site.sh(f"ssh-keygen -q -t ed25519 -N '' -f {site.top}/{name} && bento add {name} && bento add {name} --key {site.top}/{name}.pub")
    site.furnish()
    site.sh("bento fleet && nixos-rebuild switch && git add --all && git commit -qm Others && bento populate")
    site.write(MACHINE, "v2")
    site.sh("git tag base && bento populate && bento-client run")
    site.base = site.published()
    yield site


def test_the_first_host(site: Site) -> None:
    """The blocks of that section have made the fleet that all others are run in."""
    assert list(site.base) == ["nas", "router", MACHINE]
    assert site.machine.labels() == ("v2", "v2", "v2")


SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS if block.language == "sh"))
NEEDS = {"Gateways": ["rclone"], "Several servers": ["rsync"], "Logs on a web server": ["rsync"], "Change something": ["nix"]}


@pytest.mark.parametrize("title", [title for title in SECTIONS if title not in ("Bento", FIRST)])
def test_a_section(title: str, site: Site) -> None:
    for program in NEEDS.get(title, []):
        need(program)
    site.reset()
    if title in ("Change something", "Sign releases"):
        site.write(MACHINE, "v3", commit=False)
    if title == "Your own repository":
        site.sh("git init -q", site.top / "own")
    if title == "A fleet that exists":
        write_config(site.top / "srv/infra", flake=True, host="web1", label="v1", client_json=site.settings | {"host": "web1"})
        site.sh("git init -qb main && git add . && git commit -qm 'An own repository'", site.top / "srv/infra")
    thief = steal(site) if title == "A stolen machine" and os.geteuid() == 0 else None
    for block in BLOCKS:
        if block.section == title and block.language == "sh":
            site.play(block)
            if title == "Change something":  # what it built is in the server's store only when it is what the host runs
                site.sh("bento-client run")
    CONSEQUENCES.get(title, lambda _: None)(site)
    assert thief is None or thief.wait(30) == -signal.SIGKILL


def steal(site: Site) -> "subprocess.Popen[bytes]":
    """Has a process of that host's account open."""
    owner = (site.chroots / MACHINE / "logs").stat().st_uid
    assert pwd.getpwuid(owner).pw_name == f"bento-{MACHINE}"
    return subprocess.Popen(["sleep", "600"], user=owner)


def test_servers_that_are_copies(site: Site) -> None:
    """The timer's script, as it stands: what is published goes there, and a report comes back."""
    need("rsync")
    site.reset()
    site.sh("bento-client run")
    [block] = [block for block in BLOCKS if block.section == "Servers that are copies" and block.language == "nix"]
    [script] = re.findall(r"(?s)script = ''\n(.*?)\n  '';", block.text)
    there = site.top / "b/home/chroot"
    for _ in range(2):
        site.play(replace(block, text=script))
        assert (there / MACHINE / "current.json").read_bytes() == (site.chroots / MACHINE / "current.json").read_bytes()
        report = there / MACHINE / "logs/status.json"
        shutil.copy(site.chroots / MACHINE / "logs/status.json", report)
        report.write_text(report.read_text().replace('"phase": "idle"', '"phase": "building"'))
        os.utime(report)
    assert (site.chroots / MACHINE / "logs/status.json").read_bytes() == report.read_bytes()


def check_laptop(site: Site) -> None:
    assert "A new host" in site.sh("git log --format=%s", site.fleet).splitlines()


def check_linked(site: Site) -> None:
    published = site.published()
    assert published["web1"] == published["web2"], "one tree, one release"
    assert "flake.nix" in site.sh("bento show web1") and site.sh("git status --short", site.top / "srv/infra") == ""


def check_removed(site: Site) -> None:
    assert not (site.chroots / MACHINE).exists() and (site.chroots / "nas").exists()


def check_renamed(site: Site) -> None:
    one, other = (json.loads((site.chroots / name / "current.json").read_bytes()) for name in (MACHINE, "alice"))
    assert one["release"] == other["release"]


def check_own_host(site: Site) -> None:
    fleet = bento.Fleet(site.fleet, site.chroots)
    with closing(fleet.source):
        names = {member.name for member in bento.list_members(fleet, "server")[0]}
    assert {"fleet.nix", "fleet.nix.in", "bento.py", "bento_client.py", "utils/bento.nix"} <= names


def check_signed(site: Site) -> None:
    assert (site.fleet / "hosts/signed").exists()


def check_rolled_back(site: Site) -> None:
    assert re.search(r"reason +by hand", site.sh("bento-client status"))


CONSEQUENCES = {
    "A fleet that exists": check_linked,
    "Publish from a laptop": check_laptop,
    "Removing a host": check_removed,
    "Renaming a host": check_renamed,
    "The server as its own host": check_own_host,
    "Sign releases": check_signed,
    "Go back": check_rolled_back,
}


def test_the_demo_and_the_tests_are_there() -> None:
    [commands] = [block.text.splitlines() for block in BLOCKS if (block.section, block.language) == ("Bento", "sh")]
    assert commands == ["python3 tests/demo.py", "tests/run"]
    assert os.access(REPO / "tests/run", os.X_OK) and os.access(REPO / "tests/demo.py", os.R_OK)


# --- the other blocks ---


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "nix"], ids=lambda block: str(block.line))
def test_nix(block: Block) -> None:
    whole = block.text if block.text.startswith("{") else f"{{ pkgs, inputs, ... }}: {{\n{block.text}\n}}"
    done = subprocess.run(
        [need("nix-instantiate"), "--parse", "-"], input=whole, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"README.md:{block.line}: {done.stderr}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "json"], ids=lambda block: str(block.line))
def test_json(block: Block) -> None:
    assert client.parse_recipe(block.text.encode(), "README.md", "web1").attribute == "web1.example.org"


def test_waves() -> None:
    [block] = [block for block in BLOCKS if block.section == "Roll-outs in waves"]
    waves, _, _ = bento.parse_waves(block.text, ["kiosk-01", "kiosk-10", "nas", "router", "t470"])
    assert [(wave.hosts, wave.soak_s) for wave in waves] == [
        (("nas", "t470"), 7200.0), (("kiosk-01",), 86400.0), (("kiosk-10",), 0.0), (("router",), 0.0)
    ]  # fmt: skip


def test_every_block_has_a_language() -> None:
    """So that what is a command is one that is run."""
    assert {block.language for block in BLOCKS} <= {"sh", "nix", "json", "text", "yaml", "ini", "nginx"}


# --- words of the command lines ---


def server_commands() -> dict[str, argparse.ArgumentParser]:
    actions = bento.make_parser()._subparsers
    assert actions is not None
    return dict(actions._group_actions[0].choices)  # type: ignore[arg-type]


SERVER = server_commands()
HOST = list(client.COMMANDS)
# What one says of a command, in a text: `populate --check`, `bento.py log NAME`.
CALL = re.compile(r"(?:python3 )?(?:\S*/)?(bento(?:\.py|-client|_client\.py)?) (?!-)(.*)")


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def server_flags(command: str) -> set[str]:
    return set(SERVER[command]._option_string_actions) | set(bento.make_parser()._option_string_actions)


def calls() -> Iterator[tuple[str, str]]:
    """Each program and the words after it, of all that README shows or says."""
    shown = [part.strip() for block in BLOCKS if block.language in ("sh", "ini") for part in re.split(r"\n|&&|;|exec |\\n", block.text)]
    for text in [*SPANS, *(part.partition("  #")[0] for part in shown)]:
        if found := CALL.match(text):
            yield found[1].replace(".py", "").replace("_", "-"), found[2]
        elif text.partition(" ")[0] in SERVER and flags_of(text):
            yield "bento", text


def test_subcommands_and_flags() -> None:
    found = list(calls())
    assert len(found) > 60
    for program, words in found:
        rest = re.sub(r"^(--[a-z-]+ \S+ |\[[^]]*\] )+(?=[A-Za-z])", "", words)
        command = rest.split()[0]
        if program == "bento" and command != "COMMAND":
            assert command in SERVER, f"bento {words}"
            assert flags_of(rest.partition("'")[0]) <= server_flags(command), f"bento {words}"
        elif program != "bento":
            assert {word for word in rest.split() if word in HOST} or command == "COMMAND", f"bento-client {words}"
            assert flags_of(words) <= set(client.make_parser()._option_string_actions), f"bento-client {words}"


def test_the_reference_has_every_command_and_flag() -> None:
    rows = {row.strip("`").split()[0]: row for row in first_column("The server's commands") if row.startswith("`")}
    rows = {name: row for key, row in rows.items() for name in key.strip("`").split(",")}
    for command, parser in SERVER.items():
        told = next((row for row in first_column("The server's commands") if re.search(rf"`{command}[ `]", row)), "")
        known = {flag for flag in parser._option_string_actions if flag.startswith("--")} - {"--help", "--jobs"}
        assert flags_of(told) - {"-j"} == known, command
    host = " ".join(first_column("The host's commands"))
    assert set(re.findall(r"`([a-z]+)", host)) == set(HOST)


# --- options, states, fields, messages ---


def declared(name: str) -> set[str]:
    path = TESTS / "golden" / name
    return set(json.loads(path.read_text())) if path.exists() else set()


OPTIONS = declared("host-options.json") | declared("fleet-options.json")


def test_options_are_declared() -> None:
    said = set()
    for block in BLOCKS:
        if block.language == "nix":
            said |= set(re.findall(r"(?<!systemd\.)services\.bento(?:-server)?\.[A-Za-z]+(?:\.[a-z][A-Za-z]+)*", block.text))
            for group in re.findall(r"(?s)(services\.bento(?:-server)?) = \{(.*?)\};", block.text):
                said |= {f"{group[0]}.{option}" for option in re.findall(r"(?m)^\s+([a-z][A-Za-z.]*) =", group[1])}
    for span in SPANS:
        said |= set(re.findall(r"(?<!systemd\.)services\.bento(?:-server)?\.[A-Za-z]+(?:\.[a-z][A-Za-z]+)*", span))
    assert len(said) > 10
    assert said <= OPTIONS


def test_the_reference_has_every_option() -> None:
    told = set(re.findall(r"`([a-z][A-Za-z.]+)`", " ".join(first_column("The host's settings"))))
    assert {f"services.bento.{name}" for name in told} == {name for name in OPTIONS if name.startswith("services.bento.")}


def test_states() -> None:
    told = set(re.findall(r"`([a-z-]+)`", " ".join(first_column("States"))))
    assert told == set(bento.URGENCY)


def test_results() -> None:
    told = set(re.findall(r"`([a-z]+-[a-z]+)`", section("What happens if…"))) - {"nixos-rebuild", "bento-client"}
    assert "rolled-back" in told and told <= {*client.Result, *bento.URGENCY}


def test_json_fields(site: Site) -> None:
    data = json.loads(site.sh("bento status --json || true"))
    told = set(re.findall(r"`([a-z_]+)`", section("States")))
    assert {*data, *data["hosts"][0]} - {"format", "time", "hosts", "problems"} <= told


def test_metrics(site: Site) -> None:
    known = site.sh("bento status --prometheus || true")
    for name in re.findall(r"\bbento_[a-z_]+", "".join(block.text for block in BLOCKS if block.language == "yaml")):
        assert f"# TYPE {name} " in known


def said_by_the_code() -> str:
    texts = [(REPO / "utils/bento.nix").read_text()]
    for name in ("bento.py", "bento_client.py"):
        texts += [
            node.value
            for node in ast.walk(ast.parse((REPO / name).read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return "\n".join(texts)


def test_messages() -> None:
    told, known = re.findall(r"`([^`]+)`", " ".join(first_column("When something is wrong"))), said_by_the_code()
    assert len(told) > 10
    assert [message for message in told if message not in known] == []


# --- links, and where things are ---


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(line.lstrip("# ")) for line in PAGES[page].splitlines() if line.startswith("#")}


def test_links() -> None:
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert links
        for link in (link for link in links if "://" not in link):
            path, _, place = link.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.exists() and (not place or place in anchors(to)), link


def test_paths() -> None:
    """Of this repository, wherever they are named."""
    for path in re.findall(r"(?<![\w/])(?:tests|utils|\.ci|\.examples)/[\w./]*\w", README):
        assert (REPO / path).exists() or path in ("utils",), path


def test_the_way_of_a_release_is_that_of_the_code() -> None:
    text = section("How the code is laid out")
    assert len(text.splitlines()) <= 40
    names = set(re.findall(r"`([A-Za-z_.]+)\(\)`|`([A-Z][A-Za-z]+)`", text))
    known = {
        node.name
        for file in ("bento.py", "bento_client.py")
        for node in ast.walk(ast.parse((REPO / file).read_text()))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    told = {(one or other).rpartition(".")[2] for one, other in names}
    assert len(told) > 15
    assert told <= known
