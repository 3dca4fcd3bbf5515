"""The training view: features read from the user's own modules, by forward hooks, while they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from exitkit.surgery.liveness import submodule


@dataclass(frozen=True)
class Tap:
    """Where a feature is read: the ``index``-th call of the module at ``path``, tensor ``leaf`` of its output.

    ``clone``: the backbone writes into the feature afterwards (an in-place ReLU), so it is copied first.
    """

    path: str
    index: int
    leaf: int = 0
    clone: bool = False


@contextmanager
def tapped(backbone: nn.Module, taps: Sequence[Tap]) -> Iterator[list[Tensor | None]]:
    """While open, every forward of ``backbone`` fills the list with the feature of each tap.

    The hooks are gone afterwards. One forward per opening: call counts start at the opening.
    """
    features: list[Tensor | None] = [None] * len(taps)
    calls: dict[str, int] = {}

    def read(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            index = calls[path] = calls.get(path, -1) + 1
            for slot, tap in enumerate(taps):
                if (tap.path, tap.index) == (path, index):
                    feature = tensor_leaves(output)[tap.leaf]
                    features[slot] = feature.clone() if tap.clone else feature

        return hook

    with ExitStack() as hooks:
        for path in dict.fromkeys(tap.path for tap in taps):
            hooks.callback(submodule(backbone, path).register_forward_hook(read(path)).remove)
        yield features


def tensor_leaves(output: Any) -> list[Tensor]:
    """The tensors in a module's output, whatever holds them."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
