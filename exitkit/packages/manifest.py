"""The manifest of a package: everything of a program but its steps' code, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch

from exitkit.common.errors import FileError
from exitkit.common.versions import installed_versions
from exitkit.engine.program import Description, Inputs, Program, Step
from exitkit.methods.policy import ExitPolicy
from exitkit.multi_exit.preprocessing import preprocessing_from_json, preprocessing_to_json
from exitkit.surgery.inputs import CallSpec

FORMAT = "exitkit-package-3"
Kind = Literal["torch", "compiled", "onnx"]


def to_manifest(program: Program, policy: ExitPolicy, description: Description, kind: Kind) -> dict[str, Any]:
    """As plain data."""
    inputs = program.inputs
    return {
        "format": FORMAT,
        "kind": kind,
        "versions": installed_versions(),
        "device": inputs.device.type,
        "inputs": [
            {"key": key, "name": name, "sizes": sizes, "dtype": str(dtype).removeprefix("torch.")}
            for key, name, sizes, dtype in zip(
                inputs.spec.keys, inputs.names, inputs.sizes, inputs.dtypes, strict=True
            )
        ],
        "steps": [
            {key: value for key, value in vars(step).items() if key not in ("run", "stage")} for step in program.steps
        ],
        "axes": {name: program.axes[name] for name in _carried(program) if name in program.axes},
        "num_classes": program.num_classes,
        "dtype": str(program.dtype).removeprefix("torch."),
        "policy": policy.to_dict(),
        **asdict(description),
        "preprocessing": preprocessing_to_json(description.preprocessing),
    }


def description_of(manifest: dict[str, Any]) -> Description:
    """The inverse of :func:`to_manifest`, as far as it is neither the program nor the policy."""
    return Description(
        None if manifest["labels"] is None else tuple(manifest["labels"]),
        preprocessing_from_json(manifest["preprocessing"]),
        tuple((name, share) for name, share in manifest["exits"]),
    )


def program_of_manifest(
    manifest: dict[str, Any], runs: Sequence[Callable[..., Sequence[Any]]], device: torch.device
) -> Program:
    """The inverse of :func:`to_manifest`: the program, with the steps' code."""
    steps = []
    for run, step in zip(runs, manifest["steps"], strict=True):
        inputs, outputs, live = (tuple(step[key]) for key in ("inputs", "outputs", "live"))
        steps.append(Step(run, step["exit"], step["decides"], inputs, outputs, live))
    return Program(
        inputs_of(manifest, device),
        tuple(steps),
        manifest["axes"],
        {},
        manifest["num_classes"],
        getattr(torch, manifest["dtype"]),
    )


def inputs_of(manifest: dict[str, Any], device: torch.device) -> Inputs:
    """What the package's program takes."""
    entries = manifest["inputs"]
    keys = tuple(entry["key"] for entry in entries)
    return Inputs(
        CallSpec((None,) * sum(isinstance(key, int) for key in keys), (), keys),
        tuple(entry["name"] for entry in entries),
        tuple(tuple(entry["sizes"]) for entry in entries),
        tuple(getattr(torch, entry["dtype"]) for entry in entries),
        device,
    )


def check_format(manifest: Any, path: str) -> None:
    """Refuse what is not a package of this format.

    Raises:
        ExitkitError: another program's file, or a later format.
    """
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found == FORMAT:
        return
    if isinstance(found, str) and found.startswith("exitkit-package-"):
        writer = manifest.get("versions", {}).get("exitkit")
        raise FileError(
            f"{path!r} is a {found} of exitkit {writer}; exitkit {installed_versions()['exitkit']} reads {FORMAT}: "
            "update exitkit, or export again"
        )
    raise FileError(f"{path!r} is no package of exitkit; write one with exitkit.export(ee, path)")


def _carried(program: Program) -> list[str]:
    """Every value that a step hands on."""
    names = [*program.inputs.names, *(name for step in program.steps for name in (*step.inputs, *step.live))]
    return list(dict.fromkeys(names))
