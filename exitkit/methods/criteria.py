"""Criteria: how sure an exit is. A sample leaves at the first exit whose score is strictly above τ.

A criterion is one class: how an exit's answer is scored, what is remembered from exit to exit, and the range of the scores, in
which thresholds are searched. Whatever subclasses :class:`Criterion` can be named wherever a criterion is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.common.checks import Count, check
from exitkit.common.errors import unknown_name

Memory = tuple[Tensor, ...]
_STEPS = np.linspace(-36, 7, 1_600)
"""Log-odds of the searched thresholds, from strict to loose: 1 − 2e-16 is where double precision ends."""


class Criterion:
    """How sure an exit is, in double precision, in which probabilities next to 1 can still be told apart.

    Attributes:
        kind: what users call it.
        regression: whether it scores predictions (B, 1) instead of log-probabilities (B, C).
        memory: a name for each tensor (B, …) that is remembered from exit to exit.
    """

    kind: ClassVar[str]
    regression: ClassVar[bool] = False
    memory: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """What names it, in files and arguments."""
        return self.kind

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
    exit with fewer before it scores the lowest finite float32. ``"tolerance-2"`` names the one of two changes.
    """

    times: int = 1

    kind = "tolerance"
    regression = True
    memory = ("history",)

    def __post_init__(self) -> None:
        check("times", self.times, Count)

    @property
    def name(self) -> str:
        return self.kind if self.times == 1 else f"{self.kind}-{self.times}"

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
        ArgumentError: an unknown name.
    """
    if isinstance(criterion, Criterion):
        return criterion
    kinds = {kind.kind: kind for kind in Criterion.__subclasses__()}
    if isinstance(criterion, str):
        kind, _, times = criterion.partition("-")
        if kind == Tolerance.kind and times.isdecimal() and len(times) < 10:
            return Tolerance(int(times))
        if criterion in kinds:
            return kinds[criterion]()
    raise unknown_name("criterion", criterion, kinds)


def _logistic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    odds: NDArray[np.float64] = 1 / (1 + np.exp(-values))
    return odds
