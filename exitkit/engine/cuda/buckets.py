"""Batch buckets: the few sizes that steps are recorded at; a batch is padded to the next one."""

from __future__ import annotations

from bisect import bisect_left

from exitkit.engine.exported import MOST_SAMPLES

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, MOST_SAMPLES)


def buckets_up_to(largest: int) -> tuple[int, ...]:
    """The sizes for batches of at most ``largest`` samples, which is one of them, ascending."""
    return (*(size for size in SIZES if size < largest), largest)


def bucket_of(sizes: tuple[int, ...], batch: int) -> int:
    """The smallest size that holds the batch, which is at most the largest."""
    return sizes[bisect_left(sizes, batch)]
