"""What ``exitkit run`` is given: images and folders, or texts and files of them, or either from stdin."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from torch import Tensor

from exitkit.cli.data.text_files import read_table
from exitkit.common.errors import ArgumentError, FileError
from exitkit.multi_exit.image_files import prepared_image
from exitkit.multi_exit.preprocessing import ImagePreprocessing

STDIN = "-"
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_TABLES = (".csv", ".tsv")
_TEXTS = (*_TABLES, ".txt")


@dataclass
class Losses:
    """What could not be answered, or not in full.

    Attributes:
        skipped: what is wrong with images that cannot be read.
        cut: how many texts were longer than the package takes.
    """

    skipped: list[str] = field(default_factory=list)
    cut: int = 0


def images(given: Sequence[str], preprocessing: ImagePreprocessing, losses: Losses) -> Iterator[tuple[str, Tensor]]:
    """Path and tensor of every image in files and folders; ``-`` is one image on stdin. Unreadable ones are left out.

    Raises:
        ArgumentError: before the first image: a path that does not exist, a text, or a folder without images.
    """
    return _readable([path for one in given for path in _paths(one)], preprocessing, losses)


def texts(given: Sequence[str]) -> Iterator[str]:
    """Texts themselves, those in ``.txt`` (one a line), ``.csv`` and ``.tsv`` (first column, below a header), and on stdin.

    Raises:
        ArgumentError: before the first text: an image, a folder or another file, or what :func:`read_table` raises.
        FileError: a file that is no UTF-8.
    """
    return chain.from_iterable([_texts(one) for one in given])


def pairs(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of texts: the first two columns of ``.csv`` and ``.tsv`` files, below a header.

    Raises:
        ArgumentError: before the first pair: something else, or what :func:`read_table` raises.
        FileError: a file that is no UTF-8.
    """
    return chain.from_iterable([_pairs_in(one) for one in given])


def _readable(paths: Iterable[str], preprocessing: ImagePreprocessing, losses: Losses) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        source = io.BytesIO(sys.stdin.buffer.read()) if path == STDIN else None
        try:
            image = prepared_image(path, preprocessing, source)
        except FileError as error:
            losses.skipped.append(str(error))
        else:
            yield path, image


def _paths(given: str) -> list[str]:
    path = Path(given)
    if given == STDIN:
        return [given]
    if os.path.isdir(path):
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGES)
        if not found:
            raise ArgumentError(f"{given!r} holds no images ({', '.join(_IMAGES)})")
        return [str(file) for file in found]
    if path.suffix.lower() in _TEXTS:
        raise ArgumentError(f"{given!r} holds texts, and this package takes images: name images or folders of them")
    if not os.path.exists(path):
        raise ArgumentError(f"{given[:200]!r} does not exist; this package takes images or folders of them")
    return [given]


def _texts(given: str) -> Iterable[str]:
    path = Path(given)
    ending = path.suffix.lower()
    if given == STDIN:
        return _lines(sys.stdin)
    if ending in _TEXTS:
        return _texts_in(path)
    if (ending in _IMAGES and not given.split()[1:]) or os.path.exists(path):
        raise ArgumentError(
            f"{given[:200]!r} is {'an image' if ending in _IMAGES else 'a file or folder'}, and this package takes texts: "
            f"write the text itself, or name {', '.join(_TEXTS)} files, or - for stdin"
        )
    return [given]


def _texts_in(path: Path) -> list[str]:
    if path.suffix.lower() in _TABLES:
        return [row[0] for row in read_table(path, 1, "texts are in the first")[1:]]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(_lines(file))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{str(path)!r} cannot be read as UTF-8 text: {error}") from error


def _pairs_in(given: str) -> list[tuple[str, str]]:
    path = Path(given)
    if path.suffix.lower() not in _TABLES:
        raise ArgumentError(
            f"{given[:200]!r} is no {' or '.join(_TABLES)} file, whose first two columns --pairs takes for a pair of texts"
        )
    return [(row[0], row[1]) for row in read_table(path, 2, "--pairs takes two texts")[1:]]


def _lines(file: Iterable[str]) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in file if line.strip())
