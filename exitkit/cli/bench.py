"""Methods side by side on one backbone: trained, evaluated, tabulated."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn

from exitkit.common.batches import move, split_batch
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.common.intervals import with_interval
from exitkit.evaluation import ExitOutputs, collect
from exitkit.evaluation.budgets import BUDGETS
from exitkit.evaluation.fields import check_top
from exitkit.methods.presets import Method
from exitkit.multi_exit.attaching import attach
from exitkit.multi_exit.model import MultiExitModel
from exitkit.report import Stage, stages_of
from exitkit.surgery.inputs import Example
from exitkit.training import Trainer

_TIMED = 32


@dataclass(frozen=True, eq=False)
class Trained:
    """A method's exits, their outputs on the test samples, and the stages as they were timed."""

    model: MultiExitModel
    outputs: ExitOutputs
    stages: tuple[Stage, ...]


def compare(
    backbone: nn.Module,
    methods: Sequence[Method],
    train: Iterable[Any],
    test: Iterable[Any],
    placement: Mapping[str, Any],
    training: Mapping[str, Any],
    example_inputs: Any = None,
    report: Callable[[str], None] = print,
    classes: int | None = None,
    top: int = 1,
) -> Iterator[tuple[str, Trained]]:
    """Train every method's exits on the frozen backbone and collect their outputs on ``test``; one method after another.

    Methods that differ in their criterion alone (SDN and PBEE) share their trained exits. ``classes`` are those of the
    data, where known; ``top`` of them will be counted as right.

    Raises:
        ArgumentError: a regression, or the model tells other classes apart than the data have, and ``placement`` does not say
            how many.
    """
    trained: dict[Method, Trained] = {}
    for method in methods:
        parts = replace(method, name="", criterion="confidence")
        if parts not in trained:
            torch.manual_seed(training.get("seed", 0))
            own = backbone if placement.get("num_classes") is None else deepcopy(backbone)  # a new layer for each
            model = attach(own, example_inputs, method=method, **placement)
            if model.regression:
                raise ArgumentError(
                    "the model has 1 output, which is regression, and bench compares methods by accuracy; train exits of one "
                    "method by a recipe (exitkit init, exitkit train), and set such runs side by side by exitkit compare"
                )
            check_classes(model.num_classes, classes, placement.get("num_classes"), "--num-classes {}")
            check_top(top, model.num_classes)
            report(
                f"{method.name}: {counted(len(model.boundaries), 'exit')}, heads add {head_share(model):.1%} of the "
                "backbone's MACs"
            )
            Trainer(model, **training).fit(train)
            trained[parts] = Trained(model, collect(model, test), timed_stages(model, test, report))
        yield method.name, _scored_by(method, trained[parts])


def _scored_by(method: Method, trained: Trained) -> Trained:
    """The same exits, whose samples leave by the score of ``method``."""
    model = copy(trained.model)
    model.method = method
    return replace(trained, model=model, outputs=replace(trained.outputs, criterion=method.score.name))


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


def comparison_table(
    results: Mapping[str, ExitOutputs], title: str, budgets: Sequence[float] = BUDGETS, top: int = 1
) -> Table:
    """Accuracy of each method at the budgets, by default the papers', beside the unmodified backbone; then in its ``top``."""
    counted = {(name, k): outputs.curve(top=k) for name, outputs in results.items() for k in sorted({1, top})}
    tables = {key: curve.budget_table(budgets).rows for key, curve in counted.items()}
    columns = list(next(iter(tables.values())))
    table = Table(title=title, caption=_caption(results), caption_justify="left")
    for heading in ("method", "heads", *columns):
        table.add_column(heading.replace(" (", "\n("), justify="left" if heading == "method" else "right")
    for (name, k), rows in tables.items():
        heads = f"+{results[name].costs[-1] - 1:.1%}"
        shown = name if k == 1 else f"{name}, top {k}"
        table.add_row(shown, heads, *("-" if point is None else f"{point.accuracy:.2%}" for point in rows.values()))
    return table


def over_budget(results: Mapping[str, ExitOutputs], budgets: Sequence[float] = BUDGETS) -> list[str]:
    """For each method whose first exit is over a budget, why the table has a ``-`` there and what would help."""
    lines = []
    for name, outputs in results.items():
        cheapest = outputs.curve().cost[0]
        missed = [budget for budget in budgets if budget <= cheapest]
        if missed:
            lines.append(
                f"- at {100 * max(missed):g}%: the first exit of {name} costs {cheapest:.1%} already; an earlier one, or one "
                "with a cheaper head, would be needed"
            )
    return lines


def _caption(results: Mapping[str, ExitOutputs]) -> str:
    outputs = next(iter(results.values()))
    accuracy = with_interval(float(outputs.accuracy()[-1]), len(outputs))
    return (
        f"backbone: {accuracy}. Accuracy at the highest τ whose average cost stays under each share of the unmodified "
        "backbone's MACs."
    )


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    )
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}
