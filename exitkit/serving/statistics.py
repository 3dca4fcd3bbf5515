"""What a server has seen lately, for its page and its status; only numbers, never a request."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

_WINDOW = 60.0
_MOST = 100_000


@dataclass(frozen=True)
class Answered:
    """One sample's answer: where it left, how long its request took, and the share of the backbone's MACs, where known."""

    exit: int
    milliseconds: float
    cost: float | None


class Observer(Protocol):
    """What is told of answers and refusals."""

    def answered(self, answer: Answered) -> None: ...

    def responded(self, status: int) -> None: ...


class LastMinute:
    """Exits and latencies of the last minute, and how many responses of each status there ever were."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, Answered]] = deque(maxlen=_MOST)
        self.statuses: Counter[int] = Counter()

    def answered(self, answer: Answered) -> None:
        self._recent.append((self._clock(), answer))

    def responded(self, status: int) -> None:
        self.statuses[status] += 1

    def recent(self) -> list[Answered]:
        """Answers of the last minute, the oldest first."""
        since = self._clock() - _WINDOW
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()
        return [answer for _, answer in self._recent]
