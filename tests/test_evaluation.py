"""Evaluation against brute force: the exact curve, budgets, hindsight improvability, criteria, files, collect."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError, ExitOutputs, evaluation
from exitkit.methods.criteria import as_criterion
from exitkit.methods.policy import ExitPolicy
from tests.toy import TinyNet

CRITERIA = ["confidence", "entropy", "margin", "nats", "patience"]
PNG = b"\x89PNG\r\n\x1a\n"


def outputs_of(right: list[list[int]], macs: list[float] | None = None, backbone: float = 4.0) -> ExitOutputs:
    """Two classes, label 0 for all: 1 where an exit is right about a sample."""
    known = torch.tensor(right)
    logits = torch.stack([2.0 * known, 2.0 * (1 - known)], -1)
    return ExitOutputs(logits, torch.zeros(len(right)).long(), macs or range(1, 1 + known.shape[1]), backbone)


def confident(levels: list[list[float]], **options: Any) -> ExitOutputs:
    """Two classes, label 0: probabilities of class 0 as given, (N, M+1)."""
    p = torch.tensor(levels, dtype=torch.float64)
    usual = {"labels": torch.zeros(len(levels)).long(), "macs": range(1, 1 + p.shape[1]), "backbone_macs": 4.0}
    return ExitOutputs(torch.stack([p, 1 - p], -1).log(), **(usual | options))


def some_outputs(samples: int = 50, exits: int = 4, classes: int = 5, **options: Any) -> ExitOutputs:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(samples, exits, classes, generator=generator)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    usual = {"labels": labels, "macs": torch.arange(1, exits + 1) * 1.0, "backbone_macs": float(exits) - 0.5}
    return ExitOutputs(logits, **(usual | options))


@st.composite
def drawn_outputs(draw: st.DrawFn) -> ExitOutputs:
    """Small outputs with many ties: logits are small integers. Costs are integers, and may stand still."""
    samples, exits, classes = draw(st.integers(1, 9)), draw(st.integers(2, 4)), draw(st.integers(2, 4))
    count = samples * exits * classes
    logits = draw(st.lists(st.integers(-5, -1), min_size=count, max_size=count))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples))
    steps = draw(st.lists(st.integers(0, 5), min_size=exits - 1, max_size=exits - 1))
    first = draw(st.integers(1, 5))
    macs = np.cumsum([first, *steps])
    backbone = draw(st.integers(max(1, int(macs[-1]) - 3), int(macs[-1])))
    return ExitOutputs(
        torch.tensor(logits, dtype=torch.float32).view(samples, exits, classes),
        torch.tensor(labels),
        torch.from_numpy(macs).double(),
        float(backbone),
    )


def brute(outputs: ExitOutputs, scores: list[list[float]], threshold: float) -> tuple[Fraction, Fraction]:
    """Accuracy and cost at one threshold, sample by sample, in exact arithmetic."""
    right = outputs.correct.tolist()
    macs = [Fraction(value) for value in outputs.macs.tolist()]
    left = [
        next((m for m, score in enumerate(row[:-1]) if score > threshold), len(macs) - 1)  # strictly above
        for row in scores
    ]
    accuracy = Fraction(sum(right[sample][m] for sample, m in enumerate(left)), len(left))
    return accuracy, sum((macs[m] for m in left), Fraction(0)) / len(left) / Fraction(outputs.backbone_macs)


def scores_of(outputs: ExitOutputs, criterion: str) -> list[list[float]]:
    return outputs.scores(criterion).double().tolist()


def candidates(scores: list[list[float]]) -> list[float]:
    """One threshold below every score, then every distinct score of an exit, ascending."""
    distinct = sorted({score for row in scores for score in row[:-1]})
    return [distinct[0] - 1, *distinct]


property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# the curve -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@property_test
@given(outputs=drawn_outputs())
def test_curve_equals_brute_force_at_and_between_all_thresholds(criterion: str, outputs: ExitOutputs) -> None:
    curve, scores = outputs.curve(criterion), scores_of(outputs, criterion)
    distinct = candidates(scores)
    between = [(low + high) / 2 for low, high in pairwise(distinct)]
    for threshold in [*distinct, *between, distinct[-1] + 1]:
        accuracy, cost = brute(outputs, scores, threshold)
        point = curve.at_threshold(threshold)
        assert point.threshold == threshold
        assert point.accuracy == pytest.approx(float(accuracy))
        assert point.cost == pytest.approx(float(cost))


@pytest.mark.parametrize("criterion", CRITERIA)
@property_test
@given(outputs=drawn_outputs())
def test_every_point_of_the_curve_is_reached_at_its_threshold(criterion: str, outputs: ExitOutputs) -> None:
    curve, scores = outputs.curve(criterion), scores_of(outputs, criterion)
    assert (np.diff(curve.thresholds) > 0).all()
    assert (np.diff(curve.cost) >= 0).all()
    for threshold, accuracy, cost in zip(curve.thresholds, curve.accuracy, curve.cost, strict=True):
        exact = brute(outputs, scores, float(threshold))
        assert (accuracy, cost) == pytest.approx((float(exact[0]), float(exact[1])))


@pytest.mark.parametrize("criterion", CRITERIA)
@property_test
@given(outputs=drawn_outputs())
def test_exits_at_agrees_with_the_curve_at_every_threshold(criterion: str, outputs: ExitOutputs) -> None:
    curve, right = outputs.curve(criterion), outputs.correct.numpy()
    for threshold, accuracy, cost in zip(curve.thresholds, curve.accuracy, curve.cost, strict=True):
        left = outputs.exits_at(float(threshold), criterion)
        assert right[np.arange(len(left)), left].mean() == pytest.approx(accuracy)
        assert outputs.costs[left].mean() == pytest.approx(cost)


def test_a_score_of_zero_is_above_the_first_threshold() -> None:
    """Two equal probabilities give margin 0; at the curve's first threshold everybody leaves at exit 0."""
    outputs = confident([[0.5, 0.9], [0.8, 0.9]])
    assert outputs.exits_at(float(outputs.curve("margin").thresholds[0]), "margin").tolist() == [0, 0]


def test_exits_at_compares_a_threshold_between_two_floats_exactly() -> None:
    outputs = confident([[0.55, 0.9]])
    below = math.nextafter(float(outputs.scores()[0, 0]), 0)
    assert outputs.curve().at_threshold(below).cost == 0.25
    assert outputs.exits_at(below).tolist() == [0]


def test_a_score_equal_to_the_threshold_stays() -> None:
    outputs = confident([[0.75, 0.9], [0.75, 0.9], [0.9, 0.9]])
    tie = float(outputs.scores()[0, 0])
    assert outputs.exits_at(tie).tolist() == [1, 1, 0]
    assert outputs.curve().at_threshold(tie).cost == pytest.approx((2 + 2 + 1) / 3 / 4)


def test_a_later_exit_takes_whom_an_earlier_one_left() -> None:
    outputs = confident([[0.6, 0.8, 0.9], [0.9, 0.6, 0.9], [0.6, 0.7, 0.99]])
    assert outputs.exits_at(0.75).tolist() == [1, 0, 2]
    assert outputs.exit_rates(0.75).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("criterion", CRITERIA[:3])
def test_above_one_everybody_gets_the_backbones_answer(criterion: str) -> None:
    outputs = some_outputs()
    point = outputs.curve(criterion).at_threshold(1.0001)
    assert point.accuracy == pytest.approx(outputs.accuracy()[-1])
    assert point.cost == pytest.approx(4 / 3.5)
    assert outputs.exit_rates(1.0001, criterion).tolist() == [0, 0, 0, 1]


def test_below_every_score_everybody_leaves_at_the_first_exit() -> None:
    outputs = some_outputs()
    assert outputs.exits_at(-0.1).tolist() == [0] * 50
    point = outputs.curve().at_threshold(-0.1)
    assert (point.accuracy, point.cost) == pytest.approx((outputs.accuracy()[0], 1 / 3.5))


def test_exit_rates_count_exits_nobody_takes() -> None:
    outputs = confident([[0.6, 0.6, 0.9, 0.9], [0.9, 0.6, 0.9, 0.9]])
    assert outputs.exit_rates(0.7).tolist() == [0.5, 0, 0.5, 0]


def test_the_outputs_own_criterion_is_the_default() -> None:
    outputs = some_outputs(criterion="patience")
    assert np.array_equal(outputs.curve().cost, outputs.curve("patience").cost)
    assert not np.array_equal(outputs.curve().cost, outputs.curve("confidence").cost)
    assert outputs.exits_at(1).tolist() == outputs.exits_at(1, "patience").tolist()


def test_outputs_are_shown_without_their_numbers() -> None:
    """Every hash of every sample was printed."""
    outputs = some_outputs(3, 2, 5, hashes=torch.arange(3))
    assert (
        repr(outputs) == "ExitOutputs(3 samples, 5 classes, cost of each exit: 66.7%, 133.3%, criterion='confidence')"
    )
    predictions = evaluation.RegressionOutputs(torch.zeros(3, 2), None, torch.tensor([1.0, 2.0]), 2.0)
    assert repr(predictions) == (
        "RegressionOutputs(3 samples, no labels, cost of each exit: 50.0%, 100.0%, criterion='tolerance')"
    )


def test_patience_thresholds_are_counts() -> None:
    right = [[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 1]]
    outputs = outputs_of(right)
    assert outputs.curve("patience").thresholds.tolist() == [0, 1, 2, 3]
    assert [outputs.exits_at(t, "patience").tolist() for t in range(4)] == [[0, 0, 0], [1, 2, 3], [2, 3, 3], [3, 3, 3]]


def test_unknown_criteria_are_refused() -> None:
    with pytest.raises(ExitkitError, match=r"criterion='confidance'.*Did you mean 'confidence'"):
        some_outputs().curve("confidance")


def test_accuracy_of_each_exit() -> None:
    assert outputs_of([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0]]).accuracy().tolist() == [0.25, 0.25, 0.75]


# budgets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@property_test
@given(outputs=drawn_outputs(), budget=st.sampled_from([0.25, 0.375, 0.5, 0.75, 0.875, 1.0, 2.0, 1000.0]))
def test_at_budget_is_the_highest_threshold_below_it(criterion: str, outputs: ExitOutputs, budget: float) -> None:
    curve, scores = outputs.curve(criterion), scores_of(outputs, criterion)
    points = [brute(outputs, scores, threshold) for threshold in candidates(scores)]
    below = [point for point in points if point[1] < Fraction(budget)]
    if not below:
        with pytest.raises(ExitkitError, match=f"budget={budget}"):
            curve.at_budget(budget)
    else:
        point = curve.at_budget(budget)
        assert (point.accuracy, point.cost) == pytest.approx((float(below[-1][0]), float(below[-1][1])))
        assert brute(outputs, scores, point.threshold) == below[-1]


def test_a_cost_equal_to_the_budget_is_over_it() -> None:
    """Costs 1/4, 1/2 and 1 of the backbone; half of the samples at the second exit costs exactly 3/8."""
    outputs = confident([[0.9, 0.9, 0.9], [0.6, 0.9, 0.9]], macs=[1, 2, 4])
    assert outputs.curve().at_budget(0.375).cost == 0.25
    assert outputs.curve().at_budget(0.376).cost == 0.375


@property_test
@given(samples=st.integers(1, 20), macs=st.lists(st.integers(1, 50), min_size=2, max_size=4).map(sorted))
def test_staying_to_the_end_costs_exactly_the_last_exit(samples: int, macs: list[int]) -> None:
    """Otherwise rounding lets a cost of 100% pass as below the budget of 100%."""
    levels = 0.5 + torch.rand(samples, len(macs), generator=torch.Generator().manual_seed(0)) / 2
    outputs = confident(levels.tolist(), macs=macs, backbone_macs=float(macs[-1]))
    assert outputs.curve().no_limit().cost == 1.0


@pytest.mark.parametrize("budget", [0.0, -1.0, 0.25, math.nan])
def test_budgets_that_cannot_be_kept_are_refused(budget: float) -> None:
    with pytest.raises(ExitkitError, match=r"budget=.*(the first exit already costs 0\.250|must be a number above 0)"):
        confident([[0.6, 0.9]]).curve().at_budget(budget)


@pytest.mark.parametrize("budget", [50, 100.0, 10.5])
def test_percentages_are_no_budgets(budget: float) -> None:
    outputs = confident([[0.6, 0.9]])
    message = rf"={budget} would be .*; budgets are shares of it: {budget / 100:g} for {budget:g}%"
    with pytest.raises(ExitkitError, match="budget" + message):
        outputs.curve().at_budget(budget)
    with pytest.raises(ExitkitError, match="budget" + message):
        outputs.best_exit(budget)
    with pytest.raises(ExitkitError, match="budgets" + message):
        outputs.curve().budget_table([0.5, budget])


@pytest.mark.parametrize("budget", [10, 1_000, math.inf])
def test_budgets_of_several_backbones_are_kept_by_all_samples(budget: float) -> None:
    outputs = confident([[0.6, 0.9]])
    assert outputs.curve().at_budget(budget) == outputs.curve().no_limit()
    assert outputs.best_exit(budget).exit == 0


def test_a_budget_point_holds_its_policy_and_goes_to_json() -> None:
    point = confident([[0.6, 0.9]]).curve().at_budget(0.3)
    assert (point.threshold, point.accuracy, point.cost) == (0, 1, 0.25)
    assert point.policy == ExitPolicy((0.0,), "confidence")
    assert json.loads(json.dumps(point.to_dict())) == {"threshold": 0, "accuracy": 1, "cost": 0.25}
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.cost = 0.5  # type: ignore[misc]


def test_budget_table_has_the_papers_rows() -> None:
    curve = some_outputs().curve()
    table = curve.budget_table().rows
    assert list(table) == ["25%", "50%", "75%", "100%", "Max (no limit)", "Max (best τ)"]
    assert [table[f"{share}%"] for share in (50, 75, 100)] == [curve.at_budget(b) for b in (0.5, 0.75, 1.0)]


def test_budget_rows_below_the_first_exit_are_none() -> None:
    rows = confident([[0.6, 0.9, 0.9]], macs=[2, 3, 5]).curve().budget_table().rows
    assert [name for name, point in rows.items() if point is None] == ["25%", "50%"]


def test_both_readings_of_max() -> None:
    """The first exit is right about all, the backbone about one of two, at more than 100%."""
    outputs = ExitOutputs(
        torch.tensor([[[0.7, 0.3], [0.9, 0.1]], [[0.8, 0.2], [0.1, 0.9]]]).log(), torch.zeros(2).long(), [1, 5], 4.0
    )
    rows = outputs.curve().budget_table().rows
    last, best = rows["Max (no limit)"], rows["Max (best τ)"]
    assert (last.accuracy, last.cost) == (0.5, 1.25)
    assert (best.accuracy, best.cost) == (1.0, 0.25)


@property_test
@given(outputs=drawn_outputs())
def test_best_is_the_cheapest_of_the_most_accurate(outputs: ExitOutputs) -> None:
    scores = scores_of(outputs, "confidence")
    points = [brute(outputs, scores, threshold) for threshold in candidates(scores)]
    accuracy = max(accuracy for accuracy, _ in points)
    cost = min(cost for point, cost in points if point == accuracy)
    best = outputs.curve().best()
    assert (best.accuracy, best.cost) == pytest.approx((float(accuracy), float(cost)))


def test_budget_table_prints_a_dash_where_there_is_no_point() -> None:
    lines = str(confident([[0.6, 0.9, 0.9]], macs=[2, 3, 5]).curve().budget_table()).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["25%", "-"], ["50%", "-"], ["75%", "100.00%"]]


# hindsight improvability ---------------------------------------------------------------------------------------------


def test_hindsight_improvability_by_hand() -> None:
    right = [
        [1, 0, 0, 1],
        [0, 1, 0, 1],
        [0, 0, 0, 1],
        [1, 1, 1, 1],
        [1, 0, 1, 1],
    ]
    # exit 1 errs on 0, 2, 4, exit 0 knew 0 and 4; exit 2 errs on 0, 1, 2, some exit knew 0 and 1; exit 3 never errs
    assert outputs_of(right).hindsight_improvability().tolist() == pytest.approx([0, 2 / 3, 2 / 3, 0])


def test_hindsight_takes_the_union_of_earlier_exits() -> None:
    assert outputs_of([[1, 0, 0], [0, 1, 0]]).hindsight_improvability().tolist() == [0, 1, 1]


# top-k accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 2, 4, 5])
def test_top_k_accuracy_counts_labels_among_the_likeliest(top: int) -> None:
    outputs = some_outputs()
    assert outputs.labels is not None
    likeliest = outputs.log_probs.topk(top, dim=-1).indices
    hit = (likeliest == outputs.labels[:, None, None]).any(-1).double().numpy()
    assert outputs.accuracy(top) == pytest.approx(hit.mean(0))
    point = outputs.curve(top=top).at_budget(0.6)
    exits = outputs.exits_at(point)
    assert point.accuracy == pytest.approx(hit[np.arange(len(hit)), exits].mean())
    assert outputs.at(point, top=top) == point
    assert outputs.best_exit(top=top).accuracy == hit.mean(0).max()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(outputs=drawn_outputs())
def test_top_k_accuracy_grows_to_one_and_begins_as_accuracy_where_classes_tie(outputs: ExitOutputs) -> None:
    classes = outputs.log_probs.shape[2]
    among = [outputs.correct_among(top) for top in range(1, classes + 1)]
    assert torch.equal(among[0], outputs.correct)
    assert all(bool((few <= more).all()) for few, more in pairwise(among))
    assert bool(among[-1].all())


def test_a_table_of_top_k_accuracy_says_so() -> None:
    table = str(some_outputs().curve(top=2).budget_table())
    assert table.splitlines()[0].split()[:3] == ["budget", "top-2", "accuracy"]
    assert len({len(line) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("top", [0, 6, 1.5, True])
def test_top_above_the_classes_is_refused(top: Any) -> None:
    outputs = some_outputs()
    for ask in (outputs.accuracy, outputs.correct_among, lambda top: outputs.curve(top=top)):
        with pytest.raises(ExitkitError, match=rf"top={top} must be a whole number.*most 5; there are 5 classes"):
            ask(top)


# budget mode ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(outputs=drawn_outputs(), budget=st.floats(0.05, 2))
def test_the_best_exit_is_the_cheapest_of_the_most_accurate_within_the_budget(
    outputs: ExitOutputs, budget: float
) -> None:
    rated = [(-a, c, m) for m, (a, c) in enumerate(zip(outputs.accuracy(), outputs.costs, strict=True)) if c < budget]
    if rated:
        accuracy, cost, exit_ = min(rated)
        assert outputs.best_exit(budget) == (exit_, -accuracy, cost)
    else:
        with pytest.raises(ExitkitError, match=r"budget=.*exit 0 already costs"):
            outputs.best_exit(budget)


def test_the_best_exit_need_not_be_the_last() -> None:
    outputs = outputs_of([[0, 1, 0], [0, 1, 1]])
    assert outputs.best_exit() == (1, 1.0, 0.5)
    assert outputs.best_exit(0.26) == (0, 0.0, 0.25)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(outputs=drawn_outputs(), budget=st.sampled_from([0.25, 0.375, 0.5, 0.75, 1.0, 2.0]))
def test_a_budget_is_kept_or_refused_alike_by_a_threshold_and_by_one_exit(outputs: ExitOutputs, budget: float) -> None:
    """Both must stay under it: a cost equal to the budget is over it."""
    kept = Fraction(outputs.macs[0].item()) < Fraction(budget) * Fraction(outputs.backbone_macs)
    for ask in (outputs.best_exit, outputs.curve().at_budget):
        if kept:
            assert ask(budget).cost < budget  # type: ignore[attr-defined]
        else:
            with pytest.raises(ExitkitError, match=r"budget=.*cannot be kept"):
                ask(budget)


def test_what_costs_exactly_the_budget_is_refused_by_both() -> None:
    outputs = outputs_of([[0, 1, 0], [0, 1, 1]])
    for ask in (outputs.best_exit, outputs.curve().at_budget):
        with pytest.raises(ExitkitError, match=r"budget=0\.25 cannot be kept"):
            ask(0.25)


@pytest.mark.parametrize("budget", [0, -1.0, math.nan])
def test_a_budget_that_no_exit_keeps(budget: float) -> None:
    with pytest.raises(ExitkitError, match=rf"budget={budget!r} (cannot be kept|must be a number above 0)"):
        outputs_of([[0, 1, 0]]).best_exit(budget)


# criteria ------------------------------------------------------------------------------------------------------------

P = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])


def scored(criterion: str, log_probs: Tensor) -> list[float]:
    """Scores of answers (B, C) at a first exit."""
    return as_criterion(criterion).step(log_probs, ())[0].tolist()


def test_confidence_is_the_highest_probability() -> None:
    assert scored("confidence", P.log()) == pytest.approx([0.7, 1 / 3, 1])


def test_entropy_is_one_minus_normalised_entropy() -> None:
    nats = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert scored("entropy", P.log()) == pytest.approx([1 - nats / math.log(3), 0, 1], abs=1e-6)


def test_nats_are_minus_the_entropy() -> None:
    nats = [0.5 * math.log(0.5) + 0.5 * math.log(0.25), math.log(1 / 3), 0]
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    assert scored("nats", p.log()) == pytest.approx(nats, abs=1e-6)


@pytest.mark.parametrize("below", [0.05, 0.4, 1.2])
def test_leaving_below_an_entropy_is_one_threshold_in_either_unit(below: float) -> None:
    outputs = some_outputs()
    certainty = 1 - below / math.log(5)
    assert outputs.exits_at(-below, "nats").tolist() == outputs.exits_at(certainty, "entropy").tolist()
    probabilities = outputs.log_probs.exp()
    low = (-(probabilities * outputs.log_probs).sum(-1) < below)[:, :-1]
    expected = [next((m for m, leaves in enumerate(row) if leaves), 3) for row in low.tolist()]
    assert outputs.exits_at(-below, "nats").tolist() == expected


def test_margin_is_first_minus_second() -> None:
    assert scored("margin", P.log()) == pytest.approx([0.5, 0, 1])


def test_patience_counts_equal_answers_in_a_row() -> None:
    answers = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [2, 2, 0, 0]])
    log_probs = nn.functional.one_hot(answers, 3).float().log_softmax(-1)
    assert as_criterion("patience").score(log_probs).tolist() == [
        [1, 2, 3, 4],
        [1, 1, 2, 1],
        [1, 1, 1, 2],
        [1, 2, 1, 2],
    ]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_batch_is_scored_as_its_samples(criterion: str) -> None:
    log_probs = torch.randn(7, 4, 5).log_softmax(-1)
    alone = torch.cat([as_criterion(criterion).score(log_probs[i : i + 1]) for i in range(7)])
    assert torch.equal(as_criterion(criterion).score(log_probs), alone)


@pytest.mark.parametrize("criterion", CRITERIA[:3])
@pytest.mark.parametrize("classes", [2, 3, 7, 10, 100, 1000])
def test_scores_lie_between_zero_and_one(criterion: str, classes: int) -> None:
    """Uniform, certain and near-uniform answers: so that τ > 1 is the original model."""
    certain = torch.full((classes,), -torch.inf).index_fill(0, torch.tensor(0), 0.0)
    logits = torch.stack([torch.zeros(classes), certain, 1e-3 * torch.randn(classes)])
    values = as_criterion(criterion).score(logits.log_softmax(-1)[:, None])
    assert values.min() >= 0
    assert values.max() <= 1


# what is accepted, what is refused -----------------------------------------------------------------------------------


def test_logits_are_normalised() -> None:
    logits = torch.randn(6, 3, 4) * 5
    kept = ExitOutputs(logits, None, [1, 2, 3], 3.0).log_probs
    assert torch.allclose(kept, logits.log_softmax(-1), atol=1e-6)


def test_logits_and_log_probabilities_give_the_same_outputs() -> None:
    logits = torch.randn(6, 3, 4) * 5
    from_logits = ExitOutputs(logits, None, [1, 2, 3], 3.0).log_probs
    assert torch.allclose(from_logits, ExitOutputs(logits.log_softmax(-1), None, [1, 2, 3], 3.0).log_probs, atol=1e-6)


def test_numpy_arrays_are_accepted() -> None:
    outputs = ExitOutputs(np.zeros((2, 2, 3)), np.array([0, 2], np.uint8), np.array([1, 2]), 2.0)  # type: ignore[arg-type]
    assert (outputs.log_probs.dtype, outputs.labels.dtype, outputs.macs.dtype) == (
        torch.float32,
        torch.int64,
        torch.float64,
    )


def test_impossible_classes_are_accepted() -> None:
    """-inf is probability 0, and no reason for NaN anywhere."""
    outputs = ExitOutputs(torch.tensor([[[0.0, -torch.inf], [-torch.inf, 0.0]]]), torch.tensor([0]), [1, 2], 2.0)
    assert [outputs.scores(criterion).tolist() for criterion in CRITERIA[:3]] == [[[1, 1]]] * 3


LOGITS = torch.zeros(4, 3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": LOGITS.index_fill(1, torch.tensor(1), torch.nan)}, "NaN, infinite.*exit 1 on 4 of 4 samples"),
        ({"log_probs": LOGITS.index_fill(1, torch.tensor(2), torch.inf)}, r"infinite.*exit 2 on 4 of 4 samples"),
        ({"log_probs": LOGITS.index_fill(1, torch.tensor(0), -torch.inf)}, "log_probs"),
        ({"log_probs": torch.full((4, 3, 2), 1e300, dtype=torch.float64)}, "log_probs"),
        ({"log_probs": LOGITS[0]}, r"log_probs has .*shape \(3, 2\)"),
        ({"log_probs": LOGITS[:0]}, r"log_probs has .*shape \(0, 3, 2\)"),
        ({"log_probs": LOGITS[:, :, :1]}, "log_probs has .*classes"),
        ({"log_probs": LOGITS.long()}, "log_probs has dtype torch.int64"),
        ({"log_probs": LOGITS.softmax(-1)}, r"log_probs look like probabilities.*pass .*probs\.log\(\)"),
        ({"log_probs": torch.tensor([0.9, 0.1]).bfloat16().expand(4, 3, 2)}, "log_probs look like probabilities"),
        ({"log_probs": torch.eye(2)[:, None].expand(2, 3, 2)}, "log_probs look like probabilities"),
        ({"macs": None}, "macs=None must hold one positive cost per exit, 3 of them"),
        ({"macs": ["1", "2", "3"]}, r"macs=\['1', '2', '3'\] must hold one positive cost per exit, 3 of them"),
        ({"macs": [1, 2]}, r"macs=\[1\.0, 2\.0\] must hold one positive cost per exit, 3"),
        ({"macs": [1, 3, 2]}, r"macs=\[1\.0, 3\.0, 2\.0\].*none below"),
        ({"macs": [0, 1, 2]}, r"macs=\[0\.0, 1\.0, 2\.0\].*positive"),
        ({"macs": [1, math.nan, 2]}, "macs="),
        ({"macs": [1, 2, math.inf]}, "macs="),
        ({"backbone_macs": 0.0}, r"backbone_macs=0\.0 must be positive"),
        ({"backbone_macs": -1.0}, r"backbone_macs=-1\.0 must be positive"),
        ({"backbone_macs": math.nan}, "backbone_macs=nan"),
        ({"backbone_macs": math.inf}, "backbone_macs=inf"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "labels run from 0 to 2, but the model has 2 classes"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "labels run from -1 to 1"),
        ({"labels": torch.tensor([0, 1])}, r"labels have .*shape \(2,\); expected .*shape \(4,\)"),
        ({"labels": torch.zeros(4, 1).long()}, r"labels have .*shape \(4, 1\)"),
        ({"labels": torch.zeros(4)}, "labels have dtype torch.float32"),
    ],
)
def test_bad_outputs_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {"log_probs": LOGITS, "labels": torch.zeros(4).long(), "macs": [1, 2, 3], "backbone_macs": 3.0}
    with pytest.raises(ExitkitError, match=message):
        ExitOutputs(**(good | changes))


def test_logits_that_are_probabilities_in_part_are_logits() -> None:
    """As of a first exit that never learned."""
    logits = torch.full((2_000, 2, 2), 0.5)
    logits[-1] = torch.tensor([1.0, 3.0])
    assert torch.allclose(ExitOutputs(logits, None, [1, 2], 2.0).log_probs, logits.log_softmax(-1), atol=1e-6)


@pytest.mark.parametrize("ask", [ExitOutputs.accuracy, ExitOutputs.curve, ExitOutputs.hindsight_improvability])
def test_accuracy_needs_labels(ask: Callable[[ExitOutputs], object]) -> None:
    with pytest.raises(ExitkitError, match="labels=None: accuracy needs labels"):
        ask(some_outputs(labels=None))


def test_exits_without_labels() -> None:
    assert some_outputs(labels=None).exit_rates(0.5).sum() == pytest.approx(1)


def test_the_backbone_alone_has_no_curve() -> None:
    with pytest.raises(ExitkitError, match="exit"):
        outputs_of([[1], [0]], macs=[4.0]).curve()


# files ---------------------------------------------------------------------------------------------------------------


def fields(outputs: ExitOutputs) -> list[Any]:
    values = (getattr(outputs, field.name) for field in dataclasses.fields(outputs))
    return [value.tolist() if isinstance(value, Tensor) else value for value in values]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": None},
        {"criterion": "patience"},
        {"backbone_macs": 1e9 / 3},
        {"hashes": torch.arange(50), "dtype": "bfloat16"},
    ],
)
def test_saved_outputs_load_as_they_were(tmp_path: Path, options: dict[str, Any]) -> None:
    outputs = some_outputs(**options)
    outputs.save(tmp_path / "o.safetensors")
    loaded = ExitOutputs.load(tmp_path / "o.safetensors")
    assert torch.allclose(loaded.log_probs, outputs.log_probs, atol=1e-6)
    assert fields(loaded)[1:] == fields(outputs)[1:]


def test_loading_changes_no_bit(tmp_path: Path) -> None:
    """A threshold chosen before saving is one of the scores: it must still be one afterwards."""
    outputs = some_outputs()
    outputs.save(tmp_path / "o.safetensors")
    assert torch.equal(ExitOutputs.load(tmp_path / "o.safetensors").log_probs, outputs.log_probs)


def test_columns_of_larger_tensors_are_saved(tmp_path: Path) -> None:
    table = torch.zeros(50, 2, dtype=torch.long)
    some_outputs(labels=table[:, 0]).save(tmp_path / "o.safetensors")
    assert torch.equal(ExitOutputs.load(tmp_path / "o.safetensors").labels, table[:, 0])


def test_saving_replaces_the_old_file_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "o.safetensors"
    some_outputs(samples=3).save(path)
    some_outputs(samples=5).save(path)
    assert len(ExitOutputs.load(path).log_probs) == 5
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def half(tensors: object, filename: Path, metadata: object = None) -> None:
        filename.write_bytes(b"half")
        raise error

    path, old = tmp_path / "o.safetensors", some_outputs(samples=3)
    old.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("exitkit.evaluation.files.save_file", half)
    with pytest.raises(error):
        some_outputs(samples=5).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "o.safetensors"
    some_outputs().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ExitkitError, match=r"o\.safetensors' cannot be read as saved outputs"):
        ExitOutputs.load(path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"log_probs": torch.zeros(2, 2, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(ExitkitError, match=r"f\.safetensors' is not a file of saved outputs"):
        ExitOutputs.load(tmp_path / "f.safetensors")


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExitkitError, match="cannot be read as saved outputs"):
        ExitOutputs.load(tmp_path / name)


# plots ---------------------------------------------------------------------------------------------------------------


def test_a_curve_plots_itself(tmp_path: Path) -> None:
    some_outputs().curve().plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert len(list(tmp_path.iterdir())) == 1


def test_plot_curves(tmp_path: Path) -> None:
    curves = {"sdn": some_outputs().curve(), "pbee": some_outputs().curve("patience")}
    evaluation.plot_curves(curves, tmp_path / "figures" / "curves.png")
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(PNG)


def test_plot_hindsight(tmp_path: Path) -> None:
    evaluation.plot_hindsight({"sdn": some_outputs().hindsight_improvability()}, tmp_path / "hi.png")
    assert (tmp_path / "hi.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("name", "begins"), [("c.svg", b"<?xml"), ("c.pdf", b"%PDF")])
def test_the_suffix_chooses_the_format(tmp_path: Path, name: str, begins: bytes) -> None:
    some_outputs().curve().plot(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["curve.txt", "curve"])
def test_a_plot_of_no_known_format_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExitkitError, match="png"):
        some_outputs().curve().plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# collect -------------------------------------------------------------------------------------------------------------

Loaders = Callable[..., Any]


def test_collect_equals_a_direct_forward(tiny_ee: exitkit.MultiExitModel, loader: Loaders) -> None:
    outputs = exitkit.collect(tiny_ee, loader(20, batch=20))
    images, labels = next(iter(loader(20, batch=20)))
    with torch.no_grad():
        logits = torch.stack(tiny_ee.eval()(images).logits, 1)
    assert torch.allclose(outputs.log_probs, logits.log_softmax(-1), atol=1e-6)
    assert torch.equal(outputs.labels, labels)


def test_collect_records_costs_and_criterion(tiny_net: TinyNet, loader: Loaders) -> None:
    ee = exitkit.attach(tiny_net, torch.zeros(2, 1, 8, 8), every=2, method="pbee")
    outputs = exitkit.collect(ee, loader(4))
    assert outputs.macs.tolist() == [exit_.macs for exit_ in ee.exits]
    assert outputs.costs.tolist() == pytest.approx([exit_.macs_fraction for exit_ in ee.exits])
    assert outputs.criterion == "patience"


def test_batch_size_does_not_matter(tiny_ee: exitkit.MultiExitModel, loader: Loaders) -> None:
    whole, parts = (exitkit.collect(tiny_ee, loader(20, batch=batch)) for batch in (20, 3))
    assert torch.allclose(whole.log_probs, parts.log_probs, atol=1e-5)
    assert torch.equal(whole.labels, parts.labels)


@pytest.mark.parametrize("key", ["labels", "label"])
def test_collect_takes_dicts(tiny_ee: exitkit.MultiExitModel, loader: Loaders, key: str) -> None:
    batches = [{"x": images, key: labels} for images, labels in loader(20, batch=8)]
    assert fields(exitkit.collect(tiny_ee, batches)) == fields(exitkit.collect(tiny_ee, loader(20, batch=8)))


@pytest.mark.parametrize("shape", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: {"x": x}])
def test_collect_takes_inputs_alone(
    tiny_ee: exitkit.MultiExitModel, loader: Loaders, shape: Callable[[Tensor], Any]
) -> None:
    outputs = exitkit.collect(tiny_ee, [shape(images) for images, _ in loader(20, batch=8)])
    assert outputs.labels is None
    assert torch.equal(outputs.log_probs, exitkit.collect(tiny_ee, loader(20, batch=8)).log_probs)


def test_collect_refuses_an_empty_loader(tiny_ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match="loader is empty"):
        exitkit.collect(tiny_ee, [])


@pytest.mark.parametrize("label", [3, -1])
def test_collect_refuses_labels_out_of_range(tiny_ee: exitkit.MultiExitModel, label: int) -> None:
    with pytest.raises(ExitkitError, match=r"labels run from .*3 classes"):
        exitkit.collect(tiny_ee, [(torch.zeros(2, 1, 8, 8), torch.tensor([0, label]))])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_collect_refuses_labels_in_some_batches_only(
    tiny_ee: exitkit.MultiExitModel, loader: Loaders, order: tuple[int, int]
) -> None:
    images, labels = next(iter(loader(8, batch=8)))
    batches = [(images, labels), images]
    with pytest.raises(ExitkitError, match="labels"):
        exitkit.collect(tiny_ee, [batches[i] for i in order])


def test_collect_refuses_nan(tiny_ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match="NaN"):
        exitkit.collect(tiny_ee, [torch.full((2, 1, 8, 8), torch.nan)])


def test_collect_refuses_what_attach_did_not_return(tiny_net: TinyNet, loader: Loaders) -> None:
    with pytest.raises(ExitkitError, match="TinyNet"):
        exitkit.collect(tiny_net, loader(4))  # type: ignore[arg-type]


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    model.train()
    next(model.children()).eval()
    before = [part.training for part in model.modules()]
    yield
    assert [part.training for part in model.modules()] == before


def test_collect_restores_training_flags(tiny_ee: exitkit.MultiExitModel, loader: Loaders) -> None:
    with flags_kept(tiny_ee):
        exitkit.collect(tiny_ee, loader(8))


def test_collect_restores_training_flags_after_an_error(tiny_ee: exitkit.MultiExitModel) -> None:
    with flags_kept(tiny_ee), pytest.raises(ExitkitError):
        exitkit.collect(tiny_ee, [torch.zeros(2, 1, 8, 8), "text"])


def test_collect_leaves_batch_norm_alone(tiny_ee: exitkit.MultiExitModel, loader: Loaders) -> None:
    before = {name: value.clone() for name, value in tiny_ee.state_dict().items()}
    exitkit.collect(tiny_ee.train(), loader(8))
    assert all(torch.equal(value, before[name]) for name, value in tiny_ee.state_dict().items())
