"""Evaluation: from every exit's predictions to accuracy against cost."""

from typing import Any

from exitkit.common.hashes import content_hashes
from exitkit.evaluation.budgets import BudgetPoint, BudgetTable, ExitChoice
from exitkit.evaluation.collecting import collect
from exitkit.evaluation.curve import Curve
from exitkit.evaluation.exit_times import ExitTimes
from exitkit.evaluation.metrics import (
    Interval,
    Overthinking,
    Reliability,
    bootstrap,
    calibration_error,
    exit_rates_by_class,
    overthinking,
    reliability,
)
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.evaluation.paired import PairedError, PairedErrors, PairedTest, PairedTests, paired_errors, paired_tests
from exitkit.evaluation.plots import plot_curves, plot_hindsight
from exitkit.evaluation.regression import RegressionOutputs
from exitkit.evaluation.runs import Runs, RunsCompared, Spread, compare_runs

__all__ = [
    "BudgetPoint",
    "BudgetTable",
    "Curve",
    "ExitChoice",
    "ExitOutputs",
    "ExitTimes",
    "Interval",
    "Overthinking",
    "PairedError",
    "PairedErrors",
    "PairedTest",
    "PairedTests",
    "RegressionOutputs",
    "Reliability",
    "Runs",
    "RunsCompared",
    "Spread",
    "bootstrap",
    "calibration_error",
    "collect",
    "compare_runs",
    "content_hashes",
    "exit_rates_by_class",
    "overthinking",
    "paired_errors",
    "paired_tests",
    "plot_curves",
    "plot_hindsight",
    "reliability",
]

_IN_CALIBRATION = frozenset(
    "ChosenThreshold PerExitThresholds ShiftMonitor ShiftReport ThresholdPath choose_threshold "
    "exits_that_do_not_pay fit_temperatures head_macs per_exit_thresholds threshold_path".split()
)
"""Names that were here in version 0.1, and are found here still."""


def __getattr__(name: str) -> Any:
    if name not in _IN_CALIBRATION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from exitkit import calibration

    return getattr(calibration, name)
