"""``attach``: from a model to a multi-exit model, checked before it is returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from exitkit.errors import ExitkitError
from exitkit.exits.heads import Feature, HeadSpec, InternalClassifier, make_head
from exitkit.exits.past_future import PastFuture, PastFutureClassifier
from exitkit.exits.tail import tail_head
from exitkit.methods import Method, as_method, for_outputs, is_count
from exitkit.model import MultiExitModel
from exitkit.pricing import ExitSpec
from exitkit.surgery.admission import admit
from exitkit.surgery.boundaries import Anatomy, Boundary, find_boundaries
from exitkit.surgery.calls import Example
from exitkit.surgery.capture import Capture, capture
from exitkit.surgery.classifier import outputs_of, unchanged_on_error, with_outputs
from exitkit.surgery.lower import lower
from exitkit.surgery.placement import place
from exitkit.surgery.readout import Readout, find_readout
from exitkit.surgery.tail import find_tail
from exitkit.surgery.verify import verify

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
    head: str = "auto",
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
        head: ``"auto"`` (by the feature's shape), ``"conv"``, ``"separable"`` or ``"strided"`` (convolutions for maps),
            ``"1L"`` (pooling and a linear layer), ``"2L-<width>"``, or ``"tail"``: a copy of what the backbone does after
            its last block, with its weights, for features of the same shape, and for maps of another one behind a learned
            1 × 1 adapter. Its dropout is off and its BatchNorm statistics fixed.
        num_classes: how many classes the backbone and the exits shall tell apart; by default as many as it does.
        num_outputs: 1 for regression, which a model with one output (B, 1) is anyway.

    Raises:
        ExitkitError: an argument is wrong, the model cannot be captured, or the cut model would not equal it. The model is
            then as it was.
    """
    if isinstance(model, MultiExitModel):
        raise ExitkitError("model already has exits; attach to exitkit.detach(model) for other ones")
    admit(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ExitkitError(
            f"{type(model).__name__} is on the meta device and has no values; load its weights, or model.to_empty(device). "
            "exitkit.inspect takes it as it is"
        )
    composition, head_spec, outputs = as_method(method), HeadSpec.parse(head), _outputs(num_classes, num_outputs)
    with unchanged_on_error(model):
        captured, new_head = with_outputs(capture(model, example_inputs), outputs)
        anatomy = find_boundaries(captured)
        boundaries = _readable(place(anatomy, every, at, at_cost, placement))
        return _assemble(captured, anatomy, boundaries, composition, head_spec, head, new_head)


def _assemble(
    captured: Capture,
    anatomy: Anatomy,
    boundaries: Sequence[Boundary],
    method: Method,
    spec: HeadSpec,
    head: str,
    new_head: Sequence[str],
) -> MultiExitModel:
    """Exits at ``boundaries``, once the cut model was found to equal the model."""
    outputs = outputs_of(captured)
    method = for_outputs(method, outputs, type(captured.backbone).__name__)
    taps = verify(captured, boundaries, lower(captured, boundaries))
    make = _tail_maker(captured, anatomy, outputs) if spec.kind == "tail" else _head_maker(captured, anatomy, spec)
    made = [make(boundary, outputs, method.cascade and m > 0) for m, boundary in enumerate(boundaries)]
    heads, reads = zip(*made, strict=True)
    specs = [ExitSpec(*read) for read in zip(boundaries, taps, reads, strict=True)]
    classifiers = _past_future(heads, boundaries, outputs, method) if method.past_future else heads
    return MultiExitModel(
        captured.backbone, classifiers, specs, anatomy, method, head, outputs, captured.example, new_head
    )


def _outputs(num_classes: int | None, num_outputs: int | None) -> int | None:
    """How many outputs are asked for; None where nobody asks."""
    if num_classes is not None and num_outputs is not None:
        raise ExitkitError(
            f"num_classes={num_classes!r} and num_outputs={num_outputs!r} were given together; give one"
        )
    if num_classes is not None and (not is_count(num_classes) or num_classes < 2):
        raise ExitkitError(
            f"num_classes={num_classes!r} must be a whole number of at least 2; num_outputs=1 is for regression"
        )
    if num_outputs not in (None, 1) or isinstance(num_outputs, bool):
        raise ExitkitError(f"num_outputs={num_outputs!r} must be 1, for regression; classes are given as num_classes")
    return num_classes if num_outputs is None else num_outputs


def _readable(boundaries: Sequence[Boundary]) -> Sequence[Boundary]:
    """``boundaries``, if heads can read all of them."""
    for boundary in boundaries:
        if boundary.layout == "other":
            raise ExitkitError(
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


HeadMaker = Callable[[Boundary, int, bool], tuple[InternalClassifier, tuple[int | str, ...]]]
"""(boundary, classes, cascade) → the head there, and the model's inputs that it reads."""


def _head_maker(captured: Capture, anatomy: Anatomy, spec: HeadSpec) -> HeadMaker:
    readout, tokens = _readout(captured, anatomy)
    side = _image_side(captured.example)

    def make(boundary: Boundary, num_classes: int, cascade: bool) -> tuple[InternalClassifier, tuple[int | str, ...]]:
        read = _readout_at(boundary, readout, tokens, captured.example)
        feature = Feature(boundary.shape, boundary.layout, read.kind, read.skip, side)
        return make_head(feature, num_classes, spec, cascade), () if read.mask is None else (read.mask,)

    return make


def _tail_maker(captured: Capture, anatomy: Anatomy, num_classes: int) -> HeadMaker:
    last = (anatomy.blocks or anatomy.boundaries)[-1]
    if len(last.activations) > 1:
        raise ExitkitError(
            f"head='tail' needs a backbone whose last block leaves one activation; {last.name!r} leaves "
            f"{len(last.activations)}. Use head='auto'"
        )
    tail = find_tail(captured, last, num_classes)
    target = Feature(tail.shape, tail.layout)

    def make(boundary: Boundary, _: int, cascade: bool) -> tuple[InternalClassifier, tuple[int | str, ...]]:
        feature = Feature(boundary.shape, boundary.layout)
        return tail_head(feature, target, tail.body, tail.linear, cascade), tail.inputs

    return make


def _readout(captured: Capture, anatomy: Anatomy) -> tuple[Readout, int]:
    """The backbone's read-out, and how many tokens it is applied to."""
    tokens = [boundary for boundary in anatomy.boundaries if boundary.layout == "tokens"]
    if not tokens:
        return Readout(), 0
    return find_readout(captured, tokens[-1].node), tokens[-1].shape[0]


def _readout_at(boundary: Boundary, readout: Readout, tokens: int, example: Example) -> Readout:
    """Class and register tokens, and what a mask is for, are only there while the number of tokens is the same."""
    if boundary.layout != "tokens":
        return Readout()
    if readout.mask is not None:
        tokens = example.tensors[example.spec.keys.index(readout.mask)].shape[-1]
    return readout if boundary.shape[0] == tokens else Readout("mean")


def _image_side(example: Example) -> int | None:
    image = next((tensor for tensor in example.tensors if tensor.dim() == 4), None)
    return None if image is None else min(image.shape[-2:])
