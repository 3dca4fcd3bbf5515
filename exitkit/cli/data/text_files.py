"""Texts with labels, from ``.csv`` and ``.tsv`` files, as tokens."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.cli.data.split import Split, check_indices, hold_out
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError, FileError
from exitkit.multi_exit.saving.hub import refuse_local_path
from exitkit.multi_exit.text_length import longest_text

_LABEL_DIGITS = 9
_SPECIAL_TOKENS = 8
"""More than any tokenizer adds to a text or a pair."""


def texts(
    path: Path,
    model: nn.Module,
    test: str | None,
    tokenizer: str | None,
    numbers: bool,
    pairs: bool,
    max_length: int | None,
    unlabelled: bool,
    option: str,
) -> Split:
    """Text in the first column (a pair in the first two), label in the last, a header above; labels may be words, which are
    numbered as the model's configuration numbers them, or else in alphabetical order.
    """
    if tokenizer is None:
        raise ArgumentError(f"--data {str(path)!r} is text; use --model hf:NAME_OR_DIR, whose tokenizer splits it")
    encode = load_tokenizer(tokenizer)
    longest = longest_text(encode, model, max_length)
    unread, rows = _read_text(path, pairs)
    found = {label for _, label in rows}
    own = _names_of(model)
    names = _numbers(found) if numbers else _label_indices(found, f"--data {str(path)!r}", unlabelled, own)
    others = [] if test is None else _read_text(Path(test), pairs)[1]
    if numbers:
        names |= _numbers({label for _, label in others})
    if unknown := {label for _, label in others} - set(names):
        raise ArgumentError(f"{option} {test!r} has labels that --data has not: {sorted(unknown)[:5]}")
    train, held_out = (_Rows((text, names[label]) for text, label in part) for part in (rows, others))
    classes = None if numbers else int(max(names.values())) + 1
    if not numbers and not _are_indices(names):
        train.classes = held_out.classes = own if names == _indices_in(own, found) else list(names)
        classes = len(train.classes)

    def collate(batch: list[tuple[Any, float]]) -> dict[str, Tensor]:
        texts, labels = zip(*batch, strict=True)
        columns = map(list, zip(*texts, strict=True)) if pairs else [list(texts)]
        tokens = encode(*columns, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        kept = {key: tokens[key] for key in kinds if key in tokens}
        return kept | {"labels": torch.tensor(labels)}

    kinds = ("input_ids", "attention_mask", *(["token_type_ids"] if pairs else []))
    cut = _cut([text for text, _ in (*rows, *others)], encode, pairs, longest)
    notes = [f"{cut} of {len(rows) + len(others)} texts are cut at {longest} tokens"] if cut else []
    if unread:
        columns = "texts are the first two columns" if pairs else "the text is the first column"
        notes.append(f"{columns} of {str(path)!r}, the label the last; not read: {', '.join(unread)}")
    first, second = hold_out(train, str(path)) if test is None else (train, held_out)
    return Split(first, second, collate, classes=classes, note="; ".join(notes))  # type: ignore[arg-type]


def _cut(texts: list[Any], encode: Any, pairs: bool, longest: int) -> int:
    """How many texts have more tokens; no token is shorter than a byte, so that short ones need not be looked at."""
    long = [text for text in texts if len("".join(text).encode()) + _SPECIAL_TOKENS > longest]
    columns = map(list, zip(*long, strict=True)) if pairs else [long]
    return sum(len(ids) > longest for ids in encode(*columns, verbose=False)["input_ids"]) if long else 0


def load_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer by name or folder.

    Raises:
        ArgumentError: there is none.
    """
    from transformers import AutoTokenizer

    if not os.path.isdir(name):
        refuse_local_path(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--model hf:{name} has no tokenizer: {error}") from error


class _Rows(list[tuple[Any, float]]):
    """Text and label of each row, and the names of the classes where labels are words, as torchvision has them."""

    classes: list[str] | None = None


def _read_text(path: Path, pairs: bool) -> tuple[list[str], list[tuple[Any, str]]]:
    """Names of columns that are not read; and of each row a text, or a pair of texts, and the label as it is written."""
    least, needed = (3, "pairs are two texts and a label") if pairs else (2, "training takes a text and a label")
    header, *table = read_table(path, least, needed)
    rows = [(*row[:-1], row[-1].strip()) for row in table]
    if (bare := next((number for number, row in enumerate(rows) if not row[-1]), None)) is not None:
        raise ArgumentError(
            f"{str(path)!r}: row {bare + 1} below the header has no label: {str(list(rows[bare]))[:200]}"
        )
    return header[least - 1 : -1], [((row[0], row[1]) if pairs else row[0], row[-1]) for row in rows]


def read_table(path: Path, least: int, needed: str) -> list[list[str]]:
    """The header of a ``.csv`` or ``.tsv`` and the rows below it, empty lines left out.

    Args:
        path: the file.
        least: how many columns there must be.
        needed: which these are, for messages.

    Raises:
        ArgumentError: there are no rows, fewer columns, or a row of other columns than the header.
        FileError: no file of UTF-8, or a damaged one.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
            header, *rows = [row for row in cells(file, path) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{str(path)!r} cannot be read as UTF-8 text: {error}") from error
    if not rows:
        raise ArgumentError(f"{str(path)!r} has no rows below a header")
    odd = next((number for number, row in enumerate(rows) if len(row) != len(header)), None)
    if odd is not None:
        quoted = "" if path.suffix.lower() == ".tsv" else "; a text with commas stands in quotation marks"
        raise ArgumentError(
            f"{str(path)!r}: row {odd + 1} below the header has {counted(len(rows[odd]), 'column')}, and the header "
            f"{len(header)}: {str(rows[odd])[:200]}{quoted}"
        )
    if len(header) < least:
        raise ArgumentError(f"{str(path)!r} has {counted(len(header), 'column')}, and {needed}: {str(rows[0])[:200]}")
    return [header, *rows]


def cells(file: Iterable[str], path: Path) -> Iterator[list[str]]:
    """The rows of a ``.csv`` or ``.tsv``. A quotation mark in a ``.tsv`` is a character like others, as in GLUE's files."""
    if path.suffix.lower() == ".tsv":
        return csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(file)


def _names_of(model: nn.Module) -> list[str]:
    """The names of a Hugging Face model's classes in their order; none of other models."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [str(names[index]) for index in range(len(names))] if names.keys() == set(range(len(names))) else []


def _are_indices(labels: Iterable[str]) -> bool:
    """Whole numbers, also as a table with gaps has them: 1.0."""
    return all(label.removeprefix("-").removesuffix(".0").isdecimal() for label in labels)


def _label_indices(labels: set[str], origin: str, unlabelled: bool, own: Sequence[str] = ()) -> dict[str, int]:
    """Numbers are class indices as they are; words are numbered as in ``own``, or else in alphabetical order."""
    if _are_indices(labels):
        if long := next((label for label in labels if len(label) > _LABEL_DIGITS), None):
            raise ArgumentError(
                f"the label {long[:20]}… has {len(long)} digits; labels are class indices from 0, or words"
            )
        found = {label: int(label.removesuffix(".0")) for label in labels}
        check_indices(min(found.values()), max(found.values()), origin, unlabelled)
        return found
    return _indices_in(own, labels) or {label: index for index, label in enumerate(sorted(labels))}


def _indices_in(own: Sequence[str], labels: set[str]) -> dict[str, int]:
    """The places of labels among the model's own names, whatever their case; nothing where one is not among them."""
    places = {name.casefold(): index for index, name in enumerate(own)}
    known = all(label.casefold() in places for label in labels)
    return {label: places[label.casefold()] for label in labels} if known else {}


def _numbers(labels: set[str]) -> dict[str, float]:
    """Labels as the numbers that they are."""
    try:
        numbers = {label: float(label) for label in labels}
    except ValueError as error:
        raise ArgumentError(
            f"a model with one output predicts numbers, but the last column has another: {str(error)[:200]}"
        ) from error
    if wrong := next((label for label, number in numbers.items() if not math.isfinite(number)), None):
        raise ArgumentError(f"the last column has {wrong[:20]!r}, which is not a finite number")
    return numbers
