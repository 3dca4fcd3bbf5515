"""Temperatures: one number per exit that makes its confidence mean what it says (Guo et al. 2017)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from exitkit.common.errors import ArgumentError
from exitkit.evaluation.outputs import ExitOutputs, check_outputs


def fit_temperatures(outputs: ExitOutputs) -> tuple[float, ...]:
    """(M+1,): the temperature of each exit, the backbone's last, that gives ``outputs`` the highest likelihood.

    Between 0.05 and 20. For ``others.calibrated(temperatures, fitted_on=outputs)``: :func:`exitkit.choose_threshold` refuses
    samples that temperatures were fitted on.

    Raises:
        ArgumentError: no labels.
    """
    check_outputs(outputs)
    if outputs.labels is None:
        raise ArgumentError("labels=None: temperatures are fitted to labels")
    return tuple(_fit(outputs, exit_) for exit_ in range(len(outputs.macs)))


def _fit(outputs: ExitOutputs, exit_: int) -> float:
    from scipy.optimize import minimize_scalar

    log_probs, labels = outputs.log_probs[:, exit_].float(), outputs.labels
    assert labels is not None

    def loss(log_temperature: float) -> float:
        scaled = F.log_softmax(log_probs / math.exp(log_temperature), dim=-1)
        return float(F.nll_loss(scaled, labels).clamp(max=torch.finfo(torch.float32).max))

    return math.exp(float(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x))
