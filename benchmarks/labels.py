"""What labels and a teacher are worth: exits on a frozen CIFAR-10 ResNet-20, from few labels, from many and from none.

    python benchmarks/labels.py --data DIR --weights cifar10_resnet20.safetensors

DIR and the weights are those of ``benchmarks/cifar10.py``. Three exits (method sdn) learn from cached features by the
exit-wise loss, by distillation from the backbone (Phuong and Lampert 2019, annealed temperature) or by cloning it (temperature
1, the behavioural cloning of Zero Time Waste, appendix A.2), without augmentation. The
backbone was trained on all the labels, those that the rows do without too. Rows that are compared take as many steps:
distillation at a high temperature copies the backbone's logits, for which the first exits need many.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from cifar10 import load
from rich.table import Table
from tables import cell, table, write
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit.common.console import make_console
from exitkit.evaluation import ExitOutputs
from exitkit.models import cifar_resnet
from exitkit.training import Distillation, Loss

EXITWISE, DISTILLED = Loss(), Loss(distillation=Distillation("last"))
CLONED = Loss(distillation=Distillation("last", confidence_limit=None, divergence="kl"))
BATCH = 128


def main() -> None:
    args = _arguments()
    console, started = make_console(), time.perf_counter()
    train = load(args.data / "cifar10_train.npz", args.images)
    test = load(args.data / "cifar10_test.npz", args.test_images)
    runs: dict[str, list[ExitOutputs]] = {}
    for seed in range(args.seeds):
        for name, (pixels, labels, steps, loss) in _rows(args, *train).items():
            runs.setdefault(name, []).append(_run(args, pixels, labels, steps, loss, test, seed))
            exits = " ".join(f"{accuracy:.2%}" for accuracy in runs[name][-1].accuracy())
            console.print(f"seed {seed}  {name}: {exits}  ({time.perf_counter() - started:.0f} s)")
    console.print(_table(args, runs))
    accuracies = {name: [(100 * run.accuracy()).tolist() for run in those] for name, those in runs.items()}
    write(args.out, args, exits=accuracies)


def _rows(args: argparse.Namespace, images: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor, int, Loss]]:
    """Images, labels (-1 for none), steps and loss of each row."""
    few, none = args.labelled, torch.full_like(labels, -1)
    partly = torch.cat([labels[:few], none[few:]])
    short, long = args.steps // 5, args.steps
    named = {"short": short, "long": long}
    rows: dict[str, tuple[Tensor, Tensor, int, Loss]] = {}
    for word, steps in named.items():
        rows[f"{few:,} labelled, {word}"] = (images[:few], labels[:few], steps, EXITWISE)
        rows[f"{few:,} labelled, distilled, {word}"] = (images[:few], labels[:few], steps, DISTILLED)
    rows[f"{few:,} labelled + {len(images) - few:,}, distilled, long"] = (images, partly, long, DISTILLED)
    rows[f"{len(images):,} labelled, long"] = (images, labels, long, EXITWISE)
    rows[f"{len(images):,} without labels, distilled, long"] = (images, none, long, DISTILLED)
    rows[f"{len(images):,} without labels, cloned, long"] = (images, none, long, CLONED)
    return {name: row for name, row in rows.items() if args.only in name}


def _run(
    args: argparse.Namespace,
    pixels: Tensor,
    labels: Tensor,
    steps: int,
    loss: Loss,
    test: tuple[Tensor, Tensor],
    seed: int,
) -> ExitOutputs:
    torch.manual_seed(seed)
    ee = exitkit.attach(
        cifar_resnet(20, weights=args.weights), at_cost=[0.25, 0.5, 0.75], method="sdn", head=args.head
    )
    loader: DataLoader[Any] = DataLoader(TensorDataset(pixels, labels), batch_size=BATCH, shuffle=True)
    epochs = round(steps / len(loader))
    exitkit.Trainer(ee, epochs=epochs, loss=loss, seed=seed, cache=True, show_progress=False).fit(loader)
    return exitkit.collect(ee, list(zip(test[0].split(500), test[1].split(500), strict=True)))


def _table(args: argparse.Namespace, runs: dict[str, list[ExitOutputs]]) -> Table:
    rows = [
        (name, *(cell([100 * float(run.accuracy()[m]) for run in those]) for m in range(4)))
        for name, those in runs.items()
    ]
    return table(
        ("trained on", *(f"exit {m}" for m in range(3)), "backbone"),
        rows,
        f"CIFAR-10, frozen ResNet-20, heads {args.head}: accuracy (%) of each exit",
        f"{args.steps // 5} steps (short) or {args.steps} (long) of {BATCH} images, {args.test_images:,} test images, "
        f"{args.seeds} seeds",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the ResNet-20")
    parser.add_argument("--head", default="2L-256")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--out", type=Path, default=Path("results/labels.json"))
    counts = (("images", 5_000), ("labelled", 1_000), ("test-images", 5_000), ("steps", 800), ("seeds", 3))
    for name, default in counts:
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
