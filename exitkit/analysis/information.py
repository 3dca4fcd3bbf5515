"""How much the features of a block tell of the input (Kubaty et al., section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from exitkit.analysis.features import Coordinates, Reading, each_batch
from exitkit.analysis.measurement import Array, Flags, Measurement, Table, joined
from exitkit.common.checks import Count, Index, Positive, check, checked_each
from exitkit.common.errors import ArgumentError
from exitkit.evaluation.plots import labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Noise = Literal["relative", "rms", "fixed"]
Estimator = Literal["noisy", "published"]

SCALES = (0.1, 0.15, 0.25, 0.4, 0.6, 1.0)
SATURATED = 0.95
"""Of log N: an estimate above says only that the noise is too small for so few samples."""

_REFERENCES = 400
"""Of the published estimator: how many points its marginal is made of."""


@dataclass(frozen=True, eq=False)
class Information(Measurement):
    """I(X; Z) in nats at every block, for Z = h(X) + ε with ε ~ N(0, σ² I).

    Attributes:
        names: of the blocks.
        share: (B,) of the backbone's MACs before each.
        exits: (B,) whether an exit reads there.
        scale: (S,) the noise scales c.
        sigma: (S, B) σ.
        estimate: (S, B).
        error: (S, B) its standard error over the samples.
        lower, upper: (S, B) the brackets of Kolchinsky and Tracey (2017), which take no noise sample.
        features: (B,) the columns.
        samples: N; no estimate exceeds log N.
        noise, estimator: see :func:`mutual_information`.
        reading: how maps and tokens became rows.
        seed: of noise and subset.
        note: the settings in words.
    """

    names: tuple[str, ...]
    share: Array
    exits: Flags
    scale: Array
    sigma: Array
    estimate: Array
    error: Array
    lower: Array
    upper: Array
    features: Array
    samples: int
    noise: str
    estimator: str
    reading: str
    seed: int
    note: str

    @property
    def most(self) -> float:
        """log N, the most that the estimator can say."""
        return math.log(self.samples)

    @property
    def saturated(self) -> Flags:
        """(S, B) whether an estimate is too near to log N to mean anything else."""
        return np.asarray(self.estimate > SATURATED * self.most)

    def table(self) -> Table:
        rows: list[tuple[str | float, ...]] = []
        for at, scale in enumerate(self.scale):
            for block, name in enumerate(self.names):
                numbers = (self.sigma, self.lower, self.estimate, self.error, self.upper)
                flag = "saturated" if self.saturated[at, block] else ""
                values = [float(part[at, block]) for part in numbers]
                rows.append((name, float(self.share[block]), float(scale), *values, flag))
        headings = ("block", "share of MACs", "c", "σ", "lower", "I(X; Z)", "±", "upper", "")
        return Table("Mutual information I(X; Z), nats", headings, tuple(rows), self.note)

    def draw(self, axes: Axes) -> None:
        labelled(axes, "share of the backbone's MACs", "I(X; Z), nats")
        for at, scale in enumerate(self.scale):
            color = f"C{at % 10}"
            axes.plot(self.share, self.estimate[at], color=color, marker="o", markersize=3, label=f"c = {scale:g}")
            axes.fill_between(self.share, self.lower[at], self.upper[at], color=color, alpha=0.1, linewidth=0)
        axes.axhspan(SATURATED * self.most, self.most, facecolor="none", edgecolor="0.7", hatch="////", linewidth=0)
        axes.axhline(self.most, color="0.4", linewidth=0.8, label="log N; hatched: saturated")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7)


def mutual_information(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    noise: Noise = "relative",
    scale: float | Sequence[float] = SCALES,
    samples: int = 2000,
    features: int | None = 2000,
    reading: Reading = "flat",
    estimator: Estimator = "noisy",
    seed: int = 0,
    show_progress: bool = True,
) -> Information:
    """How much every block's output, with noise, tells of the input, in eval mode.

    A deterministic network has infinite I(X; Z), so noise is added, and its size decides the number: the whole curve over
    ``scale`` is the result. With z_i = h(x_i) + σ n_i,
    Î = mean_i [−‖z_i − h_i‖²/2σ² − log (1/N) Σ_j exp(−‖z_i − h_j‖²/2σ²)], the own term j = i included, so that in the mean
    0 ≤ Î ≤ log N. Comparisons of models need the same samples; across widths they are orderings only.

    Args:
        model: with exits or without; blocks are those of the backbone.
        loader: as for :class:`exitkit.Trainer`, without augmentation; labels are not read.
        noise: σ is ``scale`` times the median distance of two samples (``"relative"``), times the root mean square of a
            coordinate's deviation (``"rms"``, which saturates where there are many features), or itself (``"fixed"``, as in
            the paper's words; then activations of another size have another result).
        scale: one, or several.
        samples: N, at least 10.
        features: of a block with more, a random subset of so many; None for all.
        reading: as for :func:`numerical_rank`, without ``"positions"``.
        estimator: ``"published"`` is that of the paper's source (Kawaguchi et al. 2023), for comparison: 400 reference points,
            the evaluation point without noise, and in the conditional term one coordinate's log-density alone, which adds
            (d − 1)/2 · log 2πσ² to the result.
        seed: of noise and subset.
        show_progress: draw a bar on a terminal.

    Raises:
        ArgumentError: an empty loader, fewer than 10 samples, features that are not finite, inputs of several sizes.

    Memory is N times all features looked at, and a few N² doubles.
    """
    for name, value, allowed in (
        ("noise", noise, Noise),
        ("samples", samples, Count),
        ("features", features, Count | None),
        ("reading", reading, Literal["flat", "pooled"]),
        ("estimator", estimator, Estimator),
        ("seed", seed, Index),
    ):
        check(name, value, allowed)
    scales = checked_each("scale", [scale] if isinstance(scale, float | int) else scale, Positive, "such as 0.25")
    if not scales:
        raise ArgumentError("scale=[] is empty; give at least one, such as 0.25")
    coordinates = Coordinates(features, seed, reading)
    blocks, batches = each_batch(model, loader, samples, coordinates, show_progress)
    gathered = [
        torch.cat(parts) for parts in zip(*([part.float() for part in rows] for _, rows in batches), strict=True)
    ]
    number = len(gathered[0])
    if number < 10:
        raise ArgumentError(f"samples: {number} came, and the estimate needs at least 10; give more data or samples=")
    measure = _noisy if estimator == "noisy" else _published
    columns = [
        measure(_finite(rows, name).double(), scales, noise, seed)
        for rows, name in zip(gathered, blocks.names, strict=True)
    ]
    sigma, estimate, error, lower, upper = (np.stack([column[at] for column in columns], axis=1) for at in range(5))
    kinds = {
        "relative": "σ = c × median distance",
        "rms": "σ = c × root mean square of a coordinate",
        "fixed": "σ = c",
    }
    return Information(
        names=blocks.names,
        share=np.array(blocks.share),
        exits=np.array(blocks.exits),
        scale=np.array(scales, dtype=np.float64),
        sigma=sigma,
        estimate=estimate,
        error=error,
        lower=lower,
        upper=upper,
        features=np.array([float(rows.shape[1]) for rows in gathered]),
        samples=number,
        noise=noise,
        estimator=estimator,
        reading=reading,
        seed=seed,
        note=joined(
            (
                f"N = {number:,}, log N = {math.log(number):.2f}",
                kinds[noise],
                f"estimator: {estimator}",
                str(coordinates),
            )
        ),
    )


def _finite(rows: Tensor, name: str) -> Tensor:
    if not bool(rows.isfinite().all()):
        raise ArgumentError(f"the features at {name!r} are not finite; check weights and inputs (normalised? NaN?)")
    return rows


Estimates = tuple[Array, Array, Array, Array, Array]
"""At every scale: σ, the estimate, its standard error, and the lower and upper bracket."""


def _noisy(rows: Tensor, scales: Sequence[float], noise: Noise, seed: int) -> Estimates:
    """The estimator with the own term; all scales from one matrix of distances and one of projections."""
    centred = rows - rows.mean(0)
    squares = _squared_distances(centred)
    drawn = torch.randn(centred.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    along = drawn @ centred.T
    projected = along.diagonal()[:, None] - along  # n_i · (h_i − h_j)
    results = []
    for sigma in _sigmas(centred, squares, scales, noise):
        exponents = -(squares + 2 * sigma * projected) / (
            2 * sigma**2
        )  # the common −‖n_i‖²/2 is left out on both sides
        each = -_log_mean_exp(exponents)
        upper, lower = (-_log_mean_exp(-squares / (width * sigma**2)).mean() for width in (2, 8))
        error = each.std() / math.sqrt(len(rows))
        results.append([sigma, float(each.mean()), float(error), float(lower), float(upper)])
    return tuple(np.array(results).T)


def _published(rows: Tensor, scales: Sequence[float], noise: Noise, seed: int) -> Estimates:
    """As Kawaguchi et al. compute it; there are no brackets."""
    centred = rows - rows.mean(0)
    squares = _squared_distances(centred)
    chosen = torch.randint(len(rows), (_REFERENCES,), generator=torch.Generator().manual_seed(seed))
    width = rows.shape[1]
    results = []
    for sigma in _sigmas(centred, squares, scales, noise):
        constant = 0.5 * math.log(2 * math.pi * sigma**2)
        marginal = _log_mean_exp(-squares[:, chosen] / (2 * sigma**2)) - width * constant
        each = -constant - marginal
        results.append([sigma, float(each.mean()), float(each.std() / math.sqrt(len(rows))), math.nan, math.nan])
    return tuple(np.array(results).T)


def _sigmas(centred: Tensor, squares: Tensor, scales: Sequence[float], noise: Noise) -> list[float]:
    """σ at every scale; where all samples are alike any σ gives 0, and the scale itself is taken."""
    if noise == "fixed":
        return list(scales)
    if noise == "rms":
        unit = float(centred.square().mean().sqrt())
    else:
        above = torch.triu_indices(len(squares), len(squares), 1)
        unit = float(squares[above[0], above[1]].median().sqrt())
    return [scale * (unit or 1.0) for scale in scales]


def _squared_distances(centred: Tensor) -> Tensor:
    products = centred @ centred.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0)
    return distances.fill_diagonal_(0)


def _log_mean_exp(exponents: Tensor) -> Tensor:
    return exponents.logsumexp(1) - math.log(exponents.shape[1])
