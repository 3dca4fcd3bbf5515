"""``exitkit reproduce``: a table of a paper, every row run and printed beside the published numbers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitkit.cli.options import Device, Threads, check_folder, check_least
from exitkit.cli.serving import RayAddress, cluster_of
from exitkit.common.console import make_console
from exitkit.common.errors import ArgumentError, ExitkitError, unknown_name

if TYPE_CHECKING:
    from exitkit.cli.recipes.recipe import Recipe
    from exitkit.reproduction import Outcome, Setting, Table

_PRINTED = 60
"""Characters of a reason why a row did not run."""


def reproduce(
    paper: Annotated[str | None, typer.Argument(help="zero-time-waste, distillation or training-regimes")] = None,
    table: Annotated[
        str | None, typer.Argument(help="Its number, such as 1 or C.1; without, the paper's are listed")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="smoke: tiny made-up data; cpu: a stated reduction; full: the paper's")
    ] = "smoke",
    seeds: Annotated[
        int | None, typer.Option(help="Runs of every row; by default one for smoke, 3 for cpu, the paper's for full")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the data sets and weights that the rows name")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder for the runs and the tables")] = Path("runs/reproduce"),
    rows: Annotated[str | None, typer.Option(help="Only rows in whose name these words stand")] = None,
    device: Device = None,
    threads: Threads = None,
    ray: RayAddress = None,
) -> None:
    """Run a table of a paper, and print it beside the published numbers.

    Every run stays in --out, and is used again by each table that has it; the same command goes on where it was stopped.
    Without a table, what there is and what it needs is listed. With --ray runs go side by side, each on --threads CPUs (one by
    default) and a GPU where there are some; all machines need this folder, the data and exitkit under the same paths.
    """
    from exitkit.reproduction import SCALES, find_table, papers, settings_of

    if paper is None or table is None:
        if paper is not None and paper not in papers():
            raise unknown_name("PAPER", paper, papers())
        make_console().print(_listing(paper))
        return
    check_least(seeds=seeds)
    if scale not in SCALES:
        raise unknown_name("--scale", scale, SCALES)
    chosen = find_table(paper, table)
    chosen = replace(chosen, top=chosen.cpu_top) if scale == "cpu" else chosen
    check_folder(out)
    settings = settings_of(chosen, scale, data, out / "made-up")
    settings = settings if rows is None else _with_words(settings, rows)
    if all(one.missing for one in settings):
        raise ArgumentError(
            f"{settings[0].missing[0]!r} is not there\nThis table needs: {chosen.needs}; --data says where"
        )
    from exitkit.cli.bench import machine

    say = make_console().print
    count = seeds or {"smoke": 1, "cpu": 3, "full": chosen.seeds}[scale]
    outcomes = []
    with _carrying_out(settings, out, count, ray, threads, device, say) as carried_out:
        for number, setting in enumerate(settings, 1):
            say(f"{number} of {len(settings)}: {setting.row.name}")
            outcomes.append(_run(chosen, setting, out, count, carried_out, say))
    _tell(chosen, outcomes, scale, out, machine() if ray is None else {"ray": ray})


@contextmanager
def _carrying_out(
    settings: Sequence[Setting],
    out: Path,
    seeds: int,
    ray: str | None,
    threads: int | None,
    device: str | None,
    say: Callable[[Any], None],
) -> Iterator[Callable[[Recipe, Path], None]]:
    """What carries out a recipe in its folder: here, or on a Ray cluster that all have been given to."""
    if ray is not None:
        from exitkit.cli.recipes.on_ray import carried_out_on_ray

        check_least(threads=threads)
        chains = [_recipes(one, out, seed) for one in settings if not one.missing for seed in range(seeds)]
        with carried_out_on_ray(chains, cluster_of(ray), threads or 1, device) as carried_out:
            yield carried_out
        return
    from exitkit.cli.machine import train_on
    from exitkit.cli.recipes.repeating import carry_out

    train_on(device)
    yield lambda recipe, folder: carry_out(
        recipe, folder, threads, lambda told: say(told) if isinstance(told, str) else None
    )


def _run(
    table: Table,
    setting: Setting,
    out: Path,
    seeds: int,
    carry_out: Callable[[Recipe, Path], None],
    say: Callable[[Any], None],
) -> Outcome:
    """Train a row with every seed, or take what is there; what stands in its way is its outcome."""
    from exitkit.reproduction import Outcome
    from exitkit.reproduction.results import over_seeds

    if setting.missing:
        return Outcome(setting.row, reason=f"no {setting.missing[0]}")
    try:
        each = [_numbers(table, setting, out, seed, carry_out, say) for seed in range(seeds)]
    except ExitkitError as error:
        say(f"  {error}")
        return Outcome(setting.row, reason=f"failed: {error}"[:_PRINTED], failed=True)
    return Outcome(setting.row, over_seeds(each), str(out / "runs" / setting.key))


def _numbers(
    table: Table,
    setting: Setting,
    out: Path,
    seed: int,
    carry_out: Callable[[Recipe, Path], None],
    say: Callable[[Any], None],
) -> list[float | None]:
    """A row's numbers of one seed."""
    from exitkit.cli.recipes.repeating import finish
    from exitkit.evaluation import ExitOutputs
    from exitkit.report import read_run
    from exitkit.report.run import validation_file
    from exitkit.reproduction.measures import numbers_of

    recipes = _recipes(setting, out, seed)
    for recipe, folder in recipes:
        finish(recipe, folder, carry_out, say)
    recipe, own = recipes[-1]
    method = recipe.make_method().name
    measure = setting.row.measure or table.measure
    result = read_run(own, regression=True).results[method]
    outputs = result.outputs
    if measure == "mse":
        return numbers_of(measure, table.columns, outputs)
    if setting.row.criterion is not None:
        outputs = replace(outputs, criterion=setting.row.criterion)
    seen = validation_file(own, method)
    validation = ExitOutputs.load(seen) if seen.exists() else None
    return numbers_of(
        measure,
        table.columns,
        outputs,
        top=table.top,
        validation=validation,
        stages=result.stages,
    )


def _recipes(setting: Setting, out: Path, seed: int) -> list[tuple[Recipe, Path]]:
    """What a row trains with a seed, in their folders: the backbone that it begins from, where it has one, and its exits."""
    from exitkit.cli.recipes.recipe import Recipe
    from exitkit.report import seed_folder
    from exitkit.report.run import BACKBONE
    from exitkit.reproduction.tables import merged

    of_seed = {"trainer": {"seed": seed}}
    values = merged([setting.recipe, of_seed])
    before = []
    if setting.backbone is not None:
        folder = seed_folder(out / "runs" / str(setting.backbone_key), seed)
        before = [(Recipe(**merged([setting.backbone, of_seed])), folder)]
        values["weights"] = str(folder / BACKBONE)
    return [*before, (Recipe(**values), seed_folder(out / "runs" / setting.key, seed))]


def _tell(table: Table, outcomes: list[Outcome], scale: str, out: Path, machine: dict[str, str]) -> None:
    """Print the table, write it as Markdown and as JSON, and end with an error where a row failed."""
    from exitkit.common.files import replacing
    from exitkit.common.schema import to_json
    from exitkit.reproduction import markdown, record, shown

    say = make_console().print
    say(shown(table, outcomes, scale))
    name = f"{table.paper}-{table.name}-{scale}"
    document = to_json(record(table, outcomes, scale) | {"machine": machine}, indent=1)
    for suffix, text in ((".md", markdown(table, outcomes, scale)), (".json", document)):
        with replacing(out / f"{name}{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    say(f"Written to {out / name}.md and .json")
    if ran := next((one.folder for one in outcomes if one.folder is not None), None):
        say(f"A row to look at: exitkit report {shlex.quote(ran)}")
    if failed := [one.row.name for one in outcomes if one.failed]:
        raise ArgumentError(f"{len(failed)} of {len(outcomes)} rows failed: {', '.join(failed)[:300]}")


def _with_words(settings: list[Setting], words: str) -> list[Setting]:
    """The rows in whose name words stand, one after another and whole: "Joint" in "Joint Inc.", and not in "Disjoint".

    Raises:
        ArgumentError: they stand in none.
    """
    pattern = re.compile(rf"(?<!\w){re.escape(words.strip())}(?!\w)", re.IGNORECASE)
    found = [one for one in settings if words.strip() and pattern.search(one.row.name)]
    if not found:
        names = [one.row.name for one in settings]
        raise unknown_name(
            "--rows", words, names, "Give whole words of a name; at other scales there may be more rows."
        )
    return found


def _listing(paper: str | None) -> Any:
    """Every table, and what it needs at full scale."""
    from rich.table import Table as Grid

    from exitkit.reproduction import papers

    grid = Grid(
        title="exitkit reproduce PAPER TABLE",
        caption="cpu: the rows that the reduction for a CPU has. GPU hours: at full scale with all seeds, estimated.",
        caption_justify="left",
    )
    for heading in ("paper", "table", "of", "rows", "cpu", "seeds", "GPU hours", "needs at full scale"):
        grid.add_column(heading, justify="right" if heading in ("rows", "cpu", "seeds", "GPU hours") else "left")
    for name, one in papers().items():
        for table in one.tables.values() if paper in (None, name) else ():
            reduced = "-" if table.cpu is None else str(len(table.cpu_rows or table.rows))
            count, hours = str(len(table.rows)), f"{table.gpu_hours:,.0f}"
            grid.add_row(name, table.name, table.title, count, reduced, str(table.seeds), hours, table.needs)
    return grid
