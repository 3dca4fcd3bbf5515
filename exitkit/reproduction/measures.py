"""A row's numbers, from the outputs of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from exitkit.common.errors import ArgumentError
from exitkit.evaluation import ExitOutputs, RegressionOutputs
from exitkit.report import Stage
from exitkit.reproduction.tables import Measure


def numbers_of(
    measure: Measure,
    columns: Sequence[int | str],
    outputs: ExitOutputs,
    *,
    top: int = 1,
    validation: ExitOutputs | None = None,
    stages: Sequence[Stage] = (),
) -> list[float | None]:
    """One number for each column; None where a budget cannot be kept, or nothing was measured.

    Args:
        measure: ``"budgets"``: accuracy (%) under a share of the backbone's MACs (Zero Time Waste, section 4.1);
            ``"mse"``: mean squared error there; ``"budget-mode"``: top-k accuracy (%) of the exit, among the first i, that is
            best on the validation samples (Phuong and Lampert, section 3.2); ``"anytime-mode"``: of the mean prediction of
            the first i exits; ``"milliseconds"``: to answer at exit i after those before it; ``"budget-milliseconds"``:
            without these, of whose stages the backbone's part alone runs.
        columns: percentages of the backbone's MACs, ``"max"`` (the best τ at any cost) or ``"unlimited"`` (no sample leaves);
            for the other measures one for each exit.
        outputs: of the test samples.
        top: an answer is right among so many.
        validation: of the validation samples.
        stages: of the run, as they were timed.
    """
    if measure in ("budgets", "mse"):
        return [_under(column, outputs, measure) for column in columns]
    top = min(top, outputs.log_probs.shape[2])
    found: Sequence[float | None]
    if measure in ("milliseconds", "budget-milliseconds"):
        found = _times(stages, alone=measure == "budget-milliseconds")
    elif measure == "anytime-mode":
        found = (100 * _first_means(outputs).accuracy(top)).tolist()
    else:
        if validation is None:
            raise ArgumentError("budget-mode chooses exits on validation samples, and the run has none")
        chosen, accuracy = validation.accuracy(top), 100 * outputs.accuracy(top)
        found = [float(accuracy[chosen[: exit_ + 1].argmax()]) for exit_ in range(len(accuracy))]
    return [found[index] if index < len(found) else None for index in range(len(columns))]


def _under(column: int | str, outputs: ExitOutputs, measure: Measure) -> float | None:
    """At a budget of so many per cent."""
    if measure == "mse":
        if not isinstance(outputs, RegressionOutputs):
            raise ArgumentError("MSE is for a model that predicts numbers")
        curve = outputs.curve(measure="mse")
    else:
        curve = outputs.curve()
    if column == "max":
        reached = curve.best().accuracy
    elif column == "unlimited":
        reached = curve.no_limit().accuracy
    elif curve.cost[0] >= int(column) / 100:
        return None
    else:
        reached = curve.at_budget(int(column) / 100).accuracy
    return reached if measure == "mse" else 100 * reached


def _times(stages: Sequence[Stage], alone: bool) -> list[float]:
    """Milliseconds to answer at each exit, ``alone`` or after those before it; none where nothing was measured."""
    whole = [stage.milliseconds for stage in stages if stage.milliseconds is not None]
    if len(whole) < len(stages):
        return []
    exits = [stage.head_milliseconds or 0.0 for stage in stages]
    spent = list(accumulate(whole))
    before = list(accumulate(exits, initial=0.0))
    return [time - left_out for time, left_out in zip(spent, before, strict=False)] if alone else spent


def _first_means(outputs: ExitOutputs) -> ExitOutputs:
    """The outputs in which each exit answers with the mean of the probabilities of all exits up to it."""
    each = outputs.log_probs.double().exp()
    means = each.cumsum(1) / torch.arange(1, each.shape[1] + 1)[:, None]
    return replace(outputs, log_probs=means.log())
