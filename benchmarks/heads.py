"""What a head on maps is worth: accuracy gained against MACs spent, on a frozen CIFAR-10 ResNet.

    python benchmarks/heads.py --data DIR --weights cifar10_resnet20.safetensors --depth 20 [--every 1]

DIR and the weights are those of ``benchmarks/cifar10.py``. Independent exits (method sdn) with each kind of head read the
same features of the same batches, so that nothing but the head differs: the backbone runs once for all of them. ``gain`` is
what the head adds to the accuracy of pooling and a linear layer (``1L``), averaged over the exits, in points; ``per 1%`` is
that gain for each per cent of the backbone's MACs that the heads spend beyond those of ``1L``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import Augmented, load
from rich.table import Table
from tables import BUDGETS, at, cell, table, write
from torch import Tensor
from torch.nn import functional as F

import exitkit
from exitkit.cli.bench import head_share
from exitkit.common.console import make_console
from exitkit.evaluation import ExitOutputs
from exitkit.models import cifar_resnet

HEADS = ("1L", "strided", "separable", "conv", "2L-256")


def main() -> None:
    args = _arguments()
    console = make_console()
    backbone = cifar_resnet(args.depth, weights=args.weights).eval().requires_grad_(False)
    train = Augmented(*load(args.data / "cifar10_train.npz", args.images))
    test = load(args.data / "cifar10_test.npz", args.test_images)
    started, runs = time.perf_counter(), []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        models = {head: exitkit.attach(backbone, every=args.every, method="sdn", head=head) for head in HEADS}
        _train(list(models.values()), train, args.epochs)
        batches = list(zip(test[0].split(500), test[1].split(500), strict=True))
        runs.append({head: exitkit.collect(model, batches) for head, model in models.items()})
        console.print(f"seed {seed}: {time.perf_counter() - started:.0f} s")
    rows = {head: _row([run[head] for run in runs], [run["1L"] for run in runs]) for head in HEADS}
    console.print(_table(rows, args, len(runs[0]["1L"].macs) - 1, float(runs[0]["1L"].accuracy()[-1])))
    shares = {head: head_share(model) for head, model in models.items()}
    write(args.out / "results.json", args, heads=rows, shares=shares, seconds=time.perf_counter() - started)


def _train(models: Sequence[exitkit.MultiExitModel], batches: Augmented, epochs: int) -> None:
    """Adam at 1e-3, a cosine to 0, the sum of the exits' cross-entropies."""
    parameters = [parameter for model in models for parameter in model.added_parameters()]
    for model in models:
        model.classifiers.train()  # heads standardise what they read while they learn
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for _ in range(epochs):
        for images, labels in batches:
            with torch.no_grad():
                features, _ = models[0].run_heads(images)
            losses = [F.cross_entropy(logits, labels) for model in models for logits in _answers(model, features)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            scheduler.step()


def _answers(model: exitkit.MultiExitModel, features: Sequence[Tensor]) -> list[Tensor]:
    return [classifier(feature) for classifier, feature in zip(model.classifiers, features, strict=True)]


def _row(runs: Sequence[ExitOutputs], plain: Sequence[ExitOutputs]) -> dict[str, Any]:
    """Means over seeds; accuracies in per cent, costs as shares of the backbone."""
    spent = float(runs[0].costs[-1] - 1)
    more = spent - float(plain[0].costs[-1] - 1)
    gains = [100 * (run.accuracy() - base.accuracy())[:-1].mean() for run, base in zip(runs, plain, strict=True)]
    exits = 100 * np.mean([run.accuracy() for run in runs], axis=0)
    gain = float(np.mean(gains))
    return {
        "heads": spent,
        "gain": gain,
        "per_percent": gain / (100 * more) if more > 0 else None,
        "budgets": {f"{budget:.0%}": [at(run, budget) for run in runs] for budget in BUDGETS},
        "exits": exits.tolist(),
    }


def _table(rows: dict[str, dict[str, Any]], args: argparse.Namespace, exits: int, backbone: float) -> Table:
    lines = []
    for head, row in rows.items():
        worth = "" if row["per_percent"] is None else f"{row['per_percent']:+.2f}"
        lines.append((head, f"{row['heads']:+.1%}", f"{row['gain']:+.1f}", worth, *map(cell, row["budgets"].values())))
    return table(
        ("head", "heads add", "gain", "per 1%", *next(iter(rows.values()))["budgets"]),
        lines,
        f"CIFAR-10, frozen ResNet-{args.depth}, {exits} exits, method sdn: accuracy (%) by share of its MACs",
        f"backbone {backbone:.2%}; {args.images:,} training and {args.test_images:,} test images, {args.epochs} epochs, "
        f"{args.seeds} seeds",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the backbone")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="an exit after every so many blocks")
    parser.add_argument("--out", type=Path, default=Path("results/heads"))
    for name, default in (("images", 5_000), ("test-images", 2_000), ("epochs", 4), ("seeds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
