"""The loop's parts: enter, one step for the samples that are still under way, and the answers in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from exitkit.engine.batch_state import Flight, Gather, gather, select
from exitkit.engine.decision import Side, Split, split
from exitkit.engine.plan import Plan
from exitkit.engine.program import Program


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
        gather: how rows are taken out of a batch.
    """

    program: Program
    thresholds: tuple[float, ...]
    plan: Plan | None = None
    split: Split = split
    gather: Gather = gather

    def alone(self, tensors: Sequence[Tensor]) -> Prediction:
        """The answer of one sample, who has nobody to part from: plain numbers, which take less time than tensors."""
        values = dict(zip(self.program.inputs.names, tensors, strict=True))
        finite = True
        for step, threshold in zip(self.program.steps, (*self.thresholds, float("-inf")), strict=True):
            made = step.run(*[values[name] for name in step.inputs])
            values.update(zip(step.outputs, made, strict=False))
            values = {name: values[name] for name in step.live}
            if step.decides:
                answer, score = made[-2:]
                number = float(score)
                finite = finite and math.isfinite(number)
                if number > threshold:
                    break
        exit_ = score.new_full((1,), step.exit, dtype=torch.int64)
        return Prediction(answer, exit_, score, score.new_full((1,), not finite, dtype=torch.bool))

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
        return self.part(flight, index, *made[-2:])

    def part(self, flight: Flight, index: int, answer: Tensor, score: Tensor) -> tuple[Flight | None, list[Departure]]:
        """The decision after a step that gave this answer (B, C) and score (B,): as :meth:`advance` returns it."""
        step = self.program.steps[index]
        flight.fault = fault = flight.fault + 0 * score
        if index == len(self.program.steps) - 1:
            present = torch.nonzero(flight.rows >= 0).squeeze(1)
            go, stay = (Side.of(places, flight.rows, score, fault) for places in (present, present[:0]))
        else:
            go, stay = self.split(score, flight.rows, fault, self.thresholds[step.exit])
        if len(go) == 0:
            return flight, []
        logits = answer if len(go) == len(flight) else self.gather(answer, go.places)
        departure = Departure(go.rows, step.exit, logits, go.score, go.fault.isnan())
        return self._onward(flight, stay, index), [departure]

    def _onward(self, flight: Flight, stay: Side, index: int) -> Flight | None:
        """Those that stay; the others are carried along where taking them out does not pay."""
        if len(stay) == 0:
            return None
        if self.plan is not None and not self.plan.compacts(index + 1, len(flight), len(stay)):
            flight.rows = torch.full_like(flight.rows, -1).index_copy(0, stay.places, stay.rows)
            return flight
        values = {
            name: select(value, stay.places, self.program.axes.get(name), len(flight), self.gather)
            for name, value in flight.values.items()
        }
        return Flight(stay.rows, values, stay.fault)

    def landed(self, departures: Sequence[Departure], count: int, first: int = 0) -> Prediction:
        """The answers of the samples numbered from ``first``, in order."""
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
