"""Recipes: everything that a training run depends on, as a TOML file."""

from __future__ import annotations

import inspect
import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch

from exitkit.cli.data.augmentation import AUGMENTATIONS, MIXING
from exitkit.cli.recipes.phase_tables import KEYS as PHASE_KEYS
from exitkit.cli.recipes.phase_tables import check_phases, phases
from exitkit.cli.recipes.schedule import by_name
from exitkit.cli.recipes.values import check_type, made, plain_distillation
from exitkit.common.errors import ArgumentError, ExitkitError, FileError, unknown_name
from exitkit.exits.classifiers import HeadSpec
from exitkit.methods.presets import PRESETS, Method
from exitkit.training import Distillation, EnsembleFit, Loss, Phase, Trainer

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
_MOST_BYTES = 2**20
_ELSEWHERE = ("model", "loss", "optimizer", "schedule", "show_progress")
_TRAINER = [*(f.name for f in fields(Trainer) if f.init and f.name not in _ELSEWHERE), "phase"]
_SCHEDULE = ["name", "warmup", "cycles"]
_LOSS = [f.name for f in fields(Loss)]
_DISTILLATION = [f.name for f in fields(Distillation)]
_EXITS = ["every", "at", "at_cost", "placement", "first", "head", "method", "num_classes", "num_outputs"]


@dataclass(frozen=True)
class Recipe:
    """A training run. In the file, ``exits``, ``trainer``, ``optimizer``, ``schedule`` and ``loss`` are tables.

    Attributes:
        model: as for ``exitkit bench --model``.
        data: as for ``exitkit bench --data``; for a model with one output the last column holds numbers.
        weights: a state-dict file, ``"pretrained"``, or none for random ones.
        test: test samples; by default those that the data bring, or a held-out fifth.
        pairs: of text: every sample is two texts, in the first two columns.
        max_length: of text: tokens after which one is cut; by default as many as the tokenizer and the model take.
        num_classes: size of the model's classifier, where it is not its own default.
        batch_size: of training.
        limit: use at most so many training samples.
        per_class: use so many training samples of each class, drawn by the seed; ``validation`` takes its part of these.
        unlabelled: beside ``per_class``: so many of the other training samples of each class, without their labels.
        classes: groups of the data's classes; each is one class, and classes in none are left out.
        validation: share of the training samples, the same of each class, that is held out for early stopping; from 1 on, how
            many of each class.
        augment: names of augmentations, applied in this order to training images, ``crop`` first.
        exits: options of :func:`exitkit.attach`; ``method`` is a name or ``{name = "gpf", ...}``
            with its options.
        trainer: options of :class:`exitkit.Trainer`; ``phase`` is a list of tables
            (:mod:`exitkit.cli.recipes.phase_tables`), and takes the place of ``regime``.
        optimizer: ``name`` (adam, adamw, sgd) and its own options.
        schedule: options of :func:`exitkit.cli.recipes.schedule.by_name`, for a rate that changes after every step.
        loss: options of :class:`exitkit.training.Loss`, ``distillation`` being a table again.
    """

    model: str
    data: str
    weights: str | None = None
    test: str | None = None
    pairs: bool = False
    max_length: int | None = None
    num_classes: int | None = None
    batch_size: int = 64
    limit: int | None = None
    per_class: int | None = None
    unlabelled: int | None = None
    classes: list[list[int]] = field(default_factory=list)
    validation: float | None = None
    augment: list[str] = field(default_factory=list)
    exits: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Recipe).items():
            check_type(name, getattr(self, name), hint)
        for name in ("batch_size", "limit", "max_length", "per_class", "unlabelled"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ArgumentError(f"{name} = {number} must be at least 1")
        whole = isinstance(self.validation, int) and self.validation >= 1
        if self.validation is not None and not whole and not 0 < self.validation < 1:
            raise ArgumentError(
                f"validation = {self.validation} must be a share of the training samples, between 0 and 1, or a whole number "
                "of each class"
            )
        self._check_unlabelled()
        for name in self.augment:
            if not isinstance(name, str) or name not in AUGMENTATIONS:
                raise unknown_name("augment", name, AUGMENTATIONS)
        tables = (("exits", _EXITS), ("trainer", _TRAINER), ("schedule", _SCHEDULE), ("loss", _LOSS))
        for table, allowed in tables:
            _check_keys(f"{table}.", getattr(self, table), allowed)
        if "phase" in self.trainer:
            check_phases(self.trainer["phase"], self.trainer)
        HeadSpec.parse_all(self.exits.get("head", "auto"))
        self.make_method()
        self.make_ensemble_fit()
        self.make_loss()
        optimizer = self.make_optimizer()([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3}])
        if schedule := self.make_schedule():
            schedule(optimizer, 1)

    def _check_unlabelled(self) -> None:
        if self.unlabelled is None:
            return
        if self.per_class is None:
            raise ArgumentError(
                f"unlabelled = {self.unlabelled} goes beside per_class, which says how many keep labels"
            )
        if "distillation" not in self.loss:
            raise ArgumentError(
                f"unlabelled = {self.unlabelled} without a teacher teaches nothing; add [loss.distillation], or leave it out"
            )
        if mixing := [name for name in self.augment if name in MIXING]:
            raise ArgumentError(f"augment = {mixing} mixes labels, and unlabelled samples have none; leave one out")

    def make_ensemble_fit(self) -> EnsembleFit:
        """How the ensemble is fitted."""
        given = self.trainer.get("ensemble_fit", {})
        check_type("trainer.ensemble_fit", given, dict[str, Any])
        _check_keys("trainer.ensemble_fit.", given, [field.name for field in fields(EnsembleFit)])
        return EnsembleFit(**given)

    def make_method(self) -> Method:
        """The early-exit method."""
        given = self.exits.get("method", "ztw")
        options = dict(given) if isinstance(given, dict) else {"name": given}
        name = options.pop("name", None)
        if not isinstance(name, str) or name not in PRESETS:
            raise unknown_name("exits.method", name, PRESETS)
        known = [option.name for option in fields(Method) if option.name != "name"]
        _check_keys("exits.method.", options, [*known, *inspect.signature(PRESETS[name]).parameters])
        return made("exits.method", PRESETS[name], options)  # type: ignore[no-any-return]

    def make_loss(self) -> Loss:
        """What the exits minimise."""
        options = dict(self.loss)
        distillation = options.get("distillation")
        if distillation is not None:
            if not isinstance(distillation, dict):
                raise ArgumentError(f"loss.distillation = {distillation!r} must be a table: [loss.distillation]")
            _check_keys("loss.distillation.", distillation, _DISTILLATION)
            options["distillation"] = made("loss.distillation", Distillation, plain_distillation(distillation))
        return made("loss", Loss, options)  # type: ignore[no-any-return]

    def make_optimizer(self) -> partial[torch.optim.Optimizer]:
        """A function from parameter groups to the optimiser."""
        options = dict(self.optimizer)
        name = options.pop("name", "adam")
        if not isinstance(name, str) or name not in OPTIMIZERS:
            raise unknown_name("optimizer.name", name, OPTIMIZERS)
        _check_keys("optimizer.", options, _optimizer_keys(OPTIMIZERS[name]))
        make = partial(OPTIMIZERS[name], **options)
        made("optimizer", make, {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3})
        return make

    def trainer_options(self, last: int) -> dict[str, Any]:
        """What :class:`exitkit.Trainer` takes, for a model whose backbone is exit ``last``."""
        options = dict(self.trainer)
        if "phase" in options:
            own: tuple[Phase, ...] = phases(options.pop("phase"), last)
            options["regime"] = own
        return options | {"ensemble_fit": self.make_ensemble_fit()}

    def make_schedule(self) -> partial[torch.optim.lr_scheduler.LRScheduler] | None:
        """A function from an optimiser and its number of steps to a schedule; None for the trainer's own."""
        return partial(by_name, **self.schedule) if self.schedule else None


def read_recipe(path: str | Path, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe in a TOML file, with ``overrides`` by dotted key (``"trainer.epochs"``) in place of its own values.

    Raises:
        ArgumentError: no such file, no TOML, an unknown or missing key, or a value that cannot be.
    """
    values = _tables(Path(path))
    for key, value in overrides.items():
        *tables, last = key.split(".")
        inner = values
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ArgumentError(f"--set {key}: {table!r} is a value, not a table")
        inner[last] = value
    try:
        _check_keys("", values, [f.name for f in fields(Recipe)])
        missing = [name for name in ("model", "data") if name not in values]
        if missing:
            raise ArgumentError(
                f'{" and ".join(missing)} missing; write {missing[0]} = "..." at the top, or give --{missing[0]}'
            )
        return Recipe(**values)
    except ExitkitError as error:
        raise ArgumentError(f"recipe {str(path)!r}: {error}") from error


def output_within(out: Path, trainer: Mapping[str, Any]) -> Path:
    """``trainer.output_dir`` below ``out``, or ``out`` itself where a recipe has none.

    Raises:
        ArgumentError: a place outside of ``out``.
    """
    given = trainer.get("output_dir", ".")
    if not isinstance(given, str) or not (out.resolve() / given).resolve().is_relative_to(out.resolve()):
        raise ArgumentError(
            f"trainer.output_dir = {given!r} is outside of --out {str(out)!r}; name a folder below it, such as 'run'"
        )
    return out / given


def parse_override(text: str) -> tuple[str, Any]:
    """``trainer.epochs=3`` as key and value; a value that is no TOML is a string.

    Raises:
        ArgumentError: no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ArgumentError(f"--set {text!r} is no KEY=VALUE; write for instance --set trainer.epochs=3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return key.strip(), value.strip()


def _tables(path: Path) -> dict[str, Any]:
    try:
        if os.path.getsize(path) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB")
        return tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:240]
        raise FileError(f"recipe {str(path)!r} cannot be read as TOML: {reason}") from error


def _check_keys(prefix: str, values: Mapping[str, Any], allowed: Collection[str]) -> None:
    for key in values:
        if key in allowed:
            continue
        if homes := [table for table, keys in _tables_of_keys().items() if key in keys]:
            where = " or ".join(_header(table) if table else "to the top, above every [table]" for table in homes)
            raise ArgumentError(f"key '{prefix}{key}' is in the wrong place; it goes {where}")
        names = [f"{prefix}{name}" for name in allowed]
        raise ArgumentError(str(unknown_name("key", f"{prefix}{key}", names, shown=len(names))))


def _tables_of_keys() -> dict[str, Collection[str]]:
    """The keys of every table that has its own; "" is the top of the file."""
    return {
        "": [f.name for f in fields(Recipe)],
        "exits": _EXITS,
        "trainer": _TRAINER,
        "trainer.phase": PHASE_KEYS,
        "optimizer": {key for make in OPTIMIZERS.values() for key in _optimizer_keys(make)},
        "schedule": _SCHEDULE,
        "loss": _LOSS,
        "loss.distillation": _DISTILLATION,
    }


def _header(table: str) -> str:
    return "into [[trainer.phase]]" if table == "trainer.phase" else f"into [{table}]"


def _optimizer_keys(make: type[torch.optim.Optimizer]) -> list[str]:
    """Its own options, but for those that the trainer sets."""
    return [key for key in inspect.signature(make).parameters if key not in ("params", "lr", "weight_decay")]


def described(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values by name, for a record of results."""
    values: dict[str, Any] = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    return {name: value for name, value in values.items() if value not in (None, [], {})}
