"""Thresholds with a guarantee for the methods of a run, checked on samples they were not chosen on."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from exitkit.calibration.risk_control import choose_threshold
from exitkit.calibration.risks import RiskName, as_risk
from exitkit.common.errors import ArgumentError
from exitkit.evaluation import ExitOutputs
from exitkit.methods.policy import ExitPolicy
from exitkit.report.run import Calibrated, Check


def calibrated(
    outputs: ExitOutputs, held_out: ExitOutputs | None, share: float, seed: int, **choice: Any
) -> Calibrated:
    """Choose a threshold on ``held_out``, or on a random ``share`` of ``outputs``; check it on the others.

    Args:
        outputs: of a run, on samples that trained nothing.
        held_out: of other such samples, or None.
        share: in (0, 1]; with 1 all samples choose, and none are left for the check.
        seed: of the random split.
        choice: for :func:`exitkit.choose_threshold`.

    Raises:
        ArgumentError: a share out of range, or what :func:`exitkit.choose_threshold` raises.
    """
    if held_out is not None:
        chosen = choose_threshold(held_out, exclude=outputs if _hashed(outputs, held_out) else None, **choice)
        return Calibrated(chosen, check(chosen, outputs))
    if not 0 < share <= 1:
        raise ArgumentError(f"share={share!r} must lie above 0 and be at most 1: what part of the samples chooses τ")
    order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * len(outputs)))
    chosen = choose_threshold(outputs[order[:count]], **choice)
    rest = order[count:]
    return Calibrated(chosen, check(chosen, outputs[rest]) if len(rest) else None)


def check(chosen: ExitPolicy, outputs: ExitOutputs) -> Check:
    """What ``chosen`` gives on ``outputs``."""
    assert chosen.guarantee is not None
    exits = outputs.exits_at(chosen)
    risk = as_risk(cast("RiskName", chosen.guarantee.risk))
    losses, _ = risk.losses(outputs)
    return Check(
        samples=len(outputs),
        risk=risk.unscaled(float(losses[np.arange(len(outputs)), exits].mean())),
        cost=float(outputs.costs[exits].mean()),
        accuracy=None if outputs.labels is None else outputs.at(chosen).accuracy,
        backbone_accuracy=None if outputs.labels is None else float(outputs.accuracy()[-1]),
    )


def _hashed(*outputs: ExitOutputs) -> bool:
    return all(one.hashes is not None for one in outputs)
