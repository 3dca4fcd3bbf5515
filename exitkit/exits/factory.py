"""From a boundary to the head there: what each kind of head needs to know of the captured backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from exitkit.common.errors import ArgumentError
from exitkit.exits.classifiers import HeadSpec, InternalClassifier, make_head
from exitkit.exits.copied.head import tail_head
from exitkit.exits.copied.shorten import gaps
from exitkit.exits.copied.tail import Tail, find_tail
from exitkit.exits.feature import Feature
from exitkit.exits.legal_actions import LegalActions
from exitkit.surgery.boundaries import Anatomy, Boundary
from exitkit.surgery.capturing import Capture
from exitkit.surgery.inputs import Example
from exitkit.surgery.readout import Readout, find_readout

Made = tuple[InternalClassifier, tuple[int | str, ...]]
"""A head, and the model's inputs that it reads."""


@dataclass(frozen=True)
class HeadMaker:
    """Makes the heads of one captured backbone.

    Attributes:
        outputs: classes, or 1 for regression.
    """

    captured: Capture
    anatomy: Anatomy
    outputs: int

    def make(self, boundary: Boundary, spec: HeadSpec, cascade: bool) -> Made:
        """The head at ``boundary``; of a policy with a mask of legal actions, one that reads it too."""
        head, reads = self._made(boundary, spec, cascade)
        if not isinstance(self.captured.backbone, LegalActions):
            return head, reads
        head.masked = True
        return head, (*reads, self.captured.spec.keys[1])

    def _made(self, boundary: Boundary, spec: HeadSpec, cascade: bool) -> Made:
        if spec.kind in ("tail", "branch"):
            tail = self._tail if spec.blocks is None else self._branch(boundary, spec.blocks)
            feature, target = Feature(boundary.shape, boundary.layout), Feature(tail.shape, tail.layout)
            return tail_head(feature, target, tail.body, tail.linear, cascade), tail.inputs
        read = self._readout_at(boundary)
        feature = Feature(boundary.shape, boundary.layout, read.kind, read.skip, _image_side(self.captured.example))
        reads = () if read.mask is None or spec.function is not None else (read.mask,)
        return make_head(feature, self.outputs, spec, cascade), reads

    @cached_property
    def _blocks(self) -> Sequence[Boundary]:
        return self.anatomy.blocks or self.anatomy.boundaries

    @cached_property
    def _tail(self) -> Tail:
        last = self._blocks[-1]
        _check_single([last], "tail")
        return find_tail(self.captured, last, self.outputs)

    def _branch(self, boundary: Boundary, most: int) -> Tail:
        left_out = gaps(self._blocks, boundary, most)
        _check_single([boundary, *(side for gap in left_out for side in gap)], f"branch-{most}")
        if not left_out and boundary != self._blocks[-1]:
            smaller = "use a smaller number, or" if most > 1 else "there is nothing to leave out; use"
            raise ArgumentError(
                f"head='branch-{most}' at {boundary.name!r} would be all the rest of the backbone: no shape occurs in more "
                f"than {most} of its blocks; {smaller} head='auto'"
            )
        return find_tail(self.captured, boundary, self.outputs, left_out)

    @cached_property
    def _readout(self) -> tuple[Readout, int]:
        """The backbone's read-out, and how many tokens it is applied to."""
        tokens = [boundary for boundary in self.anatomy.boundaries if boundary.layout == "tokens"]
        if not tokens:
            return Readout(), 0
        return find_readout(self.captured, tokens[-1].node), tokens[-1].shape[0]

    def _readout_at(self, boundary: Boundary) -> Readout:
        """Class and register tokens, and what a mask is for, are only there while the number of tokens is the same."""
        if boundary.layout != "tokens":
            return Readout()
        readout, tokens = self._readout
        example = self.captured.example
        if readout.mask is not None:
            tokens = example.tensors[example.spec.keys.index(readout.mask)].shape[-1]
        return readout if boundary.shape[0] == tokens else Readout("mean")


def _check_single(boundaries: Sequence[Boundary], head: str) -> None:
    for boundary in boundaries:
        if len(boundary.activations) > 1:
            raise ArgumentError(
                f"head={head!r} needs blocks that leave one activation; {boundary.name!r} leaves "
                f"{len(boundary.activations)}. Use head='auto'"
            )


def _image_side(example: Example) -> int | None:
    image = next((tensor for tensor in example.tensors if tensor.dim() in (4, 5)), None)
    return None if image is None else min(image.shape[-2:])
