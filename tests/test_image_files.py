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
from exitkit.cli import main
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_training_image_is_named_with_what_to_do(
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    """In one line, in whatever process it was read."""
    damaged = tmp_path / "train" / "cat" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    monkeypatch.setattr("sys.argv", ["exitkit"])
    monkeypatch.setattr("exitkit.cli.app.app", lambda: batches_of(replace(split, workers=workers), []))
    with pytest.raises(SystemExit, match="2"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"exitkit: '{damaged}' cannot be read as an image: ")
    assert line.endswith("; replace the file, or remove it from the data set")


def test_a_damaged_test_image_is_named_before_training(split: Split, tmp_path: Path) -> None:
    (tmp_path / "val" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(exitkit.ExitkitError, match=r"1\.png' cannot be read.*; replace the file, or remove it"):
        load_data(str(tmp_path), torch.nn.Identity())
