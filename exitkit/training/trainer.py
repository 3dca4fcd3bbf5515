"""The trainer: heads on a frozen backbone, all in parallel, then the ensemble."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence, Sized
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn import functional as F

from exitkit.batches import check_labels, checked, move, split_batch
from exitkit.errors import ExitkitError, unknown_name
from exitkit.fingerprint import weights_digest
from exitkit.model import MultiExitModel
from exitkit.surgery.calls import call_on
from exitkit.surgery.capture import evaluation_mode
from exitkit.training.checkpoint import load_checkpoint, save_checkpoint
from exitkit.training.ensemble import fit_ensemble
from exitkit.training.progress import Bar, Epoch, progress_bar, write_log
from exitkit.training.regimes import REGIMES, frozen
from exitkit.training.stopping import EarlyStopping

_EPOCHS = 100_003
"""Epochs apart that the seeds of two runs lie, so that run 1 does not repeat run 0's orders one epoch later."""


class Trainer:
    """Train the exits of a multi-exit model.

    Args:
        model: what :func:`exitkit.attach` returned.
        regime: ``"disjoint"``: the backbone is frozen, in eval mode, and not changed in any way.
        epochs: passes over the training set.
        lr: Adam's learning rate (1e-3 in Zero Time Waste, appendix A.1).
        weight_decay: Adam's L2 penalty.
        milestones: epochs after which the rate is divided by ten (the paper: [15] of 50); a cosine to 0 by default.
        patience: stop when no exit's validation accuracy (before the ensemble) improved for so many epochs; the heads of
            the last epoch in which any exit improved are restored (Kubaty et al.). Without it the last epoch's are kept.
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"``, passed to accelerate.
        seed: every epoch is seeded from it, so that a killed run continues to the same weights.
        output_dir: where a checkpoint and a log go after every epoch; nothing is written by default.
        resume: ``"auto"`` continues from the checkpoint in ``output_dir``, ``"never"`` starts again.
        log: ``"csv"`` or ``"tensorboard"``.
        show_progress: draw a progress bar where there is a terminal.

    Raises:
        ExitkitError: an unknown name or a value out of range.
    """

    def __init__(
        self,
        model: MultiExitModel,
        regime: str = "disjoint",
        *,
        epochs: int = 15,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        milestones: Sequence[int] | None = None,
        patience: int | None = None,
        mixed_precision: Literal["no", "fp16", "bf16"] = "no",
        seed: int = 0,
        output_dir: str | Path | None = None,
        resume: Literal["auto", "never"] = "auto",
        log: Literal["csv", "tensorboard"] = "csv",
        show_progress: bool = True,
    ) -> None:
        if not isinstance(model, MultiExitModel):
            raise ExitkitError(f"model is {type(model).__name__}; train what exitkit.attach(model) returns")
        for name, value, allowed in (
            ("regime", regime, REGIMES),
            ("mixed_precision", mixed_precision, ("no", "fp16", "bf16")),
            ("resume", resume, ("auto", "never")),
            ("log", log, ("csv", "tensorboard")),
        ):
            if value not in allowed:
                raise unknown_name(name, value, allowed)
        if log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ExitkitError("log='tensorboard' needs TensorBoard: pip install tensorboard")
        for name, real in (("lr", lr), ("weight_decay", weight_decay)):
            if not isinstance(real, int | float):
                raise ExitkitError(f"{name}={real!r} must be a number")
        if not isinstance(seed, int) or seed < 0:
            raise ExitkitError(f"seed={seed!r} must be a whole number of at least 0")
        for name, number in (("epochs", epochs), ("patience", 1 if patience is None else patience)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ExitkitError(f"{name}={number!r} must be a whole number greater than 0")
        if not 0 < lr < float("inf") or not 0 <= weight_decay < float("inf"):
            raise ExitkitError(f"lr={lr!r} must be greater than 0, and weight_decay={weight_decay!r} at least 0")
        self.model = model
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.milestones = None if milestones is None else list(milestones)
        self.seed = seed
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.resume = resume
        self.log = log
        self.show_progress = show_progress
        self.patience = patience
        self.mixed_precision = mixed_precision
        self.history: list[Epoch] = []
        self.stopping = EarlyStopping(patience)

    def fit(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None) -> list[Epoch]:
        """Train the heads, then fit the ensemble; the model is changed in place. Returns the record of every epoch.

        Args:
            train_loader: yields ``(inputs, labels)`` or dicts with ``labels``.
            val_loader: the same, for per-exit accuracy and early stopping.

        Raises:
            ExitkitError: an empty loader, labels out of range, a loss that is not finite, an unusable checkpoint.
        """
        if self.patience is not None and val_loader is None:
            raise ExitkitError("patience is set, but there is no val_loader to measure improvement on; give one")
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.history, self.stopping = [], EarlyStopping(self.patience)
        self.accelerator = _accelerator(self.mixed_precision)
        self.model.to(self.accelerator.device)
        with frozen(self.model.backbone):
            self._train_heads(train_loader, val_loader)
            if self.model.combiners:
                _seed(train_loader, self.seed * _EPOCHS)
                fit_ensemble(self.model, train_loader)
        return self.history

    def _train_heads(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None) -> None:
        parameters = list(self.model.classifiers.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        scheduler = self._scheduler(optimizer)
        best = self._state()
        settings = self._settings()
        state = self._load(settings, optimizer, scheduler)
        if state is not None:
            best = state["best"]
        prepared = self.accelerator.prepare(optimizer)
        steps = _length(train_loader)
        with progress_bar(None if steps is None else steps * self.epochs, self.show_progress) as bar:
            bar.skip((steps or 0) * len(self.history))
            while len(self.history) < self.epochs and not self.stopping.stop:
                record = self._epoch(train_loader, val_loader, prepared, bar)
                scheduler.step()
                improved = record.accuracy is None or self.stopping.update(record.accuracy[:-1])
                if improved or self.patience is None:
                    best = self._state()
                self.history.append(record)
                bar.epoch(record)
                self._save(settings, optimizer, scheduler, best)
        self.model.classifiers.load_state_dict(best)

    def _epoch(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None, optimizer: Any, bar: Bar) -> Epoch:
        epoch = len(self.history)
        _seed(train_loader, self.seed * _EPOCHS + epoch)
        total, batches = torch.zeros(len(self.model.classifiers)), 0
        for batch in checked(train_loader, "train_loader"):
            losses = self._losses(batch)
            self._check_finite(losses, epoch, batches)
            optimizer.zero_grad()
            self.accelerator.backward(losses.sum())
            optimizer.step()
            total += losses.detach().cpu()
            batches += 1
            bar.step(float(losses.detach().mean()))
        return Epoch(
            epoch, tuple((total / batches).tolist()), None if val_loader is None else self._accuracy(val_loader)
        )

    def _check_finite(self, losses: Tensor, epoch: int, step: int) -> None:
        """Stop before a loss that is not finite reaches the weights."""
        if not bool(losses.isfinite().all()):
            exit_ = int(losses.isfinite().int().argmin())
            raise ExitkitError(
                f"the loss of exit {exit_} is {losses[exit_].item()} in epoch {epoch + 1}, step {step + 1}, at lr={self.lr}; "
                "lower lr, or check the inputs (normalised? NaN?)"
            )

    def _losses(self, batch: Any) -> Tensor:
        """Cross-entropy of each head (M,); their sum trains every head by its own loss alone."""
        inputs, labels = split_batch(batch)
        with self.accelerator.autocast():
            _, heads = call_on(self.model.run_heads, move(inputs, self.accelerator.device))
        targets = check_labels(labels, self.model.num_classes, len(heads[-1])).to(self.accelerator.device)
        return torch.stack([F.cross_entropy(logits.float(), targets) for logits in heads[:-1]])

    def _accuracy(self, loader: Iterable[Any]) -> tuple[float, ...]:
        """Accuracy of every head, the backbone's last."""
        right, samples = torch.zeros(len(self.model.exits)), 0
        with evaluation_mode(self.model), torch.no_grad(), self.accelerator.autocast():
            for batch in checked(loader, "val_loader"):
                inputs, labels = split_batch(batch)
                _, heads = call_on(self.model.run_heads, move(inputs, self.accelerator.device))
                answers = torch.stack([logits.argmax(-1) for logits in heads]).cpu()
                right += (answers == check_labels(labels, self.model.num_classes, answers.shape[1]).cpu()).sum(1)
                samples += answers.shape[1]
        return tuple((right / samples).tolist())

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        if self.milestones is not None:
            return torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)

    def _state(self) -> dict[str, Tensor]:
        return deepcopy(self.model.classifiers.state_dict())

    def _settings(self) -> dict[str, Any]:
        method, backbone = self.model.method, weights_digest(self.model.backbone)
        exits = [boundary.name for boundary in self.model.boundaries]
        parts = {"exits": exits, "method": method.name, "cascade": method.cascade, "backbone": backbone}
        schedule = {
            "epochs": self.epochs,
            "lr": self.lr,
            "milestones": self.milestones,
            "weight_decay": self.weight_decay,
        }
        return {**parts, **schedule, "seed": self.seed, "mixed_precision": self.mixed_precision}

    def _save(self, settings: dict[str, Any], optimizer: Any, scheduler: Any, best: dict[str, Tensor]) -> None:
        if self.output_dir is None:
            return
        write_log(self.output_dir, self.log, self.history)
        state = {
            "classifiers": self.model.classifiers.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "best": best,
            "stopping": self.stopping.state(),
            "history": [(record.epoch, record.loss, record.accuracy) for record in self.history],
        }
        save_checkpoint(self.output_dir, settings, state)

    def _load(self, settings: dict[str, Any], optimizer: Any, scheduler: Any) -> dict[str, Any] | None:
        if self.output_dir is None or self.resume == "never":
            return None
        state = load_checkpoint(self.output_dir, settings)
        if state is not None:
            try:
                self.model.classifiers.load_state_dict(state["classifiers"])
            except RuntimeError as error:
                raise ExitkitError(
                    f"the checkpoint in output_dir={str(self.output_dir)!r} belongs to other heads; use another output_dir"
                ) from error
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            self.stopping.restore(state["stopping"])
            self.history = [Epoch(*record) for record in state["history"]]
        return state


def _seed(loader: Iterable[Any], seed: int) -> None:
    """A seed per epoch instead of stored generator states: initial order, shuffling and augmentation follow from it."""
    set_seed(seed)
    for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
            generator.manual_seed(seed)


def _length(loader: Iterable[Any]) -> int | None:
    """Batches per epoch; None for a loader that cannot know (an iterable data set)."""
    try:
        return len(cast("Sized", loader))
    except TypeError:
        return None


def _accelerator(mixed_precision: str) -> Accelerator:
    """accelerate keeps one precision per process; every fit brings its own, so an earlier one is forgotten first."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed_precision)
