"""MACs of layers and operators of every kind against values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import exitkit
from exitkit.surgery.macs import count_macs
from tests.toy import TOTAL, TinyNet, images


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
    "attention_in_the_layout_of_its_query": (
        lambda: Apply(
            lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2).view(-1, 7, 20)
        ),
        (7, 4, 5),
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
@pytest.mark.filterwarnings("ignore:The tensor attributes", "ignore:LSTM with projections")
def test_layers_of_every_kind_by_hand(name: str) -> None:
    make, shape, macs = LAYERS[name]
    x = torch.randn(2, *shape)
    model = Between(make(), x)
    inspection = exitkit.inspect(model, x, show=False)
    around = x[0].numel() * shape[-1] + model.last.weight.numel()
    assert inspection.anatomy.macs - around == macs
    assert sum(stage.parameter_bytes for stage in inspection.stages) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("kernel", ["_cudnn_rnn", "miopen_rnn"])
def test_the_recurrent_kernels_of_gpus_are_counted_alike(kernel: str) -> None:
    weights = [parameter.detach() for parameter in nn.LSTM(5, 6, 2, bidirectional=True).parameters()]
    state = torch.zeros(4, 1, 6)
    packed, projection = ([None], [0]) if kernel == "_cudnn_rnn" else ([], [])
    after = [2, 6, *projection, 2, True, 0.0, False, True, [], None]

    def lstm(x: Tensor) -> Any:
        return getattr(torch.ops.aten, kernel)(x, weights, 4, *packed, state, state, *after)

    assert count_macs(lstm, torch.randn(1, 7, 5)) == 7 * (2 * LSTM + 2 * 4 * 6 * (12 + 6))


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


class Choosy(TinyNet):
    """Reads a value out of a tensor, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scale = x.abs().max().item()
        torch._check(scale >= 0)
        return super().forward(x * scale)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11"), reason="torch.export of 2.11 fails on a float that is checked"
)
def test_a_graph_that_reads_values_is_counted_too_and_leaves_no_trace() -> None:
    model = Choosy().eval()
    assert exitkit.inspect(model, images(), show=False).anatomy.macs == TOTAL
    assert model.calls == 0


def test_a_graph_that_does_not_run_on_one_sample_is_refused() -> None:
    class Pairs(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.abs().sum((1, 2, 3)).nonzero()
            torch._check(rows.shape[0] % 2 == 0)
            return super().forward(x + 0 * rows.view(-1, 2).sum())

    with pytest.raises(exitkit.ExitkitError, match="does not run on a single sample"):
        exitkit.inspect(Pairs(), images(), show=False)


def test_an_operator_without_a_formula_is_named(tiny_net: TinyNet) -> None:
    @torch.library.custom_op("exitkit_tests::scale", mutates_args=())
    def scale(x: Tensor) -> Tensor:
        return x * 2

    scale.register_fake(torch.empty_like)
    text = str(exitkit.inspect(nn.Sequential(tiny_net, Apply(lambda x: scale(x))), images(), show=False))
    assert "exitkit_tests.scale.default" in text.replace("\n", "")
