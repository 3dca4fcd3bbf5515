"""Is the recorded engine's answer plain torch's, in calls, in ``map`` and from a server?"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from models import GPU, Make

import exitkit
from exitkit.serving.scheduling import RequestScheduler
from exitkit.surgery.inputs import call_on


def same_and_lasting(plain: exitkit.Engine, fast: exitkit.Engine, make: Make, size: int, tolerance: float) -> None:
    batch = make(size)
    expected, got = call_on(plain, batch), call_on(fast, batch)
    kept = [column.clone() for column in got]
    call_on(fast, make(size))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(kept, got, strict=True)), "changed later"
    same(got, expected, plain, tolerance)


def same(got: exitkit.Prediction, expected: exitkit.Prediction, plain: exitkit.Engine, tolerance: float) -> None:
    """Each sample leaves at its exit, or rounding has decided: at the earlier of two exits its score is near τ."""
    size, same = len(got.exit), got.exit == expected.exit
    assert size == len(expected.exit)
    assert size <= 20 or agreement(got, expected) > 0.9, (size, expected.exit, got.exit)
    earlier = torch.minimum(got.exit, expected.exit)
    score = torch.where(got.exit < expected.exit, got.score, expected.score)
    tau = torch.tensor([*plain.thresholds, float("-inf")], dtype=torch.float64, device=score.device)[earlier]
    assert (same | ((score - tau).abs() < tolerance)).all(), (size, expected, got)
    logits = (one.logits[same].float() for one in (got, expected))
    torch.testing.assert_close(*logits, rtol=tolerance, atol=tolerance)


def mapped_beside(plain: exitkit.Engine, fast: exitkit.Engine, batches: list[Any], tolerance: float) -> None:
    """Inputs that are still being made on the caller's stream when they are handed over."""
    with torch.cuda.stream(torch.cuda.Stream()):
        late = (_late(batch) for batch in batches)
        for got, batch in zip(fast.map(late, 64, max_wait=0.0), batches, strict=True):
            same(got, call_on(plain, batch), plain, tolerance)


def served(plain: exitkit.Engine, fast: exitkit.Engine, requests: list[Any], tolerance: float) -> None:
    async def serve() -> list[exitkit.Prediction]:
        scheduler = RequestScheduler(fast, max_wait_ms=1)
        try:
            return await asyncio.gather(*(scheduler.answer(_late(request)) for request in requests))
        finally:
            await scheduler.close()

    with torch.cuda.stream(torch.cuda.Stream()):
        for got, request in zip(asyncio.run(serve()), requests, strict=True):
            on_gpu = exitkit.Prediction(*(column.to(GPU) for column in got))  # a server's are on the CPU
            same(on_gpu, call_on(plain, request), plain, tolerance)


def _late(batch: Any) -> Any:
    """A copy that the device makes some ten milliseconds from now."""
    torch.cuda._sleep(20_000_000)
    return {key: value.clone() for key, value in batch.items()} if isinstance(batch, dict) else batch.clone()


def agreement(got: exitkit.Prediction, expected: exitkit.Prediction) -> float:
    return float((got.exit == expected.exit).float().mean())
