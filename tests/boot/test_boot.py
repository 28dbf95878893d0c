"""The first boot is a trial: real boot loaders, kernels and systemd, and the real client's `run`.

    tests/run tests/boot                                a part
    BENTO_BOOT=all tests/run tests/boot                 all of it, and its table in tests/boot/table.md
"""

from collections.abc import Callable

import pytest

from boot.bed import Bed, at_rest
from boot.image import SYSTEMD_BOOT, Kind

Beds = Callable[[Kind], Bed]


@pytest.fixture
def bed(beds: Beds, request: pytest.FixtureRequest) -> Bed:
    kind: Kind = getattr(request, "param", SYSTEMD_BOOT)
    return beds(kind)


def test_good(bed: Bed) -> None:
    """A new kernel that is good: proven, the default, and nothing is left armed."""
    bed.publish("v1", kernel="6.13")
    bed.boot()
    seen = bed.wait(lambda seen: seen.settled == at_rest("v1"), "v1 at rest")
    assert bed.result() == ("ok", "")
    assert seen.way == "systemd-boot"
    assert len(bed.machine.boots) == 2


def test_panic(bed: Bed) -> None:
    """A kernel that panics at once: back by itself, tried once more, given up; and the next good release is deployed."""
    bed.publish("v1", kernel="panic-6.13")
    bed.boot()
    bed.wait(lambda seen: seen.settled == at_rest("v0") and bed.result()[0] == "rolled-back", "given up")
    assert bed.attempts() == ["interrupted", "rolled-back"]
    assert bed.machine.console_text().count("stage 1: kernel panic-6.13") == 2
    bed.publish("v2", kernel="6.14")
    bed.wait(lambda seen: seen.settled == at_rest("v2"), "v2 at rest")
