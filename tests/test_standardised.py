"""Heads standardise what they read while they learn, and are plain linear layers wherever they run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit.engine.exported import example_of, export_steps
from exitkit.engine.lowering import program_of
from exitkit.exits import StandardisedLinear
from tests.saved_exits import edit, replace_weights, weights_file
from tests.toy import TinyNet, all_equal, images

Loader = Callable[..., DataLoader[tuple[Tensor, ...]]]


class Scaled(nn.Module):
    """Features of one scale around one value, as networks without normalisation have them, and a classifier."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.feature = nn.Linear(12, 12)
        self.linear = nn.Linear(12, 3)
        with torch.no_grad():
            self.feature.weight.copy_(scale * torch.eye(12))
            self.feature.bias.fill_(shift)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.feature(x))
        return out


def layers(ee: nn.Module) -> list[StandardisedLinear]:
    return [module for module in ee.modules() if isinstance(module, StandardisedLinear)]


def trained(ee: exitkit.MultiExitModel, batches: Any, **options: Any) -> exitkit.MultiExitModel:
    exitkit.Trainer(ee, epochs=2, show_progress=False, **options).fit(batches)
    return ee.eval()


def test_statistics_are_those_of_all_batches_and_later_ones_count_more_from_the_tenth_on() -> None:
    layer, x = StandardisedLinear(3, 2).train(), 7 * torch.randn(120, 3) + torch.tensor([0.0, 50.0, -9.0])
    for batch in x[:90].split(10):
        layer(batch)
    seen = x[:90].numpy().astype(np.float64)
    np.testing.assert_allclose(layer.mean, seen.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.deviation, seen.std(0), rtol=1e-4)
    for batch in x[90:].split(10):
        layer(batch)
    mean, variance = seen.mean(0), seen.var(0)
    for batch in x[90:].numpy().astype(np.float64).reshape(3, 10, 3):
        shift = batch.mean(0) - mean
        mean, variance = mean + 0.1 * shift, 0.9 * (variance + 0.1 * shift**2) + 0.1 * batch.var(0)
    np.testing.assert_allclose(layer.mean, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.deviation, np.sqrt(variance), rtol=1e-4)


def test_it_is_the_same_function_in_both_modes_and_counts_in_training_mode_alone() -> None:
    layer, x = StandardisedLinear(4, 3), 9 * torch.randn(20, 4) + 30
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))  # no batch so far
    learning = layer.train()(x)
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    expected = ((x - mean) / deviation) @ layer.weight.double().T + layer.bias
    assert torch.allclose(learning.double(), expected, atol=1e-4)
    assert torch.equal(layer.eval()(x), learning)
    before = layer.mean.clone()
    layer(x + 100)
    assert torch.equal(layer.mean, before)


@pytest.mark.parametrize("head", ["1L", "2L-8"])
def test_exits_learn_alike_whatever_the_scale_of_the_features(head: str) -> None:
    x, histories = torch.randn(256, 12), []
    batches = DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), 32)
    for scale, shift in ((1.0, 0.0), (50.0, 200.0)):
        torch.manual_seed(1)
        ee = exitkit.attach(Scaled(scale, shift), torch.randn(2, 12), at=["feature"], head=head, method="sdn")
        histories.append(exitkit.Trainer(ee, epochs=5, lr=1e-2, show_progress=False).fit(batches, batches))
    quiet, loud = ([record.loss[0] for record in history] for history in histories)
    assert loud == pytest.approx(quiet, rel=1e-2)
    assert quiet[-1] < 0.85 * quiet[0]


@pytest.mark.parametrize("head", ["1L", "2L-8", "auto"])
@pytest.mark.parametrize("method", ["ztw", "sdn", "gpf"])
def test_the_engine_gives_the_models_answers_to_the_bit_before_and_after_it_learns_more(
    head: str, method: str, loader: Loader
) -> None:
    ee = trained(exitkit.attach(TinyNet(), images(), every=1, head=head, method=method), loader())
    assert all(bool(layer.batches) for layer in layers(ee))
    x, engines = images(16), [exitkit.compile(ee, threshold) for threshold in (0.0, 0.4, float("inf"))]
    for _ in range(2):
        outputs = exitkit.collect(ee, [(x, torch.zeros(16, dtype=torch.int64))])
        first, between, last = (engine(x) for engine in engines)
        with torch.no_grad():
            logits = ee(x).logits
        assert torch.equal(first.logits, logits[0])
        assert torch.equal(last.logits, logits[-1])
        assert between.exit.tolist() == outputs.exits_at(0.4).tolist()
        assert torch.allclose(between.logits, torch.stack(logits)[between.exit, torch.arange(16)], atol=1e-6)
        trained(ee, loader(seed=1))


def test_steps_are_exported_with_plain_linear_layers(loader: Loader) -> None:
    ee = trained(exitkit.attach(TinyNet(), images(), every=2, head="1L", method="sdn"), loader())
    plain = exitkit.attach(TinyNet(), images(), every=2, head="1L", method="sdn")
    plain.classifiers[0].linear = nn.Linear(128, 3)
    ours, theirs = (
        [[str(node.target) for node in exported.graph.nodes if node.op == "call_function"] for exported in steps]
        for steps in (
            export_steps(program_of(model, model.policy_for(0.5)), example_of(model)) for model in (ee, plain)
        )
    )
    assert ours == theirs
    assert [exit_.macs for exit_ in ee.exits] == [exit_.macs for exit_ in plain.exits]


def test_batches_of_one_sample_train_it(loader: Loader) -> None:
    ee = trained(exitkit.attach(TinyNet(), images(), every=2, head="1L", method="sdn"), loader(24, batch=1))
    assert all(bool(layer.deviation.isfinite().all()) and int(layer.batches) == 48 for layer in layers(ee))


def test_a_batch_that_is_not_finite_leaves_it_as_it_was(loader: Loader) -> None:
    ee = trained(exitkit.attach(TinyNet(), images(), every=2, head="1L", method="sdn"), loader())
    before = {name: tensor.clone() for name, tensor in ee.classifiers.state_dict().items()}
    x = images(8)
    x[3] = float("nan")
    with pytest.raises(exitkit.DivergedError):
        trained(ee, [(x, torch.zeros(8, dtype=torch.int64))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in ee.classifiers.state_dict().items())


def test_it_is_saved_and_comes_back(loader: Loader, tmp_path: Path) -> None:
    ee = trained(exitkit.attach(TinyNet(), images(), every=1, method="ztw"), loader())
    ee.save_pretrained(tmp_path)
    again = exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path).eval()
    with torch.no_grad():
        assert all_equal(ee(images(5)).logits, again(images(5)).logits)
    assert [int(layer.batches) for layer in layers(again)] == [int(layer.batches) for layer in layers(ee)] != []


def test_exits_saved_before_it_stay_plain_linear_layers(loader: Loader, tmp_path: Path) -> None:
    ee = trained(exitkit.attach(TinyNet(), images(), every=1, head="1L", method="sdn"), loader()).eval()
    weights, biases = zip(*(layer.folded() for layer in layers(ee)), strict=True)
    ee.save_pretrained(tmp_path)
    old = {f"classifiers.{m}.linear.weight": weight.detach() for m, weight in enumerate(weights)}
    old |= {f"classifiers.{m}.linear.bias": bias.detach() for m, bias in enumerate(biases)}
    old |= {f"classifiers.{m}.body.0.gamma": head.body[0].gamma.detach() for m, head in enumerate(ee.classifiers)}
    replace_weights(tmp_path, old)
    edit(tmp_path, format="exitkit-exits-4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path).eval()
    assert not layers(again)
    with torch.no_grad():
        assert all_equal(ee(images(5)).logits, again(images(5)).logits)
    again.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "exitkit-exits-5"
    assert len(weights_file(tmp_path).read_bytes()) < 30_000
    assert not layers(exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path))


@pytest.mark.parametrize(("head", "count"), [("1L", 1), ("2L-8", 1), ("auto", 1), ("conv", 0), ("tail", 0)])
def test_heads_that_begin_with_pooling_and_a_linear_layer_have_it(head: str, count: int) -> None:
    ee = exitkit.attach(TinyNet(), images(), every=2, head=head, method="sdn")
    assert len(layers(ee)) == count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_follows_the_model_to_other_precisions(dtype: torch.dtype) -> None:
    layer, x = StandardisedLinear(4, 3), 300 * torch.randn(64, 4) + 1000
    exact = layer.train()(x)
    halved = layer.to(dtype).eval()
    assert bool(halved.deviation.isfinite().all())
    assert torch.allclose(halved(x.to(dtype)).float(), exact, atol=0.1)


@pytest.mark.parametrize("mode", [True, False])
def test_attach_leaves_the_backbones_mode_and_returns_exits_in_evaluation_mode(mode: bool) -> None:
    backbone = TinyNet().train(mode)
    dropping = lambda _: nn.Sequential(nn.Flatten(), nn.Dropout())  # noqa: E731
    ee = exitkit.attach(backbone, images(), every=1, method="ztw", head=[dropping, "1L", "2L-8"])
    assert backbone.training == mode
    assert not any(module.training for module in (ee, *ee.classifiers.modules(), *ee.combiners.modules()))
    assert all_equal(*(ee.eval()(images()).heads for _ in range(2)))
    ee.train()(images(), labels=torch.zeros(len(images()), dtype=torch.long)).loss.backward()
    assert all(layer.batches == 1 for layer in layers(ee))
