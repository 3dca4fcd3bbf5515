"""From images and texts to what a model takes, as plain data that a package can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exitkit.common.checks import Count, Index, Positive
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.common.schema import build
from exitkit.common.torchvision_guard import import_torchvision
from exitkit.surgery.default_inputs import example_for

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALL_SIDE = 64
MOST_VALUES = 2**27
"""Of one sample that a file declares: half a GiB in float32."""
_KEYS = Literal["input_ids", "attention_mask", "token_type_ids"]


@dataclass(frozen=True)
class ImagePreprocessing:
    """Images of any size → float32 (C, H, W): resized, cropped in the middle, scaled to [0, 1], normalised.

    Attributes:
        size: C, H and W as the model takes them.
        mean, std: per channel; ImageNet's (or 0.5 for other than three channels) where none are known.
    """

    size: tuple[Count, Count, Count]
    mean: tuple[float, ...]
    std: tuple[Positive, ...]

    @classmethod
    def of(cls, model: nn.Module) -> ImagePreprocessing | None:
        """What the model's library says of it; None where nothing tells the size of an image."""
        config = getattr(model, "pretrained_cfg", None)
        mean, std = (config.get("mean"), config.get("std")) if isinstance(config, dict) else (None, None)
        try:
            size = tuple(example_for(model).tensors[0].shape[1:])
        except ExitkitError:
            return None
        if len(size) != 3:
            return None
        centre, spread = (IMAGENET_MEAN, IMAGENET_STD) if size[0] == 3 else ((0.5,) * size[0],) * 2
        return cls(size, tuple(mean or centre), tuple(std or spread))

    @property
    def black(self) -> tuple[float, ...]:
        """A black pixel, normalised, per channel."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))

    @cached_property
    def transform(self) -> Any:
        """As a torchvision transform of one PIL image, array or tensor."""
        v2 = import_torchvision("transforms.v2", "images")
        side = max(self.size[1:])
        steps = [v2.ToImage(), v2.RGB() if self.size[0] == 3 else v2.Grayscale()]
        steps += [v2.Resize(round(side * 8 / 7) if side > _SMALL_SIDE else side), v2.CenterCrop(self.size[1:])]
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)])

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """PIL images → (N, C, H, W)."""
        return torch.stack([self.transform(image) for image in images])


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
    def of(cls, tokenizer: Any, keys: Sequence[str], longest: int = 128) -> TextPreprocessing:
        """A Hugging Face fast tokenizer's.

        Raises:
            ExitkitError: not a fast tokenizer, or one that cannot pad.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or tokenizer.pad_token is None:
            raise ArgumentError(
                f"tokenizer is a {type(tokenizer).__name__} without a fast backend or a padding token; give "
                "transformers.AutoTokenizer.from_pretrained(...), its pad_token set"
            )
        return cls(backend.to_str(), (tokenizer.pad_token, tokenizer.pad_token_id), longest, tuple(keys))  # type: ignore[arg-type]

    @cached_property
    def _encoder(self) -> Any:
        from tokenizers import Tokenizer

        try:
            encoder = Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # the library raises plain Exception
            raise FileError(f"the tokenizer cannot be read: {str(error)[:200]}; export the package again") from error
        encoder.enable_padding(pad_id=self.pad[1], pad_token=self.pad[0])
        encoder.enable_truncation(self.longest)
        return encoder

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts → int64 tensors (N, T)."""
        encoded = self._encoder.encode_batch(list(texts))
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {key: torch.tensor([getattr(text, columns[key]) for text in encoded]) for key in self.keys}


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
    made = build(ImagePreprocessing, rest, source)
    if math.prod(made.size) > MOST_VALUES or not len(made.mean) == len(made.std) == made.size[0]:
        raise FileError(f"{source} is damaged: size {made.size}, {len(made.mean)} means, {len(made.std)} deviations")
    return made
