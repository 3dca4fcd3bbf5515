"""Does a target really stop? Milliseconds of one sample by the exit it leaves at, as shares of a run to the end.

    python benchmarks/targets.py [--depth 20] [--targets pt2,onnx.zip,pte,onnx,openvino,openvino-stages]

A CIFAR ResNet with four exits (untrained, as only time is asked) is exported. Each target answers the same sample with
thresholds that make it leave at exit 0, 1, … and at the end, in turn. Times are the fastest of all rounds, and shares of the
run to the end in the same target, so that they compare on a machine that does something else too; the share of the MACs
stands beside them. ExecuTorch has a thread pool of its own; the others run in one thread.
"""

from __future__ import annotations

import argparse
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tables import table, write
from torch import Tensor

import exitkit
from exitkit.common.console import make_console
from exitkit.models import cifar_resnet

TARGETS = ("pt2", "onnx.zip", "pte", "onnx", "openvino", "openvino-stages")
NEVER, ALWAYS = 2.0, -1.0
Run = Callable[[Tensor], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("results/targets.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ee = exitkit.attach(cifar_resnet(args.depth).eval(), at_cost=[0.2, 0.4, 0.6, 0.8], method="sdn", head="1L").eval()
    rows = []
    with TemporaryDirectory() as folder:
        for target in args.targets.split(","):
            rows += measure(ee, target, Path(folder), args.rounds)
    headings = ("target", "exit", "MACs", "ms", "share of the run to the end")
    cells = [(r["target"], str(r["exit"]), f"{r['macs']:.0%}", f"{r['ms']:.2f}", f"{r['share']:.0%}") for r in rows]
    make_console().print(table(headings, cells, f"ResNet-{args.depth}, one sample, by the exit it leaves at"))
    write(args.out, args, rows=rows)


def measure(ee: exitkit.MultiExitModel, target: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """One row for each exit of a target."""
    sample, exits = torch.randn(1, 3, 32, 32), len(ee.exits)
    thresholds = [[NEVER] * m + [ALWAYS] * (exits - 1 - m) for m in range(exits)]
    runs = made(ee, target, folder, thresholds)
    for m, run in enumerate(runs):
        assert run(sample) == m, f"{target}: left at exit {run(sample)}, not {m}"
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for m, run in enumerate(runs):
            started = time.perf_counter()
            run(sample)
            times[m].append(time.perf_counter() - started)
    ms = [1e3 * min(measured) for measured in times]  # what other programs on the machine disturb least
    return [
        {"target": target, "exit": m, "macs": ee.exits[m].macs_fraction, "ms": ms[m], "share": ms[m] / ms[-1]}
        for m in range(exits)
    ]


def made(ee: exitkit.MultiExitModel, target: str, folder: Path, thresholds: Sequence[list[float]]) -> list[Run]:
    """A function for each list of thresholds: from a sample to the exit it left at."""
    if target in ("pt2", "onnx.zip", "pte"):
        path = folder / f"model.{target}"
        exitkit.export(ee, path, thresholds[0])
        engines = [exitkit.load(path, threshold=one, trust=True) for one in thresholds]
        return [partial(_in_exitkit, engine) for engine in engines]
    if target == "openvino-stages":
        exitkit.export(ee, folder / "model.onnx.zip", thresholds[0])
        stages = openvino_stages(folder / "model.onnx.zip", folder)
        return [partial(in_stages, stages, one) for one in thresholds]
    paths = [folder / f"{m}.onnx" for m in range(len(thresholds))]
    for path, one in zip(paths, thresholds, strict=True):
        if not path.exists():
            exitkit.export(ee, path, one)
    if target == "onnx":
        return [partial(_in_exitkit, exitkit.load(path)) for path in paths]
    return [partial(_in_openvino, compiled(path)) for path in paths]


def _in_exitkit(package: Any, sample: Tensor) -> int:
    return int(package(sample).exit)


def _in_openvino(graph: Any, sample: Tensor) -> int:
    return int(graph(sample.numpy())[1].item())


def compiled(path: Path) -> Any:
    """An ONNX file on OpenVINO's CPU device, in one thread and single precision."""
    import openvino

    core = openvino.Core()
    return core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})


def openvino_stages(package: Path, folder: Path) -> list[Any]:
    """The stages of an ``.onnx.zip``, each compiled by itself."""
    with zipfile.ZipFile(package) as archive:
        names = sorted(
            (name for name in archive.namelist() if name.startswith("steps/")), key=lambda name: int(name[6:])
        )
        for name in names:
            (folder / f"{name[6:]}.stage.onnx").write_bytes(archive.read(name))
    return [compiled(folder / f"{index}.stage.onnx") for index in range(len(names))]


def in_stages(stages: Sequence[Any], thresholds: Sequence[float], sample: Tensor) -> int:
    """The loop outside: the exit that the sample left at. A method without links hands one feature on."""
    values: Any = sample.numpy()
    for m, (stage, threshold) in enumerate(zip(stages[:-1], thresholds, strict=True)):
        results = stage(values)
        if results[len(results) - 1].item() > threshold:
            return m
        values = results[0]
    stages[-1](values)
    return len(thresholds)


if __name__ == "__main__":
    main()
