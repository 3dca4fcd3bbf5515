"""The optimiser and its rates where none are given: what trained each kind of head best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.exits.copied.head import TailBody
from exitkit.multi_exit.model import MultiExitModel

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""From parameter groups, which carry ``lr`` and ``weight_decay``, to an optimiser."""


@dataclass(frozen=True)
class Rates:
    """An optimiser, and a learning rate for each kind of part.

    Attributes:
        copies: of heads that are copies of the backbone and have BatchNorm, which makes their weights' scale irrelevant.
    """

    make: MakeOptimizer
    heads: float
    copies: float
    backbone: float
    weight_decay: float

    def groups(self, model: MultiExitModel) -> list[dict[str, Any]]:
        """Parameter groups, one for each rate; every parameter that learns now is in one of them."""
        copies = [classifier for classifier in model.classifiers if _is_copy(classifier)]
        heads = [classifier for classifier in model.classifiers if classifier not in copies]
        rates: dict[nn.Parameter, float] = {}
        for modules, rate in ((heads, self.heads), (copies, self.copies), ([model.backbone], self.backbone)):
            for parameter in nn.ModuleList(modules).parameters():
                if parameter.requires_grad:
                    rates.setdefault(parameter, rate)  # one that heads share has the first one's
        return [
            {"params": [one for one in rates if rates[one] == rate], "lr": rate, "weight_decay": self.weight_decay}
            for rate in dict.fromkeys(rates.values())
        ]


def rates_for(
    model: MultiExitModel,
    frozen: bool,
    make: MakeOptimizer | None,
    lr: float | None,
    backbone_lr: float | None,
    weight_decay: float | None,
) -> Rates:
    """What was given; where neither optimiser nor rate was, what is best for these heads.

    That is Adam at 1e-3, but for copies with BatchNorm on a frozen backbone SGD with Nesterov momentum: at 0.1 for these, at
    0.03 for other heads beside them; at 0.003 where convolutions of theirs read maps as they are, which diverge at more.
    """
    if make is None and lr is None and frozen and any(map(_is_copy, model.classifiers)):
        decay = 5e-4 if weight_decay is None else weight_decay
        heads = 0.003 if any(map(_is_bare_convolution, model.classifiers)) else 0.03
        return Rates(partial(torch.optim.SGD, momentum=0.9, nesterov=True), heads, 0.1, heads, float(decay))
    heads = float(1e-3 if lr is None else lr)
    backbone = heads if backbone_lr is None else float(backbone_lr)
    return Rates(make or torch.optim.Adam, heads, heads, backbone, float(weight_decay or 0.0))


def _is_copy(classifier: nn.Module) -> bool:
    return isinstance(classifier.body, TailBody) and any(isinstance(part, _BatchNorm) for part in classifier.modules())


def _is_bare_convolution(classifier: nn.Module) -> bool:
    kinds = {type(part) for part in classifier.modules()}
    return nn.Conv2d in kinds and not any(issubclass(kind, _BatchNorm | TailBody) for kind in kinds)
