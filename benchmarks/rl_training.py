"""Policies for ``rl.py``: PPO of Stable-Baselines3 in parts that can be killed, on MinAtar and on Atari.

    python benchmarks/rl_training.py minatar --game Breakout --steps 2000000 --out results/rl
    python benchmarks/rl_training.py atari --game pong --steps 10000000 --envs 64 --device cuda --out results/rl

The environments are under the GPL and no part of exitkit: ``pip install minatar``, ``pip install ale-py opencv-python``.
Hyperparameters are those of Zero Time Waste (appendix A.2); MinAtar, a fifteenth of the input, has twice the learning rate.
Started again with the same ``--out``, a run goes on from its last part, in new episodes.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from safetensors.torch import save_file
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from torch import Tensor, nn

from exitkit.common.files import replacing

PAPER: dict[str, Any] = {
    "n_steps": 128,
    "batch_size": 256,
    "n_epochs": 4,
    "clip_range": 0.1,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "max_grad_norm": 0.5,
}
_PARTS = 20
"""Times that a run is written down."""


def minatar_network(planes: int, actions: int) -> nn.Sequential:
    """Planes (B, C, 10, 10) of 0 and 1 to logits: three convolutions, where MinAtar's own reference network has one."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(planes, 16, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(32, 64, 3),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(64 * 4 * 4, 128),
            relu4=nn.ReLU(),
            actions=nn.Linear(128, actions),
        )
    )


class Features(BaseFeaturesExtractor):
    """All of :func:`minatar_network` but its last layer."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, 128)
        self.layers = minatar_network(space.shape[0], 1)[:-1]

    def forward(self, planes: Tensor) -> Tensor:
        out: Tensor = self.layers(planes)
        return out


class Planes(gymnasium.Wrapper[Any, Any, Any, Any]):
    """MinAtar's observations (10, 10, C) as (C, 10, 10) numbers; a new episode does not remember the last one's action."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        height, width, planes = env.observation_space.shape
        self.observation_space = gymnasium.spaces.Box(0, 1, (planes, height, width), np.float32)

    def reset(self, **options: Any) -> Any:
        self.env.unwrapped.game.last_action = 0  # type: ignore[attr-defined]
        observation, info = self.env.reset(**options)
        return self._planes(observation), info

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        return self._planes(observation), *rest

    def _planes(self, observation: Any) -> Any:
        return np.ascontiguousarray(observation.transpose(2, 0, 1), np.float32)


def minatar(game: str, count: int, same_step: bool = False) -> SyncVectorEnv:
    """So many environments, with sticky actions of probability 0.1, of at most 5,000 steps an episode."""
    import minatar.gym

    if f"MinAtar/{game}-v1" not in gymnasium.registry:
        minatar.gym.register_envs()
    mode = AutoresetMode.SAME_STEP if same_step else AutoresetMode.NEXT_STEP

    def make() -> Any:
        return Planes(gymnasium.make(f"MinAtar/{game}-v1", max_episode_steps=5_000, disable_env_checker=True))

    return SyncVectorEnv([make] * count, autoreset_mode=mode)


def atari(game: str, count: int, training: bool) -> Any:
    """The paper's environments: four frames of 84 × 84, every fourth frame, sticky actions of probability 0.1.

    To train, an episode ends with a life and rewards are clipped; to evaluate, neither.
    """
    from ale_py import AtariVectorEnv

    return AtariVectorEnv(
        game,
        num_envs=count,
        repeat_action_probability=0.1,
        episodic_life=training,
        reward_clipping=training,
        use_fire_reset=True,
        noop_max=0,
        autoreset_mode=AutoresetMode.SAME_STEP if training else AutoresetMode.NEXT_STEP,
    )


class ForSB3(VecEnv):
    """A gymnasium vector environment that resets itself in the same step, as Stable-Baselines3 takes it."""

    def __init__(self, env: Any) -> None:
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        seed = next((one for one in self._seeds if one is not None), None)
        observations, _ = self.env.reset(seed=seed)
        self._reset_seeds()
        return observations.copy()

    def step_async(self, actions: Any) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        observations, rewards, terminated, truncated, infos = self.env.step(self.actions)
        done = terminated | truncated
        each: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            final = infos["final_obs"][i] if "final_obs" in infos else observations[i]
            each[i] = {"terminal_observation": final, "TimeLimit.truncated": bool(truncated[i] and not terminated[i])}
        return observations.copy(), rewards.astype(np.float32), done, each

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def train(path: Path, env: VecEnv, steps: int, make: Callable[[VecEnv], PPO], device: str) -> PPO:
    """PPO for so many steps, continued from ``path`` where it was begun; a line after every part."""
    env = VecMonitor(env)
    model = PPO.load(path, env=env, device=device) if path.exists() else make(env)
    while model.num_timesteps < steps:
        started, before = time.perf_counter(), model.num_timesteps
        part = min(max(1, steps // _PARTS), steps - before)
        model.learn(part, reset_num_timesteps=False, progress_bar=False)
        with replacing(path) as temporary:
            model.save(temporary)
        ended = [episode["r"] for episode in model.ep_info_buffer or []]
        speed = (model.num_timesteps - before) / (time.perf_counter() - started)
        mean = np.mean(ended) if ended else float("nan")
        print(f"{model.num_timesteps:,} steps  return {mean:.2f} (the last {len(ended)})  {speed:,.0f}/s", flush=True)
    return model


def train_minatar(game: str, steps: int, out: Path, device: str = "cpu", envs: int = 32) -> Path:
    """The action network's weights, a safetensors file of half a megabyte."""
    weights = out / f"minatar_{game.lower()}.safetensors"
    if weights.exists():
        return weights
    kwargs = {"features_extractor_class": Features, "net_arch": [], "normalize_images": False}

    def make(env: VecEnv) -> PPO:
        return PPO("MlpPolicy", env, learning_rate=5e-4, policy_kwargs=kwargs, device=device, seed=0, **PAPER)

    model = train(
        out / f"minatar_{game.lower()}_ppo.zip", ForSB3(minatar(game, envs, same_step=True)), steps, make, device
    )
    state = model.policy.state_dict()
    layers = {name.removeprefix("features_extractor.layers."): value for name, value in state.items()}
    layers |= {f"actions.{part}": state[f"action_net.{part}"] for part in ("weight", "bias")}
    network = minatar_network(layers["conv1.weight"].shape[1], len(layers["actions.bias"]))
    network.load_state_dict({name: layers[name] for name in network.state_dict()})
    with replacing(weights) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in network.state_dict().items()}, temporary)
    return weights


def train_atari(game: str, steps: int, out: Path, device: str, envs: int = 8) -> PPO:
    """The paper's policy: NatureCNN, learning rate 2.5e-4."""

    def make(env: VecEnv) -> PPO:
        return PPO("CnnPolicy", env, learning_rate=2.5e-4, device=device, seed=0, **PAPER)

    return train(out / f"atari_{game}_ppo.zip", ForSB3(atari(game, envs, training=True)), steps, make, device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("minatar", "atari"))
    parser.add_argument("--game", required=True, help="Breakout, SpaceInvaders, …; pong, qbert, …")
    parser.add_argument("--steps", type=int, default=2_000_000)
    parser.add_argument("--envs", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/rl"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.family == "minatar":
        print(train_minatar(args.game, args.steps, args.out, args.device, args.envs))
    else:
        train_atari(args.game, args.steps, args.out, args.device, args.envs)


if __name__ == "__main__":
    main()
