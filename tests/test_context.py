"""Masks and sizes that travel across a cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit.surgery.partition import Partition
from tests.toy import TinyNet, all_equal, images, names, staged


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
def text_stages(text_ee: exitkit.MultiExitModel) -> Partition:
    return text_ee.partition()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [2, 6, 19])
@pytest.mark.parametrize("batch", [1, 4])
def test_mask_and_length_are_carried(
    text_ee: exitkit.MultiExitModel, text_stages: Partition, batch: int, length: int, padded: bool
) -> None:
    inputs = text(batch, length, padded)
    with torch.no_grad():
        output = text_ee(**inputs)
        expected = text_ee.backbone(**inputs)
    assert all_equal(staged(text_stages, *inputs.values()), [*output.features, expected])


def test_a_stage_reads_the_feature_first_and_the_context_after_it(
    text_ee: exitkit.MultiExitModel, text_stages: Partition
) -> None:
    assert text_stages.stages[1].inputs[0] == text_ee.boundaries[0].node
    assert len(text_stages.stages[1].inputs) > 1


def test_samples_may_leave_between_stages(text_ee: exitkit.MultiExitModel, text_stages: Partition) -> None:
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
    assert all_equal(staged(ee.partition(), x), [*ee(x).features, ee.backbone(x)])


def test_text_of_the_greatest_length_is_attached() -> None:
    """The check at a second length must not ask for more tokens than the model has places for."""
    example = text(2, 32, padded=True)
    ee = exitkit.attach(Text(), example, method="sdn").eval()
    assert torch.equal(ee(**example).logits[-1], ee.backbone(**example))
