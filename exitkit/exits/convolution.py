"""Heads that convolve maps: functions from a feature to a module that makes a vector of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from exitkit.common.checks import Bounds, Count, check
from exitkit.common.errors import ArgumentError
from exitkit.exits.feature import Feature
from exitkit.exits.pooling import SDNPool

Width = int | Literal["same"] | None


def conv(feature: Feature, stride: int | None = None, width: Width = None) -> nn.Sequential:
    """A 3 × 3 convolution, ReLU and SDN pooling (Zero Time Waste, appendix A.1): maps (B, C, H, W) → (B, D).

    Args:
        feature: maps.
        stride: of the convolution; by default the paper's: 1 for images of a side up to 32, for larger ones 2 where the maps
            are larger than 8 × 8.
        width: output channels, ``"same"`` for as many as come in; by default the paper's: the same, and a quarter of them
            for images of a side above 64. Its head for policies is ``conv(stride=4, width="same")`` (appendix A.2).

    Raises:
        ArgumentError: a feature that is not a map, or a number below 1.
    """
    channels, stride, out = _geometry("conv", feature, stride, width)
    return _to_vector(feature, nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.ReLU())


def separable(feature: Feature, stride: int | None = None, width: Width = None) -> nn.Sequential:
    """:func:`conv` with a depthwise 3 × 3 and a 1 × 1 convolution in place of the one."""
    channels, stride, out = _geometry("separable", feature, stride, width)
    depthwise = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels)
    return _to_vector(feature, depthwise, nn.Conv2d(channels, out, 1), nn.ReLU())


def strided(feature: Feature) -> nn.Sequential:
    """ReLU, a 3 × 3 convolution of stride 2 without padding to half the channels, SDN pooling (Zero Time Waste's later code).

    Raises:
        ArgumentError: a feature that is not a map of at least 3 × 3.
    """
    channels, height, width = _maps("strided", feature)
    if min(height, width) < 3:
        raise ArgumentError(
            f"head='strided' needs maps of at least 3 × 3, but this boundary's are {height} × {width}; use head='conv'"
        )
    return _to_vector(feature, nn.ReLU(), nn.Conv2d(channels, max(1, channels // 2), 3, stride=2))


def msdnet(feature: Feature, width: Width = 128) -> nn.Sequential:
    """The classifier of MSDNet's exits but for its linear layer (Huang et al. 2018, section 4): maps → (B, width).

    Two 3 × 3 convolutions of stride 2 with batch normalisation and ReLU, then the mean over what is left, which on CIFAR is
    the published 2 × 2 average pooling. The ImageNet network has as many channels as come in: ``msdnet(width="same")``.

    Raises:
        ArgumentError: a feature that is not a map, or a number below 1.
    """
    channels, _, _ = _maps("msdnet", feature)
    out = _width("msdnet", width, channels) or channels
    layers = [
        (nn.Conv2d(before, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        for before in (channels, out)
    ]
    return nn.Sequential(
        *as_maps(feature),
        *(layer for group in layers for layer in group),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    "conv": conv,
    "separable": separable,
    "strided": strided,
    "msdnet": msdnet,
}
"""Heads for maps that have a name."""


def as_maps(feature: Feature) -> list[nn.Module]:
    """What makes the maps (B, C, H, W) that heads read of a feature: the mean over time or depth, then channels first."""
    last = feature.layout == "channels_last"
    mean: list[nn.Module] = [_Mean(1 if last else 2)] if feature.is_volume else []
    return [*mean, _ChannelsFirst()] if last else mean


def conv_geometry(channels: int, height: int, width: int, image_side: int | None) -> tuple[int, int]:
    """Stride and output channels of the IC's convolution (Zero Time Waste, appendix A.1).

    CIFAR-sized input (side up to 32): stride 1 and as many channels as come in. Larger input: stride 2 where the map
    is larger than 8 × 8. ImageNet-sized input (side above 64): also a quarter of the channels.
    """
    side = image_side or 0
    stride = 2 if side > 32 and min(height, width) > 8 else 1
    return stride, max(1, channels // 4) if side > 64 else channels


def _geometry(name: str, feature: Feature, stride: int | None, width: Width) -> tuple[int, int, int]:
    """Channels in, stride, and channels out."""
    channels, height, breadth = _maps(name, feature)
    check(f"head={name!r}: stride", stride, Annotated[int, Bounds(least=1)] | None)
    usual_stride, usual_width = conv_geometry(channels, height, breadth, feature.image_side)
    return channels, stride or usual_stride, _width(name, width, channels) or usual_width


def _width(name: str, width: Width, channels: int) -> int | None:
    check(f"head={name!r}: width", width, Count | Literal["same"] | None)
    return channels if width == "same" else width


def _maps(name: str, feature: Feature) -> tuple[int, int, int]:
    if not feature.is_map:
        raise ArgumentError(
            f"head={name!r} needs feature maps, but this boundary's is {feature.layout} {feature.shape}; use head='auto'"
        )
    return feature.maps


def _to_vector(feature: Feature, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*as_maps(feature), *layers, SDNPool(), nn.Flatten())


class _Mean(nn.Module):
    """Over one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, volume: Tensor) -> Tensor:
        return volume.mean(self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class _ChannelsFirst(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return torch.permute(maps, (0, 3, 1, 2))
