"""What measurements share: the samples they are made on, and a model in float32."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from exitkit.common.batches import checked, split_batch
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.left_alone import loader_kept

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

Batch = tuple[Any, Tensor | None]
"""Inputs and labels."""

_HALVES = (torch.float16, torch.bfloat16)


def check_multi_exit(model: Any, measurement: str, name: str = "ee") -> None:
    """Refuse a model without exits.

    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(
            f"{name} is {type(model).__name__}; {measurement} compares exits, so give what exitkit.attach(model) returns"
        )


def backbone_of(model: nn.Module) -> nn.Module:
    """A model without the exits that it may have.

    Raises:
        ArgumentError: no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is {type(model).__name__}; give a torch module, with exits or without")
    return model.backbone if isinstance(model, MultiExitModel) else model


def in_float32(model: M) -> M:
    """The model, or where it is in half precision a copy in float32, with a warning that says so.

    A copy takes :func:`widened` batches.
    """
    halves = {p.dtype for p in model.parameters() if p.dtype in _HALVES}
    if not halves:
        return model
    kind = str(halves.pop()).removeprefix("torch.")
    warnings.warn(f"the model is in {kind}; measured on a copy of it in float32", stacklevel=3)
    return copy.deepcopy(model).float()


def widened(batch: Any) -> Batch:
    """A batch taken apart, its half-precision inputs in float32."""
    inputs, labels = split_batch(batch)
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in _HALVES else t, inputs), labels


def read_samples(
    loader: Iterable[Any], samples: int | None, labelled: bool = True, widen: bool = False
) -> list[Batch]:
    """The first ``samples`` of a loader, as batches, for several passes over the very same values; ``widen`` for a copy of
    :func:`in_float32`'s.

    Raises:
        ArgumentError: an empty loader, or no labels where they are needed.
    """
    batches: list[Batch] = []
    seen = 0
    with loader_kept(loader):
        for batch in checked(loader, "loader"):
            inputs, labels = widened(batch) if widen else split_batch(batch)
            if labels is None and labelled:
                raise ArgumentError(
                    "the loader yields no labels, which a loss needs; yield (inputs, labels) or a dict with 'labels'"
                )
            size = size_of(inputs)
            left = size if samples is None else samples - seen
            take = min(size, left)
            batches.append((first(inputs, take), None if labels is None else torch.as_tensor(labels)[:take]))
            seen += take
            if samples is not None and seen >= samples:
                break
    return batches


def first(inputs: Any, rows: int) -> Any:
    """The first rows of every tensor."""
    return tree_map_only(Tensor, lambda tensor: tensor[:rows], inputs)


def size_of(inputs: Any) -> int:
    """How many samples a batch's inputs hold.

    Raises:
        ArgumentError: no tensor in them.
    """
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, inputs)
    if not tensors:
        raise ArgumentError(
            f"the loader yields inputs of type {type(inputs).__name__} without any tensor; give tensors"
        )
    return len(tensors[0])


def tracked(items: Sequence[T], what: str, show_progress: bool) -> Iterable[T]:
    """The items, with a progress bar on a terminal's stderr."""
    if not (show_progress and sys.stderr.isatty()):
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, console=Console(stderr=True), transient=True)
