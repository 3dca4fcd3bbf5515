"""Saving what exitkit added, and attaching it again to the same backbone: safetensors and JSON, never pickle.

A saved folder holds ``config.json``, the weights file that it names, and a model card. Every save has a weights file of
its own name, and counts from the moment its ``config.json`` replaces the older one, a single step: whatever interrupts
it, the older save or the new one is there whole.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from exitkit.common.checks import PATH, check
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.common.files import locked, read_together, replacing
from exitkit.exits.classifiers import Head
from exitkit.exits.own import check_imported
from exitkit.exits.standardised import StandardisedLinear, replaced
from exitkit.methods.policy import ExitPolicy
from exitkit.multi_exit.assembly import Parts, assemble
from exitkit.multi_exit.saving import hub
from exitkit.multi_exit.saving.card import card_of
from exitkit.multi_exit.saving.configuration import (
    CONFIG,
    OLDER,
    WEIGHTS,
    Configuration,
    check_sizes,
    configuration_of,
    example_inputs,
    is_foreign,
    read_configuration,
    saved_by,
    to_text,
    without,
)
from exitkit.surgery.fingerprint import block_lines, first_difference, shape_text, tensor_lines
from exitkit.surgery.replace_classifier import unchanged_on_error

if TYPE_CHECKING:
    from exitkit.evaluation.outputs import ExitOutputs
    from exitkit.methods.policy import Threshold
    from exitkit.multi_exit.model import MultiExitModel

CARD = "README.md"
_AGAIN = "Copy or download it again"
Source = str | os.PathLike[str]
Model = TypeVar("Model", bound="MultiExitModel")


def save_exits(
    model: MultiExitModel, directory: Source, threshold: Threshold | None, outputs: ExitOutputs | None
) -> None:
    """See :meth:`exitkit.MultiExitModel.save_pretrained`."""
    check("directory", directory, PATH)
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"directory={str(directory)!r} is a file; name a folder")
    own = (folder / CONFIG).exists() and not is_foreign(folder / CONFIG)
    if lost := next((name for name in (CONFIG, CARD) if not own and (folder / name).exists()), None):
        raise ArgumentError(
            f"directory={str(directory)!r} holds a {lost} that is not of exits, and would be lost; name a folder of their own"
        )
    config, weights = _saved(model, threshold, outputs)
    with locked(folder):
        _write(model, config, weights, folder, "path/to/this/folder")


def push_exits(
    model: MultiExitModel,
    repo_id: str,
    threshold: Threshold | None,
    outputs: ExitOutputs | None,
    private: bool | None,
    commit_message: str,
    token: hub.Token,
) -> str:
    """See :meth:`exitkit.MultiExitModel.push_to_hub`."""
    config, weights = _saved(model, threshold, outputs)  # first: if it refuses, nothing is made on the Hub
    name = hub.create(repo_id, private, token)
    with TemporaryDirectory() as folder:
        _write(model, config, weights, Path(folder), name)
        return hub.upload(Path(folder), name, [WEIGHTS], commit_message, token)


def load_exits(
    build: Callable[[Parts], Model],
    backbone: nn.Module,
    source: Source,
    inputs: Any,
    head: Head | Sequence[Head] | None,
    revision: str | None,
    token: hub.Token,
) -> Model:
    """See :meth:`exitkit.MultiExitModel.from_pretrained`; ``build`` is the class that it was called on."""

    if not isinstance(backbone, nn.Module):
        raise ArgumentError(
            f"backbone is {type(backbone).__name__}; give the nn.Module that the exits were trained on"
        )
    folder = hub.fetch(source, [CONFIG, WEIGHTS], revision, token)
    config, weights = read_together(lambda: _read(folder))
    if config.format == OLDER:
        warnings.warn(
            f"{str(source)!r} was saved by {saved_by(config.versions)} without a hash, and only the shapes of the backbone's "
            "weights can be compared: make sure that they are the right ones, then save the exits again",
            stacklevel=3,
        )
    check_sizes(config, weights, folder / CONFIG)
    _compare(config.tensors, without(tensor_lines(backbone), config.new_head), source, backbone)
    with unchanged_on_error(backbone):
        model = build(_parts(backbone, inputs, config, head, source))
        replaced(model.classifiers, partial(_as_saved, weights))
        _compare(config.blocks, block_lines(model.anatomy.blocks), source, backbone)
        _fill(model, weights, getattr(torch, config.dtype), folder / config.weights)
    if config.policy is not None:
        _set_policy(model, config.policy, folder / CONFIG)
    return model


def _as_saved(saved: Mapping[str, Tensor], name: str, layer: StandardisedLinear) -> nn.Module:
    """The layer; a plain one where it was saved by a version that did not standardise."""
    if f"classifiers.{name}.deviation" in saved:
        return layer
    return nn.Linear(layer.in_features, layer.out_features).to(layer.weight)


def _set_policy(model: MultiExitModel, policy: ExitPolicy, path: Path) -> None:
    """The saved policy; left out, with a warning, where its guarantee is for another precision than the backbone's."""
    dtype = str(model.dtype).removeprefix("torch.")
    if policy.guarantee is not None and policy.dtype != dtype:
        warnings.warn(
            f"the threshold saved with these exits is guaranteed in {policy.dtype}, and this backbone is in {dtype}: it was "
            "left out. Load the exits in that precision, or choose a threshold in this one",
            stacklevel=4,
        )
        return
    try:
        model.policy = policy
    except ArgumentError as error:
        raise FileError(f"{str(path)!r} is damaged: {error}. {_AGAIN}") from error


def _parts(
    backbone: nn.Module, inputs: Any, config: Configuration, head: Head | Sequence[Head] | None, source: Source
) -> Parts:
    """Fresh exits as configured; a last layer that was replaced is replaced again, or filled where it has the same outputs."""
    outputs = config.outputs if config.new_head else None
    if head is None:
        head = config.head
        for name in [head] if isinstance(head, str) else head:
            check_imported(name)
    try:
        inputs = example_inputs(backbone, config) if inputs is None else inputs
        parts = assemble(backbone, inputs, {"at": config.exits}, config.method, head, outputs)
    except ExitkitError as error:
        raise ArgumentError(
            f"the exits in {str(source)!r}, saved by {saved_by(config.versions)}, cannot be attached to this "
            f"{type(backbone).__name__}: {error}"
        ) from error
    return replace(parts, new_head=config.new_head)


def _saved(
    model: MultiExitModel, threshold: Threshold | None, outputs: ExitOutputs | None
) -> tuple[Configuration, bytes]:
    """Configuration and weights file."""
    weights = save(_copies(model, next(model.classifiers.parameters()).dtype))
    return configuration_of(model, _name_of(weights), threshold, outputs), weights


def _write(model: MultiExitModel, config: Configuration, weights: bytes, folder: Path, source: str) -> None:
    with replacing(folder / config.weights) as temporary:
        temporary.write_bytes(weights)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(to_text(config), encoding="utf-8")
    with replacing(folder / CARD) as temporary:
        temporary.write_text(card_of(model, config, source), encoding="utf-8")
    for older in folder.glob(WEIGHTS):
        if older.name != config.weights:
            older.unlink(missing_ok=True)


def _name_of(weights: bytes) -> str:
    return f"exits-{hashlib.sha256(weights).hexdigest()[:16]}.safetensors"


def _read(folder: Path) -> tuple[Configuration, dict[str, Tensor]]:
    config = read_configuration(folder / CONFIG)
    return config, _read_weights(folder / config.weights)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file whose content is what its name says.

    Raises:
        FileError: no file, a damaged one, or one that is not safetensors.
    """
    try:
        content = path.read_bytes()
        if _name_of(content) != path.name:
            raise FileError(
                f"{str(path)!r} is damaged: its content does not match its name. Copy or download it again"
            )
        return load(content)
    except (OSError, SafetensorError, KeyError) as error:
        raise FileError(f"{str(path)!r} cannot be read as safetensors: {error}. Copy or download it again") from error


def _compare(saved: Mapping[str, str], found: Mapping[str, str], source: Source, backbone: nn.Module) -> None:
    difference = first_difference(saved, found)
    if difference is not None:
        raise ArgumentError(
            f"the exits in {str(source)!r} belong to another backbone: {difference} in this {type(backbone).__name__}. "
            "Load its weights, and give example_inputs as when they were trained"
        )


def _fill(model: MultiExitModel, saved: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> None:
    given, wanted = _kinds(saved), _kinds(_copies(model, dtype))
    own = any(":" in head for head in ((model.head,) if isinstance(model.head, str) else model.head))
    remedy = "Give the function that made these heads as head=" if own else "Copy or download it again"
    for name in (*wanted, *given):
        if given.get(name) != wanted.get(name):
            raise FileError(
                f"{str(path)!r} does not fit its configuration: {name!r} is {given.get(name, 'missing')} in the file, "
                f"expected {wanted.get(name, 'nothing of that name')}. {remedy}"
            )
    for name, tensor in _added(model).items():
        if not bool((saved[name].isfinite() | ~tensor.detach().cpu().isfinite()).all()):  # a copied mask may hold -inf
            raise FileError(f"{str(path)!r} holds NaN or infinity in {name!r}; train the exits again")
    with torch.no_grad():
        for name, tensor in _added(model).items():
            tensor.copy_(saved[name])


def _added(model: MultiExitModel) -> dict[str, Tensor]:
    parts = {"classifiers": model.classifiers, "combiners": model.combiners}
    added = {f"{part}.{name}": tensor for part, owner in parts.items() for name, tensor in owner.state_dict().items()}
    backbone = model.backbone.state_dict() if model.new_head else {}
    return added | {f"backbone.{name}": backbone[name] for name in model.new_head if name in backbone}


def _copies(model: MultiExitModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is in the file: heads in ``dtype``, combiners in float32, each tensor for itself even where two are tied."""
    kept = {"classifiers": dtype, "backbone": dtype, "combiners": torch.float32}
    return {
        name: tensor.detach()
        .to("cpu", kept[name.partition(".")[0]] if tensor.is_floating_point() else tensor.dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in _added(model).items()
    }


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {shape_text(tensor.shape)}" for name, tensor in tensors.items()}
