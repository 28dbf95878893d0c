"""Two machines with one name: both are told, neither is fought; one that takes the place of another is no clone."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_states import Server, server
from toylab import HOST, Lab
from toynixos import ToyMachine

import bento_client as client

__all__ = ["server"]  # fixtures


def copy_of(lab: Lab, *, state: bool) -> Lab:
    """Another machine under the same name; with `state`, its disk is a copy. Its id is its own."""
    root = Path(lab.file("second"))
    machine = ToyMachine.create(root, HOST, chroot=lab.chroot, client_json=lab.settings)
    settings = lab.settings | {"root": str(root), "state_dir": str(root / "var/lib/bento")}
    second = replace(lab, machine=machine, settings=settings, directory=root)
    (root / "var/lib").mkdir(parents=True, exist_ok=True)
    if state:
        shutil.copytree(lab.state, second.state)
    else:
        second.state.mkdir()
        shutil.copy(lab.state / "id_ed25519", second.state)
    return second


def poll(lab: Lab) -> str:
    """A run after which hours have gone by."""
    done = lab.run_patched("c.TWIN_LOOK_S = -1")
    assert done.returncode == 0, done.stdout
    return done.stdout


def told(server: Server) -> bool:
    """Whether the server says so: in each form, and with its exit code."""
    code, table = server.run("status")
    (row,) = json.loads(server.run("status", "--json")[1])["hosts"]
    flag = bool(row["two_machines"])
    assert (f"two machines report as {HOST}" in table) == flag == (code == 1), table
    assert f'bento_host_two_machines{{host="{HOST}"}} {int(flag)}' in server.run("status", "--prometheus")[1]
    assert bool(re.search('<tr class="[^"]* two_machines', server.run("status", "--html")[1])) == flag
    return flag


def test_two_machines_with_one_name(server: Server) -> None:
    first = server.lab
    server.publish("v1")
    poll(first)
    assert not told(server)
    second = copy_of(first, state=True)
    assert "another machine reports as" in poll(second)
    assert told(server)
    assert "another machine reports as" in poll(first)
    assert "another machine reported as" in first.client("status")
    # It is told for a day, whichever of them reports.
    assert "another machine reports as" not in poll(first)
    assert told(server)
    # Neither of them was kept from its work.
    assert (first.labels(), second.labels()) == (("v1",) * 3, ("v0",) * 3)
    release = server.publish("v2")
    poll(first)
    poll(second)
    assert (first.labels(), second.labels()) == (("v2",) * 3, ("v2",) * 3) and first.report().release == release


def test_a_machine_in_the_place_of_another(server: Server) -> None:
    server.publish("v1")
    server.lab.client("run")
    new = copy_of(server.lab, state=False)
    new.client("run")
    new.client("run")
    assert not told(server) and "another machine" not in new.client("status")


def test_a_clone_that_is_gone_is_forgotten(server: Server) -> None:
    lab = server.lab
    server.publish("v1")
    lab.client("run")
    path = lab.state / "state.json"
    state = client.parse_state(path.read_bytes(), "state.json")
    path.write_bytes(client.encode(state._replace(twin="2026-11-01T00:00:00Z")))
    poll(lab)
    assert not told(server)
    assert client.parse_state(path.read_bytes(), "state.json").twin is None


@pytest.mark.parametrize("content", [b"no JSON", b"{}", b"\0" * 100_000, None])
def test_a_report_there_that_is_none(server: Server, content: bytes | None) -> None:
    lab = server.lab
    server.publish("v1")
    lab.client("run")
    there = lab.chroot / "logs/status.json"
    there.unlink()
    if content is not None:
        there.write_bytes(content)
    poll(lab)
    assert lab.report().release and not told(server)


def test_the_mark_says_nothing_of_the_id_and_knows_a_copied_disk(tmp_path: Path) -> None:
    def mark() -> str:
        found = client.Machine(client.make_settings({"host": "h", "root": str(tmp_path)}, "test")).mark
        return found or ""

    assert mark() == ""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    first = mark()
    assert len(first) == 16 and first not in "0123456789abcdef0123456789abcdef"
    (tmp_path / "sys/class/dmi/id").mkdir(parents=True)
    (tmp_path / "sys/class/dmi/id/product_uuid").write_text("board\n")
    assert mark() not in ("", first)
