"""Every exit's loss and error on fixed samples, for a model or for other weights in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from exitkit.analysis.measurement import Array
from exitkit.analysis.samples import Batch, size_of
from exitkit.common.batches import UNLABELLED, check_training_labels, move
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.multi_exit.output import MultiExitOutput
from exitkit.surgery.inputs import as_call
from exitkit.training.gradients import objective_weights
from exitkit.training.losses import Loss
from exitkit.training.objective import Objective


@dataclass(frozen=True)
class Scores:
    """What a model does on the samples.

    Attributes:
        loss: (M+1,) mean cross-entropy (squared error for regression) of every exit's head, the backbone's last, over the
            samples with a label.
        objective: their weighted sum or mean.
        error: (M+1,) share of answers after the ensemble that are not the label, or the likeliest class of soft labels; mean
            absolute error for regression.
    """

    loss: Array
    objective: float
    error: Array


@dataclass(frozen=True)
class Evaluation:
    """Samples to evaluate on, and the objective.

    Attributes:
        batches: inputs and labels; those without a label count for BatchNorm's statistics alone.
        samples: how many have a label.
        weights: (M+1,) what each exit's loss is multiplied by in the objective.
        reduction, label_smoothing: of :class:`Loss`; the first is in the weights already.
    """

    batches: Sequence[Batch]
    samples: int
    weights: tuple[float, ...]
    reduction: str
    label_smoothing: float

    @classmethod
    def of(cls, model: MultiExitModel, batches: Sequence[Batch], loss: Loss | None) -> Evaluation:
        """For a model on its device; labels are checked: any that training takes.

        Raises:
            ArgumentError: labels out of range, of another number than the inputs, or none at all.
        """
        device = next(model.parameters()).device
        chosen = Loss() if loss is None else loss
        objective = Objective(chosen, len(model.classifiers))
        weights = chosen.weights_at(1.0, [boundary.share for boundary in model.boundaries])
        placed = [
            (move(inputs, device), check_training_labels(labels, model.num_classes, size_of(inputs)).to(device))
            for inputs, labels in batches
        ]
        samples = sum(int(_labelled(labels, model.num_classes).sum()) for _, labels in placed)
        if not samples:
            raise ArgumentError(
                "loader: all labels read are -1, which says that a sample has none, and a loss needs some; give labelled "
                "samples, or raise samples="
            )
        scaled = objective_weights(objective, weights)
        return cls(placed, samples, scaled, chosen.reduction, chosen.label_smoothing)

    def settings(self) -> dict[str, Any]:
        """What results say of the objective and of the samples."""
        return {
            "samples": self.samples,
            "weights": np.array(self.weights, dtype=np.float64),
            "reduction": self.reduction,
            "label_smoothing": float(self.label_smoothing),
        }

    def scores(self, model: MultiExitModel, state: Mapping[str, Tensor] | None = None) -> Scores:
        """One pass, without gradients and in the mode that the model is in; ``state`` stands in for its own tensors."""
        loss = error = np.zeros(len(model.exits))
        with torch.no_grad():
            for inputs, labels in self.batches:
                args, kwargs = as_call(inputs)
                own: MultiExitOutput = (
                    model(*args, **kwargs) if state is None else functional_call(model, dict(state), args, kwargs)
                )
                assert labels is not None
                loss = loss + np.array([self._loss(logits, labels) for logits in own.heads])
                error = error + np.array([_wrong(answer, labels) for answer in own.logits])
        loss, error = loss / self.samples, error / self.samples
        return Scores(loss, float(np.dot(self.weights, loss)), error)

    def _loss(self, logits: Tensor, labels: Tensor) -> float:
        if logits.shape[1] == 1:
            return float(F.mse_loss(logits[:, 0].double(), labels.double(), reduction="sum"))
        targets = labels.double() if labels.dim() > 1 else labels
        smoothing = self.label_smoothing
        return float(
            F.cross_entropy(
                logits.double(), targets, ignore_index=UNLABELLED, reduction="sum", label_smoothing=smoothing
            )
        )


def _labelled(labels: Tensor, num_classes: int) -> Tensor:
    """(B,) whether each sample has a label: all soft ones do, and all values of a regression."""
    if num_classes == 1 or labels.dim() > 1:
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    return labels != UNLABELLED


def _wrong(answer: Tensor, labels: Tensor) -> float:
    if answer.shape[1] == 1:
        return float((answer[:, 0].double() - labels.double()).abs().sum())
    classes = labels.argmax(-1) if labels.dim() > 1 else labels
    return float(((answer.argmax(-1) != classes) & _labelled(labels, answer.shape[1])).sum())


def objective_in_words(weights: Array, reduction: str, label_smoothing: float) -> str:
    """For the note under a picture; empty for a result that was saved before it was kept."""
    if not len(weights):
        return ""
    alike = f"{weights[0]:.3g} each" if (weights == weights[0]).all() else ", ".join(f"{one:.3g}" for one in weights)
    smoothed = f", label smoothing {label_smoothing:g}" if label_smoothing else ""
    return f"objective: Σ α·loss (reduction {reduction}), α {alike}{smoothed}"
