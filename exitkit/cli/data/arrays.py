"""Images of an ``.npz``: uint8 in memory, and normalised one at a time, as they are read."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from exitkit.cli.data.split import Split, check_indices, hold_out
from exitkit.cli.data.unpacking import check_inflation
from exitkit.common.errors import ArgumentError, FileError
from exitkit.multi_exit.preprocessing import ImagePreprocessing, default_statistics


@dataclass(frozen=True, eq=False)
class PackedImages(Dataset[Any]):
    """(image, label) samples, of which no more than the pixels' bytes is held: enlarged for a model they may not fit.

    Attributes:
        images: (N, H, W) or (N, H, W, C) uint8.
        labels: (N,) int64, or float32 where they are numbers to predict.
        prepared: makes of images (n, ...) what the model takes, (n, C, H, W) float32.
    """

    images: NDArray[np.uint8]
    labels: Tensor
    prepared: Callable[[NDArray[np.uint8]], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.prepared(self.images[number : number + 1])[0], self.labels[number]


def image_arrays(
    path: Path, model: nn.Module, test: str | None, numbers: bool, unlabelled: bool, option: str
) -> Split:
    """``images``/``labels``, or MedMNIST's ``train_images``, ``train_labels``, ``test_images``, ``test_labels``."""
    arrays, given = read_npz(path), f"--data {str(path)!r}"
    declared = ImagePreprocessing.of(model)
    size, mean, std = (None,) * 3 if declared is None else (declared.size, declared.mean, declared.std)

    def samples(source: dict[str, Any], prefix: str, origin: str) -> PackedImages:
        names = f"{prefix}images", f"{prefix}labels"
        if any(name not in source for name in names):
            raise ArgumentError(f"{origin} holds {str(sorted(source))[:200]}, but needs 'images' and 'labels'")
        images, labels = source[names[0]], np.asarray(source[names[1]]).reshape(-1)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels) or not len(images):
            raise ArgumentError(
                f"{origin} has images of dtype {images.dtype} and shape {images.shape} and {len(labels)} labels; "
                "expected uint8 (N, H, W) or (N, H, W, C), as many labels, and N > 0"
            )
        channels = 1 if images.ndim == 3 else images.shape[-1]
        if size is not None and channels not in (1, size[0]):
            first = images.shape[1] == size[0]
            remedy = "; the channels come first: images.transpose(0, 2, 3, 1) puts them last" if first else ""
            raise ArgumentError(f"{origin} has {channels} channels, but the model takes {size[0]}{remedy}")
        return PackedImages(
            images, _targets(labels, origin, numbers, unlabelled), partial(normalise, size=size, mean=mean, std=std)
        )

    if test is not None:
        parts = [samples(arrays, "", given), samples(read_npz(Path(test)), "", f"{option} {test!r}")]
    elif "train_images" in arrays:
        parts = [samples(arrays, "train_", given), samples(arrays, "test_", given)]
    else:
        parts = [samples(arrays, "", given)]
    train, held_out = parts if parts[1:] else hold_out(parts[0], str(path))
    shape = tuple(train[0][0].shape)
    centre, spread = default_statistics(shape[0])
    preprocessing = ImagePreprocessing(shape, tuple(mean or centre), tuple(std or spread), 1.0, "bilinear", "squash")
    classes = None if numbers else 1 + max(int(part.labels.max()) for part in parts)
    return Split(train, held_out, preprocessing=preprocessing, classes=classes)


def _targets(labels: NDArray[Any], origin: str, numbers: bool, unlabelled: bool) -> Tensor:
    """Class indices, -1 for none where samples may be ``unlabelled``, or ``numbers`` to predict."""
    if numbers:
        if not np.issubdtype(labels.dtype, np.number) or not np.isfinite(labels).all():
            raise ArgumentError(f"{origin} has labels of dtype {labels.dtype}; a regression needs finite numbers")
        return torch.as_tensor(labels.astype(np.float32))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ArgumentError(
            f"{origin} has labels of dtype {labels.dtype}; expected class indices from 0, or for numbers to predict a recipe "
            "with num_classes = 1"
        )
    check_indices(int(labels.min()), int(labels.max()), origin, unlabelled)
    return torch.as_tensor(labels.astype(np.int64))


def normalise(
    images: np.ndarray[Any, Any] | Tensor, size: Sequence[int] | None = None, mean: Any = None, std: Any = None
) -> Tensor:
    """uint8 images (N, H, W) or (N, H, W, C) → float (N, C, H, W): scaled to [0, 1], resized, normalised.

    ``size`` is (C, H, W) as the model takes it; grey images are repeated over its channels. The default mean and
    standard deviation are ImageNet's.
    """
    pixels = torch.as_tensor(images)
    pixels = pixels.unsqueeze(-1) if pixels.dim() == 3 else pixels
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    if size is not None:
        if pixels.shape[1] == 1 and size[0] > 1:
            pixels = pixels.expand(-1, size[0], -1, -1)
        if pixels.shape[2:] != tuple(size[1:]):
            pixels = F.interpolate(pixels, tuple(size[1:]), mode="bilinear", antialias=True)
    channels = pixels.shape[1]
    centre, spread = default_statistics(channels)
    return (pixels - torch.tensor(mean or centre).view(-1, 1, 1)) / torch.tensor(std or spread).view(-1, 1, 1)


def read_npz(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # numpy would take it for a pickle, and advise to trust it
        raise FileError(f"{str(path)!r} cannot be read as .npz: it is not a zip archive; write it with numpy.savez")
    try:
        check_inflation(path)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds on a damaged file
        raise FileError(
            f"{str(path)!r} cannot be read as .npz: {str(error)[:200]}; save arrays of numbers by numpy.savez"
        ) from error
