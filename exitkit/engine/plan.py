"""The plan: measured times of every step on this device, and what follows from them for a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exitkit.methods.policy import ExitPolicy

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Timings:
    """What each step takes at some batch sizes on this device, whatever the policy.

    Attributes:
        sizes: batch sizes at which was measured, ascending from 1.
        seconds: per step and size, the stage and its exit.
        heads: per step and size, the exit alone (0 for the backbone's own classifier).
        gathers: per step and size, taking half of the samples out of a batch of that size before this step.
        decisions: per exit, its decision and compaction at the largest size, half of the samples leaving; where steps are
            recorded, which then hold both, the host's wait for it.
        heads_eager: whether exits were timed eagerly although the steps are compiled: those that no step runs without.
    """

    sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[float, ...], ...]
    gathers: tuple[tuple[float, ...], ...]
    decisions: tuple[float, ...]
    heads_eager: bool = False

    def compacts(self, step: int, batch: int, stay: int) -> bool:
        """Whether taking the others out before ``step`` pays there; the choice comes again after it, so no further."""
        carried = _at(self.sizes, self.seconds[step], batch)
        return _at(self.sizes, self.gathers[step], batch) + _at(self.sizes, self.seconds[step], stay) < carried


@dataclass(frozen=True, eq=False)
class Measurement:
    """Times of an engine's steps, and the scores that the samples they were measured on have at every exit.

    Attributes:
        timings: of the steps.
        scores: (N, M) at the exits before the backbone, when no sample leaves.
    """

    timings: Timings
    scores: NDArray[np.float64]

    def plan(self, policy: ExitPolicy, skipping: bool) -> Plan:
        """What the times and scores mean for a policy."""
        leaves = self.scores > np.asarray(policy.thresholds)
        gone = np.logical_or.accumulate(leaves, axis=1).mean(0)
        plan = Plan(self.timings, (1.0, *(1 - gone).tolist()))
        if not skipping:
            return plan
        batch = self.timings.sizes[-1]
        return Plan(plan.timings, plan.reached, tuple(m for m in range(len(gone)) if plan.gain(m, batch) <= 0))


@dataclass(frozen=True)
class Plan:
    """Times, and where the samples leave that were measured with: the numbers behind an engine's decisions.

    Attributes:
        timings: what the steps take.
        reached: per step, the share of the samples that comes to it.
        skipped: exits that are left out, since they cost more than they save; only where that was asked for.
    """

    timings: Timings
    reached: tuple[float, ...]
    skipped: tuple[int, ...] = ()

    def gain(self, exit_: int, batch: int) -> float:
        """Seconds that the exit saves on a batch of that size on average, its head's and its decision's taken off."""
        times = self.timings
        leave = self.reached[exit_] - self.reached[exit_ + 1]
        come = max(1, round(batch * self.reached[exit_]))
        rest = sum(_at(times.sizes, seconds, come) for seconds in times.seconds[exit_ + 1 :])
        own = _at(times.sizes, times.heads[exit_], come) + times.decisions[exit_]
        return rest * leave / max(self.reached[exit_], 1e-9) - own

    def total_gain(self, batch: int) -> float:
        """Seconds that all exits together save on a batch of that size; negative where they cost more."""
        kept = (m for m in range(len(self.reached) - 1) if m not in self.skipped)
        return sum(self.gain(m, batch) for m in kept)

    def waits(self) -> tuple[bool, ...]:
        """For each exit, whether waiting for its decision pays: whether the next step gets faster by more than that takes."""
        times, batch = self.timings, self.timings.sizes[-1]
        come = [batch * share for share in self.reached]
        return tuple(
            _at(times.sizes, times.seconds[m + 1], come[m]) - _at(times.sizes, times.seconds[m + 1], come[m + 1])
            > seconds
            for m, seconds in enumerate(times.decisions)
        )

    def table(self) -> Table:
        """The numbers behind the decisions, in milliseconds at the largest batch size; an exit's decision in microseconds."""
        from rich.table import Table

        times, batch = self.timings, self.timings.sizes[-1]
        table = Table(title=f"milliseconds at batch {batch}")
        head = "its head, eager" if times.heads_eager else "its head"
        headings = ("exit", "reached", "step", head, "decision µs", "saves", "leave the batch from", "exit is")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == headings[-1] else "right")
        last = len(times.seconds) - 1
        for m, (seconds, heads, reached) in enumerate(zip(times.seconds, times.heads, self.reached, strict=True)):
            cells = [f"{m}", f"{reached:.0%}", f"{1e3 * seconds[-1]:.2f}", f"{1e3 * heads[-1]:.2f}"]
            if m < last:
                cells.append(f"{1e6 * times.decisions[m]:.0f}")
                cells += [f"{1e3 * self.gain(m, batch):.2f}", self._leave_from(m + 1, batch), self._verdict(m, batch)]
            table.add_row(*cells)
        return table

    def _verdict(self, exit_: int, batch: int) -> str:
        if exit_ in self.skipped:
            return "skipped: costs more than it saves"
        return "kept" if self.gain(exit_, batch) > 0 else "kept: costs more than it saves"

    def _leave_from(self, step: int, batch: int) -> str:
        """How many samples must have their answer for the others to go on without them."""
        count = next((gone for gone in range(1, batch) if self.timings.compacts(step, batch, batch - gone)), None)
        return "never" if count is None else f"{count} of {batch}"


def _at(sizes: tuple[int, ...], values: tuple[float, ...], batch: float) -> float:
    """Between measured sizes on a straight line; beyond the largest, and below one sample, in proportion."""
    if batch > sizes[-1]:
        return values[-1] * batch / sizes[-1]
    if batch < 1:
        return values[0] * batch
    return float(np.interp(batch, sizes, values))
