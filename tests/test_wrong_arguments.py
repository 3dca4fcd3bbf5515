"""Arguments of another type: one ArgumentError that names the argument; whole numbers of numpy are whole numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit import ArgumentError, ExitOutputs
from exitkit.calibration import exits_that_do_not_pay
from exitkit.evaluation import ExitTimes, ShiftMonitor, bootstrap, paired_tests, plot_curves, plot_hindsight
from exitkit.models import cifar_resnet
from exitkit.training import fit_ensemble
from tests.toy import TinyNet, images


@pytest.fixture(scope="module")
def ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return exitkit.attach(TinyNet().eval(), images(), head="conv", method="sdn")


@pytest.fixture(scope="module")
def outputs(ee: exitkit.MultiExitModel) -> ExitOutputs:
    return exitkit.collect(ee, [images(40)]).against_backbone()


def first(outputs: ExitOutputs) -> float:
    return float(outputs.accuracy()[0])


def test_plain_numbers_are_no_policy(outputs: ExitOutputs) -> None:
    with pytest.raises(exitkit.ArgumentError, match=r"policy=0\.5 must be .*outputs\.at"):
        outputs.under(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"outputs": 5}, "outputs"),
        ({"statistic": 5}, "statistic"),
        ({"resamples": "a"}, "resamples"),
        ({"resamples": 0}, "resamples"),
        ({"resamples": 39}, "resamples=39 must be a whole number at least 40"),
        ({"confidence": "a"}, "confidence"),
        ({"confidence": 1}, "confidence"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bootstrap(outputs: ExitOutputs, options: dict[str, Any], name: str) -> None:
    arguments: dict[str, Any] = {"outputs": outputs, "statistic": first, **options}
    with pytest.raises(ArgumentError, match=name):
        bootstrap(**arguments)


@pytest.mark.parametrize("heads", [5, "abc", [1, 2, "3"], [1, 2, -3], [1, 2]])
def test_heads(outputs: ExitOutputs, heads: Any) -> None:
    with pytest.raises(ArgumentError, match=r"heads="):
        exits_that_do_not_pay(outputs, heads)


@pytest.mark.parametrize("budgets", [5, ["x"], "x", [0], [True], []])
def test_budgets(outputs: ExitOutputs, budgets: Any) -> None:
    with pytest.raises(ArgumentError, match=r"budgets"):
        exits_that_do_not_pay(outputs, [1, 1, 1], budgets)


@pytest.mark.parametrize("times", [5, [5], "ms", None])
def test_times(outputs: ExitOutputs, times: Any) -> None:
    with pytest.raises(ArgumentError, match=r"times=.*exitkit\.time_exits"):
        outputs.timed(times)


@pytest.mark.parametrize("sizes", [5, ["a"], [0], [True], np.array(5)])
def test_sizes_and_batches(ee: exitkit.MultiExitModel, sizes: Any) -> None:
    engine = exitkit.compile(ee, 0.5)
    with pytest.raises(ArgumentError, match=r"sizes=.* must be a list, each a whole number at least 1"):
        engine.warm(images(), sizes)
    with pytest.raises(ArgumentError, match=r"batches=.* must be a list, each a whole number at least 1"):
        exitkit.time_exits(engine, images(), sizes)


def test_paths(ee: exitkit.MultiExitModel, outputs: ExitOutputs) -> None:
    path: Any = 5
    for use in (
        lambda: exitkit.load(path),
        lambda: exitkit.export(ee, path, 0.5),
        lambda: exitkit.collect(ee, [images()], path),
        lambda: outputs.save(path),
        lambda: ExitOutputs.load(path),
        lambda: plot_curves({"sdn": outputs.curve()}, path),
    ):
        with pytest.raises(ArgumentError, match="path=5 must be a text or a PathLike"):
            use()
    with pytest.raises(ArgumentError, match="directory=5 must be a text or a PathLike"):
        ee.save_pretrained(path)


def test_models_and_pictures(tmp_path: Path) -> None:
    anything: Any = 5
    with pytest.raises(ArgumentError, match="model is int; fit_ensemble takes"):
        fit_ensemble(anything, [])
    for curves in (5, [5], {"sdn": 5}):
        with pytest.raises(ArgumentError, match="curves"):
            plot_curves(curves, tmp_path / "curves.png")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="improvability=5"):
        plot_hindsight(anything, tmp_path / "hindsight.png")


def test_whole_numbers_of_numpy_are_taken(ee: exitkit.MultiExitModel, outputs: ExitOutputs, tmp_path: Path) -> None:
    whole: Any = np.int64
    ShiftMonitor(outputs, 0.5, window=whole(50))
    paired_tests({"a": outputs, "b": outputs}, 1.5, resamples=whole(40), seed=whole(0))
    bootstrap(outputs, first, resamples=whole(40), seed=whole(0))
    assert len(ee.prune_exits([whole(1)]).exits) == 3
    assert cifar_resnet(whole(20)).layer3
    timed = outputs.timed([ExitTimes("cpu", "any", whole(4), (1.0, 2.0, 3.0, 4.0))])
    timed.save(tmp_path / "outputs.safetensors")
    assert ExitOutputs.load(tmp_path / "outputs.safetensors").timings == timed.timings
    engine = exitkit.compile(ee, 0.5)
    assert [one.batch for one in exitkit.time_exits(engine, images(), [whole(2)])] == [2]
    assert sum(len(one.exit) for one in engine.map([images(4)], batch_size=whole(4))) == 4


@pytest.mark.parametrize("option", ["optimize", "skip_unprofitable"])
def test_flags_are_true_or_false(ee: exitkit.MultiExitModel, tmp_path: Path, option: str) -> None:
    """A text is true to Python, whatever it says."""
    with pytest.raises(ArgumentError, match=f"{option}='no' must be"):
        exitkit.compile(ee, 0.5, **{option: "no"})
    if option == "optimize":
        with pytest.raises(ArgumentError, match="optimize='no' must be"):
            exitkit.export(ee, tmp_path / "model.pt2", 0.5, optimize="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("of", [tuple, list, np.array, iter])
def test_several_values_come_in_any_form(outputs: ExitOutputs, of: Any) -> None:
    assert exits_that_do_not_pay(outputs, of([1.0, 1.0, 1.0]), of([2.0])) == exits_that_do_not_pay(
        outputs, [1.0, 1.0, 1.0], [2.0]
    )
