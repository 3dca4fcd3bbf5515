"""The loop: one step after another for the samples that have no answer yet, and the answers in the callers' order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.common.errors import ArgumentError, FileError
from exitkit.engine.batch_state import BatchState, Places, on_device
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
    """Samples that have just been answered; ``rows`` are the callers' numbers. Logits are on the device."""

    rows: Places
    exit: NDArray[np.int64]
    logits: Tensor
    score: NDArray[np.float64]
    non_finite: NDArray[np.bool_]

    def part(self, places: Places) -> Answers:
        """Those at some places, which ascend."""
        if len(places) == len(self.rows):
            return self
        logits = self.logits.index_select(0, on_device(places, self.logits.device))
        return Answers(self.rows[places], self.exit[places], logits, self.score[places], self.non_finite[places])


def run(step: Step, values: Mapping[str, Any]) -> Sequence[Any]:
    """What a step makes of the values.

    Raises:
        ArgumentError: the model was converted to another dtype, or moved, after it was compiled.
    """
    try:
        return step.run(*map(values.__getitem__, step.inputs))
    except RuntimeError as error:
        if isinstance(step.run, StageWithExit) and step.run.converted():
            raise ArgumentError(
                "the model was converted to another dtype or moved to another device after it was compiled, and the engine "
                "shares its weights; compile it again"
            ) from error
        raise


@dataclass(frozen=True)
class Loop:
    """What the engine does with a batch, step by step: plain torch, for every device. Keeps nothing between calls.

    The host waits for the device once for each decision: for the scores, on which it decides.

    Attributes:
        program: what runs.
        policy: when a sample leaves.
        timings: where samples that have their answer are taken out of the batch; everywhere, without them.
    """

    program: Program
    policy: ExitPolicy
    timings: Timings | None = None

    @property
    def largest(self) -> int | None:
        """How many samples a step is run on at most; None for any number."""
        return None

    @property
    def queues(self) -> int:
        """Before how many steps, from the first on, samples of several batches wait to run together."""
        return len(self.program.steps)

    def answer(self, tensors: Sequence[Tensor]) -> Prediction:
        """Answer a batch."""
        count = tensors[0].shape[0]
        if count == 1:
            return self.single(tensors)
        return self.in_order(self.run_steps(self.start(tensors)) if count else [], count)

    def warm(self, tensors: Sequence[Tensor], sizes: Sequence[int] | None) -> None:
        """Nothing is prepared at first use here.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            f"engine.warm is for engines with optimize=True on a GPU; this one runs on {self.program.inputs.device} as it is"
        )

    def waiting(self, waits: tuple[bool, ...]) -> Loop:
        """The loop that waits for these exits' decisions alone; this one decides on the host, and waits for each."""
        return self

    def step_runner(self, index: int, batch: BatchState) -> Callable[[], Any]:
        """A step on a batch as the loop runs it, without the decision: to be timed."""
        step = self.program.steps[index]
        return partial(step.run, *[batch.values[name] for name in step.inputs])

    def decision_runner(self, batch: BatchState, index: int, answer: Tensor, score: Tensor) -> Callable[[], Any]:
        """The decision after a step, as far as it is not in the step itself: to be timed."""
        if len(batch) == 1:  # then it is one number that comes to the host
            return partial(float, score)
        return lambda: self.decide(replace(batch), index, answer, score)

    def single(self, tensors: Sequence[Tensor]) -> Prediction:
        """The answer of one sample: decisions on plain numbers, which take less time than arrays."""
        values = dict(zip(self.program.inputs.names, tensors, strict=True))
        finite = True
        for step, threshold in zip(self.program.steps, (*self.policy.thresholds, float("-inf")), strict=True):
            made = run(step, values)
            values |= zip(step.outputs, made, strict=False)  # those that no later step reads are small, and may stay
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
        rows = np.arange(first, first + len(tensors[0]))
        return BatchState(rows, dict(zip(self.program.inputs.names, tensors, strict=True)), np.zeros(len(rows), bool))

    def run_steps(self, batch: BatchState | None) -> list[Answers]:
        """Run every step on a batch that stands before the first."""
        answers: list[Answers] = []
        for index in range(len(self.program.steps)):
            if batch is not None:
                batch, left = self.run_step(batch, index)
                answers += left
        return answers

    def run_queued(self, batch: BatchState, index: int) -> tuple[BatchState | None, list[Answers]]:
        """Run what lies between one queue and the next, which is one step; as :meth:`run_step`."""
        return self.run_step(batch, index)

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
        """The decision after a step that gave this answer (B, C) and score (B,): as :meth:`run_step` returns it.

        Raises:
            FileError: a step that answered for more or fewer samples than it was given, as only a damaged package has.
        """
        exit_, last = self.program.steps[index].exit, index == len(self.program.steps) - 1
        sure = score.cpu().numpy()
        if len(sure) != len(batch):
            raise FileError("a step of this package lost samples, or made some up; export it again")
        batch.faulty = batch.faulty | ~np.isfinite(sure)
        present = batch.rows >= 0
        leaves = present if last else present & (sure > self._limits(batch, exit_))
        places = np.flatnonzero(leaves)
        if not len(places):
            return batch, []
        logits = answer if len(places) == len(batch) else answer.index_select(0, on_device(places, answer.device))
        exits = np.full(len(places), exit_, np.int64)
        answers = Answers(batch.rows[places], exits, logits, sure[places], batch.faulty[places])
        return self._continue(batch, np.flatnonzero(present & ~leaves), index), [answers]

    def _limits(self, batch: BatchState, exit_: int) -> float | NDArray[np.float64]:
        return self.policy.thresholds[exit_] if batch.thresholds is None else batch.thresholds[:, exit_]

    def _continue(self, batch: BatchState, stay: Places, index: int) -> BatchState | None:
        """The samples that stay; the others are carried along where taking them out does not pay."""
        if not len(stay):
            return None
        if self.timings is None or self.timings.compacts(index + 1, len(batch), len(stay)):
            return batch.select(stay, self.program.axes)
        rows = np.full_like(batch.rows, -1)
        rows[stay] = batch.rows[stay]
        batch.rows = rows
        return batch

    def in_order(self, answers: Sequence[Answers], count: int, first: int = 0) -> Prediction:
        """The answers of the samples numbered from ``first``, in order.

        Raises:
            FileError: some without an answer, as only a damaged package leaves them.
        """
        device, dtype = self.program.inputs.device, self.program.dtype
        if not count:
            logits = torch.empty(0, self.program.num_classes, dtype=dtype, device=device)
            return Prediction(
                logits, *(logits.new_empty(0, dtype=kind) for kind in (torch.int64, torch.float64, torch.bool))
            )
        rows = np.concatenate([np.empty(0, np.int64), *(one.rows for one in answers)]) - first
        if len(rows) != count:
            raise FileError("a step of this package lost samples, or made some up; export it again")
        order = np.argsort(rows)
        columns = [np.concatenate([one[field] for one in answers]) for field in (1, 3, 4)]
        logits = torch.cat([one.logits.to(dtype) for one in answers])
        if len(answers) > 1 or not np.array_equal(rows, order):
            logits = logits.index_select(0, on_device(order, device))
        return Prediction(logits, *(on_device(column[order], device) for column in columns))
