"""The training view: features read from the user's own modules, by forward hooks, while they run.

Threads may share a backbone: every call registers hooks of its own, which react to the forward of that call alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils._pytree import tree_leaves

from exitkit.surgery.liveness import submodule


@dataclass(frozen=True)
class HookPoint:
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
def recording(backbone: nn.Module, points: Sequence[HookPoint], stop: bool = False) -> Iterator[list[Tensor | None]]:
    """While open, a forward of ``backbone`` in this thread fills the list with the feature of each hook point.

    The hooks are gone afterwards. One forward per opening: call counts start at the opening. With ``stop`` the forward, and
    with it the block of the ``with`` statement, ends where the last feature is read.
    """
    features: list[Tensor | None] = [None] * len(points)

    def keep(slot: int, point: HookPoint, output: Any) -> None:
        feature = tensor_leaves(output)[point.leaf]
        features[slot] = feature.clone() if point.clone else feature
        if stop and all(found is not None for found in features):
            raise _AllRead

    watched = [(point.path, point.rank, partial(keep, slot, point)) for slot, point in enumerate(points)]
    with on_calls(backbone, watched), suppress(_AllRead):
        yield features


@contextmanager
def on_calls(backbone: nn.Module, watched: Sequence[tuple[str, int, Callable[[Any], None]]]) -> Iterator[None]:
    """While open, give the output of the ``rank``-th call of the module at ``path`` in this thread to its function.

    Calls are counted per module object, since one object may be registered under several paths. Where openings nest, only
    the innermost counts.
    """
    counts: dict[nn.Module, int] = {}
    actions: dict[tuple[nn.Module, int], list[Callable[[Any], None]]] = {}
    for path, rank, action in watched:
        actions.setdefault((submodule(backbone, path), rank), []).append(action)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if _thread.counts is not counts:
            return
        rank = counts[module] = counts.get(module, -1) + 1
        for action in actions.get((module, rank), ()):
            action(output)

    outer = _thread.counts
    with _forwards.hooked({module for module, _ in actions}, hook):
        _thread.counts = counts
        try:
            yield
        finally:
            _thread.counts = outer


@contextmanager
def reading_arguments(modules: Iterable[nn.Module]) -> Iterator[list[tuple[Any, ...]]]:
    """While open, every call of these modules in this thread leaves its positional arguments in the list, in order."""
    read: list[tuple[Any, ...]] = []
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == thread:
            read.append(args)

    with _forwards.hooked(modules, hook):
        yield read


@contextmanager
def alone() -> Iterator[None]:
    """While open, no other thread runs a forward with hooks, nor anything else alone: they wait.

    To open before a backbone is traced, since its parameters are fake ones meanwhile, and before its modes change. Inside of
    a forward with hooks in this thread it is part of that forward, because waiting for others there could wait forever.
    """
    with _forwards.begun(alone=True):
        yield


class _Thread(threading.local):
    """``counts``: the calls counted by this thread's innermost :func:`on_calls`; None outside of one.

    ``begun``: this thread is counted in :attr:`_Forwards.running`.
    """

    counts: dict[nn.Module, int] | None = None
    begun: bool = False


class _Forwards:
    """The forwards that run with hooks: any number at once, or a single one under dynamo, or a single capture.

    dynamo fails when hooks come or go while it compiles. Registration has a lock because torch numbers hooks without one, and
    of two with the same number one is lost.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running = 0
        self.alone = False
        self.waiting = 0
        """Those that wait to run alone; no other begins meanwhile."""

    @contextmanager
    def hooked(self, modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
        """A forward with this hook on every module."""
        with self.begun(alone=callable(get_eval_frame_callback())):
            with self.changed:
                handles = [module.register_forward_hook(hook) for module in modules]
            try:
                yield
            finally:
                with self.changed:
                    for handle in handles:
                        handle.remove()

    @contextmanager
    def begun(self, alone: bool) -> Iterator[None]:
        """Begin, once the others allow it; what begins inside of another in this thread is part of that."""
        if _thread.begun:
            yield
            return
        with self.changed:
            self._begin(alone)
        _thread.begun = True
        try:
            yield
        finally:
            _thread.begun = False
            with self.changed:
                self.running -= 1
                self.alone = False
                self.changed.notify_all()

    def _begin(self, alone: bool) -> None:
        self.waiting += alone
        try:
            self.changed.wait_for(lambda: not self.running if alone else not (self.alone or self.waiting))
        finally:
            self.waiting -= alone
            self.changed.notify_all()  # an interrupted wait for its end lets others begin
        self.running += 1
        self.alone = alone


_thread = _Thread()
_forwards = _Forwards()


def tensor_leaves(output: Any) -> list[Tensor]:
    """The tensors in a module's output, whatever holds them."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
