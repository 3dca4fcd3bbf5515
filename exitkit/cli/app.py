"""The commands. What one needs is imported when it runs, so that help is there at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from exitkit.cli.analysing import analyse
from exitkit.cli.experiments import bench, init, train
from exitkit.cli.help import SectionedGroup, add
from exitkit.cli.options import (
    AsJson,
    Classes,
    MaxLength,
    ModelName,
    Package,
    PackageDevice,
    Tau,
    Trust,
    Weights,
    check_folder,
    check_least,
)
from exitkit.cli.policies import app as policies
from exitkit.cli.reproducing import reproduce
from exitkit.cli.results import calibrate, compare, report
from exitkit.cli.retrofitting import retrofit
from exitkit.cli.serving import RayActors, RayAddress, RayOut, run_on_ray, serve
from exitkit.common.console import counted, make_console, printable, without_progress
from exitkit.common.errors import ArgumentError, ExitkitError

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


_NAMED = 20
"""How many skipped inputs are named one by one."""
_SKIPPED = 3
"""Exit status of ``run`` where images were left out."""


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


def inspect(
    model: ModelName,
    weights: Weights = None,
    num_classes: Classes = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input image, for models that do not say")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per text; what a text model costs depends on it")] = None,
    json: AsJson = False,
) -> None:
    """Show where exits can go, and what each stage costs.

    Feature shapes, MACs (ptflops beside them), parameters and memory. exitkit.attach(at=) and bench --at take the numbers and
    the names.
    """
    import exitkit
    from exitkit.cli.sources import load_model
    from exitkit.common.schema import to_json

    check_least(num_classes=num_classes)
    backbone = load_model(model, weights, num_classes)
    example = _image_example(backbone, image_size) if length is None else _text_example(backbone, length)
    found = exitkit.inspect(backbone, example, show=not json)
    if json:
        typer.echo(to_json(found.to_dict()))


def export(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_DIR",
            help="What exitkit bench, train or demo wrote: its backbone, "
            "exits, calibrated τ, class names and preprocessing are taken; or give --model and --exits",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="model.pt2, model.onnx or model.pte (one sample), model.onnx.zip (batches); by default "
            "RUN_DIR/model.pt2"
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Of the run's; by default the cheapest that exitkit calibrate promised for")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The backbone: torchvision:NAME, timm:NAME, hf:NAME_OR_DIR or package.module:function"),
    ] = None,
    exits: Annotated[
        str | None, typer.Option(help="Folder of save_pretrained, a run's folder, or a name on the Hugging Face Hub")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="τ; by default the one calibrated, or saved with the exits")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Class names: a file of one a line, or a,b,c")] = None,
    optimize: Annotated[bool, typer.Option(help="Compile the stages for this device (.pt2; takes minutes)")] = False,
    weights: Weights = None,
    num_classes: Classes = None,
    max_length: MaxLength = None,
    trust: Annotated[bool, typer.Option("--trust", help="Call the function that the run names as its model")] = False,
) -> None:
    """Write a model with exits as one file that runs on its own.

    Of a run it takes the backbone, the exits, τ with its guarantee, class names and preprocessing.
    """
    from exitkit.cli.exporting import export_source, find_source, flags_over

    if (run is None) == (exits is None):
        raise ArgumentError(
            "export takes one place with exits: RUN_DIR, a folder that exitkit bench or train wrote, or --exits with --model"
        )
    if run is not None and not run.is_dir():
        raise ArgumentError(
            f"RUN_DIR {str(run)!r} is not a directory; give one that exitkit bench, train or demo wrote"
        )
    if run is None and out is None:
        raise ArgumentError("--out is missing: name the file to write, such as model.pt2")
    source = flags_over(find_source(str(run or exits), method), model, weights, num_classes, max_length, labels, trust)
    target = out or Path(str(run)) / "model.pt2"
    for line in export_source(source, target, threshold, optimize):
        make_console().print(line, soft_wrap=line.startswith("  exitkit "))  # a command that is broken does not run


def run(
    package: Package,
    inputs: Annotated[list[str], typer.Argument(help="Images and folders; or texts, .txt, .csv, .tsv; - is stdin")],
    top: Annotated[int, typer.Option(help="Above 1: add so many labels, the likeliest first, with probabilities")] = 1,
    batch_size: Annotated[int, typer.Option(help="Samples answered at once")] = 16,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Texts are pairs: the first two columns of .csv and .tsv files")
    ] = False,
    threshold: Tau = None,
    device: PackageDevice = None,
    trust: Trust = False,
    ray: RayAddress = None,
    out: RayOut = None,
    actors: RayActors = 1,
) -> None:
    """Classify with a package, one JSON line for each input.

    A line has the input, its label, the exit where it left, and the score there. Images that cannot be read are named on
    stderr and left out; the exit status is then 3.
    """
    import exitkit
    from exitkit.cli.inference import predict
    from exitkit.cli.inputs import Losses
    from exitkit.common.schema import to_json

    check_least(batch_size=batch_size, top=top, actors=actors)
    if (ray is None) != (out is None):
        raise ArgumentError("--ray and --out go together: answers from a cluster are written as Parquet")
    if ray is not None and pairs:
        raise ArgumentError("--pairs does not go with --ray; run pairs of texts on this machine, without it")
    if ray is not None and out is not None:
        typer.echo(run_on_ray(package, inputs, ray, out, batch_size, threshold, device, trust, actors))
        return
    exitkit.keep_memory()
    loaded = exitkit.load(package, threshold=threshold, device=device, trust=trust)
    losses = Losses()
    for record in predict(loaded, inputs, batch_size, losses, top, pairs):
        typer.echo(to_json(record))
    for reason in losses.skipped[:_NAMED]:
        typer.echo(f"skipped: {printable(reason)}", err=True)
    if losses.cut:
        typer.echo(f"{losses.cut} texts were longer than the package takes, and cut", err=True)
    if losses.skipped:
        typer.echo(f"{counted(len(losses.skipped), 'image')} skipped", err=True)
        raise typer.Exit(_SKIPPED)


def bench_latency(
    package: Package,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUTS",
            help="Images, folders or texts; an .npy of tensors; or a RUN_DIR. By default the test samples of the run in "
            "whose folder the package lies",
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes")] = "1,8,64",
    threshold: Tau = None,
    device: PackageDevice = None,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Time a package on real inputs.

    At several batch sizes, beside a run in which no sample leaves.
    """
    from dataclasses import asdict

    import exitkit
    from exitkit.cli.latency import batch_sizes, latencies, latency_table, samples_for
    from exitkit.common.schema import to_json

    sizes = batch_sizes(batches)
    exitkit.keep_memory()
    loaded = exitkit.load(package, threshold=threshold, device=device, trust=trust)
    rows = latencies(loaded, samples_for(loaded, package, inputs or []), sizes)
    if json:
        typer.echo(to_json([asdict(row) for row in rows]))
    else:
        make_console().print(latency_table(rows))


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


def _image_example(backbone: Any, side: int | None) -> Any:
    import torch
    from torch import nn

    from exitkit.surgery.default_inputs import example_for

    if side is None:
        try:
            example_for(backbone)
        except ExitkitError as error:
            raise ArgumentError(
                f"{type(backbone).__name__} does not say what it takes; give the side of its input images, such as "
                "--image-size 32, or call exitkit.inspect(model, example_inputs) in Python for other inputs"
            ) from error
        return None
    if side < 1:
        raise ArgumentError(f"--image-size {side} must be at least 1: the side of the input image in pixels")
    channels = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    return torch.randn(2, channels, side, side)


def _text_example(backbone: Any, length: int) -> Any:
    import torch

    from exitkit.multi_exit.text_length import check_positions
    from exitkit.surgery.default_inputs import example_for

    example = example_for(backbone)
    if not example.text or length < 1:
        raise ArgumentError(f"--length {length} must be at least 1, and the model one that reads tokens")
    check_positions(backbone, length, "--length ")
    positions = torch.arange(length) % example.tensors[0].shape[1]
    return example.spec.batch(tuple(tensor[:1, positions] for tensor in example.tensors))


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
