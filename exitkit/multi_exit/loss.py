"""What exits are trained on, where nothing else is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exitkit.common.batches import UNLABELLED, check_training_labels


def summed_loss(heads: Sequence[Tensor], auxiliary: Sequence[Tensor] | None, labels: Any, num_classes: int) -> Tensor:
    """The sum of every head's loss, the backbone's own among them, and of the auxiliary losses; a scalar.

    Args:
        heads: logits (B, C) of every exit, before any ensemble.
        auxiliary: scalars, or None.
        labels: class indices (B,), -1 for none; probabilities (B, C); or values (B,) where C is 1.
        num_classes: C.

    Raises:
        ArgumentError: labels that do not fit.
    """
    targets = check_training_labels(labels, num_classes, len(heads[-1])).to(heads[-1].device)
    losses = [classification(logits.float(), targets) for logits in heads]
    return torch.stack([*losses, *(auxiliary or ())]).sum()


def classification(logits: Tensor, targets: Tensor | None, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the samples with a label, or mean squared error for one output; 0 without any."""
    if targets is None:
        return logits.sum() * 0
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], targets)
    if targets.dim() == 1:
        labelled = targets != UNLABELLED
        if not bool(labelled.any()):
            return logits.sum() * 0
        return F.cross_entropy(logits, targets, ignore_index=UNLABELLED, label_smoothing=label_smoothing)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
