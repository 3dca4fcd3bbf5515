"""Learning rate schedules: torch's own, by epochs or by optimiser steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from exitkit.common.errors import ArgumentError

Schedule = Callable[[Optimizer, int], LRScheduler]
"""(an optimiser, the number of its steps) → a schedule that advances after every step."""


def check_schedule(schedule: Schedule | None, milestones: Sequence[int] | None, optimizer: Optimizer) -> None:
    """Try the user's schedule on an optimiser.

    Raises:
        ArgumentError: it is not a function that makes a schedule, or milestones are given too.
    """
    if schedule is None:
        return
    if milestones is not None:
        raise ArgumentError(f"milestones={milestones!r} and schedule= are both set; leave one out")
    try:
        made: Any = schedule(optimizer, 100) if callable(schedule) else schedule
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"schedule= cannot be called with an optimiser and a number of steps ({error}); give other options by "
            "functools.partial or a lambda"
        ) from error
    if not isinstance(made, LRScheduler) or made is schedule:
        raise ArgumentError(
            f"schedule= gives {type(made).__name__}, not a schedule; give a function of an optimiser and a number of steps, "
            "such as torch.optim.lr_scheduler.CosineAnnealingLR"
        )


def make_scheduler(
    optimizer: Optimizer, schedule: Schedule | None, milestones: Sequence[int] | None, epochs: int, steps: int | None
) -> LRScheduler:
    """The user's schedule over all ``steps`` of every epoch, or one by epochs: milestones, or a cosine to 0.

    Raises:
        ArgumentError: a schedule by steps, and a loader without a length.
    """
    if schedule is not None:
        if steps is None:
            raise ArgumentError(
                "schedule= needs the number of steps, but train_loader has no length; give one that has, or milestones="
            )
        return schedule(optimizer, epochs * steps)
    if milestones is not None:
        return MultiStepLR(optimizer, [int(epoch) for epoch in milestones])
    return CosineAnnealingLR(optimizer, epochs)


def schedule_name(schedule: Callable[..., Any] | None) -> str | None:
    """The function, and the options that :func:`functools.partial` gave it, for a checkpoint to compare."""
    if isinstance(schedule, partial):
        options = ", ".join(f"{name}={value!r}" for name, value in schedule.keywords.items())
        return f"{schedule_name(schedule.func)}({options})"
    return None if schedule is None else str(getattr(schedule, "__qualname__", type(schedule).__qualname__))
