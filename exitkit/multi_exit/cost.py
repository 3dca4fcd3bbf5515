"""Where exits read, and what it costs to answer there: the backbone, and every head, link and combiner so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exitkit.exits.gpf import Classifier
from exitkit.surgery.boundaries import Anatomy, Boundary
from exitkit.surgery.hooks import HookPoint
from exitkit.surgery.inputs import Example
from exitkit.surgery.macs import count_macs


@dataclass(frozen=True)
class ExitSpec:
    """Where an internal classifier reads.

    Attributes:
        boundary: the cut it sits at.
        hook: where its feature is read while the backbone runs.
        inputs: the model's inputs that its head reads beside the feature, by position or keyword (an attention mask).
    """

    boundary: Boundary
    hook: HookPoint
    inputs: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Exit:
    """One exit and its cost.

    Attributes:
        name: the boundary it reads; the last exit is the backbone's own classifier, ``"backbone"``.
        macs: MACs per sample to answer here: the backbone up to the boundary, and every head, link and combiner so far.
        macs_fraction: ``macs`` as a share of the unmodified backbone.
    """

    name: str
    macs: int
    macs_fraction: float


def exit_costs(
    classifiers: Sequence[Classifier],
    combiners: nn.ModuleList,
    specs: Sequence[ExitSpec],
    anatomy: Anatomy,
    example: Example,
    num_classes: int,
) -> tuple[Exit, ...]:
    """Name and cost of every exit, the backbone's own classifier last. Heads are run on zeros, on fake tensors."""
    device = next(classifiers[0].parameters()).device
    answers = [torch.zeros(1, m + 1, num_classes, device=device) for m in range(len(combiners))]
    combining = [count_macs(combiner, seen) for combiner, seen in zip(combiners, answers, strict=True)]
    combining += [0] * (len(specs) + 1 - len(combining))
    spent, until = 0, []
    for m, (classifier, spec) in enumerate(zip(classifiers, specs, strict=True)):
        spent += head_macs(classifier, spec.boundary, spec.inputs, example, first=m == 0) + combining[m]
        until.append((spec.boundary.name, spec.boundary.macs + spent))
    until.append(("backbone", anatomy.macs + spent + combining[-1]))
    return tuple(Exit(name, macs, macs / max(anatomy.macs, 1)) for name, macs in until)


def head_macs(
    classifier: Classifier, boundary: Boundary, inputs: Sequence[int | str], example: Example, first: bool
) -> int:
    """MACs per sample of one head at a boundary; what the exit before carries on is read by all but the first."""
    like = next(classifier.parameters())
    sample = dict(zip(example.spec.keys, example.with_batch(1).tensors, strict=True))
    carried = [] if first else [like.new_zeros(1, classifier.carries)]
    tensors = [like.new_zeros(1, *boundary.shape), *carried, *(sample[key] for key in inputs)]
    return count_macs(_step(classifier, first), *tensors)


def _step(classifier: nn.Module, first: bool) -> Callable[..., Tensor]:
    """The head as a function of a feature, what the exit before carries on (but for the first), and its inputs."""

    def run(feature: Tensor, *rest: Tensor) -> Tensor:
        carried, inputs = (None, rest) if first else (rest[0], rest[1:])
        logits: Tensor = classifier(feature, carried, inputs)
        return logits

    return run
