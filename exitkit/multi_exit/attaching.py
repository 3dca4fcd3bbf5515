"""``attach``: from a model to a multi-exit model, checked before it is returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from exitkit.common.checks import is_count
from exitkit.common.errors import ArgumentError, NotCapturableError
from exitkit.exits.classifiers import HeadSpec, InternalClassifier
from exitkit.exits.factory import HeadMaker
from exitkit.exits.gpf import PastFuture, PastFutureClassifier
from exitkit.methods.presets import Method, as_method, for_outputs
from exitkit.multi_exit.cost import ExitSpec
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.boundaries import Anatomy, Boundary, find_boundaries
from exitkit.surgery.capturing import Capture, capture
from exitkit.surgery.partition import partition_at
from exitkit.surgery.placement import place
from exitkit.surgery.replace_classifier import outputs_of, unchanged_on_error, with_outputs
from exitkit.surgery.supported import admit
from exitkit.surgery.verification import verify

STATE_WIDTH = 128
"""Of gpf's states where features are no tokens of one width: what Zero Time Waste's code has for ConvNeXt and Swin."""


def attach(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    every: int | None = None,
    at: Sequence[str] | None = None,
    at_cost: Sequence[float] | None = None,
    placement: str | None = None,
    method: str | Method = "ztw",
    head: str | Sequence[str] = "auto",
    num_classes: int | None = None,
    num_outputs: int | None = None,
) -> MultiExitModel:
    """Attach early exits to a pretrained classifier. The model, its weights and its flags stay as they are.

    All but one thing: where ``num_classes`` differs from what the model gives, its last linear layer is replaced in place by
    a freshly initialised one (transfer learning), which belongs to the exits: it is saved with them.

    Args:
        model: any classifier whose output is logits (B, C): torchvision, timm, Hugging Face or your own.
        example_inputs: a tensor, a tuple of tensors or a dict of tensors, batch first. Inferred for torchvision, timm
            and Hugging Face models.
        every: an exit after blocks n, 2n, …, never after the last one.
        at: boundary names as ``exitkit.inspect(model)`` lists them.
        at_cost: shares of the backbone's MACs, such as ``[.15, .3, .45]``; the nearest block is taken.
        placement: ``"dense-sparse"`` or ``"sparse-dense"`` (Kubaty et al.). By default every block gets an exit.
        method: ``"sdn"``, ``"pbee"``, ``"ztw"``, ``"gpf"``, ``"branchynet"``, or a config such as
            ``exitkit.ZTW(ensemble="additive")``.
        head: ``"auto"`` (``"2L-256"`` on maps, else ``"1L"``), ``"1L"`` (pooling and a linear layer), ``"2L-<width>"`` (one
            hidden layer), ``"conv"`` (Zero Time Waste's, for maps), ``"separable"`` or ``"strided"`` (cheaper convolutions),
            ``"tail"``: a copy of what the backbone does after its last block, with its weights, for features of the same
            shape, and for maps of another one behind a learned 1 × 1 adapter; or ``"branch-<n>"``: a copy of the rest of the
            backbone, shortened to at most n blocks of each shape, those before the exit counted. Copies have no dropout.
            A list gives each exit its own.
        num_classes: how many classes the backbone and the exits shall tell apart; by default as many as it does.
        num_outputs: 1 for regression, which a model with one output (B, 1) is anyway.

    Raises:
        ExitkitError: an argument is wrong, the model cannot be captured, or the cut model would not equal it. The model is
            then as it was.
    """
    if isinstance(model, MultiExitModel):
        raise ArgumentError("model already has exits; attach to exitkit.detach(model) for other ones")
    admit(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ArgumentError(
            f"{type(model).__name__} is on the meta device and has no values; load its weights, or model.to_empty(device). "
            "exitkit.inspect takes it as it is"
        )
    composition, outputs = as_method(method), _outputs(num_classes, num_outputs)
    heads = HeadSpec.parse_all(head)
    with unchanged_on_error(model):
        captured, new_head = with_outputs(capture(model, example_inputs), outputs)
        anatomy = find_boundaries(captured)
        boundaries = _readable(place(anatomy, every, at, at_cost, placement))
        return _assemble(captured, anatomy, boundaries, composition, heads, new_head)


def _assemble(
    captured: Capture,
    anatomy: Anatomy,
    boundaries: Sequence[Boundary],
    method: Method,
    heads: Sequence[HeadSpec],
    new_head: Sequence[str],
) -> MultiExitModel:
    """Exits at ``boundaries``, once the cut model was found to equal the model."""
    outputs = outputs_of(captured)
    method = for_outputs(method, outputs, type(captured.backbone).__name__)
    taps = verify(captured, boundaries, partition_at(captured, boundaries))
    maker = HeadMaker(captured, anatomy, outputs)
    placed = list(zip(boundaries, _one_each(heads, len(boundaries)), strict=True))
    made = [maker.make(boundary, head, method.cascade and m > 0) for m, (boundary, head) in enumerate(placed)]
    own, reads = zip(*made, strict=True)
    specs = [ExitSpec(*read) for read in zip(boundaries, taps, reads, strict=True)]
    classifiers = _past_future(own, boundaries, outputs, method) if method.past_future else own
    head = heads[0].name if len(heads) == 1 else tuple(spec.name for spec in heads)
    return MultiExitModel(
        captured.backbone, classifiers, specs, anatomy, method, head, outputs, captured.example, new_head
    )


def _one_each(heads: Sequence[HeadSpec], exits: int) -> Sequence[HeadSpec]:
    if len(heads) not in (1, exits):
        raise ArgumentError(
            f"head={[spec.name for spec in heads]!r} has {len(heads)} heads for {exits} exits; give one for all, or a list "
            "with one for each"
        )
    return heads if len(heads) == exits else list(heads) * exits


def _outputs(num_classes: int | None, num_outputs: int | None) -> int | None:
    """How many outputs are asked for; None where nobody asks."""
    if num_classes is not None and num_outputs is not None:
        raise ArgumentError(
            f"num_classes={num_classes!r} and num_outputs={num_outputs!r} were given together; give one"
        )
    if num_classes is not None and (not is_count(num_classes) or num_classes < 2):
        raise ArgumentError(
            f"num_classes={num_classes!r} must be a whole number of at least 2; num_outputs=1 is for regression"
        )
    if num_outputs not in (None, 1) or isinstance(num_outputs, bool):
        raise ArgumentError(f"num_outputs={num_outputs!r} must be 1, for regression; classes are given as num_classes")
    return num_classes if num_outputs is None else num_outputs


def _readable(boundaries: Sequence[Boundary]) -> Sequence[Boundary]:
    """``boundaries``, if heads can read all of them."""
    for boundary in boundaries:
        if boundary.layout == "other":
            raise NotCapturableError(
                f"boundary {boundary.name!r} has a feature of shape {boundary.shape} per sample; heads read vectors, tokens, "
                "sequences and 2-D maps. Choose other boundaries with at="
            )
    return boundaries


def _past_future(
    heads: Sequence[InternalClassifier], boundaries: Sequence[Boundary], num_classes: int, method: Method
) -> list[PastFutureClassifier]:
    """The same bodies, joined by one :class:`PastFuture`."""
    assert method.past_future is not None
    tokens = {boundary.shape[-1] if boundary.layout == "tokens" else 0 for boundary in boundaries}
    width = method.width or (tokens.pop() if len(tokens) == 1 else 0) or STATE_WIDTH
    shared = PastFuture(len(heads), width, num_classes, method.past_future)
    return [PastFutureClassifier(head.body, head.linear.in_features, m, shared) for m, head in enumerate(heads)]
