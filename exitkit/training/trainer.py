"""The trainer: what a user asks for, checked, and ``fit``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from exitkit.errors import ExitkitError, unknown_name
from exitkit.model import MultiExitModel
from exitkit.surgery.capture import evaluation_mode
from exitkit.training.cache import Data, cached
from exitkit.training.ensemble import fit_ensemble_on
from exitkit.training.freezing import Stages, check_learning, flags_restored, stages_of
from exitkit.training.interruption import sigterm_noted
from exitkit.training.losses import Loss, check_loss
from exitkit.training.processes import length, make_accelerator, own_part, seed_everything
from exitkit.training.progress import Epoch, displayed
from exitkit.training.regimes import Phase, epochs_of, phases_of
from exitkit.training.run import EPOCHS, Run
from exitkit.training.schedules import Schedule, check_schedule


@dataclass(eq=False)
class Trainer:
    """Train the exits of a multi-exit model, and its backbone where the regime says so.

    Args:
        model: what :func:`exitkit.attach` returned.
        regime: a name, or phases of one's own (a tuple of :class:`exitkit.training.Phase`). All start from the weights that
            the model has; none is ever reset.

            * ``"disjoint"``: the backbone is frozen, in eval mode, and not changed in any way; all exits learn at once, and
              with them the backbone's last layer where ``attach(num_classes=)`` replaced it.
            * ``"mixed"``: backbone and exits learn together, from a backbone that is trained already (recommended by Kubaty
              et al. where the backbone may change).
            * ``"joint"``: the same steps. The paper's joint regime differs by its start, a backbone with random weights:
              attach to an untrained model for it. A pretrained one keeps its weights here, and is then trained as in
              ``"mixed"``.
            * ``"mixed-gradual"``: as mixed, exits joining one after another, from the last to the first.
            * ``"branch-wise"``: one exit after another, with its stage of the backbone alone.
            * ``"separate"``: one exit more at a time, together with those before it and the backbone up to it.
            * ``"alternating"``: steps on the backbone's own loss and on all losses, in turn.
        epochs: passes over the training set, divided among the phases.
        lr: the heads' learning rate (1e-3 in Zero Time Waste, appendix A.1).
        backbone_lr: the backbone's; ``lr`` by default.
        weight_decay: handed to the optimiser.
        optimizer: makes the optimiser from parameter groups, which carry ``lr`` and ``weight_decay``: ``torch.optim.AdamW``,
            ``functools.partial(torch.optim.SGD, momentum=0.9)``. Each phase has one of its own.
        milestones: epochs of a phase after which the rate is divided by ten (the paper: [15] of 50); a cosine to 0 by
            default.
        schedule: makes a learning rate schedule of torch's (or transformers') from the optimiser and the number of optimiser
            steps of a phase, for warm-up or warm restarts; it goes on after every step, where ``milestones`` go by epochs:
            ``functools.partial(transformers.get_linear_schedule_with_warmup, num_warmup_steps=100)``.
        loss: what the exits minimise.
        patience: stop a phase when none of its exits improved on the validation set (in accuracy before the ensemble, or in
            squared error) for so many epochs; everything trained is restored as it was in the last epoch in which any of
            them improved (Kubaty et al., section 4.1). Without it the last epoch's state is kept.
        accumulate: batches per optimiser step.
        max_grad_norm: the gradient of everything that learns is scaled down to this norm.
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"``, passed to accelerate.
        compile: run the training steps through :func:`torch.compile`.
        channels_last: keep convolution weights and image batches in that memory format, which stays afterwards.
        gradient_checkpointing: recompute the backbone's blocks in the backward pass (Hugging Face models).
        cache: run a frozen backbone over the samples once, and train the heads on what they read of its features, from a
            file. Every epoch then sees the inputs of the first pass: augmentation in the loader is frozen. In the order and
            with the seeds of a run without it, so that the result is the same. A head that begins with a convolution reads
            whole maps, which are large; token read-outs and SDN pooling shrink them first. With an ``output_dir`` the file
            stays there, and is used again for the same inputs, backbone and exits.
        cache_gb: how many gigabytes (10⁹ bytes) of disk that may take; more is not cached, with a warning.
        seed: every epoch is seeded from it, so that a killed run continues to the same weights.
        output_dir: where a checkpoint and a log go after every epoch; nothing is written by default. With it, SIGTERM
            writes a checkpoint after the current step and ends the process with status 143.
        resume: ``"auto"`` continues from the checkpoint in ``output_dir``, ``"never"`` starts again.
        log: ``"csv"`` or ``"tensorboard"``.
        show_progress: draw a table where there is a terminal, print a line per epoch (to stderr) where there is none.

    Attributes:
        history: the record of every epoch of the last fit.

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
    history: list[Epoch] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.model, MultiExitModel):
            raise ExitkitError(f"model is {type(self.model).__name__}; train what exitkit.attach(model) returns")
        self._check_names()
        self._check_numbers()
        if self.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ExitkitError("log='tensorboard' needs TensorBoard: pip install tensorboard")
        self.phases = phases_of(self.regime, len(self.model.classifiers), bool(self.model.new_head))
        self.lengths = epochs_of(self.phases, self.epochs)
        if self.backbone_lr is not None and not self.trains_backbone:
            raise ExitkitError(f"backbone_lr={self.backbone_lr!r} is set, but the regime freezes the backbone")
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
        optimizer = self.optimizer(groups)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ExitkitError(
                f"optimizer= returned {type(optimizer).__name__}; give a function from parameter groups to an optimiser, such "
                "as torch.optim.AdamW or functools.partial(torch.optim.SGD, momentum=0.9)"
            )
        return optimizer

    def fit(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None) -> list[Epoch]:
        """Train phase by phase, then fit the ensemble; the model is changed in place. Returns the record of every epoch.

        Under ``accelerate launch`` or ``torchrun`` each process takes every n-th batch and the gradients are averaged.

        Args:
            train_loader: yields ``(inputs, labels)`` or dicts with ``labels``: class indices (-1 for none), class
                probabilities (B, C), or values to regress where the model has one output. With distillation, inputs alone
                will do.
            val_loader: the same, with class indices, for per-exit accuracy and early stopping.

        Raises:
            ExitkitError: an empty loader, labels out of range, a loss that is not finite, an unusable checkpoint.
        """
        if self.patience is not None and val_loader is None:
            raise ExitkitError("patience is set, but there is no val_loader to measure improvement on; give one")
        self._make_directory()
        accelerator = make_accelerator(self.mixed_precision)
        train = own_part(accelerator, train_loader, "train_loader")
        val = None if val_loader is None else own_part(accelerator, val_loader, "val_loader")
        self._place(accelerator.device)
        self.history = []
        data = Data(self.model, train, val)
        with (
            flags_restored(self.model),
            cached(self, accelerator, data) if self.cache else nullcontext(data) as data,
        ):
            stages = self._stages()
            with (
                _checkpointed(self.model.backbone, self.gradient_checkpointing),
                _resting(self.teacher),
                sigterm_noted(self.directory is not None) as interrupted,
                self._display(accelerator.is_main_process, length(train)) as display,
            ):
                Run(self, accelerator, *data, stages, display, interrupted, self.history).train()
            self.model.combiners.requires_grad_(True)
            seed_everything(data.train, self.seed * EPOCHS)
            fit_ensemble_on(self.model, data.view, data.train, accelerator.gather_for_metrics)
        return self.history

    def _make_directory(self) -> None:
        if self.directory is None:
            return
        if self.directory.exists() and not self.directory.is_dir():
            raise ExitkitError(f"output_dir={str(self.directory)!r} is a file; give a folder")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExitkitError(
                f"output_dir={str(self.directory)!r} cannot be made ({error.strerror}); give a folder where you may write"
            ) from error

    def _place(self, device: torch.device) -> None:
        self.model.to(device)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.teacher is not None:
            self.teacher.to(device)

    def _stages(self) -> Stages | None:
        if not self.trains_backbone:
            return None
        stages = stages_of(self.model)
        check_learning(self.phases, stages, self.model)
        if self.loss.gradient_equilibrium and stages.shared:
            raise ExitkitError(
                f"gradient_equilibrium divides each stage's gradient by another number, but {stages.shared[0]!r} is read "
                "in several stages; train this backbone without it"
            )
        return stages

    def _display(self, main: bool, steps: int | None) -> Any:
        steps = None if steps is None else -(-steps // self.accumulate)
        return displayed(self.show_progress and main, self.epochs, len(self.phases), steps)

    def _check_names(self) -> None:
        for name, value, allowed in (
            ("mixed_precision", self.mixed_precision, ("no", "fp16", "bf16")),
            ("resume", self.resume, ("auto", "never")),
            ("log", self.log, ("csv", "tensorboard")),
        ):
            if value not in allowed:
                raise unknown_name(name, value, allowed)
        if not isinstance(self.loss, Loss):
            raise ExitkitError(f"loss={self.loss!r} must be exitkit.training.Loss(...)")
        if not callable(self.optimizer):
            raise ExitkitError(
                f"optimizer= is a {type(self.optimizer).__name__}; give a function that makes one, such as torch.optim.AdamW"
            )

    def _check_cache(self) -> None:
        if not self.cache:
            return
        if self.trains_backbone or any(len(self.model.classifiers) in phase.exits for phase in self.phases):
            raise ExitkitError(
                "cache=True keeps what a frozen backbone says, but here the backbone learns, or its last layer, which attach "
                "replaced; use regime='disjoint' on a backbone with its own classes, or leave cache out"
            )
        if self.teacher is not None:
            raise ExitkitError(
                "cache=True keeps features, and not the inputs that the teacher model reads; use teachers='last', or leave "
                "cache out"
            )

    def _check_numbers(self) -> None:
        optional = (("backbone_lr", self.backbone_lr), ("max_grad_norm", self.max_grad_norm))
        above = (("lr", self.lr), ("cache_gb", self.cache_gb))
        for name, real in (*above, ("weight_decay", self.weight_decay), *optional):
            if real is not None and not isinstance(real, int | float):
                raise ExitkitError(f"{name}={real!r} must be a number")
        for name, real in (*above, *optional):
            if real is not None and not 0 < real < float("inf"):
                raise ExitkitError(f"{name}={real!r} must be greater than 0")
        if not 0 <= self.weight_decay < float("inf"):
            raise ExitkitError(f"weight_decay={self.weight_decay!r} must be at least 0")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ExitkitError(f"seed={self.seed!r} must be a whole number of at least 0")
        milestones = () if self.milestones is None else self.milestones
        if not isinstance(milestones, tuple | list) or any(
            not isinstance(epoch, int) or epoch < 1 for epoch in milestones
        ):
            raise ExitkitError(f"milestones={milestones!r} must be whole numbers of epochs, such as [15]")
        counts = (("epochs", self.epochs), ("patience", self.patience), ("accumulate", self.accumulate))
        for name, number in counts:
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ExitkitError(f"{name}={number!r} must be a whole number greater than 0")


def _name(optimizer: torch.optim.Optimizer) -> str:
    """Its type and what it was given, for a checkpoint to compare."""
    options = ", ".join(f"{name}={value!r}" for name, value in optimizer.defaults.items())
    return f"{type(optimizer).__name__}({options})"


@contextmanager
def _resting(teacher: nn.Module | None) -> Iterator[None]:
    if teacher is None:
        yield
    else:
        with evaluation_mode(teacher):
            yield


@contextmanager
def _checkpointed(backbone: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing by the model's own method, without reentrance: exits read features inside its blocks."""
    if not wanted:
        yield
        return
    kind = next((k for k in ("activation", "gradient") if hasattr(backbone, f"{k}_checkpointing_enable")), None)
    if kind is None:
        raise ExitkitError(
            f"gradient_checkpointing=True, but {type(backbone).__name__} has no gradient_checkpointing_enable(), as Hugging "
            "Face models do; leave it out"
        )
    before = bool(getattr(backbone, f"is_{kind}_checkpointing", False))
    getattr(backbone, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if not before:
            getattr(backbone, f"{kind}_checkpointing_disable")()
