"""Thresholds with a guarantee, thresholds per exit, and the shift monitor, on a real CIFAR-10 backbone.

    python benchmarks/risk.py --data DIR --weights cifar10_resnet56.safetensors --out results/risk

DIR holds ``cifar10_train.npz`` and ``cifar10_test.npz`` (``images`` N×32×32×3 uint8, ``labels``). Three linear exits at 25, 50
and 75% of a frozen ResNet-56's MACs are trained for a few epochs; outputs on the test images, as they are and as JPEG of
quality 75, are kept in the output folder and used again. Everything after that is splits of these outputs:

1. thresholds calibrated on 2,000 images and measured on 2,000 others, over 200 random splits; a promise is about the
   distribution that splits are drawn from, so whether it was kept is told by all 5,000 images;
2. thresholds for budgets, chosen on 2,500 images and measured on the 2,500 others, over 20 random splits;
3. the monitor: calibrated on 2,500 images, fed with draws (with replacement) from the 2,500 others, 100 times each;
4. milliseconds: the compiled engine at a τ calibrated on 2,000 images against the equally compiled backbone, on images that
   neither trained nor calibrated anything.

``--parts`` runs some of these alone.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency import aot_compiled as compiled
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit import ExitOutputs, choose_threshold
from exitkit.cli.bench import machine
from exitkit.cli.data import normalise
from exitkit.console import make_console
from exitkit.evaluation import (
    ShiftMonitor,
    content_hashes,
    fit_temperatures,
    per_exit_thresholds,
    threshold_path,
)
from exitkit.files import replacing

MAX_DROP, CONFIDENCE = 0.01, 0.95
BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PROMISE_SPLITS, BUDGET_SPLITS, STREAMS = 200, 20, 100
JPEG_QUALITY = 75
PARTS = ["promises", "budgets", "monitor", "milliseconds"]
_WAYS = {"one": "one τ", "each": "τ per exit", "even": "one τ, tempered", "both": "per exit, tempered"}
Loader = DataLoader[tuple[Tensor, ...]]


def main() -> None:
    args = _arguments()
    console = make_console()
    clean, jpeg, training = _outputs(args)
    results: dict[str, Any] = {
        "about": {"images": args.images, "epochs": args.epochs, "costs": clean.costs.tolist(), **machine()},
        "accuracy": {"clean": clean.accuracy().tolist(), "jpeg": jpeg.accuracy().tolist()},
    }
    parts: dict[str, Callable[[], tuple[Any, Any]]] = {
        "promises": lambda: _shown(_promises(clean, training), lambda rows: _promise_table(rows, clean, args.depth)),
        "budgets": lambda: _shown(_budgets(clean), _budget_table),
        "monitor": lambda: _shown(_monitor(clean, jpeg), lambda numbers: numbers),
        "milliseconds": lambda: _shown(_milliseconds(clean, training, args), _time_table),
    }
    for part in args.parts:
        results[part], table = parts[part]()
        console.print(table)
    name = "results.json" if args.parts == PARTS else f"results-{'-'.join(args.parts)}.json"
    with replacing(args.out / name) as temporary:
        temporary.write_text(json.dumps(results, indent=1))


def _shown(values: Any, table: Callable[[Any], Any]) -> tuple[Any, Any]:
    return values, table(values)


# 1. promises


def _promises(clean: ExitOutputs, training: Tensor) -> list[dict[str, Any]]:
    """Each way of choosing τ, over many splits: cost and losses on untouched images, and how often they exceed 1%."""
    ways: dict[str, Callable[[ExitOutputs, ExitOutputs], Any]] = {
        "as measured (no guarantee)": lambda _, held: _naive(held),
        "ltt": lambda _, held: _chosen(held, training),
        "ltt, thresholds per exit": lambda tune, held: _chosen(held, training, path=threshold_path(tune)),
        "ltt, disagreement, no labels": lambda _, held: _chosen(held, training, risk="disagreement"),
        "ucb, net drop": lambda _, held: _chosen(held, training, risk="net_accuracy_drop", method="ucb"),
        "crc (in expectation)": lambda _, held: _chosen(held, training, method="crc"),
    }
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for tune, held, fresh in _splits(clean, PROMISE_SPLITS, (1_000, 2_000, 2_000)):
        for name, choose in ways.items():
            threshold = choose(tune, held)
            rows[name].append((_measured(fresh, threshold)[1], *_losses(fresh, threshold), *_losses(clean, threshold)))
    return [_promise(name, np.array(values)) for name, values in rows.items()]


def _promise(name: str, values: NDArray[np.float64]) -> dict[str, Any]:
    cost, drop, lost, all_drop, all_lost = values.T
    return {
        "way": name,
        "saved": float(1 - cost.mean()),
        "saved_std": float(cost.std()),
        "drop": float(drop.mean()),
        "drop_above": float((drop > MAX_DROP).mean()),
        "lost": float(lost.mean()),
        "lost_above": float((lost > MAX_DROP).mean()),
        "drop_broken": float((all_drop > MAX_DROP).mean()),
        "lost_broken": float((all_lost > MAX_DROP).mean()),
    }


def _losses(outputs: ExitOutputs, threshold: Any) -> tuple[float, float]:
    """The drop in accuracy, and the share of samples that the full model has right and their exit wrong."""
    exits, right = outputs.exits_at(threshold), outputs.correct.numpy()
    mine, full = right[np.arange(len(exits)), exits], right[:, -1]
    return float(full.mean() - mine.mean()), float((full & ~mine).mean())


def _chosen(held: ExitOutputs, training: Tensor, **options: Any) -> Any:
    return choose_threshold(held, MAX_DROP, CONFIDENCE, exclude=training, **options).threshold


def _naive(held: ExitOutputs) -> float:
    """What is usually done: the cheapest τ whose drop, where it is chosen, is at most the bound."""
    curve = held.curve()
    kept = curve.accuracy >= held.accuracy()[-1] - MAX_DROP
    return float(curve.thresholds[int(kept.argmax())])


def _promise_table(rows: list[dict[str, Any]], clean: ExitOutputs, depth: int) -> Table:
    table = Table(
        title=f"Threshold chosen on 2,000 images for a drop of at most {MAX_DROP:.0%}, measured on 2,000 untouched ones",
        caption=f"ResNet-{depth}, backbone {clean.accuracy()[-1]:.2%}, {PROMISE_SPLITS} random splits. Lost: the full model "
        "right and the exit wrong. Broken: splits whose threshold exceeds 1% on all 5,000 images.",
        caption_justify="left",
    )
    for heading in ("chosen by", "MACs saved", "drop", "broken", "lost", "broken"):
        table.add_column(heading, justify="left" if heading == "chosen by" else "right")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['saved']:.1%} ± {row['saved_std']:.1%}",
            f"{row['drop']:.2%}",
            f"{row['drop_broken']:.1%}",
            f"{row['lost']:.2%}",
            f"{row['lost_broken']:.1%}",
        )
    return table


# 2. budgets


def _budgets(clean: ExitOutputs) -> list[dict[str, Any]]:
    """Accuracy on untouched images, at thresholds that another half of them chose for each budget."""
    rows = []
    splits = list(_splits(clean, BUDGET_SPLITS, (2_500, 2_500)))
    for budget in BUDGETS:
        values = np.array([_at_budget(tune, fresh, budget) for tune, fresh in splits])
        rows.append(
            {"budget": budget} | dict(zip(_NAMES, values.mean(0).tolist(), strict=True)) | _spread(values[:, 0])
        )
    return rows


_NAMES = ("gain", "exact", *(f"{way}{part}" for way in _WAYS for part in ("", "_cost")))


def _at_budget(tune: ExitOutputs, fresh: ExitOutputs, budget: float) -> list[float]:
    temperatures = fit_temperatures(tune)
    even, warm = tune.calibrated(temperatures), fresh.calibrated(temperatures)
    each = per_exit_thresholds(tune, budget)
    accuracy, cost = _measured(fresh, each.thresholds)
    return [
        accuracy - fresh.curve().at_budget(cost + 1e-9).accuracy,
        float(each.accuracy == each.bound),
        *_measured(fresh, tune.curve().at_budget(budget).threshold),
        accuracy,
        cost,
        *_measured(warm, even.curve().at_budget(budget).threshold),
        *_measured(warm, per_exit_thresholds(even, budget).thresholds),
    ]


def _spread(gains: NDArray[np.float64]) -> dict[str, float]:
    return {"gain_std": float(gains.std()), "gain_positive": float((gains > 0).mean())}


def _measured(outputs: ExitOutputs, threshold: Any) -> tuple[float, float]:
    exits = outputs.exits_at(threshold)
    right = outputs.correct.numpy()[np.arange(len(exits)), exits]
    return float(right.mean()), float(outputs.costs[exits].mean())


def _budget_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Accuracy (%) at its cost (%) on 2,500 untouched images, thresholds chosen on 2,500 others",
        caption=f"mean of {BUDGET_SPLITS} random splits. Gain: τ per exit over one τ at equal cost on the untouched images. "
        "Exact: share of splits in which the search proved that no thresholds are better.",
        caption_justify="left",
    )
    for heading in ("budget", *_WAYS.values(), "gain (points)", "splits > 0", "exact"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['budget']:.0%}",
            *(f"{100 * row[way]:.2f} at {100 * row[way + '_cost']:.1f}" for way in _WAYS),
            f"{100 * row['gain']:+.2f} ± {100 * row['gain_std']:.2f}",
            f"{row['gain_positive']:.0%}",
            f"{row['exact']:.0%}",
        )
    return table


# 3. the monitor


def _monitor(clean: ExitOutputs, jpeg: ExitOutputs) -> dict[str, Any]:
    """Alarms within 10,000 undisturbed draws, and after how many JPEG images there is one, at once or after 10,000."""
    generator = np.random.default_rng(0)
    quiet, at_once, later, drops = 0, [], [], []
    for seed in range(STREAMS):
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
        held, fresh, shifted = clean[order[:2_500]], clean[order[2_500:]], jpeg[order[2_500:]]
        tau = choose_threshold(held, MAX_DROP, CONFIDENCE).threshold
        undisturbed, disturbed = ShiftMonitor(held, tau), ShiftMonitor(held, tau)
        undisturbed.update(*_draws(fresh, tau, 10_000, generator))
        quiet += not undisturbed.alarm
        disturbed.update(*_draws(shifted, tau, 1_000, generator))
        at_once.append(disturbed.report().fired_at)
        if not undisturbed.alarm:
            undisturbed.update(*_draws(shifted, tau, 1_000, generator))
            fired = undisturbed.report().fired_at
            later.append(None if fired is None else fired - 10_000)
        drops.append(float(fresh.accuracy()[-1]) - _measured(shifted, tau)[0])
    return {
        "streams": STREAMS,
        "no_alarm_in_10000_undisturbed": quiet,
        "alarm_within_1000_jpeg": sum(fired is not None for fired in at_once),
        "jpeg_images_until_alarm": _quantiles(at_once),
        "alarm_within_1000_jpeg_after_10000_undisturbed": f"{sum(fired is not None for fired in later)} of {len(later)}",
        "jpeg_images_until_alarm_then": _quantiles(later),
        "accuracy_of_exits_on_jpeg_below_clean_backbone": float(np.mean(drops)),
    }


def _draws(outputs: ExitOutputs, tau: Any, count: int, generator: np.random.Generator) -> tuple[Any, Any]:
    exits = outputs.exits_at(tau)
    scores = outputs.scores().numpy()[np.arange(len(exits)), exits]
    rows = generator.integers(0, len(exits), count)
    return exits[rows], scores[rows]


def _quantiles(fired: list[int | None]) -> dict[str, float]:
    values = [at for at in fired if at is not None]
    return {"median": float(np.median(values)), "worst": float(max(values))} if values else {}


# 4. milliseconds


def _milliseconds(clean: ExitOutputs, training: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Engine and backbone, both compiled, in turn on the same batches of untouched images."""
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))
    held, rest = order[:2_000], order[2_000:]
    chosen = choose_threshold(clean[held], MAX_DROP, CONFIDENCE, exclude=training)
    backbone = exitkit.models.cifar_resnet(args.depth, weights=args.weights).eval()
    ee = exitkit.MultiExitModel.from_pretrained(backbone, args.out / "exits", torch.zeros(2, 3, 32, 32))
    engine, reference = exitkit.compile(ee, chosen, optimize=True), compiled(ee)
    images = normalise(_load(args.data / "cifar10_test.npz", None)[0])[rest]
    labels = clean[rest].labels
    assert labels is not None
    return [
        _timed(engine, reference, images[:count], labels[:count], batch)
        for batch, count in ((64, len(rest) // 64 * 64), (1, 500))
    ]


def _timed(engine: exitkit.Engine, reference: Callable[[Any], Any], images: Tensor, labels: Tensor, batch: int) -> Any:
    seconds: dict[str, list[float]] = {"backbone": [], "engine": []}
    right: dict[str, list[Tensor]] = {"backbone": [], "engine": []}
    exits = []
    with torch.inference_mode():
        for chunk, truth in zip(
            [images[:batch], *images.split(batch)], [labels[:batch], *labels.split(batch)], strict=True
        ):
            for name, run in (("backbone", lambda c: reference((c,))[0]), ("engine", engine)):
                started = time.perf_counter()
                answer = run(chunk)
                seconds[name].append(time.perf_counter() - started)
                logits = answer.logits if isinstance(answer, exitkit.Prediction) else answer
                right[name].append(logits.argmax(-1) == truth)
            exits.append(answer.exit)
    per_image = {name: 1e3 * sum(times[1:]) / len(images) for name, times in seconds.items()}  # the first one warms up
    accuracy = {name: float(torch.cat(parts[1:]).float().mean()) for name, parts in right.items()}
    rates = torch.cat(exits[1:]).bincount(minlength=len(engine.thresholds) + 1) / len(images)
    return {
        "batch": batch,
        "images": len(images),
        "backbone_ms": per_image["backbone"],
        "engine_ms": per_image["engine"],
        "saved": 1 - per_image["engine"] / per_image["backbone"],
        "accuracy": accuracy,
        "exit_rates": rates.tolist(),
    }


def _time_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"Milliseconds per image at the calibrated τ (ltt, a drop of at most {MAX_DROP:.0%}), untouched images",
        caption=f"both compiled, CPU, {torch.get_num_threads()} threads",
    )
    for heading in (
        "batch",
        "images",
        "backbone",
        "engine",
        "time saved",
        "accuracy, backbone",
        "engine",
        "leave at exits",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['batch']}",
            f"{row['images']:,}",
            f"{row['backbone_ms']:.3f}",
            f"{row['engine_ms']:.3f}",
            f"{row['saved']:.1%}",
            *(f"{row['accuracy'][name]:.2%}" for name in ("backbone", "engine")),
            " ".join(f"{rate:.1%}" for rate in row["exit_rates"]),
        )
    return table


# outputs and splits


def _splits(outputs: ExitOutputs, count: int, sizes: tuple[int, ...]) -> Iterator[tuple[ExitOutputs, ...]]:
    for seed in range(count):
        order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(seed))
        yield tuple(outputs[rows] for rows in order[: sum(sizes)].split(sizes))


def _outputs(args: argparse.Namespace) -> tuple[ExitOutputs, ExitOutputs, Tensor]:
    """Outputs on the test images, plain and as JPEG, and hashes of the training images."""
    images, labels = _load(args.data / "cifar10_train.npz", args.images)
    training = content_hashes(_loader(images, labels))
    paths = args.out / "clean.safetensors", args.out / "jpeg.safetensors"
    if not all(path.exists() for path in (*paths, args.out / "exits")):
        backbone = exitkit.models.cifar_resnet(args.depth, weights=args.weights)
        if args.exits is None:
            ee = _trained(backbone, _loader(images, labels, shuffle=True), args.epochs)
        else:
            ee = exitkit.MultiExitModel.from_pretrained(backbone, args.exits)
        ee.save_pretrained(args.out / "exits")
        tests, truth = _load(args.data / "cifar10_test.npz", None)
        exitkit.collect(ee, _loader(tests, truth)).save(paths[0])
        exitkit.collect(ee, _loader(_as_jpeg(tests), truth)).save(paths[1])
    return ExitOutputs.load(paths[0]), ExitOutputs.load(paths[1]), training


def _trained(backbone: torch.nn.Module, batches: Loader, epochs: int) -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    ee = exitkit.attach(backbone, torch.zeros(2, 3, 32, 32), at_cost=[0.25, 0.5, 0.75], head="1L", method="sdn")
    exitkit.Trainer(ee, epochs=epochs, milestones=(epochs - 1,), lr=3e-3).fit(batches)
    return ee


def _load(path: Path, limit: int | None) -> tuple[NDArray[np.uint8], Tensor]:
    with np.load(path) as arrays:
        return arrays["images"][:limit], torch.from_numpy(arrays["labels"][:limit].astype(np.int64))


def _loader(images: NDArray[np.uint8], labels: Tensor, shuffle: bool = False) -> Loader:
    return DataLoader(TensorDataset(normalise(images), labels), batch_size=128, shuffle=shuffle)


def _as_jpeg(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    def again(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return np.asarray(Image.open(buffer))

    return np.stack([again(image) for image in images])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the backbone")
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--exits", type=Path, help="exits trained before, such as those of benchmarks/front.py")
    parser.add_argument("--images", type=int, default=6_000, help="training images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path("results/risk"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
