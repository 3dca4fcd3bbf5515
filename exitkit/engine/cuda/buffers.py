"""The fixed memory that recorded steps read and write: what is known of the samples before each step, and their answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from exitkit.engine.memory_format import in_format, is_channels_last

_ALIGNED = 512
"""Bytes that values are aligned to, as torch's own allocations are."""


@dataclass(frozen=True)
class Slot:
    """The memory of one value for the largest batch.

    Attributes:
        flat: all of it, one-dimensional.
        like: sizes and order in memory of the value for ``samples`` samples; a tensor without data.
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

    def flattened(self, value: Tensor) -> Tensor:
        """A value with its elements in the order of the memory, one-dimensional; copied where it has them in another."""
        return in_format(value, is_channels_last(self.like)).as_strided((value.numel(),), (1,))


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


class Results(NamedTuple):
    """The answers of a whole batch (L, …), by the samples' places in it; see :class:`exitkit.Prediction`."""

    logits: Tensor
    exit: Tensor
    score: Tensor
    non_finite: Tensor

    @classmethod
    def empty(cls, classes: int, dtype: torch.dtype, largest: int, device: torch.device) -> Results:
        """Memory for the answers of at most ``largest`` samples."""
        return cls(
            torch.zeros(largest, classes, dtype=dtype, device=device),
            torch.zeros(largest, dtype=torch.int64, device=device),
            torch.zeros(largest, dtype=torch.float64, device=device),
            torch.zeros(largest, dtype=torch.bool, device=device),
        )


class Memory:
    """Values of all boundaries, in two parts that take turns: a step reads the one and writes the other.

    Integers are never in memory that other values were in: places behind the last sample of a batch hold what was there
    before, and a model may look something up by an integer, which must then be one that it knows. They hold zeros or what
    the same value was for earlier samples.
    """

    def __init__(self, largest: int, device: torch.device) -> None:
        self.largest, self.device = largest, device
        self.parts = [self._made(0), self._made(0)]

    def slots(self, boundary: int, values: dict[str, tuple[Tensor, int]]) -> dict[str, Slot]:
        """Memory for the values of a boundary by name, each with the samples in it (0: the same for every sample).

        Memory of the boundary before the last is used again where it is large enough.
        """
        shared = [name for name, (value, _) in values.items() if value.is_floating_point()]
        needed = sum(self._bytes(*values[name]) for name in shared)
        if len(self.parts[boundary % 2]) < needed:
            self.parts[boundary % 2] = self._made(needed)
        slots, start = {}, 0
        for name, (value, samples) in values.items():
            size = self._bytes(value, samples)
            if name in shared:
                memory = self.parts[boundary % 2][start : start + size]
                start += size
            else:
                memory = self._made(size)
            elements = value.numel() // samples * self.largest if samples else value.numel()
            like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            slots[name] = Slot(memory.view(value.dtype)[:elements], like, samples)
        return slots

    def _made(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def _bytes(self, value: Tensor, samples: int) -> int:
        size = value.nbytes // samples * self.largest if samples else value.nbytes
        return -(-size // _ALIGNED) * _ALIGNED


def dense(value: Tensor) -> Tensor:
    """The value where its samples lie one after another without gaps, otherwise a copy in which they do."""
    return in_format(value, is_channels_last(value))
