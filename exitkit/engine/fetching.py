"""Batches fetched in a thread of their own, so that the engine works on while the next one is slow to come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext
from typing import Any

import torch

NOTHING = object()
"""Nothing has come within the time."""

_AHEAD = 2
_END = object()


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def fetched(batches: Iterable[Any], patience: Callable[[], float | None]) -> Generator[Any, None, None]:
    """What ``batches`` yields, fetched in a thread that is a few ahead; :data:`NOTHING` where it takes too long.

    On a GPU the thread has the caller's stream and device, so that what it puts there is there when the caller reads it.

    Args:
        batches: is iterated over in the thread.
        patience: how many seconds to wait for the next one; None for as long as it takes.

    Raises:
        Exception: what ``batches`` raises.
    """
    ready: queue.Queue[Any] = queue.Queue(_AHEAD)
    closed = threading.Event()
    stream = torch.cuda.stream(torch.cuda.current_stream()) if torch.cuda.is_initialized() else nullcontext()

    def fetch() -> None:
        try:
            with stream:
                for batch in batches:
                    if not _put(ready, batch, closed):
                        return
            _put(ready, _END, closed)
        except BaseException as error:
            _put(ready, _Failed(error), closed)

    threading.Thread(target=fetch, name="exitkit-batches", daemon=True).start()
    try:
        while True:
            wait = patience()
            try:
                got = ready.get(timeout=None if wait is None else max(wait, 0.0))
            except queue.Empty:
                yield NOTHING
                continue
            if got is _END:
                return
            if isinstance(got, _Failed):
                raise got.error
            yield got
    finally:
        closed.set()


def _put(ready: queue.Queue[Any], item: Any, closed: threading.Event) -> bool:
    """Whether anything takes the item."""
    while not closed.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
