"""Global past-future exits: each joins the states of all exits so far and imitations of those still to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.common.errors import ArgumentError
from exitkit.exits.classifiers import HeadOutput, InternalClassifier

Variant = Literal["paper", "ztw"]


class _Constants(NamedTuple):
    activation: type[nn.Module]
    scale: float


_CONSTANTS: dict[Variant, _Constants] = {"paper": _Constants(nn.Tanh, 2.0), "ztw": _Constants(nn.ReLU, 1.0)}
"""The authors' code, and that of Zero Time Waste: the activation of states, imitations and gate, and the mix's scale."""


class PastFuture(nn.Module):
    """What the M exits of a model share: imitations, projections of states to logits, and the gate (Liao et al. 2021).

    Exit m has a state s_m (B, D). A state to come is imitated from it, ŝ_j = act(W_j s_m + b_j) for j > m; every state
    is projected to C logits and C gate values, z_j, h_j = V_j s_j. The answer mixes past and future,
    2 · (g · Σ_{j≤m} z_j + (1 − g) · Σ_{j>m} ẑ_j) with g = sigmoid(G act(mean_{j≤m} h_j)). W_j and V_j are the same at
    every exit. ``"paper"`` is tanh and the factor 2 of the authors' code, ``"ztw"`` ReLU and no factor.
    """

    def __init__(self, exits: int, width: int, num_classes: int, variant: Variant) -> None:
        super().__init__()
        constants = _CONSTANTS[variant]
        deviation = width**-0.5
        self.width = width
        self.num_classes = num_classes
        self.scale = constants.scale
        self.activation = constants.activation()
        # the first state is not imitated: row j is for that of exit j + 1
        self.imitate = nn.Parameter(torch.randn(exits - 1, width, width) * deviation)
        self.imitate_bias = nn.Parameter(torch.zeros(exits - 1, 1, width))
        self.project = nn.Parameter(torch.randn(exits, width, 2 * num_classes) * deviation)
        self.project_bias = nn.Parameter(torch.zeros(exits, 1, 2 * num_classes))
        self.gate = nn.Linear(num_classes, num_classes)

    def forward(self, exit_: int, state: Tensor, past: Tensor | None) -> HeadOutput:
        """Answer from a state (B, D) and the sum (B, 2C) of the projections of the states before it."""
        own, seen = self._projected(exit_, state), 0.0 if past is None else past
        logits, gates = (own + seen).chunk(2, dim=1)
        gate = torch.sigmoid(self.gate(self.activation(gates / (exit_ + 1))))
        ahead = self.imitate[exit_:]
        imagined = self.activation(torch.baddbmm(self.imitate_bias[exit_:], state.expand(len(ahead), -1, -1), ahead))
        weights, biases = (part[exit_ + 1 :, :, : self.num_classes] for part in (self.project, self.project_bias))
        future = torch.baddbmm(biases, imagined, weights).sum(0)
        # Later exits train V_m and leave the state alone; without gradients the two projections are the same.
        kept = self._projected(exit_, state.detach()) if torch.is_grad_enabled() else own
        return HeadOutput(self.scale * (gate * logits + (1 - gate) * future), kept + seen, state, imagined)

    def _projected(self, exit_: int, state: Tensor) -> Tensor:
        return torch.addmm(self.project_bias[exit_], state, self.project[exit_])


class PastFutureClassifier(nn.Module):
    """Body (feature → vector) → state (B, D) → the answer of :class:`PastFuture`.

    The shared part is registered in the first exit's classifier alone, so that it is saved once. ``linear`` is the kind of
    the layer between body and state, as in :class:`InternalClassifier`.
    """

    shared: PastFuture

    def __init__(
        self, body: nn.Module, width: int, exit_: int, shared: PastFuture, linear: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.body = body
        self.state = linear(width, shared.width)
        self.exit = exit_
        self.carries = 2 * shared.num_classes
        if exit_ == 0:
            self.shared = shared
        else:
            self.__dict__["shared"] = shared

    def forward(self, feature: Tensor, carried: Tensor | None = None, inputs: Sequence[Tensor | None] = ()) -> Tensor:
        """Logits (B, C) from a feature, what the exit before carried on, and the model's inputs that the body reads."""
        return self.step(feature, carried, inputs).logits

    def step(self, feature: Tensor, carried: Tensor | None, inputs: Sequence[Tensor | None]) -> HeadOutput:
        """The logits, and what the next exit and training need."""
        if self.exit > 0 and (carried is None or carried.shape[1] != self.carries):
            raise ArgumentError(
                f"exit {self.exit} reads what the exit before it carried on, a tensor (B, {self.carries}); pass the .carried "
                "of that exit's step()"
            )
        state = self.shared.activation(self.state(self.body(feature, *inputs)))
        output: HeadOutput = self.shared(self.exit, state, carried)
        return output


Classifier = InternalClassifier | PastFutureClassifier


def imitation_losses(steps: Sequence[HeadOutput]) -> tuple[Tensor, ...] | None:
    """Per exit, 1 − cosine between its imitations and the states they stand for, averaged; None where nothing is imitated.

    The states are targets without gradient. The last exit has nothing to imitate: 0.
    """
    losses = []
    for m, step in enumerate(steps):
        if step.imagined is None:
            return None
        targets = [later.state.detach() for later in steps[m + 1 :] if later.state is not None]
        likeness = (
            F.cosine_similarity(step.imagined, torch.stack(targets), dim=-1) if targets else step.logits.new_ones(1)
        )
        losses.append(1 - likeness.mean())
    return tuple(losses)
