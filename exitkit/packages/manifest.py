"""The manifest of a package: everything of a program but its steps' code, as JSON of a declared form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch

from exitkit.common.checks import Count, Index, Positive
from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.schema import build, parse_json, to_json
from exitkit.common.versions import installed_versions
from exitkit.engine.program import Description, Inputs, Program, Step
from exitkit.methods.policy import ExitPolicy
from exitkit.multi_exit.preprocessing import MOST_VALUES, preprocessing_from_json, preprocessing_to_json
from exitkit.surgery.inputs import CallSpec

FORMAT = "exitkit-package-3"
_FAMILY = "exitkit-package-"
CAPABILITY = "compute capability"
"""Among a package's versions: of the GPU that it was compiled on."""
Kind = Literal["torch", "compiled", "onnx", "executorch"]
Float = Literal["float32", "float16", "bfloat16", "float64"]
DType = Literal[Float, "int64", "int32", "int16", "int8", "uint8", "bool"]


@dataclass(frozen=True)
class Input:
    """A tensor that the package takes: its argument, the steps' name for it, its shape (batch first) and dtype.

    ``rows`` are those of the table in which its numbers are looked up, where they are.
    """

    key: Index | str
    name: str
    sizes: tuple[Count | None, ...]
    dtype: DType
    rows: Count | None = None


@dataclass(frozen=True)
class StepEntry:
    """A :class:`~exitkit.engine.program.Step` without its code, the memory formats of its inputs, and its code's digest."""

    exit: Index
    decides: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    live: tuple[str, ...]
    channels_last: tuple[bool, ...] = ()
    sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json``, the metadata of an ``.onnx`` and the manifest of a ``.pte`` hold, and nothing else.

    Attributes:
        longest: tokens of a text, at most; None where nothing limits them.
        axes: the batch's dimension of every value that has one.
        exits: name and share of the backbone's MACs of each exit.

    Raises:
        ArgumentError: entries that contradict one another.
    """

    format: str
    kind: Kind
    versions: dict[str, str]
    device: str
    inputs: tuple[Input, ...]
    longest: Count | None
    steps: tuple[StepEntry, ...]
    axes: dict[str, Index]
    num_classes: Count
    dtype: Float
    policy: ExitPolicy
    labels: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None
    exits: tuple[tuple[str, Positive], ...]

    def __post_init__(self) -> None:
        for fault, sound in _rules(self):
            if not sound:
                raise ArgumentError(fault)

    @classmethod
    def of(cls, program: Program, policy: ExitPolicy, description: Description, kind: Kind) -> Self:
        """Of a program and what is said about it; channels-last and digests are added where the steps are written."""
        taken = program.inputs
        names = [*taken.names, *(name for step in program.steps for name in (*step.inputs, *step.live))]
        return cls(
            FORMAT,
            kind,
            _versions(kind, taken.device),
            taken.device.type,
            tuple(
                Input(key, name, sizes, _dtype_name(dtype), rows)  # type: ignore[arg-type]
                for key, name, sizes, dtype, rows in zip(
                    taken.spec.keys, taken.names, taken.sizes, taken.dtypes, taken.tables, strict=True
                )
            ),
            taken.longest,
            tuple(StepEntry(one.exit, one.decides, one.inputs, one.outputs, one.live) for one in program.steps),
            {name: program.axes[name] for name in dict.fromkeys(names) if name in program.axes},
            program.num_classes,
            _dtype_name(program.dtype),  # type: ignore[arg-type]
            policy,
            description.labels,
            preprocessing_to_json(description.preprocessing),
            description.exits,
        )

    @property
    def description(self) -> Description:
        """Labels, preprocessing and exits."""
        return Description(self.labels, preprocessing_from_json(self.preprocessing), self.exits)

    def program(self, runs: Sequence[Callable[..., Sequence[Any]]], device: torch.device) -> Program:
        """The program, with the steps' code."""
        steps = tuple(
            Step(run, entry.exit, entry.decides, entry.inputs, entry.outputs, entry.live)
            for run, entry in zip(runs, self.steps, strict=True)
        )
        return Program(self.taken(device), steps, dict(self.axes), {}, self.num_classes, getattr(torch, self.dtype))

    def taken(self, device: torch.device) -> Inputs:
        """What the package's program takes."""
        keys = tuple(entry.key for entry in self.inputs)
        return Inputs(
            CallSpec((None,) * sum(isinstance(key, int) for key in keys), (), keys),
            tuple(entry.name for entry in self.inputs),
            tuple(entry.sizes for entry in self.inputs),
            tuple(getattr(torch, entry.dtype) for entry in self.inputs),
            tuple(entry.rows for entry in self.inputs),
            device,
            self.longest,
        )


def capability(device: torch.device) -> str:
    """The compute capability of a GPU, such as ``9.0``: what code compiled on it is for."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def to_text(manifest: Manifest) -> str:
    """As JSON."""
    return to_json({**vars(manifest), "policy": manifest.policy.to_dict(), **_entries(manifest)}, indent=1)


def read_manifest(text: str | bytes, path: str) -> Manifest:
    """A checked manifest.

    Raises:
        FileError: no JSON, another program's file, another format, or what no manifest holds.
    """
    try:
        data = parse_json(text)
    except ValueError as error:
        raise FileError(f"{path!r} is damaged: its manifest is {str(error)[:200]}; export it again") from error
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(found, str) or not found.startswith(_FAMILY):
        raise FileError(f"{path!r} is not a package of exitkit; write one with exitkit.export(ee, path)")
    if found != FORMAT:
        made = data.get("versions")
        writer = made.get("exitkit") if isinstance(made, dict) else None
        raise FileError(
            f"{path!r} is a {found[:40]} of exitkit {str(writer)[:40]}; exitkit {installed_versions()['exitkit']} reads "
            f"{FORMAT}: update exitkit, or export again"
        )
    manifest = build(Manifest, {"longest": None} | data, repr(path))  # older packages do not say
    _ = manifest.description  # checked too
    return manifest


def _rules(manifest: Manifest) -> Iterator[tuple[str, bool]]:
    """What must hold between the entries, and what is wrong where it does not."""
    steps, exits = manifest.steps, len(manifest.policy.thresholds)
    yield (
        f"steps are for exits {[step.exit for step in steps][:20]}, not 0 to {exits}",
        [step.exit for step in steps] == list(range(exits + 1)),
    )
    yield "a step does not decide, although samples may leave there", all(step.decides for step in steps)
    yield f"exits holds {len(manifest.exits)} entries, not {exits + 1}", len(manifest.exits) == exits + 1
    yield "inputs is empty", bool(manifest.inputs)
    keys = [entry.key for entry in manifest.inputs]
    positions = [key for key in keys if isinstance(key, int)]
    yield (
        "inputs have names of more than 200 characters",
        all(len(f"{one.key}{one.name}") <= 200 for one in manifest.inputs),
    )
    yield f"inputs have the keys {keys[:20]}", len(set(keys)) == len(keys) and positions == list(range(len(positions)))
    for entry in manifest.inputs:
        values = math.prod(size or 1 for size in entry.sizes[1:])
        yield f"input {entry.name!r} has the sizes {entry.sizes[:8]}", bool(entry.sizes) and values <= MOST_VALUES
    text = all(len(entry.sizes) == 2 for entry in manifest.inputs)
    yield f"longest={manifest.longest} is for texts, and the inputs are none", manifest.longest is None or text
    yield f"num_classes={manifest.num_classes} is too large", manifest.num_classes <= MOST_VALUES
    labels = manifest.num_classes if manifest.labels is None else len(manifest.labels)
    yield f"labels holds {labels} names for {manifest.num_classes} classes", labels == manifest.num_classes
    yield (
        f"policy.dtype={manifest.policy.dtype!r} is not one of torch's",
        isinstance(getattr(torch, manifest.policy.dtype, None), torch.dtype),
    )
    known = {entry.name for entry in manifest.inputs}
    for step in steps:
        yield f"step {step.exit} reads {step.inputs[:8]}, not all of which are known", known.issuperset(step.inputs)
        known |= set(step.outputs)
        yield f"step {step.exit} hands on {step.live[:8]}, not all of which are known", known.issuperset(step.live)
        formats = len(step.channels_last) in (0, len(step.inputs))
        yield f"step {step.exit} has {len(step.channels_last)} memory formats for {len(step.inputs)} inputs", formats
        known = set(step.live)
    yield "axes of values are beyond the eighth", all(axis < 8 for axis in manifest.axes.values())


def _versions(kind: Kind, device: torch.device) -> dict[str, str]:
    on_gpu = kind == "compiled" and device.type == "cuda"
    return installed_versions() | ({CAPABILITY: capability(device)} if on_gpu else {})


def _entries(manifest: Manifest) -> dict[str, Any]:
    return {"inputs": [asdict(one) for one in manifest.inputs], "steps": [asdict(one) for one in manifest.steps]}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
