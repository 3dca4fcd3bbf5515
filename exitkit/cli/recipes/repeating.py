"""A recipe carried out, once or with several seeds: a run of each, those that are there already left as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from exitkit.cli.machine import computing_with, threads_for
from exitkit.cli.options import check_unused
from exitkit.cli.recipes.recipe import Recipe, described, output_within
from exitkit.cli.recipes.training import prepared, train_recipe
from exitkit.cli.starting import INTERRUPTED, data_example, say_if_random, say_what_is_lost
from exitkit.common.allocator import keep_memory
from exitkit.common.files import replacing
from exitkit.common.schema import read_json
from exitkit.evaluation import Runs
from exitkit.report import read_repeated, seed_folder
from exitkit.training.checkpoint import NAME

_RECIPE = "recipe.json"
"""What a finished run came from; written when everything else of it is."""


def carry_out(recipe: Recipe, out: Path, threads: int | None, say: Callable[[Any], None], top: int = 1) -> None:
    """Train as a recipe says, and write what comes of it to ``out``; the same call goes on where one was stopped.

    ``top``: above 1, accuracy among so many likeliest classes stands beside.

    Raises:
        ExitkitError: values that do not fit the model or the data, a folder that cannot be written to, or that holds a run
            which is finished.
    """
    kept = output_within(out, recipe.trainer)
    if not (kept / NAME).exists() or recipe.trainer.get("resume") == "never":
        check_unused(out)
    (out / _RECIPE).unlink(missing_ok=True)
    backbone, split = prepared(recipe)
    say_what_is_lost(split)
    say_if_random(recipe.model, recipe.weights)
    example = data_example(backbone, split.loaders(1, None, 0)[1], recipe.pairs)
    keep_memory()
    with computing_with(threads_for(backbone, example, threads, say)), _saying_what_is_kept(kept):
        train_recipe(recipe, backbone, split, example, out, say, top)


@contextmanager
def _saying_what_is_kept(folder: Path) -> Iterator[None]:
    """Of a run that Ctrl-C or SIGTERM ends."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if (folder / NAME).exists():
            typer.echo(
                f"stopped; kept in {folder / NAME}. The same command goes on from there; with --set trainer.resume=never it "
                "starts again",
                err=True,
            )
        else:
            typer.echo(
                "stopped before the first checkpoint, so nothing is kept; the same command starts again", err=True
            )
        raise typer.Exit(INTERRUPTED if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)) from None


def repeat(
    recipes: Sequence[Recipe],
    out: Path,
    carry_out: Callable[[Recipe, Path], None],
    say: Callable[[Any], None],
    top: int = 1,
) -> None:
    """Carry out one recipe of each seed, in ``out/seed-N``, and say what they give together; ``top`` as for it."""
    for recipe in recipes:
        finish(recipe, seed_folder(out, recipe.trainer["seed"]), carry_out, say)
    if len(recipes) > 1:
        say(table_of(read_repeated(out), f"over {len(recipes)} seeds", top))
    say(f"Written to {out}/. To go on: exitkit report {out}, or exitkit compare {out} OTHER")


def finish(
    recipe: Recipe, folder: Path, carry_out: Callable[[Recipe, Path], None], say: Callable[[Any], None]
) -> None:
    """Carry out a recipe in its folder, unless that holds the finished run of the same recipe."""
    if finished(recipe, folder):
        say(f"{folder} is finished already")
        return
    carry_out(recipe, folder)
    with replacing(folder / _RECIPE) as temporary:
        temporary.write_text(json.dumps(described(recipe), indent=1), encoding="utf-8")


def finished(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder holds the finished run of a recipe."""
    kept = folder / _RECIPE
    written = json.loads(json.dumps(described(recipe)))
    return kept.exists() and bool(read_json(kept, "delete it, to train again") == written)


def table_of(found: dict[str, Runs], title: str, top: int = 1) -> Table:
    """Each method at the papers' budgets: mean ± standard deviation of the accuracy, or of a regression's squared error.

    ``top``: above 1, accuracy among so many likeliest classes stands below.
    """
    rows = {
        name if k == 1 else f"{name}, top {k}": runs.budget_table(top=k)
        for name, runs in found.items()
        for k in sorted({1, top})
    }
    errors = any(runs.measure == "mse" for runs in found.values())
    caption = "mean squared error (less is better): " if errors else ""
    table = Table(title=title, caption=f"{caption}mean ± standard deviation", caption_justify="left")
    for heading in ("method", *next(iter(rows.values()))):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in rows.items():
        table.add_row(name, *("-" if spread is None else str(spread) for spread in row.values()))
    return table
