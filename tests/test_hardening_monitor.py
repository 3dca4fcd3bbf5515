"""The monitor's reach: shifts too small for any window, false alarms as rare as asked for, no memory that grows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exitkit import ExitOutputs
from exitkit.calibration.shift_test import Martingales, equal_cuts
from exitkit.evaluation import ShiftMonitor

TAU = 0.805


def scores_of(samples: int, seed: int, digits: int | None = None) -> NDArray[np.float64]:
    """(N, 3) confidences of two exits and the backbone, many near 1 as real ones are; ``digits`` makes ties."""
    drawn = 1 - 0.5 * np.random.default_rng(seed).beta(0.5, 1.5, (samples, 3))
    return drawn if digits is None else drawn.round(digits)


def left(scores: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    exits = np.where(scores[:, 0] > TAU, 0, np.where(scores[:, 1] > TAU, 1, 2))
    return exits, scores[np.arange(len(scores)), exits]


def monitor(seed: int, samples: int = 2_500, digits: int | None = None, **options: float) -> ShiftMonitor:
    p = scores_of(samples, seed, digits).clip(0.5, 1 - 1e-6)
    log_probs = torch.from_numpy(np.stack([p, 1 - p], -1)).log()
    return ShiftMonitor(ExitOutputs(log_probs, None, torch.tensor([1.0, 2.0, 4.0]), 4.0), TAU, **options)  # type: ignore[arg-type]


def fired_at(watched: ShiftMonitor, scores: NDArray[np.float64]) -> int | None:
    for part in np.array_split(scores, max(len(scores) // 500, 1)):
        watched.update(*left(part.clip(0.5, 1 - 1e-6)))
        if watched.alarm:
            break
    return watched.report().fired_at


def warmer(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    return 1 / (1 + (1 / scores - 1) ** (1 / temperature))


@pytest.mark.parametrize("digits", [None, 2])
def test_false_alarms_are_as_rare_as_asked_for(digits: int | None) -> None:
    """20% of monitors at most (and three standard errors), over 4,000 samples, ties or not."""
    fired = [
        fired_at(monitor(seed, 500, digits, false_alarm=0.2), scores_of(4_000, 10_000 + seed, digits))
        for seed in range(60)
    ]
    assert sum(at is not None for at in fired) <= 60 * 0.2 + 3 * math.sqrt(60 * 0.2 * 0.8)


def test_a_mild_shift_is_seen_although_no_window_shows_it() -> None:
    """Logits / 1.15: two windows of 500 hardly differ, 20,000 samples do."""
    seen = [fired_at(monitor(seed), warmer(scores_of(20_000, 500 + seed), 1.15)) for seed in range(8)]
    assert sum(at is not None for at in seen) >= 7


def test_a_tenth_of_harder_samples_is_seen() -> None:
    seen = []
    for seed in range(8):
        scores, harder = scores_of(20_000, 700 + seed), scores_of(40_000, 800 + seed)
        hard = harder[harder[:, 0] < np.quantile(harder[:, 0], 0.1)]
        scores[::10] = hard[: len(scores[::10])]
        seen.append(fired_at(monitor(seed), scores))
    assert None not in seen


def test_copies_of_one_sample_are_seen_at_once() -> None:
    for seed in range(4):
        scores = scores_of(3_000, 900 + seed)
        scores[::5] = scores[0]
        at = fired_at(monitor(seed), scores)
        assert at is not None
        assert at <= 1_000


def test_a_shift_that_begins_late_is_seen() -> None:
    watched = monitor(0)
    assert fired_at(watched, scores_of(10_000, 1)) is None
    watched.update(*left(warmer(scores_of(3_000, 2), 1.5)))
    assert watched.alarm
    assert 10_000 < (watched.report().fired_at or 0) <= 13_000


def test_an_exit_that_no_calibration_sample_took() -> None:
    p = np.full((500, 3), 0.7) + np.random.default_rng(0).random((500, 3)) * 0.05
    log_probs = torch.from_numpy(np.stack([p, 1 - p], -1)).log()
    watched = ShiftMonitor(ExitOutputs(log_probs, None, torch.tensor([1.0, 2.0, 4.0]), 4.0), TAU)
    watched.update(np.zeros(100, int), np.full(100, 0.9))
    assert watched.alarm


def test_the_urn_is_a_fair_game() -> None:
    """The martingales' money is worth 1 on average where the calibration split and production are alike: by simulation."""
    generator = np.random.default_rng(0)
    worths = []
    for _ in range(3_000):
        calibration = np.sort(generator.random(20))
        martingales = Martingales(equal_cuts(21), 21)
        martingales.begin()
        martingales.see(calibration.searchsorted(generator.random(10)))
        worths.append(math.exp(martingales.log_wealth()))
    assert np.mean(worths) == pytest.approx(1, abs=3 * np.std(worths) / math.sqrt(len(worths)))
    assert np.std(worths) > 0.01  # they do bet


def test_its_memory_does_not_grow() -> None:
    watched = monitor(0, 500)
    sizes = []
    for round_ in range(3):
        watched.update(*left(scores_of(10_000, 50 + round_)))
        sizes.append(
            {name: len(one._begun) for name, one in watched._martingales.items()} | {"recent": len(watched._recent)}
        )
    assert sizes[1] == sizes[2]
