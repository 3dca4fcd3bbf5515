"""The Open Inference Protocol, version 2, over JSON: tensors in, answers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exitkit.common.checks import Index, check, fits
from exitkit.common.errors import ArgumentError
from exitkit.common.schema import parse_json
from exitkit.engine import Engine, Prediction
from exitkit.engine.program import Inputs

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "UINT8", torch.int8: "INT8", torch.int16: "INT16", torch.int32: "INT32",
    torch.int64: "INT64", torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32", torch.float64: "FP64",
}  # fmt: skip
"""The protocol's names of datatypes."""
_OUTPUTS: dict[str, tuple[str, Callable[[Prediction], Tensor]]] = {
    "logits": ("FP32", lambda answer: answer.logits.float()),
    "label": ("INT64", lambda answer: answer.logits.argmax(1)),
    "value": ("FP32", lambda answer: answer.logits[:, 0].float()),
    "exit": ("INT64", lambda answer: answer.exit),
    "score": ("FP64", lambda answer: answer.score),
    "non_finite": ("BOOL", lambda answer: answer.non_finite),
}
_LABEL_NAME = "label_name"


@dataclass(frozen=True)
class InferRequest:
    """What a client asks.

    Attributes:
        batch: as the engine takes it, on its device.
        id: the client's own, or None.
        threshold: τ, or one for each exit, for this request; None for the server's.
        outputs: names of those wanted; None for all.
    """

    batch: Any
    id: str | None
    threshold: float | tuple[float, ...] | None
    outputs: tuple[str, ...] | None


def read_request(body: bytes, inputs: Inputs, outputs: Sequence[str]) -> InferRequest:
    """A body of ``POST v2/models/{name}/infer``.

    Args:
        body: JSON.
        inputs: what the program takes.
        outputs: names that may be asked for.

    Raises:
        ArgumentError: not the protocol's form, or other inputs than the program takes.
    """
    document = json_object(body)
    _only(document, {"id", "inputs", "outputs", "parameters"}, "the request")
    check("id", document.get("id"), str | None)
    given = _named(document.get("inputs"), "inputs", {"name", "shape", "datatype", "data", "parameters"})
    names = _input_names(inputs)
    if given.keys() != set(names):
        raise ArgumentError(f"inputs are {sorted(given)}; this model takes {names}")
    wanted = None
    if document.get("outputs") is not None:
        wanted = tuple(_named(document["outputs"], "outputs", {"name", "parameters"}))
        if unknown := sorted(set(wanted) - set(outputs)):
            raise ArgumentError(f"outputs {unknown} are unknown; this model has {list(outputs)}")
    tensors = tuple(_tensor(given[name], name, dtype) for name, dtype in zip(names, inputs.dtypes, strict=True))
    batch = inputs.placed(inputs.spec.batch(tensors))
    return InferRequest(batch, document.get("id"), threshold_in(document.get("parameters")), wanted)


def json_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArgumentError: something else.
    """
    try:
        document = parse_json(body)
    except ValueError as error:
        raise ArgumentError(f"the body is no JSON: {str(error)[:200]}") from error
    if not isinstance(document, dict):
        raise ArgumentError("the body must be a JSON object")
    return document


def threshold_in(parameters: Any) -> float | tuple[float, ...] | None:
    """τ among a request's parameters.

    Raises:
        ArgumentError: other parameters, or no numbers.
    """
    if parameters is None:
        return None
    check("parameters", parameters, dict)
    _only(parameters, {"threshold"}, "parameters")
    given = parameters.get("threshold")
    if isinstance(given, list) and given and all(fits(one, float) for one in given):
        return tuple(map(float, given))
    check("parameters.threshold", given, float | None, "or give a list of one number for each exit")
    return None if given is None else float(given)


def response(name: str, asked: InferRequest, prediction: Prediction, labels: Sequence[str] | None) -> dict[str, Any]:
    """The answer, as JSON holds it; numbers that are not finite become null."""
    names = asked.outputs if asked.outputs is not None else output_names(prediction.logits.shape[1], labels)
    answer: dict[str, Any] = {"model_name": name, "outputs": [_output(one, prediction, labels) for one in names]}
    return answer if asked.id is None else {**answer, "id": asked.id}


def metadata(name: str, engine: Engine, labels: Sequence[str] | None) -> dict[str, Any]:
    """What a client learns of a model: its inputs and outputs; −1 is a size of any value."""
    taken, classes = engine.inputs, engine.loop.program.num_classes

    def entry(one: str, datatype: str, shape: Sequence[int | None]) -> dict[str, Any]:
        return {"name": one, "datatype": datatype, "shape": [-1 if size is None else size for size in shape]}

    kinds = {**{one: kind for one, (kind, _) in _OUTPUTS.items()}, _LABEL_NAME: "BYTES"}
    return {
        "name": name,
        "platform": "exitkit",
        "inputs": [
            entry(one, _NAMES[dtype], (None, *sizes[1:]))
            for one, dtype, sizes in zip(_input_names(taken), taken.dtypes, taken.sizes, strict=True)
        ],
        "outputs": [
            entry(one, kinds[one], (None, classes) if one == "logits" else (None,))
            for one in output_names(classes, labels)
        ],
    }


def output_names(classes: int, labels: Sequence[str] | None) -> tuple[str, ...]:
    """Outputs that a model has: the ``value`` of a regression, whose number of classes is 1, or the ``label``."""
    if classes == 1:
        return tuple(name for name in _OUTPUTS if name != "label")
    return (*(name for name in _OUTPUTS if name != "value"), *([] if labels is None else [_LABEL_NAME]))


def finite(values: Sequence[Any]) -> list[Any]:
    """The values, with None for numbers that JSON does not hold."""
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]


def _input_names(inputs: Inputs) -> list[str]:
    """The model's own argument names; an input without one has the name that the program gives it."""
    return [key if isinstance(key, str) else name for key, name in zip(inputs.spec.keys, inputs.names, strict=True)]


def _output(name: str, prediction: Prediction, labels: Sequence[str] | None) -> dict[str, Any]:
    if name == _LABEL_NAME:
        assert labels is not None
        data: list[Any] = [labels[index] for index in prediction.logits.argmax(1).tolist()]
        return {"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data}
    datatype, value = _OUTPUTS[name][0], _OUTPUTS[name][1](prediction)
    return {"name": name, "datatype": datatype, "shape": [*value.shape], "data": finite(value.flatten().tolist())}


def _tensor(given: Mapping[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    if given.get("datatype") != _NAMES[dtype]:
        raise ArgumentError(
            f"input {name!r} has datatype {given.get('datatype')!r}; this model takes {_NAMES[dtype]!r}"
        )
    if given.get("parameters"):
        raise ArgumentError(f"input {name!r} has parameters; tensors are taken as JSON numbers in 'data' alone")
    shape = given.get("shape")
    if not isinstance(shape, list) or not shape or not all(fits(size, Index) for size in shape):
        raise ArgumentError(f"input {name!r} has shape {str(shape)[:80]}; give a list of sizes, the batch first")
    values = _numbers(given.get("data"), name)
    if math.prod(shape) != values.size:
        raise ArgumentError(
            f"input {name!r} has {values.size} values in 'data', and its shape {shape} asks for {math.prod(shape)}"
        )
    kinds = "f" if dtype.is_floating_point else "b" if dtype == torch.bool else "iu"
    whole = dtype.is_floating_point and values.dtype.kind in "iu"
    if values.dtype.kind not in kinds and not whole and values.size:
        raise ArgumentError(f"input {name!r} holds values of another kind than {_NAMES[dtype]}")
    if kinds == "iu" and values.size:
        bounds = torch.iinfo(dtype)
        if values.min() < bounds.min or values.max() > bounds.max:
            raise ArgumentError(f"input {name!r} holds values outside of {bounds.min} to {bounds.max}")
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).reshape(shape)


def _numbers(data: Any, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        values = np.asarray(data) if isinstance(data, list) else None
    except ValueError:  # lists of unequal lengths
        values = None
    if values is None or values.dtype.kind not in "iufb":
        raise ArgumentError(f"input {name!r} needs 'data': a list of numbers, flat or nested by its shape")
    return values.reshape(-1)


def _named(entries: Any, what: str, allowed: set[str]) -> dict[str, Mapping[str, Any]]:
    """A list of objects with names, by name."""
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        raise ArgumentError(f"{what} must be a list of objects with a name each")
    found: dict[str, Mapping[str, Any]] = {}
    for one in entries:
        _only(one, allowed, what)
        check(f"{what}.name", one.get("name"), str)
        if one["name"] in found:
            raise ArgumentError(f"{what} has {one['name'][:80]!r} twice")
        found[one["name"]] = one
    return found


def _only(given: Mapping[str, Any], allowed: set[str], where: str) -> None:
    if unknown := sorted(set(given) - allowed):
        raise ArgumentError(
            f"{where} has unknown fields {[one[:40] for one in unknown[:5]]}; known are {sorted(allowed)}"
        )
