"""What is wrong with a call that failed, told from the inputs that the backbone was attached with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.surgery.inputs import Example, argument_names, as_call, no_tensor, without_values

_RAISED = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""By torch, of inputs that do not fit."""


@contextmanager
def explained(find: Callable[..., str | None], *call: Any) -> Iterator[None]:
    """While open, an error is raised as the mistake that ``find`` sees in a call, where it sees one.

    Raises:
        ArgumentError: the mistake, in words.
    """
    try:
        yield
    except _RAISED as error:
        ours = isinstance(error, ExitkitError | torch.OutOfMemoryError)  # memory is short at any size
        if ours or (mistake := find(*call)) is None:
            raise
        raise ArgumentError(mistake) from error


def mistake_in(
    args: Sequence[Any], kwargs: Mapping[str, Any], example: Example, forward: Callable[..., Any]
) -> str | None:
    """What no batch of a loader may have: more inputs than the example, or others, or :func:`mistaken_input`; else None."""
    if mistake := _no_tensor(args, kwargs, example):
        return mistake
    if len(args) > len(example.spec.keys):
        return (
            f"a batch holds {len(args)} inputs before its labels, its last item, but the model was attached with "
            f"{len(example.spec.keys)}; yield (inputs, labels) alone, without an index or a weight behind them"
        )
    names = argument_names(forward)
    unknown = [name for name in kwargs if name not in names]
    if unknown and not any(one.kind == Parameter.VAR_KEYWORD for one in signature(forward).parameters.values()):
        return (
            f"a batch holds {unknown}, which the backbone does not take; name its inputs {names}, and the labels "
            "'labels' or 'label', and leave out what is neither"
        )
    return mistaken_input(args, kwargs, example)


def mistaken_input(args: Sequence[Any], kwargs: Mapping[str, Any], example: Example) -> str | None:
    """The first difference between the inputs of a call that failed and the example's, in words, or None."""
    if mistake := _no_tensor(args, kwargs, example):
        return mistake
    given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    for key, taken in zip(example.spec.keys, example.tensors, strict=True):
        if key in given and (mistake := mistake_of(key, given[key], tuple(taken.shape), taken.dtype)):
            return mistake
    other = other_size((args, kwargs), example)
    if other is not None:
        return f"{other}; make it that size, or attach again with example_inputs of this one"
    for key, taken in zip(example.spec.keys, example.tensors, strict=True):
        if key in given and taken.is_floating_point() and given[key].dtype != taken.dtype:
            return f"input {key!r} is {given[key].dtype}, and the model takes {taken.dtype}; call .to({taken.dtype})"
    return None


def other_rank(args: Sequence[Any], kwargs: Mapping[str, Any], example: Example) -> str | None:
    """The first input with more or fewer dimensions than the example's, or a sparse one, in words, or None.

    Layers that work on the last dimension take such an input, and answer once for each of the others.
    """
    given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    for key, taken in zip(example.spec.keys, example.tensors, strict=True):
        value = given.get(key)
        if isinstance(value, Tensor) and (value.dim() != taken.dim() or value.layout != torch.strided):
            return mistake_of(key, value, tuple(taken.shape), taken.dtype)
    return None


def _no_number(values: Tensor) -> Tensor:
    return ~values.isfinite()


def not_finite(inputs: Any, broken: Callable[[Tensor], Tensor] = _no_number) -> str | None:
    """The first input of a batch that holds NaN or infinite numbers, in words, or None; ``broken`` says which count."""
    args, kwargs = as_call(inputs)
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            rows = broken(value).reshape(len(value), -1).any(1)
            if bool(rows.any()):
                return (
                    f"input {key!r} holds NaN or infinite numbers in {int(rows.sum())} of the {counted(len(rows), 'sample')} "
                    "of a batch; repair such samples in the data set, or leave them out"
                )
    return None


def other_size(call: tuple[Sequence[Any], Mapping[str, Any]], example: Example) -> str | None:
    """The first input of a call that is larger or smaller than the example's, in words; of texts, of any length, None."""
    if example.text:
        return None
    args, kwargs = call
    for key, taken in zip(example.spec.keys, example.tensors, strict=True):
        value = kwargs.get(key) if isinstance(key, str) else args[key] if key < len(args) else None
        if isinstance(value, Tensor) and value.shape[1:] != taken.shape[1:]:
            attached = ", ".join(["batch", *map(str, taken.shape[1:])])
            return f"input {key!r} has shape {tuple(value.shape)}, and the model was attached with ({attached})"
    return None


def mistake_of(key: int | str, value: Tensor, shape: Sequence[int | None], dtype: torch.dtype) -> str | None:
    """What is wrong with one input, where a tensor of this shape and dtype is taken, in words; None where nothing is known.

    ``shape`` begins with the batch, and has None for any size.
    """
    if mistake := without_values(key, value):
        return mistake
    if dtype.is_floating_point and not value.is_floating_point():
        return (
            f"input {key!r} is {value.dtype}, and the model takes {dtype}; scale and normalise pixels as for the backbone's "
            "training (from 0 … 255: x.float() / 255, then its mean and standard deviation), not .float() alone"
        )
    if value.dtype == torch.float64 and dtype != torch.float64:
        return f"input {key!r} is torch.float64, and the model takes {dtype}; call .to({dtype}) in the data set's transform"
    return _mistaken_shape(key, tuple(value.shape), shape)


def _no_tensor(args: Sequence[Any], kwargs: Mapping[str, Any], example: Example) -> str | None:
    """What is said of the first input that is something else."""
    return no_tensor(dict([*enumerate(args), *kwargs.items()]), example.spec.keys)


def _mistaken_shape(key: int | str, given: tuple[int, ...], taken: Sequence[int | None]) -> str | None:
    """Of the rank, or of the channels of images."""
    came = f"input {key!r} has shape {given}, and the model takes (batch, {', '.join(_size(n) for n in taken[1:])})"
    if len(given) == len(taken) - 1:
        return f"{came}; a dimension is missing: that of the batch (x[None]), or that of the channels (x[:, None])"
    if len(given) != len(taken):
        return f"{came}; give as many dimensions, batch first"
    if len(given) != 4 or (channels := taken[1]) in (None, given[1]):
        return None
    if given[3] == channels:
        return f"{came}; the channels come last: x.permute(0, 3, 1, 2) puts them first"
    if given[1] == 1:
        return f"{came}; repeat the one channel: x.expand(-1, {channels}, -1, -1)"
    return f"{came}; give images of {counted(channels, 'channel')}"


def _size(size: int | None) -> str:
    return "any" if size is None else str(size)
