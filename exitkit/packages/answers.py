"""One answer of a package, as it is said to a user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def said(logits: Tensor, labels: Sequence[str] | None) -> dict[str, Any]:
    """``label``, the name or number of the likeliest class; of a regression ``value``, None where it is not finite.

    Args:
        logits: (C,) of one sample, or (1,) the number that a regression predicts.
        labels: names of the classes, or None.
    """
    if len(logits) == 1:
        return {"value": round(float(logits[0]), 6) if bool(logits.isfinite()) else None}
    return {"label": label_of(int(logits.argmax()), labels)}


def label_of(index: int, labels: Sequence[str] | None) -> int | str:
    """The name of a class, or its number where there are no names."""
    return index if labels is None else labels[index]
