"""What the dimensions of an activation mean, read off the operations that consume it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor
from torch.fx import Node

from exitkit.surgery.liveness import op_name, value_of

Layout = Literal["channels_first", "channels_last", "tokens", "sequence", "vector", "other"]
"""(B, C, H, W), (B, H, W, C), (B, T, D), (B, C, T), (B, D), or what no head reads; maps of videos and volumes have one more
dimension, time or depth, before their height: (B, C, T, H, W), (B, T, H, W, C)."""

_CHANNELS_AT_1 = frozenset(
    "conv1d conv2d conv3d convolution batch_norm group_norm instance_norm max_pool2d max_pool3d avg_pool2d avg_pool3d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d".split()
)
_CHANNELS_LAST = frozenset("linear layer_norm rms_norm".split())
_REDUCTIONS = frozenset("mean sum amax".split())
_LOOK_AHEAD = 40


def layout_of(node: Node) -> Layout:
    """The layout of a boundary's activation, by its rank and by its first consumers."""
    value = value_of(node)
    if value is None or value.dim() > 5:
        return "other"
    if value.dim() <= 2:
        return "vector"
    axis = next(_channel_axes(node, value.dim()), None)
    if value.dim() == 3:
        return "sequence" if axis == 1 else "tokens"
    if axis is None:  # no consumer tells, but maps are square more often than not
        axis = value.dim() - 1 if value.shape[-3] == value.shape[-2] != value.shape[-1] else 1
    return "channels_first" if axis == 1 else "channels_last"


def _channel_axes(start: Node, rank: int) -> Iterator[int]:
    """Which of ``start``'s dimensions its consumers treat as channels, following permutations, nearest first."""
    queue: list[tuple[Node, tuple[int, ...]]] = [(start, tuple(range(rank)))]
    seen = {start}
    while queue and len(seen) < _LOOK_AHEAD:
        node, axes = queue.pop(0)
        for user in node.users:
            name, value = op_name(user), value_of(user)
            if name in _CHANNELS_AT_1:
                yield axes[1]
            elif name in _CHANNELS_LAST:
                yield axes[-1]
            elif (
                name in _REDUCTIONS
                and len(reduced := _dimensions(user, rank)) == rank - 2
                and not _normalises(user, value)
            ):
                yield next(axes[d] for d in range(1, rank) if d not in reduced)
            elif user not in seen and value is not None and value.dim() == rank:
                moved = _moved_axes(user, axes)
                if moved is not None:
                    seen.add(user)
                    queue.append((user, moved))


def _normalises(reduction: Node, result: Tensor | None) -> bool:
    """A mean over one dimension that stays as 1 is part of a hand-written norm, not a pooling of tokens."""
    return len(_dimensions(reduction, 3)) == 1 and result is not None and result.dim() == 3


def _dimensions(reduction: Node, rank: int) -> set[int]:
    dims = reduction.args[1] if len(reduction.args) > 1 else ()
    return {d % rank for d in dims if isinstance(d, int)} if isinstance(dims, list | tuple) else set()


def _moved_axes(node: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """``axes`` after ``node``; None where it mixes them (view, reshape)."""
    name = op_name(node)
    if name == "permute":
        order = node.args[1]
        assert isinstance(order, list | tuple)
        return tuple(axes[i] for i in order if isinstance(i, int))
    if name == "transpose":
        first, second = (i for i in node.args[1:3] if isinstance(i, int))
        swapped = list(axes)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        return tuple(swapped)
    return None if name in {"view", "reshape", "_unsafe_view", "unflatten"} else axes
