"""How an ensemble is best fitted (Zero Time Waste, algorithm 1 and appendix A.1): by what, and on which images.

    python benchmarks/ensemble.py --data DIR --weights cifar10_resnet20.safetensors

DIR and the weights are those of ``benchmarks/cifar10.py``. A frozen ResNet-20 has an exit after every block (method ztw, head
``conv``); for each seed the heads are trained once, and then the same ensembles are fitted anew in every way: by L-BFGS with
and without the penalty, and for 500 epochs by Adam (the published code) and by SGD (the appendix), on the training images or
on test images that neither heads nor backbone saw. All are measured on the other test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import Augmented, load
from tables import BUDGETS, at, cell, table, write
from torch import Tensor
from torch.nn import functional as F

import exitkit
from exitkit.common.console import make_console
from exitkit.evaluation import ExitOutputs
from exitkit.models import cifar_resnet
from exitkit.training import EnsembleFit, fit_ensemble

FITS = {
    "L-BFGS, penalty 0.01": EnsembleFit(),
    "L-BFGS": EnsembleFit(penalty=0),
    "Adam, 500 epochs": EnsembleFit("adam", epochs=500, penalty=0),
    "SGD, 500 epochs": EnsembleFit("sgd", epochs=500, penalty=0),
}
MEAN = "not fitted: the even mean"
Found = dict[str, list[dict[str, Any]]]


def main() -> None:
    args = _arguments()
    train = load(args.data / "cifar10_train.npz", args.images)
    test = load(args.data / "cifar10_test.npz", None)
    unseen = tuple(part[: args.unseen] for part in test)
    measured = _batches(*(part[args.unseen :][: args.tested] for part in test))
    found: Found = {}
    for seed in range(args.seeds):
        _add(found, args, seed, train, {"training": _batches(*train), "unseen": _batches(*unseen)}, measured)
        write(args.out / "ensemble.json", args, found=found)
    make_console().print(_table(found, args))


def _add(
    found: Found,
    args: argparse.Namespace,
    seed: int,
    train: tuple[Tensor, Tensor],
    fitted_on: dict[str, list[tuple[Tensor, Tensor]]],
    measured: list[tuple[Tensor, Tensor]],
) -> None:
    """The rows of a seed."""
    torch.manual_seed(seed)
    ee = exitkit.attach(cifar_resnet(20, weights=args.weights), every=1, method="ztw", head="conv")
    even = {name: value.clone() for name, value in ee.combiners.state_dict().items()}
    exitkit.Trainer(ee, epochs=args.epochs, seed=seed, channels_last=True).fit(Augmented(*train))
    ee.combiners.load_state_dict(even)
    _keep(found, MEAN, exitkit.collect(ee, measured))
    for images, batches in fitted_on.items():
        for name, fit in FITS.items():
            ee.combiners.load_state_dict(even)
            fit_ensemble(ee, batches, fit, show_progress=False)
            _keep(found, f"{name}, on {images} images", exitkit.collect(ee, measured))


def _keep(found: Found, name: str, outputs: ExitOutputs) -> None:
    assert outputs.labels is not None
    losses = [float(F.nll_loss(outputs.log_probs[:, m], outputs.labels)) for m in range(len(outputs.macs) - 1)]
    row = {"losses": losses, "budgets": [at(outputs, budget) for budget in BUDGETS]}
    found.setdefault(name, []).append(row)
    make_console().print(f"{name}: log-loss {np.mean(losses):.4f}, last {losses[-1]:.4f}, {row['budgets']}")


def _batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(500), labels.split(500), strict=True))


def _table(found: Found, args: argparse.Namespace) -> Any:
    rows = [
        (
            name,
            cell([float(np.mean(run["losses"])) for run in runs], 3),
            cell([run["losses"][-1] for run in runs], 3),
            *(cell([run["budgets"][b] for run in runs], 2) for b in range(len(BUDGETS))),
        )
        for name, runs in found.items()
    ]
    return table(
        ("ensemble", "log-loss, all exits", "last exit", *(f"{budget:.0%}" for budget in BUDGETS)),
        rows,
        "CIFAR-10, frozen ResNet-20, 8 exits, ztw: test log-loss, and accuracy (%) by share of its MACs",
        f"{args.images:,} training and {args.unseen:,} unseen images, {args.tested:,} measured, {args.seeds} seeds",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the backbone")
    parser.add_argument("--out", type=Path, default=Path("results/ensemble"))
    for name, default in (("images", 8_000), ("epochs", 6), ("unseen", 2_000), ("tested", 8_000), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
