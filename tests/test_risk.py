"""Thresholds with a guarantee: the promise over many draws, the tests against closed forms and MAPIE, and refusals."""

from __future__ import annotations

import json
import math
from collections import UserDict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

import exitkit
from exitkit import ExitkitError, ExitOutputs, choose_threshold
from exitkit.calibration.p_values import betting_p_value, binomial_p_value, hoeffding_bentkus_p_value
from exitkit.calibration.risks import as_risk
from exitkit.evaluation import ChosenThreshold, ThresholdPath, content_hashes

WRONG = (0.8, 0.4)
"""At score s, exit m errs with probability WRONG[m] · (1 − s); scores are uniform and independent."""

LINE = np.repeat(np.linspace(1, 0, 101)[:, None], 2, axis=1)
BENT = np.stack([np.linspace(1, 0.2, 101), np.linspace(0.9, 0, 101)], axis=1)
DRAWS, SAMPLES, BOUND, DELTA = 500, 1000, 0.05, 0.1
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@cache
def world(samples: int, seed: int, backbone: float = 1.0) -> ExitOutputs:
    """Two classes, label 0, two exits; scores are margins. The backbone is right with probability ``backbone``."""
    generator = np.random.default_rng(seed)
    scores = generator.random((samples, 2))
    wrong = generator.random((samples, 2)) < np.array(WRONG) * (1 - scores)
    p = np.where(wrong, 1 - scores, 1 + scores) / 2
    final = np.where(generator.random((samples, 1)) < backbone, 0.9, 0.1)
    p = np.hstack([p, final])
    log_probs = torch.from_numpy(np.stack([p, 1 - p], -1)).log()
    return ExitOutputs(log_probs, torch.zeros(samples).long(), [1, 2, 4], 4.0, "margin")


def true_risk(taus: NDArray[np.float64], backbone: float = 1.0, net: bool = False) -> NDArray[np.float64]:
    """(T,) the exact risk of thresholds (T, 2) in ``world``."""
    first, second = taus[..., 0], taus[..., 1]
    credit = (1 - backbone) if net else 0.0
    share = 1.0 if net else backbone

    def lost(tau: NDArray[np.float64], wrong: float) -> NDArray[np.float64]:
        return share * wrong * (1 - tau) ** 2 / 2 - credit * (1 - tau)

    return lost(first, WRONG[0]) + first * lost(second, WRONG[1])


def unsure(outputs: ExitOutputs) -> Tensor:
    """A loss that is not 0 or 1, with mean (1 − τ²)(1 − τ) / 2 on the line in ``world``."""
    loss = 1 - outputs.scores()
    loss[:, -1] = 0
    return loss


def chosen_risks(path: NDArray[np.float64], risks: NDArray[np.float64], **options: Any) -> NDArray[np.float64]:
    """(DRAWS,) the true risk of the threshold chosen on each of many calibration splits."""
    backbone = options.pop("backbone", 1.0)
    steps = ThresholdPath(path, "margin")
    found = []
    for seed in range(DRAWS):
        chosen = choose_threshold(world(SAMPLES, seed, backbone), BOUND, 1 - DELTA, path=steps, **options)
        row = np.abs(path - np.array(chosen.threshold)).sum(1).argmin()
        found.append(risks[row] if chosen.found else 0.0)
    return np.array(found)


# the promise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "risks", "options"),
    [
        (LINE, true_risk(LINE), {}),
        (BENT, true_risk(BENT), {}),
        (LINE, true_risk(LINE), {"method": "ucb", "risk": "disagreement"}),
        (LINE, true_risk(LINE, 0.9, net=True), {"method": "ucb", "risk": "net_accuracy_drop", "backbone": 0.9}),
        (LINE, (1 - LINE[:, 0]) ** 2 * (1 + LINE[:, 0]) / 2, {"risk": unsure}),
    ],
    ids=["ltt", "ltt per exit", "ucb", "ucb net", "ltt real-valued"],
)
def test_the_promise_is_broken_as_rarely_as_promised(
    path: NDArray[np.float64], risks: NDArray[np.float64], options: dict[str, Any]
) -> None:
    """In at most δ of 500 splits (and three standard errors), but not in none where tests are exact; with power."""
    found = chosen_risks(path, risks, **options)
    broken = (found > BOUND).mean()
    assert broken <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
    if not options:
        assert broken > DELTA / 10
    assert found.mean() > 0.5 * BOUND


def test_conformal_risk_control_keeps_the_mean() -> None:
    found = chosen_risks(LINE, true_risk(LINE), method="crc")
    assert BOUND * 0.85 < found.mean() <= BOUND + 3 * found.std() / math.sqrt(DRAWS)
    assert (found > BOUND).mean() > DELTA  # and no more than the mean


def test_the_finer_grid_of_one_threshold_keeps_the_promise_too() -> None:
    taus = np.array([choose_threshold(world(SAMPLES, seed), BOUND, 1 - DELTA).threshold for seed in range(100)])
    risks = true_risk(np.stack([taus, taus], -1))
    assert 0 < (risks > BOUND).mean() <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 100)


def test_more_samples_come_nearer_to_the_bound() -> None:
    risks = [
        true_risk(np.full((1, 2), choose_threshold(world(samples, 1), BOUND).threshold))[0]
        for samples in (200, 2_000, 50_000)
    ]
    assert risks[0] < risks[1] < risks[2] < BOUND
    assert risks[2] > 0.9 * BOUND


# the tests beneath ---------------------------------------------------------------------------------------------------


@property_test
@given(zeros=st.integers(0, 60), ones=st.integers(0, 20), limit=st.floats(0.001, 0.9))
def test_binomial_p_value_is_the_binomials_tail(zeros: int, ones: int, limit: float) -> None:
    losses = np.repeat([0.0, 1.0, 0.0], [zeros, ones, 1])
    assert binomial_p_value(losses, limit) == pytest.approx(binom.cdf(ones, len(losses), limit))


@pytest.mark.parametrize("binary", [True, False])
def test_p_values_are_those_of_mapie(binary: bool) -> None:
    methods = pytest.importorskip("mapie.risk_control.methods")
    generator = np.random.default_rng(0)
    for mean in (0.0, 0.01, 0.04, 0.06, 0.3):
        losses = (generator.random(400) < mean).astype(float) if binary else generator.random(400) * 2 * mean
        ours = (binomial_p_value if binary else hoeffding_bentkus_p_value)(losses, 0.05)
        theirs = methods.compute_hoeffding_bentkus_p_value(np.array([losses.mean()]), 400, 0.05, binary=binary)
        assert ours == pytest.approx(theirs.item(), abs=1e-12)


def test_thresholds_are_those_of_mapies_fixed_sequence() -> None:
    control = pytest.importorskip("mapie.risk_control.fwer_control")
    for seed in range(10):
        outputs = world(600, seed)
        losses = as_risk("accuracy_drop").losses(outputs)[0]
        left = [outputs.exits_at(row) for row in LINE.tolist()]
        p_values = [binom.cdf(losses[np.arange(600), exits].sum(), 600, BOUND) for exits in left]
        passed = control.control_fwer(np.array(p_values), 0.05, "fixed_sequence")
        chosen = choose_threshold(outputs, BOUND, path=ThresholdPath(LINE, "margin"))
        assert chosen.thresholds == tuple(LINE[passed.max()])


def test_the_last_threshold_that_passes_is_taken_not_the_first_that_fails() -> None:
    outputs = world(800, 3)
    chosen = choose_threshold(outputs, BOUND, path=ThresholdPath(LINE, "margin"))
    row = int(np.flatnonzero((chosen.threshold == LINE).all(1))[0])
    losses = as_risk("accuracy_drop").losses(outputs)[0]

    def p_value(number: int) -> float:
        lost = losses[np.arange(800), outputs.exits_at(LINE[number].tolist())].sum()
        return float(binom.cdf(lost, 800, BOUND))

    assert max(p_value(number) for number in range(row + 1)) <= 0.05 < p_value(row + 1)


def test_betting_on_losses_of_zero_wins_as_by_hand() -> None:
    """With all bets at their limit of 1, wealth is (1 + limit)ⁿ; early bets are smaller, as the variance is unknown."""
    p_value = betting_p_value(np.zeros(400), 0.01, 0.05)
    assert 1.01**-400 <= p_value < 1.01**-350


def test_betting_follows_the_published_recursion() -> None:
    """Bates et al. 2021, proposition 5, sample by sample."""
    losses, limit, level = np.random.default_rng(1).random(50) * 0.3, 0.25, 0.1
    wealth, best, seen, variance = 1.0, 1.0, [], 0.25
    for number, loss in enumerate(losses, start=1):
        wealth *= 1 - min(1, math.sqrt(2 * math.log(1 / level) / (len(losses) * variance))) * (loss - limit)
        best = max(best, wealth)
        mean = (0.5 + losses[:number].sum()) / (1 + number)
        seen.append((loss - mean) ** 2)
        variance = (0.25 + sum(seen)) / (1 + number)
    assert betting_p_value(losses, limit, level) == pytest.approx(1 / best)


def test_bets_do_not_depend_on_how_a_data_set_is_sorted() -> None:
    """Half of the samples lose nothing; betting on them first would promise half of what the others lose."""
    steps = ThresholdPath(np.zeros((1, 1)), "confidence")
    found = []
    for seed in range(100):
        generator = np.random.default_rng(seed)
        labels = torch.from_numpy(np.sort(generator.integers(0, 2, 1_000)))
        wrong = (labels == 1) & torch.from_numpy(generator.random(1_000) < 0.12)  # 6% lost of all
        answers = torch.stack([labels ^ wrong.long(), labels], 1)
        outputs = ExitOutputs(3.0 * torch.nn.functional.one_hot(answers), labels, [1, 4], 4.0)
        found.append(choose_threshold(outputs, BOUND, 1 - DELTA, method="ucb", path=steps).found)
    assert np.mean(found) <= DELTA


@pytest.mark.parametrize(
    "test", [hoeffding_bentkus_p_value, lambda losses, limit: betting_p_value(losses, limit, 0.1)]
)
def test_p_values_of_a_true_hypothesis_are_small_as_rarely_as_they_say(
    test: Callable[[NDArray[np.float64], float], float],
) -> None:
    draws = np.random.default_rng(0).beta(0.2, 1.8, (500, 300))  # mean 0.1
    p_values = np.array([test(losses, 0.1) for losses in draws])
    assert (p_values <= 0.1).mean() <= 0.1 + 3 * math.sqrt(0.09 / 500)


# what is returned ----------------------------------------------------------------------------------------------------


def test_accuracy_really_falls_by_no_more_than_was_measured() -> None:
    """Exactly as much here, where the backbone is always right and exits have nothing to put right."""
    outputs = world(2_000, 0)
    chosen = choose_threshold(outputs, BOUND)
    point = outputs.curve().at_threshold(float(chosen.threshold))  # type: ignore[arg-type]
    assert outputs.accuracy()[-1] - point.accuracy == pytest.approx(chosen.guarantee.measured)
    assert 0 < chosen.guarantee.measured < BOUND
    assert chosen.cost == pytest.approx(point.cost)
    low, high = chosen.guarantee.cost_interval
    assert low < chosen.guarantee.cost < high


def test_the_cost_interval_holds_for_new_samples_as_often_as_it_says() -> None:
    fresh, held = world(50_000, 10_000), 0
    for seed in range(50):
        chosen = choose_threshold(world(500, seed), BOUND)
        low, high = chosen.guarantee.cost_interval
        held += low <= fresh.costs[fresh.exits_at(chosen.threshold)].mean() <= high
    assert held >= 43  # 47.5 expected, standard deviation 1.5


def test_a_path_gives_one_threshold_per_exit_that_the_outputs_take() -> None:
    outputs = world(2_000, 0)
    chosen = choose_threshold(outputs, BOUND, path=ThresholdPath(BENT, "margin"))
    assert chosen.threshold in [tuple(row) for row in BENT.tolist()]
    assert outputs.costs[outputs.exits_at(chosen.threshold)].mean() == pytest.approx(chosen.cost)


def test_net_drop_credits_what_exits_put_right() -> None:
    """An exit that is as often right as the backbone, about other samples."""
    right = torch.rand(3_000, 2, generator=torch.Generator().manual_seed(0)) < 0.9
    p = torch.where(right, 0.9, 0.1).double()
    outputs = ExitOutputs(torch.stack([p, 1 - p], -1).log(), torch.zeros(3_000).long(), [1, 2], 2.0)
    assert choose_threshold(outputs, 0.05).cost == 1.0
    assert choose_threshold(outputs, 0.05, risk="net_accuracy_drop", method="ucb").cost == 0.5


def test_nothing_passes_where_the_exit_is_sure_and_wrong() -> None:
    p = torch.tensor([[1e-300, 0.9]], dtype=torch.float64).expand(1_000, 2)
    outputs = ExitOutputs(torch.stack([p, 1 - p], -1).log(), torch.zeros(1_000).long(), [1, 2], 2.0)
    chosen = choose_threshold(outputs)
    assert not chosen.found
    assert str(chosen.guarantee).startswith("No threshold passed the test. No sample leaves")
    assert (chosen.cost, chosen.guarantee.measured) == (1.0, 0.0)
    assert outputs.exit_rates(chosen.threshold).tolist() == [0, 1]


def test_not_even_the_full_model_passes_a_risk_that_it_breaks() -> None:
    def always(outputs: ExitOutputs) -> Tensor:
        return torch.ones(len(outputs), 3)

    chosen = choose_threshold(world(500, 0), risk=always)
    assert not chosen.found
    assert str(chosen.guarantee).startswith("None: not even the full model")
    assert chosen.cost == 1.0


def test_patience_is_chosen_among_counts() -> None:
    outputs = replace(world(2_000, 0), criterion="patience")
    chosen = choose_threshold(outputs, 0.3)
    assert chosen.threshold in (0.0, 1.0, 2.0)


def test_disagreement_needs_no_labels() -> None:
    outputs = world(1_000, 0)
    without = choose_threshold(replace(outputs, labels=None), BOUND, risk="disagreement")
    assert without.threshold == choose_threshold(outputs, BOUND, risk="disagreement").threshold


def test_a_function_is_a_risk() -> None:
    outputs = world(1_000, 0)

    def lost(outputs: ExitOutputs) -> Tensor:
        return outputs.correct[:, -1:] & ~outputs.correct

    chosen = choose_threshold(outputs, BOUND, risk=lost)
    assert chosen.guarantee.risk == "lost"
    assert chosen.threshold == choose_threshold(outputs, BOUND).threshold


def test_only_a_risk_that_says_so_is_taken_to_be_zero_or_one() -> None:
    """Values that happen to be 0 and 1 get the p-value of values in between, which is larger."""
    outputs = world(1_000, 0)
    real = choose_threshold(outputs, BOUND, risk=lambda o: (o.correct[:, -1:] & ~o.correct).double())
    assert real.threshold > choose_threshold(outputs, BOUND).threshold  # type: ignore[operator]


def test_brier_excess_by_hand() -> None:
    p = torch.tensor([[0.6, 0.9], [0.2, 0.9], [0.95, 0.9]], dtype=torch.float64)
    outputs = ExitOutputs(torch.stack([p, 1 - p], -1).log(), torch.zeros(3).long(), [1, 2], 2.0)
    assert as_risk("brier").losses(outputs)[0][:, 0] == pytest.approx([0.4**2 - 0.1**2, 0.8**2 - 0.1**2, 0], abs=1e-6)


def test_a_chosen_threshold_goes_through_json() -> None:
    for path in (None, ThresholdPath(BENT, "margin")):
        chosen = choose_threshold(world(1_000, 0), BOUND, path=path)
        assert ChosenThreshold.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


def test_the_guarantee_is_in_words() -> None:
    chosen = choose_threshold(world(1_000, 0), BOUND)
    assert "With probability 0.95" in str(chosen.guarantee)
    assert "1000 calibration samples" in str(chosen.guarantee)
    assert "at most 0.05" in str(chosen.guarantee)
    assert "On average" in str(choose_threshold(world(1_000, 0), BOUND, method="crc").guarantee)


def test_an_engine_takes_the_chosen_threshold(tiny_ee: exitkit.MultiExitModel, loader: Callable[..., Any]) -> None:
    outputs = exitkit.collect(tiny_ee, loader(96))
    chosen = choose_threshold(outputs, 0.5)
    assert (outputs.dtype, chosen.dtype) == ("float32", "float32")
    images = torch.cat([images for images, _ in loader(96)])
    assert exitkit.compile(tiny_ee, chosen.threshold)(images).exit.tolist() == list(outputs.exits_at(chosen.threshold))


# refusals ------------------------------------------------------------------------------------------------------------


def nan_risk(outputs: ExitOutputs) -> Tensor:
    return torch.full((len(outputs), 3), torch.nan)


def too_much(outputs: ExitOutputs) -> Tensor:
    return torch.full((len(outputs), 3), 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0}, r"max_drop=0 must lie between 0 and 1.*use the full model"),
        ({"max_drop": 1}, r"max_drop=1 must lie between 0 and 1"),
        ({"max_drop": math.nan}, r"max_drop=nan must lie between 0 and 1"),
        ({"max_drop": "1%"}, r"max_drop='1%' must be a number"),
        ({"confidence": None}, r"confidence=None must be a number"),
        ({"risk": ["accuracy_drop"]}, r"risk=\['accuracy_drop'\] is unknown"),
        ({"risk": lambda outputs: 0.5}, r"risk='<lambda>' gave float; expected a tensor"),
        ({"path": LINE}, r"path is ndarray; give ThresholdPath"),
        ({"exclude": [1, 2]}, r"exclude is list; give ExitOutputs or Tensor"),
        ({"confidence": 1.0}, r"confidence=1.0 must lie between"),
        ({"confidence": 0}, r"confidence=0 must lie between"),
        ({"risk": "accuracy"}, r"risk='accuracy' is unknown. Did you mean 'accuracy_drop'"),
        ({"method": "ltd"}, r"method='ltd' is unknown. Did you mean 'ltt'"),
        ({"criterion": "confidance"}, r"criterion='confidance' is unknown"),
        ({"risk": nan_risk}, r"risk='nan_risk' gave losses of shape \(500, 3\) from nan to nan; .*without NaN"),
        ({"risk": too_much}, r"risk='too_much' gave losses .*from 2 to 2; .*from 0 to 1"),
        ({"path": ThresholdPath(LINE[:, :1], "margin")}, r"path holds thresholds of shape \(101, 1\).*2 exits"),
        ({"path": ThresholdPath(LINE, "confidence")}, r"path .*'confidence', but .*'margin'"),
        ({"exclude": torch.arange(3)}, r"exclude cannot be checked: outputs without content hashes"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        choose_threshold(world(500, 0), **options)


@pytest.mark.parametrize("method", ["ltt", "ucb", "crc"])
def test_too_few_samples_say_how_many_would_do(method: Any) -> None:
    needed = {"ltt": 299, "ucb": 308, "crc": 99}[method]
    with pytest.raises(ExitkitError, match=f"{needed - 1} samples are too few.*at least {needed} samples"):
        choose_threshold(world(needed - 1, 0), method=method)
    assert choose_threshold(world(needed, 0), method=method).guarantee.samples == needed


def test_ltt_needs_as_many_samples_as_by_hand() -> None:
    assert math.ceil(math.log(0.05) / math.log(0.99)) == 299


def test_more_samples_than_anybody_has() -> None:
    with pytest.raises(ExitkitError, match="more than 1,000,000 samples"):
        choose_threshold(world(50, 0), 1e-7)


@pytest.mark.parametrize("risk", ["accuracy_drop", "net_accuracy_drop", "brier"])
def test_labels_are_needed(risk: Any) -> None:
    with pytest.raises(ExitkitError, match=r"labels=None: .* needs labels"):
        choose_threshold(replace(world(500, 0), labels=None), risk=risk)


def test_only_outputs_are_accepted() -> None:
    with pytest.raises(ExitkitError, match=r"outputs is Tensor; give what exitkit\.collect"):
        choose_threshold(torch.zeros(3, 2, 2))  # type: ignore[arg-type]


def test_the_backbone_alone_has_no_threshold() -> None:
    with pytest.raises(ExitkitError, match="no exit"):
        choose_threshold(ExitOutputs(torch.zeros(500, 1, 2), None, [1.0], 1.0))


# hashes and splits ---------------------------------------------------------------------------------------------------


def test_calibration_on_training_samples_is_refused(
    tiny_ee: exitkit.MultiExitModel, loader: Callable[..., Any]
) -> None:
    train, held_out = loader(96), loader(400, seed=1)
    hashes = content_hashes(train)
    outputs = exitkit.collect(tiny_ee, held_out)
    assert choose_threshold(outputs, 0.5, exclude=hashes).guarantee.samples == 400
    mixed = replace(outputs, hashes=torch.cat([hashes[:7], outputs.hashes[7:]]))  # type: ignore[index]
    with pytest.raises(ExitkitError, match=r"share 7 of their 400 samples with exclude.*Leave them out"):
        choose_threshold(mixed, 0.5, exclude=hashes)
    with pytest.raises(ExitkitError, match="share 400 of their 400"):
        choose_threshold(outputs, 0.5, exclude=outputs)


def test_calibration_on_the_paths_samples_is_refused() -> None:
    outputs = replace(world(500, 0), hashes=torch.arange(500))
    path = ThresholdPath(LINE, "margin", torch.arange(400, 900))
    with pytest.raises(ExitkitError, match="share 100 of their 500 samples with path"):
        choose_threshold(outputs, path=path)
    assert choose_threshold(outputs[:400], path=path).guarantee.samples == 400


def test_hashes_tell_samples_apart_and_do_not_depend_on_batches(loader: Callable[..., Any]) -> None:
    hashes = content_hashes(loader(96, batch=16))
    assert len(hashes.unique()) == 96
    assert torch.equal(hashes, content_hashes(loader(96, batch=5)))
    assert not torch.isin(content_hashes(loader(96, seed=1)), hashes).any()


def test_every_tensor_of_a_sample_is_hashed() -> None:
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]])
    hashes = content_hashes([{"input_ids": ids, "attention_mask": mask.bool(), "labels": torch.zeros(2)}])
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("left", [False, True])
def test_the_padding_of_texts_does_not_count(left: bool) -> None:
    """A batch is padded to its longest text, so that a copy in another batch has other zeros."""
    short = {"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.tensor([[1, 1]])}
    sides = (3, 0) if left else (0, 3)
    padded = {name: torch.nn.functional.pad(tensor, sides) for name, tensor in short.items()}
    assert torch.equal(content_hashes([short]), content_hashes([padded]))
    padded["input_ids"] = padded["input_ids"] + 1
    assert not torch.equal(content_hashes([short]), content_hashes([padded]))


def test_inputs_in_any_nesting_are_hashed() -> None:
    """What tokenisers return is a mapping, but no dict."""
    ids = torch.arange(6).view(2, 3)
    plain = content_hashes([{"input_ids": ids}])
    assert torch.equal(plain, content_hashes([(UserDict(input_ids=ids), torch.zeros(2))]))
    assert torch.equal(plain, content_hashes([([[ids]], torch.zeros(2))]))


def test_inputs_without_tensors_are_refused() -> None:
    with pytest.raises(ExitkitError, match="without any tensor"):
        content_hashes([["a text"]])


def test_outputs_are_split_by_samples() -> None:
    outputs = replace(world(10, 0), hashes=torch.arange(10))
    some = outputs[torch.tensor([3, 1])]
    assert len(some) == 2
    assert torch.equal(some.log_probs, outputs.log_probs[[3, 1]])
    assert some.hashes.tolist() == [3, 1]  # type: ignore[union-attr]
    assert len(outputs[:4]) + len(outputs[4:]) == 10
    assert len(outputs[outputs.correct[:, 0]]) == outputs.correct[:, 0].sum()


def test_hashes_of_another_length_are_refused() -> None:
    with pytest.raises(ExitkitError, match=r"hashes have .*shape \(3,\); expected int64 of shape \(10,\)"):
        replace(world(10, 0), hashes=torch.arange(3))


@pytest.mark.parametrize("threshold", ["high", None, ["a", "b"]])
def test_thresholds_that_are_no_numbers_are_refused(threshold: Any) -> None:
    with pytest.raises(ExitkitError, match=r"threshold=.* must be a number, one for each exit, or a policy"):
        world(10, 0).exits_at(threshold)


def test_thresholds_of_another_number_of_exits_are_refused() -> None:
    with pytest.raises(ExitkitError, match=r"threshold has 3 values; give one τ, or one for each of the 2 exits"):
        world(10, 0).exits_at([0.1, 0.2, 0.3])
