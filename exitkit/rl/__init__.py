"""Policies with exits: behavioural cloning in environments, and return against compute. Needs the extra ``exitkit[rl]``."""

from exitkit.rl.cloning import clone
from exitkit.rl.environments import EnvironmentFailedError
from exitkit.rl.episodes import Episodes
from exitkit.rl.evaluation import ReturnPoint, Returns, plot_returns, returns
from exitkit.rl.policies import policy
from exitkit.rl.policy_files import load_policy

__all__ = [
    "EnvironmentFailedError",
    "Episodes",
    "ReturnPoint",
    "Returns",
    "clone",
    "load_policy",
    "plot_returns",
    "policy",
    "returns",
]
