"""Which exits' gradients the training step follows (Kubaty et al., section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from exitkit.analysis.measurement import Array, Measurement, Table, exit_names, joined, spread
from exitkit.analysis.samples import check_multi_exit, in_float32, size_of, tracked, widened
from exitkit.common.batches import checked, split_batch
from exitkit.common.checks import Count, Index, check, numbers_in
from exitkit.common.errors import ArgumentError
from exitkit.evaluation.plots import labelled, new_figure
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.distributed import seed_everything
from exitkit.training.freezing import stages_of
from exitkit.training.gradients import dominance_of, gram_on, heads_of, objective_weights, shared_by
from exitkit.training.left_alone import left_as_found, loader_kept
from exitkit.training.losses import Loss
from exitkit.training.objective import Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Parameters = Literal["backbone", "all"]


@dataclass(frozen=True, eq=False)
class GradientDominance(Measurement):
    """How the gradient of every exit's own loss lies to the objective's.

    Attributes:
        gram: (batches, blocks, M+2, M+2) inner products of the gradients. Block b, of M, is what the backbone does between
            exits b−1 and b; with ``parameters="all"`` the heads are one block more, among them what lies behind the last
            internal exit, which only the backbone's own reaches. Rows are the exits, the last the backbone's, and what the
            objective holds beside their weighted sum (distillation, imitation; 0 where there is none).
        weights: (M+1,) α, what each exit's loss is multiplied by.
        dominance: (M+1,) cos(g_i, g), mean over the batches.
        dominance_spread: (M+1,) its standard deviation.
        share: (M+1,) α_i g_i·g / g·g: of what the step does, how much is this exit's. They add up to 1 less the rest's share;
            they may be negative.
        share_spread: (M+1,) its standard deviation.
        ceiling: (M+1,) the most that cos(g_i, g) can be, since g_i is 0 behind exit i.
        conflict: (M+1, M+1) cos(g_i, g_j); a negative entry is what PCGrad calls a conflict.
        by_block: (blocks, M+1) cos(g_i, g) on one block alone; NaN for exits that do not reach it.
        rest_share: the share of what the objective holds beside the exits' own losses.
        parameters: ``"backbone"``: what two or more exits reach; or ``"all"`` with the heads.
        samples: how many there were in all batches.
        seed: of the data's order, augmentation and dropout.
        as_if_unfrozen: whether frozen parameters of the backbone were measured too.
    """

    gram: Array
    weights: Array
    dominance: Array
    dominance_spread: Array
    share: Array
    share_spread: Array
    ceiling: Array
    conflict: Array
    by_block: Array
    rest_share: float
    parameters: str
    samples: int
    seed: int
    as_if_unfrozen: bool = False

    def weighted(self, weights: Sequence[float]) -> GradientDominance:
        """The same gradients under an objective of other weights (M+1,): no further pass is needed.

        Raises:
            ArgumentError: another number of weights, or weights of 0 only.
        """
        given = numbers_in(weights)
        if len(given) != len(self.weights) or not np.isfinite(given).all() or not given.any():
            raise ArgumentError(
                f"weights={weights!r} must be {len(self.weights)} numbers, one per exit, the backbone's last, and not all 0"
            )
        return replace(self, **_numbers(self.gram, given))

    def table(self) -> Table:
        names = exit_names(len(self.weights))
        columns = (self.dominance, self.dominance_spread, self.ceiling, self.share, self.share_spread, self.weights)
        rows = tuple((name, *map(float, values)) for name, *values in zip(names, *columns, strict=True))
        note = joined(
            (
                f"{len(self.gram)} batches, {self.samples} samples, seed {self.seed}",
                f"parameters: {self.parameters}{', as if unfrozen' if self.as_if_unfrozen else ''}",
                "training mode (batch statistics, dropout), mean of the batches' cosines, plain gradients (no optimiser)",
                f"share of the rest of the objective {self.rest_share:.3g}" if self.rest_share else "",
            )
        )
        return Table(
            "Gradient dominance", ("exit", "dominance", "±", "ceiling by depth", "share", "±", "weight"), rows, note
        )

    def draw(self, axes: Axes) -> None:
        labelled(axes, "exit", "cosine with the objective's gradient")
        exits = np.arange(len(self.weights))
        axes.fill_between(exits, self.ceiling, 1.0, color="0.88", linewidth=0, label="out of reach by depth")
        axes.errorbar(exits, self.dominance, self.dominance_spread, marker="o", markersize=4, label="dominance")
        axes.plot(exits, self.share, marker="s", markersize=3, linestyle="--", label="share of the step")
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set_xticks(exits, [*map(str, exits[:-1]), "bb"])
        axes.set_ylim(top=1.02)
        axes.legend(frameon=False, fontsize=7)

    def figure(self) -> Figure:
        figure = new_figure(11, 3.8)
        left, middle, right = figure.subplots(1, 3)
        self.draw(left)
        for axes, values, title in (
            (middle, self.conflict, "cosine of exit with exit"),
            (right, self.by_block, "dominance, block by block"),
        ):
            image = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("exit")
        middle.set_ylabel("exit")
        right.set_ylabel("block of the backbone")
        figure.colorbar(image, ax=[middle, right], shrink=0.8)
        return self.with_note(figure)


def gradient_dominance(
    ee: MultiExitModel,
    loader: Iterable[Any],
    *,
    batches: int = 8,
    parameters: Parameters = "backbone",
    loss: Loss | None = None,
    as_if_unfrozen: bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> GradientDominance:
    """Compare the gradient of every exit's loss with that of the objective, on the parameters that they share.

    In training mode, as a step sees them: with batch statistics, dropout (one mask for all exits) and the loader's own
    augmentation. The model is left bit for bit as it was. One backward pass per exit and batch.

    Args:
        ee: what :func:`exitkit.attach` returned.
        loader: as for :class:`exitkit.Trainer`; give that of the training.
        batches: how many are measured, of which mean and spread are taken.
        parameters: ``"backbone"``: up to the last internal exit, what the exits share; with ``"all"`` the heads count too, the
            backbone's own among them, each of which pulls its exit's cosine up.
        loss: the objective; by default the sum of the exits' losses. Weights that change in training are as at its end.
        as_if_unfrozen: measure on a frozen backbone's parameters too.
        seed: of order, augmentation and dropout.
        show_progress: draw a bar on a terminal.

    Raises:
        ArgumentError: no exits, an empty loader, no labels, no learning parameter that two exits reach (a frozen backbone), or
            a batch of one sample under BatchNorm.
    """
    check_multi_exit(ee, "gradient dominance")
    check("batches", batches, Count)
    check("parameters", parameters, Parameters)
    check("loss", loss, Loss | None)
    check("as_if_unfrozen", as_if_unfrozen, bool)
    check("seed", seed, Index)
    model = in_float32(ee)
    objective = Objective(Loss() if loss is None else loss, len(model.classifiers))
    weights = objective.loss.weights_at(1.0, [boundary.share for boundary in model.boundaries])
    with left_as_found(model), loader_kept(loader):
        blocks = _blocks(model, parameters, as_if_unfrozen)
        model.train()
        seed_everything(loader, seed)
        found = [batch if model is ee else widened(batch) for batch in islice(checked(loader, "loader"), batches)]
        grams = [
            gram_on(model, objective, batch, weights, blocks) for batch in tracked(found, "gradients", show_progress)
        ]
    samples = sum(size_of(split_batch(batch)[0]) for batch in found)
    gram = np.stack([one.numpy() for one in grams])
    numbers = _numbers(gram, np.array(objective_weights(objective, weights)))
    settings: dict[str, Any] = {
        "parameters": parameters,
        "samples": samples,
        "seed": seed,
        "as_if_unfrozen": as_if_unfrozen,
    }
    return GradientDominance(gram=gram, **numbers, **settings)


def _blocks(model: MultiExitModel, parameters: Parameters, as_if_unfrozen: bool) -> list[tuple[nn.Parameter, ...]]:
    """The shared stages, and with ``"all"`` the heads. Frozen parameters are let learn where they are asked for."""
    if as_if_unfrozen:
        model.backbone.requires_grad_(True)
    learns = any(parameter.requires_grad for parameter in model.backbone.parameters())
    stages = stages_of(model) if learns else None
    shared = shared_by(range(len(model.exits)), stages) if stages else []
    if stages is None or not any(shared):
        none = "no parameter of the backbone before the last internal exit " + (
            "exists; attach exits further back"
            if as_if_unfrozen
            else "has requires_grad=True; as_if_unfrozen=True measures what the exits would do to frozen ones"
        )
        raise ArgumentError(f"ee: its exits' gradients share nothing: {none}")
    return [*shared, heads_of(model, stages)] if parameters == "all" else shared


def _numbers(gram: Array, weights: Array) -> dict[str, Any]:
    """All that follows from inner products (batches, blocks, R, R) and weights (R − 1,); R − 2 blocks are the backbone's."""
    exits = len(weights)
    full = torch.from_numpy(np.append(weights, 1.0))
    each = [dominance_of(torch.from_numpy(one), full, exits - 1) for one in gram]
    dominance, share, ceiling = (np.stack([part[at].numpy() for part in each]) for at in range(3))
    return {
        "weights": weights.astype(np.float64),
        "dominance": dominance.mean(0)[:exits],
        "dominance_spread": spread(dominance)[:exits],
        "share": share.mean(0)[:exits],
        "share_spread": spread(share)[:exits],
        "ceiling": ceiling.mean(0)[:exits],
        "conflict": _cosines(gram.sum(1))[:, :exits, :exits].mean(0),
        "by_block": _by_block(gram, full.numpy())[:, :exits],
        "rest_share": float(share.mean(0)[exits]),
    }


def _cosines(gram: Array) -> Array:
    """Of inner products (…, R, R): the cosines."""
    lengths = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines: Array = gram / (lengths[..., :, None] * lengths[..., None, :])
    return cosines


def _by_block(gram: Array, weights: Array) -> Array:
    """(blocks, R): each exit's cosine with the objective's gradient on one block alone, mean over the batches."""
    along = gram @ weights
    square = np.einsum("nbi,i->nb", along, weights)
    lengths = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1) * square[..., None])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines: Array = np.where(lengths > 0, along / lengths, np.nan).mean(0)
    return cosines
