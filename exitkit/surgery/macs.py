"""Multiply-accumulate operations, from one source: torch's own FLOP counter, with nothing hidden from it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from exitkit.common.errors import NotCapturableError
from exitkit.surgery.inputs import Example
from exitkit.surgery.memory import Storages, alive_bytes, parameter_bytes, storages_of

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
Shape = Sequence[int]
Counter = AbstractContextManager[Any]
Place = Callable[[Tensor], Tensor]


def count_macs(function: Callable[..., Any], *tensors: Tensor) -> int:
    """MACs (FLOPs / 2) of ``function(*tensors)``, run on fake tensors: no memory, no arithmetic.

    Convolutions, matrix products and recurrent layers count; additions, norms, activations and softmax do not.
    """
    counter = _flop_counter()
    _counted(counter, lambda place: function(*map(place, tensors)))
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Profile:
    """What the nodes of a graph cost for one sample, in execution order.

    Attributes:
        macs: MACs spent up to and including each node.
        parameter_bytes: bytes of the parameters read up to and including each node, each parameter counted once.
        alive_bytes: bytes of the values alive at each node, see :func:`exitkit.surgery.memory.alive_bytes`.
        shapes: the shape of each node's result where that is one tensor, by the node's name.
        uncounted: custom operators that torch's counter knows no formula for, and counts as 0.
    """

    macs: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    alive_bytes: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    uncounted: tuple[str, ...]

    @property
    def total(self) -> int:
        """MACs of the whole graph."""
        return self.macs[-1]


def profile(graph: GraphModule, example: Example) -> Profile:
    """Run ``graph`` once on fake tensors with one sample, recording costs, lifetimes and shapes."""
    counter = _flop_counter()
    shapes: dict[str, tuple[int, ...]] = {}

    def read(node: Node, value: Any) -> tuple[int, Storages]:
        if isinstance(value, Tensor):
            shapes[node.name] = tuple(value.shape)
        return counter.get_total_flops() // 2, storages_of(value)

    macs, storages = zip(*_walk(graph, example, counter, read), strict=True)
    return Profile(macs, parameter_bytes(graph), alive_bytes(graph, storages), shapes, _uncounted(graph, counter))


def ptflops_macs(graph: GraphModule, example: Example) -> tuple[int, ...] | None:
    """MACs up to and including each node as ptflops' ATen backend counts them: a cross-check; None without ptflops.

    It counts each bias as one more MAC per output, and leaves out recurrent layers and products with a vector.
    """
    if importlib.util.find_spec("ptflops") is None:
        return None
    from ptflops.aten_engine import FlopCounterMode as PtflopsCounter

    counter = PtflopsCounter()
    return tuple(_walk(graph, example, counter, lambda *_: sum(counter.flop_counts["Global"].values())))


def _walk(graph: GraphModule, example: Example, counter: Counter, read: Callable[[Node, Any], T]) -> list[T]:
    """Run ``graph`` on one sample, and ``read`` each node and its result.

    Raises:
        ExitkitError: the graph does not run on one sample.
    """
    tensors = example.with_batch(1).tensors

    def walk(place: Place) -> list[T]:
        walker = _Walker(graph, place, read)
        walker.run(*map(place, tensors))
        return walker.readings

    try:
        return _counted(counter, walk)
    except Exception as error:  # whatever the model's operations raise
        raise NotCapturableError(
            f"the captured model does not run on a single sample ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); its forward must take any batch size, as "
            "one sample may be left when the others have exited"
        ) from error


def _counted(counter: Counter, run: Callable[[Place], T]) -> T:
    """``run`` while ``counter`` sees every operation; it is given the function through which real tensors must go.

    That makes them fake, unless an operation depends on values (``item``, ``nonzero``). Attention is decomposed, because
    the fused one would count as 0 (pytorch#195460).
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake, counter:
                return run(fake.from_tensor)
        except (DataDependentOutputException, DynamicOutputShapeException):
            with counter:
                return run(lambda tensor: tensor)


class _Walker(fx.Interpreter, Generic[T]):
    def __init__(self, graph: GraphModule, place: Place, read: Callable[[Node, Any], T]) -> None:
        super().__init__(graph)
        self.place = place
        self.read = read
        self.readings: list[T] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = self.place(value)
        self.readings.append(self.read(n, value))
        return value


def _flop_counter() -> FlopCounterMode:
    """torch's counter with the formulas it lacks; transformers' operator is there once transformers is imported."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, where it is installed

    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return FlopCounterMode(display=False, custom_mapping=_LEFT_OUT | ({fallback: _grouped} if fallback else {}))


def _uncounted(graph: GraphModule, counter: FlopCounterMode) -> tuple[str, ...]:
    operators = [node.target for node in graph.graph.nodes if isinstance(node.target, OpOverload)]
    custom = [operator for operator in operators if operator.namespace != "aten"]
    return tuple(dict.fromkeys(str(item) for item in custom if item.overloadpacket not in counter.flop_registry))


def _grouped(rows: Shape, experts: Shape, *_: Any, **__: Any) -> int:
    """A mixture of experts: each row times the matrix (in, out) of the expert it goes to."""
    return 2 * prod(rows) * experts[-1]


def _layers(sequence: Shape, weights: Sequence[Shape]) -> int:
    """A recurrent layer reads each weight matrix once per step."""
    return 2 * prod(sequence[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


# FLOPs, from the shapes of the arguments, of the products that torch's counter leaves out.
_LEFT_OUT: dict[Any, Callable[..., int]] = {
    torch.ops.aten.dot: lambda first, *_, **__: 2 * prod(first),
    torch.ops.aten.vdot: lambda first, *_, **__: 2 * prod(first),
    torch.ops.aten.mv: lambda matrix, *_, **__: 2 * prod(matrix),
    torch.ops.aten.addmv: lambda bias, matrix, *_, **__: 2 * prod(matrix),
    torch.ops.aten.addbmm: lambda bias, first, second, **_: 2 * prod(first) * second[-1],
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten._trilinear: lambda rows, weight, *_, **__: 2 * rows[0] * prod(weight),
    torch.ops.aten.mkldnn_rnn_layer: lambda steps, first, second, *_, **__: _layers(steps, [first, second]),
    torch.ops.aten._cudnn_rnn: lambda steps, weights, *_, **__: _layers(steps, weights),
    torch.ops.aten.miopen_rnn: lambda steps, weights, *_, **__: _layers(steps, weights),
}
