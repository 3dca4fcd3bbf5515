"""Answers by replaying recorded steps: a graph launch for each step, and a wait of the host for each decision.

How many samples go on is read on the device, and copied to the host for one thing alone: to choose the next bucket, or to
stop. So the host need not wait for a decision where a smaller bucket would not save more than that takes.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exitkit.common.errors import ArgumentError
from exitkit.engine.batch_state import BatchState
from exitkit.engine.cuda.buckets import SIZES, bucket_of, buckets_up_to
from exitkit.engine.cuda.buffers import Memory
from exitkit.engine.cuda.recorder import Record, Recorder, Run, UnrecordableError
from exitkit.engine.cuda.recordings import Kernels, Recordings
from exitkit.engine.loop import Answers, Loop, Prediction
from exitkit.engine.program import Program, Step
from exitkit.methods.policy import ExitPolicy

_SHAPES = 8
"""Input sizes (lengths of a text) that are recorded at most; others run step by step."""
_TRIES = 3
"""Calls in which a recording of an input size may fail: what another thread does may break one."""


class Graphs:
    """Recordings of one engine, for inputs of several sizes. One call at a time, whatever the threads and streams.

    Attributes:
        sizes: the buckets, ascending; fewer once memory did not suffice for the largest.
    """

    def __init__(self, largest: int, exits: int, device: torch.device, kernels: Kernels, record: Record) -> None:
        self.sizes = buckets_up_to(largest)
        self.device, self.kernels, self.record = device, kernels, record
        self.thresholds = torch.zeros(exits + 1, dtype=torch.float64, device=device)
        self.recordings: dict[Any, Recordings] = {}
        self._failures: Counter[Any] = Counter()
        self._memory: Memory | None = None
        self._lock = threading.Lock()
        self._policy: tuple[float, ...] | None = None
        self._warned = self._said_full = False
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        if self._done is not None:
            # τ's memory is still being zeroed on this stream, and the first call may be on another
            self._done.record(torch.cuda.current_stream(device))
            # memory that the device still writes to must not be given to others
            weakref.finalize(self, self._done.synchronize).atexit = False

    def answer(self, tensors: Sequence[Tensor], loop: Loop, waits: Sequence[bool]) -> Prediction | None:
        """Answer a batch of at most ``sizes[-1]`` samples; None where its steps cannot be recorded.

        Args:
            tensors: as the program takes them.
            loop: the program and the policy.
            waits: for each exit, whether the host waits for its decision.

        Raises:
            OutOfMemoryError: call :meth:`shrink`.
        """
        with self._turn():
            try:
                recordings = self._recordings(tensors, loop.program)
                if recordings is None or tensors[0].shape[0] > self.sizes[-1]:  # another thread may have shrunk them
                    return None
                self._set(loop.policy.thresholds)
                self._run(recordings, tensors, loop.program, waits)
                return Prediction(*(column.clone() for column in recordings.answers))  # the next call overwrites them
            except UnrecordableError as error:
                self._refuse(tensors, error)
                return None

    def shrink(self, batch: int) -> None:
        """Memory did not suffice for so many samples: at most half of them at a time from now on."""
        with self._turn():
            self.wait()  # for this engine alone: to wait for all of the device would break what others are recording
            self.recordings.clear()
            self._memory = None
            self.sizes = tuple(size for size in self.sizes if 2 * size <= batch) or self.sizes[:1]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"out of GPU memory on {batch} samples: at most {self.sizes[-1]} are answered at a time from now on",
                stacklevel=6,
            )

    def wait(self) -> None:
        """Wait until the device has done what it was given in this turn."""
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()

    def recorded(self, index: int, step: Step, values: Mapping[str, Any], count: int) -> Run | None:
        """A recorded step for these values of so many samples; None where there is none."""
        kept = self.recordings.values() if count <= self.sizes[-1] else ()
        found = (one.recorded(index, step, bucket_of(self.sizes, count), values, count) for one in kept)
        return next((run for run in found if run is not None), None)

    def decision(self) -> Run:
        """What a decision takes beside its step, which holds it: that the host learns how many samples go on."""
        count = self.thresholds.new_zeros(1)
        on_host = torch.zeros_like(count, device="cpu")
        on_host = on_host.pin_memory() if self.device.type == "cuda" else on_host

        def run() -> None:
            with self._turn():
                on_host.copy_(count, non_blocking=True)
                self.wait()

        return run

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call after another: threads by the lock, streams by an event."""
        with self._lock:
            if self._done is None:
                yield
                return
            index = self.device.index  # torch takes microseconds to see which GPU a torch.device is
            with torch.cuda.device(index):
                self._stream = torch.cuda.current_stream(index)  # asked once: that takes as long as a launch
                self._done.wait(self._stream)
                try:
                    yield
                finally:
                    self._done.record(self._stream)

    def _run(self, recordings: Recordings, tensors: Sequence[Tensor], program: Program, waits: Sequence[bool]) -> None:
        recordings.load(tensors)
        count, last = tensors[0].shape[0], len(program.steps) - 1
        for index, step in enumerate(program.steps):
            recordings.replay(index, step, bucket_of(self.sizes, count))
            if step.decides and index < last and waits[index]:
                self.wait()
                count = min(count, int(recordings.boundaries[index + 1].on_host))
                if count == 0:
                    return

    def _recordings(self, tensors: Sequence[Tensor], program: Program) -> Recordings | None:
        key = _key(tensors)
        if key not in self.recordings:
            if self._failures[key] >= _TRIES:
                return None
            if len(self.recordings) >= _SHAPES:
                self._say_full()
                return None
            if self._memory is None:
                self._memory = Memory(self.sizes[-1], self.device)
            inputs = tuple(tensor.new_zeros(1, *tensor.shape[1:]) for tensor in tensors)
            self.recordings[key] = Recordings(
                program, inputs, self._memory, self.kernels, self.record, self.thresholds
            )
        return self.recordings[key]

    def _say_full(self) -> None:
        if not self._said_full:
            self._said_full = True
            warnings.warn(
                f"inputs of more than {_SHAPES} sizes: further ones run step by step instead of from CUDA graphs, which is "
                "slower; pad texts to a few lengths",
                stacklevel=8,
            )

    def _refuse(self, tensors: Sequence[Tensor], error: UnrecordableError) -> None:
        """Run inputs of these sizes step by step from now on, once that has failed often enough."""
        key = _key(tensors)
        self._failures[key] += 1
        if self._failures[key] < _TRIES:
            return
        self.recordings.pop(key, None)  # with the memory that it holds
        warnings.warn(
            f"steps are run one by one instead of replayed from CUDA graphs, which is slower: {error}", stacklevel=7
        )

    def _set(self, thresholds: tuple[float, ...]) -> None:
        """τ to the device, where it is not there already."""
        if thresholds != self._policy:
            self._policy = None  # where the copy is interrupted, the next call makes it again
            values = torch.tensor([*thresholds, float("-inf")], dtype=torch.float64)
            self.thresholds.copy_(values.pin_memory() if self.device.type == "cuda" else values, non_blocking=True)
            self._policy = thresholds


@dataclass(frozen=True)
class GraphLoop(Loop):
    """A loop that answers by recordings, and step by step what cannot be recorded.

    Attributes:
        graphs: the recordings, shared by all loops over the same steps.
        waits: for each exit, whether the host waits for its decision; for all, by default.
    """

    graphs: Graphs | None = None
    waits: tuple[bool, ...] = ()

    @property
    def largest(self) -> int:
        return self._graphs.sizes[-1]

    @property
    def queues(self) -> int:
        """One, before the first step: recordings are of whole batches."""
        return 1

    @property
    def _graphs(self) -> Graphs:
        assert self.graphs is not None
        return self.graphs

    def warm(self, tensors: Sequence[Tensor], sizes: Sequence[int] | None) -> None:
        """Record every step at these sizes' buckets, the largest first; by default at all."""
        graphs = self._graphs
        staying = replace(self, policy=self.policy.at(float("inf")), waits=(False,) * len(self.policy.thresholds))
        buckets = {bucket_of(graphs.sizes, min(size, self.largest)) for size in sizes or graphs.sizes}
        for size in sorted(buckets, reverse=True):
            rows = torch.arange(size, device=tensors[0].device) % len(tensors[0])
            staying.answer([tensor[rows] for tensor in tensors])
        if tensors[0].is_cuda:
            torch.cuda.empty_cache()  # what the steps took before they were recorded

    def waiting(self, waits: tuple[bool, ...]) -> GraphLoop:
        return replace(self, waits=waits)

    def step_runner(self, index: int, batch: BatchState) -> Callable[[], Any]:
        recorded = self._graphs.recorded(index, self.program.steps[index], batch.values, len(batch))
        return recorded or super().step_runner(index, batch)

    def decision_runner(self, batch: BatchState, index: int, answer: Tensor, score: Tensor) -> Callable[[], Any]:
        return self._graphs.decision()

    def answer(self, tensors: Sequence[Tensor]) -> Prediction:
        count, most = tensors[0].shape[0], self.largest
        if not count:
            return super().answer(tensors)
        if self.program.inputs.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ArgumentError(
                "an engine cannot be recorded into a CUDA graph: it waits for its decisions, and replays graphs of its own. "
                "Record the model instead"
            )
        if count <= most:
            return self._part(tensors)
        parts = [self._part([tensor[start : start + most] for tensor in tensors]) for start in range(0, count, most)]
        return Prediction(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def run_queued(self, batch: BatchState, index: int) -> tuple[BatchState | None, list[Answers]]:
        """Run every step by its recording, or by itself where samples have thresholds that differ; all samples leave."""
        own = batch.thresholds
        if own is not None and (own != own[0]).any():
            return None, self.run_steps(batch)
        thresholds = self.policy.thresholds if own is None else tuple(own[0].tolist())
        # a policy is checked when it is made, which takes longer than a call
        loop = self if thresholds == self.policy.thresholds else replace(self, policy=self.policy.at(*thresholds))
        prediction = loop.answer([batch.values[name] for name in self.program.inputs.names])
        # exits are small integers, exact as numbers, so that the host waits for the device once
        exits, scores, faulty = torch.stack([column.double() for column in prediction[1:]]).cpu().numpy()
        return None, [Answers(batch.rows, exits.astype(np.int64), prediction.logits, scores, faulty.astype(np.bool_))]

    def _part(self, tensors: Sequence[Tensor]) -> Prediction:
        """Answers of at most ``largest`` samples; once memory does not suffice, fewer at a time."""
        graphs, waits = self._graphs, self.waits or (True,) * len(self.policy.thresholds)
        try:
            return graphs.answer(tensors, self, waits) or super().answer(tensors)
        except torch.OutOfMemoryError:
            if len(tensors[0]) == 1:
                raise
        graphs.shrink(len(tensors[0]))  # outside of the except, whose traceback keeps the failed batch's tensors
        return self.answer(tensors)


def graph_loop(program: Program, policy: ExitPolicy) -> GraphLoop:
    """A loop over compiled steps on a GPU; each is recorded when a bucket first comes to it."""
    from exitkit.engine.cuda import kernels

    device = program.inputs.device
    return GraphLoop(
        program, policy, graphs=Graphs(SIZES[-1], len(policy.thresholds), device, kernels, Recorder(device))
    )


def _key(tensors: Sequence[Tensor]) -> Any:
    return tuple(tuple(tensor.shape[1:]) for tensor in tensors)
