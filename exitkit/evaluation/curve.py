"""Accuracy against cost, exactly: one point for every threshold at which anything changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exitkit.errors import ExitkitError
from exitkit.evaluation.plots import Array, plot_curves

BUDGETS = (0.25, 0.5, 0.75, 1.0)


class BudgetPoint(NamedTuple):
    """A threshold, and the accuracy and average cost (share of the backbone) it gives."""

    threshold: float
    accuracy: float
    cost: float


@dataclass(frozen=True, eq=False)
class Curve:
    """Accuracy and average cost at every distinct threshold, in ascending order.

    For regression, ``accuracy`` holds another measure, higher is better, that ``measure`` names.

    Attributes:
        thresholds: (T,) values of τ. At the first everybody leaves at exit 0; at the last (and above) nobody leaves.
        accuracy: (T,) accuracy over all samples at each τ.
        cost: (T,) average MACs per sample at each τ, as a share of the unmodified backbone; never falls with τ.
        measure: what ``accuracy`` is.
        milliseconds: where costs are measured times instead of MACs, the time that a cost of 1 stands for; else None.
    """

    thresholds: Array
    accuracy: Array
    cost: Array
    measure: str = "accuracy"
    milliseconds: float | None = None

    @classmethod
    def of(cls, scores: NDArray[np.floating], correct: NDArray[np.bool_], macs: Array, backbone_macs: float) -> Curve:
        """The curve from scores (N, M) of the exits, and correctness (N, M+1) and MACs (M+1,) of exits and backbone."""
        thresholds, right, cost = sweep(scores, correct.astype(np.int64), macs, backbone_macs)
        return cls(thresholds, right / len(scores), cost)

    def at_budget(self, budget: float | None = None, *, ms: float | None = None) -> BudgetPoint:
        """The highest threshold whose average cost stays under ``budget``, a share of the backbone, or under ``ms``.

        Raises:
            ExitkitError: a budget that even leaving at exit 0 does not stay under, or milliseconds on a curve of MACs.
        """
        if (budget is None) == (ms is None) or (ms is not None and self.milliseconds is None):
            raise ExitkitError(
                f"budget={budget!r}, ms={ms!r}: give one of them, and ms only to a curve of measured times, "
                "outputs.curve(milliseconds=[...])"
            )
        if ms is not None and self.milliseconds is not None:
            budget = ms / self.milliseconds
        assert budget is not None
        below = int(np.searchsorted(self.cost, budget, side="left")) - 1
        if not budget > 0 or below < 0:
            raise ExitkitError(
                f"budget={budget!r} cannot be kept: it is a share of the backbone's cost, and leaving at the first exit "
                f"already costs {self.cost[0]:.3f}"
            )
        return self._point(below)

    def at_threshold(self, threshold: float) -> BudgetPoint:
        """Accuracy and cost at any τ."""
        index = max(int(np.searchsorted(self.thresholds, threshold, side="right")) - 1, 0)
        return self._point(index)._replace(threshold=threshold)

    def best(self) -> BudgetPoint:
        """The highest accuracy over all thresholds, at its lowest cost."""
        return self._point(int(self.accuracy.argmax()))

    def no_limit(self) -> BudgetPoint:
        """Nobody leaves: what any τ above every score gives."""
        return self._point(len(self.thresholds) - 1)

    def auc(self, low: float | None = None, high: float = 1.0) -> float:
        """Average accuracy over all budgets from ``low`` (by default the cheapest point) to ``high``: the area, normalised.

        At each budget it is the accuracy of the highest τ whose cost stays under it, as in :meth:`at_budget`.

        Raises:
            ExitkitError: budgets that end before they begin, or begin below the cheapest point.
        """
        low = float(self.cost[0]) if low is None else low
        if not self.cost[0] <= low * (1 + 1e-12) < high:  # shares computed elsewhere may round otherwise
            raise ExitkitError(
                f"low={low!r}, high={high!r}: budgets must rise, from {self.cost[0]:.3f} (leaving at the first exit) on"
            )
        widths = np.diff(np.clip(np.append(self.cost, np.inf), low, high))
        return float((widths * self.accuracy).sum() / (high - low))

    def budget_table(self) -> BudgetTable:
        """The rows of the papers' tables: 25, 50, 75 and 100% of the unmodified backbone, and two readings of Max."""
        rows: dict[str, BudgetPoint | None] = {
            f"{budget:.0%}": self.at_budget(budget) if self.cost[0] < budget else None for budget in BUDGETS
        }
        return BudgetTable(rows | {"Max (no limit)": self.no_limit(), "Max (best τ)": self.best()}, self.measure)

    def plot(self, path: str | Path) -> None:
        """Write the picture of accuracy against cost to ``path`` (png, svg or pdf)."""
        plot_curves({"early exits": self}, path, self.measure)

    def _point(self, index: int) -> BudgetPoint:
        return BudgetPoint(float(self.thresholds[index]), float(self.accuracy[index]), float(self.cost[index]))


def sweep(
    scores: NDArray[np.floating], values: NDArray[Any], macs: Array, backbone_macs: float
) -> tuple[Array, NDArray[Any], Array]:
    """Every distinct threshold in ascending order, the sum of ``values`` (N, M+1, …) over the samples there, and the cost.

    A sample passes exit m exactly when τ reaches the running maximum of its scores (N, M) up to m, so each of the N·M
    running maxima is one event that moves one sample one exit further; sorted, their sums are the curve. MACs are
    summed as they are and divided once, so that no rounding pushes a cost over a budget.
    """
    samples, exits = scores.shape
    events = np.maximum.accumulate(scores.astype(np.float64), axis=1).ravel()
    order = np.argsort(events, kind="stable")
    events = events[order]
    last_of_value = np.append(np.flatnonzero(np.diff(events)), len(events) - 1)
    gained = np.diff(values, axis=1).reshape(samples * exits, *values.shape[2:])[order]
    spent = np.broadcast_to(np.diff(macs), (samples, exits)).ravel()[order]
    lowest = events[0]
    first = values[:, :1].sum(0)
    return (
        np.concatenate([[0.0 if lowest > 0 else np.nextafter(lowest, -np.inf)], events[last_of_value]]),
        np.concatenate([first, first + gained.cumsum(0)[last_of_value]]),
        (macs[0] * samples + np.concatenate([[0.0], spent.cumsum()[last_of_value]])) / (samples * backbone_macs),
    )


@dataclass(frozen=True)
class BudgetTable:
    """Rows by name; None where even the first exit is over the budget. Prints as a small text table."""

    rows: dict[str, BudgetPoint | None]
    measure: str = "accuracy"

    def __str__(self) -> str:
        lines = [f"{'budget':<15}{self.measure:>9}{'cost':>9}{'τ':>11}"]
        for name, point in self.rows.items():
            if point is None:
                lines.append(f"{name:<15}{'-':>9}{'-':>9}{'-':>11}")
            else:
                threshold = f"{point.threshold:.6f}" if abs(point.threshold) < 1e6 else f"{point.threshold:.2e}"
                lines.append(f"{name:<15}{point.accuracy:>9.2%}{point.cost:>9.1%}{threshold:>11}")
        return "\n".join(lines)
