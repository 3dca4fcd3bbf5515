"""Measuring a plan: every step, head, decision and compaction timed on this device, at a few batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from exitkit.engine.batch_state import Flight
from exitkit.engine.loop import Loop
from exitkit.engine.lowering import StageWithExit
from exitkit.engine.plan import Plan
from exitkit.engine.program import Program

_REPEATS = 5
_SHORT = 30
"""Repeats of what takes microseconds."""


def measure(loop: Loop, eager: Program, tensors: Sequence[Tensor], independent: bool) -> Plan:
    """Time the steps of ``loop`` on samples (N, …), and see where they leave.

    Args:
        loop: with the thresholds that will be used.
        eager: the loop's program before any compilation, in which an exit can be timed without its stage.
        tensors: samples as they come in use.
        independent: whether no exit reads an earlier one, so that an exit that does not pay can be left out.
    """
    count = len(tensors[0])
    sizes = tuple(dict.fromkeys([*(4**power for power in range(10) if 4**power < count), count]))
    columns = [_times(loop, eager, [tensor[:size] for tensor in tensors]) for size in sizes]
    seconds, heads, gathers = (tuple(zip(*rows, strict=True)) for rows in zip(*columns, strict=True))
    decisions = tuple(decision_seconds(loop, tensors))
    plan = Plan(sizes, seconds, heads, gathers, decisions, _reached(loop, tensors))
    if not independent:
        return plan
    return replace(plan, skipped=tuple(m for m in range(len(seconds) - 1) if plan.gain(m, count) <= 0))


def _times(loop: Loop, eager: Program, tensors: Sequence[Tensor]) -> tuple[list[float], list[float], list[float]]:
    """Seconds of every step, exit and compaction, when all samples come to all of them."""
    everyone = replace(loop, thresholds=(float("inf"),) * len(loop.thresholds), plan=None)
    axes, steps = loop.program.axes, loop.program.steps
    flight = everyone.enter(tensors)
    half = torch.arange((len(flight) + 1) // 2, device=flight.rows.device)
    seconds, heads, gathers = [], [], []
    for index, step in enumerate(steps):
        values = [flight.values[name] for name in step.inputs]
        gathers.append(_seconds(partial(flight.select, half, axes)))
        seconds.append(_seconds(partial(step.run, *values)))
        heads.append(_exit_seconds(eager, index, values))
        flight = everyone.advance(flight, index)[0] or flight
    return seconds, heads, gathers


def decision_seconds(loop: Loop, tensors: Sequence[Tensor]) -> list[float]:
    """Seconds that each exit's decision and compaction take when all samples come to it and every other one leaves.

    That is all that the loop does between two steps: scores against τ, the answers of those that leave, and every value of
    those that go on. An exit that was left out takes none.
    """
    everyone = replace(loop, thresholds=(float("inf"),) * len(loop.thresholds), plan=None)
    halved = replace(loop, thresholds=(0.5,) * len(loop.thresholds), plan=None)
    flight = everyone.enter(tensors)
    score = (torch.arange(len(flight), device=flight.rows.device) % 2 == 0).float()
    answer = score.new_zeros(len(flight), loop.program.num_classes)
    seconds = []
    for index, step in enumerate(loop.program.steps[:-1]):
        flight = everyone.advance(flight, index)[0] or flight
        alone = len(flight) == 1  # then it is one number that comes to the host
        run: Callable[[], Any] = (
            partial(float, score) if alone else partial(_parted, halved, flight, index, answer, score)
        )
        seconds.append(_seconds(run, _SHORT) if step.decides else 0.0)
    return seconds


def _parted(loop: Loop, flight: Flight, index: int, answer: Tensor, score: Tensor) -> None:
    loop.part(replace(flight), index, answer, score)


def _exit_seconds(eager: Program, index: int, values: Sequence[Any]) -> float:
    """The exit without its stage."""
    if index == len(eager.steps) - 1:
        return 0.0
    module = cast("StageWithExit", eager.steps[index].run)
    named = dict(zip(module.inputs, values, strict=True))
    feature = module.stage(*(named[name] for name in module.stage_inputs))[0]
    return _seconds(lambda: module.leave(feature, dict(named)))


def _reached(loop: Loop, tensors: Sequence[Tensor]) -> tuple[float, ...]:
    """The share of the samples that comes to each step."""
    flight: Flight | None = loop.enter(tensors)
    counts = []
    for index in range(len(loop.program.steps)):
        counts.append(0 if flight is None else len(flight))
        flight = None if flight is None else loop.advance(flight, index)[0]
    return tuple(count / counts[0] for count in counts)


def _seconds(run: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """The median of several runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
