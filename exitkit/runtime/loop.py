"""The loop's parts: enter, one step for the samples that are still under way, and the answers in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from exitkit.runtime.decision import Split, split
from exitkit.runtime.flight import Flight
from exitkit.runtime.plan import Plan
from exitkit.runtime.program import Program


class Prediction(NamedTuple):
    """The answers of a batch, in the caller's order.

    Attributes:
        logits: (B, C), each sample's from the exit at which it left, after the method's ensemble.
        exit: (B,) int64, that exit; M is the backbone's own classifier.
        score: (B,) float32, how sure that exit was.
        non_finite: (B,) bool, samples with a score that was not finite somewhere; such a score never lets one leave.
    """

    logits: Tensor
    exit: Tensor
    score: Tensor
    non_finite: Tensor


class Departure(NamedTuple):
    """Samples that have just got their answer at exit ``exit``; ``rows`` are the callers' numbers."""

    rows: Tensor
    exit: int
    logits: Tensor
    score: Tensor
    non_finite: Tensor


@dataclass(frozen=True)
class Loop:
    """What the engine does with a flight of samples, step by step. Keeps nothing between calls.

    Attributes:
        program: what runs.
        thresholds: τ of each exit before the backbone.
        plan: where samples that have their answer leave the batch; everywhere, without one.
        split: the decision.
    """

    program: Program
    thresholds: tuple[float, ...]
    plan: Plan | None = None
    split: Split = split

    def enter(self, tensors: Sequence[Tensor], first: int = 0) -> Flight:
        """A flight of new samples before step 0, numbered from ``first``."""
        rows = torch.arange(first, first + len(tensors[0]), device=tensors[0].device)
        values = dict(zip(self.program.inputs.names, tensors, strict=True))
        return Flight(rows, values, torch.zeros(len(rows), device=rows.device))

    def advance(self, flight: Flight, index: int) -> tuple[Flight | None, list[Departure]]:
        """Run one step: the samples that go on (None: nobody), and those that leave."""
        step = self.program.steps[index]
        made = step.run(*(flight.values[name] for name in step.inputs))
        values = flight.values | dict(zip(step.outputs, made, strict=False))
        flight.values = {name: values[name] for name in step.live}
        if not step.decides:
            return flight, []
        answer, score = made[-2:]
        flight.total = flight.total + score
        if index == len(self.program.steps) - 1:
            go, keep = torch.nonzero(flight.rows >= 0).squeeze(1), flight.rows[:0]
        else:
            go, keep = self.split(score, flight.rows, self.thresholds[step.exit])
        if len(go) == 0:
            return flight, []
        if len(go) == len(flight):
            return None, [Departure(flight.rows, step.exit, answer, score, ~flight.total.isfinite())]
        departure = Departure(flight.rows[go], step.exit, answer[go], score[go], ~flight.total[go].isfinite())
        return self._onward(flight, keep, index), [departure]

    def _onward(self, flight: Flight, keep: Tensor, index: int) -> Flight | None:
        """The samples ``keep``; those that have left are carried along where taking them out does not pay."""
        if len(keep) == 0:
            return None
        if self.plan is not None and not self.plan.compacts(index + 1, len(flight), len(keep)):
            rows = torch.full_like(flight.rows, -1)
            flight.rows = rows.index_copy(0, keep, flight.rows[keep])
            return flight
        return flight.select(keep, self.program.axes)

    def landed(self, departures: Sequence[Departure], count: int, first: int = 0) -> Prediction:
        """The answers of the samples numbered from ``first``, in order."""
        if count == 1:
            _, exit_, answer, score, non_finite = departures[0]
            return Prediction(answer, torch.full_like(departures[0].rows, exit_), score, non_finite)
        device = self.program.inputs.device
        exits = torch.zeros(count, dtype=torch.int64, device=device)
        dtype = departures[0].logits.dtype if departures else torch.get_default_dtype()
        logits = torch.empty(count, self.program.num_classes, dtype=dtype, device=device)
        result = Prediction(logits, exits, torch.zeros(count, device=device), exits.bool())
        for rows, exit_, answer, score, non_finite in departures:
            result.logits[rows - first] = answer.to(logits.dtype)
            result.exit[rows - first] = exit_
            result.score[rows - first] = score
            result.non_finite[rows - first] = non_finite
        return result
