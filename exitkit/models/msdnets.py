"""MSDNets: Huang et al. 2018, "Multi-Scale Dense Networks for Resource Efficient Image Classification"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from exitkit.common.checks import Count, check
from exitkit.common.errors import ArgumentError


class Stem(nn.Module):
    """Images (B, 3, H, W) to one tensor per scale, finest first, each at half the resolution of the one before it.

    The finest has the images' resolution; with ``quarter`` a quarter of it, by a 7×7 convolution and max pooling.
    """

    def __init__(self, widths: Sequence[int], quarter: bool = False) -> None:
        super().__init__()
        first = _conv(3, widths[0], 3)
        if quarter:
            convolution = nn.Conv2d(3, widths[0], 7, stride=2, padding=3)
            first = nn.Sequential(convolution, nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        self.scales = nn.ModuleList([first, *(_conv(a, b, 3, stride=2) for a, b in pairwise(widths))])

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = []
        for conv in self.scales:
            x = conv(x)
            scales.append(x)
        return scales


class Scale(nn.Module):
    """One scale within a layer: keeps its channels and adds new ones, half of them from the next finer scale if any.

    Args:
        widths: channels of the scales read, the finer one (if any) first, the scale itself last.
        bottlenecks: for each of them, the channels of its 1×1 bottleneck as a multiple of what it makes.
        new: channels added.
        reduced: channels left by a 1×1 convolution at the end; None for no such convolution.
    """

    def __init__(self, widths: Sequence[int], bottlenecks: Sequence[int], new: int, reduced: int | None) -> None:
        super().__init__()
        each = new // len(widths)
        self.convs = nn.ModuleList()
        for width, bottleneck, stride in zip(widths, bottlenecks, (2, 1)[-len(widths) :], strict=True):
            inner = min(width, bottleneck * each)
            self.convs.append(nn.Sequential(_conv(width, inner, 1), _conv(inner, each, 3, stride)))
        self.reduce = nn.Identity() if reduced is None else _conv(widths[-1] + new, reduced, 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        new = (conv(x) for conv, x in zip(self.convs, inputs, strict=True))
        maps: Tensor = self.reduce(torch.cat([inputs[-1], *new], 1))
        return maps


class Layer(nn.Module):
    """A column of the network: a list of scales, finest first, to the same scales grown.

    With ``reduces`` the finest scale is read by its neighbour and dropped, and the others' channels are halved.
    """

    def __init__(
        self, channels: int, growth: int, factors: Sequence[int], bottlenecks: Sequence[int], reduces: bool
    ) -> None:
        super().__init__()
        self.channels = (channels + growth) // (2 if reduces else 1)
        self.scales = nn.ModuleList()
        for i in range(1 if reduces else 0, len(factors)):
            read = slice(max(i - 1, 0), i + 1)
            widths = [channels * factor for factor in factors[read]]
            reduced = self.channels * factors[i] if reduces else None
            self.scales.append(Scale(widths, bottlenecks[read], growth * factors[i], reduced))

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        first = len(scales) - len(self.scales)
        return [scale(*scales[max(i - 1, 0) : i + 1]) for i, scale in enumerate(self.scales, start=first)]


class MSDNet(nn.Module):
    """Images (B, 3, H, W) to logits; ``layers[i]`` takes and returns one tensor per scale. See :func:`msdnet`."""

    def __init__(
        self,
        num_classes: int,
        layers: int,
        growth: int,
        channels: int,
        growth_factors: Sequence[int],
        bottleneck_factors: Sequence[int],
        image_size: int = 32,
    ) -> None:
        super().__init__()
        _check(num_classes, layers, growth, channels, growth_factors, bottleneck_factors)
        self.image_size = image_size
        large = image_size > 32
        span = math.ceil(layers / len(growth_factors))
        self.stem = Stem([channels * factor for factor in growth_factors], quarter=large)
        self.layers = nn.ModuleList()
        dropped = 0
        for index in range(layers):
            reduces = index > 0 and index % span == 0
            layer = Layer(channels, growth, growth_factors[dropped:], bottleneck_factors[dropped:], reduces)
            self.layers.append(layer)
            dropped += reduces
            channels = layer.channels
        read = channels * growth_factors[-1]
        width = read if large else 128
        self.classifier = nn.Sequential(
            _conv(read, width, 3, stride=2),
            _conv(width, width, 3, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        scales = self.stem(x)
        for layer in self.layers:
            scales = layer(scales)
        logits: Tensor = self.classifier(scales[-1])
        return logits


def msdnet(
    num_classes: int = 10,
    layers: int = 24,
    growth: int = 6,
    channels: int = 16,
    growth_factors: Sequence[int] = (1, 2, 4),
    bottleneck_factors: Sequence[int] = (1, 2, 4),
) -> MSDNet:
    """The CIFAR MSDNet as a backbone with its last classifier alone; the earlier ones come from ``attach``.

    With S scales, after each Sth of the layers the next one drops the finest scale and halves the channels of the others
    (the paper's network reduction). The published code counts the layers as ``base + (nBlocks - 1) * step``, without the
    stem. The paper's exits follow every second layer from the 4th: ``at=[f"layers.{i}" for i in range(3, 23, 2)]`` with
    ``head="msdnet"``, and the backbone's own after the 24th.

    Args:
        num_classes: outputs.
        layers: depth; 24 in the paper's anytime experiments.
        growth: channels that a layer adds to the finest scale.
        channels: channels of the stem at the finest scale.
        growth_factors: per scale, finest first: the multiple of ``growth`` and of ``channels`` that it has.
        bottleneck_factors: per scale: the channels of a 1×1 bottleneck that reads it, as a multiple of what it makes.

    Raises:
        ExitkitError: numbers below 1, factors that do not fit, or layers that do not fit the number of scales.
    """
    return MSDNet(num_classes, layers, growth, channels, growth_factors, bottleneck_factors)


def imagenet_msdnet(num_classes: int = 1000, layers: int = 38) -> MSDNet:
    """The ImageNet MSDNet of Phuong and Lampert 2019 (section 4): 4 scales, 38 layers, images of 224 × 224.

    Its five exits follow every seventh layer from the 10th: ``at=[f"layers.{i}" for i in (9, 16, 23, 30)]`` with
    ``head="msdnet(width='same')"``, and the backbone's own after the 38th. Growth and bottlenecks are those of the published
    code (growth 16, stem of 32 channels, factors 1, 2, 4, 4).

    Args:
        num_classes: outputs.
        layers: depth.

    Raises:
        ExitkitError: numbers below 1, or layers that do not fit the four scales.
    """
    return MSDNet(num_classes, layers, 16, 32, (1, 2, 4, 4), (1, 2, 4, 4), image_size=224)


def _conv(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _check(
    num_classes: int, layers: int, growth: int, channels: int, factors: Sequence[int], bottlenecks: Sequence[int]
) -> None:
    numbers = {"num_classes": num_classes, "layers": layers, "growth": growth, "channels": channels}
    numbers |= {f"growth_factors[{i}]": factor for i, factor in enumerate(factors)}
    numbers |= {f"bottleneck_factors[{i}]": factor for i, factor in enumerate(bottlenecks)}
    for name, number in numbers.items():
        check(name, number, Count)
    if not factors or len(factors) != len(bottlenecks):
        raise ArgumentError(
            f"growth_factors={factors!r} and bottleneck_factors={bottlenecks!r}: give one number per scale in each"
        )
    if any(growth * factor % 2 for factor in factors[1:]):
        raise ArgumentError(
            f"growth={growth!r} with growth_factors={factors!r} gives a coarser scale an odd number of new channels, and "
            "half of them come from the finer scale; use an even growth"
        )
    # Otherwise the last layer would make finer scales that nothing reads.
    if (layers - 1) // math.ceil(layers / len(factors)) < len(factors) - 1:
        raise ArgumentError(
            f"layers={layers!r} leaves more than the coarsest of {len(factors)} scales at the end; use a multiple of "
            f"{len(factors)}"
        )
