"""Numbers that users give."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from exitkit.common.errors import ArgumentError


def numbers_in(given: Any) -> NDArray[np.float64]:
    """A sequence of real numbers as an array; an empty one for anything else: texts, booleans, nested or single values."""
    try:
        values = np.asarray(given)
    except (TypeError, ValueError):
        return np.empty(0)
    return values.astype(np.float64) if values.ndim == 1 and values.dtype.kind in "iuf" else np.empty(0)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number: no text, no boolean, not NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def positive(name: str, value: Any, meaning: str) -> float:
    """A number above 0.

    Raises:
        ExitkitError: anything else; NaN too.
    """
    if not is_number(value) or value <= 0:
        raise ArgumentError(f"{name}={value!r} must be a number above 0: {meaning}")
    return float(value)
