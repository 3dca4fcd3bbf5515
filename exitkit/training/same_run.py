"""What makes two runs the same run: a checkpoint is continued with these settings and these data alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, Subset

from exitkit.common.batches import split_batch
from exitkit.common.hashes import digest
from exitkit.surgery.fingerprint import weights_digest
from exitkit.training.distributed import in_order, length, random_state, seed_everything, set_random_state
from exitkit.training.options import Options
from exitkit.training.schedules import schedule_name

_SAMPLES = 32
_RATES = ("lr", "backbone_lr")


def settings_of(options: Options) -> dict[str, Any]:
    """What must be the same of the model and the options."""
    method, model = options.model.method, options.model
    settings = {
        "exits": [boundary.name for boundary in model.boundaries],
        "method": method.name,
        "cascade": method.cascade,
        "detach": method.detach,
        "past_future": method.past_future,
        "width": method.width,
        "backbone": "trained" if options.trains_backbone else weights_digest(model.backbone, model.new_head),
        "regime": [
            {name: part for name, part in vars(phase).items() if name not in _RATES} for phase in options.phases
        ],
        **{f"{name} of phases": _of_phases(name, options) for name in _RATES},
        "epochs": options.epochs,
        "lr": options.rates.heads,
        "backbone_lr": options.backbone_lr,
        "milestones": None if options.milestones is None else list(options.milestones),
        "schedule": schedule_name(options.schedule),
        "weight_decay": options.rates.weight_decay,
        "optimizer": options.optimizer_name,
        "loss": options.loss.describe(),
        "accumulate": options.accumulate,
        "max_grad_norm": options.max_grad_norm,
        "seed": options.seed,
        "mixed_precision": options.mixed_precision,
    }
    return {name: _plain(value) for name, value in settings.items()}


def _of_phases(rate: str, options: Options) -> list[float | None] | None:
    """A rate of each phase; None where none has one of its own, as in checkpoints that are older than these."""
    rates = [getattr(phase, rate) for phase in options.phases]
    return None if rates == [None] * len(rates) else rates


def _plain(value: Any) -> Any:
    """The same with Python's own numbers: those of numpy cannot be loaded without unpickling code."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def data_of(loader: Iterable[Any] | None, name: str, processes: int = 1) -> dict[str, Any]:
    """What must be the same of a loader: its samples, batch size and length. None for what cannot be known.

    Of a data set with numbered samples, 32 are read, in the order of their numbers; of a sequence of batches, the first one
    is looked at. Of anything else the length alone is known: a pass is not begun just to look. Random generators are left
    where they stand.
    """
    inputs: str | None = None
    labels: str | None = None
    samples: int | None = None
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        samples = length(loader.dataset)
        inputs, labels = _content(loader, samples)
    elif isinstance(loader, Sequence) and len(loader):
        inputs, labels = _digests(loader[0])
    batch = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return {
        f"{name} samples": samples,
        f"{name} batch_size": batch * processes if isinstance(batch, int) else None,
        f"{name} batches": None if loader is None else length(loader),
        f"{name} inputs": inputs,
        f"{name} labels": labels,
    }


def _content(loader: DataLoader[Any], samples: int | None) -> tuple[str | None, str | None]:
    """Digests of inputs and labels of samples all over the data set; None for those that two readings give differently.

    They are read as the loader reads them (in a worker process where it has some), seeded, so that augmentation is alike.
    """
    if not samples:
        return None, None
    numbers = np.linspace(0, samples - 1, min(samples, _SAMPLES)).astype(int).tolist()
    some = in_order(loader, Subset(loader.dataset, numbers), len(numbers), min(1, loader.num_workers))
    before = random_state()
    readings = []
    try:
        for _ in range(2):
            seed_everything([], 0)
            readings.append(_digests(next(iter(some))))
    except Exception:  # a sampler may leave out what cannot be read; training itself raises what matters
        return None, None
    finally:
        set_random_state(before)
    (inputs, labels), again = readings
    return inputs if inputs == again[0] else None, labels if labels == again[1] else None


def _digests(batch: Any) -> tuple[str, str]:
    inputs, labels = split_batch(batch)
    return f"sha256 {digest(inputs)[:16]}", "no labels" if labels is None else f"sha256 {digest(labels)[:16]}"
