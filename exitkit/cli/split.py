"""Samples to train on and to test on, and how they become batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, random_split

from exitkit.multi_exit.preprocessing import ImagePreprocessing

_HELD_OUT = 0.2


@dataclass(frozen=True)
class Split:
    """Training and test samples, and how they become batches.

    Attributes:
        preprocessing: of images, how they became tensors.
        classes: how many classes the labels name; None where nothing tells.
        note: a word to the user on what was lost, or empty.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    collate: Callable[..., Any] | None = None
    preprocessing: ImagePreprocessing | None = None
    classes: int | None = None
    note: str = ""

    @property
    def black(self) -> tuple[float, ...]:
        """Of images, a black pixel, normalised, per channel."""
        return () if self.preprocessing is None else self.preprocessing.black

    def loaders(self, batch: int, limit: int | None, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Shuffled training batches (of ``limit`` samples at most) and test batches."""
        train = self.train
        size = len(train)  # type: ignore[arg-type]
        if limit is not None and limit < size:
            train = Subset(train, torch.randperm(size, generator=generator_of(seed))[:limit].tolist())
        generator = generator_of(seed)
        return (
            DataLoader(train, batch, shuffle=True, generator=generator, collate_fn=self.collate),
            DataLoader(self.test, 4 * batch, collate_fn=self.collate),
        )


def hold_out(samples: Any) -> tuple[Subset[Any], Subset[Any]]:
    """The samples but for a fifth, and that fifth."""
    train, test = random_split(samples, [1 - _HELD_OUT, _HELD_OUT], generator=generator_of(0))
    return train, test


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
