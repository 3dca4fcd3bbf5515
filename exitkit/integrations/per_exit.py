"""What the trainers of all libraries are told of each exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel


def exit_metrics(logits: Sequence[Any], labels: Any) -> dict[str, float]:
    """``accuracy``, the backbone's, and ``accuracy_exit_0``, …; of a regression ``error`` and ``error_exit_0``, mean squares.

    Args:
        logits: one tensor or array (N, C) per exit, the backbone's last.
        labels: (N,) class indices, or values where C is 1.
    """
    targets = torch.as_tensor(labels).flatten()
    answers = [torch.as_tensor(part) for part in logits]
    names = [*(f"_exit_{m}" for m in range(len(answers) - 1)), ""]
    if answers[-1].shape[-1] == 1:
        errors = [(answer[:, 0] - targets).float().square().mean() for answer in answers]
        return {f"error{name}": float(error) for name, error in zip(names, errors, strict=True)}
    right = [(answer.argmax(-1) == targets).float().mean() for answer in answers]
    return {f"accuracy{name}": float(share) for name, share in zip(names, right, strict=True)}


def keep_frozen(model: MultiExitModel) -> None:
    """A backbone of which nothing learns stays in evaluation mode: no dropout, and BatchNorm's statistics stand still."""
    if not any(parameter.requires_grad for parameter in model.backbone.parameters()):
        model.backbone.eval()


def checked_model(model: Any) -> MultiExitModel:
    """The model, which must have exits.

    Raises:
        ArgumentError: it has none.
    """
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(f"model is {type(model).__name__}; give what exitkit.attach(model) returns")
    return model
