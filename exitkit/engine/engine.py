"""The engine: a forward loop over the stages in which each sample stops at its exit, inside a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from exitkit.calibration.monitor import ShiftMonitor
from exitkit.calibration.risk_control import ChosenThreshold
from exitkit.calibration.thresholds import Threshold, check_calibrated, numbers, temperatures_for
from exitkit.common.batches import check_iterable, split_batch
from exitkit.common.checks import is_number
from exitkit.common.console import make_console
from exitkit.common.errors import ArgumentError, unknown_name
from exitkit.engine.aot import optimized
from exitkit.engine.batch_state import Flight
from exitkit.engine.exported import example_of
from exitkit.engine.loop import Departure, Loop, Prediction
from exitkit.engine.lowering import dtype_of, program_of
from exitkit.engine.plan import Plan
from exitkit.engine.profiling import measure
from exitkit.engine.program import Description, Inputs, Program
from exitkit.engine.scheduler import Refill
from exitkit.methods.criteria import Criterion
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.inputs import as_call

_LARGEST_RECORDED = 256
"""Batches above run without CUDA graphs."""


@dataclass(frozen=True)
class Engine:
    """What :func:`compile` and :func:`load` return; call it as the model. Thread-safe: nothing is kept between calls."""

    loop: Loop
    description: Description | None = None
    """Labels, preprocessing and exits, where the engine was loaded from a package."""
    monitor: ShiftMonitor | None = None
    """Is told of every answer."""

    @property
    def inputs(self) -> Inputs:
        """What it takes."""
        return self.loop.program.inputs

    def at(self, threshold: Threshold) -> Engine:
        """The same engine with another τ, or one for each exit; without a monitor, which compares with the old one.

        A plain number is compared with the scores that the engine has, after its temperatures where it has any.

        Raises:
            ExitkitError: one of the wrong length or that is no number, a τ found with other temperatures than the engine's,
                a guarantee for another criterion or precision.
        """
        program, taus = self.loop.program, numbers(threshold, len(self.thresholds))
        check_calibrated(threshold, program.criterion, program.dtype, program.temperatures)
        promised = threshold.guarantee if isinstance(threshold, ChosenThreshold) else None
        told = None if self.description is None else replace(self.description, thresholds=taus, guarantee=promised)
        return Engine(replace(self.loop, thresholds=taus), told)

    def watched(self, monitor: ShiftMonitor) -> Engine:
        """The same engine, which tells ``monitor`` of every answer.

        Raises:
            ExitkitError: a monitor of other scores than the engine's.
        """
        if not isinstance(monitor, ShiftMonitor):
            raise ArgumentError(f"monitor is {type(monitor).__name__}; give a ShiftMonitor of the calibration outputs")
        program = self.loop.program
        for name, expected, used in (
            ("criterion", monitor.criterion, program.criterion),
            ("temperatures", monitor.temperatures, program.temperatures),
        ):
            if expected != used:
                raise ArgumentError(
                    f"monitor compares scores with {name} {expected!r}, but the engine's have {used!r}, so that all would "
                    f"look like a shift; make the monitor of outputs with the same {name}"
                )
        return replace(self, monitor=monitor)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """τ of each exit before the backbone."""
        return self.loop.thresholds

    @property
    def criterion(self) -> Criterion:
        """The score compared with τ."""
        return self.loop.program.criterion

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction:
        """Answer a batch. Takes what the model takes, of the sizes it was attached with, and any number of samples.

        A batch for which memory does not suffice is answered in parts, with a warning.

        Raises:
            ExitkitError: other tensors than the model was attached with: names, sizes, dtype or device.
        """
        tensors = self.loop.program.inputs.checked(args, kwargs)
        with torch.inference_mode():
            return self._noted(self._answer(tensors))

    def plan(self) -> Plan:
        """Print what was measured where the engine was compiled with ``samples``, and what follows from it.

        Raises:
            ExitkitError: nothing was measured.
        """
        if self.loop.plan is None:
            raise ArgumentError(
                "nothing was measured for this engine; compile it with samples=, inputs as they come in use: "
                "exitkit.compile(ee, threshold, samples=x)"
            )
        make_console().print(self.loop.plan.table())
        return self.loop.plan

    def _answer(self, tensors: tuple[Tensor, ...]) -> Prediction:
        count = len(tensors[0])
        if count == 1:
            return self.loop.alone(tensors)
        try:
            departures = self._run(tensors) if count else []
        except torch.OutOfMemoryError:
            pass
        else:
            return self.loop.landed(departures, count)
        half = count // 2  # outside of the except, whose traceback keeps the failed batch's tensors
        warnings.warn(f"out of memory on {count} samples; they are answered {half} at a time", stacklevel=3)
        parts = [self._answer(tuple(tensor[part] for tensor in tensors)) for part in (slice(half), slice(half, None))]
        return Prediction(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _run(self, tensors: tuple[Tensor, ...]) -> list[Departure]:
        flight: Flight | None = self.loop.enter(tensors)
        departures: list[Departure] = []
        for index in range(len(self.loop.program.steps)):
            if flight is not None:
                flight, departed = self.loop.advance(flight, index)
                departures += departed
        return departures

    def map(
        self, batches: Iterable[Any], batch_size: int = 64, max_wait: float = float("inf")
    ) -> Iterator[Prediction]:
        """Answer many batches with every stage as full as it can be: throughput rather than latency.

        Samples of different batches wait together before each stage until there are ``batch_size`` of them.

        Args:
            batches: a loader or any iterable of inputs, ``(inputs, labels)`` or dicts.
            batch_size: how many samples a stage runs on at once.
            max_wait: seconds after which an unanswered batch is no longer held back for fuller stages.

        Yields:
            A :class:`Prediction` for each batch, in order. Memory is bounded by a fixed number of batches under way.

        Raises:
            ExitkitError: inputs of another kind, or a stage failed; the message names the batch.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(f"batch_size={batch_size!r} must be a whole number greater than 0")
        if not is_number(max_wait) or max_wait < 0:
            raise ArgumentError(f"max_wait={max_wait!r} must be a number of seconds of at least 0")
        check_iterable(batches, "batches")
        return map(self._noted, Refill(replace(self.loop, plan=None), batch_size, max_wait).run(batches))

    def _noted(self, prediction: Prediction) -> Prediction:
        if self.monitor is not None:
            sound = ~prediction.non_finite
            self.monitor.update(prediction.exit[sound], prediction.score[sound])
        return prediction


def compile(
    model: MultiExitModel,
    threshold: Threshold | None = None,
    *,
    criterion: Criterion | None = None,
    optimize: bool = False,
    samples: Any = None,
    monitor: ShiftMonitor | None = None,
) -> Engine:
    """An engine that really stops each sample at its exit.

    Args:
        model: what :func:`exitkit.attach` returned. Its weights are shared; it runs in eval mode.
        threshold: τ, one τ for each exit before the backbone, or what :func:`exitkit.choose_threshold` returned; by default
            the one saved with the model. A sample leaves at the first exit whose score is strictly above it. One that was
            found on ``outputs.calibrated(temperatures)`` brings its temperatures: logits are divided by them for the score,
            and answers stay the same.
        criterion: ``"confidence"``, ``"entropy"``, ``"nats"``, ``"margin"`` or ``"patience"``, for regression
            ``"tolerance"``; by default the method's.
        optimize: compile every stage together with its exit by AOTInductor, for any batch size; on CPU with BatchNorm
            folded into convolutions, on CUDA replayed from CUDA graphs, with decision and compaction in Triton. Takes seconds
            to minutes; later changes of the model's weights have no effect.
        samples: inputs as they come in use, on which the steps are timed on this device, as one batch. Samples then leave
            a batch only where going on without them is faster, and an exit that costs more than it saves is left out
            where no later one reads it. :meth:`Engine.plan` shows it.
        monitor: is told of every answer, so that it can say when production is no longer like calibration.

    Raises:
        ExitkitError: not a multi-exit model, no threshold, one of the wrong length or that is no number, an unknown
            criterion, samples that do not fit the model, a guarantee for another criterion or precision, temperatures of
            another number of exits, a monitor of other scores.
    """
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(f"model is {type(model).__name__}; compile takes what exitkit.attach(model) returns")
    criterion = checked_criterion(model, criterion)
    threshold = resolved_threshold(model, threshold)
    thresholds = numbers(threshold, len(model.classifiers))
    program = checked_program(model, threshold, criterion)
    loop = _optimized(model, program, thresholds) if optimize else Loop(program, thresholds)
    engine = Engine(loop if samples is None else _planned(model, loop, program, samples))
    return engine if monitor is None else engine.watched(monitor)


def _optimized(model: MultiExitModel, program: Program, thresholds: tuple[float, ...]) -> Loop:
    """Compiled steps; on CUDA also recorded, with the kernels of the decision."""
    compiled = optimized(program, example_of(model))
    if program.inputs.device.type != "cuda":
        return Loop(compiled, thresholds)
    from exitkit.engine.cuda.graphs import graphed
    from exitkit.engine.cuda.kernels import gather, split

    return Loop(graphed(compiled, _LARGEST_RECORDED), thresholds, split=split, gather=gather)


def _planned(model: MultiExitModel, loop: Loop, eager: Program, samples: Any) -> Loop:
    """The loop with a plan measured on ``samples``, without the exits that do not pay."""
    args, kwargs = as_call(split_batch(samples)[0])
    tensors = eager.inputs.checked(args, kwargs)
    if not len(tensors[0]):
        raise ArgumentError("samples is an empty batch; give inputs as they come in use, as many as in a batch")
    method = model.method
    linked = method.cascade or method.past_future is not None or model.combiners
    independent = not linked and eager.criterion not in ("patience", "tolerance")
    with torch.inference_mode():
        plan = measure(loop, eager, tensors, independent)
    if not plan.skipped:
        return replace(loop, plan=plan)
    program = program_of(model, eager.criterion, eager.temperatures, plan.skipped)
    if loop.program is eager:
        return replace(loop, program=program, plan=plan)
    return replace(_optimized(model, program, loop.thresholds), plan=plan)


def checked_criterion(model: MultiExitModel, criterion: Any) -> Criterion:
    """A known criterion; by default the method's."""
    criterion = criterion or model.method.criterion
    if criterion not in get_args(Criterion):
        raise unknown_name("criterion", criterion, get_args(Criterion))
    if (criterion == "tolerance") != model.regression:
        raise ArgumentError(
            f"criterion={criterion!r} is not for this model: 'tolerance' is for regression, the others are for classes"
        )
    chosen: Criterion = criterion
    return chosen


def resolved_threshold(model: MultiExitModel, threshold: Threshold | None) -> Threshold:
    """The threshold that is given, or the one saved with the model."""
    threshold = model.threshold if threshold is None else threshold
    if threshold is None:
        raise ArgumentError(
            "threshold=None, and none was saved with the model; choose one on held-out samples: "
            "exitkit.collect(ee, loader).curve().at_budget(0.5).threshold"
        )
    return threshold


def checked_program(model: MultiExitModel, threshold: Threshold, criterion: Criterion) -> Program:
    """The model's program for this threshold: with its temperatures, and refused where a guarantee is for other scores."""
    temperatures = temperatures_for(threshold, len(model.classifiers))
    if temperatures is not None and model.regression:
        raise ArgumentError("threshold has temperatures, but predictions of a regression have none; give a plain τ")
    check_calibrated(threshold, criterion, dtype_of(model), temperatures)
    return program_of(model, criterion, temperatures)
