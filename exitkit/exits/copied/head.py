"""Heads that start from what the backbone knows: a copy of its own read-out after the last block."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from exitkit.common.errors import ArgumentError
from exitkit.exits.classifiers import InternalClassifier
from exitkit.exits.feature import Feature


class Adapter(nn.Module):
    """Maps (B, C, H, W) or volumes of one size and width made like others: average pooling, then a 1 × 1 convolution.

    It starts as an identity over the channels that both have, each output channel from one input channel.
    """

    def __init__(self, channels: int, out: int, size: Sequence[int], channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        volumes = len(size) == 3
        self.pool = (nn.AdaptiveAvgPool3d if volumes else nn.AdaptiveAvgPool2d)(tuple(size))
        self.convolution = (nn.Conv3d if volumes else nn.Conv2d)(channels, out, 1)
        with torch.no_grad():
            self.convolution.weight.zero_()[torch.arange(out), torch.arange(out) % channels] = 1
            self.convolution.bias.zero_()  # type: ignore[union-attr]

    def forward(self, maps: Tensor) -> Tensor:
        if self.channels_last:
            maps = maps.movedim(-1, 1)
        adapted: Tensor = self.convolution(self.pool(maps))
        return adapted.movedim(1, -1) if self.channels_last else adapted


class TailBody(nn.Module):
    """Adapter, where shapes differ, then the backbone's tail: feature and inputs → vector (B, D)."""

    def __init__(self, adapter: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.tail = tail

    def forward(self, feature: Tensor, *inputs: Tensor | None) -> Tensor:
        if any(tensor is None for tensor in inputs):
            raise ArgumentError(
                "head='tail' reads an input of the model (mask, token ids) that this call leaves out; pass all that "
                "example_inputs had"
            )
        (vector,) = self.tail(self.adapter(feature), *inputs)
        return vector  # type: ignore[no-any-return]


def tail_head(
    feature: Feature, target: Feature, body: nn.Module, linear: nn.Linear, cascade: bool
) -> InternalClassifier:
    """An internal classifier that is a copy of the backbone's tail, with its weights.

    Args:
        feature: what the head reads.
        target: what the tail was made for.
        body: the tail up to its last linear layer, returning a tuple of one vector (B, D).
        linear: that layer; the cascade link's columns beside it start at zero.
        cascade: whether the head has a cascade link.

    Raises:
        ExitkitError: the feature has another shape than the tail's, and is not a map, which an adapter could change.
    """
    own = copy.deepcopy(body)
    head = InternalClassifier(
        TailBody(_adapter(feature, target), own), linear.in_features, linear.out_features, cascade
    )
    with torch.no_grad():
        head.linear.weight.zero_()[:, : linear.in_features] = linear.weight
        head.linear.bias.copy_(linear.bias)
    return head.requires_grad_()


def _adapter(feature: Feature, target: Feature) -> nn.Module:
    if (feature.shape, feature.layout) == (target.shape, target.layout):
        return nn.Identity()
    if feature.layout != target.layout or not feature.is_map or len(feature.shape) != len(target.shape):
        raise ArgumentError(
            f"head='tail' is for features like the backbone's last, {target.layout} {target.shape}, not {feature.layout} "
            f"{feature.shape}; use head='auto', or at= with boundaries of that shape"
        )
    last = feature.layout == "channels_last"
    channels, *size = target.shape if not last else (target.shape[-1], *target.shape[:-1])
    return Adapter(feature.shape[-1 if last else 0], channels, size, last)
