"""Evaluation: from every exit's predictions to accuracy against cost, and to thresholds that keep a promise."""

from exitkit.evaluation.choose import ChosenThreshold, ThresholdPath, choose_threshold
from exitkit.evaluation.collect import collect
from exitkit.evaluation.curve import BudgetPoint, BudgetTable, Curve
from exitkit.evaluation.hashes import content_hashes
from exitkit.evaluation.monitor import ShiftMonitor, ShiftReport
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.evaluation.per_exit import PerExitThresholds, per_exit_thresholds, threshold_path
from exitkit.evaluation.plots import plot_curves, plot_hindsight
from exitkit.evaluation.pruning import exits_that_do_not_pay, head_macs
from exitkit.evaluation.temperature import fit_temperatures

__all__ = [
    "BudgetPoint",
    "BudgetTable",
    "ChosenThreshold",
    "Curve",
    "ExitOutputs",
    "PerExitThresholds",
    "ShiftMonitor",
    "ShiftReport",
    "ThresholdPath",
    "choose_threshold",
    "collect",
    "content_hashes",
    "exits_that_do_not_pay",
    "fit_temperatures",
    "head_macs",
    "per_exit_thresholds",
    "plot_curves",
    "plot_hindsight",
    "threshold_path",
]
