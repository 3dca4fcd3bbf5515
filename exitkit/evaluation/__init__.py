"""Evaluation: from every exit's predictions to accuracy against cost, and to thresholds that keep a promise."""

from exitkit.evaluation.choose import ChosenThreshold, ThresholdPath, choose_threshold
from exitkit.evaluation.collect import collect
from exitkit.evaluation.curve import BudgetPoint, BudgetTable, Curve
from exitkit.evaluation.hashes import content_hashes
from exitkit.evaluation.monitor import ShiftMonitor, ShiftReport
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.evaluation.plots import plot_curves, plot_hindsight

__all__ = [
    "BudgetPoint",
    "BudgetTable",
    "ChosenThreshold",
    "Curve",
    "ExitOutputs",
    "ShiftMonitor",
    "ShiftReport",
    "ThresholdPath",
    "choose_threshold",
    "collect",
    "content_hashes",
    "plot_curves",
    "plot_hindsight",
]
