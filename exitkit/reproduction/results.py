"""A table that was run: each setting's numbers over its seeds beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exitkit.evaluation import Spread
from exitkit.reproduction.tables import Row, Table

if TYPE_CHECKING:
    from rich.table import Table as Shown


@dataclass(frozen=True)
class Outcome:
    """What came of a row.

    Attributes:
        row: of the table.
        numbers: one for each column, over the seeds; empty where it did not run.
        folder: of its run; None where it did not run.
        reason: why it did not.
        failed: whether that is a fault, and not something that is known to be missing.
    """

    row: Row
    numbers: tuple[Spread | None, ...] = ()
    folder: str | None = None
    reason: str = ""
    failed: bool = False


def over_seeds(each: Sequence[Sequence[float | None]]) -> tuple[Spread | None, ...]:
    """Numbers of each seed, as one for each column; None where any seed has none."""
    columns = zip(*each, strict=True)
    return tuple(Spread(tuple(column)) if None not in column else None for column in columns)


def _lines(table: Table, outcomes: Sequence[Outcome]) -> list[tuple[str, str, list[str]]]:
    """Of each row: its name, whose numbers, and these; what did not run has its reason in the first cell."""
    lines = []
    for outcome in outcomes:
        ours = [_measured(spread, table.spread) for spread in outcome.numbers]
        ours = ours or [outcome.reason, *[""] * (len(table.columns) - 1)]
        lines.append((outcome.row.name, "here", ours))
        if outcome.row.published:
            deviations = outcome.row.deviation or (None,) * len(outcome.row.published)
            published = [_published(*pair) for pair in zip(outcome.row.published, deviations, strict=True)]
            lines.append(("", "paper", published))
    return lines


def _measured(spread: Spread | None, kind: str) -> str:
    if spread is None:
        return "-"
    around = spread.half_width if "1.96" in kind else spread.std
    return _published(spread.mean, around if len(spread.values) > 1 else None)


def _published(number: float | None, deviation: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def shown(table: Table, outcomes: Sequence[Outcome], scale: str) -> Shown:
    """For a terminal."""
    from rich.table import Table as Grid

    grid = Grid(title=title_of(table, scale), caption=caption_of(table, scale), caption_justify="left")
    for number, heading in enumerate(("", "", *headings_of(table))):
        grid.add_column(heading, justify="right" if number > 1 else "left")
    for name, whose, numbers in _lines(table, outcomes):
        grid.add_row(name, whose, *numbers)
    return grid


def markdown(table: Table, outcomes: Sequence[Outcome], scale: str) -> str:
    """For a page."""
    heads = ["", "", *headings_of(table)]
    rows = [[name, whose, *numbers] for name, whose, numbers in _lines(table, outcomes)]
    ruled = [heads, ["---", "---", *["---:"] * len(table.columns)], *rows]
    body = "\n".join("| " + " | ".join(row) + " |" for row in ruled)
    return f"# {title_of(table, scale)}\n\n{body}\n\n{caption_of(table, scale)}\n"


def record(table: Table, outcomes: Sequence[Outcome], scale: str) -> dict[str, Any]:
    """For programs, as JSON holds it."""
    rows = [
        {
            "name": one.row.name,
            "measure": one.row.measure or table.measure,
            "runs": one.folder,
            "reason": one.reason or None,
            "numbers": [None if spread is None else list(spread.values) for spread in one.numbers],
            "published": list(one.row.published),
            "deviation": list(one.row.deviation),
        }
        for one in outcomes
    ]
    about = {"paper": table.paper, "table": table.name, "scale": scale, "measure": table.measure, "top": table.top}
    return about | {"columns": list(table.columns), "rows": rows}


def title_of(table: Table, scale: str) -> str:
    """Which table this is."""
    number = table.name.replace("-", " ") if table.name.startswith("figure") else f"table {table.name}"
    return f"{table.paper}, {number}, scale {scale}: {table.title}"


def caption_of(table: Table, scale: str) -> str:
    """What the numbers are, and what is to be known about them."""
    if scale == "smoke":
        return "On made-up data, to see that every row runs: its numbers mean nothing."
    accuracy = "Accuracy in %" if table.top == 1 else f"Top-{table.top} accuracy in %"
    shown = {"mse": "Mean squared error", "milliseconds": "Milliseconds"}.get(table.measure, accuracy)
    spread = "mean ± 1.96 standard errors" if "1.96" in table.spread else "mean ± standard deviation"
    return f"{shown}, {spread}. {table.note}".strip()


def headings_of(table: Table) -> list[str]:
    """Columns as they are printed."""
    per_cent = table.measure in ("budgets", "mse")
    return [f"{column}%" if per_cent and isinstance(column, int) else str(column) for column in table.columns]
