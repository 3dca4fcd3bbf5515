"""The fixed memory that recorded steps read and write: what is known of the samples before each step, and their answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from exitkit.engine.memory_format import is_channels_last
from exitkit.engine.program import Program

_ALIGNED = 512
"""Bytes that values are aligned to, as torch's own allocations are."""


@dataclass(frozen=True)
class Slot:
    """The memory of one value for the largest batch.

    Attributes:
        flat: all of it, one-dimensional.
        like: an example of the value for ``samples`` samples, which tells sizes and order of the others.
        samples: that many; 0 for a value that is the same for every sample.
    """

    flat: Tensor
    like: Tensor
    samples: int

    def view(self, samples: int) -> Tensor:
        """The value for so many samples: the beginning of the memory, in the order of the example."""
        if not self.samples:
            return self.flat.as_strided(self.like.shape, self.like.stride())
        rows, *sizes = self.like.shape
        strides = (self.like.numel() // rows, *self.like.stride()[1:])
        return self.flat.as_strided((rows // self.samples * samples, *sizes), strides)


@dataclass(frozen=True)
class Boundary:
    """The samples before a step, compacted: those that have no answer yet.

    Attributes:
        rows: (L,) int64, their places in the caller's batch.
        faulty: (L,) int8, whether a score of theirs was not finite.
        count: (1,) int32, how many there are.
        on_host: (1,) int32 in pinned memory, to which ``count`` is copied.
        keep: (L,) int32, their places in the batch before the step before.
        slots: the values that this step and later ones read, by name; known once the step before was recorded.
    """

    rows: Tensor
    faulty: Tensor
    count: Tensor
    on_host: Tensor
    keep: Tensor
    slots: dict[str, Slot] = field(default_factory=dict)

    @classmethod
    def empty(cls, largest: int, device: torch.device) -> Boundary:
        """One without values; its rows count up, as they do before step 0."""
        host = torch.zeros(1, dtype=torch.int32)
        return cls(
            torch.arange(largest, device=device),
            torch.zeros(largest, dtype=torch.int8, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            host.pin_memory() if device.type == "cuda" else host,
            torch.zeros(largest, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Results:
    """The answers of a whole batch (L, …), by the samples' places in it."""

    logits: Tensor
    exit: Tensor
    score: Tensor
    faulty: Tensor

    @classmethod
    def empty(cls, program: Program, largest: int) -> Results:
        device = program.inputs.device
        return cls(
            torch.zeros(largest, program.num_classes, dtype=program.dtype, device=device),
            torch.zeros(largest, dtype=torch.int64, device=device),
            torch.zeros(largest, dtype=torch.float64, device=device),
            torch.zeros(largest, dtype=torch.int8, device=device),
        )


class Memory:
    """Values of all boundaries, in two parts that take turns: a step reads the one and writes the other."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.parts: list[Tensor | None] = [None, None]

    def slots(self, boundary: int, values: dict[str, tuple[Tensor, int]]) -> dict[str, Slot]:
        """Memory for the values of a boundary by name, each with the samples in it (0: the same for every sample).

        Memory of the boundary before the last is used again where it is large enough.
        """
        sizes = {name: self._bytes(value, samples) for name, (value, samples) in values.items()}
        device = next((value.device for value, _ in values.values()), torch.device("cpu"))
        part = self.parts[boundary % 2]
        if part is None or len(part) < sum(sizes.values()):
            part = self.parts[boundary % 2] = torch.zeros(sum(sizes.values()), dtype=torch.uint8, device=device)
        made, start = {}, 0
        for name, (value, samples) in values.items():
            elements = value.numel() // samples * self.largest if samples else value.numel()
            memory = part[start : start + elements * value.element_size()].view(value.dtype)
            made[name] = Slot(memory, value, samples)
            start += sizes[name]
        return made

    def _bytes(self, value: Tensor, samples: int) -> int:
        size = value.nbytes // samples * self.largest if samples else value.nbytes
        return -(-size // _ALIGNED) * _ALIGNED


def dense(value: Tensor) -> Tensor:
    """The value where its samples lie one after another without gaps, otherwise a copy in which they do."""
    return value if value.is_contiguous() or is_channels_last(value) else value.contiguous()


def flat(value: Tensor) -> Tensor:
    """A dense value as it lies in memory, one-dimensional."""
    return value.as_strided((value.numel(),), (1,))
