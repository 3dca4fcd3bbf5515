"""Recipes: those that are shipped, what a run writes, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import exitkit
from exitkit import ExitkitError, Trainer
from exitkit.cli.data.augmentation import augmented
from exitkit.cli.recipes.recipe import Recipe, parse_override, read_recipe
from exitkit.cli.recipes.schedule import by_name
from exitkit.cli.recipes.training import prepared, train_recipe
from exitkit.cli.sources import load_model
from exitkit.multi_exit.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from exitkit.surgery.boundaries import find_boundaries
from exitkit.surgery.capturing import capture
from exitkit.surgery.placement import place
from exitkit.training import Distillation, Loss
from tests.test_cli import bert, images, invoke, refused, run  # noqa: F401 - fixtures

RECIPES = sorted((Path(__file__).resolve().parents[1] / "benchmarks" / "recipes").glob("*.toml"))


@pytest.fixture
def recipe(tmp_path: Path, images: Path) -> Callable[..., Path]:  # noqa: F811
    """``recipe(text)``: a recipe of the toy network and images, with more text."""

    def write(more: str = "", top: str = "") -> Path:
        path = tmp_path / "recipe.toml"
        head = f'model = "tests.toy:net"\ndata = {json.dumps(str(images))}\nbatch_size = 16\n{top}\n'
        path.write_text(head + '[exits]\nevery = 2\nhead = "1L"\n[trainer]\nepochs = 2\nlr = 0.01\n' + more)
        return path

    return write


# the shipped ones ----------------------------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    """It parses, its keys are known, and method, loss and optimiser are made of them."""
    shipped = read_recipe(path, {})
    assert shipped.make_method().name in path.read_text()
    assert isinstance(shipped.make_loss(), Loss)
    made = shipped.make_optimizer()([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-3, "weight_decay": 0.0}])
    assert type(made).__name__.lower() == shipped.optimizer["name"]
    assert shipped.trainer["epochs"] > 0


EXITS = {
    "ztw_resnet56_cifar10": 26,
    "kubaty_resnet34_cifar100": 7,
    "kubaty_vit_t_cifar100": 7,
    "kubaty_vit_b_cifar100": 4,
    "distillation_msdnet_cifar100": 10,
    "ztw_resnet50_oct2017": 5,
}


@pytest.mark.parametrize(("name", "exits"), EXITS.items())
def test_a_shipped_recipe_places_its_exits(name: str, exits: int) -> None:
    """On the architecture that it names, without weights."""
    pytest.importorskip("timm")
    shipped = read_recipe(next(path for path in RECIPES if path.stem == name), {})
    with torch.device("meta"):
        model = load_model(shipped.model, None, shipped.num_classes).eval()
    where = {key: shipped.exits.get(key) for key in ("every", "at", "at_cost")}
    assert len(place(find_boundaries(capture(model)), **where)) == exits


# a run ---------------------------------------------------------------------------------------------------------------


def test_a_run_writes_exits_and_results(run: Any, recipe: Any, tmp_path: Path) -> None:  # noqa: F811
    printed = run("train", "--trust", recipe(), "--out", tmp_path / "out")
    assert "25%" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["about"]["trainer"] == {"epochs": 2, "lr": 0.01}
    assert len(results["methods"]["ztw"]["accuracy_per_exit"]) == 2
    torch.manual_seed(0)
    loaded = exitkit.MultiExitModel.from_pretrained(
        load_model("tests.toy:net"), tmp_path / "out" / "exits" / "ztw", torch.zeros(2, 1, 8, 8)
    )
    assert len(loaded.boundaries) == 1
    assert not (tmp_path / "out" / "backbone.safetensors").exists()


def test_flags_override_keys(run: Any, recipe: Any, tmp_path: Path) -> None:  # noqa: F811
    text = '[loss]\nlabel_smoothing = 0.1\n[loss.distillation]\nteachers = "last"\nconfidence_limit = 0\n'
    flags = ("--epochs", 1, "--set", "trainer.regime=mixed", "--set", "exits.method=sdn", "--set", "validation=0.25")
    run("train", "--trust", recipe(text), "--out", tmp_path / "out", *flags)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["about"]["trainer"] == {"epochs": 1, "lr": 0.01, "regime": "mixed"}
    assert list(results["methods"]) == ["sdn"]
    assert (tmp_path / "out" / "backbone.safetensors").exists()


def test_a_run_of_its_own_weights_gives_the_same_numbers(run: Any, recipe: Any, tmp_path: Path) -> None:  # noqa: F811
    """Results written are those of the exits and the backbone that were written."""
    run("train", "--trust", recipe(), "--out", tmp_path / "out", "--set", "trainer.regime=mixed")
    weights = tmp_path / "out" / "backbone.safetensors"
    backbone = load_model("tests.toy:net", str(weights)).eval()
    ee = exitkit.MultiExitModel.from_pretrained(backbone, tmp_path / "out" / "exits" / "ztw", torch.zeros(2, 1, 8, 8))
    saved = exitkit.ExitOutputs.load(tmp_path / "out" / "outputs-ztw.safetensors")
    from exitkit.cli.data.loading import load_data

    split = load_data(json.loads(recipe().read_text().splitlines()[1].partition("= ")[2]), backbone)
    assert torch.allclose(exitkit.collect(ee, split.loaders(16, None, 0)[1]).log_probs, saved.log_probs, atol=1e-5)


PRETRAIN = '[[trainer.phase]]\nexits = "backbone"\nstages = "all"\n[[trainer.phase]]\nexits = "{}"\n{}'


@pytest.mark.parametrize(
    ("exits", "stages", "moves"),
    [("internal", "", False), ("all", 'stages = "all"\n', True)],
    ids=["disjoint", "mixed"],
)
def test_a_regime_with_a_phase_1_of_its_own_is_one_file(
    run: Any,  # noqa: F811
    recipe: Any,
    tmp_path: Path,
    exits: str,
    stages: str,
    moves: bool,
) -> None:
    """The first phase alone gives the backbone that disjoint keeps and mixed trains on."""
    alone = PRETRAIN.format(exits, stages).rpartition("[[trainer.phase]]")[0]
    run("train", "--trust", recipe("milestones = []\n" + alone), "--out", tmp_path / "one", "--epochs", 1)
    both = recipe("milestones = []\n" + PRETRAIN.format(exits, stages))
    run("train", "--trust", both, "--out", tmp_path / "two", "--epochs", 2)
    one, two = (load_file(tmp_path / name / "backbone.safetensors") for name in ("one", "two"))
    assert any(not torch.equal(one[name], two[name]) for name in one) == moves
    assert not all(torch.equal(one[name], value) for name, value in load_model("tests.toy:net").state_dict().items())


def test_a_new_layer_learns_on_frozen_features_before_the_exits(run: Any, recipe: Any, tmp_path: Path) -> None:  # noqa: F811
    """As for OCT2017: of the log, the first phase has the loss of the new layer alone, the second those of the exits."""
    phases = '[[trainer.phase]]\nexits = "backbone"\n[[trainer.phase]]\nexits = "internal"\n'
    text = recipe(phases, "classes = [[0, 1], [2]]")
    run("train", "--trust", text, "--out", tmp_path / "out", "--set", "exits.num_classes=2")
    with (tmp_path / "out" / "metrics.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (bool(first["loss/exit0"]), bool(first["loss/exit1"])) == (False, True)
    assert (bool(second["loss/exit0"]), bool(second["loss/exit1"])) == (True, False)
    assert not (tmp_path / "out" / "backbone.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[trainer.phase]]\nstages = 'all'\n", "phase 1 trains nothing: it has no exits; give 'all', 'internal'"),
        ("[[trainer.phase]]\nexits = []\n", "phase 1 has no exits; give those whose losses count"),
        (
            "[[trainer.phase]]\nexits = 'backbone'\n",
            "counts exit 1, the backbone's own, but freezes the whole backbone",
        ),
        ("[[trainer.phase]]\nexits = 'internals'\n", "Did you mean 'internal'?"),
        ("[[trainer.phase]]\nexits = [7]\n", r"phase 1 has exits=\(7,\); give numbers from 0 to 1"),
        ("[[trainer.phase]]\nexits = 'all'\nlr = -0.1\n", "trainer.phase 1: lr=-0.1 must be a number greater than 0"),
        ("[[trainer.phase]]\nexits = 'internal'\nbackbone_lr = 0.1\n", "phase 1 sets backbone_lr=0.1, but freezes"),
        ("[[trainer.phase]]\nexits = 'all'\nstage = [0]\n", "Did you mean 'stages'?"),
        ("regime = 'mixed'\n[[trainer.phase]]\nexits = 'all'\n", "both say what learns; leave one of them out"),
        ("phase = 3\n", r"must be tables: \[\[trainer.phase\]\] above the keys of each"),
        ("share = 2\n", r"it goes into \[\[trainer.phase\]\]"),
    ],
)
def test_phases_that_cannot_be_are_refused(refused: Any, recipe: Any, tmp_path: Path, text: str, message: str) -> None:  # noqa: F811
    assert re.search(message, refused("train", "--trust", recipe(text), "--out", tmp_path / "out"))


def test_augmented_training_runs(run: Any, recipe: Any, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("torchvision")
    top = 'augment = ["shift", "flip", "erasing", "rotation", "crop", "mixup", "cutmix"]\nvalidation = 0.2'
    run("train", "--trust", recipe("patience = 1\n", top), "--out", tmp_path / "out")
    assert (tmp_path / "out" / "results.json").exists()


def test_mixing_gives_soft_labels() -> None:
    pytest.importorskip("torchvision")
    samples = [(torch.randn(1, 8, 8), number % 3) for number in range(6)]
    _, collate = augmented(samples, None, ["mixup"], 3, (0.0,))
    assert collate is not None
    pixels, labels = collate(samples)
    assert pixels.shape == (6, 1, 8, 8)
    assert labels.shape == (6, 3)
    assert torch.allclose(labels.sum(1), torch.ones(6))


def test_what_comes_in_at_the_border_is_black(tmp_path: Path) -> None:
    """As in training before normalisation, whose 0 is grey."""
    pytest.importorskip("torchvision")
    from exitkit.cli.data.loading import load_data

    pixels = np.full((8, 8, 8, 3), 255, np.uint8)
    np.savez(tmp_path / "white.npz", images=pixels, labels=np.arange(8) % 2)
    split = load_data(str(tmp_path / "white.npz"), torch.nn.Conv2d(3, 4, 3))
    white, black = split.train[0][0][:, 0, 0], torch.tensor(split.black)
    assert torch.allclose(black * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN), torch.zeros(3), atol=1e-6)
    torch.manual_seed(0)
    for names in (["shift"], ["rotation"]):
        samples, _ = augmented(split.train, None, names, 2, split.black)
        seen = torch.cat([samples[number % len(samples)][0].flatten(1).T for number in range(20)]).unique(dim=0)
        assert {tuple(value) for value in seen.tolist()} == {tuple(white.tolist()), tuple(black.tolist())}


def test_training_crops_come_from_the_whole_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders too, which cropping the middle first would cut off; test and validation images are their middles as ever."""
    pytest.importorskip("torchvision")
    from PIL import Image

    from exitkit.cli.data.loading import load_data
    from exitkit.cli.recipes.training import loaders

    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :8] = 255  # white at the left, outside of the square in the middle
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(pixels).save(tmp_path / "data" / part / label / f"{number}.png")
    recipe = Recipe(
        model="m",
        data=str(tmp_path / "data"),
        exits={"method": "sdn"},
        trainer={},
        augment=["shift", "crop"],
        validation=0.5,
        batch_size=4,
    )
    preprocessing = exitkit.ImagePreprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3)
    monkeypatch.setattr("exitkit.cli.data.loading._image_preprocessing", lambda model: preprocessing)
    split = load_data(recipe.data, nn.Linear(1, 1))
    torch.manual_seed(0)
    train, val, test = loaders(recipe, split, 2, 0)
    assert val is not None
    seen = torch.cat([batch for _ in range(10) for batch, _ in train])
    assert seen.shape[1:] == (3, 16, 16)
    assert (seen.amax((1, 2, 3)) > 0.9).any()
    for others in (val, test):
        assert all(batch.shape[1:] == (3, 16, 16) and batch.max() < 0.1 for batch, _ in others)


def test_the_trainer_gets_what_the_recipe_says(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table of it."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "exitkit.cli.recipes.training.Trainer",
        lambda model, **options: given.update(options) or SimpleNamespace(resume="never"),
    )
    more = (
        '[optimizer]\nname = "sgd"\nmomentum = 0.9\n[schedule]\nname = "linear"\n[loss]\nlabel_smoothing = 0.1\n'
        "[loss.distillation]\nconfidence_limit = 0\n[loss.distillation.teachers]\n0 = [1]\n"
    )
    read = read_recipe(recipe(more), {})
    with pytest.raises(AttributeError, match="fit"):  # there is no trainer
        train_recipe(read, *prepared(read), torch.zeros(2, 1, 8, 8), tmp_path / "out", print)
    assert given["loss"] == Loss(label_smoothing=0.1, distillation=Distillation({0: [1]}, confidence_limit=None))
    optimizer = given["optimizer"]([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.2}])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    schedule = given["schedule"](optimizer, 2)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.1]
    assert (given["epochs"], given["lr"]) == (2, 0.01)


def test_a_schedule_of_the_recipe_sets_the_rate(run: Any, recipe: Any, tmp_path: Path) -> None:  # noqa: F811
    run(
        "train",
        "--trust",
        recipe('[schedule]\nname = "restarts"\nwarmup = 0.1\ncycles = 2\n'),
        "--out",
        tmp_path / "out",
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["about"]["schedule"] == {"name": "restarts", "warmup": 0.1, "cycles": 2}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "cosine"}, [0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]),
        ({"name": "restarts", "cycles": 3}, 3 * [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]),
        ({"name": "linear"}, [1 - step / 12 for step in range(12)]),
        ({"name": "constant", "warmup": 0.25}, [*(0.001 + 0.333 * step for step in range(3)), *9 * [1]]),
        ({"name": "linear", "warmup": 0.5}, [*(0.001 + 0.1665 * s for s in range(6)), *(1 - s / 6 for s in range(6))]),
        (
            {"name": "restarts", "warmup": 1 / 3, "cycles": 2},
            [*(0.001 + 0.24975 * s for s in range(4)), *2 * [0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(4)]],
        ),
    ],
)
def test_rates_of_a_schedule(options: dict[str, Any], expected: list[float]) -> None:
    """Over 12 steps, as shares of the rate given."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = by_name(optimizer, 12, **options)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"] / 0.2)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-9)


def test_pairs_of_texts_are_encoded_by_the_tokenizer(tmp_path: Path, bert: Path) -> None:  # noqa: F811
    from exitkit.cli.data.loading import load_data
    from exitkit.cli.data.text_files import load_tokenizer

    path = tmp_path / "pairs.tsv"
    path.write_text("one\ttwo\tscore\ngood film\tbad\t4.5\nfilm\tgood good film\t1\n")
    split = load_data(str(path), nn.Linear(1, 1), str(path), str(bert), numbers=True, pairs=True, max_length=6)
    assert split.collate is not None
    batch = split.collate(list(split.train))
    assert batch["labels"].tolist() == [4.5, 1.0]
    tokenizer = load_tokenizer(str(bert))
    expected = tokenizer("good film", "bad", padding="max_length", max_length=6)
    assert batch["input_ids"][0].tolist() == expected["input_ids"]
    assert batch["token_type_ids"][0].tolist() == expected["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert batch["input_ids"].shape == (2, 6)
    path.write_text("text\tscore\ngood\t1\n")
    with pytest.raises(ExitkitError, match="2 columns"):
        load_data(str(path), nn.Linear(1, 1), None, str(bert), numbers=True, pairs=True)


def test_a_regression_on_pairs(run: Any, bert: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [f"{'good ' * (i % 4)}\t{'bad ' * (3 - i % 4)}film\t{i % 4}.5" for i in range(24)]
    (tmp_path / "scores.tsv").write_text("one\ttwo\tscore\n" + "\n".join(rows) + "\n")
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model = "hf:{bert}"\ndata = "{tmp_path / "scores.tsv"}"\nnum_classes = 1\npairs = true\n'
        '[exits]\nmethod = "pbee"\n[trainer]\nepochs = 1\n'
    )
    printed = run("train", "--trust", path, "--out", tmp_path / "out")
    assert all(word in printed for word in ("MSE", "Pearson", "Spearman"))
    run("export", tmp_path / "out", "--threshold", -10)  # everybody leaves at the first exit that may
    loaded = exitkit.load(tmp_path / "out" / "model.pt2", trust=True)
    pair = loaded.description.preprocessing([("good good", "bad film")])
    assert pair["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]  # it used to be attached to single texts
    assert loaded(**pair).logits.shape == (1, 1)

    from exitkit.cli.data.text_files import load_tokenizer

    tokenizer, package = load_tokenizer(str(bert)), tmp_path / "out" / "model.pt2"
    found = [
        json.loads(line) for line in run("run", package, "--trust", "--pairs", tmp_path / "scores.tsv").splitlines()
    ]
    texts = [tuple(row.split("\t")[:2]) for row in rows]
    assert [tuple(record["input"]) for record in found] == texts
    expected = [float(loaded(**tokenizer(*pair, return_tensors="pt")).logits) for pair in texts]
    assert [record["value"] for record in found] == pytest.approx(expected, abs=1e-4)


def test_a_regression_on_text(run: Any, bert: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [f"{'good ' * (i % 4)}{'bad ' * (3 - i % 4)}film\t{i % 4}.5" for i in range(24)]
    (tmp_path / "scores.tsv").write_text("text\tscore\n" + "\n".join(rows) + "\n")
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model = "hf:{bert}"\ndata = "{tmp_path / "scores.tsv"}"\nnum_classes = 1\n'
        '[exits]\nmethod = "pbee"\n[trainer]\nepochs = 1\n'
    )
    printed = run("train", "--trust", path, "--out", tmp_path / "out")
    assert "Pearson" in printed
    assert (tmp_path / "out" / "outputs-pbee.safetensors").exists()


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "top", "words"),
    [
        ("", 'wieghts = "x"', ["wieghts", "'weights'"]),
        ("epoch = 3\n", "", ["trainer.epoch", "'trainer.epochs'"]),
        ("[loss]\nsmoothing = 0.1\n", "", ["loss.smoothing", "'loss.label_smoothing'"]),
        ("[loss.distillation]\nteacher = 'last'\n", "", ["'loss.distillation.teachers'"]),
        ("[loss.distillation]\nteachers = 'lasst'\n", "", ["loss.distillation", "'last'"]),
        ("[loss.distillation.teachers]\n0 = [1]\nfirst = [1]\n", "", ["loss.distillation.teachers", "'first'"]),
        ("[loss]\ndistillation = 'last'\n", "", ["must be a table"]),
        ("[optimizer]\nname = 'adamm'\n", "", ["'adam'"]),
        ("[optimizer]\nmomentum = 0.9\n", "", ["optimizer.momentum"]),
        ("[optimizer]\nname = 'sgd'\nnesterov = true\n", "", ["optimizer", "Nesterov"]),
        ("regime = 'disjont'\n", "", ["'disjoint'"]),
        ("", "validation = 1.5", ["validation", "between 0 and 1"]),
        ("", "validation = 0.001", ["validation", "0 to validate"]),
        ("", "batch_size = 'many'", ["batch_size", "a whole number"]),
        ("", "limit = 0", ["limit", "at least 1"]),
        ("", "augment = ['flop']", ["augment", "'flip'"]),
        ("", "pairs = 1", ["pairs", "true or false"]),
        ("", "max_length = 0", ["max_length", "at least 1"]),
        ("[schedule]\nname = 'cosin'\n", "", ["schedule.name", "'cosine'"]),
        ("[schedule]\nwarm = 0.1\n", "", ["schedule.warm", "'schedule.warmup'"]),
        ("[schedule]\nwarmup = 1.0\n", "", ["schedule.warmup", "below 1"]),
        ("[schedule]\ncycles = 2\n", "", ["schedule.cycles", "'restarts'"]),
        ("milestones = [1]\n[schedule]\nname = 'linear'\n", "", ["milestones", "schedule"]),
        ("[trainer]\n", "", ["TOML"]),
    ],
)
def test_a_wrong_recipe_is_refused(
    text: str,
    top: str,
    words: list[str],
    recipe: Any,
    refused: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = recipe(text, top)
    if top.startswith("batch_size"):
        path.write_text(path.read_text().replace("batch_size = 16\n", "", 1))
    error = refused("train", "--trust", path, "--out", tmp_path / "out")
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--set", "epochs"), "KEY=VALUE"),
        (("--set", "trainer.epoch=3"), "trainer.epochs"),
        (("--set", "exits.head=2X"), "head='2X'"),
        (("--set", "exits.head=3"), "head=3"),
        (("--set", "exits.method=ztv"), "'ztw'"),
        (("--set", "model.name=x"), "not a table"),
        (("--epochs", 0), "epochs"),
        (("--seed", -1), "seed"),
        (("--data", "nowhere.npz"), "nowhere.npz"),
    ],
)
def test_a_wrong_flag_is_refused(
    flags: tuple[Any, ...],
    word: str,
    recipe: Any,
    refused: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert word in refused("train", "--trust", recipe(), "--out", tmp_path / "out", *flags)


def test_a_folder_that_cannot_be_made_is_refused_before_training(
    recipe: Any,
    refused: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_: pytest.fail("it trains"))
    path = recipe()
    assert "is a file; name a folder" in refused("train", "--trust", path, "--out", path / "out")
    for name in ("x" * 300, "new/" + "x" * 300):
        assert "cannot be written to" in refused("train", "--trust", path, "--out", path.parent / name)
    assert not (path.parent / "new").exists()


def test_a_head_that_is_code_runs_on_trust_alone(recipe: Any, refused: Any, tmp_path: Path) -> None:  # noqa: F811
    flags = ("--out", tmp_path / "out", "--model", "tests.toy:net", "--set", "exits.head=no_such_module_here:head")
    assert "the recipe's head is the function 'no_such_module_here:head'" in refused("train", recipe(), *flags)
    told = refused("train", "--trust", recipe(), *flags)
    assert (
        "No module named 'no_such_module_here'; name a module that is installed, or that lies in this folder" in told
    )


def test_a_missing_file_and_missing_keys_are_refused(refused: Any, tmp_path: Path) -> None:  # noqa: F811
    assert "nothing.toml" in refused("train", "--trust", tmp_path / "nothing.toml", "--out", tmp_path / "out")
    (tmp_path / "empty.toml").write_text("")
    assert "model and data missing" in refused("train", "--trust", tmp_path / "empty.toml", "--out", tmp_path / "out")


def test_values_of_set_are_toml_or_strings() -> None:
    assert parse_override("trainer.lr=1e-4") == ("trainer.lr", 1e-4)
    assert parse_override("exits.at=['a', 'b']") == ("exits.at", ["a", "b"])
    assert parse_override("model=timm:x") == ("model", "timm:x")
    with pytest.raises(ExitkitError, match="KEY=VALUE"):
        parse_override("=3")


def test_augmenting_texts_is_refused() -> None:
    with pytest.raises(ExitkitError, match="for images"):
        augmented([("a text", "1")], None, ["flip"], 2, ())


def test_text_scores_must_be_numbers(tmp_path: Path, bert: Path) -> None:  # noqa: F811
    from exitkit.cli.data.loading import load_data

    (tmp_path / "scores.tsv").write_text("text\tscore\ngood\thigh\nbad\tlow\n")
    with pytest.raises(ExitkitError, match="numbers"):
        load_data(str(tmp_path / "scores.tsv"), nn.Linear(1, 1), None, str(bert), numbers=True)


def test_files_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    from exitkit.cli.exporting import read_labels
    from exitkit.cli.recipes.recipe import read_recipe

    (tmp_path / "marked.toml").write_bytes(b'\xef\xbb\xbfmodel = "timm:a"\ndata = "b"\n')  # as Notepad saves UTF-8
    assert read_recipe(tmp_path / "marked.toml", {}).model == "timm:a"
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\ndog\n")
    assert read_labels(str(tmp_path / "names.txt")) == ["cat", "dog"]
