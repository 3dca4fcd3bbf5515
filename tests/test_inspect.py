"""The table of boundaries, and the inputs inferred for it."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import exitkit
from tests.toy import BLOCK, STEM, TOTAL, TinyNet, images


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
