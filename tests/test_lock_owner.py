"""`bento.py update` gives a new flake.lock to whoever owns the tree, and nothing else."""

import os
from pathlib import Path
from typing import Any

import pytest

import bento
import bento_client


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_link_in_the_place_of_the_lock_gives_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree's owner may put one there at the wrong moment."""
    host, secret = tmp_path / "hosts/a", tmp_path / "secret"
    host.mkdir(parents=True)
    (host / "flake.nix").write_text("{ }")
    os.chown(host, 1234, 1234)
    secret.write_text("root's")

    def update_lock(tree: Path, *_: Any) -> None:
        (tree / "flake.lock").write_text('{"nodes": {"root": {}}}')

    monkeypatch.setattr(bento, "update_lock", update_lock)
    monkeypatch.setattr(bento_client, "write_atomic", lambda path, *_: path.symlink_to(secret))
    (tmp_path / "work").mkdir()
    with pytest.raises(bento_client.BentoError, match="cannot be read"):
        bento.update_host(bento.Fleet(tmp_path, tmp_path / "chroot"), "a", None, tmp_path / "work", set())
    assert os.lstat(host / "flake.lock").st_uid == 1234
    assert secret.stat().st_uid == 0
