"""Parameters and peak activations of each stage against values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import exitkit
from exitkit.multi_exit.inspection import StageCost

WIDTHS = st.integers(2, 40)
FLOAT = 4


def stages(model: nn.Module, *inputs: Tensor) -> tuple[StageCost, ...]:
    return exitkit.inspect(model, inputs, show=False).stages


def peaks(model: nn.Module, *inputs: Tensor) -> list[int]:
    return [stage.activation_bytes for stage in stages(model, *inputs)]


@settings(max_examples=15, deadline=None)
@given(widths=st.lists(WIDTHS, min_size=3, max_size=6), batch=st.integers(2, 5))
def test_a_chain_of_linear_layers_holds_one_input_and_one_output(widths: list[int], batch: int) -> None:
    pairs = list(pairwise(widths))
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairs))
    costs = stages(model, torch.randn(batch, widths[0]))
    assert [stage.activation_bytes for stage in costs] == [FLOAT * (a + b) for a, b in pairs]
    assert [stage.parameter_bytes for stage in costs] == [FLOAT * (a * b + b) for a, b in pairs]
    assert [stage.macs for stage in costs] == [a * b for a, b in pairs]


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), act, nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


def residual_net(width: int, hidden: int, act: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), *(Residual(width, hidden, act()) for _ in range(3)), nn.Linear(width, 2))


@settings(max_examples=15, deadline=None)
@given(width=WIDTHS, hidden=WIDTHS)
def test_a_residual_block_holds_its_input_till_the_end(width: int, hidden: int) -> None:
    """Input, and beside it: before and after the activation; then after it and the branch; then the branch and the sum."""
    block = FLOAT * (width + max(2 * hidden, hidden + width, 2 * width))
    model = residual_net(width, hidden, nn.ReLU)
    assert peaks(model, torch.randn(2, 3)) == [max(block, FLOAT * (3 + width)), block, block, FLOAT * (width + 2)]


@settings(max_examples=10, deadline=None)
@given(width=WIDTHS, hidden=WIDTHS)
def test_an_operation_in_place_takes_no_memory(width: int, hidden: int) -> None:
    block = FLOAT * (width + max(hidden + width, 2 * width))
    model = residual_net(width, hidden, lambda: nn.ReLU(inplace=True))
    assert peaks(model, torch.randn(2, 3)) == [max(block, FLOAT * (3 + width)), block, block, FLOAT * (width + 2)]


def test_views_count_once_and_keep_what_they_look_at() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x.transpose(1, 2)).flatten(1).view(-1, 4, 6))
            logits: Tensor = self.third(x[:, 0])
            return logits

    tokens = FLOAT * 4 * 6
    assert peaks(Views(), torch.randn(2, 6, 4)) == [2 * tokens, 2 * tokens, tokens + FLOAT * 2]


def test_what_travels_along_is_alive_in_every_stage_that_it_passes() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            logits: Tensor = self.last((x * mask).sum(1))
            return logits

    tokens, mask = FLOAT * 5 * 6, FLOAT * 5
    model = Masked()
    found = peaks(model, torch.randn(2, 5, 6), torch.ones(2, 5, 1))
    assert found == [2 * tokens + mask] * 4


def test_a_parameter_that_is_read_again_counts_once_and_where_it_is_first_read() -> None:
    block = Residual(8, 12, nn.ReLU())
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(block, block, block), nn.Linear(8, 2))
    shared, around = sum(p.nbytes for p in block.parameters()), FLOAT * (3 * 8 + 8)
    found = stages(model, torch.randn(2, 3))
    assert [stage.parameter_bytes for stage in found] == [around + shared, 0, 0, FLOAT * (8 * 2 + 2)]
    assert len({stage.macs for stage in found[1:3]}) == 1


def test_parameters_that_the_forward_never_reads_do_not_count() -> None:
    model = residual_net(8, 12, nn.ReLU)
    read = sum(p.nbytes for p in model.parameters())
    model.unused = nn.Linear(50, 50)
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)[:-1]), x)  # type: ignore[method-assign]
    assert sum(stage.parameter_bytes for stage in stages(model, torch.randn(2, 3))) == read


def test_memory_follows_the_size_of_the_numbers() -> None:
    single = stages(residual_net(8, 12, nn.ReLU), torch.randn(2, 3))
    double = stages(residual_net(8, 12, nn.ReLU).double(), torch.randn(2, 3).double())
    for one, two in zip(single, double, strict=True):
        assert (two.parameter_bytes, two.activation_bytes) == (2 * one.parameter_bytes, 2 * one.activation_bytes)


def test_memory_is_that_of_one_sample() -> None:
    model = residual_net(8, 12, nn.ReLU)
    assert stages(model, torch.randn(2, 3)) == stages(model, torch.randn(9, 3))


def test_memory_of_known_models_by_hand() -> None:
    """ViT: a token block's MLP, the skip beside the hidden layer before and after GELU. ResNet: the widest addition."""
    models = pytest.importorskip("torchvision.models")
    vit, resnet = models.vit_b_16(weights=None), models.resnet50(weights=None)
    costs = {model: stages(model, torch.randn(2, 3, 224, 224)) for model in (vit, resnet)}
    assert [stage.activation_bytes for stage in costs[vit][:12]] == [FLOAT * 197 * 768 * (1 + 4 + 4)] * 12
    expected = []
    for width, side, blocks in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        within = 3 * 4 * width * side**2  # the skip, the last convolution and its norm
        entry = (
            within if side == 56 else (2 + 1 + 1) * width * (2 * side) ** 2
        )  # input, convolution and norm, not yet strided
        expected += [entry, *[within] * (blocks - 1)]
    assert [stage.activation_bytes for stage in costs[resnet][:16]] == [FLOAT * count for count in expected]
    for model, found in costs.items():
        assert sum(stage.parameter_bytes for stage in found) == FLOAT * sum(p.numel() for p in model.parameters())
