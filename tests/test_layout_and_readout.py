"""What the dimensions of a feature mean, and how tokens become one vector."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from tests.toy import TinyNet, images


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 1)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(3))
        )
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(self.blocks(self.stem(x).permute(0, 2, 3, 1))).mean((1, 2)))
        return logits


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 4), (4, 6)])
def test_channels_first(tiny_net: TinyNet, height: int, width: int) -> None:
    ee = exitkit.attach(tiny_net, images(height=height, width=width))
    assert {(boundary.layout, boundary.shape) for boundary in ee.boundaries} == {
        ("channels_first", (8, height, width))
    }


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 4), (4, 6)])
def test_channels_last(height: int, width: int) -> None:
    ee = exitkit.attach(ChannelsLast(), images(height=height, width=width))
    assert {(boundary.layout, boundary.shape) for boundary in ee.boundaries} == {("channels_last", (height, width, 6))}


@pytest.mark.parametrize("last", ["blocks.3", "blocks.2"])
def test_channels_first_where_the_height_equals_the_channels(tiny_net: TinyNet, last: str) -> None:
    """Also after the last block, which only a mean over height and width follows."""
    ee = exitkit.attach(tiny_net, images(height=8, width=4), at=[last])
    assert ee.boundaries[0].layout == "channels_first"


def test_a_channels_last_exit_reads_what_a_channels_first_one_would() -> None:
    ee = exitkit.attach(ChannelsLast(), images(height=8, width=4), every=2, head="1L", method="sdn").eval()
    output = ee(images(3, height=8, width=4))
    head, maps = ee.classifiers[0], output.features[0].permute(0, 3, 1, 2)
    pooled = (F.adaptive_avg_pool2d(maps, 4) + F.adaptive_max_pool2d(maps, 4)) / 2
    assert torch.allclose(output.logits[0], head.linear(pooled.flatten(1)), atol=1e-6)


def test_vectors() -> None:
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 3))
    ee = exitkit.attach(model, torch.randn(2, 6))
    assert [(boundary.name, boundary.layout, boundary.shape) for boundary in ee.boundaries] == [
        ("1", "vector", (6,)),
        ("3", "vector", (6,)),
    ]


class Sequences(nn.Module):
    """A convolutional network over (B, C, T), as for audio and time series."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 1)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 6, 3, padding=1)) for _ in range(3))
        )
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.blocks(self.stem(x)).mean(2))
        return logits


def test_channels_of_a_sequence_are_not_taken_for_tokens() -> None:
    """The head must pool over time (20), never over the 6 channels."""
    ee = exitkit.attach(Sequences(), torch.randn(2, 2, 20))
    assert ee.classifiers[0].linear.in_features % 6 == 0


class TokenLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x)


class Tokens(nn.Module):
    """Residual token blocks and one of several read-outs; ``mask`` is (B, T)."""

    def __init__(self, readout: str) -> None:
        super().__init__()
        self.readout = readout
        self.embed = nn.Linear(4, 8)
        self.cls = nn.Parameter(torch.randn(1, 2 if readout == "skip two" else 1, 8))
        self.layers = nn.Sequential(*(TokenLayer() for _ in range(3)))
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        if self.readout in ("first", "first kept", "skip one", "skip two"):
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        logits: Tensor = self.linear(self.pool(self.norm(self.layers(x)), mask))
        return logits

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        match self.readout:
            case "first":
                return x[:, 0]
            case "first kept":
                return x[:, :1].flatten(1)
            case "skip one" | "skip two":
                return x[:, self.cls.shape[1] :].mean(1)
            case "pooled":
                return F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1)
            case "masked":
                assert mask is not None
                return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return x.mean(1)


@pytest.mark.parametrize(
    ("readout", "kind", "skip"),
    [
        ("first", "first", 0),
        ("first kept", "first", 0),
        ("mean", "mean", 0),
        ("pooled", "mean", 0),
        ("skip one", "mean", 1),
        ("skip two", "mean", 2),
    ],
)
def test_the_backbones_own_readout(readout: str, kind: str, skip: int) -> None:
    ee = exitkit.attach(Tokens(readout), torch.randn(2, 5, 4))
    assert {(head.body.pool.kind, head.body.pool.skip) for head in ee.classifiers} == {(kind, skip)}


def test_masked_mean_is_recognised_with_its_mask() -> None:
    ee = exitkit.attach(Tokens("masked"), {"x": torch.randn(2, 5, 4), "mask": torch.ones(2, 5)})
    assert {head.body.pool.kind for head in ee.classifiers} == {"masked_mean"}
    assert [spec.inputs for spec in ee.specs] == [("mask",), ("mask",)]


def test_a_mask_given_by_position_is_found() -> None:
    ee = exitkit.attach(Tokens("masked"), (torch.randn(2, 5, 4), torch.ones(2, 5))).eval()
    assert [spec.inputs for spec in ee.specs] == [(1,), (1,)]
    x, mask = torch.randn(1, 5, 4), torch.tensor([[1.0, 1, 1, 0, 0]])
    padded = torch.cat([x[:, :3], torch.full((1, 2, 4), 9.0)], 1)
    assert all(torch.allclose(a, b) for a, b in zip(ee(x, mask).logits, ee(padded, mask).logits, strict=True))


def test_an_exit_does_not_see_padded_tokens() -> None:
    ee = exitkit.attach(Tokens("masked"), {"x": torch.randn(2, 5, 4), "mask": torch.ones(2, 5)}).eval()
    x, mask = torch.randn(1, 5, 4), torch.tensor([[1.0, 1, 1, 0, 0]])
    padded = torch.cat([x[:, :3], torch.full((1, 2, 4), 9.0)], 1)
    first, second = ee(x=x, mask=mask), ee(x=padded, mask=mask)
    assert not torch.equal(first.features[0], second.features[0])
    assert all(torch.allclose(a, b) for a, b in zip(first.logits, second.logits, strict=True))


def test_a_mask_counts_whether_given_by_keyword_or_by_position() -> None:
    x, mask = torch.randn(3, 5, 4), torch.tensor([[1.0, 1, 1, 0, 0]]).expand(3, 5)
    for example in ({"x": x, "mask": mask}, (x, mask)):
        ee = exitkit.attach(Tokens("masked"), example).eval()
        named, placed = ee(x=x, mask=mask), ee(x, mask)
        assert all(torch.equal(a, b) for a, b in zip(named.logits, placed.logits, strict=True))


def test_an_exit_on_a_class_token_sees_no_other() -> None:
    ee = exitkit.attach(Tokens("first"), torch.randn(2, 5, 4), head="1L", method="sdn").eval()
    output = ee(torch.randn(3, 5, 4))
    assert torch.equal(output.logits[0], ee.classifiers[0].linear(output.features[0][:, 0]))
