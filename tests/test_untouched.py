"""What attach leaves alone: weights, flags, hooks, buffers, random numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from tests.toy import Noise, TinyNet, all_equal, images


class NetWith(TinyNet):
    """A TinyNet with one more part before its global pooling."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.part(self.blocks(self.stem(x))).mean((2, 3)))
        return out


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 8, 8, 8)


class Cached(nn.Module):
    """Keeps a tensor of the batch's size from one forward to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None or self.scale.shape[0] != x.shape[0]:
            self.scale = torch.ones(x.shape[0], 1, 1, 1)
        return x * self.scale


class Counting(nn.Module):
    """Counts its calls in a buffer, as some quantisers and normalisations do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def worn(model: TinyNet) -> TinyNet:
    """``model`` in use: mixed training flags, frozen parts, gradients, the user's own hooks, BatchNorm statistics."""
    model.train()(images()).sum().backward()
    model.blocks[1].eval()
    model.blocks[2].norm.eval()
    model.blocks[0].requires_grad_(False)
    model.stem.weight.grad = None
    model.blocks[1].register_forward_hook(lambda module, args, output: None)
    model.linear.register_forward_pre_hook(lambda module, args: None)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about ``model`` that surgery must not change, comparable with ``==``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "tensors": {name: id(tensor) for name, tensor in [*parameters.items(), *model.named_buffers()]},
        "state_dict": {key: value.tolist() for key, value in model.state_dict().items()},
        "training": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "grad": {name: None if p.grad is None else p.grad.tolist() for name, p in parameters.items()},
        "hooks": {name: [list(getattr(module, kind).items()) for kind in hooks] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
    }


OPERATIONS: dict[str, Callable[[TinyNet], object]] = {
    "inspect": lambda model: exitkit.inspect(model, images(), show=False),
    "attach": lambda model: exitkit.attach(model, images()),
    "detach": lambda model: exitkit.detach(exitkit.attach(model, images())),
    "partition": lambda model: exitkit.attach(model, images()).partition(),
    "attach twice": lambda model: [exitkit.attach(model, images(), method=name) for name in ("sdn", "ztw")],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_model_is_as_before(operation: str) -> None:
    model = worn(TinyNet())
    before = snapshot(model)
    OPERATIONS[operation](model)
    assert snapshot(model) == before


def test_a_buffer_that_the_forward_writes_is_as_before() -> None:
    model = worn(NetWith(Counting()))
    before = snapshot(model)
    exitkit.attach(model, images())
    assert snapshot(model) == before


@pytest.mark.parametrize("part", [Noise, DataDependent, FixedBatch])
def test_the_model_is_as_before_after_it_was_refused(part: type[nn.Module]) -> None:
    model = worn(NetWith(part()))
    before = snapshot(model)
    with pytest.raises(ExitkitError):
        exitkit.attach(model, images())
    assert snapshot(model) == before


@pytest.mark.parametrize("arguments", [{"at": ["blocks.9"]}, {"example_inputs": images(channels=3)}, {"every": 0}])
def test_the_model_is_as_before_after_a_bad_argument(arguments: dict[str, Any]) -> None:
    model = worn(TinyNet())
    before = snapshot(model)
    with pytest.raises(ExitkitError):
        exitkit.attach(model, **{"example_inputs": images(), **arguments})
    assert snapshot(model) == before


def test_a_cache_of_the_batch_size_holds_no_traced_tensor_afterwards() -> None:
    """Refused or not, the model goes on working at any batch size."""
    model = NetWith(Cached()).eval()
    expected = model(images(5))
    with suppress(ExitkitError):
        exitkit.attach(model, images())
    assert type(model.part.scale) is Tensor
    assert torch.equal(model(images(5)), expected)


def test_a_forward_leaves_no_hook_behind() -> None:
    model = worn(TinyNet())
    ee = exitkit.attach(model, images())
    model.eval()
    before = snapshot(model)
    ee(images(3))
    assert snapshot(model) == before


def test_a_forward_that_fails_leaves_no_hook_behind() -> None:
    model = worn(TinyNet())
    ee = exitkit.attach(model, images())
    before = snapshot(model)
    with pytest.raises(exitkit.ArgumentError, match="give images of 1 channel"):
        ee(images(channels=2))
    assert snapshot(model) == before


def test_detach_returns_the_same_object(tiny_net: TinyNet) -> None:
    assert exitkit.detach(exitkit.attach(tiny_net, images())) is tiny_net


def test_the_users_own_hooks_still_run(tiny_net: TinyNet) -> None:
    seen: list[int] = []
    tiny_net.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    ee = exitkit.attach(tiny_net, images())
    seen.clear()
    ee(images(5))
    assert seen == [5]


def test_the_backbones_gradients_are_those_without_exits(tiny_net: TinyNet) -> None:
    tiny_net.eval()
    tiny_net(images(4)).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in tiny_net.parameters()]
    tiny_net.zero_grad()
    exitkit.attach(tiny_net, images()).eval()(images(4)).logits[-1].square().sum().backward()
    assert all_equal([parameter.grad for parameter in tiny_net.parameters()], expected)


def test_inspect_draws_no_random_numbers(tiny_net: TinyNet) -> None:
    state = torch.get_rng_state()
    exitkit.inspect(tiny_net, images(), show=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_heads_are_reproducible_from_the_seed(tiny_net: TinyNet) -> None:
    first, second = [], []
    for weights in (first, second):
        torch.manual_seed(7)
        weights.extend(exitkit.attach(tiny_net, images()).added_parameters())
    assert all_equal(first, second)


def test_attach_draws_the_same_random_numbers_in_training_mode(tiny_net: TinyNet) -> None:
    """Nothing but the heads' weights: dropout in training mode must not run."""
    states = []
    for training in (False, True):
        torch.manual_seed(7)
        exitkit.attach(tiny_net.train(training), images())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_seed_changes_neither_places_nor_the_backbones_answer(tiny_net: TinyNet) -> None:
    tiny_net.eval()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ee = exitkit.attach(tiny_net, images())
        found.append((ee.boundaries, [spec.hook for spec in ee.specs], ee(images(3)).logits[-1].tolist()))
    assert found[0] == found[1]
