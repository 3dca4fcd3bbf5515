"""Writing packages: ``.pt2`` for torch, ``.onnx`` with real branches, ``.onnx.zip`` for batches, ``.pte`` for ExecuTorch."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from exitkit.common.checks import PATH, check
from exitkit.common.errors import ArgumentError, NotCapturableError
from exitkit.common.files import replacing
from exitkit.engine.aot import compile_step, load_step
from exitkit.engine.exported import example_of, export_steps
from exitkit.engine.lowering import program_of
from exitkit.engine.memory_format import is_channels_last
from exitkit.engine.program import Description, Program
from exitkit.methods.criteria import Criterion
from exitkit.methods.policy import ExitPolicy, Threshold
from exitkit.multi_exit.model import MultiExitModel
from exitkit.multi_exit.preprocessing import ImagePreprocessing, Preprocessing, TextPreprocessing
from exitkit.packages.archive import write_archive
from exitkit.packages.executorch import chained, read_executorch, to_executorch
from exitkit.packages.manifest import Kind, Manifest
from exitkit.packages.onnx_branches import write_branches
from exitkit.packages.onnx_steps import check_onnx, onnx_run, to_onnx
from exitkit.surgery.capturing import in_own_precision

ENDINGS: dict[str, Kind | None] = {".pt2": "torch", ".onnx.zip": "onnx", ".onnx": None, ".pte": "executorch"}
"""What a file's ending says is written; None is a single ONNX graph."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 5e-2
_TENSOR_CORES = 1e-2
"""Largest difference from the model's own values, as a share of the largest of them; coarse for half precision, and for what
tensor cores round to TF32."""


def export(
    model: MultiExitModel,
    path: str | PathLike[str],
    threshold: Threshold | None = None,
    *,
    criterion: str | Criterion | None = None,
    optimize: bool = False,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> None:
    """Write a self-contained file that :func:`load` runs without the model's code, transformers or timm.

    Args:
        model: what :func:`exitkit.attach` returned.
        path: its ending says what is written. ``.pt2``: the stages as torch programs, for batches of any size on any
            device. ``.onnx``: one graph for one sample at a time, whose exits are ``If`` branches. ``.onnx.zip``: one ONNX
            graph for each stage, for batches. ``.pte``: an ExecuTorch program with a method for each stage, for one sample
            at a time. An older file there is replaced when the new one is complete.
        threshold: as for :func:`exitkit.compile`; the policy becomes part of the package, with its guarantee.
        criterion: by default the method's.
        optimize: ``.pt2`` only: stages compiled for the device the model is on, which takes minutes, and for this version
            of torch.
        labels: a name for each class; by default those in a Hugging Face model's configuration.
        preprocessing: from images to inputs; by default what a torchvision or timm model declares.
        tokenizer: for texts: the Hugging Face tokenizer.
        max_length: tokens after which a text is cut; by default as many as the tokenizer and the model take.

    Raises:
        ExitkitError: an ending that is none of these, a stage that cannot be exported, a missing library, labels of another
            number, or a package whose answers differ from the model's.
    """
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(f"model is {type(model).__name__}; export takes what exitkit.attach(model) returns")
    check("path", path, PATH)
    check("optimize", optimize, bool)
    target = Path(path)
    kind = package_kind(target, optimize)
    policy = model.policy_for(threshold, criterion)
    if kind in ("onnx", None):
        check_onnx()  # before the model is captured, which takes seconds
    program = program_of(model, policy)
    description = Description(
        _labels(model, labels),
        _preprocessing(model, preprocessing, tokenizer, max_length),
        tuple((exit_.name, exit_.macs_fraction) for exit_ in model.exits),
    )
    with in_own_precision(program.inputs.device):
        _write(target, kind, program, policy, description, example_of(model))


def _write(
    target: Path,
    kind: Kind | None,
    program: Program,
    policy: ExitPolicy,
    description: Description,
    example: tuple[Tensor, ...],
) -> None:
    if kind == "executorch":
        program = chained(program, example)
    manifest = Manifest.of(program, policy, description, kind or "onnx")
    if kind is None:
        write_branches(target, program, policy.thresholds, example, manifest)
        return
    if kind == "executorch":
        content = to_executorch(program, manifest, example)
        _compare(program, manifest.program(read_executorch(content, str(target))[1], program.inputs.device), example)
        with replacing(target) as temporary:
            temporary.write_bytes(content)
        return
    contents, runs, formats = zip(*_converted(kind, program, example), strict=True)
    entries = [replace(one, channels_last=tuple(taken)) for one, taken in zip(manifest.steps, formats, strict=True)]
    manifest = replace(manifest, steps=tuple(entries))
    _compare(program, manifest.program(runs, program.inputs.device), example)
    write_archive(target, manifest, contents)


def package_kind(path: Path, optimize: bool, argument: str = "path=") -> Kind | None:
    """What the file's ending asks for; None for a single ONNX graph. ``argument`` is what errors call the path.

    Raises:
        ArgumentError: an ending that is none of these, or one that is not compiled.
    """
    ending = next((ending for ending in ENDINGS if path.name.endswith(ending)), None)
    if ending is None:
        raise ArgumentError(
            f"{argument}{str(path)!r} must end in .pt2, .onnx, .onnx.zip or .pte, which says what is written"
        )
    if optimize and ending != ".pt2":
        raise ArgumentError(
            f"optimize=True compiles .pt2 packages; {ending} is optimised by the runtime that reads it"
        )
    return "compiled" if optimize else ENDINGS[ending]


def _converted(
    kind: Kind, program: Program, example: Sequence[Tensor]
) -> Iterator[tuple[bytes, Callable[..., Sequence[Any]], list[bool]]]:
    """Every step as the bytes that are written, as a function that runs them, and in which memory formats it takes values."""
    for exported in export_steps(program, example, channels_last=kind == "compiled"):
        formats = [is_channels_last(tensor) for tensor in exported.example_inputs[0]]
        if kind == "torch":
            buffer = io.BytesIO()
            torch.export.save(exported, buffer)
            yield buffer.getvalue(), exported.module(check_guards=False), formats
        elif kind == "onnx":
            content = to_onnx(exported)
            results = len(exported.graph_signature.user_outputs)
            yield content, onnx_run(content, len(formats), results, program.num_classes), formats
        else:
            yield *_compiled(exported, program.inputs.device), formats


def _compiled(exported: ExportedProgram, device: torch.device) -> tuple[bytes, Callable[..., Sequence[Any]]]:
    with tempfile.TemporaryDirectory(prefix="exitkit-") as directory:
        path = Path(directory) / "step.pt2"
        formats = compile_step(exported, path)
        return path.read_bytes(), load_step(path, formats, device)


def _compare(program: Program, written: Program, example: Sequence[Tensor]) -> None:
    """Refuse a package whose steps give other values than the model's, at a batch size it was not exported with."""
    values = {name: tensor[:2].contiguous() for name, tensor in zip(program.inputs.names, example, strict=True)}
    kinds = {tensor.dtype for tensor in example if tensor.is_floating_point()} | {program.dtype}
    tolerance = max(_TOLERANCE.get(kind, _COARSE) for kind in kinds)
    if program.inputs.device.type == "cuda":
        tolerance = max(tolerance, _TENSOR_CORES)
    for ours, theirs in zip(program.steps, written.steps, strict=True):
        taken = [values[name] for name in ours.inputs]
        given = [tensor.clone() for tensor in taken]
        with torch.no_grad():
            expected, got = ours.run(*taken), theirs.run(*given)
        for one, other in zip((*expected, *taken), (*got, *given), strict=True):  # a stage may write into its inputs
            allowed = tolerance * max(1.0, float(one.float().abs().max()))
            gap = float((one.float() - other.to(one.device).float()).abs().max())
            if not gap <= allowed:
                raise NotCapturableError(
                    f"stage {ours.exit} gives other values when exported (off by {gap:.1e}, {allowed:.1e} is allowed), so "
                    "nothing was written"
                )
        values.update(zip(ours.outputs, expected, strict=False))


def _labels(model: MultiExitModel, labels: Sequence[str] | None) -> tuple[str, ...] | None:
    if labels is None:
        known = getattr(getattr(model.backbone, "config", None), "id2label", None)
        if model.regression or not isinstance(known, dict) or set(known) != set(range(model.num_classes)):
            return None
        labels = [known[index] for index in range(model.num_classes)]
    if not isinstance(labels, Sequence) or isinstance(labels, str):
        raise ArgumentError(
            f"labels={labels!r} must be a list of names, one for each of the {model.num_classes} classes"
        )
    names = tuple(str(label) for label in labels)
    if len(names) != model.num_classes:
        raise ArgumentError(f"labels has {len(names)} names; the model has {model.num_classes} classes")
    return names


def _preprocessing(
    model: MultiExitModel, preprocessing: Preprocessing | None, tokenizer: Any, max_length: int | None
) -> Preprocessing | None:
    if not isinstance(preprocessing, Preprocessing | None):
        raise ArgumentError(
            f"preprocessing is {type(preprocessing).__name__}; give exitkit.ImagePreprocessing(...) or "
            "exitkit.TextPreprocessing(...)"
        )
    if tokenizer is not None:
        keys = [str(key) for key in model.example.spec.keys]
        return TextPreprocessing.of(tokenizer, keys, max_length, model.backbone)
    if max_length is not None:
        raise ArgumentError(f"max_length={max_length!r} is for texts; give their tokenizer= too, or leave it out")
    return preprocessing if preprocessing is not None else ImagePreprocessing.of(model.backbone)
