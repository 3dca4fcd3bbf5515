"""The decision and the compaction as Triton kernels: scores against τ, both groups compacted, and their rows gathered.

A decision is one launch, whatever is known of each sample included, and one wait of the host, for the two counts that it needs
for the shapes. Every tensor that is then gathered is one launch more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from exitkit.engine.decision import Group

_GATHERED = 1024
"""Elements that a block of the gather copies."""


@triton.jit  # type: ignore[untyped-decorator]
def _split_kernel(  # type: ignore[no-untyped-def]
    score,
    rows,
    fault,
    threshold,
    index,
    rows_out,
    score_out,
    fault_out,
    counts,
    size,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Outputs are (2, size): row 0 for those that leave, row 1 for those that go on."""
    places = tl.arange(0, BLOCK)
    inside = places < size
    row = tl.load(rows + places, mask=inside, other=-1)
    own = tl.load(score + places, mask=inside, other=0.0)
    faulty = tl.load(fault + places, mask=inside, other=0.0)
    present = row >= 0
    sure = own.to(tl.float64) > tl.load(threshold)
    for side in tl.static_range(2):
        member = (present & (sure if side == 0 else (sure == 0))).to(tl.int32)
        # each sample's place in its group is the number of members before it
        target = side * size + tl.cumsum(member, 0) - 1
        tl.store(index + target, places.to(tl.int64), mask=member == 1)
        tl.store(rows_out + target, row, mask=member == 1)
        tl.store(score_out + target, own, mask=member == 1)
        tl.store(fault_out + target, faulty, mask=member == 1)
        tl.store(counts + side, tl.sum(member, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(source, index, target, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Row ``program_id(0)`` of the target, ``BLOCK`` elements of it."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    taken = tl.load(index + row)
    tl.store(target + row * width + columns, tl.load(source + taken * width + columns, mask=inside), mask=inside)


def split(score: Tensor, rows: Tensor, fault: Tensor, threshold: float) -> tuple[Group, Group]:
    """A :data:`exitkit.engine.decision.Split` in one launch.

    The two counts come back through pinned memory; the host waits for them alone.
    """
    size, device = len(rows), rows.device
    index, rows_out = torch.empty(2, 2, size, dtype=torch.int64, device=device).unbind()
    score_out = torch.empty(2, size, dtype=score.dtype, device=device)
    fault_out = torch.empty(2, size, dtype=fault.dtype, device=device)
    counts = torch.empty(2, dtype=torch.int32, device=device)
    limit = torch.tensor([threshold], dtype=torch.float64, device=device)
    columns = score.contiguous(), rows.contiguous(), fault.contiguous()
    outputs = index, rows_out, score_out, fault_out
    _split_kernel[(1,)](*columns, limit, *outputs, counts, size, BLOCK=triton.next_power_of_2(size), num_warps=4)
    leaving, staying = (
        Group(*(output[side, :count] for output in outputs)) for side, count in enumerate(_on_host(counts))
    )
    return leaving, staying


def gather(value: Tensor, index: Tensor) -> Tensor:
    """``value.index_select(0, index)`` for a contiguous value (B, …) in one launch."""
    made = value.new_empty(len(index), *value.shape[1:])
    width = made[0].numel() if len(index) else 0
    if width:
        grid = (len(index), triton.cdiv(width, _GATHERED))
        _gather_kernel[grid](value.contiguous(), index, made, width, BLOCK=_GATHERED, num_warps=4)
    return made


def _on_host(counts: Tensor) -> list[int]:
    if counts.device.type != "cuda":
        return counts.tolist()
    pinned = torch.empty(2, dtype=torch.int32, pin_memory=True)
    pinned.copy_(counts, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    arrived.synchronize()
    return pinned.tolist()
