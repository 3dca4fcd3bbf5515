"""Does the wall clock follow the FLOPs? The engine against the backbone by itself, and against what is possible.

    python benchmarks/latency.py [--models cifar:resnet56 torchvision:resnet50 torchvision:vit_b_16 hf:bert-base ...]
                                 [--batches 1 8 64 256] [--optimize] [--device cuda] [--dtype bfloat16]

Only time is asked, so weights are random and exits are not trained: thresholds are set so that the same share of the samples
leaves at every exit, chosen so that the average cost is 25, 50 or 75% of the backbone's MACs (100%: no sample leaves). Inputs
are random, or CIFAR images with ``--images``. Large models need seconds a batch on a CPU: ``--samples`` and ``--rounds`` say
how many are measured, and how often.

References, in the same run, are the backbone eager and, with ``--optimize``, compiled by AOTInductor as the engine's stages
are (*AOTI*; on CUDA replayed from CUDA graphs too), the same cut into stages without exits, which shows what cuts cost, and by
``torch.compile`` for each batch size, on CPU in its default mode, on CUDA as
``reduce-overhead`` and ``max-autotune``. Beside their milliseconds per batch stand:

* *MAC bound*: 1 / Σ cᵢ sᵢ, where sᵢ is the share of samples that enter stage i and cᵢ its share of the MACs, head included;
* *time bound*: the backbone's time over the times of the steps that ran (stage and exit), each alone at the batch it saw;
* *measured*: the backbone's time over the engine's, both eager or both AOTI. Efficiency is measured ÷ time bound: what the
  loop itself costs;
* *over best*: the time of the fastest reference over the engine's;
* *exit µs*: an exit's decision and compaction, half of the batch leaving: the mean over the exits; on CUDA, where recorded
  steps do both, the host's wait for it;
* *map*: as *measured*, for ``engine.map``, whose stages run full (at batches above 1);
* *earlyon*: the same for earlyon 0.3.0 with the same exits and thresholds, in which a batch leaves as a whole (``pip install
  earlyon`` to see it).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tables import table, write
from torch import Tensor, nn

import exitkit
from exitkit.cli.bench import machine
from exitkit.cli.data.arrays import normalise
from exitkit.cli.sources import load_model
from exitkit.common.batches import move
from exitkit.common.console import make_console
from exitkit.engine.backbone_alone import compile_backbone
from exitkit.engine.batch_state import BatchState
from exitkit.engine.profiling import decision_seconds
from exitkit.models import cifar_resnet
from exitkit.models.cifar_resnets import load_weights
from exitkit.surgery.capturing import capture
from exitkit.surgery.default_inputs import example_for
from exitkit.surgery.inputs import Example, call_on

EXITS, LENGTH = 4, 128
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MODES = {"cpu": ("default",), "cuda": ("reduce-overhead", "max-autotune")}
"""Modes of ``torch.compile`` that references are compiled in."""
Run = Callable[[Any], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cifar:resnet56", "torchvision:resnet18"])
    parser.add_argument("--head", default="1L", help="of each exit, as for exitkit.attach")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0], help="shares of the MACs")
    parser.add_argument(
        "--samples", type=int, default=256, help="thresholds are set on these, and times taken on some"
    )
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many runs over the samples")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time, which other work on the machine disturbs less"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--optimize", action="store_true", help="compile the engine's stages and the backbone")
    parser.add_argument("--modes", nargs="*", help="of torch.compile that references are compiled in; by default all")
    parser.add_argument("--weights", type=Path, help="weights of cifar:resnet56")
    parser.add_argument("--images", type=Path, help="CIFAR images (.npz) for cifar:resnet56")
    parser.add_argument("--out", type=Path, default=Path("results/latency.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    exitkit.keep_memory()  # for references and engine alike
    console = make_console()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for row in measure(name, args):
            rows.append(row)
            console.print(" ".join(f"{key}={value}" for key, value in row.items()), soft_wrap=True)
        console.print(_table(rows))
    console.print(machine()["device"])
    write(args.out, args, rows=rows)


def measure(name: str, args: argparse.Namespace) -> Any:
    """One row for every target and batch size."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    backbone, samples = _backbone(name, args)
    backbone, samples = backbone.to(device, dtype), move(samples, device)
    if isinstance(samples, Tensor):
        samples = samples.to(dtype)
    shares = [(index + 1) / (EXITS + 1) for index in range(EXITS)]
    torch.manual_seed(0)
    ee = exitkit.attach(backbone, at_cost=shares, method="sdn", head=args.head).eval()
    batches = [_rows(samples, start, start + 32) for start in range(0, args.samples, 32)]
    scores = exitkit.collect(ee, batches).scores()[:, :-1].double().cpu()
    costs = [exit_.macs_fraction for exit_ in ee.exits]
    compiled = exitkit.compile(ee, 2.0, optimize=args.optimize)
    references = _references(ee, args)
    for target in args.targets:
        thresholds = _thresholds(scores, costs, target) if target < 1 else [2.0] * EXITS
        engine = compiled.at(thresholds)
        other = _earlyon(ee, thresholds)
        for batch in args.batches:
            about = {"model": name, "dtype": args.dtype, "optimize": args.optimize, "target": target, "batch": batch}
            yield about | _row(engine, references, other, samples, batch, costs, args)


def _backbone(name: str, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """A model and inputs for it."""
    if name == "cifar:resnet56":
        resnet = cifar_resnet(56)
        if args.weights is not None:
            load_weights(resnet, args.weights)
        images = None if args.images is None else normalise(np.load(args.images)["images"][: args.samples])
        return resnet.train(False), torch.randn(args.samples, 3, 32, 32) if images is None else images
    if name == "hf:bert-base":
        from transformers import BertConfig, BertForSequenceClassification

        ids = torch.randint(1000, 30000, (args.samples, LENGTH))
        bert: nn.Module = BertForSequenceClassification(BertConfig()).train(False)
        return bert, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = load_model(name).train(False)
    return model, torch.randn(args.samples, *example_for(model).tensors[0].shape[1:])


def _rows(samples: Any, start: int, stop: int) -> Any:
    example = Example.of(samples)
    return example.spec.batch(tuple(tensor[start:stop] for tensor in example.tensors))


def _references(ee: exitkit.MultiExitModel, args: argparse.Namespace) -> dict[str, Run]:
    """The backbone by itself, in the ways it is run; the engine is compared with the last of ``eager`` and ``AOTI``."""
    references: dict[str, Run] = {"eager": partial(call_on, ee.backbone)}
    if args.optimize:
        captured = capture(ee.backbone, ee.example.spec.batch(ee.example.tensors))
        references["AOTI"] = compile_backbone(captured)
        references["AOTI in stages"] = compile_backbone(captured, ee.boundaries)
        for mode in MODES[torch.device(args.device).type] if args.modes is None else args.modes:
            compiled = torch.compile(ee.backbone, mode=mode, dynamic=False)
            references[f"torch.compile {mode}"] = partial(call_on, compiled)
    return references


def _earlyon(ee: exitkit.MultiExitModel, thresholds: Sequence[float]) -> Run | None:
    """The same backbone, heads and thresholds in earlyon; None for texts, which it does not take."""
    if find_spec("earlyon") is None or len(ee.example.spec.keys) > 1:
        return None
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    points = [ExitPoint(f"e{m}", boundary.name, 1) for m, boundary in enumerate(ee.boundaries)]
    heads = {point.name: copy.deepcopy(head) for point, head in zip(points, ee.classifiers, strict=True)}
    config = EarlyExitConfig("own", ee.num_classes, points, confidence_thresholds=[min(t, 1.0) for t in thresholds])
    config.enabled_exits = [threshold <= 1 for threshold in thresholds]
    shape = (1, *ee.example.tensors[0].shape[1:])
    wrapper = EarlyExitWrapper(copy.deepcopy(ee.backbone), heads, nn.Identity(), config, shape).eval()
    wrapper = wrapper.to(ee.example.tensors[0].device)

    def run(batch: tuple[Tensor]) -> Any:
        return wrapper(*batch) if len(batch[0]) == 1 else wrapper.forward_inference_batched(*batch)

    return run


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


def _row(
    engine: exitkit.Engine,
    references: dict[str, Run],
    other: Run | None,
    samples: Any,
    batch: int,
    costs: Sequence[float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    count = min(args.samples, max(32, 2 * batch))
    chunks = [_rows(samples, start, start + batch) for start in range(0, count, batch)]
    answers: dict[str, Run] = references | {"engine": partial(call_on, engine)}
    if other is not None:
        answers["earlyon"] = other
    runs: dict[str, Callable[[], Any]] = {name: partial(_each, run, chunks) for name, run in answers.items()}
    exits = torch.cat([call_on(engine, chunk).exit for chunk in chunks]).cpu()  # on a GPU it records the steps, too
    runs["steps"] = _steps_alone(engine, chunks)
    if batch > 1:
        runs["map"] = lambda: list(engine.map(chunks, batch))
    with torch.inference_mode():
        seconds = _interleaved(runs, args.rounds, CLOCKS[args.clock])
        decisions = decision_seconds(engine.loop, Example.of(chunks[0]).tensors)
    full, own = seconds.get("AOTI", seconds["eager"]), seconds["engine"]
    return {
        "references_ms": {name: 1e3 * seconds[name] / len(chunks) for name in references},
        "engine_ms": 1e3 * own / len(chunks),
        "mac_bound": 1 / float(torch.tensor(costs)[exits].mean()),
        "time_bound": full / seconds["steps"],
        "measured": full / own,
        "efficiency": seconds["steps"] / own,
        "over_best": min(seconds[name] for name in references if name != "AOTI in stages") / own,
        "exit_us": 1e6 * statistics.mean(decisions),
        "map": full / seconds["map"] if "map" in seconds else None,
        "earlyon": None if other is None else full / seconds["earlyon"],
    }


def _each(run: Run, chunks: Sequence[Any]) -> None:
    """One batch after another, each answered before the next."""
    for chunk in chunks:
        run(chunk)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@torch.inference_mode()
def _steps_alone(engine: exitkit.Engine, chunks: Sequence[Any]) -> Callable[[], None]:
    """The steps that run on these batches, on what stands before them, without the loop."""
    loop, steps = engine.loop, []
    for chunk in chunks:
        batch: BatchState | None = loop.start(Example.of(chunk).tensors)
        runs: list[Callable[[], Any]] = []
        for index in range(len(loop.program.steps)):
            if batch is not None:
                runs.append(loop.step_runner(index, batch))
                batch, _ = loop.run_step(batch, index)
        steps.append(runs)
    return partial(_each, lambda runs: [run() for run in runs], steps)


def _interleaved(runs: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each, in turn, so that they share what else the machine does: medians, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(clock() - started)
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}


def _table(measured: Sequence[dict[str, Any]]) -> Table:
    references = list(dict.fromkeys(name for row in measured for name in row["references_ms"]))
    speeds = ("mac_bound", "time_bound", "measured", "over_best", "map", "earlyon")
    headings = ("model", "compute", "batch", *references, "engine", *speeds, "efficiency", "exit µs")
    rows = [
        (
            row["model"],
            f"{row['target']:.0%}",
            str(row["batch"]),
            *(f"{row['references_ms'][name]:.1f}" if name in row["references_ms"] else "" for name in references),
            f"{row['engine_ms']:.1f}",
            *("" if row[key] is None else f"{row[key]:.2f}×" for key in speeds),
            f"{row['efficiency']:.2f}",
            f"{row['exit_us']:.0f}",
        )
        for row in measured
    ]
    title = "Milliseconds per batch, and speedup over the backbone (1×)"
    return table([heading.replace("_", " ") for heading in headings], rows, title)


if __name__ == "__main__":
    main()
