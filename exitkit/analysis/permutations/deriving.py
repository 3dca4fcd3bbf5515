"""A model's permutations: read off its exported graph, and tried before they are used."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from exitkit.analysis.permutations.groups import Group, groups_of
from exitkit.analysis.permutations.labels import Ids, Ledger, fixed, moves
from exitkit.analysis.permutations.operators import Walk
from exitkit.analysis.permutations.values import DIRECT, MOST_ELEMENTS, Value, values_in
from exitkit.common.errors import NotCapturableError
from exitkit.common.logs import quiet
from exitkit.exits.standardised import StandardisedLinear, replaced
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.capturing import untouched
from exitkit.surgery.liveness import op_name
from exitkit.surgery.verification import exact_attention

State = dict[str, Tensor]

_EXACT = 1e-8
"""How much a float64 model's answers may differ, of their size, where only the order of sums changed."""


@dataclass(frozen=True)
class Move:
    """A permutation of one group: which unit comes to each place, and of each part which of its elements.

    Attributes:
        units: (n,).
        elements: for each part (n, m).
    """

    units: Ids
    elements: tuple[Ids, ...]

    @property
    def still(self) -> bool:
        """Whether nothing changes its place."""
        return bool((self.units == np.arange(len(self.units))).all()) and all(
            bool((one == np.arange(one.shape[1])).all()) for one in self.elements
        )


@dataclass(frozen=True)
class Symmetries:
    """The permutations of a model's hidden units that leave its function alone.

    Attributes:
        groups: units that can be exchanged for one another; products of permutations of groups are permutations too.
        frozen: what was not understood, so that it stays as it is.
        tied: state-dict names that stand for the same tensor, each with the name it has in the groups.
    """

    groups: tuple[Group, ...]
    frozen: tuple[str, ...]
    tied: dict[str, str]

    def moved(self, state: Mapping[str, Tensor], moves: Mapping[int, Move]) -> State:
        """A state dict with some groups permuted."""
        made = dict(state)
        for number, move in moves.items():
            for name, tensor in permuted(self.groups[number], move, made).items():
                made[name] = tensor
        return {name: made[self.tied.get(name, name)] for name in state}


def permuted(group: Group, move: Move, state: Mapping[str, Tensor]) -> State:
    """The tensors of a group, permuted."""
    made: State = {}
    for part, elements in zip(group.parts, move.elements, strict=True):
        for (name, axis), indices in part.indices.items():
            tensor = made.get(name, state[name])
            order = torch.arange(tensor.shape[axis])
            come = indices[move.units][np.arange(group.units)[:, None], elements]
            order[torch.from_numpy(indices.ravel())] = torch.from_numpy(come.ravel())
            made[name] = tensor.index_select(axis, order.to(tensor.device))
    return made


def at_random(group: Group, generator: np.random.Generator) -> Move:
    """Any permutation of a group."""
    elements = [np.stack([generator.permutation(part.elements) for _ in range(group.units)]) for part in group.parts]
    return Move(generator.permutation(group.units), tuple(elements))


def symmetries_of(model: MultiExitModel) -> Symmetries:
    """Every permutation that the graph shows, each tried on the model with changed weights before it is believed.

    A model in which nothing can be permuted is a valid answer, with a warning.

    Raises:
        NotCapturableError: torch.export cannot follow the model.
    """
    probe = _probe(model)
    graph = _exported(probe)
    ledger = _walked(graph, probe)
    tied = _tied(probe)
    groups = groups_of(ledger)
    found = Symmetries(groups, tuple(dict.fromkeys(ledger.frozen)), tied)
    with untouched(probe), torch.no_grad(), exact_attention():
        valid, refused = _tried(found, probe)
    frozen = (*found.frozen, *(f"a permutation that changes the answers: {groups[number]}" for number in refused))
    if not valid:
        warnings.warn(
            f"nothing in this model can be permuted ({'; '.join(frozen) or 'every layer is read by its order'}), so it is "
            "compared as it is",
            stacklevel=3,
        )
    return Symmetries(tuple(groups[number] for number in valid), frozen, tied)


def _probe(model: MultiExitModel) -> MultiExitModel:
    """A copy in float64 with other weights and statistics, in which no two channels are alike by chance."""
    probe = copy.deepcopy(model).double().eval()
    replaced(probe, lambda _, layer: _Standardised(layer))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in probe.state_dict().values():
            if tensor.is_floating_point():
                scale = tensor.abs().mean().nan_to_num() + 0.01
                factor, added = (torch.rand(tensor.shape, generator=generator).to(tensor) for _ in range(2))
                tensor.mul_(0.5 + factor).add_(0.3 * scale * added)
    object.__setattr__(probe.example, "tensors", drawn_like(probe.example.with_batch(2).tensors, generator))
    return probe


def drawn_like(tensors: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Normal random numbers in the place of floating-point inputs; others, which may be looked up, stay."""
    return tuple(
        torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor
        for tensor in tensors
    )


class _Standardised(nn.Module):
    """A :class:`StandardisedLinear` as it reads: less the mean, over the deviation, times the matrix that was learned."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, layer: StandardisedLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, vector: Tensor) -> Tensor:
        return F.linear((vector - self.mean) / self.deviation, self.weight, self.bias)


class _Heads(nn.Module):
    """Every head's logits, from flat tensors."""

    def __init__(self, model: MultiExitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.model.example.spec.call(tensors)
        return self.model.run_heads(*args, **kwargs)[1]


def _exported(model: MultiExitModel) -> GraphModule:
    with untouched(model), torch.no_grad(), exact_attention():
        try:
            with quiet("torch"):
                program = torch.export.export(_Heads(model), model.example.tensors, strict=False)
        except Exception as error:  # torch.export raises dozens of types, most of them private
            raise NotCapturableError(
                f"the exits of {type(model.backbone).__name__} cannot be exported ({type(error).__name__}: "
                f"{str(error).splitlines()[0][:200]}), so its permutations are not known; use align=False"
            ) from error
    return program.module(check_guards=False)


def _walked(graph: GraphModule, model: MultiExitModel) -> Ledger:
    """The units of all tensors, from the inputs to the heads' logits."""
    ledger = Ledger()
    walk = Walk(ledger)
    state = model.state_dict()
    values: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function":
            known = {source: _read(source, node, values, ledger, state) for source in node.all_input_nodes}
            args, kwargs = (_filled(part, known) for part in (node.args, node.kwargs))
            values[node] = walk.result(node, list(args), dict(kwargs))
            for value in values_in(values[node]):
                if moves(value.units) and not value.leaf:
                    ledger.role(value.units, node.name)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for value in values_in(values.get(source)):
                    ledger.fix(value.units)
    return ledger


def _read(node: Node, reader: Node, values: Mapping[Node, Any], ledger: Ledger, state: State) -> Any:
    """The value of a node as another reads it: parameters by their axes, or element by element."""
    if node in values:
        return values[node]
    tensor = node.meta.get("val")
    name = str(node.target).removeprefix("model.")
    if node.op != "get_attr" or name not in state:
        shape = tuple(map(int, tensor.shape)) if isinstance(tensor, Tensor) else ()
        return Value(fixed(shape)) if isinstance(tensor, Tensor) or node.op == "get_attr" else tensor
    whole = state[name]
    if op_name(reader) in DIRECT:
        return Value(fixed(whole.shape), parameter=name)
    if not whole.is_floating_point() or whole.numel() > MOST_ELEMENTS:
        return Value(fixed(whole.shape), parameter=name)
    return Value(ledger.grid(name, whole.shape), parameter=name, leaf=True)


def _filled(given: Any, known: Mapping[Node, Any]) -> Any:
    return tree_map(lambda one: known.get(one, one) if isinstance(one, Node) else one, _plain(given))


def _plain(given: Any) -> Any:
    """Lists and dicts of torch.fx as Python's own."""
    if isinstance(given, dict):
        return {name: _plain(one) for name, one in given.items()}
    return (
        type(given)(map(_plain, given))
        if type(given) is tuple
        else [*map(_plain, given)]
        if isinstance(given, list)
        else given
    )


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of tensors that are there under another name too, by that name, which is the first in the graph."""
    first: dict[int, str] = {}
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first[id(tensor)] for name, tensor in pairs if first.setdefault(id(tensor), name) != name}


def _tried(symmetries: Symmetries, model: MultiExitModel) -> tuple[list[int], list[int]]:
    """Numbers of the groups whose random permutation leaves the answers alone, and of those that change them."""
    generator = np.random.default_rng(0)
    moves = {number: at_random(group, generator) for number, group in enumerate(symmetries.groups)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = _answers(model)

    def valid(numbers: list[int]) -> list[int]:
        """All of them at once where that is right, else half by half."""
        if not numbers:
            return []
        model.load_state_dict(symmetries.moved(before, {number: moves[number] for number in numbers}))
        if all(_same(one, other) for one, other in zip(_answers(model), wanted, strict=True)):
            return numbers
        half = len(numbers) // 2
        return [*valid(numbers[:half]), *valid(numbers[half:])] if half else []

    kept = valid(list(moves))
    model.load_state_dict(before)
    return kept, [number for number in moves if number not in kept]


def _answers(model: MultiExitModel) -> Sequence[Tensor]:
    args, kwargs = model.example.spec.call(model.example.tensors)
    return model.run_heads(*args, **kwargs)[1]


def _same(answer: Tensor, wanted: Tensor) -> bool:
    return bool((answer - wanted).abs().max() <= _EXACT * wanted.abs().max())
