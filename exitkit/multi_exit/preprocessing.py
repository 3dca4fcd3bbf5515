"""From images and texts to what a model takes, as plain data that a package can hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from exitkit.common.checks import Count, Index, Positive, check_fields
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.common.schema import build
from exitkit.multi_exit.text_length import longest_text
from exitkit.surgery.default_inputs import example_for

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALL_SIDE = 64
_MODES = {1: "L", 3: "RGB"}
_WHITE_16 = 2**16 - 1
MOST_VALUES = 2**27
"""Of one sample that a file declares: half a GiB in float32."""
_KEYS = Literal["input_ids", "attention_mask", "token_type_ids"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]


def default_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation where none are known: ImageNet's for three channels, 0.5 for others."""
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels,) * 2


@dataclass(frozen=True)
class ImagePreprocessing:
    """Images of any size → float32 (C, H, W): upright, resized, cropped in the middle, scaled to [0, 1], normalised.

    The steps are those of timm's evaluation, done by Pillow alone.

    Attributes:
        size: C, H and W as the model takes them.
        mean, std: per channel; ImageNet's (or 0.5 for other than three channels) where none are known.
        crop_pct: what share of the resized image the crop keeps, along each side; by default 0.875 of sides above 64 pixels,
            and all of smaller ones.
        interpolation: of resizing, by Pillow's name.
        crop_mode: ``"center"`` resizes the shorter side and crops the longer one, ``"squash"`` resizes both whatever their
            ratio, ``"border"`` resizes the longer side and fills up the shorter one with ``mean``.
    """

    size: tuple[Count, Count, Count]
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    crop_pct: Positive | None = None
    interpolation: Interpolation = "bilinear"
    crop_mode: CropMode = "center"

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, model: nn.Module) -> ImagePreprocessing | None:
        """What the model's library says of it; None where nothing tells the size of an image."""
        try:
            size = tuple(example_for(model).tensors[0].shape[1:])
        except ExitkitError:
            return None
        if len(size) != 3:
            return None
        config = getattr(model, "pretrained_cfg", None) or getattr(
            getattr(model, "config", None), "pretrained_cfg", None
        )
        given = config if isinstance(config, dict) else {}
        normal = default_statistics(size[0])
        if len(given.get("mean") or ()) == len(given.get("std") or ()) == size[0]:
            normal = (tuple(given["mean"]), tuple(given["std"]))
        if not given:
            return cls(size, *normal)
        # what timm does where a configuration does not say
        by = given.get("interpolation") if given.get("interpolation") in get_args(Interpolation) else "bicubic"
        return cls(size, *normal, given.get("crop_pct") or 0.875, by, given.get("crop_mode") or "center")  # type: ignore[arg-type]

    @property
    def black(self) -> tuple[float, ...]:
        """A black pixel, normalised, per channel."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))

    def transform(self, image: Any, *, whole: bool = False) -> Tensor:
        """One PIL image, uint8 array (H, W) or (H, W, C), or uint8 tensor (C, H, W) → float32 (C, H, W).

        ``whole`` leaves it as large as it is, neither resized nor cropped, for a random crop to follow.

        Raises:
            ArgumentError: other values than of 8 or 16 bits, a ratio of sides that no memory holds, or a model of other than
                one or three channels.
        """
        channels = self.size[0]
        if channels not in _MODES:
            raise ArgumentError(
                f"size={self.size}: the model takes {channels} channels, and images have 1 (grey) or 3 (RGB); make its inputs "
                "yourself, and call the engine on tensors"
            )
        image = upright(image).convert(_MODES[channels])
        image = image if whole else self._cropped(self._resized(image))
        pixels = (
            torch.from_numpy(np.array(image)).view(image.height, image.width, channels).permute(2, 0, 1).float() / 255
        )
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized(self, image: Any) -> Any:
        from PIL import Image

        crop = self.crop_pct or (0.875 if max(self.size[1:]) > _SMALL_SIDE else 1.0)
        height, width = (math.floor(side / crop) for side in self.size[1:])
        sides: tuple[float, float] = (width, height)
        if self.crop_mode != "squash":
            narrow = image.width / width < image.height / height
            if narrow == (self.crop_mode == "center"):
                sides = (width, width * image.height / image.width)
            else:
                sides = (height * image.width / image.height, height)
        whole = (
            int if self.crop_mode == "center" and width == height else round
        )  # as torchvision's and timm's own resize
        sides = (max(whole(sides[0]), 1), max(whole(sides[1]), 1))
        if sides[0] * sides[1] > MOST_VALUES:
            raise ArgumentError(
                f"an image of {image.width} x {image.height} pixels would be resized to {sides[0]} x {sides[1]}; crop it first"
            )
        return image.resize(sides, Image.Resampling[self.interpolation.upper()])

    def _cropped(self, image: Any) -> Any:
        """The middle; what lies outside of the image is of the mean colour with borders, black without."""
        from PIL import Image

        height, width = self.size[1:]
        colour = tuple(round(255 * mean) if self.crop_mode == "border" else 0 for mean in self.mean)
        canvas = Image.new(image.mode, (width, height), colour[0] if len(colour) == 1 else colour)
        left, top = (
            round(room / 2) if room > 0 else -(-room // 2) for room in (image.width - width, image.height - height)
        )
        canvas.paste(image, (-left, -top))
        return canvas

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """PIL images → (N, C, H, W)."""
        return torch.stack([self.transform(image) for image in images])


def upright(image: Any) -> Any:
    """A PIL image (or a uint8 array or tensor as one), turned as its EXIF data ask, and of 8 bits a channel.

    16 bits are scaled: 65,535 is white.

    Raises:
        ArgumentError: something else, or values beyond 16 bits, of which nothing says what is white.
    """
    from PIL import Image, ImageOps

    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).cpu().numpy() if image.dim() == 3 else image.cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = Image.fromarray(image.squeeze(-1) if image.shape[2:] == (1,) else image)
    if not isinstance(image, Image.Image):
        kind = getattr(image, "dtype", type(image).__name__)
        raise ArgumentError(f"image is {kind}; give a PIL image, or a uint8 array (H, W) or (H, W, C)")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > _WHITE_16:
            raise ArgumentError(
                f"image is of mode {image.mode!r}, which does not say what value is white; save it with 8 or 16 bits a channel"
            )
        image = Image.fromarray((values * (255 / _WHITE_16)).round().astype(np.uint8))
    return image.convert("RGBA") if "transparency" in image.info else image


@dataclass(frozen=True)
class TextPreprocessing:
    """Texts → token ids and mask, padded to the longest.

    Attributes:
        tokenizer: a fast tokenizer's own JSON, which the ``tokenizers`` library reads.
        pad: the padding token and its id.
        longest: tokens after which a text is cut.
        keys: names of the tensors that the model takes, of ``input_ids``, ``attention_mask`` and ``token_type_ids``.
    """

    tokenizer: str
    pad: tuple[str, Index]
    longest: Count
    keys: tuple[_KEYS, ...]

    @classmethod
    def of(
        cls, tokenizer: Any, keys: Sequence[str], max_length: int | None = None, model: nn.Module | None = None
    ) -> TextPreprocessing:
        """A Hugging Face fast tokenizer's.

        Args:
            tokenizer: the tokenizer.
            keys: names of the tensors that the model takes.
            max_length: tokens after which a text is cut; by default as many as the tokenizer and the model take.
            model: which shall read the tokens.

        Raises:
            ExitkitError: not a fast tokenizer, one that cannot pad, or more tokens than the model has positions.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or tokenizer.pad_token is None:
            raise ArgumentError(
                f"tokenizer is a {type(tokenizer).__name__} without a fast backend or a padding token; give "
                "transformers.AutoTokenizer.from_pretrained(...), its pad_token set"
            )
        longest = longest_text(tokenizer, model, max_length)
        return cls(backend.to_str(), (tokenizer.pad_token, tokenizer.pad_token_id), longest, tuple(keys))  # type: ignore[arg-type]

    @cached_property
    def _encoder(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ExitkitError(f"texts need the tokenizers library: pip install tokenizers ({error})") from error
        try:
            encoder = Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # the library raises plain Exception
            raise FileError(f"the tokenizer cannot be read: {str(error)[:200]}; export the package again") from error
        encoder.enable_padding(pad_id=self.pad[1], pad_token=self.pad[0])
        encoder.enable_truncation(self.longest)
        return encoder

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> tuple[dict[str, Tensor], list[bool]]:
        """Texts, or pairs of them → int64 tensors (N, T), and whether each of them was cut."""
        encoded = self._encoder.encode_batch(list(texts))
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        tensors: dict[str, Tensor] = {
            key: torch.tensor([getattr(text, columns[key]) for text in encoded], dtype=torch.int64)
            for key in self.keys
        }
        return tensors, [bool(text.overflowing) for text in encoded]

    def __call__(self, texts: Sequence[str | tuple[str, str]]) -> dict[str, Tensor]:
        """Texts, or pairs of them → int64 tensors (N, T); a warning says how many were cut."""
        tensors, cut = self.encode(texts)
        if any(cut):
            warnings.warn(f"{sum(cut)} of {len(texts)} texts were cut at {self.longest} tokens", stacklevel=2)
        return tensors


Preprocessing = ImagePreprocessing | TextPreprocessing


def preprocessing_to_json(preprocessing: Preprocessing | None) -> dict[str, Any] | None:
    """Plain data, from which :func:`preprocessing_from_json` makes it again."""
    if preprocessing is None:
        return None
    kind = "image" if isinstance(preprocessing, ImagePreprocessing) else "text"
    return {"kind": kind, **asdict(preprocessing)}


def preprocessing_from_json(data: dict[str, Any] | None) -> Preprocessing | None:
    """The inverse of :func:`preprocessing_to_json`.

    Raises:
        FileError: another kind, missing or unknown entries, or values that no preprocessing has.
    """
    if data is None:
        return None
    source, rest = "the package's preprocessing", {key: value for key, value in data.items() if key != "kind"}
    if data.get("kind") == "text":
        return build(TextPreprocessing, rest, source)
    if data.get("kind") != "image":
        raise FileError(f"{source} is of kind {str(data.get('kind'))[:40]!r}; it must be 'image' or 'text'")
    later = {one.name: one.default for one in fields(ImagePreprocessing) if one.default is not MISSING}
    made = build(
        ImagePreprocessing, later | rest, source
    )  # packages older than these fields were made with the defaults
    if math.prod(made.size) > MOST_VALUES or not len(made.mean) == len(made.std) == made.size[0]:
        raise FileError(f"{source} is damaged: size {made.size}, {len(made.mean)} means, {len(made.std)} deviations")
    return made
