"""Exits against smaller networks: does one ResNet-56 with exits beat the smaller ResNets of its family at their cost?

    python benchmarks/front.py --data DIR --weights cifar10_resnet56.safetensors --small cifar10_resnet20.safetensors

DIR and the weights are those of ``benchmarks/cifar10.py``. The backbone is frozen; exits after the blocks of ``--at``, with
the heads of ``--heads``, method sdn, learn from flipped and shifted images: SGD with momentum, a cosine to 0. They are
independent, so that one run serves every choice among them; each is a row. Beside them the static front, the networks of the
same repository as they are, and two of these one after the other: ResNet-20 answers, and where it is not sure, ResNet-56 does.
``--exits DIR/exits …`` takes those of earlier runs (of one seed each: the table then has means and deviations) and also
measures time, with those of the first: the compiled engine at the thresholds of the first budgets beside the two networks,
compiled alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from cifar10 import STATIC, Augmented, load
from rich.table import Table
from tables import at, cell, numbers, table, write
from torch import Tensor, nn

import exitkit
from exitkit.cli.bench import machine
from exitkit.common.console import make_console
from exitkit.engine.backbone_alone import compile_backbone
from exitkit.evaluation import ExitOutputs
from exitkit.models import cifar_resnet
from exitkit.surgery.capturing import capture

BUDGETS = (0.25, *(cost for _, cost in STATIC.values()))


def main() -> None:
    args = _arguments()
    console, started = make_console(), time.perf_counter()
    train = load(args.data / "cifar10_train.npz", args.images)
    images, labels = load(args.data / "cifar10_test.npz", args.test_images)
    batches = list(zip(images.split(500), labels.split(500), strict=True))
    backbone = cifar_resnet(56, weights=args.weights)
    small = cifar_resnet(20, weights=args.small)
    models = [_trained(backbone, args, train)] if args.exits is None else _loaded(backbone, args)
    exits = range(len(args.heads))
    choices = [kept for count in exits for kept in combinations(exits, count + 1)]
    rows = {_name(args, kept): [exitkit.collect(_kept(ee, kept), batches) for ee in models] for kept in choices}
    rows["ResNet-20, then ResNet-56"] = [_one_after_the_other(small, backbone, batches)]
    console.print(_table(rows, args, len(train[0])))
    static = ", ".join(f"ResNet-{depth} {accuracy:.2f} at {cost:.0%}" for depth, (accuracy, cost) in STATIC.items())
    console.print(f"static front (its repository, 10,000 test images): {static}")
    times = {}
    if args.exits is not None:
        times = _times(models[0], small, images, exitkit.collect(models[0], batches))
        console.print(_time_table(times))
    seconds = time.perf_counter() - started
    write(
        args.out / "results.json",
        args,
        rows=numbers(rows, BUDGETS),
        static=STATIC,
        milliseconds=times,
        seconds=seconds,
    )


def _trained(backbone: nn.Module, args: argparse.Namespace, train: tuple[Tensor, Tensor]) -> exitkit.MultiExitModel:
    torch.manual_seed(args.seed)
    ee = exitkit.attach(backbone, at=args.at, head=args.heads, method="sdn")
    exitkit.Trainer(
        ee,
        epochs=args.epochs,
        lr=args.lr,
        weight_decay=5e-4,
        optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        mixed_precision=args.mixed_precision,
        seed=args.seed,
        output_dir=args.out,
    ).fit(Augmented(*train))
    ee.save_pretrained(args.out / "exits")
    return ee


def _loaded(backbone: nn.Module, args: argparse.Namespace) -> list[exitkit.MultiExitModel]:
    models = [exitkit.MultiExitModel.from_pretrained(backbone, folder) for folder in args.exits]
    ee = models[0]
    args.at = [boundary.name for boundary in ee.boundaries]
    args.heads = [ee.head] * len(args.at) if isinstance(ee.head, str) else list(ee.head)
    return models


def _kept(ee: exitkit.MultiExitModel, kept: tuple[int, ...]) -> exitkit.MultiExitModel:
    rest = set(range(len(ee.classifiers))) - set(kept)
    return ee.prune_exits(rest) if rest else ee


def _name(args: argparse.Namespace, kept: tuple[int, ...]) -> str:
    return " + ".join(f"{args.heads[m]} after {args.at[m]}" for m in kept)


@torch.no_grad()
def _one_after_the_other(small: nn.Module, large: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> ExitOutputs:
    """Two networks as two exits: what the small one is not sure of costs both."""
    macs = [exitkit.inspect(model, show=False).anatomy.macs for model in (small, large)]
    heads = [torch.cat([model.eval()(images) for images, _ in batches]) for model in (small, large)]
    log_probs = torch.stack([logits.log_softmax(1) for logits in heads], dim=1)
    labels = torch.cat([labels for _, labels in batches])
    return ExitOutputs(log_probs, labels, torch.tensor(macs).cumsum(0), macs[1])


def _times(
    ee: exitkit.MultiExitModel, small: nn.Module, images: Tensor, outputs: ExitOutputs
) -> dict[str, dict[int, float]]:
    """Milliseconds per image by batch size, the ways measured in turn, the median of five rounds."""
    engine = exitkit.compile(ee, 2.0, optimize=True)
    runs: dict[str, Callable[[Any], Any]] = {
        "ResNet-20": compile_backbone(capture(small)),
        "ResNet-56": compile_backbone(capture(ee.backbone, ee.example.spec.batch(ee.example.tensors))),
    }
    for budget in BUDGETS[:3]:
        runs[f"exits at {budget:.0%}"] = engine.at(outputs.curve().at_budget(budget))
    times: dict[str, dict[int, list[float]]] = {name: {1: [], 64: []} for name in runs}
    with torch.inference_mode():
        for batch in (1, 64):
            chunks = images[: 256 if batch == 1 else 1024].split(batch)
            for _ in range(6):
                for name, run in runs.items():
                    started = time.perf_counter()
                    for chunk in chunks:
                        run(chunk if name.startswith("exits") else (chunk,))
                    times[name][batch].append(1e3 * (time.perf_counter() - started) / (batch * len(chunks)))
    return {name: {batch: statistics.median(t[1:]) for batch, t in those.items()} for name, those in times.items()}


def _time_table(times: dict[str, dict[int, float]]) -> Table:
    whole = times["ResNet-56"]
    rows = [
        (name, *(text for b, t in those.items() for text in (f"{t:.2f}", f"{t / whole[b]:.0%}")))
        for name, those in times.items()
    ]
    headings = ("", "batch 1", "of ResNet-56", "batch 64", "of ResNet-56")
    return table(headings, rows, "Milliseconds per image, compiled", machine()["device"])


def _table(rows: dict[str, list[ExitOutputs]], args: argparse.Namespace, images: int) -> Table:
    return table(
        ("exits", "each alone", *(f"{budget:.0%}" for budget in BUDGETS), "no sample leaves"),
        [_row(name, runs) for name, runs in rows.items()],
        "CIFAR-10, frozen ResNet-56 with exits: accuracy (%) by share of its MACs",
        f"{images:,} training and {args.test_images:,} test images, {args.epochs} epochs, {len(args.exits or [0])} seeds; "
        "exits' own accuracy at their own cost in brackets",
    )


def _row(name: str, runs: list[ExitOutputs]) -> tuple[str, ...]:
    exits = [
        [100 * float(accuracy) for accuracy in column] for column in zip(*(r.accuracy() for r in runs), strict=True)
    ]
    *own, last = (f"{cell(values)} ({c:.0%})" for values, c in zip(exits, runs[0].costs, strict=True))
    return name, " ".join(own), *(cell([at(run, budget) for run in runs], 2) for budget in BUDGETS), last


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of ResNet-56")
    parser.add_argument("--small", type=Path, required=True, help="safetensors file of ResNet-20")
    parser.add_argument("--exits", type=Path, nargs="+", help="exits that earlier runs trained")
    parser.add_argument("--at", nargs="+", default=["layer1.1"])
    parser.add_argument("--heads", nargs="+", default=["branch-2"], help="one for each exit")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--test-images", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--out", type=Path, default=Path("results/front"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
