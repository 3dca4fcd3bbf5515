"""Legal actions: of a policy whose environment allows some actions alone, the others have probability 0 at every exit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LegalActions(nn.Module):
    """A policy (observation → logits) as one of two inputs: observation, and a mask (B, A) that is not 0 for legal actions.

    Exits that are attached to it read the mask too, so that what is not legal is out of reach before an answer is combined,
    scored, or taken.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor, legal: Tensor) -> Tensor:
        return without_illegal(self.policy(observation), legal)


def without_illegal(logits: Tensor, legal: Tensor) -> Tensor:
    """Logits (B, A), those of illegal actions so low that their probability is exactly 0.

    Not −∞, whose product with a teacher's probability of 0 would be NaN.
    """
    return logits.masked_fill(legal == 0, _lowest(logits.dtype))


def legal_in(logits: Tensor) -> Tensor:
    """The mask that :func:`without_illegal` was given."""
    return logits > _lowest(logits.dtype) / 2


def _lowest(dtype: torch.dtype) -> float:
    return max(-1e9, torch.finfo(dtype).min / 2)
