"""Multiply-accumulate operations, from one source: torch's own FLOP counter, with nothing hidden from it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exitkit.surgery.calls import Example
from exitkit.surgery.liveness import op_name


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count FLOPs of everything: fused attention is counted as 0 on CPU, so it is decomposed (pytorch#195460)."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def count_macs(function: Callable[..., Any], *tensors: Tensor) -> int:
    """MACs (FLOPs / 2) of ``function(*tensors)``, run on fake tensors: no memory, no arithmetic.

    Convolutions and matrix products count; additions, norms, activations and softmax do not.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = [fake.from_tensor(tensor) for tensor in tensors]
        with _counting() as counter:
            function(*inputs)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Profile:
    """Per graph node: MACs spent up to and including it, and its result's shape, for one sample."""

    macs: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    total: int


class _Profiler(fx.Interpreter):
    def __init__(self, graph: GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.counter = counter
        self.macs: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.recurrent = 0

    @property
    def total(self) -> int:
        return self.counter.get_total_flops() // 2 + self.recurrent

    def run_node(self, n: Node) -> Any:
        before = self.total
        value = super().run_node(n)
        if op_name(n) in ("lstm", "gru") and self.total == before:
            self.recurrent += _recurrent_macs(*self.fetch_args_kwargs_from_env(n)[0])
        self.macs[n.name] = self.total
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def profile(graph: GraphModule, example: Example) -> Profile:
    """Run ``graph`` once on fake tensors with one sample, recording costs and shapes."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = [fake.from_tensor(tensor) for tensor in example.with_batch(1).tensors]
        with _counting() as counter:
            profiler = _Profiler(graph, counter)
            profiler.run(*inputs)
    return Profile(profiler.macs, profiler.shapes, profiler.total)


def _recurrent_macs(sequence: Tensor, state: Any, weights: list[Tensor], *options: Any) -> int:
    """An LSTM's or GRU's MACs, which torch's counter leaves out: each weight matrix once per step.

    ``options`` are ATen's: biases, layers, dropout, training, bidirectional, batch first.
    """
    steps = sequence.shape[1 if options[5] else 0]
    return steps * sum(weight.numel() for weight in weights if weight.dim() == 2)


def ptflops_macs(graph: GraphModule, example: Example) -> int | None:
    """The total from ptflops, a cross-check, where it is installed.

    It counts on a copy of the graph, because it leaves hooks behind on what it counts. Only its ATen backend sees
    functional operations.
    """
    if importlib.util.find_spec("ptflops") is None:
        return None
    from ptflops import get_model_complexity_info

    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        sample = {
            name: fake.from_tensor(tensor) for name, tensor in zip(names, example.with_batch(1).tensors, strict=True)
        }
        macs, _ = get_model_complexity_info(
            GraphModule(graph, graph.graph),
            (1,),
            input_constructor=lambda _: sample,
            as_strings=False,
            print_per_layer_stat=False,
            backend="aten",
        )
    return None if macs is None else int(macs)
