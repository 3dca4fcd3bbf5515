"""Commands that write a package, answer with it, and time it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitkit.cli.options import (
    AsJson,
    Classes,
    MaxLength,
    Package,
    PackageDevice,
    Tau,
    Trust,
    Weights,
    check_least,
)
from exitkit.cli.serving import RayActors, RayAddress, RayOut, run_on_ray
from exitkit.common.console import counted, make_console, printable
from exitkit.common.errors import ArgumentError

_NAMED = 20
"""How many skipped inputs are named one by one."""
_SKIPPED = 3
"""Exit status of ``run`` where images were left out."""


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
