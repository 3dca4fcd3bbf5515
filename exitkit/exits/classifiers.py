"""Heads: the internal classifiers (ICs), chosen by the shape of the feature they read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from exitkit.common.errors import ArgumentError, near_match
from exitkit.exits.convolution import CONVOLUTIONS, as_maps
from exitkit.exits.feature import Feature
from exitkit.exits.legal_actions import without_illegal
from exitkit.exits.links import CascadeLink
from exitkit.exits.own import HeadFunction, make_body, name_of, named
from exitkit.exits.pooling import SDNPool, TokenPool, pooled_size
from exitkit.exits.standardised import StandardisedLinear

Head = str | HeadFunction
"""A head by its name, or a function from a feature to its body."""

_HEADS = (
    "'auto', 'conv', 'separable', 'strided' and 'msdnet' (maps only), '1L' (pooling and one linear layer), '2L-1024' (one "
    "hidden layer of 1024), 'tail' (a copy of the backbone's own read-out), 'branch-3' (a copy of the rest of the backbone "
    "with at most 3 blocks of each shape), a function from a feature to a module, or its import path 'module:function'"
)
_AUTO = {"maps": "2L-256", "others": "1L"}
"""What gained most accuracy for what it costs (``benchmarks/heads.py``)."""


@dataclass(frozen=True)
class HeadSpec:
    """A parsed ``head=``.

    Attributes:
        name: what the user wrote; of a function, the text that it is kept as.
        kind: ``"auto"`` (``2L-256`` on maps, else ``1L``), ``"function"``, ``"linear"`` (pooling alone), ``"tail"``: the
            backbone's own read-out, copied, or ``"branch"``: with blocks before it.
        hidden: width of a hidden layer.
        blocks: of a branch, how many of each shape at most.
        function: what makes the body.
    """

    name: str
    kind: str
    hidden: int | None = None
    blocks: int | None = None
    function: HeadFunction | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, head: Head) -> HeadSpec:
        """One head by its name, or a function.

        Raises:
            ExitkitError: an unknown name, or a function whose arguments have no names.
        """
        if callable(head):
            return cls(name_of(head), "function", function=head)
        if isinstance(head, str) and head in ("auto", "tail"):
            return cls(head, head)
        match = re.fullmatch(r"1L|2L-([1-9]\d{0,5})|branch-([1-9]\d{0,5})", head) if isinstance(head, str) else None
        if match is not None:
            if match[2]:
                return cls(head, "branch", blocks=int(match[2]))
            return cls(head, "linear", int(match[1]) if match[1] else None)
        function = named(head) if isinstance(head, str) else None
        if function is None:
            hint = near_match(str(head), ("auto", "tail", "1L", "2L-256", "branch-2", *CONVOLUTIONS))
            raise ArgumentError(
                f"head={head!r} is unknown.{hint} Allowed are {_HEADS}, or a list with one for each exit"
            )
        return cls(head, "function", _width_in(function), function=function)

    @classmethod
    def parse_all(cls, head: Head | Sequence[Head]) -> list[HeadSpec]:
        """The one head of all exits, or one for each."""
        if isinstance(head, list | tuple) and head:
            return [cls.parse(name) for name in head]
        return [cls.parse(head)]  # type: ignore[arg-type]  # an empty list is refused there, as any other value


def _width_in(function: HeadFunction) -> int | None:
    """The width that a text gives a convolution."""
    width = function.keywords.get("width") if isinstance(function, partial) else None
    return width if isinstance(width, int) else None


class HeadOutput(NamedTuple):
    """What a head says, and what it leaves behind.

    Attributes:
        logits: (B, C).
        carried: (B, K), one row per sample: what the head of the next exit reads. K is the classifier's ``carries``.
        state: (B, D), where heads imitate each other's states.
        imagined: (J, B, D), this head's imitations of the states of the J exits still to come.
    """

    logits: Tensor
    carried: Tensor
    state: Tensor | None = None
    imagined: Tensor | None = None


class InternalClassifier(nn.Module):
    """Body (feature → vector) → cascade link, if any → linear layer: logits (B, C), which are carried on.

    Args:
        linear: the kind of that layer; :class:`StandardisedLinear` behind a body without layers of its own.

    Attributes:
        masked: whether the last of the inputs is a mask of legal actions; those of the others are then put out of reach, but
            for what is carried on.
    """

    def __init__(
        self, body: nn.Module, width: int, num_classes: int, cascade: bool, linear: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.body = body
        self.link = CascadeLink(num_classes) if cascade else None
        self.linear = linear(width + (num_classes if cascade else 0), num_classes)
        self.carries = num_classes
        self.masked = False

    def forward(self, feature: Tensor, previous: Tensor | None = None, inputs: Sequence[Tensor | None] = ()) -> Tensor:
        """Logits from a feature, the logits of the exit before, and those inputs of the model that the head reads."""
        return self.step(feature, previous, inputs).logits

    def step(self, feature: Tensor, carried: Tensor | None, inputs: Sequence[Tensor | None]) -> HeadOutput:
        """The logits, and what the next exit reads: these logits, of all actions where some are not legal."""
        if not self.masked:
            logits = self._logits(feature, carried, inputs)
            return HeadOutput(logits, logits)
        *others, legal = inputs
        if legal is None:
            raise ArgumentError("this policy takes a mask of legal actions beside the observation; give both")
        logits = self._logits(feature, carried, others)
        return HeadOutput(without_illegal(logits, legal), logits)

    def _logits(self, feature: Tensor, previous: Tensor | None, inputs: Sequence[Tensor | None]) -> Tensor:
        vector: Tensor = self.body(feature, *inputs)
        if self.link is not None:
            if previous is None:
                raise ArgumentError(
                    "this exit has a cascade link and needs previous=, the logits of the exit before it"
                )
            vector = self.link(vector, previous)
        logits: Tensor = self.linear(vector)
        return logits


class TokenBody(nn.Module):
    """Token read-out, then a hidden layer where one is asked for."""

    def __init__(self, pool: TokenPool, hidden: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.hidden = hidden

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        vector: Tensor = self.hidden(self.pool(tokens, mask))
        return vector


def make_head(feature: Feature, num_classes: int, spec: HeadSpec, cascade: bool) -> InternalClassifier:
    """The internal classifier for a feature of this shape.

    Raises:
        ExitkitError: a convolutional head for a feature that is not a map, or a function that does not make a body.
    """
    if spec.kind == "auto":
        spec = HeadSpec.parse(_AUTO["maps" if feature.is_map else "others"])
    if spec.function is not None:
        body, width = make_body(spec.name, spec.function, feature)
    else:
        body, width = _pooled(feature, spec.hidden)
    learns = any(parameter.dim() > 1 for parameter in body.parameters())
    return InternalClassifier(body, width, num_classes, cascade, nn.Linear if learns else StandardisedLinear)


def _pooled(feature: Feature, hidden: int | None) -> tuple[nn.Module, int]:
    """Pooling, then a hidden layer where one is asked for; and the width of the vector."""
    if feature.layout in ("tokens", "sequence"):
        sequence = feature.layout == "sequence"
        layer, width = _hidden(feature.shape[0 if sequence else -1], hidden)
        return TokenBody(TokenPool(feature.readout, feature.skip, channels_first=sequence), layer), width
    layers, width = [*as_maps(feature), nn.Flatten()], math.prod(feature.shape)
    if feature.is_map:
        channels, *size = feature.maps
        layers[-1:] = [SDNPool(), nn.Flatten()]
        width = channels * math.prod(pooled_size(*size))
    layer, width = _hidden(width, hidden)
    return nn.Sequential(*layers, layer), width


def _hidden(width: int, hidden: int | None) -> tuple[nn.Module, int]:
    if hidden is None:
        return nn.Identity(), width
    return nn.Sequential(StandardisedLinear(width, hidden), nn.ReLU()), hidden
