"""The backbone without exits, compiled as an engine's steps are: what an engine's time is compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from exitkit.engine.aot import compile_step, load_step
from exitkit.engine.memory_format import in_format
from exitkit.surgery.boundaries import Boundary
from exitkit.surgery.capturing import Capture
from exitkit.surgery.partition import partition_at


def compile_backbone(captured: Capture, cuts: Sequence[Boundary] = ()) -> Callable[[Any], Any]:
    """A function from a batch, as the backbone takes it, to a list whose first tensor is its logits (B, C).

    Args:
        captured: the backbone, which is compiled by AOTInductor for any batch size, and on CUDA replayed from a graph for
            each size; later changes of its weights have no effect.
        cuts: boundaries between which it is compiled piece by piece, which shows what the cuts of an engine cost.
    """
    partition, example = partition_at(captured, cuts), captured.example
    start = [in_format(tensor, bool(cuts) and tensor.dim() == 4) for tensor in example.with_batch(3).tensors]
    values: dict[str, Any] = dict(zip(partition.inputs, start, strict=True))  # maps as the engine's steps hand them on
    runs: list[Callable[..., Any]] = []
    for stage in partition.stages:
        given = tuple(values[name] for name in stage.inputs)
        dims = tuple(dict.fromkeys(partition.dynamic.get(name, ()), Dim.AUTO) for name in stage.inputs)
        with tempfile.TemporaryDirectory(prefix="exitkit-") as directory, torch.no_grad():
            path = Path(directory) / "stage.pt2"
            exported = torch.export.export(stage.module, given, dynamic_shapes=dims, strict=False)
            run = load_step(path, compile_step(exported, path), given[0].device)
            runs.append(_graphed(run) if given[0].is_cuda else run)
            values.update(zip(stage.outputs, stage.module(*given), strict=True))

    def whole(batch: Any) -> Any:
        values = dict(zip(partition.inputs, example.spec.tensors(batch), strict=True))
        for stage, run in zip(partition.stages, runs, strict=True):
            made = run(*(values[name] for name in stage.inputs))
            values.update(zip(stage.outputs, made, strict=True))
        return made

    return whole


def _graphed(run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled stage that is replayed from a CUDA graph, one for each batch size, as the engine's steps are."""
    from exitkit.engine.cuda.recorder import Recorder

    record: Recorder | None = None
    recorded: dict[Any, tuple[list[Tensor], list[Tensor], Callable[[], None]]] = {}

    def replayed(*tensors: Tensor) -> list[Tensor]:
        nonlocal record
        record = record or Recorder(tensors[0].device)
        key = tuple(tensor.shape for tensor in tensors)
        if key not in recorded:
            held, made = [tensor.clone() for tensor in tensors], list(run(*tensors))
            again = record(lambda: made.__setitem__(slice(None), run(*held)))
            recorded[key] = held, made, again
        held, made, again = recorded[key]
        for buffer, tensor in zip(held, tensors, strict=True):
            buffer.copy_(tensor)
        again()
        return [tensor.clone() for tensor in made]

    return replayed
