"""The options of a run, checked before anything is trained."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from exitkit.common.checks import Count, Index, NonNegative, Positive, check, check_fields
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.ensemble import EnsembleFit
from exitkit.training.losses import Loss, check_loss
from exitkit.training.rates import MakeOptimizer, Rates, rates_for
from exitkit.training.regimes import Phase, epochs_of, phases_of
from exitkit.training.schedules import Schedule, check_schedule


@dataclass(eq=False)
class Options:
    """The arguments of :class:`exitkit.Trainer`, where each is explained.

    Attributes:
        phases: those of the regime.
        lengths: the epochs of each.
        rates: the optimiser's kind, and the learning rate of each kind of part, in a phase without rates of its own.
        directory: ``output_dir`` as a path.
        optimizer_name: the optimiser's type and what it was given, for a checkpoint to compare.

    Raises:
        ArgumentError: an unknown name, a value out of range, or options that contradict each other.
        ExitkitError: TensorBoard is asked for and not installed.
    """

    model: MultiExitModel
    regime: str | Sequence[Phase] = "disjoint"
    _: KW_ONLY
    epochs: Count = 15
    lr: Positive | None = None
    backbone_lr: Positive | None = None
    weight_decay: NonNegative | None = None
    optimizer: MakeOptimizer | None = None
    milestones: Sequence[int] | None = None
    schedule: Schedule | None = None
    loss: Loss = field(default_factory=Loss)
    ensemble_fit: EnsembleFit = field(default_factory=EnsembleFit)
    ensemble_on: Literal["validation", "train"] | None = None
    patience: Count | None = None
    validate_steps: Count | None = None
    accumulate: Count = 1
    max_grad_norm: Positive | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    compile: bool = False
    channels_last: bool = False
    gradient_checkpointing: bool = False
    cache: bool = False
    cache_gb: Positive = 10.0
    seed: Index = 0
    output_dir: str | Path | None = None
    resume: Literal["auto", "never"] = "auto"
    log: Literal["csv", "tensorboard"] = "csv"
    analyse: Literal["gradient_dominance", "first_exit"] | None = None
    analyse_every: Count = 1
    show_progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.model, MultiExitModel):
            raise ArgumentError(f"model is {type(self.model).__name__}; train what exitkit.attach(model) returns")
        check("loss", self.loss, Loss, "give Loss(distillation=Distillation()), for one")
        check_fields(self)
        for epoch in self._milestones():
            check("milestones", epoch, Count, "give epochs, such as [15]")
        if self.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ExitkitError("log='tensorboard' needs TensorBoard: pip install tensorboard")
        self.phases = phases_of(self.regime, len(self.model.classifiers), bool(self.model.new_head))
        self.lengths = epochs_of(self.phases, self.epochs)
        if late := [int(epoch) for epoch in self._milestones() if epoch > max(self.lengths)]:
            warnings.warn(
                f"milestones {late} never come: no phase has more than {counted(max(self.lengths), 'epoch')}; give earlier "
                "ones, or milestones=[] for a rate that stays as it is",
                stacklevel=3,
            )
        if self.backbone_lr is not None and not self.trains_backbone:
            raise ArgumentError(f"backbone_lr={self.backbone_lr!r} is set, but the regime freezes the backbone")
        if self.validate_steps is not None and self.patience is None:
            raise ArgumentError(
                f"validate_steps={self.validate_steps} says how often patience looks, but patience=None; set patience too"
            )
        if self.analyse == "gradient_dominance" and not self.trains_backbone:
            raise ArgumentError(
                f"analyse={self.analyse!r} compares the exits' gradients on the weights that they share, but the regime "
                "freezes the backbone; use regime='mixed', or leave it out"
            )
        check_loss(self.loss, self.phases, self.model)
        self._check_cache()
        self.rates = self._rates_at(self.lr, self.backbone_lr)
        some = {
            "params": [nn.Parameter(torch.zeros(1))],
            "lr": self.rates.heads,
            "weight_decay": self.rates.weight_decay,
        }
        probe = self._made(self.rates, [some])
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

    def make_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """An optimiser of what learns now, in a phase, at the rates of its kinds."""
        rates = self.rates_in(phase)
        return self._made(rates, rates.groups(self.model))

    def rates_in(self, phase: Phase) -> Rates:
        """A phase's own rates, or the trainer's."""
        if phase.lr is not None:
            return self._rates_at(phase.lr, phase.backbone_lr)
        return self._rates_at(self.lr, self.backbone_lr if phase.backbone_lr is None else phase.backbone_lr)

    def _rates_at(self, lr: float | None, backbone_lr: float | None) -> Rates:
        return rates_for(self.model, not self.trains_backbone, self.optimizer, lr, backbone_lr, self.weight_decay)

    def _made(self, rates: Rates, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not callable(rates.make):
            raise ArgumentError(
                f"optimizer= is a {type(self.optimizer).__name__}; give a function that makes one, such as torch.optim.AdamW"
            )
        try:
            optimizer = rates.make(groups)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"optimizer= cannot be called with parameter groups ({error}); give other options by functools.partial, such "
                "as functools.partial(torch.optim.SGD, momentum=0.9)"
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer= returned {type(optimizer).__name__}; give a function from parameter groups to an optimiser, such "
                "as torch.optim.AdamW"
            )
        return optimizer

    def _milestones(self) -> Sequence[int]:
        if not isinstance(self.milestones, tuple | list | None):
            raise ArgumentError(f"milestones={self.milestones!r} must be a list of epochs, such as [15], or None")
        return self.milestones or ()

    def _check_cache(self) -> None:
        if not self.cache:
            return
        if self.trains_backbone or any(len(self.model.classifiers) in phase.exits for phase in self.phases):
            raise ArgumentError(
                "cache=True needs a frozen backbone, but here the backbone learns, or its last layer, which attach replaced; "
                "use regime='disjoint' on a backbone with its own classes, or leave cache out"
            )
        if self.analyse is not None:
            raise ArgumentError(
                f"analyse={self.analyse!r} runs the whole model, but cache=True feeds its heads alone; leave one of them out"
            )
        if self.teacher is not None:
            raise ArgumentError(
                "cache=True keeps features, not the inputs that the teacher model reads; use teachers='last', or leave cache "
                "out"
            )


def _name(optimizer: torch.optim.Optimizer) -> str:
    """Its type and what it was given, for a checkpoint to compare."""
    options = ", ".join(f"{name}={value!r}" for name, value in optimizer.defaults.items())
    return f"{type(optimizer).__name__}({options})"
