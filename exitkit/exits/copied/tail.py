"""The backbone's tail: what follows a block, up to its own read-out, cut out of the graph to be copied into exits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from exitkit.common.errors import ArgumentError
from exitkit.exits.copied.norms import with_norms
from exitkit.exits.copied.shorten import Gap, without
from exitkit.exits.legal_actions import LegalActions, legal_in
from exitkit.surgery.boundaries import Boundary
from exitkit.surgery.capturing import Capture, untouched
from exitkit.surgery.layout import Layout
from exitkit.surgery.liveness import is_mutable, op_name, written_by
from exitkit.surgery.partition import Piece, build, partition_at


@dataclass(frozen=True)
class Tail:
    """What the backbone does after a block. After the last one: final norm, pooling, pooler, classifier.

    Attributes:
        body: feature (and inputs) → vector (B, D): the tail up to its last linear layer, sharing the backbone's weights.
        linear: that layer, whose output is the logits; where the tail does not end in one, the identity.
        inputs: the model's inputs that the body reads beside the feature, by position or keyword (masks, token ids).
        shape, layout: of the feature it reads, for one sample.
    """

    body: GraphModule
    linear: nn.Linear
    inputs: tuple[int | str, ...]
    shape: tuple[int, ...]
    layout: Layout


def find_tail(captured: Capture, boundary: Boundary, num_classes: int, left_out: Sequence[Gap] = ()) -> Tail:
    """The part of a captured backbone that follows ``boundary``, a cut with a single activation, without some blocks."""
    graph = without(captured.graph, left_out) if left_out else captured.graph
    nodes = list(graph.graph.nodes)
    feature = next(node for node in nodes if node.name == boundary.node)
    logits = nodes[-1].all_input_nodes[0]
    if isinstance(captured.backbone, LegalActions):
        logits = logits.all_input_nodes[0]  # before the mask, which the head applies itself
    linear, vector = _last_linear(graph, logits, num_classes)
    piece = Piece(_between(nodes, feature, boundary.position, vector), feature)
    stage = build(graph, piece, [vector], ())
    if any(map(is_mutable, piece.own)):
        _copy_inputs(stage.module)
    placeholders = [node.name for node in nodes if node.op == "placeholder"]
    inputs = tuple(captured.spec.keys[placeholders.index(name)] for name in stage.inputs[1:])
    tail = Tail(with_norms(stage.module), linear, inputs, boundary.shape, boundary.layout)
    if not left_out:
        _check(captured, boundary, tail)
    return tail


def _check(captured: Capture, boundary: Boundary, tail: Tail) -> None:
    """Run the tail on the feature at its boundary: it must give the backbone's logits."""
    tensors = [tensor.clone() for tensor in captured.example.tensors]
    with untouched(captured.backbone), torch.no_grad():
        feature, logits = partition_at(captured, [boundary]).run(tensors)
        given = dict(zip(captured.spec.keys, captured.example.tensors, strict=True))
        (vector,) = tail.body(feature, *(given[key] for key in tail.inputs))
        again = tail.linear(vector)
    if isinstance(captured.backbone, LegalActions):
        legal = legal_in(logits)
        again, logits = again[legal], logits[legal]
    if not torch.allclose(again, logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise ArgumentError(
            f"head='tail': the copied read-out of {type(captured.backbone).__name__} differs from it by up to "
            f"{float((again - logits).abs().max()):.2e}; use head='auto'"
        )


def _last_linear(graph: GraphModule, logits: Node, num_classes: int) -> tuple[nn.Linear, Node]:
    """The linear layer that gives the logits and the vector it reads; else the identity and the logits."""
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    vector = logits.args[0] if op_name(logits) == "linear" else None
    weights = [parameters.get(str(getattr(arg, "target", None))) for arg in logits.args[1:]]
    if not isinstance(vector, Node) or vector.meta["val"].dim() != 2 or weights[:1] in ([], [None]):
        like = logits.meta["val"]
        eye = torch.eye(num_classes, dtype=like.dtype, device=like.device)
        return _linear(eye, torch.zeros_like(eye[0])), logits
    weight, bias = [*weights, None][:2]
    assert weight is not None
    return _linear(weight, torch.zeros(num_classes, device=weight.device) if bias is None else bias), vector


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _between(nodes: list[Node], feature: Node, cut: int, result: Node) -> list[Node]:
    """The nodes that ``result`` needs and that do not follow from the feature's value or sizes, in execution order.

    A node needs what is written in place into its value; into the feature's, what is written after the cut.
    """
    sizes = Piece([], feature)
    writers: dict[Node, list[Node]] = defaultdict(list)
    for position, node in enumerate(nodes):
        for target in written_by(node):
            if target is not feature or position > cut:
                writers[target].append(node)
    needed: set[Node] = set()
    pending = [result, *writers[feature]]
    for node in pending:
        if node not in needed and node is not feature and node.op == "call_function" and not sizes.is_recomputed(node):
            needed.add(node)
            pending.extend([*node.all_input_nodes, *writers[node]])
    return [node for node in nodes if node in needed]


def _copy_inputs(module: GraphModule) -> None:
    """Let a tail that writes in place write into copies: the backbone goes on with the feature and the inputs."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    with module.graph.inserting_after(placeholders[-1]):
        for node in placeholders:
            copied = module.graph.call_function(torch.ops.aten.clone.default, (node,))
            node.replace_all_uses_with(copied, delete_user_cb=lambda user, own=copied: user is not own)
    module.recompile()
