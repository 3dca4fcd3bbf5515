"""``exitkit analyse``: measurements of runs, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitkit.cli.options import check_folder, check_least
from exitkit.common.console import make_console, printable
from exitkit.common.errors import ArgumentError, unknown_name

if TYPE_CHECKING:
    from exitkit.analysis.measurement import Measurement
    from exitkit.multi_exit.model import MultiExitModel
    from exitkit.report.run import Run
    from exitkit.training import Loss

WHAT = "dominance,rank,information,connectivity,landscape"
BATCH = 64


def analyse(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="What exitkit bench or train wrote")],
    what: Annotated[
        str, typer.Option(help="Comma-separated; connectivity is from the first run to each other")
    ] = WHAT,
    out: Annotated[Path | None, typer.Option(help="Folder; by default analysis in the first RUN_DIR")] = None,
    data: Annotated[str | None, typer.Option(help="Training samples; by default those of the first run")] = None,
    method: Annotated[str | None, typer.Option(help="Of runs with several")] = None,
    samples: Annotated[int, typer.Option(help="How many are measured on")] = 2000,
    points: Annotated[int, typer.Option(help="Of each axis of the landscape")] = 21,
    seed: Annotated[int, typer.Option(help="Of noise, directions and orders")] = 0,
    trust: Annotated[bool, typer.Option("--trust", help="Call the function that a run names as its model")] = False,
) -> None:
    """Measure what training did to the models of one or several runs, such as of several regimes.

    Writes pictures and tables, which exitkit report shows too. On the training samples as they are, without augmentation.
    """
    kinds = [name.strip() for name in what.split(",")]
    for name in kinds:
        if name not in WHAT.split(","):
            raise unknown_name("--what", name, WHAT.split(","))
    check_least(samples=samples, points=points)
    folder = runs[0] / "analysis" if out is None else out
    check_folder(folder)
    say = make_console().print
    if "connectivity" in kinds and len(runs) < 2:
        if kinds == ["connectivity"]:
            raise ArgumentError("--what connectivity needs two runs; name another RUN_DIR")
        kinds.remove("connectivity")
        say("connectivity is left out: it is between two runs; name another RUN_DIR\n")
    from exitkit.analysis.overview import Overview
    from exitkit.report.run import read_run

    read = {_name(run, runs): read_run(run, regression=True) for run in runs}
    models = {name: _model(run, method, trust) for name, run in read.items()}
    losses = {name: _loss(run) for name, run in read.items()}
    loader = _samples(next(iter(read.values())), next(iter(models.values())), data, samples)
    rows: dict[str, dict[str, Measurement]] = {}
    refused: dict[str, ArgumentError] = {}
    try:
        for kind in kinds:
            try:
                rows[kind] = measured(kind, models, losses, loader, samples, points, seed, say)
            except ArgumentError as error:
                refused[kind] = error
    finally:  # also what was measured before an interruption
        if rows:
            Overview({kind: row for kind, row in rows.items() if row}).write(folder)
            shown = f" To look at them: exitkit report {runs[0]}" if out is None else ""  # the page shows a run's own
            say(f"Written to {folder}/: PNG, CSV and arrays.{shown}")
    if refused:
        reasons = "; ".join(f"{kind}: {error}" for kind, error in refused.items())
        raise ArgumentError(f"{len(refused)} of {len(kinds)} measurements were refused: {reasons}")


def measured(
    kind: str,
    models: dict[str, MultiExitModel],
    losses: dict[str, Loss],
    loader: Iterable[Any],
    samples: int,
    points: int,
    seed: int,
    say: Callable[[Any], None],
) -> dict[str, Measurement]:
    """One measurement of every model by name; of connectivity, of every model but the first."""
    from exitkit import analysis

    first, *others = models.items()
    batches = max(1, samples // BATCH)
    if kind == "connectivity":
        pairs = {f"{first[0]} to {name}": (first[1], model) for name, model in others}
        calls: dict[str, Callable[[], Measurement]] = {
            name: lambda a=a, b=b: analysis.connectivity(a, b, loader, samples=samples, seed=seed)  # type: ignore[misc]
            for name, (a, b) in pairs.items()
        }
    else:
        how: dict[str, Callable[[MultiExitModel, Loss], Measurement]] = {
            "dominance": lambda ee, loss: analysis.gradient_dominance(
                ee, loader, batches=batches, loss=loss, as_if_unfrozen=True, seed=seed
            ),
            "rank": lambda ee, _: analysis.numerical_rank(ee, loader, samples=samples, seed=seed),
            "information": lambda ee, _: analysis.mutual_information(ee, loader, samples=samples, seed=seed),
            "landscape": lambda ee, _: analysis.landscape(ee, loader, samples=samples, points=points, seed=seed),
        }
        calls = {name: lambda name=name: how[kind](models[name], losses[name]) for name in models}  # type: ignore[misc]
    made = {}
    for name, call in calls.items():
        made[name] = call()
        say(f"{name}: {made[name].table()}\n")
    return made


def _name(run: Path, runs: list[Path]) -> str:
    """What a run is called: its folder."""
    names = [printable(one.resolve().name) for one in runs]
    if len(set(names)) < len(names):
        raise ArgumentError(f"RUN_DIR: {names} holds a name twice; give each run once, under a name of its own")
    return printable(run.resolve().name)


def _model(run: Run, method: str | None, trust: bool) -> MultiExitModel:
    from exitkit.cli.exporting import find_source, flags_over
    from exitkit.cli.sources import load_model
    from exitkit.multi_exit.model import MultiExitModel

    if method is None and len(run.results) > 1 and not any(one.calibrated for one in run.results.values()):
        raise ArgumentError(
            f"RUN_DIR {str(run.directory)!r} has the methods {', '.join(run.results)}; choose one by --method"
        )
    source = flags_over(find_source(str(run.directory), method), None, None, None, None, None, trust)
    backbone = load_model(str(source.model), source.weights, source.num_classes).eval()
    return MultiExitModel.from_pretrained(backbone, source.exits)


def _loss(run: Run) -> Loss:
    """What the exits of a run minimised: its recipe's, of which a run of ``exitkit bench`` has none."""
    from exitkit.cli.recipes.recipe import Recipe

    given = run.about.get("loss")
    return Recipe(model="", data="", loss=given if isinstance(given, dict) else {}).make_loss()


def _samples(run: Run, model: MultiExitModel, data: str | None, samples: int) -> Iterable[Any]:
    """Batches of training samples, the same for every model and measurement."""
    from exitkit.cli.data.loading import load_data

    about = run.about
    chosen = about.get("data") if data is None else data
    if not isinstance(chosen, str):
        raise ArgumentError(f"RUN_DIR {str(run.directory)!r} does not say what data it was trained on; give --data")
    name, test, length = str(about.get("model")), about.get("test"), about.get("max_length")
    try:
        split = load_data(
            chosen,
            model.backbone,
            test if isinstance(test, str) and data is None else None,
            name.removeprefix("hf:") if name.startswith("hf:") else None,
            numbers=model.regression,
            pairs=about.get("pairs") is True,
            max_length=length if isinstance(length, int) else None,
        )
    except ArgumentError as error:
        if data is not None:
            raise
        raise ArgumentError(
            f"RUN_DIR {str(run.directory)!r} was trained on {chosen!r}, which cannot be read again; "
            f"give its samples by --data ({error})"
        ) from error
    return split.loaders(BATCH, samples, 0)[0]
