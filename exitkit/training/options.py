"""What a run is asked for, checked before anything is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from exitkit.common.errors import ArgumentError, ExitkitError, unknown_name
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.losses import Loss, check_loss
from exitkit.training.regimes import Phase, epochs_of, phases_of
from exitkit.training.schedules import Schedule, check_schedule


@dataclass(eq=False)
class Options:
    """The arguments of :class:`exitkit.Trainer`, where each is explained.

    Attributes:
        phases: those of the regime.
        lengths: the epochs of each.
        directory: ``output_dir`` as a path.
        optimizer_name: the optimiser's type and what it was given, for a checkpoint to compare.

    Raises:
        ExitkitError: an unknown name, a value out of range, or options that contradict each other.
    """

    model: MultiExitModel
    regime: str | Sequence[Phase] = "disjoint"
    _: KW_ONLY
    epochs: int = 15
    lr: float = 1e-3
    backbone_lr: float | None = None
    weight_decay: float = 0.0
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.Adam
    milestones: Sequence[int] | None = None
    schedule: Schedule | None = None
    loss: Loss = field(default_factory=Loss)
    patience: int | None = None
    accumulate: int = 1
    max_grad_norm: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    compile: bool = False
    channels_last: bool = False
    gradient_checkpointing: bool = False
    cache: bool = False
    cache_gb: float = 10.0
    seed: int = 0
    output_dir: str | Path | None = None
    resume: Literal["auto", "never"] = "auto"
    log: Literal["csv", "tensorboard"] = "csv"
    show_progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.model, MultiExitModel):
            raise ArgumentError(f"model is {type(self.model).__name__}; train what exitkit.attach(model) returns")
        self._check_names()
        self._check_numbers()
        if self.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ExitkitError("log='tensorboard' needs TensorBoard: pip install tensorboard")
        self.phases = phases_of(self.regime, len(self.model.classifiers), bool(self.model.new_head))
        self.lengths = epochs_of(self.phases, self.epochs)
        if self.backbone_lr is not None and not self.trains_backbone:
            raise ArgumentError(f"backbone_lr={self.backbone_lr!r} is set, but the regime freezes the backbone")
        check_loss(self.loss, self.phases, self.model)
        self._check_cache()
        probe = self.make_optimizer([nn.Parameter(torch.zeros(1))], [])
        self.optimizer_name = _name(probe)
        check_schedule(self.schedule, self.milestones, probe)
        self.directory = None if self.output_dir is None else Path(self.output_dir)

    @property
    def trains_backbone(self) -> bool:
        return any(phase.stages for phase in self.phases)

    @property
    def teacher(self) -> nn.Module | None:
        """The model that teaches the exits, where the loss has one."""
        distillation = self.loss.distillation
        teachers = None if distillation is None else distillation.teachers
        return teachers if isinstance(teachers, nn.Module) else None

    def make_optimizer(self, heads: Sequence[nn.Parameter], backbone: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The user's optimiser, or Adam: the heads at ``lr``, the backbone at ``backbone_lr``."""
        rates = ((heads, self.lr), (backbone, self.lr if self.backbone_lr is None else self.backbone_lr))
        groups = [
            {"params": list(part), "lr": rate, "weight_decay": self.weight_decay} for part, rate in rates if part
        ]
        try:
            optimizer = self.optimizer(groups)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"optimizer= cannot be called with parameter groups ({error}); give its other options by functools.partial, "
                "such as functools.partial(torch.optim.SGD, momentum=0.9)"
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer= returned {type(optimizer).__name__}; give a function from parameter groups to an optimiser, such "
                "as torch.optim.AdamW or functools.partial(torch.optim.SGD, momentum=0.9)"
            )
        return optimizer

    def _check_names(self) -> None:
        for name, value, allowed in (
            ("mixed_precision", self.mixed_precision, ("no", "fp16", "bf16")),
            ("resume", self.resume, ("auto", "never")),
            ("log", self.log, ("csv", "tensorboard")),
        ):
            if value not in allowed:
                raise unknown_name(name, value, allowed)
        for name in ("compile", "channels_last", "gradient_checkpointing", "cache", "show_progress"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.output_dir is not None and not isinstance(self.output_dir, str | Path):
            raise ArgumentError(f"output_dir={self.output_dir!r} must be the path of a folder, or None")
        if not isinstance(self.loss, Loss):
            raise ArgumentError(f"loss={self.loss!r} must be exitkit.training.Loss(...)")
        if not callable(self.optimizer):
            raise ArgumentError(
                f"optimizer= is a {type(self.optimizer).__name__}; give a function that makes one, such as torch.optim.AdamW"
            )

    def _check_cache(self) -> None:
        if not self.cache:
            return
        if self.trains_backbone or any(len(self.model.classifiers) in phase.exits for phase in self.phases):
            raise ArgumentError(
                "cache=True keeps what a frozen backbone says, but here the backbone learns, or its last layer, which attach "
                "replaced; use regime='disjoint' on a backbone with its own classes, or leave cache out"
            )
        if self.teacher is not None:
            raise ArgumentError(
                "cache=True keeps features, and not the inputs that the teacher model reads; use teachers='last', or leave "
                "cache out"
            )

    def _check_numbers(self) -> None:
        optional = (("backbone_lr", self.backbone_lr), ("max_grad_norm", self.max_grad_norm))
        above = (("lr", self.lr), ("cache_gb", self.cache_gb))
        for name, real in (*above, ("weight_decay", self.weight_decay), *optional):
            if real is not None and not isinstance(real, int | float):
                raise ArgumentError(f"{name}={real!r} must be a number")
        for name, real in (*above, *optional):
            if real is not None and not 0 < real < float("inf"):
                raise ArgumentError(f"{name}={real!r} must be greater than 0")
        if not 0 <= self.weight_decay < float("inf"):
            raise ArgumentError(f"weight_decay={self.weight_decay!r} must be at least 0")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ArgumentError(f"seed={self.seed!r} must be a whole number of at least 0")
        milestones = () if self.milestones is None else self.milestones
        if not isinstance(milestones, tuple | list) or any(
            not isinstance(epoch, int) or epoch < 1 for epoch in milestones
        ):
            raise ArgumentError(f"milestones={milestones!r} must be whole numbers of epochs, such as [15]")
        counts = (("epochs", self.epochs), ("patience", self.patience), ("accumulate", self.accumulate))
        for name, number in counts:
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ArgumentError(f"{name}={number!r} must be a whole number greater than 0")


def _name(optimizer: torch.optim.Optimizer) -> str:
    """Its type and what it was given, for a checkpoint to compare."""
    options = ", ".join(f"{name}={value!r}" for name, value in optimizer.defaults.items())
    return f"{type(optimizer).__name__}({options})"
