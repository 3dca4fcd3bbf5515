"""Losses as data: what each exit is asked for, how the exits are weighed, and who teaches whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from exitkit.common.checks import is_number
from exitkit.common.errors import ArgumentError, unknown_name
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.fingerprint import weights_digest
from exitkit.training.regimes import Phase

Weights = Literal["constant", "increasing", "decreasing", "pabee", "sdn"]
Teachers = Literal["last", "later", "next"]
Reduction = Literal["sum", "mean"]
Divergence = Literal["cross_entropy", "kl"]

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
        confidence_limit: μ: when the teachers' mean confidence at τ exceeds it in a batch, τ grows (algorithm 1); None
            keeps τ. The paper has 0.5 for CIFAR-100, 0.1 for ImageNet. It must be above 1 / classes (two classes: above 0.5).
        multiplier: τ*, by which τ grows.
        divergence: ``"kl"`` subtracts the teacher's entropy: the same gradients, and 0 for a perfect copy. With
            ``confidence_limit=None`` and no labels this is behavioural cloning (Zero Time Waste, appendix A.2).
    """

    teachers: Teachers | Mapping[int, Sequence[int]] | nn.Module = "last"
    weight: float = 1.0
    temperature: float = 1.0
    confidence_limit: float | None = 0.5
    multiplier: float = 1.05
    divergence: Divergence = "cross_entropy"

    def __post_init__(self) -> None:
        if isinstance(self.teachers, str) and self.teachers not in get_args(Teachers):
            raise unknown_name("teachers", self.teachers, get_args(Teachers), "Or a mapping of exits, or a model.")
        if not isinstance(self.teachers, str | Mapping | nn.Module):
            raise ArgumentError(
                f"teachers={self.teachers!r} must be a name, a mapping from exits to exits, or a model"
            )
        if self.divergence not in get_args(Divergence):
            raise unknown_name("divergence", self.divergence, get_args(Divergence))
        for name, value in (("weight", self.weight), ("temperature", self.temperature)):
            if not is_number(value) or not 0 < value < float("inf"):
                raise ArgumentError(f"{name}={value!r} of the distillation must be greater than 0")
        limit = self.confidence_limit
        if limit is not None and (not is_number(limit) or not 0 < limit < 1):
            raise ArgumentError(f"confidence_limit={limit!r} must be between 0 and 1, or None")
        if not is_number(self.multiplier) or not 1 < self.multiplier < float("inf"):
            raise ArgumentError(f"multiplier={self.multiplier!r} must be greater than 1")

    def of(self, student: int, last: int) -> tuple[int, ...]:
        """The teachers of an exit, where ``last`` is the backbone's. Empty where a model teaches, or nobody."""
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
    label_smoothing: float = 0.0
    distillation: Distillation | None = None
    gradient_equilibrium: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            if self.weights not in get_args(Weights):
                raise unknown_name("weights", self.weights, get_args(Weights), "Or one number per exit.")
        elif not isinstance(self.weights, Sequence) or not all(
            is_number(weight) and 0 <= weight < float("inf") for weight in self.weights
        ):
            raise ArgumentError(f"weights={self.weights!r} must be a name or numbers of at least 0, one per exit")
        if self.reduction not in get_args(Reduction):
            raise unknown_name("reduction", self.reduction, get_args(Reduction))
        if not is_number(self.label_smoothing) or not 0 <= self.label_smoothing < 1:
            raise ArgumentError(f"label_smoothing={self.label_smoothing!r} must be at least 0 and below 1")
        if not isinstance(self.gradient_equilibrium, bool):
            raise ArgumentError(f"gradient_equilibrium={self.gradient_equilibrium!r} must be True or False")
        if self.distillation is not None and not isinstance(self.distillation, Distillation):
            raise ArgumentError(
                f"distillation={self.distillation!r} must be exitkit.training.Distillation(...) or None"
            )

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
        ExitkitError: another number of weights than exits, options without meaning for a regression, gradient equilibrium
            with a frozen backbone, weights of 0 only, teachers that are no other exit, nobody to learn from, or a confidence
            limit below any confidence.
    """
    last = len(model.classifiers)
    if not isinstance(loss.weights, str) and len(loss.weights) != last + 1:
        raise ArgumentError(
            f"weights={list(loss.weights)} has {len(loss.weights)} numbers, but there are {last + 1} exits: one for each of "
            f"{', '.join(exit_.name for exit_ in model.exits)} (a frozen backbone's does not count, but is written)"
        )
    for number, phase in enumerate(phases, 1):
        if not isinstance(loss.weights, str) and not any(loss.weights[m] for m in phase.exits):
            raise ArgumentError(
                f"weights={list(loss.weights)} are 0 for every exit that counts in phase {number} ({phase.exits}), so that "
                "nothing would learn; give one of them a weight above 0"
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
    reason = "the model has one output, which is trained as a regression by the squared error"
    if loss.label_smoothing:
        raise ArgumentError(f"label_smoothing={loss.label_smoothing} needs classes, but {reason}")
    if loss.distillation is not None:
        raise ArgumentError(f"distillation compares class probabilities, but {reason}")


def _check_teachers(distillation: Distillation, phases: Sequence[Phase], model: MultiExitModel, last: int) -> None:
    teachers, limit = distillation.teachers, distillation.confidence_limit
    if limit is not None and limit <= 1 / model.num_classes:
        raise ArgumentError(
            f"confidence_limit={limit} is never undercut: among {model.num_classes} classes the surest one has at least "
            f"{1 / model.num_classes:.3g}, and the temperature would grow in every step; give more, or None to keep it"
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
                    f"teachers maps exit {student!r} to {those!r}; give a tuple of exits from 0 to {last}, where none teaches "
                    "itself"
                )
    if not any(distillation.of(m, last) for phase in phases for m in phase.exits):
        counted = sorted({m for phase in phases for m in phase.exits})
        raise ArgumentError(
            f"distillation is asked for, but none of the exits that count ({counted}) has a teacher: teachers={teachers!r} "
            "gives them no later exit; train more exits, or give a mapping or a model as teachers="
        )
