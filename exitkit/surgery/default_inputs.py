"""Example inputs inferred from the model: torchvision, timm and Hugging Face say what they take."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.common.batches import split_batch
from exitkit.common.errors import ArgumentError
from exitkit.surgery.inputs import Example, without_values

_BATCH = 2
_TEXT_LENGTH = 16
_IMAGE_SIDE = 224
_FRAMES, _FRAME_SIDE = 16, 112
"""Of the clips that torchvision trained its video models on; the side is that of its ResNets."""
_ONE_SECOND = 16_000
"""Samples of audio at 16 kHz, the rate that every Hugging Face waveform model is trained at."""


def example_for(model: nn.Module, example_inputs: Any = None) -> Example:
    """``example_inputs`` as an :class:`Example`, without labels among them, or one inferred from what the model declares.

    Raises:
        ExitkitError: nothing was given and the model declares no input size.
    """
    batch = example_inputs if example_inputs is not None else _infer(model)
    if isinstance(batch, Mapping):
        batch, _ = split_batch(batch)
    if batch is None:
        raise ArgumentError(
            f"example_inputs=None, and {type(model).__name__} does not declare what it takes, as torchvision, timm "
            "and Hugging Face models do; pass example_inputs=torch.randn(2, 3, 224, 224), or a dict of tensors"
        )
    example = Example.of(batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for key, tensor in zip(example.spec.keys, example.tensors, strict=True):
        if (mistake := without_values(key, tensor)) and not (tensor.is_meta and device.type == "meta"):
            raise ArgumentError(f"example_inputs: {mistake}")
    example = Example(example.spec, tuple(tensor.to(device) for tensor in example.tensors))
    return example if len(example.tensors[0]) > 1 else example.with_batch(_BATCH)


def _infer(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "input_ids" and config is not None:
        return _token_batch(model, config)
    size = _input_size(model)
    if size is None:
        return None
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.randn(_BATCH, *size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _input_size(model: nn.Module) -> tuple[int, ...] | None:
    """Shape of an image (C, H, W), video (C, T, H, W), spectrogram or waveform, as the model's own library declares it."""
    if getattr(model, "main_input_name", None) is not None and (config := getattr(model, "config", None)) is not None:
        sizes = {
            "pixel_values": _image_size,
            "pixel_values_videos": _image_size,
            "input_values": _audio_size,
            "input_features": _feature_size,
        }
        size_of = sizes.get(str(model.main_input_name))
        return None if size_of is None else size_of(config)
    if isinstance(cfg := getattr(model, "pretrained_cfg", None), dict) and "input_size" in cfg:
        channels, height, width = cfg["input_size"]
        patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return (_channels(model, channels), *(patches or (height, width)))
    if type(model).__module__.startswith("torchvision.models.video"):
        side = _FRAME_SIDE if type(model).__name__ == "VideoResNet" else _IMAGE_SIDE
        return _channels(model, 3), _FRAMES, side, side
    if type(model).__module__.startswith(("torchvision.models", "exitkit.models")):
        # Inception v3's auxiliary head fixes 299; everything else in torchvision takes 224 or says image_size.
        side = getattr(model, "image_size", 299 if type(model).__name__ == "Inception3" else _IMAGE_SIDE)
        return _channels(model, 3), side, side
    return None


def _channels(model: nn.Module, usual: int) -> int:
    """Of the first convolution, unless that reads rearranged pixels (4×4 patches in TResNet, frequencies in CSATv2)."""
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), usual)
    return first if first < 16 * usual else usual


def _image_size(config: Any) -> tuple[int, ...]:
    """Of a Hugging Face image model, or of a video model, whose frames come first.

    CLIP and its kin keep theirs in ``vision_config``, timm's in ``pretrained_cfg``.
    """
    if declared := (getattr(config, "pretrained_cfg", None) or {}).get("input_size"):
        return tuple(declared)
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or _IMAGE_SIDE
    height, width = side if isinstance(side, tuple | list) else (side, side)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    return (*((frames,) if frames else ()), getattr(config, "num_channels", 3), height, width)


def _audio_size(config: Any) -> tuple[int, ...]:
    """``input_values`` are a spectrogram (time, mel bins) for AST, a waveform for wav2vec 2.0 and its kin."""
    if hasattr(config, "num_mel_bins"):
        return config.max_length, config.num_mel_bins
    return (_ONE_SECOND,)


def _feature_size(config: Any) -> tuple[int, ...]:
    """``input_features`` are (mel bins, time) for Whisper, which fixes the time, and (time, features) for others."""
    if hasattr(config, "feature_projection_input_dim"):
        return _ONE_SECOND // 160, config.feature_projection_input_dim
    return config.num_mel_bins, 2 * config.max_source_positions


def _token_batch(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Random token ids, the second row padded, as every Hugging Face text classifier accepts them.

    Each row ends with the end-of-sequence token, where there is one: BART and T5 classify at it. No other special token
    occurs, since some stand for an image.
    """
    text = config.get_text_config()
    pad, end = getattr(text, "pad_token_id", None) or 0, getattr(text, "eos_token_id", None)
    special = [value for key, value in config.to_dict().items() if key.endswith(("token_id", "token_index"))]
    vocabulary = getattr(text, "vocab_size", 256)  # CANINE reads code points and has none
    plain = torch.tensor([token for token in range(vocabulary) if token not in [*special, pad, end]])
    longest = getattr(text, "max_position_embeddings", None) or _TEXT_LENGTH
    length = min(_TEXT_LENGTH, longest) if longest > 0 else _TEXT_LENGTH  # XLNet says -1: no limit
    mask = torch.ones(_BATCH, length, dtype=torch.long)
    mask[1, length * 2 // 3 :] = 0
    chosen = torch.randint(0, len(plain), mask.shape, generator=torch.Generator().manual_seed(0))
    ids = torch.where(mask.bool(), plain[chosen], pad)
    if isinstance(end, int) and end != pad and end < vocabulary:
        ids[torch.arange(_BATCH), mask.sum(1) - 1] = end
    masked = "attention_mask" in signature(model.forward).parameters
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}
