"""The kernels in plain torch, on any device: what :mod:`exitkit.engine.cuda.kernels` is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from exitkit.engine.cuda.buffers import Boundary, Results


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
    """Samples above τ get their answer in the results' row; the others their places, rows and faults at the next boundary.

    Args:
        score: (b,) float64; of the b places, the first ``here.count`` hold samples.
        answer: (b, C).
        threshold: (1,) float64.
        exit_: the exit's number.
        here: the boundary that the step began at.
        there: the next one, whose ``rows``, ``faulty``, ``keep`` and ``count`` are written.
        results: of the whole batch.
        last: whether this is the backbone's own exit, at which all leave.
    """
    present = torch.arange(len(score), device=score.device) < here.count
    faulty = here.faulty[: len(score)] | ~score.isfinite()
    leaves = present & ((score > threshold) | last)
    stays = present & ~leaves
    rows = here.rows[: len(score)]
    gone, left = torch.nonzero(leaves).squeeze(1), torch.nonzero(stays).squeeze(1)
    results.logits[rows[gone]] = answer[gone].to(results.logits.dtype)
    results.exit[rows[gone]] = exit_
    results.score[rows[gone]] = score[gone]
    results.non_finite[rows[gone]] = faulty[gone].bool()
    there.count.fill_(len(left))
    there.keep[: len(left)] = left.to(there.keep.dtype)
    there.rows[: len(left)] = rows[left]
    there.faulty[: len(left)] = faulty[left].to(there.faulty.dtype)


def compact(source: Tensor, target: Tensor, samples: int, there: Boundary) -> None:
    """The rows ``there.keep`` of ``source``, dense with ``samples`` samples first, to the beginning of ``target``.

    Both are flat: a sample's elements lie together, whatever they mean.
    """
    count = int(there.count)
    width = source.numel() // samples
    target[: count * width] = source.view(samples, width)[there.keep[:count].long()].flatten()
