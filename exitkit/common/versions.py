"""The versions that files are marked with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def installed_versions() -> dict[str, str]:
    """Of exitkit and torch."""
    try:
        own = version("exitkit")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    return {"exitkit": own, "torch": torch.__version__}
