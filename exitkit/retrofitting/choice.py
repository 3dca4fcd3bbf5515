"""The choice: of all sets of exits, the one with the least expected cost whose risk stays within a limit. Exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from exitkit.evaluation.curve import sweep

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Answers:
    """What candidates said about the samples of the search, and what asking them costs.

    Attributes:
        scores: (N, K) how sure each candidate is.
        losses: (N, K+1) in [0, 1], what answering there loses; the backbone's last.
        places: (K,) the position of each candidate's boundary in the backbone, rising along it.
        until: (K,) cost of the backbone up to there, as a share of the whole.
        heads: (K,) cost of each head, likewise.
    """

    scores: Array
    losses: Array
    places: Sequence[int]
    until: Array
    heads: Array

    def costs(self, exits: Sequence[int]) -> Array:
        """(|exits|+1,) what answering at each of these exits costs, and at the backbone, heads passed included."""
        passed = self.heads[list(exits)].cumsum()
        return np.append(self.until[list(exits)] + passed, 1 + (passed[-1] if len(passed) else 0.0))


@dataclass(frozen=True)
class Choice:
    """A set of exits and its threshold.

    Attributes:
        exits: numbers of the candidates, in the order in which they run; none where the backbone answers everything.
        threshold: τ for all of them.
        cost: average cost on the samples of the search, as a share of the backbone.
        risk: average loss on them.
    """

    exits: tuple[int, ...]
    threshold: float
    cost: float
    risk: float


def cheapest(answers: Answers, limit: float, most: int = 3) -> Choice:
    """The best of all sets of at most ``most`` exits; the backbone alone where none saves anything.

    For each set every distinct τ is looked at, from the strictest on, up to the first whose risk is above ``limit``: the
    order in which :func:`exitkit.choose_threshold` tests them. Of equal costs the smaller set, then the earlier one.
    """
    return min(choices(answers, limit, most), key=lambda choice: choice.cost)


def choices(answers: Answers, limit: float, most: int = 3) -> Iterator[Choice]:
    """The best threshold of every set of at most ``most`` exits at different boundaries; first the backbone alone."""
    yield Choice((), float("inf"), 1.0, float(answers.losses[:, -1].mean()))
    order = sorted(range(len(answers.places)), key=lambda k: answers.places[k])
    for count in range(1, min(most, len(order)) + 1):
        for exits in combinations(order, count):
            if len({answers.places[k] for k in exits}) == count:
                yield at_limit(answers, exits, limit)


def cost_at_price(answers: Answers, candidate: int, price: float) -> float:
    """What one candidate alone costs at its best τ where a loss of 1 costs ``price`` backbones; those who stay pay its head.

    Unlike the cost within a limit it tells candidates apart that have not learned enough yet to keep the limit.
    """
    losses = answers.losses[:, [candidate, -1]]
    _, lost, spent = sweep(answers.scores[:, [candidate]], losses, answers.costs([candidate])[None])
    return float((spent[0] + price * lost).min() / len(losses))


def at_limit(answers: Answers, exits: tuple[int, ...], limit: float) -> Choice:
    """The cheapest τ of one set of exits."""
    columns = list(exits)
    return cheapest_threshold(
        answers.scores[:, columns], answers.losses[:, [*columns, -1]], answers.costs(exits), limit, exits
    )


def cheapest_threshold(scores: Array, losses: Array, costs: Array, limit: float, exits: tuple[int, ...]) -> Choice:
    """The last τ, from the strictest on, before the first whose risk is above ``limit``.

    Args:
        scores: (N, M) of the exits.
        losses: (N, M+1), the backbone's last.
        costs: (M+1,) of answering there.
        limit: the average loss that there may be.
        exits: what they are called in the result.
    """
    thresholds, lost, spent = sweep(scores, losses, costs[None])
    samples = len(losses)
    failing = np.flatnonzero(lost / samples > limit * (1 + 1e-12))
    row = int(failing[-1]) + 1 if len(failing) else 0
    row = min(row, len(thresholds) - 1)  # where not even the backbone's own losses stay within the limit
    return Choice(exits, float(thresholds[row]), float(spent[0, row] / samples), float(lost[row] / samples))
