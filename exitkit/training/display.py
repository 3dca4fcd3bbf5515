"""What a run shows: a live table, or a line per epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from exitkit.common.console import shows_progress
from exitkit.training.progress import Epoch, number, spread

_ROWS = 12


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
        named = ["measured"] if any(record.measured for record in self.records) else []
        phased = ["phase"] if self.phases > 1 else []
        for heading in ("epoch", *phased, "loss per exit", "validation", *named, "samples/s"):
            table.add_column(heading, justify="right" if heading in ("epoch", "samples/s") else "left")
        for record in self.records[-_ROWS:]:
            phase = [f"{record.phase + 1} of {self.phases}"] if self.phases > 1 else []
            loss = " ".join(number(value, 3) for value in spread(record.loss))
            validated = " ".join(f"{value:.1%}" for value in spread(record.accuracy or ())) or " ".join(
                f"{value:.3f}" for value in spread(record.val_loss or ())
            )
            measured = [record.measured_line()] if named else []
            table.add_row(str(record.epoch + 1), *phase, loss, validated, *measured, f"{record.speed:,.0f}")
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
    console, wanted = Console(stderr=True), shows_progress(wanted)
    display = Display(wanted and not console.is_terminal, epochs, phases, steps)
    if not (wanted and console.is_terminal):
        yield display
        return
    with Live(display, console=console, refresh_per_second=4):
        yield display
