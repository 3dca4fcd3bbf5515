"""From a backbone to the parts of a multi-exit model: captured, cut, checked, and given heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from exitkit.common.errors import ArgumentError, NotCapturableError
from exitkit.exits.classifiers import Head, HeadSpec, InternalClassifier
from exitkit.exits.ensembles import COMBINERS
from exitkit.exits.factory import HeadMaker
from exitkit.exits.gpf import Classifier, PastFuture, PastFutureClassifier
from exitkit.exits.legal_actions import LegalActions
from exitkit.methods.presets import Method, as_method, for_outputs
from exitkit.multi_exit.cost import ExitSpec
from exitkit.surgery.boundaries import Anatomy, Boundary, find_boundaries
from exitkit.surgery.capturing import Capture, capture
from exitkit.surgery.inputs import Example
from exitkit.surgery.partition import partition_at
from exitkit.surgery.placement import place
from exitkit.surgery.replace_classifier import ends_in_softmax, outputs_of, unchanged_on_error, with_outputs
from exitkit.surgery.supported import check_supported
from exitkit.surgery.verification import verify

STATE_WIDTH = 128
"""Of gpf's states where not all features are tokens of one width: what Zero Time Waste's code has for ConvNeXt and Swin."""


@dataclass(frozen=True)
class Parts:
    """What a multi-exit model is made of.

    Attributes:
        backbone: the user's own model.
        classifiers: one per exit, in order.
        combiners: one per exit, and one for the backbone where the method asks for it; none without an ensemble.
        specs: where each of them reads.
        anatomy: the backbone's boundaries and costs.
        method: how the exits are combined, and when a sample leaves.
        head: as the user wrote it, one name for all exits or one for each.
        num_classes: outputs of the backbone and of every exit; 1 for regression.
        example: inputs to capture the backbone with.
        new_head: state-dict names of the backbone's last layer, where it was replaced.
        probabilities: whether the backbone's forward ends in a softmax.
    """

    backbone: nn.Module
    classifiers: tuple[Classifier, ...]
    combiners: tuple[nn.Module, ...]
    specs: tuple[ExitSpec, ...]
    anatomy: Anatomy
    method: Method
    head: str | tuple[str, ...]
    num_classes: int
    example: Example
    new_head: tuple[str, ...] = ()
    probabilities: bool = False


def assemble(
    model: nn.Module,
    example_inputs: Any,
    where: Mapping[str, Any],
    method: str | Method,
    head: Head | Sequence[Head],
    outputs: int | None,
) -> Parts:
    """The parts of a model with exits, once the cut backbone was found to equal the backbone.

    Args:
        where: arguments of :func:`exitkit.surgery.placement.place`.
        outputs: how many the backbone shall have; None for as many as it has.

    The others, and errors, are as for :func:`exitkit.attach`.
    """
    check_supported(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ArgumentError(
            f"{type(model).__name__} is on the meta device and has no values; load its weights first "
            "(model.to_empty(device) makes room; exitkit.inspect takes it as it is)"
        )
    composition, heads = as_method(method), HeadSpec.parse_all(head)
    with unchanged_on_error(model):
        captured, new_head = with_outputs(capture(model, example_inputs), outputs)
        anatomy = find_boundaries(captured)
        boundaries = _readable(place(anatomy, **where))
        parts = _parts(captured, anatomy, boundaries, composition, heads, new_head)
        return replace(parts, probabilities=ends_in_softmax(captured))


def _parts(
    captured: Capture,
    anatomy: Anatomy,
    boundaries: Sequence[Boundary],
    method: Method,
    heads: Sequence[HeadSpec],
    new_head: Sequence[str],
) -> Parts:
    """Exits at ``boundaries``, once the cut model was found to equal the model."""
    outputs = outputs_of(captured)
    method = for_outputs(method, outputs, type(captured.backbone).__name__)
    if isinstance(captured.backbone, LegalActions) and (method.past_future or method.ensemble == "additive"):
        raise ArgumentError(
            f"method={method.name!r} would give illegal actions a probability: an additive ensemble has a prior, and gpf's "
            "heads read no mask; use 'ztw', 'sdn' or 'pbee'"
        )
    points = verify(captured, boundaries, partition_at(captured, boundaries))
    maker = HeadMaker(captured, anatomy, outputs)
    placed = list(zip(boundaries, _one_each(heads, len(boundaries)), strict=True))
    made = [maker.make(boundary, head, method.cascade and m > 0) for m, (boundary, head) in enumerate(placed)]
    own, reads = zip(*made, strict=True)
    for link in (classifier.link for classifier in own if classifier.link is not None):
        link.detach = method.detach
    specs = [ExitSpec(*read) for read in zip(boundaries, points, reads, strict=True)]
    classifiers = _past_future(own, boundaries, outputs, method) if method.past_future else own
    head = heads[0].name if len(heads) == 1 else tuple(spec.name for spec in heads)
    return Parts(
        captured.backbone,
        tuple(classifiers),
        _combiners(method, len(classifiers), outputs),
        tuple(specs),
        anatomy,
        method,
        head,
        outputs,
        captured.example,
        tuple(new_head),
    )


def _one_each(heads: Sequence[HeadSpec], exits: int) -> Sequence[HeadSpec]:
    if len(heads) not in (1, exits):
        raise ArgumentError(
            f"head={[spec.name for spec in heads]!r} has {len(heads)} heads for {exits} exits; give one for all, or a list "
            "with one for each"
        )
    return heads if len(heads) == exits else list(heads) * exits


def _readable(boundaries: Sequence[Boundary]) -> Sequence[Boundary]:
    """``boundaries``, if heads can read all of them."""
    for boundary in boundaries:
        if boundary.layout == "other":
            raise NotCapturableError(
                f"boundary {boundary.name!r} has a feature of shape {boundary.shape} per sample; heads read vectors, tokens, "
                "sequences, maps and volumes. Choose other boundaries with at="
            )
    return boundaries


def _combiners(method: Method, exits: int, num_classes: int) -> tuple[nn.Module, ...]:
    if method.ensemble == "none":
        return ()
    count = exits + int(method.ensemble_final)
    return tuple(COMBINERS[method.ensemble](m + 1, num_classes) for m in range(count))


def _past_future(
    heads: Sequence[InternalClassifier], boundaries: Sequence[Boundary], num_classes: int, method: Method
) -> list[PastFutureClassifier]:
    """The same bodies, joined by one :class:`PastFuture`."""
    assert method.past_future is not None
    tokens = {boundary.shape[-1] if boundary.layout == "tokens" else 0 for boundary in boundaries}
    width = method.width or (tokens.pop() if len(tokens) == 1 else 0) or STATE_WIDTH
    shared = PastFuture(len(heads), width, num_classes, method.past_future)
    return [
        PastFutureClassifier(head.body, head.linear.in_features, m, shared, type(head.linear))
        for m, head in enumerate(heads)
    ]
