"""One ONNX graph for one sample at a time, in which the exits are ``If`` branches: what is behind a taken exit never runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from exitkit.common.errors import FileError, NotCapturableError
from exitkit.common.files import replacing
from exitkit.engine.loop import Prediction
from exitkit.engine.program import Description, Inputs, Program
from exitkit.methods.policy import ExitPolicy
from exitkit.packages.manifest import Manifest, read_manifest, to_text
from exitkit.packages.onnx_steps import parsed, plain_attention, session, to_onnx
from exitkit.surgery.hooks import alone

_METADATA, _DIGEST = "exitkit", "exitkit_sha256"


class Branches(nn.Module):
    """The steps of a program, each inside the branch of the exit before it.

    One sample → answer, exit, score, and whether a score on the way was not finite.
    """

    def __init__(self, program: Program, thresholds: Sequence[float]) -> None:
        super().__init__()
        self.program = program
        limits = torch.tensor([*thresholds], dtype=torch.float64)  # a plain number would become float32 in the graph
        self.register_buffer("limits", limits, persistent=False)
        self.limits: Tensor
        self.runs = nn.ModuleList(cast("nn.Module", step.run) for step in program.steps)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._from(0, dict(zip(self.program.inputs.names, tensors, strict=True)), None)

    def _from(self, index: int, values: dict[str, Any], before: Tensor | None) -> tuple[Tensor, ...]:
        step = self.program.steps[index]
        made = self.runs[index](*(values[name] for name in step.inputs))
        values = values | dict(zip(step.outputs, made, strict=False))
        answer, score = made[-2:]
        answer, exit_ = answer.to(self.program.dtype), torch.full_like(score, step.exit, dtype=torch.int64)
        faulty = ~score.isfinite() if before is None else before | ~score.isfinite()
        if index == len(self.program.steps) - 1:
            return answer.clone(), exit_, score.clone(), faulty.clone()

        def leave(*operands: Tensor) -> tuple[Tensor, ...]:
            return tuple(operand.clone() for operand in operands[:4])  # a branch may not return what came in

        def stay(*operands: Tensor) -> tuple[Tensor, ...]:
            return self._from(index + 1, dict(zip(step.live, operands[4:], strict=True)), operands[3])

        sure = (score > self.limits[step.exit]).all()
        operands = (answer, exit_, score, faulty, *(values[name] for name in step.live))
        result: tuple[Tensor, ...] = torch.cond(sure, leave, stay, operands)
        return result


def write_branches(
    path: Path, program: Program, thresholds: Sequence[float], example: Sequence[Tensor], manifest: Manifest
) -> None:
    """Write the graph, with the manifest in its metadata, once it answers the example as the program does.

    Raises:
        ExitkitError: what cannot be exported, or other answers.
    """
    module = Branches(program, thresholds).eval()
    one = tuple(tensor[:1].contiguous() for tensor in example)
    lengths = tuple({dim: Dim.AUTO for dim in program.dynamic[name] if dim > 0} for name in program.inputs.names)
    try:
        with alone(), torch.no_grad(), plain_attention():
            exported = torch.export.export(module, one, dynamic_shapes=(lengths,), strict=False)
    except Exception as error:  # torch.export raises dozens of types, most of them private
        raise NotCapturableError(
            f"the exits cannot be written as branches: {type(error).__name__}: {str(error).splitlines()[0]}; export a .pt2"
        ) from error
    content = signed(_with_metadata(to_onnx(exported), manifest))
    written = OnnxBranches(content, str(path))
    for row in range(len(example[0])):
        sample = tuple(tensor[row : row + 1].contiguous() for tensor in example)
        with torch.no_grad():
            answer, exit_, score, _ = module(*sample)
        got = written._one(sample)
        off = float((answer.cpu().float() - got.logits).abs().max())
        near = any(abs(float(score) - threshold) < 1e-4 for threshold in thresholds)
        if not near and (int(exit_) != int(got.exit) or off > 1e-3 * max(1.0, float(answer.abs().max()))):
            raise NotCapturableError(
                f"the ONNX graph answers otherwise than the model (off by {off:.1e}); nothing was written"
            )
    with replacing(path) as temporary:
        temporary.write_bytes(content)


class OnnxBranches:
    """A graph that :func:`write_branches` wrote: answers a batch one sample after another, on CPU.

    Attributes:
        inputs: what it takes.
        policy: when a sample leaves; its thresholds are fixed in the graph.
        description: labels, preprocessing, and the exits.
    """

    def __init__(self, content: bytes, source: str) -> None:
        written = {entry.key: entry.value for entry in parsed(content).metadata_props}
        manifest = read_manifest(written.get(_METADATA, "null"), source)
        if content != signed(content[: -len(_tail(""))]):
            raise FileError(
                f"{source!r} was damaged or changed after its export, so that its thresholds may not be those it names; "
                "export it again"
            )
        self.session = session(content)
        names = [entry.name for entry in self.session.get_inputs()]
        made = self.session.get_outputs()
        if len(names) != len(manifest.inputs) or len(made) != len(Prediction._fields):
            raise FileError(f"{source!r} takes or returns other values than its manifest says; export it again")
        self.inputs: Inputs = manifest.taken(torch.device("cpu"))
        self.policy: ExitPolicy = manifest.policy
        self.description: Description = manifest.description
        self._classes, self._names = manifest.num_classes, names

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction:
        """Takes what the model takes, and any number of samples.

        Raises:
            ExitkitError: other tensors than the model was attached with: names, sizes, dtype or device.
        """
        tensors = self.inputs.checked(args, kwargs)
        answers = [self._one([tensor[row : row + 1] for tensor in tensors]) for row in range(len(tensors[0]))]
        if not answers:
            blank = torch.zeros(0, dtype=torch.float64)
            return Prediction(torch.zeros(0, self._classes), blank.long(), blank, blank.bool())
        return Prediction(*(torch.cat(column) for column in zip(*answers, strict=True)))

    def _one(self, tensors: Sequence[Tensor]) -> Prediction:
        feeds = {name: tensor.contiguous().cpu().numpy() for name, tensor in zip(self._names, tensors, strict=True)}
        return Prediction(*(torch.from_numpy(array) for array in self.session.run(None, feeds)))


def signed(content: bytes) -> bytes:
    """An ONNX model with the digest of its bytes behind them, as one more entry of its metadata.

    In protobuf, messages one after another are one message, so that every reader takes the whole for a model.
    """
    return content + _tail(hashlib.sha256(content).hexdigest())


def _tail(digest: str) -> bytes:
    """``metadata_props`` (field 14) with one entry: a key (field 1) and a value (field 2) of 64 characters."""
    key, value = _DIGEST.encode(), digest.ljust(64).encode()
    entry = b"\x0a" + bytes([len(key)]) + key + b"\x12" + bytes([len(value)]) + value
    return b"\x72" + bytes([len(entry)]) + entry


def _with_metadata(content: bytes, manifest: Manifest) -> bytes:
    import onnx

    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, {_METADATA: to_text(manifest)})
    written: bytes = model.SerializeToString()
    return written
