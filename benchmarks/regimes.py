"""Training regimes (Kubaty et al.) on CIFAR-10: a pretrained ResNet, and a small Vision Transformer trained on the spot.

    python benchmarks/regimes.py resnet20 --data DIR --weights cifar10_resnet20.safetensors
    python benchmarks/regimes.py vit --data DIR

DIR and the weights are those of ``benchmarks/cifar10.py``. In the paper, ``disjoint`` and ``mixed`` start from a
backbone that was trained alone, ``joint`` from random weights. Here:

* ResNets: the backbone's weights come from 200 epochs on all 50,000 images, which no row pays for; ``joint`` has as many
  epochs as the others; it shows what a trained backbone is worth, not which regime is better. Below the regimes stands the
  best network of the same family, without exits, that costs no more.
* ``vit``: every row has the same images and the same number of epochs in all; ``joint`` spends those in which the others'
  backbone is trained alone (a phase of ``exitkit.Trainer``) on everything at once.

Method sdn, flipped and shifted images, Adam, a cosine to 0 in every phase. Accuracy by share of the backbone's MACs.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from cifar10 import STATIC, Augmented, load
from rich.table import Table
from tables import BUDGETS, at, cell, numbers, over_budgets, table, write
from torch import Tensor, nn

import exitkit
from exitkit.common.console import make_console
from exitkit.evaluation import ExitOutputs
from exitkit.models import cifar_resnet
from exitkit.training import Phase

DEPTHS = {"resnet20": 20, "resnet56": 56}
EXITS: dict[str, dict[str, Any]] = {
    "resnet20": {"every": 2, "head": "2L-256"},
    "resnet56": {"every": 3, "head": "2L-256"},
    "vit": {"every": 1, "head": "1L"},
}
PRETRAINED: dict[str, Any] = {"images": 15_000, "epochs": 3, "pretraining": 0, "backbone_lr": 1e-4}
DEFAULTS: dict[str, dict[str, Any]] = {
    "resnet20": PRETRAINED,
    "resnet56": PRETRAINED,
    "vit": {"images": 10_000, "epochs": 15, "pretraining": 30, "backbone_lr": 1e-3},
}


def main() -> None:
    args = _arguments()
    console, started = make_console(), time.perf_counter()
    train = load(args.data / "cifar10_train.npz", args.images)
    test = load(args.data / "cifar10_test.npz", args.test_images)
    runs: dict[str, list[ExitOutputs]] = {name: [] for name in args.regimes.split(",")}
    for seed in range(args.seeds):
        backbone = _trained(args, train, seed)
        for name, those in runs.items():
            those.append(_run(args, name, backbone, train, test, seed))
            exits = " ".join(f"{accuracy:.2%}" for accuracy in those[-1].accuracy())
            budgets = " ".join(cell([at(those[-1], budget)], 2) for budget in BUDGETS)
            console.print(
                f"seed {seed}  {name}: exits {exits}  budgets {budgets}  ({time.perf_counter() - started:.0f} s)"
            )
    console.print(_table(args, runs))
    write(args.out / f"{args.backbone}.json", args, runs=numbers(runs), seconds=time.perf_counter() - started)


def untrained(name: str, seed: int) -> nn.Module:
    """The backbone with random weights."""
    torch.manual_seed(seed)
    if name in DEPTHS:
        return cifar_resnet(DEPTHS[name])
    from timm.models import VisionTransformer

    size: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2,
    }
    return VisionTransformer(**size, num_classes=10)


def _trained(args: argparse.Namespace, train: tuple[Tensor, Tensor], seed: int) -> nn.Module:
    """The backbone that disjoint and mixed start from."""
    if args.backbone in DEPTHS:
        return cifar_resnet(DEPTHS[args.backbone], weights=args.weights)
    ee = _attached(args, untrained(args.backbone, seed))
    last = len(ee.classifiers)
    alone = Phase((last,), tuple(range(last + 1)))
    _fit(ee, args, train, regime=[alone], epochs=args.pretraining, seed=seed)
    return exitkit.detach(ee)


def _fit(ee: exitkit.MultiExitModel, args: argparse.Namespace, train: tuple[Tensor, Tensor], **options: Any) -> None:
    speed = {"mixed_precision": args.mixed_precision, "channels_last": True}
    exitkit.Trainer(ee, show_progress=False, **speed, **options).fit(Augmented(*train))


def _attached(args: argparse.Namespace, backbone: nn.Module) -> exitkit.MultiExitModel:
    example = torch.zeros(2, 3, 32, 32)
    return exitkit.attach(backbone, example, method="sdn", **EXITS[args.backbone])


def _run(
    args: argparse.Namespace,
    regime: str,
    backbone: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    seed: int,
) -> ExitOutputs:
    epochs, options = args.epochs, {}
    if regime == "joint":
        start = untrained(args.backbone, seed)
        epochs += args.pretraining
    else:
        start = copy.deepcopy(backbone)
        options = {} if regime == "disjoint" else {"backbone_lr": args.backbone_lr}
    torch.manual_seed(seed)
    ee = _attached(args, start)
    _fit(ee, args, train, regime=regime, epochs=epochs, seed=seed, **options)
    return exitkit.collect(ee, list(zip(test[0].split(500), test[1].split(500), strict=True)))


def _table(args: argparse.Namespace, runs: dict[str, list[ExitOutputs]]) -> Table:
    first = next(iter(runs.values()))[0]
    before = f"{args.pretraining} + {args.epochs}" if args.pretraining else f"{args.epochs}"
    rows = over_budgets(runs)
    if args.backbone in DEPTHS:
        rows.append(("(a network of that cost)", *(_static(DEPTHS[args.backbone], budget) for budget in BUDGETS), ""))
    return table(
        ("regime", *(f"{budget:.0%}" for budget in BUDGETS), "no sample leaves"),
        rows,
        f"CIFAR-10, {args.backbone}, {len(first.macs) - 1} exits: accuracy (%) by share of its MACs",
        f"{args.images:,} training and {args.test_images:,} test images, {before} epochs, {args.seeds} seeds",
    )


def _static(depth: int, budget: float) -> str:
    """The static network's accuracy, on all 10,000 test images."""
    share = budget * STATIC[depth][1]
    return max((f"{accuracy:.2f}" for accuracy, cost in STATIC.values() if cost <= share), default="-")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=list(EXITS))
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, help="safetensors file of the ResNet")
    parser.add_argument("--regimes", default="disjoint,mixed,joint", help="comma-separated")
    parser.add_argument("--images", type=int, help="of training; 15,000 for a ResNet, 10,000 for the ViT")
    parser.add_argument("--epochs", type=int, help="3 for a ResNet, 15 for the ViT")
    parser.add_argument("--pretraining", type=int, help="epochs of the ViT alone: 30")
    parser.add_argument("--backbone-lr", type=float, help="in mixed: 1e-4 for a ResNet, 1e-3 for the ViT")
    parser.add_argument("--test-images", type=int, default=5_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--out", type=Path, default=Path("results/regimes"))
    args = parser.parse_args()
    for name, value in DEFAULTS[args.backbone].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.backbone in DEPTHS and args.weights is None:
        parser.error(f"{args.backbone} needs --weights")
    return args


if __name__ == "__main__":
    main()
