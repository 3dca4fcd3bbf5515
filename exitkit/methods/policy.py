"""``ExitPolicy``: the one value that says when a sample leaves. Thresholds are chosen, saved, compiled and watched as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from exitkit.common.checks import check, check_fields, is_number, numbers_in
from exitkit.common.errors import ArgumentError
from exitkit.common.schema import build
from exitkit.methods.criteria import Criterion, UnknownCriterionError, as_criterion

Temperatures = tuple[float, ...]
Precision = Literal["float32", "float16", "bfloat16", "float64"]
"""What a model may compute in, by torch's name."""


@dataclass(frozen=True)
class Guarantee:
    """What was found on a calibration split, and is promised for new samples like these; printed, it is the promise.

    Attributes:
        words: the promise.
        found: whether a threshold passed at which compute is saved; if not, the full model alone is cheaper.
        risk: the risk that is bounded.
        method: the procedure: ``"ltt"``, ``"ucb"`` or ``"crc"``.
        max_drop: the bound.
        confidence: how often, over calibration splits, the promise holds; None for ``"crc"``, which promises a mean.
        measured: the risk on the calibration split.
        samples: size of the calibration split.
        cost: average cost that is to be expected, as a share of the backbone.
        cost_interval: its 95% interval (normal approximation).
    """

    words: str
    found: bool
    risk: str
    method: str
    max_drop: float
    confidence: float | None
    measured: float
    samples: int
    cost: float
    cost_interval: tuple[float, float]

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class ExitPolicy:
    """When a sample leaves: at the first exit whose score is strictly above its threshold.

    :func:`exitkit.choose_threshold` returns one, and so do points of a curve; ``compile``, ``export``, ``save_pretrained``,
    ``Engine.at``, ``outputs.at`` and ``ShiftMonitor`` take one. A plain τ is the short way to write one.

    Attributes:
        thresholds: τ of each exit before the backbone.
        criterion: the score that they are compared with, by name. Its class need not be imported until it scores: a package
            has its scores in its graphs.
        temperatures: (M+1,) what each exit's logits are divided by before they are scored, the backbone's last, or None.
        dtype: what the model computed in where they were found: one of :data:`Precision`.
        guarantee: what they promise, or None.

    Raises:
        ArgumentError: values that are not numbers, what cannot name a criterion, an unknown dtype, temperatures of another
            number of exits or that are not positive, a guarantee of another type.
    """

    thresholds: tuple[float, ...]
    criterion: str
    temperatures: Temperatures | None = None
    dtype: str = "float32"
    guarantee: Guarantee | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", _thresholds(self.thresholds))
        with suppress(UnknownCriterionError):
            object.__setattr__(self, "criterion", as_criterion(self.criterion).name)
        if self.temperatures is not None:
            given = checked_temperatures(self.temperatures, len(self.thresholds) + 1)
            object.__setattr__(self, "temperatures", given)
        check_fields(self)
        check("dtype", self.dtype, Precision)

    @property
    def score(self) -> Criterion:
        """The criterion itself.

        Raises:
            ArgumentError: its class is not imported.
        """
        return as_criterion(self.criterion)

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """The one τ of all exits, or one for each.

        Raises:
            ArgumentError: there are temperatures, without which these numbers mean something else.
        """
        if self.temperatures is not None:
            raise ArgumentError(
                f"τ = {self.shown()} is for scores after temperatures, which a plain number would lose; pass the policy "
                "itself (policy.thresholds are the numbers)"
            )
        return self.thresholds[0] if len(set(self.thresholds)) == 1 else self.thresholds

    @property
    def cost(self) -> float | None:
        """The expected average cost, as a share of the backbone, where there is a guarantee."""
        return None if self.guarantee is None else self.guarantee.cost

    @property
    def found(self) -> bool:
        """Whether a threshold was found for which something is guaranteed, and compute is saved."""
        return self.guarantee is not None and self.guarantee.found

    def at(self, *thresholds: float) -> ExitPolicy:
        """The same scores with other thresholds, one for all exits or one for each; nothing is guaranteed for them.

        Raises:
            ArgumentError: another number of them, or values that are not numbers.
        """
        values = _thresholds(thresholds)
        return as_policy(values[0] if len(values) == 1 else values, self)

    def shown(self) -> str:
        """The thresholds as they can be typed."""
        distinct = self.thresholds[:1] if len(set(self.thresholds)) == 1 else self.thresholds
        return ", ".join(map(typed, distinct))

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds.

        Raises:
            ArgumentError: a threshold that is not finite, which JSON cannot hold.
        """
        if not all(map(math.isfinite, self.thresholds)):
            raise ArgumentError(
                f"threshold={self.shown()} must be finite to be written: the τ above which a sample leaves"
            )
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ExitPolicy:
        """From what :meth:`to_dict` gave, through JSON or not.

        Raises:
            FileError: other fields, or values of another kind.
        """
        return build(cls, data, "this exit policy")


@runtime_checkable
class HasPolicy(Protocol):
    """What brings a policy: a point of a curve, thresholds per exit."""

    @property
    def policy(self) -> ExitPolicy: ...


def typed(tau: float) -> str:
    """The shortest text that, typed, is this very number: 0.99999953 stays below 1."""
    return repr(float(tau)).removesuffix(".0")


Threshold = float | Sequence[float] | ExitPolicy | HasPolicy
"""What users give: τ, one for each exit, a policy, or what brings one."""


def as_policy(threshold: Threshold, like: ExitPolicy, criterion: str | Criterion | None = None) -> ExitPolicy:
    """A policy for as many exits as ``like`` has.

    Args:
        threshold: a policy stays as it is; plain numbers are compared with the scores of ``like``.
        like: whose exits, scores and dtype plain numbers are for.
        criterion: another criterion for plain numbers; must be a policy's own.

    Raises:
        ArgumentError: another number of exits or values, values that are not numbers, another criterion.
    """
    exits, given = len(like.thresholds), threshold.policy if isinstance(threshold, HasPolicy) else threshold
    if isinstance(given, ExitPolicy):
        if len(given.thresholds) != exits:
            raise ArgumentError(f"threshold is a policy for {len(given.thresholds)} exits; here are {exits}")
        if criterion is not None and as_criterion(criterion).name != given.criterion:
            raise ArgumentError(
                f"criterion={criterion!r}, but the threshold is for {given.criterion!r}; leave criterion out, or find a "
                "threshold for it"
            )
        return given
    if is_number(given):
        values = (float(given),) * exits
    else:
        values = _thresholds(given)
        if len(values) != exits:
            raise ArgumentError(
                f"threshold has {len(values)} values; give one τ, or one for each of the {exits} exits"
            )
    named = like.criterion if criterion is None else as_criterion(criterion).name
    return replace(like, thresholds=values, criterion=named, guarantee=None)


def check_same_scores(given: ExitPolicy, used: ExitPolicy, what: str = "threshold") -> None:
    """Refuse thresholds for other scores than those they would be compared with.

    Raises:
        ArgumentError: another criterion, other temperatures, or a guarantee given for another precision.
    """
    for name, one, other in (
        ("criterion", given.criterion, used.criterion),
        ("temperatures", given.temperatures, used.temperatures),
        ("dtype", given.dtype if given.guarantee else used.dtype, used.dtype),
    ):
        if one != other:
            raise ArgumentError(
                f"{what} is for scores with {name} {one!r}, but these have {other!r}; use the same {name}, or find another "
                "for these scores"
            )


def checked_temperatures(given: Any, count: int | None = None) -> Temperatures:
    """As floats.

    Raises:
        ArgumentError: values that are not positive numbers, or another number of them than ``count``.
    """
    values = numbers_in(given)
    if len(values) != (count or len(values)) or not len(values) or not ((values > 0) & np.isfinite(values)).all():
        wanted = "" if count is None else f"{count} "
        raise ArgumentError(
            f"temperatures={given!r} must be {wanted}positive numbers, one per exit and the backbone's last, as "
            "exitkit.calibration.fit_temperatures(outputs) returns them"
        )
    return tuple(values.tolist())


def _thresholds(given: Any) -> tuple[float, ...]:
    values = [given] if is_number(given) else numbers_in(given).tolist()
    if not values or not all(map(is_number, values)):
        raise ArgumentError(
            f"threshold={given!r} must be a number, one for each exit, or a policy such as exitkit.choose_threshold returns"
        )
    return tuple(map(float, values))
