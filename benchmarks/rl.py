"""Policies with exits: return against compute, as Zero Time Waste (section 4.3, appendices A.2 and B.3) has it for Atari.

    python benchmarks/rl.py reversi --weights reversi_alphazero_policy.safetensors [--steps 200000] [--episodes 400]
    python benchmarks/rl.py minatar --game Breakout [--train 2000000] [--steps 300000] [--episodes 100]
    python benchmarks/rl.py mlp --policy sb3_ppo_CartPole-v1.zip --env CartPole-v1
    python benchmarks/rl.py atari --game pong [--train 10000000] [--steps 1000000] [--device cuda]

In each, exits are cloned from the policy and then played through the engine at every τ, from the same openings and seeds. What
is written to ``--out``: the exits of every method, every episode's return (JSON), and a picture. Started again, a row goes on
where it was: what is written is not done again, and a method that was killed while it learned goes on from its checkpoint.

* **reversi**: a pretrained AlphaZero policy of four residual blocks, three exits. The return is the share of games won against
  the whole policy, every opening played in both colours: exactly one half where the exits change nothing. Legal moves are
  masked before anything is scored. Beside cloned exits stand ``tail`` heads as attached, untrained.
* **minatar**: a policy of three convolutions, trained by PPO (``rl_training.py``). Beside the methods stand exits that were
  taught on the states of the policy instead of their own (``acting="policy"``).
* **mlp**: two layers of 64. It shows that everything works, and that exits do not pay there.
* **atari**: the paper's networks, games and stickiness, for a GPU; on a CPU with fewer steps it shows that everything works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tables import table, write
from torch import nn

import exitkit
from exitkit import rl
from exitkit.common.console import make_console
from exitkit.evaluation import Interval
from exitkit.rl import Episodes, ReturnPoint, Returns

TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 2.0)
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
RESAMPLES = 4_000


@dataclass(frozen=True)
class Row:
    """A policy and where it plays.

    Attributes:
        name: of its files.
        agent: the policy as a backbone.
        example: inputs that it takes.
        games: environments to clone in.
        evaluated: environments to evaluate in.
        options: for ``attach``.
        clone: for ``rl.clone``.
    """

    name: str
    agent: nn.Module
    example: Any
    games: Callable[[], Any]
    evaluated: Callable[[], Any]
    options: Mapping[str, Any]
    clone: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    row = {"reversi": reversi, "minatar": minatar, "mlp": mlp, "atari": atari}[args.row](args)
    results = {} if args.row != "reversi" else {"untrained": measured(row, "untrained", args)}
    results |= {name: measured(row, name, args) for name in ("ztw", "sdn")}
    results["pbee"] = measured(row, "pbee", args, exits="sdn")
    if args.row in ("minatar", "reversi"):
        results["ztw, states of the policy"] = measured(row, "ztw-policy", args)
    console = make_console()
    for name, result in results.items():
        console.print(f"{row.name}: {name}\n{result}\n", soft_wrap=True)
    pairs = [("ztw", "sdn"), ("ztw", "pbee"), ("ztw", "ztw, states of the policy")]
    found = {f"{a} – {b}": differences(results[a], results[b]) for a, b in pairs if b in results}
    console.print(compared(row.name, found))
    rl.plot_returns(results.values(), args.out / f"{row.name}.png")
    write(args.out / f"{row.name}.json", args, differences=found)


def measured(row: Row, name: str, args: argparse.Namespace, exits: str | None = None) -> Returns:
    """Returns of a method: read where they were written, else cloned and played. ``exits``: whose exits to play with."""
    path = args.out / f"{row.name}-{name}.json"
    if not path.exists():
        method = "sdn" if name in ("untrained", "pbee") else name.partition("-")[0]
        ee = with_exits(row, method, exits or name, args)
        if name == "pbee":
            ee.method = exitkit.PBEE()
        taus = range(1, len(ee.exits)) if name == "pbee" else args.taus
        result = rl.returns(ee, row.evaluated(), taus, args.episodes, disagreement=True, seed=args.seed)
        write(path, args, **result.to_dict(), exits_at=[exit_.macs_fraction for exit_ in ee.exits])
    return read(path, name)


def with_exits(row: Row, method: str, name: str, args: argparse.Namespace) -> exitkit.MultiExitModel:
    """A policy with exits, cloned or found in ``--out``."""
    folder = args.out / f"{row.name}-{name}-exits"
    torch.manual_seed(args.seed)
    if name == "untrained":
        return exitkit.attach(row.agent, row.example, method=method, **{**row.options, "head": "tail"})
    if folder.exists():
        return exitkit.MultiExitModel.from_pretrained(row.agent, folder, row.example)
    ee = exitkit.attach(row.agent, row.example, method=method, **row.options).to(args.device)
    acting: Literal["policy", "exits"] = "policy" if name.endswith("-policy") else "exits"
    output = args.out / f"{row.name}-{name}-training"
    rl.clone(ee, row.games(), args.steps, acting=acting, seed=args.seed, output_dir=output, **row.clone)
    ee.save_pretrained(folder)
    return ee


def read(path: Path, name: str) -> Returns:
    """What was written of a method's episodes."""
    data = json.loads(path.read_text())
    points = []
    for point in data["points"]:
        policy = exitkit.ExitPolicy(tuple(point["thresholds"]), point["criterion"])
        intervals = [point[key] and Interval(*point[key]) for key in ("mean", "cost", "disagreement")]
        points.append(ReturnPoint(policy, _episodes(point), *intervals))
    return Returns(name, tuple(points), _episodes(data["policy"]))


def _episodes(data: Mapping[str, Any]) -> Episodes:
    return Episodes(np.array(data["returns"]), np.array(data["exits"]), None, data["milliseconds"])


def differences(one: Returns, other: Returns) -> dict[str, list[float]]:
    """First minus second: the mean return under a budget of MACs, at the highest τ that keeps it, with a 95% interval."""
    found = {}
    for budget in BUDGETS:
        first, second = (under(result, budget) for result in (one, other))
        if first is not None and second is not None:
            generator = np.random.default_rng(0)
            drawn = _resampled(first, generator) - _resampled(second, generator)
            low, high = np.quantile(drawn, [0.025, 0.975])
            found[f"{budget:.0%}"] = [float(low), float(first.mean() - second.mean()), float(high)]
    return found


def under(result: Returns, budget: float) -> NDArray[np.float64] | None:
    """Returns of the episodes at the highest τ whose average cost stays under a budget."""
    kept = [point for point in result.points if point.cost.value < budget]
    return max(kept, key=lambda point: point.policy.thresholds).episodes.totals if kept else None


def _resampled(totals: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    means: NDArray[np.float64] = totals[generator.integers(0, len(totals), (RESAMPLES, len(totals)))].mean(1)
    return means


def compared(name: str, found: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    budgets = [f"{budget:.0%}" for budget in BUDGETS]
    rows = []
    for pair, values in found.items():
        cells = {budget: f"{value:+.2f} ({low:+.2f} … {high:+.2f})" for budget, (low, value, high) in values.items()}
        rows.append((pair, *(cells.get(budget, "-") for budget in budgets)))
    return table(("mean return within MACs", *budgets), rows, f"{name}: differences, with 95% intervals over episodes")


def reversi(args: argparse.Namespace) -> Row:
    from reversi import PASS, Boards, Reversi, ReversiPolicy

    agent = rl.policy(ReversiPolicy(args.weights), masked=True)

    def whole(boards: Boards, legal: Boards) -> NDArray[np.int64]:
        with torch.inference_mode():
            logits = agent(torch.from_numpy(boards.astype(np.float32)), torch.from_numpy(legal))
        moves: NDArray[np.int64] = logits.argmax(1).numpy()
        return moves

    example = (torch.zeros(2, 2, 8, 8), torch.ones(2, PASS + 1, dtype=torch.bool))
    return Row(
        "reversi",
        agent,
        example,
        lambda: Reversi(args.envs),
        lambda: Reversi(args.envs, whole),
        {"every": 1, "head": args.head or "tail"},
        {"lr": args.lr or 1e-3},
    )


def minatar(args: argparse.Namespace) -> Row:
    from rl_training import minatar as environments
    from rl_training import minatar_network, train_minatar

    state = load_file(train_minatar(args.game, args.train, args.out))
    agent = minatar_network(state["conv1.weight"].shape[1], len(state["actions.bias"])).eval()
    agent.load_state_dict(state)
    games = environments(args.game, args.envs)
    example = torch.as_tensor(games.reset(seed=0)[0])
    options = {"at": ["relu1", "relu2", "relu3"], "head": args.head or "1L"}
    clone = {"lr": args.lr or 1e-2, "rollout": args.rollout, "batch_size": 256}
    return Row(f"minatar-{args.game.lower()}", agent, example, lambda: games, lambda: games, options, clone)


def mlp(args: argparse.Namespace) -> Row:
    import gymnasium

    games = gymnasium.make_vec(args.env, num_envs=args.envs, vectorization_mode="sync")
    agent = rl.policy(rl.load_policy(args.policy, games))
    example = torch.as_tensor(games.reset(seed=0)[0])
    options = {"every": 1, "head": args.head or "1L"}
    return Row(
        f"mlp-{args.env.lower()}", agent, example, lambda: games, lambda: games, options, {"lr": args.lr or 1e-2}
    )


def atari(args: argparse.Namespace) -> Row:
    from rl_training import atari as environments
    from rl_training import train_atari

    agent = rl.policy(train_atari(args.game, args.train, args.out, args.device)).to(args.device)
    example = torch.zeros(2, 4, 84, 84, dtype=torch.uint8, device=args.device)
    options = {"at": ["features.cnn.1", "features.cnn.3"], "head": args.head or "conv"}
    return Row(
        f"atari-{args.game}",
        agent,
        example,
        lambda: environments(args.game, args.envs, training=True),
        lambda: environments(args.game, args.envs, training=False),
        options,
        {"lr": args.lr or 1e-2},
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=("reversi", "minatar", "mlp", "atari"))
    parser.add_argument("--weights", type=Path, help="reversi: the policy's weights")
    parser.add_argument("--game", help="minatar: Breakout, SpaceInvaders, …; atari: pong, qbert, …")
    parser.add_argument("--policy", type=Path, help="mlp: a .zip of Stable-Baselines3")
    parser.add_argument("--env", default="CartPole-v1", help="mlp: its environment")
    parser.add_argument("--train", type=int, default=2_000_000, help="minatar and atari: steps of PPO")
    parser.add_argument("--steps", type=int, default=200_000, help="of cloning")
    parser.add_argument("--rollout", type=int, default=32, help="minatar: steps between two times of learning")
    parser.add_argument("--episodes", type=int, default=100, help="at each τ")
    parser.add_argument("--taus", type=float, nargs="+", default=TAUS)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--head", help="instead of the row's own")
    parser.add_argument("--lr", type=float, help="of cloning; by default 1e-2, for reversi's copied heads 1e-3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/rl"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
