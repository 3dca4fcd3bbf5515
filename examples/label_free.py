"""Exits without a single label: a network whose training labels are gone teaches its own exits, on images alone.

    python examples/label_free.py --data DIR --weights cifar10_resnet20.safetensors --depth 20 [--quick]

It needs nothing beside exitkit.

DIR holds ``cifar10_train.npz`` and ``cifar10_test.npz`` (``images`` N×32×32×3 uint8, and ``labels``); the weights are those of
github.com/akamaster/pytorch_resnet_cifar10 as safetensors. Exits learn by distillation from the network's own answers, τ is
chosen for a bound on *disagreement* with the network, and a monitor watches the exits taken. Labels of the test images are
read once, at the very end, to show what that was worth.

ResNet-20, ``--quick``, one run on a CPU: on 1,000 new images 90.0% of the network's MACs, 1.6% other answers than the
network's (at most 2% were allowed), 91.9% accuracy against its 92.5%. It takes 24 s of CPU time on one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit.evaluation import ShiftMonitor
from exitkit.multi_exit.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from exitkit.training import Distillation, Loss


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    images = load(args.data / "cifar10_train.npz", "images", args.images)
    others = load(args.data / "cifar10_test.npz", "images", args.test_images)
    half = len(others) // 2
    calibration, test = others[:half], others[half:]

    backbone = exitkit.models.cifar_resnet(args.depth, weights=args.weights).eval()
    ee = exitkit.attach(backbone, at_cost=[0.25, 0.5, 0.75], method=args.method, head=args.head)
    loss = Loss(distillation=Distillation("last", confidence_limit=None, divergence="kl"))
    exitkit.Trainer(ee, loss=loss, epochs=args.epochs, seed=args.seed).fit(loader(images, shuffle=True))

    outputs = exitkit.collect(ee, loader(calibration))
    policy = exitkit.choose_threshold(outputs, max_drop=args.max_drop, risk="disagreement")
    print(policy.guarantee)
    monitor, engine = ShiftMonitor(outputs, policy), exitkit.compile(ee, policy)
    answers, exits = [], []
    for prediction in engine.map(loader(test)):
        monitor.update(prediction.exit, prediction.score)
        answers.append(prediction.logits.argmax(1))
        exits.append(prediction.exit)
    answered, left = torch.cat(answers), torch.cat(exits)
    cost = float(outputs.costs[left.numpy()].mean())
    print(f"{len(test)} new images for {cost:.1%} of the network's MACs. {monitor.report()}")

    with torch.no_grad():
        alone = torch.cat([backbone(batch) for (batch,) in loader(test)]).argmax(1)
    labels = load(args.data / "cifar10_test.npz", "labels", args.test_images)[half:]
    print(f"Answers other than the whole network's: {(answered != alone).double().mean():.2%}")
    print(
        f"Accuracy, from labels that nothing above has seen: {(answered == labels).double().mean():.2%} with exits, "
        f"{(alone == labels).double().mean():.2%} without"
    )
    print(f"{time.perf_counter() - started:.0f} s")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of a CIFAR ResNet")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--method", default="ztw")
    parser.add_argument("--head", default="2L-256")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--max-drop", type=float, default=0.02, help="largest share of answers that may differ")
    parser.add_argument("--images", type=int, default=50_000, help="use at most so many training images")
    parser.add_argument("--test-images", type=int, default=10_000, help="use at most so many test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2,000 training and 2,000 test images, 3 epochs")
    args = parser.parse_args(arguments)
    if args.quick:
        args.images, args.test_images, args.epochs = 2_000, 2_000, 3
    return args


def load(path: Path, array: str, count: int) -> Tensor:
    """The first ``count`` images, normalised (N, 3, 32, 32), or labels (N,)."""
    if not path.is_file():
        raise exitkit.ExitkitError(f"{str(path)!r} does not exist; it holds CIFAR-10 as arrays 'images' and 'labels'")
    with np.load(path) as arrays:
        values = torch.from_numpy(arrays[array][:count])
    if array == "labels":
        return values.long()
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (IMAGENET_MEAN, IMAGENET_STD))
    return (values.permute(0, 3, 1, 2).float() / 255 - mean) / std


def loader(images: Tensor, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(images), 64, shuffle=shuffle)


if __name__ == "__main__":
    try:
        main()
    except exitkit.ExitkitError as error:
        raise SystemExit(f"label_free: {error}") from None
