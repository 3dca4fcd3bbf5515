"""The shift monitor: calibrated on 2,500 images, fed with draws (with replacement) from the 2,500 others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from risk_outputs import CONFIDENCE, MAX_DROP

from exitkit import ExitOutputs, choose_threshold
from exitkit.evaluation import ShiftMonitor

STREAMS = 100


def monitor(clean: ExitOutputs, jpeg: ExitOutputs) -> dict[str, Any]:
    """Alarms within 10,000 undisturbed draws, and after how many JPEG images there is one, at once or after 10,000."""
    generator = np.random.default_rng(0)
    quiet, at_once, later, drops = 0, [], [], []
    for seed in range(STREAMS):
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
        held, fresh, shifted = clean[order[:2_500]], clean[order[2_500:]], jpeg[order[2_500:]]
        tau = choose_threshold(held, MAX_DROP, CONFIDENCE)
        undisturbed, disturbed = ShiftMonitor(held, tau), ShiftMonitor(held, tau)
        undisturbed.update(*_draws(fresh, tau, 10_000, generator))
        quiet += not undisturbed.alarm
        disturbed.update(*_draws(shifted, tau, 1_000, generator))
        at_once.append(disturbed.report().fired_at)
        if not undisturbed.alarm:
            undisturbed.update(*_draws(shifted, tau, 1_000, generator))
            fired = undisturbed.report().fired_at
            later.append(None if fired is None else fired - 10_000)
        drops.append(float(fresh.accuracy()[-1]) - shifted.at(tau).accuracy)
    return {
        "streams": STREAMS,
        "no_alarm_in_10000_undisturbed": quiet,
        "alarm_within_1000_jpeg": sum(fired is not None for fired in at_once),
        "jpeg_images_until_alarm": _quantiles(at_once),
        "alarm_within_1000_jpeg_after_10000_undisturbed": f"{sum(fired is not None for fired in later)} of {len(later)}",
        "jpeg_images_until_alarm_then": _quantiles(later),
        "accuracy_of_exits_on_jpeg_below_clean_backbone": float(np.mean(drops)),
    }


def _draws(outputs: ExitOutputs, tau: Any, count: int, generator: np.random.Generator) -> tuple[Any, Any]:
    exits = outputs.exits_at(tau)
    scores = outputs.scores().numpy()[np.arange(len(exits)), exits]
    rows = generator.integers(0, len(exits), count)
    return exits[rows], scores[rows]


def _quantiles(fired: list[int | None]) -> dict[str, float]:
    values = [at for at in fired if at is not None]
    return {"median": float(np.median(values)), "worst": float(max(values))} if values else {}
