"""Pictures of the evaluation, with matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from exitkit.common.checks import PATH, check
from exitkit.common.errors import ArgumentError
from exitkit.common.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
_STYLES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
"""Of lines, since colours alone do not tell everyone."""
_LEGEND = 60
"""Letters that fit side by side below a picture, a line's sample taking six."""


@runtime_checkable
class Points(Protocol):
    """What is drawn of a curve: cost and accuracy, point by point, cheapest first."""

    @property
    def cost(self) -> Array: ...

    @property
    def accuracy(self) -> Array: ...


def plot_curves(curves: Mapping[str, Points], path: str | Path, measure: str = "accuracy") -> None:
    """Accuracy against average cost for each method; the unmodified backbone is the dashed line.

    ``measure`` is what is drawn instead of accuracy. The backbone's is read where no sample leaves, so methods that combine
    its answer show their own.
    """
    write_figure(curves_figure(curves, measure), path)


def curves_figure(curves: Mapping[str, Points], measure: str = "accuracy") -> Figure:
    """What :func:`plot_curves` writes."""
    check("curves", curves, Mapping, "give curves by name: {'ztw': outputs.curve()}")
    for name, curve in curves.items():
        check(f"curves[{name!r}]", curve, Points, "give outputs.curve()")
    if not curves:
        raise ArgumentError("curves={} is empty; give at least one curve by name")
    figure = new_figure()
    axes = labelled(figure.add_subplot(), "average cost (share of the backbone's MACs)", measure)
    for number, (name, curve) in enumerate(curves.items()):
        style = _STYLES[number % len(_STYLES)]
        axes.step(curve.cost, curve.accuracy, where="post", label=name, linewidth=1.8, linestyle=style)
    axes.axhline(next(iter(curves.values())).accuracy[-1], color="0.4", linestyle="--", linewidth=1, label="backbone")
    axes.axvline(1.0, color="0.8", linewidth=1, zorder=0)
    axes.set_xlim(left=0)
    _name_lines(figure, axes)
    return figure


def plot_hindsight(improvability: Mapping[str, Array], path: str | Path) -> None:
    """Hindsight improvability of each exit, per method (Zero Time Waste, figure 2)."""
    write_figure(hindsight_figure(improvability), path)


def hindsight_figure(improvability: Mapping[str, Array]) -> Figure:
    """What :func:`plot_hindsight` writes."""
    check("improvability", improvability, Mapping, "give outputs.hindsight_improvability() by name")
    from matplotlib.ticker import MaxNLocator

    figure = new_figure()
    axes = labelled(figure.add_subplot(), "exit", "hindsight improvability")
    for number, (name, values) in enumerate(improvability.items()):
        style = _STYLES[number % len(_STYLES)]
        axes.plot(range(len(values)), values, marker="o", markersize=3, label=name, linestyle=style)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_lines(figure, axes)
    return figure


def _name_lines(figure: Figure, axes: Axes) -> None:
    """A legend below the axes, off the curves wherever they run."""
    longest = max(len(str(line.get_label())) for line in axes.get_lines())
    figure.legend(frameon=False, loc="outside lower center", ncols=max(1, min(4, _LEGEND // (longest + 6))))


def new_figure(width: float = 7, height: float = 4.5) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def labelled(axes: Axes, xlabel: str, ylabel: str) -> Axes:
    """Axes in the style that all pictures share."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write a picture in the format of the path's suffix."""
    check("path", path, PATH)
    formats = figure.canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in formats:
        raise ArgumentError(
            f"path={str(path)!r} has no picture format as its suffix; use one of {', '.join(sorted(formats))}"
        )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
