"""Metrics of exits beside accuracy: calibration, overthinking, where samples leave, and how sure the numbers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exitkit.common.checks import Bounds, Count, Index, Share, check
from exitkit.common.errors import ArgumentError
from exitkit.evaluation.outputs import ExitOutputs, check_outputs
from exitkit.methods.policy import Threshold

Array = NDArray[np.float64]
Resamples = Annotated[int, Bounds(least=40)]
"""Of a bootstrap: of fewer, less than one lies beyond each end of a 95% interval."""


class Reliability(NamedTuple):
    """Each (M+1, bins): confidence (mean probability of the answer), accuracy (NaN in empty bins), share of the samples."""

    confidence: Array
    accuracy: Array
    share: Array


class Overthinking(NamedTuple):
    """How later exits undo or mend earlier ones (Kaya et al. 2019, section 5).

    Attributes:
        destructive: (M,) share of samples that the exit has right and the backbone wrong.
        mended: (M,) share of samples that the exit has wrong and the backbone right.
        ever_destructive: share of samples that the backbone has wrong and any exit right.
        wasteful: share of samples that the backbone has right, as some exit had before: work for nothing.
    """

    destructive: Array
    mended: Array
    ever_destructive: float
    wasteful: float


class Interval(NamedTuple):
    """A value and its confidence interval."""

    low: float
    value: float
    high: float


def reliability(outputs: ExitOutputs, bins: int = 15) -> Reliability:
    """Confidence and accuracy of every exit in equal bins of confidence: the reliability diagram (Guo et al. 2017).

    Raises:
        ArgumentError: no labels, or no positive number of bins.
    """
    from scipy import stats

    check_outputs(outputs)
    check("bins", bins, Count)
    confidence, correct = outputs.scores("confidence").double().numpy(), outputs.correct.double().numpy()
    columns = [
        [
            stats.binned_statistic(sure, values, statistic, bins, range=(0, 1)).statistic
            for values, statistic in ((sure, "mean"), (right, "mean"), (sure, "count"))
        ]
        for sure, right in zip(confidence.T, correct.T, strict=True)
    ]
    means, accuracies, counts = np.moveaxis(np.array(columns, dtype=np.float64), 1, 0)
    return Reliability(means, accuracies, counts / len(outputs))


def calibration_error(outputs: ExitOutputs, bins: int = 15) -> Array:
    """(M+1,): expected calibration error of every exit (Guo et al. 2017, equation 3): mean |accuracy − confidence|.

    Raises:
        ArgumentError: no labels, or no positive number of bins.
    """
    confidence, accuracy, share = reliability(outputs, bins)
    error: Array = np.nansum(share * np.abs(accuracy - confidence), axis=1)
    return error


def overthinking(outputs: ExitOutputs) -> Overthinking:
    """What the layers after each exit spoil and mend.

    Raises:
        ArgumentError: no labels.
    """
    check_outputs(outputs)
    right = outputs.correct.numpy()
    exits, backbone = right[:, :-1], right[:, -1:]
    before = exits.any(1, keepdims=True)
    return Overthinking(
        (exits & ~backbone).mean(0),
        (~exits & backbone).mean(0),
        float((before & ~backbone).mean()),
        float((before & backbone).mean()),
    )


def exit_rates_by_class(outputs: ExitOutputs, threshold: Threshold) -> Array:
    """(C, M+1): of each class's samples, the share that leaves at each exit; NaN for classes without samples.

    Raises:
        ArgumentError: no labels.
    """
    check_outputs(outputs)
    if outputs.labels is None:
        raise ArgumentError("labels=None: rates per class need labels")
    classes, exits = outputs.log_probs.shape[2], len(outputs.macs)
    counts = np.zeros((classes, exits))
    np.add.at(counts, (outputs.labels.numpy(), outputs.exits_at(threshold)), 1)
    samples = counts.sum(1, keepdims=True)
    rates: Array = np.divide(counts, samples, out=np.full_like(counts, np.nan), where=samples > 0)
    return rates


def bootstrap(
    outputs: ExitOutputs,
    statistic: Callable[[ExitOutputs], float],
    *,
    resamples: int = 1_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic of the outputs and its percentile bootstrap interval over the samples.

    Such as ``bootstrap(outputs, lambda o: o.curve().at_budget(0.5).accuracy)``.

    Raises:
        ArgumentError: not outputs, fewer than two samples, no function, fewer than 40 resamples, a confidence outside (0, 1),
            or a seed below 0.
    """
    from scipy import stats

    check_outputs(outputs)
    check("statistic", statistic, Callable, "such as lambda o: o.curve().auc()")
    check("resamples", resamples, Resamples)
    check("confidence", confidence, Share)
    check("seed", seed, Index)
    if len(outputs) < 2:
        raise ArgumentError(f"outputs hold {len(outputs)} sample; an interval needs at least 2")
    result = stats.bootstrap(
        (np.arange(len(outputs)),),
        lambda rows: statistic(outputs[rows]),
        vectorized=False,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(float(low), float(statistic(outputs)), float(high))
