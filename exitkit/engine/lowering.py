"""From a multi-exit model to a program: each stage joined with its exit into one function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.engine.program import Inputs, Program, Step
from exitkit.exits.standardised import FoldedLinear, replaced
from exitkit.methods.criteria import Criterion
from exitkit.methods.policy import ExitPolicy
from exitkit.multi_exit.model import MultiExitModel
from exitkit.multi_exit.text_length import learned_positions
from exitkit.surgery.partition import Partition, Stage

CARRIED, ANSWERS = "exit.carried", "exit.answers"
"""What exits hand on: what the last head carries on (B, K), and every log-probability (B, exits so far, C). What a criterion
remembers has the criterion's own names."""


class ScoredExit(nn.Module):
    """An exit: the head, the ensemble and the score.

    Args:
        classifier: the head, or None behind the last stage, whose result is the backbone's own logits.
        combiner: the method's ensemble up to here, if it has one.
        criterion: how the answer is scored.
        temperature: what the answer's log-probabilities are divided by for the score, or None.
        head_inputs: the model's inputs that the head reads, by value name.
    """

    def __init__(
        self,
        classifier: nn.Module | None,
        combiner: nn.Module | None,
        criterion: Criterion,
        temperature: float | None,
        head_inputs: Sequence[str],
    ) -> None:
        super().__init__()
        self.classifier, self.combiner = classifier, combiner
        self.shared = getattr(classifier, "shared", None)  # registered with one exit, read by all
        self.criterion, self.temperature = criterion, temperature
        self.head_inputs = tuple(head_inputs)

    def forward(self, feature: Tensor, named: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Answer (B, C) and score (B,) from the stage's feature; what is handed on is added to ``named``."""
        logits = feature
        if self.classifier is not None:
            read = [named[name] for name in self.head_inputs]
            logits, named[CARRIED] = cast("Any", self.classifier).step(feature, named.get(CARRIED), read)[:2]
        answer = self._combined(logits, named)
        return answer, self._score(answer, named)

    def _combined(self, logits: Tensor, named: dict[str, Any]) -> Tensor:
        """The exit's answer, as :meth:`MultiExitModel.combine` gives it, from the answers handed on."""
        if self.combiner is None:
            return logits
        own = F.log_softmax(logits.float(), dim=-1).unsqueeze(1)
        named[ANSWERS] = torch.cat([named[ANSWERS], own], 1) if ANSWERS in named else own
        answer: Tensor = self.combiner(named[ANSWERS])
        return answer

    def _score(self, answer: Tensor, named: dict[str, Any]) -> Tensor:
        scored = answer.float()
        if not self.criterion.regression:
            scored = F.log_softmax(scored, dim=-1)
            if self.temperature is not None:  # as ExitOutputs.calibrated, to the bit
                scored = F.log_softmax(scored / self.temperature, dim=-1)
        names = remembered(self.criterion)
        score, memory = self.criterion.step(scored, tuple(named[name] for name in names if name in named))
        named.update(zip(names, memory, strict=True))
        return score


class StageWithExit(nn.Module):
    """A stage and the exit behind it, if it has one: what a :class:`Step` runs. ``inputs``, ``outputs``: as there."""

    def __init__(self, stage: Stage, exit_: ScoredExit | None, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.stage = stage.module
        self.stage_inputs, self.stage_outputs = stage.inputs, stage.outputs
        self.exit = exit_
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.made_for = self._kinds()

    def converted(self) -> bool:
        """Whether the model, whose weights are shared, was converted or moved since."""
        return self.made_for != self._kinds()

    def _kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(parameter.dtype, parameter.device) for parameter in self.parameters()]

    def forward(self, *values: Any) -> tuple[Any, ...]:
        named = dict(zip(self.inputs, values, strict=True))
        made = self.stage(*(named[name] for name in self.stage_inputs))
        named.update(zip(self.stage_outputs, made, strict=True))
        answer = () if self.exit is None else self.exit(made[0], named)
        return (*(named[name] for name in self.outputs), *answer)


def remembered(criterion: Criterion) -> tuple[str, ...]:
    """The values that a criterion hands from exit to exit, by name."""
    return tuple(f"exit.{name}" for name in criterion.memory)


def program_of(model: MultiExitModel, policy: ExitPolicy, removable: bool = False) -> Program:
    """The model's stages and exits as a program; weights are shared.

    Args:
        model: in any mode; the program runs in eval mode.
        policy: how answers are scored.
        removable: keep every step without its exit too, for :meth:`Program.without`; for independent exits only.
    """
    partition, criterion = model.partition(), policy.score
    names = dict(zip(model.example.spec.keys, partition.inputs, strict=True))
    reads = [[names[key] for key in spec.inputs] for spec in model.specs] + [[]]
    classifiers = [*map(_folded, _in_eval(model.classifiers)), None]
    combiners = [*_in_eval(model.combiners), *(None for _ in classifiers)]
    temperatures = policy.temperatures or (None,) * len(classifiers)
    steps: list[Step] = []
    needed: set[str] = set()
    for m in reversed(range(len(classifiers))):
        stage, state_in, state_out = partition.stages[m], _state(model, criterion, m), _state(model, criterion, m + 1)
        inputs = tuple(dict.fromkeys([*stage.inputs, *reads[m], *state_in]))
        outputs = tuple(name for name in (*stage.outputs, *state_out) if name in needed)
        scored = ScoredExit(classifiers[m], combiners[m], criterion, temperatures[m], reads[m])
        bare = StageWithExit(stage, None, inputs, outputs) if removable and classifiers[m] is not None else None
        run = StageWithExit(stage, scored, inputs, outputs)
        steps.append(Step(run, m, True, inputs, outputs, tuple(sorted(needed)), bare))
        needed = (needed - set(outputs)) | set(inputs)
    state = (CARRIED, ANSWERS, *remembered(criterion))
    return Program(
        _inputs(model, partition),
        tuple(reversed(steps)),
        partition.axes | dict.fromkeys(state, 0),
        partition.dynamic | dict.fromkeys(state, (0,)),
        model.num_classes,
        torch.promote_types(model.dtype, torch.float32 if model.combiners else model.dtype),
    )


def _in_eval(modules: nn.ModuleList) -> list[nn.Module]:
    """The modules in eval mode, their weights shared and their own mode left alone."""
    tensors = (*modules.parameters(), *modules.buffers())
    return list(deepcopy(modules, {id(tensor): tensor for tensor in tensors}).eval())


def _folded(classifier: nn.Module) -> nn.Module:
    replaced(classifier, lambda _, learned: FoldedLinear(learned))
    return classifier


def _inputs(model: MultiExitModel, partition: Partition) -> Inputs:
    tensors = model.example.tensors
    weights = chain.from_iterable(stage.module.parameters() for stage in partition.stages)
    return Inputs(
        model.example.spec,
        partition.inputs,
        partition.sizes,
        tuple(tensor.dtype for tensor in tensors),
        partition.tables,
        next(model.parameters()).device,
        learned_positions(model.backbone, weights) if model.example.text else None,
    )


def _state(model: MultiExitModel, criterion: Criterion, m: int) -> tuple[str, ...]:
    """What exit ``m`` takes over from those before it."""
    if m == 0:
        return ()
    linked = (model.method.cascade or model.method.past_future is not None) and m < len(model.classifiers)
    ensemble = m < len(model.combiners)
    return (CARRIED,) * linked + (ANSWERS,) * ensemble + remembered(criterion)
