"""``write_report``: runs as one HTML file that needs nothing else, and its pictures as PNG and CSV beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup

from exitkit.analysis.measurement import Table, shown
from exitkit.analysis.overview import FOLDER, KINDS, Kind, Overview
from exitkit.common.console import printable
from exitkit.common.errors import ArgumentError
from exitkit.common.files import replacing
from exitkit.common.intervals import share_interval
from exitkit.evaluation import ExitOutputs, Runs
from exitkit.evaluation.fields import check_top
from exitkit.evaluation.paired import check_comparable, same_backbone
from exitkit.report import figures
from exitkit.report.decision import decide, export_command, opened
from exitkit.report.pages import rendered, source
from exitkit.report.points import MATRIX, Points, points_of
from exitkit.report.regressions import errors_shown, regressions_in
from exitkit.report.repeated import read_repeated, seeds_in
from exitkit.report.run import Check, Result, Run, holds_regression, read_run
from exitkit.report.stages import backbone_milliseconds

_FACTS = ("model", "weights", "data", "epochs", "every", "device")


def write_report(runs: Sequence[str | Path], path: str | Path | None = None, top: int = 1) -> Path:
    """Write the report of one or several runs of the same backbone on the same samples.

    That of regressions is a short page: squared errors under budgets and of every exit.

    Args:
        runs: their directories, as ``exitkit bench`` writes them (:mod:`exitkit.report.run`). Of repeated runs
            (:mod:`exitkit.report.repeated`) the page shows that of the first seed, and a table of all.
        path: the ``.html`` file; by default ``report.html`` in the first run.
        top: above 1, budgets are also shown in the accuracy among so many likeliest classes.

    Returns:
        ``path``. Beside it lie ``NAME-FIGURE.png`` and ``NAME-FIGURE.csv`` for each figure, NAME being the file's own.

    Raises:
        ArgumentError: no results, no labels, other samples or backbones, a damaged file, or a path that is not ``.html``.
    """
    if not runs:
        raise ArgumentError("runs=[] is empty; give at least one run's directory")
    firsts = [next(iter(seeds_in(run).values()), Path(run)) for run in runs]
    regression = any(map(holds_regression, firsts))
    page = _of_regressions(runs, firsts[0], top) if regression else _of_classifiers(runs, firsts, top)
    path = Path(path) if path is not None else Path(runs[0]) / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"--out {str(path)!r} must end in .html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--out {str(path)!r} cannot be written: {error}") from error
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        written = page(path)
    with replacing(path) as temporary:
        temporary.write_text(written, encoding="utf-8")
    return path


def _of_regressions(runs: Sequence[str | Path], first: Path, top: int) -> Callable[[Path], str]:
    """What makes the page of regressions, for where it shall lie; ``first`` is the first run, or its first seed."""
    found = regressions_in(runs)
    return lambda path: rendered(
        "report/page/regression.html",
        {"shown": shown},
        title=_title(list(map(Path, runs))),
        about=_facts(read_run(first, regression=True).about),
        analysis=_analysis(first / FOLDER),
        **errors_shown(found, path, top),
    )


def _of_classifiers(runs: Sequence[str | Path], firsts: Sequence[Path], top: int) -> Callable[[Path], str]:
    """What makes the page of classifiers, for where it shall lie; ``firsts`` are the runs, or each one's first seed."""
    read = [read_run(first) for first in firsts]
    places = _together(read, [printable(Path(run).resolve().name) for run in runs])
    results = {name: run.results[method] for name, (run, method) in places.items()}
    outputs = {name: result.outputs for name, result in results.items()}
    for name, one in outputs.items():
        if one.labels is None:
            raise ArgumentError(
                f"labels=None in the outputs {name!r}: a report of accuracy needs labels. To report agreement with the full "
                "model instead, save outputs.against_backbone()"
            )
        check_top(top, one.log_probs.shape[2])
    check_comparable(outputs)
    results = {first: results[first] for first in [opened(results)]} | results
    points = {name: points_of(one.outputs, _chosen(one)) for name, one in results.items()}
    return lambda path: _page(places, results, points, path, top, _repeated(runs))


def _title(directories: Sequence[Path]) -> str:
    return "Early exits: " + ", ".join(printable(directory.resolve().name) for directory in directories)


def _facts(about: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, about[name]) for name in _FACTS if about.get(name) is not None]


def _repeated(runs: Sequence[str | Path]) -> dict[str, Runs]:
    """Methods over their seeds, by the names that they have in the page."""
    found = {str(run): read_repeated(run) for run in runs if seeds_in(run)}
    return {
        method if len(runs) == 1 else f"{printable(Path(run).resolve().name)}/{method}": repeated
        for run, methods in found.items()
        for method, repeated in methods.items()
    }


def _together(runs: Sequence[Run], names: Sequence[str]) -> dict[str, tuple[Run, str]]:
    """The run and method of all results by name, with their run's name before the method's where there are several."""
    if len(runs) == 1:
        return {method: (runs[0], method) for method in runs[0].results}
    if len(set(names)) < len(names):
        raise ArgumentError(f"RUN_DIR: {names} holds a name twice; give each run once, under a name of its own")
    return {f"{name}/{method}": (run, method) for name, run in zip(names, runs, strict=True) for method in run.results}


def _chosen(result: Result) -> float | None:
    """The τ that was calibrated, where it is on the curve: one for all exits, and for the scores of the outputs."""
    if result.calibrated is None:
        return None
    chosen, outputs = result.calibrated.chosen, result.outputs
    same = (chosen.criterion, chosen.temperatures) == (outputs.criterion, outputs.temperatures)
    return chosen.thresholds[0] if same and len(set(chosen.thresholds)) == 1 else None


def _page(
    places: dict[str, tuple[Run, str]],
    results: dict[str, Result],
    points: dict[str, Points],
    path: Path,
    top: int,
    repeated: dict[str, Runs],
) -> str:
    """The page, opened at the first of the results."""
    runs = list(dict.fromkeys(run for run, _ in places.values()))
    outputs = {name: result.outputs for name, result in results.items()}
    opens, first = next(iter(outputs.items()))
    decision = decide(opens, results[opens], places[opens][0].directory, places[opens][1])
    classes = _class_names(runs, first.log_probs.shape[2])
    curve, across, up = figures.draw_curves(points, path, "curve")
    kept = {sample.row: sample for result in results.values() for sample in result.samples}
    data = {
        "samples": len(first),
        "classes": classes,
        "matrix": len(classes) <= MATRIX,
        "x": across,
        "y": up,
        "methods": [_method(name, results[name], points[name], list(kept), places[name]) for name in results],
        "pictures": [asdict(sample) for sample in kept.values()],
    }
    js = source("report/page/report.js")
    return rendered(
        "report/page/report.html",
        {"shown": shown, "interval": _interval},
        js=Markup(js),
        script=base64.b64encode(hashlib.sha256(js.encode()).digest()).decode(),
        title=_title([run.directory for run in runs]),
        about=_facts(runs[0].about),
        data=data,
        decision=decision,
        device=", on " + str(runs[0].about["device"]) if runs[0].about.get("device") else "",
        others=[name for name, one in outputs.items() if same_backbone(first, one) is False],
        curve=curve,
        hindsight=figures.draw_hindsight(outputs, path, "hindsight"),
        improvability=[(name, one.hindsight_improvability()) for name, one in outputs.items()],
        exits=max(len(one.macs) for one in outputs.values()),
        budgets=[
            (name if k == 1 else f"{name}, top {k}", one.curve(top=k).budget_table().rows)
            for name, one in outputs.items()
            for k in sorted({1, top})
        ],
        repeated=[
            (name if k == 1 else f"{name}, top {k}", len(runs.seeds), runs.budget_table(top=k))
            for name, runs in repeated.items()
            for k in sorted({1, top})
        ],
        reliability=[_pictures(name, outputs[name], points[name], classes, path) for name in outputs],
        stages=[(name, _stage_rows(result)) for name, result in results.items() if result.stages],
        guarantees=[(name, one.calibrated) for name, one in results.items() if one.calibrated is not None],
        analysis=_analysis(runs[0].directory / FOLDER),
    )


def _analysis(folder: Path) -> list[tuple[Kind, list[figures.Drawn], list[Table]]]:
    """What ``exitkit analyse`` measured: for each measurement a picture and a table of every model."""
    found = Overview.read(folder)
    rows = []
    for name, models in ({} if found is None else found.rows).items():
        assert found is not None
        drawn = [
            figures.embedded(figure, f"analysis-{name}-{number}", f"{KINDS[name].title} of {printable(model)}")
            for number, (model, figure) in enumerate(found.figures(name).items())
        ]
        tables = [replace(one.table(), title=printable(model)) for model, one in models.items()]
        rows.append((KINDS[name], drawn, tables))
    return rows


def _interval(check: Check) -> str:
    """Wilson's 95% interval of a measured share; wider than need be where single losses lie between 0 and 1."""
    if not 0 <= check.risk <= 1:
        return "–"
    from scipy.stats import binomtest

    interval = binomtest(round(check.risk * check.samples), check.samples).proportion_ci(method="wilson")
    return f"{interval.low:.1%} to {interval.high:.1%}"


def _pictures(
    name: str, outputs: ExitOutputs, points: Points, classes: Sequence[str], path: Path
) -> tuple[str, figures.Drawn]:
    """What there is to see of one method alone: in the page its reliability, beside it also where samples leave."""
    tail = re.sub(r"\W+", "-", name)
    figures.still_exits(points, path, f"exits-{tail}")
    figures.still_confusion(points, classes, path, f"confusion-{tail}")
    return name, figures.draw_reliability(outputs, path, f"reliability-{tail}")


def _method(name: str, result: Result, points: Points, rows: Sequence[int], place: tuple[Run, str]) -> dict[str, Any]:
    """What the page's script needs of one method."""
    outputs, stages = result.outputs, result.stages
    exits = len(outputs.macs)
    labels, answers = outputs.labels, outputs.answers
    assert labels is not None
    timed = bool(stages) and stages[0].milliseconds is not None
    return {
        "name": name,
        "names": [stage.exit for stage in stages] or [figures.exit_name(exit_, exits) for exit_ in range(exits)],
        "costs": outputs.costs.tolist(),
        "accuracies": outputs.accuracy().tolist(),
        "command": export_command(place[0].directory, place[1]),
        "promised": _chosen(result) is not None and result.calibrated is not None and result.calibrated.chosen.found,
        "thresholds": points.curve.thresholds.tolist(),
        "cost": points.curve.cost.tolist(),
        "right": points.right.tolist(),
        "interval": [share_interval(accuracy, len(outputs)) for accuracy in points.curve.accuracy],
        "exits": points.exits.tolist(),
        "confusion": points.confusion,
        "start": points.start,
        "milliseconds": [stage.milliseconds for stage in stages] if timed else None,
        "backbone_milliseconds": backbone_milliseconds(stages) if timed else None,
        "gallery": [
            {
                "label": int(labels[row]),
                "answers": answers[row].tolist(),
                "passes": points.passes[row].tolist(),
            }
            for row in rows
        ],
    }


def _stage_rows(result: Result) -> list[dict[str, Any]]:
    """The stages with what answering at their ends costs, as shares of the backbone without exits."""
    times = list(accumulate(stage.milliseconds or 0.0 for stage in result.stages))
    whole = backbone_milliseconds(result.stages) or 1.0
    return [
        {**asdict(stage), "cost": cost, "time": time / whole}
        for stage, cost, time in zip(result.stages, result.outputs.costs, times, strict=True)
    ]


def _class_names(runs: Sequence[Run], classes: int) -> list[str]:
    """As the data set names them; else their numbers."""
    named = next((run.classes for run in runs if run.classes is not None and len(run.classes) == classes), None)
    return [str(number) for number in range(classes)] if named is None else list(named)
