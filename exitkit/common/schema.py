"""JSON files as they are declared: what one may hold is a dataclass, and is read, checked and written here.

Fields are checked by their annotations as arguments are (:mod:`exitkit.common.checks`); values may be nested dataclasses,
``tuple[X, ...]``, ``dict[str, X]`` and unions with None. Every field must be there, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from exitkit.common.checks import check, fits, hints_of, members_of
from exitkit.common.errors import ArgumentError, FileError

T = TypeVar("T")

MOST_BYTES = 256 * 2**20
"""Of a JSON file. What exitkit writes stays under a tenth of it."""

_DIGITS = 19
_SHOWN = 240


def parse_json(text: str | bytes) -> Any:
    """JSON without what it should not hold: NaN, infinity, whole numbers beyond 64 bits, half characters (lone surrogates).

    Raises:
        ValueError: one of these, no JSON, no UTF-8, or lists nested too deep to be read.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be encoded
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return value


def to_json(document: Any, indent: int | None = None) -> str:
    """JSON as :func:`parse_json` reads it; half characters become question marks.

    Raises:
        ArgumentError: NaN, infinity, or what JSON does not hold.
    """
    try:
        text = json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"this cannot be written as JSON: {error}") from error
    return text.encode("utf-8", "replace").decode("utf-8")


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file.

    Raises:
        FileError: no such file, too large a one, or no JSON; ``remedy`` ends the message.
    """
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {str(error)[:_SHOWN]}; {remedy}") from error


def build(kind: type[T], data: Any, source: str) -> T:
    """Plain data as the dataclass that declares it.

    Args:
        kind: a dataclass, or ``dict[str, …]`` or ``tuple[…]`` of such.
        data: what :func:`parse_json` gave.
        source: the file, for the message.

    Raises:
        FileError: missing or unknown keys, or a value of another kind; the message says where.
    """
    try:
        return cast("T", _made(kind, data, ""))
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise FileError(f"{source} is damaged: {str(error)[:_SHOWN]}") from error


def _made(kind: Any, value: Any, where: str) -> Any:
    members = members_of(kind)
    if len(members) > 1:
        return _member(members, value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        given = _fields(kind, value, where)
        try:
            return kind(**given)
        except ArgumentError as error:  # says which field, but not whose
            raise type(error)(f"{where}: {error}" if where else str(error)) from error
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        check(where, value, list | tuple)
        repeated = len(inner) == 2 and inner[1] is Ellipsis
        if not repeated and len(value) != len(inner):
            raise ArgumentError(f"{where} holds {len(value)} values, not {len(inner)}")
        kinds = inner[:1] * len(value) if repeated else inner
        return tuple(
            _made(one, item, f"{where}[{at}]") for at, (one, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        check(where or "the document", value, dict)
        return {key: _made(inner[1], item, _below(where, key)) for key, item in value.items()}
    if kind is not Any:
        check(where, value, kind)
    return float(value) if kind is float else value


def _member(members: tuple[Any, ...], value: Any, where: str) -> Any:
    """Of a union: a plain member that fits, or the one made of parts that a value of this form is for."""
    parts = [one for one in members if get_origin(one) in (tuple, dict) or is_dataclass(one)]
    plain = [one for one in members if one not in parts]
    if any(fits(value, one) for one in plain):
        return value
    if not parts:
        check(where, value, reduce(or_, plain))
    listed = isinstance(value, list | tuple)
    return _made(next((one for one in parts if (get_origin(one) is tuple) == listed), parts[0]), value, where)


def _fields(kind: Any, value: Any, where: str) -> dict[str, Any]:
    check(where or "the document", value, dict)
    given: Mapping[str, Any] = value
    declared = [field.name for field in fields(kind) if field.init]
    for name in (*given, *declared):
        if name not in declared or name not in given:
            state = "missing" if name in declared else "unknown"
            raise ArgumentError(f"{_below(where, name)[:80]!r} is {state}")
    hints = hints_of(kind)
    return {name: _made(hints[name], item, _below(where, name)) for name, item in given.items()}


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{text[:_DIGITS]}… is too large a whole number")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:_DIGITS]} is not a finite number")
    return number
