"""``[[trainer.phase]]`` of a recipe: phases by words, for models whose exits are counted only when they are attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from exitkit.common.checks import check, hints_of
from exitkit.common.errors import ArgumentError, ExitkitError, unknown_name
from exitkit.training import Phase

KEYS = [field.name for field in fields(Phase)]
EXITS = ("all", "internal", "backbone")
"""All exits, those that were attached, or the backbone's own classifier alone."""
_NUMBERS = ("share", "lr", "backbone_lr")


def check_phases(tables: Any, trainer: Mapping[str, Any]) -> None:
    """Refuse what is wrong whatever the model.

    Raises:
        ArgumentError: no list of tables, a regime beside them, an unknown key or word, a share or rate that is not above 0,
            or a phase in which nothing learns.
    """
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ArgumentError(f"trainer.phase = {tables!r} must be tables: [[trainer.phase]] above the keys of each")
    if "regime" in trainer:
        raise ArgumentError(
            f"trainer.regime = {trainer['regime']!r} and [[trainer.phase]] both say what learns; leave one of them out"
        )
    for number, table in enumerate(tables, 1):
        where = f"trainer.phase {number}"
        if unknown := next((key for key in table if key not in KEYS), None):
            raise unknown_name(f"{where}: key", unknown, KEYS)
        if "exits" not in table:
            raise ArgumentError(
                f"{where} trains nothing: it has no exits; give {', '.join(map(repr, EXITS))}, or numbers from 0"
            )
        for key, words in (("exits", EXITS), ("alternate", EXITS), ("stages", ("all",))):
            value = table.get(key)
            if isinstance(value, str) and value not in words:
                raise unknown_name(f"{where}: {key}", value, words, "Or give numbers, such as [0, 1].")
            if value is not None and not isinstance(value, str | list):
                raise ArgumentError(f"{where}: {key} = {value!r} must be {' or '.join(words)}, or a list of numbers")
        for key in _NUMBERS:
            if key in table:
                check(f"{where}: {key}", table[key], hints_of(Phase)[key])


def phases(tables: Sequence[Mapping[str, Any]], last: int) -> tuple[Phase, ...]:
    """The phases of a model whose backbone is exit ``last``.

    Raises:
        ArgumentError: numbers that are none.
    """
    return tuple(_phase(table, last, number) for number, table in enumerate(tables, 1))


def _phase(table: Mapping[str, Any], last: int, number: int) -> Phase:
    words = {"all": range(last + 1), "internal": range(last), "backbone": (last,)}
    values = dict(table)
    for key in ("exits", "stages", "alternate"):
        value = values.get(key)
        if value is not None:
            values[key] = tuple(words[value]) if isinstance(value, str) else tuple(value)
    try:
        return Phase(**values)
    except ExitkitError as error:
        raise ArgumentError(f"trainer.phase {number}: {error}") from error
