"""The decision as one Triton kernel: scores against τ, and both groups compacted, without a round trip to the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 4096
"""Samples that one block of the kernel decides on."""


@triton.jit  # type: ignore[untyped-decorator]
def _split_kernel(score, rows, threshold, leaving, staying, counts, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    places = tl.arange(0, BLOCK)
    inside = places < size
    row = tl.load(rows + places, mask=inside, other=-1)
    present = row >= 0
    sure = tl.load(score + places, mask=inside, other=0.0).to(tl.float64) > tl.load(threshold)
    leaves = (present & sure).to(tl.int32)
    stays = (present & (leaves == 0)).to(tl.int32)
    # each sample's place in its group is the number of members before it
    tl.store(leaving + tl.cumsum(leaves, 0) - 1, places.to(tl.int64), mask=leaves == 1)
    tl.store(staying + tl.cumsum(stays, 0) - 1, places.to(tl.int64), mask=stays == 1)
    tl.store(counts, tl.sum(leaves, 0))
    tl.store(counts + 1, tl.sum(stays, 0))


def split(score: Tensor, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """A :data:`exitkit.runtime.decision.Split` in one launch.

    The two counts, which the host needs for the shapes, come back through pinned memory; the host waits for them alone.
    """
    size = len(rows)
    device = rows.device
    leaving, staying = torch.empty(2, size, dtype=torch.int64, device=device).unbind()
    counts = torch.empty(2, dtype=torch.int32, device=device)
    limit = torch.tensor([threshold], dtype=torch.float64, device=device)
    _split_kernel[(1,)](
        score, rows, limit, leaving, staying, counts, size, BLOCK=triton.next_power_of_2(size), num_warps=4
    )
    leave, stay = _on_host(counts)
    return leaving[:leave], staying[:stay]


def _on_host(counts: Tensor) -> list[int]:
    if counts.device.type != "cuda":
        return counts.tolist()
    pinned = torch.empty(2, dtype=torch.int32, pin_memory=True)
    pinned.copy_(counts, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    arrived.synchronize()
    return pinned.tolist()
