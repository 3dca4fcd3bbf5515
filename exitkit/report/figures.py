"""The pictures of a report: each drawn once, and written as SVG into the page, and as PNG and CSV beside it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

from exitkit.common.files import replacing
from exitkit.evaluation import Curve, ExitOutputs, calibration_error, reliability
from exitkit.evaluation.plots import curves_figure, hindsight_figure, labelled, new_figure, write_figure
from exitkit.methods.policy import typed
from exitkit.report.points import MATRIX, Points

_POINTS_PER_INCH = 72  # the unit of matplotlib's SVG
_WIDTH, _HEIGHT = 5.0, 3.6  # inches; text stays readable on a phone
_COLUMNS = 3
_SIDE, _BESIDE, _APART, _ABOVE, _BELOW = 1.3, 0.6, 0.2, 0.35, 0.5  # of the squares of a reliability diagram, in inches
_DARK, _FAINT = re.compile("#(000000|666666)"), re.compile("#(ebebeb|cccccc)")


class Axis(NamedTuple):
    """From a value to a place in the SVG: ``start + value * step``."""

    start: float
    step: float


@dataclass(frozen=True)
class Drawn:
    """A figure in the page.

    Attributes:
        svg: an element to put into a page; it takes the text's colour, and so follows dark mode.
        alt: what it shows, in words.
    """

    svg: str
    alt: str


def draw_curves(points: Mapping[str, Points], beside: Path, name: str) -> tuple[Drawn, Axis, Axis]:
    """Accuracy against cost, with a cursor (``id="NAME-cursor"``), and the figure's axes, to move it."""
    figure = curves_figure({method: shown.curve for method, shown in points.items()})
    axes = figure.axes[0]
    rows = (
        (method, *values, 1 / values[-1])
        for method, shown in points.items()
        for values in zip(shown.curve.thresholds, shown.curve.accuracy, shown.curve.cost, strict=True)
    )
    _beside(figure, ["method", "threshold", "accuracy", "cost", "speedup"], rows, beside, name)
    first = next(iter(points.values()))
    at = first.curve.cost[first.start], first.curve.accuracy[first.start]
    axes.plot(
        *at, "o", markersize=11, color="#000000", markerfacecolor="none", markeredgewidth=2, clip_on=False
    ).pop().set_gid("cursor")
    ends = "; ".join(
        f"{method} from {shown.curve.accuracy[0]:.1%} at {shown.curve.cost[0]:.0%} to {shown.curve.accuracy[-1]:.1%} at "
        f"{shown.curve.cost[-1]:.0%}"
        for method, shown in points.items()
    )
    drawn = embedded(figure, name, f"Accuracy against average cost, a share of the backbone's MACs: {ends}.")
    (left, bottom), (right, top) = axes.transData.transform([(0, 0), (1, 1)])
    height = figure.get_size_inches()[1] * _POINTS_PER_INCH
    return drawn, Axis(left, right - left), Axis(height - bottom, bottom - top)


def draw_errors(curves: Mapping[str, Curve], beside: Path, name: str) -> Drawn:
    """Mean squared error against cost."""
    figure = curves_figure(curves, "mean squared error")
    rows = (
        (method, *values)
        for method, curve in curves.items()
        for values in zip(curve.thresholds, curve.accuracy, curve.cost, strict=True)
    )
    _beside(figure, ["method", "threshold", "mse", "cost"], rows, beside, name)
    ends = "; ".join(
        f"{method} from {curve.accuracy[0]:.4f} at {curve.cost[0]:.0%} to {curve.accuracy[-1]:.4f} at {curve.cost[-1]:.0%}"
        for method, curve in curves.items()
    )
    return embedded(figure, name, f"Mean squared error against average cost, a share of the backbone's MACs: {ends}.")


def draw_hindsight(outputs: Mapping[str, ExitOutputs], beside: Path, name: str) -> Drawn:
    """Hindsight improvability of each exit."""
    values = {method: result.hindsight_improvability() for method, result in outputs.items()}
    figure = hindsight_figure(values)
    rows = ((method, exit_, value) for method, row in values.items() for exit_, value in enumerate(row))
    _beside(figure, ["method", "exit", "hindsight_improvability"], rows, beside, name)
    last = ", ".join(f"{method} {row[-1]:.0%}" for method, row in values.items())
    return embedded(figure, name, f"Hindsight improvability of each exit. Of the backbone's answers: {last}.")


def draw_reliability(outputs: ExitOutputs, beside: Path, name: str) -> Drawn:
    """A reliability diagram of every exit."""
    found, errors = reliability(outputs), calibration_error(outputs)
    exits, bins = found.share.shape
    cells = _Cells.of(exits)
    shade = 0.2 + 0.8 * (found.share / found.share.max(1, keepdims=True))  # pale where a bar stands for few samples
    height = np.nan_to_num(found.accuracy)
    left = np.broadcast_to((np.arange(bins) + 0.05) / bins, height.shape)
    around = (0, 0), (0, 1), (0.9 / bins, 1), (0.9 / bins, 0)
    corners = np.stack([np.stack([left + side, height * up], -1) for side, up in around], -2)
    dots = cells.placed(np.stack([found.confidence, found.accuracy], -1)).reshape(-1, 2)
    cells.axes.add_collection(
        PolyCollection(
            list(cells.placed(corners).reshape(-1, 4, 2)), facecolors=[to_rgba("C0", alpha) for alpha in shade.ravel()]
        )
    )
    cells.axes.plot(*dots.T, "o", color="C1", markersize=3)
    cells.label([f"{exit_name(exit_, exits)}: ECE {error:.1%}" for exit_, error in enumerate(errors)])
    rows = (
        (exit_, bin_, found.confidence[exit_, bin_], found.accuracy[exit_, bin_], found.share[exit_, bin_])
        for exit_ in range(exits)
        for bin_ in range(bins)
    )
    _beside(cells.figure, ["exit", "bin", "confidence", "accuracy", "share"], rows, beside, name)
    listed = ", ".join(f"{exit_name(exit_, exits)} {error:.1%}" for exit_, error in enumerate(errors))
    return embedded(
        cells.figure,
        name,
        f"Accuracy against confidence at each exit. Expected calibration error: {listed}.",
    )


def still_exits(points: Points, beside: Path, name: str) -> None:
    """PNG and CSV of where samples leave; the PNG is at the starting threshold."""
    shares = points.exits / points.exits.sum(1, keepdims=True)
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = labelled(
        figure.add_subplot(), "exit", f"share of the samples, τ = {typed(points.curve.thresholds[points.start])}"
    )
    axes.bar([exit_name(exit_, shares.shape[1]) for exit_ in range(shares.shape[1])], shares[points.start])
    axes.tick_params(axis="x", labelrotation=30)
    heading = ["threshold", *(exit_name(exit_, shares.shape[1]) for exit_ in range(shares.shape[1]))]
    _beside(figure, heading, np.column_stack([points.curve.thresholds, shares]), beside, name)


def still_confusion(points: Points, classes: Sequence[str], beside: Path, name: str) -> None:
    """PNG and CSV of what is confused at the starting threshold."""
    at: list[Any] = points.confusion[points.start]
    figure = new_figure(_WIDTH, _WIDTH)
    axes = figure.add_subplot()
    if len(classes) <= MATRIX:
        matrix = np.reshape(at, (len(classes), len(classes)))
        rows = [(label, answer, matrix[i, j]) for i, label in enumerate(classes) for j, answer in enumerate(classes)]
        axes.imshow(matrix, cmap="Blues")
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for (i, j), count in np.ndenumerate(matrix):
            colour = "white" if count > matrix.max() / 2 else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=colour).set_in_layout(False)
        axes.set(xlabel="answer", ylabel="label")
    else:
        rows = [(classes[label], classes[answer], count) for label, answer, count in at]
        labelled(axes, "samples", "").barh(
            [f"{label} → {answer}" for label, answer, _ in rows], [row[2] for row in rows]
        )
        axes.invert_yaxis()
    axes.set_title(f"τ = {typed(points.curve.thresholds[points.start])}")
    _beside(figure, ["label", "answer", "samples"], rows, beside, name)


def _write_csv(path: Path, heading: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table as a file, whole or not at all; no text in it is a formula to a spreadsheet."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([_as_text(cell) for cell in row] for row in (heading, *rows))


def _as_text(cell: Any) -> Any:
    """Behind an apostrophe, by which spreadsheets know text, where it would be taken for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def exit_name(exit_: int, exits: int) -> str:
    """Of an exit by number, where nothing tells which boundary it reads."""
    return "backbone" if exit_ == exits - 1 else f"exit {exit_}"


@dataclass(frozen=True, eq=False)
class _Cells:
    """Small squares from 0 to 1 side by side, all in one ``Axes`` whose unit is the inch: many of them take seconds to draw.

    Attributes:
        figure: of all of them.
        axes: what is drawn on, without any axis of its own.
        origins: (N, 2) the lower left corner of each square.
    """

    figure: Figure
    axes: Axes
    origins: NDArray[np.float64]

    @classmethod
    def of(cls, count: int) -> _Cells:
        rows = -(-count // _COLUMNS)
        row, column = np.divmod(np.arange(count), _COLUMNS)
        height = rows * (_SIDE + _ABOVE) + _BELOW
        origins = np.stack([_BESIDE + column * (_SIDE + _APART), height - (row + 1) * (_SIDE + _ABOVE)], -1)
        figure = new_figure(_WIDTH, height)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(0, height))
        axes.set_axis_off()
        return cls(figure, axes, origins)

    def placed(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, …, 2) points of each square, in inches."""
        return self.origins.reshape(len(self.origins), *[1] * (values.ndim - 2), 2) + values * _SIDE

    def label(self, titles: Sequence[str]) -> None:
        """Grid, diagonal and title of every square; numbers along the outer ones."""
        count = len(self.origins)
        for ends, style in (
            ([[(0, 0.5), (1, 0.5)], [(0.5, 0), (0.5, 1)], [(0, 1), (1, 1)], [(1, 0), (1, 1)]], {"color": "0.92"}),
            ([[(0, 1), (0, 0)], [(0, 0), (1, 0)]], {"color": "#000000"}),
            ([[(0, 0), (1, 1)]], {"color": "#666666", "linestyle": "--", "zorder": 3}),
        ):
            lines = self.placed(np.broadcast_to(np.array(ends, float), (count, len(ends), 2, 2))).reshape(-1, 2, 2)
            self.axes.add_collection(LineCollection(list(lines), linewidths=0.8, **{"zorder": 0} | style))
        for number, ((x, y), title) in enumerate(zip(self.origins, titles, strict=True)):
            self.axes.text(x + _SIDE / 2, y + _SIDE + 0.06, title, ha="center", size="small")
            for tick in (0, 0.5, 1):
                if number % _COLUMNS == 0:
                    self.axes.text(x - 0.05, y + tick * _SIDE, f"{tick:g}", ha="right", va="center", size="small")
                if number + _COLUMNS >= count:
                    self.axes.text(x + tick * _SIDE, y - 0.05, f"{tick:g}", ha="center", va="top", size="small")
        top = self.origins[0, 1] + _SIDE
        self.axes.text(_WIDTH / 2, 0.06, "confidence", ha="center", va="bottom")
        self.axes.text(0.05, top / 2 + _BELOW / 2, "accuracy", ha="left", va="center", rotation=90)


def _beside(figure: Figure, heading: Sequence[str], rows: Iterable[Iterable[Any]], beside: Path, name: str) -> None:
    """``report.html`` has ``report-NAME.png`` and ``report-NAME.csv`` beside it."""
    write_figure(figure, beside.with_name(f"{beside.stem}-{name}.png"))
    _write_csv(beside.with_name(f"{beside.stem}-{name}.csv"), heading, rows)


def embedded(figure: Figure, name: str, alt: str) -> Drawn:
    """The figure as an SVG element whose ids begin with its name, so that several fit into one page."""
    if figure.get_size_inches()[0] > _WIDTH:
        figure.set_size_inches(_WIDTH, _HEIGHT)
    figure.set_dpi(_POINTS_PER_INCH)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", written.getvalue()[written.getvalue().index("<svg") :], flags=re.S
    )
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = _FAINT.sub("var(--rule)", _DARK.sub("currentColor", svg))
    return Drawn(re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'aria-hidden="true"', svg, count=1), alt)
