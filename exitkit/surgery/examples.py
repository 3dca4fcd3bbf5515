"""Example inputs inferred from the model: torchvision, timm and Hugging Face say what they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exitkit.errors import ExitkitError
from exitkit.surgery.calls import Example

_BATCH = 2
_TEXT_LENGTH = 16


def example_for(model: nn.Module, example_inputs: Any = None) -> Example:
    """``example_inputs`` as an :class:`Example`, or one inferred from what the model declares.

    Raises:
        ExitkitError: nothing was given and the model declares no input size.
    """
    batch = example_inputs if example_inputs is not None else _infer(model)
    if batch is None:
        raise ExitkitError(
            f"example_inputs=None, and {type(model).__name__} does not declare what it takes (only torchvision, timm "
            "and Hugging Face models do); pass example_inputs=torch.randn(2, 3, 224, 224), or a dict of tensors"
        )
    example = Example.of(batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = Example(example.spec, tuple(tensor.to(device) for tensor in example.tensors))
    return example if len(example.tensors[0]) > 1 else example.with_batch(_BATCH)


def _infer(model: nn.Module) -> Any:
    size = _image_size(model)
    if size is not None:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return torch.randn(_BATCH, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "input_ids" and config is not None:
        return _token_batch(config)
    return None


def _image_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) as the model's own library declares it."""
    module = type(model).__module__
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values" and config is not None:
        side = getattr(config, "image_size", None) or 224
        height, width = side if isinstance(side, tuple | list) else (side, side)
        return getattr(config, "num_channels", 3), height, width
    if isinstance(cfg := getattr(model, "pretrained_cfg", None), dict) and "input_size" in cfg:
        channels, height, width = cfg["input_size"]
        patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return (_channels(model) or channels, *(patches or (height, width)))
    if module.startswith(("torchvision.models", "exitkit.models")):
        # Inception v3's auxiliary head fixes 299; everything else in torchvision takes 224 or says image_size.
        side = getattr(model, "image_size", 299 if type(model).__name__ == "Inception3" else 224)
        return _channels(model) or 3, side, side
    return None


def _channels(model: nn.Module) -> int | None:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)


def _token_batch(config: Any) -> dict[str, Tensor]:
    """Random token ids, the second row padded, as every Hugging Face text classifier accepts them."""
    pad = getattr(config, "pad_token_id", None) or 0
    length = min(_TEXT_LENGTH, getattr(config, "max_position_embeddings", _TEXT_LENGTH) or _TEXT_LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (_BATCH, length), generator=generator)
    ids[ids == pad] = (pad + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, length * 2 // 3 :] = 0
    return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
