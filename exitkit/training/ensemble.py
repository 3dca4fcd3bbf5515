"""Fitting the combiners: one pass through the network, then full-batch optimisation on cached log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.common.batches import check_training_labels, checked, move, split_batch
from exitkit.common.errors import DivergedError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import evaluation_mode
from exitkit.surgery.inputs import call_on
from exitkit.training.feature_cache.heads_alone import HeadsAlone

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

    Labels may be class probabilities (B, C). Samples without a label are left out; where none has one, the backbone's own
    probabilities stand in.

    Returns:
        The cross-entropy of each fitted combiner.
    """
    return fit_ensemble_on(model, model, loader, lambda part: part)


def fit_ensemble_on(
    model: MultiExitModel, view: MultiExitModel | HeadsAlone, loader: Iterable[Any], gather: Callable[[Any], Any]
) -> list[float]:
    """:func:`fit_ensemble` on a process's part of the data, where ``gather`` brings all parts together.

    ``view`` is what the loader's batches are for: the model, or its heads alone.
    """
    if not list(model.combiners.parameters()):  # a mean has nothing to fit
        return []
    log_probs, targets = _cache(model, view, loader, gather)
    return [_fit(combiner, log_probs[:, : m + 1], targets, m) for m, combiner in enumerate(model.combiners)]


def penalty(combiner: nn.Module) -> Tensor:
    """How far a combiner's weights are from an even mean: 0.0001 · Σ_j (log w_j + log m)²."""
    weights = cast("Tensor", combiner.log_weights)
    return PENALTY * (weights + math.log(len(weights))).square().sum()


def _cache(
    model: MultiExitModel, view: MultiExitModel | HeadsAlone, loader: Iterable[Any], gather: Callable[[Any], Any]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of every head (N, M + 1, C), and class probabilities to learn (N, C)."""
    device = next(model.parameters()).device
    kept: list[Tensor] = []
    wanted: list[Tensor] = []
    with evaluation_mode(model), torch.no_grad():
        for batch in checked(loader, "train_loader"):
            inputs, labels = split_batch(batch)
            _, heads = call_on(view.run_heads, move(inputs, device))
            log_probs = torch.stack([F.log_softmax(logits.float(), -1) for logits in heads], 1)
            targets = _targets(labels, model.num_classes, len(log_probs)).to(device)
            log_probs, targets = gather((log_probs, targets))
            kept.append(log_probs)
            wanted.append(targets)
            if sum(part.numel() for part in kept) > _CACHED_FLOATS:
                break
    everything, targets = torch.cat(kept), torch.cat(wanted)
    labelled = targets.sum(1) > 0
    if not bool(labelled.any()):
        return everything, everything[:, -1].exp()
    return everything[labelled], targets[labelled]


def _targets(labels: Any, num_classes: int, batch: int) -> Tensor:
    """Labels as probabilities (batch, C); zeros for a sample without one."""
    if labels is None:
        return torch.zeros(batch, num_classes)
    targets = check_training_labels(labels, num_classes, batch)
    if targets.dim() == 2:
        return targets
    return F.one_hot(targets + 1, num_classes + 1)[:, 1:].float()


def _fit(combiner: nn.Module, log_probs: Tensor, targets: Tensor, exit_: int) -> float:
    optimizer = torch.optim.LBFGS(combiner.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(combiner(log_probs), targets) + penalty(combiner)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        final = float(F.cross_entropy(combiner(log_probs), targets))
    if not final < float("inf"):
        raise DivergedError(
            f"the ensemble of exit {exit_} diverged (cross-entropy {final}); its heads are not trained"
        )
    return final
