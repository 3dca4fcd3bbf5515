"""The loop's steps: one stage and its exit, for the samples that are still under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from exitkit.criteria import CRITERIA, Criterion
from exitkit.errors import ExitkitError
from exitkit.model import MultiExitModel
from exitkit.runtime.flight import Flight
from exitkit.surgery.lower import Lowered


class Prediction(NamedTuple):
    """The answers of a batch, in the caller's order.

    Attributes:
        logits: (B, C), each sample's from the exit at which it left, after the method's ensemble.
        exit: (B,) int64, that exit; M is the backbone's own classifier.
        score: (B,) float32, how sure that exit was.
        non_finite: (B,) bool, samples with a score that was not finite somewhere; such a score never lets one leave.
    """

    logits: Tensor
    exit: Tensor
    score: Tensor
    non_finite: Tensor


class Departure(NamedTuple):
    """Samples that have just got their answer at exit ``exit``; ``rows`` are the callers' numbers."""

    rows: Tensor
    exit: int
    logits: Tensor
    score: Tensor
    non_finite: Tensor


@dataclass(frozen=True)
class Steps:
    """What the engine does with a flight of samples, stage by stage. Keeps nothing between calls.

    Attributes:
        model: the multi-exit model whose weights it shares.
        lowered: the backbone's stages.
        thresholds: τ of each exit before the backbone.
        criterion: the score compared with it.
    """

    model: MultiExitModel
    lowered: Lowered
    thresholds: tuple[float, ...]
    criterion: Criterion

    def enter(self, tensors: Sequence[Tensor], first: int = 0) -> Flight:
        """A flight of new samples before stage 0, numbered from ``first``."""
        rows = torch.arange(first, first + len(tensors[0]), device=tensors[0].device)
        read = {key for spec in self.model.specs for key in spec.inputs}
        inputs = {
            key: tensor for key, tensor in zip(self.model.example.spec.keys, tensors, strict=True) if key in read
        }
        values = dict(zip(self.lowered.inputs, tensors, strict=True))
        return Flight(rows, values, inputs, torch.zeros(len(rows), dtype=torch.bool, device=rows.device))

    def advance(self, flight: Flight, stage: int) -> tuple[Flight | None, list[Departure]]:
        """Run one stage and its exit: the samples that go on (None: nobody), and those that leave."""
        feature = self._run(flight, stage)
        final = stage == len(self.lowered.stages) - 1
        logits = feature if final else self._head(flight, stage, feature)
        answer = self._combine(flight, stage, logits)
        score = self._score(flight, answer)
        flight.non_finite = flight.non_finite | ~score.isfinite()
        if final:
            return None, [Departure(flight.rows, stage, answer, score, flight.non_finite)]
        leaves = score.double() > self.thresholds[stage]
        stay = torch.nonzero(~leaves).squeeze(1)
        if len(stay) == len(flight):
            return flight, []
        go = torch.nonzero(leaves).squeeze(1)
        departure = Departure(flight.rows[go], stage, answer[go], score[go], flight.non_finite[go])
        return (flight.select(stay, self.lowered.axes) if len(stay) else None), [departure]

    def landed(self, departures: Sequence[Departure], count: int, first: int = 0) -> Prediction:
        """The answers of the samples numbered from ``first``, in order."""
        if not departures:
            return self._blank(0, next(self.model.parameters()).device)
        device = departures[0].rows.device
        logits = departures[0].logits.new_empty(count, self.model.num_classes)
        result = self._blank(count, device)._replace(logits=logits)
        for rows, exit_, answer, score, non_finite in departures:
            result.logits[rows - first] = answer.to(logits.dtype)
            result.exit[rows - first] = exit_
            result.score[rows - first] = score
            result.non_finite[rows - first] = non_finite
        return result

    def _blank(self, count: int, device: torch.device) -> Prediction:
        logits = torch.empty(count, self.model.num_classes, device=device)
        exits = torch.zeros(count, dtype=torch.int64, device=device)
        return Prediction(logits, exits, torch.zeros(count, device=device), exits.bool())

    def _run(self, flight: Flight, index: int) -> Tensor:
        stage = self.lowered.stages[index]
        outputs = stage.module(*(flight.values[name] for name in stage.inputs))
        values = flight.values | dict(zip(stage.outputs, outputs, strict=True))
        flight.values = {name: values[name] for name in stage.live}
        feature: Tensor = outputs[0]
        return feature

    def _head(self, flight: Flight, index: int, feature: Tensor) -> Tensor:
        inputs = [flight.inputs[key] for key in self.model.specs[index].inputs]
        logits: Tensor = self.model.classifiers[index](feature, flight.previous, inputs)
        flight.previous = logits
        return logits

    def _combine(self, flight: Flight, index: int, logits: Tensor) -> Tensor:
        """The exit's answer, as :meth:`MultiExitModel.combine` gives it, from the answers carried along."""
        combiners = self.model.combiners
        if not combiners:
            return logits
        flight.answers.append(F.log_softmax(logits.float(), dim=-1))
        if index >= len(combiners):
            return logits
        answer: Tensor = combiners[index](torch.stack(flight.answers, dim=1))
        return answer

    def _score(self, flight: Flight, answer: Tensor) -> Tensor:
        log_probs = F.log_softmax(answer.float(), dim=-1)
        if self.criterion != "patience":
            return CRITERIA[self.criterion](log_probs)
        latest = log_probs.argmax(-1)
        if flight.last is None or flight.count is None:
            flight.count = torch.ones_like(latest)
        else:
            flight.count = torch.where(latest == flight.last, flight.count + 1, 1)
        flight.last = latest
        return flight.count.float()

    def checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of a call, in the order the model was attached with, refused if they are of another kind."""
        spec, examples = self.model.example.spec, self.model.example.tensors
        tensors = spec.tensors(kwargs or args)
        device = next(self.model.parameters()).device
        for key, tensor, example in zip(spec.keys, tensors, examples, strict=True):
            sizes = (
                (tensor.shape[2:], example.shape[2:])
                if self.model.example.text
                else (tensor.shape[1:], example.shape[1:])
            )
            if tensor.dim() != example.dim() or sizes[0] != sizes[1] or len(tensor) != len(tensors[0]):
                raise ExitkitError(
                    f"input {key!r} has shape {tuple(tensor.shape)}; the engine was compiled for "
                    f"(batch, {', '.join(map(str, example.shape[1:]))}), the same batch in every input. Resize it, or attach "
                    "with example_inputs of this size"
                )
            if tensor.dtype != example.dtype or tensor.device != device:
                raise ExitkitError(
                    f"input {key!r} is {tensor.dtype} on {tensor.device}; the engine takes {example.dtype} on {device}: "
                    f"call .to({str(device)!r}, {example.dtype})"
                )
        return tensors
