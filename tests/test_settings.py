"""The client's settings."""

import os
from pathlib import Path
from typing import Any

import pytest

import bento_client
from bento_client import (
    COMMANDS,
    Settings,
    UsageError,
    make_parser,
    make_settings,
    read_settings,
    read_signers,
    settings_argv,
)


def test_settings_defaults() -> None:
    settings = make_settings({"host": "t470"}, "test")
    assert settings == Settings(host="t470", user="bento-t470")
    assert settings.state == Path("/var/lib/bento")
    assert settings.identity_file == Path("/var/lib/bento/id_ed25519")


@pytest.mark.parametrize(
    ("values", "name", "wanted"),
    [
        ({"server": "one"}, "server", ("one",)),
        ({"server": ["one", "2001:db8::1", "[2001:db8::1]", "1.2.3.4"]}, "server", ("one", "2001:db8::1", "[2001:db8::1]", "1.2.3.4")),
        ({"server": []}, "server", ()),
        ({"server": None}, "server", ()),
        ({"port": 2222}, "port", 2222),
        ({"port": None}, "port", 22),
        ({"user": "someone"}, "user", "someone"),
        ({"upgrade_channels": True}, "upgrade_channels", True),
        ({"health_checks": ["true", "a b"]}, "health_checks", ("true", "a b")),
        ({"reboot": "when-needed"}, "reboot", "when-needed"),
        ({"reboot": "23:30-04:00"}, "reboot", "23:30-04:00"),
        ({"state_dir": "some/dir"}, "state_dir", os.path.abspath("some/dir")),
        ({"identity": "key"}, "identity", os.path.abspath("key")),
        ({"a_setting_of_next_year": 7}, "port", 22),
    ],
)  # fmt: skip
def test_settings_good(values: dict[str, Any], name: str, wanted: object) -> None:
    assert getattr(make_settings({"host": "toy"} | values, "test"), name) == wanted


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"host": ""}, "setting 'host' must be this machine's name"),
        ({"host": "../x"}, "setting 'host' must be"),
        ({"host": "x" * 27}, "setting 'host' must be"),
        ({"host": 5}, "setting 'host' cannot be 5"),
        ({"port": "22"}, "setting 'port' cannot be '22'"),
        ({"port": 0}, "setting 'port' cannot be 0"),
        ({"port": True}, "setting 'port' cannot be True"),
        ({"port": 22.5}, "setting 'port' cannot be 22.5"),
        ({"connect_timeout": -1}, "setting 'connect_timeout' cannot be -1"),
        ({"server": 7}, "setting 'server' cannot be 7"),
        ({"server": ["ok", 7]}, "setting 'server' cannot be"),
        ({"server": "-oProxyCommand=x"}, "setting 'server' cannot be '-oProxyCommand=x'"),
        ({"server": "host:22"}, "the port in 'port'"),
        ({"server": ""}, "setting 'server' cannot be ''"),
        ({"server": "a b"}, "setting 'server' cannot be 'a b'"),
        ({"server": "user@host"}, "setting 'server' cannot be"),
        ({"user": "-l"}, "setting 'user' cannot be '-l'"),
        ({"user": "a b"}, "setting 'user' cannot be"),
        ({"ssh_options": "Port=1"}, "setting 'ssh_options' cannot be"),
        ({"ssh_options": ["a\0b"]}, "setting 'ssh_options' cannot be"),
        ({"health_checks": {"a": 1}}, "setting 'health_checks' cannot be"),
        ({"upgrade_channels": 1}, "setting 'upgrade_channels' cannot be 1"),
        ({"reboot": "always"}, "setting 'reboot' is 'never', 'when-needed' or 'HH:MM-HH:MM', not 'always'"),
        ({"reboot": "24:00-25:00"}, "setting 'reboot' is"),
        ({"reboot": "4:00-5:00"}, "setting 'reboot' is"),
    ],
)
def test_settings_bad(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_settings({"host": "toy"} | values, "client.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("client.json: ")


@pytest.mark.parametrize(
    "settings",
    [
        make_settings({"host": "toy"}, "test"),
        make_settings({"host": "toy", "server": ["a", "::1"], "port": 2222, "user": "u", "identity": "/k y", "root": "/r",
                       "known_hosts": "/h", "state_dir": "/s p", "ssh_options": ["-x y", "A=b"], "connect_timeout": 1,
                       "build_timeout": 2, "activation_timeout": 3, "confirm_timeout": 4, "health_checks": ["--a 'b'"],
                       "upgrade_channels": True, "reboot": "22:00-04:00"}, "test"),
    ],
)  # fmt: skip
def test_settings_survive_the_command_line(settings: Settings) -> None:
    """The watchdog gets its settings like this."""
    before = vars(make_parser().parse_args([*settings_argv(settings), "rollback", "--token", "x"]))
    behind = vars(make_parser().parse_args(["rollback", "--token", "x", *settings_argv(settings)]))
    assert read_settings(before) == settings
    assert read_settings(behind) == settings


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "client.json"
    config.write_text('{"host": "toy", "server": "one", "port": 5, "health_checks": ["a"]}')
    argv = ["--config", str(config), "--port", "6", "status", "--server", "two", "--server=three", "--health_checks", "b"]
    settings = read_settings(vars(make_parser().parse_args(argv)))
    assert (settings.port, settings.server, settings.health_checks) == (6, ("two", "three"), ("b",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"host": "toy", "port": "x"}', "setting 'port' cannot be 'x'"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_bad_configuration_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes | None, words: str
) -> None:
    config = tmp_path / "client.json"
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert bento_client.main(["--config", str(config), "status"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"bento: error: {config}: ") and words in said
    assert said.count("\n") == 1


def test_run_without_a_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bento_client.main(["--config", os.devnull, "--host", "toy", "--state-dir", str(tmp_path / "s"), "run"]) == 2
    assert "no server is set" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ": no signer's key in it"), ("# later\n\n", ": no signer's key in it"), ("hello\n", ":1: not a public key, as in a .pub file: hello"),
        ("# alice\nssh-ed25519 AAAA=A alice\n", ":2: not a public key, as in a .pub file: ssh-ed25519 AAAA=A alice"),
    ],
)  # fmt: skip
def test_a_bad_file_of_signers(tmp_path: Path, text: str, words: str) -> None:
    """What is read over in it would let releases pass that nobody signed, or none at all."""
    (tmp_path / "signers").write_text(text)
    with pytest.raises(UsageError) as said:
        read_signers(tmp_path / "signers")
    assert str(said.value) == f"{tmp_path}/signers{words}"


def test_help_is_short_and_of_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert bento_client.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 24 and "--connect-timeout 5" in said and max(map(len, said.splitlines())) <= 80
    for command in COMMANDS:
        assert f"\n  {command}" in said
        assert bento_client.main([command, "--help"]) == bento_client.main(["-h", command]) == 0
        first, second = capsys.readouterr().out.partition("usage: bento-client [options] ")[2].split("usage: bento-client [options] ")
        assert first.startswith(command) and second == first and len(first.splitlines()) <= 5, first
    with pytest.raises(SystemExit) as ended:
        bento_client.main([])
    assert ended.value.code == 2 and "a COMMAND is missing: --help lists them" in capsys.readouterr().err


def test_who_may_not_is_told_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", f"{tmp_path}/pause.json")

    monkeypatch.setattr(bento_client, "write_atomic", refuse)
    for uid, words in ((1000, ": run this as root"), (0, "")):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert bento_client.main(["--host", "h", "--state-dir", str(tmp_path / "state"), "pause"]) == 1
        assert capsys.readouterr().err == f"bento: error: {tmp_path}/pause.json: Permission denied{words}\n"
