"""Lets the tests import bento.py, bento_client.py and toynixos.py, wherever pytest is started; in an /etc of their own."""

import os
import signal
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import accounts

accounts.isolate()
# Tables and usage messages are as wide as they are; a test for a narrow terminal sets these itself.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
# A shell starts its background jobs with Ctrl-C ignored, and that is inherited: by programs whose end by it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection() -> None:
    """What the tests run needs no pytest; and a script's first line takes no path with spaces, as a checkout may have."""
    sys.executable = os.path.realpath(sys.executable)
