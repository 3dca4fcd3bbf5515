"""Outputs as safetensors files: tensors, and the settings beside them in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.files import replacing
from exitkit.evaluation.exit_times import ExitTimes
from exitkit.methods.criteria import Tolerance

if TYPE_CHECKING:
    from exitkit.evaluation.outputs import ExitOutputs

REGRESSION = "exitkit-regression-1"
"""The format of files of :class:`exitkit.evaluation.RegressionOutputs`."""


def _temperatures(text: str) -> tuple[float, ...]:
    return tuple(json.loads(text))


def _timings(text: str) -> tuple[ExitTimes, ...]:
    return tuple(ExitTimes(**one) for one in json.loads(text))


_READ: dict[str, Callable[[str], Any]] = {
    "backbone_macs": float,
    "criterion": str,
    "dtype": str,
    "weights": str,
    "temperatures": _temperatures,
    "timings": _timings,
}
"""From a setting's text to its value; settings that are None are not written."""


def save_outputs(outputs: ExitOutputs, path: str | Path, form: str, half: bool) -> None:
    """See :meth:`exitkit.ExitOutputs.save`."""
    tensors = {"log_probs": outputs.log_probs.half() if half else outputs.log_probs, "macs": outputs.macs}
    for name in ("labels", "hashes"):
        if (tensor := getattr(outputs, name)) is not None:
            tensors[name] = tensor.contiguous()
    settings = {field.name: getattr(outputs, field.name) for field in fields(outputs) if field.name in _READ}
    settings["timings"] = [asdict(one) for one in outputs.timings] or None
    texts = {
        name: json.dumps(value) if isinstance(value, list | tuple) else str(value)
        for name, value in settings.items()
        if value is not None
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": form, **texts})


def load_fields(path: str | Path, form: str, kind: str) -> dict[str, Any]:
    """The fields of the outputs in a file of format ``form``.

    Raises:
        ExitkitError: no such file, a damaged one, or one that exitkit did not write.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
    except (OSError, SafetensorError) as error:
        raise FileError(f"path={str(path)!r} cannot be read as saved outputs: {error}") from error
    if header.get("format") == REGRESSION != form:
        raise ArgumentError(
            f"path={str(path)!r} holds predictions of a regression, which have no right and wrong answers to report, "
            "calibrate or compare by: read them with exitkit.evaluation.RegressionOutputs.load(path), whose "
            "curve().plot(picture) and curve().budget_table() show the correlation against cost"
        )
    if header.get("format") != form:
        raise FileError(
            f"path={str(path)!r} is no file of saved outputs for {kind} (its format is {header.get('format')!r}); write one "
            "with outputs.save(path)"
        )
    settings = {name: read(header[name]) for name, read in _READ.items() if name in header}
    if (times := int(header.get("times", 1))) > 1:  # version 0.1 wrote it beside the criterion
        settings["criterion"] = Tolerance(times).name
    return {"labels": None, **tensors, **settings}
