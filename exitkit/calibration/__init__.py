"""Calibration: thresholds with a guarantee, temperatures, and whether production still looks like the calibration split."""

from exitkit.calibration.monitor import ShiftMonitor, ShiftReport
from exitkit.calibration.per_exit import PerExitThresholds, per_exit_thresholds, threshold_path
from exitkit.calibration.pruning import exits_that_do_not_pay, head_macs
from exitkit.calibration.risk_control import ChosenThreshold, ThresholdPath, choose_threshold
from exitkit.calibration.temperature import fit_temperatures

__all__ = [
    "ChosenThreshold",
    "PerExitThresholds",
    "ShiftMonitor",
    "ShiftReport",
    "ThresholdPath",
    "choose_threshold",
    "exits_that_do_not_pay",
    "fit_temperatures",
    "head_macs",
    "per_exit_thresholds",
    "threshold_path",
]
