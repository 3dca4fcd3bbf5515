"""Image files are decoded by several processes where a GPU waits for them, and come out the same."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import exitkit
from exitkit.cli.data.loading import load_data
from exitkit.cli.data.split import Split
from exitkit.cli.recipes.recipe import Recipe
from exitkit.cli.recipes.training import loaders

PREPROCESSING = exitkit.ImagePreprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    pytest.importorskip("torchvision")
    from PIL import Image

    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{number}.png")
    monkeypatch.setattr(exitkit.ImagePreprocessing, "of", lambda model: PREPROCESSING)
    return load_data(str(tmp_path), torch.nn.Identity())


def batches_of(split: Split, augment: list[str]) -> list[tuple[Tensor, Tensor]]:
    recipe = Recipe("m", "d", exits={}, trainer={}, augment=augment, batch_size=8)
    train, _, test = loaders(recipe, split, 2, seed=0)
    torch.manual_seed(0)
    return [*train, *test]


def equal(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = [pair for one, other in zip(some, others, strict=True) for pair in zip(one, other, strict=True)]
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_processes_change_no_sample(split: Split) -> None:
    assert split.workers == 0 or torch.cuda.is_available()
    assert equal(batches_of(replace(split, workers=0), []), batches_of(replace(split, workers=2), []))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_augmentation_in_processes_follows_from_the_seed(split: Split) -> None:
    names = ["crop", "flip", "mixup"]
    with_two = replace(split, workers=2)
    assert equal(batches_of(with_two, names), batches_of(with_two, names))
    images = torch.cat([pixels for pixels, _ in batches_of(with_two, ["crop"])[:3]])
    assert len(images.unique(dim=0)) == 24  # the two processes do not draw the same


def test_a_gpu_has_several(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    files = load_data(str(tmp_path), torch.nn.Identity())
    np.savez(tmp_path / "x.npz", images=np.zeros((10, 16, 16, 3), np.uint8), labels=np.arange(10) % 2)
    assert files.workers >= 1
    assert load_data(str(tmp_path / "x.npz"), torch.nn.Identity()).workers == 0
    recipe = Recipe("m", "d", exits={}, trainer={}, augment=["crop", "mixup"], validation=0.25, batch_size=8)
    every = loaders(recipe, files, 2, seed=0)
    assert [one.num_workers for one in every if one is not None] == [files.workers] * 3
    for one in every:  # where processes are spawned, these are sent to them
        assert one is not None
        pickle.dumps((one.dataset, one.collate_fn))
