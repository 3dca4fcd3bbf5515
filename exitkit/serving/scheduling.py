"""Requests of many clients through the stages' queues: each is answered when its own samples leave, not when a batch ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exitkit.common.checks import Count, NonNegative, check
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.engine import Engine, Prediction
from exitkit.engine.loop import Answers
from exitkit.engine.stage_queues import Place, Ran, StageQueues
from exitkit.methods.policy import ExitPolicy, Threshold
from exitkit.surgery.inputs import as_call


class UnavailableError(ExitkitError):
    """A request that is not taken now: too many wait already, or the scheduler is being closed. It may be sent again."""


class StageError(ExitkitError):
    """A stage that raised on a request's samples."""


@dataclass
class _Request:
    """One request: its samples' numbers, and the answers that have come."""

    rows: range
    future: asyncio.Future[Prediction]
    parts: list[tuple[int, Prediction]] = field(default_factory=list)

    def answer(self, row: int, part: Prediction) -> None:
        self.parts.append((row, part))
        if len(self.parts) == len(self.rows) and not self.future.done():
            in_order = [part for _, part in sorted(self.parts, key=lambda one: one[0])]
            columns = zip(*in_order, strict=True)
            self.future.set_result(part if len(in_order) == 1 else Prediction(*map(torch.cat, columns)))


class RequestScheduler:
    """Continuous scheduling: one worker thread runs one stage after another on samples of whatever requests wait before it.

    With recorded steps on a GPU requests wait before the first stage alone, and a batch is answered as a whole.

    It belongs to the event loop in which :meth:`answer` is first awaited, and to it alone; stages run beside it.

    Args:
        engine: what answers. Its monitor is told of answers at the engine's own policy.
        batch_size: how many samples a stage runs on at most.
        max_wait_ms: how long a sample may be held back for fuller batches, over all stages together. 0 is for the least
            latency where there is little traffic, more for throughput.
        max_queued: how many samples may be under way; a request beyond them is refused.

    Raises:
        ArgumentError: arguments out of range.
    """

    def __init__(
        self, engine: Engine, *, batch_size: int = 64, max_wait_ms: float = 2.0, max_queued: int = 1024
    ) -> None:
        check("batch_size", batch_size, Count)
        check("max_wait_ms", max_wait_ms, NonNegative)
        check("max_queued", max_queued, Count)
        self._own = self.engine = engine
        self.max_queued = max_queued
        self._queues = StageQueues(replace(engine.loop, timings=None), batch_size)
        self._patience = max_wait_ms / 1e3 / engine.loop.queues
        self._requests: dict[int, _Request] = {}
        self._samples = 0
        self._closing = False
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """How many samples are under way."""
        return len(self._requests)

    def set_policy(self, threshold: Threshold | None) -> None:
        """Another policy for what comes from now on, or None for the engine's own; what is under way keeps what it has.

        Under another policy the engine's monitor is told nothing: it compares with its own.

        Raises:
            ArgumentError: as for :meth:`exitkit.Engine.at`.
        """
        self.engine = self._own if threshold is None else self._own.at(threshold)

    async def answer(self, batch: Any, threshold: Threshold | None = None) -> Prediction:
        """Answer one request, with its answers on the CPU. Where the caller is cancelled, its samples leave the queues.

        Args:
            batch: inputs as the engine takes them, of any number of samples up to ``max_queued``.
            threshold: another τ than the engine's, for this request alone.

        Raises:
            ArgumentError: inputs that do not fit, more samples than are ever taken, or a threshold that does not fit.
            UnavailableError: too many samples under way, or the scheduler is being closed.
            StageError: a stage raised on these samples.
        """
        args, kwargs = as_call(batch)
        tensors = self.engine.inputs.checked(args, kwargs)
        engine = self.engine if threshold is None else self.engine.at(threshold)
        count = len(tensors[0])
        if not 0 < count <= self.max_queued:
            raise ArgumentError(
                f"a request of {count} samples; send at least one, and at most {self.max_queued} at once"
            )
        if self._closing:
            raise UnavailableError("the server is shutting down; send the request to another")
        if self.queued + count > self.max_queued:
            raise UnavailableError(
                f"{self.queued} samples are under way, and at most {self.max_queued} are taken; send the request again later"
            )
        request = self._accept(tensors, engine.policy)
        try:
            prediction = await request.future
        finally:
            for row in request.rows:
                self._requests.pop(row, None)
        return engine.noted(prediction)

    async def close(self) -> None:
        """Take nothing more, and return once everything under way has its answer."""
        self._closing = True
        self._woken.set()
        if self._task is not None:
            await self._task

    def _accept(self, tensors: Sequence[Tensor], policy: ExitPolicy) -> _Request:
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        batch = self._queues.loop.start(tensors, self._samples)
        batch.thresholds = np.tile(np.array(policy.thresholds), (len(batch), 1))
        rows = range(self._samples, self._samples + len(batch))
        self._samples = rows.stop
        request = _Request(rows, asyncio.get_running_loop().create_future())
        self._requests.update(dict.fromkeys(rows, request))
        self._queues.put(0, batch)
        self._woken.set()
        return request

    async def _work(self) -> None:
        """Stage after stage, until closed and empty; on a GPU on the stream that requests were put there on."""
        device = self.engine.inputs.device
        begin = partial(torch.cuda.set_stream, torch.cuda.current_stream(device)) if device.type == "cuda" else None
        with ThreadPoolExecutor(1, "exitkit-stages", begin) as worker:
            while not (self._closing and self._queues.oldest() is None):
                place = self._queues.ready(0.0 if self._closing else self._patience)
                if place is None:
                    await self._rest()
                else:
                    try:
                        await self._step(place, worker)
                    except Exception as error:  # what is left of a batch that cannot even be taken apart
                        self._fail(list(self._requests), error)

    async def _rest(self) -> None:
        """Until something comes, or has waited long enough."""
        oldest = self._queues.oldest()
        self._woken.clear()
        with suppress(TimeoutError):
            left = None if oldest is None else max(oldest + self._patience - time.monotonic(), 0.0)
            await asyncio.wait_for(self._woken.wait(), left)

    async def _step(self, place: Place, worker: ThreadPoolExecutor) -> None:
        taken = self._queues.take(place)
        wanted = [kept for batch in taken if (kept := self._queues.kept(batch, self._requests)) is not None]
        if not wanted:
            return
        ran, answers = await asyncio.get_running_loop().run_in_executor(worker, self._run, place.stage, wanted)
        for onward in ran.onward:
            self._queues.put(place.stage + 1, onward)
        for rows, prediction in answers:
            for at, row in enumerate(rows):
                if row in self._requests:
                    self._requests[row].answer(row, Prediction(*(column[at : at + 1] for column in prediction)))
        for failed, error in ran.failed:
            self._fail(failed.tolist(), error)

    def _run(self, stage: int, taken: list[Any]) -> tuple[Ran, list[tuple[list[int], Prediction]]]:
        """In the worker's thread."""
        ran = self._queues.run(stage, taken)
        return ran, [(one.rows.tolist(), _on_host(one, self.engine.loop.program.dtype)) for one in ran.answers]

    def _fail(self, rows: list[int], error: Exception) -> None:
        for row in rows:
            request = self._requests.get(row)
            if request is not None and not request.future.done():
                failure = StageError(f"the model failed on this request: {type(error).__name__}: {str(error)[:200]}")
                failure.__cause__ = error
                request.future.set_exception(failure)


def _on_host(answers: Answers, dtype: torch.dtype) -> Prediction:
    """Answers as tensors on the CPU."""
    return Prediction(
        answers.logits.to("cpu", dtype),
        torch.from_numpy(answers.exit),
        torch.from_numpy(answers.score),
        torch.from_numpy(answers.non_finite),
    )
