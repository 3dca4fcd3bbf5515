"""Reversi: its rules on many boards at once, games as a gymnasium environment, and a policy of four residual blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.models.cifar_resnets import load_weights

Boards = NDArray[np.bool_]
"""(n, 2, 8, 8): the discs of who is to move, and the other's."""
PASS = 64
_DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
_OPENING = 8
"""Random moves before a game."""


def start(count: int) -> Boards:
    """Black is to move."""
    boards = np.zeros((count, 2, 8, 8), bool)
    boards[:, 0, [3, 4], [4, 3]] = True
    boards[:, 1, [3, 4], [3, 4]] = True
    return boards


def legal_moves(boards: Boards) -> Boards:
    """(n, 65): the squares, row by row, and to pass, which is legal where nothing else is."""
    own, other = boards[:, 0], boards[:, 1]
    found = np.zeros_like(own)
    for direction in _DIRECTIONS:
        run = _shifted(own, direction) & other
        for _ in range(5):
            run |= _shifted(run, direction) & other
        found |= _shifted(run, direction)
    squares = (found & ~own & ~other).reshape(len(boards), 64)
    return np.concatenate([squares, ~squares.any(1, keepdims=True)], axis=1)


def played(boards: Boards, moves: NDArray[np.int64]) -> Boards:
    """The boards after legal moves (n,), as who is to move next sees them."""
    placed = np.zeros((len(boards), 65), bool)
    placed[np.arange(len(boards)), moves] = True
    disc = placed[:, :PASS].reshape(-1, 8, 8)
    own, other = boards[:, 0], boards[:, 1]
    turned = np.zeros_like(own)
    for direction in _DIRECTIONS:
        run = _shifted(disc, direction) & other
        for _ in range(5):
            run |= _shifted(run, direction) & other
        closed = (_shifted(run, direction) & own).any((1, 2), keepdims=True)
        turned |= run & closed
    return np.stack([other & ~turned, own | turned | disc], axis=1)


def over(boards: Boards) -> NDArray[np.bool_]:
    """(n,): neither side can move."""
    return legal_moves(boards)[:, PASS] & legal_moves(boards[:, ::-1])[:, PASS]


def _shifted(squares: Boards, direction: tuple[int, int]) -> Boards:
    """Every disc one square further; what leaves the board is gone."""
    dy, dx = direction
    moved = np.zeros_like(squares)
    to_y, from_y = _ranges(dy)
    to_x, from_x = _ranges(dx)
    moved[:, to_y, to_x] = squares[:, from_y, from_x]
    return moved


def _ranges(step: int) -> tuple[slice, slice]:
    return slice(max(step, 0), 8 + min(step, 0)), slice(max(-step, 0), 8 + min(-step, 0))


Opponent = Callable[[Boards, Boards], NDArray[np.int64]]
"""From boards and legal moves to moves."""


class Reversi(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """Games after eight random moves.

    An observation is a board as who is to move sees it, and ``info["action_mask"]`` says which moves are legal. With an
    opponent every opening is played twice, in both colours, and the reward at the end is 1 for a win and 0.5 for a draw.
    Without one every move is asked for, of both sides in turn, and there is no reward.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012 - as gymnasium has it

    def __init__(self, num_envs: int, opponent: Opponent | None = None) -> None:
        self.num_envs, self.opponent = num_envs, opponent
        self.single_observation_space = spaces.Box(0, 1, (2, 8, 8), np.float32)
        self.single_action_space = spaces.Discrete(PASS + 1)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seed, self.games = seed or 0, np.zeros(self.num_envs, np.int64)
        self.boards = start(self.num_envs)
        self._begin(np.arange(self.num_envs))
        return self._observed()

    def step(self, actions: NDArray[np.int64]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        everyone = np.arange(self.num_envs)
        assert self.legal[everyone, actions].all(), "a move that is not legal"
        self.boards = played(self.boards, actions)
        ended = over(self.boards)
        agent_to_move = np.full(self.num_envs, self.opponent is None)
        if self.opponent is not None:
            going = np.flatnonzero(~ended)
            self._answer(going)
            agent_to_move[going] = True
            ended = over(self.boards)
        own, other = (self.boards[:, side].sum((1, 2)) for side in (0, 1))
        lead = np.where(agent_to_move, own - other, other - own)
        rewards = np.where(ended, (1 + np.sign(lead)) / 2, 0.0) * (self.opponent is not None)
        self.games += ended
        self._begin(np.flatnonzero(ended))
        return *self._with_rewards(rewards, ended), self._info()

    def _with_rewards(self, rewards: NDArray[np.float64], ended: NDArray[np.bool_]) -> tuple[Any, Any, Any, Any]:
        return self.boards.astype(np.float32), rewards, ended, np.zeros(self.num_envs, bool)

    def _begin(self, rows: NDArray[np.int64]) -> None:
        """Random openings, none of which ends a game; of two games in one colour each where there is an opponent."""
        for row in rows:
            opening, white = (
                divmod(int(self.games[row]), 2) if self.opponent is not None else (int(self.games[row]), 0)
            )
            self.boards[row] = _opened(np.random.default_rng((self.seed, int(row), opening)))
            if white:
                self._answer(np.array([row]))

    def _answer(self, rows: NDArray[np.int64]) -> None:
        if self.opponent is not None and len(rows):
            some = self.boards[rows]
            self.boards[rows] = played(some, self.opponent(some, legal_moves(some)))

    def _observed(self) -> tuple[Any, dict[str, Any]]:
        return self.boards.astype(np.float32), self._info()

    def _info(self) -> dict[str, Any]:
        self.legal = legal_moves(self.boards)
        return {"action_mask": self.legal}


def _opened(generator: np.random.Generator) -> Boards:
    board = start(1)
    for _ in range(_OPENING):
        board = played(board, generator.choice(np.flatnonzero(legal_moves(board)[0]), 1))
    return board[0]  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + two 3 × 3 convolutions, normalised and rectified before each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return added


class ReversiPolicy(nn.Module):
    """Boards (B, 2, 8, 8) to logits (B, 65): the policy part of an AlphaZero agent (``ludax-agents`` 1.0.0, Apache-2.0)."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 64, 3, padding=1)
        self.blocks = nn.ModuleList(Block(64) for _ in range(4))
        self.norm = nn.BatchNorm2d(64)
        self.policy_conv, self.policy_bn = nn.Conv2d(64, 2, 1), nn.BatchNorm2d(2)
        self.policy = nn.Linear(128, PASS + 1)
        load_weights(self, weights)

    def forward(self, boards: Tensor) -> Tensor:
        x = self.stem(boards)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.policy_bn(self.policy_conv(F.relu(self.norm(x)))))
        logits: Tensor = self.policy(x.flatten(1))
        return logits
