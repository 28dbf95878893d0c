"""The server or the line goes away, hangs, or lags behind."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

from toylab import NOON, B, Lab, Systemd, be_patient, fake_sftp, inhibited, result, tree, wait_until

from bento_client import Result, log_name

# --- the server or the line goes away ---


def test_server_down(lab: Lab) -> None:
    lab.publish("v1")
    lab.down.touch()
    before = tree(lab.state)
    assert "cannot reach server.example: connection refused" in lab.client("run", code=75)
    assert tree(lab.state).keys() - {"lock"} == before.keys()
    assert lab.labels() == ("v0", "v0", "v0")
    lab.down.unlink()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")


def test_a_server_without_logs_is_no_full_disk(lab: Lab) -> None:
    lab.publish("v1")
    shutil.rmtree(lab.chroot / "logs")
    said = lab.client("run")
    assert "there is no logs/: 'bento.py populate' on the server makes it" in said and "disk full" not in said


def test_server_comes_back_while_the_client_waits(lab: Lab) -> None:
    lab.publish("v1")
    lab.down.touch()
    lab.settings["connect_timeout"] = 20
    process = lab.start("run")
    time.sleep(0.5)
    assert process.poll() is None
    lab.down.unlink()
    assert lab.finish(process) == 0
    assert lab.labels() == ("v1", "v1", "v1")


def test_server_down_during_the_build(lab: Lab) -> None:
    """Built, not activated; reported when the server is back, in order."""
    lab.publish("v1", build_touch=lab.file("building"), build_wait=lab.file("go"))
    process = lab.start("run")
    wait_until(Path(lab.file("building")).exists)
    lab.down.touch()
    Path(lab.file("go")).touch()
    assert lab.finish(process) == 75
    ended_s = time.time()
    assert lab.labels() == ("v0", "v0", "v0")
    assert "last       postponed" in lab.client("status")
    assert "built, but not activated, because the server went away" in lab.client("status")
    assert "outbox     1 not delivered yet" in lab.client("status")
    assert lab.logs() == []
    lab.client("run", code=75)
    assert lab.logs() == []

    lab.down.unlink()
    wait_until(lambda: int(time.time()) > int(ended_s))  # a log is named by the second
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().attempt) == (Result.OK, 2)
    assert [name.split("_")[2] for name in lab.logs()] == ["postponed.log", "ok.log"]
    assert "outbox" not in lab.client("status")


def test_server_down_during_the_proof(lab: Lab) -> None:
    """The old system cannot reach it either: the release is not to blame, and is tried again."""
    lab.publish("v1", switch_touch=lab.file("switching"), switch_wait=lab.file("go"))
    process = lab.start("run", "--confirm-timeout", "2")
    wait_until(Path(lab.file("switching")).exists)
    wait_until(lambda: lab.phase() == "activating")
    lab.down.touch()
    Path(lab.file("go")).touch()
    assert lab.finish(process) == 75
    assert lab.labels() == ("v0", "v0", "v0")
    assert "last       postponed" in lab.client("status")
    lab.down.unlink()
    (lab.chroot / "releases").rename(lab.chroot / "away")  # it has been fetched
    assert "next attempt in 1" in lab.client("run"), "that has cost an activation"
    lab.age_attempts(15 * 60)
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert (lab.last().result, lab.last().attempt) == (Result.OK, 2)


def test_outbox_is_delivered_in_order(lab: Lab) -> None:
    """And the server keeps the newest twenty logs."""
    lab.publish("v1")
    outbox = lab.state / "outbox"
    outbox.mkdir()
    names = [log_name(NOON - 10**8 + number, B, "postponed") for number in range(30)]
    for name in names[10:]:
        (outbox / name).write_text(f"this is {name}\n")
    for name in names[:10]:
        (lab.chroot / "logs" / name).write_text("delivered before\n")
    (lab.chroot / "logs/notes.txt").write_text("not one of ours\n")
    (lab.chroot / "logs" / names[20]).mkdir()  # where the server says no
    lab.client("run")
    assert sorted(path.name for path in outbox.iterdir())[:-1] == names[20:]
    (lab.chroot / "logs" / names[20]).rmdir()
    lab.client("run")
    assert list(outbox.iterdir()) == []
    logs = sorted((lab.chroot / "logs").glob("*.log"))
    assert len(logs) == 20
    assert logs[-1].name == lab.last().log
    assert logs[-2].read_text() == f"this is {names[-1]}\n"
    assert (lab.chroot / "logs/notes.txt").exists()


def test_refused_reports_are_not_the_releases_fault(lab: Lab) -> None:
    lab.publish("v1", switch_touch=lab.file("switched"))
    (lab.config / "large").write_bytes(os.urandom(2 << 20))  # this one is announced before it is fetched, too
    lab.populate()
    (lab.chroot / "logs").rename(lab.chroot / "away")
    (lab.chroot / "logs").write_text("not a directory\n")
    assert "report kept for the next run" in lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    (lab.chroot / "logs").unlink()
    (lab.chroot / "away").rename(lab.chroot / "logs")
    lab.client("run")
    assert (lab.last().result, lab.last().attempt, len(lab.logs())) == (Result.OK, 1, 1)


def test_an_sftp_that_does_not_end_by_itself_is_ended(lab: Lab) -> None:
    """The first connection is left to itself while the release is built; what it still does must not come later."""
    lab.publish("v1")
    pids = lab.directory / "pids"
    lab.client("run", PATH=fake_sftp(lab, f'echo $$ >>{pids}\nsftp "$@"\ncode=$?\nsleep 300\nexit $code\n'))
    assert lab.labels() == ("v1", "v1", "v1") and (lab.last().result, lab.report().phase) == (Result.OK, "idle")
    started = pids.read_text().split()
    assert len(started) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in started)


def sftp_by_server(lab: Lab, **chroots: Path | None) -> str:
    """A PATH on which `sftp` knows several servers; the directory that each serves, or None for one that is down."""
    cases = "".join(
        f"*@{name}) {'export TOY_CHROOT=' + str(chroot) if chroot else 'export TOY_SERVER_DOWN=/'} ;;\n"
        for name, chroot in chroots.items()
    )
    return fake_sftp(lab, f'for word; do :; done\ncase $word in\n{cases}esac\nexec sftp "$@"\n')


def test_a_thousand_old_logs_do_not_hang_it(lab: Lab) -> None:
    """Nobody reads what sftp says to their removal: of too many at once, both pipes are full."""
    lab.publish("v1")
    lab.client("run")
    for number in range(2500):
        (lab.chroot / "logs" / f"20200101T{number:06d}Z_{'a' * 12}_ok.log").write_text("old\n")
    (lab.chroot / "logs" / f"20200101T000000Z_{'b' * 12}_ok.log").mkdir()
    (lab.state / "outbox" / f"20200101T000000Z_{'c' * 12}_postponed.log").write_text("waits\n")
    before = len(lab.logs())
    assert lab.finish(lab.start("run")) == 0
    assert before - 25 < len(lab.logs()) < before - 15 and list((lab.state / "outbox").iterdir()) == []


def test_a_poll_that_hangs_is_ended(lab: Lab) -> None:
    """No watchdog guards it, and as long as it holds the lock no other run can start."""
    lab.publish("v1")
    lab.client("run")
    pid = lab.directory / "pid"
    path = fake_sftp(lab, f'echo $$ >{pid}\nsed -u "/^put/q" | sftp "$@"\nexec sleep 300\n')
    done = lab.run_patched("c.POLL_LIMIT_S = 2", PATH=path)
    os.killpg(int(pid.read_text()), signal.SIGKILL)
    assert done.returncode == -signal.SIGALRM, done.stdout
    assert "up to date" in lab.client("run")
    assert not list(lab.state.glob(".tmp-*"))


def test_archive_that_outgrows_its_size_is_reported(lab: Lab) -> None:
    release = lab.publish("v1")
    os.truncate(lab.chroot / "releases" / f"{release}.tar", 6 << 30)  # sparse
    lab.client("run", code=1)
    assert (lab.last().result, len(lab.logs())) == (Result.FETCH_FAILED, 1)
    assert "more than the announced" in lab.last().reason


def test_release_that_never_arrives_does_not_hide_the_host(lab: Lab) -> None:
    """The line brings current.json, and dies of what is larger. The host polls, and its server sees that."""
    lab.publish("v1")
    lab.client("run")
    (lab.state / "outbox" / f"20200101T000000Z_{'c' * 12}_postponed.log").write_text("waits\n")
    before = (lab.chroot / "logs/status.json").stat().st_mtime_ns
    lab.publish("v2")
    cut = 'sed -u "/get releases/q" | sed -u "/get releases/d"'
    path = fake_sftp(lab, f'{cut} | sftp "$@"\necho Connection reset by peer\nexit 255\n')
    assert "the connection was lost" in lab.client("run", code=75, PATH=path)
    assert (lab.chroot / "logs/status.json").stat().st_mtime_ns > before and len(lab.logs()) == 2


def test_a_report_goes_where_its_release_came_from(lab: Lab) -> None:
    """Though another server, which has no release, answers first."""
    lab.use_two_servers()
    lab.publish("v1")
    empty = lab.directory / "empty"
    (empty / "logs").mkdir(parents=True)
    path = sftp_by_server(lab, first=empty, second=lab.chroot)
    lab.client("run", PATH=path, TOY_SERVER="")
    assert (lab.last().result, lab.report().phase, len(lab.logs())) == (Result.OK, "idle", 1)
    assert list((empty / "logs").iterdir()) == []


def test_second_server_when_the_first_is_down(lab: Lab) -> None:
    lab.use_two_servers()
    path = sftp_by_server(lab, first=None, second=lab.chroot)
    lab.publish("v1")
    lab.client("run", PATH=path, TOY_SERVER="")
    assert lab.labels() == ("v1", "v1", "v1")
    assert lab.last().result == Result.OK
    said = lab.client("run", code=75, PATH=sftp_by_server(lab, first=None, second=None), TOY_SERVER="")
    assert "cannot reach first: connection refused" in said and "cannot reach second: connection refused" in said


def test_server_that_lags_behind(lab: Lab) -> None:
    """A replica with an older release never takes a host back; its newer one is taken."""
    lab.use_two_servers()
    lab.publish("v1")
    stale = lab.directory / "stale"
    shutil.copytree(lab.chroot, stale, symlinks=True)
    path = sftp_by_server(lab, first=stale, second=lab.chroot)
    lab.publish("v2")
    current = json.loads((lab.chroot / "current.json").read_text())
    (stale / "current.json").write_text(
        json.dumps(json.loads((stale / "current.json").read_text()) | {"published": "2020-01-01T00:00:00Z"})
    )
    lab.client("run", PATH=sftp_by_server(lab, first=lab.chroot, second=stale), TOY_SERVER="")
    assert lab.labels() == ("v2", "v2", "v2")
    said = lab.client("run", PATH=sftp_by_server(lab, first=stale, second=lab.chroot), TOY_SERVER="")
    assert "first is behind" in said and f"up to date with release {current['release'][:12]}" in said
    said = lab.client("run", PATH=sftp_by_server(lab, first=stale, second=None), TOY_SERVER="")
    assert "the server is behind: it publishes a release of 2020-01-01T00:00:00Z" in said
    lab.client("run", "--force", PATH=path, TOY_SERVER="")
    assert lab.labels() == ("v1", "v1", "v1"), "somebody knows better"


# --- ways back that fail ---


def test_a_reboot_is_asked_for_again_when_the_server_was_down(tmp_path: Path) -> None:
    """For longer than anybody waits: nobody is to blame for that either."""
    lab = inhibited(tmp_path)
    systemd = Systemd(lab)
    lab.settings["reboot"] = "when-needed"
    lab.publish("v1", inhibitors="dbus 2")
    systemd.run("run")
    systemd.boot()
    lab.down.touch()
    be_patient(lab)
    systemd.run("run", code=1)
    systemd.boot()
    systemd.run("run", code=75)
    assert result(lab)[0] == Result.POSTPONED
    assert lab.labels() == ("v0", "v0", "v0")
    lab.down.unlink()
    lab.age_attempts(15 * 60)
    systemd.run("run")
    assert systemd.reboots() == 3
    systemd.boot()
    systemd.run("run")
    assert lab.labels() == ("v1", "v1", "v1") and result(lab)[0] == Result.OK


def test_a_bad_moment_of_the_server_is_forgotten(settled: Lab) -> None:
    path = settled.chroot / "current.json"
    good, before = path.read_bytes(), settled.last()
    path.write_bytes(b"{")
    settled.client("run", code=1)
    assert settled.last().result == Result.FETCH_FAILED
    path.write_bytes(good)
    settled.client("run")
    assert settled.last() == before
