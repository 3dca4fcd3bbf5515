"""Risks: what leaving early loses on each sample, against the full model or as the user defines it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from exitkit.common.errors import ArgumentError, unknown_name
from exitkit.evaluation.outputs import ExitOutputs

RiskName = Literal["accuracy_drop", "net_accuracy_drop", "disagreement", "brier"]
RiskFunction = Callable[[ExitOutputs], Tensor]


@dataclass(frozen=True)
class Risk:
    """A bounded loss of every sample at every exit.

    Attributes:
        name: what results call it.
        words: its average, in words.
        loss: (N, M+1) from outputs, bool where it can only be 0 or 1; the last column is the full model's.
        lowest: the least value a loss can have; the most is 1.
    """

    name: str
    words: str
    loss: RiskFunction
    lowest: float = 0.0

    def losses(self, outputs: ExitOutputs) -> tuple[NDArray[np.float64], bool]:
        """(N, M+1) losses, scaled from [lowest, 1] to [0, 1], and whether they can be 0 and 1 only (a bool tensor).

        Raises:
            ArgumentError: no labels where they are needed; another shape, NaN or values out of range.
        """
        given = self.loss(outputs)
        if not isinstance(given, Tensor):
            raise ArgumentError(
                f"risk={self.name!r} gave {type(given).__name__}; expected a tensor (samples, exits + 1)"
            )
        values = given.detach().cpu().double()
        expected = tuple(outputs.log_probs.shape[:2])
        if tuple(values.shape) != expected or not bool(((values >= self.lowest) & (values <= 1)).all()):
            raise ArgumentError(
                f"risk={self.name!r} gave losses of shape {tuple(values.shape)} from {values.min():g} to "
                f"{values.max():g}; expected shape {expected} (samples, exits + 1), without NaN, from {self.lowest:g} to 1"
            )
        return ((values - self.lowest) / (1 - self.lowest)).numpy(), given.dtype == torch.bool

    def limit(self, value: float) -> float:
        """A risk on the scale of :meth:`losses`."""
        return (value - self.lowest) / (1 - self.lowest)

    def unscaled(self, loss: float) -> float:
        """Back from the scale of :meth:`losses`."""
        return loss * (1 - self.lowest) + self.lowest


def as_risk(risk: RiskName | RiskFunction) -> Risk:
    """A risk by name, or a function from outputs to losses (N, M+1) in [0, 1].

    Raises:
        ArgumentError: an unknown name.
    """
    if callable(risk):
        name = getattr(risk, "__name__", type(risk).__name__)
        return Risk(name, f"the average {name}", risk)
    if not isinstance(risk, str) or risk not in _RISKS:
        raise unknown_name("risk", risk, _RISKS, "Or give a function from outputs to losses (N, M+1) in [0, 1].")
    return _RISKS[risk]


def _lost(outputs: ExitOutputs) -> Tensor:
    right = outputs.correct
    return right[:, -1:] & ~right


def _net_lost(outputs: ExitOutputs) -> Tensor:
    right = outputs.correct.int()
    return right[:, -1:] - right


def _disagrees(outputs: ExitOutputs) -> Tensor:
    answers = outputs.answers
    return answers != answers[:, -1:]


def _brier_excess(outputs: ExitOutputs) -> Tensor:
    if outputs.labels is None:
        raise ArgumentError("labels=None: risk='brier' needs labels; risk='disagreement' does not")
    chunks, start = [], 0
    for log_probs in outputs.chunks():
        labels = outputs.labels[start : (start := start + len(log_probs))]
        chunks.append((log_probs.exp() - F.one_hot(labels, log_probs.shape[2])[:, None]).square().sum(-1) / 2)
    scores = torch.cat(chunks)
    return (scores - scores[:, -1:]).clamp(0, 1)


_RISKS = {
    risk.name: risk
    for risk in (
        Risk(
            "accuracy_drop",
            "the share of samples that the full model gets right and their exit wrong, and so the drop in accuracy,",
            _lost,
        ),
        Risk("net_accuracy_drop", "the accuracy of the full model less that of the exits", _net_lost, lowest=-1.0),
        Risk("disagreement", "the share of samples whose exit answers otherwise than the full model", _disagrees),
        Risk("brier", "the halved Brier score, where it exceeds the full model's, on average", _brier_excess),
    )
}
