"""``choose_threshold``: the cheapest threshold that keeps a promise, from held-out samples.

Thresholds are tried in a fixed order, from "no sample leaves" on, and the last one before the first that fails is taken:
fixed-sequence testing (Angelopoulos et al. 2021, Learn then Test, section 3.2), for which no correction for the number of
thresholds is needed. Early exits in this setting: Jazbec et al. 2024, Fast yet Safe.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.calibration.p_values import (
    betting_p_value,
    binomial_p_value,
    conformal_mean,
    hoeffding_bentkus_p_value,
)
from exitkit.calibration.risks import Risk, RiskFunction, RiskName, as_risk
from exitkit.common.errors import ArgumentError, unknown_name
from exitkit.common.hashes import digest
from exitkit.evaluation.outputs import ExitOutputs, check_outputs
from exitkit.methods.criteria import Criterion
from exitkit.methods.policy import ExitPolicy, Guarantee

Procedure = Literal["ltt", "ucb", "crc"]
Certifies = Callable[[NDArray[np.float64]], bool]
"""A test of losses (N,) in [0, 1], each scaled as :meth:`Risk.losses` gives them."""

_MOST_SAMPLES = 1_000_000
_NORMAL_95 = 1.959964
"""Standard deviations either side of a normal mean between which 95% lie."""


@dataclass(frozen=True, eq=False)
class ThresholdPath:
    """An order in which thresholds are tried, fixed without the calibration split.

    Attributes:
        thresholds: (T, M), one τ per exit in each row, the strictest row first.
        criterion: the score they are compared with.
        hashes: content hashes of the samples the path was made from, or None; calibrating on these is refused.
    """

    thresholds: NDArray[np.float64]
    criterion: str
    hashes: Tensor | None = None


ChosenThreshold = ExitPolicy
"""What :func:`choose_threshold` returned in version 0.1, under its name there."""


def choose_threshold(
    outputs: ExitOutputs,
    max_drop: float = 0.01,
    confidence: float = 0.95,
    risk: RiskName | RiskFunction = "accuracy_drop",
    method: Procedure = "ltt",
    *,
    criterion: str | Criterion | None = None,
    path: ThresholdPath | None = None,
    exclude: ExitOutputs | Tensor | None = None,
) -> ExitPolicy:
    """The cheapest policy whose risk is at most ``max_drop``, with a guarantee for new samples like these.

    Args:
        outputs: of held-out samples, which neither trained anything nor chose ``path`` or temperatures. Where they have
            content hashes, samples that repeat others are named in a warning, and τ must pass the test with them and
            without: copies are no further evidence, but repeats may be real (short texts). Samples that depend on one
            another in other ways (frames of a video, augmented copies) cannot be noticed; use one of each.
        max_drop: the bound on the risk, in (0, 1).
        confidence: how often, over calibration splits, the promise is to hold.
        risk: ``"accuracy_drop"`` (the full model right and the exit wrong: what exits put right is not credited, so it
            bounds the drop from above, and losses are 0 or 1), ``"net_accuracy_drop"`` (with that credit; in [−1, 1], for
            ``"ucb"``), ``"disagreement"`` (needs no labels), ``"brier"``, or a function from outputs to losses (N, M+1)
            in [0, 1], a bool tensor where they are 0 or 1.
        method: ``"ltt"`` tests with exact binomial p-values where losses are 0 or 1, Hoeffding-Bentkus ones elsewhere;
            ``"ucb"`` with the betting bound of Waudby-Smith and Ramdas, better for small or signed losses; ``"crc"``
            bounds the risk in expectation only (conformal risk control), and needs the fewest samples.
        criterion: the score; by default that of ``outputs``.
        path: thresholds per exit to try (:func:`exitkit.evaluation.threshold_path`); by default one τ for all exits.
        exclude: the training samples (their outputs, or ``content_hashes(loader)``); sharing one with them is an error.

    Raises:
        ArgumentError: bounds out of range, too few samples (the message says how many would do), missing labels, samples
            shared with ``exclude``, with ``path`` or with ``outputs.fitted_on``, a path of other exits or
            another criterion.
    """
    _check(outputs, max_drop, confidence, method)
    for name, value, kinds in (("path", path, (ThresholdPath,)), ("exclude", exclude, (ExitOutputs, Tensor))):
        if value is not None and not isinstance(value, kinds):
            raise ArgumentError(
                f"{name} is {type(value).__name__}; give {' or '.join(kind.__name__ for kind in kinds)}"
            )
    chosen, no_exit = as_risk(risk), outputs.policy(float("inf"), criterion)
    refuse_shared(outputs, exclude, "exclude")
    _check_temperatures(outputs)
    rows = _rows(outputs, no_exit, path)
    losses, binary = chosen.losses(outputs)
    passes = certifier(method, chosen.limit(max_drop), 1 - confidence, binary)
    distinct = _distinct(outputs)
    check_count(len(distinct), passes, chosen, max_drop)
    scores = outputs.scores(no_exit.criterion)[:, :-1].numpy()
    tested = _in_random_order(passes, distinct, len(outputs), digest([scores, losses]))
    last, exits = _walk(scores, losses, rows, tested, monotone=method == "crc")
    cost = outputs.costs[exits]
    spread = _NORMAL_95 * float(cost.std()) / math.sqrt(len(cost))
    saves = last > 0 and float(cost.mean()) < 1
    promise = _words(chosen, method, max_drop, confidence, len(distinct), last)
    guarantee = Guarantee(
        words=promise if saves or last <= 0 else f"{promise} {_nothing_saved(exits, outputs)}",
        found=saves,
        risk=chosen.name,
        method=method,
        max_drop=max_drop,
        confidence=None if method == "crc" else confidence,
        measured=chosen.unscaled(float(losses[np.arange(len(losses)), exits].mean())),
        samples=len(distinct),
        cost=float(cost.mean()),
        cost_interval=(float(cost.mean()) - spread, float(cost.mean()) + spread),
    )
    return replace(no_exit.at(*rows[max(last, 0)].tolist()), guarantee=guarantee)


def _distinct(outputs: ExitOutputs) -> NDArray[np.int64]:
    """The first of each sample, by content hash, in order; all where there are no hashes."""
    if outputs.hashes is None:
        return np.arange(len(outputs))
    first = np.sort(np.unique(outputs.hashes.numpy(), return_index=True)[1])
    if repeated := len(outputs) - len(first):
        warnings.warn(
            f"{repeated} of the {len(outputs)} calibration samples repeat others; the promise is that of the {len(first)} "
            "distinct ones. Leave the repeats out, unless inputs really come that often",
            stacklevel=3,
        )
    return first


def _in_random_order(passes: Certifies, distinct: NDArray[np.int64], samples: int, seed: str) -> Certifies:
    """The test of the samples in random order, since bets depend on it and data sets are often sorted by class.

    With repeats it is two tests: the one holds where these are copies, the other where inputs really come that often.
    """
    generator = np.random.default_rng(int(seed, 16))  # another order for other samples
    orders = [generator.permutation(distinct)]
    if len(distinct) < samples:
        orders.append(generator.permutation(samples))
    return lambda losses: all(passes(losses[order]) for order in orders)


def refuse_shared(outputs: ExitOutputs, other: ExitOutputs | Tensor | None, name: str) -> None:
    """Refuse samples that are in ``other`` (outputs, or hashes of them) too.

    Raises:
        ArgumentError: shared samples, or no hashes to tell by.
    """
    if other is None:
        return
    hashes = other.hashes if isinstance(other, ExitOutputs) else other
    if hashes is None or outputs.hashes is None:
        raise ArgumentError(
            f"{name} cannot be checked: {'outputs' if outputs.hashes is None else name} without content hashes. Those of "
            "exitkit.collect have them; content_hashes(loader) gives those of a loader's samples"
        )
    shared = int(torch.isin(outputs.hashes, hashes).sum())
    if shared:
        raise ArgumentError(
            f"outputs share {shared} of their {len(outputs)} samples with {name}: a model is surer of samples it has seen, "
            f"and a threshold chosen on them promises too much. Leave them out: "
            f"outputs[~torch.isin(outputs.hashes, hashes_of_{name})]"
        )


def _check_temperatures(outputs: ExitOutputs) -> None:
    """Refuse samples that temperatures were fitted on; warn where these are unknown."""
    if outputs.temperatures is None or outputs.hashes is None:
        return
    refuse_shared(outputs, outputs.fitted_on, "temperatures")
    if outputs.fitted_on is None:
        warnings.warn(
            "it is unknown whether the temperatures were fitted on these samples, which would void the promise; say on "
            "which by outputs.calibrated(temperatures, fitted_on=tuning)",
            stacklevel=3,
        )


def _walk(
    scores: NDArray[np.float64],
    losses: NDArray[np.float64],
    rows: NDArray[np.float64],
    passes: Certifies,
    monotone: bool,
) -> tuple[int, NDArray[np.int64]]:
    """The last row before the first one that fails (−1: there is none), and where every sample leaves at it.

    ``monotone``: a sample's loss is the worst it has met so far, as conformal risk control asks of losses.
    """
    everyone, worst = np.arange(len(losses)), np.zeros(len(losses))
    scores = np.hstack([scores, np.full((len(losses), 1), np.inf)])
    exits = np.full(len(losses), losses.shape[1] - 1)
    for number, row in enumerate(np.hstack([rows, np.zeros((len(rows), 1))])):
        leaves = (scores > row).argmax(1)
        loss = losses[everyone, leaves]
        if monotone:
            loss = worst = np.maximum(worst, loss)
        if not passes(loss):
            return number - 1, exits
        exits = leaves
    return len(rows) - 1, exits


def _rows(outputs: ExitOutputs, no_exit: ExitPolicy, path: ThresholdPath | None) -> NDArray[np.float64]:
    """(T, M) thresholds in the order they are tried; at the first no sample leaves."""
    exits, criterion = len(no_exit.thresholds), no_exit.score
    strictest = np.full((1, exits), criterion.highest(exits))
    if path is None:
        grid = criterion.grid(exits, outputs.log_probs.shape[2])
        return np.vstack([strictest, np.repeat(grid[:, None], exits, axis=1)])
    if path.thresholds.ndim != 2 or path.thresholds.shape[1] != exits or path.criterion != no_exit.criterion:
        raise ArgumentError(
            f"path holds thresholds of shape {path.thresholds.shape} for {path.criterion!r}, but outputs have {exits} exits "
            f"and criterion {no_exit.criterion!r}; make the path from other samples of the same model"
        )
    if path.hashes is not None and outputs.hashes is not None:
        refuse_shared(outputs, path.hashes, "path")
    return np.vstack([strictest, path.thresholds])


def certifier(method: Procedure, limit: float, level: float, binary: bool) -> Certifies:
    """The test whether losses (N,) certify, at this level, that their mean is at most ``limit``."""
    if method == "crc":
        return lambda losses: conformal_mean(losses) <= limit
    if method == "ucb":
        return lambda losses: betting_p_value(losses, limit, level) <= level
    p_value = binomial_p_value if binary else hoeffding_bentkus_p_value
    return lambda losses: p_value(losses, limit) <= level


def _check(outputs: ExitOutputs, max_drop: float, confidence: float, method: str) -> None:
    check_outputs(outputs)
    if len(outputs.macs) < 2:
        raise ArgumentError("outputs hold the backbone alone; there is no exit to choose a threshold for")
    if method not in get_args(Procedure):
        raise unknown_name("method", method, get_args(Procedure))
    for name, value in (("max_drop", max_drop), ("confidence", confidence)):
        if not isinstance(value, Real):
            raise ArgumentError(f"{name}={value!r} must be a number between 0 and 1")
    if not 0 < max_drop < 1:
        raise ArgumentError(
            f"max_drop={max_drop!r} must lie between 0 and 1, both excluded: no number of samples shows that nothing is ever "
            "lost (use the full model), and losing everything needs no threshold (let all leave at exit 0)"
        )
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence!r} must lie between 0 and 1, both excluded; 0.95 is usual")


def check_count(samples: int, passes: Certifies, risk: Risk, max_drop: float) -> None:
    """Refuse fewer samples than it takes for the full model's own losses to pass.

    Raises:
        ArgumentError: too few; the message says how many would do.
    """

    def enough(count: int) -> bool:
        return passes(np.full(count, risk.limit(0.0)))

    if not enough(samples):
        needed = bisect_left(range(1, _MOST_SAMPLES), True, key=enough) + 1
        needs = f"at least {needed:,}" if needed < _MOST_SAMPLES else f"more than {_MOST_SAMPLES:,}"
        raise ArgumentError(
            f"{samples} samples are too few for max_drop={max_drop!r}: even if none of them lost anything, nothing could be "
            f"promised. It takes {needs} samples; or a larger max_drop or a lower confidence"
        )


def _nothing_saved(exits: NDArray[np.int64], outputs: ExitOutputs) -> str:
    if (exits == len(outputs.macs) - 1).all():
        return "No calibration sample leaves early, so that nothing is saved: the full model alone is cheaper."
    return (
        f"But nothing is saved: with the exits the cost is {outputs.costs[exits].mean():.1%} of the backbone's, and the full "
        "model alone is cheaper."
    )


def _words(risk: Risk, method: Procedure, max_drop: float, confidence: float, samples: int, last: int) -> str:
    if last < 0:
        return f"None: not even the full model passed the test that {risk.words} is at most {max_drop:g}."
    if last == 0:
        return (
            "No threshold passed the test. No sample leaves: the full model answers everything, and nothing is saved; alone "
            "it is cheaper."
        )
    surety = "On average" if method == "crc" else f"With probability {confidence:g}"
    return (
        f"{surety} over the choice of the {samples} calibration samples, {risk.words} is at most {max_drop:g} for new "
        f"samples from the same distribution."
    )
