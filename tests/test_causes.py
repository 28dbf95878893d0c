"""Why something failed, as a person would name it. tests/causes/ is what Nix 2.8 and 2.26 said when they were run."""

import time
from pathlib import Path

import pytest

import bento_client as client
from bento_client import Cost

CAUSES = Path(__file__).resolve().parent / "causes"
NIX = {
    "assertion": "- The option `services.foo.user' needs services.foo.enable. Set it, or remove the user. - boot.loader",
    "dependency": "error: builder for 'firefox-133.0' failed with exit code 2 (make: *** [Makefile:12: all] Error 2)",
    "substituter-down": "error: builder for 'firefox-133.0' failed with exit code 2 (make: *** [Makefile:12: all] Error 2)",
    "git-ssh": "ssh: connect to host 127.0.0.1 port 9: Connection refused",
    "git-file": "fatal: '/nonexistent/repo' does not appear to be a git repository",
    "hash": "error: hash mismatch in fixed-output derivation 'source.txt': specified: sha256-AAAA",
    "killed": "error: builder for 'chromium-130' failed due to signal 9 (Killed) (linking)",
    "source-down": "error: unable to download 'http://127.0.0.1:9/source.tar.gz': Could",
    "syntax": "error: syntax error, unexpected ';'",
    "undefined": "error: undefined variable 'undefinedName' at /var/lib/bento/undef.nix:1:13:",
}
LATER = {"git-ssh", "source-down", "input-down", "killed"}


@pytest.mark.parametrize("path", sorted(CAUSES.iterdir()), ids=lambda path: path.stem)
def test_what_nix_says(path: Path) -> None:
    kind = path.stem.rpartition("-")[0]
    found = client.find_cause(path.read_text())
    assert found.startswith(NIX.get(kind, "error: ")) and "nixos-system-" not in found
    assert bool(client.bad_moment(path.read_text())) == (kind in LATER)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("building '/nix/store/x-a.drv'...\nerror: could not compile `a`\nerror: builder for '/nix/store/"
         + "0" * 32 + "-ripgrep-14.drv' failed with exit code 101;\n  last 1 log lines:\n  > error: E0425\n",
         "error: builder for 'ripgrep-14' failed with exit code 101; (error: E0425)"),
        ("error: Cannot build '/nix/store/" + "0" * 32 + "-x-1.drv'.\n  Reason: builder failed with exit code 1.\n",
         "error: Cannot build 'x-1.drv'. Reason: builder failed with exit code 1."),
        ("fatal: not a git repository\nerror: builder for '/nix/store/" + "0" * 32 + "-y-2.drv' failed with exit code 1",
         "error: builder for 'y-2' failed with exit code 1 (fatal: not a git repository)"),
        ("activating the configuration...\nmkdir: cannot create directory '/x': Read-only file system\n"
         "Activation script snippet 'makeX' failed (1)\nsetting up tmpfiles",
         "activation script makeX: mkdir: cannot create directory '/x': Read-only file system"),
        ("\x1b[31;1merror:\x1b[0m undefined variable 'x'", "error: undefined variable 'x'"),
        ("error: unable to download 'http://s/x': HTTP error 404", "error: unable to download 'http://s/x': HTTP error 404"),
        ("", "no output"),
    ],
)  # fmt: skip
def test_other_words(text: str, wanted: str) -> None:
    found = client.find_cause(text)
    assert found == wanted or found == wanted.replace("x-1.drv", "x-1")
    assert not client.bad_moment(text)  # a file that is not there will not come


@pytest.mark.parametrize(
    "said", ["x\n", "warning: ", "lacks a ", "error: builder for 'x' failed\n> x\n", "error:", "Failed to start ", "> x\n", "\x1b[", "at /x:1:"]
)  # fmt: skip
def test_what_is_long_takes_no_longer(said: str) -> None:
    """As much as is read of a log, in the time that its size gives."""
    for find in (client.find_cause, client.why_not_fetched, client.switch_words, client.bad_moment):
        began_s = time.process_time()
        find(said * ((1 << 18) // len(said)))
        assert time.process_time() - began_s < 5


BUILDER = "error: builder for '/nix/store/4fc8m653bapwm496vfdhh5z2jb0sqi1d-foo.tar.gz.drv' failed with exit code {};"
# As Nix printed them in public reports; what they cost.
PASSING = [
    ("error:\n  … while fetching the input 'github:a/b'\n  error: unable to download 'https://x/y': HTTP error 403\n", Cost.POLL),
    ("warning: unable to download 'https://x': HTTP error 429; retrying in 268 ms\nerror:\n  error: Failed to open archive"
     " (Source threw exception: error: unable to download 'https://x': HTTP error 429", Cost.POLL),
    (BUILDER.format(1) + "\n  > trying https://x\n  > curl: (7) Failed to connect to x port 443: Connection refused", Cost.POLL),
    (BUILDER.format(1) + "\n  > curl: (22) The requested URL returned error: 503\n  > error: cannot download foo", Cost.POLL),
    (BUILDER.format(1) + "\n  > curl: (22) The requested URL returned error: 404\n  > error: cannot download foo", ""),
    (BUILDER.format(1) + "\n  > test: connection refused\n  > 1 test failed", ""),
    ("error: unable to download 'https://x': SSL peer certificate or SSH remote key was not OK (60)", Cost.POLL),
    ("error: unable to download 'https://x': Timeout was reached (28)", Cost.POLL),
    ("error: failed to extract archive (Unrecognized archive format)", Cost.POLL),
    ("error: NAR info file 'https://x/0hhc.narinfo' is corrupt: line 1", Cost.POLL),
    ("error: hash mismatch importing path '/nix/store/x';\n  specified: sha256:1111", Cost.POLL),
    ("error: hash mismatch in fixed-output derivation '/nix/store/x-source.drv':\n  specified: sha256-A", ""),
    ("error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused", Cost.POLL),
    ("cannot build on 'ssh-ng://nix@b': error: failed to start SSH connection to 'nix@b'\nerror: a 'x' with features {} is"
     " required", Cost.POLL),
    ("fatal: Could not read from remote repository.\nkex_exchange_identification: Connection closed by remote host", Cost.POLL),
    ("git@github.com: Permission denied (publickey).\nfatal: Could not read from remote repository.", ""),
    ("error: unexpected end-of-file", Cost.WORK),
    ("error: Nix daemon disconnected unexpectedly (maybe it crashed?)", Cost.WORK),
    ("error: interrupted by the user", Cost.WORK),
    ("error: executing SQLite query 'select 1': database is busy", Cost.WORK),
    ("error: writing to file: No space left on device", Cost.WORK),
    (BUILDER.format(1) + "\n  > cp: error writing '/nix/store/x/y': No space left on device\n  > make: *** Error 1", Cost.WORK),
    (BUILDER.format(137), Cost.WORK),
    ("error: infinite recursion encountered", ""),
]


@pytest.mark.parametrize(("output", "cost"), PASSING)
def test_what_may_pass(output: str, cost: str) -> None:
    assert client.bad_moment(output) == cost


PROXY_ENDS = "kex_exchange_identification: Connection closed by remote host\nConnection closed by UNKNOWN port 65535\n"


@pytest.mark.parametrize(
    ("text", "wanted", "passing"),
    [
        ("/bin/bash: line 1: exec: nc: not found\n" + PROXY_ENDS,
         "the proxy or jump host failed: /bin/bash: line 1: exec: nc: not found", True),
        ("channel 0: open failed: connect failed: Connection refused\nstdio forwarding failed\n" + PROXY_ENDS,
         "the proxy or jump host failed: channel 0: open failed: connect failed: Connection refused | stdio forwarding failed",
         True),
        ("No ED25519 host key is known for [10.0.0.1]:2222 and you have requested strict checking.\n"
         "Host key verification failed.\n" + PROXY_ENDS + "Connection closed.\n",
         "the jump host [10.0.0.1]:2222 is not known here: add its key to the known hosts", False),
        ("Add correct host key in /var/lib/bento/known_hosts to get rid of this message.\n"
         "Offending ED25519 key in /var/lib/bento/known_hosts:1\n  remove with:\n  ssh-keygen -f x -R s\n"
         "Host key for s has changed and you have requested strict checking.\nHost key verification failed.\n",
         "its host key is not the known one: if the server was renewed, correct the known hosts, else somebody is in between:"
         " look at /var/lib/bento/known_hosts:1 (Host key verification failed.)", False),
        ("Unable to negotiate with 10.0.0.1 port 22: no matching key exchange method found. Their offer: x\nConnection closed.\n",
         "it and this machine have no algorithm in common: look at the setting 'ssh_options', and at its sshd_config (Unable to"
         " negotiate with 10.0.0.1 port 22: no matching key exchange method found. Their offer: x)", False),
    ],
)  # fmt: skip
def test_what_ssh_says_of_the_way(text: str, wanted: str, passing: bool) -> None:
    assert client.explain_ssh(text) == (wanted, passing)
