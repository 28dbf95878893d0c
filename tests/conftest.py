"""Lets the tests import bento.py, bento_client.py and toynixos.py, wherever pytest is started; in an /etc of their own."""

import signal
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import accounts

accounts.isolate()
# A shell starts its background jobs with Ctrl-C ignored, and that is inherited: by programs whose end by it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
