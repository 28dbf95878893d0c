#!/usr/bin/env python3
"""nixos-rebuild on a machine of the boot lab: the toy's, with a real kernel and a real initrd in what it builds.

A kernel's version is its fate (see initrd.py).
"""

import hashlib
import os
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
sys.dont_write_bytecode = True

from boot.initrd import with_fate

PARTS = Path("/opt/boot-lab")


def add_file(store: Path, name: str, file: str, line: str) -> Path:
    """In the place of the toy's: a directory in the store with one file."""
    path = store / f"{hashlib.sha256(f'{name} {file} {line}'.encode()).hexdigest()[:32]}-{name}"
    if not path.exists():
        aside = store / f".{path.name}.{os.getpid()}"
        aside.mkdir()
        version = line.rpartition(" ")[2]
        if file == "bzImage":
            content = (PARTS / "bzImage").read_bytes()
        elif file == "initrd":
            content = with_fate((PARTS / "initrd").read_bytes(), version)
        else:
            content = f"{line}\n".encode()
        (aside / file).write_bytes(content)
        aside.rename(path)
    return path / file


def main() -> int:
    loader = SourceFileLoader("toy_rebuild", str(TESTS / "toy/nixos-rebuild"))
    spec = spec_from_loader("toy_rebuild", loader)
    assert spec is not None
    toy = module_from_spec(spec)
    sys.modules["toy_rebuild"] = toy
    loader.exec_module(toy)
    toy.add_file = add_file  # type: ignore[attr-defined]
    result: int = toy.main()
    return result


if __name__ == "__main__":
    sys.exit(main())
