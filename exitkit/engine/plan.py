"""The plan: measured times of every step on this device, and what they decide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.table import Table


@dataclass(frozen=True)
class Plan:
    """What each step takes at some batch sizes, and how many samples leave: the numbers, and the decisions they give.

    Attributes:
        sizes: batch sizes at which was measured, ascending from 1.
        seconds: per step and size, the stage and its exit.
        heads: per step and size, the exit alone (0 for the backbone's own classifier).
        gathers: per step and size, taking half of the samples out of a batch of that size before this step.
        decisions: per exit, its decision and compaction at the largest size, half of the samples leaving.
        reached: per step, the share of the samples that come to it.
        skipped: exits that take longer than they save, and are left out. None where later exits read the earlier ones.
    """

    sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[float, ...], ...]
    gathers: tuple[tuple[float, ...], ...]
    decisions: tuple[float, ...]
    reached: tuple[float, ...]
    skipped: tuple[int, ...] = ()

    def compacts(self, step: int, batch: int, stay: int) -> bool:
        """Whether taking the others out before ``step`` pays there; the choice comes again after it, so no further."""
        carried = _at(self.sizes, self.seconds[step], batch)
        return _at(self.sizes, self.gathers[step], batch) + _at(self.sizes, self.seconds[step], stay) < carried

    def gain(self, exit_: int, batch: int) -> float:
        """Seconds that the exit saves on a batch of that size on average, its own time taken off."""
        leave = self.reached[exit_] - self.reached[exit_ + 1]
        come = max(1, round(batch * self.reached[exit_]))
        rest = sum(_at(self.sizes, seconds, come) for seconds in self.seconds[exit_ + 1 :])
        return rest * leave / max(self.reached[exit_], 1e-9) - _at(self.sizes, self.heads[exit_], come)

    def table(self) -> Table:
        """The numbers behind the decisions, in milliseconds at the largest batch size; an exit's decision in microseconds."""
        batch = self.sizes[-1]
        table = Table(title=f"milliseconds at batch {batch}")
        for heading in (
            "exit",
            "reached",
            "step",
            "its head",
            "split µs",
            "saves",
            "leave the batch from",
            "decision",
        ):
            table.add_column(heading, justify="left" if heading == "decision" else "right")
        last = len(self.seconds) - 1
        for m, (seconds, heads, reached) in enumerate(zip(self.seconds, self.heads, self.reached, strict=True)):
            cells = [f"{m}", f"{reached:.0%}", f"{1e3 * seconds[-1]:.2f}", f"{1e3 * heads[-1]:.2f}"]
            if m < last:
                decision = "skipped: costs more than it saves" if m in self.skipped else "kept"
                cells.append(f"{1e6 * self.decisions[m]:.0f}")
                cells += [f"{1e3 * self.gain(m, batch):.2f}", self._leave_from(m + 1, batch), decision]
            table.add_row(*cells)
        return table

    def _leave_from(self, step: int, batch: int) -> str:
        """How many samples must have their answer for the others to go on without them."""
        count = next((gone for gone in range(1, batch) if self.compacts(step, batch, batch - gone)), None)
        return "never" if count is None else f"{count} of {batch}"


def _at(sizes: tuple[int, ...], values: tuple[float, ...], batch: int) -> float:
    """Between measured sizes on a straight line; beyond the largest in proportion."""
    if batch > sizes[-1]:
        return values[-1] * batch / sizes[-1]
    return float(np.interp(batch, sizes, values))
