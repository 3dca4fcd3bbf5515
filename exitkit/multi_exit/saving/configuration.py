"""``config.json`` beside saved exits: which backbone they belong to, how they are attached, and what was chosen."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from exitkit.common.checks import check_fields, is_count
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.common.versions import installed_versions
from exitkit.exits.classifiers import HeadSpec
from exitkit.methods.criteria import UnknownCriterionError
from exitkit.methods.policy import ExitPolicy, Threshold
from exitkit.methods.presets import Method
from exitkit.multi_exit.saving.card import identity, measured
from exitkit.surgery.default_inputs import example_for
from exitkit.surgery.fingerprint import block_lines, tensor_lines
from exitkit.surgery.inputs import Example

if TYPE_CHECKING:
    from exitkit.evaluation.outputs import ExitOutputs
    from exitkit.multi_exit.model import MultiExitModel

CONFIG = "config.json"
WEIGHTS = f"exits-{'[0-9a-f]' * 16}.safetensors"
"""Pattern of the name of the weights file, which the configuration holds."""

_FAMILY = "exitkit-exits-"
_FORMAT = f"{_FAMILY}4"
_REMEDY = "Give what save_pretrained or push_to_hub wrote"
_AGAIN = "Copy or download it again"
_LARGEST_INPUT = 2**27
"""Values of one sample; larger inputs are not made up."""


def configuration_of(
    model: MultiExitModel, threshold: Threshold | None, outputs: ExitOutputs | None
) -> dict[str, Any]:
    """What is saved of ``model`` beside its weights, for JSON; :func:`to_text` adds the name of their file.

    Raises:
        ExitkitError: a threshold that is not finite or not for these exits, outputs without labels or of another model,
            exits that are not finite.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in model.added_parameters()):
        raise ArgumentError("the exits hold NaN or infinity, which from_pretrained refuses; train them again")
    policy = None if threshold is None and model.policy is None else model.policy_for(threshold)
    return {
        "format": _FORMAT,
        "versions": installed_versions(),
        "backbone": identity(model.backbone),
        "exits": [boundary.name for boundary in model.boundaries],
        "method": asdict(model.method),
        "head": model.head,
        "dtype": str(next(model.classifiers.parameters()).dtype).removeprefix("torch."),
        "policy": None if policy is None else policy.to_dict(),
        "metrics": None if outputs is None else measured(model, outputs, policy),
        "inputs": _described(model.example),
        "blocks": block_lines(model.anatomy.blocks),
        "outputs": model.num_classes,
        "new_head": list(model.new_head),
        "tensors": without(tensor_lines(model.backbone), model.new_head),
    }


def to_text(config: Mapping[str, Any], weights: str) -> str:
    """The configuration as JSON, with the name of its weights file and a hash of all of it."""
    named = {**config, "weights": weights}
    return json.dumps({**named, "sha256": _digest(named)}, indent=1, ensure_ascii=False) + "\n"


def read_configuration(path: Path) -> dict[str, Any]:
    """A checked configuration.

    Raises:
        FileError: no file, no JSON, a foreign one, one of another format, or a damaged one.
        ArgumentError: a criterion whose class is not imported.
    """
    try:
        config = json.loads(path.read_text("utf-8"), parse_int=_whole, parse_float=_finite, parse_constant=_finite)
        digest = _digest(config) if isinstance(config, dict) else ""
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}. {_REMEDY}") from error
    given = config.get("format") if isinstance(config, dict) else None
    if given != _FORMAT and str(given).startswith(_FAMILY):
        raise FileError(
            f"{str(path)!r} is of format {given!r}, saved by {saved_by(config)}; exitkit "
            f"{installed_versions()['exitkit']} reads {_FORMAT!r}. Load it with the version that saved it, or train and save "
            "the exits again"
        )
    if given != _FORMAT:
        raise FileError(f"{str(path)!r} is not a configuration of exits. {_REMEDY}")
    if config.get("sha256") != digest:
        raise FileError(f"{str(path)!r} is damaged: its content does not match its hash. {_AGAIN}")
    if isinstance(method := config.get("method"), dict):
        method.pop("times", None)  # earlier, exitkit 0.1 wrote it beside the criterion, which holds it too
    for key in (*_FIELDS, *config):
        if key not in _FIELDS or key not in config or not _FIELDS[key](config[key]):
            value = repr(config[key])[:100] if key in config else "missing"
            raise FileError(f"{str(path)!r} is damaged: {key!r} is {value}. {_AGAIN}")
    checked: dict[str, Any] = config
    return checked


def check_sizes(config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse widths that no saved tensor has, before anything so wide is built.

    Raises:
        FileError: the first of them.
    """
    found = {size for tensor in weights.values() for size in tensor.shape}
    hidden = [("head", spec.hidden) for spec in HeadSpec.parse_all(config["head"])]
    for key, size in (("outputs", config["outputs"]), ("method", config["method"]["width"]), *hidden):
        if size is not None and size not in found:
            raise FileError(
                f"{str(path)!r} is damaged: {key!r} is of width {size}, the saved weights are not. {_AGAIN}"
            )


def _digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of all but the hash itself, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _whole(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"{text[:20]}... is too large a number")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def without(lines: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The lines of a backbone but for those of its replaced last layer, which was not part of it."""
    return {name: line for name, line in lines.items() if name not in set(names)}


def saved_by(config: Mapping[str, Any]) -> str:
    """The version of exitkit that wrote a configuration, as far as it says."""
    versions = config.get("versions")
    return f"exitkit {versions.get('exitkit', 'unknown')}" if isinstance(versions, dict) else "exitkit unknown"


def example_inputs(backbone: nn.Module, config: Mapping[str, Any]) -> Any:
    """Two samples of the saved shapes, made up; None where the backbone declares inputs of these shapes itself."""
    inputs = config["inputs"]
    try:
        if _described(example_for(backbone)) == inputs:
            return None
    except ExitkitError:  # it declares nothing
        pass
    if isinstance(inputs, dict):
        return {key: _made_up(key, value, backbone) for key, value in inputs.items()}
    return None if inputs is None else tuple(_made_up("", value, backbone) for value in inputs)


def _described(example: Example) -> Any:
    """The call in JSON: kind and shape of each tensor for one sample. Never values: they may be the user's own data.

    None where an argument is neither a tensor nor fit for JSON, or where a tensor is too large to be made up.
    """
    batch = example.spec.batch(example.tensors)
    described = (
        {key: _described_value(value) for key, value in batch.items()}
        if isinstance(batch, dict)
        else [_described_value(value) for value in batch]
    )
    try:
        json.dumps(described, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return described if _FIELDS["inputs"](described) else None


def _described_value(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = "float" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": [*value.shape[1:]]}


def _made_up(key: str, value: Any, backbone: nn.Module) -> Any:
    """Noise for floats (in the backbone's own dtype), ones for masks, zeros for other integers, constants as they are."""
    if not isinstance(value, dict):
        return value
    shape = (2, *value["shape"])
    if value["dtype"] == "float":
        dtype = next(parameter.dtype for parameter in backbone.parameters() if parameter.is_floating_point())
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.full(shape, int("mask" in key), dtype=getattr(torch, value["dtype"]))


_DTYPES = ("float32", "float16", "bfloat16", "float64")
_INPUT_DTYPES = ("float", "bool", "uint8", "int8", "int16", "int32", "int64", "complex64", "complex128")
_DIGESTS = re.compile(r"[0-9a-z×]+( [0-9a-f]{16}){3}")
_SHAPE = re.compile(r"[0-9a-z×]+")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_mapping(value: Any, fits: Callable[[Any], Any]) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) and fits(item) for item in value.values())


def _is_method(value: Any) -> bool:
    try:
        check_fields(Method(**value))
    except UnknownCriterionError:  # not damage: it says what to import
        raise
    except (TypeError, ExitkitError):
        return False
    return set(value) == set(asdict(Method("")))


def _is_policy(value: Any) -> bool:
    try:
        return value is None or bool(ExitPolicy.from_dict(value))
    except ExitkitError:
        return False


def _is_head(value: Any) -> bool:
    try:
        HeadSpec.parse_all(value)
    except ExitkitError:
        return False
    return True


def _is_input(value: Any) -> bool:
    """A constant, or a tensor's kind and shape."""
    if not isinstance(value, dict):
        return True
    shape = value.get("shape")
    sizes = isinstance(shape, list) and all(map(is_count, shape)) and math.prod(shape) <= _LARGEST_INPUT
    return set(value) == {"dtype", "shape"} and sizes and value["dtype"] in _INPUT_DTYPES


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: value == _FORMAT,
    "versions": lambda value: _is_mapping(value, bool),
    "backbone": lambda value: isinstance(value, dict) and set(value) == {"class", "hub_name", "architecture"},
    "exits": lambda value: _is_texts(value) and len(set(value)) == len(value) > 0,
    "method": _is_method,
    "head": _is_head,
    "dtype": lambda value: value in _DTYPES,
    "policy": _is_policy,
    "metrics": lambda value: value is None or isinstance(value, dict),
    "inputs": lambda value: (
        value is None
        or (isinstance(value, list) and all(map(_is_input, value)))
        or (isinstance(value, dict) and all(map(_is_input, value.values())))
    ),
    "blocks": lambda value: _is_mapping(value, _SHAPE.fullmatch),
    "outputs": is_count,
    "new_head": _is_texts,
    "tensors": lambda value: _is_mapping(value, _DIGESTS.fullmatch),
    "weights": lambda value: isinstance(value, str) and fnmatchcase(value, WEIGHTS),
    "sha256": lambda value: isinstance(value, str),
}
"""What each entry may be. All must be there, and no others."""
