"""Accounts for tests, in an /etc that only this process and what it starts can see.

`isolate` puts a copy of /etc, in memory, over /etc, in a mount namespace of its own. It ends with the last process in
it, however that ends: nothing has to be put back, and runs side by side see nothing of each other.
"""

import ctypes
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# From <sched.h> and <sys/mount.h>.
CLONE_NEWNS = 0x20000
MS_BIND, MS_MOVE, MS_REC, MS_SLAVE = 0x1000, 0x2000, 0x4000, 0x80000
FIRST_ID = 20_000

_why_not: str | None = "needs accounts.isolate()"


def isolate(home: Path | None = None) -> None:
    """Where that cannot be (it needs root, and a root directory that is a mount), `why_not` says why.

    home: root's from now on; ssh makes ~/.ssh, and goes by the account, not by the environment.
    """
    global _why_not
    if os.geteuid() != 0:
        _why_not = "needs root for accounts"
        return
    try:
        _call("unshare", CLONE_NEWNS)
        _mount("none", "/", MS_REC | MS_SLAVE)
        _replace_etc()
        if home is not None:
            passwd = Path("/etc/passwd")
            passwd.write_text(re.sub("(?m)^(root:.*:).*(:.*)$", rf"\g<1>{home}\2", passwd.read_text(encoding="utf-8")), "utf-8")
        _why_not = None
    except (OSError, subprocess.SubprocessError) as error:
        _why_not = f"needs accounts, in a mount namespace of its own: {error}"


def why_not() -> str | None:
    """Why there can be no accounts here, or None."""
    return _why_not


def need_accounts() -> None:
    """Skips the test without accounts, with the reason; under BENTO_TESTS=all it fails instead."""
    import pytest  # here: the benchmark runs without it

    if _why_not is not None:
        (pytest.fail if os.environ.get("BENTO_TESTS") == "all" else pytest.skip)(_why_not)


def add_group(name: str) -> int:
    """The group's number; it may be there already."""
    for line in _lines("group"):
        if line.startswith(f"{name}:"):
            return int(line.split(":")[2])
    gid = _free_id("group")
    _append("group", f"{name}:x:{gid}:")
    return gid


def add_user(name: str, group: str, home: str | Path = "/nonexistent", shell: str = "/bin/sh") -> int:
    """An account with no password that could be right, yet not locked, in place of one of that name. Its number."""
    remove_user(name)
    gid, uid = add_group(group), _free_id("passwd")
    _append("passwd", f"{name}:x:{uid}:{gid}::{home}:{shell}")
    _append("shadow", f"{name}:*:20000::::::")
    return uid


def remove_user(name: str) -> None:
    for file in ("passwd", "shadow"):
        _remove(file, name)


def root_owned(directory: Path) -> Path:
    """Another path of that directory, on which all is root's and writable by nobody else: sshd insists, of a chroot."""
    place = tempfile.mkdtemp(prefix="bento-", dir="/etc")
    _mount(str(directory), place, MS_BIND)
    return Path(place)


def _replace_etc() -> None:
    aside = tempfile.mkdtemp(prefix="bento-etc-")
    try:
        _mount("tmpfs", aside, 0, kind="tmpfs", data="mode=755")
        subprocess.run(["cp", "-a", "/etc/.", aside], check=True, capture_output=True, timeout=60)
        _mount(aside, "/etc", MS_MOVE)
    finally:
        os.rmdir(aside)
    # nscd's answers are about the other /etc; logs and roots of builds are of hosts that have the same names in each run.
    for place in ("/run/nscd", "/var/log", "/nix/var/nix/gcroots"):
        if Path(place).is_dir():
            _mount("tmpfs", place, 0, kind="tmpfs")
    if not any(line.startswith("sshd:") for line in _lines("passwd")):  # what its package makes, for its own use
        add_user("sshd", "sshd", "/run/sshd", "/usr/sbin/nologin")


def _lines(name: str) -> list[str]:
    return Path("/etc", name).read_text(encoding="utf-8").splitlines()


def _append(name: str, line: str) -> None:
    with open(f"/etc/{name}", "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _remove(name: str, entry: str) -> None:
    kept = [line for line in _lines(name) if not line.startswith(f"{entry}:")]
    Path("/etc", name).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _free_id(name: str) -> int:
    used = {int(line.split(":")[2]) for line in _lines(name) if line.count(":") > 2}
    return next(number for number in range(FIRST_ID, 1 << 16) if number not in used)


def _call(name: str, *args: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _mount(source: str, place: str, flags: int, *, kind: str | None = None, data: str | None = None) -> None:
    words = [os.fsencode(word) if word is not None else None for word in (source, place, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), data.encode() if data is not None else None)
