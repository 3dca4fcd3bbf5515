"""Budgets in milliseconds: measured on an engine, kept with outputs, asked for by device and batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit import ExitkitError, ExitOutputs
from exitkit.evaluation import ExitTimes, per_exit_thresholds
from exitkit.evaluation.regression import RegressionOutputs
from tests.toy import TinyNet, images

ONE = ExitTimes("cpu", "a laptop", 1, (1.0, 2.0, 4.0))
MANY = ExitTimes("cuda", "NVIDIA H200", 64, (3.0, 3.5, 4.0))


def some_outputs(samples: int = 500) -> ExitOutputs:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (samples,), generator=generator)
    logits = torch.randn(samples, 3, 3, generator=generator)
    logits[torch.arange(samples), :, labels] += torch.tensor([0.5, 1.5, 3.0])
    return ExitOutputs(logits, labels, torch.tensor([1.0, 2.0, 3.0]), 3.0)


def test_a_budget_for_a_device_and_a_batch_after_loading(tmp_path: Path) -> None:
    outputs = some_outputs().timed([ONE, MANY])
    outputs.save(tmp_path / "outputs.safetensors")
    curve = ExitOutputs.load(tmp_path / "outputs.safetensors").curve()
    for times, limit in ((ONE, 2.5), (MANY, 3.4)):
        point = curve.at_budget(ms=limit, device=times.device, batch=times.batch)
        exits = outputs.exits_at(point.threshold)
        spent = np.asarray(times.milliseconds)[exits].mean()
        assert spent < limit
        assert point.cost == pytest.approx(spent / times.milliseconds[-1])
        above = curve.thresholds[np.searchsorted(curve.thresholds, point.threshold, side="right")]
        assert np.asarray(times.milliseconds)[outputs.exits_at(above)].mean() >= limit
        by_hand = outputs.curve(milliseconds=times.milliseconds).at_budget(ms=limit)
        assert point == pytest.approx(by_hand)
    assert curve.at_budget(ms=3.4, device="NVIDIA H200") == curve.at_budget(ms=3.4, batch=64)
    assert curve.at_budget(0.5) == some_outputs().curve().at_budget(0.5)


def test_a_curve_in_time_is_a_curve() -> None:
    outputs = some_outputs().timed([ONE])
    timed, by_hand = outputs.curve().timed(), outputs.curve(milliseconds=ONE.milliseconds)
    assert np.allclose(timed.cost, by_hand.cost, rtol=1e-12)
    assert (timed.milliseconds, timed.no_limit().cost) == (4.0, pytest.approx(1.0))


def test_newer_times_replace_older_ones_of_the_same_place() -> None:
    newer = replace(ONE, milliseconds=(1.0, 1.0, 2.0))
    assert some_outputs().timed([ONE, MANY]).timed([newer]).timings == (newer, MANY)


def test_regression_has_them_too() -> None:
    predictions = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    outputs = RegressionOutputs(predictions, predictions[:, -1], torch.tensor([1.0, 2.0, 3.0]), 3.0).timed([ONE])
    point = outputs.curve().at_budget(ms=3.0, device="cpu", batch=1)
    assert point == pytest.approx(outputs.curve(milliseconds=ONE.milliseconds).at_budget(ms=3.0))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"device": "cuda", "batch": 1}, r"device='cuda', batch=1 was not measured; measured: device='cpu' \(a laptop\), "
                                         r"batch=1; device='cuda' \(NVIDIA H200\), batch=64"),
        ({}, r"device=None, batch=None fits several measurements"),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_named_with_what_was(place: dict[str, Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        some_outputs().timed([ONE, MANY]).curve().at_budget(ms=3.0, **place)


def test_a_curve_without_times_says_how_to_measure() -> None:
    with pytest.raises(ExitkitError, match=r"measured: nothing. Measure with exitkit.time_exits"):
        some_outputs().curve().at_budget(ms=3.0)
    with pytest.raises(ExitkitError, match=r"are for ms="):
        some_outputs().curve().at_budget(0.5, device="cpu")


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, "3", True, [1.0]])
def test_a_budget_is_a_positive_number(value: Any) -> None:
    outputs = some_outputs().timed([ONE])
    for name, ask in {
        "budget": outputs.curve().at_budget,
        "ms": lambda given: outputs.curve().at_budget(ms=given),
        "budget=.*|budget": outputs.best_exit,
        "budget=": lambda given: per_exit_thresholds(outputs, given),
        "ms=": lambda given: per_exit_thresholds(outputs, given, milliseconds=[1.0, 2.0, 3.0]),
        "budget=..": lambda given: exitkit.evaluation.paired_tests({"a": outputs, "b": outputs}, given),
    }.items():
        with pytest.raises(ExitkitError, match=f"{name}.*must be a number above 0"):
            ask(value)


@pytest.mark.parametrize(
    "times", [[1.0, 2.0], [1.0, math.nan, 3.0], [-1.0, 2.0, 3.0], ["1", "2", "3"], [3.0, 2.0, 1.0], "fast", 3.0, [[1.0]] * 3,
              [1.0, 2.0, math.inf]],
)  # fmt: skip
def test_milliseconds_are_rising_numbers_one_per_exit(times: Any) -> None:
    outputs = some_outputs()
    for use in (
        lambda: outputs.curve(milliseconds=times),
        lambda: per_exit_thresholds(outputs, 2.0, milliseconds=times),
        lambda: outputs.timed([ExitTimes("cpu", "a laptop", 1, times)]),
    ):
        with pytest.raises(ExitkitError, match=r"milliseconds=.* must hold (3 )?positive times"):
            use()


@pytest.mark.parametrize("changes", [{"batch": 0}, {"batch": 1.5}, {"device": 0}])
def test_times_are_of_a_device_and_a_batch(changes: dict[str, Any]) -> None:
    with pytest.raises(ExitkitError, match=r"must be"):
        replace(ONE, **changes)


def test_an_engine_is_timed_where_all_leave_at_each_exit() -> None:
    ee = exitkit.attach(TinyNet().eval(), images(), method="sdn")
    engine = exitkit.compile(ee, 0.5)
    times = exitkit.time_exits(engine, images(6), batches=[1, 16])
    assert [one.batch for one in times] == [1, 16]
    for one in times:
        assert (one.device, len(one.milliseconds)) == ("cpu", 4)
        assert 0 < one.milliseconds[0] < one.milliseconds[-1]
    outputs = exitkit.collect(ee, [images(200)]).against_backbone().timed(times)
    curve = outputs.curve()
    point = curve.at_budget(ms=times[1].milliseconds[-1], device="cpu", batch=16)
    assert point.accuracy <= 1.0
    assert engine.at(point.threshold)(images(200)).exit.tolist() == outputs.exits_at(point.threshold).tolist()


def test_only_engines_and_whole_batches_are_timed() -> None:
    engine: Any = exitkit.compile(exitkit.attach(TinyNet().eval(), images(), at=["blocks.0"]), 0.5)
    for given, batches, message in (
        (None, [1], "engine is NoneType"),
        (engine, [0], r"batches=\[0\] must be"),
        (engine, [], "batches.* must be"),
        (engine, 4, "batches=4 must be"),
    ):
        with pytest.raises(ExitkitError, match=message):
            exitkit.time_exits(given, images(), batches=batches)
