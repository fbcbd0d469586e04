"""Starts the program as its installed command does: not to compile nightcrier.py each time."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

from nightcrier import console_main  # noqa: E402

console_main()
