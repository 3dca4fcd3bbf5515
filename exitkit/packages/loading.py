"""Reading packages."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from exitkit.calibration.monitor import ShiftMonitor
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.engine.aot import load_step
from exitkit.engine.compiling import fastest
from exitkit.engine.engine import Engine
from exitkit.engine.loop import Loop
from exitkit.methods.policy import ExitPolicy, Threshold
from exitkit.packages.archive import read_archive
from exitkit.packages.manifest import description_of, program_of_manifest
from exitkit.packages.onnx_branches import OnnxBranches
from exitkit.packages.onnx_steps import onnx_run


def load(
    path: str | PathLike[str],
    *,
    threshold: Threshold | None = None,
    device: str | torch.device | None = None,
    monitor: ShiftMonitor | None = None,
) -> Engine | OnnxBranches:
    """What :func:`export` wrote, ready to be called as the model; needs neither its code nor transformers or timm.

    A ``.pt2`` holds code. Load only what you made or trust.

    Args:
        path: the file.
        threshold: another τ, or one for each exit, than the file's, as for :meth:`exitkit.Engine.at`; a single ``.onnx``
            has its own fixed.
        device: where ``.pt2`` stages run; by default on CPU, and compiled ones where they were compiled for.
        monitor: is told of every answer, as for :func:`exitkit.compile`; not for a single ``.onnx``.

    Returns:
        For ``.pt2`` and ``.onnx.zip`` an :class:`~exitkit.Engine`; for ``.onnx`` an object that is called alike and answers
        one sample after another.

    Raises:
        ExitkitError: no such file, a damaged one, a package for another device or version of torch, a missing library, a
            threshold or monitor for other scores than the package's.
    """
    source = Path(path)
    if source.name.endswith(".onnx"):
        if (threshold, device, monitor) != (None, None, None):
            raise ArgumentError(
                "a single .onnx has its thresholds in the graph, runs on CPU, and tells no monitor (call monitor.update on "
                "its predictions); export a .pt2 for others"
            )
        return OnnxBranches(_bytes(source), str(source))
    manifest, contents = read_archive(source)
    description = description_of(manifest)
    target = _device(manifest, device, str(source))
    try:
        runs = [
            _run(manifest["kind"], content, step["channels_last"], target)
            for content, step in zip(contents, manifest["steps"], strict=True)
        ]
    except ExitkitError:
        raise
    except Exception as error:  # torch raises dozens of types on what it does not understand
        made = manifest["versions"]["torch"]
        raise FileError(
            f"{str(source)!r} was written by torch {made} and cannot be read by torch {torch.__version__} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); export it again"
        ) from error
    policy = ExitPolicy.from_dict(manifest["policy"])
    program = program_of_manifest(manifest, runs, target)
    engine = Engine(fastest(program, policy) if manifest["kind"] == "compiled" else Loop(program, policy), description)
    engine = engine if threshold is None else engine.at(threshold)
    return engine if monitor is None else engine.watched(monitor)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error.strerror}; write it with exitkit.export") from error


def _device(manifest: dict[str, Any], device: str | torch.device | None, path: str) -> torch.device:
    """Where the steps run; refused where a package was made for another device or version."""
    kind, made = manifest["kind"], manifest["device"]
    given = device if device is not None else made if kind == "compiled" else "cpu"
    try:
        chosen = torch.device(given)
    except (RuntimeError, TypeError) as error:  # what torch says of a name it does not know, and of what is no name
        raise ArgumentError(f"device={given!r} is no device of torch; give 'cpu', 'cuda' or 'cuda:1'") from error
    if kind == "onnx" and chosen.type != "cpu":
        raise ArgumentError(
            f"device={str(chosen)!r}: {path!r} runs in onnxruntime on CPU; export a .pt2 for other devices"
        )
    if kind == "compiled" and chosen.type != made:
        raise ArgumentError(f"device={str(chosen)!r}: {path!r} was compiled for {made}; export it on that device")
    if kind == "compiled" and manifest["versions"]["torch"] != torch.__version__:
        raise FileError(
            f"{path!r} was compiled by torch {manifest['versions']['torch']}; this is torch {torch.__version__}: export it "
            "again, or without optimize=True, which other versions read"
        )
    if chosen.type == "cuda":
        return _gpu(chosen)
    return chosen


def _gpu(device: torch.device) -> torch.device:
    """The GPU by its number, the current one where none was named."""
    if not torch.cuda.is_available():
        raise ArgumentError(f"device={str(device)!r}, but torch sees no CUDA device; use device='cpu'")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise ArgumentError(
            f"device={str(device)!r} does not exist; there are {torch.cuda.device_count()}, from cuda:0 on"
        )
    return device


def _run(
    kind: str, content: bytes, channels_last: Sequence[bool], device: torch.device
) -> Callable[..., Sequence[Any]]:
    if kind == "onnx":
        return onnx_run(content)
    if kind == "compiled":
        with tempfile.TemporaryDirectory(prefix="exitkit-") as directory:
            file = Path(directory) / "step.pt2"
            file.write_bytes(content)
            return load_step(file, channels_last, device)
    exported = torch.export.load(io.BytesIO(content))
    moved = move_to_device_pass(exported, str(device))
    run: Callable[..., Sequence[Any]] = moved.module(check_guards=False)
    return run
