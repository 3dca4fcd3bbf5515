"""The page of regressions: squared errors under budgets and of every exit, over the seeds where runs were repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exitkit.common.console import printable
from exitkit.common.errors import ArgumentError
from exitkit.evaluation import RegressionOutputs, Runs
from exitkit.evaluation.paired import check_comparable
from exitkit.report.figures import draw_errors
from exitkit.report.repeated import read_repeated, seeds_in
from exitkit.report.run import read_run


def regressions_in(places: Sequence[str | Path]) -> dict[str, Runs]:
    """Each method's outputs, a single run being one of one seed, by the names that they have in the page.

    Raises:
        ExitkitError: nothing there, a damaged file, a name twice, classifiers among them, or runs on other samples.
    """
    found: dict[str, Runs] = {}
    for place in places:
        for method, runs in _runs_in(place).items():
            name = method if len(places) == 1 else f"{printable(Path(place).resolve().name)}/{method}"
            if name in found:
                raise ArgumentError(f"RUN_DIR: {name!r} comes twice; give each run once, under a name of its own")
            found[name] = runs
    check_comparable({name: runs.outputs[0] for name, runs in found.items()})
    return found


def errors_shown(found: Mapping[str, Runs], path: Path, top: int = 1) -> dict[str, Any]:
    """What the page ``regression.html`` shows; the figure's PNG and CSV go beside ``path``.

    Args:
        found: what :func:`regressions_in` read.
        path: of the page.
        top: 1; a regression has no classes.
    """
    first = {name: runs.outputs[0] for name, runs in found.items()}
    curves = {name: one.curve(measure="mse") for name, one in first.items() if isinstance(one, RegressionOutputs)}
    return {
        "samples": len(next(iter(first.values()))),
        "curve": draw_errors(curves, path, "curve"),
        "budgets": [(name, len(runs.seeds), runs.budget_table(top=top)) for name, runs in found.items()],
        "exits": [
            (name, list(zip(runs.outputs[0].costs.tolist(), runs.mse(), runs.accuracy(), strict=True)))
            for name, runs in found.items()
        ],
    }


def _runs_in(place: str | Path) -> dict[str, Runs]:
    if seeds_in(place):
        return read_repeated(place)
    return {name: Runs((result.outputs,)) for name, result in read_run(place, regression=True).results.items()}
