"""``ExitOutputs``: what every exit said about every sample. All of evaluation starts here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from exitkit.batches import check_labels
from exitkit.criteria import scores
from exitkit.errors import ExitkitError
from exitkit.evaluation.curve import Curve
from exitkit.files import replacing

_SETTINGS: dict[str, Callable[[str], Any]] = {"backbone_macs": float, "criterion": str, "times": int, "dtype": str}
_NORMALISED = 1e-5
_CHUNK = 1024
"""Samples that are looked at together: what is computed on the way is this much and no more."""


class ExitChoice(NamedTuple):
    """One exit for all samples, its accuracy, and its cost as a share of the backbone."""

    exit: int
    accuracy: float
    cost: float


@dataclass(frozen=True, eq=False)
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

    Raises:
        ExitkitError: shapes that do not fit together, NaN, labels out of range, or costs that fall.
    """

    log_probs: Tensor
    labels: Tensor | None
    macs: Tensor
    backbone_macs: float
    criterion: str = "confidence"
    hashes: Tensor | None = None
    dtype: str = "float32"

    measure: ClassVar[str] = "accuracy"
    _format: ClassVar[str] = "exitkit-outputs-1"

    def __post_init__(self) -> None:
        log_probs = self._checked(torch.as_tensor(self.log_probs).detach().cpu())
        object.__setattr__(self, "log_probs", log_probs)
        macs = torch.as_tensor(self.macs, dtype=torch.float64).detach().cpu().contiguous()
        rising = macs.shape == log_probs.shape[1:2] and bool((macs.diff() >= 0).all())
        if not rising or not bool((macs > 0).all()) or not bool(macs.isfinite().all()):
            raise ExitkitError(
                f"macs={macs.tolist()} must hold one positive cost per exit, {log_probs.shape[1]} of them, none below the "
                "one before it"
            )
        object.__setattr__(self, "macs", macs)
        if not 0 < self.backbone_macs < float("inf"):
            raise ExitkitError(
                f"backbone_macs={self.backbone_macs!r} must be positive: MACs of the unmodified backbone"
            )
        if self.labels is not None:
            labels = check_labels(self.labels, log_probs.shape[2], log_probs.shape[0]).cpu().contiguous()
            object.__setattr__(self, "labels", labels)
        if self.hashes is not None and (self.hashes.shape != log_probs.shape[:1] or self.hashes.dtype != torch.int64):
            raise ExitkitError(
                f"hashes have dtype {self.hashes.dtype} and shape {tuple(self.hashes.shape)}; expected int64 of shape "
                f"({len(log_probs)},), as exitkit.evaluation.content_hashes(loader) gives them"
            )

    def __len__(self) -> int:
        return len(self.log_probs)

    def __getitem__(self, rows: slice | Tensor | NDArray[Any]) -> ExitOutputs:
        """Some of the samples: ``outputs[:2000]``, a mask or indices; this is how one collection becomes several splits.

        Raises:
            ExitkitError: no sample is left.
        """
        return replace(
            self,
            log_probs=self.log_probs[rows],
            labels=None if self.labels is None else self.labels[rows],
            hashes=None if self.hashes is None else self.hashes[rows],
        )

    def chunks(self) -> Iterator[Tensor]:
        """The log-probabilities in float32, normalised, some samples (n, M+1, C) at a time, in order."""
        for rows in self.log_probs.split(_CHUNK):
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
        if self.labels is None:
            raise ExitkitError(
                "labels=None: accuracy needs labels. To measure agreement with the full model instead, use "
                "outputs.against_backbone()"
            )
        return self.answers == self.labels[:, None]

    def against_backbone(self) -> ExitOutputs:
        """The same outputs with the full model's answers as labels: accuracy is then agreement with it."""
        return replace(self, labels=self.answers[:, -1])

    def calibrated(self, temperatures: Sequence[float]) -> ExitOutputs:
        """The outputs with each exit's logits divided by its temperature (:func:`exitkit.evaluation.fit_temperatures`).

        Answers stay the same; scores, and so thresholds, do not.

        Raises:
            ExitkitError: another number than one per exit and one for the backbone, or one that is not positive.
        """
        divisors = torch.as_tensor(temperatures, dtype=torch.float32)
        if divisors.shape != self.macs.shape or not bool(((divisors > 0) & divisors.isfinite()).all()):
            raise ExitkitError(
                f"temperatures={list(temperatures)!r} must be {len(self.macs)} positive numbers, one per exit and the "
                "backbone's last"
            )
        return replace(self, log_probs=_by_chunks(self.log_probs, lambda rows: rows / divisors[:, None]))

    def accuracy(self) -> NDArray[np.float64]:
        """(M+1,): accuracy of each exit over all samples; the backbone's is last."""
        accuracy: NDArray[np.float64] = self.correct.double().mean(0).numpy()
        return accuracy

    def scores(self, criterion: str | None = None) -> Tensor:
        """(N, M+1): how sure each exit is; a sample leaves at the first exit whose score is strictly above τ."""
        return torch.cat([scores(rows, criterion or self.criterion) for rows in self.chunks()])

    def exits_at(self, threshold: float | Sequence[float], criterion: str | None = None) -> NDArray[np.int64]:
        """(N,): the exit at which each sample leaves, for one τ or one per exit; M where no exit before it is sure enough.

        Raises:
            ExitkitError: no numbers, or another number of them than 1 or M.
        """
        try:
            taus = torch.as_tensor(threshold, dtype=torch.float64)  # in float32 τ would be rounded
        except (TypeError, ValueError, RuntimeError) as error:
            raise ExitkitError(
                f"threshold is {type(threshold).__name__}, no number: give one τ, or one per exit, such as "
                "choose_threshold(...).threshold"
            ) from error
        if tuple(taus.shape) not in ((), (len(self.macs) - 1,)):
            raise ExitkitError(
                f"threshold has shape {tuple(taus.shape)}; give one τ, or one for each of the {len(self.macs) - 1} exits"
            )
        sure = self.scores(criterion)[:, :-1].double() > taus
        exits: NDArray[np.int64] = torch.where(sure.any(1), sure.int().argmax(1), sure.shape[1]).numpy()
        return exits

    def exit_rates(self, threshold: float | Sequence[float], criterion: str | None = None) -> NDArray[np.float64]:
        """(M+1,): share of the samples that leave at each exit."""
        exits = self.exits_at(threshold, criterion)
        return np.bincount(exits, minlength=len(self.macs)) / len(exits)

    def curve(self, criterion: str | None = None, *, milliseconds: Sequence[float] | None = None) -> Curve:
        """Accuracy and average cost at every distinct threshold.

        Args:
            criterion: the score; by default that of these outputs.
            milliseconds: (M+1,) measured time to answer at each exit; costs are then shares of the last one instead of the
                backbone's MACs, and ``at_budget(ms=3.0)`` is available.

        Raises:
            ExitkitError: no labels, no exits before the backbone, or times that fall or are of another number.
        """
        if len(self.macs) < 2:
            raise ExitkitError(
                "log_probs holds the backbone alone, shape (N, 1, C); a curve needs at least one exit before it"
            )
        scores, correct = self.scores(criterion)[:, :-1].numpy(), self.correct.numpy()
        prices, whole = self._prices(milliseconds)
        made = Curve.of(scores, correct, prices, whole)
        return made if milliseconds is None else replace(made, milliseconds=whole)

    def _prices(self, milliseconds: Sequence[float] | None) -> tuple[NDArray[np.float64], float]:
        """(M+1,) prices of the exits, and what a cost of 1 stands for: MACs, or measured times."""
        if milliseconds is None:
            return self.macs.numpy(), self.backbone_macs
        times = np.asarray(milliseconds, dtype=np.float64)
        if times.shape != (len(self.macs),) or not (times > 0).all() or not (np.diff(times) >= 0).all():
            raise ExitkitError(
                f"milliseconds={list(milliseconds)!r} must hold {len(self.macs)} positive times, to answer at each exit and "
                "at the backbone, none below the one before it"
            )
        return times, float(times[-1])

    def best_exit(self, budget: float = 1.0) -> ExitChoice:
        """The exit to stop every sample at when the cost of one is limited (Phuong & Lampert 2019, section 3.2).

        Choose on held-out samples. Costs include earlier heads, without which independent exits would cost a little less.

        Args:
            budget: the most that one sample may cost, as a share of the backbone; of equally accurate exits the cheapest.

        Raises:
            ExitkitError: no exit costs so little, or no labels.
        """
        within = self.costs <= budget
        if not within.any():
            raise ExitkitError(
                f"budget={budget!r} cannot be kept: it is a share of the backbone's cost, and exit 0 already costs "
                f"{self.costs[0]:.3f}"
            )
        accuracy = self.accuracy()
        exit_ = int(np.where(within, accuracy, -1).argmax())
        return ExitChoice(exit_, float(accuracy[exit_]), float(self.costs[exit_]))

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
        tensors = {"log_probs": log_probs, "macs": self.macs}
        if self.labels is not None:
            tensors["labels"] = self.labels
        if self.hashes is not None:
            tensors["hashes"] = self.hashes.contiguous()
        settings = {field.name: str(getattr(self, field.name)) for field in fields(self) if field.name in _SETTINGS}
        header = {"format": self._format, **settings}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ExitkitError: no such file, a damaged one, or one that exitkit did not write.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header: dict[str, Any] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
        except (OSError, SafetensorError) as error:
            raise ExitkitError(f"path={str(path)!r} cannot be read as saved outputs: {error}") from error
        if header.get("format") != cls._format:
            raise ExitkitError(
                f"path={str(path)!r} is no file of saved outputs for {cls.__name__} (its format is {header.get('format')!r}); "
                "write one with outputs.save(path)"
            )
        settings = {name: read(header[name]) for name, read in _SETTINGS.items() if name in header}
        return cls(
            tensors["log_probs"], tensors.get("labels"), tensors["macs"], hashes=tensors.get("hashes"), **settings
        )

    @staticmethod
    def _checked(given: Tensor) -> Tensor:
        """Checked log-probabilities: float16 as it is, else normalised float32; rows that are normalised keep every bit."""
        if given.dim() != 3 or not given.is_floating_point() or 0 in given.shape or given.shape[2] < 2:
            raise ExitkitError(
                f"log_probs has dtype {given.dtype} and shape {tuple(given.shape)}; expected floating point of shape "
                "(samples, exits + 1, classes), with at least two classes"
            )
        normaliser = torch.cat([rows.float().logsumexp(-1, keepdim=True) for rows in given.split(_CHUNK)])
        broken = ~normaliser.isfinite().squeeze(-1)
        if bool(broken.any()):
            exit_ = int(broken.any(0).int().argmax())
            raise ExitkitError(
                f"log_probs holds NaN, infinite or all-impossible rows: exit {exit_} on {int(broken[:, exit_].sum())} of "
                f"{len(given)} samples. The model overflowed there; check its inputs (normalised?) and run in float32"
            )
        normalised = normaliser.abs() < _NORMALISED
        if given.dtype == torch.float16 or (given.dtype == torch.float32 and bool(normalised.all())):
            return given.contiguous()
        log_probs = torch.empty(given.shape, dtype=torch.float32)
        parts = (tensor.split(_CHUNK) for tensor in (log_probs, given, normaliser, normalised))
        for kept, rows, total, fine in zip(*parts, strict=True):
            kept[:] = torch.where(fine, rows.float(), rows.float() - total)
        return log_probs


def _by_chunks(log_probs: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of the same shape and dtype, computed in float32 some samples at a time."""
    changed = torch.empty_like(log_probs)
    for kept, rows in zip(changed.split(_CHUNK), log_probs.split(_CHUNK), strict=True):
        kept[:] = F.log_softmax(change(rows.float()), dim=-1)
    return changed
