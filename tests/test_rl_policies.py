"""Policies as backbones: the same distributions as Stable-Baselines3's own, cut where exits go; masks of legal actions."""

from __future__ import annotations

import itertools
import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import exitkit

gymnasium = pytest.importorskip("gymnasium", reason="policies need: pip install 'exitkit[rl]'")
sb3 = pytest.importorskip("stable_baselines3", reason="policies need: pip install 'exitkit[rl]'")
from gymnasium import spaces  # noqa: E402

from exitkit.exits.legal_actions import LegalActions  # noqa: E402
from exitkit.rl.cloning import BEHAVIOUR  # noqa: E402
from tests.games import ACTIONS, ConvGru, Walk, actor, with_exits  # noqa: E402


class Spaces(gymnasium.Env):  # type: ignore[misc,name-defined]
    """An environment that is nothing but its spaces."""

    def __init__(self, observations: Any, actions: Any) -> None:
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


PIXELS, NUMBERS = spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Box(-1, 1, (5,), np.float32)


def ppo(kind: str, observations: Any, actions: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return sb3.PPO(kind, Spaces(observations, actions), n_steps=8, batch_size=8, device="cpu", **options)


def observed(space: Any, count: int = 6) -> torch.Tensor:
    space.seed(0)
    return torch.as_tensor(np.stack([space.sample() for _ in range(count)]))


@pytest.mark.parametrize(
    ("kind", "observations"),
    [("CnnPolicy", PIXELS), ("MlpPolicy", NUMBERS), ("MlpPolicy", spaces.Discrete(7))],
    ids=["pixels", "numbers", "discrete"],
)
def test_a_policy_is_its_own_distribution(kind: str, observations: Any) -> None:
    model = ppo(kind, observations, spaces.Discrete(3))
    agent, x = exitkit.rl.policy(model), observed(observations)
    theirs = model.policy.get_distribution(x)
    ours = agent(x).log_softmax(-1)
    for action in range(3):
        torch.testing.assert_close(ours[:, action], theirs.log_prob(torch.full((6,), action)))
    ee = exitkit.attach(agent, x[:2], every=1, head="1L")
    assert torch.equal(exitkit.compile(ee, 2.0)(x).logits, agent(x))


def test_several_choices_are_their_combinations() -> None:
    model = ppo("MlpPolicy", NUMBERS, spaces.MultiDiscrete([3, 2, 2]))
    agent, x = exitkit.rl.policy(model), observed(NUMBERS)
    theirs, ours = model.policy.get_distribution(x), agent(x).log_softmax(-1)
    combinations = list(itertools.product(range(3), range(2), range(2)))
    assert ours.shape == (6, len(combinations))
    for number, combination in enumerate(combinations):
        torch.testing.assert_close(ours[:, number], theirs.log_prob(torch.tensor([combination] * 6)))


def test_a_module_is_a_policy_as_it_is() -> None:
    network = actor()
    network.policy = nn.Identity()  # a part of it by that name, as others may have
    assert exitkit.rl.policy(network) is network


def test_the_value_head_stays_out() -> None:
    model = ppo("MlpPolicy", NUMBERS, spaces.Discrete(3))
    own = {id(parameter) for parameter in exitkit.rl.policy(model).parameters()}
    assert own < {id(parameter) for parameter in model.policy.parameters()}
    value = (model.policy.value_net, model.policy.mlp_extractor.value_net)
    assert not own & {id(parameter) for part in value for parameter in part.parameters()}


def test_nature_cnn_is_the_network_of_stable_baselines3() -> None:
    network = exitkit.models.nature_cnn(6).eval()
    model = ppo("CnnPolicy", PIXELS, spaces.Discrete(6))
    theirs = [m for m in exitkit.rl.policy(model).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for own, other in zip([m for m in network if isinstance(m, nn.Conv2d | nn.Linear)], theirs, strict=True):
        own.load_state_dict(other.state_dict())
    x = observed(PIXELS)
    assert torch.equal(network(x), exitkit.rl.policy(model)(x))


def test_nature_cnn_is_cut_before_each_next_layer() -> None:
    """Costs by hand: 20², 9² and 7² places of filters over 8²·4, 4²·32 and 3²·64 numbers, then 3,136 · 512 and 512 · 6."""
    ee = exitkit.attach(exitkit.models.nature_cnn(6), observed(PIXELS, 2), every=1, method="sdn", head="1L")
    assert [boundary.name for boundary in ee.boundaries] == ["relu1", "relu2", "relu3"]  # never after the last block
    stages = [400 * 32 * 256, 81 * 64 * 512, 49 * 64 * 576, 3136 * 512, 512 * 6]
    assert [boundary.macs for boundary in ee.boundaries] == np.cumsum(stages)[:3].tolist()
    assert ee.anatomy.macs == sum(stages)


@pytest.mark.parametrize(
    ("observations", "actions", "words"),
    [
        (NUMBERS, spaces.Box(-1, 1, (2,)), "Continuous"),
        (NUMBERS, spaces.MultiBinary(3), "MultiBinary"),
        (NUMBERS, spaces.MultiDiscrete([64, 64]), "4,096 combinations"),
        (spaces.MultiBinary(3), spaces.Discrete(2), "one array"),
    ],
)
def test_policies_of_other_kinds_are_refused_by_name(observations: Any, actions: Any, words: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=words):
        exitkit.rl.policy(ppo("MlpPolicy", observations, actions))


def test_a_policy_of_values_is_refused() -> None:
    model = sb3.DQN("MlpPolicy", Spaces(NUMBERS, spaces.Discrete(3)), buffer_size=10, device="cpu")
    with pytest.raises(exitkit.ArgumentError, match="DQNPolicy"):
        exitkit.rl.policy(model)
    with pytest.raises(exitkit.ArgumentError, match="give a Stable-Baselines3 actor-critic"):
        exitkit.rl.policy(3)


def test_a_recurrent_policy_is_refused(real_data: Path) -> None:
    from safetensors.torch import load_file

    file = real_data / "rl" / "pong_conv_gru.safetensors"
    if not file.exists():
        pytest.skip(f"no {file}")
    pong = ConvGru()
    pong.load_state_dict(load_file(str(file)))
    with pytest.raises(exitkit.ArgumentError, match=r"recurrent \(gru is GRUCell\): .* leave its state behind"):
        exitkit.rl.policy(pong)
    ee = exitkit.attach(pong.eval(), torch.randn(2, 1, 80, 80), every=1, head="1L", method="sdn")
    with pytest.raises(exitkit.ArgumentError, match="recurrent"):
        exitkit.rl.returns(ee, Walk(), [0.5])


def test_illegal_actions_have_no_probability_at_any_exit() -> None:
    ee = with_exits(masked=True).eval()
    x, legal = torch.randn(200, 4), torch.rand(200, ACTIONS) < 0.5
    legal[torch.arange(200), torch.randint(ACTIONS, (200,))] = True
    raw = actor()(x)
    for answer in ee(x, legal).logits:
        assert answer.softmax(-1)[~legal].max() == 0
        torch.testing.assert_close(answer.softmax(-1).sum(1), torch.ones(200))
    expected = torch.where(legal, raw, -torch.inf).softmax(-1)
    torch.testing.assert_close(ee(x, legal).logits[-1].softmax(-1), expected)
    prediction = exitkit.compile(ee, 2.0)(x, legal)
    torch.testing.assert_close(prediction.score, expected.double().amax(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("method", ["ztw", "sdn", "pbee"])
def test_the_engine_takes_the_actions_of_the_training_view(method: str, threshold: float) -> None:
    ee = with_exits(method, masked=True).eval()
    for parameter in ee.classifiers.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    x, legal = torch.randn(64, 4), torch.rand(64, ACTIONS) < 0.6
    legal[:, 0] = True
    answers = torch.stack([logits.log_softmax(-1) for logits in ee(x, legal).logits], 1)
    sure = ee.method.score.score(answers) > (threshold if method != "pbee" else 1)
    sure[:, -1] = True
    left = sure.int().argmax(1)
    prediction = exitkit.compile(ee, threshold if method != "pbee" else 1)(x, legal)
    assert torch.equal(prediction.exit, left)
    assert torch.equal(prediction.logits.argmax(1), answers[torch.arange(64), left].argmax(1))


def test_masked_exits_are_saved_and_cached_as_others(tmp_path: Path) -> None:
    ee = with_exits(masked=True)
    x, legal = torch.randn(96, 4), torch.rand(96, ACTIONS) < 0.6
    legal[:, 0] = True
    rows = TensorDataset(x, legal)
    loader: Any = DataLoader(
        rows, 16, collate_fn=lambda some: (tuple(map(torch.stack, zip(*some, strict=True))), None)
    )
    twin = with_exits(masked=True)
    for model, cache in ((ee, False), (twin, True)):
        exitkit.Trainer(model, epochs=2, loss=BEHAVIOUR, cache=cache, show_progress=False).fit(loader)
    assert all(torch.equal(a, b) for a, b in zip(ee.parameters(), twin.parameters(), strict=True))
    ee.save_pretrained(tmp_path / "exits")
    again = exitkit.MultiExitModel.from_pretrained(LegalActions(actor()), tmp_path / "exits", (x[:2], legal[:2]))
    assert all(torch.equal(a, b) for a, b in zip(ee(x, legal).logits, again(x, legal).logits, strict=True))


def test_methods_that_would_allow_illegal_actions_are_refused() -> None:
    for method in (exitkit.ZTW(ensemble="additive"), "gpf"):
        with pytest.raises(exitkit.ArgumentError, match="illegal actions"):
            with_exits(method, masked=True)


def saved(tmp_path: Path, **options: Any) -> tuple[Any, Path]:
    model = ppo("MlpPolicy", NUMBERS, spaces.Discrete(3), **options)
    model.save(tmp_path / "policy.zip")
    return model, tmp_path / "policy.zip"


def test_a_saved_policy_is_read_without_unpickling(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, path = saved(tmp_path)
    _poison(path, "observation_space", tmp_path / "ran")
    loaded = exitkit.rl.load_policy(path, Spaces(NUMBERS, spaces.Discrete(3)))
    assert not (tmp_path / "ran").exists()
    x = observed(NUMBERS)
    assert torch.equal(exitkit.rl.policy(loaded)(x), exitkit.rl.policy(model)(x))
    assert not [warning for warning in recwarn if "pickle" in str(warning.message)]


def test_pickled_options_are_read_with_a_warning_or_not_at_all(tmp_path: Path) -> None:
    kwargs = {"activation_fn": nn.ReLU, "net_arch": [8]}
    model, path = saved(tmp_path, policy_kwargs=kwargs)
    env, x = Spaces(NUMBERS, spaces.Discrete(3)), observed(NUMBERS)
    with pytest.warns(UserWarning, match=r"pickle, which can run any code.*trust=True \(exitkit rl: --trust\)"):
        loaded = exitkit.rl.load_policy(path, env)
    assert torch.equal(exitkit.rl.policy(loaded)(x), exitkit.rl.policy(model)(x))
    _poison(path, "policy_kwargs", tmp_path / "ran")
    loaded = exitkit.rl.load_policy(path, env, custom_objects={"policy_kwargs": kwargs})
    assert not (tmp_path / "ran").exists()
    assert torch.equal(exitkit.rl.policy(loaded)(x), exitkit.rl.policy(model)(x))


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _poison(path: Path, key: str, witness: Path) -> None:
    """Put a pickle that leaves a file behind when it is read in the place of an entry."""
    import base64

    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(parts["data"])
    about[key] = {":type:": "", ":serialized:": base64.b64encode(pickle.dumps(_Touch(witness))).decode()}
    parts["data"] = json.dumps(about).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_what_is_no_policy_file_is_refused(tmp_path: Path) -> None:
    env = Spaces(NUMBERS, spaces.Discrete(3))
    with pytest.raises(exitkit.FileError, match="does not exist"):
        exitkit.rl.load_policy(tmp_path / "none.zip", env)
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(exitkit.FileError, match="no policy saved by Stable-Baselines3"):
        exitkit.rl.load_policy(tmp_path / "text.zip", env)
    _, path = saved(tmp_path)
    other = spaces.Box(-1, 1, (6,), np.float32)
    with pytest.raises(exitkit.FileError, match=r"does not fit observations .*\(6,\).* and actions Discrete\(3\)"):
        exitkit.rl.load_policy(path, Spaces(other, spaces.Discrete(3)))
    model = sb3.DQN("MlpPolicy", env, buffer_size=10, device="cpu")
    model.save(tmp_path / "dqn.zip")
    with pytest.raises(exitkit.ArgumentError, match="without a distribution"):
        exitkit.rl.load_policy(tmp_path / "dqn.zip", env)


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1"])
def test_published_policies_load(real_data: Path, name: str) -> None:
    """Files of 2021, whose spaces are pickles of a library that is gone."""
    policy = exitkit.rl.load_policy(real_data / "rl" / f"sb3_ppo_{name}.zip", gymnasium.make(name))
    assert exitkit.rl.policy(policy)(torch.zeros(1, *policy.observation_space.shape)).isfinite().all()


def test_without_the_extra_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(exitkit.ExitkitError, match=r"pip install 'exitkit\[rl\]'"):
        exitkit.rl.returns(with_exits(), Walk(), [0.5])
