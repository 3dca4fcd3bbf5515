"""Batch buckets: the few sizes that steps are recorded at; a batch is padded to the next one."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """Sizes, ascending. Every size up to 8, every fourth up to 32, every eighth beyond: at most a quarter is padding from
    12 samples on, an eighth from 64 on, with a few dozen sizes in all.
    """

    sizes: tuple[int, ...]

    @classmethod
    def up_to(cls, largest: int) -> Buckets:
        """The sizes for batches of at most ``largest`` samples, which is one of them."""
        sizes = {*range(1, 9), *range(12, 33, 4), *range(40, largest + 1, 8), largest}
        return cls(tuple(sorted(size for size in sizes if size <= largest)))

    def of(self, batch: int) -> int | None:
        """The smallest size that holds the batch; None for one above the largest."""
        index = bisect_left(self.sizes, batch)
        return self.sizes[index] if index < len(self.sizes) else None
