"""Samples in three parts: to learn from, to choose on, and to make the promise on, which nothing before has seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from exitkit.calibration.risk_control import Certifies, certifier, check_count
from exitkit.calibration.risks import Risk, as_risk
from exitkit.common.batches import check_iterable, checked, split_batch
from exitkit.common.errors import ArgumentError
from exitkit.common.hashes import content_hashes
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.surgery.inputs import Example
from exitkit.surgery.mistakes import not_finite

_SHARE = 5
"""One sample (or batch) in so many is held out."""

_MOST = 5_000
"""Samples that are held out at most."""


@dataclass(frozen=True)
class Split:
    """What the search learns from and what it chooses on.

    Attributes:
        train: batches to learn from, in a new order in every pass where the user's loader shuffles.
        search: batches to choose on, in one order.
        samples: how many there are to learn from in a pass.
    """

    train: Iterable[Any]
    search: Iterable[Any]
    samples: int


def held_out(train_loader: Iterable[Any], search_loader: Iterable[Any] | None, seed: int) -> Split:
    """A fifth of the training data (at most 5,000 samples) to choose on, the rest to learn from.

    Samples of a ``DataLoader`` are divided by their numbers, a list of batches by batches. With a ``search_loader`` that is
    what is chosen on, and all training data are learned from.

    Raises:
        ArgumentError: a loader whose samples cannot be divided, or too few of them.
    """
    check_iterable(train_loader, "train_loader")
    if search_loader is not None:
        check_iterable(search_loader, "search_loader")
        return Split(train_loader, search_loader, samples_in(train_loader, "train_loader"))
    if has_numbers(train_loader):
        return _by_number(train_loader, seed)
    if isinstance(train_loader, list | tuple):
        return _by_batch(train_loader)
    kind = type(train_loader.dataset if isinstance(train_loader, DataLoader) else train_loader).__name__
    raise ArgumentError(
        f"train_loader is made of a {kind}, of which no samples can be held out for the search; give a torch DataLoader with "
        "a batch_size over a data set that has a length, a list of batches, or held-out samples as search_loader="
    )


def samples_in(loader: Iterable[Any], name: str) -> int:
    """How many samples a pass has: a data set's length where it is known, else counted in one pass."""
    if has_numbers(loader) and not loader.drop_last:
        return len(loader.sampler)  # type: ignore[arg-type]
    return sum(batch_size_of(batch) for batch in checked(loader, name))


def batch_size_of(batch: Any) -> int:
    """How many samples a batch has.

    Raises:
        ArgumentError: inputs without tensors.
    """
    return len(Example.of(split_batch(batch)[0]).tensors[0])


def part_of(loader: Iterable[Any], share: float) -> Iterable[Any]:
    """About a share of what ``loader`` yields in a pass, the same samples in every pass; all, where they cannot be told."""
    if share >= 1:
        return loader
    if has_numbers(loader):
        size = int(loader.batch_size or 1)
        rows = max(size, int(share * len(loader.dataset)) // size * size)  # type: ignore[arg-type]
        return loader if rows >= len(loader.dataset) else _over(loader, range(rows), shuffle=True)  # type: ignore[arg-type]
    if isinstance(loader, list | tuple):
        return loader[: max(1, int(share * len(loader)))]
    return loader


def has_numbers(loader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    """Whether samples can be told by their numbers."""
    if not isinstance(loader, DataLoader):
        return False
    plain = loader.batch_size is not None and hasattr(loader.dataset, "__len__")
    return plain and not isinstance(loader.dataset, IterableDataset)


def _by_number(loader: DataLoader[Any], seed: int) -> Split:
    count, size = len(loader.dataset), int(loader.batch_size or 1)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    out = min(_MOST, count // _SHARE)
    if (count - out) % size == 1:
        out += 1  # a last batch of one has no statistics for a BatchNorm that learns
    if out < 1 or count - out < 1:
        raise ArgumentError(
            f"train_loader has {count} samples, too few to hold some out for the search; give more, or search_loader="
        )
    train = _over(loader, order[out:], shuffle=True)
    return Split(train, _over(loader, order[:out], shuffle=False), count - out)


def _over(loader: DataLoader[Any], rows: Sequence[int], shuffle: bool) -> DataLoader[Any]:
    """A loader of some rows of a data set, read and collated as ``loader`` does."""
    return DataLoader(
        Subset(loader.dataset, rows),
        batch_size=loader.batch_size,
        shuffle=shuffle,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator() if shuffle else None,  # seeded before every epoch
    )


def _by_batch(batches: Sequence[Any]) -> Split:
    if len(batches) < 2:
        raise ArgumentError(
            f"train_loader is a list of {len(batches)} batch{'' if batches else 'es'}; the search holds out every fifth batch "
            "and needs at least two; give smaller batches, or search_loader="
        )
    batches = list(checked(batches, "train_loader"))
    search = list(batches[:: _SHARE if len(batches) >= _SHARE else 2])
    kept = {id(batch) for batch in search}
    train = [batch for batch in batches if id(batch) not in kept]
    return Split(train, search, samples_in(train, "train_loader"))


@dataclass(frozen=True, eq=False)
class Data:
    """Splits, checked.

    Attributes:
        calibration: the user's loader.
        hashes: of the calibration samples, without those that are among the training data too.
        learned: of the samples that are learned from or chosen on.
        certifies: the test of the promise.
        confidence: of the test of each alternative: of several it is higher than what was asked for, so that the promise
            holds as often for the one that is named, whichever that is.
    """

    split: Split
    calibration: Iterable[Any]
    hashes: Tensor
    learned: Tensor
    labelled: bool
    risk: Risk
    certifies: Certifies
    confidence: float

    @classmethod
    def read(
        cls,
        train_loader: Iterable[Any],
        calibration_loader: Iterable[Any],
        search_loader: Iterable[Any] | None,
        max_drop: float,
        confidence: float,
        seed: int,
        alternatives: int = 0,
    ) -> Data:
        """As the arguments of :func:`exitkit.retrofit`, which names what is refused."""
        split = held_out(train_loader, search_loader, seed)
        labelled, hashes = _labels(calibration_loader)
        risk = as_risk("accuracy_drop" if labelled else "disagreement")
        certifies = certifier("ltt", max_drop, 1 - confidence, binary=True)
        level = (1 - confidence) / max(alternatives, 1)
        strictest = certifier("ltt", max_drop, level, binary=True)
        check_count(len(hashes.unique()), strictest, risk, max_drop)
        learned = torch.cat([content_hashes(split.train), content_hashes(split.search)])
        unseen = hashes[~torch.isin(hashes, learned)]
        if shared := len(hashes) - len(unseen):
            _leave_out(shared, len(hashes), lambda: check_count(len(unseen.unique()), strictest, risk, max_drop))
        return cls(split, calibration_loader, unseen, learned, labelled, risk, certifies, 1 - level)

    def unseen(self, answers: ExitOutputs) -> ExitOutputs:
        """Of answers to the calibration samples those to samples that are not among the training data too."""
        assert answers.hashes is not None
        return answers[~torch.isin(answers.hashes, self.learned)]

    def check_repeatable(self) -> None:
        """Refuse a calibration loader that yields other samples in another pass: alternatives would answer those.

        Raises:
            ArgumentError: it does.
        """
        again = content_hashes(self.calibration)
        if not torch.equal(again[~torch.isin(again, self.learned)].sort().values, self.hashes.sort().values):
            raise ArgumentError(
                "calibration_loader yields other samples in every pass, and alternatives are compared on the same ones; leave "
                "its augmentation out"
            )

    def limit(self, max_drop: float) -> float:
        """The average loss with which the test is passed half of the time: it allows fewer mistakes than ``max_drop``."""
        samples = len(self.hashes)
        allowed = 0
        while allowed < samples and self.certifies(
            (np.arange(samples) <= allowed).astype(np.float64)
        ):  # allowed + 1 losses
            allowed += 1
        return min(max_drop, (allowed + 2 / 3) / samples)  # about the median of so many losses


def _leave_out(shared: int, samples: int, check: Callable[[], None]) -> None:
    """Warn of calibration samples that are among the training data too, or refuse them where too few others are left.

    Raises:
        ArgumentError: ``check``, of the others, raised one.
    """
    told = f"calibration_loader shares {shared} of its {samples} samples with the training data, and a promise made on them "
    try:
        check()
    except ArgumentError as error:
        raise ArgumentError(f"{told}would be broken on new ones; leave them out of one of the two") from error
    warnings.warn(f"{told}would be broken on new ones: they are left out", stacklevel=4)


def _labels(calibration_loader: Iterable[Any]) -> tuple[bool, Tensor]:
    """Whether calibration samples have labels, and their content hashes."""
    labels, hashes = [], []
    for batch in checked(calibration_loader, "calibration_loader"):
        inputs, given = split_batch(batch)
        if (mistake := not_finite(inputs, Tensor.isnan)) is not None:  # now, and not after the search
            raise ArgumentError(f"calibration_loader: {mistake}")
        labels.append(given)
        hashes.append(content_hashes([inputs if isinstance(inputs, Mapping) else (inputs,)]))
    labelled = all(one is not None for one in labels)
    if labelled and len(torch.cat([torch.as_tensor(one).reshape(-1) for one in labels]).unique()) < 2:
        raise ArgumentError(
            "calibration_loader has one class in its labels, so that nothing can be said about telling classes apart; give "
            "samples of all classes, as they come in use"
        )
    return labelled, torch.cat(hashes)
