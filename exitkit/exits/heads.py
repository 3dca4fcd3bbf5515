"""Heads: the internal classifiers (ICs), chosen by the shape of the feature they read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from exitkit.errors import ExitkitError
from exitkit.exits.links import CascadeLink
from exitkit.exits.pooling import ReadoutKind, SDNPool, TokenPool, pooled_size

_HEADS = (
    "'auto', 'conv' (maps only), '1L' (pooling and one linear layer), '2L-1024' (one hidden layer of 1024), 'tail' (a copy "
    "of the backbone's own read-out)"
)


@dataclass(frozen=True)
class HeadSpec:
    """A parsed ``head=``.

    Attributes:
        conv: convolutional or not; None: by the feature's shape.
        hidden: width of a hidden layer.
        tail: the backbone's own read-out, copied.
    """

    conv: bool | None = None
    hidden: int | None = None
    tail: bool = False

    @classmethod
    def parse(cls, head: str) -> HeadSpec:
        if head in ("auto", "conv", "1L", "tail"):
            return cls({"auto": None, "conv": True}.get(head, False), tail=head == "tail")
        match = re.fullmatch(r"2L-([1-9]\d*)", head) if isinstance(head, str) else None
        if match is None:
            raise ExitkitError(f"head={head!r} is unknown; allowed are {_HEADS}")
        return cls(False, int(match[1]))


@dataclass(frozen=True)
class Feature:
    """What a head reads: shape without batch, layout, the token read-out, and the side of the model's input image."""

    shape: tuple[int, ...]
    layout: str
    readout: ReadoutKind = "mean"
    skip: int = 0
    image_side: int | None = None


class HeadOutput(NamedTuple):
    """What a head says, and what it leaves behind.

    Attributes:
        logits: (B, C).
        carried: (B, K), one row per sample: what the head of the next exit reads. K is the classifier's ``carries``.
        state: (B, D), where heads imitate each other's states.
        imagined: (J, B, D), this head's imitations of the states of the J exits still to come.
    """

    logits: Tensor
    carried: Tensor
    state: Tensor | None = None
    imagined: Tensor | None = None


class InternalClassifier(nn.Module):
    """Body (feature → vector) → cascade link, if any → linear layer: logits (B, C), which are carried on."""

    def __init__(self, body: nn.Module, width: int, num_classes: int, cascade: bool) -> None:
        super().__init__()
        self.body = body
        self.link = CascadeLink(num_classes) if cascade else None
        self.linear = nn.Linear(width + (num_classes if cascade else 0), num_classes)
        self.carries = num_classes

    def forward(self, feature: Tensor, previous: Tensor | None = None, inputs: Sequence[Tensor | None] = ()) -> Tensor:
        """Logits from a feature, the logits of the exit before, and those inputs of the model that the body reads."""
        vector: Tensor = self.body(feature, *inputs)
        if self.link is not None:
            if previous is None:
                raise ExitkitError(
                    "this exit has a cascade link and needs previous=, the logits of the exit before it"
                )
            vector = self.link(vector, previous)
        logits: Tensor = self.linear(vector)
        return logits

    def step(self, feature: Tensor, carried: Tensor | None, inputs: Sequence[Tensor | None]) -> HeadOutput:
        """The logits, and what the next exit reads: these logits."""
        logits = self(feature, carried, inputs)
        return HeadOutput(logits, logits)


class TokenBody(nn.Module):
    """Token read-out, then a hidden layer where one is asked for."""

    def __init__(self, pool: TokenPool, hidden: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.hidden = hidden

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        vector: Tensor = self.hidden(self.pool(tokens, mask))
        return vector


def make_head(feature: Feature, num_classes: int, spec: HeadSpec, cascade: bool) -> InternalClassifier:
    """The internal classifier for a feature of this shape.

    Raises:
        ExitkitError: a convolutional head for a feature that is no map.
    """
    is_map = feature.layout in ("channels_first", "channels_last")
    if spec.conv and not is_map:
        raise ExitkitError(f"head='conv' needs feature maps, but this boundary's is {feature.layout} {feature.shape}")
    if is_map:
        body, width = _map_body(feature, convolve=spec.conv is not False)
    elif feature.layout in ("tokens", "sequence"):
        sequence = feature.layout == "sequence"
        hidden, width = _hidden(feature.shape[0 if sequence else -1], spec.hidden)
        pool = TokenPool(feature.readout, feature.skip, channels_first=sequence)
        return InternalClassifier(TokenBody(pool, hidden), width, num_classes, cascade)
    else:
        body, width = nn.Sequential(nn.Flatten()), math.prod(feature.shape)
    hidden, width = _hidden(width, spec.hidden)
    return InternalClassifier(nn.Sequential(*body, hidden), width, num_classes, cascade)


def conv_geometry(channels: int, height: int, width: int, image_side: int | None) -> tuple[int, int]:
    """Stride and output channels of the IC's convolution (Zero Time Waste, appendix A.1).

    CIFAR-sized input (side up to 32): stride 1 and as many channels as come in. Larger input: stride 2 where the map
    is larger than 8 × 8. ImageNet-sized input (side above 64): also a quarter of the channels.
    """
    side = image_side or 0
    stride = 2 if side > 32 and min(height, width) > 8 else 1
    return stride, max(1, channels // 4) if side > 64 else channels


def _map_body(feature: Feature, convolve: bool) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = []
    if feature.layout == "channels_last":
        height, width, channels = feature.shape
        layers.append(_ChannelsFirst())
    else:
        channels, height, width = feature.shape
    if convolve:
        stride, out = conv_geometry(channels, height, width, feature.image_side)
        layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.ReLU()]
        channels, height, width = out, math.ceil(height / stride), math.ceil(width / stride)
    layers += [SDNPool(), nn.Flatten()]
    return nn.Sequential(*layers), channels * math.prod(pooled_size(height, width))


def _hidden(width: int, hidden: int | None) -> tuple[nn.Module, int]:
    if hidden is None:
        return nn.Identity(), width
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU()), hidden


class _ChannelsFirst(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return torch.permute(maps, (0, 3, 1, 2))
