"""What the dimensions of an activation mean, read off the operations that consume it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch.fx import Node

from exitkit.surgery.liveness import op_name, value_of

Layout = Literal["channels_first", "channels_last", "tokens", "vector"]
"""(B, C, H, W), (B, H, W, C), (B, T, D), or (B, D)."""

_CHANNELS_AT_1 = frozenset(
    "conv2d convolution batch_norm group_norm instance_norm max_pool2d avg_pool2d adaptive_avg_pool2d "
    "adaptive_max_pool2d".split()
)
_CHANNELS_LAST = frozenset("linear layer_norm rms_norm".split())
_LOOK_AHEAD = 40


def layout_of(node: Node) -> Layout:
    """The layout of a boundary's activation, by its rank and, for maps, by its first consumers."""
    value = value_of(node)
    rank = value.dim() if value is not None else 0
    if rank <= 2:
        return "vector"
    if rank == 3:
        return "tokens"
    for axis in _channel_axes(node):
        return "channels_first" if axis == 1 else "channels_last"
    assert value is not None
    # No consumer tells: maps are square more often than not.
    return "channels_last" if value.shape[1] == value.shape[2] != value.shape[3] else "channels_first"


def _channel_axes(start: Node) -> Iterator[int]:
    """Which of ``start``'s dimensions its consumers treat as channels, following permutations, nearest first."""
    queue: list[tuple[Node, tuple[int, ...]]] = [(start, (0, 1, 2, 3))]
    seen = {start}
    while queue and len(seen) < _LOOK_AHEAD:
        node, axes = queue.pop(0)
        for user in node.users:
            name, value = op_name(user), value_of(user)
            if name in _CHANNELS_AT_1:
                yield axes[1]
            elif name in _CHANNELS_LAST:
                yield axes[3]
            elif user not in seen and value is not None and value.dim() == 4:
                moved = _moved_axes(user, axes)
                if moved is not None:
                    seen.add(user)
                    queue.append((user, moved))


def _moved_axes(node: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """``axes`` after ``node``; None where it mixes them (view, reshape)."""
    name = op_name(node)
    if name == "permute":
        order = node.args[1]
        assert isinstance(order, list | tuple)
        return tuple(axes[int(i) % 4] for i in order if isinstance(i, int))
    if name == "transpose":
        first, second = (int(i) % 4 for i in node.args[1:3] if isinstance(i, int))
        swapped = list(axes)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        return tuple(swapped)
    return None if name in {"view", "reshape", "_unsafe_view", "unflatten"} else axes
