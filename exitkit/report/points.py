"""The thresholds that a report's slider stops at, and what is exactly true at each of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exitkit.evaluation import Curve, ExitOutputs
from exitkit.evaluation.budgets import BUDGETS

POINTS = 300
"""About as many as a screen can tell apart."""
MATRIX = 12
"""Up to so many classes the whole confusion matrix is shown; with more, the most frequent mistakes."""
_MISTAKES = 12

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Points:
    """A method at K thresholds of its exact curve, in ascending order.

    Attributes:
        curve: at these thresholds alone; where it starts at a chosen τ, that is the threshold shown.
        exits: (K, M+1) how many samples leave at each exit.
        right: (K,) how many are answered correctly.
        confusion: per threshold, for up to 12 classes the counts of (label, answer), row by row; for more, the 12 most
            frequent mistakes, ``[label, answer, count]``.
        passes: (N, M) per sample and exit, from which of the K thresholds on it does not leave there; K for never.
        start: the place where the slider starts: the chosen threshold, else half of the backbone's MACs, else the last.
    """

    curve: Curve
    exits: Ints
    right: Ints
    confusion: list[list[int]] | list[list[list[int]]]
    passes: Ints
    start: int


def points_of(outputs: ExitOutputs, chosen: float | None = None, most: int = POINTS) -> Points:
    """Thin the exact curve of ``outputs`` to about ``most`` thresholds, evenly spread over the cost.

    Kept in any case: the first and last, the most accurate, those of the papers' budgets and that of ``chosen``, a τ.

    Raises:
        ArgumentError: no labels.
    """
    whole = outputs.curve()
    kept = _kept(whole, chosen, most)
    taus = np.array([whole.short_threshold(place) for place in kept])
    curve = Curve(taus, whole.accuracy[kept], whole.cost[kept], whole.no_exit)
    highest = np.maximum.accumulate(outputs.scores()[:, :-1].numpy(), axis=1)
    passes = np.searchsorted(curve.thresholds, highest, side="left")
    exits = np.stack([(passes <= place).sum(1) for place in range(len(kept))])
    answers = outputs.answers.numpy()
    given = answers[np.arange(len(outputs)), exits]
    start = _start(curve, chosen)
    if chosen is not None:
        curve.thresholds[start] = chosen  # nothing changes between it and the point's own
    assert outputs.labels is not None
    labels, classes = outputs.labels.numpy(), outputs.log_probs.shape[2]
    return Points(
        curve,
        np.stack([np.bincount(row, minlength=len(outputs.macs)) for row in exits]),
        (given == labels).sum(1),
        _matrices(labels, given, classes) if classes <= MATRIX else [_mistakes(labels, row, classes) for row in given],
        passes,
        start,
    )


def _kept(curve: Curve, chosen: float | None, most: int) -> Ints:
    spread = np.linspace(curve.cost[0], curve.cost[-1], most)
    marked = [0, len(curve.cost) - 1, int(curve.accuracy.argmax()), *(_under(curve, budget) for budget in BUDGETS)]
    if chosen is not None:
        marked.append(_at(curve, chosen))
    places: Ints = np.unique([*(np.searchsorted(curve.cost, spread, side="right") - 1), *marked])
    return places[places >= 0]


def _start(curve: Curve, chosen: float | None) -> int:
    half = _under(curve, 0.5) if chosen is None else _at(curve, chosen)
    return half if half >= 0 else len(curve.cost) - 1


def _under(curve: Curve, budget: float) -> int:
    """As :meth:`Curve.at_budget`; −1 where the budget cannot be kept."""
    return int(np.searchsorted(curve.cost, budget, side="left")) - 1


def _at(curve: Curve, threshold: float) -> int:
    """As :meth:`Curve.at_threshold`."""
    return max(int(np.searchsorted(curve.thresholds, threshold, side="right")) - 1, 0)


def _matrices(labels: Ints, given: Ints, classes: int) -> list[list[int]]:
    return [np.bincount(labels * classes + row, minlength=classes**2).tolist() for row in given]


def _mistakes(labels: Ints, answers: Ints, classes: int) -> list[list[int]]:
    wrong = answers != labels
    pairs, counts = np.unique(labels[wrong] * classes + answers[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MISTAKES]
    return [[int(pairs[i] // classes), int(pairs[i] % classes), int(counts[i])] for i in order]
