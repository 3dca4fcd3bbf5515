"""The objective: from every exit's logits to the number that is minimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.common.batches import UNLABELLED
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.loss import classification
from exitkit.training.losses import Confidence, Divergence, Loss


@dataclass
class Objective:
    """What :class:`Loss` asks for, computed, with the temperature that the distillation has reached.

    Attributes:
        loss: what is minimised.
        last: the number of the backbone's own exit.
        temperature: τ of the distillation.
        confidence: the teachers' confidence at τ in the last batch; None without teachers.
        unadjusted: the same at τ = 1.
        confidences: both of all batches since the last call of :meth:`mean_confidences`, summed, and their number.
        limit: μ, above which τ grows; None keeps τ, and is there before the first batch.
        shown: the last losses as a user sees them, without gradient. The distillation term is the KL divergence at τ in them,
            0 for a perfect copy; the factor τ² and the teachers' entropy, which grow with τ, would hide what was learned.
    """

    loss: Loss
    last: int
    temperature: float = field(init=False)
    confidence: Tensor | None = field(init=False, default=None)
    unadjusted: Tensor | None = field(init=False, default=None)
    confidences: tuple[float, float, int] = field(init=False, default=(0.0, 0.0, 0))
    limit: float | None = field(init=False, default=None)
    shown: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.temperature = 1.0 if self.loss.distillation is None else float(self.loss.distillation.temperature)

    def losses(
        self,
        heads: Sequence[Tensor],
        targets: Tensor | None,
        exits: Sequence[int],
        teacher: Tensor | None = None,
    ) -> Tensor:
        """The loss of each of ``exits``, unweighted.

        Args:
            heads: logits (B, C) of every exit, the backbone's last; those behind all exits that count or teach may be missing.
            targets: what :func:`exitkit.common.batches.check_training_labels` returned; None without labels.
            exits: those whose losses count.
            teacher: logits (B, C) of another model.

        Raises:
            ArgumentError: samples that have neither a label nor a teacher.
        """
        logits = {m: heads[m].float() for m in range(len(heads))}
        self._check_teachable(targets, exits)
        classified = torch.stack([classification(logits[m], targets, self.loss.label_smoothing) for m in exits])
        self.shown = classified.detach()
        if self.loss.distillation is None:
            return classified
        terms, divergences = self._distil(logits, exits, None if teacher is None else teacher.float())
        self.shown = self.shown + self.loss.distillation.weight * divergences
        return classified + terms

    def total(self, losses: Tensor, weights: Sequence[float], exits: Sequence[int]) -> Tensor:
        """The weighted sum, or mean, of the losses of ``exits``, given the weights of all exits."""
        weighted = losses * losses.new_tensor([weights[m] for m in exits])
        return weighted.mean() if self.loss.reduction == "mean" else weighted.sum()

    def note(self, confidence: float, unadjusted: float) -> None:
        """Keep the teachers' confidence in a batch, at τ and at 1, for the epoch's record."""
        adjusted, plain, batches = self.confidences
        self.confidences = (adjusted + confidence, plain + unadjusted, batches + 1)

    def anneal(self, confidence: float) -> None:
        """Let τ grow if the teachers' confidence in a batch is above the limit (algorithm 1, line 11)."""
        config = self.loss.distillation
        if config is not None and self.limit is not None and confidence > self.limit:
            self.temperature *= float(config.multiplier)

    def mean_confidences(self) -> tuple[float | None, float | None]:
        """Of the teachers at τ and at 1, over the batches since the last call; None where there were no teachers."""
        adjusted, plain, batches = self.confidences
        self.confidences = (0.0, 0.0, 0)
        return (adjusted / batches, plain / batches) if batches else (None, None)

    def _check_teachable(self, targets: Tensor | None, exits: Sequence[int]) -> None:
        config = self.loss.distillation
        if config is None:
            if targets is None:
                raise ArgumentError(
                    "the loader yields no labels; yield (inputs, labels) or a dict with 'labels', or learn without labels by "
                    "loss=exitkit.training.Loss(distillation=exitkit.training.Distillation())"
                )
            if targets.dim() == 1 and not targets.is_floating_point() and bool((targets == UNLABELLED).any()):
                raise ArgumentError(
                    "some labels are -1, which marks samples without one, but the loss needs labels; add distillation= to it"
                )
        elif targets is None and not isinstance(config.teachers, nn.Module):
            untaught = [m for m in exits if not config.of(m, self.last)]
            if untaught:
                raise ArgumentError(
                    f"the loader yields no labels, and exits {untaught} have no teacher; freeze the backbone "
                    "(regime='disjoint'), give a model as teachers=, or mark single samples without a label by -1"
                )

    def _distil(
        self, logits: Mapping[int, Tensor], exits: Sequence[int], teacher: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The weighted distillation term of each exit, and its KL divergence (0 without a teacher); notes their confidence."""
        config = self.loss.distillation
        assert config is not None
        teaching = {m: ((-1,) if teacher is not None else config.of(m, self.last)) for m in exits}
        sources = {
            t: (logits[t] if teacher is None else teacher).detach()
            for t in {t for those in teaching.values() for t in those}
        }
        answers = {t: F.softmax(source / self.temperature, dim=-1) for t, source in sources.items()}
        self.limit = config.limit_for(logits[exits[0]].shape[1])
        self.confidence = self.unadjusted = None
        if answers:
            self.confidence = teachers_confidence(list(answers.values()), config.confidence)
            plain = [F.softmax(source, dim=-1) for source in sources.values()]
            self.unadjusted = teachers_confidence(plain, config.confidence)
        scale = config.weight * self.temperature**2
        zero = logits[exits[0]].new_zeros(())
        terms, divergences = [zero] * len(exits), [zero] * len(exits)
        for index, (m, those) in enumerate(teaching.items()):
            if those:
                student = F.log_softmax(logits[m] / self.temperature, dim=-1)
                terms[index] = (
                    scale * torch.stack([_divergence(answers[t], student, config.divergence) for t in those]).mean()
                )
                divergences[index] = torch.stack(
                    [_divergence(answers[t], student.detach(), "kl") for t in those]
                ).mean()
        return torch.stack(terms), torch.stack(divergences)


def teachers_confidence(answers: Sequence[Tensor], kind: Confidence) -> Tensor:
    """How sure teachers are, averaged over the batch, of their probabilities (B, C): see :class:`Distillation`."""
    if kind == "mean_of_max":
        return torch.stack([answer.amax(-1).mean() for answer in answers]).mean()
    mean: Tensor = sum(answers[1:], start=answers[0]) / len(answers)
    return mean.amax(-1).mean()


def _divergence(teacher: Tensor, student: Tensor, kind: Divergence) -> Tensor:
    """Mean cross-entropy or KL divergence of a student's log-probabilities from a teacher's probabilities."""
    cross = -(teacher * student).sum(-1).mean()
    return cross if kind == "cross_entropy" else cross + torch.special.xlogy(teacher, teacher).sum(-1).mean()
