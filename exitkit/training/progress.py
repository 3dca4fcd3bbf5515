"""What a run shows: a progress bar, and a CSV or TensorBoard log."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exitkit.files import replacing


@dataclass(frozen=True)
class Epoch:
    """One epoch's record: mean training loss and validation accuracy (None without validation) of each exit."""

    epoch: int
    loss: tuple[float, ...]
    accuracy: tuple[float, ...] | None

    def scalars(self) -> dict[str, float]:
        named = {f"loss/exit{m}": value for m, value in enumerate(self.loss)}
        return named | {f"accuracy/exit{m}": value for m, value in enumerate(self.accuracy or ())}


class Bar:
    """A progress bar over the steps of all epochs, with the loss and the validation accuracy of some exits."""

    def __init__(self, progress: Progress, steps: int | None) -> None:
        self.progress = progress
        self.task = progress.add_task("training exits", total=steps, status="")
        self._accuracy = ""

    def step(self, loss: float) -> None:
        self.progress.update(self.task, advance=1, status=f"loss {loss:.3f}  {self._accuracy}")

    def epoch(self, record: Epoch) -> None:
        if record.accuracy is not None:
            self._accuracy = "val " + " ".join(f"{value:.1%}" for value in _spread(record.accuracy))
        mean = sum(record.loss) / len(record.loss)
        self.progress.update(self.task, status=f"epoch {record.epoch + 1}  loss {mean:.3f}  {self._accuracy}")

    def skip(self, steps: int) -> None:
        self.progress.advance(self.task, steps)


@contextmanager
def progress_bar(steps: int | None, show: bool) -> Iterator[Bar]:
    """A :class:`Bar` that is drawn while open; silent without a terminal or with ``show=False``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}"), disable=not show) as progress:
        yield Bar(progress, steps)


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


def _spread(values: Sequence[float], most: int = 6) -> list[float]:
    """At most ``most`` of the values, evenly spread, the last always among them."""
    count = len(values)
    if count <= most:
        return list(values)
    return [values[round(i * (count - 1) / (most - 1))] for i in range(most)]
