"""What the defaults are worth: heads that standardise what they read, and the optimiser that follows the heads.

    python benchmarks/defaults.py --data DIR --cifar DIR [--backbones squeezenet resnet56 efficientnet minilm] [--seeds 3]
        [--parts heads copies latency] [--optimisers default "Adam 1e-3"]

DIR of ``--data`` holds ``weights/``, ``imagenette/`` and ``text/``, that of ``--cifar`` what ``benchmarks/cifar10.py`` reads.
Backbones are frozen, with independent exits (method sdn) near 25, 50 and 75% of their MACs, each trained on the same samples
with the same seeds. SqueezeNet, which has no normalisation, is first trained on CIFAR-10, MiniLM on SST-2; both are kept in
``--out``. A run that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cifar10 import load
from rich.table import Table
from safetensors.torch import load_file
from tables import cell, table, write
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit.common.console import make_console
from exitkit.engine.backbone_alone import compile_backbone
from exitkit.exits.standardised import StandardisedLinear, replaced
from exitkit.surgery.capturing import capture

_ROUNDS = 300
SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
HEADS: dict[str, dict[str, Any]] = {"plain": {}, "standardised": {}}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "default": {},
    "SGD 0.1": {"optimizer": SGD, "lr": 0.1, "weight_decay": 5e-4},
    "SGD 0.05": {"optimizer": SGD, "lr": 0.05, "weight_decay": 5e-4},
    "Adam 1e-3": {"lr": 1e-3},
    "AdamW 1e-2": {"optimizer": torch.optim.AdamW, "lr": 1e-2, "weight_decay": 0.05},
    "AdamW 1e-3": {"optimizer": torch.optim.AdamW, "lr": 1e-3, "weight_decay": 0.05},
    "AdamW 3e-4": {"optimizer": torch.optim.AdamW, "lr": 3e-4, "weight_decay": 0.05},
    "AdamW 1e-4": {"optimizer": torch.optim.AdamW, "lr": 1e-4, "weight_decay": 0.05},
}
"""What the copies (``head="branch-1"``) are trained with."""


PARTS = {"heads": ("auto", HEADS), "copies": ("branch-1", OPTIMISERS)}
"""What is compared: the kind of head, and the options."""


class Case(NamedTuple):
    """A frozen backbone and the samples: (inputs, labels) data sets."""

    backbone: nn.Module
    train: Any
    test: Any
    collate: Callable[[list[Any]], Any] | None = None


def main() -> None:
    args = _arguments()
    console, path = make_console(), args.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    for part, name in product([part for part in args.parts if part in PARTS], args.backbones):
        head, options = PARTS[part]
        if part == "copies":
            options = {key: options[key] for key in args.optimisers}
        keys = {(seed, key): f"{name}/{part}/{key}/{seed}" for seed, key in product(range(args.seeds), options)}
        case = BACKBONES[name](args) if any(where not in results for where in keys.values()) else None
        for (seed, key), where in keys.items():
            if where in results or case is None:
                continue
            results[where] = _measure(case, args, name, head, key, options[key], seed)
            console.print(f"{where}: " + " ".join(f"{value:.1f}" for value in results[where]))
            write(path, args, results=results)
    if "latency" in args.parts:
        results["latency"] = _latencies(args)
        write(path, args, results=results)
        console.print(_latency_table(results["latency"]))
    for part in args.parts:
        if part in PARTS:
            console.print(_table(results, part, args.optimisers if part == "copies" else list(HEADS), args))


def _measure(
    case: Case, args: argparse.Namespace, name: str, head: str, key: str, options: dict[str, Any], seed: int
) -> list[float]:
    """Accuracy (%) of every exit, the backbone's last."""
    train = DataLoader(case.train, args.batch, shuffle=True, collate_fn=case.collate)
    test = DataLoader(case.test, 100, collate_fn=case.collate)
    torch.manual_seed(seed)
    example = next(iter(test))
    inputs = {k: v for k, v in example.items() if k != "labels"} if isinstance(example, dict) else example[0]
    ee = exitkit.attach(case.backbone, inputs, at_cost=[0.25, 0.5, 0.75], method="sdn", head=head)
    if key == "plain":
        replaced(ee.classifiers, lambda _, layer: nn.Linear(layer.in_features, layer.out_features))
    assert any(isinstance(part, StandardisedLinear) for part in ee.modules()) == (key != "plain" and head == "auto")
    folder = args.out / name / head  # keeps the features
    trainer = exitkit.Trainer(
        ee, **options, epochs=args.epochs, seed=seed, cache=not any(spec.inputs for spec in ee.specs) or head == "auto",
        output_dir=folder, resume="never", show_progress=False,
    )  # fmt: skip
    trainer.fit(train)
    return [100 * float(accuracy) for accuracy in exitkit.collect(ee, test).accuracy()]


def _latencies(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one image on a ResNet-32 from which none leaves: medians of runs in turn, one thread."""
    torch.set_num_threads(1)
    exitkit.keep_memory()
    backbone = exitkit.models.cifar_resnet(32).eval()
    placements: dict[str, dict[str, Any]] = {"14 exits": {"every": 1}, "3 exits (default)": {}}
    image = torch.randn(1, 3, 32, 32)
    captured = capture(backbone, image)
    runs: dict[str, Callable[[Tensor], Any]] = {
        "backbone, eager": backbone,
        "backbone, compiled": compile_backbone(captured),
    }
    for name, where in placements.items():
        ee = exitkit.attach(backbone, method="ztw", **where)
        for how in (False, True):
            runs[f"{name}, {'compiled' if how else 'eager'}"] = exitkit.compile(ee, 2.0, optimize=how)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _, (name, run) in product(range(_ROUNDS), runs.items()):
            started = time.perf_counter()
            run(image)
            times[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def _resnet56(args: argparse.Namespace) -> Case:
    weights = args.data / "weights" / "cifar10_resnet56.safetensors"
    backbone = exitkit.models.cifar_resnet(56, weights=weights).eval()
    return Case(backbone.requires_grad_(False), *_cifar(args))


def _cifar(args: argparse.Namespace) -> tuple[TensorDataset, TensorDataset]:
    train = TensorDataset(*load(args.cifar / "cifar10_train.npz", args.images))
    return train, TensorDataset(*load(args.cifar / "cifar10_test.npz", args.test_images))


def _squeezenet(args: argparse.Namespace) -> Case:
    from torchvision.models import squeezenet1_1

    train, test = _cifar(args)
    backbone = squeezenet1_1(num_classes=10)
    backbone.features[0].stride = (1, 1)  # for images of 32 × 32
    learned: DataLoader[Any] = DataLoader(train, 64, shuffle=True)
    _kept(backbone, args.out / "squeezenet.pt", learned, epochs=15, lr=5e-4)
    return Case(backbone.eval().requires_grad_(False), train, test)


def _efficientnet(args: argparse.Namespace) -> Case:
    import timm
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    backbone: Any = timm.create_model("tf_efficientnet_lite0")
    weights = load_file(args.data / "weights" / "imagenet_timm_tf_efficientnet_lite0.safetensors")
    backbone.load_state_dict({key: value.to(backbone.state_dict()[key].dtype) for key, value in weights.items()})
    classes = torch.tensor([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])  # Imagenette's
    linear = nn.Linear(backbone.num_features, 10)
    linear.load_state_dict({key: value[classes] for key, value in backbone.classifier.state_dict().items()})
    backbone.classifier = linear
    steps = [v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.ToImage()]
    scale = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    train, test = (ImageFolder(args.data / "imagenette" / part, scale) for part in ("train", "val"))
    return Case(backbone.eval().requires_grad_(False), train, test)


def _minilm(args: argparse.Namespace) -> Case:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = args.data / "weights" / "minilm_l6"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backbone = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)

    def collate(rows: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*rows, strict=True)
        made = tokenizer(list(texts), padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        return {key: made[key] for key in ("input_ids", "attention_mask")} | {"labels": torch.tensor(labels)}

    def read(part: str, limit: int) -> list[tuple[str, int]]:
        lines = (args.data / "text" / f"sst2_{part}.tsv").read_text().splitlines()[1 : limit + 1]
        return [(text, int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]

    train = read("train", args.images)
    learned: DataLoader[Any] = DataLoader(train, 32, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    _kept(backbone, args.out / "minilm.pt", learned, epochs=1, lr=5e-5)
    return Case(backbone.eval().requires_grad_(False), train, read("dev", 872), collate)


BACKBONES = {"squeezenet": _squeezenet, "resnet56": _resnet56, "efficientnet": _efficientnet, "minilm": _minilm}


def _kept(backbone: nn.Module, path: Path, batches: Iterable[Any], epochs: int, lr: float) -> None:
    """Train the backbone, or load it where that was done."""
    if path.exists():
        backbone.load_state_dict(torch.load(path, weights_only=True))
        return
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(backbone.train().parameters(), lr)
    for _ in range(epochs):
        for batch in batches:
            loss = backbone(**batch).loss if isinstance(batch, dict) else F.cross_entropy(backbone(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(backbone.state_dict(), path)


def _latency_table(milliseconds: dict[str, float]) -> Table:
    rows = []
    for name, taken in milliseconds.items():
        alone = milliseconds[f"backbone, {name.rpartition(', ')[2]}"]
        rows.append((name, f"{taken:.2f}", f"{taken / alone:.2f}×"))
    return table(("ResNet-32, ztw", "ms", "backbone alike"), rows, "One image, from which no sample leaves")


def _table(results: dict[str, Any], part: str, options: list[str], args: argparse.Namespace) -> Table:
    rows = []
    for name, key in product(args.backbones, options):
        runs = [results.get(f"{name}/{part}/{key}/{seed}") for seed in range(args.seeds)]
        done = [run for run in runs if run is not None]
        if done:
            rows.append((name, key, *(cell([run[m] for run in done]) for m in range(len(done[0]))), str(len(done))))
    return table(
        ("backbone", "heads" if part == "heads" else "optimiser", "25%", "50%", "75%", "backbone", "seeds"),
        rows,
        f"Accuracy (%) of each exit: {'head=auto' if part == 'heads' else 'head=branch-1'}",
        f"at most {args.images:,} training and {args.test_images:,} test samples, {args.epochs} epochs, batches {args.batch}",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--out", type=Path, default=Path("results/defaults"))
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "latency"], default=[*PARTS, "latency"])
    parser.add_argument("--optimisers", nargs="+", choices=OPTIMISERS, default=list(OPTIMISERS))
    for name, default in (("images", 4_000), ("test-images", 2_000), ("epochs", 6), ("seeds", 3), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
