"""The table of boundaries, and the inputs inferred for it."""

from __future__ import annotations

import importlib.util
import io
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import exitkit
from exitkit.cli import main
from tests.toy import BLOCK, STEM, TOTAL, TinyNet, images


def test_inspect_lists_name_type_shape_costs_and_share(tiny_net: TinyNet) -> None:
    inspection = exitkit.inspect(tiny_net, images(), show=False)
    text = str(inspection)
    rows = [line for line in text.splitlines() if "blocks." in line]
    assert len(rows) == 4
    for index, (row, stage) in enumerate(zip(rows, inspection.stages, strict=False)):
        share = f"{(STEM + (index + 1) * BLOCK) / TOTAL:.1%}"
        for part in (
            f" {index} ",
            f"blocks.{index}",
            "TinyBlock",
            "8 \u00d7 8 \u00d7 8 CHW",
            f"{stage.macs / 1e6:.1f}",
        ):
            assert part in row
        memory = [f"{count / 2**20:.2f}" for count in (stage.parameter_bytes, stage.activation_bytes)]
        assert row.split()[-3:] == [share, *memory]
    assert "TinyNet" in text
    assert f"{TOTAL / 1e6:.2f} MMACs" in text


def test_ptflops_stands_beside_every_stage_where_it_is_installed(tiny_net: TinyNet) -> None:
    """It counts each bias as one more MAC per output."""
    pytest.importorskip("ptflops")
    inspection = exitkit.inspect(tiny_net, images(), show=False)
    biases = [8 * 8 * 8 * 3, *[8 * 8 * 8 * 2] * 3, 3]
    assert [stage.ptflops_macs for stage in inspection.stages] == [
        stage.macs + bias for stage, bias in zip(inspection.stages, biases, strict=True)
    ]
    assert inspection.ptflops_macs == TOTAL + sum(biases)
    assert "ptflops" in str(inspection)


def test_without_ptflops_its_column_is_left_out(tiny_net: TinyNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    inspection = exitkit.inspect(tiny_net, images(), show=False)
    assert inspection.ptflops_macs is None
    assert "ptflops" not in str(inspection)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small"])
def test_the_table_fits_into_100_columns(name: str) -> None:
    """Names are whole, as ``at=`` needs them, and a stage is one line."""
    models = pytest.importorskip("torchvision.models")
    inspection = exitkit.inspect(models.get_model(name, weights=None), show=False)
    text = io.StringIO()
    Console(file=text, width=100).print(inspection.table())
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert max(map(len, lines)) <= 100
    for stage in inspection.stages:
        assert (
            sum(f" {stage.name} " in line and line.endswith(f"{stage.activation_bytes / 2**20:.2f}") for line in lines)
            == 1
        )


def test_inspect_prints_its_table(tiny_net: TinyNet, capsys: pytest.CaptureFixture[str]) -> None:
    exitkit.inspect(tiny_net, images())
    assert "blocks.3" in capsys.readouterr().out


def test_inspect_can_be_silent(tiny_net: TinyNet, capsys: pytest.CaptureFixture[str]) -> None:
    str(exitkit.inspect(tiny_net, images(), show=False))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_command_takes_the_length_of_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertConfig(vocab_size=9, **sizes).save_pretrained(tmp_path)

    def run(*options: str) -> str:
        monkeypatch.setattr("sys.argv", ["exitkit", "inspect", *options])
        with pytest.raises(SystemExit):
            main()
        return "".join(capsys.readouterr())

    assert "40 \u00d7 8 TD" in run(f"hf:{tmp_path}", "--length", "40")
    assert "--length 40" in run("torchvision:resnet18", "--length", "40")
    assert "--length 513: BertForSequenceClassification has 512 positions" in run(f"hf:{tmp_path}", "--length", "513")


def test_inspect_names_a_long_path_in_one_piece() -> None:
    """A name must be there to be copied into ``at=``."""
    model = nn.Sequential(OrderedDict(a_rather_long_name_of_an_encoder=TinyNet()))
    inspection = exitkit.inspect(model, images(), show=False)
    assert all(block.name in str(inspection) for block in inspection.blocks)


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_example_inputs_of_torchvision_are_inferred(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    assert exitkit.surgery.default_inputs.example_for(models.get_model(name)).tensors[0].shape == (2, 3, 224, 224)


def test_example_inputs_of_timm_are_inferred() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("convnext_atto", pretrained=False, in_chans=1)
    assert exitkit.surgery.default_inputs.example_for(model).tensors[0].shape[:2] == (2, 1)


def test_example_text_is_inferred_with_a_padded_mask() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    example = exitkit.surgery.default_inputs.example_for(transformers.DistilBertForSequenceClassification(config))
    mask, ids = example.tensors
    assert example.spec.keys == ("attention_mask", "input_ids")
    assert mask.shape == ids.shape
    assert 0 < mask.float().mean() < 1
    assert torch.equal(ids == config.pad_token_id, mask == 0)
