"""Lets the tests import bento.py, bento_client.py and toynixos.py, wherever pytest is started."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
