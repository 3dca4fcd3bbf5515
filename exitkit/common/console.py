"""Where tables and progress are printed."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import length_hint
from typing import IO, TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
_WIDTH = 120
_PAUSE = 10.0
"""Seconds between lines of progress where there is no terminal."""


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 thread``, ``2 threads``; ``plural`` where it takes more than an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def in_minutes(minutes: float, about: str = "") -> str:
    """``under a minute``, ``1 minute``, ``5 minutes``; with ``about`` before a number."""
    return f"{about}{counted(round(minutes), 'minute')}" if minutes >= 1 else "under a minute"


@contextmanager
def without_progress() -> Iterator[None]:
    """Inside, nothing says how far it is, and nothing warns."""
    before = _quiet.set(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _quiet.reset(before)


def shows_progress(wanted: bool) -> bool:
    """Whether progress is to be shown where it is ``wanted``."""
    return wanted and not _quiet.get()


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


def tracked(items: Iterable[T], doing: str, of: object = None, shown: bool = True) -> Iterator[T]:
    """The items, and progress on stderr: a bar where there is a terminal, elsewhere a line every ten seconds.

    ``of`` is what has the number of items as its length, where ``items`` has not.
    """
    total = length_hint(items if of is None else of, 0) or None
    if not shows_progress(shown):
        yield from items
    elif sys.stderr.isatty():
        yield from _with_bar(items, doing, total)
    else:
        yield from _with_lines(items, doing, total)


def _with_bar(items: Iterable[T], doing: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as bar:
        yield from bar.track(items, total=total, description=doing)


def _with_lines(items: Iterable[T], doing: str, total: int | None) -> Iterator[T]:
    started = said = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) - said >= _PAUSE and done:
            left = "" if total is None else f" of {total}, {(now - started) / done * (total - done):.0f} s left"
            print(f"{doing}: {done}{left}", file=sys.stderr, flush=True)
            said = now
        yield item
