"""How a backbone is called: a batch becomes arguments, and arguments a flat tuple of tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from exitkit.common.errors import ArgumentError

T = TypeVar("T")
_SEGMENTS = "token_type_ids"
_CONSTANTS = (int, float, str)


def as_call(batch: Any, name: str = "inputs") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as ``(args, kwargs)``: a tensor or a tuple is positional, a mapping goes by keyword. ``name`` is the user's."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, np.ndarray):
        raise ArgumentError(f"{name} of type ndarray cannot be passed to a model; give torch.from_numpy(x)")
    raise ArgumentError(
        f"{name} of type {type(batch).__name__} cannot be passed to a model; give a tensor, a tuple of tensors, "
        "or a dict of tensors by argument name"
    )


def _not_a_tensor(key: int | str, value: Any) -> str:
    """What is said of an input that is something else."""
    if isinstance(value, np.ndarray):
        return f"input {key!r} is a numpy array, and the model takes tensors; give torch.from_numpy(x)"
    if isinstance(value, Mapping):
        return f"input {key!r} is a {type(value).__name__}, whose tensors go by name; unpack it: model(**batch)"
    item = f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
    return (
        f"input {key!r} is a {type(value).__name__}{item}; the model takes tensors, batch first: make them in the data set's "
        "transform or the loader's collate_fn"
    )


def no_tensor(given: Mapping[int | str, Any], keys: Collection[int | str]) -> str | None:
    """What is said of the first input among ``keys`` that is no tensor, or of a mapping given by position; or None."""
    for key, value in given.items():
        if (isinstance(value, Mapping) and isinstance(key, int)) or (key in keys and not isinstance(value, Tensor)):
            return _not_a_tensor(key, value)
    return None


def without_values(key: int | str, value: Tensor) -> str | None:
    """What is said of a tensor that does not hold every number: a sparse one, or one on the meta device; of others None."""
    if value.layout != torch.strided:
        return f"input {key!r} has the layout {value.layout}, and the model takes dense tensors; give x.to_dense()"
    if value.is_meta:
        return f"input {key!r} is on the meta device, where tensors have no values; give one that has"
    return None


def call_on(function: Callable[..., T], batch: Any) -> T:
    """``function`` called with a batch as its arguments."""
    args, kwargs = as_call(batch)
    return function(*args, **kwargs)


def argument(function: Callable[..., Any], key: int | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One argument of a call, by position or keyword, whichever way it was passed; None where it was not."""
    names = list(signature(function).parameters)
    name = names[key] if isinstance(key, int) and key < len(names) else key
    position = names.index(name) if name in names else key
    return args[position] if isinstance(position, int) and position < len(args) else kwargs.get(str(name))


def argument_names(function: Callable[..., Any]) -> list[str]:
    """What a function names that it may be called with by keyword."""
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [name for name, parameter in signature(function).parameters.items() if parameter.kind in kinds]


@dataclass(frozen=True)
class CallSpec:
    """The shape of a call: where its tensors stand, and the constants (None, flags) beside them."""

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    keys: tuple[int | str, ...]
    """Position or keyword of each tensor, in the order of :meth:`tensors`."""

    @classmethod
    def of(cls, batch: Any) -> CallSpec:
        args, kwargs = as_call(batch, "example_inputs")
        named: list[tuple[int | str, Any]] = [*enumerate(args), *sorted(kwargs.items())]
        keys = tuple(key for key, value in named if isinstance(value, Tensor))
        for key, value in named:
            if key not in keys and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                raise ArgumentError(
                    f"example_inputs: argument {key!r} is a {type(value).__name__} of tensors, and every tensor must be an "
                    "argument of its own; wrap the model in a module whose forward takes them one by one"
                )
        if not keys:
            raise ArgumentError("example_inputs holds no tensor; give the tensors the model is called with")
        blank = {key: None if isinstance(value, Tensor) else value for key, value in named}
        return cls(
            tuple(blank[i] for i in range(len(args))), tuple((name, blank[name]) for name in sorted(kwargs)), keys
        )

    def understood(self, batch: Any, taken: Collection[str] = ()) -> Any:
        """A mapping without what data sets hold beside the inputs: a number or a text for each sample.

        One tensor that is left over is the input, whatever its key, where there is one input.

        Args:
            batch: anything that :func:`as_call` takes; what is not a mapping stays as it is.
            taken: further names of inputs, which stay.
        """
        if not isinstance(batch, Mapping):
            return batch
        inputs = {key: value for key, value in batch.items() if key in {*self.keys, *taken} or not _is_column(value)}
        if not any(isinstance(value, Tensor) for value in inputs.values()):
            inputs = dict(batch)
        alone = len(inputs) == len(self.keys) == 1 and not {*self.keys, *taken} & inputs.keys()
        tensors = tuple(inputs.values())
        return self.batch(tensors) if alone and isinstance(tensors[0], Tensor) else inputs

    def tensors(self, batch: Any) -> tuple[Tensor, ...]:
        """The tensors of ``batch`` in this spec's order; the same keys must be present.

        Beside them may be what :meth:`understood` leaves out, and ``token_type_ids`` that are all 0: tokenizers write them
        for single texts, and to models that take them they mean the same as none.
        """
        if isinstance(batch, tuple) and self.keys == (*range(len(batch)),) and all(map(torch.is_tensor, batch)):
            return batch  # what follows would take as long as a small step
        args, kwargs = as_call(self.understood(batch))
        given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        for key, value in given.items():
            if isinstance(value, _CONSTANTS) and key not in self.keys:
                self._check_constant(key, value)
        segments = None if _SEGMENTS in self.keys else given.pop(_SEGMENTS, None)
        if segments is not None and bool(segments.any()):
            raise ArgumentError(
                f"{_SEGMENTS} tell two texts apart, but the model was attached without them; attach with "
                "example_inputs=dict(tokenizer(first, second, padding=True, return_tensors='pt'))"
            )
        found = {key for key, value in given.items() if isinstance(value, Tensor)}
        if found != set(self.keys):
            if (other := no_tensor(given, self.keys)) is not None:
                raise ArgumentError(other)
            raise self.other_call(found)
        return tuple(given[key] for key in self.keys)

    def other_call(self, found: Collection[int | str]) -> ArgumentError:
        """The error of a call whose tensors stand at other positions or keywords."""
        return ArgumentError(
            f"the model was attached with tensor inputs {list(self.keys)}, but was called with "
            f"{sorted(found, key=str)}; call it the same way, or attach again with other example_inputs"
        )

    def _check_constant(self, key: int | str, value: Any) -> None:
        """Refuse another flag or number than the model was attached with, since the graph holds that one."""
        fixed: dict[int | str, Any] = dict([*enumerate(self.args), *self.kwargs])
        if (key in fixed or isinstance(key, int)) and value != fixed.get(key):
            attached = f"with {fixed[key]!r}" if key in fixed else "without it"
            raise ArgumentError(
                f"argument {key!r} is {value!r}, and the model was attached {attached}; call it the same way, or attach "
                "again with example_inputs that hold this value"
            )

    def call(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inverse of :meth:`tensors`: arguments and keywords for the backbone."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for key, tensor in zip(self.keys, tensors, strict=True):
            if isinstance(key, int):
                args[key] = tensor
            else:
                kwargs[key] = tensor
        return tuple(args), kwargs

    def batch(self, tensors: tuple[Tensor, ...]) -> Any:
        """A batch that :func:`as_call` turns into this call."""
        args, kwargs = self.call(tensors)
        return kwargs or args


@dataclass(frozen=True)
class Example:
    """Example tensors of a call, batch first, from which other batch sizes are made."""

    spec: CallSpec
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, batch: Any) -> Example:
        spec = CallSpec.of(batch)
        tensors = spec.tensors(batch)
        sizes = {tuple(tensor.shape[:1]) for tensor in tensors}
        if len(sizes) != 1 or () in sizes or (0,) in sizes:
            shapes = {key: tuple(tensor.shape) for key, tensor in zip(spec.keys, tensors, strict=True)}
            raise ArgumentError(
                f"example_inputs has shapes {shapes}; every tensor needs the same, non-zero batch size as its first "
                "dimension"
            )
        return cls(spec, tensors)

    def with_batch(self, size: int) -> Example:
        """The same example with ``size`` rows, repeating them in turn."""
        rows = torch.arange(size) % len(self.tensors[0])
        return replace(self, tensors=tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors))

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> Example:
        """On another device, and with floating-point tensors of another dtype; None leaves them as they are."""
        moved = (tensor.to(device, dtype if tensor.is_floating_point() else None) for tensor in self.tensors)
        return replace(self, tensors=tuple(moved))

    @property
    def text(self) -> bool:
        """Whether these are token ids and masks: integer (or bool) tensors of shape (batch, sequence)."""
        return all(tensor.dim() == 2 and not tensor.is_floating_point() for tensor in self.tensors)

    def shorter(self, tokens: int) -> Example:
        """For text: ``tokens`` fewer, first and last kept; masks are full but for the last row, which is padded."""
        parts = []
        for key, tensor in zip(self.spec.keys, self.tensors, strict=True):
            cut = torch.cat([tensor[:, :1], tensor[:, 1 + tokens :]], 1)
            if "mask" in str(key):
                cut = torch.ones_like(cut)
                cut[-1, cut.shape[1] // 2 + 1 :] = 0
            parts.append(cut)
        return replace(self, tensors=tuple(parts))


def _is_column(value: Any) -> bool:
    """Whether it holds a number or a text for each sample, as labels, indices and raw texts of a data set do."""
    if isinstance(value, Tensor):
        return value.dim() < 2
    return isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value)
