"""SIGTERM, which cluster schedulers send before they kill a job: noted, and acted on where a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_noted(active: bool) -> Iterator[Callable[[], bool]]:
    """While open and ``active``, SIGTERM does not end the process; the yielded function tells whether it has come.

    Only the main thread can receive signals; elsewhere nothing changes.
    """
    if not active or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
