"""Files that may be larger in memory than on the disk: their sizes are looked at before they are unpacked."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from exitkit.common.errors import ArgumentError, FileError
from exitkit.multi_exit.preprocessing import ImagePreprocessing, upright

_SMALL, _INFLATED = 2**30, 200
"""Of an .npz: what may be inflated in any case, in bytes, and how many times its size larger ones may become."""


def check_inflation(path: Path) -> None:
    """Refuse a file that would be far larger in memory than on the disk."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if declared > _SMALL and declared > _INFLATED * os.path.getsize(path):
        raise FileError(
            f"{str(path)!r} would take {declared / 2**30:.1f} GiB, over {_INFLATED} times its size; write it "
            "uncompressed, with numpy.savez, if that is right"
        )


def opened_image(path: str, source: Any = None) -> Any:
    """A PIL image, upright and of 8 bits a channel.

    Args:
        path: the file.
        source: a binary stream to read instead of it.

    Raises:
        FileError: not an image, a damaged one, one of values beyond 16 bits, or of more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if source is None else source) as image:
                image.load()
                return upright(image)
    except Exception as error:  # Pillow raises a dozen kinds on a damaged file, SyntaxError among them
        raise FileError(f"{path!r} cannot be read as an image: {str(error)[:200]}") from error


def prepared_image(path: str, preprocessing: ImagePreprocessing, source: Any = None) -> Tensor:
    """An image as a model takes it, (C, H, W); arguments are those of :func:`opened_image`.

    Raises:
        FileError: it cannot be read or prepared.
    """
    image = opened_image(path, source)
    try:
        return preprocessing.transform(image)
    except ArgumentError as error:
        raise FileError(f"{path!r} cannot be prepared: {error}") from error
