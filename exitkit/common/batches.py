"""What a data loader yields, taken apart: inputs for the model, and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from exitkit.common.errors import ArgumentError

_LABEL_KEYS = ("labels", "label")


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """``(inputs, labels)`` of a batch: a mapping with ``labels``, a tuple ``(..., labels)``, or inputs alone.

    Inputs stay what they were (a tensor, a tuple or a dict), so that they can be passed to the model.

    Raises:
        ArgumentError: a list of samples that were not collated.
    """
    if isinstance(batch, list) and batch and all(isinstance(item, Mapping | tuple) for item in batch):
        raise ArgumentError(
            f"a batch is a list of {len(batch)} samples, each a {type(batch[0]).__name__}; give the DataLoader "
            "collate_fn=torch.utils.data.default_collate, which makes (inputs, labels) or one dict of tensors of them"
        )
    if isinstance(batch, Mapping):
        key = next((key for key in _LABEL_KEYS if key in batch), None)
        return {name: value for name, value in batch.items() if name != key}, batch[key] if key else None
    if isinstance(batch, tuple | list) and len(batch) > 1:
        *inputs, labels = batch
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), labels
    return (batch[0] if isinstance(batch, tuple | list) and batch else batch), None


def check_labels(labels: Any, num_classes: int, batch: int) -> Tensor:
    """Class labels as an int64 tensor (batch,), each from 0 to ``num_classes`` − 1; for one output, float32 targets.

    Raises:
        ExitkitError: missing labels, another shape or dtype, a label out of range, or a target that is not finite.
    """
    labels = _as_tensor(labels, num_classes)
    if num_classes == 1:
        return _check_targets(labels, batch)
    if labels.is_floating_point() or labels.shape != (batch,):
        known = {
            (batch, num_classes): "; of one-hot labels these are labels.argmax(1)",
            (batch, 1): ": labels.squeeze(1)",
            (batch,): ": labels.long()",
        }
        raise ArgumentError(
            f"labels have dtype {labels.dtype} and shape {tuple(labels.shape)}; expected class indices of shape "
            f"({batch},){known.get(tuple(labels.shape), '')}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ArgumentError(
            f"labels run from {low} to {high}, but the model has {num_classes} classes: labels are 0 to {num_classes - 1}"
        )
    classes: Tensor = labels.long()
    return classes


def _as_tensor(labels: Any, num_classes: int) -> Tensor:
    if labels is None:
        raise ArgumentError("the loader yields no labels; yield (inputs, labels) or a dict with the key 'labels'")
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"labels are no class indices: {error}; give whole numbers from 0 to {num_classes - 1}"
        ) from error


def _check_targets(targets: Tensor, batch: int) -> Tensor:
    if targets.shape not in ((batch,), (batch, 1)) or not bool(targets.isfinite().all()):
        raise ArgumentError(
            f"labels have shape {tuple(targets.shape)}; a model with one output needs one finite number per sample, shape "
            f"({batch},)"
        )
    return targets.reshape(batch).float()


UNLABELLED = -1
"""The class index that says: this sample has no label."""


def check_training_labels(labels: Any, num_classes: int, batch: int) -> Tensor:
    """As :func:`check_labels`, and beside class indices two things that a loss can use and an accuracy cannot.

    ``-1`` marks a sample without a label; probabilities (batch, C), non-negative and of sum 1, are soft labels (MixUp,
    CutMix, an expert's answers), returned as float32.

    Raises:
        ExitkitError: another shape or dtype, or values out of range.
    """
    targets = _as_tensor(labels, num_classes)
    if num_classes == 1:
        return check_labels(targets, num_classes, batch)
    if targets.is_floating_point() and targets.shape == (batch, num_classes):
        if bool((targets < 0).any()) or not bool((targets.sum(1).float() - 1).abs().le(1e-2).all()):
            raise ArgumentError(
                f"labels of shape {tuple(targets.shape)} are soft ones: probabilities, each row of sum 1"
            )
        return targets.float()
    if not targets.is_floating_point() and targets.shape == (batch,) and bool((targets == UNLABELLED).any()):
        check_labels(targets.where(targets != UNLABELLED, 0), num_classes, batch)
        return targets.long()
    return check_labels(targets, num_classes, batch)


def check_iterable(loader: Any, name: str) -> None:
    """Refuse what yields nothing at all, or single samples, as a data set does.

    Raises:
        ExitkitError: no iterable.
    """
    if not isinstance(loader, Iterable):
        raise ArgumentError(
            f"{name} is {type(loader).__name__}, which yields no batches; give a torch DataLoader, or a list of batches"
        )


def checked(loader: Iterable[Any], name: str) -> Iterable[Any]:
    """Yield from ``loader``; an :class:`ExitkitError` that names it when nothing came, or a batch without samples."""
    check_iterable(loader, name)
    empty = True
    for index, batch in enumerate(loader):
        if _holds_none(split_batch(batch)[0]):
            raise ArgumentError(
                f"{name}: batch {index}, counted from 0, holds no samples; leave such batches out (a collate_fn that drops "
                "samples may drop all of a batch)"
            )
        empty = False
        yield batch
    if empty:
        raise ArgumentError(f"{name} is empty: it yielded no batch; check the data set and drop_last")


def _holds_none(inputs: Any) -> bool:
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    sizes = [len(value) for value in values if isinstance(value, Tensor) and value.dim() > 0]
    return bool(sizes) and not any(sizes)


def move(value: Any, device: torch.device) -> Any:
    """Every tensor in ``value`` (a tensor, or tuples, lists and dicts of them) on ``device``."""
    if isinstance(value, Tensor):
        if value.is_meta and device.type != "meta":
            raise ArgumentError(
                "a tensor of a batch is on the meta device, where tensors have no values; give one that has"
            )
        return value.to(
            device, non_blocking=device.type == "cuda"
        )  # on the way back the values would not be there yet
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(move(item, device) for item in value)
    return value
