"""Memory formats: maps as (B, C, H, W) or, channels last, as (B, H, W, C)."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether maps (B, C, H, W) lie in memory as (B, H, W, C)."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def in_format(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor in that memory format, or plainly contiguous; itself where it is."""
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
