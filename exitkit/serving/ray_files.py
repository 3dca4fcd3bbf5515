"""From files, through a package on a Ray cluster, to Parquet."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.common.errors import ArgumentError, ExitkitError, FileError
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
        FileError: a source that cannot be read, or an ``out`` that cannot be written.
    """
    if out.exists():
        raise ArgumentError(f"--out {str(out)!r} is there already; name another, or remove it")
    with joined(address, actors + 1):
        try:
            counts, cut = _write(package, source, out, actors=actors, **options)
        except ExitkitError:
            raise
        except Exception as error:  # Ray, its readers and Arrow raise dozens of types, some with a remote traceback
            reason = [line for line in str(error).splitlines() if line.strip()][-1:] or ["no reason given"]
            raise FileError(
                f"{source[:200]!r} cannot be answered: {type(error).__name__}: {reason[0].strip()[:300]}; nothing was written"
            ) from error
    bad = counts.pop(-1, 0)
    left = ", ".join(f"{count:,} at exit {exit_}" for exit_, count in sorted(counts.items()))
    faulty = f"; {bad:,} could not be read (column error)" if bad else ""
    shortened = f"; {cut:,} were longer than the package takes, and cut" if cut else ""
    return f"{sum(counts.values()):,} answered: {left}{faulty}{shortened}; written to {out}"


def _write(package: Path, source: str, out: Path, **options: Any) -> tuple[Counter[int], int]:
    """How many rows left at each exit, and how many texts were cut."""
    dataset, column = _read(source)
    answered = predict(dataset, package, column=column, on_error="column", **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:40]}-", dir=out.parent) as folder:
        temporary = Path(folder) / out.name  # inside: a temporary folder is for its owner alone
        temporary.mkdir()
        answered.write_parquet(str(temporary))
        counted = _counted(temporary)
        os.replace(temporary, out)
    return counted


def _read(source: str) -> tuple[Dataset, str]:
    """The rows, and the column of inputs."""
    from ray import data

    ending = next((ending for ending in _COLUMNS if source.rstrip("/").lower().endswith(ending)), None)
    if "://" not in source and not os.path.exists(source):
        raise ArgumentError(f"{source[:200]!r} does not exist; give a folder of images, a .parquet or a .csv")
    if ending is None:
        return data.read_binary_files(source, include_paths=True, file_extensions=_IMAGES), "bytes"
    dataset = data.read_parquet(source) if ending == ".parquet" else data.read_csv(source, **_texts())
    names = dataset.columns() or []
    column = next((name for name in _COLUMNS[ending] if name in names), None)
    if column is None:
        raise ArgumentError(f"{source[:200]!r} has columns {names}; inputs are looked for in {list(_COLUMNS[ending])}")
    return dataset, column


def _texts() -> dict[str, Any]:
    """How Arrow shall read a CSV: texts are texts, also those of digits alone, and may have several lines."""
    import pyarrow
    from pyarrow import csv

    return {
        "parse_options": csv.ParseOptions(newlines_in_values=True),
        "convert_options": csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS[".csv"], pyarrow.string())),
    }


def _counted(folder: Path) -> tuple[Counter[int], int]:
    from pyarrow import dataset

    written = dataset.dataset(folder, format="parquet")
    table = written.to_table(columns=[name for name in ("exit", "cut") if name in written.schema.names])
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return Counter(columns.get("exit", [])), sum(columns.get("cut", []))
