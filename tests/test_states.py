"""Every state and flag, reached by the real client and a real `populate`, in all that `status` can print."""

import html.parser
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toylab import HOST, Lab, wait_until
from toynixos import CLIENT, PYTHON_FLAGS, TOY, write_config

import bento
import bento_client

STATES = ("new", "pending", "held", "building", "waiting", "left", "up-to-date", "failing", "rolled-back", "offline")
FLAGS = ("offline", "needs_reboot", "drift", "other_client")
YEAR_S = 365 * 86400


class Rows(html.parser.HTMLParser):
    """The classes and the words of each row of the page's body."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[set[str], str]] = []
        self.feed(page.partition("<tbody>")[2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.found.append((set((dict(attrs)["class"] or "").split()), ""))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1] = (self.found[-1][0], f"{self.found[-1][1]} {data}")


class Server:
    """bento.py at work on the directories of a lab."""

    def __init__(self, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
        self.lab, self.capsys = lab, capsys

    def run(self, *arguments: str) -> tuple[int, str]:
        argv = ["--fleet", self.lab.file("fleet"), "--chroot-dir", self.lab.file("chroot"), *arguments]
        self.capsys.readouterr()
        code = bento.main(argv)
        return code, self.capsys.readouterr().out

    def publish(self, label: str, *arguments: str, **behaviour: Any) -> str:
        write_config(self.lab.config, flake=True, host=HOST, label=label, client_json=self.lab.settings, **behaviour)
        assert self.run("populate", *arguments)[0] == 0
        return bento.read_published(self.lab.chroot, HOST).release  # type: ignore[union-attr]

    def check(self, state: str, *flags: str, note: str, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
        """Asserts that all four forms say the same of the host; what JSON says."""
        code = int(state in ("failing", "rolled-back") or "offline" in flags or "drift" in flags)
        ran, table = self.run("status", *arguments)
        assert ran == code, table
        line = table.splitlines()[1]
        assert line.split()[:2] == [HOST, state], line
        assert note in line
        for flag in FLAGS[:3]:
            assert (flag.replace("_", " ") in line) == (flag in flags or flag == state), line
        assert table.splitlines()[-1].startswith("1 host: ")
        assert f"1 {state}" in table.splitlines()[-1]

        ran, text = self.run("status", "--json", *arguments)
        (row,) = json.loads(text)["hosts"]
        assert (ran, row["host"], row["state"], row["problem"]) == (code, HOST, state, None)
        assert {flag: row[flag] for flag in FLAGS} == {flag: flag in flags for flag in FLAGS}

        ran, text = self.run("status", "--prometheus", *arguments)
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        for name in STATES:
            assert samples[f'bento_hosts{{state="{name}"}}'] == str(int(name == state))
            assert samples[f'bento_host_state{{host="{HOST}",state="{name}"}}'] == str(int(name == state))
        for flag in FLAGS:
            assert samples[f'bento_host_{flag}{{host="{HOST}"}}'] == str(int(flag in flags)), flag
        assert (ran, samples[f'bento_host_needs_attention{{host="{HOST}"}}']) == (code, str(code))

        ran, page = self.run("status", "--html", *arguments)
        ((classes, words),) = Rows(page).found
        assert ran == code
        assert classes == {state, *flags, *(["person"] if code else [])}
        assert note in words and HOST in words and state in words
        return dict(row)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Server:
    lab = Lab.create(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # root would be asked for the hosts' accounts
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", f"{TOY}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TOY_STORE", str(lab.machine.root / "nix/store"))
    monkeypatch.setenv("TOY_MODE", "simulated")
    return Server(lab, capsys)


def other_client(lab: Lab, change: Callable[[str], str], code: int = 0) -> None:
    """Runs the real client with a line of it changed."""
    text = CLIENT.read_text()
    changed = change(text)
    assert changed != text
    Path(lab.file("other_client.py")).write_text(changed)
    argv = [sys.executable, *PYTHON_FLAGS, lab.file("other_client.py"), *lab.argv("run", code=code)[len(PYTHON_FLAGS) + 2 :]]
    done = lab.machine.run(*argv, env=lab.env())
    assert done.returncode == code, done.stdout


def test_every_state_by_the_real_client(server: Server) -> None:
    lab = server.lab
    first = server.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    row = server.check("new", note=f"{first[:7]} published ")
    assert row["seen"] is None and row["published"]["release"] == first

    process = lab.start("run")
    wait_until(Path(lab.file("building")).exists)
    wait_until(lambda: lab.phase() == "building")  # it is told without waiting for the answer
    row = server.check("building", note=f"{first[:7]} published ")
    assert row["phase"] == "building" and row["last"] is None
    Path(lab.file("go")).touch()
    assert lab.finish(process) == 0
    row = server.check("up-to-date", note="")
    assert (row["release"], row["last"]["result"], row["clock_ahead_s"] in (-2, -1, 0)) == (first, "ok", True)
    assert row["last"]["finished"][:16] <= row["since"][:16] <= row["seen"][:16]

    second = server.publish("v2", build="fail")
    row = server.check("pending", note=f"{second[:7]} published ")
    assert (row["release"], row["published"]["release"]) == (first, second)
    lab.client("run", code=1)
    row = server.check("failing", note="build-failed: nixos-rebuild build: exit 1")
    assert (row["release"], row["last"]["release"], row["tries"]) == (first, second, 1)

    third = server.publish("v3", cut_network=True)
    server.check("pending", note=f"{third[:7]} published ")
    lab.client("run", code=1)
    row = server.check("rolled-back", note="cannot reach")
    assert row["last"]["result"] == "rolled-back" and row["release"] == first
    server.check("rolled-back", "offline", note="offline", arguments=("--offline-after", "0"))

    server.publish("v4")
    lab.client("run")
    server.check("up-to-date", note="")
    code, listed = server.run("log", HOST, "--list")
    results = [words for line in listed.splitlines() if (words := re.split("  +", line)[2:])[0] != "published"]
    assert code == 0 and [words[0] for words in results] == ["ok", "rolled-back", "build-failed", "ok"]
    assert "cannot reach" in results[1][1] and "nixos-rebuild build: exit 1" in results[2][1]


def test_every_flag_by_the_real_client(server: Server) -> None:
    lab = server.lab
    release = server.publish("v1", "--build", kernel="6.13")
    lab.client("run")
    row = server.check("up-to-date", "needs_reboot", note="needs reboot")
    assert row["system"] == row["published"]["system"] == os.path.realpath(lab.machine.profile)
    lab.machine.power_cycle()
    lab.client("run")
    server.check("up-to-date", note="")
    server.check("offline", "offline", note="was up-to-date", arguments=("--offline-after", "0"))

    # Somebody tries something out on the machine itself.
    write_config(Path(lab.file("by-hand")), flake=True, host=HOST, label="mine", client_json=lab.settings, kernel="6.13")
    assert lab.machine.rebuild("test", Path(lab.file("by-hand"))).returncode == 0
    lab.client("run")
    row = server.check("pending", "drift", note="drift")  # it does not run what is published
    assert (row["release"], row["last"]["release"]) == (None, release)
    lab.machine.power_cycle()

    other_client(lab, lambda text: re.sub('(?m)^VERSION = .*$', 'VERSION = "0.9"', text))
    row = server.check("up-to-date", "other_client", note="client 0.9")
    assert row["client"] == "0.9"
    lab.client("run")
    server.check("up-to-date", note="")


@pytest.mark.parametrize(("off_s", "words"), [(YEAR_S, "clock 36[45]d ahead"), (-YEAR_S, "clock 36[45]d behind")])
def test_a_real_client_whose_clock_is_a_year_off(off_s: int, words: str, server: Server) -> None:
    """What it says of itself is shown on the server's clock."""
    lab = server.lab
    real = "import time\n"
    off = f"import time\nreal_time = time.time\ntime.time = lambda: real_time() + {off_s}\n"
    # The new system's client proves it, with the clock that the machine has.
    server.publish("v1")
    other_client(lab, lambda text: text.replace(real, off, 1))
    row = server.check("up-to-date", note="clock ")
    assert abs(row["clock_ahead_s"] - off_s) < 60
    for name in ("since", "seen"):
        assert 0 <= time.time() - bento_client.parse_time(row[name]) < 60
    line = server.run("status")[1].splitlines()[1]
    assert re.search(words, line)
    assert re.search(r" [0-9]+s +[0-9]+s ", line)
    listed = [line for line in server.run("log", HOST, "--list")[1].splitlines() if "  published" not in line]
    assert re.search(r"  ok  \(came [0-9TZ:-]+\)$", listed[0])
    # Its clock is set right: the newest log is the newest again.
    server.publish("v2")
    lab.client("run")
    server.check("up-to-date", note="")
    shown = server.run("log", HOST)[1]
    assert "v2" in shown
    assert not re.search("came", server.run("log", HOST, "--list")[1].splitlines()[0])
