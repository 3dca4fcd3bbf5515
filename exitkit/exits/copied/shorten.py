"""A shortened backbone: some blocks left out of the captured graph, each block before them feeding the one after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import fx
from torch.fx import GraphModule, Node

from exitkit.surgery.boundaries import Boundary

Gap = tuple[Boundary, Boundary]
"""Blocks that are left out: the boundary before the first of them and the one after the last."""


def gaps(blocks: Sequence[Boundary], start: Boundary, most: int) -> list[Gap]:
    """What to leave out after ``start`` so that at most ``most`` blocks of each shape are left, those before it counted.

    Of blocks of one shape in a row the first stays where it makes that shape of another one, and then the last ones.
    """
    sequence = [block for block in blocks if block.position < start.position] + [start]
    before = len(sequence)
    sequence += [block for block in blocks if block.position > start.position]
    left_out: list[Gap] = []
    for _, run in groupby(range(len(sequence)), key=lambda index: (sequence[index].layout, sequence[index].shape)):
        indices = list(run)
        here = [index for index in indices if index < before]
        ahead = [index for index in indices if index >= before]
        first = [] if here else ahead[:1]
        last = max(0, most - len(here) - len(first))
        dropped = ahead[len(first) : max(len(first), len(ahead) - last)]
        if dropped:
            left_out.append((sequence[dropped[0] - 1], sequence[dropped[-1]]))
    return left_out


def without(graph: GraphModule, left_out: Sequence[Gap]) -> GraphModule:
    """The graph without those blocks; it shares the parameters, and every node that is left keeps its name."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    nodes = list(copied.nodes)
    by_name = {node.name: node for node in nodes}
    order = {node: position for position, node in enumerate(nodes)}
    for before, after in left_out:

        def follows(user: Node, cut: int = after.position) -> bool:
            return order[user] > cut

        by_name[after.node].replace_all_uses_with(by_name[before.node], delete_user_cb=follows)
        for node in reversed(nodes[before.position + 1 : after.position + 1]):
            if not node.users:
                copied.erase_node(node)
    return GraphModule(graph, copied)
