"""bento.json: how a release is built, for both sides."""

import json
import os
import re
from pathlib import Path

import pytest
from fleet import CONFIGURATION, Site, build_as_the_host, check_chroot, write_program

import bento_client as client
from bento_client import BentoError

RECIPES: dict[str, tuple[str, client.Recipe]] = {
    "nothing said": ("{}", client.Recipe("a")),
    "for all": ('{"attribute": "x.y", "directory": "nix/x/", "options": ["--impure"]}', client.Recipe("x.y", "nix/x", ("--impure",))),
    "for one": ('{"attribute": "all", "options": ["-L"], "hosts": {"a": {"attribute": "web1.example.org"}, "b": {"directory": "d"}}}',
                client.Recipe("web1.example.org", "", ("-L",))),
    "for another": ('{"hosts": {"b": {"attribute": 5}}}', client.Recipe("a")),
    "a file": ('{"attribute": "nodes.a", "directory": "nix", "file": "hive/default.nix"}',
               client.Recipe("nodes.a", "nix", (), "hive/default.nix")),
    "of next year": ('{"directory": ".", "more": {}}', client.Recipe("a")),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_bento_json(case: str) -> None:
    text, wanted = RECIPES[case]
    assert client.parse_recipe(json.dumps(json.loads(text) | {"format": 1}).encode(), "bento.json", "a") == wanted


@pytest.mark.parametrize(
    "text",
    [
        '{"file": ""}', '{"file": "."}', '{"file": "../x.nix"}', '{"file": "x/"}', '{"file": "/etc/x.nix"}', '{"file": "a b"}',
        '{"attribute": "a#b"}', '{"attribute": ""}', '{"attribute": "a\\"b"}', '{"attribute": ["a"]}', '{"directory": ".."}',
        '{"directory": "a/../../b"}', '{"directory": "/etc"}', '{"directory": "a b"}', '{"directory": "a//b"}',
        '{"directory": "a/."}', '{"directory": "a?dir=b"}', '{"options": "--impure"}', '{"options": [1]}',
        '{"options": ["a\\u0000"]}', '{"options": [""]}', '{"hosts": []}', '{"hosts": {"a": "x"}}', '{"format": 2}', '{"format": null}',
    ],
)  # fmt: skip
def test_a_malformed_bento_json(text: str) -> None:
    with pytest.raises(BentoError, match=r"^bento.json: "):
        client.parse_recipe(json.dumps({"format": 1} | json.loads(text)).encode(), "bento.json", "a")


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        ("-L --show-trace --max-jobs 4 -j auto --cores 2 --log-format bar-with-logs", ""), ("--impure", "--impure"),
        ("--max-jobs", "--max-jobs"), ("--max-jobs --impure", "--max-jobs --impure"), ("-L --option cores 1", "--option"),
        ("--accept-flake-config", "--accept-flake-config"), ("-I nixpkgs=/x", "-I"), ("--log-format=x", "--log-format=x"),
        ("--builders ssh://x", "--builders"), ("-L x", "x"), ("--own 1", ""), ("--own 2", "2"),
    ],
)  # fmt: skip
def test_an_option_that_could_run_a_program(options: str, bad: str) -> None:
    recipe = client.Recipe("a", "", tuple(options.split()))
    try:
        client.check_options(recipe, ("--own", "1"), "the setting")
    except BentoError as error:
        assert bad and f"the option {bad} is not one of the harmless ones" in str(error) and "the setting has to" in str(error)
    else:
        assert not bad


def test_the_host_does_not_take_the_servers_word_for_it(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/bento.json").write_text('{"format": 1, "options": ["--accept-flake-config"]}')
    settings = client.Settings(server=("s",), host="a", state_dir=str(tmp_path))
    with pytest.raises(BentoError, match=r"services\.bento\.allowOptions, in a release without it, has to allow each word"):
        client.build(settings, client.Log(tmp_path / "log"), None)


@pytest.mark.parametrize(
    ("entry", "version", "where"),
    [
        ("flake.nix", "nix (Nix) 2.24.0", "path:DIR/config?dir=nix#{}"), ("flake.nix", "nix (Nix) 3.1", "path:DIR/config?dir=nix#{}"),
        ("flake.nix", "nix (Nix) 2.18.5", "path:DIR/config/nix#{}"), ("flake.nix", "nix (Lix, like Nix) 2.91.0", "path:DIR/config/nix#{}"),
        ("flake.nix", "", "path:DIR/config/nix#{}"), ("configuration.nix", "", "nixos-config=DIR/config/nix/configuration.nix"),
        ("hive.nix", "", "--file DIR/config/nix/hive.nix --attr {}"),
    ],
)  # fmt: skip
def test_bento_json_is_for_both_sides(
    entry: str, version: str, where: str, site: Site, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server runs, the host runs: attribute, directory, options, for a tree that hosts share."""
    recipe = {"format": 1, "directory": "nix", "options": ["-L"], "hosts": {
        "a": {"attribute": "web1.example.org", "options": ["--accept-flake-config", "--option", "cores", "1"]},
    }} | ({"file": entry} if "hive" in entry else {})  # fmt: skip
    site.host("x", {"bento.json": json.dumps(recipe), f"nix/{entry}": "{ }\n"})
    (site.fleet / "hosts/x").rename(site.fleet / "all")
    for name in "ab":
        (site.fleet / "hosts" / name).symlink_to("../all")
    write_program(site.top / "bin/nixos-rebuild", f'for word; do echo "$word"; done >>{site.top}/words\n')
    write_program(site.top / "bin/nix", f'echo "{version}"\n')
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    assert "the option --accept-flake-config is not one of the harmless ones" in site.run("check", "a").err
    assert not (site.top / "words").exists()
    monkeypatch.setenv("BENTO_ALLOW_OPTIONS", "--accept-flake-config --option cores 1")
    site.publish("--check")
    words = (site.top / "words").read_text()
    how = {"flake.nix": "--flake", "hive.nix": "--no-flake", "configuration.nix": "--no-flake -I"}[entry]
    wanted = f"dry-build {how} {where}"
    options = {"a": "--accept-flake-config --option cores 1", "b": "-L"}
    attributes = {"a": "web1.example.org", "b": "b"}
    found = re.sub(r"(path:|nixos-config=|--file )/\S+?/config(?=[/?])", r"\1DIR/config", " ".join(words.split()))
    assert found == " ".join(f"{wanted.format(attributes[name])} {options[name]}" for name in "ab")
    for name in "ab":
        (site.top / name).mkdir()
        client.unpack(site.tar(name), site.top / name / "config")
        settings = client.Settings(server=("s",), host=name, state_dir=str(site.top / name), upgrade_channels=True)
        argv = " ".join(client.build_argv(settings, site.top / name / "config")).replace(f"{site.top}/{name}/", "DIR/")
        upgrade = " --upgrade" if "configuration" in entry else ""
        assert argv == f"nixos-rebuild {wanted.replace('dry-', '').format(attributes[name])} {options[name]}{upgrade}"


def test_a_flake_in_a_directory_with_nix(real_nix: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a dotted name, as nixos-rebuild quotes it."""
    made = 'derivation { name = "nixos-system-x"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo made > $out" ]; }'
    site.host("a", {
        "bento.json": '{"format": 1, "directory": "nix", "attribute": "web1.example.org"}',
        "nix/flake.nix": '{ outputs = _: { nixosConfigurations."web1.example.org".config.system.build.toplevel = import ./x.nix; }; }\n',
        "nix/x.nix": made,
    })  # fmt: skip
    write_program(
        site.top / "bin/nixos-rebuild",
        'name=${3#*#}\nexec nix --extra-experimental-features "nix-command flakes" build --option sandbox false'
        ' --option build-users-group "" --option substitute false --out-link result'
        ' "${3%%#*}#nixosConfigurations.\\"$name\\".config.system.build.toplevel"\n',
    )
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(site.top))
    site.publish("--build")
    system = site.current().system
    assert system is not None and Path(system).read_text() == "made\n"
    assert build_as_the_host(site, "a", site.top / "work") == system
    check_chroot(site.chroots / "a")  # without the lock that Nix made


def test_a_file_with_nix(real_nix: None, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fleet without a flake: an attribute of a file, beside a flake.nix that is for something else."""
    made = 'derivation { name = "nixos-system-x"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo made > $out" ]; }'
    site.host("a", {
        "bento.json": '{"format": 1, "file": "default.nix", "attribute": "nodes.web1"}', "flake.nix": "{ }\n",
        "default.nix": f"{{ nodes.web1.config.system.build.toplevel = {made}; }}\n",
    })  # fmt: skip
    write_program(
        site.top / "bin/nixos-rebuild",
        'exec nix-build --option sandbox false --option build-users-group "" --option substitute false "$4"'
        ' --attr "$6.config.system.build.toplevel"\n',
    )
    monkeypatch.setenv("PATH", f"{site.top}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(site.top))
    site.publish("--build")
    system = site.current().system
    assert system is not None and Path(system).read_text() == "made\n"
    assert build_as_the_host(site, "a", site.top / "work") == system
    for version, good in (("1.1", False), ("1.2", True)):
        site.host("a", {"version": version})
        site.write_report(client=version)
        ran = site.run("populate")
        assert (ran.code == 0) == good and ("does not know bento.json's file" in ran.err) != good
    (site.fleet / "hosts/a/default.nix").unlink()
    assert site.run("populate").errors == ["bento: error: a: hosts/a: no default.nix in it"]


def test_a_host_whose_client_does_not_know_bento_json(site: Site) -> None:
    site.host("a")
    site.publish()
    before = site.current()
    site.host("a", {"bento.json": '{"format": 1, "hosts": {"b": {"attribute": "x"}}}'})
    site.write_report(client="1.0")
    site.publish()  # nothing in it is for this host
    for version, good in (("1.0", False), ("0.9", False), ("?", False), ("1.1", True), ("1.10", True), ("2.0", True)):
        site.host("a", {"bento.json": '{"format": 1, "options": ["-L"]}', "version": version})
        site.write_report(client=version)
        ran = site.run("populate")
        assert ran.code == (0 if good else 1)
        assert ran.errors == [] if good else ran.errors[0].startswith(
            f"bento: error: a: its client, version {version}, does not know bento.json and would build something else"
        )  # fmt: skip
    assert site.current() != before
    site.host("new", {"bento.json": '{"format": 1, "options": ["-L"]}'} | CONFIGURATION)
    site.publish("new")
    site.host("bad", {"bento.json": '{"format": 2}'} | CONFIGURATION)
    assert site.run("populate", "bad").errors == [
        "bento: error: bad: hosts/bad/bento.json: format 2, this version of Bento knows format 1: update Bento on this machine"
    ]
