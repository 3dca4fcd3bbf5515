"""Boundaries with several activations: streams side by side, carried over the cut, one of them read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from tests.toy import all_equal, images, names, staged

FINE, COARSE = (4, 8, 8), (6, 4, 4)


class TwoScales(nn.Module):
    """(fine, coarse) → (fine, coarse), each reading the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.fine(fine)), torch.relu(self.coarse(coarse) + self.down(fine))


class Streams(nn.Module):
    """A stem, ``depth`` two-scale blocks, and a classifier on both scales."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.split = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(TwoScales() for _ in range(depth))
        self.linear = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.split(fine)
        for block in self.blocks:
            fine, coarse = block(fine, coarse)
        logits: Tensor = self.linear(torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1))
        return logits


def test_blocks_of_two_streams_are_boundaries_that_hold_both() -> None:
    blocks = exitkit.inspect(Streams(), images(), show=False).blocks
    assert [block.name for block in blocks] == [f"blocks.{i}" for i in range(4)]
    for block in blocks:
        assert [activation.shape for activation in block.activations] == [FINE, COARSE]
        assert block.shape == COARSE  # the coarsest is read


def test_stages_carry_every_stream_and_equal_the_model() -> None:
    model = Streams().eval()
    ee = exitkit.attach(model, images(), every=1).eval()
    partition = ee.partition()
    assert [len(stage.outputs) for stage in partition.stages] == [2, 2, 2, 1]
    for batch in (1, 5):
        with torch.no_grad():
            output = ee(images(batch))
            assert torch.equal(output.logits[-1], model(images(batch)))
        assert all_equal(staged(partition, images(batch)), [*output.features, output.logits[-1]])


def test_a_named_stream_is_read(tmp_path: Path) -> None:
    model = Streams().eval()
    ee = exitkit.attach(model, images(), at=["blocks.0", "blocks.1[0]", "blocks.2[1]"]).eval()
    assert [boundary.shape for boundary in ee.boundaries] == [COARSE, FINE, COARSE]
    assert names(ee) == ["blocks.0", "blocks.1[0]", "blocks.2"]  # the default has no index
    with torch.no_grad():
        output = ee(images(3))
        fine = torch.relu(model.blocks[1].fine(torch.relu(model.blocks[0].fine(model.stem(images(3))))))
        assert torch.equal(output.features[1], fine)
    assert all_equal(staged(ee.partition(), images(3)), [*output.features, output.logits[-1]])
    ee.save_pretrained(tmp_path)
    again = exitkit.MultiExitModel.from_pretrained(model, tmp_path, images()).eval()
    assert names(again) == names(ee)
    assert all_equal(again(images(3)).logits, ee(images(3)).logits)


def test_the_price_of_an_exit_is_all_that_ran_before_it() -> None:
    fine = 8 * 8 * 9 * 1 * 4
    block = 8 * 8 * 9 * 4 * 4 + 4 * 4 * 9 * (4 + 6) * 6
    split = 4 * 4 * 9 * 4 * 6
    blocks = exitkit.inspect(Streams(), images(), show=False).blocks
    assert [boundary.macs for boundary in blocks] == [fine + split + block * (i + 1) for i in range(4)]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (["blocks.1[2]"], r"at='blocks\.1\[2\]' is unknown.*Did you mean 'blocks\.1"),
        (["blocks.1[0]", "blocks.1[1]"], r"reads two activations at 'blocks\.1'"),
    ],
)
def test_a_stream_that_is_not_there(at: list[str], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.attach(Streams(), images(), at=at)


def test_the_tail_of_two_streams_is_refused() -> None:
    with pytest.raises(ExitkitError, match=r"head='tail'.*'blocks\.3' leaves 2.*head='auto'"):
        exitkit.attach(Streams(), images(), head="tail")


def test_a_skip_from_outside_the_call_is_no_boundary() -> None:
    class Skip(Streams):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.linear(self.stem(x).mean((2, 3)).repeat(1, 3)[:, :10])

    class Kept(Streams):
        """The stem's output is used again at the end, so no block's end is a cut."""

        def forward(self, x: Tensor) -> Tensor:
            first = fine = self.stem(x)
            coarse = self.split(fine)
            for block in self.blocks:
                fine, coarse = block(fine, coarse)
            logits: Tensor = self.linear(torch.cat([(first + fine).mean((2, 3)), coarse.mean((2, 3))], 1))
            return logits

    assert [b.name for b in exitkit.inspect(Skip(), images(), show=False).blocks] == [f"blocks.{i}" for i in range(4)]
    assert not any(b.name.startswith("blocks") for b in exitkit.inspect(Kept(), images(), show=False).boundaries)


@pytest.mark.parametrize(
    ("name", "first", "side", "options"),
    [
        ("crossvit_tiny_240", "blocks.0", 240, {"depth": ((1, 1, 0), (1, 1, 0))}),
        ("tnt_s_legacy_patch16_224", "blocks.0", 224, {"depth": 2}),
        ("hrnet_w18_small", "stage2.0", 64, {}),
    ],
)
def test_published_architectures_with_streams(name: str, first: str, side: int, options: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5, **options).eval()
    x = images(3, 3, side, side)
    ee = exitkit.attach(model, x, at=[first], head="1L", method="sdn").eval()
    assert len(ee.boundaries[0].activations) == 2
    with torch.no_grad():
        output = ee(x)
        assert torch.equal(output.logits[-1], model(x))
    assert all_equal(staged(ee.partition(), x), [*output.features, output.logits[-1]])
