"""systemd-run and systemctl of a toy machine, where no systemd runs: the lab has the real ones.

They keep the timers that are armed and the reboots that are asked for; nothing fires by itself. A program that
systemd-run starts lives on when the client dies, as a transient unit does.
"""

import json
import subprocess
import sys
from pathlib import Path

from toynixos import ToyMachine

SYSTEMD_RUN = """\
#!{python}
import json, os, subprocess, sys
at = sys.argv.index("--")
options = dict(word.partition("=")[::2] for word in sys.argv[1:at])
command = sys.argv[at + 1:]
if "--on-active" in options:
    with open("{top}/timers/" + options["--unit"], "w") as file:
        json.dump(command, file)
    sys.exit(0)
sinks = [word.split("append:", 1)[1] for word in sys.argv[1:at] if "StandardOutput=append:" in word]
with open(sinks[0] if sinks else os.devnull, "ab") as out:
    process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
open("{top}/units/" + options["--unit"], "w").write(str(process.pid))
sys.exit(process.wait() if "--wait" in options else 0)
"""
SYSTEMCTL = """\
#!{python}
import fnmatch, os, signal, sys
verb, *units = [word for word in sys.argv[1:] if not word.startswith("-")]

def alive(name):
    try:
        state = open("/proc/" + open("{top}/units/" + name).read() + "/stat").read()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"

if verb == "stop":
    for unit in units:
        for timer in fnmatch.filter(os.listdir("{top}/timers"), unit.removesuffix(".timer")):
            os.unlink("{top}/timers/" + timer)
        for name in filter(alive, fnmatch.filter(os.listdir("{top}/units"), unit.removesuffix(".service"))):
            os.killpg(int(open("{top}/units/" + name).read()), signal.SIGKILL)
elif verb == "is-active":
    found = fnmatch.filter(os.listdir("{top}/units"), units[0].removesuffix(".service"))
    sys.exit(0 if units[0] == "bento.timer" or any(map(alive, found)) else 3)
elif verb == "is-system-running":
    print("running")
elif verb == "reboot":
    open("{top}/reboots", "a").write("x")
"""


class ToySystemd:
    """`path` is the PATH of what is to find it."""

    def __init__(self, machine: ToyMachine, top: Path) -> None:
        self.machine, self.top = machine, top
        for name in ("timers", "units"):
            (top / name).mkdir(parents=True)
        for name, text in (("systemd-run", SYSTEMD_RUN), ("systemctl", SYSTEMCTL)):
            (top / name).write_text(text.format(python=sys.executable, top=top), encoding="utf-8")
            (top / name).chmod(0o755)
        self.path = f"{top}:{machine.env()['PATH']}"
        self.come_up()

    def come_up(self) -> None:
        (self.machine.root / "run/systemd/system").mkdir(parents=True, exist_ok=True)

    def boot(self, pick: str | None = None) -> list[str]:
        """A power cut and a boot; or the reboot that was asked for."""
        for timer in (self.top / "timers").iterdir():
            timer.unlink()
        (self.top / "reboots").unlink(missing_ok=True)
        starts = self.machine.power_cycle(pick=pick)
        self.come_up()
        return starts

    def reboots(self) -> bool:
        """Whether a reboot was asked for since the last one."""
        return (self.top / "reboots").exists()

    def timers(self) -> list[list[str]]:
        """The commands of the timers that are armed."""
        return [json.loads(timer.read_text(encoding="utf-8")) for timer in (self.top / "timers").iterdir()]

    def fire(self, **env: str) -> "subprocess.CompletedProcess[str]":
        """Time is up for the one timer there is."""
        [command] = self.timers()
        return self.machine.run(*command, env={"PATH": self.path, **env})
