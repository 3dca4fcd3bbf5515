"""Heads that copy the backbone's own read-out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from tests.toy import TinyBlock, TinyNet, all_equal, images

torchvision_models = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_labels": 5,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**_TEXT, **options))


def _tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 99, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 12:] = mask[1, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask}


BACKBONES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=3), images(3, 3, 32, 32),
        "blocks.2",
    ),
    "mean of tokens": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=3, global_pool="avg"),
        images(3, 3, 32, 32), "blocks.2",
    ),
    "attention pooling": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=32, num_classes=5, depth=3, global_pool="map", class_token=False
        ),
        images(3, 3, 32, 32), "blocks.2",
    ),
    "resnet": (lambda: torchvision_models.resnet18(num_classes=5), images(3, 3, 64, 64), "layer4.1"),
    "swin": (
        lambda: torchvision_models.SwinTransformer([4, 4], 16, [1, 2], [2, 2], [2, 2], num_classes=5), images(3, 3, 32, 32),
        "features.3.1",
    ),
    "squeezenet": (lambda: torchvision_models.squeezenet1_1(num_classes=5), images(3, 3, 64, 64), "features.12"),
    "bert": (_hf("BertForSequenceClassification", "BertConfig"), _tokens(), "bert.encoder.layer.2"),
    "roberta": (_hf("RobertaForSequenceClassification", "RobertaConfig"), _tokens(), "roberta.encoder.layer.2"),
    "llama": (_hf("LlamaForSequenceClassification", "LlamaConfig"), _tokens(), "model.layers.2"),
}  # fmt: skip


@pytest.mark.parametrize("backbone", BACKBONES)
def test_at_the_last_block_an_untrained_tail_is_the_backbone(backbone: str) -> None:
    make, batch, last = BACKBONES[backbone]
    torch.manual_seed(0)
    model = make().eval()
    ee = exitkit.attach(model, batch, at=[last], head="tail", method="sdn").eval()
    call = ee(**batch) if isinstance(batch, dict) else ee(batch)
    torch.testing.assert_close(call.heads[0], call.heads[1], rtol=1e-5, atol=1e-5)


def test_a_cascade_link_starts_without_influence() -> None:
    model = TinyNet().eval()
    ee = exitkit.attach(model, images(), at=["blocks.1", "blocks.2"], head="tail", method="ztw").eval()
    alone = exitkit.attach(model, images(), at=["blocks.1", "blocks.2"], head="tail", method="sdn").eval()
    for linked, single in zip(ee(images(3)).heads, alone(images(3)).heads, strict=True):
        torch.testing.assert_close(linked, single)
    ee(images(3)).heads[1].sum().backward()
    assert ee.classifiers[1].linear.weight.grad[:, 8:].abs().sum() > 0  # and learns one


def test_the_copy_is_the_exits_own(tmp_path: Path) -> None:
    model = torchvision_models.resnet18(num_classes=5).eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ee = exitkit.attach(model, images(2, 3, 32, 32), at=["layer3.1", "layer4.1"], head="tail").eval()
    assert all(parameter.requires_grad for parameter in ee.added_parameters())
    with torch.no_grad():
        for parameter in ee.added_parameters():
            parameter.add_(0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    ee.save_pretrained(tmp_path)
    again = exitkit.MultiExitModel.from_pretrained(model, tmp_path, images(2, 3, 32, 32)).eval()
    assert all_equal(again(images(3, 3, 32, 32)).logits, ee(images(3, 3, 32, 32)).logits)


def test_maps_of_another_shape_go_through_an_adapter() -> None:
    model = torchvision_models.resnet18(num_classes=5).eval()
    x = images(2, 3, 64, 64)
    ee = exitkit.attach(model, x, at=["layer2.1", "layer4.0"], head="tail", method="sdn").eval()
    early, late = (classifier.body.adapter for classifier in ee.classifiers)
    assert early.convolution.weight.shape == (512, 128, 1, 1)
    assert isinstance(late, nn.Identity)
    feature = ee(x).features[0]
    pooled = torch.nn.functional.adaptive_avg_pool2d(feature, (2, 2)).mean((2, 3))
    by_hand = model.fc(pooled.repeat(1, 4))  # each output channel starts as one input channel
    torch.testing.assert_close(ee(x).heads[0], by_hand)


def test_the_price_of_a_tail() -> None:
    model = TinyNet().eval()
    ee = exitkit.attach(model, images(), every=1, head="tail", method="sdn")
    heads = [exit_.macs - boundary.macs for exit_, boundary in zip(ee.exits, ee.boundaries, strict=False)]
    assert heads == [8 * 3, 2 * 8 * 3, 3 * 8 * 3]


def test_tokens_in_another_number_are_refused() -> None:
    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(4))
            self.linear = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)[:, ::2]
            logits: Tensor = self.linear(x.mean(1))
            return logits

    with pytest.raises(
        ExitkitError,
        match=r"head='tail' is for features like the backbone's last, tokens \(4, 8\), not tokens \(32, 8\); use head='auto'",
    ):
        exitkit.attach(Shrinking(), torch.randn(2, 32, 8), head="tail", every=1)


class Gated(nn.Module):
    """Multiplies its logits by something from the input: a tail that reads the model's input too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(TinyBlock(1) for _ in range(3)))
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.blocks(x).flatten(1)) * gate.float()
        return logits


def test_a_tail_that_reads_an_input_gets_it() -> None:
    model = Gated().eval()
    gate = torch.tensor([[2.0], [3.0]])
    ee = exitkit.attach(model, {"x": images(), "gate": gate}, at=["blocks.1"], head="tail", method="sdn").eval()
    assert ee.specs[0].inputs == ("gate",)
    output = ee(images(), gate=gate)
    torch.testing.assert_close(output.heads[0], model.linear(output.features[0].flatten(1)) * gate)


def test_an_input_that_a_tail_reads_cannot_be_left_out() -> None:
    class Optional(Gated):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x, torch.ones(len(x), 1) if gate is None else gate)

    example = {"x": images(), "gate": torch.tensor([[2.0], [3.0]])}
    ee = exitkit.attach(Optional().eval(), example, at=["blocks.1"], head="tail", method="sdn").eval()
    with pytest.raises(ExitkitError, match=r"leaves out.*all that example_inputs had"):
        ee(images())


class Isotropic(nn.Module):
    """Blocks on vectors, then a read-out of the test's choosing."""

    def __init__(self, tail: Callable[[Isotropic, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 3)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.tail(self, x)


def _fills(model: Isotropic, x: Tensor) -> Tensor:
    vector = torch.zeros_like(x)
    vector[:, 1:] = model.norm(x)[:, :-1]
    logits: Tensor = model.linear(vector)
    return logits


def _chains(model: Isotropic, x: Tensor) -> Tensor:
    vector = model.norm(x)
    view = vector[:, :]
    vector.add_(1).mul_(vector[:, :1])
    logits: Tensor = model.linear(view)
    return logits


def _writes_into_the_feature(model: Isotropic, x: Tensor) -> Tensor:
    x[:, 0] = 1
    logits: Tensor = model.linear(model.relu(x))
    return logits


@pytest.mark.parametrize("tail", [_fills, _chains, _writes_into_the_feature])
def test_a_tail_that_writes_in_place(tail: Callable[[Isotropic, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Isotropic(tail).eval(), torch.randn(3, 8)
    ee = exitkit.attach(model, x, at=["blocks.0", "blocks.2"], head="tail", method="sdn").eval()
    with torch.no_grad():
        output = ee(x)
        torch.testing.assert_close(output.heads[1], model(x))
        # The engine's next stage, like the caller, gets the feature as the block left it.
        torch.testing.assert_close(exitkit.compile(ee, threshold=2.0)(x).logits, model(x))
        assert torch.equal(output.features[0], model.blocks[0](x))
