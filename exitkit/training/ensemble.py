"""Fitting the combiners: one pass through the network, then full-batch optimisation on cached log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.batches import check_labels, checked, move, split_batch
from exitkit.errors import ExitkitError
from exitkit.model import MultiExitModel
from exitkit.surgery.calls import call_on
from exitkit.surgery.capture import evaluation_mode

_CACHED_FLOATS = 200_000_000
_STEPS = 100
PENALTY = 1e-4


def fit_ensemble(model: MultiExitModel, loader: Iterable[Any]) -> list[float]:
    """Fit every combiner's weights and prior to the labels (Zero Time Waste, algorithm 1), in place.

    Each exit's combiner is trained by itself, by L-BFGS on the log-probabilities of the training set. At most 800 MB
    of them are kept; a larger set contributes its first batches.

    The objective is the cross-entropy plus 0.0001 · Σ_j (log w_j + log m)², which holds the weights near an even mean of
    the m members. Without it they grow without bound where the exits have memorised the training set, and confidences
    become exactly 1, which no threshold can tell apart.

    Returns:
        The cross-entropy of each fitted combiner.
    """
    if not list(model.combiners.parameters()):  # a mean has nothing to fit
        return []
    log_probs, labels = _cache(model, loader)
    return [_fit(combiner, log_probs[:, : m + 1], labels, m) for m, combiner in enumerate(model.combiners)]


def penalty(combiner: nn.Module) -> Tensor:
    """How far a combiner's weights are from an even mean: 0.0001 · Σ_j (log w_j + log m)²."""
    weights = cast("Tensor", combiner.log_weights)
    return PENALTY * (weights + math.log(len(weights))).square().sum()


def _cache(model: MultiExitModel, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    with evaluation_mode(model), torch.no_grad():
        for batch in checked(loader, "train_loader"):
            inputs, batch_labels = split_batch(batch)
            _, heads = call_on(model.run_heads, move(inputs, device))
            kept.append(torch.stack([F.log_softmax(logits.float(), -1) for logits in heads], 1))
            labels.append(check_labels(batch_labels, model.num_classes, len(kept[-1])).to(device))
            if sum(part.numel() for part in kept) > _CACHED_FLOATS:
                break
    return torch.cat(kept), torch.cat(labels)


def _fit(combiner: nn.Module, log_probs: Tensor, labels: Tensor, exit_: int) -> float:
    optimizer = torch.optim.LBFGS(combiner.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.nll_loss(combiner(log_probs), labels) + penalty(combiner)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        final = float(F.nll_loss(combiner(log_probs), labels))
    if not final < float("inf"):
        raise ExitkitError(f"the ensemble of exit {exit_} diverged (cross-entropy {final}); its heads are not trained")
    return final
