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
import csv
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn

import exitkit
from exitkit.cli.bench import machine
from exitkit.console import make_console
from exitkit.evaluation import ExitOutputs, plot_curves
from exitkit.files import replacing

BUDGETS = (0.25, 0.5, 0.75, 1.0)
LENGTH, VOCABULARY, BATCH = 32, 6_000, 64
PRETRAINING: dict[str, Any] = {"epochs": 4, "lr": 5e-4}


@dataclass
class Texts:
    """Token ids and masks with labels; batches are shuffled by torch's global generator where asked."""

    ids: Tensor
    labels: Tensor
    shuffle: bool

    def __len__(self) -> int:
        return -(-len(self.ids) // BATCH)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(self.ids)) if self.shuffle else torch.arange(len(self.ids))
        for rows in order.split(BATCH):
            mask = (self.ids[rows] != 0).long()
            yield {"input_ids": self.ids[rows], "attention_mask": mask, "labels": self.labels[rows]}


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
            "budgets": {b: curve.at_budget(b)._asdict() for b in BUDGETS},
        }
        for name, curve in curves.items()
    }
    with replacing(args.out) as temporary:
        temporary.write_text(json.dumps({"about": machine(), "rows": rows}, indent=1))


def load_texts(folder: Path) -> tuple[Texts, Texts]:
    rows = {part: _rows(folder / f"agnews_{part}.tsv") for part in ("train", "test")}
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator([text for text, _ in rows["train"]], vocab_size=VOCABULARY, show_progress=False)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)

    def encode(part: str) -> Texts:
        ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch([text for text, _ in rows[part]])])
        return Texts(ids, torch.tensor([label for _, label in rows[part]]), shuffle=part == "train")

    return encode("train"), encode("test")


def _rows(path: Path) -> list[tuple[str, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            (row[0], int(row[1]))
            for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if row[1].isdigit()
        ]


def pretrained(train: Texts) -> nn.Module:
    """A BERT trained on the training texts alone; AdamW with a one-cycle rate."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
        "intermediate_size": 512, "max_position_embeddings": LENGTH, "num_labels": 4,
    }  # fmt: skip
    model: nn.Module = BertForSequenceClassification(BertConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING["lr"], weight_decay=0.01)
    steps = PRETRAINING["epochs"] * len(train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAINING["lr"], total_steps=steps)
    for _ in range(PRETRAINING["epochs"]):
        for batch in train:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _measure(backbone: nn.Module, head: str, epochs: int, train: Texts, test: Texts) -> ExitOutputs:
    torch.manual_seed(0)
    example = next(iter(test))
    example = {key: example[key][:2] for key in ("input_ids", "attention_mask")}
    ee = exitkit.attach(backbone, example, every=1, method="sdn", head=head)
    if epochs:
        exitkit.Trainer(ee, epochs=epochs, show_progress=False).fit(train)
    return exitkit.collect(ee, test)


def _table(outputs: dict[str, ExitOutputs]) -> Table:
    first = next(iter(outputs.values()))
    table = Table(title="AG News, six-layer BERT: accuracy of each exit, and within a budget")
    table.add_column("heads")
    for index in range(len(first.macs)):
        table.add_column("backbone" if index == len(first.macs) - 1 else f"exit {index}", justify="right")
    for budget in BUDGETS:
        table.add_column(f"{budget:.0%}", justify="right")
    for name, output in outputs.items():
        curve = output.curve()
        exits = [f"{accuracy:.1%}" for accuracy in output.accuracy()]
        table.add_row(name, *exits, *(f"{curve.at_budget(budget).accuracy:.1%}" for budget in BUDGETS))
    return table


if __name__ == "__main__":
    main()
