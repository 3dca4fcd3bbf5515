"""Checks of arguments: what is allowed is declared beside the name, as a type and its bounds, and checked here.

``check("epochs", epochs, Count)`` checks one argument; :func:`check_fields` checks every field of
a dataclass by its annotation::

    lr: Positive = 1e-3
    log: Literal["csv", "tensorboard"] = "csv"
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from exitkit.common.errors import ArgumentError, unknown_name


@dataclass(frozen=True)
class Bounds:
    """What a number may be: above and below are excluded, least and most included. Infinity is never allowed."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        if self.above is not None and self.below is not None:
            return f"between {self.above:g} and {self.below:g}, both excluded"
        words = {"above": "greater than", "least": "at least", "below": "below", "most": "at most"}
        said = [f"{word} {limit:g}" for name, word in words.items() if (limit := getattr(self, name)) is not None]
        return " and ".join(said)


Count = Annotated[int, Bounds(least=1)]
Index = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(above=0, below=1)]
PATH: Any = str | PathLike
"""The name of a file or folder."""


def check(name: str, value: Any, kind: Any, remedy: str = "") -> None:
    """Refuse a value that is not of the declared kind.

    Args:
        name: the argument, as the user wrote it.
        value: what was given.
        kind: ``bool``, ``str``, ``int``, ``float`` (whole numbers too, no NaN), these with :class:`Bounds` in ``Annotated``, a
            ``Literal``, any class, or a union of such. Anything else (callables, sequences) is not checked.
        remedy: what to do instead, added to the message.

    Raises:
        ArgumentError: the name, the value, what is allowed, and the remedy.
    """
    names = [name for one in members_of(kind) if get_origin(one) is Literal for name in get_args(one)]
    if _is_one_of(value, kind):
        return
    if names and all(isinstance(one, str) for one in names) and isinstance(value, str):
        raise unknown_name(name, value, names, f"{remedy[0].upper()}{remedy[1:]}." if remedy else "")
    raise ArgumentError(f"{name}={value!r} must be {_allowed(kind)}{_after(remedy)}")


def checked_each(name: str, values: Any, kind: Any, remedy: str = "") -> tuple[Any, ...]:
    """Several values, or none, each of the declared kind; arguments are those of :func:`check`.

    Raises:
        ArgumentError: a single value, a text, or one among them that does not fit.
    """
    try:
        given = None if isinstance(values, str | bytes) else tuple(values)
    except TypeError:
        given = None
    if given is None or not all(_is_one_of(value, kind) for value in given):
        raise ArgumentError(f"{name}={values!r} must be a list, each {_allowed(kind)}{_after(remedy)}")
    return given


def check_fields(owner: Any, prefix: str = "") -> None:
    """:func:`check` every field of a dataclass by its annotation; ``prefix`` stands before the names in messages.

    Raises:
        ArgumentError: as :func:`check`, for the first field that does not fit.
    """
    hints = hints_of(type(owner))  # type: ignore[arg-type]  # mypy: a type is hashable
    for field in fields(owner):
        if field.init and field.name in hints:
            check(f"{prefix}{field.name}", getattr(owner, field.name), hints[field.name])


@cache
def hints_of(kind: type[Any]) -> dict[str, Any]:
    """The annotations of a class, bounds included."""
    return get_type_hints(kind, include_extras=True)


def members_of(kind: Any) -> tuple[Any, ...]:
    """Of a union its members, those of inner unions too; anything else alone."""
    if get_origin(kind) in (Union, UnionType):
        return tuple(inner for member in get_args(kind) for inner in members_of(member))
    return (kind,)


def _is_one_of(value: Any, kind: Any) -> bool:
    return any(fits(value, one) for one in members_of(kind))


def _allowed(kind: Any) -> str:
    return " or ".join(dict.fromkeys(_words(one) for one in members_of(kind)))


def _after(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind that :func:`check` knows; no union."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, *bounds = get_args(kind)
        return fits(value, base) and all(value in bound for bound in bounds if isinstance(bound, Bounds))
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if kind in (int, float):
        wanted = Integral if kind is int else Real
        return isinstance(value, wanted) and not isinstance(value, bool | np.bool_) and _is_representable(value)
    if kind in (None, NoneType):
        return value is None
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_representable(value: Any) -> bool:
    """Whether it is a number in double precision: not NaN, and not 10**400."""
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


def _words(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        base, *bounds = get_args(kind)
        return " ".join([_words(base), *(str(bound) for bound in bounds if isinstance(bound, Bounds))])
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    known = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a text",
        NoneType: "None",
        None: "None",
    }
    return known.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def numbers_in(given: Any) -> NDArray[np.float64]:
    """A sequence of real numbers as an array; an empty one for anything else: texts, booleans, nested or single values."""
    try:
        values = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor that needs a gradient
        return np.empty(0)
    return values.astype(np.float64) if values.ndim == 1 and values.dtype.kind in "iuf" else np.empty(0)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number: no text, no boolean, not NaN."""
    return fits(value, float)


def is_count(value: object) -> bool:
    """Whether a value is a whole number greater than 0."""
    return fits(value, Count)


def positive(name: str, value: Any, meaning: str) -> float:
    """A number above 0, infinity too.

    Raises:
        ArgumentError: anything else; NaN too. ``meaning`` ends the message.
    """
    if not is_number(value) or value <= 0:
        raise ArgumentError(f"{name}={value!r} must be a number above 0: {meaning}")
    return float(value)
