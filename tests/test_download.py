"""How releases arrive: resumed, in parts, in little memory."""

import hashlib
import json
import os
import re
import shutil
import sys
import time

import pytest
from toylab import SERVER, A, B, Lab, tree
from toynixos import TOY

import bento_client
from bento_client import Result, parse_current


@pytest.mark.parametrize("whole", [False, True])
def test_download_goes_on_where_it_stopped(lab: Lab, whole: bool) -> None:
    """What has come is not asked for again: the server has it no more."""
    release = lab.publish("v1")
    path = lab.chroot / "releases" / f"{release}.tar"
    tar = path.read_bytes()
    here = len(tar) if whole else len(tar) // 2
    (lab.state / "partial").mkdir()
    (lab.state / "partial" / path.name).write_bytes(tar[:here])
    (lab.state / "partial" / f"{B}.tar").write_bytes(b"of an older release")
    path.unlink()
    if not whole:
        path.write_bytes(bytes(here) + tar[here:])
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    assert tree(lab.state / "config") == tree(lab.config)


BIG = 1 << 20


@pytest.fixture
def heavy(lab: Lab) -> Lab:
    """A machine that runs a release with large files."""
    lab.publish("v1")
    for number in range(3):
        (lab.config / f"big{number}").write_bytes(os.urandom(BIG + 1000 * number))
    lab.populate()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    return lab


def parts(lab: Lab) -> list[tuple[str, int]]:
    return [(p.sha256, p.size) for p in parse_current((lab.chroot / "current.json").read_bytes(), "current.json").parts]


def test_large_files_that_are_here_are_not_fetched_again(heavy: Lab) -> None:
    kept = (heavy.config / "big0").read_bytes()
    (heavy.config / "big1").write_bytes(os.urandom(BIG))
    (heavy.config / "big2").rename(heavy.config / "elsewhere")
    (heavy.config / "also").write_bytes(kept)
    release = heavy.publish("v2")
    there = heavy.chroot / "releases" / f"{release}.parts"
    for path in (heavy.config / "big0", heavy.config / "elsewhere"):
        (there / hashlib.sha256(path.read_bytes()).hexdigest()).unlink()
    (heavy.chroot / "releases" / f"{release}.tar").unlink()
    heavy.client("run")
    assert heavy.labels() == ("v2", "v2", "v2")
    assert tree(heavy.state / "config") == tree(heavy.config)
    assert not (heavy.state / "partial").exists()


def test_a_large_file_that_changed_here_is_fetched(heavy: Lab) -> None:
    ours = heavy.state / "config/big0"
    ours.write_bytes(bytes(ours.stat().st_size))
    heavy.publish("v2")
    heavy.client("run")
    assert heavy.labels() == ("v2", "v2", "v2")
    assert tree(heavy.state / "config") == tree(heavy.config)


def test_a_damaged_part_is_met_with_the_whole_archive(heavy: Lab) -> None:
    release = heavy.publish("v2")
    changed = heavy.chroot / "releases" / f"{release}.parts" / parts(heavy)[-1][0]
    changed.write_bytes(bytes(changed.stat().st_size))
    assert "damaged" in heavy.client("run", code=1)
    assert heavy.labels() == ("v1", "v1", "v1")
    assert heavy.last().result == Result.FETCH_FAILED
    heavy.client("run")
    assert heavy.labels() == ("v2", "v2", "v2")
    assert heavy.last().attempt == 2


@pytest.mark.parametrize("keep", [0, 1, 2000, BIG, BIG + 40_000, 3 * BIG])
def test_parts_go_on_where_it_stopped(heavy: Lab, keep: int) -> None:
    """Cut short anywhere: in a part from here, in one that came, while one is coming."""
    (heavy.config / "big1").write_bytes(os.urandom(BIG))
    release = heavy.publish("v2")
    archive = (heavy.chroot / "releases" / f"{release}.tar").read_bytes()
    changed = hashlib.sha256((heavy.config / "big1").read_bytes()).hexdigest()
    (heavy.state / "partial").mkdir()
    (heavy.state / "partial" / f"{release}.tar").write_bytes(archive[:keep])
    (heavy.state / "partial" / changed).write_bytes((heavy.config / "big1").read_bytes()[: keep // 2])
    heavy.client("run")
    assert heavy.labels() == ("v2", "v2", "v2")
    assert heavy.last().attempt == 1
    assert tree(heavy.state / "config") == tree(heavy.config)


@pytest.mark.parametrize(
    "part", [7, None, {}, {"sha256": "../../etc/passwd", "size": 1}, {"sha256": A, "size": -1}, {"sha256": A, "size": 1.5}]
)
def test_malformed_parts(heavy: Lab, part: object) -> None:
    path = heavy.chroot / "current.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"parts": [part]}))
    assert "current.json: field" in heavy.client("run", code=1)
    assert heavy.labels() == ("v1", "v1", "v1")


def test_parts_of_another_size(heavy: Lab) -> None:
    path = heavy.chroot / "current.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"parts": [{"sha256": A, "size": 1}]}))
    assert "do not add up" in heavy.client("run", code=1)


def test_odd_file_names(lab: Lab) -> None:
    lab.publish("v1")
    names = [
        "with space", "it's", 'a "quote"', "new\nline", "tab\t", "-rf", "--help", "*", "[a-z]?", "{a,b}", "$HOME", "`id`", "a;b",
        "back\\slash", "#hash", "~x", "x" * 200, "Grüße", "日本語", "e\u0301", " ", "...", "a|b", "%s", ".hidden",
    ]  # fmt: skip
    for name in names:
        (lab.config / name).write_text(f"content of {name}")
        (lab.config / f"{name[:90]}.d" / name / "deep").mkdir(parents=True)
        (lab.config / f"{name[:90]}.d" / name / "deep" / name).write_text(name)
    (lab.config / "empty file").touch()
    (lab.config / "empty directory").mkdir()
    (lab.config / "program").write_text("#!/bin/sh\n")
    (lab.config / "program").chmod(0o700)
    (lab.config / "secret").write_text("mode 0600")
    (lab.config / "secret").chmod(0o600)
    (lab.config / "bytes").write_bytes(bytes(range(256)))
    lab.populate()
    lab.client("run")
    assert lab.labels() == ("v1", "v1", "v1")
    arrived = tree(lab.state / "config")
    expected = tree(lab.config)
    assert expected.pop("empty directory")[0] == "directory"  # which no commit has
    assert arrived == expected
    assert arrived["program"][0] == "program" and arrived["secret"][0] == "file" and arrived["empty file"] == ("file", b"")
    assert ("x" * 200) in arrived


PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, "KiB")
sys.exit(code)
"""


def test_huge_file_in_little_memory(lab: Lab) -> None:
    """300 MB. The build fails early, for the toy's own reads it whole."""
    lab.publish("v1", build="eval-error")
    with open(lab.config / "huge", "wb") as file:
        file.write(b"begin")
        file.truncate(300_000_000)
    lab.populate()
    done = lab.machine.run(sys.executable, "-I", "-c", PEAK, *lab.argv("run"), env=lab.env())
    assert done.returncode == 1, done.stdout
    assert lab.last().result == Result.BUILD_FAILED
    huge = lab.state / "config/huge"
    assert huge.stat().st_size == 300_000_000
    assert bento_client.hash_file(huge) == bento_client.hash_file(lab.config / "huge")
    found = re.search(r"peak (\d+) KiB", done.stdout)
    assert found is not None
    assert 5_000 < int(found[1]) < 64_000
    shutil.rmtree(lab.directory)  # pytest keeps the directories of three runs


SLOW = """\
#!{python}
import os, subprocess, sys, time
process = subprocess.Popen(["{ssh}", *sys.argv[1:]], stdin=subprocess.PIPE)
while data := os.read(0, 4096):
    process.stdin.write(data)
    process.stdin.flush()
    time.sleep(len(data) / 8000)
process.stdin.close()
process.wait()
"""
# The same for what the server sends.
SLOW_DOWN = """\
#!{python}
import os, subprocess, sys, time
process = subprocess.Popen(["{ssh}", *sys.argv[1:]], stdout=subprocess.PIPE)
while data := os.read(process.stdout.fileno(), 800):
    os.write(1, data)
    time.sleep(len(data) / 8000)
process.wait()
"""


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_slow_line_is_fine(way: str, settled: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8 kB/s, 40 kB take longer than a line may be silent here. An upload gives no sign of life before its end, and a
    download only with each request of sftp's.
    """
    programs = settled.directory / f"slow-{way}"
    programs.mkdir()
    script = SLOW if way == "up" else SLOW_DOWN
    (programs / "slow-ssh").write_text(script.format(python=sys.executable, ssh=TOY / "toy-ssh"))
    (programs / "sftp").write_text(f'#!/bin/sh\nexec {shutil.which("sftp")} -S {programs}/slow-ssh "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    path = f"{programs}:{settled.machine.env()['PATH']}"
    for name, value in settled.machine.env(**settled.env(PATH=path)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bento_client, "STALL_S", 2.0)
    for directory in (settled.state / "outbox", settled.chroot):
        (directory / "log").write_bytes(os.urandom(40_000))
    session = bento_client.Sftp(bento_client.make_settings(settled.settings, "test"), SERVER)
    began = time.monotonic()
    if way == "up":
        session.put("outbox/log", "log")
    else:
        session.get("log", "got", 40_000)
    session.close()
    assert time.monotonic() - began > 2, "the line is slow"
    assert (settled.chroot / "logs/log" if way == "up" else settled.state / "got").stat().st_size == 40_000
