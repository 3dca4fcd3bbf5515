"""MACs against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import exitkit
from tests.toy import BLOCK, LINEAR, STEM, TOTAL, TinyNet, images

HEAD = 8 * 4 * 4 * 3


def test_macs_of_the_backbone_by_hand(tiny_net: TinyNet) -> None:
    anatomy = exitkit.inspect(tiny_net, images(), show=False).anatomy
    assert anatomy.macs == TOTAL
    assert [block.macs for block in anatomy.blocks] == [STEM + (i + 1) * BLOCK for i in range(4)]
    assert [block.share for block in anatomy.blocks] == [block.macs / TOTAL for block in anatomy.blocks]


def test_macs_are_those_of_one_sample(tiny_net: TinyNet) -> None:
    assert exitkit.inspect(tiny_net, images(7), show=False).anatomy.macs == TOTAL


def test_macs_of_grouped_strided_and_attention_layers_by_hand() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.linear = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.depthwise(self.conv(x)).flatten(2).transpose(1, 2)
            logits: Tensor = self.linear(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))
            return logits

    tokens = 4 * 4
    convolutions = tokens * 9 * 8 + tokens * 9 * 8
    attention = 3 * tokens * 8 * 8 + 2 * tokens * tokens * 8 + tokens * 8 * 8
    assert exitkit.inspect(Mixed(), images(), show=False).anatomy.macs == convolutions + attention + 8 * 3


def test_an_exit_costs_what_came_before_it_and_all_earlier_heads(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, images(), head="1L", method="sdn")
    expected = [STEM + (i + 1) * BLOCK + (i + 1) * HEAD for i in range(3)] + [TOTAL + 3 * HEAD]
    assert [exit_.name for exit_ in ee.exits] == ["blocks.0", "blocks.1", "blocks.2", "backbone"]
    assert [exit_.macs for exit_ in ee.exits] == expected
    assert [exit_.macs_fraction for exit_ in ee.exits] == [macs / TOTAL for macs in expected]


def test_a_convolutional_head_costs_its_convolution(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, images(), at=["blocks.0"], method="sdn")
    assert ee.exits[0].macs == STEM + BLOCK + 8 * 8 * 9 * 8 * 8 + HEAD


def test_links_and_combiners_are_paid_for(tiny_net: TinyNet) -> None:
    """A link adds 3 inputs to a linear layer of 3; a combiner of m > 1 members is a (3, m) by m product."""
    ee = exitkit.attach(tiny_net, images(), at=["blocks.0", "blocks.1"], head="1L", method="ztw")
    first = STEM + BLOCK + HEAD
    second = first + BLOCK + HEAD + 3 * 3 + 3 * 2
    assert [exit_.macs for exit_ in ee.exits] == [first, second, second + 2 * BLOCK + LINEAR]


@pytest.mark.parametrize(("name", "gmacs"), [("resnet50", 4.09), ("vit_b_16", 17.56)])
def test_macs_of_known_models(name: str, gmacs: float) -> None:
    torchvision_models = pytest.importorskip("torchvision.models")
    inspection = exitkit.inspect(torchvision_models.get_model(name, weights=None), show=False)
    assert round(inspection.anatomy.macs / 1e9, 2) == gmacs
    assert f"{gmacs} GMACs" in str(inspection)


def test_recurrent_layers_are_paid_for_step_by_step() -> None:
    """Each weight matrix of an LSTM once per step: 4·6·(5 + 6) MACs, and a linear layer after it."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.lstm = nn.LSTM(5, 6, batch_first=True)
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(self.lstm(self.first(x))[0][:, -1])
            return out

    macs = exitkit.inspect(Recurrent(), torch.randn(2, 7, 5), show=False).anatomy.macs
    assert macs == 7 * 25 + 7 * 4 * 6 * (5 + 6) + 6 * 3
