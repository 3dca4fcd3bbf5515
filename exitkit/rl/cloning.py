"""Behavioural cloning of a policy into its own exits, on the states that the exits themselves come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from exitkit.common.checks import Count, Positive, check
from exitkit.engine import compile
from exitkit.multi_exit.model import MultiExitModel
from exitkit.rl.environments import Games
from exitkit.rl.episodes import play
from exitkit.rl.evaluation import through
from exitkit.rl.rollouts import Acting, Plan, Rollouts
from exitkit.surgery.capturing import evaluation_mode
from exitkit.training import Distillation, Epoch, Loss, Trainer
from exitkit.training.feature_cache.cache import Data

BEHAVIOUR = Loss(distillation=Distillation("last", confidence_limit=None, divergence="kl"))
"""KL(policy ‖ exit), summed over the exits: the mean over states, the sum over actions."""

_RATE_FALLS = (0.1, 0.75)
"""At these shares of the run the learning rate is divided by ten, as in the code of Zero Time Waste."""


def clone(
    ee: MultiExitModel,
    env: Any,
    steps: int,
    *,
    rollout: int = 128,
    epochs: int = 5,
    acting: Acting = "exits",
    batch_size: int = 64,
    lr: float = 1e-2,
    seed: int = 0,
    eval_env: Any = None,
    eval_every: int = 50,
    eval_episodes: int = 10,
    output_dir: str | Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    show_progress: bool = True,
) -> list[Epoch]:
    """Teach the exits of a policy to act as it does (Zero Time Waste, section 4.3 and appendix A.2); they change in place.

    In rounds: every environment is played for ``rollout`` steps, in which one exit's most likely action is taken, and each
    state that an action was asked for in is kept; then the exits learn the policy's action distribution there, by KL
    divergence, in ``epochs`` passes. The policy is frozen and runs once for each state. At the end the method's ensemble is
    fitted on new states, a tenth as many.

    Args:
        ee: a policy with exits, from :func:`exitkit.attach`.
        env: a gymnasium vector environment (``gymnasium.make_vec(id, num_envs=8)``) with the wrappers that the policy was
            trained with; a single environment is played alone.
        steps: in all environments together, rounded to whole rounds; 10⁶ in the paper.
        rollout: steps of each environment in a round.
        epochs: passes over a round's states.
        acting: whose action is taken, drawn uniformly for every environment and step: ``"exits"``, as the paper says, with
            the answers of their heads; ``"exits+policy"``, the policy being one of those drawn, as its code has it; or
            ``"policy"`` always, the states that ordinary distillation sees.
        batch_size: states in one step of the optimiser.
        lr: of Adam; divided by ten after a tenth and after three quarters of the rounds.
        seed: of environments, draws and order.
        eval_env: another such environment, in which each exit plays alone from time to time: its mean return is in the record.
        eval_every: rounds between two such times.
        eval_episodes: that each exit plays.
        output_dir: where a checkpoint and a log go after every round, in which one round is one epoch.
        resume: as for :class:`exitkit.Trainer`. The environments are brought back to where they were by the actions taken.
        show_progress: a table or a line for every round: loss of each exit, how often its action was the policy's, and the
            mean return of the episodes that ended.

    Returns:
        The record of every round.

    Raises:
        ArgumentError: an environment of other observations or actions than the policy's, a recurrent policy, missing masks of
            legal actions, or options out of range.
        EnvironmentFailedError: the environment raised. What was played before is learned from first, and kept in
            ``output_dir``.
        ExitkitError: gymnasium is not installed.
    """
    check("lr", lr, Positive)
    check("eval_every", eval_every, Count)
    check("eval_episodes", eval_episodes, Count)
    rollouts = Rollouts(Games(env, ee), Plan(steps, rollout, epochs, batch_size, acting, seed))
    if eval_env is not None:
        rollouts.watch = _each_alone(Games(eval_env, ee), eval_every, eval_episodes, seed)
    falls = sorted({max(1, round(share * rollouts.rounds)) for share in _RATE_FALLS})
    trainer = Trainer(
        ee,
        epochs=rollouts.rounds,
        lr=lr,
        milestones=falls,
        loss=BEHAVIOUR,
        seed=seed,
        output_dir=output_dir,
        resume=resume,
        show_progress=show_progress,
    )
    history = trainer.fit_on(Data(rollouts.view, rollouts, None))
    if rollouts.failure is not None:
        raise rollouts.failure
    return history


def _each_alone(games: Games, every: int, episodes: int, seed: int) -> Callable[[int], dict[str, float]]:
    """Mean returns of the exits, each acting alone, after every so many rounds."""
    ee, count = games.model, len(games.model.classifiers)

    def watch(rounds: int) -> dict[str, float]:
        if rounds % every:
            return {}
        found, engine = {}, compile(ee, 0.0)  # on the device that the trainer has chosen
        for m in range(count):
            alone = engine.at([math.inf] * m + [-math.inf] * (count - m))
            with evaluation_mode(ee):
                found[f"return/exit{m}"] = play(games, through(alone), episodes, seed).mean_return().value
        return found

    return watch
