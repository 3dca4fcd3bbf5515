"""Calibration, overthinking, rates per class, area under the curve, intervals, paired tests; outputs larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

import exitkit
from exitkit import ExitkitError, ExitOutputs
from exitkit.evaluation import (
    bootstrap,
    calibration_error,
    exit_rates_by_class,
    fit_temperatures,
    overthinking,
    paired_tests,
    reliability,
    threshold_path,
)


def outputs_of(right: list[list[int]], **options: Any) -> ExitOutputs:
    """Two classes, label 0 for all: 1 where an exit is right about a sample, always with confidence 0.9."""
    p = torch.where(torch.tensor(right).bool(), 0.9, 0.1)
    usual = {"labels": torch.zeros(len(right)).long(), "macs": range(1, 1 + p.shape[1]), "backbone_macs": 4.0}
    return ExitOutputs(torch.stack([p, 1 - p], -1).log(), **(usual | options))


def confident(levels: list[list[float]], labels: list[int]) -> ExitOutputs:
    p = torch.tensor(levels, dtype=torch.float64)
    return ExitOutputs(torch.stack([p, 1 - p], -1).log(), torch.tensor(labels), [1, 2], 2.0)


def random_outputs(samples: int = 400, seed: int = 0, skill: float = 1.0, **options: Any) -> ExitOutputs:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (samples,), generator=torch.Generator().manual_seed(9))
    logits = torch.randn(samples, 3, 4, generator=generator)
    logits += skill * torch.tensor([1.0, 1.5, 3.0])[:, None] * torch.eye(4)[labels][:, None]
    return ExitOutputs(logits, **({"labels": labels, "macs": [1, 2, 4], "backbone_macs": 4.0} | options))


# calibration ---------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    """Exit 0 says 0.8 and is right two times of four, then 0.6 and is right once of one."""
    outputs = confident([[0.8, 0.9]] * 4 + [[0.6, 0.9]], [0, 0, 1, 1, 0])
    assert calibration_error(outputs, bins=10).tolist() == pytest.approx([4 / 5 * 0.3 + 1 / 5 * 0.4, 0.3])


def test_calibration_error_is_that_of_a_loop() -> None:
    outputs = random_outputs()
    confidence, right = outputs.scores("confidence")[:, 1].numpy(), outputs.correct[:, 1].numpy()
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(outputs)[1] == pytest.approx(error)


def test_reliability_bins_add_up() -> None:
    outputs = random_outputs()
    confidence, accuracy, share = reliability(outputs, 12)
    assert share.sum(1) == pytest.approx([1, 1, 1])
    assert np.nansum(accuracy * share, axis=1) == pytest.approx(outputs.accuracy())
    edges = np.arange(13) / 12
    full = share > 0
    assert (((confidence >= edges[:-1]) & (confidence <= edges[1:])) | ~full).all()
    assert np.isnan(accuracy[~full]).all()


# overthinking and classes --------------------------------------------------------------------------------------------


def test_overthinking_by_hand() -> None:
    found = overthinking(outputs_of([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]]))
    assert found.destructive.tolist() == [0.2, 0.2]
    assert found.mended.tolist() == [0.2, 0.2]
    assert found.ever_destructive == 0.4
    assert found.wasteful == 0.2


def test_overthinking_is_the_difference_of_accuracies() -> None:
    outputs = random_outputs()
    found, accuracy = overthinking(outputs), outputs.accuracy()
    assert found.mended - found.destructive == pytest.approx(accuracy[-1] - accuracy[:-1])


def test_exit_rates_by_class() -> None:
    outputs = random_outputs()
    rates = exit_rates_by_class(outputs, 0.7)
    assert rates.sum(1) == pytest.approx(np.ones(4))
    for label in range(4):
        assert rates[label] == pytest.approx(outputs[outputs.labels == label].exit_rates(0.7))


def test_classes_without_samples_have_no_rate() -> None:
    assert np.isnan(exit_rates_by_class(outputs_of([[1, 1], [0, 1]]), 0.5)[1]).all()


# area and intervals --------------------------------------------------------------------------------------------------


def test_auc_is_the_mean_over_budgets() -> None:
    curve = random_outputs().curve()
    budgets = np.linspace(curve.cost[0], 1, 20_001)[1:]
    assert curve.auc() == pytest.approx(np.mean([curve.at_budget(budget).accuracy for budget in budgets]), abs=1e-4)
    halves = np.linspace(0.5, 0.8, 20_001)[1:]
    assert curve.auc(0.5, 0.8) == pytest.approx(np.mean([curve.at_budget(b).accuracy for b in halves]), abs=1e-4)


def test_auc_by_hand() -> None:
    """One of two samples can leave at exit 0 and is right there; costs 1/4, 5/8 and 1, accuracies 1/2, 1/2, 1."""
    outputs = ExitOutputs(
        torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.4, 0.6], [0.9, 0.1]]]).log(), torch.zeros(2).long(), [1, 4], 4.0
    )
    assert outputs.curve().cost.tolist() == [0.25, 0.625, 1.0]
    assert outputs.curve().auc() == pytest.approx((0.375 * 0.5 + 0.375 * 1.0) / 0.75)


@pytest.mark.parametrize("bounds", [(0.1, 1.0), (0.8, 0.5), (float("nan"), 1.0)])
def test_auc_over_no_budgets_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ExitkitError, match=r"low=.*budgets must rise, from 0\.250"):
        random_outputs().curve().auc(*bounds)


def test_bootstrap_intervals_cover_as_often_as_they_say() -> None:
    """Accuracy of the first exit of fresh samples, 60 times at 90%."""
    truth = random_outputs(50_000, seed=123, labels=None)
    truth = replace(truth, labels=torch.randint(0, 4, (50_000,), generator=torch.Generator().manual_seed(9)))
    covered = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        some = truth[generator.integers(0, 50_000, 150)]
        low, value, high = bootstrap(some, lambda o: float(o.accuracy()[0]), resamples=200, confidence=0.9, seed=seed)
        assert low <= value <= high
        covered += low <= truth.accuracy()[0] <= high
    assert covered >= 46  # 54 expected, standard deviation 2.3


def test_bootstrap_is_repeatable() -> None:
    outputs = random_outputs(100)
    found = [bootstrap(outputs, lambda o: o.curve().auc(), resamples=50, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


# paired tests --------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_exact_binomial_test() -> None:
    """Everybody leaves at exit 0: 6 samples only the first has right, 1 only the second."""
    one = outputs_of([[1, 1]] * 13 + [[0, 1]] * 7)
    two = outputs_of([[0, 1]] * 6 + [[1, 1]] * 8 + [[0, 1]] * 6)
    (pair,) = paired_tests({"one": one, "two": two}, 0.3, resamples=40).pairs
    assert (pair.only_first, pair.only_second) == (6, 1)
    assert pair.accuracies == (13 / 20, 8 / 20)
    assert pair.p_value == pytest.approx(2 * binom.cdf(1, 7, 0.5))


def test_methods_are_compared_by_their_likeliest_classes() -> None:
    """Everybody leaves at exit 0, of three classes: the label is first, second or last."""
    first, second, last = [2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 2.0, 1.0]

    def answering(logits: list[list[float]]) -> ExitOutputs:
        both = torch.tensor(logits)[:, None].expand(-1, 2, -1)
        return ExitOutputs(both, torch.zeros(len(logits), dtype=torch.long), torch.tensor([1.0, 4.0]), 4.0)

    outputs = {"one": answering([first, second, second, last]), "two": answering([first, first, last, last])}
    (pair,) = paired_tests(outputs, 0.3, top=2, resamples=40).pairs
    assert (pair.top, pair.accuracies, pair.only_first, pair.only_second) == (2, (3 / 4, 2 / 4), 1, 0)
    assert pair.auc.value == pytest.approx(1 / 4)
    (pair,) = paired_tests(outputs, 0.3, resamples=40).pairs
    assert (pair.top, pair.accuracies, pair.only_first, pair.only_second) == (1, (1 / 4, 2 / 4), 0, 1)
    assert "top-2 accuracy" in str(paired_tests(outputs, 0.3, top=2, resamples=40))
    with pytest.raises(ExitkitError, match=r"top=4 must be a whole number.*most 3; there are 3 classes"):
        paired_tests(outputs, 0.3, top=4)


def test_equal_methods_do_not_differ() -> None:
    outputs = random_outputs()
    (pair,) = paired_tests({"a": outputs, "b": outputs}, 0.6, resamples=40).pairs
    assert pair.p_value == 1
    assert pair.auc == (0, 0, 0)


def test_a_better_method_is_better_by_what_its_curve_says() -> None:
    good, poor = random_outputs(skill=1.5), random_outputs(seed=1)
    tests = paired_tests({"good": good, "poor": poor}, 0.6, resamples=100)
    (pair,) = tests.pairs
    assert pair.auc.value == pytest.approx(good.curve().auc() - poor.curve().auc())
    assert 0 < pair.auc.low < pair.auc.value < pair.auc.high
    assert pair.p_value < 0.01
    assert "good – poor" in str(tests)


def test_all_pairs_are_tested() -> None:
    outputs = {name: random_outputs(seed=seed) for seed, name in enumerate("abc")}
    pairs = [(pair.first, pair.second) for pair in paired_tests(outputs, 0.6, resamples=40).pairs]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (random_outputs(300), r"'b' and 'a' have other labels \(300 and 400 samples\)"),
        (random_outputs()[torch.arange(399, -1, -1)], "other labels .*shuffle=False"),
        (
            random_outputs(backbone_macs=5.0),
            r"different backbones \(5 and 4 MACs\).*replace\(outputs, backbone_macs=4\)",
        ),
        (random_outputs(labels=None), "labels=None in 'b' or 'a'"),
        (random_outputs(hashes=torch.arange(1, 401)), "collected on other inputs"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(other: ExitOutputs, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        paired_tests({"a": random_outputs(hashes=torch.arange(400)), "b": other}, 0.6)


def test_columns_stand_below_their_headings_whatever_the_names() -> None:
    long = {f"runs/of/a/long/name/{name}": random_outputs(seed=seed) for seed, name in enumerate(("sdn", "ztw"))}
    heading, row, area = str(paired_tests(long, 0.6, resamples=40)).splitlines()
    assert len(heading) == len(row)
    assert heading.index("accuracy") + len("accuracy") == row.rindex("%") + 1
    assert area.startswith("  AUC difference ")


def test_a_comparison_of_short_names_fits_80_columns() -> None:
    outputs = {name: random_outputs(seed=seed) for seed, name in enumerate(("sdn", "ztw", "branchynet"))}
    assert max(map(len, str(paired_tests(outputs, 0.6, resamples=40)).splitlines())) <= 80


def test_one_method_cannot_be_compared() -> None:
    with pytest.raises(ExitkitError, match=r"outputs=\['a'\]: give a dict of at least two"):
        paired_tests({"a": random_outputs()})


@pytest.mark.parametrize("ask", [reliability, calibration_error, overthinking])
def test_metrics_need_labels(ask: Callable[[ExitOutputs], object]) -> None:
    with pytest.raises(ExitkitError, match="labels=None"):
        ask(random_outputs(labels=None))


@pytest.mark.parametrize(
    "ask",
    [
        reliability,
        calibration_error,
        overthinking,
        fit_temperatures,
        threshold_path,
        lambda o: exit_rates_by_class(o, 0.5),
    ],
)
def test_what_are_no_outputs_is_refused(ask: Callable[[Any], object]) -> None:
    with pytest.raises(ExitkitError, match=r"outputs is Curve; give what exitkit\.collect"):
        ask(random_outputs().curve())


def test_budgets_and_thresholds_that_are_no_numbers_are_refused() -> None:
    outputs = random_outputs()
    curve: Any = outputs.curve()
    for threshold in ("high", None, float("nan")):
        with pytest.raises(ExitkitError, match=rf"threshold={threshold!r} must be a number"):
            curve.at_threshold(threshold)
    with pytest.raises(ExitkitError, match="threshold=nan must be a number"):
        outputs.exits_at(float("nan"))
    with pytest.raises(ExitkitError, match=r"low='cheap', high=1\.0: budgets must rise"):
        curve.auc("cheap")


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(ExitkitError, match=r"outputs\['b'\] is int"):
        paired_tests({"a": random_outputs(), "b": 5})  # type: ignore[dict-item]
    with pytest.raises(ExitkitError, match="outputs=list: give a dict"):
        paired_tests([random_outputs()] * 2)  # type: ignore[arg-type]
    with pytest.raises(ExitkitError, match="resamples='many' must be"):
        paired_tests({"a": random_outputs(), "b": random_outputs()}, resamples="many")  # type: ignore[arg-type]
    for resamples in (1, 39):  # 2.5% of 39 is less than one
        with pytest.raises(ExitkitError, match=f"resamples={resamples} must be a whole number at least 40"):
            paired_tests({"a": random_outputs(), "b": random_outputs()}, resamples=resamples)
    with pytest.raises(ExitkitError, match="rates per class need labels"):
        exit_rates_by_class(random_outputs(labels=None), 0.5)
    with pytest.raises(ExitkitError, match="bins=0 must be"):
        reliability(random_outputs(), 0)
    with pytest.raises(ExitkitError, match="confidence=2 must be a number between 0 and 1"):
        bootstrap(random_outputs(), lambda o: 0.0, confidence=2)


# outputs larger than memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "patience"])
def test_outputs_in_half_precision_say_almost_the_same(criterion: str) -> None:
    """A rounding changes scores by 5e-4, and answers where two classes are that close."""
    outputs = random_outputs(3_000)
    half = replace(outputs, log_probs=outputs.log_probs.half())
    assert half.log_probs.dtype == torch.float16
    same = (half.answers == outputs.answers).all(1)
    assert same.double().mean() > 0.995
    assert torch.allclose(half.scores(criterion)[same], outputs.scores(criterion)[same], atol=5e-4)
    assert half.curve().auc() == pytest.approx(outputs.curve().auc(), abs=1e-3)


def test_half_precision_keeps_confidences_next_to_one() -> None:
    p = torch.tensor([[1 - 1e-5, 0.999]], dtype=torch.float64)
    outputs = ExitOutputs(torch.stack([p, 1 - p], -1).log().half(), None, [1, 2], 2.0)
    assert (1 - outputs.scores().double()).tolist()[0] == pytest.approx([1e-5, 1e-3], rel=0.02)


def test_saving_in_half_halves_the_file(tmp_path: Path) -> None:
    outputs = random_outputs(2_000)
    outputs.save(tmp_path / "full.safetensors")
    outputs.save(tmp_path / "half.safetensors", half=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    loaded = ExitOutputs.load(tmp_path / "half.safetensors")
    assert torch.equal(loaded.log_probs, outputs.log_probs.half())
    assert torch.allclose(loaded.scores(), outputs.scores(), atol=5e-4)


def test_what_is_computed_in_chunks_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0))
    options = {"labels": torch.zeros(50).long(), "macs": [1, 2, 4], "backbone_macs": 4.0}
    whole = ExitOutputs(logits, **options)  # type: ignore[arg-type]
    for module in ("outputs", "log_probs"):
        monkeypatch.setattr(f"exitkit.evaluation.{module}.CHUNK", 7)
    parts = ExitOutputs(logits, **options)  # type: ignore[arg-type]
    assert torch.equal(parts.log_probs, whole.log_probs)
    for criterion in ("confidence", "patience"):
        assert torch.equal(parts.scores(criterion), whole.scores(criterion))
    assert torch.equal(parts.correct, whole.correct)
    assert torch.equal(parts.calibrated([2, 1, 3]).log_probs, whole.calibrated([2, 1, 3]).log_probs)


def test_collecting_to_a_file_is_collecting(
    tiny_ee: exitkit.MultiExitModel, loader: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "o.safetensors"
    kept, streamed = exitkit.collect(tiny_ee, loader(90, 16)), exitkit.collect(tiny_ee, loader(90, 16), path)
    assert torch.equal(streamed.log_probs, kept.log_probs.half())
    assert torch.equal(streamed.labels, kept.labels)  # type: ignore[arg-type]
    assert torch.equal(streamed.hashes, kept.hashes)  # type: ignore[arg-type]
    assert (streamed.criterion, streamed.dtype, streamed.backbone_macs) == (
        kept.criterion,
        kept.dtype,
        kept.backbone_macs,
    )
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_collection_leaves_the_older_file(
    tiny_ee: exitkit.MultiExitModel, loader: Callable[..., Any], tmp_path: Path
) -> None:
    def breaks() -> Any:
        yield from loader(32, 16)
        raise KeyboardInterrupt

    path = tmp_path / "o.safetensors"
    exitkit.collect(tiny_ee, loader(20), path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        exitkit.collect(tiny_ee, breaks(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
