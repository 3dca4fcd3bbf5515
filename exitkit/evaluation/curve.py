"""Accuracy against cost, exactly: one point for every threshold at which anything changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitkit.common.checks import is_number, positive
from exitkit.common.errors import ArgumentError
from exitkit.evaluation.budgets import BUDGETS, BudgetPoint, BudgetTable, share_of_cost
from exitkit.evaluation.exit_times import ExitTimes, selected
from exitkit.evaluation.plots import Array, plot_curves
from exitkit.methods.policy import ExitPolicy, Threshold, as_policy, check_same_scores

_DECIMALS = 17
_WHOLE = 2**40
"""From here on a threshold is not rounded."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Accuracy and average cost at every distinct threshold, in ascending order.

    For regression, ``accuracy`` holds another measure, that ``measure`` names; higher is better, but for ``"mse"``.

    Attributes:
        thresholds: (T,) values of τ. At the first all samples leave at exit 0; at the last (and above) none does.
        accuracy: (T,) accuracy over all samples at each τ.
        cost: (T,) average MACs per sample at each τ, as a share of the unmodified backbone; never falls with τ.
        no_exit: the policy at which no sample leaves; those of the points differ from it in their thresholds.
        measure: what ``accuracy`` is.
        milliseconds: where costs are measured times instead of MACs, the time that a cost of 1 stands for; else None.
        timings: (K,) measured times of some devices and batches (:class:`~exitkit.evaluation.ExitTimes`).
        times: (K, T) average milliseconds of each at each τ.
    """

    thresholds: Array
    accuracy: Array
    cost: Array
    no_exit: ExitPolicy
    measure: str = "accuracy"
    milliseconds: float | None = None
    timings: tuple[ExitTimes, ...] = ()
    times: Array | None = None

    def timed(self, device: str | None = None, batch: int | None = None) -> Curve:
        """The same curve in measured time: costs are shares of the time to answer at the backbone.

        Args:
            device: its kind (``"cuda"``) or name; may be left out where one alone was measured.
            batch: how many samples are answered together; likewise.

        Raises:
            ArgumentError: nothing was measured for them, or several; the message says what was.
        """
        place = selected(self.timings, device, batch)
        assert self.times is not None
        whole = self.timings[place].milliseconds[-1]
        return replace(self, cost=self.times[place] / whole, milliseconds=whole, timings=(), times=None)

    def at_budget(
        self,
        budget: float | None = None,
        *,
        ms: float | None = None,
        device: str | None = None,
        batch: int | None = None,
    ) -> BudgetPoint:
        """The highest threshold whose average cost stays under ``budget``, a share of the backbone, or under ``ms``.

        Under is below, as in the papers' tables: a cost equal to the budget is over it.

        Args:
            budget: a share of the backbone's MACs; of its time on a curve of times.
            ms: milliseconds that a batch takes on average, as if a batch that samples left took proportionally less; the
                point's cost is then a share of the time to answer at the backbone.
            device: for ``ms``, as for :meth:`timed`.
            batch: for ``ms``, as for :meth:`timed`.

        Raises:
            ArgumentError: a budget that is not a positive number or is a percentage, or that even leaving at exit 0 does not
                stay under; a device or batch that was not measured.
        """
        if (budget is None) == (ms is None):
            raise ArgumentError(f"budget={budget!r}, ms={ms!r}: give one of them")
        if ms is None:
            if (device, batch) != (None, None):
                raise ArgumentError(
                    f"device={device!r}, batch={batch!r} are for ms=; shares of them: curve.timed(device, batch)"
                )
            return self._under(share_of_cost("budget", budget))
        limit = positive("ms", ms, "milliseconds that a batch may take on average")
        if self.milliseconds is None or (device, batch) != (None, None):
            return self.timed(device, batch).at_budget(ms=limit)
        return self._under(limit / self.milliseconds)

    def at_threshold(self, threshold: Threshold) -> BudgetPoint:
        """Accuracy and cost at any τ, or at a policy with one τ for all exits.

        Raises:
            ArgumentError: not a number, several thresholds (``outputs.at`` takes these), or a policy for other scores.
        """
        policy = as_policy(threshold, self.no_exit)
        check_same_scores(policy, self.no_exit)
        if len(set(policy.thresholds)) > 1:
            raise ArgumentError(
                f"threshold={policy.shown()} is one for each exit, a curve has one for all; use outputs.at"
            )
        index = max(int(np.searchsorted(self.thresholds, policy.thresholds[0], side="right")) - 1, 0)
        return replace(self._point(index), policy=policy)

    def best(self) -> BudgetPoint:
        """The highest accuracy (the least mean squared error) over all thresholds, at its lowest cost."""
        return self._point(int(self.accuracy.argmin() if self.measure == "mse" else self.accuracy.argmax()))

    def no_limit(self) -> BudgetPoint:
        """No sample leaves: what any τ above every score gives."""
        return self._point(len(self.thresholds) - 1)

    def auc(self, low: float | None = None, high: float = 1.0) -> float:
        """Average accuracy over all budgets from ``low`` (by default the cheapest point) to ``high``: the area, normalised.

        At each budget it is the accuracy of the highest τ whose cost stays under it, as in :meth:`at_budget`.

        Raises:
            ArgumentError: budgets that end before they begin, or begin below the cheapest point.
        """
        low = float(self.cost[0]) if low is None else low
        numbers = is_number(low) and is_number(high)
        # shares computed elsewhere may round otherwise
        if not numbers or not self.cost[0] <= low * (1 + 1e-12) < high:
            raise ArgumentError(
                f"low={low!r}, high={high!r}: budgets must rise, from {self.cost[0]:.3f} (leaving at the first exit) on"
            )
        widths = np.diff(np.clip(np.append(self.cost, np.inf), low, high))
        return float((widths * self.accuracy).sum() / (high - low))

    def budget_table(self, budgets: Sequence[float] = BUDGETS) -> BudgetTable:
        """The rows of the papers' tables: 25, 50, 75 and 100% of the unmodified backbone, and two readings of Max.

        Args:
            budgets: other shares of the backbone's cost.

        Raises:
            ArgumentError: a budget that is not a positive number, or is a percentage.
        """
        shares = [share_of_cost("budgets", budget) for budget in budgets]
        rows: dict[str, BudgetPoint | None] = {
            f"{100 * share:g}%": self.at_budget(share) if self.cost[0] < share else None for share in shares
        }
        return BudgetTable(rows | {"Max (no limit)": self.no_limit(), "Max (best τ)": self.best()}, self.measure)

    def plot(self, path: str | Path) -> None:
        """Write the picture of accuracy against cost to ``path`` (png, svg or pdf)."""
        plot_curves({"early exits": self}, path, self.measure)

    def short_threshold(self, index: int) -> float:
        """The τ with the fewest decimals from ``thresholds[index]`` up to, not including, the next: the same decisions."""
        low, high = float(self.thresholds[index]), float(np.append(self.thresholds, np.inf)[index + 1])
        if abs(low) < _WHOLE:
            for decimals in range(_DECIMALS):
                tau = float(Decimal(low).quantize(Decimal(1).scaleb(-decimals), ROUND_CEILING)) + 0.0  # no −0
                if low <= tau < high:
                    return tau
        return low

    def _under(self, budget: float) -> BudgetPoint:
        """The last point whose cost is below a share of the whole."""
        below = int(np.searchsorted(self.cost, budget, side="left")) - 1
        if below < 0:
            raise ArgumentError(
                f"budget={budget!r} cannot be kept: it is a share of the backbone's cost, and leaving at the first exit "
                f"already costs {self.cost[0]:.3f}"
            )
        return self._point(below)

    def _point(self, index: int) -> BudgetPoint:
        policy = self.no_exit.at(self.short_threshold(index))
        return BudgetPoint(policy, float(self.accuracy[index]), float(self.cost[index]))


def sweep(scores: NDArray[np.floating], values: NDArray[Any], prices: Array) -> tuple[Array, NDArray[Any], Array]:
    """Every distinct threshold in ascending order, and the sums over the samples there of ``values`` (N, M+1, …) and prices.

    A sample passes exit m exactly when τ reaches the running maximum of its scores (N, M) up to m, so each of the N·M
    running maxima is one event that moves one sample one exit further; sorted, their sums are the curve. Prices (K, M+1) are
    summed as they are, for the caller to divide once, so that no rounding pushes a cost over a budget.

    Returns:
        Thresholds (T,), sums (T, …) and spent (K, T).
    """
    samples, exits = scores.shape
    events = np.maximum.accumulate(scores.astype(np.float64), axis=1).ravel()
    order = np.argsort(events, kind="stable")
    events = events[order]
    last_of_value = np.append(np.flatnonzero(np.diff(events)), len(events) - 1)
    gained = np.diff(values, axis=1).reshape(samples * exits, *values.shape[2:])[order]
    spent = np.diff(prices)[:, order % exits]
    lowest = events[0]
    first = values[:, :1].sum(0)
    return (
        np.concatenate([[0.0 if lowest > 0 else np.nextafter(lowest, -np.inf)], events[last_of_value]]),
        np.concatenate([first, first + gained.cumsum(0)[last_of_value]]),
        prices[:, :1] * samples + np.pad(spent.cumsum(1)[:, last_of_value], ((0, 0), (1, 0))),
    )


def traced(
    scores: NDArray[np.floating],
    values: NDArray[Any],
    measured: Callable[[NDArray[Any]], Array],
    no_exit: ExitPolicy,
    costs: Array,
    whole: float,
    timings: tuple[ExitTimes, ...] = (),
) -> Curve:
    """The curve of samples with scores (N, M) and ``values`` (N, M+1, …), whose sums (T, …) ``measured`` makes a measure of.

    Costs (M+1,) are shares of ``whole``.
    """
    thresholds, sums, spent = sweep(scores, values, np.array([costs, *(one.milliseconds for one in timings)]))
    count = len(scores)
    cost = spent[0] / (count * whole)
    return Curve(thresholds, measured(sums), cost, no_exit, timings=timings, times=spent[1:] / count)
