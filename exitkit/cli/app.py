"""The commands. What one needs is imported when it runs, so that help is there at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitkit.cli.analysing import analyse
from exitkit.cli.experiments import bench, init, train
from exitkit.cli.help import SectionedGroup, add
from exitkit.cli.inspecting import inspect
from exitkit.cli.options import (
    AsJson,
    check_folder,
)
from exitkit.cli.packages import bench_latency, export, run
from exitkit.cli.policies import app as policies
from exitkit.cli.reproducing import reproduce
from exitkit.cli.results import calibrate, compare, report
from exitkit.cli.retrofitting import retrofit
from exitkit.cli.serving import serve
from exitkit.common.console import make_console, without_progress

_STATUSES = """Exit status: 0 where all went well; 2 for what you can put right, said in a line or two; 3 where run left images
out; 130 after Ctrl-C."""

app = typer.Typer(
    help="Early exits for pretrained classifiers.",
    epilog=_STATUSES,
    cls=SectionedGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import exitkit

        typer.echo(f"exitkit {exitkit.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of progress, and warn of nothing")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show where in the code an error was raised")
    ] = False,
) -> None:
    """What holds for every command, before its name."""
    if quiet:
        context.with_resource(without_progress())
    del version, verbose  # the one has been printed; main() looks for the other, as it sees the error


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the exits, the numbers and the pictures")] = Path(
        "exitkit-demo"
    ),
) -> None:
    """Digits, a small network, exits: the path in a minute.

    Without network or GPU; it says how to go on from there.
    """
    check_folder(out)
    from exitkit.cli.demo import run_demo
    from exitkit.cli.machine import computing_with
    from exitkit.common.allocator import keep_memory

    keep_memory()
    with computing_with(1):
        run_demo(out, make_console())


def doctor(
    compiling: Annotated[bool, typer.Option(help="Try to compile too, which takes most of the time")] = True,
    json: AsJson = False,
) -> None:
    """Say what is installed, what there is to run on, and whether attaching, compiling and exporting work here.

    What an issue asks for. Nothing is downloaded, and nothing is kept.
    """
    from exitkit.cli.doctor import examine
    from exitkit.common.schema import to_json

    found: dict[str, dict[str, str]] = {}
    for heading, name, text in examine(compiling):
        if not json:
            typer.echo(f"{heading}\n" * (heading not in found) + f"  {name:<18}{text}")
        found.setdefault(heading, {})[name] = text
    if json:
        typer.echo(to_json(found))


_FIND, _LOOK, _RUN = "From a model to exits", "Looking at runs", "From exits to answers"
add(
    app, inspect, _FIND, "inspect timm:resnet18 --weights pretrained", "inspect hf:distilbert-base-uncased --length 64"
)
add(app, retrofit, _FIND, "retrofit --model timm:resnet18 --weights pretrained --data photos --out runs/a")
add(app, bench, _FIND, "bench --model timm:resnet18 --weights pretrained --data photos --every 2 --out runs/a")
add(app, init, _FIND, "init recipe.toml")
add(app, train, _FIND, "train recipe.toml --set trainer.lr=1e-4 --out runs/a")
add(
    app,
    reproduce,
    _FIND,
    "reproduce",
    "reproduce training-regimes 3 --scale smoke",
    "reproduce zero-time-waste 1 --scale cpu --rows CIFAR-10",
)
add(app, calibrate, _LOOK, "calibrate runs/a --max-drop 0.01")
add(app, report, _LOOK, "report runs/a")
add(app, compare, _LOOK, "compare runs/a runs/b --budget 0.5")
add(app, analyse, _LOOK, "analyse runs/a runs/b --what rank,connectivity")
add(app, export, _RUN, "export runs/a", "export --model timm:resnet18 --exits my-exits --out model.onnx")
add(
    app,
    run,
    _RUN,
    "run runs/a/model.pt2 --trust photo.jpg photos/",
    "run model.pt2 --trust photos/ --ray local --out predictions.parquet",
)
add(app, serve, _RUN, "serve runs/a/model.pt2 --trust", "serve --config serve.yaml --port 8080 --replicas 2")
add(app, bench_latency, _RUN, "bench-latency runs/a/model.pt2 --trust --batches 1,16")
add(app, demo, None, "demo --out demo")
add(app, doctor, None, "doctor", "doctor --json")
app.add_typer(policies, name="rl")
