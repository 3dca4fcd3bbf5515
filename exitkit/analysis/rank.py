"""How many directions the features of a block fill (Kubaty et al., section 3.3; Masarczyk et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from exitkit.analysis.features import Coordinates, Reading, each_batch
from exitkit.analysis.measurement import Array, Flags, Measurement, Table, draw_by_depth, joined
from exitkit.common.checks import Count, Index, Share, check
from exitkit.common.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["covariance", "singular", "srank", "entropy", "participation"]

_SRANK = 0.99


@dataclass(frozen=True, eq=False)
class Rank(Measurement):
    """The numerical rank of the features at every block.

    Attributes:
        names: of the blocks.
        share: (B,) of the backbone's MACs before each.
        exits: (B,) whether an exit reads there.
        rank: (B,).
        samples: (B,) n, the rows that each number comes from.
        features: (B,) m, the columns.
        spectrum: (B, K) the largest eigenvalues of the covariance, falling, over the first; 0 behind the last.
        kind, tol: the convention, see :func:`numerical_rank`.
        reading: how maps and tokens became rows.
        standardised: whether every feature was divided by its standard deviation.
        seed: of the subset.
        note: the convention in words.
    """

    names: tuple[str, ...]
    share: Array
    exits: Flags
    rank: Array
    samples: Array
    features: Array
    spectrum: Array
    kind: str
    tol: float
    reading: str
    standardised: bool
    seed: int
    note: str

    @property
    def relative(self) -> Array:
        """(B,) rank / min(n − 1, m): 1 says that the number is bounded by the samples or the features, not by the model."""
        return self.rank / np.minimum(self.samples - 1, self.features)

    def table(self) -> Table:
        columns = (self.share, self.rank, self.samples, self.features, self.relative)
        rows = tuple(
            (name, *map(float, values), "exit" if exit_ else "")
            for name, exit_, *values in zip(self.names, self.exits, *columns, strict=True)
        )
        return Table(
            "Numerical rank",
            ("block", "share of MACs", "rank", "n", "m", "rank / min(n−1, m)", ""),
            rows,
            self.note,
        )

    def draw(self, axes: Axes) -> None:
        draw_by_depth(axes, self.share, {self.kind: self.rank}, "share of the backbone's MACs", "numerical rank")
        axes.plot(
            self.share[self.exits],
            self.rank[self.exits],
            linestyle="",
            marker="o",
            markerfacecolor="none",
            markersize=9,
            color="0.3",
            label="an exit reads here",
        )
        axes.plot(
            self.share,
            np.minimum(self.samples - 1, self.features),
            color="0.8",
            linestyle=":",
            label="most there can be",
        )
        axes.set_ylim(bottom=0, top=max(1.15 * self.rank.max(), 1))
        axes.legend(frameon=False, fontsize=7)


def numerical_rank(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: Kind = "covariance",
    tol: float = 1e-3,
    features: int | None = 8000,
    samples: int = 2000,
    reading: Reading = "flat",
    standardise: bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> Rank:
    """The numerical rank of every block's output, in eval mode.

    The definition decides the number by factors, so it stands beside it. ``"covariance"`` is that of Masarczyk et al.: how
    many eigenvalues of the sample covariance exceed ``tol`` times the largest. ``"singular"`` asks the same of the centred
    features' own singular values, which are the square roots. ``"srank"``: how many singular values make up 99% of their sum.
    ``"entropy"``: e to the entropy of the singular values as shares. ``"participation"``: (Σλ)² / Σλ², biased at small n.

    Args:
        model: with exits or without; blocks are those of the backbone.
        loader: as for :class:`exitkit.Trainer`, without augmentation; labels are not read.
        kind: the definition.
        tol: for ``"covariance"`` and ``"singular"``.
        features: of a block with more, a random subset of so many; None for all.
        samples: the rank is at most this less 1.
        reading: ``"flat"`` (all values of a map or of tokens are features), ``"pooled"`` (their mean over positions) or
            ``"positions"`` (each pixel or token is a sample).
        standardise: divide every feature by its standard deviation, so that no loud channel hides the others.
        seed: of the subset.
        show_progress: draw a bar on a terminal.

    Raises:
        ArgumentError: an empty loader, fewer than three samples, features that are not finite, inputs of several sizes.

    Memory is min(n, m)² doubles per block, and n·m where n ≤ m.
    """
    for name, value, allowed in (
        ("kind", kind, Kind),
        ("tol", tol, Share),
        ("features", features, Count | None),
        ("samples", samples, Count),
        ("reading", reading, Reading),
        ("standardise", standardise, bool),
        ("seed", seed, Index),
    ):
        check(name, value, allowed)
    coordinates = Coordinates(features, seed, reading)
    blocks, batches = each_batch(model, loader, samples, coordinates, show_progress)
    sums: list[Moments] = []
    for size, rows in batches:
        sums = sums or [Moments.begun(part, samples * len(part) // size, standardise) for part in rows]
        for moments, part in zip(sums, rows, strict=True):
            moments.add(part)
    spectra = [_spectrum(moments, name) for moments, name in zip(sums, blocks.names, strict=True)]
    threshold = f", threshold {tol:g} of the largest" if kind in ("covariance", "singular") else ""
    return Rank(
        names=blocks.names,
        share=np.array(blocks.share),
        exits=np.array(blocks.exits),
        rank=np.array([rank_of(spectrum, kind, tol) for spectrum in spectra]),
        samples=np.array([float(moments.rows) for moments in sums]),
        features=np.array([float(moments.width) for moments in sums]),
        spectrum=_padded(spectra),
        kind=kind,
        tol=float(tol),
        reading=reading,
        standardised=standardise,
        seed=seed,
        note=joined(
            (
                f"{kind}{threshold}, centred{', standardised' if standardise else ''}, float64",
                str(coordinates),
                "eval mode",
            )
        ),
    )


@dataclass
class Moments:
    """Rows (n, m) of features as they come: kept where there are fewer than features, summed up in float64 otherwise.

    Sums are of the rows less the first batch's mean, so that an offset takes no digits away.
    """

    shift: Tensor
    keeps: bool
    standardise: bool
    rows: int = 0
    kept: list[Tensor] = field(default_factory=list)
    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    products: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @classmethod
    def begun(cls, first: Tensor, most: int, standardise: bool) -> Moments:
        """For at most ``most`` rows, positions each counted, that begin with ``first``."""
        return cls(first.mean(0), most <= first.shape[1], standardise)

    @property
    def width(self) -> int:
        return len(self.shift)

    def add(self, rows: Tensor) -> None:
        self.rows += len(rows)
        centred = rows - self.shift
        if self.keeps:
            self.kept.append(centred.float())
            return
        if not len(self.total):
            self.total = torch.zeros(self.width, dtype=torch.float64)
            self.products = torch.zeros(self.width, self.width, dtype=torch.float64)
        self.total += centred.sum(0)
        self.products.addmm_(centred.T, centred)

    def covariance(self) -> Tensor:
        """Of the features (m, m), or the matrix of the samples (n, n), which has the same eigenvalues but for zeros."""
        if self.keeps:
            centred = torch.cat(self.kept).double()
            centred -= centred.mean(0)
            if self.standardise:
                centred /= _nonzero(centred.square().mean(0).sqrt())
            return centred @ centred.T / (self.rows - 1)
        mean = self.total / self.rows
        matrix = (self.products - self.rows * torch.outer(mean, mean)) / (self.rows - 1)
        if self.standardise:
            deviation = _nonzero(matrix.diagonal().clamp(min=0).sqrt())
            matrix /= torch.outer(deviation, deviation)
        return matrix


def _nonzero(deviation: Tensor) -> Tensor:
    """A feature that never changes stays as it is."""
    return torch.where(deviation > 0, deviation, 1.0)


def _spectrum(moments: Moments, name: str) -> Array:
    """Eigenvalues of the covariance, falling, at least 0."""
    if moments.rows < 3:
        raise ArgumentError(f"samples: {moments.rows} came, and a rank needs at least 3; give more data or samples=")
    matrix = moments.covariance()
    if not bool(matrix.isfinite().all()):
        raise ArgumentError(f"the features at {name!r} are not finite; check weights and inputs (normalised? NaN?)")
    values = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)
    spectrum: Array = values[: min(moments.rows - 1, moments.width)].numpy()
    return spectrum


def rank_of(eigenvalues: Array, kind: Kind = "covariance", tol: float = 1e-3) -> float:
    """The rank that a covariance's eigenvalues, falling, amount to; 0 where all are 0."""
    if not eigenvalues[0] > 0:
        return 0.0
    if kind == "covariance":
        return float((eigenvalues > tol * eigenvalues[0]).sum())
    singular = np.sqrt(eigenvalues)
    if kind == "singular":
        return float((singular > tol * singular[0]).sum())
    if kind == "participation":
        return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
    shares = singular / singular.sum()
    if kind == "srank":
        return float(np.searchsorted(shares.cumsum(), _SRANK) + 1)
    positive = shares[shares > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _padded(spectra: list[Array]) -> Array:
    width = max(map(len, spectra))
    padded = np.zeros((len(spectra), width))
    for row, values in zip(padded, spectra, strict=True):
        row[: len(values)] = values / (values[0] or 1.0)
    return padded
