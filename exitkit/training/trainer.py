"""The trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from exitkit.common.errors import ArgumentError
from exitkit.common.files import make_folder
from exitkit.surgery.capturing import evaluation_mode
from exitkit.training.checkpoint import load_checkpoint, remove_leftovers
from exitkit.training.distributed import length, make_accelerator, own_part, seed_everything
from exitkit.training.ensemble import fit_ensemble_on
from exitkit.training.feature_cache.cache import Data, cached
from exitkit.training.freezing import Stages, check_learning, flags_restored, stages_of
from exitkit.training.interruption import stop_noted
from exitkit.training.loop import Run
from exitkit.training.options import Options
from exitkit.training.progress import Epoch
from exitkit.training.same_run import data_of, settings_of
from exitkit.training.sharding import divided, divides


@dataclass(eq=False)
class Trainer(Options):
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
        lr: the learning rate of all heads. By default, where no ``optimizer`` is given either, what is best for these heads:
            Adam at 1e-3 (Zero Time Waste, appendix A.1), but where some are copies of a frozen backbone with BatchNorm
            (``"branch-n"``, ``"tail"``) SGD with Nesterov momentum 0.9 and weight decay 5e-4, at 0.1 for these and 0.03 for
            the others, 0.003 where some of these are convolutions without BatchNorm. With an ``optimizer`` 1e-3.
        backbone_lr: the backbone's; that of the heads by default. A phase of one's own may have rates of its own.
        weight_decay: handed to the optimiser; 0 by default, but as ``lr`` says.
        optimizer: makes the optimiser from parameter groups, which carry ``lr`` and ``weight_decay``: ``torch.optim.AdamW``,
            ``functools.partial(torch.optim.SGD, momentum=0.9)``. Each phase has one of its own. By default Adam where ``lr``
            is given, otherwise as there.
        milestones: epochs of a phase after which the rate is divided by ten (the paper: [15] of 50), with a warning for those
            after its end; ``[]`` for a rate that stays as it is. A cosine to 0 by default.
        schedule: makes a learning rate schedule of torch's (or transformers') from the optimiser and the number of optimiser
            steps of a phase, for warm-up or warm restarts; it goes on after every step, where ``milestones`` go by epochs:
            ``functools.partial(transformers.get_linear_schedule_with_warmup, num_warmup_steps=100)``.
        loss: what the exits minimise.
        ensemble_fit: how the ensemble is fitted in the end: :class:`exitkit.training.EnsembleFit`. Zero Time Waste's appendix
            A.1 is ``EnsembleFit(optimizer="sgd", epochs=500, penalty=0)`` with ``ensemble_on="train"``.
        ensemble_on: the samples that it is fitted on, ``"validation"`` or ``"train"``; by default validation samples where
            there are some (why it matters: :func:`exitkit.training.fit_ensemble`).
        patience: stop a phase when none of its exits improved on the validation set (in accuracy before the ensemble, or in
            squared error) for so many epochs; everything trained is restored as it was in the last epoch in which any of
            them improved (Kubaty et al., section 4.1). Without it the last epoch's state is kept.
        validate_steps: for ``patience``, the optimiser steps from one look at the validation set to the next, which then take
            the place of epochs; where an epoch has fewer, epochs all the same. The published code of Kubaty et al. has 300.
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
            writes a checkpoint after the current step and ends the process with status 143, and Ctrl-C writes one and
            raises ``KeyboardInterrupt`` (a second Ctrl-C does not wait). A process that is killed loses the epoch it is in.
        resume: ``"auto"`` continues from the checkpoint in ``output_dir``, which must be of the same model, options and data
            (samples of the data sets, their number, batch sizes and lengths are compared, where they can be known without
            beginning a pass); ``"never"`` starts again.
        log: ``"csv"`` or ``"tensorboard"``.
        analyse: ``"gradient_dominance"`` measures after an epoch, on the first batches of the training set, which exits'
            gradients the steps follow, for the history and the log (:func:`exitkit.analysis.gradient_dominance`). The weights
            that are trained are the same with it and without. ``"first_exit"`` measures on the weights of the first exit's
            head how far all exits' gradients together agree with its own: a cosine, 1 where the links between exits let no
            gradient through (Zero Time Waste, appendix C.3).
        analyse_every: after every so many epochs.
        show_progress: draw a table where there is a terminal, print a line per epoch (to stderr) where there is none.

    Attributes:
        history: the record of every epoch of the last fit.

    Raises:
        ArgumentError: an unknown name, a value out of range, or options that contradict each other.
    """

    history: list[Epoch] = field(init=False, default_factory=list)

    def fit(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None) -> list[Epoch]:
        """Train phase by phase, then fit the ensemble; the model is changed in place. Returns the record of every epoch.

        The ensemble is fitted on ``val_loader`` where there is one, on ``train_loader`` otherwise or where ``ensemble_on``
        says so. Choose thresholds on other samples than these.

        Under ``accelerate launch`` or ``torchrun`` each process takes every n-th batch and the gradients are averaged. With
        ``--use_fsdp --fsdp_version 2`` a model whose backbone learns is divided among the processes meanwhile; afterwards each
        has the whole of it, on the device where it was.

        Args:
            train_loader: yields ``(inputs, labels)`` or dicts with ``labels``: class indices (-1 for none), class
                probabilities (B, C), or values to regress where the model has one output. With distillation, inputs alone
                will do.
            val_loader: the same, with class indices, for per-exit accuracy, early stopping and the ensemble's fit.

        Raises:
            ArgumentError: an empty loader, labels out of range, a checkpoint made with other options or other data, an option
                that FSDP rules out.
            FileError: a checkpoint that is damaged or of another version.
            WriteError: an ``output_dir`` that cannot be written.
            DivergedError: a loss, weights or answers that are not finite.
        """
        return self.fit_on(Data(self.model, train_loader, val_loader))

    def fit_on(self, data: Data) -> list[Epoch]:
        """:meth:`fit` on loaders whose batches may be for the heads alone, as those of a feature cache are.

        The state of a :class:`~exitkit.training.loop.StatefulLoader` is kept in checkpoints.
        """
        if self.patience is not None and data.val is None:
            raise ArgumentError("patience is set, but there is no val_loader to measure improvement on; give one")
        if self.ensemble_on == "validation" and data.val is None:
            raise ArgumentError(
                "ensemble_on='validation' is set, but there is no val_loader to fit the ensemble on; give one"
            )
        if torch.is_inference_mode_enabled():
            raise ArgumentError(
                "fit was called under torch.inference_mode(), in which nothing learns; call it outside"
            )
        if self.directory is not None:
            make_folder(self.directory, "output_dir=")
        accelerator = make_accelerator(self.mixed_precision)
        train = own_part(accelerator, data.train, "train_loader")
        val = None if data.val is None else own_part(accelerator, data.val, "val_loader")
        self._place(accelerator.device, divides(self, accelerator))
        self.history = []
        settings = {} if self.directory is None else self._settings(train, val, accelerator.num_processes)
        checkpoint = self._checkpoint(settings, accelerator.is_main_process)
        data = Data(data.view, train, val)
        with (
            torch.enable_grad(),  # a caller may have turned it off, as notebooks do that evaluate
            flags_restored(self.model),
            cached(self, accelerator, data) if self.cache else nullcontext(data) as data,
            divided(self, self._stages(), accelerator) as (options, stages),
        ):
            data = data if options is self else data._replace(view=options.model)
            with (
                _gradient_checkpointing(options.model.backbone, self.gradient_checkpointing),
                _in_evaluation_mode(self.teacher),
                stop_noted(self.directory is not None) as interrupted,
                self._display(accelerator.is_main_process, length(train)) as display,
            ):
                run = Run(options, accelerator, *data, stages, display, interrupted, settings, self.history)
                run.train(checkpoint)
            options.model.combiners.requires_grad_(True)
            samples = data.train if data.val is None or self.ensemble_on == "train" else data.val
            seed_everything(samples, self.seed)  # the same images, whatever was drawn before
            shown = self.show_progress and accelerator.is_main_process
            gather = accelerator.gather_for_metrics
            # a divided model's weights come in the precision of autocast
            with nullcontext() if options is self else accelerator.autocast():
                fit_ensemble_on(options.model, data.view, samples, gather, self.ensemble_fit, shown)
        return self.history

    def _settings(self, train: Iterable[Any], val: Iterable[Any] | None, processes: int) -> dict[str, Any]:
        data = data_of(train, "train_loader", processes) | data_of(val, "val_loader", processes)
        return settings_of(self) | data

    def _checkpoint(self, settings: dict[str, Any], main: bool) -> dict[str, Any] | None:
        """The checkpoint to go on from, checked against this run before anything is changed."""
        if self.directory is None:
            return None
        if main:
            remove_leftovers(self.directory)
        return None if self.resume == "never" else load_checkpoint(self.directory, settings)

    def _place(self, device: torch.device, in_parts: bool) -> None:
        if not in_parts:
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
            raise ArgumentError(
                f"gradient_equilibrium rescales each stage's gradient, but {stages.shared[0]!r} is read in several stages; "
                "train this backbone without it"
            )
        return stages

    def _display(self, main: bool, steps: int | None) -> Any:
        from exitkit.training.display import displayed  # imports rich

        steps = None if steps is None else -(-steps // self.accumulate)
        return displayed(self.show_progress and main, self.epochs, len(self.phases), steps)


@contextmanager
def _in_evaluation_mode(teacher: nn.Module | None) -> Iterator[None]:
    if teacher is None:
        yield
    else:
        with evaluation_mode(teacher):
            yield


@contextmanager
def _gradient_checkpointing(backbone: nn.Module, wanted: bool) -> Iterator[None]:
    """By the model's own method, without re-entrance, as exits read features inside the recomputed blocks."""
    if not wanted:
        yield
        return
    kind = next((k for k in ("activation", "gradient") if hasattr(backbone, f"{k}_checkpointing_enable")), None)
    if kind is None:
        raise ArgumentError(
            f"gradient_checkpointing=True, but {type(backbone).__name__} has no gradient_checkpointing_enable() as Hugging "
            "Face models have; leave it out"
        )
    before = bool(getattr(backbone, f"is_{kind}_checkpointing", False))
    getattr(backbone, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if not before:
            getattr(backbone, f"{kind}_checkpointing_disable")()
