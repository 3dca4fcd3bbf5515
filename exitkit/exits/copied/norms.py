"""BatchNorm in a captured graph, whose statistics are constants there, made into layers that can learn again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from exitkit.surgery.liveness import op_name

_LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""By the number of dimensions of what they normalise."""


def with_norms(module: GraphModule) -> GraphModule:
    """``module`` with its batch norms as layers that share its weights and follow train() and eval(); else as it was."""
    graph = module.graph
    layers: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) != "batch_norm" or node.args[3] is None:
            continue
        tensors = [None if arg is None else getattr(module, arg.target) for arg in node.args[1:5]]
        name = f"norm_{len(layers)}"
        layers[name] = _layer(node.meta["val"].dim(), tensors, momentum=node.args[6], eps=node.args[7])
        with graph.inserting_before(node):
            called = graph.create_node("call_module", name, (node.args[0],), name=name)
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    if not layers:
        return module
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)
    kept = {str(node.target): getattr(module, node.target) for node in graph.nodes if node.op == "get_attr"}
    return GraphModule({**kept, **layers}, graph)


def _layer(dims: int, tensors: list[Tensor | None], momentum: float, eps: float) -> nn.Module:
    weight, bias, mean, variance = tensors
    assert mean is not None
    assert variance is not None
    layer = _LAYERS[dims](len(mean), eps, momentum, affine=weight is not None, device=mean.device, dtype=mean.dtype)
    layer.running_mean, layer.running_var = mean, variance
    if weight is not None:
        layer.weight, layer.bias = (
            nn.Parameter(weight),
            nn.Parameter(torch.zeros_like(weight) if bias is None else bias),
        )
    return layer.eval()
