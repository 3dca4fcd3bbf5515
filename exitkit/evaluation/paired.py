"""Methods or models side by side on the same samples, with tests that use that the samples are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from exitkit.common.checks import Index, check
from exitkit.common.errors import ArgumentError
from exitkit.evaluation.curve import Curve, traced
from exitkit.evaluation.metrics import Interval, Resamples
from exitkit.evaluation.outputs import ExitOutputs, check_outputs
from exitkit.evaluation.regression import RegressionOutputs
from exitkit.surgery.fingerprint import same_weights


@dataclass(frozen=True)
class PairedTest:
    """Two of the outputs compared.

    Attributes:
        first, second: their names.
        budget: the share of the backbone's MACs at which accuracies are compared.
        accuracies: of the two at the budget.
        only_first, only_second: how many samples only the one, or only the other, has right there.
        p_value: McNemar's exact test of the hypothesis that these are equally probable.
        auc: first minus second of the mean accuracy over the budgets both can keep, with a paired bootstrap interval.
        same_backbone: whether their backbones have the same weights; None where the outputs do not say.
        top: a sample counts as right where its label is among so many likeliest classes.
    """

    first: str
    second: str
    budget: float
    accuracies: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float
    auc: Interval
    same_backbone: bool | None
    top: int = 1


@dataclass(frozen=True)
class PairedTests:
    """All pairs; prints as a table, with a star where backbones differ. p-values are not corrected for how many there are."""

    pairs: tuple[PairedTest, ...]

    def __str__(self) -> str:
        names, width = _names_of(self.pairs)
        top = self.pairs[0].top
        measure = "accuracy" if top == 1 else f"top-{top} accuracy"
        lines = [f"{'pair':<{width}}{measure:>17}{'only 1st':>10}{'only 2nd':>10}{'p':>9}"]
        for name, pair in zip(names, self.pairs, strict=True):
            accuracies = "{:.2%} {:.2%}".format(*pair.accuracies)
            lines.append(
                f"{name:<{width}}{accuracies:>17}{pair.only_first:>10}{pair.only_second:>10}{pair.p_value:>9.2g}"
            )
            lines.append(f"  AUC difference {pair.auc.value:+.4f} ({pair.auc.low:+.4f} … {pair.auc.high:+.4f})")
        return "\n".join(lines + _star_explained(self.pairs))


@dataclass(frozen=True)
class PairedError:
    """Two regressions compared.

    Attributes:
        first, second: their names.
        budget: the share of the backbone's MACs at which they are compared.
        errors: mean squared errors of the two at the budget.
        difference: first minus second, with a 95% interval of the paired bootstrap over the samples.
        same_backbone: whether their backbones have the same weights; None where the outputs do not say.
    """

    first: str
    second: str
    budget: float
    errors: tuple[float, float]
    difference: Interval
    same_backbone: bool | None


@dataclass(frozen=True)
class PairedErrors:
    """All pairs; prints as a table, with a star where backbones differ."""

    pairs: tuple[PairedError, ...]

    def __str__(self) -> str:
        names, width = _names_of(self.pairs)
        lines = [
            f"mean squared error (less is better) at {100 * self.pairs[0].budget:g}% of the backbone's MACs",
            f"{'pair':<{width}}{'first':>10}{'second':>10}  difference (95% interval)",
        ]
        for name, pair in zip(names, self.pairs, strict=True):
            low, value, high = pair.difference
            errors = "".join(f"{error:>10.4f}" for error in pair.errors)
            lines.append(f"{name:<{width}}{errors}  {value:+.4f} ({low:+.4f} … {high:+.4f})")
        return "\n".join(lines + _star_explained(self.pairs))


def paired_tests(
    outputs: Mapping[str, ExitOutputs], budget: float = 0.5, *, top: int = 1, resamples: int = 500, seed: int = 0
) -> PairedTests:
    """Compare every two of several methods' or models' outputs on the same samples.

    Each uses its own criterion, and the highest τ whose cost stays under the budget on these samples.

    Args:
        outputs: by name, at least two, with labels and in the same order of samples.
        budget: share of the backbone's MACs.
        top: a sample counts as right where its label is among so many likeliest classes, as for ``outputs.curve``.
        resamples: of the bootstrap, at least 40.
        seed: of the bootstrap.

    Raises:
        ArgumentError: regressions, other samples, another backbone, no labels, a budget that one of them cannot keep, or
            ``top`` is not from 1 to the number of classes.
    """
    _check_pairable(outputs, resamples, seed)
    if any(one.measure != "accuracy" for one in outputs.values()):
        raise ArgumentError(
            "outputs: paired_tests counts right answers, and regressions have none; compare their errors by paired_errors"
        )
    pairs = [_pair(one, two, outputs, budget, top, resamples, seed) for one, two in combinations(outputs, 2)]
    return PairedTests(tuple(pairs))


def _pair(
    one: str, two: str, outputs: Mapping[str, ExitOutputs], budget: float, top: int, resamples: int, seed: int
) -> PairedTest:
    from scipy.stats import binomtest

    first, second = (_right_at(outputs[name], budget, top) for name in (one, two))
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    return PairedTest(
        one,
        two,
        budget,
        (float(first.mean()), float(second.mean())),
        only_first,
        only_second,
        float(binomtest(only_first, differing).pvalue) if differing else 1.0,
        _auc_difference(outputs[one], outputs[two], top, resamples, seed),
        same_backbone(outputs[one], outputs[two]),
        top,
    )


def same_backbone(one: ExitOutputs, other: ExitOutputs) -> bool | None:
    """Whether the weights of two backbones are the same; None where the outputs do not say."""
    return None if one.weights is None or other.weights is None else same_weights(one.weights, other.weights)


def _right_at(outputs: ExitOutputs, budget: float, top: int) -> NDArray[np.bool_]:
    exits = outputs.exits_at(outputs.curve().at_budget(budget))
    right: NDArray[np.bool_] = outputs.correct_among(top).numpy()[np.arange(len(outputs)), exits]
    return right


def _auc_difference(one: ExitOutputs, two: ExitOutputs, top: int, resamples: int, seed: int) -> Interval:
    low = max(one.costs[0], two.costs[0])
    parts = [(o, o.scores()[:, :-1].numpy(), o.correct_among(top).numpy().astype(np.int64)) for o in (one, two)]

    def difference(rows: NDArray[np.int64]) -> float:
        first, second = (_curve(outputs, scores[rows], right[rows]).auc(low) for outputs, scores, right in parts)
        return first - second

    return _bootstrapped(difference, len(one), resamples, seed)


def _curve(outputs: ExitOutputs, scores: NDArray[np.float64], right: NDArray[np.int64]) -> Curve:
    """The curve of some of the samples of ``outputs``, whose scores (n, M) and correctness (n, M+1) are known already."""
    never, macs = outputs.policy(np.inf), outputs.macs.numpy()
    return traced(scores, right, lambda sums: sums / len(scores), never, macs, outputs.backbone_macs)


def paired_errors(
    outputs: Mapping[str, RegressionOutputs], budget: float = 0.5, *, resamples: int = 500, seed: int = 0
) -> PairedErrors:
    """Compare every two of several regressions' outputs on the same samples; of classifiers see :func:`paired_tests`.

    Each leaves at the highest τ whose cost stays under the budget on these samples.

    Args:
        outputs: by name, at least two, with labels and in the same order of samples.
        budget: share of the backbone's MACs.
        resamples: of the bootstrap, at least 40.
        seed: of the bootstrap.

    Raises:
        ArgumentError: fewer than two, other samples, another backbone, no labels, or a budget that one of them cannot keep.
    """
    _check_pairable(outputs, resamples, seed)
    for name, outputs_ in outputs.items():
        if not isinstance(outputs_, RegressionOutputs):
            raise ArgumentError(f"outputs[{name!r}] are of a classifier; compare those by paired_tests")
    errors = {name: _errors_at(one, budget) for name, one in outputs.items()}
    pairs = []
    for one, two in combinations(outputs, 2):
        means = float(errors[one].mean()), float(errors[two].mean())
        difference = _mean(errors[one] - errors[two], resamples, seed)
        pairs.append(PairedError(one, two, budget, means, difference, same_backbone(outputs[one], outputs[two])))
    return PairedErrors(tuple(pairs))


def _errors_at(outputs: RegressionOutputs, budget: float) -> NDArray[np.float64]:
    """(N,): each sample's squared error where it leaves."""
    exits = outputs.exits_at(outputs.curve(measure="mse").at_budget(budget))
    errors: NDArray[np.float64] = outputs.squared_errors()[np.arange(len(outputs)), exits]
    return errors


def _mean(values: NDArray[np.float64], resamples: int, seed: int) -> Interval:
    """Of (N,), with its interval."""
    return _bootstrapped(lambda rows: float(values[rows].mean()), len(values), resamples, seed)


def _bootstrapped(
    statistic: Callable[[NDArray[np.int64]], float], samples: int, resamples: int, seed: int
) -> Interval:
    """A statistic of the rows of paired samples, with its 95% percentile bootstrap interval."""
    generator = np.random.default_rng(seed)
    drawn = [statistic(generator.integers(0, samples, samples)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(low), float(statistic(np.arange(samples))), float(high))


def _names_of(pairs: Sequence[PairedTest | PairedError]) -> tuple[list[str], int]:
    """The pairs as they are called in a table, and its first column's width."""
    names = [f"{pair.first} – {pair.second}{' *' if pair.same_backbone is False else ''}" for pair in pairs]
    return names, max(26, *(len(name) + 2 for name in names))


def _star_explained(pairs: Sequence[PairedTest | PairedError]) -> list[str]:
    """The last line of a table, where a name has a star."""
    if all(pair.same_backbone is not False for pair in pairs):
        return []
    return ["* their backbones have other weights, so that the difference may be the backbones'"]


def _check_pairable(outputs: Mapping[str, ExitOutputs], resamples: int, seed: int) -> None:
    """Refuse what no pairs can be made of, or not be resampled.

    Raises:
        ArgumentError: no dict of at least two, fewer than 40 resamples, a seed below 0, or as :func:`check_comparable`.
    """
    if not isinstance(outputs, Mapping) or len(outputs) < 2:
        given = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ArgumentError(f"outputs={given}: give a dict of at least two, by name")
    check("resamples", resamples, Resamples)
    check("seed", seed, Index)
    check_comparable(outputs)


def check_comparable(outputs: Mapping[str, ExitOutputs]) -> None:
    """Refuse outputs that cannot be set side by side.

    Raises:
        ArgumentError: other samples, another backbone, a regression and a classifier, or no labels.
    """
    for name, one in outputs.items():
        check_outputs(one, f"outputs[{name!r}]")
    (name, first), *others = outputs.items()
    for other, candidate in others:
        if candidate.measure != first.measure:
            raise ArgumentError(
                f"{name!r} is measured in {first.measure}, {other!r} in {candidate.measure}: a regression and a classifier\n"
                "Give those of one kind"
            )
        if candidate.labels is None or first.labels is None:
            raise ArgumentError(f"labels=None in {other!r} or {name!r}: comparing accuracies needs labels")
        if len(candidate) != len(first) or not torch.equal(candidate.labels, first.labels):
            raise ArgumentError(
                f"{other!r} and {name!r} have other labels ({len(candidate)} and {len(first)} samples): collect both from "
                "one loader, in one order (shuffle=False)"
            )
        hashes = candidate.hashes, first.hashes
        if hashes[0] is not None and hashes[1] is not None and not torch.equal(hashes[0], hashes[1]):
            raise ArgumentError(f"{other!r} and {name!r} were collected on other inputs, though their labels agree")
        if candidate.backbone_macs != first.backbone_macs:
            raise ArgumentError(
                f"{other!r} and {name!r} are of different backbones ({candidate.backbone_macs:g} and {first.backbone_macs:g} "
                "MACs), so that their costs are shares of different things. To compare them all the same, measure both by "
                f"one: dataclasses.replace(outputs, backbone_macs={first.backbone_macs:g})"
            )
