"""A queue before each stage: samples of many batches run together, so that stages run full although samples leave."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from exitkit.engine.batch_state import BatchState, Places
from exitkit.engine.loop import Answers, Loop


class Place(NamedTuple):
    """One queue: before which stage, and what its samples have in common."""

    stage: int
    key: Any


@dataclass
class Ran:
    """What became of the samples taken: those that go on, those that left, and those on which a stage raised."""

    onward: list[BatchState] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    failed: list[tuple[Places, Exception]] = field(default_factory=list)


class StageQueues:
    """What waits before each stage of a loop's program, or before the first alone, as the loop says by ``queues``.

    Not for several threads at once, but for :meth:`run`.

    Args:
        loop: what runs; samples leave the batch wherever they have their answer.
        batch: how many samples a stage runs on at most.
    """

    def __init__(self, loop: Loop, batch: int) -> None:
        self.loop = loop
        self.batch = batch if loop.largest is None else min(batch, loop.largest)
        self._queues: list[dict[Any, deque[tuple[float, BatchState]]]] = [{} for _ in range(loop.queues)]

    def put(self, stage: int, batch: BatchState) -> None:
        """Let a batch wait. Batches wait together when they can be merged: all but the batch has the same size."""
        axes = self.loop.program.axes
        key = tuple(
            (name, *(size for dim, size in enumerate(value.shape) if dim != axes.get(name)))
            for name, value in batch.values.items()
            if isinstance(value, torch.Tensor)
        )
        self._queues[stage].setdefault(key, deque()).append((time.monotonic(), batch))

    def ready(self, patience: float = float("inf")) -> Place | None:
        """The deepest queue that fills a batch, or whose first has waited for ``patience`` seconds: nearest to an answer."""
        late = time.monotonic() - patience
        for stage in reversed(range(len(self._queues))):
            for key, waiting in self._queues[stage].items():
                if waiting[0][0] <= late or sum(len(batch) for _, batch in waiting) >= self.batch:
                    return Place(stage, key)
        return None

    def oldest(self) -> float | None:
        """When what has waited longest before its stage came there (``time.monotonic``); None where nothing waits."""
        return min((waiting[0][0] for queues in self._queues for waiting in queues.values()), default=None)

    def places(self) -> Iterator[Place]:
        """Every queue, early stages first, until nothing waits: later ones fill up meanwhile."""
        for stage, queues in enumerate(self._queues):
            while queues:
                yield Place(stage, next(iter(queues)))

    def take(self, place: Place) -> list[BatchState]:
        """Up to a full batch, out of one queue."""
        waiting, axes = self._queues[place.stage][place.key], self.loop.program.axes
        taken: list[BatchState] = []
        while waiting and sum(map(len, taken)) < self.batch:
            since, last = waiting.popleft()
            taken.append(last)
        spare = sum(map(len, taken)) - self.batch
        if spare > 0:
            rows = np.arange(len(last))
            taken[-1] = last.select(rows[:-spare], axes)
            waiting.appendleft((since, last.select(rows[-spare:], axes)))
        if not waiting:
            del self._queues[place.stage][place.key]
        return taken

    def run(self, stage: int, taken: list[BatchState]) -> Ran:
        """Run what was taken as one batch, up to the next queue; where a stage raises, each alone: the others lose nothing."""
        ran = Ran()
        if len(taken) > 1:
            try:
                self._run(stage, BatchState.merge(taken, self.loop.program.axes), ran)
                return ran
            except Exception:
                pass
        for batch in taken:
            rows = batch.rows
            try:
                self._run(stage, batch, ran)
            except Exception as error:  # whatever a stage raises
                ran.failed.append((rows[rows >= 0], error))
        return ran

    def _run(self, stage: int, batch: BatchState, ran: Ran) -> None:
        with torch.inference_mode():
            onward, answers = self.loop.run_queued(batch, stage)
        if onward is not None:
            ran.onward.append(onward)
        ran.answers += answers

    def kept(self, batch: BatchState, rows: Collection[int]) -> BatchState | None:
        """The samples of a batch that are among ``rows``; None where there are none."""
        stay = np.flatnonzero([row in rows for row in batch.rows.tolist()])
        if len(stay) == len(batch):
            return batch
        return batch.select(stay, self.loop.program.axes) if len(stay) else None
