"""What does the exit decision itself take? Scores against τ, the answers of those that leave, the rows of those that go on.

    python benchmarks/decision.py [--device cuda] [--samples 256] [--classes 1000]

Half of the samples leave. Times are microseconds, medians; the score is in the compiled step and not counted. On a CPU they
last until the host can go on; on a GPU, which is kept busy before as by a step, from its end until the device has what the
host launches next. Rows are what travels to the next stage: nothing but the answer, a token sequence of ViT-B/16, a map of
ResNet-50. On CUDA the kernels of recorded steps, replayed from a graph as in the engine, where they are part of the step's,
stand beside the plain loop, which is also what a CPU runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tables import table
from torch import Tensor

from exitkit.cli.bench import machine
from exitkit.common.console import make_console
from exitkit.engine.cuda.buffers import Boundary, Results
from exitkit.engine.loop import Loop
from exitkit.engine.program import Inputs, Program, Step
from exitkit.methods.policy import ExitPolicy
from exitkit.surgery.inputs import CallSpec

Way = Callable[[Tensor, Tensor, Tensor], Callable[[], Any]]
"""From a value, answers and scores to what is timed."""

ROWS: dict[str, tuple[int, ...]] = {"answer only": (0,), "197 × 768": (197, 768), "1024 × 14 × 14": (1024, 14, 14)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    program = _program(args)
    ways: dict[str, Way] = {"plain loop": partial(_plain, Loop(program, ExitPolicy((0.5,), "confidence")))}
    if torch.device(args.device).type == "cuda":
        ways["recorded"] = partial(_recorded, program, args.samples)
    with torch.inference_mode():
        rows = [
            (name, *(f"{_microseconds(way, shape, args):.0f}" for way in ways.values()))
            for name, shape in ROWS.items()
        ]
    title = f"decision and compaction of {args.samples} samples × {args.classes} classes, µs"
    make_console().print(table(("a row", *ways), rows, title), machine()["device"])


def _program(args: argparse.Namespace) -> Program:
    """An exit and the backbone's own classifier, of which only the decision between them runs."""

    def nothing(*_: Any) -> list[Any]:
        return []

    inputs = Inputs(
        CallSpec((None,), (), (0,)), ("x",), ((None,),), (torch.float32,), (None,), torch.device(args.device)
    )
    steps = Step(nothing, 0, True, ("x",), ("x",), ("x",)), Step(nothing, 1, True, ("x",), (), ())
    return Program(inputs, steps, {"x": 0}, {"x": (0,)}, args.classes, torch.float32)


def _plain(loop: Loop, value: Tensor, answer: Tensor, score: Tensor) -> Callable[[], Any]:
    fresh = loop.start((value,))
    return lambda: loop.decide(replace(fresh), 0, answer, score)


def _recorded(program: Program, samples: int, value: Tensor, answer: Tensor, score: Tensor) -> Callable[[], Any]:
    """The kernels of a recorded step, and the wait for the count."""
    from exitkit.engine.cuda import kernels
    from exitkit.engine.cuda.recorder import Recorder

    here, there = (Boundary.empty(samples, value.device) for _ in range(2))
    here.count.fill_(samples)
    results = Results.empty(program.num_classes, program.dtype, samples, value.device)
    target = torch.empty_like(value.flatten())
    threshold = torch.full((1,), 0.5, dtype=torch.float64, device=value.device)

    def kernels_and_count() -> None:
        kernels.decide(score, answer, threshold, 0, here, there, results, False)
        if value.numel():
            kernels.compact(value.flatten(), target, samples, there)
        there.on_host.copy_(there.count, non_blocking=True)

    kernels_and_count()
    replay = Recorder(value.device)(kernels_and_count)
    stream, done = torch.cuda.current_stream(), torch.cuda.Event()

    def run() -> int:
        replay()
        done.record(stream)
        done.synchronize()
        return int(there.on_host)

    return run


def _microseconds(way: Way, shape: tuple[int, ...], args: argparse.Namespace) -> float:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(args.samples, generator=generator, dtype=torch.float64).to(args.device)
    answer = torch.randn(args.samples, args.classes, generator=generator).to(args.device)
    run = way(torch.randn(args.samples, *shape).to(args.device), answer, score)
    timed = _on_busy_gpu if answer.is_cuda else _on_host
    return 1e6 * statistics.median([timed(run) for _ in range(args.repeats + 3)][3:])


def _on_host(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _on_busy_gpu(run: Callable[[], Any]) -> float:
    """Seconds by the device's own clock: the host launches while the device is busy, as it does behind a step."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream()  # asked here, since that takes microseconds
    torch.cuda._sleep(1_000_000)  # cycles: about half a millisecond
    before.record(stream)
    run()
    after.record(stream)
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


if __name__ == "__main__":
    main()
