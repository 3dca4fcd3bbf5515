"""Answers by replaying recorded steps: a graph launch for each step, and a wait of the host for each decision.

A recording is a step at one bucket: the stage and its exit, then the decision, which puts answers straight into the results,
then the compaction of what later steps read to the beginning of fixed memory, where the next step's recording finds it. How
many samples go on is read on the device, and copied to the host for one thing alone: to choose the next bucket, or to stop.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from exitkit.engine.batch_state import BatchState
from exitkit.engine.cuda.buckets import SIZES, bucket_of, buckets_up_to
from exitkit.engine.cuda.buffers import Boundary, Memory, Results, dense, flat
from exitkit.engine.cuda.recording import Record, Run
from exitkit.engine.loop import Loop, Prediction
from exitkit.engine.program import Program, Step
from exitkit.methods.policy import ExitPolicy

_SHAPES = 8
"""Input sizes (lengths of a text) that are recorded at most; others run step by step."""


class Kernels(Protocol):
    """What :mod:`exitkit.engine.cuda.kernels` and :mod:`exitkit.engine.cuda.reference` both are."""

    decide: Callable[..., None]
    compact: Callable[..., None]


class UnrecordableError(Exception):
    """A step whose values cannot be handed on in fixed memory."""


@dataclass
class Recordings:
    """The recorded steps for inputs of one size, and the memory that they share.

    Attributes:
        largest: samples in the largest bucket.
        boundaries: before each step, and behind the last.
        steps: the recordings, by the step's place, whether its exit is there, and the bucket.
    """

    program: Program
    inputs: tuple[Tensor, ...]
    largest: int
    kernels: Kernels
    record: Record
    pool: Any
    thresholds: Tensor
    steps: dict[tuple[int, bool, int], Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.program.inputs.device
        self.boundaries = [Boundary.empty(self.largest, device) for _ in range(len(self.program.steps) + 1)]
        self.results, self.memory = Results.empty(self.program, self.largest), Memory(self.largest)
        named = dict(zip(self.program.inputs.names, self.inputs, strict=True))
        self._reserve(0, {name: (dense(value), len(value)) for name, value in named.items()})

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Put a batch before step 0."""
        count, first = len(tensors[0]), self.boundaries[0]
        for slot, tensor in zip(first.slots.values(), tensors, strict=True):
            slot.view(count).copy_(tensor)
        first.count.fill_(count)

    def replay(self, index: int, step: Step, bucket: int) -> None:
        """Run a step at a bucket, which is recorded where it was not yet."""
        key = index, step.decides, bucket
        if key not in self.steps:
            run = self._function(index, step, bucket)
            run(warm_up=True)
            self.steps[key] = self.record(run, self.pool, self.program.inputs.device)
        self.steps[key]()

    def _function(self, index: int, step: Step, bucket: int) -> Callable[..., None]:
        here, there = self.boundaries[index : index + 2]
        last = index == len(self.program.steps) - 1
        values = {name: slot.view(bucket) for name, slot in here.slots.items()}

        def run(warm_up: bool = False) -> None:
            taken = [values[name] for name in step.inputs]
            made = step.run(
                *([value.clone() for value in taken] if warm_up else taken)
            )  # a step may write into its inputs
            after = values | dict(zip(step.outputs, made, strict=False))
            if not last and not there.slots:
                self._reserve(index + 1, {name: self._sized(name, after[name], bucket) for name in step.live})
            if step.decides:
                threshold = self.thresholds[step.exit : step.exit + 1]
                answer, score = made[-2:]
                self.kernels.decide(score, answer, threshold, step.exit, here, there, self.results, last)
            else:
                self._all_go_on(here, there, bucket)
            for name in () if last else step.live:
                self._hand_on(name, after[name], there, bucket)
            there.on_host.copy_(there.count, non_blocking=True)

        return run

    def _all_go_on(self, here: Boundary, there: Boundary, bucket: int) -> None:
        there.count.copy_(here.count)
        there.rows[:bucket].copy_(here.rows[:bucket])
        there.faulty[:bucket].copy_(here.faulty[:bucket])
        there.keep[:bucket].copy_(torch.arange(bucket, dtype=torch.int32, device=there.keep.device))

    def _sized(self, name: str, value: Any, bucket: int) -> tuple[Tensor, int]:
        """A value and the samples in it; 0 where it is the same for every sample."""
        axis = self.program.axes.get(name)
        if not isinstance(value, Tensor) or axis not in (None, 0):
            raise UnrecordableError(name)
        return dense(value), 0 if axis is None else bucket

    def _reserve(self, boundary: int, values: dict[str, tuple[Tensor, int]]) -> None:
        self.boundaries[boundary].slots.update(self.memory.slots(boundary, values))

    def _hand_on(self, name: str, value: Tensor, there: Boundary, bucket: int) -> None:
        slot = there.slots[name]
        if slot.samples:
            self.kernels.compact(flat(dense(value)), slot.flat, bucket, there)
        else:
            slot.view(0).copy_(value)


class Graphs:
    """Recordings of one engine, for inputs of several sizes. One call at a time, whatever the threads and streams."""

    def __init__(
        self, largest: int, exits: int, device: torch.device, kernels: Kernels, record: Record, pool: Any
    ) -> None:
        self.sizes = buckets_up_to(largest)
        self.kernels, self.record, self.pool = kernels, record, pool
        self.thresholds = torch.zeros(exits + 1, dtype=torch.float64, device=device)
        self.recordings: dict[Any, Recordings | None] = {}
        self.lock = threading.Lock()
        self.done: torch.cuda.Event | None = None
        self._policy: tuple[float, ...] | None = None

    def answer(self, tensors: Sequence[Tensor], loop: Loop, waits: Sequence[bool]) -> Prediction | None:
        """Answer a batch of at most ``sizes[-1]`` samples; None where its steps cannot be recorded.

        Args:
            tensors: as the program takes them.
            loop: the program and the policy.
            waits: for each exit, whether the host waits for its decision.
        """
        device = loop.program.inputs.device
        with self.lock, _on(device):
            recordings = self._recordings(tensors, loop.program)
            if recordings is None:
                return None
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            if stream is not None and self.done is not None:
                stream.wait_event(self.done)
            self._set(loop.policy.thresholds)
            try:
                self._run(recordings, tensors, loop.program, waits, stream)
            except UnrecordableError:
                self.recordings[_key(tensors)] = None
                return None
            except torch.OutOfMemoryError:
                self._shrink(recordings)
                raise
            made = _answers(recordings.results, len(tensors[0]))
            if stream is not None:
                self.done = stream.record_event()
            return made

    def runner(self, index: int, program: Program, count: int) -> Run | None:
        """A recorded step for so many samples, to be timed; None where none of this size was recorded."""
        for recordings in self.recordings.values():
            if recordings is not None and count <= self.sizes[-1]:
                bucket = bucket_of(self.sizes, count)
                return recordings.steps.get((index, program.steps[index].decides, bucket))
        return None

    def _run(
        self, recordings: Recordings, tensors: Sequence[Tensor], program: Program, waits: Sequence[bool], stream: Any
    ) -> None:
        recordings.load(tensors)
        count, last = len(tensors[0]), len(program.steps) - 1
        for index, step in enumerate(program.steps):
            recordings.replay(index, step, bucket_of(self.sizes, count))
            if step.decides and index < last and waits[index]:
                if stream is not None:
                    stream.record_event().synchronize()
                count = min(count, int(recordings.boundaries[index + 1].on_host))
                if count == 0:
                    return

    def _recordings(self, tensors: Sequence[Tensor], program: Program) -> Recordings | None:
        key = _key(tensors)
        if key not in self.recordings:
            if len(self.recordings) >= _SHAPES:
                return None
            inputs = tuple(tensor.new_zeros(1, *tensor.shape[1:]) for tensor in tensors)
            fixed = self.kernels, self.record, self.pool, self.thresholds
            self.recordings[key] = Recordings(program, inputs, self.sizes[-1], *fixed)
        return self.recordings[key]

    def _set(self, thresholds: tuple[float, ...]) -> None:
        """τ to the device, where it is not there already."""
        if thresholds != self._policy:
            values = torch.tensor([*thresholds, float("-inf")], dtype=torch.float64)
            cuda = self.thresholds.device.type == "cuda"
            self.thresholds.copy_(values.pin_memory() if cuda else values, non_blocking=True)
            self._policy = thresholds

    def _shrink(self, recordings: Recordings) -> None:
        """Memory did not suffice: without the largest bucket from now on."""
        recordings.steps.clear()
        self.recordings.clear()
        if len(self.sizes) > 1:
            self.sizes = self.sizes[:-1]
            warnings.warn(
                f"out of GPU memory: batches are recorded for at most {self.sizes[-1]} samples from now on, larger ones are "
                "answered in parts",
                stacklevel=5,
            )


@dataclass(frozen=True)
class GraphLoop(Loop):
    """A loop that answers by recordings, and step by step what cannot be recorded.

    Attributes:
        graphs: the recordings, shared by all loops over the same steps.
        waits: for each exit, whether the host waits for its decision; for all, by default.
    """

    graphs: Graphs | None = None
    waits: tuple[bool, ...] = ()

    def warm(self, tensors: Sequence[Tensor], sizes: Sequence[int] | None) -> None:
        """Record every step at these sizes' buckets, the largest first; by default at all."""
        graphs = self._graphs
        staying = replace(self, policy=self.policy.at(float("inf")), waits=(False,) * len(self.policy.thresholds))
        for size in sorted(
            {bucket_of(graphs.sizes, min(n, graphs.sizes[-1])) for n in sizes or graphs.sizes}, reverse=True
        ):
            rows = torch.arange(size, device=tensors[0].device) % len(tensors[0])
            staying.answer([tensor[rows] for tensor in tensors])

    def waiting(self, waits: tuple[bool, ...]) -> GraphLoop:
        return replace(self, waits=waits)

    def step_runner(self, index: int, batch: BatchState) -> Callable[[], Any]:
        return self._graphs.runner(index, self.program, len(batch)) or super().step_runner(index, batch)

    @property
    def _graphs(self) -> Graphs:
        assert self.graphs is not None
        return self.graphs

    def answer(self, tensors: Sequence[Tensor]) -> Prediction:
        count, graphs = len(tensors[0]), self._graphs
        if not count:
            return super().answer(tensors)
        waits = self.waits or (True,) * len(self.policy.thresholds)
        parts = []
        for start in range(0, count, graphs.sizes[-1]):  # so that no step has more elements than it was compiled for
            part = [tensor[start : start + graphs.sizes[-1]] for tensor in tensors]
            parts.append(graphs.answer(part, self, waits) or super().answer(part))
        return (
            parts[0] if len(parts) == 1 else Prediction(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        )


def graph_loop(program: Program, policy: ExitPolicy) -> GraphLoop:
    """A loop over compiled steps on a GPU; each is recorded when a bucket first comes to it."""
    from exitkit.engine.cuda import kernels
    from exitkit.engine.cuda.recording import record

    device = program.inputs.device
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
    return GraphLoop(program, policy, graphs=Graphs(SIZES[-1], len(policy.thresholds), device, kernels, record, pool))


def _key(tensors: Sequence[Tensor]) -> Any:
    return tuple(tuple(tensor.shape[1:]) for tensor in tensors)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else torch.device(device)


def _answers(results: Results, count: int) -> Prediction:
    """Copies, which the next call does not overwrite."""
    logits, exit_, score, faulty = (
        column[:count] for column in (results.logits, results.exit, results.score, results.faulty)
    )
    return Prediction(logits.clone(), exit_.clone(), score.clone(), faulty.bool())
