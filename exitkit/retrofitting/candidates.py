"""Candidates: every boundary with every head that leaves something to save, as the exits of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.exits.classifiers import Head, HeadSpec, InternalClassifier
from exitkit.exits.factory import HeadMaker
from exitkit.methods.presets import SDN
from exitkit.multi_exit.assembly import Parts
from exitkit.multi_exit.cost import ExitSpec, head_macs
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.boundaries import Anatomy, Boundary, find_boundaries
from exitkit.surgery.capturing import Capture
from exitkit.surgery.partition import partition_at
from exitkit.surgery.placement import place
from exitkit.surgery.replace_classifier import outputs_of
from exitkit.surgery.verification import verify

Effort = Literal["quick", "standard", "thorough"]
HEADS = ("1L", "2L-256", "strided", "tail", "branch-1", "branch-2", "branch-3")
"""From the cheapest to the dearest: pooling alone, a convolution, copies of the backbone's own layers."""

_DEAREST = 0.75
"""An answer that costs more than this share of the backbone leaves too little to save."""

_COARSE = (0.08, 0.2, 0.4, 0.6)
_FINE = (0.04, 0.08, 0.13, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Grid:
    """Where boundaries are looked for, as shares of the backbone's cost: closer together early, where more is saved.

    Attributes:
        light: for heads that shrink their feature first, which learn from a cache.
        heavy: for the others, which are dear to train.
    """

    light: tuple[float, ...]
    heavy: tuple[float, ...]


GRIDS: dict[Effort, Grid] = {
    "quick": Grid(_COARSE, _COARSE[::2]),
    "standard": Grid(_FINE, _COARSE),
    "thorough": Grid(_FINE, _FINE),
}


def is_light(head: str) -> bool:
    """Whether a head pools its feature before anything learns, so that a cache of it is small."""
    return HeadSpec.parse(head).kind in ("auto", "linear")


@dataclass(frozen=True)
class Place:
    """One candidate before it is trained.

    Attributes:
        boundary: where its head reads.
        head: what kind of head it is.
        macs: of the head, per sample.
        given: the head as it was asked for, by its name or as a function, so that it can be made again.
    """

    boundary: Boundary
    head: str
    macs: int
    given: Head

    @property
    def name(self) -> str:
        return f"{self.head} after {self.boundary.name}"


def propose(
    captured: Capture, heads: Sequence[Head] | None, boundaries: Sequence[str] | None, grid: Grid, seed: int
) -> tuple[MultiExitModel, tuple[Place, ...]]:
    """All candidates, untrained, as the independent exits of one model on the captured backbone, and what they are.

    Args:
        captured: the backbone; nothing of it changes.
        heads: their kinds, names or functions; by default :data:`HEADS`. One that a boundary cannot have is left out there,
            and one that none can have is refused if it was asked for.
        boundaries: names; by default the blocks nearest to the shares of ``grid``.
        grid: where light and heavy heads are tried.
        seed: the heads' weights follow from it.

    Raises:
        ArgumentError: an unknown head or boundary, or nowhere a head that leaves something to save.
        ExitkitError: what is wrong with a head that was asked for.
    """
    anatomy = find_boundaries(captured)
    given: Any = HEADS if heads is None else heads
    asked = list(given) if isinstance(given, list | tuple) else [given]  # one for all, as attach takes it
    specs = HeadSpec.parse_all(asked)
    if boundaries is None:
        light, heavy = _nearest(anatomy, grid.light), _nearest(anatomy, grid.heavy)
    else:
        light = heavy = place(anatomy, at=boundaries)
    at = [boundary for boundary in anatomy.boundaries if boundary in (*light, *heavy)]
    where = [(head, light if is_light(spec.name) else heavy) for head, spec in zip(asked, specs, strict=True)]
    tried = {boundary: [head for head, places in where if boundary in places] for boundary in at}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrong: dict[str, ExitkitError | None] = {}
        made = list(_made(HeadMaker(captured, anatomy, outputs_of(captured)), tried, wrong))
    impossible = next((error for error in wrong.values() if error is not None), None)
    if heads is not None and impossible is not None:
        raise impossible
    if not made:
        raise ArgumentError(
            f"no head of {[spec.name for spec in specs]} at {[boundary.name for boundary in at]} costs, with the backbone "
            f"before it, less than {_DEAREST:.0%} of the backbone, so no exit could pay; name earlier boundaries= "
            "(exitkit.inspect lists them) or cheaper heads="
        )
    return _model(captured, anatomy, made), tuple(found for found, _, _ in made)


_Made = tuple[Place, InternalClassifier, tuple[int | str, ...]]


def _made(
    maker: HeadMaker, tried: Mapping[Boundary, Sequence[Head]], wrong: dict[str, ExitkitError | None]
) -> Iterator[_Made]:
    """Heads in order of their boundaries; ``wrong`` becomes why no boundary can have a head, None for others."""
    like = next(maker.captured.backbone.parameters())
    for boundary, heads in tried.items():
        seen: set[int] = set()
        for given in heads:
            spec = HeadSpec.parse(given)
            try:
                head, inputs = maker.make(boundary, spec, cascade=False)
            except ExitkitError as error:  # a convolution for tokens, a branch with nothing to leave out
                wrong.setdefault(spec.name, error)
                continue
            wrong[spec.name] = None
            head.to(like.device, like.dtype)
            macs = head_macs(head, boundary, inputs, maker.captured.example, first=True)
            whole = max(maker.anatomy.macs, 1)
            repeated = spec.kind == "branch" and macs in seen  # the same blocks again: there were no more to keep
            if not repeated and (boundary.macs + macs) / whole <= _DEAREST:
                seen.add(macs)
                yield Place(boundary, spec.name, macs, given), head, inputs


def _nearest(anatomy: Anatomy, shares: Sequence[float]) -> tuple[Boundary, ...]:
    """The blocks nearest to some shares of the cost; fewer where blocks are few."""
    inner = [boundary for boundary in anatomy.blocks[:-1] if boundary.layout != "other"]
    inner = inner or [boundary for boundary in anatomy.boundaries if boundary.layout != "other"]
    chosen = {min(inner, key=lambda boundary: abs(boundary.share - share)) for share in shares if inner}
    return tuple(boundary for boundary in inner if boundary in chosen)


def _model(captured: Capture, anatomy: Anatomy, made: Sequence[_Made]) -> MultiExitModel:
    """The candidates as exits, several at one boundary, once the cut backbone was found to equal the backbone."""
    places, heads, inputs = zip(*made, strict=True)
    unique = list({found.boundary.position: found.boundary for found in places}.values())
    points = dict(zip(unique, verify(captured, unique, partition_at(captured, unique)), strict=True))
    specs = tuple(
        ExitSpec(found.boundary, points[found.boundary], reads) for found, reads in zip(places, inputs, strict=True)
    )
    names = tuple(found.head for found in places)
    outputs = outputs_of(captured)
    return MultiExitModel(Parts(captured.backbone, heads, (), specs, anatomy, SDN(), names, outputs, captured.example))
