"""CIFAR-10 as tensors, shuffled, flipped and shifted, and what plain networks reach on it.

A folder of data holds ``cifar10_train.npz`` and ``cifar10_test.npz`` (``images`` N×32×32×3 uint8, ``labels``). Weights are
those of github.com/akamaster/pytorch_resnet_cifar10 as safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from exitkit.cli.data.arrays import normalise

# The static front: top-1 of the weights' repository on all 10,000 test images, and MACs as a share of ResNet-56's, by depth.
STATIC = {20: (91.73, 0.33), 32: (92.63, 0.55), 44: (93.10, 0.78), 56: (93.39, 1.0)}
BLACK = normalise(np.zeros((1, 1, 1, 3), np.uint8))


@dataclass
class Augmented:
    """Shuffled batches of normalised images, randomly flipped and shifted by up to 4 pixels, black coming in at the border."""

    images: Tensor
    labels: Tensor
    batch: int = 128

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.images)).split(self.batch):
            images = F.pad(self.images[rows] - BLACK, (4, 4, 4, 4)) + BLACK
            flips = torch.rand(len(rows)) < 0.5
            images[flips] = images[flips].flip(-1)
            top, left = torch.randint(0, 9, (2, len(rows)))
            shifted = [image[:, y : y + 32, x : x + 32] for image, y, x in zip(images, top, left, strict=True)]
            yield torch.stack(shifted), self.labels[rows]


def load(path: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    with np.load(path) as arrays:
        return normalise(arrays["images"][:limit]), torch.from_numpy(arrays["labels"][:limit].astype(np.int64))
