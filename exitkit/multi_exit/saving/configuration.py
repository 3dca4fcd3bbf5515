"""``config.json`` beside saved exits: which backbone they belong to, how they are attached, and what was chosen."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from exitkit.common.checks import Count, check
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.common.schema import build, parse_json, read_json, to_json
from exitkit.common.versions import installed_versions
from exitkit.exits.classifiers import HeadSpec
from exitkit.methods.criteria import UnknownCriterionError
from exitkit.methods.policy import ExitPolicy, Guarantee, Threshold
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
_FORMAT, _PLAIN, OLDER = (f"{_FAMILY}{number}" for number in (5, 4, 3))
"""Format 4 is the same, of exits that did not standardise what they read."""
_REMEDY = "give what save_pretrained or push_to_hub wrote"
_AGAIN = "Copy or download it again"
_LARGEST_INPUT = 2**27
"""Values of one sample; larger inputs are not made up."""

_SHAPE = "[0-9a-z×]+"
_HASHED = f"{_SHAPE}( [0-9a-f]{{16}}){{3}}"
_LINES = {_FORMAT: _HASHED, _PLAIN: _HASHED, OLDER: _SHAPE}
"""Patterns of what is known of each tensor of the backbone: its shape, and digests of its values."""

InputDType = Literal["float", "bool", "uint8", "int8", "int16", "int32", "int64", "complex64", "complex128"]


@dataclass(frozen=True)
class TensorInput:
    """Kind and shape of a tensor of the call, for one sample.

    Raises:
        ArgumentError: a dtype or shape that no input is made up of.
    """

    dtype: InputDType
    shape: tuple[Count, ...]

    def __post_init__(self) -> None:
        check("dtype", self.dtype, InputDType)
        if not 0 < math.prod(self.shape) <= _LARGEST_INPUT:
            raise ArgumentError(f"shape={list(self.shape)} must hold 1 to {_LARGEST_INPUT:,} values")


Input = TensorInput | bool | int | float | str | list | None  # type: ignore[type-arg]  # checked at run time
"""An argument of the call: a tensor, or a constant that JSON holds."""


@dataclass(frozen=True)
class Configuration:
    """All of ``config.json`` but its hash.

    Attributes:
        backbone: see :func:`exitkit.multi_exit.saving.card.identity`.
        inputs: the call, by position or by name; None where it cannot be described.
        blocks: shape of each block's feature.
        outputs: of the backbone and every exit.
        tensors: shape and digests of each of the backbone's tensors; without digests from files of the older format.
        weights: name of the weights file.

    Raises:
        ArgumentError: the first entry that is not as described.
    """

    format: str
    versions: dict[str, str]
    backbone: dict[str, str | None]
    exits: tuple[str, ...]
    method: Method
    head: str | tuple[str, ...]
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    policy: ExitPolicy | None
    metrics: dict[str, Any] | None
    inputs: tuple[Input, ...] | dict[str, Input] | None
    blocks: dict[str, str]
    outputs: Count
    new_head: tuple[str, ...]
    tensors: dict[str, str]
    weights: str

    def __post_init__(self) -> None:
        HeadSpec.parse_all(self.head)
        if not len(set(self.exits)) == len(self.exits) > 0:
            raise ArgumentError(f"exits={list(self.exits)} must be distinct names, at least one")
        if self.policy is not None and len(self.policy.thresholds) != len(self.exits):
            raise ArgumentError(
                f"policy.thresholds holds {len(self.policy.thresholds)} values for {len(self.exits)} exits"
            )
        if self.backbone.keys() != {"class", "hub_name", "architecture"} or self.backbone["class"] is None:
            raise ArgumentError(f"backbone={self.backbone} must hold 'class', 'hub_name' and 'architecture'")
        if re.fullmatch(WEIGHTS.replace(".", r"\."), self.weights) is None:
            raise ArgumentError(f"weights={self.weights!r} is not the name of a weights file")
        for name, pattern, lines in (("blocks", _SHAPE, self.blocks), ("tensors", _LINES[self.format], self.tensors)):
            for key, line in lines.items():
                if re.fullmatch(pattern, line) is None:
                    raise ArgumentError(f"{name}.{key}={line!r} is damaged")


def configuration_of(
    model: MultiExitModel, weights: str, threshold: Threshold | None, outputs: ExitOutputs | None
) -> Configuration:
    """What is saved of ``model`` beside the file ``weights``.

    Raises:
        ExitkitError: a threshold that is not finite or not for these exits, outputs without labels or of another model,
            exits that are not finite.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in model.added_parameters()):
        raise ArgumentError("the exits hold NaN or infinity, which from_pretrained refuses; train them again")
    policy = None if threshold is None and model.policy is None else model.policy_for(threshold)
    if policy is not None:
        policy.to_dict()  # refuses what JSON does not hold
    return Configuration(
        format=_FORMAT,
        versions=installed_versions(),
        backbone=identity(model.backbone),
        exits=tuple(boundary.name for boundary in model.boundaries),
        method=model.method,
        head=model.head,
        dtype=str(next(model.classifiers.parameters()).dtype).removeprefix("torch."),  # type: ignore[arg-type]
        policy=policy,
        metrics=None if outputs is None else measured(model, outputs, policy),
        inputs=_described(model.example),
        blocks=block_lines(model.anatomy.blocks),
        outputs=model.num_classes,
        new_head=tuple(model.new_head),
        tensors=without(tensor_lines(model.backbone), model.new_head),
        weights=weights,
    )


def to_text(config: Configuration) -> str:
    """The configuration as JSON, with a hash of all of it."""
    plain = parse_json(to_json(asdict(config)))
    return to_json({**plain, "sha256": _digest(plain)}, indent=1) + "\n"


def is_foreign(path: Path) -> bool:
    """Whether a ``config.json`` is another library's, as transformers writes one for a model."""
    try:
        config = read_json(path, _REMEDY)
    except FileError:
        return False  # none, or a damaged one, which nobody reads
    return not (isinstance(config, dict) and str(config.get("format")).startswith(_FAMILY))


def read_configuration(path: Path) -> Configuration:
    """A checked configuration, of this format or of the two before it.

    Raises:
        FileError: no file, no JSON, a foreign one, one of another format, or a damaged one.
        ArgumentError: a criterion whose class is not imported.
    """
    config = read_json(path, _REMEDY)
    given = config.get("format") if isinstance(config, dict) else None
    if given not in _LINES and str(given).startswith(_FAMILY):
        raise FileError(
            f"{str(path)!r} is of format {given!r}, saved by {saved_by(config.get('versions'))}; exitkit "
            f"{installed_versions()['exitkit']} reads {_FORMAT!r}. Load it with the version that saved it, or train and save "
            "the exits again"
        )
    if given not in _LINES:
        raise FileError(f"{str(path)!r} is not a configuration of exits; {_REMEDY}")
    if given == OLDER:
        return _built(_from_older(config, path), path)
    if config.pop("sha256", None) != _digest(config):
        raise FileError(f"{str(path)!r} is damaged: its content does not match its hash. {_AGAIN}")
    return _built(config, path)


def _built(config: dict[str, Any], path: Path) -> Configuration:
    if isinstance(method := config.get("method"), dict):
        method.pop("times", None)  # 0.1 wrote it beside the criterion, which holds it too
        method.setdefault("detach", True)  # 0.2 had nothing else
    try:
        return build(Configuration, config, repr(str(path)))
    except FileError as error:
        if isinstance(error.__cause__, UnknownCriterionError):  # not damage: it says what to import
            raise error.__cause__ from None
        raise


def _from_older(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Entries of format 3: a number, numbers or a mapping in place of the policy, and shorter digests."""
    try:
        config = dict(config)
        found, exits = config.pop("threshold"), len(config["exits"])
        scored = found if isinstance(found, dict) else {"threshold": found}
        taus = scored["threshold"]
        policy = {
            "thresholds": taus if isinstance(taus, list) else [taus] * exits,
            "criterion": scored.get("criterion", config["method"]["criterion"]),
            "temperatures": scored.get("temperatures"),
            "dtype": scored.get("dtype", config["dtype"]),
            "guarantee": _guarantee(scored) if "guarantee" in scored else None,
        }
        shapes = {name: line.split(" ")[0] for name, line in config["tensors"].items()}
    except (KeyError, TypeError, AttributeError, ExitkitError) as error:
        raise FileError(
            f"{str(path)!r} is damaged: {str(error)[:100]} is missing or of another kind. {_AGAIN}"
        ) from error
    return config | {"policy": None if found is None else policy, "tensors": shapes}


def _guarantee(chosen: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(Guarantee)}
    return {**{name: value for name, value in chosen.items() if name in names}, "words": chosen["guarantee"]}


def check_sizes(config: Configuration, weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse widths that no saved tensor has, before anything so wide is built.

    Raises:
        FileError: the first of them.
    """
    found = {size for tensor in weights.values() for size in tensor.shape}
    hidden = [("head", spec.hidden) for spec in HeadSpec.parse_all(config.head)]
    for key, size in (("outputs", config.outputs), ("method.width", config.method.width), *hidden):
        if size is not None and size not in found:
            raise FileError(
                f"{str(path)!r} is damaged: {key!r} is of width {size}, the saved weights are not. {_AGAIN}"
            )


def _digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of the entries as JSON with sorted keys and without spaces: the form of files that exist."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def without(lines: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The lines of a backbone but for those of its replaced last layer, which was not part of it."""
    return {name: line for name, line in lines.items() if name not in set(names)}


def saved_by(versions: Any) -> str:
    """The version of exitkit that wrote a configuration, as far as it says."""
    return f"exitkit {versions.get('exitkit', 'unknown')}" if isinstance(versions, dict) else "exitkit unknown"


def example_inputs(backbone: nn.Module, config: Configuration) -> Any:
    """Two samples of the saved shapes, made up; None where the backbone declares inputs of these shapes itself."""
    try:
        if _described(example_for(backbone)) == config.inputs:
            return None
    except ExitkitError:  # it declares nothing
        pass
    if isinstance(config.inputs, dict):
        return {key: _made_up(key, value, backbone) for key, value in config.inputs.items()}
    return None if config.inputs is None else tuple(_made_up("", value, backbone) for value in config.inputs)


def _described(example: Example) -> tuple[Input, ...] | dict[str, Input] | None:
    """The call: kind and shape of each tensor for one sample. Never values: they may be the user's own data.

    None where an argument is neither a tensor nor fit for JSON, or where a tensor is too large to be made up.
    """
    batch = example.spec.batch(example.tensors)
    try:
        if isinstance(batch, dict):
            return {key: _described_value(value) for key, value in batch.items()}
        return tuple(map(_described_value, batch))
    except ArgumentError:
        return None


def _described_value(value: Any) -> Input:
    if isinstance(value, Tensor):
        dtype = "float" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        return TensorInput(dtype, tuple(value.shape[1:]))  # type: ignore[arg-type]
    constant = parse_json(to_json(value))
    check("a constant", constant, Input)
    return constant  # type: ignore[no-any-return]


def _made_up(key: str, value: Input, backbone: nn.Module) -> Any:
    """Noise for floats (in the backbone's own dtype), ones for masks, zeros for other integers, constants as they are."""
    if not isinstance(value, TensorInput):
        return value
    shape = (2, *value.shape)
    if value.dtype == "float":
        dtype = next(parameter.dtype for parameter in backbone.parameters() if parameter.is_floating_point())
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.full(shape, int("mask" in key), dtype=getattr(torch, value.dtype))
