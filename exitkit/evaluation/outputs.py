"""``ExitOutputs``: what every exit said about every sample. All of evaluation starts here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exitkit.batches import check_labels
from exitkit.criteria import scores
from exitkit.errors import ExitkitError
from exitkit.evaluation.curve import Curve
from exitkit.files import replacing

_FORMAT = "exitkit-outputs-1"
_NORMALISED = 1e-5


@dataclass(frozen=True, eq=False)
class ExitOutputs:
    """Predictions of M exits and the backbone (exit M) on N samples.

    Attributes:
        log_probs: (N, M+1, C), float32; logits or log-probabilities are given, normalised ones are kept.
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

    def __post_init__(self) -> None:
        log_probs = _check_log_probs(torch.as_tensor(self.log_probs).detach().cpu())
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
        return self.log_probs.argmax(-1) == self.labels[:, None]

    def against_backbone(self) -> ExitOutputs:
        """The same outputs with the full model's answers as labels: accuracy is then agreement with it."""
        return replace(self, labels=self.log_probs[:, -1].argmax(-1))

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
        return replace(self, log_probs=self.log_probs / divisors[:, None])

    def accuracy(self) -> NDArray[np.float64]:
        """(M+1,): accuracy of each exit over all samples; the backbone's is last."""
        accuracy: NDArray[np.float64] = self.correct.double().mean(0).numpy()
        return accuracy

    def scores(self, criterion: str | None = None) -> Tensor:
        """(N, M+1): how sure each exit is; a sample leaves at the first exit whose score is strictly above τ."""
        return scores(self.log_probs, criterion or self.criterion)

    def exits_at(self, threshold: float | Sequence[float], criterion: str | None = None) -> NDArray[np.int64]:
        """(N,): the exit at which each sample leaves, for one τ or one per exit; M where no exit before it is sure enough.

        Raises:
            ExitkitError: another number of thresholds than 1 or M.
        """
        taus = torch.as_tensor(threshold, dtype=torch.float64)  # in float32 τ would be rounded
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
        if milliseconds is None:
            return Curve.of(scores, correct, self.macs.numpy(), self.backbone_macs)
        times = np.asarray(milliseconds, dtype=np.float64)
        if times.shape != (len(self.macs),) or not (times > 0).all() or not (np.diff(times) >= 0).all():
            raise ExitkitError(
                f"milliseconds={list(milliseconds)!r} must hold {len(self.macs)} positive times, to answer at each exit and "
                "at the backbone, none below the one before it"
            )
        return replace(Curve.of(scores, correct, times, times[-1]), milliseconds=float(times[-1]))

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

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file; an existing one is replaced only by a complete one."""
        tensors = {"log_probs": self.log_probs, "macs": self.macs}
        if self.labels is not None:
            tensors["labels"] = self.labels
        if self.hashes is not None:
            tensors["hashes"] = self.hashes.contiguous()
        header = {
            "format": _FORMAT,
            "backbone_macs": json.dumps(self.backbone_macs),
            "criterion": self.criterion,
            "dtype": self.dtype,
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> ExitOutputs:
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
        if header.get("format") != _FORMAT:
            raise ExitkitError(f"path={str(path)!r} is no file of saved outputs; write one with outputs.save(path)")
        return cls(
            tensors["log_probs"],
            tensors.get("labels"),
            tensors["macs"],
            float(json.loads(header["backbone_macs"])),
            header["criterion"],
            tensors.get("hashes"),
            header.get("dtype", "float32"),
        )


def _check_log_probs(given: Tensor) -> Tensor:
    """Checked and normalised float32 log-probabilities; rows that are normalised already keep every bit."""
    if given.dim() != 3 or not given.is_floating_point() or 0 in given.shape or given.shape[2] < 2:
        raise ExitkitError(
            f"log_probs has dtype {given.dtype} and shape {tuple(given.shape)}; expected floating point of shape (samples, "
            "exits + 1, classes), with at least two classes"
        )
    log_probs = given.float()
    normaliser = log_probs.logsumexp(-1, keepdim=True)
    broken = ~normaliser.isfinite().squeeze(-1)
    if bool(broken.any()):
        exit_ = int(broken.any(0).int().argmax())
        raise ExitkitError(
            f"log_probs holds NaN, infinite or all-impossible rows: exit {exit_} on {int(broken[:, exit_].sum())} of "
            f"{len(given)} samples. The model overflowed there; check its inputs (normalised?) and run in float32"
        )
    return torch.where(normaliser.abs() < _NORMALISED, log_probs, log_probs - normaliser).contiguous()
