"""A small residual network, importable by name, and what several tests say about models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import exitkit
from exitkit.surgery.partition import Partition

# MACs of TinyNet on 1×8×8, by hand.
STEM = 8 * 8 * 9 * 1 * 8
BLOCK = 2 * 8 * 8 * 9 * 8 * 8
LINEAR = 8 * 3
TOTAL = STEM + 4 * BLOCK + LINEAR


class TinyNet(nn.Module):
    """Four residual blocks on 1×8×8 images, with BatchNorm and dropout, so that training mode would show."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(TinyBlock(8) for _ in range(4)))
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.dropout(self.blocks(self.stem(x)).mean((2, 3))))
        return out


class TinyBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.conv2(torch.relu(self.norm(self.conv1(x))))
        return added


def net() -> TinyNet:
    """As ``tests.toy:net`` on the command line."""
    return TinyNet()


def images(batch: int = 2, channels: int = 1, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))


def names(ee: exitkit.MultiExitModel) -> list[str]:
    return [boundary.name for boundary in ee.boundaries]


def staged(partition: Partition, *tensors: Tensor) -> list[Tensor]:
    """The features and the logits from stages joined again."""
    with torch.no_grad():
        return partition.run([t.clone() for t in tensors])


def all_equal(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def noisy(ee: exitkit.MultiExitModel) -> exitkit.MultiExitModel:
    """Larger random weights, so that exits disagree and samples leave everywhere."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ee.added_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return ee.eval()
