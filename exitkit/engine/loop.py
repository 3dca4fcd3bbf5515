"""The loop: one step after another for the samples that have no answer yet, and the answers in the callers' order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exitkit.common.errors import ArgumentError, FileError
from exitkit.engine.batch_state import BatchState, Gather, gather, select
from exitkit.engine.decision import Group, Split, split
from exitkit.engine.lowering import StageWithExit
from exitkit.engine.plan import Timings
from exitkit.engine.program import Program, Step
from exitkit.methods.policy import ExitPolicy


class Prediction(NamedTuple):
    """The answers of a batch, in the caller's order.

    Attributes:
        logits: (B, C), each sample's from the exit at which it left, after the method's ensemble; of the widest dtype that
            any exit answers in.
        exit: (B,) int64, that exit; M is the backbone's own classifier.
        score: (B,) float64, how sure that exit was.
        non_finite: (B,) bool, samples with a score that was not finite at any exit they came to; it never lets one leave.
    """

    logits: Tensor
    exit: Tensor
    score: Tensor
    non_finite: Tensor


class Answers(NamedTuple):
    """Samples that have just been answered at exit ``exit``; ``rows`` are the callers' numbers."""

    rows: Tensor
    exit: int
    logits: Tensor
    score: Tensor
    non_finite: Tensor


def run(step: Step, values: Mapping[str, Any]) -> Sequence[Any]:
    """What a step makes of the values.

    Raises:
        ArgumentError: the model was converted to another dtype, or moved, after it was compiled.
    """
    try:
        return step.run(*[values[name] for name in step.inputs])
    except RuntimeError as error:
        if isinstance(step.run, StageWithExit) and step.run.converted():
            raise ArgumentError(
                "the model was converted to another dtype or moved to another device after it was compiled, and the engine "
                "shares its weights; compile it again"
            ) from error
        raise


@dataclass(frozen=True)
class Loop:
    """What the engine does with a batch, step by step. Keeps nothing between calls.

    Attributes:
        program: what runs.
        policy: when a sample leaves.
        timings: where samples that have their answer are taken out of the batch; everywhere, without them.
        split: the decision.
        gather: how rows are taken out of a batch.
    """

    program: Program
    policy: ExitPolicy
    timings: Timings | None = None
    split: Split = split
    gather: Gather = gather

    def single(self, tensors: Sequence[Tensor]) -> Prediction:
        """The answer of one sample: decisions on plain numbers, which take less time than tensors."""
        values = dict(zip(self.program.inputs.names, tensors, strict=True))
        finite = True
        for step, threshold in zip(self.program.steps, (*self.policy.thresholds, float("-inf")), strict=True):
            made = run(step, values)
            values.update(zip(step.outputs, made, strict=False))
            values = {name: values[name] for name in step.live}
            if step.decides:
                answer, score = made[-2:]
                number = float(score)
                finite = finite and math.isfinite(number)
                if number > threshold:
                    break
        exit_ = score.new_full((1,), step.exit, dtype=torch.int64)
        faulty = score.new_full((1,), not finite, dtype=torch.bool)
        return Prediction(answer.to(self.program.dtype), exit_, score, faulty)

    def start(self, tensors: Sequence[Tensor], first: int = 0) -> BatchState:
        """A batch of new samples before step 0, numbered from ``first``."""
        rows = torch.arange(first, first + len(tensors[0]), device=tensors[0].device)
        values = dict(zip(self.program.inputs.names, tensors, strict=True))
        return BatchState(rows, values, torch.zeros(len(rows), device=rows.device))

    def run_step(self, batch: BatchState, index: int) -> tuple[BatchState | None, list[Answers]]:
        """Run one step: the samples that go on (None: there are none), and those that leave."""
        step = self.program.steps[index]
        made = run(step, batch.values)
        values = batch.values | dict(zip(step.outputs, made, strict=False))
        batch.values = {name: values[name] for name in step.live}
        if not step.decides:
            return batch, []
        return self.decide(batch, index, *made[-2:])

    def decide(
        self, batch: BatchState, index: int, answer: Tensor, score: Tensor
    ) -> tuple[BatchState | None, list[Answers]]:
        """The decision after a step that gave this answer (B, C) and score (B,): as :meth:`run_step` returns it."""
        step = self.program.steps[index]
        batch.fault = fault = batch.fault + 0 * score.float()
        if index == len(self.program.steps) - 1:
            present = torch.nonzero(batch.rows >= 0).squeeze(1)
            leave, stay = (Group.of(places, batch.rows, score, fault) for places in (present, present[:0]))
        else:
            leave, stay = self.split(score, batch.rows, fault, self.policy.thresholds[step.exit])
        if len(leave) == 0:
            return batch, []
        logits = answer if len(leave) == len(batch) else self.gather(answer, leave.places)
        answers = Answers(leave.rows, step.exit, logits, leave.score, leave.fault.isnan())
        return self._continue(batch, stay, index), [answers]

    def _continue(self, batch: BatchState, stay: Group, index: int) -> BatchState | None:
        """The samples that stay; the others are carried along where taking them out does not pay."""
        if len(stay) == 0:
            return None
        if self.timings is not None and not self.timings.compacts(index + 1, len(batch), len(stay)):
            batch.rows = torch.full_like(batch.rows, -1).index_copy(0, stay.places, stay.rows)
            return batch
        values = {
            name: select(value, stay.places, self.program.axes.get(name), len(batch), self.gather)
            for name, value in batch.values.items()
        }
        return BatchState(stay.rows, values, stay.fault)

    def in_order(self, answers: Sequence[Answers], count: int, first: int = 0) -> Prediction:
        """The answers of the samples numbered from ``first``, in order.

        Raises:
            FileError: a step that answered for more or fewer samples than it was given, as only a damaged package has.
        """
        if sum(len(rows) for rows, *_ in answers) != count:
            raise FileError("a step of this package lost samples, or made some up; export it again")
        device = self.program.inputs.device
        exits = torch.zeros(count, dtype=torch.int64, device=device)
        logits = torch.empty(count, self.program.num_classes, dtype=self.program.dtype, device=device)
        result = Prediction(logits, exits, torch.zeros(count, dtype=torch.float64, device=device), exits.bool())
        for rows, exit_, answer, score, non_finite in answers:
            result.logits[rows - first] = answer.to(logits.dtype)
            result.exit[rows - first] = exit_
            result.score[rows - first] = score
            result.non_finite[rows - first] = non_finite
        return result
