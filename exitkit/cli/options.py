"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from exitkit.common.errors import ArgumentError

EXITS, PROMISE, SEARCH, TRAINING, MACHINE = "Exits", "Promise", "Search", "Training", "Machine"
"""Sections of help that options stand in."""

_MODEL = "torchvision:NAME, timm:NAME, hf:NAME_OR_DIR or package.module:function"

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Model = Annotated[str, typer.Option(help=_MODEL)]
Data = Annotated[
    str,
    typer.Option(
        help="Image folder, .npz, .csv/.tsv of text and label, or torchvision data set, as ImageNet:split=val"
    ),
]
Package = Annotated[Path, typer.Argument(help="What exitkit export wrote: .pt2, .onnx, .onnx.zip or .pte")]
Trust = Annotated[bool, typer.Option("--trust", help="You trust the code in a .pt2; without, there is a warning")]
Weights = Annotated[
    str | None, typer.Option(help="State-dict file (.safetensors, .pth), 'pretrained', or torchvision's by name")
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; by default one for a backbone below 100 MMACs", rich_help_panel=MACHINE),
]
Classes = Annotated[int | None, typer.Option(help="Size of the model's classifier, where not its library's default")]
DataClasses = Annotated[
    int | None, typer.Option(help="Classes of the data; a last layer of other ones is replaced, and trained")
]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens after which a text is cut; by default as many as the model takes")
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache",
        help="Run the backbone once, and train on its features from a file; as augmented then",
        rich_help_panel=TRAINING,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one", rich_help_panel=MACHINE)
]
PackageDevice = Annotated[
    str | None, typer.Option(help="cpu or cuda; by default cpu, or what it was compiled for", rich_help_panel=MACHINE)
]
Tau = Annotated[float | None, typer.Option(help="Another τ than the package's")]
Budgets = Annotated[str, typer.Option(help="Comma-separated: the table's columns, in % of the backbone's MACs")]
Top = Annotated[
    int, typer.Option(help="Above 1: also how often the label is among so many likeliest classes (top-5 accuracy)")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs")]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="What exitkit bench, train or demo wrote")]


def check_folder(out: Path) -> None:
    """Refuse what cannot become a folder, before anything is trained for it."""
    try:
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ArgumentError(f"--out {str(out)!r}: {str(there)!r} is a file; name a folder")
        with TemporaryDirectory(dir=there) as probe:  # made and removed: what is refused later leaves nothing
            (Path(probe) / out.absolute().relative_to(there.absolute())).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"--out {str(out)[:200]!r} cannot be written to: {error.strerror}; name another folder"
        ) from error


def check_unused(out: Path, taken_up: str = "") -> None:
    """Refuse a folder with a finished run: its packages and reports would lie beside the results of the next one.

    ``taken_up``: the file with the result of runs that the command takes up again.
    """
    from exitkit.report.run import RESULTS
    from exitkit.retrofitting.result import RESULT

    if any((out / name).exists() for name in {RESULTS, RESULT} - {taken_up}):
        raise ArgumentError(
            f"--out {str(out)!r} holds a run already, which would be lost; name another folder, or remove it"
        )


def check_least(**numbers: int | None) -> None:
    """Refuse numbers below 1; None is left out."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {number} must be at least 1")


def shares_of(given: str, option: str = "--budgets") -> list[float]:
    """What was given as an option, ``"25,35,50"``, as shares of 1.

    Raises:
        ArgumentError: something else, or a number that is not positive or above 1000, ten times the backbone.
    """
    try:
        found = [float(part) / 100 for part in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 10 for share in found):
        raise ArgumentError(
            f"{option} {given[:80]!r} must be percentages of the backbone's MACs, at most 1000, such as 25,35,50"
        )
    if max(found) <= 0.01:
        raise ArgumentError(
            f"{option} {given[:80]!r} is in percent: {100 * found[0]:g} is {100 * found[0]:g}%; write {1e4 * found[0]:g} for "
            f"{1e4 * found[0]:g}%"
        )
    return found
