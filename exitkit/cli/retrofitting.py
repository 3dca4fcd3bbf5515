"""``exitkit retrofit``: from a pretrained model and data to exits with a guarantee, or an honest no."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitkit.cli.options import (
    PROMISE,
    SEARCH,
    TRAINING,
    Classes,
    Data,
    Device,
    Model,
    Threads,
    Weights,
    check_folder,
    check_least,
    check_unused,
)
from exitkit.cli.starting import INTERRUPTED, say_what_is_lost
from exitkit.common.console import make_console
from exitkit.common.errors import ArgumentError

if TYPE_CHECKING:
    from torch import nn


def retrofit(
    model: Model,
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Folder for the exits, the verdict, report.html and what is found on the way")
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Samples that nothing has seen; by default a fifth of --data is held out", rich_help_panel=PROMISE
        ),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="What may be lost against the model, between 0 and 1", rich_help_panel=PROMISE)
    ] = 0.01,
    confidence: Annotated[
        float, typer.Option(help="How often the promise is to hold", rich_help_panel=PROMISE)
    ] = 0.95,
    cost: Annotated[
        str, typer.Option(help="What is to be saved: macs, or time on this device", rich_help_panel=SEARCH)
    ] = "macs",
    batch_size: Annotated[
        int, typer.Option(help="How many samples are answered together in use", rich_help_panel=SEARCH)
    ] = 1,
    effort: Annotated[
        str, typer.Option(help="What the search may cost: quick, standard or thorough", rich_help_panel=SEARCH)
    ] = "standard",
    heads: Annotated[
        str | None, typer.Option(help="Comma-separated kinds, such as 2L-256,branch-2", rich_help_panel=SEARCH)
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Comma-separated boundaries, as exitkit inspect names them", rich_help_panel=SEARCH),
    ] = None,
    alternative: Annotated[
        list[str] | None,
        typer.Option(help="A smaller model to stand beside, as --model; MODEL=WEIGHTS with its weights"),
    ] = None,
    weights: Weights = None,
    num_classes: Classes = None,
    training_batch_size: Annotated[int, typer.Option(help="Training batch size", rich_help_panel=TRAINING)] = 64,
    limit: Annotated[
        int | None, typer.Option(help="Use at most so many training samples", rich_help_panel=TRAINING)
    ] = None,
    mixed_precision: Annotated[
        str, typer.Option(help="What exits learn in: no, fp16 or bf16", rich_help_panel=TRAINING)
    ] = "no",
    optimize: Annotated[bool, typer.Option(help="Compile engine and model to be timed, as they will be used")] = True,
    seed: Annotated[int, typer.Option(help="All random numbers follow from it", rich_help_panel=TRAINING)] = 0,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Find, train and guarantee the exits that save most, or say that none pays.

    The same command goes on where it was stopped or killed. Afterwards: exitkit export --model MODEL --exits OUT/exits.
    """
    check_least(batch_size=batch_size, training_batch_size=training_batch_size, limit=limit)
    check_folder(out)
    import exitkit
    from exitkit.retrofitting.result import RESULT

    check_unused(out, taken_up=RESULT)
    from exitkit.cli.data.loading import load_data
    from exitkit.cli.experiments import import_heads
    from exitkit.cli.machine import computing_with, threads_for, train_on
    from exitkit.cli.sources import load_model
    from exitkit.cli.writing import write_class_names, write_preparation, written
    from exitkit.common.batches import split_batch

    train_on(device)
    import_heads(_listed(heads) or [], "command", trust=True)  # typed here
    exitkit.keep_memory()
    say = make_console().print
    backbone = load_model(model, weights, num_classes)
    tokenizer = model.removeprefix("hf:") if model.startswith("hf:") else None
    split = load_data(data, backbone, calibration, tokenizer, option="--calibration")
    say_what_is_lost(split)
    train_loader, held_out = split.loaders(training_batch_size, limit, seed)
    example = split_batch(next(iter(held_out)))[0]
    _check_classes(backbone, example, split.classes, num_classes)
    given: Any = {"cost": cost, "effort": effort, "mixed_precision": mixed_precision}  # checked by retrofit
    with computing_with(threads_for(backbone, example, threads, say)), _stopped_by_hand():
        result = exitkit.retrofit(
            backbone,
            train_loader,
            held_out,
            max_drop=max_drop,
            confidence=confidence,
            batch_size=batch_size,
            heads=_listed(heads),
            boundaries=_listed(at),
            alternatives=_alternatives(alternative or [], num_classes),
            output_dir=out / "search",
            seed=seed,
            optimize=optimize,
            **given,
        )
    say(str(result))

    def write(folder: Path) -> None:
        result.save(folder)
        result.report(folder / "report.html")
        if result.model is not None:
            write_class_names(folder, split, result.model.num_classes)
            write_preparation(folder, split)

    written(out, write)
    say(f"Written to {out}/: retrofit.json, report.html{', exits' if result.model is not None else ''}")
    if result.verdict == "exits" and result.instead is None:
        say("To make a file of it that runs anywhere:")
        say(f"  {_export_command(model, weights, num_classes, out)}", soft_wrap=True)


def _export_command(model: str, weights: str | None, num_classes: int | None, out: Path) -> str:
    """What exports the exits in ``out``, as it is typed."""
    options = {
        "--model": model,
        "--weights": weights,
        "--num-classes": num_classes,
        "--exits": out / "exits",
        "--out": out / "model.pt2",
    }
    typed = [f"{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return " ".join(["exitkit export", *typed])


def _check_classes(backbone: nn.Module, example: Any, data: int | None, asked: int | None) -> None:
    """Refuse labels that mean something else to the model, unless its number of classes was given.

    Raises:
        ArgumentError: the numbers of classes differ.
    """
    import torch

    from exitkit.common.batches import move
    from exitkit.surgery.capturing import evaluation_mode, logits_of
    from exitkit.surgery.inputs import call_on

    try:
        with evaluation_mode(backbone), torch.inference_mode():
            own = logits_of(call_on(backbone, move(example, next(backbone.parameters()).device))).shape[-1]
    except Exception:  # whatever the user's forward raises: exitkit.retrofit says that the samples do not fit
        return
    if data in (None, own) or asked == own:
        return
    raise ArgumentError(
        f"the data have {data} classes, but the model tells {own} apart, and retrofit keeps its last layer\n"
        f"Train a model on these classes first; --num-classes {own} if the labels are the model's own"
    )


@contextmanager
def _stopped_by_hand() -> Iterator[None]:
    """Ctrl-C, of which the search has said what is kept, ends the command with its own status."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error


def _listed(given: str | None) -> list[str] | None:
    """What stands between commas, but for those in the parentheses of ``conv(stride=4, width=32)``."""
    return None if given is None else [part.strip() for part in re.split(r",(?![^(]*\))", given)]


def _alternatives(given: list[str], num_classes: int | None) -> dict[str, nn.Module]:
    """Models by the names that were given; ``MODEL=WEIGHTS`` with its weights."""
    from exitkit.cli.sources import load_model

    found = {}
    for text in given:
        name, _, weights = text.partition("=")
        if name in found:
            raise ArgumentError(f"--alternative {name!r} was given twice; give each once")
        found[name] = load_model(name, weights or None, num_classes)
    return found
