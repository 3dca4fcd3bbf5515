"""A τ for scores after temperatures: it knows them, so that whatever compares scores with it applies the same or refuses."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, Self

import numpy as np

from exitkit.common.checks import numbers_in
from exitkit.common.errors import ArgumentError

Temperatures = tuple[float, ...]


class ScaledThreshold(float):
    """τ for the scores of exits whose logits were divided by temperatures: a number like any other, and theirs.

    Curves of ``outputs.calibrated(temperatures)`` and :func:`exitkit.choose_threshold` on them return it; the engine then
    divides by the same temperatures before it scores.

    Attributes:
        temperatures: (M+1,) of each exit, the backbone's last.

    Raises:
        ExitkitError: a temperature that is no positive number.
    """

    temperatures: Temperatures

    def __new__(cls, threshold: float, temperatures: Sequence[float]) -> Self:
        made = super().__new__(cls, threshold)
        made.temperatures = checked_temperatures(temperatures)
        return made

    def __getnewargs__(self) -> tuple[float, Temperatures]:  # type: ignore[override]  # for copies and pickles
        return float(self), self.temperatures

    def __repr__(self) -> str:
        return f"ScaledThreshold({float(self)!r}, temperatures={list(self.temperatures)!r})"

    __str__ = float.__repr__


def checked_temperatures(given: Any, count: int | None = None) -> Temperatures:
    """As floats.

    Raises:
        ExitkitError: one that is no positive number, or another number of them than ``count``.
    """
    values = numbers_in(given)
    if len(values) != (count or len(values)) or not len(values) or not ((values > 0) & np.isfinite(values)).all():
        wanted = "" if count is None else f"{count} "
        raise ArgumentError(
            f"temperatures={given!r} must be {wanted}positive numbers, one per exit and the backbone's last, as "
            "exitkit.evaluation.fit_temperatures(outputs) returns them"
        )
    return tuple(values.tolist())


def scaled(threshold: float | Sequence[float], temperatures: Temperatures | None) -> Any:
    """One τ or one per exit, with its temperatures where there are any."""
    if temperatures is None:
        return threshold
    if isinstance(threshold, Real):
        return ScaledThreshold(float(threshold), temperatures)
    return tuple(ScaledThreshold(tau, temperatures) for tau in threshold)  # type: ignore[union-attr]


def temperatures_of(threshold: Any) -> Temperatures | None:
    """The temperatures that a threshold, one per exit or a chosen one was found with; None for plain numbers.

    Raises:
        ExitkitError: values for several temperatures, or for some and for none.
    """
    if hasattr(threshold, "temperatures") or not isinstance(threshold, Sequence) or isinstance(threshold, str):
        found: Temperatures | None = getattr(threshold, "temperatures", None)
        return found
    each = {getattr(tau, "temperatures", None) for tau in threshold}
    if len(each) > 1:
        raise ArgumentError(
            f"threshold={list(threshold)!r} mixes values found with temperatures and values found with others or none; "
            "find all of them on the same outputs, or write exitkit.evaluation.ScaledThreshold(tau, temperatures)"
        )
    return each.pop() if each else None


def check_temperatures(threshold: Any, used: Temperatures | None) -> None:
    """Refuse a threshold found with other temperatures than the scores have; a plain number is taken as it is.

    Raises:
        ExitkitError: temperatures that differ.
    """
    found = temperatures_of(threshold)
    if found is not None and found != used:
        raise ArgumentError(
            f"threshold was found with temperatures={list(found)}, but these scores "
            f"{'have none' if used is None else f'have temperatures={list(used)}'}: use outputs.calibrated(temperatures) with "
            "the same, or an engine compiled with this threshold"
        )
