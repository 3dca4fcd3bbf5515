"""Data sets by path or name, as data loaders that fit a model."""

from __future__ import annotations

import inspect
import os
import tomllib
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.cli.data.arrays import image_arrays
from exitkit.cli.data.augmentation import WHOLE
from exitkit.cli.data.split import Split, hold_out
from exitkit.cli.data.text_files import texts
from exitkit.common.errors import ArgumentError, FileError, unknown_name
from exitkit.common.torchvision_guard import import_torchvision
from exitkit.multi_exit.image_files import opened_image, prepared_image
from exitkit.multi_exit.preprocessing import ImagePreprocessing

_DECODERS = 8
_TEXT = (".csv", ".tsv")


def load_data(
    data: str,
    model: nn.Module,
    test: str | None = None,
    tokenizer: str | None = None,
    *,
    numbers: bool = False,
    pairs: bool = False,
    max_length: int | None = None,
    unlabelled: bool = False,
    option: str = "--test",
) -> Split:
    """The data set that ``data`` names, prepared for ``model``.

    Args:
        data: a folder of images (one subfolder per class, or ``train/`` and ``val/`` of such), a ``.csv`` or ``.tsv``
            of text and label with a header, an ``.npz`` with ``images`` and ``labels``, or the name of a class in
            ``torchvision.datasets``, with arguments where it takes some: ``ImageNet:split=val``.
        test: the same for the test samples; without it, a seeded fifth is held out.
        tokenizer: for text: a Hugging Face tokenizer's name or folder.
        numbers: of an ``.npz``, or in the last column of text, labels are numbers to predict.
        pairs: for text: every sample is two texts, in the first two columns.
        max_length: for text: tokens after which one is cut; by default as many as the tokenizer and the model take.
        unlabelled: the label -1 may stand for none.
        option: what ``test`` was given as, for messages.

    Raises:
        ArgumentError: a path that does not exist, an unknown format, contents that do not fit, or a single class.
    """
    path = Path(data)
    if not os.path.exists(path) and not data.partition(":")[0].isidentifier():
        raise ArgumentError(f"--data {data!r} does not exist, and is not a name in torchvision.datasets")
    if os.path.isfile(path) and test is not None and not os.path.exists(test):
        raise ArgumentError(f"{option} {test!r} does not exist; leave it out to hold out a fifth of --data")
    if test is not None and os.path.exists(path) and os.path.exists(test) and os.path.samefile(path, test):
        warnings.warn(
            f"{option} {test!r} is --data itself: accuracy on samples that are learned from, and a promise made on them, say "
            f"nothing of new ones; leave {option} out, and a fifth of --data is held out",
            stacklevel=2,
        )
    if path.suffix not in _TEXT and (pairs or max_length is not None):
        given = "pairs" if pairs else f"max_length={max_length}"
        raise ArgumentError(f"{given} is for text, and --data {data!r} is no .csv or .tsv; leave it out")
    if os.path.isdir(path):
        split = _image_folder(path, model, test, option)
    elif not os.path.exists(path):
        split = _torchvision_dataset(data, test, model, option)
    elif path.suffix == ".npz":
        split = image_arrays(path, model, test, numbers, unlabelled, option)
    elif path.suffix in _TEXT:
        split = texts(path, model, test, tokenizer, numbers, pairs, max_length, unlabelled, option)
    else:
        raise ArgumentError(f"--data {data!r} has an unknown format; give an image folder, .npz, .csv or .tsv")
    if split.classes == 1:
        raise ArgumentError(
            f"--data {data!r} holds one class, from which nothing can be learned\n"
            "Images lie in a subfolder for each class, or in such of train/ and test/; labels of a file are 0, 1, ..."
        )
    return split


def _image_folder(path: Path, model: nn.Module, test: str | None, option: str) -> Split:
    datasets = import_torchvision("datasets", "an image folder")
    preprocessing = _image_preprocessing(model)

    def folder(at: Path, given_as: str = "--data", allow_empty: bool = False) -> Any:
        read = partial(_read, preprocessing=preprocessing)
        try:
            return datasets.ImageFolder(str(at), loader=read, allow_empty=allow_empty)
        except (FileNotFoundError, OSError) as error:
            raise ArgumentError(
                f"{given_as} {str(at)!r} is not an image folder (one subfolder per class): {error}"
            ) from error

    parts = {name: path / name for name in ("train", "val", "test") if (path / name).is_dir()}
    held_out = Path(test) if test is not None else parts.get("test", parts.get("val"))
    if held_out is None:
        whole = folder(path)
        train_part, test_part = hold_out(whole, str(path))
        _check_readable(whole.imgs[index][0] for index in test_part.indices)
        return _decoded(train_part, test_part, preprocessing, len(whole.classes))
    train_set = folder(parts.get("train", path))
    given_as = "--data" if test is None else option
    test_set = folder(held_out, given_as, allow_empty=True)
    if train_set.class_to_idx != test_set.class_to_idx:
        raise ArgumentError(
            f"{given_as} {str(held_out)!r} has the classes {test_set.classes[:5]}, but the training folder has "
            f"{train_set.classes[:5]} (first five of each); both need the same subfolders, also empty ones"
        )
    if not test_set.imgs:
        raise ArgumentError(f"{given_as} {str(held_out)!r} holds no images in its subfolders")
    _check_readable(path for path, _ in test_set.imgs)
    return _decoded(train_set, test_set, preprocessing, len(train_set.classes))


def _decoded(train: Any, test: Any, preprocessing: ImagePreprocessing, classes: int | None) -> Split:
    """Images that are decoded as they are read: by several processes for a GPU, which would wait for one; on a CPU they would
    take the model's cores."""
    workers = min(_DECODERS, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    return Split(train, test, preprocessing=preprocessing, classes=classes, workers=workers)


def _read(path: str, preprocessing: ImagePreprocessing) -> Tensor:
    with _remedy_named():
        return prepared_image(path, preprocessing, whole=WHOLE.get())


@contextmanager
def _remedy_named() -> Iterator[None]:
    """An error of an image file also says what to do about a file of a data set."""
    try:
        yield
    except FileError as error:
        raise FileError(f"{error}; replace the file, or remove it from the data set") from error


def _transformed(image: Any, preprocessing: ImagePreprocessing) -> Tensor:
    return preprocessing.transform(image, whole=WHOLE.get())


def _check_readable(paths: Iterable[str]) -> None:
    """Test images are needed after the training, which a damaged one would lose."""
    with ThreadPoolExecutor() as threads:  # Pillow decodes without Python's lock
        for _ in threads.map(_opened, paths):
            pass


def _opened(path: str) -> None:
    with _remedy_named():
        opened_image(path)  # and let go: of many only those that wait for their turn are in memory


def _torchvision_dataset(data: str, test: str | None, model: nn.Module, option: str) -> Split:
    """``CIFAR10``, which brings its test samples, or ``SVHN:split=train``, whose arguments say which samples it has."""
    named = _parameters(data.partition(":")[0])
    preprocessing = _image_preprocessing(model)
    if ":" in data or "train" not in named:
        if ":" not in data:
            raise ArgumentError(
                f"--data {data!r} takes {', '.join(named)}; say which samples are meant, such as "
                f"{data}:split=train, and {option} {data}:split=test"
            )
        samples = _made(data, "--data", preprocessing)
        train, held_out = hold_out(samples, data) if test is None else (samples, _made(test, option, preprocessing))
        return _decoded(train, held_out, preprocessing, _classes(samples))
    if test is not None:
        raise ArgumentError(f"{option} {test!r}: {data} brings its own test samples; leave {option} out")
    train, held_out = (_made(f"{data}:train={part}", "--data", preprocessing) for part in ("true", "false"))
    return _decoded(train, held_out, preprocessing, _classes(train))


def _classes(samples: Any) -> int | None:
    return len(getattr(samples, "classes", ())) or None


def _parameters(name: str) -> list[str]:
    """The arguments of torchvision's data set, but for those that are set here."""
    datasets = import_torchvision("datasets", f"--data {name}")
    if not hasattr(datasets, name):
        known = [one for one in datasets.__all__ if one[0].isupper()]
        raise unknown_name("--data", name, known, "Or give a path.")
    set_here = ("self", "root", "transform", "target_transform", "transforms", "download", "loader")
    given = inspect.signature(getattr(datasets, name).__init__).parameters.values()
    return [one.name for one in given if one.name not in set_here and one.kind is not one.VAR_KEYWORD]


def _made(data: str, option: str, preprocessing: ImagePreprocessing) -> Any:
    """The data set that ``NAME:key=value,key=value`` names, its files in ./data."""
    name, _, given = data.partition(":")
    known = _parameters(name)
    options: dict[str, Any] = {}
    for part in given.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise unknown_name(f"{option} {data}", key, known, f"Write it as {name}:{known[0]}=VALUE.")
        options[key] = _value(value)
    kind = getattr(import_torchvision("datasets", f"{option} {data}"), name)
    if "download" in inspect.signature(kind.__init__).parameters:
        options["download"] = True
    try:
        return kind("data", transform=partial(_transformed, preprocessing=preprocessing), **options)
    except Exception as error:  # downloads fail in many ways
        raise ArgumentError(
            f"{option} {data}: {type(error).__name__}: {error}. Files are looked for in ./data"
        ) from error


def _value(text: str) -> Any:
    """A number or a truth value as TOML has it; other texts as they are."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _image_preprocessing(model: nn.Module) -> ImagePreprocessing:
    preprocessing = ImagePreprocessing.of(model)
    if preprocessing is None:
        raise ArgumentError(f"{type(model).__name__} does not say what image size it takes; use an .npz of that size")
    return preprocessing
