"""Heads that start from the backbone's own read-out, against heads that start from nothing, on AG News.

    python benchmarks/tail.py --data DIR [--epochs 3]

DIR holds ``agnews_train.tsv`` and ``agnews_test.tsv`` (text, tab, label, with a header). A six-layer BERT of width 128 is
first trained on the training texts, from random weights and with a vocabulary of its own; then an exit is put after each
layer but the last, and the same frozen backbone is measured with three kinds of heads: ``tail`` as attached, ``tail`` after
training, and ``auto`` (the class token and a linear layer) after the same training. Method SDN, so that nothing but the heads
differs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from agnews import Texts, load_texts, pretrained
from rich.table import Table
from tables import BUDGETS, at, cell, table, write
from torch import nn

import exitkit
from exitkit.cli.bench import machine
from exitkit.common.console import make_console
from exitkit.evaluation import ExitOutputs, plot_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3, help="of head training")
    parser.add_argument("--out", type=Path, default=Path("results/tail.json"))
    args = parser.parse_args()
    console = make_console()
    train, test = load_texts(args.data)
    torch.manual_seed(0)
    started = time.perf_counter()
    backbone = pretrained(train)
    console.print(f"backbone trained in {time.perf_counter() - started:.0f} s")
    outputs = {
        "tail, untrained": _measure(backbone, "tail", 0, train, test),
        f"tail, {args.epochs} epochs": _measure(backbone, "tail", args.epochs, train, test),
        f"auto, {args.epochs} epochs": _measure(backbone, "auto", args.epochs, train, test),
    }
    console.print(_table(outputs), machine()["device"])
    curves = {name: output.curve() for name, output in outputs.items()}
    plot_curves(curves, args.out.with_suffix(".png"))
    rows = {
        name: {
            "exits": outputs[name].accuracy().tolist(),
            "budgets": {b: point and point.to_dict() for b, point in curve.budget_table().rows.items()},
        }
        for name, curve in curves.items()
    }
    write(args.out, args, rows=rows)


def _measure(backbone: nn.Module, head: str, epochs: int, train: Texts, test: Texts) -> ExitOutputs:
    torch.manual_seed(0)
    example = next(iter(test))
    example = {key: example[key][:2] for key in ("input_ids", "attention_mask")}
    ee = exitkit.attach(backbone, example, every=1, method="sdn", head=head)
    if epochs:
        exitkit.Trainer(ee, epochs=epochs, show_progress=False).fit(train)
    return exitkit.collect(ee, test)


def _table(outputs: dict[str, ExitOutputs]) -> Table:
    exits = len(next(iter(outputs.values())).macs) - 1
    rows = [
        (
            name,
            *(cell([100 * float(accuracy)]) for accuracy in run.accuracy()),
            *(cell([at(run, budget)]) for budget in BUDGETS),
        )
        for name, run in outputs.items()
    ]
    return table(
        ("heads", *(f"exit {index}" for index in range(exits)), "backbone", *(f"{budget:.0%}" for budget in BUDGETS)),
        rows,
        "AG News, six-layer BERT: accuracy (%) of each exit, and within a budget",
    )


if __name__ == "__main__":
    main()
