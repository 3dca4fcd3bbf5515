"""The decision: who leaves, and who goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Split = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""From scores (B,) float32, rows (B,) int64 and τ to two int64 index tensors, both ascending: the samples that leave, and
those that go on, as does whoever has a score of NaN. A row of −1 is neither."""


def split(score: Tensor, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """A :data:`Split` in plain torch; what other implementations are tested against."""
    if len(rows) == 1:  # the usual case of latency: plain numbers take less time than a handful of operations
        alone, nobody = rows.new_zeros(1), rows.new_empty(0)
        if int(rows) < 0:
            return nobody, nobody
        return (alone, nobody) if float(score) > threshold else (nobody, alone)
    present = rows >= 0
    leaves = (score.double() > threshold) & present
    count = int(leaves.sum())
    if count == 0:
        return rows.new_empty(0), torch.nonzero(present).squeeze(1)
    if count == len(rows):
        return torch.arange(count, device=rows.device), rows.new_empty(0)
    return torch.nonzero(leaves).squeeze(1), torch.nonzero(present & ~leaves).squeeze(1)
