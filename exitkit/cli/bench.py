"""Methods side by side on one backbone: trained, evaluated, tabulated, plotted."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from exitkit.common.batches import move, split_batch
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.common.files import replacing
from exitkit.common.intervals import with_interval
from exitkit.evaluation import ExitOutputs, collect, plot_curves, plot_hindsight
from exitkit.methods.presets import Method
from exitkit.multi_exit.attaching import attach
from exitkit.multi_exit.model import MultiExitModel
from exitkit.report import Stage, stages_of, write_samples
from exitkit.report.run import THRESHOLDS
from exitkit.surgery.inputs import Example
from exitkit.training import Trainer

_TIMED = 32


def compare(
    backbone: nn.Module,
    methods: Sequence[Method],
    train: Iterable[Any],
    test: Iterable[Any],
    placement: Mapping[str, Any],
    training: Mapping[str, Any],
    example_inputs: Any = None,
    report: Callable[[str], None] = print,
    stages: dict[str, tuple[Stage, ...]] | None = None,
    classes: int | None = None,
) -> dict[str, ExitOutputs]:
    """Train every method's exits on the frozen backbone and collect their outputs on ``test``.

    Methods that differ in their criterion alone (SDN and PBEE) share their trained exits. ``stages``, where given, is
    filled with every method's stages, timed on the first test samples. ``classes`` are those of the data, where known.

    Raises:
        ArgumentError: the model tells other classes apart than the data have, and ``placement`` does not say how many.
    """
    trained: dict[Method, tuple[ExitOutputs, tuple[Stage, ...]]] = {}
    results = {}
    for method in methods:
        parts = replace(method, name="", criterion="confidence")
        if parts not in trained:
            torch.manual_seed(training.get("seed", 0))
            own = backbone if placement.get("num_classes") is None else copy.deepcopy(backbone)  # a new layer for each
            model = attach(own, example_inputs, method=method, **placement)
            check_classes(model.num_classes, classes, placement.get("num_classes"), "--num-classes {}")
            report(
                f"{method.name}: {len(model.boundaries)} exits, heads add {head_share(model):.1%} of the backbone's MACs"
            )
            Trainer(model, **training).fit(train)
            outputs = collect(model, test)
            trained[parts] = outputs, () if stages is None else timed_stages(model, test, report)
        outputs, timed = trained[parts]
        results[method.name] = replace(outputs, criterion=method.score.name)
        if stages is not None:
            stages[method.name] = timed
    return results


def check_classes(model: int, data: int | None, asked: int | None, option: str) -> None:
    """Refuse labels that mean something else to the model, unless its number of classes was asked for.

    Args:
        model: classes (1: regression) of the model with its exits.
        data: those of the data, or None where nothing tells.
        asked: how many the user asked for.
        option: how to ask for a number, to be put into it.

    Raises:
        ArgumentError: the numbers differ.
    """
    if data is None or data == model or 1 in (model, asked) or (asked is not None and data < asked):
        return
    if asked is not None:
        raise ArgumentError(
            f"the data have {data} classes, but {option.format(asked)} was given; give {option.format(data)}"
        )
    own = f"; {option.format(model)} if the labels are the model's own" if model > data else ""
    raise ArgumentError(
        f"the data have {data} classes, but the model tells {model} apart\n"
        f"{option.format(data)} trains a new last layer for those of the data{own}"
    )


def timed_stages(model: MultiExitModel, test: Iterable[Any], report: Callable[[str], None]) -> tuple[Stage, ...]:
    """Timed on at most 32 samples of the first batch; without times where the engine does not take them."""
    given = Example.of(split_batch(next(iter(test)))[0])
    few = given.with_batch(min(_TIMED, len(given.tensors[0])))
    try:
        return stages_of(model, move(few.spec.batch(few.tensors), next(model.parameters()).device))
    except ExitkitError as error:
        report(f"stages are not timed: {error}")
        return stages_of(model)


def head_share(model: MultiExitModel) -> float:
    """What all heads, links and combiners cost together, as a share of the backbone."""
    return model.exits[-1].macs_fraction - 1


def comparison_table(results: Mapping[str, ExitOutputs], title: str) -> Table:
    """Accuracy of each method at the papers' budgets, beside the unmodified backbone."""
    tables = {name: outputs.curve().budget_table().rows for name, outputs in results.items()}
    columns = list(next(iter(tables.values())))
    table = Table(title=title, caption=_caption(results), caption_justify="left")
    for heading in ("method", "heads", *columns):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, rows in tables.items():
        heads = f"+{results[name].costs[-1] - 1:.1%}"
        table.add_row(name, heads, *("-" if point is None else f"{point.accuracy:.2%}" for point in rows.values()))
    return table


def _caption(results: Mapping[str, ExitOutputs]) -> str:
    outputs = next(iter(results.values()))
    accuracy = with_interval(float(outputs.accuracy()[-1]), len(outputs))
    return (
        f"backbone: {accuracy}. Accuracy at the highest τ whose average cost stays under each share of the unmodified "
        "backbone's MACs."
    )


def write_results(
    results: Mapping[str, ExitOutputs],
    directory: Path,
    about: Mapping[str, Any],
    stages: Mapping[str, Sequence[Stage]],
    dataset: Any,
) -> None:
    """Write ``results.json``, ``curve.png``, ``hindsight.png`` and each method's outputs to ``directory``.

    A few samples of ``dataset``, which the outputs were collected on, go to ``samples.json``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, outputs in results.items():
        outputs.save(directory / f"outputs-{name}.safetensors")
    plot_curves({name: outputs.curve() for name, outputs in results.items()}, directory / "curve.png")
    plot_hindsight(
        {name: outputs.hindsight_improvability() for name, outputs in results.items()}, directory / "hindsight.png"
    )
    summary = {
        "about": {**about, **machine()},
        "methods": {name: _summary(outputs, stages[name]) for name, outputs in results.items()},
    }
    (directory / THRESHOLDS).unlink(missing_ok=True)  # chosen on the outputs before these
    write_samples(directory, dataset, results)
    with replacing(directory / "results.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2))


def _summary(outputs: ExitOutputs, stages: Sequence[Stage]) -> dict[str, Any]:
    rows = outputs.curve().budget_table().rows
    return {
        "criterion": outputs.criterion,
        "backbone_macs": outputs.backbone_macs,
        "cost_per_exit": outputs.costs.tolist(),
        "accuracy_per_exit": outputs.accuracy().tolist(),
        "hindsight_improvability": outputs.hindsight_improvability().tolist(),
        "budgets": {name: None if point is None else point.to_dict() for name, point in rows.items()},
        "stages": [asdict(stage) for stage in stages],
    }


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}
