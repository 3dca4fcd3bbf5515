"""Saving what exitkit added, and attaching it again to the same backbone: safetensors and JSON, never pickle.

The backbone's own weights are not saved. Its identity is: the names and shapes of its parameters and of its blocks, and a
digest of its weights, line by line, so that another backbone is refused with the first line that differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exitkit.attach import attach
from exitkit.errors import ExitkitError
from exitkit.files import replacing
from exitkit.fingerprint import parameter_lines, shape_text, weights_digest
from exitkit.methods import Method
from exitkit.model import MultiExitModel

WEIGHTS, CONFIG, CARD = "exits.safetensors", "config.json", "README.md"
_FORMAT = "exitkit-exits-1"


def save_exits(model: MultiExitModel, directory: str | Path) -> None:
    """Write the exits' weights, their configuration with the backbone's fingerprint, and a model card."""
    folder = Path(directory)
    config = {
        "format": _FORMAT,
        "versions": {"torch": torch.__version__},
        "backbone": type(model.backbone).__name__,
        "fingerprint": fingerprint(model),
        "exits": [boundary.name for boundary in model.boundaries],
        "method": asdict(model.method),
        "head": model.head,
    }
    with replacing(folder / WEIGHTS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in _added(model).items()}, temporary)
    with replacing(folder / CARD) as temporary:
        temporary.write_text(_card(model))
    with replacing(folder / CONFIG) as temporary:  # last: a folder with a configuration is complete
        temporary.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def load_exits(backbone: nn.Module, directory: str | Path, example_inputs: Any = None) -> MultiExitModel:
    """Attach the exits saved in ``directory`` to ``backbone``.

    Args:
        backbone: the model they were trained on, with its weights.
        directory: what :func:`save_exits` wrote.
        example_inputs: as for :func:`exitkit.attach`.

    Raises:
        ExitkitError: a missing, damaged or foreign file, or another backbone than the one they were trained on.
    """
    folder = Path(directory)
    config = _read_config(folder / CONFIG)
    _check_parameters(config["fingerprint"], backbone, folder)
    try:
        method = Method(**config["method"])
    except TypeError as error:
        raise ExitkitError(f"{str(folder / CONFIG)!r} has another kind of method: {error}. Update exitkit") from error
    model = attach(backbone, example_inputs, at=config["exits"], method=method, head=config["head"])
    _compare(config["fingerprint"], fingerprint(model), folder, backbone)
    _load_weights(model, folder / WEIGHTS)
    return model


def fingerprint(model: MultiExitModel) -> list[str]:
    """What a backbone is: one line per parameter, one per block, and a digest of its weights."""
    blocks = [f"block {block.name} {shape_text(block.shape)} {block.macs} MACs" for block in model.anatomy.blocks]
    return [*parameter_lines(model.backbone), *blocks, f"weights {weights_digest(model.backbone)}"]


def _check_parameters(saved: list[str], backbone: nn.Module, folder: Path) -> None:
    """Before attaching, which would otherwise fail on the names of the exits."""
    found = parameter_lines(backbone)
    _compare([line for line in saved if line.startswith("parameter ")], found, folder, backbone)


def _compare(saved: list[str], found: list[str], folder: Path, backbone: nn.Module) -> None:
    for was, is_ in zip_longest(saved, found, fillvalue="nothing"):
        if was != is_:
            raise ExitkitError(
                f"the exits in {str(folder)!r} belong to another backbone: {was!r} there is {is_!r} in this "
                f"{type(backbone).__name__}. Build the backbone, and give example_inputs, as when they were trained"
            )


def _added(model: MultiExitModel) -> dict[str, Tensor]:
    parts = {"classifiers": model.classifiers, "combiners": model.combiners}
    return {f"{part}.{name}": tensor for part, owner in parts.items() for name, tensor in owner.state_dict().items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExitkitError(
            f"{str(path)!r} cannot be read: {error}. Give a folder that save_pretrained wrote"
        ) from error
    missing = {"fingerprint", "exits", "method", "head"} - set(config if isinstance(config, dict) else ())
    if missing or config.get("format") != _FORMAT:
        raise ExitkitError(f"{str(path)!r} is no configuration of exits; give a folder that save_pretrained wrote")
    found: dict[str, Any] = config
    return found


def _load_weights(model: MultiExitModel, path: Path) -> None:
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExitkitError(
            f"{str(path)!r} cannot be read as safetensors: {error}. Copy or download it again"
        ) from error
    own = _added(model)
    given, wanted = _kinds(saved), _kinds(own)
    for name in (*wanted, *given):
        if given.get(name) != wanted.get(name):
            raise ExitkitError(
                f"{str(path)!r} does not fit its configuration: {name!r} is {given.get(name, 'missing')} in the file, "
                f"expected {wanted.get(name, 'nothing of that name')}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {shape_text(tensor.shape)}" for name, tensor in tensors.items()}


def _card(model: MultiExitModel) -> str:
    rows = "\n".join(f"| {m} | `{exit_.name}` | {exit_.macs_fraction:.1%} |" for m, exit_ in enumerate(model.exits))
    return f"""---
library_name: exitkit
tags: [early-exit]
---

# Early exits for {type(model.backbone).__name__}

Method `{model.method.name}`, heads `{model.head}`. Only the exits are here, not the backbone.

```python
ee = exitkit.MultiExitModel.from_pretrained(backbone, "this/folder")
```

| exit | reads | cost to answer here, as a share of the backbone |
|---:|---|---:|
{rows}
"""
