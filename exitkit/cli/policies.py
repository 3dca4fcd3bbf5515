"""``exitkit rl``: exits for a policy of Stable-Baselines3, cloned and played."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitkit.cli.help import SectionedGroup, add
from exitkit.cli.options import EXITS, TRAINING, Device, Threads, check_folder, check_least
from exitkit.common.console import make_console
from exitkit.common.errors import ArgumentError, ExitkitError

if TYPE_CHECKING:
    from torch import Tensor, nn

app = typer.Typer(
    help="Policies with exits (needs exitkit[rl]).", cls=SectionedGroup, no_args_is_help=True, rich_markup_mode=None
)

Policy = Annotated[Path, typer.Option(help="A .zip that Stable-Baselines3 saved: PPO or A2C, discrete actions")]
Env = Annotated[str, typer.Option(help="A gymnasium id, MODULE:ID where a module registers it")]
Envs = Annotated[int, typer.Option(help="Environments played at once")]
Trust = Annotated[bool, typer.Option("--trust", help="You trust the pickles that the policy file may hold")]


def clone(
    policy: Policy,
    env: Env,
    out: Annotated[Path, typer.Option(help="Folder for the exits and the checkpoint")],
    steps: Annotated[int, typer.Option(help="In all environments together", rich_help_panel=TRAINING)] = 100_000,
    envs: Envs = 8,
    method: Annotated[str, typer.Option(help="sdn, pbee or ztw", rich_help_panel=EXITS)] = "ztw",
    head: Annotated[str, typer.Option(help="As for exitkit bench", rich_help_panel=EXITS)] = "auto",
    every: Annotated[int, typer.Option(help="An exit after every n-th block", rich_help_panel=EXITS)] = 1,
    acting: Annotated[
        str, typer.Option(help="exits, exits+policy or policy: whose action is taken", rich_help_panel=TRAINING)
    ] = "exits",
    seed: Annotated[int, typer.Option(help="Of heads, environments and order", rich_help_panel=TRAINING)] = 0,
    trust: Trust = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Teach exits to act as a policy does, on the states that they come to; writes them to OUT/exits.

    The same command goes on where it was stopped or killed.
    """
    check_least(envs=envs, steps=steps)
    check_folder(out)
    import torch

    import exitkit
    from exitkit.cli.machine import computing_with, threads_for, train_on

    train_on(device)
    say = make_console().print
    games = _environments(env, envs)
    agent, example = _agent(policy, games, trust)
    torch.manual_seed(max(seed, 0))
    ee = exitkit.attach(agent, example, every=every, method=method, head=head)
    given: Any = {"acting": acting}  # checked by clone
    with computing_with(threads_for(agent, example, threads, say)):
        exitkit.rl.clone(ee, games, steps, seed=seed, output_dir=out / "training", **given)
    ee.save_pretrained(out / "exits")
    say(f"{ee!r}\nWritten to {out / 'exits'}/")


def evaluate(
    policy: Policy,
    env: Env,
    exits: Annotated[Path, typer.Option(help="Folder of exits, such as OUT/exits of exitkit rl clone")],
    out: Annotated[Path, typer.Option(help="Folder for returns.json and returns.png")],
    thresholds: Annotated[str, typer.Option(help="Comma-separated τ")] = "0.3,0.5,0.7,0.9,0.99,2",
    episodes: Annotated[int, typer.Option(help="Whole episodes at each τ")] = 100,
    envs: Envs = 8,
    disagreement: Annotated[bool, typer.Option("--disagreement", help="Ask the policy too, at every step")] = False,
    seed: Annotated[int, typer.Option(help="Of the environments")] = 0,
    trust: Trust = False,
    threads: Threads = None,
) -> None:
    """Play a policy with exits at several τ; print and write return against compute."""
    taus = _thresholds(thresholds)
    check_least(envs=envs, episodes=episodes)
    check_folder(out)
    import exitkit
    from exitkit.cli.machine import computing_with, threads_for
    from exitkit.common.files import replacing
    from exitkit.common.schema import to_json

    say = make_console().print
    games = _environments(env, envs)
    agent, example = _agent(policy, games, trust)
    ee = exitkit.MultiExitModel.from_pretrained(agent, exits, example)
    with computing_with(threads_for(agent, example, threads, say)):
        result = exitkit.rl.returns(ee, games, taus, episodes, disagreement=disagreement, seed=seed)
    say(result.table(), soft_wrap=True)
    with replacing(out / "returns.json") as temporary:
        temporary.write_text(to_json(result.to_dict(), indent=1), encoding="utf-8")
    result.plot(out / "returns.png")
    say(f"Written to {out}/: returns.json, returns.png")


def _thresholds(text: str) -> list[float]:
    try:
        taus = [float(tau) for tau in text.split(",")]
    except ValueError:
        taus = []
    if not taus or not all(map(math.isfinite, taus)):
        raise ArgumentError(f"--thresholds {text!r} must be numbers, such as 0.5,0.9,2")
    return taus


def _environments(name: str, count: int) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ExitkitError("exitkit rl needs gymnasium: pip install 'exitkit[rl]'") from error
    try:
        return gymnasium.make_vec(name, num_envs=count)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "no message")
        raise ArgumentError(
            f"--env {name!r} cannot be made ({reason}); give a gymnasium id, MODULE:ID where a module registers it"
        ) from error


def _agent(path: Path, games: Any, trust: bool) -> tuple[nn.Module, Tensor]:
    """The policy as a backbone, and observations as it takes them."""
    import torch

    from exitkit import rl

    agent = rl.policy(rl.load_policy(path, games, trust=trust))
    observations, _ = games.reset(seed=0)
    return agent, torch.as_tensor(observations)


add(app, clone, None, "rl clone --policy a.zip --env CartPole-v1 --out a")
add(
    app,
    evaluate,
    None,
    "rl evaluate --policy a.zip --env CartPole-v1 --exits a/exits --out a",
)
