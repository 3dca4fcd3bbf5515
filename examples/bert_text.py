"""Exits in a text classifier: a small BERT is trained on the spot, then given exits that cost next to nothing.

    python examples/bert_text.py --train agnews_train.tsv --test agnews_test.tsv [--quick]

It needs transformers: pip install 'exitkit[transformers]'.

Both files hold text, tab, label (0, 1, …) below a header: AG News, SST-2, or your own. Where a trained model is at hand,
everything up to ``attach`` is ``AutoModelForSequenceClassification.from_pretrained(...)`` instead. ``head="tail"`` gives every
exit a copy of what BERT does after its last layer (pooler and classifier, with their weights), so that exits answer sensibly
before they have learned anything; the first table shows that.

AG News, ``--quick``, one run on a CPU: accuracy exit by exit 53.9, 61.6, 67.7 and 70.0% (the network's own last); 65.2% at
half of the MACs, 69.3% at three quarters. τ for a drop of at most 3% with probability 0.9: 68.5% at 65% of the MACs on the
test texts. Another run had 69.1% for the network's own answer. It takes 36 s of CPU time on one core.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import exitkit

LENGTH, BATCH = 32, 64


@dataclass
class Texts:
    """Token ids (N, 32), 0 for padding, and labels (N,), as batches that a Hugging Face model takes."""

    ids: Tensor
    labels: Tensor
    shuffle: bool = False

    def __len__(self) -> int:
        return -(-len(self.ids) // BATCH)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(self.ids)) if self.shuffle else torch.arange(len(self.ids))
        for rows in order.split(BATCH):
            ids = self.ids[rows]
            yield {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": self.labels[rows]}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if not all(map(find_spec, ("tokenizers", "transformers"))):
        raise exitkit.ExitkitError("this needs transformers: pip install 'exitkit[transformers]'")
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    train, held_out, test = load(args.train, args.test, args.texts, args.vocabulary)
    classes = int(train.labels.max()) + 1
    print(f"{len(train.ids)} texts to learn from, {len(held_out.ids)} to choose τ on, {len(test.ids)} to test on")
    backbone = trained_bert(train, args.layers, args.width, args.vocabulary, classes, args.pretraining_epochs)

    ee = exitkit.attach(backbone, every=1, method=args.method, head="tail")
    show("As attached", exitkit.collect(ee, test))
    exitkit.Trainer(ee, regime="disjoint", epochs=args.epochs, seed=args.seed).fit(train)
    outputs = exitkit.collect(ee, test)
    show("Trained", outputs)

    policy = exitkit.choose_threshold(exitkit.collect(ee, held_out), max_drop=args.max_drop, confidence=0.9)
    print(policy.guarantee)
    point = outputs.at(policy)
    print(
        f"On the test texts: {point.accuracy:.2%} at {point.cost:.1%} of the MACs, against "
        f"{outputs.accuracy()[-1]:.2%} of the whole network"
    )
    answers = exitkit.compile(ee, policy)(**inputs_of(next(iter(test))))
    print(f"The engine's first answers left at exits {answers.exit[:10].tolist()}")
    print(f"{time.perf_counter() - started:.0f} s")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help=".tsv of text and label; a fifth is held out for τ")
    parser.add_argument("--test", type=Path, required=True, help=".tsv of text and label")
    parser.add_argument("--texts", type=int, default=50_000, help="use at most so many of each file")
    parser.add_argument("--method", default="ztw")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=6_000)
    parser.add_argument("--pretraining-epochs", type=int, default=4, help="of the BERT")
    parser.add_argument("--epochs", type=int, default=3, help="of the exits")
    parser.add_argument("--max-drop", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="4,000 texts, four layers of width 64, fewer epochs")
    args = parser.parse_args(arguments)
    if args.quick:
        args.texts, args.layers, args.width, args.epochs = 4_000, 4, 64, 2
    return args


def load(train: Path, test: Path, count: int, vocabulary: int) -> tuple[Texts, Texts, Texts]:
    """Training, held-out and test texts, by a WordPiece vocabulary made from the training file."""
    from tokenizers import BertWordPieceTokenizer

    train_texts, train_labels = read(train, count)
    test_texts, test_labels = read(test, count)
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(train_texts, vocab_size=vocabulary, show_progress=False)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    ids, test_ids = (
        torch.tensor([text.ids for text in tokenizer.encode_batch(texts)]) for texts in (train_texts, test_texts)
    )
    labels, order = torch.tensor(train_labels), torch.randperm(len(ids))
    held_out, learned = order[: len(ids) // 5], order[len(ids) // 5 :]
    return (
        Texts(ids[learned], labels[learned], shuffle=True),
        Texts(ids[held_out], labels[held_out]),
        Texts(test_ids, torch.tensor(test_labels)),
    )


def read(path: Path, count: int) -> tuple[list[str], list[int]]:
    """Texts and labels of a file with a header, at most ``count``, spread evenly."""
    if not path.is_file():
        raise exitkit.ExitkitError(
            f"{str(path)!r} does not exist; give a .tsv of text and label, such as AG News or SST-2"
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row][1:]
    if not rows or any(len(row) != 2 or not row[1].isdigit() for row in rows):
        raise exitkit.ExitkitError(f"{str(path)!r} must hold text, tab, label (0, 1, …) below a header in every line")
    count = min(count, len(rows))
    kept = [rows[index * len(rows) // count] for index in range(count)]
    return [text for text, _ in kept], [int(label) for _, label in kept]


def trained_bert(train: Texts, layers: int, width: int, vocabulary: int, classes: int, epochs: int) -> nn.Module:
    """A BERT trained from random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "max_position_embeddings": LENGTH,
        "num_labels": classes,
    }
    model: nn.Module = BertForSequenceClassification(BertConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=epochs * len(train))
    for _ in range(epochs):
        for batch in train:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def show(title: str, outputs: exitkit.ExitOutputs) -> None:
    """Accuracy of every exit, and the budget table."""
    accuracies = "  ".join(f"{accuracy:.1%}" for accuracy in outputs.accuracy())
    print(f"\n{title}, exit by exit (the network's own answer last): {accuracies}\n{outputs.curve().budget_table()}")


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


if __name__ == "__main__":
    try:
        main()
    except exitkit.ExitkitError as error:
        raise SystemExit(f"bert_text: {error}") from None
