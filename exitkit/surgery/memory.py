"""Memory: which bytes a graph's values and parameters take, by storage, so that views are counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, UntypedStorage
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

Storages = dict[StorageWeakRef, int]
"""The storages behind a value, and their bytes."""


def storages_of(value: Any) -> Storages:
    """The storages of the tensors in ``value``; a view has that of its base, an in-place result that of its argument."""
    storages = [_storage(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def _storage(tensor: Tensor) -> UntypedStorage:
    while is_functorch_wrapped_tensor(tensor):  # within a vmap, by which some models make their masks
        tensor = get_unwrapped(tensor)
    return tensor.untyped_storage()


def alive_bytes(graph: GraphModule, storages: Sequence[Storages]) -> tuple[int, ...]:
    """Bytes alive at each node, given the storages of each node's result, in execution order.

    A storage is alive from the node that first returns it to the last node that reads it or a view of it, both
    included: an operation's arguments and its result are alive together. The graph's inputs are values like any other;
    parameters and buffers, their views, and what a kernel allocates for itself are not counted.
    """
    order = _order(graph)
    constant = {key for node, made in zip(order, storages, strict=True) if node.op == "get_attr" for key in made}
    sizes: Storages = {}
    first: dict[StorageWeakRef, int] = {}
    last: dict[StorageWeakRef, int] = {}
    for (node, position), made in zip(order.items(), storages, strict=True):
        end = max((order[user] for user in node.users), default=position)
        for key in made.keys() - constant:
            sizes[key] = made[key]
            first.setdefault(key, position)
            last[key] = max(last.get(key, 0), end)
    change: Counter[int] = Counter()
    for key, size in sizes.items():
        change[first[key]] += size
        change[last[key] + 1] -= size
    return tuple(accumulate(change[position] for position in range(len(order))))


def parameter_bytes(graph: GraphModule) -> tuple[int, ...]:
    """Bytes of the parameters read up to and including each node; one that is read again, under any name, counts once."""
    order = _order(graph)
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    first: dict[Tensor, int] = {}
    for node in order:
        if node.op == "get_attr" and node.users and node.target in parameters:
            parameter = parameters[str(node.target)]
            read = min(order[user] for user in node.users)
            first[parameter] = min(first.get(parameter, read), read)
    change: Counter[int] = Counter()
    for tensor, position in first.items():
        change[position] += tensor.nbytes
    return tuple(accumulate(change[position] for position in range(len(order))))


def _order(graph: GraphModule) -> dict[Node, int]:
    return {node: position for position, node in enumerate(graph.graph.nodes)}
