"""CUDA graphs: a step recorded once for each batch bucket, over buffers of its own, and replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from exitkit.engine.cuda.buckets import Buckets
from exitkit.engine.program import Program, Step

_WARM_UP = 3


class Recorder(Protocol):
    """Runs a function on fixed buffers: once now, and again whenever the returned function is called."""

    def __call__(
        self, run: Callable[..., Sequence[Tensor]], buffers: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Callable[[], None]]: ...


def record_cuda_graph(
    run: Callable[..., Sequence[Tensor]], buffers: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """A :class:`Recorder` by ``torch.cuda.CUDAGraph``. Warm-up runs on a side stream, as capturing asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run(*buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*buffers)
    return outputs, graph.replay


@dataclass
class _Recorded:
    buffers: list[Tensor]
    outputs: Sequence[Tensor]
    replay: Callable[[], None]


@dataclass
class Graphed:
    """A step's ``run`` that replays recordings. What it returns is copied out, so that the next call may overwrite it.

    Other sizes than the batch's are part of what is recorded; a shape that was not seen yet is recorded at its first call.
    A batch above the largest bucket, or a shape beyond the first ``_SHAPES``, runs as it is.

    Attributes:
        run: the step's own function.
        taken, given: the batch dimension of each input, and of each result; None where there is none.
        buckets: the sizes to record at.
        record: how.
    """

    run: Callable[..., Sequence[Any]]
    taken: tuple[int | None, ...]
    given: tuple[int | None, ...]
    buckets: Buckets
    record: Recorder = record_cuda_graph
    _recorded: dict[Any, _Recorded] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, *values: Any) -> Sequence[Any]:
        sizes = {value.shape[axis] for axis, value in zip(self.taken, values, strict=True) if axis is not None}
        batch = min(sizes)
        bucket = self.buckets.of(batch)
        if bucket is None or len(sizes) > 1 or not all(isinstance(value, Tensor) for value in values):
            return self.run(*values)  # several rows for each sample, or a number among the values
        with self._lock:
            recorded = self._recording(bucket, values)
            if recorded is None:
                return self.run(*values)
            for buffer, value, axis in zip(recorded.buffers, values, self.taken, strict=True):
                (buffer if axis is None else buffer.narrow(axis, 0, batch)).copy_(value)
            recorded.replay()
            return [
                (output if axis is None else output.narrow(axis, 0, batch)).clone()
                for output, axis in zip(recorded.outputs, self.given, strict=True)
            ]

    def _recording(self, bucket: int, values: Sequence[Tensor]) -> _Recorded | None:
        shapes = tuple(
            tuple(bucket if dim == axis else size for dim, size in enumerate(value.shape))
            for value, axis in zip(values, self.taken, strict=True)
        )
        if shapes not in self._recorded:
            if len(self._recorded) >= _SHAPES:
                return None
            buffers = [value.new_zeros(shape) for value, shape in zip(values, shapes, strict=True)]
            self._recorded[shapes] = _Recorded(buffers, *self.record(self.run, buffers))
        return self._recorded[shapes]


_SHAPES = 128
"""Recordings of a step at most: each holds memory of its own."""


def graphed(program: Program, largest: int, record: Recorder = record_cuda_graph) -> Program:
    """The program with every step recorded at its first call, for batches of at most ``largest`` samples."""
    buckets = Buckets.up_to(largest)

    def wrapped(step: Step) -> Step:
        taken = tuple(program.axes.get(name) for name in step.inputs)
        given = tuple(program.axes.get(name) for name in step.outputs)
        stage = None if step.stage is None else Graphed(step.stage, taken, given, buckets, record)
        run = Graphed(step.run, taken, (*given, *((0, 0) if step.decides else ())), buckets, record)
        return replace(step, run=run, stage=stage)

    return replace(program, steps=tuple(map(wrapped, program.steps)))
