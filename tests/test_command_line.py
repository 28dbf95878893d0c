"""The server's command line: in CI, in hooks, with output that goes away."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fleet import AS_ANYBODY, NOT_ROOT, REPO, Site, check_chroot, commit, run_outside, toy_host
from toynixos import need

import bento


def test_wait_for_another_populate(site: Site) -> None:
    """A second push, while the first is published, is published after it."""
    site.host("a")
    with bento.populate_lock(bento.Fleet(site.fleet, site.chroots)):
        argv = [sys.executable, "-c", AS_ANYBODY, *site.argv("populate", "--wait")]
        process = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while "flock" not in Path(f"/proc/{process.pid}/wchan").read_text() and not waits_for_lock(process.pid):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        site.host("late")
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "2 hosts: 2 published, 0 unchanged, 0 failed"
    assert stat.S_IMODE((site.chroots / ".lock").stat().st_mode) == 0o600


def waits_for_lock(pid: int) -> bool:
    return any(f" {pid} " in line and "->" in line for line in Path("/proc/locks").read_text().splitlines())


def test_json(site: Site, toys: Path) -> None:
    toy_host(site, "a")
    toy_host(site, "bad", build="eval-error")
    site.host("worse", {"x": "x"})

    def told(*words: str) -> list[dict[str, Any]]:
        return sorted((json.loads(line) for line in site.run(*words).out.splitlines()), key=lambda told: str(told["host"]))

    good, bad, worse = told("check", "--json")
    assert good == {
        "host": "a", "result": "evaluates", "release": good["release"], "size": good["size"], "revision": None, "system": None,
    }  # fmt: skip
    assert (bad["result"], bad["error"].splitlines()[-1]) == ("failed", "  error: The option `services.toy' does not exist.")
    assert worse == {"host": "worse", "result": "failed", "error": "hosts/worse: neither flake.nix nor configuration.nix in it"}
    assert [line["result"] for line in told("build", "a", "--json")] == ["built"]
    results = {
        ("--dry-run",): "would-publish", ("--build", "--revision", "r"): "published", (): "unchanged", ("--dry-run", "--check"): "unchanged",
    }  # fmt: skip
    for words, result in results.items():
        (line,) = told("populate", "a", "--json", *words)
        assert line["result"] == result
    assert (line["release"], line["revision"]) == (site.current().release, "r")


def test_a_dry_run_needs_no_accounts(real_root: None, site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_host(site, "no-such-account")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(bento, "log_directory", lambda: site.top / "log")
    assert site.run("populate", "--dry-run").out.splitlines()[-1] == "1 host: 1 would be published, 0 unchanged, 0 failed"
    assert site.run("check").code == 0
    assert not site.chroots.exists()


def test_a_dry_run_of_what_it_may_not_read(real_root: None, site: Site) -> None:
    """A person's, on the server."""
    site.host("a")
    site.publish()
    for path in [site.top, *site.top.parents]:
        if path.stat().st_mode & 0o5 != 0o5:
            path.chmod(path.stat().st_mode | 0o5)
    argv = [need("setpriv"), "--reuid=12345", "--regid=12345", "--clear-groups", sys.executable, str(REPO / "bento.py")]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*argv, *site.argv("populate", "--dry-run")], env=environment, capture_output=True, text=True, cwd="/")
    assert done.stdout.splitlines()[-1:] == ["1 host: 1 would be published, 0 unchanged, 0 failed"], done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["what"], ["add"], ["log"], ["populate", "--check", "--build"], ["status", "--offline-after", "x"]]
)
def test_usage(arguments: list[str], site: Site) -> None:
    ran = site.run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: bento.py")
    assert not site.chroots.exists()


def test_a_fleet_that_is_not_there(site: Site) -> None:
    shutil.rmtree(site.fleet)
    for command in (["populate"], ["status"], ["check"], ["log", "a"]):
        ran = site.run(*command)
        assert ran.code == 1
        assert ran.err == (
            f"bento: error: {site.fleet}/hosts: No such file or directory: --fleet names the directory that has hosts/ in it\n"
        )


def test_the_environment_names_the_directories(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.host("a")
    monkeypatch.setenv("BENTO_DIR", str(site.fleet))
    monkeypatch.setenv("BENTO_CHROOT_DIR", str(site.chroots))
    assert bento.main(["populate"]) == 0
    check_chroot(site.chroots / "a")


def test_no_traceback_when_the_reader_goes(site: Site) -> None:
    for number in range(2000):
        (site.fleet / f"hosts/host-{number}").mkdir()
    argv = [sys.executable, "-c", AS_ANYBODY, *site.argv("status")]
    process = subprocess.Popen(
        argv, env=os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(20)) == (b"", 1)


# Whose output has a reader that is gone before the first word.
GONE = 'exec 3> >(true); wait $!; exec "$@" >&3'


def test_a_reader_that_goes_stops_no_publication(site: Site) -> None:
    for number in range(6):
        site.host(f"h{number}")
    commit(site.fleet)
    done = run_outside(site, "populate", shell=GONE)
    assert (done.returncode, done.stderr) == (1, f"{NOT_ROOT}\n")
    for number in range(6):
        check_chroot(site.chroots / f"h{number}")


@pytest.mark.parametrize("words", [["-v", "populate"], ["populate", "--json"]])
def test_a_reader_that_goes_is_no_failure_of_a_host(words: list[str], site: Site) -> None:
    for number in range(6):
        site.host(f"h{number}")
    site.publish()
    done = run_outside(site, *words, shell=GONE)
    assert done.returncode == 1 and "error" not in done.stderr
    assert (site.chroots / ".lock").read_text() == ""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_output(closed: str, site: Site) -> None:
    site.host("a")
    for words in (["populate"], ["status"]):
        done = run_outside(site, *words, shell=f'exec "$@" {">&-" if closed == "stdout" else "2>&-"}')
        assert done.returncode == 0 and "Traceback" not in done.stderr
    check_chroot(site.chroots / "a")


@pytest.mark.parametrize("option", ["--fleet", "--chroot-dir"])
def test_what_an_unset_variable_gives_is_no_default(option: str, site: Site) -> None:
    ran = site.run(option, "", "populate", "--prune")
    assert ran.code == 2 and "it is empty" in ran.err


@pytest.mark.parametrize("option", ["--output", "--changes"])
@pytest.mark.parametrize("name", [".", "/"])
def test_a_file_that_is_a_directory(option: str, name: str, site: Site) -> None:
    ran = site.run("status", option, name)
    assert (ran.code, ran.err) == (2, f"bento: error: {option} {name}: this is a directory: name a file\n")


@pytest.mark.parametrize("days", ["99999999", "-99999999", "9" * 30])
def test_days_that_no_calendar_has(days: str, site: Site) -> None:
    site.host("a")
    ran = site.run("sign", "--key", str(site.top), "--days", days)
    assert (ran.code, ran.err) == (2, f"bento: error: --days {days}: at most 36500, a hundred years\n")


@pytest.mark.parametrize("option", ["--output", "--changes"])
def test_a_file_that_cannot_be_written_is_named_as_it_was_given(option: str, site: Site) -> None:
    """And not a temporary one beside it."""
    site.host("a")
    site.publish()
    ran = site.run("status", option, "/nope/x")
    assert (ran.code, ran.errors[-1]) == (1, "bento: error: /nope/x: No such file or directory")
