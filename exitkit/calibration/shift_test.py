"""A sequential test of "what comes is like the calibration split", by betting, valid at every moment at once.

A sample's place among the calibration samples (by exit, and by score within the exit; ties in random order) is one of
N + 1 gaps. Where production is exchangeable with calibration, the share of every cell of gaps is Dirichlet distributed given
the calibration split, so that the next sample falls into a cell with probability (gaps + earlier samples there) / (N + 1 +
earlier samples): a Pólya urn, exact for any distribution, the split's own randomness included. A gambler who bets on other
probabilities owns a test martingale (Shafer 2021, Testing by betting; conformal test martingales: Vovk et al. 2003): the
probability that what began as 1 ever reaches 1 / α is at most α (Ville's inequality).

Each gambler bets on Dirichlet mixtures around the urn's own probabilities, over cells of several widths and with several
strengths. As nobody knows when a shift begins, another gambler begins at every block of samples; the k-th gets a share
1 / (k (k + 1)) of the money.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WIDTHS = (2, 4, 8, 16, 32, 64, 128)
_STRENGTHS = (1.0, 16.0, 256.0, 4096.0)
"""Per cell: how many samples' worth of belief a gambler has in the urn's own probabilities; more finds smaller shifts."""
_GAMBLERS = 64
"""At most so many at a time; the money of an older one is lost, but for the first."""


class Positions:
    """Places of samples among the calibration samples, from 0 to N."""

    def __init__(self, exits: NDArray[np.int64], scores: NDArray[np.float64], last: int) -> None:
        self._random = np.random.default_rng(0)
        tickets = self._random.random(len(exits))
        order = np.lexsort((tickets, scores, exits))
        self._scores, self._tickets = scores[order], tickets[order]
        self.ends = np.cumsum(np.bincount(exits, minlength=last + 1))
        """(M+1,) how many calibration samples left at each exit or before it."""

    def of(self, exit_: int, score: float) -> int:
        """The place of one sample."""
        first, last = (int(self.ends[exit_ - 1]) if exit_ else 0), int(self.ends[exit_])
        low, high = (first + int(self._scores[first:last].searchsorted(score, side)) for side in ("left", "right"))
        if low == high:
            return low
        return low + int(self._tickets[low:high].searchsorted(self._random.random()))


class Gamblers:
    """What all gamblers together own who bet on the cells between ``cuts``.

    Args:
        cuts: for each partition the ascending first gaps of its cells but the first.
        gaps: N + 1.
    """

    def __init__(self, cuts: Sequence[NDArray[np.int64]], gaps: int) -> None:
        edges = [np.concatenate([[0], cut, [gaps]]) for cut in cuts]
        self._cuts = cuts
        self._starts = np.cumsum([0, *(len(edge) - 1 for edge in edges)])[:-1]
        self._cells = [len(edge) - 1 for edge in edges]
        self._urn = np.concatenate([np.diff(edge) for edge in edges]).astype(np.float64)
        self._seen = np.zeros_like(self._urn)
        self._begun: deque[tuple[float, NDArray[np.float64]]] = deque()
        self._count = 0

    def begin(self) -> None:
        """Another gambler begins with the next sample."""
        self._count += 1
        if len(self._begun) == _GAMBLERS:
            del self._begun[1]
        self._begun.append((1 / (self._count * (self._count + 1)), self._seen.copy()))

    def see(self, place: int) -> None:
        """One sample more."""
        for start, cut in zip(self._starts, self._cuts, strict=True):
            self._seen[start + cut.searchsorted(place, side="right")] += 1

    def log_wealth(self) -> float:
        """The logarithm of what all of them own; what those own who have not begun is part of it."""
        from scipy.special import gammaln, logsumexp

        shares = np.array([share for share, _ in self._begun])
        before = self._urn + np.stack([seen for _, seen in self._begun])  # (gamblers, cells of all partitions)
        counts = self._urn + self._seen - before
        null = self._by_partition(gammaln(before + counts) - gammaln(before)) - _rising(
            self._by_partition(before), self._by_partition(counts)
        )
        logs = []
        for strength in _STRENGTHS:
            totals = self._by_partition(before)
            prior = before / np.repeat(totals / (strength * np.array(self._cells)), self._cells, axis=1)
            bet = self._by_partition(gammaln(prior + counts) - gammaln(prior)) - _rising(
                self._by_partition(prior), self._by_partition(counts)
            )
            logs.append(bet - null)
        each = np.stack(logs, -1)  # (gamblers, partitions, strengths)
        owned = logsumexp(each, axis=(1, 2)) - np.log(each[0].size) + np.log(shares)
        waiting = np.log(1 / (self._count + 1))  # 1 less the shares of those that began
        return float(logsumexp([*owned, waiting]))

    def _by_partition(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = np.add.reduceat(values, self._starts, axis=1)
        return sums


def equal_cuts(gaps: int) -> list[NDArray[np.int64]]:
    """Cells of equal numbers of gaps, of every width."""
    return [np.linspace(0, gaps, width + 1).round().astype(np.int64)[1:-1] for width in _WIDTHS if 2 * width <= gaps]


def _rising(start: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.special import gammaln

    product: NDArray[np.float64] = gammaln(start + count) - gammaln(start)
    return product
