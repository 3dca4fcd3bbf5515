"""What all five measurements take, and what they leave alone: half precision, other kinds of labels, texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from exitkit.analysis import (
    align,
    connectivity,
    gradient_dominance,
    landscape,
    mutual_information,
    numerical_rank,
    plane,
)
from exitkit.analysis.losses import Evaluation
from exitkit.analysis.permutations import matching
from exitkit.training import Loss
from tests.toy import noisy

Measure = Callable[[exitkit.MultiExitModel, Any], Any]

MEASURES = {
    "dominance": lambda ee, data: gradient_dominance(ee, data).gram,
    "rank": lambda ee, data: numerical_rank(ee, data).spectrum,
    "information": lambda ee, data: mutual_information(ee, data, scale=0.5).estimate,
    "landscape": lambda ee, data: landscape(ee, data, points=3).loss,
    "connectivity": lambda ee, data: connectivity(ee, other(ee), data, points=3).loss,
}
"""Each measurement's numbers on a model and data."""


def other(ee: exitkit.MultiExitModel) -> exitkit.MultiExitModel:
    """Near to the model, of its precision, with units that stay where they are."""
    made = copy.deepcopy(ee)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.5)  # exact in any precision
    return made


def data(samples: int = 16, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(samples, 1, 8, 8, generator=generator), torch.arange(samples) % 3)]


@pytest.mark.parametrize("what", sorted(MEASURES))
def test_a_half_precision_model_takes_half_precision_inputs(tiny_ee: exitkit.MultiExitModel, what: str) -> None:
    """The same numbers as of the same weights and inputs in float32."""
    dtype = torch.bfloat16
    half = noisy(tiny_ee).to(dtype)
    ((inputs, labels),) = data()
    wide = copy.deepcopy(half).float()
    expected = MEASURES[what](wide, [(inputs.to(dtype).float(), labels)])
    with pytest.warns(UserWarning, match="float32"):
        found = MEASURES[what](half, [(inputs.to(dtype), labels)])
    assert half.dtype == dtype
    assert np.array_equal(found, expected)


def activated(activation: type[nn.Module]) -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), activation()) for _ in range(3)]
    return exitkit.attach(nn.Sequential(*blocks, nn.Linear(6, 3)), torch.zeros(2, 6), at=["0", "1"], method="sdn")


def test_models_of_equal_tensors_and_other_code_are_refused() -> None:
    a, b = activated(nn.ReLU), activated(nn.Tanh)
    vectors = [(torch.randn(8, 6), torch.arange(8) % 3)]
    calls: list[Callable[[], Any]] = [
        lambda: align(a, b),
        lambda: connectivity(a, b, vectors),
        lambda: plane(a, activated(nn.ReLU), b, vectors),
    ]
    for call, name in zip(calls, ("b", "b", "c"), strict=True):
        with pytest.raises(exitkit.ArgumentError, match=f"a and {name} differ in what they compute.*exit 0"):
            call()


def measured_on(ee: exitkit.MultiExitModel, loader: Any) -> list[Any]:
    """Losses of the model itself, by all three that need labels: the centre, an end, a corner of the grid."""
    third = copy.deepcopy(ee)
    with torch.no_grad():
        for parameter in third.parameters():
            parameter.add_(torch.randn_like(parameter))
    options: dict[str, Any] = {"align": False, "reset_batchnorm": False, "points": 2}
    at_centre = landscape(ee, loader, points=3)
    path = connectivity(ee, other(ee), loader, **options)
    flat = plane(ee, other(ee), third, loader, margin=0.0, **options)
    assert {at_centre.samples, path.samples, flat.samples} == {path.samples}
    return [at_centre.centre, path.loss[0], path.error[0], path.samples, flat]


def test_soft_labels_are_losses_and_their_likeliest_class_is_the_answer(tiny_ee: exitkit.MultiExitModel) -> None:
    ee = noisy(tiny_ee)
    ((inputs, _),) = data()
    soft = torch.rand(16, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    centre, end, error, samples, _ = measured_on(ee, [(inputs, soft)])
    with torch.no_grad():
        output = ee(inputs)
    expected = [float(-(soft * logits.log_softmax(1)).sum(1).mean()) for logits in output.heads]
    assert centre == pytest.approx(expected, rel=1e-5)
    assert end == pytest.approx(expected, rel=1e-5)
    assert error.tolist() == [float((one.argmax(1) != soft.argmax(1)).double().mean()) for one in output.logits]
    assert samples == 16


def test_samples_without_a_label_are_left_out(tiny_ee: exitkit.MultiExitModel) -> None:
    ee = noisy(tiny_ee)
    ((inputs, labels),) = data()
    some = labels.clone()
    some[::4] = -1
    kept = some >= 0
    centre, end, error, samples, _ = measured_on(ee, [(inputs, some), (inputs, -torch.ones(16, dtype=torch.int64))])
    with torch.no_grad():
        output = ee(inputs[kept])
    expected = [float(F.cross_entropy(logits, labels[kept])) for logits in output.heads]
    assert centre == pytest.approx(expected, rel=1e-5)
    assert end == pytest.approx(expected, rel=1e-5)
    assert error == pytest.approx([float((one.argmax(1) != labels[kept]).double().mean()) for one in output.logits])
    assert samples == 12
    with pytest.raises(exitkit.ArgumentError, match="all labels read are -1"):
        landscape(ee, [(inputs, -torch.ones(16, dtype=torch.int64))])


def test_settings_stand_in_the_result_and_under_the_picture(
    tiny_ee: exitkit.MultiExitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Loss(weights=[0.0, 1.0, 2.0, 4.0], reduction="mean", label_smoothing=0.1)
    shown: list[tuple[str, bool]] = []
    tracked = matching.tracked
    monkeypatch.setattr(
        matching, "tracked", lambda items, what, show: shown.append((what, show)) or tracked(items, what, False)
    )
    path = connectivity(tiny_ee, other(tiny_ee), data(), points=2, orders=1, loss=loss)
    assert shown == [("matching", True)]
    assert path.orders == 1
    assert "random orders tried: 1" in path.table().note
    for found in (path, landscape(tiny_ee, data(), points=3, loss=loss)):
        assert found.weights.tolist() == [0, 0.25, 0.5, 1]
        assert (found.reduction, found.label_smoothing) == ("mean", 0.1)
        assert "α 0, 0.25, 0.5, 1, label smoothing 0.1" in found.table().note
    unfrozen = gradient_dominance(tiny_ee, data(), as_if_unfrozen=True)
    assert unfrozen.as_if_unfrozen
    assert "as if unfrozen" in unfrozen.table().note
    assert "unfrozen" not in gradient_dominance(tiny_ee, data()).table().note


def test_models_gradients_and_random_numbers_are_left_as_they_were(tiny_ee: exitkit.MultiExitModel) -> None:
    models = [noisy(tiny_ee), other(tiny_ee), copy.deepcopy(tiny_ee)]
    with torch.no_grad():
        for parameter in models[2].parameters():
            parameter.add_(torch.randn_like(parameter))
    for ee in models:
        ee.train()
        ee.backbone.stem.weight.grad = torch.randn_like(ee.backbone.stem.weight)
    a, b, c = models
    calls: dict[str, Callable[[], Any]] = {
        "landscape": lambda: landscape(a, data(), points=3),
        "connectivity": lambda: connectivity(a, b, data(), points=2, orders=1),
        "plane": lambda: plane(a, b, c, data(), points=2, orders=1),
        "align": lambda: align(a, b, orders=1),
    }
    tensors = [{name: value.clone() for name, value in ee.state_dict().items()} for ee in models]
    gradients = [ee.backbone.stem.weight.grad for ee in models]
    values = [gradient.clone() for gradient in gradients]
    torch.manual_seed(5)
    random, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    for name, call in calls.items():
        call()
        assert torch.equal(torch.get_rng_state(), random), name
        assert np.array_equal(np.random.get_state()[1], numpy), name
        for ee, state, gradient, value in zip(models, tensors, gradients, values, strict=True):
            assert all(torch.equal(tensor, state[key]) for key, tensor in ee.state_dict().items()), name
            assert all(module.training for module in ee.modules()), name
            assert ee.backbone.stem.weight.grad is gradient, name
            assert torch.equal(gradient, value), name
            assert sum(parameter.grad is not None for parameter in ee.parameters()) == 1, name


def test_the_ends_of_a_path_are_the_models_bit_for_bit(
    tiny_ee: exitkit.MultiExitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = noisy(tiny_ee)
    b = copy.deepcopy(a)
    with torch.no_grad():
        for value in b.state_dict().values():
            value.copy_(value * 1.7 + 0.3 if value.is_floating_point() else value)
    visited: list[dict[str, Tensor]] = []
    scores = Evaluation.scores

    def seen(evaluation: Evaluation, model: exitkit.MultiExitModel, state: Any = None) -> Any:
        visited.append({name: value.clone() for name, value in model.state_dict().items()})
        return scores(evaluation, model, state)

    monkeypatch.setattr(Evaluation, "scores", seen)
    connectivity(a, b, data(), points=3, align=False, reset_batchnorm=False)
    assert len(visited) == 3
    for at, ee in ((0, a), (2, b)):
        for name, value in ee.state_dict().items():
            assert torch.equal(visited[at][name], value), name
    assert not torch.equal(visited[1]["backbone.stem.weight"], a.backbone.stem.weight)


def test_texts_have_a_landscape_and_a_path() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=50, num_labels=3)
    a, b = (
        exitkit.attach(transformers.BertForSequenceClassification(config).eval(), every=1, method="pbee")
        for _ in range(2)
    )
    inputs = {"input_ids": torch.randint(1, 50, (6, 9)), "attention_mask": torch.ones(6, 9, dtype=torch.int64)}
    labels = torch.arange(6) % 3
    loader = [{**inputs, "labels": labels}]
    expected = []
    for ee in (a, b):
        with torch.no_grad():
            expected.append([float(F.cross_entropy(logits, labels)) for logits in ee(**inputs).heads])
    assert landscape(a, loader, points=3).loss[1, 1] == pytest.approx(expected[0], rel=1e-5)
    found = connectivity(a, b, loader, points=3, orders=1)
    assert found.loss[0] == pytest.approx(expected[0], rel=1e-5)
    assert found.loss[2] == pytest.approx(expected[1], rel=1e-4)  # permuted: another order of sums
    assert found.groups


def test_a_path_needs_labels(tiny_ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(exitkit.ArgumentError, match="no labels"):
        connectivity(tiny_ee, other(tiny_ee), [torch.randn(4, 1, 8, 8)], align=False)


@pytest.mark.parametrize("measure", [numerical_rank, mutual_information])
def test_inputs_of_several_sizes_that_a_model_does_not_take_are_named(measure: Any) -> None:
    """The linear layer takes 4 × 4 pixels alone; torch's own error was about matrices."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    loader = [torch.randn(16, 1, 4, 4), torch.randn(16, 1, 8, 8)]
    with pytest.raises(exitkit.ArgumentError, match=r"shape \(16, 1, 4, 4\), a later one of \(16, 1, 8, 8\)"):
        measure(model, loader)
