"""What serving with exits is worth, and what it survives.

    python benchmarks/serving.py [load batch faults] [--package model.pt2 --inputs x.npy] [--threads 1] [--seconds 60]

Without a package, a CIFAR ResNet-56 with random weights and four exits is timed on random images, its thresholds set so that
``--cost`` of the backbone's MACs are used: only time is asked. With one, ``--inputs`` are real inputs for it, (N, …) float32,
and the model without exits is the package at τ = ∞ (its exits' heads included).

* *load*: requests of one sample at random (Poisson) moments, whatever the server does (an open loop), at 50, 80 and 95% of
  what the backbone alone can answer. Latency is counted from the moment a request was due. Three servers with the same
  scheduler, batch and patience: (i) the backbone, (ii) exits whose batch is answered as a whole, (iii) exits answered as
  they leave. A request is *easy* where it leaves at the first exit. Requests beyond ``--queued`` samples are refused, and
  counted.
* *batch*: ``exitkit.serving.predict`` on a Ray data set, row for row against the engine, with one actor of one thread and with
  two; and one actor's block against a plain loop of batches over the same rows.
* *faults*: two replicas over HTTP while one is killed, clients that leave, slow ones, 200 mutated bodies, and the memory of a
  replica over ``--requests``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency import EXITS, _thresholds
from serving_faults import measure_faults
from tables import table, write
from torch import Tensor

import exitkit
from exitkit.cli.bench import machine
from exitkit.common.console import make_console
from exitkit.engine.loop import Loop
from exitkit.engine.program import Step
from exitkit.models import cifar_resnet
from exitkit.serving.scheduling import RequestScheduler, UnavailableError

PARTS = ("load", "batch", "faults")
LOADS = (0.5, 0.8, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="|".join(PARTS))
    parser.add_argument("--package", type=Path, help="a trained package of one image input; by default one is made")
    parser.add_argument("--inputs", type=Path, help="inputs for it, .npy")
    parser.add_argument("--cost", type=float, default=0.41, help="share of the MACs that exits without training use")
    parser.add_argument(
        "--depth", type=int, default=56, help="of the ResNet without training; 20 or more, for four exits"
    )
    parser.add_argument("--samples", type=int, default=512, help="different inputs without a package")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-wait-ms", type=float, default=2.0)
    parser.add_argument("--queued", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--rows", type=int, default=20_000, help="of the data set")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("results/serving.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    exitkit.keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        package, backbone, inputs = _subject(args, Path(folder))
        engine = exitkit.load(package, trust=True)
        assert isinstance(engine, exitkit.Engine)
        found: dict[str, Any] = {}
        if "load" in args.parts:
            found["load"] = measure_load(engine, backbone, inputs, args)
        if "batch" in args.parts:
            found["batch"] = measure_batch(package, engine, inputs, args)
        if "faults" in args.parts:
            found["faults"] = measure_faults(package, engine, inputs, args)
    make_console().print(machine()["device"])
    write(args.out, args, **found)


def _subject(args: argparse.Namespace, folder: Path) -> tuple[Path, Callable[[Tensor], Tensor], Tensor]:
    """A package, the same model without exits, and inputs."""
    if args.package is not None:
        full = exitkit.load(args.package, threshold=float("inf"), trust=True)
        return args.package, lambda x: full(x).logits, torch.from_numpy(np.load(args.inputs))
    torch.manual_seed(0)
    backbone, inputs = cifar_resnet(args.depth).eval(), torch.randn(args.samples, 3, 32, 32)
    shares = [(index + 1) / (EXITS + 1) for index in range(EXITS)]
    ee = exitkit.attach(backbone, inputs[:2], at_cost=shares, method="sdn", head="1L").eval()
    scores = exitkit.collect(ee, inputs.split(32)).scores()[:, :-1].double()
    thresholds = _thresholds(scores, [one.macs_fraction for one in ee.exits], args.cost)
    exitkit.export(ee, folder / "model.pt2", threshold=thresholds)
    return folder / "model.pt2", backbone, inputs


# What load does to latency


@dataclass(frozen=True)
class Moments:
    """One load: milliseconds of each answered request, whether it was easy, and how many were refused."""

    milliseconds: list[float]
    easy: list[bool]
    refused: int
    seconds: float

    def row(self) -> dict[str, Any]:
        p50, p95, p99 = np.percentile(self.milliseconds, [50, 95, 99]).tolist()
        easy = [one for one, is_easy in zip(self.milliseconds, self.easy, strict=True) if is_easy]
        return {
            "p50": p50, "p95": p95, "p99": p99, "goodput": len(self.milliseconds) / self.seconds,
            "refused": self.refused, "easy_share": len(easy) / len(self.easy),
            "easy_p50": statistics.median(easy) if easy else None,
        }  # fmt: skip


def measure_load(
    engine: exitkit.Engine, backbone: Callable[[Tensor], Tensor], inputs: Tensor, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each server and load, and each server's most."""
    exits = torch.cat([engine(part).exit for part in inputs.split(args.batch)])
    servers = {
        "backbone": _whole(engine, lambda x: [(logits := backbone(x)), logits.new_zeros(len(x)).double()]),
        "exits, whole batches": _whole(engine, lambda x: list(engine(x)[:3:2])),
        "exits, as they leave": engine,
    }
    most = {name: asyncio.run(_saturated(server, inputs, args)) for name, server in servers.items()}
    rows = []
    for load in LOADS:
        for name, server in servers.items():
            moments = asyncio.run(_open_loop(server, inputs, exits == 0, load * most["backbone"], args))
            rows.append({"server": name, "load": load, "most": most[name], **moments.row()})
            make_console().print(rows[-1], soft_wrap=True)
    make_console().print(_load_table(rows))
    return rows


def _whole(engine: exitkit.Engine, run: Callable[[Tensor], Sequence[Tensor]]) -> exitkit.Engine:
    """One step that answers a batch as a whole, as an engine, so that it is served by the same scheduler."""
    program, policy = engine.loop.program, engine.policy

    def alone(x: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return run(x)

    step = Step(alone, len(policy.thresholds), True, program.inputs.names, (), ())
    return exitkit.Engine(Loop(replace(program, steps=(step,)), policy))


def _scheduler(server: exitkit.Engine, args: argparse.Namespace) -> RequestScheduler:
    return RequestScheduler(server, batch_size=args.batch, max_wait_ms=args.max_wait_ms, max_queued=args.queued)


async def _saturated(server: exitkit.Engine, inputs: Tensor, args: argparse.Namespace) -> float:
    """Answers a second while four batches' worth of requests always wait."""
    scheduler, answered = _scheduler(server, args), 0
    until = time.perf_counter() + max(args.seconds / 4, 1)

    async def client(chance: random.Random) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            at = chance.randrange(len(inputs))
            await scheduler.answer(inputs[at : at + 1])
            answered += 1

    began = time.perf_counter()
    await asyncio.gather(*(client(random.Random(seed)) for seed in range(min(4 * args.batch, args.queued))))
    seconds = time.perf_counter() - began
    await scheduler.close()
    return answered / seconds


async def _open_loop(
    server: exitkit.Engine, inputs: Tensor, easy: Tensor, rate: float, args: argparse.Namespace
) -> Moments:
    """So many requests a second, at moments that do not depend on the answers."""
    scheduler, chance = _scheduler(server, args), np.random.default_rng(0)
    due = np.cumsum(chance.exponential(1 / rate, max(int(rate * args.seconds), 1)))
    places = chance.integers(len(inputs), size=len(due)).tolist()
    milliseconds, kinds, refused = [], [], 0
    began = time.perf_counter()

    async def ask(at: int, moment: float) -> None:
        nonlocal refused
        try:
            await scheduler.answer(inputs[at : at + 1])
        except UnavailableError:
            refused += 1
            return
        milliseconds.append(1e3 * (time.perf_counter() - began - moment))
        kinds.append(bool(easy[at]))

    tasks = []
    for at, moment in zip(places, due.tolist(), strict=True):
        if (ahead := moment - (time.perf_counter() - began)) > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.create_task(ask(at, moment)))
    await asyncio.gather(*tasks)
    seconds = time.perf_counter() - began
    await scheduler.close()
    return Moments(milliseconds, kinds, refused, seconds)


def _load_table(rows: Sequence[dict[str, Any]]) -> Any:
    cells = []
    for row in rows:
        full = next(one for one in rows if one["load"] == row["load"])
        times = [f"{row[key]:.1f} ({row[key] / full[key]:.2f})" for key in ("p50", "p95", "p99")]
        rest = [f"{row['goodput']:.0f}", str(row["refused"]), f"{row['easy_p50'] or 0:.1f}", f"{row['most']:.0f}"]
        cells.append([f"{row['server']}, {row['load']:.0%}", *times, *rest])
    headings = ("server, load", "p50 ms", "p95 ms", "p99 ms", "a second", "refused", "easy p50", "most a second")
    return table(headings, cells, "Milliseconds from when a request was due (as a share of the backbone's)")


# A data set on Ray


def measure_batch(package: Path, engine: exitkit.Engine, inputs: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Whether rows are answered as by the engine, and rows a second of one actor, of two, and of a plain loop."""
    import ray

    from exitkit.serving.dataset import Predictor
    from exitkit.serving.deployment import start_ray

    rows = inputs[torch.arange(args.rows) % len(inputs)]
    block, small = (max(args.rows // parts, args.batch) for parts in (8, 40))
    options: dict[str, Any] = {
        "column": "data",
        "id_column": None,
        "threshold": None,
        "on_error": "raise",
        "device": None,
        "trust": True,
    }
    predictor = Predictor(str(package), batch_size=args.batch, threads=args.threads, **options)
    seconds = {
        "block": _timed(lambda: predictor({"data": rows[:block].numpy()})),
        "plain loop": _timed(lambda: [engine(part) for part in rows[:block].split(args.batch)]),
    }
    start_ray(ray, 3)
    found = {name: block / one for name, one in seconds.items()}
    expected = torch.cat([engine(part).exit for part in rows.split(args.batch)])
    for actors in (1, 2):
        found[f"{actors} actors"], exits = _rows_a_second(package, rows, actors, small, args)
        found[f"{actors} actors, other exits"] = int((exits != expected.numpy()).sum())
    ray.shutdown()
    found["two over one"] = found["2 actors"] / found["1 actors"]
    found["block over plain loop"] = found["block"] / found["plain loop"]
    make_console().print(found, soft_wrap=True)
    return found


def _rows_a_second(
    package: Path, rows: Tensor, actors: int, block: int, args: argparse.Namespace
) -> tuple[float, np.ndarray[Any, Any]]:
    """Over the last four fifths of the blocks, so that no start is counted; and the exits, in order."""
    from ray import data

    from exitkit.serving import predict

    parts = [*rows.numpy().reshape(-1, block, *rows.shape[1:])] if len(rows) % block == 0 else [rows.numpy()]
    answered = predict(
        data.from_numpy(parts), package, column="data", batch_size=args.batch, block=block, actors=actors,
        num_cpus=1, trust=True, keep_order=True,
    )  # fmt: skip
    moments, exits = [], []
    for batch in answered.iter_batches(batch_size=block, prefetch_batches=0):
        moments.append(time.perf_counter())
        exits.append(batch["exit"])
    begun = len(moments) // 5
    spent = max(moments[-1] - moments[begun], 1e-9)
    return sum(map(len, exits[begun + 1 :])) / spent, np.concatenate(exits)


def _timed(run: Callable[[], Any]) -> float:
    """Seconds, the median of three."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
