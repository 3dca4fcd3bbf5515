"""What a multi-exit model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MultiExitOutput:
    """What every exit says.

    ``output["logits"]`` is ``output.logits``. As a sequence it is ``(loss, logits)``, without labels ``(logits,)``, which is
    how trainers of other libraries read the outputs of a model.

    Attributes:
        logits: one tensor (B, C) per exit, after the method's ensemble; the backbone's own is last.
        features: the activations at the boundaries, batch first.
        heads: the internal classifiers' own logits (B, C), before any ensemble; the backbone's own is last.
        auxiliary: one scalar per internal classifier, a loss to be added to that of its logits (gpf's imitation loss);
            None where the method has none, and where gradients are off.
        loss: of a call with ``labels=``, the sum of the losses of all ``heads`` and of ``auxiliary``; None without labels.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]
    auxiliary: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return vars(self)[key]
        return ((self.logits,) if self.loss is None else (self.loss, self.logits))[key]
