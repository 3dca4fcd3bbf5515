"""Exits in a policy of reinforcement learning: cloned on the states that they come to, and played at several thresholds.

    python examples/policy_exits.py --policy sb3_ppo_CartPole-v1.zip --env CartPole-v1 [--quick]

It needs gymnasium and Stable-Baselines3: pip install 'exitkit[rl]'.

The policy is an actor-critic that Stable-Baselines3 saved. Its action network gets an exit after each hidden layer but the
last, by Zero Time Waste and by SDN; both learn the policy's action distribution, and then play the same number of episodes
from the same seeds. What a small network of two layers shows is that everything works: MACs are saved, but one action takes
longer through the engine than through a network of 4,500 multiplications. Deep policies are where exits pay: see
``benchmarks/rl.py``.

CartPole, ``--quick``, one run on a CPU: the policy's return is 500. Zero Time Waste has 500 at every τ: at 0.5 for 9% of the
MACs with 25% other actions than the policy's, at 0.9 for 40% with 1%; above 1, where nothing leaves early, for 103%. An action
takes 0.2 ms instead of 0.04. It takes 17 s of CPU time on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import exitkit
from exitkit import rl


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.envs < 1:
        raise exitkit.ExitkitError(f"--envs {args.envs} must be at least 1")
    try:
        import gymnasium
    except ImportError as error:
        raise exitkit.ExitkitError("this needs gymnasium: pip install 'exitkit[rl]'") from error

    try:
        env = gymnasium.make_vec(args.env, num_envs=args.envs, vectorization_mode="sync")
    except gymnasium.error.Error as error:  # unknown, of an old version, or without the package that it needs
        raise exitkit.ExitkitError(f"--env {args.env!r} cannot be made: {error}") from error
    observations, _ = env.reset(seed=args.seed)
    agent = rl.policy(rl.load_policy(args.policy, env))

    results = []
    for method in ("ztw", "sdn"):
        torch.manual_seed(args.seed)
        ee = exitkit.attach(agent, torch.as_tensor(observations), every=1, method=method)
        rl.clone(ee, env, args.steps, seed=args.seed)
        results.append(rl.returns(ee, env, args.thresholds, args.episodes, disagreement=True, seed=args.seed))
        print(f"{method}: {ee!r}\n{results[-1]}\n")
    rl.plot_returns(results, args.out)
    print(f"Written to {args.out}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="a .zip that Stable-Baselines3 saved")
    parser.add_argument("--env", default="CartPole-v1", help="the environment it was trained in")
    parser.add_argument("--steps", type=int, default=50_000, help="of cloning, in all environments together")
    parser.add_argument("--envs", type=int, default=8, help="environments played at once")
    parser.add_argument("--episodes", type=int, default=100, help="at each threshold")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.7, 0.9, 0.99, 2.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("returns.png"), help="a picture of return against MACs")
    parser.add_argument("--quick", action="store_true", help="5,000 steps and 8 episodes at each threshold")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps, args.episodes = 5_000, 8
    return args


if __name__ == "__main__":
    try:
        main()
    except exitkit.ExitkitError as error:
        raise SystemExit(f"policy_exits: {error}") from None
