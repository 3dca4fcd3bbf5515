"""What is saved, what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import exitkit
from exitkit import ExitkitError, MultiExitModel
from tests.toy import TinyNet, images


@pytest.fixture
def saved(tiny_ee: MultiExitModel, tmp_path: Path) -> Path:
    for parameter in tiny_ee.added_parameters():
        nn.init.normal_(parameter)
    tiny_ee.save_pretrained(tmp_path / "exits")
    return tmp_path / "exits"


def test_loaded_exits_answer_bit_for_bit_alike(tiny_ee: MultiExitModel, saved: Path) -> None:
    again = MultiExitModel.from_pretrained(tiny_ee.backbone, saved, images())
    with torch.no_grad():
        before, after = tiny_ee.eval()(images(5)).logits, again.eval()(images(5)).logits
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    assert again.method == tiny_ee.method
    assert again.exits == tiny_ee.exits


def test_only_what_was_added_is_saved(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"exits.safetensors", "config.json", "README.md"}
    assert all(name.startswith(("classifiers.", "combiners.")) for name in load_file(saved / "exits.safetensors"))
    assert "blocks.1" in (saved / "README.md").read_text()


def test_every_part_of_a_method_comes_back(tiny_net: TinyNet, tmp_path: Path) -> None:
    method = exitkit.ZTW(ensemble="additive", ensemble_final=True, criterion="margin")
    ee = exitkit.attach(tiny_net, images(), at=["blocks.1"], method=method, head="2L-5")
    ee.save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(tiny_net, tmp_path, images())
    assert (again.method, again.head) == (method, "2L-5")


def test_another_backbone_is_refused_with_the_first_difference(saved: Path) -> None:
    with pytest.raises(ExitkitError, match=r"another backbone: 'parameter linear\.weight 3×8' there is .* 4×8"):
        MultiExitModel.from_pretrained(TinyNet(num_classes=4), saved, images())


def test_another_input_size_is_refused(tiny_net: TinyNet, saved: Path) -> None:
    with pytest.raises(ExitkitError, match=r"'block blocks\.0 8×8×8 .* there is 'block blocks\.0 8×16×16"):
        MultiExitModel.from_pretrained(tiny_net, saved, images(height=16, width=16))


def test_a_file_cut_short_is_refused(tiny_net: TinyNet, saved: Path) -> None:
    path = saved / "exits.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExitkitError, match=r"exits\.safetensors.*cannot be read"):
        MultiExitModel.from_pretrained(tiny_net, saved, images())


@pytest.mark.parametrize("fault", ["dtype", "missing", "foreign"])
def test_weights_that_do_not_fit_change_nothing(tiny_net: TinyNet, saved: Path, fault: str) -> None:
    weights = load_file(saved / "exits.safetensors")
    name = "classifiers.1.linear.weight"
    if fault == "dtype":
        weights[name] = weights[name].half()
    elif fault == "missing":
        del weights[name]
    else:
        weights["stranger"] = torch.zeros(1)
    save_file(weights, saved / "exits.safetensors")
    with pytest.raises(ExitkitError, match="stranger" if fault == "foreign" else name):
        MultiExitModel.from_pretrained(tiny_net, saved, images())


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"format": "other"})])
def test_a_folder_without_a_usable_configuration_is_refused(
    tiny_net: TinyNet, saved: Path, content: str | None
) -> None:
    (saved / "config.json").unlink()
    if content is not None:
        (saved / "config.json").write_text(content)
    with pytest.raises(ExitkitError, match=r"config\.json.*save_pretrained"):
        MultiExitModel.from_pretrained(tiny_net, saved, images())


def test_other_weights_in_the_same_backbone_are_refused(saved: Path) -> None:
    with pytest.raises(ExitkitError, match="another backbone: 'weights "):
        MultiExitModel.from_pretrained(TinyNet(), saved, images())


def test_a_method_of_another_version_is_refused(tiny_net: TinyNet, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["method"]["unheard_of"] = True
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExitkitError, match=r"config\.json.*unheard_of"):
        MultiExitModel.from_pretrained(tiny_net, saved, images())
