"""A recipe carried out: exits attached, trained, evaluated and written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from exitkit.cli.bench import Trained, check_classes, comparison_table, head_share, timed_stages
from exitkit.cli.data.augmentation import augmented
from exitkit.cli.data.loading import load_data
from exitkit.cli.data.split import Split
from exitkit.cli.data.subsets import balanced, held_out_of, regrouped, together
from exitkit.cli.recipes.recipe import Recipe, described, output_within
from exitkit.cli.sources import load_model
from exitkit.cli.writing import write_results, written
from exitkit.common.console import counted
from exitkit.evaluation import ExitOutputs, RegressionOutputs, collect
from exitkit.evaluation.fields import check_top
from exitkit.multi_exit.attaching import attach
from exitkit.multi_exit.model import MultiExitModel
from exitkit.report import Stage
from exitkit.report.run import RESULTS
from exitkit.training import Trainer
from exitkit.training.checkpoint import remove_checkpoint


def prepared(recipe: Recipe) -> tuple[nn.Module, Split]:
    """The backbone and its data."""
    backbone = load_model(recipe.model, recipe.weights, recipe.num_classes, seed_of(recipe))
    tokenizer = recipe.model.removeprefix("hf:") if recipe.model.startswith("hf:") else None
    regression = 1 in (recipe.num_classes, recipe.exits.get("num_outputs"))
    pairs, length = recipe.pairs, recipe.max_length
    split = load_data(
        recipe.data,
        backbone,
        recipe.test,
        tokenizer,
        numbers=regression,
        pairs=pairs,
        max_length=length,
        unlabelled="distillation" in recipe.loss,
    )
    return backbone, regrouped(split, recipe.classes) if recipe.classes else split


def seed_of(recipe: Recipe) -> int:
    """Of initialisation, order and subset; 0 for one that the trainer will complain of."""
    seed = recipe.trainer.get("seed", 0)
    return seed if isinstance(seed, int) and seed >= 0 else 0


def train_recipe(
    recipe: Recipe,
    backbone: nn.Module,
    split: Split,
    example: Any,
    out: Path,
    report: Callable[[Any], None],
    top: int = 1,
) -> None:
    """Attach, train and evaluate; write the exits, a backbone that learned, the outputs and a summary to ``out``.

    Checkpoints go there too, and go when the results are written, unless the recipe has a place for them.

    Raises:
        ArgumentError: values that do not fit the model or the data.
        FileError: ``out`` cannot be written to; the results are then elsewhere.
    """
    seed = seed_of(recipe)
    unused = not (out / RESULTS).exists()
    torch.manual_seed(seed)
    method = recipe.make_method()
    placement = {key: value for key, value in recipe.exits.items() if key != "method"}
    model = attach(backbone, example, method=method, **placement)
    asked = recipe.exits.get("num_classes", recipe.num_classes)
    check_classes(model.num_classes, split.classes, asked, "exits.num_classes = {}")
    check_top(top, model.num_classes)
    report(
        f"{method.name}: {counted(len(model.boundaries), 'exit')}, heads add {head_share(model):.1%} of the backbone's MACs"
    )
    kept = output_within(out, recipe.trainer)
    trainer = Trainer(
        model,
        **{**recipe.trainer_options(len(model.classifiers)), "output_dir": kept},
        loss=recipe.make_loss(),
        optimizer=recipe.make_optimizer(),
        schedule=recipe.make_schedule(),
    )
    train, val, test = loaders(recipe, split, model.num_classes, seed)
    trainer.fit(train, val)
    outputs = collect(model, test)
    report(_table(method.name, outputs, f"{recipe.model} on {recipe.data}", top))
    if isinstance(outputs, RegressionOutputs):
        report(_per_exit(model, outputs))
        stages: tuple[Stage, ...] = ()
    else:
        stages = timed_stages(model, test, report)
    results = {method.name: Trained(model, outputs, stages)}
    learned, about = (backbone if trainer.trains_backbone else None), described(recipe)
    if learned is not None and model.new_head:
        about["num_classes"] = model.num_classes  # what is written has the new layer
    seen = None if val is None else collect(model, val)
    written(out, lambda folder: write_results(results, folder, about, split, learned, top, seen), unused)
    if "output_dir" not in recipe.trainer:
        remove_checkpoint(kept)


def loaders(
    recipe: Recipe, split: Split, num_classes: int, seed: int
) -> tuple[DataLoader[Any], DataLoader[Any] | None, DataLoader[Any]]:
    """Training batches, augmented; validation batches where some samples are held out; test batches.

    Of ``per_class`` samples, validation has its part, as in Phuong and Lampert, section 4.1.
    """
    train, unlabelled, val = split.train, None, None
    if recipe.per_class is not None:
        train, unlabelled = balanced(train, recipe.per_class, recipe.unlabelled, seed)
    if recipe.validation is not None:
        train, held_out = held_out_of(train, recipe.validation, seed)
        _, val = replace(split, test=held_out).loaders(recipe.batch_size, None, seed)
    everything = together(train, unlabelled)
    samples, collate = augmented(everything, split.collate, recipe.augment, num_classes, split.black)
    batches, _ = replace(split, train=samples, collate=collate).loaders(recipe.batch_size, recipe.limit, seed)
    _, test = split.loaders(recipe.batch_size, None, seed)
    return batches, val, test


def _per_exit(model: MultiExitModel, outputs: RegressionOutputs) -> Table:
    """How near each exit's predictions come to the numbers."""
    table = Table(title="Every exit on the test samples")
    for heading in ("exit", "cost", "MSE", "Pearson", "Spearman"):
        table.add_column(heading, justify="left" if heading == "exit" else "right")
    columns = (outputs.mse(), outputs.accuracy(), outputs.spearman())
    for exit_, cost, *values in zip(model.exits, outputs.costs, *columns, strict=True):
        table.add_row(exit_.name, f"{cost:.1%}", *(f"{value:.3f}" for value in values))
    return table


def _table(name: str, outputs: ExitOutputs, title: str, top: int) -> Table:
    """As of ``exitkit bench``; for regression Pearson's correlation and the squared error at the same budgets."""
    if not isinstance(outputs, RegressionOutputs):
        return comparison_table({name: outputs}, title, top=top)
    measured = {
        "Pearson": outputs.curve().budget_table().rows,
        "MSE": outputs.curve(measure="mse").budget_table().rows,
    }
    backbone = f"backbone: {outputs.accuracy()[-1]:.3f} and {outputs.mse()[-1]:.3f}"
    table = Table(
        title=title, caption=f"Pearson's correlation and mean squared error; {backbone}", caption_justify="left"
    )
    for heading in ("method", *measured["MSE"]):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for measure, rows in measured.items():
        cells = ("-" if point is None else f"{point.accuracy:.3f}" for point in rows.values())
        table.add_row(f"{name}, {measure}", *cells)
    return table
