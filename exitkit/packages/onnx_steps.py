"""Steps as ONNX graphs, for batches: the engine's loop over onnxruntime."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from exitkit.common.errors import ArgumentError, ExitkitError, FileError, NotCapturableError
from exitkit.common.logs import quiet
from exitkit.surgery.hooks import alone


def check_onnx() -> None:
    """Refuse to write ONNX where what writes it is missing.

    Raises:
        ExitkitError: it is.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExitkitError(f"writing ONNX needs onnx and onnxscript: pip install 'exitkit[onnx]' ({error})") from error


def to_onnx(exported: ExportedProgram) -> bytes:
    """A program of torch.export as an ONNX model.

    Raises:
        ExitkitError: a missing library, or an operation that ONNX has not.
    """
    check_onnx()
    import onnx

    if any(tensor.dtype == torch.bfloat16 for tensor in exported.state_dict.values()):
        raise NotCapturableError(
            "onnxruntime does not run bfloat16 on CPU; export in float32 or float16: ee.float(), or a .pt2"
        )
    try:
        with alone(), quiet("torch", "onnxscript", "onnx_ir"), warnings.catch_warnings(), plain_attention():
            warnings.filterwarnings("ignore", module=r"(torch|onnxscript|onnx_ir|copyreg)\b")  # others' are heard
            written = exported.run_decompositions({torch.ops.aten.adaptive_max_pool2d.default: max_of_windows})
            converted = torch.onnx.export(written, dynamo=True, verbose=False)
            model: Any = converted.model_proto  # type: ignore[union-attr]
    except Exception as error:  # the exporter raises dozens of types, most of them private
        cause = error.__cause__ or error
        raise NotCapturableError(
            f"this model cannot be written as ONNX: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}; export a "
            ".pt2"
        ) from error
    if model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        raise ArgumentError("ONNX files of more than 2 GiB are not written; export a .pt2")
    content: bytes = model.SerializeToString()
    return content


def plain_attention() -> contextlib.AbstractContextManager[None]:
    """To trace under: faster attention kernels leave strides that ONNX's does not, and later views would rely on them."""
    return sdpa_kernel(SDPBackend.MATH)


def max_of_windows(maps: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``adaptive_max_pool2d`` by its definition, row by row and column by column: torch 2.11 does not write the operation.

    Nothing reads the second result, which holds the places of the maxima.
    """
    for dim, cells in zip((-2, -1), size, strict=True):
        length = maps.shape[dim]
        edges = [(cell * length // cells, -(-(cell + 1) * length // cells)) for cell in range(cells)]
        maps = torch.cat([maps.narrow(dim, start, stop - start).amax(dim, True) for start, stop in edges], dim)
    return maps, maps.long()


def session(content: bytes) -> Any:
    """An onnxruntime session on CPU, of a graph that holds all of its weights.

    Raises:
        ExitkitError: onnx or onnxruntime is missing.
        FileError: no ONNX, one that refers to other files, or one that onnxruntime refuses.
    """
    parsed(content)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise FileError(
            f"onnxruntime {onnxruntime.__version__} does not run this model: {str(error)[:300].partition(chr(10))[0]}"
        ) from error


def parsed(content: bytes) -> Any:
    """An ONNX model whose tensors are all in it; onnxruntime would read others from wherever the graph says.

    Every tensor is looked at: initializers, constants, sparse ones, those of subgraphs and of functions.

    Raises:
        ExitkitError: onnx or onnxruntime is missing.
        FileError: no ONNX, or a tensor in another file.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ExitkitError(
            f"running ONNX needs onnx and onnxruntime: pip install 'exitkit[onnx]' ({error})"
        ) from error
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own kind
        raise FileError(f"this is not an ONNX graph: {str(error)[:200]}") from error
    for tensor in _tensors(model, onnx.TensorProto):
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            places = {entry.key: entry.value for entry in tensor.external_data}
            raise FileError(
                f"tensor {tensor.name[:80]!r} of this ONNX graph lies in another file, "
                f"{places.get('location', '')[:80]!r}, which is not read; use a file that exitkit.export wrote"
            )
    return model


def _tensors(message: Any, kind: type[Any]) -> Iterator[Any]:
    """All messages of a kind inside a protobuf message, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in [value] if hasattr(value, "ListFields") else value:
                if isinstance(one, kind):
                    yield one
                else:
                    yield from _tensors(one, kind)


def onnx_run(content: bytes, inputs: int, results: int, num_classes: int) -> Callable[..., Sequence[Tensor]]:
    """An ONNX step as a function of tensors.

    Raises:
        FileError: a graph that takes or returns another number of values, or answers for other classes.
    """
    runner = session(content)
    names = [entry.name for entry in runner.get_inputs()]
    made = runner.get_outputs()
    if (len(names), len(made)) != (inputs, results) or made[-2].shape[-1:] != [num_classes]:
        raise FileError("an ONNX step takes or returns other values than its manifest says; export it again")

    def run(*tensors: Tensor) -> list[Tensor]:
        feeds = {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in runner.run(None, feeds)]

    return run
