"""Evaluation: from every exit's predictions to accuracy against cost."""

from exitkit.evaluation.collect import collect
from exitkit.evaluation.curve import BudgetPoint, BudgetTable, Curve
from exitkit.evaluation.outputs import ExitChoice, ExitOutputs
from exitkit.evaluation.plots import plot_curves, plot_hindsight
from exitkit.evaluation.regression import RegressionOutputs

__all__ = [
    "BudgetPoint",
    "BudgetTable",
    "Curve",
    "ExitChoice",
    "ExitOutputs",
    "RegressionOutputs",
    "collect",
    "plot_curves",
    "plot_hindsight",
]
