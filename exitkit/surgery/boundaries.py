"""Boundaries: the places where a backbone can be cut, found in its graph alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import nn
from torch.fx import Node

from exitkit.common.errors import NotCapturableError
from exitkit.surgery.capturing import BACKBONE, Capture, untouched
from exitkit.surgery.layout import Layout, layout_of
from exitkit.surgery.liveness import Flow, analyse, multiple_of, submodule, value_of
from exitkit.surgery.macs import Profile, profile


@dataclass(frozen=True)
class ModuleCall:
    """The ``index``-th call (from 0) of the module at ``path``; a shared layer is called several times."""

    path: str
    index: int
    type: str

    @property
    def name(self) -> str:
        return f"{self.path}@{self.index}" if self.index else self.path


@dataclass(frozen=True)
class Activation:
    """A value that is alive at a boundary.

    Attributes:
        node: its name in the captured graph.
        shape: for one sample, without the batch dimension. Where a sample has several rows in the batch dimension (the
            pixels of TNT's patches), their number comes first.
        layout: what its dimensions mean.
    """

    node: str
    shape: tuple[int, ...]
    layout: Layout

    @property
    def positions(self) -> int:
        """At how many places (pixels, tokens) it has a vector of channels."""
        axis = {"channels_first": 0, "sequence": 0}.get(self.layout, -1)
        return prod(self.shape) // max(self.shape[axis], 1) if self.shape else 1


@dataclass(frozen=True)
class Boundary:
    """A clean cut: a module call has just ended, and no activation is alive but what it made.

    Attributes:
        call: the module call that made the activations.
        rank: which call of that module object it is, from 0, under whatever names the object is registered.
        aliases: names of other calls that end at the same cut; ``at=`` accepts them too.
        activations: what is alive, in the order written: one activation, or several where streams run side by side.
        read: index of the one that the head reads; by default the coarsest (the last written of those).
        position: index of the last graph node before the cut.
        is_block: whether a block ends here; ``every=`` and the other placements count blocks.
        macs: the backbone's MACs per sample up to here.
        share: ``macs`` as a share of the whole backbone.
    """

    call: ModuleCall
    rank: int
    aliases: tuple[str, ...]
    activations: tuple[Activation, ...]
    read: int
    position: int
    is_block: bool
    macs: int
    share: float

    @property
    def name(self) -> str:
        """The call's name; with the index of the activation, ``stage2.0[1]``, where not the default one is read."""
        return self.call.name if self.read == coarsest(self.activations) else f"{self.call.name}[{self.read}]"

    @property
    def node(self) -> str:
        """Name, in the captured graph, of the activation that is read."""
        return self.activations[self.read].node

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation that is read, for one sample."""
        return self.activations[self.read].shape

    @property
    def layout(self) -> Layout:
        return self.activations[self.read].layout


def coarsest(activations: Sequence[Activation]) -> int:
    """Index of the activation with the fewest positions that a head can read, and of those the last written."""
    return min(
        reversed(range(len(activations))),
        key=lambda index: (activations[index].layout == "other", activations[index].positions),
    )


@dataclass(frozen=True)
class Anatomy:
    """What surgery knows of a backbone: its boundaries in order, and what each node of its graph costs."""

    boundaries: tuple[Boundary, ...]
    costs: Profile

    @property
    def macs(self) -> int:
        """The backbone's MACs per sample."""
        return self.costs.total

    @property
    def blocks(self) -> tuple[Boundary, ...]:
        return tuple(boundary for boundary in self.boundaries if boundary.is_block)


def find_boundaries(captured: Capture) -> Anatomy:
    """Every clean cut of a captured backbone, with the blocks among them marked.

    Raises:
        ExitkitError: the backbone has no clean cut at all.
    """
    flow = analyse(captured.graph)
    calls = _calls(flow)
    cuts = _clean_cuts(flow, calls)
    if not cuts:
        reason = (
            "nowhere does a module call end with nothing else alive than batch-first activations that it made (residuals "
            "are added outside any module, several modules' outputs are kept, or the batch is not the first dimension; what a "
            "layer does, its residual included, can be moved into a module of its own)"
            if len(flow.weighted) > 1
            else f"it has {len(flow.weighted)} weighted layer, and an exit needs one before it and one after it"
        )
        if any("autocast" in str(node.target) for node in captured.graph.graph.nodes):
            reason = (
                "its forward enters torch.autocast, which the graph holds as one operation without layers; leave that out of "
                "the forward"
            )
        raise NotCapturableError(
            f"{type(captured.backbone).__name__} has no boundary: {reason}, so no exit can be attached"
        )
    blocks = _blocks(captured.backbone, flow, calls, cuts) or _before_weighted_layers(flow, cuts)
    with untouched(captured.backbone):
        costs = profile(captured.graph, captured.example)
    ranks = _ranks(captured.backbone, calls)
    boundaries = []
    for nodes, ending in cuts.items():
        chosen = next((call for call in ending if call in blocks), ending[0])
        position = calls[chosen][-1]
        macs = costs.macs[position]
        activations = tuple(_activation(node, costs.shapes[node.name]) for node in nodes)
        boundaries.append(
            Boundary(
                call=chosen,
                rank=ranks[chosen],
                aliases=tuple(call.name for call in ending if call != chosen),
                activations=activations,
                read=coarsest(activations),
                position=position,
                is_block=chosen in blocks,
                macs=macs,
                share=macs / max(costs.total, 1),
            )
        )
    return Anatomy(tuple(boundaries), costs)


def _calls(flow: Flow) -> dict[ModuleCall, list[int]]:
    """Positions of the nodes that each module call executed, outer calls before inner ones."""
    calls: dict[ModuleCall, list[int]] = defaultdict(list)
    for node, index in flow.order.items():
        for call in _stack(node):
            calls[call].append(index)
    return calls


def _stack(node: Node) -> Iterable[ModuleCall]:
    """The module calls a node was executed in, outermost first, without the capture's own wrapper."""
    for key, (path, kind) in node.meta.get("nn_module_stack", {}).items():
        if path.startswith(f"{BACKBONE}."):
            count = key.rpartition("@")[2] if "@" in key and not key.endswith(path) else "0"  # names may hold an @
            yield ModuleCall(path.removeprefix(f"{BACKBONE}."), int(count), str(kind).rpartition(".")[2])


def _ranks(backbone: nn.Module, calls: dict[ModuleCall, list[int]]) -> dict[ModuleCall, int]:
    """The rank of each call among the calls of the same module object, in execution order."""
    seen: Counter[int] = Counter()
    ranks = {}
    for call in sorted(calls, key=lambda call: calls[call][0]):
        module = id(submodule(backbone, call.path))
        ranks[call] = seen[module]
        seen[module] += 1
    return ranks


Cuts = dict[tuple[Node, ...], list[ModuleCall]]
"""The activations alive at each clean cut, in execution order, with the calls that end there, outermost first."""


def _clean_cuts(flow: Flow, calls: dict[ModuleCall, list[int]]) -> Cuts:
    nodes = list(flow.order)
    weighted = [flow.order[node] for node in flow.weighted]
    batch = next(
        value.shape[0] for node in nodes if node.op == "placeholder" and (value := value_of(node)) is not None
    )
    cuts: Cuts = defaultdict(list)
    for call, positions in calls.items():
        end = positions[-1]
        if not flow.live_activations[end] or not weighted or not weighted[0] <= end < weighted[-1]:
            continue
        alive = tuple(node for node in flow.live(end) if node in flow.activations)
        made_here = all(flow.order[node] >= positions[0] and call in _stack(node) for node in alive)
        rows = [_rows_per_sample(node, batch) for node in alive]
        if made_here and None not in rows and 1 in rows:
            cuts[alive].append(call)
    return dict(sorted(cuts.items(), key=lambda item: flow.order[item[0][-1]]))


def _rows_per_sample(activation: Node, batch: int | torch.SymInt) -> int | None:
    """How many rows each sample has in the first dimension; None where that is not a multiple of the batch."""
    value = value_of(activation)
    return None if value is None or value.dim() < 2 else multiple_of(value.shape[0], batch)


def _activation(node: Node, shape: tuple[int, ...]) -> Activation:
    """From the shape that one sample gives, which shows the rows per sample where the batch stands."""
    single = shape[0] == 1
    return Activation(node.name, shape[1:] if single else shape, layout_of(node) if single else "other")


def _blocks(backbone: nn.Module, flow: Flow, calls: dict[ModuleCall, list[int]], cuts: Cuts) -> set[ModuleCall]:
    """Calls of repeated siblings in a list of modules, with at least two weighted layers each.

    Where such calls nest (a stage around its blocks, a block around a chain of layers), a kind of module is a block
    wherever it stands if it is once free of inner ones, or if it always holds several, each of another kind (attention and
    feed-forward layers of T5); any other, and a plain ``Sequential``, is a container.
    """
    weighted = {flow.order[node] for node in flow.weighted}
    members = [
        call
        for ending in cuts.values()
        for call in ending
        if _in_list(backbone, call.path) and sum(position in weighted for position in calls[call]) > 1
    ]
    kinds = Counter(call.type for call in members)
    members = [call for call in members if kinds[call.type] > 1]
    inner = {call: [other for other in members if _encloses(calls, call, other)] for call in members}
    parts = {call: len({item.type for item in inner[call]}) for call in members}
    mixed = {call.type for call in members if parts[call] > 1}
    repeating = {call.type for call in members if parts[call] < len(inner[call])}
    atomic = ({call.type for call in members if not inner[call]} | (mixed - repeating)) - {"Sequential"}
    covered = {other for call in members if call.type in atomic for other in inner[call]}
    return {call for call in members if call not in covered and (call.type in atomic or not inner[call])}


def _in_list(backbone: nn.Module, path: str) -> bool:
    return isinstance(submodule(backbone, path.rpartition(".")[0]), nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _encloses(calls: dict[ModuleCall, list[int]], outer: ModuleCall, inner: ModuleCall) -> bool:
    nested = inner.path.startswith(f"{outer.path}.")
    return nested and calls[outer][0] <= calls[inner][0] and calls[inner][-1] <= calls[outer][-1]


def _before_weighted_layers(flow: Flow, cuts: Cuts) -> set[ModuleCall]:
    """Without a list of blocks (VGG, AlexNet): the last cut before each weighted layer but the first.

    Where there are maps or tokens, the linear layers that read vectors in the end are one block, the last.
    """
    weighted = [flow.order[node] for node in flow.weighted]
    chosen: list[tuple[bool, ModuleCall]] = []
    for previous, following in pairwise(weighted):
        between = [
            (all(_is_vector(node) for node in nodes), ending[0])
            for nodes, ending in cuts.items()
            if previous <= flow.order[nodes[-1]] < following
        ]
        if between:
            chosen.append(next((cut for cut in reversed(between) if not cut[0]), between[-1]))
    structured = {call for vector, call in chosen if not vector}
    return structured | {chosen[-1][1]} if structured else {call for _, call in chosen}


def _is_vector(node: Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() == 2
