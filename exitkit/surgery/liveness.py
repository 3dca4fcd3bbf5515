"""What is alive where: the data flow of a captured graph, node by node, in execution order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_SHAPE_ONLY = frozenset(
    "sym_size size sym_numel sym_stride zeros_like ones_like full_like empty_like rand_like randn_like new_zeros "
    "new_ones new_full new_empty".split()
)
"""Operations that read their argument's shape and never its data."""

_VIEWS = frozenset(
    "slice select view reshape alias unsqueeze squeeze transpose permute t detach expand narrow diagonal".split()
)
"""Operations whose result shares its argument's memory."""

_PRODUCTS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear addmm mm matmul bmm "
    "baddbmm einsum lstm gru bilinear".split()
)


def op_name(node: Node) -> str:
    """``conv2d`` for ``torch.ops.aten.conv2d.default``; the plain name for any other callable."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2].rstrip("_") or str(schema.name)
    return getattr(node.target, "__name__", str(node.target))


def value_of(node: Node) -> Tensor | None:
    """The fake tensor that stands for a node's result, or None when it is not a single tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def constant(size: int | torch.SymInt) -> int | None:
    """A size that is the same for every input, though a SymInt may hold it; None for others."""
    return int(str(size)) if str(size).isdecimal() else None


def has_factor(size: int | torch.SymInt, batch: int | torch.SymInt) -> bool:
    """Whether a size is the symbolic ``batch`` times something that does not depend on it."""
    if not isinstance(size, torch.SymInt) or not isinstance(batch, torch.SymInt):
        return False
    symbol, expression = batch.node.expr, size.node.expr
    return symbol in expression.free_symbols and symbol not in (expression / symbol).free_symbols


def multiple_of(size: int | torch.SymInt, batch: int | torch.SymInt) -> int | None:
    """How many times the symbolic ``batch`` a size is; None where it is not a multiple of it."""
    if not isinstance(size, torch.SymInt) or not isinstance(batch, torch.SymInt):
        return None
    ratio = size.node.expr / batch.node.expr
    return int(ratio) if ratio.is_Integer else None


@dataclass(frozen=True)
class Flow:
    """Positions, lifetimes and dependencies of a graph's nodes.

    ``activations`` depend both on a user input's data and on a parameter, and are floating point. ``weighted`` are
    the products of an activation or an input with a parameter, in order of execution.
    """

    order: dict[Node, int]
    last_use: dict[Node, int]
    activations: frozenset[Node]
    weighted: tuple[Node, ...]
    live_activations: tuple[int, ...]
    """At each position, how many activations were produced up to there and are used after it."""

    def live(self, position: int) -> Iterator[Node]:
        """Every non-parameter value produced up to ``position`` and used after it, in execution order."""
        for node, index in self.order.items():
            if index <= position < self.last_use[node] and node.op != "get_attr":
                yield node


def analyse(graph: GraphModule) -> Flow:
    """One pass over ``graph`` for everything the cuts need."""
    parameters = {name for name, _ in graph.named_parameters(remove_duplicate=False)}
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    data: set[Node] = set()
    weights: set[Node] = set()
    weighted: list[Node] = []
    for node in order:
        if node.op == "placeholder":
            data.add(node)
        elif node.op == "get_attr" and str(node.target) in parameters:
            weights.add(node)
        elif node.op == "call_function" and op_name(node) not in _SHAPE_ONLY:
            sources = node.all_input_nodes
            if any(source in data for source in sources):
                data.add(node)
            if any(source in weights for source in sources):
                weights.add(node)
            if _is_weighted(node, data, weights):
                weighted.append(node)
            written = written_by(node)  # a buffer filled in place carries what was written into it
            data.update(written if node in data else ())
            weights.update(written if node in weights else ())
    activations = frozenset(node for node in data & weights if _is_floating(node))
    last_use = {node: max((order[user] for user in node.users), default=order[node]) for node in order}
    return Flow(order, last_use, activations, tuple(weighted), _count_live(order, last_use, activations))


def is_mutable(node: Node) -> bool:
    """Whether an operation writes into an argument."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def written_by(node: Node) -> list[Node]:
    """The tensors that an in-place operation writes into: its first argument, and what that is a view of."""
    if not is_mutable(node):
        return []
    chain: list[Node] = []
    base = node.args[0] if node.args else None
    while isinstance(base, Node) and base.op in ("call_function", "placeholder"):
        chain.append(base)
        base = base.args[0] if op_name(base) in _VIEWS and base.args else None
    return chain


def _is_weighted(node: Node, data: set[Node], weights: set[Node]) -> bool:
    sources = node.all_input_nodes
    has_weight = any(source in weights and source not in data for source in sources)
    return op_name(node) in _PRODUCTS and has_weight and any(source in data for source in sources)


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(item, Tensor) and item.is_floating_point() for item in values)


def _count_live(order: dict[Node, int], last_use: dict[Node, int], activations: frozenset[Node]) -> tuple[int, ...]:
    change = [0] * (len(order) + 1)
    for node in activations:
        change[order[node]] += 1
        change[last_use[node]] -= 1
    counts, total = [], 0
    for delta in change[:-1]:
        total += delta
        counts.append(total)
    return tuple(counts)


def submodule(root: nn.Module, path: str) -> nn.Module:
    """``root.get_submodule(path)``, where the empty path is the root itself."""
    return root.get_submodule(path) if path else root
