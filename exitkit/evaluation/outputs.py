"""``ExitOutputs``: what every exit said about every sample. All of evaluation starts here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from exitkit.common.batches import check_labels
from exitkit.common.checks import check, checked_each
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.evaluation.budgets import BudgetPoint, ExitChoice, best_within
from exitkit.evaluation.curve import Curve, traced
from exitkit.evaluation.exit_times import ExitTimes, checked_times
from exitkit.evaluation.fields import check_hashes, check_top, checked_fitted_on, checked_macs
from exitkit.evaluation.files import OUTPUTS, load_fields, save_fields
from exitkit.evaluation.log_probs import CHUNK, by_chunks, normalised
from exitkit.methods.criteria import Criterion, UnknownCriterionError, as_criterion
from exitkit.methods.policy import (
    ExitPolicy,
    Precision,
    Temperatures,
    Threshold,
    as_policy,
    check_same_scores,
    checked_temperatures,
)
from exitkit.methods.presets import check_task


@dataclass(frozen=True, eq=False, repr=False)
class ExitOutputs:
    """Predictions of M exits and the backbone (exit M) on N samples.

    Attributes:
        log_probs: (N, M+1, C), float32; logits or log-probabilities are given, normalised ones are kept. float16 stays
            float16, for half the memory, and is normalised in float32 where it is used (:meth:`chunks`).
        labels: (N,) int64, or None when there are none (then nothing that needs accuracy is available).
        macs: (M+1,) float64: MACs per sample to answer at each exit, earlier heads included.
        backbone_macs: MACs per sample of the unmodified backbone; costs are shares of it.
        criterion: the score used unless another is asked for.
        hashes: (N,) int64, the samples' content hashes (:func:`exitkit.evaluation.content_hashes`), or None.
        dtype: what the model computed in, ``"float32"``; a threshold is safest used in the same.
        temperatures: (M+1,) what each exit's logits were divided by (:meth:`calibrated`), or None; policies found on these
            outputs have them.
        weights: what tells the backbone from others of its architecture, or None.
            See :func:`exitkit.surgery.fingerprint.fingerprint_of`.
        timings: what answering takes on some devices (:meth:`timed`), for budgets in milliseconds.
        fitted_on: (K,) int64, content hashes of the samples that the temperatures were fitted on, or None.

    Raises:
        ArgumentError: shapes that do not fit together, NaN, labels out of range, costs that fall, or an unknown dtype.
    """

    log_probs: Tensor
    labels: Tensor | None
    macs: Tensor
    backbone_macs: float
    criterion: str = "confidence"
    hashes: Tensor | None = None
    dtype: str = "float32"
    temperatures: Temperatures | None = None
    weights: str | None = None
    timings: tuple[ExitTimes, ...] = ()
    fitted_on: Tensor | None = None

    measure: ClassVar[str] = "accuracy"
    _format: ClassVar[str] = OUTPUTS

    def __post_init__(self) -> None:
        log_probs = self._checked(torch.as_tensor(self.log_probs).detach().cpu())
        samples, exits, classes = log_probs.shape
        check("dtype", self.dtype, Precision)
        if not 0 < self.backbone_macs < float("inf"):
            raise ArgumentError(
                f"backbone_macs={self.backbone_macs!r} must be positive: MACs of the unmodified backbone"
            )
        for one in self.timings:
            checked_times(one.milliseconds, exits)
        check_hashes(self.hashes, samples)
        given, temperatures = self.labels, self.temperatures
        checked = {
            "log_probs": log_probs,
            "labels": None if given is None else check_labels(given, classes, samples).cpu().contiguous(),
            "macs": checked_macs(self.macs, exits),
            "criterion": as_criterion(self.criterion).name,
            "temperatures": None if temperatures is None else checked_temperatures(temperatures, exits),
            "fitted_on": checked_fitted_on(self.fitted_on, temperatures is not None),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.log_probs)

    def __repr__(self) -> str:
        costs = ", ".join(f"{cost:.1%}" for cost in self.costs)
        classes = self.log_probs.shape[2]
        return (
            f"{type(self).__name__}({counted(len(self), 'sample')}{f', {classes} classes' if classes > 1 else ''}"
            f"{', no labels' if self.labels is None else ''}, cost of each exit: {costs}, criterion={self.criterion!r})"
        )

    def __getitem__(self, rows: slice | Tensor | NDArray[Any]) -> ExitOutputs:
        """Some of the samples: ``outputs[:2000]``, a mask or indices; this is how one collection becomes several splits.

        Raises:
            ArgumentError: no sample is left.
        """
        return replace(
            self,
            log_probs=self.log_probs[rows],
            labels=None if self.labels is None else self.labels[rows],
            hashes=None if self.hashes is None else self.hashes[rows],
        )

    def chunks(self) -> Iterator[Tensor]:
        """The log-probabilities in float32, normalised, some samples (n, M+1, C) at a time, in order."""
        for rows in self.log_probs.split(CHUNK):
            yield rows if rows.dtype == torch.float32 else F.log_softmax(rows.float(), dim=-1)

    @property
    def answers(self) -> Tensor:
        """(N, M+1) int64: the class that each exit gives each sample."""
        return torch.cat([rows.argmax(-1) for rows in self.chunks()])

    @property
    def costs(self) -> NDArray[np.float64]:
        """(M+1,): cost to answer at each exit, as a share of the unmodified backbone."""
        costs: NDArray[np.float64] = self.macs.numpy() / self.backbone_macs
        return costs

    @property
    def correct(self) -> Tensor:
        """(N, M+1) bool: which exits are right about which samples."""
        return self.answers == self._labels()[:, None]

    def correct_among(self, top: int) -> Tensor:
        """(N, M+1) bool: which exits have the label among their ``top`` likeliest classes.

        Of equally likely classes those of lower numbers come first.

        Raises:
            ArgumentError: no labels, or ``top`` is not from 1 to the number of classes.
        """
        check_top(top, self.log_probs.shape[2])
        if top == 1:
            return self.correct
        parts = []
        for rows, labels in zip(self.chunks(), self._labels().split(CHUNK), strict=True):
            own = rows.gather(-1, labels[:, None, None].expand(-1, rows.shape[1], 1))
            before = torch.arange(rows.shape[2]) < labels[:, None, None]
            parts.append(((rows > own) | ((rows == own) & before)).sum(-1) < top)
        return torch.cat(parts)

    def _labels(self) -> Tensor:
        if self.labels is None:
            raise ArgumentError(
                "labels=None: accuracy needs labels. To measure agreement with the full model instead, use "
                "outputs.against_backbone()"
            )
        return self.labels

    def against_backbone(self) -> ExitOutputs:
        """The same outputs with the full model's answers as labels: accuracy is then agreement with it."""
        return replace(self, labels=self.answers[:, -1])

    def calibrated(self, temperatures: Sequence[float], fitted_on: ExitOutputs | Tensor | None = None) -> Self:
        """The outputs with each exit's logits divided by its temperature (:func:`exitkit.evaluation.fit_temperatures`).

        Answers stay the same; scores, and so thresholds, do not: a policy found on the result has these temperatures, and
        whatever takes it (:func:`exitkit.compile`, ``export``, ``save_pretrained``) applies them.

        Args:
            temperatures: (M+1,), the backbone's last.
            fitted_on: the outputs that they were fitted on, or these samples' content hashes; kept and saved with the result,
                so that :func:`exitkit.choose_threshold` refuses to calibrate on the same samples.

        Raises:
            ArgumentError: another number than one per exit and one for the backbone, one that is not positive, outputs that
                have temperatures already.
        """
        given = checked_temperatures(temperatures, len(self.macs))
        if self.temperatures is not None:
            raise ArgumentError(
                f"these outputs were divided by temperatures={list(self.temperatures)} already; calibrate those that they "
                "were made of"
            )
        divisors = torch.tensor(given, dtype=torch.float32)[:, None]
        log_probs = by_chunks(self.log_probs, lambda rows: rows / divisors)
        hashes = fitted_on.hashes if isinstance(fitted_on, ExitOutputs) else fitted_on
        return replace(self, log_probs=log_probs, temperatures=given, fitted_on=hashes)

    def timed(self, times: Iterable[ExitTimes]) -> Self:
        """The same outputs with measured times (:func:`exitkit.time_exits`), newer ones in place of older.

        ``outputs.curve().at_budget(ms=3.0, device="cuda", batch=64)`` then finds a threshold for a time; they are saved too.

        Raises:
            ArgumentError: not times, or times of another number of exits.
        """
        given = checked_each("times", times, ExitTimes, "give what exitkit.time_exits returned")
        merged = {one.place: one for one in (*self.timings, *given)}
        return replace(self, timings=tuple(merged.values()))

    def accuracy(self, top: int = 1) -> NDArray[np.float64]:
        """(M+1,): accuracy of each exit over all samples, the backbone's last; with ``top`` as :meth:`correct_among`."""
        accuracy: NDArray[np.float64] = self.correct_among(top).double().mean(0).numpy()
        return accuracy

    def scores(self, criterion: str | Criterion | None = None) -> Tensor:
        """(N, M+1) float64: how sure each exit is; a sample leaves at the first exit whose score is strictly above τ.

        Raises:
            ArgumentError: an unknown criterion, or one for a regression where there are classes, or the other way round.
        """
        scored = as_criterion(criterion or self.criterion)
        check_task(scored, self.log_probs.shape[2])
        return torch.cat([scored.score(rows) for rows in self.chunks()])

    def policy(self, threshold: Threshold, criterion: str | Criterion | None = None) -> ExitPolicy:
        """What a threshold means for these outputs: their criterion and temperatures, unless it is a policy itself.

        Raises:
            ArgumentError: not numbers, another number of them than 1 or M, another criterion than a policy's, no exits.
        """
        if len(self.macs) < 2:
            raise ArgumentError("outputs hold the backbone alone; a threshold needs at least one exit before it")
        scored = as_criterion(criterion or self.criterion)
        never = (scored.highest(len(self.macs) - 1),) * (len(self.macs) - 1)
        return as_policy(threshold, ExitPolicy(never, scored.name, self.temperatures, self.dtype), criterion)

    def under(self, policy: ExitPolicy) -> ExitOutputs:
        """These outputs with a policy's temperatures, where they have none.

        Raises:
            ArgumentError: something else than a policy; one without temperatures or with others, where these outputs have
                some; a guarantee for another precision than these outputs', on which it says nothing.
        """
        check("policy", policy, ExitPolicy, "for plain numbers use outputs.at(threshold)")
        outputs = self if policy.temperatures is None or self.temperatures else self.calibrated(policy.temperatures)
        check_same_scores(policy, outputs.policy(policy.thresholds, policy.criterion))
        return outputs

    def exits_at(self, threshold: Threshold, criterion: str | Criterion | None = None) -> NDArray[np.int64]:
        """(N,): the exit at which each sample leaves; M where no exit before it is sure enough.

        Args:
            threshold: τ, one per exit, or a policy, whose temperatures are applied where these outputs have none.
            criterion: the score that plain numbers are compared with; by default that of these outputs.

        Raises:
            ArgumentError: as :meth:`policy` and :meth:`under`.
        """
        policy = self.policy(threshold, criterion)
        scores = self.under(policy).scores(policy.criterion)[:, :-1]
        sure = scores > torch.tensor(policy.thresholds, dtype=torch.float64)
        exits: NDArray[np.int64] = torch.where(sure.any(1), sure.int().argmax(1), sure.shape[1]).numpy()
        return exits

    def at(self, threshold: Threshold, criterion: str | Criterion | None = None, *, top: int = 1) -> BudgetPoint:
        """The operating point: accuracy and average cost where samples leave as a threshold or policy says.

        Raises:
            ArgumentError: as :meth:`exits_at` and :meth:`correct_among`.
        """
        exits = self.exits_at(threshold, criterion)
        cost = float(self.macs.numpy()[exits].sum() / (len(self) * self.backbone_macs))  # to the bit as the curve's
        return BudgetPoint(self.policy(threshold, criterion), self._reached(exits, top), cost)

    def _reached(self, exits: NDArray[np.int64], top: int) -> float:
        """What :meth:`at` calls accuracy, where each sample is answered by its exit (N,)."""
        return float(self.correct_among(top).numpy()[np.arange(len(self)), exits].mean())

    def exit_rates(self, threshold: Threshold, criterion: str | Criterion | None = None) -> NDArray[np.float64]:
        """(M+1,): share of the samples that leave at each exit."""
        exits = self.exits_at(threshold, criterion)
        return np.bincount(exits, minlength=len(self.macs)) / len(exits)

    def curve(
        self, criterion: str | Criterion | None = None, *, top: int = 1, milliseconds: Sequence[float] | None = None
    ) -> Curve:
        """Accuracy and average cost at every distinct threshold.

        Args:
            criterion: the score; by default that of these outputs.
            top: a sample counts as right where its label is among so many likeliest classes (:meth:`correct_among`).
            milliseconds: (M+1,) measured time to answer at each exit; costs are then shares of the last one instead of the
                backbone's MACs, and ``at_budget(ms=3.0)`` is available.

        Raises:
            ArgumentError: no labels, no exits before the backbone, or times that fall or are of another number.
        """
        no_exit = self.policy(float("inf"), criterion)
        correct = self.correct_among(top).numpy().astype(np.int64)
        made = self._traced(no_exit, correct, lambda right: right / len(self), milliseconds)
        return made if top == 1 else replace(made, measure=f"top-{top} accuracy")

    def _traced(
        self,
        no_exit: ExitPolicy,
        values: NDArray[Any],
        measured: Callable[[NDArray[Any]], NDArray[np.float64]],
        milliseconds: Sequence[float] | None,
    ) -> Curve:
        """The curve of a measure of the sums of ``values`` (N, M+1, …), in MACs or in the times that are given."""
        scores = self.scores(no_exit.criterion)[:, :-1].numpy()
        if milliseconds is None:
            return traced(scores, values, measured, no_exit, self.macs.numpy(), self.backbone_macs, self.timings)
        times = checked_times(milliseconds, len(self.macs))
        whole = float(times[-1])
        return replace(traced(scores, values, measured, no_exit, times, whole), milliseconds=whole)

    def best_exit(self, budget: float = float("inf"), *, top: int = 1) -> ExitChoice:
        """The exit to stop every sample at when the cost of one is limited (Phuong & Lampert 2019, section 3.2).

        Choose on held-out samples. Costs include earlier heads, without which independent exits would cost a little less.

        Args:
            budget: what one sample's cost must stay under, as a share of the backbone, as for ``curve().at_budget``; of
                equally accurate exits the cheapest.
            top: as for :meth:`curve`.

        Raises:
            ArgumentError: a budget that is not a positive number or is a percentage, no exit costs so little, or no labels.
        """
        return best_within(self.costs, self.accuracy(top), budget)

    def hindsight_improvability(self) -> NDArray[np.float64]:
        """(M+1,): share of each exit's mistakes that some earlier exit had right (Zero Time Waste, section 4.2).

        The paper's formula prints an intersection over earlier exits; its text, and this, take the union ("any of the
        previous ICs"). 0 for the first exit and for an exit without mistakes.
        """
        right = self.correct
        known_before = torch.cat([torch.zeros_like(right[:, :1]), right.cummax(1).values[:, :-1]], 1)
        mistakes = (~right).sum(0)
        improvable = (~right & known_before).sum(0)
        share: NDArray[np.float64] = (improvable.double() / mistakes.clamp(min=1)).numpy()
        return share

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write to a safetensors file; an existing one is replaced only by a complete one.

        Args:
            path: the file; its folder is made where it does not exist.
            half: log-probabilities in float16: half the size. Scores stay within 5e-4; answers change where two classes
                are as close as that.
        """
        log_probs = self.log_probs.half() if half else self.log_probs
        save_fields(vars(self) | {"log_probs": log_probs}, path, self._format)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: no such file, a damaged one, or one that exitkit did not write.
            ArgumentError: outputs of the other kind, or of a criterion whose class is not imported.
        """
        fields = load_fields(path, cls._format, cls.__name__)
        try:
            return cls(**fields)
        except UnknownCriterionError:  # not damage: it says what to import
            raise
        except (ExitkitError, RuntimeError, TypeError, IndexError) as error:  # values that fit no outputs
            raise FileError(f"path={str(path)!r} is damaged: {str(error)[:240]}") from error

    @staticmethod
    def _checked(given: Tensor) -> Tensor:
        return normalised(given)


def check_outputs(outputs: object, name: str = "outputs") -> None:
    """Refuse what is not outputs.

    Raises:
        ArgumentError: anything else than :class:`ExitOutputs`.
    """
    if not isinstance(outputs, ExitOutputs):
        remedy = getattr(outputs, "why_not_outputs", "give what exitkit.collect(ee, loader) returned")
        raise ArgumentError(f"{name} is {type(outputs).__name__}; {remedy}")
