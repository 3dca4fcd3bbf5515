"""How a token model turns tokens into one vector, recognised from its own tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from exitkit.surgery.capturing import Capture
from exitkit.surgery.liveness import op_name, value_of

_LOOK_AHEAD = 200


@dataclass(frozen=True)
class Readout:
    """``first``: the token at index 0 (class token); ``last``: the last, as decoders have it; ``mean``: all tokens;
    ``masked_mean``: those under a mask.

    Attributes:
        skip: leading tokens that a mean leaves out (class and register tokens).
        mask: for ``masked_mean`` and ``last``, the keyword or position of the input that holds the mask (B, T).
    """

    kind: Literal["first", "last", "mean", "masked_mean"] = "mean"
    skip: int = 0
    mask: int | str | None = None


def find_readout(captured: Capture, last_tokens: str) -> Readout:
    """The read-out applied to ``last_tokens``, the node of the deepest boundary of shape (B, T, D).

    A tail that cannot be read (attention pooling, say) gives a mean, under the attention mask if there is one.
    """
    nodes = {node.name: node for node in captured.graph.graph.nodes}
    order = {node: index for index, node in enumerate(nodes.values())}
    queue, skip = [nodes[last_tokens]], 0
    for node in queue:
        for user in sorted(node.users, key=lambda item: order[item]):
            name, value = op_name(user), value_of(user)
            if name == "select" and user.args[1] == 1:
                return _of_token(user.args[2])
            if name == "index" and value is not None and value.dim() == 2:
                return Readout("last", mask=_attention_mask(captured))
            if name == "slice" and user.args[1:2] == (1,) and isinstance(start := user.args[2], int):
                if value is not None and value.shape[1] == 1:
                    return _of_token(start)
                skip = max(skip, start)
            if name in {"sum", "mean", "adaptive_avg_pool1d"} and not _keeps_tokens(user):
                mask = _mask_key(captured, node) if name == "sum" else None
                return Readout("masked_mean", mask=mask) if mask is not None else Readout("mean", skip)
            if value is not None and value.dim() == 3 and len(queue) < _LOOK_AHEAD and user not in queue:
                queue.append(user)
    mask = _attention_mask(captured)
    return Readout("masked_mean", mask=mask) if mask is not None else Readout("mean", skip)


def _of_token(index: object) -> Readout:
    kinds: dict[object, Readout] = {0: Readout("first"), -1: Readout("last")}
    return kinds.get(index, Readout())


def _attention_mask(captured: Capture) -> int | str | None:
    return next((key for key in captured.spec.keys if "attention_mask" in str(key)), None)


def _keeps_tokens(reduction: Node) -> bool:
    """A reduction over features only (the variance of a hand-written norm) is not a read-out."""
    if op_name(reduction) == "adaptive_avg_pool1d":
        return False
    dims = reduction.args[1] if len(reduction.args) > 1 else None
    return isinstance(dims, list | tuple) and 1 not in dims and -2 not in dims


def _mask_key(captured: Capture, product: Node) -> int | str | None:
    """The input that multiplies the tokens before they are summed, followed back to the model's arguments."""
    if op_name(product) != "mul":
        return None
    placeholders = [node for node in captured.graph.graph.nodes if node.op == "placeholder"]
    for factor in product.all_input_nodes:
        node = factor
        while len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if node in placeholders:
            return captured.spec.keys[placeholders.index(node)]
    return None
