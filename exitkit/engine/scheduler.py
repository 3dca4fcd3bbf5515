"""The scheduler of ``engine.map``: batches of an iterable through the stages' queues, and their answers in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exitkit.common.batches import split_batch
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.engine.batch_state import Places
from exitkit.engine.fetching import NOTHING, fetched
from exitkit.engine.loop import Answers, Loop, Prediction
from exitkit.engine.stage_queues import Place, StageQueues
from exitkit.surgery.inputs import as_call

_AHEAD = 64
"""How many batches' worth of samples may be under way or wait for an earlier one."""


@dataclass
class _Item:
    """One batch of the caller's: its samples' numbers, when it came, and what has come back."""

    index: int
    first: int
    count: int
    arrived: float
    answers: list[Answers] = field(default_factory=list)
    answered: int = 0
    error: Exception | None = None


class Scheduler:
    """The queues of one run over an iterable; see :meth:`exitkit.Engine.map`."""

    def __init__(self, loop: Loop, batch: int, max_wait: float) -> None:
        self.loop = loop
        self.queues = StageQueues(loop, batch)
        self.max_wait = max_wait
        self.items: deque[_Item] = deque()
        self.accepted = 0
        self.samples = 0

    def run(self, batches: Iterable[Any]) -> Generator[Prediction, None, None]:
        """Answers in the order of ``batches``; an error of theirs comes after the answers to what came before it."""
        failed: list[Exception] = []
        waits = 0 < self.max_wait < float("inf")  # at 0 nothing ever waits while the next batch is fetched
        with closing(fetched(batches, self._patience)) if waits else nullcontext(batches) as source:
            for batch in _until_an_error(source, failed):
                if batch is not NOTHING:
                    self._accept(batch)
                while (full := self.queues.ready()) is not None:
                    self._step(full)
                if self._late():
                    self._drain()
                yield from self._finished()
        self._drain()
        yield from self._finished()
        if failed:
            raise failed[0]

    def _patience(self) -> float | None:
        """Seconds until the oldest unanswered batch has waited long enough; None where there is none."""
        return self.items[0].arrived + self.max_wait - time.monotonic() if self.items else None

    def _accept(self, batch: Any) -> None:
        index, self.accepted = self.accepted, self.accepted + 1
        try:
            args, kwargs = as_call(split_batch(batch)[0])
            tensors = self.loop.program.inputs.checked(args, kwargs)
        except ExitkitError as error:  # told when it is this batch's turn, after the answers before it
            self.items.append(_Item(index, self.samples, 0, time.monotonic(), error=error))
            return
        item = _Item(index, self.samples, len(tensors[0]), time.monotonic())
        self.items.append(item)
        self.samples += item.count
        if item.count:
            self.queues.put(0, self.loop.start(tensors, item.first))

    def _step(self, place: Place) -> None:
        """Run one stage on up to a full batch of one of its queues."""
        ran = self.queues.run(place.stage, self.queues.take(place))
        for onward in ran.onward:
            self.queues.put(place.stage + 1, onward)
        for answers in ran.answers:
            for item, mine in self._owners(answers.rows):
                item.answered += len(mine)
                item.answers.append(answers.part(mine))
        for rows, error in ran.failed:
            for item, mine in self._owners(rows):
                item.answered += len(mine)
                item.error = error

    def _owners(self, rows: Places) -> Iterator[tuple[_Item, Places]]:
        """The batches that these samples came in, each with the places of its own."""
        for item in self.items:
            mine = np.flatnonzero((rows >= item.first) & (rows < item.first + item.count))
            if len(mine):
                yield item, mine

    def _late(self) -> bool:
        """Whether the oldest unanswered item has waited too long, or too much has piled up behind it."""
        if not self.items:
            return False
        oldest = self.items[0]
        return (
            time.monotonic() - oldest.arrived >= self.max_wait
            or self.samples - oldest.first > _AHEAD * self.queues.batch
        )

    def _drain(self) -> None:
        """Run everything that waits."""
        for place in self.queues.places():
            self._step(place)

    def _finished(self) -> Iterator[Prediction]:
        while self.items and self.items[0].answered == self.items[0].count:
            item = self.items.popleft()
            if item.error is not None:
                raise self._failure(item) from item.error
            yield self.loop.in_order(item.answers, item.count, item.first)

    def _failure(self, failed: _Item) -> ArgumentError:
        """The error of one batch, which carries the answers of those behind it that were already taken."""
        self._drain()
        finished = {
            item.index: self.loop.in_order(item.answers, item.count, item.first)
            for item in self.items
            if item.error is None
        }
        error = ArgumentError(
            f"batch {failed.index} failed: {_said(failed.error)}. All batches before it were "
            f"answered, and {len(finished)} behind it are in this error's .finished, by their number; leave it out and go on"
        )
        error.finished = finished  # type: ignore[attr-defined]
        return error


def _until_an_error(batches: Iterable[Any], failed: list[Exception]) -> Iterator[Any]:
    """The batches; an error of theirs ends them and is added to ``failed``."""
    try:
        for batch in batches:  # noqa: UP028 - "yield from" would close the caller's generator
            yield batch
    except Exception as error:
        failed.append(error)


def _said(error: Exception | None) -> str:
    """An error's words, after its kind where it is not one of ours."""
    return str(error) if isinstance(error, ExitkitError) else f"{type(error).__name__}: {error}"
