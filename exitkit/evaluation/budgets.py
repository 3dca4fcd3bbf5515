"""Budgets, shares of the backbone's cost, and the operating points that keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exitkit.common.checks import positive
from exitkit.common.errors import ArgumentError
from exitkit.methods.policy import ExitPolicy

BUDGETS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class BudgetPoint:
    """An operating point: a policy, and the accuracy and average cost (share of the backbone) that it gives.

    Whatever takes a threshold (:func:`exitkit.compile`, ``export``, ``outputs.at``) takes the point itself.
    """

    policy: ExitPolicy
    accuracy: float
    cost: float

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """τ, or one for each exit; see :attr:`ExitPolicy.threshold`."""
        return self.policy.threshold

    def to_dict(self) -> dict[str, Any]:
        """Threshold, accuracy and cost, as values that JSON holds."""
        taus = self.policy.thresholds
        return {
            "threshold": taus[0] if len(set(taus)) == 1 else list(taus),
            "accuracy": self.accuracy,
            "cost": self.cost,
        }


@dataclass(frozen=True)
class BudgetTable:
    """Rows by name; None where even the first exit is over the budget. Prints as a small text table."""

    rows: dict[str, BudgetPoint | None]
    measure: str = "accuracy"

    def __str__(self) -> str:
        width = max([9, *(len(point.policy.shown()) for point in self.rows.values() if point is not None)]) + 2
        wide = max(9, len(self.measure) + 1)
        lines = [f"{'budget':<15}{self.measure:>{wide}}{'cost':>9}{'τ':>{width}}"]
        for name, point in self.rows.items():
            if point is None:
                lines.append(f"{name:<15}{'-':>{wide}}{'-':>9}{'-':>{width}}")
            else:
                reached = f"{point.accuracy:.4f}" if self.measure == "mse" else f"{point.accuracy:.2%}"
                lines.append(f"{name:<15}{reached:>{wide}}{point.cost:>9.1%}{point.policy.shown():>{width}}")
        return "\n".join(lines)


class ExitChoice(NamedTuple):
    """One exit for all samples, its accuracy, and its cost as a share of the backbone."""

    exit: int
    accuracy: float
    cost: float


def share_of_cost(name: str, budget: Any) -> float:
    """A budget: a positive share of the backbone's cost, or infinity.

    Raises:
        ArgumentError: anything else; what is above 10 and up to 100 is a percentage.
    """
    share = positive(name, budget, "a share of the backbone's cost, such as 0.5")
    if 10 < share <= 100:
        raise ArgumentError(
            f"{name}={budget!r} would be {share:g} times the backbone's cost; budgets are shares of it: {share / 100:g} for "
            f"{share:g}%"
        )
    return share


def best_within(costs: NDArray[np.float64], accuracy: NDArray[np.float64], budget: float) -> ExitChoice:
    """The most accurate exit whose cost (M+1,) is under the budget; see :meth:`exitkit.ExitOutputs.best_exit`.

    Raises:
        ArgumentError: as :func:`share_of_cost`, or no exit costs so little.
    """
    budget = share_of_cost("budget", budget)
    within = costs < budget
    if not within.any():
        raise ArgumentError(
            f"budget={budget!r} cannot be kept: it is a share of the backbone's cost, and exit 0 already costs "
            f"{costs[0]:.3f}"
        )
    exit_ = int(np.where(within, accuracy, -1).argmax())
    return ExitChoice(exit_, float(accuracy[exit_]), float(costs[exit_]))
