"""Features read by hooks, and the stages that must equal them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from tests.toy import TinyBlock, TinyNet, all_equal, images, names, staged


def test_features_are_the_blocks_outputs(tiny_ee: exitkit.MultiExitModel, tiny_net: TinyNet) -> None:
    tiny_ee.eval()
    x, expected = tiny_net.stem(images(3)), []
    for block in tiny_net.blocks[:3]:
        x = block(x)
        expected.append(x)
    assert all_equal(tiny_ee(images(3)).features, expected)


class WrittenInto(nn.Module):
    """An in-place ReLU of the model itself overwrites each block's output."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
            for _ in range(4)
        )
        self.linear = nn.Linear(4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(block(x), inplace=self.inplace)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@pytest.fixture
def written_into() -> WrittenInto:
    return WrittenInto(inplace=True).eval()


def untouched_features(model: WrittenInto, x: Tensor) -> list[Tensor]:
    features, x = [], model.stem(x)
    for block in model.blocks[:-1]:
        features.append(block(x))
        x = F.relu(features[-1])
    return features


def test_a_feature_written_into_later_is_read_before(written_into: WrittenInto) -> None:
    ee = exitkit.attach(written_into, images()).eval()
    features = untouched_features(written_into, images(3))
    assert any((feature < 0).any() for feature in features)
    assert all_equal(ee(images(3)).features, features)


def test_the_stages_give_a_feature_that_is_written_into_later_as_it_was(written_into: WrittenInto) -> None:
    ee = exitkit.attach(written_into, images()).eval()
    x = images(3)
    assert all_equal(staged(ee.partition(), x), [*untouched_features(written_into, x), written_into(x)])


def test_only_a_feature_that_is_written_into_is_copied(written_into: WrittenInto) -> None:
    assert [spec.hook.clone for spec in exitkit.attach(written_into, images()).specs] == [True] * 3
    assert [spec.hook.clone for spec in exitkit.attach(WrittenInto(inplace=False), images()).specs] == [False] * 3


def test_a_feature_before_an_inplace_module_is_read_before_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).eval()
    ee = exitkit.attach(model, images(), at=["1"]).eval()
    x = images(3)
    assert all_equal(ee(x).features, [model[1](model[0](x))])


def test_gradients_flow_through_a_copied_feature(written_into: WrittenInto) -> None:
    ee = exitkit.attach(written_into, images(), method="sdn")
    ee(images(3)).logits[0].sum().backward()
    assert written_into.stem.weight.grad.abs().sum() > 0


def test_the_stages_leave_the_users_input_alone() -> None:
    class WritesIntoInput(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    example = images()
    exitkit.attach(WritesIntoInput(), example)
    assert torch.equal(example, images())


class Repeated(nn.Module):
    """One block called three times, under one name or under three."""

    def __init__(self, aliases: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList([TinyBlock(8)] * aliases)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for call in range(3):
            x = self.blocks[call % len(self.blocks)](x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("aliases", [1, 3])
def test_a_shared_block_is_cut_after_each_of_its_calls(aliases: int) -> None:
    model = Repeated(aliases).eval()
    ee = exitkit.attach(model, images()).eval()
    once = model.blocks[0](model.stem(images(3)))
    assert all_equal(ee(images(3)).features, [once, model.blocks[0](once)])


def test_calls_of_a_shared_block_are_counted_in_the_name() -> None:
    ee = exitkit.attach(Repeated(1), images(), at=["blocks.0@1"])
    assert names(ee) == ["blocks.0@1"]


def test_the_last_exit_equals_a_backbone_on_its_fused_path() -> None:
    """nn.TransformerEncoderLayer leaves its fast path when it has hooks; these must not make a difference."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3)
            self.linear = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(self.encoder(x)[:, 0])
            return logits

    model = Encoder().eval()
    ee = exitkit.attach(model, torch.randn(2, 5, 16)).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        assert torch.equal(ee(x).logits[-1], model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_heads_take_the_backbones_dtype(dtype: torch.dtype, tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net.to(dtype), images().to(dtype)).eval()
    output = ee(images(3).to(dtype))
    assert {logits.dtype for logits in output.heads} == {dtype}
    assert {logits.dtype for logits in output.logits[:-1]} == {torch.float32}  # ensembles add up logarithms


def test_inputs_by_keyword(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, {"x": images()}).eval()
    assert torch.equal(ee(x=images(3)).logits[-1], tiny_net(images(3)))


def test_one_example_row_is_enough(tiny_net: TinyNet) -> None:
    assert names(exitkit.attach(tiny_net, images(1))) == ["blocks.0", "blocks.1", "blocks.2"]


class Buffered(nn.Module):
    """Residual blocks whose skip is written into a fresh tensor, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.zeros_like(x)
        kept[:, :4] = x[:, :4]
        return self.b(torch.relu(self.a(x))) + kept


def test_a_skip_held_in_a_buffer_is_an_activation() -> None:
    """Inside a block two values are alive, though one was written in place; after it, one."""
    model = nn.Sequential(nn.Linear(8, 8), *(Buffered() for _ in range(3)), nn.Linear(8, 3))
    found = exitkit.inspect(model, torch.randn(2, 8), show=False)
    assert [block.name for block in found.blocks] == ["1", "2", "3"]
    assert not any(boundary.name.endswith((".a", ".b")) for boundary in found.boundaries)


class Marking(TinyBlock):
    """Returns, before its feature, a mask of the same shape in another dtype."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return (out > 0).long(), out


def test_a_feature_behind_integers_of_its_shape() -> None:
    class Marked(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Marking(8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                _, x = block(x)
            logits: Tensor = self.linear(x.mean((2, 3)))
            return logits

    model = Marked().eval()
    ee = exitkit.attach(model, images()).eval()
    assert torch.equal(ee(images(3)).features[0], model.blocks[0](model.stem(images(3)))[1])


def test_names_that_torch_allows() -> None:
    model = TinyNet().eval()
    model.blocks = nn.Sequential(OrderedDict(zip(("a@b", "c[0]", "d@1", "e f"), model.blocks, strict=True)))
    ee = exitkit.attach(model, images(), every=1)
    assert names(ee) == ["blocks.a@b", "blocks.c[0]", "blocks.d@1"]
