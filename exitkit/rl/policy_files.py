"""Policies that Stable-Baselines3 saved, read without unpickling more than must be."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.rl.environments import as_vector
from exitkit.rl.policies import RECURRENT

_PICKLED = ":serialized:"
_REPEATED = ("pi_features_extractor.", "vf_features_extractor.")
"""Names under which newer versions have the features extractor once more."""


def load_policy(
    path: str | PathLike[str],
    env: Any,
    *,
    custom_objects: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> nn.Module:
    """The actor-critic of a ``.zip`` that ``model.save(path)`` of Stable-Baselines3 wrote, on the CPU; for :func:`policy`.

    Such a file holds pickles, which can run any code when they are read. Here they are not: weights are read by
    ``torch.load(weights_only=True)``, and spaces are the environment's. All but one: a policy that was made with options that
    are no plain values (``policy_kwargs`` with an activation, a features extractor) has them pickled, and they are unpickled
    with a warning.

    Args:
        path: the file.
        env: an environment that the policy was trained for.
        custom_objects: what to use instead of what the file has, as for ``PPO.load``: ``"policy_kwargs"``,
            ``"observation_space"`` and ``"action_space"`` are looked at.
        trust: you trust the file; unpickle without a warning.

    Raises:
        FileError: no such file, none of Stable-Baselines3's, a damaged one, or a policy for other observations or actions.
        ArgumentError: a policy that is recurrent, or has no distribution over actions.
        ExitkitError: Stable-Baselines3 or gymnasium is not installed.
    """
    try:
        from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
    except ImportError as error:
        raise ExitkitError("policies of Stable-Baselines3 need it: pip install 'exitkit[rl]'") from error
    vector, given = as_vector(env), dict(custom_objects or {})
    about, weights = _read(path)
    _check_kind(path, weights)
    options = dict(given["policy_kwargs"] if "policy_kwargs" in given else _options(path, about, trust))
    pixels = any(name.startswith("features_extractor.cnn.") for name in weights)
    kind = ActorCriticCnnPolicy if pixels else ActorCriticPolicy
    spaces = (
        given.get("observation_space", vector.single_observation_space),
        given.get("action_space", vector.single_action_space),
    )
    try:
        policy: nn.Module = kind(*spaces, lambda _: 0.0, **options)
        result = policy.load_state_dict(weights, strict=False)
        missing = [name for name in result.missing_keys if not name.startswith(_REPEATED)]
        if missing or result.unexpected_keys:
            raise ValueError(f"weights {[*missing, *result.unexpected_keys][:3]} are in one of them alone")
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[-1].strip()[:240]  # of torch's list of differences one will do
        raise FileError(
            f"{str(path)!r} does not fit observations {spaces[0]} and actions {spaces[1]}: {reason}; give the environment "
            "that the policy was trained in"
        ) from error
    return policy.eval()


def _read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description, in which pickles are still texts, and the weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("data"))
            weights = torch.load(io.BytesIO(archive.read("policy.pth")), map_location="cpu", weights_only=True)
        if not isinstance(about, dict) or not isinstance(weights, dict):
            raise ValueError("it has another content")
    except FileNotFoundError as error:
        raise FileError(f"{str(path)!r} does not exist; give a .zip that Stable-Baselines3 saved") from error
    except Exception as error:  # zip, JSON and torch raise whatever they meet in a foreign file
        raise FileError(
            f"{str(path)!r} is no policy saved by Stable-Baselines3 ({type(error).__name__}: {str(error)[:120]}); give a .zip "
            "that model.save(path) wrote"
        ) from error
    return about, weights


def _check_kind(path: str | PathLike[str], weights: Mapping[str, Tensor]) -> None:
    if any(name.startswith(("lstm_", "gru_")) for name in weights):
        raise ArgumentError(f"{str(path)!r} is a recurrent policy: {RECURRENT}")
    if "action_net.weight" not in weights:
        raise ArgumentError(
            f"{str(path)!r} is a policy without a distribution over actions (DQN, SAC, TD3); give an actor-critic (PPO, A2C)"
        )


def _options(path: str | PathLike[str], about: Mapping[str, Any], trust: bool) -> dict[str, Any]:
    """What the policy was made with."""
    options: Any = about.get("policy_kwargs") or {}
    if isinstance(options, dict) and _PICKLED in options:
        from stable_baselines3.common.save_util import json_to_data

        if not trust:
            warnings.warn(
                f"{str(path)!r} holds its policy_kwargs as a pickle, which can run any code when it is read, as it is now; "
                "for a file that you do not trust give custom_objects={'policy_kwargs': {…}} instead, for one that you do "
                "trust=True (exitkit rl: --trust)",
                stacklevel=3,
            )
        try:
            options = json_to_data(json.dumps({"policy_kwargs": options}))["policy_kwargs"]
        except Exception as error:  # an unpickler raises anything
            raise FileError(
                f"{str(path)!r} has policy_kwargs that cannot be unpickled here ({type(error).__name__}: {error}); give "
                "custom_objects={'policy_kwargs': {…}}"
            ) from error
    layers = options.get("net_arch")
    if isinstance(layers, list) and layers and isinstance(layers[0], dict):  # as versions before 1.8 wrote it
        options = {**options, "net_arch": layers[0]}
    return {name: value for name, value in options.items() if name not in ("device", "use_sde")}
