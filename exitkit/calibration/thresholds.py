"""A model's threshold: one τ, one for each exit, or one that was chosen with a guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from exitkit.calibration.risk_control import ChosenThreshold
from exitkit.common.errors import ArgumentError
from exitkit.methods.scaled import (
    Temperatures,
    check_temperatures,
    checked_temperatures,
    scaled,
    temperatures_of,
)

Threshold = float | Sequence[float] | ChosenThreshold
_SCALED = {"threshold", "temperatures"}


def numbers(threshold: Threshold, exits: int) -> tuple[float, ...]:
    """τ of each of ``exits`` exits.

    Raises:
        ExitkitError: another number of values, or one that is no number.
    """
    given: Any = threshold.threshold if isinstance(threshold, ChosenThreshold) else threshold
    try:
        values = [given] * exits if isinstance(given, Real | str) else list(given)
    except TypeError as error:
        raise ArgumentError(
            f"threshold={threshold!r} must be a number, one for each exit, or what exitkit.choose_threshold returned"
        ) from error
    if len(values) != exits:
        raise ArgumentError(f"threshold has {len(values)} values; give one τ, or one for each of the {exits} exits")
    for value in values:
        if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
            raise ArgumentError(f"threshold holds {value!r}; τ is a number")
    return tuple(float(value) for value in values)


def temperatures_for(threshold: Threshold, exits: int) -> Temperatures | None:
    """What to divide the logits of ``exits`` exits and the backbone by before they are scored; None for nothing.

    Raises:
        ExitkitError: temperatures of a model with another number of exits.
    """
    found = temperatures_of(threshold)
    return None if found is None else checked_temperatures(found, exits + 1)


def check_calibrated(threshold: Threshold, criterion: str, dtype: str, temperatures: Temperatures | None) -> None:
    """Refuse a threshold found with other temperatures, and a guarantee that was given for another score or precision.

    Raises:
        ExitkitError: the temperatures, the criterion or the dtype are not those that were calibrated.
    """
    check_temperatures(threshold, temperatures)
    if not isinstance(threshold, ChosenThreshold):
        return
    for name, calibrated, used in (
        ("criterion", threshold.criterion, criterion),
        ("dtype", threshold.dtype, dtype),
        ("temperatures", threshold.temperatures, temperatures),
    ):
        if calibrated != used:
            raise ArgumentError(
                f"threshold was chosen with {name} {calibrated!r}, but the engine uses {used!r}, for which nothing is "
                f"promised; use the same {name}, or choose a threshold on outputs collected with it (or pass "
                "threshold.threshold, without a guarantee)"
            )


def to_json(threshold: Threshold | None, exits: int) -> Any:
    """For JSON: a number, a list, these with their temperatures, or the chosen threshold's fields.

    Raises:
        ExitkitError: a threshold that is not finite, or of another number of values or temperatures.
    """
    if threshold is None:
        return None
    taus = numbers(threshold, exits)
    if not all(map(math.isfinite, taus)):
        raise ArgumentError(f"threshold={threshold!r} must be finite: the τ above which a sample leaves")
    temperatures = temperatures_for(threshold, exits)
    if isinstance(threshold, ChosenThreshold):
        return threshold.to_dict()
    plain = taus[0] if isinstance(threshold, Real) else list(taus)
    return plain if temperatures is None else {"threshold": plain, "temperatures": list(temperatures)}


def from_json(data: Any) -> Threshold | None:
    """The inverse of :func:`to_json`."""
    if isinstance(data, dict) and set(data) == _SCALED:
        threshold: Threshold = scaled(data["threshold"], tuple(data["temperatures"]))
        return threshold
    if isinstance(data, dict):
        return ChosenThreshold.from_dict(data)
    return tuple(data) if isinstance(data, list) else data


def fits_json(data: Any) -> bool:
    """Whether a value can be what :func:`to_json` gave."""
    if isinstance(data, dict):
        temperatures = data.get("temperatures")
        known = temperatures is None or (fits_json(temperatures) and isinstance(temperatures, list))
        return known and "threshold" in data and fits_json(data["threshold"])
    if isinstance(data, list):
        return bool(data) and all(map(fits_json, data)) and None not in data
    return data is None or (isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data))
