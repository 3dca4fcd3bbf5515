"""Packages: models with exits as files that run without the model's code."""

from exitkit.packages.exporting import export
from exitkit.packages.loading import load

__all__ = ["export", "load"]
