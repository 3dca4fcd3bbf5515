"""Zero Time Waste's own setting: SDN, PBEE and ZTW on frozen CIFAR-10 ResNets, an exit after every block.

    python benchmarks/cifar10.py --data DIR --weights cifar10_resnet20.safetensors --depth 20            # short, CPU
    python benchmarks/cifar10.py --data DIR --weights cifar10_resnet56.safetensors --depth 56 --full     # GPU

DIR holds ``cifar10_train.npz`` and ``cifar10_test.npz`` (``images`` N×32×32×3 uint8, ``labels``). The weights are those
of github.com/akamaster/pytorch_resnet_cifar10 as safetensors. The full setting is the paper's (appendix A.1): all
training images, 50 epochs of Adam at 1e-3, divided by ten after epoch 15, three seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tables import cell, table, write
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit import PBEE, SDN, ZTW
from exitkit.cli.bench import compare, machine
from exitkit.cli.data import normalise
from exitkit.common.console import make_console
from exitkit.evaluation import ExitOutputs, plot_curves, plot_hindsight
from exitkit.models import cifar_resnet

# Zero Time Waste, table 1, CIFAR-10, ResNet-56 (backbone 92.0): accuracy at 25, 50, 75, 100% and Max.
PAPER = {
    "sdn": (77.7, 87.3, 91.1, 92.0, 92.1),
    "pbee": (69.8, 81.8, 87.5, 91.0, 92.1),
    "ztw": (80.3, 88.7, 91.5, 92.1, 92.1),
}
# The static front: top-1 of the weights' repository on all 10,000 test images, and MACs as a share of ResNet-56's, by depth.
STATIC = {20: (91.73, 0.33), 32: (92.63, 0.55), 44: (93.10, 0.78), 56: (93.39, 1.0)}
SHORT: dict[str, Any] = {"images": 8_000, "epochs": 6, "milestones": (4,), "seeds": 3}
FULL: dict[str, Any] = {"images": 50_000, "epochs": 50, "milestones": (15,), "seeds": 3}
WEIGHT_DECAY = 1e-4
BLACK = normalise(np.zeros((1, 1, 1, 3), np.uint8))


@dataclass
class Augmented:
    """Shuffled batches of normalised images, randomly flipped and shifted by up to 4 pixels, black coming in at the border."""

    images: Tensor
    labels: Tensor
    batch: int = 128

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.images)).split(self.batch):
            images = F.pad(self.images[rows] - BLACK, (4, 4, 4, 4)) + BLACK
            flips = torch.rand(len(rows)) < 0.5
            images[flips] = images[flips].flip(-1)
            top, left = torch.randint(0, 9, (2, len(rows)))
            shifted = [image[:, y : y + 32, x : x + 32] for image, y, x in zip(images, top, left, strict=True)]
            yield torch.stack(shifted), self.labels[rows]


def main() -> None:
    args = _arguments()
    setting = {**(FULL if args.full else SHORT)}
    setting |= {name: value for name, value in vars(args).items() if name in setting and value is not None}
    console = make_console()
    train = load(args.data / "cifar10_train.npz", setting["images"])
    test = load(args.data / "cifar10_test.npz", args.test_images)
    batches = [(images, labels) for images, labels in zip(test[0].split(500), test[1].split(500), strict=True)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = cifar_resnet(args.depth, weights=args.weights).to(device)
    before, started = _accuracy(backbone, batches, device), time.perf_counter()
    runs = []
    for seed in range(setting["seeds"]):
        console.print(f"seed {seed}")
        training = {"epochs": setting["epochs"], "milestones": setting["milestones"], "seed": seed}
        compared = compare(
            backbone,
            [SDN(), PBEE(), ZTW()],
            Augmented(*train),
            batches,
            placement={"every": 1, "head": "conv"},
            training={**training, "weight_decay": WEIGHT_DECAY},
            report=console.print,
        )
        runs.append({name: one.outputs for name, one in compared})
    after = _accuracy(backbone, batches, device)
    seconds = time.perf_counter() - started
    console.print(f"backbone before and after: {before:.2%}, {after:.2%}. {seconds:.0f} s on {machine()['device']}")
    console.print(_table(runs, args.depth, setting, len(train[0]), len(test[0])))
    _write(runs, args, {**setting, "backbone_before": before, "backbone_after": after, "seconds": seconds})
    if before != after:
        raise SystemExit("the frozen backbone's accuracy changed")


def _table(runs: list[dict[str, ExitOutputs]], depth: int, setting: dict[str, Any], images: int, tested: int) -> Table:
    outputs = next(iter(runs[0].values()))
    names = list(outputs.curve().budget_table().rows)
    rows = []
    for method in runs[0]:
        heads = f"+{runs[0][method].costs[-1] - 1:.1%}"
        rows.append((method, heads, *(cell([_value(run[method], name) for run in runs]) for name in names)))
    for method, values in PAPER.items():
        rows.append(
            (f"{method} (paper, ResNet-56)", "", *(f"{value:.1f}" for value in values[:4]), "", f"{values[4]:.1f}")
        )
    return table(
        ("method", "heads", *names),
        rows,
        f"CIFAR-10, frozen ResNet-{depth}, {len(outputs.macs) - 1} exits: accuracy (%) by share of its MACs",
        f"backbone {outputs.accuracy()[-1]:.2%}; {images:,} training and {tested:,} test images, {setting['epochs']} "
        f"epochs, mean ± std of {len(runs)} seeds. Paper: its ResNet-56 (92.0), all images, 50 epochs.",
    )


def _value(outputs: ExitOutputs, row: str) -> float | None:
    point = outputs.curve().budget_table().rows[row]
    return None if point is None else 100 * point.accuracy


def _write(runs: list[dict[str, ExitOutputs]], args: argparse.Namespace, about: dict[str, Any]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    plot_curves({name: outputs.curve() for name, outputs in runs[0].items()}, args.out / "curve.png")
    plot_hindsight(
        {name: outputs.hindsight_improvability() for name, outputs in runs[0].items()}, args.out / "hindsight.png"
    )
    rows = list(next(iter(runs[0].values())).curve().budget_table().rows)
    results = {method: {row: [_value(run[method], row) for run in runs] for row in rows} for method in runs[0]}
    exits = {method: outputs.accuracy().tolist() for method, outputs in runs[0].items()}
    costs = {method: outputs.costs.tolist() for method, outputs in runs[0].items()}
    write(args.out / "results.json", {"depth": args.depth, **about}, budgets=results, exits=exits, costs=costs)


def load(path: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    with np.load(path) as arrays:
        return normalise(arrays["images"][:limit]), torch.from_numpy(arrays["labels"][:limit].astype(np.int64))


@torch.inference_mode()
def _accuracy(backbone: nn.Module, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    backbone.eval()
    right = sum(int((backbone(images.to(device)).argmax(1).cpu() == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the backbone")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--full", action="store_true", help="the paper's setting instead of the short one")
    parser.add_argument("--out", type=Path, default=Path("results/cifar10"))
    for name in ("images", "epochs", "seeds"):
        parser.add_argument(f"--{name}", type=int, help="instead of the setting's value")
    parser.add_argument("--test-images", type=int, help="use only so many test images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
