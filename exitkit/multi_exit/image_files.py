"""Images as files hold them, opened with care: sizes are looked at before they are unpacked."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from exitkit.common.errors import ArgumentError, FileError
from exitkit.multi_exit.preprocessing import ImagePreprocessing, upright


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
        with Image.open(path if source is None else source) as image:
            most = Image.MAX_IMAGE_PIXELS or math.inf
            if image.width * image.height > most:  # Pillow warns alone, up to twice as many
                raise FileError(f"it has {image.width} × {image.height} pixels, above PIL.Image.MAX_IMAGE_PIXELS")
            image.load()
            return upright(image)
    except Exception as error:  # Pillow raises a dozen kinds on a damaged file, SyntaxError among them
        raise FileError(f"{path!r} cannot be read as an image: {str(error)[:200]}") from error


def prepared_image(path: str, preprocessing: ImagePreprocessing, source: Any = None, *, whole: bool = False) -> Tensor:
    """An image as a model takes it, (C, H, W); arguments are those of :func:`opened_image`, and ``whole`` of ``transform``.

    Raises:
        FileError: it cannot be read or prepared.
    """
    image = opened_image(path, source)
    try:
        return preprocessing.transform(image, whole=whole)
    except ArgumentError as error:
        raise FileError(f"{path!r} cannot be prepared: {error}") from error
