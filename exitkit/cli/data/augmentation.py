"""Augmentation of training images by name: torchvision's transforms on normalised tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from exitkit.common.errors import ArgumentError
from exitkit.common.torchvision_guard import import_torchvision

Make = Callable[[Any, tuple[int, int], list[float]], Any]
"""(torchvision.transforms.v2, height and width, black per channel) → a transform of one image."""

WHOLE: ContextVar[bool] = ContextVar("whole", default=False)
"""Whether images are decoded as large as they are: while a training sample is read that is cropped at random. No argument,
since torch's Subset and torchvision's data sets, which lie between, are asked by number alone."""


def _contrast(image: Tensor) -> Tensor:
    """Contrast between 0.6 and 1.4 of its own, about the mean of each channel: torchvision's own cuts off at 0 and 1."""
    mean = image.mean((-2, -1), keepdim=True)
    return mean + (0.6 + 0.8 * torch.rand(())) * (image - mean)


# what comes in at a border is black, as in training before normalisation: BatchNorm's statistics notice a grey one
SINGLE: dict[str, Make] = {
    "flip": lambda v2, size, black: v2.RandomHorizontalFlip(),
    "shift": lambda v2, size, black: v2.RandomCrop(size, padding=4, fill=black),
    "crop": lambda v2, size, black: v2.RandomResizedCrop(size, antialias=True),
    "rotation": lambda v2, size, black: v2.RandomRotation(15, fill=black),
    "contrast": lambda v2, size, black: v2.Lambda(_contrast),
    "erasing": lambda v2, size, black: v2.RandomErasing(),
}
MIXING = {"mixup": "MixUp", "cutmix": "CutMix"}
AUGMENTATIONS = (*SINGLE, *MIXING)
"""``crop`` is of the whole image, and comes first; ``shift`` is a crop after padding by 4 (CIFAR); of ``mixup`` and ``cutmix``
together each batch gets one or the other."""


@dataclass(frozen=True)
class AugmentedImages(Dataset[Any]):
    """(image, label) samples, the images augmented anew every time.

    Attributes:
        samples: (image, label), the image normalised.
        names: of :data:`SINGLE`, in the order that they are done in.
        black: a black pixel after normalisation, per channel.
        size: height and width of the images that come out.
    """

    samples: Any
    names: Sequence[str]
    black: Sequence[float]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        before = WHOLE.set("crop" in self.names)
        try:
            image, label = self.samples[number]
        finally:
            WHOLE.reset(before)
        v2 = import_torchvision("transforms.v2", "augment")
        for name in self.names:
            image = SINGLE[name](v2, self.size, list(self.black))(image)
        return image, label


def augmented(
    samples: Any,
    collate: Callable[..., Any] | None,
    names: Sequence[str],
    num_classes: int,
    black: Sequence[float],
) -> tuple[Any, Callable[..., Any] | None]:
    """The samples and their collate function, augmentations applied: to one image each, or mixing those of a batch.

    ``black`` is a black pixel after normalisation, per channel.

    Raises:
        ArgumentError: samples that are no (image, label).
    """
    if not names:
        return samples, collate
    first = samples[0]
    if not isinstance(first, tuple) or getattr(first[0], "dim", lambda: 0)() != 3:
        raise ArgumentError(f"augment = {list(names)} is for images, and these samples are not; leave it out")
    single = sorted((name for name in names if name in SINGLE), key="crop".__ne__)  # others need images of one size
    images = AugmentedImages(samples, single, black, tuple(first[0].shape[-2:]))
    mixing = [name for name in names if name in MIXING]
    if not mixing:
        return images, collate
    v2 = import_torchvision("transforms.v2", "augment")
    mix = v2.RandomChoice([getattr(v2, MIXING[name])(num_classes=num_classes) for name in mixing])
    return images, partial(_mixed, mix)


def _mixed(mix: Callable[..., Any], batch: Any) -> Any:
    return mix(*default_collate(batch))
