"""Criteria: how sure an exit is. A sample leaves at the first exit whose score is strictly above τ.

A criterion is one class: how an exit's answer is scored, what is remembered from exit to exit, and the range of the scores, in
which thresholds are searched. Whatever subclasses :class:`Criterion` can be named wherever a criterion is. One with parameters
is a frozen dataclass, and its name holds their values: ``Tolerance(2)`` is ``"tolerance-2"``.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.common.checks import Count, check, check_fields
from exitkit.common.errors import ArgumentError, unknown_name
from exitkit.common.schema import parse_json, to_json

Memory = tuple[Tensor, ...]
_STEPS = np.linspace(-36, 7, 1_600)
"""Log-odds of the searched thresholds, from strict to loose: 1 − 2e-16 is where double precision ends."""

_KINDS: dict[str, type[Criterion]] = {}
"""Every subclass of :class:`Criterion` by its kind."""


class UnknownCriterionError(ArgumentError):
    """No class of this kind: a slip of the pen, or a user's own whose module is not imported."""


def _is_kind(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("-"))


class Criterion:
    """How sure an exit is, in double precision, in which probabilities next to 1 can still be told apart.

    Attributes:
        kind: what users call it: letters, digits and "-"; every subclass has one of its own.
        regression: whether it scores predictions (B, 1) instead of log-probabilities (B, C).
        memory: a name for each tensor (B, …) that is remembered from exit to exit.

    Raises:
        ArgumentError: a subclass without a kind, or with another's; run again (in a notebook), a class replaces itself.
    """

    kind: ClassVar[str]
    regression: ClassVar[bool] = False
    memory: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        kind = vars(cls).get("kind")
        if not isinstance(kind, str) or not _is_kind(kind):
            raise ArgumentError(
                f'{cls.__qualname__}.kind={kind!r} must be a name of its own, such as kind = "my-criterion"'
            )
        known = _KINDS.get(kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ArgumentError(
                f"{cls.__qualname__}.kind={kind!r} is the kind of {known.__module__}.{known.__qualname__}; choose another"
            )
        _KINDS[kind] = cls

    @property
    def name(self) -> str:
        """What names it, in files and arguments: its kind, then its parameters but for defaults at the end, as JSON.

        Raises:
            ArgumentError: parameters that JSON does not hold.
        """
        parameters = _parameters(type(self))
        values = [getattr(self, one.name) for one in parameters]
        while values and values[-1] == parameters[len(values) - 1].default:
            values.pop()
        return f"{self.kind}-{','.join(to_json(_shortest(value)) for value in values)}" if values else self.kind

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Score one exit.

        Args:
            answer: (B, C) normalised log-probabilities, float32; for regression predictions (B, 1).
            memory: what the exit before remembered; () at the first.

        Returns:
            Scores (B,) float64, and what the next exit is given.
        """
        raise NotImplementedError

    def score(self, answers: Tensor) -> Tensor:
        """(N, M+1, C) → (N, M+1) float64: the scores of all exits, one after another."""
        memory: Memory = ()
        scores = []
        for answer in answers.unbind(1):
            score, memory = self.step(answer, memory)
            scores.append(score)
        return torch.stack(scores, 1)

    def highest(self, exits: int) -> float:
        """The highest score that any of ``exits`` exits can have: as τ, no sample leaves."""
        return 1.0

    def grid(self, exits: int, classes: int) -> NDArray[np.float64]:
        """Thresholds from strict to loose over the range of the scores, chosen without looking at any."""
        grid: NDArray[np.float64] = 1 - _logistic(_STEPS)
        return grid


class Confidence(Criterion):
    """Probability of the most likely class, in [0, 1] (Zero Time Waste, equation 3)."""

    kind = "confidence"

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return answer.double().softmax(-1).amax(-1), ()


class Nats(Criterion):
    """Minus the entropy in nats, in [−ln C, 0]. BranchyNet, DeeBERT and gpf's authors leave below an entropy T: τ = −T."""

    kind = "nats"

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        log_probs = answer.double().log_softmax(-1)
        probabilities = log_probs.exp()
        return torch.where(probabilities > 0, probabilities * log_probs, 0).sum(-1).clamp(max=0), ()

    def highest(self, exits: int) -> float:
        return 0.0

    def grid(self, exits: int, classes: int) -> NDArray[np.float64]:
        return -math.log(classes) * _logistic(_STEPS)


class Entropy(Criterion):
    """Certainty 1 − H / ln C, in [0, 1] whatever the number of classes."""

    kind = "entropy"

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        nats, _ = Nats().step(answer, ())
        return (1 + nats / math.log(answer.shape[-1])).clamp(0, 1), ()


class Margin(Criterion):
    """Probability of the most likely class minus that of the second, in [0, 1]."""

    kind = "margin"

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        best = answer.double().softmax(-1).topk(2, dim=-1).values
        return best[..., 0] - best[..., 1], ()


class Patience(Criterion):
    """How many exits in a row, this one included, gave the same class (Zhou et al. 2020; Zero Time Waste, section 4).

    Leaving above τ = t means that t exits before this one agreed with it.
    """

    kind = "patience"
    memory = ("latest", "agreed")

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        latest = answer.argmax(-1)
        agreed = torch.ones_like(latest)
        if memory:
            agreed = torch.where(latest == memory[0], memory[1] + 1, agreed)
        return agreed.double(), (latest, agreed)

    def highest(self, exits: int) -> float:
        return float(exits)

    def grid(self, exits: int, classes: int) -> NDArray[np.float64]:
        return np.arange(exits, dtype=np.float64)[::-1]


@dataclass(frozen=True)
class Tolerance(Criterion):
    """Minus the largest of the last ``times`` changes |y_m − y_(m−1)|, for regression; at most 0.

    Leaving above τ = −a is leaving once ``times`` changes in a row were smaller than a (Zhou et al. 2020, section 3.3). An
    exit with fewer before it scores the lowest finite float32.
    """

    times: int = 1

    kind = "tolerance"
    regression = True
    memory = ("history",)

    def __post_init__(self) -> None:
        check("times", self.times, Count)

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        history = torch.cat([*memory, answer.double()], 1)[:, -self.times - 1 :]
        if history.shape[1] <= self.times:
            return torch.full_like(history[:, 0], torch.finfo(torch.float32).min), (history,)
        return -history.diff(dim=1).abs().amax(1), (history,)

    def highest(self, exits: int) -> float:
        return 0.0

    def grid(self, exits: int, classes: int) -> NDArray[np.float64]:
        return -np.geomspace(1e-9, 1e9, len(_STEPS))


def as_criterion(criterion: str | Criterion) -> Criterion:
    """A criterion by its name, ``"confidence"`` or ``"tolerance-2"``, or as it is.

    Raises:
        UnknownCriterionError: no class of this kind is imported.
        ArgumentError: parameters that it does not take; a criterion that its name, which is what is kept, does not make again.
    """
    if isinstance(criterion, str):
        return _named(criterion)
    if not isinstance(criterion, Criterion):
        raise unknown_name("criterion", criterion, _KINDS)
    try:
        again: Any = _named(criterion.name)
        kept = type(again) is type(criterion) and bool(vars(again) == vars(criterion))
    except (AttributeError, TypeError, ValueError, RuntimeError):  # also what comparing arrays or tensors raises
        kept = False
    if not kept:
        raise ArgumentError(
            f"criterion={criterion!r} cannot be made again from its name; make {type(criterion).__qualname__} a frozen "
            "dataclass whose fields are numbers or texts (in a notebook, make it anew from the class as it is now)"
        )
    return criterion


def _named(name: str) -> Criterion:
    known = [kind for kind in _KINDS if name == kind or name.startswith(f"{kind}-")]
    kind = max(known, key=len, default="")
    given = name[len(kind) + 1 :]
    if not kind or _is_kind(given):  # "squared-sum" begins as "squared" does
        remedy = "If it is your own, import the module that defines it first."
        error = unknown_name("criterion", name[:100], _KINDS, remedy)
        named = _is_kind(name.partition("-")[0]) and len(name) <= 100
        raise UnknownCriterionError(str(error)) if named else error
    made, parameters = _KINDS[kind], _parameters(_KINDS[kind])
    try:
        values = parse_json(f"[{given}]")
        if len(values) > len(parameters):
            raise ArgumentError(f"{kind!r} takes {len(parameters)} parameters, not {len(values)}")
        criterion = made(*values)
        if parameters:
            check_fields(criterion)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"criterion={name[:100]!r} cannot be made: {str(error)[:200]}") from error
    return criterion


def _parameters(kind: type[Criterion]) -> list[Field[Any]]:
    return [field for field in fields(kind) if field.init] if is_dataclass(kind) else []


def _shortest(value: Any) -> Any:
    """2 for 2.0, so that what is equal has one name."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _logistic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    odds: NDArray[np.float64] = 1 / (1 + np.exp(-values))
    return odds
