"""The networks for CIFAR and Tiny ImageNet of Kaya et al. 2019, "Shallow-Deep Networks", which Zero Time Waste takes over."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from exitkit.common.checks import Count, check

Side = Literal[32, 64]

_VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_POOLED = (1, 3, 6, 9, 12)
_MOBILE = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
_HALVED = (1, 3, 5, 11)


class Chain(nn.Module):
    """Images (B, 3, H, W) to logits: a stem, blocks one after another, a classifier."""

    def __init__(self, image_size: int, stem: nn.Module, blocks: Iterator[nn.Module], classifier: nn.Module) -> None:
        super().__init__()
        self.image_size = image_size
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.classifier = classifier
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(x)))
        return logits


class WideBlock(nn.Module):
    """Normalisation, ReLU and a 3 × 3 convolution, twice, dropout between them; a 1 × 1 shortcut where shapes change."""

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels, 3, padding=1),
            nn.Dropout(dropout),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1),
        )
        same = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.layers(x) + self.shortcut(x)
        return added


def cifar_vgg(num_classes: int = 10, image_size: Side = 32) -> Chain:
    """VGG-16 with batch normalisation: 13 convolutions and three linear layers, as Shallow-Deep Networks has it.

    Exits after every convolution: ``every=1``. The published ones are ``at=[1, 3, 5, 6, 8, 9]``.

    Args:
        num_classes: outputs.
        image_size: side of the images; those of 64 (Tiny ImageNet) take wider linear layers.

    Raises:
        ArgumentError: a number below 1, or another size.
    """
    _check(num_classes, image_size)
    first, second = (512, 512) if image_size == 32 else (2048, 1024)
    classifier = nn.Sequential(
        nn.Flatten(),
        nn.Linear(512 * (image_size // 32) ** 2, first),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(first, second),
        nn.Dropout(0.5),
        nn.Linear(second, num_classes),
    )
    blocks = (
        nn.Sequential(*_convolution(a, b, bias=True), *([nn.MaxPool2d(2)] if index in _POOLED else []))
        for index, (a, b) in enumerate(pairwise((3, *_VGG)))
    )
    return _with_small_linears(Chain(image_size, nn.Identity(), blocks, classifier))


def cifar_mobilenet(num_classes: int = 10, image_size: Side = 32) -> Chain:
    """MobileNetV1 with a stem of stride 1: 13 blocks of a depthwise and a 1 × 1 convolution.

    Exits after every block: ``every=1``. The published ones are ``at=[2, 4, 6, 8, 11]`` (the code of Shallow-Deep Networks).

    Args:
        num_classes: outputs.
        image_size: side of the images.

    Raises:
        ArgumentError: a number below 1, or another size.
    """
    _check(num_classes, image_size)
    blocks = (
        nn.Sequential(
            *_convolution(a, a, stride=2 if index in _HALVED else 1, groups=a), *_convolution(a, b, kernel=1)
        )
        for index, (a, b) in enumerate(pairwise((32, *_MOBILE)))
    )
    stem = nn.Sequential(*_convolution(3, 32))
    return Chain(image_size, stem, blocks, nn.Sequential(*_averaged(), nn.Linear(1024, num_classes)))


def cifar_wide_resnet(
    num_classes: int = 10, blocks: int = 5, widen: int = 4, dropout: float = 0.3, image_size: Side = 32
) -> Chain:
    """Wide ResNet (Zagoruyko and Komodakis 2016): three stages of as many blocks, by default WRN-32-4.

    Exits after every block: ``every=1``. The published ones are ``at=[2, 4, 6, 8, 10, 12]``.

    Args:
        num_classes: outputs.
        blocks: in each stage; the network is called 6 · blocks + 2 layers deep.
        widen: channels of the stages, as a multiple of 16, 32 and 64.
        dropout: between a block's convolutions.
        image_size: side of the images; those of 64 are halved by the stem.

    Raises:
        ArgumentError: a number below 1, or another size.
    """
    _check(num_classes, image_size)
    check("blocks", blocks, Count)
    check("widen", widen, Count)
    widths = [16 * widen * 2**stage for stage in range(3) for _ in range(blocks)]
    halved = [stage > 0 and index == 0 for stage in range(3) for index in range(blocks)]
    made = (
        WideBlock(a, b, 2 if half else 1, dropout)
        for (a, b), half in zip(pairwise((16, *widths)), halved, strict=True)
    )
    stem = nn.Conv2d(3, 16, 3, stride=image_size // 32, padding=1)
    classifier = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), *_averaged(), nn.Linear(widths[-1], num_classes))
    return Chain(image_size, stem, made, classifier)


def _convolution(
    channels_in: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]


def _averaged() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _with_small_linears(model: Chain) -> Chain:
    """Linear weights of deviation 0.01, as VGG begins in the published code."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
    return model


def _check(num_classes: int, image_size: int) -> None:
    check("num_classes", num_classes, Count)
    check("image_size", image_size, Side)
