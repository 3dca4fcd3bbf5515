"""Capture: the backbone's graph, by non-strict ``torch.export`` in eval mode with a dynamic batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from exitkit.common.errors import ArgumentError, ExitkitError, NotCapturableError
from exitkit.common.logs import quiet
from exitkit.surgery.default_inputs import example_for
from exitkit.surgery.hooks import alone
from exitkit.surgery.inputs import CallSpec, Example
from exitkit.surgery.supported import check_supported

BACKBONE = "backbone"
"""Path of the user's model inside the captured module; stripped from every name that users see."""


_MOST = 65_535
"""Samples: up to here cuDNN normalises a batch in eval mode, which a capture on a GPU asks about."""


_SHOWN = 120
"""Characters of what torch says of its own graph, which few can read."""


class _DataDependentError(Exception):
    """The backbone's path depends on the values of a tensor; the cause says where."""


class LogitsOf(nn.Module):
    """The backbone as a function of flat tensors that returns its logits alone."""

    def __init__(self, backbone: nn.Module, spec: CallSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec

    def forward(self, *tensors: Tensor) -> Tensor:
        args, kwargs = self.spec.call(tensors)
        try:
            output = self.backbone(*args, **kwargs)
        except RuntimeError as error:
            if "data-dependent" in str(error):  # torch.export would print the whole graph to stderr
                raise _DataDependentError from error
            raise
        _check_single(output)
        return logits_of(output)


@dataclass(frozen=True)
class Capture:
    """A backbone's graph and the example it was captured with.

    ``graph`` shares every parameter and buffer with ``backbone`` and maps flat tensors to logits (B, C).
    """

    backbone: nn.Module
    graph: GraphModule
    example: Example

    @property
    def spec(self) -> CallSpec:
        return self.example.spec


def capture(model: nn.Module, example_inputs: Any = None, name: str = "example_inputs") -> Capture:
    """Capture ``model`` without changing it: same weights, same training flags, hooks and RNG state.

    ``name`` is what the user knows the example by.

    Raises:
        ExitkitError: a model that :func:`exitkit.surgery.supported.check_supported` refuses, no inferable inputs, an example
            that does not run or holds nothing but NaN, an output that is not floating-point logits (B, C), a forward that
            torch.export cannot follow.
    """
    check_supported(model)
    example = example_for(model, example_inputs)
    _check_numbers(example, name)
    wrapped = LogitsOf(model, example.spec)
    with untouched(model), torch.no_grad():
        _check_logits(_run(wrapped, example, name), len(example.tensors[0]), model)
        program = _export(wrapped, example, model)
    return Capture(model, _simplified(program.module(check_guards=False)), example)


def _check_numbers(example: Example, name: str) -> None:
    for key, tensor in zip(example.spec.keys, example.tensors, strict=True):
        if not tensor.is_meta and bool(tensor.isnan().all()):
            raise ArgumentError(
                f"{name}: input {key!r} holds nothing but NaN; give values such as the model gets in use"
            )


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a classifier returns: a tensor, an object or mapping with ``logits``, a tuple."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        held = f" with keys {list(output)}" if isinstance(output, Mapping) else ""
        raise NotCapturableError(
            f"the model returns {type(output).__name__}{held}, not logits; exitkit needs a classifier that returns a "
            "tensor (B, C), a tuple that begins with it, or an object with .logits"
        )
    return output


def _check_single(output: Any) -> None:
    """Refuse a tuple of several predictions: which of them the exits should learn is not ours to choose."""
    if type(output) in (tuple, list) and sum(isinstance(item, Tensor) and item.dim() == 2 for item in output) > 1:
        shapes = ", ".join(str(tuple(item.shape)) for item in output if isinstance(item, Tensor))
        raise NotCapturableError(
            f"the model returns several outputs, of shapes {shapes}; wrap it in a module that returns the logits the exits "
            "are for"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; afterwards every submodule's training flag is as it was."""
    with alone():  # not while a capture has its own flags to bring back
        flags = [(module, module.training) for module in model.modules()]
        model.eval()
    try:
        yield
    finally:
        with alone():
            for module, training in flags:
                module.training = training


@contextmanager
def in_own_precision(device: torch.device) -> Iterator[None]:
    """Without the autocast that a caller may have on, whose casts would become part of a graph."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    with torch.autocast(kind, enabled=False):
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """``evaluation_mode``, alone, without autocast, and whatever a forward writes into buffers meanwhile is undone."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with alone(), in_own_precision(device):
        saved = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        versions = [buffer._version for _, _, buffer, _ in saved]
        try:
            with evaluation_mode(model):
                yield
        finally:
            for (module, name, buffer, values), version in zip(saved, versions, strict=True):
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.data.copy_(values)


def _run(wrapped: LogitsOf, example: Example, name: str) -> Tensor:
    try:
        logits: Tensor = wrapped(*(tensor.clone() for tensor in example.tensors))
        return logits
    except ExitkitError:
        raise
    except Exception as error:  # whatever the user's forward raises on the example
        if len(example.tensors[0]) > 1 and _runs(wrapped, example.with_batch(1)):
            raise NotCapturableError(
                f"{type(wrapped.backbone).__name__} runs on one row of {name} and not on {len(example.tensors[0])} "
                f"({_first_line(error)}): its forward fixes the batch size, or its inputs have no batch dimension; exits need "
                "a model that takes any batch size"
            ) from error
        shapes = {key: tuple(t.shape) for key, t in zip(example.spec.keys, example.tensors, strict=True)}
        raise ArgumentError(
            f"{name} of shapes {shapes} do not run through {type(wrapped.backbone).__name__}: "
            f"{_first_line(error)}. {_advice(error, name)}"
        ) from error


def _advice(error: Exception, name: str) -> str:
    if "padding token" in str(error):  # transformers' decoders, which find the last token by it
        return "Set model.config.pad_token_id, such as to the tokenizer's"
    return f"Pass {name} that model(...) accepts"


def _runs(wrapped: LogitsOf, example: Example) -> bool:
    try:
        wrapped(*(tensor.clone() for tensor in example.tensors))
    except Exception:  # only whether it runs is asked
        return False
    return True


def _check_logits(logits: Tensor, batch: int, model: nn.Module) -> None:
    if not logits.is_floating_point() or logits.dim() != 2 or logits.shape[0] != batch:
        regression = ", or a regression, whose output is (B, 1): wrap it in a module that returns its output[:, None]"
        raise NotCapturableError(
            f"{type(model).__name__} returns a {logits.dtype} tensor of shape {tuple(logits.shape)} for a batch of "
            f"{batch}; exits need a classifier, whose output is floating point of shape (B, C)"
            f"{regression if logits.shape == (batch,) else ''}"
        )


def _export(wrapped: LogitsOf, example: Example, model: nn.Module) -> torch.export.ExportedProgram:
    batch = Dim("batch", max=_MOST)
    dims = {0: batch, 1: Dim.AUTO} if example.text else {0: batch}
    try:
        with quiet("torch"):  # a refused export logs much before it raises
            return torch.export.export(
                wrapped, example.tensors, strict=False, dynamic_shapes=(tuple(dict(dims) for _ in example.tensors),)
            )
    except Exception as caught:  # torch.export raises dozens of types, most of them private
        error = caught.__cause__ if isinstance(caught, _DataDependentError) else caught
        assert error is not None
        raise NotCapturableError(
            f"{type(model).__name__} cannot be captured by torch.export{_where(error)}: its path must not depend on tensor "
            "values nor fix the batch size. Use torch.where instead of if, shapes from x.shape[0]. "
            f"torch says: {_first_line(error).partition(' (unhinted')[0][:_SHOWN]}"
        ) from error


def _simplified(graph: GraphModule) -> GraphModule:
    """The graph without checks of values, and without what only they need (``.item()``, which nothing else can follow).

    Views become reshapes: in which order attention leaves its result in memory depends on the kernel that is chosen for a
    size and a device, and a view that the order of the captured one allows may be forbidden by another's.
    """
    for node in list(graph.graph.nodes):
        if "_assert_" in str(node.target) and not node.users:
            graph.graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.graph.eliminate_dead_code(_acts)
    graph.recompile()
    return graph


def _acts(node: Node) -> bool:
    """Whether a node does something beside its result: also one that begins or ends a vmap, by which some make masks."""
    return node.is_impure() or getattr(node.target, "__module__", None) == "torch._functorch.predispatch"


def _first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong, without torch's advice on its own debugging."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip() and "TORCH_LOGS" not in line]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400].rstrip(".")


def _where(error: BaseException) -> str:
    """The last line of the user's own code in the traceback, where the refused operation stands."""
    place, frame = "", error.__traceback__
    while frame is not None:
        filename = frame.tb_frame.f_code.co_filename
        if "/torch/" not in filename and "exitkit/surgery" not in filename:
            place = f" (at {filename}:{frame.tb_lineno}, in {frame.tb_frame.f_code.co_name})"
        frame = frame.tb_next
    return place
