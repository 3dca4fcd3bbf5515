"""The training view: features read from the user's own modules, by forward hooks, while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from exitkit.surgery.liveness import submodule


@dataclass(frozen=True)
class Tap:
    """Where a feature is read: the ``rank``-th call of the module object at ``path``, tensor ``leaf`` of its output.

    ``clone``: the backbone writes into the feature afterwards (an in-place ReLU), so it is copied first.
    """

    path: str
    rank: int
    leaf: int = 0
    clone: bool = False


class _AllRead(BaseException):
    """Every feature has been read. No ``Exception``, so that no ``except`` in a backbone's own code takes it."""


@contextmanager
def tapped(backbone: nn.Module, taps: Sequence[Tap], stop: bool = False) -> Iterator[list[Tensor | None]]:
    """While open, every forward of ``backbone`` fills the list with the feature of each tap.

    The hooks are gone afterwards. One forward per opening: call counts start at the opening. With ``stop`` the forward, and
    with it the block of the ``with`` statement, ends where the last feature is read.
    """
    features: list[Tensor | None] = [None] * len(taps)

    def keep(slot: int, tap: Tap, output: Any) -> None:
        feature = tensor_leaves(output)[tap.leaf]
        features[slot] = feature.clone() if tap.clone else feature
        if stop and all(found is not None for found in features):
            raise _AllRead

    watched = [(tap.path, tap.rank, partial(keep, slot, tap)) for slot, tap in enumerate(taps)]
    with on_calls(backbone, watched), suppress(_AllRead):
        yield features


@contextmanager
def on_calls(backbone: nn.Module, watched: Sequence[tuple[str, int, Callable[[Any], None]]]) -> Iterator[None]:
    """While open, give the output of the ``rank``-th call of the module at ``path`` to its function.

    Calls are counted per module object, since one object may be registered under several paths.
    """
    counts: dict[nn.Module, int] = {}
    actions: dict[tuple[nn.Module, int], list[Callable[[Any], None]]] = {}
    for path, rank, action in watched:
        actions.setdefault((submodule(backbone, path), rank), []).append(action)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        rank = counts[module] = counts.get(module, -1) + 1
        for action in actions.get((module, rank), ()):
            action(output)

    with ExitStack() as hooks:
        for module in {module for module, _ in actions}:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def tensor_leaves(output: Any) -> list[Tensor]:
    """The tensors in a module's output, whatever holds them."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
