"""Policies as backbones: the action network of an actor-critic as a plain module from observations to logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from exitkit.common.errors import ArgumentError
from exitkit.exits.legal_actions import LegalActions

MOST_ACTIONS = 1_024
"""Combinations of several choices that are told apart as one."""

RECURRENT = (
    "a sample that leaves early would leave its state behind, which the next step needs. Use a policy without memory, such as "
    "one that sees a stack of frames"
)
"""Why a recurrent policy is refused."""


class ActionLogits(nn.Module):
    """Observations (B, …) to logits (B, A): what a Stable-Baselines3 actor-critic does before it draws an action.

    Preprocessing as the policy does it (pixels divided by 255, a discrete observation one-hot), features extractor, policy
    net, action net. The parameters are the policy's own; its value head is not among them.

    Attributes:
        choices: how many actions each choice has, where an action is several; the logits are then those of their
            combinations, the last choice changing fastest, which are the same distribution.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.preprocess = _preprocessing(policy)
        self.features = policy.pi_features_extractor
        self.latent = policy.mlp_extractor.policy_net
        self.action_net = policy.action_net
        self.choices = _choices(policy.action_space)

    def forward(self, observation: Tensor) -> Tensor:
        logits: Tensor = self.action_net(self.latent(self.features(self.preprocess(observation))))
        return logits if len(self.choices) == 1 else _of_combinations(logits.split(self.choices, 1))


class _Scaled(nn.Module):
    """As floating-point numbers, divided by a constant."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, observation: Tensor) -> Tensor:
        values = observation.float()
        return values if self.divisor == 1 else values / self.divisor


class _OneHot(nn.Module):
    """Numbers (B,) as vectors (B, n)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, observation: Tensor) -> Tensor:
        return nn.functional.one_hot(observation.long(), self.count).float()


def policy(model: Any, *, masked: bool = False) -> nn.Module:
    """The action network of a policy, as a module that :func:`exitkit.attach` takes; weights are shared.

    Args:
        model: an actor-critic of Stable-Baselines3 (``PPO``, ``A2C``, with ``MlpPolicy`` or ``CnnPolicy``, or its
            ``.policy``), or any module from observations to logits, one per action.
        masked: take a mask (B, A) of legal actions beside the observation, as environments give it in
            ``info["action_mask"]``. Those not legal have probability 0 at every exit, before anything is scored.

    Returns:
        A module (B, …) → (B, A) in eval mode. Of several discrete choices the logits are those of all combinations.

    Raises:
        ArgumentError: not a policy, a recurrent one, continuous actions, observations in a dict, or more combinations than
            1,024.
    """
    given = model if isinstance(model, nn.Module) else getattr(model, "policy", None)
    if not isinstance(given, nn.Module):
        raise ArgumentError(
            f"model is {type(model).__name__}; give a Stable-Baselines3 actor-critic (PPO, A2C) or a module from observations "
            "to logits"
        )
    check_feedforward(given)
    if hasattr(given, "action_net") and hasattr(given, "mlp_extractor"):
        network: nn.Module = ActionLogits(given)
    elif hasattr(given, "action_space"):  # another policy of Stable-Baselines3
        raise ArgumentError(
            f"model is {type(given).__name__}, which has no distribution over actions to copy (DQN has values, SAC and TD3 "
            "continuous actions); give an actor-critic with discrete actions (PPO, A2C)"
        )
    else:
        network = given
    if masked and len(getattr(network, "choices", (1,))) > 1:
        raise ArgumentError("masked=True is for one discrete choice, and this policy makes several; leave it out")
    return (LegalActions(network) if masked else network).eval()


def check_feedforward(network: nn.Module) -> None:
    """Refuse a policy that remembers.

    Raises:
        ArgumentError: it has a recurrent layer; the message names it.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            raise ArgumentError(f"the policy is recurrent ({name or 'it'} is {type(module).__name__}): {RECURRENT}")


def _preprocessing(policy: Any) -> nn.Module:
    from gymnasium import spaces
    from stable_baselines3.common.preprocessing import is_image_space

    space = policy.observation_space
    if isinstance(space, spaces.Discrete):
        return _OneHot(int(space.n))
    if not isinstance(space, spaces.Box):
        raise ArgumentError(
            f"the policy observes {space}; exits are for observations that are one array (Box) or one number (Discrete)"
        )
    return _Scaled(255.0 if policy.normalize_images and is_image_space(space) else 1.0)


def _choices(space: Any) -> list[int]:
    """How many actions each of the choices has."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        choices = [int(count) for count in space.nvec]
        if math.prod(choices) > MOST_ACTIONS:
            raise ArgumentError(
                f"the policy acts in {space}, {math.prod(choices):,} combinations of choices; exits tell at most "
                f"{MOST_ACTIONS:,} apart"
            )
        return choices
    raise ArgumentError(
        f"the policy acts in {space}; exits need actions that are chosen among (Discrete, MultiDiscrete), of which they can "
        "say how sure they are. Continuous (Gaussian) actions are not supported"
    )


def _of_combinations(parts: Sequence[Tensor]) -> Tensor:
    """Logits (B, Π Aᵢ) of independent choices (B, Aᵢ): a combination's logit is the sum of its choices'."""
    joint = parts[0]
    for part in parts[1:]:
        joint = (joint.unsqueeze(2) + part.unsqueeze(1)).flatten(1)
    return joint
