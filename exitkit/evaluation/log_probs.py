"""Log-probabilities (samples, exits + 1, classes), some samples at a time: they may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from exitkit.common.errors import ArgumentError

_NORMALISED = 1e-5
_SUMS_TO_ONE = 1e-2
"""As far as bfloat16 rounds."""
CHUNK = 1024
"""Samples that are looked at together: what is computed on the way is this much and no more."""


def normalised(given: Tensor) -> Tensor:
    """Checked log-probabilities: float16 as it is, else normalised float32; rows that are normalised keep every bit.

    Raises:
        ArgumentError: another shape or dtype, probabilities, NaN, infinite or all-impossible rows.
    """
    if given.dim() != 3 or not given.is_floating_point() or 0 in given.shape or given.shape[2] < 2:
        raise ArgumentError(
            f"log_probs has dtype {given.dtype} and shape {tuple(given.shape)}; expected floating point of shape "
            "(samples, exits + 1, classes), with at least one sample and two classes"
        )
    if all(_are_probabilities(rows) for rows in given.split(CHUNK)):  # all but these end at the first rows
        raise ArgumentError(
            "log_probs look like probabilities: every row lies between 0 and 1 and sums to 1; pass their logarithm, "
            "probs.log(), or the logits"
        )
    normaliser = torch.cat([rows.float().logsumexp(-1, keepdim=True) for rows in given.split(CHUNK)])
    broken = ~normaliser.isfinite().squeeze(-1)
    if bool(broken.any()):
        exit_ = int(broken.any(0).int().argmax())
        raise ArgumentError(
            f"log_probs holds NaN, infinite or all-impossible rows: exit {exit_} on {int(broken[:, exit_].sum())} of "
            f"{len(given)} samples. The model overflowed there; check its inputs (normalised?) and run in float32"
        )
    normalised = normaliser.abs() < _NORMALISED
    if given.dtype == torch.float16 or (given.dtype == torch.float32 and bool(normalised.all())):
        return given.contiguous()
    log_probs = torch.empty(given.shape, dtype=torch.float32)
    parts = (tensor.split(CHUNK) for tensor in (log_probs, given, normaliser, normalised))
    for kept, rows, total, fine in zip(*parts, strict=True):
        kept[:] = torch.where(fine, rows.float(), rows.float() - total)
    return log_probs


def _are_probabilities(rows: Tensor) -> bool:
    """Whether every row is a distribution; no row of log-probabilities is one, as none of them is above 0."""
    values = rows.float()
    return bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < _SUMS_TO_ONE).all())


def by_chunks(log_probs: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of the same shape and dtype, computed in float32 some samples at a time."""
    changed = torch.empty_like(log_probs)
    for kept, rows in zip(changed.split(CHUNK), log_probs.split(CHUNK), strict=True):
        kept[:] = F.log_softmax(change(rows.float()), dim=-1)
    return changed
