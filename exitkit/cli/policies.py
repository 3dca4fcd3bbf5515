"""``exitkit rl``: exits for a policy of Stable-Baselines3, cloned and played."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from exitkit import rl
from exitkit.cli.threads import computing_with, threads_for
from exitkit.common.console import make_console
from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.common.files import replacing
from exitkit.common.schema import to_json
from exitkit.multi_exit.attaching import attach
from exitkit.multi_exit.model import MultiExitModel

app = typer.Typer(help="Policies with exits (needs exitkit[rl]).", no_args_is_help=True, rich_markup_mode=None)
_console = make_console()

Policy = Annotated[Path, typer.Option(help="A .zip that Stable-Baselines3 saved: PPO or A2C, discrete actions")]
Env = Annotated[str, typer.Option(help="A gymnasium id, MODULE:ID where a module registers it")]
Envs = Annotated[int, typer.Option(help="Environments played at once")]
Out = Annotated[Path, typer.Option(help="Folder for what is written")]
Trust = Annotated[bool, typer.Option("--trust", help="You trust the pickles that the policy file may hold")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default one for a policy below 100 MMACs")]


@app.command()
def clone(
    policy: Policy,
    env: Env,
    out: Out,
    steps: Annotated[int, typer.Option(help="In all environments together")] = 100_000,
    envs: Envs = 8,
    method: Annotated[str, typer.Option(help="sdn, pbee or ztw")] = "ztw",
    head: Annotated[str, typer.Option(help="As for exitkit bench")] = "auto",
    every: Annotated[int, typer.Option(help="An exit after every n-th block")] = 1,
    acting: Annotated[str, typer.Option(help="exits, exits+policy or policy: whose action is taken")] = "exits",
    seed: Annotated[int, typer.Option(help="Of heads, environments and order")] = 0,
    trust: Trust = False,
    threads: Threads = None,
) -> None:
    """Teach exits to act as a policy does, on the states that they come to; writes them to OUT/exits.

    Started again, it continues where it stopped.
    """
    games = _environments(env, envs)
    agent, example = _agent(policy, games, trust)
    torch.manual_seed(max(seed, 0))
    ee = attach(agent, example, every=every, method=method, head=head)
    with computing_with(threads_for(agent, example, threads, _console.print)):
        rl.clone(ee, games, steps, acting=acting, seed=seed, output_dir=out / "training")  # type: ignore[arg-type]
    ee.save_pretrained(out / "exits")
    _console.print(f"{ee!r}\nWritten to {out / 'exits'}/")


@app.command()
def evaluate(
    policy: Policy,
    env: Env,
    exits: Annotated[Path, typer.Option(help="Folder of exits, such as OUT/exits of exitkit rl clone")],
    out: Out,
    thresholds: Annotated[str, typer.Option(help="Comma-separated τ")] = "0.3,0.5,0.7,0.9,0.99,2",
    episodes: Annotated[int, typer.Option(help="Whole episodes at each τ")] = 100,
    envs: Envs = 8,
    disagreement: Annotated[bool, typer.Option("--disagreement", help="Ask the policy too, at every step")] = False,
    seed: Annotated[int, typer.Option(help="Of the environments")] = 0,
    trust: Trust = False,
    threads: Threads = None,
) -> None:
    """Play a policy with exits at several τ; print and write return against compute (returns.json, returns.png)."""
    try:
        taus = [float(tau) for tau in thresholds.split(",")]
        if not all(map(math.isfinite, taus)):
            raise ValueError("not finite")
    except ValueError as error:
        raise ArgumentError(f"--thresholds {thresholds!r} must be numbers, such as 0.5,0.9,2") from error
    games = _environments(env, envs)
    agent, example = _agent(policy, games, trust)
    ee = MultiExitModel.from_pretrained(agent, exits, example)
    with computing_with(threads_for(agent, example, threads, _console.print)):
        result = rl.returns(ee, games, taus, episodes, disagreement=disagreement, seed=seed)
    _console.print(result.table(), soft_wrap=True)
    with replacing(out / "returns.json") as temporary:
        temporary.write_text(to_json(result.to_dict(), indent=1), encoding="utf-8")
    result.plot(out / "returns.png")
    _console.print(f"Written to {out}/: returns.json, returns.png")


def _environments(name: str, count: int) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ExitkitError("exitkit rl needs gymnasium: pip install 'exitkit[rl]'") from error
    if count < 1:
        raise ArgumentError(f"--envs {count} must be at least 1")
    try:
        return gymnasium.make_vec(name, num_envs=count)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "no message")
        raise ArgumentError(
            f"--env {name!r} cannot be made ({reason}); give a gymnasium id, MODULE:ID where a module registers it"
        ) from error


def _agent(path: Path, games: Any, trust: bool) -> tuple[nn.Module, Tensor]:
    """The policy as a backbone, and observations as it takes them."""
    agent = rl.policy(rl.load_policy(path, games, trust=trust))
    observations, _ = games.reset(seed=0)
    return agent, torch.as_tensor(observations)
