"""``exitkit report``, ``calibrate`` and ``compare``: what is done with a run once it is there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitkit.cli.options import AsJson, RunDirectory, Top, check_least
from exitkit.common.console import make_console
from exitkit.common.errors import ArgumentError
from exitkit.common.intervals import with_interval

if TYPE_CHECKING:
    from exitkit.evaluation import ExitOutputs, PairedErrors, PairedTests, Runs, RunsCompared

_SHARES = ("accuracy_drop", "disagreement")
"""Risks that are shares of the samples."""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="What exitkit bench, train or demo wrote")],
    out: Annotated[
        Path | None, typer.Option(help="The .html file; by default report.html in the first RUN_DIR")
    ] = None,
    top: Top = 1,
) -> None:
    """Write a page to look at, of one or several runs.

    Curves with a slider for τ, samples, calibration, stages; PNG and CSV beside it.
    """
    check_least(top=top)
    from exitkit.report import write_report

    path = write_report(runs, out, top)
    make_console().print(
        f"Written to {path} ({path.stat().st_size / 2**20:.1f} MiB), figures beside it as PNG and CSV"
    )


def calibrate(
    run: RunDirectory,
    max_drop: Annotated[float, typer.Option(help="The bound on the risk, between 0 and 1")] = 0.01,
    confidence: Annotated[float, typer.Option(help="How often the promise is to hold")] = 0.95,
    risk: Annotated[
        str, typer.Option(help="accuracy_drop, net_accuracy_drop, disagreement or brier")
    ] = "accuracy_drop",
    method: Annotated[str, typer.Option(help="ltt, ucb, or crc (in expectation only)")] = "ltt",
    outputs: Annotated[str | None, typer.Option(help="Comma-separated methods of the run; by default all")] = None,
    share: Annotated[float, typer.Option(help="What part of the samples chooses; the others check the choice")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of that split")] = 0,
    json: AsJson = False,
) -> None:
    """Choose τ with a guarantee for each method of a run.

    Written to its thresholds.json, from where report and export take it.

    Where the run has calibration-METHOD.safetensors, these samples choose and all others check.
    """
    from dataclasses import asdict

    from exitkit.common.schema import to_json
    from exitkit.report import calibrated, read_run, write_thresholds
    from exitkit.report.run import calibration_outputs, named

    say = make_console().print
    chosen = {}
    for name, result in named(read_run(run).results, outputs).items():
        chosen[name] = calibrated(
            result.outputs,
            calibration_outputs(run, name),
            share,
            seed,
            max_drop=max_drop,
            confidence=confidence,
            risk=risk,
            method=method,
        )
    written = write_thresholds(run, chosen)
    if json:
        typer.echo(to_json({name: asdict(one) for name, one in chosen.items()}))
        return
    for name, one in chosen.items():
        say(f"{name}: τ = {one.chosen.shown()}, cost {one.chosen.cost:.1%} of the backbone's MACs")
        say(f"  {one.chosen.guarantee}")
        if one.check is not None:
            measured = f"{one.check.risk:.2%}"
            if risk in _SHARES:
                measured = with_interval(one.check.risk, one.check.samples)
            say(f"  On {one.check.samples} other samples: {risk} {measured}, cost {one.check.cost:.1%}.")
    if len(chosen) > 1 and method != "crc":
        doubt = 1 - confidence
        say(
            f"Each promise is that of one method. The cheapest of {len(chosen)} keeps its own with a confidence of at least "
            f"{max(0.0, 1 - doubt * len(chosen)):.6g}; --confidence {1 - doubt / len(chosen):.6g} makes it {confidence:.10g}."
        )
    say(f"Written to {written}")
    say(f"To make a file of it that runs anywhere: exitkit export {shlex.quote(str(run))}", soft_wrap=True)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="A B...", help="Run directories, or files of outputs in them")],
    budget: Annotated[float, typer.Option(help="Share of the backbone's MACs at which they are compared")] = 0.5,
    top: Top = 1,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap")] = 0,
    json: AsJson = False,
) -> None:
    """Test whether methods or runs differ.

    On the same samples: McNemar at a budget, and the area under the curves; of regressions the squared errors at the budget.
    Of repeated runs (exitkit train --seeds): means over their seeds, and differences seed by seed.
    """
    check_least(top=top)
    from dataclasses import asdict

    from exitkit.common.schema import to_json
    from exitkit.evaluation import compare_runs
    from exitkit.report import read_comparison, seeds_in

    repeated = [run for run in runs if seeds_in(run)]
    if repeated:
        if alone := [str(run) for run in runs if run not in repeated]:
            raise ArgumentError(
                f"{alone[0]!r} is a single run and {str(repeated[0])!r} has seeds; compare folders of the same seeds, or "
                "single runs, such as one of those below it"
            )
        named = _named_runs(runs)
        compared = [compare_runs(named, budget, top=k) for k in sorted({1, top})]
        typer.echo(to_json(_plain(compared)) if json else "\n".join(map(str, compared)))
        return
    found = read_comparison(runs)
    if len(found) < 2:
        raise ArgumentError(
            f"{str(runs[0])!r} holds one set of outputs, {next(iter(found))!r}, and a comparison needs at least two; name "
            "another run, or a file of outputs, beside it"
        )
    tests = _tests(found, budget, top, resamples, seed)
    typer.echo(to_json([asdict(pair) for one in tests for pair in one.pairs]) if json else "\n".join(map(str, tests)))


def _tests(
    found: dict[str, ExitOutputs], budget: float, top: int, resamples: int, seed: int
) -> list[PairedTests] | list[PairedErrors]:
    """Of classifiers by accuracy, and by top-k accuracy where it is asked for; of regressions by squared errors."""
    from exitkit.evaluation import RegressionOutputs, paired_errors, paired_tests

    regressions = {name: one for name, one in found.items() if isinstance(one, RegressionOutputs)}
    if not regressions:
        return [paired_tests(found, budget, top=k, resamples=resamples, seed=seed) for k in sorted({1, top})]
    if top > 1:
        raise ArgumentError(f"--top {top} counts classes, and a regression has none; leave it out")
    return [paired_errors(regressions, budget, resamples=resamples, seed=seed)]


def _named_runs(places: Sequence[Path]) -> dict[str, Runs]:
    """Methods over their seeds, with the folder's name before the method's where there are several folders."""
    from exitkit.report import read_repeated

    return {
        method if len(places) == 1 else f"{place.resolve().name}/{method}": runs
        for place in places
        for method, runs in read_repeated(place).items()
    }


def _plain(compared: Sequence[RunsCompared]) -> dict[str, Any]:
    """As JSON holds it: by accuracy, and below a key of its own by top-k accuracy."""
    first, *others = compared
    return {"budget": first.budget, **_numbers(first), **{f"top_{one.top}": _numbers(one) for one in others}}


def _numbers(compared: RunsCompared) -> dict[str, Any]:
    accuracies = {name: spread.values for name, spread in compared.accuracies.items()}
    differences = [
        {"first": one, "second": two, "mean": spread.mean, "half_width": spread.half_width}
        for (one, two), spread in compared.differences.items()
    ]
    measure = next(iter(compared.accuracies.values())).measure
    return {"mse" if measure == "mse" else "accuracies": accuracies, "differences": differences}
