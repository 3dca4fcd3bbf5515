"""What a data loader yields, taken apart: inputs for the model, and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from exitkit.errors import ExitkitError

_LABEL_KEYS = ("labels", "label")


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """``(inputs, labels)`` of a batch: a mapping with ``labels``, a tuple ``(..., labels)``, or inputs alone.

    Inputs stay what they were (a tensor, a tuple or a dict), so that they can be passed to the model.
    """
    if isinstance(batch, Mapping):
        key = next((key for key in _LABEL_KEYS if key in batch), None)
        return {name: value for name, value in batch.items() if name != key}, batch[key] if key else None
    if isinstance(batch, tuple | list) and len(batch) > 1:
        *inputs, labels = batch
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), labels
    return (batch[0] if isinstance(batch, tuple | list) and batch else batch), None


def check_labels(labels: Any, num_classes: int, batch: int) -> Tensor:
    """Class labels as an int64 tensor (batch,), each from 0 to ``num_classes`` − 1.

    Raises:
        ExitkitError: missing labels, another shape or dtype, or a label out of range.
    """
    if labels is None:
        raise ExitkitError("the loader yields no labels; yield (inputs, labels) or a dict with the key 'labels'")
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise ExitkitError(
            f"labels are no class indices: {error}; give whole numbers from 0 to {num_classes - 1}"
        ) from error
    if labels.is_floating_point() or labels.shape != (batch,):
        raise ExitkitError(
            f"labels have dtype {labels.dtype} and shape {tuple(labels.shape)}; expected class indices of shape ({batch},)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ExitkitError(
            f"labels run from {low} to {high}, but the model has {num_classes} classes: labels are 0 to {num_classes - 1}"
        )
    classes: Tensor = labels.long()
    return classes


UNLABELLED = -1
"""The class index that says: this sample has no label."""


def check_targets(labels: Any, num_classes: int, batch: int) -> Tensor:
    """What the exits should learn, in one of three forms.

    * class indices, int64 (batch,); ``-1`` marks a sample without a label;
    * class probabilities (batch, C), non-negative and of sum 1 (MixUp, CutMix, an expert's answers), float32;
    * for a model of one output, the values to regress: (batch,) or (batch, 1), returned as float32 (batch,).

    Raises:
        ExitkitError: another shape or dtype, or values out of range.
    """
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise ExitkitError(f"labels are no tensor of numbers: {error}") from error
    targets: Tensor = labels
    if num_classes == 1:
        if targets.shape not in ((batch,), (batch, 1)) or not targets.float().isfinite().all():
            raise ExitkitError(
                f"labels have shape {tuple(targets.shape)}; a model of one output regresses one finite value per sample: "
                f"shape ({batch},) or ({batch}, 1)"
            )
        return targets.reshape(batch).float()
    if targets.is_floating_point() and targets.shape == (batch, num_classes):
        if (targets < 0).any() or not torch.allclose(
            targets.sum(1).float(), targets.new_ones(batch).float(), atol=1e-2
        ):
            raise ExitkitError(
                f"labels of shape {tuple(targets.shape)} are soft ones: probabilities, each row of sum 1"
            )
        return targets.float()
    if not targets.is_floating_point() and targets.shape == (batch,) and bool((targets == UNLABELLED).any()):
        check_labels(targets.clamp(min=0), num_classes, batch)
        if int(targets.min()) < UNLABELLED:
            raise ExitkitError(
                f"labels go down to {int(targets.min())}; -1 marks a sample without a label, nothing less"
            )
        return targets.long()
    return check_labels(targets, num_classes, batch)


def checked(loader: Iterable[Any], name: str) -> Iterable[Any]:
    """Yield from ``loader``; an :class:`ExitkitError` that names it when nothing came."""
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        raise ExitkitError(f"{name} is empty: it yielded no batch; check the data set and drop_last")


def move(value: Any, device: torch.device) -> Any:
    """Every tensor in ``value`` (a tensor, or tuples, lists and dicts of them) on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(move(item, device) for item in value)
    return value
