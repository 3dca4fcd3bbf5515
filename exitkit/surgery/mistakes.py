"""What is wrong with a call that failed, told from the inputs that the backbone was attached with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from exitkit.common.console import counted
from exitkit.surgery.inputs import Example, argument_names


def mistake_in(
    args: Sequence[Any], kwargs: Mapping[str, Any], example: Example, forward: Callable[..., Any]
) -> str | None:
    """The first difference between a call of the backbone and its example that no call may have, in words, or None."""
    spec = example.spec
    given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    if (
        key := next((key for key in spec.keys if key in given and not isinstance(given[key], Tensor)), None)
    ) is not None:
        return _not_a_tensor(key, given[key])
    if len(args) > len(spec.keys):
        return (
            f"a batch holds {len(args)} inputs before its labels, its last item, but the model was attached with "
            f"{len(spec.keys)}; yield (inputs, labels) alone, without an index or a weight behind them"
        )
    names = argument_names(forward)
    unknown = [name for name in kwargs if name not in names]
    if unknown and not any(one.kind == Parameter.VAR_KEYWORD for one in signature(forward).parameters.values()):
        return (
            f"a batch holds {unknown}, which the backbone does not take; name its inputs {names}, and the labels "
            "'labels' or 'label', and leave out what is neither"
        )
    for key, taken in zip(spec.keys, example.tensors, strict=True):
        if key in given and (mistake := mistake_of(key, given[key], tuple(taken.shape), taken.dtype)):
            return mistake
    return None


def mistake_of(key: int | str, value: Tensor, shape: Sequence[int | None], dtype: torch.dtype) -> str | None:
    """What is wrong with one input, where a tensor of this shape and dtype is taken, in words; None where nothing is known.

    ``shape`` begins with the batch, and has None for any size.
    """
    if dtype.is_floating_point and not value.is_floating_point():
        return (
            f"input {key!r} is {value.dtype}, and the model takes {dtype}; scale and normalise pixels as for the backbone's "
            "training (from 0 … 255: x.float() / 255, then its mean and standard deviation), not .float() alone"
        )
    if value.dtype == torch.float64 and dtype != torch.float64:
        return f"input {key!r} is torch.float64, and the model takes {dtype}; call .to({dtype}) in the data set's transform"
    return _mistaken_shape(key, tuple(value.shape), shape)


def _not_a_tensor(key: int | str, value: Any) -> str:
    item = f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
    return (
        f"input {key!r} is a {type(value).__name__}{item}; the model takes tensors, batch first: make them in the data set's "
        "transform or the loader's collate_fn"
    )


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
