"""The decision: who leaves, and who goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """The samples on one side of a decision.

    Attributes:
        places: (K,) int64, their places in the batch, ascending.
        rows: (K,) int64, the callers' numbers.
        score: (K,) float32, at this exit.
        fault: (K,) float32, as :class:`~exitkit.engine.batch_state.Flight` has it.
    """

    places: Tensor
    rows: Tensor
    score: Tensor
    fault: Tensor

    @classmethod
    def of(cls, places: Tensor, rows: Tensor, score: Tensor, fault: Tensor) -> Side:
        """The samples at ``places`` of a batch's columns; nothing is copied where these are all of them."""
        if len(places) == len(rows):
            return cls(places, rows, score, fault)
        return cls(places, *(column.index_select(0, places) for column in (rows, score, fault)))

    def __len__(self) -> int:
        return len(self.places)


Split = Callable[[Tensor, Tensor, Tensor, float], tuple[Side, Side]]
"""From scores (B,) float32, rows (B,) int64, faults (B,) float32 and τ to the samples that leave, and those that go on, as
does whoever has a score of NaN. A row of −1 is neither."""


def split(score: Tensor, rows: Tensor, fault: Tensor, threshold: float) -> tuple[Side, Side]:
    """A :data:`Split` in plain torch; what other implementations are tested against."""
    leave, stay = _places(score, rows, threshold)
    return Side.of(leave, rows, score, fault), Side.of(stay, rows, score, fault)


def _places(score: Tensor, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    present = rows >= 0
    leaves = (score.double() > threshold) & present
    count = int(leaves.sum())
    if count == 0:
        return rows.new_empty(0), torch.nonzero(present).squeeze(1)
    if count == len(rows):
        return torch.arange(count, device=rows.device), rows.new_empty(0)
    return torch.nonzero(leaves).squeeze(1), torch.nonzero(present & ~leaves).squeeze(1)
