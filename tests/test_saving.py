"""What is saved, what comes back, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import exitkit
from exitkit import ExitkitError, FileError, MultiExitModel
from exitkit.methods.policy import ExitPolicy, Guarantee
from tests.saved_exits import edit, replace_weights, weights_file
from tests.toy import TinyNet, all_equal, images

METHOD = asdict(exitkit.ZTW())
POLICY = asdict(ExitPolicy((0.5, 0.5, 0.5), "confidence"))
Loader = Callable[..., DataLoader[tuple[Tensor, ...]]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiExitModel, Path]:
    """Exits and where they were saved, once for all tests, which change neither."""
    torch.manual_seed(0)
    ee, folder = exitkit.attach(TinyNet(), images()), tmp_path_factory.mktemp("exits")
    shuffle(ee)
    ee.save_pretrained(folder)
    return ee, folder


@pytest.fixture
def ee(kept: tuple[MultiExitModel, Path]) -> MultiExitModel:
    """The exits that were saved."""
    return kept[0]


@pytest.fixture
def saved(kept: tuple[MultiExitModel, Path], tmp_path: Path) -> Path:
    """A copy of the saved folder, for this test to break."""
    return shutil.copytree(kept[1], tmp_path / "exits")


@pytest.fixture
def backbone(ee: MultiExitModel) -> TinyNet:
    """A copy of the backbone that the exits were saved with."""
    copy: TinyNet = deepcopy(ee.backbone)
    return copy


def shuffle(ee: MultiExitModel) -> None:
    """Exits that no fresh ``attach`` gives."""
    for parameter in ee.added_parameters():
        nn.init.normal_(parameter)


def answers(ee: MultiExitModel, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return ee.eval()(*args, **kwargs).logits


# What comes back.


def test_loaded_exits_answer_bit_for_bit_alike(ee: MultiExitModel, saved: Path) -> None:
    again = MultiExitModel.from_pretrained(ee.backbone, saved)
    assert all_equal(answers(ee, images(5)), answers(again, images(5)))
    assert again.method == ee.method
    assert again.exits == ee.exits


def test_only_what_was_added_is_saved(ee: MultiExitModel, saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {weights_file(saved).name, "config.json", "README.md"}
    kept = load_file(weights_file(saved))
    assert all(name.startswith(("classifiers.", "combiners.")) for name in kept)
    statistics = sum(buffer.numel() for buffer in ee.classifiers.buffers())
    assert (
        sum(tensor.numel() for tensor in kept.values()) == sum(p.numel() for p in ee.added_parameters()) + statistics
    )


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_files_of_others_are_not_written_over(ee: MultiExitModel, tmp_path: Path, name: str) -> None:
    """A backbone's own save_pretrained writes a config.json too, without which it cannot be loaded."""
    (tmp_path / name).write_text('{"model_type": "bert"}')
    with pytest.raises(ExitkitError, match=f"holds a {re.escape(name)} that is not of exits, and would be lost"):
        ee.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"model_type": "bert"}'


def test_every_part_of_a_method_comes_back(tiny_net: TinyNet, tmp_path: Path) -> None:
    method = exitkit.ZTW(ensemble="additive", ensemble_final=True, criterion="margin")
    ee = exitkit.attach(tiny_net, images(), at=["blocks.1"], method=method, head="2L-5")
    ee.save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(tiny_net, tmp_path)
    assert (again.method, again.head) == (method, "2L-5")


def test_the_threshold_comes_back_and_is_kept(tiny_ee: MultiExitModel, tmp_path: Path) -> None:
    assert tiny_ee.threshold is None
    tiny_ee.save_pretrained(tmp_path / "first", threshold=0.1 + 0.2)
    first = MultiExitModel.from_pretrained(tiny_ee.backbone, tmp_path / "first")
    assert first.threshold == 0.1 + 0.2
    first.save_pretrained(tmp_path / "second")
    assert MultiExitModel.from_pretrained(tiny_ee.backbone, tmp_path / "second").threshold == 0.1 + 0.2


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), "0.5", True])
def test_a_threshold_that_is_no_number_writes_nothing(tiny_ee: MultiExitModel, tmp_path: Path, threshold: Any) -> None:
    with pytest.raises(ExitkitError, match=r"threshold.*must be (finite|a number)"):
        tiny_ee.save_pretrained(tmp_path / "exits", threshold=threshold)
    assert not (tmp_path / "exits").exists()


# The card.


def test_the_card_tells_what_was_measured(tiny_ee: MultiExitModel, tmp_path: Path, loader: Loader) -> None:
    outputs = exitkit.collect(tiny_ee, loader(96))
    point = outputs.curve().at_budget(1.0)
    tiny_ee.save_pretrained(tmp_path, threshold=point.threshold, outputs=outputs)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.tags, card.data.metrics) == ("exitkit", ["early-exit"], ["accuracy"])
    for m, (exit_, accuracy) in enumerate(zip(tiny_ee.exits, outputs.accuracy(), strict=True)):
        assert f"| {m} | `{exit_.name}` | {exit_.macs_fraction:.1%} | {accuracy:.2%} |" in card.text
    assert f"| τ as chosen | {point.accuracy:.2%} | {point.cost:.1%} | {point.threshold:.6g} |" in card.text
    assert f"| Max (no limit) | {outputs.accuracy()[-1]:.2%} |" in card.text
    assert "On 96 samples" in card.text
    metrics = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["accuracy"] == outputs.accuracy().tolist()
    assert metrics["at_threshold"] == point.to_dict()


def test_the_card_of_unmeasured_exits_claims_nothing(saved: Path, ee: MultiExitModel) -> None:
    card = ModelCard.load(saved / "README.md")
    assert card.data.metrics is None
    assert "accuracy" not in card.content
    assert f"| 1 | `blocks.1` | {ee.exits[1].macs_fraction:.1%} |" in card.text


def test_the_card_uses_the_criterion_of_the_method(tiny_net: TinyNet, tmp_path: Path, loader: Loader) -> None:
    ee = exitkit.attach(tiny_net, images(), method="pbee")
    outputs = exitkit.collect(ee, loader(96))
    ee.save_pretrained(tmp_path, threshold=1, outputs=outputs)
    point = outputs.curve("patience").at_threshold(1)
    assert f"| τ as chosen | {point.accuracy:.2%} | {point.cost:.1%} | 1 |" in (tmp_path / "README.md").read_text()


def test_outputs_that_do_not_belong_to_the_exits_write_nothing(
    tiny_ee: MultiExitModel, tmp_path: Path, loader: Loader
) -> None:
    other = exitkit.collect(exitkit.attach(tiny_ee.backbone, images(), every=2), loader(8))
    with pytest.raises(ExitkitError, match="outputs are of another model"):
        tiny_ee.save_pretrained(tmp_path / "exits", outputs=other)
    with pytest.raises(ExitkitError, match="labels=None"):
        tiny_ee.save_pretrained(tmp_path / "exits", outputs=exitkit.collect(tiny_ee, [images(4)]))
    with pytest.raises(ExitkitError, match="outputs is Curve"):
        tiny_ee.save_pretrained(tmp_path / "exits", outputs=exitkit.collect(tiny_ee, loader(8)).curve())  # type: ignore[arg-type]
    assert not (tmp_path / "exits").exists()


# Other backbones.


def test_another_shape_is_refused_with_the_first_difference(saved: Path) -> None:
    with pytest.raises(ExitkitError, match=r"another backbone: 'linear\.weight 3×8' there is 'linear\.weight 4×8' in"):
        MultiExitModel.from_pretrained(TinyNet(num_classes=4), saved)


def test_a_part_too_many_is_refused(backbone: TinyNet, saved: Path) -> None:
    backbone.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    backbone.extra2 = nn.Linear(1, 1)
    with pytest.raises(ExitkitError, match=r"'stem\.weight 8×1×3×3' there is 'extra 2'"):
        MultiExitModel.from_pretrained(backbone, saved)


@pytest.mark.parametrize("name", ["linear.bias", "blocks.2.norm.running_mean"])
def test_other_values_in_the_same_shapes_are_refused(backbone: TinyNet, saved: Path, name: str) -> None:
    with torch.no_grad():
        backbone.state_dict()[name].add_(0.1)
    with pytest.raises(
        ExitkitError, match=rf"another backbone: '{re.escape(name)} \d+' has other values in this TinyNet"
    ):
        MultiExitModel.from_pretrained(backbone, saved)


class Shared(nn.Module):
    """One layer called ``depth`` times (as ALBERT's): the same weights at every depth, and another network."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))])
        self.head = nn.Linear(6, 3)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.depth):
            x = self.layers[0](x)
        return self.head(x)


def test_another_graph_of_the_same_weights_is_refused(tmp_path: Path) -> None:
    deep, shallow = Shared(4), Shared(3)
    shallow.load_state_dict(deep.state_dict())
    exitkit.attach(deep, torch.randn(2, 4), at=["layers.0"]).save_pretrained(tmp_path)
    MultiExitModel.from_pretrained(deep, tmp_path)
    with pytest.raises(ExitkitError, match=r"'layers\.0@3 6' there is nothing in this Shared"):
        MultiExitModel.from_pretrained(shallow, tmp_path)


def test_another_input_size_is_refused(backbone: TinyNet, saved: Path) -> None:
    with pytest.raises(ExitkitError, match=r"'blocks\.0 8×8×8' there is 'blocks\.0 8×16×16'"):
        MultiExitModel.from_pretrained(backbone, saved, images(height=16, width=16))


def test_a_refused_backbone_stays_as_it_was(backbone: TinyNet, saved: Path) -> None:
    """Refused as late as can be, after exits were attached."""
    backbone.eval()
    state = deepcopy(backbone.state_dict())
    edit(saved, blocks={"blocks.0": "1"})
    with pytest.raises(ExitkitError):
        MultiExitModel.from_pretrained(backbone, saved)
    assert all_equal(list(state.values()), list(backbone.state_dict().values()))
    assert not any(module._forward_hooks or module.training for module in backbone.modules())


@pytest.mark.parametrize("given", [None, TinyNet, "resnet18"])
def test_what_is_no_backbone_is_refused(saved: Path, given: Any) -> None:
    with pytest.raises(ExitkitError, match=r"backbone is .*nn\.Module"):
        MultiExitModel.from_pretrained(given, saved)


def test_a_model_that_has_exits_is_no_backbone(ee: MultiExitModel, saved: Path) -> None:
    with pytest.raises(ExitkitError, match=r"exitkit\.detach"):
        MultiExitModel.from_pretrained(ee, saved)


# Precisions, ties, devices.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_exits_follow_the_backbone_into_another_precision(ee: MultiExitModel, saved: Path, dtype: torch.dtype) -> None:
    again = MultiExitModel.from_pretrained(deepcopy(ee.backbone).to(dtype), saved)
    for before, after in zip(ee.classifiers.parameters(), again.classifiers.parameters(), strict=True):
        assert torch.equal(before.to(dtype), after)
    assert all_equal(list(ee.combiners.parameters()), list(again.combiners.parameters()))
    answers(again, images(3).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exits_in_half_precision_come_back_bit_for_bit(tiny_net: TinyNet, tmp_path: Path, dtype: torch.dtype) -> None:
    half = deepcopy(tiny_net).to(dtype)
    ee = exitkit.attach(half, images().to(dtype))
    shuffle(ee)
    ee.save_pretrained(tmp_path)
    kinds = {
        (name.partition(".")[0], tensor.dtype)
        for name, tensor in load_file(weights_file(tmp_path)).items()
        if tensor.is_floating_point()
    }
    assert kinds == {("classifiers", dtype), ("combiners", torch.float32)}
    again = MultiExitModel.from_pretrained(half, tmp_path)
    assert all_equal(answers(ee, images(3).to(dtype)), answers(again, images(3).to(dtype)))
    widened = MultiExitModel.from_pretrained(tiny_net, tmp_path)  # the float32 model that the half one was made from
    for before, after in zip(ee.classifiers.parameters(), widened.classifiers.parameters(), strict=True):
        assert torch.equal(before.float(), after)


def test_tied_exits_are_saved_each_for_itself(tiny_net: TinyNet, tmp_path: Path) -> None:
    ee = exitkit.attach(tiny_net, images(), method="sdn")
    ee.classifiers[1].linear.weight = ee.classifiers[0].linear.weight
    ee.save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(tiny_net, tmp_path)
    assert all_equal(answers(ee, images(3)), answers(again, images(3)))
    assert again.classifiers[1].linear.weight is not again.classifiers[0].linear.weight


class Tied(nn.Module):
    """Its last layer uses the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6, bias=False)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3)))
        self.head = nn.Linear(6, 3, bias=False)
        self.head.weight = nn.Parameter(torch.randn(3, 6))
        self.embed.weight = nn.Parameter(self.head.weight.detach().T)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


def test_a_backbone_with_shared_storage_and_transposed_weights_is_recognised(tmp_path: Path) -> None:
    backbone = Tied()
    ee = exitkit.attach(backbone, torch.randn(2, 3))
    ee.save_pretrained(tmp_path)
    other = Tied()
    other.load_state_dict(backbone.state_dict())
    again = MultiExitModel.from_pretrained(other, tmp_path)
    assert all_equal(answers(ee, torch.ones(3, 3)), answers(again, torch.ones(3, 3)))


@pytest.mark.cuda
def test_exits_saved_on_cuda_load_on_cpu_and_back(tiny_net: TinyNet, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_gpu = deepcopy(tiny_net).cuda()
    ee = exitkit.attach(on_gpu, images().cuda())
    shuffle(ee)
    ee.save_pretrained(tmp_path)
    on_cpu = MultiExitModel.from_pretrained(tiny_net, tmp_path)
    assert all_equal([p.cpu() for p in ee.added_parameters()], on_cpu.added_parameters())
    on_cpu.save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(on_gpu, tmp_path)
    assert all_equal(ee.added_parameters(), again.added_parameters())


# Example inputs.


class Words(nn.Module):
    """Takes token ids, an optional mask and a flag, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3)))
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor, scale: Any = None, double: bool = False) -> Tensor:
        x = self.blocks(self.embed(ids)) * attention_mask[:, :, None]
        return self.head(x.sum(1) / attention_mask.sum(1, keepdim=True)) * (2 if double else 1)


def test_example_inputs_are_made_up_in_the_saved_shapes(tmp_path: Path) -> None:
    ids = torch.randint(1, 9, (5, 7))
    batch = {"ids": ids, "attention_mask": torch.ones_like(ids), "double": True, "scale": None}
    backbone = Words()
    ee = exitkit.attach(backbone, batch)
    shuffle(ee)
    ee.save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(backbone, tmp_path)
    assert again.exits == ee.exits
    assert again.example.spec == ee.example.spec
    assert all_equal(answers(ee, **batch), answers(again, **batch))


def test_example_inputs_are_asked_for_where_they_cannot_be_described(tmp_path: Path) -> None:
    ids = torch.randint(1, 9, (2, 7))
    batch = {"ids": ids, "attention_mask": torch.ones_like(ids), "scale": object()}
    backbone = Words()
    exitkit.attach(backbone, batch).save_pretrained(tmp_path)
    with pytest.raises(ExitkitError, match="cannot be attached to this Words: example_inputs=None"):
        MultiExitModel.from_pretrained(backbone, tmp_path)
    MultiExitModel.from_pretrained(backbone, tmp_path, batch)


def test_a_users_own_example_is_not_written(tiny_net: TinyNet, tmp_path: Path) -> None:
    secret = 0.123456789
    exitkit.attach(tiny_net, torch.full((2, 1, 8, 8), secret)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["inputs"] == [{"dtype": "float", "shape": [1, 8, 8]}]
    assert not any(
        torch.isclose(t.float(), torch.tensor(secret)).any() for t in load_file(weights_file(tmp_path)).values()
    )


# Damaged and foreign files.


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_weights_cut_short_are_refused(backbone: TinyNet, saved: Path, length: int) -> None:
    path = weights_file(saved)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FileError, match=rf"{path.name}' is damaged: its content does not match its name"):
        MultiExitModel.from_pretrained(backbone, saved)


def test_missing_weights_are_named(backbone: TinyNet, saved: Path) -> None:
    path = weights_file(saved)
    path.unlink()
    with pytest.raises(ExitkitError, match=rf"{path.name}' cannot be read"):
        MultiExitModel.from_pretrained(backbone, saved)


@pytest.mark.parametrize("fault", ["dtype", "combiner dtype", "shape", "missing", "foreign"])
def test_weights_that_do_not_fit_are_named(backbone: TinyNet, saved: Path, fault: str) -> None:
    weights = load_file(weights_file(saved))
    name = "combiners.0.log_prior" if fault == "combiner dtype" else "classifiers.1.linear.weight"
    if "dtype" in fault:
        weights[name] = weights[name].half()
    elif fault == "shape":
        weights[name] = weights[name][:1].clone()
    elif fault == "missing":
        del weights[name]
    else:
        weights[name := "stranger"] = torch.zeros(1)
    replace_weights(saved, weights)
    with pytest.raises(ExitkitError, match=rf"does not fit its configuration: '{re.escape(name)}' is "):
        MultiExitModel.from_pretrained(backbone, saved)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", b"\xff\xfe", json.dumps({"format": "other"})])
def test_a_folder_without_a_configuration_of_exits_is_refused(
    backbone: TinyNet, saved: Path, content: str | bytes | None
) -> None:
    path = saved / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ExitkitError, match=r"config\.json' (cannot be read|is not a configuration).*save_pretrained"):
        MultiExitModel.from_pretrained(backbone, saved)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_configuration_cut_short_is_refused(backbone: TinyNet, saved: Path, share: float) -> None:
    path = saved / "config.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ExitkitError, match=r"config\.json' cannot be read"):
        MultiExitModel.from_pretrained(backbone, saved)


def test_a_newer_format_says_who_wrote_it(backbone: TinyNet, saved: Path) -> None:
    edit(saved, format="exitkit-exits-99", versions={"exitkit": "9.0"})
    with pytest.raises(ExitkitError, match=r"format 'exitkit-exits-99', saved by exitkit 9\.0; exitkit .* reads"):
        MultiExitModel.from_pretrained(backbone, saved)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("exits", "blocks.0", "exits='blocks.0' must be"),
        ("exits", [1], r"exits\[0\]=1 must be a text"),
        ("exits", [], "exits="),
        ("exits", ["blocks.0", "blocks.0"], "exits=.*distinct"),
        ("method", "ztw", "method='ztw' must be"),
        ("method", {"name": "ztw"}, "'method.cascade' is missing"),
        ("method", METHOD | {"unheard_of": True}, "'method.unheard_of' is unknown"),
        ("method", METHOD | {"ensemble": "quantum"}, "method.ensemble='quantum'"),
        ("method", METHOD | {"cascade": "false"}, "method.cascade='false' must be True or False"),
        ("method", METHOD | {"criterion": "tolerance-1.5"}, "method: .*tolerance-1.5"),
        ("method", METHOD | {"width": 3}, "method: width=3 is for past_future"),
        ("method", METHOD | {"past_future": "paper", "cascade": False, "width": 10**9}, "'method.width' is of width"),
        ("head", None, "head=None must be"),
        ("head", "3L", "head='3L' is unknown"),
        ("head", ["auto", 3], r"head\[1\]=3 must be a text"),
        ("head", "2L-1000000000", "head='2L-1000000000' is unknown"),
        ("dtype", "float33", "dtype='float33'"),
        ("dtype", "int8", "dtype='int8'"),
        ("policy", POLICY | {"thresholds": "high"}, "policy.thresholds='high' must be"),
        ("policy", POLICY | {"criterion": "two words"}, "policy: .*two words"),
        ("policy", POLICY | {"temperatures": [1.0]}, "policy: temperatures="),
        ("policy", POLICY | {"thresholds": [0.5]}, "policy.thresholds holds 1 values for 3 exits"),
        ("threshold", "high", "'threshold' is unknown"),
        ("inputs", [{"dtype": "float", "shape": ["3"]}], r"inputs\[0\].shape\[0\]='3' must be a whole number"),
        ("inputs", [{"dtype": "nonsense", "shape": [3]}], r"inputs\[0\].dtype='nonsense'"),
        ("inputs", {"x": {"dtype": "float"}}, r"'inputs.x.shape' is missing"),
        ("inputs", [{"dtype": "float", "shape": [1, 20_000, 20_000]}], r"inputs\[0\]: shape="),
        ("blocks", [], r"blocks=\[\] must be"),
        ("tensors", {"stem.weight": 1}, "tensors.stem.weight=1 must be a text"),
        ("tensors", {"stem.weight": "8×1×3×3"}, "tensors.stem.weight='8×1×3×3'"),
        ("outputs", True, "outputs=True must be a whole number"),
        ("outputs", 10**9, "'outputs' is of width"),
        ("weights", "../exits-0123456789abcdef.safetensors", "weights='../exits"),
        ("weights", "exits-0123456789abcdef_safetensors", "weights='exits"),
        ("more", 1, "'more' is unknown"),
    ],
)
def test_a_damaged_configuration_names_the_entry(
    backbone: TinyNet, saved: Path, key: str, value: Any, named: str
) -> None:
    """Though its hash is right; of an entry with parts, the part."""
    edit(saved, **{key: value})
    with pytest.raises(FileError, match=rf"config\.json' is damaged: {named}"):
        MultiExitModel.from_pretrained(backbone, saved)


def test_exits_saved_with_times_beside_the_criterion_still_load(
    ee: MultiExitModel, backbone: TinyNet, saved: Path
) -> None:
    edit(saved, method=asdict(ee.method) | {"times": 1})
    assert MultiExitModel.from_pretrained(backbone, saved).method == ee.method


def test_a_missing_entry_is_named(backbone: TinyNet, saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["head"]
    path.write_text(json.dumps(config))
    edit(saved)
    with pytest.raises(FileError, match="'head' is missing"):
        MultiExitModel.from_pretrained(backbone, saved)


def test_a_boundary_that_the_backbone_has_not_is_named(backbone: TinyNet, saved: Path) -> None:
    edit(saved, exits=["blocks.7"])
    with pytest.raises(ExitkitError, match=r"saved by exitkit .*, cannot be attached to this TinyNet: .*blocks\.7"):
        MultiExitModel.from_pretrained(backbone, saved)


@pytest.mark.parametrize(
    "text",
    ["NaN", "-Infinity", "1e999", "1" + "0" * 400, "1" * 5000, "[" * 100_000 + "]" * 100_000],
    ids=lambda t: t[:9],
)
def test_numbers_and_nesting_that_json_should_not_hold(backbone: TinyNet, saved: Path, text: str) -> None:
    path = saved / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"policy": null', f'"policy": {text}'))
    with pytest.raises(FileError, match=r"config\.json' cannot be read"):
        MultiExitModel.from_pretrained(backbone, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    ee: MultiExitModel, backbone: TinyNet, saved: Path, value: float
) -> None:
    weights = load_file(weights_file(saved))
    weights["classifiers.1.linear.weight"][0, 0] = value
    replace_weights(saved, weights)
    with pytest.raises(FileError, match=r"NaN or infinity in 'classifiers\.1\.linear\.weight'"):
        MultiExitModel.from_pretrained(backbone, saved)
    broken = deepcopy(ee)
    with torch.no_grad():
        broken.classifiers[1].linear.weight[0, 0] = value
    with pytest.raises(ExitkitError, match="the exits hold NaN or infinity"):
        broken.save_pretrained(saved / "again")
    assert not (saved / "again").exists()


def test_a_flipped_digit_in_a_threshold_is_noticed(tiny_ee: MultiExitModel, tmp_path: Path) -> None:
    tiny_ee.save_pretrained(tmp_path, threshold=0.8125)
    path = tmp_path / "config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("0.8125", "0.8225"), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    with pytest.raises(FileError, match=r"config\.json' is damaged: its content does not match its hash"):
        MultiExitModel.from_pretrained(tiny_ee.backbone, tmp_path)


def older(folder: Path, threshold: Any) -> None:
    """The folder as version 0.1 wrote it: no hash, a threshold in place of the policy, short digests of some values."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["sha256"], config["policy"]
    tensors = {name: f"{line.split()[0]} 6690643a 13cccabd 8a78879b" for name, line in config["tensors"].items()}
    changed = {"format": "exitkit-exits-3", "threshold": threshold, "tensors": tensors}
    path.write_text(json.dumps({**config, **changed}, indent=1, ensure_ascii=False), encoding="utf-8")


CHOSEN = {
    "threshold": [0.5, 0.6, 0.7], "found": True, "guarantee": "kept", "risk": "accuracy_drop", "method": "ltt",
    "max_drop": 0.01, "confidence": 0.95, "measured": 0.005, "samples": 500, "cost": 0.5, "cost_interval": [0.4, 0.6],
    "criterion": "margin", "dtype": "float32", "temperatures": [1.0, 2.0, 1.0, 1.0],
}  # fmt: skip
GUARANTEE = Guarantee("kept", True, "accuracy_drop", "ltt", 0.01, 0.95, 0.005, 500, 0.5, (0.4, 0.6))


@pytest.mark.parametrize(
    ("threshold", "policy"),
    [
        (None, None),
        (0.5, ExitPolicy((0.5, 0.5, 0.5), "confidence")),
        ([0.5, 0.6, 0.7], ExitPolicy((0.5, 0.6, 0.7), "confidence")),
        (
            {"threshold": 0.5, "temperatures": [1, 2, 1, 1]},
            ExitPolicy((0.5, 0.5, 0.5), "confidence", (1.0, 2.0, 1.0, 1.0)),
        ),
        (CHOSEN, ExitPolicy((0.5, 0.6, 0.7), "margin", (1.0, 2.0, 1.0, 1.0), "float32", GUARANTEE)),
    ],
    ids=["none", "one", "each", "temperatures", "chosen"],
)
def test_older_folders_load_with_one_warning(
    ee: MultiExitModel, backbone: TinyNet, saved: Path, threshold: Any, policy: ExitPolicy | None
) -> None:
    older(saved, threshold)
    with pytest.warns(UserWarning, match="without a hash.*save the exits again") as caught:
        again = MultiExitModel.from_pretrained(backbone, saved)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert again.policy == policy
    assert all_equal(answers(ee, images(3)), answers(again, images(3)))
    with (
        pytest.warns(UserWarning, match="shapes"),
        pytest.raises(ExitkitError, match=r"'linear\.weight 3×8' there is 'linear\.weight 4×8'"),
    ):
        MultiExitModel.from_pretrained(TinyNet(num_classes=4), saved)


@pytest.mark.parametrize("threshold", ["0.5", {}, [], {"threshold": [0.5]}, CHOSEN | {"cost": "low"}])
@pytest.mark.filterwarnings("ignore:.*without a hash")
def test_lies_in_the_threshold_of_older_folders(backbone: TinyNet, saved: Path, threshold: Any) -> None:
    older(saved, threshold)
    with pytest.raises(ExitkitError):
        MultiExitModel.from_pretrained(backbone, saved)


def test_folders_of_a_much_older_format_say_what_to_do(backbone: TinyNet, saved: Path) -> None:
    edit(saved, format="exitkit-exits-2")
    with pytest.raises(
        FileError, match=r"format 'exitkit-exits-2', saved by .*Load it with the version that saved it"
    ):
        MultiExitModel.from_pretrained(backbone, saved)


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """One bit flipped, a byte lost, some bytes swapped or doubled, or the end lost."""
    position, damaged = random.randrange(len(content)), bytearray(content)
    match random.randrange(5):
        case 0:
            damaged[position] ^= 1 << random.randrange(8)
        case 1:
            del damaged[position]
        case 2:
            damaged[position : position + 4] = reversed(damaged[position : position + 4])
        case 3:
            damaged[position:position] = damaged[position : position + 9]
        case _:
            del damaged[position:]
    return bytes(damaged)


def mutated_json(content: bytes, random: Random) -> bytes:
    """Somewhere in the tree another value, one entry less, or one more."""
    config = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(config)
    owner, key = random.choice(places)
    if random.random() < 0.2:
        del owner[key]
    else:
        owner[key] = random.choice([*LIES, owner[key], [owner[key]], str(owner[key])])
    return json.dumps(config).encode()


LIES = [
    None,
    True,
    False,
    "false",
    "",
    0,
    -1,
    1.5,
    10**18,
    -(10**400),
    1e308,
    float("nan"),
    [],
    {},
    [[]],
    "\ud800",
    "2L-9",
]


@pytest.mark.parametrize("resealed", [False, True], ids=["as it is", "its hash made right"])
def test_whatever_is_damaged_is_refused_or_loads_the_same(ee: MultiExitModel, tmp_path: Path, resealed: bool) -> None:
    """500 mutations. Where somebody made the hash right again, what loads may be other; but nothing ends in a traceback."""
    random, expected = Random(0), answers(ee, images(3))
    ee.save_pretrained(tmp_path / "whole", threshold=0.8125)
    refused = 0
    for number in range(100 if resealed else 400):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        kinds = [(folder / "config.json", mutated_json)]
        kinds += [] if resealed else [(path, mutated_bytes) for path in (folder / "config.json", weights_file(folder))]
        path, mutated = random.choice(kinds)
        path.write_bytes(mutated(path.read_bytes(), random))
        if resealed and "sha256" in json.loads(path.read_bytes()):
            edit(folder)
        try:
            again = MultiExitModel.from_pretrained(ee.backbone, folder)
        except ExitkitError:
            refused += 1
        else:
            assert all_equal(answers(again, images(3)), expected)
            assert again.threshold == 0.8125 or resealed
        shutil.rmtree(folder)
    assert refused > (50 if resealed else 350)


# Places.


@pytest.mark.parametrize("place", ["no/such/folder", "./nowhere", "a b", Path("nowhere")])
def test_neither_a_folder_nor_a_name_on_the_hub(tiny_net: TinyNet, place: str | Path) -> None:
    with pytest.raises(ExitkitError, match=r"is neither a folder nor a name on the Hub|there is no such folder"):
        MultiExitModel.from_pretrained(tiny_net, place)


def test_other_places_that_cannot_be_loaded_from(backbone: TinyNet, saved: Path) -> None:
    with pytest.raises(ExitkitError, match=r"README\.md' looks like a path, and there is no such folder"):
        MultiExitModel.from_pretrained(backbone, str(saved / "README.md"))
    with pytest.raises(ExitkitError, match=r"source=3 must be a folder or a name"):
        MultiExitModel.from_pretrained(backbone, 3)  # type: ignore[arg-type]
    with pytest.raises(ExitkitError, match=r"revision='v1' is for names on the Hub"):
        MultiExitModel.from_pretrained(backbone, saved, revision="v1")


def test_a_file_is_no_place_to_save(tiny_ee: MultiExitModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExitkitError, match=r"directory=.*file' is a file"):
        tiny_ee.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# Saving over an older save.


def test_a_save_replaces_the_older_one_and_nothing_else(tiny_ee: MultiExitModel, tmp_path: Path) -> None:
    tiny_ee.save_pretrained(tmp_path)
    older = weights_file(tmp_path)
    (tmp_path / "exits-notes.txt").write_text("mine")
    shuffle(tiny_ee)
    tiny_ee.save_pretrained(tmp_path)
    assert weights_file(tmp_path) != older
    assert (tmp_path / "exits-notes.txt").read_text() == "mine"
    again = MultiExitModel.from_pretrained(tiny_ee.backbone, tmp_path)
    assert all_equal(answers(tiny_ee, images(3)), answers(again, images(3)))


def test_the_same_exits_make_the_same_files(tiny_ee: MultiExitModel, tmp_path: Path) -> None:
    tiny_ee.save_pretrained(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tiny_ee.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_interrupted_save_leaves_one_whole_save(
    tiny_ee: MultiExitModel, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its weights, its configuration or its card are in place."""
    tiny_ee.save_pretrained(tmp_path)
    old = answers(tiny_ee, images(3))
    shuffle(tiny_ee)
    new = answers(tiny_ee, images(3))
    replace, calls = Path.replace, iter(range(3))

    def interrupted(path: Path, target: Path) -> Path:
        if next(calls) == step:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny_ee.save_pretrained(tmp_path, threshold=0.5)
    again = MultiExitModel.from_pretrained(tiny_ee.backbone, tmp_path)
    assert again.threshold == (0.5 if step == 2 else None)
    assert all_equal(answers(again, images(3)), new if step == 2 else old)
    tiny_ee.save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


# Hugging Face and PEFT.


def bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=30, num_labels=3, **sizes, **changes)
    )


def test_sentences_of_another_length_need_no_example(tmp_path: Path) -> None:
    backbone, ids = bert(), torch.randint(5, 30, (2, 40))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ee = exitkit.attach(backbone, batch)
    shuffle(ee)
    ee.save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(backbone, tmp_path)
    assert again.exits == ee.exits
    assert all_equal(answers(ee, **batch), answers(again, **batch))


def test_the_card_links_a_backbone_from_the_hub(tmp_path: Path) -> None:
    backbone = bert()
    backbone.name_or_path = "google/bert-tiny"
    ee = exitkit.attach(backbone)
    ee.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "google/bert-tiny"
    assert "# Early exits for google/bert-tiny" in card.text
    backbone.name_or_path = str(tmp_path)  # a folder of this machine says nothing to others
    ee.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
    assert str(tmp_path) not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_exits_on_adapters_belong_to_the_adapted_backbone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(bert(), config)
    ee = exitkit.attach(adapted)
    shuffle(ee)
    ee.save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(adapted, tmp_path)
    ids = torch.randint(5, 30, (2, 9))
    assert all_equal(answers(ee, ids, torch.ones_like(ids)), answers(again, ids, torch.ones_like(ids)))
    other = deepcopy(adapted)
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "lora_B" in name).add_(1)
    with pytest.raises(ExitkitError, match=r"lora_B\.default\.weight 16×2' has other values"):
        MultiExitModel.from_pretrained(other, tmp_path)
    with pytest.raises(ExitkitError, match=r"'base_model\..*' there is 'bert\."):
        MultiExitModel.from_pretrained(adapted.merge_and_unload(), tmp_path)
