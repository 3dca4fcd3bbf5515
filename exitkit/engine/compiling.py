"""``compile``: from a multi-exit model and a threshold to an engine."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch

from exitkit.calibration.monitor import ShiftMonitor
from exitkit.common.batches import split_batch
from exitkit.common.checks import check
from exitkit.common.errors import ArgumentError
from exitkit.engine.aot import optimized
from exitkit.engine.engine import Engine, planned
from exitkit.engine.exported import example_of
from exitkit.engine.loop import Loop
from exitkit.engine.lowering import program_of
from exitkit.engine.profiling import measure
from exitkit.engine.program import Program
from exitkit.methods.criteria import Criterion
from exitkit.methods.policy import ExitPolicy, Threshold
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import in_own_precision
from exitkit.surgery.inputs import as_call


def compile(
    model: MultiExitModel,
    threshold: Threshold | None = None,
    *,
    criterion: str | Criterion | None = None,
    optimize: bool = False,
    samples: Any = None,
    skip_unprofitable: bool = False,
    monitor: ShiftMonitor | None = None,
) -> Engine:
    """An engine that really stops each sample at its exit.

    Args:
        model: what :func:`exitkit.attach` returned. Its weights are shared; it runs in eval mode.
        threshold: τ, one τ for each exit before the backbone, or a policy, such as :func:`exitkit.choose_threshold` and the
            points of a curve are; by default the one saved with the model. A sample leaves at the first exit whose score is
            strictly above it. A policy brings its temperatures: logits are divided by them for the score, and answers stay
            the same.
        criterion: ``"confidence"``, ``"entropy"``, ``"nats"``, ``"margin"`` or ``"patience"``, for regression
            ``"tolerance"``; by default the method's, or the policy's own.
        optimize: compile every stage together with its exit by AOTInductor, for any batch size, with BatchNorm folded
            into convolutions; on CUDA replayed from CUDA graphs, with decision and compaction in Triton. Takes seconds to
            minutes; later changes of the model's weights have no effect.
        samples: inputs as they come in use, on which the steps are timed on this device, as one batch. Samples then leave
            a batch only where going on without them is faster. :meth:`Engine.plan` shows it. A warning says where all exits
            together cost more time than they save.
        skip_unprofitable: leave out the exits that cost more time than they save, by these times and for these samples;
            worked out anew by :meth:`Engine.at`. For exits that do not read one another.
        monitor: is told of every answer, so that it can say when production is no longer like calibration.

    Raises:
        ArgumentError: not a multi-exit model, no threshold, values of another number or kind, an unknown criterion, samples
            that do not fit the model, a guarantee for another criterion or precision, a monitor of another policy,
            ``skip_unprofitable`` where exits read one another, without samples, or with a guarantee or a monitor.
    """
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(f"model is {type(model).__name__}; compile takes what exitkit.attach(model) returns")
    check("optimize", optimize, bool)
    check("skip_unprofitable", skip_unprofitable, bool)
    policy = model.policy_for(threshold, criterion)
    removable = not model.method.linked and not policy.score.memory
    if skip_unprofitable and (not removable or samples is None):
        raise ArgumentError(
            "skip_unprofitable=True needs samples= to measure on, and exits that do not read one another "
            f"(method={model.method.name!r}, criterion={policy.criterion!r}); leave it out"
        )
    eager = program_of(model, policy, removable=skip_unprofitable)
    loop = _optimized(model, eager, policy) if optimize else Loop(eager, policy)
    engine = Engine(loop)
    if samples is not None:
        engine = _measured(engine, eager, samples)
    engine = planned(replace(engine, whole=engine.loop.program if skip_unprofitable else None))
    _warn_of_loss(engine)
    return engine if monitor is None else engine.watched(monitor)


def _optimized(model: MultiExitModel, program: Program, policy: ExitPolicy) -> Loop:
    """Compiled steps; on CUDA also recorded."""
    with in_own_precision(program.inputs.device):
        return fastest(optimized(program, example_of(model)), policy)


def fastest(program: Program, policy: ExitPolicy) -> Loop:
    """The loop for compiled steps on their device."""
    if program.inputs.device.type != "cuda":
        return Loop(program, policy)
    from exitkit.engine.cuda.graphs import graph_loop

    return graph_loop(program, policy)


def _warn_of_loss(engine: Engine) -> None:
    """Say where the exits cost more time than they save; not where no sample may leave, as to measure times."""
    if engine.measured is None or math.inf in engine.policy.thresholds:
        return
    assert engine.measured is not None
    plan = engine.measured.plan(engine.policy, skipping=engine.whole is not None)
    batch = plan.timings.sizes[-1]
    if (gain := plan.total_gain(batch)) < 0:
        warnings.warn(
            f"on these {batch} samples the exits cost {-1e3 * gain:.2f} ms more than they save; engine.plan() shows each. "
            "Attach fewer exits, use optimize=True, or choose a lower threshold",
            stacklevel=3,
        )


def _measured(engine: Engine, eager: Program, samples: Any) -> Engine:
    """The engine with times measured on ``samples``, by which its loop compacts."""
    args, kwargs = as_call(split_batch(samples)[0])
    tensors = eager.inputs.checked(args, kwargs)
    if not len(tensors[0]):
        raise ArgumentError("samples is an empty batch; give inputs as they come in use, as many as in a batch")
    with torch.inference_mode():
        measured = measure(engine.loop, eager, tensors)
    return replace(engine, loop=replace(engine.loop, timings=measured.timings), measured=measured)
