"""Exits that do not pay: without them, and the cost of their heads, accuracy is no lower at any budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from exitkit.common.checks import Count, NonNegative, Positive, check, checked_each
from exitkit.common.errors import ArgumentError
from exitkit.evaluation.curve import Curve
from exitkit.evaluation.outputs import ExitOutputs, check_outputs
from exitkit.multi_exit.model import MultiExitModel


def head_macs(model: MultiExitModel) -> tuple[int, ...]:
    """(M,): MACs per sample that each exit adds to the backbone: its head, link and combiner."""
    spent = [0, *(exit_.macs - block.macs for exit_, block in zip(model.exits, model.boundaries, strict=False))]
    return tuple(after - before for before, after in pairwise(spent))


def exits_that_do_not_pay(
    outputs: ExitOutputs, heads: Sequence[float], budgets: Sequence[float] = (0.25, 0.5, 0.75)
) -> tuple[int, ...]:
    """The exits, by number, without which accuracy is no lower at any of the budgets.

    They are taken away one at a time, the one whose loss gains most first. Answers of the remaining exits are taken as they
    are, which is exact for methods without cascade and ensemble, and an approximation for the others.

    Args:
        outputs: of held-out samples with labels.
        heads: (M,) MACs that each exit adds (:func:`head_macs`).
        budgets: shares of the backbone's MACs; one that cannot be kept without an exit makes that exit pay.

    Raises:
        ArgumentError: another number of heads than exits, heads that cost more than their exits, no budgets or one that is
            not a positive number, or no labels.
    """
    check_outputs(outputs)
    exits = len(outputs.macs) - 1
    heads = checked_each("heads", heads, NonNegative, "the MACs of each exit's head")
    budgets = checked_each("budgets", budgets, Positive, "shares of the backbone's MACs")
    check("len(budgets)", len(budgets), Count)
    if len(heads) != exits:
        raise ArgumentError(f"heads={list(heads)!r} must hold {exits} costs in MACs, of each exit's head")
    left, idle = list(range(exits)), []
    while len(left) > 1:
        now = _accuracies(outputs.curve(), budgets)
        gains = [
            _accuracies(_without(outputs, place, heads[exit_]).curve(), budgets) - now
            for place, exit_ in enumerate(left)
        ]
        place = max(range(len(left)), key=lambda number: (gains[number].min() >= 0, gains[number].sum()))
        if gains[place].min() < 0:
            break
        outputs = _without(outputs, place, heads[left[place]])
        idle.append(left.pop(place))
    return tuple(sorted(idle))


def _without(outputs: ExitOutputs, place: int, head: float) -> ExitOutputs:
    kept = [m for m in range(len(outputs.macs)) if m != place]
    macs = outputs.macs.clone()
    macs[place + 1 :] -= head
    temperatures = None if outputs.temperatures is None else tuple(outputs.temperatures[m] for m in kept)
    return replace(
        outputs, log_probs=outputs.log_probs[:, kept], macs=macs[kept], temperatures=temperatures, timings=()
    )


def _accuracies(curve: Curve, budgets: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([curve.at_budget(budget).accuracy if curve.cost[0] < budget else 0.0 for budget in budgets])
