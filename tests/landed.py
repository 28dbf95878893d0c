"""Bento 1.1 as it landed, for tests of what it left behind and of what it still says and reads.

`git archive 070f0b8 bento.py bento_client.py utils/bento.nix`, kept as a file: a clone may come without history.
"""

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).resolve().parent / "golden/bento-1.1.tar.xz"


def unpack_1_1(directory: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory)
    return directory
