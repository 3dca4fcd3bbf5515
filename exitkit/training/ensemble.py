"""Fitting the combiners: one pass through the network, then an optimiser on the log-probabilities that it gave."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.common.batches import check_training_labels, checked, move, split_batch
from exitkit.common.checks import Count, NonNegative, Positive, check, check_fields
from exitkit.common.console import tracked
from exitkit.common.errors import ArgumentError, DivergedError, FileError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import evaluation_mode
from exitkit.training.feature_cache.heads_alone import HeadsAlone, call_view

_MEMORY_FLOATS = 200_000_000
"""Log-probabilities that are kept in memory; more go to a file."""
_CHUNK_FLOATS = 10_000_000
_ITERATIONS, _RATE, _BATCH = 100, 5e-4, 512


@dataclass(frozen=True)
class EnsembleFit:
    """How the weights and priors of an ensemble are fitted.

    Attributes:
        optimizer: ``"lbfgs"``, on all samples at once, or ``"sgd"`` (Zero Time Waste, appendix A.1) or ``"adam"`` (its
            published code), on batches in a new order every epoch.
        epochs: passes over the log-probabilities, for L-BFGS the most iterations; 100 by default, the paper has 500.
        penalty: λ of λ · Σ_j (log w_j + log m)², which holds the weights near an even mean of the m members; 0 in the paper.
        lr: of SGD and Adam; the published 5e-4 by default.
        batch_size: of SGD and Adam; the published 512 by default.

    Raises:
        ArgumentError: a value out of range, or a rate or batch size for L-BFGS.
    """

    optimizer: Literal["lbfgs", "sgd", "adam"] = "lbfgs"
    epochs: Count = _ITERATIONS
    penalty: NonNegative = 1e-2
    lr: Positive | None = None
    batch_size: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("lr", "batch_size"):
            if self.optimizer == "lbfgs" and getattr(self, name) is not None:
                raise ArgumentError(
                    f"{name}={getattr(self, name)!r} is for optimizer='sgd' or 'adam'; L-BFGS takes none"
                )


def fit_ensemble(
    model: MultiExitModel, loader: Iterable[Any], fit: EnsembleFit | None = None, *, show_progress: bool = True
) -> list[float]:
    """Fit every combiner's weights and prior to the labels (Zero Time Waste, algorithm 1), in place.

    Best on images that neither the heads nor the backbone were trained on: fitted on what the backbone has memorised, late
    exits become too sure. With a frozen CIFAR-10 ResNet-56, the test log-loss of the exit before the last block was 0.23
    after a fit on 1,000 training images and 0.22 after one on 1,000 that nothing was trained on; with a penalty of 0.0001
    instead of 0.01 it was 0.43 and 0.21.

    Each exit's combiner is fitted by itself, in float64 on the log-probabilities of all samples: up to 800 MB of them are kept
    in memory, more in a temporary file. A combiner that the fit does not improve stays as it was.

    The objective is the cross-entropy plus a penalty that holds the weights near an even mean of the members. Without it they
    grow without bound where the exits make no mistake.

    Labels may be class probabilities (B, C). Samples without a label are left out; where none has one, the backbone's own
    probabilities stand in.

    Args:
        model: what :func:`exitkit.attach` returned.
        loader: as for :meth:`exitkit.Trainer.fit`.
        fit: how; by default L-BFGS with a penalty of 0.01.
        show_progress: on stderr, a bar where there is a terminal, elsewhere a line every ten seconds.

    Returns:
        The cross-entropy of each fitted combiner.

    Raises:
        ArgumentError: not a multi-exit model, an empty loader, or labels that do not fit.
        DivergedError: heads whose answers are not finite.
        FileError: no room for the temporary file.
    """
    check("fit", fit, EnsembleFit | None, "such as exitkit.training.EnsembleFit(optimizer='adam', epochs=500)")
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(f"model is {type(model).__name__}; fit_ensemble takes what exitkit.attach(model) returns")
    return fit_ensemble_on(model, model, loader, lambda part: part, fit or EnsembleFit(), show_progress)


def fit_ensemble_on(
    model: MultiExitModel,
    view: MultiExitModel | HeadsAlone,
    loader: Iterable[Any],
    gather: Callable[[Any], Any],
    fit: EnsembleFit,
    shown: bool = True,
) -> list[float]:
    """:func:`fit_ensemble` on a process's part of the data, where ``gather`` brings all parts together.

    ``view`` is what the loader's batches are for: the model, or its heads alone.
    """
    if not list(model.combiners.parameters()):  # a mean has nothing to fit
        return []
    batches = tracked(checked(loader, "train_loader"), "batches for the ensemble", loader, shown)
    combiners = tracked(enumerate(model.combiners), "ensembles fitted", model.combiners, shown)
    with TemporaryDirectory(prefix="exitkit-", ignore_cleanup_errors=True) as folder:
        log_probs, targets = _answers(model, view, batches, gather, Path(folder) / "log_probs")
        reached = [_fit(combiner, log_probs[:, : m + 1], targets, m, fit) for m, combiner in combiners]
        del log_probs, targets  # before the file goes
    return reached


def penalty(combiner: nn.Module, strength: float) -> Tensor:
    """How far a combiner's weights are from an even mean: strength · Σ_j (log w_j + log m)²."""
    weights = cast("Tensor", combiner.log_weights)
    return strength * (weights + math.log(len(weights))).square().sum()


def _answers(
    model: MultiExitModel,
    view: MultiExitModel | HeadsAlone,
    batches: Iterable[Any],
    gather: Callable[[Any], Any],
    path: Path,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of every head (N, M + 1, C), and class probabilities to learn (N, C)."""
    device = next(model.parameters()).device
    labelled, others = _Rows(path), _Rows(path.with_suffix(".unlabelled"))
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            inputs, labels = split_batch(batch)
            _, heads = call_view(model, view, view.run_heads, move(inputs, device))
            log_probs = torch.stack([F.log_softmax(logits.float(), -1) for logits in heads], 1)
            targets = _targets(labels, model.num_classes, len(log_probs)).to(device)
            log_probs, targets = gather((log_probs, targets))
            rows, has_label = torch.cat([log_probs, targets.unsqueeze(1)], 1), targets.sum(1) > 0
            labelled.add(rows[has_label])
            if not labelled.count:  # otherwise what has no label is left out
                others.add(rows)
    if labelled.count:
        rows = labelled.all()
        return rows[:, :-1], rows[:, -1]
    rows = others.all()
    return rows[:, :-1], rows[:, -2].exp()


class _Rows:
    """Tensors of one shape, one after another: in memory, and in a file once there are many numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[Tensor] = []
        self.shape: tuple[int, ...] = ()
        self.count = 0
        self.spilled = False

    def add(self, rows: Tensor) -> None:
        if not len(rows):
            return
        self.parts.append(rows)
        self.shape = tuple(rows.shape[1:])
        self.count += len(rows)
        if self.spilled or self.count * math.prod(self.shape) > _MEMORY_FLOATS:
            self._spill()

    def all(self) -> Tensor:
        """(N, …); on disk, mapped into memory."""
        if not self.spilled:
            return torch.cat(self.parts)
        size = self.count * math.prod(self.shape)
        return torch.from_file(str(self.path), size=size).view(self.count, *self.shape)

    def _spill(self) -> None:
        try:
            with self.path.open("ab") as file:
                for rows in self.parts:
                    file.write(rows.cpu().contiguous().numpy().data)
        except OSError as error:
            raise FileError(
                f"no room for the log-probabilities of {self.count:,} samples in {str(self.path.parent)!r} "
                f"({error.strerror}); set TMPDIR to a folder with room, or fit on fewer samples"
            ) from error
        self.parts, self.spilled = [], True


def _targets(labels: Any, num_classes: int, batch: int) -> Tensor:
    """Labels as probabilities (batch, C); zeros for a sample without one."""
    if labels is None:
        return torch.zeros(batch, num_classes)
    targets = check_training_labels(labels, num_classes, batch)
    if targets.dim() == 2:
        return targets
    return F.one_hot(targets + 1, num_classes + 1)[:, 1:].float()


def _fit(combiner: nn.Module, log_probs: Tensor, targets: Tensor, exit_: int, fit: EnsembleFit) -> float:
    """Fit a combiner in place; its cross-entropy."""
    before = _objective(combiner, log_probs, targets, fit)
    if not math.isfinite(before):
        members, classes = (len(cast("Tensor", part)) for part in (combiner.log_weights, combiner.log_prior))
        combiner.load_state_dict(type(combiner)(members, classes).state_dict())
        before = _objective(combiner, log_probs, targets, fit)
    if not math.isfinite(before):
        raise DivergedError(f"the answers of the exits up to exit {exit_} are not finite; train their heads again")
    start = copy.deepcopy(combiner.state_dict())
    minimise = _by_lbfgs if fit.optimizer == "lbfgs" else _by_batches
    device = next(combiner.parameters()).device
    fitted = copy.deepcopy(combiner).to("cpu" if device.type == "mps" else device, torch.float64)  # mps has no float64
    with torch.enable_grad():
        minimise(fitted, log_probs, targets, fit)
    combiner.load_state_dict(fitted.state_dict())
    if not _objective(combiner, log_probs, targets, fit) <= before:  # neither is NaN
        combiner.load_state_dict(start)
    return _cross_entropy(combiner, log_probs, targets)


def _by_lbfgs(combiner: nn.Module, log_probs: Tensor, targets: Tensor, fit: EnsembleFit) -> None:
    """In float64: the line search tries weights that overflow in float32."""
    optimizer = torch.optim.LBFGS(combiner.parameters(), max_iter=fit.epochs, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = penalty(combiner, fit.penalty)
        value.backward()
        for some, wanted in _chunks(combiner, log_probs, targets):
            part = F.cross_entropy(combiner(some), wanted, reduction="sum") / len(log_probs)
            part.backward()
            value = value + part
        return value.detach()

    optimizer.step(loss)


def _by_batches(combiner: nn.Module, log_probs: Tensor, targets: Tensor, fit: EnsembleFit) -> None:
    """In an order that is drawn anew every epoch, and the same in every process."""
    make = torch.optim.SGD if fit.optimizer == "sgd" else torch.optim.Adam
    optimizer = make(combiner.parameters(), lr=fit.lr or _RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(fit.epochs):
        for rows in torch.randperm(len(log_probs), generator=generator).split(fit.batch_size or _BATCH):
            some, wanted = _like(combiner, log_probs[rows], targets[rows])
            optimizer.zero_grad()
            (F.cross_entropy(combiner(some), wanted) + penalty(combiner, fit.penalty)).backward()
            optimizer.step()


def _objective(combiner: nn.Module, log_probs: Tensor, targets: Tensor, fit: EnsembleFit) -> float:
    with torch.no_grad():
        return _cross_entropy(combiner, log_probs, targets) + float(penalty(combiner, fit.penalty))


def _cross_entropy(combiner: nn.Module, log_probs: Tensor, targets: Tensor) -> float:
    """Of the combiner as it answers, in its own precision."""
    with torch.no_grad():
        parts = [
            F.cross_entropy(combiner(some), wanted, reduction="sum")
            for some, wanted in _chunks(combiner, log_probs, targets)
        ]
    return float(torch.stack(parts).double().sum()) / len(log_probs)


def _chunks(combiner: nn.Module, log_probs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both, so many at once that their copies take little memory."""
    rows = max(1, _CHUNK_FLOATS // log_probs[0].numel())
    for some, wanted in zip(log_probs.split(rows), targets.split(rows), strict=True):
        yield _like(combiner, some, wanted)


def _like(combiner: nn.Module, log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows on a combiner's device and in its precision; −∞ as a number that its weights can multiply."""
    like = next(combiner.parameters())
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min / 1e6)
    return finite.to(like), targets.to(like)
