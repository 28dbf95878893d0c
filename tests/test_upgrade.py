"""A machine that a client of 1.0 left in the middle of something: its journals and its state are read, and end well."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from toylab import Lab

import bento_client
from bento_client import Result

GOLDEN = Path(__file__).resolve().parent / "golden/1.0"


def make_1_0(lab: Lab, step: str, new: str, *, name: str = "pending.json", **more: Any) -> None:
    """state.json and a journal as 1.0 wrote them: v0 ran, and was the profile. Of the files that it wrote, with this
    machine's systems and releases in them."""
    path = lab.state / "state.json"
    state = json.loads(path.read_text()) if path.exists() else json.loads(bento_client.encode(bento_client.State()))
    fields = json.loads((GOLDEN / "state-ok.json").read_text())
    path.write_text(json.dumps({field: state[field] for field in fields}))
    current = json.loads((lab.chroot / "current.json").read_text())
    old = os.path.realpath(lab.machine.profile.parent / "system-1-link")
    here = {
        "release": current["release"], "published": current["published"], "old": old, "new": new, "profile": old,
        "boot_id": (lab.machine.root / "proc/sys/kernel/random/boot_id").read_text().strip(),
    }  # fmt: skip
    golden = GOLDEN / ("waiting.json" if name == "waiting.json" else f"pending-{step}.json")
    (lab.state / name).write_text(json.dumps(json.loads(golden.read_text()) | here | more))


def no_journals(lab: Lab) -> bool:
    return not any((lab.state / name).exists() for name in ("pending.json", "waiting.json", "pending.json.damaged"))


@pytest.mark.parametrize("kernel", ["6.13", "broken"])
@pytest.mark.parametrize("name", ["pending.json", "waiting.json"])
def test_a_system_that_waits_for_its_boot(tmp_path: Path, kernel: str, name: str) -> None:
    lab = Lab.create(tmp_path)
    release = lab.publish("v1", kernel=kernel)
    lab.client("run")
    make_1_0(lab, "rebooting", os.path.realpath(lab.machine.profile), name=name)
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1") and no_journals(lab)
    lab.machine.power_cycle()
    if kernel == "broken":
        for _ in range(bento_client.PATIENT_PROOFS - 1):
            lab.client("run", code=75)
        lab.machine.run(*lab.argv("run", code=None), env=lab.env())
        lab.machine.power_cycle()
        assert lab.machine.current_label() == "v0" and lab.machine.network() == "up"
    else:
        lab.client("run")
        assert lab.labels() == ("v1", "v1", "v1") and lab.report().release == release
    assert no_journals(lab)


def test_a_build_that_was_cut_short(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path)
    lab.publish("v1")
    lab.state.mkdir(parents=True, exist_ok=True)
    make_1_0(lab, "building", os.path.realpath(lab.machine.profile))
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1") and lab.last().result == Result.OK and no_journals(lab)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("step", ["activating", "proving", "committing", "rolling-back", "stepping-back", "reverting"])
def test_an_activation_that_was_cut_short(tmp_path: Path, step: str, restarted: bool) -> None:
    """v1 is live, and not the boot default; or the machine was restarted meanwhile. It ends on what works, with no journal."""
    lab = Lab.create(tmp_path)
    lab.publish("v1", kernel="6.13")
    lab.client("run")
    new = os.path.realpath(lab.machine.profile)
    lab.machine.run("nix-env", "-p", lab.machine.profile, "--switch-generation", "1").check_returncode()
    boot = Path(os.path.realpath(lab.machine.profile), "bin/switch-to-configuration")
    lab.machine.run(boot, "boot").check_returncode()
    back = step in ("rolling-back", "stepping-back", "reverting")
    make_1_0(lab, step, new)
    if restarted:
        lab.machine.power_cycle()
    for _ in range(2):
        lab.machine.run(*lab.argv("run"), env=lab.env())
    current, profile, boots = lab.labels()
    assert current == profile == boots == ("v0" if back else "v1") and no_journals(lab)
