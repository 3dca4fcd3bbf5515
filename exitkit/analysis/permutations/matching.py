"""Weight matching: the permutation of one model that brings its weights nearest to another's (Ainsworth et al. 2023)."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exitkit.analysis.measurement import Array, exit_names
from exitkit.analysis.permutations.deriving import Move, State, Symmetries, drawn_like, permuted, symmetries_of
from exitkit.analysis.permutations.groups import Group, Part
from exitkit.analysis.permutations.labels import Ids
from exitkit.analysis.samples import check_multi_exit, tracked
from exitkit.common.checks import Count, Index, check
from exitkit.common.errors import ArgumentError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.training.left_alone import left_as_found

SWEEPS = 100
"""At most so many rounds over all groups."""

_SAME = 1e-4
"""How much the answers of the same code on the same weights may differ in float32, of their size."""

_PROGRESS = 1e-12
"""By what share of the weights' squared length their inner product must grow to count."""


@dataclass(frozen=True)
class Alignment:
    """How a model's weights lie to another's.

    Attributes:
        state: the model's state dict, permuted.
        before: ‖θ_A − θ_B‖ over all parameters.
        after: ‖θ_A − Πθ_B‖.
        symmetries: what could be permuted.
    """

    state: State
    before: float
    after: float
    symmetries: Symmetries


def align(
    a: MultiExitModel, b: MultiExitModel, *, orders: int = 3, seed: int = 0, show_progress: bool = True
) -> MultiExitModel:
    """``b`` with its hidden units permuted so that its weights are nearest to those of ``a``: the same function.

    Coordinate descent from the identity: one group of units after another is assigned exactly
    (``scipy.optimize.linear_sum_assignment``) while all others stay, until none gets better. The result depends on where it
    starts and on the order, so that several are tried and the nearest is kept: the identity in the graph's order and in random
    ones, and what one pass from the inputs on gives, in which a group is assigned by those tensors alone whose other axes are
    assigned already. Where none is nearer than ``b`` is, ``b`` stays as it is. Running statistics are permuted too. What may
    be permuted is derived from the exported graph and tried before it is used.

    Args:
        a: what stays.
        b: a model of the same architecture and exits; it is not changed.
        orders: how many random orders.
        seed: of the random ones.
        show_progress: draw a bar on a terminal.

    Raises:
        ArgumentError: models of different architecture or heads; the message says the first difference.
        NotCapturableError: torch.export cannot follow the model.
    """
    check("orders", orders, Count)
    check("seed", seed, Index)
    check_alike(a, b)
    made = copy.deepcopy(b)
    made.load_state_dict(aligned(a, b, symmetries_of(a), orders, seed, show_progress).state)
    return made


def check_alike(a: Any, b: Any, name: str = "b") -> None:
    """Whether two models have the same tensors, the same exits and, given the same weights, the same answers.

    Raises:
        ArgumentError: the first difference.
    """
    check_multi_exit(a, "this", "a")
    check_multi_exit(b, "this", name)
    first, second = ({key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (a, b))
    for key in (*first, *second):
        if first.get(key) != second.get(key):
            raise ArgumentError(
                f"a and {name} differ in {key!r}: shape {first.get(key, 'none')} in a, {second.get(key, 'none')} in {name}; "
                "give models of the same architecture, with the same exits and heads"
            )
    for what, one, other in (
        ("exits", [x.name for x in a.boundaries], [x.name for x in b.boundaries]),
        ("method", a.method.name, b.method.name),
    ):
        if one != other:
            raise ArgumentError(f"a and {name} differ in their {what}: {one} and {other}; attach them in the same way")
    _check_same_code(a, b, name)


def _check_same_code(a: MultiExitModel, b: MultiExitModel, name: str) -> None:
    """Tensors do not tell a ReLU from a Tanh: with the weights of ``b``, the code of ``a`` must answer as ``b`` does."""
    own = copy.deepcopy(b).to(next(a.parameters()).device).float().eval()
    other = copy.deepcopy(a).float().eval()
    other.load_state_dict(own.state_dict())
    example = other.example.with_batch(2)
    tensors = drawn_like(example.tensors, torch.Generator().manual_seed(0))
    outputs = []
    for model in (own, other):
        args, kwargs = example.spec.call(tensors)
        with left_as_found(model), torch.no_grad():
            torch.manual_seed(0)
            outputs.append(model(*args, **kwargs).logits)
    for exit_, first, second in zip(exit_names(len(a.exits)), *outputs, strict=True):
        scale = float(first.abs().max().nan_to_num())
        if not torch.allclose(first, second, rtol=_SAME, atol=_SAME * scale, equal_nan=True):
            raise ArgumentError(
                f"a and {name} differ in what they compute: with the weights of {name}, a answers otherwise at {exit_} "
                f"(by up to {float((first - second).abs().max()):.3g}); give models of the same code"
            )


def aligned(
    a: MultiExitModel, b: MultiExitModel, symmetries: Symmetries, orders: int, seed: int, show_progress: bool = False
) -> Alignment:
    """The best of several orders, and of leaving ``b`` as it is."""
    names = [name for name, _ in a.named_parameters()]
    fixed, start = ({key: value.double().cpu() for key, value in model.state_dict().items()} for model in (a, b))
    before = best = distance(fixed, start, names)
    kept: list[tuple[int, Move]] = []
    generator = np.random.default_rng(seed)
    graph = list(range(len(symmetries.groups)))
    attempts = [(True, graph), (False, graph)] + [
        (False, generator.permutation(graph).tolist()) for _ in range(orders)
    ]
    for from_inputs, order in tracked(attempts, "matching", show_progress):
        descent = _Descent(symmetries, fixed, dict(start), set(names))
        if from_inputs:
            descent.from_inputs()
        descent.run(order)
        found = distance(fixed, descent.state, names)
        if found < best * (1 - _PROGRESS):
            best, kept = found, descent.moves
    moved = dict(b.state_dict())
    for number, move in kept:
        moved = symmetries.moved(moved, {number: move})
    return Alignment(moved, before, best, symmetries)


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """‖θ_A − θ_B‖ over the named tensors."""
    return math.sqrt(sum(float((first[name] - second[name]).square().sum()) for name in names))


@dataclass
class _Descent:
    """A state on its way to ``fixed``, and the moves that brought it where it is."""

    symmetries: Symmetries
    fixed: State
    state: State
    names: set[str]
    moves: list[tuple[int, Move]] = field(default_factory=list)

    def from_inputs(self) -> None:
        """Each group by those tensors alone that have no other axis which is still to be assigned."""
        axes = [[axis for part in group.parts for axis in part.indices] for group in self.symmetries.groups]
        waiting = Counter(name for group in axes for name, _ in group)
        for number, group in enumerate(self.symmetries.groups):
            own = Counter(name for name, _ in axes[number])
            once = Counter(name for name, _ in set(axes[number]))
            settled = {name for name in own if waiting[name] == own[name] and once[name] == 1}
            move = best_move(group, self.fixed, self.state, self.names & settled)
            self.state.update(permuted(group, move, self.state))
            self.moves.append((number, move))
            waiting -= own

    def run(self, order: Sequence[int]) -> None:
        """Group after group assigned anew until a whole round brings nothing; the inner product never falls."""
        for _ in range(SWEEPS):
            if not sum(self._improved(number) for number in order):
                break

    def _improved(self, number: int) -> bool:
        """Whether assigning a group anew brought the state nearer."""
        group = self.symmetries.groups[number]
        move = best_move(group, self.fixed, self.state, self.names)
        if move.still:
            return False
        changed = permuted(group, move, self.state)
        here = [name for name in changed if name in self.names]
        was, now = (sum(float((self.fixed[n] * one[n]).sum()) for n in here) for one in (self.state, changed))
        if now <= was + _PROGRESS * sum(float(self.fixed[name].square().sum()) for name in here):
            return False
        self.state.update(changed)
        self.moves.append((number, move))
        return True


def best_move(group: Group, fixed: State, state: State, names: set[str]) -> Move:
    """The permutation of a group that makes the inner product of its tensors with ``fixed`` largest, others as they are.

    A unit of many elements (a head) is worth what its elements are when they are assigned best within it.
    """
    from scipy.optimize import linear_sum_assignment

    total = np.zeros((group.units, group.units))
    inner: list[Ids] = []
    for part in group.parts:
        likeness = _likeness(part, group.units, fixed, state, names)
        chosen = np.zeros((group.units, group.units, part.elements), np.int64)
        if part.elements == 1:
            total += likeness[:, 0, :, 0]
        else:
            for one in range(group.units):
                for other in range(group.units):
                    worth = likeness[one, :, other, :]
                    rows, chosen[one, other] = linear_sum_assignment(worth, maximize=True)
                    total[one, other] += worth[rows, chosen[one, other]].sum()
        inner.append(chosen)
    _, units = linear_sum_assignment(total, maximize=True)
    return Move(units, tuple(chosen[np.arange(group.units), units] for chosen in inner))


def _likeness(part: Part, units: int, fixed: State, state: State, names: set[str]) -> Array:
    """(n, m, n, m): inner products of what every element has in ``fixed`` with what every element has in ``state``."""
    size = units * part.elements
    likeness = torch.zeros(size, size, dtype=torch.float64)
    for (name, axis), indices in part.indices.items():
        if name in names:
            at = torch.from_numpy(indices.ravel())
            first, second = (one[name].movedim(axis, 0)[at].reshape(size, -1) for one in (fixed, state))
            likeness += first @ second.T
    return likeness.reshape(units, part.elements, units, part.elements).numpy()
