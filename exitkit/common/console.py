"""Where tables are printed."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 120


def make_console(file: IO[str] | None = None) -> Console:
    """A console as wide as the terminal, or 120 columns where there is none (a pipe, a log, a notebook's text).

    What is printed may be a name from a file, so that brackets and colons in it are text and not markup.
    """
    from rich.console import Console

    width = None if (file or sys.stdout).isatty() else _WIDTH
    return Console(file=file, width=width, markup=False, emoji=False)


def printable(text: str) -> str:
    """Text with question marks for what UTF-8 cannot hold: half characters, bytes of file names that are none."""
    return text.encode("utf-8", "replace").decode("utf-8")
