"""Environments as policies see them: tensors in, actions out, and which steps of which episode they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.exits.legal_actions import LegalActions
from exitkit.multi_exit.model import MultiExitModel
from exitkit.rl.policies import check_feedforward

Bools = NDArray[np.bool_]


class EnvironmentFailedError(ExitkitError):
    """An environment raised in the middle of an episode; the cause is its own exception."""


class Episode(NamedTuple):
    """A finished episode: of which environment, its undiscounted return, and its length in actions."""

    environment: int
    total: float
    length: int


class Step(NamedTuple):
    """What one step brought.

    Attributes:
        counted: (n,) whether the action was taken; not in the step in which an environment resets itself.
        finished: the episodes that ended.
    """

    counted: Bools
    finished: list[Episode]


@dataclass
class Games:
    """A vector environment under way.

    Attributes:
        env: a ``gymnasium.vector.VectorEnv`` that resets itself.
        model: the policy with exits that it is played with.
        inputs: the tensors that the policy takes now: observations (n, …), and a mask of legal actions where it takes one.
        counts: (n,) whether the next action of each is taken; not right after an episode's end.
    """

    env: Any
    model: MultiExitModel
    inputs: tuple[Tensor, ...] = field(init=False)
    counts: Bools = field(init=False)

    def __post_init__(self) -> None:
        self.env = as_vector(self.env)
        self.same_step = _resets_in_same_step(self.env)
        check_fits(self.model, self.env)
        self._space = self.env.single_action_space
        self._masked = isinstance(self.model.backbone, LegalActions)

    @property
    def count(self) -> int:
        """How many environments there are."""
        return int(self.env.num_envs)

    def reset(self, *seed: int) -> None:
        """Begin new episodes everywhere; the environments' seeds follow from these numbers."""
        first = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)  # each environment has the next one
        self.totals, self.lengths = np.zeros(self.count), np.zeros(self.count, np.int64)
        self.episodes = np.zeros(self.count, np.int64)
        self.counts = np.ones(self.count, bool)
        with self._named():
            observations, infos = self.env.reset(seed=first)
        self._see(observations, infos)

    def step(self, actions: NDArray[np.int64]) -> Step:
        """Take actions (n,), numbers of the policy's logits.

        Raises:
            EnvironmentFailedError: the environment raised; the message names the episode. It can then be reset alone.
        """
        counted = self.counts
        with self._named():
            observations, rewards, terminated, truncated, infos = self.env.step(self._as_actions(actions))
        self.totals[counted] += np.asarray(rewards, np.float64)[counted]
        self.lengths[counted] += 1
        ended = (np.asarray(terminated, bool) | np.asarray(truncated, bool)) & counted
        finished = [Episode(int(i), float(self.totals[i]), int(self.lengths[i])) for i in np.flatnonzero(ended)]
        self.totals[ended], self.lengths[ended] = 0, 0
        self.episodes[ended] += 1
        self.counts = np.ones_like(ended) if self.same_step else ~ended
        self._see(observations, infos)
        return Step(counted, finished)

    def _see(self, observations: Any, infos: dict[str, Any]) -> None:
        example = self.model.example.tensors
        device = example[0].device
        observed = torch.tensor(np.asarray(observations), device=device).to(example[0].dtype)
        self.inputs = (observed, torch.from_numpy(self._legal(infos)).to(device)) if self._masked else (observed,)

    def _legal(self, infos: dict[str, Any]) -> Bools:
        actions = self.model.num_classes
        if "action_mask" not in infos:
            raise ArgumentError(
                "the policy takes a mask of legal actions, but the environment gave no info['action_mask'] in reset or step; "
                f"give one of {actions} numbers, 0 for what is not legal"
            )
        legal = np.asarray(infos["action_mask"])
        if legal.shape != (self.count, actions):
            raise ArgumentError(
                f"info['action_mask'] has shape {legal.shape} for {self.count} environments, the policy {actions} actions; "
                f"give {actions} numbers for each environment"
            )
        legal = legal != 0
        legal[~self.counts] = True  # nothing is chosen there
        if not legal.any(1).all():
            environment = int(legal.any(1).argmin())
            raise ArgumentError(f"info['action_mask'] allows no action in {self._place(environment)}")
        return cast("Bools", legal)

    def _as_actions(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        if hasattr(self._space, "nvec"):
            numbers = np.stack(np.unravel_index(numbers, tuple(self._space.nvec)), axis=1)
        return (numbers + self._space.start).astype(self._space.dtype)  # type: ignore[no-any-return]

    def _place(self, environment: int) -> str:
        return (
            f"step {self.lengths[environment]} of episode {self.episodes[environment]} of environment {environment} "
            "(all from 0)"
        )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn what an environment raises into one error that says where."""
        try:
            yield
        except ExitkitError:
            raise
        except Exception as error:
            environment = 0 if self.count == 1 else _raised_in(error, self.env)
            where = "one of them" if environment is None else self._place(environment)
            raise EnvironmentFailedError(
                f"the environment raised {type(error).__name__} in {where}: {error}"
            ) from error


def _raised_in(error: Exception, env: Any) -> int | None:
    """The number of the environment that raised, where they are stepped one after another; None where that is not known."""
    trace = error.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_locals
        if names.get("self") is env.unwrapped and "i" in names:  # the loop of gymnasium's SyncVectorEnv
            return int(names["i"])
        trace = trace.tb_next
    return None


def as_vector(env: Any) -> Any:
    """A vector environment, or one environment as a vector of one.

    Raises:
        ExitkitError: gymnasium is not installed.
        ArgumentError: anything else, or a vector environment that does not reset itself.
    """
    gymnasium = _gymnasium()
    if isinstance(env, gymnasium.vector.VectorEnv):
        return env
    if isinstance(env, gymnasium.Env):
        return gymnasium.vector.SyncVectorEnv([lambda: env])
    raise ArgumentError(
        f"env is {type(env).__name__}; give a gymnasium environment: gymnasium.make_vec(ID, num_envs=8), or gymnasium.make(ID)"
    )


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ExitkitError("policies are played in gymnasium's environments: pip install 'exitkit[rl]'") from error
    return gymnasium


def _resets_in_same_step(env: Any) -> bool:
    from gymnasium.vector import AutoresetMode

    mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    if mode == AutoresetMode.DISABLED:
        raise ArgumentError(
            "env has autoreset_mode=DISABLED, so that it stops after its first episodes; make it with AutoresetMode.NEXT_STEP"
        )
    return mode == AutoresetMode.SAME_STEP


def check_fits(model: MultiExitModel, env: Any) -> None:
    """Refuse an environment for another policy.

    Raises:
        ArgumentError: not a multi-exit model, a recurrent policy, or other observations or actions than the policy's; the
            message names both.
    """
    if not isinstance(model, MultiExitModel):
        raise ArgumentError(f"ee is {type(model).__name__}; give what exitkit.attach(policy) returned")
    check_feedforward(model.backbone)
    from gymnasium import spaces

    observed, example = env.single_observation_space, model.example.tensors[0]
    shape, dtype = tuple(example.shape[1:]), str(example.dtype).removeprefix("torch.")
    fits = isinstance(observed, spaces.Box | spaces.Discrete) and observed.shape == shape
    if not fits or not torch.can_cast(torch.from_numpy(np.empty(0, observed.dtype)).dtype, example.dtype):
        raise ArgumentError(
            f"the environment's observations are {observed}, the policy takes {dtype} of shape {shape}; play it in the "
            "environment that it was trained in, with the same wrappers"
        )
    actions = env.single_action_space
    discrete = isinstance(actions, spaces.Discrete)
    several = isinstance(actions, spaces.MultiDiscrete) and actions.nvec.ndim == 1
    number = int(actions.n) if discrete else int(actions.nvec.prod()) if several else 0
    if number != model.num_classes:
        raise ArgumentError(
            f"the environment's actions are {actions}, the policy chooses among {model.num_classes}; play it in the "
            "environment that it was trained in (continuous actions are not supported)"
        )
