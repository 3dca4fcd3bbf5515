"""The scales at which a table runs: the paper's, a stated reduction for a CPU, and tiny made-up data to see that it runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from exitkit.common.errors import ArgumentError
from exitkit.common.hashes import digest
from exitkit.common.schema import to_json
from exitkit.reproduction.smoke_data import LARGE, made_up
from exitkit.reproduction.tables import Row, Table, merged

Scale = Literal["smoke", "cpu", "full"]
SCALES = ("smoke", "cpu", "full")
_GROUPS = [[0, 1], [2, 3]]
_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """A row at a scale.

    Attributes:
        row: of the table.
        recipe: values of a recipe, its files below the data's folder.
        backbone: those of the recipe whose backbone it begins from; None where it has weights of its own, or random ones.
        missing: files that are not there.
    """

    row: Row
    recipe: dict[str, Any]
    backbone: dict[str, Any] | None
    missing: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of its folder: what it is, and a digest of all that it depends on, whatever table it stands in."""
        return _key(self.recipe, self.backbone)

    @property
    def backbone_key(self) -> str | None:
        """The same of its backbone's own run."""
        return None if self.backbone is None else _key(self.backbone, None)


def settings_of(table: Table, scale: str, data: Path, scratch: Path) -> list[Setting]:
    """The rows of a table at a scale.

    Args:
        table: of a paper.
        scale: ``"full"``, ``"cpu"`` or ``"smoke"``.
        data: folder of the data sets and weights that recipes name.
        scratch: folder that made-up data are written to.

    Raises:
        ArgumentError: a table that has no reduction for a CPU.
    """
    if scale == "smoke":
        return [_smoke(row, scratch) for row in table.rows]
    rows, change = table.rows, dict[str, Any]()
    if scale == "cpu":
        if table.cpu is None:
            raise ArgumentError(
                f"table {table.name} of {table.paper} has no scale 'cpu': {table.needs}; its scales are 'smoke' and 'full'"
            )
        rows = tuple(row for row in rows if table.cpu_rows is None or row.name in table.cpu_rows)
        change = table.cpu
    return [_at(row, merged([change, row.cpu if scale == "cpu" else {}]), data) for row in rows]


def _at(row: Row, change: Mapping[str, Any], data: Path) -> Setting:
    own = {key: value for key, value in change.items() if key != "backbone"}
    recipe = merged([row.recipe, own])
    recipe.pop("smoke", None)
    backbone = None
    if row.backbone is not None and "weights" not in recipe:
        shared = {key: value for key, value in own.items() if key != "exits"}
        backbone = merged([row.backbone, shared, change.get("backbone", {})])
        backbone.pop("smoke", None)
    given = {"data": recipe["data"], "test": recipe.get("test"), "weights": recipe.get("weights")}
    found = {key: _found(value, data) for key, value in given.items() if value is not None}
    missing = tuple(str(path) for path in found.values() if isinstance(path, Path) and not path.exists())
    files = {key: str(path) for key, path in found.items()}
    of_data = {key: path for key, path in files.items() if key != "weights"}
    return Setting(row, recipe | files, None if backbone is None else backbone | of_data, missing)


def _found(value: str, data: Path) -> Path | str:
    """A file or folder below the data's folder; names of torchvision's data sets and weights stay as they are."""
    is_file = Path(value).suffix or value.endswith("/")
    return data / value if is_file and ":" not in value else value


def _smoke(row: Row, scratch: Path) -> Setting:
    recipe = _small(row.recipe, scratch)
    return Setting(row, recipe, None if row.backbone is None else _small(row.backbone, scratch))


def _small(given: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """The same recipe on a few made-up samples of four classes: one epoch a phase, small batches, a rate that is safe."""
    recipe = merged([given])
    kind = recipe.pop("smoke")
    files = made_up(kind, scratch)
    exits, trainer = recipe["exits"], recipe.setdefault("trainer", {})
    large = kind.get("side", 0) >= LARGE
    recipe |= files | {"batch_size": 4 if large else 8}
    recipe.pop("weights", None)
    recipe.pop("max_length", None)
    if large and "per_class" not in recipe:
        recipe["limit"] = 8
    if "classes" in recipe:
        recipe["classes"] = _GROUPS
    classes = len(recipe.get("classes", ())) or kind.get("classes", 4)
    (exits if "num_classes" in exits else recipe)["num_classes"] = classes
    for key, few in (("per_class", 6), ("unlabelled", 2), ("validation", 2)):
        if key in recipe and classes > 1:
            recipe[key] = few
    trainer |= {"epochs": max(1, kind.get("phases", len(trainer.get("phase", ())))), "lr": _RATE}
    for phase in trainer.get("phase", ()):
        for key in ("share", "lr", "backbone_lr"):
            phase.pop(key, None)
    for key in ("milestones", "backbone_lr", "validate_steps"):
        trainer.pop(key, None)
    if "patience" in trainer:
        trainer["patience"] = 1
    if "ensemble_fit" in trainer:
        trainer["ensemble_fit"]["epochs"] = 2
    distillation = recipe.get("loss", {}).get("distillation", {})
    if "confidence_limit" in distillation:
        distillation["confidence_limit"] = "auto"  # the paper's are for other numbers of classes
    return recipe


def _key(recipe: Mapping[str, Any], backbone: Mapping[str, Any] | None) -> str:
    model = str(recipe["model"]).rpartition(":")[2].rpartition("/")[2]
    method = recipe["exits"].get("method", "ztw")
    name = method["name"] if isinstance(method, dict) else method
    contents = {"recipe": _by_content(recipe), "backbone": None if backbone is None else _by_content(backbone)}
    return f"{model}-{Path(str(recipe['data'])).stem}-{name}-{digest(to_json(contents))[:10]}"


def _by_content(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with its files by name and content, wherever they lie."""
    paths = {key: Path(str(recipe[key])) for key in ("data", "test", "weights") if key in recipe}
    return {**recipe, **{key: [path.name, _content(path)] for key, path in paths.items()}}


def _content(path: Path) -> str | None:
    """A digest of a file's bytes, or of the names and sizes below a folder; None of what is not there."""
    if not path.exists():
        return None
    state = path.stat()
    return _digest_of(path.resolve(), state.st_mtime_ns, state.st_size)


@cache
def _digest_of(path: Path, changed: int, size: int) -> str:
    """SHA-256, computed once in a process as long as the file was not ``changed`` since: rows share their data."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    # the bytes of an image folder may be a hundred gigabytes; its links are followed, as when it is read
    walked = (Path(at, name) for at, _, names in os.walk(path, followlinks=True) for name in names)
    below = sorted(one for one in walked if one.is_file())
    return digest([(one.relative_to(path).as_posix(), one.stat().st_size) for one in below])
