"""Where tables are printed."""

from __future__ import annotations

import sys
from typing import IO

from rich.console import Console

_WIDTH = 120


def make_console(file: IO[str] | None = None) -> Console:
    """A console as wide as the terminal, or 120 columns where there is none (a pipe, a log, a notebook's text)."""
    return Console(file=file, width=None if (file or sys.stdout).isatty() else _WIDTH)
