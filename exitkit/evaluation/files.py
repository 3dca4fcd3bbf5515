"""Outputs as safetensors files: tensors, and in the file's metadata the settings beside them and a digest of both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from exitkit.common.checks import PATH, Positive, check
from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.files import replacing
from exitkit.common.hashes import digest
from exitkit.common.schema import build, parse_json, to_json
from exitkit.evaluation.exit_times import ExitTimes
from exitkit.methods.criteria import Tolerance

OUTPUTS, REGRESSION = "exitkit-outputs-2", "exitkit-regression-2"
"""The formats of files of :class:`exitkit.ExitOutputs` and of :class:`exitkit.evaluation.RegressionOutputs`."""

_OLDER = {"exitkit-outputs-1": OUTPUTS, "exitkit-regression-1": REGRESSION}
"""Formats without a digest."""
_OPTIONAL = ("labels", "hashes", "fitted_on")
_TENSORS = {"log_probs", "macs", *_OPTIONAL}
_TEXTS = ("criterion", "dtype", "weights")


@dataclass(frozen=True)
class _Settings:
    """What a file's metadata holds beside its format and digest; each entry is left out where it is None."""

    backbone_macs: Positive
    criterion: str | None
    dtype: str | None
    weights: str | None
    temperatures: tuple[Positive, ...] | None
    timings: tuple[ExitTimes, ...] | None


def save_fields(fields: Mapping[str, Any], path: str | Path, form: str) -> None:
    """Write the fields of outputs by name; see :meth:`exitkit.ExitOutputs.save`."""
    check("path", path, PATH)
    tensors = {name: fields[name] for name in ("log_probs", "macs")}
    for name in _OPTIONAL:
        if (tensor := fields[name]) is not None:
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # two of them may share memory
    timings = tuple(asdict(one) for one in fields["timings"]) or None
    values = {name: fields[name] for name in ("backbone_macs", *_TEXTS, "temperatures")}
    texts = {
        name: value if name in _TEXTS else to_json(value)
        for name, value in {**values, "timings": timings}.items()
        if value is not None
    }
    header = {"format": form, **texts}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**header, "sha256": _digest(tensors, header)})


def is_regression(path: str | Path) -> bool:
    """Whether a file holds outputs of a regression; a damaged one is of neither kind."""
    try:
        with safe_open(str(path), framework="pt") as file:
            found = (file.metadata() or {}).get("format")
    except Exception:  # as in _read, which tells what is wrong
        return False
    return _OLDER.get(str(found), found) == REGRESSION


def load_fields(path: str | Path, form: str, kind: str) -> dict[str, Any]:
    """The fields of the outputs in a file of format ``form``.

    Raises:
        FileError: no such file, a damaged one, or one that exitkit did not write.
        ArgumentError: outputs of the other kind.
    """
    check("path", path, PATH)
    header, tensors = _read(path)
    found = header.get("format")
    if _OLDER.get(str(found), found) == REGRESSION != form:
        raise ArgumentError(
            f"path={str(path)!r} holds predictions of a regression, which have no right and wrong answers to calibrate "
            "by: read them with exitkit.evaluation.RegressionOutputs.load(path), whose curve().plot(picture) and "
            "curve().budget_table() show the correlation against cost; exitkit report and exitkit compare show their errors"
        )
    if _OLDER.get(str(found), found) != form:
        raise FileError(
            f"path={str(path)!r} is not a file of saved outputs for {kind} (its format is {str(found)[:40]!r}); write one "
            "with outputs.save(path)"
        )
    expected = header.pop("sha256", None)
    if expected is None and found in _OLDER:
        warnings.warn(
            f"{str(path)!r} was saved before outputs had a digest, so that damage would not be noticed; save it again",
            stacklevel=4,
        )
    elif expected != _digest(tensors, header):
        raise FileError(f"path={str(path)!r} is damaged: its content is not what was saved; copy or collect it again")
    times = header.pop("times", "1")  # version 0.1 wrote it beside the criterion
    settings = _settings(header, str(path))
    if found in _OLDER and times != "1":
        settings["criterion"] = Tolerance(int(times) if times.isdecimal() and len(times) < 4 else 1).name
    return {"labels": None, **tensors, **settings}


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in _TENSORS}  # noqa: SIM118
            unknown = set(file.keys()) - _TENSORS
    except Exception as error:  # a damaged header ends in a dozen kinds, of safetensors and of torch
        raise FileError(f"path={str(path)!r} cannot be read as saved outputs: {str(error)[:200]}") from error
    if "format" in header and (unknown or not {"log_probs", "macs"} <= tensors.keys()):
        raise FileError(
            f"path={str(path)!r} is damaged: it holds {sorted(tensors | dict.fromkeys(unknown))[:8]}, but outputs are "
            f"'log_probs', 'macs' and perhaps {', '.join(map(repr, _OPTIONAL))}; copy or collect it again"
        )
    return header, tensors


def _settings(header: dict[str, str], path: str) -> dict[str, Any]:
    """The settings that are there."""
    try:
        given = {
            name: text if name in _TEXTS else parse_json(text) for name, text in header.items() if name != "format"
        }
    except ValueError as error:
        raise FileError(f"path={path!r} is damaged: {str(error)[:200]}; copy or collect it again") from error
    blank = dict.fromkeys(_Settings.__annotations__)
    settings = build(_Settings, blank | given, f"path={path!r}")
    return {name: value for name, value in vars(settings).items() if value is not None}


def _digest(tensors: dict[str, Any], header: dict[str, str]) -> str:
    return digest([sorted(tensors.items()), sorted(header.items())])
