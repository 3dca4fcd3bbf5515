"""Steps as programs of torch.export, for any batch size: what packages hold and what Inductor compiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exitkit.common.errors import NotCapturableError
from exitkit.engine.memory_format import in_format, is_channels_last
from exitkit.engine.program import Program, Step
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.hooks import alone
from exitkit.surgery.liveness import constant

MOST_SAMPLES = 256
"""Samples that a step compiled for a GPU takes at most."""
_BATCH = 3
"""Samples in the batch that steps are exported with: a size unlike those that models fix by themselves."""


def example_of(model: MultiExitModel) -> tuple[Tensor, ...]:
    """Inputs to export the model's steps on."""
    return model.example.with_batch(_BATCH).tensors


def export_steps(
    program: Program, example: Sequence[Tensor], channels_last: bool = False
) -> Iterator[ExportedProgram]:
    """Each step of an eager program, exported on what the example makes of it; it takes contiguous tensors.

    With ``channels_last`` images come in that memory format, and a step takes maps in the format that the one before it
    leaves them in: ``exported.example_inputs`` shows it. On a GPU they are then for at most ``MOST_SAMPLES`` samples:
    Inductor counts elements in 32 bits unless a bound says that these do not suffice.

    Args:
        program: made by :func:`exitkit.engine.lowering.program_of`.
        example: input tensors of at least two samples.

    Raises:
        ArgumentError: a step that fixes the batch size, or that needs a size the feature does not show.
    """
    start = [in_format(tensor, channels_last and tensor.dim() == 4) for tensor in example]
    values = dict(zip(program.inputs.names, start, strict=True))
    for step in program.steps:
        taken = [values[name] for name in step.inputs]
        sized = [name for name, value in zip(step.inputs, taken, strict=True) if not isinstance(value, Tensor)]
        if sized:
            raise NotCapturableError(
                f"stage {step.exit} reads the sizes {sized}, which are not tensors: it cannot be exported"
            )
        formatted = tuple(in_format(tensor, channels_last and is_channels_last(tensor)) for tensor in taken)
        most = MOST_SAMPLES if channels_last and program.inputs.device.type == "cuda" else None
        with torch.no_grad():
            exported = _export(program, step, formatted, most)
            values.update(zip(step.outputs, step.run(*taken), strict=False))
        yield exported


@alone()
def _export(program: Program, step: Step, tensors: tuple[Tensor, ...], most: int | None) -> ExportedProgram:
    dims = tuple(_dims(program, name, tensor, most) for name, tensor in zip(step.inputs, tensors, strict=True))
    try:
        exported = torch.export.export(cast("nn.Module", step.run), tensors, dynamic_shapes=(dims,), strict=False)
    except Exception as error:  # torch.export raises dozens of types, most of them private
        raise NotCapturableError(
            f"stage {step.exit} cannot be exported: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    shapes = [
        node.meta["val"].shape for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs
    ]
    for name, shape in zip(step.inputs, shapes, strict=True):
        fixed = [dim for dim in program.dynamic[name] if constant(shape[dim]) is not None]
        if fixed:
            raise NotCapturableError(
                f"stage {step.exit} fixes dimension {fixed[0]} of {name!r} to {shape[fixed[0]]}, so it cannot be exported for "
                "batches of any size; attach with an example of at least two samples, or cut elsewhere with at="
            )
    return exported


def _dims(program: Program, name: str, tensor: Tensor, most: int | None) -> dict[int, Any]:
    """How the sizes of a value vary, for at most so many samples."""
    dims: dict[int, Any] = dict.fromkeys(program.dynamic[name], Dim.AUTO)
    axis = program.axes.get(name)
    if most is not None and axis in dims:
        dims[axis] = Dim.AUTO(max=tensor.shape[axis] // _BATCH * most)
    return dims
