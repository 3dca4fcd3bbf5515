"""What a run leaves in its folder (:mod:`exitkit.report.run` reads it); in another one where its own cannot be written to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Subset

from exitkit.cli.bench import Trained, machine
from exitkit.cli.data.split import Split
from exitkit.common.batches import split_batch
from exitkit.common.errors import ExitkitError, FileError
from exitkit.common.files import UNCHANGED, replacing
from exitkit.evaluation import ExitOutputs, RegressionOutputs, plot_curves, plot_hindsight
from exitkit.multi_exit.preprocessing import preprocessing_to_json
from exitkit.packages.exporting import ENDINGS
from exitkit.report import write_samples
from exitkit.report.run import (
    BACKBONE,
    INPUTS,
    RESULTS,
    THRESHOLDS,
    exits_folder,
    holds_regression,
    outputs_file,
    validation_file,
)
from exitkit.report.samples import CLASSES, class_names
from exitkit.retrofitting.result import PREPROCESSING
from exitkit.surgery.inputs import Example

_SAMPLES, _BYTES = 64, 32 * 2**20
"""Of the test samples that are kept to time a package on: how many, and of what size together, at most."""

_DERIVED = (THRESHOLDS, "report.html", "report-*.png", "report-*.csv", *(f"model{ending}" for ending in ENDINGS))
"""Files that commands make of a run in its folder, unless they are told another name."""


def written(out: Path, write: Callable[[Path], None], unused: bool = False) -> None:
    """Call ``write`` with the folder ``out``; where it cannot be written to any more, with a temporary one, so that what
    was computed is not lost.

    Args:
        out: the folder.
        write: writes into the folder that it is given.
        unused: no run was in ``out`` when this one began; one that is there now is another process's, and stays.

    Raises:
        FileError: ``out`` could not be written to; it says where the results are instead.
    """
    try:
        if unused and (out / RESULTS).exists():
            raise FileExistsError("another process has written its run there meanwhile")
        write(out)
        return
    except OSError as error:
        reason = str(error).removesuffix(UNCHANGED)
    try:
        instead = Path(mkdtemp(prefix=f"{out.resolve().name}-"))
        write(instead)
    except (OSError, ExitkitError) as error:
        raise FileError(
            f"--out {str(out)!r}: {reason}. A temporary folder could not be written to either ({error}); make room, "
            "and run the command again"
        ) from error
    raise FileError(f"--out {str(out)!r}: {reason}. The results are in {str(instead)!r} instead; move them from there")


def write_results(
    results: Mapping[str, Trained],
    directory: Path,
    about: Mapping[str, Any],
    split: Split,
    backbone: nn.Module | None = None,
    top: int = 1,
    validation: ExitOutputs | None = None,
) -> None:
    """Write every method's exits and outputs, a few test inputs, ``results.json``, and pictures of it.

    ``backbone``: whose weights are written too, because they are not those that it was loaded with. ``top``: above 1, the
    summary has the accuracy among so many likeliest classes as well. ``validation``: the outputs on the validation samples,
    of the only method.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _remove_derived(directory)
    _write_backbone(directory / BACKBONE, backbone)
    for name, one in results.items():
        one.model.save_pretrained(exits_folder(directory, name), outputs=one.outputs)
        one.outputs.save(outputs_file(directory, name))
        if validation is not None:
            validation.save(validation_file(directory, name))
    _write_inputs(directory / INPUTS, split)
    preprocessing = None if split.preprocessing is None else preprocessing_to_json(split.preprocessing)
    facts = {**about, "preprocessing": preprocessing, **machine()}
    methods = {} if _regression(results) else {name: _summary(one, top) for name, one in results.items()}
    with replacing(directory / RESULTS) as temporary:
        temporary.write_text(json.dumps({"about": facts, "methods": methods}, indent=2))
    if methods:
        outputs = {name: one.outputs for name, one in results.items()}
        write_samples(directory, split.test, outputs)
        plot_curves({name: one.curve() for name, one in outputs.items()}, directory / "curve.png")
        plot_hindsight(
            {name: one.hindsight_improvability() for name, one in outputs.items()}, directory / "hindsight.png"
        )


def write_class_names(directory: Path, split: Split, count: int) -> None:
    """Names of the ``count`` classes, one a line, where the training samples have so many; a user's own file stays."""
    names, path = class_names(split.train) or (), directory / CLASSES
    if len(names) == count and not path.exists():
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def write_preparation(directory: Path, split: Split) -> None:
    """How samples were made of images, and a few of those held out as the model takes them, to time a package on."""
    _write_inputs(directory / INPUTS, split)
    if split.preprocessing is not None:
        with replacing(directory / PREPROCESSING) as temporary:
            temporary.write_text(json.dumps(preprocessing_to_json(split.preprocessing), indent=2), encoding="utf-8")


def next_steps(out: Path) -> list[str]:
    """What to do with a run that was written, in lines."""
    folder = shlex.quote(str(out))
    if holds_regression(out):
        return [
            f"Written to {out}/. To go on:",
            f"  exitkit report {folder}                   # a page to look at; its .csv has the error at every τ",
            f"  exitkit export {folder} --threshold TAU   # one file that runs without the model's code",
        ]
    return [
        f"Written to {out}/. To go on:",
        f"  exitkit calibrate {folder}   # choose τ, with a guarantee",
        f"  exitkit report {folder}      # a page to look at",
        f"  exitkit export {folder}      # one file that runs without the model's code",
    ]


def _remove_derived(directory: Path) -> None:
    """What calibrate, export and report made of the outputs before these."""
    for pattern in _DERIVED:
        for path in directory.glob(pattern):
            path.unlink()


def _regression(results: Mapping[str, Trained]) -> bool:
    return any(isinstance(one.outputs, RegressionOutputs) for one in results.values())


def _summary(trained: Trained, top: int) -> dict[str, Any]:
    outputs = trained.outputs
    counted = {} if top == 1 else {f"top_{top}": _accuracies(outputs, top)}
    return {
        "criterion": outputs.criterion,
        "backbone_macs": outputs.backbone_macs,
        "cost_per_exit": outputs.costs.tolist(),
        **_accuracies(outputs, 1),
        **counted,
        "hindsight_improvability": outputs.hindsight_improvability().tolist(),
        "stages": [asdict(stage) for stage in trained.stages],
    }


def _accuracies(outputs: ExitOutputs, top: int) -> dict[str, Any]:
    rows = outputs.curve(top=top).budget_table().rows
    return {
        "accuracy_per_exit": outputs.accuracy(top).tolist(),
        "budgets": {name: None if point is None else point.to_dict() for name, point in rows.items()},
    }


def _write_backbone(path: Path, backbone: nn.Module | None) -> None:
    if backbone is None:
        path.unlink(missing_ok=True)  # of a run before this one
        return
    with replacing(path) as temporary:
        save_file({name: value.cpu().contiguous().clone() for name, value in backbone.state_dict().items()}, temporary)


def _write_inputs(path: Path, split: Split) -> None:
    """Test samples drawn at random, as the model takes them."""
    total = len(split.test)  # type: ignore[arg-type]
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:_SAMPLES].tolist()
    example = Example.of(
        split_batch(next(iter(DataLoader(Subset(split.test, rows), len(rows), collate_fn=split.collate))))[0]
    )
    bytes_each = sum(tensor.nbytes for tensor in example.tensors) // len(rows)
    kept = example.with_batch(min(len(rows), max(1, _BYTES // max(1, bytes_each))))
    tensors = {str(key): tensor.contiguous() for key, tensor in zip(kept.spec.keys, kept.tensors, strict=True)}
    with replacing(path) as temporary:
        save_file(tensors, temporary)
