"""Recording a function as a CUDA graph, so that a failure leaves neither the thread nor the allocator in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

Run = Callable[[], None]
Record = Callable[[Run, Any, torch.device], Run]
"""From a function on fixed memory, the pool that recordings share, and the device to a function that runs it again."""

_ONE_AT_A_TIME = threading.Lock()
"""The driver captures for one thread of a process at a time."""


def record(run: Run, pool: Any, device: torch.device) -> Run:
    """A :data:`Record` by ``torch.cuda.CUDAGraph``. ``run`` has run once before, on the same shapes.

    Other threads may use the device meanwhile: only what this thread does is captured and restricted.

    Raises:
        torch.OutOfMemoryError: memory does not suffice.
    """
    graph = torch.cuda.CUDAGraph()
    current, side = torch.cuda.current_stream(device), _recording_stream(device)
    with _ONE_AT_A_TIME:
        side.wait_stream(current)
        with torch.cuda.stream(side), out_of_memory_named(device):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                _abandon(graph, pool, device)
                raise
            graph.capture_end()
        current.wait_stream(side)
    return graph.replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: matrix products keep a workspace of tens of megabytes for every stream that they meet."""
    return torch.cuda.Stream(device)


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """End a capture that failed. Where the driver has invalidated it, torch does not tell its allocator."""
    try:
        graph.capture_end()
    except RuntimeError:
        torch._C._cuda_endAllocateToPool(device.index, pool)


@contextmanager
def out_of_memory_named(device: torch.device) -> Iterator[None]:
    """Raise ``torch.OutOfMemoryError`` where compiled code reports memory that does not suffice as a plain error."""
    before = _refused(device)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _refused(device) == before:
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def _refused(device: torch.device) -> int:
    """How often the allocator had no memory to give."""
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))
