"""Permutations derived, verified and matched; paths and planes between models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from exitkit.analysis import Connectivity, Plane, align, connectivity, plane
from exitkit.analysis.permutations.deriving import Symmetries, at_random, symmetries_of
from exitkit.analysis.permutations.matching import aligned
from exitkit.models import cifar_resnet
from tests.toy import TinyNet, noisy


def mlp() -> exitkit.MultiExitModel:
    layers = [nn.Flatten(), *(nn.Sequential(nn.Linear(width, 20), nn.ReLU()) for width in (12, 20, 20))]
    return exitkit.attach(nn.Sequential(*layers, nn.Linear(20, 4)), torch.randn(2, 3, 4), method="ztw")


def resnet_a() -> exitkit.MultiExitModel:
    return exitkit.attach(cifar_resnet(8), torch.zeros(2, 3, 32, 32), every=1, method="ztw", head="2L-16")


def resnet_b() -> exitkit.MultiExitModel:
    resnet = pytest.importorskip("torchvision.models.resnet")
    backbone = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    return exitkit.attach(backbone, torch.zeros(2, 3, 32, 32), every=1, method="sdn", head="conv")


class Vgg(nn.Module):
    """Convolutions with BatchNorm and pools, then maps flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 8), (8, 12), (12, 16)]
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
                for i, o in widths
            )
        )
        self.classifier = nn.Sequential(nn.Linear(16 * 4, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).flatten(1))
        return out


def vgg() -> exitkit.MultiExitModel:
    return exitkit.attach(Vgg(), torch.zeros(2, 3, 16, 16), method="sdn")


def mobilenet() -> exitkit.MultiExitModel:
    models = pytest.importorskip("torchvision.models")
    setting = [[1, 8, 1, 1], [6, 12, 2, 2], [6, 16, 2, 2]]
    backbone = models.MobileNetV2(num_classes=5, inverted_residual_setting=setting, width_mult=0.5)
    return exitkit.attach(backbone, torch.zeros(2, 3, 32, 32), every=2, method="sdn", head="2L-8")


def vit() -> exitkit.MultiExitModel:
    models = pytest.importorskip("timm.models")
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    backbone = models.VisionTransformer(**sizes, mlp_ratio=2, num_classes=5)
    return exitkit.attach(backbone, torch.zeros(2, 3, 16, 16), every=1, method="ztw", head="1L")


def bert() -> exitkit.MultiExitModel:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=50, num_labels=3)
    backbone = transformers.BertForSequenceClassification(config).eval()
    return exitkit.attach(backbone, every=1, method="pbee")


MODELS = [mlp, resnet_a, resnet_b, vgg, mobilenet, vit, bert]


def different(ee: exitkit.MultiExitModel) -> exitkit.MultiExitModel:
    """With other statistics and norms than a fresh model's, so that no two channels are alike."""
    with torch.no_grad():
        for name, value in ee.state_dict().items():
            if value.is_floating_point() and value.dim() < 2:
                value += torch.rand_like(value) * (1.0 if "running_var" in name else 0.3)
    return ee.eval()


def shuffled(ee: exitkit.MultiExitModel, symmetries: Symmetries, seed: int = 0) -> exitkit.MultiExitModel:
    generator = np.random.default_rng(seed)
    moves = {number: at_random(group, generator) for number, group in enumerate(symmetries.groups)}
    made = copy.deepcopy(ee)
    made.load_state_dict(symmetries.moved(ee.state_dict(), moves))
    return made


def answers(ee: exitkit.MultiExitModel) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    tensors = tuple(
        torch.randn(one.shape, generator=generator) if one.is_floating_point() else one for one in ee.example.tensors
    )
    args, kwargs = ee.example.spec.call(tensors)
    with torch.no_grad():
        return ee(*args, **kwargs).logits


@pytest.mark.parametrize("build", MODELS)
def test_a_random_permutation_changes_no_answer_and_is_matched_back(
    build: Callable[[], exitkit.MultiExitModel],
) -> None:
    ee = different(build())
    symmetries = symmetries_of(ee)
    assert not symmetries.frozen
    other = shuffled(ee, symmetries)
    moved = [name for name, value in ee.state_dict().items() if not torch.equal(value, other.state_dict()[name])]
    assert any("weight" in name for name in moved)
    for one, wanted in zip(answers(other), answers(ee), strict=True):
        assert torch.allclose(one, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    found = aligned(ee, other, symmetries, 0, 0)
    assert found.before > 0
    assert found.after == 0
    assert all(torch.equal(value, found.state[name]) for name, value in ee.state_dict().items())


def units(symmetries: Symmetries, name: str, axis: int) -> list[int]:
    """How many units of each group stand along an axis."""
    return [group.units for group in symmetries.groups if any((name, axis) in part.indices for part in group.parts)]


def test_padded_shortcuts_tie_the_middle_channels_alone() -> None:
    """Option A: of stage 2's 32 channels the middle 16 are stage 1's, the others are free among themselves."""
    symmetries = symmetries_of(resnet_a())
    assert units(symmetries, "backbone.conv1.weight", 0) == [16]
    assert sorted(units(symmetries, "backbone.layer2.0.conv2.weight", 0)) == [16, 16]
    assert sorted(units(symmetries, "backbone.layer3.0.conv2.weight", 0)) == [16, 16, 32]
    (shared,) = (
        part.indices
        for group in symmetries.groups
        for part in group.parts
        if ("backbone.conv1.weight", 0) in part.indices
    )
    assert sorted(shared["backbone.layer2.0.bn2.weight", 0].ravel().tolist()) == list(range(8, 24))
    assert ("backbone.layer2.0.bn2.running_var", 0) in shared
    assert not units(symmetries, "backbone.linear.weight", 0)  # classes stay
    assert not units(symmetries, "backbone.conv1.weight", 1)  # colours stay


def test_flattened_maps_move_in_blocks() -> None:
    (part,) = (
        part
        for group in symmetries_of(vgg()).groups
        for part in group.parts
        if ("backbone.classifier.0.weight", 1) in part.indices
    )
    assert part.indices["backbone.classifier.0.weight", 1].reshape(16, 4).tolist() == [
        [4 * channel + place for place in range(4)] for channel in range(16)
    ]


def test_heads_move_whole_and_their_channels_within() -> None:
    (heads,) = (g for g in symmetries_of(vit()).groups if "backbone.blocks.0.attn.qkv.bias" in g.tensors)
    assert heads.units == 3
    assert sorted(part.elements for part in heads.parts) == [8, 8]
    both = [part.indices["backbone.blocks.0.attn.qkv.weight", 0] for part in heads.parts]
    queries, values = sorted((one.reshape(3, 8, -1) for one in both), key=lambda one: -one.shape[2])
    assert queries[1, 0].tolist() == [8, 24 + 8]  # the same channel of q and of k
    assert values[2, 3].tolist() == [48 + 16 + 3]


class Odd(nn.Module):
    """A grouped convolution, an unknown operator, and halves of channels that are treated differently."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.mixed = nn.Conv2d(8, 8, 1)
        self.sorted = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(torch.relu(self.grouped(self.stem(x))))
        x = torch.cat([torch.relu(x[:, :3]), torch.tanh(x[:, 3:])], 1)
        x = torch.sort(self.sorted(x), dim=1).values
        out: Tensor = self.last(x.mean((2, 3)))
        return out


def test_what_is_not_understood_stays_and_is_listed() -> None:
    symmetries = symmetries_of(exitkit.attach(Odd(), torch.zeros(2, 1, 6, 6), at=["stem"], method="sdn"))
    listed = " ".join(symmetries.frozen)
    assert "grouped convolution" in listed
    assert "sort" in listed
    assert not units(symmetries, "backbone.stem.weight", 0)
    assert sorted(units(symmetries, "backbone.mixed.weight", 0)) == [3, 5]
    assert not units(symmetries, "backbone.sorted.weight", 0)


@pytest.mark.parametrize("every", [1, 2])
def test_the_state_of_past_future_exits_stays_in_its_order_and_is_listed(every: int) -> None:
    ee = exitkit.attach(TinyNet(), torch.zeros(2, 1, 8, 8), every=every, method="gpf")
    symmetries = symmetries_of(ee)
    assert "classifiers.0.shared" in " ".join(symmetries.frozen)
    moved = {axis for group in symmetries.groups for part in group.parts for axis in part.indices}
    state = {name for name, _ in ee.named_parameters() if "shared" in name or name.endswith("state.bias")}
    assert state
    assert not {name for name, _ in moved} & state
    assert all(axis == 1 for name, axis in moved if name.endswith("state.weight"))  # the backbone's channels


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from exitkit.analysis.permutations import operators

    monkeypatch.setattr(operators, "SAME", operators.SAME | {"sort", "cumsum"})

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.layers[1](torch.cumsum(self.layers[0](x), 1)))
            return out

    symmetries = symmetries_of(exitkit.attach(Summed(), torch.zeros(2, 4), at=["layers.1"], method="sdn"))
    assert "changes the answers" in " ".join(symmetries.frozen)
    assert not units(symmetries, "backbone.layers.0.weight", 0)
    assert units(symmetries, "backbone.layers.1.weight", 0) == [6]


def test_nothing_to_permute_is_an_answer() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).sort(1).values
            return x

    ee = exitkit.attach(Sorted(), torch.zeros(2, 4), at=["layers.0"], method="sdn")
    with pytest.warns(UserWarning, match="nothing in this model can be permuted"):
        found = connectivity(ee, ee, [(torch.randn(4, 4), torch.arange(4) % 3)], points=2)
    assert found.groups == 0
    assert found.barrier.max() == 0


WIDTH = st.integers(2, 6)


@st.composite
def backbones(draw: st.DrawFn) -> nn.Module:
    """Residual blocks of every kind, in any order, with widths that change by padding, by convolution or by concatenation."""
    channels = draw(WIDTH)
    blocks: list[nn.Module] = [nn.Conv2d(2, channels, 3, padding=1)]
    for _ in range(draw(st.integers(2, 4))):
        block = Block(channels, draw(st.sampled_from(sorted(KINDS))), draw(WIDTH), draw(st.booleans()))
        blocks.append(block)
        channels = block.out
    return Blocks(blocks, channels)


KINDS = {"residual", "depthwise", "pad", "cat", "split", "gate", "norm", "attention", "flip", "max"}


class Block(nn.Module):
    def __init__(self, channels: int, kind: str, width: int, normed: bool) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.into = nn.Conv2d(channels, channels if kind == "depthwise" else width, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels if kind == "depthwise" else width) if normed else nn.Identity()
        inner = channels if kind == "depthwise" else width
        self.depth = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.back = nn.Conv2d(inner, channels, 1)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.layer = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * 2 * width)
        self.merge = nn.Linear(2 * width, channels)
        self.out = {"pad": channels + 3, "cat": channels + width, "split": channels}.get(kind, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.into(x)))
        if self.kind == "depthwise":
            return x + self.back(self.depth(y))
        if self.kind == "pad":
            return F.pad(x, (0, 0, 0, 0, 1, 2))
        if self.kind == "cat":
            return torch.cat([y, x], 1)
        if self.kind == "split":
            half = x.shape[1] // 2
            return torch.cat([x[:, half:], torch.tanh(x[:, :half])], 1)
        if self.kind == "gate":
            return x * torch.sigmoid(self.back(y.mean((2, 3), keepdim=True))) * self.scale
        if self.kind == "norm":
            return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + self.back(y)
        if self.kind == "attention":
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).unflatten(2, (3, 2, self.width)).permute(2, 0, 3, 1, 4)
            mixed = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
            return x + self.merge(mixed).transpose(1, 2).reshape(x.shape)
        if self.kind == "flip":
            return x + self.back(y).flip(1)
        return torch.maximum(x, self.back(y)) / (1 + x.square().mean(1, keepdim=True))


class Blocks(nn.Module):
    def __init__(self, blocks: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Linear(channels * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.adaptive_avg_pool2d(self.blocks(x), 2).flatten(1))
        return out


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(backbone=backbones(), seed=st.integers(0, 2**16))
def test_no_derived_specification_changes_the_function(backbone: nn.Module, seed: int) -> None:
    ee = different(
        exitkit.attach(backbone, torch.zeros(2, 2, 4, 4), at=["blocks.0", "blocks.1"], method="sdn")
    ).double()
    symmetries = symmetries_of(ee)
    assert not [one for one in symmetries.frozen if "changes the answers" in one]
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        before, after = ee(x).logits, shuffled(ee, symmetries, seed)(x).logits
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-8 * float(one.abs().max()))


def test_aligning_keeps_the_function_and_starts_from_the_identity(tiny_ee: exitkit.MultiExitModel) -> None:
    a, b = noisy(tiny_ee), noisy(copy.deepcopy(tiny_ee))
    with torch.no_grad():
        for parameter in b.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    before = {name: value.clone() for name, value in b.state_dict().items()}
    made = align(a, b)
    assert all(torch.equal(value, before[name]) for name, value in b.state_dict().items())
    for one, other in zip(answers(made), answers(b), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())  # nothing is nearer


def data(samples: int = 48) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 3) for _ in range(samples // 16)]


@pytest.fixture(scope="module")
def pair() -> tuple[exitkit.MultiExitModel, exitkit.MultiExitModel]:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ee = exitkit.attach(TinyNet(), torch.randn(2, 1, 8, 8), every=1, method="ztw")
        made.append(different(ee))
    return made[0], made[1]


def test_the_ends_of_a_path_are_the_models(pair: tuple[exitkit.MultiExitModel, exitkit.MultiExitModel]) -> None:
    a, b = pair
    before = [{name: value.clone() for name, value in ee.state_dict().items()} for ee in pair]
    found = connectivity(a, b, data(), points=5, align=False, reset_batchnorm=False)
    inputs, labels = (torch.cat(part) for part in zip(*data(), strict=True))
    for at, ee in ((0, a), (-1, b)):
        with torch.no_grad():
            output = ee(inputs)
        assert found.loss[at] == pytest.approx([float(F.cross_entropy(one, labels)) for one in output.heads], rel=1e-5)
        assert found.error[at].tolist() == [float((one.argmax(1) != labels).double().mean()) for one in output.logits]
    swapped = connectivity(b, a, data(), points=5, align=False, reset_batchnorm=False)
    assert swapped.loss[[0, -1]].tolist() == found.loss[[-1, 0]].tolist()
    for ee, state in zip(pair, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in ee.state_dict().items())


def test_a_permuted_copy_has_no_barrier_once_aligned(
    pair: tuple[exitkit.MultiExitModel, exitkit.MultiExitModel],
) -> None:
    a, _ = pair
    other = shuffled(a, symmetries_of(a))
    found = connectivity(a, other, data(), points=5)
    assert found.distance == 0 < found.distance_before
    assert np.ptp(found.loss, axis=0).max() < 1e-9
    assert found.barrier.max() < 1e-9
    apart = connectivity(a, other, data(), points=5, align=False)
    assert apart.barrier.max() > 1e-3  # a million times what is left once aligned
    assert apart.groups == 0
    assert not apart.aligned


def test_the_barrier_by_hand(pair: tuple[exitkit.MultiExitModel, exitkit.MultiExitModel]) -> None:
    found = connectivity(*pair, data(), points=3, align=False)
    straight = (found.loss[0] + found.loss[2]) / 2
    assert found.barrier == pytest.approx(np.maximum(found.loss[1] - straight, 0))
    assert found.objective == pytest.approx(found.loss.sum(1))


def test_reset_statistics_are_those_of_the_samples(
    pair: tuple[exitkit.MultiExitModel, exitkit.MultiExitModel],
) -> None:
    """At the ends too: the same as a model whose BatchNorm normalises by the whole batch."""
    ((inputs, labels),) = data(16)
    found = connectivity(*pair, [(inputs, labels)], points=2, align=False)
    twin = copy.deepcopy(pair[0])
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        expected = [float(F.cross_entropy(one, labels)) for one in twin(inputs).heads]
    assert found.loss[0] == pytest.approx(expected, rel=1e-2)  # running variances are unbiased ones
    assert found.batchnorm_reset


def test_a_plane_holds_the_three_models(
    pair: tuple[exitkit.MultiExitModel, exitkit.MultiExitModel], tmp_path: Path
) -> None:
    a, b = pair
    c = copy.deepcopy(a)
    with torch.no_grad():
        for parameter, other in zip(c.parameters(), b.parameters(), strict=True):
            parameter += 0.5 * (other - parameter) + 0.3 * torch.randn_like(parameter)
    found = plane(a, b, c, data(16), points=4, margin=0.0, align=False, reset_batchnorm=False)
    ((inputs, labels),) = data(16)
    with torch.no_grad():
        own = [[float(F.cross_entropy(one, labels)) for one in ee(inputs).heads] for ee in (a, b)]
    assert found.places[:2].tolist() == [[0, 0], [1, 0]]
    assert found.loss[0, 0] == pytest.approx(own[0], rel=1e-4)
    assert found.loss[-1, 0] == pytest.approx(own[1], rel=1e-4)
    vectors = [torch.cat([p.detach().flatten() for p in ee.parameters()]).double() for ee in (a, b, c)]
    unit = float((vectors[1] - vectors[0]).norm())
    assert float((vectors[2] - vectors[0]).norm()) / unit == pytest.approx(float(np.hypot(*found.places[2])))
    found.save(tmp_path / "p.safetensors")
    assert np.array_equal(Plane.load(tmp_path / "p.safetensors").loss, found.loss)
    found.plot(tmp_path / "p.png")
    with pytest.raises(exitkit.ArgumentError, match="one line"):
        plane(a, b, b, data(16), points=2, align=False)


def test_files_tables_and_pictures(
    pair: tuple[exitkit.MultiExitModel, exitkit.MultiExitModel], tmp_path: Path
) -> None:
    found = connectivity(*pair, data(), points=3)
    found.save(tmp_path / "c.safetensors")
    again = Connectivity.load(tmp_path / "c.safetensors")
    assert np.array_equal(again.loss, found.loss)
    assert (again.frozen, again.aligned, str(again.table())) == (found.frozen, True, str(found.table()))
    found.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_models_that_differ_are_refused_with_the_first_difference(tiny_ee: exitkit.MultiExitModel) -> None:
    fewer = exitkit.attach(TinyNet(), torch.randn(2, 1, 8, 8), every=2, method="ztw")
    with pytest.raises(exitkit.ArgumentError, match=r"differ in 'classifiers\.1"):
        connectivity(tiny_ee, fewer, data())
    wider = exitkit.attach(TinyNet(5), torch.randn(2, 1, 8, 8), every=1, method="ztw")
    with pytest.raises(exitkit.ArgumentError, match=r"backbone\.linear\.weight"):
        align(tiny_ee, wider)
    with pytest.raises(exitkit.ArgumentError, match="attach"):
        align(tiny_ee, TinyNet())  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_is_named_with_its_place(tiny_ee: exitkit.MultiExitModel) -> None:
    broken = copy.deepcopy(tiny_ee)
    with torch.no_grad():
        broken.classifiers[1].linear.weight[0, 0] = torch.nan
    with pytest.raises(exitkit.ArgumentError, match=r"exit 1 is nan at λ=0\.5"):
        connectivity(tiny_ee, broken, data(), points=3, align=False)


def test_half_precision_is_measured_in_float32(tiny_ee: exitkit.MultiExitModel) -> None:
    with pytest.warns(UserWarning, match="float32"):
        found = connectivity(tiny_ee.half(), tiny_ee, data(16), points=2, align=False)
    assert found.barrier.max() == 0
    assert tiny_ee.dtype == torch.float16


@pytest.mark.parametrize("build", [resnet_b, vgg, mobilenet])
def test_groups_are_those_of_torch_pruning(build: Callable[[], exitkit.MultiExitModel]) -> None:
    """Which channels must be pruned together and which can be permuted together is one question; it answers the first."""
    pruning = pytest.importorskip("torch_pruning")
    ee = build()
    names = {id(module): name for name, module in ee.backbone.named_modules()}
    graph = pruning.DependencyGraph().build_dependency(ee.backbone.eval(), example_inputs=ee.example.tensors[0])
    theirs = []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        pairs = [(names.get(id(dep.target.module)), dep.handler.__name__) for dep, _ in group]
        axes = {(f"backbone.{name}.weight", int("in_channels" in handler)) for name, handler in pairs if name}
        depthwise = {name for name, axis in axes if ee.state_dict()[name].shape[1:2] == (1,)}
        theirs.append({(name, axis) for name, axis in axes if not (axis and name in depthwise)})
    ours = [
        {
            axis
            for part in group.parts
            for axis in part.indices
            if axis[0].endswith(".weight") and "backbone" in axis[0]
        }
        for group in symmetries_of(ee).groups
    ]
    last = [name for name, module in ee.backbone.named_modules() if isinstance(module, nn.Linear)][-1]
    theirs = [one for one in theirs if one != {(f"backbone.{last}.weight", 0)}]  # the classes
    assert sorted(map(sorted, theirs)) == sorted(sorted(one) for one in ours if one)
