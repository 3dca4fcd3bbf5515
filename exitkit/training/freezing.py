"""Freezing, stage by stage: parameters without gradient, BatchNorm and dropout in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from exitkit.common.errors import ArgumentError
from exitkit.exits.gpf import PastFutureClassifier
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import BACKBONE
from exitkit.surgery.hooks import alone
from exitkit.surgery.liveness import submodule
from exitkit.training.regimes import Phase


@dataclass(frozen=True)
class Stages:
    """Which of the backbone's parts belong to which stage.

    Attributes:
        parameters: those that a stage is the first to read and that the user lets learn (``requires_grad`` before the
            run, so that what the user froze stays frozen).
        modules: those that are called in a stage, containers included.
        shared: names of parameters that several stages read.
    """

    parameters: tuple[tuple[nn.Parameter, ...], ...]
    modules: tuple[frozenset[nn.Module], ...]
    shared: tuple[str, ...]


def stages_of(model: MultiExitModel) -> Stages:
    """Read off the captured graph, split at the exits. A parameter that no stage reads belongs to none.

    Raises:
        ArgumentError: the user has frozen every parameter of the backbone.
    """
    graphs = [stage.module for stage in model.partition().stages]
    names = {parameter: name for name, parameter in model.backbone.named_parameters()}
    readers: dict[nn.Parameter, list[int]] = {}
    for stage, graph in enumerate(graphs):
        for parameter in graph.parameters():
            readers.setdefault(parameter, []).append(stage)
    learns = {parameter: stages for parameter, stages in readers.items() if parameter.requires_grad}
    if not learns:
        raise ArgumentError(
            "this regime trains the backbone, but none of its parameters has requires_grad=True; "
            "call model.backbone.requires_grad_(True), or use regime='disjoint'"
        )
    return Stages(
        tuple(tuple(part for part, stages in learns.items() if stages[0] == stage) for stage in range(len(graphs))),
        tuple(frozenset(_called(model.backbone, graph)) for graph in graphs),
        tuple(names.get(parameter, "?") for parameter, stages in learns.items() if len(stages) > 1),
    )


def check_learning(phases: Sequence[Phase], stages: Stages, model: MultiExitModel) -> None:
    """Whether something learns in every phase.

    Raises:
        ArgumentError: a phase trains the backbone alone, and the user has frozen all of its stages.
    """
    last = len(model.classifiers)
    for number, phase in enumerate(phases, 1):
        heads = tuple(phase.exits) != (last,) or model.new_head
        if not heads and not any(stages.parameters[stage] for stage in phase.stages):
            raise ArgumentError(
                f"phase {number} trains stages {list(phase.stages)} of the backbone alone, but none of their parameters has "
                "requires_grad=True; let some learn, or leave the phase out"
            )


def _called(backbone: nn.Module, graph: nn.Module) -> Iterator[nn.Module]:
    for node in graph.graph.nodes:  # type: ignore[union-attr]
        if node.op == "call_function":
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                if path == BACKBONE or path.startswith(f"{BACKBONE}."):
                    yield submodule(backbone, path.removeprefix(BACKBONE).removeprefix(".").partition("@")[0])


@alone()
def learn(model: MultiExitModel, phase: Phase, stages: Stages | None) -> None:
    """Let a phase's parts learn and freeze everything else. ``stages`` may be None where no stage learns.

    A module is in training mode when all the stages it is called in learn. What past-future exits share learns with any of
    them.
    """
    model.requires_grad_(False)
    model.eval()
    for m in phase.exits:
        if m < len(model.classifiers):
            classifier = model.classifiers[m]
            classifier.requires_grad_(True).train()
            if isinstance(classifier, PastFutureClassifier):  # registered in the first one's alone
                classifier.shared.requires_grad_(True).train()
    if len(model.classifiers) in phase.exits:
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(name in model.new_head)
    if stages is None:
        return
    for stage in phase.stages:
        for parameter in stages.parameters[stage]:
            parameter.requires_grad_(True)
    if len(phase.stages) == len(stages.modules):
        model.backbone.train()
        return
    called = frozenset[nn.Module]().union(*(stages.modules[stage] for stage in phase.stages))
    frozen = (modules for stage, modules in enumerate(stages.modules) if stage not in phase.stages)
    for module in called.difference(*frozen):
        module.training = True


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards every parameter's ``requires_grad`` and every module's ``training`` is as it was."""
    with alone():  # not the flags of a capture, nor its fake parameters
        gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with alone():
            for parameter, requires_grad in gradients:
                parameter.requires_grad_(requires_grad)
            for module, flag in training:
                module.training = flag
