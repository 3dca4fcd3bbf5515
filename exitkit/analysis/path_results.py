"""What paths and planes between models show: loss and error at every point, as tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from exitkit.analysis.losses import objective_in_words
from exitkit.analysis.measurement import Array, Measurement, Table, exit_names, joined
from exitkit.evaluation.plots import labelled, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAP = 2.0
"""The largest loss that a picture of a plane tells apart, as in the paper's figure 3."""


@dataclass(frozen=True, eq=False)
class Connectivity(Measurement):
    """Loss and error on θ(λ) = (1 − λ) θ_A + λ Π θ_B.

    Attributes:
        path: (L,) λ.
        loss: (L, M+1) of every exit's head, the backbone's last.
        objective: (L,) their weighted sum.
        error: (L, M+1) share of wrong answers after the ensemble; mean absolute error for regression.
        barrier: (M+1,) the most by which the loss exceeds the straight line between its ends; 0 where it never does.
        error_barrier: (M+1,) the same of the error.
        objective_barrier: the same of the objective.
        aligned: whether B was permuted to fit A.
        distance_before, distance: ‖θ_A − θ_B‖ over all parameters, and ‖θ_A − Πθ_B‖.
        groups: how many groups of units could be permuted; 0 without alignment.
        frozen: what the alignment did not understand.
        batchnorm_reset: whether BatchNorm's statistics were taken anew at every λ, also at 0 and 1.
        samples, seed: how many samples, and the seed of the matching.
        orders: random orders that the matching tried, beside the graph's own.
        weights: (M+1,) what each exit's loss is multiplied by in the objective.
        reduction, label_smoothing: of the objective, see :class:`exitkit.training.Loss`.
    """

    path: Array
    loss: Array
    objective: Array
    error: Array
    barrier: Array
    error_barrier: Array
    objective_barrier: float
    aligned: bool
    distance_before: float
    distance: float
    groups: int
    frozen: tuple[str, ...]
    batchnorm_reset: bool
    samples: int
    seed: int
    orders: int = 0
    weights: Array = field(default_factory=lambda: np.zeros(0))
    reduction: str = ""
    label_smoothing: float = 0.0

    def table(self) -> Table:
        middle = len(self.path) // 2
        rows: list[tuple[str | float, ...]] = []
        for at, name in enumerate(exit_names(len(self.barrier))):
            ends = (
                self.loss[0, at],
                self.loss[middle, at],
                self.loss[-1, at],
                self.barrier[at],
                self.error_barrier[at],
            )
            rows.append((name, *map(float, ends)))
        whole = (*self.objective[[0, middle, -1]], self.objective_barrier, float("nan"))
        rows.append(("objective", *map(float, whole)))
        headings = (
            "exit",
            "loss at A",
            f"at λ = {self.path[middle]:.2g}",
            "loss at B",
            "barrier",
            "barrier of the error",
        )
        return Table("Mode connectivity", headings, tuple(rows), _note(self))

    def draw(self, axes: Axes) -> None:
        labelled(axes, "λ, from A to B", "loss")
        for at, name in enumerate(exit_names(len(self.barrier))):
            axes.plot(self.path, self.loss[:, at], linewidth=1.2, label=name)
        axes.plot(self.path, self.objective / len(self.barrier), color="black", linewidth=2, label="objective / exits")
        axes.legend(frameon=False, fontsize=6)

    def figure(self) -> Figure:
        figure = new_figure(10, 4)
        left, right = figure.subplots(1, 2)
        self.draw(left)
        labelled(right, "λ, from A to B", "error")
        for at, name in enumerate(exit_names(len(self.barrier))):
            right.plot(self.path, self.error[:, at], linewidth=1.2, label=name)
        return self.with_note(figure)


@dataclass(frozen=True, eq=False)
class Plane(Measurement):
    """Losses on the plane through three models.

    Attributes:
        x, y: (P,) coordinates in units of ‖θ_B − θ_A‖: x along B − A, y along what C − A has beside.
        loss: (P, P, M+1) of every exit's head at (x, y).
        objective: (P, P).
        places: (3, 2) where A, B and C are.
        aligned, batchnorm_reset, samples, seed, orders: as of :class:`Connectivity`.
        distance_before, distance: (2,) of B and of C to A, before and after the alignment.
        groups, frozen, weights, reduction, label_smoothing: as of :class:`Connectivity`.
    """

    x: Array
    y: Array
    loss: Array
    objective: Array
    places: Array
    aligned: bool
    distance_before: Array
    distance: Array
    groups: int
    frozen: tuple[str, ...]
    batchnorm_reset: bool
    samples: int
    seed: int
    orders: int = 0
    weights: Array = field(default_factory=lambda: np.zeros(0))
    reduction: str = ""
    label_smoothing: float = 0.0

    def table(self) -> Table:
        rows: list[tuple[str | float, ...]] = []
        for name, (across, up) in zip("ABC", self.places, strict=True):
            near = abs(self.x - across).argmin(), abs(self.y - up).argmin()
            rows.append((name, float(across), float(up), *map(float, (self.objective[near], self.loss[near][-1]))))
        headings = ("model", "x", "y", "objective at the next point", "backbone's loss there")
        return Table("Plane of three models", headings, tuple(rows), _note(self))

    def draw(self, axes: Axes) -> None:
        self._contours(axes, self.objective / self.loss.shape[-1], "objective / exits")

    def figure(self) -> Figure:
        figure = new_figure(9, 4)
        left, right = figure.subplots(1, 2)
        self._contours(left, self.loss[..., -1], "backbone")
        self.draw(right)
        figure.colorbar(right.collections[0], ax=[left, right], label=f"loss, cut at {CAP:g}")
        return self.with_note(figure)

    def _contours(self, axes: Axes, values: Array, title: str) -> None:
        shown = np.minimum(np.nan_to_num(values, nan=np.inf), CAP).T
        axes.contourf(self.x, self.y, shown, np.linspace(0, CAP, 21), cmap="viridis")
        axes.plot(*self.places.T, linestyle="", marker="o", color="white", markeredgecolor="black")
        for name, place in zip("ABC", self.places, strict=True):
            axes.annotate(name, place, textcoords="offset points", xytext=(5, 5), color="white")
        axes.set_title(title, fontsize=9)
        axes.set_aspect("equal")


def _note(measured: Connectivity | Plane) -> str:
    before, after = np.atleast_1d(measured.distance_before), np.atleast_1d(measured.distance)
    apart = ", ".join(f"{was:.3g} → {now:.3g}" for was, now in zip(before, after, strict=True))
    tried = f"random orders tried: {measured.orders}"
    fit = f"{measured.groups} groups of units permuted to fit ({tried}), ‖A − B‖ {apart}"
    return joined(
        (
            fit if measured.aligned else "not aligned",
            f"not understood: {', '.join(measured.frozen)}" if measured.frozen else "",
            f"BatchNorm's statistics {'taken anew at every point' if measured.batchnorm_reset else 'interpolated'}",
            objective_in_words(measured.weights, measured.reduction, measured.label_smoothing),
            f"{measured.samples:,} samples, seed {measured.seed}",
        )
    )
