"""What a run shows: a live table or a line per epoch, and a CSV or TensorBoard log."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from exitkit.common.files import replacing

T = TypeVar("T")

_ROWS = 12
_COLUMNS = 6


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
    """

    epoch: int
    loss: tuple[float | None, ...]
    accuracy: tuple[float, ...] | None
    phase: int
    exits: tuple[int, ...]
    val_loss: tuple[float, ...] | None = None
    speed: float = field(default=0.0, compare=False)
    temperature: float | None = None

    def scalars(self) -> dict[str, float]:
        """What the logs hold, by name."""
        losses = zip(self.exits, self.loss, strict=True)
        named = {f"loss/exit{m}": value for m, value in losses if value is not None}
        named |= {f"accuracy/exit{m}": value for m, value in enumerate(self.accuracy or ())}
        named |= {f"val_loss/exit{m}": value for m, value in enumerate(self.val_loss or ())}
        named |= {} if self.temperature is None else {"temperature": self.temperature}
        return named | {"phase": float(self.phase), "samples_per_second": self.speed}

    def line(self) -> str:
        """In words: losses and validation results of at most six exits."""
        loss = " ".join(
            f"{m}: {_number(value, 4)}" for m, value in spread(list(zip(self.exits, self.loss, strict=True)))
        )
        tau = "" if self.temperature is None else f"  τ {self.temperature:.2f}"
        return (
            f"epoch {self.epoch + 1}  phase {self.phase + 1}  loss {loss}{tau}{self._validated()}  {self.speed:,.0f}/s"
        )

    def _validated(self) -> str:
        if self.accuracy is not None:
            return "  val " + " ".join(f"{m}: {value:.1%}" for m, value in spread(list(enumerate(self.accuracy))))
        if self.val_loss is not None:
            return "  val loss " + " ".join(f"{m}: {value:.4f}" for m, value in spread(list(enumerate(self.val_loss))))
        return ""


class Display:
    """A live table of the last epochs over a progress bar, or a line per epoch; silent where neither is wanted."""

    def __init__(self, lines: bool, epochs: int, phases: int, steps: int | None) -> None:
        self.lines, self.epochs, self.phases, self.steps = lines, epochs, phases, steps
        self.records: list[Epoch] = []
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
        )
        self.task = self.bar.add_task("epoch 1", total=steps, status="")
        self._restart(0)

    def resume(self, epochs: int) -> None:
        """So many epochs were over before this run took them up."""
        self._restart(epochs)

    def step(self, losses: Tensor, samples: int) -> None:
        """A step is done: its losses, and the samples in it."""
        self._steps += 1
        self._samples += samples
        speed = self._samples / max(time.monotonic() - self._started, 1e-9)
        status = f"loss {float(losses.mean()):.3f}  {speed:,.0f} samples/s  {self._left(self._steps)}"
        self.bar.update(self.task, advance=1, status=status)

    def epoch(self, record: Epoch) -> None:
        """An epoch is over."""
        self.records.append(record)
        self._over = record.epoch + 1
        if self.lines:
            print(f"{record.line()}  {self._left(0)}".rstrip(), file=sys.stderr, flush=True)
        self._restart(self._over)

    def __rich__(self) -> Group:
        return Group(self._table(), self.bar) if self.records else Group(self.bar)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("epoch", *(["phase"] if self.phases > 1 else []), "loss per exit", "validation", "samples/s"):
            table.add_column(heading, justify="right" if heading in ("epoch", "samples/s") else "left")
        for record in self.records[-_ROWS:]:
            phase = [f"{record.phase + 1} of {self.phases}"] if self.phases > 1 else []
            loss = " ".join(_number(value, 3) for value in spread(record.loss))
            validated = " ".join(f"{value:.1%}" for value in spread(record.accuracy or ())) or " ".join(
                f"{value:.3f}" for value in spread(record.val_loss or ())
            )
            table.add_row(str(record.epoch + 1), *phase, loss, validated, f"{record.speed:,.0f}")
        return table

    def _restart(self, over: int) -> None:
        self._started, self._over, self._steps, self._samples = time.monotonic(), over, 0, 0
        self.bar.reset(self.task, description=f"epoch {min(over + 1, self.epochs)} of {self.epochs}", status="")

    def _left(self, done: int) -> str:
        """The time that the epochs to come, less the ``done`` steps, take at the pace so far; an early stop ends before."""
        if not self._steps or self._over == self.epochs:
            return ""
        pace = (time.monotonic() - self._started) / self._steps
        whole = self.steps if self.steps is not None else self._steps
        seconds = int(pace * (whole * (self.epochs - self._over) - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


@contextmanager
def displayed(wanted: bool, epochs: int, phases: int, steps: int | None) -> Iterator[Display]:
    """A :class:`Display`, drawn while open where there is a terminal.

    ``steps``: optimiser steps of an epoch, where they are known.
    """
    console = Console(stderr=True)
    display = Display(wanted and not console.is_terminal, epochs, phases, steps)
    if not (wanted and console.is_terminal):
        yield display
        return
    with Live(display, console=console, refresh_per_second=4):
        yield display


def write_log(directory: Path, kind: str, history: Sequence[Epoch]) -> None:
    """Write the newest epoch: a row of ``metrics.csv``, or TensorBoard scalars."""
    record = history[-1]
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(directory)) as writer:
            for name, value in record.scalars().items():
                writer.add_scalar(name, value, record.epoch)
        return
    with replacing(directory / "metrics.csv") as temporary, temporary.open("w", newline="") as file:
        names = dict.fromkeys(name for past in history for name in past.scalars())
        rows = csv.DictWriter(file, ["epoch", *names])
        rows.writeheader()
        rows.writerows({"epoch": past.epoch, **past.scalars()} for past in history)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def spread(values: Sequence[T]) -> list[T]:
    """At most six of the values, evenly spread, the last always among them."""
    count = len(values)
    if count <= _COLUMNS:
        return list(values)
    return [values[round(i * (count - 1) / (_COLUMNS - 1))] for i in range(_COLUMNS)]
