"""How sure a measured share is."""

from __future__ import annotations


def share_interval(share: float, samples: int) -> tuple[float, float]:
    """The 95% interval of a share, such as an accuracy, that was measured on so many samples (Wilson 1927)."""
    from scipy import stats

    found = stats.binomtest(round(share * samples), samples).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def with_interval(share: float, samples: int) -> str:
    """Such as ``91.20% (95% interval 88.4 to 93.4%, from 500 samples)``."""
    low, high = share_interval(share, samples)
    return f"{share:.2%} (95% interval {100 * low:.1f} to {high:.1%}, from {samples:,} samples)"
