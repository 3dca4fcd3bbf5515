"""The training pass: a model's heads, and no more of its backbone than the losses read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.feature_cache.heads_alone import HeadsOutput
from exitkit.training.losses import Distillation


class HeadsUntil(nn.Module):
    """A model's heads up to exit ``last``, called with what the backbone takes; the parameters are the model's own.

    The backbone's layers behind that exit do not run, and neither does the ensemble.
    """

    def __init__(self, model: MultiExitModel, last: int) -> None:
        super().__init__()
        self.model = model
        self.last = last

    def forward(self, *args: Any, **kwargs: Any) -> HeadsOutput:
        return HeadsOutput(*self.model.run_until(self.last, *args, **kwargs))


def last_needed(exits: Sequence[int], distillation: Distillation | None, model: MultiExitModel) -> int:
    """The last exit whose logits the losses of ``exits`` read: of these, of their teachers, and of those they imitate."""
    backbone = len(model.classifiers)
    teachers = [] if distillation is None else [t for m in exits for t in distillation.of(m, backbone)]
    imitated = [backbone - 1] if model.method.past_future else []
    return max(*exits, *teachers, *imitated, 0)
