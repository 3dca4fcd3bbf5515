"""Samples under way: everything that belongs to them between two stages, and how some of them leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Flight:
    """A batch of samples between two stages.

    Attributes:
        rows: (B,) int64, the callers' numbers of the samples.
        values: what the backbone's later stages read, by name in the captured graph.
        inputs: the model's inputs that later heads read, by position or keyword.
        non_finite: (B,) bool, samples with a score that was not finite.
        previous: (B, C) logits of the exit before, for a cascade link.
        answers: log-probabilities (B, C) of every head so far, where the method combines them.
        last, count: (B,) the latest answer and how many exits in a row gave it, where the criterion is patience.
    """

    rows: Tensor
    values: dict[str, Any]
    inputs: dict[int | str, Tensor]
    non_finite: Tensor
    previous: Tensor | None = None
    answers: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None
    count: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Tensor, axes: Mapping[str, int]) -> Flight:
        """The samples at the indices ``keep`` (int64), by index-select of every batch-major value and of those only."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, keep)

        return Flight(
            self.rows.index_select(0, keep),
            {name: select(value, keep, axes.get(name), len(self)) for name, value in self.values.items()},
            {key: tensor.index_select(0, keep) for key, tensor in self.inputs.items()},
            self.non_finite.index_select(0, keep),
            of(self.previous),
            [answer.index_select(0, keep) for answer in self.answers],
            of(self.last),
            of(self.count),
        )

    @staticmethod
    def merge(flights: Sequence[Flight], axes: Mapping[str, int]) -> Flight:
        """Flights that stand before the same stage as one; values without a batch axis are alike in all of them."""
        if len(flights) == 1:
            return flights[0]
        first = flights[0]

        def joined(name: str) -> Any:
            axis = axes.get(name)
            parts = [flight.values[name] for flight in flights]
            return parts[0] if axis is None else torch.cat(parts, axis)

        def stacked(parts: list[Tensor | None]) -> Tensor | None:
            present = [part for part in parts if part is not None]
            return torch.cat(present) if present else None

        return Flight(
            torch.cat([flight.rows for flight in flights]),
            {name: joined(name) for name in first.values},
            {key: torch.cat([flight.inputs[key] for flight in flights]) for key in first.inputs},
            torch.cat([flight.non_finite for flight in flights]),
            stacked([flight.previous for flight in flights]),
            [torch.cat(parts) for parts in zip(*(flight.answers for flight in flights), strict=True)],
            stacked([flight.last for flight in flights]),
            stacked([flight.count for flight in flights]),
        )


def select(value: Any, keep: Tensor, axis: int | None, batch: int) -> Any:
    """The samples ``keep`` of ``batch``; a value without a batch axis (a rotary table, a size) stays as it is."""
    if axis is None:
        return value
    if value.shape[axis] == batch:
        return value.index_select(axis, keep)
    samples = value.unflatten(axis, (batch, -1))
    return samples.index_select(axis, keep).flatten(axis, axis + 1)
