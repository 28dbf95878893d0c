"""A lid that is closed in the middle of an update: all that runs stands still, and the line comes up after the rest.

Frozen machines have clocks that go on, which is worse than sleep: every limit may have passed when they go on.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from lab.lab import Host, Server
from lab.test_matrix import at_rest, by_force, host, installed, publish, reports, server, settled, wait, wait_for_phase

__all__ = ["host", "installed", "server"]  # fixtures


def freeze(host: Host, frozen: bool) -> None:
    (host.cgroup / "cgroup.freeze").write_text(str(int(frozen)), encoding="utf-8")
    events: Path = host.cgroup / "cgroup.events"
    assert wait(lambda: f"frozen {int(frozen)}" in events.read_text(encoding="utf-8"), 10)


@pytest.mark.parametrize(("phase", "asleep_s"), [("build", 8), ("activate", 8), ("prove", 18), ("prove", 40)])
def test_a_closed_lid(host: Host, server: Server, phase: str, asleep_s: float) -> None:
    hold = {"build": "build", "activate": "switch"}.get(phase)
    more: dict[str, Any]
    if hold:
        more = {f"{hold}_touch": f"/root/at-{hold}", f"{hold}_wait": "/root/go"}
    else:
        check = "touch /root/at-prove; for i in $(seq 40); do [ -e /root/go ] && exit 0; sleep 0.1; done"
        more = {"settings": {"health_checks": [check]}}
    release = publish(server, host, "v2", **more)
    wait_for_phase(host, phase)
    host.link_down()
    freeze(host, True)
    time.sleep(asleep_s)
    host.write("/root/go", "")
    freeze(host, False)
    time.sleep(2)
    host.link_up()
    if phase == "prove":  # a change of the machine that was for nothing is tried again after a quarter of an hour; a person need not wait
        assert wait(lambda: at_rest(host) and reports(server, release)[-1:] in (["ok"], ["postponed"]), 90), host.console_tail(40)
        by_force(host)
    settled(host, server, "v2", 90)
    assert "rolled-back" not in reports(server, release)
    assert host.client("probe").stdout.startswith("the server is reached")
    publish(server, host, "v3")
    settled(host, server, "v3")
