"""Regression: one output per exit, leaving once predictions stop changing, and curves of correlation against cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Tensor

import exitkit
from exitkit import ExitkitError
from exitkit.evaluation import RegressionOutputs, paired_errors
from exitkit.methods.criteria import Tolerance
from tests.toy import TinyNet, images

X = torch.randn(2, 1, 8, 8)


@pytest.fixture
def ee() -> exitkit.MultiExitModel:
    """One output, exits after blocks.0, blocks.1 and blocks.2."""
    return exitkit.attach(TinyNet(num_classes=1), X, method="pbee").eval()


def batches(samples: int = 24) -> list[tuple[Tensor, Tensor]]:
    labels = torch.randn(samples, generator=torch.Generator().manual_seed(1))
    return [(images(8) + target[:, None, None, None].mean(), target) for target in labels.split(8)]


@st.composite
def drawn(draw: st.DrawFn) -> RegressionOutputs:
    """Small integers, so that changes tie."""
    samples, exits = draw(st.integers(2, 7)), draw(st.integers(2, 5))
    numbers = st.integers(-3, 3)
    predictions = draw(st.lists(numbers, min_size=samples * exits, max_size=samples * exits))
    labels = draw(st.lists(numbers, min_size=samples, max_size=samples).filter(lambda values: len(set(values)) > 1))
    steps = draw(st.lists(st.integers(0, 3), min_size=exits, max_size=exits))
    return RegressionOutputs(
        torch.tensor(predictions).float().view(samples, exits),
        torch.tensor(labels),
        1 + torch.tensor(steps).cumsum(0),
        4.0,
        criterion=Tolerance(draw(st.integers(1, 3))).name,
    )


@given(drawn())
@settings(max_examples=30, deadline=None)
def test_spearman_is_pearson_of_the_ranks(outputs: RegressionOutputs) -> None:
    ranks = torch.tensor(np.stack([rankdata(column) for column in outputs.predictions.numpy().T], 1)).float()
    assert outputs.labels is not None
    places = torch.tensor(rankdata(outputs.labels.numpy())).float()
    of_ranks = RegressionOutputs(ranks, places, outputs.macs, outputs.backbone_macs)
    assert outputs.spearman() == pytest.approx(of_ranks.accuracy(), abs=1e-6)


# tolerance -----------------------------------------------------------------------------------------------------------


def leaves(predictions: list[float], tolerance: float, times: int) -> int:
    """PABEE, as its text has it: count the changes below the tolerance, from 0 again after a larger one."""
    count = 0
    for m in range(1, len(predictions) - 1):
        count = count + 1 if abs(predictions[m] - predictions[m - 1]) < tolerance else 0
        if count >= times:
            return m
    return len(predictions) - 1


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(outputs=drawn(), tolerance=st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 7.0]))
def test_a_sample_leaves_after_small_changes_in_a_row(outputs: RegressionOutputs, tolerance: float) -> None:
    times = int(outputs.criterion.partition("-")[2] or 1)
    expected = [leaves(row, tolerance, times) for row in outputs.predictions.tolist()]
    assert outputs.exits_at(-tolerance).tolist() == expected


def test_scores_are_the_largest_of_the_last_changes() -> None:
    lowest = torch.finfo(torch.float32).min
    predictions = torch.tensor([[1.0, 3.0, 3.5, 3.25]])
    predictions = predictions[..., None]
    assert Tolerance().score(predictions).tolist() == [[lowest, -2.0, -0.5, -0.25]]
    assert Tolerance(2).score(predictions).tolist() == [[lowest, lowest, -2.0, -0.5]]
    assert Tolerance(9).score(predictions).tolist() == [[lowest] * 4]


# curves --------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(outputs=drawn())
def test_the_curve_is_what_leaving_at_each_threshold_gives(outputs: RegressionOutputs) -> None:
    labels = outputs.labels.double().numpy()
    curves = {measure: outputs.curve(measure=measure) for measure in ("pearson", "r2")}
    for index, threshold in enumerate(curves["r2"].thresholds):
        exits = outputs.exits_at(float(threshold))
        answers = outputs.predictions.double().numpy()[np.arange(len(exits)), exits]
        assert curves["r2"].cost[index] == pytest.approx(outputs.costs[exits].mean())
        r2 = 1 - ((answers - labels) ** 2).sum() / ((labels - labels.mean()) ** 2).sum()
        assert curves["r2"].accuracy[index] == pytest.approx(r2)
        pearson = 0 if len(set(answers)) == 1 else np.corrcoef(answers, labels)[0, 1]
        assert curves["pearson"].accuracy[index] == pytest.approx(pearson, abs=1e-7)


def test_every_exit_by_itself() -> None:
    predictions, labels = torch.randn(50, 3), torch.randn(50)
    outputs = RegressionOutputs(predictions, labels, [1, 2, 3], 3.0)
    expected = [np.corrcoef(predictions[:, m], labels)[0, 1] for m in range(3)]
    assert outputs.accuracy().tolist() == pytest.approx(expected, abs=1e-6)
    assert outputs.mse().tolist() == pytest.approx(
        [(predictions[:, m] - labels).square().mean().item() for m in range(3)]
    )
    assert outputs.best_exit().exit == int(np.argmax(expected))


def test_correlation_keeps_its_digits_far_from_zero() -> None:
    labels = torch.randn(100)
    outputs = RegressionOutputs(
        (labels + 0.1 * torch.randn(100))[:, None].expand(-1, 2) + 1000, labels + 1000, [1, 2], 2.0
    )
    expected = np.corrcoef(outputs.predictions[:, 0].double(), outputs.labels.double())[0, 1]
    assert outputs.accuracy().tolist() == pytest.approx([expected] * 2, abs=1e-9)


def test_equal_predictions_correlate_with_nothing() -> None:
    outputs = RegressionOutputs(torch.full((7, 2), 0.1), torch.arange(7.0), [1, 2], 2.0)
    assert outputs.accuracy().tolist() == [0, 0]


def test_the_table_names_the_measure() -> None:
    outputs = RegressionOutputs(torch.randn(9, 3), torch.randn(9), [1, 2, 3], 4.0)
    table = str(outputs.curve().budget_table())
    assert "pearson" in table
    assert "accuracy" not in table
    assert len({len(line) for line in table.splitlines()}) == 1  # also where τ is the lowest number there is


def test_squared_errors_are_compared_at_a_budget() -> None:
    """By hand: half of the samples change nothing from exit 0 to 1, and leave there for 5/6 of the cost."""
    labels = torch.tensor([1.0, 2.0, 3.0, 4.0])
    a = RegressionOutputs(torch.tensor([[3, 3, 1], [4, 4, 2], [9, 0, 3], [9, 0, 4]]).float(), labels, [1, 2, 3], 3.0)
    b = RegressionOutputs(torch.tensor([[1, 1, 8], [2, 2, 8], [9, 0, 4], [9, 0, 5]]).float(), labels, [1, 2, 3], 3.0)
    (pair,) = paired_errors({"a": a, "b": b}, 0.9).pairs
    assert pair.errors == (2.0, 0.5)  # (4 + 4 + 0 + 0) / 4 and (0 + 0 + 1 + 1) / 4
    assert pair.difference.value == 1.5
    assert "+1.5000" in str(paired_errors({"a": a, "b": b}, 0.9))
    classifier = exitkit.ExitOutputs(torch.zeros(4, 3, 2), torch.zeros(4).long(), [1, 2, 3], 3.0)
    with pytest.raises(ExitkitError, match="a regression and a classifier"):
        paired_errors({"a": a, "b": classifier})  # type: ignore[dict-item]
    with pytest.raises(ExitkitError, match="of a classifier; compare those by paired_tests"):
        paired_errors({"a": classifier, "b": classifier})  # type: ignore[dict-item]
    with pytest.raises(ExitkitError, match="regressions have none; compare their errors by paired_errors"):
        exitkit.evaluation.paired_tests({"a": a, "b": b})
    with pytest.raises(ExitkitError, match="outputs=list: give a dict"):
        paired_errors([a, b])  # type: ignore[arg-type]


def test_the_interval_of_a_difference_is_as_wide_as_its_standard_error_says() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(2000, generator=generator)
    one, two = (
        RegressionOutputs(labels[:, None] + spread * torch.randn(2000, 2, generator=generator), labels, [1, 2], 2.0)
        for spread in (1.0, 1.2)
    )
    (pair,) = paired_errors({"one": one, "two": two}, 5.0, resamples=2000).pairs
    errors = [(each.predictions[:, 1] - labels).square() for each in (one, two)]
    difference = errors[0] - errors[1]
    assert pair.difference.value == pytest.approx(float(difference.mean()), rel=1e-4)
    width = 2 * 1.96 * float(difference.std()) / 2000**0.5
    assert pair.difference.high - pair.difference.low == pytest.approx(width, rel=0.1)


# from model to outputs -----------------------------------------------------------------------------------------------


def test_exits_have_one_output_and_leave_by_tolerance(ee: exitkit.MultiExitModel) -> None:
    output = ee(images(5))
    assert [logits.shape for logits in output.logits] == [(5, 1)] * 4
    assert (ee.regression, ee.method.criterion) == (True, "tolerance")
    assert torch.equal(output.logits[-1], ee.backbone(images(5)))


def test_collect_gives_predictions(ee: exitkit.MultiExitModel) -> None:
    data = batches()
    outputs = exitkit.collect(ee, data)
    assert isinstance(outputs, RegressionOutputs)
    with torch.no_grad():
        expected = torch.cat([torch.cat(ee(inputs).logits, 1) for inputs, _ in data])
    assert torch.equal(outputs.predictions, expected)
    assert torch.equal(outputs.labels, torch.cat([labels for _, labels in data]))
    assert exitkit.collect(ee, [inputs for inputs, _ in data]).labels is None


def test_times_go_from_the_method_to_the_outputs() -> None:
    method = exitkit.PBEE(times=2)
    ee = exitkit.attach(TinyNet(num_classes=1), X, method=method)
    assert exitkit.collect(ee, batches()).exits_at(-1e9).tolist() == [2] * 24


def test_outputs_come_back(tmp_path: Path) -> None:
    outputs = RegressionOutputs(torch.randn(5, 3), torch.randn(5), [1, 2, 3], 3.5, criterion="tolerance-2")
    outputs.save(tmp_path / "o.safetensors")
    again = RegressionOutputs.load(tmp_path / "o.safetensors")
    assert torch.equal(again.predictions, outputs.predictions)
    assert torch.equal(again.labels, outputs.labels)
    assert (again.criterion, again.backbone_macs) == ("tolerance-2", 3.5)
    with pytest.raises(ExitkitError, match=r"holds predictions of a regression.*RegressionOutputs\.load"):
        exitkit.ExitOutputs.load(tmp_path / "o.safetensors")


def test_exits_come_back_with_a_card_that_names_the_measure(ee: exitkit.MultiExitModel, tmp_path: Path) -> None:
    ee.save_pretrained(tmp_path, threshold=-0.1, outputs=exitkit.collect(ee, batches()))
    again = exitkit.MultiExitModel.from_pretrained(exitkit.detach(ee), tmp_path, X)
    assert again.method == ee.method
    assert torch.equal(again.eval()(X).logits[0], ee(X).logits[0])
    card = (tmp_path / "README.md").read_text()
    assert "Pearson correlation" in card
    assert "accuracy" not in card


# other methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sdn", "gpf", exitkit.ZTW(ensemble="none")])
def test_exits_of_other_methods_predict_numbers(method: Any, tmp_path: Path) -> None:
    """They learn, leave by tolerance, answer alike in the engine, and come back."""
    torch.manual_seed(0)
    ee = exitkit.attach(TinyNet(num_classes=1), X, every=1, method=method, head="1L")
    assert ee.method.criterion == "tolerance"
    history = exitkit.Trainer(ee, epochs=3, lr=0.01, show_progress=False).fit(batches())
    assert sum(history[-1].loss[:-1]) < sum(history[0].loss[:-1])
    x = images(6)
    with torch.no_grad():
        wanted = ee.eval()(x).logits
    for threshold in (float("inf"), -1e9):
        exit_ = 3 if threshold > 0 else 1  # a change needs two predictions
        assert torch.allclose(exitkit.compile(ee, threshold)(x).logits, wanted[exit_], atol=1e-5)
    ee.save_pretrained(tmp_path)
    again = exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path, X).eval()
    assert torch.equal(again(x).logits[1], wanted[1])


def test_a_cascade_hands_the_prediction_on_as_it_is() -> None:
    ee = exitkit.attach(TinyNet(num_classes=1), X, every=1, method=exitkit.ZTW(ensemble="none"), head="1L").eval()
    with torch.no_grad():
        first, second = ee.classifiers[0], ee.classifiers[1]
        second.linear.weight[:] = 0.0  # type: ignore[union-attr, index, operator]
        second.linear.weight[:, -1] = 2.0  # type: ignore[union-attr, index, operator]
        second.linear.bias[:] = 1.0  # type: ignore[union-attr, index, operator]
        out = ee(images(5))
    assert first.carries == 1
    assert torch.allclose(out.logits[1], 2 * out.logits[0] + 1, atol=1e-4)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(outputs=drawn())
def test_budgets_in_squared_error(outputs: RegressionOutputs) -> None:
    assert outputs.labels is not None
    curve = outputs.curve(measure="mse")
    errors = (outputs.predictions - outputs.labels[:, None]).square().double().numpy()
    for index, threshold in enumerate(curve.thresholds):
        exits = outputs.exits_at(float(threshold))
        assert curve.accuracy[index] == pytest.approx(errors[np.arange(len(exits)), exits].mean())
    assert curve.best().accuracy == curve.accuracy.min()
    assert f"{curve.no_limit().accuracy:.4f}" in str(curve.budget_table()).splitlines()[-2]


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "ztw",
            r"the ensemble of method='ztw' combines probabilities; leave it out, as in exitkit\.ZTW\(ensemble='none'\)",
        ),
        (exitkit.PBEE(ensemble="mean"), "the ensemble of method='pbee'"),
        (exitkit.SDN(criterion="margin"), "criterion='margin' scores classes; use 'tolerance'"),
        (exitkit.BranchyNet(nats=True), "criterion='nats' scores classes"),
    ],
)
def test_methods_that_need_classes(method: Any, message: str) -> None:
    with pytest.raises(ExitkitError, match=rf"TinyNet has 1 output, which is regression.*{message}"):
        exitkit.attach(TinyNet(num_classes=1), X, method=method)


def test_tolerance_is_not_for_classes() -> None:
    with pytest.raises(
        ExitkitError, match="criterion='tolerance' is for regression, but the model has 3 outputs; use 'patience'"
    ):
        exitkit.attach(TinyNet(), X, method=exitkit.PBEE(criterion="tolerance"))
    outputs = exitkit.ExitOutputs(torch.zeros(4, 3, 2), torch.zeros(4).long(), [1, 2, 3], 3.0)
    for ask in (outputs.scores, outputs.curve, lambda criterion: outputs.exits_at(-0.1, criterion)):
        with pytest.raises(ExitkitError, match="criterion='tolerance' is for regression, but the model has 2 outputs"):
            ask("tolerance")


@pytest.mark.parametrize("times", [0, -1, 1.5, True])
def test_times_out_of_range(times: Any) -> None:
    with pytest.raises(ExitkitError, match=f"times={times!r} must be a whole number"):
        exitkit.PBEE(times=times)


def test_times_are_said_once() -> None:
    """They are the criterion's own, and no method has two numbers of them."""
    assert exitkit.PBEE(times=2) == exitkit.PBEE(criterion="tolerance-2") == exitkit.PBEE(criterion=Tolerance(2))
    assert exitkit.PBEE(times=1).criterion == "tolerance"
    with pytest.raises(ExitkitError, match="times=3 is short for criterion='tolerance-3'; give one of them"):
        exitkit.PBEE(criterion="tolerance-2", times=3)
    with pytest.raises(TypeError, match="times"):
        exitkit.Method("mine", criterion="tolerance-2", times=3)  # type: ignore[call-arg]
    with pytest.raises(ExitkitError, match="criterion='tolerance-2' is for regression, but the model has 3 outputs"):
        exitkit.attach(TinyNet(), X, method=exitkit.PBEE(times=2))


@pytest.mark.parametrize("labels", [torch.zeros(8, 2), torch.full((8,), torch.nan), torch.zeros(7)])
def test_labels_that_are_no_targets(ee: exitkit.MultiExitModel, labels: Tensor) -> None:
    with pytest.raises(ExitkitError, match="one finite number per sample"):
        exitkit.collect(ee, [(images(8), labels)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": torch.zeros(4, 3, 2)}, r"predictions have .*shape \(4, 3, 2\).*\(samples, exits \+ 1\)"),
        ({"log_probs": torch.zeros(4)}, r"predictions have .*shape \(4,\)"),
        ({"log_probs": torch.zeros(4, 3).long()}, "predictions have dtype torch.int64"),
        ({"log_probs": torch.tensor([[0.0, torch.nan, 0.0]] * 4)}, "NaN or infinity: exit 1 on 4 of 4"),
        ({"macs": [3, 2, 1]}, "macs="),
    ],
)
def test_bad_outputs_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {"log_probs": torch.zeros(4, 3), "labels": torch.arange(4.0), "macs": [1, 2, 3], "backbone_macs": 3.0}
    with pytest.raises(ExitkitError, match=message):
        RegressionOutputs(**(good | changes))


def test_what_regression_cannot_answer() -> None:
    outputs = RegressionOutputs(torch.zeros(4, 3), torch.zeros(4), [1, 2, 3], 3.0)
    with pytest.raises(ExitkitError, match="no right and wrong"):
        outputs.hindsight_improvability()
    with pytest.raises(ExitkitError, match="labels are all the same"):
        outputs.curve()
    with pytest.raises(ExitkitError, match=r"criterion='confidence' is for classes.*use 'tolerance'"):
        outputs.scores("confidence")
    with pytest.raises(ExitkitError, match=r"measure='rmse' is unknown.*'mse'"):
        outputs.curve(measure="rmse")  # type: ignore[arg-type]
    with pytest.raises(ExitkitError, match="labels=None"):
        RegressionOutputs(torch.zeros(4, 3), None, [1, 2, 3], 3.0).mse()
