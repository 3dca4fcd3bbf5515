"""Tiny data that anyone can make: images of noise around a class's own grey, and sentences of a few words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exitkit.common.files import replacing

LARGE = 64
"""From this side on, images are so large that a few must do."""
_CLASSES, _EACH, _TESTED = 4, 8, 8
_WORDS = ("alpha", "beta", "gamma", "delta", "of", "the", "and")


def made_up(kind: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Values of a recipe for data of a kind, which are written to ``folder`` unless they are there.

    Args:
        kind: ``{"side": 32}`` for images, ``{"texts": True}`` for texts and a tiny BERT that reads them, with ``"pairs"``, and
            ``"classes": 1`` for numbers in place of labels.
        folder: where the files go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _texts(kind, folder) if kind.get("texts") else _images(kind["side"], folder)


def _images(side: int, folder: Path) -> dict[str, Any]:
    generator = np.random.default_rng(side)
    names = {}
    for part, count in (("data", _CLASSES * _EACH), ("test", _TESTED)):
        path = folder / f"images{side}_{part}.npz"
        names[part] = str(path)
        if path.exists():
            continue
        labels = np.arange(count) % _CLASSES
        noise = generator.integers(0, 60, (count, side, side, 3))
        images = (noise + 50 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=images, labels=labels)
    return names


def _texts(kind: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    pairs, numbers = bool(kind.get("pairs")), kind.get("classes") == 1
    names: dict[str, Any] = {"model": f"hf:{_bert(folder)}"}
    for part, count in (("data", _CLASSES * _EACH), ("test", _TESTED)):
        path = folder / f"{'pairs' if pairs else 'texts'}{'-numbers' if numbers else ''}_{part}.tsv"
        names[part] = str(path)
        header = "first\tsecond\tlabel" if pairs else "text\tlabel"
        rows = [_sentence(index, pairs, numbers) for index in range(count)]
        with replacing(path) as temporary:
            temporary.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return names


def _sentence(index: int, pairs: bool, numbers: bool) -> str:
    label = index % _CLASSES
    text = f"{_WORDS[label]} of the {_WORDS[(index // _CLASSES) % len(_WORDS)]}"
    texts = [text, f"the {_WORDS[(label + 1) % _CLASSES]}"] if pairs else [text]
    return "\t".join([*texts, str(label + 0.1 * (index % 3) if numbers else label)])


def _bert(folder: Path) -> Path:
    """A BERT of twelve layers of width 16 with a vocabulary of those words; its weights are random."""
    import transformers

    path = folder / "bert"
    path.mkdir(exist_ok=True)
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]), "utf-8")
    tokenizer = {"tokenizer_class": "BertTokenizer", "model_max_length": 64, "do_lower_case": True}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    transformers.BertConfig(vocab_size=5 + len(_WORDS), max_position_embeddings=64, **size).save_pretrained(path)
    return path
