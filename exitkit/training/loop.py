"""One call of ``Trainer.fit``: phases, epochs, validation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import islice
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from exitkit.common.batches import checked
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.checkpoint import NAME, disk_errors_as_warnings, save_checkpoint
from exitkit.training.distributed import length, random_state, seed_everything, set_random_state
from exitkit.training.early_stopping import EarlyStopping
from exitkit.training.feature_cache.heads_alone import HeadsAlone
from exitkit.training.freezing import Stages, learn
from exitkit.training.gradients import ANALYSED, dominance_of, gram_on, objective_weights, shared_by
from exitkit.training.interruption import ending
from exitkit.training.left_alone import left_as_found, loader_kept
from exitkit.training.objective import Objective
from exitkit.training.options import Options
from exitkit.training.progress import Epoch, write_log
from exitkit.training.sharding import is_divided, read_shards
from exitkit.training.step import Learner
from exitkit.training.tally import Tally, grouped
from exitkit.training.validation import validate

if TYPE_CHECKING:
    from accelerate import Accelerator

    from exitkit.training.display import Display


@runtime_checkable
class StatefulLoader(Protocol):
    """A training loader whose passes follow from those before, as where samples are collected with what was learned.

    A pass begun again after :meth:`restore` yields the same batches from its beginning.

    Attributes:
        measured: numbers for the record of an epoch, by name.
    """

    measured: Mapping[str, float]

    def __iter__(self) -> Iterator[Any]: ...

    def state(self) -> dict[str, Any]:
        """What is kept in checkpoints: tensors and plain values."""

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state` gave; None from a checkpoint of a loader without."""


@dataclass
class Run:
    """The state of a run, all of which is in its checkpoints.

    Attributes:
        settings: what must be the same for a checkpoint to be continued.
        view: what the loaders' batches are for: the model, or its heads alone where features are cached.
        interrupted: SIGTERM or SIGINT, where it has come.
        phase: index of the phase that is trained.
        history: the finished epochs.
    """

    options: Options
    accelerator: Accelerator
    view: MultiExitModel | HeadsAlone
    train_loader: Iterable[Any]
    val_loader: Iterable[Any] | None
    stages: Stages | None
    display: Display
    interrupted: Callable[[], int | None]
    settings: dict[str, Any]
    history: list[Epoch] = field(default_factory=list)
    phase: int = 0

    def __post_init__(self) -> None:
        self.model = self.options.model
        self.objective = Objective(self.options.loss, len(self.model.classifiers))
        self.shares = [boundary.share for boundary in self.model.boundaries]
        self.tally = Tally.empty(len(self.model.exits))
        self.stopping = EarlyStopping(self.options.patience)
        self.validate_steps: int | None = None
        self.best: dict[str, Tensor] | None = None
        self.random: dict[str, Any] | None = None

    def train(self, state: dict[str, Any] | None) -> None:
        """Train every phase, or, from a checkpoint's state, those that are not over yet."""
        for index in range(0 if state is None else state["phase"], len(self.options.phases)):
            self.phase = index
            self._train_phase(state)
            state = None

    def _train_phase(self, state: dict[str, Any] | None) -> None:
        """One phase, from the beginning or from a checkpoint's state; afterwards its best weights are in place."""
        epochs = self.options.lengths[self.phase]
        phase = self.options.phases[self.phase]
        batches = length(self.train_loader)
        steps = None if batches is None else -(-batches // self.options.accumulate)
        learner = Learner(self.options, self.accelerator, phase, self.stages, self.objective, epochs, steps, self.view)
        self.stopping = EarlyStopping(self.options.patience)
        every = self.options.validate_steps
        self.validate_steps = every if every is not None and (steps is None or every < steps) else None
        self.best = None if self.options.patience is None else self._weights()
        if state is not None:
            self._restore(state, learner)
        done = sum(record.phase == self.phase for record in self.history)
        while done < epochs and not self.stopping.stop:
            record = self._epoch(learner, progress=done / epochs)
            learner.end_epoch(record.epoch)
            record = self._analysed(record, learner, progress=done / epochs)
            self.history.append(record)
            if self.validate_steps is None:
                self._keep_best(record.accuracy, record.val_loss, record.exits)
            self.tally = Tally.empty(len(self.model.exits))
            self.display.epoch(record)
            if self.options.directory is not None and self.accelerator.is_main_process:
                with disk_errors_as_warnings(self.options.directory):
                    write_log(self.options.directory, self.options.log, self.history)
            self._save(learner)
            self._stop_if_asked(learner)
            done += 1
        self.tally, self.random = Tally.empty(len(self.model.exits)), None  # of an epoch that patience ended
        if self.best is not None:
            self.model.load_state_dict(self.best, strict=False)

    def _epoch(self, learner: Learner, progress: float) -> Epoch:
        """Train and validate once; goes on where an interrupted epoch stood."""
        epoch, started, before = len(self.history), time.monotonic(), self.tally.samples
        seed_everything(self.train_loader, self.options.seed, epoch)
        weights = self.options.loss.weights_at(progress, self.shares)
        groups = grouped(checked(self.train_loader, "train_loader"), self.options.accumulate)
        for _ in islice(groups, self.tally.steps):
            pass  # steps taken before the interruption: drawn again, so that the order goes on as it would have
        if self.random is not None:
            set_random_state(self.random)
            self.random = None
        for group in groups:
            step = self.tally.steps
            losses, samples = learner.step(group, weights, epoch, step)
            self.tally.add(learner.phase.exits_at(epoch, step), losses, len(group), samples)
            self.display.step(losses / len(group), samples * self.accelerator.num_processes)
            enough = self._enough(learner)
            self._stop_if_asked(learner)
            if enough:
                break
        seconds = time.monotonic() - started
        speed = (self.tally.samples - before) * self.accelerator.num_processes / max(seconds, 1e-9)
        return self._record(learner, epoch, speed)

    def _record(self, learner: Learner, epoch: int, speed: float) -> Epoch:
        self._share_statistics()
        totals = self.accelerator.reduce(self.tally.totals.to(self.accelerator.device)).cpu()
        batches = self.accelerator.reduce(self.tally.batches.to(self.accelerator.device)).cpu()
        loss = tuple(float(totals[m] / batches[m]) if batches[m] else None for m in learner.phase.exits)
        accuracy, val_loss = self._validate(lambda: self._stop_if_asked(learner))
        temperature = None if self.options.loss.distillation is None else self.objective.temperature
        measured = dict(self.train_loader.measured) if isinstance(self.train_loader, StatefulLoader) else {}
        exits, confidences = learner.phase.exits, self.objective.mean_confidences()
        return Epoch(
            epoch, loss, accuracy, self.phase, exits, val_loss, speed, temperature, *confidences, measured=measured
        )

    def _share_statistics(self) -> None:
        """Each process has BatchNorm statistics of its own part of the samples; the main one's are everybody's."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            broadcast(list(self.model.buffers()))

    def _validate(self, after_batch: Callable[[], None]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Accuracy and mean loss of every exit; None without a validation set."""
        if self.val_loader is None:
            return None, None
        channels_last = self.options.channels_last
        return validate(self.model, self.view, self.val_loader, self.accelerator, channels_last, after_batch)

    def _enough(self, learner: Learner) -> bool:
        """After a step: whether patience is at its end, where it looks after so many. What is drawn afterwards is the same."""
        self.stopping.steps += 1
        if self.validate_steps is None or self.stopping.steps < self.validate_steps:
            return False
        self.stopping.steps = 0
        drawn = random_state()
        self._share_statistics()
        self._keep_best(*self._validate(lambda: None), learner.phase.exits)
        set_random_state(drawn)
        return self.stopping.stop

    def _analysed(self, record: Epoch, learner: Learner, progress: float) -> Epoch:
        """The record with the cosines that are asked for; the run goes on as it would have without."""
        options = self.options
        if options.analyse is None or (record.epoch + 1) % options.analyse_every:
            return record
        with left_as_found(self.model), loader_kept(self.train_loader), self.accelerator.autocast():
            learn(self.model, learner.phase, self.stages)
            if options.analyse == "first_exit":
                first = [[p for p in self.model.classifiers[0].parameters() if p.requires_grad]]
                return replace(record, first_exit=self._cosines(first, record, progress)[0][0]) if first[0] else record
            assert self.stages is not None
            blocks = [[p for p in block if p.requires_grad] for block in shared_by(record.exits, self.stages)]
            if not any(blocks):
                return record
            dominance, ceiling = self._cosines(blocks, record, progress)
        return replace(
            record,
            dominance=tuple(dominance[m] for m in record.exits),
            ceiling=tuple(ceiling[m] for m in record.exits),
        )

    def _cosines(
        self, blocks: Sequence[Sequence[nn.Parameter]], record: Epoch, progress: float
    ) -> tuple[list[float], list[float]]:
        """Of each exit's gradient on ``blocks`` with the objective's, and their ceilings, over the first batches."""
        weights = [
            weight if m in record.exits else 0.0
            for m, weight in enumerate(self.options.loss.weights_at(progress, self.shares))
        ]
        seed_everything(self.train_loader, self.options.seed, record.epoch)
        alpha = torch.tensor([*objective_weights(self.objective, weights), 1.0], dtype=torch.float64)
        each = [
            dominance_of(gram_on(self.model, copy(self.objective), batch, weights, blocks), alpha, len(blocks))
            for batch in islice(self.train_loader, ANALYSED)
        ]
        dominance, ceiling = (torch.stack([one[at] for one in each]).mean(0).tolist() for at in (0, 2))
        return dominance, ceiling

    def _keep_best(
        self, accuracy: Sequence[float] | None, val_loss: Sequence[float] | None, exits: Sequence[int]
    ) -> None:
        scores = accuracy or tuple(-loss for loss in val_loss or ())
        improved = not scores or self.stopping.update([scores[m] for m in exits])
        if improved and self.best is not None:
            self.best = self._weights()

    def _weights(self) -> dict[str, Tensor]:
        """A copy of everything that the run trains, on the CPU."""
        whole = ("classifiers.", "backbone.") if self.stages is not None else ("classifiers.",)
        trained = (*whole, *(f"backbone.{name}" for name in self.model.new_head))
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.model.state_dict().items()
            if name.startswith(trained)
        }

    def _stop_if_asked(self, learner: Learner) -> None:
        """After SIGTERM or Ctrl-C: write down where the epoch stands and end. All processes leave at one step."""
        if self.options.directory is None:
            return
        came = self.interrupted()
        if self.accelerator.num_processes > 1:
            if came is not None:
                self.accelerator.set_trigger()
            came = (came or SIGTERM) if self.accelerator.check_trigger() else None
        if came is not None:
            self._save(learner)
            raise ending(came)

    def _save(self, learner: Learner) -> None:
        if self.options.directory is None:
            return
        totals, batches = (
            self.accelerator.reduce(part.to(self.accelerator.device), "mean").cpu()  # in whatever number of processes
            for part in (self.tally.totals, self.tally.batches)
        )
        main, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        if main or is_divided(self.model):
            state = {
                "phase": self.phase,
                "weights": self._weights(),
                "best": self.best,
                "optimizer": learner.optimizer.state_dict(),
                "scheduler": learner.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "temperature": self.objective.temperature,
                "confidences": self.objective.confidences,
                "stopping": self.stopping.state(),
                "history": [dict(vars(record)) for record in self.history],
                "tally": {**vars(self.tally), "totals": totals, "batches": batches},
                "random": random_state(),
                "loader": self.train_loader.state() if isinstance(self.train_loader, StatefulLoader) else None,
            }
            save_checkpoint(self.options.directory, self.settings, state, main)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: dict[str, Any], learner: Learner) -> None:
        assert self.options.directory is not None
        state = read_shards(state, self.options.directory, self.model, learner.optimizer)
        own, stored = self.model.state_dict(), state["weights"]
        same = self._weights().keys() <= stored.keys() <= own.keys()
        if not same or any(own[name].shape != value.shape for name, value in stored.items()):
            raise self._foreign("other heads")
        if isinstance(self.train_loader, StatefulLoader):
            self.train_loader.restore(state["loader"])
        try:
            learner.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise self._foreign("a model of which other parameters learn (requires_grad)") from error
        self.model.load_state_dict(stored, strict=False)
        learner.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.best = None if self.options.patience is None else state["best"] or self._weights()
        self.objective.temperature = state["temperature"]
        self.objective.confidences = state["confidences"]
        self.stopping.restore(state["stopping"])
        self.history[:] = [Epoch(**record) for record in state["history"]]
        self.display.resume(len(self.history), self.options.directory / NAME)
        self.tally = Tally(**state["tally"])
        self.random = state["random"] if self.tally.steps else None

    def _foreign(self, owner: str) -> ArgumentError:
        return ArgumentError(
            f"the checkpoint in output_dir={str(self.options.output_dir)!r} belongs to {owner}; use another output_dir, or "
            "resume='never' to start again"
        )
