"""Regimes: which part of a multi-exit model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from exitkit.surgery.capture import evaluation_mode

REGIMES = ("disjoint",)
"""``disjoint``: the backbone is frozen, all exits are trained in parallel."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters without gradient, BatchNorm statistics and dropout at rest; all as it was afterwards."""
    gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        with evaluation_mode(module):
            yield
    finally:
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
