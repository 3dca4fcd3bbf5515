"""The recorded steps for inputs of one size.

A recording is a step at one bucket: the stage and its exit, then the decision, which puts answers straight into the results,
then the compaction of what later steps read to the beginning of fixed memory, where the next step's recording finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from exitkit.common.errors import FileError
from exitkit.engine.cuda.buffers import Boundary, Memory, Results, Slot, dense
from exitkit.engine.cuda.recorder import Record, Run, UnrecordableError
from exitkit.engine.memory_format import in_format
from exitkit.engine.program import Program, Step


class Kernels(Protocol):
    """What :mod:`exitkit.engine.cuda.kernels` and :mod:`exitkit.engine.cuda.reference` both are."""

    decide: Callable[..., None]
    compact: Callable[..., None]


@dataclass
class Recordings:
    """The recorded steps for inputs of one size, and what they read and write.

    Attributes:
        inputs: one sample.
        memory: of values, shared with recordings for other sizes.
        thresholds: (exits + 1,) float64, τ on the device.
        boundaries: before each step, and behind the last.
        steps: the recordings, by the step's place, whether its exit is there, and the bucket.
        loaded: how many samples the first boundary holds.
        values: its memory for so many.
        answers: the results' memory for so many.
    """

    program: Program
    inputs: tuple[Tensor, ...]
    memory: Memory
    kernels: Kernels
    record: Record
    thresholds: Tensor
    steps: dict[tuple[int, bool, int], Run] = field(default_factory=dict)
    loaded: int = 0
    values: tuple[Tensor, ...] = ()
    answers: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        largest, first = self.memory.largest, self.program.steps[0]
        device = self.program.inputs.device
        self.boundaries = [Boundary.empty(largest, device) for _ in range(len(self.program.steps) + 1)]
        self.results = Results.empty(self.program.num_classes, self.program.dtype, largest, device)
        # in the memory format in which the first step takes them, so that it does not turn them around again
        formats = dict(zip(first.inputs, getattr(first.run, "channels_last", ()), strict=False))
        named = dict(zip(self.program.inputs.names, self.inputs, strict=True))
        values = {name: (in_format(value, formats.get(name, False)), 1) for name, value in named.items()}
        self.boundaries[0].slots.update(self.memory.slots(0, values))

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Put a batch before step 0."""
        count, first = tensors[0].shape[0], self.boundaries[0]
        if count != self.loaded:  # no step writes the count, and batches are often of one size
            self.loaded = 0  # where this is interrupted, the next batch begins anew
            first.count.fill_(count)
            self.values = tuple(slot.view(count) for slot in first.slots.values())
            self.answers = tuple(column[:count] for column in self.results)
            self.loaded = count
        for value, tensor in zip(self.values, tensors, strict=True):
            value.copy_(tensor)

    def replay(self, index: int, step: Step, bucket: int) -> None:
        """Run a step at a bucket, which is recorded where it was not yet."""
        key = index, step.decides, bucket
        if key not in self.steps:
            run = self._function(index, step, bucket)
            run(warm_up=True)
            self.steps[key] = self.record(run)
        self.steps[key]()

    def recorded(self, index: int, step: Step, bucket: int, values: Mapping[str, Any], count: int) -> Run | None:
        """The recording of a step, where it is for values of these sizes."""
        slots = self.boundaries[index].slots
        fits = all(name in slots and slots[name].view(count).shape == values[name].shape for name in step.inputs)
        return self.steps.get((index, step.decides, bucket)) if fits else None

    def _function(self, index: int, step: Step, bucket: int) -> Callable[..., None]:
        here, there = self.boundaries[index : index + 2]
        last = index == len(self.program.steps) - 1
        values = {name: slot.view(bucket) for name, slot in here.slots.items()}

        def run(warm_up: bool = False) -> None:
            taken = [
                values[name].clone() if warm_up else values[name] for name in step.inputs
            ]  # it may write into them
            made = step.run(*taken)
            after = values | dict(zip(step.outputs, made, strict=False))
            if not last and not there.slots:
                there.slots.update(self._slots(index + 1, {name: after[name] for name in step.live}, bucket))
            if step.decides:
                answer, score = made[-2:]
                self._check(answer, score, bucket)
                threshold = self.thresholds[step.exit : step.exit + 1]
                self.kernels.decide(score, answer, threshold, step.exit, here, there, self.results, last)
            else:
                _all_go_on(here, there, bucket)
            if not last:
                for name in step.live:
                    self._hand_on(there.slots[name], after[name], there, bucket)
                there.on_host.copy_(there.count, non_blocking=True)

        return run

    def _check(self, answer: Tensor, score: Tensor, bucket: int) -> None:
        """The kernels trust these sizes."""
        if score.shape != (bucket,) or answer.shape != (bucket, self.program.num_classes):
            raise FileError("a step of this package lost samples, or made some up; export it again")

    def _slots(self, boundary: int, values: dict[str, Any], bucket: int) -> dict[str, Slot]:
        sized: dict[str, tuple[Tensor, int]] = {}
        for name, value in values.items():
            axis = self.program.axes.get(name)
            if not isinstance(value, Tensor) or axis not in (None, 0) or (axis == 0 and len(value) % bucket):
                raise UnrecordableError(f"{name!r} does not have its samples in the first dimension")
            sized[name] = dense(value), 0 if axis is None else bucket
        return self.memory.slots(boundary, sized)

    def _hand_on(self, slot: Slot, value: Tensor, there: Boundary, bucket: int) -> None:
        if slot.samples:
            self.kernels.compact(slot.flattened(value), slot.flat, bucket, there)
        else:
            slot.view(0).copy_(value)


def _all_go_on(here: Boundary, there: Boundary, bucket: int) -> None:
    there.count.copy_(here.count)
    there.rows[:bucket].copy_(here.rows[:bucket])
    there.faulty[:bucket].copy_(here.faulty[:bucket])
    there.keep[:bucket].copy_(torch.arange(bucket, dtype=torch.int32, device=there.keep.device))
