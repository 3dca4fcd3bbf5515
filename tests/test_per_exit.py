"""Thresholds per exit against brute force, budgets in milliseconds, temperatures, and exits that do not pay."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exitkit
from exitkit import ExitkitError, ExitOutputs, choose_threshold
from exitkit.evaluation import (
    ExitTimes,
    exits_that_do_not_pay,
    fit_temperatures,
    head_macs,
    per_exit_thresholds,
    threshold_path,
)
from exitkit.methods.criteria import Criterion

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def some_outputs(samples: int = 600, seed: int = 0, skill: float = 1.0) -> ExitOutputs:
    """Three exits of rising skill, and a backbone; the second is overconfident."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (samples,), generator=generator)
    logits = torch.randn(samples, 4, 5, generator=generator)
    logits += skill * torch.tensor([1.0, 1.2, 2.5, 4.0])[:, None] * torch.eye(5)[labels][:, None]
    logits[:, 1] *= 3
    return ExitOutputs(logits, labels, [1, 2, 3, 4], 4.0)


@st.composite
def small_outputs(draw: st.DrawFn) -> ExitOutputs:
    samples, exits = draw(st.integers(2, 8)), draw(st.integers(1, 3))
    logits = draw(
        st.lists(st.integers(-7, -1), min_size=2 * samples * (exits + 1), max_size=2 * samples * (exits + 1))
    )
    labels = draw(st.lists(st.integers(0, 1), min_size=samples, max_size=samples))
    macs = np.cumsum(draw(st.lists(st.integers(1, 5), min_size=exits + 1, max_size=exits + 1)))
    return ExitOutputs(
        torch.tensor(logits).view(samples, exits + 1, 2) / 2, torch.tensor(labels), macs, float(macs[-1])
    )


def brute_force(outputs: ExitOutputs, budget: float) -> float:
    """The best accuracy under the budget over all thresholds at which anything changes."""
    columns = outputs.scores()[:, :-1].double().numpy().T
    candidates = [np.append(np.unique(column), 0.0) for column in columns]
    best = -1.0
    for taus in itertools.product(*candidates):
        exits = outputs.exits_at(taus)
        if outputs.costs[exits].mean() < budget:
            best = max(best, float(outputs.correct.numpy()[np.arange(len(exits)), exits].mean()))
    return best


def measured(outputs: ExitOutputs, taus: Any) -> tuple[float, float]:
    exits = outputs.exits_at(taus)
    return float(outputs.correct.numpy()[np.arange(len(exits)), exits].mean()), float(outputs.costs[exits].mean())


# per exit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.5, 0.75, 1.0])
@property_test
@given(outputs=small_outputs())
def test_no_thresholds_are_better_under_the_budget(budget: float, outputs: ExitOutputs) -> None:
    if outputs.costs[0] >= budget:
        return
    found = per_exit_thresholds(outputs, budget)
    assert (found.accuracy, found.cost) == pytest.approx(measured(outputs, found.thresholds))
    assert found.cost < budget
    assert found.accuracy == found.bound == pytest.approx(brute_force(outputs, budget))


@pytest.mark.parametrize("budget", [0.3, 0.4, 0.5, 0.6, 0.8])
def test_never_worse_than_one_threshold_on_its_own_samples(budget: float) -> None:
    outputs = some_outputs()
    found, one = per_exit_thresholds(outputs, budget), outputs.curve().at_budget(budget)
    assert one.accuracy <= found.accuracy <= found.bound
    assert found.cost < budget


def test_better_than_one_threshold_where_an_exit_is_overconfident_and_on_new_samples() -> None:
    """The second exit's confidence is worth less than the others'; a threshold of its own makes up for it."""
    tune, fresh = some_outputs(2_000), some_outputs(4_000, seed=1)
    found = per_exit_thresholds(tune, 0.6)
    one = tune.curve().at_budget(0.6)
    assert found.thresholds[1] > one.threshold
    accuracy, cost = measured(fresh, found.thresholds)
    assert accuracy > fresh.curve().at_threshold(one.threshold).accuracy + 0.01
    assert cost == pytest.approx(0.6, abs=0.02)


def test_a_search_that_is_cut_short_gives_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = some_outputs()
    exact = per_exit_thresholds(outputs, 0.5)
    monkeypatch.setattr("exitkit.calibration.per_exit._BOXES", 10)
    short = per_exit_thresholds(outputs, 0.5)
    assert exact.accuracy == exact.bound
    assert short.accuracy <= exact.accuracy <= short.bound < 1


def test_a_budget_in_milliseconds() -> None:
    outputs, table = some_outputs(), [1.0, 1.5, 4.0, 5.0]
    found = per_exit_thresholds(outputs, 2.5, milliseconds=table)
    times = np.array(table)[outputs.exits_at(found.thresholds)]
    assert found.cost == pytest.approx(times.mean())
    assert found.cost < 2.5
    same = per_exit_thresholds(outputs, 0.5, milliseconds=None)
    assert per_exit_thresholds(outputs, 2.0, milliseconds=[1.0, 2.0, 3.0, 4.0]).accuracy == same.accuracy


def test_without_labels_agreement_counts() -> None:
    outputs = some_outputs()
    found = per_exit_thresholds(replace(outputs, labels=None), 0.5)
    assert found == per_exit_thresholds(outputs.against_backbone(), 0.5)


class ThreeQuarters(Criterion):
    """Scores of at most 0.75, above which τ is written as 1."""

    kind = "three-quarters"

    def step(self, answer: torch.Tensor, memory: Any) -> tuple[torch.Tensor, Any]:
        return 0.75 * answer.double().softmax(-1).amax(-1), ()

    def highest(self, exits: int) -> float:
        return 0.75


def test_where_leaving_never_pays_nobody_leaves_by_a_criterion_of_ones_own() -> None:
    outputs = some_outputs(200)
    assert outputs.labels is not None
    right = 10 * torch.eye(5)[outputs.labels][:, None]
    wrong = torch.cat([outputs.log_probs[:, :3] - right, right], 1)
    found = per_exit_thresholds(ExitOutputs(wrong, outputs.labels, [1, 2, 3, 4], 4.0, "three-quarters"), 1.5)
    assert (found.accuracy, found.cost) == (1, 1)
    assert found.thresholds == (0.75, 0.75, 0.75)


def test_patience_per_exit() -> None:
    outputs = replace(some_outputs(), criterion="patience")
    assert outputs.curve().at_budget(0.8).accuracy <= per_exit_thresholds(outputs, 0.8).accuracy


def test_a_path_goes_from_careful_to_bold_and_can_be_tested() -> None:
    path = threshold_path(some_outputs(2_000, skill=2))
    fresh = some_outputs(2_000, seed=1, skill=2)
    costs = [measured(fresh, row)[1] for row in path.thresholds.tolist()]
    assert costs[0] == 1.0
    assert costs[-1] < 0.4
    assert np.mean(np.diff(costs) <= 0) > 0.9
    chosen = choose_threshold(fresh, 0.03, path=path)
    accuracy, cost = measured(fresh, chosen.threshold)
    assert chosen.found
    assert cost == pytest.approx(chosen.cost)
    assert cost < 1
    assert fresh.accuracy()[-1] - accuracy <= chosen.guarantee.measured <= 0.03


@pytest.mark.parametrize("budget", [0.25, 0.0, -1.0, float("nan")])
def test_budgets_that_cannot_be_kept_are_refused(budget: float) -> None:
    with pytest.raises(ExitkitError, match=r"budget=.* (cannot be kept|must be a number above 0)"):
        per_exit_thresholds(some_outputs(), budget)


# milliseconds --------------------------------------------------------------------------------------------------------


def test_a_curve_of_milliseconds() -> None:
    outputs, table = some_outputs(), [1.0, 2.0, 2.5, 4.0]
    point = outputs.curve(milliseconds=table).at_budget(ms=2.0)
    times = np.array(table)[outputs.exits_at(point.threshold)]
    assert point.cost == pytest.approx(times.mean() / 4.0)
    assert times.mean() < 2.0
    assert outputs.curve(milliseconds=table).at_budget(0.5) == point


@pytest.mark.parametrize("table", [[1, 2, 3], [1, 2, 3, 2], [0, 1, 2, 3], [1, 2, 3, float("nan")]])
def test_tables_that_do_not_fit_are_refused(table: list[float]) -> None:
    with pytest.raises(ExitkitError, match=r"milliseconds=\[.*must hold 4 positive times"):
        some_outputs().curve(milliseconds=table)


@pytest.mark.parametrize("options", [{"ms": 3.0}, {}, {"budget": 0.5, "ms": 3.0}])
def test_milliseconds_need_a_curve_of_times(options: dict[str, float]) -> None:
    with pytest.raises(ExitkitError, match=r"give one of them|was not measured; measured: nothing"):
        some_outputs().curve().at_budget(**options)


# temperatures --------------------------------------------------------------------------------------------------------


def test_temperatures_undo_the_overconfidence() -> None:
    """Logits of the second exit were multiplied by 3; those of the others are, by construction, calibrated."""
    sharp, plain = some_outputs(20_000), some_outputs(20_000)
    logits = plain.log_probs.clone()
    logits[:, 1] /= 3
    expected = np.array(fit_temperatures(replace(plain, log_probs=logits)))
    assert np.array(fit_temperatures(sharp)) == pytest.approx(expected * [1, 3, 1, 1], rel=1e-3)


def test_temperatures_are_those_of_the_best_likelihood() -> None:
    outputs = some_outputs(2_000)
    best = fit_temperatures(outputs)

    def loss(temperatures: list[float]) -> np.ndarray[Any, Any]:
        log_probs = outputs.calibrated(temperatures).log_probs
        return -log_probs[torch.arange(2_000), :, outputs.labels].double().mean(0).numpy()

    for factor in (0.95, 1.05):
        assert (loss([t * factor for t in best]) > loss(list(best))).all()


def test_calibration_changes_no_answer() -> None:
    outputs = some_outputs()
    calibrated = outputs.calibrated([2.0, 0.5, 1.0, 3.0])
    assert torch.equal(calibrated.correct, outputs.correct)
    assert torch.allclose(calibrated.log_probs[:, 2], outputs.log_probs[:, 2], atol=1e-6)
    assert torch.allclose(calibrated.log_probs[:, 0], (outputs.log_probs[:, 0] / 2).log_softmax(-1), atol=1e-6)


@pytest.mark.parametrize("temperatures", [[1, 1, 1], [1, 1, 1, 0], [1, 1, -1, 1], [1, 1, 1, float("nan")]])
def test_bad_temperatures_are_refused(temperatures: list[float]) -> None:
    with pytest.raises(ExitkitError, match=r"temperatures=.*must be 4 positive numbers"):
        some_outputs().calibrated(temperatures)


def test_temperatures_need_labels() -> None:
    with pytest.raises(ExitkitError, match="temperatures are fitted to labels"):
        fit_temperatures(replace(some_outputs(), labels=None))


# exits that do not pay -----------------------------------------------------------------------------------------------


def test_an_exit_that_knows_nothing_does_not_pay() -> None:
    """Exit 1 guesses, and is sure of it; its head costs half a MAC."""
    outputs = some_outputs(2_000)
    log_probs = outputs.log_probs.clone()
    log_probs[:, 1] = 5 * torch.randn(2_000, 5, generator=torch.Generator().manual_seed(5))
    assert exits_that_do_not_pay(replace(outputs, log_probs=log_probs), [0.1, 0.5, 0.1], (0.5, 0.75)) == (1,)


def test_temperatures_and_times_do_not_change_what_pays() -> None:
    """One temperature for all exits, at which the same threshold per exit decides otherwise, and times that are not asked."""
    outputs = some_outputs(2_000)
    log_probs = outputs.log_probs.clone()
    log_probs[:, 1] = 5 * torch.randn(2_000, 5, generator=torch.Generator().manual_seed(5))
    temperatures = (1.0, 2.0, 1.0, 1.0)
    divided = log_probs / torch.tensor(temperatures)[:, None]
    plain, scaled = replace(outputs, log_probs=divided), replace(outputs, log_probs=log_probs).calibrated(temperatures)
    times = ExitTimes("cpu", "a CPU", 1, (1.0, 2.0, 3.0, 4.0))
    heads, budgets = [0.1, 0.5, 0.1], (0.5, 0.75)
    assert exits_that_do_not_pay(plain, heads, budgets) == (1,)
    assert exits_that_do_not_pay(scaled.timed([times]), heads, budgets) == (1,)


def test_good_exits_pay() -> None:
    assert exits_that_do_not_pay(some_outputs(2_000, skill=2), [0.01] * 3, (0.3, 0.55, 0.7)) == ()


def test_an_exit_that_a_budget_needs_pays() -> None:
    outputs = some_outputs(2_000)
    assert 0 not in exits_that_do_not_pay(outputs, [0.5, 0.1, 0.1], (0.3, 0.9))


def test_what_heads_cost(tiny_ee: exitkit.MultiExitModel) -> None:
    heads = head_macs(tiny_ee)
    assert len(heads) == 3
    last = tiny_ee.exits[2].macs - tiny_ee.boundaries[2].macs
    assert sum(heads) == last
    assert min(heads) > 0


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(ExitkitError, match=r"heads=\[1\] must hold 3 costs"):
        exits_that_do_not_pay(some_outputs(), [1])
