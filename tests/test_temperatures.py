"""Temperatures go with the threshold that was found with them: into the engine, packages, saved exits; never forgotten."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit import ExitkitError, ExitOutputs
from exitkit.evaluation import ScaledThreshold, ShiftMonitor, fit_temperatures, per_exit_thresholds
from tests.toy import TinyNet, images, noisy

TEMPERATURES = (6.0, 9.0, 20.0, 2.0)
METHODS = ["sdn", "ztw"]


@pytest.fixture(scope="module", params=METHODS)
def ee(request: pytest.FixtureRequest) -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method=request.param))


@pytest.fixture(scope="module")
def outputs(ee: exitkit.MultiExitModel) -> ExitOutputs:
    return exitkit.collect(ee, [images(400)]).against_backbone()


@pytest.fixture(scope="module")
def scaled(outputs: ExitOutputs) -> ExitOutputs:
    return outputs.calibrated(TEMPERATURES)


@pytest.fixture(scope="module")
def tau(outputs: ExitOutputs, scaled: ExitOutputs) -> float:
    """Where several exits are taken, and samples leave elsewhere than without temperatures."""
    found = scaled.curve().at_budget(0.6).threshold
    assert (scaled.exit_rates(found) > 0).sum() >= 3
    assert (outputs.exits_at(float(found)) != scaled.exits_at(found)).mean() > 0.1
    return found


def left(outputs: ExitOutputs, threshold: Any, criterion: str | None = None) -> tuple[Any, Any]:
    """Exit and score of each sample as the outputs have them."""
    exits = outputs.exits_at(threshold, criterion)
    return exits, outputs.scores(criterion)[torch.arange(len(outputs)), torch.from_numpy(exits)]


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "nats"])
def test_the_engine_scores_as_the_scaled_outputs_do(
    ee: exitkit.MultiExitModel, scaled: ExitOutputs, criterion: Any
) -> None:
    tau = scaled.curve(criterion).at_budget(0.6).threshold
    exits, scores = left(scaled, tau, criterion)
    answer = exitkit.compile(ee, tau, criterion=criterion)(images(400))
    assert answer.exit.tolist() == exits.tolist()
    assert answer.score == pytest.approx(scores, abs=1e-5)
    with torch.no_grad():
        logits = torch.stack(ee(images(400)).logits)[answer.exit, torch.arange(400)]
    assert torch.allclose(answer.logits, logits, atol=1e-4)  # answers are not divided


def test_scores_are_equal_to_the_bit_while_nobody_has_left(ee: exitkit.MultiExitModel, scaled: ExitOutputs) -> None:
    answer = exitkit.compile(ee, ScaledThreshold(2.0, TEMPERATURES))(images(400))
    assert torch.equal(answer.score, scaled.scores()[:, -1])
    everybody = exitkit.compile(ee, ScaledThreshold(-1.0, TEMPERATURES))(images(400))
    assert torch.equal(everybody.score, scaled.scores()[:, 0])


def test_thresholds_per_exit_and_chosen_ones_bring_their_temperatures(
    ee: exitkit.MultiExitModel, scaled: ExitOutputs
) -> None:
    each = per_exit_thresholds(scaled, 0.6).thresholds
    chosen = exitkit.choose_threshold(scaled, 0.4, risk="disagreement")
    assert chosen.temperatures == TEMPERATURES
    for threshold, taus in ((each, each), (chosen, chosen.threshold), (chosen.threshold, chosen.threshold)):
        answer = exitkit.compile(ee, threshold)(images(400))  # type: ignore[arg-type]
        assert answer.exit.tolist() == scaled.exits_at(taus).tolist()


def test_a_plan_keeps_the_temperatures(ee: exitkit.MultiExitModel, scaled: ExitOutputs, tau: float) -> None:
    engine = exitkit.compile(ee, tau, samples=images(32))
    assert engine.loop.program.temperatures == TEMPERATURES
    engine = replace(engine, loop=replace(engine.loop, plan=None))
    if all(step.decides for step in engine.loop.program.steps):
        assert engine(images(400)).exit.tolist() == scaled.exits_at(tau).tolist()


@pytest.fixture(scope="module")
def small() -> tuple[exitkit.MultiExitModel, ExitOutputs, float, torch.Tensor]:
    """One exit and the ensemble's, quick to export; scaled outputs, τ, and which samples are not at its edge."""
    torch.manual_seed(0)
    ee = noisy(
        exitkit.attach(
            TinyNet().eval(), images(), head="conv", at=["blocks.1"], method=exitkit.ZTW(ensemble_final=True)
        )
    )
    scaled = exitkit.collect(ee, [images(60)]).against_backbone().calibrated((20.0, 5.0))
    tau = scaled.curve().at_budget(0.8).threshold
    assert 0.2 < scaled.exit_rates(tau)[0] < 0.8
    return ee, scaled, tau, (scaled.scores()[:, 0].double() - tau).abs() > 1e-4


@pytest.mark.parametrize("ending", ["pt2", "onnx.zip", "onnx", "compiled"])
def test_packages_and_compiled_steps_divide_too(
    small: tuple[exitkit.MultiExitModel, ExitOutputs, float, torch.Tensor], ending: str, tmp_path: Path
) -> None:
    ee, scaled, tau, clear = small
    if ending.startswith("onnx"):
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"model.{ending}"
    if ending != "compiled":
        exitkit.export(ee, path, tau)
    engine = exitkit.compile(ee, tau, optimize=True) if ending == "compiled" else exitkit.load(path)
    answer = engine(images(60))
    exits, scores = left(scaled, tau)
    assert (answer.exit.numpy() == exits)[clear].all()
    assert answer.score[clear] == pytest.approx(scores[clear], abs=1e-4)
    if ending != "pt2":
        return
    assert isinstance(engine, exitkit.Engine)
    assert engine.at(0.3)(images(60)).exit.tolist() == scaled.exits_at(0.3).tolist()  # τ for the engine's own scores
    with pytest.raises(
        ExitkitError, match=r"found with temperatures=\[1.0, 1.0\].*these scores have temperatures=\[20.0"
    ):
        exitkit.load(path, threshold=ScaledThreshold(0.5, (1.0, 1.0)))


@pytest.mark.parametrize("kind", ["one", "each", "chosen"])
def test_saved_exits_hold_the_temperatures(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, scaled: ExitOutputs, tau: float, kind: str, tmp_path: Path
) -> None:
    each = tuple(ScaledThreshold(value, TEMPERATURES) for value in (0.5, 0.9, 0.7))
    threshold: Any = {
        "one": tau,
        "each": each,
        "chosen": exitkit.choose_threshold(scaled, 0.4, risk="disagreement"),
    }[kind]
    ee.save_pretrained(tmp_path, threshold=threshold, outputs=outputs)
    again = exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path, images())
    assert again.threshold == threshold
    taus = threshold.threshold if kind == "chosen" else threshold
    assert exitkit.compile(again)(images(400)).exit.tolist() == scaled.exits_at(taus).tolist()
    card = (tmp_path / "README.md").read_text()
    exits = scaled.exits_at(taus)
    accuracy = scaled.correct[range(400), exits].double().mean()
    assert f"| τ as chosen | {accuracy:.2%} | {scaled.costs[exits].mean():.1%} |" in card
    assert "6, 9, 20, 2" in card


def test_outputs_keep_them_in_files_and_splits(scaled: ExitOutputs, tmp_path: Path) -> None:
    scaled.save(tmp_path / "outputs.safetensors")
    again = ExitOutputs.load(tmp_path / "outputs.safetensors")
    assert again.temperatures == TEMPERATURES
    assert again[:10].temperatures == TEMPERATURES


def test_a_scaled_threshold_is_a_number_that_can_be_copied() -> None:
    tau = ScaledThreshold(0.75, TEMPERATURES)
    assert (tau, f"{tau:.1f}", str(tau), json.dumps(tau)) == (0.75, "0.8", "0.75", "0.75")
    for again in (copy.deepcopy(tau), pickle.loads(pickle.dumps(tau)), eval(repr(tau))):
        assert (again, again.temperatures) == (0.75, TEMPERATURES)


def test_fitted_temperatures_are_taken_as_they_are(ee: exitkit.MultiExitModel, outputs: ExitOutputs) -> None:
    temperatures = fit_temperatures(outputs[:200])
    warm = outputs[200:].calibrated(temperatures)
    tau = warm.curve().at_budget(0.6).threshold
    answer = exitkit.compile(ee, tau)(images(400)[200:])
    assert answer.exit.tolist() == warm.exits_at(tau).tolist()


def test_thresholds_of_other_temperatures_are_refused(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, scaled: ExitOutputs, tau: float
) -> None:
    other = scaled_by(outputs, 2.0)
    for take in (
        outputs.exits_at,
        other.exits_at,
        outputs.curve().at_threshold,
        exitkit.compile(ee, 0.5).at,
        lambda threshold: ShiftMonitor(outputs, threshold),
        lambda threshold: exitkit.compile(ee, 0.5).at(exitkit.choose_threshold(scaled, 0.4, risk="disagreement")),
    ):
        with pytest.raises(ExitkitError, match=r"threshold was found with temperatures=\[6.0, 9.0, 20.0, 2.0\]"):
            take(tau)
    plain = exitkit.choose_threshold(outputs, 0.4, risk="disagreement")
    with pytest.raises(ExitkitError, match=r"chosen with temperatures None, but the engine uses \(6.0, "):
        exitkit.compile(ee, tau).at(plain)
    with pytest.raises(ExitkitError, match=r"monitor compares scores with temperatures None"):
        exitkit.compile(ee, tau, monitor=ShiftMonitor(outputs, 0.5))


def scaled_by(outputs: ExitOutputs, factor: float) -> ExitOutputs:
    return outputs.calibrated([factor] * 4)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (ScaledThreshold(0.5, (1.0, 2.0)), r"temperatures=\(1.0, 2.0\) must be 4 positive numbers"),
        ((ScaledThreshold(0.5, TEMPERATURES), 0.5, 0.5), r"mixes values found with temperatures"),
        ((ScaledThreshold(0.5, TEMPERATURES), *[ScaledThreshold(0.5, (1.0,) * 4)] * 2), r"mixes values found with"),
    ],
)
def test_temperatures_that_do_not_fit_the_model_are_refused(
    ee: exitkit.MultiExitModel, threshold: Any, message: str, tmp_path: Path
) -> None:
    for use in (
        lambda: exitkit.compile(ee, threshold),
        lambda: exitkit.export(ee, tmp_path / "model.pt2", threshold),
        lambda: ee.save_pretrained(tmp_path / "exits", threshold=threshold),
    ):
        with pytest.raises(ExitkitError, match=message):
            use()


@pytest.mark.parametrize(
    "temperatures", [[1.0, 0.0], [1.0, -1.0], [1.0, np.nan], [np.inf, 1.0], ["1", "2"], 1.0, "12"]
)
def test_temperatures_are_positive_numbers(temperatures: Any) -> None:
    with pytest.raises(ExitkitError, match=r"temperatures=.* must be positive numbers"):
        ScaledThreshold(0.5, temperatures)


def test_outputs_are_divided_once(scaled: ExitOutputs) -> None:
    with pytest.raises(ExitkitError, match=r"divided by temperatures=\[6.0, .*\] already"):
        scaled.calibrated(TEMPERATURES)


def test_regression_has_no_temperatures() -> None:
    ee = exitkit.attach(TinyNet(1).eval(), images(), method="pbee", num_outputs=1)
    with pytest.raises(ExitkitError, match="regression has no temperatures"):
        exitkit.collect(ee, [images(8)]).calibrated([1.0] * 4)
    with pytest.raises(ExitkitError, match="predictions of a regression have none"):
        exitkit.compile(ee, ScaledThreshold(-0.1, (1.0,) * 4))
