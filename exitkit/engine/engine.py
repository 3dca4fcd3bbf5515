"""The engine: a forward loop over the stages in which each sample stops at its exit, inside a batch."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exitkit.calibration.monitor import ShiftMonitor
from exitkit.common.batches import check_iterable, split_batch
from exitkit.common.checks import Count, check, checked_each, is_number
from exitkit.common.console import make_console
from exitkit.common.errors import ArgumentError
from exitkit.engine.loop import Loop, Prediction
from exitkit.engine.plan import Measurement, Plan
from exitkit.engine.program import Description, Inputs, Program
from exitkit.engine.scheduler import Scheduler
from exitkit.methods.policy import ExitPolicy, Threshold, as_policy, check_same_scores
from exitkit.surgery.inputs import as_call


@dataclass(frozen=True, repr=False)
class Engine:
    """What :func:`compile` and :func:`load` return; call it as the model.

    Thread-safe: nothing is kept between calls, or on a GPU what was recorded, for which calls take turns.

    Attributes:
        loop: what runs, and its policy.
        description: labels, preprocessing and exits, where the engine was loaded from a package.
        monitor: is told of every answer.
        measured: times and scores of samples, where it was compiled with some.
        whole: the program with every exit, where ``skip_unprofitable`` leaves some out.
    """

    loop: Loop
    description: Description | None = None
    monitor: ShiftMonitor | None = None
    measured: Measurement | None = None
    whole: Program | None = None

    def __post_init__(self) -> None:
        if self.whole is None:
            return
        if self.policy.guarantee is not None or self.monitor is not None:
            what = "monitor" if self.monitor is not None else "guarantee of the threshold"
            raise ArgumentError(
                f"skip_unprofitable=True leaves exits out, for which the {what} does not hold; use one of the two"
            )

    def __repr__(self) -> str:
        policy = self.policy
        return f"Engine(thresholds={policy.thresholds}, criterion={policy.criterion!r}, device={str(self.inputs.device)!r})"

    @property
    def inputs(self) -> Inputs:
        """What it takes."""
        return self.loop.program.inputs

    @property
    def policy(self) -> ExitPolicy:
        """When a sample leaves."""
        return self.loop.policy

    @property
    def thresholds(self) -> tuple[float, ...]:
        """τ of each exit before the backbone."""
        return self.policy.thresholds

    @property
    def criterion(self) -> str:
        """The score compared with τ."""
        return self.policy.criterion

    def at(self, threshold: Threshold) -> Engine:
        """The same engine with another policy, or τ; without a monitor, which compares with the old one.

        Plain numbers are compared with the scores that the engine has, after its temperatures where it has any.

        Raises:
            ArgumentError: another number of values, or of another kind, or a policy for other scores than the engine's.
        """
        policy = as_policy(threshold, self.policy)
        check_same_scores(policy, self.policy)
        loop = replace(self.loop, policy=replace(policy, dtype=self.policy.dtype))
        return planned(replace(self, loop=loop, monitor=None))

    def watched(self, monitor: ShiftMonitor) -> Engine:
        """The same engine, which tells ``monitor`` of every answer.

        Raises:
            ArgumentError: a monitor of another policy or precision than the engine's, so that all answers would look like a
                shift.
        """
        if not isinstance(monitor, ShiftMonitor):
            raise ArgumentError(f"monitor is {type(monitor).__name__}; give a ShiftMonitor of the calibration outputs")
        check_same_scores(replace(monitor.policy, guarantee=None), self.policy, "monitor")
        if monitor.policy.dtype != self.policy.dtype:
            raise ArgumentError(
                f"monitor is for scores with dtype {monitor.policy.dtype!r}, but the engine's have {self.policy.dtype!r}; "
                "collect its outputs with the model that the engine was compiled from"
            )
        if monitor.policy.thresholds != self.thresholds:
            raise ArgumentError(
                f"monitor is for τ = {monitor.policy.shown()}, but the engine has {self.policy.shown()}, so that all answers "
                "would look like a shift; make the monitor with the engine's threshold"
            )
        return replace(self, monitor=monitor)

    def plan(self) -> Plan:
        """Print what was measured where the engine was compiled with ``samples``, and what follows for its policy.

        Raises:
            ArgumentError: nothing was measured.
        """
        if self.measured is None:
            raise ArgumentError(
                "nothing was measured for this engine; compile it with samples=, inputs as they come in use: "
                "exitkit.compile(ee, threshold, samples=x)"
            )
        plan = self.measured.plan(self.policy, skipping=self.whole is not None)
        make_console().print(plan.table())
        return plan

    def warm(self, samples: Any, sizes: Sequence[int] | None = None) -> None:
        """Record the steps on a GPU now instead of at the first batch of each size.

        Args:
            samples: inputs as they come in use, at least one, on the engine's device.
            sizes: batch sizes that will come; by default all that are recorded, up to 256.

        Raises:
            ArgumentError: an engine on CPU or not optimized, which records nothing; inputs that do not fit; a size below 1.
        """
        args, kwargs = as_call(split_batch(samples)[0])
        tensors = self.inputs.checked(args, kwargs)
        chosen = None if sizes is None else checked_each("sizes", sizes, Count)
        with torch.inference_mode():
            self.loop.warm(tensors, chosen)

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction:
        """Answer a batch. Takes what the model takes, of the sizes it was attached with, and any number of samples.

        A batch for which memory does not suffice is answered in parts, with a warning. Token ids on a GPU are not compared
        with the vocabulary, for which the host would wait; one beyond it ends the process's use of the GPU.

        Raises:
            ArgumentError: other tensors than the model was attached with: names, sizes, dtype or device; token ids beyond the
                vocabulary, on a CPU; or the model was converted or moved after it was compiled.
        """
        tensors = self.inputs.checked(args, kwargs)
        with torch.inference_mode():
            return self.noted(self._answer(tensors))

    def _answer(self, tensors: tuple[Tensor, ...]) -> Prediction:
        count = tensors[0].shape[0]
        try:
            return self.loop.answer(tensors)
        except torch.OutOfMemoryError:
            if count < 2:
                raise
        half = count // 2  # outside of the except, whose traceback keeps the failed batch's tensors
        warnings.warn(f"out of memory on {count} samples; they are answered {half} at a time", stacklevel=3)
        parts = [self._answer(tuple(tensor[part] for tensor in tensors)) for part in (slice(half), slice(half, None))]
        return Prediction(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def map(
        self, batches: Iterable[Any], batch_size: int = 64, max_wait: float = float("inf")
    ) -> Generator[Prediction, None, None]:
        """Answer many batches with every stage as full as it can be: throughput rather than latency.

        Samples of different batches wait together before each stage until there are ``batch_size`` of them; with recorded
        steps on a GPU before the first stage alone.

        Args:
            batches: a loader or any iterable of inputs, ``(inputs, labels)`` or dicts.
            batch_size: how many samples a stage runs on at once.
            max_wait: seconds after which an unanswered batch is no longer held back for fuller stages. With it, batches are
                fetched in a thread, a few ahead, so that a slow iterable delays no answer.

        Yields:
            A :class:`Prediction` for each batch, in order. Memory is bounded by a fixed number of batches under way. Where
            ``batches`` raises, everything accepted before is answered first. ``close()`` stops early.

        Raises:
            ArgumentError: inputs of another kind, or a stage failed; the message names the batch.
        """
        check("batch_size", batch_size, Count)
        if not is_number(max_wait) or max_wait < 0:
            raise ArgumentError(f"max_wait={max_wait!r} must be a number of seconds of at least 0")
        check_iterable(batches, "batches")
        return self._mapped(Scheduler(replace(self.loop, timings=None), batch_size, max_wait).run(batches))

    def _mapped(self, answers: Generator[Prediction, None, None]) -> Generator[Prediction, None, None]:
        with closing(answers):
            for prediction in answers:
                yield self.noted(prediction)

    def noted(self, prediction: Prediction) -> Prediction:
        """The same answers, of which the monitor has been told where there is one; calls and ``map`` have done so."""
        if self.monitor is not None:
            sound = ~prediction.non_finite
            self.monitor.update(prediction.exit[sound], prediction.score[sound])
        return prediction


def planned(engine: Engine) -> Engine:
    """The engine as its measured times ask for with its policy: where it waits, and which exits it leaves out."""
    if engine.measured is None:
        return engine
    plan = engine.measured.plan(engine.policy, skipping=engine.whole is not None)
    loop = engine.loop.waiting(plan.waits())
    if engine.whole is not None:
        loop = replace(loop, program=engine.whole.without(plan.skipped))
    return replace(engine, loop=loop)


def with_every_exit(engine: Engine) -> Engine:
    """The engine with the exits that were left out."""
    if engine.whole is None:
        return engine
    return replace(engine, loop=replace(engine.loop, program=engine.whole), whole=None)
