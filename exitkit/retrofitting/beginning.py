"""The search before its first round: what is asked for, the candidates, their prices, a backbone better than chance."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from exitkit.calibration.risks import as_risk
from exitkit.common.checks import Count, Index, Share, check_fields
from exitkit.common.console import counted, in_minutes
from exitkit.common.errors import ArgumentError
from exitkit.common.hashes import digest
from exitkit.evaluation.collecting import collect
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.exits.classifiers import Head
from exitkit.multi_exit.model import MultiExitModel
from exitkit.retrofitting.candidates import GRIDS, Effort, Place, propose
from exitkit.retrofitting.finishing import EPOCHS
from exitkit.retrofitting.prices import Cost, Prices, in_macs, in_time, kept_prices
from exitkit.retrofitting.rounds import BUDGETS, Search
from exitkit.retrofitting.samples import Data
from exitkit.surgery.capturing import Capture
from exitkit.surgery.fingerprint import weights_digest
from exitkit.training.losses import Distillation, Loss

_STATE = "search.json"


@dataclass(frozen=True)
class Wanted:
    """What is asked for: the arguments of :func:`retrofit` that are plain values."""

    max_drop: Share
    confidence: Share
    cost: Cost
    batch_size: Count
    effort: Effort
    seed: Index
    mixed_precision: Literal["no", "fp16", "bf16"]
    channels_last: bool
    optimize: bool

    def __post_init__(self) -> None:
        check_fields(self)


def search_for(
    wanted: Wanted,
    captured: Capture,
    data: Data,
    heads: Sequence[Head] | None,
    boundaries: Sequence[str] | None,
    folder: Path | None,
    show_progress: bool,
    say: Callable[[str], None],
) -> Search:
    """The search, ready for its first round.

    Raises:
        ArgumentError: heads or boundaries that are not there, a backbone no better than chance, a folder of another search.
    """
    pool, places = propose(captured, heads, boundaries, GRIDS[wanted.effort], wanted.seed)
    settings = {**asdict(wanted), "backbone": weights_digest(captured.backbone), "samples": data.split.samples}
    settings |= {"calibration": digest(data.hashes.sort().values), "candidates": [place.name for place in places]}
    prices = kept_prices(
        None if folder is None else folder / _STATE, settings, lambda: _measured(wanted, pool, places)
    )
    labelled, seconds = _looked_at(pool, data)
    _announce(wanted, places, data.split.samples, seconds, say)
    return Search(
        pool,
        places,
        prices,
        data.split,
        as_risk("accuracy_drop" if labelled else "disagreement"),
        data.limit(wanted.max_drop),
        labelled,
        _training(wanted, labelled, show_progress),
        wanted.effort,
        folder,
        say,
    )


def _looked_at(pool: MultiExitModel, data: Data) -> tuple[bool, float]:
    """Whether the samples to choose on have labels, and what the backbone takes for one, in seconds."""
    started = time.monotonic()
    backbone = pool.prune_exits(set(range(1, len(pool.boundaries)))) if len(pool.boundaries) > 1 else pool
    outputs = collect(backbone, data.split.search)
    if outputs.labels is not None:
        _check_backbone(outputs)
    return outputs.labels is not None, (time.monotonic() - started) / len(outputs)


def _announce(
    wanted: Wanted, places: Sequence[Place], samples: int, seconds: float, say: Callable[[str], None]
) -> None:
    """Say what the search will take, where the backbone takes so many seconds for a sample."""
    epochs, boundaries = BUDGETS[wanted.effort], len({place.boundary.position for place in places})
    found = f"{counted(len(places), 'candidate')} at {counted(boundaries, 'boundary', 'boundaries')}"
    say(
        f"{found}. The search costs at most {epochs:.0f} epochs of the backbone's forward over {samples:,} samples, here "
        f"{in_minutes(seconds * samples * epochs / 60, 'about ')}; then at most {EPOCHS[wanted.effort]} epochs of the chosen "
        "exits"
    )


def _training(wanted: Wanted, labelled: bool, show_progress: bool) -> dict[str, Any]:
    """The trainer's options; without labels exits imitate the backbone."""
    return {
        "loss": Loss() if labelled else Loss(distillation=Distillation(confidence_limit=None, divergence="kl")),
        "seed": wanted.seed,
        "mixed_precision": wanted.mixed_precision,
        "channels_last": wanted.channels_last,
        "show_progress": show_progress,
    }


def _measured(wanted: Wanted, pool: MultiExitModel, places: Sequence[Place]) -> Prices:
    if wanted.cost == "macs":
        return in_macs(pool, places)
    example = pool.example.with_batch(wanted.batch_size)
    return in_time(pool, places, example.spec.batch(example.tensors))


def _check_backbone(outputs: ExitOutputs) -> None:
    """Refuse a backbone that guesses: exits on it would guess too."""
    from scipy.stats import binomtest

    labels = outputs.labels
    assert labels is not None
    most = float(torch.bincount(labels).max()) / len(labels)
    right = int(outputs.correct[:, -1].sum())
    if len(labels.unique()) < 2:
        raise ArgumentError(
            "train_loader has one class in its labels; give samples of all classes, as they come in use"
        )
    if binomtest(right, len(labels), most, alternative="greater").pvalue > 0.05:
        raise ArgumentError(
            f"model is right about {right / len(labels):.1%} of the held-out training samples, and always naming their most "
            f"frequent class about {most:.1%}: it is no better than chance on these data. Check labels, their order and the "
            "preprocessing, or train the model on these classes first"
        )
