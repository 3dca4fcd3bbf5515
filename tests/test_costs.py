"""MACs against values computed by hand, stage by stage."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import exitkit
from exitkit.inspect import Inspection
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


class Between(nn.Module):
    """A layer between two linear ones, so that there is a place to cut."""

    def __init__(self, layer: Callable[[Tensor], Any], x: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(x.shape[-1], x.shape[-1])
        self.layer = layer
        self.last = nn.Linear(self.middle(x)[0].numel(), 3)

    def middle(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.middle(self.first(x)).flatten(1))
        return logits


class Apply(nn.Module):
    """A function of the input and the module or parameter beside it."""

    def __init__(self, function: Callable[..., Any], part: nn.Module | Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.part = nn.Parameter(part) if isinstance(part, Tensor) else part

    def forward(self, x: Tensor) -> Any:
        return self.function(x) if self.part is None else self.function(self.part, x)


def attention(**options: Any) -> Apply:
    return Apply(lambda part, x: part(x, x, x, **options), nn.MultiheadAttention(8, 2, batch_first=True))


LSTM, ATTENTION = 4 * 6 * (5 + 6), 7 * 4 * 8 * 8 + 2 * 7 * 7 * 8
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1)), (4, 5, 5), 25 * 4 * 6 * 9),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(5, 6)), (5,), 30 + 30 + 6),
    "grouped_conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), 9 * 9 * 2 * 6),
    "depthwise_conv": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5), 25 * 9 * 4),
    "dilated_conv1d": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same"), (4, 9), 9 * 3 * 4 * 6),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, groups=2), (4, 5, 5, 5), 27 * 27 * 2 * 6),
    "conv_transpose": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), 25 * 9 * 4 * 3),
    "lstm": (lambda: nn.LSTM(5, 6, batch_first=True), (7, 5), 7 * LSTM),
    "lstm_steps_first": (
        lambda: Apply(lambda part, x: part(x.transpose(0, 1))[0].transpose(0, 1), nn.LSTM(5, 6)),
        (7, 5),
        7 * LSTM,
    ),
    "lstm_two_layers_both_ways": (
        lambda: nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True),
        (7, 5),
        7 * (2 * LSTM + 2 * 4 * 6 * (12 + 6)),
    ),
    "lstm_projected": (lambda: nn.LSTM(5, 6, proj_size=3, batch_first=True), (7, 5), 7 * (4 * 6 * (5 + 3) + 6 * 3)),
    "lstm_cell": (lambda: Apply(lambda part, x: part(x)[0], nn.LSTMCell(5, 6)), (5,), LSTM),
    "gru": (lambda: nn.GRU(5, 6, batch_first=True), (7, 5), 7 * 3 * 6 * (5 + 6)),
    "rnn": (lambda: nn.RNN(5, 6, batch_first=True), (7, 5), 7 * 6 * (5 + 6)),
    "attention": (lambda: attention(need_weights=False), (7, 8), ATTENTION),
    "attention_with_weights": (lambda: attention(need_weights=True), (7, 8), ATTENTION),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (7, 8), ATTENTION + 7 * 8 * 32),
    "causal_attention": (
        lambda: Apply(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        (4, 7, 5),
        2 * 4 * 7 * 7 * 5,
    ),
    "grouped_query_attention": (
        lambda: Apply(lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)),
        (4, 7, 5),
        2 * 4 * 7 * 7 * 5,
    ),
    "einsum": (
        lambda: Apply(lambda weight, x: torch.einsum("btd,hdk->bhtk", x, weight), torch.ones(2, 5, 3)),
        (7, 5),
        7 * 5 * 2 * 3,
    ),
    "product_with_a_vector": (
        lambda: Apply(lambda query, x: (x * (x @ query).softmax(1).unsqueeze(-1)).sum(1), torch.ones(5)),
        (7, 5),
        7 * 5,
    ),
    "bilinear": (lambda: Apply(lambda part, x: part(x, x), nn.Bilinear(5, 5, 4)), (5,), 5 * 5 * 4),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_layers_of_every_kind_by_hand(name: str) -> None:
    make, shape, macs = LAYERS[name]
    x = torch.randn(2, *shape)
    model = Between(make(), x)
    inspection = exitkit.inspect(model, x, show=False)
    around = x[0].numel() * shape[-1] + model.last.weight.numel()
    assert inspection.anatomy.macs - around == macs
    assert sum(stage.parameter_bytes for stage in inspection.stages) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_a_mixture_of_experts_costs_the_experts_that_a_token_goes_to(experts: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(
        **sizes, **heads, pad_token_id=0, use_cache=False, experts_implementation=experts
    )
    batch = {"input_ids": torch.randint(1, 16, (2, 10)), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    model = transformers.MixtralForSequenceClassification(config)
    layer = 10 * (2 * 8 * 8 + 2 * 8 * 4) + 2 * 10 * 10 * 8 + 10 * 8 * 4 + 10 * 2 * 3 * 8 * 12
    assert exitkit.inspect(model, batch, show=False).anatomy.macs == 2 * layer + 10 * 8 * 2


def test_an_operator_without_a_formula_is_named(tiny_net: TinyNet) -> None:
    @torch.library.custom_op("exitkit_tests::scale", mutates_args=())
    def scale(x: Tensor) -> Tensor:
        return x * 2

    scale.register_fake(torch.empty_like)
    text = str(exitkit.inspect(nn.Sequential(tiny_net, Apply(lambda x: scale(x))), images(), show=False))
    assert "exitkit_tests.scale.default" in text.replace("\n", "")


@settings(max_examples=8, deadline=None)
@given(chain=chains())
def test_costs_add_up_over_the_stages_that_run(chain: tuple[list[str], tuple[int, int] | None]) -> None:
    """Each lowered stage, counted alone, costs what ``inspect`` says; together they cost the backbone itself."""
    model = Chain(*chain).eval()
    inspection = exitkit.inspect(model, images(), show=False)
    names = [boundary.name for boundary in inspection.boundaries]
    ee = exitkit.attach(model, images(), at=names, head="1L", method="sdn")
    so_far = [0, *(boundary.macs for boundary in inspection.boundaries), inspection.anatomy.macs]
    value, costs = images(1), []
    with torch.no_grad():
        for stage in ee.lower().stages:
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
    ee = exitkit.attach(tiny_net, images(), at=["blocks.0"], method="sdn")
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
