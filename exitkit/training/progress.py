"""What is recorded of each epoch, and the CSV or TensorBoard log of it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exitkit.common.files import replacing

LOG = "metrics.csv"


@dataclass(frozen=True)
class Epoch:
    """One epoch's record.

    Attributes:
        epoch: its number, from 0, over all phases.
        loss: mean training loss of each exit that counts; None for one without any step in this epoch, as in an alternating
            phase of one step. A distillation term is in it as its KL divergence at the temperature
            reached, which is 0 for a perfect copy; what is minimised has the factor τ² besides.
        accuracy: validation accuracy of every exit, the backbone's last; None without validation and for regression.
        phase: the phase's number, from 0.
        exits: the exits that count in the phase.
        val_loss: validation loss of every exit; None without validation.
        speed: training samples per second.
        temperature: τ of the distillation, at the end; None without distillation.
        confidence: the teachers' at τ, as ``Distillation(confidence=)`` reads it, averaged over the batches (Phuong and
            Lampert 2019, figure 6: adjusted); None without distillation. In the logs ``teachers_confidence``.
        unadjusted_confidence: the same at τ = 1 (figure 6: unadjusted). In the logs ``teachers_unadjusted_confidence``.
        dominance: after the epoch, the cosine of the gradient of each exit that counts with the objective's, on the learning
            part of the backbone that two of these exits or more reach; None where there is none, or where it was not measured
            (``Trainer(analyse=)``).
        ceiling: the most that each of these cosines can be, as an exit has no gradient behind it.
        first_exit: after the epoch, on the weights of the first exit's head, the cosine of the objective's gradient with that
            of the first exit's own loss (Zero Time Waste, appendix C.3); None where it was not measured.
        measured: numbers of the loader's own, by name.
    """

    epoch: int
    loss: tuple[float | None, ...]
    accuracy: tuple[float, ...] | None
    phase: int
    exits: tuple[int, ...]
    val_loss: tuple[float, ...] | None = None
    speed: float = field(default=0.0, compare=False)
    temperature: float | None = None
    confidence: float | None = None
    unadjusted_confidence: float | None = None
    dominance: tuple[float, ...] | None = None
    ceiling: tuple[float, ...] | None = None
    first_exit: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """What the logs hold, by name."""
        losses = zip(self.exits, self.loss, strict=True)
        named = {f"loss/exit{m}": value for m, value in losses if value is not None}
        named |= {f"accuracy/exit{m}": value for m, value in enumerate(self.accuracy or ())}
        named |= {f"val_loss/exit{m}": value for m, value in enumerate(self.val_loss or ())}
        named |= {} if self.temperature is None else {"temperature": self.temperature}
        named |= {} if self.first_exit is None else {"first_exit_cosine": self.first_exit}
        named |= {} if self.confidence is None else {"teachers_confidence": self.confidence}
        unadjusted = self.unadjusted_confidence
        named |= {} if unadjusted is None else {"teachers_unadjusted_confidence": unadjusted}
        for name, values in (("dominance", self.dominance), ("dominance_ceiling", self.ceiling)):
            named |= {f"{name}/exit{m}": value for m, value in zip(self.exits, values or (), strict=False)}
        return named | {"phase": float(self.phase), "samples_per_second": self.speed} | dict(self.measured)

    def line(self) -> str:
        """In words: every exit's loss and validation result."""
        loss = " ".join(f"{m}: {number(value)}" for m, value in zip(self.exits, self.loss, strict=True))
        tau = "" if self.temperature is None else f"  τ {self.temperature:.2f}"
        measured = f"  {self.measured_line()}" if self.measured else ""
        return (
            f"epoch {self.epoch + 1}  phase {self.phase + 1}  loss {loss}{tau}{self._validated()}{measured}"
            f"  {self.speed:,.0f}/s"
        )

    def validation(self) -> list[str]:
        """Every exit's validation accuracy, or its validation loss, as it is shown; empty without validation."""
        if self.accuracy is not None:
            return [f"{value:.1%}" for value in self.accuracy]
        return [number(value) for value in self.val_loss or ()]

    def measured_line(self) -> str:
        """The loader's own numbers."""
        return "  ".join(f"{name} {value:.4g}" for name, value in self.measured.items())

    def _validated(self) -> str:
        name = "val" if self.accuracy is not None else "val loss"
        shown = " ".join(f"{m}: {value}" for m, value in enumerate(self.validation()))
        return f"  {name} {shown}" if shown else ""


def write_log(directory: Path, kind: str, history: Sequence[Epoch]) -> None:
    """Write the newest epoch: a row of ``metrics.csv``, or TensorBoard scalars."""
    record = history[-1]
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(directory)) as writer:
            for name, value in record.scalars().items():
                writer.add_scalar(name, value, record.epoch)
        return
    with replacing(directory / LOG) as temporary, temporary.open("w", newline="") as file:
        names = dict.fromkeys(name for past in history for name in past.scalars())
        rows = csv.DictWriter(file, ["epoch", *names])
        rows.writeheader()
        rows.writerows({"epoch": past.epoch, **past.scalars()} for past in history)


def number(value: float | None) -> str:
    """A loss as it is shown."""
    return "-" if value is None else f"{value:.4f}"
