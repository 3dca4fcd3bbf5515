"""A loader's batch given to a multi-exit model, or to a part of it: understood where it can be, explained where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.inputs import argument_names, as_call
from exitkit.surgery.mistakes import explained, mistake_in, other_rank

T = TypeVar("T")


def call_model(model: MultiExitModel, function: Callable[..., T], inputs: Any) -> T:
    """``function``, which takes what the backbone of ``model`` takes, called with a batch's inputs.

    Of a dict, what data sets hold beside the inputs is left out, and one tensor is that input, whatever its key.

    Raises:
        ArgumentError: more inputs than ``model`` was attached with, one with other dimensions, a sparse one, or the call fails
            and a difference from the inputs that it was attached with says why.
    """
    forward = model.backbone.forward
    args, kwargs = as_call(model.example.spec.understood(inputs, argument_names(forward)))
    if len(args) > len(model.example.spec.keys):
        raise ArgumentError(str(mistake_in(args, kwargs, model.example, forward)))
    if mistake := other_rank(args, kwargs, model.example):
        raise ArgumentError(mistake)
    with explained(mistake_in, args, kwargs, model.example, forward):
        return function(*args, **kwargs)
