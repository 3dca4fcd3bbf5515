"""What a recorded step does behind its exit, as Triton kernels: the decision, and the compaction of what later steps read.

Nothing here is known to the host: how many samples there are is read on the device, so that a recording holds for any number
of them up to its bucket. The decision is compiled once for each dtype of the answers, the compaction once for each width of
the words that it moves, whatever the sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from exitkit.engine.cuda.buffers import Boundary, Results
from exitkit.engine.exported import MOST_SAMPLES

_SAMPLES = MOST_SAMPLES
"""A program looks at the scores of all samples of a batch at once."""
_ELEMENTS = 1024
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""Bytes are moved as integers, by their size."""


@triton.jit(do_not_specialize=["classes", "exit_", "last"], do_not_specialize_on_alignment=["threshold"])  # type: ignore[untyped-decorator]
def _decide_kernel(  # type: ignore[no-untyped-def]
    score,
    answer,
    threshold,
    rows,
    faulty,
    count,
    next_rows,
    next_faulty,
    next_count,
    keep,
    logits_out,
    exit_out,
    score_out,
    faulty_out,
    classes,
    exit_,
    last,
    SAMPLES: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """One program a sample: its place among those that go on, or its answer into the results' row."""
    own = tl.program_id(0)
    places = tl.arange(0, SAMPLES)
    samples = tl.load(count)
    inside = places < samples
    scores = tl.load(score + places, mask=inside, other=float("inf"))
    stays = inside & ((scores > tl.load(threshold)) == 0) & (last == 0)
    before = tl.sum((stays & (places < own)).to(tl.int32), 0)
    if own == 0:
        tl.store(next_count, tl.sum(stays.to(tl.int32), 0))
    if own < samples:
        sure = tl.load(score + own)
        row = tl.load(rows + own)
        finite = (sure == sure) & (tl.abs(sure) != float("inf"))
        fault = tl.load(faulty + own) | (finite == 0).to(tl.int8)
        goes_on = ((sure > tl.load(threshold)) == 0) & (last == 0)
        if goes_on:
            tl.store(keep + before, own)
            tl.store(next_rows + before, row)
            tl.store(next_faulty + before, fault)
        else:
            tl.store(exit_out + row, exit_.to(tl.int64))
            tl.store(score_out + row, sure)
            tl.store(faulty_out + row, fault)
            for start in range(0, classes, CLASSES):
                columns = start + tl.arange(0, CLASSES)
                held = columns < classes
                values = tl.load(answer + own * classes + columns, mask=held)
                tl.store(logits_out + row * classes + columns, values.to(logits_out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["width"])  # type: ignore[untyped-decorator]
def _compact_kernel(source, target, keep, count, width, ELEMENTS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Row ``program_id(0)`` of the target, ``ELEMENTS`` elements of it; nothing for a row that no sample has."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(count):
        columns = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = columns < width
        taken = tl.load(keep + row).to(tl.int64)
        tl.store(target + row * width + columns, tl.load(source + taken * width + columns, mask=inside), mask=inside)


def decide(
    score: Tensor,
    answer: Tensor,
    threshold: Tensor,
    exit_: int,
    here: Boundary,
    there: Boundary,
    results: Results,
    last: bool,
) -> None:
    """See :func:`exitkit.engine.cuda.reference.decide`, in one launch."""
    _decide_kernel[(len(score),)](
        score.contiguous(),
        answer.contiguous(),
        threshold,
        here.rows,
        here.faulty,
        here.count,
        there.rows,
        there.faulty,
        there.count,
        there.keep,
        results.logits,
        results.exit,
        results.score,
        results.non_finite.view(torch.int8),
        answer.shape[1],
        exit_,
        int(last),
        SAMPLES=_SAMPLES,
        CLASSES=_ELEMENTS,
        num_warps=4,
    )


def compact(source: Tensor, target: Tensor, samples: int, there: Boundary) -> None:
    """See :func:`exitkit.engine.cuda.reference.compact`, in one launch."""
    size = source.nbytes // samples
    word = next(word for word in _WORDS if (size | source.data_ptr() | target.data_ptr()) % word == 0)
    width, moved = size // word, (tensor.view(torch.uint8).view(_WORDS[word]) for tensor in (source, target))
    grid = (samples, triton.cdiv(width, _ELEMENTS))
    _compact_kernel[grid](*moved, there.keep, there.count, width, ELEMENTS=_ELEMENTS, num_warps=4)
