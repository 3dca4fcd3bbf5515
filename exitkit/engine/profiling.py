"""Profiling: every step, head, decision and compaction timed on this device, at a few batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from exitkit.engine.loop import Loop
from exitkit.engine.lowering import StageWithExit
from exitkit.engine.plan import Measurement, Timings
from exitkit.engine.program import Program

_REPEATS = 5
_SHORT = 30
"""Repeats of what takes microseconds."""


def measure(loop: Loop, eager: Program, tensors: Sequence[Tensor]) -> Measurement:
    """Time the steps of ``loop`` on samples (N, …), and score these at every exit.

    Args:
        loop: with every exit.
        eager: the loop's program before any compilation, in which an exit can be timed without its stage.
        tensors: samples as they come in use.
    """
    scores = _scores(loop, tensors).cpu().numpy()
    tensors = [tensor[: loop.largest] for tensor in tensors]
    count = len(tensors[0])
    sizes = tuple(dict.fromkeys([*(4**power for power in range(10) if 4**power < count), count]))
    columns = [_times(loop, eager, [tensor[:size] for tensor in tensors]) for size in sizes]
    seconds, heads, gathers = (tuple(zip(*rows, strict=True)) for rows in zip(*columns, strict=True))
    compiled = not isinstance(loop.program.steps[0].run, StageWithExit)
    eagerly = compiled and any(step.stage is None for step in loop.program.steps[:-1])
    timings = Timings(sizes, seconds, heads, gathers, tuple(decision_seconds(loop, tensors)), eagerly)
    return Measurement(timings, scores)


def all_stay(loop: Loop) -> Loop:
    """The loop in which no sample leaves before the backbone, or is taken out of the batch."""
    return replace(loop, policy=loop.policy.at(float("inf")), timings=None)


def _times(loop: Loop, eager: Program, tensors: Sequence[Tensor]) -> tuple[list[float], list[float], list[float]]:
    """Seconds of every step, exit and compaction, when all samples come to all of them."""
    staying, axes, device = all_stay(loop), loop.program.axes, loop.program.inputs.device
    bare = replace(staying, program=loop.program.without([step.exit for step in loop.program.steps if step.stage]))
    for one in (bare, staying):
        one.answer(tensors)  # where steps are recorded, at this size
    batch = staying.start(tensors)
    half = np.arange((len(batch) + 1) // 2)
    seconds, heads, gathers = [], [], []
    for index, step in enumerate(loop.program.steps):
        gathers.append(median_seconds(partial(batch.select, half, axes), device))
        seconds.append(median_seconds(staying.step_runner(index, batch), device))
        if step.stage is not None:  # run in the same way, without the exit
            heads.append(max(0.0, seconds[-1] - median_seconds(bare.step_runner(index, batch), device)))
        else:
            heads.append(_exit_seconds(eager, index, [batch.values[name] for name in step.inputs]))
        batch = staying.run_step(batch, index)[0] or batch
    return seconds, heads, gathers


def _scores(loop: Loop, tensors: Sequence[Tensor]) -> Tensor:
    """(N, M) scores at every exit before the backbone."""
    most = loop.largest or len(tensors[0])
    parts = [[tensor[start : start + most] for tensor in tensors] for start in range(0, len(tensors[0]), most)]
    return torch.cat([_scores_of(loop, part) for part in parts])


def _scores_of(loop: Loop, tensors: Sequence[Tensor]) -> Tensor:
    batch, scores = all_stay(loop).start(tensors), []
    for step in loop.program.steps[:-1]:
        made = step.run(*(batch.values[name] for name in step.inputs))
        batch.values |= dict(zip(step.outputs, made, strict=False))
        scores.append(made[-1])
    return torch.stack(scores, 1)


def decision_seconds(loop: Loop, tensors: Sequence[Tensor]) -> list[float]:
    """Seconds that each exit's decision and compaction take when all samples come to it and every other one leaves.

    That is all that the loop does between two steps: scores against τ, the answers of those that leave, and every value of
    those that go on. Recorded steps do this themselves; then it is the host's wait for how many go on. An exit that was left
    out takes none.
    """
    staying, halved = all_stay(loop), replace(loop, policy=loop.policy.at(0.5), timings=None)
    batch = staying.start(tensors)
    score = (torch.arange(len(batch), device=loop.program.inputs.device) % 2 == 0).double()
    answer = score.new_zeros(len(batch), loop.program.num_classes, dtype=loop.program.dtype)
    seconds = []
    for index, step in enumerate(loop.program.steps[:-1]):
        batch = staying.run_step(batch, index)[0] or batch
        run = halved.decision_runner(batch, index, answer, score)
        seconds.append(median_seconds(run, loop.program.inputs.device, _SHORT) if step.decides else 0.0)
    return seconds


def _exit_seconds(eager: Program, index: int, values: Sequence[Any]) -> float:
    """The exit without its stage."""
    if index == len(eager.steps) - 1:
        return 0.0
    module = cast("StageWithExit", eager.steps[index].run)
    assert module.exit is not None
    named = dict(zip(module.inputs, values, strict=True))
    feature = module.stage(*(named[name] for name in module.stage_inputs))[0]
    exit_ = module.exit
    return median_seconds(lambda: exit_(feature, dict(named)), eager.inputs.device)


def median_seconds(run: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> float:
    """The median of several runs, until the device has done them, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
