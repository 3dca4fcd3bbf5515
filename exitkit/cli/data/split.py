"""Samples to train on and to test on, and how they become batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, random_split

from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.preprocessing import ImagePreprocessing

_HELD_OUT = 0.2


@dataclass(frozen=True)
class Split:
    """Training and test samples, and how they become batches.

    Attributes:
        preprocessing: of images, how they became tensors.
        classes: how many classes the labels name; None where nothing tells.
        note: a word to the user on what was lost, or empty.
        workers: how many processes read samples; with 0 the one that trains does.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    collate: Callable[..., Any] | None = None
    preprocessing: ImagePreprocessing | None = None
    classes: int | None = None
    note: str = ""
    workers: int = 0

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
        loader = partial(DataLoader[Any], collate_fn=self.collate, num_workers=self.workers)
        return (
            loader(train, batch, shuffle=True, generator=generator_of(seed)),
            loader(self.test, 4 * batch),
        )


def hold_out(samples: Any, data: str) -> tuple[Subset[Any], Subset[Any]]:
    """The samples but for a fifth, and that fifth; ``data`` is where they come from.

    Raises:
        ArgumentError: there are too few.
    """
    if len(samples) < 1 / _HELD_OUT:
        raise ArgumentError(
            f"--data {data!r} has {counted(len(samples), 'sample')}, and a fifth of them, which is held out, is none; give 5 "
            "or more, or others to hold out: bench and train --test, retrofit --calibration"
        )
    train, test = random_split(samples, [1 - _HELD_OUT, _HELD_OUT], generator=generator_of(0))
    return train, test


def check_indices(low: int, high: int, origin: str, unlabelled: bool) -> None:
    """Refuse labels below 0, but for the -1 of ``unlabelled`` samples, which a recipe with distillation may have.

    Raises:
        ArgumentError: there are some.
    """
    if low < (-1 if unlabelled else 0):
        raise ArgumentError(
            f"{origin}: labels run from {low} to {high}; classes are counted from 0, so add {-low} to each\n"
            "-1 is for a sample without a label, in a recipe with [loss.distillation]"
        )


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
