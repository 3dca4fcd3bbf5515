"""What does the exit decision itself take? Scores against τ, the answers of those that leave, the rows of those that go on.

    python benchmarks/decision.py [--device cuda] [--samples 256] [--classes 1000]

Half of the samples leave. Times are microseconds, medians, until the host can go on; the score is in the compiled step and
not counted. Rows are what travels to the next stage: nothing but the answer, a token sequence of ViT-B/16, a map of ResNet-50.
On CUDA Triton's kernels stand beside plain torch, which is also what a CPU runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from tables import table

from exitkit.cli.bench import machine
from exitkit.common.console import make_console
from exitkit.engine.batch_state import BatchState
from exitkit.engine.loop import Loop
from exitkit.engine.program import Inputs, Program, Step
from exitkit.methods.policy import ExitPolicy
from exitkit.surgery.inputs import CallSpec

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
    policy = ExitPolicy((0.5,), "confidence")
    loops = {"torch": Loop(program, policy)}
    if torch.device(args.device).type == "cuda":
        from exitkit.engine.cuda.kernels import gather, split

        loops["Triton"] = Loop(program, policy, split=split, gather=gather)
    with torch.inference_mode():
        rows = [
            (name, *(f"{_microseconds(loop, shape, args):.0f}" for loop in loops.values()))
            for name, shape in ROWS.items()
        ]
    title = f"decision and compaction of {args.samples} samples × {args.classes} classes, µs"
    make_console().print(table(("a row", *loops), rows, title), machine()["device"])


def _program(args: argparse.Namespace) -> Program:
    """An exit and the backbone's own classifier, of which only the decision between them runs."""

    def nothing(*_: Any) -> list[Any]:
        return []

    inputs = Inputs(CallSpec((None,), (), (0,)), ("x",), ((None,),), (torch.float32,), torch.device(args.device))
    steps = Step(nothing, 0, True, ("x",), ("x",), ("x",)), Step(nothing, 1, True, ("x",), (), ())
    return Program(inputs, steps, {"x": 0}, {"x": (0,)}, args.classes, torch.float32)


def _microseconds(loop: Loop, shape: tuple[int, ...], args: argparse.Namespace) -> float:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(args.samples, generator=generator, dtype=torch.float64).to(args.device)
    answer = torch.randn(args.samples, args.classes, generator=generator).to(args.device)
    fresh = loop.start((torch.randn(args.samples, *shape).to(args.device),))
    times = []
    for _ in range(args.repeats + 3):
        batch = BatchState(fresh.rows, dict(fresh.values), fresh.fault)
        started = time.perf_counter()
        loop.decide(batch, 0, answer, score)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times[3:])


if __name__ == "__main__":
    main()
