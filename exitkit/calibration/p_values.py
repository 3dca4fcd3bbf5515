"""Statistical tests of "the mean loss is at most this": what the guarantees of thresholds rest on.

Losses are independent, identically distributed and lie in [0, 1]; a p-value is of the hypothesis that their mean is
*above* the limit, so a small one certifies the limit.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]


def binomial_p_value(losses: Losses, limit: float) -> float:
    """Exact for losses of 0 and 1: the probability of so few, or fewer, when the mean is ``limit``."""
    from scipy.special import bdtr

    return float(bdtr(round(losses.sum()), len(losses), limit))


def hoeffding_bentkus_p_value(losses: Losses, limit: float) -> float:
    """For losses in [0, 1]: the lesser of Hoeffding's and Bentkus' bounds (Bates et al. 2021, section 3.1)."""
    from scipy.special import bdtr, rel_entr

    mean = min(float(losses.mean()), limit)
    hoeffding = math.exp(-len(losses) * float(rel_entr(mean, limit) + rel_entr(1 - mean, 1 - limit)))
    total = math.ceil(round(float(losses.sum()), 6))
    return min(hoeffding, math.e * float(bdtr(total, len(losses), limit)))


def betting_p_value(losses: Losses, limit: float, level: float) -> float:
    """For losses in [0, 1]: one over the most money that bets against a mean above ``limit`` ever make.

    Bets adapt to the losses' variance, so small or rare losses are certified with few samples. ``p <= level`` exactly when
    the upper confidence bound of Waudby-Smith and Ramdas, as Bates et al. 2021 (proposition 5) compute it, is at most
    ``limit``; bets are tuned to ``level``. The order of the samples matters, and must not depend on the losses.
    """
    n, counts = len(losses), np.arange(2, len(losses) + 2)
    means = (0.5 + losses.cumsum()) / counts
    variances = (0.25 + np.square(losses - means).cumsum()) / counts
    known = np.concatenate([[0.25], variances[:-1]])  # a bet may know what came before it, and nothing else
    bets = np.minimum(1, np.sqrt(2 * math.log(1 / level) / (n * known)))
    wealth = np.log1p(-bets * (losses - limit)).cumsum().max()
    return math.exp(-max(float(wealth), 0.0))


def conformal_mean(losses: Losses) -> float:
    """The mean with one more sample, of the greatest loss: conformal risk control (Angelopoulos et al. 2024, equation 4)."""
    return float((losses.sum() + 1) / (len(losses) + 1))
