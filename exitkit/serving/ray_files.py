"""From files, through a package on a Ray cluster, to Parquet."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.common.errors import ArgumentError
from exitkit.serving.cluster import joined
from exitkit.serving.dataset import predict

if TYPE_CHECKING:
    from ray.data import Dataset

_COLUMNS = {".parquet": ("image", "text", "x", "bytes"), ".csv": ("text",)}
"""Columns that a file's inputs are looked for in, the first first."""
_IMAGES = ["jpg", "jpeg", "png", "bmp", "webp", "gif", "tif", "tiff"]


def write_predictions(
    package: Path, source: str, address: str | None, out: Path, *, actors: int, **options: Any
) -> str:
    """Answer every row of ``source`` and write ``out``, a folder of Parquet files, whole or not at all.

    Args:
        package: a package.
        source: a folder or bucket of images; a ``.parquet`` file or folder with a column image, text, x or bytes; a ``.csv``
            with a column text.
        address: of a Ray cluster; None for this machine alone.
        out: the folder to write; must not be there.
        actors: processes that answer.
        options: as for :func:`predict`.

    Returns:
        How many rows there were, and how many left at each exit.

    Raises:
        ArgumentError: what is no such source, an ``out`` that is there already, an address where nothing listens.
    """
    if out.exists():
        raise ArgumentError(f"--out {str(out)!r} is there already; name another, or remove it")
    with joined(address, actors + 1):
        dataset, column = _read(source)
        answered = predict(dataset, package, column=column, on_error="column", actors=actors, **options)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}-", dir=out.parent))
        try:
            answered.write_parquet(str(temporary))
            counts = _count(temporary)
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    bad = counts.pop(-1, 0)
    left = ", ".join(f"{count:,} at exit {exit_}" for exit_, count in sorted(counts.items()))
    faulty = f"; {bad:,} could not be read (column error)" if bad else ""
    return f"{sum(counts.values()):,} answered: {left}{faulty}; written to {out}"


def _read(source: str) -> tuple[Dataset, str]:
    """The rows, and the column of inputs."""
    from ray import data

    ending = next((ending for ending in _COLUMNS if source.rstrip("/").lower().endswith(ending)), None)
    if "://" not in source and not os.path.exists(source):
        raise ArgumentError(f"{source[:200]!r} does not exist; give a folder of images, a .parquet or a .csv")
    if ending is None:
        return data.read_binary_files(source, include_paths=True, file_extensions=_IMAGES), "bytes"
    dataset = data.read_parquet(source) if ending == ".parquet" else data.read_csv(source)
    names = dataset.columns() or []
    column = next((name for name in _COLUMNS[ending] if name in names), None)
    if column is None:
        raise ArgumentError(f"{source[:200]!r} has columns {names}; inputs are looked for in {list(_COLUMNS[ending])}")
    return dataset, column


def _count(folder: Path) -> Counter[int]:
    from pyarrow import dataset

    table = dataset.dataset(folder, format="parquet").to_table(columns=["exit"])
    return Counter(table["exit"].to_pylist())
