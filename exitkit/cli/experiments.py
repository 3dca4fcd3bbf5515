"""``exitkit bench`` and ``exitkit train``: what trains exits."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitkit.cli.options import (
    EXITS,
    TRAINING,
    Budgets,
    Cache,
    Data,
    DataClasses,
    Device,
    MaxLength,
    Model,
    Threads,
    Top,
    Weights,
    check_folder,
    check_least,
    check_unused,
    shares_of,
)
from exitkit.cli.starting import INTERRUPTED, data_example, say_if_random, say_what_is_lost
from exitkit.common.console import make_console, printable
from exitkit.common.errors import ArgumentError, ExitkitError

if TYPE_CHECKING:
    from exitkit.cli.bench import Trained

_METHODS = "sdn, pbee, ztw, gpf, branchynet"


def bench(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the exits, results.json, curve.png and the outputs")],
    test: Annotated[str | None, typer.Option(help="Test samples; by default a fifth of --data is held out")] = None,
    methods: Annotated[str, typer.Option(help=f"Comma-separated: {_METHODS}", rich_help_panel=EXITS)] = "sdn,pbee,ztw",
    weights: Weights = None,
    num_classes: DataClasses = None,
    max_length: MaxLength = None,
    every: Annotated[
        int | None, typer.Option(help="An exit after every n-th block; by default three exits", rich_help_panel=EXITS)
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Exits after these: names or numbers of exitkit inspect, as 0,3", rich_help_panel=EXITS),
    ] = None,
    at_cost: Annotated[
        str | None,
        typer.Option(help="Exits nearest to these shares of the MACs, in %, as 15,45,75", rich_help_panel=EXITS),
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            help="auto, 1L, 2L-WIDTH, conv, separable, strided, msdnet, tail, branch-BLOCKS, or MODULE:FUNCTION",
            rich_help_panel=EXITS,
        ),
    ] = "auto",
    epochs: Annotated[int, typer.Option(help="Passes over the training samples", rich_help_panel=TRAINING)] = 15,
    budgets: Budgets = "25,50,75,100",
    top: Top = 1,
    lr: Annotated[float, typer.Option(help="Adam's learning rate", rich_help_panel=TRAINING)] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Training batch size", rich_help_panel=TRAINING)] = 64,
    limit: Annotated[
        int | None, typer.Option(help="Use at most so many training samples", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and subset", rich_help_panel=TRAINING)] = 0,
    cache: Cache = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Train exits by several methods on a frozen backbone.

    Accuracy against compute is printed and written, with the exits, so that calibrate, report and export go on from there.
    """
    check_least(batch_size=batch_size, limit=limit, max_length=max_length, top=top)
    if seed < 0:
        raise ArgumentError(f"--seed {seed} must be at least 0")
    shares = shares_of(budgets)
    cost_shares = None if at_cost is None else shares_of(at_cost, "--at-cost")
    check_folder(out)
    check_unused(out)
    from exitkit.cli.bench import compare
    from exitkit.cli.data.loading import load_data
    from exitkit.cli.machine import computing_with, threads_for, train_on
    from exitkit.cli.sources import load_pretrained
    from exitkit.common.allocator import keep_memory
    from exitkit.methods.presets import as_method

    train_on(device)
    say = make_console().print
    import_heads(head, "command", trust=True)  # typed here
    chosen = [as_method(name.strip()) for name in methods.split(",")]
    backbone, built_with = load_pretrained(model, weights, num_classes)
    say_if_random(model, weights)
    tokenizer = model.removeprefix("hf:") if model.startswith("hf:") else None
    split = load_data(data, backbone, test, tokenizer, max_length=max_length)
    say_what_is_lost(split)
    train_loader, test_loader = split.loaders(batch_size, limit, seed)
    example = data_example(backbone, train_loader)
    about = {
        "model": model,
        "weights": weights,
        "num_classes": built_with,
        "max_length": max_length,
        "data": data,
        "test": test,
        "epochs": epochs,
        "every": every,
        "at": at,
        "at_cost": at_cost,
    }
    keep_memory()
    with computing_with(threads_for(backbone, example, threads, say)):
        compared = compare(
            backbone,
            chosen,
            train_loader,
            test_loader,
            placement={
                "every": every,
                "at": None if at is None else _places(at),
                "at_cost": cost_shares,
                "head": head,
                "num_classes": num_classes,
            },
            training={"epochs": epochs, "lr": lr, "seed": seed, "cache": cache},
            example_inputs=example,
            report=say,
            classes=split.classes,
            top=top,
        )
        _keep(compared, out, about, split, f"{model} on {data}", shares, top)


def _places(at: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in map(str.strip, at.split(","))]


def _keep(
    compared: Any, out: Path, about: dict[str, Any], split: Any, title: str, budgets: Sequence[float], top: int
) -> None:
    """Write every method that was finished, also where an error or Ctrl-C ends the others."""
    from exitkit.cli.bench import comparison_table, over_budget
    from exitkit.cli.writing import next_steps, write_results, written

    say = make_console().print
    results: dict[str, Trained] = {}
    stopped: BaseException | None = None
    try:
        results.update(compared)
    except (KeyboardInterrupt, ExitkitError) as error:
        stopped = error
    if results:
        outputs = {name: one.outputs for name, one in results.items()}
        say(comparison_table(outputs, title, budgets, top))
        for line in over_budget(outputs, budgets):
            say(line)
        written(out, lambda folder: write_results(results, folder, about, split, top=top), unused=True)
        for line in next_steps(out):
            say(line, soft_wrap=True)
    if isinstance(stopped, KeyboardInterrupt):
        typer.echo(
            f"stopped; kept in {out}: {', '.join(results) or 'nothing, since no method was finished'}", err=True
        )
        raise typer.Exit(INTERRUPTED)
    if stopped is not None:
        raise stopped


def train(
    recipe: Annotated[Path, typer.Argument(help="A .toml file, such as those in benchmarks/recipes/")],
    out: Annotated[Path, typer.Option(help="Folder for the exits, results.json, curve.png and the outputs")],
    model: Annotated[str | None, typer.Option(help="Instead of the recipe's, as are all below")] = None,
    weights: Weights = None,
    data: Annotated[str | None, typer.Option(help="As for exitkit bench")] = None,
    test: Annotated[str | None, typer.Option(help="Test samples")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many training samples")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training samples")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation, order and subset")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Repeat with the seeds 0, 1, ..., so many, each in a folder of --out")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as trainer.lr=1e-4")] = None,
    top: Top = 1,
    trust: Annotated[
        bool, typer.Option("--trust", help="Call the functions that the recipe names as its model and head")
    ] = False,
    cache: Cache = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Train exits as a recipe says.

    All that it writes lies in --out, also a checkpoint after every epoch: the same command goes on from there after
    Ctrl-C, or when it was killed, and only writes the results where they could not be written.
    """
    check_least(seeds=seeds, top=top)
    if seed is not None and seeds is not None:
        raise ArgumentError(f"--seed {seed} and --seeds {seeds}: give the one seed, or how many")
    check_folder(out)
    from exitkit.cli.machine import train_on
    from exitkit.cli.recipes.recipe import parse_override, read_recipe
    from exitkit.cli.recipes.repeating import carry_out, repeat
    from exitkit.cli.writing import next_steps

    train_on(device)
    say = make_console().print
    flags = {"model": model, "weights": weights, "data": data, "test": test, "limit": limit}
    flags |= {"trainer.epochs": epochs, "trainer.seed": seed, "trainer.cache": cache or None}
    flags |= dict(map(parse_override, set_ or ()))
    overrides = {key: value for key, value in flags.items() if value is not None}
    chosen = read_recipe(recipe, overrides)
    if model is None and not trust:
        ask_for(chosen.model, "recipe")
    import_heads(chosen.exits.get("head", "auto"), "recipe", trust)
    if seeds is None:
        carry_out(chosen, out, threads, say, top)
        for line in next_steps(out):
            say(line, soft_wrap=True)
        return
    repeat(
        [read_recipe(recipe, overrides | {"trainer.seed": number}) for number in range(seeds)],
        out,
        lambda one, folder: carry_out(one, folder, threads, say, top),
        say,
        top,
    )


def init(
    recipe: Annotated[Path, typer.Argument(help="The .toml file to write")] = Path("recipe.toml"),
) -> None:
    """Write a recipe to start from, every key explained."""
    from exitkit.common.files import replacing

    if recipe.exists():
        raise ArgumentError(f"{str(recipe)!r} exists, and would be lost; name another file")
    with replacing(recipe) as temporary:
        temporary.write_bytes(files("exitkit.cli.recipes").joinpath("recipe.toml").read_bytes())
    say = make_console().print
    say(f"Written to {recipe}. Set model and data in it, then:")
    say(f"  exitkit train {shlex.quote(str(recipe))} --out runs/mine", soft_wrap=True)


def import_heads(head: str | Sequence[str], source: str, trust: bool) -> None:
    """Import the modules of heads that are functions, by ``module:function``, once a user lets them run."""
    from exitkit.cli.sources import import_from_here

    for name in [head] if isinstance(head, str) else head:
        module, colon, _ = str(name).partition(":")
        if colon:
            None if trust else ask_for(name, source, "head")
            import_from_here(module, f"head={name!r}")


def ask_for(model: str, source: str, part: str = "model") -> None:
    """A recipe or a run whose model or head is a function runs code of this machine: ask once, or be told by --trust."""
    from exitkit.cli.sources import is_code

    if not is_code(model):
        return
    question = f"The {source} imports and calls {printable(model)}. Run it?"
    if not sys.stdin.isatty() or not typer.confirm(question):
        raise ArgumentError(f"the {source}'s {part} is the function {printable(model)!r}; --trust lets it run")
