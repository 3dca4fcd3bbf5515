"""Heads in two parts: a beginning without parameters, constant behind a frozen backbone, and the rest, which learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import takewhile
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from exitkit.common.errors import ArgumentError
from exitkit.exits.classifiers import HeadOutput, TokenBody
from exitkit.exits.gpf import Classifier, imitation_losses
from exitkit.exits.legal_actions import legal_in
from exitkit.exits.pooling import SDNPool, pooled_size, two_pools
from exitkit.multi_exit.calling import call_model
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.hooks import reading_arguments
from exitkit.surgery.inputs import call_on

T = TypeVar("T")


class HeadsOutput(NamedTuple):
    """As in :class:`exitkit.MultiExitOutput`: every head's logits, the backbone's last, and auxiliary losses."""

    heads: tuple[Tensor, ...]
    auxiliary: tuple[Tensor, ...] | None


class HeadsAlone(nn.Module):
    """A model's heads, applied to reduced features; the parameters are the model's own.

    It is called with one reduced feature per exit and the backbone's logits (B, C).

    Attributes:
        reductions: one per exit: (feature, the model's inputs that the head reads) → what its parameters are applied to.
    """

    def __init__(self, model: MultiExitModel) -> None:
        super().__init__()
        self.reductions: list[nn.Module] = []
        self.heads = nn.ModuleList()
        for spec, classifier in zip(model.specs, model.classifiers, strict=True):
            if len(spec.inputs) > is_masked(classifier) and not isinstance(classifier.body, TokenBody):
                raise ArgumentError(
                    f"cache=True: the head at {spec.boundary.name!r} reads inputs of the model beside its feature "
                    f"(head={model.head!r}), and cannot be fed from a cache; use head='auto' or leave cache out"
                )
            reduction, rest = _split(classifier.body)  # type: ignore[arg-type]
            self.reductions.append(reduction)
            self.heads.append(_with_body(classifier, rest))

    def forward(self, *parts: Tensor) -> HeadsOutput:
        steps = self._steps(parts)
        auxiliary = imitation_losses(steps) if torch.is_grad_enabled() else None
        return HeadsOutput((*(step.logits for step in steps), parts[-1]), auxiliary)

    def read(self, model: MultiExitModel, inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What this is called with for a batch of inputs of the model, and every head's logits, the backbone's last."""
        with body_inputs(model) as read:
            _, heads = call_model(model, model.run_heads, inputs)
            reduced = [reduce(*args) for reduce, args in zip(self.reductions, read, strict=True)]
        return (*reduced, heads[-1]), heads

    def run_heads(self, *parts: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The reduced features, and every head's logits (the backbone's last); features may be less precise than heads."""
        dtype = next(self.heads.parameters()).dtype
        parts = tuple(part.to(dtype) for part in parts)
        return parts[:-1], (*(step.logits for step in self._steps(parts)), parts[-1])

    def _steps(self, parts: tuple[Tensor, ...]) -> list[HeadOutput]:
        steps: list[HeadOutput] = []
        for head, part in zip(self.heads, parts[:-1], strict=True):
            legal = (legal_in(parts[-1]),) if is_masked(head) else ()  # as the backbone's own logits say
            steps.append(head.step(part, steps[-1].carried if steps else None, legal))  # type: ignore[operator]
        return steps


def is_masked(classifier: nn.Module) -> bool:
    """Whether a head reads a mask of legal actions."""
    return bool(getattr(classifier, "masked", False))


def body_inputs(model: MultiExitModel) -> AbstractContextManager[list[tuple[Any, ...]]]:
    """While open, forwards in this thread leave in the list, in order of the exits, what heads' bodies were called with."""
    return reading_arguments([cast("nn.Module", classifier.body) for classifier in model.classifiers])


def _split(body: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The parameter-free beginning of a body, and the rest; a body that begins with parameters keeps its feature."""
    if isinstance(body, TokenBody):
        return body.pool, body.hidden
    if not isinstance(body, nn.Sequential):
        return nn.Identity(), body
    layers = list(body)
    free = list(takewhile(lambda layer: not list(layer.parameters()), layers))
    rest = layers[len(free) :]
    if rest and isinstance(rest[0], SDNPool):
        return _PoolsWhereSmaller(nn.Sequential(*free)), nn.Sequential(_MixWherePooled(rest[0]), *rest[1:])
    return nn.Sequential(*free), nn.Sequential(*rest)


def call_view(model: MultiExitModel, view: MultiExitModel | HeadsAlone, function: Callable[..., T], inputs: Any) -> T:
    """``function`` of ``view``, the model or its heads alone, called with what its loader yields as inputs."""
    return call_on(function, inputs) if isinstance(view, HeadsAlone) else call_model(model, function, inputs)


class _PoolsWhereSmaller(nn.Module):
    """Both of SDN's poolings (B, 2, C, 4, 4) where they are smaller than the maps (B, C, H, W), which stay otherwise."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.before = before

    def forward(self, feature: Tensor) -> Tensor:
        maps: Tensor = self.before(feature)
        height, width = maps.shape[-2:]
        if 2 * prod(pooled_size(height, width)) >= height * width:
            return maps
        return torch.stack(two_pools(maps), 1)


class _MixWherePooled(nn.Module):
    def __init__(self, pool: SDNPool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, part: Tensor) -> Tensor:
        mixed: Tensor = self.pool(part) if part.dim() == 4 else self.pool.mix(*part.unbind(1))
        return mixed


def _with_body(classifier: nn.Module, body: nn.Module) -> Classifier:
    """The classifier, its parameters shared, with another body."""
    twin = copy.copy(classifier)
    twin._modules = {**classifier._modules, "body": body}
    return twin  # type: ignore[return-value]
