"""Steps compiled by AOTInductor: one native library for each, for any batch size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from exitkit.engine.cpp_compiler import check_compiler
from exitkit.engine.exported import export_steps
from exitkit.engine.memory_format import in_format, is_channels_last
from exitkit.engine.program import Program, Run
from exitkit.surgery.hooks import alone

PORTABLE_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""cuDNN's would be fixed in the compiled step, and takes masks of certain sizes only."""


def optimized(program: Program, example: Sequence[Tensor]) -> Program:
    """The same program with every step compiled for the device that ``example`` is on; weights become constants."""
    steps = [replace(step, run=run) for step, run in zip(program.steps, _compiled(program, example), strict=True)]
    removable = [step.exit for step in program.steps if step.stage is not None]
    for index, stage in zip(removable, _compiled(program.without(removable), example), strict=False):
        steps[index] = replace(steps[index], stage=stage)
    return replace(program, steps=tuple(steps))


def _compiled(program: Program, example: Sequence[Tensor]) -> Iterator[Run]:
    for exported in export_steps(program, example, channels_last=True):
        with tempfile.TemporaryDirectory(prefix="exitkit-") as directory:
            path = Path(directory) / "step.pt2"
            yield load_step(path, compile_step(exported, path), program.inputs.device)


def compile_step(exported: ExportedProgram, path: Path) -> list[bool]:
    """Write the compiled step; returns which of its inputs it takes in the memory format channels_last.

    Frozen: BatchNorm is folded into convolutions, and weights are laid out as kernels want them.
    """
    check_compiler()
    device = next(tensor.device for tensor in exported.state_dict.values())
    configs: dict[str, Any] = {"freezing": True}
    if device.type == "cuda":
        from exitkit.engine.cuda.toolchain import prepare

        prepare()
        configs["force_layout_optimization"] = True
    # Inductor traces, and patches torch meanwhile; it freezes only where no gradient can be asked for
    with alone(), torch.no_grad(), sdpa_kernel(PORTABLE_ATTENTION):
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
    return [is_channels_last(tensor) for tensor in exported.example_inputs[0]]


def load_step(path: Path, formats: Sequence[bool], device: torch.device) -> Run:
    """The compiled step as a function; it was compiled for these memory formats and does not check them itself.

    Inputs and results are flat, so torch's wrapper is left out, which parses two descriptions of them at every call.
    """
    if device.type == "cuda":
        from exitkit.engine.cuda.compiled import CompiledStep

        return CompiledStep(path, formats, device)
    run = torch._inductor.aoti_load_package(str(path)).loader.run
    return lambda *tensors: run(list(map(in_format, tensors, formats)))
