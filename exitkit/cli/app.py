"""The commands. What one needs is imported when it runs, so that help is there at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from exitkit.cli.experiments import bench, init, train
from exitkit.cli.options import (
    Classes,
    MaxTokens,
    ModelName,
    Package,
    PackageDevice,
    Tau,
    Trust,
    Weights,
    check_folder,
    check_least,
)
from exitkit.cli.results import calibrate, compare, report
from exitkit.common.console import make_console, printable
from exitkit.common.errors import ArgumentError

app = typer.Typer(
    help="Early exits for pretrained classifiers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_NAMED = 20
"""How many skipped inputs are named one by one."""
_SKIPPED = 3
"""Exit status of ``run`` where images were left out."""


@app.command()
def inspect(
    model: ModelName,
    weights: Weights = None,
    num_classes: Classes = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input image, for models that do not say")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per text; what a text model costs depends on it")] = None,
) -> None:
    """Show where exits can go, and what each stage costs.

    Feature shapes, MACs (ptflops beside them), parameters and memory. exitkit.attach(at=) and bench --at take the numbers and
    the names.
    """
    import exitkit
    from exitkit.cli.sources import load_model

    backbone = load_model(model, weights, num_classes)
    example = _image_example(backbone, image_size) if length is None else _text_example(backbone, length)
    exitkit.inspect(backbone, example)


app.command()(bench)
app.command()(init)
app.command()(train)


@app.command()
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
    max_tokens: MaxTokens = None,
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
    source = flags_over(find_source(str(run or exits), method), model, weights, num_classes, labels, max_tokens, trust)
    target = out or Path(str(run)) / "model.pt2"
    for line in export_source(source, target, threshold, optimize):
        make_console().print(line)


@app.command()
def run(
    package: Package,
    inputs: Annotated[list[str], typer.Argument(help="Images and folders; or texts, .txt, .csv, .tsv; - is stdin")],
    batch_size: Annotated[int, typer.Option(help="Samples answered at once")] = 16,
    threshold: Tau = None,
    device: PackageDevice = None,
    trust: Trust = False,
) -> None:
    """Classify with a package, one JSON line for each input.

    A line has the input, its label, the exit where it left, and the score there. Images that cannot be read are named on
    stderr and left out; the exit status is then 3.
    """
    import exitkit
    from exitkit.cli.inference import predict
    from exitkit.cli.inputs import Losses
    from exitkit.common.schema import to_json

    check_least(batch_size=batch_size)
    exitkit.keep_memory()
    loaded = exitkit.load(package, threshold=threshold, device=device, trust=trust)
    losses = Losses()
    for record in predict(loaded, inputs, batch_size, losses):
        typer.echo(to_json(record))
    for reason in losses.skipped[:_NAMED]:
        typer.echo(f"skipped: {printable(reason)}", err=True)
    if losses.cut:
        typer.echo(f"{losses.cut} texts were longer than the package takes, and cut", err=True)
    if losses.skipped:
        typer.echo(f"{len(losses.skipped)} images were skipped", err=True)
        raise typer.Exit(_SKIPPED)


@app.command()
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
) -> None:
    """Time a package on real inputs.

    At several batch sizes, beside a run in which no sample leaves.
    """
    import exitkit
    from exitkit.cli.latency import batch_sizes, latency_table, samples_for

    sizes = batch_sizes(batches)
    exitkit.keep_memory()
    loaded = exitkit.load(package, threshold=threshold, device=device, trust=trust)
    make_console().print(latency_table(loaded, samples_for(loaded, package, inputs or []), sizes))


app.command()(calibrate)
app.command()(compare)
app.command()(report)


@app.command()
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

    if side is None:
        return None
    if side < 1:
        raise ArgumentError(f"--image-size {side} must be at least 1: the side of the input image in pixels")
    channels = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    return torch.randn(2, channels, side, side)


def _text_example(backbone: Any, length: int) -> Any:
    import torch

    from exitkit.surgery.default_inputs import example_for

    example = example_for(backbone)
    if not example.text or length < 1:
        raise ArgumentError(f"--length {length} must be at least 1, and the model one that reads tokens")
    positions = torch.arange(length) % example.tensors[0].shape[1]
    return example.spec.batch(tuple(tensor[:1, positions] for tensor in example.tensors))
