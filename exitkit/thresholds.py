"""A model's threshold: one τ, one for each exit, or one that was chosen with a guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from exitkit.errors import ExitkitError
from exitkit.evaluation.choose import ChosenThreshold

Threshold = float | Sequence[float] | ChosenThreshold


def numbers(threshold: Threshold, exits: int) -> tuple[float, ...]:
    """τ of each of ``exits`` exits.

    Raises:
        ExitkitError: another number of values, or one that is no number.
    """
    given: Any = threshold.threshold if isinstance(threshold, ChosenThreshold) else threshold
    try:
        values = [given] * exits if isinstance(given, Real | str) else list(given)
    except TypeError as error:
        raise ExitkitError(
            f"threshold={threshold!r} must be a number, one for each exit, or what exitkit.choose_threshold returned"
        ) from error
    if len(values) != exits:
        raise ExitkitError(f"threshold has {len(values)} values; give one τ, or one for each of the {exits} exits")
    for value in values:
        if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
            raise ExitkitError(f"threshold holds {value!r}; τ is a number")
    return tuple(float(value) for value in values)


def check_calibrated(threshold: Threshold, criterion: str, dtype: str) -> None:
    """Refuse a guarantee that was given for another score or precision.

    Raises:
        ExitkitError: the criterion or the dtype is not the one that was calibrated.
    """
    if not isinstance(threshold, ChosenThreshold):
        return
    for name, calibrated, used in (("criterion", threshold.criterion, criterion), ("dtype", threshold.dtype, dtype)):
        if calibrated != used:
            raise ExitkitError(
                f"threshold was chosen with {name} {calibrated!r}, but the engine uses {used!r}, for which nothing is "
                f"promised; use the same {name}, or choose a threshold on outputs collected with it (or pass "
                "threshold.threshold, without a guarantee)"
            )


def to_json(threshold: Threshold | None, exits: int) -> Any:
    """For JSON: a number, a list, or the chosen threshold's fields.

    Raises:
        ExitkitError: a threshold that is not finite, or of another number of values.
    """
    if threshold is None:
        return None
    taus = numbers(threshold, exits)
    if not all(map(math.isfinite, taus)):
        raise ExitkitError(f"threshold={threshold!r} must be finite: the τ above which a sample leaves")
    if isinstance(threshold, ChosenThreshold):
        return threshold.to_dict()
    return taus[0] if isinstance(threshold, Real) else list(taus)


def from_json(data: Any) -> Threshold | None:
    """The inverse of :func:`to_json`."""
    if isinstance(data, dict):
        return ChosenThreshold.from_dict(data)
    return tuple(data) if isinstance(data, list) else data


def fits_json(data: Any) -> bool:
    """Whether a value can be what :func:`to_json` gave."""
    if isinstance(data, dict):
        return "threshold" in data and fits_json(data["threshold"])
    if isinstance(data, list):
        return bool(data) and all(map(fits_json, data)) and None not in data
    return data is None or (isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data))
