"""MACs against values computed by hand, stage by stage."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import exitkit
from exitkit.multi_exit.inspection import Inspection
from exitkit.surgery.macs import count_macs
from tests.test_any_backbone import Chain, chains
from tests.toy import BLOCK, LINEAR, STEM, TOTAL, TinyNet, images

HEAD = 8 * 4 * 4 * 3


def test_macs_of_the_backbone_by_hand(tiny_net: TinyNet) -> None:
    anatomy = exitkit.inspect(tiny_net, images(), show=False).anatomy
    assert anatomy.macs == TOTAL
    assert [block.macs for block in anatomy.blocks] == [STEM + (i + 1) * BLOCK for i in range(4)]
    assert [block.share for block in anatomy.blocks] == [block.macs / TOTAL for block in anatomy.blocks]


def test_macs_are_those_of_one_sample(tiny_net: TinyNet) -> None:
    assert exitkit.inspect(tiny_net, images(7), show=False).anatomy.macs == TOTAL


def resnet50() -> list[int]:
    """He et al. 2016, with the stride on the 3 × 3 convolution: bottlenecks of width w on sides s, output 4w."""

    def block(inputs: int, width: int, side: int, stride: int, first: bool) -> int:
        reduce = (side * stride) ** 2 * inputs * width
        rest = side**2 * (9 * width * width + width * 4 * width)
        return reduce + rest + (side**2 * inputs * 4 * width if first else 0)

    costs, inputs = [], 64
    for width, side, blocks, stride in ((64, 56, 3, 1), (128, 28, 4, 2), (256, 14, 6, 2), (512, 7, 3, 2)):
        costs.append(block(inputs, width, side, stride, first=True))
        costs += [block(4 * width, width, side, 1, first=False)] * (blocks - 1)
        inputs = 4 * width
    return [112**2 * 49 * 3 * 64 + costs[0], *costs[1:], 2048 * 1000]


def vit_b_16() -> list[int]:
    """Dosovitskiy et al. 2021: 196 patches and a class token, width 768."""
    patches = 196 * 16 * 16 * 3 * 768
    layer = transformer_layer(tokens=197, width=768)
    return [patches + layer, *[layer] * 11, 768 * 1000]


def transformer_layer(tokens: int, width: int, seen: int | None = None) -> int:
    """Four projections, two matrices of 4 · width, and two products of ``tokens`` by ``seen`` tokens."""
    return tokens * 12 * width**2 + 2 * tokens * (seen or tokens) * width


def swin_t() -> list[int]:
    """Liu et al. 2021: windows of 7 × 7; a patch-merging layer (4d to 2d) before each stage but the first."""
    costs: list[int] = []
    for width, side, blocks in ((96, 56, 2), (192, 28, 2), (384, 14, 6), (768, 7, 2)):
        before = side**2 * (4 * 4 * 3 * 96 if width == 96 else 2 * width * width)
        layer = transformer_layer(tokens=side**2, width=width, seen=49)
        costs += [before + layer, *[layer] * (blocks - 1)]
    return [*costs, 768 * 1000]


KNOWN = {"resnet50": (resnet50, 4.09), "vit_b_16": (vit_b_16, 17.56), "swin_t": (swin_t, 4.49)}


@pytest.mark.parametrize("name", KNOWN)
def test_stages_of_known_models_cost_what_their_papers_say(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    formula, gmacs = KNOWN[name]
    inspection = exitkit.inspect(models.get_model(name, weights=None), show=False)
    assert [stage.macs for stage in inspection.stages] == formula()
    assert inspection.anatomy.macs == sum(formula())
    assert f"{gmacs} GMACs" in str(inspection)
    assert_ptflops_adds_biases(inspection, name)


def assert_ptflops_adds_biases(inspection: Inspection, name: str) -> None:
    """ptflops counts a bias as one more MAC per output; torchvision's convolutions without one make them equal."""
    if importlib.util.find_spec("ptflops") is None:
        assert {stage.ptflops_macs for stage in inspection.stages} == {None}
        return
    extra = [(stage.ptflops_macs or 0) - stage.macs for stage in inspection.stages]
    if name == "resnet50":
        assert extra == [0] * 16 + [1000]
    elif name == "vit_b_16":
        layer = 197 * 9 * 768
        assert extra == [196 * 768 + layer, *[layer] * 11, 1000]
    else:
        assert all(0 < more < 0.01 * stage.macs for more, stage in zip(extra, inspection.stages, strict=True))


@pytest.fixture(scope="module")
def bert_base() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32))
    return model


@pytest.mark.parametrize("tokens", [128, 50])
def test_bert_base_costs_what_its_sequence_length_says(bert_base: nn.Module, tokens: int) -> None:
    """Devlin et al. 2019: 12 layers of width 768, then a pooler and two classes; embeddings are looked up."""
    batch = {
        "input_ids": torch.randint(1, 32, (2, tokens)),
        "attention_mask": torch.ones(2, tokens, dtype=torch.long),
    }
    inspection = exitkit.inspect(bert_base, batch, show=False)
    layer = transformer_layer(tokens, 768)
    assert [stage.macs for stage in inspection.stages] == [*[layer] * 12, 768 * 768 + 768 * 2]
    assert ("11.17 GMACs" in str(inspection)) == (tokens == 128)


@settings(max_examples=8, deadline=None)
@given(chain=chains())
def test_costs_add_up_over_the_stages_that_run(chain: tuple[list[str], tuple[int, int] | None]) -> None:
    """Each partition stage, counted alone, costs what ``inspect`` says; together they cost the backbone itself."""
    model = Chain(*chain).eval()
    inspection = exitkit.inspect(model, images(), show=False)
    names = [boundary.name for boundary in inspection.boundaries]
    ee = exitkit.attach(model, images(), at=names, head="1L", method="sdn")
    so_far = [0, *(boundary.macs for boundary in inspection.boundaries), inspection.anatomy.macs]
    value, costs = images(1), []
    with torch.no_grad():
        for stage in ee.partition().stages:
            costs.append(count_macs(stage.module, value))
            value = stage.module(value)[0]
    assert costs == [after - before for before, after in pairwise(so_far)]
    assert sum(stage.macs for stage in inspection.stages) == sum(costs) == count_macs(model, images(1))


def test_an_exit_costs_what_came_before_it_and_all_earlier_heads(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, images(), head="1L", method="sdn")
    expected = [STEM + (i + 1) * BLOCK + (i + 1) * HEAD for i in range(3)] + [TOTAL + 3 * HEAD]
    assert [exit_.name for exit_ in ee.exits] == ["blocks.0", "blocks.1", "blocks.2", "backbone"]
    assert [exit_.macs for exit_ in ee.exits] == expected
    assert [exit_.macs_fraction for exit_ in ee.exits] == [macs / TOTAL for macs in expected]


def test_a_convolutional_head_costs_its_convolution(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, images(), at=["blocks.0"], method="sdn", head="conv")
    assert ee.exits[0].macs == STEM + BLOCK + 8 * 8 * 9 * 8 * 8 + HEAD


@settings(max_examples=6, deadline=None)
@given(side=st.sampled_from([8, 9, 20, 33, 40, 72, 81]), classes=st.integers(2, 9))
def test_convolutional_heads_by_the_papers_formula(side: int, classes: int) -> None:
    """Appendix A.1 of Zero Time Waste: the IC's stride, its channels, and pooling to 4 × 4, by the input's side."""
    net = TinyNet(classes)
    stride = 2 if side > 32 else 1
    channels = 2 if side > 64 else 8
    out = (side + stride - 1) // stride
    head = out**2 * 9 * 8 * channels + channels * 4 * 4 * classes
    stem, block = side**2 * 9 * 8, 2 * side**2 * 9 * 8 * 8
    ee = exitkit.attach(net, images(height=side, width=side), at=["blocks.0", "blocks.2"], head="conv", method="ztw")
    first, second = stem + block + head, classes * classes + classes * 2  # the link's inputs; the ensemble's weights
    assert [exit_.macs for exit_ in ee.exits] == [
        first,
        first + 2 * block + head + second,
        first + 3 * block + head + second + 8 * classes,
    ]


def test_links_and_combiners_are_paid_for(tiny_net: TinyNet) -> None:
    """A link adds 3 inputs to a linear layer of 3; a combiner of m > 1 members is a (3, m) by m product."""
    ee = exitkit.attach(tiny_net, images(), at=["blocks.0", "blocks.1"], head="1L", method="ztw")
    first = STEM + BLOCK + HEAD
    second = first + BLOCK + HEAD + 3 * 3 + 3 * 2
    assert [exit_.macs for exit_ in ee.exits] == [first, second, second + 2 * BLOCK + LINEAR]
