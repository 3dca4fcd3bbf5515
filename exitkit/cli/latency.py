"""``exitkit bench-latency``: what a package takes on real inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file

from exitkit.cli.inference import tensors_of
from exitkit.common.console import counted, tracked
from exitkit.common.errors import ArgumentError, FileError
from exitkit.engine import Engine
from exitkit.engine.profiling import decision_seconds
from exitkit.packages.onnx_branches import OnnxBranches
from exitkit.report.run import INPUTS
from exitkit.surgery.inputs import Example, call_on

_REPEATS = 30
_MOST = 64
"""Samples that are timed on."""


@dataclass(frozen=True)
class Latency:
    """What batches of one size take.

    Attributes:
        batch: samples in one.
        samples: how many different ones there were.
        mean_ms: of the time of a batch, in milliseconds.
        late_ms: its 95th percentile.
        no_exits_ms: the mean of a run in which no sample leaves; None for a graph, whose thresholds are fixed.
        average_exit: at which samples left.
        exit_us: what an exit adds to its stage and head, in microseconds: the decision and the compaction, half of the batch
            leaving, mean over the exits; None for a graph.
    """

    batch: int
    samples: int
    mean_ms: float
    late_ms: float
    no_exits_ms: float | None
    average_exit: float
    exit_us: float | None


def latencies(package: Engine | OnnxBranches, samples: Any, batches: Sequence[int]) -> list[Latency]:
    """Times of batches of each size.

    Every run takes other samples, in turn: what a batch costs depends on where its samples leave, so that the mean, and not
    the median, is the time of many.

    Args:
        package: a loaded package.
        samples: inputs, at least one.
        batches: batch sizes; samples are repeated in turn.
    """
    example = Example.of(samples)
    count = min(_MOST, len(example.tensors[0]))
    return [_latency(package, example, size, count) for size in batches]


def _latency(package: Engine | OnnxBranches, example: Example, size: int, count: int) -> Latency:
    runs = max(_REPEATS, -(-count // size))  # so that every sample is seen
    given = [_taken(example, range(run * size, (run + 1) * size), count) for run in range(runs)]
    times = _times(lambda batch: call_on(package, batch), given)
    whole = None
    if isinstance(package, Engine):
        full = package.at(float("inf"))
        whole = 1e3 * float(np.mean(_times(lambda batch: call_on(full, batch), given)))
    exits = torch.cat([call_on(package, batch).exit.cpu() for batch in given[: -(-count // size)]])
    average = float(exits[:count].float().mean())
    late = float(np.quantile(times, 0.95))
    return Latency(
        size, count, 1e3 * float(np.mean(times)), 1e3 * late, whole, average, _exit_microseconds(package, given[0])
    )


def latency_table(rows: Sequence[Latency]) -> Table:
    """What :func:`latencies` found, as it is printed."""
    threads, samples = counted(torch.get_num_threads(), "thread"), counted(rows[0].samples, "different sample")
    title = f"milliseconds per batch, {threads}, {samples}"
    table = Table(title=title)
    for heading in ("batch", "mean", "95%", "no exits", "speedup", "average exit", "exit µs"):
        table.add_column(heading, justify="right")
    for row in rows:
        compared = (
            ["", ""]
            if row.no_exits_ms is None
            else [f"{row.no_exits_ms:.2f}", f"{row.no_exits_ms / row.mean_ms:.2f}×"]
        )
        decided = "" if row.exit_us is None else f"{row.exit_us:.0f}"
        table.add_row(
            f"{row.batch}", f"{row.mean_ms:.2f}", f"{row.late_ms:.2f}", *compared, f"{row.average_exit:.2f}", decided
        )
    return table


def _taken(example: Example, numbers: range, count: int) -> Any:
    """Samples of these numbers; those from ``count`` on are the first ones again."""
    rows = torch.tensor(numbers) % count
    return example.spec.batch(tuple(tensor[rows.to(tensor.device)] for tensor in example.tensors))


def _times(run: Callable[[Any], Any], batches: Sequence[Any]) -> list[float]:
    """Seconds of each batch, after two to warm up."""
    for batch in batches[:2]:
        run(batch)
    times = []
    for batch in tracked(batches, "runs timed"):
        started = time.perf_counter()
        run(batch)
        times.append(time.perf_counter() - started)
    return times


def _exit_microseconds(package: Engine | OnnxBranches, samples: Any) -> float | None:
    if not isinstance(package, Engine):
        return None
    with torch.inference_mode():
        return 1e6 * statistics.mean(decision_seconds(package.loop, package.inputs.spec.tensors(samples)))


def batch_sizes(given: str) -> list[int]:
    """``"1,8,64"`` as numbers.

    Raises:
        ArgumentError: something else, or a number below 1.
    """
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and len(part) < 7 and int(part) > 0 for part in parts):
        raise ArgumentError(
            f"--batches {given[:80]!r} must be numbers of at least 1 and below a million, such as 1,8,64"
        )
    return [int(part) for part in parts]


def samples_for(package: Engine | OnnxBranches, path: Path, inputs: Sequence[str]) -> Any:
    """What a package is timed on, on its device: images or texts, tensors in an ``.npy``, a run's own test samples.

    Args:
        package: a loaded package.
        path: its file; without ``inputs``, the test samples of a run in the same folder are taken.
        inputs: as typed.

    Raises:
        ArgumentError: there is nothing to time on.
        FileError: a file that cannot be read.
    """
    places = [Path(one) for one in inputs] or [path.parent]
    if len(places) == 1 and (places[0] / INPUTS).is_file():
        return package.inputs.placed(_of_a_run(places[0] / INPUTS))
    if not inputs:
        raise ArgumentError(
            f"there is nothing to time {str(path)!r} on: noise would not leave where real samples do. Give images, folders or "
            "texts, an .npy of tensors, or a folder that exitkit bench or train wrote"
        )
    if len(places) == 1 and places[0].suffix == ".npy":
        return package.inputs.placed(_of_an_array(inputs[0]))
    return tensors_of(package, inputs, _MOST)


def _of_a_run(path: Path) -> Any:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{str(path)!r} cannot be read as safetensors: {error}; run its command again") from error
    if all(name.isdecimal() for name in tensors):
        return tuple(tensors[name] for name in sorted(tensors, key=int))
    return tensors


def _of_an_array(path: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # numpy raises a dozen kinds on a damaged file
        raise FileError(f"{path!r} cannot be read as .npy: {str(error)[:200]}") from error
