"""What a machine says while it is at work, and what it knows of its server."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from toylab import Lab, wait_until

import bento_client as client


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab.create(tmp_path)


def test_a_long_build_is_told_again_and_again(lab: Lab) -> None:
    lab.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    status = lab.chroot / "logs/status.json"
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(lab.run_patched("c.HEARTBEAT_S = 0.3")))
    thread.start()
    wait_until(Path(lab.file("building")).exists)
    wait_until(lambda: lab.phase() == "building")  # it is told without waiting for the answer
    first, before = lab.report(), status.stat().st_ino
    wait_until(lambda: status.stat().st_ino != before)
    again = lab.report()
    assert (again.phase, again.since) == ("building", first.since) and first.since is not None
    Path(lab.file("go")).touch()
    thread.join()
    assert done[0].returncode == 0
    assert lab.report().since is None


def test_status_tells_of_the_last_contact(lab: Lab) -> None:
    assert "contact    none yet: 'bento-client probe' says why" in lab.client("status")
    lab.publish("v1")
    lab.client("run")
    assert re.search(r"(?m)^contact +20\S+Z, [0-9]+s ago, \S+$", lab.client("status"))
    assert f"client     {client.VERSION}" in lab.client("status")
    lab.down.touch()
    lab.client("run", code=75)
    when = re.findall(r"(?m)^contact +(20\S+Z)", lab.client("status"))
    lock = (lab.state / "lock").read_text().splitlines()
    assert lock[1].split()[0] == when[0]
    (lab.state / "lock").write_text(f"{lock[0]}\n2026-01-01T00:00:00Z nas\n")
    assert "ago, nas: lost since then: 'bento-client probe' says why" in lab.client("status")


def test_what_a_host_asks_for_comes_with_its_report(lab: Lab) -> None:
    lab.settings |= {"interval": 3600, "offline_after": 7200}
    lab.publish("v1")
    lab.client("run", "--interval", "3600", "--offline-after", "7200")
    told = json.loads((lab.chroot / "logs/status.json").read_text())
    assert (told["interval"], told["offline_after"]) == (3600, 7200)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("LoadState=loaded\nActiveState=active\n\nLoadState=loaded\nActiveState=failed\n", ("b",)),
        ("LoadState=loaded\nActiveState=inactive\n\nLoadState=not-found\nActiveState=inactive\n", ("b",)),  # a user's
        ("LoadState=loaded\nActiveState=activating\n\nLoadState=loaded\nActiveState=active\n", ("a",)),
        ("Failed to connect to bus\n", ("a", "b")),
    ],
)
def test_units_that_recovered_are_told_no_more(lab: Lab, said: str, left: tuple[str, ...], monkeypatch: Any) -> None:
    machine = client.Machine(client.Settings(host="a", state_dir=str(lab.state), root=str(lab.machine.root)), log="no-log")
    machine.state = client.State(failed_units=("a", "b"))
    (lab.machine.root / "run/systemd/system").mkdir(parents=True)
    monkeypatch.setattr(client, "run", lambda *_, **__: client.Done(0, said))
    assert machine.still_failed() == left
