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
from exitkit.evaluation import BudgetPoint, ShiftMonitor, fit_temperatures, per_exit_thresholds
from exitkit.methods.policy import ExitPolicy, Guarantee
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
def tau(outputs: ExitOutputs, scaled: ExitOutputs) -> BudgetPoint:
    """Where several exits are taken, and samples leave elsewhere than without temperatures."""
    found = scaled.curve().at_budget(0.6)
    assert (scaled.exit_rates(found) > 0).sum() >= 3
    assert (outputs.exits_at(found.policy.thresholds) != scaled.exits_at(found)).mean() > 0.1
    return found


def policy(threshold: float, temperatures: tuple[float, ...] = TEMPERATURES) -> ExitPolicy:
    return ExitPolicy((threshold,) * 3, "confidence", temperatures)


def left(outputs: ExitOutputs, threshold: Any, criterion: str | None = None) -> tuple[Any, Any]:
    """Exit and score of each sample as the outputs have them."""
    exits = outputs.exits_at(threshold, criterion)
    return exits, outputs.scores(criterion)[torch.arange(len(outputs)), torch.from_numpy(exits)]


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "nats"])
def test_the_engine_scores_as_the_scaled_outputs_do(
    ee: exitkit.MultiExitModel, scaled: ExitOutputs, criterion: Any
) -> None:
    tau = scaled.curve(criterion).at_budget(0.6)
    exits, scores = left(scaled, tau.policy.thresholds, criterion)
    answer = exitkit.compile(ee, tau, criterion=criterion)(images(400))
    assert answer.exit.tolist() == exits.tolist()
    assert answer.score == pytest.approx(scores, abs=1e-5)
    with torch.no_grad():
        logits = torch.stack(ee(images(400)).logits)[answer.exit, torch.arange(400)]
    assert torch.allclose(answer.logits, logits, atol=1e-4)  # answers are not divided


def test_scores_are_equal_to_the_bit_while_nobody_has_left(ee: exitkit.MultiExitModel, scaled: ExitOutputs) -> None:
    answer = exitkit.compile(ee, policy(2.0))(images(400))
    assert torch.equal(answer.score, scaled.scores()[:, -1])
    everybody = exitkit.compile(ee, policy(-1.0))(images(400))
    assert torch.equal(everybody.score, scaled.scores()[:, 0])


def test_thresholds_per_exit_and_chosen_ones_bring_their_temperatures(
    ee: exitkit.MultiExitModel, scaled: ExitOutputs
) -> None:
    each = per_exit_thresholds(scaled, 0.6)
    chosen = exitkit.choose_threshold(scaled, 0.4, risk="disagreement")
    assert chosen.temperatures == each.policy.temperatures == TEMPERATURES
    for threshold in (each, each.policy, chosen):
        answer = exitkit.compile(ee, threshold)(images(400))
        taus = threshold.thresholds  # the numbers, for scores that are divided already
        assert answer.exit.tolist() == scaled.exits_at(taus).tolist()


def test_an_engine_that_was_timed_keeps_the_temperatures(
    ee: exitkit.MultiExitModel, scaled: ExitOutputs, tau: BudgetPoint
) -> None:
    engine = exitkit.compile(ee, tau, samples=images(32))
    assert engine.policy.temperatures == TEMPERATURES
    exits = scaled.exits_at(tau.policy.thresholds)
    assert engine(images(400)).exit.tolist() == exits.tolist()
    again = engine.at(0.3)  # τ for the engine's own scores
    assert again.policy.temperatures == TEMPERATURES
    assert again(images(400)).exit.tolist() == scaled.exits_at(0.3).tolist()
    assert engine.plan().reached == pytest.approx(
        tuple((scaled[:32].exits_at(tau) >= m).mean() for m in range(4)), abs=0.1
    )


@pytest.fixture(scope="module")
def small() -> tuple[exitkit.MultiExitModel, ExitOutputs, BudgetPoint, torch.Tensor]:
    """One exit and the ensemble's, quick to export; scaled outputs, τ, and which samples are not at its edge."""
    torch.manual_seed(0)
    ee = noisy(
        exitkit.attach(
            TinyNet().eval(), images(), head="conv", at=["blocks.1"], method=exitkit.ZTW(ensemble_final=True)
        )
    )
    scaled = exitkit.collect(ee, [images(60)]).against_backbone().calibrated((20.0, 5.0))
    tau = scaled.curve().at_budget(0.8)
    assert 0.2 < scaled.exit_rates(tau)[0] < 0.8
    return ee, scaled, tau, (scaled.scores()[:, 0] - tau.policy.thresholds[0]).abs() > 1e-4


@pytest.mark.parametrize("ending", ["pt2", "onnx.zip", "onnx", "compiled"])
def test_packages_and_compiled_steps_divide_too(
    small: tuple[exitkit.MultiExitModel, ExitOutputs, BudgetPoint, torch.Tensor], ending: str, tmp_path: Path
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
    with pytest.raises(ExitkitError, match=r"scores with temperatures \(1.0, 1.0\), but these have \(20.0, 5.0\)"):
        exitkit.load(path, threshold=ExitPolicy((0.5,), "confidence", (1.0, 1.0)))


@pytest.mark.parametrize("kind", ["one", "each", "chosen"])
def test_saved_exits_hold_the_temperatures(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, scaled: ExitOutputs, tau: BudgetPoint, kind: str, tmp_path: Path
) -> None:
    each = ExitPolicy((0.5, 0.9, 0.7), "confidence", TEMPERATURES)
    threshold: Any = {
        "one": tau,
        "each": each,
        "chosen": exitkit.choose_threshold(scaled, 0.4, risk="disagreement"),
    }[kind]
    ee.save_pretrained(tmp_path, threshold=threshold, outputs=outputs)
    again = exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path, images())
    assert again.threshold == getattr(threshold, "policy", threshold)
    taus = getattr(threshold, "policy", threshold).thresholds
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


def test_copies_keep_the_temperatures(scaled: ExitOutputs, tau: BudgetPoint) -> None:
    """However a policy is written down or changed, it says where the same samples leave."""
    expected = scaled.exits_at(tau.policy.thresholds).tolist()
    plain = scaled.temperatures
    for original in (tau.policy, exitkit.choose_threshold(scaled, 0.4, risk="disagreement")):
        for again in (
            copy.copy(original),
            copy.deepcopy(original),
            pickle.loads(pickle.dumps(original)),
            eval(repr(original), {"ExitPolicy": ExitPolicy, "Guarantee": Guarantee}),
            ExitPolicy.from_dict(original.to_dict()),
            ExitPolicy.from_dict(json.loads(json.dumps(original.to_dict()))),
            replace(original),
        ):
            assert again == original
            assert again.temperatures == plain == TEMPERATURES
    copied = copy.deepcopy(tau)
    assert copied == tau
    for changed in (replace(tau.policy, thresholds=[t - 1e-9 for t in tau.policy.thresholds]), tau.policy.at(0.5)):
        assert changed.temperatures == TEMPERATURES
    assert scaled.exits_at(ExitPolicy.from_dict(json.loads(json.dumps(tau.policy.to_dict())))).tolist() == expected


def test_no_plain_number_can_be_taken_of_it_by_mistake(
    outputs: ExitOutputs, scaled: ExitOutputs, tau: BudgetPoint
) -> None:
    """``point.threshold - 1e-9`` would be a number for other scores; where there are no temperatures, it is none."""
    for threshold in (tau, tau.policy, exitkit.choose_threshold(scaled, 0.4, risk="disagreement")):
        for take in (
            lambda threshold=threshold: threshold.threshold - 1e-9,
            lambda threshold=threshold: np.float64(threshold.threshold),
            lambda threshold=threshold: json.dumps(threshold.threshold),
            lambda threshold=threshold: float(threshold.threshold),
        ):
            with pytest.raises(
                ExitkitError, match=r"scores after temperatures, which a plain number would lose; pass the"
            ):
                take()
        for convert in (float, np.float64, lambda given: given - 1e-9):
            with pytest.raises(TypeError):
                convert(threshold)
    assert isinstance(outputs.curve().at_budget(0.6).threshold, float)


def test_fitted_temperatures_are_taken_as_they_are(ee: exitkit.MultiExitModel, outputs: ExitOutputs) -> None:
    temperatures = fit_temperatures(outputs[:200])
    warm = outputs[200:].calibrated(temperatures)
    tau = warm.curve().at_budget(0.6)
    answer = exitkit.compile(ee, tau)(images(400)[200:])
    assert answer.exit.tolist() == warm.exits_at(tau.policy.thresholds).tolist()


def test_outputs_without_temperatures_apply_those_of_a_policy(
    outputs: ExitOutputs, scaled: ExitOutputs, tau: BudgetPoint
) -> None:
    exits = scaled.exits_at(tau.policy.thresholds)
    assert outputs.exits_at(tau).tolist() == exits.tolist()
    assert ShiftMonitor(outputs, tau).report().expected_rates == pytest.approx(np.bincount(exits, minlength=4) / 400)
    assert ShiftMonitor(outputs, tau).report().expected_score == pytest.approx(
        scaled.scores()[torch.arange(400), torch.from_numpy(exits)].mean()
    )


def test_thresholds_of_other_temperatures_are_refused(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, scaled: ExitOutputs, tau: BudgetPoint
) -> None:
    other = scaled_by(outputs, 2.0)
    for take in (
        other.exits_at,
        other.at,
        other.exit_rates,
        other.curve().at_threshold,
        outputs.curve().at_threshold,
        exitkit.compile(ee, 0.5).at,
        exitkit.compile(ee, policy(0.5, (1.0,) * 4)).at,
        lambda threshold: ShiftMonitor(other, threshold),
        lambda threshold: exitkit.compile(ee, 0.5).at(exitkit.choose_threshold(scaled, 0.4, risk="disagreement")),
    ):
        with pytest.raises(ExitkitError, match=r"threshold is for scores with temperatures \(6.0, 9.0, 20.0, 2.0\)"):
            take(tau)
    plain = exitkit.choose_threshold(outputs, 0.4, risk="disagreement")
    for take in (exitkit.compile(ee, tau).at, scaled.exits_at, scaled.at, scaled.curve().at_threshold):
        with pytest.raises(ExitkitError, match=r"scores with temperatures None, but these have \(6.0, "):
            take(plain)
    with pytest.raises(ExitkitError, match=r"monitor is for scores with temperatures None"):
        exitkit.compile(ee, tau, monitor=ShiftMonitor(outputs, tau.policy.thresholds))


def scaled_by(outputs: ExitOutputs, factor: float) -> ExitOutputs:
    return outputs.calibrated([factor] * 4)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (ExitPolicy((0.5,), "confidence", (1.0, 2.0)), r"threshold is a policy for 1 exits; here are 3"),
        ((policy(0.5), 0.5, 0.5), r"threshold=\(ExitPolicy.* must be a number, one for each exit, or a policy"),
        ([policy(0.5)] * 3, r"threshold=\[ExitPolicy.* must be a number, one for each exit, or a policy"),
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
    with pytest.raises(ExitkitError, match=r"temperatures=.* must be 2 positive numbers"):
        ExitPolicy((0.5,), "confidence", temperatures)


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (1.0,) * 5, ()])
def test_temperatures_are_one_for_each_exit_and_the_backbone(temperatures: tuple[float, ...]) -> None:
    with pytest.raises(ExitkitError, match=r"temperatures=.* must be 4 positive numbers"):
        policy(0.5, temperatures)


def test_outputs_are_divided_once(scaled: ExitOutputs) -> None:
    with pytest.raises(ExitkitError, match=r"divided by temperatures=\[6.0, .*\] already"):
        scaled.calibrated(TEMPERATURES)


def test_regression_has_no_temperatures() -> None:
    ee = exitkit.attach(TinyNet(1).eval(), images(), method="pbee", num_outputs=1)
    with pytest.raises(ExitkitError, match="regression has no temperatures"):
        exitkit.collect(ee, [images(8)]).calibrated([1.0] * 4)
    with pytest.raises(ExitkitError, match="temperatures, which predictions of a regression have not"):
        exitkit.compile(ee, ExitPolicy((-0.1,) * 3, "tolerance", (1.0,) * 4))
