"""Bento 1.0 as it landed, for tests of what it left behind and of what it still says and reads.

`git archive ef5e029 bento.py bento_client.py utils/bento.nix`, kept as a file: a clone may come without history.
"""

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).resolve().parent / "golden/bento-1.0.tar.xz"


def unpack_1_0(directory: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory)
    return directory
