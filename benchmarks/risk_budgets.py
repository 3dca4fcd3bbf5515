"""Thresholds for budgets, chosen on 2,500 images and measured on the 2,500 others, over random splits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from risk_outputs import splits
from tables import table

from exitkit import ExitOutputs
from exitkit.evaluation import fit_temperatures, per_exit_thresholds

BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SPLITS = 20
_WAYS = {"one": "one τ", "each": "τ per exit", "even": "one τ, tempered", "both": "per exit, tempered"}


def budgets(clean: ExitOutputs) -> list[dict[str, Any]]:
    """Accuracy on untouched images, at thresholds that another half of them chose for each budget."""
    rows = []
    halves = list(splits(clean, SPLITS, (2_500, 2_500)))
    for budget in BUDGETS:
        values = np.array([_at_budget(tune, fresh, budget) for tune, fresh in halves])
        rows.append(
            {"budget": budget} | dict(zip(_NAMES, values.mean(0).tolist(), strict=True)) | _spread(values[:, 0])
        )
    return rows


_NAMES = ("gain", "exact", *(f"{way}{part}" for way in _WAYS for part in ("", "_cost")))


def _at_budget(tune: ExitOutputs, fresh: ExitOutputs, budget: float) -> list[float]:
    temperatures = fit_temperatures(tune)
    even, warm = tune.calibrated(temperatures), fresh.calibrated(temperatures)
    each = per_exit_thresholds(tune, budget)
    one = fresh.at(each)
    points = (
        fresh.at(tune.curve().at_budget(budget)),
        one,
        warm.at(even.curve().at_budget(budget)),
        warm.at(per_exit_thresholds(even, budget)),
    )
    return [
        one.accuracy - fresh.curve().at_budget(one.cost + 1e-9).accuracy,
        float(each.accuracy == each.bound),
        *(number for point in points for number in (point.accuracy, point.cost)),
    ]


def _spread(gains: NDArray[np.float64]) -> dict[str, float]:
    return {"gain_std": float(gains.std()), "gain_positive": float((gains > 0).mean())}


def budget_table(rows: list[dict[str, Any]]) -> Table:
    cells = [
        (
            f"{row['budget']:.0%}",
            *(f"{100 * row[way]:.2f} at {100 * row[way + '_cost']:.1f}" for way in _WAYS),
            f"{100 * row['gain']:+.2f} ± {100 * row['gain_std']:.2f}",
            f"{row['gain_positive']:.0%}",
            f"{row['exact']:.0%}",
        )
        for row in rows
    ]
    return table(
        ("budget", *_WAYS.values(), "gain (points)", "splits > 0", "exact"),
        cells,
        "Accuracy (%) at its cost (%) on 2,500 untouched images, thresholds chosen on 2,500 others",
        f"mean of {SPLITS} random splits. Gain: τ per exit over one τ at equal cost on the untouched images. Exact: share of "
        "splits in which the search proved that no thresholds are better.",
    )
