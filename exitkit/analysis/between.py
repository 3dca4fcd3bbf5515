"""Models to go between: aligned, combined, and evaluated at any point between them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.analysis.losses import Evaluation, Scores
from exitkit.analysis.measurement import exit_names
from exitkit.analysis.permutations.deriving import State, symmetries_of
from exitkit.analysis.permutations.matching import aligned, distance
from exitkit.analysis.samples import Batch, in_float32, read_samples
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.inputs import call_on
from exitkit.training.left_alone import left_as_found
from exitkit.training.losses import Loss
from exitkit.training.step import batch_norm_explained


@dataclass
class Ends:
    """Models to go between, as state dicts that fit one another, and a copy of the first to try others on."""

    probe: MultiExitModel
    states: list[State]
    names: list[str]
    evaluation: Evaluation
    before: list[float]
    after: list[float]
    groups: int
    frozen: tuple[str, ...]
    align: bool
    orders: int
    seed: int

    @classmethod
    @contextmanager
    def met(
        cls,
        a: MultiExitModel,
        others: Sequence[MultiExitModel],
        loader: Iterable[Any],
        align: bool,
        orders: int,
        samples: int,
        loss: Loss | None,
        seed: int,
        show_progress: bool,
    ) -> Iterator[Ends]:
        first, *rest = measured = [in_float32(model) for model in (a, *others)]
        copied = any(model is not given for model, given in zip(measured, (a, *others), strict=True))
        names = [name for name, _ in first.named_parameters()]
        states = [_copied(model) for model in (first, *rest)]
        before = [distance(states[0], state, names) for state in states[1:]]
        groups, frozen, after = 0, tuple[str, ...](), before
        with left_as_found(first, *rest):
            probe = copy.deepcopy(first).eval()
            evaluation = Evaluation.of(probe, read_samples(loader, samples, widen=copied), loss)
            if align:
                symmetries = symmetries_of(first)
                matched = [aligned(first, model, symmetries, orders, seed, show_progress) for model in rest]
                states = [states[0], *({n: v.clone() for n, v in one.state.items()} for one in matched)]
                groups, frozen, after = len(symmetries.groups), symmetries.frozen, [one.after for one in matched]
            tried = orders if align else 0
            yield cls(probe, states, names, evaluation, before, after, groups, frozen, align, tried, seed)

    def scores(self, weights: Sequence[float], reset: bool, where: str) -> Scores:
        """At Σ w_i θ_i, of weights that add up to 1; a model itself is taken as it is.

        Raises:
            ArgumentError: a loss that is not finite.
        """
        self.probe.load_state_dict(combined(self.states, weights))
        if reset:
            reset_statistics(self.probe, self.evaluation.batches)
        found = self.evaluation.scores(self.probe)
        if not np.isfinite(found.loss).all():
            at = int((~np.isfinite(found.loss)).argmax())
            raise ArgumentError(
                f"the loss of {exit_names(len(found.loss))[at]} is {found.loss[at]} at {where}; check that both models give "
                "finite losses"
                + ("" if reset else ", and take BatchNorm's statistics anew there (reset_batchnorm=True)")
            )
        return found

    def settings(self, reset: bool) -> dict[str, Any]:
        return {
            "aligned": self.align,
            "groups": self.groups,
            "frozen": self.frozen,
            "batchnorm_reset": reset,
            "seed": self.seed,
            "orders": self.orders,
            **self.evaluation.settings(),
        }


def _copied(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def combined(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> State:
    """Σ w_i θ_i of parameters and statistics; whole numbers are the first one's. A single model comes out bit for bit."""
    alone = [state for state, weight in zip(states, weights, strict=True) if weight == 1]
    if alone and sum(weight != 0 for weight in weights) == 1:
        return dict(alone[0])
    made = {}
    for name, value in states[0].items():
        if not value.is_floating_point():
            made[name] = value
            continue
        total = sum(weight * state[name].double() for state, weight in zip(states, weights, strict=True))
        assert isinstance(total, Tensor)
        made[name] = (total.clamp(min=0) if name.endswith("running_var") else total).to(value.dtype)
    return made


def reset_statistics(model: nn.Module, batches: Sequence[Batch]) -> None:
    """BatchNorm's statistics as the plain average over the batches, every other layer in eval mode.

    Raises:
        ArgumentError: a batch of one sample.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    try:
        with torch.no_grad(), batch_norm_explained():
            for inputs, _ in batches:
                call_on(model, inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.training = False


def coordinates(ends: Ends) -> tuple[float, float]:
    """Where C is, in units of ‖B − A‖: along B − A, and beside.

    Raises:
        ArgumentError: the three models lie on one line.
    """
    a, b, c = ([state[name].double().flatten() for name in ends.names] for state in ends.states)
    to_b, to_c = ([other - one for one, other in zip(a, end, strict=True)] for end in (b, c))
    bb, bc, cc = (
        sum(float(one @ other) for one, other in zip(first, second, strict=True))
        for first, second in ((to_b, to_b), (to_b, to_c), (to_c, to_c))
    )
    beside = 0.0 if bb == 0 else cc / bb - (bc / bb) ** 2
    if beside <= 1e-12:
        raise ArgumentError("a, b and c lie on one line, which spans no plane; give three different models")
    return bc / bb, float(np.sqrt(beside))
