"""One threshold per exit: the most accurate ones under a budget, with a proven bound on what better ones could reach.

Thresholds are searched among quantiles of each exit's scores. Coordinate ascent on accuracy minus λ · cost gives good ones
for every price λ; branch and bound over boxes of thresholds improves on them and proves the bound. A box's bound lets every
sample take, of the exits it can reach in the box, the one that is best in hindsight.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from exitkit.calibration.risk_control import ThresholdPath
from exitkit.evaluation.outputs import ExitOutputs, check_outputs
from exitkit.methods.criteria import Criterion, as_criterion
from exitkit.methods.policy import ExitPolicy

_LEVELS = 32
_PRICES = np.geomspace(1e-3, 30, 40)
_BOXES = 3_000
_ROUNDS = 100
_Levels = tuple[int, ...]


@dataclass(frozen=True)
class PerExitThresholds:
    """Thresholds for each exit under a budget.

    Attributes:
        policy: these thresholds, for whatever takes a threshold.
        accuracy: with them, on the samples they were searched on; measure it again on others.
        cost: average cost with them, as a share of the backbone or in milliseconds, as the budget.
        bound: no thresholds among those searched are more accurate than this on these samples; equal to ``accuracy`` where
            the search was exact.
    """

    policy: ExitPolicy
    accuracy: float
    cost: float
    bound: float

    @property
    def thresholds(self) -> tuple[float, ...]:
        """τ of each exit before the backbone."""
        return self.policy.thresholds


def per_exit_thresholds(
    outputs: ExitOutputs,
    budget: float,
    *,
    milliseconds: Sequence[float] | None = None,
    criterion: str | Criterion | None = None,
) -> PerExitThresholds:
    """The most accurate thresholds, one per exit, whose average cost stays under ``budget``.

    Never less accurate, on these samples, than the one τ of ``outputs.curve().at_budget(budget)``, which is among them.

    Args:
        outputs: of samples that the thresholds are chosen on; without labels, agreement with the full model counts.
        budget: average cost per sample: a share of the backbone's MACs, or milliseconds.
        milliseconds: (M+1,) measured time to answer at each exit; then ``budget`` is in milliseconds.
        criterion: the score; by default that of ``outputs``.

    Raises:
        ArgumentError: a budget that even leaving at exit 0 does not stay under, or a table of another length.
    """
    check_outputs(outputs)
    labelled = outputs if outputs.labels is not None else outputs.against_backbone()
    curve = labelled.curve(criterion, milliseconds=milliseconds)
    one = curve.at_budget(ms=budget) if milliseconds is not None else curve.at_budget(budget)
    tau = one.policy.thresholds[0]
    search = _Search.of(labelled, milliseconds, criterion, extra=tau)
    best = search.at(tau)
    for price in _PRICES:
        found = search.ascend(best, price)
        best = max(best, found, key=lambda levels: search.rank(levels, budget))
    best, bound = search.branch(best, budget)
    right, cost = search.value(best)
    return PerExitThresholds(
        curve.no_exit.at(*search.thresholds(best)), right / len(outputs), cost, bound / len(outputs)
    )


def threshold_path(outputs: ExitOutputs, *, criterion: str | Criterion | None = None) -> ThresholdPath:
    """Per-exit thresholds from strict to loose, for :func:`exitkit.choose_threshold` to test on *other* samples.

    The rows maximise accuracy minus λ · cost on these samples for rising prices λ, with steps between them.
    """
    check_outputs(outputs)
    labelled = outputs if outputs.labels is not None else outputs.against_backbone()
    search = _Search.of(labelled, None, criterion)
    corners = [search.strictest]
    for price in _PRICES:
        corners.append(search.ascend(corners[-1], price))
    rows = [np.linspace(a, b, _LEVELS // 2).round().astype(int) for a, b in pairwise(corners) if a != b]
    levels = [tuple(row) for row in np.concatenate([[corners[0]], *rows]).tolist()]
    costs = np.array([search.value(row)[1] for row in levels])
    cheaper = costs < np.minimum.accumulate(np.append(np.inf, costs[:-1]))
    thresholds = np.array([search.thresholds(row) for row, kept in zip(levels, cheaper, strict=True) if kept])
    return ThresholdPath(thresholds, as_criterion(criterion or outputs.criterion).name, outputs.hashes)


@dataclass(frozen=True, eq=False)
class _Search:
    """Thresholds as level numbers: a sample leaves at exit m when ``levels[m]`` is below its rank there.

    Attributes:
        taus: per exit, the ascending thresholds that are tried; at the last one no sample leaves.
        ranks: (N, M) how many of them are below each score.
        right: (N, M+1) which exits are right.
        costs: (M+1,)
    """

    taus: tuple[NDArray[np.float64], ...]
    ranks: NDArray[np.int64]
    right: NDArray[np.bool_]
    costs: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        outputs: ExitOutputs,
        milliseconds: Sequence[float] | None,
        criterion: str | Criterion | None,
        extra: float | None = None,
    ) -> _Search:
        scores = outputs.scores(criterion)[:, :-1].numpy()
        never = as_criterion(criterion or outputs.criterion).highest(scores.shape[1])
        taus = tuple(_levels(column, never, extra) for column in scores.T)
        ranks = np.stack([np.searchsorted(t, column) for t, column in zip(taus, scores.T, strict=True)], axis=1)
        costs = outputs.costs if milliseconds is None else np.asarray(milliseconds, dtype=np.float64)
        return cls(taus, ranks, outputs.correct.numpy(), costs)

    @cached_property
    def strictest(self) -> _Levels:
        """No sample leaves."""
        return tuple(len(taus) - 1 for taus in self.taus)

    def at(self, threshold: float) -> _Levels:
        """The levels of one τ that is among all exits' thresholds, or above every score."""
        return tuple(min(int(np.searchsorted(taus, threshold)), len(taus) - 1) for taus in self.taus)

    def thresholds(self, levels: _Levels) -> tuple[float, ...]:
        return tuple(float(taus[level]) for taus, level in zip(self.taus, levels, strict=True))

    def value(self, levels: _Levels) -> tuple[int, float]:
        """How many samples are answered right, and the average cost."""
        exits = self._exits(levels)
        return int(self.right[np.arange(len(exits)), exits].sum()), float(self.costs[exits].mean())

    def rank(self, levels: _Levels, budget: float) -> tuple[bool, int, float]:
        """To compare by: under the budget first, then right, then cheap."""
        right, cost = self.value(levels)
        return cost < budget, right, -cost

    def ascend(self, levels: _Levels, price: float) -> _Levels:
        """Improve one exit's threshold after another, each exactly, until nothing gains at this price."""
        worth = self.right - price * self.costs / self.costs[-1]
        current = list(levels)
        for _ in range(_ROUNDS):
            before = list(current)
            for exit_ in range(len(current)):
                current[exit_] = self._best_level(worth, current, exit_)
            if current == before:
                break
        return tuple(current)

    def branch(self, best: _Levels, budget: float) -> tuple[_Levels, float]:
        """Branch and bound from an incumbent: better levels where there are, and what none can exceed (samples right)."""
        found = self.rank(best, budget)
        box = ((0,) * len(best), self.strictest)
        boxes = [(-self._bound(*box, budget), *box)]
        for _ in range(_BOXES):
            if not boxes or -boxes[0][0] < found[1] + 1:
                return best, float(found[1])
            _, lower, upper = heapq.heappop(boxes)
            widest = int(np.argmax(np.subtract(upper, lower)))
            middle = (lower[widest] + upper[widest]) // 2
            for low, high in (
                (lower, _changed(upper, widest, middle)),
                (_changed(lower, widest, middle + 1), upper),
            ):
                loosest = self.rank(low, budget)
                if not loosest[0]:  # the loosest thresholds of the box cost too much, so all of them do
                    continue
                for corner, value in ((low, loosest), (high, self.rank(high, budget))):
                    if value > found:
                        best, found = corner, value
                bound = self._bound(low, high, budget)
                if bound >= found[1] + 1 and low != high:
                    heapq.heappush(boxes, (-bound, low, high))
        return best, max(float(found[1]), math.floor(-boxes[0][0]) if boxes else 0.0)

    def _exits(self, levels: Sequence[int]) -> NDArray[np.int64]:
        leaves = np.column_stack([self.ranks > np.asarray(levels), np.ones(len(self.ranks), bool)])
        exits: NDArray[np.int64] = leaves.argmax(1)
        return exits

    def _best_level(self, worth: NDArray[np.float64], levels: list[int], exit_: int) -> int:
        """The best level of one exit, the others as they are; of equals the strictest."""
        reached = self._exits([*levels[:exit_], *self.strictest[exit_:]]) >= exit_
        later = self._exits([*self.strictest[: exit_ + 1], *levels[exit_ + 1 :]])
        gain = np.where(reached, worth[:, exit_] - worth[np.arange(len(worth)), later], 0.0)
        by_rank = np.bincount(self.ranks[:, exit_], weights=gain, minlength=len(self.taus[exit_]) + 1)
        gains = by_rank[::-1].cumsum()[::-1][1:]  # at level t those of a rank above t leave
        return len(gains) - 1 - int(gains[::-1].round(9).argmax())

    def _bound(self, lower: _Levels, upper: _Levels, budget: float) -> float:
        """At most so many samples are right under the budget, with levels in the box: weak duality, at the best price."""
        may = np.column_stack([self.ranks > np.asarray(lower), np.ones(len(self.ranks), bool)])
        must = np.column_stack([np.zeros(len(self.ranks), bool), self.ranks > np.asarray(upper)])
        reachable = may & ~np.logical_or.accumulate(must, axis=1)
        cheapest = self.costs[reachable.argmax(1)]
        knows = reachable & self.right
        if_right = np.where(knows.any(1), self.costs[knows.argmax(1)], np.inf)

        def best(price: float) -> float:
            return float(np.maximum(1 - price * if_right, -price * cheapest).sum() + price * budget * len(cheapest))

        low, high = 0, len(_PRICES) - 1
        while high - low > 2:  # it is convex in the price
            left, right = low + (high - low) // 3, high - (high - low) // 3
            low, high = (low, right) if best(self._price(left)) < best(self._price(right)) else (left, high)
        return min(best(self._price(number)) for number in range(low, high + 1))

    def _price(self, number: int) -> float:
        return float(_PRICES[number] / self.costs[-1])


def _levels(scores: NDArray[np.float64], never: float, extra: float | None) -> NDArray[np.float64]:
    quantiles = np.quantile(scores, np.linspace(0, 1, _LEVELS), method="lower")
    all_leave = np.nextafter(scores.min(), -np.inf)
    some = [] if extra is None else [extra]
    levels: NDArray[np.float64] = np.unique([all_leave, *quantiles, *some, never])
    return levels[levels <= never]


def _changed(levels: _Levels, exit_: int, level: int) -> _Levels:
    return (*levels[:exit_], level, *levels[exit_ + 1 :])
