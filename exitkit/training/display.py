"""What a run shows: a live table, or a line per epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from exitkit.common.console import shows_progress
from exitkit.training.progress import Epoch, number

_EPOCHS = 6
"""How many of the last ones are shown beside one another: they fit 80 columns."""


class Display:
    """A live table of the exits over a progress bar, or a line per epoch; silent where neither is wanted."""

    def __init__(self, wanted: bool, lines: bool, epochs: int, phases: int, steps: int | None) -> None:
        self.wanted, self.lines, self.epochs, self.phases, self.steps = wanted, lines, epochs, phases, steps
        self.records: list[Epoch] = []
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
        )
        self.task = self.bar.add_task("epoch 1", total=steps, status="")
        self._restart(0)

    def resume(self, epochs: int, checkpoint: Path) -> None:
        """So many epochs were over in a checkpoint that this run took up."""
        if self.wanted:
            print(f"going on from {checkpoint}", file=sys.stderr, flush=True)
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
        """A row for every exit: its last loss, and its validation in the last epochs (its loss there without validation)."""
        shown = self.records[-_EPOCHS:]
        columns = [record.validation() or _losses(record, max(record.exits) + 1) for record in shown]
        last, rows = shown[-1], max(map(len, columns))
        phase = [f"phase {last.phase + 1} of {self.phases}"] if self.phases > 1 else []
        table = Table(
            box=None, pad_edge=False, caption="  ".join([*phase, last.measured_line()]), caption_justify="left"
        )
        for heading in ("exit", "loss", *(f"epoch {record.epoch + 1}" for record in shown)):
            table.add_column(heading, justify="right")
        for m, loss in enumerate(_losses(last, rows)):
            table.add_row(str(m), loss, *(column[m] if m < len(column) else "" for column in columns))
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


def _losses(record: Epoch, exits: int) -> list[str]:
    """Each exit's training loss; nothing for those that do not count in the phase."""
    known = dict(zip(record.exits, record.loss, strict=True))
    return [number(known[m]) if m in known else "" for m in range(exits)]


@contextmanager
def displayed(wanted: bool, epochs: int, phases: int, steps: int | None) -> Iterator[Display]:
    """A :class:`Display`, drawn while open where there is a terminal.

    ``steps``: optimiser steps of an epoch, where they are known.
    """
    console, wanted = Console(stderr=True), shows_progress(wanted)
    display = Display(wanted, wanted and not console.is_terminal, epochs, phases, steps)
    if not (wanted and console.is_terminal):
        yield display
        return
    with Live(display, console=console, refresh_per_second=4):
        yield display
