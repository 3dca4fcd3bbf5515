"""Methods side by side on one backbone: trained, evaluated, tabulated, plotted."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from exitkit.attach import attach
from exitkit.evaluation import ExitOutputs, collect, plot_curves, plot_hindsight
from exitkit.files import replacing
from exitkit.methods import Method
from exitkit.model import MultiExitModel
from exitkit.training import Trainer


def compare(
    backbone: nn.Module,
    methods: Sequence[Method],
    train: Iterable[Any],
    test: Iterable[Any],
    placement: Mapping[str, Any],
    training: Mapping[str, Any],
    example_inputs: Any = None,
    report: Callable[[str], None] = print,
) -> dict[str, ExitOutputs]:
    """Train every method's exits on the frozen backbone and collect their outputs on ``test``.

    Methods that differ in their criterion alone (SDN and PBEE) share their trained exits.
    """
    trained: dict[Method, ExitOutputs] = {}
    results = {}
    for method in methods:
        parts = replace(method, name="", criterion="confidence")
        if parts not in trained:
            torch.manual_seed(training.get("seed", 0))
            model = attach(backbone, example_inputs, method=method, **placement)
            report(
                f"{method.name}: {len(model.boundaries)} exits, heads add {head_share(model):.1%} of the backbone's MACs"
            )
            Trainer(model, **training).fit(train)
            trained[parts] = collect(model, test)
        results[method.name] = replace(trained[parts], criterion=method.criterion)
    return results


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
    accuracy = next(iter(results.values())).accuracy()[-1]
    return (
        f"backbone: {accuracy:.2%}. Accuracy at the highest τ whose average cost stays under each share of the unmodified "
        "backbone's MACs."
    )


def write_results(results: Mapping[str, ExitOutputs], directory: Path, about: Mapping[str, Any]) -> None:
    """Write ``results.json``, ``curve.png``, ``hindsight.png`` and each method's outputs to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, outputs in results.items():
        outputs.save(directory / f"outputs-{name}.safetensors")
    plot_curves({name: outputs.curve() for name, outputs in results.items()}, directory / "curve.png")
    plot_hindsight(
        {name: outputs.hindsight_improvability() for name, outputs in results.items()}, directory / "hindsight.png"
    )
    summary = {
        "about": {**about, **machine()},
        "methods": {name: _summary(outputs) for name, outputs in results.items()},
    }
    with replacing(directory / "results.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2))


def _summary(outputs: ExitOutputs) -> dict[str, Any]:
    rows = outputs.curve().budget_table().rows
    return {
        "criterion": outputs.criterion,
        "backbone_macs": outputs.backbone_macs,
        "cost_per_exit": outputs.costs.tolist(),
        "accuracy_per_exit": outputs.accuracy().tolist(),
        "hindsight_improvability": outputs.hindsight_improvability().tolist(),
        "budgets": {name: None if point is None else point._asdict() for name, point in rows.items()},
    }


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}
