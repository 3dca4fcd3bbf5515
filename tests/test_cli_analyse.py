"""``exitkit analyse`` on runs of two regimes, and the section of the report that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("typer", reason="the command line needs: pip install 'exitkit[cli]'")

from exitkit import analysis
from exitkit.analysis import Connectivity, GradientDominance, Rank
from exitkit.analysis.overview import KINDS, Overview
from tests.test_cli import images, invoke, refused, run  # noqa: F401 - fixtures

RECIPE = """
model = "tests.toy:net"
data = "{data}"
batch_size = 16
[exits]
method = "sdn"
[trainer]
regime = "{regime}"
epochs = 1
"""


@pytest.fixture
def runs(
    run: Callable[..., str],  # noqa: F811
    images: Path,  # noqa: F811
    tmp_path: Path,
) -> list[Path]:
    folders = []
    for regime in ("disjoint", "mixed"):
        recipe = tmp_path / f"{regime}.toml"
        recipe.write_text(RECIPE.format(data=images, regime=regime))
        folders.append(tmp_path / regime)
        run("train", recipe, "--out", folders[-1], "--trust")
    return folders


def test_runs_are_measured_side_by_side_and_reported(
    run: Callable[..., str],  # noqa: F811
    runs: list[Path],
) -> None:
    printed = run("analyse", *runs, "--samples", 40, "--points", 3, "--trust")
    folder = runs[0] / "analysis"
    index = json.loads((folder / "analysis.json").read_text())
    assert list(index) == list(KINDS)
    assert list(index["rank"]) == ["disjoint", "mixed"]
    assert list(index["connectivity"]) == ["disjoint to mixed"]
    for kind, models in index.items():
        assert (folder / f"{kind}.png").stat().st_size > 5_000
        for file in models.values():
            for suffix in (".safetensors", ".png", ".csv"):
                assert (folder / file).with_suffix(suffix).exists()
    assert "To look at them: exitkit report" in " ".join(printed.split())
    rank = Rank.load(folder / index["rank"]["mixed"])
    assert set(rank.samples.tolist()) == {40}
    assert f"{rank.rank[0]:.4g}" in printed
    assert Connectivity.load(folder / index["connectivity"]["disjoint to mixed"]).aligned
    assert Overview.read(runs[1] / "analysis") is None
    run("report", runs[0])
    page = (runs[0] / "report.html").read_text()
    for kind in KINDS.values():
        assert kind.title in page
        assert kind.says.split("'")[0] in page
    assert page.count("analysis-rank-1-") > 1
    run("report", runs[1])
    assert "What training did" not in (runs[1] / "report.html").read_text()


def test_of_one_run_connectivity_is_said_to_be_left_out(
    run: Callable[..., str],  # noqa: F811
    runs: list[Path],
    tmp_path: Path,
) -> None:
    printed = run(
        "analyse", runs[0], "--what", "rank,connectivity", "--samples", 40, "--trust", "--out", tmp_path / "one"
    )
    assert "connectivity is left out: it is between two runs" in printed
    assert "exitkit report" not in printed  # which shows what lies in the run's folder
    found = Overview.read(tmp_path / "one")
    assert found is not None
    assert list(found.rows) == ["rank"]


def test_what_was_measured_before_a_refusal_is_kept(
    run: Callable[..., str],  # noqa: F811
    refused: Callable[..., str],  # noqa: F811
    runs: list[Path],
    images: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Two runs whose exits stand elsewhere have no path between them; everything else of them is measured, and said."""
    recipe = tmp_path / "elsewhere.toml"
    recipe.write_text(RECIPE.format(data=images, regime="mixed").replace('"sdn"', '"sdn"\nat = [0]'))
    run("train", recipe, "--out", tmp_path / "elsewhere", "--trust")
    arguments = (runs[0], tmp_path / "elsewhere", "--what", "connectivity,rank", "--samples", 40, "--trust")
    told = refused("analyse", *arguments)
    assert "1 of 2 measurements were refused: connectivity" in told
    found = Overview.read(runs[0] / "analysis")
    assert found is not None
    assert list(found.rows) == ["rank"]


def test_a_demo_is_told_what_it_lacks(
    run: Callable[..., str],  # noqa: F811
    refused: Callable[..., str],  # noqa: F811
    runs: list[Path],
    images: Path,  # noqa: F811
) -> None:
    """As exitkit demo leaves it: several methods, and data that are in no file."""
    results = runs[0] / "results.json"
    written = results.read_text()
    assert json.dumps(str(images)) in written
    results.write_text(written.replace(json.dumps(str(images)), '"digits, made up"'))
    told = refused("analyse", runs[0], "--what", "rank", "--trust")
    assert "was trained on 'digits, made up', which cannot be read again; give its samples by --data" in told
    outputs = runs[0] / "outputs-sdn.safetensors"
    (runs[0] / "outputs-other.safetensors").write_bytes(outputs.read_bytes())
    assert "choose one by --method" in refused("analyse", runs[0], "--what", "rank", "--trust")


def test_dominance_is_of_the_runs_own_loss_and_trained_weights(
    run: Callable[..., str],  # noqa: F811
    images: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With weights that are nearly all the first exit's, it has nearly all of the step."""
    seen = []
    measure = analysis.gradient_dominance
    monkeypatch.setattr(analysis, "gradient_dominance", lambda ee, *a, **k: seen.append(ee) or measure(ee, *a, **k))
    recipe = tmp_path / "weighted.toml"
    loss = "[loss]\nweights = [1.0, 1e-6, 1e-6]\n"
    recipe.write_text(RECIPE.format(data=images, regime="mixed").replace('"sdn"', '"sdn"\nat = [0, 1]') + loss)
    run("train", recipe, "--out", tmp_path / "weighted", "--trust")
    run("analyse", tmp_path / "weighted", "--what", "dominance", "--samples", 64, "--trust")
    for name, value in load_file(tmp_path / "weighted" / "backbone.safetensors").items():
        assert torch.equal(seen[0].backbone.state_dict()[name], value)
    found = Overview.read(tmp_path / "weighted" / "analysis")
    assert found is not None
    dominance = found.rows["dominance"]["weighted"]
    assert isinstance(dominance, GradientDominance)
    assert dominance.share[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--what", "ranks"], "Did you mean 'rank'"),
        (["--what", "connectivity"], "two runs"),
        (["--samples", "0"], "--samples"),
    ],
)
def test_wrong_arguments_are_refused(
    refused: Callable[..., str],  # noqa: F811
    tmp_path: Path,
    arguments: list[str],
    named: str,
) -> None:
    assert named in refused("analyse", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())
