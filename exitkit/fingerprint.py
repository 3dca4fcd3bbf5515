"""What a backbone is: its parameters by name and shape, and a digest of their values."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLES = 64


def parameter_lines(backbone: nn.Module) -> list[str]:
    """One line per parameter: its name and shape."""
    return [f"parameter {name} {shape_text(parameter.shape)}" for name, parameter in backbone.named_parameters()]


def weights_digest(backbone: nn.Module) -> str:
    """A digest of evenly spread values of every parameter, so that other weights in the same shapes are noticed.

    Cheap at any size: 64 values of each parameter, compared as float32.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        for parameter in backbone.parameters():
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLES)]
            digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def shape_text(shape: tuple[int, ...]) -> str:
    """``64×3×7×7``; ``scalar`` for no dimensions."""
    return "×".join(map(str, shape)) or "scalar"
