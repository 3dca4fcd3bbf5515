"""``exitkit rl`` as a user types it, and the example."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gymnasium", reason="policies need: pip install 'exitkit[rl]'")
sb3 = pytest.importorskip("stable_baselines3", reason="policies need: pip install 'exitkit[rl]'")
from exitkit.cli import main  # noqa: E402
from tests.test_examples import example  # noqa: E402

Invoke = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """``invoke("clone", ...)``: exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["exitkit", "rl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "policy.zip")
    return tmp_path / "policy.zip"


def test_clone_and_evaluate(invoke: Invoke, policy: Path, tmp_path: Path) -> None:
    game = ["--policy", policy, "--env", "CartPole-v1", "--envs", 2, "--out", tmp_path]
    code, shown, _ = invoke("clone", *game, "--steps", 512)
    assert code in (0, None), shown
    assert (tmp_path / "exits" / "config.json").exists()
    options = ["--exits", tmp_path / "exits", "--thresholds", "0.5,2", "--episodes", 4, "--disagreement"]
    code, shown, _ = invoke("evaluate", *game, *options)
    assert code in (0, None), shown
    results = json.loads((tmp_path / "returns.json").read_text())
    assert [point["thresholds"] for point in results["points"]] == [[0.5], [2.0]]
    assert results["points"][1]["returns"] == results["policy"]["returns"]
    assert results["points"][1]["disagreement"] == [0, 0, 0]
    assert (tmp_path / "returns.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--env": "CartPol-v1"}, "--env 'CartPol-v1' cannot be made"),
        ({"--env": "Acrobot-v1"}, "does not fit observations"),
        ({"--policy": "none.zip"}, "'none.zip' does not exist"),
        ({"--acting": "nobody"}, "acting='nobody'"),
        ({"--envs": "0"}, "--envs 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    invoke: Invoke, policy: Path, tmp_path: Path, options: dict[str, str], words: str
) -> None:
    given = {"--policy": str(policy), "--env": "CartPole-v1", "--out": str(tmp_path), "--steps": "64", **options}
    code, _, error = invoke("clone", *(part for pair in given.items() for part in pair))
    assert code == 2
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize("thresholds", ["a,b", "0.5,inf"])
def test_thresholds_are_numbers(invoke: Invoke, policy: Path, tmp_path: Path, thresholds: str) -> None:
    game = ["--policy", policy, "--env", "CartPole-v1", "--out", tmp_path, "--exits", tmp_path]
    code, _, error = invoke("evaluate", *game, "--thresholds", thresholds)
    assert code == 2
    assert "must be numbers" in error


def test_the_example_runs(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "512", "--episodes", "4", "--envs", "2"]
    example("policy_exits").main(["--policy", str(policy), "--out", str(tmp_path / "returns.png"), *options])
    shown = capsys.readouterr().out
    assert "ztw" in shown
    assert "sdn" in shown
    assert (tmp_path / "returns.png").exists()
