"""Cloning a policy into its exits, and playing it through the engine, in environments of which everything is known."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import exitkit

gymnasium = pytest.importorskip("gymnasium", reason="environments need: pip install 'exitkit[rl]'")
from gymnasium import spaces  # noqa: E402

from exitkit.rl.cloning import BEHAVIOUR  # noqa: E402
from exitkit.rl.environments import Games  # noqa: E402
from exitkit.rl.episodes import Episodes, interval  # noqa: E402
from exitkit.rl.rollouts import Plan, Rollouts  # noqa: E402
from exitkit.training.objective import Objective  # noqa: E402
from tests.games import ACTIONS, Walk, actor, always, terminated, walks, with_exits  # noqa: E402
from tests.toy import noisy  # noqa: E402

QUIET: dict[str, Any] = {"show_progress": False, "rollout": 8, "epochs": 2, "batch_size": 8}


def collected(ee: exitkit.MultiExitModel, env: Any, rollout: int = 20, acting: Any = "exits") -> list[torch.Tensor]:
    """One rollout as the heads and the policy see it: the exits' features, and the policy's logits, shuffled."""
    rollouts = Rollouts(Games(env, ee), Plan(10_000, rollout, 1, 7, acting, 0))
    batches = [parts for (parts,) in rollouts]
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def rows(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """In an order of their own."""
    return np.array(sorted(tensor.tolist()))


@pytest.mark.parametrize("same_step", [False, True], ids=["next step", "same step"])
def test_what_is_stored_is_the_policys_distribution_on_the_states_reached(same_step: bool) -> None:
    """States as the environments wrote them down: those that an action was taken in, of each environment its own."""
    ee, env = with_exits(), walks(3, same_step=same_step)
    *_, logits = collected(ee, env)
    seen = torch.from_numpy(np.concatenate([game.seen for game in env.envs]))
    assert Counter(seen[:, 0].tolist()).keys() == {0.0, 1.0, 2.0}
    with torch.no_grad():
        assert np.allclose(rows(logits), rows(actor()(seen)), atol=1e-5)
    taken = [(20 // 6) * 5 + 20 % 6, 20][same_step]  # episodes of five steps, and one to begin anew
    assert len(logits) == 3 * taken
    assert not (seen[:, 1] == 5).any()  # nothing is chosen where an episode is over


def test_each_environment_is_given_the_action_for_its_own_observation() -> None:
    """In the published code all environments get the first one's."""
    ee = noisy(with_exits())
    env = walks(2)
    collected(ee, env)
    with torch.no_grad():
        for game in env.envs:
            heads = [
                logits.argmax(1).numpy() for logits in ee.run_heads(torch.from_numpy(np.stack(game.seen)))[1][:-1]
            ]
            assert all(action in answers for action, *answers in zip(game.taken, *heads, strict=True))
    first, second = (game.taken for game in env.envs)
    assert first != second


@pytest.mark.parametrize(("acting", "count"), [("exits", 3), ("exits+policy", 4), ("policy", 1)])
def test_exits_are_drawn_uniformly_for_every_environment_and_step(acting: str, count: int) -> None:
    """Exit m always takes action m, the policy action 3, so that actions say who acted."""
    env = walks(4, length=1_000)
    collected(always(with_exits("sdn")), env, rollout=300, acting=acting)
    taken = np.array([game.taken for game in env.envs])
    expected = {"exits": {0, 1, 2}, "exits+policy": {0, 1, 2, 3}, "policy": {3}}[acting]
    assert set(taken.ravel().tolist()) == expected
    shares = np.bincount(taken.ravel(), minlength=4)[sorted(expected)] / taken.size
    assert np.abs(shares - 1 / count).max() < 0.05  # 1,200 draws: four standard deviations
    if count > 1:
        assert all(0.1 < (taken[0] == other).mean() < 0.6 for other in taken[1:])  # drawn for each by itself


def test_the_loss_is_kl_to_the_policy() -> None:
    policy, student = torch.randn(9, 5), torch.randn(9, 5, requires_grad=True)
    again = student.detach().clone().requires_grad_()
    Objective(BEHAVIOUR, 1).losses([student, policy], None, (0,)).sum().backward()
    kl_divergence(Categorical(logits=policy), Categorical(logits=again)).mean().backward()
    torch.testing.assert_close(student.grad, again.grad)


def test_cloned_exits_act_as_the_policy() -> None:
    ee = with_exits()
    backbone = {name: value.clone() for name, value in ee.backbone.state_dict().items()}
    history = exitkit.rl.clone(ee, walks(4), 4_000, rollout=32, show_progress=False)
    assert len(history) == round(4_000 / (4 * 32))
    assert all(torch.equal(value, backbone[name]) for name, value in ee.backbone.state_dict().items())
    x = torch.from_numpy(np.stack([Walk(i % 4).reset(seed=i)[0] for i in range(400)]))
    with torch.no_grad():
        wanted = actor()(x).argmax(1)
        agreement = [(logits.argmax(1) == wanted).double().mean().item() for logits in ee.eval()(x).logits]
    assert min(agreement) > 0.9
    assert history[0].measured["agreement/exit0"] < 0.8 < history[-1].measured["agreement/exit0"]
    assert all(combiner.log_prior.abs().max() > 0 for combiner in ee.combiners)  # the ensemble was fitted


def run(output: Path | None, env: Any, **options: Any) -> tuple[exitkit.MultiExitModel, list[Any]]:
    ee = with_exits()
    return ee, exitkit.rl.clone(ee, env, 3 * 8 * 12, output_dir=output, **{**QUIET, **options})


@pytest.mark.parametrize("step", [3, 40, 60], ids=["in the first round", "later", "and later"])
def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, step: int) -> None:
    whole, history = run(None, walks(3))
    with pytest.raises(SystemExit, match="143"):
        run(tmp_path, walks(3, at={step: terminated}))
    again, continued = run(tmp_path, walks(3))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert [record.loss for record in continued] == [record.loss for record in history]
    assert [record.measured for record in continued] == [record.measured for record in history]


def test_the_log_has_returns_and_agreement(tmp_path: Path) -> None:
    _, history = run(tmp_path, walks(3))
    with (tmp_path / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["return"]) == history[-1].measured["return"]
    assert 0 <= float(last["agreement/exit2"]) <= 1


def test_each_exit_plays_alone_from_time_to_time() -> None:
    """Exit m always takes action m: its return is how often the observation names that action."""
    ee, other = always(with_exits("sdn")), Walk(length=7)
    history = exitkit.rl.clone(ee, walks(2), 64, eval_env=other, eval_every=2, eval_episodes=3, lr=1e-9, **QUIET)
    names = {f"return/exit{m}" for m in range(3)}
    assert [names <= set(record.measured) for record in history] == [False, True, False, True]
    seen, taken = np.array(other.seen), np.array(other.taken)
    named = (np.abs(seen[:, 3]) * 10).astype(int) % ACTIONS
    first = [slice(21 * m, 21 * (m + 1)) for m in range(3)]  # three episodes of seven steps each
    assert [set(taken[rows]) for rows in first] == [{0}, {1}, {2}]
    wanted = [(named[rows] == taken[rows]).sum() / 3 for rows in first]
    assert [history[1].measured[f"return/exit{m}"] for m in range(3)] == pytest.approx(wanted)


def test_a_checkpoint_is_continued_with_the_same_plan_alone(tmp_path: Path) -> None:
    run(tmp_path, walks(3))
    with pytest.raises(exitkit.ArgumentError, match="acting"):
        run(tmp_path, walks(3), acting="policy")


def test_an_environment_that_cannot_be_brought_back_is_told_of(tmp_path: Path) -> None:
    """One whose course does not follow from its seed."""
    with pytest.raises(SystemExit):
        run(tmp_path, walks(3, at={40: terminated}))
    longer = walks(3, length=4)
    with pytest.warns(UserWarning, match="did not come to the same state"):
        _, history = run(tmp_path, longer)
    assert len(history) == 12


def fail() -> None:
    raise ZeroDivisionError("no such room")


@pytest.mark.parametrize("where", ["in a round", "in the ensemble's"])
def test_an_environment_that_raises_loses_nothing(tmp_path: Path, where: str) -> None:
    """Of 12 rounds of 8 steps, every sixth of which begins an episode anew: the seventh, or the one after the last."""
    count = 42 if where == "in a round" else 12 * 8 // 6 * 5 + 3
    env = gymnasium.vector.SyncVectorEnv([lambda: Walk(0), lambda: Walk(1, at={count: fail}), lambda: Walk(2)])
    started = {name: value.clone() for name, value in with_exits().state_dict().items()}
    ee = with_exits()
    with pytest.raises(
        exitkit.rl.EnvironmentFailedError,
        match=rf"raised ZeroDivisionError in step {count % 5} of episode {count // 5} of environment 1 .*no such room",
    ):
        exitkit.rl.clone(ee, env, 3 * 8 * 12, output_dir=tmp_path, **QUIET)
    assert any(not torch.equal(value, started[name]) for name, value in ee.state_dict().items())
    _, history = run(tmp_path, walks(3))
    assert len(history) == 12


def test_a_failure_at_once_is_told_at_once() -> None:
    with pytest.raises(exitkit.rl.EnvironmentFailedError, match="step 0 of episode 0"):
        run(None, walks(1, at={0: fail}))


def own_returns(ee: exitkit.MultiExitModel, env: Any, episodes: int, seed: int) -> list[float]:
    """Returns of the policy's own argmax actions, played without any of the code under test but for its seeds."""
    games = Games(env, ee)
    games.reset(seed, 1)
    observations, each = games.inputs[0], episodes // env.num_envs
    totals: list[list[float]] = [[0.0] for _ in range(env.num_envs)]
    over = np.zeros(env.num_envs, bool)
    while min(map(len, totals)) <= each:
        with torch.no_grad():
            actions = ee.backbone(observations).argmax(1).numpy()
        observed, rewards, terminated, truncated, _ = env.step(actions)
        for i in np.flatnonzero(~over):
            totals[i][-1] += rewards[i]
            if terminated[i] or truncated[i]:
                totals[i].append(0.0)
        over, observations = (terminated | truncated) & ~over, torch.from_numpy(observed)
    return sorted(total for several in totals for total in several[:each])


def test_above_one_the_returns_are_the_policys_own() -> None:
    ee = noisy(with_exits())
    result = exitkit.rl.returns(ee, walks(3), [2.0, 0.5], episodes=12, seed=3, disagreement=True)
    wanted = own_returns(ee, walks(3), 12, 3)
    assert sorted(result.points[0].episodes.totals) == wanted
    assert sorted(result.backbone.totals) == wanted
    assert result.points[0].disagreement == (0, 0, 0)
    assert result.points[0].cost.value == pytest.approx(ee.exits[-1].macs_fraction)
    assert sorted(result.points[1].episodes.totals) != wanted


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6, 0.8, 2.0])
def test_masks_are_kept_at_every_threshold(threshold: float) -> None:
    """These environments raise at an action that is not legal, in cloning too."""
    ee = noisy(with_exits(masked=True))
    result = exitkit.rl.returns(ee, walks(3, masked=True), [threshold], episodes=30)
    assert len(result.points[0].episodes.totals) == 30
    exitkit.rl.clone(ee, walks(3, masked=True), 24, **QUIET)


def test_returns_costs_and_disagreement_are_what_happened() -> None:
    """Exit 0 always takes action 0: every state is answered there, and the policy would have taken action 3."""
    ee, env = always(with_exits("sdn")), walks(2)
    result = exitkit.rl.returns(ee, env, [0.5], episodes=10, disagreement=True)
    point = result.points[0]
    assert point.cost.value == pytest.approx(ee.exits[0].macs_fraction)
    assert point.episodes.exits.sum(0).tolist() == [50, 0, 0, 0]
    assert point.disagreement == (1, 1, 1)
    expected = [float(int(abs(x[3]) * 10) % ACTIONS == 0) for game in env.envs for x in game.seen]
    assert point.mean.value * 10 <= sum(expected)  # the backbone's episodes are among those written down
    assert point.milliseconds > 0
    assert exitkit.compile(ee, point).thresholds == (0.5,) * 3


def test_each_environment_plays_its_share_so_that_short_episodes_are_not_preferred() -> None:
    env = gymnasium.vector.SyncVectorEnv([lambda: Walk(0, length=2), lambda: Walk(1, length=20)])
    result = exitkit.rl.returns(with_exits(), env, [2.0], episodes=11)
    assert sorted(result.points[0].episodes.exits.sum(1)) == [2] * 6 + [20] * 5


def test_intervals_are_over_whole_episodes() -> None:
    """Steps of one episode are no samples: four episodes of 1,000 steps give a wide interval."""
    generator = np.random.default_rng(0)
    wrong = generator.integers(0, 2, 400) * 10.0
    means = [wrong[generator.integers(0, 400, 400)].mean() for _ in range(4_000)]
    found = interval(wrong, np.ones(400))
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.1)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.1)
    few = Episodes(np.zeros(4), np.array([[1000, 0], [1000, 0], [0, 1000], [0, 1000]]), None, 1.0).cost([0.5, 1.0])
    assert few.low < 0.6 < 0.9 < few.high


def test_a_picture_and_a_table(tmp_path: Path) -> None:
    ee = noisy(with_exits())
    result = exitkit.rl.returns(ee, Walk(), [0.5, 2], episodes=4)
    result.plot(tmp_path / "returns.png")
    assert (tmp_path / "returns.png").stat().st_size > 5_000
    lines = str(result).splitlines()
    assert len(lines) == 4
    assert re.search(r"2\s+\d+\.\d\d\s+\(", lines[-1])


def test_a_threshold_is_not_chosen_on_returns() -> None:
    result = exitkit.rl.returns(with_exits(), Walk(), [0.5], episodes=2)
    with pytest.raises(exitkit.ArgumentError, match="which states a policy comes to depends on τ"):
        exitkit.choose_threshold(result)  # type: ignore[arg-type]


class Other(Walk):
    def __init__(self, observations: Any = None, actions: Any = None) -> None:
        super().__init__()
        self.observation_space = observations or self.observation_space
        self.action_space = actions or self.action_space


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            lambda: Other(spaces.Box(-1, 1, (5,), np.float32)),
            r"observations are Box\(.*\(5,\).*takes float32 of shape \(4,\)",
        ),
        (lambda: Other(spaces.Dict({"a": spaces.Discrete(2)})), "observations are Dict"),
        (lambda: Other(actions=spaces.Discrete(7)), r"actions are Discrete\(7\), the policy chooses among 4"),
        (lambda: Other(actions=spaces.Box(-1, 1, (4,))), "continuous actions are not supported"),
        (lambda: "CartPole-v1", "env is str; give a gymnasium environment"),
        (
            lambda: gymnasium.vector.SyncVectorEnv([Walk], autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED),
            "NEXT_STEP",
        ),
    ],
    ids=["observations", "dict", "actions", "continuous", "name", "no reset"],
)
@pytest.mark.parametrize("call", [exitkit.rl.clone, exitkit.rl.returns])
def test_environments_for_other_policies_are_refused(call: Any, env: Callable[[], Any], words: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=words):
        call(with_exits(), env(), 100 if call is exitkit.rl.clone else [0.5])


def test_missing_and_empty_masks_are_refused() -> None:
    ee = with_exits(masked=True)
    with pytest.raises(exitkit.ArgumentError, match=r"gave no info\['action_mask'\]"):
        exitkit.rl.returns(ee, Walk(), [0.5])

    class Nothing(Walk):
        def _observe(self) -> Any:
            observation, _ = super()._observe()
            return observation, {"action_mask": np.full(ACTIONS, int(self.clock != 2), np.int8)}

    with pytest.raises(exitkit.ArgumentError, match="allows no action in step 2 of episode 0 of environment 0"):
        exitkit.rl.returns(ee, Nothing(), [0.5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"acting": "nobody"}, "acting='nobody'"),
        ({"rollout": 1}, "rollout=1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=re.escape(words)):
        exitkit.rl.clone(with_exits(), Walk(), 100, **options)


@pytest.mark.parametrize("thresholds", [[], 0.5, "0.5"])
def test_thresholds_are_a_list(thresholds: Any) -> None:
    with pytest.raises(exitkit.ArgumentError, match="thresholds="):
        exitkit.rl.returns(with_exits(), Walk(), thresholds)


def test_several_choices_reach_the_environment() -> None:
    class Two(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.MultiDiscrete([2, 2])
            self.pairs: list[list[int]] = []

        def step(self, action: Any) -> Any:
            self.pairs.append(action.tolist())
            return super().step(2 * action[0] + action[1])

    env = Two()
    exitkit.rl.returns(always(with_exits("sdn")), env, [2.0], episodes=1)
    assert env.pairs == [[1, 1]] * len(env.pairs)


def test_actions_may_begin_elsewhere_than_at_zero() -> None:
    env = Other(actions=spaces.Discrete(ACTIONS, start=5))
    exitkit.rl.returns(always(with_exits("sdn")), env, [2.0], episodes=1)
    assert set(env.taken) == {8}
