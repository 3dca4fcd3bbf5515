"""From a multi-exit model to a program: each stage joined with its exit into one function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.engine.program import Inputs, Program, Step
from exitkit.methods.criteria import CRITERIA, Criterion, tolerance
from exitkit.methods.scaled import Temperatures
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.partition import Partition, Stage

CARRIED, ANSWERS, LATEST, AGREED, HISTORY = (
    f"exit.{name}" for name in ("carried", "answers", "latest", "agreed", "history")
)
"""What exits pass on: what the last head carries on (B, K), every log-probability (B, exits so far, C), the last class and
how many exits in a row gave it (B,), and the last predictions (B, some) of a regression."""
_STATE = CARRIED, ANSWERS, LATEST, AGREED, HISTORY


class StageWithExit(nn.Module):
    """A stage, the head behind it, the ensemble and the score: what a :class:`Step` runs.

    Args:
        stage: of the partition backbone.
        classifier: the head, or None after the last stage, whose result is the backbone's own logits.
        combiner: the method's ensemble up to here, if it has one.
        criterion: how the answer is scored.
        times: for the criterion ``"tolerance"``, how many changes in a row must be small.
        temperature: what the answer's log-probabilities are divided by for the score, or None.
        head_inputs: the model's inputs that the head reads, by value name.
        inputs, outputs: as a :class:`Step` has them.
        decides: whether anyone may leave here; without, the stage runs alone.
    """

    def __init__(
        self,
        stage: Stage,
        classifier: nn.Module | None,
        combiner: nn.Module | None,
        criterion: Criterion,
        times: int,
        temperature: float | None,
        head_inputs: Sequence[str],
        inputs: Sequence[str],
        outputs: Sequence[str],
        decides: bool,
    ) -> None:
        super().__init__()
        self.stage = stage.module
        self.stage_inputs, self.stage_outputs = stage.inputs, stage.outputs
        self.classifier, self.combiner = classifier, combiner
        self.shared = getattr(classifier, "shared", None)  # registered with one exit, read by all
        self.criterion, self.times, self.temperature = criterion, times, temperature
        self.head_inputs = tuple(head_inputs)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.decides = decides

    def forward(self, *values: Any) -> tuple[Any, ...]:
        named = dict(zip(self.inputs, values, strict=True))
        made = self.stage(*(named[name] for name in self.stage_inputs))
        named.update(zip(self.stage_outputs, made, strict=True))
        verdict = self.leave(made[0], named) if self.decides else ()
        return (*(named[name] for name in self.outputs), *verdict)

    def leave(self, feature: Tensor, named: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The exit alone: its answer and score from the stage's feature; what it passes on is added to ``named``."""
        logits = feature
        if self.classifier is not None:
            read = [named[name] for name in self.head_inputs]
            logits, named[CARRIED] = cast("Any", self.classifier).step(feature, named.get(CARRIED), read)[:2]
        answer = self._combined(logits, named)
        return answer, self._score(answer, named)

    def _combined(self, logits: Tensor, named: dict[str, Any]) -> Tensor:
        """The exit's answer, as :meth:`MultiExitModel.combine` gives it, from the answers carried along."""
        if self.combiner is None:
            return logits
        own = F.log_softmax(logits.float(), dim=-1).unsqueeze(1)
        named[ANSWERS] = torch.cat([named[ANSWERS], own], 1) if ANSWERS in named else own
        answer: Tensor = self.combiner(named[ANSWERS])
        return answer

    def _score(self, answer: Tensor, named: dict[str, Any]) -> Tensor:
        if self.criterion == "tolerance":
            seen = torch.cat([named[HISTORY], answer.float()], 1) if HISTORY in named else answer.float()
            named[HISTORY] = seen[:, -self.times - 1 :]
            return tolerance(named[HISTORY], self.times)[:, -1]
        log_probs = F.log_softmax(answer.float(), dim=-1)
        if self.temperature is not None:  # as ExitOutputs.calibrated, to the bit
            log_probs = F.log_softmax(log_probs / self.temperature, dim=-1)
        if self.criterion != "patience":
            return CRITERIA[self.criterion](log_probs)
        latest = log_probs.argmax(-1)
        agreed = torch.ones_like(latest)
        if LATEST in named:
            agreed = torch.where(latest == named[LATEST], named[AGREED] + 1, agreed)
        named[LATEST], named[AGREED] = latest, agreed
        return agreed.float()


def _in_eval(modules: nn.ModuleList) -> list[nn.Module]:
    """The modules in eval mode, their weights shared and their own mode left alone."""
    tensors = (*modules.parameters(), *modules.buffers())
    return list(deepcopy(modules, {id(tensor): tensor for tensor in tensors}).eval())


def program_of(
    model: MultiExitModel,
    criterion: Criterion,
    temperatures: Temperatures | None = None,
    skipped: Sequence[int] = (),
) -> Program:
    """The model's stages and exits as a program, without the exits ``skipped``; weights are shared."""
    partition = model.partition()
    names = dict(zip(model.example.spec.keys, partition.inputs, strict=True))
    reads = [[names[key] for key in spec.inputs] for spec in model.specs] + [[]]
    classifiers = [*_in_eval(model.classifiers), None]
    combiners = [*_in_eval(model.combiners), *(None for _ in classifiers)]
    steps: list[Step] = []
    needed: set[str] = set()
    for m in reversed(range(len(classifiers))):
        stage, state_in, state_out = partition.stages[m], _state(model, criterion, m), _state(model, criterion, m + 1)
        inputs = tuple(dict.fromkeys([*stage.inputs, *reads[m], *state_in]))
        outputs = tuple(name for name in (*stage.outputs, *state_out) if name in needed)
        temperature = None if temperatures is None else temperatures[m]
        parts = stage, classifiers[m], combiners[m], criterion, model.method.times, temperature, reads[m]
        run = StageWithExit(*parts, inputs, outputs, decides=m not in skipped)
        steps.append(Step(run, m, m not in skipped, inputs, outputs, tuple(sorted(needed))))
        needed = (needed - set(outputs)) | set(inputs)
    return Program(
        _inputs(model, partition),
        tuple(reversed(steps)),
        partition.axes | dict.fromkeys(_STATE, 0),
        partition.dynamic | dict.fromkeys(_STATE, (0,)),
        criterion,
        model.num_classes,
        dtype_of(model),
        temperatures,
    )


def dtype_of(model: MultiExitModel) -> str:
    """What the exits compute in, ``"float32"``."""
    return str(next(model.classifiers.parameters()).dtype).removeprefix("torch.")


def _inputs(model: MultiExitModel, partition: Partition) -> Inputs:
    tensors = model.example.tensors
    return Inputs(
        model.example.spec,
        partition.inputs,
        partition.sizes,
        tuple(tensor.dtype for tensor in tensors),
        next(model.parameters()).device,
    )


def _state(model: MultiExitModel, criterion: Criterion, m: int) -> tuple[str, ...]:
    """What exit ``m`` takes over from those before it."""
    if m == 0:
        return ()
    linked = (model.method.cascade or model.method.past_future is not None) and m < len(model.classifiers)
    ensemble = m < len(model.combiners)
    counted = {"patience": (LATEST, AGREED), "tolerance": (HISTORY,)}
    return (CARRIED,) * linked + (ANSWERS,) * ensemble + counted.get(criterion, ())
