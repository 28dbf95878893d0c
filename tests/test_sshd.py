"""A real sshd with the Match block that `bento.py fleet` makes: the client over good and bad lines, and a hostile host.

sshd is as permissive as can be for everybody else, and an ordinary account is let to do all that a host is denied:
so it is the block that denies it, and it denies nobody else. sshd runs without PAM, hence without the module's
loginLimits.
"""

import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from peer import Peer, master
from sshd import command, free_port
from sshdlab import BULK, EVIL, FRESH, GOOD, OTHER, PERSON, WAITING, Host, Line, Server, call, snapshot

# --- the loop ---


def test_the_block_is_good_sshd_config_and_is_for_hosts_only(server: Server) -> None:
    def effective(user: str) -> dict[str, str]:
        asked = f"user={user},host=localhost,addr=127.0.0.1"
        shown = call(*command("/usr/sbin/sshd", "-T", "-f", server.top / "sshd/config", "-C", asked)).stdout
        return dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)

    assert call(*command("/usr/sbin/sshd", "-t", "-f", server.top / "sshd/config")).stdout == ""
    host, person = effective(f"bento-{EVIL}"), effective(PERSON)
    denied = {
        "passwordauthentication", "kbdinteractiveauthentication", "allowtcpforwarding", "allowstreamlocalforwarding",
        "allowagentforwarding", "x11forwarding", "permittunnel", "permittty", "permituserrc",
    }  # fmt: skip
    assert {name: host[name] for name in denied} == dict.fromkeys(denied, "no")
    assert host["disableforwarding"] == "yes" and host["authenticationmethods"] == "publickey"
    assert host["maxsessions"] == "1" and host["chrootdirectory"] == "%h"
    assert not {name for name in denied if person[name] == "no"}
    assert person["disableforwarding"] == "no" and person["chrootdirectory"] == "none"


def test_a_host_pulls_and_reports(server: Server, fresh: Host) -> None:
    release = fresh.publish("v2")
    before = snapshot(server.chroot(FRESH), "logs")
    assert server.status(FRESH)["state"] == "new"

    done = fresh.run()

    assert done.returncode == 0, done.stdout
    assert fresh.machine.labels() == ("v2", "v2", "v2")
    assert snapshot(server.chroot(FRESH), "logs") == before
    logs = server.chroot(FRESH) / "logs"
    (log,) = server.logs(FRESH)
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z_{release[:12]}_ok\.log", log)
    assert sorted(path.name for path in logs.iterdir()) == sorted([log, "status.json"])
    for path in logs.iterdir():
        assert (path.owner(), path.group(), stat.S_IMODE(path.stat().st_mode)) == (f"bento-{FRESH}", "bento", 0o640)
    row = server.status(FRESH)
    assert (row["state"], row["release"], row["drift"], row["problem"]) == ("up-to-date", release, False, None)
    assert "ok" in server.bento("log", FRESH).stdout

    again = fresh.run()
    assert (again.returncode, again.stdout) == (0, f"up to date with release {release[:12]}\n")


def test_the_first_key_seen_is_kept_with_a_warning(server: Server, fresh: Host) -> None:
    fresh.publish("v1")
    probe, run = fresh.client("probe"), fresh.run()
    assert (probe.returncode, run.returncode) == (0, 0), run.stdout
    known = fresh.state / "known_hosts"
    warning = f"bento: warning: first contact with 127.0.0.1: its host key is kept in {known}"
    assert probe.stdout.count(warning) == 1 and "warning" not in run.stdout
    assert server.host_key().split()[1] in known.read_text()


def test_a_key_that_is_not_known_is_refused_when_keys_are_given(server: Server, fresh: Host) -> None:
    known = server.known_hosts(fresh.top / "known")
    good = fresh.client("probe", "--known-hosts", str(known))
    assert good.returncode == 0, good.stdout
    known.write_text("")
    done = fresh.client("probe", "--known-hosts", str(known))
    assert done.returncode == 75 and "its host key is not the known one" in done.stdout
    assert known.read_text() == "" and not (fresh.state / "known_hosts").exists()


def test_a_connection_is_never_shared(server: Server, fresh: Host) -> None:
    """What has to be proven is that a new connection can be made: whatever ssh_options say."""
    path = Path(tempfile.mkdtemp(), "c")  # a socket's path has to be short
    sharing = [
        f"--ssh-options={option}" for option in ("ControlMaster=auto", f"ControlPath={path}", "ControlPersist=60")
    ]
    with Line(server.port) as line:
        for expected in (1, 2):
            done = fresh.client("probe", *sharing, "--port", str(line.port))
            assert (done.returncode, line.accepted) == (0, expected), done.stdout
            assert not path.exists()
    # Somebody else's, alive, at that place: over it even a server that is not there would answer.
    with master(Peer(server, f"bento-{FRESH}"), path):
        done = fresh.client("probe", *sharing, "--port", str(free_port()))
    assert done.returncode == 75 and "connection refused" in done.stdout


# --- bad lines ---


def test_a_download_is_resumed_after_a_dropped_line(server: Server, fresh: Host) -> None:
    release = fresh.publish("v2", bulk=BULK)
    with Line(server.port, cut_after=BULK // 2) as line:
        done = fresh.run("--port", str(line.port))
    assert done.returncode == 75, done.stdout
    partial = fresh.state / f"partial/{release}.tar"
    assert BULK // 4 < partial.stat().st_size < BULK
    assert fresh.machine.labels() == ("v0", "v0", "v0") and not (fresh.state / "config").exists()
    with Line(server.port) as line:
        done = fresh.run("--port", str(line.port))
        assert done.returncode == 0, done.stdout
        assert line.carried < BULK * 3 // 4
    assert fresh.machine.labels() == ("v2", "v2", "v2") and not partial.exists()


def test_slow_is_fine_and_dead_is_not(server: Server, fresh: Host) -> None:
    release = fresh.publish("v2", bulk=BULK)
    with Line(server.port, stall_after=BULK // 4) as line:
        done = fresh.run("--port", str(line.port), stall_s=2)
    assert done.returncode == 75 and f"no answer to 'get releases/{release}.tar" in done.stdout, done.stdout
    shutil.rmtree(fresh.state / "partial")
    with Line(server.port, rate=BULK // 4) as line:
        started = time.monotonic()
        done = fresh.run("--port", str(line.port), stall_s=2)
        assert done.returncode == 0 and time.monotonic() - started > 4, done.stdout


def test_a_server_that_goes_away_during_the_build(server: Server, fresh: Host) -> None:
    release = fresh.publish("v2")
    with Line(server.port, connections=1) as line:
        done = fresh.run("--port", str(line.port))
    assert done.returncode == 75 and "the server went away" in done.stdout, done.stdout
    assert fresh.machine.labels() == ("v0", "v0", "v0")
    (waiting,) = (fresh.state / "outbox").iterdir()
    assert waiting.name.endswith(f"_{release[:12]}_postponed.log") and server.logs(FRESH) == []
    time.sleep(1)  # names of logs count seconds
    done = fresh.run()
    assert done.returncode == 0, done.stdout
    assert [log.split("_")[2] for log in server.logs(FRESH)] == ["postponed.log", "ok.log"]
    assert fresh.machine.labels() == ("v2", "v2", "v2") and list((fresh.state / "outbox").iterdir()) == []


def wrong_key(host: Host, line: Line) -> list[str]:
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host.top / "wrong")
    wrong = (host.top / "wrong.pub").read_text()
    return ["--known-hosts", str(host.server.known_hosts(host.top / "wrong_hosts", wrong))]


def unknown_key(host: Host, line: Line) -> list[str]:
    (host.top / "no_hosts").write_text("")
    return ["--known-hosts", str(host.top / "no_hosts")]


def refused_key(host: Host, line: Line) -> list[str]:
    return ["--identity", str(host.server.keys / f"bento-{OTHER}")]


def port_of(line: Line) -> list[str]:
    return ["--port", str(line.port), "--connect-timeout", "3"]


# A way to be out of reach: what the line does, the flags, what the message says.
UNREACHABLE: dict[str, tuple[dict[str, Any], Callable[[Host, Line], list[str]], str]] = {
    "wrong host key": ({}, wrong_key, "its host key is not the known one: if the server was renewed, correct"),
    "unknown host key": ({}, unknown_key, "its host key is not the known one: if the server was renewed, correct"),
    "refused key": ({}, refused_key, "it refuses this machine's key: give the output of 'bento-client key'"),
    "another user": ({}, lambda *_: ["--user", f"bento-{OTHER}"], "it refuses this machine's key"),
    "no such name": ({}, lambda *_: ["--server", "nowhere.invalid", "--connect-timeout", "2"], "its name cannot be resolved"),
    "refused port": (
        {}, lambda *_: ["--port", str(free_port()), "--connect-timeout", "2"],
        "connection refused: is sshd running there, on this port?",
    ),
    "says nothing": ({"stall_after": 0}, lambda _, line: port_of(line), "no answer in time"),
    "silent in the handshake": ({"stall_after": 900}, lambda _, line: port_of(line), "no answer"),
    "dropped in the handshake": ({"cut_after": 900}, lambda _, line: port_of(line), "the connection was lost"),
    "dropped in the middle": ({"cut_after": BULK // 2}, lambda _, line: port_of(line), "the connection was lost"),
    "silent in the middle": (
        {"stall_after": BULK // 2},
        lambda _, line: [*port_of(line), "--ssh-options=ServerAliveInterval=1", "--ssh-options=ServerAliveCountMax=2"],
        "no answer in time (Timeout, server 127.0.0.1 not responding.)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", UNREACHABLE)
def test_out_of_reach(settled_host: Host, way: str) -> None:
    """Exit 75 in time, one line that says why, and nothing has changed: neither here, nor at the server."""
    behaviour, flags, says = UNREACHABLE[way]
    transient = ["lock", "partial", "deploy.log"]
    transient += ["known_hosts"] if behaviour else []  # to ssh, the line's port is a name of its own
    before, labels, delivered = snapshot(settled_host.state, *transient), settled_host.machine.labels(), settled_host.server.logs(GOOD)
    with ExitStack() as stack:
        if "in the middle" in way:
            # Else the reports are delivered before the line fails.
            aside = settled_host.top / "aside"
            (settled_host.state / "outbox").rename(aside)
            stack.callback(aside.rename, settled_host.state / "outbox")
            stack.callback((settled_host.state / "outbox").rmdir)
            (settled_host.state / "outbox").mkdir(mode=0o700)
        line = stack.enter_context(Line(settled_host.server.port, **behaviour))
        done = settled_host.run(*flags(settled_host, line))
    errors = [text for text in done.stdout.splitlines() if "error" in text]
    assert done.returncode == 75 and len(errors) == 1, done.stdout
    assert says in errors[0] and "Traceback" not in done.stdout
    assert snapshot(settled_host.state, *transient) == before
    assert settled_host.machine.labels() == labels and settled_host.server.logs(GOOD) == delivered


def test_after_all_that_the_reports_arrive_in_order(settled_host: Host) -> None:
    shutil.rmtree(settled_host.state / "partial", ignore_errors=True)
    before = settled_host.server.logs(GOOD)
    assert sorted(path.name for path in (settled_host.state / "outbox").iterdir()) == sorted(WAITING)
    # With a delay, so that no two of them come in the same tick of the server's clock.
    with Line(settled_host.server.port, delay_s=0.01) as line:
        done = settled_host.run("--port", str(line.port))
    assert done.returncode == 0, done.stdout
    assert settled_host.machine.labels() == ("v2", "v2", "v2")
    *first, last = settled_host.server.logs(GOOD)[len(before) :]
    assert first == WAITING and last.endswith("_ok.log")
    assert (settled_host.server.chroot(GOOD) / "logs" / WAITING[0]).read_text() == f"log {WAITING[0]}\n"
    assert list((settled_host.state / "outbox").iterdir()) == []
