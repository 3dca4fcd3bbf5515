"""A batch between two steps: everything that belongs to its samples, and how some of them are taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.engine.memory_format import is_channels_last

Places = NDArray[np.int64]
"""Places of samples in a batch, ascending; on the host, where decisions are made."""


@dataclass
class BatchState:
    """A batch of samples between two steps. What is known of samples is on the host, what steps read on the device.

    Attributes:
        rows: (B,) int64, the callers' numbers of the samples; −1 for one that has its answer and is carried along.
        values: what later steps read, by name.
        faulty: (B,) whether a sample had a score that was not finite.
        thresholds: (B, M) τ of each exit for each sample; None where all have the policy's.
    """

    rows: Places
    values: dict[str, Any]
    faulty: NDArray[np.bool_]
    thresholds: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Places, axes: Mapping[str, int]) -> BatchState:
        """The samples at the places ``keep``: every value that has samples is gathered, and those only."""
        device = next(
            (value.device for value in self.values.values() if isinstance(value, Tensor)), torch.device("cpu")
        )
        index = on_device(keep, device)
        values = {name: select(value, index, axes.get(name), len(self)) for name, value in self.values.items()}
        thresholds = None if self.thresholds is None else self.thresholds[keep]
        return BatchState(self.rows[keep], values, self.faulty[keep], thresholds)

    @staticmethod
    def merge(batches: Sequence[BatchState], axes: Mapping[str, int]) -> BatchState:
        """Batches before the same step as one; values without a batch axis are alike in all of them.

        All of them have thresholds of their own, or none has.
        """
        if len(batches) == 1:
            return batches[0]

        thresholds: list[Any] = [one.thresholds for one in batches]

        def joined(name: str) -> Any:
            axis = axes.get(name)
            parts = [one.values[name] for one in batches]
            return parts[0] if axis is None else torch.cat(parts, axis)

        return BatchState(
            np.concatenate([one.rows for one in batches]),
            {name: joined(name) for name in batches[0].values},
            np.concatenate([one.faulty for one in batches]),
            None if thresholds[0] is None else np.concatenate(thresholds),
        )


def select(value: Any, keep: Tensor, axis: int | None, batch: int) -> Any:
    """The samples ``keep`` of ``batch``; a value without a batch axis (a rotary table, a size) stays as it is."""
    if axis is None:
        return value
    if value.shape[axis] == batch:
        if axis == 0 and is_channels_last(value):  # gathered as it lies, it keeps its memory format
            return value.permute(0, 2, 3, 1).index_select(0, keep).permute(0, 3, 1, 2)
        return value.index_select(axis, keep)
    samples = value.unflatten(axis, (batch, -1))
    return samples.index_select(axis, keep).flatten(axis, axis + 1)


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor on a device, for which the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
