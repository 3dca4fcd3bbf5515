"""Thresholds calibrated on 2,000 images and measured on 2,000 others, over random splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from risk_outputs import CONFIDENCE, MAX_DROP, splits
from tables import table
from torch import Tensor

from exitkit import ExitOutputs, choose_threshold
from exitkit.evaluation import threshold_path
from exitkit.methods.policy import ExitPolicy, Threshold

SPLITS = 200


def promises(clean: ExitOutputs, training: Tensor) -> list[dict[str, Any]]:
    """Each way of choosing τ, over many splits: cost and losses on untouched images, and how often they exceed 1%."""
    ways: dict[str, Callable[[ExitOutputs, ExitOutputs], Threshold]] = {
        "as measured (no guarantee)": lambda _, held: _naive(held),
        "ltt": lambda _, held: _chosen(held, training),
        "ltt, thresholds per exit": lambda tune, held: _chosen(held, training, path=threshold_path(tune)),
        "ltt, disagreement, no labels": lambda _, held: _chosen(held, training, risk="disagreement"),
        "ucb, net drop": lambda _, held: _chosen(held, training, risk="net_accuracy_drop", method="ucb"),
        "crc (in expectation)": lambda _, held: _chosen(held, training, method="crc"),
    }
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for tune, held, fresh in splits(clean, SPLITS, (1_000, 2_000, 2_000)):
        for name, choose in ways.items():
            threshold = choose(tune, held)
            rows[name].append((fresh.at(threshold).cost, *_losses(fresh, threshold), *_losses(clean, threshold)))
    return [_promise(name, np.array(values)) for name, values in rows.items()]


def _promise(name: str, values: NDArray[np.float64]) -> dict[str, Any]:
    cost, drop, lost, all_drop, all_lost = values.T
    return {
        "way": name,
        "saved": float(1 - cost.mean()),
        "saved_std": float(cost.std()),
        "drop": float(drop.mean()),
        "drop_above": float((drop > MAX_DROP).mean()),
        "lost": float(lost.mean()),
        "lost_above": float((lost > MAX_DROP).mean()),
        "drop_broken": float((all_drop > MAX_DROP).mean()),
        "lost_broken": float((all_lost > MAX_DROP).mean()),
    }


def _losses(outputs: ExitOutputs, threshold: Threshold) -> tuple[float, float]:
    """The drop in accuracy, and the share of samples that the full model has right and their exit wrong."""
    exits, right = outputs.exits_at(threshold), outputs.correct.numpy()
    mine, full = right[np.arange(len(exits)), exits], right[:, -1]
    return float(full.mean() - mine.mean()), float((full & ~mine).mean())


def _chosen(held: ExitOutputs, training: Tensor, **options: Any) -> ExitPolicy:
    return choose_threshold(held, MAX_DROP, CONFIDENCE, exclude=training, **options)


def _naive(held: ExitOutputs) -> float:
    """What is usually done: the cheapest τ whose drop, where it is chosen, is at most the bound."""
    curve = held.curve()
    kept = curve.accuracy >= held.accuracy()[-1] - MAX_DROP
    return float(curve.thresholds[int(kept.argmax())])


def promise_table(rows: list[dict[str, Any]], clean: ExitOutputs, depth: int) -> Table:
    cells = [
        (
            row["way"],
            f"{row['saved']:.1%} ± {row['saved_std']:.1%}",
            f"{row['drop']:.2%}",
            f"{row['drop_broken']:.1%}",
            f"{row['lost']:.2%}",
            f"{row['lost_broken']:.1%}",
        )
        for row in rows
    ]
    return table(
        ("chosen by", "MACs saved", "drop", "broken", "lost", "broken"),
        cells,
        f"Threshold chosen on 2,000 images for a drop of at most {MAX_DROP:.0%}, measured on 2,000 untouched ones",
        f"ResNet-{depth}, backbone {clean.accuracy()[-1]:.2%}, {SPLITS} random splits. Lost: the full model right and the "
        "exit wrong. Broken: splits whose threshold exceeds 1% on all 5,000 images.",
    )
