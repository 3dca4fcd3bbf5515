"""What ``risk.py`` measures on: outputs of exits on plain and on disturbed images, and splits of them."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit import ExitOutputs
from exitkit.cli.data.arrays import normalise
from exitkit.evaluation import content_hashes

MAX_DROP, CONFIDENCE = 0.01, 0.95
JPEG_QUALITY = 75
Loader = DataLoader[tuple[Tensor, ...]]


def splits(outputs: ExitOutputs, count: int, sizes: tuple[int, ...]) -> Iterator[tuple[ExitOutputs, ...]]:
    for seed in range(count):
        order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(seed))
        yield tuple(outputs[rows] for rows in order[: sum(sizes)].split(sizes))


def outputs_of(args: argparse.Namespace) -> tuple[ExitOutputs, ExitOutputs, Tensor]:
    """Outputs on the test images, plain and as JPEG, and hashes of the training images."""
    images, labels = load(args.data / "cifar10_train.npz", args.images)
    training = content_hashes(_loader(images, labels))
    paths = args.out / "clean.safetensors", args.out / "jpeg.safetensors"
    if not all(path.exists() for path in (*paths, args.out / "exits")):
        backbone = exitkit.models.cifar_resnet(args.depth, weights=args.weights)
        if args.exits is None:
            ee = _trained(backbone, _loader(images, labels, shuffle=True), args.epochs)
        else:
            ee = exitkit.MultiExitModel.from_pretrained(backbone, args.exits)
        ee.save_pretrained(args.out / "exits")
        tests, truth = load(args.data / "cifar10_test.npz", None)
        exitkit.collect(ee, _loader(tests, truth)).save(paths[0])
        exitkit.collect(ee, _loader(_as_jpeg(tests), truth)).save(paths[1])
    return ExitOutputs.load(paths[0]), ExitOutputs.load(paths[1]), training


def _trained(backbone: torch.nn.Module, batches: Loader, epochs: int) -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    ee = exitkit.attach(backbone, torch.zeros(2, 3, 32, 32), at_cost=[0.25, 0.5, 0.75], head="1L", method="sdn")
    exitkit.Trainer(ee, epochs=epochs, milestones=(epochs - 1,), lr=3e-3).fit(batches)
    return ee


def load(path: Path, limit: int | None) -> tuple[NDArray[np.uint8], Tensor]:
    with np.load(path) as arrays:
        return arrays["images"][:limit], torch.from_numpy(arrays["labels"][:limit].astype(np.int64))


def _loader(images: NDArray[np.uint8], labels: Tensor, shuffle: bool = False) -> Loader:
    return DataLoader(TensorDataset(normalise(images), labels), batch_size=128, shuffle=shuffle)


def _as_jpeg(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    def again(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return np.asarray(Image.open(buffer))

    return np.stack([again(image) for image in images])
