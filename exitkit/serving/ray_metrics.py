"""What a replica tells Prometheus, through Ray's endpoint."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from exitkit.serving.statistics import Answered

if TYPE_CHECKING:
    from exitkit.serving.service import Service

_BOUNDARIES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
"""Of latencies, in milliseconds."""
_EVERY = 1.0
"""Seconds between two looks at the monitor and the queues."""


class RayMetrics:
    """Counts answers and responses. Ray adds ``ray_`` before each name, and which replica it was."""

    def __init__(self, model: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        def tagged(kind: Any, name: str, words: str, *keys: str, **more: Any) -> Any:
            metric = kind(name, description=words, tag_keys=("model", *keys), **more)
            metric.set_default_tags({"model": model})
            return metric

        self._responses = tagged(Counter, "exitkit_responses", "Responses by HTTP status", "status")
        self._answers = tagged(Counter, "exitkit_answers", "Samples answered, by the exit they left at", "exit")
        self._saved = tagged(Counter, "exitkit_macs_saved", "MACs saved, in forwards of the backbone")
        self._latency = tagged(
            Histogram, "exitkit_latency_ms", "Milliseconds to the answer, by exit", "exit", boundaries=_BOUNDARIES
        )
        self._queued = tagged(Gauge, "exitkit_queued", "Samples under way")
        self._p_value = tagged(Gauge, "exitkit_shift_p_value", "The shift monitor's smallest p-value")
        self._alarm = tagged(Gauge, "exitkit_shift_alarm", "1 once a shift was seen")
        self._observed = 0.0

    def answered(self, answer: Answered) -> None:
        tags = {"exit": str(answer.exit)}
        self._answers.inc(1, tags)
        self._latency.observe(answer.milliseconds, tags)
        if answer.cost is not None and answer.cost < 1:
            self._saved.inc(1 - answer.cost)

    def responded(self, status: int) -> None:
        self._responses.inc(1, {"status": str(status)})

    def observe(self, service: Service) -> None:
        """Queues and monitor as they are, at most once a second."""
        if time.monotonic() - self._observed < _EVERY:
            return
        self._observed = time.monotonic()
        self._queued.set(service.scheduler.queued)
        if service.engine.monitor is not None:
            report = service.engine.monitor.report()
            self._p_value.set(min(report.p_values.values(), default=1.0))
            self._alarm.set(float(report.fired_at is not None))
