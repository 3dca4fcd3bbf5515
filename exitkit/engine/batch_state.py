"""A batch between two steps: everything that belongs to its samples, and how some of them are taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exitkit.engine.memory_format import is_channels_last

Gather = Callable[[Tensor, Tensor], Tensor]
"""From a value (B, …) and places (K,) int64 to the value's rows there (K, …)."""


def gather(value: Tensor, index: Tensor) -> Tensor:
    """A :data:`Gather` in plain torch."""
    return value.index_select(0, index)


@dataclass
class BatchState:
    """A batch of samples between two steps.

    Attributes:
        rows: (B,) int64, the callers' numbers of the samples; −1 for one that has its answer and is carried along.
        values: what later steps read, by name.
        fault: (B,) float32, 0 as long as every score was finite, NaN since one was not.
    """

    rows: Tensor
    values: dict[str, Any]
    fault: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Tensor, axes: Mapping[str, int]) -> BatchState:
        """The samples at the places ``keep`` (int64): every batch-major value is gathered, and those only."""
        values = {name: select(value, keep, axes.get(name), len(self)) for name, value in self.values.items()}
        return BatchState(gather(self.rows, keep), values, gather(self.fault, keep))

    @staticmethod
    def merge(batches: Sequence[BatchState], axes: Mapping[str, int]) -> BatchState:
        """Batches that stand before the same step as one; values without a batch axis are alike in all of them."""
        if len(batches) == 1:
            return batches[0]

        def joined(name: str) -> Any:
            axis = axes.get(name)
            parts = [one.values[name] for one in batches]
            return parts[0] if axis is None else torch.cat(parts, axis)

        return BatchState(
            torch.cat([one.rows for one in batches]),
            {name: joined(name) for name in batches[0].values},
            torch.cat([one.fault for one in batches]),
        )


def select(value: Any, keep: Tensor, axis: int | None, batch: int, gather: Gather = gather) -> Any:
    """The samples ``keep`` of ``batch``; a value without a batch axis (a rotary table, a size) stays as it is."""
    if axis is None:
        return value
    if value.shape[axis] == batch:
        if axis == 0 and is_channels_last(value):  # gathered as it lies, it keeps its memory format
            return gather(value.permute(0, 2, 3, 1), keep).permute(0, 3, 1, 2)
        return gather(value, keep) if axis == 0 else value.index_select(axis, keep)
    samples = value.unflatten(axis, (batch, -1))
    return samples.index_select(axis, keep).flatten(axis, axis + 1)
