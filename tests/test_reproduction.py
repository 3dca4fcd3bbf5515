"""The papers' tables: that they say what the papers say, that every row is a recipe, and that a table runs."""

# ruff: noqa: F811  (fixtures of tests.test_cli)

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from exitkit import ExitOutputs
from exitkit.cli.recipes.recipe import Recipe
from exitkit.evaluation import RegressionOutputs
from exitkit.exits import Feature
from exitkit.exits.own import named
from exitkit.models import cifar_resnet
from exitkit.report import Stage
from exitkit.reproduction import Outcome, Paper, Row, Setting, Table, find_table, markdown, papers, settings_of
from exitkit.reproduction.measures import numbers_of
from exitkit.reproduction.tables import merged
from exitkit.training import Distillation
from exitkit.training.regimes import epochs_of, phases_of
from tests.test_cli import images, invoke, refused, run  # noqa: F401 - fixtures

TABLES = [table for paper in papers().values() for table in paper.tables.values()]
NAMES = [f"{table.paper} {table.name}" for table in TABLES]


def row(paper: str, table: str, name: str) -> Row:
    return next(one for one in find_table(paper, table).rows if one.name == name)


# what the tables say --------------------------------------------------------------------------------------------------


ROWS = {
    "zero-time-waste": {"1": 36, "2": 3, "5": 3, "C.1": 8, "C.2": 6, "C.3": 12, "B.3": 3},
    "distillation": {
        "1": 11,
        "2": 11,
        "3": 4,
        "4": 4,
        "5": 11,
        "6": 11,
        "figure-7": 10,
        "figure-9": 6,
        "figure-10": 3,
    },
    "training-regimes": {"1": 18, "2": 3, "2R": 3, "3": 9, "4": 3, "5": 10, "6": 9, "7": 21, "20": 9}
    | dict.fromkeys(("8", "9", "10", "13", "14"), 7),
}


def test_every_table_is_there_with_its_rows() -> None:
    assert {
        paper.name: {name: len(one.rows) for name, one in paper.tables.items()} for paper in papers().values()
    } == ROWS


@pytest.mark.parametrize(
    ("paper", "table", "name", "published", "deviation"),
    [
        (
            "zero-time-waste",
            "1",
            "ResNet-56 CIFAR-10 ZTW",
            (92.0, 80.3, 88.7, 91.5, 92.1, 92.1),
            (0.2, 1.0, 0.4, 0.2, 0.3, 0.3),
        ),
        (
            "zero-time-waste",
            "1",
            "MobileNet CIFAR-10 PBEE",
            (90.6, 76.3, 85.9, 89.7, 90.9, 91.1),
            (0.2, 0.9, 0.3, 0.3, 0.2, 0.1),
        ),
        (
            "zero-time-waste",
            "1",
            "VGG Tiny ImageNet ZTW",
            (59.0, 41.4, 52.3, 59.3, 60.1, 60.5),
            (0.2, 0.5, 0.4, 0.4, 0.5, 0.4),
        ),
        (
            "distillation",
            "1",
            "ImageNet(300) semi-supervised",
            (82.3, 84.0, 84.3, 84.3, 84.3),
            (0.3, 0.5, 0.6, 0.6, 0.6),
        ),
        ("distillation", "5", "ImageNet(full) distillation", (88.8, 90.5, 91.3, 91.6, 91.8), (0.1,) * 5),
        ("distillation", "4", "CPU, budget-mode", (159, 339, 471, 559, 665), (48, 99, 131, 138, 125)),
        ("distillation", "4", "GPU, anytime-mode", (27, 38, 48, 56, 59), (2, 1, 2, 1, 1)),
        (
            "training-regimes",
            "1",
            "ResNet-34 C-100 Mixed",
            (62.24, 73.81, 75.92, 75.88, 75.88),
            (0.78, 0.51, 0.44, 0.40, 0.40),
        ),
        ("training-regimes", "1", "ViT-S ImageNet Joint", (50.10, 73.99, 76.38, 76.44, None), ()),
        ("training-regimes", "2R", "STS-B Disjoint", (2.37, 1.55, 0.54, 0.51, 0.51), (0.01, 0.11, 0.0, 0.02, 0.02)),
        (
            "training-regimes",
            "3",
            "PBEE Disjoint",
            (19.28, 44.11, 57.85, 63.91, 63.99),
            (0.32, 1.73, 1.61, 1.68, 1.68),
        ),
        ("training-regimes", "8", "Separate", (66.25, 72.57, 72.87, 72.82, 72.82), (0.54, 0.38, 0.41, 0.46, 0.46)),
        (
            "training-regimes",
            "9",
            "Mixed-gradual",
            (64.73, 72.10, 75.66, 77.21, 77.49),
            (0.66, 0.47, 0.51, 0.61, 0.64),
        ),
        ("training-regimes", "10", "Branch-wise", (32.41, 33.46, 34.33, 34.51, 34.51), (1.32, 0.76, 0.49, 0.45, 0.45)),
        ("training-regimes", "13", "Alternating", (83.51, 83.92, 83.92, 83.92, 84.18), (0.33, 0.06, 0.06, 0.06, 0.34)),
        ("training-regimes", "14", "Separate", (2.69, 1.41, 1.41, 1.40, 1.39), (0.14, 0.09, 0.09, 0.08, 0.0)),
        ("training-regimes", "20", "Mixed 1L", (82.21, 83.20, 83.19, 83.19, 83.18), (0.08, 0.39, 0.41, 0.41, 0.45)),
        ("training-regimes", "6", "Joint 2L-1024", (45.59, 55.11, 57.73, 57.66), ()),
        ("training-regimes", "7", "Every-3 Joint", (None, 63.33, 67.22, 67.21), ()),
        ("training-regimes", "5", "Mixed Dec.", (53.58, 63.60, 66.76, 66.78, 66.75), (0.69, 0.25, 0.50, 0.47, 0.47)),
    ],
)
def test_published_numbers(paper: str, table: str, name: str, published: Any, deviation: Any) -> None:
    """Typed off the papers once more, by hand."""
    one = row(paper, table, name)
    assert one.published == published
    assert one.deviation == deviation


def test_the_papers_settings() -> None:
    ztw = row("zero-time-waste", "1", "VGG CIFAR-100 ZTW").recipe
    expected = {"regime": "disjoint", "epochs": 50, "lr": 1e-3, "milestones": [15], "weight_decay": 5e-4}
    assert expected.items() <= ztw["trainer"].items()
    assert ztw["trainer"]["ensemble_fit"] == {"optimizer": "adam", "epochs": 500, "penalty": 0.0}
    semi = row("distillation", "2", "CIFAR(150) semi-supervised").recipe
    assert (semi["per_class"], semi["validation"], semi["unlabelled"]) == (150, 50, 350)
    assert row("training-regimes", "7", "Every-4 Mixed").recipe["exits"]["at"] == [4, 8, 12]
    assert row("training-regimes", "10", "Joint").recipe["exits"]["at"] == list(range(7))
    assert row("training-regimes", "1", "ViT-T ImageNet Joint").backbone is None
    assert row("training-regimes", "1", "ViT-T ImageNet Mixed").backbone is not None


@pytest.mark.parametrize(
    ("table", "exits", "epochs", "first"),
    [
        ("8", 7, 1000, "ResNet-34 C-100 "),
        ("9", 17, 1000, "MSDNet C-100 "),
        ("10", 7, 1000, "ViT-T C-100 "),
        ("13", 11, 30, "Newsgroups "),
        ("14", 11, 30, "STS-B "),
    ],
)
def test_the_regimes_of_appendix_a(table: str, exits: int, epochs: int, first: str, tmp_path: Path) -> None:
    """As many epochs a phase as the others have; the three that the paper's main text has are the runs of its tables there."""
    names = ("Disjoint", "Joint", "Mixed", "Branch-wise", "Separate", "Alternating", "Mixed-gradual")
    phases = dict(zip(names, (1, 1, 1, exits + 1, exits + 1, 1, exits), strict=True))
    rows = find_table("training-regimes", table).rows
    assert [one.name for one in rows] == list(names)
    for one in rows:
        regime = one.recipe["trainer"]["regime"]
        assert regime == one.name.lower()
        lengths = epochs_of(phases_of(regime, exits), one.recipe["trainer"]["epochs"])
        assert lengths == (epochs,) * phases[one.name]
        assert (one.backbone is not None) == (regime in ("disjoint", "mixed", "mixed-gradual"))
    tiny = settings_of(find_table("training-regimes", table), "smoke", tmp_path, tmp_path)
    assert [one.recipe["trainer"]["epochs"] for one in tiny] == [phases[one.row.name] for one in tiny]  # one a phase
    for one in rows[:3]:
        same = row("training-regimes", {"13": "2", "14": "2R"}.get(table, "1"), first + one.name)
        assert (same.recipe, same.backbone, same.published) == (one.recipe, one.backbone, one.published)


@pytest.mark.parametrize("table", ["8", "10"])
def test_regimes_are_compared_from_one_backbone(table: str, tmp_path: Path) -> None:
    """That of mixed-gradual trained for as many epochs as all its phases together."""
    begun = [
        one for one in settings_of(find_table("training-regimes", table), "cpu", tmp_path, tmp_path) if one.backbone
    ]
    assert [one.row.name for one in begun] == ["Disjoint", "Mixed", "Mixed-gradual"]
    assert len({one.backbone_key for one in begun}) == 1
    assert begun[2].recipe["trainer"]["epochs"] > begun[1].recipe["trainer"]["epochs"]


@pytest.mark.parametrize("data", ["CIFAR-10", "CIFAR-100", "Tiny ImageNet"])
def test_ablations_of_zero_time_waste_read_the_runs_of_its_first_table(data: str) -> None:
    """Geometric ensembles and stopped gradients are ZTW itself; what lets gradients through logs their cosine (C.3)."""
    ztw = row("zero-time-waste", "1", f"ResNet-56 {data} ZTW")
    for table, name in (("C.2", "geometric"), ("C.3", "ZTW, stopped")):
        same = row("zero-time-waste", table, f"ResNet-56 {data} {name}")
        assert (same.recipe, same.backbone) == (ztw.recipe, ztw.backbone)
    milestones = [15, 40] if data == "Tiny ImageNet" else [15]
    for table in ("C.2", "C.3"):
        for one in find_table("zero-time-waste", table).rows:
            if one.name.startswith(f"ResNet-56 {data} "):
                assert one.recipe["trainer"]["milestones"] == milestones
                assert (one.recipe["trainer"].get("analyse") == "first_exit") == ("let through" in one.name)


def distillation_of(table: str, name: str) -> Distillation:
    given = row("distillation", table, name).recipe
    found = Recipe(**{key: value for key, value in given.items() if key != "smoke"}).make_loss().distillation
    assert found is not None
    return found


def test_figures_of_distillation() -> None:
    """Figure 7: τ is constant, or rises by algorithm 1. Figures 9 and 10: who teaches, and 30 + 50 labels of 500 a class."""
    for mode in ("budget-mode", "anytime-mode"):
        names = ("rising", *(f"constant {temperature}" for temperature in (1, 2, 3, 4)))
        rising, *constant = (distillation_of("figure-7", f"{name}, {mode}") for name in names)
        assert (rising.confidence_limit, rising.temperature, rising.multiplier) == (0.5, 1.0, 1.05)
        assert [(one.confidence_limit, one.temperature) for one in constant] == [(None, t) for t in (1, 2, 3, 4)]
    assert distillation_of("figure-9", "all later exits, budget-mode").of(8, last=10) == (9, 10)
    for mode, table in (("budget-mode", "2"), ("anytime-mode", "6")):
        for name, same in (("exit-wise", "exit-wise"), ("last exit", "distillation")):
            there = row("distillation", table, f"CIFAR(250) {same}")
            assert row("distillation", "figure-9", f"{name}, {mode}").recipe == there.recipe
    semi = row("distillation", "figure-10", "semi-supervised").recipe
    assert (semi["per_class"] - 30, semi["validation"], semi["per_class"] + semi["unlabelled"]) == (50, 50, 500)
    assert find_table("distillation", "Figure-7") is find_table("distillation", "figure-7")


@pytest.mark.parametrize("table", ["1", "4", "5"])
def test_exits_of_the_imagenet_msdnet_are_as_wide_as_what_they_read(table: str) -> None:
    """The published classifier: ConvBasic(nIn, nIn) twice; 768 channels behind the tenth layer."""
    for one in find_table("distillation", table).rows:
        head = named(one.recipe["exits"]["head"])
        assert head is not None
        body = head(Feature((768, 7, 7), "channels_first", image_side=224))
        convolutions = [part for part in body.modules() if isinstance(part, nn.Conv2d)]
        assert [(part.in_channels, part.out_channels, part.stride) for part in convolutions] == [
            (768, 768, (2, 2))
        ] * 2


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_every_row_is_a_recipe_at_every_scale(table: Table, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for one in table.rows:
        assert one.published == () or len(one.published) == len(table.columns)
        assert one.deviation == () or len(one.deviation) == len(table.columns)
    scales = ["full", "smoke", *(["cpu"] if table.cpu is not None else [])]
    for scale in scales:
        settings = settings_of(table, scale, tmp_path, tmp_path / "made-up")
        keys = {json.dumps([one.recipe, one.backbone], sort_keys=True): one.key for one in settings}
        assert len(set(keys.values())) == len(keys)
        for setting in settings:
            Recipe(**setting.recipe)
            assert setting.backbone is None or Recipe(**setting.backbone)
    assert table.cpu_rows is None or set(table.cpu_rows) <= {one.name for one in table.rows}


@pytest.mark.parametrize(
    ("paper", "given", "name"),
    [
        ("zero-time-waste", "C.1", "C.1"),
        ("zero-time-waste", "c1", "C.1"),
        ("zero-time-waste", "Table C.1", "C.1"),
        ("zero-time-waste", "T1", "1"),
        ("training-regimes", "2r", "2R"),
        ("distillation", "fig 9", "figure-9"),
    ],
)
def test_a_table_is_found_however_its_number_is_written(paper: str, given: str, name: str) -> None:
    assert find_table(paper, given).name == name


@pytest.mark.parametrize("paper", papers().values(), ids=list(papers()))
def test_what_stands_elsewhere_is_a_table(paper: Paper) -> None:
    assert paper.elsewhere
    assert set(paper.elsewhere.values()) <= set(paper.tables)
    assert not set(paper.elsewhere) & set(paper.tables)


@pytest.mark.parametrize(
    ("paper", "table", "told"),
    [
        ("zero-time-waste", "C.1", "\nAccuracy in %, mean ± standard deviation. A figure in the paper"),
        ("distillation", "6", "\nTop-5 accuracy in %, mean ± 1.96 standard errors. The runs are those of table 2."),
        ("distillation", "3", "\nMilliseconds, mean ± standard deviation. "),
        ("training-regimes", "2R", "\nMean squared error, mean ± standard deviation. "),
    ],
)
def test_a_table_says_what_its_numbers_are(paper: str, table: str, told: str) -> None:
    chosen = find_table(paper, table)
    assert told in markdown(chosen, [Outcome(one, reason="not run") for one in chosen.rows], "full")


def test_later_values_stand_in_the_place_of_earlier_ones() -> None:
    first = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    assert merged([first, {"a": {"c": [3]}}, {"d": {"e": 1}}]) == {"a": {"b": 1, "c": [3]}, "d": {"e": 1}}
    assert first == {"a": {"b": 1, "c": [1, 2]}, "d": "x"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zero-time-wast", "1"), "Did you mean 'zero-time-waste'"),
        (("zero-time-waste",), "C.3"),
        (("training-regimes", "21"), "TABLE of training-regimes='21' is unknown"),
        (("training-regimes", "1", "--scale", "tiny"), "Allowed: 'smoke', 'cpu', 'full'"),
        (("training-regimes", "4", "--scale", "cpu"), "table 4 of training-regimes has no scale 'cpu'"),
        (("zero-time-waste", "c.1", "--scale", "full", "--data", "nowhere"), "cifar100_train.npz' is not there"),
        (("training-regimes", "table 19"), "TABLE of training-regimes='table 19' is of the same settings as '5'"),
        (("zero-time-waste", "Fig. 7"), "is of the same settings as 'C.1', where it stands here; give C.1"),
        (("distillation", "figure-6"), "Did you mean 'figure-9' or 'figure-7' or 'figure-10'?"),
        (
            ("zero-time-waste", "T1", "--rows", "AlexNet"),
            "--rows='AlexNet' is unknown. Allowed: 'ResNet-56 CIFAR-10 SDN',",
        ),
        (("distillation", "6", "--rows", "CIFAR(150) exitwise"), "Did you mean 'CIFAR(150) exit-wise'"),
        (("training-regimes", "2", "--rows", " "), "--rows=' ' is unknown. Allowed: 'Newsgroups Disjoint',"),
        (
            ("zero-time-waste", "1", "--scale", "cpu", "--rows", "VGG"),
            "'ResNet-56 CIFAR-10 ZTW'. Give whole words",
        ),
    ],
)
def test_what_there_is_not_is_told(invoke: Any, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    _, printed, complained = invoke("reproduce", *arguments, "--out", tmp_path / "out")
    assert message.replace(" ", "") in (printed + complained).replace("\n", "").replace(" ", "").replace("│", "")


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("Joint", ["Joint", "Joint Inc.", "STS-B Joint"]),
        ("joint inc.", ["Joint Inc."]),
        ("B Joint", ["STS-B Joint"]),
        ("CIFAR-10", ["ResNet-56 CIFAR-10 SDN"]),
        ("CIFAR(150)", ["CIFAR(150) exit-wise"]),
    ],
)
def test_rows_are_chosen_by_whole_words(
    monkeypatch: pytest.MonkeyPatch, invoke: Any, tmp_path: Path, words: str, chosen: list[str]
) -> None:
    names = ("Joint", "Joint Inc.", "STS-B Joint", "Disjoint", "ResNet-56 CIFAR-10 SDN", "ResNet-56 CIFAR-100 SDN")
    recipe = {"model": "nothing", "data": "nowhere.npz", "exits": {}}
    rows = tuple(Row(name, recipe) for name in (*names, "CIFAR(150) exit-wise"))
    small = Table("small", "1", "a small one", "budgets", (50,), 1, "nothing", 1.0, rows)
    run = []
    monkeypatch.setattr("exitkit.reproduction.find_table", lambda paper, table: small)
    monkeypatch.setattr("exitkit.reproduction.settings_of", lambda *_: [Setting(row, recipe, None) for row in rows])
    monkeypatch.setattr(
        "exitkit.cli.reproducing._run", lambda table, setting, *_: run.append(setting.row.name) or Outcome(setting.row)
    )
    invoke("reproduce", "small", "1", "--out", tmp_path / "out", "--rows", words)
    assert run == chosen


# numbers --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def outputs() -> ExitOutputs:
    logits = torch.randn(50, 3, 6, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(50), :, torch.arange(50) % 6] += torch.tensor([0.5, 1.5, 1.0])
    return ExitOutputs(logits, torch.arange(50) % 6, torch.tensor([1.0, 2.0, 3.2]), 3.0)


def top(scores: Any, labels: Any, count: int) -> float:
    best = np.argsort(-np.asarray(scores), axis=1)[:, :count]
    return 100 * float(np.mean([label in row for row, label in zip(best, np.asarray(labels), strict=True)]))


def test_budgets(outputs: ExitOutputs) -> None:
    columns = (25, 50, 100, "max", "unlimited")
    curve = outputs.curve()
    expected = [None, 100 * curve.at_budget(0.5).accuracy, 100 * curve.at_budget(1.0).accuracy]
    expected += [100 * curve.accuracy.max(), 100 * outputs.accuracy()[-1]]
    assert numbers_of("budgets", columns, outputs) == pytest.approx(expected)


def test_the_first_exits_by_their_best_and_by_their_mean(outputs: ExitOutputs) -> None:
    """The best is chosen on validation samples: there exit 1 is the best of all three."""
    validation = replace(outputs, log_probs=outputs.log_probs[:, [0, 2, 1]].flip(0), labels=outputs.labels.flip(0))  # type: ignore[union-attr]
    each = [top(outputs.log_probs[:, m], outputs.labels, 2) for m in range(3)]
    there = [top(validation.log_probs[:, m], validation.labels, 2) for m in range(3)]
    chosen = [int(np.argmax(there[: m + 1])) for m in range(3)]
    found = numbers_of("budget-mode", ("1", "2", "3"), outputs, top=2, validation=validation)
    assert found == pytest.approx([each[exit_] for exit_ in chosen])
    means = [top(outputs.log_probs[:, : m + 1].exp().mean(1), outputs.labels, 2) for m in range(3)]
    *found, beyond = numbers_of("anytime-mode", ("1", "2", "3", "4"), outputs, top=2)
    assert found == pytest.approx(means)
    assert beyond is None


def test_squared_errors_and_times() -> None:
    labels = torch.linspace(0, 5, 40)
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.2])
    outputs = RegressionOutputs(labels[:, None] + noise, labels, torch.tensor([1.0, 2.0]), 2.0)
    assert numbers_of("mse", ("unlimited",), outputs) == pytest.approx([outputs.mse()[-1]], rel=1e-5)
    stages = [
        Stage("first", 1.0, 1.0, milliseconds=1.0, head_milliseconds=0.25),
        Stage("second", 1.0, 1.0, milliseconds=2.0, head_milliseconds=0.5),
        Stage("backbone", 1.0, 0.0, milliseconds=4.0, head_milliseconds=0.0),
    ]
    assert numbers_of("milliseconds", ("1", "2", "3"), outputs, stages=stages) == [1.0, 3.0, 7.0]
    alone = [1.0, 0.75 + 2.0, 0.75 + 1.5 + 4.0]  # the heads of those before are not run
    assert numbers_of("budget-milliseconds", ("1", "2", "3"), outputs, stages=stages) == alone
    untimed = [Stage("first", 1.0, 1.0), *stages[1:]]
    assert numbers_of("budget-milliseconds", ("1", "2", "3"), outputs, stages=untimed) == [None] * 3


# a table that runs ----------------------------------------------------------------------------------------------------


def resnet8(num_classes: int = 4) -> nn.Module:
    return cifar_resnet(8, num_classes)


RECIPE: dict[str, Any] = {
    "model": "tests.test_reproduction:resnet8",
    "data": "small_train.npz",
    "validation": 0.2,
    "smoke": {"side": 8},
    "exits": {"method": "sdn", "head": "1L", "at": [0]},
    "trainer": {"regime": "disjoint", "epochs": 9},
}
ALONE = merged([RECIPE, {"trainer": {"phase": [{"exits": "backbone", "stages": "all"}]}}])
del ALONE["trainer"]["regime"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Row("SDN", RECIPE, ALONE, (50.0, 60.0), (1.0, None)),
        Row("PBEE", RECIPE, ALONE, criterion="patience"),
        Row("wrong", merged([RECIPE, {"exits": {"at": ["nowhere"]}}])),
    )
    table = Table("small", "1", "a small one", "budgets", (60, "max"), 3, "nothing", 1.0, rows, cpu={"limit": 12})
    found = {"small": Paper("small", "A Small One", {"1": table})}
    for place in ("exitkit.reproduction.tables.papers", "exitkit.reproduction.papers"):
        monkeypatch.setattr(place, lambda: found)


def test_a_table_runs_and_its_runs_are_kept(small: None, invoke: Any, run: Any, tmp_path: Path) -> None:
    command = ("reproduce", "small", "1", "--out", tmp_path / "out")
    code, printed, complained = invoke(*command)
    assert code == 2
    assert "1 of 3 rows failed: wrong" in complained
    assert "50.00 ± 1.00" in printed
    document = json.loads((tmp_path / "out" / "small-1-smoke.json").read_text())
    sdn, pbee, wrong = document["rows"]
    assert sdn["runs"] == pbee["runs"]  # one training
    kept = ExitOutputs.load(Path(sdn["runs"]) / "seed-0" / "outputs-sdn.safetensors")
    assert sdn["numbers"][0] == [100 * kept.curve().at_budget(0.6).accuracy]
    assert pbee["numbers"][0] == [100 * kept.curve("patience").at_budget(0.6).accuracy]
    assert "nowhere" in wrong["reason"]
    assert "| SDN | here |" in (tmp_path / "out" / "small-1-smoke.md").read_text()
    run("report", sdn["runs"])

    again = invoke(*command, "--rows", "SDN")[1]
    assert " ".join(again.split()).count("is finished already") == 2  # the backbone's own run, and the exits'


def test_the_backbone_of_a_row_is_what_its_exits_begin_from(small: None, run: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run("reproduce", "small", "1", "--out", tmp_path / "out", "--rows", "SDN", "--seeds", 2)
    folders = sorted((tmp_path / "out" / "runs").iterdir())
    (trained,) = [folder for folder in folders if (folder / "seed-0" / "backbone.safetensors").exists()]
    (exits,) = [folder for folder in folders if folder != trained]
    given = json.loads((exits / "seed-0" / "recipe.json").read_text())["weights"]
    assert Path(given) == trained / "seed-0" / "backbone.safetensors"
    fresh = resnet8().state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in load_file(given).items() if name in fresh)
    run("report", exits)  # seeds that begin from backbones of their own are one setting
    assert "Over seeds" in (exits / "report.html").read_text("utf-8")


def test_a_regression_reads_its_errors_under_a_budget(invoke: Any, tmp_path: Path) -> None:
    code, _, complained = invoke(
        *("reproduce", "training-regimes", "2R", "--scale", "smoke", "--rows", "Joint", "--out", tmp_path / "out")
    )
    assert code == 0, complained
    rows = json.loads((tmp_path / "out" / "training-regimes-2R-smoke.json").read_text())["rows"]
    (joint,) = rows
    assert joint["name"] == "STS-B Joint"
    code, _, complained = invoke("report", joint["runs"])
    assert code == 0, complained
    kept = RegressionOutputs.load(Path(joint["runs"]) / "seed-0" / "outputs-pbee.safetensors")
    predictions, labels = kept.predictions.double().numpy(), kept.labels.double().numpy()
    costs = (kept.macs.double() / kept.backbone_macs).numpy()
    changes = np.abs(np.diff(predictions, axis=1))  # a sample leaves at the first small one, never at the first exit
    reached = []
    for tolerance in (0.0, *(np.unique(changes) + 1e-9)):
        leaves = np.hstack([np.zeros((len(labels), 1), bool), changes < tolerance])
        leaves[:, -1] = True
        exits = leaves.argmax(1)
        errors = (predictions[np.arange(len(labels)), exits] - labels) ** 2
        reached.append((costs[exits].mean(), errors.mean()))
    *at_budgets, unlimited = joint["numbers"]
    assert unlimited == pytest.approx([((predictions[:, -1] - labels) ** 2).mean()], rel=1e-5)
    for budget, found in zip((0.25, 0.5, 0.75, 1.0), at_budgets, strict=True):
        below = [error for cost, error in reached if cost < budget]
        assert found == (pytest.approx(below[:1], rel=1e-5) if below else None)


def test_runs_are_kept_by_the_content_of_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pixels are other data, though the file is as large; the same file elsewhere is the same; each is read once."""
    read = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: read.append(1) or file_digest(*given))

    def key(folder: str, data: str = "images.npz") -> str:
        recipe = {"model": "m", "data": str(tmp_path / folder / data), "exits": {}}
        return Setting(Row("row", recipe), recipe, None).key

    for folder, grey in (("one", 0), ("other", 255), ("copy", 0)):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "images.npz", images=np.full((4, 8, 8, 3), grey, np.uint8), labels=np.arange(4))
    first, second = (tmp_path / name / "images.npz" for name in ("one", "other"))
    assert first.stat().st_size == second.stat().st_size
    assert key("one") == key("copy") == key("one") != key("other")
    assert len(read) == 3
    kept = key("one")
    first.write_bytes(second.read_bytes())
    assert key("one") != kept

    for folder in ("a", "b"):
        (tmp_path / folder / "pets" / "cat").mkdir(parents=True)
        (tmp_path / folder / "pets" / "cat" / "1.png").write_bytes(b"123")
    assert key("a", "pets") == key("b", "pets")
    for name, content in (("c", b"1234"), ("d", b"123")):
        (tmp_path / name / "pets" / "cat").mkdir(parents=True)
        (tmp_path / name / "pets" / "cat" / ("1.png" if name == "c" else "2.png")).write_bytes(content)
    assert len({key(name, "pets") for name in "abcd"}) == 3


class OneMachine:
    """Ray as far as tables use it: tasks run in turn when they are asked for, on one machine of two CPUs."""

    exceptions = SimpleNamespace(RayError=ZeroDivisionError)

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 8.0}}]

    def remote(self, **options: Any) -> Any:
        self.given.append(options)
        return lambda function: SimpleNamespace(remote=lambda *given: cache(lambda: self.run(function, given)))

    def run(self, function: Any, given: Any) -> Any:
        return function(*(self.get(one) if callable(one) else one for one in given))

    def get(self, task: Any) -> Any:
        return task()


@pytest.fixture
def one_machine(monkeypatch: pytest.MonkeyPatch) -> OneMachine:
    from exitkit.serving import cluster

    made = OneMachine()
    monkeypatch.setattr(cluster, "import_ray", lambda: made)
    return made


def test_a_table_on_a_cluster_is_the_same_table(
    small: None, one_machine: OneMachine, invoke: Any, tmp_path: Path
) -> None:
    """Rows of one training train once, a fault is its own row's, and what is there is not trained again."""
    here, there = (tmp_path / name for name in ("here", "there"))
    invoke("reproduce", "small", "1", "--out", here)
    code, printed, complained = invoke("reproduce", "small", "1", "--out", there, "--ray", "local", "--threads", 2)
    assert code == 2
    assert "1 of 3 rows failed: wrong" in complained
    assert "nowhere" in printed
    documents = [json.loads((out / "small-1-smoke.json").read_text()) for out in (here, there)]
    assert [row["numbers"] for row in documents[0]["rows"]] == [row["numbers"] for row in documents[1]["rows"]]
    folders = [sorted(path.relative_to(out) for path in out.glob("runs/*/*/*")) for out in (here, there)]
    assert folders[0] == folders[1]
    assert one_machine.given == [{"num_cpus": 2, "num_gpus": 0}]
    again = invoke("reproduce", "small", "1", "--out", there, "--rows", "SDN", "--ray", "local")[1]
    assert " ".join(again.split()).count("is finished already") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", 3), "no machine of the cluster has 3 CPUs for a run; give --threads fewer"),
        (("--device", "cuda"), "no machine of the cluster has 1 CPU and a GPU for a run"),
        (("--device", "cuda:1"), "with --ray every run is given its GPU; give cpu or cuda"),
    ],
)
def test_what_a_cluster_has_not_is_told(
    small: None, one_machine: OneMachine, refused: Any, tmp_path: Path, options: tuple[Any, ...], message: str
) -> None:
    assert message in refused("reproduce", "small", "1", "--out", tmp_path, "--ray", "auto", *options)


def test_a_cluster_needs_ray(small: None, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("reproduce", "small", "1", "--out", tmp_path, "--ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'exitkit[serve]'" in refused(*command, "local")


def test_a_row_whose_machine_is_lost_fails_alone(tmp_path: Path) -> None:
    from exitkit.cli.recipes.on_ray import carried_out_here

    recipe, lost = Recipe("tests.toy:net", "x.npz"), str(tmp_path / "elsewhere")
    assert carried_out_here(recipe, tmp_path, lost, 1, None, "its backbone failed") == "its backbone failed"
    told = carried_out_here(recipe, tmp_path, lost, 1, None, None)
    assert told is not None
    assert f"{lost!r} is not on " in told


def test_scales_name_the_files_that_are_not_there(small: None, tmp_path: Path) -> None:
    table = find_table("small", "1")
    setting = settings_of(table, "cpu", tmp_path, tmp_path)[0]
    assert setting.missing == (str(tmp_path / "small_train.npz"),)
    assert setting.recipe["limit"] == 12
    before = setting.key
    np.savez(tmp_path / "small_train.npz", images=np.zeros((1, 2, 2, 3), np.uint8), labels=np.zeros(1, int))
    there = settings_of(table, "cpu", tmp_path, tmp_path)[0]
    assert there.missing == ()
    assert there.key != before  # by content


def test_contrast_keeps_the_mean_of_each_channel() -> None:
    pytest.importorskip("torchvision")
    from exitkit.cli.data.augmentation import augmented

    image = torch.randn(3, 8, 8)
    changed, _ = augmented([(image, 0)], None, ["contrast"], 2, (0.0,) * 3)
    other = changed[0][0]
    assert not torch.equal(other, image)
    assert torch.allclose(other.mean((1, 2)), image.mean((1, 2)), atol=1e-6)
    ratio = ((other - other.mean((1, 2), keepdim=True)) / (image - image.mean((1, 2), keepdim=True))).flatten()
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), atol=1e-3)
    assert 0.6 <= float(ratio[0]) <= 1.4
