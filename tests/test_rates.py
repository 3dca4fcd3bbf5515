"""Which optimiser and which rates train the heads where none are given, and that what is given is taken as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import exitkit
from exitkit.training import Phase
from exitkit.training.options import Options
from tests.toy import TinyNet, images


def attached(*heads: str) -> exitkit.MultiExitModel:
    places = ["blocks.0", "blocks.1", "blocks.2"][: len(heads)]
    return exitkit.attach(TinyNet(), images(), at=places, head=list(heads), method="sdn")


def groups(model: exitkit.MultiExitModel, **options: Any) -> tuple[type, list[tuple[float, float, int]]]:
    """The optimiser's type, and each group's rate, weight decay and number of values."""
    chosen = Options(model, **options)
    made = chosen.make_optimizer(chosen.phases[0])
    return type(made), [
        (group["lr"], group["weight_decay"], sum(p.numel() for p in group["params"])) for group in made.param_groups
    ]


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_heads_alone_learn_by_adam() -> None:
    ee = attached("1L", "2L-8", "conv")
    ee.backbone.requires_grad_(False)
    assert groups(ee) == (torch.optim.Adam, [(1e-3, 0.0, size(ee.classifiers))])


def test_copies_with_batch_norm_learn_by_sgd_and_other_heads_beside_them_at_a_rate_of_their_own() -> None:
    ee = attached("branch-2", "1L")
    ee.backbone.requires_grad_(False)
    branch, plain = map(size, ee.classifiers)
    assert groups(ee) == (torch.optim.SGD, [(0.03, 5e-4, plain), (0.1, 5e-4, branch)])
    optimizer = Options(ee).make_optimizer(Phase((0, 1)))
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)
    assert groups(ee, weight_decay=0.0)[1] == [(0.03, 0.0, plain), (0.1, 0.0, branch)]


@pytest.mark.parametrize(("head", "rate"), [("strided", 0.003), ("conv", 0.003), ("msdnet", 0.03), ("2L-8", 0.03)])
def test_convolutions_without_batch_norm_beside_copies_learn_slowly(head: str, rate: float) -> None:
    ee = attached("branch-2", head)
    ee.backbone.requires_grad_(False)
    branch, other = map(size, ee.classifiers)
    assert groups(ee)[1] == [(rate, 5e-4, other), (0.1, 5e-4, branch)]


def test_copies_without_batch_norm_or_of_a_backbone_that_learns_stay_with_adam() -> None:
    tail, branch = attached("tail", "1L"), attached("branch-2", "1L")
    assert groups(tail)[0] == groups(branch, regime="mixed")[0] == torch.optim.Adam
    assert {rate for rate, _, _ in groups(branch, regime="mixed", backbone_lr=1e-4)[1]} == {1e-3, 1e-4}


@pytest.mark.parametrize(
    ("options", "kind", "rate", "decay"),
    [
        ({"lr": 0.01}, torch.optim.Adam, 0.01, 0.0),
        ({"lr": 0.01, "weight_decay": 0.1}, torch.optim.Adam, 0.01, 0.1),
        ({"optimizer": torch.optim.AdamW}, torch.optim.AdamW, 1e-3, 0.0),
        ({"optimizer": partial(torch.optim.SGD, momentum=0.5), "lr": 0.2}, torch.optim.SGD, 0.2, 0.0),
    ],
)
def test_what_is_given_is_for_all_heads(options: dict[str, Any], kind: type, rate: float, decay: float) -> None:
    ee = attached("branch-2", "1L")
    ee.backbone.requires_grad_(False)
    assert groups(ee, **options) == (kind, [(rate, decay, size(ee.classifiers))])


@pytest.mark.parametrize(
    ("given", "own", "heads", "backbone"),
    [
        ({}, {}, 1e-3, 1e-3),
        ({"lr": 0.01, "backbone_lr": 0.02}, {}, 0.01, 0.02),
        ({"lr": 0.01, "backbone_lr": 0.02}, {"lr": 0.1}, 0.1, 0.1),
        ({"lr": 0.01, "backbone_lr": 0.02}, {"backbone_lr": 0.1}, 0.01, 0.1),
        ({"lr": 0.01}, {"lr": 0.1, "backbone_lr": 0.3}, 0.1, 0.3),
    ],
)
def test_a_phase_has_rates_of_its_own(
    given: dict[str, float], own: dict[str, float], heads: float, backbone: float
) -> None:
    ee = attached("1L")
    options = Options(ee, (Phase((0,)), Phase((0, 1), (0, 1), **own)), **given)
    rates = {
        id(p): group["lr"] for group in options.make_optimizer(options.phases[1]).param_groups for p in group["params"]
    }
    assert {rates[id(p)] for p in ee.classifiers.parameters()} == {heads}
    assert {rates[id(p)] for p in ee.backbone.parameters()} == {backbone}


def test_every_parameter_is_in_one_group_even_where_heads_share_it() -> None:
    ee = attached("1L", "branch-2")
    ee.classifiers[1].linear.weight = torch.nn.Parameter(torch.zeros(3, 128))
    ee.classifiers[0].linear.weight = ee.classifiers[1].linear.weight
    found = [p for group in Options(ee).make_optimizer(Phase((0, 1))).param_groups for p in group["params"]]
    learning = [p for p in ee.parameters() if p.requires_grad]
    assert {id(p) for p in found} == {id(p) for p in learning}
    assert len(found) == len(learning)
