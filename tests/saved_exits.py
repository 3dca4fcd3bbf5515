"""Lies in saved exits: other content under hashes that are right."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def edit(folder: Path, **changes: Any) -> None:
    """Another configuration under a hash that is right: of all the rest, with sorted keys and no spaces."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    del config["sha256"]
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**config, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def replace_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Other weights under a name and hashes that are right."""
    content = safetensors.torch.save(weights)
    weights_file(folder).unlink()
    name = f"exits-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    (folder / name).write_bytes(content)
    edit(folder, weights=name)
