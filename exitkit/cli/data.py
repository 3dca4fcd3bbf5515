"""Data sets by path or name, as data loaders that fit a model."""

from __future__ import annotations

import csv
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from exitkit.cli.unpacking import check_inflation
from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.torchvision_guard import import_torchvision
from exitkit.multi_exit.image_files import opened_image, prepared_image
from exitkit.multi_exit.preprocessing import ImagePreprocessing, default_statistics
from exitkit.multi_exit.saving.hub import refuse_local_path
from exitkit.multi_exit.text_length import longest_text

_HELD_OUT = 0.2
_LABEL_DIGITS = 9
_SPECIAL_TOKENS = 8
"""More than any tokenizer adds to a text or a pair."""


@dataclass(frozen=True)
class Split:
    """Training and test samples, and how they become batches.

    Attributes:
        preprocessing: of images, how they became tensors.
        classes: how many classes the labels name; None where nothing tells.
        note: a word to the user on what was lost, or empty.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    collate: Callable[..., Any] | None = None
    preprocessing: ImagePreprocessing | None = None
    classes: int | None = None
    note: str = ""

    @property
    def black(self) -> tuple[float, ...]:
        """Of images, a black pixel, normalised, per channel."""
        return () if self.preprocessing is None else self.preprocessing.black

    def loaders(self, batch: int, limit: int | None, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Shuffled training batches (of ``limit`` samples at most) and test batches."""
        train = self.train
        size = len(train)  # type: ignore[arg-type]
        if limit is not None and limit < size:
            train = Subset(train, torch.randperm(size, generator=_generator(seed))[:limit].tolist())
        generator = _generator(seed)
        return (
            DataLoader(train, batch, shuffle=True, generator=generator, collate_fn=self.collate),
            DataLoader(self.test, 4 * batch, collate_fn=self.collate),
        )


def load_data(
    data: str,
    model: nn.Module,
    test: str | None = None,
    tokenizer: str | None = None,
    *,
    numbers: bool = False,
    pairs: bool = False,
    max_length: int | None = None,
) -> Split:
    """The data set that ``data`` names, prepared for ``model``.

    Args:
        data: a folder of images (one subfolder per class, or ``train/`` and ``val/`` of such), a ``.csv`` or ``.tsv``
            of text and label with a header, an ``.npz`` with ``images`` and ``labels``, or the name of a class in
            ``torchvision.datasets``.
        test: the same for the test samples; without it, a seeded fifth is held out.
        tokenizer: for text: a Hugging Face tokenizer's name or folder.
        numbers: for text: the last column holds numbers to predict instead of labels.
        pairs: for text: every sample is two texts, in the first two columns.
        max_length: for text: tokens after which one is cut; by default as many as the tokenizer and the model take.

    Raises:
        ArgumentError: a path that does not exist, an unknown format, or contents that do not fit.
    """
    path = Path(data)
    if os.path.isdir(path):
        return _image_folder(path, model, test)
    if not os.path.exists(path):
        if data.isidentifier():
            if test is not None:
                raise ArgumentError(f"--test {test!r}: {data} brings its own test samples; leave --test out")
            return _torchvision_dataset(data, model)
        raise ArgumentError(f"--data {data!r} does not exist, and is not a name in torchvision.datasets")
    if test is not None and not os.path.exists(test):
        raise ArgumentError(f"--test {test!r} does not exist; leave it out to hold out a fifth of --data")
    if path.suffix == ".npz":
        return _arrays(path, model, test)
    if path.suffix in (".csv", ".tsv"):
        return _text(path, model, test, tokenizer, numbers, pairs, max_length)
    raise ArgumentError(f"--data {data!r} has an unknown format; give an image folder, .npz, .csv or .tsv")


def normalise(
    images: np.ndarray[Any, Any] | Tensor, size: Sequence[int] | None = None, mean: Any = None, std: Any = None
) -> Tensor:
    """uint8 images (N, H, W) or (N, H, W, C) → float (N, C, H, W): scaled to [0, 1], resized, normalised.

    ``size`` is (C, H, W) as the model takes it; grey images are repeated over its channels. The default mean and
    standard deviation are ImageNet's.
    """
    pixels = torch.as_tensor(images)
    pixels = pixels.unsqueeze(-1) if pixels.dim() == 3 else pixels
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    if size is not None:
        if pixels.shape[1] == 1 and size[0] > 1:
            pixels = pixels.expand(-1, size[0], -1, -1)
        if pixels.shape[2:] != tuple(size[1:]):
            pixels = F.interpolate(pixels, tuple(size[1:]), mode="bilinear", antialias=True)
    channels = pixels.shape[1]
    centre, spread = default_statistics(channels)
    return (pixels - torch.tensor(mean or centre).view(-1, 1, 1)) / torch.tensor(std or spread).view(-1, 1, 1)


def _arrays(path: Path, model: nn.Module, test: str | None) -> Split:
    """``images``/``labels``, or MedMNIST's ``train_images``, ``train_labels``, ``test_images``, ``test_labels``."""
    arrays, given = _read_npz(path), f"--data {str(path)!r}"
    declared = ImagePreprocessing.of(model)
    size, mean, std = (None,) * 3 if declared is None else (declared.size, declared.mean, declared.std)

    def samples(source: dict[str, Any], prefix: str, origin: str) -> TensorDataset:
        names = f"{prefix}images", f"{prefix}labels"
        if any(name not in source for name in names):
            raise ArgumentError(f"{origin} holds {str(sorted(source))[:200]}, but needs 'images' and 'labels'")
        images, labels = source[names[0]], np.asarray(source[names[1]]).reshape(-1)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels) or not len(images):
            raise ArgumentError(
                f"{origin} has images of dtype {images.dtype} and shape {images.shape} and {len(labels)} labels; "
                "expected uint8 (N, H, W) or (N, H, W, C), as many labels, and N > 0"
            )
        channels = 1 if images.ndim == 3 else images.shape[-1]
        if size is not None and channels not in (1, size[0]):
            raise ArgumentError(f"{origin} has {channels} channels, but the model takes {size[0]}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise ArgumentError(f"{origin} has labels of dtype {labels.dtype}; expected class indices from 0")
        return TensorDataset(normalise(images, size, mean, std), torch.as_tensor(labels.astype(np.int64)))

    train: Dataset[Any]
    held_out: Dataset[Any]
    if test is not None:
        train, held_out = samples(arrays, "", given), samples(_read_npz(Path(test)), "", f"--test {test!r}")
    elif "train_images" in arrays:
        train, held_out = samples(arrays, "train_", given), samples(arrays, "test_", given)
    else:
        train, held_out = _hold_out(samples(arrays, "", given))
    shape = tuple(train[0][0].shape)
    centre, spread = default_statistics(shape[0])
    preprocessing = ImagePreprocessing(shape, tuple(mean or centre), tuple(std or spread), 1.0, "bilinear", "squash")
    labels = [np.asarray(array).max() for name, array in arrays.items() if name.endswith("labels")]
    return Split(train, held_out, preprocessing=preprocessing, classes=int(max(labels)) + 1)


def _read_npz(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # numpy would take it for a pickle, and advise to trust it
        raise FileError(f"{str(path)!r} cannot be read as .npz: it is not a zip archive; write it with numpy.savez")
    try:
        check_inflation(path)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds on a damaged file
        raise FileError(f"{str(path)!r} cannot be read as .npz: {str(error)[:200]}") from error


def _image_folder(path: Path, model: nn.Module, test: str | None) -> Split:
    datasets = import_torchvision("datasets", "an image folder")
    preprocessing = _image_preprocessing(model)

    def folder(at: Path, option: str = "--data") -> Any:
        try:
            return datasets.ImageFolder(str(at), loader=partial(prepared_image, preprocessing=preprocessing))
        except (FileNotFoundError, OSError) as error:
            raise ArgumentError(
                f"{option} {str(at)!r} is not an image folder (one subfolder per class): {error}"
            ) from error

    parts = {name: path / name for name in ("train", "val", "test") if (path / name).is_dir()}
    held_out = Path(test) if test is not None else parts.get("test", parts.get("val"))
    if held_out is None:
        whole = folder(path)
        train_part, test_part = _hold_out(whole)
        _check_readable(whole.imgs[index][0] for index in test_part.indices)
        return Split(train_part, test_part, preprocessing=preprocessing, classes=len(whole.classes))
    train_set = folder(parts.get("train", path))
    option = "--data" if test is None else "--test"
    test_set = folder(held_out, option)
    if train_set.class_to_idx != test_set.class_to_idx:
        raise ArgumentError(
            f"{option} {str(held_out)!r} has the classes {test_set.classes[:5]}, but the training folder has "
            f"{train_set.classes[:5]} (first five of each); both need the same subfolders"
        )
    _check_readable(path for path, _ in test_set.imgs)
    return Split(train_set, test_set, preprocessing=preprocessing, classes=len(train_set.classes))


def _check_readable(paths: Iterable[str]) -> None:
    """Test images are needed after the training, which a damaged one would lose."""
    for path in paths:
        opened_image(path)


def _torchvision_dataset(name: str, model: nn.Module) -> Split:
    datasets = import_torchvision("datasets", f"--data {name}")
    if not hasattr(datasets, name):
        raise ArgumentError(f"--data {name!r} is neither a path nor a name in torchvision.datasets, such as CIFAR10")
    preprocessing = _image_preprocessing(model)
    options = {"transform": preprocessing.transform, "download": True}
    try:
        train, test = (getattr(datasets, name)("data", train=train, **options) for train in (True, False))
    except Exception as error:  # downloads fail in many ways
        raise ArgumentError(
            f"--data {name}: {type(error).__name__}: {error}. Files are looked for in ./data"
        ) from error
    return Split(train, test, preprocessing=preprocessing, classes=len(getattr(train, "classes", ())) or None)


def _text(
    path: Path,
    model: nn.Module,
    test: str | None,
    tokenizer: str | None,
    numbers: bool,
    pairs: bool,
    max_length: int | None,
) -> Split:
    """Text in the first column (a pair in the first two), label in the last, a header above; labels may be words."""
    if tokenizer is None:
        raise ArgumentError(f"--data {str(path)!r} is text; use --model hf:NAME_OR_DIR, whose tokenizer splits it")
    encode = load_tokenizer(tokenizer)
    longest = longest_text(encode, model, max_length)
    rows = _read_text(path, pairs)
    names = (_numbers if numbers else _label_indices)({label for _, label in rows})
    if not numbers and not all(label.strip().isdecimal() for label in names):
        rows.classes = list(names)

    def collate(batch: list[tuple[Any, str]]) -> dict[str, Tensor]:
        texts = [text for text, _ in batch]
        columns = map(list, zip(*texts, strict=True)) if pairs else [texts]
        tokens = encode(*columns, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        kept = {key: tokens[key] for key in kinds if key in tokens}
        return kept | {"labels": torch.tensor([names[label] for _, label in batch])}

    kinds = ("input_ids", "attention_mask", *(["token_type_ids"] if pairs else []))
    held_out = [] if test is None else _read_text(Path(test), pairs)
    cut = _cut([text for text, _ in (*rows, *held_out)], encode, pairs, longest)
    note = f"{cut} of {len(rows) + len(held_out)} texts are cut at {longest} tokens" if cut else ""
    classes = None if numbers else int(max(names.values())) + 1
    if test is None:
        return Split(*_hold_out(rows), collate, classes=classes, note=note)
    if numbers:
        names |= _numbers({label for _, label in held_out})
    if unknown := {label for _, label in held_out} - set(names):
        raise ArgumentError(f"--test {test!r} has labels that --data has not: {sorted(unknown)[:5]}")
    return Split(rows, held_out, collate, classes=classes, note=note)  # type: ignore[arg-type]


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


class _Rows(list[tuple[Any, str]]):
    """Rows of text and label, and the names of the classes where labels are words, as torchvision's data sets have them."""

    classes: list[str] | None = None


def _read_text(path: Path, pairs: bool) -> _Rows:
    """A text, or a pair of texts, and a label of each row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in cells(file, path) if len(row) > 1][1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{str(path)!r} cannot be read as UTF-8 text and label: {error}") from error
    if not rows:
        raise ArgumentError(f"{str(path)!r} has no rows of text and label below a header")
    if pairs and (short := next((row for row in rows if len(row) < 3), None)):
        raise ArgumentError(
            f"{str(path)!r} has a row of {len(short)} columns, but pairs are two texts and a label: {str(short)[:200]}"
        )
    return _Rows(((row[0], row[1]) if pairs else row[0], row[-1]) for row in rows)


def cells(file: Iterable[str], path: Path) -> Iterator[list[str]]:
    """The rows of a ``.csv`` or ``.tsv``. A quotation mark in a ``.tsv`` is a character like others, as in GLUE's files."""
    if path.suffix == ".tsv":
        return csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(file)


def _label_indices(labels: set[str]) -> dict[str, int]:
    """Numbers are class indices as they are; words are numbered in alphabetical order."""
    if all(label.strip().isdecimal() for label in labels):
        if long := next((label for label in labels if len(label.strip()) > _LABEL_DIGITS), None):
            raise ArgumentError(
                f"the label {long[:20]}… has {len(long)} digits; labels are class indices from 0, or words"
            )
        return {label: int(label) for label in labels}
    return {label: index for index, label in enumerate(sorted(labels))}


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


def _hold_out(samples: Any) -> tuple[Subset[Any], Subset[Any]]:
    train, test = random_split(samples, [1 - _HELD_OUT, _HELD_OUT], generator=_generator(0))
    return train, test


def _image_preprocessing(model: nn.Module) -> ImagePreprocessing:
    preprocessing = ImagePreprocessing.of(model)
    if preprocessing is None:
        raise ArgumentError(f"{type(model).__name__} does not say what image size it takes; use an .npz of that size")
    return preprocessing


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
