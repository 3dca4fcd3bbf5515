"""Measuring in the middle of things: a model, a loader and random states that are left as they were found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from exitkit.surgery.capturing import evaluation_mode
from exitkit.training.distributed import random_state, set_random_state
from exitkit.training.freezing import flags_restored


@contextmanager
def left_as_found(*models: nn.Module) -> Iterator[None]:
    """In eval mode meanwhile; afterwards buffers, modes, ``requires_grad``, ``.grad`` and random states are as they were."""
    random = random_state()
    gradients = [(parameter, parameter.grad) for model in models for parameter in model.parameters()]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(flags_restored(model))
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(buffers_restored(model))
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            set_random_state(random)


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """The same tensors with the same values; BatchNorm's kernels write into them without raising their version."""
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in saved:
            module._buffers[name] = buffer
            buffer.data.copy_(values)


@contextmanager
def loader_kept(loader: Iterable[Any]) -> Iterator[None]:
    """Afterwards the loader's own generators and those of torch, numpy and Python stand where they stood."""
    owners = (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler")))
    found = (getattr(owner, "generator", None) for owner in owners)
    generators = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    random = random_state()
    try:
        yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        set_random_state(random)
