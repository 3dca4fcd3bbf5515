"""From what a client sends, an image or a text, to the tensors of one request."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from exitkit.common.errors import ArgumentError, FileError
from exitkit.multi_exit.image_files import prepared_image
from exitkit.multi_exit.preprocessing import ImagePreprocessing, Preprocessing, TextPreprocessing
from exitkit.serving.protocol import json_object

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Of Pillow's: others call programs (EPS), or are rarely looked at."""
_STEP = 16
"""Lengths of texts are multiples of it, so that texts of different lengths can wait for one batch."""


class TooLargeError(ArgumentError):
    """More than the server takes at once."""


class UnknownKindError(ArgumentError):
    """A kind of content that this package does not take."""


class Upload(NamedTuple):
    """A batch of one, and of a text whether it was cut to the length that the package takes."""

    batch: Any
    cut: bool | None


def upload_of(kind: str, body: bytes, preprocessing: Preprocessing | None, most_pixels: int) -> Upload:
    """One image, text or pair of texts.

    Args:
        kind: the request's content type, without parameters.
        body: the image's file; or a text in UTF-8, plain or as ``{"text": …}``, where ``"text_pair"`` is the second of two.
        preprocessing: the package's.
        most_pixels: of an image, before it is unpacked.

    Raises:
        ArgumentError: what cannot be read, is too large, or of another kind; a package without preprocessing.
    """
    if preprocessing is None:
        raise UnknownKindError(
            "this package does not say how images or texts become tensors; send tensors to v2/models/…/infer"
        )
    if isinstance(preprocessing, ImagePreprocessing):
        if not (kind.startswith("image/") or kind == "application/octet-stream"):
            raise UnknownKindError(
                f"content type {kind[:80]!r}: send the image's file itself, as image/jpeg or image/png"
            )
        return Upload(_image(body, preprocessing, most_pixels)[None], None)
    tensors, cut = preprocessing.encode([_text(kind, body)])
    return Upload(padded(tensors, preprocessing), *cut)


def padded(tensors: Mapping[str, Tensor], preprocessing: TextPreprocessing) -> dict[str, Tensor]:
    """Texts (B, T) of a length that others have too; what is added is masked. Without a mask they stay as they are."""
    if "attention_mask" not in tensors:
        return dict(tensors)
    length = tensors["attention_mask"].shape[1]
    more = min(-(-length // _STEP) * _STEP, max(preprocessing.longest, length)) - length
    fill = {"input_ids": preprocessing.pad[1]}
    return {key: nn.functional.pad(value, (0, more), value=fill.get(key, 0)) for key, value in tensors.items()}


def _image(body: bytes, preprocessing: ImagePreprocessing, most_pixels: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(body), formats=_FORMATS) as image:
            width, height = image.size
    except Exception as error:  # Pillow raises a dozen kinds on a damaged file
        raise ArgumentError(f"the body is no image of {', '.join(_FORMATS)} that can be read") from error
    if width * height > most_pixels:
        raise TooLargeError(f"the image has {width} x {height} pixels; at most {most_pixels} are taken")
    try:
        return prepared_image("the image", preprocessing, io.BytesIO(body))
    except FileError as error:
        raise ArgumentError(str(error)) from error


def _text(kind: str, body: bytes) -> str | tuple[str, str]:
    if kind == "application/json":
        document = json_object(body)
        text, pair = document.get("text"), document.get("text_pair")
        if document.keys() - {"text", "text_pair"} or not isinstance(text, str) or not isinstance(pair, str | None):
            raise ArgumentError('the body must be {"text": "…"}, or {"text": "…", "text_pair": "…"} for two texts')
        return text if pair is None else (text, pair)
    if kind != "text/plain":
        raise UnknownKindError(
            f'content type {kind[:80]!r}: send text/plain, or application/json with {{"text": "…"}}'
        )
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"the body is no UTF-8: {error}") from error
