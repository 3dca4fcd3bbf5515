"""Steps compiled by AOTInductor: one native library for each, for any batch size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from exitkit.runtime.exported import export_steps
from exitkit.runtime.program import Program


def optimized(program: Program, example: Sequence[Tensor]) -> Program:
    """The same program with every step compiled for the device that ``example`` is on; weights become constants."""
    steps = []
    with tempfile.TemporaryDirectory(prefix="exitkit-") as directory:
        for step, exported in zip(program.steps, export_steps(program, example), strict=True):
            path = Path(directory) / f"{step.exit}.pt2"
            compile_step(exported, path)
            steps.append(replace(step, run=load_step(path)))
    return replace(program, steps=tuple(steps))


def compile_step(exported: ExportedProgram, path: Path) -> None:
    """Write the compiled step. Frozen on CPU: BatchNorm is folded into convolutions, and weights are packed."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in exported.state_dict.values())
    torch._inductor.aoti_compile_and_package(
        exported, package_path=str(path), inductor_configs={"freezing": True} if on_cpu else {}
    )


def load_step(path: Path) -> Callable[..., Sequence[Any]]:
    """The compiled step as a function; it was compiled for contiguous tensors and does not check them itself."""
    runner = torch._inductor.aoti_load_package(str(path))
    return lambda *tensors: runner(*(tensor.contiguous() for tensor in tensors))
