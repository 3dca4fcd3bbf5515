"""The loss of every exit on a plane of weights around a model (Li et al. 2018; Kubaty et al., appendix B)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from exitkit.analysis.losses import Evaluation, objective_in_words
from exitkit.analysis.measurement import Array, Measurement, Table, exit_names, joined
from exitkit.analysis.samples import check_multi_exit, in_float32, read_samples, tracked
from exitkit.common.checks import Bounds, Count, Index, Positive, check
from exitkit.evaluation.plots import new_figure
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.left_alone import left_as_found
from exitkit.training.losses import Loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import QuadContourSet
    from matplotlib.figure import Figure

Normalisation = Literal["filter", "kubaty"]

LEVELS = np.geomspace(0.02, 20, 19)
"""Of every contour picture, so that models can be compared by their colours."""


@dataclass(frozen=True, eq=False)
class Landscape(Measurement):
    """Losses at θ + xδ + yη.

    Attributes:
        axis: (P,) values of x and of y.
        loss: (P, P, M+1) every exit's, at (x, y).
        objective: (P, P) the weighted sum.
        centre: (M+1,) every exit's loss at θ itself.
        centre_objective: the weighted sum there.
        normalisation: see :func:`landscape`.
        samples: how many the losses are means of.
        seed: of the directions.
        weights: (M+1,) what each exit's loss is multiplied by in the objective.
        reduction, label_smoothing: of the objective, see :class:`exitkit.training.Loss`.
    """

    axis: Array
    loss: Array
    objective: Array
    centre: Array
    centre_objective: float
    normalisation: str
    samples: int
    seed: int
    weights: Array = field(default_factory=lambda: np.zeros(0))
    reduction: str = ""
    label_smoothing: float = 0.0

    def table(self) -> Table:
        """For every exit the loss at the centre, and its mean rise at half and at the whole of the span, on all sides."""
        rows: list[tuple[str | float, ...]] = []
        stacked = np.concatenate([self.loss, self.objective[..., None]], axis=-1)
        centre = np.append(self.centre, self.centre_objective)
        distance = np.hypot(self.axis[:, None], self.axis[None, :])
        step = self.axis[1] - self.axis[0]
        for at, name in enumerate((*exit_names(len(self.centre)), "objective")):
            rises = []
            for radius in (self.axis[-1] / 2, self.axis[-1]):
                ring = abs(distance - radius) <= step / 2
                rises.append(float(stacked[..., at][ring].mean() - centre[at]))
            rows.append((name, float(centre[at]), *rises))
        half, whole = self.axis[-1] / 2, self.axis[-1]
        headings = ("exit", "loss at the centre", f"rise at {half:g}", f"rise at {whole:g}")
        treatment = {
            "filter": "filters scaled to the model's, biases and norms kept (Li et al.)",
            "kubaty": "filters scaled to the model's, every entry of biases and norms to its own size (Kubaty et al.)",
        }[self.normalisation]
        note = joined(
            (
                f"{len(self.axis)} × {len(self.axis)} points in ±{whole:g}, {self.samples:,} samples, eval mode",
                f"{treatment}; directions of seed {self.seed}",
                objective_in_words(self.weights, self.reduction, self.label_smoothing),
            )
        )
        return Table("Loss landscape", headings, tuple(rows), note)

    def draw(self, axes: Axes) -> None:
        exits = len(self.centre)  # so that colours are those of a single loss
        self._contours(axes, self.objective / exits)
        axes.set_title(f"objective / exits, {self.centre_objective / exits:.3f} at the centre", fontsize=8)

    def figure(self) -> Figure:
        exits = len(self.centre)
        columns = min(4, exits + 1)
        rows = -(-(exits + 1) // columns)
        figure = new_figure(2.6 * columns + 0.8, 2.6 * rows + 0.6)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        drawn = None
        for panel, name, values in zip(panels, exit_names(exits), np.moveaxis(self.loss, -1, 0), strict=False):
            drawn = self._contours(panel, values)
            panel.set_title(name, fontsize=8)
        self.draw(panels[exits])
        for panel in panels[exits + 1 :]:
            panel.set_visible(False)
        assert drawn is not None
        figure.colorbar(drawn, ax=list(panels), format="%.2g", label="loss")
        return self.with_note(figure)

    def _contours(self, axes: Axes, values: Array) -> QuadContourSet:
        """The same colours for every exit and model; what is not finite has the colour of the largest losses."""
        from matplotlib.colors import LogNorm

        shown = np.clip(np.nan_to_num(values, nan=np.inf), LEVELS[0], LEVELS[-1]).T
        drawn = axes.contourf(self.axis, self.axis, shown, LEVELS, cmap="viridis", norm=LogNorm())
        axes.contour(self.axis, self.axis, shown, LEVELS, colors="white", linewidths=0.4)
        axes.plot(0, 0, marker="+", color="white")
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
        return drawn


def landscape(
    ee: MultiExitModel,
    loader: Iterable[Any],
    *,
    points: int = 21,
    span: float = 1.0,
    samples: int = 2000,
    normalisation: Normalisation = "filter",
    loss: Loss | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> Landscape:
    """Every exit's loss on a plane through the model's weights, spanned by two random directions common to all exits.

    A direction has the shape of all parameters, heads and a frozen backbone included; each of its filters (rows of the first
    axis) has the length of the same filter of the model. Running statistics are the model's own. The weights are never
    written to. Compare models of one architecture only, with the same seed and span.

    Args:
        ee: what :func:`exitkit.attach` returned.
        loader: as for :class:`exitkit.Trainer`; the same samples are taken at every point. Those without a label are left out.
        points: of each axis; an odd number has the model itself among them.
        span: the axes run from −span to span.
        samples: the first of the loader.
        normalisation: ``"filter"``: tensors of one dimension (biases, scales and shifts of norms) stay as they are, as Li et
            al. have it; ``"kubaty"``: each of their entries moves by its own size, as in the code of Kubaty et al., so that
            BatchNorm's scales go from 0 to double.
        loss: weights of the exits in the objective; by default 1 each. Distillation is left out.
        seed: of the directions.
        show_progress: draw a bar on a terminal.

    Raises:
        ArgumentError: no exits, an empty loader, no labels, or labels out of range.

    Time is points² passes over the samples.
    """
    check_multi_exit(ee, "the landscape")
    for name, value, allowed in (
        ("points", points, Annotated[int, Bounds(least=3)]),
        ("span", span, Positive),
        ("samples", samples, Count),
        ("normalisation", normalisation, Normalisation),
        ("loss", loss, Loss | None),
        ("seed", seed, Index),
    ):
        check(name, value, allowed)
    model = in_float32(ee)
    with left_as_found(model):
        evaluation = Evaluation.of(model, read_samples(loader, samples, widen=model is not ee), loss)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        across, up = (directions(model, seed, axis, normalisation) for axis in (0, 1))
        axis = np.linspace(-span, span, points)
        axis[abs(axis) < 1e-12 * span] = 0.0  # the model itself, to the bit
        losses = np.zeros((points, points, len(model.exits)))
        objective = np.zeros((points, points))
        places = [(x, y) for x in range(points) for y in range(points)]
        for x, y in tracked(places, "landscape", show_progress):
            moved = {name: value + axis[x] * across[name] + axis[y] * up[name] for name, value in weights.items()}
            found = evaluation.scores(model, moved)
            losses[x, y], objective[x, y] = found.loss, found.objective
        centre = evaluation.scores(model)
    return Landscape(
        axis=axis,
        loss=losses,
        objective=objective,
        centre=centre.loss,
        centre_objective=centre.objective,
        normalisation=normalisation,
        seed=seed,
        **evaluation.settings(),
    )


def directions(model: nn.Module, seed: int, axis: int, normalisation: Normalisation) -> dict[str, Tensor]:
    """A random direction for every parameter by name, each filter as long as the parameter's."""
    generator = torch.Generator().manual_seed(2 * seed + axis)
    made = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        if weight.dim() > 1:
            filters = tuple(range(1, weight.dim()))
            length = noise.square().sum(filters, keepdim=True).sqrt()
            made[name] = noise * weight.square().sum(filters, keepdim=True).sqrt() / length
        elif normalisation == "filter":
            made[name] = torch.zeros_like(weight)
        else:
            made[name] = noise.sign() * weight.abs()
    return made
