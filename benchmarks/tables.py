"""What several benchmarks share: accuracy under a budget, a table of numbers, and a file of results."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from exitkit.cli.bench import machine
from exitkit.common.files import replacing
from exitkit.evaluation import ExitOutputs

BUDGETS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the backbone's MACs."""


def at(run: ExitOutputs, budget: float) -> float | None:
    """Accuracy in per cent under a share of the backbone's MACs; None where the first exit costs more (by over 0.5%)."""
    curve = run.curve()
    first = float(curve.cost[0])
    return None if first > budget + 0.005 else 100 * curve.at_budget(max(budget, math.nextafter(first, 2))).accuracy


def cell(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    spread = f" ± {np.std(known):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{spread}"


def numbers(runs: dict[str, list[ExitOutputs]], budgets: Sequence[float] = BUDGETS) -> dict[str, dict[str, Any]]:
    """Of each name: the accuracies (%) of every run's exits and at budgets, and the exits' costs."""
    return {
        name: {
            "exits": [(100 * run.accuracy()).tolist() for run in those],
            "budgets": {f"{budget:.0%}": [at(run, budget) for run in those] for budget in budgets},
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
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in setting.items()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"about": {**plain, **machine()}, **results}, indent=1))
