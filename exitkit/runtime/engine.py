"""The engine: a forward loop over the stages in which each sample stops at its exit, inside a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

import torch

from exitkit.criteria import Criterion
from exitkit.errors import ExitkitError, unknown_name
from exitkit.model import MultiExitModel
from exitkit.runtime.flight import Flight
from exitkit.runtime.refill import Refill
from exitkit.runtime.steps import Departure, Prediction, Steps
from exitkit.surgery.lower import Lowered


@dataclass(frozen=True)
class Engine:
    """What :func:`compile` returns; call it as the model. Thread-safe: nothing is kept between calls."""

    steps: Steps

    @property
    def lowered(self) -> Lowered:
        """The backbone's stages."""
        return self.steps.lowered

    @property
    def thresholds(self) -> tuple[float, ...]:
        """τ of each exit before the backbone."""
        return self.steps.thresholds

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction:
        """Answer a batch. Takes what the model takes, of the sizes it was attached with, and any number of samples.

        Raises:
            ExitkitError: other tensors than the model was attached with: names, sizes, dtype or device.
        """
        tensors = self.steps.checked(args, kwargs)
        with torch.inference_mode():
            if not len(tensors[0]):
                return self.steps.landed([], 0)
            flight: Flight | None = self.steps.enter(tensors)
            departures: list[Departure] = []
            for stage in range(len(self.steps.lowered.stages)):
                if flight is not None:
                    flight, departed = self.steps.advance(flight, stage)
                    departures += departed
            return self.steps.landed(departures, len(tensors[0]))

    def map(
        self, batches: Iterable[Any], batch_size: int = 64, max_wait: float = float("inf")
    ) -> Iterator[Prediction]:
        """Answer many batches with every stage as full as it can be: throughput rather than latency.

        Samples of different batches wait together before each stage until there are ``batch_size`` of them.

        Args:
            batches: a loader or any iterable of inputs, ``(inputs, labels)`` or dicts.
            batch_size: how many samples a stage runs on at once.
            max_wait: seconds after which an unanswered batch is no longer held back for fuller stages.

        Yields:
            A :class:`Prediction` for each batch, in order. Memory is bounded by a fixed number of batches under way.

        Raises:
            ExitkitError: inputs of another kind, or a stage failed; the message names the batch.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ExitkitError(f"batch_size={batch_size!r} must be a whole number greater than 0")
        if not max_wait >= 0:
            raise ExitkitError(f"max_wait={max_wait!r} must be a number of seconds of at least 0")
        return Refill(self.steps, batch_size, max_wait).run(batches)


def compile(
    model: MultiExitModel,
    threshold: float | Sequence[float] | None = None,
    *,
    criterion: Criterion | None = None,
) -> Engine:
    """An engine that really stops each sample at its exit.

    Args:
        model: what :func:`exitkit.attach` returned. Its weights are shared; it runs in eval mode.
        threshold: τ, or one τ for each exit before the backbone; by default the one saved with the model. A sample leaves
            at the first exit whose score is strictly above it.
        criterion: ``"confidence"``, ``"entropy"``, ``"margin"`` or ``"patience"``; by default the method's.

    Raises:
        ExitkitError: not a multi-exit model, no threshold, one of the wrong length or that is no number, an unknown
            criterion.
    """
    if not isinstance(model, MultiExitModel):
        raise ExitkitError(f"model is {type(model).__name__}; compile takes what exitkit.attach(model) returns")
    criterion = criterion or model.method.criterion
    if criterion not in get_args(Criterion):
        raise unknown_name("criterion", criterion, get_args(Criterion))
    thresholds = _thresholds(model, model.threshold if threshold is None else threshold)
    return Engine(Steps(model, model.lower(), thresholds, criterion))


def _thresholds(model: MultiExitModel, threshold: Any) -> tuple[float, ...]:
    exits = len(model.classifiers)
    if threshold is None:
        raise ExitkitError(
            "threshold=None, and none was saved with the model; choose one on held-out samples: "
            "exitkit.collect(ee, loader).curve().at_budget(0.5).threshold"
        )
    values = [threshold] * exits if isinstance(threshold, Real) else list(threshold)
    if len(values) != exits:
        raise ExitkitError(f"threshold has {len(values)} values; give one τ, or one for each of the {exits} exits")
    for value in values:
        if not isinstance(value, Real) or isinstance(value, bool) or value != value:
            raise ExitkitError(f"threshold holds {value!r}; τ is a number")
    return tuple(float(value) for value in values)
