"""The commands."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import exitkit
from exitkit.cli.bench import compare, comparison_table, write_results
from exitkit.cli.data import load_data, load_tokenizer
from exitkit.cli.demo import run_demo
from exitkit.cli.inference import batch_sizes, latency_table, made_up, predict, read_samples
from exitkit.cli.inputs import Losses
from exitkit.cli.policies import app as policies
from exitkit.cli.recipe import output_within, parse_override, read_recipe
from exitkit.cli.results import calibrate, report
from exitkit.cli.results import compare as compare_runs
from exitkit.cli.sources import is_code, load_model, load_pretrained
from exitkit.cli.threads import computing_with, threads_for
from exitkit.cli.training import prepared, train_recipe
from exitkit.common.allocator import keep_memory
from exitkit.common.batches import split_batch
from exitkit.common.console import make_console, printable
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.common.schema import to_json
from exitkit.methods.presets import PRESETS, as_method
from exitkit.report import Stage
from exitkit.surgery.default_inputs import example_for

app = typer.Typer(
    help="Early exits for pretrained classifiers.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
_console = make_console()
_NAMED = 20
"""How many skipped inputs are named one by one."""
_SKIPPED = 3
"""Exit status of ``run`` where images were left out."""

Model = Annotated[str, typer.Option(help="torchvision:NAME, timm:NAME, hf:NAME_OR_DIR or package.module:function")]
Package = Annotated[Path, typer.Argument(help="What exitkit export wrote: .pt2, .onnx, .onnx.zip or .pte")]
Trust = Annotated[bool, typer.Option("--trust", help="You trust the code in a .pt2; without, there is a warning")]
Weights = Annotated[str | None, typer.Option(help="State-dict file (.safetensors, .pth), or 'pretrained'")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default one for a backbone below 100 MMACs")]
Classes = Annotated[int | None, typer.Option(help="Size of the model's classifier, where not its library's default")]


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="torchvision:NAME, timm:NAME, hf:NAME_OR_DIR or package.module:function")
    ],
    weights: Weights = None,
    num_classes: Classes = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input image, for models that do not say")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per text; what a text model costs depends on it")] = None,
) -> None:
    """Show where exits can go, and what each stage costs: feature shapes, MACs (ptflops beside them), memory."""
    backbone = load_model(model, weights, num_classes)
    example = _image_example(backbone, image_size) if length is None else _text_example(backbone, length)
    exitkit.inspect(backbone, example)


@app.command()
def bench(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Image folder, .npz, .csv/.tsv of text and label, or torchvision data set")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.json, curve.png and the outputs")],
    test: Annotated[str | None, typer.Option(help="Test samples; by default a fifth of --data is held out")] = None,
    methods: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PRESETS)}")] = "sdn,pbee,ztw",
    weights: Weights = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of the data; a last layer of other ones is replaced, and trained")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens after which a text is cut")] = None,
    every: Annotated[int, typer.Option(help="An exit after every n-th block")] = 1,
    head: Annotated[
        str, typer.Option(help="auto, 1L, 2L-WIDTH, conv, separable, strided, tail or branch-BLOCKS")
    ] = "auto",
    epochs: Annotated[int, typer.Option(help="Passes over the training samples")] = 15,
    lr: Annotated[float, typer.Option(help="Adam's learning rate")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Training batch size")] = 64,
    limit: Annotated[int | None, typer.Option(help="Use at most so many training samples")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and subset")] = 0,
    threads: Threads = None,
) -> None:
    """Train exits by several methods on a frozen backbone; print and write accuracy against compute."""
    chosen = [as_method(name.strip()) for name in methods.split(",")]
    for name, number in (("--batch-size", batch_size), ("--limit", 1 if limit is None else limit)):
        if number < 1:
            raise ArgumentError(f"{name} {number} must be at least 1")
    if seed < 0:
        raise ArgumentError(f"--seed {seed} must be at least 0")
    _check_folder(out)
    backbone = load_pretrained(model, weights, num_classes)
    if weights is None and not model.startswith("hf:"):
        _console.print("note: no --weights, so the backbone has random weights")
    tokenizer = model.removeprefix("hf:") if model.startswith("hf:") else None
    split = load_data(data, backbone, test, tokenizer, max_length=max_length)
    if split.note:
        _console.print(f"note: {split.note}")
    train_loader, test_loader = split.loaders(batch_size, limit, seed)
    example = _data_example(backbone, train_loader)
    stages: dict[str, tuple[Stage, ...]] = {}
    keep_memory()
    with computing_with(threads_for(backbone, example, threads, _console.print)):
        results = compare(
            backbone,
            chosen,
            train_loader,
            test_loader,
            placement={"every": every, "head": head, "num_classes": num_classes},
            training={"epochs": epochs, "lr": lr, "seed": seed},
            example_inputs=example,
            report=_console.print,
            stages=stages,
            classes=split.classes,
        )
    about = {"model": model, "weights": weights, "data": data, "epochs": epochs, "every": every}
    write_results(results, out, about, stages, split.test)
    _console.print(comparison_table(results, f"{model} on {data}"))
    _console.print(
        f"Written to {out}/: results.json, curve.png, hindsight.png, outputs-METHOD.safetensors, samples.json"
    )
    _console.print(f"To look at it: exitkit report {out}")


@app.command()
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
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as trainer.lr=1e-4")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Call the function that the recipe names as its model")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train exits as a recipe says; print accuracy against compute and write the exits and the results.

    All that it writes lies in --out.
    """
    _check_folder(out)
    flags = {"model": model, "weights": weights, "data": data, "test": test, "limit": limit}
    flags |= {"trainer.epochs": epochs, "trainer.seed": seed} | dict(map(parse_override, set_ or ()))
    chosen = read_recipe(recipe, {key: value for key, value in flags.items() if value is not None})
    if model is None and not trust:
        _ask_for(chosen.model)
    trainer = {**chosen.trainer, **output_within(out, chosen.trainer)}
    chosen = replace(chosen, trainer=trainer)
    backbone, split = prepared(chosen)
    if split.note:
        _console.print(f"note: {split.note}")
    if chosen.weights is None and not chosen.model.startswith("hf:"):
        _console.print("note: no weights, so the backbone has random weights")
    example = _data_example(backbone, split.loaders(1, None, 0)[1])
    keep_memory()
    with computing_with(threads_for(backbone, example, threads, _console.print)):
        train_recipe(chosen, backbone, split, example, out, _console.print)
    _console.print(f"Written to {out}/")


@app.command()
def export(
    model: Model,
    exits: Annotated[str, typer.Option(help="Folder of save_pretrained, or a name on the Hugging Face Hub")],
    out: Annotated[
        Path, typer.Option(help="model.pt2, model.onnx or model.pte (one sample), model.onnx.zip (batches)")
    ],
    threshold: Annotated[float | None, typer.Option(help="τ; by default the one saved with the exits")] = None,
    optimize: Annotated[bool, typer.Option(help="Compile the stages for this device (.pt2; takes minutes)")] = False,
    weights: Weights = None,
    num_classes: Classes = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens after which a text is cut; by default as many as the model takes")
    ] = None,
) -> None:
    """Write a backbone and its saved exits as one file that runs without the model's code."""
    backbone = load_model(model, weights, num_classes).eval()
    ee = exitkit.MultiExitModel.from_pretrained(backbone, exits)
    text = model.startswith("hf:") and ee.example.text
    tokenizer = load_tokenizer(model.removeprefix("hf:")) if text else None
    exitkit.export(ee, out, threshold, optimize=optimize, tokenizer=tokenizer, max_length=max_length)
    _console.print(f"Written to {out} ({out.stat().st_size / 2**20:.1f} MiB)")


@app.command()
def run(
    package: Package,
    inputs: Annotated[list[str], typer.Argument(help="Images and folders; or texts, .txt, .csv, .tsv; - is stdin")],
    batch_size: Annotated[int, typer.Option(help="Samples answered at once")] = 16,
    threshold: Annotated[float | None, typer.Option(help="Another τ than the package's")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    trust: Trust = False,
) -> None:
    """Classify with a package; one JSON line for each input: label, exit and score.

    Images that cannot be read are named on stderr and left out; the exit status is then 3.
    """
    if batch_size < 1:
        raise ArgumentError(f"--batch-size {batch_size} must be at least 1")
    keep_memory()
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
    inputs: Annotated[str | None, typer.Option(help=".npy of input tensors; by default random ones")] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes")] = "1,8,64",
    threshold: Annotated[float | None, typer.Option(help="Another τ than the package's")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    trust: Trust = False,
) -> None:
    """Time a package at several batch sizes, beside a run in which no sample leaves."""
    keep_memory()
    loaded = exitkit.load(package, threshold=threshold, device=device, trust=trust)
    samples = made_up(loaded) if inputs is None else read_samples(inputs)
    _console.print(latency_table(loaded, samples, batch_sizes(batches)))


app.command()(calibrate)
app.command("compare")(compare_runs)
app.command()(report)
app.add_typer(policies, name="rl")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot and the numbers")] = Path("exitkit-demo"),
) -> None:
    """Digits, a small network, exits: the whole path in under a minute, without network or GPU."""
    _check_folder(out)
    keep_memory()
    with computing_with(1):
        run_demo(out, _console)


def _ask_for(model: str) -> None:
    """A recipe whose model is a function runs code of this machine: ask once, or be told by --trust."""
    if not is_code(model):
        return
    question = f"The recipe imports and calls {printable(model)}. Run it?"
    if not sys.stdin.isatty() or not typer.confirm(question):
        raise ArgumentError(f"the recipe's model is the function {printable(model)!r}; --trust lets it run")


def _check_folder(out: Path) -> None:
    """Refuse what cannot become a folder, before anything is trained for it."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ArgumentError(f"--out {str(out)!r}: {str(there)!r} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise ArgumentError(f"--out {str(out)!r}: you may not write to {str(there)!r}; name another folder")


def _image_example(backbone: nn.Module, side: int | None) -> torch.Tensor | None:
    if side is None:
        return None
    if side < 1:
        raise ArgumentError(f"--image-size {side} must be at least 1: the side of the input image in pixels")
    channels = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    return torch.randn(2, channels, side, side)


def _text_example(backbone: nn.Module, length: int) -> Any:
    example = example_for(backbone)
    if not example.text or length < 1:
        raise ArgumentError(f"--length {length} must be at least 1, and the model one that reads tokens")
    positions = torch.arange(length) % example.tensors[0].shape[1]
    return example.spec.batch(tuple(tensor[:1, positions] for tensor in example.tensors))


def _data_example(backbone: nn.Module, loader: Any) -> Any:
    """Two samples of the data for a model that does not declare its inputs; None for one that does."""
    try:
        example_for(backbone)
    except ExitkitError:
        inputs, _ = split_batch(next(iter(loader)))
        return inputs[:2] if isinstance(inputs, torch.Tensor) else {key: value[:2] for key, value in inputs.items()}
    return None
