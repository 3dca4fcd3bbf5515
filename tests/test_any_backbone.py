"""Random small backbones: cuts clean, stages exact, costs additive, nothing left behind, the same after saving."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import exitkit
from exitkit.surgery.capturing import capture
from exitkit.surgery.macs import count_macs
from tests.toy import TinyBlock, all_equal, images, staged


class DenseUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Conv2d(4, 3, 3, padding=1)
        self.shrink = nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shrink(torch.cat([x, self.grow(x)], 1))
        return out


class Attention(nn.Module):
    """Self-attention over pixels, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(self.norm(x.flatten(2).transpose(1, 2))).chunk(3, -1)
        return x + scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)


class Branches(nn.Module):
    """Two paths side by side, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
        self.right = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


UNITS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "block": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)
    ),
    "residual": lambda: TinyBlock(4),
    "dense": DenseUnit,
    "preactivation": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    "attention": Attention,
    "branches": Branches,
    "pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
}


class Chain(nn.Module):
    """Units one after another, and possibly one long skip around the units ``skip[0]`` to ``skip[1]``."""

    def __init__(self, units: list[str], skip: tuple[int, int] | None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.units = nn.ModuleList(UNITS[unit]() for unit in units)
        self.linear = nn.Linear(4, 3)
        self.skip = skip or (-1, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, unit in enumerate(self.units):
            if index == self.skip[0]:
                saved = x.clone()
            x = unit(x)
            if index == self.skip[1]:
                x = x + saved
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[str], tuple[int, int] | None]:
    units = draw(st.lists(st.sampled_from(sorted(UNITS)), min_size=1, max_size=5))
    skips = [(first, last) for last in range(len(units)) for first in range(last + 1)]
    return units, draw(st.none() | st.sampled_from(skips))


def _trained(units: list[str], skip: tuple[int, int] | None, seed: int) -> Chain:
    torch.manual_seed(seed)
    model = Chain(units, skip)
    for _ in range(3):
        model.train()(images(8))  # BatchNorm statistics that make a difference
    return model.eval()


@settings(max_examples=20, deadline=None)
@given(chain=chains(), batch=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_chain_is_cut_cleanly_and_exactly(
    chain: tuple[list[str], tuple[int, int] | None], batch: int, seed: int
) -> None:
    units, skip = chain
    model = _trained(units, skip, seed)
    found = exitkit.inspect(model, images(), show=False).boundaries
    listed = {name for boundary in found for name in (boundary.name, *boundary.aliases)}
    under_skip = range(skip[0], skip[1] + 1) if skip else range(0)
    assert all((f"units.{index}" in listed) == (index not in under_skip) for index in range(len(units)))
    assert not any(name.startswith(f"units.{index}.") for name in listed for index in under_skip)

    ee = exitkit.attach(model, images(), at=[boundary.name for boundary in found], head="1L", method="sdn").eval()
    stages = ee.partition()
    assert all(len(stage.inputs) == 1 for stage in stages.stages)  # nothing but the feature crosses a cut
    x = images(batch)
    with torch.no_grad():
        output = ee(x)
        assert torch.equal(output.logits[-1], model(x))
    assert all_equal(staged(stages, x), [*output.features, output.logits[-1]])


@settings(max_examples=12, deadline=None)
@given(
    chain=chains(),
    seed=st.integers(0, 99),
    method=st.sampled_from(["sdn", "ztw"]),
    head=st.sampled_from(["auto", "1L", "tail"]),
)
def test_any_chain_costs_what_its_stages_cost_and_comes_back_from_disk_and_from_surgery(
    chain: tuple[list[str], tuple[int, int] | None], seed: int, method: str, head: str
) -> None:
    model = _trained(*chain, seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    boundaries = exitkit.inspect(model, images(), show=False).boundaries
    ee = exitkit.attach(
        model, images(), at=[boundary.name for boundary in boundaries], method=method, head=head
    ).eval()

    x = images(1)
    values, spent = dict(zip(ee.partition().inputs, [x], strict=True)), []
    for stage in ee.partition().stages:
        inputs = [values[name] for name in stage.inputs]
        spent.append(count_macs(stage.module, *inputs))
        values |= dict(zip(stage.outputs, stage.module(*inputs), strict=True))
    assert list(itertools.accumulate(spent)) == [*(boundary.macs for boundary in boundaries), ee.anatomy.macs]
    assert all(before.macs < after.macs for before, after in itertools.pairwise(ee.exits))

    with tempfile.TemporaryDirectory() as folder:
        ee.save_pretrained(folder)
        again = exitkit.MultiExitModel.from_pretrained(model, folder).eval()
    assert all_equal(again(images(3)).logits, ee(images(3)).logits)

    assert exitkit.detach(ee) is model
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


class Attention(nn.Module):
    """Its ``view`` is legal where attention leaves heads and features side by side, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        joined = scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous().view(*x.shape[:2], 8)
        return self.head(joined.mean(1))


def test_a_graph_captured_with_one_kernel_of_attention_runs_with_another() -> None:
    model, x = Attention().eval(), torch.randn(3, 5, 8)
    graph = capture(model, x).graph
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            assert torch.equal(graph(x), model(x))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return x + (self.linear(x) @ x.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1) @ x


class Windowed(nn.Module):
    """Each token sees itself and the two before it, by a mask that is made with ``torch.vmap``, as transformers makes some."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixing() for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        seen = torch.vmap(lambda query: torch.vmap(lambda key: (key <= query) & (query - key < 3))(places))(places)
        for block in self.blocks:
            x = block(x, seen)
        return self.head(x.mean(1))


def test_a_mask_that_vmap_makes_is_captured() -> None:
    model, x = Windowed().eval(), torch.randn(5, 6, 8)
    ee = exitkit.attach(model, x[:2], every=1).eval()
    assert len(ee.boundaries) == 3
    with torch.no_grad():
        assert torch.equal(ee(x).logits[-1], model(x))
        assert torch.equal(exitkit.compile(ee, 2.0)(x).logits, model(x))
