"""Whole episodes at one policy: returns, exits and time, with intervals over episodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.evaluation.metrics import Interval
from exitkit.rl.environments import Games

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

_RESAMPLES = 2_000


class Chosen(NamedTuple):
    """Actions (n,) for n environments, and the exits (n,) that chose them."""

    actions: Counts
    exits: Counts


Choose = Callable[[tuple[Tensor, ...]], Chosen]
"""From what the policy takes to actions."""


@dataclass(frozen=True, eq=False)
class Episodes:
    """E whole episodes.

    Attributes:
        totals: (E,) undiscounted returns, of the rewards that the environment gives.
        exits: (E, M+1) how many actions of each episode were chosen at each exit.
        differing: (E,) how many of them the policy itself would not have taken; None where it was not asked.
        milliseconds: measured time per action: of a call, divided by the environments in it.
    """

    totals: Array
    exits: Counts
    differing: Counts | None
    milliseconds: float

    def mean_return(self) -> Interval:
        """The mean return, with a 95% bootstrap interval over episodes."""
        return interval(self.totals, np.ones(len(self.totals)))

    def cost(self, costs: Sequence[float]) -> Interval:
        """The average over actions of their exits' ``costs``, with a 95% bootstrap interval over episodes."""
        return interval(self.exits @ np.asarray(costs), self.exits.sum(1).astype(np.float64))

    def disagreement(self) -> Interval | None:
        """How often the action was another than the policy's, on the way that these exits went, likewise."""
        if self.differing is None:
            return None
        return interval(self.differing.astype(np.float64), self.exits.sum(1).astype(np.float64))

    def shares(self) -> Array:
        """(M+1,) the share of the actions that each exit chose."""
        share: Array = self.exits.sum(0) / self.exits.sum()
        return share


def interval(sums: Array, sizes: Array) -> Interval:
    """Σ sums / Σ sizes over whole episodes, and its 95% percentile bootstrap interval: steps of one episode are no samples."""
    rows = np.random.default_rng(0).integers(0, len(sums), (_RESAMPLES, len(sums)))
    drawn = sums[rows].sum(1) / sizes[rows].sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(low), float(sums.sum() / sizes.sum()), float(high))


def play(games: Games, choose: Choose, episodes: int, seed: int, compare: bool = False) -> Episodes:
    """Play so many whole episodes, divided evenly among the environments.

    Each environment plays its own number, so that short episodes are no more often among them than they occur.

    Args:
        compare: ask the policy too, at every step, what it would have done.
    """
    wanted = np.full(games.count, episodes // games.count) + (np.arange(games.count) < episodes % games.count)
    done = np.zeros(games.count, np.int64)
    exits = np.zeros((games.count, len(games.model.exits)), np.int64)
    differing = np.zeros(games.count, np.int64)
    kept: list[tuple[float, Counts, int]] = []
    own, seconds, calls = policy_itself(games), 0.0, 0
    games.reset(seed, 1)
    choose(games.inputs)  # what is prepared in the first call is not timed
    while (done < wanted).any():
        started = time.perf_counter()
        chosen = choose(games.inputs)
        seconds, calls = seconds + time.perf_counter() - started, calls + 1
        others = own(games.inputs).actions != chosen.actions if compare else np.zeros(games.count, bool)
        step = games.step(chosen.actions)
        exits[np.flatnonzero(step.counted), chosen.exits[step.counted]] += 1
        differing += others & step.counted
        for environment, total, _ in step.finished:
            if done[environment] < wanted[environment]:
                kept.append((total, exits[environment].copy(), int(differing[environment])))
                done[environment] += 1
            exits[environment], differing[environment] = 0, 0
    totals, used, different = (np.array(column) for column in zip(*kept, strict=True))
    milliseconds = 1e3 * seconds / (calls * games.count)
    return Episodes(totals, used, different if compare else None, milliseconds)


def policy_itself(games: Games) -> Choose:
    """The policy without exits, as its own modules compute; it must be in eval mode."""
    last = len(games.model.exits) - 1

    def choose(inputs: tuple[Tensor, ...]) -> Chosen:
        with torch.inference_mode():
            actions = games.model.backbone(*inputs).argmax(1).cpu().numpy()
        return Chosen(actions, np.full(len(actions), last))

    return choose
