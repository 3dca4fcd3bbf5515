"""What may stand in the fields of outputs beside their predictions, and what may be asked of them."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from exitkit.common.checks import Bounds, check
from exitkit.common.errors import ArgumentError


def checked_macs(given: Any, exits: int) -> Tensor:
    """(M+1,) float64, on the CPU.

    Raises:
        ArgumentError: another number of costs than ``exits``, or costs that are not positive and finite or that fall.
    """
    try:
        macs = torch.as_tensor(given, dtype=torch.float64).detach().cpu().contiguous()
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"macs={given!r} must hold one positive cost per exit, {exits} of them") from error
    rising = macs.shape == (exits,) and bool((macs.diff() >= 0).all())
    if not rising or not bool((macs > 0).all()) or not bool(macs.isfinite().all()):
        raise ArgumentError(
            f"macs={macs.tolist()} must hold one positive cost per exit, {exits} of them, none below the one before it"
        )
    return macs


def check_hashes(hashes: Tensor | None, samples: int) -> None:
    """Refuse what is not one content hash for each sample, or None.

    Raises:
        ArgumentError: another dtype or shape.
    """
    if hashes is not None and (hashes.shape != (samples,) or hashes.dtype != torch.int64):
        raise ArgumentError(
            f"hashes have dtype {hashes.dtype} and shape {tuple(hashes.shape)}; expected int64 of shape ({samples},), as "
            "exitkit.evaluation.content_hashes(loader) gives them"
        )


def checked_fitted_on(given: Tensor | None, calibrated: bool) -> Tensor | None:
    """(K,) int64 on the CPU, or None.

    Raises:
        ArgumentError: another dtype or shape, or hashes where there are no temperatures.
    """
    if given is None:
        return None
    if given.dim() != 1 or given.dtype != torch.int64 or not calibrated:
        raise ArgumentError(
            "fitted_on must be the int64 content hashes of the samples that temperatures were fitted on"
        )
    return given.detach().cpu()


def check_top(top: int, classes: int) -> None:
    """Refuse to count a label among more classes than there are.

    Raises:
        ArgumentError: ``top`` is not from 1 to ``classes``.
    """
    check("top", top, Annotated[int, Bounds(least=1, most=classes)], f"there are {classes} classes")
