"""Parts of a data set: as many samples of each class, groups of classes, samples without labels, validation samples."""

# ruff: noqa: F811  (fixtures of tests.test_cli)

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

import exitkit
from exitkit.cli.data.arrays import PackedImages
from exitkit.cli.data.split import Split
from exitkit.cli.data.subsets import balanced, held_out_of, labels_of, regrouped
from exitkit.cli.recipes.recipe import Recipe
from exitkit.cli.recipes.training import loaders
from exitkit.cli.sources import load_model
from tests.test_cli import images, invoke, run  # noqa: F401 - fixtures

SIZES = {0: 40, 1: 25, 2: 10}


@pytest.fixture
def samples() -> PackedImages:
    """Sample i is the number i; its class follows from where it lies."""
    labels = torch.tensor([label for label, count in SIZES.items() for _ in range(count)])
    return PackedImages(np.arange(len(labels), dtype=np.uint8), labels, torch.from_numpy)


def numbers(part: Any) -> list[int]:
    return [int(part[index][0]) for index in range(len(part))]


def test_a_balanced_subset_has_as_many_of_each_class_and_another_seed_other_ones(samples: PackedImages) -> None:
    parts = [balanced(samples, 8, None, seed)[0] for seed in (0, 0, 1)]
    assert Counter(labels_of(parts[0])) == {0: 8, 1: 8, 2: 8}
    assert numbers(parts[0]) == numbers(parts[1]) != numbers(parts[2])


def test_unlabelled_samples_are_others_and_have_no_label(samples: PackedImages) -> None:
    labelled, unlabelled = balanced(samples, 6, 4, 0)
    assert not set(numbers(labelled)) & set(numbers(unlabelled))
    assert set(labels_of(unlabelled)) == {-1}
    assert Counter(int(samples[number][1]) for number in numbers(unlabelled)) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize(
    ("per_class", "unlabelled", "message"),
    [
        (11, None, "per_class = 11 is more than class 2 has: 10 of the training samples"),
        (6, 5, "unlabelled = 5 is more than class 2 has: 4 of the training samples"),
    ],
)
def test_more_than_a_class_has_is_refused(
    samples: PackedImages, per_class: int, unlabelled: int | None, message: str
) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        balanced(samples, per_class, unlabelled, 0)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.34])
def test_validation_has_its_share_of_every_class(samples: PackedImages, share: float) -> None:
    train, held_out = held_out_of(samples, share, 3)
    assert sorted(numbers(train) + numbers(held_out)) == list(range(75))
    assert len(held_out) == int(share * 75)
    for label, size in SIZES.items():
        assert abs(Counter(labels_of(held_out))[label] - share * size) <= 1


def test_validation_has_so_many_of_every_class(samples: PackedImages) -> None:
    assert Counter(labels_of(held_out_of(samples, 5, 0)[1])) == {0: 5, 1: 5, 2: 5}
    with pytest.raises(exitkit.ArgumentError, match="validation = 12 is more than class 2 has: 10"):
        held_out_of(samples, 12, 0)


def test_numbers_to_predict_are_held_out_without_classes() -> None:
    rows = [(f"text {index}", index / 7) for index in range(50)]
    train, held_out = held_out_of(rows, 0.2, 0)
    assert (len(train), len(held_out)) == (40, 10)


def test_groups_of_classes_are_classes(samples: PackedImages) -> None:
    split = regrouped(Split(samples, Subset(samples, [0, 50, 70])), [[2], [0]])
    assert split.classes == 2
    assert labels_of(split.train) == [1] * 40 + [0] * 10
    assert [split.train[index] for index in (0, 45)] == [(torch.tensor(0), 1), (torch.tensor(70), 0)]
    assert labels_of(split.test) == [1, 0]  # the sample of class 1 is left out


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 1], [1, 2]], "has a class twice"),
        ([[0], [5]], r"classes has \[5\], but the training samples have the classes \[0, 1, 2\]"),
        ([[0, 1]], "must be two or more lists of classes"),
        ([0, 1], "must be two or more lists of classes"),
        ([["a"], [1]], "must be two or more lists of classes"),
    ],
)
def test_groups_that_are_none_are_refused(samples: PackedImages, groups: Any, message: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        regrouped(Split(samples, samples), groups)


DISTILLATION = {"distillation": {"teachers": "last"}}


def test_a_semi_supervised_recipe_has_labelled_validation_and_training_samples_of_both_kinds() -> None:
    pixels = np.zeros((75, 1, 8, 8), np.uint8)
    samples = PackedImages(pixels, torch.arange(75) % 3, lambda some: torch.from_numpy(some).float())
    recipe = Recipe(
        "tests.toy:net", "x.npz", per_class=10, unlabelled=5, validation=4, batch_size=7, loss=DISTILLATION
    )
    train, val, _ = loaders(recipe, Split(samples, samples), 3, 0)
    assert Counter(label for _, labels in train for label in labels.tolist()) == {0: 6, 1: 6, 2: 6, -1: 15}
    assert val is not None
    assert Counter(label for _, labels in val for label in labels.tolist()) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unlabelled": 5, "loss": DISTILLATION}, "goes beside per_class"),
        ({"unlabelled": 5, "per_class": 5}, "without a teacher teaches nothing"),
        (
            {"unlabelled": 5, "per_class": 5, "loss": DISTILLATION, "augment": ["mixup"]},
            "unlabelled samples have none",
        ),
        ({"per_class": 0}, "per_class = 0 must be at least 1"),
        ({"validation": 1.5}, "or a whole number of each class"),
    ],
)
def test_subsets_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        Recipe("tests.toy:net", "x.npz", **values)


def test_a_semi_supervised_run(run: Any, images: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        f'model = "tests.toy:net"\ndata = "{images}"\nper_class = 8\nunlabelled = 4\nvalidation = 2\n'
        "classes = [[0, 1], [2]]\n[exits]\nnum_classes = 2\nmethod = 'sdn'\nhead = '1L'\nevery = 2\n"
        "[trainer]\nregime = 'joint'\nepochs = 1\n[loss.distillation]\nteachers = 'last'\n"
    )
    run("train", tmp_path / "recipe.toml", "--trust", "--out", tmp_path / "out")
    outputs = exitkit.ExitOutputs.load(tmp_path / "out" / "outputs-sdn.safetensors")
    assert outputs.log_probs.shape[2] == 2


# torchvision's data sets and weights ----------------------------------------------------------------------------------


@pytest.fixture
def fake_sets(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torchvision's SVHN is called with, which would download."""
    datasets = pytest.importorskip("torchvision.datasets")
    calls: list[dict[str, Any]] = []

    class Fake(TensorDataset):
        def __init__(
            self,
            root: str,
            split: str = "train",
            transform: Any = None,
            target_transform: Any = None,
            download: bool = False,
        ) -> None:
            if split not in ("train", "test"):
                raise ValueError(f"no split {split}")
            calls.append({"split": split, "download": download})
            super().__init__(torch.zeros(10, 3, 8, 8), torch.arange(10) % 2)

    monkeypatch.setattr(datasets, "SVHN", Fake)
    return calls


@pytest.fixture
def net() -> Any:
    model = load_model("torchvision:resnet18")
    return model.eval()


def test_a_data_set_of_torchvision_takes_arguments(fake_sets: list[dict[str, Any]], net: Any) -> None:
    from exitkit.cli.data.loading import load_data

    split = load_data("SVHN:split=train", net, "SVHN:split=test")
    assert (len(split.train), len(split.test)) == (10, 10)  # type: ignore[arg-type]
    assert fake_sets == [{"split": "train", "download": True}, {"split": "test", "download": True}]
    split = load_data("SVHN:split=train", net)
    assert (len(split.train), len(split.test)) == (8, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("SVHN", "takes split; say which samples are meant, such as SVHN:split=train"),
        ("SVHN:spilt=train", "Did you mean 'split'?"),
        ("SVHN:train", "is unknown"),
        ("SVHN:split=extra", "ValueError: no split extra"),
        ("CIFAR11", "Did you mean 'CIFAR10'"),
    ],
)
def test_data_sets_of_torchvision_that_cannot_be(
    fake_sets: list[dict[str, Any]], net: Any, data: str, message: str
) -> None:
    from exitkit.cli.data.loading import load_data

    with pytest.raises(exitkit.ArgumentError) as refusal:
        load_data(data, net)
    assert message in str(refusal.value)


def test_weights_of_torchvision_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    asked: list[Any] = []

    def get_model(name: str, weights: Any) -> torch.nn.Module:
        asked.append(weights)
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(models, "get_model", get_model)
    for weights in ("IMAGENET1K_V1", "pretrained", None):
        load_model("torchvision:resnet50", weights)
    assert asked == ["IMAGENET1K_V1", "DEFAULT", None]
    with pytest.raises(exitkit.ArgumentError, match="Did you mean 'IMAGENET1K_V2'"):
        load_model("torchvision:resnet50", "IMAGENET1K_V3")


def test_random_weights_follow_from_the_seed() -> None:
    weights = [next(load_model("tests.toy:net", seed=seed).parameters()).detach().numpy() for seed in (0, 0, 1)]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])
