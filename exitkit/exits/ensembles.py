"""Combiners: one answer from the predictions of several exits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SMALL_PRIOR = 0.01


class GeometricEnsemble(nn.Module):
    """q = (1/Z) · b · Π_j p_j^(w_j), one weight per member and one prior per class, both positive (ZTW, equation 2).

    Log-probabilities (B, members, C) → log q (B, C). Positive by construction: w and b are stored as logarithms.
    """

    def __init__(self, members: int, num_classes: int) -> None:
        super().__init__()
        self.log_weights = nn.Parameter(torch.full((members,), -math.log(members)))
        self.log_prior = nn.Parameter(torch.zeros(num_classes))

    def forward(self, log_probs: Tensor) -> Tensor:
        # A class that a member rules out has log-probability -inf, whose product with a gradient of 0 would be NaN.
        finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min / 1e6)
        product = torch.einsum("bmc,m->bc", finite, self.log_weights.to(log_probs).exp())
        return F.log_softmax(product + self.log_prior.to(log_probs), dim=-1)


class AdditiveEnsemble(nn.Module):
    """q = (1/Z) · (Σ_j w_j p_j + b), one weight per member and one prior per class, both positive (ZTW, equation 4).

    Log-probabilities (B, members, C) → log q (B, C).
    """

    def __init__(self, members: int, num_classes: int) -> None:
        super().__init__()
        self.log_weights = nn.Parameter(torch.full((members,), -math.log(members)))
        self.log_prior = nn.Parameter(torch.full((num_classes,), math.log(_SMALL_PRIOR)))

    def forward(self, log_probs: Tensor) -> Tensor:
        mixture = (
            torch.einsum("bmc,m->bc", log_probs.exp(), self.log_weights.to(log_probs).exp())
            + self.log_prior.to(log_probs).exp()
        )
        return mixture.log() - mixture.sum(-1, keepdim=True).log()


class MeanEnsemble(nn.Module):
    """q = (1/m) · Σ_j p_j, the mean of all exits so far: the anytime mode of Phuong & Lampert (2019), section 3.2.

    Log-probabilities (B, members, C) → log q (B, C). Nothing in it is fitted.
    """

    def __init__(self, members: int, num_classes: int) -> None:
        super().__init__()

    def forward(self, log_probs: Tensor) -> Tensor:
        return log_probs.logsumexp(1) - math.log(log_probs.shape[1])


COMBINERS: dict[str, type[GeometricEnsemble] | type[AdditiveEnsemble] | type[MeanEnsemble]] = {
    "geometric": GeometricEnsemble,
    "additive": AdditiveEnsemble,
    "mean": MeanEnsemble,
}
