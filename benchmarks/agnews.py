"""AG News as token ids, and a small BERT trained on it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn

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
