"""``ShiftMonitor``: notices when production no longer looks like the calibration split, so that its guarantee ended."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from exitkit.calibration.shift_test import Martingales, Positions, equal_cuts
from exitkit.common.checks import Bounds, Share, check
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.methods.criteria import Criterion
from exitkit.methods.policy import Threshold

_EVERY = 100
"""Samples from test to test."""


@dataclass(frozen=True)
class ShiftReport:
    """What a monitor has seen; printed, it is a sentence and a table.

    Attributes:
        samples: how many samples it was given.
        fired_at: after how many of them it raised the alarm; None where it did not.
        p_values: of ``"exits"`` and ``"scores"`` at the latest test: one over what betting against "no shift" has made of 1;
            empty before the first.
        level: what one of them must fall below, at whatever time.
        expected_rates: (M+1,) share of the calibration samples that left at each exit.
        observed_rates: (M+1,) share of the latest window.
        expected_score: mean score with which calibration samples left.
        observed_score: mean of the latest window; NaN where nothing was seen.
    """

    samples: int
    fired_at: int | None
    p_values: dict[str, float]
    level: float
    expected_rates: tuple[float, ...]
    observed_rates: tuple[float, ...]
    expected_score: float
    observed_score: float

    def __str__(self) -> str:
        if not self.samples:
            return "Nothing was seen yet: give the monitor exits and scores, by update() or exitkit.compile(monitor=)."
        verdict = (
            f"No shift seen in {self.samples:,} samples."
            if self.fired_at is None
            else f"SHIFT after {self.fired_at:,} samples: production differs from the calibration split, and the guarantee "
            "of its threshold no longer applies. Collect and calibrate anew on samples like these."
        )
        rates = zip(self.expected_rates, self.observed_rates, strict=True)
        lines = [f"{'leave at exit':<15}{'calibration':>12}{'now':>9}"]
        lines += [f"{exit_:<15}{expected:>12.1%}{observed:>9.1%}" for exit_, (expected, observed) in enumerate(rates)]
        lines += [f"{'mean score':<15}{self.expected_score:>12.3f}{self.observed_score:>9.3f}"]
        return "\n".join([verdict, *lines])


class ShiftMonitor:
    """Compares the exits that samples take in production, and their scores, with the calibration split.

    Two test martingales bet against "no shift", one on the exits, one on the place of each score among the calibration
    samples of its exit (:mod:`exitkit.calibration.shift_test`); an alarm is raised where one of them has made
    2 / ``false_alarm`` of 1. The probability of *ever* raising one is at most ``false_alarm`` while samples come
    independently from the calibration split's distribution, whatever its size. Evidence adds up, so that small shifts are
    seen late rather than never. No labels are needed.

    What it cannot see: a change of labels alone (other classes, same looks), and shifts smaller than the calibration split's
    own randomness. Measured on a CIFAR-10 ResNet-20 with three exits (``benchmarks/risk_monitor.py``), 2,500 calibration
    samples, ``false_alarm=1e-4``: 20% copies of one sample are seen after 150 (median of 20 streams; 400 at most) and scores
    lower by 0.02 after 100; logits divided by 1.15 after 1,400 (4,600), a tenth of the samples from the hardest decile after
    1,850 (4,100). Out of reach: logits divided by 1.05 (0 of 10 in 40,000 samples; with 5,000 calibration samples 4 of 10)
    and 3% from the hardest decile. With 500 calibration samples, logits divided by 1.15 are
    seen in 5 of 20 streams, and a tenth of harder samples in none.

    Args:
        outputs: the calibration split; its own randomness is part of the tests.
        threshold: the policy that is deployed, or its τ, or one per exit.
        criterion: the score; by default that of ``outputs``.
        window: twice in so many samples a new comparison begins, so that a shift is seen that begins late; the report's
            observed rates are those of the latest ``window``.
        false_alarm: probability of an alarm without a shift, over the whole life of the monitor.

    Raises:
        ArgumentError: a window below 20, ``false_alarm`` outside (0, 1), thresholds that do not fit the outputs, fewer than
            three samples.
    """

    def __init__(
        self,
        outputs: ExitOutputs,
        threshold: Threshold,
        *,
        criterion: str | Criterion | None = None,
        window: int = 500,
        false_alarm: float = 1e-4,
    ) -> None:
        if not isinstance(outputs, ExitOutputs):
            raise ArgumentError(
                f"outputs is {type(outputs).__name__}; give those that the threshold was calibrated on"
            )
        if len(outputs) < 3:
            raise ArgumentError(
                f"outputs hold {counted(len(outputs), 'sample')}, too few to compare with; give the calibration split"
            )
        check("window", window, Annotated[int, Bounds(least=20)], "500 is usual")
        check("false_alarm", false_alarm, Share, "1e-4 is usual")
        policy = outputs.policy(threshold, criterion)
        self._exits = outputs.exits_at(policy)
        scores = outputs.under(policy).scores(policy.criterion).numpy()
        self.policy = replace(policy, dtype=outputs.dtype)  # the scores that are compared are of the outputs
        self._scores = scores[np.arange(len(outputs)), self._exits]
        self._last_exit = len(outputs.macs) - 1
        self._places = Positions(self._exits, self._scores, self._last_exit)
        gaps = len(outputs) + 1
        self._martingales = {
            "exits": Martingales([self._places.exit_cuts()], gaps),
            "scores": Martingales(equal_cuts(gaps), gaps),
        }
        self._false_alarm = false_alarm
        self._step = int(window) // 2
        self._recent: deque[tuple[int, float]] = deque(maxlen=2 * self._step)
        self._samples = 0
        self._fired_at: int | None = None
        self._p_values: dict[str, float] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}  # of this process alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @property
    def alarm(self) -> bool:
        """Whether a shift was seen; it stays on. Then build a monitor from a new calibration split."""
        return self._fired_at is not None

    def update(self, exit: Any, score: Any) -> None:
        """Take note of answered samples, one or a batch: ``prediction.exit`` and ``prediction.score``.

        Args:
            exit: (B,) or one whole number: the exit at which each sample left.
            score: (B,) or one number: the score with which it did.

        Raises:
            ArgumentError: exits that do not exist, scores that are not finite, or another number of them. Nothing of the
                batch is counted then.
        """
        exits, scores = self._checked(exit, score)
        with self._lock:
            while len(exits):
                count = min(_EVERY - self._samples % _EVERY, self._step - self._samples % self._step)
                self._see(exits[:count], scores[:count])
                exits, scores = exits[count:], scores[count:]

    def report(self) -> ShiftReport:
        """What was seen so far."""
        with self._lock:
            exits, scores = self._window()
            return ShiftReport(
                self._samples,
                self._fired_at,
                dict(self._p_values),
                self._level(),
                self._rates(self._exits),
                self._rates(exits),
                float(self._scores.mean()),
                float(scores.mean()) if len(scores) else float("nan"),
            )

    def _see(self, exits: NDArray[np.int64], scores: NDArray[np.float64]) -> None:
        places = self._places.of(exits, scores)
        for martingales in self._martingales.values():
            if self._samples % self._step == 0:
                martingales.begin()
            martingales.see(places)
        self._recent.extend(zip(exits.tolist(), scores.tolist(), strict=True))
        self._samples += len(exits)
        if self._samples % _EVERY == 0:
            self._test()

    def _test(self) -> None:
        self._p_values = {name: math.exp(-max(one.log_wealth(), 0.0)) for name, one in self._martingales.items()}
        if self._fired_at is None and min(self._p_values.values()) < self._level():
            self._fired_at = self._samples

    def _level(self) -> float:
        return self._false_alarm / len(self._martingales)

    def _window(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        exits, scores = zip(*self._recent, strict=True) if self._recent else ((), ())
        return np.array(exits, dtype=np.int64), np.array(scores, dtype=np.float64)

    def _rates(self, exits: NDArray[np.int64]) -> tuple[float, ...]:
        counts = np.bincount(exits, minlength=self._last_exit + 1) / max(len(exits), 1)
        return tuple(counts.tolist())

    def _checked(self, exit: Any, score: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        exits, scores = _array(exit), _array(score)
        if exits.ndim != 1 or exits.shape != scores.shape or not np.issubdtype(exits.dtype, np.integer):
            raise ArgumentError(
                f"exit has dtype {exits.dtype} and shape {exits.shape}, score shape {scores.shape}; give prediction.exit and "
                "prediction.score: whole numbers and scores, as many of the one as of the other"
            )
        if len(exits) and not 0 <= exits.min() <= exits.max() <= self._last_exit:
            raise ArgumentError(
                f"exit runs from {exits.min()} to {exits.max()}, but the calibration outputs have exits 0 to "
                f"{self._last_exit}; monitor the model that they are of"
            )
        if not np.isfinite(scores).all():
            raise ArgumentError(
                f"score holds {int((~np.isfinite(scores)).sum())} values that are not finite; leave out the samples that "
                "prediction.non_finite marks"
            )
        return exits.astype(np.int64), scores.astype(np.float64)


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = (value.double() if value.is_floating_point() else value).cpu().numpy()
    return np.atleast_1d(np.asarray(value))
