"""The stages of a multi-exit model: what each costs in MACs, and how long it took on this device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import exitkit
from exitkit.calibration.pruning import head_macs
from exitkit.common.checks import Count, NonNegative
from exitkit.multi_exit.model import MultiExitModel


@dataclass(frozen=True)
class Stage:
    """The backbone from the exit before to this one, and this exit.

    Attributes:
        exit: the boundary it ends at; the last is ``"backbone"``.
        macs: of the backbone's part, per sample.
        head_macs: of the exit: head, link and combiner.
        milliseconds: of both together for a batch of ``batch`` samples, or None where nothing was measured.
        head_milliseconds: of the exit alone.
        batch: how many samples were timed together.
    """

    exit: str
    macs: NonNegative
    head_macs: NonNegative
    milliseconds: NonNegative | None = None
    head_milliseconds: NonNegative | None = None
    batch: Count | None = None


def stages_of(model: MultiExitModel, samples: Any = None) -> tuple[Stage, ...]:
    """M+1 stages of ``model``, timed on ``samples`` (a batch of inputs) where they are given.

    Raises:
        ArgumentError: samples that do not fit the model.
    """
    spent = [0, *(boundary.macs for boundary in model.boundaries), model.anatomy.macs]
    macs = [after - before for before, after in pairwise(spent)]
    heads = [*head_macs(model), model.exits[-1].macs - model.anatomy.macs - sum(head_macs(model))]
    names = [exit_.name for exit_ in model.exits]
    if samples is None:
        return tuple(map(Stage, names, macs, heads))
    timings = exitkit.compile(model, float("inf"), samples=samples).loop.timings
    assert timings is not None
    times = [_milliseconds(columns) for columns in (timings.seconds, timings.heads)]
    return tuple(map(Stage, names, macs, heads, *times, [timings.sizes[-1]] * len(names)))


def _milliseconds(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Of each step, for the largest batch."""
    return [1e3 * sizes[-1] for sizes in seconds]


def backbone_milliseconds(stages: Sequence[Stage]) -> float:
    """The time of the backbone without its exits; 0 where nothing was measured."""
    return sum((stage.milliseconds or 0.0) - (stage.head_milliseconds or 0.0) for stage in stages)
