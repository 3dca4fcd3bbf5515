"""The demo: handwritten digits, a small residual network trained on the spot, exits, the table and the plot."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from exitkit.cli.bench import compare, comparison_table
from exitkit.cli.data.split import Split
from exitkit.cli.options import check_unused
from exitkit.cli.writing import next_steps, write_results, written
from exitkit.common.errors import ExitkitError
from exitkit.common.intervals import with_interval
from exitkit.methods.presets import PBEE, SDN, ZTW
from exitkit.models import cifar_resnet
from exitkit.multi_exit.preprocessing import ImagePreprocessing
from exitkit.report.run import RESULTS

_SIDE = 16
_TEST = 800
"""Half of them choose τ in ``exitkit calibrate``, which needs 299 for its usual promise."""

_DATA = f"scikit-learn digits, {_TEST} test images"


def run_demo(out: Path, console: Console) -> None:
    """Train a ResNet-20 on scikit-learn's digits, attach exits by three methods, show what they save.

    Raises:
        ArgumentError: ``out`` holds another run than a demo's.
    """
    if not _is_demo(out):
        check_unused(out)
    started = time.perf_counter()
    torch.manual_seed(0)
    split = _digits()
    train, test = split.loaders(64, None, 0)
    console.print("1. Training a backbone: ResNet-20 on scikit-learn's handwritten digits (997 images)")
    backbone = _train_backbone(cifar_resnet(20), train)
    console.print("2. Attaching an exit after every block and training the exits; the backbone stays as it is")
    compared = compare(
        backbone,
        [SDN(), PBEE(), ZTW()],
        train,
        test,
        placement={"every": 1, "head": "1L"},
        training={"epochs": 4, "lr": 2e-3},
        example_inputs=torch.zeros(2, 3, _SIDE, _SIDE),
        report=lambda line: console.print(f"   {line}"),
    )
    results = dict(compared)
    outputs = {name: one.outputs for name, one in results.items()}
    console.print(comparison_table(outputs, "Accuracy for a share of the compute"))
    point = outputs["ztw"].curve().at_budget(0.5)
    console.print(
        f"With ZTW and τ = {point.policy.shown()} the network spends {point.cost:.0%} of its compute "
        f"and has an accuracy of {with_interval(point.accuracy, _TEST)}; alone it has {outputs['ztw'].accuracy()[-1]:.1%}. "
        f"({time.perf_counter() - started:.0f} s)"
    )
    about = {"model": "exitkit.models:cifar_resnet", "data": _DATA}
    written(out, lambda folder: write_results(results, folder, about, split, backbone))
    for line in next_steps(out):
        console.print(line, soft_wrap=True)


def _is_demo(out: Path) -> bool:
    """Whether a folder holds the run of a demo, which the next one takes the place of."""
    kept = out / RESULTS
    return kept.exists() and _DATA in kept.read_text("utf-8", "replace")


def _digits() -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ExitkitError("the demo needs scikit-learn: pip install 'exitkit[cli]'") from error
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    pixels = F.interpolate(pixels, (_SIDE, _SIDE), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(pixels))
    train, test = (TensorDataset(pixels[part], torch.tensor(labels)[part]) for part in (order[_TEST:], order[:_TEST]))
    grey = (0.5,) * 3
    return Split(train, test, preprocessing=ImagePreprocessing((3, _SIDE, _SIDE), grey, grey))


def _train_backbone(backbone: nn.Module, train: DataLoader[tuple[torch.Tensor, ...]], epochs: int = 6) -> nn.Module:
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(train))
    for _ in range(epochs):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(backbone(images), labels).backward()
            optimizer.step()
            schedule.step()
    return backbone.eval()
