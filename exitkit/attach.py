"""``attach``: from a model to a multi-exit model, checked before it is returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from exitkit.errors import ExitkitError
from exitkit.exits.heads import Feature, HeadSpec, make_head
from exitkit.methods import Method, as_method
from exitkit.model import MultiExitModel
from exitkit.surgery.boundaries import Anatomy, Boundary, find_boundaries
from exitkit.surgery.calls import Example
from exitkit.surgery.capture import Capture, capture
from exitkit.surgery.lower import lower
from exitkit.surgery.placement import place
from exitkit.surgery.readout import Readout, find_readout
from exitkit.surgery.verify import verify


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
) -> MultiExitModel:
    """Attach early exits to a pretrained classifier. The model, its weights and its flags stay as they are.

    Args:
        model: any classifier whose output is logits (B, C): torchvision, timm, Hugging Face or your own.
        example_inputs: a tensor, a tuple of tensors or a dict of tensors, batch first. Inferred for torchvision, timm
            and Hugging Face models.
        every: an exit after blocks n, 2n, …, never after the last one.
        at: boundary names as ``exitkit.inspect(model)`` lists them.
        at_cost: shares of the backbone's MACs, such as ``[.15, .3, .45]``; the nearest block is taken.
        placement: ``"dense-sparse"`` or ``"sparse-dense"`` (Kubaty et al.). By default every block gets an exit.
        method: ``"sdn"``, ``"pbee"``, ``"ztw"``, or a config such as ``exitkit.ZTW(ensemble="additive")``.
        head: ``"auto"`` (by the feature's shape), ``"conv"``, ``"1L"`` or ``"2L-<width>"``.

    Raises:
        ExitkitError: an argument is wrong, the model cannot be captured, or the cut model would not equal it.
    """
    if isinstance(model, MultiExitModel):
        raise ExitkitError("model already has exits; attach to exitkit.detach(model) for other ones")
    composition = as_method(method)
    head_spec = HeadSpec.parse(head)
    captured = capture(model, example_inputs)
    anatomy = find_boundaries(captured)
    boundaries = place(anatomy, every, at, at_cost, placement)
    for boundary in boundaries:
        if boundary.layout == "other":
            raise ExitkitError(
                f"boundary {boundary.name!r} has a feature of shape {boundary.shape} per sample; heads read vectors, tokens, "
                "sequences and 2-D maps. Choose other boundaries with at="
            )
    taps = verify(captured, boundaries, lower(captured, boundaries))
    num_classes = _num_classes(captured)
    readout, tokens = _readout(captured, anatomy)
    readouts = [_readout_at(boundary, readout, tokens) for boundary in boundaries]
    side = _image_side(captured.example)
    classifiers = [
        make_head(
            Feature(boundary.shape, boundary.layout, read.kind, read.skip, side),
            num_classes,
            head_spec,
            cascade=composition.cascade and index > 0,
        )
        for index, (boundary, read) in enumerate(zip(boundaries, readouts, strict=True))
    ]
    masks = [read.mask for read in readouts]
    return MultiExitModel(
        model, classifiers, masks, boundaries, taps, anatomy, composition, head, num_classes, captured.example
    )


def _num_classes(captured: Capture) -> int:
    output = next(node for node in reversed(captured.graph.graph.nodes) if node.op == "output")
    classes = int(output.all_input_nodes[0].meta["val"].shape[1])
    if classes < 2:
        raise ExitkitError(
            f"{type(captured.backbone).__name__} has {classes} output; exits need logits of at least two classes. Give a "
            "binary classifier two outputs (logits 0 and z are the same decision)"
        )
    return classes


def _readout(captured: Capture, anatomy: Anatomy) -> tuple[Readout, int]:
    """The backbone's read-out, and how many tokens it is applied to."""
    tokens = [boundary for boundary in anatomy.boundaries if boundary.layout == "tokens"]
    if not tokens:
        return Readout(), 0
    return find_readout(captured, tokens[-1].node), tokens[-1].shape[0]


def _readout_at(boundary: Boundary, readout: Readout, tokens: int) -> Readout:
    """Class and register tokens are only there while the number of tokens is the backbone's last one."""
    if boundary.layout != "tokens":
        return Readout()
    return readout if boundary.shape[0] == tokens or readout.kind == "masked_mean" else Readout("mean")


def _image_side(example: Example) -> int | None:
    image = next((tensor for tensor in example.tensors if tensor.dim() == 4), None)
    return None if image is None else min(image.shape[-2:])
