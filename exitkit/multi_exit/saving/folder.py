"""Saving what exitkit added, and attaching it again to the same backbone: safetensors and JSON, never pickle.

A saved folder holds ``config.json``, the weights file that it names, and a model card. Every save has a weights file of
its own name, and counts from the moment its ``config.json`` replaces the older one, a single step: whatever interrupts
it, the older save or the new one is there whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.common.files import locked, read_together, replacing
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.methods.policy import ExitPolicy, Threshold
from exitkit.methods.presets import Method
from exitkit.multi_exit.attaching import attach
from exitkit.multi_exit.model import MultiExitModel
from exitkit.multi_exit.saving import hub
from exitkit.multi_exit.saving.card import card
from exitkit.multi_exit.saving.configuration import (
    CONFIG,
    WEIGHTS,
    configuration,
    example_inputs,
    read_configuration,
    saved_by,
    without,
)
from exitkit.surgery.fingerprint import block_lines, first_difference, shape_text, tensor_lines
from exitkit.surgery.replace_classifier import unchanged_on_error

CARD = "README.md"
Source = str | os.PathLike[str]


def save_exits(
    model: MultiExitModel, directory: Source, threshold: Threshold | None, outputs: ExitOutputs | None
) -> None:
    """See :meth:`exitkit.MultiExitModel.save_pretrained`."""
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"directory={str(directory)!r} is a file; name a folder")
    config = configuration(model, threshold, outputs)
    with locked(folder):
        _write(model, config, folder, "path/to/this/folder")


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
    config = configuration(model, threshold, outputs)  # first: if it refuses, nothing is made on the Hub
    name = hub.create(repo_id, private, token)
    with TemporaryDirectory() as folder:
        _write(model, config, Path(folder), name)
        return hub.upload(Path(folder), name, [WEIGHTS], commit_message, token)


def load_exits(
    backbone: nn.Module, source: Source, inputs: Any, revision: str | None, token: hub.Token
) -> MultiExitModel:
    """See :meth:`exitkit.MultiExitModel.from_pretrained`."""
    if isinstance(backbone, MultiExitModel) or not isinstance(backbone, nn.Module):
        raise ArgumentError(
            f"backbone is {type(backbone).__name__}; give the nn.Module that the exits were trained on "
            "(exitkit.detach(ee), for a model that has exits)"
        )
    folder = hub.fetch(source, [CONFIG, WEIGHTS], revision, token)
    config, weights = read_together(lambda: _read(folder))
    _compare(config["tensors"], without(tensor_lines(backbone), config["new_head"]), source, backbone)
    with unchanged_on_error(backbone):
        model = _attached(backbone, inputs, config, source)
        _compare(config["blocks"], block_lines(model.anatomy.blocks), source, backbone)
        _fill(model, weights, getattr(torch, config["dtype"]), folder / config["weights"])
    model.threshold = None if config["policy"] is None else ExitPolicy.from_dict(config["policy"])
    return model


def _attached(backbone: nn.Module, inputs: Any, config: Mapping[str, Any], source: Source) -> MultiExitModel:
    """Fresh exits as configured; a last layer that was replaced is replaced again, or filled where it has the same outputs."""
    outputs = (
        {("num_outputs" if config["outputs"] == 1 else "num_classes"): config["outputs"]} if config["new_head"] else {}
    )
    try:
        method = Method(**config["method"])
        inputs = example_inputs(backbone, config) if inputs is None else inputs
        model = attach(backbone, inputs, at=config["exits"], method=method, head=config["head"], **outputs)
    except (ExitkitError, TypeError) as error:
        raise ArgumentError(
            f"the exits in {str(source)!r}, saved by {saved_by(config)}, cannot be attached to this "
            f"{type(backbone).__name__}: {error}"
        ) from error
    model.new_head = tuple(config["new_head"])
    return model


def _write(model: MultiExitModel, config: Mapping[str, Any], folder: Path, source: str) -> None:
    weights = save(_copies(model, getattr(torch, config["dtype"])))
    name = f"exits-{hashlib.sha256(weights).hexdigest()[:16]}.safetensors"
    with replacing(folder / name) as temporary:
        temporary.write_bytes(weights)
    with replacing(folder / CONFIG) as temporary:
        text = json.dumps({**config, "weights": name}, indent=1, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
    with replacing(folder / CARD) as temporary:
        temporary.write_text(card(model, config, source), encoding="utf-8")
    for older in folder.glob(WEIGHTS):
        if older.name != name:
            older.unlink(missing_ok=True)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = read_configuration(folder / CONFIG)
    return config, _read_weights(folder / config["weights"])


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{str(path)!r} cannot be read as safetensors: {error}. Copy or download it again") from error


def _compare(saved: Mapping[str, str], found: Mapping[str, str], source: Source, backbone: nn.Module) -> None:
    difference = first_difference(saved, found)
    if difference is not None:
        raise ArgumentError(
            f"the exits in {str(source)!r} belong to another backbone: {difference} in this {type(backbone).__name__}. "
            "Build the backbone, load its weights and give example_inputs as when they were trained"
        )


def _fill(model: MultiExitModel, saved: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> None:
    given, wanted = _kinds(saved), _kinds(_copies(model, dtype))
    for name in (*wanted, *given):
        if given.get(name) != wanted.get(name):
            raise FileError(
                f"{str(path)!r} does not fit its configuration: {name!r} is {given.get(name, 'missing')} in the file, "
                f"expected {wanted.get(name, 'nothing of that name')}. Copy or download it again, or save the exits again"
            )
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
