"""Tiny deterministic environments and policies, of which everything is known."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

import exitkit

ACTIONS = 4


class Walk(gymnasium.Env[Any, Any]):
    """Episodes of ``length`` steps through random observations that hold the environment's number and the step.

    Reward 1 for the action that the observation's last number names. Everything that happened is written down.

    Args:
        number: seen in every observation, so that environments cannot be mixed up unnoticed.
        length: of an episode.
        masked: give a mask of legal actions, and raise for an action that is not legal.
        at: what happens at a step of this environment's own count.
    """

    def __init__(
        self, number: int = 0, length: int = 5, masked: bool = False, at: dict[int, Callable[[], None]] | None = None
    ) -> None:
        self.observation_space = spaces.Box(-10, 10, (4,), np.float32)
        self.action_space = spaces.Discrete(ACTIONS)
        self.number, self.length, self.masked, self.at = number, length, masked, at or {}
        self.seen: list[np.ndarray] = []
        self.taken: list[int] = []
        self.count = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.clock = 0
        return self._observe()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.at.get(self.count, lambda: None)()
        self.count += 1
        assert not self.masked or self.legal[action], f"{action} is not legal"
        self.seen.append(self.observation)
        self.taken.append(int(action))
        reward = float(int(action) == int(abs(self.observation[3]) * 10) % ACTIONS)
        self.clock += 1
        observation, info = self._observe()
        return observation, reward, self.clock == self.length, False, info

    def _observe(self) -> tuple[np.ndarray, dict[str, Any]]:
        one, other = self.np_random.normal(size=2)
        self.observation = np.array([self.number, self.clock, one, other], np.float32)
        self.legal = np.ones(ACTIONS, np.int8)
        self.legal[self.np_random.permutation(ACTIONS)[: self.np_random.integers(ACTIONS)]] = 0
        return self.observation, {"action_mask": self.legal} if self.masked else {}


def walks(count: int = 3, same_step: bool = False, **options: Any) -> gymnasium.vector.SyncVectorEnv:
    """Several of them, each with its own number."""
    mode = gymnasium.vector.AutoresetMode.SAME_STEP if same_step else gymnasium.vector.AutoresetMode.NEXT_STEP
    makers = [lambda number=number: Walk(number, **options) for number in range(count)]
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)


def terminated() -> None:
    """As a scheduler ends this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def actor(seed: int = 0) -> nn.Sequential:
    """From a walk's observations to logits."""
    torch.manual_seed(seed)
    hidden = [layer for width in (4, 16, 16, 16) for layer in (nn.Linear(width, 16), nn.Tanh())]
    network = nn.Sequential(*hidden, nn.Linear(16, ACTIONS))
    with torch.no_grad():
        network[-1].weight.mul_(5)
    return network.eval()


def with_exits(method: str | exitkit.Method = "ztw", masked: bool = False, seed: int = 0) -> exitkit.MultiExitModel:
    """Three exits: after each hidden layer but the last."""
    agent = exitkit.rl.policy(actor(seed), masked=masked)
    observed = torch.randn(2, 4)
    torch.manual_seed(seed + 1)
    example: Any = (observed, torch.ones(2, ACTIONS, dtype=torch.bool)) if masked else observed
    return exitkit.attach(agent, example, every=1, method=method)


def always(ee: exitkit.MultiExitModel) -> exitkit.MultiExitModel:
    """Exit m always takes action m, the policy always the last one."""
    with torch.no_grad():
        for action, linear in enumerate([*(head.linear for head in ee.classifiers), ee.backbone[-1]]):
            linear.weight.zero_()
            linear.bias.copy_(10.0 * nn.functional.one_hot(torch.tensor(action), ACTIONS))
    return ee


class ConvGru(nn.Module):
    """The layout of a recurrent Pong policy: four convolutions, a GRU cell, an actor and a critic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, stride=2, padding=1)
        self.conv2, self.conv3, self.conv4 = (nn.Conv2d(32, 32, 3, stride=2, padding=1) for _ in range(3))
        self.gru = nn.GRUCell(800, 256)
        self.actor_linear, self.critic_linear = nn.Linear(256, 6), nn.Linear(256, 1)

    def forward(self, frames: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            frames = nn.functional.elu(layer(frames))
        out: Tensor = self.actor_linear(self.gru(frames.flatten(1)))
        return out
