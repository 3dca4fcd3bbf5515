"""Lowering: the captured graph split at the boundaries into stages that share the backbone's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from exitkit.surgery.boundaries import Boundary
from exitkit.surgery.capturing import Capture
from exitkit.surgery.liveness import constant, has_factor, op_name, value_of, written_by

_SAME_NUMBERS = frozenset(
    "to view reshape flatten unsqueeze squeeze expand transpose permute t contiguous clone".split()
)
"""Operations that keep every integer of their argument."""


@dataclass(frozen=True)
class Stage:
    """One piece of the backbone, from one boundary to the next.

    Attributes:
        module: takes the values named by ``inputs``, returns a tuple of those named by ``outputs``.
        inputs, outputs: names of values in the captured graph; the first output is the feature at the boundary
            (the logits, for the last stage), the rest is context that later stages need.
        live: every value that must outlive this stage, those of earlier stages included.
    """

    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    live: tuple[str, ...]


@dataclass(frozen=True)
class Partition:
    """The inference view of a backbone.

    Attributes:
        inputs: names of the input tensors.
        sizes: the shape of each input tensor; None where any size is taken (the batch, the length of a text).
        tables: the rows of the table in which an input's numbers are looked up, as a vocabulary; None where they are not.
        stages: in order.
        axes: the dimension in which a value has its samples, by name, one entry or several consecutive ones for each; a
            value that is not named is the same for every sample.
        dynamic: the dimensions of each value that follow the batch or the length of a text, by name.
    """

    inputs: tuple[str, ...]
    sizes: tuple[tuple[int | None, ...], ...]
    tables: tuple[int | None, ...]
    stages: tuple[Stage, ...]
    axes: dict[str, int]
    dynamic: dict[str, tuple[int, ...]]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run all stages: the feature at each boundary (copies, as a stage may write into its input), then the logits."""
        values: dict[str, Any] = dict(zip(self.inputs, tensors, strict=True))
        results = []
        for stage in self.stages:
            outputs = stage.module(*(values[name] for name in stage.inputs))
            values.update(zip(stage.outputs, outputs, strict=True))
            values = {name: values[name] for name in stage.live}
            results.append(outputs[0].clone())
        return results


def partition_at(captured: Capture, boundaries: Sequence[Boundary]) -> Partition:
    """Split at ``boundaries`` (in execution order): one stage up to each, and one from the last to the logits."""
    nodes = list(captured.graph.graph.nodes)
    by_name = {node.name: node for node in nodes}
    ends = [boundary.position for boundary in boundaries] + [len(nodes) - 1]
    starts = [0] + [end + 1 for end in ends[:-1]]
    features = [by_name[boundary.node] for boundary in boundaries]
    pieces = [
        Piece(nodes[start : end + 1], feature)
        for start, end, feature in zip(starts, ends, [None, *features], strict=True)
    ]
    stages, needed = [], dict.fromkeys(nodes[-1].all_input_nodes)
    for piece, result in zip(reversed(pieces), reversed([*features, nodes[-1].all_input_nodes[0]]), strict=True):
        made = [node for node in needed if node in piece.made and node.op != "placeholder"]
        outputs = [result, *(node for node in made if node is not result)]
        live = tuple(node.name for node in needed)
        needed = dict.fromkeys([*piece.reads, *(node for node in needed if node not in piece.made)])
        stages.append(build(captured.graph, piece, outputs, live))
    inputs = [node for node in nodes if node.op == "placeholder"]
    sizes = tuple(tuple(constant(size) for size in node.meta["val"].shape) for node in inputs)
    values = {node.name: value for node in nodes if (value := value_of(node)) is not None}
    dynamic = {
        name: tuple(dim for dim, size in enumerate(value.shape) if constant(size) is None)
        for name, value in values.items()
    }
    names = tuple(node.name for node in inputs)
    tables = tuple(_table_rows(node) for node in inputs)
    return Partition(names, sizes, tables, tuple(reversed(stages)), _batch_axes(values, names), dynamic)


def _table_rows(value: Node) -> int | None:
    """The rows of the smallest embedding that looks up every number of this value."""
    found = []
    for user in value.users:
        if op_name(user) == "embedding" and user.args[1] is value:
            table = value_of(user.all_input_nodes[0])
            found.append(None if table is None else constant(table.shape[0]))
        elif op_name(user) in _SAME_NUMBERS and user.args[0] is value:
            found.append(_table_rows(user))
    return min((rows for rows in found if rows is not None), default=None)


def _batch_axes(values: Mapping[str, Tensor], inputs: Sequence[str]) -> dict[str, int]:
    """Read off the symbolic batch size in the shapes: the dimension that has it as a factor holds the samples."""
    batch = next(values[name].shape[0] for name in inputs if name in values)
    axes = {}
    for name, value in values.items():
        dims = [dim for dim, size in enumerate(value.shape) if has_factor(size, batch)]
        if dims:
            axes[name] = dims[0]
    return axes


class Piece:
    """A range of nodes, and the values of earlier ones that it reads: the feature first, then context.

    Sizes are not carried over a cut but read from the feature again, because the batch size may have changed
    when samples left; only a size that the feature does not show is carried, as an integer.
    """

    def __init__(self, nodes: list[Node], feature: Node | None) -> None:
        self.own = [node for node in nodes if node.op == "call_function"]
        self.made = set(nodes)
        self.feature = feature
        self.reads: list[Node] = [] if feature is None else [feature]
        pending = [source for node in nodes for source in node.all_input_nodes]
        for node in pending:
            if (node in self.made and node.op != "placeholder") or node.op == "get_attr" or node in self.reads:
                continue
            if self.is_recomputed(node):
                pending.extend(node.all_input_nodes if self.dimension(node) is None else [])
            else:
                self.reads.append(node)

    def dimension(self, node: Node) -> int | None:
        """Which dimension of the feature an integer equals."""
        value = None if self.feature is None else value_of(self.feature)
        if value is None or not _is_integer(node):
            return None
        return next((d for d, size in enumerate(value.shape) if str(size) == str(node.meta["val"])), None)

    def is_recomputed(self, node: Node) -> bool:
        """Integers that follow from the feature's own sizes."""
        if not _is_integer(node) or node.op != "call_function":
            return False
        sources = node.all_input_nodes
        return self.dimension(node) is not None or (
            bool(sources) and all(self.is_recomputed(item) for item in sources)
        )


def build(root: GraphModule, piece: Piece, outputs: list[Node], live: tuple[str, ...]) -> Stage:
    """A piece of the graph ``root`` as a module of its own, whose parameters stay root's."""
    graph = fx.Graph()
    copies: dict[Node, Node] = {}

    def copy(node: Node) -> Node:
        if node not in copies:
            dimension = piece.dimension(node) if node not in piece.made else None
            if dimension is None:
                copies[node] = graph.node_copy(node, copy)
            else:
                copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (copies[piece.reads[0]], dimension))
        return copies[node]

    for node in piece.reads:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    written = {base for node in piece.own for base in written_by(node)}
    for node in piece.reads:
        if node in written and node.name not in live:  # a program that leaves its inputs alone can be exported
            copies[node] = graph.call_function(torch.ops.aten.clone.default, (copies[node],))
            copies[node].meta = dict(node.meta)
    for node in piece.own:
        copy(node)
    graph.output(tuple(copy(node) for node in outputs))
    attributes = _flattened(root, graph)
    names = tuple(node.name for node in piece.reads), tuple(node.name for node in outputs)
    return Stage(GraphModule(attributes, graph), *names, live)


def _flattened(root: GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """What the graph reads from ``root``, under names without dots: looking up a deep path takes longer than a small op."""
    names: dict[str, str] = {}
    attributes = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            flat = str(node.target).replace(".", "_")
            name = names.setdefault(node.target, f"{flat}_{len(names)}" if flat in attributes else flat)
            attributes[name] = attrgetter(node.target)(root)
            node.target = name
    return attributes


def _is_integer(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)
