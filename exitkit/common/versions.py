"""The versions that files are marked with."""

from __future__ import annotations

import torch

import exitkit


def installed_versions() -> dict[str, str]:
    """Of exitkit and torch."""
    return {"exitkit": exitkit.__version__, "torch": torch.__version__}
