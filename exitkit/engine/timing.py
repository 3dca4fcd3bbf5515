"""``time_exits``: what answering at each exit takes, measured on the engine itself."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from exitkit.common.batches import split_batch
from exitkit.common.checks import Count, check, checked_each
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError
from exitkit.engine.engine import Engine, with_every_exit
from exitkit.evaluation.exit_times import ExitTimes
from exitkit.surgery.inputs import Example, call_on

_ROUNDS = 7


def time_exits(engine: Engine, samples: Any, batches: Sequence[int] = (1, 64)) -> tuple[ExitTimes, ...]:
    """Time batches that leave as a whole at exit 0, at exit 1, …, at the backbone: medians of several rounds in turn.

    Give them to ``outputs.timed(times)``; thresholds can then be found for milliseconds.

    Args:
        engine: as it will be used: optimized or not, with any threshold, or loaded from a package.
        samples: inputs as they come in use, on the engine's device; repeated where a batch takes more.
        batches: batch sizes.

    Returns:
        One record for each batch size. Where an exit is measured as taking less than one before it, by chance, it gets the
        time of that one.

    Raises:
        ArgumentError: not an engine, inputs that it does not take, or a batch below 1.
    """
    if not isinstance(engine, Engine):
        raise ArgumentError(f"engine is {type(engine).__name__}; give what exitkit.compile or exitkit.load returned")
    sizes = checked_each("batches", batches, Count, "such as [1, 64]")
    check("len(batches)", len(sizes), Count)
    given = Example.of(split_batch(samples)[0])
    return tuple(_times(engine, given.with_batch(int(size))) for size in sizes)


def _times(engine: Engine, example: Example) -> ExitTimes:
    batch, exits = example.spec.batch(example.tensors), len(engine.thresholds)
    whole = with_every_exit(engine)
    engines = [whole.at([float("inf")] * m + [float("-inf")] * (exits - m)) for m in range(exits + 1)]
    seconds: list[list[float]] = [[] for _ in engines]
    for _ in range(_ROUNDS + 1):
        for times, leaving in zip(seconds, engines, strict=True):
            started = time.perf_counter()
            call_on(leaving, batch)
            if engine.inputs.device.type == "cuda":
                torch.cuda.synchronize(engine.inputs.device)
            times.append(time.perf_counter() - started)
    medians = [1e3 * statistics.median(times[1:]) for times in seconds]  # the first round warms up
    device = engine.inputs.device
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"
    )
    rising = tuple(np.maximum.accumulate(medians).tolist())
    return ExitTimes(device.type, hardware, len(example.tensors[0]), rising)
