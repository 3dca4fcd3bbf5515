"""Repeated runs: means over seeds, differences seed by seed, and settings that are not averaged together."""

# ruff: noqa: F811  (fixtures of tests.test_cli)

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit import ExitOutputs
from exitkit.evaluation import RegressionOutputs, Runs, Spread, compare_runs
from exitkit.report import read_repeated, write_report
from tests.test_cli import bert, images, invoke, refused, run  # noqa: F401 - fixtures

LABELS = torch.arange(40) % 4


def outputs_of(seed: int, skill: float = 2.0, **options: Any) -> ExitOutputs:
    logits = torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(40), :, LABELS] += torch.tensor([0.5, 1.0, 2.0]) * skill
    return replace(ExitOutputs(logits, LABELS, torch.tensor([1.0, 2.0, 3.0]), 3.0), **options)


def test_a_spread_by_hand() -> None:
    spread = Spread((0.90, 0.92, 0.97))
    assert spread.mean == pytest.approx(0.93)
    assert spread.std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert spread.half_width == pytest.approx(1.96 * spread.std / math.sqrt(3))
    assert str(spread) == "93.00% ± 3.61"
    assert (Spread((0.5,)).std, str(Spread((0.5,)))) == (0.0, "50.00%")


def test_runs_have_the_accuracies_of_each() -> None:
    each = [outputs_of(seed) for seed in range(3)]
    runs = Runs(tuple(each))
    assert [spread.values for spread in runs.accuracy()] == [
        tuple(float(one.accuracy()[m]) for one in each) for m in range(3)
    ]
    at = runs.at_budget(0.5)
    assert at is not None
    assert at.values == tuple(one.curve().at_budget(0.5).accuracy for one in each)
    assert runs.at_budget(0.3) is None  # the first exit costs a third
    assert list(runs.budget_table()) == ["25%", "50%", "75%", "100%", "no limit"]
    assert list(runs.budget_table((0.125, 0.12))) == ["12.5%", "12%", "no limit"]


def test_settings_are_compared_seed_by_seed() -> None:
    """What both owe to the seed cancels: the interval of the difference is narrower than that of either."""
    better, worse = (Runs(tuple(outputs_of(seed, skill) for seed in range(4))) for skill in (2.0, 1.5))
    difference = better.minus(worse, 0.6)
    assert difference.values == tuple(
        outputs_of(seed, 2.0).curve().at_budget(0.6).accuracy - outputs_of(seed, 1.5).curve().at_budget(0.6).accuracy
        for seed in range(4)
    )
    compared = compare_runs({"better": better, "worse": worse}, 0.6)
    assert compared.differences["better", "worse"].values == difference.values
    assert "better – worse" in str(compared)
    assert "over 4 seeds" in str(compared)
    in_two = compare_runs({"better": better, "worse": worse}, 0.6, top=2)
    assert in_two.accuracies["better"].values == tuple(
        outputs_of(seed, 2.0).curve(top=2).at_budget(0.6).accuracy for seed in range(4)
    )
    assert str(in_two).startswith("top-2 accuracy at 60% ")
    assert str(compare_runs({"better": better, "worse": worse}, 0.625)).startswith("accuracy at 62.5% ")
    assert better.accuracy(top=4)[0].values == (1.0,) * 4  # of four classes
    with pytest.raises(exitkit.ArgumentError, match=r"top=5 .* there are 4 classes"):
        compare_runs({"better": better, "worse": worse}, 0.6, top=5)


def errors_of(seed: int, noise: float = 1.0) -> RegressionOutputs:
    drawn = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    numbers = LABELS.float()
    predictions = numbers[:, None] + noise * drawn * torch.tensor([1.0, 0.5, 0.2])
    return RegressionOutputs(predictions, numbers, torch.tensor([1.0, 2.0, 3.0]), 3.0)


def error_at(outputs: RegressionOutputs, budget: float) -> float:
    """By hand: those samples leave at the second exit, at two thirds of the cost, whose predictions changed least."""
    predictions, labels = outputs.predictions.double().numpy(), LABELS.numpy()
    order = np.abs(predictions[:, 1] - predictions[:, 0]).argsort()
    leaving = next(count for count in range(41) if (2 * count + 3 * (40 - count)) / (3 * 40) < budget)
    exits = np.full(40, 2)
    exits[order[:leaving]] = 1
    return float(((predictions[np.arange(40), exits] - labels) ** 2).mean())


def test_regressions_are_repeated_and_compared_in_squared_errors() -> None:
    better, worse = (Runs(tuple(errors_of(seed, noise) for seed in range(3))) for noise in (0.5, 1.0))
    by_hand = [error_at(errors_of(seed, 0.5), 0.8) for seed in range(3)]
    assert better.at_budget(0.8).values == pytest.approx(by_hand, rel=1e-5)  # type: ignore[union-attr]
    table = better.budget_table((0.8,))
    assert str(table["80%"]) == f"{np.mean(by_hand):.4f} ± {np.std(by_hand, ddof=1):.4f}"
    last = [float(((one.predictions[:, -1] - LABELS) ** 2).mean()) for one in better.outputs]  # type: ignore[attr-defined]
    assert table["no limit"].values == pytest.approx(last, rel=1e-5)  # type: ignore[union-attr]
    compared = compare_runs({"better": better, "worse": worse}, 0.8)
    assert compared.differences["better", "worse"].mean < 0
    printed = str(compared)
    assert printed.startswith("mean squared error (less is better) at 80% of the backbone's MACs over 3 seeds")
    assert "in points" not in printed
    assert f"{compared.differences['better', 'worse'].mean:+.4f} (" in printed
    with pytest.raises(exitkit.ArgumentError, match="top=2 counts classes, and a regression has none"):
        compare_runs({"better": better, "worse": worse}, 0.8, top=2)
    classifier = Runs(tuple(outputs_of(seed) for seed in range(3)))
    with pytest.raises(exitkit.ArgumentError, match="a regression and a classifier\nGive those of one kind"):
        better.minus(classifier, 0.8)
    with pytest.raises(exitkit.ArgumentError, match="no squared error"):
        classifier.mse()


OTHERS = {
    "costs": ({"macs": torch.tensor([1.0, 2.5, 3.0])}, "exits of other costs"),
    "score": ({"criterion": "entropy"}, "criterion confidence and entropy"),
    "labels": ({"labels": LABELS.flip(0)}, "other labels"),
    "exits": ({"log_probs": torch.zeros(40, 2, 4), "macs": torch.tensor([1.0, 2.0])}, "other exits or classes"),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_runs_of_different_settings_are_not_averaged(change: dict[str, Any], message: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        Runs((outputs_of(0), outputs_of(1, **change)))


def test_seeds_are_one_each_and_the_same_where_settings_are_compared() -> None:
    pair = (outputs_of(0), outputs_of(1))
    with pytest.raises(exitkit.ArgumentError, match=r"seeds=\(1, 1\) for 2 runs; give another seed for each"):
        Runs(pair, (1, 1))
    with pytest.raises(exitkit.ArgumentError, match="is empty"):
        Runs(())
    with pytest.raises(exitkit.ArgumentError, match=r"seeds \(0, 1\) and \(1, 2\) are not the same"):
        Runs(pair).minus(Runs(pair, (1, 2)), 0.5)


def test_what_is_no_runs_is_refused() -> None:
    one = outputs_of(0)
    with pytest.raises(exitkit.ArgumentError, match=r"outputs is of one run; give a tuple"):
        Runs(one)  # type: ignore[arg-type]
    with pytest.raises(exitkit.ArgumentError, match=r"other is ExitOutputs; give exitkit.evaluation.Runs"):
        Runs((one,)).minus(one, 0.5)  # type: ignore[arg-type]
    with pytest.raises(exitkit.ArgumentError, match="found is list; give runs by name"):
        compare_runs([Runs((one,))] * 2)  # type: ignore[arg-type]
    with pytest.raises(exitkit.ArgumentError, match=r"found\['b'\] is ExitOutputs; give exitkit.evaluation.Runs"):
        compare_runs({"a": Runs((one,)), "b": one})  # type: ignore[dict-item]


def test_runs_may_have_other_temperatures_but_not_some_and_others_none() -> None:
    first, second = (outputs_of(seed).calibrated([1.5 + seed] * 3) for seed in range(2))
    assert len(Runs((first, second)).outputs) == 2
    with pytest.raises(exitkit.ArgumentError, match=r"different settings \(temperatures=\(1.5, 1.5, 1.5\) and None\)"):
        Runs((first, outputs_of(1)))


RECIPE = """
model = "tests.toy:net"
data = {data}
validation = 0.2
[exits]
every = 2
head = "1L"
method = "sdn"
[trainer]
epochs = 1
lr = 0.01
"""


def test_a_recipe_with_three_seeds(run: Any, refused: Any, images: Path, tmp_path: Path) -> None:
    """Each in its folder; again, only what is missing; then compared, reported, and refused where settings differ."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(data=json.dumps(str(images))))
    command = ("train", recipe, "--trust", "--out", tmp_path / "sdn", "--seeds")
    printed = run(*command, 2, "--top", 2)
    _, _, together = printed.partition("over 2 seeds")
    assert "sdn, top 2" in together
    again = run(*command, 3)
    assert again.count("is finished already") == 2
    assert [folder.name for folder in sorted((tmp_path / "sdn").iterdir())] == ["seed-0", "seed-1", "seed-2"]
    runs = read_repeated(tmp_path / "sdn")["sdn"]
    assert runs.seeds == (0, 1, 2)
    alone = ExitOutputs.load(tmp_path / "sdn" / "seed-1" / "outputs-sdn.safetensors")
    assert runs.accuracy()[0].values[1] == alone.accuracy()[0]
    assert (tmp_path / "sdn" / "seed-1" / "validation-sdn.safetensors").exists()

    page = write_report([tmp_path / "sdn"]).read_text("utf-8")
    assert "Over seeds" in page
    assert str(runs.at_budget(1.0)) in page

    run("train", recipe, "--trust", "--out", tmp_path / "more", "--seeds", 3, "--epochs", 2)
    compared = run("compare", tmp_path / "sdn", tmp_path / "more", "--budget", 1.5)
    assert "sdn/sdn – more/sdn" in compared
    plain = json.loads(run("compare", tmp_path / "sdn", tmp_path / "more", "--budget", 1.5, "--json"))
    assert len(plain["accuracies"]["sdn/sdn"]) == 3
    both = json.loads(run("compare", tmp_path / "sdn", tmp_path / "more", "--budget", 1.5, "--top", 3, "--json"))
    assert {name: both[name] for name in plain} == plain
    assert both["top_3"]["accuracies"]["sdn/sdn"] == [1.0] * 3
    assert "is a single run and" in refused("compare", tmp_path / "sdn", tmp_path / "more" / "seed-0")

    (tmp_path / "sdn" / "seed-1").rename(tmp_path / "old")
    (tmp_path / "more" / "seed-1").rename(tmp_path / "sdn" / "seed-1")
    told = refused("report", tmp_path / "sdn")
    assert "are of different settings (trainer.epochs is 1 and 2), and are not averaged" in told


def test_a_regression_with_two_seeds(run: Any, bert: Path, tmp_path: Path) -> None:
    """Trained, compared with another and reported, all in squared errors."""
    rows = [f"{'good ' * (i % 4)}{'bad ' * (3 - i % 4)}film\t{i % 4}.5" for i in range(24)]
    (tmp_path / "scores.tsv").write_text("text\tscore\n" + "\n".join(rows) + "\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "hf:{bert}"\ndata = "{tmp_path / "scores.tsv"}"\nnum_classes = 1\n'
        '[exits]\nmethod = "pbee"\n[trainer]\nepochs = 1\n'
    )
    command = ("train", "--trust", recipe, "--seeds", 2, "--out")
    printed = run(*command, tmp_path / "a")
    assert "over 2 seeds" in printed
    assert "mean squared error" in printed
    run(*command, tmp_path / "b", "--epochs", 2)

    kept = [RegressionOutputs.load(tmp_path / "a" / f"seed-{n}" / "outputs-pbee.safetensors") for n in range(2)]
    errors = [float(((one.predictions[:, -1] - one.labels) ** 2).mean()) for one in kept]
    last = f"{np.mean(errors):.4f} ± {abs(errors[0] - errors[1]) / math.sqrt(2):.4f}"
    compared = run("compare", tmp_path / "a", tmp_path / "b", "--budget", 1.5)
    assert "a/pbee – b/pbee" in compared
    plain = json.loads(run("compare", tmp_path / "a", tmp_path / "b", "--budget", 1.5, "--json"))
    assert len(plain["mse"]["a/pbee"]) == 2
    run("report", tmp_path / "a")
    assert last in (tmp_path / "a" / "report.html").read_text("utf-8")
    run("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both.html")
    assert "b/pbee" in (tmp_path / "both.html").read_text("utf-8")


def test_one_seed_or_several(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(data="'x.npz'"))
    command = ("train", tmp_path / "recipe.toml", "--out", tmp_path / "out")
    assert "--seed 1 and --seeds 2: give the one seed, or how many" in refused(*command, "--seed", 1, "--seeds", 2)
    assert "--seeds 0 must be at least 1" in refused(*command, "--seeds", 0)
