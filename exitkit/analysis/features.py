"""What a backbone makes of samples at every block: one row per sample, the same coordinates for every model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exitkit.analysis.samples import backbone_of, in_float32, read_samples, tracked
from exitkit.common.batches import move
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.boundaries import Boundary, find_boundaries
from exitkit.surgery.capturing import capture
from exitkit.surgery.mistakes import explained
from exitkit.surgery.partition import Partition, partition_at
from exitkit.training.left_alone import left_as_found

Reading = Literal["flat", "pooled", "positions"]
"""Of a feature with positions (pixels, tokens): all values as one row, their mean over the positions as one row, or a row for
each position."""


@dataclass(frozen=True)
class Blocks:
    """A backbone's blocks, and how to run it through them.

    Attributes:
        boundaries: where features are read, in order.
        share: of the backbone's MACs before each.
        exits: whether an exit reads there.
    """

    boundaries: tuple[Boundary, ...]
    partition: Partition
    tensors: Callable[[Any], tuple[Tensor, ...]]
    share: tuple[float, ...]
    exits: tuple[bool, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(boundary.name for boundary in self.boundaries)

    def run(self, inputs: Any) -> list[Tensor]:
        """The feature at every block, batch first."""
        return self.partition.run(self.tensors(inputs))[:-1]


def blocks_of(model: nn.Module, inputs: Any) -> Blocks:
    """Every block of a backbone, captured on a batch.

    Raises:
        NotCapturableError: a backbone that cannot be captured or cut.
    """
    captured = capture(backbone_of(model), inputs, "samples of the loader")
    anatomy = find_boundaries(captured)
    boundaries = anatomy.blocks
    read = {boundary.node for boundary in model.boundaries} if isinstance(model, MultiExitModel) else set()
    return Blocks(
        boundaries,
        partition_at(captured, boundaries),
        captured.spec.tensors,
        tuple(boundary.share for boundary in boundaries),
        tuple(boundary.node in read for boundary in boundaries),
    )


@dataclass(frozen=True)
class Coordinates:
    """Which of a block's features are looked at: all, or a random subset that depends on their number and the seed alone."""

    most: int | None
    seed: int
    reading: Reading

    def rows(self, feature: Tensor, boundary: Boundary, samples: int) -> Tensor:
        """(n, d) float64: a row for each sample, or each position of one."""
        rows = _read(feature, boundary, self.reading, samples)
        chosen = self.chosen(rows.shape[1])
        return (rows if chosen is None else rows[:, chosen.to(rows.device)]).double().cpu()

    def chosen(self, width: int) -> Tensor | None:
        """The subset of so many features; None for all."""
        if self.most is None or width <= self.most:
            return None
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.most].sort().values

    def __str__(self) -> str:
        readings = {"flat": "flattened", "pooled": "mean over positions", "positions": "each position a sample"}
        subset = "all features" if self.most is None else f"at most {self.most:,} features, a random subset"
        return f"features {readings[self.reading]}, {subset} (seed {self.seed})"


def _read(feature: Tensor, boundary: Boundary, reading: Reading, samples: int) -> Tensor:
    if reading == "flat" or feature.dim() < 3:
        return feature.reshape(samples, -1)
    channels = {"channels_first": 1, "sequence": 1}.get(boundary.layout, -1)
    tokens = feature.movedim(channels, -1).reshape(samples, -1, feature.shape[channels])
    return tokens.mean(1) if reading == "pooled" else tokens.flatten(0, 1)


def each_batch(
    model: nn.Module, loader: Iterable[Any], samples: int, coordinates: Coordinates, show_progress: bool
) -> tuple[Blocks, Iterator[tuple[int, list[Tensor]]]]:
    """The blocks, and for every batch its size and the rows at each of them, in eval mode, of the loader's first ``samples``.

    Raises:
        ArgumentError: an empty loader, inputs of several sizes where features are flattened.
    """
    backbone_of(model)  # refuses what is no model
    measured = in_float32(model)
    data = read_samples(loader, samples, labelled=False, widen=measured is not model)
    device = next(measured.parameters()).device
    blocks = blocks_of(measured, move(data[0][0], device))

    def rows() -> Iterator[tuple[int, list[Tensor]]]:
        widths: list[int] | None = None
        first = blocks.tensors(data[0][0])
        with left_as_found(backbone_of(measured)), torch.no_grad():
            for inputs, _ in tracked(data, "features", show_progress):
                tensors = blocks.tensors(move(inputs, device))
                with explained(_other_size, tensors, first):
                    features = blocks.partition.run(tensors)[:-1]
                made = [
                    coordinates.rows(feature, boundary, len(tensors[0]))
                    for feature, boundary in zip(features, blocks.boundaries, strict=True)
                ]
                found = [part.shape[1] for part in made]
                if widths not in (None, found):
                    raise ArgumentError(
                        f"the loader's batches give features of {widths} and of {found} values per sample; pad texts to one "
                        "length, or take reading='pooled'"
                    )
                widths = found
                yield len(tensors[0]), made

    return blocks, rows()


def _other_size(tensors: Sequence[Tensor], first: Sequence[Tensor]) -> str | None:
    """What is said of a batch that does not run and is of another size than the loader's first; None of the same size."""
    for tensor, one in zip(tensors, first, strict=True):
        if tensor.shape[1:] != one.shape[1:]:
            return (
                f"the loader's first batch holds inputs of shape {tuple(one.shape)}, a later one of {tuple(tensor.shape)}, "
                "on which the model does not run; give inputs of one size"
            )
    return None
