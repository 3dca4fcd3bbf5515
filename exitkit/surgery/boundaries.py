"""Boundaries: the places where a backbone can be cut, found in its graph alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from torch.fx import Node

from exitkit.errors import ExitkitError
from exitkit.surgery.capture import BACKBONE, Capture, untouched
from exitkit.surgery.layout import Layout, layout_of
from exitkit.surgery.liveness import Flow, analyse, submodule, value_of
from exitkit.surgery.macs import profile


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
class Boundary:
    """A clean cut: exactly one activation is alive, and a module call has just ended.

    Attributes:
        call: the module call whose output is the activation.
        rank: which call of that module object it is, from 0, under whatever names the object is registered.
        aliases: names of other calls that end at the same cut; ``at=`` accepts them too.
        node: name of the activation in the captured graph.
        position: index of the last graph node before the cut.
        shape: the activation's shape for one sample, without the batch dimension.
        layout: what its dimensions mean.
        is_block: whether a block ends here; ``every=`` and the other placements count blocks.
        macs: the backbone's MACs per sample up to here.
        share: ``macs`` as a share of the whole backbone.
    """

    call: ModuleCall
    rank: int
    aliases: tuple[str, ...]
    node: str
    position: int
    shape: tuple[int, ...]
    layout: Layout
    is_block: bool
    macs: int
    share: float

    @property
    def name(self) -> str:
        return self.call.name


@dataclass(frozen=True)
class Anatomy:
    """What surgery knows of a backbone: its boundaries in order, and its cost in MACs per sample."""

    boundaries: tuple[Boundary, ...]
    macs: int

    @property
    def blocks(self) -> tuple[Boundary, ...]:
        return tuple(boundary for boundary in self.boundaries if boundary.is_block)


def find_boundaries(captured: Capture) -> Anatomy:
    """Every clean cut of a captured backbone, with the blocks among them marked.

    Raises:
        ExitkitError: the backbone has no clean cut at all (two streams run side by side throughout).
    """
    flow = analyse(captured.graph)
    calls = _calls(flow)
    cuts = _clean_cuts(flow, calls)
    if not cuts:
        reason = (
            "nowhere does a module call end with a single batch-first activation alive (several streams run side by side "
            "throughout, residuals are added outside any module, or the batch is not the first dimension)"
            if len(flow.weighted) > 1
            else f"it has {len(flow.weighted)} weighted layer, and an exit needs one before it and one after it"
        )
        raise ExitkitError(f"{type(captured.backbone).__name__} has no boundary: {reason}, so no exit can be attached")
    blocks = _blocks(captured.backbone, flow, calls, cuts) or _before_weighted_layers(flow, cuts)
    with untouched(captured.backbone):
        costs = profile(captured.graph, captured.example)
    names = [node.name for node in flow.order]
    ranks = _ranks(captured.backbone, calls)
    boundaries = []
    for node, ending in cuts.items():
        chosen = next((call for call in ending if call in blocks), ending[0])
        position = calls[chosen][-1]
        macs = costs.macs[names[position]]
        boundaries.append(
            Boundary(
                call=chosen,
                rank=ranks[chosen],
                aliases=tuple(call.name for call in ending if call != chosen),
                node=node.name,
                position=position,
                shape=costs.shapes[node.name][1:],
                layout=layout_of(node),
                is_block=chosen in blocks,
                macs=macs,
                share=macs / max(costs.total, 1),
            )
        )
    return Anatomy(tuple(boundaries), costs.total)


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
            count = key.rpartition("@")[2] if "@" in key else "0"
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


def _clean_cuts(flow: Flow, calls: dict[ModuleCall, list[int]]) -> dict[Node, list[ModuleCall]]:
    """The activation of each clean cut, in execution order, with the calls that end there, outermost first."""
    nodes = list(flow.order)
    weighted = [flow.order[node] for node in flow.weighted]
    batch = next(
        value.shape[0] for node in nodes if node.op == "placeholder" and (value := value_of(node)) is not None
    )
    cuts: dict[Node, list[ModuleCall]] = defaultdict(list)
    for call, positions in calls.items():
        end = positions[-1]
        if flow.live_activations[end] != 1 or not weighted or not weighted[0] <= end < weighted[-1]:
            continue
        activation = next(node for node in flow.live(end) if node in flow.activations)
        value = value_of(activation)
        made_here = flow.order[activation] >= positions[0] and call in _stack(activation)
        if made_here and value is not None and value.dim() > 1 and str(value.shape[0]) == str(batch):
            cuts[activation].append(call)
    return dict(sorted(cuts.items(), key=lambda item: flow.order[item[0]]))


def _blocks(
    backbone: nn.Module, flow: Flow, calls: dict[ModuleCall, list[int]], cuts: dict[Node, list[ModuleCall]]
) -> set[ModuleCall]:
    """Calls of repeated siblings in a list of modules, with at least two weighted layers each.

    Where such calls nest (a stage around its blocks, a block around a chain of layers), a kind of module that is
    once free of inner ones is a block wherever it stands; any other, and a plain ``Sequential``, is a container.
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
    atomic = {call.type for call in members if not inner[call]} - {"Sequential"}
    covered = {other for call in members if call.type in atomic for other in inner[call]}
    return {call for call in members if call not in covered and (call.type in atomic or not inner[call])}


def _in_list(backbone: nn.Module, path: str) -> bool:
    return isinstance(submodule(backbone, path.rpartition(".")[0]), nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _encloses(calls: dict[ModuleCall, list[int]], outer: ModuleCall, inner: ModuleCall) -> bool:
    nested = inner.path.startswith(f"{outer.path}.")
    return nested and calls[outer][0] <= calls[inner][0] and calls[inner][-1] <= calls[outer][-1]


def _before_weighted_layers(flow: Flow, cuts: dict[Node, list[ModuleCall]]) -> set[ModuleCall]:
    """Without a list of blocks (VGG, AlexNet): the last cut before each weighted layer but the first."""
    weighted = [flow.order[node] for node in flow.weighted]
    chosen = set()
    for previous, following in pairwise(weighted):
        between = [ending for node, ending in cuts.items() if previous <= flow.order[node] < following]
        if between:
            chosen.add(between[-1][0])
    return chosen
