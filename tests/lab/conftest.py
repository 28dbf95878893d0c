"""The lab is started once for all its tests."""

import os
from collections.abc import Generator, Iterator

import pytest

from lab.lab import Lab, why_not


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    need()
    with Lab() as made:
        yield made


def need() -> None:
    """Skips the test, with the reason, where no lab can be; under BENTO_TESTS=all it fails instead."""
    if reason := why_not():
        if os.environ.get("BENTO_TESTS") == "all":
            pytest.fail(reason)
        pytest.skip(reason)


def name_event(test: str, *kinds: str) -> str:
    """For a table, from a test's name: its parameter, but for the kind of machine, goes behind a colon."""
    name, _, parameter = test.removeprefix("test_").removesuffix("]").partition("[")
    for kind in kinds:
        parameter = parameter.removeprefix(kind).lstrip("-")
    return ": ".join(part for part in (name.replace("_", " "), parameter) if part)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the end of its machines' consoles."""
    report = yield
    used = getattr(item, "funcargs", {}).get("lab")
    if report.failed and isinstance(used, Lab):
        for machine in used.machines.values():
            report.sections.append((f"console of {machine.name}", machine.console_tail()))
    return report
