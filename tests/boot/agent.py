"""Runs on a machine of the boot lab, on its second serial port: commands come in, how they ended goes out.

It needs no network, and it runs in emergency mode, too. Each way a message is a line of base64.
"""

import base64
import json
import os
import subprocess
import termios
import tty

PORT = "/dev/ttyS1"


def main() -> None:
    descriptor = os.open(PORT, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(descriptor)
    termios.tcflush(descriptor, termios.TCIOFLUSH)
    with open(descriptor, "rb", buffering=0) as port:

        def send(message: dict[str, object]) -> None:
            # After what the firmware may have written there.
            data = b"\n" + base64.b64encode(json.dumps(message).encode()) + b"\n"
            while data:
                data = data[os.write(descriptor, data) :]

        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            send({"boot": file.read().strip()})
        buffer = b""
        while True:
            buffer += port.read(4096)
            line, newline, rest = buffer.partition(b"\n")
            if not newline:
                continue
            buffer = rest
            order = json.loads(base64.b64decode(line))
            done = subprocess.run(
                ["sh", "-c", order["script"]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            send({"id": order["id"], "code": done.returncode, "output": done.stdout.decode(errors="replace")})


if __name__ == "__main__":
    main()
