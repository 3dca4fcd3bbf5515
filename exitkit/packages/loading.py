"""Reading packages."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from exitkit.calibration.monitor import ShiftMonitor
from exitkit.common.checks import PATH, check
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.engine.aot import load_step
from exitkit.engine.compiling import fastest
from exitkit.engine.engine import Engine
from exitkit.engine.loop import Loop
from exitkit.methods.policy import Threshold
from exitkit.packages.archive import read_archive
from exitkit.packages.executorch import read_executorch
from exitkit.packages.manifest import CAPABILITY, Kind, Manifest, StepEntry, capability
from exitkit.packages.onnx_branches import OnnxBranches
from exitkit.packages.onnx_steps import onnx_run

_ENDINGS: dict[str, tuple[Kind, ...]] = {
    ".onnx.zip": ("onnx",),
    ".pt2": ("torch", "compiled"),
    ".onnx": ("onnx",),
    ".pte": ("executorch",),
}
"""What a file may hold follows from its ending, whatever its manifest says."""
_LARGEST = 2**31
_RUNTIMES = {"onnx": "onnxruntime", "executorch": "ExecuTorch"}
_UNTRUSTED = {
    ".pt2": "a .pt2 holds code, which loading it may run",
    ".pte": "ExecuTorch does not check a .pte in full, and a forged one may run code",
}
_warned: set[str] = set()


def load(
    path: str | PathLike[str],
    *,
    threshold: Threshold | None = None,
    device: str | torch.device | None = None,
    monitor: ShiftMonitor | None = None,
    trust: bool = False,
) -> Engine | OnnxBranches:
    """What :func:`export` wrote, ready to be called as the model; needs neither its code nor transformers or timm.

    A ``.pt2`` holds code, which loading it may run, and ExecuTorch does not check a ``.pte`` in full: load only what you
    made or trust. ``.onnx`` and ``.onnx.zip`` hold no code, and run in onnxruntime alone.

    Args:
        path: the file; its ending says what it may hold.
        threshold: another τ, or one for each exit, than the file's, as for :meth:`exitkit.Engine.at`; a single ``.onnx``
            has its own fixed.
        device: where ``.pt2`` stages run; by default on CPU, and compiled ones where they were compiled for.
        monitor: is told of every answer, as for :func:`exitkit.compile`; not for a single ``.onnx``.
        trust: say that you trust a ``.pt2`` or ``.pte``; without, the first one in a process is loaded with a warning.

    Returns:
        For ``.pt2``, ``.onnx.zip`` and ``.pte`` an :class:`~exitkit.Engine`; for ``.onnx`` an object that is called alike
        and answers one sample after another.

    Raises:
        ArgumentError: no such file or another ending, a package for another device, a threshold or monitor for other scores
            than the package's.
        FileError: a damaged file, code where the ending allows none, ONNX that refers to other files, or another version.
        ExitkitError: a missing library.
    """
    check("path", path, PATH)
    source = Path(path)
    ending = next((ending for ending in _ENDINGS if source.name.endswith(ending)), None)
    if ending is None:
        raise ArgumentError(
            f"path={str(path)!r} must end in .pt2, .onnx, .onnx.zip or .pte, which says what it may hold"
        )
    if os.path.isdir(source):
        raise ArgumentError(f"{str(path)!r} is a folder; name a file that exitkit.export wrote")
    if not os.path.isfile(source):
        raise ArgumentError(f"{str(path)!r} does not exist; write a package there with exitkit.export(ee, path)")
    if ending == ".onnx":
        if (threshold, device, monitor) != (None, None, None):
            raise ArgumentError(
                "a single .onnx has its thresholds in the graph, runs on CPU, and tells no monitor (call monitor.update on "
                "its predictions); export a .pt2 for others"
            )
        return OnnxBranches(_bytes(source), str(source))
    if ending in _UNTRUSTED and not trust:
        _warn(ending)
    if ending == ".pte":
        manifest, runs = read_executorch(_bytes(source), str(source))
        return _engine(manifest, runs, _device(manifest, device, str(source)), threshold, monitor)
    manifest, contents = read_archive(source)
    if manifest.kind not in _ENDINGS[ending]:
        raise FileError(
            f"{str(path)!r} ends in {ending}, but says that it holds {manifest.kind!r} code; do not use it"
        )
    target = _device(manifest, device, str(source))
    try:
        runs = [_run(manifest, *each, target) for each in zip(manifest.steps, contents, strict=True)]
    except ExitkitError:
        raise
    except Exception as error:  # torch raises dozens of types on what it does not understand
        raise FileError(
            f"{str(source)!r} was written by torch {manifest.versions.get('torch')} and cannot be read by torch "
            f"{torch.__version__} ({type(error).__name__}: {str(error)[:200].partition(chr(10))[0]}); export it again"
        ) from error
    return _engine(manifest, runs, target, threshold, monitor)


def _engine(
    manifest: Manifest,
    runs: Sequence[Callable[..., Sequence[Any]]],
    device: torch.device,
    threshold: Threshold | None,
    monitor: ShiftMonitor | None,
) -> Engine:
    program = manifest.program(runs, device)
    loop = fastest(program, manifest.policy) if manifest.kind == "compiled" else Loop(program, manifest.policy)
    engine = Engine(loop, manifest.description)
    engine = engine if threshold is None else engine.at(threshold)
    return engine if monitor is None else engine.watched(monitor)


def _warn(ending: str) -> None:
    if ending not in _warned:
        _warned.add(ending)
        warnings.warn(
            f"{_UNTRUSTED[ending]}: load only files that you made or trust.\n"
            "If you do, say so: exitkit.load(path, trust=True), or --trust on the command line. Files of others: .onnx and "
            ".onnx.zip hold no code.",
            stacklevel=3,
        )


def _bytes(path: Path) -> bytes:
    try:
        if os.path.getsize(path) > _LARGEST:
            raise FileError(
                f"{str(path)!r} is larger than 2 GiB, which no {path.suffix} of exitkit is; export it again"
            )
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error.strerror}; write it with exitkit.export") from error


def _device(manifest: Manifest, device: str | torch.device | None, path: str) -> torch.device:
    """Where the steps run; refused where a package was made for another device or version."""
    kind, made, by = manifest.kind, manifest.device, manifest.versions.get("torch")
    given = device if device is not None else made if kind == "compiled" else "cpu"
    try:
        chosen = torch.device(given)
    except (RuntimeError, TypeError) as error:  # what torch says of a name it does not know, and of what is no name
        raise ArgumentError(f"device={given!r} is not a device of torch; give 'cpu', 'cuda' or 'cuda:1'") from error
    if kind in _RUNTIMES and chosen.type != "cpu":
        raise ArgumentError(
            f"device={str(chosen)!r}: {path!r} runs in {_RUNTIMES[kind]} on CPU; export a .pt2 for other devices"
        )
    if kind == "compiled" and chosen.type != made:
        raise ArgumentError(f"device={str(chosen)!r}: {path!r} was compiled for {made}; export it on that device")
    if kind == "compiled" and by != torch.__version__:
        raise FileError(
            f"{path!r} was compiled by torch {by}; this is torch {torch.__version__}: export it "
            "again, or without optimize=True, which other versions read"
        )
    if chosen.type != "cuda":
        return _usable(chosen)
    chosen = _gpu(chosen)
    made_for, own = manifest.versions.get(CAPABILITY), capability(chosen)
    if kind == "compiled" and made_for != own:
        raise ArgumentError(
            f"{path!r} was compiled for GPUs of compute capability {made_for}; {torch.cuda.get_device_name(chosen)} has "
            f"{own}: export it again on this GPU, or without optimize=True"
        )
    return chosen


def _usable(device: torch.device) -> torch.device:
    """A device that this torch has, where it is no GPU."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, ImportError, AssertionError) as error:  # each kind of device has one of its own
        reason = str(error).partition("\n")[0][:200]
        raise ArgumentError(f"device={str(device)!r} cannot be used ({reason}); use device='cpu'") from error
    return device


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


def _run(manifest: Manifest, entry: StepEntry, content: bytes, device: torch.device) -> Callable[..., Sequence[Any]]:
    results = len(entry.outputs) + 2
    if manifest.kind == "onnx":
        return onnx_run(content, len(entry.inputs), results, manifest.num_classes)
    if manifest.kind == "compiled":
        with tempfile.TemporaryDirectory(prefix="exitkit-") as directory:
            file = Path(directory) / "step.pt2"
            file.write_bytes(content)
            return load_step(file, entry.channels_last, device)
    exported = torch.export.load(io.BytesIO(content))
    signature = exported.graph_signature
    made = exported.graph.output_node().args[0]
    sizes = (len(signature.user_inputs), len(signature.user_outputs))
    if sizes != (len(entry.inputs), results) or made[-2].meta["val"].shape[-1] != manifest.num_classes:
        raise FileError(f"step {entry.exit} takes or returns other values than its manifest says; export it again")
    moved = move_to_device_pass(exported, str(device))
    run: Callable[..., Sequence[Any]] = moved.module(check_guards=False)
    return run
