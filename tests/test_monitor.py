"""The shift monitor: silent on samples like the calibration split's, loud on others, and not to be misled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import exitkit
from exitkit import ExitkitError, ExitOutputs
from exitkit.evaluation import ShiftMonitor

TAU = 0.8


def calibration(samples: int = 2_000, seed: int = 0) -> ExitOutputs:
    """Two exits and the backbone, two classes; confidences uniform in [0.5, 1]."""
    p = 0.5 + np.random.default_rng(seed).random((samples, 3)) / 2
    return ExitOutputs(torch.from_numpy(np.stack([p, 1 - p], -1)).log(), None, [1, 2, 4], 4.0)


def stream(
    samples: int, seed: int, shift: float = 0.0, last: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Exits and scores as of samples whose exits are ``shift`` less sure, and the backbone ``last`` less."""
    scores = 0.5 + np.random.default_rng(seed).random((samples, 3)) / 2 - np.array([shift, shift, last])
    exits = np.where(scores[:, 0] > TAU, 0, np.where(scores[:, 1] > TAU, 1, 2))
    return exits, scores[np.arange(samples), exits]


def fired_at(seed: int, shift: float = 0.0, last: float = 0.0, samples: int = 10_000, **options: Any) -> int | None:
    monitor = ShiftMonitor(calibration(seed=seed), TAU, **options)
    monitor.update(*stream(samples, 1_000 + seed, shift, last))
    return monitor.report().fired_at


def test_no_alarm_in_ten_thousand_undisturbed_samples() -> None:
    assert [fired_at(seed) for seed in range(25)] == [None] * 25


@pytest.mark.parametrize("samples", [300, 2_000])
def test_the_calibration_split_itself_is_no_shift(samples: int) -> None:
    """As somebody does who tries the monitor: replayed once, and again and again."""
    outputs = calibration(samples)
    monitor, exits = ShiftMonitor(outputs, TAU), outputs.exits_at(TAU)
    for _ in range(3):
        monitor.update(exits, outputs.scores().numpy()[np.arange(samples), exits])
    assert not monitor.alarm


def test_alarms_without_a_shift_are_as_rare_as_asked_for() -> None:
    """At most 40% (and three standard errors) of monitors ever, here within 1,000 samples; some do."""
    alarms = [fired_at(seed, samples=1_000, false_alarm=0.4, window=100) is not None for seed in range(100)]
    assert 0 < sum(alarms) <= 40 + 3 * 5


@pytest.mark.parametrize(("shift", "last"), [(0.06, 0.0), (0.0, 0.2), (-0.06, 0.0)])
def test_a_shift_is_seen_within_a_thousand_samples(shift: float, last: float) -> None:
    found = [fired_at(seed, shift, last, samples=1_000) for seed in range(20)]
    assert None not in found


def test_a_shift_after_ten_thousand_undisturbed_samples_is_seen() -> None:
    monitor = ShiftMonitor(calibration(), TAU)
    monitor.update(*stream(10_000, 1))
    assert not monitor.alarm
    monitor.update(*stream(1_000, 2, shift=0.1))
    assert monitor.alarm
    assert 10_000 < monitor.report().fired_at <= 11_000  # type: ignore[operator]


def test_batches_of_any_size_are_their_samples_one_by_one() -> None:
    exits, scores = stream(1_300, 5, shift=0.05)
    whole, batched, single = (ShiftMonitor(calibration(), TAU) for _ in range(3))
    whole.update(exits, scores)
    for rows in np.array_split(np.arange(1_300), 37):
        batched.update(torch.from_numpy(exits[rows]), torch.from_numpy(scores[rows]))
    for exit_, score in zip(exits.tolist(), scores.tolist(), strict=True):
        single.update(exit_, score)
    assert whole.report() == batched.report() == single.report()


def test_scores_in_any_precision_are_taken() -> None:
    monitor = ShiftMonitor(calibration(), TAU)
    monitor.update(torch.tensor([0, 1]), torch.tensor([0.9, 0.875], dtype=torch.bfloat16))
    assert monitor.report().samples == 2


def test_the_alarm_stays_on() -> None:
    monitor = ShiftMonitor(calibration(), TAU)
    monitor.update(*stream(1_000, 1, shift=0.2))
    first = monitor.report().fired_at
    monitor.update(*stream(5_000, 2))
    assert monitor.alarm
    assert monitor.report().fired_at == first


def test_the_report_says_what_changed() -> None:
    outputs = calibration()
    monitor = ShiftMonitor(outputs, TAU)
    monitor.update(*stream(1_000, 1, shift=0.2))
    report = monitor.report()
    assert report.expected_rates == pytest.approx(tuple(outputs.exit_rates(TAU)))
    assert report.observed_rates[0] < report.expected_rates[0]
    assert report.p_values["exits"] < report.level
    # All reach the backbone, where 36% did: without a shift nine would by chance in 1 of 10,000 cases, and the level is half
    # of that; the 500 of a window show it beyond doubt.
    assert report.fired_at is not None
    assert 9 < report.fired_at <= 500
    assert f"SHIFT after {report.fired_at} samples" in str(report)
    assert "guarantee of its threshold no longer applies" in str(report)


def test_a_new_monitor_reports_too() -> None:
    report = ShiftMonitor(calibration(), TAU).report()
    assert (report.samples, report.fired_at, report.p_values) == (0, None, {})
    assert "Nothing was seen yet" in str(report)


def test_it_takes_an_engines_predictions(tiny_ee: exitkit.MultiExitModel, loader: Any) -> None:
    outputs = exitkit.collect(tiny_ee, loader(96))
    taus = [0.3, 0.4, 0.5]
    engine, monitor = exitkit.compile(tiny_ee, taus), ShiftMonitor(outputs, taus)
    for images, _ in loader(96):
        prediction = engine(images)
        monitor.update(prediction.exit, prediction.score)
    report = monitor.report()
    assert report.observed_rates == pytest.approx(report.expected_rates)
    assert report.observed_score == pytest.approx(report.expected_score, abs=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_goes_on_from_what_was_seen_and_alone(
    copied: Any, tiny_ee: exitkit.MultiExitModel, loader: Any
) -> None:
    monitor, (exits, scores) = ShiftMonitor(calibration(), TAU), stream(3_000, 1, shift=0.05)
    monitor.update(exits[:150], scores[:150])
    other = copied(monitor)
    before = str(monitor.report())
    assert str(other.report()) == before
    other.update(exits[150:], scores[150:])
    assert str(monitor.report()) == before
    monitor.update(exits[150:], scores[150:])
    assert monitor.report() == other.report()
    engine = exitkit.compile(tiny_ee, 0.4, monitor=ShiftMonitor(exitkit.collect(tiny_ee, loader(96)), 0.4))
    images, _ = next(iter(loader(96)))
    twin = copied(engine)
    assert torch.equal(twin(images).logits, engine(images).logits)
    twin(images)
    assert (engine.monitor.report().samples, twin.monitor.report().samples) == (len(images), 2 * len(images))


@pytest.mark.parametrize(
    ("exit_", "score", "message"),
    [
        ([0, 3], [0.9, 0.9], "exit runs from 0 to 3, but the calibration outputs have exits 0 to 2"),
        ([-1], [0.9], "exit runs from -1"),
        ([0, 1], [0.9, np.nan], "score holds 1 values that are not finite.*non_finite"),
        ([0, 1], [0.9], r"exit has dtype int64 and shape \(2,\), score shape \(1,\)"),
        ([0.0], [0.9], "exit has dtype float64"),
    ],
)
def test_what_is_no_prediction_is_refused_and_not_counted(exit_: Any, score: Any, message: str) -> None:
    monitor = ShiftMonitor(calibration(), TAU)
    with pytest.raises(ExitkitError, match=message):
        monitor.update(np.array(exit_), np.array(score))
    assert monitor.report().samples == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": None}, "outputs is NoneType; give those"),
        ({"outputs": calibration()[:2]}, "outputs hold 2 samples, too few"),
        ({"threshold": "high"}, "threshold='high' must be a number"),
        ({"window": 10}, "window=10 must be .* at least 20"),
        ({"window": 100.0}, "window=100.0 must be a whole number"),
        ({"false_alarm": 0}, "false_alarm=0 must be a number between 0 and 1"),
        ({"false_alarm": "rare"}, "false_alarm='rare' must be a number"),
        ({"threshold": [0.5]}, "threshold has 1 values; give one τ, or one for each of the 2 exits"),
        ({"criterion": "trust"}, "criterion='trust' is unknown"),
    ],
)
def test_bad_monitors_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        ShiftMonitor(**({"outputs": calibration(), "threshold": TAU} | options))
