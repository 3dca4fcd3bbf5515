"""``config.json`` beside saved exits: which backbone they belong to, how they are attached, and what was chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.common.errors import ExitkitError, FileError
from exitkit.common.versions import installed_versions
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.methods.policy import Threshold
from exitkit.multi_exit.model import MultiExitModel
from exitkit.multi_exit.saving.card import identity, measured
from exitkit.surgery.default_inputs import example_for
from exitkit.surgery.fingerprint import block_lines, tensor_lines
from exitkit.surgery.inputs import Example

CONFIG = "config.json"
WEIGHTS = f"exits-{'[0-9a-f]' * 16}.safetensors"
"""Pattern of the name of the weights file, which the configuration holds."""

_FAMILY = "exitkit-exits-"
_FORMAT = f"{_FAMILY}4"
_REMEDY = "Give what save_pretrained or push_to_hub wrote"


def configuration(model: MultiExitModel, threshold: Threshold | None, outputs: ExitOutputs | None) -> dict[str, Any]:
    """What is saved of ``model`` beside its weights, for JSON; ``"weights"``, the name of their file, comes with them.

    Raises:
        ExitkitError: a threshold that is no finite number, outputs without labels or of another model.
    """
    given = model.threshold if threshold is None else threshold
    policy = None if given is None else model.policy_for(given)
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


def read_configuration(path: Path) -> dict[str, Any]:
    """A checked configuration.

    Raises:
        ExitkitError: no file, no JSON, a foreign one, one of another format, or a damaged one.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}. {_REMEDY}") from error
    given = config.get("format") if isinstance(config, dict) else None
    if given != _FORMAT and str(given).startswith(_FAMILY):
        raise FileError(
            f"{str(path)!r} is of format {given!r}, saved by {saved_by(config)}; exitkit {installed_versions()['exitkit']} reads "
            f"{_FORMAT!r}. Install the version that saved it, or save the exits again"
        )
    if given != _FORMAT:
        raise FileError(f"{str(path)!r} is no configuration of exits. {_REMEDY}")
    for key, fits in _FIELDS.items():
        if key not in config or not fits(config[key]):
            value = repr(config[key])[:100] if key in config else "missing"
            raise FileError(f"{str(path)!r} is damaged: {key!r} is {value}. {_REMEDY}")
    checked: dict[str, Any] = config
    return checked


def without(lines: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The lines of a backbone but for those of its replaced last layer, which are no part of what it was."""
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

    None where an argument is neither a tensor nor fit for JSON.
    """
    batch = example.spec.batch(example.tensors)
    described = (
        {key: _described_value(value) for key, value in batch.items()}
        if isinstance(batch, dict)
        else [_described_value(value) for value in batch]
    )
    try:
        json.dumps(described)
    except TypeError:
        return None
    return described


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


def _texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_dtype(name: Any) -> bool:
    return isinstance(getattr(torch, str(name), None), torch.dtype)


def _is_input(value: Any) -> bool:
    """A constant, or a tensor's kind and shape."""
    if not isinstance(value, dict):
        return True
    dtype, shape = value.get("dtype"), value.get("shape")
    sizes = isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)
    return sizes and (dtype == "float" or _is_dtype(dtype))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "exits": lambda value: isinstance(value, list) and _texts(value),
    "method": lambda value: isinstance(value, dict),
    "head": lambda value: isinstance(value, str) or (isinstance(value, list) and _texts(value)),
    "dtype": _is_dtype,
    "policy": lambda value: value is None or isinstance(value, dict),
    "inputs": lambda value: (
        value is None
        or (isinstance(value, list) and all(map(_is_input, value)))
        or (isinstance(value, dict) and all(map(_is_input, value.values())))
    ),
    "outputs": lambda value: isinstance(value, int) and value > 0,
    "new_head": lambda value: isinstance(value, list) and _texts(value),
    "blocks": lambda value: isinstance(value, dict) and _texts(value.values()),
    "tensors": lambda value: isinstance(value, dict) and _texts(value.values()),
    "weights": lambda value: isinstance(value, str) and fnmatchcase(value, WEIGHTS),
}
