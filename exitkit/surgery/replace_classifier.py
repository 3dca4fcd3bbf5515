"""Transfer: the backbone's last layer (linear, or a 1 × 1 convolution), found in its graph and given other outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import Node

from exitkit.common.errors import NotCapturableError
from exitkit.surgery.capturing import BACKBONE, Capture, capture
from exitkit.surgery.liveness import op_name

_PASSED = frozenset(
    """index select slice view reshape flatten squeeze clone contiguous to _to_copy dropout alias detach relu mean
    adaptive_avg_pool2d avg_pool2d""".split()
)
"""Operations between the last layer and the logits that leave the classes where they are, as SqueezeNet's do."""


def outputs_of(captured: Capture) -> int:
    """How many outputs the backbone has: classes, or 1 for regression."""
    return int(_logits(captured).meta["val"].shape[1])


def with_outputs(captured: Capture, outputs: int | None) -> tuple[Capture, tuple[str, ...]]:
    """The backbone with so many outputs, or as it is (None).

    If it has others, its last layer is replaced in place by a freshly initialised one, and the graph captured anew. timm
    models do it themselves (``reset_classifier``); elsewhere it is the linear layer, or the 1 × 1 convolution, that gives the
    logits. Hugging Face configurations follow.

    Returns:
        The new capture, and the state-dict names of the new layer; none where nothing was replaced.

    Raises:
        ExitkitError: no such layer gives the logits, or it has another task too. The model may have been changed then:
            see :func:`unchanged_on_error`.
    """
    if outputs is None or outputs == outputs_of(captured):
        return captured, ()
    model = captured.backbone
    modules = set(model.modules())
    known = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if callable(reset := getattr(model, "reset_classifier", None)):
        reset(outputs)
    else:
        _replace(captured, outputs)
    for module in set(model.modules()) - modules:
        module.to(like.device, like.dtype).train(model.training)
    _tell_config(model, outputs)
    fresh = tuple(name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in known)
    again = capture(model, captured.spec.batch(captured.example.tensors))
    if outputs_of(again) != outputs:
        raise _none_found(model, outputs)
    return again, fresh


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Every submodule's attributes, as they were, if the block fails. Values of tensors are not looked at."""
    registries = ("_modules", "_parameters", "_buffers")
    saved: list[tuple[nn.Module, dict[str, Any]]] = [
        (module, {**module.__dict__, **{name: copy.copy(module.__dict__[name]) for name in registries}})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, attributes in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise


def _logits(captured: Capture) -> Node:
    output: Node = next(node for node in reversed(captured.graph.graph.nodes) if node.op == "output")
    return output.all_input_nodes[0]


def ends_in_softmax(captured: Capture) -> bool:
    """Whether a backbone returns probabilities."""
    return op_name(_logits(captured)) in ("softmax", "_softmax")


def _replace(captured: Capture, outputs: int) -> None:
    model, node = captured.backbone, _logits(captured)
    while op_name(node) in _PASSED and isinstance(node.args[0], Node):
        node = node.args[0]
    weight = node.args[1] if op_name(node) in ("linear", "conv2d", "conv3d") else None
    if not isinstance(weight, Node) or weight.op != "get_attr" or len(weight.users) > 1:
        raise _none_found(model, outputs)
    path = str(weight.target).removeprefix(f"{BACKBONE}.").removesuffix(".weight")
    parent, _, name = path.rpartition(".")
    layer = dict(model.named_modules(remove_duplicate=False)).get(path)
    fresh = _fresh(layer, outputs)
    if fresh is None or not path:
        raise _none_found(model, outputs)
    setattr(model.get_submodule(parent), name, fresh)


def _fresh(layer: nn.Module | None, outputs: int) -> nn.Module | None:
    """A layer like this one with other outputs; None where it is no last layer that is known here."""
    if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
        return None
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype, "bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, **like)
    if {*layer.kernel_size, *layer.stride, layer.groups} != {1} or {*layer.padding} != {0}:
        return None
    return type(layer)(layer.in_channels, outputs, 1, **like)


def _tell_config(model: nn.Module, outputs: int) -> None:
    """Hugging Face models say how many labels they have in a configuration, which other models may share."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "num_labels"):
        config.num_labels = outputs
        model.config = config
        if hasattr(model, "num_labels"):
            model.__dict__["num_labels"] = outputs


def _none_found(model: nn.Module, outputs: int) -> NotCapturableError:
    return NotCapturableError(
        f"{type(model).__name__} has other outputs than the {outputs} asked for, and no single final layer to replace; "
        "build it with that many outputs, or replace its classifier before attaching"
    )
