"""Evaluation: from every exit's predictions to accuracy against cost, and to thresholds that keep a promise."""

from exitkit.evaluation.choose import ChosenThreshold, ThresholdPath, choose_threshold
from exitkit.evaluation.collect import collect
from exitkit.evaluation.curve import BudgetPoint, BudgetTable, Curve
from exitkit.evaluation.hashes import content_hashes
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
from exitkit.evaluation.monitor import ShiftMonitor, ShiftReport
from exitkit.evaluation.outputs import ExitChoice, ExitOutputs
from exitkit.evaluation.paired import PairedTest, PairedTests, paired_tests
from exitkit.evaluation.per_exit import PerExitThresholds, per_exit_thresholds, threshold_path
from exitkit.evaluation.plots import plot_curves, plot_hindsight
from exitkit.evaluation.pruning import exits_that_do_not_pay, head_macs
from exitkit.evaluation.regression import RegressionOutputs
from exitkit.evaluation.scaled import ScaledThreshold
from exitkit.evaluation.temperature import fit_temperatures
from exitkit.evaluation.timing import ExitTimes

__all__ = [
    "BudgetPoint",
    "BudgetTable",
    "ChosenThreshold",
    "Curve",
    "ExitChoice",
    "ExitOutputs",
    "ExitTimes",
    "Interval",
    "Overthinking",
    "PairedTest",
    "PairedTests",
    "PerExitThresholds",
    "RegressionOutputs",
    "Reliability",
    "ScaledThreshold",
    "ShiftMonitor",
    "ShiftReport",
    "ThresholdPath",
    "bootstrap",
    "calibration_error",
    "choose_threshold",
    "collect",
    "content_hashes",
    "exit_rates_by_class",
    "exits_that_do_not_pay",
    "fit_temperatures",
    "head_macs",
    "overthinking",
    "paired_tests",
    "per_exit_thresholds",
    "plot_curves",
    "plot_hindsight",
    "reliability",
    "threshold_path",
]
