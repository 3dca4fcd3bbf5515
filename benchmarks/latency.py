"""Does the wall clock follow the FLOPs? The engine against the eager backbone, and against what is possible.

    python benchmarks/latency.py [--models cifar:resnet56 torchvision:resnet50 ...] [--batches 1 8 64] [--threads 1]

Weights and images are random, as only time is asked: thresholds are set so that the same share of the samples leaves at
every exit, chosen so that the average cost is 25, 50 or 75% of the backbone's MACs. For each, three speedups over the
backbone are printed:

* *MAC bound*: 1 / Σ cᵢ sᵢ, where sᵢ is the share of samples that enter stage i and cᵢ its share of the MACs, head included;
* *time bound*: the backbone's time over the times of the stages that ran, each measured alone (head included) at the batch
  that entered it;
* *measured*: the backbone's time over the engine's. Efficiency is measured ÷ time bound: what the loop itself costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import exitkit
from exitkit.cli.bench import machine
from exitkit.cli.sources import load_model
from exitkit.console import make_console
from exitkit.files import replacing
from exitkit.models import cifar_resnet
from exitkit.runtime.flight import Flight
from exitkit.surgery.calls import call_on
from exitkit.surgery.examples import example_for

TARGETS = (0.25, 0.5, 0.75)
EXITS, SAMPLES = 4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["cifar:resnet56", "torchvision:resnet18", "timm:vit_tiny_patch16_224"]
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/latency.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = make_console()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows += measure(name, args.batches)
        console.print(_table(rows))
    console.print(machine()["device"], f"{args.threads} threads")
    with replacing(args.out) as temporary:
        temporary.write_text(json.dumps({"about": machine(), "rows": rows}, indent=1))


def measure(name: str, batches: Sequence[int]) -> list[dict[str, Any]]:
    """One row for every target and batch size."""
    backbone = (cifar_resnet(56) if name == "cifar:resnet56" else load_model(name)).eval()
    shape = example_for(backbone).tensors[0].shape[1:]
    shares = [(index + 1) / (EXITS + 1) for index in range(EXITS)]
    torch.manual_seed(0)
    ee = exitkit.attach(backbone, at_cost=shares, method="sdn", head="1L").eval()
    samples = torch.randn(SAMPLES, *shape)
    scores = exitkit.collect(ee, samples.split(32)).scores()[:, :-1].double()
    costs = [exit_.macs_fraction for exit_ in ee.exits]
    rows = []
    for target in TARGETS:
        thresholds = _thresholds(scores, costs, target)
        engine = exitkit.compile(ee, thresholds)
        for batch in batches:
            rows.append({"model": name, "target": target, "batch": batch} | _row(engine, samples, batch, costs))
    return rows


def _thresholds(scores: Tensor, costs: Sequence[float], target: float) -> list[float]:
    """τ of each exit, so that the same share of those who come to it leaves, and the average cost is the target."""
    low, high = 0.0, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        stays = [(1 - rate) ** exit_ for exit_ in range(len(costs))]
        average = sum(
            cost * stay * (rate if exit_ < len(costs) - 1 else 1)
            for exit_, (cost, stay) in enumerate(zip(costs, stays, strict=True))
        )
        low, high = (rate, high) if average > target else (low, rate)
    thresholds, there = [], torch.ones(len(scores), dtype=torch.bool)
    for exit_ in range(scores.shape[1]):
        column = scores[there, exit_]
        thresholds.append(float(column.quantile(1 - rate)) if len(column) else 2.0)
        there = there & (scores[:, exit_] <= thresholds[-1])
    return thresholds


def _row(engine: exitkit.Engine, samples: Tensor, batch: int, costs: Sequence[float]) -> dict[str, float]:
    chunks = samples[: max(64, 4 * batch)].split(batch)
    backbone = engine.steps.model.backbone
    with torch.inference_mode():
        full = _seconds(lambda: [call_on(backbone, chunk) for chunk in chunks])
        own = _seconds(lambda: [engine(chunk) for chunk in chunks])
        bound = _stage_seconds(engine, chunks)
    exits = torch.cat([engine(chunk).exit for chunk in chunks])
    macs = float(torch.tensor(costs)[exits].mean())
    return {
        "backbone_ms": 1e3 * full / len(chunks),
        "engine_ms": 1e3 * own / len(chunks),
        "mac_bound": 1 / macs,
        "time_bound": full / bound,
        "measured": full / own,
        "efficiency": bound / own,
    }


def _stage_seconds(engine: exitkit.Engine, chunks: Sequence[Tensor]) -> float:
    """What the stages that ran take alone, at the batches that entered them."""
    steps, total = engine.steps, 0.0
    times: dict[tuple[int, int], float] = {}
    for chunk in chunks:
        flight: Flight | None = steps.enter([chunk])
        for stage in range(len(steps.lowered.stages)):
            if flight is None:
                break
            key = stage, len(flight)
            if key not in times:
                times[key] = _seconds(_alone(engine, flight, stage))
            total += times[key]
            flight, _ = steps.advance(flight, stage)
    return total


def _alone(engine: exitkit.Engine, flight: Flight, stage: int) -> Callable[[], Any]:
    """A stage and its head on what stands before it, without decisions."""
    module, names = engine.lowered.stages[stage].module, engine.lowered.stages[stage].inputs
    values = [flight.values[name] for name in names]
    if stage == len(engine.lowered.stages) - 1:
        return lambda: module(*values)
    head = engine.steps.model.classifiers[stage]
    return lambda: head(module(*values)[0])


def _seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The median of several runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Speedup over the eager backbone (1×)")
    for heading in (
        "model",
        "compute",
        "batch",
        "backbone ms",
        "engine ms",
        "MAC bound",
        "time bound",
        "measured",
        "efficiency",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['target']:.0%}",
            str(row["batch"]),
            f"{row['backbone_ms']:.1f}",
            f"{row['engine_ms']:.1f}",
            *(f"{row[key]:.2f}×" for key in ("mac_bound", "time_bound", "measured")),
            f"{row['efficiency']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
