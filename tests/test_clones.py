"""Two machines with one name: both are told, neither is fought; one that takes the place of another is no clone."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fleet import Site
from test_states import Server, server
from toylab import HOST, Lab
from toynixos import ToyMachine

import bento
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


def told(server: Server) -> bool:
    """Whether the server says so: in each form, and with its exit code."""
    code, table = server.run("status")
    (row,) = json.loads(server.run("status", "--json")[1])["hosts"]
    flag = bool(row["two_machines"])
    assert (f"two machines report as {HOST}" in table) == flag == ("two_machines" in row["reasons"]), table
    assert code == int(bool(row["reasons"])), table
    assert f'bento_host_two_machines{{host="{HOST}"}} {int(flag)}' in server.run("status", "--prometheus")[1]
    assert bool(re.search('<tr class="[^"]* two_machines', server.run("status", "--html")[1])) == flag
    return flag


def test_two_machines_with_one_name(server: Server) -> None:
    first = server.lab
    server.publish("v1")
    first.client("run")
    assert not told(server)
    second = copy_of(first, state=True)
    second.client("run")
    assert not told(server), "it may have taken the other's place"
    first.client("run")
    assert told(server)
    second.client("run")
    assert told(server)
    # Neither of them was kept from its work.
    assert (first.labels(), second.labels()) == (("v1",) * 3, ("v0",) * 3)
    release = server.publish("v2")
    first.client("run")
    second.client("run")
    assert (first.labels(), second.labels()) == (("v2",) * 3, ("v2",) * 3) and first.report().release == release
    # It is told for a day after the last turn.
    path = server.lab.chroot.parent / ".machines"
    known = json.loads(path.read_text())
    for each in known[HOST]:
        each[1] -= bento.TWIN_S
    path.write_text(json.dumps(known))
    assert not told(server)


@pytest.mark.parametrize("state", [False, True])
def test_a_machine_in_the_place_of_another(server: Server, state: bool) -> None:
    """Or its disk in another machine."""
    server.publish("v1")
    server.lab.client("run")
    assert not told(server)
    new = copy_of(server.lab, state=state)
    for _ in range(2):
        new.client("run")
        assert not told(server)


A, B, C = "a" * 16, "b" * 16, "c" * 16


@pytest.mark.parametrize(
    ("marks", "twin"), [("A", 0), ("AA", 0), ("AB", 0), ("ABB", 0), ("ABA", 1), ("ABAAA", 1), ("ABCA", 1), ("ABC", 0), ("A-A", 0), ("A-B-A", 1)]
)
def test_whose_turn_it_is(hostile: Site, marks: str, twin: int) -> None:
    """`-`: a client that does not say, or a report that nobody can read."""
    marked = {"A": A, "B": B, "C": C}
    for mark in marks:
        hostile.write_report("a", **({"machine": marked[mark]} if mark in marked else {}))
        ran = hostile.run("status", "a", "--json")
    assert json.loads(ran.out)["hosts"][0]["two_machines"] is bool(twin)
    assert json.loads(hostile.run("status", "--json").out)["hosts"][0]["two_machines"] is bool(twin)


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"a": 1}', '{"a": [["x"]]}', '{"a": [[1, "x"]]}', '{"a": {"b": "c"}}'])
def test_a_memory_that_is_damaged_is_begun_anew(hostile: Site, content: str) -> None:
    (hostile.chroots / ".machines").write_text(content)
    for mark in (A, B, A):
        hostile.write_report("a", machine=mark)
        ran = hostile.run("status", "--json")
    assert json.loads(ran.out)["hosts"][0]["two_machines"] is True


def test_who_may_not_write_only_looks(hostile: Site) -> None:
    (hostile.chroots / ".machines").mkdir()
    hostile.write_report("a", machine=A)
    assert "Traceback" not in hostile.run("status").err and (hostile.chroots / ".machines").is_dir()


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
