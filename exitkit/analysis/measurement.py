"""What every measurement returns: plain arrays with a table, a picture, and a file of their own."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from exitkit.common.checks import PATH, check, hints_of
from exitkit.common.errors import FileError
from exitkit.common.files import replacing
from exitkit.common.hashes import digest
from exitkit.common.schema import build, parse_json, to_json
from exitkit.evaluation.plots import labelled, new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Table:
    """Numbers to read. Prints as text.

    Attributes:
        title: what was measured.
        headings: one for each column.
        rows: texts and numbers.
        note: the settings that the numbers depend on.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    note: str

    def __str__(self) -> str:
        cells = [self.headings, *(tuple(map(shown, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if at else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *lines, self.note])

    def to_csv(self, path: str | Path) -> None:
        """Write headings and rows, in full precision."""
        check("path", path, PATH)
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.headings, *self.rows])


def shown(value: str | float) -> str:
    """A cell as text: a dash where there is no number."""
    if isinstance(value, str):
        return value
    return "-" if np.isnan(value) else f"{value:.4g}"


@dataclass(frozen=True, eq=False)
class Measurement:
    """The base of all results. A subclass is a frozen dataclass of arrays, texts, numbers and flags."""

    def table(self) -> Table:
        """The numbers, and the settings they depend on."""
        raise NotImplementedError

    def draw(self, axes: Axes) -> None:
        """What is seen at a glance, on one pair of axes."""
        raise NotImplementedError

    def figure(self) -> Figure:
        """The picture, with the settings under it."""
        figure = new_figure()
        self.draw(figure.add_subplot())
        return self.with_note(figure)

    def plot(self, path: str | Path) -> None:
        """Write the picture (png, svg or pdf)."""
        write_figure(self.figure(), path)

    def with_note(self, figure: Figure) -> Figure:
        """The table's title above a figure and its note below."""
        table = self.table()
        figure.suptitle(table.title, fontsize=10)
        figure.supxlabel(table.note, fontsize=7, color="0.35", wrap=True)
        return figure

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that :meth:`load` reads.

        Raises:
            FileError: it cannot be written; what was there is unchanged.
        """
        check("path", path, PATH)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: np.array(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        settings = to_json({name: value for name, value in values.items() if name not in arrays})
        header = {"format": _format(type(self)), "settings": settings}
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata={**header, "sha256": _digest(arrays, header)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: no such file, a damaged one, or one of another measurement.
        """
        check("path", path, PATH)
        header, arrays = _read(path)
        if header.get("format") != _format(cls):
            raise FileError(
                f"path={str(path)!r} holds {header.get('format', 'no measurement')!r}, not {_format(cls)!r}; read it with the "
                "class that wrote it"
            )
        if header.pop("sha256", None) != _digest(arrays, header):
            raise FileError(f"path={str(path)!r} is damaged: its content is not what was saved; measure again")
        hints = hints_of(cls)  # type: ignore[arg-type]  # mypy: a type is hashable
        plain = parse_json(header["settings"])
        return cls(**arrays, **{name: build(hints[name], value, repr(str(path))) for name, value in plain.items()})


def _format(kind: type[Measurement]) -> str:
    return f"exitkit-analysis-{kind.__name__}-1"


def _digest(arrays: dict[str, Any], header: dict[str, str]) -> str:
    return digest([sorted(arrays.items()), sorted(header.items())])


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="np") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged header ends in a dozen kinds
        raise FileError(f"path={str(path)!r} cannot be read as a measurement: {str(error)[:200]}") from error


def draw_by_depth(axes: Axes, depth: Array, lines: dict[str, Array], xlabel: str, ylabel: str) -> None:
    """Values by depth, one line for each name."""
    labelled(axes, xlabel, ylabel)
    for name, values in lines.items():
        axes.plot(depth, values, marker="o", markersize=3, linewidth=1.5, label=name)
    axes.legend(frameon=False, fontsize=7)


def exit_names(exits: int) -> tuple[str, ...]:
    """How exits are called in tables; the last is the backbone's own."""
    return (*(f"exit {m}" for m in range(exits - 1)), "backbone")


def spread(values: Array) -> Array:
    """Standard deviation over the first axis; 0 for one value."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def joined(parts: Sequence[str]) -> str:
    """Settings as one line under a table or picture."""
    return "; ".join(part for part in parts if part)
