"""Heads that are functions, from a :class:`Feature` to a module: found by their names, run, and checked.

A function is kept by the name of the module that defines it, its own, and its keyword arguments: ``"heads:wide(width=64)"``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from functools import partial, reduce
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.common.errors import ArgumentError, ExitkitError, unknown_name
from exitkit.exits.convolution import CONVOLUTIONS
from exitkit.exits.feature import Feature

HeadFunction = Callable[[Feature], nn.Module]
"""From a feature to a module that makes a vector (B, D) of it, batch first."""

_SAMPLES = 3
"""Of the batch on which a new body is tried."""
_CALL = re.compile(r"(?:(?P<module>[\w.]+):)?(?P<function>[^():]+)(?P<arguments>\(.*\))?")


def named(head: str) -> HeadFunction | None:
    """The function that a text names: one of :data:`CONVOLUTIONS`, or ``module:function``; None where it is of another form.

    A module is imported when the function is called, not before.

    Raises:
        ArgumentError: arguments that the convolution does not take.
    """
    found = _CALL.fullmatch(head)
    if found is None or (not found["module"] and found["function"] not in CONVOLUTIONS):
        return None
    if found["module"]:
        return partial(_call, head)
    convolution, arguments = CONVOLUTIONS[found["function"]], _arguments(head, found["arguments"])
    allowed = [name for name in inspect.signature(convolution).parameters if name != "feature"]
    for name in arguments:
        if not allowed:
            raise ArgumentError(f"head={head!r}: {found['function']!r} takes no arguments; leave {name} out")
        if name not in allowed:
            raise unknown_name(f"head={head!r}: argument", name, allowed)
    return partial(convolution, **arguments)


def name_of(function: HeadFunction) -> str:
    """The text that a function is kept as.

    Raises:
        ArgumentError: a module in place of a function, or arguments that are given by position.
    """
    if isinstance(function, nn.Module):
        raise ArgumentError(
            f"head is a {type(function).__name__}, one module for all exits; give a function that makes one of a feature: "
            "head=lambda feature: ..."
        )
    called = function if isinstance(function, partial) else partial(function)
    if called.args:
        raise ArgumentError(f"head={function!r} has arguments by position; give them by their names")
    arguments = ", ".join(f"{key}={value!r}" for key, value in called.keywords.items())
    own = called.func
    name = getattr(own, "__qualname__", type(own).__qualname__)
    place = "" if CONVOLUTIONS.get(name) is own else f"{own.__module__}:"
    return f"{place}{name}" + (f"({arguments})" if arguments else "")


def check_imported(head: str) -> None:
    """Refuse a saved head whose function is not there: a file never causes an import.

    Raises:
        ArgumentError: no imported module of that name defines it.
    """
    found = _CALL.fullmatch(head)
    if found is None or not found["module"]:
        return
    try:
        function = reduce(getattr, found["function"].split("."), sys.modules[found["module"]])
        _arguments(head, found["arguments"])
    except (KeyError, AttributeError, ExitkitError):
        function = None
    if not (inspect.isfunction(function) or (inspect.isclass(function) and issubclass(function, nn.Module))):
        raise ArgumentError(
            f"the exits have heads of their own, {head!r}, and no imported module defines that function; import "
            f"{found['module']} first, or give the function as head="
        )


def make_body(name: str, function: HeadFunction, feature: Feature) -> tuple[nn.Module, int]:
    """The module that a function makes of a feature, and the width D of its vectors (B, D).

    Raises:
        ArgumentError: the function fails, returns no module, the same one again, or one of another structure at its second
            call; or its module does not make vectors, or not of one width.
    """
    at = f"head={name!r} for the feature {feature.layout} {feature.shape}"
    try:
        body = function(feature)
        with torch.random.fork_rng(devices=[]):
            again = function(feature)
        for made in (body, again):
            if not isinstance(made, nn.Module):
                raise ArgumentError(f"{at} returned {type(made).__name__}; return a torch.nn.Module")
        vectors = [_tried(made, feature) for made in (body, body, again)]
    except ExitkitError:
        raise
    except Exception as error:  # whatever a user's function or module raises
        raise ArgumentError(
            f"{at} fails: {type(error).__name__}: {error}. A head is a function from a feature to a module"
        ) from error
    if {id(part) for part in body.modules()} & {id(part) for part in again.modules()}:
        raise ArgumentError(f"{at} returned the same module twice; make a new one at every call")
    if differing := _differing(body, again):
        raise ArgumentError(
            f"{at} made two modules of different structure: {differing}\nIts structure must follow from the feature alone, or "
            "the exits could not be loaded"
        )
    widths = [_width(vector, at) for vector in vectors]
    if len(set(widths)) > 1:
        raise ArgumentError(
            f"{at} makes vectors of different widths, one call after another: {', '.join(map(str, widths))}\nIts width must "
            "follow from the feature alone; set it in the function, not in forward or at random"
        )
    return body, widths[0]


def _width(vector: Any, at: str) -> int:
    """D of vectors (B, D)."""
    if (
        not isinstance(vector, Tensor)
        or vector.dim() != 2
        or len(vector) != _SAMPLES
        or not vector.is_floating_point()
    ):
        shown = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ArgumentError(
            f"{at} makes {shown} of a batch of {_SAMPLES}; its module must make one vector of each sample, ({_SAMPLES}, D): "
            "end it with a pooling and nn.Flatten()"
        )
    return vector.shape[1]


def _call(name: str, feature: Feature) -> nn.Module:
    found = _CALL.fullmatch(name)
    assert found is not None
    try:
        function: Any = reduce(getattr, found["function"].split("."), importlib.import_module(found["module"]))
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"head={name!r} cannot be imported: {error}; give a function of an importable module, or the function itself"
        ) from error
    made: nn.Module = function(feature, **_arguments(name, found["arguments"]))
    return made


def _arguments(head: str, text: str | None) -> dict[str, Any]:
    """Keyword arguments as written, all of them literals."""
    try:
        call: Any = ast.parse(f"head{text or '()'}", mode="eval").body
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("by position")
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise ArgumentError(
            f"head={head!r}: its arguments must be names with numbers or texts, such as conv(stride=4)"
        ) from error


def _tried(body: nn.Module, feature: Feature) -> Any:
    """What a body makes of zeros, with all flags as they were afterwards."""
    flags = [(module, module.training) for module in body.modules()]
    try:
        with torch.no_grad():
            return body.eval()(torch.zeros(_SAMPLES, *feature.shape))
    finally:
        for module, training in flags:
            module.training = training


def _differing(one: nn.Module, other: nn.Module) -> str:
    """The first part in which two modules differ, or nothing."""
    for first, second in zip_longest(_parts(one), _parts(other), fillvalue="nothing"):
        if first != second:
            return f"{first} and {second}"
    return ""


def _parts(body: nn.Module) -> list[str]:
    """A module's parts as they are printed, then its tensors with their shapes."""
    tensors = [f"{name} {tuple(tensor.shape)}" for name, tensor in body.state_dict().items()]
    return [*map(str.strip, repr(body).splitlines()), *tensors]
