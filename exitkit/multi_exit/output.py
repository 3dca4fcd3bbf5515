"""What a multi-exit model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MultiExitOutput:
    """What every exit says.

    Attributes:
        logits: one tensor (B, C) per exit, after the method's ensemble; the backbone's own is last.
        features: the activations at the boundaries, batch first.
        heads: the internal classifiers' own logits (B, C), before any ensemble; the backbone's own is last.
        auxiliary: one scalar per internal classifier, a loss to be added to that of its logits (gpf's imitation loss);
            None where the method has none, and where gradients are off.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]
    auxiliary: tuple[Tensor, ...] | None = None
