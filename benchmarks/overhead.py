"""What exitkit itself costs: attaching, and the exact curve.

    python benchmarks/overhead.py [--out results/overhead.json]

Attaching is compared with one eager forward of the same model at batch 2 and with the model's own memory; the exact curve
with the published codes' way, a loop over 1,000 thresholds, on the same scores (50,000 samples × 10 exits × 1000 classes
after reduction to scores). Each attachment runs in a process of its own, so that peak memory is its own; the peak is the
kernel's (Linux), reset before attaching.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tables import table, write

import exitkit
from exitkit.cli.bench import machine
from exitkit.cli.sources import load_model
from exitkit.common.console import make_console
from exitkit.evaluation.curve import sweep
from exitkit.surgery.default_inputs import example_for
from exitkit.surgery.inputs import call_on

MODELS = ("torchvision:resnet50", "torchvision:vit_b_16", "hf:bert-base", "hf:llama-0.6b")
SAMPLES, EXITS, GRID = 50_000, 10, 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/overhead.json"))
    args = parser.parse_args()
    console = make_console()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        attached = {name: pool.apply(measure_attach, (name,)) for name in MODELS}
    curve = measure_curve()
    console.print(_attach_table(attached), _curve_table(curve), machine()["device"])
    write(args.out, args, attach=attached, curve=curve)


def measure_attach(name: str) -> dict[str, float]:
    """Seconds and peak extra memory of attaching (every=3, ZTW), beside one eager forward and the model's size."""
    model = (_TRANSFORMERS[name]() if name in _TRANSFORMERS else load_model(name)).eval()
    example = example_for(model)
    batch = example.spec.batch(example.tensors)
    with torch.inference_mode():
        call_on(model, batch)
        started = time.perf_counter()
        call_on(model, batch)
        forward = time.perf_counter() - started
    before = _reset_peak()
    started = time.perf_counter()
    exitkit.attach(model, every=3, method="ztw")
    seconds = time.perf_counter() - started
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    return {"attach_s": seconds, "forward_s": forward, "extra_mib": _peak() - before, "model_mib": weights}


def measure_curve() -> dict[str, float]:
    """Seconds for the exact curve and for a grid of 1,000 thresholds, and the points each gives."""
    generator = np.random.default_rng(0)
    scores = generator.random((SAMPLES, EXITS), dtype=np.float32)
    correct = generator.random((SAMPLES, EXITS + 1)) < 0.7
    costs = np.linspace(0.1, 1.1, EXITS + 1)
    started = time.perf_counter()
    thresholds, _, _ = sweep(scores, correct.astype(np.int64), costs[None])
    exact = time.perf_counter() - started
    started = time.perf_counter()
    for threshold in np.linspace(0, 1, GRID):
        sure = scores > threshold
        exits = np.where(sure.any(1), sure.argmax(1), EXITS)
        correct[np.arange(SAMPLES), exits].mean(), costs[exits].mean()
    grid = time.perf_counter() - started
    return {"exact_s": exact, "exact_points": len(thresholds), "grid_s": grid, "grid_points": GRID}


def _attach_table(measured: dict[str, dict[str, float]]) -> Table:
    rows = []
    for name, row in measured.items():
        times = f"{row['attach_s']:.2f}", f"{row['forward_s']:.3f}", f"{row['attach_s'] / row['forward_s']:.1f}×"
        memory = f"{row['extra_mib']:.0f}", f"{row['model_mib']:.0f}", f"{row['extra_mib'] / row['model_mib']:.2f}×"
        rows.append((name, *times, *memory))
    time_headings = ("attach (s)", "one forward, batch 2 (s)", "ratio")
    memory_headings = ("extra memory (MiB)", "model (MiB)", "ratio")
    return table(("model", *time_headings, *memory_headings), rows, "exitkit.attach(model, every=3, method='ztw')")


def _curve_table(row: dict[str, float]) -> Table:
    ratio = f"{row['exact_s'] / row['grid_s']:.3f}×"
    rows = [
        ("exact", f"{row['exact_s']:.2f}", f"{row['exact_points']:,}", ratio),
        ("grid loop", f"{row['grid_s']:.2f}", f"{row['grid_points']:,}", "1×"),
    ]
    title = f"Accuracy against cost, {SAMPLES:,} samples × {EXITS} exits, from scores"
    return table(("", "seconds", "thresholds", "time, grid = 1"), rows, title)


def _bert_base() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


def _llama() -> Any:
    """A decoder of 0.6 billion parameters in bfloat16, random weights."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 20,
        "pad_token_id": 0,
    }
    torch.set_default_dtype(torch.bfloat16)
    make: Any = LlamaForSequenceClassification
    model = make(LlamaConfig(num_attention_heads=12, **sizes))
    torch.set_default_dtype(torch.float32)
    return model


_TRANSFORMERS: dict[str, Callable[[], Any]] = {"hf:bert-base": _bert_base, "hf:llama-0.6b": _llama}


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """The highest resident memory of this process since the last reset, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    main()
