"""Regressions side by side on the same samples: squared errors at a budget, and how sure their difference is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from exitkit.common.checks import Count, Index, check
from exitkit.common.errors import ArgumentError
from exitkit.evaluation.metrics import Interval
from exitkit.evaluation.paired import check_comparable, same_backbone
from exitkit.evaluation.regression import RegressionOutputs


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
        names = [f"{p.first} – {p.second}{'' if p.same_backbone is not False else ' *'}" for p in self.pairs]
        width = max(26, *(len(name) + 2 for name in names))
        lines = [
            f"mean squared error (less is better) at {100 * self.pairs[0].budget:g}% of the backbone's MACs",
            f"{'pair':<{width}}{'first':>10}{'second':>10}  difference (95% interval)",
        ]
        for name, pair in zip(names, self.pairs, strict=True):
            low, value, high = pair.difference
            errors = "".join(f"{error:>10.4f}" for error in pair.errors)
            lines.append(f"{name:<{width}}{errors}  {value:+.4f} ({low:+.4f} … {high:+.4f})")
        if any(pair.same_backbone is False for pair in self.pairs):
            lines.append("* their backbones have other weights, so that the difference may be the backbones'")
        return "\n".join(lines)


def paired_errors(
    outputs: Mapping[str, RegressionOutputs], budget: float = 0.5, *, resamples: int = 500, seed: int = 0
) -> PairedErrors:
    """Compare every two of several regressions' outputs on the same samples; of classifiers see :func:`paired_tests`.

    Each leaves at the highest τ whose cost stays under the budget on these samples.

    Args:
        outputs: by name, at least two, with labels and in the same order of samples.
        budget: share of the backbone's MACs.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ArgumentError: fewer than two, other samples, another backbone, no labels, or a budget that one of them cannot keep.
    """
    if len(outputs) < 2:
        raise ArgumentError(f"outputs={list(outputs)}: give a dict of at least two, by name")
    check("resamples", resamples, Count)
    check("seed", seed, Index)
    check_comparable(outputs)
    for name, outputs_ in outputs.items():
        if not isinstance(outputs_, RegressionOutputs):
            raise ArgumentError(f"outputs[{name!r}] are of a classifier; compare those by paired_tests")
    errors = {name: _errors_at(one, budget) for name, one in outputs.items()}
    return PairedErrors(
        tuple(
            PairedError(
                one,
                two,
                budget,
                (float(errors[one].mean()), float(errors[two].mean())),
                _mean(errors[one] - errors[two], resamples, seed),
                same_backbone(outputs[one], outputs[two]),
            )
            for one, two in combinations(outputs, 2)
        )
    )


def _errors_at(outputs: RegressionOutputs, budget: float) -> NDArray[np.float64]:
    """(N,): each sample's squared error where it leaves."""
    exits = outputs.exits_at(outputs.curve(measure="mse").at_budget(budget))
    errors: NDArray[np.float64] = outputs.squared_errors()[np.arange(len(outputs)), exits]
    return errors


def _mean(values: NDArray[np.float64], resamples: int, seed: int) -> Interval:
    """Of (N,), with its percentile bootstrap interval."""
    generator = np.random.default_rng(seed)
    drawn = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(low), float(values.mean()), float(high))
