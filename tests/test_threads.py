"""One model, many threads: every call gives what it gives alone."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import MultiExitModel, NotCapturableError
from tests.toy import TinyNet, all_equal, images, noisy

THREADS, CALLS = 8, 400
Call = Callable[[MultiExitModel, Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _eager_switches() -> Iterator[None]:
    """Threads take turns after microseconds instead of milliseconds, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def ee(tiny_net: TinyNet) -> MultiExitModel:
    return noisy(exitkit.attach(tiny_net, images(), every=1, method="ztw"))


def everything(ee: MultiExitModel, x: Tensor) -> tuple[Tensor, ...]:
    output = ee(x)
    return (*output.logits, *output.features, *output.heads)


def heads(ee: MultiExitModel, x: Tensor) -> tuple[Tensor, ...]:
    features, logits = ee.run_heads(x)
    return (*features, *logits)


def stopped(ee: MultiExitModel, x: Tensor) -> tuple[Tensor, ...]:
    return ee.run_until(1, x)[0]


def mixed(ee: MultiExitModel, x: Tensor) -> tuple[Tensor, ...]:
    """Another call from one input to the next."""
    kinds: tuple[Call, ...] = (everything, heads, stopped)
    return kinds[int(x[0, 0, 0, 0] * 1000) % 3](ee, x)


def inputs(count: int) -> list[Tensor]:
    return [torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def in_threads(call: Call, ee: MultiExitModel, batches: list[Tensor]) -> list[tuple[Tensor, ...]]:
    def one(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call(ee, x)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, batches))


@pytest.mark.parametrize("call", [everything, heads, stopped, mixed])
def test_every_thread_gets_the_answers_to_its_own_input(ee: MultiExitModel, call: Call) -> None:
    batches = inputs(CALLS)
    with torch.no_grad():
        alone = [call(ee, x) for x in batches]
    together = in_threads(call, ee, batches)
    assert sum(not all_equal(*pair) for pair in zip(alone, together, strict=True)) == 0
    assert not any(module._forward_hooks for module in ee.backbone.modules())


def test_a_call_inside_a_call(ee: MultiExitModel) -> None:
    """A user's own hook asks the model about another input, while the model runs."""
    x, other = images(3), images(4)
    with torch.no_grad():
        alone, alone_other = everything(ee, x), stopped(ee, other)
    asked: list[tuple[Tensor, ...]] = []
    inside = threading.local()

    def ask(module: nn.Module, args: Any, output: Any) -> None:
        if not getattr(inside, "on", False):
            inside.on = True
            asked.append(stopped(ee, other))
            inside.on = False

    ee.backbone.blocks[1].register_forward_hook(ask)
    for first, second in [(everything(ee, x), asked[-1]), *zip(in_threads(everything, ee, [x] * 50), asked[1:51])]:  # noqa: B905
        assert all_equal(first, alone)
        assert all_equal(second, alone_other)
    assert len(asked) == 51


@pytest.mark.parametrize("compiled", [False, True], ids=["trains", "trains compiled"])
def test_answers_while_another_thread_trains_exits_on_the_same_backbone(
    ee: MultiExitModel, loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="eager"))
    other = exitkit.attach(ee.backbone, images(), every=2, method="sdn")
    batches = inputs(CALLS)
    with torch.no_grad():
        alone = [mixed(ee, x) for x in batches]
    fitted = copy.deepcopy(other)
    exitkit.Trainer(fitted, epochs=2, compile=compiled, show_progress=False).fit(loader(64))
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(exitkit.Trainer(other, epochs=2, compile=compiled, show_progress=False).fit, loader(64))
        together = in_threads(mixed, ee, batches)
        training.result()
    assert sum(not all_equal(*pair) for pair in zip(alone, together, strict=True)) == 0
    assert all_equal(list(fitted.classifiers.state_dict().values()), list(other.classifiers.state_dict().values()))


class Branching(nn.Module):
    """A path that depends on values, which torch.export refuses with many words."""

    def __init__(self, during: Callable[[], None]) -> None:
        super().__init__()
        self.first, self.last, self.during = nn.Linear(4, 4), nn.Linear(4, 3), during

    def forward(self, x: Tensor) -> Tensor:
        self.during()
        x = self.first(x)
        return self.last(x + 1 if x.sum() > 0 else x)


def test_a_refused_capture_is_quiet_and_other_threads_are_heard(capfd: pytest.CaptureFixture[str]) -> None:
    def others() -> None:
        print("another thread's stderr", file=sys.stderr, flush=True)
        logging.getLogger("torch.export").error("another thread's torch")
        logging.getLogger("theirs").error("another thread's log")

    def during() -> None:
        logging.getLogger("theirs").error("this thread's log")
        logging.getLogger("torch.export").error("this thread's torch")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(others).result()

    model = Branching(lambda: None)
    handler, loggers = logging.StreamHandler(), (logging.getLogger("theirs"), logging.getLogger("torch.export"))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with pytest.raises(NotCapturableError, match=r"data-dependent.*in forward"):
            exitkit.attach(model, torch.randn(2, 4))
        assert capfd.readouterr().err == ""
        model.during = lambda: during() if torch.compiler.is_exporting() else None
        with pytest.raises(NotCapturableError):
            exitkit.attach(model, torch.randn(2, 4))
        heard = capfd.readouterr().err
        loggers[1].error("afterwards")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    for words in ("another thread's stderr", "another thread's torch", "another thread's log", "this thread's log"):
        assert words in heard
    assert "this thread's torch" not in heard
    assert "def forward" not in heard
    assert "afterwards" in capfd.readouterr().err
