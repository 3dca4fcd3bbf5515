"""Another number of outputs: the backbone's last layer is replaced, belongs to the exits, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from exitkit import ExitkitError, MultiExitModel
from tests.saved_exits import replace_weights, weights_file
from tests.toy import TinyNet, all_equal, images

X = images()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, pad_token_id=0, use_cache=False)
    return transformers.GPT2ForSequenceClassification(config)


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, **options)


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("torchvision").models.get_model(name)


MODELS = {
    "resnet18": (torchvision_model("resnet18"), ["fc.weight", "fc.bias"]),
    "mobilenet_v3_small": (torchvision_model("mobilenet_v3_small"), ["classifier.3.weight", "classifier.3.bias"]),
    "squeezenet1_1": (torchvision_model("squeezenet1_1"), ["classifier.1.weight", "classifier.1.bias"]),
    "timm resnet10t": (timm_model("resnet10t"), ["fc.weight", "fc.bias"]),
    "timm without classifier": (timm_model("resnet10t", num_classes=0), ["fc.weight", "fc.bias"]),
    "timm levit, two heads": (
        timm_model("levit_128s"),
        [f"{head}.{part}" for head in ("head", "head_dist") for part in ("linear.weight", "linear.bias")],
    ),
    "bert": (bert, ["classifier.weight", "classifier.bias"]),
    "gpt2": (gpt2, ["score.weight"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_only_the_last_layer_is_new(name: str) -> None:
    build, new_head = MODELS[name]
    model = build()
    before = dict(model.named_parameters())
    ee = exitkit.attach(model, every=1, method="sdn", head="1L", num_classes=4)
    after = dict(ee.backbone.named_parameters())
    assert {logits.shape[1] for logits in ee(**call(ee)).logits} == {4}
    assert set(new_head) <= set(ee.new_head)
    assert all(after[key] is parameter for key, parameter in before.items() if key not in ee.new_head)
    assert {id(after[key]) for key in new_head} <= {id(parameter) for parameter in ee.added_parameters()}
    assert exitkit.detach(ee) is model


def call(ee: MultiExitModel) -> dict[str, Any]:
    """The example's call by keyword, whatever the model calls its images."""
    batch = ee.example.spec.batch(ee.example.tensors)
    return batch if isinstance(batch, dict) else {"x": batch[0]}


@pytest.mark.parametrize("build", [bert, gpt2])
def test_hugging_face_configurations_follow(build: Callable[[], Any]) -> None:
    model = build()
    config = model.config
    exitkit.attach(model, method="sdn", num_classes=4)
    assert (model.config.num_labels, model.num_labels, len(model.config.id2label)) == (4, 4, 4)
    assert config.num_labels == 2  # it may be another model's too


def test_as_many_classes_as_there_are_change_nothing(tiny_net: TinyNet) -> None:
    linear = tiny_net.linear
    ee = exitkit.attach(tiny_net, X, num_classes=3)
    assert tiny_net.linear is linear
    assert ee.new_head == ()


def test_the_new_layer_follows_precision_mode_and_bias() -> None:
    model = TinyNet().double().eval()
    model.linear = nn.Linear(8, 3, bias=False, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ee = exitkit.attach(model, X.double(), num_classes=5)
    assert (model.linear.weight.dtype, model.linear.bias, model.linear.training) == (torch.float64, None, False)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["linear.weight"]
    assert ee.exits[-1].macs_fraction > 1
    assert ee.anatomy.macs - exitkit.attach(TinyNet(), X).anatomy.macs == 8 * 2


def test_one_output_in_place_of_classes_is_regression(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, X, method="pbee", num_outputs=1)
    assert [logits.shape for logits in ee(X).logits] == [(2, 1)] * 4
    assert ee.regression


def test_the_tail_is_that_of_the_new_layer(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, X, method="sdn", head="tail", num_classes=5)
    assert torch.equal(ee.classifiers[0].linear.weight, tiny_net.linear.weight)


@pytest.mark.parametrize("head", ["branch-1", "tail"])
def test_a_classifier_that_is_a_convolution_is_copied_into_exits(head: str, tmp_path: Path) -> None:
    """SqueezeNet's classes are the channels of its last 1 × 1 convolution: a copy of the new one answers as it does."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = torchvision_model("squeezenet1_1")().eval()
    ee = exitkit.attach(model, x, at=["features.12"], method="sdn", head=head, num_classes=6)
    assert torch.allclose(ee(x).logits[0], ee(x).logits[1], atol=1e-5)
    assert ee(x).logits[1].shape == (2, 6)
    exitkit.Trainer(ee, epochs=1, show_progress=False).fit([(x, torch.tensor([0, 5]))])
    exitkit.export(ee, tmp_path / "model.pt2", 0.2)
    assert torch.equal(exitkit.load(tmp_path / "model.pt2", trust=True)(x).exit, exitkit.compile(ee, 0.2)(x).exit)


# saved ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MultiExitModel, TinyNet, Path]:
    """Exits with a replaced last layer, the original backbone, and the folder."""
    original = TinyNet().eval()
    ee = exitkit.attach(deepcopy(original), X, method="sdn", num_classes=5).eval()
    for parameter in ee.added_parameters():
        nn.init.normal_(parameter)
    ee.save_pretrained(tmp_path)
    return ee, original, tmp_path


def test_the_new_layer_comes_back_with_the_exits(saved: tuple[MultiExitModel, TinyNet, Path]) -> None:
    ee, original, folder = saved
    again = MultiExitModel.from_pretrained(original, folder, X).eval()
    assert all_equal(again(X).logits, ee(X).logits)
    assert again.new_head == ("linear.weight", "linear.bias")


def test_nothing_else_of_the_backbone_is_saved(saved: tuple[MultiExitModel, TinyNet, Path]) -> None:
    folder = saved[2]
    (file,) = folder.glob("*.safetensors")
    names = [name for name in load_file(file) if name.startswith("backbone.")]
    assert sorted(names) == ["backbone.linear.bias", "backbone.linear.weight"]
    assert "last layer, which was replaced by one with 5 outputs" in (folder / "README.md").read_text()


def test_a_backbone_that_kept_its_new_layer_is_welcome(saved: tuple[MultiExitModel, TinyNet, Path]) -> None:
    """As after ``detach`` and ``torch.save``, or built with five classes."""
    ee, _, folder = saved
    other = deepcopy(exitkit.detach(ee))
    nn.init.zeros_(other.linear.weight)
    again = MultiExitModel.from_pretrained(other, folder, X).eval()
    assert all_equal(again(X).logits, ee(X).logits)
    again.save_pretrained(folder / "second")
    third = MultiExitModel.from_pretrained(saved[1], folder / "second", X).eval()
    assert all_equal(third(X).logits, ee(X).logits)


def test_another_backbone_is_still_refused(saved: tuple[MultiExitModel, TinyNet, Path]) -> None:
    with pytest.raises(ExitkitError, match=r"another backbone.*stem\.weight"):
        MultiExitModel.from_pretrained(TinyNet(), saved[2], X)


def test_a_failed_load_leaves_the_backbone_as_it_was(saved: tuple[MultiExitModel, TinyNet, Path]) -> None:
    _, original, folder = saved
    tensors = load_file(weights_file(folder))
    del tensors["backbone.linear.weight"]
    replace_weights(folder, tensors)
    linear = original.linear
    with pytest.raises(ExitkitError, match=r"backbone\.linear\.weight' is missing"):
        MultiExitModel.from_pretrained(original, folder, X)
    assert original.linear is linear


# refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"at": ["nowhere"]}, {"every": 9}, {"head": "strided", "at": ["dropout"]}])
def test_an_error_afterwards_leaves_the_model_as_it_was(tiny_net: TinyNet, arguments: dict[str, Any]) -> None:
    linear, training = tiny_net.linear, tiny_net.training
    with pytest.raises(ExitkitError):
        exitkit.attach(tiny_net, X, num_classes=5, **arguments)
    assert tiny_net.linear is linear
    assert (tiny_net(X).shape, tiny_net.training) == ((2, 3), training)


def test_a_refused_timm_or_hugging_face_model_keeps_its_number_of_classes() -> None:
    for model, wanted in ((timm_model("resnet10t")(), "num_classes"), (bert(), "num_labels")):
        before = getattr(model, wanted)
        with pytest.raises(ExitkitError, match="nowhere"):
            exitkit.attach(model, at=["nowhere"], num_classes=4)
        assert getattr(model, wanted) == before
        if hasattr(model, "config"):
            assert model.config.num_labels == before


class Odd(TinyNet):
    """Logits from something that is no layer of their own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(3, 8))
        self.conv = nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.blocks(self.stem(x))
        if self.kind == "convolution":
            return self.conv(maps).mean((2, 3))
        if self.kind == "functional":
            return F.linear(maps.mean((2, 3)), self.weight)
        if self.kind == "two tasks":
            return self.linear(maps.mean((2, 3))) + self.linear(maps.amax((2, 3)))
        return self.linear(maps.mean((2, 3))).log_softmax(1) + self.weight[:, 0]


@pytest.mark.parametrize("kind", ["convolution", "functional", "two tasks", "summed"])
def test_no_final_linear_layer(kind: str) -> None:
    model = Odd(kind)
    parameters = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(ExitkitError, match=r"Odd has other outputs than the 5.*no single final layer.*build it"):
        exitkit.attach(model, X, num_classes=5)
    assert [id(parameter) for parameter in model.parameters()] == parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be .* at least 2 or None; num_outputs=1 is for regression"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": True}, "num_classes=True"),
        ({"num_classes": 4.0}, "num_classes=4.0"),
        ({"num_classes": "4"}, "num_classes='4'"),
        ({"num_outputs": 2}, "num_outputs=2 must be 1 or None; 1 is for regression, classes are given as num_classes"),
        ({"num_outputs": True}, "num_outputs=True"),
        ({"num_classes": 3, "num_outputs": 1}, "num_classes=3 and num_outputs=1 were given together"),
    ],
)
def test_numbers_that_are_refused(tiny_net: TinyNet, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.attach(tiny_net, X, **arguments)


def test_a_frozen_backbones_new_layer_learns_with_the_exits(tmp_path: Path) -> None:
    """And nothing else of it; a killed run goes on with the layer as it was."""
    torch.manual_seed(0)
    net = TinyNet(num_classes=7)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ee = exitkit.attach(net, torch.randn(2, 1, 8, 8), num_classes=2, method="sdn")
    fresh = ee.backbone.state_dict()["linear.weight"].clone()
    x = torch.randn(64, 1, 8, 8)
    batches = [(part, (part.mean((1, 2, 3)) > 0).long()) for part in x.split(16)]
    exitkit.Trainer(ee, epochs=12, lr=1e-2, output_dir=tmp_path, show_progress=False).fit(batches)
    after = ee.backbone.state_dict()
    assert not torch.equal(after["linear.weight"], fresh)
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("linear."))
    other = exitkit.attach(TinyNet(num_classes=7), torch.randn(2, 1, 8, 8), num_classes=2, method="sdn")
    other.backbone.load_state_dict({**after, "linear.weight": fresh})
    exitkit.Trainer(other, epochs=12, lr=1e-2, output_dir=tmp_path, show_progress=False).fit(batches)
    assert torch.equal(other.backbone.state_dict()["linear.weight"], after["linear.weight"])
