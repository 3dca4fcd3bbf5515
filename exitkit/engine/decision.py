"""The decision: which samples leave, and which go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The samples that leave, or those that go on.

    Attributes:
        places: (K,) int64, their places in the batch, ascending.
        rows: (K,) int64, the callers' numbers.
        score: (K,) float64, at this exit.
        fault: (K,) float32, as :class:`~exitkit.engine.batch_state.BatchState` has it.
    """

    places: Tensor
    rows: Tensor
    score: Tensor
    fault: Tensor

    @classmethod
    def of(cls, places: Tensor, rows: Tensor, score: Tensor, fault: Tensor) -> Group:
        """The samples at ``places`` of a batch's columns; nothing is copied where these are all of them."""
        if len(places) == len(rows):
            return cls(places, rows, score, fault)
        return cls(places, *(column.index_select(0, places) for column in (rows, score, fault)))

    def __len__(self) -> int:
        return len(self.places)


Split = Callable[[Tensor, Tensor, Tensor, float], tuple[Group, Group]]
"""From scores (B,) float64, rows (B,) int64, faults (B,) float32 and τ to the samples that leave and those that go on. A score
of NaN goes on; a row of −1 is in neither."""


def split(score: Tensor, rows: Tensor, fault: Tensor, threshold: float) -> tuple[Group, Group]:
    """A :data:`Split` in plain torch; what other implementations are tested against."""
    leave, stay = _places(score, rows, threshold)
    return Group.of(leave, rows, score, fault), Group.of(stay, rows, score, fault)


def _places(score: Tensor, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    present = rows >= 0
    leaves = (score > threshold) & present
    count = int(leaves.sum())
    if count == 0:
        return rows.new_empty(0), torch.nonzero(present).squeeze(1)
    if count == len(rows):
        return torch.arange(count, device=rows.device), rows.new_empty(0)
    return torch.nonzero(leaves).squeeze(1), torch.nonzero(present & ~leaves).squeeze(1)
