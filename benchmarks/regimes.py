"""What a regime, a teacher and labels are worth: exits on a pretrained CIFAR-10 ResNet, trained in several ways.

    python benchmarks/regimes.py --data DIR --weights cifar10_resnet20.safetensors --depth 20

DIR and the weights are those of ``benchmarks/cifar10.py``. Three exits at a quarter, a half and three quarters of the
backbone (method sdn), Adam at 1e-3 for the heads and a tenth of it for a backbone that learns, a cosine to 0.

* Regimes, on flipped and shifted images: accuracy by share of ResNet-56's MACs, beside the static front: the ResNets of the
  same repository, each as it is.
* Few labels: 1,000 labelled images, by the exit-wise loss and by distillation from the backbone, without and with the other
  images unlabelled; and all images without any label. The backbone is frozen (it was trained on all labels), images are not
  augmented, features come from the cache, and every run takes as many steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import Augmented, load
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit.cli.bench import machine
from exitkit.console import make_console
from exitkit.evaluation import ExitOutputs
from exitkit.files import replacing
from exitkit.models import cifar_resnet
from exitkit.training import Distillation, Loss

# Top-1 on all 10,000 test images (the repository's own), and MACs as a share of ResNet-56's.
STATIC = {20: (91.73, 0.33), 32: (92.63, 0.55), 44: (93.10, 0.78), 56: (93.39, 1.0)}
BACKBONE = {"backbone_lr": 1e-4}
REGIMES: dict[str, dict[str, Any]] = {
    "disjoint": {},
    "mixed": {"regime": "mixed", **BACKBONE},
    "alternating": {"regime": "alternating", **BACKBONE},
}
TEACHER = Loss(distillation=Distillation("last"))
HEAD_EPOCHS = 20
Job = tuple[Iterable[Any], dict[str, Any]]
"""Batches, and the trainer's options."""

BUDGETS = (0.25, 0.5, 0.75, 0.9, 1.0)


def main() -> None:
    args = _arguments()
    console, started = make_console(), time.perf_counter()
    images, labels = load(args.data / "cifar10_train.npz", args.images)
    test = load(args.data / "cifar10_test.npz", args.test_images)
    jobs: dict[str, Job] = _label_jobs(args, images, labels)
    for name in args.regimes.split(","):
        jobs[name] = (Augmented(images, labels), {"epochs": args.epochs, **REGIMES[name]})
    runs: dict[str, list[ExitOutputs]] = {}
    for seed in range(args.seeds):
        for name, (batches, options) in jobs.items():
            begun = time.perf_counter()
            runs.setdefault(name, []).append(_run(args, batches, test, seed, options))
            exits = " ".join(f"{accuracy:.2%}" for accuracy in runs[name][-1].accuracy())
            console.print(f"seed {seed}  {name}: {exits}  ({time.perf_counter() - begun:.0f} s)")
    whole_macs = exitkit.inspect(cifar_resnet(56), show=False).anatomy.macs
    share = next(iter(runs.values()))[0].backbone_macs / whole_macs
    _report(console, args, runs, share)
    _write(args, runs, {"share_of_resnet56": share, "seconds": time.perf_counter() - started, **machine()})


def _label_jobs(args: argparse.Namespace, images: Tensor, labels: Tensor) -> dict[str, Job]:
    """What heads of a frozen backbone learn from, and how."""
    few, unknown = args.labelled, torch.full_like(labels, -1)
    partly = torch.cat([labels[:few], unknown[few:]])
    repeat = max(1, len(images) // few)

    def job(pixels: Tensor, targets: Tensor, times: int = 1, loss: Loss = TEACHER) -> Job:
        loader = DataLoader(TensorDataset(pixels, targets), batch_size=128, shuffle=True)
        return loader, {"epochs": HEAD_EPOCHS * times, "loss": loss, "cache": True}

    return {
        f"{len(images):,} labelled": job(images, labels, loss=Loss()),
        f"{few:,} labelled": job(images[:few], labels[:few], repeat, Loss()),
        f"{few:,} labelled, distilled": job(images[:few], labels[:few], repeat),
        f"{few:,} labelled + {len(images) - few:,}, distilled": job(images, partly),
        f"{len(images):,} without labels, distilled": job(images, unknown),
    }


def _run(
    args: argparse.Namespace, batches: Iterable[Any], test: tuple[Tensor, Tensor], seed: int, options: dict[str, Any]
) -> ExitOutputs:
    torch.manual_seed(seed)
    backbone = cifar_resnet(args.depth, weights=args.weights)
    ee = exitkit.attach(backbone, at_cost=[0.25, 0.5, 0.75], method="sdn", head=args.head)
    exitkit.Trainer(ee, seed=seed, show_progress=False, **options).fit(batches)
    return exitkit.collect(ee, list(zip(test[0].split(500), test[1].split(500), strict=True)))


def _report(console: Console, args: argparse.Namespace, runs: dict[str, list[ExitOutputs]], share: float) -> None:
    regimes = args.regimes.split(",")
    table = Table(
        title=f"CIFAR-10, ResNet-{args.depth} with 3 exits ({args.head}): accuracy (%) by share of ResNet-56's MACs",
        caption=f"{args.images:,} training and {args.test_images:,} test images, {args.epochs} epochs, {args.seeds} seeds",
        caption_justify="left",
    )
    for heading in ("regime", *(f"{share * budget:.1%}" for budget in BUDGETS), "nobody leaves"):
        table.add_column(heading, justify="left" if heading == "regime" else "right")
    for name in regimes:
        cells = [_cell([_at(run, budget) for run in runs[name]]) for budget in BUDGETS]
        table.add_row(name, *cells, _cell([100 * float(run.accuracy()[-1]) for run in runs[name]]))
    console.print(table)
    points = ", ".join(f"ResNet-{depth} {accuracy:.2f} at {cost:.0%}" for depth, (accuracy, cost) in STATIC.items())
    console.print(f"static front (10,000 test images): {points}")
    table = Table(title=f"The backbone frozen: accuracy (%) of each exit, {args.seeds} seeds")
    for heading in ("trained on", *(f"exit {m}" for m in range(3)), "backbone"):
        table.add_column(heading, justify="left" if heading == "trained on" else "right")
    for name in (name for name in runs if name not in regimes):
        exits = np.array([100 * run.accuracy() for run in runs[name]])
        table.add_row(name, *(_cell(list(column)) for column in exits.T))
    console.print(table)


def _at(run: ExitOutputs, budget: float) -> float | None:
    return None if run.costs[0] >= budget else 100 * run.curve().at_budget(budget).accuracy


def _cell(values: list[float | None]) -> str:
    kept = [value for value in values if value is not None]
    if not kept or len(kept) < len(values):
        return "-"
    return f"{np.mean(kept):.2f}" + (f" ± {np.std(kept):.2f}" if len(kept) > 1 else "")


def _write(args: argparse.Namespace, runs: dict[str, list[ExitOutputs]], about: dict[str, Any]) -> None:
    setting = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    results = {
        name: {
            "exits": [(100 * run.accuracy()).tolist() for run in those],
            "budgets": {f"{budget:.0%}": [_at(run, budget) for run in those] for budget in BUDGETS},
            "costs": those[0].costs.tolist(),
        }
        for name, those in runs.items()
    }
    with replacing(args.out / "results.json") as temporary:
        temporary.write_text(json.dumps({"about": {**setting, **about}, "runs": results, "static": STATIC}, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the backbone")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--head", default="2L-256")
    parser.add_argument("--regimes", default="disjoint,mixed,alternating", help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("results/regimes"))
    counts = (("images", 4_000), ("labelled", 1_000), ("test-images", 5_000), ("epochs", 8), ("seeds", 1))
    for name, default in counts:
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
