"""A sequential test of "what comes is like the calibration split", by betting, valid at every moment at once.

A sample's place among the calibration samples (by exit, and by score within the exit; ties in random order) is one of
N + 1 gaps. Where production is exchangeable with calibration, the share of every cell of gaps is Dirichlet distributed given
the calibration split, so that the next sample falls into a cell with probability (gaps + earlier samples there) / (N + 1 +
earlier samples): a Pólya urn, exact for any distribution, the split's own randomness included. The money won by bets on other
probabilities is a test martingale (Shafer 2021, Testing by betting; conformal test martingales: Vovk et al. 2003): the
probability that what began as 1 ever reaches 1 / α is at most α (Ville's inequality).

Each martingale bets on Dirichlet mixtures around the urn's own probabilities, over cells of several widths and with several
strengths. As a shift may begin at any time, another martingale begins at every block of samples; the k-th gets a share
1 / (k (k + 1)) of the money.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WIDTHS = (2, 4, 8, 16, 32, 64)
_STRENGTHS = (2.0, 64.0, 2048.0)
"""Per cell: how many samples' worth of weight a bet gives the urn's own probabilities; more finds smaller shifts. At most
what the urn itself gives: a larger one bets that nothing has shifted, and wins when the calibration split is replayed."""
_MARTINGALES = 24
"""At most so many at a time; the money of an older one is lost, but for the first."""


class Positions:
    """Places of samples among N calibration samples, from 0 to N."""

    def __init__(self, exits: NDArray[np.int64], scores: NDArray[np.float64], last: int) -> None:
        self._random = np.random.default_rng(0)
        tie_breakers = self._random.random(len(exits))
        rounded = _rounded(scores)
        order = np.lexsort((tie_breakers, rounded, exits))
        self._scores, self._tie_breakers = rounded[order], tie_breakers[order]
        self.ends = np.cumsum(np.bincount(exits, minlength=last + 1))
        """(M+1,) how many calibration samples left at each exit or before it."""

    def of(self, exits: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """(B,): the place of each sample."""
        places, scores = np.empty(len(exits), np.int64), _rounded(scores)
        tie_breakers = self._random.random(len(exits))
        for exit_ in np.unique(exits):
            rows = np.flatnonzero(exits == exit_)
            first, last = (self.ends[exit_ - 1] if exit_ else 0), self.ends[exit_]
            low, high = (
                first + self._scores[first:last].searchsorted(scores[rows], side) for side in ("left", "right")
            )
            places[rows] = low
            for tied in np.flatnonzero(low < high):
                among = self._tie_breakers[low[tied] : high[tied]]
                places[rows[tied]] += among.searchsorted(tie_breakers[rows[tied]])
        return places

    def exit_cuts(self) -> NDArray[np.int64]:
        """Cells of one exit each; the gap between two exits, where those of an unknown one fall, is a cell of its own."""
        cuts = np.unique(np.concatenate([self.ends[:-1], self.ends[:-1] + 1]))
        inside: NDArray[np.int64] = cuts[(cuts > 0) & (cuts <= self.ends[-1])]
        return inside


def _rounded(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """To 16 bits: what a compiled engine computes differs in the last ones, and 0.9999999 must tie with 1."""
    mantissa, exponent = np.frexp(scores)
    rounded: NDArray[np.float64] = np.ldexp((mantissa * 65536).round() / 65536, exponent)
    return rounded


class Martingales:
    """The money of all martingales that bet on the cells between ``cuts``.

    Args:
        cuts: for each partition the ascending first gaps of its cells but the first.
        gaps: N + 1.
    """

    def __init__(self, cuts: Sequence[NDArray[np.int64]], gaps: int) -> None:
        edges = [np.concatenate([[0], cut, [gaps]]) for cut in cuts]
        self._cuts = cuts
        self._starts = np.cumsum([0, *(len(edge) - 1 for edge in edges)])[:-1]
        self._cells = np.array([len(edge) - 1 for edge in edges])
        self._urn = np.concatenate([np.diff(edge) for edge in edges]).astype(np.float64)
        self._seen = np.zeros_like(self._urn)
        self._begun: deque[tuple[float, NDArray[np.float64]]] = deque()
        self._count = 0

    def begin(self) -> None:
        """Another martingale begins with the next sample."""
        self._count += 1
        if len(self._begun) == _MARTINGALES:
            del self._begun[1]
        self._begun.append((1 / (self._count * (self._count + 1)), self._seen.copy()))

    def see(self, places: NDArray[np.int64]) -> None:
        """More samples (B,)."""
        cells = [
            start + cut.searchsorted(places, "right") for start, cut in zip(self._starts, self._cuts, strict=True)
        ]
        self._seen += np.bincount(np.concatenate(cells), minlength=len(self._seen))

    def log_wealth(self) -> float:
        """The logarithm of the money of all, that of those that have not begun included."""
        from scipy.special import gammaln, logsumexp

        shares = np.array([share for share, _ in self._begun])
        before = self._urn + np.stack([seen for _, seen in self._begun])  # (martingales, cells of all partitions)
        counts = self._urn + self._seen - before
        totals = self._by_partition(before)

        def likelihood(prior: NDArray[np.float64]) -> NDArray[np.float64]:
            """(martingales, partitions): of the counts, in the urn that begins with ``prior``."""
            cells = self._by_partition(gammaln(prior + counts) - gammaln(prior))
            whole = self._by_partition(prior)
            urn: NDArray[np.float64] = cells - gammaln(whole + self._by_partition(counts)) + gammaln(whole)
            return urn

        null = likelihood(before)
        weights = (np.minimum(belief * self._cells / totals, 1) for belief in _STRENGTHS)
        bets = (before * np.repeat(weight, self._cells, axis=1) for weight in weights)
        each = np.stack([likelihood(bet) - null for bet in bets], -1)  # (martingales, partitions, strengths)
        owned = logsumexp(each, axis=(1, 2)) - np.log(each[0].size) + np.log(shares)
        waiting = np.log(1 / (self._count + 1))  # 1 less the shares of those that began
        return float(logsumexp([*owned, waiting]))

    def _by_partition(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = np.add.reduceat(values, self._starts, axis=1)
        return sums


def equal_cuts(gaps: int) -> list[NDArray[np.int64]]:
    """Cells of equal numbers of gaps, of every width."""
    return [np.linspace(0, gaps, width + 1).round().astype(np.int64)[1:-1] for width in _WIDTHS if 2 * width <= gaps]
