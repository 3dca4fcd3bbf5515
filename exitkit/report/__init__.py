"""Reports: what a run found, to look at, to compare and to decide on."""

from exitkit.report.calibrate import calibrated
from exitkit.report.repeated import read_repeated, seed_folder, seeds_in
from exitkit.report.run import Calibrated, Check, Result, Run, read_comparison, read_run, write_thresholds
from exitkit.report.samples import Sample, write_samples
from exitkit.report.stages import Stage, stages_of
from exitkit.report.write import write_report

__all__ = [
    "Calibrated",
    "Check",
    "Result",
    "Run",
    "Sample",
    "Stage",
    "calibrated",
    "read_comparison",
    "read_repeated",
    "read_run",
    "seed_folder",
    "seeds_in",
    "stages_of",
    "write_report",
    "write_samples",
    "write_thresholds",
]
