"""From a feature to a vector: SDN pooling for maps, the backbone's own read-out for tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POOLED = 4


class SDNPool(nn.Module):
    """γ · average pooling + (1 − γ) · max pooling to 4 × 4, with γ learned (Zero Time Waste, appendix A.1).

    Maps (B, C, H, W) smaller than 4 in a dimension keep their size in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, maps: Tensor) -> Tensor:
        return self.mix(*two_pools(maps))

    def mix(self, average: Tensor, maximum: Tensor) -> Tensor:
        """What is learned: γ, between the two poolings (B, C, 4, 4)."""
        return torch.lerp(maximum, average, self.gamma)


def two_pools(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Average and maximum (B, C, 4, 4) of maps, which :class:`SDNPool` mixes; neither has a parameter."""
    height, width = maps.shape[-2:]
    size = pooled_size(height, width)
    if height % size[0] or width % size[1]:
        return F.adaptive_avg_pool2d(maps, size), F.adaptive_max_pool2d(maps, size)
    window = (
        height // size[0],
        width // size[1],
    )  # pools of fixed windows are the faster ones, in every memory format
    return F.avg_pool2d(maps, window), F.max_pool2d(maps, window)


def pooled_size(height: int, width: int) -> tuple[int, int]:
    """Height and width after :class:`SDNPool`."""
    return min(height, POOLED), min(width, POOLED)


ReadoutKind = Literal["first", "last", "mean", "masked_mean"]


class TokenPool(nn.Module):
    """(B, T, D) → (B, D): one token, the mean of all but ``skip`` leading ones, or the mean under a mask (B, T).

    The one token is the first (class) token, or the last, which with a mask is the last that the mask keeps.

    With ``channels_first`` the input is (B, D, T), as one-dimensional convolutions give it.
    """

    def __init__(self, kind: ReadoutKind, skip: int = 0, channels_first: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.skip = skip
        self.channels_first = channels_first

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.channels_first:
            tokens = tokens.transpose(1, 2)
        if self.kind == "first":
            return tokens[:, 0]
        if self.kind == "last":
            if mask is None:
                return tokens[:, -1]
            places = torch.arange(tokens.shape[1], device=tokens.device)
            return tokens[torch.arange(tokens.shape[0], device=tokens.device), (places * (mask != 0)).argmax(1)]
        if self.kind == "masked_mean" and mask is not None:
            weights = mask.to(tokens.dtype).unsqueeze(-1)
            return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
        return tokens[:, self.skip :].mean(1)

    def extra_repr(self) -> str:
        return f"{self.kind!r}, skip={self.skip}"
