"""Loss on the straight path between two models, and on the plane through three (Kubaty et al., section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from exitkit.analysis.between import Ends, coordinates
from exitkit.analysis.measurement import Array, Measurement, Table, exit_names, joined
from exitkit.analysis.permutations.matching import check_alike
from exitkit.analysis.samples import tracked
from exitkit.common.checks import Bounds, Count, Index, check
from exitkit.evaluation.plots import labelled, new_figure
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.losses import Loss

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
        aligned, batchnorm_reset, samples, seed: as of :class:`Connectivity`.
        distance_before, distance: (2,) of B and of C to A, before and after the alignment.
        groups, frozen: as of :class:`Connectivity`.
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
    fit = f"{measured.groups} groups of units permuted to fit, ‖A − B‖ {apart}" if measured.aligned else "not aligned"
    return joined(
        (
            fit,
            f"not understood: {', '.join(measured.frozen)}" if measured.frozen else "",
            f"BatchNorm's statistics {'taken anew at every point' if measured.batchnorm_reset else 'interpolated'}",
            f"{measured.samples:,} samples, seed {measured.seed}",
        )
    )


def _check_options(align: bool, reset_batchnorm: bool, samples: int, loss: Loss | None, seed: int) -> None:
    """What :func:`connectivity` and :func:`plane` both take."""
    for name, value, allowed in (
        ("align", align, bool),
        ("reset_batchnorm", reset_batchnorm, bool),
        ("samples", samples, Count),
        ("loss", loss, Loss | None),
        ("seed", seed, Index),
    ):
        check(name, value, allowed)


def connectivity(
    a: MultiExitModel,
    b: MultiExitModel,
    loader: Iterable[Any],
    *,
    points: int = 25,
    align: bool = True,
    reset_batchnorm: bool = True,
    samples: int = 2000,
    loss: Loss | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> Connectivity:
    """Loss and error of every exit on the straight path between two models, heads included.

    A barrier alone says little: independent networks of ordinary width have one even after the best alignment. Compare it with
    that between two seeds of the same regime.

    Args:
        a: a model.
        b: another of the same architecture, with the same exits. Neither is changed.
        loader: as for :class:`exitkit.Trainer`; the same samples are taken at every point, and for BatchNorm's statistics.
        points: values of λ, from 0 to 1.
        align: permute the hidden units of ``b`` to fit ``a`` first, see :func:`exitkit.analysis.align`.
        reset_batchnorm: take BatchNorm's statistics anew at every point, the ends included; without that the middle of a path
            collapses. Other layers, dropout too, stay in eval mode.
        samples: the first of the loader.
        loss: weights of the exits in the objective; by default 1 each. Distillation is left out.
        seed: of the orders of the matching.
        show_progress: draw a bar on a terminal.

    Raises:
        ArgumentError: models of different architecture or heads (the first difference is named), no labels, or a loss that is
            not a number (its λ is named).
        NotCapturableError: torch.export cannot follow the model, which aligning needs.
    """
    check("points", points, Annotated[int, Bounds(least=2)])
    _check_options(align, reset_batchnorm, samples, loss, seed)
    check_alike(a, b)
    line = np.linspace(0.0, 1.0, points)
    with Ends.met(a, [b], loader, align, samples, loss, seed) as ends:
        along = [
            ends.scores((1 - place, place), reset_batchnorm, f"λ={place:.3g}")
            for place in tracked(line.tolist(), "path", show_progress)
        ]
    losses, errors = (np.stack([getattr(one, name) for one in along]) for name in ("loss", "error"))
    objective = np.array([one.objective for one in along])
    return Connectivity(
        path=line,
        loss=losses,
        objective=objective,
        error=errors,
        barrier=_barrier(line, losses),
        error_barrier=_barrier(line, errors),
        objective_barrier=float(_barrier(line, objective[:, None])[0]),
        distance_before=ends.before[0],
        distance=ends.after[0],
        **ends.settings(reset_batchnorm),
    )


def plane(
    a: MultiExitModel,
    b: MultiExitModel,
    c: MultiExitModel,
    loader: Iterable[Any],
    *,
    points: int = 15,
    margin: float = 0.3,
    align: bool = True,
    reset_batchnorm: bool = True,
    samples: int = 2000,
    loss: Loss | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> Plane:
    """Losses on the plane through three models, on a grid that holds all of them.

    Arguments and errors are those of :func:`connectivity`; besides:

    Args:
        c: the third model; it and ``b`` are aligned to ``a``.
        points: of each axis; time is points² passes over the samples, twice where statistics are taken anew.
        margin: how far the grid goes beyond the models, in units of ‖B − A‖.

    Raises:
        ArgumentError: as there, or the models lie on one line.
    """
    check("points", points, Annotated[int, Bounds(least=2)])
    check("margin", margin, Annotated[float, Bounds(least=0)])
    _check_options(align, reset_batchnorm, samples, loss, seed)
    check_alike(a, b)
    check_alike(a, c, "c")
    with Ends.met(a, [b, c], loader, align, samples, loss, seed) as ends:
        across, up = coordinates(ends)
        x = np.linspace(min(0.0, across) - margin, max(1.0, across) + margin, points)
        y = np.linspace(-margin, up + margin, points)
        losses, objective = np.zeros((points, points, len(a.exits))), np.zeros((points, points))
        places = [(i, j) for i in range(points) for j in range(points)]
        for i, j in tracked(places, "plane", show_progress):
            of_c = float(y[j] / up)
            of_b = float(x[i] - of_c * across)
            found = ends.scores((1 - of_b - of_c, of_b, of_c), reset_batchnorm, f"x={x[i]:.3g}, y={y[j]:.3g}")
            losses[i, j], objective[i, j] = found.loss, found.objective
    return Plane(
        x=x,
        y=y,
        loss=losses,
        objective=objective,
        places=np.array([[0.0, 0.0], [1.0, 0.0], [across, up]]),
        distance_before=np.array(ends.before),
        distance=np.array(ends.after),
        **ends.settings(reset_batchnorm),
    )


def _barrier(line: Array, values: Array) -> Array:
    """(E,): the most by which values (L, E) exceed the straight line between their ends."""
    straight = (1 - line[:, None]) * values[0] + line[:, None] * values[-1]
    excess: Array = np.maximum((values - straight).max(0), 0.0)
    return excess
