"""Return against compute: a policy with exits, played through the engine at several thresholds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from exitkit.common.checks import Count, Index, check
from exitkit.common.errors import ArgumentError
from exitkit.engine import Engine, compile
from exitkit.evaluation.metrics import Interval
from exitkit.evaluation.plots import labelled, new_figure, write_figure
from exitkit.methods.policy import ExitPolicy, Threshold
from exitkit.multi_exit.model import MultiExitModel
from exitkit.rl.environments import EnvironmentFailedError, Games
from exitkit.rl.episodes import Choose, Chosen, Episodes, play, policy_itself
from exitkit.surgery.capturing import evaluation_mode


@dataclass(frozen=True)
class ReturnPoint:
    """Episodes at one exit policy; what takes a threshold takes the point itself.

    Attributes:
        policy: when an action is taken early.
        episodes: as they were played.
        mean: return, with a 95% interval over episodes.
        cost: average MACs per action, as a share of the policy's without exits, likewise.
        disagreement: how often the action was another than the policy's, on the states that these exits led to, likewise;
            None where it was not asked for.
    """

    policy: ExitPolicy
    episodes: Episodes
    mean: Interval
    cost: Interval
    disagreement: Interval | None

    @property
    def milliseconds(self) -> float:
        """Measured time per action."""
        return self.episodes.milliseconds


@dataclass(frozen=True)
class Returns:
    """Return against compute, and beside it the policy without exits, in episodes from the same seeds.

    Attributes:
        name: of the method.
        points: in the order of the thresholds given.
        backbone: the policy's own episodes.
    """

    name: str
    points: tuple[ReturnPoint, ...]
    backbone: Episodes

    why_not_outputs: ClassVar[str] = (
        "which states a policy comes to depends on τ, so that no threshold can be tested on states that another one led to, "
        "as a guarantee needs. Read off the returns themselves, which have intervals, and ask for disagreement=True"
    )

    def table(self) -> str:
        """Return, cost, time and exits at each threshold, as text."""
        exits = len(self.points[0].episodes.shares())
        whole = self.backbone.mean_return()
        lines = [
            f"{'τ':>8}{'return':>11}{'95% interval':>21}{'MACs':>9}{'ms':>9}{'differs':>9}  actions chosen at exit 0 … "
            f"{exits - 1}"
        ]
        lines.append(f"{'policy':>8}{_shown(whole)}{1:>9.1%}{self.backbone.milliseconds:>9.3f}{'':>9}")
        for point in self.points:
            differs = "-" if point.disagreement is None else f"{point.disagreement.value:.1%}"
            shares = " ".join(f"{share:.0%}" for share in point.episodes.shares())
            lines.append(
                f"{point.policy.shown():>8}{_shown(point.mean)}{point.cost.value:>9.1%}{point.milliseconds:>9.3f}"
                f"{differs:>9}  {shares}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Every episode's return and exits at each threshold, and what follows from them, as values that JSON holds."""
        return {
            "method": self.name,
            "policy": _plain(self.backbone) | {"mean": self.backbone.mean_return()},
            "points": [
                {
                    "thresholds": list(point.policy.thresholds),
                    "criterion": point.policy.criterion,
                    "mean": point.mean,
                    "cost": point.cost,
                    "disagreement": point.disagreement,
                    **_plain(point.episodes),
                }
                for point in self.points
            ],
        }

    def plot(self, path: str | Path) -> None:
        """Write the picture of return against average MACs (Zero Time Waste, figure 3) to ``path`` (png, svg or pdf)."""
        plot_returns([self], path)


def returns(
    ee: MultiExitModel,
    env: Any,
    thresholds: Iterable[Threshold],
    episodes: int = 100,
    *,
    disagreement: bool = False,
    seed: int = 0,
) -> Returns:
    """Play whole episodes through the engine at several thresholds; the likeliest action is taken.

    Every threshold, and the policy without exits, begins with the same seeds. Returns are of the rewards that the environment
    gives: where a wrapper clips them or ends an episode with a life, so do these numbers.

    Args:
        ee: a policy with exits.
        env: as for :func:`exitkit.rl.clone`; all its environments act in one batch.
        thresholds: τ, or what else :func:`exitkit.compile` takes, one after another.
        episodes: at each threshold, divided evenly among the environments.
        disagreement: also ask the policy at every step what it would have done.
        seed: of the environments.

    Raises:
        ArgumentError: an environment that does not fit the policy, no thresholds, options out of range.
        EnvironmentFailedError: the environment raised; the message says at which threshold, in which episode.
        ExitkitError: gymnasium is not installed.
    """
    check("episodes", episodes, Count)
    check("seed", seed, Index)
    check("disagreement", disagreement, bool)
    games = Games(env, ee)
    policies = [ee.policy_for(threshold) for threshold in _listed(thresholds)]
    engine = compile(ee, policies[0])
    costs = [exit_.macs_fraction for exit_ in ee.exits]
    points = []
    with evaluation_mode(ee):
        for policy in policies:
            try:
                played = play(games, through(engine.at(policy)), episodes, seed, disagreement)
            except EnvironmentFailedError as error:
                raise EnvironmentFailedError(f"at τ = {policy.shown()} {error}") from error
            points.append(ReturnPoint(policy, played, played.mean_return(), played.cost(costs), played.disagreement()))
        return Returns(ee.method.name, tuple(points), play(games, policy_itself(games), episodes, seed))


def _plain(episodes: Episodes) -> dict[str, Any]:
    return {
        "returns": episodes.totals.tolist(),
        "exits": episodes.exits.tolist(),
        "milliseconds": episodes.milliseconds,
    }


def _listed(thresholds: Any) -> list[Any]:
    several = isinstance(thresholds, Iterable) and not isinstance(thresholds, str | bytes)
    if not several or not (listed := list(thresholds)):
        raise ArgumentError(f"thresholds={thresholds!r} must be a list of at least one τ, such as [0.5, 0.9, 2]")
    return listed


def _shown(value: Interval) -> str:
    between = f"({value.low:,.2f} … {value.high:,.2f})"
    return f"{value.value:>11,.2f}{between:>21}"


def through(engine: Engine) -> Choose:
    """The likeliest action of the engine's answer."""

    def choose(inputs: tuple[Tensor, ...]) -> Chosen:
        prediction = engine(*inputs)
        return Chosen(prediction.logits.argmax(1).cpu().numpy(), prediction.exit.cpu().numpy())

    return choose


def plot_returns(results: Iterable[Returns], path: str | Path) -> None:
    """Return against average MACs of several methods, with 95% intervals; the policy without exits is the dashed line."""
    figure = new_figure()
    axes = labelled(figure.add_subplot(), "average MACs per action (share of the policy's)", "mean return")
    for number, result in enumerate(results):
        points = sorted(result.points, key=lambda point: point.cost.value)
        costs = [point.cost.value for point in points]
        means = [point.mean.value for point in points]
        spread = [[p.mean.value - p.mean.low for p in points], [p.mean.high - p.mean.value for p in points]]
        axes.errorbar(costs, means, spread, marker="o", markersize=3, linewidth=1.5, capsize=2, label=result.name)
        if number == 0:
            whole = result.backbone.mean_return()
            axes.axhline(whole.value, color="0.4", linestyle="--", linewidth=1, label="policy")
            axes.axhspan(whole.low, whole.high, color="0.4", alpha=0.12, linewidth=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    write_figure(figure, path)
