"""What ``retrofit`` returns."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.common.console import in_minutes
from exitkit.common.errors import ArgumentError
from exitkit.common.files import replacing
from exitkit.evaluation.metrics import Interval
from exitkit.methods.policy import ExitPolicy
from exitkit.multi_exit.model import MultiExitModel
from exitkit.packages import export
from exitkit.retrofitting.alternatives import Alternative
from exitkit.retrofitting.verdict import Times, Verdict

if TYPE_CHECKING:
    from exitkit.engine import Engine

RESULT = "retrofit.json"
EXITS = "exits"
PREPROCESSING = "preprocessing.json"
"""How the samples of ``exitkit retrofit`` were made of images, which a package of its exits does too."""


@dataclass(frozen=True)
class Candidate:
    """One exit that was tried.

    Attributes:
        boundary: where it reads.
        head: what kind of head it is.
        macs: MACs per sample to answer there, with the backbone before it and no other head.
        cost: the same as a share of the backbone's cost; in time where ``cost="time"`` was asked for.
        epochs: trained in the search, in passes over the samples that are learned from.
        accuracy: of it alone on the samples of the search; agreement with the backbone where there are no labels.
        saving: what it alone saves there within the promise.
        dropped: why it is not among the exits; None for one that is.
    """

    boundary: str
    head: str
    macs: int
    cost: float
    epochs: float
    accuracy: float | None
    saving: float | None
    dropped: str | None


@dataclass(frozen=True, eq=False)
class Retrofit:
    """The verdict, and everything it rests on.

    Attributes:
        verdict: ``"exits"`` where the guaranteed policy saves compute and time against the backbone, else ``"backbone"``.
        instead: the name of the alternative to ship instead, which keeps the same promise for less; None where there is none.
        reason: what to ship and why, in words and numbers.
        model: the backbone with the chosen exits, in place on the user's own model; None where no exit saves anything.
        policy: when a sample leaves, with its guarantee; None where ``model`` is.
        engine: as it was timed; None where ``model`` is.
        cost: average MACs that are to be expected, as a share of the backbone; 1 where the verdict is ``"backbone"``.
        drop: what is lost against the backbone on the calibration samples, with its exact 95% interval.
        accuracy: of the backbone and of the policy on the calibration samples; None without labels.
        times: engine, backbone and alternatives side by side.
        candidates: every exit that was tried.
        alternatives: what else could be shipped.
        epochs: what the search cost, in epochs of the backbone's forward; finishing not included.
        minutes: that all of it took; of a run that was continued, since it was.
    """

    verdict: Verdict
    instead: str | None
    reason: str
    model: MultiExitModel | None
    policy: ExitPolicy | None
    engine: Engine | None
    cost: float
    drop: Interval
    accuracy: tuple[float, float] | None
    times: Times
    candidates: tuple[Candidate, ...]
    alternatives: tuple[Alternative, ...]
    epochs: float
    minutes: float

    @property
    def chosen(self) -> tuple[Candidate, ...]:
        """The candidates that are exits of ``model``."""
        return tuple(one for one in self.candidates if one.dropped is None)

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """Every candidate, the chosen ones first, then by what they save alone."""
        return tuple(sorted(self.candidates, key=lambda one: (one.dropped is not None, -(one.saving or 0.0))))

    def __str__(self) -> str:
        exits = " and ".join(f"{one.head} after {one.boundary}" for one in self.chosen) or "no exit"
        return f"{self.verdict}: {self.reason}\n{exits}; searched for {self.epochs:.1f} epochs, {in_minutes(self.minutes)}"

    def table(self) -> str:
        """Every candidate in a line, in the order of :attr:`ranked`."""
        lines = [f"{'boundary':<24}{'head':<10}{'cost':>7}{'epochs':>8}{'right':>8}{'saves':>8}  why not"]
        for one in self.ranked:
            right = "-" if one.accuracy is None else f"{one.accuracy:.1%}"
            saves = "-" if one.saving is None else f"{one.saving:.1%}"
            lines.append(
                f"{one.boundary:<24}{one.head:<10}{one.cost:>7.1%}{one.epochs:>8.1f}{right:>8}{saves:>8}  "
                f"{one.dropped or 'chosen'}"
            )
        return "\n".join(lines)

    def export(self, path: str | PathLike[str], **options: Any) -> None:
        """:func:`exitkit.export` of the model with its policy; ``options`` are its other arguments.

        Raises:
            ArgumentError: there is no model with exits.
        """
        model, policy = self._shipped("export")
        export(model, path, threshold=policy, **options)

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the exits with their policy (``exits/``) and what was found (``retrofit.json``).

        Raises:
            FileError: the folder cannot be written to.
        """
        folder = Path(directory)
        if self.model is not None:
            self.model.save_pretrained(folder / EXITS, threshold=self.policy)
        with replacing(folder / RESULT) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")

    def report(self, path: str | PathLike[str]) -> None:
        """Write one HTML page that opens with the decision and its picture.

        Raises:
            ArgumentError: a path that does not end in ``.html``.
            FileError: it cannot be written.
        """
        from exitkit.retrofitting.page import write_page  # imports matplotlib and jinja2

        write_page(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds."""
        return {
            "verdict": self.verdict,
            "instead": self.instead,
            "reason": self.reason,
            "policy": None if self.policy is None else self.policy.to_dict(),
            "cost": self.cost,
            "drop": self.drop._asdict(),
            "accuracy": self.accuracy,
            "times": asdict(self.times),
            "candidates": [asdict(one) for one in self.candidates],
            "alternatives": [asdict(one) for one in self.alternatives],
            "epochs": self.epochs,
            "minutes": self.minutes,
        }

    def _shipped(self, what: str) -> tuple[MultiExitModel, ExitPolicy]:
        if self.model is None or self.policy is None:
            raise ArgumentError(
                f"{what}: the verdict is 'backbone' and there are no exits ({self.reason}); ship the model itself, for "
                "example with torch.export"
            )
        return self.model, self.policy
