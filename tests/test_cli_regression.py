"""A regression on the command line: trained, looked at, compared, measured, exported and run, as its commands say."""

# ruff: noqa: F811  (fixtures of tests.test_cli)

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="the command line needs: pip install 'exitkit[cli]'")

import exitkit
from exitkit.analysis import Landscape
from exitkit.analysis.overview import KINDS
from exitkit.evaluation import RegressionOutputs
from tests.test_cli import images, invoke, refused, run  # noqa: F401
from tests.toy import TinyNet

RECIPE = """
model = "tests.test_cli_regression:predictor"
data = "{data}"
test = "{data}"
batch_size = 16
num_classes = 1
[exits]
method = "sdn"
every = 1
head = "1L"
[trainer]
epochs = 1
seed = {seed}
"""


def predictor(num_classes: int = 1) -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(num_classes)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """40 grey 8×8 images, each with how bright it is."""
    pixels = np.random.default_rng(0).integers(0, 200, (40, 1, 1)) + np.zeros((1, 8, 8), int)
    np.savez(tmp_path / "numbers.npz", images=pixels.astype(np.uint8), labels=pixels.mean((1, 2)) / 100)
    return tmp_path / "numbers.npz"


@pytest.fixture
def runs(run: Any, numbers: Path, tmp_path: Path) -> tuple[list[Path], str]:
    """Folders of two seeds, and what the first command printed."""
    printed = []
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        recipe = tmp_path / f"{seed}.toml"
        recipe.write_text(RECIPE.format(data=numbers, seed=seed))
        printed.append(run("train", recipe, "--trust", "--out", folder))
    return folders, printed[0]


def test_a_run_goes_on_as_it_says(run: Any, runs: Any, numbers: Path, tmp_path: Path) -> None:
    """Every command that train names works; the package says the numbers that the exits predict."""
    from PIL import Image

    (folder, _), printed = runs
    commands = re.findall(r"exitkit (.*?) +#", printed.replace("\n  exitkit", " exitkit"))
    assert [command.split()[0] for command in commands] == ["report", "export"]
    run(*commands[0].split())
    with (folder / "report-curve.csv").open() as file:
        taus = [float(row["threshold"]) for row in csv.DictReader(file)]
    run(*commands[1].replace("TAU", str(taus[len(taus) // 2])).split(), "--trust")

    pixels = np.load(numbers)["images"][:6]
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    shown = run("run", folder / "model.pt2", "--trust", *(tmp_path / f"{number}.png" for number in range(6)))
    records = [json.loads(line) for line in shown.splitlines()]
    ee = exitkit.MultiExitModel.from_pretrained(predictor().eval(), folder / "exits" / "sdn", torch.zeros(2, 1, 8, 8))
    with torch.no_grad():
        logits = torch.cat(ee.eval()((torch.tensor(pixels).float()[:, None] / 255 - 0.5) / 0.5).logits, 1)
    wanted = [float(logits[row, record["exit"]]) for row, record in enumerate(records)]
    assert [record["value"] for record in records] == pytest.approx(wanted, abs=1e-5)
    assert all("label" not in record for record in records)
    assert json.loads(run("bench-latency", folder / "model.pt2", "--trust", "--batches", 1, "--json"))


def test_single_runs_are_compared_in_squared_errors(run: Any, runs: Any) -> None:
    """Under a budget that no sample has to leave for, the errors are those of the two backbones' own outputs."""
    folders, _ = runs
    outputs = [RegressionOutputs.load(folder / "outputs-sdn.safetensors") for folder in folders]
    (pair,) = json.loads(run("compare", *folders, "--budget", 9, "--json"))
    wanted = [
        float((one.predictions[:, -1] - one.labels).square().mean()) for one in outputs if one.labels is not None
    ]
    assert (pair["first"], pair["second"]) == ("one/sdn", "two/sdn")
    assert pair["errors"] == pytest.approx(wanted, rel=1e-5)
    printed = run("compare", folders[0], folders[1] / "outputs-sdn.safetensors", "--budget", 9)
    assert "mean squared error (less is better) at 900%" in printed
    assert "one/sdn – two/sdn" in printed


def test_all_measurements_are_made_and_reported(run: Any, runs: Any, numbers: Path) -> None:
    folders, _ = runs
    run("analyse", *folders, "--samples", 40, "--points", 3, "--trust")
    index = json.loads((folders[0] / "analysis" / "analysis.json").read_text())
    assert list(index) == list(KINDS)
    found = Landscape.load(folders[0] / "analysis" / index["landscape"]["one"])
    arrays = np.load(numbers)
    x = (torch.tensor(arrays["images"]).float()[:, None] / 255 - 0.5) / 0.5
    with torch.no_grad():
        errors = (predictor().eval()(x)[:, 0] - torch.tensor(arrays["labels"]).float()).square()
    assert found.centre[-1] == pytest.approx(float(errors.mean()), rel=1e-4)
    run("report", folders[0])
    page = (folders[0] / "report.html").read_text("utf-8")
    assert "What training did" in page
    assert all(kind.title in page for kind in KINDS.values())


def test_what_a_regression_has_not(run: Any, refused: Any, runs: Any, images: Path, tmp_path: Path) -> None:
    from PIL import Image

    folders, _ = runs
    assert "--threshold is missing: of a regression no τ holds a promise" in refused("export", folders[0], "--trust")
    assert "holds predictions of a regression" in refused("calibrate", folders[0])
    assert "--top 2 counts classes, and a regression has none" in refused("compare", *folders, "--top", 2)
    classifier = ("bench", "--model", "tests.toy:net", "--data", images, "--test", images, "--epochs", 1)
    run(*classifier, "--methods", "sdn", "--out", tmp_path / "classes")
    told = refused("compare", folders[0], tmp_path / "classes")
    assert "a regression and a classifier\nGive those of one kind" in told
    run("export", folders[0], "--threshold", -0.1, "--trust")
    picture = tmp_path / "0.png"
    Image.new("L", (8, 8)).save(picture)
    told = refused("run", folders[0] / "model.pt2", "--trust", "--top", 2, picture)
    assert "--top 2 counts classes, and a regression has none" in told
    np.savez(tmp_path / "words.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.array(["a"] * 9))
    recipe = ("train", tmp_path / "0.toml", "--trust", "--out", tmp_path / "out", "--data", tmp_path / "words.npz")
    assert "a regression needs finite numbers" in refused(*recipe, "--test", tmp_path / "words.npz")


def test_bench_refuses_a_regression_before_it_trains(invoke: Any, numbers: Path, images: Path, tmp_path: Path) -> None:
    flags = ("--model", "tests.test_cli_regression:predictor", "--out", tmp_path / "out")
    code, printed, told = invoke("bench", *flags, "--data", images)
    assert (code, "epoch" in printed) == (2, False)
    assert "bench compares methods by accuracy; train exits of one method by a recipe" in told
    told = invoke("bench", *flags, "--data", numbers)[2]
    assert "expected class indices from 0, or for numbers to predict a recipe with num_classes = 1" in told
