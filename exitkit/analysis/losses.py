"""Every exit's loss and error on fixed samples, for a model or for other weights in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from exitkit.analysis.measurement import Array
from exitkit.analysis.samples import Batch, size_of
from exitkit.common.batches import check_labels, move
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
        loss: (M+1,) mean cross-entropy (squared error for regression) of every exit's head, the backbone's last.
        objective: their weighted sum or mean.
        error: (M+1,) share of wrong answers after the ensemble; mean absolute error for regression.
    """

    loss: Array
    objective: float
    error: Array


@dataclass(frozen=True)
class Evaluation:
    """Samples to evaluate on, and the weights of the exits' losses (M+1,) in the objective."""

    batches: Sequence[Batch]
    weights: tuple[float, ...]
    label_smoothing: float

    @classmethod
    def of(cls, model: MultiExitModel, batches: Sequence[Batch], loss: Loss | None) -> Evaluation:
        """For a model on its device; labels are checked.

        Raises:
            ArgumentError: labels out of range, or of another number than the inputs.
        """
        device = next(model.parameters()).device
        chosen = Loss() if loss is None else loss
        objective = Objective(chosen, len(model.classifiers))
        weights = chosen.weights_at(1.0, [boundary.share for boundary in model.boundaries])
        placed = [
            (move(inputs, device), check_labels(labels, model.num_classes, size_of(inputs)).to(device))
            for inputs, labels in batches
        ]
        return cls(placed, objective_weights(objective, weights), chosen.label_smoothing)

    def scores(self, model: MultiExitModel, state: Mapping[str, Tensor] | None = None) -> Scores:
        """One pass, without gradients and in the mode that the model is in; ``state`` stands in for its own tensors."""
        loss = error = np.zeros(len(model.exits))
        samples = 0
        with torch.no_grad():
            for inputs, labels in self.batches:
                args, kwargs = as_call(inputs)
                own: MultiExitOutput = (
                    model(*args, **kwargs) if state is None else functional_call(model, dict(state), args, kwargs)
                )
                assert labels is not None
                loss = loss + np.array([self._loss(logits, labels) for logits in own.heads])
                error = error + np.array([_wrong(answer, labels) for answer in own.logits])
                samples += len(labels)
        loss, error = loss / samples, error / samples
        return Scores(loss, float(np.dot(self.weights, loss)), error)

    def _loss(self, logits: Tensor, labels: Tensor) -> float:
        if logits.shape[1] == 1:
            return float(F.mse_loss(logits[:, 0].double(), labels.double(), reduction="sum"))
        return float(F.cross_entropy(logits.double(), labels, reduction="sum", label_smoothing=self.label_smoothing))


def _wrong(answer: Tensor, labels: Tensor) -> float:
    if answer.shape[1] == 1:
        return float((answer[:, 0].double() - labels.double()).abs().sum())
    return float((answer.argmax(-1) != labels).sum())
