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
    size = pooled_size(maps.shape[-2], maps.shape[-1])
    if _in_even_windows(maps, size):
        return _over_windows(maps, size, "mean"), _over_windows(maps, size, "amax")
    return F.adaptive_avg_pool2d(maps, size), F.adaptive_max_pool2d(maps, size)


def _in_even_windows(maps: Tensor, size: tuple[int, int]) -> bool:
    """Whether reducing rows, then columns, gives the same: a third of the time of torch's kernels.

    Not with a gradient, which places of equal value would share here.
    """
    eager = not (torch.compiler.is_compiling() or torch.compiler.is_exporting())
    gradient = torch.is_grad_enabled() and maps.requires_grad
    return (
        eager
        and not gradient
        and maps.is_contiguous()
        and all(n % m == 0 for n, m in zip(maps.shape[-2:], size, strict=True))
    )


def _over_windows(maps: Tensor, size: tuple[int, int], reduction: str) -> Tensor:
    batch, channels, height, width = maps.shape
    rows = maps.view(batch, channels, size[0], height // size[0], width)
    by_row: Tensor = getattr(torch, reduction)(rows, dim=3)
    cells = by_row.view(batch, channels, size[0], size[1], width // size[1])
    reduced: Tensor = getattr(torch, reduction)(cells, dim=4)
    return reduced


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
