"""The benchmark's section that boots a server with PAM and logind. What its rows say is not asserted, but for one thing:
with pam_systemd a poll does start something, or else the section fails."""

from pathlib import Path

from test_bench import check_rows
from toynixos import need as need_program

from lab.conftest import need


def test_pam(tmp_path: Path) -> None:
    need()
    need_program("rsync")
    rows = ["a poll with nothing new, fleet.nix's PAM rule", "CPU of the server", "processes that it leaves", "polls beside 250 idle"]
    check_rows("pam", rows, tmp_path)
