"""A threshold chosen with a guarantee goes with the exits: saved, loaded, run, exported; and exits are taken out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit import ExitkitError, FileError
from exitkit.evaluation import ChosenThreshold, ExitOutputs, ShiftMonitor
from exitkit.methods.policy import ExitPolicy
from tests.saved_exits import edit
from tests.toy import TinyNet, images, noisy


@pytest.fixture(scope="module")
def ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method="sdn"))


@pytest.fixture(scope="module")
def outputs(ee: exitkit.MultiExitModel) -> ExitOutputs:
    return exitkit.collect(ee, [images(600)])


@pytest.fixture(scope="module")
def chosen(outputs: ExitOutputs) -> ChosenThreshold:
    return exitkit.choose_threshold(outputs, max_drop=0.4, risk="disagreement")


@pytest.fixture(scope="module")
def package(ee: exitkit.MultiExitModel, chosen: ChosenThreshold, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    exitkit.export(ee, path, chosen)
    return path


def test_a_guarantee_goes_with_the_exits(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, chosen: ChosenThreshold, tmp_path: Path
) -> None:
    labelled = outputs.against_backbone()
    ee.save_pretrained(tmp_path, threshold=chosen, outputs=labelled)
    again = exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path, images())
    assert again.threshold == chosen
    card = (tmp_path / "README.md").read_text()
    assert str(chosen.guarantee) in card
    engine = exitkit.compile(again)
    assert set(engine.thresholds) == {chosen.threshold}
    assert engine(images(600)).exit.tolist() == outputs.exits_at(chosen.threshold).tolist()
    exitkit.export(again, tmp_path / "model.pt2")
    loaded = exitkit.load(tmp_path / "model.pt2")
    assert loaded.policy == chosen


def test_thresholds_per_exit_come_back(ee: exitkit.MultiExitModel, outputs: ExitOutputs, tmp_path: Path) -> None:
    labelled = outputs.against_backbone()
    ee.save_pretrained(tmp_path, threshold=(0.5, 0.9, 0.7), outputs=labelled)
    again = exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path, images())
    assert again.threshold == (0.5, 0.9, 0.7)
    assert again.policy == ExitPolicy((0.5, 0.9, 0.7), "confidence")
    exits = labelled.exits_at((0.5, 0.9, 0.7))
    accuracy = labelled.correct[range(600), exits].double().mean()
    assert (
        f"| τ as chosen | {accuracy:.2%} | {labelled.costs[exits].mean():.1%} | 0.5, 0.9, 0.7 |"
        in (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"criterion": "margin"}, r"criterion='margin', but the threshold is for 'confidence'"),
        ({"dtype": "bfloat16"}, {}, r"scores with dtype 'bfloat16', but these have 'float32'"),
    ],
)
def test_a_guarantee_for_something_else_is_refused(
    ee: exitkit.MultiExitModel, chosen: ChosenThreshold, changes: Any, arguments: Any, message: str
) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.compile(ee, replace(chosen, **changes), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "margin"}, r"threshold is for scores with criterion 'margin', but these have 'confidence'"),
        ({"dtype": "bfloat16"}, r"threshold is for scores with dtype 'bfloat16', but these have 'float32'"),
    ],
)
def test_an_engine_refuses_a_guarantee_for_something_else(
    package: Path, ee: exitkit.MultiExitModel, chosen: ChosenThreshold, changes: Any, message: str
) -> None:
    other = replace(chosen, **changes)
    for use in (
        exitkit.compile(ee, 0.5).at,
        exitkit.load(package).at,  # type: ignore[union-attr]
        lambda threshold: exitkit.load(package, threshold=threshold),
    ):
        with pytest.raises(ExitkitError, match=message):
            use(other)


def test_another_threshold_brings_its_own_promise(package: Path, chosen: ChosenThreshold) -> None:
    engine = exitkit.load(package, threshold=0.5)
    assert isinstance(engine, exitkit.Engine)
    assert engine.policy == ExitPolicy((0.5,) * 3, "confidence")
    assert engine.at(chosen).policy == chosen
    assert engine.at(chosen.threshold).policy.guarantee is None  # a number alone promises nothing


def test_a_loaded_engine_tells_its_monitor_too(package: Path, outputs: ExitOutputs, chosen: ChosenThreshold) -> None:
    monitor = ShiftMonitor(outputs, chosen.threshold)
    exitkit.load(package, monitor=monitor)(images(600))  # type: ignore[operator]
    assert monitor.report().samples == 600
    with pytest.raises(
        ExitkitError, match="monitor is for scores with criterion 'margin', but these have 'confidence'"
    ):
        exitkit.load(package, monitor=ShiftMonitor(outputs, 0.5, criterion="margin"))
    with pytest.raises(ExitkitError, match=r"monitor is float; give a ShiftMonitor"):
        exitkit.load(package, monitor=0.5)  # type: ignore[arg-type]
    single = package.with_name("model.onnx")
    single.touch()  # refused before it is read
    with pytest.raises(ExitkitError, match=r"a single \.onnx .* tells no monitor"):
        exitkit.load(single, monitor=monitor)


def test_a_monitor_of_other_thresholds_is_refused(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, chosen: ChosenThreshold, package: Path
) -> None:
    """All answers would look like a shift."""
    message = r"monitor is for τ = 0.8, but the engine has .*so that all answers would look like a shift"
    monitor = ShiftMonitor(outputs, 0.8)
    for use in (
        lambda: exitkit.compile(ee, 0.5, monitor=monitor),
        lambda: exitkit.compile(ee, (0.8, 0.8, 0.5), monitor=monitor),
        lambda: exitkit.compile(ee, 0.8).at(0.5).watched(monitor),
        lambda: exitkit.compile(ee, chosen, monitor=monitor),
        lambda: exitkit.load(package, monitor=monitor),
        lambda: exitkit.load(package, threshold=0.5, monitor=monitor),
    ):
        with pytest.raises(ExitkitError, match=message):
            use()
    for engine in (
        exitkit.compile(ee, (0.8,) * 3, monitor=monitor),
        exitkit.load(package, threshold=0.8, monitor=monitor),
    ):
        assert engine.monitor is monitor  # type: ignore[union-attr]
    promised = ShiftMonitor(outputs, chosen)
    assert exitkit.compile(ee, chosen, monitor=promised).monitor is promised


def test_the_engine_tells_its_monitor(ee: exitkit.MultiExitModel, outputs: ExitOutputs) -> None:
    monitor = ShiftMonitor(outputs, 0.8, window=40)
    engine = exitkit.compile(ee, 0.8, monitor=monitor)
    engine(images(600)[:40])
    assert monitor.report().samples == 40
    assert not monitor.alarm
    list(engine.map([images(600)[40:50], images(8) * float("nan")]))
    assert monitor.report().samples == 50  # a score that is no number says nothing
    for _ in range(10):
        engine(images(100) * 40 + 30)
    assert engine.monitor is monitor
    assert engine.at(0.5).monitor is None
    assert monitor.alarm


def test_without_an_exit_the_others_stay_as_they_are(ee: exitkit.MultiExitModel) -> None:
    pruned = ee.prune_exits([1])
    with torch.no_grad():
        before, after = ee(images(4)).logits, pruned(images(4)).logits
    assert all(torch.equal(before[m], logits) for m, logits in zip((0, 2, 3), after, strict=True))
    head = ee.exits[1].macs - ee.boundaries[1].macs - (ee.exits[0].macs - ee.boundaries[0].macs)
    assert [exit_.macs for exit_ in pruned.exits] == [
        ee.exits[0].macs, ee.exits[2].macs - head, ee.exits[3].macs - head
    ]  # fmt: skip
    assert len(exitkit.compile(pruned, 0.5)(images(4)).exit) == 4
    counted = ee.prune_exits(np.array([1]))
    assert [exit_.name for exit_ in counted.exits] == [exit_.name for exit_ in pruned.exits]


@pytest.mark.parametrize("exits", [[0, 1, 2], [3], [-1], ["blocks.0"], 1, "1", [True]])
def test_exits_that_cannot_be_taken_out(ee: exitkit.MultiExitModel, exits: Any) -> None:
    with pytest.raises(ExitkitError, match=r"exits=.*some, not all, of the exits 0 to 2"):
        ee.prune_exits(exits)


def test_exits_that_read_one_another_stay() -> None:
    ee = exitkit.attach(TinyNet().eval(), images(), method="ztw")
    with pytest.raises(ExitkitError, match=r"read one another.*at= naming the others"):
        ee.prune_exits([1])


# one policy per model ------------------------------------------------------------------------------------------------


@pytest.fixture
def own() -> exitkit.MultiExitModel:
    """A model that a test may change."""
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method="sdn"))


def test_a_threshold_is_read_as_it_is_written_shortest(own: exitkit.MultiExitModel, chosen: ChosenThreshold) -> None:
    margin = ExitPolicy((0.5,) * 3, "margin")
    divided = ExitPolicy((0.5,) * 3, "confidence", (1.0, 2.0, 1.0, 1.0))
    for given, read in (
        (0.5, 0.5),
        ((0.5,) * 3, 0.5),
        ((0.5, 0.9, 0.7), (0.5, 0.9, 0.7)),
        (ExitPolicy((0.5,) * 3, "confidence"), 0.5),
        (margin, margin),
        (divided, divided),
        (chosen, chosen),
        (None, None),
    ):
        own.threshold = given
        policy = own.policy
        assert own.threshold == read
        own.threshold = own.threshold  # nothing is lost on the way
        assert own.policy == policy
    own.threshold = 0.5
    assert own.bfloat16().threshold == 0.5


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExitPolicy((0.5,), "confidence"), "policy for 1 exits; here are 3"),
        (ExitPolicy((-0.5,) * 3, "tolerance"), "tolerance"),
        ("high", "threshold='high' must be a number"),
    ],
)
def test_a_policy_for_other_exits_never_becomes_the_models(
    own: exitkit.MultiExitModel, policy: Any, message: str, tmp_path: Path
) -> None:
    own.threshold = 0.5
    for name in ("policy", "threshold"):
        with pytest.raises(ExitkitError, match=message):
            setattr(own, name, policy)
    own.save_pretrained(tmp_path)
    assert exitkit.MultiExitModel.from_pretrained(own.backbone, tmp_path, images()).policy == own.policy
    assert own.threshold == 0.5


def test_a_saved_policy_for_other_exits_is_a_damaged_file(own: exitkit.MultiExitModel, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path, threshold=0.5)
    edit(tmp_path, policy=ExitPolicy((0.5,), "confidence").to_dict())
    with pytest.raises(FileError, match=r"policy\.thresholds holds 1 values for 3 exits"):
        exitkit.MultiExitModel.from_pretrained(own.backbone, tmp_path, images())


def test_a_guarantee_is_neither_saved_nor_loaded_in_another_precision(
    own: exitkit.MultiExitModel, chosen: ChosenThreshold, tmp_path: Path
) -> None:
    own.save_pretrained(tmp_path / "float32", threshold=chosen)
    own.policy = chosen
    own.bfloat16()
    with pytest.raises(ExitkitError, match="with dtype 'float32', but these have 'bfloat16'"):
        own.save_pretrained(tmp_path / "bfloat16")
    torch.manual_seed(0)
    other = TinyNet().eval().double()
    with pytest.warns(UserWarning, match="guaranteed in float32, and this backbone is in float64"):
        again = exitkit.MultiExitModel.from_pretrained(other, tmp_path / "float32", images().double())
    assert again.policy is None


# precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 5}, "dtype=5 must be"),
        ({"dtype": "bananas"}, "dtype='bananas' is unknown"),
        ({"guarantee": 5}, "guarantee=5 must be"),
    ],
)
def test_a_policy_without_sense_is_refused(chosen: ChosenThreshold, changes: Any, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        replace(chosen, **changes)


def test_outputs_in_no_precision_are_refused(outputs: ExitOutputs) -> None:
    with pytest.raises(ExitkitError, match="dtype='bananas' is unknown"):
        replace(outputs, dtype="bananas")


def test_other_thresholds_are_as_many_as_there_are_exits() -> None:
    policy = ExitPolicy((0.5, 0.6), "margin", (1.0, 2.0, 3.0))
    assert policy.at(0.1, 0.2) == ExitPolicy((0.1, 0.2), "margin", (1.0, 2.0, 3.0))
    for values in ((0.1, 0.2, 0.3), (), ("high",), (policy,)):
        with pytest.raises(ExitkitError, match=r"threshold.*(has 3 values|must be a number)"):
            policy.at(*values)


def test_an_engine_stays_in_its_precision(ee: exitkit.MultiExitModel) -> None:
    """A threshold without a guarantee is taken from any precision, as by compile; the engine computes in its own."""
    engine = exitkit.compile(ee, 0.5).at(ExitPolicy((0.8,) * 3, "confidence", dtype="float64"))
    assert engine.policy == ExitPolicy((0.8,) * 3, "confidence", dtype="float32")


def test_a_monitor_of_outputs_in_another_precision_is_refused(
    own: exitkit.MultiExitModel, outputs: ExitOutputs, chosen: ChosenThreshold
) -> None:
    half = own.bfloat16()
    collected = exitkit.collect(half, [images(600).bfloat16()])
    for policy in (0.8, ExitPolicy((0.8,) * 3, "confidence", dtype="bfloat16")):
        monitor = ShiftMonitor(outputs, policy)  # of float32 outputs, whatever the policy says
        for use in (lambda m: exitkit.compile(half, 0.8, monitor=m), exitkit.compile(half, 0.8).watched):
            with pytest.raises(ExitkitError, match=r"monitor is for scores with dtype 'float32', but .*'bfloat16'"):
                use(monitor)
    assert exitkit.compile(half, 0.8, monitor=ShiftMonitor(collected, 0.8)).monitor is not None


def test_outputs_in_another_precision_do_not_show_what_was_guaranteed(
    outputs: ExitOutputs, chosen: ChosenThreshold
) -> None:
    """As a curve, compile and export refuse it; its numbers alone may be tried on any outputs."""
    other = replace(outputs.against_backbone(), dtype="bfloat16")
    for use in (other.at, other.exits_at, other.exit_rates, lambda threshold: ShiftMonitor(other, threshold)):
        with pytest.raises(ExitkitError, match="with dtype 'float32', but these have 'bfloat16'"):
            use(chosen)
    assert other.at(chosen.threshold).cost == pytest.approx(chosen.cost)
