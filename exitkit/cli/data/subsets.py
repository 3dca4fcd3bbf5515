"""Parts of a data set and other labels for it: classes put together, as many samples of each class, samples without labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split

from exitkit.cli.data.split import Split, generator_of
from exitkit.common.errors import ArgumentError

UNLABELLED = -1


@dataclass(frozen=True)
class Relabelled(Dataset[Any]):
    """(input, label) samples with other labels."""

    dataset: Any
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Any:
        return self.dataset[number][0], self.labels[number]


def labels_of(samples: Any) -> list[Any]:
    """The label of every sample; none is loaded for it where the data set keeps its labels in a list."""
    if isinstance(samples, Subset):
        labels = labels_of(samples.dataset)
        return [labels[index] for index in samples.indices]
    for name in ("labels", "targets", "_labels"):
        kept = getattr(samples, name, None)
        if kept is not None and len(kept) == len(samples):
            return torch.as_tensor(kept).tolist()
    return [samples[index][1] for index in range(len(samples))]


def regrouped(split: Split, groups: Sequence[Sequence[int]]) -> Split:
    """The samples whose class is in a group, labelled with the number of that group; others are left out.

    Raises:
        ArgumentError: groups that are none, a class in two of them, or one that the data have not.
    """
    plain = isinstance(groups, list) and all(isinstance(group, list) and group for group in groups)
    if not plain or len(groups) < 2 or not all(isinstance(one, int) for group in groups for one in group):
        raise ArgumentError(f"classes = {groups!r} must be two or more lists of classes, such as [[0, 1], [2, 3]]")
    new = {old: number for number, group in enumerate(groups) for old in group}
    if len(new) < sum(map(len, groups)):
        raise ArgumentError(f"classes = {groups!r} has a class twice; put each into one group")
    there = set(labels_of(split.train))
    if missing := sorted(set(new) - there):
        raise ArgumentError(f"classes has {missing}, but the training samples have the classes {sorted(there)}")
    train, test = (_with_labels(part, new) for part in (split.train, split.test))
    return replace(split, train=train, test=test, classes=len(groups))


def _with_labels(samples: Any, new: dict[int, int]) -> Dataset[Any]:
    labels = labels_of(samples)
    kept = [index for index, label in enumerate(labels) if label in new]
    return Relabelled(Subset(samples, kept), [new[labels[index]] for index in kept])


def held_out_of(samples: Any, validation: float, seed: int) -> tuple[Any, Any]:
    """Samples to train on and others to validate on, of each class the same share of them (or so many).

    Args:
        samples: with class indices as labels; otherwise drawn without regard to them.
        validation: a share, or from 1 on how many of each class.
        seed: of the draw.

    Raises:
        ArgumentError: one of the two would be empty, or a class has fewer samples.
    """
    if validation >= 1:
        chosen = _drawn(labels_of(samples), int(validation), seed, "validation")
    else:
        chosen = _share(samples, validation, seed)
    kept = set(chosen)
    rest = [index for index in range(len(samples)) if index not in kept]
    if not chosen or not rest:
        raise ArgumentError(
            f"validation = {validation} of {len(samples)} training samples leaves {len(rest)} to train on and {len(chosen)} "
            "to validate on; both need some"
        )
    return Subset(samples, rest), Subset(samples, chosen)


def balanced(samples: Any, per_class: int, unlabelled: int | None, seed: int) -> tuple[Any, Any]:
    """So many samples of each class, and of the others so many of each class without their labels (None without).

    Raises:
        ArgumentError: a class has fewer.
    """
    labels = labels_of(samples)
    chosen = _drawn(labels, per_class, seed, "per_class")
    if unlabelled is None:
        return Subset(samples, chosen), None
    kept = set(chosen)
    rest = [index for index in range(len(samples)) if index not in kept]
    drawn = _drawn([labels[index] for index in rest], unlabelled, seed, "unlabelled")
    return Subset(samples, chosen), Relabelled(
        Subset(samples, [rest[index] for index in drawn]), [UNLABELLED] * len(drawn)
    )


def together(labelled: Any, unlabelled: Any) -> Dataset[Any]:
    """Both, where there are two; a batch may then hold samples of either, so that all labels are plain numbers."""
    if unlabelled is None:
        return labelled  # type: ignore[no-any-return]
    return ConcatDataset([Relabelled(labelled, labels_of(labelled)), unlabelled])


def _by_class(labels: Sequence[Any], seed: int) -> dict[Any, list[int]]:
    """The places of each class, in an order drawn by the seed."""
    found: dict[Any, list[int]] = defaultdict(list)
    for index in torch.randperm(len(labels), generator=generator_of(seed)).tolist():
        found[labels[index]].append(index)
    return dict(sorted(found.items()))


def _drawn(labels: Sequence[Any], number: int, seed: int, option: str) -> list[int]:
    places = _by_class(labels, seed)
    for label, those in places.items():
        if number > len(those):
            raise ArgumentError(
                f"{option} = {number} is more than class {label} has: {len(those)} of the training samples to draw from"
            )
    return sorted(index for those in places.values() for index in those[:number])


def _share(samples: Any, share: float, seed: int) -> list[int]:
    """In all the share, to one sample; of each class too."""
    labels, count = labels_of(samples), int(share * len(samples))
    if any(isinstance(label, float) for label in labels):
        return list(random_split(samples, [len(labels) - count, count], generator=generator_of(seed))[1].indices)
    ranked = [
        ((rank + 0.5) / len(those), index)
        for those in _by_class(labels, seed).values()
        for rank, index in enumerate(those)
    ]
    return sorted(index for _, index in sorted(ranked)[:count])
