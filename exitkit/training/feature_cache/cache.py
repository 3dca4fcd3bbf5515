"""Computes the features, keeps them in a file, and makes loaders of its rows."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from exitkit.common.batches import check_training_labels, checked, split_batch
from exitkit.common.console import tracked
from exitkit.common.errors import ArgumentError, DivergedError
from exitkit.common.files import replacing
from exitkit.common.hashes import hash_samples
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import evaluation_mode
from exitkit.surgery.fingerprint import weights_digest
from exitkit.surgery.mistakes import not_finite
from exitkit.training.distributed import done_by_main, in_order, own_part, seed_everything
from exitkit.training.feature_cache.heads_alone import HeadsAlone
from exitkit.training.feature_cache.store import Writer, read_store, row_bytes
from exitkit.training.options import Options
from exitkit.training.step import placed

if TYPE_CHECKING:
    from accelerate import Accelerator

_GIGABYTE = 1e9
_LABELS, _LOGITS = "labels", "logits"


class _NotStored(Exception):  # noqa: N818 - it ends in a warning
    """The features cannot be written, for the reason in the message."""


class Data(NamedTuple):
    """What a run learns from: loaders, and what their batches are for (the model, or its heads alone)."""

    view: MultiExitModel | HeadsAlone
    train: Iterable[Any]
    val: Iterable[Any] | None


@contextmanager
def cached(options: Options, accelerator: Accelerator, data: Data) -> Iterator[Data]:
    """The same samples in the same order, as reduced features; ``data`` as it is where there is no room for them.

    They are kept in ``output_dir``, where a later run finds them, or in a temporary folder until the end. Of several processes
    the main one writes them, and each reads its own part of every batch.

    Raises:
        ArgumentError: a loader whose samples have no numbers, or features that differ in shape.
    """
    loaders = {"train": _numbered(data.train, "train_loader")}
    if data.val is not None:
        loaders["val"] = _numbered(data.val, "val_loader")
    with ExitStack() as stack:
        folder = done_by_main(accelerator, lambda _: _folder(options, stack))
        cache = _Cache(options, accelerator, HeadsAlone(options.model))
        rows: dict[str, DataLoader[Any]] = {}
        try:
            for name, loader in loaders.items():
                rows[name] = cache.rows(loader, folder / f"features-{name}.safetensors")
        except _NotStored as reason:
            warnings.warn(f"cache=True, but {reason}; the backbone runs in every epoch", stacklevel=4)
        yield Data(cache.view, rows["train"], rows.get("val")) if rows.keys() == loaders.keys() else data


def _folder(options: Options, stack: ExitStack) -> Path:
    """Where the stores are, without what a run that was killed left half written."""
    folder = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="exitkit-")))
    for leftover in folder.glob(".features-*"):
        leftover.unlink(missing_ok=True)
    return folder


def _numbered(loader: Iterable[Any], name: str) -> DataLoader[Any]:
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
        or not hasattr(loader.dataset, "__len__")
    ):
        kind = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise ArgumentError(
            f"cache=True finds samples by their number, but {name} is made of a {kind}; give a torch DataLoader with a "
            "batch_size over a data set that has a length and an item for every number below it, or leave cache out"
        )
    return loader


@dataclass
class _Cache:
    """The stores of a run, one for each loader.

    Attributes:
        used: bytes of those made or found so far.
    """

    options: Options
    accelerator: Accelerator
    view: HeadsAlone
    used: int = 0

    def rows(self, loader: DataLoader[Any], path: Path) -> DataLoader[Any]:
        """The loader's batches as rows of its store, which is computed where there is none of this content.

        Raises:
            _NotStored: no room, or a process cannot read it.
        """
        from accelerate.utils import gather_object

        key = done_by_main(self.accelerator, lambda alive: self._written(loader, path, alive))
        if isinstance(key, _NotStored):
            raise key
        stored = read_store(path, key)
        if any(gather_object([stored is None])):
            raise _NotStored(f"{str(path)!r} cannot be read back as it was written, or not by every process")
        assert stored is not None
        self.used += path.stat().st_size
        sampler = loader.batch_sampler
        if self.accelerator.num_processes > 1:
            sampler = sampler.batch_sampler  # type: ignore[union-attr]  # of all processes
        rows = DataLoader(_Rows(stored), batch_sampler=sampler, collate_fn=_as_it_is, generator=loader.generator)
        return cast("DataLoader[Any]", own_part(self.accelerator, rows, "the cache"))

    def _written(self, loader: DataLoader[Any], path: Path, alive: Callable[[], object]) -> str | _NotStored:
        """The key of the store at ``path``, written where it is not there; or why it is not."""
        try:
            if path.exists() and read_store(path, key := self._key(loader, alive)) is not None:
                return key
            path.unlink(missing_ok=True)  # so that never two of them take disk
            return self._compute(loader, path, alive)
        except _NotStored as reason:
            return reason

    def _compute(self, loader: DataLoader[Any], path: Path, alive: Callable[[], object]) -> str:
        """Write the store; its key."""
        content, start, rows = self._about(), 0, len(loader.dataset)  # type: ignore[arg-type]
        first: dict[str, Tensor] = {}
        with ExitStack() as stack:
            with _storing(path):
                temporary = stack.enter_context(replacing(path))
            batches, shown = self._in_order(loader), self.options.show_progress
            for batch in tracked(checked(batches, "the loader to cache"), "batches cached", batches, shown):
                alive()
                inputs, labels = self._added(content, batch)
                parts = self._parts(inputs, labels)
                if not first:
                    first = parts
                    self._check_room(rows * row_bytes(first), path.parent)
                    writer = Writer(temporary, first, rows)
                _check_alike(first, parts)
                with _storing(path):
                    writer.write(start, parts)
                start += len(parts[_LOGITS])
            if start != rows:
                raise ArgumentError(
                    f"cache=True: the data set has {rows} samples, but {start} came out of the loader's collate_fn; keep "
                    "all, or leave cache out"
                )
            with _storing(path):
                writer.finish(content.hexdigest())
        return content.hexdigest()

    def _parts(self, inputs: Any, labels: Tensor | None) -> dict[str, Tensor]:
        """A batch's rows: reduced features, the backbone's logits, and labels where there are some."""
        model = self.options.model
        with evaluation_mode(model), torch.no_grad(), self.accelerator.autocast():
            given = placed(inputs, self.accelerator.device, self.options.channels_last)
            (*reduced, logits), _ = self.view.read(model, given)
        if not bool(logits.isfinite().all()) and (mistake := not_finite(given)) is not None:
            raise DivergedError(f"the backbone's answers are not finite: {mistake}")
        parts = {**{f"exit{m}": part for m, part in enumerate(reduced)}, _LOGITS: logits}
        return parts if labels is None else {**parts, _LABELS: labels}

    def _key(self, loader: DataLoader[Any], alive: Callable[[], object]) -> str:
        content = self._about()
        batches = self._in_order(loader)
        for batch in tracked(batches, "batches compared with the cache", shown=self.options.show_progress):
            alive()
            self._added(content, batch)
        return content.hexdigest()

    def _about(self) -> hashlib._Hash:
        """A hash of all that features depend on but the samples."""
        model = self.options.model
        reads = [spec.boundary.name for spec in model.specs]
        precision = (self.options.mixed_precision, str(next(model.backbone.parameters()).dtype))
        about = (weights_digest(model.backbone), reads, [str(part) for part in self.view.reductions], precision)
        return hashlib.sha256(repr(about).encode())

    def _added(self, content: hashlib._Hash, batch: Any) -> tuple[Any, Tensor | None]:
        """A batch's inputs and checked labels, now in the hash too."""
        inputs, labels = split_batch(batch)
        hashes = hash_samples(inputs)
        content.update(hashes.numpy().tobytes())
        if labels is None:
            return inputs, None
        labels = check_training_labels(labels, self.options.model.num_classes, len(hashes))
        content.update(labels.cpu().contiguous().numpy().tobytes())
        return inputs, labels

    def _in_order(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Every sample once, by its number, and augmented alike in every pass and every run of one seed."""
        seed_everything(loader, self.options.seed)
        size = getattr(loader.batch_sampler, "batch_size", None) or 64
        return in_order(loader, loader.dataset, size, loader.num_workers)

    def _check_room(self, size: int, folder: Path) -> None:
        allowed = self.options.cache_gb * _GIGABYTE - self.used
        if size > allowed:
            raise _NotStored(
                f"the features take {size / _GIGABYTE:.3g} GB of disk, and cache_gb leaves {allowed / _GIGABYTE:.3g}"
            )
        if size > (free := shutil.disk_usage(folder).free):
            raise _NotStored(
                f"the features take {size / _GIGABYTE:.3g} GB, and {str(folder)!r} has {free / _GIGABYTE:.3g} free"
            )


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """An error of the file system while the store is written is a lack of room; one of the data set's own is not."""
    try:
        yield
    except OSError as error:
        raise _NotStored(f"{str(path)!r} cannot be written ({error.strerror or error})") from error


class _Rows(Dataset[Any]):
    """A store's rows by their numbers, a batch at once."""

    def __init__(self, stored: dict[str, Tensor]) -> None:
        self.labels = stored.pop(_LABELS, None)
        logits = stored.pop(_LOGITS)
        self.parts = [*(stored[f"exit{m}"] for m in range(len(stored))), logits]

    def __len__(self) -> int:
        return len(self.parts[-1])

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        rows = torch.as_tensor(numbers)
        parts = tuple(part[rows] for part in self.parts)
        return (parts,) if self.labels is None else (parts, self.labels[rows])


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_alike(first: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name in first.keys() | parts.keys():
        was, is_ = (None if name not in batch else tuple(batch[name].shape[1:]) for batch in (first, parts))
        if was != is_ or first[name].dtype != parts[name].dtype:
            raise ArgumentError(
                f"cache=True: {name} has shape {was} per sample in the first batch and {is_} in another; pad all samples to "
                "one length, use head='auto' or '1L', or leave cache out"
            )
