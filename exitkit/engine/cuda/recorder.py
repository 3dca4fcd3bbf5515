"""Recording a function as a CUDA graph, so that a failure leaves the thread and torch as they were."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import torch

Run = Callable[[], None]
Record = Callable[[Run], Run]
"""From a function on fixed memory to one that runs it again."""

_ONE_AT_A_TIME = threading.Lock()
"""torch's allocator and the driver keep track of one recording in a process at a time."""


class UnrecordableError(Exception):
    """A step that cannot be recorded: one that waits for the device, or whose values do not fit fixed memory."""


class Recorder:
    """A :data:`Record` by ``torch.cuda.CUDAGraph`` for one engine, whose recordings share memory and never run at once.

    It has a stream of its own: torch keeps a workspace of matrix products for every stream, and recordings of two engines
    that shared one would overwrite each other's. And it has random numbers of its own, since torch refuses all others while
    they are recorded; steps draw none. In the moment in which a recording begins, torch refuses those of other threads too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._random = torch.cuda.default_generators[device.index].clone_state()
        self._first = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):  # the first takes memory, for want of which torch would end the process
            self._first.register_generator_state(self._random)

    def __call__(self, run: Run) -> Run:
        """Record ``run``, which has run once before on the same shapes. Other threads may use the device meanwhile.

        Raises:
            torch.OutOfMemoryError: memory does not suffice.
            UnrecordableError: ``run`` does what cannot be recorded.
        """
        try:
            return self._recorded(run)
        except torch.OutOfMemoryError:
            pass  # memory that torch keeps for later cannot be given back while a recording is under way
        torch.cuda.empty_cache()
        return self._recorded(run)

    def _recorded(self, run: Run) -> Run:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        if not self._alive:  # a pool ends with its last recording
            self._pool = None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with _ONE_AT_A_TIME, _nothing_collected(), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_stream(current)
            self._begin(graph)
            try:
                run()
                graph.capture_end()
            except BaseException as error:
                self._abandon(graph)
                if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                    raise UnrecordableError(str(error).partition("\n")[0]) from error
                raise
            current.wait_stream(self.stream)
        self._alive.add(graph)
        return graph.replay

    def _begin(self, graph: torch.cuda.CUDAGraph) -> None:
        generator = torch.cuda.default_generators[self.device.index]
        everybodys = generator.graphsafe_get_state()
        generator.graphsafe_set_state(self._random)
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        finally:
            generator.graphsafe_set_state(everybodys)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed. Where CUDA has invalidated it, torch's allocator would stay in it."""
        pool, self._pool = self._pool, None
        with suppress(RuntimeError):
            graph.capture_end()
            return
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):
                end(self.device.index, pool)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Python's garbage stays: to destroy an earlier recording that is in it would break the one under way."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
