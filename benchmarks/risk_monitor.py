"""The shift monitor: calibrated on 2,500 images, fed with draws (with replacement) from the 2,500 others; and its reach.

For the reach, calibration and production are both draws with replacement from all 5,000, so that nothing differs between them
but the shift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from risk_outputs import CONFIDENCE, MAX_DROP

from exitkit import ExitOutputs, choose_threshold
from exitkit.evaluation import ShiftMonitor

STREAMS, REACH = 100, 20
REACH_SAMPLES = 20_000
Rows = Callable[[NDArray[np.int64], NDArray[np.float64], np.random.Generator], NDArray[np.int64]]


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
        "reach": reach(clean),
    }


def reach(clean: ExitOutputs) -> dict[str, Any]:
    """Of each shift: in how many of 20 streams of 20,000 samples it was seen, and after how many samples."""
    cooler = replace(clean, log_probs=clean.log_probs / 1.15)
    found: dict[str, list[int | None]] = {}
    for seed in range(REACH):
        generator = np.random.default_rng(seed)
        held = clean[torch.from_numpy(generator.integers(0, len(clean), 2_500))]
        tau = choose_threshold(held, 2 * MAX_DROP, CONFIDENCE)
        streams: dict[str, tuple[ExitOutputs, float, Rows]] = {
            "none": (clean, 0.0, _uniform),
            "logits / 1.15": (cooler, 0.0, _uniform),
            "10% from the hardest decile": (clean, 0.0, _harder),
            "scores - 0.02": (clean, 0.02, _uniform),
            "20% copies of one sample": (clean, 0.0, _copies),
        }
        for name, (outputs, less, rows) in streams.items():
            watched = ShiftMonitor(held, tau)
            scores = outputs.scores().numpy() - less
            sure = scores[:, :-1] > tau.thresholds
            exits = np.where(sure.any(1), sure.argmax(1), sure.shape[1])
            left = scores[np.arange(len(exits)), exits]
            taken = rows(exits, left, generator)
            for start in range(0, REACH_SAMPLES, 1_000):
                part = taken[start : start + 1_000]
                watched.update(exits[part], left[part])
                if watched.alarm:
                    break
            found.setdefault(name, []).append(watched.report().fired_at)
    return {name: {"seen": sum(at is not None for at in fired), **_quantiles(fired)} for name, fired in found.items()}


def _uniform(
    exits: NDArray[np.int64], scores: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.int64]:
    return generator.integers(0, len(exits), REACH_SAMPLES)


def _harder(
    exits: NDArray[np.int64], scores: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """A tenth of the samples from those that leave last and least sure."""
    rows, tenth = _uniform(exits, scores, generator), generator.random(REACH_SAMPLES) < 0.1
    hardest = np.lexsort((-scores, exits))[-len(exits) // 10 :]
    rows[tenth] = generator.choice(hardest, tenth.sum())
    return rows


def _copies(
    exits: NDArray[np.int64], scores: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.int64]:
    rows = _uniform(exits, scores, generator)
    rows[generator.random(REACH_SAMPLES) < 0.2] = generator.integers(0, len(exits))
    return rows


def _draws(outputs: ExitOutputs, tau: Any, count: int, generator: np.random.Generator) -> tuple[Any, Any]:
    exits = outputs.exits_at(tau)
    scores = outputs.scores().numpy()[np.arange(len(exits)), exits]
    rows = generator.integers(0, len(exits), count)
    return exits[rows], scores[rows]


def _quantiles(fired: list[int | None]) -> dict[str, float]:
    values = [at for at in fired if at is not None]
    return {"median": float(np.median(values)), "worst": float(max(values))} if values else {}
