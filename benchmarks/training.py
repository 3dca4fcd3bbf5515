"""How fast heads are trained on a frozen backbone: beside the least work there is, and from the feature cache.

    python benchmarks/training.py [--images 256] [--rounds 3]

Weights and data are random: speed does not depend on them.

* Head training: images per second of ``Trainer.fit``, against the bound "one forward of the backbone without gradients, and
  forward, loss and backward of the heads". ``Trainer`` does less than that where nothing reads the backbone's last layers: it
  stops after the last exit. Both are measured in turn, a round of each after the other; the best round of each counts, since
  what else a machine does only ever slows one down. Memory is what a process of its own needs for it at most, beyond the built
  model and the data (Linux).
* Cache: seconds per epoch with and without ``cache=True``, and of the pass that fills it, for linear heads on tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tables import table, write
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import exitkit
from exitkit.common.console import make_console
from exitkit.models import cifar_resnet

BATCH = 32


def _vit() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=100)
    return model


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = BertConfig(**(sizes | {"intermediate_size": 2048, "num_labels": 4}))
    return BertForSequenceClassification(config)


def _pixels(side: int, images: int) -> list[tuple[Any, int]]:
    return [(torch.randn(3, side, side), number % 4) for number in range(images)]


def _texts(images: int) -> list[dict[str, Any]]:
    mask = torch.ones(128, dtype=torch.int64)
    return [
        {"input_ids": torch.randint(1, 30_000, (128,)), "attention_mask": mask, "labels": number % 4}
        for number in range(images)
    ]


@dataclass(frozen=True)
class Case:
    """A backbone, its exits, and samples for it."""

    build: Callable[[], nn.Module]
    samples: Callable[[int], list[Any]]
    placement: dict[str, Any]

    def model(self) -> exitkit.MultiExitModel:
        torch.manual_seed(0)
        return exitkit.attach(self.build().eval(), **self.placement)


CASES = {
    "ResNet-56, 8 conv exits, ztw": Case(
        lambda: cifar_resnet(56), lambda images: _pixels(32, images), {"every": 3, "head": "conv", "method": "ztw"}
    ),
    "ResNet-56, 8 2L-256 exits, sdn": Case(
        lambda: cifar_resnet(56), lambda images: _pixels(32, images), {"every": 3, "head": "2L-256", "method": "sdn"}
    ),
    "ViT-Ti/16, 11 linear exits, sdn": Case(
        _vit, lambda images: _pixels(224, images), {"every": 1, "head": "1L", "method": "sdn"}
    ),
    "BERT-small, 3 linear exits, sdn": Case(_bert, _texts, {"every": 1, "head": "1L", "method": "sdn"}),
}
BOUNDED, CACHED = list(CASES)[:3], list(CASES)[2:]


def main() -> None:
    args = _arguments()
    console = make_console()
    bounded = {name: _against_bound(name, args.images, args.rounds) for name in BOUNDED if args.part != "cached"}
    if bounded:
        console.print(_bounded_table(bounded))
    caches = {name: _with_cache(name, args.images) for name in CACHED if args.part != "bounded"}
    if caches:
        console.print(_cached_table(caches, args.images))
    write(args.out / "results.json", args, batch=BATCH, bounded=bounded, cached=caches)


def _bounded_table(bounded: dict[str, dict[str, float]]) -> Table:
    rows = []
    for name, row in bounded.items():
        speeds = (f"{row['speed']:.1f}", f"{row['bound']:.1f}", f"{row['share']:.2f}")
        rows.append((name, *speeds, f"{row['memory']:.0f}", f"{row['bound_memory']:.0f}"))
    return table(("", "images/s", "bound", "share", "MiB", "bound's MiB"), rows, "Training heads on a frozen backbone")


def _cached_table(caches: dict[str, dict[str, float]], images: int) -> Table:
    rows = []
    for name, row in caches.items():
        numbers = (f"{row['plain']:.2f}", f"{row['first']:.2f}", f"{row['cached']:.3f}", f"{row['faster']:.0f}×")
        rows.append((name, *numbers, f"{row['megabytes']:.1f}"))
    headings = ("", "without cache, s", "first pass, s", "from the cache, s", "faster", "MB on disk")
    return table(headings, rows, f"An epoch of {images} samples")


def _against_bound(name: str, images: int, rounds: int) -> dict[str, float]:
    case = CASES[name]
    model, loader = case.model(), _loader(case, images)
    speeds, bounds = [], []
    _fit(model, loader, epochs=1)
    for _ in range(rounds):
        speeds.append(_fit(model, loader, epochs=1))
        bounds.append(images / _least(model, list(loader)))
    speed, bound = max(speeds), max(bounds)
    memory = {what: _peak(name, what) for what in ("fit", "bound")}
    return {
        "speed": speed,
        "bound": bound,
        "share": speed / bound,
        "memory": memory["fit"],
        "bound_memory": memory["bound"],
    }


def _fit(model: exitkit.MultiExitModel, loader: Any, epochs: int, **options: Any) -> float:
    """Images per second: of the epochs alone, without set-up and the ensemble's fit."""
    trainer = exitkit.Trainer(model, epochs=epochs, show_progress=False, **options)
    return statistics.median(record.speed for record in trainer.fit(loader))


def _least(model: exitkit.MultiExitModel, batches: list[Any]) -> float:
    """Seconds for the backbone's forward, and for forward, loss and backward of the heads, over all batches."""
    seconds = 0.0
    for images, labels in batches:
        with torch.no_grad():
            features, _ = model.eval().run_heads(images)
            started = time.perf_counter()
            model.backbone(images)
        _heads(model, features, labels).backward()
        seconds += time.perf_counter() - started
        model.zero_grad()
    return seconds


def _heads(model: exitkit.MultiExitModel, features: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    losses: list[Tensor] = []
    carried = None
    for classifier, feature in zip(model.classifiers, features, strict=True):
        step = classifier.step(feature, carried, ())  # type: ignore[operator]
        carried = step.carried
        losses.append(F.cross_entropy(step.logits, labels))
    return torch.stack(losses).sum()


def _peak(name: str, what: str) -> float:
    """MiB that training, or the least work, takes in a process of its own, beyond what was there before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_peak, (name, what))


def _measure_peak(name: str, what: str) -> float:
    case = CASES[name]
    model, loader = case.model(), _loader(case, 2 * BATCH)
    batches = list(loader)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    if what == "fit":
        _fit(model, batches, epochs=1)
    else:
        _least(model, batches)
    return (resident("VmHWM") - before) / 1024


def resident(entry: str) -> int:
    """Of this process, in KiB."""
    return int(Path("/proc/self/status").read_text().partition(f"{entry}:")[2].split()[0])


def _with_cache(name: str, images: int) -> dict[str, float]:
    case, folder = CASES[name], Path("results/training/cache")
    loader = _loader(case, images)
    plain = images / _fit(case.model(), loader, epochs=1)
    for old in folder.glob("*"):
        old.unlink()
    model, started = case.model(), time.perf_counter()
    speed = _fit(model, loader, epochs=10, cache=True, output_dir=folder, resume="never")
    whole, epoch = time.perf_counter() - started, images / speed
    megabytes = sum(path.stat().st_size for path in folder.glob("features-*")) / 1e6
    first = whole - 10 * epoch
    return {"plain": plain, "first": first, "cached": epoch, "faster": plain / epoch, "megabytes": megabytes}


def _loader(case: Case, images: int) -> DataLoader[Any]:
    return DataLoader(case.samples(images), batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="samples of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=["both", "bounded", "cached"], default="both")
    parser.add_argument("--out", type=Path, default=Path("results/training"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
