"""The loss landscape: its centre, its directions, its invariances, and a model that is never written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import exitkit
from exitkit.analysis import Landscape, landscape
from exitkit.analysis.surface import directions
from exitkit.training import Loss
from tests.toy import TinyNet, noisy


def data(samples: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3) for _ in range(samples // 8)]


def test_the_centre_is_the_models_loss_and_the_weights_are_untouched(tiny_ee: exitkit.MultiExitModel) -> None:
    ee = noisy(tiny_ee).train()
    before = {name: value.clone() for name, value in ee.state_dict().items()}
    weights = [0.0, 1.0, 2.0, 3.0]
    found = landscape(ee, data(), points=5, loss=Loss(weights=weights))
    assert all(torch.equal(value, before[name]) for name, value in ee.state_dict().items())
    assert all(module.training for module in ee.modules())
    inputs, labels = (torch.cat(part) for part in zip(*data(), strict=True))
    with torch.no_grad():
        heads = ee.eval()(inputs).heads
    own = [float(F.cross_entropy(logits, labels)) for logits in heads]
    assert found.loss[2, 2] == pytest.approx(own, rel=1e-5)
    assert found.loss[2, 2].tolist() == found.centre.tolist()
    assert found.objective[2, 2] == pytest.approx(np.dot(weights, own), rel=1e-5)
    assert found.samples == 24
    assert found.axis.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert len({round(float(value), 9) for value in found.objective.ravel()}) == 25


def test_a_point_is_the_model_moved_there(tiny_ee: exitkit.MultiExitModel) -> None:
    found = landscape(tiny_ee, data(), points=3, span=0.4, seed=7)
    first, second = (directions(tiny_ee, 7, axis, "filter") for axis in (0, 1))
    with torch.no_grad():
        for name, parameter in tiny_ee.named_parameters():
            parameter += 0.4 * first[name] - 0.4 * second[name]
    inputs, labels = (torch.cat(part) for part in zip(*data(), strict=True))
    with torch.no_grad():
        heads = tiny_ee.eval()(inputs).heads
    assert found.loss[2, 0] == pytest.approx([float(F.cross_entropy(one, labels)) for one in heads], rel=1e-4)


def test_filters_of_the_directions_are_as_long_as_the_models(tiny_ee: exitkit.MultiExitModel) -> None:
    first, second = (directions(tiny_ee, 0, axis, "filter") for axis in (0, 1))
    kubaty = directions(tiny_ee, 0, 0, "kubaty")
    for name, parameter in tiny_ee.named_parameters():
        if parameter.dim() < 2:
            assert not first[name].any()
            assert torch.equal(kubaty[name].abs(), parameter.detach().abs())
        else:
            wanted = parameter.detach().flatten(1).norm(dim=1)
            assert torch.allclose(first[name].flatten(1).norm(dim=1), wanted, rtol=1e-5)
            assert not torch.allclose(first[name], second[name])
            assert torch.equal(kubaty[name], first[name])


def test_scaling_a_convolution_before_batch_norm_leaves_the_surface(tiny_ee: exitkit.MultiExitModel) -> None:
    before = landscape(tiny_ee, data(), points=5)
    block = tiny_ee.backbone.blocks[1]
    with torch.no_grad():
        block.conv1.bias.zero_()
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2)
    before = landscape(tiny_ee, data(), points=5)
    with torch.no_grad():
        block.conv1.weight *= 100
        block.norm.running_mean *= 100
        block.norm.running_var *= 10_000
    assert landscape(tiny_ee, data(), points=5).loss == pytest.approx(before.loss, rel=1e-4)


def test_a_frozen_backbone_has_a_direction(tiny_ee: exitkit.MultiExitModel) -> None:
    free = landscape(tiny_ee, data(), points=3)
    tiny_ee.backbone.requires_grad_(False)
    assert landscape(tiny_ee, data(), points=3).loss == pytest.approx(free.loss)


def test_files_tables_and_pictures(tiny_ee: exitkit.MultiExitModel, tmp_path: Path) -> None:
    found = landscape(tiny_ee, data(), points=5)
    found.save(tmp_path / "l.safetensors")
    assert np.array_equal(Landscape.load(tmp_path / "l.safetensors").loss, found.loss)
    assert [row[0] for row in found.table().rows] == ["exit 0", "exit 1", "exit 2", "backbone", "objective"]
    found.plot(tmp_path / "l.png")
    assert (tmp_path / "l.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"loader": [torch.randn(4, 1, 8, 8)]}, "labels"),
        ({"loader": [(torch.randn(2, 1, 8, 8), torch.tensor([0, 7]))]}, "labels"),
        ({"loader": [(torch.randn(2, 1, 8, 8), torch.tensor([0]))]}, "labels"),
        ({"points": 2}, "points"),
        ({"normalisation": "layer"}, "normalisation"),
        ({"ee": TinyNet()}, "attach"),
    ],
)
def test_bad_input_is_one_clear_error(tiny_ee: exitkit.MultiExitModel, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(exitkit.ExitkitError, match=named):
        landscape(**{"ee": tiny_ee, "loader": data(), **arguments})
