"""One ExecuTorch program for phones: a method for each step, for one sample at a time, and the loop outside.

=======================  ============================================================================================
``step_0``, …            takes what the step before it returned without its last two values; returns what later steps
                         need, then the answer (1, C) and the score (1,) float64
``thresholds``           τ of each exit (M,) float64: a sample leaves after ``step_m`` if its score is above the m-th
``manifest``             the package's manifest, as JSON
=======================  ============================================================================================

The digest of the program follows behind its last byte, where ExecuTorch does not look.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from exitkit.common.errors import ArgumentError, ExitkitError, FileError, NotCapturableError
from exitkit.engine.exported import export_steps
from exitkit.engine.program import Program, Step
from exitkit.packages.manifest import Manifest, read_manifest, to_text
from exitkit.packages.onnx_steps import max_of_windows, plain_attention

_MARK = b"exitkit_sha256:"
_DIGEST_LENGTH = 64


def _log_softmax(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """``log_softmax``, whose kernel in ExecuTorch's own builds takes single precision alone."""
    values = values if dtype is None else values.to(dtype)
    if values.dtype != torch.float64:
        single: Tensor = torch.ops.aten._log_softmax(values, dim, False)
        return single
    shifted = values - values.amax(dim, True)
    return shifted - shifted.exp().sum(dim, True).log()


_DECOMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.adaptive_max_pool2d.default: max_of_windows,
    torch.ops.aten.log_softmax.int: _log_softmax,
}
_POOLS = (torch.ops.aten.max_pool2d.default, torch.ops.aten.avg_pool2d.default)


def _with_strides(exported: ExportedProgram) -> ExportedProgram:
    """Every pool with its stride, by default its window: ExecuTorch's XNNPACK reads it where a call has left it out."""
    for node in exported.graph.nodes:
        if node.target in _POOLS and not any(node.args[2:3]):
            node.args = (*node.args[:2], node.args[1], *node.args[3:])
    return exported


class _Chained(nn.Module):
    """A step that takes everything alive before it and returns everything alive after it, then answer and score."""

    def __init__(self, step: Step, taken: tuple[str, ...]) -> None:
        super().__init__()
        self.run = cast("nn.Module", step.run)
        self.taken, self.inputs, self.made, self.live = taken, step.inputs, step.outputs, step.live

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.taken, values, strict=True))
        result = self.run(*(named[name] for name in self.inputs))
        passed = {name: named[name].clone() for name in self.live if name not in self.made}  # not an input itself
        named = passed | dict(zip(self.made, result, strict=False))
        return (*(named[name] for name in self.live), *result[-2:])


def chained(program: Program, example: Sequence[Tensor]) -> Program:
    """The program as it is written: each step takes what the one before it handed on, and all sizes are the example's."""
    steps: list[Step] = []
    taken = program.inputs.names
    for step in program.steps:
        steps.append(replace(step, run=_Chained(step, taken), inputs=taken, outputs=step.live))
        taken = step.live
    inputs = replace(program.inputs, sizes=tuple((None, *tensor.shape[1:]) for tensor in example))
    return replace(program, inputs=inputs, steps=tuple(steps), dynamic=dict.fromkeys(program.dynamic, ()))


def to_executorch(program: Program, manifest: Manifest, example: Sequence[Tensor]) -> bytes:
    """A :func:`chained` program as the content of a ``.pte``: XNNPACK runs what it can, portable kernels the rest.

    Raises:
        ArgumentError: a model that is not on CPU.
        ExitkitError: executorch is missing.
        NotCapturableError: a step that cannot be exported, or an operation that ExecuTorch does not have.
    """
    if program.inputs.device.type != "cpu":
        raise ArgumentError(f"a .pte is written from a model on CPU, not on {program.inputs.device}: ee.cpu()")
    edge, xnnpack = _compiler()
    one = [tensor[:1].contiguous() for tensor in example]
    with _quietly(), plain_attention():
        exported = enumerate(export_steps(program, one))
        steps = {
            f"step_{index}": _with_strides(one_step.run_decompositions(_DECOMPOSED)) for index, one_step in exported
        }
        constants = {
            "manifest": to_text(manifest),
            "thresholds": torch.tensor(manifest.policy.thresholds, dtype=torch.float64),
        }
        try:
            lowered = edge(steps, partitioner=[xnnpack()], constant_methods=constants)
            content: bytes = lowered.to_executorch().buffer
        except Exception as error:  # executorch raises dozens of types, most of them private
            lines = str(error).strip().splitlines() or [""]
            raise NotCapturableError(
                f"this model cannot be written for ExecuTorch: {type(error).__name__}: {lines[0][:300]}; export a .pt2 or "
                ".onnx"
            ) from error
    return content + _MARK + hashlib.sha256(content).hexdigest().encode()


def read_executorch(content: bytes, source: str) -> tuple[Manifest, list[Callable[..., Sequence[Tensor]]]]:
    """The manifest, and the steps as functions of any number of samples, which run one after another.

    The digest is looked at first: ExecuTorch does not check a damaged file, and may crash on one.

    Raises:
        ExitkitError: executorch is missing.
        FileError: a file that is damaged, that exitkit did not write, or that this executorch does not run.
    """
    body, mark, digest = content[: -_DIGEST_LENGTH - len(_MARK)], _MARK, content[-_DIGEST_LENGTH:]
    if content[len(body) : -_DIGEST_LENGTH] != mark or hashlib.sha256(body).hexdigest().encode() != digest:
        raise FileError(f"{source!r} is damaged, or not a package of exitkit; write one with exitkit.export(ee, path)")
    runtime = _runtime()
    try:
        program = runtime.load_program(body)
        manifest = read_manifest(program.load_method("manifest").execute([])[0], source)
        if manifest.kind != "executorch":
            raise FileError(f"{source!r} says that it holds {manifest.kind!r} code; do not use it")
        names = [f"step_{index}" for index in range(len(manifest.steps))]
        methods = [program.load_method(name) for name in names]
    except ExitkitError:
        raise
    except Exception as error:  # RuntimeError with a number, KeyError for a method that is not there
        raise FileError(
            f"{source!r} does not run in this executorch ({type(error).__name__}: {str(error)[:200]}); export it again"
        ) from error
    _check_steps(manifest, methods, source)
    axes = manifest.axes.get
    runs = [
        _run(program, entry.exit, [*map(axes, entry.inputs)], [*map(axes, entry.outputs), 0, 0])
        for entry in manifest.steps
    ]
    return manifest, runs


def _check_steps(manifest: Manifest, methods: Sequence[Any], source: str) -> None:
    taken = [tuple(entry.name for entry in manifest.inputs), *(entry.live for entry in manifest.steps)]
    for entry, before, method in zip(manifest.steps, taken, methods, strict=False):
        sizes = (method.metadata.num_inputs(), method.metadata.num_outputs())
        if (entry.inputs, entry.outputs, sizes) != (before, entry.live, (len(before), len(entry.live) + 2)):
            raise FileError(
                f"step {entry.exit} of {source!r} takes or returns other values than its manifest says; export it again"
            )


def _run(program: Any, step: int, taken: list[int | None], made: list[int | None]) -> Callable[..., Sequence[Tensor]]:
    """A method as a function of batches. It writes into memory of its own, so that calls take turns.

    Args:
        program: kept, as its methods read from it and do not keep it themselves.
        step: number of the method.
        taken, made: the batch's dimension of each value; None where it is the same for every sample.
    """
    one_at_a_time = threading.Lock()

    def one(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        made_of_it: Sequence[Tensor] = program.load_method(f"step_{step}").execute(
            [tensor.detach().contiguous() for tensor in tensors]
        )
        return made_of_it

    def run(*tensors: Tensor) -> list[Tensor]:
        count = next((tensor.shape[axis] for tensor, axis in zip(tensors, taken, strict=True) if axis is not None), 1)
        samples = (
            [
                tensor if axis is None else tensor.narrow(axis, row, 1)
                for tensor, axis in zip(tensors, taken, strict=True)
            ]
            for row in range(count)
        )
        try:
            with one_at_a_time:
                columns = zip(*map(one, samples), strict=True)
        except RuntimeError as error:  # with a number; ExecuTorch tells the rest on the standard error
            raise NotCapturableError(
                f"ExecuTorch does not run step {step} ({error}): it may lack a kernel for this model's dtype; export a .pt2"
            ) from error
        return [
            column[0] if axis is None else torch.cat(column, axis) for column, axis in zip(columns, made, strict=True)
        ]

    return run


def _compiler() -> tuple[Any, Any]:
    try:
        with _quietly():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise _missing(error) from error
    return to_edge_transform_and_lower, XnnpackPartitioner


def _runtime() -> Any:
    try:
        with _quietly():
            from executorch.runtime import Runtime
    except ImportError as error:
        raise _missing(error) from error
    return Runtime.get()


def _missing(error: ImportError) -> ExitkitError:
    return ExitkitError(
        f".pte needs executorch, of the release for this torch: pip install 'exitkit[executorch]' ({error})"
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what executorch and torchao report at import and of every pass."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
