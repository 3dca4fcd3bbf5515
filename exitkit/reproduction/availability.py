"""What some rows need and exitkit may not have yet. When all is there, this file and ``requires`` in the tables go."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from exitkit import models

_CHECKS: dict[str, tuple[str, Callable[[], bool]]] = {
    "shortcuts": ("cifar_resnet(option='B')", lambda: "option" in inspect.signature(models.cifar_resnet).parameters),
    "vgg": ("models.cifar_vgg", lambda: hasattr(models, "cifar_vgg")),
    "mobilenet": ("models.cifar_mobilenet", lambda: hasattr(models, "cifar_mobilenet")),
    "wide_resnet": ("models.cifar_wide_resnet", lambda: hasattr(models, "cifar_wide_resnet")),
    "msdnet_imagenet": ("models.imagenet_msdnet", lambda: hasattr(models, "imagenet_msdnet")),
}


def missing(requires: str | None) -> str | None:
    """What is not there of that which a row needs; None where all is."""
    if requires is None:
        return None
    told, there = _CHECKS[requires]
    return None if there() else told
