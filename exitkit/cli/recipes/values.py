"""Values of a recipe's tables: of the right type, and made into what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args

from exitkit.common.errors import ArgumentError, ExitkitError


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the annotated type."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    plain = tuple(getattr(kind, "__origin__", kind) for kind in kinds)
    wanted = (*plain, int) if float in plain else plain
    if (isinstance(value, bool) and bool not in plain) or not isinstance(value, wanted):
        words = {
            bool: "true or false",
            str: "a string",
            int: "a whole number",
            float: "a number",
            list: "a list",
            dict: "a table",
        }
        raise ArgumentError(
            f"{name} = {value!r} must be {' or '.join(words[kind] for kind in plain if kind in words)}"
        )


def plain_distillation(distillation: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has neither None nor whole numbers as keys: a limit of 0 is none, and teachers by exit are named by digits."""
    options = dict(distillation)
    if options.get("confidence_limit") == 0:
        options["confidence_limit"] = None
    if isinstance(teachers := options.get("teachers"), dict):
        if wrong := [exit_ for exit_ in teachers if not exit_.isdecimal()]:
            raise ArgumentError(
                f"loss.distillation.teachers has the key {wrong[0]!r}; exits are named by their numbers, such as 0 = [3]"
            )
        options["teachers"] = {int(exit_): those for exit_, those in teachers.items()}
    return options


def made(table: str, make: Any, options: Mapping[str, Any]) -> Any:
    """What ``make`` makes of a table's values; a complaint of the library's is told as one about the table."""
    try:
        return make(**options)
    except ExitkitError as error:
        raise ArgumentError(f"{table}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{table} = {dict(options)!r}: {error}") from error
