"""Learning rate schedules by name, as a recipe gives them: torch's own, after a warm-up."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from exitkit.common.errors import ArgumentError, unknown_name

SCHEDULES = ("cosine", "restarts", "linear", "constant")
_START = 1e-3


def by_name(
    optimizer: Optimizer, steps: int, name: str = "cosine", warmup: float = 0.0, cycles: int = 1
) -> LRScheduler:
    """A schedule over ``steps`` optimiser steps.

    Args:
        optimizer: whose rates it sets.
        steps: of the whole run.
        name: after the warm-up the rate falls as a cosine to 0, as ``cycles`` such cosines (warm restarts, Loshchilov and
            Hutter 2017), or in a line to 0, or it stays.
        warmup: the share of the steps in which the rate rises in a line, from a thousandth.
        cycles: of ``"restarts"``.

    Raises:
        ArgumentError: an unknown name, or a value out of range.
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule.name", name, SCHEDULES)
    if not isinstance(warmup, int | float) or not 0 <= warmup < 1:
        raise ArgumentError(f"schedule.warmup = {warmup!r} must be a share of the steps, at least 0 and below 1")
    if not isinstance(cycles, int) or cycles < 1 or (cycles > 1 and name != "restarts"):
        raise ArgumentError(
            f"schedule.cycles = {cycles!r} must be a whole number of at least 1, above 1 for 'restarts' only"
        )
    rising = round(warmup * steps)
    falling = max(1, steps - rising)
    after = _after_warmup(optimizer, name, falling, cycles)
    if not rising:
        return after
    return SequentialLR(optimizer, [LinearLR(optimizer, _START, 1.0, rising), after], [rising])


def _after_warmup(optimizer: Optimizer, name: str, steps: int, cycles: int) -> LRScheduler:
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if name == "restarts":
        return CosineAnnealingWarmRestarts(optimizer, -(-steps // cycles))
    return LinearLR(optimizer, 1.0, 0.0, steps) if name == "linear" else ConstantLR(optimizer, 1.0, steps)
