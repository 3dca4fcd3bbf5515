"""ZTW, SDN and PBEE on a text classifier: a small frozen BERT, the same heads, three ways to leave.

    python benchmarks/text.py --data DIR [--seeds 3] [--epochs 10] [--unseen 3000]

DIR holds ``agnews_train.tsv`` and ``agnews_test.tsv``. For every seed a six-layer BERT of width 128 is trained on the
training texts from random weights and then frozen; an exit after each layer but the last learns from
the feature cache. Accuracy by share of the backbone's MACs, on the test texts. ``ztw`` is also taken apart: without its
cascade links, and without its ensemble. With ``--unseen`` so many training texts are kept from the backbone, and the exits
learn from these: what a backbone says of texts that it was trained on is not what it says of others.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from agnews import BATCH, Texts, load_texts, pretrained
from rich.table import Table
from tables import BUDGETS, numbers, over_budgets, table, write
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import exitkit
from exitkit.common.console import make_console
from exitkit.evaluation import ExitOutputs

METHODS = {
    "ztw": exitkit.ZTW(),
    "ztw without links": exitkit.ZTW(cascade=False),
    "ztw without ensemble": exitkit.ZTW(ensemble="none"),
    "sdn": exitkit.SDN(),
    "pbee": exitkit.PBEE(),
}


def main() -> None:
    args = _arguments()
    console, started = make_console(), time.perf_counter()
    train, test = load_texts(args.data)
    runs: dict[str, list[ExitOutputs]] = {method: [] for method in METHODS}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        known, learned = _parted(train, args.unseen)
        backbone = pretrained(known)
        for method in METHODS:
            runs[method].append(_measure(backbone, method, seed, args, learned, test))
            exits = " ".join(f"{accuracy:.1%}" for accuracy in runs[method][-1].accuracy())
            console.print(f"seed {seed}  {method}: {exits}  ({time.perf_counter() - started:.0f} s)")
    console.print(_table(runs, args))
    write(args.out, args, runs=numbers(runs))


def _parted(train: Texts, unseen: int) -> tuple[Texts, Texts]:
    """What the backbone learns from, and what the exits do: all texts, or ``unseen`` others."""
    if not unseen:
        return train, train
    order = torch.randperm(len(train.ids))
    known, learned = (
        replace(train, ids=train.ids[rows], labels=train.labels[rows]) for rows in (order[unseen:], order[:unseen])
    )
    return known, learned


def _measure(
    backbone: nn.Module, method: str, seed: int, args: argparse.Namespace, train: Texts, test: Texts
) -> ExitOutputs:
    torch.manual_seed(seed)
    ee = exitkit.attach(
        backbone, _inputs([(test.ids[0], test.labels[0])] * 2), every=1, method=METHODS[method], head=args.head
    )
    trainer = exitkit.Trainer(ee, epochs=args.epochs, lr=args.lr, seed=seed, cache=True, show_progress=False)
    trainer.fit(_loader(train, shuffle=True))
    return exitkit.collect(ee, _loader(test, shuffle=False))


def _loader(texts: Texts, shuffle: bool) -> DataLoader[Any]:
    dataset = TensorDataset(texts.ids, texts.labels)
    return DataLoader(dataset, BATCH, shuffle=shuffle, collate_fn=lambda rows: _inputs(rows, labelled=True))


def _inputs(rows: list[tuple[Tensor, Tensor]], labelled: bool = False) -> dict[str, Tensor]:
    ids, labels = default_collate(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()} | ({"labels": labels} if labelled else {})


def _table(runs: dict[str, list[ExitOutputs]], args: argparse.Namespace) -> Table:
    return table(
        ("method", *(f"{budget:.0%}" for budget in BUDGETS), "no sample leaves"),
        over_budgets(runs),
        f"AG News, frozen six-layer BERT, 5 exits ({args.head}): accuracy (%) by share of its MACs",
        (f"exits trained on {args.unseen:,} texts that the backbone does not know, " if args.unseen else "")
        + f"{args.epochs} epochs of the heads, mean ± std of {args.seeds} seeds",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with agnews_train.tsv and agnews_test.tsv")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of head training")
    parser.add_argument(
        "--unseen", type=int, default=0, help="texts kept from the backbone for the exits to learn from"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--head", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/text.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
