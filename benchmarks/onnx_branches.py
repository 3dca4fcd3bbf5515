"""Is one ONNX graph with branches faster on easy inputs? Milliseconds of a sample by the exit it leaves at.

    python benchmarks/onnx_branches.py [--depth 56] [--weights FILE] [--images CIFAR.npz]

A CIFAR ResNet with four exits (untrained, as only time is asked: τ of each exit lets a third of those who come to it leave)
is written as one ONNX graph and run in onnxruntime, one sample at a time. Beside it stand the same graph with τ above 1, in
which everybody runs to the end, and the engine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tables import table, write
from torch import Tensor

import exitkit
from exitkit.cli.data.arrays import normalise
from exitkit.common.console import counted, make_console
from exitkit.models import cifar_resnet
from exitkit.models.cifar_resnets import load_weights

SAMPLES, SHARE, ROUNDS = 60, 1 / 3, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/onnx_branches.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(*_model(args))
    console = make_console()
    console.print(_table(rows, f"ResNet-{args.depth}, milliseconds of one sample, {counted(args.threads, 'thread')}"))
    write(args.out, args, rows=rows)


def _model(args: argparse.Namespace) -> tuple[exitkit.MultiExitModel, Tensor]:
    backbone = cifar_resnet(args.depth)
    if args.weights is not None:
        load_weights(backbone, args.weights)
    torch.manual_seed(0)
    ee = exitkit.attach(backbone.train(False), at_cost=[0.2, 0.4, 0.6, 0.8], method="sdn", head="1L").train(False)
    images = None if args.images is None else normalise(np.load(args.images)["images"][:SAMPLES])
    return ee, torch.randn(SAMPLES, 3, 32, 32) if images is None else images


def measure(ee: exitkit.MultiExitModel, samples: Tensor) -> list[dict[str, Any]]:
    """One row for each exit that some sample leaves at."""
    scores = exitkit.collect(ee, [samples]).scores()[:, :-1].double()
    thresholds, there = [], torch.ones(len(samples), dtype=torch.bool)
    for m in range(scores.shape[1]):
        thresholds.append(float(scores[there, m].quantile(1 - SHARE)))
        there &= scores[:, m] <= thresholds[-1]
    with TemporaryDirectory() as folder:
        for name, threshold in (("branches", thresholds), ("whole", [2.0] * len(thresholds))):
            exitkit.export(ee, Path(folder) / f"{name}.onnx", threshold)
        runs: dict[str, Any] = {name: exitkit.load(Path(folder) / f"{name}.onnx") for name in ("branches", "whole")}
    runs["engine"] = exitkit.compile(ee, thresholds)
    exits = runs["branches"](samples).exit
    seconds = [_seconds(runs, sample[None]) for sample in samples]
    rows = []
    for m in exits.unique().tolist():
        mine = [seconds[i] for i in (exits == m).nonzero().flatten().tolist()]
        times = {name: 1e3 * statistics.median(one[name] for one in mine) for name in runs}
        rows.append({"exit": m, "samples": len(mine), "macs": ee.exits[m].macs_fraction} | times)
    return rows


def _seconds(runs: dict[str, Callable[[Tensor], Any]], sample: Tensor) -> dict[str, float]:
    """The median of each, in turn, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run(sample)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}


def _table(measured: Sequence[dict[str, Any]], title: str) -> Table:
    rows = [
        (
            str(row["exit"]),
            str(row["samples"]),
            f"{row['macs']:.0%}",
            f"{row['branches']:.2f}",
            f"{row['whole']:.2f}",
            f"{row['whole'] / row['branches']:.2f}×",
            f"{row['engine']:.2f}",
        )
        for row in measured
    ]
    headings = ("exit", "samples", "MACs", "ONNX, branches", "ONNX, to the end", "speedup", "engine")
    return table(headings, rows, title)


if __name__ == "__main__":
    main()
