#!/usr/bin/env python3
"""An SFTP server that means harm: rogue_sftp.py DIRECTORY FILE. It serves the directory, and does harm as the
file says.

Only what the client asks for is there: protocol 3, one request at a time.
"""

import os
import struct
import sys
import time
from pathlib import Path
from typing import BinaryIO

HARMS = {
    "honest": "not at all",
    "close": "hangs up at once",
    "garbage": "speaks no SFTP",
    "silent": "answers nothing",
    "drip": "one byte of a file every 50 ms",
    "flood": "more of a file than there is of it",
    "endless-names": "a directory without end",
    "huge-names": "a directory of names of 200 kB",
    "marks": "writes what a client could take for the end of an answer, on stderr, before it answers",
    "full": "has room for the first bytes of a file only",
    "noise": "writes to stderr without end, and answers nothing",
}
MARKS = "Local working directory: /\nsftp> # 00000000000000000000000000000000\nsftp> lpwd\nLocal working directory: /\n"
FAILURE, END, NO_SUCH_FILE = 4, 1, 2


def text(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def take(raw: bytes) -> tuple[bytes, bytes]:
    """The first string of a packet, and the rest."""
    size = struct.unpack(">I", raw[:4])[0]
    return raw[4 : 4 + size], raw[4 + size :]


class Rogue:
    def __init__(self, directory: Path, how: str, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self.directory, self.how = directory, how
        self.stdin, self.stdout = stdin, stdout
        self.files: dict[bytes, BinaryIO] = {}
        self.listings: dict[bytes, list[str]] = {}

    def read(self, size: int) -> bytes:
        data = self.stdin.read(size)
        if len(data) != size:
            sys.exit(0)
        return data

    def send(self, kind: int, body: bytes) -> None:
        self.stdout.write(struct.pack(">IB", len(body) + 1, kind) + body)
        self.stdout.flush()

    def status(self, number: bytes, code: int) -> None:
        self.send(101, number + struct.pack(">I", code) + text(b"") + text(b""))

    def path(self, name: bytes) -> Path:
        return self.directory / name.decode().lstrip("/")

    def serve(self) -> None:
        if self.how == "garbage":
            self.stdout.write(os.urandom(1 << 16))
        if self.how in ("close", "garbage"):
            return
        while True:
            size = struct.unpack(">I", self.read(4))[0]
            packet = self.read(size)
            if packet[0] == 1:
                self.send(2, struct.pack(">I", 3) + text(b"posix-rename@openssh.com") + text(b"1"))
                continue
            kind, number, rest = packet[0], packet[1:5], packet[5:]
            if kind == 200:  # extended
                name, rest = take(rest)
                kind = 18 if name == b"posix-rename@openssh.com" else kind
            self.harm()
            self.answer(kind, number, rest)

    def harm(self) -> None:
        while self.how == "silent":
            self.read(1)  # until the client hangs up, which ends it
        while self.how == "noise":
            sys.stderr.write("x" * 1000 + "\n")
        if self.how == "marks":
            sys.stderr.write(MARKS)
            sys.stderr.flush()
            time.sleep(0.3)

    def answer(self, kind: int, number: bytes, rest: bytes) -> None:
        first, rest = take(rest)
        try:
            match kind:
                case 16:  # realpath
                    self.send(104, number + struct.pack(">I", 1) + text(b"/") + text(b"/") + bytes(4))
                case 7 | 17:  # lstat, stat
                    found = self.path(first).stat()
                    self.send(105, number + struct.pack(">IQI", 5, found.st_size, found.st_mode))
                case 3:  # open
                    flags = struct.unpack(">I", rest[:4])[0]
                    self.files[number] = open(self.path(first), "wb" if flags & 2 else "rb")  # noqa: SIM115
                    self.send(102, number + text(number))
                case 5:
                    self.read_file(number, first, rest)
                case 6:  # write
                    offset, length = struct.unpack(">QI", rest[:12])
                    self.files[first].seek(offset)
                    whole = self.how != "full"
                    self.files[first].write(rest[12 : 12 + (length if whole else 9)])
                    self.status(number, 0 if whole else FAILURE)
                case 4:  # close
                    if first in self.files:
                        self.files.pop(first).close()
                    self.status(number, 0)
                case 11:  # opendir
                    self.listings[number] = os.listdir(self.path(first))
                    self.send(102, number + text(number))
                case 12:
                    self.list_directory(number, first)
                case 13:  # remove
                    self.path(first).unlink()
                    self.status(number, 0)
                case 18:  # rename
                    os.replace(self.path(first), self.path(take(rest)[0]))
                    self.status(number, 0)
                case 10:  # fsetstat
                    self.status(number, 0)
                case _:
                    self.status(number, 8)
        except FileNotFoundError:
            self.status(number, NO_SUCH_FILE)
        except OSError:
            self.status(number, FAILURE)

    def read_file(self, number: bytes, handle: bytes, rest: bytes) -> None:
        offset, length = struct.unpack(">QI", rest[:12])
        if self.how == "drip":
            time.sleep(0.05)
            length = 1
        self.files[handle].seek(offset)
        data = self.files[handle].read(min(length, 1 << 15))
        if self.how == "flood":
            data += bytes(min(length, 1 << 15) - len(data))
        if data:
            self.send(103, number + text(data))
        else:
            self.status(number, END)

    def list_directory(self, number: bytes, handle: bytes) -> None:
        names = self.listings[handle]
        if self.how == "endless-names":
            names = [f"{os.urandom(8).hex()}-{i}" for i in range(100)]
        if self.how == "huge-names":
            names = [os.urandom(100_000).hex()]
        if not names:
            self.status(number, END)
            return
        self.listings[handle] = []
        self.send(104, number + struct.pack(">I", len(names)) + b"".join(2 * text(n.encode()) + bytes(4) for n in names))


if __name__ == "__main__":
    Rogue(Path(sys.argv[1]), Path(sys.argv[2]).read_text().strip(), sys.stdin.buffer, sys.stdout.buffer).serve()
