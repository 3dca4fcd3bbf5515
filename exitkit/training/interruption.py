"""SIGTERM, which cluster schedulers send before they kill a job, and Ctrl-C: noted, and acted on where a checkpoint can be
written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 143
"""The exit status that shells give a process ended by SIGTERM."""


@contextmanager
def stop_noted(active: bool) -> Iterator[Callable[[], int | None]]:
    """While open and ``active``, neither SIGTERM nor the first Ctrl-C ends the process; what is yielded tells which came.

    Only the main thread can receive signals; elsewhere nothing changes.
    """
    if not active or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: int | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came == number == signal.SIGINT:
            raise KeyboardInterrupt
        came = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came is not None:
        raise ending(came)


def ending(number: int) -> BaseException:
    """What ends the process as the signal would have."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(TERMINATED)
