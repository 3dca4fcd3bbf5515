"""What several benchmarks share: accuracy under a budget, a table of numbers, and a file of results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from exitkit.cli.bench import machine
from exitkit.common.files import replacing
from exitkit.evaluation import ExitOutputs, Spread

BUDGETS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the backbone's MACs."""


def at(run: ExitOutputs, budget: float) -> float | None:
    """Accuracy in per cent below a share of the backbone's MACs; None where the first exit's cost is not below it."""
    curve = run.curve()
    return 100 * curve.at_budget(budget).accuracy if curve.cost[0] < budget else None


def cell(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds (divided by n − 1, as everywhere); - where one has none."""
    known = tuple(value for value in values if value is not None)
    if not known or len(known) < len(values):
        return "-"
    spread = Spread(known)
    return f"{spread.mean:.{digits}f}" + (f" ± {spread.std:.{digits}f}" if len(known) > 1 else "")


def numbers(runs: dict[str, list[ExitOutputs]], budgets: Sequence[float] = BUDGETS) -> dict[str, dict[str, Any]]:
    """Of each name: the accuracies (%) of every run's exits and at budgets, and the exits' costs."""
    return {
        name: {
            "exits": [(100 * run.accuracy()).tolist() for run in those],
            "budgets": {f"{100 * budget:g}%": [at(run, budget) for run in those] for budget in budgets},
            "costs": those[0].costs.tolist(),
        }
        for name, those in runs.items()
    }


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], title: str, caption: str = "") -> Table:
    """Names in the first column, numbers in the others."""
    made = Table(title=title, caption=caption or None, caption_justify="left")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left")
    for row in rows:
        made.add_row(*row)
    return made


def write(path: Path, about: argparse.Namespace | dict[str, Any], **results: Any) -> None:
    """Results as JSON, with the setting and the machine."""
    setting = about if isinstance(about, dict) else vars(about)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"about": {**setting, **machine()}, **results}, indent=1, default=str))
