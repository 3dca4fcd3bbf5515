"""The values of a graph's nodes, and which operators treat their units in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from exitkit.analysis.permutations.labels import Units

MOVING = frozenset(
    """reshape flatten unflatten permute transpose t numpy_T movedim swapaxes swapdims unsqueeze squeeze expand expand_as
    broadcast_to slice select narrow split split_with_sizes chunk unbind flip roll repeat tile pixel_shuffle pixel_unshuffle
    channel_shuffle unfold diagonal""".split()
)
"""They move elements and do nothing else: they are applied to the units themselves."""

SAME = frozenset(
    """to _to_copy clone contiguous detach detach_ alias lift_fresh_copy type_as dropout feature_dropout alpha_dropout
    softmax log_softmax _softmax _log_softmax""".split()
)
"""The result has its first argument's units: they treat the indices of every axis alike."""

REDUCTIONS = frozenset("mean sum amax amin var std logsumexp max min norm linalg_vector_norm".split())

POOLS = {
    "max_pool1d": 1,
    "avg_pool1d": 1,
    "adaptive_avg_pool1d": 1,
    "adaptive_max_pool1d": 1,
    "max_pool2d": 2,
    "max_pool2d_with_indices": 2,
    "avg_pool2d": 2,
    "adaptive_avg_pool2d": 2,
    "adaptive_max_pool2d": 2,
    "upsample_nearest2d": 2,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "max_pool3d": 3,
    "avg_pool3d": 3,
    "adaptive_avg_pool3d": 3,
}
"""Over how many of the last axes each goes."""

DIRECT = frozenset("linear addmm matmul mm bmm conv1d conv2d conv3d batch_norm group_norm embedding index".split())
"""These take parameters by their axes; others element by element."""

MOST_ELEMENTS = 2**21
"""Of a parameter in an elementwise operator; a larger one is fixed."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Attributes:
        units: of its elements.
        parameter: the state-dict name, where it is a parameter or buffer itself.
        leaf: whether it is made of parameters alone; its units are not known before it meets an activation.
    """

    units: Units
    parameter: str | None = None
    leaf: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.units.shape


def values_in(given: Any) -> list[Value]:
    """All values in nested lists and dicts, in order."""
    if isinstance(given, Value):
        return [given]
    inner = given.values() if isinstance(given, dict) else given if isinstance(given, tuple | list) else ()
    return [value for one in inner for value in values_in(one)]


def unwrapped(given: Any) -> Any:
    if isinstance(given, Value):
        return given.units
    if isinstance(given, dict):
        return {name: unwrapped(one) for name, one in given.items()}
    return type(given)(map(unwrapped, given)) if isinstance(given, tuple | list) else given


def shapes_of(node: Node) -> list[tuple[int, ...]]:
    value = node.meta.get("val")
    tensors = value if isinstance(value, tuple | list) else [value]
    return [tuple(map(int, one.shape)) if isinstance(one, Tensor) else () for one in tensors]


def shape_of(node: Node) -> tuple[int, ...]:
    return shapes_of(node)[0]


def aligned(own: Sequence[int], shape: Sequence[int]) -> list[int]:
    """A tensor's sizes beside those it is broadcast to."""
    return [1] * (len(shape) - len(own)) + list(own)


def module_of(node: Node) -> str:
    """The module in which a node was executed."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].removeprefix("model.") if stack else ""
    return repr(path.partition("@")[0]) if path else f"the top ({node.name})"
