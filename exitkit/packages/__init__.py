"""Packages: models with exits as files that run without the model's code."""

from exitkit.packages.export import export
from exitkit.packages.load import load

__all__ = ["export", "load"]
