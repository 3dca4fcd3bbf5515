"""The tables as they are kept: one file a paper, below ``papers/``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, reduce
from importlib.resources import files
from typing import Any, Literal

from exitkit.common.errors import ArgumentError, unknown_name

Measure = Literal["budgets", "mse", "budget-mode", "anytime-mode", "milliseconds", "budget-milliseconds"]
"""Accuracy (or MSE) under shares of the backbone's MACs; top-k accuracy of the first exits alone, or of their mean; times, of
the exits in turn or of one without those before it."""


@dataclass(frozen=True)
class Row:
    """A setting of a table.

    Attributes:
        name: as in the paper.
        recipe: what is trained.
        backbone: what is trained before, for its weights; None where the recipe begins from what its model is.
        published: the paper's numbers, one for each column; empty where it has a figure alone.
        deviation: of each; empty where the paper has none.
        criterion: the score by which samples leave, where it is not the method's.
        cpu: changes to its recipe for the scale ``cpu``, after those of the table; to its backbone's too, where these are not
            of exits, and after them those under ``backbone``.
        measure: what its numbers are, where not what the table's are.
    """

    name: str
    recipe: dict[str, Any]
    backbone: dict[str, Any] | None = None
    published: tuple[float | None, ...] = ()
    deviation: tuple[float | None, ...] = ()
    criterion: str | None = None
    cpu: dict[str, Any] = field(default_factory=dict)
    measure: Measure | None = None


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        paper: the name of its paper.
        name: its number there; ``figure-7`` where it is a figure.
        title: what it is about.
        measure: what its numbers are.
        columns: headings: percentages of the backbone's MACs, ``max``, ``unlimited``, or exits.
        seeds: how many runs of each setting the paper has.
        spread: what the paper prints beside its means.
        needs: data and weights, in words.
        gpu_hours: at full scale, of one GPU, estimated.
        rows: its settings.
        cpu: changes to every recipe for the scale ``cpu``; None where that has no row.
        cpu_rows: the names of those that ``cpu`` runs; all by default.
        top: an answer is right among so many; ``cpu_top`` at that scale.
        note: what differs from the paper, and what the numbers are compared with.
    """

    paper: str
    name: str
    title: str
    measure: Measure
    columns: tuple[int | str, ...]
    seeds: int
    needs: str
    gpu_hours: float
    rows: tuple[Row, ...]
    spread: str = "standard deviation"
    cpu: dict[str, Any] | None = None
    cpu_rows: tuple[str, ...] | None = None
    top: int = 1
    cpu_top: int = 1
    note: str = ""


@dataclass(frozen=True)
class Paper:
    """A paper and its tables by name.

    Attributes:
        elsewhere: its other tables and figures of the same settings (deviations, curves), each with the name of the table that
            has them here.
    """

    name: str
    title: str
    tables: dict[str, Table] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)


@cache
def papers() -> dict[str, Paper]:
    """All papers by name."""
    folder = files("exitkit.reproduction") / "papers"
    read = [tomllib.loads(path.read_text("utf-8")) for path in folder.iterdir() if path.name.endswith(".toml")]
    found = [_paper(document) for document in sorted(read, key=lambda document: document["year"])]
    return {paper.name: paper for paper in found}


def find_table(paper: str, table: str) -> Table:
    """A table by its paper's name and its number, which may be written ``C.1``, ``c1`` or ``"table C.1"``.

    Raises:
        ArgumentError: there is none, and near matches are named; or its numbers stand in another.
    """
    known = papers()
    if paper not in known:
        raise unknown_name("PAPER", paper, known)
    tables = {_plain(name): one for name, one in known[paper].tables.items()}
    elsewhere = {_plain(name): place for name, place in known[paper].elsewhere.items()}
    wanted = _plain(table)
    if wanted in elsewhere:
        place = elsewhere[wanted]
        raise ArgumentError(
            f"TABLE of {paper}={table!r} is of the same settings as {place!r}, where it stands here; give {place}"
        )
    if wanted not in tables:
        raise unknown_name(f"TABLE of {paper}", table, known[paper].tables, shown=len(tables))
    return tables[wanted]


def _plain(name: str) -> str:
    """A table's name without what may be written otherwise."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("table").removeprefix("t")
    return re.sub(r"^fig(?=\d)", "figure", plain)


def merged(changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested tables put together, later values in the place of earlier ones."""
    return reduce(_over, changes, {})


def _over(values: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _over(result[key], value) if both else deepcopy(value)
    return result


def _paper(document: dict[str, Any]) -> Paper:
    parts = document["parts"]
    made = {name: _table(document["name"], name, table, parts) for name, table in document["tables"].items()}
    return Paper(document["name"], document["title"], made, document["elsewhere"])


def _table(paper: str, name: str, values: dict[str, Any], parts: dict[str, Any]) -> Table:
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    options["rows"] = tuple(_row(row, parts) for row in values["rows"])
    return Table(paper, name, **options)


def _row(values: dict[str, Any], parts: dict[str, Any]) -> Row:
    """A row names the parts that its recipe is made of, and changes them in ``set``."""
    backbone = values.get("backbone")
    return Row(
        values["name"],
        merged([*(parts[part] for part in values["parts"]), values.get("set", {})]),
        None if backbone is None else merged([parts[part] for part in backbone]),
        _numbers(values.get("published", ())),
        _numbers(values.get("deviation", ())),
        values.get("criterion"),
        values.get("cpu", {}),
        values.get("measure"),
    )


def _numbers(values: Sequence[float | str]) -> tuple[float | None, ...]:
    """TOML has no None: a dash stands where the paper has none."""
    return tuple(None if isinstance(value, str) else float(value) for value in values)
