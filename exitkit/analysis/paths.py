"""Loss on the straight path between two models, and on the plane through three (Kubaty et al., section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np

from exitkit.analysis.between import Ends, coordinates
from exitkit.analysis.measurement import Array
from exitkit.analysis.path_results import Connectivity, Plane
from exitkit.analysis.permutations.matching import check_alike
from exitkit.analysis.samples import tracked
from exitkit.common.checks import Bounds, Count, Index, check
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.losses import Loss


def _check_options(
    align: bool, orders: int, reset_batchnorm: bool, samples: int, loss: Loss | None, seed: int
) -> None:
    """What :func:`connectivity` and :func:`plane` both take."""
    for name, value, allowed in (
        ("align", align, bool),
        ("orders", orders, Count),
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
    orders: int = 3,
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
            Losses and errors are of those that have a label, errors against the likeliest class of soft labels.
        points: values of λ, from 0 to 1.
        align: permute the hidden units of ``b`` to fit ``a`` first, see :func:`exitkit.analysis.align`.
        orders: how many random orders of the matching are tried, beside the graph's own.
        reset_batchnorm: take BatchNorm's statistics anew at every point, the ends included; without that the middle of a path
            collapses. Other layers, dropout too, stay in eval mode.
        samples: the first of the loader.
        loss: weights of the exits in the objective; by default 1 each. Distillation is left out.
        seed: of the orders of the matching.
        show_progress: draw bars on a terminal, of the matching and of the points.

    Raises:
        ArgumentError: models of different architecture or heads (the first difference is named), no labels, or a loss that is
            not a number (its λ is named).
        NotCapturableError: torch.export cannot follow the model, which aligning needs.
    """
    check("points", points, Annotated[int, Bounds(least=2)])
    _check_options(align, orders, reset_batchnorm, samples, loss, seed)
    check_alike(a, b)
    line = np.linspace(0.0, 1.0, points)
    with Ends.met(a, [b], loader, align, orders, samples, loss, seed, show_progress) as ends:
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
    orders: int = 3,
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
    _check_options(align, orders, reset_batchnorm, samples, loss, seed)
    check_alike(a, b)
    check_alike(a, c, "c")
    with Ends.met(a, [b, c], loader, align, orders, samples, loss, seed, show_progress) as ends:
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
