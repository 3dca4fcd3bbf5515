"""Random small backbones: cuts clean, stages exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import exitkit
from tests.toy import TinyBlock, all_equal, images, staged


class DenseUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Conv2d(4, 3, 3, padding=1)
        self.shrink = nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shrink(torch.cat([x, self.grow(x)], 1))
        return out


UNITS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "block": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)
    ),
    "residual": lambda: TinyBlock(4),
    "dense": DenseUnit,
    "preactivation": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1, groups=2)),
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


@settings(max_examples=20, deadline=None)
@given(chain=chains(), batch=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_chain_is_cut_cleanly_and_exactly(
    chain: tuple[list[str], tuple[int, int] | None], batch: int, seed: int
) -> None:
    units, skip = chain
    torch.manual_seed(seed)
    model = Chain(units, skip)
    for _ in range(3):
        model.train()(images(8))  # BatchNorm statistics that make a difference
    model.eval()
    found = exitkit.inspect(model, images(), show=False).boundaries
    listed = {name for boundary in found for name in (boundary.name, *boundary.aliases)}
    under_skip = range(skip[0], skip[1] + 1) if skip else range(0)
    assert all((f"units.{index}" in listed) == (index not in under_skip) for index in range(len(units)))
    assert not any(name.startswith(f"units.{index}.") for name in listed for index in under_skip)

    ee = exitkit.attach(model, images(), at=[boundary.name for boundary in found], head="1L", method="sdn").eval()
    stages = ee.lower()
    assert all(len(stage.inputs) == 1 for stage in stages.stages)  # nothing but the feature crosses a cut
    x = images(batch)
    with torch.no_grad():
        output = ee(x)
        assert torch.equal(output.logits[-1], model(x))
    assert all_equal(staged(stages, x), [*output.features, output.logits[-1]])
