"""Surgery on small models: what it leaves alone, where it cuts, what it reads there, and what it refuses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from exitkit import ExitkitError
from exitkit.surgery.boundaries import Anatomy
from exitkit.surgery.lower import Lowered
from exitkit.surgery.placement import place
from tests.toy import TinyBlock, TinyNet


def images(batch: int = 2, channels: int = 1, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))


def names(ee: exitkit.MultiExitModel) -> list[str]:
    return [boundary.name for boundary in ee.boundaries]


def staged(lowered: Lowered, *tensors: Tensor) -> list[Tensor]:
    """The features and the logits from stages joined again."""
    with torch.no_grad():
        return lowered.run([t.clone() for t in tensors])


def all_equal(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- what is left alone -------------------------------------------------------------------------------------------


class NetWith(TinyNet):
    """A TinyNet with one more part before its global pooling."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.part(self.blocks(self.stem(x))).mean((2, 3)))
        return out


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 8, 8, 8)


class Cached(nn.Module):
    """Keeps a tensor of the batch's size from one forward to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None or self.scale.shape[0] != x.shape[0]:
            self.scale = torch.ones(x.shape[0], 1, 1, 1)
        return x * self.scale


class Counting(nn.Module):
    """Counts its calls in a buffer, as some quantisers and normalisations do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def worn(model: TinyNet) -> TinyNet:
    """``model`` in use: mixed training flags, frozen parts, gradients, the user's own hooks, BatchNorm statistics."""
    model.train()(images()).sum().backward()
    model.blocks[1].eval()
    model.blocks[2].norm.eval()
    model.blocks[0].requires_grad_(False)
    model.stem.weight.grad = None
    model.blocks[1].register_forward_hook(lambda module, args, output: None)
    model.linear.register_forward_pre_hook(lambda module, args: None)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about ``model`` that surgery must not change, comparable with ``==``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "tensors": {name: id(tensor) for name, tensor in [*parameters.items(), *model.named_buffers()]},
        "state_dict": {key: value.tolist() for key, value in model.state_dict().items()},
        "training": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "grad": {name: None if p.grad is None else p.grad.tolist() for name, p in parameters.items()},
        "hooks": {name: [list(getattr(module, kind).items()) for kind in hooks] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
    }


OPERATIONS: dict[str, Callable[[TinyNet], object]] = {
    "inspect": lambda model: exitkit.inspect(model, images(), show=False),
    "attach": lambda model: exitkit.attach(model, images()),
    "detach": lambda model: exitkit.detach(exitkit.attach(model, images())),
    "lower": lambda model: exitkit.attach(model, images()).lower(),
    "attach twice": lambda model: [exitkit.attach(model, images(), method=name) for name in ("sdn", "ztw")],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_model_is_as_before(operation: str) -> None:
    model = worn(TinyNet())
    before = snapshot(model)
    OPERATIONS[operation](model)
    assert snapshot(model) == before


def test_a_buffer_that_the_forward_writes_is_as_before() -> None:
    model = worn(NetWith(Counting()))
    before = snapshot(model)
    exitkit.attach(model, images())
    assert snapshot(model) == before


@pytest.mark.parametrize("part", [Noise, DataDependent, FixedBatch])
def test_the_model_is_as_before_after_it_was_refused(part: type[nn.Module]) -> None:
    model = worn(NetWith(part()))
    before = snapshot(model)
    with pytest.raises(ExitkitError):
        exitkit.attach(model, images())
    assert snapshot(model) == before


@pytest.mark.parametrize("arguments", [{"at": ["blocks.9"]}, {"example_inputs": images(channels=3)}, {"every": 0}])
def test_the_model_is_as_before_after_a_bad_argument(arguments: dict[str, Any]) -> None:
    model = worn(TinyNet())
    before = snapshot(model)
    with pytest.raises(ExitkitError):
        exitkit.attach(model, **{"example_inputs": images(), **arguments})
    assert snapshot(model) == before


def test_a_cache_of_the_batch_size_holds_no_traced_tensor_afterwards() -> None:
    """Refused or not, the model goes on working at any batch size."""
    model = NetWith(Cached()).eval()
    expected = model(images(5))
    with suppress(ExitkitError):
        exitkit.attach(model, images())
    assert type(model.part.scale) is Tensor
    assert torch.equal(model(images(5)), expected)


def test_a_forward_leaves_no_hook_behind() -> None:
    model = worn(TinyNet())
    ee = exitkit.attach(model, images())
    model.eval()
    before = snapshot(model)
    ee(images(3))
    assert snapshot(model) == before


def test_a_forward_that_fails_leaves_no_hook_behind() -> None:
    model = worn(TinyNet())
    ee = exitkit.attach(model, images())
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        ee(images(channels=2))
    assert snapshot(model) == before


def test_detach_returns_the_same_object(tiny_net: TinyNet) -> None:
    assert exitkit.detach(exitkit.attach(tiny_net, images())) is tiny_net


def test_the_users_own_hooks_still_run(tiny_net: TinyNet) -> None:
    seen: list[int] = []
    tiny_net.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    ee = exitkit.attach(tiny_net, images())
    seen.clear()
    ee(images(5))
    assert seen == [5]


def test_the_backbones_gradients_are_those_without_exits(tiny_net: TinyNet) -> None:
    tiny_net.eval()
    tiny_net(images(4)).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in tiny_net.parameters()]
    tiny_net.zero_grad()
    exitkit.attach(tiny_net, images()).eval()(images(4)).logits[-1].square().sum().backward()
    assert all_equal([parameter.grad for parameter in tiny_net.parameters()], expected)


# --- random numbers -----------------------------------------------------------------------------------------------


def test_inspect_draws_no_random_numbers(tiny_net: TinyNet) -> None:
    state = torch.get_rng_state()
    exitkit.inspect(tiny_net, images(), show=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_heads_are_reproducible_from_the_seed(tiny_net: TinyNet) -> None:
    first, second = [], []
    for weights in (first, second):
        torch.manual_seed(7)
        weights.extend(exitkit.attach(tiny_net, images()).added_parameters())
    assert all_equal(first, second)


def test_attach_draws_the_same_random_numbers_in_training_mode(tiny_net: TinyNet) -> None:
    """Nothing but the heads' weights: dropout in training mode must not run."""
    states = []
    for training in (False, True):
        torch.manual_seed(7)
        exitkit.attach(tiny_net.train(training), images())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_seed_changes_neither_places_nor_the_backbones_answer(tiny_net: TinyNet) -> None:
    tiny_net.eval()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ee = exitkit.attach(tiny_net, images())
        found.append((ee.boundaries, ee.taps, ee(images(3)).logits[-1].tolist()))
    assert found[0] == found[1]


# --- features -----------------------------------------------------------------------------------------------------


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
    assert all_equal(staged(ee.lower(), x), [*untouched_features(written_into, x), written_into(x)])


def test_only_a_feature_that_is_written_into_is_copied(written_into: WrittenInto) -> None:
    assert [tap.clone for tap in exitkit.attach(written_into, images()).taps] == [True] * 3
    assert [tap.clone for tap in exitkit.attach(WrittenInto(inplace=False), images()).taps] == [False] * 3


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
    """nn.TransformerEncoderLayer leaves its fast path when it has hooks; the taps must not make a difference."""

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
    assert {logits.dtype for logits in ee(images(3).to(dtype)).logits} == {dtype}


def test_inputs_by_keyword(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, {"x": images()}).eval()
    assert torch.equal(ee(x=images(3)).logits[-1], tiny_net(images(3)))


def test_one_example_row_is_enough(tiny_net: TinyNet) -> None:
    assert names(exitkit.attach(tiny_net, images(1))) == ["blocks.0", "blocks.1", "blocks.2"]


# --- placements ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet50() -> Anatomy:
    torchvision_models = pytest.importorskip("torchvision.models")
    model = torchvision_models.resnet50(weights=None)
    return exitkit.inspect(model, images(channels=3, height=32, width=32), show=False).anatomy


def indices(anatomy: Anatomy, **arguments: Any) -> list[int]:
    return [anatomy.blocks.index(boundary) for boundary in place(anatomy, **arguments)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, list(range(15))), (2, [1, 3, 5, 7, 9, 11, 13]), (3, [2, 5, 8, 11, 14]), (8, [7]), (15, [14])],
)
def test_every_counts_blocks_and_never_takes_the_last(resnet50: Anatomy, every: int, expected: list[int]) -> None:
    assert indices(resnet50, every=every) == expected


def test_dense_sparse(resnet50: Anatomy) -> None:
    assert indices(resnet50, placement="dense-sparse") == [1, 2, 3, 4, 5, 6, 7, 11]


def test_sparse_dense(resnet50: Anatomy) -> None:
    assert indices(resnet50, placement="sparse-dense") == [1, 4, 8, 9, 10, 11, 12, 13, 14]


def test_at_cost_takes_the_nearest_block(resnet50: Anatomy) -> None:
    shares = torch.tensor([block.share for block in resnet50.blocks[:-1]])
    wanted = [0.15, 0.3, 0.45, 0.9]
    assert indices(resnet50, at_cost=wanted) == [int((shares - share).abs().argmin()) for share in wanted]


def test_at_cost_by_hand(tiny_net: TinyNet) -> None:
    """Shares of the blocks: about 26, 51, 75 and 100%."""
    assert names(exitkit.attach(tiny_net, images(), at_cost=[0.7, 0.3])) == ["blocks.0", "blocks.2"]


def test_at_cost_never_takes_a_block_twice(tiny_net: TinyNet) -> None:
    assert names(exitkit.attach(tiny_net, images(), at_cost=[0.5, 0.5])) in (
        ["blocks.0", "blocks.1"],
        ["blocks.1", "blocks.2"],
    )


def test_every_block_by_default(tiny_net: TinyNet) -> None:
    assert names(exitkit.attach(tiny_net, images())) == ["blocks.0", "blocks.1", "blocks.2"]


def test_at_orders_by_execution_and_takes_each_once(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, images(), at=["blocks.2", "stem", "blocks.2"])
    assert names(ee) == ["stem", "blocks.2"]


def test_at_takes_the_name_of_any_call_that_ends_there(tiny_net: TinyNet) -> None:
    """``blocks`` ends with its last child."""
    assert names(exitkit.attach(tiny_net, images(), at=["blocks"])) == ["blocks.3"]


def test_no_boundary_inside_a_residual_block(tiny_net: TinyNet) -> None:
    found = exitkit.inspect(tiny_net, images(), show=False).boundaries
    inside = [name for boundary in found for name in (boundary.name, *boundary.aliases) if ".conv" in name]
    assert inside == []


# --- layouts and read-outs ----------------------------------------------------------------------------------------


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
    assert ee.masks == ("mask", "mask")


def test_a_mask_given_by_position_is_found() -> None:
    ee = exitkit.attach(Tokens("masked"), (torch.randn(2, 5, 4), torch.ones(2, 5))).eval()
    assert ee.masks == (1, 1)
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


def test_an_exit_on_a_class_token_sees_no_other() -> None:
    ee = exitkit.attach(Tokens("first"), torch.randn(2, 5, 4), head="1L", method="sdn").eval()
    output = ee(torch.randn(3, 5, 4))
    assert torch.equal(output.logits[0], ee.classifiers[0].linear(output.features[0][:, 0]))


# --- context carried across the cuts ------------------------------------------------------------------------------


class Text(nn.Module):
    """Everything a cut must carry: a mask, its float bias, positions, the sequence length and the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.places = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(TextLayer() for _ in range(4))
        self.linear = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length = input_ids.shape
        bias = (1 - attention_mask[:, None, :].float()) * -1e4
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        x = self.words(input_ids) + self.places(torch.arange(length))
        for layer in self.layers:
            x = layer(x, bias - 0.1 * distance.abs(), batch, length)
        logits: Tensor = self.linear((x * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True))
        return logits


class TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor, batch: int, length: int) -> Tensor:
        query, key, value = (layer(x).view(batch, length, 2, 4).transpose(1, 2) for layer in self.projections())
        weights = (query @ key.transpose(2, 3) + bias.unsqueeze(1)).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, 8)
        return x + torch.tanh(self.out(mixed)) / length

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.query, self.key, self.value


def text(batch: int, length: int, padded: bool) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[:, length // 2 :] = 0
        mask[0] = 1
    return {"attention_mask": mask, "input_ids": torch.randint(0, 50, (batch, length))}


@pytest.fixture(scope="module")
def text_ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return exitkit.attach(Text(), text(2, 10, padded=True), method="sdn").eval()


@pytest.fixture(scope="module")
def text_stages(text_ee: exitkit.MultiExitModel) -> Lowered:
    return text_ee.lower()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [2, 6, 19])
@pytest.mark.parametrize("batch", [1, 4])
def test_mask_and_length_are_carried(
    text_ee: exitkit.MultiExitModel, text_stages: Lowered, batch: int, length: int, padded: bool
) -> None:
    inputs = text(batch, length, padded)
    with torch.no_grad():
        output = text_ee(**inputs)
        expected = text_ee.backbone(**inputs)
    assert all_equal(staged(text_stages, *inputs.values()), [*output.features, expected])


def test_a_stage_reads_the_feature_first_and_the_context_after_it(
    text_ee: exitkit.MultiExitModel, text_stages: Lowered
) -> None:
    assert text_stages.stages[1].inputs[0] == text_ee.boundaries[0].node
    assert len(text_stages.stages[1].inputs) > 1


def test_samples_may_leave_between_stages(text_ee: exitkit.MultiExitModel, text_stages: Lowered) -> None:
    """No stage remembers how many samples entered an earlier one."""
    inputs = text(4, 10, padded=True)
    values = {"tensors_0": inputs["attention_mask"], "tensors_1": inputs["input_ids"]}
    with torch.no_grad():
        for stage in text_stages.stages:
            outputs = stage.module(*(values[name] for name in stage.inputs))
            values.update(zip(stage.outputs, outputs, strict=True))
            values = {
                name: value[1:2] if isinstance(value, Tensor) and value.shape[:1] == (4,) else value
                for name, value in values.items()
            }
        expected = text_ee.backbone(**inputs)[1:2]
    assert torch.allclose(values[text_stages.stages[-1].outputs[0]], expected, atol=1e-6)


def test_context_computed_from_an_input_is_no_activation() -> None:
    """The brightness is alive all the way through, but only x is what a head can read."""

    class Brightness(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            brightness = x.mean((1, 2, 3), keepdim=True)
            x = self.stem(x)
            for block in self.blocks:
                x = block(x) * brightness
            logits: Tensor = self.linear(x.mean((2, 3)))
            return logits

    ee = exitkit.attach(Brightness().eval(), images()).eval()
    x = images(5)
    assert names(ee) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all_equal(staged(ee.lower(), x), [*ee(x).features, ee.backbone(x)])


# --- costs --------------------------------------------------------------------------------------------------------

STEM = 8 * 8 * 9 * 1 * 8
BLOCK = 2 * 8 * 8 * 9 * 8 * 8
LINEAR = 8 * 3
TOTAL = STEM + 4 * BLOCK + LINEAR
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


# --- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_lists_name_type_shape_macs_and_share(tiny_net: TinyNet) -> None:
    text = str(exitkit.inspect(tiny_net, images(), show=False))
    rows = [line for line in text.splitlines() if "blocks." in line]
    assert len(rows) == 4
    for index, row in enumerate(rows):
        for part in (
            f"blocks.{index}",
            "TinyBlock",
            "8 \u00d7 8 \u00d7 8",
            f"{(STEM + (index + 1) * BLOCK) / 1e6:.1f}",
            "%",
        ):
            assert part in row
    assert "TinyNet" in text
    assert f"{TOTAL / 1e6:.2f} MMACs" in text


def test_inspect_prints_its_table(tiny_net: TinyNet, capsys: pytest.CaptureFixture[str]) -> None:
    exitkit.inspect(tiny_net, images())
    assert "blocks.3" in capsys.readouterr().out


def test_inspect_can_be_silent(tiny_net: TinyNet, capsys: pytest.CaptureFixture[str]) -> None:
    str(exitkit.inspect(tiny_net, images(), show=False))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_inspect_names_a_long_path_in_one_piece() -> None:
    """A name must be there to be copied into ``at=``."""
    model = nn.Sequential(OrderedDict(a_rather_long_name_of_an_encoder=TinyNet()))
    inspection = exitkit.inspect(model, images(), show=False)
    assert all(block.name in str(inspection) for block in inspection.blocks)


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_example_inputs_of_torchvision_are_inferred(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    assert exitkit.surgery.examples.example_for(models.get_model(name)).tensors[0].shape == (2, 3, 224, 224)


def test_example_inputs_of_timm_are_inferred() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("convnext_atto", pretrained=False, in_chans=1)
    assert exitkit.surgery.examples.example_for(model).tensors[0].shape[:2] == (2, 1)


def test_example_text_is_inferred_with_a_padded_mask() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    example = exitkit.surgery.examples.example_for(transformers.DistilBertForSequenceClassification(config))
    mask, ids = example.tensors
    assert example.spec.keys == ("attention_mask", "input_ids")
    assert mask.shape == ids.shape
    assert 0 < mask.float().mean() < 1
    assert torch.equal(ids == config.pad_token_id, mask == 0)


# --- refusals -----------------------------------------------------------------------------------------------------


class CallCount(nn.Module):
    """Depends on Python state: how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Faulty(TinyNet):
    """A fault after the block ``index``, inside a list of (block, fault) pairs."""

    def __init__(self, fault: nn.Module, index: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(block, fault) if i == index else block for i, block in enumerate(self.blocks))
        )


@pytest.mark.parametrize("fault", [Noise, CallCount])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_forward_the_capture_cannot_see_is_refused_by_name(fault: type[nn.Module], index: int) -> None:
    with pytest.raises(ExitkitError, match=rf"refused.*module 'blocks\.{index}.*(random|state)"):
        exitkit.attach(Faulty(fault(), index), images(), at=["blocks.0", "blocks.1", "blocks.2"])


@pytest.mark.parametrize("fault", [Noise, CallCount])
def test_a_fault_after_the_last_exit_is_refused_too(fault: type[nn.Module]) -> None:
    with pytest.raises(ExitkitError, match=r"refused.*logits.*(random|state)"):
        exitkit.attach(Faulty(fault(), 3), images())


def test_a_branch_on_the_batch_size_is_refused() -> None:
    class Branch(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] == 2 else -super().forward(x)

    with pytest.raises(ExitkitError, match=r"Branch.*batch"):
        exitkit.attach(Branch(), images())


# --- any small backbone -------------------------------------------------------------------------------------------


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
