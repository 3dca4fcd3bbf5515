"""Running a package on images and texts, and timing it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from rich.table import Table

from exitkit.cli.inputs import Losses, images, texts
from exitkit.common.batches import move
from exitkit.common.errors import ArgumentError, FileError
from exitkit.engine import Engine
from exitkit.engine.profiling import decision_seconds
from exitkit.multi_exit.preprocessing import ImagePreprocessing, Preprocessing
from exitkit.packages.onnx_branches import OnnxBranches
from exitkit.surgery.inputs import Example, call_on

T = TypeVar("T")
_REPEATS = 30


def predict(
    package: Engine | OnnxBranches, inputs: Sequence[str], batch: int, losses: Losses
) -> Iterator[dict[str, Any]]:
    """One record for each image or text: the input, its label, the exit it left at, and the score there.

    Args:
        package: a loaded package.
        inputs: images and folders of them, or texts and files of them; ``-`` is stdin.
        batch: how many are answered at once.
        losses: is told of images that cannot be read, which are left out, and of texts that were cut.

    Raises:
        ArgumentError: a package that does not say how inputs become tensors, images for texts or the other way round, a
            path that does not exist.
    """
    description = package.description
    preprocessing = None if description is None else description.preprocessing
    if description is None or preprocessing is None:
        raise ArgumentError(
            "this package does not say how images or texts become tensors; export it with preprocessing= or tokenizer=, or "
            "call exitkit.load(path) on tensors"
        )
    for names, made in _batches(preprocessing, inputs, batch, losses):
        answer = call_on(package, move(made, package.inputs.device))
        for name, label, exit_, score in zip(names, answer.logits.argmax(-1), answer.exit, answer.score, strict=True):
            index = int(label)
            shown = index if description.labels is None else description.labels[index]
            yield {
                "input": name,
                "label": shown,
                "exit": int(exit_),
                "score": round(float(score), 6) if score.isfinite() else None,
            }


def _batches(
    preprocessing: Preprocessing, inputs: Sequence[str], size: int, losses: Losses
) -> Iterator[tuple[Sequence[str], Any]]:
    """Names of inputs, and the tensors made of them."""
    if isinstance(preprocessing, ImagePreprocessing):
        for group in _grouped(images(inputs, preprocessing, losses), size):
            names, tensors = zip(*group, strict=True)
            yield names, torch.stack(tensors)
    else:
        for sentences in _grouped(texts(inputs), size):
            made, cut = preprocessing.encode(sentences)
            losses.cut += cut
            yield sentences, made


def _grouped(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while group := list(islice(items, size)):
        yield group


def latency_table(package: Engine | OnnxBranches, samples: Any, batches: Sequence[int]) -> Table:
    """Median and 95th percentile of the time of a batch, beside that of a run in which no sample leaves.

    The last column is what an exit adds to its stage and head: the decision and the compaction, half of the batch leaving, in
    microseconds, mean over the exits.

    Args:
        package: a loaded package.
        samples: inputs, at least one.
        batches: batch sizes; samples are repeated in turn.
    """
    table = Table(title=f"milliseconds per batch, {torch.get_num_threads()} threads")
    for heading in ("batch", "median", "95%", "no exits", "speedup", "average exit", "exit µs"):
        table.add_column(heading, justify="right")
    for size in batches:
        taken = _resized(samples, size)
        times = _times(lambda taken=taken: call_on(package, taken))  # type: ignore[misc]
        row = [f"{size}", f"{1e3 * statistics.median(times):.2f}", f"{1e3 * times[int(0.95 * len(times))]:.2f}"]
        if isinstance(package, Engine):
            full = package.at(float("inf"))
            whole = statistics.median(_times(lambda full=full, taken=taken: call_on(full, taken)))  # type: ignore[misc]
            row += [f"{1e3 * whole:.2f}", f"{whole / statistics.median(times):.2f}×"]
        else:
            row += ["", ""]  # a graph's thresholds are fixed
        row.append(f"{float(call_on(package, taken).exit.float().mean()):.2f}")
        table.add_row(*row, _exit_microseconds(package, taken))
    return table


def _exit_microseconds(package: Engine | OnnxBranches, samples: Any) -> str:
    if not isinstance(package, Engine):
        return ""
    with torch.inference_mode():
        seconds = decision_seconds(package.loop, package.inputs.spec.tensors(samples))
    return f"{1e6 * statistics.mean(seconds):.0f}"


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


def read_samples(path: str) -> torch.Tensor:
    """The samples in an ``.npy`` file.

    Raises:
        ArgumentError: a missing or damaged file.
    """
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # numpy raises a dozen kinds on a damaged file
        raise FileError(f"--inputs {path!r} cannot be read as .npy: {str(error)[:200]}") from error


def _resized(samples: Any, size: int) -> Any:
    """``size`` samples, taken in turn."""
    example = Example.of(samples).with_batch(size)
    return example.spec.batch(example.tensors)


def _times(run: Callable[[], Any]) -> list[float]:
    """Seconds of each of several runs, ascending, after two to warm up."""
    times = []
    for _ in range(_REPEATS + 2):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return sorted(times[2:])


def made_up(package: Engine | OnnxBranches) -> Any:
    """One random sample of the shape that the package takes."""
    inputs = package.inputs
    tensors = []
    for sizes, dtype in zip(inputs.sizes, inputs.dtypes, strict=True):
        shape = (1, *(16 if size is None else size for size in sizes[1:]))
        tensors.append(torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype))
    return inputs.spec.batch(tuple(tensor.to(inputs.device) for tensor in tensors))
