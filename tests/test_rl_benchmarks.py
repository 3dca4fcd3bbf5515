"""The benchmark of policies: Reversi's rules and games, and a row that is played, written, and not played again."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import exitkit

pytest.importorskip("gymnasium", reason="policies need: pip install 'exitkit[rl]'")
sb3 = pytest.importorskip("stable_baselines3", reason="policies need: pip install 'exitkit[rl]'")
from tests.test_examples import ROOT, example  # noqa: E402


@pytest.fixture
def reversi(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return example("reversi", "benchmarks")


def test_the_rules_of_reversi(reversi: ModuleType) -> None:
    """Numbers of positions after so many moves, as they are published for Othello."""
    boards, counts = reversi.start(1), []
    for _ in range(6):
        rows, moves = np.nonzero(reversi.legal_moves(boards))
        boards = reversi.played(boards[rows], moves)
        counts.append(len(boards))
    assert counts == [4, 12, 56, 244, 1396, 8200]


def test_one_passes_where_nothing_else_is_legal(reversi: ModuleType) -> None:
    boards = np.zeros((2, 2, 8, 8), bool)
    boards[:, 0, 0, 0] = boards[:, 1, 0, 7] = True  # nobody can turn anything
    boards[1, 1, 0, 1] = True  # here the mover can
    legal = reversi.legal_moves(boards)
    assert np.flatnonzero(legal[0]).tolist() == [reversi.PASS]
    assert np.flatnonzero(legal[1]).tolist() == [2]
    assert reversi.over(boards).tolist() == [True, False]
    after = reversi.played(boards, np.array([reversi.PASS, 2]))
    assert (after[0] == boards[0, ::-1]).all()
    assert after[1, 1, 0, :3].all()  # three discs of who has moved
    assert after[1, 0].sum() == 1


def first(boards: Any, legal: Any) -> Any:
    """A player who takes the first legal square."""
    return legal.argmax(1)


def test_against_itself_a_player_wins_half_of_the_games(reversi: ModuleType) -> None:
    """As every opening is played in both colours, exactly."""
    env = reversi.Reversi(6, first)
    _, info = env.reset(seed=3)
    rewards = np.zeros((6, 0))
    while min((rewards[i] >= 0).sum() for i in range(6)) < 4:
        _, reward, ended, _, info = env.step(first(None, info["action_mask"]))
        rewards = np.concatenate([rewards, np.where(ended, reward, -1)[:, None]], axis=1)
    for row in rewards:
        one, other, third, fourth = row[row >= 0][:4]
        assert one + other == third + fourth == 1


def test_a_row_is_played_written_and_not_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = example("rl", "benchmarks")
    torch.manual_seed(0)
    sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "policy.zip")
    options = ["--policy", tmp_path / "policy.zip", "--out", tmp_path, "--steps", 512, "--episodes", 4, "--envs", 2]
    benchmark.main(["mlp", *map(str, options), "--taus", "0.5", "2", "--threads", "1"])
    shown = capsys.readouterr().out
    assert "mlp-cartpole-v1: ztw" in shown
    written = json.loads((tmp_path / "mlp-cartpole-v1-sdn.json").read_text())
    assert written["points"][1]["returns"] == written["policy"]["returns"]
    monkeypatch.setattr(exitkit.rl, "returns", None)
    monkeypatch.setattr(exitkit.rl, "clone", None)
    benchmark.main(["mlp", *map(str, options), "--taus", "0.5", "2", "--threads", "1"])
    assert capsys.readouterr().out.split("mlp-cartpole-v1: sdn")[0] == shown.split("mlp-cartpole-v1: sdn")[0]


def test_differences_are_of_the_highest_threshold_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = example("rl", "benchmarks")

    def result(*totals: float) -> Any:
        """At τ = 0.3, 0.6 and 0.9: costs 0.4, 0.65 and 0.95."""
        points = []
        for tau, cost, total in zip((0.3, 0.6, 0.9), (0.4, 0.65, 0.95), totals, strict=True):
            episodes = benchmark.Episodes(np.full(10, total), np.ones((10, 2), int), None, 1.0)
            spread = benchmark.Interval(cost, cost, cost)
            policy = exitkit.ExitPolicy((tau,), "confidence")
            points.append(benchmark.ReturnPoint(policy, episodes, spread, spread, None))
        return benchmark.Returns("x", tuple(points), points[0].episodes)

    found = benchmark.differences(result(1, 5, 9), result(0, 2, 9))
    assert found == {"50%": [1, 1, 1], "60%": [1, 1, 1], "70%": [3, 3, 3], "80%": [3, 3, 3], "90%": [3, 3, 3]}
