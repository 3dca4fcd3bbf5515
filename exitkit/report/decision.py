"""What a report opens on: the method to take at its promise, what it saves, and what it loses."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exitkit.methods.policy import ExitPolicy, Guarantee
from exitkit.report.run import Check, Result
from exitkit.report.stages import Stage, backbone_milliseconds


@dataclass(frozen=True)
class Decision:
    """A method at a threshold, on the run's samples.

    Attributes:
        method: its name in the report.
        policy: its thresholds.
        cost: average MACs, as a share of the backbone's.
        accuracy, backbone_accuracy: of the exits, and of the backbone alone.
        faster: the backbone's measured time over the exits', or None where the stages were not timed.
        guarantee: what is promised, or None where nothing is.
        check: how the promise fared on other samples, or None.
        command: exports it.
    """

    method: str
    policy: ExitPolicy
    cost: float
    accuracy: float
    backbone_accuracy: float
    faster: float | None
    guarantee: Guarantee | None
    check: Check | None
    command: str

    @property
    def lost(self) -> float:
        """Accuracy lost, in points of a hundred; below 0 where it is gained."""
        return 100 * (self.backbone_accuracy - self.accuracy)

    @property
    def pays(self) -> bool:
        """Whether anything is saved."""
        return self.cost < 1 and (self.guarantee is None or self.guarantee.found)


def opened(results: Mapping[str, Result]) -> str:
    """The cheapest method of those with a promise; without any, the most accurate at half of the backbone's MACs."""
    if (promised := cheapest_promised(results)) is not None:
        return promised
    accuracies = {name: one.outputs.at(_without_promise(one)).accuracy or 0.0 for name, one in results.items()}
    return max(accuracies, key=accuracies.__getitem__)


def cheapest_promised(results: Mapping[str, Result]) -> str | None:
    """The cheapest method of those with a promise; None without any."""
    costs = {
        name: one.calibrated.chosen.cost or 1.0
        for name, one in results.items()
        if one.calibrated is not None and one.calibrated.chosen.found
    }
    return min(costs, key=costs.__getitem__) if costs else None


def decide(name: str, result: Result, directory: Path, method: str) -> Decision:
    """What is shown of ``result``: ``method`` of the run in ``directory``, which the report calls ``name``."""
    outputs, calibrated = result.outputs, result.calibrated
    policy = _without_promise(result) if calibrated is None else calibrated.chosen
    point = outputs.at(policy)
    assert point.accuracy is not None
    entering = np.bincount(outputs.exits_at(policy), minlength=len(outputs.macs))[::-1].cumsum()[::-1] / len(outputs)
    guarantee = None if calibrated is None else calibrated.chosen.guarantee
    return Decision(
        name,
        policy,
        float(point.cost),
        float(point.accuracy),
        float(outputs.accuracy()[-1]),
        speedup_by_time(result.stages, entering),
        guarantee,
        None if calibrated is None else calibrated.check,
        export_command(directory, method) + ("" if policy.found else f" --threshold {policy.thresholds[0]!r}"),
    )


def export_command(directory: Path, method: str) -> str:
    """What is typed to export a run's method at its promise; ``--threshold`` behind it takes another τ."""
    return f"exitkit export {shlex.quote(str(directory))} --method {shlex.quote(method)}"


def speedup_by_time(stages: Sequence[Stage], entering: NDArray[np.float64]) -> float | None:
    """The time of the backbone without exits, over that of each stage times the share of the samples that enter it."""
    if not stages or stages[0].milliseconds is None:
        return None
    times = np.array([stage.milliseconds or 0.0 for stage in stages])
    return backbone_milliseconds(stages) / float(times @ entering)


def _without_promise(result: Result) -> ExitPolicy:
    """At half of the backbone's MACs, or where no sample leaves if that cannot be had."""
    curve = result.outputs.curve()
    return (curve.at_budget(0.5) if curve.cost[0] < 0.5 else curve.no_limit()).policy
