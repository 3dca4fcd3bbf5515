"""Runs of one setting that differ in their seed: means over them, and differences of two settings seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from exitkit.common.errors import ArgumentError
from exitkit.evaluation.budgets import BUDGETS
from exitkit.evaluation.curve import Curve
from exitkit.evaluation.outputs import ExitOutputs, check_outputs
from exitkit.evaluation.paired import check_comparable
from exitkit.evaluation.regression import RegressionOutputs

_SETTING = ("criterion", "dtype", "backbone_macs")


@dataclass(frozen=True)
class Spread:
    """A number as it came in several runs.

    Attributes:
        values: one of each run.
        measure: what they are; ``"accuracy"`` is printed in per cent, anything else (``"mse"``) as it is.
    """

    values: tuple[float, ...]
    measure: str = "accuracy"

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """The standard deviation, estimated from these runs (divided by n − 1); 0 of a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def half_width(self) -> float:
        """1.96 standard errors of the mean: half of its 95% interval."""
        return float(1.96 * self.std / np.sqrt(len(self.values)))

    def __str__(self) -> str:
        """Mean ± standard deviation."""
        share = self.measure == "accuracy"
        mean, std = (f"{self.mean:.2%}", f"{100 * self.std:.2f}") if share else (f"{self.mean:.4f}", f"{self.std:.4f}")
        return f"{mean} ± {std}" if len(self.values) > 1 else mean


@dataclass(frozen=True, eq=False)
class Runs:
    """Outputs of one setting on the same samples, of runs that differ in their seed alone.

    Of regressions what is measured under budgets is the mean squared error, of which less is better.

    Attributes:
        outputs: one of each run, with labels; of regressions :class:`RegressionOutputs`.
        seeds: of each run; by default 0, 1, 2, …

    Raises:
        ArgumentError: none, seeds that are not one each, or outputs of different settings: other samples, exits or scores.
    """

    outputs: tuple[ExitOutputs, ...]
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.outputs, ExitOutputs):
            raise ArgumentError("outputs is of one run; give a tuple with those of each, such as (outputs,)")
        outputs = tuple(self.outputs)
        if not outputs:
            raise ArgumentError("outputs=() is empty; give those of at least one run")
        for number, one in enumerate(outputs):
            check_outputs(one, f"outputs[{number}]")
        seeds = tuple(self.seeds) or tuple(range(len(outputs)))
        if len(set(seeds)) != len(outputs) or len(seeds) != len(outputs):
            raise ArgumentError(f"seeds={seeds} for {len(outputs)} runs; give another seed for each")
        object.__setattr__(self, "outputs", outputs)
        object.__setattr__(self, "seeds", seeds)
        named = {f"seed {seed}": one for seed, one in zip(seeds, outputs, strict=True)}
        (first, start), *others = named.items()
        for name, one in others:
            if differing := _differing(start, one):
                raise ArgumentError(
                    f"{name} and {first} are of different settings ({differing}), and are not averaged; give runs that differ "
                    "in their seed alone"
                )
        check_comparable(named)

    @property
    def measure(self) -> str:
        """``"accuracy"``, or of regressions ``"mse"``."""
        return "mse" if isinstance(self.outputs[0], RegressionOutputs) else "accuracy"

    def measured(self, measure: Callable[[ExitOutputs], float]) -> Spread:
        """Any measure of one run's outputs, over the runs."""
        return Spread(tuple(float(measure(one)) for one in self.outputs))

    def accuracy(self, top: int = 1) -> tuple[Spread, ...]:
        """(M+1,): of each exit; with ``top`` the label may be among so many likeliest classes, as in ``outputs.accuracy``.

        Of regressions it is Pearson's correlation, as there.
        """
        measure = self.outputs[0].measure
        return tuple(Spread(each, measure) for each in _per_exit(one.accuracy(top) for one in self.outputs))

    def mse(self) -> tuple[Spread, ...]:
        """(M+1,): the mean squared error of each exit.

        Raises:
            ArgumentError: outputs of classifiers.
        """
        found = [one.mse() for one in self.outputs if isinstance(one, RegressionOutputs)]
        if not found:
            raise ArgumentError("outputs are of classifiers, which have no squared error; use accuracy()")
        return tuple(Spread(each, "mse") for each in _per_exit(found))

    def at_budget(self, budget: float, *, top: int = 1) -> Spread | None:
        """The measure under a share of the backbone's cost, each run with its own τ; None where the first exit costs more."""
        curves = [_curve(one, top) for one in self.outputs]
        if any(curve.cost[0] >= budget for curve in curves):
            return None
        return Spread(tuple(curve.at_budget(budget).accuracy for curve in curves), self.measure)

    def budget_table(self, budgets: Sequence[float] = BUDGETS, *, top: int = 1) -> dict[str, Spread | None]:
        """The measure at the budgets by name, and where no sample leaves, as ``curve().budget_table()`` of one run has it."""
        rows = {f"{100 * budget:g}%": self.at_budget(budget, top=top) for budget in budgets}
        return rows | {"no limit": (self.mse() if self.measure == "mse" else self.accuracy(top))[-1]}

    def minus(self, other: Runs, budget: float, *, top: int = 1) -> Spread:
        """This measure minus the other's at a budget, seed by seed: what both owe to a seed cancels.

        Raises:
            ArgumentError: other seeds, other samples, a regression and a classifier, or a budget that a first exit costs more
                than.
        """
        _check_runs("other", other)
        if self.seeds != other.seeds:
            raise ArgumentError(
                f"seeds {self.seeds} and {other.seeds} are not the same; compare runs of the same seeds"
            )
        check_comparable({"one": self.outputs[0], "other": other.outputs[0]})
        first, second = self.at_budget(budget, top=top), other.at_budget(budget, top=top)
        if first is None or second is None:
            raise ArgumentError(f"budget={budget!r} cannot be kept by both; give a larger one")
        return Spread(tuple(a - b for a, b in zip(first.values, second.values, strict=True)), self.measure)


def _curve(outputs: ExitOutputs, top: int) -> Curve:
    """What is measured against cost."""
    if isinstance(outputs, RegressionOutputs):
        return outputs.curve(measure="mse", top=top)
    return outputs.curve(top=top)


def _per_exit(each: Iterable[NDArray[np.float64]]) -> Iterator[tuple[float, ...]]:
    """From the numbers (M+1,) of each run to those of each exit."""
    return zip(*(one.tolist() for one in each), strict=True)


def _check_runs(name: str, runs: object) -> None:
    if not isinstance(runs, Runs):
        raise ArgumentError(
            f"{name} is {type(runs).__name__}; give exitkit.evaluation.Runs of the outputs of each seed"
        )


def _differing(one: ExitOutputs, other: ExitOutputs) -> str:
    """In what two settings differ, or nothing."""
    if type(one) is not type(other) or one.log_probs.shape[1:] != other.log_probs.shape[1:]:
        return "other exits or classes"
    if one.macs.tolist() != other.macs.tolist():
        return "exits of other costs"
    known = {field.name for field in fields(one)}
    names = [name for name in _SETTING if name in known and getattr(one, name) != getattr(other, name)]
    if (one.temperatures is None) != (other.temperatures is None):  # each run may have its own, or none has
        return f"temperatures={one.temperatures} and {other.temperatures}"
    return ", ".join(f"{name} {getattr(one, name)} and {getattr(other, name)}" for name in names)


@dataclass(frozen=True)
class RunsCompared:
    """Settings side by side, each with its runs; prints as a table.

    Attributes:
        budget: the share of the backbone's cost at which they are compared.
        accuracies: of each setting there; of regressions the mean squared errors.
        differences: of every two: the first minus the second, seed by seed.
        top: a sample counts as right where its label is among so many likeliest classes.
    """

    budget: float
    accuracies: dict[str, Spread]
    differences: dict[tuple[str, str], Spread]
    top: int = 1

    def __str__(self) -> str:
        first = next(iter(self.accuracies.values()))
        runs, errors = len(first.values), first.measure == "mse"
        measure = "accuracy" if self.top == 1 else f"top-{self.top} accuracy"
        measure = "mean squared error (less is better)" if errors else measure
        unit, scale, digits = ("", 1, 4) if errors else (", in points", 100, 2)
        lines = [
            f"{measure} at {100 * self.budget:g}% of the backbone's MACs over {runs} seeds: mean ± standard deviation"
        ]
        lines += [f"  {name:<34}{spread!s:>16}" for name, spread in self.accuracies.items()]
        lines.append(f"differences, seed by seed: mean and 95% interval (1.96 standard errors){unit}")
        for (one, two), spread in self.differences.items():
            mean, half = scale * spread.mean, scale * spread.half_width
            low, high = mean - half, mean + half
            lines.append(f"  {f'{one} – {two}':<34}{mean:>+7.{digits}f} ({low:+.{digits}f} … {high:+.{digits}f})")
        return "\n".join(lines)


def compare_runs(found: Mapping[str, Runs], budget: float = 0.5, *, top: int = 1) -> RunsCompared:
    """Every two of several settings at a budget, paired over their seeds.

    With a few seeds the interval says how much the mean would move with others, and misses that a few are few.

    Args:
        found: by name, at least two, each with the same seeds.
        budget: share of the backbone's MACs.
        top: a sample counts as right where its label is among so many likeliest classes, as for ``outputs.curve``.

    Raises:
        ArgumentError: fewer than two, other seeds or samples, a budget that one of them cannot keep, or ``top`` is not from
            1 to the number of classes.
    """
    if not isinstance(found, Mapping):
        raise ArgumentError(
            f"found is {type(found).__name__}; give runs by name: {{'sdn': Runs(...), 'ztw': Runs(...)}}"
        )
    for name, runs in found.items():
        _check_runs(f"found[{name!r}]", runs)
    if len(found) < 2:
        raise ArgumentError(f"found={list(found)}: give runs of at least two settings, by name")
    differences = {(one, two): found[one].minus(found[two], budget, top=top) for one, two in combinations(found, 2)}
    accuracies = {name: runs.at_budget(budget, top=top) for name, runs in found.items()}
    return RunsCompared(budget, {name: one for name, one in accuracies.items() if one is not None}, differences, top)
