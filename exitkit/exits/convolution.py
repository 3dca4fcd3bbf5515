"""From maps to a vector: a convolution of some kind, or none, then SDN pooling."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from exitkit.common.errors import ArgumentError
from exitkit.exits.pooling import SDNPool, pooled_size

Convolution = Literal["conv", "separable", "strided"]


def map_body(
    shape: tuple[int, ...], channels_last: bool, image_side: int | None, convolution: Convolution | None
) -> tuple[nn.Sequential, int]:
    """The layers from maps to a vector, and its width.

    ``"conv"`` is a 3 × 3 convolution and ReLU (Zero Time Waste, appendix A.1), ``"separable"`` the same as a depthwise
    3 × 3 and a 1 × 1 convolution, ``"strided"`` ReLU and a 3 × 3 convolution of stride 2 without padding to half the
    channels (Zero Time Waste's later code).

    Raises:
        ExitkitError: a strided convolution on maps smaller than 3 × 3.
    """
    channels, height, width = (shape[2], *shape[:2]) if channels_last else shape
    layers: list[nn.Module] = [_ChannelsFirst()] if channels_last else []
    if convolution == "strided":
        if min(height, width) < 3:
            raise ArgumentError(
                f"head='strided' needs maps of at least 3 × 3, but this boundary's are {height} × {width}; use head='conv'"
            )
        out = max(1, channels // 2)
        layers += [nn.ReLU(), nn.Conv2d(channels, out, 3, stride=2)]
        channels, height, width = out, (height - 1) // 2, (width - 1) // 2
    elif convolution is not None:
        stride, out = conv_geometry(channels, height, width, image_side)
        if convolution == "conv":
            layers.append(nn.Conv2d(channels, out, 3, stride=stride, padding=1))
        else:
            layers.append(nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels))
            layers.append(nn.Conv2d(channels, out, 1))
        layers.append(nn.ReLU())
        channels, height, width = out, math.ceil(height / stride), math.ceil(width / stride)
    layers += [SDNPool(), nn.Flatten()]
    return nn.Sequential(*layers), channels * math.prod(pooled_size(height, width))


def conv_geometry(channels: int, height: int, width: int, image_side: int | None) -> tuple[int, int]:
    """Stride and output channels of the IC's convolution (Zero Time Waste, appendix A.1).

    CIFAR-sized input (side up to 32): stride 1 and as many channels as come in. Larger input: stride 2 where the map
    is larger than 8 × 8. ImageNet-sized input (side above 64): also a quarter of the channels.
    """
    side = image_side or 0
    stride = 2 if side > 32 and min(height, width) > 8 else 1
    return stride, max(1, channels // 4) if side > 64 else channels


class _ChannelsFirst(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return torch.permute(maps, (0, 3, 1, 2))
