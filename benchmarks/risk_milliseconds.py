"""The compiled engine at a τ calibrated on 2,000 images against the equally compiled backbone, on untouched images."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from risk_outputs import CONFIDENCE, MAX_DROP, load
from tables import table
from torch import Tensor

import exitkit
from exitkit import ExitOutputs, choose_threshold
from exitkit.cli.data.arrays import normalise
from exitkit.common.console import counted
from exitkit.engine.backbone_alone import compile_backbone
from exitkit.surgery.capturing import capture


def milliseconds(clean: ExitOutputs, training: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Engine and backbone, both compiled, in turn on the same batches of untouched images."""
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))
    held, rest = order[:2_000], order[2_000:]
    chosen = choose_threshold(clean[held], MAX_DROP, CONFIDENCE, exclude=training)
    backbone = exitkit.models.cifar_resnet(args.depth, weights=args.weights).eval()
    ee = exitkit.MultiExitModel.from_pretrained(backbone, args.out / "exits", torch.zeros(2, 3, 32, 32))
    engine, reference = (
        exitkit.compile(ee, chosen, optimize=True),
        compile_backbone(capture(backbone, torch.zeros(2, 3, 32, 32))),
    )
    images = normalise(load(args.data / "cifar10_test.npz", None)[0])[rest]
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


def time_table(rows: list[dict[str, Any]]) -> Table:
    cells = [
        (
            f"{row['batch']}",
            f"{row['images']:,}",
            f"{row['backbone_ms']:.3f}",
            f"{row['engine_ms']:.3f}",
            f"{row['saved']:.1%}",
            *(f"{row['accuracy'][name]:.2%}" for name in ("backbone", "engine")),
            " ".join(f"{rate:.1%}" for rate in row["exit_rates"]),
        )
        for row in rows
    ]
    return table(
        ("batch", "images", "backbone", "engine", "time saved", "accuracy, backbone", "engine", "leave at exits"),
        cells,
        f"Milliseconds per image at the calibrated τ (ltt, a drop of at most {MAX_DROP:.0%}), untouched images",
        f"both compiled, CPU, {counted(torch.get_num_threads(), 'thread')}",
    )
