"""Criteria: how sure an exit is. A sample leaves at the first exit whose score is strictly above τ.

Confidence, certainty and margin lie in [0, 1], so that τ > 1 gives the original model; nats lie in [−ln C, 0], so that
τ > 0 does; patience counts exits. Regression has tolerance, at most 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from exitkit.common.errors import unknown_name

Criterion = Literal["confidence", "entropy", "nats", "margin", "patience", "tolerance"]


def confidence(log_probs: Tensor) -> Tensor:
    """Probability of the most likely class (Zero Time Waste, equation 3): (..., C) → (...)."""
    return log_probs.amax(-1).exp().clamp(max=1)


def nats(log_probs: Tensor) -> Tensor:
    """Minus the entropy, in nats: (..., C) → (...).

    Leaving at an entropy below T, as BranchyNet, DeeBERT and gpf's authors do, is τ = −T.
    """
    probabilities = log_probs.exp()
    return torch.where(probabilities > 0, probabilities * log_probs, 0).sum(-1).clamp(max=0)


def entropy(log_probs: Tensor) -> Tensor:
    """Certainty 1 − H / ln C, in [0, 1] whatever the number of classes: (..., C) → (...)."""
    return (1 + nats(log_probs) / math.log(max(log_probs.shape[-1], 2))).clamp(0, 1)


def margin(log_probs: Tensor) -> Tensor:
    """Probability of the first class minus that of the second: (..., C) → (...)."""
    best = log_probs.topk(2, dim=-1).values.exp()
    return best[..., 0] - best[..., 1]


def patience(log_probs: Tensor) -> Tensor:
    """How many exits in a row, this one included, gave the same answer: (N, M+1, C) → (N, M+1).

    Leaving above τ = t means that t exits before this one agreed with it (Zhou et al. 2020; Zero Time Waste, section 4).
    """
    answers = log_probs.argmax(-1)
    counts = torch.ones_like(answers)
    for exit_ in range(1, answers.shape[1]):
        agrees = answers[:, exit_] == answers[:, exit_ - 1]
        counts[:, exit_] = torch.where(agrees, counts[:, exit_ - 1] + 1, 1)
    return counts.to(log_probs.dtype)


def tolerance(predictions: Tensor, times: int = 1) -> Tensor:
    """Minus the largest of the last ``times`` changes |y_m − y_(m−1)|, for regression: (N, M+1) → (N, M+1).

    Leaving above τ = −a is leaving once ``times`` changes in a row were smaller than a (Zhou et al. 2020, section 3.3). An
    exit with fewer before it scores the lowest finite number.
    """
    scores = torch.full_like(predictions, torch.finfo(predictions.dtype).min)
    if predictions.shape[1] > times:
        scores[:, times:] = -predictions.diff(dim=1).abs().unfold(1, times, 1).amax(-1)
    return scores


CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": confidence,
    "entropy": entropy,
    "nats": nats,
    "margin": margin,
    "patience": patience,
}
"""Those of classification, which take log-probabilities."""


def scores(log_probs: Tensor, criterion: str) -> Tensor:
    """Scores (N, M+1) of every exit from normalised log-probabilities (N, M+1, C).

    Raises:
        ExitkitError: unknown criterion.
    """
    if criterion not in CRITERIA:
        raise unknown_name("criterion", criterion, CRITERIA)
    return CRITERIA[criterion](log_probs)
