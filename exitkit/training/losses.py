"""Losses as data: what each exit is asked for, how the exits are weighed, and which exit teaches which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from exitkit.common.checks import Bounds, NonNegative, Positive, Share, check, check_fields
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.fingerprint import weights_digest
from exitkit.training.regimes import Phase

Weights = Literal["constant", "increasing", "decreasing", "pabee", "sdn"]
Teachers = Literal["last", "later", "next"]
Reduction = Literal["sum", "mean"]
Divergence = Literal["cross_entropy", "kl"]
Confidence = Literal["max_of_mean", "mean_of_max"]

_LEAST, _MOST = 0.6, 1.4
_RAMP_START = 0.01


@dataclass(frozen=True)
class Distillation:
    """Exits learn from later exits, or from another model (Phuong and Lampert 2019, equations 2 to 4).

    A student's term is τ² · H(softmax(z_t / τ), softmax(z / τ)), averaged over its teachers, through which no gradient flows.
    It needs no labels: samples without one take this term alone (equation 6).

    Attributes:
        teachers: ``"last"``: the backbone's own exit, ``"later"``: all later exits, ``"next"``: the next one; a mapping from
            exits to their teachers; or a model that is called with the same inputs, frozen, and teaches every exit.
        weight: of the distillation term, beside 1 for the classification term.
        temperature: τ, at the beginning.
        confidence_limit: μ: when the teachers' confidence at τ exceeds it in a batch, τ grows (algorithm 1); None keeps τ. It
            must be above 1 / classes. ``"auto"`` is halfway from there to 1: 0.75 for two classes, 0.55 for ten. The paper
            has 0.5 for CIFAR-100 and 0.1 for ImageNet.
        confidence: of several teachers, averaged over the batch: ``"max_of_mean"``, the largest probability of their mean
            (algorithm 1, line 11), or ``"mean_of_max"``, the mean of each one's largest (section 3.4 in words). Teachers
            that disagree raise the second alone.
        multiplier: τ*, by which τ grows.
        divergence: ``"kl"`` subtracts the teacher's entropy: the same gradients, and 0 for a perfect copy. With
            ``confidence_limit=None`` and no labels this is behavioural cloning (Zero Time Waste, appendix A.2).
    """

    teachers: Teachers | Mapping[int, Sequence[int]] | nn.Module = "last"
    weight: Positive = 1.0
    temperature: Positive = 1.0
    confidence_limit: Share | Literal["auto"] | None = "auto"
    confidence: Confidence = "max_of_mean"
    multiplier: Annotated[float, Bounds(above=1)] = 1.05
    divergence: Divergence = "cross_entropy"

    def __post_init__(self) -> None:
        if not isinstance(self.teachers, Mapping):
            check("teachers", self.teachers, Teachers | nn.Module, "or give a mapping from exits to exits")
        check_fields(self)

    def limit_for(self, num_classes: int) -> float | None:
        """μ for a model of so many classes."""
        return (1 + 1 / num_classes) / 2 if self.confidence_limit == "auto" else self.confidence_limit

    def of(self, student: int, last: int) -> tuple[int, ...]:
        """The exits that teach an exit, where ``last`` is the backbone's. Empty where a model teaches."""
        if isinstance(self.teachers, nn.Module):
            return ()
        if isinstance(self.teachers, Mapping):
            return tuple(self.teachers.get(student, ()))
        later = tuple(range(student + 1, last + 1))
        return {"last": later[-1:], "later": later, "next": later[:1]}[self.teachers]


@dataclass(frozen=True)
class Loss:
    """What the exits minimise: Σ_m w_m · (classification_m + distillation_m).

    The classification term is the cross-entropy with class indices or probabilities; a model of one output takes the
    squared error.

    Attributes:
        weights: one number per exit, the backbone's last, or

            * ``"constant"``: 1 each;
            * ``"increasing"``, ``"decreasing"``: in even steps from 0.6 to 1.4 or back, of mean 1 (the schemes that Kubaty
              et al., section 4.4, take over from Han et al. 2022; neither gives the ends, these are ours);
            * ``"pabee"``: proportional to m + 1, of mean 1 (Zhou et al. 2020; theirs is ``reduction="mean"``);
            * ``"sdn"``: min(C_m, 0.01 + e · C_m / E) in epoch e (from 0) of E, C_m being the share of the backbone's MACs
              before exit m, and 1 for the backbone (Kaya et al. 2019).
        reduction: the sum over the exits that count, or their mean.
        label_smoothing: as for :func:`torch.nn.functional.cross_entropy`.
        distillation: how exits learn from one another.
        gradient_equilibrium: divide the gradient of every backbone stage by the number of exits behind it that count, so
            that it does not grow with them. The same as rescaling by 1 / (n − i) before exit i of n and by n − i − 1
            behind it (Li et al. 2019, section 3.1): along the way to an earlier stage j these factors telescope to
            1 / (n − j) for every later exit.
    """

    weights: Weights | Sequence[float] = "constant"
    reduction: Reduction = "sum"
    label_smoothing: Annotated[float, Bounds(least=0, below=1)] = 0.0
    distillation: Distillation | None = None
    gradient_equilibrium: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weights, str) or not isinstance(self.weights, Sequence):
            check("weights", self.weights, Weights, "or give one number per exit")
        else:
            for weight in self.weights:
                check("weights", weight, NonNegative, "give one number per exit")
        check_fields(self)

    def weights_at(self, progress: float, shares: Sequence[float]) -> tuple[float, ...]:
        """The weight of each exit, the backbone's last, when a share ``progress`` of the epochs is over.

        ``shares``: the share of the backbone's MACs before each exit but the last.
        """
        count = len(shares) + 1
        if not isinstance(self.weights, str):
            return tuple(float(weight) for weight in self.weights)
        if self.weights == "sdn":
            return (*(min(share, _RAMP_START + progress * share) for share in shares), 1.0)
        if self.weights == "pabee":
            return tuple(2 * (m + 1) / (count + 1) for m in range(count))
        rising = tuple(_LEAST + (_MOST - _LEAST) * m / (count - 1) for m in range(count))
        return {"constant": (1.0,) * count, "increasing": rising, "decreasing": rising[::-1]}[self.weights]

    def describe(self) -> dict[str, Any]:
        """In plain values, for a checkpoint to compare."""
        distillation = None if self.distillation is None else dict(vars(self.distillation))
        if distillation is not None:
            teachers = distillation["teachers"]
            if isinstance(teachers, nn.Module):
                distillation["teachers"] = f"{type(teachers).__name__} {weights_digest(teachers)}"
            elif isinstance(teachers, Mapping):
                distillation["teachers"] = {student: list(those) for student, those in teachers.items()}
        weights = self.weights if isinstance(self.weights, str) else [float(weight) for weight in self.weights]
        return {**vars(self), "weights": weights, "distillation": distillation}


def check_loss(loss: Loss, phases: Sequence[Phase], model: MultiExitModel) -> None:
    """Whether a loss can be asked of this model in these phases.

    Raises:
        ArgumentError: another number of weights than exits, weights of 0 only, options without meaning for a regression,
            gradient equilibrium with a frozen backbone, teachers that are not other exits, exits without any teacher, or a
            confidence limit of at most 1 / classes.
    """
    last = len(model.classifiers)
    if not isinstance(loss.weights, str) and len(loss.weights) != last + 1:
        raise ArgumentError(
            f"weights={list(loss.weights)} has {len(loss.weights)} numbers for {last + 1} exits; give one for each of "
            f"{', '.join(exit_.name for exit_ in model.exits)} (the backbone's too where it is frozen and does not count)"
        )
    for number, phase in enumerate(phases, 1):
        if not isinstance(loss.weights, str) and not any(loss.weights[m] for m in phase.exits):
            raise ArgumentError(
                f"weights={list(loss.weights)} are 0 for every exit that counts in phase {number} {phase.exits}; give one of "
                "them a weight above 0"
            )
    if loss.gradient_equilibrium and not any(phase.stages for phase in phases):
        raise ArgumentError(
            "gradient_equilibrium=True rescales the backbone's gradients, but the regime freezes the backbone; use "
            "regime='mixed' or leave it out"
        )
    if model.num_classes == 1:
        _check_regression(loss)
    elif loss.distillation is not None:
        _check_teachers(loss.distillation, phases, model, last)


def _check_regression(loss: Loss) -> None:
    reason = "the model has one output and is trained as a regression"
    if loss.label_smoothing:
        raise ArgumentError(f"label_smoothing={loss.label_smoothing} needs classes, but {reason}")
    if loss.distillation is not None:
        raise ArgumentError(f"distillation compares class probabilities, but {reason}")


def _check_teachers(distillation: Distillation, phases: Sequence[Phase], model: MultiExitModel, last: int) -> None:
    teachers, limit = distillation.teachers, distillation.limit_for(model.num_classes)
    if limit is not None and limit <= 1 / model.num_classes:
        raise ArgumentError(
            f"confidence_limit={limit} would let the temperature grow in every step: of {model.num_classes} classes the "
            f"likeliest has at least {1 / model.num_classes:.3g}; give more, 'auto', or None to keep the temperature"
        )
    if isinstance(teachers, nn.Module):
        own = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in own for parameter in teachers.parameters()):
            raise ArgumentError("teachers= is the trained model or a part of it; give a copy, or teachers='last'")
        return
    if isinstance(teachers, Mapping):
        for student, those in teachers.items():
            known = [t for t in range(last + 1) if t != student]
            if (
                student not in range(last + 1)
                or not isinstance(those, tuple | list)
                or any(t not in known for t in those)
            ):
                raise ArgumentError(
                    f"teachers maps exit {student!r} to {those!r}; give a tuple of other exits from 0 to {last}"
                )
    if not any(distillation.of(m, last) for phase in phases for m in phase.exits):
        counted = sorted({m for phase in phases for m in phase.exits})
        raise ArgumentError(
            f"teachers={teachers!r} gives none of the exits that count ({counted}) a teacher; train more exits, or give a "
            "mapping or a model as teachers="
        )
