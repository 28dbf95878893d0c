"""Machines of the boot lab are made once for all its tests, and start anew for each."""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from lab.conftest import name_event
from lab.conftest import need as need_lab
from lab.image import ImageError
from tiers import stamp

from boot.bed import Bed, Server, first_boot, make_bed
from boot.image import ALL_KINDS, Kind, base_tree
from boot.machine import FIRMWARE, TOOLS, VARIABLES

TABLE = Path(__file__).with_name("table.md")
HEAD = """\
# The first boot is a trial: what was seen

Written by `tests/run --whole tests/boot`: each row is of the last such run of its test. A row is a machine in QEMU with
real firmware, boot loader, kernel and systemd, and the real client's `run`. Boots: how often it got up, from its first one
on. See [the tests](test_boot.py) for what each one looks at in the end.

| event | boot loader | | boots | minutes | of |
| --- | --- | --- | --- | --- | --- |
"""
# (event, boot loader) -> the rest of its row
rows: dict[tuple[str, str], str] = {}


def need() -> None:
    """Skips the test, with the reason, where there can be no such machine; under BENTO_TESTS=all it fails instead."""
    need_lab()
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    missing += [str(file) for file in (FIRMWARE, VARIABLES) if not file.exists()]
    reason = f"the boot lab needs {', '.join(missing)}" if missing else ""
    if not reason:
        try:
            base_tree()
        except ImageError as error:
            reason = f"the boot lab: {error}"
    if reason:
        if os.environ.get("BENTO_TESTS") == "all":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def beds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Kind], Bed]]:
    """A machine of a kind as it was after its first boot, off; with an empty server that is up."""
    need()
    directory = tmp_path_factory.mktemp("boot")
    server = Server(directory)
    made: dict[str, tuple[Bed, tuple[Path, Path]]] = {}

    def give(kind: Kind) -> Bed:
        if kind.name not in made:
            bed = make_bed(kind, directory, server)
            made[kind.name] = bed, first_boot(bed)
        bed, kept = made[kind.name]
        for other, _ in made.values():
            other.machine.power_cut()
        bed.machine.reset(*kept)
        server.stop()
        server.empty()
        server.start()
        return bed

    yield give
    for bed, _ in made.values():
        bed.machine.power_cut()
    server.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the end of its machine's console."""
    report = yield
    for used in getattr(item, "funcargs", {}).values():
        if report.failed and isinstance(used, Bed):
            report.sections.append(("console", used.tail()))
        if report.when == "call" and isinstance(used, Bed):
            rows[name_event(item.name, *(kind.name for kind in ALL_KINDS)), used.kind.name] = (
                f"{report.outcome} | {len(used.machine.boots)} | {report.duration / 60:.1f} | {stamp()}"
            )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not (session.config.option.whole and rows):
        return
    known: dict[tuple[str, str], str] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines()[8:] if TABLE.exists() else []:
        event, loader, rest = line.strip("| ").split(" | ", 2)
        known[event, loader] = rest
    lines = (f"| {event} | {loader} | {rest} |\n" for (event, loader), rest in (known | rows).items())
    TABLE.write_text(HEAD + "".join(lines), encoding="utf-8")
