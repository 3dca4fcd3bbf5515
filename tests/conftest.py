"""Shared fixtures: small real backbones, tiny data, and the real CIFAR-10 data and weights where they are present."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from tests import durations
from tests.toy import TinyNet

DATA = Path(os.environ.get("EXITKIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real CIFAR-10 images and pretrained weights; tests that need it are skipped without it."""
    if not (DATA / "weights" / "cifar10_resnet20.safetensors").exists():
        pytest.skip(f"no real data in {DATA}; set EXITKIT_DATA to the folder that holds cifar10/ and weights/")
    return DATA


@pytest.fixture
def tiny_net() -> TinyNet:
    return TinyNet()


@pytest.fixture
def tiny_ee(tiny_net: TinyNet) -> exitkit.MultiExitModel:
    """ZTW on the tiny net: exits after blocks.0, blocks.1 and blocks.2."""
    return exitkit.attach(tiny_net, torch.randn(2, 1, 8, 8), every=1, method="ztw")


@pytest.fixture
def loader() -> Callable[..., DataLoader[tuple[Tensor, ...]]]:
    """``loader(n, batch)``: n separable 1×8×8 images of three classes."""

    def make(
        samples: int = 96, batch: int = 16, shuffle: bool = False, seed: int = 0
    ) -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(samples) % 3
        images = torch.randn(samples, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1) - 1
        return DataLoader(TensorDataset(images, labels), batch_size=batch, shuffle=shuffle)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what took long when it was measured."""
    measured = durations.read()
    for item in items:
        module, _, name = item.nodeid.partition("::")
        mark = durations.mark_of(f"{module.removesuffix('.py').replace('/', '.')}::{name.partition('[')[0]}", measured)
        if mark is not None:
            item.add_marker(mark)


def pytest_collection_finish() -> None:
    """What is imported by now stays: every fit collects garbage, and would look at all of it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
