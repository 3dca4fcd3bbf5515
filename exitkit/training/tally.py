"""Within an epoch: where it stands, and how many batches make a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor


@dataclass
class Tally:
    """Where an epoch stands: steps done, and each exit's summed losses and the number of batches in them."""

    totals: Tensor
    batches: Tensor
    steps: int = 0
    samples: int = 0

    @classmethod
    def empty(cls, exits: int) -> Tally:
        return cls(torch.zeros(exits), torch.zeros(exits))

    def add(self, exits: Sequence[int], losses: Tensor, batches: int, samples: int) -> None:
        self.totals[list(exits)] += losses
        self.batches[list(exits)] += batches
        self.steps += 1
        self.samples += samples


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` items, the last of what is left."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
