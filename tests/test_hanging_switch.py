"""A switch that does not end is told with what systemd waits for, not with the numbers of its jobs."""

from pathlib import Path

from toylab import Lab, Systemd

JOBS = '''
if verb == "list-jobs":
    print("   7 slow.service start running\\n   8 next.service start waiting")
'''


def test_what_systemd_waits_for_is_the_reason(tmp_path: Path) -> None:
    lab = Lab.create(tmp_path)
    systemd = Systemd(lab)
    with open(systemd.top / "systemctl", "a") as file:
        file.write(JOBS)
    lab.publish("v1", switch_hang="before")
    systemd.run("run", "--activation-timeout", "2", code=1)
    assert "no end in time: systemd waits for slow.service (start)" in lab.last().reason
