"""``exitkit analyse`` on runs of two regimes, and the section of the report that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command line needs: pip install 'exitkit[cli]'")

from exitkit.analysis import Connectivity, Rank
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
