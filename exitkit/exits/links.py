"""Links: what an internal classifier takes over from the one before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CascadeLink(nn.Module):
    """The previous exit's logits, detached and layer-normalised, beside the features (Zero Time Waste, equation 1).

    (B, D) and (B, C) → (B, D + C). The gradient stops here: a later exit must not bend an earlier one. With ``detach=False``
    it goes on (the ablation of appendix C.3). A regression's single number is handed on as it is: normalised it would be 0.
    """

    def __init__(self, num_classes: int, detach: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_classes) if num_classes > 1 else nn.Identity()
        self.detach = detach

    def forward(self, vector: Tensor, previous: Tensor) -> Tensor:
        return torch.cat([vector, self.norm(previous.detach() if self.detach else previous)], dim=1)
