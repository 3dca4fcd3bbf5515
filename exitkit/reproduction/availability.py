"""What some rows need and exitkit may not have yet. When all is there, this file and ``requires`` in the tables go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from exitkit import models
from exitkit.common.errors import ExitkitError
from exitkit.exits.classifiers import HeadSpec
from exitkit.methods.presets import Method
from exitkit.training import Trainer


def _is_head(name: str) -> bool:
    try:
        HeadSpec.parse(name)
    except ExitkitError:
        return False
    return True


_CHECKS: dict[str, tuple[str, Callable[[], bool]]] = {
    "detach": ("ZTW(detach=False)", lambda: "detach" in {field.name for field in fields(Method)}),
    "ensemble_fit": ("Trainer(ensemble_fit=)", lambda: "ensemble_fit" in {field.name for field in fields(Trainer)}),
    "msdnet": ("MSDNet's own exits", lambda: _is_head("msdnet")),
    "msdnet_imagenet": ("models.msdnet_imagenet", lambda: hasattr(models, "msdnet_imagenet")),
    "vgg": ("models.vgg16_bn", lambda: hasattr(models, "vgg16_bn")),
    "mobilenet": ("models.mobilenet_v1", lambda: hasattr(models, "mobilenet_v1")),
    "wide_resnet": ("models.wide_resnet", lambda: hasattr(models, "wide_resnet")),
}


def missing(requires: str | None) -> str | None:
    """What is not there of that which a row needs; None where all is."""
    if requires is None:
        return None
    told, there = _CHECKS[requires]
    return None if there() else told
