#!/usr/bin/env python3
"""What Bento costs, against what a user would otherwise run, side by side in one run.

    python3 tests/bench.py [--hosts 1000] [--rounds 3]

Every row is a ratio of medians on this machine, now: there is no absolute promise in it. Needs rsync, sftp and
sftp-server. Nothing is asserted.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from toynixos import TOY

import bento_client as client

REPO = Path(__file__).resolve().parent.parent
# The bench publishes as anybody may; root would be asked for the hosts' accounts.
AS_ANYBODY = "import os, sys; os.geteuid = lambda: 1; import bento; sys.exit(bento.main())"


def make_fleet(top: Path, hosts: int) -> None:
    """31 files a host, 20 of them shared through utils/."""
    dice = random.Random(1)
    (top / "utils").mkdir(parents=True)
    for number in range(20):
        (top / f"utils/module-{number}.nix").write_text(dice.randbytes(1500).hex())
    for number in range(hosts):
        host = top / f"hosts/h{number:05}"
        host.mkdir(parents=True)
        (host / "utils").symlink_to("../../utils")
        (host / "configuration.nix").write_text(f"# {number}\n")
        for part in range(10):
            (host / f"part-{part}.nix").write_text(dice.randbytes(600).hex())


def measure(argv: Sequence[str | Path], *, env: dict[str, str] | None = None, stdin: str = "") -> tuple[float, float]:
    """Elapsed and CPU seconds of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(argv, check=False, env=env, input=stdin, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def row(what: str, ours: Sequence[float], against: str, theirs: Sequence[float]) -> None:
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(f"| {what} | {mine:.3f} s | {against} | {other:.3f} s | {mine / other:.2f} |", flush=True)


def alternate(rounds: int, *actions: Callable[[], float]) -> list[list[float]]:
    """Runs the actions in turn, so that what else the machine does falls on all of them."""
    results: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for found, action in zip(results, actions, strict=True):
            found.append(action())
    return results


def bench_populate(top: Path, rounds: int) -> None:
    fleet, chroot = top / "fleet", top / "chroot"
    argv: list[str | Path] = [sys.executable, "-c", AS_ANYBODY, "--fleet", fleet, "--chroot-dir", chroot, "populate"]
    env = os.environ | {"PYTHONPATH": str(REPO)}

    def populate() -> float:
        return measure(argv, env=env)[0]

    def populate_new() -> float:
        shutil.rmtree(chroot, ignore_errors=True)
        os.sync()
        return populate()

    def copy() -> float:
        shutil.rmtree(top / "copy", ignore_errors=True)
        os.sync()
        return measure(["sh", "-c", 'cp -rL "$1" "$2" && sync', "sh", fleet / "hosts", top / "copy"])[0]

    new, copied = alternate(rounds, populate_new, copy)
    row("populate, everything new, durable", new, "cp -rL and sync", copied)
    script = 'cd "$1"; for h in *; do rsync -rltgoDL "$h/" "$2/$h/"; diff -r "$2/$h" "$3/$h/config/" >/dev/null; done'
    shell: list[str | Path] = ["sh", "-c", f'mkdir -p "$2"; {script}', "sh", fleet / "hosts", top / "staging", chroot]
    find: list[str | Path] = ["sh", "-c", 'find -L "$1" -type f -print0 | xargs -0 sha256sum', "sh", fleet / "hosts"]
    same, hashed = alternate(rounds, populate, lambda: measure(find)[0])
    row("populate, nothing changed", same, "find and sha256sum", hashed)
    measure(shell)
    row("populate, nothing changed", same, "rsync and diff, a host at a time", [measure(shell)[0]])
    peak = "import resource, runpy, sys, os; os.geteuid = lambda: 1; sys.path.insert(0, sys.argv.pop(1)); import bento; "
    peak += "bento.main(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", peak, REPO, *argv[3:]], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    print(f"\npeak memory of populate: {int(done.stderr.split()[-1]) / 1024:.0f} MB\n")


def bench_status(top: Path, hosts: int, rounds: int) -> None:
    fleet, chroot = top / "fleet", top / "chroot"
    for path in sorted((fleet / "hosts").iterdir())[:hosts]:
        current = client.parse_current((chroot / path.name / "current.json").read_bytes(), path.name)
        last = client.Last(current.release, "ok", "", "/nix/store/x", current.published, current.published, 1,
                           client.log_name(time.time(), current.release, "ok"))  # fmt: skip
        report = client.Report(path.name, client.VERSION, current.published, "idle", current.release, "/nix/store/x", False, last)
        (chroot / path.name / "logs/status.json").write_bytes(client.encode(report))
    status: list[str | Path] = [sys.executable, REPO / "bento.py", "--fleet", fleet, "--chroot-dir", chroot, "status", "--json"]
    cat: list[str | Path] = ["sh", "-c", 'cat "$1"/*/logs/status.json', "sh", chroot]
    ours, theirs = alternate(rounds, lambda: measure(status)[0], lambda: measure(cat)[0])
    row(f"status --json, {hosts} hosts", ours, "cat of the reports", theirs)


def bench_poll(top: Path, rounds: int) -> None:
    """A poll with nothing new, in CPU seconds. Both through the toy's sftp, that is, without ssh."""
    chroot = top / "chroot/h00000"
    state = top / "state"
    settings = {"server": "server", "host": "h00000", "state_dir": str(state), "root": str(top / "root")}
    (top / "root/run").mkdir(parents=True)
    (top / "client.json").write_text(json.dumps(settings))
    env = os.environ | {"PATH": f"{TOY}:{os.environ['PATH']}", "TOY_CHROOT": str(chroot), "TOY_ROOT": str(top / "root")}
    poll: list[str | Path] = [sys.executable, "-I", REPO / "bento_client.py", "--config", top / "client.json"]
    measure([*poll, "key"], env=env)
    current = client.parse_current((chroot / "current.json").read_bytes(), "current.json")
    last = client.Last(current.release, "ok", "", "/nix/store/x", current.published, current.published, 1,
                       client.log_name(time.time(), current.release, "ok"))  # fmt: skip
    (state / "state.json").write_bytes(client.encode(client.State(release=current.release, tried=last, last=last)))
    report = top / "report"
    shutil.copy(chroot / "logs/status.json", report)
    batch = f"get current.json {top}/got\nput {report} logs/.status.json\nrename logs/.status.json logs/status.json\n"
    sftp: list[str | Path] = ["sftp", "-b", "-", "-C", "server"]
    ours, theirs = alternate(
        5 * rounds, lambda: measure([*poll, "run"], env=env)[1], lambda: measure(sftp, env=env, stdin=batch)[1]
    )
    row("a poll with nothing new, CPU", ours, "bare sftp -b, CPU", theirs)
    print(f"\nthat is {1000 * (statistics.median(ours) - statistics.median(theirs)):.0f} ms more\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for program in ("rsync", "sftp"):
        if shutil.which(program) is None:
            print(f"bench: error: {program} is missing: install it", file=sys.stderr)
            return 1
    with tempfile.TemporaryDirectory(prefix="bento-bench-") as name:
        top = Path(name)
        make_fleet(top / "fleet", options.hosts)
        print(f"{options.hosts} hosts of 31 files, medians of {options.rounds} rounds\n")
        print("| Bento | | against | | ratio |\n| --- | --- | --- | --- | --- |")
        bench_populate(top, options.rounds)
        bench_status(top, options.hosts, options.rounds)
        bench_poll(top, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
