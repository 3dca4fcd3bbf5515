"""Samples under way: everything that belongs to them between two steps, and how some of them leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exitkit.runtime.memory_format import is_channels_last


@dataclass
class Flight:
    """A batch of samples between two steps.

    Attributes:
        rows: (B,) int64, the callers' numbers of the samples; −1 for one that has its answer and is carried along.
        values: what later steps read, by name.
        total: (B,) float32, the sum of the scores so far, which is not finite once one of them was not.
    """

    rows: Tensor
    values: dict[str, Any]
    total: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Tensor, axes: Mapping[str, int]) -> Flight:
        """The samples at the indices ``keep`` (int64), by index-select of every batch-major value and of those only."""
        return Flight(
            self.rows.index_select(0, keep),
            {name: select(value, keep, axes.get(name), len(self)) for name, value in self.values.items()},
            self.total.index_select(0, keep),
        )

    @staticmethod
    def merge(flights: Sequence[Flight], axes: Mapping[str, int]) -> Flight:
        """Flights that stand before the same step as one; values without a batch axis are alike in all of them."""
        if len(flights) == 1:
            return flights[0]

        def joined(name: str) -> Any:
            axis = axes.get(name)
            parts = [flight.values[name] for flight in flights]
            return parts[0] if axis is None else torch.cat(parts, axis)

        return Flight(
            torch.cat([flight.rows for flight in flights]),
            {name: joined(name) for name in flights[0].values},
            torch.cat([flight.total for flight in flights]),
        )


def select(value: Any, keep: Tensor, axis: int | None, batch: int) -> Any:
    """The samples ``keep`` of ``batch``; a value without a batch axis (a rotary table, a size) stays as it is."""
    if axis is None:
        return value
    if value.shape[axis] == batch:
        if axis == 0 and is_channels_last(value):  # index_select alone would give another memory format
            return value.permute(0, 2, 3, 1).index_select(0, keep).permute(0, 3, 1, 2)
        return value.index_select(axis, keep)
    samples = value.unflatten(axis, (batch, -1))
    return samples.index_select(axis, keep).flatten(axis, axis + 1)
