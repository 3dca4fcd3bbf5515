"""One loaded package that answers requests: its scheduler, its policy, its monitor, and what it has seen."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exitkit.calibration.monitor import ShiftMonitor
from exitkit.common.errors import ArgumentError
from exitkit.engine import Engine, Prediction
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.methods.policy import ExitPolicy, Threshold
from exitkit.multi_exit.preprocessing import ImagePreprocessing, TextPreprocessing
from exitkit.packages import load
from exitkit.serving.protocol import finite
from exitkit.serving.scheduling import RequestScheduler
from exitkit.serving.settings import Settings
from exitkit.serving.statistics import Answered, LastMinute, Observer

_FALSE_ALARM = 1e-4
"""Over the life of all replicas together."""


@dataclass(frozen=True)
class Reply:
    """A prediction, how long it took from the request's arrival, and whether the package's guarantee covers it."""

    prediction: Prediction
    milliseconds: float
    guaranteed: bool


class Service:
    """What the routes call. It belongs to one event loop.

    Args:
        engine: what answers, with its monitor where it has one.
        settings: limits and names.
        observers: are told of every answer and every status.
    """

    def __init__(self, engine: Engine, settings: Settings, observers: Sequence[Observer] = ()) -> None:
        self.engine, self.settings = engine, settings
        self.scheduler = RequestScheduler(
            engine, batch_size=settings.batch_size, max_wait_ms=settings.max_wait_ms, max_queued=settings.max_queued
        )
        self.last_minute = LastMinute()
        self.observers = (self.last_minute, *observers)
        self.set_threshold(settings.threshold)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes."""
        return None if self.engine.description is None else self.engine.description.labels

    def set_threshold(self, threshold: Threshold | None) -> None:
        """Another policy for what comes from now on; None for the package's own, with its guarantee.

        Raises:
            ArgumentError: as for :meth:`exitkit.Engine.at`.
        """
        self.scheduler.set_policy(threshold)

    async def answer(self, batch: Any, threshold: Threshold | None = None) -> Reply:
        """As :meth:`RequestScheduler.answer`, timed and noted.

        Raises:
            TimeoutError: it took longer than ``settings.timeout_s``; its samples have left the queues.
        """
        began, own = time.perf_counter(), self.scheduler.engine.policy  # a request keeps the policy that it came under
        async with asyncio.timeout(self.settings.timeout_s):
            prediction = await self.scheduler.answer(batch, threshold)
        milliseconds = 1e3 * (time.perf_counter() - began)
        for exit_ in prediction.exit.tolist():
            for observer in self.observers:
                observer.answered(Answered(exit_, milliseconds, self.cost(exit_)))
        return Reply(prediction, milliseconds, threshold is None and self._holds(own))

    def cost(self, exit_: int) -> float | None:
        """What a sample that leaves there costs, as a share of the backbone's MACs."""
        return None if self.engine.description is None else self.engine.description.exits[exit_][1]

    @property
    def guaranteed(self) -> bool:
        """Whether the package's guarantee holds now: its own policy is served, and no shift was seen."""
        return self._holds(self.scheduler.engine.policy)

    def _holds(self, policy: ExitPolicy) -> bool:
        """Whether a policy's guarantee holds: it has one, and no shift was seen."""
        monitor = self.engine.monitor
        return policy.guarantee is not None and (monitor is None or not monitor.alarm)

    def status(self) -> dict[str, Any]:
        """What the page shows: the model, its policy, and the last minute and the monitor of this one of the replicas."""
        preprocessing = None if self.engine.description is None else self.engine.description.preprocessing
        kinds = {ImagePreprocessing: "image", TextPreprocessing: "text"}
        policy, guarantee = self.scheduler.engine.policy, self.engine.policy.guarantee
        recent = self.last_minute.recent()
        exits = [0] * (len(policy.thresholds) + 1)
        for one in recent:
            exits[one.exit] += 1
        times = sorted(one.milliseconds for one in recent)
        return {
            "name": self.settings.name,
            "takes": kinds.get(type(preprocessing), "tensors"),
            "labels": self.labels,
            "criterion": policy.criterion,
            "thresholds": finite(policy.thresholds),
            "range": _range(policy, self.engine.loop.program.num_classes),
            "costs": [self.cost(exit_) for exit_ in range(len(exits))],
            "guarantee": None if guarantee is None else {"words": guarantee.words, "holds": self.guaranteed},
            "replicas": self.settings.replicas,
            "queued": self.scheduler.queued,
            "last_minute": {
                "answers": len(recent),
                "exits": exits,
                "median_ms": times[len(times) // 2] if times else None,
            },
            "monitor": self._monitor(),
        }

    def _monitor(self) -> dict[str, Any] | None:
        if self.engine.monitor is None:
            return None
        report = self.engine.monitor.report()
        return {
            "samples": report.samples,
            "alarm": report.fired_at is not None,
            "p_values": report.p_values,
            "level": report.level,
        }


def _range(policy: ExitPolicy, classes: int) -> list[float]:
    """The least and the largest τ that mean something for the policy's scores."""
    try:
        values = policy.score.grid(len(policy.thresholds), classes).tolist()
    except ArgumentError:  # the criterion's class is not imported here
        values = [*filter(math.isfinite, policy.thresholds), 0.0, 1.0]
    return [min(values), max(values)]


def load_service(settings: Settings, observers: Sequence[Observer] = ()) -> Service:
    """The service that the settings describe.

    Raises:
        ExitkitError: what :func:`exitkit.load` refuses, a single ``.onnx``, calibration outputs of another model or policy.
    """
    engine = load(settings.package, device=settings.device, trust=settings.trust)
    if not isinstance(engine, Engine):
        raise ArgumentError(
            f"package={settings.package!r} is one graph that answers one sample after another, and cannot be scheduled; "
            "export it as .pt2, or as .onnx.zip"
        )
    if settings.calibration is not None:
        level = _FALSE_ALARM / settings.replicas
        engine = engine.watched(ShiftMonitor(ExitOutputs.load(settings.calibration), engine.policy, false_alarm=level))
    return Service(engine, settings, observers)
