"""A phase at work: what it runs, what it optimises, and one step of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from exitkit.common.batches import check_training_labels, move, split_batch
from exitkit.common.errors import ArgumentError, DivergedError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import logits_of
from exitkit.surgery.hooks import alone
from exitkit.surgery.inputs import call_on
from exitkit.surgery.mistakes import not_finite
from exitkit.training.feature_cache.heads_alone import HeadsAlone, HeadsOutput, call_view
from exitkit.training.freezing import Stages, learn
from exitkit.training.losses import Distillation
from exitkit.training.objective import Objective
from exitkit.training.options import Options
from exitkit.training.regimes import Phase
from exitkit.training.schedules import make_scheduler
from exitkit.training.sharding import is_divided, whole

if TYPE_CHECKING:
    from accelerate import Accelerator


class HeadsUntil(nn.Module):
    """A model's heads up to exit ``last``, called with what the backbone takes; the parameters are the model's own.

    The backbone's layers behind that exit do not run, and neither does the ensemble.
    """

    def __init__(self, model: MultiExitModel, last: int) -> None:
        super().__init__()
        self.model = model
        self.last = last

    def forward(self, *args: Any, **kwargs: Any) -> HeadsOutput:
        return HeadsOutput(*self.model.run_until(self.last, *args, **kwargs))


def last_needed(exits: Sequence[int], distillation: Distillation | None, model: MultiExitModel) -> int:
    """The last exit whose logits the losses of ``exits`` read: of these, of their teachers, and of those they imitate."""
    backbone = len(model.classifiers)
    teachers = [] if distillation is None else [t for m in exits for t in distillation.of(m, backbone)]
    imitated = [backbone - 1] if model.method.past_future else []
    return max(*exits, *teachers, *imitated, 0)


class Learner:
    """What a phase optimises. Parameters are frozen or thawed before the optimiser and DDP see them."""

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        phase: Phase,
        stages: Stages | None,
        objective: Objective,
        epochs: int,
        steps: int | None,
        view: MultiExitModel | HeadsAlone,
    ) -> None:
        self.options, self.accelerator, self.phase, self.stages = options, accelerator, phase, stages
        self.objective = objective
        learn(options.model, phase, stages)
        self.optimizer = options.make_optimizer(phase)
        self.scheduler = make_scheduler(self.optimizer, options.schedule, options.milestones, epochs, steps)
        accelerator.free_memory()  # forgets the optimiser of the phase before
        self.stepper = accelerator.prepare_optimizer(self.optimizer)
        self.called = view
        self.view = _wrapped(self._pass(view), options.compile, accelerator)

    def _pass(self, view: MultiExitModel | HeadsAlone) -> nn.Module:
        """What a step calls: the heads alone, or the model up to the last exit that this phase's losses read.

        Under dynamo and gradient checkpointing the whole model runs, as both re-run the backbone's code, and where it is
        divided among processes, as FSDP does something after each block.
        """
        if isinstance(view, HeadsAlone):
            return view
        if self.options.compile or self.options.gradient_checkpointing or is_divided(view):
            return HeadsUntil(view, len(view.classifiers))
        return HeadsUntil(view, last_needed(self.phase.exits, self.options.loss.distillation, view))

    def step(self, batches: Sequence[Any], weights: Sequence[float], epoch: int, step: int) -> tuple[Tensor, int]:
        """One optimiser step on one or more batches: their losses of ``phase.exits_at``, as shown, and their samples."""
        exits = self.phase.exits_at(epoch, step)
        summed, samples = torch.zeros(len(exits)), 0
        for index, batch in enumerate(batches):
            with nullcontext() if index == len(batches) - 1 else self._unsynchronised():
                losses, shown, size, unused = self._losses(batch, exits)
                self._check_finite(losses, batch, exits, epoch, step)
                total = self.objective.total(losses, weights, exits) + unused
                self.accelerator.backward(total / len(batches))
            self._anneal()
            summed += shown.cpu()
            samples += size
        self._adjust_gradients(exits)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.options.schedule is not None:
            self._advance_schedule()
        return summed, samples

    def end_epoch(self, epoch: int) -> None:
        """Refuse weights that are not finite, before they are kept; a schedule by epochs advances."""
        with alone():  # parameters are fake ones while another thread captures the backbone
            for name, parameter in self.options.model.named_parameters():
                if parameter.requires_grad and not bool(whole(parameter.isfinite().all())):
                    raise DivergedError(
                        f"{name} is not finite after epoch {epoch + 1}, at lr={self._rates()}; "
                        f"{self._remedy('set max_grad_norm')}",
                        exit=int(name.split(".")[1]) if name.startswith("classifiers.") else None,
                    )
        if self.options.schedule is None:
            self._advance_schedule()

    def _advance_schedule(self) -> None:
        """torch warns when the optimiser has made no step yet, as after an epoch that was interrupted at its end."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
            self.scheduler.step()

    def inputs(self, inputs: Any) -> Any:
        """A batch's inputs on the device, maps in the memory format asked for."""
        return placed(inputs, self.accelerator.device, self.options.channels_last)

    def _losses(self, batch: Any, exits: Sequence[int]) -> tuple[Tensor, Tensor, int, Tensor | float]:
        """The losses to minimise and those to show, the number of samples, and what DDP needs besides."""
        inputs, labels = split_batch(batch)
        inputs = self.inputs(inputs)
        with self.accelerator.autocast(), batch_norm_explained():
            output = call_view(self.options.model, self.called, self.view, inputs)
            heads = output.heads
            teacher = self._teacher(inputs, heads[-1])
        size = len(heads[-1])
        targets = None if labels is None else check_training_labels(labels, self.options.model.num_classes, size)
        if targets is not None:
            targets = targets.to(heads[-1].device)
        losses = self.objective.losses(heads, targets, exits, teacher)
        shown = self.objective.shown
        if output.auxiliary is not None:
            own = torch.stack([output.auxiliary[m] if m < len(output.auxiliary) else losses[0] * 0 for m in exits])
            losses, shown = losses + own, shown + own.detach()
        return losses, shown, size, self._unused(heads, exits)

    def _teacher(self, inputs: Any, logits: Tensor) -> Tensor | None:
        teacher = self.options.teacher
        if teacher is None:
            return None
        with torch.no_grad():
            taught = logits_of(call_on(teacher, inputs))
        if taught.shape != logits.shape:
            raise ArgumentError(
                f"the teacher's logits have shape {tuple(taught.shape)}, the exits' {tuple(logits.shape)}; teacher and "
                "model must have the same classes"
            )
        return taught

    def _unused(self, heads: Sequence[Tensor], exits: Sequence[int]) -> Tensor | float:
        """DDP waits for a gradient of every parameter; exits that do not count in this step give zeros."""
        rest = [heads[m].sum() * 0 for m in self.phase.exits if m not in exits]
        return torch.stack(rest).sum() if rest and isinstance(self.view, DistributedDataParallel) else 0.0

    def _unsynchronised(self) -> Any:
        return self.view.no_sync() if isinstance(self.view, DistributedDataParallel) else nullcontext()

    def _check_finite(self, losses: Tensor, batch: Any, exits: Sequence[int], epoch: int, step: int) -> None:
        """Stop before a loss that is not finite reaches the weights."""
        if not bool(losses.isfinite().all()):
            mistake = None if isinstance(self.called, HeadsAlone) else not_finite(split_batch(batch)[0])
            if mistake is not None:  # then no exit is to blame
                raise DivergedError(f"the loss is not finite in epoch {epoch + 1}, step {step + 1}: {mistake}")
            index = int(losses.isfinite().int().argmin())
            raise DivergedError(
                f"the loss of exit {exits[index]} is {losses[index].item()} in epoch {epoch + 1}, step {step + 1}, at "
                f"lr={self._rates()}; {self._remedy('check the inputs (normalised? NaN?)')}",
                exit=exits[index] if exits[index] < len(self.options.model.classifiers) else None,
            )

    def _remedy(self, other: str) -> str:
        if self.options.model.dtype == torch.float16:  # Adam's smallest denominator is 0 there
            return "float16 is too narrow to train in: give the model in float32, model.float()"
        return f"lower lr, or {other}"

    def _rates(self) -> str:
        return " and ".join(dict.fromkeys(f"{group['lr']:g}" for group in self.optimizer.param_groups))

    def _anneal(self) -> None:
        objective = self.objective
        if objective.confidence is not None and objective.unadjusted is not None:
            both = torch.stack([objective.confidence, objective.unadjusted])
            confidence, unadjusted = self.accelerator.reduce(both, "mean").tolist()
            objective.note(confidence, unadjusted)
            objective.anneal(confidence)

    def _adjust_gradients(self, exits: Sequence[int]) -> None:
        model = self.options.model
        for m in set(self.phase.exits) - {*exits, len(model.classifiers)}:
            for parameter in model.classifiers[m].parameters():
                parameter.grad = None
        if self.options.loss.gradient_equilibrium and self.stages is not None:
            for stage in self.phase.stages:
                behind = max(1, sum(m >= stage for m in exits))  # in this step perhaps none, and gradients of 0
                for parameter in self.stages.parameters[stage]:
                    if parameter.grad is not None:
                        parameter.grad /= behind
        if self.options.max_grad_norm is not None:
            learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            self.accelerator.clip_grad_norm_(learning, self.options.max_grad_norm)


def _wrapped(model: nn.Module, compiled: bool, accelerator: Accelerator) -> nn.Module:
    view: Any = torch.compile(model) if compiled else model
    if accelerator.num_processes > 1 and not is_divided(model):
        cuda = accelerator.device.type == "cuda"
        return DistributedDataParallel(view, device_ids=[accelerator.device] if cuda else None)
    return view  # type: ignore[no-any-return]


def placed(inputs: Any, device: torch.device, channels_last: bool) -> Any:
    """A batch's inputs on a device, maps in the memory format asked for."""
    moved = move(inputs, device)
    return _channels_last(moved) if channels_last else moved


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
    if isinstance(value, dict):
        return {key: _channels_last(item) for key, item in value.items()}
    return type(value)(map(_channels_last, value)) if isinstance(value, tuple | list) else value


@contextmanager
def batch_norm_explained() -> Iterator[None]:
    """BatchNorm's complaint of a batch of one sample, in words that help."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ArgumentError(
            "a batch of one sample has no statistics for a BatchNorm that learns (the backbone's, or one in the head of an "
            "exit: 'branch-n', 'tail'); use a larger batch_size or drop_last=True"
        ) from error
